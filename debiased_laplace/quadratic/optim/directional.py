r"""Newton steps along eigenvectors with a damping for each of them (ViViT, section 4.2).

In directions :math:`e_k`, with slope :math:`\gamma_k` and curvature :math:`\lambda_k`, the step is
:math:`s_k = -\gamma_k / (\lambda_k + \delta_k)`, and takes off the quadratic model

.. math:: \mathcal R(\delta_k) = -s_k \gamma_k - \tfrac12 s_k^2 \lambda_k. \qquad (10)

Every direction's damping is the one of a grid that takes off most: with certainty, as the bootstrap sees it from the
data of one batch, or on a second batch, which the bootstrap only imitates. Slopes and curvatures of every datum are
``[N, K]``, grids ``[M]`` or ``[M, K]``.

Source: Dangel, Tatzel, Hennig, "ViViT: Curvature access through the generalized Gauss-Newton's low-rank structure"
(arXiv 2106.02624); equation numbers are theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.quadratic.optim.descent import ROUNDING_MARGIN
from debiased_laplace.quadratic.spectrum import DirectionalDerivatives

__all__ = ["DirectionalStep", "damped_step", "directionally_damped_step", "second_batch_damped_step"]

_CHUNK = 2_000_000  # numbers at a time, as long as one direction's fit


@dataclass(frozen=True)
class DirectionalStep:
    r"""A step along K directions.

    Attributes:
        coefficients: :math:`s_k`, ``[K]``. A curvature that is nothing but rounding beside the largest is none, and
            there is no step without any.
        dampings: :math:`\delta_k`, ``[K]``; infinite where no damping of the grid promised a reduction, and no step is
            taken.
        reductions: What each direction's step promised to take off the loss, as its damping was chosen, ``[K]``.
    """

    coefficients: Tensor
    dampings: Tensor
    reductions: Tensor

    def lift(self, directions: Basis | Tensor) -> Tensor:
        """The step in parameter space, ``[D]``; the directions are a basis, or rows ``[K, D]``."""
        if isinstance(directions, Tensor):
            return self.coefficients.to(directions) @ directions
        return directions.lift(self.coefficients)


def damped_step(derivatives: DirectionalDerivatives, damping: float | Tensor = 0.0) -> DirectionalStep:
    r"""The step of equation (9) without its flat directions, with one damping or one for each direction.

    Args:
        derivatives: Slopes and curvatures of every datum of one batch.
        damping: :math:`\delta`, or :math:`\delta_k` as ``[K]``.
    """
    _check(derivatives)
    slopes, curvatures = derivatives.slope, derivatives.curvature
    dampings = torch.as_tensor(damping, dtype=slopes.dtype, device=slopes.device).expand_as(slopes)
    if not bool((dampings >= 0).all()):
        raise ValueError(f"Expected a damping of at least zero, got {float(dampings.min())}.")
    coefficients = _steps(derivatives, dampings)
    return DirectionalStep(coefficients, dampings, _reduction(coefficients, slopes, curvatures))


def directionally_damped_step(
    derivatives: DirectionalDerivatives,
    *,
    grid: Tensor | None = None,
    n_resamples: int = 100,
    level: float = 0.05,
    generator: torch.Generator | int = 0,
) -> DirectionalStep:
    r"""Each direction's damping maximises a confident lower bound of the loss reduction, from one batch.

    The step :math:`s_k(\delta)` is that of the batch. Its reduction (10) is looked at on ``n_resamples`` batches of the
    same size that are drawn from the data with replacement (slope and curvature of a datum stay together); the bound is
    the ``level`` quantile. The bootstrap sees how the data scatter along given directions. That the directions
    were chosen on these data it cannot see: :func:`second_batch_damped_step` does.

    Args:
        derivatives: Slopes and curvatures of every datum of the batch.
        grid: Candidates for :math:`\delta_k`; by default 0 and 60 multiples of :math:`|\lambda_k|`, from 1e-3 to 1e3.
        n_resamples: Bootstrap batches.
        level: The quantile, in (0, 1).
        generator: A CPU generator or a seed, for the bootstrap.

    Memory: ``M * n_resamples`` numbers for a direction, or two million if that is more.

    Example:
        >>> import torch
        >>> from debiased_laplace import GGN
        >>> from debiased_laplace.quadratic.optim import directionally_damped_step
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> ggn = GGN(model, torch.randn(64, 4), torch.randint(3, (64,)), "classification")
        >>> _, basis = ggn.eigenpairs(5)
        >>> step = directionally_damped_step(ggn.directional_derivatives(basis))
        >>> step.lift(basis).shape
        torch.Size([15])
    """
    _check(derivatives)
    if not 0 < level < 1:
        raise ValueError(f"Expected a quantile level between 0 and 1, got {level}.")
    if n_resamples < 1:
        raise ValueError(f"Expected at least one bootstrap batch, got n_resamples={n_resamples}.")
    generator = torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
    n = len(derivatives.slopes)
    drawn = torch.randint(n, (n_resamples, n), generator=generator).to(derivatives.slopes.device)
    counts = torch.zeros(n_resamples, n, dtype=derivatives.slopes.dtype, device=drawn.device)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    weights = counts * derivatives.weights.to(counts)
    slopes, curvatures = weights @ derivatives.slopes, weights @ derivatives.curvatures  # [n_resamples, K]
    candidates = _candidates(grid, derivatives)
    steps = _steps(derivatives, candidates)
    bounds = []
    at_a_time = max(1, _CHUNK // (n_resamples * len(steps)))
    for at in torch.arange(steps.shape[1], device=drawn.device).split(at_a_time):
        reductions = _reduction(steps[:, at], slopes[:, None, at], curvatures[:, None, at])  # [n_resamples, M, K]
        bounds.append(reductions.quantile(level, dim=0))
    return _best(candidates, steps, torch.cat(bounds, 1))


def second_batch_damped_step(
    derivatives: DirectionalDerivatives, second: DirectionalDerivatives, *, grid: Tensor | None = None
) -> DirectionalStep:
    r"""Each direction's damping maximises the loss reduction (10) that a second batch measures.

    The step :math:`s_k(\delta)` is that of the first batch, which chose the directions; the second says how much of it
    to keep.

    Args:
        derivatives: Of the batch that chose the directions.
        second: Of another batch, along the same directions.
        grid: Candidates for :math:`\delta_k`; by default 0 and 60 multiples of :math:`|\lambda_k|`, from 1e-3 to 1e3.
    """
    _check(derivatives)
    _check(second)
    if second.slopes.shape[1] != derivatives.slopes.shape[1]:
        raise ValueError(
            f"Expected both batches along the same directions, got {derivatives.slopes.shape[1]} and "
            f"{second.slopes.shape[1]} of them."
        )
    candidates = _candidates(grid, derivatives)
    steps = _steps(derivatives, candidates)
    return _best(candidates, steps, _reduction(steps, second.slope, second.curvature))


def _steps(derivatives: DirectionalDerivatives, dampings: Tensor) -> Tensor:
    """The steps with dampings ``[..., K]``; none without curvature."""
    denominators = _curvature(derivatives) + dampings
    return torch.where(denominators > 0, -derivatives.slope / denominators, torch.zeros_like(denominators))


def _curvature(derivatives: DirectionalDerivatives) -> Tensor:
    """Curvatures ``[K]``, those that are nothing but rounding beside the largest being zero."""
    curvatures = derivatives.curvature
    rounding = ROUNDING_MARGIN * derivatives.precision * curvatures.abs().amax() if len(curvatures) else 0.0
    return torch.where(curvatures.abs() > rounding, curvatures, torch.zeros_like(curvatures))


def _reduction(steps: Tensor, slopes: Tensor, curvatures: Tensor) -> Tensor:
    return -steps * slopes - 0.5 * steps.square() * curvatures


def _candidates(grid: Tensor | None, derivatives: DirectionalDerivatives) -> Tensor:
    curvature = _curvature(derivatives)
    if grid is None:
        multiples = torch.cat([torch.zeros(1), torch.logspace(-3, 3, 60)]).to(curvature)
        return multiples[:, None] * curvature.abs()
    if grid.ndim not in (1, 2) or (grid.ndim == 2 and grid.shape[1] != len(curvature)) or not len(grid):
        raise ValueError(f"Expected a grid of dampings of shape [M] or [M, {len(curvature)}], got {tuple(grid.shape)}.")
    if not bool((grid >= 0).all()):
        raise ValueError(f"Expected dampings of at least zero, got {float(grid.min())}.")
    grid = grid.to(curvature)
    return grid if grid.ndim == 2 else grid[:, None].expand(-1, len(curvature))


def _best(candidates: Tensor, steps: Tensor, reductions: Tensor) -> DirectionalStep:
    """The candidate of the largest reduction, or no step where all would increase the loss; all ``[M, K]``."""
    best, index = reductions.max(0)
    coefficients, dampings = (x.gather(0, index[None])[0] for x in (steps, candidates))
    kept = best > 0
    zero = torch.zeros_like(best)
    return DirectionalStep(
        torch.where(kept, coefficients, zero), torch.where(kept, dampings, torch.inf), torch.where(kept, best, zero)
    )


def _check(derivatives: DirectionalDerivatives) -> None:
    remedy = "Look for NaN in the data and the parameters."
    _checks.finite(derivatives.slopes, "the slopes of the data", remedy)
    _checks.finite(derivatives.curvatures, "the curvatures of the data", remedy)
