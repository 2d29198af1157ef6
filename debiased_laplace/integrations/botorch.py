r"""A surrogate of BoTorch: joint predictions of a regression, with gradients in the inputs.

The outputs of the linearised network at points :math:`x_i` are jointly Gaussian,

.. math:: \mathrm{Cov}[f(x_i), f(x_j)] = J(x_i) P^{-1} J(x_j)^\top,

and differentiable in the points where the network is: acquisition functions can be optimised with their gradients.
Jacobians are formed point by point, ``C D`` numbers for each, which suits the small networks of such problems.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from debiased_laplace._guards import full_precision, gradients_enabled
from debiased_laplace.integrations import require
from debiased_laplace.laplace import Laplace
from debiased_laplace.network.forward_mode import PlainAttention
from debiased_laplace.posterior.prediction import noise_of_certain_outputs

require("botorch", "botorch")

from botorch.acquisition.objective import PosteriorTransform  # noqa: E402
from botorch.models.model import Model  # noqa: E402
from botorch.posteriors.gpytorch import GPyTorchPosterior  # noqa: E402
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal  # noqa: E402
from linear_operator import to_linear_operator  # noqa: E402

__all__ = ["LaplaceModel"]


class LaplaceModel(Model):
    """A fitted posterior of a regression as a model of BoTorch.

    Acquisition functions, their optimisers and samplers take it as they take a Gaussian process. It has no training of
    its own: fit another posterior when there are other data.

    Args:
        posterior: Of a network ``[N, d] -> [N, C]``, better in float64, as BoTorch asks for.

    Raises:
        ValueError: If it is not one of a regression with a noise variance, or of dense outputs.

    Example:
        >>> import torch, debiased_laplace as dl
        >>> from botorch.acquisition import LogExpectedImprovement
        >>> x = torch.rand(20, 2).double()
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        >>> posterior = dl.fit(network, [(x, x.sum(1, keepdim=True))], "regression", noise_variance=0.01)
        >>> model = LaplaceModel(posterior)
        >>> LogExpectedImprovement(model, best_f=1.5)(x[:4, None]).shape
        torch.Size([4])
    """

    def __init__(self, posterior: Laplace) -> None:
        super().__init__()
        if not posterior.likelihood.has_noise or posterior.network.sites is not None:
            raise ValueError(
                "Expected the posterior of a regression with outputs [N, C] and one noise variance, got one of "
                f"{posterior.likelihood!r}. Fit it with likelihood='regression'."
            )
        self.laplace = posterior

    @property
    def num_outputs(self) -> int:
        """Number of outputs C of the network."""
        return self.laplace.network.n_outputs

    @property
    def batch_shape(self) -> torch.Size:
        """Of the model: one posterior."""
        return torch.Size()

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> Any:
        """Joint distribution of the outputs at q points, of any number of batches.

        Args:
            X: ``[..., q, d]``.
            output_indices: Which outputs; all of them by default.
            observation_noise: Whether the noise of the observations is added.
            posterior_transform: What BoTorch applies to the result.

        Returns:
            A ``GPyTorchPosterior`` with the mean ``[..., q, C]``, differentiable in X.
        """
        if isinstance(observation_noise, Tensor):
            raise NotImplementedError(
                "Expected observation_noise to be True or False, got a tensor. The posterior has its own noise."
            )
        mean, covariance = self._joint(X.reshape(-1, X.shape[-1]), X.shape[-2])
        if observation_noise:
            noise = noise_of_certain_outputs(self.laplace.likelihood, mean, self.laplace.posterior.noise_variance)
            covariance = covariance + torch.diag_embed(noise.flatten(1))
        batch, q, chosen = X.shape[:-2], X.shape[-2], output_indices
        every = range(self.num_outputs)
        if any(not -len(every) <= of < len(every) for of in chosen or ()):
            raise IndexError(f"Expected output_indices of {len(every)} outputs, got {list(output_indices or ())}.")
        chosen = list(every) if chosen is None else [every[of] for of in chosen]
        places = (torch.arange(q)[:, None] * self.num_outputs + torch.tensor(chosen)).flatten().to(X.device)
        mean = mean[..., chosen].reshape(*batch, q, len(chosen)).to(X)
        matrices = covariance[:, places][:, :, places].reshape(*batch, len(places), len(places)).to(X)
        covariance = to_linear_operator(matrices)  # semi-definite: decomposed when it is asked for, with jitter
        if len(chosen) == 1:
            normal = MultivariateNormal(mean[..., 0], covariance)
        else:
            normal = MultitaskMultivariateNormal(mean, covariance)
        result = GPyTorchPosterior(normal)
        return result if posterior_transform is None else posterior_transform(result)

    def _joint(self, points: Tensor, q: int) -> tuple[Tensor, Tensor]:
        """Outputs ``[B, q, C]`` at points ``[B q, d]``, and their covariances ``[B, q C, q C]``."""
        network, gaussian = self.laplace.network, self.laplace.posterior
        points = points.to(network.device, network.dtype)
        named = network.from_vector(gaussian.mean)

        def outputs(parameters: dict[str, Tensor], point: Tensor) -> Tensor:
            return network.call(parameters, point[None])[0]

        wanted = torch.is_grad_enabled() and points.requires_grad
        with gradients_enabled(), full_precision(), PlainAttention():
            # Weights of its own for every point: ``jacrev`` would lose terms of the gradient in the points, of torch's
            # layer norm for one.
            own = {name: p.expand(len(points), *p.shape).contiguous().requires_grad_() for name, p in named.items()}
            mean = torch.func.vmap(outputs)(own, points)
            rows = []
            for output in mean.unbind(1):
                gradients = torch.autograd.grad(
                    output.sum(), list(own.values()), create_graph=wanted, retain_graph=True, allow_unused=True,
                    materialize_grads=True,
                )  # fmt: skip
                rows.append(network.to_vector(dict(zip(own, gradients, strict=True))))
        with torch.set_grad_enabled(wanted), full_precision():
            jacobians = torch.stack(rows, 1).reshape(-1, q * self.num_outputs, rows[0].shape[-1])
            covariance = jacobians @ gaussian.covariance_matvec(jacobians).mT
        mean = mean.reshape(-1, q, self.num_outputs)
        return mean if wanted else mean.detach(), covariance
