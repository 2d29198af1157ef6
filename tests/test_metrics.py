"""Scores by hand, at edges and against independent computations: calibration, selection, detection, regression."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import entropy as scipy_entropy
from scipy.stats import norm

from debiased_laplace import _arrays
from debiased_laplace.evaluation.scores import calibration, classification, detection, regression
from tests.tolerances import EXACT, FLOAT32, MONTE_CARLO_Z

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def draws(n: int = 400, classes: int = 5, sharpness: float = 3.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    logits = sharpness * generator.standard_normal((n, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probabilities, generator.integers(classes, size=n)


# -- calibration -------------------------------------------------------------------------------


def loop_classwise(probabilities: np.ndarray, targets: np.ndarray, bins: int = 15) -> float:
    (n, classes), total = probabilities.shape, 0.0
    for c in range(classes):
        for b in range(bins):
            inside = [
                i for i in range(n) if min(sum(probabilities[i, c] >= np.linspace(0, 1, bins + 1)[1:]), bins - 1) == b
            ]
            if inside:
                frequency = np.mean([targets[i] == c for i in inside])
                total += len(inside) / n * abs(frequency - np.mean(probabilities[inside, c]))
    return total / classes


def test_classwise_by_hand() -> None:
    probabilities = [[0.1, 0.9], [0.15, 0.85], [0.9, 0.1]]
    # Two bins. Class 0: |0.25 - 1| below one half (two data, one hit), |0.9 - 1| above; class 1 likewise.
    expected = ((abs(1 - 0.25) + abs(1 - 0.9)) + (abs(1 - 1.75) + abs(0 - 0.1))) / 3 / 2
    assert calibration.classwise_calibration_error(probabilities, [0, 1, 0], 2) == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize(
    ("classes", "sharpness", "n_bins"), [(2, 3.0, 15), (5, 3.0, 15), (5, 60.0, 15), (10, 0.5, 7), (3, 3.0, 1)]
)
def test_classwise_is_the_loop(classes: int, sharpness: float, n_bins: int) -> None:
    probabilities, targets = draws(80, classes, sharpness)
    for labels in (targets, np.zeros(80, dtype=int)):  # all classes, and one alone
        value = calibration.classwise_calibration_error(probabilities, labels, n_bins)
        assert value == pytest.approx(loop_classwise(probabilities, labels, n_bins), rel=EXACT)


def test_classwise_is_the_mean_of_binary_errors() -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    probabilities, targets = draws()
    each = [
        functional.binary_calibration_error(torch.from_numpy(column), torch.from_numpy(targets == c).long(), n_bins=15)
        for c, column in enumerate(probabilities.T.copy())
    ]
    assert calibration.classwise_calibration_error(probabilities, targets) == pytest.approx(
        float(torch.stack(each).double().mean()), rel=FLOAT32  # it adds up in float32
    )  # fmt: skip


def test_calibration_at_probabilities_zero_and_one() -> None:
    sure = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.97, 0.03]])
    assert calibration.classwise_calibration_error(sure[:3], [0, 0, 1]) == 0
    assert calibration.classwise_calibration_error(sure[:3], [1, 1, 0]) == 1
    # One shares the last bin with 0.97, and zero the first one with 0.03.
    expected = (abs(2.97 - 2) + abs(0 - 0)) / 4 / 2 + (abs(0.03 - 1) + abs(1 - 1)) / 4 / 2
    assert calibration.classwise_calibration_error(sure, [0, 0, 1, 1]) == pytest.approx(expected, rel=EXACT)
    assert calibration.classwise_calibration_error([[0.7, 0.2, 0.1]], [0]) == pytest.approx(0.6 / 3, rel=EXACT)


@pytest.mark.parametrize("n_bins", [10, 15])
def test_confidences_at_edges_of_bins(n_bins: int) -> None:
    """All functions put a confidence at an edge into the upper bin, the library's function included."""
    confidence = np.linspace(0, 1, n_bins + 1)[(n_bins + 1) // 2 :]
    probabilities = np.stack([confidence, 1 - confidence], 1)
    targets = np.arange(len(confidence)) % 2
    expected = np.abs(
        np.bincount(np.minimum(np.arange(len(confidence)), len(confidence) - 2), confidence - (targets == 0))
    )
    value = calibration.expected_calibration_error(probabilities, targets, n_bins)
    assert value == pytest.approx(expected.sum() / len(confidence), rel=EXACT)
    assert calibration.equal_width_bins(np.array([0.0, *confidence]), n_bins).tolist() == [
        0, *range((n_bins + 1) // 2, n_bins), n_bins - 1
    ]  # fmt: skip


def test_all_scores_are_reported() -> None:
    probabilities, targets = draws()
    scores = classification.classification_metrics(probabilities, targets)
    assert scores["classwise_ece"] == calibration.classwise_calibration_error(probabilities, targets)
    assert scores["aurc"] == classification.aurc(probabilities, targets)
    ood = detection.out_of_distribution_metrics(probabilities, draws(90, sharpness=1.0, seed=1)[0])
    assert list(ood) == ["auroc", "aupr", "fpr95"]


@pytest.mark.parametrize("logits", [[[2.0, -1.0]], [[0.3, 0.3]], [[4.0, 5.0]]])
def test_logits_are_recognised(logits: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"rows sum to one.*Apply softmax first: this looks like logits"):
        _arrays.check_probabilities(logits)


# -- selection ---------------------------------------------------------------------------------


def binary(confidence: Any) -> np.ndarray:
    confidence = np.asarray(confidence, dtype=float)
    return np.stack([confidence, 1 - confidence], 1)


def loop_aurc(confidence: list[float], wrong: list[int]) -> float:
    """Mean over all orders that sort the confidences."""
    values = []
    for order in itertools.permutations(range(len(wrong))):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            values.append(np.mean([np.mean([wrong[i] for i in order[: k + 1]]) for k in range(len(order))]))
    return float(np.mean(values))


def test_aurc_by_hand() -> None:
    assert classification.aurc(binary([0.9, 0.8, 0.7, 0.6]), [0, 1, 0, 1]) == pytest.approx(
        (1 / 2 + 1 / 3 + 2 / 4) / 4, rel=EXACT
    )
    assert classification.aurc(binary([0.9, 0.8, 0.8]), [0, 1, 0]) == pytest.approx(
        (0 + 0.5 / 2 + 1 / 3) / 3, rel=EXACT
    )
    assert classification.aurc(binary([0.9]), [0]) == 0
    assert classification.aurc(binary([0.9]), [1]) == 1
    assert classification.aurc(binary([1.0] * 7), [0, 1, 1, 0, 0, 0, 0]) == pytest.approx(2 / 7, rel=EXACT)


@pytest.mark.parametrize("seed", range(6))
def test_aurc_is_the_mean_over_orders_of_ties(seed: int) -> None:
    generator = np.random.default_rng(seed)
    confidence, targets = generator.choice([0.6, 0.7, 0.8, 1.0], 7), generator.integers(2, size=7)
    expected = loop_aurc(confidence.tolist(), targets.tolist())
    for order in (np.arange(7), np.arange(7)[::-1], generator.permutation(7)):
        assert classification.aurc(binary(confidence[order]), targets[order]) == pytest.approx(expected, rel=EXACT)


def test_aurc_is_the_sorted_mean_without_ties() -> None:
    probabilities, targets = draws(150)
    wrong = (probabilities.argmax(1) != targets)[np.argsort(-probabilities.max(1))]
    expected = np.mean([wrong[: k + 1].mean() for k in range(150)])
    assert classification.aurc(probabilities, targets) == pytest.approx(expected, rel=EXACT)


def test_risk_coverage_is_thinned_and_ends_at_the_error_rate() -> None:
    probabilities, targets = draws(150)
    coverage, risk = classification.risk_coverage(probabilities, targets)
    assert coverage == pytest.approx(np.arange(1, 151) / 150, rel=EXACT)
    assert risk.mean() == pytest.approx(classification.aurc(probabilities, targets), rel=EXACT)
    many, labels = draws(5000)
    coverage, risk = classification.risk_coverage(many, labels)
    assert len(coverage) == len(risk) == 200
    assert (np.diff(coverage) > 0).all()
    assert (coverage[0], coverage[-1]) == (1 / 5000, 1)
    assert risk[-1] == pytest.approx(1 - classification.accuracy(many, labels), rel=EXACT)
    wrong = (many.argmax(1) != labels)[np.argsort(-many.max(1))]
    for share, value in zip(coverage, risk, strict=True):
        assert value == pytest.approx(wrong[: round(share * 5000)].mean(), rel=EXACT)
    assert [array.tolist() for array in classification.risk_coverage(binary([0.9]), [1])] == [[1.0], [1.0]]


# -- detection ---------------------------------------------------------------------------------


def loop_aupr(score: np.ndarray, is_outside: np.ndarray) -> float:
    total, recall = 0.0, 0.0
    for threshold in sorted(set(score.tolist()), reverse=True):
        called = score >= threshold
        now = is_outside[called].sum() / is_outside.sum()
        total, recall = total + (now - recall) * is_outside[called].mean(), now
    return total


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [
        ([0.1, 0.2, 0.3], [0.7, 0.8], 1.0),  # separated
        ([0.7, 0.8, 0.9], [0.1], 0.25),  # found last of four
        ([0.5, 0.5, 0.5], [0.5], 0.25),  # all tied: the share of out-of-distribution data
        ([0.1, 0.5], [0.5, 0.9], 1 / 2 * 1 + 1 / 2 * 2 / 3),
    ],
)
def test_aupr_by_hand(inside: list[float], outside: list[float], expected: float) -> None:
    score, is_outside = np.array([*inside, *outside]), np.repeat([0, 1], [len(inside), len(outside)])
    assert detection.aupr(score, is_outside) == pytest.approx(expected, rel=EXACT)
    assert loop_aupr(score, is_outside) == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("digits", [1, 8])
def test_aupr_is_the_independent_one(digits: int) -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    generator = np.random.default_rng(0)
    is_outside = generator.integers(2, size=300)
    score = (generator.standard_normal(300) + is_outside).round(digits)  # with ties, and without
    value = detection.aupr(score, is_outside)
    assert value == pytest.approx(loop_aupr(score, is_outside), rel=EXACT)
    ranks = torch.from_numpy(np.unique(score, return_inverse=True)[1] / 300)
    reference = functional.binary_average_precision(ranks, torch.from_numpy(is_outside))
    assert value == pytest.approx(float(reference), rel=FLOAT32)  # it adds up in float32


def test_entropy() -> None:
    probabilities, _ = draws()
    assert detection.entropy(probabilities) == pytest.approx(scipy_entropy(probabilities, axis=1), rel=EXACT)
    assert detection.entropy([[0.25] * 4, [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]) == pytest.approx(
        [math.log(4), math.log(2), 0.0], rel=EXACT
    )
    assert detection.entropy([[1.0005, 0.0]])[0] == 0


# -- regression --------------------------------------------------------------------------------


def gaussian_draws(n: int = 60, outputs: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    mean, variance = 3 * generator.standard_normal((n, outputs)), np.exp(generator.standard_normal((n, outputs)))
    return mean, variance, mean + 1.3 * np.sqrt(variance) * generator.standard_normal((n, outputs))


def test_regression_by_hand() -> None:
    scores = regression.regression_metrics([0.0, 1.0], [1.0, 4.0], [0.0, 5.0])  # z is 0 and 2
    assert scores["rmse"] == pytest.approx(math.sqrt(8), rel=EXACT)
    assert scores["nll"] == pytest.approx((math.log(2 * math.pi) * 2 + math.log(4) + 4) / 4, rel=EXACT)
    at_zero = (math.sqrt(2) - 1) / math.sqrt(math.pi)
    at_two = 2 * (2 * math.erf(2 / math.sqrt(2)) + 2 * math.exp(-2) / math.sqrt(2 * math.pi) - 1 / math.sqrt(math.pi))
    assert scores["crps"] == pytest.approx((at_zero + at_two) / 2, rel=EXACT)
    assert [scores[f"coverage_{p}"] for p in (50, 90, 95)] == [0.5, 0.5, 0.5]
    assert scores["width_95"] == pytest.approx(2 * 1.959963984540054 * 1.5, rel=EXACT)
    # Half of the data are in all intervals: gaps 0.45, 0.40, ..., 0, ..., 0.45 of 19 levels.
    assert scores["calibration_error"] == pytest.approx(2 * 0.05 * sum(range(10)) / 19, rel=EXACT)


def test_crps_is_the_integral() -> None:
    """Against the defining integral of the squared difference of distribution functions."""
    mean, variance, targets = gaussian_draws(6, 2)
    total = 0.0
    for m, s, y in zip(mean.ravel(), np.sqrt(variance).ravel(), targets.ravel(), strict=True):
        below = quad(lambda x, m=m, s=s: norm.cdf(x, m, s) ** 2, m - 40 * s, y, points=[m], epsabs=1e-13, limit=200)[0]
        above = quad(lambda x, m=m, s=s: norm.sf(x, m, s) ** 2, y, m + 40 * s, points=[m], epsabs=1e-13, limit=200)[0]
        total += below + above
    assert regression.regression_metrics(mean, variance, targets)["crps"] == pytest.approx(total / 12, rel=EXACT)


def test_regression_is_the_independent_one() -> None:
    mean, variance, targets = gaussian_draws()
    scores = regression.regression_metrics(mean, variance, targets)
    normal = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(variance).sqrt())
    nll = -normal.log_prob(torch.from_numpy(targets)).sum(1).mean()
    assert scores["nll"] == pytest.approx(float(nll), rel=EXACT)
    assert scores["rmse"] == pytest.approx(math.sqrt(float(((mean - targets) ** 2).mean())), rel=EXACT)
    gaps = []
    for percent in range(5, 100, 5):
        low, high = norm.interval(percent / 100, mean, np.sqrt(variance))
        observed = float(((low <= targets) & (targets <= high)).mean())
        gaps.append(abs(observed - percent / 100))
        if percent in (50, 90, 95):
            assert scores[f"coverage_{percent}"] == pytest.approx(observed, rel=EXACT)
            assert scores[f"width_{percent}"] == pytest.approx(float((high - low).mean()), rel=EXACT)
    assert scores["calibration_error"] == pytest.approx(np.mean(gaps), rel=EXACT)
    expected, observed = regression.calibration_curve(mean, variance, targets)
    assert expected == pytest.approx(np.linspace(0.05, 0.95, 19), rel=EXACT)
    assert np.abs(observed - expected).mean() == pytest.approx(scores["calibration_error"], rel=EXACT)


def test_regression_of_one_output_one_datum_and_tensors() -> None:
    mean, variance, targets = gaussian_draws(20, 1)
    flat = regression.regression_metrics(mean[:, 0], variance[:, 0], targets[:, 0])
    assert flat == regression.regression_metrics(mean, variance, targets)
    tensors = [torch.from_numpy(array).requires_grad_() for array in (mean, variance, targets)]
    assert flat == regression.regression_metrics(*tensors)
    alone = regression.regression_metrics([2.0], [9.0], [2.0])
    assert (alone["rmse"], alone["coverage_50"]) == (0, 1)
    assert alone["calibration_error"] == pytest.approx(0.5, rel=EXACT)
    assert alone["crps"] == pytest.approx(3 * (math.sqrt(2) - 1) / math.sqrt(math.pi), rel=EXACT)
    far = regression.regression_metrics([0.0], [1.0], [1e6])
    assert far["crps"] == pytest.approx(1e6 - 1 / math.sqrt(math.pi), rel=EXACT)


def test_a_calibrated_predictive_is_found_calibrated() -> None:
    generator, n = np.random.default_rng(0), 20_000
    mean, variance = generator.standard_normal(n), np.exp(generator.standard_normal(n))
    targets = mean + np.sqrt(variance) * generator.standard_normal(n)
    expected, observed = regression.calibration_curve(mean, variance, targets)
    assert (np.abs(observed - expected) <= MONTE_CARLO_Z * np.sqrt(expected * (1 - expected) / n)).all()
    _, narrow = regression.calibration_curve(mean, variance / 4, targets)
    assert (narrow < expected).all()


@pytest.mark.parametrize(
    ("mean", "variance", "targets", "message"),
    [
        ([0.0, 0.0], [1.0, 0.0], [0.0, 0.0], "positive variances, got a smallest value of 0.*needs the noise added"),
        ([0.0], [-1.0], [0.0], "positive variances, got a smallest value of -1"),
        ([[0.0], [0.0]], [[1.0], [1.0]], [0.0, 0.0], r"one shape.*mean \(2, 1\), variance \(2, 1\), targets \(2,\)"),
        ([[0.0]], [[[1.0]]], [[0.0]], "give the diagonal"),
        ([], [], [], "at least one datum"),
        (0.0, 1.0, 0.0, r"\[N\] or \[N, C\]"),
        ([0.0, math.nan], [1.0, 1.0], [0.0, 0.0], "finite mean, got NaN or infinity in 1 of 2 rows.*row 1"),
        ([0.0], [math.inf], [0.0], "finite variance"),
        ([0.0], [1.0], [math.nan], "finite targets"),
        (["a"], [1.0], [0.0], "Expected numbers in mean"),
    ],
)
def test_bad_gaussians_are_refused(mean: Any, variance: Any, targets: Any, message: str) -> None:
    for function in (regression.regression_metrics, regression.calibration_curve):
        with pytest.raises(ValueError, match=message):
            function(mean, variance, targets)
