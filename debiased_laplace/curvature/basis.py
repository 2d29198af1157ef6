r"""Orthonormal bases of parameter space, as direct sums of parts: :math:`U = \bigoplus_p U_p`.

A part spans one block (Kronecker, identity) or several together (dense). Parameter vectors are ``[..., D]``,
in the order of ``model.named_parameters()``. Coefficients are ``[..., rank]``, part after part. A basis may
be incomplete (fewer columns than rows); then the complement is orthogonal to every column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.curvature.parts.part import MixedPriorsError, Part, Projected
from debiased_laplace.curvature.parts.streamed import Streamed
from debiased_laplace.network.blocks import Block, flatten, unflatten
from debiased_laplace.network.selected import LayerInputs


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

    @property
    def at_rest(self) -> Sequence[Part]:
        """The parts where they lie, to be looked at and not to be computed with."""
        return self.parts.at_rest if isinstance(self.parts, Streamed) else self.parts

    def offloaded(self, places: Sequence[torch.device], device: torch.device) -> Basis:
        """The same directions with their parts on some devices, from where one after the other comes to another one."""
        return replace(self, parts=Streamed(self.at_rest, places, device))

    @cached_property
    def sizes(self) -> list[int]:
        """Columns of every part."""
        return [part.rank for part in self.at_rest]

    @cached_property
    def _part_shapes(self) -> list[tuple[int, ...]]:
        return [part.shape for part in self.at_rest]

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
        return [c.unflatten(-1, shape) for c, shape in zip(parts, self._part_shapes, strict=True)]

    def join(self, coefficients: Sequence[Tensor]) -> Tensor:
        """Inverse of :meth:`split`."""
        return torch.cat(
            [c.flatten(c.ndim - len(shape)) for c, shape in zip(coefficients, self._part_shapes, strict=True)], -1
        )

    def averaged(self, values: Tensor) -> Tensor:
        """Values ``[rank]``, averaged over the directions of every eigenspace: then no choice within one matters."""
        return self.join([part.averaged(of_part) for part, of_part in zip(self.parts, self.split(values), strict=True)])

    def project(self, vector: Tensor) -> Tensor:
        r""":math:`U^\top v`, ``[..., D] -> [..., rank]``."""
        matrices = self.matrices(vector)
        return self.join(
            [
                part.project([matrices[i] for i in members])
                for part, members in zip(self.parts, self.members, strict=True)
            ]
        )

    def lift(self, coefficients: Tensor) -> Tensor:
        r""":math:`U c`, ``[..., rank] -> [..., D]``."""
        parameters: dict[str, Tensor] = {}
        for part, members, c in zip(self.parts, self.members, self.split(coefficients), strict=True):
            for index, matrix in zip(members, part.lift(c), strict=True):
                parameters.update(self.blocks[index].scatter(matrix))
        return flatten(parameters, self.shapes)

    def diagonal_of(self, other: Basis, values: Tensor) -> Tensor:
        r"""Of :math:`U' \mathrm{diag}(v) U'^\top`, another basis of the same structure, the diagonal along U."""
        triples = zip(self.parts, other.parts, other.split(values), strict=True)
        return self.join([part.diagonal_of(of_other, v) for part, of_other, v in triples])

    def by_rank(self, other: Basis, values: Tensor) -> Tensor:
        """Values ``[rank']`` along another basis of the same structure: k-th of a part to k-th, or zero."""
        aligned = []
        for part, of_other, v in zip(self.parts, other.parts, other.split(values), strict=True):
            if part.shape != of_other.shape:  # low rank: one number for each direction
                v = torch.nn.functional.pad(v[: part.rank], (0, max(0, part.rank - of_other.rank)))
            aligned.append(v)
        return self.join(aligned)

    def prepare_inputs(self, inputs: Sequence[LayerInputs], n_vectors: int) -> list[Any]:
        """What can be done once with the inputs of all blocks for all vectors of a batch."""
        return [
            part.prepare_inputs([inputs[i] for i in members], n_vectors)
            for part, members in zip(self.parts, self.members, strict=True)
        ]

    def project_gradients(self, inputs: Sequence[Any], vectors: Sequence[Tensor]) -> Iterator[Projected]:
        r""":math:`Z_n`, part after part."""
        for part, members, prepared in zip(self.parts, self.members, inputs, strict=True):
            yield part.project_gradients(prepared, [vectors[i] for i in members])

    def per_column(self, values: Tensor) -> Tensor:
        """A prior precision for every column: ``[1]``, one for each part, or ``[D] -> [rank]``.

        Raises:
            ValueError: If the values ``[D]`` differ within a part whose directions mix parameters.
        """
        if len(values) not in (1, len(self.parts)):
            return self._column_values(values)
        sizes = torch.tensor(self.sizes, device=values.device)
        return values.expand(len(self.parts)).repeat_interleave(sizes, output_size=self.rank)

    def per_parameter(self, values: Tensor) -> Tensor:
        """The same for every parameter, ``[D]``."""
        if len(values) not in (1, len(self.parts)):
            return values
        parameters = {
            name: value.expand(shape)
            for members, value in zip(self.members, values.expand(len(self.parts)), strict=True)
            for index in members
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
            try:
                columns.append(part.column_priors([matrices[i] for i in members]))
            except MixedPriorsError as error:
                names = [name for i in members for name in self.blocks[i].parameters]
                raise ValueError(
                    f"Expected one prior precision for all of {names}, whose directions mix them, got several. Give "
                    "one for each line of coverage(), or use a diagonal structure."
                ) from error
        return self.join(columns)
