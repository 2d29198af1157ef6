"""The command line. Importing this module is light: what a command needs is imported when it runs."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
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
    quick: Annotated[bool, typer.Option("--quick", help="Two seeds and less of everything, as a try.")] = False,
) -> None:
    """Compare posteriors on scikit-learn's digits: a table, results.json, diagrams and a report, in about two minutes.

    Finished seeds are kept in OUT/records: a run that was interrupted goes on where it stopped.
    """
    _check_folder(out)
    with _imports():
        from debiased_laplace.evaluation import demo as demonstration
    n_seeds = demonstration.N_SEEDS_QUICK if quick else demonstration.N_SEEDS
    _evaluate(
        out, n_seeds, quick,
        lambda progress: demonstration.demo(
            out, seed=seed, device=_device(device), quick=quick, progress=progress
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
    quick: QuickOption = False,
) -> None:
    """Judge a trained network with and without posteriors, on test, shifted and foreign data: one page.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    _check_folder(out)
    with _imports():
        from debiased_laplace.evaluation import Options, suite
        from debiased_laplace.evaluation.methods import methods_of
        from debiased_laplace.evaluation.summary import summarise
    loaded, context = _task(task, device, data_dir, cache or out / "cache", quick)
    n_seeds = seeds or (1 if quick else int(loaded.constant("SEEDS", 1)))
    methods = methods_of(loaded)
    if only:
        unknown = sorted(set(only) - {method.name for method in methods})
        if unknown:
            names = ", ".join(method.name for method in methods)
            raise typer.BadParameter(f"Expected methods out of {names}, got {unknown}.", param_hint="--only")
        methods = tuple(method for method in methods if method.name in only)
    options = Options(n_resamples=200 if quick else 1000)
    _evaluate(
        out, n_seeds, quick,
        lambda progress: summarise(
            suite.run(
                loaded, out, range(seed, seed + n_seeds), context, methods=methods, options=options, progress=progress
            )
        ),
        "",
    )  # fmt: skip


@app.command()
def fit(
    task: TaskArgument,
    out: Annotated[Path, typer.Option(help="File for the posterior.")] = Path("posterior.safetensors"),
    seed: SeedOption = 0,
    budget: Annotated[int | None, typer.Option(min=0, help="Training data for curvature; 0 for all of them.")] = None,
    structure: Annotated[str, typer.Option(help="kron, lowrank, diag or full.")] = "kron",
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
        from debiased_laplace.laplace_torch.settings import STRUCTURES
    if structure not in STRUCTURES:
        raise typer.BadParameter(
            f"Expected one out of {list(STRUCTURES)}, got {structure!r}.", param_hint="--structure"
        )
    loaded, context = _task(task, device, data_dir, cache, quick, seed)
    checkpoint = out.with_suffix(".progress")
    with _clear_errors(), _seeded():
        model = loaded.model(context)
        la = DebiasedLaplace(model, loaded.likelihood, hessian_structure=structure, seed=seed)
        budget = loaded.budget if budget is None else budget or None
        try:
            la.fit(
                loaded.call("train_loader", context), budget=budget, n_data=loaded.n_data, generator=seed,
                progress_bar=True, checkpoint=checkpoint,
            )  # fmt: skip
        except KeyboardInterrupt:
            typer.echo("Interrupted. Run the same command to go on.", err=True)
            raise typer.Exit(130) from None
        la.optimize_prior_precision(
            val_loader=loaded.call("val_loader", context),
            progress_bar=True,
            **Options().search,
            **recipe(loaded.likelihood == "regression"),
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
        from debiased_laplace.evaluation.predictors import LaplacePredictor
        from debiased_laplace.evaluation.records import write_atomically
    if not posterior.is_file():
        raise typer.BadParameter(f"{posterior} does not exist. `debiased-laplace fit` writes one.")
    loaded, context = _task(task, device, data_dir, cache, quick, seed)
    with _clear_errors(), _seeded():
        la = DebiasedLaplace.load(posterior, loaded.model(context))
        predictor, parts = LaplacePredictor(la), []
        for inputs, targets, _ in tqdm(_data.labelled(loaded.call("test_loader", context)), unit="batch"):
            parts.append(predictor(inputs).arrays() | {"targets": targets.cpu().numpy()})
        arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    write_atomically(out, file.getvalue())
    shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in arrays.items())
    typer.echo(f"{shapes}. Written: {out.resolve()}")


@app.command("init-task")
def init_task(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("task.py"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a commented task file that runs as it is, to be changed for your own network and data."""
    from importlib import resources

    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder. Name a file.")
    if path.exists() and not force:
        raise typer.BadParameter(f"{path} exists. Name another file, or use --force.")
    template = resources.files("debiased_laplace.evaluation").joinpath("template.py").read_text(encoding="utf-8")
    _check_folder(path.parent)
    path.write_text(template, encoding="utf-8")
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
    from debiased_laplace.evaluation.tasks import TaskError

    try:
        yield
    except (TaskError, ValueError, TypeError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def _seeded() -> Iterator[None]:
    from debiased_laplace._guards import global_random_state

    with global_random_state():
        yield


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


def _check_folder(out: Path) -> None:
    """Refuse a folder that cannot be written to, before anything takes time."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except FileExistsError:
        raise typer.BadParameter(f"{out} is a file. Name a folder.", param_hint="--out") from None
    except OSError as error:
        message = f"Cannot write to {out}: {error.strerror}. Name another folder."
        raise typer.BadParameter(message, param_hint="--out") from None


def _evaluate(
    out: Path, n_seeds: int, quick: bool,
    work: Callable[[Callable[[int, str], None]], dict[str, Any]], title: str,
) -> None:  # fmt: skip
    """Run with bars, write the files, show the answer and the short tables."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    start = time.perf_counter()
    messages = Console(stderr=True)
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    kept: list[int] = []
    with Progress(*columns, console=messages) as bars:
        bar = bars.add_task("", total=n_seeds)
        finished, current = 0, None

        def progress(seed: int, step: str) -> None:
            nonlocal finished, current
            if current is not None and seed != current:
                finished += 1
            current = seed
            if step == "kept":
                kept.append(seed)
            bars.update(bar, completed=finished, description=f"seed {seed}: {step}")

        try:
            with _clear_errors():
                summary = work(progress)
        except KeyboardInterrupt:
            messages.print(f"Interrupted. What is finished is kept in {out}: run the same command to go on.")
            raise typer.Exit(130) from None
        bars.update(bar, completed=n_seeds, description="done")
    from debiased_laplace.evaluation.demo import QUICK
    from debiased_laplace.evaluation.report import write_outputs

    paths = write_outputs(out, summary, title=title, notice=QUICK if quick else "")
    _show(summary, paths, len(kept), time.perf_counter() - start, quick)


def _show(summary: dict[str, Any], paths: dict[str, Path], reused: int, seconds: float, quick: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from debiased_laplace.evaluation.statement import statement
    from debiased_laplace.evaluation.tables import tables

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(Text(f"\n{summary['task']['description']}\n"))
    for table in tables(summary, short=True):
        console.print(table)
    said = statement(summary)
    console.print(Text(said["answer"], style="bold"))
    for sentence in said["details"]:
        console.print(Text(f"- {sentence}"))
    if quick:
        console.print("\nThis was a quick run, which decides nothing.", highlight=False)
    if reused:
        folder = next(iter(paths.values())).parent / "records"
        console.print(
            Text(
                f"\n{reused} of {len(summary['seeds'])} seeds were finished earlier with the same settings, in "
                f"{folder}. Delete that folder to run them anew."
            ),
            soft_wrap=True,
        )
    console.print(f"\nWritten in {seconds:.0f} s:", highlight=False)
    for path in paths.values():
        console.print(Text(f"  {path.resolve()}"), soft_wrap=True)
    sys.stdout.flush()
