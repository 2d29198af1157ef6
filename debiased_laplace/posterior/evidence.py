r"""The prior precision, and the noise of a regression, that maximise the Laplace marginal likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import brentq, minimize
from torch import Tensor
from tqdm import tqdm

from debiased_laplace.posterior.gaussian import Posterior


def maximise_marginal_likelihood(posterior: Posterior, *, per_block: bool = False) -> Tensor:
    r"""Prior precision(s) that maximise the Laplace marginal likelihood.

    The stationary point satisfies MacKay's equation (1992), for all parameters or for each block,

    .. math:: \delta \|\theta^* - \mu_0\|^2 = \sum_i \frac{\beta\lambda_i}{\beta\lambda_i + \delta}.

    The left side grows with :math:`\delta` and the right side falls, so there is exactly one solution, found
    by Brent's method; no gradient steps, no learning rate.

    Returns:
        ``[1]`` or ``[n_parts]``, float64.

    Raises:
        ValueError: If there is no maximum: no curvature at all, or parameters equal to the prior mean.
    """
    basis = posterior.basis
    scaled = (posterior.scale * posterior.curvatures.double()).detach().cpu()
    squares = (posterior.mean - posterior.prior_mean).double().square().cpu()
    if posterior.fixed is not None:
        squares = squares.where(~posterior.fixed.cpu(), 0.0)
        scaled = scaled.where(posterior.normal_form.column_prior.isfinite().cpu(), 0.0)
    if not per_block:
        return torch.tensor([_stationary(scaled, float(squares.sum()), "all parameters")], dtype=torch.float64)
    part_of = basis.per_parameter(torch.arange(len(basis.parts), dtype=torch.float64)).cpu()
    names = [", ".join(basis.blocks[i].name for i in members) for members in basis.members]
    return torch.tensor(
        [
            _stationary(of_part, float(squares[part_of == index].sum()), repr(name))
            for index, (name, of_part) in enumerate(zip(names, scaled.split(basis.sizes), strict=True))
        ],
        dtype=torch.float64,
    )


def maximise_with_noise(
    posterior: Posterior, mean_loss: float, n_outputs: float, *, per_block: bool = False
) -> tuple[Tensor, float]:
    r"""Prior precision(s) and noise variance of a regression that maximise the Laplace marginal likelihood together.

    The noise variance satisfies MacKay's other equation (1992), with :math:`\bar\ell` the mean loss at unit noise and
    :math:`\gamma = \delta \|\theta^* - \mu_0\|^2` the effective number of parameters at the best prior precision,

    .. math:: \sigma^2 (N C - \gamma) = 2 N \bar\ell / T.

    The more noise, the fewer parameters: where the left side is positive it grows with :math:`\sigma^2`, and there is
    exactly one solution.

    Args:
        posterior: Its prior precision and noise variance have no effect.
        mean_loss: Of the training data, half the squared error of a datum.
        n_outputs: C; of dense outputs the mean number of those of a datum that have a target.
        per_block: One prior precision for each block.

    Returns:
        Prior precisions ``[1]`` or ``[n_parts]``, float64, and the noise variance.

    Raises:
        ValueError: If there is no maximum: no error at all, or none in the prior precision.
    """
    if not mean_loss > 0:
        raise ValueError(
            "The marginal likelihood has no maximum in the noise of a network without any error on its training data, "
            f"got a mean loss of {mean_loss:g}. Tune on held-out data, or set sigma_noise yourself."
        )
    total = 2 * posterior.n_data * mean_loss / posterior.temperature

    def best_prior(log_noise: float) -> Tensor:
        at_this_noise = replace(posterior, noise_variance=math.exp(log_noise))
        return maximise_marginal_likelihood(at_this_noise, per_block=per_block)

    def excess(log_noise: float) -> float:
        n_effective = float(replace(posterior, prior_precision=best_prior(log_noise)).scatter())
        return math.exp(log_noise) * (posterior.n_data * n_outputs - n_effective) - total

    lower = upper = math.log(total / (posterior.n_data * n_outputs))  # without parameters, which need more noise
    while excess(upper) < 0:
        upper += 1
    log_noise = lower if lower == upper else brentq(excess, lower, upper, xtol=1e-12, rtol=1e-14)
    return best_prior(log_noise), math.exp(log_noise)


@dataclass(frozen=True)
class MaximalEvidence:
    """What :func:`maximise_over_priors` found.

    Attributes:
        prior_precisions: ``[K]``, float64.
        gain: How much larger the log marginal likelihood is than at the start, in nats.
        slope: The largest derivative there in the logarithm of a prior precision, in nats.
        converged: Whether the iteration ended by itself.
        undetermined: ``[K]``, boolean, which ones stay at the start, since there is no maximum in them.
    """

    prior_precisions: Tensor
    gain: float
    slope: float
    converged: bool
    undetermined: Tensor


def maximise_over_priors(
    posterior: Posterior,
    start: Tensor,
    expand: Callable[[Tensor], Tensor],
    *,
    max_iterations: int = 1000,
    progress_bar: bool = False,
) -> MaximalEvidence:
    r"""Several prior precisions that maximise the Laplace marginal likelihood, of any structure.

    With :math:`x = \log\delta`, :math:`\log\det P` is the logarithm of a polynomial in :math:`e^x` with coefficients
    that are not negative (principal minors of the curvature), and therefore convex; so are the other terms of

    .. math:: -2 \log p = \log\det P - \sum_t n_t x_t + \sum_t e^{x_t} \|\theta^*_t - \mu_{0t}\|^2 + \ldots

    There is one maximum, :math:`\delta_t \|\theta^*_t - \mu_{0t}\|^2 = \gamma_t \leq n_t`, and L-BFGS-B finds it below
    this bound (MacKay 1992; Byrd, Lu, Nocedal, Zhu 1995). Where there is none (parameters that equal the prior mean, or
    have no curvature), a prior precision stays at the start.

    Args:
        posterior: Its prior precision has no effect.
        start: ``[K]``.
        expand: What the posterior takes, from ``[K]``; each of its entries is one of them.
        max_iterations: Of L-BFGS-B.
        progress_bar: Show a tqdm bar.

    Raises:
        ValueError: If there is no maximum in any of them.
    """
    basis = posterior.basis
    free = torch.ones(basis.n_params, dtype=torch.bool) if posterior.fixed is None else ~posterior.fixed.cpu()
    owners = (
        basis.per_parameter(expand(torch.arange(1.0, len(start) + 1, dtype=torch.float64))).cpu().round().long() - 1
    )
    squares = (posterior.mean - posterior.prior_mean).double().square().cpu()
    sizes, norms = (
        torch.zeros(len(start), dtype=torch.float64).index_add(0, owners[free], values[free])
        for values in (torch.ones_like(squares), squares)
    )
    start = start.detach().cpu().double()

    def log_det(logarithms: Tensor) -> tuple[Tensor, Tensor]:
        """Log-determinants, and their derivatives."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = logarithms.clone().requires_grad_()
            ratio = replace(posterior, prior_precision=expand(leaf.exp())).log_det_ratio
            return ratio.detach().cpu(), torch.autograd.grad(ratio, leaf)[0]

    before, slope = log_det(start.log())
    chosen = (norms > 0) & (-slope > 1e-12 * sizes)  # minus the slope is the effective number of parameters
    if not bool(chosen.any()):
        raise ValueError(
            "The marginal likelihood has no maximum in any of the prior precisions: the parameters are equal to the "
            'prior mean or without any curvature. Use method="gridsearch", or set prior_precision yourself.'
        )
    upper = (sizes / norms).log()[chosen]

    def objective(values: Any) -> tuple[float, Any]:
        logarithms = start.log()
        logarithms[chosen] = torch.as_tensor(values, dtype=torch.float64)
        ratio, derivatives = log_det(logarithms)
        scatter = logarithms.exp() * norms
        return 0.5 * float(ratio + scatter[chosen].sum()), (0.5 * (derivatives + scatter))[chosen].numpy()

    with tqdm(desc="Marginal likelihood", disable=not progress_bar, leave=False) as bar:
        optimum = minimize(
            objective, start.log()[chosen].clamp_max(upper).numpy(), jac=True, method="L-BFGS-B",
            bounds=[(None, float(bound)) for bound in upper], callback=lambda _: bar.update(),
            options={"maxiter": max_iterations, "maxfun": 2 * max_iterations, "ftol": 1e-14, "gtol": 1e-7},
        )  # fmt: skip
    result = start.clone()
    result[chosen] = torch.as_tensor(optimum.x, dtype=torch.float64).exp()
    gain = 0.5 * float(before + (start * norms)[chosen].sum()) - float(optimum.fun)
    return MaximalEvidence(result, gain, float(abs(optimum.jac).max()), optimum.status != 1, ~chosen)


def _stationary(curvatures: Tensor, square_norm: float, name: str) -> float:
    if square_norm == 0 or float(curvatures.sum()) == 0:
        what = "equal to the prior mean" if square_norm == 0 else "without any curvature"
        raise ValueError(
            f"The marginal likelihood has no maximum in the prior precision of {name}: the parameters are {what}. "
            'Use method="gridsearch", or set prior_precision yourself.'
        )

    def slope(log_precision: float) -> float:
        precision = math.exp(log_precision)
        return precision * square_norm - float((curvatures / (curvatures + precision)).sum())

    # At the upper end the right side is below its value at zero; at the lower end above half the rank there.
    upper = math.log(len(curvatures) / square_norm) + 1
    lower = upper
    while slope(lower) > 0:
        lower -= 5
    return math.exp(brentq(slope, lower, upper, xtol=1e-12, rtol=1e-14))
