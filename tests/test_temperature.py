"""Temperatures and priors: exact where data determine them; a choice, a warning and a mark where they do not."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logsumexp
from torch import nn

from debiased_laplace import DebiasedLaplace
from debiased_laplace._checks import NonFiniteError
from debiased_laplace.evaluation import Context, Method, run, summarise, tuned_temperature
from debiased_laplace.evaluation.predictors.baselines import tuned_noise
from debiased_laplace.evaluation.report.tables import tables
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian
from debiased_laplace.posterior.curve import PriorCurve
from debiased_laplace.posterior.search import Search, ValidationLoss
from debiased_laplace.posterior.temperature import (
    AS_GOOD,
    TEMPERATURES,
    minimise,
    temperature_scaling,
    undetermined_in,
    unit_of,
)
from debiased_laplace.posterior.tune import tune
from tests.networks import ZOO
from tests.test_suite import OPTIONS, task_of
from tests.test_tuning import data, fitted, noisy
from tests.tolerances import EXACT, assert_equal

QUICK = settings(deadline=None, max_examples=40, derandomize=True)
FINE = torch.logspace(-3, 6, 28, dtype=torch.float64)


def categorical(logits: np.ndarray, targets: np.ndarray) -> Any:
    return temperature_scaling(Categorical(), torch.from_numpy(logits), torch.from_numpy(targets))


def loss_at(logits: np.ndarray, targets: np.ndarray, temperature: float) -> float:
    scaled = logits / temperature
    return float((logsumexp(scaled, 1) - scaled[np.arange(len(scaled)), targets]).mean())


# -- of the network alone --------------------------------------------------------------------------


@QUICK
@given(
    st.integers(1, 30), st.integers(2, 5), st.integers(0, 1000), st.sampled_from([1e-30, 1e-10, 1.0, 1e10, 1e30]),
    st.sampled_from(["drawn", "right", "wrong", "tied", "zero", "copies", "one class"]),
)  # fmt: skip
@example(1, 2, 0, 1e30, "right")
@example(1, 2, 0, 1e-30, "wrong")
def test_a_temperature_whatever_the_data(n: int, classes: int, seed: int, scale: float, kind: str) -> None:
    random = np.random.default_rng(seed)
    logits = 3 * random.standard_normal((n, classes))
    if kind == "copies":
        logits = logits[random.integers(n, size=n)]
    if kind in ("tied", "zero"):
        logits = np.repeat(logits[:, :1], classes, 1) * (kind == "tied")
    probabilities = np.exp(logits / 2 - logsumexp(logits / 2, 1, keepdims=True))
    targets = (probabilities.cumsum(1) < random.random((n, 1))).sum(1).clip(max=classes - 1)
    targets = {"right": logits.argmax(1), "wrong": logits.argmin(1), "one class": 0 * targets}.get(kind, targets)
    found = categorical(scale * logits, targets)
    own = logits[np.arange(n), targets]
    if (own == logits.max(1)).all():
        assert (found.value, "right (or tied)" in found.undetermined) == (1.0, True)
    elif own.mean() <= logits.mean():
        assert (found.value, "no better than equal" in found.undetermined) == (TEMPERATURES[1], True)
    else:
        assert found.undetermined is None

        def slope(logarithm: float) -> float:
            scaled = math.exp(logarithm) * logits
            weights = np.exp(scaled - logsumexp(scaled, 1, keepdims=True))
            return float(((weights * logits).sum(1) - own).mean())

        expected = scale / math.exp(brentq(slope, -80, 80, xtol=1e-14))
        assert found.value == pytest.approx(expected, rel=1e-6)
        assert found.loss == pytest.approx(loss_at(logits, targets, expected / scale), rel=EXACT)
    assert math.isfinite(found.loss)


@pytest.mark.parametrize("margin", [1e-30, 5.0, 100.0, 1e4, 1e30])
def test_data_that_are_all_right_leave_the_network_as_it_is(margin: float) -> None:
    batches = [(margin * torch.eye(5, dtype=torch.float64), torch.arange(5))]
    message = r"do not determine the temperature: all 5 predictions on them are right.*It is 1.*makes mistakes"
    with pytest.warns(UserWarning, match=message):
        temperature, loss = tuned_temperature(nn.Identity(), batches)
    assert temperature == 1
    assert loss == pytest.approx(math.log1p(4 * math.exp(-margin)), rel=EXACT, abs=1e-15)


def test_the_first_mistake_on_other_data_costs_what_it_did() -> None:
    """A validation set without a mistake, a test set with one in ten: its loss stays, and is not ten times as large."""
    right = 5.0 * torch.eye(10)[torch.arange(40) % 10]
    with pytest.warns(UserWarning, match="do not determine the temperature"):
        temperature, _ = tuned_temperature(nn.Identity(), [(right, torch.arange(40) % 10)])
    targets = torch.where(torch.arange(40) % 10 == 0, 5, torch.arange(40) % 10)
    before, after, sharp = (
        float(nn.functional.cross_entropy(right / tau, targets)) for tau in (1.0, temperature, 0.100876)
    )
    assert after == before
    assert sharp > 8 * before


def test_a_network_that_is_worse_than_none() -> None:
    with pytest.warns(UserWarning, match=r"no better than equal probabilities.*It is 20; check the labels"):
        assert tuned_temperature(nn.Identity(), [(torch.eye(4), (torch.arange(4) + 1) % 4)])[0] == 20


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_bernoulli(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = 4 * torch.randn(50, 2, generator=generator, dtype=torch.float64)
    targets = (torch.rand(50, 2, generator=generator, dtype=torch.float64) < (outputs / 2).sigmoid()).double()

    def loss(logarithm: float) -> float:
        values = outputs / math.exp(logarithm)
        return float(nn.functional.binary_cross_entropy_with_logits(values, targets, reduction="none").sum(1).mean())

    expected = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10})
    found = temperature_scaling(Bernoulli(), scale * outputs, targets)
    assert found.value == pytest.approx(scale * math.exp(expected.x), rel=1e-6)
    assert found.loss == pytest.approx(expected.fun, rel=EXACT)
    right = temperature_scaling(Bernoulli(), scale * outputs, (outputs > 0).double())
    assert (right.value, "right (or tied)" in str(right.undetermined)) == (1.0, True)


def test_outputs_that_are_not_finite() -> None:
    with pytest.raises(NonFiniteError, match=r"the outputs of the validation data, got 1 of 4.*Look for NaN"):
        temperature_scaling(Categorical(), torch.tensor([[0.0, math.nan], [0.0, 1.0]]), torch.tensor([0, 1]))


def test_the_nearest_to_one_of_equally_good_temperatures() -> None:
    assert minimise(lambda tau: 3.0) == (1.0, 3.0)
    assert minimise(lambda tau: max(tau, 0.3))[0] == pytest.approx(0.3, rel=1e-6)
    assert minimise(lambda tau: max(-tau, -4.0))[0] == pytest.approx(4.0, rel=1e-6)
    assert minimise(lambda tau: math.log(tau / 0.7) ** 2)[0] == pytest.approx(0.7, rel=1e-6)
    assert minimise(lambda tau: -tau)[0] == pytest.approx(TEMPERATURES[1], rel=1e-6)
    assert minimise(lambda tau: math.log(tau / 7e8) ** 2, 1e9)[0] == pytest.approx(7e8, rel=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_minimum_at_an_end_is_found_at_once_but_for_a_better_one_between(sign: int) -> None:
    low, high = (math.log(end) for end in TEMPERATURES)
    tried: list[float] = []

    def tilted(tau: float, depth: float, place: float = 0.4) -> float:
        tried.append(tau)
        share = (math.log(tau) - low) / (high - low)
        share = share if sign > 0 else 1 - share
        return share - depth * math.exp(-((6 * (share - place)) ** 2))

    end = TEMPERATURES[0 if sign > 0 else 1]
    assert minimise(lambda tau: tilted(tau, 0.0)) == (pytest.approx(end), pytest.approx(0.0, abs=1e-12))
    assert len(tried) < 15
    value, least = minimise(lambda tau: tilted(tau, 3.0))
    assert least < -2 and value == pytest.approx(math.exp(low + (high - low) * (0.4 if sign > 0 else 0.6)), rel=0.05)
    # The loss falls towards the end until just before it.
    close = lambda tau: (math.log(tau / end) - 1e-3 * sign) ** 2  # noqa: E731
    assert minimise(close)[0] == pytest.approx(end * math.exp(1e-3 * sign), rel=1e-6)


# -- together with a prior -------------------------------------------------------------------------


def all_right() -> tuple[Any, list]:
    result = fitted(Categorical())
    inputs = ZOO["mlp"].inputs(30, seed=9)
    return result, [(inputs, result.network.outputs(inputs).argmax(1))]


@pytest.mark.parametrize("link", ["probit", "mc", "mean_field"])
@pytest.mark.parametrize("selection", ["best", "one_standard_error"])
def test_a_joint_search_leaves_the_temperature_too(link: str, selection: str) -> None:
    result, batches = all_right()
    arguments = result.network, result.posterior, Categorical(), batches, FINE
    with pytest.warns(UserWarning, match="do not determine the temperature: all 30 predictions"):
        found = tune(*arguments, per_part=False, temperature=True, link=link, selection=selection)
    alone = categorical(result.network.outputs(batches[0][0]).numpy(), batches[0][1].numpy())
    assert found.temperature == 1
    assert found.temperature_alone == (alone.value, pytest.approx(alone.loss, rel=EXACT))
    assert "temperature" in found.undetermined
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        without = tune(*arguments, per_part=False, temperature=False, link=link, selection=selection)
    assert_equal(found.prior_precisions, without.prior_precisions)


@pytest.mark.parametrize("link", ["probit", "mean_field"])
def test_the_most_uncertain_of_equally_good_priors(link: str) -> None:
    """All right: the less uncertainty the better, until no digit of the loss tells any more."""
    result, batches = all_right()
    wide = torch.logspace(-3, 12, 61, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"do not determine the prior precision: all from .* equally good"):
        curve = tune(result.network, result.posterior, Categorical(), batches, wide, link=link).curve
    good = curve.losses <= curve.losses.min() + AS_GOOD
    assert curve.best == float(wide[good][0]) < float(wide[-1])
    assert curve.is_flat
    with pytest.warns(UserWarning, match="do not determine the prior precision: all from"):
        found = tune(
            result.network, result.posterior, Categorical(), batches, wide, per_part=False, temperature=False, link=link
        )
    assert found.undetermined == ("prior precision",)
    assert float(found.prior_precisions) == pytest.approx(curve.best, rel=1.8)  # one step of the grid
    assert found.loss <= float(curve.losses.min()) + 2 * AS_GOOD


def test_a_part_that_nothing_depends_on_keeps_its_uncertainty() -> None:
    """A last layer of zeros lets nothing through to the first."""
    result, batches = noisy(scale=0.0)
    with pytest.warns(UserWarning, match="do not determine the prior precision of 0: every value of the grid is as"):
        found = tune(result.network, result.posterior, Categorical(), batches, FINE, per_part=True, temperature=True)
    assert float(found.prior_precisions[0]) == pytest.approx(float(FINE[0]), rel=EXACT)
    assert "prior precision" in found.undetermined


def test_a_determined_search_says_nothing() -> None:
    result, batches = noisy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tune(result.network, result.posterior, Categorical(), batches, FINE, per_part=False, temperature=True)
    assert found.undetermined == ()
    pairs = [(result.network.outputs(inputs), labels) for inputs, labels in batches]
    outputs, targets = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert found.temperature_alone[0] == pytest.approx(categorical(outputs.numpy(), targets.numpy()).value, rel=EXACT)


@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_the_range_moves_with_the_scale_of_the_outputs(scale: float) -> None:
    """Outputs and their deviations in other units are the same problem with another temperature."""
    result, batches = noisy()
    outputs = torch.cat([result.network.outputs(inputs) for inputs, _ in batches])
    targets = torch.cat([labels for _, labels in batches])
    table, found = 0.1 * torch.ones(1, 1, *outputs.shape, dtype=torch.float64), []
    for factor in (1.0, scale):
        loss = ValidationLoss(Categorical(), "probit", None, 1.0, factor * outputs, targets)
        search = Search(loss, factor**2 * table, torch.ones(1, dtype=torch.float64), None)
        search.unit = unit_of(temperature_scaling(Categorical(), factor * outputs, targets).value)
        found.append(search.profile(0))
    assert found[1][0] == pytest.approx(scale * found[0][0], rel=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=EXACT)


def test_infinite_losses_of_some_priors() -> None:
    curve = PriorCurve(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([math.inf, 1.0, math.inf]), "probit")
    assert (curve.best, curve.at_edge, curve.is_flat) == (2.0, False, False)
    la = DebiasedLaplace(ZOO["mlp"].model(), "classification")
    la.fit([data(Categorical(), 12)], budget=None)
    losses = iter([math.inf, 2.0, 1.0, 1.0, math.inf])
    la.optimize_prior_precision(
        method="gridsearch", val_loader=[data(Categorical(), 8, seed=4)], grid_size=5, log_prior_prec_min=-2,
        log_prior_prec_max=2, loss=lambda probabilities, targets: next(losses),
    )  # fmt: skip
    assert float(la.prior_precision) == pytest.approx(1.0)  # of two that are as good, the more uncertain
    with pytest.raises(NonFiniteError, match="validation losses, got 5 of 5"):
        la.optimize_prior_precision(
            method="gridsearch", val_loader=[data(Categorical(), 8, seed=4)], grid_size=5,
            loss=lambda probabilities, targets: math.inf,
        )  # fmt: skip


@QUICK
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.sampled_from([1e-30, 1.0, 1e30]), st.booleans())
def test_curves_whatever_the_losses(values: list[float], scale: float, ascending: bool) -> None:
    grid = torch.logspace(-3, 3, len(values), dtype=torch.float64)
    losses = scale * torch.tensor(values, dtype=torch.float64)
    grid, losses = (grid, losses) if ascending else (grid.flip(0), losses.flip(0))
    for tolerance in (0.0, AS_GOOD):
        curve = PriorCurve(grid, losses, "probit", tolerance)
        good = grid[losses <= losses.min() + tolerance]
        assert curve.best == float(good.min())
        upwards = int((grid >= good.min()).sum())
        assert curve.is_flat == (upwards == len(good) > 1)


# -- noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 1e-16])
def test_errors_that_are_all_zero_leave_the_noise(shift: float) -> None:
    result = fitted(Gaussian(), noise_variance=0.3)
    inputs = ZOO["mlp"].inputs(20, seed=4)
    batches = [(inputs, result.network.outputs(inputs) * (1 + shift))]
    with pytest.warns(UserWarning, match=r"observation noise: all errors on them are zero.*It is as it was"):
        found = tune(result.network, result.posterior, Gaussian(), batches, FINE, noise=True)
    assert found.noise_variance == pytest.approx(0.3, rel=EXACT)
    assert bool(found.curve.losses.isfinite().all())
    for models in ([nn.Identity()], [nn.Identity()] * 3):
        with pytest.warns(UserWarning, match=r"observation noise.*It is 1; use validation data"):
            assert tuned_noise(models, [(inputs, inputs * (1 + shift))]) == 1
        with pytest.warns(UserWarning, match="observation noise"):
            assert tuned_noise(models, [(0 * inputs, 0 * inputs)]) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e30])
def test_small_errors_are_errors(scale: float) -> None:
    targets = scale * torch.randn(20, 1, dtype=torch.float64)
    assert tuned_noise([nn.Identity()], [(targets * (1 + 1e-6), targets)]) == pytest.approx(
        1e-12 * float(targets.square().mean()), rel=1e-6
    )


# -- the report ------------------------------------------------------------------------------------


def test_what_is_not_determined_is_in_the_record_and_the_report(tmp_path: Path) -> None:
    right = ("return cut(*data(200 + seed, 60))", "return cut(3 * CENTRES.repeat(10, 1), torch.arange(3).repeat(10))")
    methods = (
        Method("MAP", "map"), Method("temperature scaling", "temperature"),
        Method("debiased", fit={"budget": 24}, tune={"tune_temperature": True}, role="candidate"),
    )  # fmt: skip
    records = run(task_of(tmp_path, right), tmp_path, range(2), Context(), methods=methods, options=OPTIONS)
    for record in records:
        assert record["predictors"]["MAP"]["undetermined"] == []
        for name in ("temperature scaling", "debiased"):
            assert "temperature" in record["predictors"][name]["undetermined"]
        assert record["predictors"]["temperature scaling"]["temperature"] == 1
        first, second = (record["test"]["scores"][name] for name in ("MAP", "temperature scaling"))
        assert first == second
    summary = summarise(records)
    (cost,) = [table for table in tables(summary) if table.title == "Tuning and cost"]
    rows = {row[0]: row[1] for row in cost.sections[0][1]}
    assert "not determined" not in rows["MAP"]
    assert rows["temperature scaling"] == "temperature 1.00, not determined: temperature"
    assert "Not determined: the validation data do not say it, and it is a choice." in cost.caption


def test_undetermined_quantities_are_found_in_warnings() -> None:
    texts = [
        "Another.",
        "Validation data do not determine the noise: none.",
        "Validation data do not determine the a: b.",
    ]
    assert undetermined_in([*texts, texts[1]]) == ["noise", "a"]


def test_the_warning_is_at_the_callers_line() -> None:
    la = DebiasedLaplace(ZOO["mlp"].model(), "classification")
    la.fit([data(Categorical(), 12)], budget=None)
    inputs = ZOO["mlp"].inputs(10, seed=4)
    batches = [(inputs, la.model(inputs).argmax(1))]
    with pytest.warns(UserWarning, match="do not determine the temperature") as caught:
        la.optimize_prior_precision(method="gridsearch", val_loader=batches, tune_temperature=True)
    assert {warning.filename for warning in caught} == {__file__}
