r"""Detectors of out-of-distribution (OOD) data that need no posterior: what a network's own outputs and features tell.

A detector takes the logits ``[N, C]`` of a batch and its features ``[N, I]``, the inputs of the last layer, and returns
scores ``[N]``, high where data look out of distribution. A new one is a function, which :func:`fitted_to` names.

Logits are those of the network at temperature one, as in the sources. Divided by a temperature they have the same
order of maximum logits; Mahalanobis distances have no part of it; and the energy at a temperature is another score,
which is not among these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _data
from debiased_laplace.network.network import Network
from debiased_laplace.network.snapshot import in_evaluation_mode

Detector = Callable[[Tensor, Tensor], Tensor]
#: Training data whose features are kept for a moment, the first so many.
N_TRAINING = 50_000


def energy(logits: Tensor, features: Tensor) -> Tensor:
    r"""The free energy :math:`-\log \sum_c e^{f_c}` (Liu et al., NeurIPS 2020, arXiv 2010.03759)."""
    return -logits.logsumexp(1)


def maximum_logit(logits: Tensor, features: Tensor) -> Tensor:
    r"""MaxLogit, :math:`-\max_c f_c` (Hendrycks et al., ICML 2022, arXiv 1911.11132)."""
    return -logits.amax(1)


#: Those that need neither features nor training data.
OF_LOGITS: Mapping[str, Detector] = {"energy": energy, "maximum logit": maximum_logit}


def mahalanobis(features: Tensor, targets: Tensor) -> Detector:
    r"""Distance of the features to the nearest class: Gaussians with the classes' means and one covariance.

    .. math:: \min_c \, (h - \mu_c)^\top \Sigma^{-1} (h - \mu_c), \qquad
        \Sigma = \tfrac1N \sum_n (h_n - \mu_{y_n})(h_n - \mu_{y_n})^\top

    with the pseudo-inverse: directions in which no class varies have no part.

    Args:
        features: ``[N, I]``, of training data.
        targets: ``[N]``, their classes.

    Source: Lee et al., NeurIPS 2018, arXiv 1807.03888, of the last layer's inputs, without perturbing the inputs.
    """
    means, residuals = _by_class(features, targets)
    distances = _distances(means, residuals)
    return lambda logits, features: distances(features).amin(1)


def relative_mahalanobis(features: Tensor, targets: Tensor) -> Detector:
    r"""The same less the distance to all training data, as one Gaussian: :func:`mahalanobis` minus it.

    Source: Ren et al., "A simple fix to Mahalanobis distance for improving near-OOD detection", arXiv 2106.09022.
    """
    to_classes, mean = mahalanobis(features, targets), features.double().mean(0, keepdim=True)
    to_all = _distances(mean, features.double() - mean)
    return lambda logits, features: to_classes(logits, features) - to_all(features)[:, 0]


def _by_class(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Means ``[C, I]`` of the classes that are there, and what is left of each datum."""
    _, index = targets.unique(return_inverse=True)
    counts = index.bincount().to(features.device)
    means = torch.zeros(len(counts), features.shape[1], dtype=torch.float64, device=features.device)
    means = means.index_add(0, index, features.double()) / counts[:, None]
    return means, features.double() - means[index]


def _distances(means: Tensor, residuals: Tensor) -> Callable[[Tensor], Tensor]:
    """Squared distances of features ``[N, I]`` to means ``[C, I]``, ``[N, C]``."""
    variances, directions = torch.linalg.eigh(residuals.T @ residuals / len(residuals))
    kept = variances > variances[-1].clamp_min(0) * len(variances) * torch.finfo(variances.dtype).eps
    whitening = directions[:, kept] / variances[kept].sqrt()
    centres = means @ whitening

    def distances(features: Tensor) -> Tensor:
        return torch.cdist(features.double() @ whitening, centres, compute_mode="donot_use_mm_for_euclid_dist").square()

    return distances


class PenultimateFeatures:
    """Logits ``[N, C]`` and features ``[N, I]`` of batches, by a copy of the modules: the model has no hook.

    Args:
        model: With one module as its last layer, whose inputs are ``[N, I]``.
        inputs: Some data, with which the last layer is found.

    Raises:
        UnsupportedLayerError: If it is not clear which parameters are the last layer.
        ValueError: If these are not those of one module, or its inputs are not one vector for each datum.
    """

    def __init__(self, model: nn.Module, inputs: _data.Inputs) -> None:
        names = list(Network.discover(model, inputs, parameters="last_layer").shapes)
        owners = {name.rpartition(".")[0] for name in names}
        if len(owners) != 1 or owners == {""}:
            raise ValueError(f"Expected a last layer that is one module, got the parameters {names}.")
        self._network, self._seen = in_evaluation_mode(model), list[Any]()
        self._network.get_submodule(owners.pop()).register_forward_pre_hook(
            lambda module, arguments: self._seen.append(arguments[0])
        )
        self._device = next(p.device for p in self._network.parameters())

    def __call__(self, inputs: _data.Inputs) -> tuple[Tensor, Tensor]:
        """Of a batch."""
        self._seen.clear()
        batch, n = _data.at_least(_data.to_device(inputs, self._device), 2), _data.count(inputs)
        with torch.no_grad():
            logits = _data.rows(_data.USUAL(self._network, batch), _data.count(batch))
        features = self._seen[-1] if self._seen else None
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(logits):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"Expected inputs [N, I] of the last layer, one vector for each datum, got {got}.")
        return logits[:n], features[:n]


def fitted_to(model: nn.Module, training: Iterable[Any]) -> tuple[PenultimateFeatures, dict[str, Detector]]:
    """Features of a network, and all detectors, those that learn from the first :data:`N_TRAINING` training data."""
    batches = _data.labelled(training)
    first = next(batches, None)
    if first is None:
        raise ValueError("Expected training data, got an empty loader. A generator can be read only once.")
    features = PenultimateFeatures(model, first[0])
    known, labels, n = list[Tensor](), list[Tensor](), 0
    for inputs, targets, size in chain([first], batches):
        known.append(features(inputs)[1])
        labels.append(targets.reshape(-1).to(known[-1].device))
        n += size
        if n >= N_TRAINING:
            break
    data = torch.cat(known), torch.cat(labels)
    of_features = {"Mahalanobis": mahalanobis(*data), "relative Mahalanobis": relative_mahalanobis(*data)}
    return features, {**OF_LOGITS, **of_features}
