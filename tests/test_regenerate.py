"""One command that makes every record anew: its table is whole, it goes on where it was, failures stop nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.documented import DOCS, RECORDS, ROOT

SCRIPT = """
import argparse, json, os, sys, time
from pathlib import Path
import beside
parser = argparse.ArgumentParser()
parser.add_argument("--docs", type=Path)
parser.add_argument("--out", type=Path)
parser.add_argument("--name")
parser.add_argument("--wait", action="store_true")
parser.add_argument("--quick", action="store_true")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)
part = options.out / "part"
was = part.exists()
part.write_text("kept")
sum(i * i for i in range(1_000_000))
if options.wait and not was:
    (options.out / "here").write_text(str(os.getpid()))
    time.sleep(60)
if options.name == "bad":
    sys.exit("a reason")
(options.docs / "records" / f"{options.name}.json").write_text(json.dumps({"resumed": was, "quick": options.quick}))
"""


@pytest.fixture
def regenerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "eval")
    before = set(sys.modules)
    import regenerate

    yield regenerate
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == ROOT / "eval":
            del sys.modules[name]


@pytest.fixture
def small(regenerate, monkeypatch, tmp_path) -> SimpleNamespace:
    """Three steps of a script in another folder, and options for them."""
    scripts, docs = tmp_path / "eval", tmp_path / "docs"
    scripts.mkdir()
    (docs / "records").mkdir(parents=True)
    (docs / "records.md").write_text("<!-- records -->\n<!-- end -->\n")
    (docs / "claims.json").write_text('{"outstanding": {"old.md: a part": "why"}}')
    (scripts / "one.py").write_text('"""What it is."""\n' + SCRIPT)
    (scripts / "beside.py").write_text("")
    monkeypatch.setattr(regenerate, "EVAL", scripts)
    command = "one.py --docs {docs} --out {out} --name"
    steps = {name: regenerate.Step(f"{command} {name}", "page.md") for name in ("first", "bad", "last")}
    steps["slow"] = regenerate.Step(f"{command} slow --wait", "page.md")
    steps["data"] = regenerate.Step(f"{command} data {{data}}", "page.md")
    monkeypatch.setattr(regenerate, "STEPS", steps)
    options = SimpleNamespace(
        docs=docs, readme=tmp_path / "README.md", data_dir=None, scratch=tmp_path / "scratch", quick=False,
        only=["first", "bad", "last", "data"],
    )  # fmt: skip
    options.scratch.mkdir()
    return SimpleNamespace(module=regenerate, options=options, scripts=scripts, docs=docs)


def made(small: SimpleNamespace) -> list[str]:
    """Run what is to be run."""
    done = []
    for name in small.module.chosen(small.options):
        small.module.run(name, small.options)
        done.append(name)
    return done


def record(small: SimpleNamespace, name: str) -> Any:
    return json.loads((small.docs / "records" / f"{name}.json").read_text())


def test_every_record_has_its_step(regenerate):
    of_steps = [file for name in regenerate.STEPS for file in regenerate.records_of(name)]
    assert len(set(of_steps)) == len(of_steps)
    there = {path.name for path in RECORDS.glob("*.json")} - {"regeneration.json"}
    assert there - set(of_steps) == set(), "Give each a line in STEPS of eval/regenerate.py."


def test_every_step_has_its_scripts_and_pages(regenerate):
    for name, step in regenerate.STEPS.items():
        for command in step.commands:
            text = (ROOT / "eval" / command.split()[0]).read_text()
            quick = "" if command == step.then else step.quick
            for option in {part for part in f"{command} {quick}".split() if part.startswith("--")}:
                assert f'"{option}"' in text, f"{name}: {option}"
        for page in step.documents.split(", "):
            assert (ROOT / page if page == "README.md" else DOCS / page).exists()


def test_steps_are_run_once_and_a_failure_stops_nothing(small, capfd):
    assert made(small) == ["first", "bad", "last"]
    said = capfd.readouterr().err
    assert "bad failed (1)" in said and "a reason" in said and "data: needs --data-dir" in said
    assert record(small, "first") == {"resumed": False, "quick": False}
    assert set(record(small, "regeneration")) == {"first", "last"}
    assert made(small) == ["bad"]
    # Other text, of the script or of what it imports, other arguments, another version: made anew, from nothing.
    for file in ("beside.py", "one.py"):
        with (small.scripts / file).open("a") as script:
            script.write("# another text\n")
        assert small.module.state("first", small.options) == "changed since"
        assert made(small) == ["first", "bad", "last"]
        assert not record(small, "first")["resumed"]
    small.module.__version__ = "another"
    assert made(small) == ["first", "bad", "last"]
    (small.docs / "records" / "last.json").unlink()  # lost: what its script kept is there
    assert made(small) == ["bad", "last"]
    assert record(small, "last")["resumed"]


def test_the_list_says_what_is_there(small, monkeypatch):
    assert small.module.state("first", small.options) == "never made"
    (small.docs / "records" / "first.json").write_text("{}")
    assert small.module.state("first", small.options) == "made by its scripts alone"
    monkeypatch.setitem(small.module.STEPS, "first", small.module.Step("one.py", "page.md, old.md"))
    assert small.module.state("first", small.options) == "outstanding: of an earlier version"


def test_the_page_says_what_it_took(small):
    made(small)
    of_first = record(small, "regeneration")["first"]
    assert of_first["attempts"] == of_first["counted"] == 1 and 0 < of_first["processor"] <= 1.5 * of_first["wall"]
    line = next(line for line in (small.docs / "records.md").read_text().splitlines() if "first.json" in line)
    assert "What it is" in line and f"{of_first['processor'] / 1e3:,.1f}" in line
    killed = {"first": of_first | {"attempts": 2}}  # the time of one is not known
    assert "at least" in small.module.parts(killed)["records"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_one_that_was_killed_goes_on(small, how):
    code = (
        "import signal, sys, regenerate, types\nfrom pathlib import Path\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in what a shell runs in the background
        f"regenerate.EVAL = Path({str(small.scripts)!r})\n"
        f"regenerate.STEPS = {{'slow': regenerate.Step({small.module.STEPS['slow'].measure!r}, 'page.md')}}\n"
        "regenerate.main()\n"
    )
    command = [sys.executable, "-c", code, "--scratch", str(small.options.scratch), "--docs", str(small.docs)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'eval'}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(small.options.scratch.glob("slow-*/here")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    process.wait(60)
    script = int(next(small.options.scratch.glob("slow-*/here")).read_text())
    if how == signal.SIGKILL:  # it lives on, and is waited for
        threading.Timer(0.5, os.kill, (script, signal.SIGTERM)).start()
    else:
        with pytest.raises(ProcessLookupError):
            os.kill(script, 0)
    small.options.only = ["slow"]
    assert small.module.state("slow", small.options) == "begun"
    assert made(small) == ["slow"]
    assert record(small, "slow")["resumed"]
    of_slow = record(small, "regeneration")["slow"]
    assert of_slow["attempts"] == 2 and of_slow["counted"] == (1 if how == signal.SIGKILL else 2)


def test_a_quick_run_leaves_the_documents_alone(tmp_path):
    before = {path: path.read_bytes() for path in (*RECORDS.iterdir(), *DOCS.glob("*.md"), ROOT / "README.md")}
    command = [sys.executable, str(ROOT / "eval" / "regenerate.py"), "--quick", "--scratch", str(tmp_path), "--only"]
    for only in (["low_rank_evidence", "serving"], ["low_rank_evidence", "serving"]):
        done = subprocess.run([*command, *only], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stderr.count("up to date") == 2
    assert {path: path.read_bytes() for path in before} == before
    assert len(json.loads((tmp_path / "docs" / "records" / "low_rank_evidence.json").read_text())["rows"]) == 1
    assert set(json.loads((tmp_path / "docs" / "records" / "regeneration.json").read_text())) == {
        "low_rank_evidence", "serving"
    }  # fmt: skip
