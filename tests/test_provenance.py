"""Records belong to what made them: a change of anything that decides the numbers is seen, and nothing else is."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from debiased_laplace.cli import app
from debiased_laplace.evaluation import Context, Method, Options, Task, TaskError, records, run
from debiased_laplace.evaluation.bias import BiasOptions, study
from debiased_laplace.evaluation.provenance import data_digest, network_digest, seeded, source_digest
from debiased_laplace.evaluation.shipped import common, digits, uci

pytestmark = pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")  # little data
OPTIONS = Options(grid_size=3, n_resamples=5)
MAP = (Method("MAP", "map"),)
#: Weights, data and a constant from files, a neighbour at the top and another within a function.
TASK = """
import json
from pathlib import Path
import torch
from neighbour import width

HERE = Path(__file__).parent
CLASSES = tuple(json.loads((HERE / "names.json").read_text()))

def model():
    from later import network
    net = network(width)
    net.load_state_dict(torch.load(HERE / "weights.pt", weights_only=True))
    return net

def ensemble():
    return [model()]

def part(name):
    x, y = torch.load(HERE / f"{name}.pt", weights_only=True)
    return list(zip(x.split(8), y.split(8)))

def train_loader(): return part("train")
def val_loader(): return part("val")
def test_loader(): return part("test")
def shifted_loaders(): return {"s": part("shifted")}
def ood_loaders(): return {"f": part("ood")}
"""


def written(folder: Path) -> Path:
    """A folder with a task whose parts are all in files."""
    folder.mkdir(parents=True)
    (folder / "task.py").write_text(TASK)
    (folder / "neighbour.py").write_text("width = 4\n")
    (folder / "later.py").write_text("from torch import nn\ndef network(n): return nn.Sequential(nn.Linear(2, n), "
                                     "nn.Tanh(), nn.Linear(n, 2))\n")  # fmt: skip
    (folder / "names.json").write_text('["a", "b"]')
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).state_dict(), folder / "weights.pt")
    for name in ("train", "val", "test", "shifted", "ood"):
        x = torch.randn(60, 2)
        torch.save((x, (x[:, 0] > 0).long()), folder / f"{name}.pt")
    return folder


def kept(folder: Path, source: str | Path | None = None, methods: tuple[Method, ...] = MAP, **keywords: Any) -> bool:
    """Whether the record was there already."""
    steps: list[str] = []
    task = Task.load(source or folder / "task.py")
    out, context = keywords.pop("out", folder / "out"), keywords.pop("context", Context())
    run(task, out, [0], context, methods=methods, options=OPTIONS, progress=lambda _, step: steps.append(step))
    return "kept" in steps


def tensors(name: str, change: Callable[[Tensor, Tensor], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        parts = torch.load(folder / f"{name}.pt", weights_only=True)
        change(*parts)
        torch.save(parts, folder / f"{name}.pt")

    return apply


def text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = (folder / name).read_text()
        assert old in content
        (folder / name).write_text(content.replace(old, new))

    return apply


def weights(folder: Path) -> None:
    state = torch.load(folder / "weights.pt", weights_only=True)
    state["2.bias"][1] += 1e-6
    torch.save(state, folder / "weights.pt")


CHANGES = {
    "weights": weights,
    "activation in a module that a function imports": text("later.py", "nn.Tanh()", "nn.ReLU()"),
    "a neighbour's text": text("neighbour.py", "4", "2 * 2"),
    "a name in a file": text("names.json", '"b"', '"c"'),
    "the task's text": text("task.py", "split(8)", "split(9)"),
    "a label in the last batch of the test data": tensors("test", lambda x, y: y.__setitem__(59, 1 - y[59])),
    "an input in the last batch of the validation data": tensors("val", lambda x, y: x[59].add_(1)),
    "an input in the last batch of the training data": tensors("train", lambda x, y: x[59].add_(1)),
    "an input in the first batch of the shifted data": tensors("shifted", lambda x, y: x[7].add_(1)),
    "an input in the first batch of the out-of-distribution data": tensors("ood", lambda x, y: x[7].add_(1)),
    "the number of out-of-distribution data": lambda folder: torch.save(
        [part[:50] for part in torch.load(folder / "ood.pt", weights_only=True)], folder / "ood.pt"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = written(tmp_path_factory.mktemp("finished") / "folder")
    assert not kept(folder)
    return folder


def copied(finished: Path, tmp_path: Path) -> Path:
    """Another place, with the records."""
    return Path(shutil.copytree(finished, tmp_path / "elsewhere"))


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_numbers_is_seen(finished: Path, tmp_path: Path, change: str) -> None:
    folder = copied(finished, tmp_path)
    assert kept(folder)
    CHANGES[change](folder)
    assert not kept(folder)
    assert kept(folder)
    assert len(list((folder / "out" / "records").iterdir())) == 2


def test_nothing_else_is_seen(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(finished, tmp_path)
    (folder / "unrelated.py").write_text("1 / 0")
    (folder / "task.py").touch()
    monkeypatch.chdir(folder)
    for source in ("task.py", "./task.py", "../elsewhere/task.py", folder / "task.py"):
        assert kept(folder, source, out=Path("out"), context=Context(data_dir=tmp_path, cache=tmp_path / "c"))
    monkeypatch.chdir(tmp_path)
    assert kept(folder, "elsewhere/task.py")


def test_the_networks_of_an_ensemble_are_seen_where_they_are_judged(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    shutil.copy(folder / "weights.pt", folder / "member.pt")
    text("task.py", "    return [model()]", "    net = model()\n    net.load_state_dict(torch.load(HERE / 'member.pt', "
         "weights_only=True))\n    return [net]")(folder)  # fmt: skip
    both = (*MAP, Method("members", "ensemble"))
    kept(folder), kept(folder, methods=both)
    state = torch.load(folder / "member.pt", weights_only=True)
    torch.save({name: 2 * value for name, value in state.items()}, folder / "member.pt")
    assert kept(folder)
    assert not kept(folder, methods=both)


def test_a_neighbour_is_read_anew_and_so_is_that_of_another_folder(tmp_path: Path) -> None:
    """Within one process, as in a notebook."""
    one, two = written(tmp_path / "one"), written(tmp_path / "two")
    (two / "neighbour.py").write_text("width = 40 // 10  # of two\n")
    (two / "later.py").write_text((two / "later.py").read_text().replace("Tanh", "Sigmoid"))
    assert isinstance(Task.load(one / "task.py").model(Context())[1], nn.Tanh)
    assert isinstance(Task.load(two / "task.py").model(Context())[1], nn.Sigmoid)
    text("later.py", "nn.Tanh()", "nn.Softplus()")(one)
    os.utime(one / "later.py", (1, 1))
    assert isinstance(Task.load(one / "task.py").model(Context())[1], nn.Softplus)


def test_a_training_without_a_seed_of_its_own_is_the_same_again(tmp_path: Path) -> None:
    folder = written(tmp_path / "folder")
    text("task.py", '    net.load_state_dict(torch.load(HERE / "weights.pt", weights_only=True))\n', "")(folder)
    text("task.py", 'return part("train")', "\n    from torch.utils.data import DataLoader, TensorDataset\n"
         '    return DataLoader(TensorDataset(*torch.load(HERE / "train.pt", weights_only=True)), 8, shuffle=True)'
         )(folder)  # fmt: skip
    assert not kept(folder)
    torch.rand(3)
    assert kept(folder)


def test_what_an_interrupted_run_did_belongs_to_what_made_it(finished: Path, tmp_path: Path) -> None:
    folder, task = copied(finished, tmp_path), None
    methods = (*MAP, Method("debiased", fit={"budget": 20}))

    def interrupt(_: int, step: str) -> None:
        if step == "distances":
            raise KeyboardInterrupt

    task = Task.load(folder / "task.py")
    with pytest.raises(KeyboardInterrupt):
        run(task, tmp_path / "out", [0], Context(), methods=methods, options=OPTIONS, progress=interrupt)
    weights(folder)
    tensors("train", lambda x, y: x.mul_(3))(folder)
    tensors("test", lambda x, y: x[1:].mul_(2))(folder)
    task = Task.load(folder / "task.py")
    (result,) = run(task, tmp_path / "out", [0], Context(), methods=methods, options=OPTIONS)
    (expected,) = run(task, tmp_path / "new", [0], Context(), methods=methods, options=OPTIONS)
    assert result["test"] == expected["test"]
    assert not any((tmp_path / "out" / "work").iterdir())


# -- the bias study, fits, caches ------------------------------------------------------------------

FEW = BiasOptions(
    batch_size=8, n_batches=3, n_directions=2, n_steps=1, pool=40, reference=30, sizes=(8,), n_size_directions=1,
    n_vectors=1,
)  # fmt: skip


@pytest.mark.parametrize("change", ["", *list(CHANGES)[:3], list(CHANGES)[7]])
def test_parts_of_a_bias_study_belong_to_what_made_them(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    folder = copied(finished, tmp_path)
    study(Task.load(folder / "task.py"), tmp_path, Context(), FEW)
    monkeypatch.chdir(folder)
    if change:
        CHANGES[change](folder)
    assert study(Task.load("task.py"), tmp_path, Context(), FEW)["kept"] == (0 if change else 3)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("undrawn")
def test_the_command_line_says_what_was_used_again_and_when(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    for command, what in ((["evaluate", "--only", "MAP"], "1 of 1 seeds"), (["bias"], "3 of 4 parts")):
        arguments = [command[0], folder / "task.py", "--quick", "--out", tmp_path / command[0], *command[1:]]
        first = invoke(*arguments)
        assert first.exit_code == 0, first.output
        assert "finished earlier" not in first.stdout
        files = sorted((tmp_path / command[0] / "records").iterdir())
        for index, file in enumerate(files):
            content = records.read_record(file, {})
            records.write_record(file, content | {"made": f"2001-02-03 04:05:0{index} UTC"})
        if command[0] == "bias":
            next(file for file in files if "steps" in file.name).unlink()
        again = invoke(*arguments)
        assert again.exit_code == 0, again.output
        said = " ".join(again.stdout.split())
        assert f"{what} were finished earlier (2001-02-03 04:05:00 UTC" in said
        assert "with the same network, data, task file and settings" in said
        weights(folder)
        assert "finished earlier" not in invoke(*arguments).stdout


@pytest.mark.parametrize("change", ["weights", "an input in the last batch of the training data"])
def test_an_interrupted_fit_of_something_else_is_not_used(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    folder = copied(finished, tmp_path)
    arguments = ["fit", folder / "task.py", "--budget", 20, "--out", tmp_path / "p.safetensors"]
    with monkeypatch.context() as patch:

        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("debiased_laplace.fitting.checkpoint.Checkpoint.complete", interrupt)
        assert invoke(*arguments).exit_code == 130
    (left,) = tmp_path.glob("*.progress")
    CHANGES[change](folder)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "Not used:" in result.stderr and left.name in result.stderr.replace("\n", "")
    assert invoke(*[*arguments[:-1], tmp_path / "new.safetensors"]).exit_code == 0
    read = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("p", "new")]
    assert read[0] == read[1]


def test_kept_weights_belong_to_data_network_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def model(**settings: Any) -> nn.Module:
        activation = settings.pop("activation", nn.Tanh)

        def build() -> nn.Module:
            return nn.Sequential(nn.Linear(2, 2), activation())

        return common.kept(tmp_path, "a", settings, build, lambda: (made.append(1), build())[1], torch.device("cpu"))

    first = model(seed=0, data="1")[0].weight
    assert torch.equal(model(seed=0, data="1")[0].weight, first)
    assert len(made) == 1
    for settings_ in (
        {"seed": 1, "data": "1"},
        {"seed": 0, "data": "2"},
        {"seed": 0, "data": "1", "activation": nn.ReLU},
    ):
        model(**settings_)
    assert len(made) == 4
    trained: list[int] = []
    original = digits.trained
    monkeypatch.setattr(digits, "trained", lambda *a, **k: (trained.append(1), original(*a, **{**k, "epochs": 0}))[1])
    context: dict[str, Any] = {"seed": 0, "cache": tmp_path, "quick": True}
    digits.model(**context), digits.model(**context)
    monkeypatch.setattr(digits, "TRAIN_FRACTION", 0.3)
    digits.split.cache_clear()
    digits.model(**context)
    digits.split.cache_clear()
    assert len(trained) == 2


def test_files_of_data_that_change_are_read_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for scale in (1.0, 2.0):
        np.savez(tmp_path / "a.npz", X=scale * rng.normal(size=(30, 2)), y=scale * rng.normal(size=30),
                 train_idx=np.arange(20)[None], test_idx=np.arange(20, 30)[None])  # fmt: skip
        os.utime(tmp_path / "a.npz", (scale, scale))
        with np.load(tmp_path / "a.npz") as file:
            test = file["y"][20:]
        result = uci.split(tmp_path / "a.npz", 0)
        assert result.test[1][:, 0].numpy() * result.std + result.mean == pytest.approx(test, rel=1e-4)


# -- digests ---------------------------------------------------------------------------------------


def test_networks_are_told_apart() -> None:
    def network(activation: nn.Module | None = None) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), activation or nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2))

    others = [network(nn.Tanh()), network().double(), *(network() for _ in range(4))]
    others[2][0].weight.data[1, 1] += 1e-6
    others[3][2].running_mean += 1
    others[4][0].weight.requires_grad_(False)
    others[5].register_buffer("scale", torch.ones(2), persistent=False)
    digests = [network_digest(model) for model in (network(), *others)]
    assert len(set(digests)) == 7
    assert network_digest(network()) == digests[0]
    shown = network()
    shown.extra_repr = lambda: repr(object())  # type: ignore[method-assign]
    again = network()
    again.extra_repr = lambda: repr(object())  # type: ignore[method-assign]
    assert network_digest(shown) == network_digest(again)


X, Y = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 2


def test_data_are_told_apart() -> None:
    def changed(index: int) -> Tensor:
        return X.index_put((torch.tensor(index), torch.tensor(0)), torch.tensor(9.0))

    batches = [(X[:20], Y[:20]), (X[20:], Y[20:])]
    others = [
        [(changed(29)[:20], Y[:20]), (changed(29)[20:], Y[20:])],
        [(X[:20], Y[:20]), (X[20:], 1 - Y[20:])],
        [(X[:20].double(), Y[:20]), (X[20:], Y[20:])],
        batches[:1],
        [{"x": x, "labels": y} for x, y in batches],
        [{"z": x, "labels": y} for x, y in batches],
        [({"x": x, "text": ["a"] * len(x)}, y) for x, y in batches],
        [({"x": x, "text": ["b"] * len(x)}, y) for x, y in batches],
        [(x.numpy(), y) for x, y in batches[::-1]],
        DataLoader(TensorDataset(X, Y), 20),
        None,
    ]
    digests = [data_digest(loader) for loader in (batches, *others)]
    assert len(set(digests)) == len(digests)
    assert data_digest([tuple(part.clone() for part in batch) for batch in batches]) == digests[0]
    # as far as they are seen
    assert data_digest(batches, 20) == data_digest(others[1], 20)
    assert data_digest(batches, None) == data_digest(others[1], None)
    assert data_digest(iter(batches)) == data_digest(iter(batches)) != data_digest(iter(others[0]))
    endless = iter(lambda: (X, Y), None)
    assert data_digest(endless, 100)


def test_random_loaders_are_the_same_with_the_same_seed() -> None:
    loader = DataLoader(TensorDataset(X, Y), 20, shuffle=True)

    def digest(seed: int) -> str:
        with seeded(seed):
            return data_digest(loader)

    state = torch.get_rng_state()
    assert digest(1) == digest(1) != digest(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_sources_are_what_a_file_imports_from_its_folder(tmp_path: Path) -> None:
    def write(name: str, content: str = "") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return path

    task = write("task.py", "import a.b\nimport torch\ndef f():\n    from c import d\n    from e import name as n")
    for name in ("a/__init__.py", "a/b.py", "c/d.py", "e.py", "f.py", "a/other.py"):
        write(name)
    write("a/b.py", "from . import inner\nfrom ..e import x\nimport task")
    write("a/inner.py", "from .deep.end import y")
    write("a/deep/end.py")
    first = source_digest(task)
    for name in ("a/__init__.py", "a/b.py", "c/d.py", "e.py", "a/inner.py", "a/deep/end.py", "task.py"):
        path = tmp_path / name
        content = path.read_text()
        path.write_text(content + "\n#")
        assert source_digest(task) != first, name
        path.write_text(content)
    for name in ("f.py", "a/other.py"):
        write(name, "#")
    write("e.py", "def broken(:")
    assert source_digest(task) != first
    write("e.py")
    assert source_digest(task) == first
    shutil.copytree(tmp_path, tmp_path.parent / "moved")
    (tmp_path.parent / "moved" / "task.py").rename(tmp_path.parent / "moved" / "mine.py")
    (tmp_path.parent / "moved" / "a" / "b.py").write_text((tmp_path / "a" / "b.py").read_text())
    assert source_digest(tmp_path.parent / "moved" / "mine.py") == first
    assert Task.load("digits").fingerprint == Task.load("digits").fingerprint != Task.load("cifar10").fingerprint


# -- numbers that JSON lacks -----------------------------------------------------------------------

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
TEXTS = st.one_of(
    st.text(max_size=5), st.sampled_from(["Infinity", "-Infinity", "NaN", "\\NaN", "\\\\Infinity", "nan"])
)
VALUES = st.recursive(
    st.one_of(NUMBERS, TEXTS, st.integers(), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)), max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=150, derandomize=True)
@given(VALUES)
@example(["Infinity", math.inf, "\\-Infinity", -math.inf, {"NaN": math.nan}])
def test_every_value_comes_back(value: Any) -> None:
    text = json.dumps(records.encode(value), allow_nan=False)
    assert repr(records.decode(json.loads(text))) == repr(value)


def test_numbers_in_files_are_those_of_python_and_javascript(tmp_path: Path) -> None:
    records.write_json(tmp_path / "a.json", {"a": [math.inf, -math.inf, math.nan, 1.5]})
    assert (tmp_path / "a.json").read_text() == '{"a":["Infinity","-Infinity","NaN",1.5]}\n'
    assert [float(value) for value in json.loads((tmp_path / "a.json").read_text())["a"]][:2] == [math.inf, -math.inf]
    result = records.read_json(tmp_path / "a.json")["a"]
    assert result[:2] == [math.inf, -math.inf] and math.isnan(result[2])


def test_a_task_that_fails_has_no_record(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    (folder / "val.pt").unlink()
    with pytest.raises(TaskError, match=r"val_loader\(\) of .*task.py failed: FileNotFoundError"):
        kept(folder)
