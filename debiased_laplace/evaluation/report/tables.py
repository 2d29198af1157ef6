"""The tables of a summary, as text; the terminal, the page and the Markdown show the same ones."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from debiased_laplace.evaluation.judge.conditions import STRONG
from debiased_laplace.evaluation.predictors.edges import MARK
from debiased_laplace.evaluation.report import sets, verdicts
from debiased_laplace.evaluation.report.cells import SCORES, errors, if_calibrated, in_cell, marks
from debiased_laplace.evaluation.report.numbers import plus_minus, seeds, unit, with_interval
from debiased_laplace.evaluation.report.reliability import by_class
from debiased_laplace.evaluation.report.statement import failures
from debiased_laplace.evaluation.report.table import Table
from debiased_laplace.evaluation.report.verdicts import (
    Summary,
    by_role,
    is_undirected,
    judged,
    judged_in,
)
from debiased_laplace.evaluation.scores.calibration import N_BINS
from debiased_laplace.evaluation.scores.cells import geometric_mean


def tables(summary: Summary) -> list[Table]:
    """All tables of a summary, in the order in which they are read; the page folds them by topic.

    Args:
        summary: From :func:`~debiased_laplace.evaluation.report.summary.summarise`.
    """
    return [table for group in by_topic(summary).values() for table in group]


def by_topic(summary: Summary) -> dict[str, list[Table]]:
    """The same, by what a section of the page says is inside; tables and topics without rows are left out."""
    scores, shifts = "All scores on the test data", "Shifts, one by one"
    posteriors = "Against a single batch and all the training data"
    topics = {
        scores: [_test(summary), _parts(summary), by_class(summary)],
        shifts: [_strong(summary), *(_shifts(summary, s) for s in ("nll", "rmse" if summary["regression"] else "ece"))],
        "Prediction sets with a guarantee": sets.tables(summary),
        "Unknown inputs: out-of-distribution data": [_out_of_distribution(summary), _detectors(summary)],
        posteriors: [_distances(summary)],
        "Tuning and cost": [_cost(summary)],
    }
    candidate = by_role(summary, "candidate")
    if candidate is not None:
        topics[scores] += [_test_differences(summary, candidate)]
        topics[shifts] += [_shift_differences(summary, candidate, second) for second in summary["test"]["differences"]]
        topics[posteriors] = [_equal(summary, candidate), _draws(summary), *topics[posteriors]]
    filled = {topic: [t for t in group if t.sections and t.sections[0][1]] for topic, group in topics.items()}
    return {topic: group for topic, group in filled.items() if group}


#: Scores of a classifier in the table of what is lost by miscalibration.
PARTS = ("nll_calibration", "nll_refinement", "brier_calibration", "brier_refinement", "top_label_ece")


def _test(summary: Summary) -> Table:
    names = [name for name in next(iter(summary["test"]["scores"].values())) if name not in PARTS]
    how = (
        "NLL in nats for each datum, RMSE, CRPS and widths in the units of the target."
        if summary["regression"]
        else f"NLL in nats. Brier score summed over classes. ECE with {N_BINS} equal-width bins; adaptive with "
        f"{N_BINS} equally full ones; {'SmoothECE without bins; ' if 'smooth_ece' in names else ''}classwise: the mean "
        "over classes. AURC: mean error of the most confident part, over all parts."
        + (" AUGRC: the share of data that are kept and wrong, likewise." if "augrc" in names else "")
    )
    calibrated = "" if summary["regression"] else (
        " Beside calibration errors: what the predictor would have on so many data if it were calibrated, with its "
        "95 % interval, from targets drawn from its probabilities."
    )  # fmt: skip
    rows = _of_methods(summary, names)
    caption = " ".join([f"{how}{calibrated} Cells: {errors(summary)}.", *failures(summary)])
    caption += marks(summary, (cell for row in rows for cell in row))
    return Table("Test data", caption, ["method", *(SCORES[s][0] for s in names)], [("", rows)])


def _parts(summary: Summary) -> Table:
    """What recalibration would remove, and what it would not; records of an earlier version lack it."""
    scores = next(iter(summary["test"]["scores"].values()))
    names = [name for name in PARTS if name in scores]
    return Table(
        "Calibration and refinement, test data",
        "Calibration loss: the part of the NLL or the Brier score that the best temperature for the test data removes, "
        "without what it owes to having been chosen on them: zero on average for what is calibrated. Refinement loss: "
        "what is left; the same for the network at any temperature. Top-label: ECE of every predicted class by itself, "
        f"averaged by how often it is predicted. Cells: {errors(summary)}.",
        ["method", *(SCORES[s][0] for s in names)], [("", _of_methods(summary, names) if names else [])],
    )  # fmt: skip


def _of_methods(summary: Summary, names: Sequence[str]) -> list[list[str]]:
    """Scores of all methods, a row for each; the failed ones too."""
    scores, failed = summary["test"]["scores"], ["failed", *[""] * (len(names) - 1)]
    return [
        [name, *([in_cell(scores[name][s], s, summary) + if_calibrated(summary["test"], name, s) for s in names]
                 if name in scores else failed)]
        for name in summary["predictors"]
    ]  # fmt: skip


def _test_differences(summary: Summary, candidate: str) -> Table:
    sections = []
    for second, differences in summary["test"]["differences"].items():
        of_candidate = differences.get(candidate, {})
        rows = [
            [SCORES[s][0], with_interval(cell, SCORES[s][1] + 1, scale=SCORES[s][2]),
             "" if is_undirected(s) else judged_in(summary["test"], s, cell, candidate, second)]
            for s, cell in of_candidate.items()
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


def _strong(summary: Summary) -> Table:
    """All strong shifts as one comparison."""
    strong, rows = summary["strong_shift"], []
    if strong is None:
        return Table("Strong shift: mean NLL", "", [], [])
    others = list(strong["differences"])
    for name, scores in strong["scores"].items():
        row = [name, in_cell(scores["nll"], "nll", summary)]
        for second in others:
            cell = strong["differences"][second].get(name, {}).get("nll")
            row.append("" if cell is None else f"{with_interval(cell, 3)}\n({judged('nll', cell)})")
        rows.append(row)
    caption = (
        f"Mean over {len(strong['shifts'])} shifts of severity {STRONG} and more ({', '.join(strong['shifts'])}), "
        f"which are one comparison: intervals over {unit(summary, strong['n'], sets=strong['sets'])}."
    )
    return Table(
        "Strong shift: mean NLL", caption + marks(summary, (cell for row in rows for cell in row)),
        ["method", "mean NLL", *(f"minus {second}" for second in others)], [("", rows)],
    )  # fmt: skip


def _equal(summary: Summary, candidate: str) -> Table:
    """Candidate and baseline, tuned and at the same settings."""
    baseline, rows = by_role(summary, "baseline"), []
    settings = [equal for equal in summary["equal_settings"] if equal]
    for where, entry in (("test data", summary["test"]), ("strong shift", summary["strong_shift"])):
        if entry is None or "equal_settings" not in entry or baseline is None:
            continue
        for how, equal in (("tuned, each by itself", entry), ("equal settings", entry["equal_settings"])):
            cell = equal["differences"].get(baseline, {}).get(candidate, {}).get("nll")
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


def _draws(summary: Summary) -> Table:
    """Losses over draws of the curvature data within seeds."""
    rows = []
    for name, of_seeds in summary["test"]["draws"].items():
        values = [losses["nll"] for losses in of_seeds if "nll" in losses]
        if values:
            deviation = statistics.fmean(statistics.stdev(losses) for losses in values)
            rows.append([name, str(len(values[0])), f"{min(map(min, values)):.4f} to {max(map(max, values)):.4f}",
                         f"{deviation:.4f}"])  # fmt: skip
    return Table(
        "Draws of the curvature data: NLL on test data",
        "Every draw is tuned by itself. Smallest and largest over draws and seeds; standard deviation between draws of "
        "a seed.",
        ["method", "draws", "range", "standard deviation"], [("", rows)],
    )  # fmt: skip


def _severities(summary: Summary) -> list[int | None]:
    """Of all shifts; ``None`` for those without degrees, last."""
    severities = {entry["severity"] for entry in summary["shifts"]}
    return sorted(severities, key=lambda severity: (severity is None, severity))


def _headings(severities: Sequence[int | None]) -> list[str]:
    return ["shifted" if severity is None else f"severity {severity}" for severity in severities]


def _shifts(summary: Summary, score: str) -> Table:
    severities, sections = _severities(summary), []
    for name, entries in verdicts.shifts(summary).items():
        by_severity = {entry["severity"]: entry["scores"] for entry in entries}
        rows = [
            [
                method,
                *(
                    in_cell(by_severity[s][method][score], score, summary) if s in by_severity else ""
                    for s in severities
                ),
            ]
            for method in entries[0]["scores"]
        ]
        sections.append((name, rows))
    return Table(
        f"Shifted data: {SCORES[score][0]}",
        f"By severity. Cells: {errors(summary)}."
        + marks(summary, (cell for _, rows in sections for row in rows for cell in row)),
        ["method", *_headings(severities)], sections,
    )  # fmt: skip


def _shift_differences(summary: Summary, candidate: str, second: str) -> Table:
    severities, rows = _severities(summary), []
    for name, entries in verdicts.shifts(summary).items():
        by_severity = {e["severity"]: e["differences"].get(second, {}).get(candidate, {}).get("nll") for e in entries}
        rows.append(
            [name, *("" if by_severity.get(s) is None else with_interval(by_severity[s], 3) for s in severities)]
        )
    return Table(
        f"Shifted data: NLL of {candidate} minus {second}",
        "Paired, with the 95 % interval. Below zero: the former is better. Rows and columns are copies of the same "
        "data and no further comparisons: the table of strong shifts has the one that counts.",
        ["shift", *_headings(severities)],
        [("", rows)],
    )


def _out_of_distribution(summary: Summary) -> Table:
    sections = []
    for entry in summary["ood"]:
        rows = []
        for method, scores in entry["scores"].items():
            kinds = list(dict.fromkeys(key.rpartition(", ")[0] for key in scores))
            for kind in kinds:
                cells = [in_cell(scores[f"{kind}, {score}"], score) for score in ("auroc", "aupr", "fpr95")]
                rows.append([f"{method}: {kind}", *cells])
        sections.append((f"{entry['name']} ({entry['n']:,})", rows))
    return Table(
        "Out-of-distribution data",
        "How well a score tells out-of-distribution (OOD) data, the positives, from test data. FPR95: test data called "
        "OOD when 95 % of the OOD data are detected; lower is better.",
        ["method: score", *(SCORES[score][0] for score in ("auroc", "aupr", "fpr95"))],
        sections,
    )


def _detectors(summary: Summary) -> Table:
    """Posteriors against detectors that need none; records of an earlier version lack it."""
    every = [(entry, against) for entry in summary["ood"] for against in entry.get("against_detectors", {}).items()]
    keys = dict.fromkeys(key for _, (_, firsts) in every for cells in firsts.values() for key in cells)
    detectors = [key for key in keys if key.endswith(", auroc")]
    sections = []
    for entry, (second, firsts) in every:
        if firsts:
            rows = [
                [name, *(with_interval(cells[key], 1, scale=100) if key in cells else "" for key in detectors)]
                for name, cells in firsts.items()
            ]
            sections.append((f"{entry['name']} ({entry['n']:,}): minus {second}'s", rows))
    return Table(
        "Maximum probability against detectors that need no posterior",
        "AUROC in %, of one minus the maximum probability less that of the detector. Paired, with the 95 % interval; "
        "above zero: the former is better.",
        ["method", *(key.removesuffix(", auroc") for key in detectors)], sections,
    )  # fmt: skip


def _distances(summary: Summary) -> Table:
    sections = []
    for where, log_ratios in summary["distances"].items():
        value = geometric_mean(log_ratios["prior_precision"])
        title = (
            f"tuned prior precision of the reference ({value:.3g})"
            if where == "tuned"
            else f"prior precision {value:g}"
        )
        rows = [
            [name, plus_minus(log_ratio["absolute"], 4), plus_minus(log_ratio["signed"], 4, sign=True)]
            for name, log_ratio in log_ratios.items()
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


def _cost(summary: Summary) -> Table:
    rows = []
    for name, about in summary["predictors"].items():
        if name not in summary["test"]["scores"]:
            continue
        tuned, free = [], about.get("undetermined", ())

        def marked(text: str, what: str, about: Mapping[str, Any] = about) -> str:
            sides = {ends[key] for ends in about.get("edges", ()) for key in ends if key.startswith(what)}
            return text + "".join(f" {MARK[side]}" for side in sorted(sides))

        if len(about.get("prior_precisions", [[]])[0]) > 1:
            values = [value for of_seed in about["prior_precisions"] for value in of_seed]
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
        "smallest or the largest of its search, in some seed, so that a wider one might change it; a largest prior "
        "precision leaves hardly any posterior uncertainty. Not determined: the validation data do not say it, and it "
        "is a choice. Seconds. Predicting covers all data of this page; posteriors of the same parameters are "
        "predicted together, and the time is that of the first. Getting the "
        f"network took {summary['seconds']['model']:.1f} s.",
        ["method", "tuned", "fit, s", "tune, s", "predict, s"],
        [("", rows)],
    )
