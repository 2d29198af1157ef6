"""Self-contained HTML pages from the package's templates, and their Markdown."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from debiased_laplace.evaluation import names
from debiased_laplace.evaluation.report.table import Table

__all__ = ["markdown", "render", "rows"]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("debiased_laplace.evaluation.report", "templates"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["data_uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    return environment


def render(template: str, **values: Any) -> str:
    """A page as text; everything is in it, nothing is loaded.

    Args:
        template: Its file name; it extends ``page.html.jinja``, which wants ``title``, ``notice``, ``statement`` and
            ``decides``, the table below the answer or None.
        **values: What the template uses.
    """
    return _environment().get_template(template).render(**values)


def markdown(
    title: str,
    said: Mapping[str, Any],
    notes: Sequence[str],
    tables: Sequence[Table],
    *,
    notice: str = "",
    level: int = 1,
) -> str:
    """The same as Markdown: the answer, the first table, what else to know, and the other tables."""
    first, others = [table.markdown(level + 1) for table in tables[:1]], tables[1:]
    lines = [f"{'#' * level} {names.markdown(title)}", "", *([f"> {names.markdown(notice)}", ""] if notice else [])]
    lines += [f"**{names.markdown(said['answer'])}**", "", *first, ""]
    lines += [*(f"- {names.markdown(sentence)}" for sentence in [*said["details"], *notes]), ""]
    return "\n".join([*lines, *(table.markdown(level + 1) for table in others)])


def rows(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as rows of text; lists of dictionaries are left to the tables of methods."""
    shown: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            shown += rows(value, f"{prefix}{key}.")
        elif key == "data_dir" and value is None:
            continue  # nowhere to look, not everywhere
        elif not (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            shown.append((prefix + key, "all" if value is None else str(value)))
    return shown
