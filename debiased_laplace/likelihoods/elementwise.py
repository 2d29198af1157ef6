"""Any likelihood that is a sum over outputs, from a log density that somebody writes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace.likelihoods import _numerics
from debiased_laplace.likelihoods.base import Independent, Moments, checked_normals


class Elementwise(Independent):
    r"""A likelihood whose derivatives come from automatic differentiation.

    .. math:: \ell = -\sum_c \log p(y_c \mid f_c)

    Args:
        log_density: A function of outputs ``[N, C]`` and targets to log densities ``[N, C]`` (or ``[N]`` for one
            output), twice differentiable in torch and concave in the outputs, each value a function of its output.
        inverse_link: Mean of the target for given outputs, ``[..., C] -> [..., C]``, entry by entry; without it there
            are scores and samples of outputs, and no predictions.
        variance: Variance of the target for given outputs, likewise; needed for :meth:`predictive_moments` alone.

    Example:
        >>> import torch
        >>> from debiased_laplace.likelihoods import Elementwise
        >>> waiting = Elementwise(lambda f, y: f - f.exp() * y, inverse_link=lambda f: (-f).exp())  # exponential
        >>> waiting.hessian_square_root(torch.zeros(1, 1), torch.tensor([[4.0]]))
        tensor([[[2.]]])
    """

    links = ("quadrature", "mc")
    no_temperature = "A log density has no class probabilities"

    def __init__(
        self,
        log_density: Callable[[Tensor, Tensor], Tensor],
        inverse_link: Callable[[Tensor], Tensor] | None = None,
        variance: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.log_density = log_density
        self._inverse_link, self._variance = inverse_link, variance

    def check_targets(self, targets: Tensor, n_outputs: int) -> None:
        if targets.is_floating_point():
            _checks.finite(targets, "the targets", "Look for NaN or infinity in the training data.")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._losses(outputs, targets).sum(-1)

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of every output, ``[..., N, C]``."""
        n, c = outputs.shape[-2:]
        rows = outputs.reshape(-1, c)
        repeated = targets if len(rows) == n else targets.repeat(len(rows) // max(n, 1), *[1] * (targets.ndim - 1))
        values = self.log_density(rows, repeated.to(outputs.device))
        if values.shape == (len(rows),) and c == 1:
            values = values[:, None]
        if values.shape != rows.shape:
            raise ValueError(
                f"Expected a log_density that returns one value for each output, of shape {tuple(rows.shape)}, got "
                f"{tuple(values.shape)} for outputs of that shape and targets of shape {tuple(repeated.shape)}. Do "
                "not sum over outputs, and give the targets the shape of the outputs."
            )
        return -values.reshape(outputs.shape)

    def root_diagonal(self, outputs: Tensor, targets: Tensor) -> Tensor:
        second = self._second(outputs, targets, torch.ones_like(outputs))
        _checks.finite(second, "the second derivatives of log_density", "Look at its value for these outputs.")
        tolerance = 1e3 * torch.finfo(outputs.dtype).eps * second.abs().amax() if second.numel() else 0.0
        # Along another direction: the product with a diagonal matrix is known.
        weights = 1 + torch.arange(outputs.shape[1], device=outputs.device).to(outputs)
        if outputs.shape[1] > 1:
            mixed = (self._second(outputs, targets, weights.expand_as(outputs)) - weights * second).abs()
            if bool((mixed > outputs.shape[1] * tolerance).any()):
                raise ValueError(
                    "Expected a log_density whose value for an output depends on that output alone, got one with mixed "
                    "second derivatives. Derive from Likelihood, and write hessian_square_root."
                )
        if bool((second < -tolerance).any()):
            n, c = (int(i) for i in (second < -tolerance).nonzero()[0])
            raise ValueError(
                "Expected a log_density that is concave in the outputs, got a second derivative of "
                f"{-float(second[n, c]):.4g} in output {c} of a datum with outputs {_few(outputs[n])} and target "
                f"{_few(targets[n])}: it has no Gauss-Newton matrix. Let the network give other parameters (the "
                "natural ones of an exponential family), or override root_diagonal with roots of the Fisher "
                "information."
            )
        return second.clamp_min(0).sqrt()

    def _second(self, outputs: Tensor, targets: Tensor, direction: Tensor) -> Tensor:
        """Hessians of the losses times a direction, ``[N, C]``."""
        return _numerics.directional_derivatives(lambda f: self._losses(f, targets), outputs, direction)[1]

    # -- predictions ---------------------------------------------------------------------------

    def inverse_link(self, outputs: Tensor) -> Tensor:
        if self._inverse_link is None:
            raise TypeError(
                "Expected an Elementwise likelihood with an inverse_link for predictions, got none. Make it with "
                "Elementwise(log_density, inverse_link=...), the mean of the target for given outputs."
            )
        return self._inverse_link(outputs)

    def predictive(self, mean: Tensor, covariance: Tensor, link: str, normals: Tensor | None = None) -> Tensor:
        self.check_link(link)
        return self._average(self.inverse_link, mean, covariance, link, normals)

    @staticmethod
    def _average(
        function: Callable[[Tensor], Tensor], mean: Tensor, covariance: Tensor, link: str, normals: Tensor | None
    ) -> Tensor:
        if link == "mc":
            return _numerics.sampled_mean(function, mean, covariance, checked_normals(normals))
        return _numerics.expectation(function, mean, covariance)

    @property
    def has_variance(self) -> bool:
        return self._variance is not None

    def predictive_moments(
        self,
        mean: Tensor,
        covariance: Tensor,
        link: str,
        normals: Tensor | None = None,
        noise_variance: float | Tensor = 1.0,
    ) -> Moments:
        if self._variance is None:
            raise TypeError(
                "Expected an Elementwise likelihood with a variance for predictive variances, got none. Make it with "
                "Elementwise(log_density, inverse_link=..., variance=...), that of the target for given outputs."
            )
        predicted = self.predictive(mean, covariance, link, normals)
        squares = self._average(lambda f: (self.inverse_link(f) - predicted).square(), mean, covariance, link, normals)
        return Moments(predicted, squares, self._average(self._variance, mean, covariance, link, normals))

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
        return _numerics.negative_log_expectation(lambda f: self._losses(f, targets), mean, covariance).sum(-1)


def _few(values: Tensor) -> str:
    shown = [f"{float(value):.4g}" for value in values.detach().flatten()[:4]]
    return ", ".join(shown + ["..."] * (values.numel() > 4))
