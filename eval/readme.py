"""The demonstration's record and figure, its table in docs/demonstration.md, and the table of costs in the README.

    python eval/readme.py [--demo [--quick]] [--docs docs]

With ``--demo`` the demonstration is run, its record is written to ``<docs>/records/demo.json`` and its figure to
``<docs>/demo-reliability.png``. The table between ``<!-- demo -->`` and ``<!-- end -->`` is made from that record, that
after ``<!-- costs -->`` from ``<docs>/records/bench-cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from documents import fill, markdown, save_small
from results import compact

from debiased_laplace.evaluation.demo import demo
from debiased_laplace.evaluation.methods import is_variant
from debiased_laplace.evaluation.records import read_json, write_json
from debiased_laplace.evaluation.report.numbers import plus_minus, unit
from debiased_laplace.evaluation.report.outputs import write_outputs
from debiased_laplace.evaluation.suite.processes import available

#: Shifts of the demonstration's table; severities 3 and 5 of all kinds are in the mean.
SHIFTS = ("noise 5", "rotation 3", "contrast 5")
#: What, network and side in the record of the benchmarks for every cell.
COSTS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("predict 64 inputs, LeNet", "predict", "LeNet", ("ours", "laplace curvlinops", "laplace backpack")),
    ("predict 4 inputs, All-CNN-C, 100 classes", "predict", "All-CNN-C",
     ("ours", "laplace curvlinops", "laplace backpack")),
    ("K-FAC statistics, 128 inputs, LeNet", "statistics", "LeNet",
     ("ours exact", "laplace curvlinops", "laplace backpack")),
    ("diagonal fit, 128 inputs, LeNet", "diagonal", "LeNet", ("ours", "laplace curvlinops", "laplace backpack")),
    ("100 prior precisions, 500 inputs, LeNet", "grid", "LeNet", ("ours",)),
    ("whole fit, ResNet-50, 8 images", "whole fit", "ResNet-50", ("ours one sample",)),
)  # fmt: skip


def demo_table(summary: Mapping[str, Any]) -> str:
    """What the README shows of the demonstration, and what its intervals are over."""
    shifts = {f"{entry['name']} {entry['severity']}": entry["scores"] for entry in summary["shifts"]}
    (ood,) = summary["ood"]
    rows = []
    for name, scores in summary["test"]["scores"].items():
        if is_variant(name):
            continue
        equal = summary["distances"].get("equal", {}).get(name)
        rows.append([
            name, "" if equal is None else plus_minus(equal["absolute"], 3), plus_minus(scores["nll"], 3),
            plus_minus(summary["strong_shift"]["scores"][name]["nll"], 2),
            *(plus_minus(shifts[title][name]["nll"], 2) for title in SHIFTS),
            plus_minus(ood["scores"][name]["maximum probability, auroc"], 1, scale=100),
        ])  # fmt: skip
    strong = summary["strong_shift"]
    columns = ["", "distance to all the data", "NLL, test", f"mean NLL, {len(strong['shifts'])} strong shifts"]
    table = markdown([*columns, *(f"NLL, {t}" for t in SHIFTS), f"AUROC %, {ood['name']}"], rows)
    return f"{table}\n\nErrors are over {unit(summary, summary['test']['n'])}."


def cost(sides: Mapping[str, Any], name: str, unit: str = "") -> str:
    """Seconds, also in units if there are some, and memory; or why there are none."""
    measured = sides[name]
    if "error" in measured:
        wanted = re.search(r"allocate (\d+) bytes", measured["error"])
        return f"asks for {int(wanted[1]) / 1e9:,.0f} GB" if wanted else "not supported"
    seconds = median(measured["seconds"])
    units = f", {seconds / median(measured['unit_seconds']):.1f} {unit}" if unit else ""
    return f"{seconds:.2g} s, {measured['memory_mb']:,.0f} MB{units}"


def cost_table(records: Sequence[Mapping[str, Any]]) -> str:
    """What the README shows of the benchmarks."""
    by_pair = {(record["what"], record["network"]): dict(record["sides"]) for record in records}
    rows = []
    for title, what, network, sides in [case for case in COSTS if case[1:3] in by_pair]:  # those that were measured
        cells = [cost(by_pair[what, network], side, "single predictions" * (what == "grid")) for side in sides]
        rows.append([title, *cells, *[""] * (3 - len(cells))])
    return markdown(["", "here", "laplace-torch, default", "laplace-torch, BackPACK"], rows)


def parts(docs: Path) -> dict[str, dict[str, str]]:
    """The generated parts of documents, from the records that are there."""
    costs = cost_table(json.loads((docs / "records" / "bench-cpu.json").read_text())["records"])
    made = {"README.md": {"costs": costs}}
    if (docs / "records" / "demo.json").exists():
        made["demonstration.md"] = {"demo": demo_table(read_json(docs / "records" / "demo.json")["summary"])}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="run the demonstration")
    parser.add_argument("--quick", action="store_true", help="a quick one")
    parser.add_argument("--out", type=Path, default=Path("eval/results/demo"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    options = parser.parse_args()
    if options.demo:
        start, n = time.perf_counter(), available()
        summary = demo(
            options.out, n_processes=n, quick=options.quick,
            progress=lambda seed, step: print(f"seed {seed}: {step}", file=sys.stderr, flush=True),
        )  # fmt: skip
        paths = write_outputs(options.out, summary, title="Debiased Laplace on digits")
        seconds = {"processes": n, "seconds": round(time.perf_counter() - start, 1)}
        write_json(options.docs / "records" / "demo.json", seconds | {"summary": compact(summary)})
        save_small(paths["reliability.png"].read_bytes(), options.docs / "demo-reliability.png")
    for name, made in parts(options.docs).items():
        fill(options.readme if name == "README.md" else options.docs / name, made)


if __name__ == "__main__":
    main()
