"""The parameters themselves as directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from debiased_laplace.curvature.block_gradients import BlockGradients, block_gradients
from debiased_laplace.curvature.moments import SecondMoment
from debiased_laplace.curvature.parts.part import Part
from debiased_laplace.network.blocks import Block
from debiased_laplace.network.selected import LayerInputs


@dataclass(frozen=True)
class IdentityBasis(Part):
    """The parameters of one block themselves as directions.

    Attributes:
        groups: G.
        outputs: O.
        inputs: I.
    """

    groups: int
    outputs: int
    inputs: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, O, I)``."""
        return self.groups, self.outputs, self.inputs

    @property
    def n_params(self) -> int:
        return math.prod(self.shape)

    def describe(self, blocks: Sequence[Block]) -> tuple[str, str]:
        return "diagonal", ""

    def column_priors(self, priors: Sequence[Tensor]) -> Tensor:
        (prior,) = priors
        return prior

    def factored_curvatures(self, inputs: SecondMoment, outputs: SecondMoment) -> Tensor:
        return outputs.dense()[:, :, None] * inputs.dense()[:, None, :]

    def project(self, matrices: Sequence[Tensor]) -> Tensor:
        (matrix,) = matrices
        return matrix

    def lift(self, coefficients: Tensor) -> list[Tensor]:
        return [coefficients]

    def diagonal_of(self, other: IdentityBasis, values: Tensor) -> Tensor:
        return values

    def weighted_average(self, matrices: Sequence[Tensor]) -> Tensor:
        (matrix,) = matrices
        return matrix

    def covariances_of_last_layer(self, inputs: Tensor, scales: Tensor, *, diagonal: bool = False) -> Tensor:
        variances = inputs.square() @ scales[0].to(inputs.dtype).mT
        return variances if diagonal else torch.diag_embed(variances)

    def project_gradients(
        self, inputs: Sequence[LayerInputs], vectors: Sequence[Tensor], *, unit: bool = False
    ) -> BlockGradients:
        (columns,), (of_block,) = inputs, vectors
        return block_gradients(columns, of_block)
