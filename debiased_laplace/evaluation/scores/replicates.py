"""A score with its resamples, and the interval that fits the kind of score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from debiased_laplace._arrays import Array
from debiased_laplace.evaluation.scores import intervals
from debiased_laplace.evaluation.scores.intervals import CONFIDENCE, Interval

ScoreKind = Literal["statistic", "mean", "root", "proportion", "calibration"]


@dataclass(frozen=True, eq=False)
class Replicates:
    r"""A score of the data at hand, and of resamples of them.

    Attributes:
        value: The score of the data.
        replicates: ``[B]``, the scores of B resamples.
        n: Number of data, of two kinds the smaller; ``None`` if it is not known, which leaves percentiles.
        kind: What decides the interval, see :meth:`interval`.
        contributions: ``[n]``, numbers whose mean the score is: of a ``"mean"``; of a ``"root"`` its square; zeros and
            ones of a ``"proportion"``.
        bounds: Range of the score.
        unseen: For a confidence, scores that the data cannot rule out though no resample has them.
        of: The two scores of a difference.

    Example:
        >>> first, second = Replicates(0.5, np.array([0.25, 0.5, 0.75])), Replicates(0.25, np.array([0.0, 0.25, 0.5]))
        >>> first.interval(0.5), (first - second).interval(0.5)
        ((0.375, 0.625), (0.25, 0.25))
    """

    value: float
    replicates: Array
    n: int | None = None
    kind: ScoreKind = "statistic"
    contributions: Array | None = None
    bounds: Interval = (-math.inf, math.inf)
    unseen: Callable[[float], Sequence[float]] | None = None
    of: tuple[Replicates, Replicates] | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the score is, of the data and of all resamples."""
        return math.isfinite(self.value) and bool(np.isfinite(self.replicates).all())

    @property
    def is_constant(self) -> bool:
        """Whether no resample differs from the data, up to rounding."""
        scale = max(abs(score.value) for score in (self, *(self.of or ())))
        return float(np.ptp(self.replicates)) <= intervals.ROUNDING * scale

    @property
    def standard_error(self) -> float:
        """Standard deviation of the replicates, unbiased for n data; infinite if one of them is not finite.

        Where no resample differs from the data, it is the width of the 95 % interval over that of a standard normal
        distribution's.

        Raises:
            ValueError: For fewer than two resamples.
        """
        if len(self.replicates) < 2:
            raise ValueError(f"Expected at least two resamples for a standard error, got {len(self.replicates)}.")
        if not self.is_finite:
            return math.inf
        if self.n is None:
            return _deviation(self.replicates, 1)
        if self.n == 1 or self.is_constant:
            low, high = self.interval(CONFIDENCE)
            return (high - low) / (2 * intervals.normal_quantile(CONFIDENCE))
        return _deviation(self.replicates, 1) * math.sqrt(self.n / (self.n - 1))

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """The interval that fits the kind of score.

        * A proportion has the exact one, a difference of two of the same data the score interval.
        * A mean, and a paired difference of means, has Student's or the skewness-corrected one. So has the square of a
          root, and a difference of two, :math:`a - b = (a^2 - b^2) / (a + b)`.
        * A calibration error has the basic bootstrap interval, ``2 value - percentiles`` (noise has made it too large,
          and resampling does the same once more) or Student's with the bootstrap's error, whichever reaches further.
          In a difference the noise cancels: Student's alone.
        * Other statistics have Student's interval and expanded percentiles, whichever reaches further.

        To these belong scores that were not ruled out (``unseen``). A difference that never varies is as uncertain as
        its parts, unless these vary and it is always zero: then it is the same score. One datum, and a
        difference on fewer than :data:`~debiased_laplace.evaluation.scores.intervals.MIN_DATA` data, has the whole
        range of the score. Without ``n``, or with infinite replicates, it is the central ``confidence`` of the
        replicates, interpolated linearly; those that are not defined (an infinite score minus an infinite one) could
        be anything, and count as minus infinity for the lower bound and as infinity for the upper one.

        Args:
            confidence: Between zero and one.

        Returns:
            ``(lower, upper)``, in the unit of the score.

        Raises:
            ValueError: If ``confidence`` is not between zero and one.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"Expected a confidence between 0 and 1, got {confidence}. Write 95 % as 0.95.")
        if self.n is not None and self.n < (2 if self.of is None else intervals.MIN_DATA):
            return self._proportion(confidence) if self.kind == "proportion" and self.of is None else self.bounds
        if self.n is None or not self.is_finite:
            return self._percentiles((1 - confidence) / 2)
        low, high = self._from_data(self.n, confidence)
        if self.unseen is not None:
            low, high = intervals.hull((low, high), *((score, score) for score in self.unseen(confidence)))
        if self.of is not None and self.kind != "proportion" and self.is_constant and not self._is_the_same_score:
            (low_1, high_1), (low_2, high_2) = (part.interval(confidence) for part in self.of)
            low, high = intervals.hull((low, high), (low_1 - high_2, high_1 - low_2))
        return max(low, self.bounds[0]), min(high, self.bounds[1])

    @property
    def _is_the_same_score(self) -> bool:
        # Zero on every resample though the scores themselves vary: such as the RMSE of equal means.
        assert self.of is not None
        return self.value == 0 and not self.replicates.any() and not self.of[0].is_constant

    def _from_data(self, n: int, confidence: float) -> Interval:
        if self.kind == "proportion":
            return self._proportion(confidence)
        if self.contributions is not None:
            low, high = intervals.mean(self.contributions, confidence)
            return (math.sqrt(max(low, 0.0)), math.sqrt(max(high, 0.0))) if self.kind == "root" else (low, high)
        expanded = self._percentiles(intervals.expanded(confidence, n))
        half = intervals.student_quantile(n, confidence) * _deviation(self.replicates, 0) * math.sqrt(n / (n - 1))
        student = self.value - half, self.value + half
        if self.kind == "calibration":
            basic = 2 * self.value - expanded[1], 2 * self.value - expanded[0]
            return intervals.hull(student, basic) if self.of is None else student
        return intervals.hull(student, expanded)

    def _proportion(self, confidence: float) -> Interval:
        assert self.n is not None
        if self.of is None:
            return intervals.proportion(round(self.value * self.n), self.n, confidence)
        assert self.contributions is not None
        only = (round(float((sign * self.contributions).clip(min=0).sum())) for sign in (1, -1))
        return intervals.paired_proportions(*only, self.n, confidence)

    def _percentiles(self, tail: float) -> Interval:
        ordered = np.sort(self.replicates)  # undefined ones last
        defined = ordered[: len(ordered) - int(np.isnan(self.replicates).sum())]
        if len(defined) == len(ordered):
            return _quantile(ordered, tail), _quantile(ordered, 1 - tail)
        missing = np.full(len(ordered) - len(defined), math.inf)
        lowest, highest = np.concatenate([-missing, defined]), np.concatenate([defined, missing])
        return _quantile(lowest, tail), _quantile(highest, 1 - tail)

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
        contributions, unseen, first, second = None, None, self.unseen, other.unseen
        with np.errstate(invalid="ignore"):
            if self.contributions is not None and other.contributions is not None:
                contributions = self.contributions - other.contributions
                if self.kind == "root" and self.value + other.value > 0:
                    contributions = contributions / (self.value + other.value)
            replicates = self.replicates - other.replicates
        if first is not None and second is not None and self.kind in ("mean", "calibration"):

            def unseen(confidence: float) -> list[float]:
                return [a - b for a, b in zip(first(confidence), second(confidence), strict=True)]

        return Replicates(
            self.value - other.value, replicates, None if self.n is None or other.n is None else min(self.n, other.n),
            "mean" if self.kind == "root" else self.kind, contributions,
            (self.bounds[0] - other.bounds[1], self.bounds[1] - other.bounds[0]), unseen, (self, other),
        )  # fmt: skip


def _deviation(values: Array, correction: int) -> float:
    # Squares of tiny numbers would vanish.
    scale = float(np.abs(values).max()) or 1.0
    return scale * float((values / scale).std(ddof=correction))


def _quantile(values: Array, probability: float) -> float:
    # Linear interpolation as numpy.quantile's, which makes NaN of two equal infinities.
    ordered, place = np.sort(values), probability * (len(values) - 1)
    low, high = float(ordered[math.floor(place)]), float(ordered[math.ceil(place)])
    fraction = place - math.floor(place)
    if low == high or (np.isinf(low) and np.isinf(high)):
        return low if probability < 0.5 else high
    return (1 - fraction) * low + fraction * high
