"""Task files: what is called with what, and errors that name the function and the cause."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from debiased_laplace import DebiasedLaplace
from debiased_laplace.evaluation import Context, Options, Task, TaskError, run
from debiased_laplace.evaluation.methods import methods_of
from debiased_laplace.evaluation.shipped import names
from debiased_laplace.evaluation.tasks import DEFAULT_BUDGET, REQUIRED, resolve_device

BLOBS = Path(__file__).parent / "tasks" / "blobs.py"
MINIMAL = "\n".join(f"def {name}(): return None" for name in REQUIRED)


def write(folder: Path, text: str, name: str = "task.py") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def changed(folder: Path, *replacements: tuple[str, str]) -> Task:
    """The blobs with parts of the file replaced."""
    text = BLOBS.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return Task.load(write(folder, text))


# -- loading ---------------------------------------------------------------------------------------


def test_a_task_file(tmp_path: Path) -> None:
    before = list(sys.path)
    task = Task.load(BLOBS)
    assert sys.path == before
    assert (task.name, task.likelihood, task.budget) == ("blobs", "classification", 24)
    assert task.description(Context()) == "Three blobs in the plane."
    assert task.constant("SEEDS") == 2
    assert task.constant("NOTHING", 5) == 5
    assert task.has("images")
    assert not task.has("ensemble")
    assert not task.has("NAME")
    assert Task.load(BLOBS).fingerprint == task.fingerprint
    assert Task.load(write(tmp_path, BLOBS.read_text() + "#")).fingerprint != task.fingerprint
    plain = Task.load(write(tmp_path, MINIMAL, "plain name.py"))
    assert (plain.name, plain.likelihood, plain.budget) == ("plain name", "classification", DEFAULT_BUDGET)
    assert plain.description(Context()) == ""
    described = Task.load(write(tmp_path, MINIMAL + "\ndef description(quick): return f'quick is {quick}'"))
    assert described.description(Context(quick=True)) == "quick is True"


def test_shipped_tasks_are_found_by_name() -> None:
    for name in ("digits", "uci-energy"):
        assert name in names()
        assert Task.load(name).has("test_loader")
    assert Task.load("uci-energy").likelihood == "regression"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1 / 0", "task.py does not run: ZeroDivisionError: division by zero"),
        ("def model(:", "task.py does not run: SyntaxError"),
        ("import nothing_of_this_name", "does not run: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("from . import neighbour", "does not run: ImportError: attempted relative import"),
        (
            "def model(): pass",
            r"define the functions model\(\), train_loader\(\).*; train_loader\(\), val_loader\(\), ",
        ),
        (MINIMAL.replace("def test_loader(): return None", "test_loader = 3"), r"; test_loader\(\) is missing. `deb"),
        (MINIMAL + "\nLIKELIHOOD = 'poisson'", r"LIKELIHOOD of .*task.py out of \['classification', .*got 'poisson'"),
    ],
)
def test_files_that_are_no_tasks(tmp_path: Path, text: str, message: str) -> None:
    before = list(sys.path)
    with pytest.raises(TaskError, match=message):
        Task.load(write(tmp_path, text))
    assert sys.path == before


def test_tasks_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"got .*none.py, which does not exist. `debiased-laplace init-task`"):
        Task.load(tmp_path / "none.py")
    with pytest.raises(TaskError, match=r"a Python file or a shipped task out of digits, .*got 'digit'"):
        Task.load("digit")
    with pytest.raises(TaskError, match="which does not exist"):
        (tmp_path / "folder.py").mkdir()
        Task.load(tmp_path / "folder.py")


def test_neighbours_of_the_file_can_be_imported(tmp_path: Path) -> None:
    write(tmp_path, "from torch import nn\nNETWORK = nn.Linear(2, 3)", "one/net_of_one.py")
    write(tmp_path, "from torch import nn\nNETWORK = nn.Linear(2, 4)", "two/net_of_two.py")
    at_the_top = Task.load(write(tmp_path, "import net_of_one\n" + MINIMAL, "one/task.py"))
    assert at_the_top.definition.net_of_one.NETWORK.out_features == 3
    text = MINIMAL.replace("def model(): return None", "def model():\n import net_of_two\n return net_of_two.NETWORK")
    inside = Task.load(write(tmp_path, text, "two/task.py"))
    before = list(sys.path)
    assert inside.model(Context()).out_features == 4
    assert sys.path == before


def test_classes_of_the_file_can_be_pickled(tmp_path: Path) -> None:
    """For workers of a loader."""
    task = Task.load(write(tmp_path, MINIMAL + "\nclass Data:\n    pass"))
    assert isinstance(pickle.loads(pickle.dumps(task.definition.Data())), task.definition.Data)


# -- calling ---------------------------------------------------------------------------------------


def test_functions_get_what_they_ask_for_and_nothing_else(tmp_path: Path) -> None:
    context = Context(3, tmp_path, tmp_path / "cache", True, torch.device("cpu"))
    definition = SimpleNamespace(
        model=lambda: "nothing",
        train_loader=lambda seed, quick: (seed, quick),
        val_loader=lambda *, device, data_dir, cache: (device, data_dir, cache),
        test_loader=lambda seed=0, **rest: (seed, rest),
        shifted_loaders=lambda unknown=7, seed=0: (unknown, seed),
        ood_loaders=lambda unknown: unknown,
    )
    task = Task("mine", definition)
    assert task.call("model", context) == "nothing"
    assert task.call("train_loader", context) == (3, True)
    assert task.call("val_loader", context) == (torch.device("cpu"), tmp_path, tmp_path / "cache")
    assert task.call("test_loader", context) == (3, {})
    assert task.call("shifted_loaders", context) == (7, 3)
    with pytest.raises(TaskError, match=r"ood_loaders\(\) of mine failed: TypeError: .*'unknown'"):
        task.call("ood_loaders", context)


def test_errors_of_functions_have_their_name_and_cause() -> None:
    def fail() -> None:
        raise OSError("no such data")

    def refuse() -> None:
        raise TaskError("in its own words")

    task = Task("mine.py", SimpleNamespace(model=lambda: nn.Linear, train_loader=fail, val_loader=refuse))
    with pytest.raises(TaskError, match=r"train_loader\(\) of mine.py failed: OSError: no such data") as caught:
        task.call("train_loader", Context())
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(TaskError, match=r"^in its own words$"):
        task.call("val_loader", Context())
    with pytest.raises(TaskError, match=r"model\(\) of mine.py to return a torch.nn.Module, got type. Return the"):
        task.model(Context())


def test_the_network_comes_in_evaluation_mode() -> None:
    task = Task("mine.py", SimpleNamespace(model=lambda: nn.Dropout().train()))
    assert not task.model(Context()).training


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def train_loader(seed: int) -> list:", "def train_loader():\n    return []\n", r"train_loader\(\).*empty"),
        (
            "def val_loader(seed: int) -> list:", "def val_loader(seed):\n    return cut(torch.randn(9, 5), CENTRES)\n",
            r"val_loader\(\) of .*task.py: .*",
        ),
        (
            "def val_loader(seed: int) -> list:",
            "def val_loader(seed):\n    return [(torch.randn(9, 5), torch.arange(9) % 3)]\n",
            r"val_loader\(\) of .*: Predictor 'MAP' failed on the first batch.*\(9, 5\): RuntimeError",
        ),
        ("cut(*data(300, 70))", "[(x, y + 1) for x, y in cut(*data(300, 70))]", "from 0 to 2 in the test.*got 1 to 3"),
        ("6 * inputs, targets)", "inputs * float('nan'), targets)", r"ood_loaders\(\) of .*task.py: .*finite prob"),
        ("    return network\n", "    return nn.Sequential(network, nn.Linear(3, 1))\n", "at least two classes"),
        ("def ood_loaders() -> dict:", "def ood_loaders():\n    raise OSError('gone')\n", r"ood_loaders\(\).*OSError"),
        ('"moved": {s: cut', '"moved": {f"low {s}": cut', "severit.*low 1"),
        ('("east", "north", "south")', '("east", "north")', "CLASSES.*3"),
        ("reshape(-1, 1, 1, 2)", "reshape(-1)", "images"),
        ('"""A tiny', 'def description():\n    raise OSError("gone")\n"""', "description.*gone"),
        ('"""A tiny', 'def target_scale():\n    raise OSError("gone")\n"""', "target_scale.*gone"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_before_anything_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    fits: list[int] = []
    original = DebiasedLaplace.fit
    monkeypatch.setattr(DebiasedLaplace, "fit", lambda self, *a, **k: (fits.append(1), original(self, *a, **k)))
    task = changed(tmp_path, (old, new))
    with pytest.raises(TaskError, match=message):
        methods = tuple(m for m in methods_of(task) if m.role == "candidate")
        run(task, tmp_path, [0], Context(), methods=methods, options=Options(grid_size=3, n_resamples=2))
    assert not fits


def test_targets_of_a_regression_need_the_shape_of_the_outputs(tmp_path: Path) -> None:
    text = (
        (BLOBS.parent / "wave.py")
        .read_text()
        .replace("[data(100 + seed, 80)]", "[(data(9, 9)[0], data(9, 9)[1].repeat(1, 2))]")
    )
    task = Task.load(write(tmp_path, text))
    with pytest.raises(TaskError, match=r"train_loader\(\) of .*targets with 1 number.* got shape \(9, 2\)"):
        run(task, tmp_path, [0], Context(), options=Options(grid_size=3, n_resamples=2))


# -- devices ---------------------------------------------------------------------------------------


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(None).type in ("cpu", "cuda")
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=f"a device out of cpu.*got '{name}'"):
            resolve_device(name)
