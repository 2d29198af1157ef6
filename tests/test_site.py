"""The documentation site: built with warnings as errors, and what its pages have to have."""

from __future__ import annotations

import html.parser
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documented import DOCS, ROOT


def loaded(name: str):
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "_site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Page(html.parser.HTMLParser):
    """Images without words, and the text outside of code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.silent: list[str] = []
        self.text: list[str] = []
        self.n_equations = 0
        self._code = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self._code += tag in ("code", "pre", "script", "style")
        self.n_equations += tag == "math"
        if tag == "img" and len((dict(attrs).get("alt") or "").split()) < 3:
            self.silent.append(dict(attrs).get("src", ""))

    def handle_endtag(self, tag):
        self._code -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data):
        if not self._code:
            self.text.append(data)


def test_pages_are_whole(site):
    pages = {path.relative_to(site): Page(path) for path in site.rglob("index.html")}
    assert {Path("index.html"), Path("changelog/index.html"), Path("reference/laplace/index.html")} <= set(pages)
    assert {str(path): page.silent for path, page in pages.items() if page.silent} == {}
    assert pages[Path("theory/index.html")].n_equations > 40
    for path, page in pages.items():
        text = "".join(page.text)
        for left in (r"\(", r"\[", "$$", ":func:", ":class:", ":meth:", ".. math", "``", ">>>"):
            assert left not in text, f"{path} shows {left}"
    assert (site / "tutorials" / "images.ipynb").exists()


def test_a_public_name_without_a_page_is_found(tmp_path):
    hooks = loaded("hooks")
    assert hooks.undocumented(DOCS / "reference") == []
    for page in (DOCS / "reference").glob("*.md"):
        (tmp_path / page.name).write_text(page.read_text().replace("::: debiased_laplace.fit\n", ""))
    assert hooks.undocumented(tmp_path) == ["debiased_laplace.fit"]


def test_docstrings_become_markdown():
    markdown = loaded("docstrings").markdown
    text = "Of :math:`x`, :func:`~a.b.c` and :class:`D`.\n\n.. math::\n    x = 1 \\\\\n    y\n\nExample:\n    >>> 1\n"
    assert markdown(text) == (
        'Of $x$, <autoref identifier="a.b.c" optional><code>c</code></autoref> and '
        '<autoref identifier="D" optional><code>D</code></autoref>.\n\n$$\nx = 1 \\\\ y\n$$\n\nExamples:\n    >>> 1\n'
    )
