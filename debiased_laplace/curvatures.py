r"""Curvatures along the directions of a basis, from any weighted data.

Both estimates are per-datum means, never negative, and linear in the data: they neither sort nor
truncate nor damp anything by the data they are measured on.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace.basis import Basis
from debiased_laplace.gradients import Network, WeightedFactors
from debiased_laplace.structures.kron import KroneckerStatistics


def projected_curvatures(network: Network, basis: Basis, data: Iterable[WeightedFactors]) -> Tensor:
    r"""Equation (2): :math:`\lambda_i = \sum_n w_n \sum_v (u_i^\top J_n^\top s_{nv})^2`.

    Unbiased for :math:`u_i^\top G u_i` when the basis was chosen on other data; with the same data and a
    Kronecker basis these are the corrected eigenvalues of EKFAC (George et al., arXiv 1806.03884).
    Off-diagonal entries of :math:`U^\top G U` are dropped.

    Returns:
        ``[rank]``, a per-datum mean.
    """
    totals = [torch.zeros(part.shape, device=network.device, dtype=network.dtype) for part in basis.parts]
    for chunk in data:
        n_vectors = len(chunk.vectors)
        inputs = [
            part.prepare_inputs(chunk.factors.inputs(block), n_vectors)
            for block, part in zip(network.blocks, basis.parts, strict=True)
        ]
        for _, vectors in chunk.factors.backpropagate(chunk.vectors, network.vector_chunk):
            for total, part, a, g in zip(totals, basis.parts, inputs, vectors, strict=True):
                total += part.project_gradients(a, g).second_moment()
            del vectors, g  # so that the next ones find their memory free
    for block, total in zip(network.blocks, totals, strict=True):
        _checks.finite(total, f"the curvatures of {block.name!r}", "Look for NaN in the data that measure them.")
    return basis.join(totals)


def factored_curvatures(basis: Basis, statistics: KroneckerStatistics) -> Tensor:
    r"""The factored estimate, :math:`\mathrm{diag}(Q_B^\top B_2 Q_B) \otimes \mathrm{diag}(Q_A^\top A_2 Q_A)`.

    With the statistics that gave the basis this is classical K-FAC.

    Returns:
        ``[rank]``, a per-datum mean.
    """
    values = []
    for part, a, b in zip(basis.parts, statistics.inputs, statistics.outputs, strict=True):
        along_inputs = torch.einsum("gij,gik,gkj->gj", part.inputs, a, part.inputs)
        along_outputs = torch.einsum("gij,gik,gkj->gj", part.outputs, b, part.outputs)
        # Diagonals of positive semi-definite matrices: below zero only by rounding.
        values.append(along_outputs.clamp_min(0)[:, :, None] * along_inputs.clamp_min(0)[:, None, :])
    return basis.join(values)
