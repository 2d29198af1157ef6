r"""Records on disk: written whole or not at all, used again only when they were made from the same.

Standard JSON has no infinite or undefined numbers. In files of this package they are the strings ``"Infinity"``,
``"-Infinity"`` and ``"NaN"``, which Python's ``float`` and JavaScript's ``Number`` take as they are. A text that looks
like one of them has a backslash in front. :func:`encode` and :func:`decode` are the two directions.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import debiased_laplace
from debiased_laplace import _files

SCHEMA_VERSION = 4
CHECKSUM = "sha256"
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "netcal", "laplace-torch")
_NUMBERS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_LOOKS_LIKE_ONE = re.compile(r"\\*(-?Infinity|NaN)")


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all, with the folder that it is in; see :func:`debiased_laplace._files.write`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.write(path, content)


def encode(value: Any) -> Any:
    """A value with the numbers that standard JSON lacks as strings; :func:`decode` is the inverse."""
    if isinstance(value, float):  # nearly all of a record: first
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        return "\\" + value if _LOOKS_LIKE_ONE.fullmatch(value) else value
    if isinstance(value, (list, tuple)):
        return [encode(entry) for entry in value]
    return {key: encode(entry) for key, entry in value.items()} if isinstance(value, Mapping) else value


def decode(value: Any) -> Any:
    """What :func:`encode` was given, with lists for tuples."""
    if isinstance(value, str):
        return _NUMBERS.get(value, value[1:] if _LOOKS_LIKE_ONE.fullmatch(value) else value)
    if isinstance(value, dict):
        return {key: decode(entry) for key, entry in value.items()}
    return [decode(entry) for entry in value] if isinstance(value, list) else value


def write_json(path: Path, value: Any) -> None:
    """Write standard JSON whole or not at all; infinite and undefined numbers as :func:`encode` has them."""
    write_whole(path, json.dumps(encode(value), allow_nan=False, separators=(",", ":")) + "\n")


def read_json(path: Path) -> Any:
    """What :func:`write_json` was given.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON.
    """
    return decode(json.loads(path.read_text()))


def jsonable(value: Any) -> Any:
    """The same value with the types that JSON has; objects become their ``repr``."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [jsonable(entry) for entry in value]
    return {str(key): jsonable(entry) for key, entry in value.items()} if isinstance(value, Mapping) else repr(value)


def digest(settings: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that tell settings apart."""
    return hashlib.sha256(json.dumps(jsonable(settings), sort_keys=True).encode()).hexdigest()[:8]


def record_path(folder: Path, seed: int, made_from: Mapping[str, Any]) -> Path:
    """Where the record of a seed is kept; what is made from something else has another file: nothing is mixed or lost.

    Args:
        folder: Of the results.
        seed: Of the record.
        made_from: Everything that decides what is in it, as entries that the record has itself.
    """
    return folder / "records" / f"seed-{seed}-{digest(made_from)}.json"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record with the SHA-256 of its content, which :func:`read_record` checks."""
    content = encode(jsonable(record))
    write_json(path, {**record, CHECKSUM: _checksum(content)})


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps({key: value for key, value in content.items() if key != CHECKSUM}, sort_keys=True)
    return _files.sha256(text)


def read_record(path: Path, made_from: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is in a file, if it is as it was written and has exactly these entries, such as its settings."""
    try:
        text = path.read_text()
        content = json.loads(text)
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get(CHECKSUM) != _checksum(content):
        return None  # cut, damaged or edited: to be made anew
    record = decode({key: value for key, value in content.items() if key != CHECKSUM})
    same = isinstance(record, dict) and all(
        encode(record.get(name)) == encode(jsonable(value)) for name, value in made_from.items()
    )
    return record if same else None


def load_record(folder: Path, seed: int, made_from: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a seed, if there is a readable one that was made from exactly this."""
    expected = {"seed": seed, "schema_version": SCHEMA_VERSION}
    return read_record(record_path(folder, seed, made_from), {**expected, **made_from})


def now() -> str:
    """Date and time (UTC), to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def versions() -> dict[str, str]:
    """Versions of this package and of those that the numbers depend on."""
    installed = {"debiased_laplace": debiased_laplace.__version__}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "unknown"
    return installed


def environment(device: torch.device) -> dict[str, Any]:
    """What a run ran on: versions, device and threads; nothing that identifies the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "platform": platform.system(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
