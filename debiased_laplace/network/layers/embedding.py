"""``F.embedding``: a linear layer on one-hot inputs, of which the ones alone are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from debiased_laplace._checks import UnsupportedLayerError
from debiased_laplace.network.arrangement import Arrangement, leading
from debiased_laplace.network.kinds import DIAGONAL_INPUTS, Kind
from debiased_laplace.network.layers.call import Arguments, Call, Layout, See, composite, rule
from debiased_laplace.network.selected import SelectedInputs


@dataclass(frozen=True)
class RowsAsInputs(Arrangement):
    """A table ``[..., O]`` with I rows, one for every token or position, as ``[1, O, I]``."""

    def matrix(self, tensor: Tensor, shape: torch.Size, groups: int, outputs: int) -> Tensor:
        return tensor.reshape((*leading(tensor, shape), -1, shape[-1])).mT.unsqueeze(-3)

    def tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.squeeze(-3).mT.reshape((*matrix.shape[:-3], *shape))


@dataclass
class EmbeddingCall(Call):
    """A look-up of indices of any shape; the row of ``padding_idx`` gets no gradient."""

    padding_idx: int | None = None

    kind: ClassVar[Kind] = DIAGONAL_INPUTS
    arrangement: ClassVar[Arrangement] = RowsAsInputs()

    def matrix_shape(self, *, weight: bool, bias: bool) -> tuple[int, int, int]:
        assert self.weight is not None
        return 1, self.weight.shape[1], self.weight.shape[0]

    def inputs_memory(self, n_inputs: int) -> int:
        return 2  # an index and a value

    def inputs(self, n_data: int, layout: Layout, *, ones: bool) -> SelectedInputs:
        assert self.weight is not None
        index = layout.by_datum(self.input, n_data, 0).long()  # [N, S]
        values = self.weight.new_ones(index.shape, device=index.device)
        if self.padding_idx is not None:
            values = values.masked_fill(index == self.padding_idx, 0.0)
        return SelectedInputs(index, values, len(self.weight))

    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        if self.padding_idx is not None:
            gradient = gradient.masked_fill((self.input == self.padding_idx)[..., None], 0.0)
        return layout.by_datum(gradient, n_data, 1).mT[:, None]


@composite(F.embedding)
def _embedding(
    see: See, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    if max_norm is not None:
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    # Without scale_grad_by_freq and sparse: outputs do not depend on them, gradients are to be derivatives.
    return see(torch.embedding, weight, input, -1 if padding_idx is None else padding_idx)


@rule(F.embedding, F.embedding_bag)
def _refuse_renormalised(input: Tensor, weight: Tensor, *rest: Any, **further: Any) -> Arguments:
    """What is not written out: with ``max_norm``."""
    raise UnsupportedLayerError(
        f"Expected an embedding without max_norm, got one of {weight.shape[0]} x {weight.shape[1]} with it: it "
        "rescales the weights in every forward pass. Rescale them once, and set max_norm to None."
    )


@rule(torch.embedding)
def _look_up(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Arguments:
    # Of this function minus one is no index from the end: it stands for none.
    return Arguments(EmbeddingCall, indices, weight, None, {"padding_idx": None if padding_idx < 0 else padding_idx})


@rule(Tensor.__getitem__)
def _rows(weight: Tensor, index: Any) -> Arguments | None:
    index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or weight.ndim != 2:
        return None
    if bool((index < 0).any()):
        return None
    return Arguments(EmbeddingCall, index, weight, None)


@rule(torch.index_select, Tensor.index_select)
def _selected_rows(input: Tensor, dim: int, index: Tensor) -> Arguments | None:
    return None if dim != 0 or input.ndim != 2 else Arguments(EmbeddingCall, index, input, None)
