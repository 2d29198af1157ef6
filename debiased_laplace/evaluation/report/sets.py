"""Tables of prediction sets, of summaries that have them."""

from __future__ import annotations

from typing import Any

from debiased_laplace.evaluation.report.numbers import plus_minus, unit, with_interval
from debiased_laplace.evaluation.report.table import Table
from debiased_laplace.evaluation.report.verdicts import Summary, by_role

#: Column title, digits and factor.
MEASURES = {
    "coverage": ("holds %", 1, 100.0),
    "size": ("size", 3, 1.0),
    "worst stratum": ("worst stratum: off by %", 1, 100.0),
    "worst class": ("worst class holds %", 1, 100.0),
}


def tables(summary: Summary) -> list[Table]:
    """Coverage and size of every method's sets, and how much larger those of the candidate are, if there are some."""
    if not summary["test"].get("prediction_sets", {}).get("scores"):
        return []
    candidate = by_role(summary, "candidate")
    return [_scores(summary), *([] if candidate is None else [_differences(summary, candidate)])]


def _scores(summary: Summary) -> Table:
    sets, strong = summary["test"]["prediction_sets"], (summary["strong_shift"] or {}).get("prediction_sets", {})
    first = next(iter(sets["scores"].values()))
    measures = [measure for measure in MEASURES if any(key.endswith(f", {measure}") for key in first)]
    shifted = ["coverage", "size"] if strong else []
    sections = []
    for kind in dict.fromkeys(key.rpartition(", ")[0] for key in first):
        rows = [
            [
                name,
                *(_cell(cells, kind, measure) for measure in measures),
                *(_cell(strong["scores"].get(name, {}), kind, measure) for measure in shifted),
            ]
            for name, cells in sets["scores"].items()
        ]
        sections.append((kind, rows))
    level = 100 * (1 - sets["alpha"])
    what = (
        "Size: mean width, in the units of the target. Worst stratum: the largest distance of coverage from "
        f"{level:g} % in a quarter of the test data by predicted standard deviation."
        if summary["regression"]
        else "Size: mean number of classes. Worst stratum: the largest distance of coverage from "
        f"{level:g} % among sets of 0 and 1, 2 and 3, 4 to 10, 11 to 100, and more classes. Both extremes are of at "
        "least ten data each, and noise makes them worse than they are."
    )
    caption = (
        f"Split-conformal sets that should hold {level:g} % of the targets. Validation data have tuned the methods and "
        "must not calibrate them: each half of the test data is calibrated on the other half (shifted data on the "
        "unshifted other half: there nothing is guaranteed). Coverage of test data is therefore near its level for "
        f"every method. {what} Cells: value ± standard error; the bootstrap resamples the data that calibrate, too."
    )
    columns = ["method", *(MEASURES[m][0] for m in measures), *(f"strong shift: {MEASURES[m][0]}" for m in shifted)]
    return Table("Prediction sets", caption, columns, sections)


def _cell(cells: Any, kind: str, measure: str) -> str:
    cell, (_, digits, scale) = cells.get(f"{kind}, {measure}"), MEASURES[measure]
    return "" if cell is None else plus_minus(cell, digits, scale=scale)


def _differences(summary: Summary, candidate: str) -> Table:
    sets = summary["test"]["prediction_sets"]
    kinds = [key.rpartition(", ")[0] for key in next(iter(sets["scores"].values())) if key.endswith(", size")]
    rows = [
        [f"minus {second}", *(with_interval(others[candidate][f"{kind}, size"], 3) for kind in kinds)]
        for second, others in sets["differences"].items()
        if candidate in others
    ]
    return Table(
        f"Prediction sets: size of {candidate} minus others, test data",
        f"Paired, with the 95 % interval over {unit(summary, summary['test']['n'])}. Below zero: smaller sets.",
        ["", *kinds], [("", rows)],
    )  # fmt: skip
