"""Reliability by class and in diagrams, calibration and refinement in tables, the network's detectors in a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, binomtest

from debiased_laplace.evaluation import Context, Method, Options, Task, run, summarise
from debiased_laplace.evaluation.predictors import detectors
from debiased_laplace.evaluation.report import reliability, tables
from debiased_laplace.evaluation.report.numbers import unshared
from debiased_laplace.evaluation.scores import detection
from tests.test_evaluation import task_of
from tests.tolerances import EXACT, FLOAT32

TASKS = Path(__file__).parent / "tasks"
METHODS = (Method("MAP", "map"), Method("temperature scaling", "temperature"))
OPTIONS = Options(n_resamples=40)
NOTHING = torch.empty(0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two seeds, judged on the same 70 data, of one network."""
    task = Task.load(TASKS / "blobs.py")
    return run(task, tmp_path_factory.mktemp("blobs"), range(2), Context(), methods=METHODS, options=OPTIONS)


def test_the_table_by_class_is_of_the_data_with_exact_intervals(two: list[dict[str, Any]]) -> None:
    task = Task.load(TASKS / "blobs.py")
    inputs, targets = task.definition.data(300, 70)
    model = task.model(Context())
    with torch.no_grad():
        probabilities, targets = model(inputs).double().softmax(1).numpy(), targets.numpy()
    top = probabilities.argmax(1)
    ((method, rows),) = reliability.by_class(summarise(two[:1])).sections
    assert method == "MAP"
    assert [row[0] for row in rows] == ["east", "north", "south"]
    for c, row in enumerate(rows):
        chosen, n = top == c, int((top == c).sum())
        said = probabilities[chosen, c].mean(), probabilities[:, c].mean()
        assert row[1] == str(n)
        assert [row[2], row[4]] == [f"{100 * mean:.1f}" for mean in said]
        hits = (int((targets[chosen] == c).sum()), n), (int((targets == c).sum()), 70)
        for cell, mean, (hit, of) in zip((row[3], row[5]), said, hits, strict=True):
            low, high = binomtest(hit, of).proportion_ci(method="exact")
            mark = "" if low <= mean <= high else " ‡"
            assert cell == f"{100 * hit / of:.1f} [{100 * low:.1f}, {100 * high:.1f}]{mark}"


def test_seeds_that_share_data_make_no_interval_shorter(two: list[dict[str, Any]]) -> None:
    summary, columns = summarise(two), [record["test"]["curves"]["MAP"]["top_label"] for record in two]
    for c, row in enumerate(reliability.by_class(summary).sections[0][1]):
        n, hits = (sum(column[part][c] for column in columns) for part in ("counts", "correct"))
        low = beta.ppf(0.025, hits / 2, (n - hits) / 2 + 1)
        high = beta.ppf(0.975, hits / 2 + 1, (n - hits) / 2) if hits < n else 1.0
        assert row[1] == str(n)
        assert row[3].removesuffix(" ‡") == f"{100 * hits / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def test_a_mean_outside_is_marked_and_a_class_never_predicted_has_no_cells(two: list[dict[str, Any]]) -> None:
    summary = summarise(two[:1])
    top = {"counts": [60, 10, 0], "confidences": [30.0, 9.0, 0.0], "correct": [55, 9, 0]}
    summary["test"]["curves"]["MAP"]["top_label"] = top
    rows = reliability.by_class(summary).sections[0][1]
    assert rows[0][2:4] == ["50.0", "91.7 [81.6, 97.2] ‡"]
    assert rows[1][2:4] == ["90.0", "90.0 [55.5, 99.7]"]
    assert rows[2][1:4] == ["0", "", ""]


def test_how_much_of_the_data_seeds_do_not_share() -> None:
    base = {"seeds": [0, 1, 2, 3], "test": {"n": 50}}
    assert unshared(base | {"same_data": True, "units": {"rest": 0}}) == 0.25
    assert unshared(base | {"same_data": False, "units": {"rest": 0}}) == 1
    assert unshared(base | {"same_data": False, "units": {"rest": 100}}) == 0.75  # three test sets' worth
    assert unshared(base | {"same_data": False, "units": {"rest": 900}}) == 1
    assert unshared({"seeds": [0], "test": {"n": 50}, "same_data": True, "units": {"rest": 0}}) == 1


def test_bars_of_a_diagram_are_exact_intervals_on_the_test_data(
    two: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(reliability, "png", lambda figure: figures.append(figure) or b"")
    reliability.reliability_pictures(summarise(two[:1]))
    bins = two[0]["test"]["curves"]["MAP"]["reliability"]
    expected = [
        (confidence / count, *binomtest(correct, count).proportion_ci(method="exact"))
        for count, confidence, correct in zip(bins["counts"], bins["confidences"], bins["correct"], strict=True)
        if count >= reliability.SMALLEST_BIN
    ]
    (container,) = figures[0].axes[0].containers
    bars = [segment for collection in container[2] for segment in collection.get_segments()]
    drawn = [(bar[0, 0], bar[0, 1], bar[1, 1]) for bar in bars]
    assert np.array(drawn) == pytest.approx(np.array(expected), rel=1e-5)
    assert "exact 95 % intervals" in reliability.bins_note()


def test_records_of_an_earlier_version_show_what_they_have(two: list[dict[str, Any]]) -> None:
    """Mixed with others too: what one of them lacks is not shown."""
    new = ("smooth_ece", "top_label_ece", "augrc", *(f"{a}_{b}" for a in ("nll", "brier")
           for b in ("calibration", "refinement")))  # fmt: skip
    before = copy.deepcopy(two)
    for entry in (before[1]["test"], *before[1]["shifts"]):
        for part in (*entry["scores"].values(), *(c for d in entry["differences"].values() for c in d.values())):
            for name in new:
                del part[name]
        for curves in entry["curves"].values():
            for name in ("top_label", "classwise"):
                curves.pop(name, None)
    shown = tables.tables(summarise(before))
    assert {"Calibration and refinement, test data", "By class, test data"}.isdisjoint(table.title for table in shown)
    columns = ["accuracy %", "NLL", "Brier", "ECE %", "adaptive ECE %", "classwise ECE %", "AURC %"]
    assert shown[0].columns == ["method", *columns]
    assert "SmoothECE" not in shown[0].caption
    now = tables.tables(summarise(two))
    assert [table.title for table in now[:3]] == [
        "Test data", "Calibration and refinement, test data", "By class, test data"
    ]  # fmt: skip
    assert now[0].columns == ["method", *columns[:5], "SmoothECE %", columns[5], columns[6], "AUGRC %"]
    scores = two[0]["test"]["scores"]
    for loss in ("nll", "brier"):
        refinements = [scores[name][f"{loss}_refinement"][0] for name in ("MAP", "temperature scaling")]
        assert refinements[0] == pytest.approx(refinements[1], rel=EXACT)


def test_the_network_of_a_run_has_detectors(two: list[dict[str, Any]]) -> None:
    task, context = Task.load(TASKS / "blobs.py"), Context()
    model = task.model(context)
    (entry,) = two[0]["ood"]
    names = list(dict.fromkeys(key.rpartition(", ")[0] for key in entry["scores"]["MAP"]))
    assert names[2:] == ["energy", "maximum logit", "Mahalanobis", "relative Mahalanobis"]
    assert not set(entry["scores"]["temperature scaling"]) & {"energy, auroc", "Mahalanobis, auroc"}
    training = [batch[:2] for batch in task.call("train_loader", context)]
    inputs, targets = (torch.cat(column) for column in zip(*training, strict=True))
    inside, outside = (
        task.definition.data(300, 70)[0],
        torch.cat([b[0] for b in task.call("ood_loaders", context)["far"]]),
    )
    with torch.no_grad():
        known, test, far = (model[:-1](x) for x in (inputs, inside, outside))
        scores = [detectors.mahalanobis(known, targets)(NOTHING, x) for x in (test, far)]
    expected = detection.auroc(torch.cat(scores), np.repeat([0, 1], [len(test), len(far)]))
    assert entry["scores"]["MAP"]["Mahalanobis, auroc"][0] == pytest.approx(expected, rel=FLOAT32)


def test_a_network_without_features_says_so(tmp_path: Path) -> None:
    """Two last layers side by side; everything else is there."""
    module = """
class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.other(x)


def data("""
    task = task_of(tmp_path, ("nn.Linear(12, 3)", "Sum()"), ("def data(", module))
    (record,) = run(task, tmp_path / "out", [0], Context(), methods=METHODS, options=OPTIONS)
    (told,) = record["predictors"]["MAP"]["warnings"]
    assert told.startswith("It has no Mahalanobis distances: ValueError: Expected a last layer that is one module")
    assert "energy, auroc" in record["ood"][0]["scores"]["MAP"]
    assert "Mahalanobis, auroc" not in record["ood"][0]["scores"]["MAP"]
