r"""Which datum every row of a call is of, where no arrangement of the dimensions tells it.

Packed sequences (``torch.nn.utils.rnn``) have as many rows of a datum as it is long, in an order that differs between
batches; models that sort their sequences by hand have all tensors in that order. Gradients tell it: where the outputs
are weighed by numbers of their data, a row gets a multiple of what it gets otherwise, and which multiple tells the
datum. Multiples are powers of two, which are exact in every precision.

A row without gradient (padding, say) is of no datum: it carries no curvature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from debiased_laplace.network.layers import Call, Layout


@dataclass(frozen=True, eq=False, kw_only=True)
class RowLayout(Layout):
    """Where the data are, row by row of R.

    Attributes:
        rows: ``[N, S]``, the rows of every datum in their order; R where it has no further one.
        lengths: ``[N]``, how many it has.
    """

    rows: Tensor
    lengths: Tensor

    is_regular: ClassVar[bool] = False

    def by_datum(self, tensor: Tensor, n_data: int, n_trailing: int) -> Tensor:
        """``[leading..., trailing...] -> [N, S, trailing...]``, zero where a datum has no further row."""
        tensor = tensor.reshape(-1, *tensor.shape[tensor.ndim - n_trailing :])
        return torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])[self.rows]


def find_rows(outputs: Tensor, calls: Sequence[Call], n_data: int) -> list[RowLayout]:
    r"""The data in the rows of every call, by :math:`1 + \lceil\log_b N\rceil` backward passes; b is 64.

    Args:
        outputs: ``[N, C]``, with the graph of the forward pass; or those of the first of its data.
        calls: The calls of that forward pass.
        n_data: How many data the model was given.
    """
    # Exponents around zero: squares of the range of half precision, cubes of that of the others.
    base = 8 if outputs.dtype == torch.float16 else 64
    numbers = torch.arange(len(outputs), device=outputs.device)
    vector = torch.arange(1, outputs.shape[1] + 1, device=outputs.device).sin().to(outputs.dtype)
    edges = [call.edge for call in calls]

    def gradients(exponents: Tensor) -> list[Tensor]:
        """Of every call, ``[R, ...]`` in double precision."""
        weighed = torch.exp2(exponents.to(outputs.dtype))[:, None] * vector
        each = torch.autograd.grad(outputs, edges, weighed, retain_graph=True, allow_unused=True)
        return [_as_rows(call, g) for call, g in zip(calls, each, strict=True)]

    reference = gradients(torch.zeros_like(numbers))
    largest = [g.abs().max(1, keepdim=True) for g in reference]
    data = [torch.zeros(len(g), dtype=torch.long, device=g.device) for g in reference]
    digits = math.ceil(round(math.log(max(n_data, 1), base), 9))
    for place in range(digits):
        multiples = gradients(numbers // base**place % base - base // 2)
        for of_rows, (_, index), one, other in zip(data, largest, reference, multiples, strict=True):
            ratio = other.gather(1, index) / one.gather(1, index)
            digit = ratio[:, 0].abs().log2().nan_to_num(0, 0, 0).round().long() + base // 2
            of_rows += base**place * digit.clamp(0, base - 1)
    return [
        _layout(of_rows.clamp_max(n_data - 1), value[:, 0] > 0, n_data)
        for of_rows, (value, _) in zip(data, largest, strict=True)
    ]


def _as_rows(call: Call, gradient: Tensor | None) -> Tensor:
    """A gradient at the output of a call, ``[R, entries of a row]`` in double precision."""
    n_leading = len(call.output_shape) - call.n_trailing
    if gradient is None:
        return torch.zeros(math.prod(call.output_shape[:n_leading]), 1, dtype=torch.float64, device=call.input.device)
    return call.aligned(gradient).double().reshape(-1, math.prod(call.output_shape[n_leading:]))


def _layout(data: Tensor, known: Tensor, n_data: int) -> RowLayout:
    """From the datum of every row, ``[R]``, and whether it is of one."""
    data = torch.where(known, data, n_data)
    lengths = data.bincount(minlength=n_data + 1)
    order = data.argsort(stable=True)
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(data), device=data.device) - starts[data[order]]
    rows = data.new_full((n_data + 1, max(1, int(lengths.max()))), len(data))
    rows[data[order], place] = order
    lengths = lengths[:n_data]
    return RowLayout(rows=rows[:n_data, : max(1, int(lengths.max()))], lengths=lengths)
