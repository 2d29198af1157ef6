r"""Which of the calibration scores bounds those of new data: exact ranks, for one datum or for a batch of them.

With n calibration scores :math:`s_{(1)} \le \dots \le s_{(n)}` and m new ones, exchangeable and without ties, all
:math:`\binom{n+m}{m}` orders of the two kinds are equally likely. So :math:`s_{(r)}` has at least k of the new ones
below it with probability

.. math:: \binom{n+m}{m}^{-1} \sum_{j=k}^{m} \binom{r-1+j}{j} \binom{n-r+m-j}{m-j},

which is :math:`r / (n+1)` for one new datum. Ties only raise it.

Source: Lee, Tchetgen Tchetgen and Dobriban, "Batch predictive inference", arXiv 2409.13990.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import gammaln

from debiased_laplace import _checks
from debiased_laplace._arrays import Array, as_array

# By how much a probability may miss its level by rounding alone.
_ROUNDING = 1e-9


def check_level(alpha: float) -> float:
    """The share of sets that may miss, between 0 and 1."""
    level = _checks.positive(alpha, "alpha")
    if level >= 1:
        raise ValueError(
            f"Expected alpha between 0 and 1, the share of sets that may miss, got {alpha}. For sets that hold nine of "
            "ten labels write 0.1."
        )
    return level


def needed_rank(n: int, alpha: float, batch: int = 1, at_least: int | None = None) -> int:
    """The smallest rank r that bounds ``at_least`` of ``batch`` new scores with probability 1 - alpha.

    Args:
        n: Calibration scores.
        alpha: Between 0 and 1.
        batch: New scores, m.
        at_least: How many of them shall lie below, k; all by default.

    Returns:
        From 1 to n; n + 1 if no calibration score is large enough.

    Example:
        >>> needed_rank(99, 0.1), needed_rank(8, 0.1), needed_rank(99, 0.1, 10), needed_rank(99, 0.1, 10, 9)
        (90, 9, 99, 95)
    """
    _checks.whole(batch, "batch")
    k = batch if at_least is None else at_least
    _checks.whole(k, "at_least", at_most=batch)
    if batch == 1:
        return min(math.ceil((n + 1) * (1 - alpha) - _ROUNDING), n + 1)
    low, high = 1, n + 1  # the probability rises with the rank
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _share_below(n, middle, batch, k) >= 1 - alpha - _ROUNDING else (middle + 1, high)
    return low


def _share_below(n: int, r: int, m: int, k: int) -> float:
    """Probability that at least k of m new scores lie below the r-th of n."""
    j = np.arange(k, m + 1)
    logs = _log_binomial(r - 1 + j, j) + _log_binomial(n - r + m - j, m - j) - _log_binomial(n + m, m)
    return float(np.exp(logs).sum())


def _log_binomial(n: Any, k: Any) -> Any:
    return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)


def threshold(scores: Any, alpha: float = 0.1, *, batch: int = 1, at_least: int | None = None) -> float:
    r"""The calibration score below which new scores lie.

    For one new datum it is the :math:`\lceil (n+1)(1-\alpha) \rceil`-th smallest. For a batch of m it bounds all of
    their scores together, or ``at_least`` so many: with m // 2 + 1 of an odd m it is a bound for their median.

    Args:
        scores: ``[n]``, of data that are exchangeable with the new ones.
        alpha: Probability, at most, with which the statement is wrong.
        batch: New data that the statement is about together.
        at_least: How many of their scores shall lie below; all by default.

    Returns:
        In the unit of the scores; infinite if there are too few of them.

    Raises:
        ValueError: If scores are no finite numbers ``[n]``, or another argument is out of range.

    Example:
        >>> threshold([3.0, 1.0, 2.0], 0.25), threshold([3.0, 1.0, 2.0], 0.1)
        (3.0, inf)
    """
    ordered = _ordered(scores)
    rank = needed_rank(len(ordered), check_level(alpha), batch, at_least)
    return float(ordered[rank - 1]) if rank <= len(ordered) else math.inf


def mean_bound(scores: Any, batch: int, alpha: float = 0.1, *, largest: float = math.inf) -> float:
    r"""An upper bound for the mean of the scores of a batch of new data.

    With :math:`j_i` the rank of the i-th new score among the calibration scores (all multisets of ranks from 1 to
    n + 1 are equally likely) and q the :math:`1 - \alpha` quantile of :math:`\sum_i j_i`, it is the largest
    :math:`\frac1m \sum_i s_{(j_i)}` of all ranks with :math:`\sum_i j_i \le q`. Both are found by dynamic programming,
    in :math:`O(m^2 n^2)` operations. A rank of n + 1 says nothing but that the score is at most ``largest``.

    Args:
        scores: ``[n]``, of data that are exchangeable with the new ones: losses, absolute errors.
        batch: New data, m.
        alpha: Probability, at most, with which the mean is larger.
        largest: The largest score that is possible, such as 1 for errors; infinite scores leave infinite bounds for
            all but a single new datum.

    Returns:
        In the unit of the scores.

    Raises:
        ValueError: If scores are no finite numbers ``[n]`` up to ``largest``, or another argument is out of range.

    Example:
        >>> mean_bound([0.1, 0.2, 0.3, 0.4], 2, 0.2, largest=1.0)
        0.65
    """
    ordered, level = _ordered(scores), check_level(alpha)
    _checks.whole(batch, "batch")
    if math.isnan(largest) or ordered[-1] > largest:
        raise ValueError(f"Expected scores up to largest={largest}, got {ordered[-1]:.6g}. Name a larger one.")
    values = np.append(ordered, largest)
    ranks, most = len(values), batch * len(values)
    # counts[k, q] multisets of k ranks have the sum q, times a weight to the power of k that keeps them near one.
    weight = math.exp(-float(_log_binomial(ranks - 1 + batch, batch)) / batch)
    counts, best = np.zeros((batch + 1, most + 1)), np.full((batch + 1, most + 1), -math.inf)
    counts[0, 0], best[0, 0] = 1.0, 0.0
    for j in range(1, ranks + 1):
        for k in range(1, batch + 1):  # in this order a rank may be used again
            counts[k, j:] += weight * counts[k - 1, :-j]
            with np.errstate(invalid="ignore"):  # an infinite score added to a sum that no ranks have
                best[k, j:] = np.fmax(best[k, j:], best[k - 1, :-j] + values[j - 1])
    shares = counts[batch].cumsum() / counts[batch].sum()
    quantile = int((shares < 1 - level - _ROUNDING).sum())
    return float(best[batch, : quantile + 1].max() / batch)


def _ordered(scores: Any) -> Array:
    array = as_array(scores, "scores").astype(np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"Expected scores [n] of at least one datum, got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(
            f"Expected finite scores, got NaN or infinity for {int((~np.isfinite(array)).sum())} of {len(array)} data. "
            "Look for NaN in the inputs or the model."
        )
    return np.sort(array)
