r"""Bootstrap intervals of every score, from resampling weights instead of resampled data.

A resample of N data with replacement is the same as weights :math:`w \in \mathbb{N}^N` that say how often each
datum was drawn. ``weights`` is ``[B, N]``, one row for each of B resamples, and every score is a function of
weighted sums: scores that are means over data are one matrix product, binned ones a sparse one, and those
that need an order sort the data once for all resamples. Rows of ``weights`` are worked off in blocks
``[N, resamples]`` of bounded size.

Use the *same* weights for all predictors of the same data: the differences of their replicates are then
paired (:meth:`Replicates.__sub__`). Source: Efron and Tibshirani 1993, chapters 6 and 13.

Calibration errors (those of regression too) are sums of absolute values, so that noise makes them too large,
and resampling adds the same noise once more: near perfect calibration their percentile intervals lie too
high and can miss the value of the data. In a difference this cancels as far as both predictors share it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from debiased_laplace.evaluation import metrics, regression
from debiased_laplace.evaluation.metrics import N_BINS, Array

#: Entries of a block of resampling weights (12 MB); about eight arrays of that size live at once.
BLOCK_ENTRIES = 1_500_000


@dataclass(frozen=True, eq=False)
class Replicates:
    r"""A score of the data at hand, and of resamples of them.

    Attributes:
        value: The score of the data.
        replicates: ``[B]``, the scores of B resamples.

    Example:
        >>> first, second = Replicates(0.5, np.array([0.25, 0.5, 0.75])), Replicates(0.25, np.array([0.0, 0.25, 0.5]))
        >>> first.interval(0.5), (first - second).interval(0.5)
        ((0.375, 0.625), (0.25, 0.25))
    """

    value: float
    replicates: Array

    @property
    def standard_error(self) -> float:
        """Standard deviation of the replicates (over B - 1); infinite if one of them is not finite.

        Raises:
            ValueError: For fewer than two resamples.
        """
        if len(self.replicates) < 2:
            raise ValueError(f"Expected at least two resamples for a standard error, got {len(self.replicates)}.")
        return float(self.replicates.std(ddof=1)) if np.isfinite(self.replicates).all() else float("inf")

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Percentile interval, the central ``confidence`` of the replicates.

        Between two replicates it is interpolated linearly. A bound may be infinite. Replicates that are not defined
        (an infinite score minus an infinite one) could be anything, and count as minus infinity for the
        lower bound and as infinity for the upper one.

        Args:
            confidence: Between zero and one.

        Returns:
            ``(lower, upper)``, in the unit of the score.

        Raises:
            ValueError: If ``confidence`` is not between zero and one.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"Expected a confidence between 0 and 1, got {confidence}. Write 95 % as 0.95.")
        undefined = np.isnan(self.replicates)
        lowest, highest = (np.where(undefined, bound, self.replicates) for bound in (-np.inf, np.inf))
        return _quantile(lowest, (1 - confidence) / 2), _quantile(highest, (1 + confidence) / 2)

    def __sub__(self, other: Replicates) -> Replicates:
        """Difference of the scores of two predictors of the same data, resample by resample.

        Args:
            other: Replicates made with the same weights.

        Returns:
            Its interval is that of the paired difference. Infinite minus infinite is not defined: NaN.

        Raises:
            ValueError: If the numbers of resamples differ.
        """
        if not isinstance(other, Replicates):
            return NotImplemented
        if self.replicates.shape != other.replicates.shape:
            raise ValueError(
                f"Expected equally many resamples, got {len(self.replicates)} and {len(other.replicates)}. "
                "Make both with the same weights."
            )
        with np.errstate(invalid="ignore"):
            return Replicates(self.value - other.value, self.replicates - other.replicates)


def resample_weights(n: int, n_resamples: int = 1000, seed: int = 0) -> Array:
    """How often each of n data is drawn in each of B resamples with replacement: multinomial counts.

    Args:
        n: Number of data.
        n_resamples: Number of resamples; 1000 fix the bounds of a 95 % interval well enough for two digits.
        seed: Of NumPy's generator; the global state is not touched.

    Returns:
        ``[B, n]``, float32 (which holds counts exactly), rows that sum to ``n``.

    Raises:
        ValueError: If a number is not positive.

    Example:
        >>> resample_weights(4, 2).sum(1).tolist()
        [4.0, 4.0]
    """
    if n < 1 or n_resamples < 1:
        raise ValueError(f"Expected at least one datum and one resample, got {n} and {n_resamples}.")
    generator = np.random.default_rng(seed)
    weights = np.empty((n_resamples, n), dtype=np.float32)
    for row in weights:
        row[:] = np.bincount(generator.integers(n, size=n), minlength=n)
    return weights


def classification_replicates(probabilities: Any, targets: Any, weights: Any) -> dict[str, Replicates]:
    """Scores of a classifier's probabilities, with resamples.

    The bins of the adaptive calibration error are those of the whole sample in all resamples.

    Args:
        probabilities: ``[N, C]``.
        targets: ``[N]``, class indices.
        weights: ``[B, N]``, from :func:`resample_weights`.

    Returns:
        ``accuracy``, ``nll``, ``brier``, ``ece``, ``adaptive_ece``, ``classwise_ece`` and ``aurc``, in the units of
        :func:`~debiased_laplace.evaluation.metrics.classification_metrics`. If a target has probability zero,
        ``nll`` is infinite, and so are the replicates that hold this datum.

    Raises:
        ValueError: For predictions that the scores refuse, or weights that are not counts of these data.

    Example:
        >>> scores = classification_replicates([[0.8, 0.2], [0.3, 0.7]], [0, 0], resample_weights(2, 100))
        >>> scores["accuracy"].value, scores["accuracy"].interval()
        (0.5, (0.0, 1.0))
    """
    probabilities, targets = metrics.check_predictions(probabilities, targets)
    weights = _check_weights(weights, len(targets))
    confidence, correct = metrics.confidence_and_hits(probabilities, targets)
    replicates = _means(weights, metrics.datum_scores(probabilities, targets))
    gap = (confidence - correct)[:, None]
    for name, bins in (("ece", metrics.equal_width_bins), ("adaptive_ece", metrics.equally_full_bins)):
        replicates[name] = _binned_gaps(weights, bins(confidence, N_BINS)[:, None], gap)
    replicates["classwise_ece"] = _classwise_gaps(weights, probabilities, targets)
    replicates["aurc"] = _aurc(weights, confidence, ~correct)
    values = metrics.classification_metrics(probabilities, targets)
    return {name: Replicates(values[name], array) for name, array in replicates.items()}


def regression_replicates(mean: Any, variance: Any, targets: Any, weights: Any) -> dict[str, Replicates]:
    """Scores of Gaussian predictions, with resamples.

    Args:
        mean: ``[N, C]`` or ``[N]``.
        variance: Likewise; total predictive variance, noise included.
        targets: Likewise.
        weights: ``[B, N]``, from :func:`resample_weights`: data are drawn with all their outputs.

    Returns:
        The names and units of :func:`~debiased_laplace.evaluation.regression.regression_metrics`.

    Raises:
        ValueError: For predictions that the scores refuse, or weights that are not counts of these data.
    """
    contributions = regression.datum_scores(mean, variance, targets)
    weights = _check_weights(weights, len(contributions["nll"]))
    replicates = regression.combine(_means(weights, contributions))
    values = regression.regression_metrics(mean, variance, targets)
    return {name: Replicates(values[name], array) for name, array in replicates.items()}


def detection_replicates(
    inside_score: Any, outside_score: Any, weights_inside: Any, weights_outside: Any
) -> dict[str, Replicates]:
    """Scores of telling foreign data from known ones, with resamples of each kind of data on its own.

    Args:
        inside_score: ``[N]``, scores of known data.
        outside_score: ``[M]``, scores of foreign data, the positives; high means foreign.
        weights_inside: ``[B, N]``, from :func:`resample_weights`.
        weights_outside: ``[B, M]``, likewise, with another seed: the kinds of data are independent.

    Returns:
        ``auroc``, ``aupr`` and ``fpr95``, fractions.

    Raises:
        ValueError: For scores that are not finite numbers ``[N]``, or weights that are not counts of these data.
    """
    known, foreign = (metrics.as_array(score, "scores") for score in (inside_score, outside_score))
    if known.ndim != 1 or foreign.ndim != 1:
        raise ValueError(f"Expected scores of shapes [N] and [M], got {known.shape} and {foreign.shape}.")
    score, is_outside = np.concatenate([known, foreign]), np.repeat([False, True], [len(known), len(foreign)])
    functions = {"auroc": metrics.auroc, "aupr": metrics.aupr, "fpr95": metrics.fpr95}
    values = {name: function(score, is_outside) for name, function in functions.items()}
    weights = [_check_weights(weights_inside, len(known)), _check_weights(weights_outside, len(foreign))]
    if len(weights[0]) != len(weights[1]):
        raise ValueError(f"Expected equally many resamples of both kinds, got {len(weights[0])} and {len(weights[1])}.")
    replicates = {name: np.empty(len(weights[0])) for name in values}
    # High scores first; each row is a threshold, and data of one score cross it together.
    order, starts = _descending(score.astype(np.float64))
    for rows, block in _blocks(np.concatenate(weights, 1), order):
        positives = _sum_groups(block * is_outside[order, None], starts)
        false = _sum_groups(block, starts) - positives
        found, called = positives.cumsum(0), false.cumsum(0)
        n_positives, n_negatives = found[-1], called[-1]
        pairs = (false * (found - positives / 2)).sum(0)  # a tied foreign datum counts half
        replicates["auroc"][rows] = pairs / (n_positives * n_negatives)
        precision = found / np.maximum(found + called, 1)
        replicates["aupr"][rows] = (positives * precision).sum(0) / n_positives
        threshold = (found / n_positives < 0.95).sum(0)
        replicates["fpr95"][rows] = called[threshold, np.arange(len(threshold))] / n_negatives
    return {name: Replicates(values[name], array) for name, array in replicates.items()}


# -- weighted sums -----------------------------------------------------------------------------


def _blocks(weights: Array, order: Array | None = None) -> Iterator[tuple[slice, Array]]:
    # Float64 columns [N, resamples], data in the given order: sums of float32 would round.
    step = max(1, BLOCK_ENTRIES // weights.shape[1])
    for first in range(0, len(weights), step):
        part = weights[first : first + step].T
        yield slice(first, first + step), (part if order is None else part[order]).astype(np.float64, order="C")


def _means(weights: Array, scores: dict[str, Array]) -> dict[str, Array]:
    # Weighted means of [N] or [N, K] -> [B] or [B, K]. Zero times infinity is NaN, so infinities go apart.
    table = np.concatenate([score.reshape(len(score), -1) for score in scores.values()], 1).T
    infinite = np.isinf(table)
    finite, result = np.where(infinite, 0.0, table), np.empty((len(weights), len(table)))
    for rows, block in _blocks(weights):
        means = finite @ block / block.sum(0)
        if infinite.any():
            means[infinite.astype(np.float64) @ block > 0] = np.inf
        result[rows] = means.T
    ends = np.cumsum([score[0].size for score in scores.values()])
    parts = np.split(result, ends[:-1], 1)
    return {
        k: part.reshape(len(part), *score.shape[1:]) for (k, score), part in zip(scores.items(), parts, strict=True)
    }


def _binned_gaps(weights: Array, index: Array, gaps: Array) -> Array:
    # Sum over bins of |weighted sum of the gaps in it|, for each datum; columns of [N, K] have bins of their own.
    n, columns = index.shape
    n_bins = int(index.max()) + 1
    data = np.repeat(np.arange(n), columns)
    bins = sparse.csr_array(
        (gaps.ravel(), ((index + n_bins * np.arange(columns)).ravel(), data)), (n_bins * columns, n)
    )
    result = np.empty(len(weights))
    for rows, block in _blocks(weights):
        result[rows] = np.abs(bins @ block).sum(0) / block.sum(0)
    return result


def _classwise_gaps(weights: Array, probabilities: Array, targets: Array) -> Array:
    n, classes = probabilities.shape
    total, step = np.zeros(len(weights)), max(1, BLOCK_ENTRIES // n)
    for first in range(0, classes, step):
        part = probabilities[:, first : first + step]
        hits = targets[:, None] == np.arange(first, first + part.shape[1])
        total += _binned_gaps(weights, metrics.equal_width_bins(part, N_BINS), part - hits)
    return total / classes


def _aurc(weights: Array, confidence: Array, wrong: Array) -> Array:
    # A tie of m data with error rate r, after a data with E errors, adds sum_{k=a+1}^{a+m} (E + r (k - a)) / k
    # = r m + (E - r a) (H(a + m) - H(a)) with harmonic numbers H: copies of a datum are such a tie.
    order, starts = _descending(confidence)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, weights.sum(1, dtype=np.float64).max() + 1))])
    result = np.empty(len(weights))
    for rows, block in _blocks(weights, order):
        errors = _sum_groups(block * wrong[order, None], starts)
        sizes = _sum_groups(block, starts)
        after = sizes.cumsum(0)
        rates, before = errors / np.maximum(sizes, 1), after - sizes
        steps = harmonic[after.astype(np.int64)]
        steps[1:] -= steps[:-1].copy()
        earlier = errors.cumsum(0) - errors
        result[rows] = (errors + (earlier - rates * before) * steps).sum(0) / after[-1]
    return result


def _descending(values: Array) -> tuple[Array, Array]:
    # Order from high to low, and where each group of equal values starts.
    order = np.argsort(-values, kind="stable")
    return order, np.flatnonzero(np.concatenate([[True], np.diff(values[order]) != 0]))


def _sum_groups(block: Array, starts: Array) -> Array:
    return block if len(starts) == len(block) else np.add.reduceat(block, starts, axis=0)


def _quantile(values: Array, probability: float) -> float:
    # Linear interpolation as numpy.quantile's, which makes NaN of two equal infinities.
    ordered, place = np.sort(values), probability * (len(values) - 1)
    low, high = float(ordered[math.floor(place)]), float(ordered[math.ceil(place)])
    fraction = place - math.floor(place)
    if low == high or (np.isinf(low) and np.isinf(high)):
        return low if probability < 0.5 else high
    return (1 - fraction) * low + fraction * high


def _check_weights(weights: Any, n: int) -> Array:
    array = metrics.as_array(weights, "weights")
    if array.ndim != 2 or array.shape[1] != n or len(array) < 1:
        raise ValueError(
            f"Expected weights of shape [B, {n}], one row for each resample and one column for each datum, got "
            f"{array.shape}. Make them with resample_weights({n})."
        )
    step = max(1, BLOCK_ENTRIES // n)
    for first in range(0, len(array), step):
        part = array[first : first + step]
        # Comparisons with NaN are false.
        if not ((part >= 0) & (part < np.inf)).all() or (part != np.floor(part)).any() or not part.any(1).all():
            raise ValueError(
                "Expected weights that count how often each datum was drawn (0, 1, 2, ...), not all zero in a row, got "
                f"others in rows {first} to {first + len(part) - 1}. Make them with resample_weights({n})."
            )
    return array
