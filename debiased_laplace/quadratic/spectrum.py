r"""What ViViT's users ask of the curvature of a batch: spectrum, eigenpairs, slopes and curvatures of every datum.

The weighted vectors :math:`\sqrt{w_n} J_n^\top s_{nv}` are the columns of V, ``[D, N V]``; the curvature is
:math:`G = V V^\top`, and everything here goes through the Gram matrix :math:`V^\top V`, never through G.

Source: Dangel, Tatzel, Hennig, "ViViT: Curvature access through the generalized Gauss-Newton's low-rank
structure" (arXiv 2106.02624); equation numbers below are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _checks, _data
from debiased_laplace._guards import exact_derivatives
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.decomposition import eigh
from debiased_laplace.curvature.parts.dense import DenseBasis
from debiased_laplace.curvature.structures import LowRank, LowRankStatistics
from debiased_laplace.curvature.structures.base import eigenspaces
from debiased_laplace.curvature.structures.lowrank import known_eigenpairs, lift_eigenvectors
from debiased_laplace.likelihoods import Likelihood, resolve_likelihood
from debiased_laplace.network.blocks import flatten, unflatten
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.quadratic.gram_products import GramProducts, Inner
from debiased_laplace.sampling.sample import WeightedData

__all__ = ["GGN", "DirectionalDerivatives", "directional_derivatives", "eigenpairs_by_gram"]


@dataclass(frozen=True)
class DirectionalDerivatives:
    r"""First and second derivatives of every datum's loss along directions, equations (7) and (8).

    Attributes:
        slopes: :math:`\gamma_{nk} = e_k^\top \nabla \ell_n`, ``[N, K]``.
        curvatures: :math:`\lambda_{nk} = e_k^\top G_n e_k`, ``[N, K]``.
        weights: ``[N]``, with which they average; 1 / N for the mean.
        precision: Relative rounding error of what the model computes.
    """

    slopes: Tensor
    curvatures: Tensor
    weights: Tensor
    precision: float = torch.finfo(torch.float64).eps

    @property
    def slope(self) -> Tensor:
        r""":math:`\gamma_k = \sum_n w_n \gamma_{nk}`, ``[K]``."""
        return self.weights @ self.slopes

    @property
    def curvature(self) -> Tensor:
        r""":math:`\lambda_k = \sum_n w_n \lambda_{nk}`, ``[K]``."""
        return self.weights @ self.curvatures

    @property
    def slope_snr(self) -> Tensor:
        """Squared mean over variance of the slopes, ``[K]`` (section 4.1); infinite without variance."""
        return _signal_to_noise(self.slopes, self.weights)

    @property
    def curvature_snr(self) -> Tensor:
        """Squared mean over variance of the curvatures, ``[K]``."""
        return _signal_to_noise(self.curvatures, self.weights)


def _signal_to_noise(values: Tensor, weights: Tensor) -> Tensor:
    weights = weights / weights.sum()
    mean = weights @ values
    return mean.square() / (weights @ (values - mean).square())


@exact_derivatives()
def directional_derivatives(
    network: Network,
    basis: Basis,
    data: WeightedData,
    likelihood: Likelihood,
    *,
    mc_samples: int | None = None,
    generator: torch.Generator | int = 0,
    chunk_size: int | None = None,
) -> DirectionalDerivatives:
    """Slopes and curvatures of every datum along the directions of any basis, chosen on these data or on others.

    One forward pass, and a backward pass for each vector; memory ``N * rank`` numbers.

    Args:
        network: The model with its blocks.
        basis: The directions.
        data: With targets and weights.
        likelihood: What the outputs mean.
        mc_samples: Random vectors for each datum; None for the exact loss Hessian.
        generator: A CPU generator or a seed, for the random vectors.
        chunk_size: Data at a time.
    """
    generator = torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
    unweighted = WeightedData(data.inputs, data.targets, torch.ones_like(data.weights), data.indices)
    common: dict[str, Any] = {"generator": generator, "chunk_size": chunk_size}
    curvature = CurvatureData(network, unweighted, likelihood, mc_samples=mc_samples, **common)
    slope = CurvatureData(network, unweighted, likelihood, curvature="empirical_fisher", **common)

    def along(chunks: CurvatureData, power: int) -> Tensor:
        derivatives: Tensor | None = None
        for chunk in chunks:
            inputs = [chunk.factors.inputs(block) for block in network.blocks]
            prepared = basis.prepare_inputs(inputs, len(chunk.vectors))
            total: Tensor | float = 0.0
            for _, vectors in chunk.factors.backpropagate(chunk.vectors):
                rows = [projected.rows() for projected in basis.project_gradients(prepared, vectors)]
                total = total + torch.cat(rows, -1).double().pow(power).sum(1)
            assert isinstance(total, Tensor)
            if derivatives is None:
                derivatives = total.new_empty(len(chunks), basis.rank)
            derivatives[chunk.positions] = total
        return torch.empty(0) if derivatives is None else derivatives

    return DirectionalDerivatives(
        along(slope, 1), along(curvature, 2), data.weights.to(network.device), network.precision
    )


class GGN(GramProducts):
    r"""The generalised Gauss-Newton matrix of a batch, :math:`\sum_n w_n J_n^\top \nabla^2_f\ell_n J_n`.

    Args:
        model: The model; left as it was.
        inputs: N data, as the model takes them.
        targets: ``[N, ...]``.
        likelihood: ``"classification"``, ``"regression"``, or a :class:`~debiased_laplace.likelihoods.Likelihood`.
        weights: ``[N]``; 1 / N by default, the mean.
        parameters: Which trainable parameters: all, ``"last_layer"``, or names and patterns.
        blocks: None for the whole matrix, ``"layer"`` for its block diagonal, or groups of patterns.
        mc_samples: Random vectors for each datum; None for the exact matrix.
        subsample: Use only so many of the data, drawn at random.
        generator: A CPU generator or a seed.
        chunk_size: Data at a time.

    Memory: the factors (see :class:`~debiased_laplace.curvature.structures.LowRankStatistics`) and ``8 (N V)^2`` bytes.

    Example:
        >>> import torch
        >>> from debiased_laplace import GGN
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> ggn = GGN(model, torch.randn(16, 4), torch.randint(3, (16,)), "classification")
        >>> values, directions = ggn.eigenpairs(5)
        >>> derivatives = ggn.directional_derivatives(directions)
        >>> bool(torch.allclose(derivatives.curvature, values, rtol=1e-3))
        True
    """

    @exact_derivatives()
    def __init__(
        self,
        model: nn.Module | Snapshot,
        inputs: _data.Inputs,
        targets: Tensor,
        likelihood: str | Likelihood,
        *,
        weights: Tensor | None = None,
        parameters: str | Sequence[str] | None = None,
        blocks: str | Sequence[Sequence[str]] | None = None,
        mc_samples: int | None = None,
        subsample: int | None = None,
        generator: torch.Generator | int = 0,
        chunk_size: int | None = None,
    ) -> None:
        self.likelihood = resolve_likelihood(likelihood)
        self.generator = torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
        inputs, targets, n = _data.only((inputs, targets))
        if not n:
            raise ValueError("Expected at least one datum, got none.")
        if weights is None:
            weights = torch.full((n,), 1 / n, dtype=torch.float64)
        self.network = Network.discover(model, inputs, parameters=parameters)
        targets = self.likelihood.prepare_targets(targets, self.network.n_outputs)
        self.data = WeightedData(inputs, targets, weights.double().cpu(), torch.arange(n))
        self.mc_samples = mc_samples
        self.chunk_size = chunk_size
        self.gram_precision = self.network.gram_precision
        used = self.data
        if subsample is not None:
            if not 1 <= subsample <= n:
                raise ValueError(f"Expected to subsample between 1 and all {n} data, got {subsample}.")
            chosen = self.data.take(torch.randperm(n, generator=self.generator)[:subsample].sort().values)
            used = WeightedData(chosen.inputs, chosen.targets, chosen.weights * (n / subsample), chosen.indices)
        self._random_state = self.generator.get_state()  # every call has the same random vectors
        self._structure = LowRank(1, blocks)
        self.statistics: LowRankStatistics = self._structure.measure(
            self.network,
            CurvatureData(
                self.network, used, self.likelihood, mc_samples=mc_samples, generator=self.generator,
                chunk_size=chunk_size,
            ),
        )  # fmt: skip

    @property
    def trace(self) -> Tensor:
        """Sum of the eigenvalues, float64."""
        return sum((gram.trace() for gram, _, _ in self._decompositions), torch.zeros(()).double())

    @cached_property
    @exact_derivatives()
    def _decompositions(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For every part, the Gram matrix, and its eigenvalues and eigenvectors."""
        decompositions = []
        for group in self.statistics.groups:
            gram = self.statistics.gram(group)
            _checks.finite(gram, "the Gram matrix of the curvature", "Look for NaN in the data, or for an overflow.")
            decompositions.append((gram, *eigh(gram, "the batch")))
        return decompositions

    def eigenvalues(self) -> Tensor:
        """The spectrum but for trivial zeros, ``[N V]`` (for each part, together), largest first, float64."""
        values = torch.cat([values for _, values, _ in self._decompositions])
        return values.clamp_min(0).sort(descending=True).values

    @exact_derivatives()
    def eigenpairs(self, rank: int | float) -> tuple[Tensor, Basis]:
        """Leading eigenvalues ``[K]`` and eigenvectors (of every part); fewer if the curvature has lower rank.

        A repeated eigenvalue comes as often as it is one; of its eigenvectors only their span is determined, and if K
        cuts it, not even that: what is made of them has to be averaged over it (a fit with :class:`.LowRank` is, and
        keeps repeated eigenvalues as a whole).

        Args:
            rank: Number of them, or the fraction of the trace, in (0, 1), that they explain.

        Returns:
            The eigenvalues, and the eigenvectors as a basis: ``basis.lift(torch.eye(basis.rank))`` has them as rows.
        """
        LowRank(rank)  # checks it
        network, statistics, parts = self.network, self.statistics, []
        precision = torch.finfo(network.dtype).eps
        for group in statistics.groups:
            name = ", ".join(network.blocks[i].name for i in group)
            values, vectors, total = known_eigenpairs(statistics, group, rank, name, precision)
            k = rank if isinstance(rank, int) else int((values.cumsum(0) / total < rank).sum()) + 1
            columns = lift_eigenvectors(network, statistics, group, values[:k], vectors[:, :k])
            parts.append(DenseBasis(columns, eigenspaces(values[:k], precision)))
        basis = Basis(network.blocks, network.shapes, parts, statistics.groups)
        return statistics.curvatures(basis), basis

    def directional_derivatives(self, basis: Basis, data: WeightedData | None = None) -> DirectionalDerivatives:
        """Slopes and curvatures of every datum along directions, on this batch or on other data.

        With ``mc_samples`` the random vectors are those of the matrix itself (unless that is of a subsample).
        """
        generator = torch.Generator()
        generator.set_state(self._random_state)
        return directional_derivatives(
            self.network, basis, data if data is not None else self.data, self.likelihood, mc_samples=self.mc_samples,
            generator=generator, chunk_size=self.chunk_size,
        )  # fmt: skip

    @exact_derivatives()
    def _apply(self, vector: Tensor, inner: Inner) -> Tensor:
        """Part by part."""
        network, statistics = self.network, self.statistics
        flat = vector.to(network.device).reshape(-1, vector.shape[-1]).double()
        matrices = [block.gather(unflatten(flat, network.shapes)) for block in network.blocks]
        result: dict[str, Tensor] = {}
        for group, (_, values, vectors) in zip(statistics.groups, self._decompositions, strict=True):
            coefficients = torch.stack([statistics.multiply(index, matrices[index]) for index in group]).sum(0)
            mixed = inner(values, vectors, coefficients)
            for index in group:
                block = network.blocks[index]
                combined = statistics.combine(index, mixed)
                result.update(block.scatter(combined.unflatten(1, (block.groups, block.outputs, block.inputs))))
        return flatten(result, network.shapes).reshape(vector.shape)


def eigenpairs_by_gram(
    network: Network,
    batches: Sequence[tuple[_data.Inputs, Tensor]],
    likelihood: Likelihood,
    k: int,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The k largest eigenvalues ``[k]`` of the mean over batches, and eigenvectors ``[k, D]``, as rows, descending.

    Returns:
        Both in float64; None where the Gram matrix cannot be had, of data in several shapes or a layer without a rule.
    """
    inputs = [batch for batch, _ in batches]
    if len({tuple(leaf.shape[1:] for leaf in _data.tensors(batch)) for batch in inputs}) > 1:
        return None
    targets = torch.cat([targets for _, targets in batches])
    try:
        ggn = GGN(
            network.snapshot, _data.concatenate(inputs), targets, likelihood, parameters=list(network.shapes),
            chunk_size=chunk_size,
        )  # fmt: skip
        values, basis = ggn.eigenpairs(k)
    except _checks.UnsupportedLayerError:
        return None
    rows = basis.lift(torch.eye(basis.rank, dtype=torch.float64, device=values.device))
    order = values.double().argsort(descending=True)
    return values.double()[order], rows[order]
