"""All shipped tasks through the evaluation suite, and ``docs/results.md`` from their records.

    python eval/results.py --data-dir <folder> [--tasks digits cifar10] [--quick] [--only-document]

Records, one for each seed, are in ``<out>/<task>/records``; what is there already is used, and an interrupted run goes
on. The report page of every task is in ``<out>/<task>/report.html``. What lies between ``<!-- NAME -->`` and
``<!-- end -->`` in the document is replaced; the text around it stays. Everything the document's tables show is in
``<docs>/records/results.json`` too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from documents import fill, markdown, save_small

from debiased_laplace.evaluation import run
from debiased_laplace.evaluation.methods import (
    ENSEMBLE,
    ISOTROPIC,
    MAP,
    POINTS,
    TEMPERATURE,
    TEMPERATURE_RULE,
    Options,
    methods_of,
)
from debiased_laplace.evaluation.records import read_json, write_json
from debiased_laplace.evaluation.report.figures import pictures
from debiased_laplace.evaluation.report.numbers import plus_minus, unit, with_interval
from debiased_laplace.evaluation.report.outputs import write_outputs
from debiased_laplace.evaluation.report.statement import statement
from debiased_laplace.evaluation.report.summary import summarise
from debiased_laplace.evaluation.report.table import Table
from debiased_laplace.evaluation.report.tables import tables
from debiased_laplace.evaluation.report.verdicts import by_role, verdict
from debiased_laplace.evaluation.shipped import cifar10
from debiased_laplace.evaluation.tasks import Context, Task, resolve_device

TASKS = (
    "digits", "fashion-mnist", "cifar10", "uci-concrete", "uci-energy", "uci-power-plant", "uci-wine-quality-red",
)  # fmt: skip
Summary = dict[str, Any]
#: Where predictions of everything would take hours for each seed: every other severity, of so many images.
FEWER: dict[str, dict[str, Any]] = {
    "cifar10": {
        "conditions": (
            *(f"{shift} {severity}" for shift in cifar10.SHIFTS for severity in (1, 3, 5)),
            "shuffled patches", "smooth blobs", "MNIST",
        ),
        "n_shifted": 250,
    }
}  # fmt: skip
#: Draws of the data for curvature in each seed; two of the others. Networks of images tell more.
DRAWS = {"digits": 4, "fashion-mnist": 1, "cifar10": 1}


def evaluate(name: str, options: argparse.Namespace) -> Summary:
    """Run a task, or read what is there, and write its files."""
    task, out = Task.load(name), options.out / name
    context = Context(
        data_dir=options.data_dir, cache=options.cache or out / "cache", quick=options.quick,
        device=resolve_device(options.device),
    )  # fmt: skip
    n_seeds = options.seeds or (1 if options.quick else int(task.constant("SEEDS", 1)))
    records = run(
        task, out, range(n_seeds), context, methods=methods_of(task, equal_seconds=True),
        options=Options(
            n_resamples=200 if options.quick else 1000,
            draws=options.draws or (1 if options.quick else DRAWS.get(name, 2)),
            **FEWER.get(name, {}),
        ),
        n_processes=options.processes,
        progress=lambda seed, step: print(f"{name}, seed {seed}: {step}", file=sys.stderr, flush=True),
    )  # fmt: skip
    summary = summarise(records)
    write_outputs(out, summary)
    return summary


# -- the document ----------------------------------------------------------------------------------


def document(path: Path, summaries: Mapping[str, Summary]) -> None:
    """Write the record and the figures, and fill the marked parts of the document from the record."""
    for name, summary in summaries.items():
        picture = next(iter(pictures(summary)), None)
        if not summary["regression"] and picture is not None and summary["shifts"]:
            save_small(picture.png, path.parent / f"results-{name}.png")
    record = path.parent / "records" / "results.json"
    known = read_json(record) if record.exists() else {}
    known |= {name: compact(summary) for name, summary in summaries.items()}
    write_json(record, {name: known[name] for name in TASKS if name in known})
    fill(path, parts(read_json(record)))


def parts(summaries: Mapping[str, Summary]) -> dict[str, str]:
    """The parts of the document, from its record alone."""
    classifiers = {name: s for name, s in summaries.items() if not s["regression"]}
    regressions = {name: s for name, s in summaries.items() if s["regression"]}
    made = {"answers": answers(summaries)}
    if classifiers:
        made |= {"aims": aims(classifiers), "shift": shift(classifiers)}
    if regressions:
        made["uci"] = uci(regressions)
    for name, summary in classifiers.items():
        shown = [table for table in tables(summary) if table.title in titles(summary)]
        ood = [of_ood(table) for table in tables(summary) if table.title == "Out-of-distribution data"]
        made[f"task {name}"] = "\n".join(table.markdown(3) for table in [*shown, *ood])
    return made


#: What the document shows of foreign data: the most common score, the posterior's own, and the best detector.
OF_OOD = ("maximum probability", "functional variance", "Mahalanobis")


def of_ood(table: Table) -> Table:
    """Some of the scores."""
    sections = [
        (section, [row for row in rows if row[0].endswith(tuple(f": {score}" for score in OF_OOD))])
        for section, rows in table.sections
    ]
    return replace(table, sections=sections)


def titles(summary: Summary) -> list[str]:
    """Of the tables that the document shows; the report pages have the others."""
    candidate, baseline = by_role(summary, "candidate"), by_role(summary, "baseline")
    against = [f"Shifted data: NLL of {candidate} minus {second}" for second in (TEMPERATURE_RULE, baseline)]
    equal = f"NLL of {candidate} minus {baseline}, at equal settings"
    shown = [
        "Test data",
        "Calibration and refinement, test data",
        "Strong shift: mean NLL",
        *against,
        equal,
        "Draws of the curvature data: NLL on test data",
    ]
    detectors = "Maximum probability against detectors that need no posterior"
    return [*shown, detectors, "Distance to the posterior of all training data", "Tuning and cost"]


#: What a record leaves out of a summary: what figures alone show, and texts.
LEFT_OUT = ("curves", "curve", "histograms", "most_uncertain", "coverage", "settings")
#: Scores that it keeps of every single shift.
OF_SHIFTS = ("accuracy", "nll", "ece", "rmse")


def compact(summary: Summary) -> Summary:
    """Everything that tables and sentences show, five digits; of shifted data the differences of the candidate."""
    candidate = by_role(summary, "candidate")
    kept: Summary = rounded({key: entry for key, entry in summary.items() if key not in LEFT_OUT})
    sets = [e["prediction_sets"] for e in (kept["test"], kept["strong_shift"]) if e and "prediction_sets" in e]
    scores = next(iter(kept["test"]["scores"].values()))
    kept["shifts"] = [without(entry, set(scores) - set(OF_SHIFTS)) for entry in kept["shifts"]]
    for entry in (*kept["shifts"], *kept["ood"], *sets):
        entry["differences"] = {
            second: {first: scores for first, scores in others.items() if first == candidate}
            for second, others in entry["differences"].items()
        }
    return kept


def without(value: Any, keys: Set[str]) -> Any:
    """The same without these keys, at any depth."""
    if isinstance(value, Mapping):
        return {key: without(entry, keys) for key, entry in value.items() if key not in keys}
    return [without(entry, keys) for entry in value] if isinstance(value, list) else value


def rounded(value: Any) -> Any:
    """The same with five digits, without what is left out."""
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items() if key not in LEFT_OUT}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def answers(summaries: Mapping[str, Summary]) -> str:
    """The sentence of every report."""
    return "\n".join(f"* **{name}**: {statement(summary)['answer']}" for name, summary in summaries.items())


def aims(summaries: Mapping[str, Summary]) -> str:
    """Every posterior against temperature scaling by both rules, the identity, a single batch and all data."""
    rows = []
    for name, summary in summaries.items():
        for method in [m for m in summary["test"]["scores"] if m not in POINTS]:
            cells = [name, method]
            for second in (*POINTS, ISOTROPIC, by_role(summary, "baseline"), by_role(summary, "reference")):
                cell = summary["test"]["differences"].get(second, {}).get(method, {}).get("nll")
                cells.append("" if cell is None else f"{with_interval(cell, 4)}{_mark('nll', cell)}")
            rows.append(cells)
    columns = ["task", "method", f"NLL minus {MAP}", f"minus {TEMPERATURE}", f"minus {TEMPERATURE_RULE}"]
    return markdown([*columns, "minus identity", "minus single batch", "minus full data"], rows)


def _mark(score: str, cell: list[float]) -> str:
    return {"better": " ✓", "worse": " ✗"}.get(verdict(score, cell), "")


def shift(summaries: Mapping[str, Summary]) -> str:
    """Mean NLL over the strong shifts, one comparison for each task: images are drawn jointly over all of them."""
    rows = []
    for name, summary in summaries.items():
        strong = summary["strong_shift"]
        if strong is None:
            continue
        for method, scores in strong["scores"].items():
            cells = [name, method, plus_minus(scores["nll"], 3)]
            for second in (TEMPERATURE, TEMPERATURE_RULE, ISOTROPIC, by_role(summary, "baseline"), ENSEMBLE):
                cell = strong["differences"].get(second, {}).get(method, {}).get("nll")
                cells.append("" if cell is None else f"{with_interval(cell, 3)}{_mark('nll', cell)}")
            rows.append([*cells, unit(summary, strong["n"], sets=strong["sets"])])
    columns = ["task", "method", "mean NLL", f"minus {TEMPERATURE}", f"minus {TEMPERATURE_RULE}", "minus identity"]
    return markdown([*columns, "minus single batch", f"minus {ENSEMBLE}", "intervals over"], rows)


def uci(summaries: Mapping[str, Summary]) -> str:
    """NLL, RMSE, CRPS and coverage of the regressions."""
    rows = []
    for name, summary in summaries.items():
        for method, scores in summary["test"]["scores"].items():
            cell = summary["test"]["differences"].get(MAP, {}).get(method, {}).get("nll")
            rows.append(
                [
                    name.removeprefix("uci-"), method, plus_minus(scores["rmse"], 3), plus_minus(scores["nll"], 3),
                    plus_minus(scores["crps"], 3), plus_minus(scores["coverage_95"], 1, scale=100),
                    "" if cell is None else f"{with_interval(cell, 3)}{_mark('nll', cell)}",
                ]
            )  # fmt: skip
    columns = ["set", "method", "RMSE", "NLL", "CRPS", "95 % interval holds %", f"NLL minus {MAP}"]
    over = {unit(summary, summary["test"]["n"]) for summary in summaries.values()}
    return markdown(columns, rows) + f"\n\nIntervals over {'; '.join(sorted(over))}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=None, help="by default what a task says")
    parser.add_argument("--draws", type=int, default=None, help="of the data for curvature in each seed")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--cache", type=Path, default=None, help="for trained weights; <out>/<task>/cache by default")
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--processes", type=int, default=1, help="seeds at a time")
    parser.add_argument("--quick", action="store_true", help="one seed and little of everything")
    parser.add_argument("--no-document", action="store_true", help="records and pages only")
    options = parser.parse_args()
    summaries = {name: evaluate(name, options) for name in options.tasks}
    if not options.no_document:
        document(options.docs / "results.md", summaries)


if __name__ == "__main__":
    main()
