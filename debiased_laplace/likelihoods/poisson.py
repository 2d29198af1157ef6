"""Counts: a Poisson distribution with a rate whose logarithm the network gives."""

from __future__ import annotations

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.likelihoods import _numerics
from debiased_laplace.likelihoods.base import Independent, Moments


class Poisson(Independent):
    r"""Counts with rates :math:`e^f`, independent for each output; targets ``[N, C]``, or ``[N]`` for one output.

    .. math:: \ell = \sum_c \big(e^{f_c} - y_c f_c + \log y_c!\big), \qquad \nabla^2_f \ell = \mathrm{diag}(e^f)

    The loss has its constant, and so have marginal likelihoods and predictive probabilities. Under Gaussian outputs of
    mean m and variance v (``link="exact"``) rates are log-normal: their mean is :math:`e^{m + v/2}`, and their variance
    :math:`e^{2m + v}(e^v - 1)`, to which the counts add their own, the mean rate. Predictive probabilities are
    integrals over one output, by quadrature.

    Example:
        >>> import torch
        >>> from debiased_laplace.likelihoods import Poisson
        >>> float(Poisson().predictive(torch.zeros(1, 1), torch.full((1, 1), 2.0), "exact"))  # e
        2.7182817459106445
    """

    links = ("exact", "mc")
    no_temperature = "A count has no class probabilities"

    def check_targets(self, targets: Tensor, n_outputs: int) -> None:
        if targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(f"Expected counts as targets, got {targets.dtype}. Use targets.long().")
        _data.target_rows(targets, n_outputs)
        wrong = ~((targets >= 0) & (targets == targets.round()) & targets.isfinite())
        if bool(wrong.any()):
            raise ValueError(
                f"Expected counts as targets, the whole numbers from 0 on, got {float(targets[wrong][0]):g}. For "
                "rates or logarithms of counts use a regression."
            )

    def prepare_targets(self, targets: Tensor, n_outputs: int) -> Tensor:
        """``[N, C]``."""
        return _data.target_rows(super().prepare_targets(targets, n_outputs), n_outputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _losses(outputs, _data.target_rows(targets, outputs.shape[1]).to(outputs)).sum(-1)

    def root_diagonal(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (0.5 * outputs).exp()

    def inverse_link(self, outputs: Tensor) -> Tensor:
        return outputs.exp()

    def predictive(self, mean: Tensor, covariance: Tensor, link: str, normals: Tensor | None = None) -> Tensor:
        self.check_link(link)
        if link == "mc":
            return super().predictive(mean, covariance, link, normals)
        return (mean + 0.5 * covariance).exp()

    def predictive_moments(
        self,
        mean: Tensor,
        covariance: Tensor,
        link: str,
        normals: Tensor | None = None,
        noise_variance: float | Tensor = 1.0,
    ) -> Moments:
        rate = self.predictive(mean, covariance, link, normals)
        if link == "mc":
            squares = _numerics.sampled_mean(lambda f: (2 * f).exp(), mean, covariance, normals)  # type: ignore[arg-type]
            return Moments(rate, (squares - rate.square()).clamp_min(0), rate)
        return Moments(rate, rate.square() * covariance.expm1(), rate)

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
        counts = _data.target_rows(targets, mean.shape[-1]).to(mean)
        return _numerics.negative_log_expectation(lambda f: _losses(f, counts), mean, covariance).sum(-1)

    def deviance(self, rates: Tensor, targets: Tensor) -> Tensor:
        r"""Deviance of predicted rates, :math:`2 \sum_c \big(y_c \log \frac{y_c}{\mu_c} - y_c + \mu_c\big)`.

        Args:
            rates: :math:`\mu`, ``[..., N, C]``, positive.
            targets: ``[N, C]``, or ``[N]`` for one output.

        Returns:
            ``[..., N]``: zero where the rate is the count.
        """
        counts = _data.target_rows(targets, rates.shape[-1]).to(rates)
        return 2 * (torch.xlogy(counts, counts) - torch.xlogy(counts, rates) - counts + rates).sum(-1)


def _losses(outputs: Tensor, counts: Tensor) -> Tensor:
    """Of every output, ``[..., N, C]``."""
    return outputs.exp() - counts * outputs + torch.lgamma(counts + 1)
