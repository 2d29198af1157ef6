r"""K-FAC: Kronecker-factored statistics and their eigenbasis.

For every block and group, with a and g as in :mod:`debiased_laplace.network.gradients` at one position,

.. math::
    A = \sum_n w_n a_n a_n^\top, \qquad B = \sum_n w_n \sum_v g_{nv} g_{nv}^\top, \qquad
    G \approx A \otimes B, \qquad U = Q_A \otimes Q_B.

What becomes of several positions is in :mod:`debiased_laplace.curvature.sharing`.
Where a block's kind (:mod:`debiased_laplace.network.kinds`) has unit vectors in the place of eigenvectors, a factor is
its diagonal: A of an embedding, which is one, and both of a diagonal block.

Source: Martens and Grosse (arXiv 1503.05671); for convolutions Grosse and Martens (arXiv 1602.01407).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from debiased_laplace._checks import NonFiniteError
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.parts.identity import IdentityBasis
from debiased_laplace.curvature.parts.kronecker import KroneckerBasis
from debiased_laplace.curvature.parts.output import OutputBasis
from debiased_laplace.curvature.parts.part import Part
from debiased_laplace.curvature.sharing import Expand, WeightSharing
from debiased_laplace.curvature.structures.base import Structure, eigh
from debiased_laplace.network.blocks import Block
from debiased_laplace.network.factors import Factors
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.kinds import DIAGONAL, Kind
from debiased_laplace.network.network import Network
from debiased_laplace.network.selected import LayerInputs, second_moments
from debiased_laplace.network.selection import matching


@dataclass(frozen=True)
class KroneckerStatistics:
    """Additive statistics; sums over data, so that weights of one mean sum to one over all parts.

    Attributes:
        inputs: A of every block, ``[G, I, I]``, or its diagonal ``[G, I]``.
        outputs: B of every block, ``[G, O, O]``, or its diagonal ``[G, O]``.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]

    exact: ClassVar[bool] = False

    def __add__(self, other: KroneckerStatistics) -> KroneckerStatistics:
        """Statistics of both data together."""
        return KroneckerStatistics(
            [a + b for a, b in zip(self.inputs, other.inputs, strict=True)],
            [a + b for a, b in zip(self.outputs, other.outputs, strict=True)],
        )

    def __mul__(self, factor: float) -> KroneckerStatistics:
        """Statistics of the same data with weights that are multiplied by a factor."""
        return KroneckerStatistics([factor * a for a in self.inputs], [factor * b for b in self.outputs])

    def all_reduce(self) -> KroneckerStatistics:
        """Sum over the processes of ``torch.distributed``; each process weighs its data for all of them."""
        reduced = KroneckerStatistics([a.clone() for a in self.inputs], [b.clone() for b in self.outputs])
        for tensor in reduced.inputs + reduced.outputs:
            torch.distributed.all_reduce(tensor)
        return reduced

    def curvatures(self, basis: Basis) -> Tensor:
        r"""The factored estimate, :math:`\mathrm{diag}(Q_B^\top B Q_B) \otimes \mathrm{diag}(Q_A^\top A Q_A)`.

        With the statistics that gave the basis this is classical K-FAC.

        Returns:
            ``[rank]``, a per-datum mean.
        """
        factors = zip(basis.parts, self.inputs, self.outputs, strict=True)
        return basis.join([part.factored_curvatures(a, b) for part, a, b in factors])


@dataclass(frozen=True)
class InputStatistics:
    """Input statistics of all data of a stream: no loss is in them, so that they need neither weights nor vectors.

    Attributes:
        totals: Sum of the outer products of every block, ``[G, I, I]``, or their diagonals ``[G, I]``.
        count: Number of data in the sums.
    """

    totals: list[Tensor]
    count: int

    def __add__(self, other: InputStatistics) -> InputStatistics:
        """Of both data together."""
        totals = [a + b for a, b in zip(self.totals, other.totals, strict=True)]
        return InputStatistics(totals, self.count + other.count)


@dataclass(frozen=True)
class Kronecker(Structure):
    """The K-FAC structure.

    Example:
        >>> import debiased_laplace as dl
        >>> dl.Kronecker(sharing=dl.Reduce()).sharing
        Reduce()

    Attributes:
        eigh_dtype: Precision of the eigendecompositions; single precision is faster and less safe.
        diagonal: Parameters or modules, by name or pattern (:mod:`fnmatch`), whose blocks have a diagonal curvature
            instead: their parameters themselves are the directions.
        sharing: What becomes of the positions at which a layer uses its weight: :class:`.Expand` or :class:`.Reduce`.
    """

    eigh_dtype: torch.dtype = torch.float64
    diagonal: Sequence[str] = ()
    sharing: WeightSharing = field(default_factory=Expand)

    observes: ClassVar[bool] = True

    def observe(self, network: Network, factors: Factors, part: slice, phase: int | None = None) -> InputStatistics:
        """Outer products of the inputs, of every block; a phase is for blocks of which it tells enough."""
        totals = []
        for block, kind in zip(network.blocks, self._kinds(network), strict=True):
            total = _zeros(network, block.groups, block.inputs, square=kind.rotates_inputs)
            mask = factors.has_gradient(block)
            coarse = mask is None and self.sharing.samples_positions
            for piece, columns in factors.input_pieces(block, part, phase if coarse else None):
                total += _of_inputs(self.sharing.inputs(columns, None if mask is None else mask[piece]), kind)
            totals.append(total)
        return InputStatistics(totals, part.stop - part.start)

    def complete(self, statistics: KroneckerStatistics, observed: InputStatistics) -> KroneckerStatistics:
        """A of the whole stream in the place of that of a sample."""
        return KroneckerStatistics([total / observed.count for total in observed.totals], statistics.outputs)

    def measure(self, network: Network, data: CurvatureData) -> KroneckerStatistics:
        """Statistics of weighted data, in one pass.

        Args:
            network: The model with its blocks.
            data: Factors of consecutive chunks of data, with their weights and output vectors.
        """
        if network.free is not None:
            raise ValueError(
                "Expected whole parameters for a Kronecker structure, got single entries of them. Choose them by name, "
                "or use a diagonal, low-rank or full structure."
            )
        kinds = self._kinds(network)
        inputs, outputs = [], []
        for block, kind in zip(network.blocks, kinds, strict=True):
            inputs.append(_zeros(network, block.groups, block.inputs, square=kind.rotates_inputs))
            outputs.append(_zeros(network, block.groups, block.outputs, square=kind.rotates_outputs))
        for chunk in data:
            masks = [chunk.factors.has_gradient(block) for block in network.blocks]
            for block, total, kind, mask in zip(network.blocks, inputs, kinds, masks, strict=True):
                for part, columns in chunk.factors.input_pieces(block):
                    columns = self.sharing.inputs(columns, None if mask is None else mask[part])
                    total += _of_inputs(columns, kind, chunk.weights[part])
            for _, vectors in chunk.factors.backpropagate(chunk.vectors, network.vector_chunk):
                for total, kind, columns, mask in zip(outputs, kinds, vectors, masks, strict=True):
                    for column in columns.unbind(2):
                        column, factor = self.sharing.vectors(column, mask)
                        products = _gram(column) if kind.rotates_outputs else second_moments(column)
                        total.add_(products, alpha=factor)
                del vectors, columns, column  # so that the next ones find their memory free
        for what, totals in (("input", inputs), ("back-propagated gradient", outputs)):
            for block, total in zip(network.blocks, totals, strict=True):
                if not bool(total.isfinite().all()):
                    raise NonFiniteError(
                        f"Expected finite {what}s at the layer {block.name!r}, got NaN or infinity. "
                        "Look for NaN in the data, or for an overflow in that layer (a half-precision model?)."
                    )
        return KroneckerStatistics(inputs, outputs)

    def eigenbasis(self, network: Network, statistics: KroneckerStatistics, like: Basis | None = None) -> Basis:
        """Eigenvectors of the factors of every block, by descending eigenvalues."""
        factors = zip(network.blocks, self._kinds(network), statistics.inputs, statistics.outputs, strict=True)
        parts = [self._part(block, kind, a, b) for block, kind, a, b in factors]
        return Basis(network.blocks, network.shapes, parts)

    def _part(self, block: Block, kind: Kind, inputs: Tensor, outputs: Tensor) -> Part:
        if not kind.rotates_outputs:
            return IdentityBasis(*block.matrix_shape)
        by_outputs = self._eigenvectors(outputs, block.name)
        if not kind.rotates_inputs:
            return OutputBasis(by_outputs, block.inputs)
        return KroneckerBasis(by_outputs, self._eigenvectors(inputs, block.name))

    def _kinds(self, network: Network) -> list[Kind]:
        """The curvature of every block: what its layer calls for, or a diagonal where that is asked for."""
        if not self.diagonal:
            return [block.kind for block in network.blocks]
        declared = set(matching(network.shapes, self.diagonal, network.snapshot.aliases))
        for block in network.blocks:
            if 0 < len(declared.intersection(block.parameters)) < len(block.parameters):
                raise ValueError(
                    f"Expected the parameters {list(block.parameters)}, which share a curvature block, in diagonal="
                    f"{list(self.diagonal)} together, got some of them. Name the module, or use separate_bias=True."
                )
        return [DIAGONAL if declared.issuperset(block.parameters) else block.kind for block in network.blocks]

    def unfactored(self, network: Network) -> list[str]:
        """Those of blocks that neither have factors nor are small, and were not asked to be diagonal."""
        declared = matching(network.shapes, self.diagonal, network.snapshot.aliases) if self.diagonal else []
        diagonal = [block for block in network.blocks if block.kind == DIAGONAL]
        return [name for block in diagonal for name in block.parameters if name not in declared]

    def _eigenvectors(self, matrices: Tensor, name: str) -> Tensor:
        _, vectors = eigh(matrices.to(self.eigh_dtype), name)
        # Dead units leave entries that are noise of the decomposition. Dropping them moves a vector by less than
        # a tenth of its rounding error; kept, their products underflow and slow every contraction tenfold.
        negligible = 0.1 * torch.finfo(matrices.dtype).eps / matrices.shape[-1] ** 0.5
        return torch.where(vectors.abs() < negligible, 0.0, vectors).to(matrices)


def _zeros(network: Network, groups: int, size: int, *, square: bool) -> Tensor:
    """Of a factor, or of its diagonal."""
    shape = (groups, size, size) if square else (groups, size)
    return torch.zeros(shape, device=network.device, dtype=network.dtype)


def _of_inputs(columns: LayerInputs, kind: Kind, weights: Tensor | None = None) -> Tensor:
    """A of some data, ``[G, I, I]`` or its diagonal ``[G, I]``, with a weight for every datum if they are given."""
    if not kind.rotates_inputs:
        return second_moments(columns, weights)
    assert isinstance(columns, Tensor)  # others have the diagonal alone
    if weights is None:
        return _gram(columns)
    if bool((weights == weights[0]).all()):  # known on the CPU: no product with the data
        return _gram(columns) * float(weights[0])
    return _gram(columns * weights.to(columns).sqrt()[:, None, None, None])


def _gram(columns: Tensor) -> Tensor:
    """``[N, G, P, S] -> [G, P, P]``, sums of outer products over data and positions."""
    if columns.shape[-1] > 64 * columns.shape[2]:  # few features, many positions: rather small products than a copy
        return (columns @ columns.mT).sum(0)
    flat = columns.permute(1, 2, 0, 3).flatten(2)
    return flat @ flat.mT
