"""Numbers in documents: parts that are made from records, and claims in prose with the record each comes from."""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
import statistics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from debiased_laplace.evaluation.records import read_json

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RECORDS = DOCS / "records"
NUMBER = re.compile("[+\N{MINUS SIGN}-]?\\d[\\d,]*(?:\\.\\d+)?(?:e[+-]?\\d+)?")
#: In prose: no part of a name (ResNet-20, 3C3D), of a version, of a citation or the number of an equation.
IN_PROSE = re.compile(
    r"(?<![\w.,-])(?<!ICLR )(?<!laplace-torch )(?<!equation )(?<!equation \()"
    r"[+\N{MINUS SIGN}]?\d+(?:,\d{3})*(?:\.\d+)?(?!\w|[.,]\d)"
)


def constant(module: str, name: str) -> Any:
    """A setting that a text states, as the code has it: of a module of the package, or a literal of a script."""
    if not module.endswith(".py"):
        return getattr(importlib.import_module(module), name)
    for node in ast.parse((ROOT / module).read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ast.literal_eval(node.value)
    raise LookupError(f"{module} has no {name}.")


#: What a formula may use beside the record.
NAMES = {
    "abs": abs, "all": all, "error": lambda x: statistics.stdev(x) / len(x) ** 0.5, "exp": math.exp,
    "float": float, "len": len, "log": math.log, "max": max, "min": min,
    "mean": statistics.fmean, "median": statistics.median, "next": next, "round": round, "set": set, "sorted": sorted,
    "sum": sum, "zip": zip,
    "where": lambda rows, **fields: [row for row in rows if all(row[key] == one for key, one in fields.items())],
    "constant": constant,
}  # fmt: skip


def generated(document: Path) -> dict[str, str]:
    """What stands between the marks of a document and its appendix."""
    pages = [document, document.with_name(f"{document.stem}_appendix.md")]
    text = "\n".join(page.read_text() for page in pages if page.exists())
    result = re.findall(r"<!-- (?!end -->)([\w -]+?) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    return {name: content.strip() for name, content in result}


def code_of(page: Path) -> list[str]:
    """The Python blocks of a page, in its order."""
    return re.findall(r"^```python[^\n]*\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def executed(page: Path, **names: Any) -> dict[str, Any]:
    """The names after all blocks of a page have run as they stand, one after the other, quietly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in code_of(page):
            exec(compile(block, page.name, "exec"), names)
    return names


def remade() -> dict[str, dict[str, str]]:
    """The same parts, made anew from the records."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "eval")
        before = set(sys.modules)
        import active
        import bench
        import beyond
        import bias
        import classes
        import continual
        import convolutions
        import empirical_fisher
        import equal_time
        import evidence
        import factors
        import filtered
        import frozen
        import invariance
        import links
        import low_rank_evidence
        import max_factor
        import monitor
        import paper_document
        import published_document
        import readme
        import regenerate
        import report
        import results
        import scale
        import scaling
        import sensitivity
        import serving
        import sets
        import splits
        import steps_document
        import verdicts
        import width

        names = {name: f"bias-{name}.json" for name in bias.OPTIONS}
        benchmarks = json.loads((RECORDS / "bench-cpu.json").read_text())["records"]
        result = {
            **readme.parts(DOCS),
            "bias.md": bias.parts({name: read_json(RECORDS / file) for name, file in names.items()}),
            "evidence.md": {
                **evidence.parts(read_json(RECORDS / "evidence.json")),
                "low ranks": low_rank_evidence.table(read_json(RECORDS / "low_rank_evidence.json")),
            },
            "empirical_fisher.md": empirical_fisher.parts(read_json(RECORDS / "empirical_fisher.json")),
            "evaluation.md": {
                "verdicts": verdicts.tables(read_json(RECORDS / "verdicts.json")),
                "splits": splits.table(read_json(RECORDS / "splits.json")),
            },
            "monitor.md": monitor.parts(read_json(RECORDS / "monitor.json")),
            "records.md": regenerate.parts(regenerate.finished(DOCS)),
            "published.md": published_document.parts(read_json(RECORDS / "published.json")),
            "sensitivity.md": sensitivity.parts(read_json(RECORDS / "sensitivity.json")),
            "theory.md": {
                "invariance": invariance.table(read_json(RECORDS / "invariance.json")),
                "width": width.table(read_json(RECORDS / "width.json")),
            },
            "sets.md": sets.parts(read_json(RECORDS / "sets.json")),
            "posterior.md": {"classes": classes.table(read_json(RECORDS / "classes.json"))},
            "paper.md": paper_document.parts(read_json(RECORDS / "paper.json")),
            "beyond.md": {
                name: part
                for module in (beyond, active, continual)
                if (record := RECORDS / f"{module.__name__}.json").exists()
                for name, part in module.parts(read_json(record)).items()
            },
            "steps.md": {
                **steps_document.parts_of(read_json(RECORDS / "steps.json")),
                **filtered.parts_of(read_json(RECORDS / "filtered.json")),
            },
            "benchmarks.md": {
                "cpu": bench.report(benchmarks),
                "card": bench.report(json.loads((RECORDS / "bench-cuda.json").read_text())["records"]),
                "growth": scale.growth_table(read_json(RECORDS / "scale.json")),
                "large": scale.large_table(read_json(RECORDS / "scale.json")),
                "frozen": frozen.table(read_json(RECORDS / "frozen.json")),
                **convolutions.parts(read_json(RECORDS / "convolutions.json")),
                "serving": serving.table(read_json(RECORDS / "serving.json")["records"]),
            },
            "distributed.md": {
                "paper": scaling.paper_table(read_json(RECORDS / "scaling.json")),
                "measured": scaling.measured_table(read_json(RECORDS / "scaling.json")),
            },
        }
        outstanding = claims()["outstanding"]
        if "results.md" not in outstanding:
            result["results.md"] = results.parts(read_json(RECORDS / "results.json"))
            if (RECORDS / "links.json").exists():
                result["results.md"] |= links.parts(read_json(RECORDS / "links.json"))
        if "fidelity.md" not in outstanding:
            result["fidelity.md"] = (
                report.parts(read_json(RECORDS / "fidelity.json"))
                | equal_time.parts(read_json(RECORDS / "equal_time.json"))
                | max_factor.parts(read_json(RECORDS / "max_factor.json"))
                | factors.parts(read_json(RECORDS / "factors.json"))
            )
        for name in set(sys.modules) - before:  # of the folder with experiments, whose names are anybody's
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == ROOT / "eval":
                del sys.modules[name]
    return result


def differing(text: str, expected: str) -> str | None:
    """The first line in which two texts differ by more than the last digit of a number, if there is one."""
    one, two = text.strip().splitlines(), expected.strip().splitlines()
    for first, second in zip(one, two, strict=False):
        if NUMBER.sub("#", first) != NUMBER.sub("#", second):
            return f"{first!r} for {second!r}"
        for a, b in zip(NUMBER.findall(first), NUMBER.findall(second), strict=True):
            if not agree(a, value(b)):
                return f"{a} for {b} in {first!r}"
    return None if len(one) == len(two) else f"{len(one)} lines for {len(two)}"


def value(text: str) -> float:
    return float(text.replace(",", "").replace("\N{MINUS SIGN}", "-"))


def agree(printed: str, exact: float) -> bool:
    """Whether a number is what is printed, to the last printed digit."""
    digits, _, exponent = printed.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(value(printed) - exact) <= 1.0001 * unit


def claims() -> dict[str, Any]:
    """The table of claims: see docs/evaluation.md."""
    return json.loads((DOCS / "claims.json").read_text())


def prose(document: Path) -> str:
    """The text of a document that somebody wrote: no code, links, tables or formulas, and nothing generated."""
    text = re.sub(r"<!-- (?!end -->)[\w -]+? -->\n.*?<!-- end -->", "", document.read_text(), flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("    ", "|")))
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]*\$", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return " ".join(re.sub(r"https?://\S+", "", text).split())


def unclaimed(text: str, known: list[str]) -> list[str]:
    """Numbers of a text that no claim has, each with what stands around it."""
    covered = [match.span() for claim in known for match in re.finditer(re.escape(" ".join(claim.split())), text)]
    return [
        text[max(0, match.start() - 30) : match.end() + 20]
        for match in IN_PROSE.finditer(text)
        if not any(start <= match.start() < end for start, end in covered)
    ]


def wrong(claim: dict[str, Any]) -> Iterator[str]:
    """Numbers of a claim that are not those of its record."""
    printed = IN_PROSE.findall(claim["text"])
    if len(printed) != len(claim["values"]):
        yield f"{claim['text']!r} has the numbers {printed}, and {len(claim['values'])} values."
        return
    record = read_json(RECORDS / claim["record"]) if "record" in claim else None
    for number, formula in zip(printed, claim["values"], strict=True):
        exact = float(eval(formula, {"__builtins__": {}, "record": record, **NAMES}))
        if not agree(number, exact):
            yield f"{claim['text']!r}: {number} is {exact:.6g} in {claim.get('record', 'the code')} ({formula})."
