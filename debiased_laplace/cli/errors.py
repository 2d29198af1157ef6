"""What went wrong, in one line: the message, and the line of the user's own code that it comes from."""

from __future__ import annotations

import linecache
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from typing import Any

import debiased_laplace

_OURS = Path(debiased_laplace.__file__).resolve().parent


@dataclass(frozen=True)
class Told:
    """An error as it is told.

    Attributes:
        kind: Name of its class.
        message: What it says, on one line.
        file: The file of the user's own code that it comes from, if any.
        line: The number of the line there.
        code: That line.
        is_sentence: Whether the message says all of it; otherwise what the error is called does.
    """

    kind: str
    message: str
    file: str | None = None
    line: int | None = None
    code: str = ""
    is_sentence: bool = True

    @classmethod
    def of(cls, error: BaseException) -> Told:
        """Of an error and its causes."""
        message, kind = " ".join(str(error).split()), type(error).__name__
        if _is_out_of_memory(error):
            message += " Work on fewer data at a time (--batch-size, the loaders' batch size), or with --device cpu."
        ours = type(error).__module__.startswith("debiased_laplace") or type(error) in (ValueError, TypeError)
        is_sentence = bool(message) and ours
        place = _place(error)
        if place is None:
            return cls(kind, message, is_sentence=is_sentence)
        file, line = place
        message = message.removesuffix(f" ({Path(file).name}, line {line})")  # of a syntax error, which is told below
        return cls(kind, message, file, line, linecache.getline(file, line).strip(), is_sentence)

    @property
    def sentence(self) -> str:
        """For a terminal."""
        message = self.message if self.is_sentence else f"{self.kind}: {self.message}"
        if self.file is None:
            return message if self.is_sentence else f"{message} (--debug shows where)"
        code = f": {self.code}" if self.code else ""
        return f"{message} ({_short(self.file)}, line {self.line}{code})"

    def as_json(self) -> dict[str, Any]:
        """For the document of `--json`."""
        return {"kind": self.kind, "message": self.message, "file": self.file, "line": self.line}


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )  # fmt: skip


def _place(error: BaseException) -> tuple[str, int] | None:
    """The innermost line of code that is neither this package's nor a library's."""
    found = None
    for one in _chain(error):
        if isinstance(one, SyntaxError) and one.filename and _is_users(one.filename):
            return one.filename, one.lineno or 1
        for frame, line in walk_tb(one.__traceback__):
            if _is_users(frame.f_code.co_filename):
                found = frame.f_code.co_filename, line
    return found


def _chain(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__


def _is_users(file: str) -> bool:
    if file.startswith("<"):
        return False
    path = Path(file).resolve()
    libraries = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return not any(folder in path.parents for folder in libraries | {_OURS})


def _short(file: str) -> str:
    """Relative to where the command was called, if it is below."""
    path, here = Path(file).resolve(), Path.cwd()
    return str(path.relative_to(here)) if here in path.parents else str(path)
