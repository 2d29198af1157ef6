"""One forward pass over a stream of data: outputs for the sampler, and what can be summed on the way."""

from __future__ import annotations

import random
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

#: Data at the start of a stream that a structure observes at all positions of its layers. Then data are looked at in
#: windows of WINDOW, each on one of several coarser grids of positions where a layer has seen enough of them: the
#: products at all positions cost six times the forward pass of a ResNet.
WHOLE, WINDOW = 64, 64

#: Of networks with sequences so many are observed first, and then one in so many windows, at all positions: only a
#: backward pass tells which of them are padding.
WHOLE_SEQUENCES, SEQUENCE_WINDOWS = 512, 8

#: Data that are observed for each one of the sampler's budget, whose own error leaves no use for more; whenever the
#: windows have become twice as many after that, one in twice as many is observed and stands for them.
OBSERVED_PER_BUDGET = 32

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


@dataclass(frozen=True)
class Window:
    """Consecutive data of a chunk that are looked at in one way.

    Attributes:
        part: Which of the chunk.
        before: Data of the stream before the window.
        phase: The grid of positions that they are observed on; None for all positions.
        weight: Windows that they stand for; zero if they are not observed.
    """

    part: slice
    before: int
    phase: int | None
    weight: int


@dataclass(frozen=True)
class Plan:
    """Which data of a stream are observed, how, and for how many others they stand.

    Windows are taken in strata of equal size, of which one window, chosen at random, stands for all. Strata grow as the
    stream does, so that its length need not be known; wherever a loader has which data, each stratum has its share. All
    of it depends on the position of a datum and the seed alone, not on how the stream is cut.

    Attributes:
        budget: Of the sampler, whose error decides how many data are worth observing.
        seed: Of the choices.
        whole: Data at the start, which are all observed at all positions.
        least: Windows of the smallest strata.
        on_grids: Whether windows are observed on coarser grids of positions.
    """

    budget: int = 1024
    seed: int = 0
    whole: int = WHOLE
    least: int = 1
    on_grids: bool = True

    def windows(self, start: int, n: int) -> Iterator[Window]:
        """The ``n`` data at a position of the stream."""
        if start < self.whole:
            yield Window(slice(0, min(n, self.whole - start)), 0, None, 1)
        for number in range(
            max(0, start - self.whole) // WINDOW, max(0, start + n - self.whole + WINDOW - 1) // WINDOW
        ):
            before = self.whole + number * WINDOW
            part = slice(max(0, before - start), min(n, before - start + WINDOW))
            yield Window(part, before, *self._look(number))

    def _look(self, number: int) -> tuple[int | None, int]:
        """Phase and weight of a window."""
        before_growth = self.least * -(-OBSERVED_PER_BUDGET * self.budget // (2 * WINDOW)) * 2
        size = self.least * 2 ** (number // before_growth).bit_length()
        choice = random.Random(f"{self.seed} {size} {number // size}")
        chosen = choice.randrange(size) == number % size
        return (choice.randrange(2**30) if self.on_grids else None), size * chosen


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
        plan: Plan | None = None,
    ) -> None:
        self._discover, self._structure, self._plan = discover, structure, plan or Plan()
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
            if self._network.has_sequences:
                self._plan = replace(self._plan, whole=WHOLE_SEQUENCES, least=SEQUENCE_WINDOWS, on_grids=False)
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
        windows = list(self._plan.windows(start, len(targets)))
        outputs, statistics = self._observe_some(network, inputs, targets, windows)
        outputs = outputs.to(network.dtype)
        return outputs, replace(self._observed(network, outputs, targets), statistics=statistics)

    def _observe_some(
        self, network: Network, inputs: _data.Inputs, targets: Tensor, windows: list[Window]
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Outputs of all data, and what the structure observes of those in windows with a weight."""
        weights = torch.cat([torch.full((one.part.stop - one.part.start,), one.weight) for one in windows])
        observed, others = weights.nonzero()[:, 0], (weights == 0).nonzero()[:, 0]
        if not len(observed):
            return network.outputs(inputs), None
        some = _data.take(inputs, observed) if len(others) else inputs
        factors = network.factors(some, backward=network.has_sequences)
        if network.has_sequences:
            factors.counted = self.likelihood.counted(targets[observed])
        statistics, start = None, 0
        for one in windows:
            if one.weight:
                part = slice(start, start + one.part.stop - one.part.start)
                new = self._structure.observe(network, factors, part, one.phase, one.before)
                new = new if one.weight == 1 else new * one.weight
                statistics, start = new if statistics is None else statistics + new, part.stop
        if not len(others):
            return factors.outputs, statistics
        outputs = torch.cat([factors.outputs, network.outputs(_data.take(inputs, others))])
        order = torch.cat([observed, others]).argsort()
        return outputs[order.to(outputs.device)], statistics

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
