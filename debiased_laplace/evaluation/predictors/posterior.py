"""Predictors of posteriors; those of the same parameters share their backward passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.evaluation.predictors.prediction import Prediction, mutual_information
from debiased_laplace.laplace import Laplace
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.gaussian import Posterior, standard_normals
from debiased_laplace.posterior.predictive import functional_moments

if TYPE_CHECKING:
    from debiased_laplace.laplace_torch import DebiasedLaplace

#: Draws of the outputs for the mutual information.
N_SAMPLES = 30


class Shared:
    """Posteriors of the same parameters of a model share the backward passes for a batch."""

    def __init__(self) -> None:
        self._members: list[tuple[Network, Posterior, bool]] = []
        self._inputs: Any = None
        self._versions: list[int] = []
        self._moments: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, network: Network, posterior: Posterior, covariance: bool = False) -> int:
        """A place for a posterior, of which variances or covariances are wanted."""
        self._members.append((network, posterior, covariance))
        return len(self._members) - 1

    def moments(self, index: int, inputs: _data.Inputs) -> tuple[Tensor, Tensor]:
        """Mean, and covariance ``[N, C, C]`` or its diagonal ``[N, C]``, of the outputs under one of the posteriors."""
        versions = [leaf._version for leaf in _data.tensors(inputs)]  # a loader may fill one buffer again and again
        if self._inputs is not inputs or self._versions != versions:
            self._inputs, self._versions, self._moments = inputs, versions, {}
        if index not in self._moments:
            network = self._members[index][0]
            sharing = [i for i, (other, _, _) in enumerate(self._members) if other.same_blocks(network)]
            with_covariance = any(self._members[i][2] for i in sharing)  # costs hardly more than variances
            mean, covariances = functional_moments(
                network, [self._members[i][1] for i in sharing], inputs, covariance=with_covariance
            )  # fmt: skip
            for i, covariance in zip(sharing, covariances, strict=True):
                wanted = self._members[i][2] or not with_covariance
                self._moments[i] = mean, covariance if wanted else covariance.diagonal(dim1=-2, dim2=-1)
        return self._moments[index]


class LaplacePredictor:
    """Probabilities, or mean and variance, of a posterior as it is now; later tuning does not change it.

    Args:
        la: A fitted and tuned posterior, the native object or the drop-in.
        shared: Where posteriors of the same parameters find each other, so that one set of backward passes serves all.
        n_samples: Draws for the mutual information; the Monte Carlo link uses those of its default number.
    """

    def __init__(
        self, la: Laplace | DebiasedLaplace, shared: Shared | None = None, *, n_samples: int = N_SAMPLES
    ) -> None:
        native = la if isinstance(la, Laplace) else la.native
        default = native.default_link if native is la else native.likelihood.links[0]
        self.likelihood: Likelihood = native.likelihood
        self.link, self.output_temperature = native.link or default, native.output_temperature
        self.noise_variance = torch.as_tensor(native.posterior.noise_variance).detach().double()
        self.covariance = self.likelihood.needs_covariance(self.link)
        self.shared = shared or Shared()
        self.index = self.shared.add(native.network, native.posterior, self.covariance)
        generator = torch.Generator().manual_seed(native.seed)
        size = 100 if self.link == "mc" else n_samples
        self.normals = standard_normals((size, native.network.n_outputs), native.posterior.mean, generator)

    def __call__(self, inputs: _data.Inputs) -> Prediction:
        """Predict a batch."""
        likelihood, tau = self.likelihood, self.output_temperature
        mean, covariance = self.shared.moments(self.index, inputs)
        variances = covariance.diagonal(dim1=-2, dim2=-1) if self.covariance else covariance
        scaled = mean.double() / tau, covariance.double() / tau**2
        if not likelihood.has_answers:
            noise_variance = self.noise_variance.to(variances.device)
            moments = likelihood.predictive_moments(*scaled, self.link, self.normals, noise_variance)
            return Prediction(mean=moments.mean, variance=moments.variance, functional_variance=variances.sum(-1))
        deviations = (variances.double() / tau**2).clamp_min(0).sqrt()
        classes = likelihood.class_outputs(scaled[0] + deviations * self.normals.to(scaled[0])[:, None])
        return Prediction(
            probabilities=likelihood.class_predictive(*scaled, self.link, self.normals),
            functional_variance=variances.sum(-1),
            mutual_information=None if classes is None else mutual_information(classes.softmax(-1)),
        )
