r"""Prior precision: a whole grid in one pass over validation data, or the marginal likelihood in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import brentq, minimize
from torch import Tensor
from tqdm import tqdm

from debiased_laplace import _checks, _data
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.gradients import Network
from debiased_laplace.posterior.gaussian import Posterior, standard_normals
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.posterior.temperature import AS_GOOD, warn_the_caller, warn_undetermined


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
        noise_variance: Of the observations (divided by their profile), the best for it; that of the posterior if all
            errors are zero.
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
    profile: Tensor | None = None,
    targets_key: str = "labels",
    progress_bar: bool = False,
) -> TunedNoise:
    r"""Prior precision and noise variance of a regression, jointly, on validation data.

    With :math:`v(\delta')` the functional variance at unit noise, that at noise :math:`\sigma^2` and prior precision
    :math:`\delta'/\sigma^2` is :math:`\sigma^2 v(\delta')`: the best noise has a closed form, see :func:`best_noise`.
    Where to look for :math:`\delta'` depends on the units of the targets. So the grid is one of prior precisions at the
    noise that the network has without uncertainty, its mean squared error on these data: one pass for that, and one for
    the whole grid.

    Args:
        network: The model with its blocks.
        posterior: Its prior precision has no effect, and its noise variance only if all errors are zero: then the
            smaller the noise, the smaller the loss, without end, and it stays as it is.
        likelihood: Of a regression.
        batches: Validation data.
        prior_precisions: ``[R]``, at the noise of the network alone.
        profile: ``r: [C]``, ratios of the standard deviations of the outputs, which are part of the curvature; ones by
            default. The noise variance is then that of the outputs divided by them.
        targets_key: Where dictionary-like batches have their targets.
        progress_bar: Show a tqdm bar.

    Raises:
        ValueError: If it is no regression, the loader is empty, or a target is invalid.

    Warns:
        UserWarning: If the best value lies at the edge of the grid, or is not determined.
    """
    if not likelihood.is_regression:
        raise ValueError(f"Expected a regression to tune its noise, got {type(likelihood).__name__}.")
    prior_precisions = _checks.prior_precisions(prior_precisions)
    batches = list(batches) if isinstance(batches, Iterator) else batches
    alone = []
    for inputs, targets, _ in _data.labelled(batches, targets_key):
        targets = likelihood.prepare_targets(targets, network.n_outputs)
        outputs = network.outputs(inputs)
        alone.append((outputs.double(), targets.to(outputs).double()))
    if not alone:
        raise ValueError(EMPTY)
    outputs, targets = (torch.cat(column) for column in zip(*alone, strict=True))
    ratios = torch.ones(network.n_outputs, dtype=torch.float64) if profile is None else profile
    squares = ratios.to(outputs).square()
    errors = targets - outputs
    none_left = nothing_left(errors, targets, torch.finfo(network.dtype).eps)
    fixed = torch.as_tensor(posterior.noise_variance, dtype=torch.float64).to(outputs)
    unit = fixed if none_left else (errors.square() / squares).mean()
    _checks.finite(unit, "the errors on the validation data", "Look for NaN in the validation data, or in the model.")
    at_unit_noise = prior_precisions.to(unit) * unit
    grid = [replace(posterior, prior_precision=p.reshape(1), noise_variance=1.0) for p in at_unit_noise]
    found = []
    stream = _data.labelled(batches, targets_key)
    for inputs, targets, _ in tqdm(stream, desc="Noise and prior", unit="batch", disable=not progress_bar, leave=False):
        mean, variances = functional_moments(network, grid, inputs, covariance=False)
        targets = likelihood.prepare_targets(targets, network.n_outputs)
        found.append((mean.double(), variances.double(), targets.to(mean).double()))
    mean, targets = (torch.cat([own[i] for own in found]) for i in (0, 2))
    variances = torch.cat([own[1] for own in found], 1)
    if none_left:
        warn_undetermined("observation noise", ALL_ERRORS_ZERO.format("as it was"))
        noise, losses = (
            fixed.expand(len(grid)),
            gaussian_nll(mean, fixed * variances, targets, fixed * squares).mean(-1),
        )
    else:
        noise, losses = best_noise(mean, variances, targets, squares)
    losses = losses.cpu()
    check_losses(losses)
    curve = PriorCurve((at_unit_noise / noise).cpu(), losses, "probit")
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


def best_noise(
    mean: Tensor, variances: Tensor, targets: Tensor, profile: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    r"""The noise variance with the smallest loss, :math:`\sigma^2 = \mathrm{mean}\big((y - f)^2 / (r^2 + v)\big)`.

    Args:
        mean: ``[N, C]``.
        variances: ``[R, N, C]``, functional variances v at unit noise.
        targets: ``[N, C]``.
        profile: :math:`r^2`, one number or ``[C]``: the noise of an output is :math:`\sigma^2 r^2`.

    Returns:
        Noise variances and mean negative log predictive densities (nats for each datum), ``[R]``.
    """
    noise = ((targets - mean).square() / (profile + variances)).mean((-2, -1))
    total = noise[:, None, None] * (profile + variances)
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

    def doubt(logarithms: Tensor) -> tuple[Tensor, Tensor]:
        """Log-determinants, and their derivatives."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = logarithms.clone().requires_grad_()
            ratio = replace(posterior, prior_precision=expand(leaf.exp())).log_det_ratio
            return ratio.detach().cpu(), torch.autograd.grad(ratio, leaf)[0]

    before, slope = doubt(start.log())
    chosen = (norms > 0) & (-slope > 1e-12 * sizes)  # minus the slope is the effective number of parameters
    if not bool(chosen.any()):
        raise ValueError(
            "The marginal likelihood has no maximum in any of the prior precisions: the parameters are equal to the "
            'prior mean or without any curvature. Use method="gridsearch", or set prior_precision yourself.'
        )
    upper = (sizes / norms).log()[chosen]

    def objective(values: Any) -> tuple[float, Any]:
        own = start.log()
        own[chosen] = torch.as_tensor(values, dtype=torch.float64)
        ratio, derivatives = doubt(own)
        scatter = own.exp() * norms
        return 0.5 * float(ratio + scatter[chosen].sum()), (0.5 * (derivatives + scatter))[chosen].numpy()

    with tqdm(desc="Marginal likelihood", disable=not progress_bar, leave=False) as bar:
        found = minimize(
            objective, start.log()[chosen].clamp_max(upper).numpy(), jac=True, method="L-BFGS-B",
            bounds=[(None, float(bound)) for bound in upper], callback=lambda _: bar.update(),
            options={"maxiter": max_iterations, "maxfun": 2 * max_iterations, "ftol": 1e-14, "gtol": 1e-7},
        )  # fmt: skip
    result = start.clone()
    result[chosen] = torch.as_tensor(found.x, dtype=torch.float64).exp()
    gain = 0.5 * float(before + (start * norms)[chosen].sum()) - float(found.fun)
    return MaximalEvidence(result, gain, float(abs(found.jac).max()), found.status != 1, ~chosen)


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
