"""Questions that are answered with yes or no: independent sigmoids."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.likelihoods import _numerics
from debiased_laplace.likelihoods.base import Answers, Independent


class Bernoulli(Independent, Answers):
    """Independent sigmoids, one for each output; targets in [0, 1], ``[N]`` or ``[N, C]``."""

    links = ("probit", "mc")

    def check_targets(self, targets: Tensor, n_outputs: int) -> None:
        if targets.is_complex():
            raise TypeError(f"Expected targets from 0 to 1, got {targets.dtype}.")
        _data.target_rows(targets, n_outputs)
        if len(targets) and not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ValueError(f"Expected targets from 0 to 1, got {float(targets.min()):g} to {float(targets.max()):g}.")

    def prepare_targets(self, targets: Tensor, n_outputs: int) -> Tensor:
        """``[N, C]``."""
        return _data.target_rows(super().prepare_targets(targets, n_outputs), n_outputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = _data.target_rows(targets, outputs.shape[1]).to(outputs)
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(-1)

    def root_diagonal(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # sqrt(p (1 - p)), written so that it does not round to zero for large logits.
        return (0.5 * (F.logsigmoid(outputs) + F.logsigmoid(-outputs))).exp()

    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (F.logsigmoid(outputs) + F.logsigmoid(-outputs)).exp().sum(-1)

    def inverse_link(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def predictive(self, mean: Tensor, covariance: Tensor, link: str, normals: Tensor | None = None) -> Tensor:
        self.check_link(link)
        if link == "probit":
            return torch.sigmoid(mean / torch.sqrt(1 + math.pi / 8 * covariance))
        return super().predictive(mean, covariance, link, normals)

    def log_loss(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        targets = _data.target_rows(targets, probabilities.shape[-1]).to(probabilities)
        # Where rounding made a probability one, it may have been less by a quarter of the precision.
        rest = (1 - probabilities).clamp_min(torch.finfo(probabilities.dtype).eps / 4)
        positive, negative = probabilities.clamp_min(_numerics.smallest(probabilities)).log(), rest.log()
        return -(targets * positive + (1 - targets) * negative).sum(-1)

    def correctness(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Share of the questions that are answered rightly, ``[N]``: each output answers one."""
        shares = targets.reshape(outputs.shape).to(outputs)
        return torch.where(outputs > 0, shares, 1 - shares).mean(-1)

    def confidence(self, probabilities: Tensor) -> Tensor:
        return torch.maximum(probabilities, 1 - probabilities).mean(-1)

    def class_outputs(self, outputs: Tensor) -> Tensor | None:
        """0 and f for a single output f; several labels are no classes."""
        return torch.cat([torch.zeros_like(outputs), outputs], -1) if outputs.shape[-1] == 1 else None

    def class_predictive(self, mean: Tensor, covariance: Tensor, link: str, normals: Tensor | None = None) -> Tensor:
        probabilities = self.predictive(mean, covariance, link, normals)
        if mean.shape[-1] > 1:
            return probabilities
        # That of class 0 by itself: one minus a probability near one has no digits left.
        mirrored = None if normals is None else -normals
        return torch.cat([self.predictive(-mean, covariance, link, mirrored), probabilities], -1)
