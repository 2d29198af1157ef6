"""Directions of one block with a basis of the inputs for every output direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.curvature.block_gradients import BlockGradients, block_gradients
from debiased_laplace.curvature.parts.part import DenseProjection, Part, rotated_back
from debiased_laplace.network.blocks import Block
from debiased_laplace.network.selected import LayerInputs

#: Most numbers in an :class:`OutputwiseBasis`: half a gigabyte in double precision.
MAX_OUTPUTWISE = 2**26


@dataclass(frozen=True)
class OutputwiseBasis(Part):
    r"""Basis of one block, :math:`q_o \otimes R_o` for every output direction: its own basis of the inputs.

    What Kronecker directions become where the prior precision of the bias is another than that of the weight.

    Attributes:
        outputs: ``Q_O: [G, O, o]``, orthonormal columns, float64.
        inputs: ``R: [G, o, I, i]``, orthonormal columns for every output direction, float64.
    """

    outputs: Tensor
    inputs: Tensor

    @classmethod
    def of(
        cls, outputs: Tensor, inputs: Tensor, scales: Tensor, curvatures: Tensor
    ) -> tuple[OutputwiseBasis, Tensor]:  # fmt: skip
        r"""The singular vectors of :math:`\\mathrm{diag}(\\lambda_o)^{1/2} Q_I^\\top D` for every output direction o.

        Args:
            outputs: ``Q_O`` of Kronecker directions.
            inputs: ``Q_I`` of them.
            scales: The diagonal D as ``[G, O, I]``, the same for all outputs of a group.
            curvatures: ``[G, o, i]``.
        """
        rows = curvatures.sqrt()[..., None] * (inputs.double() * scales[:, 0, :, None]).mT[:, None]
        left, _, right = torch.linalg.svd(rows.detach(), full_matrices=False)
        # With fixed left vectors the squares have the derivatives of the eigenvalues, also of degenerate ones.
        return cls(outputs.double(), right.mT), (left.mT @ rows).square().sum(-1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, o, i)``."""
        groups, n_outputs, _, n_inputs = self.inputs.shape
        return groups, n_outputs, n_inputs

    @property
    def n_params(self) -> int:
        return math.prod(self.outputs.shape[:2]) * self.inputs.shape[2]

    def describe(self, blocks: Sequence[Block]) -> tuple[str, str]:
        return blocks[0].kind.name, f"{blocks[0].inputs} x {blocks[0].outputs}"

    def squared(self) -> OutputwiseBasis:
        return OutputwiseBasis(self.outputs.square(), self.inputs.square())

    def project(self, matrices: Sequence[Tensor]) -> Tensor:
        (matrix,) = matrices
        return ((self.outputs.mT @ matrix.to(self.outputs))[..., None, :] @ self.inputs)[..., 0, :]

    def lift(self, coefficients: Tensor) -> list[Tensor]:
        return [self.outputs @ (self.inputs @ coefficients.to(self.inputs)[..., None])[..., 0]]

    def diagonal_of(self, other: Any, values: Tensor) -> Tensor:
        raise NotImplementedError("Turned directions are those of one posterior, not of folds.")

    def scaled(self, scales: Sequence[Tensor]) -> OutputwiseBasis:
        return OutputwiseBasis(self.outputs, self.inputs * scales[0][:, :1, :, None])

    def weighted_average(self, matrices: Sequence[Tensor]) -> Tensor:
        return self.squared().project(matrices)

    def covariances_of_last_layer(self, inputs: Tensor, scales: Tensor, *, diagonal: bool = False) -> Tensor:
        squares = torch.einsum("na,oai->noi", inputs.to(self.inputs.dtype), self.inputs[0]).square()
        weights = torch.einsum("noi,oi->no", squares, scales[0].to(squares.dtype))
        return rotated_back(self.outputs, weights, diagonal).to(inputs.dtype)

    def project_gradients(
        self, inputs: Sequence[LayerInputs], vectors: Sequence[Tensor], *, unit: bool = False
    ) -> DenseProjection:
        (a,), (g,) = inputs, vectors
        gradients = block_gradients(a, g)
        if a.shape[-1] > 1:
            gradients = gradients.in_precision(self.outputs.dtype)
        rows = gradients.rows().unflatten(-1, (len(self.outputs), self.outputs.shape[1], self.inputs.shape[2]))
        return DenseProjection(self.project([rows]).flatten(2), [gradients])

    def unprojected(
        self, projected: Any, inputs: Sequence[LayerInputs], vectors: Sequence[Tensor]
    ) -> list[BlockGradients]:
        return projected.gradients
