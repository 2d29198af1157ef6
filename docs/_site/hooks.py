"""What the site does to pages: the README as the first one, equations without a script, tutorials to download.

It stops on a public name that no page of the reference shows.
"""

from __future__ import annotations

import html
import importlib
import re
from pathlib import Path
from typing import Any

import jupytext
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
#: Modules whose ``__all__`` is the public interface.
PUBLIC = (
    "debiased_laplace", "debiased_laplace.conformal", "debiased_laplace.likelihoods",
    "debiased_laplace.curvature.structures", "debiased_laplace.laplace_torch",
    "debiased_laplace.quadratic.instruments", "debiased_laplace.quadratic.optim", "debiased_laplace.quadratic.monitor",
    "debiased_laplace.evaluation", "debiased_laplace.testing", "debiased_laplace.integrations.sklearn",
    "debiased_laplace.integrations.lightning", "debiased_laplace.integrations.transformers",
    "debiased_laplace.integrations.export", "debiased_laplace.integrations.botorch",
)  # fmt: skip
#: Pages that are files outside of docs, which code hosts show.
ABOVE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
PAGE_OF = {name.removesuffix(".md"): page for page, name in ABOVE.items()}
OUTPUT = re.compile(r"^```text\n.*?^```\n", re.DOTALL | re.MULTILINE)
EQUATION = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def undocumented(folder: Path) -> list[str]:
    """Public names that no page of the reference shows.

    Args:
        folder: With the pages of the reference.
    """
    shown = re.findall(r"^::: ([\w.]+)$", "\n".join(page.read_text() for page in folder.glob("*.md")), re.MULTILINE)
    objects = [value_of(path) for path in shown]
    public = [f"{module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__]
    return [path for path in public if not any(value_of(path) is value for value in objects)]


def value_of(path: str) -> Any:
    """What stands under a dotted path: a module's attribute."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def on_pre_build(config: Any) -> None:
    """Refuse to build a reference that is not whole."""
    missing = undocumented(Path(config["docs_dir"]) / "reference")
    if missing:
        raise PluginError(f"Public names on no page of docs/reference: {', '.join(missing)}")


def on_files(files: Any, config: Any) -> Any:
    """Pages outside of docs, and tutorials as notebooks, without their outputs."""
    for page in ABOVE:
        files.append(File.generated(config, page, content="..."))  # until its Markdown is asked for
    for file in list(files.documentation_pages()):
        if Path(file.src_uri).parent.name == "tutorials" and file.name != "index":
            source = Path(file.abs_src_path).read_text()
            notebook = jupytext.writes(jupytext.reads(OUTPUT.sub("", source), fmt="md"), fmt="ipynb")
            files.append(File.generated(config, file.src_uri.removesuffix(".md") + ".ipynb", content=notebook))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Files outside of docs are pages, too; a tutorial says that it is a notebook, too."""
    if page.file.src_uri in ABOVE:
        markdown = re.sub(r"\]\((?:docs/)?", "](", (ROOT / ABOVE[page.file.src_uri]).read_text())
        return re.sub(r"\]\((README|CONTRIBUTING|CHANGELOG)\.md", lambda match: f"]({PAGE_OF[match[1]]}", markdown)
    if page.file.src_uri.startswith("tutorials/") and not page.is_index:
        title, _, rest = markdown.partition("\n")
        name = Path(page.file.src_uri).with_suffix(".ipynb").name
        return f"{title}\n\n[As a notebook]({name}){{ .md-button }}\n{rest}"
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Equations as MathML, which browsers show by themselves."""

    def equation(match: re.Match[str]) -> str:
        formula = html.unescape(match[2]).strip()
        display = "block" if match[1] == "div" else "inline"
        return convert(formula[2:-2], display=display)

    return EQUATION.sub(equation, content)
