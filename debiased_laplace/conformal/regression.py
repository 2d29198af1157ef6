r"""How badly numbers fit a regression's prediction: absolute and normalised residuals, and quantiles.

Predictions are pairs of arrays ``[N]`` or ``[N, C]``: (mean, standard deviation), or (lower, upper) for :class:`CQR`.
Of C outputs the score is the largest, so that intervals hold all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from debiased_laplace._arrays import Array, as_array


class IntervalScore:
    """A score of numbers; subclasses say which."""

    def of_outputs(self, first: Array, second: Array, targets: Array) -> Array:
        """Scores of all outputs, in the shape of the targets."""
        raise NotImplementedError

    def bounds(self, first: Array, second: Array, threshold: float | Array) -> tuple[Array, Array]:
        """Lower and upper ends of the numbers with a score of at most the threshold."""
        raise NotImplementedError

    def of(self, predictions: Any, targets: Any, generator: np.random.Generator) -> Array:
        """Scores ``[N]``: the largest over outputs."""
        first, second = self._checked(predictions)
        (targets,) = _finite({"targets": targets}, first.shape)
        return self.of_outputs(first, second, targets).reshape(len(first), -1).max(1)

    def sets(self, predictions: Any, threshold: float, generator: np.random.Generator) -> tuple[Array, Array]:
        """Lower and upper ends, each in the shape of the predictions."""
        first, second = self._checked(predictions)
        return self.bounds(first, second, threshold)

    def _checked(self, predictions: Any) -> tuple[Array, Array]:
        mean, deviation = _pair(predictions, ("mean", "standard deviation"))
        if deviation.min() <= 0:
            raise ValueError(
                f"Expected positive standard deviations, got a smallest one of {deviation.min():.3g}. Give the total "
                "one, with the noise."
            )
        return mean, deviation


@dataclass(frozen=True)
class AbsoluteResidual(IntervalScore):
    """Distance from the mean: intervals of one width for all data; the standard deviation is not used."""

    def of_outputs(self, first: Array, second: Array, targets: Array) -> Array:
        """Scores of all outputs, in the shape of the targets."""
        return np.abs(targets - first)

    def bounds(self, first: Array, second: Array, threshold: float | Array) -> tuple[Array, Array]:
        """Mean minus and plus the threshold."""
        return first - threshold, first + threshold


@dataclass(frozen=True)
class NormalisedResidual(IntervalScore):
    """Distance from the mean in standard deviations: intervals as wide as the predictor is unsure.

    Source: Papadopoulos, Gammerman and Vovk 2008; Lei et al., arXiv 1604.04173, section 5.2.
    """

    def of_outputs(self, first: Array, second: Array, targets: Array) -> Array:
        """Scores of all outputs, in the shape of the targets."""
        return np.abs(targets - first) / second

    def bounds(self, first: Array, second: Array, threshold: float | Array) -> tuple[Array, Array]:
        """Mean minus and plus so many standard deviations."""
        return first - threshold * second, first + threshold * second


@dataclass(frozen=True)
class CQR(IntervalScore):
    r"""How far outside of predicted quantiles (lower, upper), negative inside: both are moved by one number.

    Of a Gaussian prediction with :math:`1 - \alpha` coverage they are
    :math:`\mu \pm \Phi^{-1}(1 - \alpha/2) \sigma`. Where they are moved inwards beyond each other the set is empty.

    Source: Romano, Patterson and Candès, arXiv 1905.03222.
    """

    def of_outputs(self, first: Array, second: Array, targets: Array) -> Array:
        """Scores of all outputs, in the shape of the targets."""
        return np.maximum(first - targets, targets - second)

    def bounds(self, first: Array, second: Array, threshold: float | Array) -> tuple[Array, Array]:
        """The quantiles, moved outwards by the threshold."""
        return first - threshold, second + threshold

    def _checked(self, predictions: Any) -> tuple[Array, Array]:
        lower, upper = _pair(predictions, ("lower", "upper"))
        if (lower > upper).any():
            raise ValueError(
                f"Expected lower quantiles up to the upper ones, got crossed ones for {int((lower > upper).sum())} "
                "numbers. Sort them."
            )
        return lower, upper


def _pair(predictions: Any, names: tuple[str, str]) -> tuple[Array, Array]:
    if not isinstance(predictions, (tuple, list)) or len(predictions) != 2:
        raise TypeError(f"Expected a pair ({names[0]}, {names[1]}), got {type(predictions).__name__}.")
    first, second = _finite(dict(zip(names, predictions, strict=True)))
    return first, second


def _finite(named: dict[str, Any], shape: tuple[int, ...] | None = None) -> Sequence[Array]:
    arrays = {name: as_array(values, name).astype(np.float64) for name, values in named.items()}
    shape = next(iter(arrays.values())).shape if shape is None else shape
    for name, array in arrays.items():
        if array.shape != shape or len(shape) not in (1, 2) or 0 in shape:
            raise ValueError(
                f"Expected arrays of one shape, [N] or [N, C] with at least one datum, got {name} {array.shape} where "
                f"the first is {shape}. Reshape them: nothing is broadcast."
            )
        if not np.isfinite(array).all():
            raise ValueError(f"Expected finite {name}, got NaN or infinity. Look for NaN in the inputs or the model.")
    return list(arrays.values())
