"""Pages whose code is executed, and the output that they state.

    python eval/pages.py docs/tutorials/images.md [...]

runs the code blocks of a page one after the other, as a reader does, in an empty folder, and fills in what they print
and the figures that they save. ``tests/test_pages.py`` runs the same, and compares.

Blocks that count: ``python``, run in one process; ``python title="fit.py"``, written to a file; ``bash``, run by a
shell; ``text`` straight after one of them, its output. Others are not run. Figures saved as ``NAME.png`` lie in
``images/`` beside the page.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|bash)([^\n]*)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
TITLE = re.compile(r'title="([\w.]+)"')
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
#: By how much a number may differ from the one of a page: training is not the same on every machine.
SHARE, UNITS = 0.1, 2

DRIVER = """
import contextlib, io, json, subprocess, sys
import matplotlib
matplotlib.use("Agg")
names, printed = {"__name__": "__main__"}, []
for language, code in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if language == "python":
            exec(compile(code, "a block of the page", "exec"), names)
        else:
            done = subprocess.run(code, shell=True, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{code}{done.stdout}{done.stderr}")
            print(done.stdout, end="")
    printed.append(out.getvalue())
print("\\0" + json.dumps(printed))
"""


@dataclass(frozen=True)
class Block:
    """A piece of code of a page, and what it is said to print, or None."""

    language: str
    file: str | None
    code: str
    output: str | None


def blocks(text: str) -> list[Block]:
    """The blocks of a page that are run, in its order."""
    result = []
    for language, info, code, output in BLOCK.findall(text):
        title = TITLE.search(info)
        result.append(Block(language, title[1] if title else None, code, output or None))
    return result


def run(page: Path, folder: Path) -> list[Block]:
    """The blocks with what they do print, run in a folder.

    Raises:
        RuntimeError: If a block fails, with its error.
    """
    found = blocks(page.read_text())
    for block in found:
        if block.file:
            (folder / block.file).write_text(block.code)
    live = [block for block in found if not block.file]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER], input=json.dumps([(b.language, b.code) for b in live]),
        capture_output=True, text=True, cwd=folder, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{page}: {done.stderr[-4000:]}")
    printed = iter(json.loads(done.stdout.rpartition("\0")[2]))
    return [block if block.file else replace(block, output=next(printed) or None) for block in found]


def differing(stated: str | None, printed: str | None) -> str | None:
    """The first line in which an output is not the stated one, but for the last digits of numbers."""
    one, two = ((text or "").rstrip().splitlines() for text in (stated, printed))
    if len(one) != len(two):
        return f"{len(two)} lines for {len(one)}: {printed!r}"
    for first, second in zip(one, two, strict=True):
        if re.sub(r"\s+", " ", NUMBER.sub("#", first)) != re.sub(r"\s+", " ", NUMBER.sub("#", second)):
            return f"{second!r} for {first!r}"
        for a, b in zip(NUMBER.findall(first), NUMBER.findall(second), strict=True):
            unit = 10.0 ** -len(a.partition("e")[0].partition(".")[2])
            x, y = (float(number.replace(",", "")) for number in (a, b))
            if abs(x - y) > max(SHARE * abs(x), (UNITS + 0.01) * unit if "." in a else 0):
                return f"{b} for {a} in {first!r}"
    return None


def fill(page: Path) -> None:
    """Write what the blocks print, and the figures they save, into the page."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = iter(run(page, folder))

        def with_output(match: re.Match[str]) -> str:
            block = next(made)
            fence = f"```{match[1]}{match[2]}\n{match[3]}```\n"
            return fence + (f"\n```text\n{block.output.rstrip()}\n```\n" if block.output else "")

        page.write_text(BLOCK.sub(with_output, page.read_text()))
        for figure in folder.glob("*.png"):
            target = page.parent / "images" / figure.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(figure.read_bytes())


if __name__ == "__main__":
    for name in sys.argv[1:]:
        fill(Path(name))
