"""The protocol of comparisons: equal rules, equal settings, draws, one comparison for all shifts, honest intervals."""

from __future__ import annotations

import copy
import importlib
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import t as student

from debiased_laplace.evaluation import Context, Method, Options, Task, evaluate, run, summarise
from debiased_laplace.evaluation.methods import CHOSEN_ON, MAP, TEMPERATURE, TEMPERATURE_RULE, standard_methods
from debiased_laplace.evaluation.predictors.baselines import NOISE_RANGE, tuned_noise, tuned_temperature
from debiased_laplace.evaluation.predictors.edges import near_the_end, of_prior, of_temperature, told
from debiased_laplace.evaluation.report.cells import OF_NO_USE
from debiased_laplace.evaluation.report.numbers import MINUS, unit
from debiased_laplace.evaluation.report.outputs import markdown
from debiased_laplace.evaluation.report.statement import deciding_table, protocol, statement
from debiased_laplace.evaluation.report.tables import tables
from debiased_laplace.evaluation.report.verdicts import comparisons, is_worse_than_uniform
from debiased_laplace.evaluation.scores.calibrated import expected_errors
from debiased_laplace.evaluation.scores.cells import combine, cross_fitted
from debiased_laplace.evaluation.scores.classification import classification_metrics
from debiased_laplace.evaluation.scores.intervals import mean as interval_of_mean
from debiased_laplace.evaluation.scores.intervals import overlap_factor
from debiased_laplace.evaluation.suite import draws as several
from debiased_laplace.evaluation.suite.draws import EQUAL, budget_within
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.posterior.temperature import (
    TEMPERATURES,
    at_the_end,
    most_uncertain_temperature,
    temperature_scaling,
)
from tests.documented import ROOT
from tests.test_suite import OPTIONS, TASKS, task_of
from tests.tolerances import EXACT, FLOAT32, MONTE_CARLO_Z

QUICK = settings(deadline=None, max_examples=25, derandomize=True)
BASELINE, CANDIDATE, REFERENCE = "single-batch K-FAC", "debiased K-FAC", "full-data K-FAC"
#: "Better in k of n" in any of its forms.
COUNTS = re.compile(
    r"\b(better|worse|beats?|loses|wins)\b[^.|]{0,40}\bin \d+|\b\d+ of (the )?\d+ [\w ]{0,12}(cases|cells|shifts)|"
    r"\d+ to \d+ of \d+"
)


# -- equal rules -----------------------------------------------------------------------------------


def losses(logits: np.ndarray, targets: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits / temperature
    return logsumexp(scaled, 1) - scaled[np.arange(len(scaled)), targets]


@QUICK
@given(st.integers(5, 60), st.integers(2, 5), st.integers(0, 1000), st.sampled_from([1e-8, 1.0, 1e8]))
@example(6, 2, 3, 1.0)
def test_the_temperature_of_one_standard_error(n: int, classes: int, seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    logits = 3 * scale * random.standard_normal((n, classes))
    targets = (logits / scale + 2 * random.gumbel(size=logits.shape)).argmax(1)
    arguments = Categorical(), torch.from_numpy(logits), torch.from_numpy(targets)
    best, result = temperature_scaling(*arguments), most_uncertain_temperature(*arguments)
    if best.undetermined:
        assert result == best
        return

    def is_as_good(temperature: float) -> bool:
        difference = losses(logits, targets, temperature) - losses(logits, targets, best.value)
        return float(difference.mean()) <= float(difference.std(ddof=1)) / math.sqrt(n) + 1e-12

    assert result.value >= best.value
    assert result.loss == pytest.approx(losses(logits, targets, result.value).mean(), rel=EXACT)
    assert is_as_good(result.value * (1 - 1e-9))
    end = TEMPERATURES[1] * (1.0 if TEMPERATURES[0] <= best.value <= TEMPERATURES[1] else best.value)
    if at_the_end(result.value, best.value) != "largest":
        larger = np.geomspace(result.value * 1.0001, end, 400)
        assert not any(is_as_good(temperature) for temperature in larger)


def test_what_has_no_best_temperature_has_no_other() -> None:
    right = torch.tensor([[3.0, 0.0], [0.0, 2.0]] * 4), torch.tensor([0, 1] * 4)
    result = most_uncertain_temperature(Categorical(), *right)
    assert (result.value, bool(result.undetermined)) == (1.0, True)
    one = most_uncertain_temperature(Categorical(), torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    assert one == temperature_scaling(Categorical(), torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"selection out of \['best', 'one_standard_error'\], got 'largest'"):
        tuned_temperature(torch.nn.Identity(), [right], "largest")


def test_every_rule_is_given_to_every_kind_of_method() -> None:
    methods = {method.name: method for method in standard_methods(64)}
    assert methods[TEMPERATURE_RULE].tune == {"selection": "one_standard_error"}
    for name in ("identity curvature", BASELINE, CANDIDATE):
        one, best = methods[name], methods[f"{name}, best"]
        assert one.tune["selection"] == "one_standard_error"
        assert best.tune == one.tune | {"selection": "best"}
        assert (best.fit_key, best.role) == (one.fit_key, "")
    importance = methods["single batch, importance"]
    assert importance.fit["sampler"].budget == methods[CANDIDATE].fit["budget"]
    assert {type(methods[name].fit.get("split")).__name__ for name in (BASELINE, importance.name)} == {"Single"}
    assert [m.name for m in standard_methods(64, equal_seconds=True) if m.seconds_of] == ["single batch, equal seconds"]
    random = [name for name, method in methods.items() if method.is_random]
    assert set(random) >= {BASELINE, CANDIDATE, importance.name}
    assert not set(random) & {"identity curvature", REFERENCE, "last-layer Laplace", MAP, TEMPERATURE}


# -- a single batch of equal seconds ---------------------------------------------------------------


@QUICK
@given(st.floats(0.0, 2.0), st.floats(1e-4, 0.1), st.integers(1, 500), st.floats(1.0, 20.0))
def test_the_budget_that_takes_as_long(fixed: float, each: float, start: int, times: float) -> None:
    asked: list[int] = []

    def seconds(budget: int) -> float:
        asked.append(budget)
        return fixed + each * budget

    wanted = times * (fixed + each * start)
    result = budget_within(wanted, seconds, start, 10**7)
    assert len(asked) <= 3
    exact = (wanted - fixed) / each
    assert result == pytest.approx(exact, rel=0.12, abs=1)


def test_no_more_data_than_there_are() -> None:
    assert budget_within(100.0, lambda n: 0.01 * n, 10, 300) == 300
    assert budget_within(1e-9, lambda n: 0.01 * n, 10, 300) == 1
    assert 1 <= budget_within(1.0, lambda n: 1 / n, 10, 300) <= 300  # a clock that makes no sense


def test_a_batch_of_equal_seconds_needs_what_takes_them(tmp_path: Path) -> None:
    method = Method("timed", seconds_of="nobody")
    with pytest.raises(
        ValueError, match=r"'timed' to take the seconds of a posterior before it out of \[\], got seconds_of='nobody'"
    ):
        run(task_of(tmp_path), tmp_path, [0], Context(), methods=(method,), options=OPTIONS)


# -- all of it in a run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One seed with three draws of the data for curvature, and a batch of equal seconds."""
    methods = [m for m in standard_methods(24, equal_seconds=True) if m.kind != "laplace-torch"]
    options = Options(grid_size=7, log_prior_prec_min=-2, log_prior_prec_max=4, n_resamples=30, draws=3)
    task, folder = Task.load(TASKS / "blobs.py"), tmp_path_factory.mktemp("drawn")
    (record,) = run(task, folder, [1], Context(), methods=methods, options=options)
    return record


def test_scores_are_means_over_draws(drawn: dict[str, Any]) -> None:
    about = drawn["predictors"][CANDIDATE]
    assert len(about["draws"]) == 3
    assert len({draw["validation_nll"] for draw in about["draws"]}) == 3
    for entry in (drawn["test"], *drawn["shifts"], *drawn["ood"], drawn["strong_shift"]):
        assert set(entry["draws"]) >= {CANDIDATE, BASELINE, "single batch, importance", "single batch, equal seconds"}
        assert not set(entry["draws"]) & {MAP, REFERENCE, "identity curvature"}
        for name, summarised in entry["draws"].items():
            for score, values in summarised.items():
                assert len(values) == 3
                assert entry["scores"][name][score][0] == pytest.approx(np.mean(values), rel=EXACT)
    values = {name: drawn["test"]["draws"][name]["nll"] for name in (CANDIDATE, BASELINE)}
    difference = drawn["test"]["differences"][BASELINE][CANDIDATE]["nll"]
    spread = np.std(np.subtract(*values.values()), ddof=1) / math.sqrt(3)
    assert difference[0] == pytest.approx(np.mean(np.subtract(*values.values())), rel=EXACT)
    assert difference[1] > spread
    assert difference[3] - difference[2] > 2 * student.ppf(0.975, 2) * spread
    summarised = summarise([drawn])
    assert summarised["units"] == {"networks": 1, "splits": 1, "draws": 3, "rest": 0}
    assert unit(summarised, 70) == "70 data and 3 draws of the curvature data, one network"
    (table,) = [table for table in tables(summarised) if table.title.startswith("Draws of the curvature data")]
    assert CANDIDATE in [row[0] for row in table.sections[0][1]]


def test_a_single_batch_has_the_seconds_of_the_debiased_fit(drawn: dict[str, Any]) -> None:
    about = drawn["predictors"]["single batch, equal seconds"]
    assert 1 <= about["budget"] <= drawn["data"]["train"]
    assert all(draw["budget"] == about["budget"] for draw in about["draws"])
    (table,) = [table for table in tables(summarise([drawn])) if table.title == "Tuning and cost"]
    (row,) = [row for row in table.sections[0][1] if row[0] == "single batch, equal seconds"]
    assert f"{about['budget']} data" in row[1]


def test_equal_settings_are_those_of_the_reference(tmp_path: Path) -> None:
    from debiased_laplace import DebiasedLaplace

    task, context = Task.load(TASKS / "blobs.py"), Context(seed=1)
    methods = [m for m in standard_methods(24) if m.role]
    (record,) = run(task, tmp_path, [1], Context(), methods=methods, options=OPTIONS)
    shared = record["equal_settings"]
    about = record["predictors"][REFERENCE]
    assert shared == {"of": REFERENCE} | {key: about[key] for key in ("prior_precision", "temperature")}
    inputs, targets = task.definition.data(300, 70)
    for method in methods[:2]:
        la = DebiasedLaplace(task.model(context), "classification", seed=1)
        la.fit(task.call("train_loader", context), generator=1, **method.fit)
        la.prior_precision, la.output_temperature = shared["prior_precision"], shared["temperature"]
        probabilities = la(inputs, link_approx="mean_field").double()
        expected = float(torch.nn.functional.nll_loss(probabilities.log(), targets))
        equal = record["test"]["equal_settings"]
        assert equal["scores"][method.name]["nll"][0] == pytest.approx(expected, rel=FLOAT32)
    cell = record["test"]["equal_settings"]["differences"][BASELINE][CANDIDATE]["nll"]
    difference = [record["test"]["equal_settings"]["scores"][name]["nll"][0] for name in (CANDIDATE, BASELINE)]
    assert cell[0] == pytest.approx(difference[0] - difference[1], rel=1e-6, abs=1e-12)
    assert not [name for name in record["test"]["scores"] if name.endswith(EQUAL)]
    summarised = summarise([record])
    (table,) = [table for table in tables(summarised) if table.title.endswith("at equal settings")]
    assert f"of {REFERENCE} for both" in table.caption
    assert [row[0] for row in table.sections[0][1]] == [
        "test data, tuned, each by itself", "test data, equal settings", "strong shift, tuned, each by itself",
        "strong shift, equal settings",
    ]  # fmt: skip


# -- one comparison for all strong shifts ----------------------------------------------------------


def shifted(n: int, random: np.random.Generator) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray]:
    targets = torch.from_numpy(random.integers(3, size=n))
    sets = {
        severity: torch.from_numpy(random.standard_normal((n, 3))) + 2 * torch.eye(3)[targets]
        for severity in range(1, 6)
    }
    predictors = {"plain": lambda x: x.softmax(1), "flat": lambda x: (x / 3).softmax(1)}
    loaders = {severity: [(x, targets)] for severity, x in sets.items()}
    result = evaluate(predictors, [(sets[1], targets)], {"noise": loaders}, compare_with=["plain"], n_resamples=200)
    per_image = {
        name: np.mean([losses(sets[s].numpy() / scale, targets.numpy(), 1.0) for s in (3, 4, 5)], 0)
        for name, scale in (("plain", 1), ("flat", 3))
    }
    return result, per_image, targets.numpy()


def test_copies_of_the_same_images_are_one_comparison() -> None:
    result, per_image, _ = shifted(80, np.random.default_rng(0))
    strong = result["strong_shift"]
    assert (strong["shifts"], strong["n"], strong["sets"]) == (["noise 3", "noise 4", "noise 5"], 80, 1)
    for name, losses in per_image.items():
        value, error, low, high = strong["scores"][name]["nll"]
        assert value == pytest.approx(losses.mean(), rel=EXACT)
        assert (low, high) == pytest.approx(interval_of_mean(losses, 0.95), rel=EXACT)
        assert error == pytest.approx(losses.std(ddof=1) / math.sqrt(80), rel=0.2)  # of 200 resamples
    difference = per_image["flat"] - per_image["plain"]
    cell = strong["differences"]["plain"]["flat"]["nll"]
    assert cell[0] == pytest.approx(difference.mean(), rel=EXACT)
    assert cell[2:] == pytest.approx(list(interval_of_mean(difference, 0.95)), rel=EXACT)


def test_other_images_are_drawn_on_their_own() -> None:
    random = np.random.default_rng(1)
    sets = [
        (torch.from_numpy(random.standard_normal((n, 3))), torch.from_numpy(random.integers(3, size=n)))
        for n in (40, 60, 60)
    ]
    shifts = {"a": {3: [sets[1]]}, "b": {5: [sets[2]]}}
    result = evaluate({"plain": lambda x: x.softmax(1)}, [sets[0]], shifts, n_resamples=400)
    strong, one, two = result["strong_shift"], *(entry["scores"]["plain"]["nll"] for entry in result["shifts"])
    assert strong["sets"] == 2
    assert strong["scores"]["plain"]["nll"][0] == pytest.approx((one[0] + two[0]) / 2, rel=EXACT)
    independent = math.hypot(one[1], two[1]) / 2
    assert strong["scores"]["plain"]["nll"][1] == pytest.approx(independent, rel=0.15)  # of 400 resamples


def test_without_strong_shifts_there_is_no_such_comparison() -> None:
    inputs, targets = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    assert (
        evaluate({"a": lambda x: x.softmax(1)}, [(inputs, targets)], {"b": {1: [(inputs, targets)]}})["strong_shift"]
        is None
    )


# -- splits that overlap ---------------------------------------------------------------------------


def test_splits_of_one_data_set_are_no_independent_data() -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal(20)
    cells = [[value, 0.01, value - 0.02, value + 0.02] for value in values]
    mean, error, low, high = combine(cells, False, overlap=1 / 9)
    expected = values.std(ddof=1) * math.sqrt(1 / 20 + 1 / 9)  # Nadeau and Bengio, equation (6)
    half = student.ppf(0.975, 19) * expected
    assert [mean, error, low, high] == pytest.approx(
        [values.mean(), expected, values.mean() - half, values.mean() + half]
    )
    plain = combine(cells, False)
    assert (high - low) / (plain[3] - plain[2]) == pytest.approx(math.sqrt(20 / overlap_factor(20, 1 / 9)), rel=EXACT)
    assert combine(cells, True, overlap=1 / 9) == combine(cells, True)  # the same data: nothing overlaps


def test_twenty_splits_have_no_more_data_than_there_are() -> None:
    cells = [[1.0, 0.05, 0.8, 1.2]] * 20  # they agree by chance
    for overlap, sets in ((0.0, 20), (1 / 9, 10), (1.0, 2)):
        assert combine(cells, False, overlap)[2:] == pytest.approx(
            [1 - 0.2 / math.sqrt(sets), 1 + 0.2 / math.sqrt(sets)]
        )


@pytest.mark.parametrize("folds", [2, 3])
def test_folds_in_turn_have_the_error_of_all_data(folds: int) -> None:
    random = np.random.default_rng(0)
    cells = [[value, 0.1 + 0.01 * i, value - 0.2, value + 0.3] for i, value in enumerate(random.standard_normal(12))]
    values, errors = (np.array(cells)[:, column].reshape(-1, folds) for column in (0, 1))
    of_splits, n = values.mean(1), 12 // folds
    deviation = of_splits.std(ddof=1) / math.sqrt(n)
    half = student.ppf(0.975, n - 1) * deviation
    assert cross_fitted(cells, folds) == pytest.approx([
        values.mean(),
        math.sqrt(deviation**2 + (errors**2).mean() / folds),
        values.mean() - math.sqrt(half**2 + 0.04 / folds),
        values.mean() + math.sqrt(half**2 + 0.09 / folds),
    ])  # fmt: skip
    # One split: that the folds differ says nothing. The data's error alone is left, that of all of them.
    mean, error, low, high = cross_fitted(cells[:folds], folds)
    assert [mean - low, high - mean, error] == pytest.approx(
        [0.2 / math.sqrt(folds), 0.3 / math.sqrt(folds), math.sqrt((errors[0] ** 2).mean() / folds)]
    )
    undefined = cross_fitted([[math.nan, math.inf, -math.inf, math.inf], *cells[1:]], folds)
    assert math.isnan(undefined[0]) and undefined[1:] == [math.inf, -math.inf, math.inf]


@pytest.mark.parametrize("what", ["temperature", "temperature and power"])
def test_intervals_over_halves_in_turn_hold_and_are_no_longer_than_they_need(what: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "eval")
    splits = importlib.import_module("splits")
    network, ways = splits.losses(np.random.default_rng(0))
    found = splits.measure(1000, 4, ways[what], network, 300, 0)
    assert found[splits.IN_TURN]["holds"] >= 0.92  # 300 trials: 95 % with an error of 1.3 %
    assert 0.9 <= found[splits.IN_TURN]["length"] <= 1.3
    assert found[splits.INDEPENDENT]["length"] > 1.4
    assert found[splits.IN_TURN]["deviation"] < found[splits.INDEPENDENT]["deviation"]


def test_seeds_that_judge_folds_in_turn(drawn: dict[str, Any]) -> None:
    records = [copy.deepcopy(drawn) | {"seed": seed} for seed in (0, 1, 2, 3)]
    for shift, record in enumerate(records):
        record["test"]["targets"] = f"targets of {shift}"
        record["task"] = record["task"] | {"folds": 2}
        cell = record["test"]["scores"][CANDIDATE]["nll"]
        record["test"]["scores"][CANDIDATE]["nll"] = [cell[0] + 0.1 * shift**2, *cell[1:]]
    cells = [record["test"]["scores"][CANDIDATE]["nll"] for record in records]
    summarised = summarise(records)
    assert summarised["units"] == {"networks": 1, "splits": 4, "draws": 3, "rest": 0, "folds": 2}
    assert summarised["test"]["scores"][CANDIDATE]["nll"] == cross_fitted(cells, 2)
    for order in ([3, 0, 2, 1], [1, 0, 3, 2]):
        other = summarise([records[i] for i in order])
        assert other["seeds"] == [0, 1, 2, 3] and other["test"] == summarised["test"]
    assert unit(summarised, 70).startswith(
        "140 data, judged in 2 folds of which each is tuned on the other, in 2 splits"
    )
    # One fold without its others: splits that overlap. So it is with a method that failed for a seed.
    assert summarise(records[:3])["units"] == {"networks": 1, "splits": 3, "draws": 3, "rest": 60}
    assert summarise(records[:3])["test"]["scores"][CANDIDATE]["nll"] == combine(cells[:3], False, 70 / 60)
    for part in ("scores", "differences"):
        records[3]["test"][part] = copy.deepcopy(records[3]["test"][part])
    del records[3]["test"]["scores"][CANDIDATE]
    assert summarise(records)["test"]["scores"][CANDIDATE]["nll"] == combine(cells[:3], False, 1.0)


def test_the_unit_of_splits_is_said(drawn: dict[str, Any]) -> None:
    other = copy.deepcopy(drawn) | {"seed": 2}
    other["test"]["targets"] = "others"
    other["inputs"]["network"] = "another"
    summarised = summarise([drawn, other])
    assert summarised["units"] == {"networks": 2, "splits": 2, "draws": 3, "rest": 100}
    assert unit(summarised, 70) == (
        "2 splits with 70 data each (they overlap: corrected for 70 test data to 100 training data) and 2 networks and "
        "3 draws of the curvature data"
    )
    assert any("2 splits with 70 data each" in sentence for sentence in protocol(summarised))
    other["inputs"]["network"] = drawn["inputs"]["network"]  # then the data that tune and judge are what is split
    summarised = summarise([drawn, other])
    assert summarised["units"]["rest"] == 60
    assert "corrected for 70 test data to 60 validation data)" in unit(summarised, 70)


# -- marks -----------------------------------------------------------------------------------------


def test_settings_at_the_end_of_their_search() -> None:
    grid = torch.logspace(-3, 6, 46, dtype=torch.float64)
    assert of_prior([float(grid[-1])], grid) == {"prior precision": "largest"}
    assert of_prior([float(grid[1])], grid) == {}
    assert of_prior([1e-3, 1e-3, 5.0, 1e6], grid) == {
        "prior precision (2 of 4)": "smallest", "prior precision (1 of 4)": "largest"
    }  # fmt: skip
    assert of_prior([1.0], grid[:1]) == {}
    assert of_temperature(0.05) == {"temperature": "smallest"}  # what all K-FAC posteriors on CIFAR-10 once had
    assert of_temperature(20.0) == {"temperature": "largest"}
    assert of_temperature(1.3) == of_temperature(0.3) == {}
    assert of_temperature(1e-6 / 20, alone=1e-6) == {"temperature": "smallest"}
    assert of_temperature(1e-6, alone=1e-6) == {}
    assert [near_the_end(x, 0.0, 1.0) for x in (0.0005, 0.5, 0.9995)] == ["smallest", None, "largest"]


def test_the_noise_of_an_ensemble_at_the_end_of_its_search() -> None:
    inputs = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    models = [torch.nn.Linear(1, 1).double() for _ in range(2)]
    for model, slope in zip(models, (1.0, -1.0), strict=True):
        model.weight.data.fill_(slope)
        model.bias.data.zero_()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        noise = tuned_noise(models, [(inputs, torch.zeros(40, 1).double())])  # their mean has no error at all
    middle = float(inputs.square().mean().log())
    assert math.log(noise) == pytest.approx(middle + NOISE_RANGE[0], abs=0.05)
    assert told([str(warning.message) for warning in heard]) == {"noise": "smallest"}
    assert told(["Something else."]) == {}


def test_scores_worse_than_saying_nothing_are_marked(drawn: dict[str, Any]) -> None:
    summarised = summarise([copy.deepcopy(drawn)])
    assert is_worse_than_uniform(summarised, "nll", [1.1, 0, 0, 0])
    assert not is_worse_than_uniform(summarised, "nll", [math.log(3), 0, 0, 0])
    assert is_worse_than_uniform(summarised, "brier", [0.67, 0, 0, 0])
    assert not is_worse_than_uniform(summarised, "ece", [0.9, 0, 0, 0])
    assert not is_worse_than_uniform(summarised | {"regression": True}, "nll", [9.0, 0, 0, 0])
    for entry in (summarised["test"], *summarised["shifts"]):
        for scores in entry["scores"].values():
            scores["nll"] = [0.5, 0.1, 0.3, 0.7]
    summarised["shifts"][2]["scores"][MAP]["nll"] = [1.2, 0.1, 1.0, 1.4]
    (table,) = [table for table in tables(summarised) if table.title == "Shifted data: NLL"]
    marked = [cell for _, rows in table.sections for row in rows for cell in row if OF_NO_USE in cell]
    assert marked == [f"1.200 ± 0.100 {OF_NO_USE}"]
    assert f"{OF_NO_USE} Worse than saying 1/3 for every class." in table.caption


# -- calibration -----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
def test_what_a_calibrated_predictor_would_have(classes: int) -> None:
    random = np.random.default_rng(classes)
    probabilities = random.dirichlet(np.ones(classes), size=150)
    result = expected_errors(probabilities, 400, seed=1)
    labels = [np.array([random.choice(classes, p=row) for row in probabilities]) for _ in range(150)]
    every = [classification_metrics(probabilities, drawn) for drawn in labels]
    for score, (mean, deviation, low, high) in result.items():
        values = np.array([drawn[score] for drawn in every])
        error = math.hypot(values.std() / math.sqrt(150), deviation / math.sqrt(400))
        assert abs(values.mean() - mean) < MONTE_CARLO_Z * error, score
        inside = np.mean((values >= low) & (values <= high))
        assert abs(inside - 0.95) < MONTE_CARLO_Z * math.sqrt(0.05 * 0.95 / 150) + 0.02, score
    quick = expected_errors(probabilities, 400, seed=1, classwise=False)
    assert set(quick) == {"ece", "adaptive_ece"}
    assert quick["ece"][0] == pytest.approx(result["ece"][0], abs=MONTE_CARLO_Z * result["ece"][1] / math.sqrt(200))


def test_certain_predictions_cannot_be_miscalibrated_by_chance() -> None:
    assert expected_errors(np.eye(3)[np.arange(30) % 3]) == {
        name: [0.0, 0.0, 0.0, 0.0] for name in ("ece", "adaptive_ece", "smooth_ece", "top_label_ece", "classwise_ece")
    }


def test_noise_is_not_told_as_a_gain(drawn: dict[str, Any]) -> None:
    summarised = summarise([copy.deepcopy(drawn)])
    for name in (CANDIDATE, MAP):
        summarised["test"]["calibrated"][name]["ece"] = [0.024, 0.006, 0.014, 0.037]
    summarised["test"]["scores"][CANDIDATE]["ece"] = [0.010, 0.001, 0.008, 0.012]
    summarised["test"]["scores"][MAP]["ece"] = [0.022, 0.001, 0.02, 0.024]
    summarised["test"]["differences"][MAP][CANDIDATE]["ece"] = [-0.012, 0.002, -0.016, -0.008]

    def verdict() -> str:
        table = next(
            table for table in tables(summarised) if table.title == f"{CANDIDATE} against the others, test data"
        )
        (rows,) = [rows for section, rows in table.sections if section == f"minus {MAP}"]
        return next(row[2] for row in rows if row[0] == "ECE %")

    assert verdict() == "both as if calibrated"
    (ece,) = [row for row in statement(summarised)["rows"] if row["score"] == "ece"]
    assert ece["against"][MAP]["verdict"] == "both as if calibrated"
    shown, decides = tables(summarised)[0], deciding_table(summarised)
    cells = dict(zip(shown.columns, next(row for row in shown.sections[0][1] if row[0] == MAP), strict=True))
    assert cells["ECE %"] == "2.2 ± 0.1\n(calibrated: 2.4 [1.4, 3.7])"
    assert decides is not None
    assert decides.sections[0][1][1][2].startswith("≈ as well calibrated as 2.2")
    assert "As well calibrated: both errors" in decides.caption
    summarised["test"]["scores"][MAP]["ece"] = [0.05, 0.001, 0.02, 0.024]
    assert verdict() == "better"


# -- what is said ----------------------------------------------------------------------------------


def test_nothing_counts_cells(drawn: dict[str, Any]) -> None:
    summarised = summarise([drawn])
    text = markdown(summarised, title="All")
    assert not COUNTS.search(text), COUNTS.search(text)
    assert COUNTS.search("it beats the temperature in 8 and loses to it in 0")
    assert COUNTS.search("better in 16 of 18 strong shifts")
    assert COUNTS.search("11 to 1 of 18")


def test_data_that_tune_and_judge_are_named_and_comparisons_counted(drawn: dict[str, Any]) -> None:
    summarised = summarise([copy.deepcopy(drawn)])
    details = protocol(summarised)
    expected = (
        "tuned on 60 validation data and judged on 70 other test data, and on 70 in each shift. Trained on 100 data."
    )
    assert any(expected in sentence for sentence in details)
    count = comparisons(summarised) + 2  # and out-of-distribution data against two methods
    shown = next(table for table in tables(summarised) if table.title == f"{CANDIDATE} against the others, test data")
    rows = sum(len(rows) for _, rows in shown.sections)
    strong = next(table for table in tables(summarised) if table.title == "Strong shift: mean NLL")
    cells = sum(bool(cell) for _, rows in strong.sections for row in rows for cell in row[2:])
    assert count == rows + cells + 2 + 2  # and two at equal settings
    assert any(f"make {count} comparisons with a verdict" in sentence for sentence in details)
    assert not any("was chosen on this task" in sentence for sentence in details)
    summarised["task"]["name"] = CHOSEN_ON[0]
    assert any("was chosen on this task" in sentence for sentence in protocol(summarised))


def test_no_difference_shown_has_its_interval_and_is_not_as_good_as(drawn: dict[str, Any]) -> None:
    summarised = summarise([copy.deepcopy(drawn)])
    neither = [-0.001, 0.01, -0.02, 0.018]
    for second in (MAP, TEMPERATURE):
        summarised["test"]["differences"][second][CANDIDATE]["nll"] = neither
    summarised["strong_shift"]["differences"][TEMPERATURE_RULE][CANDIDATE]["nll"] = neither
    said, decides = statement(summarised)["answer"], deciding_table(summarised)
    assert "not shown to differ from the network's own and those of temperature scaling" in said
    assert "as good" not in said
    assert decides is not None
    cells = [cell for row in decides.sections[0][1] for cell in row]
    assert sum(f"[{MINUS}0.020, +0.018]" in cell for cell in cells) == 3


def test_groups_are_of_predictors_that_are_there() -> None:
    data = [(torch.eye(3), torch.arange(3))]
    with pytest.raises(ValueError, match=r"groups of the predictors \['a'\], got \['b'\]"):
        evaluate({"a": lambda x: x.softmax(1)}, data, groups={"a": ["a", "b"]})
    result = several.joined(
        [{"seconds": {"fit": 1.0}, "edges": {}}, {"seconds": {"fit": 3.0}, "edges": {"noise": "largest"}}]
    )
    assert (result["seconds"], result["edges"]) == ({"fit": 2.0}, {"noise": "largest"})
    with pytest.raises(ValueError, match="at least one draw, got draws=0"):
        Options(draws=0)
