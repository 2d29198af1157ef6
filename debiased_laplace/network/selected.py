"""Inputs that are multiples of unit vectors, without their zeros: what an embedding is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class SelectedInputs:
    """Inputs ``a: [N, 1, I, S]`` with at most one entry at every position.

    Attributes:
        index: Which of the I inputs it is, ``[N, S]``.
        values: What it is, ``[N, S]``.
        size: I.
    """

    index: Tensor
    values: Tensor
    size: int

    @property
    def shape(self) -> torch.Size:
        """``[N, 1, I, S]``."""
        return torch.Size((len(self.index), 1, self.size, self.index.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the values."""
        return self.values.dtype

    def __len__(self) -> int:
        """Number of data."""
        return len(self.index)

    def __getitem__(self, part: slice) -> SelectedInputs:
        """Those of some of the data."""
        return replace(self, index=self.index[part], values=self.values[part])

    def to(self, dtype: torch.dtype) -> SelectedInputs:
        """In another precision."""
        return replace(self, values=self.values.to(dtype))

    def to_dense(self) -> Tensor:
        """``[N, 1, I, S]`` with the zeros; for tests."""
        dense = self.values.new_zeros(len(self.index), self.size, self.index.shape[1])
        return dense.scatter_(1, self.index[:, None], self.values[:, None])[:, None]

    def distinct(self) -> tuple[Tensor, Tensor]:
        """The T inputs that a datum has at all, ``[N, T]``, and their values at the positions, ``[N, T, S]``.

        T is that of the datum that has most, or more; others have inputs with zeros in their places.
        """
        index, rank = self._ranked()
        columns = self.values.new_zeros(*index.shape, rank.shape[1])
        return index, columns.scatter_(1, rank[:, None], self.values[:, None])

    def summed(self) -> SelectedInputs:
        """Sums over positions, ``a: [N, 1, I, 1]``, with a position for each of their entries."""
        index, rank = self._ranked()
        return replace(self, index=index, values=self.values.new_zeros(index.shape).scatter_add_(1, rank, self.values))

    def _ranked(self) -> tuple[Tensor, Tensor]:
        """The inputs that a datum has at all, ``[N, T]``, and which of them it has at every position, ``[N, S]``."""
        ordered, order = self.index.sort(1)
        is_new = torch.ones_like(ordered, dtype=torch.bool)
        is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        rank = torch.empty_like(ordered).scatter_(1, order, is_new.cumsum(1) - 1)  # among those of the datum
        n_distinct = min(rank.shape[1], self.size)
        if rank.is_cpu:  # elsewhere the bound, since to know the number is to wait for the device
            n_distinct = int(rank.max()) + 1 if rank.numel() else 0
        index = torch.zeros(len(rank), n_distinct, dtype=torch.long, device=rank.device).scatter_(1, rank, self.index)
        return index, rank

    def second_moments(self, weights: Tensor | None = None) -> Tensor:
        """Weighted sums of squares over data and positions, ``[1, I]``."""
        squares = self.values.square()
        if weights is not None:
            squares = squares * weights.to(squares)[:, None]
        return squares.new_zeros(self.size).index_add_(0, self.index.flatten(), squares.flatten())[None]


LayerInputs = Tensor | SelectedInputs


def no_inputs(dense: bool, shape: tuple[int, int, int], like: Tensor, dtype: torch.dtype) -> LayerInputs:
    """Inputs ``[N, G, I, 1]`` that are zero, of a layer that no datum is sent to; dense ones, or selected ones."""
    n, groups, size = shape
    if dense:
        return like.new_zeros((n, groups, size, 1), dtype=dtype)
    index = torch.zeros(n, 1, dtype=torch.long, device=like.device)
    return SelectedInputs(index, like.new_zeros((n, 1), dtype=dtype), size)


def concatenated(parts: Sequence[LayerInputs]) -> LayerInputs:
    """Inputs of the same data at the positions of several calls, one after the other."""
    selected = [part for part in parts if isinstance(part, SelectedInputs)]
    if not selected:
        return torch.cat([part for part in parts if isinstance(part, Tensor)], -1)
    index, values = [part.index for part in selected], [part.values for part in selected]
    return replace(selected[0], index=torch.cat(index, 1), values=torch.cat(values, 1))


def masked(inputs: LayerInputs, mask: Tensor) -> LayerInputs:
    """Inputs at the positions of a mask ``[N, S]``, and zeros at others, whatever is there."""
    if isinstance(inputs, SelectedInputs):
        return replace(inputs, values=torch.where(mask, inputs.values, 0.0))
    return torch.where(mask[:, None, None], inputs, 0.0)


def means(inputs: LayerInputs, mask: Tensor | None = None) -> LayerInputs:
    """Means over the positions of a mask ``[N, S]``, or over all, ``[N, G, I, 1]``; zeros where there are none."""
    counts: Tensor | int = inputs.shape[-1]
    if mask is not None:
        inputs, counts = masked(inputs, mask), mask.sum(1).clamp_min(1)[:, None]
    if isinstance(inputs, SelectedInputs):
        sums = inputs.summed()
        return replace(sums, values=sums.values / counts)
    return inputs.sum(-1, keepdim=True) / (counts[..., None, None] if isinstance(counts, Tensor) else counts)


def second_moments(inputs: LayerInputs, weights: Tensor | None = None) -> Tensor:
    """Weighted sums of squares of inputs ``[N, G, I, S]`` over data and positions, ``[G, I]``."""
    if isinstance(inputs, SelectedInputs):
        return inputs.second_moments(weights)
    squares = inputs.square().sum(-1)
    return squares.sum(0) if weights is None else torch.einsum("n,ngi->gi", weights.to(squares), squares)


def gradients_of_data(vectors: Tensor, inputs: LayerInputs) -> Tensor:
    """``[G, O, S, N]`` and inputs ``[N, G, I, S]`` as gradients, ``[N, G, O, I]``."""
    if isinstance(inputs, Tensor):
        return torch.einsum("gosn,ngis->ngoi", vectors, inputs)
    vectors = vectors[0].permute(2, 0, 1) * inputs.values[:, None]  # [N, O, S]
    total = vectors.new_zeros(*vectors.shape[:2], inputs.size)
    return total.scatter_add_(2, inputs.index[:, None].expand_as(vectors), vectors)[:, None]


def memory_of_datum(inputs: LayerInputs) -> int:
    """Numbers that the inputs of one datum are."""
    return math.prod(inputs.shape[1:]) if isinstance(inputs, Tensor) else 2 * inputs.index.shape[1]


def formed_size(inputs: LayerInputs, outputs: int) -> int:
    """Numbers of a formed gradient ``[G, O, I]`` without those that are zero, where there are several positions."""
    _, groups, n_inputs, positions = inputs.shape
    if isinstance(inputs, SelectedInputs):
        n_inputs = min(n_inputs, positions)
    return groups * outputs * n_inputs if positions > 1 else 1
