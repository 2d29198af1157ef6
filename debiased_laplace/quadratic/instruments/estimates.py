"""What every instrument returns: numbers with their standard errors, and a record of them for JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["Estimate", "Recorded", "jackknife"]


class Recorded:
    """A dataclass whose fields, and the properties named in ``derived``, make a record."""

    derived: ClassVar[tuple[str, ...]] = ()

    def record(self) -> dict[str, Any]:
        """Numbers, lists and dictionaries for JSON; what is not finite is None."""
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return {name: _plain(getattr(self, name)) for name in [*names, *self.derived]}


def _plain(value: Any) -> Any:
    if isinstance(value, Recorded):
        return value.record()
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class Estimate(Recorded):
    """A value with its standard error over batches (NaN where there are too few of them).

    Attributes:
        value: ``[...]``.
        error: ``[...]``, by the jackknife.
    """

    value: Tensor
    error: Tensor


def jackknife(statistic: Callable[[Tensor], Tensor], n: int) -> Estimate:
    """A statistic of batches, given the positions of those to use, and its error from leaving out one after another."""
    every = torch.arange(n)
    without = torch.stack([statistic(every[every != left_out]) for left_out in range(n)])
    error = ((n - 1) / n * (without - without.mean(0)).square().sum(0)).sqrt()
    return Estimate(statistic(every), error)
