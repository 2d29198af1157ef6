"""Filtered gradients, the Gaussian process along a direction, and the optimizer that is made of both."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

from debiased_laplace.likelihoods import Categorical
from debiased_laplace.network.network import Network
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.quadratic.derivatives import DataDerivatives, LossAtPoint
from debiased_laplace.quadratic.optim import FilteredSGD, LineProcess, halves
from debiased_laplace.quadratic.optim.filtered import update
from tests.documented import DOCS, executed
from tests.tolerances import assert_equal

D = 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the filter --------------------------------------------------------------------------------------


@pytest.mark.parametrize("noisy", [False, True])
def test_the_filter_is_the_conditional_of_a_dense_gaussian(noisy):
    """All gradients of a path on a quadratic at once, given all that batches showed of them."""
    n_steps = 6
    variances = torch.linspace(0.5, 2.0, n_steps).double()
    product_variances = torch.linspace(0.1, 0.7, n_steps - 1).double() * noisy
    gradients, products = normal(n_steps, D, seed=1), normal(n_steps - 1, D, seed=2)
    mean, variance = gradients[0], float(variances[0])
    for t in range(1, n_steps):
        mean, variance = update(
            mean, variance, products[t - 1], float(product_variances[t - 1]), gradients[t], float(variances[t])
        )
    # The last gradient x and the changes c_t of gradients: an observation is x minus the changes after it, plus noise.
    # Changes are normal around the products; x has no prior, which is generalised least squares with one column.
    later = torch.triu(torch.ones(n_steps, n_steps - 1).double(), 0)
    covariance = variances.diag() + later @ product_variances.diag() @ later.T
    observed = gradients + later @ products
    precision = torch.linalg.inv(covariance)
    assert_equal(torch.tensor(variance, dtype=torch.float64), 1 / precision.sum())
    assert_equal(mean, precision.sum(0) @ observed / precision.sum())


def test_nothing_uncertain_is_what_the_batch_says():
    assert update(torch.ones(2), 0.0, torch.zeros(2), 0.0, torch.full((2,), 3.0), 0.0)[0].tolist() == [3.0, 3.0]


class NoisyQuadratic(nn.Module):
    """Half of (theta - xi)^T H (theta - xi) as least squares."""

    def __init__(self, roots: Tensor, start: Tensor) -> None:
        super().__init__()
        self.roots, self.position = roots, nn.Parameter(start)

    def forward(self, xi: Tensor) -> Tensor:
        return (self.position - xi) @ self.roots.T


def test_on_a_noisy_quadratic_gradients_are_carried_along_and_averaged():
    """By the precision of each batch; then the curvature has no noise, and the variance falls as of one large batch."""
    roots = normal(D, D, seed=3)
    hessian = roots.T @ roots
    model = NoisyQuadratic(roots, normal(D, seed=4))
    optimizer = FilteredSGD(model, "regression", lr=0.01, self_tuning=False)
    points, gradients, precisions = [], [], []
    for t in range(7):
        xi = normal(9 + t, D, seed=10 + t)
        rows = (model.position.detach() - xi) @ hessian
        points.append(model.position.detach().clone())
        gradients.append(rows.mean(0))
        precisions.append(1 / float(rows.var(0).mean() / len(xi)))
        loss = optimizer.step((xi, torch.zeros(len(xi), D).double()))
        assert loss == pytest.approx(float(0.5 * ((points[-1] - xi) @ roots.T).square().sum(1).mean()), rel=1e-12)
    weights = torch.tensor(precisions, dtype=torch.float64) / sum(precisions)
    carried = torch.stack([g + hessian @ (points[-1] - at) for g, at in zip(gradients, points, strict=True)])
    mean, variance = optimizer.filtered_gradient
    assert_equal(mean, weights @ carried)
    assert variance == pytest.approx(1 / sum(precisions), rel=1e-9)
    assert_equal(model.position.detach(), points[-1] - 0.01 * mean)


# -- the Gaussian process along a direction ----------------------------------------------------------

CASES = [(-1.0, 0.3, 2.0, 0.5, 0.1), (-1.0, 0.3, -2.0, 0.5, 0.1), (-0.2, 3.0, 0.0, 0.5, 0.1),
         (-5.0, 0.0, 1.0, 0.0, 2.0), (-1e-3, 1e-8, 40.0, 9.0, 1e-5), (-3.0, 2.0, 1e-4, 1e-9, 1e-3)]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_process_is_the_posterior_of_one_that_saw_derivatives_with_noise(case):
    """Of a quadratic kernel with as good as no prior, by dense conditioning in many digits."""
    slope, p, curvature, q, s = (Fraction(x) for x in case)
    line, wide = LineProcess(*case), Fraction(10) ** 40
    for t in (0.3, 2.0):
        at = Fraction(t)
        # k(t, t') = wide (t t' + t^2 t'^2 / 4), of which observations are derivatives at zero: f' and f''
        with_slope, with_curvature = wide * at, wide * at**2 / 2
        mean = with_slope * slope / (wide + p) + with_curvature * curvature / (wide + q)
        variance = wide * (at**2 + at**4 / 4) - with_slope**2 / (wide + p) - with_curvature**2 / (wide + q)
        assert line.mean(t) == pytest.approx(float(mean), rel=1e-9)
        assert line.variance(t) == pytest.approx(float(variance + 2 * s), rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_the_step_most_probably_takes_something_off(case):
    line = LineProcess(*case)
    best = line.best_step()
    t = torch.tensor(best, dtype=torch.float64, requires_grad=True)
    score = line.mean(t) / line.variance(t) ** 0.5
    (derivative,) = torch.autograd.grad(score, t)
    value = float(score.detach())
    assert abs(float(derivative) * best) < 1e-9 * abs(value)
    probability = norm.cdf(-value)
    for other in torch.logspace(-4, 4, 400).double() * best:
        assert norm.cdf(-line.mean(float(other)) / line.variance(float(other)) ** 0.5) <= probability + 1e-15


def test_steps_of_limits():
    assert LineProcess(-3.0, 0.0, 2.0, 0.0, 0.0).best_step() == 1.5  # Newton's
    assert LineProcess(-3.0, 0.0, 2.0, 0.0, 7.0).best_step() == pytest.approx(1.5, rel=1e-12)
    assert LineProcess(-3.0, 0.0, 0.0, 4.0, 0.5).best_step() == pytest.approx((8 * 0.5 / 4) ** 0.25, rel=1e-12)
    assert LineProcess(3.0, 1.0, 2.0, 1.0, 1.0).best_step() == 0  # uphill
    assert LineProcess(0.0, 1.0, 2.0, 1.0, 1.0).best_step() == 0
    assert LineProcess(-1.0, 1.0, 2.0, 1.0, 0.0).best_step() == 0.5  # and not the smallest, which is the surest
    assert LineProcess(-1.0, 1.0, 0.0, 0.0, 0.0).best_step() == math.inf
    assert LineProcess(-1.0, 1.0, -2.0, 3.0, 0.0).best_step() == pytest.approx(4 / 3, rel=1e-12)
    assert LineProcess(-1.0, 0.0, -2.0, 0.0, 1.0).best_step() == math.inf
    assert LineProcess(-1.0, 0.0, 0.0, 0.0, 0.0).best_step() == math.inf
    without = LineProcess(-10.0, 5.0, 300.0, 0.0, 20.0).best_step()
    for tiny in (
        10.0**power for power in range(-36, -15)
    ):  # coefficients that differ so much that roots of polynomials are lost
        assert LineProcess(-10.0, 5.0, 300.0, tiny, 20.0).best_step() == pytest.approx(without, rel=1e-12)
    uncertain = [LineProcess(-1.0, p, 1.0, q, 0.1).best_step() for p, q in ((0, 0), (1, 0), (1, 1), (9, 9))]
    assert uncertain == sorted(uncertain, reverse=True)


# -- derivatives of every datum ----------------------------------------------------------------------


class Branching(nn.Module):
    """Cannot be mapped over data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.sum()) > -1e9 else x


def classifier(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)
        return nn.Sequential(*layers).double()


def data(n: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    targets = torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))
    return normal(n, 4, seed=50 + seed), targets


def derivatives(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    return torch.autograd.functional.jacobian(function, at), torch.autograd.functional.hessian(function, at)


def reference(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, gradients and Hessians of every datum, without torch.func (wrong for layer norms)."""
    names, values = zip(*model.named_parameters(), strict=True)
    sizes, shapes = [p.numel() for p in values], [p.shape for p in values]
    vector = torch.cat([p.detach().flatten() for p in values])

    def loss(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = (part.view(shape) for part, shape in zip(at.split(sizes), shapes, strict=True))
        outputs = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x[None],))
        return nn.functional.cross_entropy(outputs, y[None])

    rows = [(loss(vector, x, y), *derivatives(partial(loss, x=x, y=y), vector))
            for x, y in zip(*batch, strict=True)]  # fmt: skip
    losses, gradients, hessians = (torch.stack(column) for column in zip(*rows, strict=True))
    return losses.detach(), gradients, hessians


@pytest.mark.parametrize("make", [classifier, Branching])
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_gradients_and_products_of_every_datum(make, kind):
    model, batch = make().eval(), data(6)
    _, gradients, hessians = reference(model, batch)
    network = Network(Snapshot.of(model), None)
    point = LossAtPoint(network, Categorical(), network.mean(), kind)
    row = normal(network.n_params, seed=9)
    with point.on(*batch) as derivatives:
        both, alone = derivatives.per_datum(row), derivatives.per_datum()
    assert point.can_be_mapped is (make is classifier)
    for found in (both[0], *alone):
        assert_equal(found, gradients)
    assert_equal(both[1], hessians @ row)


def test_products_that_are_wrong_once_mapped_are_noticed(monkeypatch):
    """As those that torch maps for some layers."""
    model, batch = classifier().eval(), data(6)
    network = Network(Snapshot.of(model), None)
    point, row = LossAtPoint(network, Categorical(), network.mean(), "hessian"), normal(network.n_params, seed=9)

    def mistaken(self, *arguments, original=DataDerivatives._mapped):
        gradients, products = original(self, *arguments)
        return [gradients, products * torch.linspace(1, 1 + 1e-8, len(row), dtype=torch.float64)]

    monkeypatch.setattr(DataDerivatives, "_mapped", mistaken)
    with point.on(*batch) as derivatives:
        derivatives.per_datum(0 * row)
        assert point.can_be_mapped is None  # a step of zero shows nothing
        products = derivatives.per_datum(row)[1]
    assert point.can_be_mapped is False
    assert_equal(products, reference(model, batch)[2] @ row)


# -- the optimizer -----------------------------------------------------------------------------------


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("how", ["one batch", "halves", "two batches", "function of two"])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_two_steps_are_those_of_the_equations(how, chunk_size):
    model = classifier().eval()
    optimizer = FilteredSGD(model, "classification", 0.9, debiased=how == "halves", chunk_size=chunk_size)
    believed: tuple[Tensor, float] | None = None
    step, loss_variance = torch.zeros(0), 0.0
    for seed in range(3):
        whole = data(10, seed)
        first, second = halves(whole) if how == "halves" else (whole, data(7, 100 + seed))
        arguments = {"one batch": (whole,), "halves": (whole,), "two batches": (first, second),
                     "function of two": (lambda a=first, b=second: (a, b),)}[how]  # fmt: skip
        losses, gradients, _ = reference(model, first)
        _, other_gradients, other_hessians = reference(model, first if how == "one batch" else second)

        mean, variance = gradients.mean(0), float(gradients.var(0).mean()) / len(gradients)
        s = float(losses.var()) / len(losses)
        if believed is not None:
            products = other_hessians @ step
            predicted = believed[1] + float(products.var(0).mean()) / len(products)
            gain = predicted / (predicted + variance)
            mean = (1 - gain) * (believed[0] + products.mean(0)) + gain * mean
            variance = 1 / (1 / predicted + 1 / variance)
            s = 1 / (1 / s + 1 / loss_variance)
        direction = -mean / mean.norm()
        slopes, curvatures = other_gradients @ direction, other_hessians @ direction @ direction
        n = len(slopes)
        slope = float(slopes.mean()), float(slopes.var()) / n
        if how == "one batch":
            slope = -float(mean.norm()), variance
        line = LineProcess(*slope, float(curvatures.mean()), float(curvatures.var()) / n, s)

        before = flat(model)
        loss = optimizer.step(*arguments)
        assert loss == pytest.approx(float(losses.mean()), rel=1e-9)
        for name, value in vars(line).items():
            assert getattr(optimizer.last_line, name) == pytest.approx(value, rel=1e-9), name
        found = optimizer.filtered_gradient
        assert_equal(found[0], mean)
        assert found[1] == pytest.approx(variance, rel=1e-9)
        t = 0.9 * optimizer.last_line.best_step()
        assert_equal(flat(model), before + t * direction)
        step, believed = flat(model) - before, found
        loss_variance = s + line.slope_variance * t**2 + line.curvature_variance * t**4 / 4


def test_without_self_tuning_a_step_is_the_filtered_gradient_and_the_rate_may_be_scheduled():
    model = classifier()
    optimizer = FilteredSGD(model, "classification", 0.5, self_tuning=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for seed, lr in enumerate((0.5, 0.25)):
        before = flat(model)
        optimizer.step(data(seed=seed))
        scheduler.step()
        assert_equal(before - flat(model), lr * optimizer.filtered_gradient[0])
        assert optimizer.last_line is None
    optimizer.param_groups[0]["self_tuning"] = True
    losses = reference(model.eval(), data(seed=2))[0]
    optimizer.step(data(seed=2))  # nothing is known of the loss from before
    assert optimizer.last_line.loss_variance == pytest.approx(float(losses.var()) / len(losses), rel=1e-9)


@pytest.mark.parametrize("self_tuning", [True, False])
def test_the_state_comes_back(self_tuning):
    model = classifier()
    optimizer = FilteredSGD(model, "classification", 0.5, self_tuning=self_tuning)
    for seed in range(3):
        optimizer.step(data(seed=seed))
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    resumed = classifier(seed=7)
    resumed.load_state_dict(weights)
    other = FilteredSGD(resumed, "classification")
    other.load_state_dict(state)
    twin = copy.deepcopy(optimizer)
    for own in (optimizer, other, twin):
        own.step(data(seed=5))
    for continued in (other, twin):
        assert torch.equal(flat(continued.model), flat(model))
        assert torch.equal(continued.filtered_gradient[0], optimizer.filtered_gradient[0])
        assert continued.last_line == optimizer.last_line
    assert twin.model is not model


def test_everything_else_of_the_model_and_the_random_state_stay():
    model = classifier().train()
    model[0].bias.requires_grad_(False)
    model(data()[0]).sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    frozen, state = model[0].bias.clone(), torch.get_rng_state()
    optimizer = FilteredSGD(model, "classification", debiased=True)
    with torch.no_grad():
        for seed in range(2):
            optimizer.step(data(seed=seed))
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert torch.equal(model[0].bias, frozen)
    assert [p.requires_grad for p in model.parameters()] == [True, False, *[True] * 4]
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert p.grad is None or torch.equal(p.grad, gradient)


def test_only_the_chosen_parameters_move():
    model, before = classifier(), classifier()
    FilteredSGD(model, "classification", parameters=["4.*"]).step(data())
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[4].weight, before[4].weight)


def test_after_an_error_model_and_state_are_what_they_were():
    model = classifier()
    optimizer = FilteredSGD(model, "classification")
    optimizer.step(data())
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())
    x, y = data(seed=1)
    bad = x.clone()
    bad[3] = float("nan")
    with pytest.raises(ValueError, match="Expected finite numbers in the loss of the batch, got 1 of 1"):
        optimizer.step((bad, y))
    optimizer.param_groups[0]["lr"] = 1e400
    with pytest.raises(ValueError, match="finite numbers in the parameters after the step"):
        optimizer.step((x, y))
    optimizer.param_groups[0]["lr"] = 1.0
    assert torch.equal(flat(model), before)
    found = optimizer.state_dict()["state"][0]
    assert found.keys() == state["state"][0].keys()
    for key, value in state["state"][0].items():
        assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value


def test_the_optimizer_says_what_it_cannot_do():
    model = classifier()
    with pytest.raises(TypeError, match=r"Expected a model \(a torch.nn.Module\), got generator. FilteredSGD calls"):
        FilteredSGD(model.parameters(), "classification")
    with pytest.raises(ValueError, match="finite lr of at least zero, got -1"):
        FilteredSGD(model, "classification", -1.0)
    with pytest.raises(ValueError, match="patterns of trainable parameters, got 'none'"):
        FilteredSGD(model, "classification", parameters=["none"])
    with pytest.raises(ValueError, match="chunk_size"):
        FilteredSGD(model, "classification", chunk_size=0)
    optimizer = FilteredSGD(model, "classification")
    with pytest.raises(NotImplementedError, match=r"one group of parameters, got another\. A step of FilteredSGD"):
        optimizer.add_param_group({"params": []})
    with pytest.raises(ValueError, match="at least two data in a batch, for their variance, got 1"):
        optimizer.step(data(1))
    with pytest.raises(ValueError, match="at least two data in a batch, for their variance, got 1"):
        optimizer.step(data(4), data(1))
    with pytest.raises(RuntimeError, match="Expected a step before a filtered gradient is asked for"):
        _ = optimizer.filtered_gradient


def test_the_code_of_the_page(capsys):
    model = classifier()
    names = executed(
        DOCS / "steps.md", model=model, two_batches=(data(24), data(24, 1)), batch=data(24), other_batch=data(24, 1),
        loader=[data(24, seed) for seed in range(2)],
    )  # fmt: skip
    assert torch.equal(names["gradient"], names["optimizer"].filtered_gradient[0])
    assert capsys.readouterr().out.count("LineProcess(slope=-") == 2
