"""What mini-batches do to trained networks, and ``docs/bias.md`` from the records.

    python eval/bias.py --data-dir <folder> [--tasks cifar10 fashion-mnist] [--quick]

Every task goes through ``debiased-laplace bias``: its page, figures and numbers are in ``<out>/<task>``, complete parts
are kept, and an interrupted run goes on. The figures and numbers that the document shows are copied into ``<docs>``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from documents import fill, markdown, save_small

from debiased_laplace.evaluation.bias import BiasOptions, findings, statement, study, tables, write_outputs
from debiased_laplace.evaluation.bias.report import at, shared_span, times, uphill_steps
from debiased_laplace.evaluation.records import read_json, write_json
from debiased_laplace.evaluation.tasks import Context, Task, resolve_device

#: As large as one thread allows in about an hour each.
OPTIONS = {
    "digits": BiasOptions(),
    "fashion-mnist": BiasOptions(batch_size=512, pool=20_000, reference=10_000),
    "fashion-mnist-vit": BiasOptions(reference=4_000),
    "cifar10": BiasOptions(batch_size=512),
    "cifar10-all-cnn-c": BiasOptions(
        n_batches=4, n_directions=5, reference=1_000, sizes=(32,), n_size_directions=1, n_vectors=2
    ),
}
#: Task files; the other tasks are shipped.
FILES = {
    name: Path(__file__).with_name(file)
    for name, file in (("cifar10-all-cnn-c", "all_cnn_c.py"), ("fashion-mnist-vit", "vit.py"))
}
QUICK = BiasOptions(batch_size=16, n_batches=3, n_directions=3, n_steps=3, pool=128, reference=64, n_vectors=2)
#: Figures in the document.
SHOWN = {
    "fashion-mnist": ("directions", "batch-sizes"),
    "cifar10": ("directions", "planes", "alignment", "steps", "batch-sizes", "noise"),
    "cifar10-all-cnn-c": ("directions", "steps"),
    "fashion-mnist-vit": ("directions", "batch-sizes"),
}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    context = Context(
        data_dir=options.data_dir, cache=options.cache or options.out / name / "cache", quick=options.quick,
        device=resolve_device(options.device),
    )  # fmt: skip
    return study(
        Task.load(FILES.get(name, name)), options.out / name, context, QUICK if options.quick else OPTIONS[name],
        progress=lambda finished, total, step: print(f"{name}: {finished} of {total}, {step}", file=sys.stderr),
    )  # fmt: skip


def summary(records: dict[str, dict[str, Any]]) -> str:
    """A row for every network."""
    rows = []
    for record in records.values():
        about, uphill = record["directions"]["curvatures"], uphill_steps(record)
        rows.append([
            record["task"]["name"], f"{record['directions']['n_data'][0]:,}", str(len(about["ratio_own"]["value"])),
            times(about["typical_ratio_own"]), times(about["typical_ratio_other"]),
            times(at(about["ratio_own"], 0)), f"{shared_span(record):.0f} %", f"{sum(uphill)} of {len(uphill)}",
        ])  # fmt: skip
    columns = ["network", "batch", "directions", "overstatement, same batch", "second batch", "first direction alone"]
    return markdown([*columns, "within another's span", "CG steps uphill"], rows)


def parts(records: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """The generated parts of the document, from its records."""
    made = {}
    for name, record in records.items():
        said = statement(record)
        made[f"bias {name}"] = "\n".join([
            f"**{said['answer']}**", "",
            *(f"- {sentence}" for sentence in [*said["details"], *findings(record).values()]), "",
            *(table.markdown(4) for table in tables(record)),
        ])  # fmt: skip
    return made | ({"networks": summary(dict(records))} if set(records) == set(OPTIONS) else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--cache", type=Path, default=None, help="for trained weights; <out>/<task>/cache by default")
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=Path("eval/results/bias"))
    parser.add_argument("--docs", type=Path, default=None, help="docs by default; none in a quick run")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    options = parser.parse_args()
    docs = options.docs or (None if options.quick else Path("docs"))
    records = {name: measure(name, options) for name in options.tasks}
    for name, record in records.items():
        paths = write_outputs(options.out / name, record)
        if docs is None:
            continue
        for figure in SHOWN.get(name, ()):
            png = paths[f"bias-{figure}.png"].read_bytes()
            save_small(png, docs / f"bias-{name}-{figure}.png")
        write_json(docs / "records" / f"bias-{name}.json", record | {"statement": statement(record)})
    if docs is not None:
        paths_of = {name: docs / "records" / f"bias-{name}.json" for name in OPTIONS}
        fill(docs / "bias.md", parts({name: read_json(path) for name, path in paths_of.items() if path.exists()}))


if __name__ == "__main__":
    main()
