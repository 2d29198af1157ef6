r"""Orthonormal bases of parameter space: :math:`U = \bigoplus_b Q_I^{(b)} \otimes Q_O^{(b)}`.

Parameter vectors are ``[..., D]``, in the order of ``model.named_parameters()``. Coefficients are
``[..., rank]``, block after block, and within a block ``[G, o, i]`` flattened. A basis may be
incomplete (fewer columns than rows); then the complement is orthogonal to every column.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.blocks import Block, flatten, unflatten

#: Bytes of projected gradients at a time: what a processor's cache holds, and more on an accelerator.
PROJECTION_MEMORY = {"cpu": 2**24, "accelerator": 2**28}


@dataclass(frozen=True)
class BlockInputs:
    """Inputs of a block, prepared once for all vectors of a batch: ``[N, G, I, S]``, or rotated ``[N, G, i, S]``."""

    values: Tensor
    rotated: bool


@dataclass(frozen=True)
class KroneckerBasis:
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
    def rank(self) -> int:
        """Number of columns."""
        groups, outputs, inputs = self.shape
        return groups * outputs * inputs

    @property
    def complete(self) -> bool:
        """Whether the columns span the whole block."""
        return self.outputs.shape[1] == self.outputs.shape[2] and self.inputs.shape[1] == self.inputs.shape[2]

    def project(self, matrix: Tensor) -> Tensor:
        r""":math:`U^\top v` with vectors as matrices, ``[..., G, O, I] -> [..., G, o, i]``."""
        return self.outputs.mT @ matrix @ self.inputs

    def lift(self, coefficients: Tensor) -> Tensor:
        r""":math:`U c`, ``[..., G, o, i] -> [..., G, O, I]``."""
        return self.outputs @ coefficients @ self.inputs.mT

    def prepare_inputs(self, inputs: Tensor, n_vectors: int) -> BlockInputs:
        """Rotate the inputs first if that is the cheaper order for this many vectors, otherwise later."""
        _, _, size, positions = inputs.shape
        width = self.outputs.shape[1]
        rotate_first = positions * (size * size + n_vectors * width * width)
        rotate_last = n_vectors * (width * size * size + width * width * size)
        if positions > 1 and rotate_last < rotate_first:
            return BlockInputs(inputs, rotated=False)
        return BlockInputs(_rotate(self.inputs, inputs[:, :, None])[:, :, 0], rotated=True)

    def project_gradients(self, inputs: BlockInputs, vectors: Tensor) -> ProjectedGradients:
        r""":math:`Z_n = U^\top \sum_s g_{ns} a_{ns}^\top` of every vector and datum, in its cheapest form.

        Args:
            inputs: From :meth:`prepare_inputs`.
            vectors: ``g: [N, G, V, O, S]``.
        """
        if inputs.rotated:
            vectors = _rotate(self.outputs, vectors)
        return ProjectedGradients(inputs.values, vectors, None if inputs.rotated else self)


@dataclass(frozen=True)
class ProjectedGradients:
    """Projected gradients ``Z: [N, G, V, o, i]`` that are formed only where they have to be.

    With one position they stay the outer product ``g a^T``; with more they are formed for as many
    data at a time as :data:`PROJECTION_MEMORY` allows, and contracted at once.

    Attributes:
        inputs: ``[N, G, i, S]``.
        vectors: ``[N, G, V, o, S]``.
        rotation: Basis to apply after the contraction over positions; None if it was applied before.
    """

    inputs: Tensor
    vectors: Tensor
    rotation: KroneckerBasis | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, o, i)``."""
        if self.rotation is not None:
            return self.rotation.shape
        return self.inputs.shape[1], self.vectors.shape[3], self.inputs.shape[2]

    @property
    def _factored(self) -> bool:
        return self.inputs.shape[-1] == 1

    def _pieces(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Slices of data and of outputs, and their ``Z: [n, G, V, o, i]``; the caller may overwrite it."""
        n, groups, n_vectors, height, _ = self.vectors.shape
        width = self.inputs.shape[2]
        device = "cpu" if self.inputs.device.type == "cpu" else "accelerator"
        rows = PROJECTION_MEMORY[device] // (groups * n_vectors * width * self.inputs.element_size())
        data = _data.slices(n, max(1, rows // height))
        if self.rotation is not None:  # every output is needed to rotate them
            for part in data:
                projected = self.vectors[part].flatten(2, 3) @ self.inputs[part].mT @ self.rotation.inputs
                projected = self.rotation.outputs.mT[:, None] @ projected.unflatten(2, (n_vectors, height))
                yield part, slice(0, projected.shape[3]), projected
            return
        buffer = self.inputs.new_empty(0)  # one for all pieces: fresh memory costs more than the product
        for part in data:
            inputs = self.inputs[part].mT
            for some in _data.slices(height, max(1, min(height, rows))):
                vectors = self.vectors[part, :, :, some]
                shape = (*vectors.shape[:4], width)
                buffer = buffer.resize_(math.prod(shape))
                torch.matmul(vectors.flatten(2, 3), inputs, out=buffer.view(*shape[:2], -1, width))
                yield part, some, buffer.view(shape)

    def second_moment(self) -> Tensor:
        r"""Equation (2): :math:`\sum_n \sum_v Z_{vn}^2`, as ``[G, o, i]``; the weights are in the vectors."""
        if self._factored:
            vectors, inputs = self.vectors[..., 0].square().sum(2), self.inputs[..., 0].square()
            return torch.einsum("ngo,ngi->goi", vectors, inputs)
        total = self.inputs.new_zeros(self.shape)
        for _, some, projected in self._pieces():
            total[:, some] += projected.square_().sum((0, 2))
        return total

    def covariances(self, scales: Tensor) -> Tensor:
        r"""Equation (4) for one block and a grid of posteriors, :math:`Z^\top \mathrm{diag}(h) Z`, ``[R, N, V, V]``.

        Args:
            scales: ``h: [R, G, o, i]``, non-negative.
        """
        n, n_vectors = len(self.inputs), self.vectors.shape[2]
        if self._factored:
            weights = torch.einsum("ngi,rgoi->rngo", self.inputs[..., 0].square(), scales)
            vectors = self.vectors[..., 0].transpose(1, 2)  # [N, V, G, o]
            return (vectors * weights[:, :, None]).flatten(3) @ vectors.flatten(2).mT
        covariances = scales.new_zeros(len(scales), n, n_vectors, n_vectors)
        roots = scales.sqrt()[:, :, None]
        for part, some, projected in self._pieces():
            for covariance, root in zip(covariances, roots, strict=True):
                own = root[:, :, some]
                weighted = (projected * own if len(roots) > 1 else projected.mul_(own)).flatten(3)
                covariance[part] += (weighted @ weighted.mT).sum(1)
        return covariances

    def variances(self, scales: Tensor) -> Tensor:
        r"""Diagonals of equation (4) for a grid of posteriors, ``[R, N, V]``.

        Args:
            scales: ``[R, G, o, i]``.
        """
        if self._factored:
            weights = torch.einsum("ngi,rgoi->rngo", self.inputs[..., 0].square(), scales)
            return torch.einsum("ngvo,rngo->rnv", self.vectors[..., 0].square(), weights)
        variances = scales.new_zeros(len(scales), len(self.inputs), self.vectors.shape[2])
        for part, some, projected in self._pieces():
            squares, own = projected.square_().flatten(3), scales[:, :, some].flatten(2)
            variances[:, part] += torch.einsum("ngvk,rgk->rnv", squares, own)
        return variances

    def rows(self) -> Tensor:
        """The projected gradients themselves, ``[N, V, G * o * i]``."""
        if self._factored:
            return torch.einsum("ngvo,ngi->nvgoi", self.vectors[..., 0], self.inputs[..., 0]).flatten(2)
        n, _, n_vectors, *_ = self.vectors.shape
        rows = self.inputs.new_empty(n, n_vectors, *self.shape)
        for part, some, projected in self._pieces():
            rows[part, :, :, some] = projected.transpose(1, 2)
        return rows.flatten(2)


def _rotate(rotation: Tensor, columns: Tensor) -> Tensor:
    """``Q^T c`` for ``Q: [G, P, p]`` and ``c: [N, G, V, P, S]``, as ``[N, G, V, p, S]``."""
    if columns.shape[-1] > 1:
        return rotation.mT[:, None] @ columns
    # One position: a single product of matrices instead of a product with a vector for every datum.
    rows = columns[..., 0].transpose(0, 1)  # [G, N, V, P]
    return (rows.flatten(1, 2) @ rotation).unflatten(1, rows.shape[1:3]).transpose(0, 1)[..., None]


@dataclass(frozen=True)
class Basis:
    """Direct sum of the blocks' bases: the orthonormal columns of U, ``[D, rank]``.

    Attributes:
        blocks: What the blocks are.
        shapes: Shapes of the parameters by name, in the order of the parameter vector.
        parts: The blocks' bases.
    """

    blocks: Sequence[Block]
    shapes: dict[str, torch.Size]
    parts: Sequence[KroneckerBasis]

    @cached_property
    def sizes(self) -> list[int]:
        """Columns of every block."""
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
        """Coefficients ``[..., rank]`` of every block as ``[..., G, o, i]``."""
        parts = coefficients.split(self.sizes, -1)
        return [c.unflatten(-1, part.shape) for c, part in zip(parts, self.parts, strict=True)]

    @staticmethod
    def join(coefficients: Sequence[Tensor]) -> Tensor:
        """Inverse of :meth:`split`."""
        return torch.cat([c.flatten(-3) for c in coefficients], -1)

    def project(self, vector: Tensor) -> Tensor:
        r""":math:`U^\top v`, ``[..., D] -> [..., rank]``."""
        parameters = unflatten(vector, self.shapes)
        return self.join(
            [part.project(block.gather(parameters)) for block, part in zip(self.blocks, self.parts, strict=True)]
        )

    def lift(self, coefficients: Tensor) -> Tensor:
        r""":math:`U c`, ``[..., rank] -> [..., D]``."""
        parameters: dict[str, Tensor] = {}
        for block, part, c in zip(self.blocks, self.parts, self.split(coefficients), strict=True):
            parameters.update(block.scatter(part.lift(c)))
        return flatten(parameters, self.shapes)

    def per_column(self, per_block: Tensor) -> Tensor:
        """One number, or one for each block, for every column: ``[1 or n_blocks] -> [rank]``."""
        sizes = torch.tensor(self.sizes, device=per_block.device)
        return per_block.expand(len(self.parts)).repeat_interleave(sizes)

    def per_parameter(self, per_block: Tensor) -> Tensor:
        """One number, or one for each block, for every parameter: ``[1 or n_blocks] -> [D]``."""
        values = per_block.expand(len(self.parts))
        return flatten(
            {
                name: value.expand(shape)
                for block, value in zip(self.blocks, values, strict=True)
                for name, shape in zip(block.parameters, block.shapes, strict=True)
            },
            self.shapes,
        )
