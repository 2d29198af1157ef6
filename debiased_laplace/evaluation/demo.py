"""The demonstration: scikit-learn's digits, a small CNN, the evaluation suite; no download.

``debiased-laplace demo`` on the command line, or :func:`demo` here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from debiased_laplace.evaluation.methods import Method, Options, is_variant, methods_of
from debiased_laplace.evaluation.report.summary import summarise
from debiased_laplace.evaluation.shipped import digits
from debiased_laplace.evaluation.shipped.common import one_thread
from debiased_laplace.evaluation.suite.seeds import run
from debiased_laplace.evaluation.tasks import Context, Task

#: Seeds of the demonstration, and of the quick one.
N_SEEDS, N_SEEDS_QUICK = 6, 2
#: A weak, a middle and the strongest shift of each kind, and one kind of images that are no digits.
CONDITIONS = (
    *(f"{name} {severity}" for name in ("noise", "rotation", "blur", "contrast") for severity in (1, 3, 5)),
    "shuffled digits",
)
#: Shifted and out-of-distribution images of a seed, and of a quick one. Seeds differ by far more than more images would
#: average: three times as many made standard errors of the strong shifts at most 12 % smaller, but for slight blur.
N_SHIFTED, N_SHIFTED_QUICK = 180, 90
#: Prior precisions tried: three a decade.
GRID_SIZE, GRID_SIZE_QUICK = 28, 16
#: Gradients of the network that take as long as a seed, and as the rest of the command, quick or not: their shares of
#: products and of Python are alike. From ``eval/demonstration.py``.
GRADIENTS_OF_A_SEED, GRADIENTS_OF_A_SEED_QUICK, GRADIENTS_OF_THE_REST = 6100, 4700, 1700
#: What would take longer than all else together is left to ``debiased-laplace evaluate digits``, and so are further
#: rules of tuning and single batches; the temperature is shown by both rules.
LEFT_OUT = ("laplace-torch", "ensemble")
QUICK = "This was a quick run on few data: it shows that everything works, and decides nothing."


def demo_methods(task: Task) -> tuple[Method, ...]:
    """What the demonstration compares."""
    return tuple(method for method in methods_of(task) if method.kind not in LEFT_OUT and not is_variant(method.name))


def expected_seconds(
    n_seeds: int, n_processes: int, quick: bool, *, clock: Callable[[], float] = time.perf_counter
) -> float:
    """What the demonstration will take here, by a fraction of a second of gradients; records that are kept save it.

    Args:
        n_seeds: All of them.
        n_processes: Seeds at a time, no more than there are CPUs.
        quick: Whether it is a quick one.
        clock: Seconds, for tests.
    """
    rounds = math.ceil(n_seeds / n_processes)
    gradients = rounds * (GRADIENTS_OF_A_SEED_QUICK if quick else GRADIENTS_OF_A_SEED) + GRADIENTS_OF_THE_REST
    return gradients * seconds_of_a_gradient(clock)


def seconds_of_a_gradient(clock: Callable[[], float] = time.perf_counter, at_least: float = 0.3) -> float:
    """Seconds of a gradient of the network over a training batch, one thread: the mean over at least so many."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), one_thread():
        model = digits.network()
        inputs, targets = torch.rand(digits.TRAIN_BATCH, 1, 8, 8), torch.zeros(digits.TRAIN_BATCH, dtype=torch.long)

        def gradients(n: int) -> int:
            for _ in range(n):
                model.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
            return n

        gradients(10)  # what is first takes longer
        start, n_gradients = clock(), 0
        while (seconds := clock() - start) < at_least:
            n_gradients += gradients(10)
    return seconds / n_gradients


def demo(
    out: Path | str,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    quick: bool = False,
    n_seeds: int | None = None,
    n_processes: int = 1,
    progress: Callable[[int, str], None] = lambda seed, step: None,
) -> dict[str, Any]:
    """Run all seeds of the digits.

    Args:
        out: Folder for the results; records of finished seeds with the same settings are used again.
        seed: The first seed; the others follow it.
        device: Where the models run.
        quick: Two seeds and a shorter training.
        n_seeds: Another number of seeds.
        n_processes: Seeds at a time, each in its process; see :func:`~debiased_laplace.evaluation.suite.seeds.run`.
        progress: Called with the seed and what begins.

    Returns:
        The summary of all seeds.
    """
    out, task = Path(out), Task.load("digits")
    context = Context(cache=out / "cache", quick=quick, device=torch.device(device))
    n_seeds = n_seeds or (N_SEEDS_QUICK if quick else N_SEEDS)
    options = Options(grid_size=GRID_SIZE, n_resamples=200, conditions=CONDITIONS, n_shifted=N_SHIFTED)
    if quick:
        options = replace(options, grid_size=GRID_SIZE_QUICK, n_resamples=50, n_shifted=N_SHIFTED_QUICK)
    with one_thread():
        records = run(
            task, out, range(seed, seed + n_seeds), context, methods=demo_methods(task),
            options=options, n_processes=n_processes, progress=progress,
        )  # fmt: skip
    return summarise(records)
