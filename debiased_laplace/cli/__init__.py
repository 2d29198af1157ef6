"""The command line. Importing it is light: what a command needs is imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from debiased_laplace.cli import posteriors, reports, task_files

__all__ = ["app"]

app = typer.Typer(
    help="Laplace approximations with debiased curvature.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from debiased_laplace import __version__

        typer.echo(f"debiased-laplace {__version__}")
        raise typer.Exit


@app.callback()
def _options_of_the_program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Laplace approximations with debiased curvature."""


for command in (  # in the order of the help; a command has the name of its function
    reports.demo,
    reports.evaluate,
    reports.bias,
    posteriors.fit,
    posteriors.predict,
    task_files.init_task,
    task_files.tasks,
):
    app.command()(command)
