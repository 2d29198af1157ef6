"""Figures 1 to 5 of the paper that this package stands on, on All-CNN-C and vision Transformers, and its K-FAC.

    python eval/paper.py --device cuda --data-dir <folder> [--networks all-cnn-c vit vit-cifar10] [--seconds 500]
    python eval/paper.py --document

Tatzel, Mucsányi, Hackel, Hennig, "Debiasing Mini-Batch Quadratics for Applications in Deep Learning" (ICLR 2025, arXiv
2410.14325). The first command trains the networks and measures, part by part, into ``<out>/paper.json``, with weights
beside it; parts that are complete are kept, and none begins after ``--seconds``. The second makes ``docs/paper.md``,
its figures and its record from that file. ``--quick`` measures little on few data; the network ``digits`` needs none.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import paper_kfac
import paper_measure
import torch
from paper_kfac import Comparison
from paper_measure import Directions, Extent, figure5
from paper_networks import SUBJECTS, Trained, subject

from debiased_laplace.evaluation.records import environment, jsonable, read_json, write_json
from debiased_laplace.evaluation.tasks import resolve_device

#: In the order in which they are measured: figures of all networks, then their K-FACs.
PARTS = ("directions", "figure5", "kfac")


def rounded(value: Any, digits: int = 6) -> Any:
    """A record with so many significant digits."""
    if isinstance(value, dict):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry, digits) for entry in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def measure(options: argparse.Namespace) -> None:
    """All parts that are not there yet, as far as there is time."""
    start, device, path = time.perf_counter(), resolve_device(options.device), options.out / "paper.json"
    extent = paper_measure.QUICK if options.quick else Extent()
    known = read_json(path) if path.exists() else {}
    networks: dict[str, Trained] = {}
    failed: list[str] = []
    for part in PARTS:
        for name in options.networks:
            plan = paper_kfac.QUICK if options.quick else paper_kfac.PLANS.get(name, paper_kfac.Plan())
            settings = jsonable({"quick": options.quick, **asdict(plan if part == "kfac" else extent)})
            entry = known.setdefault(name, {})
            if entry.get(part, {}).get("settings") == settings:
                continue
            if time.perf_counter() - start > options.seconds:
                print(f"No time for {name}: {part}.", flush=True)
                continue
            began = time.perf_counter()
            if name not in networks:
                networks[name] = subject(
                    name, options.data_dir, options.out, device, quick=options.quick, seconds=options.train_seconds
                )
                print(f"{name}: {networks[name].facts}", flush=True)
            trained = networks[name]
            makers: dict[str, Callable[[], Any]] = {
                "directions": lambda trained=trained: Directions(trained, extent).record(),  # type: ignore[misc]
                "figure5": lambda trained=trained: figure5(trained, extent),  # type: ignore[misc]
                "kfac": lambda trained=trained, plan=plan: Comparison(trained, plan).record(),  # type: ignore[misc]
            }
            try:
                made = makers[part]()
            except RuntimeError:  # too little memory, say: the other parts can go on
                failed.append(f"{name}: {part}")
                print(f"{failed[-1]} failed.\n{traceback.format_exc()}", flush=True)
                continue
            entry |= {
                "title": trained.title, "facts": rounded(trained.facts), "environment": environment(device),
                part: rounded(made) | {"settings": settings},
            }  # fmt: skip
            write_json(path, known)
            memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else math.nan
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            print(
                f"{name}, {part}: {time.perf_counter() - began:.0f} s, at most {memory:.1f} GiB; "
                f"{time.perf_counter() - start:.0f} s in all",
                flush=True,
            )
    if failed:
        sys.exit(f"Expected all parts, got none of {', '.join(failed)}.")


def document(options: argparse.Namespace) -> None:
    """The page, its figures and its record."""
    from documents import fill  # not needed where it is measured
    from paper_document import compact, parts
    from paper_pictures import draw

    found = read_json(options.out / "paper.json")
    whole = {name: found[name] for name in SUBJECTS if name in found}
    record = compact(whole)
    write_json(options.docs / "records" / "paper.json", record)
    draw(whole, options.docs)
    fill(options.docs / "paper.md", parts(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(SUBJECTS), default=["all-cnn-c", "vit", "vit-cifar10"])
    parser.add_argument("--data-dir", type=Path, default=None, help="folder with cifar10 and FashionMNIST/raw")
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=Path("eval/results/paper"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no part begins")
    parser.add_argument("--train-seconds", type=float, default=math.inf, help="of each training: fewer epochs, if more")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    parser.add_argument("--document", action="store_true", help="the page from what was measured")
    options = parser.parse_args()
    (document if options.document else measure)(options)


if __name__ == "__main__":
    main()
