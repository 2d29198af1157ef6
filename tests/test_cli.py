"""The command line on tiny tasks: what is written, exit codes, and messages instead of tracebacks."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import debiased_laplace
from debiased_laplace import DebiasedLaplace
from debiased_laplace.cli import app
from debiased_laplace.cli.terminal import importing
from debiased_laplace.evaluation import Context, Task
from debiased_laplace.evaluation.methods import methods_of
from debiased_laplace.evaluation.shipped import names
from debiased_laplace.evaluation.suite import bench
from tests.tolerances import FLOAT32

BLOBS, WAVE = (Path(__file__).parent / "tasks" / f"{name}.py" for name in ("blobs", "wave"))
runner = CliRunner()
pytestmark = pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")  # little data, large priors


def invoke(*arguments: object) -> Any:
    return runner.invoke(app, [str(argument) for argument in arguments])


def told(result: Any) -> str:
    """What an error says, on one line; that it is no traceback."""
    assert result.exit_code != 0
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("evaluated") / "new" / "folder"
    state = torch.get_rng_state()
    result = invoke("evaluate", BLOBS, "--quick", "--out", out, "--device", "cpu")
    return SimpleNamespace(out=out, result=result, unchanged=torch.equal(state, torch.get_rng_state()))


@pytest.fixture(scope="module")
def posterior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    result = invoke("fit", BLOBS, "--out", folder / "blobs.safetensors", "--cache", folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "75 of 75 trainable parameters covered by 2 blocks." in result.stdout
    assert str(folder / "blobs.safetensors") in result.stdout.replace("\n", "")
    assert [path.name for path in folder.iterdir()] == ["blobs.safetensors"]
    return folder / "blobs.safetensors"


# -- evaluate --------------------------------------------------------------------------------------


def test_evaluate(evaluated: SimpleNamespace) -> None:
    result, out = evaluated.result, evaluated.out
    assert result.exit_code == 0, result.output
    assert evaluated.unchanged
    results = json.loads((out / "results.json").read_text())
    assert results["seeds"] == [0]  # a try has one, whatever the task says
    assert results["task"]["name"] == "blobs"
    assert list(results["test"]["scores"]) == [m.name for m in methods_of(Task.load(BLOBS))]
    written = " ".join(result.stdout.split())
    assert results["statement"]["answer"] in written
    assert "Three blobs in the plane." in written
    assert "This was a quick run, which decides nothing." in written
    assert "This was a quick run" in (out / "report.html").read_text()
    for name in ("results.json", "results.md", "reliability.png", "report.html"):
        assert str(out / name) in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if str(out) not in line) <= 100
    assert {path.name for path in out.iterdir()} >= {"records", "work"}


@pytest.mark.usefixtures("undrawn")
def test_evaluate_some_methods_for_some_seeds(tmp_path: Path) -> None:
    result = invoke(
        "evaluate", BLOBS, "--out", tmp_path, "--only", "MAP", "--only", "debiased K-FAC", "--seeds", 2, "--seed", 5
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["seeds"] == [5, 6]
    assert list(results["test"]["scores"]) == ["MAP", "debiased K-FAC"]
    assert results["n_resamples"] == 1000
    assert "quick run" not in result.stdout


@pytest.mark.parametrize("only", ["temperature scaling", "full-data K-FAC", "laplace-torch"])
def test_evaluate_one_method(tmp_path: Path, only: str) -> None:
    result = invoke("evaluate", BLOBS, "--out", tmp_path, "--quick", "--only", only)
    assert result.exit_code == 0, result.output
    assert list(json.loads((tmp_path / "results.json").read_text())["test"]["scores"]) == [only]


def test_evaluate_a_regression_with_shifts(tmp_path: Path) -> None:
    result = invoke("evaluate", WAVE, "--out", tmp_path, "--quick")
    assert result.exit_code == 0, repr(result.exception)
    assert "CRPS" in result.stdout


def test_an_interrupted_evaluation_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench, "evaluate", interrupt)
        result = invoke("evaluate", BLOBS, "--out", tmp_path, "--quick", "--only", "debiased K-FAC")
    assert result.exit_code == 130
    assert "run the same command to go on" in told(result)
    fits: list[int] = []
    original = DebiasedLaplace.fit
    monkeypatch.setattr(DebiasedLaplace, "fit", lambda self, *a, **k: (fits.append(1), original(self, *a, **k)))
    assert invoke("evaluate", BLOBS, "--out", tmp_path, "--quick", "--only", "debiased K-FAC").exit_code == 0
    assert not fits


# -- fit and predict -------------------------------------------------------------------------------


def test_fit_and_predict(posterior: Path, tmp_path: Path) -> None:
    task = Task.load(BLOBS)
    model, (inputs, targets) = task.model(Context()), task.definition.data(300, 70)
    la = DebiasedLaplace.load(posterior, model)
    result = invoke("predict", BLOBS, posterior, "--out", tmp_path / "p.npz", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "probabilities [70, 3]" in result.stdout
    with np.load(tmp_path / "p.npz") as stored:
        assert stored["probabilities"] == pytest.approx(la(inputs).double().numpy(), abs=FLOAT32)
        assert stored["targets"].tolist() == targets.tolist()
        assert set(stored.files) == {
            "targets", "predicted", "probabilities", "entropy", "mutual_information", "functional_variance",
        }  # fmt: skip


def test_fit_has_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[dict[str, object]] = []
    original = DebiasedLaplace.fit
    monkeypatch.setattr(
        DebiasedLaplace, "fit", lambda self, *a, **k: (fits.append(k | {"self": self}), original(self, *a, **k))
    )
    for number, options in enumerate((["--budget", 0], ["--budget", 30], ["--structure", "diag", "--seed", 2])):
        assert invoke("fit", BLOBS, "--out", tmp_path / f"{number}.safetensors", *options).exit_code == 0
    assert [fit["budget"] for fit in fits] == [None, 30, 24]
    assert fits[2]["self"].hessian_structure == "diag"
    assert fits[2]["generator"] == fits[2]["self"].seed == 2


def test_fit_tunes_the_noise_of_a_regression(tmp_path: Path) -> None:
    """The targets' noise is 0.2; with a standard deviation of one, all intervals would be useless."""
    assert invoke("fit", WAVE, "--out", tmp_path / "w.safetensors").exit_code == 0
    assert invoke("predict", WAVE, tmp_path / "w.safetensors", "--out", tmp_path / "p.npz").exit_code == 0
    with np.load(tmp_path / "p.npz") as stored:
        assert stored["mean"].shape == stored["variance"].shape == (70, 1)
        deviation = np.sqrt(stored["variance"].mean())
        assert deviation == pytest.approx(np.sqrt(np.square(stored["mean"] - stored["targets"]).mean()), rel=0.5)


def test_an_interrupted_fit_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, calls = Task.load(BLOBS), []
    original = Task.call

    def call(self: Task, name: str, context: Context) -> object:
        loader = original(self, name, context)
        if name != "train_loader":
            return loader

        def batches() -> object:
            for batch in loader:
                calls.append(1)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                yield batch

        return type("Loader", (), {"__iter__": lambda _: batches()})()

    monkeypatch.setattr(Task, "call", call)
    result = invoke("fit", BLOBS, "--out", tmp_path / "a.safetensors")
    assert result.exit_code == 130
    assert "Run the same command to go on." in told(result)
    assert not (tmp_path / "a.safetensors").exists()
    assert invoke("fit", BLOBS, "--out", tmp_path / "a.safetensors").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert task.name == "blobs"


# -- init-task and tasks ---------------------------------------------------------------------------


def test_init_task(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mine.py"
    result = invoke("init-task", path)
    assert result.exit_code == 0
    assert "Try it: debiased-laplace evaluate" in result.stdout
    assert Task.load(path).name == "my digits"
    path.write_text("mine")
    refused = invoke("init-task", path)
    assert refused.exit_code == 2
    assert "exists. Name another file, or use --force." in told(refused)
    assert path.read_text() == "mine"
    assert invoke("init-task", path, "--force").exit_code == 0
    assert path.read_text().startswith('"""A task for `debiased-laplace evaluate`')


def test_tasks() -> None:
    result = invoke("tasks")
    assert result.exit_code == 0
    assert result.stdout.split() == names()


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["evaluate", "nothing"], 1, "Error: Expected a Python file or a shipped task out of digits, fashion-mnist"),
        (["evaluate", "nothing.py"], 1, "nothing.py, which does not exist"),
        (["fit", "nothing.py"], 1, "nothing.py, which does not exist"),
        (["evaluate", "bad.py"], 1, "bad.py does not run: ZeroDivisionError"),
        (["evaluate", BLOBS, "--only", "magic"], 2, "Expected methods out of MAP, temperature scaling,"),
        (["evaluate", BLOBS, "--only", "magic"], 2, "got ['magic']"),
        (["evaluate", BLOBS, "--data-dir", "missing"], 2, "missing is no folder."),
        (["predict", BLOBS, "p.safetensors", "--data-dir", "file"], 2, "p.safetensors does not exist"),
        (["fit", BLOBS, "--data-dir", "file"], 2, "file is no folder."),
        (["evaluate", BLOBS, "--out", "file"], 2, "file is a file. Name a folder."),
        (["evaluate", BLOBS, "--out", "file/below"], 2, "Name another folder"),
        (["fit", BLOBS, "--out", "file/p.safetensors"], 2, "file is a file. Name a folder."),
        (["evaluate", BLOBS, "--seeds", "0"], 2, "--seeds"),
        (["evaluate", BLOBS, "--seed", "-1"], 2, "--seed"),
        (["evaluate", BLOBS, "--device", "nonsense"], 2, "Expected a device out of cpu"),
        (["predict", BLOBS, "missing.safetensors"], 2, "missing.safetensors does not exist. `debiased-laplace fit`"),
        (["other"], 2, "No such command"),
        # what follows was a traceback
        (["fit", BLOBS, "--structure", "magic"], 2, "'lowrank', 'diag', 'full', 'isotropic'], got 'magic'"),
        (["fit", BLOBS, "--budget", "-3"], 2, "--budget"),
        (["fit", BLOBS, "--out", "folder"], 2, "folder"),
        (["predict", BLOBS, "bad.py"], 1, "Expected a file of debiased-laplace, got bad.py"),
        (["init-task", "file/task.py"], 2, "file"),
        (["init-task", "folder", "--force"], 2, "folder"),
        (["evaluate", "budget.py"], 1, "BUDGET"),
        (["evaluate", "column.py"], 1, "Expected targets with 1 number"),
    ],
)  # fmt: skip
def test_errors_are_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "bad.py").write_text("1 / 0")
    (tmp_path / "budget.py").write_text(BLOBS.read_text().replace("BUDGET = 24", "BUDGET = 'many'"))
    column = "    return [(inputs, targets.expand(-1, 2)) for inputs, targets in [data(100 + seed, 80)]]"
    (tmp_path / "column.py").write_text(WAVE.read_text().replace("    return [data(100 + seed, 80)]", column))
    result = invoke(*arguments)
    assert message in told(result)
    assert result.exit_code == code
    assert (tmp_path / "file").read_text() == "mine"


def test_a_posterior_of_another_network(posterior: Path, tmp_path: Path) -> None:
    result = invoke("predict", BLOBS, posterior, "--seed", 1, "--out", tmp_path / "p.npz")
    assert "Expected the model that" in told(result)
    assert result.exit_code == 1


def test_predictions_need_a_file(posterior: Path, tmp_path: Path) -> None:
    result = invoke("predict", BLOBS, posterior, "--out", tmp_path)
    assert tmp_path.name in told(result).replace(" ", "")
    assert result.exit_code == 2


# -- all commands ----------------------------------------------------------------------------------


def test_version_and_help() -> None:
    assert debiased_laplace.__version__ in invoke("--version").stdout
    commands = ("demo", "evaluate", "bias", "doctor", "fit", "predict", "init-task", "tasks")
    shown = invoke("--help").stdout
    assert all(command in shown for command in commands)
    assert "demo" in invoke().output
    for command in commands:
        assert invoke(command, "--help").exit_code == 0


def test_the_command_line_is_light() -> None:
    code = "import sys, debiased_laplace.cli; sys.exit(any(m in sys.modules for m in ('torch', 'laplace', 'netcal')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_imported_is_not_searched_for_garbage() -> None:
    with pytest.raises(ImportError, match="not there"), importing():
        assert not gc.isenabled()
        raise ImportError("not there")
    assert gc.isenabled()
