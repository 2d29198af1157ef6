"""Every record and document made anew, by one command that may be stopped at any moment and goes on.

    python eval/regenerate.py --data-dir <folder> [--only variances splits] [--scratch eval/results/regenerate]
    python eval/regenerate.py --list
    python eval/regenerate.py --quick --data-dir <folder> [--scratch folder]

Every step is a few scripts in fresh processes, one after the other. A step that is finished is left out until the text
of its scripts or of what they import from this folder, their arguments, or the version of the package is another one.
One that was interrupted goes on with what its scripts keep in ``<scratch>/<step>-<fingerprint>``; one that fails does
not stop the others. Times are in products of matrices on the machine at the moment (``eval/speed.py``), with those of
all attempts; they are written to ``<docs>/records/regeneration.json``, and the table of ``docs/records.md`` between
``<!-- records -->`` and ``<!-- end -->`` is made from there.

``--quick`` runs every step in a small form on a copy of the documents in the scratch folder. A new experiment is a line
of :data:`STEPS`: its scripts write ``<docs>/records/<step>.json``, and keep in ``--out`` what they have measured.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from documents import fill, markdown
from speed import gigaflops

from debiased_laplace import __version__
from debiased_laplace.evaluation.names import locked
from debiased_laplace.evaluation.provenance import source_digest
from debiased_laplace.evaluation.records import digest, read_json, write_json

EVAL = Path(__file__).parent


@dataclass(frozen=True)
class Step:
    """Scripts that make records.

    Args:
        measure: Command lines that measure, without ``python eval/``.
        then: Further ones, that make documents from what was measured.
        quick: What a quick run appends to those that measure.
        records: Names of the records, without ``.json``; that of the step by default.
        documents: Pages that are filled.
    """

    measure: str | tuple[str, ...]
    documents: str
    then: str = ""
    quick: str = "--quick"
    records: tuple[str, ...] | None = None

    @property
    def commands(self) -> list[str]:
        """All of them."""
        return [*([self.measure] if isinstance(self.measure, str) else self.measure), *([self.then] * bool(self.then))]

    def lacks(self, options: argparse.Namespace) -> str:
        """What it needs and is not there, or nothing."""
        text = " ".join(self.commands)
        if "{data}" in text and options.data_dir is None:
            return "needs --data-dir"
        return "needs a card" if "--device cuda" in text and not torch.cuda.is_available() else ""


#: A line each. Those that take long are last.
STEPS: dict[str, Step] = {
    "variances": Step("variances.py --docs {docs}", "README.md"),
    "splits": Step("splits.py --docs {docs}", "evaluation.md"),
    "low_rank_evidence": Step("low_rank_evidence.py --docs {docs}", "evidence.md"),
    "empirical_fisher": Step("empirical_fisher.py --out {out} --docs {docs}", "empirical_fisher.md"),
    "serving": Step("serving.py --docs {docs}", "benchmarks.md"),
    "frozen": Step("frozen.py --docs {docs}", "benchmarks.md"),
    "monitor": Step("monitor.py {data} --out {out} --docs {docs}", "monitor.md"),
    "invariance": Step("invariance.py --docs {docs}", "theory.md"),
    "width": Step("width.py --docs {docs}", "theory.md"),
    "scaling": Step("scaling.py --out {out} --docs {docs}", "distributed.md"),
    "scale": Step("scale.py --out {out} --docs {docs}", "benchmarks.md"),
    "bench-cpu": Step("bench.py --out {out} --docs {docs}", "benchmarks.md"),
    "bench-cuda": Step("bench.py --device cuda --out {out} --docs {docs}", "benchmarks.md"),
    "demo": Step("readme.py --demo --out {out} --docs {docs} --readme {readme}", "demonstration.md, README.md"),
    "classes": Step("classes.py --scratch {out} --docs {docs}", "posterior.md"),
    "verdicts": Step("verdicts.py --docs {docs}", "evaluation.md"),
    "bias-digits": Step("bias.py --tasks digits --out {out} --docs {docs}", "bias.md"),
    "bias-cifar10": Step("bias.py --tasks cifar10 {data} --out {out} --docs {docs}", "bias.md"),
    "bias-fashion-mnist": Step("bias.py --tasks fashion-mnist {data} --out {out} --docs {docs}", "bias.md"),
    "bias-fashion-mnist-vit": Step("bias.py --tasks fashion-mnist-vit {data} --out {out} --docs {docs}", "bias.md"),
    "bias-cifar10-all-cnn-c": Step("bias.py --tasks cifar10-all-cnn-c {data} --out {out} --docs {docs}", "bias.md"),
    "steps": Step("steps.py --all {data} --out {out} --cache {cache} --docs {docs}", "steps.md"),
    "filtered": Step("filtered.py --docs {docs}", "steps.md"),
    "equal_time": Step("equal_time.py {data} --scratch {out} --docs {docs}", "fidelity.md"),
    "factors": Step("factors.py --docs {docs}", "fidelity.md"),
    "convolutions": Step("convolutions.py --docs {docs}", "benchmarks.md"),
    "max_factor": Step("max_factor.py {data} --scratch {out} --docs {docs}", "fidelity.md"),
    "links": Step("links.py {data} --out {out} --cache {cache} --docs {docs}", "results.md"),
    "evidence": Step(
        tuple(
            f"evidence.py --tasks {tasks} --seeds {seeds} {{data}} --out {{out}} --cache {{cache}} --docs {{docs}}"
            for tasks, seeds in (
                ("digits uci-concrete uci-energy uci-power-plant uci-wine-quality-red", "0 1 2 3 4"),
                ("fashion-mnist", "0 1 2"), ("cifar10", "0 1"),
            )
        ), "evidence.md",
    ),
    "fidelity": Step(
        ("fidelity.py --networks digits-cnn digits-mlp vit trec {data} --out {out}", "sharing.py {data} --out {out}"),
        "fidelity.md", then="report.py --results {out} --docs {docs}",
    ),
    "sets": Step(
        "sets.py {data} --out {out} --cache {cache} --docs {docs}", "sets.md", quick="--tasks digits --seeds 1"
    ),
    "sensitivity": Step(
        "sensitivity.py {data} --out {out} --cache {cache} --docs {docs}", "sensitivity.md",
        quick="--tasks digits --quick",
    ),
    "beyond": Step("beyond.py {data} --out {out} --docs {docs}", "beyond.md"),
    "active": Step(
        "active.py {data} --out {out} --docs {docs}", "beyond.md", quick="--tasks digits --seeds 1 --rounds 2"
    ),
    "continual": Step("continual.py --out {out} --docs {docs}", "beyond.md", quick="--seeds 1 --strengths 1"),
    "published": Step("published.py {data} --scratch {out} --docs {docs}", "published.md"),
    "paper": Step(
        "paper.py {data} --out {out} --docs {docs}", "paper.md",
        then="paper.py --document --out {out} --docs {docs}",
    ),
    "results": Step("results.py {data} --out {out} --cache {cache} --docs {docs}", "results.md"),
}  # fmt: skip


def records_of(name: str) -> list[str]:
    """Files in ``docs/records``."""
    of_step = STEPS[name].records
    return [f"{record}.json" for record in ((name,) if of_step is None else of_step)]


def fingerprint(name: str, quick: bool = False) -> str:
    """Of what decides about a step's numbers, but for the data and the machine."""
    commands = STEPS[name].commands
    texts = [source_digest(EVAL / shlex.split(command)[0]) for command in commands]
    return digest([commands, texts, quick, __version__])


# -- one step --------------------------------------------------------------------------------------


def arguments(name: str, options: argparse.Namespace) -> list[list[str]]:
    """Of every process of a step."""
    step, scratch = STEPS[name], options.scratch
    places = {
        "docs": options.docs, "readme": options.readme, "cache": scratch / "cache",
        "out": scratch / f"{name}-{fingerprint(name, options.quick)[:8]}",
    }  # fmt: skip
    quoted = {place: shlex.quote(str(path)) for place, path in places.items()}
    quoted["data"] = "" if options.data_dir is None else f"--data-dir {shlex.quote(str(options.data_dir))}"
    result = []
    for command in step.commands:
        script, *others = shlex.split(command.format(**quoted))
        quick = shlex.split(step.quick) if options.quick and command != step.then else []
        result.append([sys.executable, str(EVAL / script), *others, *quick])
    return result


def run(name: str, options: argparse.Namespace) -> bool:
    """A step, in fresh processes; whether it was finished."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    made_from, commands = fingerprint(name, options.quick), arguments(name, options)  # as they are now
    begun = options.scratch / f"{name}-{made_from[:8]}.json"
    log = begun.with_suffix(".log")
    kept = read_json(begun) if begun.exists() else {"attempts": 0, "counted": 0, "processor": 0.0, "wall": 0.0}
    write_json(begun, kept | {"attempts": kept["attempts"] + 1})  # one that is killed has no time: it is told apart
    product, of_processor = (
        2 * 1024**3 / 1e9 / gigaflops(clock=clock) for clock in (time.perf_counter, time.process_time)
    )
    start, before = time.perf_counter(), _processor_seconds()
    returned = 0
    try:
        with log.open("a") as output:
            fcntl.flock(output, fcntl.LOCK_EX)  # scripts hold it, too: those that outlived a killed run are waited for
            for command in commands:
                print(shlex.join(command), file=output, flush=True)
                child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
                try:
                    returned = child.wait()
                finally:
                    child.kill()
                    child.wait()
                if returned:
                    break
    finally:
        kept = {
            "attempts": kept["attempts"] + 1, "counted": kept["counted"] + 1,
            "processor": kept["processor"] + (_processor_seconds() - before) / of_processor,
            "wall": kept["wall"] + (time.perf_counter() - start) / product,
        }  # fmt: skip
        write_json(begun, kept)
    if returned:
        print(
            f"{name} failed ({returned}); see {log}:\n{''.join(log.read_text().splitlines(True)[-8:])}", file=sys.stderr
        )
        return False
    missing = [file for file in records_of(name) if not (options.docs / "records" / file).exists()]
    if missing:
        print(f"{name} wrote no {', '.join(missing)}; see {log}", file=sys.stderr)
        return False
    record = {
        "fingerprint": made_from, "version": __version__, "cpus": os.cpu_count(),
        "product": float(f"{of_processor:.3g}"), "attempts": kept["attempts"], "counted": kept["counted"],
        "processor": float(f"{kept['processor']:.3g}"), "wall": float(f"{kept['wall']:.3g}"),
    }  # fmt: skip
    write_json(options.docs / "records" / "regeneration.json", finished(options.docs) | {name: record})
    fill(options.docs / "records.md", parts(finished(options.docs)))
    return True


def _processor_seconds() -> float:
    """Of all processes that were started here and have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# -- what is there ---------------------------------------------------------------------------------


def finished(docs: Path) -> dict[str, Any]:
    """The record of the steps that this command has finished."""
    path = docs / "records" / "regeneration.json"
    return dict(read_json(path)) if path.exists() else {}


def state(name: str, options: argparse.Namespace) -> str:
    """In a word or a few."""
    record, whole = finished(options.docs).get(name), records_of(name)
    there = [file for file in whole if (options.docs / "records" / file).exists()]
    print_of = fingerprint(name, options.quick)
    if record and len(there) == len(whole) and record["fingerprint"] == print_of:
        return "up to date"
    if (options.scratch / f"{name}-{print_of[:8]}.json").exists():
        return "begun"
    if record:
        return "changed since" if len(there) == len(whole) else "lost"
    outstanding = {page.partition(":")[0] for page in read_json(options.docs / "claims.json")["outstanding"]}
    if outstanding & set(STEPS[name].documents.split(", ")):
        return "outstanding: of an earlier version"
    return "made by its scripts alone" if len(there) == len(whole) else "never made"


def parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated part of ``docs/records.md``."""
    rows = []
    for name, step in STEPS.items():
        scripts = list(dict.fromkeys(shlex.split(command)[0] for command in step.commands))
        about = (ast.get_docstring(ast.parse((EVAL / scripts[0]).read_text())) or "").splitlines()[0].rstrip(".")
        needs = [
            what for what, sign in (("data", "{data}"), ("card", "--device cuda")) if sign in " ".join(step.commands)
        ]
        links = ", ".join(
            f"[{file}](records/{file})"
            if (EVAL.parent / "docs" / "records" / file).exists()
            else f"{file}, not yet made"
            for file in records_of(name)
        )
        measured = record.get(name)
        least = "at least " if measured and measured["counted"] < measured["attempts"] else ""
        rows.append([
            links, about.replace("``", "`"), ", ".join(f"`{script}`" for script in scripts), step.documents,
            ", ".join(needs),
            f"{least}{measured['processor'] / 1e3:,.1f}" if measured else "",
        ])  # fmt: skip
    columns = ["record", "what", "in `eval/`", "fills", "needs", "processor time, 1,000 products"]
    return {"records": markdown(columns, rows)}


def prepared(options: argparse.Namespace) -> None:
    """For a quick run the documents and records are copied; the real ones stay as they are."""
    options.docs, options.readme = options.scratch / "docs", options.scratch / "README.md"
    if not options.readme.exists():
        ignored = shutil.ignore_patterns("*.png", "reference", "_s*")
        shutil.copytree(EVAL.parent / "docs", options.docs, ignore=ignored, dirs_exist_ok=True)
        (options.docs / "records" / "regeneration.json").unlink(missing_ok=True)
        shutil.copy(EVAL.parent / "README.md", options.readme)


def chosen(options: argparse.Namespace) -> Iterable[str]:
    """Steps that are to be run."""
    for name in options.only:
        lacking = STEPS[name].lacks(options)
        if lacking:
            print(f"{name}: {lacking}", file=sys.stderr)
        elif state(name, options) == "up to date":
            print(f"{name}: up to date", file=sys.stderr)
        else:
            yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS), metavar="STEP")
    parser.add_argument("--list", action="store_true", help="say what is there, and run nothing")
    parser.add_argument("--data-dir", type=Path, help="folder with FashionMNIST/raw, MNIST/raw, cifar10, uci and trec")
    parser.add_argument("--scratch", type=Path, default=Path("eval/results/regenerate"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--quick", action="store_true", help="little of everything, with copies of the documents")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    if options.quick:
        prepared(options)
    if options.list:
        for name in options.only:
            print(f"{name:24} {'; '.join(filter(None, (state(name, options), STEPS[name].lacks(options))))}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))  # and not the scripts left behind
    with locked(options.scratch):
        failed = [name for name in chosen(options) if not run(name, options)]
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
