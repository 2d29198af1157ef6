"""Tables of ``docs/steps.md`` from the records that ``steps.py`` writes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from documents import fill, markdown, save_small

from debiased_laplace.evaluation.records import write_json

#: Figures in the document.
SHOWN = ("figure5-lenet-trained-1024", "noisy-quadratic", "training-digits-cnn", "training-lenet-seconds")


def median_and_range(values: list[float]) -> str:
    """Median and range."""
    return f"{np.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def mean(values: list[float | None], digits: int = 3) -> str:
    """Mean and standard error, and every value where one is missing, of a training that diverged."""
    if None in values:
        return ", ".join("diverged" if value is None else f"{value:.{digits}f}" for value in values)
    array = np.array(values, dtype=float)
    return f"{array.mean():.{digits}f} ± {array.std(ddof=1) / len(array) ** 0.5:.{digits}f}"


def figure5_table(records: list[Any]) -> str:
    rows = []
    for record in sorted(records, key=lambda r: (r["network"], r["batch"])):
        for part in ("train", "test"):
            one, two = (record["summary"][name] for name in ("single", "debiased"))
            rows.append([
                record["network"], f"{record['batch']:,} / 2 x {record['batch'] // 2:,}", part,
                f"{one[f'{part} loss at the start']:.3f}",
                *(median_and_range(of[f"{part} loss, {when}"]) for when in ("last", "best") for of in (one, two)),
                str(len(one[f"{part} loss, last"])),
            ])  # fmt: skip
    columns = [
        "network",
        "data",
        "loss",
        "start",
        "one batch, end",
        "debiased, end",
        "one batch, best",
        "debiased, best",
    ]
    return markdown([*columns, "draws"], rows)


def quadratic_table(record: Any) -> str:
    rows_by_median = sorted(record["final_distance"].items(), key=lambda item: item[1]["median"])
    return markdown(
        ["step", "median", "quartiles", "largest"],
        (
            [
                name,
                f"{distances['median']:.2f}",
                f"{distances['q25']:.2f}, {distances['q75']:.2f}",
                f"{distances['max']:.2f}",
            ]
            for name, distances in rows_by_median
        ),
    )


def directional_table(records: list[Any]) -> str:
    rows = [
        [record["network"], f"{record['batch']:,}", name, f"{record['train loss at the start']:.3f}",
         *(median_and_range([run[key] for run in runs]) for key in ("quadratic", "train"))]
        for record in sorted(records, key=lambda r: (r["network"], r["batch"]))
        for name, runs in record["steps"].items()
    ]  # fmt: skip
    return markdown(["network", "data", "step", "training loss", "change of its quadratic", "change of it"], rows)


def training_table(records: list[Any]) -> str:
    rows = []
    for record in sorted(records, key=lambda r: r["network"]):
        for budget, methods in record["budgets"].items():
            for name, about in methods.items():
                last = about["curves"]  # of which a record has the ends
                setting = ", ".join(f"{key} {value:g}" for key, value in about["setting"].items())
                rows.append([
                    record["network"], budget, name, setting, f"{np.mean([x['samples'] for x in last]):,.0f}",
                    f"{np.mean([x['seconds'] for x in last]):.1f}", mean([x["train loss"] for x in last], 4),
                    mean([x["test loss"] for x in last]), mean([100 * x["test accuracy"] for x in last], 1),
                ])  # fmt: skip
    columns = ["network", "equal", "method", "tuned", "samples", "CPU s", "train loss", "test loss", "test accuracy %"]
    return markdown(columns, rows)


def document(options: argparse.Namespace) -> None:
    """Keep the numbers of all records that are there, fill the tables from them, and copy the figures."""
    by_experiment: dict[str, list[Any]] = {}
    for path in sorted(options.out.glob("*.json")):
        by_experiment.setdefault(path.stem.split("-")[0], []).append(compact(json.loads(path.read_text())))
    write_json(options.docs / "records" / "steps.json", by_experiment)
    fill(options.docs / "steps.md", parts_of(by_experiment))
    for name in SHOWN:
        if (options.out / f"{name}.png").exists():
            save_small((options.out / f"{name}.png").read_bytes(), options.docs / f"steps-{name}.png")


def parts_of(by_experiment: Mapping[str, list[Any]]) -> dict[str, str]:
    """The generated parts of the document, from its record."""
    makers = {"figure5": figure5_table, "directional": directional_table, "training": training_table}
    made = {name: make(by_experiment[name]) for name, make in makers.items() if name in by_experiment}
    return made | ({"noisy quadratic": quadratic_table(by_experiment["noisy"][0])} if "noisy" in by_experiment else {})


def compact(record: Any) -> Any:
    """Without what only single runs have; of a training its end, of other curves six digits."""
    if isinstance(record, dict):
        left_out = {"step_sizes", "first_step_sizes", "all_final_distances", "relative_dampings_of_the_first_run"}
        kept = {key: entry for key, entry in record.items() if key not in left_out}
        return {
            key: [curve[-1] for curve in entry] if key == "curves" else compact(entry) for key, entry in kept.items()
        }
    if isinstance(record, list):
        return [compact(entry) for entry in record]
    return float(f"{record:.6g}") if isinstance(record, float) else record
