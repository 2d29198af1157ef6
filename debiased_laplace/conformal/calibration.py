"""From scores of held-out data to sets of new ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from debiased_laplace import _checks
from debiased_laplace.conformal import ranks
from debiased_laplace.conformal.classification import ClassScore
from debiased_laplace.conformal.regression import IntervalScore


@dataclass(frozen=True)
class PredictionSets:
    """Sets of new data; :func:`calibrate` makes it.

    Attributes:
        score: How badly a label fits.
        threshold: Labels with a score of at most this are in the set; infinite after too few data: then all are.
        n: Data that calibrated.
    """

    score: ClassScore | IntervalScore
    threshold: float
    n: int

    def __call__(self, predictions: Any, *, seed: int = 0) -> Any:
        """Sets of new data.

        Args:
            predictions: As those that calibrated.
            seed: Of the random numbers of a randomised score. With several batches give each another one.

        Returns:
            Of a classifier ``[N, C]``, true for the classes in the set. Of a regression two arrays, the lower and the
            upper ends.
        """
        return self.score.sets(predictions, self.threshold, _generator(seed, 1))


def calibrate(
    score: ClassScore | IntervalScore,
    predictions: Any,
    targets: Any,
    alpha: float = 0.1,
    *,
    batch: int = 1,
    at_least: int | None = None,
    seed: int = 0,
) -> PredictionSets:
    r"""Find the threshold below which the scores of new labels lie.

    With n data and no ties, a set holds its label with a probability between :math:`1 - \alpha` and
    :math:`1 - \alpha + 1/(n+1)`, on average over calibration and new data. Given the calibration data the probability
    is Beta distributed with :math:`r` and :math:`n + 1 - r`, where :math:`r = \lceil (n+1)(1-\alpha) \rceil`.

    Args:
        score: :class:`THR`, :class:`APS` or :class:`RAPS` of classes, :class:`AbsoluteResidual`,
            :class:`NormalisedResidual` or :class:`CQR` of numbers.
        predictions: Of data that neither trained nor tuned the predictor: probabilities ``[N, C]``, or a pair of
            arrays ``[N]`` or ``[N, C]`` (mean and standard deviation; of ``CQR`` lower and upper quantile).
        targets: Class indices ``[N]``, or numbers in the shape of the predictions.
        alpha: Share of sets that may miss.
        batch: New data whose sets shall hold together with probability :math:`1 - \alpha`.
        at_least: How many of these shall hold; all by default.
        seed: Of the random numbers of a randomised score.

    Returns:
        A function from predictions to sets.

    Raises:
        TypeError: If predictions are of no known kind.
        ValueError: If shapes do not fit, something is not finite, or ``alpha`` is not between 0 and 1.

    Example:
        >>> from debiased_laplace.conformal import THR
        >>> held, labels = [[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]], [0, 1, 1]
        >>> calibrate(THR(), held, labels, alpha=0.25)([[0.5, 0.5], [0.95, 0.05]]).tolist()
        [[True, True], [True, False]]

    Source: Papadopoulos et al. 2002; batches: :mod:`debiased_laplace.conformal.ranks`.
    """
    if not isinstance(score, (ClassScore, IntervalScore)):
        raise TypeError(f"Expected a score such as THR() or NormalisedResidual(), got {score!r}.")
    _checks.whole(seed, "seed", at_least=0)
    scores = score.of(predictions, targets, _generator(seed, 0))
    return PredictionSets(score, ranks.threshold(scores, alpha, batch=batch, at_least=at_least), len(scores))


def _generator(seed: int, use: int) -> np.random.Generator:
    """Calibration and new data have other random numbers: else the first of both would share theirs."""
    return np.random.default_rng([seed, use])
