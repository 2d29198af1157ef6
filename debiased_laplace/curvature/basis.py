r"""Orthonormal bases of parameter space, as direct sums of parts: :math:`U = \bigoplus_p U_p`.

A part spans one block (Kronecker, identity) or several together (dense). Parameter vectors are ``[..., D]``,
in the order of ``model.named_parameters()``. Coefficients are ``[..., rank]``, part after part. A basis may
be incomplete (fewer columns than rows); then the complement is orthogonal to every column.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from debiased_laplace.curvature.contractions import Gradients, covariances_of_rows, many_scales, rotate
from debiased_laplace.network.blocks import Block, flatten, unflatten


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
    def diagonal_of(self, other: Any, values: Tensor) -> Tensor:
        r"""Of :math:`U' \mathrm{diag}(v) U'^\top` with another part, the diagonal along these columns."""

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

    def scaled(self, scales: Sequence[Tensor]) -> Part:
        """The columns with their rows multiplied by matrices ``[G, O, I]``, which are one for all but turned parts."""
        return self

    def weighted_average(self, matrices: Sequence[Tensor]) -> Tensor:
        r""":math:`\mathrm{diag}(U^\top \mathrm{diag}(v) U)` of values ``[G, O, I]`` for each block."""
        raise NotImplementedError

    def prepare_inputs(self, inputs: Sequence[Tensor], n_vectors: int) -> Any:
        """What can be done once with the inputs ``[N, G, I, S]`` for all vectors of a batch."""
        return inputs

    @abstractmethod
    def project_gradients(self, inputs: Any, vectors: Sequence[Tensor], *, unit: bool = False) -> Projected:
        r""":math:`Z_n = U^\top \sum_s g_{ns} a_{ns}^\top` of every vector and datum.

        Args:
            inputs: From :meth:`prepare_inputs`.
            vectors: ``g: [N, G, V, O, S]`` for each block, or ``[1, G, V, O, 1]`` if they are the same for all data.
            unit: Whether the vectors are the unit vectors of the outputs of a block's only call.
        """


@dataclass(frozen=True)
class KroneckerBasis(Part):
    r"""Basis of one block, :math:`Q_I \otimes Q_O` in every group.

    Attributes:
        outputs: ``Q_O: [G, O, o]``, orthonormal columns.
        inputs: ``Q_I: [G, I, i]``, orthonormal columns.
    """

    outputs: Tensor
    inputs: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, o, i)``."""
        return self.outputs.shape[0], self.outputs.shape[2], self.inputs.shape[2]

    @property
    def n_params(self) -> int:
        groups, outputs, _ = self.outputs.shape
        return groups * outputs * self.inputs.shape[1]

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
        (own,) = priors
        if own.shape[-1] == 1 or not differ(priors):
            return
        if bool((own.detach() != own.detach()[:, :1]).any()):
            raise ValueError(
                "Expected one prior precision for each parameter tensor of a Kronecker block, got several for one "
                "tensor, which its directions mix. Give one for each tensor, or use a diagonal, low-rank or full "
                "structure."
            )
        groups, n_outputs, n_inputs = self.shape
        if (size := groups * n_outputs * n_inputs * own.shape[-1]) > MAX_OUTPUTWISE:
            raise ValueError(
                "Expected a smaller layer for prior precisions that differ between its weight and its bias, got one "
                f"of {groups * n_outputs} outputs and {n_inputs} inputs, for which they need {8e-9 * size:.1f} GB. "
                "Use separate_bias=True, biases in blocks of their own, and fit again."
            )

    def turned(self, scales: Sequence[Tensor], curvatures: Tensor) -> tuple[Part, Tensor]:
        """Dense where the block is (one input); otherwise other input directions for every output direction."""
        self.check_priors(scales)
        (own,) = scales
        if own.shape[-1] == 1:
            unit = torch.eye(self.rank, dtype=torch.float64, device=own.device).unflatten(1, self.shape)
            columns = (self.outputs.double() @ unit @ self.inputs.double().mT,)
            turned, values = DenseBasis(columns).turned(scales, curvatures.flatten())
            return turned, values
        return OutputwiseBasis.of(self, own, curvatures)

    def weighted_average(self, matrices: Sequence[Tensor]) -> Tensor:
        (matrix,) = matrices
        return self.outputs.square().mT.to(matrix) @ matrix @ self.inputs.square().to(matrix)

    def prepare_inputs(self, inputs: Sequence[Tensor], n_vectors: int) -> tuple[Tensor, bool]:
        """The inputs, rotated if that is the cheaper order for this many vectors, and whether they are."""
        (columns,) = inputs
        _, _, size, positions = columns.shape
        width = self.outputs.shape[1]
        rotate_first = positions * (size * size + n_vectors * width * width)
        rotate_last = n_vectors * (width * size * size + width * width * size)
        if positions > 1 and rotate_last < rotate_first:
            return columns, False
        return rotate(self.inputs, columns[:, :, None])[:, :, 0], True

    def project_gradients(
        self, inputs: tuple[Tensor, bool], vectors: Sequence[Tensor], *, unit: bool = False
    ) -> Gradients:
        (columns, rotated), (own,) = inputs, vectors
        if not rotated:
            return Gradients(columns, own, (self.outputs, self.inputs))
        if unit:  # rotating the identity gives the rotation
            return Gradients(columns, self.outputs[None, :, :, :, None])
        return Gradients(columns, rotate(self.outputs, own))


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

    def project_gradients(
        self, inputs: Sequence[Tensor], vectors: Sequence[Tensor], *, unit: bool = False
    ) -> Gradients:
        (columns,), (own,) = inputs, vectors
        return Gradients(columns, own)


@dataclass(frozen=True)
class DenseBasis(Part):
    """Any orthonormal columns that span several blocks together.

    Everything is computed in the precision of the columns. In single precision columns are orthonormal
    to 1e-7 only, and what the complement then loses grows like the ratio of curvature to prior precision:
    keep them in float64.

    Attributes:
        columns: For each block ``[rank, G, O, I]``.
        eigenspaces: ``[rank]``, numbers of the eigenspaces of the curvature that chose them, where one has several
            directions: which ones is arbitrary there. None if all have their own.
    """

    columns: tuple[Tensor, ...]
    eigenspaces: Tensor | None = None

    @property
    def shape(self) -> tuple[int]:
        """``(rank,)``."""
        return (len(self.columns[0]),)

    @property
    def n_params(self) -> int:
        return sum(own[0].numel() if len(own) else math.prod(own.shape[1:]) for own in self.columns)

    @property
    def dtype(self) -> torch.dtype:
        """Precision."""
        return self.columns[0].dtype

    def project(self, matrices: Sequence[Tensor]) -> Tensor:
        total = [
            m.to(self.dtype).flatten(-3) @ own.flatten(1).mT for m, own in zip(matrices, self.columns, strict=True)
        ]
        return torch.stack(total).sum(0)

    def lift(self, coefficients: Tensor) -> list[Tensor]:
        return [(coefficients.to(self.dtype) @ own.flatten(1)).unflatten(-1, own.shape[1:]) for own in self.columns]

    def diagonal_of(self, other: DenseBasis, values: Tensor) -> Tensor:
        pairs = zip(self.columns, other.columns, strict=True)
        overlaps = torch.stack([own.flatten(1) @ theirs.flatten(1).mT for own, theirs in pairs]).sum(0)
        return overlaps.square() @ values.to(overlaps)

    def is_turned_by(self, priors: Sequence[Tensor], blocks: Sequence[Block]) -> bool:
        """If they differ, or their derivatives do."""
        return priors[0].requires_grad or differ(priors)

    def turned(self, scales: Sequence[Tensor], curvatures: Tensor) -> tuple[DenseBasis, Tensor]:
        weights = curvatures.sqrt()[:, None, None, None]
        rows = torch.cat([(c * own * weights).flatten(1) for c, own in zip(self.columns, scales, strict=True)], 1)
        left, values, right = torch.linalg.svd(rows.detach(), full_matrices=False)
        if not self.complete:
            keep = values > values[0] * torch.finfo(values.dtype).eps * max(rows.shape)
            left, right = left[:, keep], right[keep]
        # With fixed left vectors the squares have the derivatives of the eigenvalues, also of degenerate ones.
        squares = (left.mT @ rows).square().sum(1)
        split = right.split([c[0].numel() for c in self.columns], 1)
        columns = tuple(own.unflatten(1, c.shape[1:]) for own, c in zip(split, self.columns, strict=True))
        return DenseBasis(columns), squares

    def scaled(self, scales: Sequence[Tensor]) -> DenseBasis:
        return DenseBasis(tuple(c * own for c, own in zip(self.columns, scales, strict=True)))

    def weighted_average(self, matrices: Sequence[Tensor]) -> Tensor:
        own = [c.square().flatten(1).to(m) @ m.flatten() for c, m in zip(self.columns, matrices, strict=True)]
        return torch.stack(own).sum(0)

    def project_gradients(
        self, inputs: Sequence[Tensor], vectors: Sequence[Tensor], *, unit: bool = False
    ) -> DenseProjection:
        gradients = self.gradients(inputs, vectors)
        rows = [g.project(own) for g, own in zip(gradients, self.columns, strict=True)]
        return DenseProjection(torch.stack(rows).sum(0), gradients)

    def gradients(self, inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Gradients]:
        # With several positions the gradients are formed in the precision of the network and then converted: the
        # complement compares two contractions of them, which have to see the same numbers, not more exact ones.
        return [
            Gradients(a.to(self.dtype), g.to(self.dtype)) if a.shape[-1] == 1 else Gradients(a, g).formed(self.dtype)
            for a, g in zip(inputs, vectors, strict=True)
        ]


@dataclass(frozen=True)
class DenseProjection:
    """Projected gradients ``Z: [N, V, rank]``, formed.

    Attributes:
        values: Z.
        gradients: What was projected, of every block.
    """

    values: Tensor
    gradients: list[Gradients]

    def second_moment(self) -> Tensor:
        """``[rank]``."""
        return self.values.square().sum((0, 1))

    def covariances(self, scales: Tensor) -> Tensor:
        """``[R, *shape] -> [R, N, V, V]``."""
        scales = scales.flatten(1).to(self.values.dtype)
        if many_scales(scales, self.values.shape[1]):
            return covariances_of_rows(self.values, scales)
        return (self.values * scales[:, None, None]) @ self.values.mT

    def variances(self, scales: Tensor) -> Tensor:
        """``[R, *shape] -> [R, N, V]``."""
        return torch.einsum("nvk,rk->rnv", self.values.square(), scales.flatten(1).to(self.values.dtype))

    def rows(self) -> Tensor:
        """``[N, V, rank]``."""
        return self.values


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
    def of(cls, part: KroneckerBasis, scales: Tensor, curvatures: Tensor) -> tuple[OutputwiseBasis, Tensor]:
        r"""The singular vectors of :math:`\\mathrm{diag}(\\lambda_o)^{1/2} Q_I^\\top D` for every output direction o.

        Args:
            part: Kronecker directions.
            scales: The diagonal D as ``[G, O, I]``, the same for all outputs of a group.
            curvatures: ``[G, o, i]``.
        """
        rows = curvatures.sqrt()[..., None] * (part.inputs.double() * scales[:, 0, :, None]).mT[:, None]
        left, _, right = torch.linalg.svd(rows.detach(), full_matrices=False)
        # With fixed left vectors the squares have the derivatives of the eigenvalues, also of degenerate ones.
        return cls(part.outputs.double(), right.mT), (left.mT @ rows).square().sum(-1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, o, i)``."""
        groups, n_outputs, _, n_inputs = self.inputs.shape
        return groups, n_outputs, n_inputs

    @property
    def n_params(self) -> int:
        return math.prod(self.outputs.shape[:2]) * self.inputs.shape[2]

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
        return OutputwiseBasis(self.outputs.square(), self.inputs.square()).project(matrices)

    def project_gradients(
        self, inputs: Sequence[Tensor], vectors: Sequence[Tensor], *, unit: bool = False
    ) -> DenseProjection:
        (a,), (g,) = inputs, vectors
        gradients = Gradients(a, g) if a.shape[-1] == 1 else Gradients(a, g).formed(self.outputs.dtype)
        rows = gradients.rows().unflatten(-1, (len(self.outputs), self.outputs.shape[1], self.inputs.shape[2]))
        return DenseProjection(self.project([rows]).flatten(2), [gradients])


@dataclass(frozen=True)
class Basis:
    """Direct sum of parts: the orthonormal columns of U, ``[D, rank]``.

    Attributes:
        blocks: What the blocks are.
        shapes: Shapes of the parameters by name, in the order of the parameter vector.
        parts: The parts.
        groups: For each part, the positions of its blocks; None for one part for each block.
    """

    blocks: Sequence[Block]
    shapes: dict[str, torch.Size]
    parts: Sequence[Part]
    groups: Sequence[tuple[int, ...]] | None = None

    @cached_property
    def members(self) -> list[tuple[int, ...]]:
        """For each part, the positions of its blocks."""
        return list(self.groups) if self.groups is not None else [(index,) for index in range(len(self.blocks))]

    @cached_property
    def sizes(self) -> list[int]:
        """Columns of every part."""
        return [part.rank for part in self.parts]

    @property
    def rank(self) -> int:
        """Number of columns."""
        return sum(self.sizes)

    @cached_property
    def n_params(self) -> int:
        """D."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def complete(self) -> bool:
        """Whether the columns span parameter space."""
        return self.rank == self.n_params

    def split(self, coefficients: Tensor) -> list[Tensor]:
        """Coefficients ``[..., rank]`` of every part, ``[..., *shape]``."""
        parts = coefficients.split(self.sizes, -1)
        return [c.unflatten(-1, part.shape) for c, part in zip(parts, self.parts, strict=True)]

    def join(self, coefficients: Sequence[Tensor]) -> Tensor:
        """Inverse of :meth:`split`."""
        return torch.cat(
            [c.flatten(c.ndim - len(part.shape)) for c, part in zip(coefficients, self.parts, strict=True)], -1
        )

    def averaged(self, values: Tensor) -> Tensor:
        """Values ``[rank]``, averaged over the directions of every eigenspace: then no choice within one matters."""
        parts = list(self.split(values))
        for index, part in enumerate(self.parts):
            labels = part.eigenspaces if isinstance(part, DenseBasis) else None
            if labels is not None:
                labels = labels.to(values.device)
                totals = values.new_zeros(int(labels[-1]) + 1).index_add(0, labels, parts[index])
                parts[index] = (totals / labels.bincount())[labels]
        return self.join(parts)

    def project(self, vector: Tensor) -> Tensor:
        r""":math:`U^\top v`, ``[..., D] -> [..., rank]``."""
        matrices = self.matrices(vector)
        return self.join(
            [part.project([matrices[i] for i in own]) for part, own in zip(self.parts, self.members, strict=True)]
        )

    def lift(self, coefficients: Tensor) -> Tensor:
        r""":math:`U c`, ``[..., rank] -> [..., D]``."""
        parameters: dict[str, Tensor] = {}
        for part, own, c in zip(self.parts, self.members, self.split(coefficients), strict=True):
            for index, matrix in zip(own, part.lift(c), strict=True):
                parameters.update(self.blocks[index].scatter(matrix))
        return flatten(parameters, self.shapes)

    def diagonal_of(self, other: Basis, values: Tensor) -> Tensor:
        r"""Of :math:`U' \mathrm{diag}(v) U'^\top`, another basis of the same structure, the diagonal along U."""
        own = zip(self.parts, other.parts, other.split(values), strict=True)
        return self.join([part.diagonal_of(theirs, v) for part, theirs, v in own])

    def by_rank(self, other: Basis, values: Tensor) -> Tensor:
        """Values ``[rank']`` along another basis of the same structure: k-th of a part to k-th, or zero."""
        aligned = []
        for part, theirs, own in zip(self.parts, other.parts, other.split(values), strict=True):
            if part.shape != theirs.shape:  # low rank: one number for each direction
                own = torch.nn.functional.pad(own[: part.rank], (0, max(0, part.rank - theirs.rank)))
            aligned.append(own)
        return self.join(aligned)

    def prepare_inputs(self, inputs: Sequence[Tensor], n_vectors: int) -> list[Any]:
        """What can be done once with the inputs of all blocks for all vectors of a batch."""
        return [
            part.prepare_inputs([inputs[i] for i in own], n_vectors)
            for part, own in zip(self.parts, self.members, strict=True)
        ]

    def project_gradients(self, inputs: Sequence[Any], vectors: Sequence[Tensor]) -> Iterator[Projected]:
        r""":math:`Z_n`, part after part."""
        for part, own, prepared in zip(self.parts, self.members, inputs, strict=True):
            yield part.project_gradients(prepared, [vectors[i] for i in own])

    def per_column(self, values: Tensor) -> Tensor:
        """A prior precision for every column: ``[1]``, one for each part, or ``[D] -> [rank]``.

        Raises:
            ValueError: If the values ``[D]`` differ within a part whose directions mix parameters.
        """
        if len(values) not in (1, len(self.parts)):
            return self._column_values(values)
        sizes = torch.tensor(self.sizes, device=values.device)
        return values.expand(len(self.parts)).repeat_interleave(sizes)

    def per_parameter(self, values: Tensor) -> Tensor:
        """The same for every parameter, ``[D]``."""
        if len(values) not in (1, len(self.parts)):
            return values
        parameters = {
            name: value.expand(shape)
            for own, value in zip(self.members, values.expand(len(self.parts)), strict=True)
            for index in own
            for name, shape in zip(self.blocks[index].parameters, self.blocks[index].shapes, strict=True)
        }
        return flatten(parameters, self.shapes)

    def matrices(self, vector: Tensor) -> list[Tensor]:
        """A parameter vector ``[..., D]`` as matrices ``[..., G, O, I]`` of every block."""
        parameters = unflatten(vector, self.shapes)
        return [block.gather(parameters) for block in self.blocks]

    def check_priors(self, values: Tensor) -> None:
        """Raise a ``ValueError`` for prior precisions of all parameters, ``[D]``, that the directions mix."""
        matrices = self.matrices(values)
        for part, members in zip(self.parts, self.members, strict=True):
            part.check_priors([matrices[i] for i in members])

    def _column_values(self, values: Tensor) -> Tensor:
        matrices = self.matrices(values)
        columns = []
        for part, members in zip(self.parts, self.members, strict=True):
            own = [matrices[i] for i in members]
            if isinstance(part, IdentityBasis):
                columns.append(own[0])
                continue
            if differ(own):
                names = [name for i in members for name in self.blocks[i].parameters]
                raise ValueError(
                    f"Expected one prior precision for all of {names}, whose directions mix them, got several. Give "
                    "one for each line of coverage(), or use a diagonal structure."
                )
            column = own[0].flatten()[0].expand(part.shape)
            if values.requires_grad:  # each parameter has its share in the derivative
                average = part.weighted_average(own)
                column = column.detach() + average - average.detach()
            columns.append(column)
        return self.join(columns)


def differ(values: Sequence[Tensor]) -> bool:
    """Whether the numbers of several tensors are not all the same."""
    first = values[0].detach().flatten()[0]
    return not all(bool((own.detach() == first).all()) for own in values)
