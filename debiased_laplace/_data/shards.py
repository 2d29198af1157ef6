"""The part of a stream that one of several processes reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from debiased_laplace._data.batches import take
from debiased_laplace._data.loaders import only
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
        loader = getattr(batches, "loader", batches)
        sampler = getattr(loader, "sampler", None)
        self._sampler = sampler if isinstance(sampler, DistributedSampler) else None
        dataset: Any = getattr(loader, "dataset", None)
        self._size = len(dataset) if hasattr(dataset, "__len__") else None
        self.n_seen = self._n_read = self.of_round = 0
        self.mine = torch.empty(0, dtype=torch.int64)
        self.positions: list[Tensor] = []

    def without_repeats(self, batch: Any, targets_key: str) -> Any:
        """A batch without what a ``DistributedSampler`` gives again to make shards equally long; None for no data."""
        if self._sampler is None or current().size == 1:
            return batch
        step, first = self._sampler.num_replicas, self._sampler.rank
        own = -(-(len(self._sampler.dataset) - first) // step)  # type: ignore[arg-type]
        _, _, n = only(batch, targets_key)
        kept = max(0, min(n, own - self._n_read))
        self._n_read += n
        if not kept:
            return None
        return batch if kept == n else take(batch, slice(0, kept))

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

    def check(self, ranks: Ranks, n_seen: int) -> None:
        """Raise a ``ValueError`` if every process has read all data, and warn of some that were read several times."""
        sizes = ranks.gather(self._size)
        size = sizes[0]
        if size is None or any(other != size for other in sizes) or n_seen <= size:
            return
        remedy = (
            "Give every process its shard: DataLoader(dataset, sampler=DistributedSampler(dataset, shuffle=False)), "
            "whose repeats are left out."
        )
        if n_seen >= ranks.size * size:
            raise ValueError(
                f"Expected {ranks.size} processes to read a part of the {size} data each, got all of them in every "
                f"process: they would count {ranks.size} times. {remedy}"
            )
        warnings.warn(
            f"The {ranks.size} processes have read {n_seen} data, and their dataset has {size}: some count "
            f"several times. {remedy}", stacklevel=2,
        )  # fmt: skip


class Dealt:
    """Batches that every process reads whole, with the data dealt out among them: the order is that of one process."""

    def __init__(self, loader: Iterable[Any], ranks: Ranks) -> None:
        self._loader, self._ranks = loader, ranks

    def __iter__(self) -> Iterator[Any]:
        return (take(batch, slice(self._ranks.rank, None, self._ranks.size)) for batch in self._loader)


def of_this_process(batches: Iterable[Any], targets_key: str = "labels") -> Iterator[Any]:
    """The batches of this process, without repeats, if several work together; they are read by all of them or none."""
    ranks, shard, n = current(), Shard(batches), 0
    if ranks.size == 1:
        yield from batches
        return
    for batch in batches:
        if (kept := shard.without_repeats(batch, targets_key)) is not None:
            n += only(kept, targets_key)[2]
            yield kept
    shard.check(ranks, sum(ranks.gather(n)))
