"""The package as a whole: the order of imports, lightness, what a wheel holds, documentation."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import debiased_laplace
from debiased_laplace import evaluation

ROOT = Path(debiased_laplace.__file__).parent
REPOSITORY = ROOT.parent
MODULES = sorted(path.relative_to(ROOT).with_suffix("") for path in ROOT.rglob("*.py"))

#: Data flow one way, and so do imports: a module imports from those before it alone.
ORDER = [
    "_checks", "_arrays", "_guards", "_ranks", "_data", "_plain", "_files", "_store", "conformal", "likelihoods",
    "sampling", "network", "curvature", "posterior", "fitting", "quadratic", "testing", "laplace", "integrations",
    "laplace_torch", "evaluation", "cli", "__main__",
]  # fmt: skip


def package_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            module = (node.module or "").split(".")
            if module == ["debiased_laplace"]:
                homes = debiased_laplace._HOMES
                names = [["debiased_laplace", *homes.get(alias.name, alias.name).split(".")] for alias in node.names]
            else:
                names = [module]
        else:
            continue
        imported |= {name[1] for name in names if name[0] == "debiased_laplace" and len(name) > 1}
    return imported - {"__version__"}


def top_level_names(nodes: Iterable[ast.AST]) -> set[str]:
    """Top-level names of what import statements among some nodes of a syntax tree import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def external_imports(path: Path, *, when_imported: bool = False) -> set[str]:
    """Top-level names of other packages that a file imports: anywhere in it, or as soon as it is imported."""
    tree = ast.parse(path.read_text())
    return top_level_names(tree.body if when_imported else ast.walk(tree)) - set(sys.stdlib_module_names)


def test_every_module_has_its_place_in_the_order():
    assert {module.parts[0] for module in MODULES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", [m for m in MODULES if m.parts != ("__init__",)], ids=str)
def test_imports_go_one_way(module):
    position = ORDER.index(module.parts[0])
    for name in package_imports((ROOT / module).with_suffix(".py")):
        assert name in ORDER, f"{module} imports {name}, which is no module"
        allowed = position + (len(module.parts) > 1)  # parts of one subpackage may import each other
        assert ORDER.index(name) < allowed, f"{module} imports {name}, which comes later"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_the_drop_in_imports_laplace_torch_and_nothing_imports_the_tests(module):
    external = external_imports((ROOT / module).with_suffix(".py"))
    assert not external & {"tests", "eval", "pytest", "curvlinops", "backpack"}
    if module.parts[0] not in ("laplace_torch", "evaluation"):
        assert not external & {"laplace", "torchmetrics"}


# -- what is installed -------------------------------------------------------------------------------


def distribution_names(requirements: Iterable[str]) -> set[str]:
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}
    return {re.sub("[-_.]+", "-", name).lower() for name in names} - {"debiased-laplace"}


@pytest.fixture(scope="module")
def declared() -> dict[str, set[str]]:
    """Distributions that pyproject.toml declares, by extra, those of the base included; ``base`` is no extra."""
    core = WheelBuilder(str(REPOSITORY)).metadata.core
    base = distribution_names(core.dependencies)
    extras = {extra: distribution_names(names) for extra, names in core.optional_dependencies.items()}
    return {"base": base} | {extra: base | names for extra, names in extras.items()}


@pytest.fixture(scope="module")
def providers() -> dict[str, set[str]]:
    """Distributions that provide a top-level name, among those that are installed."""
    return {name: distribution_names(of) for name, of in importlib.metadata.packages_distributions().items()}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_of_the_package_are_declared(module, declared, providers):
    path = (ROOT / module).with_suffix(".py")
    groups: tuple[tuple[str, bool], ...] = (("base", False),)
    if module.parts[0] in ("evaluation", "cli"):
        groups = ("evaluation", True), ("all", False)
    elif module.parts[0] == "integrations" and module.name in declared:
        groups = ((module.name, False),)  # extras are called as the modules
    for group, when_imported in groups:
        for name in external_imports(path, when_imported=when_imported) - {"debiased_laplace"}:
            assert providers[name] & declared[group], f"{module} imports {name}: declare it in {group!r}"


@pytest.mark.parametrize("folder", ["tests", "eval"])
def test_imports_of_tests_and_experiments_are_declared(folder, declared, providers):
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    beside = {"debiased_laplace", "tests"} | {path.stem for path in (REPOSITORY / "eval").glob("*.py")}
    for path in files:
        for name in external_imports(path) - beside:
            assert providers[name] & declared["test"], f"{path.name} imports {name}: declare it in 'test'"


def test_the_base_is_small_and_extras_contain_each_other(declared):
    expected = {"torch", "laplace-torch", "torchmetrics", "numpy", "scipy", "tqdm", "safetensors"}
    assert declared["base"] == expected
    assert declared["base"] < declared["evaluation"] < declared["all"] < declared["test"]


def test_the_readme_names_the_oldest_torch():
    dependencies = WheelBuilder(str(REPOSITORY)).metadata.core.dependencies
    oldest = [requirement for requirement in dependencies if requirement.startswith("torch>")]
    assert [f"`{requirement}`" in (REPOSITORY / "README.md").read_text() for requirement in oldest] == [True]


def test_the_evaluation_checks_for_all_of_its_extra(declared, providers):
    checked = set().union(*(providers[name] for name in evaluation._EXTRA))
    assert checked == declared["evaluation"] - declared["base"]


def run_without(names: Iterable[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process where these top-level names cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(names)})); {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)


NEEDED = r"need {}, not installed here: they come with pip install 'debiased-laplace\[evaluation\]'\."


@pytest.mark.parametrize(
    "code",
    [
        "import debiased_laplace.evaluation",
        "from debiased_laplace.evaluation import evaluate",
        "import debiased_laplace.evaluation.shifts",
    ],
)
@pytest.mark.parametrize("missing", [evaluation._EXTRA, ["netcal"]], ids=["all", "one"])
def test_a_missing_extra_is_named(code, missing):
    result = run_without(missing, code)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert re.fullmatch("ModuleNotFoundError: .* " + NEEDED.format(", ".join(missing)), last), result.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["demo"], ["fit", "digits"]], ids=" ".join)
@pytest.mark.parametrize("missing", [evaluation._EXTRA, ["typer"]], ids=["all", "one"])
def test_the_command_names_a_missing_extra(arguments, missing):
    module, function = WheelBuilder(str(REPOSITORY)).metadata.core.scripts["debiased-laplace"].split(":")
    code = f"sys.argv[1:] = {arguments}; from {module} import {function}; sys.exit({function}())"
    result = run_without(missing, code)
    assert result.returncode == 1
    assert re.fullmatch("Error: .* " + NEEDED.format(", ".join(missing)), result.stderr.strip()), result.stderr
    assert result.stdout == ""


def of_libraries() -> list[str]:
    """Modules of the integrations that cannot be imported without the library that they are for."""
    files = [(ROOT / module).with_suffix(".py") for module in MODULES if module.parts[0] == "integrations"]
    return [path.stem for path in files if "\nrequire(" in path.read_text()]


@pytest.mark.parametrize("name", of_libraries())
def test_an_integration_names_what_it_lacks(name, declared, providers):
    libraries = [library for library, of in providers.items() if of & (declared[name] - declared["base"])]
    result = run_without(libraries, f"import debiased_laplace.integrations.{name}")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    expected = rf"ModuleNotFoundError: .* needs .*, not installed here: .* pip install 'debiased-laplace\[{name}\]'\."
    assert re.fullmatch(expected, last), result.stderr


NATIVE = [
    m for m in MODULES if m.parts[0] not in ("integrations", "laplace_torch", "evaluation", "cli", "__main__")
]  # fmt: skip
FIT_AND_PREDICT = """
import importlib, torch
for name in {names}:
    importlib.import_module(name)
from debiased_laplace import Categorical
from debiased_laplace.fitting.fit import fit
from debiased_laplace.posterior.predictive import functional_moments
inputs, targets = torch.randn(20, 3), torch.arange(20) % 2
fitted = fit(torch.nn.Linear(3, 2), [(inputs, targets)], Categorical())
print(list(functional_moments(fitted.network, fitted.posterior, inputs)[1].shape))
"""


def test_a_fit_and_its_predictions_need_neither_laplace_torch_nor_an_extra():
    names = [".".join(["debiased_laplace", *module.parts]).removesuffix(".__init__") for module in NATIVE]
    result = run_without(
        [*evaluation._EXTRA, "laplace", "torchmetrics", "torchvision", "curvlinops", "backpack"],
        f"exec({FIT_AND_PREDICT.format(names=names)!r})",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[20, 2, 2]\n"


#: The longest module that needs no reason.
LONGEST = 350


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_long_module_says_why_it_is_long(module):
    text = (ROOT / module).with_suffix(".py").read_text()
    if len(text.splitlines()) > LONGEST:
        assert "long" in (ast.get_docstring(ast.parse(text)) or ""), f"{module} has {len(text.splitlines())} lines"


def test_few_modules_are_at_the_top():
    assert len([module for module in MODULES if len(module.parts) == 1]) <= 10


def test_no_file_outside_the_likelihoods_asks_which_likelihood_it_is():
    names = {"Bernoulli", "Categorical", "Gaussian", "Poisson", "HeteroscedasticGaussian"}
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / module).with_suffix(".py").read_text())):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "isinstance"
                and module.parts[0] != "likelihoods"
            ):
                asked = {getattr(name, "id", "") for name in ast.walk(node.args[1])}
                assert not asked & names, f"{module}, line {node.lineno}"


def test_no_two_public_classes_have_one_name():
    places: dict[str, list[str]] = {}
    for module in MODULES:
        for node in ast.parse((ROOT / module).with_suffix(".py").read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(module))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_is_light():
    code = (
        "import time, sys, torch\n"
        "start = time.perf_counter()\n"
        "import debiased_laplace\n"
        "alone = time.perf_counter() - start\n"
        "debiased_laplace.Kronecker, debiased_laplace.Posterior\n"
        "heavy = {'laplace', 'sklearn', 'matplotlib', 'netcal', 'pandas', 'typer', 'rich', 'jinja2', 'lightning'}\n"
        "heavy |= {'transformers', 'pytorch_lightning', 'onnx', 'onnxscript', 'botorch', 'gpytorch'}\n"
        "print(alone, sorted(heavy & set(sys.modules)))\n"
    )
    seconds, heavy = run_python(code).split(" ", 1)
    assert float(seconds) < 0.5
    assert heavy.strip() == "[]"


def test_the_suite_imports_no_other_laplace_and_no_figures():
    """Nor does a fit, and the compiler only where processes are forked: else a second or more of every process."""
    code = (
        "import gc, sys, torch\n"
        "from debiased_laplace.evaluation import demo\n"
        "from debiased_laplace.laplace import fit\n"
        "demo.seconds_of_a_gradient(at_least=0.01)\n"
        "inputs, targets = torch.rand(20, 1, 8, 8), torch.arange(20) % 10\n"
        "model, data = demo.digits.network().eval(), [(inputs, targets)]\n"
        "posterior = fit(model, data, 'classification', parameters='last_layer')\n"
        "posterior.predict(inputs)\n"
        "heavy = {'laplace', 'torchmetrics', 'torchvision', 'transformers', 'matplotlib', 'jinja2'}\n"
        "compiler = {'torch._dynamo'}\n"
        "print(sorted((heavy | compiler) & set(sys.modules)))\n"
        "from debiased_laplace.evaluation.suite import preloaded\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "before = set(sys.modules)\n"
        "demo.digits.trained(inputs, targets, 0, epochs=1)\n"
        "print(sorted(set(sys.modules) - before))\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
    )
    assert run_python(code).split() == ["[]"] * 3


def test_the_import_alone_does_not_even_need_torch():
    assert run_python("import sys, debiased_laplace; print('torch' in sys.modules)").strip() == "False"


def test_the_command_line_has_help():
    done = subprocess.run(
        [sys.executable, "-m", "debiased_laplace", "--help"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "debiased" in done.stdout.lower()
    assert "demo" in done.stdout


def test_a_wheel_holds_this_package_alone():
    builder = WheelBuilder(str(REPOSITORY))
    held = {included.distribution_path for included in builder.recurse_included_files()}
    assert {Path(path).parts[0] for path in held} == {"debiased_laplace"}
    assert {str(Path("debiased_laplace") / module) + ".py" for module in MODULES} <= held
    assert "debiased_laplace/py.typed" in held  # that it has types, for those who check theirs
    assert not [path for path in held if "test_" in path or path.endswith(".pyc")]


def test_the_names_of_the_package():
    assert sorted(debiased_laplace.__all__) == sorted(debiased_laplace._HOMES)
    for name in debiased_laplace.__all__:
        assert name in dir(debiased_laplace)
        assert getattr(debiased_laplace, name).__module__.startswith("debiased_laplace.")
    with pytest.raises(AttributeError, match="'debiased_laplace' has no attribute 'Nothing'"):
        _ = debiased_laplace.Nothing


def load(module: Path):
    return importlib.import_module(".".join(["debiased_laplace", *module.parts]).removesuffix(".__init__"))


def public(module: Path) -> list[str]:
    return list(getattr(load(module), "__all__", [])) if module.parts[-1] != "__main__" else []


@pytest.mark.parametrize("module", [m for m in MODULES if m.parts[-1] != "__main__"], ids=str)
def test_public_names_are_documented(module):
    assert inspect.getdoc(load(module)), f"{module} has no docstring"
    for name in public(module):
        value = getattr(load(module), name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert inspect.getdoc(value), f"{name} has no docstring"


@pytest.mark.parametrize("module", [m for m in MODULES if ">>> " in (ROOT / m).with_suffix(".py").read_text()], ids=str)
def test_examples_run(module):
    result = doctest.testmod(load(module), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
