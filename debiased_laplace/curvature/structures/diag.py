r"""Diagonal curvature: the parameters themselves as directions, :math:`U = I`.

The directions do not depend on data, so that a mini-batch curvature along them is unbiased whatever
the batch: here splitting helps nothing, it only discards data. It is the control of the other structures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace._ranks import current
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.block_gradients import block_gradients
from debiased_laplace.curvature.hesscale import APPROXIMATIONS, hessian_diagonal
from debiased_laplace.curvature.parts.identity import IdentityBasis
from debiased_laplace.curvature.structures.base import Held, Structure
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network

DIAGONALS = ("ggn", *APPROXIMATIONS)


@dataclass(frozen=True)
class DiagonalStatistics:
    """The diagonal of the curvature.

    Attributes:
        diagonals: Of every block, ``[G, O, I]``.
    """

    diagonals: list[Tensor]

    exact: ClassVar[bool] = True

    def __add__(self, other: DiagonalStatistics) -> DiagonalStatistics:
        """Statistics of both data together."""
        return DiagonalStatistics([a + b for a, b in zip(self.diagonals, other.diagonals, strict=True)])

    def __mul__(self, factor: float) -> DiagonalStatistics:
        """Statistics of the same data with weights that are multiplied by a factor."""
        return DiagonalStatistics([factor * d for d in self.diagonals])

    def all_reduce(self) -> DiagonalStatistics:
        """Sum over all processes that work together; each weighs its data for all of them."""
        return DiagonalStatistics([current().sum(diagonal) for diagonal in self.diagonals])

    def curvatures(self, basis: Basis) -> Tensor:
        """The diagonal, ``[rank]``."""
        curvatures = basis.join(self.diagonals)
        if bool((curvatures < 0).any()):
            raise ValueError(
                f"The diagonal of the Hessian is negative for {int((curvatures < 0).sum())} of {len(curvatures)} "
                'parameters, so that it is no precision. Use method="hesscale_gn", its Gauss-Newton variant, or "ggn".'
            )
        return curvatures


@dataclass(frozen=True)
class Diagonal(Structure):
    """The diagonal structure.

    Attributes:
        method: ``"ggn"``, the diagonal of the curvature that every other structure approximates too (exact, or with
            random vectors); or one of the back-propagated approximations of the Hessian's diagonal, ``"hesscale"``,
            ``"hesscale_gn"``, ``"becker_lecun"`` (:mod:`debiased_laplace.curvature.hesscale`), whose cost does not
            depend on the number of outputs and which cover feed-forward networks.
    """

    method: str = "ggn"

    data_dependent: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.method not in DIAGONALS:
            raise ValueError(f"Expected a method out of {list(DIAGONALS)}, got {self.method!r}.")

    def held(self, network: Network) -> Held:
        return Held(statistics=network.n_params)

    @property
    def projects(self) -> bool:
        return self.method == "ggn"

    def measure(self, network: Network, data: CurvatureData) -> DiagonalStatistics:
        """The diagonal, in one pass."""
        if not self.projects:
            return self._back_propagated(network, data)
        totals = [
            torch.zeros(block.matrix_shape, device=network.device, dtype=network.dtype) for block in network.blocks
        ]
        for chunk in data:
            inputs = [chunk.factors.inputs(block) for block in network.blocks]
            for _, vectors in chunk.factors.backpropagate(chunk.vectors):
                for total, a, g in zip(totals, inputs, vectors, strict=True):
                    total += block_gradients(a, g).second_moment()
                del vectors, g  # so that the next ones find their memory free
        for block, total in zip(network.blocks, totals, strict=True):
            _checks.finite(total, f"the curvatures of {block.name!r}", "Look for NaN in the data that measure them.")
        return DiagonalStatistics(totals)

    def eigenbasis(
        self, network: Network, statistics: DiagonalStatistics | None = None, like: Basis | None = None
    ) -> Basis:
        """The identity, whatever the statistics."""
        parts = [IdentityBasis(*block.matrix_shape) for block in network.blocks]
        return Basis(network.blocks, network.shapes, parts)

    def _back_propagated(self, network: Network, data: CurvatureData) -> DiagonalStatistics:
        total: dict[str, Tensor] = {}
        for part in data.slices():
            some = data.data.take(part)
            diagonal = hessian_diagonal(
                network.snapshot, some.inputs, some.targets, data.likelihood, weights=some.weights, method=self.method,
                parameters=list(network.shapes),
            )  # fmt: skip
            total = {name: total[name] + d if total else d for name, d in diagonal.items()}
        named = {name: d.to(network.dtype) for name, d in total.items()}
        return DiagonalStatistics([block.gather(named) for block in network.blocks])
