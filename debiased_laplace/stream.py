"""One forward pass over a stream of data: outputs for the sampler, and what can be summed on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.gradients import CHUNK_MEMORY, Network
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.sampling import Sample
from debiased_laplace.structures import Structure


@dataclass(frozen=True)
class Observed:
    """What one forward pass over the stream tells.

    Attributes:
        n: Number of data.
        loss: Sum of their losses, in nats.
        statistics: What the structure sums over all data.
    """

    n: int
    loss: float
    statistics: Any

    @property
    def mean_loss(self) -> float:
        """Per datum, in nats."""
        return self.loss / self.n

    def __add__(self, other: Observed) -> Observed:
        """Of both streams."""
        both = self.statistics if other.statistics is None else self.statistics + other.statistics
        return Observed(self.n + other.n, self.loss + other.loss, both)


class Stream:
    """Gives a sampler the outputs of every batch, and sums on the way what needs no more than the forward pass."""

    def __init__(
        self, discover: Callable[[_data.Inputs], Network], likelihood: Likelihood, structure: Structure
    ) -> None:
        self._discover, self._likelihood, self._structure = discover, likelihood, structure
        self._network: Network | None = None
        #: None until a sampler asks for outputs.
        self.observed: Observed | None = None

    def __call__(self, inputs: _data.Inputs, targets: Tensor) -> Tensor:
        """Outputs ``[n, C]``, in chunks that fit :data:`~debiased_laplace.gradients.CHUNK_MEMORY`."""
        if self._network is None:
            self._network = self._discover(inputs)
        network = self._network
        self._likelihood.check_targets(targets, network.n_outputs)
        outputs = []
        for part in _data.slices(_data.count(inputs), network.chunk_size(CHUNK_MEMORY)):
            factors = network.factors(_data.take(inputs, part))
            outputs.append(factors.outputs.to(network.dtype))
            losses = self._likelihood.loss(outputs[-1], targets[part].to(network.device))
            own = Observed(len(losses), float(losses.double().sum()), self._structure.observe(network, factors))
            self.observed = own if self.observed is None else self.observed + own
        return torch.cat(outputs)


def mean_loss(network: Network, likelihood: Likelihood, sample: Sample) -> float:
    """Mean loss of the stream, estimated from a sample, in nats."""
    data = sample.data
    total = torch.zeros((), dtype=torch.float64, device=network.device)
    for part in _data.slices(len(data), 512):
        outputs = network.outputs(_data.take(data.inputs, part))
        losses = likelihood.loss(outputs.to(network.dtype), data.targets[part].to(network.device))
        total += data.weights[part].to(network.device) @ losses.double()
    return float(total)
