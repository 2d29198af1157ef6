r"""Predictors: anything callable that gives probabilities, or a mean and a variance, and the baselines.

A predictor takes the inputs of a batch and returns one of

* probabilities ``[N, C]`` of a classifier, rows summing to one;
* a pair ``(mean, variance)`` of a regression, ``[N, C]`` or ``[N]`` each, the variance with the observation noise;
* a :class:`Prediction`, which can hold more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from debiased_laplace import DebiasedLaplace, _data
from debiased_laplace.evaluation import edges
from debiased_laplace.evaluation.metrics import entropy, foreignness, row_sum_tolerance
from debiased_laplace.likelihoods import Bernoulli, Categorical, Likelihood
from debiased_laplace.network.gradients import Network
from debiased_laplace.network.snapshot import in_evaluation_mode
from debiased_laplace.posterior.gaussian import Posterior, standard_normals
from debiased_laplace.posterior.joint import SELECTIONS
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.posterior.temperature import (
    most_uncertain_temperature,
    temperature_scaling,
    warn_the_caller,
    warn_undetermined,
)
from debiased_laplace.posterior.tuning import ALL_ERRORS_ZERO, gaussian_nll, nothing_left

#: Draws of the outputs for the mutual information.
N_SAMPLES = 30
#: Where the noise variance of an ensemble is looked for: natural logarithms, relative to the members' squared errors.
NOISE_RANGE = -10.0, 3.0


@dataclass(frozen=True)
class Prediction:
    """What is predicted about a batch; tensors on any device.

    Attributes:
        probabilities: ``[N, C]``, of a classifier.
        mean: ``[N, C]`` or ``[N]``, of a regression.
        variance: As the mean: predictive variance, observation noise included.
        functional_variance: ``[N]``, variance of the outputs, summed over them.
        mutual_information: ``[N]``, nats: entropy of the mean probabilities minus mean entropy of the probabilities.
    """

    probabilities: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    functional_variance: Tensor | None = None
    mutual_information: Tensor | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The fields that are there, as float64 arrays."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value.detach().to("cpu", torch.float64).numpy() for name, value in found.items() if value is not None
        }


Predictor = Callable[[_data.Inputs], "Tensor | tuple[Tensor, Tensor] | Prediction"]


def as_prediction(value: Any, n: int, name: str) -> Prediction:
    """What a predictor returned for N data, checked.

    Raises:
        TypeError: If it is none of the three things a predictor may return.
        ValueError: If shapes do not fit, something is not finite, or rows are no probabilities.
    """
    try:
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        elif isinstance(value, (tuple, list)) and len(value) == 2:
            value = torch.as_tensor(value[0]), torch.as_tensor(value[1])
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"Expected numbers from predictor {name!r}, got something else: {error}.") from error
    if isinstance(value, Tensor):
        value = Prediction(probabilities=value)
    elif isinstance(value, (tuple, list)) and len(value) == 2:
        value = Prediction(mean=torch.as_tensor(value[0]), variance=torch.as_tensor(value[1]))
    if not isinstance(value, Prediction) or (value.probabilities is None) == (value.mean is None):
        raise TypeError(
            f"Expected probabilities [N, C], a pair (mean, variance) or a Prediction from predictor {name!r}, got "
            f"{type(value).__name__}."
        )
    for field in fields(value):
        own = getattr(value, field.name)
        if own is None:
            continue
        if own.ndim < 1 or len(own) != n:
            raise ValueError(
                f"Expected {field.name} of {n} data from predictor {name!r}, one row for each, got shape "
                f"{tuple(own.shape)}."
            )
        if not bool(own.isfinite().all()):
            rows = (~own.isfinite().reshape(n, -1).all(1)).nonzero().flatten()
            raise ValueError(
                f"Expected finite {field.name} from predictor {name!r}, got NaN or infinity for {len(rows)} of {n} "
                f"data of a batch, the first being datum {int(rows[0])}. Look for NaN in the inputs or the model."
            )
    if value.mean is not None and value.mean.ndim > 2:
        raise ValueError(
            f"Expected a mean of shape [N] or [N, C] from predictor {name!r}, got {tuple(value.mean.shape)}."
        )
    if value.probabilities is not None:
        value = replace(value, probabilities=_checked_rows(value.probabilities.detach(), name))
    elif value.variance is None or value.mean is None or value.mean.shape != value.variance.shape:
        got = None if value.variance is None else tuple(value.variance.shape)
        raise ValueError(
            f"Expected a variance of the mean's shape from predictor {name!r}, got {got} for a mean of shape "
            f"{tuple(value.mean.shape) if value.mean is not None else None}."
        )
    elif not bool((value.variance > 0).all()):
        raise ValueError(
            f"Expected positive predictive variances from predictor {name!r}, got {float(value.variance.min()):.3g}. "
            "Add the observation noise to the epistemic variance."
        )
    return value


def _checked_rows(probabilities: Tensor, name: str) -> Tensor:
    """Probabilities in float64, rows divided by their sums."""
    if probabilities.ndim != 2 or probabilities.shape[1] < 2:
        raise ValueError(
            f"Expected probabilities of shape [N, C] with at least two classes from predictor {name!r}, got "
            f"{tuple(probabilities.shape)}. For one probability p, give the columns 1 - p and p; for one logit, "
            'LIKELIHOOD of a task file is "bernoulli".'
        )
    sums = probabilities.double().sum(1)
    worst = int((sums - 1).abs().argmax())
    if bool((probabilities < 0).any()) or abs(float(sums[worst]) - 1) > row_sum_tolerance(probabilities):
        raise ValueError(
            f"Expected non-negative probabilities whose rows sum to one from predictor {name!r}, got a smallest value "
            f"of {float(probabilities.min()):.3g} and a sum of {float(sums[worst]):.6g}: these look like logits. "
            "Apply softmax to them."
        )
    return probabilities.double() / sums[:, None]


class TwoClasses(nn.Module):
    """A network with one logit f as one with the two outputs 0 and f: its softmax is 1 - p and p.

    Args:
        model: With outputs ``[N, 1]`` or ``[N]``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: _data.Inputs) -> Tensor:
        """Outputs ``[N, 2]``.

        Raises:
            ValueError: If the network has another number of outputs.
        """
        outputs = _data.rows(self.model(inputs), _data.count(inputs))
        if outputs.shape[1] != 1:
            raise ValueError(
                f"Expected a network with one output for the likelihood 'bernoulli', got {list(outputs.shape)}. Use "
                "'classification' for several classes."
            )
        return torch.cat([torch.zeros_like(outputs), outputs], 1)


def two_classes(batch: Any) -> tuple[_data.Inputs, Tensor]:
    """A batch whose targets are 0 and 1 of any kind, with class indices ``[N]``.

    Raises:
        ValueError: If targets are others, or not one for each datum.
    """
    inputs, targets, n = _data.only(batch)
    if targets.numel() != n or targets.ndim not in (1, 2):
        raise ValueError(f"Expected targets [N] or [N, 1] of {n} data, got shape {tuple(targets.shape)}.")
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise ValueError(f"Expected targets 0 and 1, got others between {targets.min():g} and {targets.max():g}.")
    return inputs, targets.reshape(n).long()


# -- without a posterior ---------------------------------------------------------------------------


def point_predictor(model: nn.Module, *, temperature: float = 1.0) -> Predictor:
    """The network's own probabilities: softmax of its outputs, divided by a temperature."""

    def predict(inputs: _data.Inputs) -> Prediction:
        return Prediction(probabilities=(_outputs(model, inputs).double() / temperature).softmax(1))

    return predict


def gaussian_predictor(model: nn.Module, noise_variance: float) -> Predictor:
    """The network's outputs as means, with one variance for all."""

    def predict(inputs: _data.Inputs) -> Prediction:
        mean = _outputs(model, inputs).double()
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

    def predict(inputs: _data.Inputs) -> Prediction:
        outputs = torch.stack([_outputs(model, inputs).double() for model in models])
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
    found = [outputs_of(model, [(inputs, targets) for inputs, targets, _ in batches]) for model in models]
    outputs = torch.stack([own for own, _ in found])
    mean, variance = outputs.mean(0), outputs.var(0, correction=0)
    targets = found[0][1].reshape(mean.shape).double()
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
    found = search(Categorical(), *outputs_of(model, validation))
    if found.undetermined:
        warn_undetermined("temperature", found.undetermined)
    return found.value, found.loss


def outputs_of(model: nn.Module, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Outputs ``[N, C]``, float64, and targets of all data of a loader, on the CPU."""
    found = [(_outputs(model, inputs).cpu().double(), targets.cpu()) for inputs, targets, _ in _data.labelled(batches)]
    if not found:
        raise ValueError("Expected data, got an empty loader. A generator can be read only once.")
    outputs, targets = (torch.cat(column) for column in zip(*found, strict=True))
    return outputs, targets


def _outputs(model: nn.Module, inputs: _data.Inputs) -> Tensor:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = _data.at_least(_data.to_device(inputs, device), 2)  # one datum has the outputs it has in a batch
    with torch.no_grad():
        return _data.rows(in_evaluation_mode(model)(given), _data.count(given))[: _data.count(inputs)]


# -- posteriors ------------------------------------------------------------------------------------


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
        """Mean and (co)variance of the outputs under one of the posteriors."""
        versions = [leaf._version for leaf in _data.tensors(inputs)]  # a loader may fill one buffer again and again
        if self._inputs is not inputs or self._versions != versions:
            self._inputs, self._versions, self._moments = inputs, versions, {}
        if index not in self._moments:
            network = self._members[index][0]
            own = [i for i, (other, _, _) in enumerate(self._members) if other.same_blocks(network)]
            covariance = any(self._members[i][2] for i in own)  # costs hardly more than variances
            mean, spreads = functional_moments(
                network, [self._members[i][1] for i in own], inputs, covariance=covariance
            )  # fmt: skip
            for i, spread in zip(own, spreads, strict=True):
                wanted = self._members[i][2] or not covariance
                self._moments[i] = mean, spread if wanted else spread.diagonal(dim1=-2, dim2=-1)
        return self._moments[index]


class LaplacePredictor:
    """Probabilities, or mean and variance, of a posterior as it is now; later tuning does not change it.

    Args:
        la: A fitted and tuned posterior.
        shared: Where posteriors of the same parameters find each other, so that one set of backward passes serves all.
        n_samples: Draws for the mutual information; with the Monte Carlo link they are its own, as many as by default.
    """

    def __init__(self, la: DebiasedLaplace, shared: Shared | None = None, *, n_samples: int = N_SAMPLES) -> None:
        self.likelihood = la.output_likelihood
        self.link, self.output_temperature = la.link or "probit", la.output_temperature
        self.noise_variance = la.sigma_noise.detach().double().square()
        self.covariance = not self.likelihood.is_regression and self.likelihood.needs_covariance(self.link)
        self.shared = shared or Shared()
        self.index = self.shared.add(la.network, la.posterior, self.covariance)
        generator = torch.Generator().manual_seed(la.seed)
        size = 100 if self.link == "mc" else n_samples
        self.normals = standard_normals((size, la.n_outputs), la.posterior.mean, generator)

    def __call__(self, inputs: _data.Inputs) -> Prediction:
        """Predict a batch."""
        likelihood: Likelihood = self.likelihood
        mean, spread = self.shared.moments(self.index, inputs)
        variances = spread.diagonal(dim1=-2, dim2=-1) if self.covariance else spread
        if likelihood.is_regression:
            total = variances.double() + self.noise_variance.to(variances.device)
            return Prediction(mean=mean.double(), variance=total, functional_variance=variances.sum(-1))
        mean, spread = mean.double() / self.output_temperature, spread.double() / self.output_temperature**2
        own = variances.double() / self.output_temperature**2
        draws = mean + own.clamp_min(0).sqrt() * self.normals.to(mean)[:, None]
        probabilities = likelihood.predictive(mean, spread, self.link, self.normals)
        if isinstance(likelihood, Bernoulli):
            if mean.shape[1] > 1:  # several labels, each by itself
                return Prediction(probabilities=probabilities, functional_variance=variances.sum(-1))
            # That of class 0 by itself: one minus a probability near one has no digits left.
            other = likelihood.predictive(-mean, spread, self.link, -self.normals)
            probabilities, draws = torch.cat([other, probabilities], 1), torch.cat([torch.zeros_like(draws), draws], -1)
        draws = draws.softmax(-1)
        return Prediction(
            probabilities=probabilities,
            functional_variance=variances.sum(-1),
            mutual_information=mutual_information(draws),
        )


def mutual_information(probabilities: Tensor) -> Tensor:
    """Between label and parameters, from samples ``[M, N, C]``: ``[N]``, nats (Houlsby et al., arXiv 1112.5745)."""
    entropies = torch.special.entr(probabilities).sum(-1).mean(0)
    return (torch.special.entr(probabilities.mean(0)).sum(-1) - entropies).clamp_min(0)


def scores_of_foreignness(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Out-of-distribution scores ``[N]`` that a prediction has; high means foreign."""
    found: dict[str, NDArray[Any]] = {}
    if "probabilities" in arrays:
        found["maximum probability"] = foreignness(arrays["probabilities"])
        found["entropy"] = entropy(arrays["probabilities"])
    for name in ("mutual_information", "functional_variance"):
        if name in arrays:
            found[name.replace("_", " ")] = arrays[name]
    return found
