"""One forward pass over a stream of data: outputs for the sampler, and what can be summed on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.curvature.structures import Structure
from debiased_laplace.likelihoods import Likelihood, of_outputs
from debiased_laplace.network.network import Network
from debiased_laplace.sampling.sample import Sample

#: Data at the start of a stream that a structure observes at all positions of its layers. Then every WINDOW of data is
#: observed on one of several coarser grids of positions: the products cost ten times the forward pass of a ResNet.
WHOLE, WINDOW = 1024, 64

#: Of networks with sequences one in so many of these windows is observed, at all positions, and the others are not:
#: only a backward pass tells which positions are padding.
SEQUENCE_WINDOWS = 8

#: Bytes that the activations of a forward pass may take at a time.
STREAM_MEMORY = {"cpu": 2**29, "accelerator": 2**32}


@dataclass(frozen=True)
class Observed:
    """What one forward pass over the stream tells.

    Attributes:
        n: Number of data.
        loss: Sum of their losses, in nats; a float64 scalar of the network's device, since to read it is to wait.
        statistics: What the structure sums over all data; None if it sums nothing.
    """

    n: int
    loss: float | Tensor
    statistics: Any

    @property
    def mean_loss(self) -> float:
        """Per datum, in nats."""
        return float(self.loss) / self.n

    def followed_by(self, more: Observed) -> Observed:
        """With more data of the same stream, which a structure need not have observed."""
        known = [one.statistics for one in (self, more) if one.statistics is not None]
        both = known[0] + known[1] if len(known) == 2 else known[0] if known else None
        return Observed(self.n + more.n, self.loss + more.loss, both)

    def __add__(self, other: Observed) -> Observed:
        """Of both streams."""
        known = self.statistics is not None and other.statistics is not None  # half of the data are not all of them
        both = self.statistics + other.statistics if known else None
        return Observed(self.n + other.n, self.loss + other.loss, both)


def windows(start: int, n: int) -> Iterator[tuple[slice, int | None]]:
    """The ``n`` data at a position of the stream in slices, with the phase of the grid that each is observed on.

    The phase of a datum depends on its position alone, not on how the stream is cut.
    """
    if start < WHOLE:
        yield slice(0, min(n, WHOLE - start)), None
    for number in range(max(0, start - WHOLE) // WINDOW, max(0, start + n - WHOLE + WINDOW - 1) // WINDOW):
        first = WHOLE + number * WINDOW - start
        yield slice(max(0, first), min(n, first + WINDOW)), number


def whole_windows(start: int, n: int) -> Tensor:
    """Which of the ``n`` data at a position of the stream are observed where only some are, ``[n]``."""
    chosen = torch.zeros(n, dtype=torch.bool)
    for part, number in windows(start, n):
        chosen[part] = number is None or number % SEQUENCE_WINDOWS == 0
    return chosen


class LikelihoodOfStream:
    """What the outputs of a stream mean, as it is known when it is asked: of sites, once they are seen to be dense."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream.likelihood, name)


class Stream:
    """Gives a sampler the outputs of every batch, and sums on the way what needs no more than the forward pass."""

    def __init__(
        self,
        discover: Callable[[_data.Inputs, _data.Inputs], Network],
        likelihood: Likelihood,
        structure: Structure,
        chunk_size: int | None = None,
    ) -> None:
        self._discover, self._structure = discover, structure
        #: What the outputs mean; of every site once the network is known to have dense ones.
        self.likelihood = likelihood
        self._chunk_size = chunk_size
        self._network: Network | None = None
        #: None until a sampler asks for outputs.
        self.observed: Observed | None = None

    def network(self, inputs: _data.Inputs, targets: _data.Inputs) -> Network:
        """The network, found with these data unless it was found before."""
        if self._network is None:
            self._network = self._discover(inputs, targets)
            self.likelihood = of_outputs(self.likelihood, self._network.sites)
        return self._network

    def __call__(self, inputs: _data.Inputs, targets: Tensor) -> Tensor:
        """Outputs ``[n, C]``, in chunks of activations that fit :data:`STREAM_MEMORY`."""
        network = self.network(inputs, targets)
        targets = self.likelihood.prepare_targets(targets, network.n_outputs)
        memory = STREAM_MEMORY["cpu" if network.device.type == "cpu" else "accelerator"]
        outputs = []
        backward = int(network.has_sequences and self._structure.observes)
        size = self._chunk_size or network.chunk_size(memory, backward, inputs=inputs)
        for part in _data.slices(_data.count(inputs), size):
            chunk, new = self._look(network, _data.take(inputs, part), targets[part])
            outputs.append(chunk)
            self.observed = new if self.observed is None else self.observed.followed_by(new)
        return torch.cat(outputs)

    def _look(self, network: Network, inputs: _data.Inputs, targets: Tensor) -> tuple[Tensor, Observed]:
        if not self._structure.observes:  # no need to know the layers
            outputs = network.outputs(inputs).to(network.dtype)
            return outputs, self._observed(network, outputs, targets)
        start = 0 if self.observed is None else self.observed.n
        if network.has_sequences:
            outputs, statistics = self._observe_some(network, inputs, targets, whole_windows(start, len(targets)))
            return outputs, replace(self._observed(network, outputs, targets), statistics=statistics)
        factors = network.factors(inputs)
        outputs = factors.outputs.to(network.dtype)
        new = self._observed(network, outputs, targets)
        for part, phase in windows(start, len(outputs)):
            statistics = self._structure.observe(network, factors, part, phase)
            new = replace(new, statistics=statistics if new.statistics is None else new.statistics + statistics)
        return outputs, new

    def _observe_some(
        self, network: Network, inputs: _data.Inputs, targets: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Outputs of all data, and what the structure observes of those that are chosen."""
        observed, others = chosen.nonzero()[:, 0], chosen.logical_not().nonzero()[:, 0]
        outputs, statistics = [], None
        if len(observed):
            factors = network.factors(_data.take(inputs, observed))
            factors.counted = self.likelihood.counted(targets[observed])
            outputs.append(factors.outputs)
            statistics = self._structure.observe(network, factors, slice(0, len(observed)))
        if len(others):
            outputs.append(network.outputs(_data.take(inputs, others)))
        order = torch.cat([observed, others]).argsort()
        return torch.cat(outputs).to(network.dtype)[order.to(network.device)], statistics

    def _observed(self, network: Network, outputs: Tensor, targets: Tensor) -> Observed:
        losses = self.likelihood.loss(outputs, targets.to(network.device))
        return Observed(len(losses), losses.double().sum(), None)


def mean_loss(network: Network, likelihood: Likelihood, sample: Sample) -> float:
    """Mean loss of the stream, estimated from a sample, in nats."""
    data = sample.data
    total = torch.zeros((), dtype=torch.float64, device=network.device)
    size = 512 if network.sites is None else network.chunk_size(STREAM_MEMORY["cpu"], 0, inputs=data.inputs)
    for part in _data.chunks(data.inputs, size):
        outputs = network.outputs(_data.take(data.inputs, part))
        losses = likelihood.loss(outputs.to(network.dtype), _data.take(data.targets, part).to(network.device))
        total += data.weights[part].to(network.device) @ losses.double()
    return float(total)
