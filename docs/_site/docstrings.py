"""Docstrings, which have roles and equations as Sphinx writes them, as Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

BLOCK = re.compile(r"^( *)\.\. math::[ \n]*((?:.+\n?)(?:\1 +.*\n?)*)", re.MULTILINE)
ROLE = re.compile(r":(\w+):`([^`]+)`")


def markdown(text: str) -> str:
    """The same docstring with equations between dollars, links for roles, and examples in a section."""

    def equation(match: re.Match[str]) -> str:
        formula = " ".join(textwrap.dedent(match[2]).split())
        return f"{match[1]}$$\n{match[1]}{formula}\n{match[1]}$$\n"

    def role(match: re.Match[str]) -> str:
        kind, path = match.groups()
        if kind == "math":
            return f"${path}$"
        name = path.lstrip("~.")
        shown = name.rpartition(".")[2] if path.startswith("~") else name
        return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'

    text = ROLE.sub(role, BLOCK.sub(equation, text))
    return re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Every docstring, before it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for modules, classes, functions and attributes."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
