r"""Directions of one block, :math:`I \otimes Q_O`: eigenvectors of the outputs, unit vectors of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from debiased_laplace.curvature.block_gradients import BlockGradients, block_gradients
from debiased_laplace.curvature.contractions import rotate
from debiased_laplace.curvature.moments import SecondMoment
from debiased_laplace.curvature.parts.part import MixedPriorsError, Part
from debiased_laplace.network.blocks import Block
from debiased_laplace.network.selected import LayerInputs


@dataclass(frozen=True)
class OutputBasis(Part):
    r"""Basis of one block whose inputs have a diagonal second moment, as the tokens of an embedding have.

    The inputs being the eigenvectors of their second moment already, these are its Kronecker directions, without a
    matrix ``[I, I]``. Prior precisions may differ between inputs (tokens), which the directions do not mix.

    Attributes:
        outputs: ``Q_O: [G, O, o]``, orthonormal columns.
        inputs: I.
    """

    outputs: Tensor
    inputs: int

    takes_parameter_priors: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, o, I)``."""
        return self.outputs.shape[0], self.outputs.shape[2], self.inputs

    @property
    def n_params(self) -> int:
        return self.outputs.shape[0] * self.outputs.shape[1] * self.inputs

    def describe(self, blocks: Sequence[Block]) -> tuple[str, str]:
        (block,) = blocks
        return block.kind.name, f"{block.inputs} (diagonal) x {block.outputs}"

    def truncated(self, kept: Callable[[int], int]) -> OutputBasis:
        return OutputBasis(self.outputs[..., : kept(self.outputs.shape[-1])], self.inputs)

    def squared(self) -> OutputBasis:
        return OutputBasis(self.outputs.square(), self.inputs)

    def project(self, matrices: Sequence[Tensor]) -> Tensor:
        (matrix,) = matrices
        return self.outputs.mT @ matrix

    def lift(self, coefficients: Tensor) -> list[Tensor]:
        return [self.outputs @ coefficients]

    def diagonal_of(self, other: OutputBasis, values: Tensor) -> Tensor:
        outputs = (self.outputs.mT @ other.outputs).square()
        return outputs @ values.to(outputs)

    def factored_curvatures(self, inputs: SecondMoment, outputs: SecondMoment) -> Tensor:
        return outputs.along(self.outputs)[:, :, None] * inputs.dense()[:, None, :]

    def check_priors(self, priors: Sequence[Tensor]) -> None:
        (prior,) = priors
        if bool((prior.detach() != prior.detach()[:, :1]).any()):
            raise ValueError(
                "Expected one prior precision for each parameter tensor of an embedding, or for each of its rows, got "
                "several for one row, which its directions mix. Give one for each, or use a diagonal, low-rank or full "
                "structure."
            )

    def column_priors(self, priors: Sequence[Tensor]) -> Tensor:
        """One for each input, the same for all of its directions."""
        (prior,) = priors
        if bool((prior.detach() != prior.detach()[:, :1]).any()):
            raise MixedPriorsError
        columns = prior[:, :1].detach().expand(self.shape)
        if not prior.requires_grad:
            return columns
        average = self.weighted_average(priors)
        return columns + average - average.detach()  # each parameter has its share in the derivative

    def weighted_average(self, matrices: Sequence[Tensor]) -> Tensor:
        (matrix,) = matrices
        return self.outputs.square().mT.to(matrix) @ matrix

    def project_gradients(
        self, inputs: Sequence[LayerInputs], vectors: Sequence[Tensor], *, unit: bool = False
    ) -> BlockGradients:
        (of_inputs,), (of_outputs,) = inputs, vectors
        return block_gradients(of_inputs, rotate(self.outputs, of_outputs))
