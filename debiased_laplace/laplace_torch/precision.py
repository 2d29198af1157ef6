"""``posterior_precision`` of Kronecker-factored curvature, with the methods of laplace-torch's ``KronDecomposed``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from debiased_laplace.curvature.basis import Basis
from debiased_laplace.posterior.gaussian import Posterior


@dataclass(frozen=True)
class KroneckerPrecision:
    r"""A symmetric matrix :math:`P = U \mathrm{diag}(v) U^\top` with a complete Kronecker basis, ``[D, D]``.

    Unlike laplace-torch's, its eigenvalues need not be products: they are one for each direction.

    Attributes:
        basis: U.
        eigenvalues: v, ``[D]``, float64.
        dtype: Precision of what the methods without a vector return.
    """

    basis: Basis
    eigenvalues: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, posterior: Posterior, dtype: torch.dtype) -> KroneckerPrecision:
        """The posterior precision; of parts whose parameters have several prior precisions, in eigenvectors of it."""
        basis, prior = posterior.basis, posterior.prior_precision
        if posterior.normal_form is posterior:
            return cls(basis, posterior.precisions, dtype)
        priors = basis.matrices(prior.to(posterior.curvatures.device, torch.float64))
        parts, eigenvalues = [], []
        curvatures = basis.split(posterior.scale * posterior.curvatures.double())
        for index, (part, scaled) in enumerate(zip(basis.parts, curvatures, strict=True)):
            turned, values = part.eigenform(scaled, [priors[index]])
            parts.append(turned)
            eigenvalues.append(values)
        own_basis = replace(basis, parts=parts)
        return cls(own_basis, own_basis.join(eigenvalues), dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """``(D, D)``."""
        return self.basis.n_params, self.basis.n_params

    def __len__(self) -> int:
        """Number of curvature blocks."""
        return len(self.basis.blocks)

    def bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        r""":math:`P^e w` of vectors ``[..., D]``, in their shape."""
        along = self.basis.project(W) * self.eigenvalues.pow(exponent).to(W.dtype)
        return self.basis.lift(along).to(W.dtype)

    def inv_square_form(self, W: Tensor) -> Tensor:
        r""":math:`W P^{-1} W^\top`, ``[N, C, D] -> [N, C, C]``."""
        return W @ self.bmm(W, exponent=-1).mT

    def matvec(self, vector: Tensor) -> Tensor:
        r""":math:`P v` of vectors ``[..., D]``."""
        return self.bmm(vector, exponent=1)

    def __matmul__(self, other: Tensor) -> Tensor:
        r""":math:`P M`, ``[D] -> [D]`` or ``[..., D, K] -> [..., D, K]``."""
        return self.matvec(other) if other.ndim == 1 else self.matvec(other.mT).mT

    def logdet(self) -> Tensor:
        r""":math:`\log\det P`."""
        return self.eigenvalues.log().sum().to(self.dtype)

    def diag(self, exponent: float = 1) -> Tensor:
        r"""Diagonal of :math:`P^e`, ``[D]``; costs no more than one product with a vector."""
        squared = replace(self.basis, parts=[part.squared() for part in self.basis.parts])
        return squared.lift(self.eigenvalues.pow(exponent).to(self.dtype))

    def to_matrix(self, exponent: float = 1) -> Tensor:
        r""":math:`P^e` as a dense matrix ``[D, D]``; for small networks."""
        unit = torch.eye(self.basis.n_params, dtype=self.dtype, device=self.eigenvalues.device)
        return self.bmm(unit, exponent)

    def detach(self) -> KroneckerPrecision:
        """The same without gradients."""
        return replace(self, eigenvalues=self.eigenvalues.detach())
