"""Weighted data for the networks of the zoo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace.curvature.structures import Structure
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.sampling.sample import WeightedData
from tests.networks import Case

LIKELIHOODS = [Gaussian(), Bernoulli(), Categorical()]


def targets(likelihood: Likelihood, n: int, n_outputs: int, seed: int = 0) -> Tensor:
    """Valid targets that are not all the same."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(likelihood, Categorical):
        return torch.randint(n_outputs, (n,), generator=generator)
    drawn = torch.randn(n, n_outputs, generator=generator, dtype=torch.float64)
    return drawn if isinstance(likelihood, Gaussian) else drawn.sigmoid()


def weighted(inputs: Tensor, targets: Tensor, uniform: bool = False) -> WeightedData:
    """Weights that sum to one, different ones unless asked for."""
    n = len(inputs)
    weights = torch.ones(n, dtype=torch.float64) if uniform else torch.linspace(0.5, 3, n, dtype=torch.float64)
    return WeightedData(inputs, targets, weights / weights.sum(), torch.arange(n))


def example(
    case: Case, likelihood: Likelihood, n: int = 5, seed: int = 1, uniform: bool = False, **options: Any
) -> tuple[nn.Module, Network, WeightedData]:
    """A network of the zoo with weighted data."""
    model = case.model()
    data = weighted(case.inputs(n, seed=seed), targets(likelihood, n, case.n_outputs, seed), uniform)
    return model, Network.discover(model, data.inputs, **options), data


def measure(structure: Structure, network: Network, data: WeightedData, likelihood: Likelihood, **options: Any) -> Any:
    """Statistics of weighted data."""
    return structure.measure(network, CurvatureData(network, data, likelihood, **options))


def valid(likelihood: Likelihood, case: Case) -> Likelihood:
    """The likelihood, or another for a single output."""
    return Bernoulli() if isinstance(likelihood, Categorical) and case.n_outputs == 1 else likelihood
