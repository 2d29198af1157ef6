"""Curvature structures: additive statistics of weighted data, and the basis they give."""

from debiased_laplace.curvature.structures.base import Look, Statistics, Structure, Window
from debiased_laplace.curvature.structures.diag import Diagonal, DiagonalStatistics
from debiased_laplace.curvature.structures.full import Full, FullStatistics
from debiased_laplace.curvature.structures.isotropic import Isotropic, IsotropicStatistics
from debiased_laplace.curvature.structures.kron import Kronecker, KroneckerStatistics
from debiased_laplace.curvature.structures.lowrank import LowRank, LowRankStatistics

__all__ = [
    "Diagonal",
    "DiagonalStatistics",
    "Full",
    "FullStatistics",
    "Isotropic",
    "IsotropicStatistics",
    "Kronecker",
    "KroneckerStatistics",
    "Look",
    "LowRank",
    "LowRankStatistics",
    "Statistics",
    "Structure",
    "Window",
]
