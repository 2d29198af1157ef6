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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from documents import fill, markdown, save_small

from debiased_laplace.evaluation import suite
from debiased_laplace.evaluation.figures import pictures
from debiased_laplace.evaluation.methods import MAP, TEMPERATURE, Options
from debiased_laplace.evaluation.records import write_json
from debiased_laplace.evaluation.report import write_outputs
from debiased_laplace.evaluation.statement import plus_minus, statement, with_interval
from debiased_laplace.evaluation.summary import by_role, differences, is_strong, summarise, verdict
from debiased_laplace.evaluation.tables import tables
from debiased_laplace.evaluation.tasks import Context, Task, resolve_device

TASKS = (
    "digits", "fashion-mnist", "cifar10", "uci-concrete", "uci-energy", "uci-power-plant", "uci-wine-quality-red",
)  # fmt: skip
Summary = dict[str, Any]


def evaluate(name: str, options: argparse.Namespace) -> Summary:
    """Run a task, or read what is there, and write its files."""
    task, out = Task.load(name), options.out / name
    context = Context(
        data_dir=options.data_dir, cache=options.cache or out / "cache", quick=options.quick,
        device=resolve_device(options.device),
    )  # fmt: skip
    n_seeds = options.seeds or (1 if options.quick else int(task.constant("SEEDS", 1)))
    records = suite.run(
        task, out, range(n_seeds), context, options=Options(n_resamples=200 if options.quick else 1000),
        progress=lambda seed, step: print(f"{name}, seed {seed}: {step}", file=sys.stderr, flush=True),
    )  # fmt: skip
    summary = summarise(records)
    write_outputs(out, summary)
    return summary


# -- the document ----------------------------------------------------------------------------------


def document(path: Path, found: Mapping[str, Summary]) -> None:
    """Fill the marked parts of the document, and write its figures and its record."""
    classifiers = {name: s for name, s in found.items() if not s["regression"]}
    regressions = {name: s for name, s in found.items() if s["regression"]}
    parts = {"answers": answers(found)}
    if classifiers:
        parts |= {"aims": aims(classifiers), "shift": shift(classifiers)}
    if regressions:
        parts["uci"] = uci(regressions)
    for name, summary in classifiers.items():
        shown = [table for table in tables(summary) if table.title in titles(summary)]
        foreign = [table for table in tables(summary, short=True) if table.title == "Foreign data"]
        parts[f"task {name}"] = "\n".join(table.markdown(3) for table in [*shown, *foreign])
        picture = next(iter(pictures(summary)), None)
        if picture is not None and summary["shifts"]:
            save_small(picture.png, path.parent / f"results-{name}.png")
    fill(path, parts)
    kept = {name: {key: s[key] for key in ("seeds", "environments")} | compact(s) for name, s in found.items()}
    record = path.parent / "records" / "results.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, kept)


def titles(summary: Summary) -> list[str]:
    """Of the tables that the document shows; the report pages have the others."""
    candidate, baseline = by_role(summary, "candidate"), by_role(summary, "baseline")
    against = [f"Shifted data: NLL of {candidate} minus {second}" for second in (TEMPERATURE, baseline)]
    return ["Test data", *against, "Distance to the posterior of all training data", "Tuning and cost"]


def compact(summary: Summary) -> dict[str, Any]:
    """The scores that tables show: value, standard error and interval, four digits."""

    def rounded(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {
            method: {score: [float(f"{value:.4g}") for value in cell] for score, cell in own.items()}
            for method, own in entry["scores"].items()
        }

    return {
        "test": rounded(summary["test"]),
        "shifts": {f"{e['name']} {e['severity']}": rounded(e) for e in summary["shifts"]},
        "ood": {e["name"]: rounded(e) for e in summary["ood"]},
    }


def answers(found: Mapping[str, Summary]) -> str:
    """The sentence of every report."""
    return "\n".join(f"* **{name}**: {statement(summary)['answer']}" for name, summary in found.items())


def aims(found: Mapping[str, Summary]) -> str:
    """Every posterior against temperature scaling, a single batch and all data."""
    rows = []
    for name, summary in found.items():
        posteriors = [m for m in summary["test"]["scores"] if m not in (MAP, TEMPERATURE)]
        for method in posteriors:
            cells = [name, method]
            for second in (MAP, TEMPERATURE, by_role(summary, "baseline"), by_role(summary, "reference")):
                cell = summary["test"]["differences"].get(second, {}).get(method, {}).get("nll")
                cells.append("" if cell is None else f"{with_interval(cell, 4)}{_mark('nll', cell)}")
            ece = summary["test"]["differences"].get(TEMPERATURE, {}).get(method, {}).get("ece")
            cells.append("" if ece is None else f"{with_interval(ece, 2, scale=100)}{_mark('ece', ece)}")
            rows.append(cells)
    columns = ["task", "method", f"NLL minus {MAP}", f"minus {TEMPERATURE}", "minus single batch", "minus full data"]
    return markdown([*columns, f"ECE % minus {TEMPERATURE}"], rows)


def _mark(score: str, cell: list[float]) -> str:
    return {"better": " ✓", "worse": " ✗"}.get(verdict(score, cell), "")


def shift(found: Mapping[str, Summary]) -> str:
    """How often a posterior is shown to be better or worse than others under strong shift."""
    rows = []
    for name, summary in found.items():
        for method in [m for m in summary["test"]["scores"] if m not in (MAP, TEMPERATURE)]:
            cells = [name, method]
            for score in ("nll", "ece"):
                for second in (TEMPERATURE, by_role(summary, "baseline")):
                    own = [cell for e, cell in differences(summary, method, str(second), score) if is_strong(e)]
                    said = [verdict(score, cell) for cell in own]
                    cells.append(f"{said.count('better')} to {said.count('worse')} of {len(said)}" if own else "")
            rows.append(cells)
    columns = ["task", "method"]
    for score in ("NLL", "ECE"):
        columns += [f"{score} against {TEMPERATURE}", f"{score} against single batch"]
    return markdown(columns, rows)


def uci(found: Mapping[str, Summary]) -> str:
    """NLL, RMSE, CRPS and coverage of the regressions."""
    rows = []
    for name, summary in found.items():
        for method, own in summary["test"]["scores"].items():
            cell = summary["test"]["differences"].get(MAP, {}).get(method, {}).get("nll")
            rows.append(
                [
                    name.removeprefix("uci-"), method, plus_minus(own["rmse"], 3), plus_minus(own["nll"], 3),
                    plus_minus(own["crps"], 3), plus_minus(own["coverage_95"], 1, scale=100),
                    "" if cell is None else f"{with_interval(cell, 3)}{_mark('nll', cell)}",
                ]
            )  # fmt: skip
    return markdown(["set", "method", "RMSE", "NLL", "CRPS", "95 % interval holds %", f"NLL minus {MAP}"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=None, help="by default what a task says")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--cache", type=Path, default=None, help="for trained weights; <out>/<task>/cache by default")
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true", help="one seed and little of everything")
    parser.add_argument("--no-document", action="store_true", help="records and pages only")
    options = parser.parse_args()
    found = {name: evaluate(name, options) for name in options.tasks}
    if not options.no_document:
        document(options.docs / "results.md", found)


if __name__ == "__main__":
    main()
