"""The command line. Importing it is light: what a command needs is imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from debiased_laplace.cli import posteriors, reports, task_files
from debiased_laplace.cli.program import DebugOption, JsonOption, Program, with_options_of_all

__all__ = ["app"]

#: Lines after a backspace stay as they are.
EPILOG = """\b
[bold]Examples[/bold]
  debiased-laplace demo --quick             what it does, on small data
  debiased-laplace init-task task.py        a file for your network and data
  debiased-laplace doctor task.py           check it first
  debiased-laplace fit task.py              then fit posterior.safetensors
  debiased-laplace predict task.py posterior.safetensors --inputs new.csv
[bold]Exit codes[/bold]
  0 all went well          1 it failed (doctor: there is a problem)
  2 wrong usage            130 interrupted: the same command goes on
"""

app = typer.Typer(
    cls=Program,
    help="Laplace approximations with debiased curvature: probabilities that a trained network can stand by.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
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
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Probabilities that a trained network can stand by."""


_FIRST, _POSTERIOR, _REPORT = "Start here", "A posterior", "A report"
for command, panel, line in (  # in the order of the help; a command has the name of its function
    (reports.demo, _FIRST, "See it on a small data set."),
    (task_files.init_task, _FIRST, "Write a task file: your network and data."),
    (task_files.tasks, _FIRST, "List the tasks that come with the package."),
    (task_files.doctor, _FIRST, "Check a task before anything long runs."),
    (posteriors.fit, _POSTERIOR, "Fit and tune a posterior; write it to a file."),
    (posteriors.predict, _POSTERIOR, "Predict test data, a CSV, arrays or images."),
    (reports.evaluate, _REPORT, "Judge a network with and without posteriors."),
    (reports.bias, _REPORT, "Measure how far mini-batches overstate curvature."),
):
    app.command(rich_help_panel=panel, short_help=line)(with_options_of_all(command))
