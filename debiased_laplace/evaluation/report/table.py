"""A table of text, as it is shown on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import rich.table
from rich.console import Group, RenderableType
from rich.text import Text

from debiased_laplace.evaluation import names


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What it shows.
        caption: How to read it.
        columns: Headings; the first column is the row's name.
        sections: Pairs of a section title (may be empty) and its rows; cells may have several lines.
    """

    title: str
    caption: str
    columns: list[str]
    sections: list[tuple[str, list[list[str]]]]

    def __rich__(self) -> RenderableType:
        """For ``rich.console.Console().print(table)``."""
        high = any("\n" in cell for _, rows in self.sections for row in rows for cell in row)
        shown = rich.table.Table(title=Text(self.title), title_justify="left", title_style="bold", show_lines=high)
        for index, column in enumerate(self.columns):
            shown.add_column(Text(column), justify="right" if index else "left")
        for section, rows in self.sections:
            if section:
                shown.add_section()
                shown.add_row(Text(section, style="italic bold"))
            for row in rows:
                shown.add_row(*(Text(cell) for cell in row))
        return Group(shown, Text(self.caption + "\n"))

    def markdown(self, level: int = 3) -> str:
        """As Markdown."""
        lines = [f"{'#' * level} {names.markdown(self.title)}", "", names.markdown(self.caption)]
        for section, rows in self.sections:
            if section:
                lines += ["", f"**{names.markdown(section)}**"]
            lines += ["", _row(self.columns), "|" + " --- |" * len(self.columns), *(_row(row) for row in rows)]
        return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(names.markdown, cells)) + " |"
