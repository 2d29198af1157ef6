"""What docs/cli.md says of `--json`, exit codes and errors is what the program does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from debiased_laplace.cli import app, completion, program, session
from debiased_laplace.cli.errors import Told
from debiased_laplace.evaluation import Task
from debiased_laplace.evaluation.shipped import names
from tests.documented import DOCS, code_of, executed
from tests.test_cli import BLOBS, WAVE, invoke

DOCUMENT = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "object": (dict,),
    "null": (type(None),), "list": (list,),
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")  # little data, large priors


def described(section: str) -> dict[str, str]:
    """Fields and types of the table in a section of the document."""
    (text,) = re.findall(rf"^##+ {section}\n(.*?)(?=^##|\Z)", DOCUMENT, re.DOTALL | re.MULTILINE)
    return dict(re.findall(r"^\| `([\w.*\[\]]+)` \| ([\w ]+) \|", text, re.MULTILINE))


COMMON = described("JSON")


def fields(value: Any, path: str = "") -> dict[str, Any]:
    """Every field of a document with its value; the entries of lists of objects are one, as in the tables."""
    found: dict[str, Any] = {}
    for key, entry in value.items():
        place = f"{path}{key}"
        found[place] = entry
        if isinstance(entry, dict):
            found |= fields(entry, f"{place}.")
        elif isinstance(entry, list) and entry and isinstance(entry[0], dict):
            found |= fields(entry[0], f"{place}[].")
    return found


def is_of(value: Any, kind: str) -> bool:
    """Whether a value is of a type in the words of the tables."""
    for one in kind.split(" or "):
        outer, _, inner = one.partition(" of ")
        if isinstance(value, KINDS[outer]) and (outer == "boolean" or not isinstance(value, bool)):
            return not inner or all(is_of(entry, inner) for entry in value)
    return False


def check(document: dict[str, Any], table: dict[str, str], free: tuple[str, ...] = ()) -> None:
    """Whether a document has exactly the fields of a table, with their types.

    Args:
        document: What the program wrote.
        table: What is documented.
        free: Fields that are objects with any names.
    """
    found = {}
    for place, value in fields(document).items():
        if not any(place.startswith(f"{name}.") for name in free):
            found[re.sub(r"^loaders\.\w+\b", "loaders.*", place)] = value
    found.pop("loaders.*", None)
    within = {place for place, value in found.items() if value is None or value == []}  # what is in them is not there
    expected = {name for name in table if not any(re.match(rf"{re.escape(one)}(\.|\[)", name) for one in within)}
    assert set(found) == expected
    for place, value in found.items():
        assert is_of(value, table[place]), f"{place}: {value!r} is no {table[place]}"


def written(*arguments: object) -> dict[str, Any]:
    """The document on the standard output, which has nothing else."""
    result = invoke(*arguments, "--json")
    document = json.loads(result.stdout)
    assert document["exit_code"] == result.exit_code
    assert document["command"] == str(arguments[0])
    assert document["schema"] == session.SCHEMA
    return document


@pytest.fixture(scope="module")
def posteriors(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Documents of two fits, and their files."""
    folder = tmp_path_factory.mktemp("fits")
    files = {task.stem: folder / f"{task.stem}.safetensors" for task in (BLOBS, WAVE)}
    documents = [written("fit", task, "--out", files[task.stem], "--cache", folder) for task in (BLOBS, WAVE)]
    return SimpleNamespace(documents=documents, **files)


# -- documents -------------------------------------------------------------------------------------


def test_every_command_is_in_the_document() -> None:
    group = program.with_options_of_all  # every command goes through it
    assert callable(group)
    commands = {info.name or info.callback.__name__.replace("_", "-") for info in app.registered_commands}  # type: ignore[union-attr]
    table = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| [^|]+ \|$", DOCUMENT, re.MULTILINE)
    assert commands <= set(table)
    for command in commands:
        assert re.search(rf"^### .*\b{command}\b", DOCUMENT, re.MULTILINE), command
        assert f" {command} " in f" {' '.join(invoke('--help').stdout.split())} "


def test_the_document_of_tasks_and_of_init_task(tmp_path: Path) -> None:
    document = written("tasks")
    check(document, COMMON | described("tasks"))
    assert document["tasks"] == names()
    document = written("init-task", tmp_path / "task.py")
    check(document, COMMON | described("init-task"))
    assert document["file"] == str(tmp_path / "task.py")


def test_the_document_of_fit(posteriors: SimpleNamespace) -> None:
    for document in posteriors.documents:
        check(document, COMMON | described("fit"))
    of_classes, of_numbers = posteriors.documents
    assert of_classes["noise_std"] is None
    assert 0.1 < of_numbers["noise_std"][0] < 0.4  # of the targets: 0.2
    assert "The best prior precision" in of_classes["warnings"][0]
    assert of_classes["coverage"].endswith("75 of 75 trainable parameters covered by 2 blocks.")


def test_the_document_of_predict(posteriors: SimpleNamespace, tmp_path: Path) -> None:
    document = written("predict", BLOBS, posteriors.blobs, "--out", tmp_path / "p.npz")
    check(document, COMMON | described("predict"), free=("arrays",))
    assert document["arrays"]["probabilities"] == [70, 3]
    (tmp_path / "x.csv").write_text("0.5\n0.1\n")
    of_table = written("predict", WAVE, posteriors.wave, "--inputs", tmp_path / "x.csv", "--out", tmp_path / "q.csv")
    check(of_table, COMMON | described("predict"), free=("arrays",))
    assert of_table["n"] == 2
    arrays = set(re.findall(r"^\| `(\w+)` \| [\w, ]+ \| ", DOCUMENT, re.MULTILINE))
    assert {*document["arrays"], *of_table["arrays"], "names"} == arrays & {
        *document["arrays"], *of_table["arrays"], "names",
    }  # fmt: skip


def test_the_document_of_doctor(posteriors: SimpleNamespace, tmp_path: Path) -> None:
    table, free = COMMON | described("doctor"), ("machine.versions",)
    document = written("doctor", BLOBS, posteriors.blobs, "--cache", tmp_path)
    check(document, table, free)
    assert document["well"]
    (tmp_path / "task.py").write_text(BLOBS.read_text().replace("return network", "return network.none"))
    document = written("doctor", tmp_path / "task.py")
    check(document, table, free)
    assert (document["exit_code"], document["error"], document["well"]) == (1, None, False)
    assert document["findings"][0]["about"] == "model()"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("command", ["evaluate", "bias"])
def test_the_documents_of_reports(tmp_path: Path, command: str) -> None:
    options = ("--only", "MAP") if command == "evaluate" else ()
    document = written(command, BLOBS, "--quick", "--out", tmp_path, *options)
    check(document, COMMON | described("demo, evaluate, bias"), free=("files",))
    assert all(Path(path).is_file() for path in document["files"].values())
    assert any(path.endswith(".json") for path in document["files"].values())


# -- errors and exit codes -------------------------------------------------------------------------


def test_documents_of_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text("import torch\n\n\ndef broken(:\n")
    document = written("fit", "task.py")
    check(document, COMMON)
    assert document["exit_code"] == 1
    assert document["error"] == {
        "kind": "TaskError", "message": "task.py does not run: SyntaxError: invalid syntax",
        "file": str(tmp_path / "task.py"), "line": 4,
    }  # fmt: skip
    document = written("fit", BLOBS, "--structure", "magic")
    check(document, COMMON)
    assert (document["exit_code"], document["error"]["kind"]) == (2, "UsageError")
    assert "got 'magic'" in document["error"]["message"]
    document = written("fit", "--nothing")
    assert (document["exit_code"], document["error"]["message"]) == (2, "No such option: --nothing")


def test_exit_codes_are_those_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [int(code) for code in re.findall(r"^\| (\d+) \| ", DOCUMENT, re.MULTILINE)]
    assert codes == [0, program.FAILED, program.WRONG_USAGE, program.INTERRUPTED] == [0, 1, 2, 130]
    shown = " ".join(invoke("--help").stdout.split())
    for text in ("0 all went well", "1 it failed", "2 wrong usage", "130 interrupted"):
        assert text in shown
    assert invoke("tasks").exit_code == 0
    assert invoke("fit", tmp_path / "missing.py").exit_code == 1
    assert invoke("nothing").exit_code == 2

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Task, "load", interrupt)
    result = invoke("doctor", BLOBS, "--json")
    assert result.exit_code == 130
    assert "Interrupted." in result.stderr
    assert json.loads(result.stdout)["error"]["kind"] == "KeyboardInterrupt"


def test_an_error_is_one_line_unless_its_traceback_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any kind, from anywhere in the user's code, also in a module beside the task, and in the model's forward."""
    monkeypatch.chdir(tmp_path)
    Path("beside.py").write_text("def scale(x):\n    return {}[x]\n")
    text = BLOBS.read_text().replace("import torch\n", "import torch\n\nimport beside\n", 1)
    Path("task.py").write_text(text.replace("    return network\n", "    return beside.scale(1)\n"))
    result = invoke("fit", "task.py")
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert line == "Error: model() of task.py failed: KeyError: 1 (beside.py, line 2: return {}[x])"
    Path("task.py").write_text(
        BLOBS.read_text().replace("    return network\n", "    return Wrong(network)\n")
        + "\n\nclass Wrong(nn.Module):\n    def __init__(self, inner):\n        super().__init__()\n"
        "        self.inner = inner\n\n    def forward(self, x):\n        return self.inner(x) @ x\n"
    )
    result = invoke("fit", "task.py")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    number = Path("task.py").read_text().splitlines().index("        return self.inner(x) @ x") + 1
    assert line.startswith("Error: RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert line.endswith(f"(task.py, line {number}: return self.inner(x) @ x)")
    for arguments in (("--debug", "fit", "task.py"), ("fit", "task.py", "--debug")):
        result = invoke(*arguments)
        assert isinstance(result.exception, RuntimeError)
        assert result.exit_code == 1


def test_what_an_error_says() -> None:
    assert Told.of(ValueError("Expected a.")).sentence == "Expected a."
    assert Told.of(ValueError("")).sentence == "ValueError:  (--debug shows where)"
    assert Told.of(KeyError("a")).sentence == "KeyError: 'a' (--debug shows where)"
    assert Told.of(torch.OutOfMemoryError("Tried 5 GB.")).sentence.startswith(
        "OutOfMemoryError: Tried 5 GB. Work on fewer data at a time"
    )
    error = ValueError("a")
    error.__cause__ = error  # a circle
    assert Told.of(error).message == "a"


def test_a_document_has_the_standard_output_for_itself() -> None:
    """Whatever prints: the user's code, a process that it starts, the files' descriptors."""
    code = (
        "import os, subprocess, sys\n"
        "from debiased_laplace.cli.session import Session, running\n"
        "with running(Session.of(['fit', '--json'])) as out:\n"
        "    print('printed')\n"
        "    os.write(1, b'descriptor ')\n"
        "    subprocess.run([sys.executable, '-c', 'print(\"process\")'])\n"
        "    out.write('document')\n"
        "print(' and after')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "document and after\n"
    assert set(done.stderr.split()) == {"printed", "descriptor", "process"}


# -- completion, and the example -------------------------------------------------------------------


def test_a_shell_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("task.py", "p.safetensors", "notes.txt", ".hidden.py"):
        Path(name).touch()
    Path("tasks").mkdir()
    Path("tasks/other.py").touch()
    assert completion.tasks("") == [*names(), "task.py", "tasks/"]
    assert completion.tasks("ta") == ["task.py", "tasks/"]
    assert completion.tasks("tasks/") == ["tasks/other.py"]
    assert completion.tasks("nowhere/") == []
    assert completion.tasks("fash") == ["fashion-mnist"]
    assert completion.posteriors("p") == ["p.safetensors"]
    assert completion.structures("k") == ["kron"]
    assert completion.files(f"{tmp_path}/t", (".py",)) == [f"{tmp_path}/task.py", f"{tmp_path}/tasks/"]
    from debiased_laplace.curvature.structures import STRUCTURES

    assert completion.structures("") == list(STRUCTURES)
    result = invoke("--show-completion", "bash")
    assert "complete" in result.stdout


def test_the_shell_is_answered() -> None:
    environment = {
        "_DEBIASED_LAPLACE_COMPLETE": "complete_bash",
        "COMP_WORDS": "debiased-laplace fit fas",
        "COMP_CWORD": "2",
    }
    code = "import sys; sys.argv = ['debiased-laplace']; from debiased_laplace.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["fashion-mnist"]


def test_the_transform_of_the_document() -> None:
    assert len(code_of(DOCS / "cli.md")) == 1
    namespace = executed(DOCS / "cli.md", torch=torch)
    made = namespace["transform"](Image.new("L", (64, 48), 255))
    assert made.shape == (3, 32, 32)
    assert made.dtype == torch.float32
    assert float(made.max()) == 1.0
