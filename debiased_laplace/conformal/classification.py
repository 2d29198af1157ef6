r"""How badly a class fits predicted probabilities ``[N, C]``: the scores THR, APS and RAPS.

With classes in decreasing order of their probability, :math:`o(y)` the place of y there, from one, and
:math:`\rho(y)` the probability of all classes before y:

.. math::
    \mathrm{THR} &= 1 - p(y) \\
    \mathrm{APS} &= \rho(y) + u \, p(y) \\
    \mathrm{RAPS} &= \rho(y) + u \, p(y) + \lambda \max(0, o(y) - k)

with one u for each datum, uniform in [0, 1], or u = 1 if not randomised. Equal probabilities are ordered as the
classes are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from debiased_laplace import _checks
from debiased_laplace._arrays import Array, check_predictions, check_probabilities


class ClassScore:
    """A score of classes; subclasses say which."""

    def of_classes(self, probabilities: Array, uniforms: Array) -> Array:
        """Scores of all classes, ``[N, C]``, of probabilities ``[N, C]`` and one number in [0, 1] for each datum."""
        raise NotImplementedError

    def of(self, predictions: Any, targets: Any, generator: np.random.Generator) -> Array:
        """Scores ``[N]`` of targets ``[N]``."""
        probabilities, targets = check_predictions(predictions, targets)
        scores = self.of_classes(probabilities, generator.random(len(probabilities)))
        return scores[np.arange(len(targets)), targets]

    def sets(self, predictions: Any, threshold: float, generator: np.random.Generator) -> Array:
        """Which classes have a score of at most the threshold, ``[N, C]``."""
        probabilities = check_probabilities(predictions)
        return self.of_classes(probabilities, generator.random(len(probabilities))) <= threshold


@dataclass(frozen=True)
class THR(ClassScore):
    """One minus the probability of the class (also LAC): the smallest sets on average, some of them empty.

    Source: Sadinle, Lei and Wasserman, arXiv 1609.00451.
    """

    def of_classes(self, probabilities: Array, uniforms: Array) -> Array:
        """Scores of all classes, ``[N, C]``."""
        return 1 - probabilities


@dataclass(frozen=True)
class APS(ClassScore):
    """The probability of all classes up to this one: larger sets where the predictor is unsure, fairer coverage.

    Attributes:
        randomised: Whether the last class counts by a random share, as in the paper. Without, sets are larger, never
            empty, and hold the label more often than they say.

    Source: Romano, Sesia and Candès, arXiv 2006.02544.
    """

    randomised: bool = True

    def of_classes(self, probabilities: Array, uniforms: Array) -> Array:
        """Scores of all classes, ``[N, C]``."""
        order = np.argsort(-probabilities, axis=1, kind="stable")
        ordered = np.take_along_axis(probabilities, order, 1)
        before = np.cumsum(ordered, 1) - ordered
        scores = before + self._penalties(probabilities.shape[1])
        scores += uniforms[:, None] * ordered if self.randomised else ordered
        result = np.empty_like(scores)
        np.put_along_axis(result, order, scores, 1)
        return result

    def _penalties(self, n_classes: int) -> Array:
        """Of every place in the order."""
        return np.zeros(n_classes)


@dataclass(frozen=True)
class RAPS(APS):
    """APS with a penalty for every class after the first few: no long sets of hardly probable classes.

    Attributes:
        penalty: Lambda, for each class.
        free: Classes without a penalty, k. The paper chooses both on further held-out data; they must not be chosen on
            those that calibrate.

    Source: Angelopoulos, Bates, Malik and Jordan, arXiv 2009.14193.
    """

    penalty: float = 0.1
    free: int = 1

    def __post_init__(self) -> None:
        _checks.nonnegative(self.penalty, "penalty")
        _checks.whole(self.free, "free", at_least=0)

    def _penalties(self, n_classes: int) -> Array:
        return self.penalty * np.maximum(np.arange(1, n_classes + 1) - self.free, 0)
