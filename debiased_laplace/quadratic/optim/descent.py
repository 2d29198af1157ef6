r"""One quadratic while a path goes on: its gradient, slopes and curvatures, and how much of them is rounding.

Vectors are ``[D]``. docs/theory.md, "Precision", has the sizes of the rounding errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from debiased_laplace import _checks

__all__ = ["Descent", "Preconditioned", "QuadraticModel"]

#: How many units of rounding are told from nothing: of a gradient, and of a curvature.
ROUNDING_MARGIN = 2

#: The default tolerance where rounding allows it.
TOLERANCE = 1e-8


class QuadraticModel(Protocol):
    """What CG asks of a quadratic; :class:`~debiased_laplace.quadratic.quadratic.Quadratic` has it.

    Two more members are used where there are any: ``precision``, the relative rounding error of products at best
    (otherwise that of the dtype of gradient and products), and ``gradient_rounding()``, what rounding makes of the
    gradient, ``[D]`` (otherwise the precision times the gradient, which is too small where its terms cancel).
    """

    @property
    def loss(self) -> float:
        """The value at the center."""
        ...

    @property
    def gradient(self) -> Tensor:
        """The gradient at the center, ``[D]``."""
        ...

    def matvec(self, u: Tensor, /) -> Tensor:
        """The curvature matrix times a vector, ``[D] -> [D]``."""
        ...


def inner_product(a: Tensor, b: Tensor) -> float:
    """Of two vectors, summed in float64."""
    return float(a.double() @ b.double())


class Preconditioned:
    """From a gradient to the preconditioned one, and their inner product; the identity without a map."""

    def __init__(self, apply: Callable[[Tensor], Tensor] | None) -> None:
        self.apply = apply

    def __call__(self, gradient: Tensor) -> tuple[Tensor, float]:
        """P g and g^T P g, for a gradient ``[D]``."""
        if self.apply is None:
            return gradient, inner_product(gradient, gradient)
        steepest = self.apply(gradient).double()
        if steepest.shape != gradient.shape:
            raise ValueError(
                f"Expected a preconditioner that keeps the shape {tuple(gradient.shape)}, got {tuple(steepest.shape)}."
            )
        squared = inner_product(gradient, steepest)
        if not squared > 0 and bool(gradient.any()):
            raise ValueError(
                f"Expected a positive definite preconditioner, got one with g^T P g = {squared:g} for a gradient g. "
                "Give the inverse of a damped curvature, for instance one over a positive diagonal."
            )
        return steepest, squared


class Descent:
    r"""The gradient of one quadratic while a path goes on, and how much of it is rounding.

    With a preconditioner P, lengths are those of :math:`P^{-1/2} x`, and of :math:`P^{1/2} g` for gradients, in which
    it is the identity.
    """

    def __init__(self, quadratic: QuadraticModel, damping: float, name: str, precondition: Preconditioned) -> None:
        if not math.isfinite(quadratic.loss):
            raise _checks.NonFiniteError(
                f"Expected a finite loss on {name}, got {quadratic.loss}. "
                "Look for NaN in the data and the parameters; after a step, take a smaller one or more damping."
            )
        _checks.finite(quadratic.gradient, f"the gradient on {name}", "Look for NaN in the data and the parameters.")
        self.quadratic, self.damping, self.name, self.precondition = quadratic, damping, name, precondition
        self.gradient = quadratic.gradient.double()
        self._dtype = quadratic.gradient.dtype
        self.precision: float = getattr(quadratic, "precision", torch.finfo(self._dtype).eps)
        self._product = torch.zeros_like(self.gradient)
        self.curvature_rounding = 0.0
        self._norm = 0.0  # of the curvature matrix: the largest that a product has shown
        self._error: float | None = None  # of a product with a vector of length one

    def look(self, direction: Tensor, length: float) -> tuple[float, float]:
        """Slope and curvature along a direction, from here."""
        undamped = self._multiply(direction)
        self._product = undamped + self.damping * direction
        slope, curvature = inner_product(direction, self.gradient), inner_product(direction, self._product)
        if not (math.isfinite(slope) and math.isfinite(curvature)):
            raise _checks.NonFiniteError(
                f"Expected a finite slope and curvature on {self.name}, got {slope} and {curvature}. "
                "Look for an overflow in products with the curvature matrix."
            )
        if length:
            if self._error is None:  # a factor of three changes nothing but the rounding
                self._error = self._length(self._multiply(3 * direction) / 3 - undamped) / length
            self._norm = max(self._norm, self._length(undamped) / length)
        self.curvature_rounding = ROUNDING_MARGIN * self._rounding * length**2
        return slope, curvature

    def _multiply(self, direction: Tensor) -> Tensor:
        unit = math.ldexp(1.0, -math.frexp(float(direction.abs().max()))[1])  # products neither under- nor overflow
        product = self.quadratic.matvec((unit * direction).to(self._dtype))
        if not hasattr(self.quadratic, "precision"):
            self.precision = max(self.precision, torch.finfo(product.dtype).eps)
        return product.double() / unit

    def _length(self, gradient: Tensor) -> float:
        return self.precondition(gradient)[1] ** 0.5

    @property
    def _rounding(self) -> float:
        """Of a product with a vector of length one: measured, and not less than the dtype says."""
        return max(self.precision * self._norm, self._error or 0.0)

    @property
    def default_tolerance(self) -> float:
        """How much of the gradient may be left at the end: :data:`TOLERANCE`, or rounding where that is more."""
        return max(TOLERANCE, ROUNDING_MARGIN * self.precision)

    def rounding(self, distance: float) -> float:
        """The length of a gradient, at a distance from the center, that is nothing but rounding."""
        return ROUNDING_MARGIN * (self._rounding_at_center + self._rounding * distance)

    @cached_property
    def _rounding_at_center(self) -> float:
        measure = getattr(self.quadratic, "gradient_rounding", None)
        by_dtype = self.precision * self._length(self.quadratic.gradient.double())
        return by_dtype if measure is None else max(by_dtype, self._length(measure().double()))

    def move(self, size: float) -> None:
        """Go along the direction that was looked at last."""
        self.gradient = self.gradient + size * self._product
