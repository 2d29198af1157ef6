r"""Curvatures along the directions of a basis, from any weighted data.

They are per-datum means, never negative, and linear in the data: nothing is sorted, truncated or damped by
the data they are measured on.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.network.gradients import WeightedFactors
from debiased_laplace.network.network import Network


def projected_curvatures(network: Network, basis: Basis, data: Iterable[WeightedFactors]) -> Tensor:
    r"""Equation (2): :math:`\lambda_i = \sum_n w_n \sum_v (u_i^\top J_n^\top s_{nv})^2`.

    Unbiased for :math:`u_i^\top G u_i` when the basis was chosen on other data; with the same data and a
    Kronecker basis these are the corrected eigenvalues of EKFAC (George et al., arXiv 1806.03884).
    Off-diagonal entries of :math:`U^\top G U` are dropped.

    Returns:
        ``[rank]``, a per-datum mean.
    """
    totals: list[Tensor] = []
    for chunk in data:
        inputs = basis.prepare_inputs([chunk.factors.inputs(block) for block in network.blocks], len(chunk.vectors))
        for _, vectors in chunk.factors.backpropagate(chunk.vectors, network.vector_chunk):
            moments = [projected.second_moment() for projected in basis.project_gradients(inputs, vectors)]
            totals = [total.add_(moment) for total, moment in zip(totals, moments, strict=True)] if totals else moments
            del vectors  # so that the next ones find their memory free
    for members, total in zip(basis.members, totals, strict=True):
        names = ", ".join(network.blocks[i].name for i in members)
        _checks.finite(total, f"the curvatures of {names!r}", "Look for NaN in the data that measure them.")
    return basis.join(totals)
