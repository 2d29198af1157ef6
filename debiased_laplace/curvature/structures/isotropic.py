r"""No curvature: the prior alone as posterior, :math:`P = \delta I`, and outputs with :math:`J_n J_n^\top / \delta`.

The identity in the place of the curvature, with one number to tune: what a curvature matrix has to beat. No training
datum has a part in it, so that any data will do to fit it, and none is back-propagated.

Source: Zhdanov, Dereka, Kolesnikov, "Identity curvature Laplace approximation for improved out-of-distribution
detection", arXiv 2312.10464, where the curvature is the identity beside a prior precision: here their sum is tuned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from debiased_laplace._ranks import current
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.parts.identity import IdentityBasis
from debiased_laplace.curvature.structures.base import Held, Structure
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network


@dataclass(frozen=True)
class IsotropicStatistics:
    """Nothing but how much data there was.

    Attributes:
        weight: Sum of the weights, a scalar.
    """

    weight: Tensor

    exact: ClassVar[bool] = False

    def __add__(self, other: IsotropicStatistics) -> IsotropicStatistics:
        """Statistics of both data together."""
        return IsotropicStatistics(self.weight + other.weight)

    def __mul__(self, factor: float) -> IsotropicStatistics:
        """Statistics of the same data with weights that are multiplied by a factor."""
        return IsotropicStatistics(factor * self.weight)

    def all_reduce(self) -> IsotropicStatistics:
        """Sum over all processes that work together; each weighs its data for all of them."""
        return IsotropicStatistics(current().sum(self.weight))

    def curvatures(self, basis: Basis) -> Tensor:
        """Zero along every direction, ``[rank]``."""
        return torch.zeros(basis.rank, device=self.weight.device, dtype=self.weight.dtype)


@dataclass(frozen=True)
class Isotropic(Structure):
    """The isotropic structure; its posterior is the prior."""

    data_dependent: ClassVar[bool] = False

    @property
    def projects(self) -> bool:
        """Not by equation (2), which would need data."""
        return False

    def held(self, network: Network) -> Held:
        """Nothing."""
        return Held()

    def measure(self, network: Network, data: CurvatureData) -> IsotropicStatistics:
        """Nothing is measured."""
        weight = data.data.weights.sum()
        return IsotropicStatistics(weight.to(network.device, network.dtype))

    def eigenbasis(
        self, network: Network, statistics: IsotropicStatistics | None = None, like: Basis | None = None
    ) -> Basis:
        """The parameters themselves, whatever the statistics."""
        parts = [IdentityBasis(*block.matrix_shape) for block in network.blocks]
        return Basis(network.blocks, network.shapes, parts)
