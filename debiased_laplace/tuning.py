r"""Prior precision: a whole grid in one pass over validation data, or the marginal likelihood in closed form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor
from tqdm import tqdm

from debiased_laplace import _checks, _data
from debiased_laplace.gradients import Network
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.posterior import Posterior, standard_normals
from debiased_laplace.predictive import functional_moments


@dataclass(frozen=True)
class PriorCurve:
    """What a grid search saw.

    Attributes:
        prior_precisions: ``[R]``, the grid.
        losses: ``[R]``, mean negative log predictive probability of the validation data, in nats.
        link: Link approximation the losses were computed with.
    """

    prior_precisions: Tensor
    losses: Tensor
    link: str

    @property
    def best(self) -> float:
        """The prior precision with the smallest loss."""
        return float(self.prior_precisions[self.losses.argmin()])

    @property
    def at_edge(self) -> bool:
        """Whether the best value is the first or the last of the grid."""
        return int(self.losses.argmin()) in (0, len(self.losses) - 1)


def grid_search(
    network: Network,
    posterior: Posterior,
    likelihood: Likelihood,
    batches: Iterable[Any],
    prior_precisions: Tensor,
    *,
    link: str = "probit",
    n_samples: int = 100,
    seed: int = 0,
    targets_key: str = "labels",
    progress_bar: bool = False,
) -> PriorCurve:
    """Validation loss of every prior precision of a grid, in one pass: projections are computed once.

    Regression uses the Gaussian predictive with the posterior's noise variance added.

    Raises:
        ValueError: If the loader is empty, a target is invalid, or a prior precision is not positive.

    Warns:
        UserWarning: If the best value lies at the edge of the grid.
    """
    likelihood.check_link(link)
    grid = [replace(posterior, prior_precision=p.reshape(1)) for p in _checks.prior_precisions(prior_precisions)]
    covariance = likelihood.needs_covariance(link)
    generator = torch.Generator().manual_seed(seed)
    normals = standard_normals((n_samples, network.n_outputs), posterior.mean, generator) if link == "mc" else None
    total, n = torch.zeros(len(grid), dtype=torch.float64, device=network.device), 0
    stream = _data.labelled(batches, targets_key)
    for inputs, targets, n_batch in tqdm(
        stream, desc="Prior precision", unit="batch", disable=not progress_bar, leave=False
    ):
        likelihood.check_targets(targets, network.n_outputs)
        mean, spread = functional_moments(network, grid, inputs, covariance=covariance)
        targets = targets.to(network.device)
        if likelihood.is_regression:
            losses = gaussian_nll(mean, spread, targets, posterior.noise_variance)
        else:
            losses = likelihood.log_loss(likelihood.predictive(mean, spread, link, normals), targets)
        total += losses.double().sum(-1)
        n += n_batch
    if n == 0:
        raise ValueError("Expected validation data, got an empty val_loader. A generator can be read only once.")
    losses = (total / n).cpu()
    _checks.finite(losses, "the validation losses", "Look for NaN in the validation data.")
    curve = PriorCurve(torch.stack([p.prior_precision[0] for p in grid]).cpu(), losses, link)
    if curve.at_edge and len(grid) > 1:
        side, name = (
            ("smallest", "log_prior_prec_min") if int(losses.argmin()) == 0 else ("largest", "log_prior_prec_max")
        )
        warnings.warn(
            f"The best prior precision, {curve.best:.3g}, is the {side} of the grid: the optimum may lie beyond. "
            f"Change {name}" + (
                ", unless the loss has levelled off (then the posterior has nothing to add on these data)."
                if side == "largest" else "."
            ),
            stacklevel=2,
        )  # fmt: skip
    return curve


def gaussian_nll(mean: Tensor, variance: Tensor, targets: Tensor, noise_variance: float | Tensor) -> Tensor:
    """Negative log predictive density of every datum, summed over outputs: ``[..., N]``, in nats."""
    total = variance + noise_variance
    return 0.5 * ((targets - mean).square() / total + total.log() + math.log(2 * math.pi)).sum(-1)


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
            _stationary(own, float(squares[part_of == index].sum()), repr(name))
            for index, (name, own) in enumerate(zip(names, scaled.split(basis.sizes), strict=True))
        ],
        dtype=torch.float64,
    )


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
