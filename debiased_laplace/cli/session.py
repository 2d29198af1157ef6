"""One call of the program: what was asked for before any command is known, and the document that `--json` writes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TextIO

#: Version of the documents in docs/cli.md; a field that is taken away or means something else makes a new one.
SCHEMA = 1


@dataclass
class Session:
    """One call of the program.

    Attributes:
        json: Whether one JSON document is all that goes to the standard output.
        debug: Whether errors keep their tracebacks.
        fields: What the command adds to the document.
        warnings: Messages that were shown.
    """

    json: bool = False
    debug: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Session:
        """By the options that may stand anywhere before a ``--``: an error in the others is told as they say, too."""
        before = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
        return cls("--json" in before, "--debug" in before)

    def document(self, command: str, exit_code: int, error: dict[str, Any] | None) -> dict[str, Any]:
        """All of it, with the fields that every command has in front."""
        from debiased_laplace import __version__

        about: dict[str, Any] = {
            "schema": SCHEMA, "version": __version__, "command": command, "exit_code": exit_code, "error": error,
            "warnings": self.warnings,
        }  # fmt: skip
        return about | (self.fields if error is None else {})


_CURRENT: ContextVar[Session | None] = ContextVar("session", default=None)


def current() -> Session:
    """The session of this call; outside of any, one that nobody reads."""
    return _CURRENT.get() or Session()


def answer(**fields: Any) -> None:
    """Add fields to the document of `--json`."""
    current().fields.update(fields)


@contextlib.contextmanager
def running(session: Session) -> Iterator[TextIO]:
    """Make it the current one; with `--json` what anything prints goes to the standard error stream.

    Yields:
        Where the document goes: the standard output as it was.
    """
    token = _CURRENT.set(session)
    try:
        if not session.json:
            yield sys.stdout
            return
        with _to_standard_error() as out, contextlib.redirect_stdout(sys.stderr):
            yield out
    finally:
        _CURRENT.reset(token)


@contextlib.contextmanager
def _to_standard_error() -> Iterator[TextIO]:
    """Let also other processes and libraries that know the output by its number write to the standard error stream."""
    sys.stdout.flush()
    try:
        number, errors = sys.stdout.fileno(), sys.stderr.fileno()
    except (OSError, io.UnsupportedOperation):  # streams in memory
        yield sys.stdout
        return
    kept = os.dup(number)
    os.dup2(errors, number)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as out:
            yield out
    finally:
        os.dup2(kept, number)
        os.close(kept)
