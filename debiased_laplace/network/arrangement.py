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


@dataclass(frozen=True)
class Permuted(Arrangement):
    """A weight with its dimensions in any order; a bias beside it as in :class:`SideBySide`.

    Attributes:
        shape: Of the weight.
        order: Its dimensions, those of the groups first, then of the outputs, then of the inputs.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]

    def matrix(self, tensor: Tensor, shape: torch.Size, groups: int, outputs: int) -> Tensor:
        if tuple(shape) != self.shape:
            return tensor.reshape((*leading(tensor, shape), groups, outputs, -1))
        first = tensor.ndim - len(shape)
        moved = tensor.permute((*range(first), *(first + dim for dim in self.order)))
        return moved.reshape((*leading(tensor, shape), groups, outputs, -1))

    def tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        if tuple(shape) != self.shape:
            return matrix.reshape((*matrix.shape[:-3], *shape))
        first = matrix.ndim - 3
        split = matrix.reshape((*matrix.shape[:-3], *(shape[dim] for dim in self.order)))
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return split.permute((*range(first), *(first + dim for dim in back)))


@dataclass(frozen=True)
class Reshuffled(Arrangement):
    """A weight that a layer sees as a view with all of its entries, ``weight.reshape(split).permute(order)``.

    Attributes:
        inner: Arrangement of the view.
        shape: Of the parameter; other tensors of the block are arranged as they are.
        split: Its dimensions, cut and joined.
        order: Those of the view among them.
    """

    inner: Arrangement
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]

    def matrix(self, tensor: Tensor, shape: torch.Size, groups: int, outputs: int) -> Tensor:
        if tuple(shape) != self.shape:
            return self.inner.matrix(tensor, shape, groups, outputs)
        first, view = leading(tensor, shape), torch.Size(self.split[dim] for dim in self.order)
        moved = tensor.reshape((*first, *self.split)).permute(
            (*range(len(first)), *(len(first) + d for d in self.order))
        )
        return self.inner.matrix(moved, view, groups, outputs)

    def tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        if tuple(shape) != self.shape:
            return self.inner.tensor(matrix, shape)
        view = self.inner.tensor(matrix, torch.Size(self.split[dim] for dim in self.order))
        first = view.ndim - len(self.order)
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        moved = view.permute((*range(first), *(first + dim for dim in back)))
        return moved.reshape((*moved.shape[:first], *shape))


def leading(tensor: Tensor, shape: torch.Size) -> torch.Size:
    """Dimensions of a tensor ``[..., *shape]`` before those of the shape."""
    return tensor.shape[: tensor.ndim - len(shape)]
