"""What is predicted: expectations and variances of targets, beside those of the network's outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

METHODS = ("glm", "linearized", "nn")


@dataclass(frozen=True)
class Prediction:
    """Predictive distribution of the targets of N data, by its first two moments.

    Attributes:
        mean: Expected targets, ``[N, C]``: class probabilities, rates, or means of a regression, in their units.
        epistemic_variance: What uncertain weights add to the variance of the targets, ``[N, C]``, in their squared
            units; None for probabilities, of which the mean tells everything.
        noise_variance: Variance that targets have for certain weights, ``[N, C]``, likewise.
        outputs_mean: Mean of the network's outputs, ``[N, C]``, before temperature and link.
        outputs_variance: Their variance, ``[N, C]``, in squared units of the outputs.
        outputs_covariance: Their covariance, ``[N, C, C]``, if it was asked for or the link needs it.
    """

    mean: Tensor
    epistemic_variance: Tensor | None
    noise_variance: Tensor | None
    outputs_mean: Tensor
    outputs_variance: Tensor
    outputs_covariance: Tensor | None = None

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
        """Variance of the targets, ``[N, C]``: epistemic and noise together."""
        if self.epistemic_variance is None or self.noise_variance is None:
            return self.mean * (1 - self.mean)
        return self.epistemic_variance + self.noise_variance

    def _of_probabilities(self, name: str, instead: str) -> None:
        if self.epistemic_variance is not None:
            raise AttributeError(f"Expected a classification for {name}, got another prediction. It has {instead}.")
