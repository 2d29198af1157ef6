r"""The temperature that outputs are divided by, from validation data, and what is done where these determine none.

The loss of temperature scaling (Guo et al., arXiv 1706.04599) is convex in the inverse temperature b. With
:math:`f_n` the outputs of a datum and :math:`s_n` the one of its target,

.. math:: g(b) = \frac1N \sum_n \Big(\sum_c p_{nc}(b)\, f_{nc} - s_n\Big)

is its slope and grows: there is one zero, found by Brent's method in log b whatever the scale of the outputs, unless

* nothing is wrong: :math:`g(\infty) = 0`. The loss falls as long as the temperature does, and so would the loss of the
  first mistake on other data rise, without bounds. The temperature is then 1: the network is left as it is.
* the outputs are no better than none: :math:`g(0) \geq 0`. The loss falls towards that of equal probabilities. The
  temperature is then the upper end of :data:`TEMPERATURES`.

Together with a posterior the loss need not be convex, and levels off where the temperature is small beside the
uncertainty: it is searched in :data:`TEMPERATURES`. Of equally good values the one nearest to 1 is taken. Averages over
drawn outputs have no temperature below 1, or below that of the network alone if this is smaller: draws would become
certain, each of one class, and a class that none of them has would have probability zero on other data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace._guards import warn_the_caller
from debiased_laplace.likelihoods import Likelihood

#: The range of temperatures, everywhere, where data alone do not decide. In units of the temperature of the network
#: alone if that is outside, see :func:`unit_of`.
TEMPERATURES = 1 / 20, 20.0
#: Losses that differ by less (in nats for each datum) are equally good.
AS_GOOD = 1e-6
# Where the zero of the slope is looked for: outputs of any scale that single precision holds.
_BRACKET = math.log(1e-38), math.log(1e38)
_START = "Validation data do not determine the "
# So many times the inverse of the largest output of a datum, probabilities are zero and one unless outputs are equal.
_SATURATED = 1e20
# Shares of the range at which another minimum than the one at an end would show.
_COARSE = 0.1, 0.3, 0.5, 0.7, 0.9
# Temperatures looked at for the largest that is as good, from the best to the end of the range.
_STEPS = 257


@dataclass(frozen=True)
class TunedTemperature:
    """A temperature from validation data.

    Attributes:
        value: What outputs are divided by.
        loss: Mean negative log-likelihood there, in nats.
        undetermined: Why the data determine none, if so.
    """

    value: float
    loss: float
    undetermined: str | None = None


def temperature_scaling(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> TunedTemperature:
    """The temperature with the smallest loss, without any posterior.

    Args:
        likelihood: With a link: of classes, or Bernoulli.
        outputs: ``[N, C]``; computed in float64. Any scale that single precision holds will do.
        targets: As the likelihood takes them.

    Raises:
        NonFiniteError: If outputs are not finite.

    Source: Guo et al. 2017, arXiv 1706.04599.
    """
    outputs = outputs.double()
    _checks.finite(outputs, "the outputs of the validation data", "Look for NaN in the validation data or the model.")

    def loss(temperature: float) -> float:
        return float(likelihood.loss(outputs / temperature, targets).mean())

    def slopes(scaled: Tensor, inverse: float) -> Tensor:
        return (likelihood.gradient(inverse * scaled, targets) * scaled).sum(-1)

    largest = outputs.abs().amax(-1, keepdim=True)
    if float(slopes(outputs / torch.where(largest > 0, largest, 1.0), _SATURATED).max()) <= 1e-12:
        why = (
            f"all {len(outputs)} predictions on them are right (or tied), and the smaller the temperature, the smaller "
            "the loss. It is 1, and outputs stay as they are; use validation data on which the network makes mistakes"
        )
        return TunedTemperature(1.0, loss(1.0), why)
    scale = float(largest.max())

    def slope(logarithm: float) -> float:
        return float(slopes(outputs / scale, scale * math.exp(-logarithm)).mean())

    low, high = _BRACKET
    if float(slopes(outputs / scale, 0.0).mean()) >= 0 or slope(high) >= 0:
        value = TEMPERATURES[1]
        why = (
            "the outputs are no better than equal probabilities for all classes, and the larger the temperature, the "
            f"smaller the loss. It is {value:g}; check the labels, and that the network is trained"
        )
        return TunedTemperature(value, loss(value), why)
    value = math.exp(brentq(slope, low, high, xtol=1e-13, rtol=1e-14)) if slope(low) > 0 else math.exp(low)
    return TunedTemperature(value, loss(value))


def most_uncertain_temperature(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> TunedTemperature:
    r"""The largest temperature that the data do not tell from the best: one standard error of the paired difference.

    With :math:`d_n` the loss of a datum less that at the best temperature, the largest :math:`\tau` of
    :data:`TEMPERATURES` with :math:`\bar d \leq s_d / \sqrt N` (Breiman et al. 1984): what
    ``selection="one_standard_error"`` of :func:`~debiased_laplace.posterior.tune.tune` does for a posterior.
    Where the data determine no best temperature it is that of :func:`temperature_scaling`.

    Args:
        likelihood: With a link: of classes, or Bernoulli.
        outputs: ``[N, C]``; computed in float64.
        targets: As the likelihood takes them.

    Raises:
        NonFiniteError: If outputs are not finite.
    """
    best = temperature_scaling(likelihood, outputs, targets)
    if best.undetermined or len(outputs) < 2:
        return best
    outputs = outputs.double()
    least = likelihood.loss(outputs / best.value, targets)

    def excess(logarithm: float) -> float:
        difference = likelihood.loss(outputs / math.exp(logarithm), targets) - least
        return float(difference.mean() - difference.std() / math.sqrt(len(least)))

    start, end = math.log(best.value), math.log(unit_of(best.value) * TEMPERATURES[1])
    values = torch.linspace(start, max(start, end), _STEPS, dtype=torch.float64).tolist()
    last = max([0, *(index for index, value in enumerate(values) if excess(value) <= 0)])
    logarithm = values[last]
    if last + 1 < len(values):  # it is allowed here, and not at the next value
        logarithm = brentq(excess, logarithm, values[last + 1], xtol=1e-12) if excess(logarithm) < 0 else logarithm
    value = math.exp(logarithm)
    return TunedTemperature(value, float(likelihood.loss(outputs / value, targets).mean()))


def at_the_end(value: float, alone: float = 1.0) -> str | None:
    """Which end of the range of :data:`TEMPERATURES` a temperature is at, ``"smallest"`` or ``"largest"``, if any.

    Args:
        value: A tuned temperature.
        alone: That of the network alone, which decides the unit of the range.
    """
    low, high = (math.log(unit_of(alone) * end) for end in TEMPERATURES)
    near = 1e-3 * (high - low)  # what searches by sections never reaches the end itself
    return "smallest" if math.log(value) <= low + near else "largest" if math.log(value) >= high - near else None


def unit_of(alone: float) -> float:
    """What :data:`TEMPERATURES` are multiplied by: one, or the temperature of the network alone if that is outside."""
    return 1.0 if TEMPERATURES[0] <= alone <= TEMPERATURES[1] else alone


def minimise(
    loss: Callable[[float], float], unit: float = 1.0, lowest: float | None = None
) -> tuple[float, float]:  # fmt: skip
    """The temperature with the smallest loss over :data:`TEMPERATURES`, by Brent's method, and the loss.

    Args:
        loss: Of a temperature.
        unit: From :func:`unit_of`.
        lowest: The lower end of the range, if it is another.
    """

    def at(logarithm: float) -> float:
        return loss(math.exp(logarithm))

    ends = [math.log(unit * TEMPERATURES[0] if lowest is None else lowest), math.log(unit * TEMPERATURES[1])]
    best, least = _minimum_at_an_end(at, ends) or _minimum_between(at, ends)
    good = least + 1e-12 * abs(least)  # up to rounding
    at_unit = loss(unit)
    if at_unit <= good:
        return unit, at_unit
    bad, nearer = math.log(unit), 0.99 * best + 0.01 * math.log(unit)
    if at(nearer) <= good:
        while abs(best - bad) > 1e-9:
            middle = (bad + best) / 2
            bad, best = (bad, middle) if at(middle) <= good else (middle, best)
        least = at(best)
    return math.exp(best), least


def _minimum_between(loss: Callable[[float], float], ends: Sequence[float]) -> tuple[float, float]:
    result = minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-9})
    return float(result.x), float(result.fun)


def _minimum_at_an_end(loss: Callable[[float], float], ends: Sequence[float]) -> tuple[float, float] | None:
    """An end that the loss falls towards from within and that no value of a coarse grid beats; sections take long."""
    for end, other in (ends, ends[::-1]):
        value, width = loss(end), other - end
        if loss(end + 1e-3 * width) <= value + 1e-11 * abs(value) or loss(end + 1e-7 * width) < value:
            continue
        if all(loss(end + part * width) > value for part in _COARSE):
            return end, value
    return None


# -- what the data do not determine ----------------------------------------------------------------


def warn_undetermined(what: str, why: str) -> None:
    """Say that a quantity is a choice, not a result; :func:`undetermined_in` finds it in the text."""
    warn_the_caller(f"{_START}{what}: {why}.")


def warn_of_no_evidence(temperature: float) -> None:
    """Say that a marginal likelihood at another temperature of the posterior than one is none."""
    if temperature != 1:
        warn_the_caller(
            f"The marginal likelihood at temperature={temperature:g} is not the evidence: the likelihood to the power "
            f"{1 / temperature:g} is no density of the data, so that values at different temperatures, or those of "
            "other models, are not to be compared. Use temperature=1, or choose on validation data."
        )


def undetermined_in(texts: Sequence[str]) -> list[str]:
    """The quantities that warnings say are not determined, each once."""
    quantities = [text.removeprefix(_START).partition(":")[0] for text in texts if text.startswith(_START)]
    return list(dict.fromkeys(quantities))
