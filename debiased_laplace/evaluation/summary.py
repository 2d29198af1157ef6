r"""Records of several seeds become means with standard errors, and paired differences.

A standard error is the sample standard deviation over seeds divided by the square root of their number.
Two methods are compared seed by seed; a difference counts as shown only if the 95 % interval of
Student's t leaves out zero.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import t as student

from debiased_laplace.evaluation import records as storage

#: Scores of a condition, and whether a larger one is better.
CONDITION_SCORES = {"accuracy": True, "nll": False, "brier": False, "ece": False, "adaptive_ece": False}
OOD_SCORES = {"auroc": True, "fpr95": False}
DISTANCES = ("absolute", "signed")
CONFIDENCE = 0.95


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds and its standard error (``None`` for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "values": list(values)}


def paired_difference(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Mean of first minus second with its standard error and 95 % interval of Student's t.

    Returns:
        With ``interval`` (``None`` for one seed) and ``shown``, whether it leaves out zero.
    """
    result = mean_and_error([a - b for a, b in zip(first, second, strict=True)])
    error, n = result["standard_error"], len(first)
    if error is None:
        return result | {"interval": None, "shown": False}
    half = float(student.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    low, high = result["mean"] - half, result["mean"] + half
    return result | {"interval": [low, high], "shown": low > 0 or high < 0}


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything the report shows, from the records of :func:`~debiased_laplace.evaluation.compare.compare`.

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
    methods = {name: _method([record["methods"][name] for record in records]) for name in first["methods"]}
    summary = {
        "schema_version": storage.SCHEMA_VERSION,
        "task": first["task"],
        "settings": first["settings"],
        "seeds": seeds,
        "environments": _unique([record["environment"] for record in records]),
        "seconds": {"train": mean_and_error([record["seconds"]["train"] for record in records])},
        "methods": methods,
        "differences": _differences(methods),
    }
    return summary | {"records": list(records)}


def by_role(summary: dict[str, Any], role: str) -> str | None:
    """Name of the method with a role, if there is one."""
    return next((name for name, method in summary["methods"].items() if method["role"] == role), None)


def _method(entries: list[dict[str, Any]]) -> dict[str, Any]:
    first = entries[0]
    result: dict[str, Any] = {key: first[key] for key in ("kind", "role", "description")}
    for group, scores in (("conditions", CONDITION_SCORES), ("ood", OOD_SCORES)):
        result[group] = {
            name: {score: mean_and_error([entry[group][name][score] for entry in entries]) for score in scores}
            for name in first[group]
        }
    result["reliability"] = {
        name: _pooled([entry["conditions"][name]["reliability"] for entry in entries]) for name in first["conditions"]
    }
    result["seconds"] = {key: mean_and_error([entry["seconds"][key] for entry in entries]) for key in first["seconds"]}
    result["validation_nll"] = mean_and_error([entry["validation_nll"] for entry in entries])
    result["warnings"] = _unique([text for entry in entries for text in entry["warnings"]])
    if "temperature" in first:
        result["temperature"] = mean_and_error([entry["temperature"] for entry in entries])
    if "curve" in first:
        values = [entry["prior_precision"] for entry in entries]
        result["prior_precision"] = {"geometric_mean": statistics.geometric_mean(values), "values": values}
        result["edges"] = {side: sum(e["edge"] == side for e in entries) for side in ("smallest", "largest")}
        columns = zip(*(entry["curve"]["losses"] for entry in entries), strict=True)
        losses = [mean_and_error(column) for column in columns]
        result["curve"] = {
            "prior_precisions": first["curve"]["prior_precisions"],
            "mean": [loss["mean"] for loss in losses],
            "standard_error": [loss["standard_error"] for loss in losses],
        }
    if "distances" in first:
        result["distances"] = [
            {"at": entry["at"], "prior_precision": [e["distances"][i]["prior_precision"] for e in entries]}
            | {key: mean_and_error([e["distances"][i][key] for e in entries]) for key in DISTANCES}
            for i, entry in enumerate(first["distances"])
        ]
    return result


def _pooled(bins: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Reliability bins of several seeds, added."""
    return {key: [sum(column) for column in zip(*(b[key] for b in bins), strict=True)] for key in bins[0]}


def _differences(methods: dict[str, Any]) -> list[dict[str, Any]]:
    """Paired differences of the candidate to the baseline, and to each method without a posterior."""
    roles = {method["role"]: name for name, method in methods.items() if method["role"]}
    candidate = roles.get("candidate")
    if candidate is None:
        return []
    without_posterior = [name for name, method in methods.items() if method["kind"] != "laplace"]
    found = []
    for other in [*([roles["baseline"]] if "baseline" in roles else []), *without_posterior]:
        mine, theirs = methods[candidate], methods[other]
        pairs = {"first": candidate, "second": other}
        for index, entry in enumerate(mine.get("distances", [])):
            if "distances" in theirs:
                ours, others = entry["absolute"]["values"], theirs["distances"][index]["absolute"]["values"]
                about = {"group": "distance", "name": entry["at"], "score": "absolute", "larger_is_better": False}
                found.append(pairs | about | paired_difference(ours, others))
        for group, scores in (("conditions", CONDITION_SCORES), ("ood", OOD_SCORES)):
            for name in mine[group]:
                for score, larger in scores.items():
                    ours, others = mine[group][name][score]["values"], theirs[group][name][score]["values"]
                    about = {"group": group, "name": name, "score": score, "larger_is_better": larger}
                    found.append(pairs | about | paired_difference(ours, others))
    return found


def difference(summary: dict[str, Any], second: str | None, group: str, name: str, score: str) -> dict[str, Any] | None:
    """One of the paired differences, candidate minus ``second``."""
    wanted = {"second": second, "group": group, "name": name, "score": score}
    return next((d for d in summary["differences"] if all(d[key] == value for key, value in wanted.items())), None)


def verdict(entry: dict[str, Any]) -> str:
    """``"better"``, ``"worse"``, or ``"within the error"``, for the first of the two methods."""
    if not entry["shown"]:
        return "within the error"
    return "better" if (entry["mean"] > 0) == entry["larger_is_better"] else "worse"


def _unique(values: list[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]
