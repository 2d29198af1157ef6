"""Resampled scores: against scores of repeated samples, at edges, with their coverage, and in pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from debiased_laplace import _arrays
from debiased_laplace.evaluation.scores import (
    bootstrap,
    calibration,
    classification,
    detection,
    refinement,
    regression,
    weighted,
)
from debiased_laplace.evaluation.scores.replicates import Replicates
from tests.tolerances import EXACT, MONTE_CARLO_Z, assert_unbiased

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def draws(n: int = 60, classes: int = 4, sharpness: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Targets from the probabilities themselves."""
    generator = np.random.default_rng(seed)
    logits = sharpness * generator.standard_normal((n, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probabilities, (probabilities.cumsum(1) < generator.random((n, 1))).sum(1).clip(max=classes - 1)


def counts(n: int, rows: int = 25) -> np.ndarray:
    """Ones, a single datum, rows of other totals, and resamples."""
    alone = np.zeros(n)
    alone[n // 2] = 3
    return np.stack([np.ones(n), alone, 2.0 + np.arange(n) % 3, *weighted.resample_weights(n, rows)])


# -- weights -----------------------------------------------------------------------------------


def test_weights_are_multinomial_counts() -> None:
    state = np.random.get_state()[1].copy()
    weights = weighted.resample_weights(7, 20_000, seed=3)
    assert weights.shape == (20_000, 7)
    assert (weights.sum(1) == 7).all()
    deviations = torch.from_numpy(weights).double() - 1
    products = deviations[:, :, None] * deviations[:, None, :]
    assert_unbiased(deviations, torch.zeros(7))
    assert_unbiased(products, torch.eye(7, dtype=torch.float64) - 1 / 7)  # covariance of one draw, seven times
    assert np.array_equal(weights, weighted.resample_weights(7, 20_000, seed=3))
    assert not np.array_equal(weights, weighted.resample_weights(7, 20_000, seed=4))
    assert np.array_equal(state, np.random.get_state()[1])
    assert weighted.resample_weights(1, 2).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(2), r"shape \[B, 2\].*got \(2,\). Make them with resample_weights\(2\)"),
        (np.ones((3, 4)), r"shape \[B, 2\].*got \(3, 4\)"),
        (np.ones((0, 2)), "one row for each resample"),
        ([[1.0, 1.0], [0.5, 1.5]], "count how often.*rows 0 to 1"),
        ([[2.0, -1.0]], "count how often"),
        ([[math.nan, 1.0]], "count how often"),
        ([[math.inf, 1.0]], "count how often"),
        ([[0.0, 0.0]], "not all zero in a row"),
        ([["a", "b"]], "numbers in weights"),
    ],
)
def test_bad_weights_are_refused(weights: Any, message: str) -> None:
    for call in (
        lambda: bootstrap.classification_replicates([[0.5, 0.5], [0.1, 0.9]], [0, 1], weights),
        lambda: bootstrap.regression_replicates([0.0, 1.0], [1.0, 1.0], [0.0, 0.0], weights),
        lambda: bootstrap.detection_replicates([0.1, 0.2], [0.3], weights, np.ones((1, 1))),
        lambda: bootstrap.detection_replicates([0.3], [0.1, 0.2], np.ones((1, 1)), weights),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_numbers_are_checked() -> None:
    with pytest.raises(ValueError, match="at least one datum and one resample, got 0 and 5"):
        weighted.resample_weights(0, 5)
    with pytest.raises(ValueError, match="equally many resamples of both kinds, got 2 and 3"):
        bootstrap.detection_replicates([0.1], [0.3], np.ones((2, 1)), np.ones((3, 1)))
    with pytest.raises(ValueError, match=r"shapes \[N\] and \[M\], got \(1, 1\) and \(1,\)"):
        bootstrap.detection_replicates([[0.1]], [0.3], np.ones((2, 1)), np.ones((2, 1)))
    with pytest.raises(ValueError, match="both 0"):
        bootstrap.detection_replicates([0.1], [], np.ones((2, 1)), np.ones((2, 0)))
    with pytest.raises(ValueError, match="finite scores, got 1"):
        bootstrap.detection_replicates([math.nan], [0.1], np.ones((2, 1)), np.ones((2, 1)))


# -- replicates are the scores of repeated samples ---------------------------------------------


def adaptive_of_repeated(probabilities: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """With the bins of the whole sample, by a loop."""
    confidence, correct = calibration.confidence_and_hits(probabilities, targets)
    index = calibration.equally_full_bins(confidence, calibration.N_BINS)
    gaps = [sum(w * (c - h) for w, c, h, i in zip(weights, confidence, correct, index, strict=True) if i == b)
            for b in range(max(index) + 1)]  # fmt: skip
    return sum(map(abs, gaps)) / weights.sum()


def awkward() -> dict[str, tuple[Any, Any]]:
    probabilities, targets = draws()
    tied = probabilities.round(1)
    tied[:, 0] += 1 - tied.sum(1)
    tied = np.abs(tied) / np.abs(tied).sum(1, keepdims=True)
    sure = np.eye(4)[targets]
    return {
        "plain": (probabilities, targets),
        "binary": draws(40, 2),
        "one class present": (probabilities, np.zeros(60, dtype=int)),
        "ties": (tied * 0.99 + 0.0025, targets),
        "certain and right": (sure, targets),
        "saturated": draws(50, 3, sharpness=60.0),
        "one datum": (probabilities[:1], targets[:1]),
        "uniform": (np.full((12, 3), 1 / 3), np.arange(12) % 3),
        "float32": (torch.from_numpy(probabilities).float(), torch.from_numpy(targets)),
    }


@pytest.mark.parametrize("case", awkward())
def test_classification(case: str) -> None:
    probabilities, targets = awkward()[case]
    weights = counts(len(targets))
    scores = bootstrap.classification_replicates(probabilities, targets, weights)
    probabilities, targets = _arrays.check_predictions(probabilities, targets)
    whole = classification.classification_metrics(probabilities, targets)
    assert set(scores) == set(whole) - {"reliability"}
    found = refinement.recalibrate(probabilities, np.eye(probabilities.shape[1])[targets])
    for row, w in enumerate(weights):
        repeated = np.repeat(probabilities, w.astype(int), 0), np.repeat(targets, w.astype(int))
        expected = classification.classification_metrics(*repeated)
        expected["adaptive_ece"] = adaptive_of_repeated(probabilities, targets, w)
        # The temperature is a step from that of the whole sample.
        risks = found.risks({name: w @ column / w.sum() for name, column in found.columns.items()})
        expected |= classification.with_calibration_losses(expected | risks)
        for name, score in scores.items():
            assert score.value == pytest.approx(whole[name], rel=EXACT, abs=1e-15)
            assert score.replicates[row] == pytest.approx(expected[name], rel=EXACT, abs=1e-12), (name, row)
    for score in scores.values():
        assert score.replicates[0] == pytest.approx(score.value, rel=EXACT, abs=1e-12)


@pytest.mark.parametrize(("n", "outputs"), [(40, 3), (40, 1), (1, 2)])
def test_regression(n: int, outputs: int) -> None:
    generator = np.random.default_rng(0)
    mean, variance = generator.standard_normal((n, outputs)), np.exp(generator.standard_normal((n, outputs)))
    targets = mean + generator.standard_normal((n, outputs))
    weights = counts(n)
    scores = bootstrap.regression_replicates(mean, variance, targets, weights)
    assert list(scores) == list(regression.regression_metrics(mean, variance, targets))
    for row, w in enumerate(weights):
        expected = regression.regression_metrics(*(np.repeat(a, w.astype(int), 0) for a in (mean, variance, targets)))
        for name, score in scores.items():
            assert score.replicates[row] == pytest.approx(expected[name], rel=EXACT, abs=1e-12), (name, row)
    for name, score in scores.items():
        assert score.value == regression.regression_metrics(mean, variance, targets)[name]


@pytest.mark.parametrize(
    ("digits", "n", "m", "shift"),
    [(8, 40, 30, 1.0), (0, 40, 30, 1.0), (8, 1, 1, 0.0), (8, 40, 20, 0.0), (8, 30, 41, 9.0), (8, 5, 60, -9.0)],
)
def test_detection(digits: int, n: int, m: int, shift: float) -> None:
    generator = np.random.default_rng(0)
    inside, outside = generator.standard_normal(n).round(digits), (shift + generator.standard_normal(m)).round(digits)
    first, second = counts(n), counts(m)[::-1].copy()
    first[-1], second[-1] = 1, 1
    scores = bootstrap.detection_replicates(inside, outside, first, second)
    assert list(scores) == ["auroc", "aupr", "fpr95"]
    for row, (v, w) in enumerate(zip(first.astype(int), second.astype(int), strict=True)):
        score, labels = (
            np.concatenate([np.repeat(inside, v), np.repeat(outside, w)]),
            np.repeat([0, 1], [v.sum(), w.sum()]),
        )
        for name, replicates in scores.items():
            expected = getattr(detection, name)(score, labels)
            assert replicates.replicates[row] == pytest.approx(expected, rel=EXACT, abs=1e-12), (name, row)
    for replicates in scores.values():
        assert replicates.replicates[-1] == pytest.approx(replicates.value, rel=EXACT, abs=1e-12)


@pytest.mark.parametrize("entries", [1, 130])
def test_blocks_do_not_matter(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities, targets = draws()
    weights, other = weighted.resample_weights(60, 11), weighted.resample_weights(60, 11, seed=1)
    mean, variance = probabilities[:, :2], probabilities[:, 2:]

    def all_scores() -> dict[str, Replicates]:
        return {
            **bootstrap.classification_replicates(probabilities, targets, weights),
            **{
                f"of means: {k}": v
                for k, v in bootstrap.regression_replicates(mean, variance, mean + 1, weights).items()
            },
            **bootstrap.detection_replicates(probabilities[:, 0], probabilities[:, 1], weights, other),
        }

    whole = all_scores()
    monkeypatch.setattr(weighted, "BLOCK_ENTRIES", entries)
    for name, score in all_scores().items():
        assert score.replicates == pytest.approx(whole[name].replicates, rel=EXACT), name


def test_weights_may_be_integers_or_tensors() -> None:
    probabilities, targets = draws()
    weights = weighted.resample_weights(60, 5)
    expected = bootstrap.classification_replicates(probabilities, targets, weights)
    for other in (weights.astype(np.uint8), torch.from_numpy(weights), weights.astype(int).tolist()):
        scores = bootstrap.classification_replicates(probabilities, targets, other)
        assert all(np.array_equal(scores[name].replicates, expected[name].replicates) for name in expected)


# -- an impossible target ----------------------------------------------------------------------


def test_an_impossible_target() -> None:
    probabilities, targets = draws(20)
    probabilities[3] = np.eye(4)[(targets[3] + 1) % 4]
    weights = weighted.resample_weights(20, 300)
    scores = bootstrap.classification_replicates(probabilities, targets, weights)
    nll, holds = scores["nll"], weights[:, 3] > 0
    assert nll.value == nll.standard_error == math.inf
    assert (nll.replicates[holds] == math.inf).all()
    assert np.isfinite(nll.replicates[~holds]).all()
    low, high = nll.interval()
    assert math.isfinite(low)
    assert high == math.inf
    of_nll = ("nll", "nll_refinement", "nll_calibration")
    assert all(np.isfinite(score.replicates).all() for name, score in scores.items() if name not in of_nll)
    assert scores["nll_refinement"].value == math.inf
    assert np.isnan(scores["nll_calibration"].replicates).tolist() == holds.tolist()
    assert scores["nll_calibration"].interval() == (-math.inf, math.inf)
    # Against a predictor whose scores are finite, and against itself.
    other = bootstrap.classification_replicates(np.full((20, 4), 0.25), targets, weights)["nll"]
    assert (nll - other).value == math.inf
    assert (other - nll).interval()[0] == -math.inf
    assert (nll - nll).interval() == (-math.inf, math.inf)
    assert math.isnan((nll - nll).value)
    everywhere = bootstrap.classification_replicates(np.eye(2)[[0, 0]], [1, 1], np.ones((9, 2)))["nll"]
    assert everywhere.interval() == (math.inf, math.inf)


# -- replicates --------------------------------------------------------------------------------


def test_interval_and_standard_error() -> None:
    values = np.random.default_rng(0).standard_normal(57)
    replicates = Replicates(0.0, values)
    assert replicates.standard_error == pytest.approx(values.std(ddof=1), rel=EXACT)
    for confidence in (0.5, 0.9, 0.95):
        expected = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
        assert replicates.interval(confidence) == pytest.approx(expected, rel=EXACT)
        assert all(type(bound) is float for bound in replicates.interval(confidence))
    assert Replicates(1.0, np.array([1.0])).interval() == (1.0, 1.0)


@pytest.mark.parametrize(
    ("replicates", "expected"),
    [
        ([1.0, 2.0, math.inf], (1.5, math.inf)),
        ([-math.inf, 2.0, 3.0], (-math.inf, 2.5)),
        ([-math.inf, math.inf], (-math.inf, math.inf)),
        ([math.nan, 1.0, 2.0], (-math.inf, math.inf)),
        ([math.inf, math.inf], (math.inf, math.inf)),
    ],
)
def test_interval_of_infinite_replicates(replicates: list[float], expected: tuple[float, float]) -> None:
    assert Replicates(0.0, np.array(replicates)).interval(0.5) == expected
    assert Replicates(0.0, np.array(replicates)).standard_error == math.inf


def test_replicates_are_checked() -> None:
    for confidence in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match=r"confidence between 0 and 1, got .* Write 95 % as 0.95"):
            Replicates(0.0, np.zeros(3)).interval(confidence)
    with pytest.raises(ValueError, match="at least two resamples for a standard error, got 1"):
        _ = Replicates(0.0, np.zeros(1)).standard_error
    with pytest.raises(ValueError, match=r"equally many resamples, got 3 and 4\. Make both with the same weights"):
        _ = Replicates(0.0, np.zeros(3)) - Replicates(0.0, np.zeros(4))
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = Replicates(0.0, np.zeros(3)) - 1.0  # type: ignore[operator]


def test_paired_differences_are_narrower() -> None:
    probabilities, targets = draws(300)
    similar = 0.95 * probabilities + 0.0125
    weights, independent = weighted.resample_weights(300, 500), weighted.resample_weights(300, 500, seed=1)
    first = bootstrap.classification_replicates(probabilities, targets, weights)
    second = bootstrap.classification_replicates(similar, targets, weights)
    unpaired = bootstrap.classification_replicates(similar, targets, independent)
    for name in ("nll", "brier", "aurc"):
        paired = first[name] - second[name]
        assert paired.value == first[name].value - second[name].value
        assert np.array_equal(paired.replicates, first[name].replicates - second[name].replicates)
        assert paired.standard_error < 0.5 * (first[name] - unpaired[name]).standard_error, name
    assert (first["nll"] - first["nll"]).interval() == (0.0, 0.0)


# -- coverage ----------------------------------------------------------------------------------


def covered(intervals: list[tuple[float, float]], truth: float) -> float:
    """Standard errors between the share of intervals that hold the truth, and 95 %."""
    share = np.mean([low <= truth <= high for low, high in intervals])
    return float((share - 0.95) / math.sqrt(0.95 * 0.05 / len(intervals)))


def test_intervals_hold_the_truth() -> None:
    r"""Of a population with known scores, 95 % intervals of 400 samples of 300 data.

    With B = 400 replicates the interpolated percentiles hold 0.95 (B - 1) / (B + 1) = 94.5 % of all replicates, and a
    percentile interval is too short by sqrt(1 - 1/n) and by the difference of normal and t quantiles, 0.1 % more:
    known slack of half a standard error of this test. The mean NLL of Gaussian predictions of the
    right mean and twice the right variance is (1/2 + log 4 pi) / 2, their mean squared error is one.
    """
    generator, nll, rmse = np.random.default_rng(0), [], []
    weights = weighted.resample_weights(300, 400)
    for _ in range(400):
        scores = bootstrap.regression_replicates(
            np.zeros(300), np.full(300, 2.0), generator.standard_normal(300), weights
        )
        nll.append(scores["nll"].interval())
        rmse.append(scores["rmse"].interval())
    assert abs(covered(nll, (0.5 + math.log(4 * math.pi)) / 2)) <= MONTE_CARLO_Z
    assert abs(covered(rmse, 1.0)) <= MONTE_CARLO_Z


def test_intervals_of_classification_and_detection_hold_the_truth() -> None:
    """As above. Binary confidences uniform in [1/2, 1]: accuracy 3/4, Brier score 1/3. AUROC is Phi(1/sqrt 2)."""
    generator, accuracy, brier, auroc = np.random.default_rng(0), [], [], []
    weights, other = weighted.resample_weights(200, 400), weighted.resample_weights(200, 400, seed=1)
    for _ in range(200):
        confidence = 0.5 + generator.random(200) / 2
        targets = (generator.random(200) > confidence).astype(int)
        scores = bootstrap.classification_replicates(np.stack([confidence, 1 - confidence], 1), targets, weights)
        accuracy.append(scores["accuracy"].interval())
        brier.append(scores["brier"].interval())
        inside, outside = generator.standard_normal(200), 1 + generator.standard_normal(200)
        auroc.append(bootstrap.detection_replicates(inside, outside, weights, other)["auroc"].interval())
    assert abs(covered(accuracy, 0.75)) <= MONTE_CARLO_Z
    assert abs(covered(brier, 1 / 3)) <= MONTE_CARLO_Z
    assert abs(covered(auroc, 0.5 * (1 + math.erf(0.5)))) <= MONTE_CARLO_Z
