"""Predictors without a posterior: the network itself, a temperature, a noise variance, ensembles.

A network is copied when its predictor is made, in evaluation mode: later changes of modules and buffers do not matter,
those of weights in place do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from debiased_laplace import _data
from debiased_laplace._guards import warn_the_caller
from debiased_laplace.evaluation.predictors import edges
from debiased_laplace.evaluation.predictors.detectors import OF_LOGITS, fitted_to
from debiased_laplace.evaluation.predictors.prediction import Prediction, Predictor, mutual_information
from debiased_laplace.likelihoods import Categorical, gaussian_nll
from debiased_laplace.network.snapshot import in_evaluation_mode
from debiased_laplace.posterior.noise import ALL_ERRORS_ZERO, nothing_left
from debiased_laplace.posterior.temperature import (
    most_uncertain_temperature,
    temperature_scaling,
    warn_undetermined,
)
from debiased_laplace.posterior.tune import SELECTIONS

#: Where the noise variance of an ensemble is looked for: natural logarithms, relative to the members' squared errors.
NOISE_RANGE = -10.0, 3.0


def point_predictor(model: nn.Module, *, temperature: float = 1.0) -> Predictor:
    """The network's probabilities: softmax of its outputs, divided by a temperature."""
    outputs = _forward(model)

    def predict(inputs: _data.Inputs) -> Prediction:
        return Prediction(probabilities=(outputs(inputs).double() / temperature).softmax(1))

    return predict


def detecting_predictor(model: nn.Module, training: Iterable[Any] | None = None) -> Predictor:
    """The network's probabilities, with scores of how far data look out of distribution that need no posterior.

    Args:
        model: A classifier.
        training: Batches that it was trained on, for Mahalanobis distances of its features; energy and maximum logit
            need none.

    Raises:
        UnsupportedLayerError: If it is not clear which parameters are the last layer.
        ValueError: If the last layer is not one module whose inputs are ``[N, I]``.
    """
    outputs = _forward(model)
    features, detectors = (None, OF_LOGITS) if training is None else fitted_to(model, training)

    def predict(inputs: _data.Inputs) -> Prediction:
        logits, seen = (outputs(inputs), torch.empty(0)) if features is None else features(inputs)
        logits = logits.double()
        scores = {name: detector(logits, seen) for name, detector in detectors.items()}
        return Prediction(probabilities=logits.softmax(1), ood=scores)

    return predict


def gaussian_predictor(model: nn.Module, noise_variance: float) -> Predictor:
    """The network's outputs as means, with one variance for all."""
    outputs = _forward(model)

    def predict(inputs: _data.Inputs) -> Prediction:
        mean = outputs(inputs).double()
        return Prediction(mean=mean, variance=torch.full_like(mean, noise_variance))

    return predict


def ensemble_predictor(models: Sequence[nn.Module], noise_variance: float | None = None) -> Predictor:
    """The mean of several networks' softmax outputs, or of their outputs (Lakshminarayanan et al., arXiv 1612.01474).

    Args:
        models: Networks of several training runs.
        noise_variance: For a regression: added to the variance between the networks.
    """
    if not models:
        raise ValueError("Expected at least one network for an ensemble, got none.")
    members = [_forward(model) for model in models]

    def predict(inputs: _data.Inputs) -> Prediction:
        outputs = torch.stack([member(inputs).double() for member in members])
        variance = outputs.var(0, correction=0)
        if noise_variance is not None:
            return Prediction(
                mean=outputs.mean(0), variance=variance + noise_variance, functional_variance=variance.sum(-1)
            )
        return Prediction(
            probabilities=outputs.softmax(-1).mean(0),
            functional_variance=variance.sum(-1),
            mutual_information=mutual_information(outputs.softmax(-1)),
        )

    return predict


def tuned_noise(models: Sequence[nn.Module], validation: Iterable[Any]) -> float:
    """The noise variance of an ensemble with the smallest validation loss; of one network, its mean squared error.

    Warns:
        UserWarning: If all errors are zero up to rounding: then it is 1, as that of a posterior that is not tuned. If
            it is at the end of its search.
    """
    batches = list(_data.labelled(validation))
    predicted = [outputs_of(model, [(inputs, targets) for inputs, targets, _ in batches]) for model in models]
    outputs = torch.stack([member for member, _ in predicted])
    mean, variance = outputs.mean(0), outputs.var(0, correction=0)
    targets = predicted[0][1].reshape(mean.shape).double()
    dtypes = [p.dtype for model in models for p in model.parameters() if p.is_floating_point()] or [torch.float64]
    if nothing_left(targets - outputs, targets, max(torch.finfo(dtype).eps for dtype in dtypes)):
        warn_undetermined("observation noise", ALL_ERRORS_ZERO.format("1"))
        return 1.0
    if len(models) == 1:
        return float((targets - mean).square().mean())
    middle = float((targets - outputs).square().mean().log())

    def loss(logarithm: float) -> float:
        return float(gaussian_nll(mean, variance, targets, math.exp(logarithm)).mean())

    low, high = middle + NOISE_RANGE[0], middle + NOISE_RANGE[1]
    best = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-8})
    if (side := edges.near_the_end(best.x, low, high)) is not None:
        warn_the_caller(edges.AT_THE_END.format("noise", side, f"{math.exp(best.x):.3g}"))
    return math.exp(best.x)


def tuned_temperature(model: nn.Module, validation: Iterable[Any], selection: str = "best") -> tuple[float, float]:
    """The temperature with the smallest validation loss, by temperature scaling.

    On the outputs themselves: probabilities of a confident network have lost what a temperature needs.

    Args:
        model: A classifier.
        validation: Held-out batches.
        selection: ``"best"``, or ``"one_standard_error"`` for the largest that the data do not tell from the best, see
            :func:`~debiased_laplace.posterior.temperature.most_uncertain_temperature`.

    Returns:
        The temperature, and the mean negative log-likelihood there, in nats.

    Warns:
        UserWarning: If the data determine none.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"Expected selection out of {list(SELECTIONS)}, got {selection!r}.")
    search = temperature_scaling if selection == "best" else most_uncertain_temperature
    optimum = search(Categorical(), *outputs_of(model, validation))
    if optimum.undetermined:
        warn_undetermined("temperature", optimum.undetermined)
    return optimum.value, optimum.loss


def outputs_of(model: nn.Module, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Outputs ``[N, C]``, float64, and targets of all data of a loader, on the CPU."""
    forward = _forward(model)
    pairs = [(forward(inputs).cpu().double(), targets.cpu()) for inputs, targets, _ in _data.labelled(batches)]
    if not pairs:
        raise ValueError("Expected data, got an empty loader. A generator can be read only once.")
    outputs, targets = (torch.cat(column) for column in zip(*pairs, strict=True))
    return outputs, targets


def _forward(model: nn.Module) -> Callable[[_data.Inputs], Tensor]:
    """Outputs ``[N, C]`` without gradients, by one copy of the modules; their weights are the model's."""
    network = in_evaluation_mode(model)

    def outputs(inputs: _data.Inputs) -> Tensor:
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        batch = _data.at_least(_data.to_device(inputs, device), 2)  # one datum has the outputs it has in a batch
        with torch.no_grad():
            rows = _data.rows(_data.USUAL(network, batch), _data.count(batch))
        return rows[: _data.count(inputs)]

    return outputs
