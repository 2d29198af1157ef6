"""Write the results: one JSON file, reliability diagrams, and one self-contained page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from debiased_laplace.evaluation import figures, records
from debiased_laplace.evaluation.figures import Picture
from debiased_laplace.evaluation.statement import statement
from debiased_laplace.evaluation.tables import tables

TEMPLATE = "report.html.jinja"


def write_outputs(
    folder: Path | str, summary: dict[str, Any], *, title: str, notice: str = "", pictures: Sequence[Picture] = ()
) -> dict[str, Path]:
    """Write ``results.json``, ``reliability.png`` and ``report.html``, each atomically.

    Args:
        folder: Made if it is missing.
        summary: From :func:`~debiased_laplace.evaluation.summary.summarise`.
        title: Of the page.
        notice: A warning shown above everything, such as that this was a quick run.
        pictures: Further figures, shown with the description of the data.

    Returns:
        The paths, by name.
    """
    folder = Path(folder)
    paths = {name: folder / name for name in ("results.json", "reliability.png", "report.html")}
    records.write_json(paths["results.json"], summary | {"statement": statement(summary)})
    records.write_atomically(paths["reliability.png"], figures.reliability_png(summary))
    records.write_atomically(paths["report.html"], render(summary, title=title, notice=notice, pictures=pictures))
    return paths


def render(summary: dict[str, Any], *, title: str, notice: str = "", pictures: Sequence[Picture] = ()) -> str:
    """The page as text; everything is in it, nothing is loaded."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    source = resources.files("debiased_laplace.evaluation").joinpath(TEMPLATE).read_text(encoding="utf-8")
    results = [figures.distance_picture(summary), figures.tuning_picture(summary)]
    return environment.from_string(source).render(
        title=title,
        notice=notice,
        summary=summary,
        statement=statement(summary),
        tables=tables(summary),
        pictures=list(pictures),
        results=[picture for picture in results if picture is not None],
        reliability=figures.reliability_pictures(summary),
        smallest_bin=figures.SMALLEST_BIN,
        settings=_flat(summary["settings"]),
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as rows of text; lists of dictionaries are left to the tables of methods."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif not (isinstance(value, list) and value and isinstance(value[0], dict)):
            rows.append((prefix + key, "all" if value is None else str(value)))
    return rows
