"""Records on disk: written whole or not at all, reused only when they were made with equal settings."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import debiased_laplace

SCHEMA_VERSION = 2
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "netcal", "laplace-torch")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write standard JSON atomically.

    Raises:
        ValueError: If a number is not finite, which standard JSON cannot hold.
    """
    write_atomically(path, json.dumps(value, allow_nan=False, separators=(",", ":")) + "\n")


def jsonable(value: Any) -> Any:
    """The same value with the types that JSON has; objects become their ``repr``."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def digest(settings: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that tell settings apart."""
    return hashlib.sha256(json.dumps(jsonable(settings), sort_keys=True).encode()).hexdigest()[:8]


def record_path(folder: Path, seed: int, settings: Mapping[str, Any]) -> Path:
    """Where the record of a seed is kept; other settings have other files, so nothing is mixed or lost."""
    return folder / "records" / f"seed-{seed}-{digest(settings)}.json"


def read_record(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is in a file, if it can be read and was made with exactly these settings."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    same = isinstance(record, dict) and record.get("settings") == jsonable(settings)
    return record if same else None


def load_record(folder: Path, seed: int, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a seed, if there is a readable one with exactly these settings."""
    record = read_record(record_path(folder, seed, settings), settings)
    if record is None or record.get("seed") != seed:
        return None
    return record if record.get("schema_version") == SCHEMA_VERSION else None


def versions() -> dict[str, str]:
    """Versions of this package and of those that the numbers depend on."""
    found = {"debiased_laplace": debiased_laplace.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


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
