"""What a shell offers for an argument that was begun."""

from __future__ import annotations

from pathlib import Path


def tasks(incomplete: str) -> list[str]:
    """Shipped tasks, Python files, and folders that may have some."""
    from debiased_laplace.evaluation import shipped

    return [name for name in shipped.names() if name.startswith(incomplete)] + files(incomplete, (".py",))


def structures(incomplete: str) -> list[str]:
    """Structures of the curvature."""
    return [name for name in ("kron", "lowrank", "diag", "full", "isotropic") if name.startswith(incomplete)]


def posteriors(incomplete: str) -> list[str]:
    """Files that `fit` wrote."""
    return files(incomplete, (".safetensors",))


def files(incomplete: str, suffixes: tuple[str, ...]) -> list[str]:
    """Files with one of the suffixes whose paths begin so, and folders."""
    folder, _, start = incomplete.rpartition("/")
    place = Path(folder or ("/" if incomplete.startswith("/") else "."))
    prefix = f"{folder}/" if "/" in incomplete else ""
    try:
        found = sorted(place.iterdir())
    except OSError:
        return []
    return [
        f"{prefix}{path.name}/" if path.is_dir() else f"{prefix}{path.name}"
        for path in found
        if path.name.startswith(start) and (start or not path.name.startswith("."))
        and (path.is_dir() or path.suffix in suffixes)
    ]  # fmt: skip
