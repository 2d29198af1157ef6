r"""Curvatures along the directions of a basis, from any weighted data.

They are per-datum means, never negative, and linear in the data: nothing is sorted, truncated or damped by
the data they are measured on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _checks, _data
from debiased_laplace.curvature.basis import Basis
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
        prepared = _prepared(bases, [chunk.factors.inputs(block) for block in network.blocks], len(chunk.vectors))
        size = _vectors_at_a_time(network, chunk)
        for part in _data.slices(len(chunk.vectors), size):
            vectors = chunk.factors.backpropagate_all(chunk.vectors[part], again=part.stop < len(chunk.vectors))
            for which, (basis, inputs, multiple) in enumerate(zip(bases, prepared, multiples, strict=True)):
                weighted = vectors
                if multiple is not None:
                    roots = multiple[chunk.positions].sqrt().to(vectors[0])[:, None, None, None, None]
                    weighted = [roots * of_block for of_block in vectors]
                moments = [projected.second_moment() for projected in basis.project_gradients(inputs, weighted)]
                known = totals[which]
                totals[which] = [a.add_(b) for a, b in zip(known, moments, strict=True)] if known else moments
            del vectors, weighted  # so that the next ones find their memory free
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


def _prepared(bases: Sequence[Basis], inputs: Sequence[Any], n_vectors: int) -> list[list[Any]]:
    """Inputs prepared for every basis; once for parts that prepare them alike."""
    first = bases[0].prepare_inputs(inputs, n_vectors)
    prepared = [first]
    for basis in bases[1:]:
        of_basis = []
        for part, other, members, known in zip(basis.parts, bases[0].parts, basis.members, first, strict=True):
            alike = part.prepares_like(other)
            of_basis.append(known if alike else part.prepare_inputs([inputs[i] for i in members], n_vectors))
        prepared.append(of_basis)
    return prepared
