"""The part of a stream that one of several processes reads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from debiased_laplace._data.batches import Inputs, take, tensors
from debiased_laplace._data.loaders import dataset_length, only
from debiased_laplace._ranks import Ranks, current


class Shard:
    """Where the data of this process are in the stream of all of them.

    Batches of all processes that come at the same time are one round. In it the first data of every process come
    first, then the second ones: the order in which one process would read what a ``DistributedSampler`` deals out. A
    datum has its random numbers, and its share of what is looked at, by its position in that order.

    Args:
        batches: The loader of this process.

    Attributes:
        n_seen: Number of data of all rounds.
        positions: Of the data of every round that are this process's.
        of_round: Number of the data of the last round, of all processes.
        mine: Which of them are this process's.
    """

    def __init__(self, batches: Any) -> None:
        self._loader = getattr(batches, "loader", batches)
        samplers = self._loader, getattr(self._loader, "batch_sampler", None)
        found = [getattr(owner, "sampler", None) for owner in samplers]
        self._sampler = next((one for one in found if isinstance(one, DistributedSampler)), None)
        self.n_seen = self._n_read = self._n_mine = self.of_round = 0
        self._sum = 0.0
        self.mine = torch.empty(0, dtype=torch.int64)
        self.positions: list[Tensor] = []

    def without_repeats(self, batch: Any, targets_key: str) -> Any:
        """A batch without what a ``DistributedSampler`` gives again to make shards equally long; None for no data."""
        if self._sampler is None or current().size == 1:
            return batch
        step, first = self._sampler.num_replicas, self._sampler.rank
        own = -(-(len(self._sampler.dataset) - first) // step)  # type: ignore[arg-type]
        inputs, targets, n = only(batch, targets_key)
        kept = max(0, min(n, own - self._n_read))
        self._n_read += n
        if not kept:
            return None
        return batch if kept == n else (take(inputs, slice(0, kept)), targets[:kept])

    @property
    def places(self) -> Tensor:
        """Of the data of this process among those of all, in the order that one process would read."""
        parts = self._loader.positions if isinstance(self._loader, InTurns) else self.positions
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])

    def look(self, inputs: Inputs, targets: Tensor) -> None:
        """Note what this process has read, so that :meth:`check` knows it from what others have."""
        self._n_mine += len(targets)
        self._sum += sum(float(leaf.detach().double().sum()) for leaf in (*tensors(inputs), targets) if leaf.numel())

    def advance(self, counts: Sequence[int], rank: int) -> Tensor:
        """Positions of the data of this process in the next round, of which every process has some."""
        own = torch.arange(counts[rank])
        self.mine = sum(
            ((own + (other < rank)).clamp_max(count) for other, count in enumerate(counts)), torch.zeros_like(own)
        )  # fmt: skip
        positions = self.n_seen + self.mine
        self.of_round = sum(counts)
        self.n_seen += self.of_round
        self.positions.append(positions)
        return positions

    def check(self, ranks: Ranks) -> None:
        """What all processes have read: an error if it is the same data, a warning if some were read several times.

        Raises:
            ValueError: Likewise.
        """
        order = self._loader.order if isinstance(self._loader, Dealt) else 0.0
        size = dataset_length(self._loader)
        every = ranks.gather((self._n_mine, self._sum, size, order))
        counts, sums, sizes, orders = zip(*every, strict=True)
        if any(not _equal(one, orders[0]) for one in orders):
            raise ValueError(
                "Expected the loader to give every process the same batches, of which each computes its share, got "
                "others or in another order. Let it shuffle by the global generators, or not at all."
            )
        if isinstance(self._loader, Dealt):  # by which nothing is read twice
            return
        remedy = (
            "Give every process its shard: DataLoader(dataset, sampler=DistributedSampler(dataset, shuffle=False)), "
            "whose repeats are left out."
        )
        if counts[0] > 1 and all(n == counts[0] for n in counts) and all(_equal(one, sums[0]) for one in sums):
            raise ValueError(
                f"Expected {ranks.size} processes to read a part of the data each, got the same {counts[0]} data in "
                f"every process: they would count {ranks.size} times. {remedy}"
            )
        parts = all(of_rank is not None and n < of_rank == sizes[0] for n, of_rank in zip(counts, sizes, strict=True))
        if parts and sizes[0] is not None and sum(counts) > sizes[0]:
            warnings.warn(
                f"The {ranks.size} processes have read {sum(counts)} data, and their dataset has {sizes[0]}: some "
                f"count several times. {remedy}", stacklevel=2,
            )  # fmt: skip


def _equal(one: float, other: float) -> bool:
    """Sums of the same numbers, in whatever order."""
    return math.isclose(one, other, rel_tol=1e-9) or (math.isnan(one) and math.isnan(other))


class Dealt:
    """Batches that every process reads whole, with the data dealt out among them: the order is that of one process.

    Attributes:
        order: A number that depends on what was read, and in which order.
    """

    def __init__(self, loader: Iterable[Any], ranks: Ranks) -> None:
        self._loader, self._ranks, self.order = loader, ranks, 0.0
        self._looked_at: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        for batch in self._whole():
            yield take(batch, slice(self._ranks.rank, None, self._ranks.size))

    def _whole(self) -> Iterator[Any]:
        self.order = 0.0
        batches = self._again(self._loader) if isinstance(self._loader, Iterator) else self._loader
        for number, batch in enumerate(batches, 1):
            for leaf in tensors(batch):
                places = torch.arange(1, leaf.numel() + 1, device=leaf.device)
                self.order += number * float((leaf.detach().double().flatten() * places).sum())
            yield batch

    def _again(self, batches: Iterator[Any]) -> Iterator[Any]:
        """What can be read once, with the first batches again, which may have been looked at before."""
        yield from list(self._looked_at)
        for batch in batches:
            if len(self._looked_at) < self._ranks.size:
                self._looked_at.append(batch)
            yield batch


class InTurns(Dealt):
    """Batches that every process reads, and has one after the other whole; the data of the last ones are dealt out.

    Attributes:
        positions: Of the data of this process among all.
    """

    def __iter__(self) -> Iterator[Any]:
        self.positions: list[Tensor] = []
        rank, size, n, batches = self._ranks.rank, self._ranks.size, 0, self._whole()
        while of_all := list(islice(batches, size)):
            for number, batch in enumerate(of_all):
                rows = torch.arange(n, n + only(batch)[2])
                n += len(rows)
                if len(of_all) < size:
                    self.positions.append(rows[rank::size])
                    yield take(batch, slice(rank, None, size))
                elif number == rank:
                    self.positions.append(rows)
                    yield batch


def of_this_process(batches: Iterable[Any], shard: Shard, targets_key: str = "labels") -> Iterator[Any]:
    """The batches of this process, without repeats, if several work together, of which the shard notes what they are.

    Processes reach the end of theirs at different times: nothing is exchanged here.
    """
    if current().size == 1:
        yield from batches
        return
    for batch in batches:
        if (kept := shard.without_repeats(batch, targets_key)) is not None:
            inputs, targets, _ = only(kept, targets_key)
            shard.look(inputs, targets)
            yield kept
