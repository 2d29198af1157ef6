r"""Conjugate gradients on the quadratic of a batch, with step magnitudes from the same batch or from another.

The quadratic of a batch around :math:`\theta_0` is
:math:`q(\theta_0 + x) = \ell + g^\top x + \tfrac12 x^\top H x`, per-datum means; vectors are ``[D]``. CG walks along
directions :math:`d_1, d_2, \dots` that are conjugate for H, by :math:`\tau = -\text{slope}/\text{curvature}` each.
On the batch that chose them both are biased; debiased CG takes them from a second batch.

Source: Tatzel, Mucsányi, Hackel, Hennig, "Debiasing Mini-Batch Quadratics for Applications in Deep Learning"
(arXiv 2410.14325), algorithm 1 and figures 4 and 5.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace.quadratic.optim.descent import Descent, Preconditioned, QuadraticModel

__all__ = ["CGResult", "Stop", "conjugate_gradients"]


_REMEDIES = {
    "ggn": "More damping lets them go on.",
    "hessian": 'More damping, or the Gauss-Newton matrix (curvature="ggn"), never negative, lets them go on.',
    None: "More damping, or a curvature that is never negative, lets them go on.",
}


class Stop(enum.Enum):
    """Why conjugate gradients stopped."""

    STEPS = "all the steps asked for were taken"
    TOLERANCE = "the gradient on the batch of the directions fell below the tolerance"
    PRECISION = "nothing but rounding is left of gradient or curvature on the batch of the directions"
    CURVATURE = "negative or zero curvature on the batch of the directions"
    SECOND_CURVATURE = "negative or zero curvature on the batch of the magnitudes"


@dataclass(frozen=True)
class CGResult:
    r"""The path of K steps; slopes and curvatures are those of the quadratic with damping.

    Attributes:
        directions: :math:`d_k` as rows, of any length, ``[K, D]``.
        step_sizes: :math:`\tau_k` that were taken, ``[K]``; minus the slope over the curvature.
        slopes: :math:`d_k^\top\nabla q` on the batch of the magnitudes, where its steps have led, ``[K]``.
        curvatures: :math:`d_k^\top H d_k` on the batch of the magnitudes, ``[K]``.
        first_slopes: The same on the batch of the directions, where *its* steps would have led, ``[K]``.
        first_curvatures: On the batch of the directions, ``[K]``.
        gradient_norms: On the batch of the directions, at the start and after each of its steps, ``[K + 1]``.
        damping: Added to the diagonal of both curvature matrices.
        stopped: Why it ended.
    """

    directions: Tensor
    step_sizes: Tensor
    slopes: Tensor
    curvatures: Tensor
    first_slopes: Tensor
    first_curvatures: Tensor
    gradient_norms: Tensor
    damping: float
    stopped: Stop

    @property
    def n_steps(self) -> int:
        """K, how many steps were taken."""
        return len(self.step_sizes)

    @property
    def delta(self) -> Tensor:
        """Where the path ends, from the center, ``[D]``."""
        return self.step_sizes.to(self.directions) @ self.directions

    @property
    def path(self) -> Tensor:
        """All points from the center on, the first of them zero, ``[K + 1, D]``."""
        moves = self.step_sizes.to(self.directions)[:, None] * self.directions
        return torch.cat([torch.zeros_like(moves[:1] if len(moves) else self.delta[None]), moves.cumsum(0)])

    @property
    def first_step_sizes(self) -> Tensor:
        """What the batch of the directions alone would have taken, ``[K]``."""
        return -self.first_slopes / self.first_curvatures

    def measure(self, slopes: Tensor, curvatures: Tensor) -> tuple[Tensor, Tensor]:
        r"""Slopes and curvatures of any quadratic along the directions, at the points of the path (figure 4).

        For a path that other data gave, both are unbiased for those of the population. Their quotient, with a
        minus, is how far that quadratic would go: ``result.measure(*other.projected(result.directions))``.

        Args:
            slopes: :math:`d_k^\top g` at the center, ``[K]``.
            curvatures: :math:`d_k^\top H d_l`, ``[K, K]``.

        Returns:
            Slopes and curvatures with the damping of the path, ``[K]`` each.
        """
        matrix = curvatures + self.damping * (self.directions @ self.directions.mT).to(curvatures)
        return slopes + matrix.tril(-1) @ self.step_sizes.to(matrix), matrix.diagonal()


def conjugate_gradients(
    directions: QuadraticModel,
    magnitudes: QuadraticModel | None = None,
    *,
    n_steps: int,
    damping: float = 0.0,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    tolerance: float | None = None,
) -> CGResult:
    r"""Minimise a quadratic by conjugate gradients; with ``magnitudes``, the paper's algorithm 1 (debiased CG).

    CG runs on the first quadratic as ever: directions, residuals and conjugacy come from it alone, along its path
    :math:`x_k`. Without ``magnitudes`` that path is the result. With them, the result is the path that takes the same
    directions and whose steps are those of the second quadratic where this path has led,

    .. math:: \tilde x_{k+1} = \tilde x_k + \tau_k d_k, \qquad
        \tau_k = -\frac{d_k^\top (g' + (H' + \delta I) \tilde x_k)}{d_k^\top (H' + \delta I) d_k}.

    Each is an exact line search on the second quadratic, so that this one never increases. With the same data for both,
    the two are the same. Cost: a product with H for each step, and one with H';
    one more of both, which measures their rounding, and as much as a gradient.

    The result is as precise as the products, which have the model's dtype: where the curvature is singular, the
    solution of least norm. Before every step, the slope has to be more than what rounding makes of the gradient there,
    and the curvature more than what it makes of products, or the path ends. So no step raises the quadratic that chose
    it, and none follows rounding out into the null space.

    Args:
        directions: The quadratic of the batch that chooses the directions.
        magnitudes: That of the batch that says how far to go, around the same center; None for the same.
        n_steps: At most so many.
        damping: :math:`\delta`, added to the diagonal of both matrices.
        preconditioner: A symmetric positive definite map ``[D] -> [D]``, roughly the inverse of the matrix.
        tolerance: Stop when the first gradient's norm is below so much of what it was at the center. By default 1e-8,
            or twice the precision of products where that is more (2e-7 for a model in single precision).

    Returns:
        The path, and why it ended.

    Raises:
        NonFiniteError: For a loss, gradient, slope or curvature that is not finite.
        ValueError: For quadratics of different sizes, or a preconditioner that is not positive definite.

    Warns:
        RuntimeWarning: If it stopped at negative or zero curvature. The path up to there is returned.

    Example:
        >>> import torch
        >>> from debiased_laplace.quadratic.optim import conjugate_gradients
        >>> class Bowl:
        ...     loss, gradient = 0.0, torch.tensor([1.0, 2.0]).double()
        ...     def matvec(self, u):
        ...         return torch.tensor([1.0, 4.0]).double() * u
        >>> result = conjugate_gradients(Bowl(), n_steps=2)
        >>> [round(x, 9) for x in result.delta.tolist()]
        [-1.0, -0.5]
    """
    if n_steps < 1:
        raise ValueError(f"Expected at least one step for n_steps, got {n_steps}.")
    _checks.nonnegative(damping, "damping")
    if tolerance is not None:
        _checks.nonnegative(tolerance, "tolerance")
    precondition = Preconditioned(preconditioner)
    first = Descent(directions, damping, "the batch of the directions", precondition)
    second = None
    if magnitudes is not None:
        second = Descent(magnitudes, damping, "the batch of the magnitudes", precondition)
    if second is not None and second.gradient.shape != first.gradient.shape:
        raise ValueError(
            f"Expected two quadratics of one model, got {first.gradient.numel()} parameters for the directions and "
            f"{second.gradient.numel()} for the magnitudes."
        )

    taken: list[Tensor] = []  # the directions
    numbers: list[tuple[float, float, float, float, float]] = []
    norms = [float(first.gradient.norm())]
    steepest, squared = precondition(first.gradient)
    direction = -steepest
    # Squared lengths of the direction and of the path, and their inner product, with the preconditioner's inverse.
    length, distance, inner = squared, 0.0, 0.0
    while True:
        if norms[-1] <= norms[0] * (first.default_tolerance if tolerance is None else tolerance):
            stopped = Stop.TOLERANCE
            break
        if len(taken) == n_steps:
            stopped = Stop.STEPS
            break
        first_slope, first_curvature = first.look(direction, length**0.5)
        if abs(first_slope) <= length**0.5 * first.rounding(distance**0.5):
            stopped = Stop.PRECISION
            break
        if first_curvature <= first.curvature_rounding:
            only_rounding = first_curvature and first_curvature >= -first.curvature_rounding
            stopped = Stop.PRECISION if only_rounding else Stop.CURVATURE
            break
        slope, curvature = (first_slope, first_curvature) if second is None else second.look(direction, length**0.5)
        if curvature <= (second or first).curvature_rounding:
            stopped = Stop.SECOND_CURVATURE
            break
        size = -first_slope / first_curvature
        first.move(size)
        if second is not None:
            second.move(-slope / curvature)
        taken.append(direction)
        numbers.append((-slope / curvature, slope, curvature, first_slope, first_curvature))
        norms.append(float(first.gradient.norm()))
        before = squared
        steepest, squared = precondition(first.gradient)
        ratio = squared / before
        direction = -steepest + ratio * direction
        distance += size * (2 * inner + size * length)
        inner, length = ratio * (inner + size * length), squared + ratio**2 * length
    if stopped in (Stop.CURVATURE, Stop.SECOND_CURVATURE):
        source = magnitudes if stopped is Stop.SECOND_CURVATURE else directions
        warnings.warn(
            f"Conjugate gradients stopped after {len(taken)} steps: {stopped.value}. "
            f"{_REMEDIES.get(getattr(source, 'kind', None), _REMEDIES[None])}",
            RuntimeWarning,
            stacklevel=2,
        )
    rows = torch.stack(taken) if taken else first.gradient.new_zeros(0, first.gradient.numel())
    sizes, slopes, curvatures, first_slopes, first_curvatures = (
        torch.tensor(numbers, dtype=torch.float64).reshape(-1, 5).unbind(1)
    )
    return CGResult(
        directions=rows,
        step_sizes=sizes,
        slopes=slopes,
        curvatures=curvatures,
        first_slopes=first_slopes,
        first_curvatures=first_curvatures,
        gradient_norms=torch.tensor(norms, dtype=torch.float64),
        damping=damping,
        stopped=stopped,
    )
