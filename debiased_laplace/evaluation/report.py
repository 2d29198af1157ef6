"""Write the results: JSON, Markdown, reliability diagrams, and one self-contained page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from debiased_laplace.evaluation import figures, records
from debiased_laplace.evaluation.statement import statement
from debiased_laplace.evaluation.summary import by_role
from debiased_laplace.evaluation.tables import tables

TEMPLATE = "report.html.jinja"
Summary = Mapping[str, Any]


def write_outputs(folder: Path | str, summary: Summary, *, title: str = "", notice: str = "") -> dict[str, Path]:
    """Write ``results.json``, ``results.md``, ``reliability.png`` and ``report.html``, each atomically.

    Args:
        folder: Made if it is missing.
        summary: From :func:`~debiased_laplace.evaluation.summary.summarise`.
        title: Of the page.
        notice: A warning shown above everything, such as that this was a quick run.

    Returns:
        The paths, by name.
    """
    folder = Path(folder)
    title = title or f"Does uncertainty help? {summary['task']['name']}"
    paths = {name: folder / name for name in ("results.json", "results.md", "reliability.png", "report.html")}
    records.write_json(paths["results.json"], dict(summary) | {"statement": statement(summary)})
    records.write_atomically(paths["results.md"], markdown(summary, title=title, notice=notice))
    records.write_atomically(paths["reliability.png"], figures.reliability_png(summary))
    records.write_atomically(paths["report.html"], render(summary, title=title, notice=notice))
    return paths


def markdown(summary: Summary, *, title: str, notice: str = "", level: int = 1) -> str:
    """The answer and the tables as Markdown."""
    said = statement(summary)
    lines = [f"{'#' * level} {title}", ""]
    if notice:
        lines += [f"> {notice}", ""]
    lines += [f"**{said['answer']}**", "", *(f"- {sentence}" for sentence in said["details"]), ""]
    lines += [summary["task"]["description"], ""]
    lines += [table.markdown(level + 1) for table in tables(summary)]
    return "\n".join(lines)


def render(summary: Summary, *, title: str, notice: str = "") -> str:
    """The page as text; everything is in it, nothing is loaded."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    source = resources.files("debiased_laplace.evaluation").joinpath(TEMPLATE).read_text(encoding="utf-8")
    all_tables = tables(summary)
    candidate = by_role(summary, "candidate")
    return environment.from_string(source).render(
        title=title,
        notice=notice,
        summary=summary,
        statement=statement(summary),
        first_table=all_tables[0],
        tables=all_tables[1:],
        results=figures.pictures(summary),
        reliability=figures.reliability_pictures(summary),
        bins=figures.bins_note(),
        shown=figures.shown(summary),
        classes=summary["task"]["classes"],
        coverage=None if candidate is None else summary["predictors"][candidate].get("coverage"),
        settings=_flat(summary["settings"]),
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as rows of text; lists of dictionaries are left to the tables of methods."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif not (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            rows.append((prefix + key, "all" if value is None else str(value)))
    return rows
