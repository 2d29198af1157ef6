"""The monitor of a training: its numbers, its budget, and that the training is as it would be without it."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from debiased_laplace import Quadratic
from debiased_laplace.quadratic.instruments import (
    alignment,
    directional_bias,
    product_noise,
    signal_to_noise,
    suggest_batch_size,
)
from debiased_laplace.quadratic.monitor import SCALARS, CurvatureReading, Monitor
from tests.documented import DOCS, executed
from tests.tolerances import assert_equal

K, SIZE, TOLERANCE = 2, 12, 0.1


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batches(n: int, size: int = SIZE, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, size, 3, generator=generator, dtype=dtype)
    noise = 0.5 * torch.randn(n, size, 3, generator=generator, dtype=dtype)
    return [(x, (x + e).argmax(1)) for x, e in zip(inputs, noise, strict=True)]


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def counted(monitor: Monitor, clock: Clock, seconds: float):
    """Measurements that take so long, and are none."""

    def measure():
        clock.now += seconds
        return None, "not measured"

    monitor._measure = measure


# -- what is measured --------------------------------------------------------------------------------


def dense(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss-Newton matrix and gradient of every datum, by autograd: ``[N, D, D]``, ``[N, D]``."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(values, datum):
        return functional_call(model, values, datum)

    matrices, gradients = [], []
    for datum, label in zip(x, y, strict=True):
        jacobian = torch.cat([j.flatten(1) for j in jacrev(outputs)(parameters, datum).values()], 1)
        logits = model(datum).detach()
        matrices.append(jacobian.mT @ hessian(F.cross_entropy)(logits, label) @ jacobian)
        gradients.append(jacobian.mT @ (logits.softmax(0) - F.one_hot(label, 3)))
    return torch.stack(matrices), torch.stack(gradients)


def test_the_numbers_are_those_of_dense_autograd():
    model, three = network(), batches(3)
    monitor = Monitor(model, "classification", every=3, budget=None, n_directions=K, tolerance=TOLERANCE)
    for batch in three:
        reading = monitor.step(batch)
    (first, slopes1), (second, slopes2), (third, _) = (dense(model, *batch) for batch in three)
    pairs = [torch.linalg.eigh(each.mean(0)) for each in (first, second)]
    (values, directions), (values2, directions2) = ((v.flip(0)[:K], u.flip(1)[:, :K].mT) for v, u in pairs)
    along = [
        torch.einsum("kd,nde,ke->nk", u, matrices, u) for u, matrices in ((directions, second), (directions2, first))
    ]
    ratios = (values + values2) / (along[0].mean(0) + along[1].mean(0))
    snr = [  # squared mean over variance
        (of.mean(0).square() / of.var(0, correction=0)).tolist()
        for of in (slopes2 @ directions.mT, slopes1 @ directions2.mT, *along)
    ]
    deviations = (second.mean(0) - third.mean(0)) @ directions.mT / math.sqrt(2)
    deviations = deviations.mT - (deviations.mT * directions).sum(1, keepdim=True) * directions
    noise = SIZE * deviations.square().sum(1)
    spikes = (values + (values.square() - 4 * noise / SIZE).sqrt()) / 2
    sizes = noise / (spikes.square() * TOLERANCE / (2 + TOLERANCE))
    expected = {
        "bias": float(ratios.log().mean().exp()),
        "alignment": float((directions @ directions2.mT).square().sum(1).mean()),
        "slope_snr": statistics.median(snr[0] + snr[1]),
        "curvature_snr": statistics.median(snr[2] + snr[3]),
        "suggested_batch_size": statistics.median(sizes.ceil().tolist()),
    }
    (entry,) = monitor.history
    assert expected["bias"] > 1.01
    assert_equal(*(torch.tensor([of[name] for name in SCALARS]).double() for of in (entry, expected)))
    assert_equal(reading.curve.noise_along, noise)
    assert_equal(reading.curve.spikes, spikes)


def test_the_numbers_are_those_of_the_instruments():
    model, three = network(), batches(3)
    first, second, third = quadratics = tuple(Quadratic(model, batch, "classification") for batch in three)
    reading = CurvatureReading.of(quadratics, K, TOLERANCE)
    of_pair = directional_bias([first, second], third, K).curvatures
    own, other = of_pair.mean_own.value, (of_pair.batches[0, 1] + of_pair.batches[1, 0]) / 2
    _, directions = first.eigenpairs(K)
    noise = product_noise([second, third], directions, across=True)
    assert_equal(reading.curve.overstatement.value[0], own / other)
    assert_equal(reading.alignment.overlaps, alignment(directions, second.eigenpairs(K)[1]).overlaps)
    assert_equal(reading.signal_to_noise[0].slope_snr, signal_to_noise(first, K, second).slope_snr)
    assert_equal(reading.signal_to_noise[1].curvature_snr, signal_to_noise(second, K, first).curvature_snr)
    assert_equal(reading.suggestion.predicted, suggest_batch_size(TOLERANCE, reading.curve.spikes, noise).predicted)
    assert set(reading.record()) == {"curve", "alignment", "signal_to_noise", "suggestion"}


class Written(list):
    """A writer that keeps what it is given."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.append((tag, step, value))


def test_what_is_lost_in_noise_is_none_and_not_written():
    (x, y), (x2, y2), (x3, y3) = batches(3)
    writer = Written()
    monitor = Monitor(network(), "classification", every=3, budget=None, n_directions=K, writer=writer)
    for batch in ((x, y), (100 * x2, y2), (0 * x3, y3)):  # which have little in common
        reading = monitor.step(batch)
    assert reading.suggestion.predicted.isinf().all()
    assert monitor.history[0]["suggested_batch_size"] is None
    names = {tag.removeprefix("curvature/") for tag, _, _ in writer}
    assert names == {*SCALARS, "cost"} - {"suggested_batch_size"}
    assert tuple(reading.scalars()) == SCALARS


@pytest.mark.parametrize(
    "settings", [{"curvature": "hessian"}, {"parameters": "last_layer"}, {"chunk_size": 5}], ids=str
)
def test_the_quadratics_are_as_the_monitor_is_told(settings):
    model, three = network(), batches(3)
    monitor = Monitor(model, "classification", every=1, budget=None, n_directions=K, **settings)
    reading = [monitor.step(batch) for batch in three][-1]
    quadratics = tuple(Quadratic(model, batch, "classification", **settings) for batch in three)
    assert_equal(reading.curve.batch_eigenvalues[0, 1], quadratics[1].eigenpairs(K)[0])


# -- the training ------------------------------------------------------------------------------------


class Trained(nn.Module):
    """With everything that a measurement could disturb."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.frozen, self.head = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.frozen(self.body(x)))


def run(with_monitor: bool, n_workers: int = 0) -> list:
    """Everything that is left after a training, the losses included."""
    model = Trained()
    seen: list[str] = []
    model.head.register_forward_hook(lambda module, inputs, outputs: seen.append("forward") if model.training else None)
    model.head.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward"))
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches(9, dtype=torch.float32), strict=True)))
    loader = DataLoader(data, SIZE, shuffle=True, drop_last=False, num_workers=n_workers)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    monitor = Monitor(model, "classification", every=4, budget=None, n_directions=K)
    losses = []
    for _ in range(2):
        for x, y in iter(loader):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if with_monitor:
                monitor.step((x, y))
    if with_monitor:
        assert [entry["step"] for entry in monitor.history] == [4, 8, 12, 16]
        assert all(entry["bias"] is not None for entry in monitor.history)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flags = [p.requires_grad for p in model.parameters()], [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()]
    tensors = [*losses, *gradients, *model.state_dict().values(), torch.get_rng_state(), torch.rand(2)]
    return [tensors, flags, hooks, seen.count("forward"), seen.count("backward")]


@pytest.mark.parametrize("n_workers", [0, 1])
def test_the_training_is_the_same_to_the_last_bit(n_workers):
    (tensors, *rest), (expected, *expected_rest) = run(True, n_workers), run(False, n_workers)
    assert len(tensors) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    assert rest == expected_rest


def test_it_works_within_no_grad_and_autocast():
    model, three = network(torch.float32), batches(3, dtype=torch.float32)
    monitor = Monitor(model, "classification", every=3, budget=None, n_directions=K)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        reading = [monitor.step(batch) for batch in three][-1]
    by_hand = Quadratic(model, three[0], "classification").eigenpairs(K)[0]
    assert_equal(reading.curve.batch_eigenvalues[0, 0], by_hand)


def test_batches_are_copied():
    model, three = network(), batches(3)
    place = three[0][0].clone(), three[0][1].clone()
    monitor = Monitor(model, "classification", every=3, budget=None, n_directions=K)
    for x, y in three:
        place[0].copy_(x), place[1].copy_(y)
        reading = monitor.step(place)
    expected = Quadratic(model, three[0], "classification").eigenpairs(K)[0]
    assert_equal(reading.curve.batch_eigenvalues[0, 0], expected)


# -- when it measures --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.05, 0.5])
def test_a_budget_bounds_the_share_of_time(budget):
    clock = Clock()
    monitor = Monitor(network(), "classification", every=10, budget=budget, clock=clock)
    counted(monitor, clock, 7.0)
    shares, (batch,) = [], batches(1)
    for _ in range(3000):
        clock.now += 1.0
        monitor.step(batch)
        shares.append(monitor.cost)
    steps = [entry["step"] for entry in monitor.history]
    assert steps[0] == 10  # which tells what one costs
    assert all(step % 10 == 0 for step in steps)
    assert all(share <= budget for step, share in enumerate(shares, 1) if step >= steps[1])
    assert shares[-1] > 0.9 * budget  # and it uses what it may
    assert monitor.own_time == 7.0 * len(steps)
    assert monitor.training_time == 2999.0
    assert monitor.skipped == 300 - len(steps)
    assert f"{len(steps)} measurements, {monitor.skipped} left out" in repr(monitor)
    assert monitor.history[-1]["cost"] == pytest.approx(7.0 * len(steps) / (steps[-1] - 1))


def test_one_that_takes_longer_than_the_last_is_made_up_for():
    clock = Clock()
    monitor = Monitor(network(), "classification", every=10, budget=0.1, clock=clock)
    (batch,) = batches(1)
    for step in range(1, 2001):
        counted(monitor, clock, 50.0 if 200 < step < 400 else 5.0)
        clock.now += 1.0
        monitor.step(batch)
    assert 0.09 < monitor.cost <= 0.1


def test_without_a_budget_it_measures_every_n_steps_and_batches_are_asked_for_only_then():
    given = iter(batches(9))
    monitor = Monitor(network(), "classification", every=5, budget=None, n_directions=K)
    asked, state = [], torch.get_rng_state()
    for step in range(1, 16):
        monitor.step(lambda: asked.append((step, torch.rand(1))) or next(given))  # noqa: B023
    assert torch.equal(torch.get_rng_state(), state)
    assert [step for step, _ in asked] == [3, 4, 5, 8, 9, 10, 13, 14, 15]
    assert [entry["step"] for entry in monitor.history] == [5, 10, 15]


def test_steps_may_have_numbers_and_several_batches():
    monitor = Monitor(network(), "classification", every=100, budget=None, n_directions=K)
    for number in range(1040, 1101):  # continued from a checkpoint, two batches of each step
        for batch in batches(2):
            monitor.step(batch, number)
    assert [entry["step"] for entry in monitor.history] == [1041, 1100]


def test_steps_that_start_again_are_another_training():
    clock = Clock()
    monitor = Monitor(network(), "classification", every=10, budget=None, n_directions=K, clock=clock)
    for _ in range(2):
        for number in range(1, 24):
            monitor.step(batches(1)[0], number)
            clock.now += 1.0
        clock.now += 1000.0  # between trainings
    assert [entry["step"] for entry in monitor.history] == [10, 20, 10, 20]
    assert monitor.training_time == 2 * 22


def test_trouble_of_a_later_measurement_is_a_problem(monkeypatch):
    monitor, data = Monitor(network(), "classification", every=3, budget=None, n_directions=K), batches(3)
    for batch in data:
        monitor.step(batch)

    def failing(*_):
        raise RuntimeError("linalg.eigh did not converge")

    monkeypatch.setattr(CurvatureReading, "of", failing)
    with pytest.warns(UserWarning, match="training goes on: linalg.eigh"):
        for batch in data:
            monitor.step(batch)
    assert monitor.history[1]["problem"] == "linalg.eigh did not converge"
    fresh = Monitor(network(), "classification", every=3, n_directions=K)
    with pytest.raises(RuntimeError, match=r"linalg\.eigh"):
        for batch in data:
            fresh.step(batch)


def test_small_and_empty_batches_are_passed_over_and_large_ones_cut():
    model = network()
    monitor = Monitor(model, "classification", every=4, budget=None, n_directions=K)
    (x, y), (x2, y2), (x3, y3) = batches(3)
    longer = torch.cat([x3, x]), torch.cat([y3, y])
    readings = [
        monitor.step(batch) for batch in ((x[:0], y[:0]), (x, y), (x2[:5], y2[:5]), (x2, y2), (x[:0], y[:0]), longer)
    ]
    assert [reading is not None for reading in readings] == [False] * 5 + [True]
    assert monitor.history[0]["step"] == 6
    by_hand = CurvatureReading.of(
        tuple(Quadratic(model, batch, "classification") for batch in ((x, y), (x2, y2), (x3, y3))), K, TOLERANCE
    )
    assert readings[-1].scalars() == by_hand.scalars()


def test_batches_that_are_all_too_small_are_told_of():
    monitor = Monitor(network(), "classification", every=3, n_data=20)
    with pytest.warns(UserWarning, match=r"at least 20 data .*, got 10 smaller ones, the last of 12"):
        for batch in batches(12):
            monitor.step(batch)
    assert monitor.history == []


# -- trouble -----------------------------------------------------------------------------------------


def test_a_training_that_diverges_goes_on():
    model, written = network(), Written()
    monitor = Monitor(model, "classification", every=3, budget=None, n_directions=K, writer=written, tag="a")
    for batch in batches(3):
        monitor.step(batch)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.warns(UserWarning, match=r"at step 6, and the training goes on: .*finite loss"):
        for batch in batches(3):
            assert monitor.step(batch) is None
    for batch in batches(3):  # and it is told once
        monitor.step(batch)
    good, bad, _ = monitor.history
    assert [bad[name] for name in SCALARS] == [None] * 5 and "finite loss" in bad["problem"]
    assert "problem" not in good
    values = {(tag, step): value for tag, step, value in written}
    assert {tag for tag, step in values if step == 3} == {f"a/{name}" for name in (*SCALARS, "cost")}
    assert {tag for tag, step in values if step > 3} == {"a/cost"}
    assert values["a/bias", 3] == good["bias"]


def test_directions_that_training_leaves_without_curvature_are_a_problem_and_no_error():
    model, data = network(), batches(6)
    monitor = Monitor(model, "classification", every=3, budget=None, n_directions=K)
    for batch in data[:3]:
        monitor.step(batch)
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([2000.0, 0, 0]))
    with pytest.warns(UserWarning, match="training goes on: The curvature of .* is zero"):
        for batch in data[3:]:
            monitor.step(batch)
    assert monitor.history[1]["bias"] is None and "is zero" in monitor.history[1]["problem"]


def test_what_cannot_be_measured_at_all_is_an_error_at_once():
    monitor = Monitor(network(), "classification", every=3, budget=None, n_directions=40)
    with pytest.raises(ValueError, match="from 1 to 38, the number of parameters"):
        for batch in batches(3):
            monitor.step(batch)
    with pytest.raises(TypeError, match="Expected batches that are pairs"):
        Monitor(network(), "classification", every=1).step(torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"every": 0}, ValueError, "whole number every"),
        ({"budget": 0.0}, ValueError, "positive, finite budget"),
        ({"tolerance": -1}, ValueError, "tolerance"),
        ({"n_directions": 0}, ValueError, "n_directions"),
        ({"n_data": 0}, ValueError, "n_data"),
        ({"chunk_size": -3}, ValueError, "chunk_size"),
        ({"model": "network"}, TypeError, "Expected a model"),
        ({"curvature": "fisher"}, ValueError, "a curvature out of"),
        ({"writer": []}, TypeError, r"add_scalar\(tag, value, step\).* got list"),
        ({"likelihood": "clasification"}, ValueError, "clasification"),
    ],
)
def test_wrong_settings_are_errors_before_the_training(settings, error, words):
    with pytest.raises(error, match=words):
        Monitor(**{"model": network(), "likelihood": "classification", **settings})


# -- checkpoints and TensorBoard ---------------------------------------------------------------------


def test_it_goes_on_from_a_checkpoint(tmp_path):
    clock = Clock()

    def new() -> Monitor:
        return Monitor(network(), "classification", every=6, budget=0.5, n_directions=K, clock=clock)

    def told(monitor: Monitor, *, of: list) -> None:
        for batch in of:
            clock.now += 1.0
            monitor.step(batch)

    data = batches(24)
    whole, first, second = new(), new(), new()
    told(whole, of=data)
    told(first, of=data[:8])
    torch.save(first.state_dict(), tmp_path / "monitor.pt")
    second.load_state_dict(torch.load(tmp_path / "monitor.pt"))
    assert json.loads(json.dumps(second.state_dict())) == first.state_dict()
    assert second.training_time == 7.0
    told(second, of=data[8:])
    assert second.history == whole.history
    assert [entry["step"] for entry in whole.history] == [6, 12, 18, 24]
    assert second.training_time == whole.training_time - 1.0  # while there was no monitor nobody knows what passed
    with pytest.raises(ValueError, match=r"Expected a state of a monitor with .*, got \['steps'\]"):
        second.load_state_dict({"steps": 1})


def test_tensorboard_shows_what_is_kept(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        monitor = Monitor(network(), "classification", every=3, budget=None, n_directions=K, writer=writer)
        for batch in batches(6):
            monitor.step(batch)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {f"curvature/{name}" for name in (*SCALARS, "cost")}
    for name in SCALARS:
        read = [(event.step, event.value) for event in events.Scalars(f"curvature/{name}")]
        assert read == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in monitor.history]


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = executed(DOCS / "monitor.md", __name__="page")
    assert names["monitor"].history[0]["step"] == 20
    assert set(EventAccumulator("runs").Reload().Tags()["scalars"]) >= {"curvature/bias", "curvature/cost"}
