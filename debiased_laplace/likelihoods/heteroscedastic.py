r"""Regression whose noise the network knows: two outputs for each target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from debiased_laplace import _checks, _data
from debiased_laplace.likelihoods import _numerics
from debiased_laplace.likelihoods.base import Independent, Moments


class HeteroscedasticGaussian(Independent):
    r"""Regression with outputs ``[N, 2 K]``: K means m, then K logarithms s of the noise variance.

    .. math:: \ell = \sum_k \tfrac12 \big(e^{-s_k} (y_k - m_k)^2 + s_k + \log 2\pi\big)

    Targets are ``[N, K]``, or ``[N]`` for one. Any two numbers are a mean and a log variance, so that neither a network
    nor Gaussian outputs need a constraint. In these coordinates the loss is not convex. It is in the natural
    parameters :math:`\eta = (m e^{-s}, -\frac12 e^{-s})`, where its Hessian is the Fisher information whatever the
    target is (Immer et al., arXiv 2210.05667, have networks with these outputs). The Gauss-Newton matrix does not care
    which parameters a network ends in if the map between them counts as a part of it: the curvature here is that of the
    natural parameters, :math:`\mathrm{diag}(e^{-s}, \frac12)` in these outputs.

    Under Gaussian outputs (``link="exact"``) the mean of a target is that of m, the epistemic variance that of m, and
    the noise variance :math:`\mathrm E\,e^s = e^{\bar s + v_s / 2}`. Predictive densities are integrals over s,
    by quadrature; their covariance with m counts.
    """

    links = ("exact", "mc")
    no_temperature = "A regression has no link"

    def check_targets(self, targets: Tensor, n_outputs: int) -> None:
        if n_outputs % 2:
            raise ValueError(
                "Expected a network with two outputs for each target, means and then logarithms of variances, got "
                f"{n_outputs} outputs. For one output and one noise variance use Gaussian()."
            )
        if targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(f"Expected real numbers as targets of a regression, got {targets.dtype}.")
        _data.target_rows(targets, n_outputs // 2)
        _checks.finite(targets, "the targets", "Look for NaN or infinity in the training data.")

    def prepare_targets(self, targets: Tensor, n_outputs: int) -> Tensor:
        """``[N, K]``, of a floating-point dtype."""
        rows = _data.target_rows(super().prepare_targets(targets, n_outputs), n_outputs // 2)
        return rows if rows.is_floating_point() else rows.double()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean, log_variance = outputs.chunk(2, -1)
        errors = _data.target_rows(targets, mean.shape[1]).to(outputs) - mean
        return 0.5 * ((-log_variance).exp() * errors.square() + log_variance + math.log(2 * math.pi)).sum(-1)

    def curvature_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean, log_variance = outputs.chunk(2, -1)
        at_mean, at_log_variance = mean.detach(), log_variance.detach()
        precision = (-at_log_variance).exp()
        change = log_variance - at_log_variance
        first = precision * (mean - at_mean * change)  # natural parameters, linear in the outputs
        second = -0.5 * precision * (1 - change)
        y = _data.target_rows(targets, mean.shape[1]).to(outputs)
        log_partition = -first.square() / (4 * second) - 0.5 * (-2 * second).log()
        return (log_partition - first * y - second * y.square() + 0.5 * math.log(2 * math.pi)).sum(-1)

    def root_diagonal(self, outputs: Tensor, targets: Tensor) -> Tensor:
        _, log_variance = outputs.chunk(2, -1)
        return torch.cat([(-0.5 * log_variance).exp(), torch.full_like(log_variance, math.sqrt(0.5))], -1)

    def inverse_link(self, outputs: Tensor) -> Tensor:
        return outputs.chunk(2, -1)[0]

    def needs_covariance(self, link: str) -> bool:
        return True

    def predictive(self, mean: Tensor, covariance: Tensor, link: str, normals: Tensor | None = None) -> Tensor:
        self.check_link(link)
        if link == "mc":
            return super().predictive(mean, covariance, link, normals)
        return mean.expand(covariance.shape[:-1]).chunk(2, -1)[0]

    def predictive_moments(
        self,
        mean: Tensor,
        covariance: Tensor,
        link: str,
        normals: Tensor | None = None,
        noise_variance: float | Tensor = 1.0,
    ) -> Moments:
        predicted = self.predictive(mean, covariance, link, normals)
        if link == "mc":
            assert normals is not None

            def average(values: Tensor) -> Tensor:
                means, log_variances = values.chunk(2, -1)
                return torch.cat([means.square(), log_variances.exp()], -1)

            squares, noise = _numerics.sampled_mean(average, mean, covariance, normals).chunk(2, -1)
            return Moments(predicted, (squares - predicted.square()).clamp_min(0), noise)
        epistemic, of_log_variance = covariance.diagonal(dim1=-2, dim2=-1).chunk(2, -1)
        noise = (mean.chunk(2, -1)[1] + 0.5 * of_log_variance).exp()
        return Moments(predicted, epistemic, noise)

    def negative_log_predictive(
        self,
        mean: Tensor,
        covariance: Tensor,
        targets: Tensor,
        link: str,
        normals: Tensor | None = None,
        noise_variance: float | Tensor = 1.0,
    ) -> Tensor:
        self.check_link(link)
        if link == "mc":
            return super().negative_log_predictive(mean, covariance, targets, link, normals)
        n_targets = mean.shape[-1] // 2
        y = _data.target_rows(targets, n_targets).to(mean)
        means, log_variances = mean.chunk(2, -1)
        of_mean, of_log_variance = covariance.diagonal(dim1=-2, dim2=-1).chunk(2, -1)
        between = covariance.diagonal(n_targets, -2, -1)
        # Given s the mean is Gaussian, and so is the target.
        slope = torch.where(of_log_variance > 0, between / of_log_variance, 0.0)
        rest = (of_mean - slope * between).clamp_min(0)

        def losses(s: Tensor) -> Tensor:
            total = s.exp() + rest
            errors = y - means - slope * (s - log_variances)
            return 0.5 * (errors.square() / total + total.log() + math.log(2 * math.pi))

        return _numerics.negative_log_expectation(losses, log_variances, of_log_variance).sum(-1)
