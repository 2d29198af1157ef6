"""What a part of a basis is: orthonormal columns that span one block of parameters, or several."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from debiased_laplace.curvature.block_gradients import BlockGradients, block_gradients
from debiased_laplace.curvature.contractions import covariances_of_rows
from debiased_laplace.curvature.moments import SecondMoment
from debiased_laplace.curvature.pairs import many_scales
from debiased_laplace.network.blocks import Block
from debiased_laplace.network.selected import LayerInputs


class Projected(Protocol):
    """Projected gradients ``Z`` of one part, contracted without being formed where that is cheaper."""

    def second_moment(self) -> Tensor:
        r"""Equation (2): :math:`\sum_n \sum_v Z_{vn}^2`, of the part's shape."""
        ...

    def covariances(self, scales: Tensor) -> Tensor:
        r"""Equation (4): :math:`Z^\top \mathrm{diag}(h) Z` for a grid ``h: [R, *shape]``, as ``[R, N, V, V]``."""
        ...

    def variances(self, scales: Tensor) -> Tensor:
        """Their diagonals, ``[R, N, V]``."""
        ...

    def rows(self) -> Tensor:
        """The projected gradients themselves, ``[N, V, rank]``."""
        ...


class Part(ABC):
    """Orthonormal columns that span one block or several; matrices and factors come as one for each block."""

    #: Whether prior precisions may differ between any two parameters.
    takes_parameter_priors: ClassVar[bool] = True
    #: Whether the columns are zero at parameters that are fixed.
    zero_where_fixed: ClassVar[bool] = False
    #: Whether gradients with several positions are formed to project them.
    forms_gradients: ClassVar[bool] = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the coefficients."""

    @property
    @abstractmethod
    def n_params(self) -> int:
        """Number of rows."""

    @property
    def rank(self) -> int:
        """Number of columns."""
        return math.prod(self.shape)

    @property
    def complete(self) -> bool:
        """Whether the columns span all rows."""
        return self.rank == self.n_params

    @abstractmethod
    def project(self, matrices: Sequence[Tensor]) -> Tensor:
        r""":math:`U^\top v` with vectors as matrices, ``[..., G, O, I]`` for each block ``-> [..., *shape]``."""

    @abstractmethod
    def lift(self, coefficients: Tensor) -> list[Tensor]:
        r""":math:`U c`, ``[..., *shape] -> [..., G, O, I]`` for each block."""

    @abstractmethod
    def describe(self, blocks: Sequence[Block]) -> tuple[str, str]:
        """For people: the kind of curvature along these directions, and their number or shape."""

    def truncated(self, kept: Callable[[int], int]) -> Part:
        """The first columns, as many as ``kept`` says of the width of each factor."""
        return self

    def averaged(self, values: Tensor) -> Tensor:
        """Values along the columns, averaged over those of every eigenspace of the curvature that chose them."""
        return values

    def transposed(self) -> Tensor:
        r""":math:`U^\top` as a matrix, ``[rank, n_params]``, block after block."""
        raise NotImplementedError(f"The directions of {type(self).__name__} are never a matrix.")

    @abstractmethod
    def diagonal_of(self, other: Any, values: Tensor) -> Tensor:
        r"""Of :math:`U' \mathrm{diag}(v) U'^\top` with another part, the diagonal along these columns."""

    def factored_curvatures(self, inputs: SecondMoment, outputs: SecondMoment) -> Tensor:
        r""":math:`\mathrm{diag}(Q_O^\top B Q_O) \otimes \mathrm{diag}(Q_I^\top A Q_I)`, of the part's shape.

        Args:
            inputs: A, or its diagonal where the directions of the inputs are unit vectors.
            outputs: B, in the same way.
        """
        raise NotImplementedError(f"The directions of {type(self).__name__} have no factors.")

    def column_priors(self, priors: Sequence[Tensor]) -> Tensor:
        """Prior precisions along the columns, of the part's shape, from those of the parameters.

        Args:
            priors: Matrices ``[G, O, I]`` for each block.

        Raises:
            MixedPriorsError: If they differ between parameters that a column mixes.
        """
        if differ(priors):
            raise MixedPriorsError
        column = priors[0].flatten()[0].expand(self.shape)
        if priors[0].requires_grad:  # each parameter has its share in the derivative
            average = self.weighted_average(priors)
            column = column.detach() + average - average.detach()
        return column

    def eigenform(self, curvatures: Tensor, priors: Sequence[Tensor]) -> tuple[Part, Tensor]:
        r"""Orthonormal eigenvectors, and eigenvalues, of :math:`U \mathrm{diag}(\lambda) U^\top + \Delta`."""
        return self, curvatures + self.column_priors(priors)

    def squared(self) -> Part:
        """The squares of the factors of the columns as another part: lifting with it gives diagonals."""
        return self

    def is_turned_by(self, priors: Sequence[Tensor], blocks: Sequence[Block]) -> bool:
        """Whether the directions have to be :meth:`turned` for prior precisions of the parameters.

        Args:
            priors: Matrices ``[G, O, I]`` for each block. Where their derivatives are wanted, they may differ.
            blocks: What the blocks are.
        """
        return False

    def check_priors(self, priors: Sequence[Tensor]) -> None:
        """Raise a ``ValueError`` for prior precisions that the directions cannot be :meth:`turned` for."""
        return

    def turned(self, scales: Sequence[Tensor], curvatures: Tensor) -> tuple[Part, Tensor]:
        r"""Directions and curvatures of :math:`D U \mathrm{diag}(\lambda) U^\top D`; complete ones stay complete.

        Args:
            scales: The diagonal D as matrices ``[G, O, I]`` for each block; curvatures are differentiable in it.
            curvatures: Of the part's shape, float64.
        """
        raise NotImplementedError(f"The directions of {type(self).__name__} cannot be turned.")

    def block_eigenvalues(self, curvatures: Tensor) -> list[Tensor]:
        r"""Of :math:`U \mathrm{diag}(\lambda) U^\top` the eigenvalues of the diagonal block of every block.

        Zeros are left out where they exceed the number of columns.

        Args:
            curvatures: Of the part's shape.
        """
        return [curvatures.flatten()]

    def scaled(self, scales: Sequence[Tensor]) -> Part:
        """The columns with their rows multiplied by matrices ``[G, O, I]``, which are one for all but turned parts."""
        return self

    def weighted_average(self, matrices: Sequence[Tensor]) -> Tensor:
        r""":math:`\mathrm{diag}(U^\top \mathrm{diag}(v) U)` of values ``[G, O, I]`` for each block."""
        raise NotImplementedError

    def prepare_inputs(self, inputs: Sequence[LayerInputs], n_vectors: int) -> Any:
        """What can be done once with the inputs ``[N, G, I, S]`` for all vectors of a batch."""
        return inputs

    def prepares_like(self, other: Part) -> bool:
        """Whether :meth:`prepare_inputs` gives what it gives for another part of the same blocks."""
        return type(self).prepare_inputs is Part.prepare_inputs is type(other).prepare_inputs

    @abstractmethod
    def project_gradients(self, inputs: Any, vectors: Sequence[Tensor], *, unit: bool = False) -> Projected:
        r""":math:`Z_n = U^\top \sum_s g_{ns} a_{ns}^\top` of every vector and datum.

        Args:
            inputs: From :meth:`prepare_inputs`.
            vectors: ``g: [N, G, V, O, S]`` for each block, or ``[1, G, V, O, 1]`` if they are the same for all data.
            unit: Whether the vectors are the unit vectors of the outputs of a block's only call.
        """

    def covariances_of_last_layer(self, inputs: Tensor, scales: Tensor, *, diagonal: bool = False) -> Tensor:
        r"""Equation (4) where the block is the layer that makes the outputs, :math:`J_c = e_c a^\top`.

        Products of whole tensors alone, whatever N is: they can be traced for any number of data.

        Args:
            inputs: ``a: [N, I]``.
            scales: h, of the part's shape.
            diagonal: The variances alone.

        Returns:
            ``[N, O, O]`` or ``[N, O]``.
        """
        raise NotImplementedError(f"The directions of {type(self).__name__} are of no single last layer.")

    def project_formed(self, gradients: Sequence[BlockGradients]) -> DenseProjection:
        """The same of gradients that were kept, one for each block."""
        raise NotImplementedError(f"{type(self).__name__} has a projection of factors alone.")

    def unprojected(
        self, projected: Projected, inputs: Sequence[LayerInputs], vectors: Sequence[Tensor]
    ) -> list[BlockGradients]:
        """The gradients of every block that were projected, if some of them lies outside of the columns."""
        return [] if self.complete else [block_gradients(a, g) for a, g in zip(inputs, vectors, strict=True)]


class MixedPriorsError(ValueError):
    """Prior precisions differ between parameters that directions mix."""


@dataclass(frozen=True)
class DenseProjection:
    """Projected gradients ``Z: [N, V, rank]``, formed.

    Attributes:
        values: Z.
        gradients: What was projected, of every block.
    """

    values: Tensor
    gradients: list[BlockGradients]

    def second_moment(self) -> Tensor:
        """``[rank]``."""
        return self.values.square().sum((0, 1))

    def covariances(self, scales: Tensor) -> Tensor:
        """``[R, *shape] -> [R, N, V, V]``."""
        scales = scales.flatten(1).to(self.values.dtype)
        if many_scales(len(scales), self.values.shape[1]):
            return covariances_of_rows(self.values, scales)
        return (self.values * scales[:, None, None]) @ self.values.mT

    def variances(self, scales: Tensor) -> Tensor:
        """``[R, *shape] -> [R, N, V]``."""
        return torch.einsum("nvk,rk->rnv", self.values.square(), scales.flatten(1).to(self.values.dtype))

    def rows(self) -> Tensor:
        """``[N, V, rank]``."""
        return self.values


def rotated_back(outputs: Tensor, weights: Tensor, diagonal: bool) -> Tensor:
    r""":math:`Q_O \mathrm{diag}(w) Q_O^\top` for ``Q_O: [1, O, o]`` and ``w: [N, o]``, or its diagonal."""
    (rotation,) = outputs.to(weights.dtype)
    return weights @ rotation.square().mT if diagonal else (rotation * weights[:, None]) @ rotation.mT


def differ(values: Sequence[Tensor]) -> bool:
    """Whether the numbers of several tensors are not all the same."""
    first = values[0].detach().flatten()[0]
    return not all(bool((some.detach() == first).all()) for some in values)
