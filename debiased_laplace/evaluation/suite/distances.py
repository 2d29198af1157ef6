"""How far output variances of posteriors are from those of a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.evaluation.methods import Options
from debiased_laplace.evaluation.scores.cells import cell, combine
from debiased_laplace.evaluation.scores.replicates import Replicates
from debiased_laplace.evaluation.scores.weighted import resample_weights
from debiased_laplace.evaluation.suite.posteriors import typical_prior
from debiased_laplace.laplace import Laplace
from debiased_laplace.posterior.predictive import functional_moments


def distances(
    fits: Mapping[str, Sequence[Laplace]],
    roles: Mapping[str, str],
    test: Callable[[], Iterable[Any]],
    options: Options,
) -> dict[str, Any]:
    """Log ratios of output variances to the reference's, at equal prior precisions: no tuning in it.

    Args:
        fits: Posteriors of each method, one for each draw.
        roles: Names of methods by their role; those without posteriors are left out.
        test: Gives the loader whose first inputs are where the variances are compared.
        options: The number of inputs and of resamples, and the prior precision besides the reference's tuned one.

    Returns:
        For ``"tuned"`` and ``"equal"`` the prior precision, and for each method cells of the ``"absolute"`` and
        ``"signed"`` log ratio; empty if there is nothing to compare.
    """
    reference = roles.get("reference")
    compared = [roles[role] for role in ("baseline", "candidate") if role in roles]
    if reference is None or not compared:
        return {}
    inputs, first = first_inputs(test(), options.distance_inputs), fits[reference][0]
    prior_precisions = {"tuned": typical_prior(first), "equal": options.distance_prior_precision}
    noise = first.posterior.noise_variance
    # The noise is tuned for each: no part of a distance. One set of backward passes for all of them.
    posteriors = [(name, la) for name in (*compared, reference) for la in fits[name]]
    grid = [
        replace(la.posterior, noise_variance=noise, prior_precision=torch.tensor([value]).double())
        for _, la in posteriors
        for value in prior_precisions.values()
    ]
    moments = functional_moments(first.network, grid, inputs, covariance=False)
    variances = moments[1].cpu().double().split(len(prior_precisions))
    weights = resample_weights(_data.count(inputs), options.n_resamples, 0)
    result: dict[str, Any] = {}
    for index, (where, value) in enumerate(prior_precisions.items()):
        result[where] = {"prior_precision": value}
        for name in compared:
            ratios = [
                log_ratio(variance[index], variances[-1][index])
                for (method, _), variance in zip(posteriors, variances, strict=True)
                if method == name
            ]
            result[where][name] = {
                part: combine([mean_cell(of(ratio).mean(1), weights) for ratio in ratios], True)
                for part, of in (("absolute", torch.Tensor.abs), ("signed", torch.Tensor.clone))
            }
    return result


def log_ratio(variances: Tensor, reference: Tensor) -> Tensor:
    """Of output variances: equal ones are at distance zero, also if both are zero; if one is zero it is infinite."""
    return torch.where(variances == reference, 0.0, variances.log() - reference.log())


def first_inputs(loader: Iterable[Any], n: int) -> Any:
    """The first inputs of a loader."""
    return _data.concatenate([inputs for inputs, _ in _data.head(loader, n)])


def mean_cell(values: Tensor, weights: Any) -> list[float]:
    """The mean with its bootstrap; one infinite value makes it infinite, of both signs undefined."""
    array, weights = values.numpy(), np.asarray(weights)
    replicates = weights @ np.where(np.isfinite(array), array, 0.0) / len(array)
    above, below, undefined = (weights @ part > 0 for part in (array == np.inf, array == -np.inf, np.isnan(array)))
    replicates[above], replicates[below] = np.inf, -np.inf
    replicates[undefined | (above & below)] = np.nan
    with np.errstate(invalid="ignore"):
        return cell(Replicates(float(array.mean()), replicates, len(array), "mean", array))
