r"""Intervals that hold at small n and at the edges of a score's range, where bootstrap percentiles do not.

Percentiles of n data are too short by about :math:`\sqrt{1 - 1/n}` and by the difference of the quantiles of Student
and Gauss, and have no width where no resample differs from the data: twenty of twenty right would be an accuracy of
exactly one. Below :data:`MIN_DATA` data a difference is nothing but its range, and so there is no verdict.
docs/evaluation.md has the rates at which two equal predictors are told apart.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaincinv, ndtr, ndtri, stdtrit

from debiased_laplace._arrays import Array

#: Differences of scores of fewer data are not judged: their interval is all that the score allows.
MIN_DATA = 10
#: Of all intervals that are reported.
CONFIDENCE = 0.95
#: Spread, relative to the score, that is nothing but rounding.
ROUNDING = 1e-12
Interval = tuple[float, float]


@lru_cache
def student_quantile(n: int, confidence: float) -> float:
    """Upper quantile of Student's t with n - 1 degrees of freedom for a central interval."""
    return float(stdtrit(n - 1, (1 + confidence) / 2))


def normal_quantile(confidence: float) -> float:
    """The same of the standard normal distribution."""
    return float(ndtri((1 + confidence) / 2))


def unseen_share(n: int, confidence: float) -> float:
    r"""Largest share of the data that n of them can all have missed, :math:`1 - (\alpha/2)^{1/n}`.

    The upper bound of Clopper and Pearson for none of n.

    Example:
        >>> round(unseen_share(20, 0.95), 3)
        0.168
    """
    return -math.expm1(math.log((1 - confidence) / 2) / n)


@lru_cache(maxsize=4096)
def proportion(successes: float, n: float, confidence: float) -> Interval:
    """Exact interval of a proportion (Clopper and Pearson 1934): it holds the truth at least as often as it says.

    Numbers need not be whole: of counts over seeds that share data, those that they do not share.

    Example:
        >>> [round(bound, 3) for bound in proportion(20, 20, 0.95)]
        [0.832, 1.0]
    """
    tail = (1 - confidence) / 2
    low = float(betaincinv(successes, n - successes + 1, tail)) if successes else 0.0
    high = float(betaincinv(successes + 1, n - successes, 1 - tail)) if successes < n else 1.0
    return low, high


@lru_cache(maxsize=4096)
def paired_proportions(first_only: int, second_only: int, n: int, confidence: float) -> Interval:
    r"""Score interval of the difference of two proportions of the same data: Wilson's for pairs.

    It leaves out zero where McNemar's test rejects, and is :math:`\pm z^2/(n+z^2)` where the two never differ.

    Args:
        first_only: Successes of the first that are failures of the second.
        second_only: The reverse.
        n: Pairs in all.
        confidence: Between zero and one.

    Source: Tango, Statistics in Medicine 17 (1998), 891-908.
    """
    z, difference = normal_quantile(confidence), (first_only - second_only) / n

    def distance(delta: float) -> float:
        # Square of the score statistic minus z^2, times its variance. second: largest likelihood at this difference.
        linear = (2 * n - first_only + second_only) * delta - first_only - second_only
        root = math.sqrt(max(linear * linear + 8 * n * second_only * delta * (1 - delta), 0.0))
        second = max((root - linear) / (4 * n), 0.0, -delta)
        return n * (difference - delta) ** 2 - z * z * max(2 * second + delta * (1 - delta), 0.0)

    def bound(end: float) -> float:
        # Next to the estimate the distance is negative; at the ends of the range it is not.
        if difference == end or distance(end) <= 0:
            return end
        start = difference + (end - difference) * 1e-9
        return difference if distance(start) >= 0 else float(brentq(distance, start, end, xtol=1e-13))

    return bound(-1.0), bound(1.0)


def mean(contributions: Array, confidence: float) -> Interval:
    r"""Of a mean: Student's interval, and what it becomes when the skewness is taken out, whichever reaches further.

    Student's t is right for symmetric differences however long their tails, and too often wrong for skewed ones; the
    skewness-corrected statistic (and with it the bootstrap-t and BCa) is right for skewed and too often wrong for
    long-tailed ones. With T Student's statistic and :math:`\gamma` the skewness, the corrected statistic

    .. math:: T + \frac{\gamma T^2}{3\sqrt n} + \frac{\gamma^2 T^3}{27 n} + \frac{\gamma}{6\sqrt n}

    is monotone and inverted in closed form; no resamples are needed.

    Args:
        contributions: ``[N]``, at least two.
        confidence: Between zero and one.

    Source: Hall, "On the removal of skewness by transformation", JRSS B 54 (1992), 221-228.
    """
    n, middle = len(contributions), float(contributions.mean())
    deviations = contributions - middle
    largest = float(np.abs(deviations).max())
    if largest <= ROUNDING * float(np.abs(contributions).max()):
        return middle, middle
    scaled = deviations / largest  # cubes neither overflow nor vanish
    variance = float(np.square(scaled).sum()) / (n - 1)
    skewness = float((scaled**3).mean()) / (variance * (n - 1) / n) ** 1.5
    quantile, deviation = student_quantile(n, confidence), largest * math.sqrt(variance)
    bounds = []
    for sign in (1, -1):
        plain = sign * quantile / math.sqrt(n)
        shifted = plain - skewness / (6 * n)
        if abs(skewness) > 1e-6:  # below, the correction is nothing but rounding
            shifted = 3 / skewness * (float(np.cbrt(1 + skewness * shifted)) - 1)
        bounds += [middle - deviation * plain, middle - deviation * shifted]
    return min(bounds), max(bounds)


def overlap_factor(n_resamplings: int, overlap: float) -> float:
    r"""By what the variance over splits of one data set has to be divided for that of their mean.

    Splits share data, so that the variance of a mean over J of them is not :math:`s^2 / J` but about

    .. math:: \Big(\frac1J + \frac{n_\text{test}}{n_\text{train}}\Big) s^2.

    Args:
        n_resamplings: J.
        overlap: :math:`n_\text{test} / n_\text{train}`; zero for independent data.

    Source: Nadeau and Bengio, "Inference for the generalization error", Machine Learning 52 (2003), 239-281.

    Example:
        >>> round((20 / overlap_factor(20, 1 / 9)) ** 0.5, 1)  # how much wider intervals become
        1.8
    """
    return 1 / (1 / n_resamplings + overlap)


def expanded(confidence: float, n: int) -> float:
    r"""Lower level at which percentiles of n data have the width of Student's interval.

    .. math:: \Phi\big(-\sqrt{n/(n-1)}\, t_{n-1}\big)

    Source: Hesterberg, "What teachers should know about the bootstrap", arXiv 1411.5279, section 5.3.
    """
    return float(ndtr(-math.sqrt(n / (n - 1)) * student_quantile(n, confidence)))


def hull(*intervals: Interval) -> Interval:
    """The shortest interval that holds all of them; one with an undefined bound counts as unbounded there."""
    lows, highs = zip(*intervals, strict=True)
    low = -math.inf if any(map(math.isnan, lows)) else min(lows)
    return low, math.inf if any(map(math.isnan, highs)) else max(highs)
