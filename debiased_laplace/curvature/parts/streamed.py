"""Parts of a basis that lie on other devices than the one that computes with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from debiased_laplace.curvature.parts.part import Part


class Streamed(Sequence[Part]):
    """Parts, each of which comes to a device when it is asked for, and is not kept there.

    Attributes:
        at_rest: Where they lie.
        device: Where they come to.
    """

    def __init__(self, parts: Sequence[Part], places: Sequence[torch.device], device: torch.device) -> None:
        """Put parts on some devices, about as many bytes on each."""
        loads, self.device = [0] * len(places), device
        self.at_rest: list[Part] = list(parts)
        sizes = [sum(tensor.numel() * tensor.element_size() for tensor in _tensors(part)) for part in parts]
        for index in sorted(range(len(parts)), key=lambda index: -sizes[index]):
            place = min(range(len(places)), key=loads.__getitem__)
            loads[place] += sizes[index]
            self.at_rest[index] = moved(parts[index], places[place])

    def __len__(self) -> int:
        return len(self.at_rest)

    @overload
    def __getitem__(self, index: int) -> Part: ...

    @overload
    def __getitem__(self, index: slice) -> list[Part]: ...

    def __getitem__(self, index: int | slice) -> Part | list[Part]:
        if isinstance(index, slice):
            return [moved(part, self.device) for part in self.at_rest[index]]
        return moved(self.at_rest[index], self.device)

    def __iter__(self) -> Iterator[Part]:
        return (moved(part, self.device) for part in self.at_rest)


def moved(part: Part, device: torch.device) -> Part:
    """A part with its tensors on a device."""
    assert dataclasses.is_dataclass(part)
    fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.init}
    return dataclasses.replace(part, **{name: _moved(value, device) for name, value in fields.items()})


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(one, device) for one in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _tensors(part: Part) -> list[Tensor]:
    values = [getattr(part, field.name) for field in dataclasses.fields(part)]  # type: ignore[arg-type]
    return [
        one for value in values for one in (value if isinstance(value, tuple) else (value,)) if torch.is_tensor(one)
    ]
