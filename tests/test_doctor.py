"""`doctor`: what is found out about a task before anything long runs, and estimates by a trial."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import debiased_laplace as dl
from debiased_laplace import DebiasedLaplace
from debiased_laplace.cli import examination
from debiased_laplace.cli.examination import Examination
from debiased_laplace.cli.units import described, in_bytes, in_seconds
from debiased_laplace.curvature.structures import STRUCTURES, Full, Kronecker, LowRank
from debiased_laplace.curvature.structures.base import Decomposed
from debiased_laplace.evaluation import Context, Task
from debiased_laplace.fitting.estimate import Costs, FitEstimate
from debiased_laplace.fitting.memory import held_by_fit
from debiased_laplace.fitting.settings import FitSettings
from debiased_laplace.network.network import Network
from tests.test_cli import BLOBS, WAVE, invoke, told
from tests.tolerances import EXACT


@pytest.fixture(autouse=True)
def small_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "TRIAL_SIZE", 8)


def examined(source: Path, structure: str = "kron", posterior: Path | None = None, **settings: Any) -> Examination:
    task = Task.load(source)
    result = Examination(task, Context(**settings), structure, task.budget)
    result.run(posterior)
    return result


def changed(folder: Path, *replacements: tuple[str, str], task: Path = BLOBS) -> Path:
    """A task file with some of its text replaced."""
    text, path = task.read_text(), folder / "task.py"
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


# -- a task that is well ---------------------------------------------------------------------------


def test_what_is_found_out_about_a_task() -> None:
    found = examined(BLOBS)
    assert found.findings == []
    assert found.well
    task = Task.load(BLOBS)
    la = DebiasedLaplace(task.model(Context()), "classification")
    la.fit(task.loader("train_loader", Context()), budget=24)
    assert found.coverage == la.coverage()
    assert found.network is not None
    assert {key: found.network[key] for key in ("n_parameters", "n_trainable", "dtypes", "n_outputs")} == {
        "n_parameters": 75, "n_trainable": 75, "dtypes": ["float32"], "n_outputs": 3,
    }  # fmt: skip
    assert {name: about["n_data"] for name, about in found.loaders.items()} == {
        "train_loader": 100, "val_loader": 60, "test_loader": 70,
    }  # fmt: skip
    inputs, targets = task.definition.data(300, 70)
    logits = task.model(Context())(inputs[:32]).detach()
    assert found.loaders["test_loader"]["loss"] == pytest.approx(
        float(nn.functional.cross_entropy(logits, targets[:32])), rel=EXACT, abs=1e-6
    )
    assert found.loaders["test_loader"]["accuracy"] == float((logits.argmax(1) == targets[:32]).double().mean())


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_every_structure_has_estimates(structure: str) -> None:
    found = examined(WAVE, structure)
    assert found.findings == []
    assert found.estimates is not None
    parts = ("fixed", "reading", "curvature", "decomposition", "tuning")
    assert found.estimates["seconds"] == pytest.approx(
        sum(found.estimates[f"{name}_seconds"] for name in parts), rel=EXACT
    )
    assert found.estimates["n_drawn"] == 24
    assert (found.estimates["memory_bytes"] is None) == (structure == "lowrank")


def test_what_is_shown(tmp_path: Path) -> None:
    posterior = tmp_path / "p.safetensors"
    task = Task.load(BLOBS)
    dl.fit(task.model(Context()), task.call("train_loader", Context()), "classification").save(posterior)
    result = invoke("doctor", BLOBS, posterior, "--cache", tmp_path)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    for text in (
        "blobs (classification). Three blobs in the plane.", "75 parameters, 75 of them trainable, float32, 3 outputs",
        "100 data; a batch: inputs float32 [32, 2], targets int64 [32]; loss of the network",
        "75 of 75 trainable parameters covered by 2 blocks.", "Estimates for this machine, by a trial with",
        "Laplace posterior of 75 of 75 parameters", "All is well: debiased-laplace fit",
    ):  # fmt: skip
        assert text in shown
    lines = result.stdout.replace(str(BLOBS), "task.py").replace(str(posterior), "p.safetensors").splitlines()
    assert max(map(len, lines)) <= 100
    assert {path.name for path in tmp_path.iterdir()} == {"p.safetensors"}


# -- problems, and warnings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replacement", "about", "message"),
    [
        (("    return network\n", "    return network.nothing\n"), "model()", "has no attribute 'nothing'"),
        (("return cut(*data(200 + seed, 60))", "return []"), "val_loader()", "Expected data from val_loader()"),
        (("return cut(*data(300, 70))\n\n\ndef sh", "return [(torch.full((4, 2), float('nan')), torch.ones(4).long())]"
          "\n\n\ndef sh"), "test_loader()", "Expected finite numbers in inputs of test_loader() of"),
        (("return cut(*data(200 + seed, 60))", "return [(torch.ones(4, 2), torch.full((4,), 7))]"), "val_loader()",
         "Expected class indices"),
        (("return cut(*data(100 + seed, 100))", "return [(torch.ones(4, 5), torch.ones(4).long())]"), "the network",
         "mat1 and mat2 shapes cannot be multiplied"),
        (("    return network\n", "    return network.requires_grad_(False)\n"), "the network",
         "Expected a model with trainable parameters"),
        (("BUDGET = 24", "BUDGET = 3"), "the network", "Expected a budget of at least 4 training data"),
    ],
)  # fmt: skip
def test_problems_are_found(tmp_path: Path, replacement: tuple[str, str], about: str, message: str) -> None:
    found = examined(changed(tmp_path, replacement))
    assert not found.well
    assert [finding.about for finding in found.findings if finding.level == "problem"] == [about]
    assert message in found.findings[-1].message


def test_a_task_that_ends_the_program_is_a_problem(tmp_path: Path) -> None:
    """`sys.exit` with a message, or with nothing at all, as at the end of a script."""
    for text, said in (
        ("sys.exit('download them first')", "SystemExit: download them first"),
        ("sys.exit(0)", "SystemExit: 0"),
    ):
        (tmp_path / "task.py").write_text(f"import sys\n{BLOBS.read_text()}\n\ndef train_loader():\n    {text}\n")
        for command in ("doctor", "fit"):
            result = invoke(command, tmp_path / "task.py", *(("--out", tmp_path / "p") if command == "fit" else ()))
            assert result.exit_code == 1
            assert said in " ".join((result.stdout + result.stderr).split())
    (tmp_path / "task.py").write_text(BLOBS.read_text() + "\nraise SystemExit(0)\n")
    result = invoke("fit", tmp_path / "task.py", "--out", tmp_path / "p")
    assert result.exit_code == 1
    assert "does not run: SystemExit: 0" in told(result)


def test_several_problems_at_once_and_the_lines_they_are_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changed(
        tmp_path, ("return cut(*data(200 + seed, 60))", "raise OSError('no disk')"),
        ("return cut(*data(100 + seed, 100))", "return 1 / 0"),
    )  # fmt: skip
    result = invoke("doctor", "task.py")
    assert result.exit_code == 1
    shown = " ".join(result.stdout.split())
    lines = [line.strip() for line in Path("task.py").read_text().splitlines()]
    for name, error, line in (
        ("train_loader", "ZeroDivisionError: division by zero", "return 1 / 0"),
        ("val_loader", "OSError: no disk", "raise OSError('no disk')"),
    ):
        number = lines.index(line) + 1
        assert f"{name}() of task.py failed: {error} (task.py, line {number}: {line})" in shown
    assert "would fail: mend the problems" in shown
    assert "All is well" not in shown


@pytest.mark.parametrize(
    ("replacement", "about", "message"),
    [
        (("    return network\n", "    network[2].weight.data.neg_()\n    return network\n"), "model()", "untrained"),
        (("return cut(*data(200 + seed, 60))", "return train_loader(seed)"), "val_loader()", "as train_loader()"),
        (('CLASSES = ("east", "north", "south")', 'CLASSES = ("east",)'), "CLASSES", "Expected 3 names"),
        (("cut(6 * inputs, targets)", "[]"), "ood_loaders()", "Expected data for 'far'"),
    ],
)  # fmt: skip
def test_warnings_do_not_stop_a_fit(tmp_path: Path, replacement: tuple[str, str], about: str, message: str) -> None:
    found = examined(changed(tmp_path, replacement))
    assert found.well
    assert [(finding.level, finding.about) for finding in found.findings] == [("warning", about)]
    assert message in found.findings[0].message


def test_memory_that_does_not_suffice_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "available_memory", lambda device: 10_000)
    found = examined(BLOBS, "full")
    assert not found.well
    assert "Use --structure diag, or freeze layers" in found.findings[0].message
    assert found.estimates is None


def test_a_posterior_of_another_network_is_a_problem(tmp_path: Path) -> None:
    task = Task.load(BLOBS)
    dl.fit(task.model(Context(seed=1)), task.call("train_loader", Context()), "classification").save(tmp_path / "p")
    found = examined(BLOBS, posterior=tmp_path / "p")
    assert not found.well
    assert "Expected the model that" in found.findings[0].message
    result = invoke("doctor", BLOBS, tmp_path / "missing")
    assert "does not exist" in told(result)
    assert result.exit_code == 2


def test_a_loader_that_takes_long_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "COUNT_SECONDS", 0.05)
    endless = "    import itertools, time\n    batch = cut(*data(100, 32))[0]\n" + (
        "    return (time.sleep(0.01) or batch for _ in itertools.count())"
    )
    path = changed(tmp_path, ("    return cut(*data(100 + seed, 100))", endless))
    start = time.perf_counter()
    found = examined(path)
    assert time.perf_counter() - start < 20
    assert found.loaders["train_loader"]["n_data"] is None
    assert found.estimates is not None
    assert found.estimates["seconds"] is None
    assert "is not known before it is read" in found.findings[0].message


# -- estimates -------------------------------------------------------------------------------------


def network_of(model: nn.Module, x: torch.Tensor) -> Network:
    return Network.discover(model, x)


def test_sizes_of_what_is_decomposed() -> None:
    """Those of a network with known layers: a convolution in two groups, and a linear layer with its bias."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 5))
    network = network_of(model, torch.randn(4, 4, 3, 3))
    assert Kronecker().decomposed(network, 40) == Decomposed([19, 19, 7], [3, 3, 5])
    assert Kronecker(max_factor=10).decomposed(network, 40) == Decomposed([10, 10, 10, 10, 7], [3, 3, 5])
    assert Full().decomposed(network, 40) == Decomposed(each=[network.n_params])
    assert Full(blocks="layer").decomposed(network, 40) == Decomposed(each=[114, 35])
    assert LowRank().decomposed(network, 40) == Decomposed(each=[40])
    assert LowRank(blocks="layer").decomposed(network, 40_000) == Decomposed(each=[1000, 1000])


def test_an_estimate_is_the_sum_of_its_parts() -> None:
    network, structure = network_of(nn.Linear(7, 5), torch.randn(4, 7)), Kronecker()
    settings = FitSettings(structure=structure).completed()
    assert settings.split is not None
    costs = Costs(forward=1.0, stream=2.0, statistics=3.0, curvatures=5.0, prediction=7.0, n_vectors=5, cubed=0.5)
    got = FitEstimate.of(
        costs, network, settings, n_data=100, n_drawn=10, tuning=11.0, of_trial=(Kronecker(max_factor=4), 8, 1000.0)
    )
    trial = 8 * 8.0 + 0.5 * (2 * 4**3 + 2 * 3**3)
    assert got.fixed == pytest.approx(1000.0 - trial, rel=EXACT)
    assert got.reading == 200.0
    assert got.curvature == 80.0
    assert got.decompositions == pytest.approx(0.5 * (8**3 + 5 * 5**3), rel=EXACT)  # four folds, and the final ones
    assert got.seconds == pytest.approx(got.fixed + 200 + 80 + got.decompositions + 11, rel=EXACT)
    assert got.memory == held_by_fit(network, structure, settings.split) + 10 * network.memory_of_a_datum(5)
    unknown = FitEstimate.of(
        costs, network, settings, n_data=None, n_drawn=10, tuning=11.0, of_trial=(structure, 8, 0.0)
    )
    assert unknown.reading is unknown.seconds is None
    assert unknown.fixed == 0


def test_costs_are_measured_on_any_device(device: torch.device) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(12, 4, device=device), torch.randint(3, (12,), device=device)
    la = DebiasedLaplace(nn.Linear(4, 3).to(device), "classification")
    la.fit([(x, y)], budget=None)
    costs = Costs.of(la.native.fitted, Kronecker(), la.native.likelihood, x, y)
    assert costs.n_vectors == 2  # of three classes, whose probabilities sum to one
    assert min(costs.forward, costs.stream, costs.statistics, costs.curvatures, costs.prediction, costs.cubed) > 0


def test_units() -> None:
    assert [in_seconds(s) for s in (2e-5, 0.012, 0.14, 3.21, 42.0, 200, 7000)] == [
        "0.02 ms", "12 ms", "0.14 s", "3.2 s", "42 s", "4 min", "1.9 h",
    ]  # fmt: skip
    assert [in_bytes(n) for n in (12, 1500, 24_000, 3.4e9, 5e12)] == [
        "12 bytes",
        "1.5 kB",
        "24 kB",
        "3.4 GB",
        "5000 GB",
    ]


def test_what_inputs_look_like() -> None:
    batch = {"ids": torch.ones(2, 3, dtype=torch.int64), "mask": torch.ones(2, 3), "name": "x"}
    assert described(batch) == "ids int64 [2, 3], mask float32 [2, 3]"
    assert described((torch.ones(2), torch.ones(2, 1))) == "float32 [2], float32 [2, 1]"
