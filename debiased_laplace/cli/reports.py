"""The commands that make a report: `demo`, `evaluate` and `bias`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from debiased_laplace.cli.arguments import (
    CacheOption,
    DataOption,
    DeviceOption,
    ProcessesOption,
    QuickOption,
    SeedOption,
    TaskArgument,
    check_folder,
    choose_device,
    load_task,
)
from debiased_laplace.cli.launched import device_of_process, of_all, rank_and_size, together
from debiased_laplace.cli.terminal import importing, reuse_note, show_report, shown_progress


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-results"),
    seed: SeedOption = 0,
    device: DeviceOption = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Seeds at a time, each in a process; by default one for each CPU.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two seeds and less of everything, as a try.")] = False,
) -> None:
    """Compare posteriors on scikit-learn's digits: a table, results.json, diagrams and a report.

    Finished seeds are kept in OUT/records: a run that was interrupted goes on where it stopped.
    """
    check_folder(out)
    from debiased_laplace.evaluation.suite import processes as pool

    if processes != 1:
        pool.prepare()
    with importing():
        from debiased_laplace.evaluation import demo as demonstration
    where = choose_device(device)
    n_processes = processes or (pool.available() if where.type == "cpu" else 1)
    n_seeds = demonstration.N_SEEDS_QUICK if quick else demonstration.N_SEEDS
    _evaluate_and_show(
        out, n_seeds, quick,
        lambda progress: demonstration.demo(
            out, seed=seed, device=where, quick=quick, n_processes=n_processes, progress=progress
        ),
        "Debiased Laplace on digits",
        partial(demonstration.expected_seconds, n_seeds, min(n_processes, pool.available()), quick),
    )  # fmt: skip


def evaluate(
    task: TaskArgument = "digits",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("evaluation"),
    seeds: Annotated[int | None, typer.Option(min=1, help="How many; by default what the task says.")] = None,
    seed: SeedOption = 0,
    data_dir: DataOption = None,
    cache: CacheOption = None,
    device: DeviceOption = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this method; may be given several times.")] = None,
    draws: Annotated[
        int | None, typer.Option(min=1, help="Draws of the data for curvature in each seed; 2, or 1 with --quick.")
    ] = None,
    equal_seconds: Annotated[
        bool, typer.Option("--equal-seconds", help="Also a single batch that takes as long as the debiased fit.")
    ] = False,
    processes: ProcessesOption = 1,
    quick: QuickOption = False,
) -> None:
    """Judge a trained network with and without posteriors, on test, shifted and out-of-distribution data: one page.

    An interrupted run goes on where it stopped when the same command is given again.

    Under torchrun its processes share the seeds, or the data of every seed if these are fewer, and the first one writes
    the page.
    """
    check_folder(out)
    if processes > 1:
        from debiased_laplace.evaluation.suite import processes as pool

        pool.prepare()
    with importing():
        from debiased_laplace.evaluation import Options, run, summarise
        from debiased_laplace.evaluation.methods import methods_of
    loaded, context = load_task(task, device, data_dir, cache or out / "cache", quick)
    n_seeds = seeds or (1 if quick else int(loaded.constant("SEEDS", 1)))
    methods = methods_of(loaded, equal_seconds=equal_seconds)
    if only:
        unknown = sorted(set(only) - {method.name for method in methods})
        if unknown:
            names = ", ".join(method.name for method in methods)
            raise typer.BadParameter(f"Expected methods out of {names}, got {unknown}.", param_hint="--only")
        methods = tuple(method for method in methods if method.name in only)
    options = Options(n_resamples=200 if quick else 1000, draws=draws or (1 if quick else 2))
    rank, size = rank_and_size()
    context, every = replace(context, device=device_of_process(context.device)), range(seed, seed + n_seeds)

    def judge(seeds: Sequence[int], progress: Callable[[int, str], None], alone: bool = True) -> list[dict[str, Any]]:
        return run(
            loaded, out, seeds, context, methods=methods, options=options, n_processes=processes, alone=alone,
            progress=progress,
        )  # fmt: skip

    def silent(_seed: int, _step: str) -> None:
        """Only the first process says how far it is."""

    def of_this_process(progress: Callable[[int, str], None]) -> list[dict[str, Any]]:
        if size > n_seeds and processes == 1:
            with together("evaluate"):
                return judge(every, progress)
        records = judge(every[rank::size], progress, alone=not rank)
        return sorted((one for some in of_all(records) for one in some), key=lambda record: record["seed"])

    def work(progress: Callable[[int, str], None]) -> dict[str, Any]:
        return summarise(of_this_process(progress))

    if rank:
        of_this_process(silent)
        return
    _evaluate_and_show(out, n_seeds, quick, work, "")


def bias(
    task: TaskArgument = "digits",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("bias"),
    batch_size: Annotated[int, typer.Option(min=2, help="Data in a batch.")] = 128,
    batches: Annotated[int, typer.Option(min=3, help="How many, none sharing data with another.")] = 5,
    directions: Annotated[int, typer.Option(min=2, help="Top eigenvectors of each batch.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Of conjugate gradients on each batch.")] = 10,
    reference: Annotated[int, typer.Option(min=1, help="Training data that stand for all of them.")] = 2000,
    pool: Annotated[int, typer.Option(min=1, help="Training data to draw from, kept in memory.")] = 10_000,
    size: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size to compare; may be given several times.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Overstatement that a suggested batch size allows.")] = 0.1,
    curvature: Annotated[str, typer.Option(help="ggn or hessian.")] = "ggn",
    seed: SeedOption = 0,
    data_dir: DataOption = None,
    cache: CacheOption = None,
    device: DeviceOption = None,
    quick: QuickOption = False,
) -> None:
    """Measure how far mini-batches overstate the curvature of a task's network: a sentence, figures, one page.

    Complete parts are kept: an interrupted run goes on where it stopped, and a finished one is only drawn anew.
    """
    check_folder(out)
    with importing():
        from debiased_laplace.evaluation.bias import BiasOptions, deciding_table, statement, study, write_outputs
        from debiased_laplace.evaluation.demo import QUICK
    if not tolerance > 0:
        raise typer.BadParameter(f"Expected a number above zero, got {tolerance:g}.", param_hint="--tolerance")
    loaded, context = load_task(task, device, data_dir, cache or out / "cache", quick, seed)
    options = (
        BiasOptions(
            batch_size=16, n_batches=3, n_directions=3, n_steps=3, pool=256, reference=128, sizes=(8, 16),
            n_size_directions=1, n_vectors=2, curvature=curvature,
        )
        if quick
        else BiasOptions(
            batch_size=batch_size, n_batches=batches, n_directions=directions, n_steps=steps, pool=pool,
            reference=reference, sizes=tuple(size or ()), curvature=curvature,
        )
    )  # fmt: skip
    start = time.perf_counter()
    with shown_progress(1, out) as report:
        result = study(loaded, out, context, options, tolerance=tolerance, progress=report)
    paths = write_outputs(out, result, notice=QUICK if quick else "")
    seconds = time.perf_counter() - start
    notes = reuse_note(list(result["made"].values()), result["kept"], "parts", out)
    show_report(statement(result), deciding_table(result), result["task"]["description"], paths, seconds, quick, notes)


def _evaluate_and_show(
    out: Path, n_seeds: int, quick: bool,
    work: Callable[[Callable[[int, str], None]], dict[str, Any]], title: str,
    expected: Callable[[], float] | None = None,
) -> None:  # fmt: skip
    """Run and show how far it is, write the files, show the answer and the numbers that decide."""
    from debiased_laplace.evaluation.demo import QUICK
    from debiased_laplace.evaluation.progress import Seeds

    with shown_progress(n_seeds, out) as reporter:
        if expected is not None:
            reporter.expect(expected(), "by the speed of this machine")
        # Needed in the end alone; imported while the server of processes imports what it needs.
        from debiased_laplace.evaluation import write_outputs
        from debiased_laplace.evaluation.report.statement import deciding_table, statement

        seeds = Seeds(reporter, n_seeds)
        summary = work(seeds)
    paths = write_outputs(out, summary, title=title, notice=QUICK if quick else "")
    notes = reuse_note(summary["made"], len(seeds.kept), "seeds", out)
    description, decides = summary["task"]["description"], deciding_table(summary)
    show_report(statement(summary), decides, description, paths, reporter.elapsed, quick, notes)
