"""Settings at the end of their search: what is tuned as far as it can go may want to go further."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from debiased_laplace.laplace import Laplace
from debiased_laplace.posterior.temperature import at_the_end

#: Which end of the search each setting is at: ``"smallest"`` or ``"largest"``.
Edges = dict[str, str]
#: In tables.
MARK = {"smallest": "↓", "largest": "↑"}
#: A warning of what is tuned without a posterior; :func:`told` finds it.
AT_THE_END = "The {} is the {} of its search, {}."


def near_the_end(value: float, low: float, high: float) -> str | None:
    """Which end a value is at: what searches by sections never reaches the end itself."""
    near = 1e-3 * (high - low)
    return "smallest" if value <= low + near else "largest" if value >= high - near else None


def told(warnings: Sequence[str]) -> Edges:
    """What warnings say of the noise of an ensemble."""
    start = AT_THE_END.partition(", ")[0]
    sides = [side for side in MARK if any(text.startswith(start.format("noise", side)) for text in warnings)]
    return {"noise": sides[0]} if sides else {}


def of_temperature(value: float, alone: float = 1.0) -> Edges:
    """Of a temperature; ``alone`` is that of the network without a posterior."""
    side = at_the_end(value, alone)
    return {"temperature": side} if side else {}


def of_prior(values: Sequence[float], grid: Tensor) -> Edges:
    """Of one prior precision, or of several, with how many of them are there."""
    if len(grid) == 1:
        return {}
    ends = {"smallest": float(grid.min()), "largest": float(grid.max())}
    counts = {side: sum(math.isclose(v, end, rel_tol=1e-5) for v in values) for side, end in ends.items()}
    of = f" of {len(values)}" if len(values) > 1 else ""
    return {f"prior precision ({counts[side]}{of})" if of else "prior precision": side for side in ends if counts[side]}


def of_posterior(la: Laplace, grid: Tensor) -> Edges:
    """Of a tuned posterior, whose noise has a closed form and no end."""
    at_an_end = of_prior(la.posterior.prior_precision.detach().double().flatten().tolist(), grid)
    if la.tuned is not None:
        at_an_end |= of_temperature(la.tuned.temperature, la.tuned.temperature_alone[0])
    return at_an_end
