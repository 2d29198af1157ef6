"""The command line. Importing this module is light: what a command needs is imported when it runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from debiased_laplace.evaluation.demo import DemoResult

app = typer.Typer(
    help="Laplace approximations with debiased curvature.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

#: Columns of the output where the terminal does not say how wide it is.
WIDTH = 100


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
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="First seed; the others follow it.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default cuda if there is one.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two seeds and less of everything, as a try.")] = False,
) -> None:
    """Compare posteriors on scikit-learn's digits: a table, results.json, diagrams and a report, in about a minute.

    Finished seeds are kept in OUT/records: a run that was interrupted goes on where it stopped.
    """
    _check_folder(out)
    from rich.console import Console

    messages = Console(stderr=True)
    with messages.status("Importing torch and friends"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of third parties, at their import
        warnings.simplefilter("ignore", DeprecationWarning)
        from debiased_laplace.evaluation import demo as demonstration
    try:
        chosen = demonstration.resolve_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None
    result = _run(messages, demonstration, out, seed, chosen, quick)
    _show(result, out, quick)


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


def _run(messages: Any, demonstration: Any, out: Path, seed: int, device: Any, quick: bool) -> DemoResult:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    n_seeds = (demonstration.QUICK if quick else demonstration.FULL).n_seeds
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=messages) as bars:
        seeds = bars.add_task("seeds", total=n_seeds)
        steps = bars.add_task("", total=demonstration.STEPS)

        def progress(current: int, step: str) -> None:
            index = current - seed
            if step == "kept":
                bars.update(seeds, completed=index + 1)
            elif step == "train":
                bars.update(seeds, completed=index)
                bars.reset(steps, description=f"seed {current}: {step}")
            else:
                bars.update(steps, advance=1, description=f"seed {current}: {step}")

        try:
            result: DemoResult = demonstration.demo(out, seed=seed, device=device, quick=quick, progress=progress)
        except KeyboardInterrupt:
            messages.print(f"Interrupted. Finished seeds are kept in {out / 'records'}: run the same command to go on.")
            raise typer.Exit(130) from None
        bars.update(seeds, completed=n_seeds)
        bars.update(steps, completed=demonstration.STEPS, description="done")
    return result


def _show(result: DemoResult, out: Path, quick: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from debiased_laplace.evaluation.statement import statement
    from debiased_laplace.evaluation.tables import tables

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    count = len(result.summary["seeds"])
    console.print(Text(f"\nMean ± standard error over {count} seeds. {result.summary['task']['description']}\n"))
    for table in tables(result.summary, short=True):
        console.print(table)
    said = statement(result.summary)
    console.print(Text(said["answer"], style="bold"))
    for sentence in said["details"]:
        console.print(Text(f"- {sentence}"))
    if quick:
        console.print("\nThis was a quick run, which decides nothing.", highlight=False)
    if result.reused:
        console.print(
            Text(
                f"\n{result.reused} of {count} seeds were finished earlier with the same settings, in "
                f"{out / 'records'}. Delete that folder to run them anew."
            ),
            soft_wrap=True,
        )
    console.print(f"\nWritten in {result.seconds:.0f} s:", highlight=False)
    for path in result.paths.values():
        console.print(Text(f"  {path.resolve()}"), soft_wrap=True)
