r"""Coverage and size of conformal prediction sets, with resamples of the data that calibrate and of those that judge.

The validation data of an evaluation have tuned its predictors, so that they must not calibrate sets as well. The test
data do: each datum belongs to one of two folds by the toss of a coin, and the sets of a fold are calibrated on the
other one (of shifted data: on the unshifted data of the other one). All data judge, and none calibrates its own set.
Coverage on the test data is close to :math:`1 - \alpha` for every predictor; what tells predictors apart is the size of
the sets, and for whom they hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import sparse
from scipy.special import ndtri

from debiased_laplace._arrays import Array
from debiased_laplace.conformal import APS, CQR, RAPS, THR, AbsoluteResidual, NormalisedResidual
from debiased_laplace.evaluation.scores.intervals import MIN_DATA
from debiased_laplace.evaluation.scores.replicates import Replicates, ScoreKind

#: Share of sets that may miss.
ALPHA = 0.1
CLASS_SCORES = {"THR": THR(), "APS": APS(), "RAPS": RAPS()}
INTERVAL_SCORES = {"plain": AbsoluteResidual(), "normalised": NormalisedResidual(), "CQR": CQR()}
#: Smallest set of every stratum but the first, as in the source of size-stratified coverage.
SIZES = (2, 4, 11, 101)
#: What is measured of each kind of set, and how its interval is made.
MEASURES: dict[str, ScoreKind] = {
    "coverage": "statistic", "size": "statistic", "worst stratum": "calibration", "worst class": "calibration",
}  # fmt: skip
_ROUNDING = 1e-9


@dataclass(frozen=True)
class _Part:
    """One kind of set on some data.

    Attributes:
        score: How badly a label fits.
        true: ``[N]``, scores of the targets.
        labels: Scores of all classes ``[N, C]``; of a regression what the score is made of, each ``[N, C]``.
        strata: ``[N]``, of a regression; sets of classes have theirs by size.
    """

    score: Any
    true: Array
    labels: Any
    strata: Array | None = None

    def of(self, rows: Array) -> _Part:
        """Of some data."""
        if self.strata is None:
            return replace(self, true=self.true[rows], labels=self.labels[rows])
        labels = tuple(values[rows] for values in self.labels)
        return replace(self, true=self.true[rows], labels=labels, strata=self.strata[rows])

    @property
    def n_strata(self) -> int:
        """Number of strata."""
        return len(SIZES) + 1 if self.strata is None else 4

    def sets(self, threshold: float) -> tuple[Array, Array]:
        """Size (number of classes, or mean width over outputs) and stratum of every set."""
        if self.strata is None:
            sizes = np.count_nonzero(self.labels <= threshold, 1)
            return sizes, _strata(self.labels.shape[1])[sizes]
        if np.isinf(threshold):
            return np.full(len(self.true), np.inf), self.strata
        lower, upper = self.score.bounds(*self.labels, threshold)
        return (upper - lower).clip(min=0).mean(1), self.strata


class SetScores:
    """Coverage and size of the sets of one predictor, calibrated on the test data.

    Args:
        fields: ``probabilities`` ``[N, C]``, or ``mean`` and ``variance``, ``[N, C]`` or ``[N]``, of the test data.
        targets: Their class indices ``[N]``, or numbers in the shape of the mean.
        weights: ``[B, N]``, from ``weighted.resample_weights``.
        alpha: Share of sets that may miss.
    """

    def __init__(self, fields: Mapping[str, Array], targets: Array, weights: Array, alpha: float = ALPHA) -> None:
        self.alpha, self._quarters = alpha, None
        if "mean" in fields:
            self._quarters = np.quantile(_gaussian(fields)[1].mean(1), (0.25, 0.5, 0.75))
        folds, _ = _tosses(len(targets))
        weights = np.concatenate([np.ones_like(weights[:1]), weights])
        self._thresholds = {
            kind: [_thresholds(part.true[folds == other], weights[:, folds == other], alpha) for other in (True, False)]
            for kind, part in self._parts(fields, targets)
        }

    def of(self, fields: Mapping[str, Array], targets: Array, weights: Array) -> dict[str, Replicates]:
        """Scores of sets of the test data, or of others, each calibrated on the other fold.

        Args:
            fields: As those that calibrated; of copies of the first test data in their order, or of other data.
            targets: Likewise.
            weights: ``[B, M]``.

        Returns:
            For each kind (``THR``, ``APS``, ``RAPS``; of a regression ``plain``, ``normalised``, ``CQR``), under
            ``"<kind>, coverage"``, the share of sets that hold the target; ``size``, the mean number of classes, or
            width in the unit of the targets; ``worst stratum``, the largest distance of coverage from 1 - alpha in a
            stratum (sets of 0 and 1, 2 and 3, 4 to 10, 11 to 100, and more classes; of a regression quarters of the
            test data by predicted standard deviation); of a classifier ``worst class``, the smallest coverage of a
            class. Strata and classes of fewer than ten data are left out; without any the score is not defined.

        Source: size-stratified coverage of Angelopoulos et al., arXiv 2009.14193, section 4.
        """
        folds, _ = _tosses(len(targets))
        weights = np.concatenate([np.ones_like(weights[:1]), weights])
        result = {}
        for kind, part in self._parts(fields, targets):
            sums = [
                _sums(part.of(folds == fold), targets[folds == fold], weights[:, folds == fold], thresholds)
                for fold, thresholds in zip((False, True), self._thresholds[kind], strict=True)
            ]
            for measure, values in _measures({key: sums[0][key] + sums[1][key] for key in sums[0]}, self.alpha).items():
                bounds = (0.0, np.inf if measure == "size" else 1.0)
                result[f"{kind}, {measure}"] = Replicates(
                    float(values[0]), values[1:], len(targets), MEASURES[measure], bounds=bounds
                )
        return result

    def _parts(self, fields: Mapping[str, Array], targets: Array) -> Iterator[tuple[str, _Part]]:
        """Every kind of set, one after the other: scores of all classes are large."""
        if self._quarters is None:
            uniforms, each = _tosses(len(targets))[1], np.arange(len(targets))
            for kind, score in CLASS_SCORES.items():
                scores = score.of_classes(fields["probabilities"], uniforms)
                yield kind, _Part(score, scores[each, targets], scores)
            return
        mean, deviation = _gaussian(fields)
        half, strata = float(ndtri(1 - self.alpha / 2)) * deviation, np.searchsorted(self._quarters, deviation.mean(1))
        for kind, interval in INTERVAL_SCORES.items():
            pair: tuple[Array, Array] = (mean - half, mean + half) if kind == "CQR" else (mean, deviation)
            yield kind, _Part(interval, interval.of_outputs(*pair, targets.reshape(mean.shape)).max(1), pair, strata)


@lru_cache
def _strata(n_classes: int) -> Array:
    """Of every size up to that of all classes."""
    return np.searchsorted(SIZES, np.arange(n_classes + 1), "right")


@lru_cache(maxsize=4)
def _tosses(n: int) -> tuple[Array, Array]:
    """Fold and random number of every datum: the first data have the same, however many there are."""
    tosses = np.random.default_rng(0).random((n, 2))
    return tosses[:, 0] < 0.5, tosses[:, 1]


def _gaussian(fields: Mapping[str, Array]) -> tuple[Array, Array]:
    mean = fields["mean"].reshape(len(fields["mean"]), -1)
    return mean, np.sqrt(fields["variance"].reshape(mean.shape))


def _thresholds(scores: Array, weights: Array, alpha: float) -> Array:
    """Of every row of weights: the conformal quantile of data that are there so many times."""
    order = np.argsort(scores)
    counts = weights[:, order].cumsum(1, dtype=np.float64)
    totals = counts[:, -1:] if len(scores) else np.zeros((len(weights), 1))
    ranks = np.ceil((totals + 1) * (1 - alpha) - _ROUNDING)
    return np.append(scores[order], np.inf)[(counts < ranks).sum(1)]


def _sums(part: _Part, targets: Array, weights: Array, thresholds: Array) -> dict[str, Array]:
    """Weighted sums over data: ``[B]``, or ``[B, strata]`` and ``[B, C]``."""
    weights, n, n_strata = weights.astype(np.float64), len(targets), part.n_strata
    distinct, which = np.unique(thresholds, return_inverse=True)  # resamples share order statistics
    hits = part.true <= distinct[:, None]  # [K, M]
    width = 2 * n_strata + 1
    sums, starts = np.empty((len(weights), width)), width * np.arange(n)
    for index, of in enumerate(np.split(np.argsort(which, kind="stable"), np.bincount(which).cumsum()[:-1])):
        sizes, strata = part.sets(float(distinct[index]))
        is_finite = part.strata is None or np.isfinite(distinct[index])  # zero times infinity is no number
        table = np.zeros(n * width)
        table[starts + strata + n_strata * hits[index]] = 1
        table[width - 1 :: width] = sizes if is_finite else 0
        sums[of] = weights[of] @ table.reshape(n, width)
        if not is_finite:
            sums[of, -1] = np.inf
    misses, in_strata = sums[:, :n_strata], sums[:, n_strata:-1]
    result = {
        "n": weights.sum(1), "hits": in_strata.sum(1), "size": sums[:, -1], "strata": misses + in_strata,
        "stratum hits": in_strata,
    }  # fmt: skip
    if part.strata is None:
        classes = np.arange(part.labels.shape[1] + 1)
        order = np.lexsort((part.true, targets))  # of every class the first ones are hits
        cumulative = np.concatenate([np.zeros((len(weights), 1)), weights[:, order].cumsum(1)], 1)
        starts = np.searchsorted(targets[order], classes)
        member = sparse.csr_array((np.ones(n), (targets, np.arange(n))), (len(classes) - 1, n))
        ends = starts[:-1] + (member @ hits.T).astype(np.int64).T[which]  # [B, C]
        result["class hits"] = np.take_along_axis(cumulative, ends, 1) - cumulative[:, starts[:-1]]
        result["classes"] = np.diff(cumulative[:, starts], axis=1)
    return result


def _measures(sums: Mapping[str, Array], alpha: float) -> dict[str, Array]:
    """What is shown, ``[B]`` each."""
    result = {"coverage": sums["hits"] / sums["n"], "size": sums["size"] / sums["n"]}
    gaps = np.abs(_shares(sums["stratum hits"], sums["strata"]) - (1 - alpha))
    result["worst stratum"] = _extreme(gaps, largest=True)
    if "classes" in sums:
        result["worst class"] = _extreme(_shares(sums["class hits"], sums["classes"]), largest=False)
    return result


def _shares(hits: Array, counts: Array) -> Array:
    return np.where(counts >= MIN_DATA, hits / np.maximum(counts, 1), np.nan)


def _extreme(values: Array, *, largest: bool) -> Array:
    """Over the last axis, of those that are defined."""
    sign = 1 if largest else -1
    extreme = np.where(np.isnan(values), -np.inf, sign * values).max(-1)
    return np.where(np.isinf(extreme), np.nan, sign * extreme)
