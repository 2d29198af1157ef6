r"""Prior precision: a whole grid in one pass over validation data, or the marginal likelihood in closed form."""

from __future__ import annotations

import math
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
from debiased_laplace.temperature import AS_GOOD, warn_the_caller, warn_undetermined


@dataclass(frozen=True)
class PriorCurve:
    """What a grid search saw.

    Attributes:
        prior_precisions: ``[R]``, the grid.
        losses: ``[R]``, mean negative log predictive probability of the validation data, in nats, or another loss.
            Some may be infinite.
        link: Link approximation the losses were computed with.
        tolerance: Losses that differ by less are equally good.
    """

    prior_precisions: Tensor
    losses: Tensor
    link: str
    tolerance: float = AS_GOOD

    @property
    def best_index(self) -> int:
        """Place of the smallest prior precision, the one with most uncertainty, that is as good as the best."""
        return int(self.prior_precisions.where(self._as_good, math.inf).argmin())

    @property
    def best(self) -> float:
        """The prior precision there."""
        return float(self.prior_precisions[self.best_index])

    @property
    def at_edge(self) -> bool:
        """Whether the best value is the smallest or the largest of the grid."""
        return self.best in (float(self.prior_precisions.min()), float(self.prior_precisions.max()))

    @property
    def is_flat(self) -> bool:
        """Whether all from the best value to the end of the grid are equally good: less uncertainty does not help."""
        from_best = self.prior_precisions >= self.best
        return int(from_best.sum()) > 1 and bool(self._as_good[from_best].all())

    def warn(self) -> None:
        """Say so if the best value is an end of the grid, or is not determined."""
        if self.is_flat:
            warn_undetermined("prior precision", self._why_flat)
        elif self.at_edge and len(self.losses) > 1:
            warn_of_the_edge(self.best, smallest=self.best == float(self.prior_precisions.min()))

    @property
    def _as_good(self) -> Tensor:
        return self.losses <= self.losses.min() + self.tolerance

    @property
    def _why_flat(self) -> str:
        return (
            f"all from {self.best:.3g} to the end of the grid are equally good (within {self.tolerance:g}). The "
            "smallest of them is used, the one with most uncertainty; set prior_precision yourself to have less"
        )


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
    output_temperature: float = 1.0,
) -> PriorCurve:
    """Validation loss of every prior precision of a grid, in one pass: projections are computed once.

    Regression uses the Gaussian predictive with the posterior's noise variance added. Outputs are divided by
    ``output_temperature`` before the link.

    Raises:
        ValueError: If the loader is empty, a target is invalid, or a prior precision or the temperature is not positive
            (or is not one, for regression).

    Warns:
        UserWarning: If the best value lies at the edge of the grid, or is not determined.
    """
    likelihood.check_link(link)
    tau = checked_temperature(likelihood, output_temperature)
    grid = [replace(posterior, prior_precision=p.reshape(1)) for p in _checks.prior_precisions(prior_precisions)]
    covariance = likelihood.needs_covariance(link)
    generator = torch.Generator().manual_seed(seed)
    normals = standard_normals((n_samples, network.n_outputs), posterior.mean, generator) if link == "mc" else None
    total, n = torch.zeros(len(grid), dtype=torch.float64, device=network.device), 0
    stream = _data.labelled(batches, targets_key)
    for inputs, targets, n_batch in tqdm(
        stream, desc="Prior precision", unit="batch", disable=not progress_bar, leave=False
    ):
        targets = likelihood.prepare_targets(targets, network.n_outputs).to(network.device)
        mean, spread = functional_moments(network, grid, inputs, covariance=covariance)
        if likelihood.is_regression:
            losses = gaussian_nll(mean, spread, targets, posterior.noise_variance)
        else:
            losses = likelihood.log_loss(likelihood.predictive(mean / tau, spread / tau**2, link, normals), targets)
        total += losses.double().sum(-1)
        n += n_batch
    if n == 0:
        raise ValueError(EMPTY)
    losses = (total / n).cpu()
    check_losses(losses)
    curve = PriorCurve(torch.stack([p.prior_precision[0] for p in grid]).cpu(), losses, link)
    curve.warn()
    return curve


def check_losses(losses: Tensor, remedy: str = "Look for NaN in the validation data.") -> None:
    """Raise a :class:`NonFiniteError` for losses that are not defined, or all infinite."""
    if bool(losses.isnan().any()) or not bool(losses.isfinite().any()):
        _checks.finite(losses, "the validation losses", remedy)


EMPTY = "Expected validation data, got an empty val_loader. A generator can be read only once."


def warn_of_the_edge(best: float, *, smallest: bool, of: str = "") -> None:
    """Say that the best prior precision is an end of the grid."""
    side, name = ("smallest", "log_prior_prec_min") if smallest else ("largest", "log_prior_prec_max")
    warn_the_caller(
        f"The best prior precision{of}, {best:.3g}, is the {side} of the grid: the optimum may lie beyond. "
        f"Change {name}" + (
            "." if smallest
            else ", unless the loss has levelled off (then the posterior has nothing to add on these data)."
        )
    )  # fmt: skip


def checked_temperature(likelihood: Likelihood, temperature: float) -> float:
    """A positive number, which is one for a regression, or a ``ValueError``."""
    number = _checks.positive(temperature, "output_temperature")
    if likelihood.is_regression and number != 1:
        raise ValueError(f"A regression has no link, and so no output temperature: expected 1, got {number:g}.")
    return number


@dataclass(frozen=True)
class TunedNoise:
    """What a search of prior precision and observation noise found.

    Attributes:
        prior_precision: For all parameters.
        noise_variance: Of the observations, the best for it; that of the posterior if all errors are zero.
        curve: The search; its prior precisions are meant at the best noise of each.
    """

    prior_precision: float
    noise_variance: float
    curve: PriorCurve


def noise_search(
    network: Network,
    posterior: Posterior,
    likelihood: Likelihood,
    batches: Iterable[Any],
    prior_precisions: Tensor,
    *,
    targets_key: str = "labels",
    progress_bar: bool = False,
) -> TunedNoise:
    r"""Prior precision and noise variance of a regression, jointly, in one pass over validation data.

    With :math:`v(\delta')` the functional variance at unit noise, that at noise :math:`\sigma^2` and prior precision
    :math:`\delta'/\sigma^2` is :math:`\sigma^2 v(\delta')`: the best noise has a closed form, see :func:`best_noise`.

    Args:
        network: The model with its blocks.
        posterior: Its prior precision has no effect, and its noise variance only if all errors are zero: then the
            smaller the noise, the smaller the loss, without end, and it stays as it is.
        likelihood: Of a regression.
        batches: Validation data.
        prior_precisions: ``[R]``, those at unit noise.
        targets_key: Where dictionary-like batches have their targets.
        progress_bar: Show a tqdm bar.

    Raises:
        ValueError: If it is no regression, the loader is empty, or a target is invalid.

    Warns:
        UserWarning: If the best value lies at the edge of the grid, or is not determined.
    """
    if not likelihood.is_regression:
        raise ValueError(f"Expected a regression to tune its noise, got {type(likelihood).__name__}.")
    grid = [
        replace(posterior, prior_precision=p.reshape(1), noise_variance=1.0)
        for p in _checks.prior_precisions(prior_precisions)
    ]
    found, rounding = [], 0.0
    stream = _data.labelled(batches, targets_key)
    for inputs, targets, _ in tqdm(stream, desc="Noise and prior", unit="batch", disable=not progress_bar, leave=False):
        targets = likelihood.prepare_targets(targets, network.n_outputs)
        mean, variances = functional_moments(network, grid, inputs, covariance=False)
        rounding = torch.finfo(mean.dtype).eps
        found.append((mean.double(), variances.double(), targets.to(mean).double()))
    if not found:
        raise ValueError(EMPTY)
    mean, targets = (torch.cat([own[i] for own in found]) for i in (0, 2))
    variances = torch.cat([own[1] for own in found], 1)
    if nothing_left(targets - mean, targets, rounding):
        warn_undetermined("observation noise", ALL_ERRORS_ZERO.format("as it was"))
        fixed = torch.as_tensor(posterior.noise_variance, dtype=torch.float64).to(mean)
        noise = fixed.cpu().expand(len(grid))
        losses = gaussian_nll(mean, fixed * variances, targets, fixed).mean(-1).cpu()
    else:
        noise, losses = (own.cpu() for own in best_noise(mean, variances, targets))
    check_losses(losses)
    own = torch.stack([p.prior_precision[0].cpu() for p in grid]) / noise
    curve = PriorCurve(own, losses, "probit")
    curve.warn()
    return TunedNoise(curve.best, float(noise[curve.best_index]), curve)


ALL_ERRORS_ZERO = (
    "all errors on them are zero up to rounding, and the smaller the noise, the smaller the loss. It is {}; use "
    "validation data that the network was not trained on"
)


def nothing_left(errors: Tensor, targets: Tensor, rounding: float) -> bool:
    """Whether errors are nothing but rounding of the targets.

    Args:
        errors: Targets minus outputs.
        targets: Of the same shape.
        rounding: Of the outputs' precision.
    """
    return float(errors.abs().max()) <= 4 * rounding * float(targets.abs().max())


def best_noise(mean: Tensor, variances: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    r"""The noise variance with the smallest loss, :math:`\sigma^2 = \mathrm{mean}\big((y - f)^2 / (1 + v)\big)`.

    Args:
        mean: ``[N, C]``.
        variances: ``[R, N, C]``, functional variances v at unit noise.
        targets: ``[N, C]``.

    Returns:
        Noise variances and mean negative log predictive densities (nats for each datum), ``[R]``.
    """
    noise = ((targets - mean).square() / (1 + variances)).mean((-2, -1))
    total = noise[:, None, None] * (1 + variances)
    return noise, gaussian_nll(mean, total, targets, 0.0).mean(-1)


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


def maximise_with_noise(
    posterior: Posterior, mean_loss: float, n_outputs: int, *, per_block: bool = False
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
        n_outputs: C.
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
        own = replace(posterior, noise_variance=math.exp(log_noise))
        return maximise_marginal_likelihood(own, per_block=per_block)

    def excess(log_noise: float) -> float:
        n_effective = float(replace(posterior, prior_precision=best_prior(log_noise)).scatter())
        return math.exp(log_noise) * (posterior.n_data * n_outputs - n_effective) - total

    lower = upper = math.log(total / (posterior.n_data * n_outputs))  # without parameters, which need more noise
    while excess(upper) < 0:
        upper += 1
    log_noise = lower if lower == upper else brentq(excess, lower, upper, xtol=1e-12, rtol=1e-14)
    return best_prior(log_noise), math.exp(log_noise)


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
