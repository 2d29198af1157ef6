r"""Curvatures along the directions of a basis, from any weighted data.

They are per-datum means, never negative, and linear in the data: nothing is sorted, truncated or damped by
the data they are measured on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _checks, _data
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.network.factors import Factors
from debiased_laplace.network.gradients import CHUNK_MEMORY, WeightedFactors
from debiased_laplace.network.network import Network


def projected_curvatures(network: Network, basis: Basis, data: Iterable[WeightedFactors]) -> Tensor:
    r"""Equation (2): :math:`\lambda_i = \sum_n w_n \sum_v (u_i^\top J_n^\top s_{nv})^2`.

    Unbiased for :math:`u_i^\top G u_i` when the basis was chosen on other data; with the same data and a
    Kronecker basis these are the corrected eigenvalues of EKFAC (George et al., arXiv 1806.03884).
    Off-diagonal entries of :math:`U^\top G U` are dropped.

    Returns:
        ``[rank]``, a per-datum mean.
    """
    return curvatures_along(network, [basis], data, [None])[0]


def curvatures_along(
    network: Network, bases: Sequence[Basis], data: Iterable[WeightedFactors], multiples: Sequence[Tensor | None]
) -> list[Tensor]:
    """The same for several bases, of the same backward passes.

    Args:
        network: The model with its blocks.
        bases: Of the same blocks.
        data: N data.
        multiples: For every basis, by what the weights of the data are multiplied, ``[N]``; None for nothing.
    """
    totals: list[list[Tensor]] = [[] for _ in bases]
    for chunk in data:
        size = _vectors_at_a_time(network, chunk)
        prepared: Iterable[tuple[int, list[Any]]] = _prepared(bases, chunk.factors, len(chunk.vectors))
        if size < len(chunk.vectors):
            prepared = list(prepared)  # once for all vectors; otherwise those of one part exist at a time
        roots = [None if m is None else m[chunk.positions].sqrt()[:, None, None, None, None] for m in multiples]
        for part in _data.slices(len(chunk.vectors), size):
            vectors = chunk.factors.backpropagate_all(chunk.vectors[part], again=part.stop < len(chunk.vectors))
            for index, of_bases in prepared:
                for basis, inputs, root, known in zip(bases, of_bases, roots, totals, strict=True):
                    weighted = [vectors[i] if root is None else root.to(vectors[i]) * vectors[i]
                                for i in basis.members[index]]  # fmt: skip
                    moment = basis.parts[index].project_gradients(inputs, weighted).second_moment()
                    if index < len(known):
                        known[index].add_(moment)
                    else:
                        known.append(moment)
                    del weighted, moment, inputs
                del of_bases
            del vectors  # so that the next ones find their memory free
    for basis, of_basis in zip(bases, totals, strict=True):
        if not of_basis:  # of no data
            of_basis += basis.split(torch.zeros(basis.rank, dtype=network.dtype, device=network.device))
        for members, total in zip(basis.members, of_basis, strict=True):
            names = ", ".join(network.blocks[i].name for i in members)
            _checks.finite(total, f"the curvatures of {names!r}", "Look for NaN in the data that measure them.")
    return [basis.join(of_basis) for basis, of_basis in zip(bases, totals, strict=True)]


def _vectors_at_a_time(network: Network, chunk: WeightedFactors) -> int:
    """As many as fit the memory of a chunk: contractions of several vectors are cheaper than one for each."""
    n_vectors = len(chunk.vectors)
    while n_vectors > 1 and network.chunk_size(CHUNK_MEMORY, n_vectors) < len(chunk.factors.outputs):
        n_vectors = (n_vectors + 1) // 2
    return n_vectors


def _prepared(bases: Sequence[Basis], factors: Factors, n_vectors: int) -> Iterator[tuple[int, list[Any]]]:
    """Inputs of one part after the other, prepared for every basis; once for bases that prepare them alike."""

    def of_part(index: int, members: Sequence[int]) -> list[Any]:
        inputs = [factors.inputs(factors.network.blocks[i]) for i in members]
        first, *others = (basis.parts[index] for basis in bases)
        known = first.prepare_inputs(inputs, n_vectors)
        return [known] + [
            known if part.prepares_like(first) else part.prepare_inputs(inputs, n_vectors) for part in others
        ]

    for index, members in enumerate(bases[0].members):
        yield index, of_part(index, members)  # nothing of it is kept here
