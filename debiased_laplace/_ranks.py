"""Processes of ``torch.distributed`` that fit or tune one posterior together; one process alone is the usual case.

Code asks for :func:`current` and writes what every process does: to one alone, sums and what is gathered are its own.
Everything that is exchanged goes through a group of its own over gloo, in the memory of the CPU: when a process raises
an error, it leaves its message in the store of the group and its connections close, so that the others stop with it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

#: Seconds in which all processes have to begin with a computation, and to say why one of them ended.
CONTACT, LAST_WORDS = 300.0, 3.0

#: How long a process waits for the others in the middle of one.
WAIT = timedelta(hours=2)

#: Seconds between two looks at whether another process has raised an error.
EVERY = 1.0


class RankError(RuntimeError):
    """Another process of the group has ended, with its message if it left one."""


class LostRankError(RankError):
    """Another process of the group has ended without a message."""


class Ranks:
    """One process alone."""

    #: Which one this is, and how many there are.
    rank, size = 0, 1

    def check(self) -> None:
        """Raise a :class:`RankError` if another process has raised an error."""

    def gather(self, value: T, device: torch.device | None = None) -> list[T]:
        """What every process has, in their order; tensors of a device come to this one, or to the CPU."""
        return [value]

    def to_first(self, value: T) -> list[T]:
        """What every process has, in their order, in the first one; nothing in the others."""
        return [value]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor of one shape over all processes, the same bits in each of them."""
        return tensor

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """A tensor of one process; the others give one of its shape and dtype."""
        return tensor

    def rounds(self, items: Iterator[T], device: torch.device | None = None) -> Iterator[T]:
        """Items of all processes: the first of each, then the second of each that has one, and so on."""
        return items

    def agree(self, what: str, settings: Mapping[str, str]) -> None:
        """Raise a ``ValueError`` if another process has other settings."""

    def of_one(self, compute: Callable[[], T], device: torch.device | None = None) -> T:
        """What the first process computes, in all of them; tensors of a device come to this one, or to the CPU."""
        return compute()

    def after_first(self, make: Callable[[], T]) -> T:
        """What every process makes, after the first one has made it, and kept it for the others if it keeps it."""
        return make()

    def meet(self, what: str, limit: float | None = None) -> None:
        """Wait until all processes are here, for so many seconds at most.

        Raises:
            RankError: If one does not come, or has raised an error.
        """

    def share(self, costs: Tensor) -> slice:
        """Consecutive pieces for this process, of pieces with some costs ``[n]``, in parts that cost about the same."""
        ends = costs.double().cumsum(0)
        bounds = torch.arange(1, self.size, dtype=torch.float64) * (float(ends[-1]) / self.size if len(ends) else 0.0)
        # A piece belongs to the part that its middle falls into.
        cuts = [0, *torch.searchsorted(ends - costs.double() / 2, bounds).tolist(), len(costs)]
        return slice(cuts[self.rank], cuts[self.rank + 1])

    def owners(self, costs: Sequence[float]) -> list[int]:
        """A process for every piece of work: the largest first, each to the one that has least to do."""
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
            owners[index] = min(range(self.size), key=loads.__getitem__)
            loads[owners[index]] += costs[index]
        return owners


class Group(Ranks):
    """Some processes, each of which makes the same calls in the same order."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        dist = torch.distributed
        self._dist, self._number = dist, next(Group._numbers)
        self.world = dist.group.WORLD
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # The store by which the processes found each other: it outlives every connection between them.
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.distributed_c10d.PrefixStore(f"debiased_laplace/{self._number}", store)
        self._checked, self._n_met, self._group = time.monotonic(), 0, None

    def open(self) -> None:
        """Connect the processes, all of which are here."""
        self._group = self._together(lambda: self._dist.new_group(backend="gloo", timeout=WAIT))

    def meet(self, what: str, limit: float | None = None) -> None:
        self._n_met += 1
        key, begun = f"met {self._n_met}", time.monotonic()
        arrived = self._together(lambda: self._store.add(key, 1))
        while arrived < self.size:
            self.check()
            waited = time.monotonic() - begun
            if limit is not None and waited > limit:
                raise RankError(
                    f"Expected all {self.size} processes of the group to {what} together, got {arrived} of them within "
                    f"{limit:.0f} s. Call it in every process, or with distributed=False for one process alone."
                )
            time.sleep(0.01 if waited < 1 else 0.1)
            arrived = self._together(lambda: self._store.add(key, 0))
        if (message := self._message()) is not None:  # of one that has not waited any longer
            raise RankError(message)

    # -- errors ----------------------------------------------------------------------------------

    def check(self) -> None:
        if time.monotonic() - self._checked > EVERY:
            self._checked = time.monotonic()
            if (message := self._message()) is not None:
                raise RankError(message)

    def _message(self) -> str | None:
        try:
            return str(self._store.get("error").decode()) if self._store.check(["error"]) else None
        except RuntimeError as error:  # the process with the store is gone
            return f"Another of the {self.size} processes ended, with the store of the group ({error})."

    def leave(self, error: BaseException) -> None:
        """Leave an error for the others, unless they have one, and close the connections: those that wait stop."""
        message = f"Process {self.rank} of {self.size} stopped: {type(error).__name__}: {error}"
        if isinstance(error, RankError):
            message = str(error)
        with contextlib.suppress(RuntimeError):
            self._store.compare_set("error", "", message)
        if self._group is not None:
            with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                self._dist.destroy_process_group(self._group)
        self._group = None

    def _together(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            until = time.monotonic() + LAST_WORDS
            while (message := self._message()) is None and time.monotonic() < until:
                time.sleep(0.05)
            if message is not None:
                raise RankError(message) from error
            if "imed out" in str(error):
                message = f"Process {self.rank} of {self.size} has waited {WAIT} for another one, which did not come."
            else:
                message = (
                    f"Lost the connection of process {self.rank} of {self.size} with another one, which ended without "
                    f"a word: killed, for want of memory say ({str(error).splitlines()[0]})."
                )
            raise LostRankError(message) from error

    # -- what is exchanged ------------------------------------------------------------------------

    def gather(self, value: T, device: torch.device | None = None) -> list[T]:
        every: list[bytes | None] = [None] * self.size
        self._together(lambda: self._dist.all_gather_object(every, _packed(value), group=self._group))
        return [value if rank == self.rank else _unpacked(of_rank, device) for rank, of_rank in enumerate(every)]

    def to_first(self, value: T) -> list[T]:
        every: list[bytes | None] | None = None if self.rank else [None] * self.size
        own = b"" if every else _packed(value)
        self._together(lambda: self._dist.gather_object(own, every, 0, self._group))
        return [value, *(_unpacked(of_rank, None) for of_rank in every[1:])] if every else []

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().to("cpu", copy=True).contiguous()
        self._together(lambda: self._dist.all_reduce(total, group=self._group))
        return total.to(tensor.device)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        sent = tensor.detach().cpu().contiguous()
        self._together(lambda: self._dist.broadcast(sent, source, self._group))  # the group is of all ranks
        return tensor if self.rank == source else sent.to(tensor.device)

    def of_one(self, compute: Callable[[], T], device: torch.device | None = None) -> T:
        made = [compute()] if self.rank == 0 else []
        sent: list[bytes | None] = [_packed(made[0]) if made else None]
        self._together(lambda: self._dist.broadcast_object_list(sent, 0, group=self._group))
        return made[0] if made else _unpacked(sent[0], device)

    def after_first(self, make: Callable[[], T]) -> T:
        made = [] if self.rank else [make()]
        self.meet("go on")  # which may take days
        return made[0] if made else make()

    def rounds(self, items: Iterator[T], device: torch.device | None = None) -> Iterator[T]:
        while True:
            every = self.gather(tuple(itertools.islice(items, 1)), device)
            if not any(every):
                return
            for of_rank in every:
                yield from of_rank

    def agree(self, what: str, settings: Mapping[str, str]) -> None:
        every = self.gather(dict(settings))
        for rank, others in enumerate(every):
            different = sorted(key for key in settings.keys() | others.keys() if every[0].get(key) != others.get(key))
            if different:
                lines = [f"{key}: {every[0].get(key)} and {others.get(key)}"[:300] for key in different[:5]]
                lines += [f"{len(different) - 5} more"] if len(different) > 5 else []
                raise ValueError(
                    f"Expected all {self.size} processes to {what} with the same model and settings, got others in "
                    f"process {rank} than in process 0: {'; '.join(lines)}. Load the same weights, or seed every "
                    "process alike before the model is made, and give the same arguments; running statistics, which "
                    "differ after a training in several processes, come from the first one by "
                    "torch.distributed.broadcast(buffer, 0) for each of model.buffers()."
                )


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes | None, device: torch.device | None) -> Any:
    def moved(storage: Any, place: str) -> Any:
        return storage if place == "cpu" or device is None else storage.to(device=device)

    return torch.load(io.BytesIO(data or b""), moved, weights_only=False)


ALONE = Ranks()

_current: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)
#: The group of all that is done together, and within it that of parts that may fail by themselves.
_open: list[Group] = []


def current() -> Ranks:
    """The processes that the code that asks is run by together."""
    return _current.get()


@contextmanager
def together(what: str, *, wanted: bool = True) -> Iterator[Ranks]:
    """Let all processes of the group that the program has initialised, if it has, run the code within together.

    Args:
        what: What it is, for errors: "fit".
        wanted: Whether to; otherwise every process is alone.
    """
    if not wanted or _world_size() == 1:
        token = _current.set(ALONE)
        try:
            yield ALONE
        finally:
            _current.reset(token)
        return
    if isinstance(current(), Group):  # a part of something larger
        yield current()
        return
    new = not _open or _open[0].world is not torch.distributed.group.WORLD
    if new:
        _open[:] = [Group()]
    group = _open[0]
    token = _current.set(group)
    try:
        group.meet(what, CONTACT)
        if new:
            group.open()
        calls = group.gather(what)
        if len(set(calls)) > 1:
            raise RankError(
                f"Expected all {group.size} processes to do the same, got " + ", ".join(map(repr, calls)) + " in their "
                "order. Make the same calls in every process, or pass distributed=False."
            )
        yield group
        group.gather(None)  # so that no process leaves the others in the middle of something
    except BaseException as error:
        while _open:
            _open.pop().leave(error)
        raise
    finally:
        _current.reset(token)


@contextmanager
def attempt() -> Iterator[None]:
    """Let the processes that work together do a part that may fail: an error in one of them is one in all of them.

    It does not disturb what they exchange otherwise. Whoever catches it lets all of them :meth:`Ranks.meet`, and they
    go on together; not after a :class:`LostRankError`.
    """
    whole = current()
    if whole.size == 1:
        yield
        return
    if len(_open) == 1:
        whole.meet("begin", WAIT.total_seconds())
        _open.append(Group())
        _open[1].open()
    part = _open[1]
    token = _current.set(part)
    try:
        yield
        part.gather(None)
    except BaseException as error:
        _open.remove(part)
        part.leave(error)
        raise
    finally:
        _current.reset(token)


def _world_size() -> int:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 1
    return int(distributed.get_world_size())
