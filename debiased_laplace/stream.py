"""One forward pass over a stream of data: outputs for the sampler, and what can be summed on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.gradients import CHUNK_MEMORY, Network
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.sampling import Sample
from debiased_laplace.structures import Structure

#: Data at the start of a stream of which a structure observes all; of the others every EVERY-th WINDOW of consecutive
#: ones stands for EVERY. The products of layer inputs cost ten times the forward pass of a ResNet.
WHOLE, WINDOW, EVERY = 2048, 32, 8


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
        statistics = [own.statistics for own in (self, other) if own.statistics is not None]
        both = statistics[0] + statistics[1] if len(statistics) == 2 else statistics[0] if statistics else None
        return Observed(self.n + other.n, self.loss + other.loss, both)


def windows(start: int, n: int) -> Iterator[tuple[slice, int]]:
    """Of ``n`` data at a position of the stream, those to observe, as slices of them, and how many each stands for.

    Which data these are depends on their positions alone, not on how the stream is cut. In every run of
    ``WINDOW * EVERY`` data the window lies elsewhere (at multiples of the golden ratio), so that no period of an
    ordered stream is seen at one phase only.
    """
    if start < WHOLE:
        yield slice(0, min(n, WHOLE - start)), 1
    length = WINDOW * EVERY
    for run in range(max(0, start - WHOLE) // length, max(0, start + n - WHOLE + length - 1) // length):
        offset = WINDOW * int(run * 0.6180339887498949 % 1 * EVERY)
        first = WHOLE + run * length + offset - start
        chosen = slice(max(0, first), min(n, first + WINDOW))
        if chosen.start < chosen.stop:
            yield chosen, EVERY


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
            seen = 0 if self.observed is None else self.observed.n
            own = Observed(len(losses), float(losses.double().sum()), None)
            for chosen, weight in windows(seen, len(losses)):
                statistics = self._structure.observe(network, factors, chosen)
                if statistics is None:
                    break
                statistics = statistics if weight == 1 else statistics * weight
                own = replace(own, statistics=statistics if own.statistics is None else own.statistics + statistics)
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
