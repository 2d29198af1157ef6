"""The commands about task files: `init-task`, `tasks` and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from debiased_laplace.cli import completion
from debiased_laplace.cli.arguments import (
    BudgetOption,
    DataOption,
    DeviceOption,
    FixedCacheOption,
    OneSeedOption,
    QuickOption,
    StructureOption,
    TaskArgument,
    budget_of,
    check_folder,
    check_structure,
    load_task,
)
from debiased_laplace.cli.program import FAILED
from debiased_laplace.cli.session import answer
from debiased_laplace.cli.terminal import importing, show_examination


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
    check_folder(path.parent)
    _files.write(path, template)
    answer(file=str(path.resolve()))
    typer.echo(f"Written: {path.resolve()}. Try it: debiased-laplace evaluate {path} --quick")


def tasks() -> None:
    """List the shipped tasks."""
    from debiased_laplace.evaluation import shipped

    answer(tasks=shipped.names())
    for name in shipped.names():
        typer.echo(name)


def doctor(
    task: TaskArgument,
    posterior: Annotated[
        Path | None,
        typer.Argument(
            help="File that `fit` wrote, to check as well.", metavar="POSTERIOR", autocompletion=completion.posteriors
        ),
    ] = None,
    seed: OneSeedOption = 0,
    budget: BudgetOption = None,
    structure: StructureOption = "kron",
    data_dir: DataOption = None,
    cache: FixedCacheOption = Path("cache"),
    device: DeviceOption = None,
    quick: QuickOption = False,
) -> None:
    """Check a task before anything long runs: network, loaders, what a fit covers, how long it takes, what is wrong.

    A batch of every loader goes through the network, and a few data are fitted.

    Times and memory of the whole fit are estimated from that.

    Exits with 1 if there is a problem.
    """
    if posterior is not None and not posterior.is_file():
        raise typer.BadParameter(f"{posterior} does not exist. `debiased-laplace fit` writes one.")
    with importing():
        from debiased_laplace.cli.examination import Examination
    check_structure(structure)
    loaded, context = load_task(task, device, data_dir, cache, quick, seed)
    examination = Examination(loaded, context, structure, budget_of(loaded, budget))
    examination.run(posterior)
    answer(**examination.document())
    show_examination(examination.document())
    if not examination.well:
        raise typer.Exit(FAILED)
