"""Regression with a noise variance beside the network, one number or one for each output."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _checks, _data
from debiased_laplace.likelihoods import _numerics
from debiased_laplace.likelihoods.base import Independent, Moments


class Gaussian(Independent):
    r"""Unit-variance regression, :math:`\ell = \frac12 \|f - y\|^2`; targets ``[N, C]``, or ``[N]`` for one output.

    The noise variance :math:`\sigma^2` is part of the posterior, not of the likelihood: it enters in
    equation (3), and predictions are told.
    """

    links = ("probit", "mc", "bridge", "bridge_norm")  # accepted and without effect, as in laplace-torch
    laplace_torch_name = "regression"
    has_noise = True
    no_temperature = "A regression has no link"

    def check_targets(self, targets: Tensor, n_outputs: int) -> None:
        if targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(f"Expected real numbers as targets of a regression, got {targets.dtype}.")
        _data.target_rows(targets, n_outputs)
        _checks.finite(targets, "the targets", "Look for NaN or infinity in the training data.")

    def prepare_targets(self, targets: Tensor, n_outputs: int) -> Tensor:
        """``[N, C]``, of a floating-point dtype."""
        rows = _data.target_rows(super().prepare_targets(targets, n_outputs), n_outputs)
        return rows if rows.is_floating_point() else rows.double()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - _data.target_rows(targets, outputs.shape[1]).to(outputs)).square().sum(-1)

    def negative_log_likelihood(self, outputs: Tensor, targets: Tensor, noise_variance: float | Tensor = 1.0) -> Tensor:
        return self.negative_log_predictive(
            outputs, torch.zeros_like(outputs), targets, "probit", noise_variance=noise_variance
        )

    def noise_of_outputs(self, noise_variance: float | Tensor, like: Tensor) -> Tensor:
        """Noise variance of every output from the one beside the network: ``[]`` or ``[C]``."""
        return torch.as_tensor(noise_variance, dtype=like.dtype, device=like.device)

    def root_diagonal(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.ones_like(outputs)

    def hessian_square_root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _numerics.unit_vectors(outputs)

    def inverse_link(self, outputs: Tensor) -> Tensor:
        return outputs

    def needs_covariance(self, link: str) -> bool:
        return False

    def predictive(self, mean: Tensor, covariance: Tensor, link: str, normals: Tensor | None = None) -> Tensor:
        self.check_link(link)
        return mean.expand_as(covariance)

    def predictive_moments(
        self,
        mean: Tensor,
        covariance: Tensor,
        link: str,
        normals: Tensor | None = None,
        noise_variance: float | Tensor = 1.0,
    ) -> Moments:
        noise = self.noise_of_outputs(noise_variance, mean).expand_as(covariance)
        return Moments(self.predictive(mean, covariance, link), covariance, noise)

    def negative_log_predictive(
        self,
        mean: Tensor,
        covariance: Tensor,
        targets: Tensor,
        link: str,
        normals: Tensor | None = None,
        noise_variance: float | Tensor = 1.0,
    ) -> Tensor:
        targets = _data.target_rows(targets, mean.shape[-1]).to(mean.device)
        return gaussian_nll(mean, covariance, targets, self.noise_of_outputs(noise_variance, mean))

    def negative_log_predictive_of_samples(
        self, samples: Tensor, targets: Tensor, noise_variance: float | Tensor = 1.0
    ) -> Tensor:
        """Of the Gaussian with the samples' mean and variance, as laplace-torch has it: ``[N]``, in nats."""
        return self.negative_log_predictive(
            samples.mean(0), samples.var(0), targets, "probit", noise_variance=noise_variance
        )


class ProfiledGaussian(Gaussian):
    r"""Regression with noise of another size in every output, :math:`\ell = \frac12 \|(f - y) / r\|^2`.

    Args:
        profile: ``r: [C]``, positive, with geometric mean one.
    """

    def __init__(self, profile: Tensor) -> None:
        self.profile = profile

    def settings(self) -> dict[str, Any]:
        return {"profile": self.profile}

    def check_targets(self, targets: Tensor, n_outputs: int) -> None:
        """Raise also if there is not one noise for each output."""
        super().check_targets(targets, n_outputs)
        if len(self.profile) != n_outputs:
            raise ValueError(
                f"Expected sigma_noise to be one number or one for each of the {n_outputs} outputs, got "
                f"{len(self.profile)}."
            )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``[N]``, in units of the noise variance of equation (3)."""
        errors = outputs - _data.target_rows(targets, outputs.shape[1]).to(outputs)
        return 0.5 * (errors / self.profile.to(outputs)).square().sum(-1)

    def noise_of_outputs(self, noise_variance: float | Tensor, like: Tensor) -> Tensor:
        """``[C]``."""
        return super().noise_of_outputs(noise_variance, like) * self.profile.to(like).square()

    def root_diagonal(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``[N, C]``, inverse profile."""
        return self.profile.to(outputs).reciprocal().expand_as(outputs)

    def hessian_square_root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``[C, N, C]``, the unit vectors divided by the profile."""
        return super().hessian_square_root(outputs, targets) / self.profile.to(outputs)


def gaussian_nll(mean: Tensor, variance: Tensor, targets: Tensor, noise_variance: float | Tensor) -> Tensor:
    """Negative log predictive density of every datum, summed over outputs: ``[..., N]``, in nats."""
    total = variance + noise_variance
    return 0.5 * ((targets - mean).square() / total + total.log() + math.log(2 * math.pi)).sum(-1)
