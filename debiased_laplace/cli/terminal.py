"""What a command shows on the terminal: warnings in clear words, how far it is, the report."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from debiased_laplace.cli.session import answer, current

if TYPE_CHECKING:
    from debiased_laplace.evaluation.progress import Reporter

#: Columns of the output where the terminal does not say how wide it is.
WIDTH = 100


@contextmanager
def importing() -> Iterator[None]:
    """Show that imports take a while, without what third parties warn of meanwhile.

    They leave nothing behind that would be collected, and looking for it all the time takes an eighth of theirs.
    """
    from rich.console import Console

    collecting = gc.isenabled()
    gc.disable()
    with Console(stderr=True).status("Importing torch and friends"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            yield
        finally:
            if collecting:
                gc.enable()


@contextmanager
def shown_warnings(shown: bool = True) -> Iterator[None]:
    """Show warnings as lines, if at all; a place in the source would be of this program."""
    from debiased_laplace._guards import user_warnings

    messages: list[str] = []
    try:
        with user_warnings() as messages:
            yield
    finally:
        for message in messages if shown else ():
            current().warnings.append(message)
            typer.echo(f"Warning: {message}", err=True)


@contextmanager
def shown_progress(total: int, out: Path) -> Iterator[Reporter]:
    """Show how far a command is, and say of an interruption how to go on."""
    from debiased_laplace.evaluation.progress import Reporter

    with Reporter(total) as reporter:
        try:
            yield reporter
        except KeyboardInterrupt:
            message = f"Interrupted. What is finished is kept in {out}: run the same command to go on."
            reporter.console.print(message, markup=False)
            raise typer.Exit(130) from None


def reuse_note(made: Sequence[str], reused: int, what: str, out: Path) -> list[str]:
    """A line about what was not computed anew, with its dates: the earliest of all, since it was there before."""
    if not reused:
        return []
    dates = sorted(made)[:reused]
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return [
        f"{reused} of {len(made)} {what} were finished earlier ({when}) with the same network, data, task file and "
        f"settings, in {out / 'records'}. Delete that folder to run them anew."
    ]


def show_report(
    statement: Mapping[str, Any], tables: Sequence[Any], description: str, paths: Mapping[str, Path], seconds: float,
    quick: bool, notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Show tables, the statement and the paths of the files."""
    answer(
        description=description, answer=statement["answer"], details=list(statement["details"]), quick=quick,
        notes=list(notes), seconds=seconds, files={name: str(path.resolve()) for name, path in paths.items()},
    )  # fmt: skip
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(Text(f"\n{description}\n"))
    for table in tables:
        console.print(table)
    console.print(Text(statement["answer"], style="bold"))
    for sentence in statement["details"]:
        console.print(Text(f"- {sentence}"))
    if quick:
        console.print("\nThis was a quick run, which decides nothing.", highlight=False)
    for note in notes:
        console.print(Text(f"\n{note}"), soft_wrap=True)
    console.print(f"\nWritten in {seconds:.0f} s:", highlight=False)
    for path in paths.values():
        console.print(Text(f"  {path.resolve()}"), soft_wrap=True)
    sys.stdout.flush()
