"""The tables of a summary, as text; the terminal, the page and the Markdown show the same ones."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.console import Group, RenderableType
from rich.text import Text

from debiased_laplace.evaluation import names
from debiased_laplace.evaluation import summary as summaries
from debiased_laplace.evaluation.edges import MARK
from debiased_laplace.evaluation.metrics import N_BINS
from debiased_laplace.evaluation.statement import (
    failures,
    if_calibrated,
    plus_minus,
    same_rule,
    seeds,
    unit,
    with_interval,
)
from debiased_laplace.evaluation.summary import (
    STRONG,
    by_role,
    calibration_verdict,
    geometric_mean,
    is_undirected,
    is_worse_than_uniform,
    judged,
)

#: Column title, number of digits and factor of every score.
SCORES = {
    "accuracy": ("accuracy %", 1, 100.0),
    "nll": ("NLL", 3, 1.0),
    "brier": ("Brier", 3, 1.0),
    "ece": ("ECE %", 1, 100.0),
    "adaptive_ece": ("adaptive ECE %", 1, 100.0),
    "classwise_ece": ("classwise ECE %", 2, 100.0),
    "aurc": ("AURC %", 2, 100.0),
    "auroc": ("AUROC %", 1, 100.0),
    "aupr": ("AUPR %", 1, 100.0),
    "fpr95": ("FPR95 %", 1, 100.0),
    "rmse": ("RMSE", 3, 1.0),
    "crps": ("CRPS", 3, 1.0),
    "coverage_50": ("50 % interval holds %", 1, 100.0),
    "coverage_90": ("90 % holds %", 1, 100.0),
    "coverage_95": ("95 % holds %", 1, 100.0),
    "width_50": ("50 % width", 3, 1.0),
    "width_90": ("90 % width", 3, 1.0),
    "width_95": ("95 % width", 3, 1.0),
    "calibration_error": ("calibration error %", 1, 100.0),
}
#: At scores that equal probabilities for all classes would beat.
OF_NO_USE = "†"
#: What the short form of a table has.
SHORT = ("accuracy", "nll", "brier", "ece", "rmse", "crps", "coverage_95")
#: Scores of calibration, beside which stands what a calibrated predictor would have.
CALIBRATION = ("ece", "adaptive_ece", "classwise_ece")


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
        shown = rich.table.Table(title=Text(self.title), title_justify="left", title_style="bold")
        for index, column in enumerate(self.columns):
            shown.add_column(Text(column), justify="right" if index else "left", no_wrap=not index)
        for section, rows in self.sections:
            if section:
                shown.add_section()
                shown.add_row(Text(section, style="italic bold"))
            for row in rows:
                shown.add_row(*(Text(cell) for cell in row))
        return Group(shown, Text(self.caption + "\n"))

    def markdown(self, level: int = 3) -> str:
        """As Markdown."""
        lines = [f"{'#' * level} {names.markdown(self.title)}", "", names.markdown(self.caption)]
        for section, rows in self.sections:
            if section:
                lines += ["", f"**{names.markdown(section)}**"]
            lines += ["", _row(self.columns), "|" + " --- |" * len(self.columns), *(_row(row) for row in rows)]
        return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(names.markdown, cells)) + " |"


def tables(summary: Mapping[str, Any], *, short: bool = False) -> list[Table]:
    """All tables of a summary, in the order in which they are read.

    Args:
        summary: From :func:`~debiased_laplace.evaluation.summary.summarise`.
        short: Only what fits a terminal.
    """
    candidate = by_role(summary, "candidate")
    found = [_test(summary, short)]
    if candidate is not None:
        found.append(_test_differences(summary, candidate, short))
    for score in ("nll",) if short else ("nll", "rmse" if summary["regression"] else "ece"):
        found.append(_shifts(summary, score, short))
    found.append(_strong(summary, short))
    if candidate is not None and not short:
        found += [_shift_differences(summary, candidate, second) for second in summary["test"]["differences"]]
        found += [_equal(summary, candidate), _draws(summary)]
    found += [_foreign(summary, short), _distances(summary), _cost(summary)]
    return [table for table in found if table.sections and table.sections[0][1]]


def _cell(cell: Sequence[float], score: str, *, fewer: bool = False, summary: Mapping[str, Any] | None = None) -> str:
    _, digits, scale = SCORES[score]
    text = plus_minus(cell, digits - fewer, scale=scale)
    worse = summary is not None and is_worse_than_uniform(summary, score, cell)
    return f"{text} {OF_NO_USE}" if worse else text


def _marks(summary: Mapping[str, Any], cells: Iterable[str]) -> str:
    """What marks mean, if there are some."""
    found = any(OF_NO_USE in cell for cell in cells)
    return f" {OF_NO_USE} Worse than saying 1/{summary['task']['n_outputs']} for every class." if found else ""


def _errors(summary: Mapping[str, Any]) -> str:
    if len(summary["seeds"]) == 1:
        return f"value ± standard error of the bootstrap ({summary['n_resamples']:,} resamples of the data)"
    return f"mean over {seeds(summary)} ± standard error" + (
        ", which holds the bootstrap error of the data that all seeds share" if summary["same_data"] else ""
    )


def _test(summary: Mapping[str, Any], short: bool) -> Table:
    scores = summary["test"]["scores"]
    names = [s for s in next(iter(scores.values())) if not short or s in SHORT]
    how = (
        "NLL in nats for each datum, RMSE, CRPS and widths in the units of the target."
        if summary["regression"]
        else f"NLL in nats. Brier score summed over classes. ECE with {N_BINS} equal-width bins; adaptive with "
        f"{N_BINS} equally full ones; classwise: the mean over classes. AURC: mean error of the most "
        "confident part, over all parts."
    )
    failed = ["failed", *[""] * (len(names) - 1)]
    rows = [
        [
            name,
            *(
                [
                    _cell(scores[name][s], s, summary=summary)
                    + ("" if short else if_calibrated(summary["test"], name, s, SCORES[s][1]))
                    for s in names
                ]
                if name in scores
                else failed
            ),
        ]
        for name in summary["predictors"]
    ]
    calibrated = "" if short or summary["regression"] else (
        " Beside calibration errors: what the predictor would have on so many data if it were calibrated, with its "
        "95 % interval, from targets drawn from its own probabilities."
    )  # fmt: skip
    caption = " ".join([f"{how}{calibrated} Cells: {_errors(summary)}.", *failures(summary)])
    caption += _marks(summary, (cell for row in rows for cell in row))
    return Table("Test data", caption, ["method", *(SCORES[s][0] for s in names)], [("", rows)])


def _test_differences(summary: Mapping[str, Any], candidate: str, short: bool) -> Table:
    sections = []
    for second, found in summary["test"]["differences"].items():
        own = found.get(candidate, {})
        rows = [
            [SCORES[s][0], with_interval(cell, SCORES[s][1] + 1, scale=SCORES[s][2]),
             "" if is_undirected(s) else _verdict(summary, s, cell, candidate, second)]
            for s, cell in own.items()
            if not short or s in ("nll", "ece", "crps")
        ]  # fmt: skip
        if rows:
            sections.append((f"minus {second}", rows))
    return Table(
        f"{candidate} against the others, test data",
        f"Paired, datum by datum, with the 95 % interval over {unit(summary, summary['test']['n'])}; a difference is "
        "called better or worse only if its interval leaves out zero, and negligible if all of it is within 0.001 (or "
        "0.1 %). Calibration errors that are both within what a calibrated predictor has are no difference. One row in "
        "twenty would be beyond by chance.",
        ["score", "difference", "verdict"],
        sections,
    )


def _verdict(summary: Mapping[str, Any], score: str, cell: Sequence[float], first: str, second: str) -> str:
    noise = calibration_verdict(summary["test"], score, first, second) if score in CALIBRATION else None
    return noise or judged(score, cell)


def _strong(summary: Mapping[str, Any], short: bool) -> Table:
    """All strong shifts as one comparison."""
    strong, rows = summary["strong_shift"], []
    if strong is None:
        return Table("Strong shift: mean NLL", "", [], [])
    others = [second for second in strong["differences"] if not short or second == same_rule(summary)]
    for name, own in strong["scores"].items():
        row = [name, _cell(own["nll"], "nll", summary=summary)]
        for second in others:
            cell = strong["differences"][second].get(name, {}).get("nll")
            row.append("" if cell is None else f"{with_interval(cell, 3)} ({judged('nll', cell)})")
        rows.append(row)
    caption = (
        f"Mean over {len(strong['shifts'])} shifts of severity {STRONG} and more ({', '.join(strong['shifts'])}), "
        f"which are one comparison: intervals over {unit(summary, strong['n'], sets=strong['sets'])}."
    )
    return Table(
        "Strong shift: mean NLL", caption + _marks(summary, (cell for row in rows for cell in row)),
        ["method", "mean NLL", *(f"minus {second}" for second in others)], [("", rows)],
    )  # fmt: skip


def _equal(summary: Mapping[str, Any], candidate: str) -> Table:
    """Candidate and baseline, tuned and at the same settings."""
    baseline, rows = by_role(summary, "baseline"), []
    settings = [own for own in summary["equal_settings"] if own]
    for where, entry in (("test data", summary["test"]), ("strong shift", summary["strong_shift"])):
        if entry is None or "equal_settings" not in entry or baseline is None:
            continue
        for how, own in (("tuned, each by itself", entry), ("equal settings", entry["equal_settings"])):
            cell = own["differences"].get(baseline, {}).get(candidate, {}).get("nll")
            if cell is not None:
                rows.append([f"{where}, {how}", with_interval(cell, 4), judged("nll", cell)])
    if not rows:
        return Table("Equal settings", "", [], [])
    return Table(
        f"NLL of {candidate} minus {baseline}, at equal settings",
        f"Prior precision and temperature (or noise) of {settings[0]['of']} for both, so that nothing hangs on where "
        "each tuning stopped.",
        ["where", "difference", "verdict"], [("", rows)],
    )  # fmt: skip


def _draws(summary: Mapping[str, Any]) -> Table:
    """Spread over draws of the curvature data within seeds."""
    rows = []
    for name, found in summary["test"]["draws"].items():
        values = [own["nll"] for own in found if "nll" in own]
        if values:
            spread = statistics.fmean(statistics.stdev(own) for own in values)
            rows.append([name, str(len(values[0])), f"{min(map(min, values)):.4f} to {max(map(max, values)):.4f}",
                         f"{spread:.4f}"])  # fmt: skip
    return Table(
        "Draws of the curvature data: NLL on test data",
        "Every draw is tuned by itself. Smallest and largest over draws and seeds; standard deviation between draws of "
        "a seed.",
        ["method", "draws", "range", "standard deviation"], [("", rows)],
    )  # fmt: skip


def _severities(summary: Mapping[str, Any]) -> list[int | None]:
    """Of all shifts; ``None`` for those without degrees, last."""
    found = {entry["severity"] for entry in summary["shifts"]}
    return sorted(found, key=lambda severity: (severity is None, severity))


def _headings(severities: Sequence[int | None]) -> list[str]:
    return ["shifted" if severity is None else f"severity {severity}" for severity in severities]


def _shifts(summary: Mapping[str, Any], score: str, short: bool) -> Table:
    severities, sections = _severities(summary), []
    for name, entries in summaries.shifts(summary).items():
        own = {entry["severity"]: entry["scores"] for entry in entries}
        rows = [
            [
                method,
                *(
                    _cell(own[s][method][score], score, fewer=short, summary=summary) if s in own else ""
                    for s in severities
                ),
            ]
            for method in entries[0]["scores"]
        ]
        sections.append((name, rows))
    return Table(
        f"Shifted data: {SCORES[score][0]}",
        f"By severity. Cells: {_errors(summary)}."
        + _marks(summary, (cell for _, rows in sections for row in rows for cell in row)),
        ["method", *_headings(severities)], sections,
    )  # fmt: skip


def _shift_differences(summary: Mapping[str, Any], candidate: str, second: str) -> Table:
    severities, rows = _severities(summary), []
    for name, entries in summaries.shifts(summary).items():
        own = {e["severity"]: e["differences"].get(second, {}).get(candidate, {}).get("nll") for e in entries}
        rows.append([name, *("" if own.get(s) is None else with_interval(own[s], 3) for s in severities)])
    return Table(
        f"Shifted data: NLL of {candidate} minus {second}",
        "Paired, with the 95 % interval. Below zero: the former is better. Rows and columns are copies of the same "
        "data and no comparisons of their own: the table of strong shifts has the one that counts.",
        ["shift", *_headings(severities)],
        [("", rows)],
    )


def _foreign(summary: Mapping[str, Any], short: bool) -> Table:
    sections = []
    for entry in summary["ood"]:
        rows = []
        for method, own in entry["scores"].items():
            kinds = list(dict.fromkeys(key.rpartition(", ")[0] for key in own))
            for kind in kinds[:1] if short else kinds:
                cells = [_cell(own[f"{kind}, {score}"], score) for score in ("auroc", "aupr", "fpr95")]
                rows.append([method if short else f"{method}: {kind}", *cells])
        sections.append((f"{entry['name']} ({entry['n']:,})", rows))
    return Table(
        "Foreign data",
        "How well a score tells data of another kind from test data. Foreign is positive. FPR95: test data called "
        "foreign when 95 % of the foreign data are found; lower is better."
        + (" Score: one minus the maximum probability." if short else ""),
        ["method" if short else "method: score", *(SCORES[score][0] for score in ("auroc", "aupr", "fpr95"))],
        sections,
    )


def _distances(summary: Mapping[str, Any]) -> Table:
    sections = []
    for where, found in summary["distances"].items():
        value = geometric_mean(found["prior_precision"])
        title = (
            f"tuned prior precision of the reference ({value:.3g})"
            if where == "tuned"
            else f"prior precision {value:g}"
        )
        rows = [
            [name, plus_minus(own["absolute"], 4), plus_minus(own["signed"], 4, sign=True)]
            for name, own in found.items()
            if name != "prior_precision"
        ]
        sections.append((title, rows))
    return Table(
        "Distance to the posterior of all training data",
        "Log ratio of the variances of the outputs to those of the full-data posterior, at equal prior precision, over "
        "test inputs and outputs. Absolute: zero is best. Signed: above zero is too uncertain.",
        ["method", "mean absolute log ratio", "mean signed log ratio"],
        sections,
    )


def _cost(summary: Mapping[str, Any]) -> Table:
    rows = []
    for name, about in summary["predictors"].items():
        if name not in summary["test"]["scores"]:
            continue
        tuned, free = [], about.get("undetermined", ())

        def marked(text: str, what: str, about: Mapping[str, Any] = about) -> str:
            sides = {own[key] for own in about.get("edges", ()) for key in own if key.startswith(what)}
            return text + "".join(f" {MARK[side]}" for side in sorted(sides))

        if len(about.get("prior_precisions", [[]])[0]) > 1:
            values = [value for own in about["prior_precisions"] for value in own]
            tuned.append(marked(f"prior {min(values):.2g} to {max(values):.2g}", "prior precision"))
        elif "prior_precision" in about:
            tuned.append(marked(f"prior {geometric_mean(about['prior_precision']):.3g}", "prior precision"))
        if "temperature" in about:
            tuned.append(marked(f"temperature {statistics.fmean(about['temperature']):.2f}", "temperature"))
        if "noise" in about:
            tuned.append(marked(f"noise {statistics.fmean(about['noise']):.3g}", "noise"))
        if "budget" in about:
            tuned.append(f"{statistics.fmean(about['budget']):,.0f} data")
        seconds = [f"{about['seconds'][s]:.2f}" if s in about["seconds"] else "" for s in ("fit", "tune", "predict")]
        if free:
            tuned.append(f"not determined: {', '.join(free)}")
        rows.append([name, ", ".join(tuned), *seconds])
    return Table(
        "Tuning and cost",
        f"Means over {seeds(summary)} (prior precisions: geometric). {MARK['smallest']} or {MARK['largest']}: the "
        "smallest or the largest of its search, in some seed. Seconds. Predicting covers all data of this page; "
        "posteriors of the same parameters are predicted together, and the time is that of the first. Getting the "
        f"network took {summary['seconds']['model']:.1f} s.",
        ["method", "tuned", "fit, s", "tune, s", "predict, s"],
        [("", rows)],
    )
