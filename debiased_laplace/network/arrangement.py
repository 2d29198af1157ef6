"""How the parameter tensors of a block are arranged as one matrix ``[G, O, I]``: groups, outputs, inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class Arrangement(ABC):
    """Brings tensors ``[..., *shape]`` into their places of a matrix ``[..., G, O, I]``, and back."""

    #: Whether tensors stand one under another in a single column, ``[1, P, 1]``; otherwise side by side.
    stacked: ClassVar[bool] = False

    @abstractmethod
    def matrix(self, tensor: Tensor, shape: torch.Size, groups: int, outputs: int) -> Tensor:
        """A tensor ``[..., *shape]`` as its part of the matrix."""

    @abstractmethod
    def tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of :meth:`matrix`."""

    def sizes(self, shapes: Sequence[torch.Size], groups: int, outputs: int) -> list[int]:
        """Inputs (or outputs, if they are stacked) of every tensor."""
        return [shape.numel() if self.stacked else shape.numel() // (groups * outputs) for shape in shapes]


@dataclass(frozen=True)
class SideBySide(Arrangement):
    """Outputs first, as linear layers and convolutions have them: ``[G * O, inputs...]``, and a bias ``[G * O]``."""

    def matrix(self, tensor: Tensor, shape: torch.Size, groups: int, outputs: int) -> Tensor:
        return tensor.reshape((*leading(tensor, shape), groups, outputs, -1))

    def tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.reshape((*matrix.shape[:-3], *shape))


@dataclass(frozen=True)
class Stacked(Arrangement):
    """All numbers one under another, ``[1, P, 1]``: the gradient itself takes the place of g, and ``a = 1``."""

    stacked: ClassVar[bool] = True

    def matrix(self, tensor: Tensor, shape: torch.Size, groups: int, outputs: int) -> Tensor:
        return tensor.reshape((*leading(tensor, shape), 1, shape.numel(), 1))

    def tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.reshape((*matrix.shape[:-3], *shape))


def leading(tensor: Tensor, shape: torch.Size) -> torch.Size:
    """Dimensions of a tensor ``[..., *shape]`` before those of the shape."""
    return tensor.shape[: tensor.ndim - len(shape)]
