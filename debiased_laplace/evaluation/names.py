"""Names that users give to methods, data and classes, as they go into tables, pages, figures and files."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

#: Readable characters of a name in the name of a file, which also has a digest.
READABLE = 32

__all__ = ["FolderInUseError", "check_name", "check_text", "locked", "markdown", "slug"]


def check_name(name: Any, what: str) -> str:
    """A name that tables, pages and figures can show; raises what is wrong before anything takes long.

    Args:
        name: Any characters that can be shown in a line, and however many of them.
        what: What has the name, for the error.

    Raises:
        ValueError: If it is no string, empty, or has characters that no file can hold or no line can show.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"Expected a name of {what} that is a string with something in it, got {name!r}.")
    return check_text(name, what)


def check_text(text: Any, what: str, *, lines: bool = False) -> str:
    """The same of a text, which may be empty, and with ``lines`` have several."""
    if not isinstance(text, str):
        raise ValueError(f"Expected {what} to be a string, got {type(text).__name__}.")
    allowed = "\n\r\t" if lines else ""
    wrong = [c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in allowed]
    if wrong:
        raise ValueError(
            f"Expected {what} without control characters, line breaks and lone surrogates, got {text[:60]!r} with "
            f"{sorted(set(wrong))[:4]!r}. Take them out."
        )
    return text


def slug(name: str, digest: str) -> str:
    """Part of a file name, short whatever the name is; names that look alike are told apart by the digest."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name)[:READABLE].strip("-")
    return f"{readable}-{digest}" if readable else digest


def markdown(text: str) -> str:
    """A text that Markdown shows as it is, in one line: no tags, emphasis, links, code or headings."""
    line = " ".join(text.split())
    line = line.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"[`*~|]", r"\\\g<0>", line)
    line = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)
    line = re.sub(r"\](?=[(\[:])", r"\\]", line)
    line = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)
    return re.sub(r"^(?=#|[-+=](\s|$)|--|==)", r"\\", line)


class FolderInUseError(RuntimeError):
    """Another run writes its results to the same folder."""


class locked:
    """A folder that one run at a time writes its results to; a run that was killed locks nothing.

    Args:
        folder: Made if it is missing.

    Raises:
        FolderInUseError: If another run is at work there.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)

    def __enter__(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise FolderInUseError(
                f"Another run is writing its results to {self._folder}. Wait for it, or give this run another folder."
            ) from None

    def __exit__(self, *_: object) -> None:
        self._lock.release()
