r"""The Gaussian posterior over the parameters; every formula of it, once for all structures.

.. math::
    P = U \mathrm{diag}(\beta\lambda + \delta) U^\top + \delta (I - U U^\top),
    \qquad \beta = \frac{N}{\sigma^2 T}                                                  \tag{3}

N, the noise variance, the temperature and the prior precision enter here and nowhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace.basis import Basis


@dataclass(frozen=True)
class Posterior:
    r"""Gaussian :math:`\mathcal N(\theta^*, P^{-1})`; change a field with :func:`dataclasses.replace`.

    Attributes:
        mean: ``[D]``, the trained parameters.
        basis: Orthonormal directions U.
        curvatures: ``[rank]``, per-datum mean curvatures along them, non-negative.
        n_data: N, the number of data in the training set (not of those the curvature was measured on).
        prior_precision: One number, or one for each block, ``[1]`` or ``[n_blocks]``, float64.
        temperature: T; below one concentrates the posterior.
        noise_variance: The observation noise variance of a regression; one otherwise.
        prior_mean: A number, or ``[D]``.
    """

    mean: Tensor
    basis: Basis
    curvatures: Tensor
    n_data: int
    prior_precision: Tensor
    temperature: float = 1.0
    noise_variance: float | Tensor = 1.0
    prior_mean: float | Tensor = 0.0

    def __post_init__(self) -> None:
        _checks.prior_precisions(self.prior_precision, len(self.basis.parts))
        _checks.positive(self.temperature, "temperature")
        _checks.positive(self.noise_variance, "noise variance")
        if not isinstance(self.n_data, int) or self.n_data < 1:
            raise ValueError(f"Expected a positive number of training data n_data, got {self.n_data!r}.")
        if self.curvatures.shape != (self.basis.rank,):
            raise ValueError(
                f"Expected one curvature for each of the {self.basis.rank} directions, got shape "
                f"{tuple(self.curvatures.shape)}."
            )
        if not bool(((self.curvatures >= 0) & self.curvatures.isfinite()).all()):
            raise ValueError("Expected finite, non-negative curvatures: equation (2) is a sum of squares.")

    @property
    def scale(self) -> float | Tensor:
        r""":math:`\beta`, from a per-datum mean to the data's precision."""
        return self.n_data / (self.noise_variance * self.temperature)

    @property
    def precisions(self) -> Tensor:
        r"""Eigenvalues :math:`\beta\lambda + \delta` of P along the basis, ``[rank]``, float64."""
        return self.scale * self.curvatures.double() + self._column_prior

    @property
    def _column_prior(self) -> Tensor:
        return self.basis.per_column(self.prior_precision.to(self.curvatures.device, torch.float64))

    @property
    def _parameter_prior(self) -> Tensor:
        return self.basis.per_parameter(self.prior_precision.to(self.curvatures.device, torch.float64))

    @property
    def log_det_precision(self) -> Tensor:
        r""":math:`\log\det P`, a float64 scalar."""
        return self.log_det_prior_precision + self.log_det_ratio

    @property
    def log_det_prior_precision(self) -> Tensor:
        r""":math:`\log\det P_0` of the prior."""
        return self._parameter_prior.log().sum()

    @property
    def log_det_ratio(self) -> Tensor:
        r""":math:`\log\det P - \log\det P_0`, summed as log1p so that small curvatures are not lost."""
        return torch.log1p(self.scale * self.curvatures.double() / self._column_prior).sum()

    def matvec(self, vector: Tensor) -> Tensor:
        r""":math:`P v`, ``[..., D] -> [..., D]``."""
        return self._apply(vector, self.precisions, self._parameter_prior)

    def covariance_matvec(self, vector: Tensor) -> Tensor:
        r""":math:`P^{-1} v`, ``[..., D] -> [..., D]``."""
        return self._apply(vector, self.precisions.reciprocal(), self._parameter_prior.reciprocal())

    def square_norm(self, value: Tensor) -> Tensor:
        r""":math:`(\theta - \theta^*)^\top P (\theta - \theta^*)`, ``[..., D] -> [...]``, float64."""
        delta = value - self.mean
        along = self.basis.project(delta)
        norm = (self.precisions * along.double().square()).sum(-1)
        if not self.basis.complete:
            rest = (delta - self.basis.lift(along)).double()
            norm = norm + (self._parameter_prior * rest.square()).sum(-1)
        return norm

    def scatter(self) -> Tensor:
        r""":math:`(\theta^* - \mu_0)^\top P_0 (\theta^* - \mu_0)`, a float64 scalar."""
        return (self._parameter_prior * (self.mean - self.prior_mean).double().square()).sum()

    def log_marginal_likelihood(self, log_likelihood: Tensor | float) -> Tensor:
        r"""Laplace approximation of the log marginal likelihood, in nats.

        .. math:: \log p(\mathcal D \mid \theta^*)
            - \tfrac12 \big(\log\det P - \log\det P_0 + \|\theta^* - \mu_0\|^2_{P_0}\big)
        """
        return log_likelihood - 0.5 * (self.log_det_ratio + self.scatter())

    def transform(self, normals: Tensor) -> Tensor:
        r"""Map S of standard normal vectors to deviations: :math:`S S^\top = P^{-1}`.

        Args:
            normals: ``[..., D]`` for a complete basis, otherwise ``[..., rank + D]``.

        Returns:
            ``[..., D]``, deviations from the mean.
        """
        along = normals[..., : self.basis.rank] * self.precisions.rsqrt().to(normals.dtype)
        deviation = self.basis.lift(along)
        if not self.basis.complete:
            rest = normals[..., self.basis.rank :]
            rest = rest - self.basis.lift(self.basis.project(rest))
            deviation = deviation + rest * self._parameter_prior.rsqrt().to(normals.dtype)
        return deviation

    def deviations(self, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the parameters minus the mean, ``[n_samples, D]``."""
        if n_samples < 1:
            raise ValueError(f"Expected at least one sample, got n_samples={n_samples}.")
        size = self.basis.rank if self.basis.complete else self.basis.rank + self.basis.n_params
        return self.transform(standard_normals((n_samples, size), self.mean, generator))

    def sample(self, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the parameters, ``[n_samples, D]``."""
        return self.mean + self.deviations(n_samples, generator)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at parameters ``[..., D]``, in nats."""
        constant = 0.5 * (self.log_det_precision - self.basis.n_params * math.log(2 * math.pi))
        return constant - 0.5 * self.square_norm(value)

    def _apply(self, vector: Tensor, along: Tensor, prior: Tensor) -> Tensor:
        coefficients = self.basis.project(vector)
        result = self.basis.lift(coefficients * along.to(vector.dtype))
        if not self.basis.complete:
            result = result + prior.to(vector.dtype) * (vector - self.basis.lift(coefficients))
        return result


def standard_normals(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers from a generator of any device, on the device and in the dtype of ``like``."""
    device = generator.device if generator is not None else like.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)
