"""The command line. Importing this module is light: what a command needs is imported when it runs."""

from __future__ import annotations

import glob
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from debiased_laplace.evaluation.progress import Reporter
    from debiased_laplace.evaluation.tasks import Context, Task

app = typer.Typer(
    help="Laplace approximations with debiased curvature.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

#: Columns of the output where the terminal does not say how wide it is.
WIDTH = 100

TaskArgument = Annotated[str, typer.Argument(help="A task file, or a shipped task (see `tasks`).", metavar="TASK")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default cuda if there is one.")]
DataOption = Annotated[Path | None, typer.Option(help="Folder with local data, for tasks that look for some.")]
CacheOption = Annotated[
    Path | None, typer.Option(help="Folder where the task keeps trained weights; OUT/cache by default.")
]
FixedCacheOption = Annotated[Path, typer.Option(help="Folder where the task keeps trained weights.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="Little of everything, as a try.")]
ProcessesOption = Annotated[
    int,
    typer.Option(min=1, help="Seeds at a time; with more than one each is a process with one thread."),
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="First seed; the others follow it.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from debiased_laplace import __version__

        typer.echo(f"debiased-laplace {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Laplace approximations with debiased curvature."""


@app.command()
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
    _check_folder(out)
    from debiased_laplace.evaluation.suite import processes as pool

    if processes != 1:
        pool.prepare()
    with _imports():
        from debiased_laplace.evaluation import demo as demonstration
    where = _device(device)
    n_processes = processes or (pool.available() if where.type == "cpu" else 1)
    n_seeds = demonstration.N_SEEDS_QUICK if quick else demonstration.N_SEEDS
    _evaluate(
        out, n_seeds, quick,
        lambda progress: demonstration.demo(
            out, seed=seed, device=where, quick=quick, n_processes=n_processes, progress=progress
        ),
        "Debiased Laplace on digits",
    )  # fmt: skip


@app.command()
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
    """
    _check_folder(out)
    with _imports():
        from debiased_laplace.evaluation import Options, run, summarise
        from debiased_laplace.evaluation.methods import methods_of
    loaded, context = _task(task, device, data_dir, cache or out / "cache", quick)
    n_seeds = seeds or (1 if quick else int(loaded.constant("SEEDS", 1)))
    methods = methods_of(loaded, equal_seconds=equal_seconds)
    if only:
        unknown = sorted(set(only) - {method.name for method in methods})
        if unknown:
            names = ", ".join(method.name for method in methods)
            raise typer.BadParameter(f"Expected methods out of {names}, got {unknown}.", param_hint="--only")
        methods = tuple(method for method in methods if method.name in only)
    options = Options(n_resamples=200 if quick else 1000, draws=draws or (1 if quick else 2))
    _evaluate(
        out, n_seeds, quick,
        lambda progress: summarise(
            run(
                loaded, out, range(seed, seed + n_seeds), context, methods=methods, options=options,
                n_processes=processes, progress=progress,
            )
        ),
        "",
    )  # fmt: skip


@app.command()
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
    _check_folder(out)
    with _imports():
        from debiased_laplace.evaluation.bias import BiasOptions, statement, study, tables, write_outputs
        from debiased_laplace.evaluation.demo import QUICK
    if not tolerance > 0:
        raise typer.BadParameter(f"Expected a number above zero, got {tolerance:g}.", param_hint="--tolerance")
    loaded, context = _task(task, device, data_dir, cache or out / "cache", quick, seed)
    with _clear_errors():
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
    with _reported(1, out) as report:
        found = study(loaded, out, context, options, tolerance=tolerance, progress=report)
    paths = write_outputs(out, found, notice=QUICK if quick else "")
    seconds = time.perf_counter() - start
    again = _used_again(list(found["made"].values()), found["kept"], "parts", out)
    _say(statement(found), tables(found), found["task"]["description"], paths, seconds, quick, again)


@app.command()
def fit(
    task: TaskArgument,
    out: Annotated[Path, typer.Option(help="File for the posterior.")] = Path("posterior.safetensors"),
    seed: SeedOption = 0,
    budget: Annotated[int | None, typer.Option(min=0, help="Training data for curvature; 0 for all of them.")] = None,
    structure: Annotated[str, typer.Option(help="kron, lowrank, diag, full or isotropic.")] = "kron",
    data_dir: DataOption = None,
    cache: FixedCacheOption = Path("cache"),
    device: DeviceOption = None,
    quick: QuickOption = False,
) -> None:
    """Fit and tune a posterior for a task's network, and save it. An interrupted fit goes on where it stopped."""
    _check_file(out)
    with _imports():
        from debiased_laplace import DebiasedLaplace
        from debiased_laplace.evaluation.methods import Options, recipe
        from debiased_laplace.evaluation.provenance import seeded
        from debiased_laplace.laplace_torch.settings import STRUCTURES
    if structure not in STRUCTURES:
        raise typer.BadParameter(
            f"Expected one out of {list(STRUCTURES)}, got {structure!r}.", param_hint="--structure"
        )
    loaded, context = _task(task, device, data_dir, cache, quick, seed)
    with _clear_errors(), _told_warnings(), seeded(seed):
        model = loaded.model(context)
        la = DebiasedLaplace(model, loaded.likelihood, hessian_structure=structure, seed=seed)
        budget = loaded.budget if budget is None else budget or None
        try:
            checkpoint = _checkpoint(out, loaded, context, model, {"budget": budget, "structure": structure})
            la.fit(
                loaded.loader("train_loader", context), budget=budget, n_data=loaded.n_data, generator=seed,
                progress_bar=True, checkpoint=checkpoint,
            )  # fmt: skip
        except KeyboardInterrupt:
            typer.echo("Interrupted. Run the same command to go on.", err=True)
            raise typer.Exit(130) from None
        la.optimize_prior_precision(
            val_loader=loaded.loader("val_loader", context),
            progress_bar=True,
            **Options().search,
            **recipe(loaded.likelihood),
        )
        la.save(out)
        checkpoint.unlink(missing_ok=True)
    typer.echo(la.coverage())
    typer.echo(f"Prior precision {float(la.prior_precision.flatten()[0]):.4g}. Written: {out.resolve()}")


@app.command()
def predict(
    task: TaskArgument,
    posterior: Annotated[Path, typer.Argument(help="File that `fit` wrote.")],
    out: Annotated[Path, typer.Option(help="File for the predictions (NumPy's .npz).")] = Path("predictions.npz"),
    seed: SeedOption = 0,
    data_dir: DataOption = None,
    cache: FixedCacheOption = Path("cache"),
    device: DeviceOption = None,
    quick: QuickOption = False,
) -> None:
    """Predict a task's test data with a saved posterior: probabilities, or mean and variance, and the targets."""
    _check_file(out)
    with _imports():
        import io

        import numpy as np
        from tqdm import tqdm

        from debiased_laplace import DebiasedLaplace, _data
        from debiased_laplace.evaluation.predictors.posterior import LaplacePredictor
        from debiased_laplace.evaluation.provenance import seeded
        from debiased_laplace.evaluation.records import write_whole
    if not posterior.is_file():
        raise typer.BadParameter(f"{posterior} does not exist. `debiased-laplace fit` writes one.")
    loaded, context = _task(task, device, data_dir, cache, quick, seed)
    with _clear_errors(), seeded(seed):
        la = DebiasedLaplace.load(posterior, loaded.model(context))
        predictor, parts = LaplacePredictor(la), []
        for inputs, targets, _ in tqdm(_data.labelled(loaded.loader("test_loader", context)), unit="batch"):
            parts.append(predictor(inputs).arrays() | {"targets": targets.cpu().numpy()})
        arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    write_whole(out, file.getvalue())
    shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in arrays.items())
    typer.echo(f"{shapes}. Written: {out.resolve()}")


@app.command("init-task")
def init_task(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("task.py"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a commented task file that runs as it is, to be changed for your own network and data."""
    from importlib import resources

    from debiased_laplace import _files

    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder. Name a file.")
    if path.exists() and not force:
        raise typer.BadParameter(f"{path} exists. Name another file, or use --force.")
    template = resources.files("debiased_laplace.evaluation").joinpath("template.py").read_text(encoding="utf-8")
    _check_folder(path.parent)
    with _clear_errors():
        _files.write(path, template)
    typer.echo(f"Written: {path.resolve()}. Try it: debiased-laplace evaluate {path} --quick")


@app.command()
def tasks() -> None:
    """List the shipped tasks."""
    from debiased_laplace.evaluation import shipped

    for name in shipped.names():
        typer.echo(name)


# -- what commands share ---------------------------------------------------------------------------


@contextmanager
def _imports() -> Iterator[None]:
    from rich.console import Console

    with Console(stderr=True).status("Importing torch and friends"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of third parties, at their import
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextmanager
def _clear_errors() -> Iterator[None]:
    """An error of a task is told in its own words; a traceback would be of this program."""
    from debiased_laplace._files import CannotWriteError
    from debiased_laplace.evaluation.names import FolderInUseError
    from debiased_laplace.evaluation.tasks import TaskError

    try:
        yield
    except (TaskError, ValueError, TypeError, CannotWriteError, FolderInUseError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def _told_warnings() -> Iterator[None]:
    """What the user is warned of, as lines of its own; a place in the source would be of this program."""
    from debiased_laplace._guards import user_warnings

    told: list[str] = []
    try:
        with user_warnings() as told:
            yield
    finally:
        for text in told:
            typer.echo(f"Warning: {text}", err=True)


def _checkpoint(out: Path, task: Task, context: Context, model: Any, settings: Mapping[str, Any]) -> Path:
    """Where the progress of a fit is kept: beside the posterior, under a digest of what it is made from."""
    from debiased_laplace.evaluation import records
    from debiased_laplace.evaluation.provenance import data_digest, network_digest, seeded
    from debiased_laplace.evaluation.suite.subject import base_settings

    with seeded(context.seed):
        data = data_digest(task.loader("train_loader", context))
    made_from = base_settings(task, context) | {"network": network_digest(model), "data": data, "seed": context.seed}
    path = out.with_name(f"{out.name}.{records.digest({**made_from, **settings})}.progress")
    for other in set(out.parent.glob(f"{glob.escape(out.name)}.????????.progress")) - {path}:
        typer.echo(f"Not used: {other}, an interrupted fit of another network, other data or settings.", err=True)
    return path


def _task(
    source: str, device: str | None, data_dir: Path | None, cache: Path, quick: bool, seed: int = 0
) -> tuple[Task, Context]:
    from debiased_laplace.evaluation.tasks import Context, Task

    if data_dir is not None and not data_dir.is_dir():
        raise typer.BadParameter(f"{data_dir} is no folder.", param_hint="--data-dir")
    chosen = _device(device)
    with _clear_errors():
        return Task.load(source), Context(seed, data_dir, cache, quick, chosen)


def _device(name: str | None) -> Any:
    from debiased_laplace.evaluation.tasks import resolve_device

    try:
        return resolve_device(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None


def _check_file(path: Path) -> None:
    """Refuse a file that cannot be written, before anything takes time."""
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder. Name a file.", param_hint="--out")
    _check_folder(path.parent)
    from debiased_laplace import _files

    try:
        _files.check_writable(path)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None


def _check_folder(out: Path) -> None:
    """Refuse a folder that cannot be written to, before anything takes time."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except FileExistsError:
        raise typer.BadParameter(f"{out} is a file. Name a folder.", param_hint="--out") from None
    except OSError as error:
        message = f"Cannot write to {out}: {error.strerror}. Name another folder."
        raise typer.BadParameter(message, param_hint="--out") from None


@contextmanager
def _reported(total: int, out: Path) -> Iterator[Reporter]:
    """How far a command is; errors and interruptions in clear words."""
    from debiased_laplace.evaluation.progress import Reporter

    with Reporter(total) as reporter:
        try:
            with _clear_errors():
                yield reporter
        except KeyboardInterrupt:
            told = f"Interrupted. What is finished is kept in {out}: run the same command to go on."
            reporter.console.print(told, markup=False)
            raise typer.Exit(130) from None


def _evaluate(
    out: Path, n_seeds: int, quick: bool,
    work: Callable[[Callable[[int, str], None]], dict[str, Any]], title: str,
) -> None:  # fmt: skip
    """Run and tell how far it is, write the files, show the answer and the short tables."""
    from debiased_laplace.evaluation.progress import Seeds

    with _reported(n_seeds, out) as reporter:
        seeds = Seeds(reporter, n_seeds)
        summary = work(seeds)
    from debiased_laplace.evaluation.demo import QUICK
    from debiased_laplace.evaluation.report.outputs import write_outputs

    paths = write_outputs(out, summary, title=title, notice=QUICK if quick else "")
    _show(summary, paths, len(seeds.kept), reporter.elapsed, quick)


def _show(summary: dict[str, Any], paths: dict[str, Path], reused: int, seconds: float, quick: bool) -> None:
    from debiased_laplace.evaluation.report.statement import statement
    from debiased_laplace.evaluation.report.tables import tables

    notes = _used_again(summary["made"], reused, "seeds", next(iter(paths.values())).parent)
    _say(statement(summary), tables(summary, short=True), summary["task"]["description"], paths, seconds, quick, notes)


def _used_again(made: Sequence[str], reused: int, what: str, out: Path) -> list[str]:
    """A line about what was not computed anew, with its dates; what was there was made before all else."""
    if not reused:
        return []
    dates = sorted(made)[:reused]
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return [
        f"{reused} of {len(made)} {what} were finished earlier ({when}) with the same network, data, task file and "
        f"settings, in {out / 'records'}. Delete that folder to run them anew."
    ]


def _say(
    said: Mapping[str, Any], tables: Sequence[Any], description: str, paths: Mapping[str, Path], seconds: float,
    quick: bool, notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Tables, sentences and files on the terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(Text(f"\n{description}\n"))
    for table in tables:
        console.print(table)
    console.print(Text(said["answer"], style="bold"))
    for sentence in said["details"]:
        console.print(Text(f"- {sentence}"))
    if quick:
        console.print("\nThis was a quick run, which decides nothing.", highlight=False)
    for note in notes:
        console.print(Text(f"\n{note}"), soft_wrap=True)
    console.print(f"\nWritten in {seconds:.0f} s:", highlight=False)
    for path in paths.values():
        console.print(Text(f"  {path.resolve()}"), soft_wrap=True)
    sys.stdout.flush()
