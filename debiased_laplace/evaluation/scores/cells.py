r"""Cells: a score as ``[value, standard error, lower, upper]``, with its 95 % interval; of one run or of several."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from debiased_laplace._arrays import Array
from debiased_laplace.evaluation.scores.intervals import CONFIDENCE, overlap_factor, student_quantile
from debiased_laplace.evaluation.scores.replicates import Replicates


def cell(score: Replicates) -> list[float]:
    """Value, standard error, and 95 % interval."""
    return [float(value) for value in (score.value, score.standard_error, *score.interval())]


Cell = list[float]


def combine(cells: Sequence[Cell], same_data: bool, overlap: float = 0.0) -> Cell:
    r"""The cell of several seeds.

    With S seeds, :math:`h` the quantile of Student's t times the standard error of the mean over seeds, and
    :math:`d_s` how far the interval of a seed's data reaches below (or above) its value:

    * Seeds judged on the same data know nothing of these, however well they agree. The two errors are independent, and
      their reaches are added in squares, :math:`\sqrt{h^2 + \overline{d^2}}`.
    * Seeds with different data vary by the data too. Few that agree by chance do not know more than their data:
      :math:`\max\big(h, \sqrt{\overline{d^2} / S}\big)`. Splits of one data set share data: with
      :math:`\rho = n_\text{test} / n_\text{train}` the error is :math:`s \sqrt{1/S + \rho}` (Nadeau and Bengio), and
      there are no more than :math:`1 + 1/\rho` test sets' worth of data.

    Args:
        cells: One for each seed, or for each draw.
        same_data: Whether all were judged on the same data.
        overlap: Otherwise :math:`\rho`, or zero for data that are independent.

    Returns:
        Mean, standard error, lower and upper bound. With a value that is not finite the interval is unbounded.

    Source: Zou and Donner, Statistics in Medicine 27 (2008), 1693-1702, for sums of variables with skewed intervals;
    :func:`~debiased_laplace.evaluation.scores.intervals.overlap_factor`.
    """
    if len(cells) == 1:
        return cells[0]
    values, errors, low, high = np.array(cells, dtype=np.float64).T
    if not np.isfinite(values).all():  # no variance: the interval is what holds those of all seeds
        return [mean_of(values.tolist()), math.inf, float(low.min()), float(high.max())]
    mean, n = float(values.mean()), len(values)
    overlap = 0.0 if same_data else overlap
    error_over_seeds = float(values.std(ddof=1)) / math.sqrt(overlap_factor(n, overlap))
    n_data = min(n, 1 + 1 / overlap) if overlap else n
    quantile = student_quantile(n, CONFIDENCE)

    def joined(seeds: float, data: Array) -> float:
        squares = float(np.square(data).mean())
        return math.sqrt(seeds**2 + squares) if same_data else max(seeds, math.sqrt(squares / n_data))

    reach = [joined(quantile * error_over_seeds, data) for data in (values - low, high - values)]
    return [mean, joined(error_over_seeds, errors), mean - reach[0], mean + reach[1]]


def cross_fitted(cells: Sequence[Cell], folds: int) -> Cell:
    r"""The cell of seeds that judge the folds of one data set in turn, each tuned on the others.

    The folds of one split are disjoint: their mean has the error of all data, :math:`\sqrt{\overline{d^2} / K}` for K
    folds, and how far they are apart says nothing that the data's own errors do not. Splits judge the same data, and
    are combined as such; of one split alone, nothing is known of what the split itself contributes.

    Args:
        cells: Of all folds of the first split, then of the second, and so on.
        folds: K.

    Returns:
        As :func:`combine`.
    """

    def split(of_folds: Sequence[Cell]) -> Cell:
        values, errors, low, high = np.array(of_folds, dtype=np.float64).T
        if not np.isfinite(values).all():
            return [mean_of(values.tolist()), math.inf, float(low.min()), float(high.max())]
        mean = float(values.mean())
        error, below, above = (
            math.sqrt(float(np.square(part).mean()) / folds) for part in (errors, values - low, high - values)
        )
        return [mean, error, mean - below, mean + above]

    return combine([split(cells[i : i + folds]) for i in range(0, len(cells), folds)], same_data=True)


def mean_of(values: Sequence[float]) -> float:
    """Of finite, infinite and undefined numbers; infinite ones of both signs have none."""
    with np.errstate(invalid="ignore"):
        return statistics.fmean(values) if all(map(math.isfinite, values)) else float(np.mean(values))


def geometric_mean(values: Sequence[float]) -> float:
    """Of numbers that may be zero or infinite."""
    with np.errstate(divide="ignore"):
        return float(np.exp(np.mean(np.log(values))))
