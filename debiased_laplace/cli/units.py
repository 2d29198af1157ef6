"""Numbers with units, and shapes, for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def in_bytes(n: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if n >= 10 or unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def in_seconds(seconds: float) -> str:
    """A time for people."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    if seconds < 5400:
        return f"{math.ceil(seconds / 60)} min"
    return f"{seconds / 3600:.2g} h"


def described(value: Any) -> str:
    """Dtypes and shapes of the tensors of a batch."""
    from debiased_laplace import _data

    if isinstance(value, Mapping):
        return ", ".join(f"{key} {described(one)}" for key, one in value.items() if _data.tensors(one))
    shapes = [f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}" for leaf in _data.tensors(value)]
    return ", ".join(shapes) or type(value).__name__
