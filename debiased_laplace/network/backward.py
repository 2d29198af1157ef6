r"""How several vectors are back-propagated: one after the other, batched, or side by side as copies of the data.

Of few data every backward pass costs what its operations cost to be called, whatever they work on: V vectors one after
the other cost V times that. Two ways pay it once for many vectors. Autograd's batched backward pass maps its operations
over the vectors, where there are rules for that. *Copies* need none: a second forward pass over m copies of the data,
whose outputs do not depend on each other, takes m different vectors in one ordinary backward pass.

Which is the fastest depends on model, data and device. It is measured where there are vectors enough, with passes whose
results are used, and every way has to give for a vector what another one gave, up to rounding.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from debiased_laplace import _data

if TYPE_CHECKING:
    from debiased_laplace.network.factors import Factors

#: Vectors from which on measuring pays: about half of them are back-propagated in ways that are tried.
MEASURED = 64

#: Copies that are tried, one number after the other as long as more of them are faster.
COPIES = (8, 32, 128)

#: Vectors of a batched backward pass.
BATCHED = 16

#: Data from which on their number, and not that of the operations, is what a backward pass costs.
MANY_DATA = 16

#: Bytes that a pass with copies may take: activations and back-propagated vectors.
COPY_MEMORY = 2**28


@dataclass(frozen=True)
class Way:
    """How vectors are back-propagated.

    Attributes:
        vectors: At a time.
        copies: Whether by copies of the data; otherwise by a batched backward pass if there are several.
    """

    vectors: int = 1
    copies: bool = False


@dataclass(frozen=True)
class Duration:
    """Seconds that a way takes: for the forward pass of its own, if any, and for every backward pass."""

    forward: float
    backward: float

    def of(self, n_vectors: int, way: Way) -> float:
        """Seconds for so many vectors."""
        return self.forward + math.ceil(n_vectors / way.vectors) * self.backward


@dataclass
class Backward:
    """The choice of a network, measured once for every size of a batch.

    Attributes:
        forced: The way for everything; None to choose.
        durations: For every size, what was measured.
    """

    forced: Way | None = None
    durations: dict[Hashable, dict[Way, Duration]] = field(default_factory=dict)

    def __call__(self, factors: Factors, vectors: Tensor, *, again: bool) -> Iterator[tuple[slice, list[Tensor]]]:
        """Back-propagate vectors ``[V, N, C]``; yields as :meth:`.Factors.backpropagate`."""
        usual = Way(factors.network.vector_chunk)
        n_vectors, done = len(vectors), 0
        durations = self.durations.get(_size(factors))
        if self.forced is None and durations is None and n_vectors >= MEASURED and len(factors.outputs) < MANY_DATA:
            durations = self.durations[_size(factors)] = {}
            for part, of_blocks in _measured(factors, vectors, usual, durations):
                done = part.stop
                yield part, of_blocks
        way = self.forced or self._fastest(n_vectors, durations) or usual
        for start in range(done, n_vectors, way.vectors):
            part = slice(start, min(start + way.vectors, n_vectors))
            yield part, factors.back(vectors[part], way, keep=again or part.stop < n_vectors)

    @staticmethod
    def _fastest(n_vectors: int, durations: dict[Way, Duration] | None) -> Way | None:
        if not durations:
            return None
        return min(durations, key=lambda way: durations[way].of(n_vectors, way))


def _size(factors: Factors) -> Hashable:
    """The same for batches for which the same way is the fastest: powers of two of data, and of numbers of a datum."""
    return len(factors.outputs).bit_length(), _data.size_of_datum(factors.model_inputs).bit_length()


def _measured(
    factors: Factors, vectors: Tensor, usual: Way, durations: dict[Way, Duration]
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Back-propagate some of the vectors in several ways, and note how long each takes for the others."""
    first = factors.back(vectors[: usual.vectors], usual, keep=True)  # warms up
    done = usual.vectors
    last = [g[:, :, -1] for g in first]
    yield slice(0, done), first
    del first
    for way in _ways(factors, usual, durations):
        start = done - (way != usual)  # begins with a vector that is known
        part = slice(start, start + way.vectors)
        if part.stop > len(vectors):
            continue
        try:
            duration, of_blocks = _timed(factors, vectors[part], way)
        except (RuntimeError, ValueError, NotImplementedError):  # no batched derivative, or no batch of that size
            factors.forget_copies()
            continue
        if way != usual:
            if not _same(last, of_blocks, factors.network.precision):
                factors.forget_copies()
                continue
        durations[way] = duration
        last = [g[:, :, -1] for g in of_blocks]
        if part.stop > done:
            yield slice(done, part.stop), [g[:, :, done - start :] for g in of_blocks]
            done = part.stop
        del of_blocks


def _ways(factors: Factors, usual: Way, durations: dict[Way, Duration]) -> Iterator[Way]:
    """Ways to try: more copies as long as they are faster, and fit the memory."""
    network, n = factors.network, len(factors.outputs)
    yield usual
    fastest = durations[usual].backward / usual.vectors
    largest = network.chunk_size(COPY_MEMORY, inputs=factors.model_inputs) // n
    if not (network.one_by_one and network.lone_blocks):  # every copy would be run by itself
        for number in COPIES:
            way = Way(number, copies=True)
            if number > largest:
                break
            yield way
            if way not in durations or durations[way].backward / number > fastest:
                break
            fastest = durations[way].backward / number
    yield Way(BATCHED) if usual.vectors == 1 else Way()


def _timed(factors: Factors, vectors: Tensor, way: Way) -> tuple[Duration, list[Tensor]]:
    synchronize = torch.get_device_module(factors.network.device).synchronize
    synchronize()
    start = time.perf_counter()
    if way.copies:
        factors.copied(way.vectors)
        synchronize()
    between = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of batched derivatives that are a loop
        of_blocks = factors.back(vectors, way, keep=True)
    synchronize()
    return Duration(between - start, time.perf_counter() - between), of_blocks


def _same(known: list[Tensor], found: list[Tensor], precision: float) -> bool:
    """Whether a vector that was back-propagated in another way is the same in every block, up to rounding."""
    tolerance = max(1e-3, 1e3 * precision) if precision > 1e-12 else 1e-9
    largest = max((float(g.abs().max()) for g in known if g.numel()), default=0.0)
    return all(
        one.shape == other[:, :, 0].shape
        and torch.allclose(one, other[:, :, 0], rtol=tolerance, atol=tolerance * largest)
        for one, other in zip(known, found, strict=True)
    )
