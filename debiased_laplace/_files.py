"""Files that are written whole or not at all, and known again as what was written.

A file is written beside its place under another name, brought to the disk, and renamed. What a killed run left of that
is cleared away by the next write of the same file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

#: Seconds after which a half-written file of another machine counts as left behind.
LEFT_BEHIND = 24 * 3600


class StoredFileError(ValueError):
    """A file is not what was written, or not of this package, or of another version: the one error for all of it.

    Its text has the path, what differs, and what to do.
    """


class CannotWriteError(OSError):
    """A file could not be written; what was there before is as it was."""


def write(path: str | Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one and nothing between.

    Links are followed, and a file that is there keeps its permissions.

    Args:
        path: The file.
        content: All of it, or a function that writes it to the path that it is given.

    Raises:
        FileNotFoundError: If the directory does not exist.
        CannotWriteError: If the disk is full, or the place cannot be written to.
    """
    place = target(path)
    try:
        _clear(place)
        temporary = place.with_name(f"{_stem(place)}{_owner()}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            temporary.touch()
            mode = (place if place.exists() else temporary).stat().st_mode & 0o7777
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            temporary.chmod(mode)
            _to_disk(temporary)
            os.replace(temporary, place)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if os.name == "posix":  # the new name, too
            _to_disk(place.parent)
    except CannotWriteError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: str | Path, error: OSError) -> CannotWriteError:
    """The error with a sentence: what was to be written, why it was not, what to do."""
    advice = "Free some space, or name another place" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else (
        "Name another place, or allow it"
    )  # fmt: skip
    reason = error.strerror or str(error)
    return CannotWriteError(f"Could not write {path}: {reason}. What was there before is kept. {advice}.")


def target(path: str | Path) -> Path:
    """Where a file of that name is written: behind links, in a directory that exists.

    Raises:
        FileNotFoundError: If the directory does not exist.
    """
    resolved = Path(path).resolve()
    if not resolved.parent.is_dir():
        raise FileNotFoundError(f"Expected a directory for {path}, got none at {resolved.parent}. Make it first.")
    return resolved


def check_writable(path: str | Path) -> Path:
    """The target of a path, or what :func:`write` would raise; nothing of what is there is touched."""
    place = target(path)
    if place.is_dir():
        raise CannotWriteError(f"Could not write {path}: it is a directory. Name a file.")
    probe = place.with_name(f"{_stem(place)}{_owner()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise cannot_write(path, error) from error
    return place


def sha256(content: bytes | str) -> str:
    """As 64 hexadecimal digits."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def _stem(place: Path) -> str:
    """Start of the names of half-written files; short, whatever the file is called."""
    return f".{sha256(os.fsencode(place.name))[:12]}."


def _owner() -> str:
    return f"{sha256(socket.gethostname())[:8]}-{os.getpid()}"


def _clear(place: Path) -> None:
    """Remove half-written files whose process is no more."""
    here = sha256(socket.gethostname())[:8]
    for left in place.parent.glob(f"{_stem(place)}*.tmp"):
        host, _, process = left.name.split(".")[2].partition("-")
        try:
            if host == here:
                gone = not process.isdigit() or not _runs(int(process))
            else:
                gone = left.stat().st_mtime < place.parent.stat().st_mtime - LEFT_BEHIND
            if gone:
                left.unlink(missing_ok=True)
        except OSError:
            continue  # somebody else's


def _runs(process: int) -> bool:
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
