"""The program around its commands: options that all have, errors in one line, exit codes, the document of `--json`.

==== ====================================================================
code meaning
==== ====================================================================
0    all went well
1    it failed; `doctor`: there is a problem
2    wrong usage: an unknown command, option or value
130  interrupted: the same command goes on where it stopped, where it can
==== ====================================================================
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from debiased_laplace.cli import session
from debiased_laplace.cli.errors import Told
from debiased_laplace.cli.launched import is_first

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, the rest on stderr.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show errors with their tracebacks.")]


def with_options_of_all(function: Callable[..., None]) -> Callable[..., None]:
    """The same command with the options that all have; :meth:`.Session.of` reads them, wherever they stand."""

    @wraps(function)
    def command(*, json: bool = False, debug: bool = False, **values: Any) -> None:
        function(**values)

    signature = inspect.signature(function, eval_str=True)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("json", JsonOption), ("debug", DebugOption))
    ]
    every = {**signature.parameters, **{one.name: one for one in more}}
    command.__signature__ = signature.replace(parameters=list(every.values()))  # type: ignore[attr-defined]
    command.__annotations__ = {name: one.annotation for name, one in every.items()}
    return command


class Program(TyperGroup):
    """The command that has the others."""

    def main(self, args: Sequence[str] | None = None, *arguments: Any, **settings: Any) -> Any:
        """Run a command, and exit with a code."""
        given = list(sys.argv[1:] if args is None else args)
        this = session.Session.of(given)
        with session.running(this) as out:
            code, told, error = self._run(given, this, *arguments, **settings)
            if this.json and is_first():
                command = next((word for word in given if word in self.commands), "")
                document = this.document(command, code, None if told is None else told.as_json())
                from debiased_laplace.evaluation.records import encode, jsonable

                out.write(json.dumps(encode(jsonable(document)), indent=2, allow_nan=False) + "\n")
                out.flush()
        if error is not None:
            raise error
        sys.exit(code)

    def _run(
        self, given: list[str], this: session.Session, *arguments: Any, **settings: Any
    ) -> tuple[int, Told | None, Exception | None]:
        """Exit code, what went wrong, and an error that is to keep its traceback."""
        try:
            super().main(given, *arguments, **settings)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else FAILED if end.code else 0
            return code, _reason(end, code) if code else None, None
        except Exception as error:
            told = Told.of(error)
            if this.debug:
                return FAILED, told, error
            typer.echo(f"Error: {told.sentence}", err=True)
            return FAILED, told, None
        return 0, None, None

    def invoke(self, context: Any) -> Any:
        """Run a command; an interruption that it does not tell of itself is told here."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from None


def _reason(end: SystemExit, code: int) -> Told | None:
    """Why the command line library, or a command, ended the program."""
    if code == INTERRUPTED:
        return Told("KeyboardInterrupt", "Interrupted.")
    cause = end.__context__
    message = getattr(cause, "format_message", None)  # of wrong usage
    return Told("UsageError", " ".join(message().split())) if message is not None else None
