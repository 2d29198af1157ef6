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

Resamples know nothing but the data: where all predictions are right, or all foreign data score higher than all known
ones, no resample differs. A share of at most :func:`~debiased_laplace.evaluation.intervals.unseen_share` could have
been otherwise and not been seen; scores with such a share belong to the intervals there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from scipy import sparse

from debiased_laplace.evaluation import intervals, metrics, regression
from debiased_laplace.evaluation.metrics import N_BINS, Array
from debiased_laplace.evaluation.replicates import Kind, Replicates

#: Entries of a block of resampling weights (12 MB); about eight arrays of that size live at once.
BLOCK_ENTRIES = 1_500_000
# Weight of each kind of data where shares of it are weights: far above one, see the precision of the AUPR.
_WEIGHT = 1e9
_FRACTIONS = ("accuracy", "ece", "adaptive_ece", "classwise_ece", "aurc", "auroc", "aupr", "fpr95", "calibration_error")
_COVERAGES = tuple(f"coverage_{percent}" for percent in regression.INTERVALS)
_BOUNDS = dict.fromkeys((*_FRACTIONS, *_COVERAGES), (0.0, 1.0)) | {"brier": (0.0, 2.0)}
_POSITIVE = 0.0, math.inf


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


def classification_replicates(
    probabilities: Any, targets: Any, weights: Any, others: Any = None
) -> dict[str, Replicates]:
    """Scores of a classifier's probabilities, with resamples.

    The bins of the adaptive calibration error are those of the whole sample in all resamples.

    Args:
        probabilities: ``[N, C]``.
        targets: ``[N]``, class indices.
        weights: ``[B, N]``, from :func:`resample_weights`.
        others: ``[N, C]``, how probable each class is in place of the target where all predictions, or none, are right;
            give all predictors of the same data the same. By default the probabilities.

    Returns:
        ``accuracy``, ``nll``, ``brier``, ``ece``, ``adaptive_ece``, ``classwise_ece`` and ``aurc``, in the units of
        :func:`~debiased_laplace.evaluation.metrics.classification_metrics`. If a target has probability zero,
        ``nll`` is infinite, and so are the replicates that hold this datum.

    Raises:
        ValueError: For predictions that the scores refuse, or weights that are not counts of these data.

    Example:
        >>> scores = classification_replicates([[0.8, 0.2], [0.3, 0.7]], [0, 0], resample_weights(2, 100))
        >>> scores["accuracy"].value, [round(bound, 3) for bound in scores["accuracy"].interval()]
        (0.5, [0.013, 0.987])
    """
    probabilities, targets = metrics.check_predictions(probabilities, targets)
    weights, n = _check_weights(weights, len(targets)), len(targets)
    data = metrics.datum_scores(probabilities, targets)
    replicates = _classifier_scores(
        weights, probabilities, data, lambda first, last: targets[:, None] == np.arange(first, last)
    )
    values = metrics.classification_metrics(probabilities, targets)

    @lru_cache(maxsize=1)
    def with_other_labels(confidence: float) -> dict[str, Array]:
        share = intervals.unseen_share(n, confidence)
        labels = metrics.other_labels(probabilities if others is None else np.asarray(others), targets) * share
        labels[np.arange(n), targets] += 1 - share
        return _classifier_scores(
            np.ones((1, n)), probabilities, metrics.expected_datum_scores(probabilities, labels),
            lambda first, last: labels[:, first:last],
        )  # fmt: skip

    found = {}
    alike = float(np.ptp(data["accuracy"])) == 0
    kinds: dict[str, Kind] = {"accuracy": "proportion", "nll": "mean", "brier": "mean", "aurc": "statistic"}
    for name, array in replicates.items():
        bounds = _BOUNDS.get(name, _POSITIVE)
        own = Replicates(values[name], array, n, kinds.get(name, "calibration"), data.get(name), bounds)
        if alike or (own.is_finite and own.is_constant):
            own = replace(own, unseen=partial(_scores_of, with_other_labels, name))
        found[name] = own
    return found


def regression_replicates(mean: Any, variance: Any, targets: Any, weights: Any) -> dict[str, Replicates]:
    """Scores of Gaussian predictions, with resamples.

    Where all errors are the same, nothing is known of others: RMSE, NLL and CRPS could be anything. Widths do not
    depend on errors.

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
    data = regression.datum_scores(mean, variance, targets)
    n, one_output = len(data["nll"]), np.ndim(mean) == 1 or np.shape(mean)[1] == 1
    replicates = regression.combine(_means(_check_weights(weights, n), data))
    values = regression.regression_metrics(mean, variance, targets)
    contributions = regression.contributions(data)

    def with_other_errors(confidence: float) -> dict[str, Array]:
        share = intervals.unseen_share(n, confidence)
        means = {key: np.stack([value.mean(0)] * 2) for key, value in data.items()}
        means["inside"] = (1 - share) * means["inside"] + np.array([[0.0], [share]])
        unknown = {"rmse": np.array(_POSITIVE), "crps": np.array(_POSITIVE), "nll": np.array([-math.inf, math.inf])}
        return regression.combine(means) | unknown

    found = {}
    for name, array in replicates.items():
        kind: Kind = "calibration" if name == "calibration_error" else "mean"
        if name == "rmse":
            kind = "root"
        elif name in _COVERAGES and one_output:
            kind = "proportion"
        bounds = (-math.inf, math.inf) if name == "nll" else _BOUNDS.get(name, _POSITIVE)
        own = Replicates(values[name], array, n, kind, contributions.get(name), bounds)
        if own.is_finite and own.is_constant and not name.startswith("width"):
            own = replace(own, unseen=partial(_scores_of, with_other_errors, name))
        found[name] = own
    return found


def detection_replicates(
    inside_score: Any, outside_score: Any, weights_inside: Any, weights_outside: Any
) -> dict[str, Replicates]:
    """Scores of telling foreign data from known ones, with resamples of each kind of data on its own.

    FPR95 is a proportion of the known data at a threshold that the foreign data set: its interval holds the exact one
    of that proportion, and reaches to one where the foreign data are too few for a lower bound of their 5 % quantile.

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
    sizes = len(known), len(foreign)

    @lru_cache(maxsize=1)
    def with_other_scores(confidence: float) -> dict[str, Array]:
        # Of either kind, a share could lie above or below all that was seen.
        ranks = np.unique(score, return_inverse=True)[1].reshape(-1) + 1.0
        ends, kinds = np.array([0.0, ranks.max() + 1]), np.repeat([False, True], 2)
        rows = np.repeat(_WEIGHT / np.array(sizes), sizes)[None].repeat(4, 0)
        tail = np.zeros((4, 4))
        for index, (which, end) in enumerate(((0, 1), (0, 0), (1, 0), (1, 1))):
            share = intervals.unseen_share(sizes[which], confidence)
            rows[index, is_outside == bool(which)] *= 1 - share
            tail[index, 2 * which + end] = _WEIGHT * share
        return _detection_scores(
            np.concatenate([ranks, ends, ends]), np.concatenate([is_outside, kinds]), np.concatenate([rows, tail], 1)
        )

    def of_the_rate(confidence: float) -> list[float]:
        low, high = intervals.proportion(round(values["fpr95"] * sizes[0]), sizes[0], confidence)
        return [low, 1.0 if intervals.unseen_share(sizes[1], confidence) > 0.05 else high]

    found = {}
    for name, array in _detection_scores(score.astype(np.float64), is_outside, np.concatenate(weights, 1)).items():
        own = Replicates(values[name], array, min(sizes), bounds=_BOUNDS[name])
        if name == "fpr95":
            own = replace(own, unseen=of_the_rate)
        elif own.is_constant:
            own = replace(own, unseen=partial(_scores_of, with_other_scores, name))
        found[name] = own
    return found


def _scores_of(scores: Callable[[float], dict[str, Array]], name: str, confidence: float) -> list[float]:
    return scores(confidence)[name].tolist()


# -- scores of weighted data -------------------------------------------------------------------


def _classifier_scores(
    weights: Array, probabilities: Array, data: dict[str, Array], columns: Callable[[int, int], Array]
) -> dict[str, Array]:
    # data: accuracy, nll and brier of each datum; columns: whether (or how probably) classes are the target, [N, k].
    confidence, hits = probabilities.max(1).clip(max=1.0), data["accuracy"]
    found, gap = _means(weights, data), (confidence - hits)[:, None]
    for name, bins in (("ece", metrics.equal_width_bins), ("adaptive_ece", metrics.equally_full_bins)):
        found[name] = _binned_gaps(weights, bins(confidence, N_BINS)[:, None], gap)
    found["classwise_ece"] = _classwise_gaps(weights, probabilities, columns)
    found["aurc"] = _aurc(weights, confidence, 1 - hits)
    return found


def _detection_scores(score: Array, is_outside: Array, weights: Array) -> dict[str, Array]:
    found_scores = {name: np.empty(len(weights)) for name in ("auroc", "aupr", "fpr95")}
    # High scores first; each row is a threshold, and data of one score cross it together.
    order, starts = _descending(score)
    for rows, block in _blocks(weights, order):
        positives = _sum_groups(block * is_outside[order, None], starts)
        false = _sum_groups(block, starts) - positives
        found, called = positives.cumsum(0), false.cumsum(0)
        n_positives, n_negatives = found[-1], called[-1]
        pairs = (false * (found - positives / 2)).sum(0)  # a tied foreign datum counts half
        found_scores["auroc"][rows] = pairs / (n_positives * n_negatives)
        precision = found / np.maximum(found + called, 1)
        found_scores["aupr"][rows] = (positives * precision).sum(0) / n_positives
        threshold = (found / n_positives < 0.95).sum(0)
        found_scores["fpr95"][rows] = called[threshold, np.arange(len(threshold))] / n_negatives
    return found_scores


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


def _classwise_gaps(weights: Array, probabilities: Array, columns: Callable[[int, int], Array]) -> Array:
    n, classes = probabilities.shape
    total, step = np.zeros(len(weights)), max(1, BLOCK_ENTRIES // n)
    for first in range(0, classes, step):
        part = probabilities[:, first : first + step]
        hits = columns(first, first + part.shape[1])
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
