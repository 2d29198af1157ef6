r"""Whether predictions are far less certain than they need be, without validation data.

The prior precision that maximises the marginal likelihood is that of a model of which a trained network is not the
mode, and its predictions can be far less certain than the network is right (docs/evidence.md). A uniform sample of the
training data shows it. Two numbers are compared: for classes, the share of data that the network is right about and the
mean probability of the most probable class; for a regression, its root mean square error and the root mean square
standard deviation.

A network may have memorised its data, and then uncertainty is in place. So the network is judged without the datum
(:func:`~debiased_laplace.posterior.leave_one_out.leave_one_out`), and a datum counts by the part :math:`1 - h` that the
others determine, h its leverage: for classes it is right by that part at most, and in a regression it has that weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import gammaincinv, ndtri
from torch import Tensor

from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.gaussian import Posterior, standard_normals
from debiased_laplace.posterior.leave_one_out import leave_one_out
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.sampling.sample import WeightedData

#: By what factor and by how much the doubt may exceed the share of wrong answers, beyond the error of the sample, and
#: the doubt of the network itself.
TOLERATED_DOUBT, TOLERATED_GAP = 1.5, 0.1
#: By what factor a regression's standard deviation may exceed its error, likewise.
TOLERATED_FACTOR = 3.0
#: Below this part the data of a regression say little about one another.
SMALLEST_PART = 0.5
#: Of the error of the sample, on one side.
CONFIDENCE = 0.95
#: Outputs of all data together that are looked at, each a back-propagation, and the fewest data that tell anything.
MAX_OUTPUTS, FEWEST = 2048, 16


@dataclass(frozen=True)
class Certainty:
    """How certain predictions are on some data, and how certain they could be.

    Attributes:
        n: Number of data.
        performance: Of the network on them: the share it is right about, or its root mean square error.
        left_out: The same of the network without the datum, each by the part that the others determine.
        certainty: Mean probability of the most probable class, or root mean square standard deviation with noise.
        alone: The same of the network's own probabilities, or standard deviation of the noise.
        part: Mean of the parts.
        is_regression: Whether errors are compared.
        effective_n: Number of equally weighted data that would be as good a sample.
    """

    n: int
    performance: float
    left_out: float
    certainty: float
    alone: float
    part: float
    is_regression: bool
    effective_n: float

    @property
    def too_small(self) -> bool:
        """Whether predictions are far less certain than they could be, and not by chance."""
        if not self.is_regression:
            justified = 1 - min(self.alone, wilson_lower(self.left_out, self.effective_n))
            doubt = 1 - self.certainty
            return doubt > TOLERATED_DOUBT * justified and doubt > justified + TOLERATED_GAP
        if self.part < SMALLEST_PART:
            return False
        freedom = self.effective_n * self.part
        largest = self.left_out * float(freedom / (2 * gammaincinv(freedom / 2, 1 - CONFIDENCE))) ** 0.5
        return self.certainty > TOLERATED_FACTOR * largest

    def message(self, prior_precision: Tensor, sigma_noise: Tensor, remedy: str, otherwise: str = "") -> str:
        """What to say if it is too small.

        Args:
            prior_precision: Of the predictions.
            sigma_noise: Standard deviation of the noise.
            remedy: How to tune on held-out data.
            otherwise: What to do without such data.
        """
        settings = f"the prior precision that maximises the marginal likelihood ({_few(prior_precision)})"
        if self.is_regression:
            settings += f" and a sigma_noise of {_few(sigma_noise)}"
            numbers = (
                f"the error of the network is {self.performance:.3g} ({self.left_out:.3g} without each datum's own "
                f"part), but the standard deviation of the predictions is {self.certainty:.3g}, noise included"
            )
        else:
            right, without, certainty = (100 * share for share in (self.performance, self.left_out, self.certainty))
            numbers = (
                f"the network is right about {right:.1f} % ({without:.1f} % without each datum's own part), but the "
                f"mean probability of the answers is {certainty:.1f} %"
            )
        return (
            f"With {settings} predictions are far less certain than they need be: on a uniform sample of {self.n} "
            f"training data {numbers}. Tune on held-out data instead: {remedy}.{otherwise}"
        )


@torch.no_grad()
def certainty_on(
    network: Network, posterior: Posterior, likelihood: Likelihood, data: WeightedData, **settings: Any
) -> Certainty | None:
    """:func:`compare` the linearised predictive with the network on data that the posterior was fitted on.

    Args:
        network: The model with its blocks.
        posterior: The posterior.
        likelihood: The one it was fitted with.
        data: A fair sample of the training data, with weights that sum to one.
        **settings: Of the predictions, for :func:`compare`.

    Returns:
        The numbers; None for a likelihood that has neither classes nor errors, for more than 128 outputs, which would
        take as long as the fit, and for dense outputs, whose sites cannot be left out one by one.
    """
    if network.sites is not None or not (likelihood.has_noise or likelihood.has_answers):
        return None
    n = MAX_OUTPUTS // network.n_outputs
    if n < FEWEST:
        return None
    if n < len(data):  # they are in the order of the stream
        data = data.take(torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n])
    mean, covariances = functional_moments(network, posterior, data.inputs)
    weight = 1 / (float(posterior.noise_variance) * posterior.temperature)
    return compare(likelihood, mean, covariances, data.targets, data.weights, weight=weight, **settings)


def compare(
    likelihood: Likelihood,
    mean: Tensor,
    covariances: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    weight: float = 1.0,
    link: str = "probit",
    output_temperature: float = 1.0,
    noise_variance: Tensor | float = 1.0,
    n_samples: int = 100,
    seed: int = 0,
) -> Certainty:
    """How certain predictions are on training data, and how certain they could be.

    Args:
        likelihood: Of classes or of a regression.
        mean: ``[N, C]``, outputs of the network.
        covariances: ``[N, C, C]``, of the outputs.
        targets: ``[N]`` or ``[N, C]``.
        weights: ``[N]``, of the data as a sample.
        weight: By what the loss of a datum enters the posterior.
        link: Link of the predictions.
        output_temperature: What outputs are divided by before the link.
        noise_variance: Of a regression: one number, or one for each output.
        n_samples: Draws for ``link="mc"``.
        seed: Of these draws.
    """
    mean, covariances = mean.double(), covariances.double()
    targets = likelihood.prepare_targets(targets.to(mean.device), mean.shape[1])
    weights = weights.to(mean)
    without = leave_one_out(likelihood, mean, covariances, targets, weight=weight)
    part = (1 - without.leverages).clamp_min(0)
    outputs = torch.where(part[:, None] > 0, without.outputs, mean)
    weights = weights / weights.sum()
    if likelihood.has_noise:
        errors, left_out = ((f - targets.to(mean)).square().mean(-1) for f in (mean, outputs))
        noise = torch.as_tensor(noise_variance).to(mean).expand_as(mean)
        variances = covariances.diagonal(dim1=1, dim2=2) + noise
        values = [
            weights @ errors, (weights * part) @ left_out / (weights @ part), weights @ variances.mean(-1),
            weights @ noise.mean(-1),
        ]  # fmt: skip
        values = [value.sqrt() for value in values]
    else:
        tau = output_temperature
        scaled = (covariances if likelihood.needs_covariance(link) else covariances.diagonal(dim1=1, dim2=2)) / tau**2
        normals = None
        if link == "mc":
            normals = standard_normals((n_samples, mean.shape[1]), mean, torch.Generator().manual_seed(seed))
        probabilities = likelihood.predictive(mean / tau, scaled, link, normals)
        network = likelihood.inverse_link(mean / tau)
        right, left_out = (likelihood.correctness(f, targets) for f in (mean, outputs))
        certainty, alone = (likelihood.confidence(p) for p in (probabilities, network))
        values = [weights @ right, weights @ (part * left_out), weights @ certainty, weights @ alone]
    n_effective = float(1 / weights.square().sum())
    performance, left_out_of, certain, by_itself = (float(value) for value in values)
    return Certainty(
        len(targets), performance, left_out_of, certain, by_itself, float(weights @ part), likelihood.has_noise,
        n_effective,
    )  # fmt: skip


def wilson_lower(share: float, n: float) -> float:
    """Lower bound of a probability (Wilson's score) from a share of ``n`` trials, which need not be whole."""
    z = float(ndtri(CONFIDENCE))
    centre = share + z**2 / (2 * n)
    return (centre - z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))) / (1 + z**2 / n)


def _few(values: Tensor) -> str:
    shown = [f"{float(value):.3g}" for value in values.flatten()[:3]]
    return ", ".join(shown + ["..."] * (values.numel() > 3))
