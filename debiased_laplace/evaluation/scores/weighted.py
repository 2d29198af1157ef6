r"""Scores of weighted data, for all resamples at once.

A resample of N data with replacement is the same as weights :math:`w \in \mathbb{N}^N` that say how often each
datum was drawn. ``weights`` is ``[B, N]``, one row for each of B resamples, and every score is a function of
weighted sums: scores that are means over data are one matrix product, binned ones a sparse one, and those
that need an order sort the data once for all resamples. Rows of ``weights`` are worked off in blocks
``[N, resamples]`` of bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import sparse

from debiased_laplace._arrays import Array, as_array
from debiased_laplace.evaluation.scores.calibration import N_BINS, equal_width_bins, equally_full_bins, top_label_bins
from debiased_laplace.evaluation.scores.classification import with_calibration_losses
from debiased_laplace.evaluation.scores.refinement import Recalibration
from debiased_laplace.evaluation.scores.smooth import GRID, cells, smooth_errors

#: Entries of a block of resampling weights (12 MB); about eight arrays of that size live at once.
BLOCK_ENTRIES = 1_500_000


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


def classifier_scores(
    weights: Array, probabilities: Array, data: dict[str, Array], found: Recalibration,
    columns: Callable[[int, int], Array],
) -> dict[str, Array]:  # fmt: skip
    """All scores of a classifier, ``[B]`` each.

    Args:
        weights: ``[B, N]``.
        probabilities: ``[N, C]``.
        data: ``accuracy``, ``nll`` and ``brier`` of each datum, ``[N]`` each.
        found: The recalibration of the whole sample.
        columns: For a range of classes whether, or how probably, each is the target, ``[N, k]``.
    """
    confidence, hits = probabilities.max(1).clip(max=1.0), data["accuracy"]
    means, gap = weighted_means(weights, {**data, **found.columns}), confidence - hits
    scores = {name: means[name] for name in data}
    for name, bins in (("ece", equal_width_bins), ("adaptive_ece", equally_full_bins)):
        scores[name] = _binned_gaps(weights, bins(confidence, N_BINS)[:, None], gap[:, None])
    scores["smooth_ece"] = _smooth_gaps(weights, confidence, gap)
    of_classes = top_label_bins(probabilities, confidence, N_BINS)
    scores["top_label_ece"] = _binned_gaps(weights, of_classes[:, None], gap[:, None])
    scores["classwise_ece"] = _classwise_gaps(weights, probabilities, columns)
    scores["aurc"], scores["augrc"] = _areas(weights, confidence, 1 - hits)
    return with_calibration_losses(scores | found.risks(means))


def detection_scores(score: Array, is_outside: Array, weights: Array) -> dict[str, Array]:
    """``auroc``, ``aupr`` and ``fpr95``, ``[B]`` each.

    Args:
        score: ``[N]``, high where data look out of distribution.
        is_outside: ``[N]``, which data are: the positives.
        weights: ``[B, N]``.
    """
    scores = {name: np.empty(len(weights)) for name in ("auroc", "aupr", "fpr95")}
    # High scores first; each row is a threshold, and data of one score cross it together.
    order, starts = _descending(score)
    for rows, block in _blocks(weights, order):
        positives = _sum_groups(block * is_outside[order, None], starts)
        false = _sum_groups(block, starts) - positives
        detected, called = positives.cumsum(0), false.cumsum(0)
        n_positives, n_negatives = detected[-1], called[-1]
        pairs = (false * (detected - positives / 2)).sum(0)  # ties count half
        scores["auroc"][rows] = pairs / (n_positives * n_negatives)
        precision = detected / np.maximum(detected + called, 1)
        scores["aupr"][rows] = (positives * precision).sum(0) / n_positives
        threshold = (detected / n_positives < 0.95).sum(0)
        scores["fpr95"][rows] = called[threshold, np.arange(len(threshold))] / n_negatives
    return scores


def _blocks(weights: Array, order: Array | None = None) -> Iterator[tuple[slice, Array]]:
    # Float64 columns [N, resamples], data in the given order: sums of float32 would round.
    step = max(1, BLOCK_ENTRIES // weights.shape[1])
    for first in range(0, len(weights), step):
        part = weights[first : first + step].T
        yield slice(first, first + step), (part if order is None else part[order]).astype(np.float64, order="C")


def weighted_means(weights: Array, scores: dict[str, Array]) -> dict[str, Array]:
    """Means of ``[N]`` or ``[N, K]``: ``[B]`` or ``[B, K]``; infinite where an infinite one was drawn."""
    # Zero times infinity is NaN, so infinities go apart.
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
    # Sum over bins of |weighted sum of the gaps in it|, for each datum; each column of [N, K] has its bins.
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
        total += _binned_gaps(weights, equal_width_bins(part, N_BINS), part - hits)
    return total / classes


def _smooth_gaps(weights: Array, confidence: Array, gap: Array) -> Array:
    shares, result = cells(confidence, gap), np.empty((len(weights), GRID))
    for rows, block in _blocks(weights):
        result[rows] = ((shares @ block) / block.sum(0)).T
    return smooth_errors(result)


def _areas(weights: Array, confidence: Array, wrong: Array) -> tuple[Array, Array]:
    # Below the risk-coverage curve: a tie of m data with error rate r, after a data with E errors, adds
    # sum_{k=a+1}^{a+m} (E + r (k - a)) / k = r m + (E - r a) (H(a + m) - H(a)) with harmonic numbers H: copies of a
    # datum are such a tie. Below the generalised one it is a trapezium, m (E + r m / 2).
    order, starts = _descending(confidence)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, weights.sum(1, dtype=np.float64).max() + 1))])
    areas = np.empty((2, len(weights)))
    for rows, block in _blocks(weights, order):
        errors = _sum_groups(block * wrong[order, None], starts)
        sizes = _sum_groups(block, starts)
        after = sizes.cumsum(0)
        rates, before = errors / np.maximum(sizes, 1), after - sizes
        steps = harmonic[after.astype(np.int64)]
        steps[1:] -= steps[:-1].copy()
        earlier = errors.cumsum(0) - errors
        areas[0, rows] = (errors + (earlier - rates * before) * steps).sum(0) / after[-1]
        areas[1, rows] = ((earlier + errors / 2) * sizes).sum(0) / after[-1] ** 2
    return areas[0], areas[1]


def _descending(values: Array) -> tuple[Array, Array]:
    # Order from high to low, and where each group of equal values starts.
    order = np.argsort(-values, kind="stable")
    return order, np.flatnonzero(np.concatenate([[True], np.diff(values[order]) != 0]))


def _sum_groups(block: Array, starts: Array) -> Array:
    return block if len(starts) == len(block) else np.add.reduceat(block, starts, axis=0)


def check_weights(weights: Any, n: int) -> Array:
    """Weights ``[B, n]`` that count how often each datum was drawn, or a ``ValueError``."""
    array = as_array(weights, "weights")
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
