"""A long computation that can be stopped at any time and continued with the same result.

What is complete is kept in one file, and a second run with the same settings takes it from there:

    checkpoint = Checkpoint("fit.progress", {"seed": 0, "weights": fingerprint(parameters)})
    if checkpoint.completed is None:
        data = checkpoint.once("data", draw)
        total = checkpoint.accumulate("statistics", data, measure)
        checkpoint.complete(finish(total))
    result = checkpoint.completed

The result is bitwise that of an uninterrupted run if every piece depends on its arguments alone: a step that draws
random numbers needs a separate generator, since kept steps do not run again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from debiased_laplace import _files, _ranks, _store

__all__ = ["Checkpoint"]

T = TypeVar("T")
X = TypeVar("X")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sum:
    """A sum of which the first ``n_done`` of ``n_steps`` terms are in ``total``."""

    n_done: int
    n_steps: int
    total: Any


class Checkpoint:
    """What is complete of a computation, in memory and in a file.

    Kept values must not be changed in place, since they are written again with what follows.

    Example:
        >>> checkpoint = Checkpoint(None, {"seed": 0})
        >>> checkpoint.accumulate("sum", [1, 2, 3], float)
        6.0
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any], *, interval: float = 30.0) -> None:
        """Start, or continue from the file if there is one.

        Args:
            path: The file; None keeps nothing, and everything runs as if it were not here.
            settings: All that the result depends on, without tensors (which
                :func:`~debiased_laplace._store.fingerprint` stands for). Those of the file must be equal.
            interval: Seconds that pass at least between two writes in the middle of a sum.

        Raises:
            ValueError: If the file holds something else, or progress with other settings; it is left as it is.
            FileNotFoundError: If the directory does not exist.
            CannotWriteError: If the file could not be written there.
        """
        #: Of several processes the first one reads and writes the file.
        self._ranks = _ranks.current()
        self._path: Path | None = None
        if path is not None:
            self._path = Path(path) if self._ranks.rank else _files.check_writable(path)
        self._interval = interval
        self._results: dict[str, Any] = {}
        self._sums: dict[str, Sum] = {}
        self._completed: Any = None
        self._is_complete = False
        self._used: set[str] = set()
        self._inside = ""  # the pieces within which new ones are kept at present
        self._written = time.monotonic()
        self._pending = False  # whether there is more than was written
        if self._path is not None:
            self._settings = _store.to_plain(settings)
            _store.pack_header(self._settings)  # fails now rather than when it is written
            if not self._ranks.rank and self._path.exists():
                self._continue(self._path)
            kept = self._results, self._sums, self._completed, self._is_complete
            self._results, self._sums, self._completed, self._is_complete = self._ranks.gather(kept)[0]

    @staticmethod
    def check(path: str | Path) -> None:
        """Read a file from end to end, if there is one.

        Raises:
            StoredFileError: If it is damaged.
        """
        if Path(path).exists():
            _store.read(path)

    def _continue(self, path: Path) -> None:
        header = _store.read_header(path)
        if header.get("kind") != "progress":
            raise _store.StoredFileError(
                f"Expected {path} to hold the progress of a computation, got {header.get('kind', 'something else')}. "
                "Give another path; the file is left as it is."
            )
        with _store.understood(path):
            lines = _store.differences(self._settings, header["settings"])
        if lines:
            raise ValueError(
                f"Expected {path} to hold progress with the settings of this run, got others: {'; '.join(lines)}. "
                "Delete the file, or give another path."
            )
        changed = _store.differences(_store.versions(), header["versions"])
        if changed:
            logger.warning("The progress in %s was made with other versions: %s.", path, "; ".join(changed))
        kept, _ = _store.read(path)
        with _store.understood(path):
            self._results, self._sums = dict(kept["results"]), dict(kept["sums"])
            self._is_complete, self._completed = header["complete"], kept["completed"]

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """The result of a computation, kept when it is complete.

        Args:
            name: What it is called in the file; no other piece may have the name.
            compute: Called unless its result is kept already. Pieces that it keeps itself are dropped with its
                end, since only its result is needed from then on.
        """
        name = self._claim(name, self._sums)
        if name in self._results:
            return self._results[name]
        outer, self._inside = self._inside, f"{name} > "
        try:
            result = compute()
        except BaseException:
            self._used.clear()  # whoever tries again asks for all pieces again
            raise
        finally:
            inside, self._inside = self._inside, outer
        if self._path is not None:
            _store.to_plain(result, name)  # fails before it could spoil what is written
            self._results = {key: value for key, value in self._results.items() if not key.startswith(inside)}
            self._sums = {key: value for key, value in self._sums.items() if not key.startswith(inside)}
            self._results[name] = result
            self._write()
        return result

    @property
    def has_file(self) -> bool:
        """Whether anything is kept."""
        return self._path is not None

    @property
    def is_due(self) -> bool:
        """Whether so much time has passed since the last write that there should be another."""
        return time.monotonic() - self._written >= self._interval

    def keep(self, name: str, value: Any) -> None:
        """Keep what the piece at work is in the middle of, in the place of what was kept under the name.

        It is dropped when that piece is complete.
        """
        if self._path is None:
            return
        _store.to_plain(value, name)
        self._results[self._inside + name] = value
        self._write()

    def kept(self, name: str) -> Any:
        """What an interrupted run kept of the piece at work; None if it kept nothing."""
        return self._results.get(self._inside + name)

    def accumulate(self, name: str, steps: Sequence[X], step: Callable[[X], T]) -> T:
        """The sum ``step(steps[0]) + step(steps[1]) + ...`` from left to right, kept as it grows.

        It is written at the end, after a step if ``interval`` seconds have passed since the last write, and before
        an exception or an interrupt leaves; a process that is killed loses what came after the last write.

        Args:
            name: What it is called in the file; no other piece may have the name.
            steps: At least one, and as many as when the file was written.
            step: Gives a tensor, a number, or a dataclass of this package with ``+``.
        """
        name = self._claim(name, self._results)
        current = self._sums.get(name, Sum(0, len(steps), None))
        if current.n_steps != len(steps) or not steps:
            raise ValueError(
                f"Expected {current.n_steps or 'one or more'} steps for {name!r}, got {len(steps)}. Let the settings "
                "hold all that the steps depend on; delete the file to start over."
            )
        try:
            for index in range(current.n_done, len(steps)):
                value: Any = step(steps[index])
                total = current.total + value if index else value
                current = Sum(index + 1, len(steps), total)
                if self._path is None:
                    continue
                _store.to_plain(total, name)  # fails at the first step, and before it could spoil what is written
                self._sums[name], self._pending = current, True
                if index + 1 == len(steps) or self.is_due:
                    self._write()
        except BaseException:
            self._used.clear()
            if self._pending:
                self._write()
            raise
        return current.total

    def whole(self, name: str, n_steps: int, compute: Callable[[], T]) -> T:
        """A sum that is kept as a whole, as :meth:`accumulate` would end with; what is kept of its terms is not used.

        Args:
            name: What it is called in the file; no other piece may have the name.
            n_steps: How many terms it has for one process.
            compute: Called unless the sum is kept already.
        """
        name = self._claim(name, self._results)
        known = self._sums.get(name)
        if known is not None and known.n_done == known.n_steps:
            total: T = known.total
            return total
        try:
            total = compute()
        except BaseException:
            self._used.clear()
            raise
        if self._path is not None:
            _store.to_plain(total, name)
            self._sums[name] = Sum(n_steps, n_steps, total)
            self._write()
        return total

    def complete(self, value: T) -> T:
        """Replace all pieces by the final value, which the file holds from now on; returns it."""
        if self._path is not None:
            _store.to_plain(value, "the final value")
        self._completed, self._is_complete = value, True
        self._results, self._sums = {}, {}
        self._write()
        return value

    @property
    def completed(self) -> Any:
        """The final value, or None as long as there is none."""
        return self._completed

    def _claim(self, name: str, others: dict[str, Any]) -> str:
        if self._is_complete:
            raise RuntimeError(f"Expected no more pieces of a complete computation, got {name!r}. Use `completed`.")
        name = self._inside + name
        if name in self._used or name in others:
            raise ValueError(f"Expected another name for every piece, got {name!r} twice. Number them.")
        self._used.add(name)
        return name

    def _write(self) -> None:
        if self._path is None or self._ranks.rank:
            return
        header = {
            "kind": "progress",
            "complete": self._is_complete,
            "settings": self._settings,
            "versions": _store.versions(),
        }
        kept = {"results": self._results, "sums": self._sums, "completed": self._completed}
        _store.write(self._path, kept, header)
        self._pending = False
        self._written = time.monotonic()  # after the write, so that a slow disk does not write all the time
