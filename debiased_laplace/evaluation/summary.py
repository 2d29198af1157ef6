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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from debiased_laplace.evaluation import records as storage
from debiased_laplace.evaluation.intervals import CONFIDENCE, overlap_factor, student_quantile
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


def combine(cells: Sequence[Cell], same_data: bool, overlap: float = 0.0) -> Cell:
    r"""The cell of several seeds.

    With S seeds, :math:`h` the quantile of Student's t times the standard error of the mean over seeds, and
    :math:`d_s` how far the interval of a seed's data reaches below (or above) its value:

    * Seeds judged on the same data know nothing of these, however well they agree. The two errors are independent, and
      their reaches are added in squares, :math:`\sqrt{h^2 + \overline{d^2}}`.
    * Seeds with data of their own spread by the data too. Few that agree by chance do not know more than their data:
      :math:`\max\big(h, \sqrt{\overline{d^2} / S}\big)`. Splits of one data set share data: with
      :math:`\rho = n_\text{test} / n_\text{train}` the error is :math:`s \sqrt{1/S + \rho}` (Nadeau and Bengio), and
      there are no more than :math:`1 + 1/\rho` test sets' worth of data.

    Args:
        cells: One for each seed, or for each draw.
        same_data: Whether all were judged on the same data.
        overlap: Otherwise :math:`\rho`, or zero for data that are independent.

    Returns:
        Mean, standard error, lower and upper bound. With a value that is not finite the interval is unbounded.

    Source: Zou and Donner, Statistics in Medicine 27 (2008), 1693-1702, for sums of variables with skewed intervals;
    :func:`~debiased_laplace.evaluation.intervals.overlap_factor`.
    """
    if len(cells) == 1:
        return cells[0]
    values, errors, low, high = np.array(cells, dtype=np.float64).T
    if not np.isfinite(values).all():  # no variance: the interval is what holds those of all seeds
        return [_mean(values.tolist()), math.inf, float(low.min()), float(high.max())]
    mean, n = float(values.mean()), len(values)
    overlap = 0.0 if same_data else overlap
    spread = float(values.std(ddof=1)) / math.sqrt(overlap_factor(n, overlap))
    n_data = min(n, 1 + 1 / overlap) if overlap else n
    quantile = student_quantile(n, CONFIDENCE)

    def joined(seeds: float, data: Array) -> float:
        squares = float(np.square(data).mean())
        return math.sqrt(seeds**2 + squares) if same_data else max(seeds, math.sqrt(squares / n_data))

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
    units = _units(records, same_data)

    def entry(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return _entry(entries, names, partial(combine, same_data=same_data, overlap=_overlap(units, entries[0]["n"])))

    strong = [record["strong_shift"] for record in records]
    return {
        "schema_version": storage.SCHEMA_VERSION,
        "task": first["task"],
        "settings": first["settings"],
        "seeds": seeds,
        "made": [record["made"] for record in records],
        "same_data": same_data,
        "data": first["data"],
        "units": units,
        "equal_settings": [record["equal_settings"] for record in records],
        "regression": first["regression"],
        "n_resamples": first["n_resamples"],
        "environments": _unique([record["environment"] for record in records]),
        "seconds": {"model": statistics.fmean(record["seconds"]["model"] for record in records)},
        "predictors": {
            name: _about([record["predictors"][name] for record in records]) for name in first["predictors"]
        },
        "test": entry([record["test"] for record in records]),
        "shifts": [entry([record["shifts"][i] for record in records]) for i in range(len(first["shifts"]))],
        "ood": [entry([record["ood"][i] for record in records]) for i in range(len(first["ood"]))],
        "strong_shift": entry(strong) | {key: strong[0][key] for key in ("shifts", "sets")} if all(strong) else None,
        "distances": _distances([record["distances"] for record in records if record["distances"]], same_data),
    }


def _units(records: Sequence[dict[str, Any]], same_data: bool) -> dict[str, Any]:
    """What a mean over seeds and draws is a mean over, and how far test data of different seeds overlap."""
    draws = max(
        (len(about["draws"]) for r in records for about in r["predictors"].values() if "draws" in about), default=1
    )
    data, independent = records[0]["data"], records[0]["task"]["independent_seeds"]
    networks = len({record["inputs"]["network"] for record in records})
    # What a split divides: with one network for all, the data that tune and those that judge.
    rest = data["train"] if networks > 1 and data["train"] else data["validation"]
    return {
        "networks": networks,
        "splits": len({record["test"]["targets"] for record in records}),
        "draws": draws,
        # Of seeds with data of their own nothing else is known: splits of one set, unless the task says otherwise.
        "rest": 0 if same_data or independent or len(records) == 1 else rest,
    }


def _overlap(units: Mapping[str, Any], n: int) -> float:
    """Test data over the others of splits that share data; zero for data that share nothing."""
    return n / units["rest"] if units["rest"] else 0.0


_OF_EACH_SEED = (
    "prior_precision", "temperature", "noise", "validation_nll", "edges", "prior_precisions", "budget", "draws"
)  # fmt: skip
Combine = Callable[[Sequence[Cell]], Cell]


def _entry(entries: Sequence[dict[str, Any]], names: Sequence[str], of: Combine) -> dict[str, Any]:
    first = entries[0]
    result: dict[str, Any] = {key: first[key] for key in ("name", "severity", "n") if key in first}
    result |= _cells(entries, names, of)
    equal = [entry["equal_settings"] for entry in entries if "equal_settings" in entry]
    if equal:
        result["equal_settings"] = _cells(equal, names, of)
    if first.get("calibrated"):
        result["calibrated"] = {
            name: {key: np.mean([one[key] for one in own], axis=0).tolist() for key in own[0]}
            for name in names
            if (own := [entry["calibrated"][name] for entry in entries if name in entry["calibrated"]])
        }
    result["draws"] = {name: [entry["draws"].get(name, {}) for entry in entries] for name in first["draws"]}
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


def _cells(entries: Sequence[dict[str, Any]], names: Sequence[str], of: Combine) -> dict[str, Any]:
    """Scores and differences; a method that failed for some seeds has the numbers of the others."""
    scores = {name: own for name in names if (own := [e["scores"][name] for e in entries if name in e["scores"]])}
    return {
        "scores": {name: _combined(own, of) for name, own in scores.items()},
        "differences": {
            second: {
                name: _combined(own, of)
                for name in names
                if (
                    own := [e["differences"][second][name] for e in entries if name in e["differences"].get(second, {})]
                )
            }
            for second in dict.fromkeys(second for entry in entries for second in entry["differences"])
        },
    }


def _combined(scores: Sequence[dict[str, Cell]], of: Combine) -> dict[str, Cell]:
    return {score: of([own[score] for own in scores]) for score in scores[0]}


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
    for key in _OF_EACH_SEED:
        if key in first:
            found[key] = [entry[key] for entry in entries]
    for key in ("coverage", "layers", "link", "members"):
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


def title(entry: Mapping[str, Any]) -> str:
    """Of test or shifted data."""
    if entry["name"] == "test":
        return "test data"
    return str(entry["name"]) if entry["severity"] is None else f"{entry['name']} {entry['severity']}"


def is_worse_than_uniform(summary: Mapping[str, Any], score: str, cell: Sequence[float]) -> bool:
    r"""Whether a score of a classifier is worse than that of equal probabilities for all classes.

    NLL is then above :math:`\log C`, the Brier score above :math:`1 - 1/C`.
    """
    classes = summary["task"]["n_outputs"]
    bounds = {"nll": math.log(classes), "brier": 1 - 1 / classes} if not summary["regression"] else {}
    return score in bounds and cell[0] > bounds[score]


def comparisons(summary: Mapping[str, Any]) -> int:
    """How many differences have a verdict in the tables.

    On test data those of the candidate, one for each score with a direction; over all strong shifts those of every
    method; at equal settings one each.
    """
    candidate = by_role(summary, "candidate")
    strong = summary["strong_shift"] or {"differences": {}}
    own = [others.get(candidate, {}) for others in summary["test"]["differences"].values()]
    equal = [
        others
        for entry in (summary["test"], strong)
        for others in entry.get("equal_settings", {}).get("differences", {}).values()
    ]
    return (
        sum(not is_undirected(score) for scores in own for score in scores)
        + sum(len(others) for others in strong["differences"].values())
        + len(equal)
    )


def is_undirected(score: str) -> bool:
    """Whether a difference of the score has no good direction."""
    return score.startswith(("coverage", "width"))


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


def calibration_verdict(entry: Mapping[str, Any], score: str, first: str, second: str) -> str | None:
    """``"both as if calibrated"`` where both calibration errors are within what calibrated predictors have, or None."""
    found = [entry.get("calibrated", {}).get(name, {}).get(score) for name in (first, second)]
    scores = [entry["scores"].get(name, {}).get(score, [math.nan])[0] for name in (first, second)]
    if any(own is None for own in found):
        return None
    inside = all(value <= own[3] for value, own in zip(scores, found, strict=True) if own is not None)
    return "both as if calibrated" if inside else None


def _unique(values: list[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]
