"""Scores against hand-made cases and independent computations; shifts; records; summaries; sentences; files."""

from __future__ import annotations

import ast
import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from debiased_laplace import Single, evaluation
from debiased_laplace._files import CannotWriteError
from debiased_laplace.evaluation import Context, Method, Options, Task, records, run, shifts, summarise, write_outputs
from debiased_laplace.evaluation.judge import conditions
from debiased_laplace.evaluation.methods import MAP, TEMPERATURE, TEMPERATURE_RULE
from debiased_laplace.evaluation.names import markdown as escaped
from debiased_laplace.evaluation.report import figures, verdicts
from debiased_laplace.evaluation.report.numbers import MINUS, number, plus_minus, with_interval
from debiased_laplace.evaluation.report.outputs import markdown, render
from debiased_laplace.evaluation.report.reliability import reliability_pictures
from debiased_laplace.evaluation.report.statement import deciding_table, protocol, statement
from debiased_laplace.evaluation.report.table import Table
from debiased_laplace.evaluation.report.tables import tables
from debiased_laplace.evaluation.report.verdicts import verdict
from debiased_laplace.evaluation.scores import calibration, classification, detection
from debiased_laplace.evaluation.scores.cells import combine
from tests.tolerances import EXACT, assert_equal

# -- metrics -----------------------------------------------------------------------------------


def draws(n: int = 400, classes: int = 5, sharpness: float = 3.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    logits = sharpness * generator.standard_normal((n, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probabilities, generator.integers(classes, size=n)


def independent_ece(probabilities: np.ndarray, targets: np.ndarray, bins: int = 15) -> float:
    total = 0.0
    for b in range(bins):
        confidence, hit = probabilities.max(1), probabilities.argmax(1) == targets
        inside = (confidence >= b / bins) & ((confidence < (b + 1) / bins) | (b == bins - 1))
        total += abs(float((hit[inside] - confidence[inside]).sum()))
    return total / len(targets)


def test_scores_by_hand() -> None:
    probabilities, targets = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [0, 1]
    scores = classification.classification_metrics(probabilities, targets)
    assert scores["accuracy"] == 0.5
    assert scores["nll"] == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2, rel=EXACT)
    assert scores["brier"] == pytest.approx((0.25 + 0.09 + 0.04 + 0.01 + 0.81 + 0.64) / 2, rel=EXACT)
    assert scores["ece"] == pytest.approx((0.5 + 0.8) / 2, rel=EXACT)
    assert sum(scores["reliability"]["counts"]) == 2
    assert scores["reliability"]["counts"][7] == scores["reliability"]["counts"][12] == 1


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 50.0])
def test_ece_is_the_independent_one(sharpness: float) -> None:
    probabilities, targets = draws(sharpness=sharpness)
    assert calibration.expected_calibration_error(probabilities, targets) == pytest.approx(
        independent_ece(probabilities, targets), rel=EXACT
    )


def test_ece_at_the_edges_of_bins() -> None:
    # A confidence of exactly one belongs to the last bin, together with 0.97.
    probabilities = np.array([[1.0, 0.0], [0.03, 0.97], [0.5, 0.5], [0.8, 0.2]])
    targets = np.array([0, 0, 0, 0])
    expected = (abs(1 - 0.985 * 2) + 0.5 + 0.2) / 4
    assert calibration.expected_calibration_error(probabilities, targets) == pytest.approx(expected, rel=EXACT)
    bins = calibration.reliability(probabilities, targets)
    assert len(bins.counts) == 15
    assert bins.counts[14] == 2
    assert bins.confidences[14] == pytest.approx(1.97)
    assert bins.correct[14] == 1


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_ece_of_few_different_targets(classes: int) -> None:
    # netcal takes targets with two different values for a binary problem if it sees the whole table.
    probabilities, _ = draws(60, classes)
    for targets in (np.zeros(60, dtype=int), np.arange(60) % 2):
        assert calibration.expected_calibration_error(probabilities, targets) == pytest.approx(
            independent_ece(probabilities, targets), rel=EXACT
        )


@pytest.mark.parametrize("n_bins", [1, 7, 15])
def test_ece_is_that_of_the_reliability_bins(n_bins: int) -> None:
    probabilities, targets = draws()
    bins = calibration.reliability(probabilities, targets, n_bins)
    gaps = np.abs(np.array(bins.confidences) - np.array(bins.correct)).sum() / len(targets)
    assert calibration.expected_calibration_error(probabilities, targets, n_bins) == pytest.approx(gaps, rel=EXACT)


def test_adaptive_ece() -> None:
    confidence = np.array([0.6, 0.7, 0.8, 0.9])
    probabilities = np.stack([confidence, 1 - confidence], 1)
    targets = np.array([0, 1, 0, 1])
    expected = (abs(1.3 - 1) + abs(1.7 - 1)) / 4
    assert calibration.adaptive_calibration_error(probabilities, targets, 2) == pytest.approx(expected, rel=EXACT)
    many, labels = draws(450)
    inside = np.sort(many.max(1)).reshape(15, 30)  # no ties: bins are equally full
    order = np.argsort(many.max(1))
    hits = (many.argmax(1) == labels)[order].reshape(15, 30)
    expected = np.abs(inside.mean(1) - hits.mean(1)).mean()
    assert calibration.adaptive_calibration_error(many, labels) == pytest.approx(expected, rel=EXACT)


def test_adaptive_ece_does_not_depend_on_the_order_of_ties() -> None:
    probabilities = np.tile([1.0, 0.0], (40, 1))
    probabilities[:5] = [0.7, 0.3]
    targets = (np.arange(40) % 3 == 0).astype(int)
    values = {
        round(calibration.adaptive_calibration_error(probabilities[order], targets[order]), 12)
        for order in (np.arange(40), np.arange(40)[::-1], np.random.default_rng(0).permutation(40))
    }
    assert len(values) == 1


def test_nll_of_an_impossible_target_is_infinite() -> None:
    assert classification.negative_log_likelihood([[1.0, 0.0], [0.5, 0.5]], [1, 0]) == math.inf


def test_tensors_and_half_precision() -> None:
    probabilities, targets = draws(50)
    expected = classification.classification_metrics(probabilities, targets)
    scores = classification.classification_metrics(
        torch.from_numpy(probabilities).requires_grad_(), torch.from_numpy(targets)
    )
    assert scores == expected
    half = classification.classification_metrics(torch.from_numpy(probabilities).bfloat16().softmax(1), targets)
    assert half["accuracy"] > 0


@pytest.mark.parametrize(
    ("probabilities", "targets", "message"),
    [
        ([[0.5, 0.5], [math.nan, 0.5]], [0, 0], "finite probabilities, got NaN or infinity in 1 of 2 rows.*row 1"),
        ([[0.5, 0.6]], [0], "rows sum to one.*sum of 1.1 in row 0. Apply softmax"),
        ([[1.5, -0.5]], [0], "non-negative"),
        ([0.5, 0.5], [0], r"shape \[N, C\].*got \(2,\)"),
        ([[1.0]], [0], "two classes"),
        (np.zeros((0, 3)), [], "at least one datum"),
        ([[0.5, 0.5]], [0, 1], r"integer targets of shape \[1\]"),
        ([[0.5, 0.5]], [0.0], "integer targets"),
        ([[0.5, 0.5]], [2], "from 0 to 1.*got 2 to 2"),
        ([[0.5, 0.5]], [-1], "from 0 to 1"),
        ([["a", "b"]], [0], "Expected numbers in probabilities"),
    ],
)
def test_bad_predictions_are_refused(probabilities: Any, targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification.classification_metrics(probabilities, targets)


def test_number_of_bins_is_checked() -> None:
    with pytest.raises(ValueError, match="positive number of bins, got 0"):
        calibration.expected_calibration_error([[0.5, 0.5]], [0], 0)


@pytest.mark.parametrize(
    ("inside", "outside", "auroc", "fpr95"),
    [
        ([0.1, 0.2, 0.3], [0.7, 0.8, 0.9], 1.0, 0.0),  # separated
        ([0.7, 0.8, 0.9], [0.1, 0.2, 0.3], 0.0, 1.0),  # reversed
        ([0.5, 0.5], [0.5, 0.5, 0.5], 0.5, 1.0),  # all tied: finding all calls everything out of distribution
        ([0.1, 0.5], [0.5, 0.9], 0.875, 0.5),  # one tie at the threshold is called out of distribution
        ([0.1, 0.2, 0.3, 0.4], [0.25], 0.5, 0.5),
    ],
)
def test_out_of_distribution_by_hand(inside: list[float], outside: list[float], auroc: float, fpr95: float) -> None:
    score, is_outside = [*inside, *outside], [0] * len(inside) + [1] * len(outside)
    assert detection.auroc(score, is_outside) == pytest.approx(auroc, rel=EXACT)
    assert detection.fpr95(score, is_outside) == pytest.approx(fpr95, rel=EXACT)


def test_fpr95_leaves_five_per_cent_unfound() -> None:
    inside, outside = np.arange(20) / 20 + 0.01, np.arange(20) / 20 + 1.0
    outside[0] = -1.0  # one of twenty may be missed
    labels = np.repeat([0, 1], 20)
    assert detection.fpr95(np.concatenate([inside, outside]), labels) == 0.0
    outside[1] = 0.5  # the second one may not: ten known data score above it
    assert detection.fpr95(np.concatenate([inside, outside]), labels) == 0.5


def test_positive_is_outside() -> None:
    sure, unsure = np.tile([0.99, 0.01], (30, 1)), np.tile([0.55, 0.45], (20, 1))
    assert detection.out_of_distribution_metrics(sure, unsure) == {"auroc": 1.0, "aupr": 1.0, "fpr95": 0.0}
    # found in the reverse order: precision n / (30 + n) for all twenty, which are tied
    assert detection.out_of_distribution_metrics(unsure, sure) == {"auroc": 0.0, "aupr": 0.6, "fpr95": 1.0}


def test_the_out_of_distribution_score_keeps_the_order_of_saturated_probabilities() -> None:
    probabilities = torch.tensor([[1.0, 1e-12], [1.0, 1e-20]])
    score = detection.ood_score(probabilities)
    assert score[0] > score[1] > 0
    assert detection.ood_score([[0.7, 0.1, 0.2]])[0] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("score", "is_outside", "message"),
    [
        ([0.1, math.nan], [0, 1], "finite scores, got 1"),
        ([0.1, 0.2], [1, 1], r"both 0 \(in distribution\) and 1 \(out of distribution\), got \[1\]"),
        ([0.1, 0.2], [0, 2], "both 0"),
        ([0.1, 0.2], [0], r"one shape \[N\], got \(2,\) and \(1,\)"),
    ],
)
def test_bad_scores_are_refused(score: Any, is_outside: Any, message: str) -> None:
    for function in (detection.auroc, detection.fpr95):
        with pytest.raises(ValueError, match=message):
            function(score, is_outside)


# -- shifts ------------------------------------------------------------------------------------


def images(n: int = 6, channels: int = 2) -> torch.Tensor:
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def test_noise_has_its_strength_and_leaves_the_global_state() -> None:
    state = torch.get_rng_state()
    grey = torch.full((200, 1, 8, 8), 0.5)
    noisy = shifts.gaussian_noise(grey, 0.05, seed=1)
    assert float(noisy.std()) == pytest.approx(0.05, rel=0.03)
    assert torch.equal(noisy, shifts.gaussian_noise(grey, 0.05, seed=1))
    assert not torch.equal(noisy, shifts.gaussian_noise(grey, 0.05, seed=2))
    assert torch.equal(state, torch.get_rng_state())
    strong = shifts.gaussian_noise(grey, 5.0, seed=1)
    assert (float(strong.min()), float(strong.max())) == (0.0, 1.0)


def test_rotation_is_counter_clockwise() -> None:
    assert_equal(shifts.rotate(images(), 90), torch.rot90(images(), 1, (2, 3)), 1e-6)
    assert_equal(shifts.rotate(images(), 0), images())
    assert shifts.rotate(images(), 30).shape == images().shape


def test_shuffled_patches_are_the_same_patches() -> None:
    original, shuffled = images(), shifts.shuffle_patches(images(), 2, seed=0)
    assert not torch.equal(original, shuffled)

    def patches(x: torch.Tensor) -> list[list[tuple[float, ...]]]:
        cut = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # [N, patches, channels * 4]
        return [sorted(tuple(patch.tolist()) for patch in image) for image in cut]

    assert patches(original) == patches(shuffled)
    assert torch.equal(shuffled, shifts.shuffle_patches(images(), 2, seed=0))
    with pytest.raises(ValueError, match="divides the 8 x 8 images, got 3"):
        shifts.shuffle_patches(images(), 3, seed=0)


def test_blobs_have_the_histogram_of_the_image_and_are_smooth() -> None:
    blobs = shifts.smooth_blobs(images(), sigma=1.5, seed=0)
    assert torch.equal(blobs.flatten(2).sort(2).values, images().flatten(2).sort(2).values)
    assert float(blobs.diff(dim=3).abs().mean()) < 0.6 * float(images().diff(dim=3).abs().mean())


def test_images_are_checked() -> None:
    with pytest.raises(ValueError, match=r"floating-point images of shape .* got torch.float32 of shape \(3, 8, 8\)"):
        shifts.rotate(torch.rand(3, 8, 8), 10)
    with pytest.raises(ValueError, match=r"got torch\.uint8"):
        shifts.gaussian_noise(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 0.1, seed=0)
    with pytest.raises(ValueError, match="non-negative standard deviation of the noise, got -1"):
        shifts.gaussian_noise(images(), -1, seed=0)
    with pytest.raises(ValueError, match="non-negative standard deviation of the blur"):
        shifts.smooth_blobs(images(), sigma=-1, seed=0)


# -- records -----------------------------------------------------------------------------------


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "results.json"
    records.write_json(path, {"a": 1})

    def crash(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(CannotWriteError, match=r"Could not write .*results\.json: disk full\. What was there"):
        records.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_records_of_other_settings_are_neither_used_nor_overwritten(tmp_path: Path) -> None:
    settings = {"settings": {"epochs": 3, "split": Single(), "limit": math.nan}, "inputs": {"network": "Infinity"}}
    other = settings | {"inputs": {"network": "0123"}}
    record = {"schema_version": records.SCHEMA_VERSION, "seed": 0} | records.jsonable(settings)
    records.write_record(records.record_path(tmp_path, 0, settings), record)
    assert repr(records.load_record(tmp_path, 0, settings)) == repr(record)  # in which NaN is equal to itself
    assert records.load_record(tmp_path, 1, settings) is None
    assert records.load_record(tmp_path, 0, other) is None
    assert records.record_path(tmp_path, 0, other) != records.record_path(tmp_path, 0, settings)
    others = [record | {"settings": {}}, record | {"inputs": {}}, record | {"schema_version": 0}, record | {"seed": 1}]
    path = records.record_path(tmp_path, 0, settings)
    edited = path.read_text().replace('"seed":0', '"seed":00').replace("Infinity", "NaN")
    for content in ('{"seed": 0', "[]", "[" * 100_000, json.dumps(record), edited):
        path.write_text(content)
        assert records.load_record(tmp_path, 0, settings) is None
    for other_record in others:
        records.write_record(path, other_record)
        assert records.load_record(tmp_path, 0, settings) is None


# -- several seeds -----------------------------------------------------------------------------

TASKS = Path(__file__).parent / "tasks"
OPTIONS = Options(grid_size=9, log_prior_prec_min=-2, log_prior_prec_max=4, n_resamples=20)
CANDIDATE, BASELINE, REFERENCE = "debiased K-FAC", "single-batch K-FAC", "full-data K-FAC"
BETTER, WORSE, NEITHER = [-0.02, 0.004, -0.03, -0.01], [0.02, 0.004, 0.01, 0.03], [0.01, 0.02, -0.03, 0.05]
NEGLIGIBLE = [-5e-4, 2e-4, -9e-4, -1e-4]
UNDEFINED = [math.nan] * 4


def task_of(folder: Path, *replacements: tuple[str, str], name: str = "blobs") -> Task:
    """A task with parts of its file replaced."""
    text = (TASKS / f"{name}.py").read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (folder / f"{name}.py").write_text(text)
    return Task.load(folder / f"{name}.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two seeds, judged on the same data."""
    return run(Task.load(TASKS / "blobs.py"), tmp_path_factory.mktemp("blobs"), range(2), Context(), options=OPTIONS)


@pytest.fixture(scope="module")
def wave(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two seeds of a regression."""
    return run(Task.load(TASKS / "wave.py"), tmp_path_factory.mktemp("wave"), range(2), Context(), options=OPTIONS)


@pytest.fixture(scope="module")
def summary(two: list[dict[str, Any]]) -> dict[str, Any]:
    return summarise(two)


def test_cells_of_several_seeds() -> None:
    assert combine([[1.0, 0.1, 0.8, 1.2]], True) == [1.0, 0.1, 0.8, 1.2]
    cells = [[1.0, 0.3, 0.4, 1.7], [2.0, 0.6, 0.8, 3.2], [6.0, 0.9, 4.2, 7.8]]
    spread = math.sqrt(7 / 3)  # variance (4 + 1 + 9) / 2, of the mean a third of it
    half = 4.302652729911275 * spread  # of Student's t with two degrees of freedom, 97.5 %
    assert combine(cells, False) == pytest.approx([3, spread, 3 - half, 3 + half])
    both = math.sqrt(7 / 3 + (0.09 + 0.36 + 0.81) / 3)
    below, above = (math.sqrt(half**2 + (first + 1.44 + 3.24) / 3) for first in (0.36, 0.49))
    assert combine(cells, True) == pytest.approx([3, both, 3 - below, 3 + above])
    two = combine([[1.0, 0.0, 1.0, 1.0], [2.0, 0.0, 2.0, 2.0]], False)
    assert two == pytest.approx([1.5, 0.5, 1.5 - 12.7062047364 * 0.5, 1.5 + 12.7062047364 * 0.5])


def test_seeds_that_agree_know_no_more_than_their_data() -> None:
    right = [1.0, 0.05, 0.8, 1.0]
    assert combine([right] * 4, True) == pytest.approx(right)
    assert combine([right] * 4, False) == pytest.approx([1.0, 0.025, 0.9, 1.0])
    exact = [[-0.5, 0.0, -0.5, -0.5]] * 2
    assert combine(exact, True) == combine(exact, False) == exact[0]


@pytest.mark.parametrize("same_data", [True, False])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_seeds_with_a_score_that_is_not_finite(same_data: bool, value: float) -> None:
    mean, *rest = combine([[1.0, 0.1, 0.8, 1.2], [value, math.inf, -math.inf, math.inf]], same_data)
    assert mean == value or (math.isnan(mean) and math.isnan(value))
    assert rest == [math.inf, -math.inf, math.inf]
    few = combine([[0.5, 0.2, -math.inf, math.inf], [0.7, 0.2, -math.inf, math.inf]], same_data)
    assert few[0] == pytest.approx(0.6)
    assert few[2:] == [-math.inf, math.inf]
    assert verdict("nll", [mean, *rest]) == verdict("nll", few) == "no difference shown"


def test_a_summary_of_one_seed_has_its_cells(two: list[dict[str, Any]]) -> None:
    summarised = summarise(two[:1])
    assert summarised["seeds"] == [0]
    for kind in ("test", "shifts", "ood"):
        for entry, record in zip(
            *([e] if kind == "test" else e for e in (summarised[kind], two[0][kind])), strict=True
        ):
            assert entry["scores"] == record["scores"]
            assert entry["differences"] == record["differences"]
    assert json.loads(json.dumps(summarised, allow_nan=False)) == summarised


def test_a_summary_of_several_seeds(two: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    assert summary["seeds"] == [0, 1]
    assert summary["same_data"]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    for kind, place in (("test", None), ("shifts", 1), ("ood", 0)):
        combined, *entries = (item[kind] if place is None else item[kind][place] for item in (summary, *two))
        score = next(iter(combined["scores"][CANDIDATE]))
        cells = [entry["scores"][CANDIDATE][score] for entry in entries]
        assert combined["scores"][CANDIDATE][score] == combine(cells, True)
        cells = [entry["differences"][MAP][CANDIDATE][score] for entry in entries]
        assert combined["differences"][MAP][CANDIDATE][score] == combine(cells, True)
    bins = summary["test"]["curves"][CANDIDATE]["reliability"]
    assert sum(bins["counts"]) == 2 * 70
    assert bins["correct"] == [
        sum(pair) for pair in zip(*(r["test"]["curves"][CANDIDATE]["reliability"]["correct"] for r in two), strict=True)
    ]
    about = summary["predictors"][TEMPERATURE]
    assert about["temperature"] == [record["predictors"][TEMPERATURE]["temperature"] for record in two]
    curves = [record["predictors"][CANDIDATE]["curve"]["losses"] for record in two]
    assert summary["predictors"][CANDIDATE]["curve"]["losses"] == pytest.approx(np.mean(curves, 0))
    assert summary["predictors"][CANDIDATE]["edges"] == [r["predictors"][CANDIDATE]["edges"] for r in two]
    other = copy.deepcopy(two)
    other[1]["test"]["targets"] = "others"
    apart = summarise(other)
    assert not apart["same_data"]
    cells = [record["test"]["scores"][MAP]["nll"] for record in two]
    assert apart["test"]["scores"][MAP]["nll"] == combine(cells, False, 70 / 100)  # splits of one set, as far as known
    for record in other:
        record["task"] = record["task"] | {"independent_seeds": True}
    apart = summarise(other)
    assert apart["test"]["scores"][MAP]["nll"] == combine(cells, False)
    assert apart["test"]["scores"][MAP]["nll"][1] < summary["test"]["scores"][MAP]["nll"][1]


def test_records_that_do_not_belong_together_are_refused(two: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="at least one record"):
        summarise([])
    with pytest.raises(ValueError, match="equal settings"):
        summarise([two[0], two[1] | {"settings": {"other": 1}}])
    with pytest.raises(ValueError, match=r"one record for each seed, got seeds \[0, 0\]"):
        summarise([two[0], two[0]])


@pytest.mark.usefixtures("undrawn")
def test_a_method_that_failed_for_a_seed_has_the_numbers_of_the_others_and_is_told(two: list[dict[str, Any]]) -> None:
    changed = copy.deepcopy(two)
    for entry in (changed[1]["test"], *changed[1]["shifts"], *changed[1]["ood"]):
        del entry["scores"]["laplace-torch"], entry["differences"]["laplace-torch"]
        entry["differences"] = {
            second: {first: cell for first, cell in summarised.items() if first != "laplace-torch"}
            for second, summarised in entry["differences"].items()
        }
    old = changed[1]["predictors"]["laplace-torch"]
    changed[1]["predictors"]["laplace-torch"] = {key: old[key] for key in ("kind", "role", "description")} | {
        "failed": "RuntimeError: no memory", "seconds": {}, "warnings": []
    }  # fmt: skip
    for order in (changed, changed[::-1]):
        summarised = summarise(order)
        for part in ("test", "shifts", "ood"):
            pairs = (
                [(summarised[part], two[0][part])]
                if part == "test"
                else zip(summarised[part], two[0][part], strict=True)
            )
            for entry, alone in pairs:
                assert entry["scores"]["laplace-torch"] == alone["scores"]["laplace-torch"]
                assert entry["differences"]["laplace-torch"][MAP] == alone["differences"]["laplace-torch"][MAP]
                assert entry["scores"][MAP] != alone["scores"][MAP]
        assert summarised["predictors"]["laplace-torch"]["failed"] == ["RuntimeError: no memory"]
        assert (
            summarised["predictors"]["laplace-torch"]["seconds"]
            == old["seconds"] | two[0]["predictors"]["laplace-torch"]["seconds"]
        )
        said = "laplace-torch did not run in 1 of 2 seeds; its numbers are of the others: RuntimeError: no memory."
        assert said in statement(summarised)["details"]
        assert said in markdown(summarised, title="Failed")
    page = render(summarised, reliability_pictures(summarised), title="Failed")
    assert "Did not run: RuntimeError: no memory" in page


@pytest.mark.parametrize(
    ("score", "cell", "word"),
    [
        ("nll", BETTER, "better"),
        ("nll", WORSE, "worse"),
        ("nll", NEITHER, "no difference shown"),
        ("nll", [0.0, 0.0, 0.0, 0.0], "negligible"),
        ("nll", NEGLIGIBLE, "negligible"),
        ("nll", [5e-4, 2e-4, 1e-4, 1.1e-3], "worse"),
        ("entropy, auroc", NEGLIGIBLE, "negligible"),
        ("rmse", NEGLIGIBLE, "better"),
        ("width_95", [0.0, 0.0, 0.0, 0.0], "no difference shown"),
        ("nll", [-0.1, 0.1, -0.2, 0.0], "no difference shown"),
        ("accuracy", WORSE, "better"),
        ("accuracy", BETTER, "worse"),
        ("entropy, auroc", WORSE, "better"),
        ("maximum probability, aupr", BETTER, "worse"),
        ("entropy, fpr95", BETTER, "better"),
        ("ece", WORSE, "worse"),
        ("rmse", BETTER, "better"),
    ],
)
def test_verdicts(score: str, cell: list[float], word: str) -> None:
    assert verdict(score, cell) == word


def test_roles_and_shifts_are_found(summary: dict[str, Any]) -> None:
    assert verdicts.by_role(summary, "candidate") == CANDIDATE
    assert verdicts.by_role(summary, "reference") == REFERENCE
    assert verdicts.by_role(summary, "nobody") is None
    assert [entry["severity"] for entry in verdicts.shifts(summary)["moved"]] == [1, 3, 5]
    strong = [conditions.is_strong({"severity": severity}) for severity in (1, 2, 3, 5, None)]
    assert strong == [False, False, True, True, True]


# -- sentences ---------------------------------------------------------------------------------


def with_differences(
    summary: dict[str, Any], against: dict[str, list[float]], strong: dict[str, list[float]] | None = None
) -> dict[str, Any]:
    """A summary in which the candidate's NLL differs so much from that of others, also under strong shift."""
    changed = copy.deepcopy(summary)
    for second, cell in against.items():
        changed["test"]["differences"][second][CANDIDATE]["nll"] = cell
    for second, cell in (strong or {}).items():
        changed["strong_shift"]["differences"][second][CANDIDATE]["nll"] = cell
    if strong is None:
        changed["strong_shift"] = None
    return changed


@pytest.mark.parametrize(
    ("point", "temperature", "strong", "said"),
    [
        (
            BETTER, BETTER, BETTER,
            "better than the network's own and those of temperature scaling; the same holds under strong shift.",
        ),
        (
            BETTER, NEITHER, WORSE,
            "better than the network's own but not shown to differ from those of temperature scaling; under strong "
            "shift they are better than the network's own but worse than those of temperature scaling.",
        ),
        (
            WORSE, NEGLIGIBLE, None,
            "worse than the network's own but practically as good as those of temperature scaling.",
        ),
        (
            UNDEFINED, BETTER, None,
            "not comparable with the network's own but better than those of temperature scaling.",
        ),
    ],
)  # fmt: skip
def test_the_answer_follows_the_numbers(
    summary: dict[str, Any], point: list[float], temperature: list[float], strong: list[float] | None, said: str
) -> None:
    there = {MAP: BETTER, TEMPERATURE_RULE: strong} if strong else None
    changed = with_differences(summary, {MAP: point, TEMPERATURE: temperature}, there)
    answer = statement(changed)["answer"]
    assert answer == f"On the test data of blobs, the probabilities of {CANDIDATE} are {said}"


def test_the_numbers_that_decide_are_those_of_the_summary(summary: dict[str, Any], wave: list[dict[str, Any]]) -> None:
    rows = statement(summary)["rows"]
    assert [(row["score"], row["on"]) for row in rows] == [
        ("nll", "test data"), ("ece", "test data"), ("nll", "strong shift"), ("maximum probability, auroc", "far")
    ]  # fmt: skip
    entries = [summary["test"], summary["test"], summary["strong_shift"], summary["ood"][0]]
    for row, entry, second in zip(rows, entries, (TEMPERATURE, TEMPERATURE, *[TEMPERATURE_RULE] * 2), strict=True):
        assert row["value"] == entry["scores"][CANDIDATE][row["score"]]
        assert list(row["against"]) == [MAP, second]
        for name, about in row["against"].items():
            assert about["value"] == entry["scores"][name][row["score"]]
            assert about["difference"] == entry["differences"][name][CANDIDATE][row["score"]]
    summarised = summarise(wave)
    on_wave = statement(summarised)["rows"]
    assert [row["score"] for row in on_wave] == ["nll", "crps", "calibration_error", "nll"]
    assert {name for row in on_wave for name in row["against"]} == {MAP}
    table = deciding_table(summary)
    assert table is not None
    for row, cells in zip(rows, table.sections[0][1], strict=True):
        digits, scale = (3, 1) if row["score"] == "nll" else (1, 100)
        assert cells[1] == plus_minus(row["value"], digits, scale=scale)
        for about, cell in zip(row["against"].values(), cells[2:], strict=True):
            assert f" {number(about['value'][0], digits, scale=scale)}" in cell.splitlines()[0]
            assert cell.splitlines()[1] == with_interval(about["difference"], digits, scale=scale)


@pytest.mark.parametrize(
    ("cell", "verdict"),
    [
        (BETTER, "✓ better than"), (WORSE, "✗ worse than"), (NEITHER, "○ not shown to differ from"),
        (NEGLIGIBLE, "≈ practically as good as"), (UNDEFINED, "? not comparable with"),
    ],
)  # fmt: skip
def test_verdicts_are_words_with_a_mark(summary: dict[str, Any], cell: list[float], verdict: str) -> None:
    changed = with_differences(summary, {TEMPERATURE: cell}, {TEMPERATURE_RULE: cell})
    table = deciding_table(changed)
    assert table is not None
    rows = table.sections[0][1]
    values = [number(changed["test"]["scores"][TEMPERATURE]["nll"][0], 3),
              number(changed["strong_shift"]["scores"][TEMPERATURE_RULE]["nll"][0], 3) + " *"]  # fmt: skip
    assert [rows[i][3].splitlines()[0] for i in (0, 2)] == [f"{verdict} {value}" for value in values]
    assert "* The largest temperature" in table.caption
    marks = [mark for mark in verdicts.MARK.values()]
    assert len(set(marks)) == len(marks) - 1  # of two that say that nothing is lost


def test_what_debiasing_changes_is_told(summary: dict[str, Any]) -> None:
    changed = copy.deepcopy(summary)
    for name, log_ratio in ((CANDIDATE, math.log(1.03)), (BASELINE, math.log(1.42))):
        changed["distances"]["equal"][name]["absolute"] = [log_ratio, 0.01, 0.0, 0.0]
    assert statement(changed)["details"][0] == (
        "At prior precision 1, output variances differ from those of all the training data by a typical factor of "
        f"1.03 with {CANDIDATE} and 1.42 with {BASELINE}."
    )
    del changed["distances"]["equal"][BASELINE]
    assert not any("typical factor" in sentence for sentence in statement(changed)["details"])


def test_data_that_are_not_there_have_no_row_and_are_asked_for(summary: dict[str, Any]) -> None:
    bare = copy.deepcopy(summary) | {"strong_shift": None, "ood": [], "shifts": []}
    said = statement(bare)
    assert [row["on"] for row in said["rows"]] == ["test data", "test data"]
    assert said["details"][1:] == [
        "No shifted data were given: add shifted_loaders() to the task file to see how the uncertainty holds up when "
        "inputs change.",
        "No out-of-distribution data were given: add ood_loaders() to the task file to see whether unknown inputs are "
        "noticed.",
    ]
    assert "strong shift" not in said["answer"]
    weak = statement(bare | {"shifts": summary["shifts"]})["details"][1]
    assert weak.startswith("No shifted data of severity 3 or more were given")
    several = copy.deepcopy(summary)
    several["ood"] *= 2
    table = deciding_table(several)
    assert table is not None
    assert len(table.sections[0][1]) == 4
    assert table.sections[0][1][3][0].startswith("Telling far apart (first of 2 sets)")


def test_without_a_temperature_nothing_is_said_of_it(summary: dict[str, Any]) -> None:
    changed = with_differences(summary, {MAP: BETTER})
    for entry in (changed["test"], *changed["ood"]):
        for name in (TEMPERATURE, TEMPERATURE_RULE):
            del entry["scores"][name], entry["differences"][name]
    said, table = statement(changed), deciding_table(changed)
    assert said["answer"].endswith("are better than the network's own.")
    assert table is not None
    assert table.columns == ["", CANDIDATE, "against the network"]
    assert "emperature" not in table.caption
    ruled = with_differences(summary, {MAP: BETTER})  # by the other rule alone
    del ruled["test"]["scores"][TEMPERATURE]
    assert list(statement(ruled)["rows"][0]["against"]) == [MAP, TEMPERATURE_RULE]
    for entry in (changed["test"], *changed["ood"]):
        entry["differences"] = {}
    assert statement(changed)["answer"] == f"On blobs there is nothing to compare {CANDIDATE} with."


def test_sentences_of_a_regression(wave: list[dict[str, Any]]) -> None:
    summarised = summarise(wave)
    coverage = plus_minus(summarised["test"]["scores"][CANDIDATE]["coverage_95"], 1, scale=100)
    for cell, words in (
        (BETTER, "better than"), (WORSE, "worse than"), (NEITHER, "not shown to differ from"),
        (NEGLIGIBLE, "practically as good as"),
    ):  # fmt: skip
        said = statement(with_differences(summarised | {"shifts": []}, {MAP: cell}))
        assert said["answer"] == (
            f"On the test data of wave, the predictive distributions of {CANDIDATE} are {words} those of the network "
            f"with one noise level for all inputs; the 95 % intervals hold {coverage} % of the targets."
        )
    assert not any("ood_loaders" in sentence for sentence in statement(summarised)["details"])


def test_scores_in_units_have_a_relative_margin(wave: list[dict[str, Any]]) -> None:
    summarised = summarise(wave)
    entry = summarised["test"]
    value = entry["scores"][MAP]["crps"][0]
    for factor, word in ((0.9, "negligible"), (1.1, "better")):
        cell = [-1e-3 * factor * value, 0.0, -1e-3 * factor * value, -1e-4 * value]
        assert verdicts.judged_in(entry, "crps", cell, CANDIDATE, MAP) == word


@pytest.mark.usefixtures("undrawn")
def test_without_a_candidate_nothing_is_compared(two: list[dict[str, Any]]) -> None:
    changed = copy.deepcopy(two)
    for record in changed:
        record["predictors"][CANDIDATE]["role"] = ""
    summarised = summarise(changed)
    said = statement(summarised)
    assert "none is marked as a candidate" in said["answer"]
    assert said["details"] == said["rows"] == []
    assert deciding_table(summarised) is None
    assert render(summarised, reliability_pictures(summarised), title="Alone")


@pytest.mark.usefixtures("undrawn")
def test_edges_of_the_grid_are_told(summary: dict[str, Any]) -> None:
    changed = copy.deepcopy(summary)
    marked = {
        "debiased, layers": [{"prior precision (2 of 4)": "largest"}, {"prior precision (1 of 4)": "largest"}],
        CANDIDATE: [{"prior precision": "largest", "temperature": "smallest"}, {}],
        BASELINE: [{"prior precision": "smallest"}] * 2,
        TEMPERATURE_RULE: [{}, {"temperature": "largest"}],
    }
    for name, about in changed["predictors"].items():
        about["edges"] = marked.get(name, [{}, {}])
    (table,) = [table for table in tables(changed) if table.title == "Tuning and cost"]
    tuned = {row[0]: row[1] for row in table.sections[0][1]}
    assert re.fullmatch(r"prior \S+ ↑, temperature \S+ ↓", tuned[CANDIDATE])
    assert re.fullmatch(r"prior \S+ ↓, temperature \S+", tuned[BASELINE])
    assert re.fullmatch(r"temperature \S+ ↑", tuned[TEMPERATURE_RULE])
    assert re.fullmatch(r"temperature \S+", tuned[TEMPERATURE])
    assert re.fullmatch(r"prior \S+ to \S+ ↑, temperature \S+", tuned["debiased, layers"])
    assert "a wider one might change it" in table.caption


def test_the_prior_precision_of_distances_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    options = Options(
        grid_size=3, log_prior_prec_min=-2, log_prior_prec_max=4, n_resamples=5, distance_prior_precision=20
    )
    methods = (
        Method(BASELINE, fit={"budget": 24}, role="baseline"),
        Method(REFERENCE, fit={"budget": None}, role="reference"),
        Method(CANDIDATE, fit={"budget": 50}, role="candidate"), Method(MAP, "map"),
    )  # fmt: skip
    summarised = summarise(run(task_of(tmp_path), tmp_path, [0], Context(), methods=methods, options=options))
    sections = [section for table in tables(summarised) for section, _ in table.sections]
    assert "prior precision 20" in sections
    assert "prior precision 1" not in sections


def test_numbers_as_text() -> None:
    assert plus_minus([0.1234, 0.01, 0, 0], 1, scale=100) == "12.3 ± 1.0"
    assert plus_minus([-0.5, 0.25, 0, 0], 2) == f"{MINUS}0.50 ± 0.25"
    assert plus_minus([0.5, 0.25, 0, 0], 2, sign=True) == "+0.50 ± 0.25"
    assert with_interval([-0.01, 0.0, -0.02, 0.0], 2) == f"{MINUS}0.01 [{MINUS}0.02, +0.00]"


# -- tables ------------------------------------------------------------------------------------

INTERVAL = re.compile(rf"[+{MINUS}][\d.]+ \[[+{MINUS}][\d.]+, [+{MINUS}][\d.]+\]")
CALIBRATED = r"\n\(calibrated: [\d.]+ \[[\d.]+, [\d.]+\]\)"
ERROR = re.compile(rf"[+{MINUS}]?[\d.]+ ± [\d.]+({CALIBRATED})?( †)?")
VERDICT = re.compile(rf"({INTERVAL.pattern}\n\([a-z ]+\))?")


def lines_of(text: str) -> list[list[str]]:
    """The tables of a Markdown text, as lists of lines."""
    tables_of_lines: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            tables_of_lines[-1].append(line)
        elif tables_of_lines[-1]:
            tables_of_lines.append([])
    return [table for table in tables_of_lines if table]


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_every_number_has_its_error(summary: dict[str, Any], wave: list[dict[str, Any]], kind: str) -> None:
    summarised = tables(summary if kind == "classification" else summarise(wave))
    titles = [table.title for table in summarised]
    parts = ["Calibration and refinement, test data", "By class, test data"] if kind == "classification" else []
    against = f"{CANDIDATE} against the others, test data"
    assert titles[: len(parts) + 3] == ["Test data", *parts, against, "Strong shift: mean NLL"]
    assert titles[-1] == "Tuning and cost"
    assert len(set(titles)) == len(titles)
    kinds_of_cells = {
        "By class, test data": lambda row: all(re.fullmatch(r"\d+\.\d \[.*\d\](?: ‡)?|", row[i]) for i in (3, 5)),
        "Strong shift: mean NLL": lambda row: ERROR.fullmatch(row[1]) and all(map(VERDICT.fullmatch, row[2:])),
        f"NLL of {CANDIDATE} minus {BASELINE}, at equal settings": lambda row: INTERVAL.fullmatch(row[1]),
    }
    for table in summarised[:-1]:
        if table.title in kinds_of_cells:
            assert all(kinds_of_cells[table.title](row) for _, rows in table.sections for row in rows), table.title
            continue
        pattern = INTERVAL if "against" in table.title or " minus " in table.title else ERROR
        for _, rows in table.sections:
            for row in rows:
                cells = row[1:2] if "against" in table.title else row[1:]
                assert all(pattern.fullmatch(cell) for cell in cells), (table.title, row)
    against = summarised[titles.index(against)]
    assert against.sections[0][0] == f"minus {MAP}"
    verdicts = {row[0]: row[2] for row in against.sections[0][1]}
    if kind == "regression":
        assert verdicts["95 % holds %"] == verdicts["95 % width"] == ""
        assert verdicts["NLL"]
    else:
        cell = summary["test"]["differences"][MAP][CANDIDATE]["nll"]
        assert verdicts["NLL"] == verdict("nll", cell)
        assert against.sections[0][1][1][1] == with_interval(cell, 4)


def ragged(folder: Path) -> dict[str, Any]:
    """Shifts of unequal degrees: one has severities 1, 3, 5, another 2 alone, another none."""
    task = task_of(folder, (
        "for s in (1, 3, 5)}}",
        'for s in (1, 3, 5)}, "turned": {2: [(inputs.flip(1), targets)]}, "wild": [(-inputs, targets)]}',
    ))  # fmt: skip
    methods = tuple(m for m in (Method(MAP, "map"), Method(CANDIDATE, fit={"budget": 24}, role="candidate")))
    return summarise(run(task, folder, [0], Context(), methods=methods, options=OPTIONS))


def test_rows_have_as_many_cells_as_the_head(
    summary: dict[str, Any], wave: list[dict[str, Any]], tmp_path: Path
) -> None:
    for summarised in (summary, summarise(wave), ragged(tmp_path)):
        decides = deciding_table(summarised)
        assert decides is not None
        for table in [decides, *tables(summarised)]:
            assert {len(row) for _, rows in table.sections for row in rows} == {len(table.columns)}, table.title
        for lines in lines_of(markdown(summarised, title="All")):
            assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, lines[0]


def test_numbers_are_under_their_severity(tmp_path: Path) -> None:
    result = ragged(tmp_path)
    (table,) = [table for table in tables(result) if table.title == "Shifted data: NLL"]
    (minus,) = [table for table in tables(result) if table.title == f"Shifted data: NLL of {CANDIDATE} minus {MAP}"]
    places = {"2": [c for c in table.columns if "2" in c], "3": [c for c in table.columns if "3" in c]}
    turned = next(entry for entry in result["shifts"] if entry["name"] == "turned")
    rows = {row[0]: row for section, rows in table.sections if section == "turned" for row in rows}
    assert len(places["2"]) == 1
    cell = plus_minus(turned["scores"][MAP]["nll"], 3)
    (place,) = [index for index, text in enumerate(rows[MAP]) if text.startswith(cell)]  # it may have a mark
    assert place == table.columns.index(places["2"][0])
    differences = next(row for row in minus.sections[0][1] if row[0] == "turned")
    cell = with_interval(turned["differences"][MAP][CANDIDATE]["nll"], 3)
    assert "2" in minus.columns[differences.index(cell)]


def test_tables_in_markdown() -> None:
    table = Table("A title", "A caption.", ["a", "b"], [("part", [["x|y", "1"]]), ("", [["z", "2"]])])
    assert table.markdown().splitlines() == [
        "### A title", "", "A caption.", "", "**part**", "", "| a | b |", "| --- | --- |", "| x\\|y | 1 |", "",
        "| a | b |", "| --- | --- |", "| z | 2 |",
    ]  # fmt: skip


def test_the_numbers_that_decide_fit_a_terminal_of_100_columns(
    summary: dict[str, Any], wave: list[dict[str, Any]]
) -> None:
    from rich.console import Console

    for summarised in (summary, summarise(wave)):
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(deciding_table(summarised))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= 100
        assert "…" not in text
        assert CANDIDATE in text


# -- files -------------------------------------------------------------------------------------

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags with their attributes; it fails where they are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(text: str) -> Page:
    """That a page is whole: nothing is loaded, every picture has a text, every table equal rows."""
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), attributes
        assert "href" not in attributes
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/png;base64,")
            assert len(attributes["alt"] or "") > 5
    rest = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|url\(|@import|//", rest)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert page.tags[0] == ("html", {"lang": "en"})
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    return page


@pytest.mark.usefixtures("undrawn")
def test_files(summary: dict[str, Any], tmp_path: Path) -> None:
    paths = write_outputs(tmp_path / "out", summary, title="A <toy>", notice="Mind & gap")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(paths)
    assert set(paths) == {"results.json", "results.md", "reliability.png", "report.html"}
    results = json.loads(paths["results.json"].read_text())
    assert results == summary | {"statement": statement(summary)}
    assert Image.open(paths["reliability.png"]).format == "PNG"
    said = statement(summary)
    notes = paths["results.md"].read_text()
    assert notes.startswith("# A &lt;toy&gt;\n")
    assert "> Mind &amp; gap" in notes
    assert all(escaped(sentence) in notes for sentence in [said["answer"], *protocol(summary)])
    text = paths["report.html"].read_text()
    page = check_page(text)
    assert "A &lt;toy&gt;" in text
    assert "Mind &amp; gap" in text
    for part in [
        *protocol(summary),
        *(table.title for table in tables(summary)),
        "Shifted to the right.",
    ]:
        assert part in page.text
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert (
        len(pictures) == len(figures.drawn(summary)) + len(figures.pictures(summary)) + 2 + 8 + 8
    )  # two folded ones, and the most uncertain inputs
    tags = [tag for tag, _ in page.tags]
    first_details = tags.index("details")
    assert page.text.index(said["answer"]) < page.text.index("against the network")
    assert tags.index("table") < tags.index("figure") < first_details  # sentence, numbers, figures, the rest
    assert tags[:first_details].count("table") == 1
    assert tags[tags.index("table") : tags.index("figure")].count("tr") <= 1 + 4
    assert tags[:first_details].count("figure") == 3 + len(figures.pictures(summary))
    assert "figure" not in tags[len(tags) - tags[::-1].index("details") :]  # none after the last fold
    scopes = [attributes.get("scope") for tag, attributes in page.tags if tag == "th"]
    assert set(scopes) == {"col", "row", "colgroup"}
    assert "“north”" in page.text
    for name in summary["test"]["scores"]:
        assert summary["predictors"][name]["description"] in page.text


@pytest.mark.usefixtures("undrawn")
def test_files_of_a_regression(wave: list[dict[str, Any]], tmp_path: Path) -> None:
    paths = write_outputs(tmp_path, summarise(wave))
    page = check_page(paths["report.html"].read_text())
    assert "Does uncertainty help? wave" in page.text
    assert "Do intervals hold what they promise?" in page.text
    assert "Reliability diagrams" not in page.text
    assert Image.open(paths["reliability.png"]).format == "PNG"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("n", [1, 2])
def test_a_page_with_little_on_it(tmp_path: Path, n: int) -> None:
    """A method or two, no shifts, no out-of-distribution data, no pictures."""
    task = task_of(
        tmp_path, ("def shifted_loaders", "def nothing"), ("def ood_loaders", "def nothing_else"),
        ("def images", "def no_images"), ("CLASSES", "NAMES"), ("NOTES", "REMARKS"),
    )  # fmt: skip
    methods = (Method(MAP, "map"), Method(CANDIDATE, fit={"budget": 24}, role="candidate"))[:n]
    summarised = summarise(run(task, tmp_path, [0], Context(), methods=methods, options=OPTIONS))
    paths = write_outputs(tmp_path / "out", summarised)
    check_page(paths["report.html"].read_text())
    assert len(tables(summarised)) == 5 + 2 * (n == 2)


@pytest.mark.usefixtures("undrawn")
def test_names_of_others_cannot_change_the_page(tmp_path: Path) -> None:
    bad = ["<script>alert(1)</script>", '\\"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}"]
    task = task_of(
        tmp_path, ('("east", "north", "south")', "(" + ", ".join(f'"{name}"' for name in bad) + ")"),
        ('"moved"', '"<b>moved"'), ('"far"', '"<i>far"'), ("Three blobs in the plane.", "</p><h1>Owned</h1>"),
        ('NAME = "blobs"', 'NAME = "</title><u>"'),
    )  # fmt: skip
    methods = (Method("<s>MAP", "map"), Method("<em>", fit={"budget": 24}, role="candidate"))
    summarised = summarise(run(task, tmp_path, [0], Context(), methods=methods, options=OPTIONS))
    page = check_page(write_outputs(tmp_path / "out", summarised)["report.html"].read_text())
    assert not {tag for tag, _ in page.tags} & {"b", "i", "u", "s", "em"}
    for name in ("<script>alert(1)</script>", "{{ 7 * 7 }}", "<b>moved", "<i>far", "</p><h1>Owned</h1>", "<s>MAP"):
        assert name in page.text


def test_the_figures_are_pictures_and_say_what_they_show(summary: dict[str, Any], wave: list[dict[str, Any]]) -> None:
    for summarised, n, width in ((summary, 5, 500), (summarise(wave), 4, 300)):
        diagrams = reliability_pictures(summarised)
        assert Image.open(io.BytesIO(figures.reliability_png(summarised, diagrams))).size[0] > width
        folded = [figures.risk_coverage(summarised), figures.tuning(summarised)]
        drawn = [*figures.pictures(summarised), *(picture for picture in folded if picture), *diagrams.values()]
        assert len(drawn) == n + (0 if summarised["regression"] else len(figures.drawn(summarised)))
        for picture in drawn:
            image = np.asarray(Image.open(io.BytesIO(picture.png)).convert("L"))
            assert min(image.shape) > 200
            assert image.std() > 3
            assert re.search(r"\d|far", picture.alternative)
            assert len(picture.caption) < 180
    assert set(figures.style(summary)) < set(summary["test"]["scores"])
    looks = [str(look) for look in figures.style(summary).values()]
    assert len(set(looks)) == len(looks)


# -- rooms -----------------------------------------------------------------------------------------

#: Data flow one way, and so do imports: a room imports from those before it alone, and from itself.
ROOMS = [
    "names", "records", "provenance", "shifts", "scores", "predictors", "shipped", "tasks", "methods", "judge", "suite",
    "report", "bias", "demo", "progress", "template",
]  # fmt: skip
EVALUATION = Path(evaluation.__file__).parent


@pytest.mark.parametrize("path", sorted(EVALUATION.rglob("*.py")), ids=lambda p: str(p.relative_to(EVALUATION)))
def test_rooms_of_the_evaluation_import_one_way(path: Path) -> None:
    room = path.relative_to(EVALUATION).with_suffix("").parts[0]
    if room == "__init__":
        return
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[:2] == ["debiased_laplace", "evaluation"]:
                imported |= {parts[2]} if len(parts) > 2 else {alias.name for alias in node.names}
    assert imported <= {*ROOMS[: ROOMS.index(room)], *([room] if path.parent != EVALUATION else [])}
