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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace._checks import NonFiniteError
from debiased_laplace._ranks import current
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.moments import MomentSum, SecondMoment, all_reduced, eigenvectors, moment
from debiased_laplace.curvature.parts.identity import IdentityBasis
from debiased_laplace.curvature.parts.kronecker import KroneckerBasis
from debiased_laplace.curvature.parts.output import OutputBasis
from debiased_laplace.curvature.parts.part import Part
from debiased_laplace.curvature.sharing import Expand, WeightSharing
from debiased_laplace.curvature.structures.base import Decomposed, Held, Look, Structure
from debiased_laplace.network.blocks import Block
from debiased_laplace.network.factors import Factors
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.kinds import DIAGONAL, Kind
from debiased_laplace.network.network import Network
from debiased_laplace.network.selected import second_moments
from debiased_laplace.network.selection import matching

#: Positions for every input of a layer that tell A well enough to go on with fewer data: from n positions, the
#: directions of I inputs are off by I / n.
POSITIONS_PER_INPUT = 256


@dataclass(frozen=True)
class KroneckerStatistics:
    """Additive statistics; sums over data, so that weights of one mean sum to one over all parts.

    Attributes:
        of_inputs: A of every block.
        of_outputs: B of every block.
    """

    of_inputs: Sequence[SecondMoment]
    of_outputs: Sequence[SecondMoment]

    exact: ClassVar[bool] = False

    @classmethod
    def of(cls, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> KroneckerStatistics:
        """Of matrices ``[G, P, P]`` or diagonals ``[G, P]``."""
        return cls([moment(a) for a in inputs], [moment(b) for b in outputs])

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of statistics that an earlier version stored, as tensors."""
        if "inputs" not in values:
            return dict(values)
        return {f"of_{name}": [moment(tensor) for tensor in values[name]] for name in ("inputs", "outputs")}

    @property
    def inputs(self) -> list[Tensor]:
        """A of every block, ``[G, I, I]``, or its diagonal ``[G, I]``."""
        return [a.dense() for a in self.of_inputs]

    @property
    def outputs(self) -> list[Tensor]:
        """B of every block, ``[G, O, O]``, or its diagonal ``[G, O]``."""
        return [b.dense() for b in self.of_outputs]

    def __add__(self, other: KroneckerStatistics) -> KroneckerStatistics:
        """Statistics of both data together."""
        return KroneckerStatistics(
            [a + b for a, b in zip(self.of_inputs, other.of_inputs, strict=True)],
            [a + b for a, b in zip(self.of_outputs, other.of_outputs, strict=True)],
        )

    def __mul__(self, factor: float) -> KroneckerStatistics:
        """Statistics of the same data with weights that are multiplied by a factor."""
        return KroneckerStatistics([a * factor for a in self.of_inputs], [b * factor for b in self.of_outputs])

    def all_reduce(self) -> KroneckerStatistics:
        """Sum over all processes that work together; each weighs its data for all of them."""
        every = all_reduced([*self.of_inputs, *self.of_outputs])
        return KroneckerStatistics(every[: len(self.of_inputs)], every[len(self.of_inputs) :])

    def curvatures(self, basis: Basis) -> Tensor:
        r"""The factored estimate, :math:`\mathrm{diag}(Q_B^\top B Q_B) \otimes \mathrm{diag}(Q_A^\top A Q_A)`.

        With the statistics that gave the basis this is classical K-FAC.

        Returns:
            ``[rank]``, a per-datum mean.
        """
        factors = zip(basis.parts, self.of_inputs, self.of_outputs, strict=True)
        return basis.join([part.factored_curvatures(a, b) for part, a, b in factors])


@dataclass(frozen=True)
class InputStatistics:
    """Input statistics of all data of a stream: no loss is in them, so that they need neither weights nor vectors.

    Attributes:
        of_inputs: Sum of the outer products of every block.
        counts: Number of data that each of them stands for.
    """

    of_inputs: Sequence[SecondMoment]
    counts: Sequence[int]

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of statistics that an earlier version stored, as tensors."""
        if "count" not in values:
            return dict(values)
        sums = values["of_inputs"] if "of_inputs" in values else [moment(total) for total in values["totals"]]
        return {"of_inputs": sums, "counts": [values["count"]] * len(sums)}

    @property
    def totals(self) -> list[Tensor]:
        """Sums of the outer products of every block, ``[G, I, I]``, or their diagonals ``[G, I]``."""
        return [total.dense() for total in self.of_inputs]

    def __add__(self, other: InputStatistics) -> InputStatistics:
        """Of both data together."""
        totals = [a + b for a, b in zip(self.of_inputs, other.of_inputs, strict=True)]
        return InputStatistics(totals, [a + b for a, b in zip(self.counts, other.counts, strict=True)])

    def all_reduce(self) -> InputStatistics:
        """Sum over all processes that work together."""
        counts = [sum(of_block) for of_block in zip(*current().gather(self.counts), strict=True)]
        return InputStatistics(all_reduced(self.of_inputs), counts)


@dataclass(frozen=True)
class Kronecker(Structure):
    """The K-FAC structure.

    Example:
        >>> import debiased_laplace as dl
        >>> dl.Kronecker(sharing=dl.Reduce()).sharing
        Reduce()

    Attributes:
        eigh_dtype: Precision of the eigendecompositions. By default that of the statistics, with a check, and double
            precision where one fails it (:mod:`debiased_laplace.curvature.decomposition`).
        max_factor: Size above which a factor is block-diagonal: its directions are eigenvectors of blocks of about
            equal sizes up to this one. None for no limit.
        diagonal: Parameters or modules, by name or pattern (:mod:`fnmatch`), whose blocks have a diagonal curvature
            instead: their parameters themselves are the directions.
        sharing: What becomes of the positions at which a layer uses its weight: :class:`.Expand` or :class:`.Reduce`.
    """

    eigh_dtype: torch.dtype | None = None
    max_factor: int | None = None
    diagonal: Sequence[str] = ()
    sharing: WeightSharing = field(default_factory=Expand)

    observes: ClassVar[bool] = True
    deals_work: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.whole(self.max_factor, "max_factor", otherwise="None for no limit")

    def observe(self, network: Network, factors: Factors, look: Look) -> InputStatistics:
        """Outer products of the inputs, of every block; of fewer data where a layer has many positions."""
        totals, counts = [], []
        for block, kind in zip(network.blocks, self._kinds(network), strict=True):
            total, count = _sum_of_inputs(network, block, kind), 0
            positions = max(1, factors.n_positions(block)) if self.sharing.sums_positions else 1
            for window in look(-(-POSITIONS_PER_INPUT * block.inputs // positions)):
                self._add_inputs(total, factors, block, kind, window.part, factor=window.weight)
                count += window.weight * (window.part.stop - window.part.start)
            totals.append(total.moment())
            counts.append(count)
        return InputStatistics(totals, counts)

    def _add_inputs(
        self, total: MomentSum, factors: Factors, block: Block, kind: Kind, part: slice, weights: Tensor | None = None,
        factor: float = 1.0,
    ) -> None:  # fmt: skip
        """Add A of some data, or its diagonal, with a factor for all or a weight for every datum."""
        if weights is not None and bool((weights == weights[0]).all()):  # known on the CPU
            factor, weights = float(weights[0]), None
        mask = factors.has_gradient(block)
        n_columns = (part.stop - part.start) * factors.n_positions(block)
        if mask is None and self.sharing.sums_positions and kind.rotates_inputs and not total.keeps(n_columns):
            of_all = factors.input_second_moment(block, part, weights)
            if of_all is not None:
                total.add_matrix(of_all, factor)
                return
        means = factors.input_means(block, part) if mask is None and self.sharing.means_positions else None
        for piece, inputs in factors.input_pieces(block, part) if means is None else [(part, means)]:
            columns = self.sharing.inputs(inputs, None if mask is None else mask[piece])
            some = None if weights is None else weights[piece.start - part.start : piece.stop - part.start]
            if not kind.rotates_inputs:
                total.add_diagonal(second_moments(columns, some), factor)
                continue
            assert isinstance(columns, Tensor)  # others have the diagonal alone
            if some is not None:
                columns = columns * some.to(columns).sqrt()[:, None, None, None]
            total.add(columns, factor)

    def complete(self, statistics: KroneckerStatistics, observed: InputStatistics) -> KroneckerStatistics:
        """A of the whole stream in the place of that of a sample."""
        return KroneckerStatistics(
            [total * (1 / n) for total, n in zip(observed.of_inputs, observed.counts, strict=True)],
            statistics.of_outputs,
        )

    def measure(self, network: Network, data: CurvatureData) -> KroneckerStatistics:
        """Statistics of weighted data, in one pass.

        Args:
            network: The model with its blocks.
            data: Factors of consecutive chunks of data, with their weights and output vectors.
        """
        return self._measured(network, data, with_inputs=True)

    def measure_unobserved(self, network: Network, data: CurvatureData) -> KroneckerStatistics:
        """B alone."""
        return self._measured(network, data, with_inputs=False)

    def _measured(self, network: Network, data: CurvatureData, *, with_inputs: bool) -> KroneckerStatistics:
        if network.free is not None:
            raise ValueError(
                "Expected whole parameters for a Kronecker structure, got single entries of them. Choose them by name, "
                "or use a diagonal, low-rank or full structure."
            )
        kinds = self._kinds(network)
        pairs = list(zip(network.blocks, kinds, strict=True))
        inputs = [_sum_of_inputs(network, block, kind) for block, kind in pairs if with_inputs]
        outputs = [_sum(network, block.groups, block.outputs, square=kind.rotates_outputs) for block, kind in pairs]
        for chunk in data:
            masks = [chunk.factors.has_gradient(block) for block in network.blocks]
            everything = slice(0, len(chunk.weights))
            for (block, kind), total in zip(pairs, inputs, strict=True) if with_inputs else ():
                self._add_inputs(total, chunk.factors, block, kind, everything, chunk.weights)
            for _, vectors in chunk.factors.backpropagate(chunk.vectors):
                for of_block, kind, columns, mask in zip(outputs, kinds, vectors, masks, strict=True):
                    for column in columns.unbind(2):
                        column, factor = self.sharing.vectors(column, mask)
                        if kind.rotates_outputs:
                            of_block.add(column, factor)
                        else:
                            of_block.add_diagonal(second_moments(column), factor)
                del vectors, columns, column  # so that the next ones find their memory free
        statistics = KroneckerStatistics([a.moment() for a in inputs], [b.moment() for b in outputs])
        _check_finite(network, "input", statistics.of_inputs)
        _check_finite(network, "back-propagated gradient", statistics.of_outputs)
        return statistics

    def eigenbasis(self, network: Network, statistics: KroneckerStatistics, like: Basis | None = None) -> Basis:
        """Eigenvectors of the factors of every block, by descending eigenvalues."""
        _check_finite(network, "input", statistics.of_inputs)  # they may be those of a whole stream
        kinds, wanted = self._kinds(network), []
        for block, kind, a, b in zip(network.blocks, kinds, statistics.of_inputs, statistics.of_outputs, strict=True):
            wanted += [(block.name, b)] * kind.rotates_outputs
            wanted += [(block.name, a)] * (kind.rotates_outputs and kind.rotates_inputs)
        names, moments = [name for name, _ in wanted], [one for _, one in wanted]
        vectors = iter(eigenvectors(moments, names, self.eigh_dtype, self.max_factor))
        parts: list[Part] = []
        for block, kind in zip(network.blocks, kinds, strict=True):
            if not kind.rotates_outputs:
                parts.append(IdentityBasis(*block.matrix_shape))
            elif not kind.rotates_inputs:
                parts.append(OutputBasis(next(vectors), block.inputs))
            else:
                parts.append(KroneckerBasis(next(vectors), next(vectors)))
        return Basis(network.blocks, network.shapes, parts)

    def held(self, network: Network) -> Held:
        """Factors as dense matrices; a decomposition takes about six of the largest."""
        pairs = list(zip(network.blocks, self._kinds(network), strict=True))
        inputs = [block.groups * block.inputs ** (1 + kind.rotates_inputs) for block, kind in pairs]
        outputs = [block.groups * block.outputs ** (1 + kind.rotates_outputs) for block, kind in pairs]
        rotated = [size for size, (_, kind) in zip(inputs, pairs, strict=True) if kind.rotates_inputs]
        rotated += [size for size, (_, kind) in zip(outputs, pairs, strict=True) if kind.rotates_outputs]
        return Held(sum(outputs), sum(inputs), sum(rotated), 6 * max(rotated, default=0))

    def decomposed(self, network: Network, n_columns: int) -> Decomposed:
        """Factors of inputs, which are sums over the stream, and of outputs; in blocks where they are too large."""
        once, each = [], []
        for block, kind in zip(network.blocks, self._kinds(network), strict=True):
            if kind.rotates_outputs:
                each += self._pieces(block.outputs) * block.groups
                once += self._pieces(block.inputs) * block.groups if kind.rotates_inputs else []
        return Decomposed(once, each)

    def _pieces(self, size: int) -> list[int]:
        """Sizes of the blocks of a factor."""
        n = 1 if self.max_factor is None else -(-size // self.max_factor)
        return [-(-size // n)] * n

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


def _sum(network: Network, groups: int, size: int, *, square: bool) -> MomentSum:
    """Of a factor, or of its diagonal."""
    return MomentSum(groups, size, square=square, like=torch.empty(0, device=network.device, dtype=network.dtype))


def _sum_of_inputs(network: Network, block: Block, kind: Kind) -> MomentSum:
    return _sum(network, block.groups, block.inputs, square=kind.rotates_inputs)


def _check_finite(network: Network, what: str, moments: Sequence[SecondMoment]) -> None:
    """Raise a ``NonFiniteError`` that names the first layer whose statistics are not finite."""
    unknown = [one.is_finite() for one in moments if not one.known]  # others were looked at, and decomposed
    if not unknown or bool(torch.stack(unknown).all()):
        return
    name = next(block.name for block, one in zip(network.blocks, moments, strict=True) if not bool(one.is_finite()))
    raise NonFiniteError(
        f"Expected finite {what}s at the layer {name!r}, got NaN or infinity. "
        "Look for NaN in the data, or for an overflow in that layer (a half-precision model?)."
    )
