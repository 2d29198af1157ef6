"""The commands about task files: `init-task` and `tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from debiased_laplace.cli.arguments import check_folder
from debiased_laplace.cli.session import answer


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
