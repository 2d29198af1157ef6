"""``F.linear``, with any leading dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from debiased_laplace.network.layers.call import Arguments, Call, Layout, at_least_float32, rule


@dataclass
class LinearCall(Call):
    """``F.linear`` with any leading dimensions."""

    def inputs(self, n_data: int, layout: Layout, *, ones: bool) -> Tensor:
        rows = layout.by_datum(self.input, n_data, 1)  # [N, S, I]
        return (F.pad(rows, (0, 1), value=1.0) if ones else rows).mT[:, None]

    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        return layout.by_datum(gradient, n_data, 1).mT[:, None]


@rule(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Arguments:
    return Arguments(LinearCall, input, weight, bias)


@rule(F.bilinear, torch.bilinear)
def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Arguments:
    """A linear layer on the products of the entries of two inputs."""
    first, second = (at_least_float32(input.detach()) for input in (input1, input2))
    products = first[..., :, None] * second[..., None, :]
    return Arguments(LinearCall, products.flatten(-2), weight, bias)
