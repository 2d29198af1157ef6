r"""A prior precision for each part of the basis and a temperature of the outputs, jointly, on validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

from debiased_laplace import _checks, _data
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.gradients import Network
from debiased_laplace.posterior.gaussian import Posterior, standard_normals
from debiased_laplace.posterior.predictive import functional_moments, part_variances
from debiased_laplace.posterior.temperature import (
    AS_GOOD,
    TEMPERATURES,
    minimise,
    temperature_scaling,
    unit_of,
    warn_the_caller,
    warn_undetermined,
)
from debiased_laplace.posterior.tuning import (
    EMPTY,
    PriorCurve,
    check_losses,
    checked_temperature,
    gaussian_nll,
    warn_of_the_edge,
)

SELECTIONS = ("best", "one_standard_error")


@dataclass(frozen=True)
class TunedPrior:
    """What a joint search found.

    Attributes:
        prior_precisions: ``[n_parts]``, or ``[1]`` for all, float64.
        temperature: What outputs are divided by before the link.
        loss: Mean negative log predictive probability of the validation data with them, in nats, without interpolation.
        curve: The search of one prior precision for all parts at temperature one (or at the temperature that was given,
            if it was not tuned).
        temperature_alone: Temperature and loss of temperature scaling, of the network without any uncertainty (where it
            was not tuned, the temperature that was given): how much of the gain needs no posterior.
        undetermined: What the data do not determine: ``"temperature"``, ``"prior precision"``. Of equally good values
            the temperature is the one nearest to 1, and a prior precision the smallest, with most uncertainty.
    """

    prior_precisions: Tensor
    temperature: float
    loss: float
    curve: PriorCurve
    temperature_alone: tuple[float, float]
    undetermined: tuple[str, ...] = ()


def joint_search(
    network: Network,
    posterior: Posterior,
    likelihood: Likelihood,
    batches: Iterable[Any],
    grid: Tensor,
    *,
    per_part: bool,
    temperature: bool,
    link: str = "probit",
    n_samples: int = 100,
    seed: int = 0,
    targets_key: str = "labels",
    progress_bar: bool = False,
    output_temperature: float = 1.0,
    noise_variance: float | Tensor | None = None,
    selection: str = "best",
) -> TunedPrior:
    r"""Prior precisions, of every part of the basis or of all, and a temperature of the outputs, on validation data.

    .. math:: \min_{\delta, \tau} -\frac1N \sum_n \log p\Big(y_n \,\Big|\, \frac{f_n}{\tau},
        \frac{1}{\tau^2} \sum_p V_{pn}(\delta_p)\Big)

    One pass collects the mean f and a table of V over the grid. For links that need variances alone, :math:`\log V_p`
    is interpolated linearly in :math:`\log\delta_p` between the ends of the grid, and L-BFGS-B minimises over all
    logarithms from two starts: the best of the grid with its best temperature, and with that of temperature scaling.
    The data are read again for the exact loss (a generator's batches are kept for it). Links of covariances have roots
    without a derivative at equal eigenvalues: the prior precision is one of the grid, each with its best temperature.
    The result is not worse than the best of the grid. Of values that are equally good, within
    :data:`~debiased_laplace.posterior.temperature.AS_GOOD`, prior precisions are the smallest. If the data determine no
    temperature of the network alone (see :func:`~debiased_laplace.posterior.temperature.temperature_scaling`) none is
    tuned.

    With ``selection="one_standard_error"`` it is the smallest prior precision of the grid, with its best temperature,
    that the data do not tell from the best: its loss is larger by at most one standard error of the paired difference
    (Breiman et al. 1984). A temperature does on data like the training data most of what a posterior does, and leaves
    the prior precision undetermined there; the posterior with the most uncertainty is the one that still has some where
    the data are unlike them.

    Memory: ``R * n_parts * N * C`` numbers of the network's precision, or ``R * N * C**2`` for a link of covariances
    (twice that while they are joined), and some ten times ``n_parts * N * C`` in double precision.

    Args:
        network: The model with its blocks.
        posterior: Its prior precision has no effect.
        likelihood: What the outputs mean.
        batches: Validation data.
        grid: ``[R]``, prior precisions.
        per_part: One prior precision for each part of the basis; only with variances (probit, regression). One that is
            good up to the end of the grid says that its part needs in effect no uncertainty.
        temperature: Tune the temperature, between 1/20 and 20; not for regression, nor for ``"bridge_norm"``, which
            does not depend on it.
        link: Link approximation.
        n_samples: Draws for ``"mc"``.
        seed: Their seed.
        targets_key: Where dictionary-like batches have their targets.
        progress_bar: Show a tqdm bar.
        output_temperature: The temperature if it is not tuned.
        noise_variance: Of a regression, also ``[C]``; by default the posterior's.
        selection: ``"best"`` or ``"one_standard_error"``, of one prior precision for all parts.

    Raises:
        ValueError: If the loader is empty, a target or an argument is invalid.

    Warns:
        UserWarning: If the prior precision of all parts lies at an edge of the grid, or that of a part at the lower; if
            the data do not determine the temperature or a prior precision.
    """
    likelihood.check_link(link)
    fixed = checked_temperature(likelihood, output_temperature)
    if temperature and likelihood.is_regression:
        raise ValueError("A regression has no link, and so no temperature to tune: expected temperature=False.")
    if temperature and link == "bridge_norm":
        raise ValueError(
            "link_approx='bridge_norm' does not depend on the scale of the outputs, so that there is no temperature to "
            "tune: expected another link or temperature=False."
        )
    if selection not in SELECTIONS or (per_part and selection != "best"):
        options = SELECTIONS[:1] if per_part else SELECTIONS
        raise ValueError(f"Expected selection out of {list(options)} with per_part={per_part}, got {selection!r}.")
    covariance = likelihood.needs_covariance(link)
    if per_part and covariance:
        raise ValueError(
            "Expected a link_approx that needs variances alone, 'probit', for one prior precision for each part, got "
            f"{link!r}. Use 'probit', or one for all."
        )
    if not covariance and isinstance(batches, Iterator):
        batches = list(batches)
    precisions = _checks.prior_precisions(grid).unique()
    loss, table = _tabulate(
        network, posterior, likelihood, batches, precisions, per_part, link, n_samples, seed, targets_key, progress_bar,
        posterior.noise_variance if noise_variance is None else noise_variance,
    )  # fmt: skip
    start = 1.0 if temperature else fixed
    search = _Search(loss, table, precisions, start)
    losses = torch.tensor([search.on_the_grid(index, start) for index in range(len(precisions))], dtype=torch.float64)
    check_losses(losses)
    curve, undetermined = PriorCurve(precisions, losses, link), []
    best = curve.best_index
    if temperature:
        own = temperature_scaling(likelihood, loss.mean, loss.targets)
        alone, search.fixed = (own.value, own.loss), own.value if own.undetermined else None
        if own.undetermined:
            warn_undetermined("temperature", own.undetermined)
            undetermined.append("temperature")
    else:
        alone = fixed, float(loss.without_uncertainty(fixed))
    search.unit = unit_of(alone[0])
    other = search.best_on_the_grid(alone[0]) if temperature else best
    ends = {search.climb(best), search.climb(other)} if covariance else {best}
    profile = [(search.profile(index)[1], index, search.profile(index)[0]) for index in sorted(ends)]
    least, index, tau = min([(float(losses[best]), best, start), *profile])  # of the grid: without interpolation
    if selection == "one_standard_error":
        start = min(range(len(precisions)), key=lambda position: search.profile(position)[1])
        least, index, tau = search.most_uncertain(start, search.profile(start)[0])
    elif covariance:
        least, index, tau = search.as_good_below(least, index, tau)
    found, flat = precisions[index].repeat(table.shape[1]), [False] * table.shape[1]
    if selection == "best" and covariance:
        flat = [search.is_as_good_above(least, index)]
    elif selection == "best":

        def exact(prior: Tensor, tau: float) -> float:
            at_prior = replace(posterior, prior_precision=prior)
            return _exact_loss(loss, network, at_prior, batches, targets_key, tau)

        prior, tau_there, value = search.descend([(best, search.profile(best)[0]), (other, alone[0])])
        if value < least and (value := exact(prior, tau_there)) < least:
            least, found, tau = value, prior, tau_there
        prior, flat = search.more_uncertain(found, tau)
        if not torch.equal(prior, found) and (value := exact(prior, tau)) <= least + AS_GOOD:
            least, found = value, prior
    assert least <= float(losses.min()) + 2 * AS_GOOD or selection != "best"
    if _warn_of_edges(found, precisions, posterior, per_part, flat):
        undetermined.append("prior precision")
    return TunedPrior(found, tau, least, curve, alone, tuple(undetermined))


@dataclass(frozen=True)
class _ValidationLoss:
    """Mean negative log predictive probability of data as a function of their variances and the temperature."""

    likelihood: Likelihood
    link: str
    normals: Tensor | None
    noise_variance: float | Tensor
    mean: Tensor
    targets: Tensor

    def of(self, means: Sequence[Tensor], targets: Sequence[Tensor]) -> _ValidationLoss:
        """The same of other data."""
        if not means:
            raise ValueError(EMPTY)
        mean = torch.cat(list(means)).double()
        return replace(self, mean=mean, targets=torch.cat([t.to(mean.device) for t in targets]))

    def __call__(self, spread: Tensor, temperature: float | Tensor) -> Tensor:
        return self.of_data(spread, temperature).mean()

    def of_data(self, spread: Tensor, temperature: float | Tensor) -> Tensor:
        """Of every datum, ``[N]``."""
        if self.likelihood.is_regression:
            return gaussian_nll(self.mean, spread, self.targets, self.noise_variance)
        scaled = self.mean / temperature, spread / temperature**2
        return self.likelihood.log_loss(self.likelihood.predictive(*scaled, self.link, self.normals), self.targets)

    def without_uncertainty(self, temperature: float) -> Tensor:
        if self.likelihood.is_regression:
            return self(torch.zeros_like(self.mean), 1.0)
        return self.likelihood.loss(self.mean / temperature, self.targets).mean()


def _exact_loss(
    loss: _ValidationLoss, network: Network, posterior: Posterior, batches: Iterable[Any], targets_key: str,
    temperature: float,
) -> float:  # fmt: skip
    """Without interpolation, from another pass over the data."""
    means, variances, kept = [], [], []
    for inputs, targets, _ in _data.labelled(batches, targets_key):
        mean, variance = functional_moments(network, posterior, inputs, covariance=False)
        means.append(mean)
        variances.append(variance)
        kept.append(loss.likelihood.prepare_targets(targets, network.n_outputs))
    return float(loss.of(means, kept)(torch.cat(variances).double(), temperature))


def _tabulate(
    network: Network, posterior: Posterior, likelihood: Likelihood, batches: Iterable[Any], precisions: Tensor,
    per_part: bool, link: str, n_samples: int, seed: int, targets_key: str, progress_bar: bool,
    noise_variance: float | Tensor,
) -> tuple[_ValidationLoss, Tensor]:  # fmt: skip
    """The loss, and variances ``[R, n_parts, N, C]``, or ``[R, 1, N, C]`` or ``[R, 1, N, C, C]`` of all parts."""
    grid = [replace(posterior, prior_precision=p.reshape(1)) for p in precisions]
    covariance = likelihood.needs_covariance(link)
    means, spreads, kept = [], [], []
    with torch.inference_mode(False), torch.no_grad():  # the table is differentiated, with respect to where it is read
        generator = torch.Generator().manual_seed(seed)
        normals = standard_normals((n_samples, network.n_outputs), posterior.mean, generator) if link == "mc" else None
        for inputs, targets, _ in tqdm(
            _data.labelled(batches, targets_key), desc="Prior precision", unit="batch", disable=not progress_bar,
            leave=False,
        ):  # fmt: skip
            targets = likelihood.prepare_targets(targets, network.n_outputs)
            if per_part:
                mean, spread = part_variances(network, posterior, inputs, precisions)
            else:
                mean, spread = functional_moments(network, grid, inputs, covariance=covariance)
            means.append(mean)
            spreads.append(spread if per_part else spread[:, None])
            kept.append(targets)
        empty = torch.empty(0)
        loss = _ValidationLoss(likelihood, link, normals, noise_variance, empty, empty).of(means, kept)
        return loss, torch.cat(spreads, 2)


class _Search:
    """Minima of the validation loss, on the grid and between its values.

    Args:
        loss: Of variances (or covariances) and a temperature.
        table: ``[R, n_parts, N, ...]``; :meth:`descend` turns it into logarithms, and has to come last.
        precisions: ``[R]``, ascending.
        fixed: The temperature if it is not tuned; may be changed before the first search of one.
    """

    def __init__(self, loss: _ValidationLoss, table: Tensor, precisions: Tensor, fixed: float | None) -> None:
        self.loss, self.table, self.precisions, self.fixed = loss, table, precisions, fixed
        self.unit = 1.0  # of the range of temperatures
        self._profile: dict[int, tuple[float, float]] = {}

    def on_the_grid(self, index: int, temperature: float) -> float:
        """Loss of one prior precision for all parts."""
        return float(self.loss(self.table[index].double().sum(0), temperature))

    def best_on_the_grid(self, temperature: float) -> int:
        """Position of the best of them."""
        return min(range(len(self.precisions)), key=lambda index: self.on_the_grid(index, temperature))

    def best_temperature(self, loss: Callable[[float], float]) -> tuple[float, float]:
        """The temperature with the smallest loss, and the loss."""
        if self.fixed is not None:
            return self.fixed, loss(self.fixed)
        return minimise(loss, self.unit)

    def profile(self, index: int) -> tuple[float, float]:
        """The same for a prior precision of the grid."""
        if index not in self._profile:
            self._profile[index] = self.best_temperature(lambda tau: self.on_the_grid(index, tau))
        return self._profile[index]

    def climb(self, start: int) -> int:
        """A position from which no neighbour is better, each with its best temperature, in ever smaller steps."""
        step = max(1, len(self.precisions) // 8)
        while True:
            near = [i for i in (start, start - step, start + step) if 0 <= i < len(self.precisions)]
            best = min(near, key=lambda index: self.profile(index)[1])
            if best == start and step == 1:
                return start
            start, step = best, step if best != start else step // 2

    def as_good_below(self, least: float, index: int, temperature: float) -> tuple[float, int, float]:
        """Loss, position and temperature of the smallest prior precision from a position downwards that is as good."""
        found, limit = (least, index, temperature), least + AS_GOOD
        while index and self.profile(index - 1)[1] <= limit:
            index -= 1
            found = self.profile(index)[1], index, self.profile(index)[0]
        return found

    def is_as_good_above(self, least: float, index: int) -> bool:
        """Whether all prior precisions above a position are as good as the least loss."""
        last = len(self.precisions) - 1
        return index < last and all(self.profile(i)[1] <= least + AS_GOOD for i in range(last, index, -1))

    def more_uncertain(self, priors: Tensor, temperature: float) -> tuple[Tensor, list[bool]]:
        """Each prior precision in turn the smallest of the grid that is as good, if that is smaller; after a descent.

        Returns:
            ``[n_parts]``, and whether each is as good up to the end of the grid.
        """
        logs, found = self.precisions.log(), priors.log()

        def value(part: int, logarithm: Tensor) -> float:
            at = found.clone()
            at[part] = logarithm
            spread = _interpolate(self.table, logs.to(self.table.device), at.to(self.table.device))
            return float(self.loss(spread, temperature))

        limit, flat = value(0, found[0]) + AS_GOOD, []
        for part in range(len(priors)):
            below = logs[logs < found[part] - 1e-9]
            bad, good = -1, len(below)
            if good and value(part, below[0]) <= limit:
                good = 0
            while good - bad > 1 and good:
                middle = max((bad + good) // 2, 0)
                bad, good = (bad, middle) if value(part, below[middle]) <= limit else (middle, good)
            if good < len(below):
                found[part] = below[good]
            flat.append(bool(found[part] < logs[-1] - 1e-9) and value(part, logs[-1]) <= limit)
        changed = found != priors.log()
        return torch.where(changed, found.exp(), priors), flat

    def most_uncertain(self, best: int, temperature: float) -> tuple[float, int, float]:
        """The one-standard-error rule: loss, position, and temperature of the smallest that is not told from the best.

        All smaller ones are looked at, not only those next to the best: losses need not be unimodal along the grid, nor
        are their differences as certain everywhere.
        """
        losses = self.loss.of_data(self.table[best].double().sum(0), temperature)
        for index in range(best if len(losses) > 1 else 0):
            own = self.profile(index)[0]
            here = self.loss.of_data(self.table[index].double().sum(0), own)
            difference = here - losses
            if float(difference.mean()) <= float(difference.std()) / math.sqrt(len(losses)):
                return float(here.mean()), index, own
        return float(losses.mean()), best, temperature

    def descend(self, starts: Sequence[tuple[int, float]]) -> tuple[Tensor, float, float]:
        """The best local minimum of the interpolated loss: prior precisions, temperature, and the interpolated loss.

        Args:
            starts: Positions on the grid and temperatures.
        """
        self.table.clamp_min_(torch.finfo(self.table.dtype).tiny).log_()
        n_priors, logs = self.table.shape[1], self.precisions.log()
        bounds = [(float(logs[0]), float(logs[-1]))] * n_priors
        if self.fixed is None:
            bounds.append((math.log(self.unit * TEMPERATURES[0]), math.log(self.unit * TEMPERATURES[1])))

        def value_and_slope(values: Any) -> tuple[float, Any]:
            with torch.inference_mode(False), torch.enable_grad():
                leaf = torch.tensor(values, dtype=torch.float64, requires_grad=True)
                there = leaf.to(self.table.device)
                spread = _interpolate(self.table, logs.to(there.device), there[:n_priors])
                value = self.loss(spread, there[-1].exp() if self.fixed is None else self.fixed)
                (slope,) = torch.autograd.grad(value, leaf)
            return float(value.detach()), slope.numpy()

        found = []
        for index, temperature in dict.fromkeys(starts):
            start = [float(logs[index])] * n_priors + ([math.log(temperature)] if self.fixed is None else [])
            options = {"maxiter": 500, "ftol": 1e-13, "gtol": 1e-9}
            found.append(minimize(value_and_slope, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options))
        best = min(found, key=lambda result: result.fun)
        if best.status == 1:  # out of iterations
            warn_the_caller(
                f"The search of prior precisions ended after {best.nit} steps before it was at a minimum: the "
                f"validation loss still falls by up to {abs(best.jac).max():.2g} nats for a factor e. Use one prior "
                "precision for all, or a smaller grid."
            )
        values = torch.as_tensor(best.x, dtype=torch.float64).exp()
        priors = values[:n_priors].clamp(self.precisions[0], self.precisions[-1])
        return priors, float(values[-1]) if self.fixed is None else self.fixed, float(best.fun)


def _interpolate(table: Tensor, logs: Tensor, at: Tensor) -> Tensor:
    """Variances ``[N, C]``, float64: sums over parts of a table of logarithms ``[R, n_parts, N, C]``.

    Args:
        table: Logarithms of variances at every value, of every part.
        logs: ``[R]``, ascending logarithms of prior precisions.
        at: ``[n_parts]``, where to read it.
    """
    lower = (torch.searchsorted(logs, at.detach()) - 1).clamp(0, max(len(logs) - 2, 0))
    upper = (lower + 1).clamp_max(len(logs) - 1)
    width = logs[upper] - logs[lower]
    weight = (at - logs[lower]) / torch.where(width > 0, width, 1.0)
    parts = torch.arange(table.shape[1], device=table.device)
    low, high = table[lower, parts].double(), table[upper, parts].double()
    return torch.lerp(low, high, weight[:, None, None]).exp().sum(0)


def _warn_of_edges(
    found: Tensor, precisions: Tensor, posterior: Posterior, per_part: bool, flat: Sequence[bool]
) -> bool:  # fmt: skip
    """One prior precision at either end; of several, those at the lower one (at the upper a part adds nothing).

    Returns:
        Whether one is not determined: good up to the end of the grid; of several, all over it.
    """
    if len(precisions) == 1:
        return False
    lower = found <= precisions[0] * (1 + 1e-9)
    if not per_part:
        if flat[0]:
            curve = PriorCurve(torch.stack([found[0], precisions[-1]]), torch.zeros(2), "")
            curve.warn()
        elif bool(lower | (found >= precisions[-1] / (1 + 1e-9))):
            warn_of_the_edge(float(found), smallest=bool(lower))
        return flat[0]
    names = [", ".join(posterior.basis.blocks[i].name for i in own) for own in posterior.basis.members]
    low = [name for name, at_end, free in zip(names, lower, flat, strict=True) if at_end and not free]
    free = [name for name, at_end, free in zip(names, lower, flat, strict=True) if at_end and free]
    if low:
        warn_of_the_edge(float(precisions[0]), smallest=True, of=f" of {', '.join(low)}")
    if free:
        why = "every value of the grid is as good. It is the smallest, with most uncertainty"
        warn_undetermined(f"prior precision of {', '.join(free)}", why)
    return bool(free)
