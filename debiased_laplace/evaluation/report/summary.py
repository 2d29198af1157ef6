r"""Records of several seeds become one summary of the same layout.

Of one record the cells stay; of several, see :func:`~debiased_laplace.evaluation.scores.cells.combine`, and
:func:`~debiased_laplace.evaluation.scores.cells.cross_fitted` for a task with ``FOLDS``. Scores may be infinite, or
undefined (NaN: an infinite one minus an infinite one, or of a method that failed there).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from debiased_laplace.evaluation import records as storage
from debiased_laplace.evaluation.scores.cells import Cell, combine, cross_fitted, geometric_mean, mean_of


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything the report shows, from the records of :func:`~debiased_laplace.evaluation.suite.seeds.run`.

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
    if "folds" in units:
        records = sorted(records, key=lambda record: record["seed"])

    def entry(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        overlap = entries[0]["n"] / units["rest"] if units["rest"] else 0.0
        return _entry(entries, names, _rule(units, len(records), same_data, overlap))

    strong = [record["strong_shift"] for record in records]
    return {
        "schema_version": storage.SCHEMA_VERSION,
        "task": first["task"],
        "settings": first["settings"],
        "seeds": [record["seed"] for record in records],
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
        "distances": _distances(
            [record["distances"] for record in records if record["distances"]],
            _rule(units, len(records), same_data, 0.0),
        ),
    }


def _units(records: Sequence[dict[str, Any]], same_data: bool) -> dict[str, Any]:
    """What a mean over seeds and draws is a mean over, and how far test data of different seeds overlap.

    ``folds`` is there if seeds judge the folds of one data set in turn, and none of the folds is missing.
    """
    draws = max(
        (len(about["draws"]) for r in records for about in r["predictors"].values() if "draws" in about), default=1
    )
    data, independent = records[0]["data"], records[0]["task"]["independent_seeds"]
    networks = len({record["inputs"]["network"] for record in records})
    # What a split divides: with one network for all, the data that tune and those that judge.
    rest = data["train"] if networks > 1 and data["train"] else data["validation"]
    folds, seeds = records[0]["task"]["folds"], {record["seed"] for record in records}
    whole = folds > 1 and all(seed - seed % folds + i in seeds for seed in seeds for i in range(folds))
    return {
        "networks": networks,
        "splits": len({record["test"]["targets"] for record in records}),
        "draws": draws,
        # Of seeds with different data nothing else is known: splits of one set, unless the task says otherwise.
        "rest": 0 if same_data or independent or whole or len(records) == 1 else rest,
    } | ({"folds": folds} if whole else {})  # fmt: skip


def _rule(units: Mapping[str, Any], n_seeds: int, same_data: bool, overlap: float) -> Combine:
    """How cells of seeds are combined; a method that failed for some has no whole folds."""

    def rule(cells: Sequence[Cell]) -> Cell:
        if "folds" in units:
            if len(cells) == n_seeds:
                return cross_fitted(cells, units["folds"])
            return combine(cells, same_data, overlap=1 / (units["folds"] - 1))
        return combine(cells, same_data, overlap)

    return rule


Combine = Callable[[Sequence[Cell]], Cell]
_OF_EACH_SEED = (
    "prior_precision", "temperature", "noise", "validation_nll", "edges", "prior_precisions", "budget", "draws"
)  # fmt: skip


def _entry(entries: Sequence[dict[str, Any]], names: Sequence[str], of: Combine) -> dict[str, Any]:
    first = entries[0]
    result: dict[str, Any] = {key: first[key] for key in ("name", "severity", "n") if key in first}
    result |= _cells(entries, names, of)
    equal = [entry["equal_settings"] for entry in entries if "equal_settings" in entry]
    if equal:
        result["equal_settings"] = _cells(equal, names, of)
    if all("prediction_sets" in entry for entry in entries):
        sets = [entry["prediction_sets"] for entry in entries]
        result["prediction_sets"] = {"alpha": sets[0]["alpha"]} | _cells(sets, names, of)
    if first.get("calibrated"):
        result["calibrated"] = {
            name: {key: np.mean([errors[key] for errors in of_seeds], axis=0).tolist() for key in of_seeds[0]}
            for name, of_seeds in _of_seeds([entry["calibrated"] for entry in entries], names).items()
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
    if all("against_detectors" in entry for entry in entries):  # records of an earlier version lack it
        result["against_detectors"] = _differences([entry["against_detectors"] for entry in entries], names, of)
    if "most_uncertain" in first:
        result["most_uncertain"] = first["most_uncertain"]
    return result


def _cells(entries: Sequence[dict[str, Any]], names: Sequence[str], of: Combine) -> dict[str, Any]:
    """Scores and differences; a method that failed for some seeds has the numbers of the others."""
    return {
        "scores": _of_methods([entry["scores"] for entry in entries], names, of),
        "differences": _differences([entry["differences"] for entry in entries], names, of),
    }


def _differences(
    parts: Sequence[Mapping[str, Mapping[str, dict[str, Cell]]]], names: Sequence[str], of: Combine
) -> dict[str, Any]:
    """By the method that is subtracted."""
    seconds = dict.fromkeys(second for part in parts for second in part)
    return {second: _of_methods([part.get(second, {}) for part in parts], names, of) for second in seconds}


def _of_methods(
    parts: Sequence[Mapping[str, dict[str, Cell]]], names: Sequence[str], of: Combine
) -> dict[str, dict[str, Cell]]:
    return {name: _combined(cells, of) for name, cells in _of_seeds(parts, names).items()}


def _of_seeds(parts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    """By name what the parts of all seeds have of it; names that none has are left out."""
    by_name = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: of_seeds for name, of_seeds in by_name.items() if of_seeds}


def _combined(scores: Sequence[dict[str, Cell]], of: Combine) -> dict[str, Cell]:
    """Scores that all seeds have: records of an earlier version lack some."""
    common = [score for score in scores[0] if all(score in cells for cells in scores)]
    return {score: of([cells[score] for cells in scores]) for score in common}


def _curves(curves: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bins added, lines averaged."""
    combined: dict[str, Any] = {}
    for key in [key for key in curves[0] if all(key in curve for curve in curves)]:
        of_seeds = [curve[key] for curve in curves]
        if isinstance(of_seeds[0], Mapping):
            combined[key] = added(of_seeds)
        else:
            length = min(len(line) for line in of_seeds)
            combined[key] = [mean_of([line[i] for line in of_seeds]) for i in range(length)]
    return combined


def added(bins: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Reliability bins of several seeds or conditions as those of all their data."""
    return {part: [sum(column) for column in zip(*(counts[part] for counts in bins), strict=True)] for part in bins[0]}


def _about(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {key: entries[0][key] for key in ("kind", "role", "description")}
    summary["warnings"] = _unique([text for entry in entries for text in entry["warnings"]])
    failed = [entry["failed"] for entry in entries if "failed" in entry]
    if failed:
        summary |= {"failed": _unique(failed), "n_failed": len(failed)}
    entries = [entry for entry in entries if "failed" not in entry]
    first = entries[0] if entries else {"seconds": {}}
    summary["seconds"] = {
        step: statistics.fmean(entry["seconds"][step] for entry in entries)
        for step in first["seconds"]
        if all(step in entry["seconds"] for entry in entries)
    }
    summary["undetermined"] = _unique([what for entry in entries for what in entry.get("undetermined", ())])
    for key in _OF_EACH_SEED:
        if key in first:
            summary[key] = [entry[key] for entry in entries]
    for key in ("coverage", "layers", "link", "members"):
        if key in first:
            summary[key] = first[key]
    if first.get("curve"):
        curves = [entry["curve"] for entry in entries]
        summary["curve"] = {  # prior precisions of a regression are relative to the noise of each seed
            "prior_precisions": [
                geometric_mean(column) for column in zip(*(curve["prior_precisions"] for curve in curves), strict=True)
            ],
            "losses": [mean_of(column) for column in zip(*(curve["losses"] for curve in curves), strict=True)],
        }
    return summary


def _distances(entries: Sequence[dict[str, Any]], of: Combine) -> dict[str, Any]:
    """Of the seeds that have them; a method that failed for one of these is left out."""
    if not entries:
        return {}
    names = [name for name in entries[0]["equal"] if all(name in entry["equal"] for entry in entries)]
    return {
        where: {
            name: {part: of([entry[where][name][part] for entry in entries]) for part in log_ratios[name]}
            for name in names
            if name != "prior_precision"
        }
        | {"prior_precision": [entry[where]["prior_precision"] for entry in entries]}
        for where, log_ratios in entries[0].items()
    }


def _unique(values: list[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]
