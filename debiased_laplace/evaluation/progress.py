"""How far a long command is: a bar on a terminal, lines elsewhere, and what is left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Reporter:
    """Tells how far a command is, on the standard error stream.

    Args:
        total: Pieces of work, if that is known already.
        clock: Seconds, for tests.
    """

    def __init__(self, total: int = 1, clock: Callable[[], float] = time.perf_counter) -> None:
        self.console = Console(stderr=True)
        self._clock, self._start, self._total = clock, clock(), total
        self._bars: Progress | None = None
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<34}", markup=False), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn("{task.fields[left]}", markup=False), console=self.console,
            )  # fmt: skip
            self._bar = self._bars.add_task("", total=total, left="")

    def __enter__(self) -> Reporter:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            if kind is None:
                self._bars.update(self._bar, completed=self._total, description="done", left="")
            self._bars.stop()

    def __call__(self, finished: int, total: int, step: str, left: float | None = None) -> None:
        """So many pieces of work are finished, and a step begins.

        Args:
            finished: Pieces of work.
            total: Of so many.
            step: What begins; where there is no terminal, a line.
            left: Seconds to go, if there is an estimate.
        """
        remaining = "" if left is None else f"about {_duration(left)} left"
        self._total = total
        if self._bars is not None:
            self._bars.update(self._bar, completed=finished, total=total, description=step, left=remaining)
            return
        line = f"[{_duration(self.elapsed):>9}] {finished} of {total}: {step}"
        self.console.print(
            f"{line} ({remaining})" if remaining else line, highlight=False, markup=False, soft_wrap=True
        )

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._start


class Seeds:
    """Counts the steps of seeds, which may run side by side, and estimates what is left after the first.

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
        elif self._stages.get(seed) != stage:
            self._stages[seed] = stage
            self.reporter(finished, self.n_seeds, f"seed {seed}: {stage}", self._left())

    def _left(self) -> float | None:
        """By the steps of a finished seed; those of seeds that were kept cost nothing and are none."""
        if not self._finished:
            return None
        each = self._steps[self._finished[0]]
        made = sum(count for seed, count in self._steps.items() if seed not in self.kept)
        wanted = each * (self.n_seeds - len(self.kept))
        return self.reporter.elapsed * max(wanted - made, 0) / made


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
