"""One pass over the user's data: what was seen, a few of them for later, and where to go on after an interruption.

With a file for the progress of a fit, the pass is kept too, every so many seconds and before an exception leaves: the
sampler's reservoir, what was summed on the way, and the states of the generators. The next run reads the loader from
its beginning, without the network, and goes on where the first one was as long as the batches are the same; if the
loader has another order by then the pass starts over. What a complete draw was made from is compared with what the
loader gives.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace._ranks import current
from debiased_laplace.fitting.checkpoint import Checkpoint
from debiased_laplace.fitting.stream import Stream
from debiased_laplace.sampling.reservoir import Reservoir
from debiased_laplace.sampling.sample import Sample, WeightedData

logger = logging.getLogger(__name__)

_BITS = 128

#: Data of one process that all find the network with.
SHARED = 64


@dataclass
class Seen:
    """What a stream had in it, up to some batch.

    Attributes:
        n: Number of data.
        batches: Digest of every batch, in their order.
        total: Sum of the digests of the data, modulo 2 to the power of 128, in hexadecimal: whatever their order.
    """

    n: int = 0
    batches: list[str] = field(default_factory=list)
    total: str = "0"

    def add(self, inputs: _data.Inputs, targets: Tensor) -> None:
        """Look at the next batch."""
        rows = _digests(inputs, targets)
        self.n += len(rows)
        self.batches.append(hashlib.sha256(b"".join(rows)).hexdigest()[:16])
        added = sum(int.from_bytes(row, "little") for row in rows)
        self.total = f"{(int(self.total, 16) + added) % 2**_BITS:x}"

    @staticmethod
    def joined(parts: Sequence[Seen]) -> Seen:
        """Of several parts of a stream."""
        total = sum(int(part.total, 16) for part in parts) % 2**_BITS
        return Seen(sum(part.n for part in parts), [one for part in parts for one in part.batches], f"{total:x}")

    def copy(self) -> Seen:
        """As it is now."""
        return Seen(self.n, list(self.batches), self.total)


def _digests(inputs: _data.Inputs, targets: Tensor) -> list[bytes]:
    """Of every datum with its target."""
    parts = [leaf for leaf in _data.tensors(inputs) if leaf.ndim] + [targets]
    columns = []
    for leaf in parts:
        values = leaf.detach().cpu().contiguous()
        n, kind = len(values), f"{values.dtype}{tuple(values.shape[1:])}".encode()
        size = values.numel() // max(n, 1)
        # One datum may have any strides, and bytes are those of neighbours.
        rows = values.as_strided((n, size), (size, 1)).view(torch.uint8) if size else values.new_empty(n, 0).byte()
        columns.append((kind, rows.numpy()))
    digests = []
    for index in range(len(targets)):
        digest = hashlib.blake2b(digest_size=_BITS // 8)
        for kind, column in columns:
            digest.update(kind)
            digest.update(column[index].tobytes())
        digests.append(digest.digest())
    return digests


class Reading:
    """The batches of one pass, once, as they are.

    Args:
        batches: The user's.
        checkpoint: Where the pass is kept, if it has a file.
        generator: That of the sampler, whose state belongs to the pass.
        stream: What sums on the way.
        budget: Data to draw uniformly on the way, each as likely as any other and apart from the sampler's: those
            that it keeps by importance are no fair sample of how a network does on its training data.
        seed: Of that draw.
        targets_key: Where dictionary-like batches have their targets.
        max_batches: After which the pass ends, of an endless loader say.

    Raises:
        TypeError: If the batches are not iterable.
    """

    def __init__(
        self, batches: Iterable[Any], checkpoint: Checkpoint, generator: torch.Generator, stream: Stream, *,
        budget: int, seed: int, targets_key: str = "labels", max_batches: int | None = None,
    ) -> None:  # fmt: skip
        _data.check_iterable(batches)
        self._batches, self._checkpoint, self._stream = batches, checkpoint, stream
        self._generator, self._uniform_generator = generator, torch.Generator().manual_seed(seed)
        self._targets_key, self._max_batches = targets_key, max_batches
        self._uniform = Reservoir(budget)
        self._sampler: Reservoir | None = None
        self._iterator: Iterator[Any] | None = None
        self._boundary: dict[str, Any] | None = None
        self._n_batches, self._promised = 0, _data.length(batches) if hasattr(batches, "__len__") else None
        self._ranks, self._shard = current(), _data.Shard(batches)
        self.is_merged = self._ranks.size == 1
        #: What there was; only with a file.
        self.seen = Seen()

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def resume(self, reservoir: Reservoir) -> Reservoir:
        """The sampler's reservoir of an interrupted pass, or this one, which is then kept with the pass."""
        several = self._ranks.size > 1  # which go on with a pass that was interrupted from its beginning
        kept = self._checkpoint.kept("pass") if self._checkpoint.has_file and not several else None
        if kept is not None and self._follow(kept["seen"]):
            self._generator.set_state(kept["generator"])
            self._uniform_generator.set_state(kept["own"])
            self._uniform, reservoir = Reservoir.of(kept["uniform"]), Reservoir.of(kept["sampler"])
            self._stream.observed, self.seen = kept["observed"], kept["seen"]
            self._n_batches = kept["n_batches"]
            logger.warning("The pass over the data goes on after %d batches, %d data.", self._n_batches, self.seen.n)
        self._sampler = reservoir
        return reservoir

    def _follow(self, expected: Seen) -> bool:
        """Read what an earlier run has read; whether it was the same."""
        iterator, seen = self._begin(), Seen()
        for inputs, targets, _ in _data.labelled(iterator, self._targets_key):
            seen.add(inputs, targets)
            if seen.batches[-1] != expected.batches[len(seen.batches) - 1]:
                break
            if len(seen.batches) == len(expected.batches):
                self._iterator = iterator
                return True
        if isinstance(self._batches, Iterator):
            raise ValueError(
                "Expected the data that an interrupted fit had begun with, got others, and an iterator cannot be read "
                "again. Delete the checkpoint, and give the iterator anew."
            )
        logger.warning(
            "The loader gives other batches than in the interrupted pass (a shuffle by another generator than the "
            "global ones, say): the pass over the data starts over."
        )
        return False

    def _begin(self) -> Iterator[Any]:
        if self._checkpoint.has_file:  # so that a loader that shuffles by the global generators does so again
            seed = self._generator.initial_seed() % 2**32
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        return iter(self._batches)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._begin() if self._iterator is None else self._iterator
        batches = self._promised_ones(iterator)
        try:
            for batch in batches if self._ranks.size == 1 else self._in_rounds(batches):
                for inputs, targets, n in _data.labelled([batch], self._targets_key):
                    keys = self.uniforms(n, self._uniform_generator)
                    self._uniform.offer(inputs, targets, keys, torch.ones(n, dtype=torch.float64))
                    if self._checkpoint.has_file:
                        self.seen.add(inputs, targets)
                self._n_batches += 1
                yield batch
                self._at_a_boundary()
        except BaseException:
            self.save()
            raise

    def _promised_ones(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for batch in iterator:
            if self._max_batches is not None and self._n_batches >= self._max_batches:
                return
            if self._n_batches == self._promised:
                logger.warning(
                    "The loader gives more than the %d batches that it promised, and goes on. Give max_batches "
                    "if it has no end.", self._promised,
                )  # fmt: skip
            yield batch

    def _in_rounds(self, batches: Iterator[Any]) -> Iterator[Any]:
        """This process's batches, each at the same time as those of the others, which may have more or fewer."""
        shard, ranks = self._shard, self._ranks
        for batch in itertools.chain(batches, itertools.repeat(None)):
            ended = batch is None
            batch = None if ended else shard.without_repeats(batch, self._targets_key)
            labelled = [] if batch is None else list(_data.labelled([batch], self._targets_key))
            counts = ranks.gather(None if ended else sum(n for *_, n in labelled))
            if all(count is None for count in counts):
                break
            self._stream.positions = shard.advance([count or 0 for count in counts], ranks.rank)
            if self._stream.first is None and any(counts):
                self._stream.first = self._first_of_all(labelled)
            for inputs, targets, _ in labelled:
                shard.look(inputs, targets)
            if labelled:
                yield batch
                continue
            self.uniforms(0, self._uniform_generator)  # every process draws the numbers of all data
            if self._sampler is not None:
                self.uniforms(0, self._generator)
        shard.check(ranks)

    def _first_of_all(self, labelled: list[tuple[_data.Inputs, Tensor, int]]) -> tuple[_data.Inputs, Tensor]:
        """Some of the first data of the first process that has any, for all of them to find the same network with."""
        mine = None
        for inputs, targets, _ in labelled:
            index = _data.positions_of_some(inputs, SHARED)
            mine = _data.copy(_data.take(inputs, index)), targets[index].clone()
        return next(one for one in self._ranks.gather(mine) if one is not None)

    def uniforms(self, n: int, generator: torch.Generator) -> Tensor:
        """Numbers for the n data of the batch that was given last, ``[n]``; the same whoever has which data."""
        if self._ranks.size == 1:
            return torch.rand(n, generator=generator, dtype=torch.float64)
        return torch.rand(self._shard.of_round, generator=generator, dtype=torch.float64)[self._shard.mine]

    def merge(self, reservoir: Reservoir) -> Reservoir:
        """The reservoir of the sampler for the streams of all processes; what else was kept is merged with it."""
        if self._ranks.size == 1:
            return reservoir
        positions = torch.cat([torch.empty(0, dtype=torch.int64), *self._shard.positions])
        self._uniform, self.is_merged = self._uniform.merged(self._ranks, positions), True
        self._stream.merge(self._ranks)
        self.seen = Seen.joined(self._ranks.gather(self.seen))
        return reservoir.merged(self._ranks, positions)

    def _at_a_boundary(self) -> None:
        """Everything that was read has been worked on: remember how things are."""
        if self._sampler is None or not self._checkpoint.has_file or self._ranks.size > 1:
            return
        self._boundary = {
            "n_batches": self._n_batches, "seen": self.seen.copy(), "observed": self._stream.observed,
            "generator": self._generator.get_state(), "own": self._uniform_generator.get_state(),
            "sampler": self._sampler.copy(), "uniform": self._uniform.copy(),
        }  # fmt: skip
        if self._checkpoint.is_due:
            self.save()

    def save(self) -> None:
        """Keep the pass as it was at the last boundary."""
        if self._boundary is None or not self._boundary["n_batches"]:
            return
        boundary, self._boundary = self._boundary, None
        kept = boundary | {name: boundary[name].state() for name in ("sampler", "uniform")}
        try:
            self._checkpoint.keep("pass", kept)
        except TypeError as error:  # inputs of a class that is not stored
            logger.warning("The pass over the data cannot be kept: %s", error)

    def check(self, expected: Seen | None) -> None:
        """Read the data, and raise a ``ValueError`` if they are others than a result was made from.

        What is complete is not lost for data that cannot be read any more: that is said.
        """
        if expected is None:
            return
        seen, shard = Seen(), _data.Shard(self._batches)
        try:
            for index, batch in enumerate(self._begin()):
                if self._max_batches is not None and index >= self._max_batches:
                    break
                kept = shard.without_repeats(batch, self._targets_key)
                for inputs, targets, _ in [] if kept is None else _data.labelled([kept], self._targets_key):
                    seen.add(inputs, targets)
            if self._ranks.size > 1:
                seen = Seen.joined(self._ranks.gather(seen))
        except Exception as error:  # whatever a loader fails with
            if self._ranks.size > 1:  # the others wait for what this one has read
                raise
            logger.warning(
                "The data could not be read (%s: %s), and so not compared with those that the checkpoint was made "
                "from.", type(error).__name__, error,
            )  # fmt: skip
            return
        if not seen.n:  # an iterator that was read, or nothing on purpose
            logger.warning("There are no data to compare with those of the checkpoint, which is used as it is.")
            return
        if (seen.n, seen.total) != (expected.n, expected.total):
            raise ValueError(
                f"Expected the {expected.n} data that the checkpoint was made from, got "
                + (f"{seen.n}" if seen.n != expected.n else f"{seen.n} others (or the same, changed at random)")
                + ". Delete it, or give another path."
            )

    @property
    def sample(self) -> Sample | None:
        """What was drawn uniformly, in one fold with equal weights; None if nothing was read."""
        n = len(self._uniform.keys)
        if not n:
            return None
        inputs, targets = self._uniform.content()
        weights = torch.full((n,), 1 / n, dtype=torch.float64)
        data = WeightedData(inputs, targets, weights, self._uniform.indices)
        return Sample(data, torch.zeros(n, dtype=torch.int64), 1, self._uniform.n_seen)
