"""One forward pass over a stream of data: outputs for the sampler, and what can be summed on the way."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace._ranks import Ranks
from debiased_laplace.curvature.structures import Structure, Window
from debiased_laplace.likelihoods import Likelihood, of_outputs
from debiased_laplace.network.network import Network
from debiased_laplace.sampling.sample import Sample

#: Data that are looked at together.
WINDOW = 64

#: Data that are looked at for each one of the sampler's budget before others stand for some of them: its own error
#: leaves no use for more. Of networks with sequences fewer, since only a backward pass tells which of their positions
#: are padding.
OBSERVED_PER_BUDGET, OF_SEQUENCES = 32, 256

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
class Plan:
    """Which data of a stream are looked at, and for how many others they stand.

    Whenever the stream has become twice as long, one window of data in twice as many is looked at, chosen at random,
    and stands for all of them: the length need not be known, and wherever a loader has which data, each part of it has
    its share. All depends on the position of a datum and the seed alone, not on how the stream is cut; windows that are
    looked at where fewer data tell enough are among those where more do.

    Attributes:
        budget: Of the sampler, whose error decides how many data are worth a look.
        seed: Of the choices.
        most: Data at the start that are all looked at, at most; None for what the budget deserves.
    """

    budget: int = 1024
    seed: int = 0
    most: int | None = None

    def among(self, positions: Tensor, enough: int | None = None) -> list[Window]:
        """Those of some data of the stream, at ascending positions ``[n]``."""
        if not len(positions):
            return []
        first, found = int(positions[0]), []
        for window in self.windows(first, int(positions[-1]) + 1 - first, enough):
            bounds = torch.tensor([window.part.start, window.part.stop]) + first
            part = slice(*torch.searchsorted(positions, bounds).tolist())
            if part.start < part.stop:
                found.append(replace(window, part=part))
        return found

    def windows(self, start: int, n: int, enough: int | None = None) -> list[Window]:
        """Those of the n data at a position of the stream, of which ``enough`` would do if they were the first."""
        most = self.most or OBSERVED_PER_BUDGET * self.budget
        first = 2 * -(-min(most, enough or most) // (2 * WINDOW))  # windows; even, so that strata are whole
        found: list[Window] = []
        for number in range(start // WINDOW, -(-(start + n) // WINDOW)) if n else ():
            level = (number // first).bit_length()
            if all(self._is_chosen(number, below) for below in range(level)):
                before = number * WINDOW - start
                part = slice(max(0, before), min(n, before + WINDOW))
                if found and found[-1].part.stop == part.start and found[-1].weight == 2**level:
                    part = slice(found.pop().part.start, part.stop)
                found.append(Window(part, 2**level))
        return found

    def _is_chosen(self, number: int, level: int) -> bool:
        """Whether a window is in that half of a stratum of twice ``2**level`` that stands for both."""
        stratum, half = divmod(number >> level, 2)
        return random.Random(f"{self.seed} {level} {stratum}").getrandbits(1) == half


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
        #: Positions of the next batch in the stream, ``[n]``; None for those that follow.
        self.positions: Tensor | None = None
        #: What the network is found with, inputs and targets; None for the first that are asked for.
        self.first: tuple[_data.Inputs, Tensor] | None = None

    def network(self, inputs: _data.Inputs, targets: _data.Inputs) -> Network:
        """The network, found with these data unless it was found before."""
        if self._network is None:
            self._network = self._discover(*(self.first or (inputs, targets)))
            self.likelihood = of_outputs(self.likelihood, self._network.sites)
            if self._network.has_sequences:
                most = min(OF_SEQUENCES, OBSERVED_PER_BUDGET * self._plan.budget)
                self._plan = replace(self._plan, most=most)
        return self._network

    def __call__(self, inputs: _data.Inputs, targets: Tensor) -> Tensor:
        """Outputs ``[n, C]``, in chunks of activations that fit :data:`STREAM_MEMORY`."""
        network = self.network(inputs, targets)
        targets = self.likelihood.prepare_targets(targets, network.n_outputs)
        memory = STREAM_MEMORY["cpu" if network.device.type == "cpu" else "accelerator"]
        outputs = []
        backward = int(network.has_sequences and self._structure.observes)
        size = self._chunk_size or network.chunk_size(memory, backward, inputs=inputs)
        n, start = _data.count(inputs), 0 if self.observed is None else self.observed.n
        positions = torch.arange(start, start + n) if self.positions is None else self.positions
        for part in _data.slices(n, size):
            chunk, new = self._look(network, _data.take(inputs, part), targets[part], positions[part])
            outputs.append(chunk)
            self.observed = new if self.observed is None else self.observed.followed_by(new)
        return torch.cat(outputs)

    def _look(
        self, network: Network, inputs: _data.Inputs, targets: Tensor, positions: Tensor
    ) -> tuple[Tensor, Observed]:  # fmt: skip
        if not self._structure.observes:  # no need to know the layers
            outputs = network.outputs(inputs).to(network.dtype)
            return outputs, self._observed(network, outputs, targets)
        outputs, statistics = self._observe_some(network, inputs, targets, positions)
        outputs = outputs.to(network.dtype)
        return outputs, replace(self._observed(network, outputs, targets), statistics=statistics)

    def _observe_some(
        self, network: Network, inputs: _data.Inputs, targets: Tensor, positions: Tensor
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Outputs of all data, and what the structure observes of some of them."""
        n = len(targets)
        is_seen = torch.zeros(n, dtype=torch.bool)
        for window in self._plan.among(positions):
            is_seen[window.part] = True
        seen, others = is_seen.nonzero()[:, 0], (~is_seen).nonzero()[:, 0]
        if not len(seen):
            return network.outputs(inputs), None
        factors = network.factors(_data.take(inputs, seen) if len(others) else inputs, backward=network.has_sequences)
        if network.has_sequences:
            factors.counted = self.likelihood.counted(targets[seen])
        place = (is_seen.cumsum(0) - 1).tolist()  # among those that are seen

        def look(enough: int) -> list[Window]:
            windows = self._plan.among(positions, enough)
            return [replace(w, part=slice(place[w.part.start], place[w.part.stop - 1] + 1)) for w in windows]

        statistics = self._structure.observe(network, factors, look)
        if not len(others):
            return factors.outputs, statistics
        outputs = torch.cat([factors.outputs, network.outputs(_data.take(inputs, others))])
        order = torch.cat([seen, others]).argsort()
        return outputs[order.to(outputs.device)], statistics

    def merge(self, ranks: Ranks) -> None:
        """Let :attr:`observed` be that of the streams of all processes, the same in each of them."""
        if not any(ranks.gather(self.observed is not None)):
            return
        assert self.first is not None
        network, mine = self.network(*self.first), self.observed or Observed(0, 0.0, None)
        statistics = mine.statistics
        if self._structure.observes:
            if statistics is None:  # of no data
                factors = network.factors(self.first[0], backward=network.has_sequences)
                statistics = self._structure.observe(network, factors, lambda _: [])
            statistics = statistics.all_reduce()
        sums = ranks.gather((mine.n, float(mine.loss)))
        loss = torch.tensor(sum(loss for _, loss in sums), dtype=torch.float64, device=network.device)
        self.observed = Observed(sum(n for n, _ in sums), loss, statistics)

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
