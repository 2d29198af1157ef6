r"""Gradient descent that filters its gradients and finds its step sizes.

A step :math:`\delta` changes the gradient by :math:`H \delta`, and a batch shows it through noise. With the product and
the variances of a batch,

.. math:: \nabla f_t \mid \nabla f_{t-1} \sim \mathcal N(\nabla f_{t-1} + B_t \delta_{t-1}, Q_t), \qquad
    g_t \mid \nabla f_t \sim \mathcal N(\nabla f_t, \Sigma_t),

what is known of the gradient is a Gaussian :math:`\mathcal N(m_t, P_t)`, by a Kalman filter (:func:`update`). Along the
direction of :math:`-m_t` the loss is a Gaussian process (:class:`LineProcess`), and the step is the one that most
probably takes something off. :math:`Q, \Sigma, P` are scalars times the identity: means over parameters, for the mean
of the batch, from the gradients and products of its data.

Source: Chen, Choi, Balles, Duvenaud, Hennig, "Self-Tuning Stochastic Optimization with Curvature-Aware Gradient
Filtering" (arXiv 2011.04803).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _checks, _data
from debiased_laplace._guards import exact_derivatives, global_random_state
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.network import Network
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.quadratic.derivatives import LossAtPoint, scaled_to_unit
from debiased_laplace.quadratic.optim.optimizer import ModelOptimizer, move

__all__ = ["FilteredSGD", "LineProcess", "update"]

#: Steps beyond this are infinite: their fourth power has to be a number.
LONGEST = 1e60


def update(
    mean: Tensor, variance: float, product: Tensor, product_variance: float, gradient: Tensor, gradient_variance: float
) -> tuple[Tensor, float]:
    r"""One step of the filter.

    .. math:: m^- = m + B\delta, \quad P^- = P + Q, \quad K = P^- (P^- + \Sigma)^{-1}, \quad
        m = m^- + K (g - m^-), \quad P = (1 - K)^2 P^- + K^2 \Sigma

    Args:
        mean: Of the gradient before the step, ``[D]``.
        variance: Of each of its entries.
        product: Curvature times the step, ``[D]``.
        product_variance: Of each of its entries, zero or more.
        gradient: Of a batch after the step, ``[D]``.
        gradient_variance: Of each of its entries.

    Returns:
        Mean ``[D]`` and variance after the step; those of the batch if nothing has any variance.
    """
    predicted, variance = mean + product, variance + product_variance
    total = variance + gradient_variance
    gain = variance / total if total else 1.0
    return predicted + gain * (gradient - predicted), (1 - gain) ** 2 * variance + gain**2 * gradient_variance


@dataclass(frozen=True)
class LineProcess:
    r"""A Gaussian process for the change of the loss along a direction, :math:`f(\theta + t d) - f(\theta)`.

    That of a quadratic with independent Gaussian slope and curvature, and loss of both its ends: mean :math:`\gamma t +
    \frac12 \lambda t^2`, variance :math:`2 s + p t^2 + \frac14 q t^4` (equation 11).

    Attributes:
        slope: Expectation of the first derivative :math:`\gamma` at zero.
        slope_variance: p.
        curvature: Expectation of the second derivative :math:`\lambda`.
        curvature_variance: q.
        loss_variance: s, of the loss where it is.
    """

    slope: float
    slope_variance: float
    curvature: float
    curvature_variance: float
    loss_variance: float

    def mean(self, t: float) -> float:
        """Expected change of the loss, in nats."""
        return self.slope * t + self.curvature * t**2 / 2

    def variance(self, t: float) -> float:
        """Of the change of the loss."""
        return 2 * self.loss_variance + self.slope_variance * t**2 + self.curvature_variance * t**4 / 4

    def best_step(self) -> float:
        r"""The t of at least zero with the largest probability that the loss falls.

        Of the mean over its standard deviation, the derivative has the sign of :math:`2 s (\lambda t + \gamma)
        + \frac12 \lambda p t^3 - \frac14 \gamma q t^4`. If the slope is negative, that has one positive root whatever
        the sign of the curvature (rule of Descartes), found by bisection: companion matrices lose it where coefficients
        differ much. It is :math:`-\gamma / \lambda` if the loss is certain (the others would have the smallest step
        the best). Zero if the slope is not negative; infinite where nothing bounds it.
        """
        slope, curvature, s = self.slope, self.curvature, self.loss_variance
        p, q = self.slope_variance, self.curvature_variance
        if not slope < 0:
            return 0.0
        if not s:
            bound = 2 * curvature * p / slope / q if q and curvature < 0 else math.inf
            return -slope / curvature if curvature > 0 else bound or math.inf

        def falls(t: float) -> bool:
            return 2 * s * (curvature * t + slope) + t**3 * (curvature * p / 2 - slope * q * t / 4) < 0

        low = high = 1.0
        while falls(high):
            high *= 2
            if high > LONGEST:
                return math.inf
        while low and not falls(low):
            low /= 2
        for _ in range(80):
            middle = low + (high - low) / 2
            low, high = (middle, high) if falls(middle) else (low, middle)
        return high


class FilteredSGD(ModelOptimizer):
    r"""Gradient descent on filtered gradients, with step sizes of its own.

    A step costs a gradient of every datum, a product of every datum's Hessian with the last step, and two derivatives
    of every datum's loss along the new direction: five gradients' work, or three with halves, and more time, as
    gradients of data apart are slower (docs/steps.md). Memory: 2 N D numbers, or ``2 chunk_size D``. ``lr`` and
    ``self_tuning`` in ``param_groups`` may be scheduled. Data are seen in evaluation mode: no dropout, and
    normalisation layers keep the statistics they have.

    Args:
        model: The model whose parameters it moves.
        likelihood: ``"classification"``, ``"regression"``, or a :class:`~debiased_laplace.likelihoods.Likelihood`.
        lr: The part of the step that is taken; without self-tuning the step is that times the filtered gradient.
        self_tuning: Choose the length of steps by :class:`LineProcess`.
        debiased: Take the product, and slope and curvature along the new direction, from a second batch, or from the
            second half of the batch. Otherwise all is of one batch, and the slope is the filter's, as in the source.
        parameters: Names and patterns of the trainable parameters to move; None for all.
        chunk_size: Data at a time; None for whole batches.

    Attributes:
        last_line: What was known along the direction of the last step, of unit length; None without self-tuning.

    Example:
        >>> import torch
        >>> from debiased_laplace.quadratic.optim import FilteredSGD
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(640, 3)
        >>> y = x.sum(1, keepdim=True) + torch.randn(640, 1)
        >>> optimizer = FilteredSGD(model, "regression")
        >>> losses = [optimizer.step((x[i : i + 32], y[i : i + 32])) for i in range(0, 640, 32)]
        >>> bool(model.weight.data.sub(1).abs().max() < 0.2)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        lr: float = 1.0,
        *,
        self_tuning: bool = True,
        debiased: bool = False,
        parameters: str | Sequence[str] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        _checks.chunk_size(chunk_size)
        super().__init__(model, likelihood, parameters, debiased, {"lr": lr, "self_tuning": self_tuning})
        self.chunk_size = chunk_size
        self.last_line: LineProcess | None = None
        self._can_be_mapped: bool | None = None

    @property
    def filtered_gradient(self) -> tuple[Tensor, float]:
        """Mean ``[D]`` and variance of each entry of the gradient where the last step was taken.

        Raises:
            RuntimeError: Before the first step.
        """
        if "gradient" not in self._state:
            raise RuntimeError("Expected a step before a filtered gradient is asked for, got none. Call step(batch).")
        return self._state["gradient"], self._state["variance"]

    @property
    def _state(self) -> dict[str, Any]:
        """Of all parameters; torch keeps it with the first (as that of ``torch.optim.LBFGS``)."""
        return self.state[self.param_groups[0]["params"][0]]

    @exact_derivatives()
    def step(self, batch: Any, second: Any = None) -> float:  # type: ignore[override]
        """One step.

        Args:
            batch: ``(inputs, targets)``, or a function without arguments that returns it (or two of them).
            second: Other data for the curvature. Without them a batch is split in halves if the optimizer is
                ``debiased``, or used for both.

        Returns:
            The mean loss of the batch (its first half, if it is split) before the step.

        Raises:
            NonFiniteError: If a loss, a gradient, or a parameter after the step is not finite; the parameters and the
                state stay.
        """
        with global_random_state():
            first, other = self._batches(batch, second)
            here = _Derivatives(self.model, self._chosen, self.likelihood, self.chunk_size)
            here.point.can_be_mapped = self._can_be_mapped
            loss = self._step(here, here.prepared(first), None if other is None else here.prepared(other))
        self._can_be_mapped = here.point.can_be_mapped
        return loss

    def _step(self, here: _Derivatives, first: _Data, other: _Data | None) -> float:
        group, state = self.param_groups[0], self._state
        last_step = state["step"].double() if state else None
        loss, gradient, *product = here.moments(first, last_step if other is None else None)
        mean, variance, loss_variance = gradient.mean, gradient.variance, loss.variance
        if last_step is not None:
            if other is not None:
                product = here.moments(other, last_step)[2:]
            before = state["gradient"].double(), state["variance"]
            mean, variance = update(*before, product[0].mean, product[0].variance, mean, variance)
            known = state["loss_variance"]
            if known is not None and known + loss_variance:
                loss_variance *= known / (known + loss_variance)
        line, length, size = None, float(mean.norm()), float(group["lr"])
        if group["self_tuning"] and length:
            direction = -mean / length
            slope, curvature = here.along(first if other is None else other, direction)
            if other is None:
                slope = _Moments(torch.tensor(-length, dtype=torch.float64), variance)
            line = LineProcess(*slope.numbers, *curvature.numbers, loss_variance)
            size *= line.best_step() / length
        vector = self._vector()
        move(self.model, self._chosen, -size * mean)
        dtype = self.param_groups[0]["params"][0].dtype
        spread = None if line is None else line.variance(size * length) - loss_variance  # of the loss where it is now
        state.update(gradient=mean.to(dtype), variance=variance, step=(self._vector() - vector).to(dtype))
        state["loss_variance"] = spread
        self.last_line = line
        return float(loss.mean)

    def _vector(self) -> Tensor:
        """The parameters, ``[D]``; their change is the step as it was rounded."""
        return torch.cat([p.detach().double().flatten() for p in self.param_groups[0]["params"]])


@dataclass(frozen=True)
class _Moments:
    """The mean of a batch, ``[D]`` or a scalar, and its variance for each entry, by the spread of the data."""

    mean: Tensor
    variance: float

    @property
    def numbers(self) -> tuple[float, float]:
        return float(self.mean), self.variance


_Data = tuple[_data.Inputs, Tensor]


class _Derivatives:
    """Those of a model's loss where it is, as moments over the data of a batch."""

    def __init__(self, model: nn.Module, names: list[str], likelihood: Likelihood, chunk_size: int | None) -> None:
        self._network = Network(Snapshot.of(model), names)
        self.point = LossAtPoint(self._network, likelihood, self._network.mean().double(), "hessian")
        self._likelihood, self._chunk_size = likelihood, chunk_size

    def prepared(self, batch: Any) -> _Data:
        """A batch with targets as the loss takes them, on the model's device."""
        inputs, targets, n = _data.only(batch)
        if n < 2:
            raise ValueError(f"Expected at least two data in a batch, for their variance, got {n}.")
        inputs, targets = (_data.to_device(part, self._network.device) for part in (inputs, targets))
        return inputs, self._likelihood.prepare_targets(targets, self._network.outputs(inputs).shape[1])

    def moments(self, batch: _Data, row: Tensor | None) -> list[_Moments]:
        """Of the loss, of its gradient, and of the product of its Hessian with a vector ``[D]`` if there is one."""
        unit, scale = (None, None) if row is None else scaled_to_unit(row[None])
        sums = [torch.zeros((), dtype=torch.float64)] * 6
        for inputs, targets in self._chunks(batch):
            with self.point.on(inputs, targets) as data:
                losses = self.point.losses(data.outputs.detach(), targets).double()[:, None]
                columns = [losses, *data.per_datum(None if unit is None else unit[0])]
            for index, column in enumerate(columns):
                sums[2 * index] = sums[2 * index] + column.sum(0)
                sums[2 * index + 1] = sums[2 * index + 1] + column.square().sum()
        n, names = len(batch[1]), ("the loss", "the gradient", "the product with the curvature")
        result = []
        for index, name in enumerate(names[: 2 if row is None else 3]):
            mean, squares = sums[2 * index] / n, sums[2 * index + 1]
            _checks.finite(mean, f"{name} of the batch", "Look for NaN in the data and the parameters.")
            factor = float(scale) if index == 2 and scale is not None else 1.0
            variance = float(squares - n * mean.square().sum()) / (n - 1) / n / len(mean)
            result.append(_Moments(factor * mean, factor**2 * max(0.0, variance)))
        return result

    def along(self, batch: _Data, direction: Tensor) -> tuple[_Moments, _Moments]:
        """Of first and second derivative of the loss along a direction ``[D]`` of length one."""
        parts = []
        for inputs, targets in self._chunks(batch):
            with self.point.on(inputs, targets) as data:
                parts.append(torch.stack(data.along(direction)))
        both = torch.cat(parts, 1)
        _checks.finite(both, "derivatives along the direction", "Look for an operation with an infinite derivative.")
        slope, curvature = (_Moments(x.mean(), float(x.var()) / len(x)) for x in both)
        return slope, curvature

    def _chunks(self, batch: _Data) -> list[_Data]:
        inputs, targets = batch
        parts = _data.slices(len(targets), self._chunk_size or len(targets))
        return [(_data.take(inputs, part), targets[part]) for part in parts]
