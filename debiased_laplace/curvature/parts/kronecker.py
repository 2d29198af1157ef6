r"""Kronecker directions of one block, :math:`Q_I \otimes Q_O` in every group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from debiased_laplace.curvature.contractions import FactoredGradients, rotate
from debiased_laplace.curvature.moments import SecondMoment
from debiased_laplace.curvature.parts.dense import DenseBasis
from debiased_laplace.curvature.parts.outputwise import MAX_OUTPUTWISE, OutputwiseBasis
from debiased_laplace.curvature.parts.part import Part, differ, rotated_back
from debiased_laplace.network.blocks import Block
from debiased_laplace.network.kinds import DENSE
from debiased_laplace.network.selected import LayerInputs


@dataclass(frozen=True)
class KroneckerBasis(Part):
    r"""Basis of one block, :math:`Q_I \otimes Q_O` in every group.

    Attributes:
        outputs: ``Q_O: [G, O, o]``, orthonormal columns.
        inputs: ``Q_I: [G, I, i]``, orthonormal columns.
    """

    outputs: Tensor
    inputs: Tensor

    takes_parameter_priors: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, o, i)``."""
        return self.outputs.shape[0], self.outputs.shape[2], self.inputs.shape[2]

    @property
    def n_params(self) -> int:
        groups, outputs, _ = self.outputs.shape
        return groups * outputs * self.inputs.shape[1]

    def describe(self, blocks: Sequence[Block]) -> tuple[str, str]:
        (block,) = blocks
        shape = f"dense {block.size}" if block.kind == DENSE else f"{block.inputs} x {block.outputs}"
        return block.kind.name, shape if block.groups == 1 else f"{block.groups} groups of {shape}"

    def truncated(self, kept: Callable[[int], int]) -> KroneckerBasis:
        outputs, inputs = kept(self.outputs.shape[-1]), kept(self.inputs.shape[-1])
        return KroneckerBasis(self.outputs[..., :outputs], self.inputs[..., :inputs])

    def squared(self) -> KroneckerBasis:
        return KroneckerBasis(self.outputs.square(), self.inputs.square())

    def factored_curvatures(self, inputs: SecondMoment, outputs: SecondMoment) -> Tensor:
        return outputs.along(self.outputs)[:, :, None] * inputs.along(self.inputs)[:, None, :]

    def eigenform(self, curvatures: Tensor, priors: Sequence[Tensor]) -> tuple[Part, Tensor]:
        if not differ(priors):
            return super().eigenform(curvatures, priors)
        (prior,) = priors
        if prior.shape[-1] == 1:  # dense
            outputs = self.outputs.double()
            values, vectors = torch.linalg.eigh(
                (outputs * curvatures.mT) @ outputs.mT + torch.diag_embed(prior[..., 0])
            )
            return KroneckerBasis(vectors, self.inputs.double()), values[..., None]
        inputs = self.inputs.double()[:, None]
        matrices = (inputs * curvatures[:, :, None, :]) @ inputs.mT + torch.diag_embed(prior[:, :1])
        values, vectors = torch.linalg.eigh(matrices)
        return OutputwiseBasis(self.outputs.double(), vectors), values

    def project(self, matrices: Sequence[Tensor]) -> Tensor:
        (matrix,) = matrices
        return self.outputs.mT @ matrix @ self.inputs

    def lift(self, coefficients: Tensor) -> list[Tensor]:
        return [self.outputs @ coefficients @ self.inputs.mT]

    def diagonal_of(self, other: KroneckerBasis, values: Tensor) -> Tensor:
        outputs = (self.outputs.mT @ other.outputs).square()
        inputs = (self.inputs.mT @ other.inputs).square()
        return outputs @ values.to(outputs) @ inputs.mT

    def is_turned_by(self, priors: Sequence[Tensor], blocks: Sequence[Block]) -> bool:
        """If they differ; of single precisions for two tensors the derivatives do."""
        return differ(priors) or (priors[0].requires_grad and len(blocks[0].parameters) > 1)

    def check_priors(self, priors: Sequence[Tensor]) -> None:
        (prior,) = priors
        if prior.shape[-1] == 1 or not differ(priors):
            return
        if bool((prior.detach() != prior.detach()[:, :1]).any()):
            raise ValueError(
                "Expected one prior precision for each parameter tensor of a Kronecker block, got several for one "
                "tensor, which its directions mix. Give one for each tensor, or use a diagonal, low-rank or full "
                "structure."
            )
        groups, n_outputs, n_inputs = self.shape
        if (size := groups * n_outputs * n_inputs * prior.shape[-1]) > MAX_OUTPUTWISE:
            raise ValueError(
                "Expected a smaller layer for prior precisions that differ between its weight and its bias, got one "
                f"of {groups * n_outputs} outputs and {n_inputs} inputs, for which they need {8e-9 * size:.1f} GB. "
                "Use separate_bias=True, biases in blocks of their own, and fit again."
            )

    def turned(self, scales: Sequence[Tensor], curvatures: Tensor) -> tuple[Part, Tensor]:
        """Dense where the block is (one input); otherwise other input directions for every output direction."""
        self.check_priors(scales)
        (scale,) = scales
        if scale.shape[-1] == 1:
            unit = torch.eye(self.rank, dtype=torch.float64, device=scale.device).unflatten(1, self.shape)
            columns = (self.outputs.double() @ unit @ self.inputs.double().mT,)
            turned, values = DenseBasis(columns).turned(scales, curvatures.flatten())
            return turned, values
        return OutputwiseBasis.of(self.outputs, self.inputs, scale, curvatures)

    def weighted_average(self, matrices: Sequence[Tensor]) -> Tensor:
        (matrix,) = matrices
        return self.outputs.square().mT.to(matrix) @ matrix @ self.inputs.square().to(matrix)

    def prepare_inputs(self, inputs: Sequence[LayerInputs], n_vectors: int) -> tuple[Tensor, bool]:
        """The inputs, rotated if that is the cheaper order for this many vectors, and whether they are."""
        (columns,) = inputs
        assert isinstance(columns, Tensor)  # others have no rotation
        _, _, size, positions = columns.shape
        width = self.outputs.shape[1]
        rotate_first = positions * (size * size + n_vectors * width * width)
        rotate_last = n_vectors * (width * size * size + width * width * size)
        if positions > 1 and rotate_last < rotate_first:
            return columns, False
        return rotate(self.inputs, columns[:, :, None])[:, :, 0], True

    def prepares_like(self, other: Part) -> bool:
        return isinstance(other, KroneckerBasis) and self.inputs is other.inputs

    def covariances_of_last_layer(self, inputs: Tensor, scales: Tensor, *, diagonal: bool = False) -> Tensor:
        squares = (inputs @ self.inputs[0].to(inputs.dtype)).square()
        return rotated_back(self.outputs, squares @ scales[0].to(inputs.dtype).mT, diagonal)

    def project_gradients(
        self, inputs: tuple[Tensor, bool], vectors: Sequence[Tensor], *, unit: bool = False
    ) -> FactoredGradients:
        (columns, rotated), (of_block,) = inputs, vectors
        if not rotated:
            return FactoredGradients(columns, of_block, (self.outputs, self.inputs))
        if unit:  # rotating the identity gives the rotation
            return FactoredGradients(columns, self.outputs[None, :, :, :, None])
        return FactoredGradients(columns, rotate(self.outputs, of_block))
