"""Pages that are read by doing what they say: their code runs as it stands, and prints what they state."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.documented import DOCS, ROOT

_spec = importlib.util.spec_from_file_location("pages", ROOT / "eval" / "pages.py")
assert _spec is not None and _spec.loader is not None
pages = sys.modules["pages"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pages)

PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (DOCS / "tutorials").glob("*.md") if page.name != "index.md"),
    *sorted((DOCS / "how-to").glob("*.md")),
]
FIGURE = re.compile(r"!\[([^\]]*)\]\(images/([\w-]+\.png)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_prints_what_it_states(page, tmp_path):
    stated, made = pages.blocks(page.read_text()), pages.run(page, tmp_path)
    assert stated, "no code"
    for one, two in zip(stated, made, strict=True):
        assert pages.differing(one.output, two.output) is None, one.code
    for alternative, name in FIGURE.findall(page.read_text()):
        assert len(alternative.split()) > 3, f"{name} has no alternative text"
        assert (tmp_path / name).stat().st_size > 0
        assert (page.parent / "images" / name).exists()


def commands() -> list[str]:
    """What the pages say to type with a task file, in their order, in a quick form; each once."""
    every = [ROOT / "README.md", DOCS / "cli.md", *sorted(DOCS.glob("*.md"))]
    found = re.findall(
        r"^    ((?:torchrun .*-m debiased_laplace|debiased-laplace) .*)$", "\n".join(p.read_text() for p in every), re.M
    )
    result = []
    for line in found:
        line = line.partition("#")[0].strip().replace("--seeds 4", "--seeds 2")
        quick = "" if re.search("--quick|init-task|tasks", line) else " --quick"
        line = line.replace("debiased-laplace", f"{sys.executable} -m debiased_laplace")
        line = line.replace("torchrun", f"{sys.executable} -m torch.distributed.run --standalone")
        result.append(line + quick)
    return list(dict.fromkeys(result))


def test_the_commands_of_the_pages_run(tmp_path):
    """With the task file that the first of them writes."""
    of_task = [line for line in commands() if "task.py" in line]
    assert "init-task" in of_task[0]
    assert {"doctor", "fit", "predict", "evaluate", "bias"} <= {word for line in of_task for word in line.split()}
    for line in of_task:
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        again = "init-task" in line and "exists" in done.stderr  # a second page begins with it, too
        assert done.returncode == 0 or again, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_what_differs_is_found():
    assert pages.differing("NLL 0.100\n", "NLL 0.108\n") is None
    assert pages.differing("NLL 0.100", "NLL 0.120") == "0.120 for 0.100 in 'NLL 0.100'"
    assert pages.differing("3 of 4", "4 of 4") == "4 for 3 in '3 of 4'"
    assert pages.differing("yes", "no") == "'no' for 'yes'"
    assert pages.differing(None, "no") == "1 lines for 0: 'no'"


def test_a_page_that_fails_says_where(tmp_path):
    (tmp_path / "page.md").write_text("```python\n1 / 0\n```\n")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        pages.run(tmp_path / "page.md", tmp_path)
    (tmp_path / "page.md").write_text("```bash\nfalse\n```\n")
    with pytest.raises(RuntimeError, match="false"):
        pages.run(tmp_path / "page.md", tmp_path)


def test_files_and_outputs_are_told_apart():
    text = '```python title="a.py"\nx\n```\n\n```bash\npython a.py\n```\n\n```text\nx\n```\n\n```text\nno output\n```\n'
    assert [(b.language, b.file, b.output) for b in pages.blocks(text)] == [
        ("python", "a.py", None),
        ("bash", None, "x\n"),
    ]
