"""Prediction sets: equal to brute force and to MAPIE, exact coverage over many calibrations, edges."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from mapie.classification import SplitConformalClassifier
from mapie.regression import ConformalizedQuantileRegressor, SplitConformalRegressor
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

from debiased_laplace import conformal
from debiased_laplace.conformal import APS, CQR, RAPS, THR, AbsoluteResidual, NormalisedResidual, calibrate
from debiased_laplace.conformal.ranks import needed_rank
from tests.documented import DOCS, code_of, executed

EVERY_CLASS_SCORE = [THR(), APS(), APS(randomised=False), RAPS(), RAPS(randomised=False, penalty=0.2, free=2)]


def drawn(n: int, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a predictor that is not calibrated, and labels."""
    rng = np.random.default_rng(seed)
    true = rng.dirichlet(np.full(classes, 0.5), size=n)
    labels = np.array([rng.choice(classes, p=row) for row in true])
    sharp = true**2 + 1e-3
    return sharp / sharp.sum(1, keepdims=True), labels


def numbers(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, standard deviations and targets with tails and a bias."""
    rng = np.random.default_rng(seed)
    mean, deviation = rng.normal(size=n), rng.uniform(0.2, 2.0, size=n)
    return mean, deviation, mean + 0.3 + deviation * rng.standard_t(3, size=n)


# -- by hand ---------------------------------------------------------------------------------------


def by_hand(score, p: np.ndarray, y: int, u: float) -> float:
    """The definitions, class by class."""
    if isinstance(score, THR):
        return 1 - p[y]
    before = [c for c in range(len(p)) if p[c] > p[y] or (p[c] == p[y] and c < y)]
    value = sum(p[c] for c in before) + (u if score.randomised else 1.0) * p[y]
    if isinstance(score, RAPS):
        value += score.penalty * max(0, len(before) + 1 - score.free)
    return value


@pytest.mark.parametrize("score", EVERY_CLASS_SCORE, ids=repr)
def test_class_scores_and_sets_are_the_definitions(score):
    (held, labels), (new, _), rng = drawn(60), drawn(25, seed=1), np.random.default_rng(3)
    u = rng.random(60)
    expected = [by_hand(score, p, y, v) for p, y, v in zip(held, labels, u, strict=True)]
    np.testing.assert_allclose(score.of(held, labels, np.random.default_rng(3)), expected, atol=1e-12)
    threshold = sorted(expected)[math.ceil(61 * 0.9) - 1]
    sets = score.sets(new, threshold, np.random.default_rng(4))
    u = np.random.default_rng(4).random(25)
    by_class = [[by_hand(score, p, c, v) <= threshold for c in range(5)] for p, v in zip(new, u, strict=True)]
    assert sets.tolist() == by_class
    assert calibrate(score, held, labels, seed=7).n == 60


def test_a_score_is_that_of_the_class_in_the_order_of_the_input():
    p = np.array([[0.2, 0.5, 0.3]])
    assert APS(randomised=False).of_classes(p, np.ones(1)).tolist() == [[pytest.approx(1.0), 0.5, pytest.approx(0.8)]]
    assert RAPS(randomised=False, penalty=0.1, free=1).of_classes(p, np.ones(1))[0] == pytest.approx([1.2, 0.5, 0.9])


def test_ties_are_in_or_out_together():
    held = np.full((9, 2), 0.5)
    sets = calibrate(THR(), held, np.zeros(9, int), alpha=0.1)
    assert sets.threshold == 0.5
    assert sets([[0.5, 0.5], [0.6, 0.4]]).tolist() == [[True, True], [True, False]]
    # Equal probabilities are ordered as the classes are, when they calibrate and when they are judged.
    assert APS(randomised=False).of_classes(held[:1], np.ones(1)).tolist() == [[0.5, 1.0]]


def test_regression_scores_and_intervals_are_the_definitions():
    mean, deviation, y = numbers(50)
    k, new = math.ceil(51 * 0.9), numbers(8, seed=1)
    for score, value in (
        (AbsoluteResidual(), np.abs(y - mean)), (NormalisedResidual(), np.abs(y - mean) / deviation)
    ):  # fmt: skip
        sets, q = calibrate(score, (mean, deviation), y), np.sort(value)[k - 1]
        assert sets.threshold == pytest.approx(q, abs=1e-12)
        half = q if isinstance(score, AbsoluteResidual) else q * new[1]
        lower, upper = sets(new[:2])
        np.testing.assert_allclose([lower, upper], [new[0] - half, new[0] + half], atol=1e-12)
    lower, upper = mean - deviation, mean + deviation
    q = np.sort(np.maximum(lower - y, y - upper))[k - 1]
    bounds = calibrate(CQR(), (lower, upper), y)((new[0] - new[1], new[0] + new[1]))
    np.testing.assert_allclose(bounds, [new[0] - new[1] - q, new[0] + new[1] + q], atol=1e-12)


def test_several_outputs_hold_together():
    rng = np.random.default_rng(0)
    mean, deviation, y = rng.normal(size=(40, 3)), rng.uniform(1, 2, (40, 3)), rng.normal(size=(40, 3))
    scores = NormalisedResidual().of((mean, deviation), y, rng)
    np.testing.assert_allclose(scores, (np.abs(y - mean) / deviation).max(1))
    lower, upper = calibrate(NormalisedResidual(), (mean, deviation), y, alpha=0.25)((mean, deviation))
    assert lower.shape == upper.shape == (40, 3)
    assert ((lower <= y) & (y <= upper)).all(1).sum() == math.ceil(41 * 0.75)


def test_tensors_of_a_posterior_are_taken():
    held, labels = drawn(30)
    sets = calibrate(APS(), torch.from_numpy(held), torch.from_numpy(labels))
    assert np.array_equal(sets(torch.from_numpy(held)), calibrate(APS(), held, labels)(held))


# -- another library -------------------------------------------------------------------------------


class Known(ClassifierMixin, BaseEstimator):
    """Predictions are the inputs."""

    def __init__(self, classes=5):
        self.classes, self.classes_, self.n_features_in_ = classes, np.arange(classes), classes

    def fit(self, X, y):
        return self

    def predict_proba(self, X):
        return X

    def predict(self, X):
        return X.argmax(1)

    def __sklearn_is_fitted__(self):
        return True


class Column(RegressorMixin, BaseEstimator):
    """The prediction is a column of the inputs."""

    def __init__(self, column=0):
        self.column, self.n_features_in_ = column, 3

    def fit(self, X, y):
        return self

    def predict(self, X):
        return X[:, self.column]

    def __sklearn_is_fitted__(self):
        return True


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_sets_of_classes_are_those_of_mapie(alpha):
    (held, labels), (new, _) = drawn(153), drawn(70, seed=1)
    theirs = SplitConformalClassifier(Known(), confidence_level=1 - alpha, conformity_score="lac", prefit=True)
    _, sets = theirs.conformalize(held, labels).predict_set(new)
    assert np.array_equal(calibrate(THR(), held, labels, alpha)(new), sets[:, :, 0])


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_intervals_are_those_of_mapie(alpha):
    mean, deviation, y = numbers(153)
    held = np.stack([mean - deviation, mean + deviation, mean], 1)
    new_mean, new_deviation, _ = numbers(40, seed=1)
    new = np.stack([new_mean - new_deviation, new_mean + new_deviation, new_mean], 1)
    theirs = SplitConformalRegressor(Column(2), confidence_level=1 - alpha, prefit=True).conformalize(held, y)
    expected = theirs.predict_interval(new)[1][:, :, 0].T
    found = calibrate(AbsoluteResidual(), (mean, deviation), y, alpha)((new_mean, new_deviation))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantiles = ConformalizedQuantileRegressor(
            [Column(0), Column(1), Column(2)], confidence_level=1 - alpha, prefit=True
        ).conformalize(held, y)
        expected = quantiles.predict_interval(new, symmetric_correction=True)[1][:, :, 0].T
    found = calibrate(CQR(), (held[:, 0], held[:, 1]), y, alpha)((new[:, 0], new[:, 1]))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


# -- the guarantee ---------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [THR(), APS(), RAPS()], ids=repr)
def test_coverage_of_a_calibration_is_beta_distributed(score):
    """Given the calibration data: Beta(r, n + 1 - r) without ties; so of the hits among many new data."""
    n, new, trials, r = 49, 4000, 300, 45
    p, y = drawn(trials * n + new, seed=5)
    judged_p, judged_y, each = p[-new:], y[-new:], np.arange(new)
    coverages = []
    for trial in range(trials):
        part = slice(trial * n, (trial + 1) * n)
        sets = calibrate(score, p[part], y[part], alpha=0.1, seed=trial)
        coverages.append(sets(judged_p, seed=trial)[each, judged_y].mean())
    # The same new data judge all: their own error is added to the allowance.
    assert stats.kstest(coverages, stats.beta(r, n + 1 - r).cdf).statistic < 1.63 / math.sqrt(trials) + 0.05
    error = math.sqrt(stats.beta(r, n + 1 - r).var() / trials + 0.9 * 0.1 / new)
    assert abs(np.mean(coverages) - r / (n + 1)) < 4 * error


@pytest.mark.parametrize("score", [AbsoluteResidual(), NormalisedResidual(), CQR()], ids=repr)
def test_intervals_hold_as_often_as_they_say(score):
    n, trials, hits = 19, 4000, 0
    mean, deviation, y = numbers(trials * (n + 1), seed=2)
    pair = (mean - deviation, mean + deviation) if isinstance(score, CQR) else (mean, deviation)
    for trial in range(trials):
        held, new = slice(trial * (n + 1) + 1, (trial + 1) * (n + 1)), slice(trial * (n + 1), trial * (n + 1) + 1)
        lower, upper = calibrate(score, tuple(part[held] for part in pair), y[held])(tuple(part[new] for part in pair))
        hits += int((lower[0] <= y[new][0]) & (y[new][0] <= upper[0]))
    assert abs(hits / trials - 18 / 20) < 4 * math.sqrt(0.09 / trials)


# -- batches ---------------------------------------------------------------------------------------


def orders(n: int, m: int):
    """All equally likely places of m new scores among n + m."""
    return itertools.combinations(range(n + m), m)


@pytest.mark.parametrize(("n", "m", "k"), [(7, 3, 3), (7, 3, 2), (9, 4, 1), (8, 1, 1), (5, 5, 4)])
@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5])
def test_ranks_are_those_of_all_orders(n, m, k, alpha):
    shares = []
    for r in range(1, n + 1):
        hold = 0
        for places in orders(n, m):
            held = [place for place in range(n + m) if place not in places]
            hold += sum(place < held[r - 1] for place in places) >= k
        shares.append(hold / math.comb(n + m, m))
    expected = next((r for r, share in enumerate(shares, 1) if share >= 1 - alpha - 1e-12), n + 1)
    assert needed_rank(n, alpha, m, k) == expected


@pytest.mark.parametrize(("n", "m", "k"), [(99, 10, 10), (500, 20, 15), (40, 100, 90)])
def test_ranks_are_quantiles_of_the_beta_binomial(n, m, k):
    r = needed_rank(n, 0.1, m, k)
    assert stats.betabinom.sf(k - 1, m, r, n + 1 - r) >= 0.9 > stats.betabinom.sf(k - 1, m, r - 1, n + 2 - r)


def test_one_datum_is_a_batch_of_one():
    for n, alpha in itertools.product((1, 8, 9, 19, 99, 1000), (0.01, 0.05, 0.1, 1 / 3)):
        whole = math.ceil(round((n + 1) * (1 - alpha), 9))
        assert needed_rank(n, alpha) == min(whole, n + 1)


def test_a_batch_holds_together():
    rng, n, m, trials = np.random.default_rng(0), 60, 5, 4000
    held, new = rng.normal(size=(trials, n)), rng.normal(size=(trials, m))
    for at_least in (5, 4, 3):
        bounds = np.array([conformal.threshold(row, 0.2, batch=m, at_least=at_least) for row in held])
        share = ((new <= bounds[:, None]).sum(1) >= at_least).mean()
        r = needed_rank(n, 0.2, m, at_least)
        expected = stats.betabinom.sf(at_least - 1, m, r, n + 1 - r)
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / trials)
        assert expected >= 0.8


def test_the_bound_of_a_mean_is_that_of_all_ranks():
    rng, n, m = np.random.default_rng(1), 6, 3
    for alpha in (0.1, 0.3, 0.6) * 5:
        scores = np.sort(rng.random(n))
        values = np.append(scores, 1.0)
        ranks = list(itertools.combinations_with_replacement(range(1, n + 2), m))
        sums = sorted(map(sum, ranks))
        quantile = sums[math.ceil(len(sums) * (1 - alpha) - 1e-9) - 1]
        expected = max(np.mean([values[j - 1] for j in one]) for one in ranks if sum(one) <= quantile)
        found = conformal.mean_bound(rng.permutation(scores), m, alpha, largest=1.0)
        assert found == pytest.approx(expected, abs=1e-12)


def test_a_mean_is_below_its_bound_often_enough():
    rng, n, m, trials = np.random.default_rng(2), 40, 8, 500
    held, new = rng.beta(1, 4, size=(trials, n)), rng.beta(1, 4, size=(trials, m))
    bounds = np.array([conformal.mean_bound(row, m, 0.2, largest=1.0) for row in held])
    assert (new.mean(1) <= bounds).mean() > 0.8 - 4 * math.sqrt(0.16 / trials)
    assert bounds.mean() < 0.9  # it says something
    assert conformal.mean_bound(held[0], 1, 0.2) == conformal.threshold(held[0], 0.2)
    assert conformal.mean_bound(held[0], 2, 0.2) == math.inf
    assert math.isfinite(conformal.mean_bound(rng.random(400), 120, largest=1.0))  # so many orders fit no number


# -- the page --------------------------------------------------------------------------------------


def test_the_page_about_sets_runs_as_it_stands():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator)
    y = torch.multinomial((2 * x[:, :3]).softmax(1), 1, generator=generator).flatten()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    assert len(code_of(DOCS / "sets.md")) == 1
    names = executed(
        DOCS / "sets.md", model=model, train_loader=[(x[:200], y[:200])], val_loader=[(x[200:250], y[200:250])],
        held_inputs=x[250:300], held_labels=y[250:300], new_inputs=x[300:],
    )  # fmt: skip
    assert names["in_set"].shape == (100, 3)
    assert names["sets"].n == 50
    assert names["in_set"][np.arange(100), y[300:].numpy()].mean() > 0.75


# -- edges -----------------------------------------------------------------------------------------


def test_too_few_data_leave_everything_in():
    p, y = drawn(8)
    for score in EVERY_CLASS_SCORE:
        sets = calibrate(score, p, y, alpha=0.1)
        assert sets.threshold == math.inf
        assert sets(p).all()
    mean, deviation, y = numbers(8)
    lower, upper = calibrate(NormalisedResidual(), (mean, deviation), y, alpha=0.1)((mean, deviation))
    assert (lower == -np.inf).all() and (upper == np.inf).all()
    assert calibrate(THR(), *drawn(9), alpha=0.1).threshold < math.inf


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_alpha_is_between_zero_and_one(alpha):
    with pytest.raises(ValueError, match=r"alpha"):
        calibrate(THR(), *drawn(20), alpha)


def test_what_is_wrong_is_named():
    p, y = drawn(20)
    with pytest.raises(TypeError, match=r"Expected a score such as THR\(\)"):
        calibrate("aps", p, y)
    with pytest.raises(ValueError, match="Expected finite probabilities, got NaN"):
        calibrate(APS(), np.where(p == p.max(), np.nan, p), y)
    with pytest.raises(ValueError, match="this looks like logits"):
        calibrate(APS(), 3 * p, y)
    with pytest.raises(ValueError, match="Expected integer targets of shape"):
        calibrate(APS(), p, y[:-1])
    with pytest.raises(ValueError, match="Expected class indices from 0 to 4"):
        calibrate(APS(), p, y + 5)
    with pytest.raises(ValueError, match="Expected non-negative probabilities whose rows sum to one"):
        calibrate(APS(), p, y)(2 * p)
    mean, deviation, targets = numbers(20)
    with pytest.raises(TypeError, match=r"Expected a pair \(mean, standard deviation\)"):
        calibrate(NormalisedResidual(), mean, targets)
    with pytest.raises(ValueError, match="Expected positive standard deviations"):
        calibrate(NormalisedResidual(), (mean, 0 * deviation), targets)
    with pytest.raises(ValueError, match="nothing is broadcast"):
        calibrate(NormalisedResidual(), (mean, deviation), targets[:, None])
    with pytest.raises(ValueError, match="Expected finite targets"):
        calibrate(AbsoluteResidual(), (mean, deviation), targets * np.nan)
    with pytest.raises(ValueError, match="got crossed ones for 20 numbers"):
        calibrate(CQR(), (mean + deviation, mean), targets)
    with pytest.raises(ValueError, match="at_least of at least 1 and at most 3"):
        calibrate(THR(), p, y, batch=3, at_least=4)
    with pytest.raises(ValueError, match="batch of at least 1"):
        conformal.threshold([1.0], batch=0)
    with pytest.raises(ValueError, match="Expected finite scores, got NaN"):
        conformal.threshold([1.0, math.nan])
    with pytest.raises(ValueError, match=r"Expected scores \[n\] of at least one datum"):
        conformal.threshold([])
    with pytest.raises(ValueError, match=r"Expected scores up to largest=0\.5"):
        conformal.mean_bound([0.6], 2, largest=0.5)
    with pytest.raises(ValueError, match="penalty of at least zero"):
        RAPS(penalty=-1.0)
    with pytest.raises(ValueError, match="free of at least 0"):
        RAPS(free=-1)


def test_a_randomised_set_is_that_of_its_seed_and_calibration_draws_apart():
    p, y = drawn(30)
    sets = calibrate(APS(), p, y)
    assert np.array_equal(sets(p, seed=3), sets(p, seed=3))
    assert not np.array_equal(sets(p, seed=3), sets(p, seed=4))
    held = APS().of(p, y, np.random.default_rng([0, 0]))
    assert sets.threshold == np.sort(held)[math.ceil(31 * 0.9) - 1]
    assert not np.array_equal(sets(p), APS().sets(p, sets.threshold, np.random.default_rng([0, 0])))
