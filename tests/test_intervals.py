"""Intervals at their limits: one datum and upwards, one class, ties, copies, zeros, scales; and false verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, skew
from scipy.stats import t as student

from debiased_laplace.evaluation import evaluate
from debiased_laplace.evaluation.report.verdicts import verdict
from debiased_laplace.evaluation.scores import bootstrap, intervals, weighted
from debiased_laplace.evaluation.scores.replicates import Replicates
from tests.tolerances import EXACT, MONTE_CARLO_Z

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
QUICK = settings(deadline=None, max_examples=40, derandomize=True)


def one_hot(targets: Any, classes: int, sharpness: float = 3.0) -> np.ndarray:
    """Probabilities with their maximum at the target."""
    logits = sharpness * np.eye(classes)[np.asarray(targets)]
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


# -- formulas --------------------------------------------------------------------------------------


@QUICK
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.99))
def test_a_proportion_is_exact(counts: tuple[int, int], confidence: float) -> None:
    result = binomtest(*counts).proportion_ci(confidence, "exact")
    assert intervals.proportion(*counts, confidence) == pytest.approx((result.low, result.high), rel=EXACT, abs=EXACT)
    if counts[0] == counts[1]:
        share = intervals.unseen_share(counts[1], confidence)
        assert intervals.proportion(*counts, confidence) == pytest.approx((1 - share, 1), rel=EXACT)


def score_statistic(first_only: int, second_only: int, n: int, delta: float) -> float:
    """Its square, with the largest likelihood at the difference found by trial, not by Tango's formula."""
    largest = min((1 - delta) / 2, 1 - delta)
    trial = np.linspace(max(0.0, -delta), largest, 400_001)[1:-1]
    both = 1 - 2 * trial - delta
    with np.errstate(divide="ignore", invalid="ignore"):
        likelihood = (
            (first_only * np.log(trial + delta) if first_only else 0)
            + (second_only * np.log(trial) if second_only else 0)
            + (n - first_only - second_only) * np.log(np.maximum(both, 1e-300))
        )
    second = trial[np.nanargmax(likelihood)]
    return (first_only - second_only - n * delta) ** 2 / (n * (2 * second + delta * (1 - delta)))


@pytest.mark.parametrize("counts", [(9, 3, 40), (3, 9, 40), (5, 0, 12), (1, 1, 100), (30, 20, 60)])
def test_paired_proportions_are_where_the_score_statistic_is_at_its_quantile(counts: tuple[int, int, int]) -> None:
    for bound in intervals.paired_proportions(*counts, 0.95):
        assert score_statistic(*counts, bound) == pytest.approx(1.959963984540054**2, rel=2e-3)  # by the trial's steps


@QUICK
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.integers(0, n), st.just(n))))
@example((0, 0, 1))
@example((0, 1, 1))
@example((1, 0, 1))
@example((300, 0, 300))
@example((0, 300, 300))
def test_paired_proportions_say_what_the_test_of_mcnemar_says(counts: tuple[int, int, int]) -> None:
    first, second, n = counts
    first = min(first, n - second)
    low, high = intervals.paired_proportions(first, second, n, 0.95)
    assert -1 <= low <= (first - second) / n <= high <= 1
    assert high - low > 0
    assert intervals.paired_proportions(second, first, n, 0.95) == pytest.approx((-high, -low), abs=1e-11)
    if first == second == 0:
        assert high == pytest.approx(3.841458820694124 / (n + 3.841458820694124), rel=EXACT)
    rejected = abs(first - second) > 1.959963984540054 * math.sqrt(first + second)
    assert (low > 0 or high < 0) == rejected


@QUICK
@given(
    st.lists(st.floats(-1, 1).map(lambda value: round(value, 6)), min_size=2, max_size=30),
    st.sampled_from([1e-30, 1e-9, 1.0, 1e30]),
    st.sampled_from([0.5, 0.95]),
)
def test_a_mean(values: list[float], scale: float, confidence: float) -> None:
    array = np.array(values)
    low, high = intervals.mean(scale * array, confidence)
    middle, deviation, n = array.mean(), array.std(ddof=1), len(array)
    room = 1e-9 * scale * (abs(middle) + deviation)
    if np.ptp(array) <= 1e-9 * np.abs(array).max():
        assert low - room <= scale * middle <= high + room
        return
    half = student.ppf((1 + confidence) / 2, n - 1) * deviation / math.sqrt(n)
    assert low <= scale * (middle - half) + room
    assert high >= scale * (middle + half) - room
    gamma, root = skew(array), math.sqrt(n)

    def corrected(mu: float) -> float:  # Hall's statistic, forwards
        plain = (middle - mu) * root / deviation
        return plain + gamma * plain**2 / (3 * root) + gamma**2 * plain**3 / (27 * n) + gamma / (6 * root)

    quantile, room = student.ppf((1 + confidence) / 2, n - 1), 1e-6 * (1 + abs(gamma)) ** 3 * n
    ends = [corrected(low / scale), corrected(high / scale)]
    assert ends[0] >= quantile - room or low == pytest.approx(scale * (middle - half))
    assert ends[1] <= -quantile + room or high == pytest.approx(scale * (middle + half))


def test_expanded_percentiles_of_a_normal_sample_are_students_interval() -> None:
    """With the exact distribution of means of resamples nearly normal, of standard deviation s sqrt((n - 1) / n^2)."""
    n, b = 12, 200_001
    sample = np.random.default_rng(0).standard_normal(n)
    levels = (np.arange(b) + 0.5) / b
    from scipy.stats import norm

    replicates = sample.mean() + sample.std() / math.sqrt(n) * norm.ppf(levels)
    tail = intervals.expanded(0.95, n)
    half = student.ppf(0.975, n - 1) * sample.std(ddof=1) / math.sqrt(n)
    assert np.quantile(replicates, [tail, 1 - tail]) == pytest.approx(
        [sample.mean() - half, sample.mean() + half], rel=1e-3
    )


# -- whatever the data -----------------------------------------------------------------------------


@st.composite
def predictions(draw: st.DrawFn) -> tuple[list[np.ndarray], np.ndarray]:
    """Two tables of probabilities and targets: copies, ties, zeros, one class, all right, all wrong, any sharpness."""
    n, classes = draw(st.integers(1, 25)), draw(st.integers(2, 4))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    tables = []
    for _ in range(2):
        logits = random.standard_normal((n, classes)) * draw(st.sampled_from([1e-30, 1e-3, 1.0, 8.0, 300.0, 1e30]))
        logits = logits[random.integers(n, size=n)] if draw(st.booleans()) else logits
        values = np.exp(logits - logits.max(1, keepdims=True))
        tables.append(values / values.sum(1, keepdims=True))
    kind = draw(st.sampled_from(["random", "right", "wrong", "one class"]))
    targets = {
        "random": random.integers(classes, size=n), "right": tables[0].argmax(1),
        "wrong": (tables[0].argmax(1) + 1) % classes, "one class": np.zeros(n, dtype=int),
    }[kind]  # fmt: skip
    return tables, targets


def check_alone(name: str, score: Replicates, exact: Callable[[str], bool] = lambda name: False) -> None:
    low, high = score.interval()
    assert not math.isnan(low), name
    assert not math.isnan(high), name
    assert score.bounds[0] <= low <= high <= score.bounds[1], name
    assert score.standard_error >= 0, name
    if score.is_finite and not exact(name):
        assert high > low, name
        assert score.standard_error > 0, name


def check_difference(name: str, score: Replicates, n: int) -> None:
    low, high = score.interval()
    assert low <= high, name
    if n < intervals.MIN_DATA:
        assert (low, high) == score.bounds, name
        assert verdict(name, [score.value, score.standard_error, low, high]) == "no difference shown"
    elif not math.isnan(score.value):
        slack = 1e-9 * max(1.0, abs(score.value)) if math.isfinite(score.value) else 0.0
        assert low - slack <= score.value <= high + slack or score.kind == "calibration", name


@QUICK
@given(predictions())
def test_classification_whatever_the_data(drawn: tuple[list[np.ndarray], np.ndarray]) -> None:
    tables, targets = drawn
    n = len(targets)
    weights = weighted.resample_weights(n, 50)
    first, second = (bootstrap.classification_replicates(table, targets, weights) for table in tables)
    uniform = [np.ptp(table) < 1e-12 for table in tables]  # what these lose does not depend on the target
    for scores, flat in zip((first, second), uniform, strict=True):
        for name, score in scores.items():
            check_alone(name, score, lambda name, flat=flat: flat and name.partition("_")[0] in ("nll", "brier"))
    for name in first:
        check_difference(name, first[name] - second[name], n)
        twin = first[name] - first[name]
        if n >= intervals.MIN_DATA and first[name].is_finite:
            assert twin.interval()[0] <= 0 <= twin.interval()[1]


@QUICK
@given(
    st.integers(1, 25), st.integers(1, 3), st.sampled_from([1e-30, 1e-8, 1.0, 1e8, 1e30]), st.integers(0, 1000),
    st.sampled_from(["errors", "none", "equal"]), st.booleans(),
)  # fmt: skip
def test_regression_whatever_the_data(
    n: int, outputs: int, scale: float, seed: int, kind: str, one_variance: bool
) -> None:
    random = np.random.default_rng(seed)
    mean = random.standard_normal((n, outputs))
    errors = {"errors": random.standard_normal((n, outputs)), "none": 0.0, "equal": 0.5}[kind] * np.ones((n, outputs))
    mean = np.zeros_like(mean) if kind == "equal" else mean  # so that differences are equal to the last digit
    variance = np.ones((n, outputs)) if one_variance else np.exp(random.standard_normal((n, outputs)))
    weights = weighted.resample_weights(n, 50)
    scores = bootstrap.regression_replicates(scale * mean, scale**2 * variance, scale * (mean + errors), weights)
    other = bootstrap.regression_replicates(scale * (mean + 0.1), scale**2 * 2 * variance, scale * mean, weights)
    for name, score in scores.items():
        check_alone(name, score, lambda name: name.startswith("width"))
        check_difference(name, score - other[name], n)
        if kind == "errors" and n > 1 and name != "nll":  # the unit of the targets is one of scores
            unit = scale if name in ("rmse", "crps") or name.startswith("width") else 1.0
            plain = bootstrap.regression_replicates(mean, variance, mean + errors, weights)[name]
            assert score.interval() == pytest.approx([unit * bound for bound in plain.interval()], rel=1e-6, abs=0)


@QUICK
@given(
    st.integers(1, 25), st.integers(1, 25), st.integers(0, 1000), st.sampled_from([0, 1, 9]),
    st.sampled_from([-40.0, 0.0, 40.0]), st.sampled_from([1e-30, 1.0, 1e30]),
)  # fmt: skip
@example(20, 1, 0, 9, 40.0, 1.0)  # one out-of-distribution datum
@example(1, 20, 0, 9, 0.0, 1.0)
@example(12, 12, 0, 0, 0.0, 1e-30)  # few different scores
def test_detection_whatever_the_data(n: int, m: int, seed: int, digits: int, shift: float, scale: float) -> None:
    random = np.random.default_rng(seed)
    weights = weighted.resample_weights(n, 50), weighted.resample_weights(m, 50, 1)

    def result(noise: float) -> dict[str, Replicates]:
        inside, outside = random.standard_normal(n), shift + random.standard_normal(m)
        return bootstrap.detection_replicates(
            scale * (inside + noise).round(digits), scale * (outside + noise).round(digits), *weights
        )

    first, second = result(0.0), result(0.1)
    for name, score in first.items():
        check_alone(name, score)
        check_difference(name, score - second[name], min(n, m))


# -- at the limits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 20, 540])
def test_all_right(n: int) -> None:
    """The accuracy's interval is the exact one; other scores reach as far as mistakes that could have been missed."""
    targets = np.arange(n) % 3
    scores = bootstrap.classification_replicates(one_hot(targets, 3), targets, weighted.resample_weights(n, 100))
    share = intervals.unseen_share(n, 0.95)
    assert scores["accuracy"].interval() == pytest.approx((1 - share, 1), rel=EXACT)
    assert scores["accuracy"].standard_error == pytest.approx(share / (2 * 1.959963984540054), rel=EXACT)
    if n == 1:
        assert scores["nll"].interval() == (0, math.inf)
        assert scores["brier"].interval() == (0, 2)
        assert scores["ece"].interval() == scores["aurc"].interval() == (0, 1)
        return
    confidence = math.exp(3) / (math.exp(3) + 2)
    right, wrong = -math.log(confidence), -math.log((1 - confidence) / 2)
    assert scores["nll"].interval() == pytest.approx((right, (1 - share) * right + share * wrong), rel=EXACT)
    assert scores["aurc"].interval() == pytest.approx((0, share), rel=EXACT)
    gaps = sorted(abs(confidence - accuracy) for accuracy in (1 - share, 1.0))
    assert scores["ece"].interval() == pytest.approx(gaps, rel=1e-6)


def test_predictors_that_are_all_right_are_told_apart_only_if_mistakes_would_not_turn_the_tables() -> None:
    """The sharper one has the smaller loss on right predictions, and the larger on those that were not seen."""
    words = []
    for n in (20, 2000):
        targets = np.arange(n) % 2
        sharp, flat = (torch.from_numpy(one_hot(targets, 2, sharpness)) for sharpness in (4.0, 2.0))
        predictors = {"MAP": lambda p: p, "flat": lambda p, flat=flat: flat[: len(p)]}
        result = evaluate(predictors, [(sharp, torch.from_numpy(targets))], n_resamples=100)
        differences = result["test"]["differences"]["MAP"]["flat"]
        words.append({score: verdict(score, cell) for score, cell in differences.items()})
        assert differences["accuracy"][2] == pytest.approx(-3.841458820694124 / (n + 3.841458820694124))
    assert words[0]["nll"] == words[0]["brier"] == words[0]["ece"] == "no difference shown"
    assert words[1]["nll"] == words[1]["brier"] == words[1]["ece"] == "worse"
    assert words[0]["aurc"] == words[1]["aurc"] == "no difference shown"


def test_a_perfect_separation_is_as_certain_as_its_pairs() -> None:
    weights = weighted.resample_weights(100, 60), weighted.resample_weights(20, 60, 1)
    scores = bootstrap.detection_replicates(np.arange(100.0), np.arange(100.0, 120.0), *weights)
    share = intervals.unseen_share(20, 0.95)  # twenty disjoint pairs are twenty independent trials
    assert scores["auroc"].interval() == pytest.approx((1 - share, 1), rel=EXACT)
    assert scores["fpr95"].interval() == (0, 1)  # below the smallest of twenty lie more than 5 % with 36 % probability
    many = weighted.resample_weights(100, 60), weighted.resample_weights(100, 60, 1)
    rate = bootstrap.detection_replicates(np.arange(100.0), np.arange(100.0, 200.0), *many)["fpr95"]
    assert rate.interval() == pytest.approx((0, intervals.unseen_share(100, 0.95)), rel=EXACT)
    reverse = bootstrap.detection_replicates(np.arange(100.0, 200.0), np.arange(100.0), *many)
    assert reverse["auroc"].interval() == pytest.approx((0, intervals.unseen_share(100, 0.95)), rel=EXACT)


def test_the_same_predictions_do_not_differ_and_the_same_errors_have_one_rmse() -> None:
    inputs, errors = torch.randn(2, 30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = {"MAP": lambda x: (x, 0 * x + 1), "twin": lambda x: (x, 0 * x + 1), "wide": lambda x: (x, 0 * x + 2)}
    result = evaluate(same, [(inputs, inputs + errors)], n_resamples=100)["test"]["differences"]["MAP"]
    assert all(cell == [0, 0, 0, 0] for cell in result["twin"].values())
    assert result["wide"]["rmse"] == [0, 0, 0, 0]
    assert result["wide"]["nll"][2] < result["wide"]["nll"][3]


# -- two equal predictors --------------------------------------------------------------------------


def share_of_verdicts(differences: np.ndarray, interval: Callable[[np.ndarray], tuple[float, float]]) -> float:
    bounds = np.array([interval(row) for row in differences])
    return float(((bounds[:, 0] > 0) | (bounds[:, 1] < 0)).mean())


LAWS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda random, shape: random.standard_normal(shape),
    "long tails": lambda random, shape: random.standard_t(3, shape),
    "skewed": lambda random, shape: random.exponential(size=shape) - 1,
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [10, 40])
def test_two_equal_predictors_are_told_apart_in_at_most_seven_per_cent(law: str, n: int) -> None:
    """Of 4,000 trials: the standard error of 7 % is 0.4 %. Percentiles do so in 9 to 15 % of those with n = 10."""
    trials = 4000
    differences = LAWS[law](np.random.default_rng(0), (trials, n))
    rate = share_of_verdicts(differences, lambda row: intervals.mean(row, 0.95))
    error = math.sqrt(0.07 * 0.93 / trials)
    assert 0.02 < rate < 0.07 + MONTE_CARLO_Z * error
    if n == 10:
        weights = weighted.resample_weights(n, 400)
        percentiles = share_of_verdicts(differences, lambda row: tuple(np.quantile(weights @ row / n, [0.025, 0.975])))
        assert percentiles > 0.09
