"""The Gaussian over the parameters in laplace-torch's forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from debiased_laplace.laplace import Laplace
from debiased_laplace.laplace_torch.parameters import embed, restrict
from debiased_laplace.laplace_torch.precision import KroneckerPrecision
from debiased_laplace.posterior.gaussian import Posterior

#: Structures whose precision is a vector.
VECTOR_STRUCTURES = ("diag", "isotropic")


def curvature(native: Laplace, structure: str, dtype: torch.dtype) -> Any:
    """Curvature of the loss summed over the training set, in the form of :func:`precision` without the prior."""
    posterior = native.posterior
    return _in_the_form_of(structure, native, posterior.n_data * posterior.curvatures.double(), dtype)


def precision(native: Laplace, structure: str, dtype: torch.dtype) -> Any:
    """Posterior precision.

    Returns:
        ``"kron"``: a :class:`KroneckerPrecision`; ``"diag"`` and ``"isotropic"``: ``[D]``; ``"full"``: ``[D, D]``;
        ``"lowrank"``: ``((U: [D, K], eigenvalues: [K]), prior: [D])``.
    """
    posterior = native.posterior
    if structure == "kron":
        return KroneckerPrecision.of(posterior, dtype)
    if structure in VECTOR_STRUCTURES:
        return _in_the_form_of(structure, native, posterior.precisions, dtype)
    without_prior = _in_the_form_of(structure, native, posterior.scale * posterior.curvatures.double(), dtype)
    prior = restrict(posterior.parameter_prior, native.network.free).to(dtype)
    return (without_prior, prior) if structure == "lowrank" else without_prior + torch.diag(prior)


def _in_the_form_of(structure: str, native: Laplace, eigenvalues: Tensor, dtype: torch.dtype) -> Any:
    basis, free = native.posterior.basis, native.network.free
    if structure == "kron":
        return KroneckerPrecision(basis, eigenvalues, dtype)
    if structure in VECTOR_STRUCTURES:
        return restrict(basis.lift(eigenvalues), free).to(dtype)
    unit = torch.eye(basis.rank, dtype=torch.float64, device=eigenvalues.device)
    columns = restrict(basis.lift(unit), free).mT
    if structure == "lowrank":
        return columns.to(dtype), eigenvalues.to(dtype)
    return ((columns * eigenvalues) @ columns.mT).to(dtype)


def covariance(native: Laplace, dtype: torch.dtype) -> Tensor:
    """Posterior covariance of the uncertain parameters, ``[d, d]``."""
    size = native.posterior.basis.n_params if native.network.free is None else int(native.network.free.sum())
    unit = torch.eye(size, dtype=torch.float64, device=native.network.device)
    dense = covariance_matvec(native, unit)
    return (0.5 * (dense + dense.mT)).to(dtype)


def covariance_matvec(native: Laplace, vector: Tensor) -> Tensor:
    r""":math:`P^{-1} v` of vectors ``[..., d]`` of the uncertain parameters."""
    free = native.network.free
    return restrict(native.posterior.covariance_matvec(embed(vector, free)), free)


def square_norm(native: Laplace, value: Tensor) -> Tensor:
    """Of ``value - mean`` under the precision, for uncertain parameters ``[..., d] -> [...]``."""
    free, posterior = native.network.free, native.posterior
    whole = posterior.mean.to(value.dtype).expand(*value.shape[:-1], -1).clone()
    whole[..., slice(None) if free is None else free] = value
    return posterior.square_norm(whole)


def functional_variance(native: Laplace, jacobians: Tensor) -> Tensor:
    """Output covariances of Jacobians, ``[N, C, d] -> [N, C, C]``."""
    return jacobians @ covariance_matvec(native, jacobians).mT


def functional_covariance(native: Laplace, jacobians: Tensor) -> Tensor:
    """Joint output covariance of Jacobians, ``[N, C, d] -> [N * C, N * C]``."""
    rows = jacobians.flatten(0, 1)
    return rows @ covariance_matvec(native, rows).mT


def left_out_matters(posterior: Posterior) -> bool:
    """Whether directions that a low rank leaves out could add more than a nat to the log marginal likelihood."""
    return not posterior.basis.complete and posterior.left_out is not None and posterior.left_out_log_det[1] > 2.0
