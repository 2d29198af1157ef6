"""The package as a whole: the order of imports, lightness, what a wheel holds, documentation."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import debiased_laplace

ROOT = Path(debiased_laplace.__file__).parent
REPOSITORY = ROOT.parent
MODULES = sorted(path.relative_to(ROOT).with_suffix("") for path in ROOT.rglob("*.py"))

#: Data flow one way, and so do imports: a module imports from those before it alone.
ORDER = [
    "_checks", "_guards", "_data", "_plain", "_files", "_store", "likelihoods", "sampling", "network", "curvature",
    "posterior", "fitting", "quadratic", "testing", "laplace", "laplace_torch", "evaluation", "cli", "__main__",
]  # fmt: skip


def own_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
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
        found |= {name[1] for name in names if name[0] == "debiased_laplace" and len(name) > 1}
    return found - {"__version__"}


def foreign_imports(path: Path) -> set[str]:
    """Top-level names of other packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_every_module_has_its_place_in_the_order():
    assert {module.parts[0] for module in MODULES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", [m for m in MODULES if m.parts != ("__init__",)], ids=str)
def test_imports_go_one_way(module):
    own = ORDER.index(module.parts[0])
    for name in own_imports((ROOT / module).with_suffix(".py")):
        assert name in ORDER, f"{module} imports {name}, which is no module"
        allowed = own + (len(module.parts) > 1)  # parts of one subpackage may import each other
        assert ORDER.index(name) < allowed, f"{module} imports {name}, which comes later"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_the_drop_in_imports_laplace_torch_and_nothing_imports_the_tests(module):
    foreign = foreign_imports((ROOT / module).with_suffix(".py"))
    assert not foreign & {"tests", "eval", "pytest", "curvlinops", "backpack"}
    if module.parts[0] not in ("laplace_torch", "evaluation"):
        assert "laplace" not in foreign


def test_the_core_needs_torch_and_little_else():
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "scipy", "tqdm", "safetensors", "debiased_laplace"}
    for module in MODULES:
        if module.parts[0] not in ("laplace_torch", "evaluation", "cli", "__main__"):
            assert foreign_imports((ROOT / module).with_suffix(".py")) <= allowed, module


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
        "heavy = {'laplace', 'sklearn', 'matplotlib', 'netcal', 'pandas', 'typer', 'rich', 'jinja2'}\n"
        "print(alone, sorted(heavy & set(sys.modules)))\n"
    )
    seconds, heavy = run_python(code).split(" ", 1)
    assert float(seconds) < 0.5
    assert heavy.strip() == "[]"


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
    from hatchling.builders.wheel import WheelBuilder

    builder = WheelBuilder(str(REPOSITORY))
    held = {included.distribution_path for included in builder.recurse_included_files()}
    assert {Path(path).parts[0] for path in held} == {"debiased_laplace"}
    assert {str(Path("debiased_laplace") / module) + ".py" for module in MODULES} <= held
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
