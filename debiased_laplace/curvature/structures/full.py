"""Dense curvature, for small networks and as the gold reference of the other structures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace._ranks import current
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.block_gradients import block_gradients
from debiased_laplace.curvature.decomposition import eigh
from debiased_laplace.curvature.parts.dense import DenseBasis
from debiased_laplace.curvature.structures.base import Decomposed, Held, Structure, group_blocks
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network


@dataclass(frozen=True)
class FullStatistics:
    """The curvature matrix itself.

    Attributes:
        matrices: Of every group of blocks, ``[size, size]``, float64, uncertain parameters block after block.
        groups: Positions of the blocks of every group.
        free: For every group, which of its parameters are uncertain.
    """

    matrices: list[Tensor]
    groups: list[tuple[int, ...]]
    free: list[Tensor]

    exact: ClassVar[bool] = True

    def __add__(self, other: FullStatistics) -> FullStatistics:
        """Statistics of both data together."""
        return FullStatistics(
            [a + b for a, b in zip(self.matrices, other.matrices, strict=True)], self.groups, self.free
        )

    def __mul__(self, factor: float) -> FullStatistics:
        """Statistics of the same data with weights that are multiplied by a factor."""
        return FullStatistics([factor * matrix for matrix in self.matrices], self.groups, self.free)

    def all_reduce(self) -> FullStatistics:
        """Sum over all processes that work together; each weighs its data for all of them."""
        return FullStatistics([current().sum(matrix) for matrix in self.matrices], self.groups, self.free)

    def curvatures(self, basis: Basis) -> Tensor:
        r""":math:`\mathrm{diag}(U^\top G U)`, ``[rank]``."""
        values = []
        for part, matrix, free in zip(basis.parts, self.matrices, self.free, strict=True):
            columns = part.transposed()[:, free]
            # A quadratic form of a positive semi-definite matrix: below zero only by rounding.
            values.append(((columns @ matrix) * columns).sum(1).clamp_min(0))
        return basis.join(values)


@dataclass(frozen=True)
class Full(Structure):
    """The dense structure, exact for its blocks.

    Memory is ``16 D^2`` bytes for the matrix and its eigenvectors, about ``60 D^2`` while four folds are cross-fitted;
    the decomposition costs ``D^3``.

    Attributes:
        blocks: None for one matrix over all parameters, ``"layer"`` for one for each block, or groups of patterns of
            parameter names.
        max_params: Largest size of one matrix; an error above it.
    """

    blocks: str | Sequence[Sequence[str]] | None = None
    max_params: int = 15_000

    def held(self, network: Network) -> Held:
        """Matrices and their eigenvectors in double precision; a decomposition takes about four of the largest."""
        double = torch.finfo(torch.float64).bits // torch.finfo(network.dtype).bits
        groups = group_blocks(network, self.blocks)
        sizes = [double * sum(network.blocks[i].size for i in group) ** 2 for group in groups]
        return Held(statistics=sum(sizes), basis=sum(sizes), workspace=4 * max(sizes))

    def decomposed(self, network: Network, n_columns: int) -> Decomposed:
        """The matrices."""
        groups = group_blocks(network, self.blocks)
        return Decomposed(each=[sum(network.blocks[i].size for i in group) for group in groups])

    def measure(self, network: Network, data: CurvatureData) -> FullStatistics:
        """The matrix, in one pass."""
        groups = group_blocks(network, self.blocks)
        entries = [network.free_entries(block) for block in network.blocks]
        masks = [
            torch.ones(block.size, dtype=torch.bool, device=network.device) if mask is None else mask.flatten()
            for mask, block in zip(entries, network.blocks, strict=True)
        ]
        free = [torch.cat([masks[i] for i in group]) for group in groups]
        chosen = [mask.nonzero()[:, 0] for mask in free]  # once: whoever uses a mask waits for the device
        sizes = [len(index) for index in chosen]
        if max(sizes) > self.max_params:
            raise ValueError(
                f"Expected at most {self.max_params} parameters for a dense matrix, got {max(sizes)}: it would take "
                f"{16e-9 * max(sizes) ** 2:.1f} GB. Use another structure, Full(blocks='layer'), a subset of the "
                "parameters, or raise max_params."
            )
        matrices = [torch.zeros(size, size, device=network.device, dtype=torch.float64) for size in sizes]
        for chunk in data:
            inputs = [chunk.factors.inputs(block) for block in network.blocks]
            for _, vectors in chunk.factors.backpropagate(chunk.vectors):
                for matrix, group, index in zip(matrices, groups, chosen, strict=True):
                    rows = torch.cat([block_gradients(inputs[i], vectors[i]).rows().flatten(0, 1) for i in group], 1)
                    rows = rows[:, index].double()
                    matrix.addmm_(rows.mT, rows)
        for matrix, group in zip(matrices, groups, strict=True):
            names = ", ".join(repr(network.blocks[i].name) for i in group)
            _checks.finite(matrix, f"the curvature of {names}", "Look for NaN in the data, or for an overflow.")
        return FullStatistics(matrices, groups, free)

    def statistics_of(self, network: Network, basis: Basis, curvatures: Tensor) -> FullStatistics:
        r"""The matrices :math:`U \mathrm{diag}(\lambda) U^\top`."""
        matrices, masks = [], []
        for part, members, values in zip(basis.parts, basis.members, basis.split(curvatures), strict=True):
            entries = [network.free_entries(network.blocks[i]) for i in members]
            sizes = [network.blocks[i].size for i in members]
            masks.append(
                torch.cat([
                    torch.ones(size, dtype=torch.bool, device=network.device) if free is None else free.flatten()
                    for free, size in zip(entries, sizes, strict=True)
                ])
            )  # fmt: skip
            columns = part.transposed()[:, masks[-1]].double()
            matrices.append((columns.mT * values.double()) @ columns)
        return FullStatistics(matrices, list(basis.members), masks)

    def traces(self, statistics: FullStatistics) -> Tensor:
        """Also of parameters that are fixed, which have no curvature."""
        return torch.stack([matrix.trace() for matrix in statistics.matrices])

    def eigenbasis(self, network: Network, statistics: FullStatistics, like: Basis | None = None) -> Basis:
        """Eigenvectors of the matrices, by descending eigenvalues, in float64."""
        parts = []
        for group, matrix, free in zip(statistics.groups, statistics.matrices, statistics.free, strict=True):
            blocks = [network.blocks[i] for i in group]
            _, vectors = eigh(matrix, ", ".join(block.name for block in blocks))
            rows = vectors.new_zeros(len(matrix), len(free))
            rows[:, free] = vectors.mT
            columns = rows.split([block.size for block in blocks], 1)
            parts.append(
                DenseBasis(
                    tuple(
                        of_block.unflatten(1, block.matrix_shape).contiguous()
                        for of_block, block in zip(columns, blocks, strict=True)
                    )
                )
            )
        return Basis(network.blocks, network.shapes, parts, statistics.groups)
