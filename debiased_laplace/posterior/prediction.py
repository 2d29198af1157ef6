"""What is predicted: expectations and variances of targets, beside those of the network's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.gaussian import Posterior, standard_normals
from debiased_laplace.posterior.predictive import linearized_samples, weight_samples
from debiased_laplace.posterior.top_k import TOP_K, exact_outputs, say, top_k_moments

PREDICTION_METHODS = ("glm", "top_k", "linearized", "nn")


@dataclass(frozen=True)
class Predictive:
    """Predictive distribution of the targets of N data, by its first two moments.

    Of dense outputs, ``[N, C, ...]`` or ``[N, ..., C]`` as the model has them in the place of ``[N, C]``, for every
    site by itself.

    Attributes:
        mean: Expected targets, ``[N, C]``: class probabilities, rates, or means of a regression, in their units.
        epistemic_variance: What uncertain weights add to the variance of the targets, ``[N, C]``, in their squared
            units; None for probabilities, of which the mean tells everything, and for a likelihood without variance.
        noise_variance: Variance that targets have for certain weights, ``[N, C]``, likewise.
        outputs_mean: Mean of the network's outputs, ``[N, C]``, before temperature and link.
        outputs_variance: Their variance, ``[N, C]``, in squared units of the outputs.
        outputs_covariance: Their covariance, ``[N, C, C]``, if it was asked for or the link needs it; of dense outputs
            that of every site, ``[N, S, C, C]``, if it was asked for.
        has_probabilities: Whether the mean is one of probabilities.
    """

    mean: Tensor
    epistemic_variance: Tensor | None
    noise_variance: Tensor | None
    outputs_mean: Tensor
    outputs_variance: Tensor
    outputs_covariance: Tensor | None = None
    has_probabilities: bool = False

    def __len__(self) -> int:
        """Number of data."""
        return len(self.mean)

    @property
    def probabilities(self) -> Tensor:
        """Class probabilities ``[N, C]``; of independent labels the probability of each."""
        self._of_probabilities("probabilities", "mean and variance")
        return self.mean

    @property
    def logits_mean(self) -> Tensor:
        """Mean of the logits, ``[N, C]``, before the temperature."""
        self._of_probabilities("logits_mean", "outputs_mean")
        return self.outputs_mean

    @property
    def logits_variance(self) -> Tensor:
        """Variance of the logits, ``[N, C]``."""
        self._of_probabilities("logits_variance", "outputs_variance")
        return self.outputs_variance

    @property
    def variance(self) -> Tensor:
        """Variance of the targets, ``[N, C]``: epistemic and noise together; of a probability p, p (1 - p)."""
        if self.has_probabilities:
            return self.mean * (1 - self.mean)
        if self.epistemic_variance is None or self.noise_variance is None:
            raise AttributeError("Expected a likelihood with a variance for the variance of targets, got one without.")
        return self.epistemic_variance + self.noise_variance

    def _of_probabilities(self, name: str, instead: str) -> None:
        if not self.has_probabilities:
            raise AttributeError(f"Expected a classification for {name}, got another prediction. It has {instead}.")


def predict(
    network: Network,
    posterior: Posterior,
    likelihood: Likelihood,
    inputs: Any,
    *,
    method: str | None = None,
    link: str = "probit",
    n_samples: int = 100,
    top_k: int | None = None,
    output_temperature: float = 1.0,
    covariance: bool = False,
    generator: torch.Generator | None = None,
) -> Predictive:
    """The predictive distribution of the targets of N data.

    Args:
        network: The model with its blocks.
        posterior: The Gaussian over its parameters.
        likelihood: What the outputs mean.
        inputs: N data.
        method: One of :data:`PREDICTION_METHODS`; by default ``"glm"``, or ``"top_k"`` for many outputs
            (:func:`.exact_outputs`).
        link: How to integrate over Gaussian outputs, of ``"glm"`` and ``"top_k"``.
        n_samples: Draws for ``link="mc"`` and of the methods that sample.
        top_k: Outputs with exact moments, of ``"top_k"``.
        output_temperature: What outputs are divided by before the link.
        covariance: Also the covariance between the outputs of a datum.
        generator: Source of the draws.

    Raises:
        ValueError: For an unknown method or link.
    """
    if method is not None and method not in PREDICTION_METHODS:
        raise ValueError(f"Expected a method out of {list(PREDICTION_METHODS)}, got {method!r}.")
    if top_k is not None and method not in (None, "top_k"):
        raise ValueError(f"Expected method='top_k' with top_k={top_k!r}, got {method!r}.")
    tau, noise_variance = output_temperature, posterior.noise_variance
    if method in ("linearized", "nn"):
        deviations = posterior.deviations(n_samples, generator)
        evaluate = linearized_samples if method == "linearized" else weight_samples
        samples = evaluate(network, posterior.mean, deviations, inputs)
        means, centred = likelihood.inverse_link(samples / tau), samples - samples.mean(0)
        epistemic, noise = None, None
        if not likelihood.has_answers:
            epistemic, noise = means.var(0), _noise_of_samples(likelihood, samples / tau, noise_variance)
        return Predictive(
            means.mean(0), epistemic, noise, samples.mean(0), samples.var(0),
            torch.einsum("snc,snd->ncd", centred, centred) / (n_samples - 1) if covariance else None,
            likelihood.has_answers,
        )  # fmt: skip
    likelihood.check_link(link)
    needed = likelihood.needs_covariance(link)
    if method is None and top_k is None:
        k = exact_outputs(network, likelihood)
        say(network, likelihood, k)
    elif method == "glm":
        k = network.n_outputs
    else:
        k = exact_outputs(network, likelihood, TOP_K if top_k is None else top_k)
    outputs_mean, (moments,) = top_k_moments(
        network, [posterior], likelihood, inputs, k, covariance=needed or covariance
    )  # fmt: skip
    variance = moments.diagonal(dim1=1, dim2=2) if needed or covariance else moments
    normals = standard_normals((n_samples, network.n_outputs), outputs_mean, generator) if link == "mc" else None
    scaled = outputs_mean / tau, (moments if needed else variance) / tau**2
    mean, epistemic, noise = likelihood.predictive(*scaled, link, normals), None, None
    if likelihood.has_variance:
        of_targets = likelihood.predictive_moments(*scaled, link, normals, noise_variance)
        epistemic, noise = of_targets.epistemic_variance, of_targets.noise_variance
    symmetric = (moments + moments.mT) / 2 if needed or covariance else None  # torch's distributions look at that
    return Predictive(mean, epistemic, noise, outputs_mean, variance, symmetric, likelihood.has_answers)


def _noise_of_samples(likelihood: Likelihood, samples: Tensor, noise_variance: float | Tensor) -> Tensor | None:
    """Mean over outputs ``[S, N, C]`` of the variance that targets have for certain outputs, ``[N, K]``."""
    if not likelihood.has_variance:
        return None
    return torch.stack([noise_of_certain_outputs(likelihood, f, noise_variance) for f in samples]).mean(0)


def noise_of_certain_outputs(likelihood: Likelihood, outputs: Tensor, noise_variance: float | Tensor) -> Tensor:
    """Variance that targets have for certain outputs, ``[N, C] -> [N, K]``, of a likelihood that has one."""
    link = likelihood.links[0]
    certain = torch.zeros_like(outputs)
    if likelihood.needs_covariance(link):
        certain = torch.diag_embed(certain)
    normals = outputs.new_zeros(1, outputs.shape[-1]) if link == "mc" else None
    return likelihood.predictive_moments(outputs, certain, link, normals, noise_variance).noise_variance
