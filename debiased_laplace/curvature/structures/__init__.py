"""Curvature structures: additive statistics of weighted data, and the basis they give."""

from debiased_laplace.curvature.structures.base import Look, Statistics, Structure, Window
from debiased_laplace.curvature.structures.diag import Diagonal, DiagonalStatistics
from debiased_laplace.curvature.structures.full import Full, FullStatistics
from debiased_laplace.curvature.structures.isotropic import Isotropic, IsotropicStatistics
from debiased_laplace.curvature.structures.kron import Kronecker, KroneckerStatistics
from debiased_laplace.curvature.structures.lowrank import LowRank, LowRankStatistics

#: By the names that laplace-torch and task files have for them.
STRUCTURES: dict[str, type[Structure]] = {
    "kron": Kronecker, "lowrank": LowRank, "diag": Diagonal, "full": Full, "isotropic": Isotropic,
}  # fmt: skip

__all__ = [
    "STRUCTURES",
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
