"""Minima of the validation loss over prior precisions and a temperature, on a grid and between its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor

from debiased_laplace._guards import warn_the_caller
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.posterior.temperature import AS_GOOD, TEMPERATURES, minimise


@dataclass(frozen=True)
class ValidationLoss:
    """Mean negative log predictive probability of data as a function of their (co)variances and the temperature.

    Attributes:
        likelihood: What the outputs mean.
        link: How predictions integrate over them.
        normals: ``[M, C]``, standard normal draws for ``"mc"``.
        noise_variance: Of the observations.
        mean: ``[N, C]``, float64.
        targets: Of the data, as the likelihood takes them.
        datum: ``[N]``, where these are sites of dense outputs, the number of the datum that each is of.
    """

    likelihood: Likelihood
    link: str
    normals: Tensor | None
    noise_variance: float | Tensor
    mean: Tensor
    targets: Tensor
    datum: Tensor | None = None

    def __call__(self, covariance: Tensor, temperature: float | Tensor) -> Tensor:
        """Of all data, in nats."""
        return self.of_targets(covariance, temperature).mean()

    def of_data(self, covariance: Tensor, temperature: float | Tensor) -> Tensor:
        """Of every datum, ``[N]``; of its sites the mean."""
        losses = self.of_targets(covariance, temperature)
        return losses if self.datum is None else mean_by_datum(losses, self.datum)

    def of_targets(self, covariance: Tensor, temperature: float | Tensor) -> Tensor:
        """Of every target, ``[N]``."""
        return self.likelihood.negative_log_predictive(
            self.mean / temperature, covariance / temperature**2, self.targets, self.link, self.normals,
            self.noise_variance,
        )  # fmt: skip

    def without_uncertainty(self, temperature: float) -> Tensor:
        """The mean with certain outputs."""
        outputs = self.mean / temperature
        return self.likelihood.negative_log_likelihood(outputs, self.targets, self.noise_variance).mean()


def mean_by_datum(values: Tensor, datum: Tensor) -> Tensor:
    """Means ``[n]`` over the values ``[N]`` of every datum."""
    numbers, counts = datum.unique(return_counts=True)
    place = torch.searchsorted(numbers, datum)
    return values.new_zeros(len(numbers)).index_add_(0, place, values) / counts


class Search:
    """Minima of the validation loss, on the grid and between its values.

    Args:
        loss: Of variances (or covariances) and a temperature.
        table: ``[R, n_parts, N, ...]``; :meth:`descend` turns it into logarithms, and has to come last.
        precisions: ``[R]``, ascending.
        fixed: The temperature if it is not tuned; may be changed before the first search of one.
    """

    def __init__(self, loss: ValidationLoss, table: Tensor, precisions: Tensor, fixed: float | None) -> None:
        self.loss, self.table, self.precisions, self.fixed = loss, table, precisions, fixed
        self.unit = 1.0  # of the range of temperatures
        self.lowest: float | None = None  # its lower end, if it is another
        self._profile: dict[int, tuple[float, float]] = {}

    def on_the_grid(self, index: int, temperature: float) -> float:
        """Loss of one prior precision for all parts."""
        return float(self.loss(self.table[index].double().sum(0), temperature))

    def best_on_the_grid(self, temperature: float) -> int:
        """Position of the best of them."""
        return min(range(len(self.precisions)), key=lambda index: self.on_the_grid(index, temperature))

    def best_temperature(self, loss: Callable[[float], float]) -> tuple[float, float]:
        """The temperature with the smallest loss, and the loss."""
        if self.fixed is not None:
            return self.fixed, loss(self.fixed)
        return minimise(loss, self.unit, self.lowest)

    def profile(self, index: int) -> tuple[float, float]:
        """The same for a prior precision of the grid."""
        if index not in self._profile:
            self._profile[index] = self.best_temperature(lambda tau: self.on_the_grid(index, tau))
        return self._profile[index]

    def climb(self, start: int) -> int:
        """A position from which no neighbour is better, each with its best temperature, in ever smaller steps."""
        step = max(1, len(self.precisions) // 8)
        while True:
            near = [i for i in (start, start - step, start + step) if 0 <= i < len(self.precisions)]
            best = min(near, key=lambda index: self.profile(index)[1])
            if best == start and step == 1:
                return start
            start, step = best, step if best != start else step // 2

    def as_good_below(self, least: float, index: int, temperature: float) -> tuple[float, int, float]:
        """Loss, position and temperature of the smallest prior precision from a position downwards that is as good."""
        smallest, limit = (least, index, temperature), least + AS_GOOD
        while index and self.profile(index - 1)[1] <= limit:
            index -= 1
            smallest = self.profile(index)[1], index, self.profile(index)[0]
        return smallest

    def is_as_good_above(self, least: float, index: int) -> bool:
        """Whether all prior precisions above a position are as good as the least loss."""
        last = len(self.precisions) - 1
        return index < last and all(self.profile(i)[1] <= least + AS_GOOD for i in range(last, index, -1))

    def more_uncertain(self, priors: Tensor, temperature: float) -> tuple[Tensor, list[bool]]:
        """Each prior precision in turn the smallest of the grid that is as good, if that is smaller; after a descent.

        Returns:
            ``[n_parts]``, and whether each is as good up to the end of the grid.
        """
        logs, chosen = self.precisions.log(), priors.log()

        def value(part: int, logarithm: Tensor) -> float:
            at = chosen.clone()
            at[part] = logarithm
            variances = interpolate(self.table, logs.to(self.table.device), at.to(self.table.device))
            return float(self.loss(variances, temperature))

        limit, flat = value(0, chosen[0]) + AS_GOOD, []
        for part in range(len(priors)):
            below = logs[logs < chosen[part] - 1e-9]
            bad, good = -1, len(below)
            if good and value(part, below[0]) <= limit:
                good = 0
            while good - bad > 1 and good:
                middle = max((bad + good) // 2, 0)
                bad, good = (bad, middle) if value(part, below[middle]) <= limit else (middle, good)
            if good < len(below):
                chosen[part] = below[good]
            flat.append(bool(chosen[part] < logs[-1] - 1e-9) and value(part, logs[-1]) <= limit)
        changed = chosen != priors.log()
        return torch.where(changed, chosen.exp(), priors), flat

    def most_uncertain(self, best: int, temperature: float) -> tuple[float, int, float]:
        """The one-standard-error rule: loss, position, and temperature of the smallest that is not told from the best.

        All smaller ones are looked at, not only those next to the best: losses need not be unimodal along the grid, nor
        are their differences as certain everywhere.
        """
        losses = self.loss.of_data(self.table[best].double().sum(0), temperature)
        for index in range(best if len(losses) > 1 else 0):
            best_temperature = self.profile(index)[0]
            here = self.loss.of_data(self.table[index].double().sum(0), best_temperature)
            difference = here - losses
            if float(difference.mean()) <= float(difference.std()) / math.sqrt(len(losses)):
                return float(here.mean()), index, best_temperature
        return float(losses.mean()), best, temperature

    def descend(self, starts: Sequence[tuple[int, float]]) -> tuple[Tensor, float, float]:
        """The best local minimum of the interpolated loss: prior precisions, temperature, and the interpolated loss.

        Args:
            starts: Positions on the grid and temperatures.
        """
        self.table.clamp_min_(torch.finfo(self.table.dtype).tiny).log_()
        n_priors, logs = self.table.shape[1], self.precisions.log()
        bounds = [(float(logs[0]), float(logs[-1]))] * n_priors
        if self.fixed is None:
            bounds.append((math.log(self.unit * TEMPERATURES[0]), math.log(self.unit * TEMPERATURES[1])))

        def value_and_slope(values: Any) -> tuple[float, Any]:
            with torch.inference_mode(False), torch.enable_grad():
                leaf = torch.tensor(values, dtype=torch.float64, requires_grad=True)
                there = leaf.to(self.table.device)
                variances = interpolate(self.table, logs.to(there.device), there[:n_priors])
                value = self.loss(variances, there[-1].exp() if self.fixed is None else self.fixed)
                (slope,) = torch.autograd.grad(value, leaf)
            return float(value.detach()), slope.numpy()

        optima = []
        for index, temperature in dict.fromkeys(starts):
            start = [float(logs[index])] * n_priors + ([math.log(temperature)] if self.fixed is None else [])
            options = {"maxiter": 500, "ftol": 1e-13, "gtol": 1e-9}
            optima.append(minimize(value_and_slope, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options))
        best = min(optima, key=lambda result: result.fun)
        if best.status == 1:  # out of iterations
            warn_the_caller(
                f"The search of prior precisions ended after {best.nit} steps before it was at a minimum: the "
                f"validation loss still falls by up to {abs(best.jac).max():.2g} nats for a factor e. Use one prior "
                "precision for all, or a smaller grid."
            )
        values = torch.as_tensor(best.x, dtype=torch.float64).exp()
        priors = values[:n_priors].clamp(self.precisions[0], self.precisions[-1])
        return priors, float(values[-1]) if self.fixed is None else self.fixed, float(best.fun)


def interpolate(table: Tensor, logs: Tensor, at: Tensor) -> Tensor:
    """Variances ``[N, C]``, float64: sums over parts of a table of logarithms ``[R, n_parts, N, C]``.

    Args:
        table: Logarithms of variances at every value, of every part.
        logs: ``[R]``, ascending logarithms of prior precisions.
        at: ``[n_parts]``, where to read it.
    """
    lower = (torch.searchsorted(logs, at.detach()) - 1).clamp(0, max(len(logs) - 2, 0))
    upper = (lower + 1).clamp_max(len(logs) - 1)
    width = logs[upper] - logs[lower]
    weight = (at - logs[lower]) / torch.where(width > 0, width, 1.0)
    parts = torch.arange(table.shape[1], device=table.device)
    low, high = table[lower, parts].double(), table[upper, parts].double()
    return torch.lerp(low, high, weight[:, None, None]).exp().sum(0)
