"""Curvature structures: additive statistics of weighted data, and the basis they give."""

from debiased_laplace.structures.kron import Kronecker, KroneckerStatistics

__all__ = ["Kronecker", "KroneckerStatistics"]
