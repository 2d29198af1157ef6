"""Any orthonormal columns, across one block or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from debiased_laplace.curvature.block_gradients import BlockGradients, block_gradients
from debiased_laplace.curvature.parts.part import DenseProjection, Part, differ
from debiased_laplace.network.blocks import Block
from debiased_laplace.network.selected import LayerInputs


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

    zero_where_fixed: ClassVar[bool] = True
    forms_gradients: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int]:
        """``(rank,)``."""
        return (len(self.columns[0]),)

    @property
    def n_params(self) -> int:
        return sum(math.prod(of_block.shape[1:]) for of_block in self.columns)

    @property
    def dtype(self) -> torch.dtype:
        """Precision."""
        return self.columns[0].dtype

    def transposed(self) -> Tensor:
        return torch.cat([of_block.flatten(1) for of_block in self.columns], 1)

    def describe(self, blocks: Sequence[Block]) -> tuple[str, str]:
        return ("full", f"dense {self.n_params}") if self.complete else ("low rank", f"{self.rank} directions")

    def truncated(self, kept: Callable[[int], int]) -> DenseBasis:
        return DenseBasis(tuple(of_block[: kept(len(of_block))] for of_block in self.columns))

    def averaged(self, values: Tensor) -> Tensor:
        if self.eigenspaces is None:
            return values
        labels = self.eigenspaces.to(values.device)
        totals = values.new_zeros(int(labels[-1]) + 1).index_add(0, labels, values)
        return (totals / labels.bincount())[labels]

    def project(self, matrices: Sequence[Tensor]) -> Tensor:
        total = [m.to(self.dtype).flatten(-3) @ c.flatten(1).mT for m, c in zip(matrices, self.columns, strict=True)]
        return torch.stack(total).sum(0)

    def lift(self, coefficients: Tensor) -> list[Tensor]:
        return [(coefficients.to(self.dtype) @ c.flatten(1)).unflatten(-1, c.shape[1:]) for c in self.columns]

    def diagonal_of(self, other: DenseBasis, values: Tensor) -> Tensor:
        pairs = zip(self.columns, other.columns, strict=True)
        overlaps = torch.stack([c.flatten(1) @ of_other.flatten(1).mT for c, of_other in pairs]).sum(0)
        return overlaps.square() @ values.to(overlaps)

    def is_turned_by(self, priors: Sequence[Tensor], blocks: Sequence[Block]) -> bool:
        """If they differ, or their derivatives do."""
        return priors[0].requires_grad or differ(priors)

    def turned(self, scales: Sequence[Tensor], curvatures: Tensor) -> tuple[DenseBasis, Tensor]:
        weights = curvatures.sqrt()[:, None, None, None]
        rows = torch.cat([(c * scale * weights).flatten(1) for c, scale in zip(self.columns, scales, strict=True)], 1)
        left, values, right = torch.linalg.svd(rows.detach(), full_matrices=False)
        if not self.complete:
            keep = values > values[0] * torch.finfo(values.dtype).eps * max(rows.shape)
            left, right = left[:, keep], right[keep]
        # With fixed left vectors the squares have the derivatives of the eigenvalues, also of degenerate ones.
        squares = (left.mT @ rows).square().sum(1)
        split = right.split([c[0].numel() for c in self.columns], 1)
        columns = tuple(rows.unflatten(1, c.shape[1:]) for rows, c in zip(split, self.columns, strict=True))
        return DenseBasis(columns), squares

    def block_eigenvalues(self, curvatures: Tensor) -> list[Tensor]:
        if len(self.columns) == 1:
            return [curvatures]
        roots = curvatures.sqrt()[:, None]
        return [torch.linalg.svdvals(roots * c.flatten(1).to(roots)).square() for c in self.columns]

    def scaled(self, scales: Sequence[Tensor]) -> DenseBasis:
        return DenseBasis(tuple(c * scale for c, scale in zip(self.columns, scales, strict=True)))

    def weighted_average(self, matrices: Sequence[Tensor]) -> Tensor:
        averages = [c.square().flatten(1).to(m) @ m.flatten() for c, m in zip(self.columns, matrices, strict=True)]
        return torch.stack(averages).sum(0)

    def covariances_of_last_layer(self, inputs: Tensor, scales: Tensor, *, diagonal: bool = False) -> Tensor:
        (columns,) = self.columns
        rows = torch.einsum("ni,koi->nok", inputs.to(self.dtype), columns[:, 0])
        scales = scales.to(self.dtype)
        result = rows.square() @ scales if diagonal else (rows * scales) @ rows.mT
        return result.to(inputs.dtype)

    def project_gradients(
        self, inputs: Sequence[LayerInputs], vectors: Sequence[Tensor], *, unit: bool = False
    ) -> DenseProjection:
        return self.project_formed([block_gradients(a, g) for a, g in zip(inputs, vectors, strict=True)])

    def project_formed(self, gradients: Sequence[BlockGradients]) -> DenseProjection:
        # With several positions the gradients are formed in the precision of the network and then converted: the
        # complement compares two contractions of them, which have to see the same numbers, not more exact ones.
        precise = [g.in_precision(self.dtype) for g in gradients]
        rows = [g.project(of_block) for g, of_block in zip(precise, self.columns, strict=True)]
        return DenseProjection(torch.stack(rows).sum(0), precise)

    def unprojected(
        self, projected: Any, inputs: Sequence[LayerInputs], vectors: Sequence[Tensor]
    ) -> list[BlockGradients]:
        return projected.gradients
