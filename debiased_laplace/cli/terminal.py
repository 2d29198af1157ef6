"""What a command shows on the terminal: warnings in clear words, how far it is, the report."""

from __future__ import annotations

import gc
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from debiased_laplace.cli.session import answer, current
from debiased_laplace.cli.units import in_bytes, in_seconds

if TYPE_CHECKING:
    from debiased_laplace.evaluation.progress import Reporter

#: Lines of a table of blocks that are shown at most.
COVERAGE_LINES = 24
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
    statement: Mapping[str, Any], decides: Any | None, description: str, paths: Mapping[str, Path], seconds: float,
    quick: bool, notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Show the answer, the table of the numbers that decide, and the paths of the files."""
    answer(
        description=description, answer=statement["answer"], rows=list(statement.get("rows", ())),
        details=list(statement["details"]), quick=quick, notes=list(notes), seconds=seconds,
        files={name: str(path.resolve()) for name, path in paths.items()},
    )  # fmt: skip
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(Text(f"\n{description}\n"))
    console.print(Text(f"{statement['answer']}\n", style="bold"))
    if decides is not None:
        console.print(decides)
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


def show_examination(found: Mapping[str, Any]) -> None:
    """Show what the document of `doctor` has in it."""
    task, network, estimates = found["task"], found["network"], found["estimates"]
    _line("Task", f"{task['name']} ({task['likelihood']}). {task['description']}")
    _line("Machine", _of_machine(found["machine"]))
    if network is not None:
        n = network["n_outputs"]
        outputs = "" if n is None else f", {n} output{'s' * (n != 1)}"
        _line(
            "Network", f"{network['n_parameters']:,} parameters, {network['n_trainable']:,} of them trainable, "
            f"{', '.join(network['dtypes'])}{outputs}; there in {in_seconds(network['seconds'])}",
        )  # fmt: skip
    for name, loader in found["loaders"].items():
        _line(name, _of_loader(loader))
    if found["coverage"] is not None:
        typer.echo("\nWhat a fit covers")
        lines = found["coverage"].splitlines()
        shown = lines if len(lines) <= COVERAGE_LINES else [*lines[: COVERAGE_LINES // 2], "...", *lines[-4:]]
        typer.echo(textwrap.indent("\n".join(shown), "  "))
    if estimates is not None:
        _show_estimates(estimates, task["structure"])
    if found["posterior"] is not None:
        typer.echo(f"\nThe posterior in {found['posterior']['file']}")
        typer.echo(textwrap.indent(found["posterior"]["description"], "  "))
    typer.echo("")
    for finding in found["findings"]:
        _line(finding["level"].capitalize(), f"{finding['about']}: {finding['message']}")
    if found["well"]:
        typer.echo(f"All is well: debiased-laplace fit {task['source']}, with the same options.")
    else:
        typer.echo("A fit, or predictions after it, would fail: mend the problems, and call `doctor` again.")


def _of_machine(about: Mapping[str, Any]) -> str:
    memory, versions = about["memory_available_bytes"], about["versions"]
    free = "" if memory is None else f", {in_bytes(memory)} free"
    cards = f" (cards: {', '.join(about['cards'])})" if about["cards"] else ""
    threads = f", {about['threads']} thread{'s' * (about['threads'] != 1)}" if about["device"] == "cpu" else ""
    return (
        f"{about['device']} ({about['device_name']}){cards}{threads}{free}; Python {about['python']}, torch "
        f"{versions['torch']}, debiased-laplace {versions['debiased_laplace']}"
    )


def _of_loader(loader: Mapping[str, Any]) -> str:
    n = loader["n_data"]
    size = "unknown number of" if n is None else f"{n:,}" if loader["n_data_is_exact"] else f"about {n:,}"
    line = f"{size} data; a batch: inputs {loader['inputs']}, targets {loader['targets']}"
    if loader["loss"] is not None:
        line += f"; loss of the network {loader['loss']:.3g}"
    if loader["accuracy"] is not None:
        line += f", {100 * loader['accuracy']:.3g} % right"
    return line


def _show_estimates(estimates: Mapping[str, Any], structure: str) -> None:
    """The table of what a fit takes."""

    def seconds(name: str) -> str:
        value = estimates[name]
        return "not known: the loader does not say its length" if value is None else f"about {in_seconds(value)}"

    free = estimates["memory_available_bytes"]
    if estimates["memory_bytes"] is None:
        memory = f"not known before: of --structure {structure} it depends on the data"
    else:
        memory = f"at most about {in_bytes(estimates['memory_bytes'])} besides network and data"
        memory += "" if free is None else f" ({in_bytes(free)} free)"
    typer.echo(f"\nEstimates for this machine, by a trial with {estimates['trial_size']} data")
    for what, value in (
        ("fit and tuning", seconds("seconds")),
        ("  finding layers", seconds("fixed_seconds")),
        ("  all data once", seconds("reading_seconds")),
        (f"  curvature of {estimates['n_drawn']:,}", seconds("curvature_seconds")),
        ("  decompositions", seconds("decomposition_seconds")),
        ("  validation data", seconds("tuning_seconds")),
        ("memory", memory),
        ("predictions", f"about {in_seconds(1000 * estimates['prediction_seconds_per_datum'])} for 1,000 data"),
    ):
        typer.echo(f"  {what:<20} {value}")


def _line(name: str, text: str) -> None:
    """A name, and a text that hangs beside it."""
    width = max(60, min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH))
    indent = " " * 14
    typer.echo(textwrap.fill(f"{name:<13} {text}", width, subsequent_indent=indent, break_on_hyphens=False))
