"""``debiased-laplace demo``, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import debiased_laplace
from debiased_laplace.cli import app
from debiased_laplace.evaluation import demo as demonstration

runner = CliRunner()


def test_quick_demo(tmp_path: Path) -> None:
    out = tmp_path / "results"
    state = torch.get_rng_state()
    result = runner.invoke(app, ["demo", "--quick", "--out", str(out), "--seed", "3", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert torch.equal(state, torch.get_rng_state())
    for name in ("results.json", "reliability.png", "report.html"):
        assert (out / name).stat().st_size > 10_000
        assert name in result.stdout
    assert "quick run" in (out / "report.html").read_text()
    assert "±" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if str(tmp_path) not in line) <= 100

    results = json.loads((out / "results.json").read_text())
    assert results["seeds"] == [3, 4]
    assert len(list((out / "records").glob("seed-*.json"))) == 2
    names = ["MAP", "temperature scaling", "single-batch K-FAC", "debiased K-FAC", "full-data K-FAC"]
    assert list(results["methods"]) == names
    for name in names:
        method = results["methods"][name]
        assert method["conditions"]["test"]["accuracy"]["mean"] > 0.93
        assert method["conditions"]["test"]["nll"]["mean"] < 0.3
        for shift in ("noise", "rotation"):
            assert 0.4 < method["conditions"][shift]["accuracy"]["mean"] < 0.95
        for kind in ("shuffled digits", "smooth blobs"):
            assert 0.6 < method["ood"][kind]["auroc"]["mean"] < 1
    for name in ("single-batch K-FAC", "debiased K-FAC"):
        at_one = results["methods"][name]["distances"][1]["absolute"]["mean"]
        assert 0.005 < at_one < 1.5

    again = runner.invoke(app, ["demo", "--quick", "--out", str(out), "--seed", "3", "--device", "cpu"])
    assert again.exit_code == 0, again.output
    assert "2 of 2 seeds were finished earlier" in again.stdout
    repeated = json.loads((out / "results.json").read_text())
    assert repeated == results


def test_a_seed_decides_everything() -> None:
    settings = demonstration.DemoSettings(epochs=1, test_fraction=0.1)
    first, second, other = (demonstration.digits(seed, settings) for seed in (0, 0, 1))
    models = [task.model(torch.device("cpu")) for task in (first, second, other)]
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    for name in first.tests:
        assert torch.equal(first.tests[name][0], second.tests[name][0])
        assert first.tests[name][0].shape == (180, 1, 8, 8)
        assert not torch.equal(first.tests[name][1], other.tests[name][1])
    assert sum(len(targets) for _, targets in first.train()) == first.n_data == 898
    assert sum(len(targets) for _, targets in first.validation()) == 359


def test_parts_of_the_data_are_disjoint() -> None:
    task = demonstration.digits(0)
    parts = [*(x for x, _ in task.train()), *(x for x, _ in task.validation()), task.tests["test"][0]]
    together = torch.cat(parts).flatten(1)
    # scikit-learn's digits hold no image twice
    assert len(together.unique(dim=0)) == len(together) == 1796


def test_the_network_has_the_parameters_its_docstring_says() -> None:
    assert f"{sum(p.numel() for p in demonstration.network().parameters()):,}" in (demonstration.network.__doc__ or "")


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"), demonstration.one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--device", "nonsense"], "Expected a device out of cpu"),
        (["demo", "--device", "cuda:99"], "Expected a device out of cpu"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--nothing"], "No such option"),
        (["other"], "No such command"),
    ],
)
def test_bad_options_are_one_clear_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    if arguments[0] == "demo":
        arguments = [*arguments, "--out", str(tmp_path / "out")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = runner.invoke(app, ["demo", "--out", str(out)])
        assert result.exit_code == 2
        assert "folder" in result.stderr
        assert "Traceback" not in result.output
    assert (tmp_path / "file").read_text() == "mine"


def test_version_and_help() -> None:
    assert debiased_laplace.__version__ in runner.invoke(app, ["--version"]).stdout
    assert "demo" in runner.invoke(app, ["--help"]).stdout
    shown = runner.invoke(app, [])
    assert "demo" in shown.output  # one command, and still it has to be named


def test_the_command_line_is_light() -> None:
    code = "import sys, debiased_laplace.cli; sys.exit(any(m in sys.modules for m in ('torch', 'laplace', 'netcal')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
