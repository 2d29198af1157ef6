"""The losses of laplace-torch's grid search: a metric of torchmetrics, a function, or the default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

#: Class probabilities, or mean and (co)variance of a regression.
Predicted = Tensor | tuple[Tensor, Tensor]


class MeanLoss:
    """Mean of losses that are there already, of every datum: negative log predictive probabilities, the default."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    @property
    def empty(self) -> bool:
        """Whether there was nothing yet."""
        return self.count == 0

    def update(self, prediction: Predicted, targets: Tensor) -> None:
        """Look at the next batch."""
        assert isinstance(prediction, Tensor)
        self.total += float(prediction.double().sum())
        self.count += len(targets)

    def compute(self) -> float:
        """The loss of all batches."""
        return self.total / self.count


class MetricLoss:
    """A metric of torchmetrics, in a copy of its own."""

    def __init__(self, metric: Metric, device: torch.device) -> None:
        self.metric = metric.clone().to(device)
        self.metric.reset()
        self.empty = True

    def update(self, prediction: Predicted, targets: Tensor) -> None:
        """Look at the next batch."""
        self.empty = False
        if not isinstance(prediction, tuple):
            self.metric.update(prediction, targets)
            return
        try:
            self.metric.update(*prediction, targets)
        except TypeError:  # a metric of means alone
            self.metric.update(prediction[0], targets)

    def compute(self) -> float:
        """The loss of all batches."""
        return float(self.metric.compute().sum())  # some metrics have a value for each output


class FunctionLoss:
    """A function of all predictions and targets at once."""

    def __init__(self, function: Callable[..., Tensor | float]) -> None:
        self.function = function
        self.batches: list[tuple[Tensor, ...]] = []

    @property
    def empty(self) -> bool:
        """Whether there was nothing yet."""
        return not self.batches

    def update(self, prediction: Predicted, targets: Tensor) -> None:
        """Look at the next batch."""
        parts = prediction if isinstance(prediction, tuple) else (prediction,)
        self.batches.append((*parts, targets))

    def compute(self) -> float:
        """The loss of all batches."""
        value = self.function(*(torch.cat(column) for column in zip(*self.batches, strict=True)))
        self.batches.clear()
        return float(value)


Score = MeanLoss | MetricLoss | FunctionLoss


def score_of(loss: Any, device: torch.device) -> Score:
    """What computes a loss batch after batch."""
    if loss is None:
        return MeanLoss()
    return MetricLoss(loss, device) if isinstance(loss, Metric) else FunctionLoss(loss)
