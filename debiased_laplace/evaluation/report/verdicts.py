"""What a summary says: methods by their role, shifts by severity, and which differences count as shown.

A difference counts as shown only if its 95 % interval leaves out zero, and as negligible if all of the interval is
within :data:`MARGIN`. Differences on fewer than :data:`~debiased_laplace.evaluation.scores.intervals.MIN_DATA` data
have the whole range of the score as their interval, so that nothing is said of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

#: What ``summarise`` returns.
Summary = Mapping[str, Any]
#: Scores of which a larger value is better; of all others a smaller one is, or neither (coverage).
LARGER_IS_BETTER = ("accuracy", "auroc", "aupr")
#: Differences within it, interval and all, are called negligible: a thousandth of a nat, a tenth of a per cent.
MARGIN = 1e-3
#: How a verdict about the first of two predictors reads before the second, and its mark, which needs no colour.
HOW = {
    "better": "better than",
    "worse": "worse than",
    "negligible": "practically as good as",
    "no difference shown": "not shown to differ from",
    "not defined": "not comparable with",
    "both as if calibrated": "as well calibrated as",
}
MARK = {
    "better": "✓",
    "worse": "✗",
    "negligible": "≈",
    "no difference shown": "○",
    "not defined": "?",
    "both as if calibrated": "≈",
}
#: Scores of calibration, beside which stands what a calibrated predictor would have.
CALIBRATION = ("ece", "adaptive_ece", "smooth_ece", "top_label_ece", "classwise_ece")
#: Scores in the units of a regression's targets, which have no such margin.
IN_UNITS = ("rmse", "crps", "width_50", "width_90", "width_95")


def by_role(summary: Summary, role: str) -> str | None:
    """Name of the method with a role, if there is one that was judged."""
    return next((name for name in summary["test"]["scores"] if summary["predictors"][name]["role"] == role), None)


def shifts(summary: Summary) -> dict[str, list[dict[str, Any]]]:
    """The entries of every shift, by severity."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for entry in summary["shifts"]:
        by_name.setdefault(entry["name"], []).append(entry)
    return by_name


def title(entry: Mapping[str, Any]) -> str:
    """Of test or shifted data."""
    if entry["name"] == "test":
        return "test data"
    return str(entry["name"]) if entry["severity"] is None else f"{entry['name']} {entry['severity']}"


def is_worse_than_uniform(summary: Summary, score: str, cell: Sequence[float]) -> bool:
    r"""Whether a score of a classifier is worse than that of equal probabilities for all classes.

    NLL is then above :math:`\log C`, the Brier score above :math:`1 - 1/C`.
    """
    classes = summary["task"]["n_outputs"]
    bounds = {"nll": math.log(classes), "brier": 1 - 1 / classes} if not summary["regression"] else {}
    return score in bounds and cell[0] > bounds[score]


def comparisons(summary: Summary) -> int:
    """How many differences have a verdict in the tables.

    On test data those of the candidate, one for each score with a direction; over all strong shifts those of every
    method; at equal settings one each.
    """
    candidate = by_role(summary, "candidate")
    strong = summary["strong_shift"] or {"differences": {}}
    of_candidate = [others.get(candidate, {}) for others in summary["test"]["differences"].values()]
    equal = [
        others
        for entry in (summary["test"], strong)
        for others in entry.get("equal_settings", {}).get("differences", {}).values()
    ]
    return (
        sum(not is_undirected(score) for scores in of_candidate for score in scores)
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


def judged_in(entry: Mapping[str, Any], score: str, cell: Sequence[float], first: str, second: str) -> str:
    """:func:`judged`, with what the scores themselves say.

    Calibration errors that are both within what calibrated predictors have are ``"both as if calibrated"``; in the
    units of a regression's targets, a thousandth of the score is ``"negligible"``.

    Args:
        entry: What the difference is of: test data, a shift, or out-of-distribution data.
        score: Which score.
        cell: The difference.
        first: Whose score less that of
        second: this one it is.
    """
    scores = [entry["scores"].get(name, {}).get(score, [math.nan])[0] for name in (first, second)]
    highest = [entry.get("calibrated", {}).get(name, {}).get(score, [-math.inf] * 4)[3] for name in (first, second)]
    if score in CALIBRATION and all(value <= most for value, most in zip(scores, highest, strict=True)):
        return "both as if calibrated"
    if score in IN_UNITS and max(abs(cell[2]), abs(cell[3])) < MARGIN * abs(scores[1]):
        return "negligible"
    return judged(score, cell)
