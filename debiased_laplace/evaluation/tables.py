"""The tables of a summary, as text; the terminal and the report show the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import rich.table
from rich.console import Group, RenderableType
from rich.text import Text

from debiased_laplace.evaluation.statement import plus_minus
from debiased_laplace.evaluation.summary import verdict

#: Column title, number of digits and factor of every score.
SCORES = {
    "accuracy": ("accuracy %", 1, 100.0),
    "nll": ("NLL", 3, 1.0),
    "brier": ("Brier", 3, 1.0),
    "ece": ("ECE %", 1, 100.0),
    "adaptive_ece": ("adaptive ECE %", 1, 100.0),
    "auroc": ("AUROC %", 1, 100.0),
    "fpr95": ("FPR95 %", 1, 100.0),
    "absolute": ("absolute log ratio", 3, 1.0),
    "signed": ("signed log ratio", 3, 1.0),
}


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What it shows.
        caption: How to read it.
        columns: Headings; the first column is the row's name.
        sections: Pairs of a section title (may be empty) and its rows.
    """

    title: str
    caption: str
    columns: list[str]
    sections: list[tuple[str, list[list[str]]]]

    def __rich__(self) -> RenderableType:
        """For ``rich.console.Console().print(table)``."""
        shown = rich.table.Table(title=self.title, title_justify="left", title_style="bold")
        for index, column in enumerate(self.columns):
            shown.add_column(Text(column), justify="right" if index else "left", no_wrap=not index)
        for section, rows in self.sections:
            if section:
                shown.add_section()
                shown.add_row(Text(section, style="italic bold"))
            for row in rows:
                shown.add_row(*(Text(cell) for cell in row))
        return Group(shown, Text(self.caption + "\n"))


def tables(summary: dict[str, Any], *, short: bool = False) -> list[Table]:
    """All tables of a summary, in the order in which they are read.

    Args:
        summary: From :func:`~debiased_laplace.evaluation.summary.summarise`.
        short: Leave out the adaptive calibration error and most of the differences.
    """
    found = [_distances(summary), _predictions(summary, short), _foreign(summary)]
    seconds = list(dict.fromkeys(entry["second"] for entry in summary["differences"]))
    found += [_differences(summary, second, short) for second in (seconds[:1] if short else seconds)]
    return [table for table in [*found, _cost(summary)] if table.sections and table.sections[0][1]]


def _at(name: str) -> str:
    return "tuned prior precision" if name == "tuned" else f"prior precision {name}"


def _cell(value: dict[str, Any], score: str, *, sign: bool = False) -> str:
    _, digits, scale = SCORES[score]
    return plus_minus(value, digits, sign=sign, scale=scale)


def _distances(summary: dict[str, Any]) -> Table:
    measured = {name: method["distances"] for name, method in summary["methods"].items() if "distances" in method}
    sections = []
    for index, entry in enumerate(next(iter(measured.values()), [])):
        title = _at(entry["at"])
        rows = [
            [name, *(_cell(d[index][score], score, sign=score == "signed") for score in ("absolute", "signed"))]
            for name, d in measured.items()
        ]
        sections.append((title, rows))
    return Table(
        "Distance to the reference posterior",
        "Log ratio of the variances of the outputs to those of the reference, at equal prior precision, over "
        "unshifted test inputs and outputs. Absolute: zero is best. Signed: above zero is too uncertain. The tuned "
        "prior precision is the reference's, one for each seed, for all methods.",
        ["method", "mean absolute log ratio", "mean signed log ratio"],
        sections,
    )


def _predictions(summary: dict[str, Any], short: bool) -> Table:
    scores = ("accuracy", "nll", "brier", "ece") if short else ("accuracy", "nll", "brier", "ece", "adaptive_ece")
    methods = summary["methods"]
    conditions = next(iter(methods.values()))["conditions"]
    return Table(
        "Predictions",
        "NLL in nats. Brier score summed over classes. ECE with 15 equal-width bins"
        + ("." if short else "; adaptive with 15 equally full ones."),
        ["method", *(SCORES[score][0] for score in scores)],
        [
            (name, [[key, *(_cell(m["conditions"][name][s], s) for s in scores)] for key, m in methods.items()])
            for name in conditions
        ],
    )


def _foreign(summary: dict[str, Any]) -> Table:
    methods = summary["methods"]
    return Table(
        "Out-of-distribution detection",
        "Score: one minus the largest probability. Foreign data are the positives. FPR95: unshifted test data called "
        "foreign when 95 % of the foreign data are found; lower is better.",
        ["method", SCORES["auroc"][0], SCORES["fpr95"][0]],
        [
            (name, [[key, *(_cell(m["ood"][name][s], s) for s in ("auroc", "fpr95"))] for key, m in methods.items()])
            for name in next(iter(methods.values()))["ood"]
        ],
    )


def _differences(summary: dict[str, Any], second: str, short: bool) -> Table:
    entries = [entry for entry in summary["differences"] if entry["second"] == second]
    if short:
        entries = [entry for entry in entries if entry["score"] in ("absolute", "nll", "ece", "auroc")]
    first = entries[0]["first"]
    groups = {"distance": "distance to the reference", "conditions": "predictions", "ood": "out of distribution"}
    sections = []
    for group, title in groups.items():
        rows = []
        for entry in entries:
            if entry["group"] == group:
                heading, digits, scale = SCORES[entry["score"]]
                interval = "" if entry["interval"] is None else " to ".join(
                    plus_minus({"mean": value, "standard_error": None}, digits, sign=True, scale=scale)
                    for value in entry["interval"]
                )  # fmt: skip
                name = _at(entry["name"]) if group == "distance" else entry["name"]
                said = verdict(entry) if entry["interval"] is not None else "one seed, no error"
                rows.append([f"{name}, {heading}", _cell(entry, entry["score"], sign=True), interval, said])
        if rows:
            sections.append((title, rows))
    return Table(
        f"{first} minus {second}",
        f"Paired over seeds. The last column says what the 95 % interval shows about {first}; one row in twenty would "
        "be beyond its error by chance.",
        ["score", "difference", "95 % interval", "verdict"],
        sections,
    )


def _cost(summary: dict[str, Any]) -> Table:
    rows = []
    for name, method in summary["methods"].items():
        tuned = f"{method['prior_precision']['geometric_mean']:.3g}" if "prior_precision" in method else "none"
        if "temperature" in method:
            tuned = f"temperature {plus_minus(method['temperature'], 2)}"
        seconds = [
            plus_minus(method["seconds"][step], 2) if step in method["seconds"] else "none"
            for step in ("fit", "tune", "predict")
        ]
        rows.append([name, tuned, *seconds])
    return Table(
        "Tuning and cost",
        f"Prior precision: geometric mean over seeds. Training took {plus_minus(summary['seconds']['train'], 2)} s for "
        "each seed. Predicting covers all conditions and all foreign data.",
        ["method", "prior precision", "fit, s", "tune, s", "predict, s"],
        [("", rows)],
    )
