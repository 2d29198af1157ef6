"""Documents that scripts fill: what lies between ``<!-- NAME -->`` and ``<!-- end -->`` is theirs, the rest by hand."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from debiased_laplace.evaluation.records import write_json, write_whole

__all__ = ["fill", "markdown", "save_run", "save_small", "show"]


def fill(document: Path, parts: Mapping[str, str]) -> None:
    """Replace the named parts of a document and its appendix; every one needs exactly one place in them."""
    pages = {page: page.read_text() for page in with_appendix(document)}
    for name, content in parts.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        count = sum(len(pattern.findall(text)) for text in pages.values())
        if count != 1:
            sys.exit(f"Expected one place <!-- {name} --> in {' and '.join(map(str, pages))}, found {count}.")
        for page, text in pages.items():
            pages[page] = pattern.sub(lambda match, new=content: f"{match[1]}{new}\n{match[2]}", text)  # type: ignore[misc]
    for page, text in pages.items():
        page.write_text(text)


def with_appendix(document: Path) -> list[Path]:
    """A document, and ``NAME_appendix.md`` beside it if there is one."""
    appendix = document.with_name(f"{document.stem}_appendix.md")
    return [document, appendix] if appendix.exists() else [document]


def show(parts: Mapping[str, str], document: Path | None) -> None:
    """Put parts into their places in a document, or print them."""
    if document is None:
        print("\n\n".join(parts.values()))
    else:
        fill(document, parts)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def save_small(png: bytes, path: Path) -> None:
    """Write an image with 255 colours."""
    small = Image.open(io.BytesIO(png)).convert("RGB").quantize(255, dither=Image.Dither.NONE)
    path.parent.mkdir(parents=True, exist_ok=True)
    small.save(path, optimize=True)


def save_run(folder: Path, name: str, record: Mapping[str, Any], figure: Figure) -> None:
    """Write the record of an experiment, with null for numbers that are not finite, and its figure."""
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)  # a training may diverge
    write_json(folder / f"{name}.json", finite)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_whole(folder / f"{name}.png", image.getvalue())
