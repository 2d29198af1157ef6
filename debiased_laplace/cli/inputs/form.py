"""What data of files are held to, and what every source of data gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.evaluation.tasks import FAILURES, Task, TaskError

#: Numbers of an image that nobody has scaled.
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32)
#: Bytes of a file that are read at a time.
BYTES = 2**20

Array = NDArray[Any]


@dataclass(frozen=True)
class Chunk:
    """Consecutive data.

    Attributes:
        start: Position of the first.
        n: How many.
        read: Gives the inputs.
        known: What else is known of them, ``[n, ...]`` each: their targets, or names.
        digest: Of the data, where that of the whole source has not seen all of them.
    """

    start: int
    n: int
    read: Callable[[], _data.Inputs]
    known: Mapping[str, Array] = field(default_factory=dict)
    digest: str = ""


class Source(Protocol):
    """Data to predict."""

    @property
    def total(self) -> int | None:
        """How many, if that is known."""
        ...

    def digest(self) -> str:
        """Tells the data apart from others."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """All of them, in order."""
        ...


@dataclass(frozen=True)
class Form:
    """What one datum of the task looks like.

    Attributes:
        task: The task.
        example: Some data of its test loader.
    """

    task: Task
    example: _data.Inputs

    @property
    def one(self) -> Tensor:
        """The examples, where inputs are one tensor."""
        if not isinstance(self.example, Tensor):
            raise ValueError(
                f"Expected a task whose inputs are one tensor for a table or images, got {self.task.source} with "
                f"{described(self.example)}. Give its arrays by name in an .npz file."
            )
        return self.example

    @property
    def transforms(self) -> bool:
        """Whether the task says what becomes of an item of a file."""
        return self.task.has("transform")

    def transformed(self, item: Any, name: str) -> Tensor:
        """What ``transform()`` of the task makes of an image or of a row of numbers."""
        what = f"transform() of {self.task.source}"
        try:
            made = self.task.definition.transform(item)
        except FAILURES as error:
            raise TaskError(f"{what} failed for {name}: {type(error).__name__}: {error}") from error
        tensor = torch.from_numpy(made) if isinstance(made, np.ndarray) else made
        if not isinstance(tensor, Tensor):
            raise TaskError(f"Expected {what} to return a tensor, got {type(made).__name__} for {name}.")
        wanted = self.one.shape[1:]
        if tensor.shape != wanted:
            raise TaskError(
                f"Expected {what} to return a tensor {list(wanted)}, as test_loader() has them, got "
                f"{list(tensor.shape)} for {name}."
            )
        self._check_dtype(tensor, self.one, f"what {what} returns for {name}")
        return tensor.to(self.one.dtype)

    def fitted(self, rows: Tensor, example: Tensor, name: str) -> Tensor:
        """Rows ``[n, ...]`` in the shape and the dtype of an example; numbers of a datum may come in one row."""
        wanted = example.shape[1:]
        if rows.shape[1:] != wanted and rows.shape[1:] != (wanted.numel(),):
            raise ValueError(
                f"Expected data of shape {list(wanted)} in {name}, as test_loader() of {self.task.source} has them, or "
                f"{wanted.numel()} numbers each, got {list(rows.shape[1:])}. Bring them into that shape."
            )
        self._check_dtype(rows, example, name)
        return rows.to(example.dtype).reshape(len(rows), *wanted)

    def _check_dtype(self, given: Tensor, example: Tensor, name: str) -> None:
        """Refuse numbers that would be taken for something else."""
        expected = f"Expected {example.dtype} in {name}, as test_loader() of {self.task.source} has it, got"
        if given.dtype in UNSIGNED and example.is_floating_point():
            kind = "bytes" if given.dtype == torch.uint8 else str(given.dtype)
            raise ValueError(
                f"{expected} {kind}: they would not be scaled as the training data were. Scale them likewise."
            )
        if given.is_floating_point() and not example.is_floating_point():
            raise ValueError(f"{expected} {given.dtype}. Convert them to whole numbers.")


def described(inputs: Any) -> str:
    """Inputs that are no tensor, in words."""
    if isinstance(inputs, Mapping):
        return f"the inputs {', '.join(map(repr, inputs))}"
    return f"inputs of type {type(inputs).__name__}"


def digest_of_files(paths: Sequence[Path], more: str = "") -> str:
    """Sixteen hexadecimal digits that tell the contents of files apart."""
    state = hashlib.sha256(more.encode())
    for path in paths:
        state.update(f"{path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while piece := file.read(BYTES):
                state.update(piece)
    return state.hexdigest()[:16]
