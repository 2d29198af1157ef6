r"""Records of several seeds become one summary of the same layout; a cell is ``[value, standard error, lower, upper]``.

Of one record the cells stay. Of several, see :func:`combine`. A difference counts as shown only if its 95 % interval
leaves out zero, and as negligible if all of the interval is within :data:`MARGIN`. Differences on fewer than
:data:`~debiased_laplace.evaluation.intervals.MIN_DATA` data have the whole range of the score as their interval, so
that nothing is said of them.

Scores may be infinite, or undefined (NaN: an infinite one minus an infinite one, or of a method that failed there).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from debiased_laplace.evaluation import records as storage
from debiased_laplace.evaluation.intervals import CONFIDENCE, student_quantile
from debiased_laplace.evaluation.metrics import Array

Cell = list[float]
#: Scores of which a larger value is better; of all others a smaller one is, or neither (coverage).
LARGER_IS_BETTER = ("accuracy", "auroc", "aupr")
#: Differences within it, interval and all, are called negligible: a thousandth of a nat, a tenth of a per cent.
MARGIN = 1e-3
#: Scores in the units of a regression's targets, which have no such margin.
IN_UNITS = ("rmse", "crps", "width_50", "width_90", "width_95")
#: Severity from which a shift counts as strong.
STRONG = 3


def combine(cells: Sequence[Cell], same_data: bool) -> Cell:
    r"""The cell of several seeds.

    With S seeds, :math:`h` the quantile of Student's t times the standard error of the mean over seeds, and
    :math:`d_s` how far the interval of a seed's data reaches below (or above) its value:

    * Seeds judged on the same data know nothing of these, however well they agree. The two errors are independent, and
      their reaches are added in squares, :math:`\sqrt{h^2 + \overline{d^2}}`.
    * Seeds with data of their own spread by the data too. Few that agree by chance do not know more than their data:
      :math:`\max\big(h, \sqrt{\overline{d^2} / S}\big)`.

    Args:
        cells: One for each seed.
        same_data: Whether all seeds were judged on the same data.

    Returns:
        Mean, standard error, lower and upper bound. With a value that is not finite the interval is unbounded.

    Source: Zou and Donner, Statistics in Medicine 27 (2008), 1693-1702, for sums of variables with skewed intervals.
    """
    if len(cells) == 1:
        return cells[0]
    values, errors, low, high = np.array(cells, dtype=np.float64).T
    if not np.isfinite(values).all():  # no variance: the interval is what holds those of all seeds
        return [_mean(values.tolist()), math.inf, float(low.min()), float(high.max())]
    mean, n = float(values.mean()), len(values)
    spread = float(values.std(ddof=1)) / math.sqrt(n)
    quantile = student_quantile(n, CONFIDENCE)

    def joined(seeds: float, data: Array) -> float:
        squares = float(np.square(data).mean())
        return math.sqrt(seeds**2 + squares) if same_data else max(seeds, math.sqrt(squares / n))

    reach = [joined(quantile * spread, own) for own in (values - low, high - values)]
    return [mean, joined(spread, errors), mean - reach[0], mean + reach[1]]


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything the report shows, from the records of :func:`~debiased_laplace.evaluation.suite.run`.

    Raises:
        ValueError: If there is no record, or records differ in their settings or share a seed.
    """
    if not records:
        raise ValueError("Expected at least one record, got none.")
    first, seeds = records[0], [record["seed"] for record in records]
    if any(r["settings"] != first["settings"] or r["task"]["name"] != first["task"]["name"] for r in records):
        raise ValueError("Expected records of one task with equal settings. Summarise the others by themselves.")
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"Expected one record for each seed, got seeds {seeds}.")
    same_data = all(record["test"]["targets"] == first["test"]["targets"] for record in records)
    names = [name for name in first["predictors"] if any(name in record["test"]["scores"] for record in records)]
    return {
        "schema_version": storage.SCHEMA_VERSION,
        "task": first["task"],
        "settings": first["settings"],
        "seeds": seeds,
        "made": [record["made"] for record in records],
        "same_data": same_data,
        "regression": first["regression"],
        "n_resamples": first["n_resamples"],
        "environments": _unique([record["environment"] for record in records]),
        "seconds": {"model": statistics.fmean(record["seconds"]["model"] for record in records)},
        "predictors": {
            name: _about([record["predictors"][name] for record in records]) for name in first["predictors"]
        },
        "test": _entry([record["test"] for record in records], names, same_data),
        "shifts": [
            _entry([record["shifts"][i] for record in records], names, same_data) for i in range(len(first["shifts"]))
        ],
        "ood": [_entry([record["ood"][i] for record in records], names, same_data) for i in range(len(first["ood"]))],
        "distances": _distances([record["distances"] for record in records if record["distances"]], same_data),
    }


def _entry(entries: Sequence[dict[str, Any]], names: Sequence[str], same_data: bool) -> dict[str, Any]:
    first = entries[0]
    result: dict[str, Any] = {key: first[key] for key in ("name", "severity", "n")}
    # A method that failed for some seeds has the numbers of the others.
    scores = {name: [entry["scores"][name] for entry in entries if name in entry["scores"]] for name in names}
    result["scores"] = {name: _combined(own, same_data) for name, own in scores.items()}
    result["differences"] = {
        second: {
            name: _combined(own, same_data)
            for name in names
            if (own := [e["differences"][second][name] for e in entries if name in e["differences"].get(second, {})])
        }
        for second in dict.fromkeys(second for entry in entries for second in entry["differences"])
    }
    if "curves" in first:
        result["curves"] = {
            name: _curves([entry["curves"][name] for entry in entries if name in entry["curves"]]) for name in names
        }
    if "histograms" in first:  # of the first seed that has them
        result["histograms"] = {
            name: next(e["histograms"][name] for e in entries if name in e["histograms"]) for name in names
        }
    if "most_uncertain" in first:
        result["most_uncertain"] = first["most_uncertain"]
    return result


def _combined(scores: Sequence[dict[str, Cell]], same_data: bool) -> dict[str, Cell]:
    return {score: combine([own[score] for own in scores], same_data) for score in scores[0]}


def _curves(curves: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bins added, lines averaged."""
    found: dict[str, Any] = {}
    for key in curves[0]:
        own = [curve[key] for curve in curves]
        if key == "reliability":
            found[key] = added(own)
        else:
            length = min(len(line) for line in own)
            found[key] = [_mean([line[i] for line in own]) for i in range(length)]
    return found


def _mean(values: Sequence[float]) -> float:
    """Of finite, infinite and undefined numbers; infinite ones of both signs have none."""
    with np.errstate(invalid="ignore"):
        return statistics.fmean(values) if all(map(math.isfinite, values)) else float(np.mean(values))


def geometric_mean(values: Sequence[float]) -> float:
    """Of numbers that may be zero or infinite."""
    with np.errstate(divide="ignore"):
        return float(np.exp(np.mean(np.log(values))))


def added(bins: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Reliability bins of several seeds or conditions as those of all their data."""
    return {part: [sum(column) for column in zip(*(own[part] for own in bins), strict=True)] for part in bins[0]}


def _about(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {key: entries[0][key] for key in ("kind", "role", "description")}
    found["warnings"] = _unique([text for entry in entries for text in entry["warnings"]])
    failed = [entry["failed"] for entry in entries if "failed" in entry]
    if failed:
        found |= {"failed": _unique(failed), "n_failed": len(failed)}
    entries = [entry for entry in entries if "failed" not in entry]
    first = entries[0] if entries else {"seconds": {}}
    found["seconds"] = {
        step: statistics.fmean(entry["seconds"][step] for entry in entries)
        for step in first["seconds"]
        if all(step in entry["seconds"] for entry in entries)
    }
    found["undetermined"] = _unique([what for entry in entries for what in entry.get("undetermined", ())])
    for key in ("prior_precision", "temperature", "noise", "validation_nll", "edge", "prior_precisions"):
        if key in first:
            found[key] = [entry[key] for entry in entries]
    for key in ("coverage", "layers", "members"):
        if key in first:
            found[key] = first[key]
    if first.get("curve"):
        curves = [entry["curve"] for entry in entries]
        found["curve"] = {  # prior precisions of a regression are relative to a noise of each seed's own
            "prior_precisions": [
                geometric_mean(column) for column in zip(*(curve["prior_precisions"] for curve in curves), strict=True)
            ],
            "losses": [_mean(column) for column in zip(*(curve["losses"] for curve in curves), strict=True)],
        }
    return found


def _distances(entries: Sequence[dict[str, Any]], same_data: bool) -> dict[str, Any]:
    """Of the seeds that have them; a method that failed for one of these is left out."""
    if not entries:
        return {}
    names = [name for name in entries[0]["equal"] if all(name in entry["equal"] for entry in entries)]
    return {
        where: {
            name: {part: combine([entry[where][name][part] for entry in entries], same_data) for part in found[name]}
            for name in names
            if name != "prior_precision"
        }
        | {"prior_precision": [entry[where]["prior_precision"] for entry in entries]}
        for where, found in entries[0].items()
    }


# -- looking things up -----------------------------------------------------------------------------


def by_role(summary: Mapping[str, Any], role: str) -> str | None:
    """Name of the method with a role, if there is one that was judged."""
    return next((name for name in summary["test"]["scores"] if summary["predictors"][name]["role"] == role), None)


def shifts(summary: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The entries of every shift, by severity."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in summary["shifts"]:
        found.setdefault(entry["name"], []).append(entry)
    return found


def is_strong(entry: Mapping[str, Any]) -> bool:
    """Whether a shift is of severity three or more, or has no degrees."""
    return entry["severity"] is None or entry["severity"] >= STRONG


def differences(
    summary: Mapping[str, Any], first: str, second: str, score: str
) -> Iterator[tuple[dict[str, Any], Cell]]:
    """Entries of the shifts with the difference of two predictors there."""
    for entry in summary["shifts"]:
        cell = entry["differences"].get(second, {}).get(first, {}).get(score)
        if cell is not None:
            yield entry, cell


def verdict(score: str, cell: Sequence[float]) -> str:
    """``"better"``, ``"worse"``, ``"negligible"`` or ``"no difference shown"``, for the first of two predictors."""
    low, high = cell[2], cell[3]
    if score.rpartition(", ")[2] not in IN_UNITS and max(abs(low), abs(high)) < MARGIN:
        return "negligible"
    if not (low > 0 or high < 0):
        return "no difference shown"
    larger = score.rpartition(", ")[2] in LARGER_IS_BETTER
    return "better" if (cell[0] > 0) == larger else "worse"


def judged(score: str, cell: Sequence[float]) -> str:
    """:func:`verdict`, or ``"not defined"`` for a difference that is not."""
    return "not defined" if math.isnan(cell[0]) else verdict(score, cell)


def _unique(values: list[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]
