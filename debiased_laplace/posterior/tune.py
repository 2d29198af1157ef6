r"""One search for all that validation data choose: a table of candidate settings, and one optimiser between them.

A candidate is a prior precision of the grid with the best of what is tuned beside it: the temperature of the outputs,
by a one-dimensional search, or the noise of the observations, in closed form, or neither. One pass over the data makes
the table. The choice is the candidate with the smallest loss; of those that are equally good, the one with most
uncertainty; or, by the one-standard-error rule, the one with most uncertainty that the data do not tell from the best.

Between the candidates, and for several prior precisions,

.. math:: \min_{\delta, \tau} -\frac1N \sum_n \log p\Big(y_n \,\Big|\, \frac{f_n}{\tau},
    \frac{1}{\tau^2} \sum_p V_{pn}(\delta_p)\Big)

is minimised where variances suffice: :math:`\log V_p` is interpolated linearly in :math:`\log\delta_p`, and L-BFGS-B
starts from the best candidate and from the one at the temperature of the network alone. The data are read again for the
loss without interpolation (a generator's batches are kept for it). Links of covariances have roots without a derivative
at equal eigenvalues: there the prior precision is one of the grid. The result is not worse than the best candidate.

This module is longer than others: all that is tuned together shares the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _checks, _store
from debiased_laplace._ranks import current
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.curve import EMPTY, PriorCurve, check_losses, warn_of_the_edge
from debiased_laplace.posterior.dense_validation import SiteValidation, coarse
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.noise import ALL_ERRORS_ZERO, best_noise, nothing_left
from debiased_laplace.posterior.search import Search
from debiased_laplace.posterior.temperature import AS_GOOD, temperature_scaling, unit_of, warn_undetermined
from debiased_laplace.posterior.top_k import MANY_OUTPUTS, exact_outputs, say
from debiased_laplace.posterior.validation import Validation, exact_loss, losses_on_the_grid, tabulate

SELECTIONS = ("best", "one_standard_error")


@dataclass(frozen=True)
class Tuned:
    """What a search on validation data found.

    Attributes:
        prior_precisions: ``[n_parts]``, or ``[1]`` for all, float64.
        temperature: What outputs are divided by before the link.
        loss: Mean negative log predictive probability of the validation data with them, in nats, without interpolation.
        curve: The candidates: one prior precision for all parts, at the temperature that was given (one if it is tuned)
            or at the best noise of each.
        noise_variance: Of the observations, if it was tuned (times the profile of the likelihood); that of the
            posterior if all errors are zero.
        temperature_alone: Temperature and loss of temperature scaling, of the network without any uncertainty (where it
            was not tuned, the temperature that was given; with tuned noise, at its mean squared error as the noise):
            how much of the gain needs no posterior.
        undetermined: What the data do not determine: ``"temperature"``, ``"noise"``, ``"prior precision"``. Of equally
            good values the temperature is the one nearest to 1, and a prior precision the smallest, with most
            uncertainty.
    """

    prior_precisions: Tensor
    temperature: float
    loss: float
    curve: PriorCurve
    noise_variance: float | None
    temperature_alone: tuple[float, float]
    undetermined: tuple[str, ...] = ()


def agree(posterior: Posterior, likelihood: Likelihood, *settings: Any) -> None:
    """Raise a ``ValueError`` if the processes that tune together do not have all of it in common."""
    ranks = current()
    if ranks.size > 1:
        state = {"mean": posterior.mean, "curvatures": posterior.curvatures}
        words = {"settings": str(settings), "likelihood": repr(likelihood)}
        ranks.agree("tune", words | _store.fingerprint(state))


def tune(
    network: Network,
    posterior: Posterior,
    likelihood: Likelihood,
    batches: Iterable[Any],
    grid: Tensor,
    *,
    link: str | None = None,
    temperature: bool = False,
    noise: bool = False,
    per_part: bool = False,
    selection: str = "best",
    output_temperature: float = 1.0,
    n_samples: int = 100,
    seed: int = 0,
    targets_key: str = "labels",
    progress_bar: bool = False,
) -> Tuned:
    """Choose the prior precision, and the temperature of the outputs or the noise of the observations with it.

    Of dense outputs, on some sites of every datum (:mod:`debiased_laplace.posterior.dense_validation`).

    With a link of covariances and more than :data:`~.top_k.MANY_OUTPUTS` outputs at most
    :data:`~.dense_validation.N_CANDIDATES` candidates are compared, at the temperature of the network alone.

    Memory: ``R * n_parts * N * C`` numbers of the network's precision, or ``R * N * C**2`` for a link of covariances
    (twice that while they are joined), and some ten times ``n_parts * N * C`` in double precision; for one prior
    precision and nothing beside it a batch at a time.

    Args:
        network: The model with its blocks.
        posterior: Its prior precision has no effect.
        likelihood: What the outputs mean.
        batches: Validation data.
        grid: ``[R]``, prior precisions; with ``noise`` those at the mean squared error of the network as the noise, so
            that nothing depends on the units of the targets.
        link: How predictions integrate over the outputs; the first of the likelihood's by default.
        temperature: Tune the temperature of the outputs, between 1/20 and 20, where a temperature has a meaning.
        noise: Tune the noise variance, of a likelihood that has one, together with one prior precision.
        per_part: One prior precision for each part of the basis; only with variances. One that is good up to the end of
            the grid says that its part needs in effect no uncertainty.
        selection: ``"best"``, or for one prior precision ``"one_standard_error"``: the smallest whose loss is larger
            than the best by at most one standard error of the paired difference (Breiman et al. 1984). A temperature
            does on data like the training data most of what a posterior does, and leaves the prior precision
            undetermined there; the posterior with the most uncertainty is the one that still has some where the data
            are unlike them.
        output_temperature: The temperature if it is not tuned.
        n_samples: Draws for ``link="mc"``.
        seed: Their seed.
        targets_key: Where dictionary-like batches have their targets.
        progress_bar: Show a tqdm bar.

    Raises:
        ValueError: If the loader is empty, a target or an argument is invalid.

    Warns:
        UserWarning: If the best prior precision of all parts lies at an edge of the grid, or that of a part at the
            lower; if the data do not determine the temperature, the noise or a prior precision.
    """
    link = link or likelihood.links[0]
    fixed = _checked(likelihood, link, temperature, noise, per_part, selection, output_temperature)
    precisions = _checks.prior_precisions(grid)
    joint = temperature or per_part or selection != "best"
    many = network.n_outputs > MANY_OUTPUTS
    again = noise or network.sites is not None or many or (joint and not likelihood.needs_covariance(link))
    if again and isinstance(batches, Iterator):
        batches = list(batches)  # which are read twice
    settings = batches, link, n_samples, seed, targets_key, progress_bar
    if network.sites is None:
        data = Validation(network, posterior, likelihood, *settings)
        say(network, likelihood, exact_outputs(network, likelihood))
    else:
        data = SiteValidation(network, posterior, likelihood.site, *settings, whole=likelihood)
    if data.is_coarse:
        return _coarse(data, coarse(precisions), temperature, selection, fixed)
    if noise:
        return _with_noise(data, precisions)
    if joint:
        return _joint(data, precisions.unique(), temperature, per_part, selection, fixed)
    curve, alone = losses_on_the_grid(data, precisions, fixed)
    curve.warn()
    best = torch.tensor([curve.best], dtype=torch.float64)
    undetermined = ("prior precision",) if curve.is_flat else ()
    return Tuned(best, fixed, float(curve.losses[curve.best_index]), curve, None, (fixed, alone), undetermined)


def _checked(
    likelihood: Likelihood, link: str, temperature: bool, noise: bool, per_part: bool, selection: str,
    output_temperature: float,
) -> float:  # fmt: skip
    """The temperature if it is not tuned; raises what is wrong with the arguments."""
    likelihood.check_link(link)
    fixed = _checks.positive(output_temperature, "output_temperature")
    if likelihood.no_temperature and fixed != 1:
        raise ValueError(f"{likelihood.no_temperature}, and so no output temperature: expected 1, got {fixed:g}.")
    if temperature and likelihood.no_temperature:
        raise ValueError(f"{likelihood.no_temperature}, and so no temperature to tune: expected temperature=False.")
    if temperature and link == "bridge_norm":
        raise ValueError(
            "link_approx='bridge_norm' does not depend on the scale of the outputs, so that there is no temperature to "
            "tune: expected another link or temperature=False."
        )
    if selection not in SELECTIONS or (per_part and selection != "best"):
        options = SELECTIONS[:1] if per_part else SELECTIONS
        raise ValueError(f"Expected selection out of {list(options)} with per_part={per_part}, got {selection!r}.")
    if per_part and likelihood.needs_covariance(link):
        others = [name for name in likelihood.links if not likelihood.needs_covariance(name)]
        known = " or ".join(map(repr, others)) or "which this likelihood lacks"
        raise ValueError(
            f"Expected a link_approx that needs variances alone, {known}, for one prior precision for each part, got "
            f"{link!r}. Use {'that' if others else 'one prior precision for all'}."
        )
    if noise and not likelihood.has_noise:
        raise ValueError(f"Expected a regression to tune its noise, got {type(likelihood).__name__}.")
    if noise and (per_part or selection != "best"):
        raise ValueError(
            "Expected one prior precision and selection='best' with noise=True, got "
            f"per_part={per_part} and selection={selection!r}."
        )
    return fixed


# -- with covariances of many outputs ------------------------------------------------------------------


def _coarse(data: Validation, precisions: Tensor, temperature: bool, selection: str, fixed: float) -> Tuned:
    """One prior precision out of few, at the temperature of the network alone, without a table of covariances."""
    undetermined = []
    pairs = list(data.with_outputs())
    if not pairs:
        raise ValueError(EMPTY)
    outputs, targets = torch.cat([f for f, _ in pairs]), torch.cat([y for _, y in pairs])
    if temperature:
        scaling = temperature_scaling(data.likelihood, outputs, targets)
        fixed, alone = scaling.value, scaling.loss
        if scaling.undetermined:
            warn_undetermined("temperature", scaling.undetermined)
            undetermined.append("temperature")
    else:
        alone = float(data.likelihood.negative_log_likelihood(outputs.double() / fixed, targets).mean())
    losses = data.losses(precisions, fixed)
    mean = losses.mean(1)
    check_losses(mean)
    curve = PriorCurve(precisions, mean, data.link)
    index = curve.best_index
    if selection == "one_standard_error":
        differences = losses - losses[index]
        as_good = differences.mean(1) <= differences.std(1) / losses.shape[1] ** 0.5
        as_good[index] = True
        index = int(as_good.nonzero()[0, 0])
    else:
        curve.warn()
    undetermined += ["prior precision"] if curve.is_flat else []
    best = precisions[index].reshape(1)
    return Tuned(best, fixed, float(mean[index]), curve, None, (fixed, alone), tuple(undetermined))


# -- with the noise of the observations ------------------------------------------------------------


def _with_noise(data: Validation, precisions: Tensor) -> Tuned:
    r"""Prior precision and noise variance jointly.

    With :math:`v(\delta')` the functional variance at unit noise, that at noise :math:`\sigma^2` and prior precision
    :math:`\delta'/\sigma^2` is :math:`\sigma^2 v(\delta')`: the best noise has a closed form, see
    :func:`~debiased_laplace.posterior.noise.best_noise`. Where to look for :math:`\delta'` depends on the units of the
    targets. So the grid is one of prior precisions at the noise that the network has without uncertainty, its mean
    squared error on these data: one pass for that, and one for the whole grid.
    """
    network, likelihood = data.network, data.likelihood
    pairs = [(outputs.double(), targets) for outputs, targets in data.with_outputs()]
    if not pairs:
        raise ValueError(EMPTY)
    outputs, targets = torch.cat([f for f, _ in pairs]), torch.cat([y.to(f) for f, y in pairs])
    profile = likelihood.predictive_moments(outputs, torch.zeros_like(outputs), data.link).noise_variance[0]
    errors = targets - outputs
    none_left = nothing_left(errors, targets, torch.finfo(network.dtype).eps)
    fixed = torch.as_tensor(data.posterior.noise_variance, dtype=torch.float64).to(outputs)
    unit = fixed if none_left else (errors.square() / profile).mean()
    _checks.finite(unit, "the errors on the validation data", "Look for NaN in the validation data, or in the model.")
    at_unit_noise = precisions.to(unit) * unit
    candidates = data.at(at_unit_noise, noise_variance=1.0)
    moments = [(f, v) for f, v, _ in data.with_moments(candidates, covariance=False)]
    mean = torch.cat([f for f, _ in moments]).double()
    variances = torch.cat([v for _, v in moments], 1).double()
    if none_left:
        warn_undetermined("observation noise", ALL_ERRORS_ZERO.format("as it was"))
        noise = fixed.expand(len(candidates))
        losses = likelihood.negative_log_predictive(
            mean, fixed * variances, targets, data.link, noise_variance=fixed
        ).mean(-1)  # fmt: skip
    else:
        noise, losses = best_noise(mean, variances, targets, profile)
    losses = losses.cpu()
    check_losses(losses)
    curve = PriorCurve((at_unit_noise / noise).cpu(), losses, data.link)
    curve.warn()
    index = curve.best_index
    best = torch.tensor([curve.best], dtype=torch.float64)
    alone = likelihood.negative_log_likelihood(outputs, targets, unit).mean()
    undetermined = ("noise",) * none_left + ("prior precision",) * curve.is_flat
    return Tuned(best, 1.0, float(losses[index]), curve, float(noise[index]), (1.0, float(alone)), undetermined)


# -- with a temperature, or several prior precisions -----------------------------------------------


def _joint(
    data: Validation, precisions: Tensor, temperature: bool, per_part: bool, selection: str, fixed: float
) -> Tuned:
    covariance = data.likelihood.needs_covariance(data.link)
    loss, table = tabulate(data, precisions, per_part)
    start = 1.0 if temperature else fixed
    search = Search(loss, table, precisions, start)
    losses = torch.tensor([search.on_the_grid(index, start) for index in range(len(precisions))], dtype=torch.float64)
    check_losses(losses)
    curve, undetermined = PriorCurve(precisions, losses, data.link), []
    best = curve.best_index
    if temperature:
        scaling = temperature_scaling(data.likelihood, loss.mean, loss.targets)
        alone, search.fixed = (scaling.value, scaling.loss), scaling.value if scaling.undetermined else None
        if scaling.undetermined:
            warn_undetermined("temperature", scaling.undetermined)
            undetermined.append("temperature")
    else:
        alone = fixed, float(loss.without_uncertainty(fixed))
    search.unit, search.lowest = unit_of(alone[0]), None if loss.normals is None else min(1.0, alone[0])
    other = search.best_on_the_grid(alone[0]) if temperature else best
    ends = {search.climb(best), search.climb(other)} if covariance else {best}
    profile = [(search.profile(index)[1], index, search.profile(index)[0]) for index in sorted(ends)]
    least, index, tau = min([(float(losses[best]), best, start), *profile])  # of the grid: without interpolation
    if selection == "one_standard_error":
        start_index = min(range(len(precisions)), key=lambda position: search.profile(position)[1])
        least, index, tau = search.most_uncertain(start_index, search.profile(start_index)[0])
    elif covariance:
        least, index, tau = search.as_good_below(least, index, tau)
    priors, flat = precisions[index].repeat(table.shape[1]), [False] * table.shape[1]
    if selection == "best" and covariance:
        flat = [search.is_as_good_above(least, index)]
    elif selection == "best":
        prior, tau_there, value = search.descend([(best, search.profile(best)[0]), (other, alone[0])])
        if value < least:
            value = exact_loss(data, loss, prior, tau_there)
            if value < least:
                least, priors, tau = value, prior, tau_there
        prior, flat = search.more_uncertain(priors, tau)
        if not torch.equal(prior, priors):
            value = exact_loss(data, loss, prior, tau)
            if value <= least + AS_GOOD:
                least, priors = value, prior
    assert least <= float(losses.min()) + 2 * AS_GOOD or selection != "best"
    if _warn_of_edges(priors, precisions, data.posterior, per_part, flat):
        undetermined.append("prior precision")
    return Tuned(priors, tau, least, curve, None, alone, tuple(undetermined))


def _warn_of_edges(
    priors: Tensor, precisions: Tensor, posterior: Posterior, per_part: bool, flat: Sequence[bool]
) -> bool:  # fmt: skip
    """One prior precision at either end; of several, those at the lower one (at the upper a part adds nothing).

    Returns:
        Whether one is not determined: good up to the end of the grid; of several, all over it.
    """
    if len(precisions) == 1:
        return False
    lower = priors <= precisions[0] * (1 + 1e-9)
    if not per_part:
        if flat[0]:
            curve = PriorCurve(torch.stack([priors[0], precisions[-1]]), torch.zeros(2), "")
            curve.warn()
        elif bool(lower | (priors >= precisions[-1] / (1 + 1e-9))):
            warn_of_the_edge(float(priors), smallest=bool(lower))
        return flat[0]
    names = [", ".join(posterior.basis.blocks[i].name for i in members) for members in posterior.basis.members]
    low = [name for name, at_end, free in zip(names, lower, flat, strict=True) if at_end and not free]
    free = [name for name, at_end, free in zip(names, lower, flat, strict=True) if at_end and free]
    if low:
        warn_of_the_edge(float(precisions[0]), smallest=True, of=f" of {', '.join(low)}")
    if free:
        why = "every value of the grid is as good. It is the smallest, with most uncertainty"
        warn_undetermined(f"prior precision of {', '.join(free)}", why)
    return bool(free)
