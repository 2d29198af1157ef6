"""Curvature structures: additive statistics of weighted data, and the basis they give."""

from debiased_laplace.structures.base import Statistics, Structure
from debiased_laplace.structures.diag import Diagonal, DiagonalStatistics
from debiased_laplace.structures.full import Full, FullStatistics
from debiased_laplace.structures.isotropic import Isotropic, IsotropicStatistics
from debiased_laplace.structures.kron import Kronecker, KroneckerStatistics
from debiased_laplace.structures.lowrank import LowRank, LowRankStatistics

__all__ = [
    "Diagonal",
    "DiagonalStatistics",
    "Full",
    "FullStatistics",
    "Isotropic",
    "IsotropicStatistics",
    "Kronecker",
    "KroneckerStatistics",
    "LowRank",
    "LowRankStatistics",
    "Statistics",
    "Structure",
]
