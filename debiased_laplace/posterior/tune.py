"""Everything that validation data choose, by one function."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.gradients import Network
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.joint import joint_search
from debiased_laplace.posterior.tuning import PriorCurve, grid_search, noise_search


@dataclass(frozen=True)
class Tuned:
    """What a search on validation data found.

    Attributes:
        prior_precisions: ``[n_parts]``, or ``[1]`` for all, float64.
        temperature: What outputs are divided by before the link.
        loss: Mean negative log predictive probability of the validation data with them, in nats.
        curve: The search of one prior precision for all parts.
        noise_variance: Of the observations, if it was tuned (divided by their profile).
        temperature_alone: Temperature and loss of temperature scaling, of the network without any uncertainty (where it
            was not tuned, the temperature that was given): how much of the gain needs no posterior. Not a
            number if that was not looked at.
        undetermined: What the data do not determine: ``"temperature"``, ``"prior precision"``. Of equally good values
            the temperature is the one nearest to 1, and a prior precision the smallest, with most uncertainty.
    """

    prior_precisions: Tensor
    temperature: float
    loss: float
    curve: PriorCurve
    noise_variance: float | None = None
    temperature_alone: tuple[float, float] = (math.nan, math.nan)
    undetermined: tuple[str, ...] = ()


def tune(
    network: Network,
    posterior: Posterior,
    likelihood: Likelihood,
    batches: Iterable[Any],
    grid: Tensor,
    *,
    link: str = "probit",
    temperature: bool = False,
    noise: bool = False,
    per_part: bool = False,
    selection: str = "best",
    output_temperature: float = 1.0,
    noise_variance: float | Tensor | None = None,
    noise_profile: Tensor | None = None,
    n_samples: int = 100,
    seed: int = 0,
    targets_key: str = "labels",
    progress_bar: bool = False,
) -> Tuned:
    """Choose the prior precision, and the temperature of the outputs or the noise of the observations with it.

    Args:
        network: The model with its blocks.
        posterior: Its prior precision has no effect.
        likelihood: What the outputs mean.
        batches: Validation data.
        grid: ``[R]``, prior precisions; with ``noise`` those at the mean squared error of the network as the noise.
        link: How predictions integrate over the outputs.
        temperature: Tune the temperature of the outputs.
        noise: Tune the noise variance.
        per_part: One prior precision for each part of the basis.
        selection: ``"best"`` or ``"one_standard_error"``.
        output_temperature: The temperature if it is not tuned.
        noise_variance: Of the observations if it is not tuned, also ``[C]``; by default the posterior's.
        noise_profile: ``[C]``, ratios of the standard deviations of the outputs' noise, which are part of the
            curvature.
        n_samples: Draws for ``link="mc"``.
        seed: Their seed.
        targets_key: Where dictionary-like batches have their targets.
        progress_bar: Show a tqdm bar.

    Raises:
        ValueError: If the loader is empty, a target or an argument is invalid.

    Warns:
        UserWarning: If the best value lies at an edge of the grid, or is not determined.
    """
    if noise:
        tuned = noise_search(
            network, posterior, likelihood, batches, grid, profile=noise_profile, targets_key=targets_key,
            progress_bar=progress_bar,
        )  # fmt: skip
        curve, best = tuned.curve, torch.tensor([tuned.prior_precision], dtype=torch.float64)
        return Tuned(best, 1.0, float(curve.losses[curve.best_index]), curve, tuned.noise_variance)
    if not (temperature or per_part) and selection == "best" and noise_variance is None:
        curve = grid_search(
            network, posterior, likelihood, batches, grid, link=link, n_samples=n_samples, seed=seed,
            targets_key=targets_key, progress_bar=progress_bar, output_temperature=output_temperature,
        )  # fmt: skip
        best = torch.tensor([curve.best], dtype=torch.float64)
        return Tuned(best, output_temperature, float(curve.losses[curve.best_index]), curve)
    joint = joint_search(
        network, posterior, likelihood, batches, grid, per_part=per_part, temperature=temperature, link=link,
        n_samples=n_samples, seed=seed, targets_key=targets_key, progress_bar=progress_bar,
        output_temperature=output_temperature, noise_variance=noise_variance, selection=selection,
    )  # fmt: skip
    return Tuned(
        joint.prior_precisions, joint.temperature, joint.loss, joint.curve, None, joint.temperature_alone,
        joint.undetermined,
    )  # fmt: skip
