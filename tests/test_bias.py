"""The bias study: its numbers against the quadratics themselves, its parts, its page, and the command."""

from __future__ import annotations

import copy
import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from debiased_laplace import Quadratic
from debiased_laplace.cli import app
from debiased_laplace.evaluation import Context, Task
from debiased_laplace.evaluation.bias import (
    BiasOptions,
    deciding_table,
    findings,
    statement,
    study,
    tables,
    write_outputs,
)
from debiased_laplace.evaluation.bias import measure as source
from debiased_laplace.evaluation.bias.pictures import pictures
from debiased_laplace.evaluation.bias.report import at, times
from debiased_laplace.sampling.samplers import UniformSampler

BLOBS, WAVE = (Path(__file__).parent / "tasks" / f"{name}.py" for name in ("blobs", "wave"))
FEW = BiasOptions(
    batch_size=20, n_batches=4, n_directions=4, n_steps=5, pool=90, reference=80, sizes=(10, 20), n_size_directions=2,
    n_vectors=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return study(Task.load(BLOBS), tmp_path_factory.mktemp("study"), Context(seed=3), FEW, tolerance=0.2)


def numbers(measured: dict[str, Any]) -> dict[str, Any]:
    """All but when it was measured."""
    return {key: value for key, value in measured.items() if key not in ("made", "kept")}


def batches_and_reference() -> tuple[list[Quadratic], Quadratic]:
    """Drawn as the documentation says: two independent orders of a uniform sample, one generator after the other."""
    task, context = Task.load(BLOBS), Context(seed=3)
    generator = torch.Generator().manual_seed(3)
    sample = UniformSampler(90).draw(task.call("train_loader", context), 1, generator).data
    one, two = (torch.randperm(90, generator=generator) for _ in range(2))
    model = task.model(context)
    parts = [Quadratic(model, (sample.inputs[i], sample.targets[i]), "classification") for i in two.split(20)[:4]]
    return parts, Quadratic(model, (sample.inputs[one[:80]], sample.targets[one[:80]]), "classification")


def test_the_numbers_are_those_of_the_quadratics(measured: dict[str, Any]) -> None:
    batches, reference = batches_and_reference()
    curvatures = measured["directions"]["curvatures"]
    for m, batch in enumerate(batches):
        values, directions = batch.eigenpairs(4)
        assert curvatures["batches"][m][m] == pytest.approx(values.tolist(), rel=1e-4)
        assert curvatures["share"] == pytest.approx(20 / 90)
        assert curvatures["reference"][m] == pytest.approx(reference.curvature(directions).tolist(), rel=1e-3)
        for j, other in enumerate(batches):
            assert curvatures["batches"][m][j] == pytest.approx(other.curvature(directions).tolist(), rel=1e-3)
    rows = [[b.eigenpairs(4)[0], reference.curvature(b.eigenpairs(4)[1])] for b in batches]
    mean_own, mean_reference = (torch.stack(list(column)).mean(0) for column in zip(*rows, strict=True))
    ratio = mean_own / mean_reference
    assert curvatures["typical_ratio_own"]["value"] == pytest.approx(float(ratio.log().mean().exp()), rel=1e-3)
    assert curvatures["total_ratio_own"]["value"] == pytest.approx(
        float(mean_own.sum() / mean_reference.sum()), rel=1e-3
    )


def test_step_magnitudes_are_newton_steps_of_the_restricted_quadratics(measured: dict[str, Any]) -> None:
    """The first step is along the gradient: every magnitude is minus slope over curvature there."""
    batches, reference = batches_and_reference()
    for m, batch in enumerate(batches):
        direction = -batch.gradient
        entry = measured["steps"][m]
        others = [other for other in batches if other is not batch]
        for magnitude, quadratic in zip(
            [entry["own"][0], entry["reference"][0], *(row[0] for row in entry["others"])],
            [batch, reference, *others], strict=True,
        ):  # fmt: skip
            expected = -float(quadratic.slope(direction) / quadratic.curvature(direction))
            assert magnitude == pytest.approx(expected, rel=2e-3)


def test_overlaps_explain_curvatures(measured: dict[str, Any]) -> None:
    """Batches of 20 have rank 40 at most, so that four directions explain less than all of the curvature."""
    pairs = [(entry["first"], entry["second"]) for entry in measured["alignment"]]
    assert pairs == [(i, j) for i in (0, 1) for j in range(3)]
    for entry in measured["alignment"]:
        same = entry["first"] == entry["second"]
        for explained, curvature, total in zip(
            entry["explained"], entry["curvatures"], entry["row_sums"], strict=True
        ):  # fmt: skip
            assert explained <= curvature * (1 + 1e-4)
            assert total == pytest.approx(1, abs=1e-5) if same else total < 1
        if same:
            assert entry["explained"] == pytest.approx(entry["curvatures"], rel=1e-4)


def test_planes_noise_and_sizes(measured: dict[str, Any]) -> None:
    batches, _ = batches_and_reference()
    for of_batch, batch in zip(measured["planes"], batches[:3], strict=True):
        assert of_batch["first"]["curvatures"][0][0] == pytest.approx(float(batch.eigenpairs(2)[0][0]), rel=1e-4)
    assert measured["noise"]["own"]["curvatures"] == pytest.approx(batches[0].eigenpairs(4)[0].tolist(), rel=1e-4)
    assert measured["noise"]["own"]["n_data"] == measured["noise"]["other"]["n_data"] == 20
    assert measured["noise"]["own"]["slope_snr"] != measured["noise"]["other"]["slope_snr"]
    assert measured["sizes"]["sizes"] == [10, 20]
    assert measured["sizes"]["population"] == measured["task"]["n_pool"] == 90
    assert len(measured["sizes"]["predictions"]) == len(measured["sizes"]["isotropic"]) == 2
    assert measured["suggestion"]["tolerance"] == 0.2
    spikes, noise = (torch.tensor(measured["sizes"][key]).double() for key in ("spikes", "noise_along"))
    inverse = spikes**2 * (0.2 / 2.2) / noise + 1 / 100  # for all the training data, not only those that were kept
    assert measured["suggestion"]["predicted"] == (1 / inverse).ceil().tolist()
    assert measured["task"]["n_seen"] == 100
    assert measured["sizes"]["n_reference"] == 80
    assert len(measured["environments"]) == 1
    for entry in measured["steps"]:  # the Gauss-Newton matrix is never negative: magnitudes have the sign of the slopes
        assert entry["uphill"]["reference"] == [magnitude < 0 for magnitude in entry["reference"]]


def test_a_second_batch_is_unbiased_for_the_pool_by_the_study_as_it_draws() -> None:
    """A fifth of the data are in a batch, so that leaving it out of the others would show."""
    options = BiasOptions(
        batch_size=6, n_batches=3, n_directions=6, n_steps=1, pool=30, reference=30, sizes=(6,), n_size_directions=1,
        n_vectors=1,
    )  # fmt: skip
    model = Task.load(BLOBS).model(Context(seed=0))

    class SameNetwork:
        def __init__(self) -> None:
            self.NAME, self.source = "blobs", Task.load(BLOBS).definition

        def model(self) -> torch.nn.Module:
            return copy.deepcopy(model)

        def train_loader(self) -> list:
            return self.source.cut(*self.source.data(100, 30))

    other, reference, own_sums = [], [], []
    for seed in range(40):
        bench = source._Bench(Task("blobs", SameNetwork()), Context(seed=seed), options)
        curvatures = bench.directions()["directions"]["curvatures"]
        other.append(torch.tensor(curvatures["mean_other"]["value"]).sum())
        reference.append(torch.tensor(curvatures["mean_reference"]["value"]).sum())
        own_sums.append(torch.tensor(curvatures["mean_own"]["value"]).sum())
    difference = torch.stack(other) - torch.stack(reference)
    error = difference.std() / len(difference) ** 0.5
    assert abs(float(difference.mean() / error)) < 4
    # the others alone stand for the rest of the pool, and would be too small
    alone = 1.25 * torch.stack(other) - 0.25 * torch.stack(own_sums) - torch.stack(reference)
    assert float(alone.mean() / (alone.std() / len(alone) ** 0.5)) < -4


def test_other_data_are_another_study(tmp_path: Path) -> None:
    folder, task = tmp_path / "out", tmp_path / "task.py"
    text = BLOBS.read_text().replace(
        "cut(*data(100 + seed, 100))", "cut(*torch.load('" + str(tmp_path / "x.pt") + "'))"
    )
    assert "x.pt" in text
    task.write_text(text)
    definition = Task.load(BLOBS).definition
    measured = []
    for seed in (100, 200):
        torch.save(definition.data(seed, 100), tmp_path / "x.pt")
        measured.append(study(Task.load(task), folder, Context(seed=3), FEW)["directions"])
    assert measured[0] != measured[1]


def test_no_step_at_all(tmp_path: Path) -> None:
    """A regression that is fitted exactly has no gradient."""
    task = tmp_path / "task.py"
    task.write_text(
        "import torch\nLIKELIHOOD = 'regression'\n"
        "def model():\n    torch.manual_seed(0)\n    return torch.nn.Linear(6, 2)\n"
        "def train_loader():\n    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))\n"
        "    with torch.no_grad():\n        return [(x, model()(x))]\n"
        "def val_loader(): return train_loader()\ndef test_loader(): return train_loader()\n"
    )
    options = BiasOptions(batch_size=16, n_batches=3, n_directions=2, n_steps=4, sizes=(8,), n_size_directions=1)
    measured = study(Task.load(task), tmp_path / "out", Context(), options)
    paths = write_outputs(tmp_path / "out", measured)
    assert "Conjugate gradients took no step: the gradient on the batch" in paths["bias.md"].read_text()


@pytest.mark.parametrize(("task", "curvature"), [(BLOBS, "hessian"), (WAVE, "ggn")])
def test_hessians_and_regressions(tmp_path: Path, task: Path, curvature: str) -> None:
    options = BiasOptions(
        batch_size=16, n_batches=3, n_directions=2, n_steps=4, sizes=(8,), n_size_directions=1, curvature=curvature
    )
    measured = study(Task.load(task), tmp_path, Context(seed=1), options)
    paths = write_outputs(tmp_path, measured)
    assert ("Hessian" if curvature == "hessian" else "Gauss-Newton matrix") in paths["bias.md"].read_text()


# -- parts -----------------------------------------------------------------------------------------


def test_complete_parts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, context = Task.load(BLOBS), Context(seed=3)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(source, "bias_against_batch_size", interrupt)
        with pytest.raises(KeyboardInterrupt):
            study(task, tmp_path, context, FEW)
    assert len(list((tmp_path / "records").glob("bias-*.json"))) == 2
    heard: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(source, "directional_bias", interrupt)
        patch.setattr(source, "conjugate_gradients", interrupt)
        resumed = study(task, tmp_path, context, FEW, progress=lambda _, __, step: heard.append(step))
    assert heard == ["model and data", "batches of 10", "batches of 20", "done"]
    with monkeypatch.context() as patch:
        for name in ("directional_bias", "conjugate_gradients", "bias_against_batch_size"):
            patch.setattr(source, name, interrupt)
        again = study(task, tmp_path, context, FEW)
        assert again == resumed | {"kept": 4}
        assert resumed["kept"] == 2
    # other weights, options and seeds are other studies
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(source, "directional_bias", interrupt)
        study(task, tmp_path, Context(seed=4), FEW)
    damaged = next((tmp_path / "records").glob("bias-steps-*.json"))
    damaged.write_text("{")
    assert numbers(study(task, tmp_path, context, FEW)) == numbers(resumed)


def test_a_study_leaves_random_states_and_is_the_same_again(tmp_path: Path, measured: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    again = study(Task.load(BLOBS), tmp_path, Context(seed=3), FEW, tolerance=0.2)
    assert torch.equal(torch.get_rng_state(), state)
    assert numbers(again) == numbers(measured)


# -- sentences and pages ---------------------------------------------------------------------------


def test_the_answer_says_what_is_shown_and_no_more(measured: dict[str, Any]) -> None:
    changed = copy.deepcopy(measured)
    about = changed["directions"]["curvatures"]
    about["typical_ratio_own"] = {"value": 9.71, "error": 0.4}
    about["typical_ratio_other"] = {"value": 1.02, "error": 0.05}
    said = statement(changed)["answer"]
    assert said == (
        "On blobs, batches of 20 overstate the Gauss-Newton matrix's curvature along their own top 4 directions "
        "9.71 ± 0.40 times (geometric mean); a second batch of the same size brings that to 1.020 ± 0.050."
    )
    about["typical_ratio_own"] = {"value": 1.3, "error": 0.2}
    assert "are not shown to overstate" in statement(changed)["answer"]
    # two standard errors are not enough with four batches
    about["typical_ratio_own"] = {"value": 1.5, "error": 0.2}
    assert "are not shown to overstate" in statement(changed)["answer"]
    for missing in ({"value": None, "error": None}, {"value": 1.5, "error": None}):  # of a Hessian
        about["typical_ratio_own"] = missing
        for key, value in (("own", 4.0), ("other", 2.0), ("reference", -1.0)):
            about[f"mean_{key}"]["value"] = [value, 3 * value]
        said = statement(changed)["answer"]
        assert "measure 8 for the Gauss-Newton matrix's curvature along their own top 4 directions, on average" in said
        assert "the data have -2 and a second batch has 4; they have no common ratio" in said


def test_sizes_are_told_as_far_as_they_are_known(measured: dict[str, Any]) -> None:
    changed = copy.deepcopy(measured)
    changed["suggestion"] = {"tolerance": 0.1, "predicted": [42.0, None], "measured": [None, 15.2]}
    assert statement(changed)["details"][-1] == (
        "To overstate the curvature by no more than 10 % along the top 2 directions, one after the other, a batch "
        "needs more than 20; about 15 data as measured, and 42; no size at all by spiked random-matrix theory."
    )


def test_steps_that_were_not_taken_are_told(measured: dict[str, Any]) -> None:
    changed = copy.deepcopy(measured)
    for entry in changed["steps"]:
        entry |= {"own": [], "others": [[], []], "reference": [], "uphill": {"others": [[], []], "reference": []}}
    assert "took no step: all the steps" in findings(changed)["steps"]


def test_the_numbers_that_decide_have_a_verdict(measured: dict[str, Any]) -> None:
    changed = copy.deepcopy(measured)
    about = changed["directions"]["curvatures"]
    about["ratio_own"] |= {"value": [3.0, 1.0, 1.0, 0.5], "error": [0.2, 0.1, 0.1, 0.1]}
    about["typical_ratio_own"] = {"value": 1.5, "error": 0.2}
    table = deciding_table(changed)
    rows = {row[0]: row[1:] for row in table.sections[0][1]}
    assert [rows[title][0] for title in rows] == ["3.00 ± 0.20", "0.50 ± 0.10", "1.50 ± 0.20"]
    assert [rows[title][1] for title in rows] == [
        times(at(about["ratio_other"], 0)), times(at(about["ratio_other"], -1)), times(about["typical_ratio_other"])
    ]  # fmt: skip
    assert [rows[title][2] for title in rows] == ["✗ overstated", "✗ understated", "○ not shown to be biased"]
    about["typical_ratio_own"] = {"value": None, "error": None}
    assert deciding_table(changed).sections[0][1][2][3] == "? has no ratio"


def test_outputs(measured: dict[str, Any], tmp_path: Path) -> None:
    paths = write_outputs(tmp_path, measured, notice="A warning <b>here</b>.")
    record = json.loads(paths["bias.json"].read_text())
    assert record["statement"] == statement(measured)
    assert record["directions"] == measured["directions"]
    page, text = paths["bias.html"].read_text(), paths["bias.md"].read_text()
    for text_of in (page, text):
        assert "Curvature along a batch" in text_of
        assert str(measured["task"]["n_seen"]) in text_of
    assert "A warning &lt;b&gt;here" in page
    assert page.count("data:image/png;base64,") == page.count('alt="') == 6
    places = [page.index(part) for part in ('class="answer"', "<table", "<figure", "<details")]
    assert places == sorted(places)
    assert all(
        html.escape(sentence, quote=False) in page.replace("&#39;", "'") for sentence in findings(measured).values()
    )
    assert "http" not in page.replace("http-equiv", "")
    assert {path.name for path in tmp_path.glob("*.png")} == {f"bias-{name}.png" for name in pictures(measured)}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    assert [len(table.sections[0][1]) for table in tables(measured)] == [6, 2]


# -- the command -----------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bias", *(str(argument) for argument in arguments)])


@pytest.mark.usefixtures("undrawn")
def test_the_command(tmp_path: Path) -> None:
    result = invoke(BLOBS, "--quick", "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "batches of 16" in result.stdout
    assert "This was a quick run" in result.stdout
    assert "quick run" in (tmp_path / "new" / "bias.html").read_text()
    again = invoke(BLOBS, "--batch-size", 12, "--batches", 3, "--directions", 2, "--steps", 2, "--size", 6, "--size", 9,
                   "--reference", 50, "--out", tmp_path / "new")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "new" / "bias.json").read_text())["sizes"]["sizes"] == [6, 9]


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_command_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(source, "conjugate_gradients", interrupt)
        result = invoke(BLOBS, "--quick", "--out", tmp_path)
    assert result.exit_code == 130
    assert "run the same command to go on" in " ".join(result.stderr.split())
    assert invoke(BLOBS, "--quick", "--out", tmp_path).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 1, "Expected at least 640 training data, for 5 batches of 128 that share none and others"),
        (["--batch-size", "20", "--directions", "60"], 1, "got 28: the Gauss-Newton matrix of 20 data"),
        (["--batch-size", "20", "--size", "1", "--size", "20"], 1, "find 3 eigenvectors with curvature, got 2"),
        (["--batch-size", "20", "--size", "101"], 1, "Expected at least 102 training data"),
        (["--curvature", "fisher"], 1, "Expected a curvature out of ['ggn', 'hessian'], got 'fisher'."),
        (["--batches", "2"], 2, "--batches"),
        (["--directions", "1"], 2, "--directions"),
        (["--tolerance", "0"], 2, "Expected a number above zero, got 0."),
        (["--device", "nonsense"], 2, "Expected a device out of cpu"),
    ],
)  # fmt: skip
def test_wrong_arguments(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    result = invoke(BLOBS, "--out", tmp_path, *arguments)
    assert "Traceback" not in result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == code


@pytest.mark.parametrize(
    "wrong", [{"n_batches": 2}, {"n_directions": 1}, {"reference": 0}, {"pool": 0}, {"curvature": "fisher"}]
)
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        BiasOptions(**wrong)


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(BLOBS.read_text().replace("    return network\n", "    return network.requires_grad_()\n"))
    text = task.read_text().replace("def train_loader(seed: int) -> list:\n    return cut(*data(100 + seed, 100))",
                                    "def train_loader(seed: int) -> list:\n    x, y = data(100 + seed, 100)\n"
                                    "    x[3] = float('nan')\n    return cut(x, y)")  # fmt: skip
    assert text != task.read_text()
    task.write_text(text)
    result = invoke(task, "--quick", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "Expected a finite loss of the batch, got nan." in result.stderr


def test_sizes_by_default() -> None:
    assert BiasOptions(batch_size=128).all_sizes == (16, 32, 64, 128)
    assert BiasOptions(batch_size=16).all_sizes == (4, 8, 16)
    assert BiasOptions(batch_size=2).all_sizes == (2,)
    assert BiasOptions(sizes=(9, 3, 9)).all_sizes == (3, 9)
