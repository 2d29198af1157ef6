r"""What predictors return, checked.

A predictor takes the inputs of a batch and returns one of

* probabilities ``[N, C]`` of a classifier, rows summing to one;
* a pair ``(mean, variance)`` of a regression, ``[N, C]`` or ``[N]`` each, the variance with the observation noise;
* a :class:`Prediction`, which can hold more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace._arrays import row_sum_tolerance
from debiased_laplace.evaluation.scores.detection import OOD


@dataclass(frozen=True)
class Prediction:
    """What is predicted about a batch; tensors on any device.

    Attributes:
        probabilities: ``[N, C]``, of a classifier.
        mean: ``[N, C]`` or ``[N]``, of a regression.
        variance: As the mean: predictive variance, observation noise included.
        functional_variance: ``[N]``, variance of the outputs, summed over them.
        mutual_information: ``[N]``, nats: entropy of the mean probabilities minus mean entropy of the probabilities.
        ood: Further scores ``[N]`` by name, high where data look out of distribution, such as those of
            :mod:`~debiased_laplace.evaluation.predictors.detectors`; the tables of such data have them too.
    """

    probabilities: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    functional_variance: Tensor | None = None
    mutual_information: Tensor | None = None
    ood: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, further scores under names of their own."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "ood"}
        values |= {OOD + name: score for name, score in self.ood.items()}
        return {name: value for name, value in values.items() if value is not None}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The same as float64 arrays."""
        return {name: value.detach().to("cpu", torch.float64).numpy() for name, value in self.tensors().items()}


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
    for what, tensor in value.tensors().items():
        if tensor.ndim < 1 or len(tensor) != n or (what.startswith(OOD) and tensor.ndim > 1):
            raise ValueError(
                f"Expected {what} of {n} data from predictor {name!r}, one row for each, got shape "
                f"{tuple(tensor.shape)}."
            )
        if not bool(tensor.isfinite().all()):
            rows = (~tensor.isfinite().reshape(n, -1).all(1)).nonzero().flatten()
            raise ValueError(
                f"Expected finite {what} from predictor {name!r}, got NaN or infinity for {len(rows)} of {n} "
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


def mutual_information(probabilities: Tensor) -> Tensor:
    """Between label and parameters, from samples ``[M, N, C]``: ``[N]``, nats (Houlsby et al., arXiv 1112.5745)."""
    entropies = torch.special.entr(probabilities).sum(-1).mean(0)
    return (torch.special.entr(probabilities.mean(0)).sum(-1) - entropies).clamp_min(0)
