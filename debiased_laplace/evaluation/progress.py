"""How far a long command is: a bar on a terminal, lines elsewhere, and what is left."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: Seconds after which a line is written where there is no terminal, whether or not anything new begins.
EVERY = 10.0


class Reporter:
    """Tells how far a command is, on the standard error stream.

    Args:
        total: Pieces of work, if that is known already.
        clock: Seconds, for tests.

    Attributes:
        expected: Seconds that all of it takes, if that was estimated before it began.
    """

    expected: float | None = None

    def __init__(self, total: int = 1, clock: Callable[[], float] = time.perf_counter) -> None:
        self.console = Console(stderr=True)
        self._clock, self._start, self._total = clock, clock(), total
        self._bars: Progress | None = None
        self._latest: tuple[str, float | None] = "starting", None
        self._updated = self._said = self._start
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._repeating = threading.Thread(target=self._repeat, daemon=True)
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<34}", markup=False), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn("{task.fields[left]}", markup=False), console=self.console,
            )  # fmt: skip
            self._bar = self._bars.add_task("", total=total, left="")

    def __enter__(self) -> Reporter:
        if self._bars is not None:
            self._bars.start()
        else:
            self._repeating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            if kind is None:
                self._bars.update(self._bar, completed=self._total, description="done", left="")
            self._bars.stop()
        else:
            self._ended.set()
            self._repeating.join()

    def expect(self, seconds: float, why: str) -> None:
        """Say before anything begins how long all of it takes, and what that is judged by."""
        self.expected = seconds
        self.console.print(f"About {_duration(seconds)}, {why}.", highlight=False, markup=False, soft_wrap=True)

    def __call__(
        self, finished: int, total: int, step: str, left: float | None = None, *, at_once: bool = True
    ) -> None:
        """So many pieces of work are finished, and a step begins.

        Args:
            finished: Pieces of work.
            total: Of so many.
            step: What begins; where there is no terminal, a line.
            left: Seconds to go, if there is an estimate.
            at_once: Whether it is worth a line; otherwise it has one when nothing else has been said for long.
        """
        self._total = total
        if self._bars is not None:
            remaining = "" if left is None else f"about {_duration(left)} left"
            self._bars.update(self._bar, completed=finished, total=total, description=step, left=remaining)
            return
        with self._lock:
            self._latest, self._updated = (f"{finished} of {total}: {step}", left), self._clock()
            if at_once:
                self._write()
        self.remind()

    def remind(self) -> None:
        """Write where the work is, if nothing has been written for :data:`EVERY` seconds."""
        with self._lock:
            if self._clock() - self._said >= EVERY:
                self._write()

    def _write(self) -> None:
        (step, left), now = self._latest, self._clock()
        self._said = now
        line = f"[{_duration(now - self._start):>9}] {step}"
        if left is not None:
            line += f" (about {_duration(max(left - (now - self._updated), 0))} left)"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _repeat(self) -> None:
        while not self._ended.wait(EVERY / 4):
            self.remind()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._start


class Seeds:
    """Counts the steps of seeds, which may run side by side, and estimates what is left.

    Args:
        reporter: Told about every step.
        n_seeds: How many.
    """

    def __init__(self, reporter: Reporter, n_seeds: int) -> None:
        self.reporter, self.n_seeds = reporter, n_seeds
        self.kept: list[int] = []
        self._finished: list[int] = []
        self._steps: Counter[int] = Counter()
        self._stages: dict[int, str] = {}

    def __call__(self, seed: int, step: str) -> None:
        """A step of a seed begins; ``"kept"`` and ``"done"`` end it."""
        stage = step.partition(": ")[0]
        self._steps[seed] += 1
        if step in ("kept", "done"):
            (self.kept if step == "kept" else self._finished).append(seed)
        finished = len(self.kept) + len(self._finished)
        if self.reporter.console.is_terminal:
            self.reporter(finished, self.n_seeds, f"seed {seed}: {step}", self._left())
        else:
            new, self._stages[seed] = self._stages.get(seed) != stage, stage
            what = stage if new else step
            self.reporter(finished, self.n_seeds, f"seed {seed}: {what}", self._left(), at_once=new)

    def _left(self) -> float | None:
        """By the steps of a finished seed; those of seeds that were kept cost nothing and are none.

        Before one is finished by what was expected.
        """
        if not self._finished:
            expected = self.reporter.expected
            return None if expected is None or self.kept else max(expected - self.reporter.elapsed, 0.0)
        each = self._steps[self._finished[0]]
        made = sum(count for seed, count in self._steps.items() if seed not in self.kept)
        wanted = each * (self.n_seeds - len(self.kept))
        return self.reporter.elapsed * max(wanted - made, 0) / made


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
