"""Names of methods and data from strangers: refused before anything takes long, or shown as they are."""

from __future__ import annotations

import html
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from debiased_laplace.evaluation import Context, Method, Options, Task, TaskError, run
from debiased_laplace.evaluation.methods import check_methods
from debiased_laplace.evaluation.names import FolderInUseError, check_name, locked, markdown, slug
from debiased_laplace.evaluation.report.outputs import write_outputs
from debiased_laplace.evaluation.report.summary import summarise

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")]
TASK = (Path(__file__).parents[1] / "tasks" / "blobs.py").read_text()
OPTIONS = Options(grid_size=3, log_prior_prec_min=-2, log_prior_prec_max=4, n_resamples=5)
HOSTILE = [
    "costs $\\bad{", "$x$ and $y$", "n" * 300, "名" * 90, "<script>alert(1)</script>", "[bold]x[/bold]", "a|b",
    "`code`", "![x](http://x)", "[x](javascript:y)", "# heading", "- item", "1. item", "**x**", "__x__", "a_b_c",
    "../../etc", "con.txt", "\\", "%s %d {0} {x}", "&lt;b&gt;",
    "a\u202eb", "\U0001f600", "'\"", "-rf", "]: x", "~~x~~", "<b", "=",
]  # fmt: skip
REFUSED = ["", "  ", "a\0b", "a\nb", "a\rb", "\ud800", "a\u2028b", "\x1b[31mred", 3, None]
NAMES = st.text(min_size=1, max_size=60).filter(
    lambda name: name.strip() and not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)
)


def record_with(folder: Path, shift: str, method: str) -> dict[str, Any]:
    """From the task file to the record."""
    text = TASK.replace('"moved"', repr(shift))
    assert text != TASK
    (folder / "task.py").write_text(text)
    methods = (Method("MAP", "map"), Method(method, fit={"budget": 24}, role="candidate"))
    (record,) = run(Task.load(folder / "task.py"), folder, [0], Context(), methods=methods, options=OPTIONS)
    return record


@pytest.mark.parametrize("name", [HOSTILE[0], HOSTILE[2], HOSTILE[3]])
def test_a_hostile_name_ends_no_run(name: str, tmp_path: Path) -> None:
    """With the figures drawn: a formula that is none used to end a run when everything had been fitted."""
    record = record_with(tmp_path, name, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of matplotlib, for letters that its font lacks
        paths = write_outputs(tmp_path / "out", summarise([record]), title=name)
    assert name in html.unescape(paths["report.html"].read_text())


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return record_with(tmp_path_factory.mktemp("names"), "SHIFT", "METHOD")


def renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): renamed(entry, names) for key, entry in value.items()}
    if isinstance(value, list):
        return [renamed(entry, names) for entry in value]
    return names.get(value, value) if isinstance(value, str) else value


@pytest.mark.usefixtures("undrawn")
@settings(deadline=None, max_examples=12, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES)
@example(name=HOSTILE[4])
@example(name=HOSTILE[8])
@example(name=HOSTILE[10])
def test_a_name_is_shown_as_it_is_everywhere(name: str, record: dict[str, Any], tmp_path: Path) -> None:
    name = f"{name}."  # not the name of something else
    found = summarise([renamed(record, {"SHIFT": name, "METHOD": f"m {name}", "SHIFT 3": f"{name} 3"})])
    paths = write_outputs(tmp_path / "out", found, title=f"About {name}")
    page = paths["report.html"].read_text()
    assert "<script>alert" not in page and "\0" not in page
    assert html.escape(name, quote=False) in html.escape(html.unescape(page), quote=False)
    shown = MarkdownIt("js-default").enable("table").render(paths["results.md"].read_text())
    assert len(re.findall("<h1>", shown)) == 1
    assert not re.findall(r"<(a|img|code|em|s|script)\b", shown)
    assert " ".join(name.split()) in " ".join(
        html.unescape(re.sub(r"</?(p|h\d|td|th|strong)[^>]*>", "\n", shown)).split()
    )


@settings(deadline=None, max_examples=200, derandomize=True)
@given(text=st.text(max_size=80))
@example(text="a](b) _c_ __d__ *e* `f` <g> & ~~h~~ | \\*")
@example(text="# x")
@example(text="1) x")
@example(text="1.")
@example(text="--- -")
@example(text="- x")
@example(text="==")
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    assert markdown("-0.25 ± 0.03 [0.1, 0.2]") == "-0.25 ± 0.03 [0.1, 0.2]"
    text = text.replace("\0", "").encode("utf-8", "ignore").decode()
    shown = MarkdownIt("js-default").render(markdown(text))
    plain = html.unescape(re.sub(r"</?p>", "", shown))
    assert " ".join(plain.split()) == " ".join(text.split())
    assert "<" not in re.sub(r"</?p>", "", shown)


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_nothing_can_show_are_refused_at_once(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected (a name of )?a method"):
        check_methods([Method(name, "map")])
    if not isinstance(name, str):
        return
    fitted: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("debiased_laplace.evaluation.suite.posteriors.fit", lambda *_, **__: fitted.append(1))
        with pytest.raises((TaskError, ValueError), match=r"Expected .*(shifted or out-of-distribution data|NAME of)"):
            record_with(tmp_path, name, "METHOD")
    assert not fitted


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_files_are_short_and_readable(name: str) -> None:
    assert check_name(name, "anything") == name
    found = slug(name, "0123abcd")
    assert len(found) <= 41 and re.fullmatch(r"[A-Za-z0-9-]+", found) and not found.startswith("-")


# -- two runs --------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        with pytest.raises(FolderInUseError, match=r"Another run is writing its results to .*out\. Wait for it"):
            record_with_in(tmp_path, tmp_path / "out")
        with locked(tmp_path / "other"):
            pass
    record_with_in(tmp_path, tmp_path / "out")


def record_with_in(folder: Path, out: Path) -> None:
    (folder / "task.py").write_text(TASK)
    run(Task.load(folder / "task.py"), out, [0], Context(), methods=(Method("MAP", "map"),), options=OPTIONS)


def test_a_run_that_was_killed_locks_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys; from debiased_laplace.evaluation.names import locked\n"
        "with locked(sys.argv[1]): print('in', flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("in\n", -9)
    with locked(tmp_path):
        pass
