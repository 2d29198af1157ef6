"""Baselines and posteriors of a task: fitted, tuned on the same validation data, and evaluated; one record a seed.

What takes long is kept as soon as it is there (a fitted posterior, the predictions of a loader), so that a run
that was interrupted goes on where it stopped. When a record is complete its working files are deleted. Both belong to
what they were made from (``provenance``): another network, other data or another task file have others.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from debiased_laplace import _ranks
from debiased_laplace.evaluation import records
from debiased_laplace.evaluation.methods import Method, Options, check_methods, methods_of
from debiased_laplace.evaluation.names import locked
from debiased_laplace.evaluation.provenance import seeded
from debiased_laplace.evaluation.suite.bench import Bench
from debiased_laplace.evaluation.suite.processes import in_processes
from debiased_laplace.evaluation.suite.subject import Subject, settings_of
from debiased_laplace.evaluation.tasks import Context, Task


def run(
    task: Task,
    folder: Path,
    seeds: Iterable[int],
    context: Context,
    *,
    methods: Sequence[Method] | None = None,
    options: Options | None = None,
    n_processes: int = 1,
    alone: bool = True,
    distributed: bool = True,
    progress: Callable[[int, str], None] = lambda seed, step: None,
) -> list[dict[str, Any]]:
    """One record for each seed, written when it is complete; one that was made from the same is used again.

    Args:
        task: From :meth:`Task.load`.
        folder: Records are in its ``records`` folder, unfinished work in ``work``.
        seeds: Any integers.
        context: For the task's functions; its seed is replaced.
        methods: :func:`~debiased_laplace.evaluation.methods.standard_methods` by default.
        options: How to tune and judge.
        n_processes: Seeds at a time, each in a separate process with one thread; 1 for none but this one. A script
            that asks for more needs the usual ``if __name__ == "__main__":``.
        alone: Whether no other process may write to the folder at the same time: those that do other seeds of the same
            run may.
        distributed: Whether the processes of an initialised group of ``torch.distributed`` do every seed together
            (``docs/distributed.md``): all of them get the records, and the first one writes to the folder. Otherwise
            every process for itself.
        progress: Called with the seed and what begins, as ``"stage: detail"``; ``"kept"`` for a record that was there,
            ``"done"`` for one that was made.

    Raises:
        RuntimeError: If a process is killed.
        ValueError: If processes of a group are to start further ones.
        TaskError: If a function of the task or a loader of it fails, or all methods do.
    """
    options = options or Options()
    if methods is None:
        methods = methods_of(task)
    check_methods(methods)
    work = partial(_seed, task.source if n_processes > 1 else task, folder, context, methods, options)
    with (
        _ranks.together("run an evaluation", wanted=distributed) as ranks,
        locked(folder) if alone and not ranks.rank else nullcontext(),
    ):
        if n_processes > 1:
            if ranks.size > 1:
                raise ValueError(
                    f"Expected n_processes=1 in a group of {ranks.size} processes, which do every seed together, got "
                    f"n_processes={n_processes}. Pass distributed=False for seeds of one process alone."
                )
            return in_processes(work, list(seeds), n_processes, progress)
        return [work(seed, partial(progress, seed)) for seed in seeds]


def _seed(
    task: Task | str, folder: Path, context: Context, methods: Sequence[Method], options: Options, seed: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The record of one seed: the one that is there, if it was made from the same, or a new one.

    A separate process loads the task anew. What a record is made from is known when the network has been loaded and
    the data have been looked at.
    """
    if isinstance(task, str):
        torch.set_num_threads(1)
        task = Task.load(task)
    context = replace(context, seed=seed)
    settings, ranks = settings_of(task, methods, options, context), _ranks.current()
    ranks.agree("evaluate", {key: repr(value) for key, value in settings.items()} | {"seed": str(seed)})
    with seeded(seed):
        progress("model")
        subject = Subject.of(task, context, methods, options)
        made_from = {"settings": settings, "inputs": subject.inputs}
        record = ranks.of_one(lambda: records.load_record(folder, seed, made_from))
        if record is not None:
            progress("kept")
            return record
        work = folder / "work" / f"seed-{seed}-{records.digest(settings)}"
        bench = Bench(task, subject, context, options, work / records.digest(made_from))
    with seeded(seed):  # the same whether the network was trained or loaded
        record = {"seed": seed} | made_from | bench.record(methods, progress)
    if not ranks.rank:
        records.write_record(records.record_path(folder, seed, made_from), record)
        shutil.rmtree(work, ignore_errors=True)
    progress("done")
    return ranks.of_one(lambda: record)
