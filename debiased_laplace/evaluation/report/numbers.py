"""Numbers, intervals and what they are over, as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from debiased_laplace.evaluation.report.verdicts import Summary

MINUS = "\N{MINUS SIGN}"


def unit(summary: Summary, n: int, *, sets: int = 0) -> str:
    """What an interval is over, in words.

    Args:
        summary: From :func:`~debiased_laplace.evaluation.report.summary.summarise`.
        n: Data in a seed.
        sets: Of copies of the data, resampled together; one if they are all copies of the same.
    """
    units = summary["units"]
    parts = [f"{n:,} data"]
    if "folds" in units:
        whole, others = f"{n * units['folds']:,} data", "the other" if units["folds"] == 2 else "the others"
        times = units["splits"] // units["folds"]
        parts[0] = f"{whole}, judged in {units['folds']} folds of which each is tuned on {others}"
        parts[0] += f", in {times} splits" if times > 1 else ""
    elif units["splits"] > 1:
        parts[0] = f"{units['splits']} splits with {parts[0]} each"
    if sets == 1:
        parts[0] += ", drawn together with all their copies"
    if units["rest"]:
        other = "training" if units["networks"] > 1 else "validation"
        parts[0] += f" (they overlap: corrected for {n:,} test data to {units['rest']:,} {other} data)"
    for name in ("networks", "draws"):
        if units[name] > 1:
            parts.append(f"{units[name]} {name}" + (" of the curvature data" if name == "draws" else ""))
    if units["networks"] == 1 and len(summary["seeds"]) > 1 and units["splits"] == 1:
        parts.append(seeds(summary))
    return " and ".join(parts) + (", one network" if units["networks"] == 1 else "")


def unshared(summary: Summary) -> float:
    """Of test data counted over all seeds, the share that are not the same again: see ``cells.combine``."""
    n_seeds, rest = len(summary["seeds"]), summary["units"]["rest"]
    if summary["same_data"]:
        return 1 / n_seeds
    return min(n_seeds, 1 + rest / summary["test"]["n"]) / n_seeds if rest else 1.0


def number(value: float, digits: int, *, sign: bool = False, scale: float = 1.0) -> str:
    """A number with a true minus; ``"infinite"`` or ``"undefined"`` where it is none."""
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "infinite" if value > 0 else f"{MINUS}infinite"
    return (f"{value * scale:+.{digits}f}" if sign else f"{value * scale:.{digits}f}").replace("-", MINUS)


def plus_minus(cell: Sequence[float], digits: int, *, sign: bool = False, scale: float = 1.0) -> str:
    """Value ± standard error; an infinite or undefined value has none."""
    if not math.isfinite(cell[0]):
        return number(cell[0], digits)
    return f"{number(cell[0], digits, sign=sign, scale=scale)} ± {number(cell[1], digits, scale=scale)}"


def with_interval(cell: Sequence[float], digits: int, *, scale: float = 1.0) -> str:
    """A difference with its 95 % interval."""
    if math.isnan(cell[0]):
        return number(cell[0], digits)
    value, low, high = (number(cell[i], digits, sign=True, scale=scale) for i in (0, 2, 3))
    return f"{value} [{low}, {high}]"


def seeds(summary: Summary) -> str:
    """How many seeds, in words."""
    count = len(summary["seeds"])
    return f"{count} seed{'s' * (count > 1)}"
