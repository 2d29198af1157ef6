r"""What matrices that are sums of outer products share: products with :math:`V V^\top` and its damped inverse.

V is ``[D, m]`` with m far below D, and everything goes through the Gram matrix :math:`V^\top V`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace.curvature.structures.lowrank import is_nonzero

#: From eigenvalues and eigenvectors of the Gram matrix, and coefficients ``[k, m]``, to other coefficients.
Inner = Callable[[Tensor, Tensor, Tensor], Tensor]


class GramProducts(ABC):
    r"""A matrix :math:`C = V V^\top`, which is never formed, as a linear operator."""

    #: Relative precision of the entries of the Gram matrix.
    gram_precision: float

    def matvec(self, vector: Tensor, damping: float = 0.0) -> Tensor:
        r""":math:`(C + \delta I) v`, ``[..., D] -> [..., D]``, float64."""
        damping = _checks.nonnegative(damping, "damping")
        product = self._apply(vector, lambda values, vectors, c: c)
        return product + damping * vector.to(product)

    def inverse_matvec(self, vector: Tensor, damping: float = 0.0) -> Tensor:
        r""":math:`(C + \delta I)^{-1} v`, ``[..., D] -> [..., D]``, float64; the pseudo-inverse if the damping is zero.

        By the matrix inversion lemma, :math:`\frac1\delta (v - V (\delta I + V^\top V)^{-1} V^\top v)`.
        """
        damping = _checks.nonnegative(damping, "damping")

        def solve(values: Tensor, vectors: Tensor, coefficients: Tensor) -> Tensor:
            if damping:
                scales = (values.clamp_min(0) + damping).reciprocal()
            else:
                nonzero = is_nonzero(values, len(values), self.gram_precision)
                scales = torch.where(nonzero, values, torch.inf).square().reciprocal()
            return ((coefficients @ vectors) * scales) @ vectors.mT

        applied = self._apply(vector, solve)
        return (vector.to(applied) - applied) / damping if damping else applied

    @abstractmethod
    def _apply(self, vector: Tensor, inner: Inner) -> Tensor:
        r""":math:`V M V^\top v`, ``[..., D] -> [..., D]``, float64, with a map M of coefficients ``[k, m]``."""
