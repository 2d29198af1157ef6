r"""More data for a fit of which only the curvature is left.

A fit that was loaded has directions and curvatures, and none of the data that gave them. New data had no part in
choosing its directions, so that what they measure along them is unbiased, and curvatures are sums over data:

.. math:: \lambda_i = \frac{N_1 \lambda_{1i} + N_2 \lambda_{2i}}{N_1 + N_2},
    \qquad \lambda_{2i} = \sum_n w_n \sum_v (u_i^\top J_n^\top s_{nv})^2.

The directions stay, unless they are dense, of a matrix that is known: then they are those of the sum. As in
laplace-torch, the curvature of the earlier data is that at the earlier parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.projected import projected_curvatures
from debiased_laplace.curvature.structures import Structure
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network


def updated_curvature(
    previous: Fit, network: Network, structure: Structure, data: CurvatureData, n_added: int, observed: Any = None,
    *, factored: bool,
) -> tuple[Basis, Tensor]:  # fmt: skip
    """Directions, and curvatures along them, of an earlier fit and of more data.

    Args:
        previous: A fit without its data.
        network: The model with its blocks, as it is now.
        structure: That of the fit.
        data: The new data, with weights that make them a mean.
        n_added: Their number, or that of the data they stand for.
        observed: What the structure summed over all of the stream, if it did.
        factored: Whether the structure's own statistics measure the curvatures.

    Raises:
        ValueError: If the earlier fit is one of other parameters or blocks, or of a low rank.
    """
    basis = previous.posterior.basis
    of_earlier, of_these = (
        torch.ones(one.n_params, dtype=torch.bool) if one.free is None else one.free.cpu()
        for one in (previous.network, network)
    )
    same = previous.network.shapes == network.shapes and previous.network.blocks == network.blocks
    if not same or not torch.equal(of_earlier, of_these):
        raise ValueError(
            "Expected the parameters and curvature blocks of the fit that was loaded, got others. Use the settings "
            "that it was made with (parameters or their entries, separate_bias), or fit on all data instead."
        )
    if basis.rank < int(of_these.sum()):
        raise ValueError(
            "Expected a fit with all directions to add data to, got one of a low rank that was loaded: its directions "
            "are the leading ones of the earlier data alone. Fit on all data instead, or use another structure."
        )
    n_earlier = previous.posterior.n_data
    share = n_added / (n_earlier + n_added)
    known = structure.statistics_of(network, basis, previous.posterior.curvatures)
    if known is not None:
        statistics = known * (1 - share) + structure.measure(network, data) * share
        basis = structure.eigenbasis(network, statistics)
        return basis, statistics.curvatures(basis)
    if factored or not structure.projects:
        statistics = structure.measure(network, data)
        added = (statistics if observed is None else structure.complete(statistics, observed)).curvatures(basis)
    else:
        added = projected_curvatures(network, basis, data)
    return basis, torch.lerp(previous.posterior.curvatures.double(), added.double(), share).to(added)
