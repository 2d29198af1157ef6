"""``debiased-laplace demo``, as a user runs it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from debiased_laplace.cli import app
from debiased_laplace.evaluation import Task
from debiased_laplace.evaluation import demo as demonstration
from debiased_laplace.evaluation.shipped import digits

runner = CliRunner()
NAMES = [
    "MAP", "temperature scaling", "temperature, one standard error", "last-layer Laplace", "identity curvature",
    "single-batch K-FAC", "debiased K-FAC", "full-data K-FAC", "debiased, probit", "debiased, layers",
]  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """With a third of the test data of a quick run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "QUICK_TEST_FRACTION", 0.05)
        digits.split.cache_clear()
        yield demonstrated(tmp_path_factory)
    digits.split.cache_clear()


def demonstrated(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("demo") / "results"
    arguments = ["demo", "--quick", "--out", str(out), "--seed", "3", "--device", "cpu", "--processes", "1"]
    state = torch.get_rng_state()
    result = runner.invoke(app, arguments)
    return SimpleNamespace(
        out=out, arguments=arguments, result=result, unchanged=torch.equal(state, torch.get_rng_state())
    )


def test_quick_demo(quick: SimpleNamespace) -> None:
    result, out = quick.result, quick.out
    assert result.exit_code == 0, result.output
    assert quick.unchanged
    for name in ("results.json", "results.md", "reliability.png", "report.html"):
        assert (out / name).stat().st_size > 5_000
        assert name in result.stdout
    assert "quick run" in (out / "report.html").read_text()
    assert "quick run, which decides nothing" in result.stdout
    assert "±" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if str(out) not in line) <= 100
    assert not any((out / "work").iterdir())


def test_its_numbers_are_sensible(quick: SimpleNamespace) -> None:
    results = json.loads((quick.out / "results.json").read_text())
    assert results["seeds"] == [3, 4]
    assert len(list((quick.out / "records").glob("seed-*.json"))) == 2
    assert list(results["test"]["scores"]) == NAMES
    shifts = {(entry["name"], entry["severity"]): entry["scores"] for entry in results["shifts"]}
    assert len(shifts) == 4 * 3
    for name in NAMES:
        assert results["test"]["scores"][name]["accuracy"][0] > 0.93
        assert results["test"]["scores"][name]["nll"][0] < 0.3
        for shift in ("noise", "rotation"):
            accuracy = [shifts[shift, severity][name]["accuracy"][0] for severity in (1, 3, 5)]
            assert accuracy[0] > accuracy[1] > accuracy[2]
            assert accuracy[1] > 0.4
        assert {entry["name"] for entry in results["ood"]} == {"shuffled digits"}
        for entry in results["ood"]:
            assert 0.6 < entry["scores"][name]["maximum probability, auroc"][0] < 1
    distances = results["distances"]["equal"]
    assert distances["debiased K-FAC"]["absolute"][0] < distances["single-batch K-FAC"]["absolute"][0] < 1.5


@pytest.mark.usefixtures("undrawn")
def test_finished_seeds_are_kept(quick: SimpleNamespace) -> None:
    before = (quick.out / "results.json").read_text()
    again = runner.invoke(app, quick.arguments)
    assert again.exit_code == 0, again.output
    assert "2 of 2 seeds were finished earlier" in again.stdout
    assert (quick.out / "results.json").read_text() == before


def test_what_takes_long_is_left_out() -> None:
    methods = demonstration.demo_methods(Task.load("digits"))
    assert [method.name for method in methods] == NAMES


def test_what_it_will_take_is_said_from_gradients(quick: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quick.result.stderr.startswith("About ")
    ticks = itertools.count()
    # The clock goes on by 0.1 s with every reading: ten gradients between the second and the third, and before the
    # fourth.
    assert demonstration.seconds_of_a_gradient(lambda: 0.1 * next(ticks), 0.25) == pytest.approx(0.3 / 20)
    monkeypatch.setattr(demonstration, "seconds_of_a_gradient", lambda clock: 0.01)
    full, rest = demonstration.GRADIENTS_OF_A_SEED, demonstration.GRADIENTS_OF_THE_REST
    for n_seeds, n_processes, rounds in ((6, 1, 6), (6, 2, 3), (5, 2, 3), (1, 4, 1)):
        expected = demonstration.expected_seconds(n_seeds, n_processes, quick=False)
        assert expected == pytest.approx(0.01 * (rounds * full + rest))
    less = demonstration.expected_seconds(2, 2, quick=True)
    assert less == pytest.approx(0.01 * (demonstration.GRADIENTS_OF_A_SEED_QUICK + rest))


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"), demonstration.one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "nonsense"], "Expected a device out of cpu"),
        (["--device", "cuda:99"], "Expected a device out of cpu"),
        (["--seed", "-1"], "--seed"),
        (["--nothing"], "No such option"),
    ],
)
def test_bad_options_are_one_clear_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["demo", *arguments, "--out", str(tmp_path / "out")])
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
