"""Experiments in their smallest form: records that are kept, tables that are filled, pictures."""

from __future__ import annotations

import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import sklearn.datasets
import torch
from torch import nn

from debiased_laplace.evaluation import methods
from debiased_laplace.evaluation.shipped import digits
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.testing import dense_ggn, dense_jacobian
from tests.tolerances import assert_equal

ROOT = Path(__file__).parents[1]


def copy(name: str, docs: Path) -> None:
    """A document and its appendix, for a script to fill."""
    for page in (f"{name}.md", f"{name}_appendix.md"):
        shutil.copy(ROOT / "docs" / page, docs)


def text_of(name: str, docs: Path) -> str:
    """Both together."""
    return "".join((docs / page).read_text() for page in (f"{name}.md", f"{name}_appendix.md"))


def script(name: str, *arguments: str) -> SimpleNamespace:
    """A script as the command line would run it, but in this process, which has imported everything already."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [name, *arguments])
        patch.syspath_prepend(ROOT / "eval")
        patch.chdir(ROOT)
        try:
            runpy.run_path(str(ROOT / "eval" / name), run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=err)
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a quick run fewer data, a smaller ensemble, a coarser grid and fewer resamples."""
    original = methods.Options
    few = {"grid_size": 9, "n_resamples": 20}
    monkeypatch.setattr(methods, "Options", lambda **given: original(**given | few))
    monkeypatch.setattr(digits, "TRAIN_FRACTION", 0.15)
    monkeypatch.setattr(digits, "QUICK_TEST_FRACTION", 0.025)
    monkeypatch.setattr(digits, "MEMBERS", 2)
    digits.split.cache_clear()
    yield
    digits.split.cache_clear()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Two budgets of one network."""
    out = tmp_path_factory.mktemp("results")
    done = run_fidelity(out)
    assert done.returncode == 0, done.stderr
    return out


def run_fidelity(out: Path) -> SimpleNamespace:
    """On the first digits: as many as always to train on and to tune with, and a hundred to compare on."""
    original = sklearn.datasets.load_digits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sklearn.datasets, "load_digits",
            lambda: SimpleNamespace(**{key: original()[key][:1398] for key in ("images", "target")}),
        )  # fmt: skip
        return script(
            "fidelity.py", "--networks", "digits-cnn", "--budgets", "16", "64", "--seeds", "2", "--methods",
            "uniform, one batch", "uniform, two batches", "default", "--out", str(out),
        )  # fmt: skip


def test_records_are_kept_and_not_made_twice(results):
    paths = sorted((results / "fidelity").glob("digits-cnn.kron.*.json"))
    assert len(paths) == 3 * 2 * 2
    before = {path: path.read_bytes() for path in paths}
    missing = paths.pop()
    missing.unlink()
    done = run_fidelity(results)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("digits-cnn.kron") == 1
    again = json.loads(missing.read_text())
    first = json.loads(before[missing])
    for key in ("budget", "seed", "drawn", "certain", "method", "versions"):
        assert again[key] == first[key]
    assert again["priors"]["1"]["abs_log_ratio"] == pytest.approx(first["priors"]["1"]["abs_log_ratio"], rel=1e-3)
    for path in paths:
        assert path.read_bytes() == before[path]


def test_the_report_fills_its_tables(results, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    copy("fidelity", docs)
    done = script("report.py", "--results", str(results), "--docs", str(docs))
    assert done.returncode == 0, done.stderr
    text = text_of("fidelity", docs)
    row = next(line for line in text.splitlines() if line.startswith("| CNN on digits | 64 |"))
    *summary, _ = json.loads((docs / "records" / "fidelity.json").read_text())
    (debiased,) = [e for e in summary if (e["structure"], e["method"], e["budget"]) == ("kron", "default", 64)]
    shown = float(row.split("|")[5].split("±")[0])
    assert shown == pytest.approx(debiased["abs_log_ratio, prior 1"]["mean"], abs=1e-4)
    uniform = next(
        e for e in summary if (e["structure"], e["method"], e["budget"]) == ("kron", "uniform, two batches", 64)
    )
    assert debiased["abs_log_ratio, prior 1"]["mean"] < uniform["abs_log_ratio, prior 1"]["mean"]
    assert (docs / "fidelity.png").stat().st_size > 5000


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's modules can be imported, and are forgotten afterwards."""
    monkeypatch.syspath_prepend(ROOT / "eval")
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == ROOT / "eval":
            del sys.modules[name]


def test_the_posterior_without_approximation(experiments):
    import fidelity
    import sharing

    likelihood, generator = Categorical(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double().eval()
    inputs, labels = torch.randn(6, 4, generator=generator).double(), torch.arange(6) % 3
    test = torch.randn(2, 4, generator=generator).double()
    problem = fidelity.Problem(model, (inputs, labels), (inputs, labels), (test, labels[:2]), 500)
    ggn = dense_ggn(model, inputs, torch.full((6,), 1 / 6, dtype=torch.float64), likelihood)
    jacobians = dense_jacobian(model, test)
    assert_equal(sharing.jacobians(model, test), jacobians)
    for prior, variances in zip(sharing.PRIORS, sharing.exact_variances(problem, (inputs, labels), test), strict=True):
        covariance = (500 * ggn + prior * torch.eye(len(ggn), dtype=torch.float64)).inverse()
        assert_equal(variances, torch.einsum("ncd,de,nce->nc", jacobians, covariance, jacobians))


def test_what_a_time_affords(experiments):
    from equal_time import ALL, Afforded, Point, afforded

    points = [Point(16, 2.0, 0.4), Point(64, 8.0, 0.1), Point(256, 18.0, 0.01)]
    assert afforded(8.0, points[::-1], 50.0) == Afforded(64, 0.1)
    between = afforded(12.0, points, 50.0)  # half of the way, of the logarithms
    assert (between.budget, between.error, between.bound) == (pytest.approx(128), pytest.approx(0.1 / 10**0.5), "")
    assert afforded(1.9, points, 50.0).in_words() == ("below 16", "above 0.4000")
    assert afforded(49.0, points, 50.0).in_words() == ("at least 256", "at most 0.0100")
    assert afforded(50.0, points, 50.0).bound == ALL
    # The largest budget that is affordable, although a smaller one took more.
    assert afforded(8.0, [Point(8, 9.0, 0.5), *points], 50.0).budget == 64


def test_errors_at_equal_time(results, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    copy("fidelity", docs)
    arguments = ("--networks", "digits-cnn", "--pool", "200", "--budgets", "16", "--draws", "2")
    done = script("equal_time.py", *arguments, "--scratch", str(results), "--docs", str(docs))
    assert done.returncode == 0, done.stderr
    record = json.loads((docs / "records" / "equal_time.json").read_text())["digits-cnn"]
    assert record["n_pool"] == 200
    fits = [(run["method"], run["budget"], run["seed"]) for run in record["runs"]]
    assert len(set(fits)) == len(fits) == 2 * (2 * 2 + 1)
    rows = text_of("fidelity", docs).split("<!-- table equal time measured -->")[1].splitlines()
    (row,) = [line for line in rows if line.startswith("| CNN on digits | default | 16 |")]
    errors = [run["error"] for run in record["runs"] if run["method"] == "default"]
    assert float(row.split("|")[5].split("±")[0]) == pytest.approx(sum(errors) / 2, abs=1e-4)


def test_how_weights_are_shared(tmp_path):
    arguments = ("--networks", "digits-mlp", "--seeds", "2", "--pool", "8")
    done = script("sharing.py", *arguments, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "sharing").glob("*.json"))]
    assert [record["seed"] for record in records] == [0, 1]
    for record in records:
        assert {way for way in record["errors"]} == {
            f"{sharing}, {estimator}" for sharing in ("expand", "reduce") for estimator in ("projected", "factored")
        }
    assert script("sharing.py", *arguments, "--out", str(tmp_path)).stderr == ""  # what is there is used


def test_without_records_the_report_says_what_to_do(tmp_path):
    """As a process of its own."""
    arguments = [sys.executable, "eval/report.py", "--results", str(tmp_path), "--docs", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "Run eval/fidelity.py first" in done.stderr


def test_data_that_are_not_there():
    done = script("fidelity.py", "--networks", "lenet", "--seeds", "1")
    assert done.returncode == 1
    assert "folder FashionMNIST/raw in the folder of --data-dir, got None" in done.stderr


def test_the_results_of_the_shipped_tasks(tmp_path, few_digits, request):
    docs, out = tmp_path / "docs", tmp_path / "out"
    docs.mkdir()
    copy("results", docs)
    arguments = ("results.py", "--tasks", "digits", "--quick", "--out", str(out), "--docs", str(docs))
    done = script(*arguments)
    assert done.returncode == 0, done.stderr
    text = text_of("results", docs)
    kept = json.loads((docs / "records" / "results.json").read_text())["digits"]
    loss = kept["test"]["scores"]["debiased K-FAC"]["nll"]
    cell = kept["strong_shift"]["differences"]["temperature, one standard error"]["debiased K-FAC"]["nll"]
    assert len(cell) == 4
    assert kept["predictors"]["debiased K-FAC"]["prior_precision"]
    assert kept["distances"]["equal"]["debiased K-FAC"]["absolute"][0] > 0
    part = text.split("<!-- task digits -->")[1].split("<!-- end -->")[0]
    row = next(line for line in part.splitlines() if line.startswith("| debiased K-FAC |"))
    assert float(row.split("|")[3].split("±")[0]) == pytest.approx(loss[0], abs=1e-3)
    assert "* **digits**: On the test data of digits, the probabilities of debiased K-FAC are " in text
    assert "<!-- task cifar10 -->" in text  # other parts stay
    assert (docs / "results-digits.png").stat().st_size > 5000
    assert (out / "digits" / "report.html").exists()
    request.getfixturevalue("undrawn")
    again = script(*arguments)
    assert again.returncode == 0, again.stderr
    assert "digits, seed 0: kept" in again.stderr
    assert text_of("results", docs) == text


def test_the_bias_of_networks(tmp_path, request):
    docs, out = tmp_path / "docs", tmp_path / "out"
    docs.mkdir()
    copy("bias", docs)
    arguments = ("bias.py", "--tasks", "digits", "--quick", "--out", str(out))
    done = script(*arguments, "--docs", str(docs))
    assert done.returncode == 0, done.stderr
    record = json.loads((docs / "records" / "bias-digits.json").read_text())
    text = text_of("bias", docs)
    assert f"**{record['statement']['answer']}**" in text.split("<!-- bias digits -->")[1].split("<!-- end -->")[0]
    assert (out / "digits" / "bias.html").exists()
    request.getfixturevalue("undrawn")
    again = script(*arguments)
    assert again.returncode == 0, again.stderr
    assert "conjugate gradients" not in again.stderr  # complete parts are kept


def test_the_noisy_quadratic(tmp_path):
    docs, out = tmp_path / "docs", tmp_path / "out"
    docs.mkdir()
    shutil.copy(ROOT / "docs" / "steps.md", docs)
    done = script("steps.py", "--noisy-quadratic", "--document", "--runs", "3", "--out", str(out), "--docs", str(docs))
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert [path.stat().st_size > 5000 for path in out.glob("*.png")] == [True]
    part = (docs / "steps.md").read_text().split("<!-- noisy quadratic -->")[1].split("<!-- end -->")[0]
    medians = [float(line.split("|")[2]) for line in part.strip().splitlines()[2:]]
    assert medians == sorted(medians)
    assert medians == pytest.approx(
        sorted(distances["median"] for distances in record["final_distance"].values()), abs=6e-3
    )
    assert (docs / "steps-noisy-quadratic.png").exists()
    done = script("steps.py")
    assert done.returncode == 2
    assert "Expected at least one of --noisy-quadratic" in done.stderr


def test_filtered_gradients(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs" / "steps.md", docs)
    done = script("filtered.py", "--quick", "--docs", str(docs))
    assert done.returncode == 0, done.stderr
    record = json.loads((docs / "records" / "filtered.json").read_text())
    part = (docs / "steps.md").read_text().split("<!-- filtered quadratic -->")[1].split("<!-- end -->")[0]
    rows = {cells[1].strip(): cells for line in part.strip().splitlines()[2:] if (cells := line.split("|"))}
    assert rows.keys() == record["quadratic"]["methods"].keys()
    assert int(rows["self-tuning"][3]) == record["quadratic"]["budget"] // 5
    assert record["cost"]["SGD"] == 1
    assert all(ratio > 0 for of in record["gradients"].values() for ratios in of.values() for ratio in ratios)
    assert (docs / "steps-filtered.png").stat().st_size > 5000


def test_what_can_be_tuned_without_validation_data(tmp_path):
    docs, out = tmp_path / "docs", tmp_path / "out"
    docs.mkdir()
    copy("evidence", docs)
    arguments = ("evidence.py", "--tasks", "digits", "--quick", "--seeds", "0", "--out", str(out), "--docs", str(docs))
    done = script(*arguments, "--cache", str(out / "cache"))
    assert done.returncode == 0, done.stderr
    records = {record["posterior"]: record for record in json.loads((docs / "records" / "evidence.json").read_text())}
    assert list(records) == ["debiased", "single batch", "full data"]
    assert all(0 < records[kind]["scores"]["evidence, probit"]["nll"] < 3 for kind in records)
    text = text_of("evidence", docs)
    part = text.split("<!-- evidence digits -->")[1].split("<!-- end -->")[0]
    row = next(line for line in part.splitlines() if line.startswith("| evidence, layers, probit |"))
    for cell, record in zip(row.split("|")[2:5], records.values(), strict=True):
        assert float(cell) == pytest.approx(record["scores"]["evidence, layers, probit"]["nll"], abs=6e-4)
    paths = sorted((out / "evidence").glob("*.json"))
    before = [path.read_bytes() for path in paths]
    done = script(*arguments)  # what is there is used
    assert done.returncode == 0, done.stderr
    assert "fitted" not in done.stderr
    assert [path.read_bytes() for path in paths] == before
    assert text_of("evidence", docs) == text


def test_a_monitored_training(tmp_path):
    shutil.copy(ROOT / "docs" / "monitor.md", tmp_path)
    done = script("monitor.py", "--quick", "--out", str(tmp_path / "out"), "--docs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "records" / "monitor.json").read_text())
    for run in record["runs"]:
        (reference,) = run["references"]
        bias = next(entry["bias"] for entry in run["history"] if entry["step"] == reference["step"])
        assert 1 / 1.5 < bias / reference["bias"] < 1.5
    assert [of["measurements"] for of in record["budgets"]] == [1, 1]
    assert "| digits | 9,818 | 64 |" in (tmp_path / "monitor.md").read_text()
    assert (tmp_path / "monitor.png").stat().st_size > 0


@pytest.mark.parametrize("name, options", [("factors", ["--networks", "convolutions"]), ("convolutions", [])])
def test_factors_are_measured(name, options, tmp_path):
    """Single precision is nearer to double precision than bfloat16 is, and all sides give the same matrices."""
    command = [sys.executable, str(ROOT / "eval" / f"{name}.py"), "--quick", "--docs", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "records" / f"{name}.json").read_text())
    if name == "convolutions":
        assert len(record["layers"]) == 2 and all(layer["difference"] < 1e-5 for layer in record["layers"].values())
        return
    ways = record["networks"]["convolutions"]["ways"]
    assert (
        ways["float32"]["factors"] < 1e-5 < ways["bfloat16"]["factors"] < ways["float32, sums in bfloat16"]["factors"]
    )


@pytest.mark.parametrize("trainable", ["1", "3", "all"])
def test_a_fit_keeps_what_autograd_keeps_of_a_partly_frozen_network(experiments, trainable, monkeypatch):
    """Nothing of the frozen blocks, and the inputs of the others once; of all a copy of the outputs of the first."""
    import frozen

    monkeypatch.setattr(frozen, "DATA", 4)
    model, x = frozen.partly_frozen("ResNet-20", trainable)
    by_autograd, by_fit = frozen.kept_for_gradients(model, x)
    assert by_autograd <= by_fit <= 1.01 * by_autograd
    frozen_whole = frozen.partly_frozen("ResNet-20", "all")
    assert by_autograd <= frozen.kept_for_gradients(*frozen_whole)[0] * {"1": 0.06, "3": 0.2, "all": 1}[trainable]


@pytest.mark.parametrize("name", ["invariance", "width"])
def test_same_functions_and_wide_networks(name, tmp_path):
    """The least of both: the record, the table and the picture."""
    (tmp_path / "theory.md").write_text(f"<!-- {name} -->\n<!-- end -->\n")
    done = script(f"{name}.py", "--quick", "--docs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "theory.md").read_text()
    if name == "width":
        assert (tmp_path / "width.png").stat().st_size > 5000
        assert "| prior precision = width | 64 | 64 |" in text
    else:
        assert re.search(r"\| before LayerNorm, 4 \| K-FAC \| [0-9.]+ ± 0.000 \| [^|]+ \| [^|]+ \| 0 \| ", text)
        assert json.loads((tmp_path / "records" / "invariance.json").read_text())["outputs"] < 1e-12
