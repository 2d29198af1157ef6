r"""The curvature of mini-batches while a network trains: its bias, alignment, signal and noise, a batch size.

Nothing is read but the batches that the training sees: those of three steps make a measurement, at the weights after
the last of them. Two choose directions, and each is measured along those of the other; the third gives the noise
together with one that had no part in the choice. What is measured is what :mod:`.instruments` define.

Letters: m data in a batch, K directions.

Source: Schneider, Dangel, Hennig, "Cockpit: A Practical Debugging Tool for the Training of Deep Neural Networks" (arXiv
2102.06604), whose instruments of curvature are measured on the batch that is trained on; Tatzel, Mucsányi, Hackel,
Hennig (arXiv 2410.14325) for what that overstates.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from debiased_laplace import _checks, _data
from debiased_laplace._guards import global_random_state, warn_the_caller
from debiased_laplace.likelihoods import Likelihood, resolve_likelihood
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.quadratic.instruments import (
    Alignment,
    BatchSizeCurve,
    BatchSizeSuggestion,
    SignalToNoise,
    alignment,
    product_noise,
    signal_to_noise,
    suggest_batch_size,
)
from debiased_laplace.quadratic.instruments.estimates import Recorded
from debiased_laplace.quadratic.quadratic import KINDS, Quadratic

__all__ = ["CurvatureReading", "Monitor", "Writer"]

#: Batches of a measurement.
N_BATCHES = 3
#: Names of :meth:`CurvatureReading.scalars`.
SCALARS = ("bias", "alignment", "slope_snr", "curvature_snr", "suggested_batch_size")
#: What a monitor loads from a checkpoint, apart from its batches.
STATE = ("steps", "due", "n_data", "training_time", "own_time", "skipped", "history")


class Writer(Protocol):
    """What takes the values, such as :class:`torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Keep a value of a step."""


@dataclass(frozen=True)
class CurvatureReading(Recorded):
    """What three batches say of the curvature: results of the instruments.

    Attributes:
        curve: Curvatures of the first two along their directions, and of each along those of the other; its
            ``overstatement`` is the bias, ``[1, K]``. Its reference is the first batch.
        alignment: Of the first two.
        signal_to_noise: Of the second batch along the directions of the first, and the other way round.
        suggestion: Batch sizes, from the eigenvalues of the first batch and the noise of the other two along them.
    """

    curve: BatchSizeCurve
    alignment: Alignment
    signal_to_noise: tuple[SignalToNoise, SignalToNoise]
    suggestion: BatchSizeSuggestion

    @classmethod
    def of(
        cls, quadratics: tuple[Quadratic, Quadratic, Quadratic], n_directions: int, tolerance: float
    ) -> CurvatureReading:
        """Of three quadratics of independent batches of one size around the same parameters.

        Cost: the eigenpairs of two, and 2 K products with the curvature and 2 K in forward mode.

        Args:
            quadratics: Those.
            n_directions: K.
            tolerance: Bias at the suggested batch sizes, as for :func:`suggest_batch_size`.
        """
        first, second, third = quadratics
        values, directions = first.eigenpairs(n_directions)
        pair = signal_to_noise(first, n_directions, second), signal_to_noise(second, n_directions, first)
        noise = product_noise([second, third], directions, across=True)
        eigenvalues, along = (
            torch.stack([getattr(each, name) for each in pair])[None] for name in ("eigenvalues", "curvatures")
        )
        curve = BatchSizeCurve(
            (first.n_data,), eigenvalues, along, values, float(noise.mean()), noise, None, first.n_data
        )
        return cls(
            curve, alignment(directions, second.eigenpairs(n_directions)[1]), pair,
            suggest_batch_size(tolerance, curve=curve),
        )  # fmt: skip

    def scalars(self) -> dict[str, float | None]:
        """One number of each: what a monitor writes. None for one that is not finite.

        ``bias`` is the geometric mean over the directions, ``alignment`` the mean of the row sums; ``slope_snr`` and
        ``curvature_snr``, of one datum, and ``suggested_batch_size`` are medians over the directions.
        """

        def median(*values: Tensor) -> float:
            return statistics.median(torch.cat(values).tolist())

        numbers = {
            "bias": float(self.curve.overstatement.value[0].log().mean().exp()),
            "alignment": float(self.alignment.row_sums.mean()),
            "slope_snr": median(*(each.slope_snr for each in self.signal_to_noise)),
            "curvature_snr": median(*(each.curvature_snr for each in self.signal_to_noise)),
            "suggested_batch_size": median(self.suggestion.predicted),
        }
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


class Monitor:
    r"""Measures the curvature of mini-batches every few steps of a training, within a budget of time.

    The training is as it would be without: weights, buffers, gradients, modes and random states are left alone. The
    network is measured in evaluation mode (a batch normalisation with its running statistics). It is called once a
    step with the batch of the step, and copies three of them for a measurement.

    **Cost.** A measurement costs about as much as a hundred steps of the training (``docs/monitor.md``), so that it is
    the budget that decides how often there is one. What the monitor takes is timed, and so is the time between its
    calls: a measurement that would take it beyond its share is left out. The first is made in any case, since it tells
    what one costs. Memory: that of a gradient of a batch or of a part of it (``chunk_size``), and some forty vectors of
    the length of the parameters in double precision.

    Args:
        model: The network that is trained, with outputs ``[N, C]``.
        likelihood: What they mean, as for :class:`Quadratic`.
        every: Steps from one measurement to the next, at least; below three there is one every third step.
        budget: Time that the monitor may take, relative to that of the training between its calls, such as 0.1; None
            for as much as it needs.
        writer: Where values are written, under ``tag/name``; None to keep them only.
        n_directions: K.
        n_data: Data of a batch; by default those of the first. Of larger ones the first so many are used, smaller ones
            are passed over.
        tolerance: Bias of a batch of the suggested size.
        curvature: ``"ggn"`` or ``"hessian"``.
        parameters: Which trainable parameters, as for :class:`Quadratic`.
        chunk_size: Data at a time; None for whole batches.
        tag: What the names of the values begin with.
        clock: Seconds; another one than that of the wall for tests and comparisons.

    Attributes:
        history: Of every measurement a dictionary with its step, its ``scalars()``, its seconds, and the ``cost`` so
            far; with a ``problem``, in words, where the numbers are None.
        last: The last :class:`CurvatureReading` itself; None before the first.
        skipped: Measurements that were left out for the budget.

    Example:
        >>> import torch
        >>> from debiased_laplace.quadratic.monitor import Monitor
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> monitor = Monitor(model, "classification", every=10, budget=None, n_directions=2)
        >>> for _ in range(20):
        ...     x, y = torch.randn(16, 4), torch.randint(3, (16,))
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        ...     _ = monitor.step((x, y))
        >>> [(entry["step"], entry["bias"] > 1) for entry in monitor.history]
        [(10, True), (20, True)]
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        every: int = 100,
        budget: float | None = 0.1,
        writer: Writer | None = None,
        n_directions: int = 5,
        n_data: int | None = None,
        tolerance: float = 0.1,
        curvature: str = "ggn",
        parameters: str | list[str] | None = None,
        chunk_size: int | None = None,
        tag: str = "curvature",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        _checks.whole(every, "every")
        _checks.whole(n_directions, "n_directions")
        _checks.whole(n_data, "n_data", otherwise="None for those of the first batch")
        _checks.chunk_size(chunk_size)
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected a model (a torch.nn.Module), got {type(model).__name__}.")
        if curvature not in KINDS:
            raise ValueError(f"Expected a curvature out of {list(KINDS)}, got {curvature!r}.")
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                "Expected a writer with add_scalar(tag, value, step), such as torch.utils.tensorboard.SummaryWriter, "
                f"got {type(writer).__name__}."
            )
        self.model, self.likelihood, self.writer, self.tag = model, resolve_likelihood(likelihood), writer, tag
        self.every, self.n_directions, self.n_data, self.clock = every, n_directions, n_data, clock
        self.budget = None if budget is None else _checks.positive(budget, "budget")
        self.tolerance = _checks.positive(tolerance, "tolerance")
        self._settings: dict[str, Any] = {"curvature": curvature, "parameters": parameters, "chunk_size": chunk_size}
        self.steps, self.due, self.skipped = 0, every, 0
        self.training_time = self.own_time = 0.0
        self.history: list[dict[str, Any]] = []
        self.last: CurvatureReading | None = None
        self._batches: list[Any] = []
        self._left: float | None = None
        self._passed_over = 0

    def __repr__(self) -> str:
        return (
            f"Monitor(step {self.steps}: {len(self.history)} measurements, {self.skipped} left out, "
            f"{100 * self.cost:.1f} % of the time of the training)"
        )

    @property
    def cost(self) -> float:
        """Time of the monitor relative to that of the training between its calls, so far."""
        return self.own_time / self.training_time if self.training_time else math.nan

    def step(self, batch: Any, step: int | None = None) -> CurvatureReading | None:
        """Tell that a step was made; measure if it is time to.

        Args:
            batch: ``(inputs, targets)``, or what else :class:`Quadratic` takes for one batch; or a function that gives
                one, called for the batches of a measurement alone.
            step: Its number; by default one more than that of the last. A smaller one begins another training.

        Returns:
            The measurement, if there was one.

        Raises:
            TypeError: If the batch is none.
            ValueError: If the first measurement cannot be made. Trouble later on, and with numbers that are not finite
                at any time, is kept as a problem in the history instead, and the training goes on.
        """
        if step is not None and step < self.steps:
            self.due, self._left = (step // self.every + 1) * self.every, None
            self._batches.clear()
        self.steps = self.steps + 1 if step is None else step
        nearly_due = self.steps > self.due - N_BATCHES
        if nearly_due and torch.cuda.is_initialized():  # what the training has queued is its own time
            torch.cuda.synchronize()
        begun = self.clock()
        if self._left is not None:
            self.training_time += begun - self._left
        try:
            return self._measured(batch, begun) if nearly_due else None
        finally:
            self._left = self.clock()
            self.own_time += self._left - begun

    def _measured(self, batch: Any, begun: float) -> CurvatureReading | None:
        if not self._batches and not self._is_within_budget():
            self.skipped += 1
            self._postpone()
            return None
        with global_random_state():
            self._keep(batch() if callable(batch) else batch)
            if len(self._batches) < N_BATCHES or self.steps < self.due:
                return None
            measured, problem = self._measure()
        self._batches.clear()
        self._postpone()
        values = dict.fromkeys(SCALARS) if measured is None else measured.scalars()
        seconds = self.clock() - begun
        cost = (self.own_time + seconds) / self.training_time if self.training_time else None
        entry = {"step": self.steps, **values, "seconds": seconds, "cost": cost}
        self.history.append(entry if problem is None else entry | {"problem": problem})
        for name, value in {**values, "cost": cost}.items():
            if self.writer is not None and value is not None:
                self.writer.add_scalar(f"{self.tag}/{name}", value, self.steps)
        self.last = measured or self.last
        return measured

    def _is_within_budget(self) -> bool:
        """Whether a measurement that takes as long as the last whole one would be."""
        whole = [entry["seconds"] for entry in self.history if "problem" not in entry]
        seconds = (whole or [entry["seconds"] for entry in self.history])[-1:]
        return self.budget is None or not seconds or self.own_time + seconds[0] <= self.budget * self.training_time

    def _postpone(self) -> None:
        self.due = (max(self.steps, self.due) // self.every + 1) * self.every

    def _keep(self, batch: Any) -> None:
        """A copy of a batch of the size of the others: what comes next may be written into its place."""
        inputs, targets, n = _data.only(batch)
        self.n_data = self.n_data or n or None
        if not n or n < (self.n_data or 0):
            self._passed_over += 1
            if self._passed_over == max(self.every, 10):
                warn_the_caller(
                    f"Expected batches of at least {self.n_data} data to measure curvatures on, got "
                    f"{self._passed_over} smaller ones, the last of {n}. Give it n_data=, what most batches have."
                )
            return
        of_size = slice(0, self.n_data)
        self._batches.append((_data.copy(_data.take(inputs, of_size)), targets[of_size].clone()))
        del self._batches[:-N_BATCHES]

    def _measure(self) -> tuple[CurvatureReading | None, str | None]:
        try:
            snapshot = Snapshot(self.model)
            first, second, third = (
                Quadratic(snapshot, batch, self.likelihood, **self._settings) for batch in self._batches
            )
            return CurvatureReading.of((first, second, third), self.n_directions, self.tolerance), None
        except (ValueError, RuntimeError) as error:
            of_training = isinstance(error, (_checks.NonFiniteError, _checks.ConvergenceError))
            if not of_training and not self.history:
                raise
            problem = str(error)
        if not any("problem" in entry for entry in self.history):
            warn_the_caller(f"No curvature of the batches at step {self.steps}, and the training goes on: {problem}")
        return None, problem

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and a list of dictionaries of them: what :func:`torch.save` and :mod:`json` take."""
        return {name: getattr(self, name) for name in STATE} | {"history": [dict(entry) for entry in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another monitor was; batches that it held for its next measurement are taken anew.

        Raises:
            ValueError: If it is no such state.
        """
        if set(state) != set(STATE):
            raise ValueError(f"Expected a state of a monitor with {sorted(STATE)}, got {sorted(state)}.")
        for name in STATE:
            setattr(self, name, state[name])
        self.history = [dict(entry) for entry in state["history"]]
        self.last, self._left = None, None
        self._batches.clear()
