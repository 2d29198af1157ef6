"""The evaluation suite on tiny tasks: records, interruptions, shared fits, peers, distances, noise."""

from __future__ import annotations

import json
import random
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from debiased_laplace import DebiasedLaplace, PrioritySampler, Single, UniformSampler, evaluation
from debiased_laplace.evaluation import Context, Method, Options, Task, TaskError, records, run, standard_methods
from debiased_laplace.evaluation.methods import methods_of
from debiased_laplace.evaluation.predictors import peer
from debiased_laplace.evaluation.suite import distances, posteriors, seeds
from debiased_laplace.evaluation.suite.subject import settings_of
from debiased_laplace.likelihoods import gaussian_nll
from debiased_laplace.posterior.noise import best_noise
from tests.tolerances import EXACT, FLOAT32

TASKS = Path(__file__).parent / "tasks"
OPTIONS = Options(grid_size=9, log_prior_prec_min=-2, log_prior_prec_max=4, n_resamples=20)
MAP_ALONE = (Method("MAP", "map"),)


def task_of(folder: Path, *replacements: tuple[str, str], name: str = "blobs") -> Task:
    """A task with parts of its file replaced."""
    text = (TASKS / f"{name}.py").read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(exist_ok=True)
    (folder / "task.py").write_text(text)
    return Task.load(folder / "task.py")


def scores(record: dict[str, Any]) -> dict[str, Any]:
    """What was measured."""
    return {key: record[key] for key in ("test", "shifts", "ood", "distances", "regression")}


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every fit."""
    seen: list[dict[str, Any]] = []
    original = posteriors.fit

    def fit(*arguments: Any, **keywords: Any) -> Any:
        seen.append(keywords)
        return original(*arguments, **keywords)

    monkeypatch.setattr(posteriors, "fit", fit)
    return seen


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("blobs")
    task, steps = Task.load(TASKS / "blobs.py"), []
    records_made = run(task, folder, range(2), Context(), options=OPTIONS, progress=lambda *step: steps.append(step))
    return SimpleNamespace(task=task, folder=folder, records=records_made, steps=steps)


@pytest.fixture(scope="module")
def wave(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (record,) = run(Task.load(TASKS / "wave.py"), tmp_path_factory.mktemp("wave"), [0], Context(), options=OPTIONS)
    return record


# -- records ---------------------------------------------------------------------------------------


def test_a_record_is_complete_and_is_the_file(blobs: SimpleNamespace) -> None:
    methods = methods_of(blobs.task)
    files = sorted((blobs.folder / "records").iterdir())
    assert [records.read_record(path, {}) for path in files] == blobs.records
    assert not any((blobs.folder / "work").iterdir())
    record = blobs.records[0]
    assert list(record["predictors"]) == list(record["test"]["scores"]) == [method.name for method in methods]
    assert [entry["severity"] for entry in record["shifts"]] == [1, 3, 5]
    assert [entry["name"] for entry in record["ood"]] == ["far"]
    assert record["task"]["classes"] == ["east", "north", "south"]
    assert record["task"]["n_parameters"] == 2 * 12 + 12 + 12 * 3 + 3
    assert record["environment"]["versions"]["torch"]
    assert len(record["test"]["most_uncertain"]["inputs"]) == 8
    assert record["test"]["most_uncertain"]["predictor"] == "debiased K-FAC"
    for method in methods:
        about = record["predictors"][method.name]
        assert (about["kind"], about["role"], about["description"]) == (method.kind, method.role, method.description)
        assert about["seconds"]["predict"] > 0
        assert ("curve" in about) == (method.kind == "laplace")
        assert ("prior_precisions" in about) == ("tune_temperature" in method.tune)
        assert "failed" not in about
    assert set(record["test"]["differences"]) == {
        "MAP", "temperature scaling", "temperature, one standard error", "identity curvature", "single-batch K-FAC",
        "full-data K-FAC", "laplace-torch",
    }  # fmt: skip
    assert [step for seed, step in blobs.steps if seed == 1] == [
        "model", *(f"fit: {method.name}" for method in methods), "predict: test", "predict: moved 1",
        "predict: moved 3", "predict: moved 5", "predict: far", "distances", "done",
    ]  # fmt: skip


def test_network_and_temperature_are_what_they_say(blobs: SimpleNamespace) -> None:
    task, record, context = blobs.task, blobs.records[0], Context()
    model, (inputs, targets) = task.model(context), task.definition.data(300, 70)
    with torch.no_grad():
        outputs = model(inputs).double()
    losses = {"MAP": 1.0, "temperature scaling": record["predictors"]["temperature scaling"]["temperature"]}
    for name, temperature in losses.items():
        expected = float(nn.functional.cross_entropy(outputs / temperature, targets))
        assert record["test"]["scores"][name]["nll"][0] == pytest.approx(expected, rel=FLOAT32)
    tuned = record["predictors"]
    assert tuned["temperature scaling"]["validation_nll"] <= tuned["MAP"]["validation_nll"]
    # of nested families the richer one is no worse on the validation data
    assert tuned["debiased, layers"]["validation_nll"] <= tuned["debiased, probit"]["validation_nll"] + EXACT


@pytest.mark.parametrize("name", ["debiased K-FAC", "debiased, probit", "debiased, layers", "last-layer Laplace"])
def test_a_posterior_is_tuned_and_scored_as_by_hand(blobs: SimpleNamespace, name: str) -> None:
    task, record, context = blobs.task, blobs.records[1], Context(seed=1)
    (method,) = [method for method in methods_of(task) if method.name == name]
    la = DebiasedLaplace(task.model(context), "classification", seed=1, **method.laplace)
    la.fit(task.call("train_loader", context), generator=1, **method.fit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        la.optimize_prior_precision(
            method="gridsearch", val_loader=task.call("val_loader", context), grid_size=9, log_prior_prec_min=-2,
            log_prior_prec_max=4, **method.tune,
        )  # fmt: skip
    about = record["predictors"][name]
    assert about["curve"]["losses"] == pytest.approx(la.curve.losses.tolist(), rel=EXACT)
    priors = la.prior_precision.flatten().tolist()
    assert about.get("prior_precisions", priors) == pytest.approx(priors, rel=FLOAT32)
    assert about.get("temperature", 1.0) == pytest.approx(la.output_temperature, rel=FLOAT32)
    if len(priors) == 1:  # the one that is in use, whatever it was chosen by
        assert about["prior_precision"] == pytest.approx(priors[0], rel=FLOAT32)
    inputs, targets = task.definition.data(201, 60)
    loss = float(nn.functional.nll_loss(la(inputs).double().log(), targets))
    assert about["validation_nll"] == pytest.approx(loss, rel=FLOAT32)
    inputs, targets = task.definition.data(300, 70)
    loss = float(nn.functional.nll_loss(la(inputs).double().log(), targets))
    assert record["test"]["scores"][name]["nll"][0] == pytest.approx(loss, rel=FLOAT32)


def test_records_that_are_there_are_used(blobs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, str]] = []

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is to be done")

    monkeypatch.setattr(seeds, "Bench", refuse)
    again = run(
        blobs.task, blobs.folder, [1, 0], Context(), options=OPTIONS, progress=lambda *step: steps.append(step)
    )  # fmt: skip
    assert again == blobs.records[::-1]
    assert steps == [(1, "model"), (1, "kept"), (0, "model"), (0, "kept")]


def test_other_settings_have_other_records(tmp_path: Path) -> None:
    steps: list[str] = []

    def go(task: Task, **changes: Any) -> None:
        keywords = {"methods": MAP_ALONE, "options": OPTIONS, "context": Context()} | changes
        run(task, tmp_path, [0], progress=lambda _, step: steps.append(step), **keywords)

    go(task_of(tmp_path))
    go(task_of(tmp_path, ("blobs", "blops")))  # the file's text
    go(task_of(tmp_path), options=Options(n_resamples=21))
    go(task_of(tmp_path), context=Context(quick=True))
    go(task_of(tmp_path), methods=(Method("network", "map"),))
    assert "kept" not in steps
    assert len(list((tmp_path / "records").iterdir())) == 5
    go(task_of(tmp_path))
    assert steps[-1] == "kept"


def test_roles_are_settings() -> None:
    """They decide what is compared with what, so a record made with others is of no use."""
    task = Task.load(TASKS / "blobs.py")
    kinds = [(Method("a", role=role), Method("b")) for role in ("", "candidate", "reference")]
    result = [records.digest(settings_of(task, methods, OPTIONS, Context())) for methods in kinds]
    assert len(set(result)) == 3


def test_the_users_random_state_is_left_alone(tmp_path: Path) -> None:
    task = task_of(tmp_path, ("torch.manual_seed(seed)", "torch.manual_seed(seed); import random, numpy; "
                              "random.seed(5); numpy.random.seed(5)"))  # fmt: skip
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    run(task, tmp_path, [0], Context(), methods=MAP_ALONE, options=OPTIONS)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True))


# -- fits ------------------------------------------------------------------------------------------


def test_methods_that_share_a_fit_are_fitted_once(tmp_path: Path, fits: list[dict[str, Any]]) -> None:
    task = task_of(tmp_path)
    (record,) = run(task, tmp_path, [3], Context(), options=OPTIONS)
    assert len(fits) == 6  # last layer, identity, one batch, debiased, all data, one batch by importance
    assert all(keywords["generator"] == 3 for keywords in fits)
    samplers = [(type(sampler), sampler.budget) for sampler in (keywords["sampler"] for keywords in fits)]
    assert sorted(samplers, key=repr) == [
        (PrioritySampler, 24), (PrioritySampler, 24), (UniformSampler, 1), (UniformSampler, 24),
        (UniformSampler, None), (UniformSampler, None),
    ]  # fmt: skip
    # what was tuned for one of them has no effect on the next
    names = ("debiased, layers", "debiased, probit", "debiased K-FAC")
    backwards = tuple(method for name in names for method in methods_of(task) if method.name == name)
    (other,) = run(task, tmp_path, [3], Context(), methods=backwards, options=OPTIONS)
    assert len(fits) == 7
    for name in names:
        for score, cell in other["test"]["scores"][name].items():
            assert cell == pytest.approx(record["test"]["scores"][name][score], rel=FLOAT32, abs=1e-9)
        assert other["predictors"][name]["validation_nll"] == record["predictors"][name]["validation_nll"]


#: Steps, and how many fits are left before each.
STOPS = {
    "laplace-torch": 5, "full-data K-FAC": 2, "debiased, probit": 0, "predict: test": 0, "predict: moved 3": 0,
    "distances": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run that is interrupted before each of these steps in turn: its record, and the fits after each beginning."""
    task, folder, counts = Task.load(TASKS / "blobs.py"), tmp_path_factory.mktemp("resumed"), [0]
    original = posteriors.fit

    def counted(*arguments: Any, **keywords: Any) -> Any:
        counts[-1] += 1
        return original(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posteriors, "fit", counted)
        for stop in STOPS:

            def interrupt(_: int, step: str, stop: str = stop) -> None:
                if step in (stop, f"fit: {stop}"):
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                run(task, folder, [0], Context(), options=OPTIONS, progress=interrupt)
            assert not (folder / "records").exists()
            counts.append(0)
        (record,) = run(task, folder, [0], Context(), options=OPTIONS)
    return SimpleNamespace(record=record, folder=folder, fits=counts)


def test_an_interrupted_run_gives_the_same_scores(blobs: SimpleNamespace, resumed: SimpleNamespace) -> None:
    assert scores(resumed.record) == scores(blobs.records[0])
    assert not any((resumed.folder / "work").iterdir())


def test_an_interrupted_run_fits_nothing_twice(resumed: SimpleNamespace) -> None:
    left = [6, *STOPS.values(), 0]
    assert resumed.fits == [before - after for before, after in pairwise(left)]


def test_an_interrupted_run_keeps_its_warnings(blobs: SimpleNamespace, resumed: SimpleNamespace) -> None:
    expected = {name: about["warnings"] for name, about in blobs.records[0]["predictors"].items()}
    assert any(expected.values())
    result = resumed.record["predictors"]
    assert {name: about["warnings"] for name, about in result.items()} == expected


def test_an_interrupted_run_of_a_network_that_is_never_the_same(tmp_path: Path, fits: list[dict[str, Any]]) -> None:
    """Training need not be reproducible (on a GPU it seldom is): what was done with other weights is done anew."""
    task, count = task_of(tmp_path), [0]
    original = task.definition.model

    def model(seed: int) -> nn.Module:
        count[0] += 1
        return original(seed + 10 * count[0])

    task.definition.model = model

    def interrupt(_: int, step: str) -> None:
        if step == "predict: moved 3":
            raise KeyboardInterrupt

    methods = (*MAP_ALONE, Method("debiased K-FAC", fit={"budget": 24}))
    with pytest.raises(KeyboardInterrupt):
        run(task, tmp_path, [0], Context(), methods=methods, options=OPTIONS, progress=interrupt)
    (record,) = run(task, tmp_path, [0], Context(), methods=methods, options=OPTIONS)
    count[0] = 1
    (expected,) = run(task, tmp_path / "other", [0], Context(), methods=methods, options=OPTIONS)
    assert record["test"]["scores"] == expected["test"]["scores"]


def test_methods_are_checked(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    for methods, message in (
        ((Method("a"), Method("a")), "different names and at most one method of each role"),
        ((Method("a", role="baseline"), Method("b", role="baseline")), r"each role, got .*\['baseline', 'baseline'\]"),
        ((Method("a", "map", role="reference"),), r"roles for methods of kind 'laplace' alone, got one for \['a'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run(task, tmp_path, [0], Context(), methods=methods)


def test_the_edge_of_the_grid_is_recorded_and_not_shouted(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    methods = (Method("debiased", fit={"budget": 24}),)
    for low, high, edge in ((6, 7, "smallest"), (-4, -3, "largest")):
        options = Options(grid_size=3, log_prior_prec_min=low, log_prior_prec_max=high, n_resamples=2)
        (record,) = run(task_of(tmp_path), tmp_path, [1], Context(), methods=methods, options=options)
        about = record["predictors"]["debiased"]
        assert about["edges"] == {"prior precision": edge}
        assert f"is the {edge} of the grid" in about["warnings"][0]
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_the_edge_is_that_of_the_prior_precision_in_use(tmp_path: Path) -> None:
    """Where a temperature is tuned along, the best prior precision without it says nothing."""
    sharp = (
        "    return network\n",
        "    network[2].weight.data *= 6\n    network[2].bias.data *= 6\n    return network\n",
    )
    methods = (
        Method("alone", fit={"budget": None}),
        Method("temperature", fit={"budget": None}, tune={"tune_temperature": True}),
    )
    options = Options(grid_size=9, log_prior_prec_min=0.0, log_prior_prec_max=4, n_resamples=2)
    result = 0
    for seed in range(4):
        (record,) = run(task_of(tmp_path, sharp), tmp_path, [seed], Context(), methods=methods, options=options)
        about = record["predictors"]["temperature"]
        (prior,) = about["prior_precisions"]
        at = "smallest" if prior <= 1.0001 else "largest" if prior >= 0.9999e4 else None
        assert about["edges"].get("prior precision") == at
        assert about["prior_precision"] == pytest.approx(prior)
        result += record["predictors"]["alone"]["edges"].get("prior precision") != at
    assert result


def test_an_ensemble(tmp_path: Path) -> None:
    several = "def ensemble(seed):\n    return [model(seed + 50 + i) for i in range(3)]\n\n\ndef test_loader"
    task = task_of(tmp_path, ("def test_loader", several))
    assert [method.name for method in methods_of(task)][-1] == "deep ensemble"
    methods = (*MAP_ALONE, Method("deep ensemble", "ensemble"))
    (record,) = run(task, tmp_path, [0], Context(), methods=methods, options=OPTIONS)
    assert record["predictors"]["deep ensemble"]["members"] == 3
    inputs, targets = task.definition.data(300, 70)
    with torch.random.fork_rng():
        members = task.definition.ensemble(0)
    mean = torch.stack([member(inputs).detach().double().softmax(1) for member in members]).mean(0)
    expected = float(nn.functional.nll_loss(mean.log(), targets))
    assert record["test"]["scores"]["deep ensemble"]["nll"][0] == pytest.approx(expected, rel=FLOAT32)


@pytest.mark.parametrize("dtype", ["torch.int32", "torch.uint8"])
def test_labels_of_any_integer_dtype(tmp_path: Path, blobs: SimpleNamespace, dtype: str) -> None:
    task = task_of(
        tmp_path,
        ("list(zip(inputs.split(32), targets.split(32)", f"list(zip(inputs.split(32), targets.to({dtype}).split(32)"),
    )
    (record,) = run(task, tmp_path, [0], Context(), options=replace(OPTIONS, conditions=()))
    assert "failed" not in record["predictors"]["laplace-torch"]
    assert record["test"]["scores"] == blobs.records[0]["test"]["scores"]


def test_a_part_of_the_training_data_counts_as_all(tmp_path: Path, fits: list[dict[str, Any]]) -> None:
    task = task_of(tmp_path, ("BUDGET = 24", "BUDGET = 24\nN_DATA = 5000"))
    run(task, tmp_path, [0], Context(), methods=(Method("a", fit={"budget": 24}),), options=OPTIONS)
    assert fits[0]["n_data"] == 5000


# -- laplace-torch ---------------------------------------------------------------------------------


def test_the_peer_is_tuned_over_the_same_grid_and_scored_as_by_hand(blobs: SimpleNamespace) -> None:
    from laplace import Laplace

    task, record, context = blobs.task, blobs.records[1], Context(seed=1)
    about = record["predictors"]["laplace-torch"]
    assert about["layers"] == "all layers"
    la = Laplace(task.model(context), "classification", "all", "kron")
    la.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*task.definition.data(101, 100)), batch_size=32))
    losses = []
    inputs, targets = task.definition.data(201, 60)
    for prior in torch.logspace(-2, 4, 9).tolist():
        la.prior_precision = prior
        losses.append(float(nn.functional.nll_loss(la(inputs).double().log(), targets)))
    assert about["validation_nll"] == pytest.approx(min(losses), rel=FLOAT32)
    la.prior_precision = about["prior_precision"]
    inputs, targets = task.definition.data(300, 70)
    loss = float(nn.functional.nll_loss(la(inputs).double().log(), targets))
    assert record["test"]["scores"]["laplace-torch"]["nll"][0] == pytest.approx(loss, rel=FLOAT32)


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("out of everything")


@pytest.mark.parametrize("what", ["Laplace", "tune_peer", "PeerPredictor"])
def test_a_peer_that_fails_is_told_and_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    place: Any = {"Laplace": "laplace.Laplace", "tune_peer": "debiased_laplace.evaluation.suite.bench.tune_peer"}
    monkeypatch.setattr(place.get(what, "debiased_laplace.evaluation.predictors.peer.PeerPredictor.__call__"), fails)
    methods = (*MAP_ALONE, Method("laplace-torch", "laplace-torch", laplace={"structure": "kron"}))
    (record,) = run(task_of(tmp_path), tmp_path, [0], Context(), methods=methods, options=OPTIONS)
    assert record["predictors"]["laplace-torch"]["failed"] == "RuntimeError: out of everything"
    assert list(record["test"]["scores"]) == ["MAP"]
    assert record["test"]["differences"] == {"MAP": {}}


def test_a_peer_that_fails_over_all_layers_has_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import laplace

    original = laplace.Laplace

    def last_alone(model: nn.Module, likelihood: str, where: str, structure: str) -> Any:
        return original(model, likelihood, where, structure) if where == "last_layer" else fails()

    methods = (Method("laplace-torch", "laplace-torch", laplace={"structure": "kron"}),)
    monkeypatch.setattr(laplace, "Laplace", last_alone)
    (record,) = run(task_of(tmp_path), tmp_path, [0], Context(), methods=methods, options=OPTIONS)
    about = record["predictors"]["laplace-torch"]
    assert about["layers"] == "the last layer (over all layers it fails with RuntimeError)"
    monkeypatch.setattr(laplace, "Laplace", original)
    monkeypatch.setattr(peer, "PEER_PARAMETERS", 10)
    (record,) = run(task_of(tmp_path), tmp_path / "few", [0], Context(), methods=methods, options=OPTIONS)
    assert record["predictors"]["laplace-torch"]["layers"] == "the last layer (too many parameters for its Jacobians)"


def test_nothing_to_judge_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laplace.Laplace", fails)
    methods = (Method("laplace-torch", "laplace-torch", laplace={"structure": "kron"}),)
    with pytest.raises(TaskError, match=r"laplace-torch.*out of everything"):
        run(task_of(tmp_path), tmp_path, [0], Context(), methods=methods, options=OPTIONS)


# -- distances -------------------------------------------------------------------------------------


def log_variances(la: DebiasedLaplace, model: nn.Module, inputs: Tensor) -> Tensor:
    """By dense Jacobians and the posterior's own covariance."""
    names = [name for name, _ in model.named_parameters()]

    def outputs(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (inputs,))

    parts = torch.autograd.functional.jacobian(outputs, tuple(model.parameters()))
    jacobians = torch.cat([part.flatten(2) for part in parts], 2)
    return la.functional_variance(jacobians).diagonal(dim1=1, dim2=2).double().log()


def test_distances_are_log_ratios_of_functional_variances(blobs: SimpleNamespace) -> None:
    task, record, context = blobs.task, blobs.records[0], Context()
    model, inputs = task.model(context), task.definition.data(300, 70)[0]
    fitted = {}
    for method in methods_of(task):
        if method.role:
            fitted[method.role] = DebiasedLaplace(model, "classification")
            fitted[method.role].fit(task.call("train_loader", context), generator=0, **method.fit)
    (tuned,) = record["predictors"]["full-data K-FAC"]["prior_precisions"]
    for where, prior in (("equal", 1.0), ("tuned", tuned)):
        assert record["distances"][where]["prior_precision"] == pytest.approx(prior)
        for la in fitted.values():
            la.prior_precision = prior
        logarithms = {role: log_variances(la, model, inputs) for role, la in fitted.items()}
        for role, name in (("baseline", "single-batch K-FAC"), ("candidate", "debiased K-FAC")):
            ratio = logarithms[role] - logarithms["reference"]
            distance = record["distances"][where][name]
            assert distance["absolute"][0] == pytest.approx(float(ratio.abs().mean()), rel=1e-3)
            assert distance["signed"][0] == pytest.approx(float(ratio.mean()), rel=1e-2, abs=1e-5)
            assert distance["absolute"][2] <= distance["absolute"][0] <= distance["absolute"][3]


@pytest.mark.parametrize("name", ["blobs", "wave"])
def test_tuning_has_no_part_in_distances(tmp_path: Path, name: str) -> None:
    """The same fit is at distance zero from itself, however prior precision, temperature or noise were tuned."""
    task, fit = task_of(tmp_path, name=name), {"split": Single(), "budget": None}
    tune = {"tune_temperature": True} if name == "blobs" else {"tune_sigma_noise": True}
    methods = (Method("a", fit=fit, role="reference"), Method("b", fit=fit, tune=tune, role="baseline"))
    (record,) = run(task, tmp_path, [0], Context(), methods=methods, options=OPTIONS)
    for distances_at in record["distances"].values():
        assert distances_at["b"]["absolute"] == pytest.approx([0, 0, 0, 0], abs=1e-6)


def test_distances_need_a_reference_and_use_the_first_inputs(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    methods = (Method("a", fit={"budget": 24}, role="candidate"),)
    (record,) = run(task, tmp_path, [0], Context(), methods=methods, options=OPTIONS)
    assert record["distances"] == {}
    inputs = distances.first_inputs([(torch.arange(4.0), torch.zeros(4)), (torch.arange(4.0, 8.0), torch.zeros(4))], 6)
    assert inputs.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(distances.first_inputs([(torch.arange(4.0), torch.zeros(4))], 6)) == 4


# -- regression ------------------------------------------------------------------------------------


def test_a_regression(wave: dict[str, Any]) -> None:
    assert wave["regression"]
    names = [method.name for method in standard_methods(24, likelihood="regression")]
    assert list(wave["test"]["scores"]) == names
    assert json.loads(json.dumps(wave, allow_nan=False)) == wave
    task = Task.load(TASKS / "wave.py")
    model, (inputs, targets) = task.model(Context()), task.definition.data(300, 70)
    with torch.no_grad():
        error = float((model(inputs) - targets).square().mean().sqrt())
        (validation, labels) = task.definition.data(200, 60)
        noise = float((model(validation) - labels).square().mean().sqrt())
    assert wave["predictors"]["MAP"]["noise"] == pytest.approx(noise, rel=FLOAT32)
    for name in names:
        about = wave["predictors"][name]
        assert wave["test"]["scores"][name]["rmse"][0] == pytest.approx(3 * error, rel=1e-3)  # target_scale
        assert 0.05 < about["noise"] < 1
        assert 0.5 < wave["test"]["scores"][name]["coverage_95"][0] <= 1
        if name not in ("MAP", "laplace-torch"):
            assert about["validation_nll"] <= np.log(noise) + 0.5 * np.log(2 * np.pi) + 0.5 + 1e-3  # that of MAP


@pytest.mark.parametrize("name", ["debiased K-FAC", "last-layer Laplace", "laplace-torch"])
def test_prior_and_noise_are_the_best_of_a_brute_force_search(wave: dict[str, Any], name: str) -> None:
    task, context = Task.load(TASKS / "wave.py"), Context()
    model, (inputs, targets) = task.model(context), task.definition.data(200, 60)
    (method,) = [method for method in methods_of(task) if method.name == name]
    if name == "laplace-torch":
        from laplace import Laplace

        la: Any = Laplace(model, "regression", "all", method.laplace["structure"])
        dataset = torch.utils.data.TensorDataset(*task.definition.data(100, 80))
        la.fit(torch.utils.data.DataLoader(dataset, batch_size=80))
    else:
        la = DebiasedLaplace(model, "regression", **method.laplace)
        la.fit(task.call("train_loader", context), generator=0, **method.fit)

    def loss(prior: float, noise: float) -> float:
        la.prior_precision, la.sigma_noise = prior, noise
        mean, covariance = la(inputs)
        return float(gaussian_nll(mean, covariance.reshape(mean.shape), targets, noise**2).mean())

    about = wave["predictors"][name]
    at = loss(about["prior_precision"], about["noise"])
    assert about["validation_nll"] == pytest.approx(at, abs=1e-4)
    with torch.no_grad():
        error = float((model(inputs) - targets).square().mean())
    unit = np.logspace(-2, 4, 9) * error  # the grid is at the network's own mean squared error
    noises = np.geomspace(0.5, 2.0, 21) * about["noise"]
    table = [loss(prior / noise**2, noise) for prior in unit for noise in noises]
    assert at <= min(table) + 1e-5
    assert min(table) == pytest.approx(at, abs=1e-3)
    again = loss(about["prior_precision"], about["noise"])
    shifted = wave["shifts"][0]["scores"][name]["nll"][0]
    mean, covariance = la(task.definition.data(300, 70)[0] + 0.5)
    expected = gaussian_nll(mean, covariance.reshape(mean.shape), task.definition.data(300, 70)[1], about["noise"] ** 2)
    assert again == at
    assert shifted == pytest.approx(float(expected.mean()) + np.log(3.0), rel=1e-3)


def test_the_best_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, targets = torch.randn(2, 30, 2, generator=generator, dtype=torch.float64)
    variances = torch.rand(3, 30, 2, generator=generator, dtype=torch.float64)
    noise, losses = best_noise(mean, variances, targets)
    grid = torch.linspace(0.5, 2, 301, dtype=torch.float64)
    for variance, best, least in zip(variances, noise, losses, strict=True):
        table = torch.stack([gaussian_nll(mean, v * variance, targets, v).mean() for v in best * grid])
        assert float(table.min()) == pytest.approx(float(least), rel=EXACT)
        assert int(table.argmin()) == 100


@pytest.mark.usefixtures("undrawn")
def test_the_template_runs(tmp_path: Path) -> None:
    task = Task.load(Path(evaluation.__file__).with_name("template.py"))
    methods = tuple(method for method in methods_of(task) if method.kind != "laplace-torch")
    context = Context(cache=tmp_path, quick=True)
    (record,) = run(task, tmp_path, [0], context, methods=methods, options=Options(grid_size=9, n_resamples=10))
    assert record["test"]["scores"]["debiased K-FAC"]["accuracy"][0] > 0.8
    assert [entry["severity"] for entry in record["shifts"]] == [1, 2, 3, 4, 5]
    assert record["test"]["most_uncertain"]["inputs"]
