r"""ViViT: the leading eigenvectors of the curvature, through its Gram matrix.

With the columns of V the weighted vectors :math:`\sqrt{w_n} J_n^\top s_{nv}`, the curvature is
:math:`G = V V^\top` and the Gram matrix :math:`V^\top V`, ``[N V, N V]``, has the same eigenvalues except
for zeros. From its eigenvectors :math:`\tilde e_k`, :math:`e_k = V \tilde e_k / \sqrt{\lambda_k}`.
V itself, ``[D, N V]``, is never held: its columns stay gradient factors of every block, or are formed where that
takes less memory, and the Gram matrix is summed block after block.

Source: Dangel, Tatzel, Hennig (arXiv 2106.02624), section 3.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace._ranks import current
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.block_gradients import BlockGradients, block_gradients, gram
from debiased_laplace.curvature.decomposition import eigh
from debiased_laplace.curvature.parts.dense import DenseBasis
from debiased_laplace.curvature.structures.base import Decomposed, Structure, eigenspaces, group_blocks, resolution
from debiased_laplace.curvature.structures.lanczos import largest_eigenpairs
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network

logger = logging.getLogger(__name__)

#: Size above which a few eigenpairs come from :func:`.largest_eigenpairs` instead of a whole decomposition (CPU).
LANCZOS_SIZE = 1000

#: Size above which the Gram matrix is not formed either: its products with vectors are those of the factors.
MATRIX_FREE_SIZE = 5000


@dataclass(frozen=True)
class LowRankStatistics:
    """The columns of V, as factors.

    Memory: for each datum and block the smaller of ``S (V O + I)`` numbers (the factors) and ``V O I``.

    Attributes:
        columns: For every block, chunks of data with their gradients.
        groups: Positions of the blocks that share directions.
    """

    columns: list[list[BlockGradients]]
    groups: list[tuple[int, ...]]

    exact: ClassVar[bool] = True

    def __add__(self, other: LowRankStatistics) -> LowRankStatistics:
        """Statistics of both data together: the columns of both."""
        return LowRankStatistics([a + b for a, b in zip(self.columns, other.columns, strict=True)], self.groups)

    def __mul__(self, factor: float) -> LowRankStatistics:
        """Statistics of the same data with weights that are multiplied by a factor."""
        return LowRankStatistics([[g.scaled(factor**0.5) for g in of_block] for of_block in self.columns], self.groups)

    def all_reduce(self) -> LowRankStatistics:
        """The columns of all processes that work together; each weighs its data for all of them."""
        first, *others = current().gather(self, self.columns[0][0].device if self.columns[0] else None)
        for other in others:
            first = first + other
        return first

    @property
    def size(self) -> int:
        """Number of columns, N V."""
        return sum(len(g) * g.n_vectors for g in self.columns[0])

    def gram(self, group: tuple[int, ...] | None = None) -> Tensor:
        """Gram matrix of some blocks (all by default), ``[N V, N V]``, float64."""
        blocks = group if group is not None else range(len(self.columns))
        total: Tensor | None = None
        for index in blocks:
            of_block = gram(self.columns[index]).double()
            total = of_block if total is None else total.add_(of_block)
        assert total is not None
        return total

    def combine(self, index: int, coefficients: Tensor) -> Tensor:
        """Combinations of the columns in one block, ``[k, N V] -> [k, G * O * I]``, float64."""
        total: Tensor | None = None
        start = 0
        for g in self.columns[index]:
            size = len(g) * g.n_vectors
            c = coefficients[:, start : start + size].unflatten(1, (len(g), g.n_vectors))
            combined = g.combine(c.to(g.device, g.dtype)).double().flatten(1)
            total = combined if total is None else total.add_(combined)
            start += size
        assert total is not None
        return total

    def multiply(self, index: int, matrices: Tensor) -> Tensor:
        """Inner products of the columns with matrices in one block, ``[k, G, O, I] -> [k, N V]``, float64."""
        products = [g.project(matrices.to(g.device, g.dtype)).flatten(0, 1) for g in self.columns[index]]
        return torch.cat(products).mT.double()

    def project(self, basis: Basis) -> list[Tensor]:
        r""":math:`U_p^\top V` for every part, ``[N V, rank]``."""
        projected = []
        for part, group in zip(basis.parts, self.groups, strict=True):
            chunks = zip(*[self.columns[i] for i in group], strict=True)
            rows = [part.project_formed(chunk).rows() for chunk in chunks]
            projected.append(torch.cat([r.flatten(0, 1) for r in rows]))
        return projected

    def curvatures(self, basis: Basis) -> Tensor:
        r""":math:`\mathrm{diag}(U^\top V V^\top U)`, ``[rank]``."""
        return torch.cat([rows.square().sum(0) for rows in self.project(basis)])


@dataclass(frozen=True)
class LowRank(Structure):
    """The low-rank structure.

    Time: with n directions' data and V vectors, the Gram matrix of every block, and the eigenvectors of an
    ``n V`` matrix. ``mc_samples=1`` makes it V times smaller; ``TwoBatch(folds=8, directions=1)`` chooses the
    directions from an eighth of the data and measures the curvature on the rest (curvature sub-sampling).

    A repeated eigenvalue (with C outputs, regression repeats every one that a linear last layer has C times) keeps all
    of its directions or none, since which ones would be arbitrary: where the rank cuts it, it is left out, unless it is
    the largest, which is kept as a whole; a fraction of the trace keeps it. The log says so.

    Attributes:
        rank: Largest number of directions of every part (see above), or the fraction, in (0, 1), of the trace of the
            *first* data's curvature that they have to explain.
        blocks: None for directions across all layers, which see the curvature between layers; ``"layer"`` for
            directions of every block on its own; or groups of patterns of parameter names.
    """

    rank: int | float = 20
    blocks: str | Sequence[Sequence[str]] | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1
        if not whole and not (isinstance(self.rank, float) and 0 < self.rank < 1):
            raise ValueError(
                f"Expected rank to be a positive number of directions, or a fraction of the trace in (0, 1), got "
                f"{self.rank!r}."
            )

    def decomposed(self, network: Network, n_columns: int) -> Decomposed:
        """Gram matrices; of large ones only a few eigenpairs are computed."""
        return Decomposed(each=[min(n_columns, LANCZOS_SIZE)] * len(group_blocks(network, self.blocks)))

    def measure(self, network: Network, data: CurvatureData) -> LowRankStatistics:
        """The columns of V, in one pass."""
        columns: list[list[BlockGradients]] = [[] for _ in network.blocks]
        entries = [network.free_entries(block) for block in network.blocks]
        for chunk in data.for_all_vectors():
            vectors = chunk.factors.backpropagate_all(chunk.vectors)
            for index, block in enumerate(network.blocks):
                g = vectors[index]
                vectors[index] = g.new_empty(0)
                gradients = block_gradients(chunk.factors.inputs(block), g)
                free = entries[index]
                columns[index].append(gradients.compact() if free is None else gradients.masked(free))
        return LowRankStatistics(columns, group_blocks(network, self.blocks))

    def traces(self, statistics: LowRankStatistics) -> Tensor:
        """Sums of the squares of the columns of V, float64."""
        blocks = [torch.stack([g.second_moment().double().sum() for g in chunks]) for chunks in statistics.columns]
        return torch.stack([torch.cat([blocks[i] for i in group]).sum() for group in statistics.groups])

    def eigenbasis(self, network: Network, statistics: LowRankStatistics, like: Basis | None = None) -> Basis:
        """The leading eigenvectors of every part, by descending eigenvalues; fewer if the curvature has lower rank."""
        parts = []
        precision = torch.finfo(network.dtype).eps
        ranks = [self.rank] * len(statistics.groups) if like is None else [part.rank for part in like.parts]
        for group, rank in zip(statistics.groups, ranks, strict=True):
            name = ", ".join(network.blocks[i].name for i in group)
            values, vectors = whole_eigenspaces(statistics, group, rank, name, precision, at_least=like is not None)
            columns = lift_eigenvectors(network, statistics, group, values, vectors)
            parts.append(DenseBasis(columns, eigenspaces(values, precision)))
        return Basis(network.blocks, network.shapes, parts, statistics.groups)


def whole_eigenspaces(
    statistics: LowRankStatistics, group: tuple[int, ...], rank: int | float, name: str, precision: float, *,
    at_least: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The largest eigenvalues ``[K]`` and eigenvectors ``[N V, K]``; of repeated ones all or none.

    Args:
        statistics: The columns of V.
        group: Positions of the blocks of a part.
        rank: K, or a fraction of the trace.
        name: For errors and the log.
        precision: Relative precision of the columns.
        at_least: Keep what the rank cuts, as a fraction always does; otherwise only the largest eigenvalue.
    """
    wanted = rank + 1 if isinstance(rank, int) else rank  # the next one tells whether the last is cut
    while True:
        values, vectors, total = known_eigenpairs(statistics, group, wanted, name, precision)
        last = rank if isinstance(rank, int) else int((values.cumsum(0) / total < rank).sum()) + 1
        if last >= len(values):
            return values, vectors
        width = resolution(precision) * float(values[0])
        first = int((values - values[last] > width).sum())  # of the eigenspace of the next
        if first >= last:
            return values[:last], vectors[:, :last]
        kept = int((values[first] - values <= width).sum()) + first
        if first and isinstance(rank, int) and not at_least:
            kept = first
        elif isinstance(wanted, int) and kept == len(values) >= wanted < statistics.size:  # not all of it is known
            wanted = min(2 * wanted, statistics.size)
            continue
        logger.info(
            "A rank of %s cuts a repeated eigenvalue of the curvature of %s on the data that choose directions: there "
            "are %d directions, with %s of its own.", rank, name, kept, "none" if kept == first else "all",
        )  # fmt: skip
        return values[:kept], vectors[:, :kept]


def known_eigenpairs(
    statistics: LowRankStatistics, group: tuple[int, ...], rank: int | float, name: str, precision: float
) -> tuple[Tensor, Tensor, float]:
    """The largest eigenvalues and eigenvectors of a Gram matrix, at least a rank of them (all for a fraction).

    Returns:
        ``[K]`` and ``[N V, K]``, without those that are rounding, and the sum of all that were computed.
    """
    if isinstance(rank, int) and statistics.size > max(MATRIX_FREE_SIZE, 20 * rank):
        values, vectors = matrix_free_eigenpairs(statistics, group, rank, name, precision)
    else:
        gram = statistics.gram(group)
        _checks.finite(gram, f"the curvature of {name}", _REMEDY)
        size = len(gram)
        if isinstance(rank, int) and size > LANCZOS_SIZE and rank <= size // 10 and gram.device.type == "cpu":
            values, rows = largest_eigenpairs(gram, size, rank, precision=precision, name=name)
            vectors = rows.mT
        else:
            values, vectors = eigh(gram, name)
    if float(values[0]) <= 0:
        raise ValueError(
            f"The curvature of {name} is zero on the data that choose the directions, so there are none. Give more "
            "data."
        )
    keep = is_nonzero(values, statistics.size, precision)
    return values[keep], vectors[:, keep], float(values.sum())


def is_nonzero(values: Tensor, size: int, precision: float) -> Tensor:
    """Which eigenvalues, largest first, of a Gram matrix of a size are more than rounding of entries of a precision."""
    return values > 10 * size**0.5 * precision * values[0]


def matrix_free_eigenpairs(
    statistics: LowRankStatistics, group: tuple[int, ...], rank: int, name: str, precision: float
) -> tuple[Tensor, Tensor]:
    """With products of the factors; memory for the vectors alone (:func:`.largest_eigenpairs`)."""
    size, device = statistics.size, statistics.columns[0][0].device

    def products(rows: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        for index in group:
            total += statistics.multiply(index, statistics.combine(index, rows))
        _checks.finite(total, f"the curvature of {name}", _REMEDY)
        return total

    values, rows = largest_eigenpairs(products, size, rank, precision=precision, name=name, device=device)
    return values, rows.mT


_REMEDY = "Look for NaN in the data, or for an overflow."


def lift_eigenvectors(
    network: Network, statistics: LowRankStatistics, group: tuple[int, ...], values: Tensor, vectors: Tensor
) -> tuple[Tensor, ...]:
    r""":math:`e_k = V \tilde e_k / \sqrt{\lambda_k}` of every block, ``[K, G, O, I]``, orthonormal in float64.

    The Gram matrix has the precision of the factors; what it lacks in orthogonality, a QR decomposition repairs.
    """
    columns = [statistics.combine(index, (vectors / values.sqrt()).mT) for index in group]
    orthonormal, triangular = torch.linalg.qr(torch.cat(columns, 1).mT)
    orthonormal = orthonormal * triangular.diagonal().sign()
    split = orthonormal.mT.split([of_block.shape[1] for of_block in columns], 1)
    lifted = []
    for of_block, block in zip(split, [network.blocks[index] for index in group], strict=True):
        of_block, free = of_block.unflatten(1, block.matrix_shape), network.free_entries(block)
        lifted.append(of_block.contiguous() if free is None else of_block * free)  # what rounding left outside
    return tuple(lifted)
