"""Steps on quadratics of one or two batches: conjugate gradients, damped Newton steps, the optimizer."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from debiased_laplace import GGN
from debiased_laplace.quadratic.optim import (
    CGResult,
    DebiasedNewtonCG,
    Stop,
    conjugate_gradients,
    damped_step,
    directionally_damped_step,
    halves,
    jacobi_preconditioner,
    newton_step,
    second_batch_damped_step,
)
from debiased_laplace.quadratic.quadratic import Quadratic
from debiased_laplace.quadratic.spectrum import DirectionalDerivatives
from tests.tolerances import EXACT, FLOAT32, assert_equal, assert_unbiased

D = 12


@dataclass(frozen=True)
class Dense:
    """A quadratic with its matrix written out."""

    gradient: Tensor
    matrix: Tensor
    loss: float = 0.0

    def matvec(self, u: Tensor) -> Tensor:
        return self.matrix @ u

    def value(self, x: Tensor) -> float:
        return float(self.loss + self.gradient @ x + 0.5 * x @ self.matrix @ x)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def positive_definite(seed: int = 0, size: int = D) -> Dense:
    root = normal(size, size, seed=seed)
    return Dense(normal(size, seed=100 + seed), root @ root.T / size + 0.3 * torch.eye(size).double())


class Population:
    """Least squares with few data and noise, of which batches are quadratics."""

    def __init__(self, n: int = 40, size: int = 6) -> None:
        self.inputs = normal(n, size, seed=1) * torch.linspace(0.3, 2, size).double()
        self.targets = self.inputs @ normal(size, seed=2) + normal(n, seed=3)

    def batch(self, index: Tensor | slice = slice(None)) -> Dense:
        x, y = self.inputs[index], self.targets[index]
        return Dense(-x.T @ y / len(x), x.T @ x / len(x), float(y.square().mean() / 2))

    def draw(self, n: int, seed: int) -> Dense:
        return self.batch(torch.randperm(len(self.inputs), generator=generator(seed))[:n])


# -- conjugate gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_cg_solves_a_positive_definite_system_in_as_many_steps_as_parameters(seed, damping):
    quadratic = positive_definite(seed)
    result = conjugate_gradients(quadratic, n_steps=D, damping=damping, tolerance=0.0)
    damped = quadratic.matrix + damping * torch.eye(D).double()
    assert result.n_steps == D
    assert_equal(result.delta, -torch.linalg.solve(damped, quadratic.gradient))
    assert_equal(result.path[-1], result.delta)
    assert_equal(result.gradient_norms[1], (quadratic.gradient + damped @ result.path[1]).norm())
    products = result.directions @ damped @ result.directions.T
    scale = products.diagonal().sqrt()
    assert_equal(products.diagonal(), result.curvatures)
    conjugate = (products / scale / scale[:, None])[:6, :6]  # rounding errors grow with the steps
    assert_equal(conjugate, torch.eye(6).double())


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_preconditioned_cg_solves_the_system_too(damping):
    quadratic = positive_definite(1)
    diagonal = quadratic.matrix.diagonal()
    result = conjugate_gradients(
        quadratic, n_steps=D, damping=damping, preconditioner=lambda v: v / (diagonal + damping), tolerance=0.0
    )
    damped = quadratic.matrix + damping * torch.eye(D).double()
    assert_equal(result.delta, -torch.linalg.solve(damped, quadratic.gradient))


def test_with_the_inverse_as_preconditioner_one_step_is_enough():
    quadratic = positive_definite(2)
    inverse = torch.linalg.inv(quadratic.matrix)
    result = conjugate_gradients(quadratic, n_steps=D, preconditioner=lambda v: inverse @ v)
    assert result.n_steps == 1
    assert result.stopped is Stop.TOLERANCE
    assert_equal(result.delta, -inverse @ quadratic.gradient)


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_debiased_cg_with_the_same_batch_twice_is_cg(damping, preconditioned):
    quadratic = positive_definite()
    precondition = (lambda v: v / quadratic.matrix.diagonal()) if preconditioned else None
    common = {"n_steps": 7, "damping": damping, "preconditioner": precondition}
    single = conjugate_gradients(quadratic, **common)
    debiased = conjugate_gradients(quadratic, replace(quadratic), **common)
    for name in ("directions", "step_sizes", "slopes", "curvatures", "first_slopes", "first_curvatures"):
        assert torch.equal(getattr(single, name), getattr(debiased, name)), name
    assert single.stopped is debiased.stopped is Stop.STEPS


@pytest.mark.parametrize("damping", [0.0, 0.4])
def test_debiased_magnitudes_are_line_searches_on_the_second_quadratic(damping):
    first, second = positive_definite(3), positive_definite(4)
    result = conjugate_gradients(first, second, n_steps=8, damping=damping)
    damped = Dense(second.gradient, second.matrix + damping * torch.eye(D).double())
    point = torch.zeros(D).double()
    for k, direction in enumerate(result.directions):
        slope = direction @ (damped.gradient + damped.matrix @ point)
        assert_equal(result.slopes[k], slope)
        assert_equal(result.curvatures[k], direction @ damped.matrix @ direction)
        moved = point + result.step_sizes[k] * direction
        assert abs(float(direction @ (damped.gradient + damped.matrix @ moved))) < EXACT * abs(float(slope))
        assert damped.value(moved) <= damped.value(point)
        point = moved
        assert_equal(result.path[k + 1], point)


def test_the_second_batch_cannot_change_the_directions():
    first = positive_definite(3)
    results = [conjugate_gradients(first, positive_definite(seed), n_steps=6) for seed in (5, 6)]
    alone = conjugate_gradients(first, n_steps=6)
    for result in results:
        assert torch.equal(result.directions, alone.directions)
        assert torch.equal(result.first_step_sizes, alone.step_sizes)
        assert torch.equal(result.gradient_norms, alone.gradient_norms)
    assert not torch.allclose(results[0].step_sizes, results[1].step_sizes)


def measured_on(path: CGResult, other: Dense) -> tuple[Tensor, Tensor]:
    rows = path.directions
    return path.measure(rows @ other.gradient, rows @ other.matrix @ rows.mT)


def test_second_batch_slopes_and_curvatures_are_unbiased_and_those_of_the_same_batch_are_not():
    population = Population()
    everything = population.batch()
    for chosen in range(3):
        first = population.draw(10, seed=1000 + chosen)
        path = conjugate_gradients(first, n_steps=5)
        slopes, curvatures = measured_on(path, everything)
        others = [measured_on(path, population.draw(10, seed)) for seed in range(500)]
        assert_unbiased(torch.stack([slope for slope, _ in others]), slopes)
        assert_unbiased(torch.stack([curvature for _, curvature in others]), curvatures)
        # what debiased CG uses: at the start, and along every direction
        debiased = [conjugate_gradients(first, population.draw(10, seed), n_steps=5) for seed in range(500)]
        assert_unbiased(torch.stack([x.slopes[0] for x in debiased]), slopes[0])
        assert_unbiased(torch.stack([x.curvatures for x in debiased]), curvatures)

    # the step sizes of the batch that chose the directions are not: late ones even have the wrong sign (figure 4)
    paths = [conjugate_gradients(population.draw(10, seed), n_steps=5) for seed in range(300)]
    measured = [measured_on(path, everything) for path in paths]
    ratios = torch.stack([
        (-slopes / curvatures) / path.step_sizes for path, (slopes, curvatures) in zip(paths, measured, strict=True)
    ])  # fmt: skip
    assert float(ratios[:, -1].median()) < 0
    assert float((ratios[:, -1] < 0).double().mean()) > 0.5


def test_a_path_measured_on_its_own_batch_is_itself():
    first, second = positive_definite(3), positive_definite(4)
    for result, own in ((conjugate_gradients(first, n_steps=5, damping=0.2), first),
                        (conjugate_gradients(first, second, n_steps=5, damping=0.2), second)):  # fmt: skip
        slopes, curvatures = measured_on(result, own)
        assert_equal(slopes, result.slopes)
        assert_equal(curvatures, result.curvatures)


# -- where it stops ----------------------------------------------------------------------------------


def indefinite() -> Dense:
    diagonal = torch.linspace(1, 2, D).double()
    diagonal[3] = -1.5
    return Dense(torch.ones(D).double(), torch.diag(diagonal))


def test_cg_stops_at_negative_curvature_and_says_so():
    with pytest.warns(
        RuntimeWarning, match="stopped after . steps: negative or zero curvature on the batch of the dir"
    ):
        result = conjugate_gradients(indefinite(), n_steps=D)
    assert result.stopped is Stop.CURVATURE
    assert 0 < result.n_steps < D
    assert bool((result.curvatures > 0).all())
    assert_equal(result.delta, result.path[-1])


def test_cg_stops_at_negative_curvature_of_the_second_batch_and_says_so():
    first = replace(positive_definite(), gradient=torch.ones(D).double())
    with pytest.warns(RuntimeWarning, match="negative or zero curvature on the batch of the magnitudes"):
        result = conjugate_gradients(first, replace(indefinite(), matrix=-torch.eye(D).double()), n_steps=D)
    assert result.stopped is Stop.SECOND_CURVATURE
    assert result.n_steps == 0
    assert torch.equal(result.delta, torch.zeros(D).double())
    assert result.path.shape == (1, D)


def test_zero_curvature_stops_and_damping_helps():
    flat = Dense(torch.ones(D).double(), torch.zeros(D, D).double())
    with pytest.warns(RuntimeWarning, match="negative or zero curvature"):
        assert conjugate_gradients(flat, n_steps=2).n_steps == 0
    assert_equal(conjugate_gradients(flat, n_steps=2, damping=0.5).delta, -2 * torch.ones(D).double())


def test_enough_damping_makes_an_indefinite_matrix_positive_definite():
    quadratic = indefinite()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = conjugate_gradients(quadratic, n_steps=D, damping=2.0)
    damped = quadratic.matrix + 2 * torch.eye(D).double()
    assert_equal(result.delta, -torch.linalg.solve(damped, quadratic.gradient), 1e-7)  # the default tolerance


def test_a_singular_matrix_is_solved_in_its_range():
    root = normal(D, 4)
    quadratic = Dense(root @ normal(4, seed=1), root @ root.T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = conjugate_gradients(quadratic, n_steps=D)
    assert result.stopped is Stop.TOLERANCE
    assert_equal(result.delta, -torch.linalg.pinv(quadratic.matrix, rtol=1e-10) @ quadratic.gradient, 1e-7)


def test_the_tolerance_stops_and_a_zero_gradient_needs_no_step():
    result = conjugate_gradients(positive_definite(), n_steps=D, tolerance=0.3)
    assert result.stopped is Stop.TOLERANCE
    assert float(result.gradient_norms[-1]) <= 0.3 * float(result.gradient_norms[0]) < float(result.gradient_norms[-2])
    at_rest = conjugate_gradients(replace(positive_definite(), gradient=torch.zeros(D).double()), n_steps=3)
    assert at_rest.n_steps == 0
    assert at_rest.stopped is Stop.TOLERANCE


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error_that_names_the_batch(value):
    good = positive_definite()
    with pytest.raises(ValueError, match=r"finite loss on the batch of the directions, got (nan|inf)"):
        conjugate_gradients(replace(good, loss=value), n_steps=2)
    with pytest.raises(ValueError, match=r"finite loss on the batch of the magnitudes, got (nan|inf)"):
        conjugate_gradients(good, replace(good, loss=value), n_steps=2)
    with pytest.raises(ValueError, match="the gradient on the batch of the magnitudes, got 12 of 12"):
        conjugate_gradients(good, replace(good, gradient=good.gradient * value), n_steps=2)
    with pytest.raises(ValueError, match="finite slope and curvature on the batch of the directions"):
        conjugate_gradients(replace(good, matrix=good.matrix * value), n_steps=2)


def test_bad_arguments_are_errors():
    good = positive_definite()
    with pytest.raises(ValueError, match="at least one step for n_steps, got 0"):
        conjugate_gradients(good, n_steps=0)
    with pytest.raises(ValueError, match="finite damping of at least zero, got -1"):
        conjugate_gradients(good, n_steps=1, damping=-1.0)
    with pytest.raises(ValueError, match="finite tolerance of at least zero, got nan"):
        conjugate_gradients(good, n_steps=1, tolerance=float("nan"))
    with pytest.raises(ValueError, match="got 12 parameters for the directions and 5"):
        conjugate_gradients(good, positive_definite(size=5), n_steps=1)
    with pytest.raises(ValueError, match="positive definite preconditioner, got one with"):
        conjugate_gradients(good, n_steps=1, preconditioner=lambda v: -v)
    with pytest.raises(ValueError, match=r"keeps the shape \(12,\), got \(3,\)"):
        conjugate_gradients(good, n_steps=1, preconditioner=lambda v: v[:3])


# -- a damping for each direction --------------------------------------------------------------------


def derivatives_of(slopes: Tensor, curvatures: Tensor) -> DirectionalDerivatives:
    return DirectionalDerivatives(slopes, curvatures, torch.full((len(slopes),), 1 / len(slopes), dtype=slopes.dtype))


def noisy(n: int = 50, k: int = 5, noise: float = 1.0, seed: int = 0) -> DirectionalDerivatives:
    slopes = torch.linspace(0.1, 3, k).double() + noise * normal(n, k, seed=seed)
    return derivatives_of(
        slopes, torch.linspace(1, 2, k).double() * (1 + 0.3 * noise * normal(n, k, seed=seed + 1)) ** 2
    )


def test_without_damping_the_step_is_newtons():
    derivatives = noisy()
    step = damped_step(derivatives)
    assert_equal(step.coefficients, -derivatives.slope / derivatives.curvature)
    assert_equal(step.reductions, derivatives.slope.square() / derivatives.curvature / 2)
    damped = damped_step(derivatives, torch.arange(5).double())
    assert_equal(damped.coefficients, -derivatives.slope / (derivatives.curvature + torch.arange(5)))


def test_data_without_scatter_need_no_damping():
    derivatives = noisy(noise=0.0)
    step = directionally_damped_step(derivatives)
    assert torch.equal(step.dampings, torch.zeros(5).double())
    assert_equal(step.coefficients, damped_step(derivatives).coefficients)


def test_the_bootstrap_bound_is_the_quantile_that_its_definition_says():
    derivatives, grid = noisy(n=7, k=3), torch.tensor([0.0, 0.5, 2.0]).double()
    step = directionally_damped_step(derivatives, grid=grid, n_resamples=40, level=0.1, generator=3)
    draws = torch.randint(7, (40, 7), generator=generator(3))
    for k in range(3):
        bounds = []
        for damping in grid:
            s = -derivatives.slopes[:, k].mean() / (derivatives.curvatures[:, k].mean() + damping)
            slopes, curvatures = derivatives.slopes[draws, k].mean(1), derivatives.curvatures[draws, k].mean(1)
            bounds.append((-s * slopes - s**2 / 2 * curvatures).quantile(0.1))
        best = max(range(3), key=lambda j: float(bounds[j]))
        assert float(step.dampings[k]) == (float(grid[best]) if bounds[best] >= 0 else float("inf"))
        assert_equal(step.reductions[k], bounds[best].clamp_min(0))
    assert step.dampings.isinf().any() and step.dampings.isfinite().any()  # both cases are seen


def test_more_noise_gives_more_damping_and_pure_noise_no_step():
    calm, rough = (directionally_damped_step(noisy(noise=x)).dampings[-1] for x in (0.3, 3.0))
    assert float(calm) < float(rough)
    pure = derivatives_of(normal(50, 1) - normal(50, 1).mean(0) + 1e-6, torch.ones(50, 1).double())
    step = directionally_damped_step(pure)
    assert step.dampings.isinf().all()
    assert torch.equal(step.coefficients, torch.zeros(1).double())
    assert torch.equal(step.reductions, torch.zeros(1).double())


def test_weights_scale_what_a_datum_contributes():
    derivatives = noisy(n=4, k=2)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    weighted = replace(derivatives, weights=weights)
    step = damped_step(weighted)
    assert_equal(step.coefficients, -(weights @ derivatives.slopes) / (weights @ derivatives.curvatures))
    scales = 4 * weights[:, None]
    scaled = derivatives_of(scales * derivatives.slopes, scales * derivatives.curvatures)
    for name in ("coefficients", "reductions"):
        one, other = (getattr(directionally_damped_step(x), name) for x in (weighted, scaled))
        assert_equal(one, other)
        assert bool(one.any())


def test_the_second_batch_keeps_the_part_of_the_step_that_it_confirms():
    first = derivatives_of(torch.tensor([[1.0, 1.0, 1.0]]).double(), torch.ones(1, 3).double())
    second = derivatives_of(torch.tensor([[0.5, -0.3, 2.0]]).double(), torch.ones(1, 3).double())
    step = second_batch_damped_step(first, second, grid=torch.linspace(0, 4, 401))
    assert_equal(step.coefficients, torch.tensor([-0.5, 0.0, -1.0]).double(), 1e-6)
    assert_equal(step.dampings[[0, 2]], torch.tensor([1.0, 0.0]).double(), 1e-6)
    assert step.dampings[1].isinf()
    assert_equal(step.reductions, torch.tensor([0.125, 0.0, 1.5]).double(), 1e-6)


def test_the_lifted_step_is_the_newton_step_of_the_dense_curvature():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    inputs, targets = normal(30, 3), torch.randint(3, (30,), generator=generator(5))
    ggn = GGN(model, inputs, targets, "classification")
    _, basis = ggn.eigenpairs(10)
    derivatives = ggn.directional_derivatives(basis)
    loss = torch.nn.functional.cross_entropy(model(inputs), targets)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    projected = basis.lift(basis.project(gradient))
    expected = -ggn.inverse_matvec(projected, damping=0.01)
    step = damped_step(derivatives, 0.01)
    assert_equal(step.lift(basis), basis.lift(basis.project(expected)))
    assert_equal(step.lift(basis.lift(torch.eye(10).double())), step.lift(basis))


def test_bad_derivatives_and_grids_are_errors():
    good = noisy()
    bad = replace(good, slopes=good.slopes * float("nan"))
    for call in (damped_step, directionally_damped_step, lambda x: second_batch_damped_step(good, x)):
        with pytest.raises(ValueError, match="finite numbers in the slopes of the data"):
            call(bad)
    with pytest.raises(ValueError, match=r"shape \[M\] or \[M, 5\], got \(3, 2\)"):
        directionally_damped_step(good, grid=torch.ones(3, 2))
    with pytest.raises(ValueError, match="dampings of at least zero, got -1"):
        directionally_damped_step(good, grid=-torch.ones(3))
    with pytest.raises(ValueError, match="damping of at least zero, got -1"):
        damped_step(good, -1.0)
    with pytest.raises(ValueError, match="level between 0 and 1, got 5"):
        directionally_damped_step(good, level=5)
    with pytest.raises(ValueError, match="at least one bootstrap batch"):
        directionally_damped_step(good, n_resamples=0)
    with pytest.raises(ValueError, match="same directions, got 5 and 4"):
        second_batch_damped_step(good, noisy(k=4))


def test_the_bootstrap_leaves_the_global_random_state():
    state = torch.get_rng_state()
    directionally_damped_step(noisy())
    assert torch.equal(state, torch.get_rng_state())


# -- steps of a model --------------------------------------------------------------------------------


def classifier(seed: int = 0, dropout: float = 0.0) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(6, 3)
        ).double()


def data(n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(n, 4, seed=seed), torch.randint(3, (n,), generator=generator(seed))


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_step_of_a_network_is_the_solution_of_its_damped_system():
    model, batch = classifier(), data()
    before = flat(model)
    quadratic = Quadratic(model, batch, "classification", l2=0.1)
    matrix = quadratic.matvec(torch.eye(quadratic.n_params).double())
    result = newton_step(model, batch, "classification", lr=0.5, n_steps=200, damping=0.3, l2=0.1, tolerance=1e-13)
    expected = -torch.linalg.solve(matrix + 0.3 * torch.eye(len(matrix)).double(), quadratic.gradient)
    assert_equal(result.delta, expected)
    assert_equal(flat(model), before + 0.5 * expected)


def test_least_squares_is_solved_in_one_full_batch_step():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 2).double()
    x, y = normal(60, 5), normal(60, 2, seed=1)
    optimizer = DebiasedNewtonCG(model, "regression", n_steps=12, debiased=False)
    optimizer.step((x, y))
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(60, 1).double()], 1), y).solution.T
    assert_equal(torch.cat([model.weight, model.bias[:, None]], 1), solution)
    # and with the same data in both roles
    twice = torch.nn.Linear(5, 2).double()
    DebiasedNewtonCG(twice, "regression", n_steps=12).step((x, y), (x, y))
    assert_equal(twice.weight, model.weight)


@pytest.mark.parametrize("how", ["two batches", "halves", "function", "function of two", "single"])
def test_a_step_of_the_optimizer_is_that_of_the_function(how):
    batch = data()
    first, second = halves(batch)
    assert [len(part[1]) for part in (first, second)] == [20, 20]
    options = {"n_steps": 4, "damping": 0.1, "l2": 0.01, "lr": 0.7}
    expected, model = classifier(), classifier()
    optimizer = DebiasedNewtonCG(model, "classification", debiased=how != "single", **options)
    arguments = {
        "two batches": (first, second), "halves": (batch,), "function": (lambda: batch,),
        "function of two": (lambda: (first, second),), "single": (batch,),
    }[how]  # fmt: skip
    loss = optimizer.step(*arguments)
    parts = (batch,) if how == "single" else (first, second)
    result = newton_step(expected, parts[0], "classification", *parts[1:], **options)
    assert torch.equal(flat(model), flat(expected))
    assert torch.equal(optimizer.last_result.step_sizes, result.step_sizes)
    regulariser = 0.005 * flat(classifier()).square().sum()
    x, y = batch
    assert_equal(
        torch.tensor(loss, dtype=torch.float64), torch.nn.functional.cross_entropy(classifier()(x), y) + regulariser
    )


def test_halves_of_odd_and_nested_batches_cover_the_data():
    x, y = data(7)
    first, second = halves((x, y))
    assert_equal(torch.cat([first[0], second[0]]), x)
    assert torch.equal(torch.cat([first[1], second[1]]), y)
    parts = halves({"x": x, "labels": y})
    assert [len(part["labels"]) for part in parts] == [4, 3]
    with pytest.raises(ValueError, match="at least two data to split in halves, got 1"):
        halves((x[:1], y[:1]))


def test_a_preconditioner_is_made_from_the_quadratic_and_changes_the_way_not_the_end():
    plain, preconditioned = classifier(), classifier()

    def jacobi(quadratic):
        diagonal = quadratic.matvec(torch.eye(quadratic.n_params).double()).diagonal()
        return jacobi_preconditioner(diagonal, damping=0.1)

    ways = []
    for model, preconditioner in ((plain, None), (preconditioned, jacobi)):
        optimizer = DebiasedNewtonCG(
            model, "classification", n_steps=200, damping=0.1, debiased=False, preconditioner=preconditioner,
            tolerance=1e-13,
        )  # fmt: skip
        optimizer.step(data())
        ways.append(optimizer.last_result.directions[1])
    assert_equal(flat(preconditioned), flat(plain))
    assert not torch.allclose(*ways)
    with pytest.raises(ValueError, match="positive and finite with the damping, got a smallest entry of 0"):
        jacobi_preconditioner(torch.zeros(3))
    assert_equal(
        jacobi_preconditioner(torch.full((2,), 15.0), 1.0, 0.75)(torch.ones(2)), torch.full((2,), 0.125).double()
    )


def test_schedulers_set_the_learning_rate():
    model, other = classifier(), classifier()
    optimizer = DebiasedNewtonCG(model, "classification", lr=1.0, n_steps=3, damping=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.25)
    for lr in (1.0, 0.25, 0.0625):
        optimizer.step(data())
        scheduler.step()
        first, second = halves(data())
        newton_step(other, first, "classification", second, lr=lr, n_steps=3, damping=0.5)
    assert torch.equal(flat(model), flat(other))
    assert optimizer.param_groups[0]["lr"] == 0.25**3


def test_the_state_comes_back():
    model = classifier()
    optimizer = DebiasedNewtonCG(model, "classification", lr=0.5, n_steps=3, damping=0.5)
    optimizer.step(data())
    optimizer.param_groups[0]["damping"] = 0.9
    state, weights = optimizer.state_dict(), model.state_dict()
    resumed = classifier(seed=7)
    resumed.load_state_dict(weights)
    other = DebiasedNewtonCG(resumed, "classification")
    other.load_state_dict(state)
    assert {key: other.param_groups[0][key] for key in ("lr", "n_steps", "damping")} == {
        "lr": 0.5, "n_steps": 3, "damping": 0.9,
    }  # fmt: skip
    for own in (optimizer, other):
        own.step(data(seed=1))
    assert torch.equal(flat(model), flat(resumed))


def test_only_the_chosen_parameters_move():
    model, before = classifier(), classifier()
    optimizer = DebiasedNewtonCG(model, "classification", n_steps=3, damping=0.5, parameters=["3.*"])
    optimizer.step(data())
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[3].weight, before[3].weight)
    assert not torch.equal(model[3].bias, before[3].bias)


def test_everything_else_of_the_model_and_the_random_state_stay():
    model = classifier(dropout=0.5).train()
    model[0].bias.requires_grad_(False)
    model(data()[0]).sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    frozen, state = model[0].bias.clone(), torch.get_rng_state()
    with torch.no_grad():
        DebiasedNewtonCG(model, "classification", n_steps=3, damping=0.5).step(data())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and model[2].training
    assert torch.equal(model[0].bias, frozen)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert p.grad is None or torch.equal(p.grad, gradient)


def test_after_an_error_the_model_is_what_it_was(monkeypatch):
    model = classifier().train()
    before = flat(model)
    optimizer = DebiasedNewtonCG(model, "classification", n_steps=3, damping=0.5)
    x, y = data()
    bad = x.clone()
    bad[30] = float("nan")
    with pytest.raises(ValueError, match="finite loss of the batch, got nan"):
        optimizer.step((bad, y))
    calls = []

    def interrupted(self, vector, original=Quadratic.matvec):
        calls.append(vector)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, vector)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Quadratic, "matvec", interrupted)
        optimizer.step((x, y))
    optimizer.param_groups[0]["lr"] = 1e400
    with pytest.raises(ValueError, match="finite numbers in the parameters after the step"):
        optimizer.step((x, y))
    optimizer.param_groups[0]["lr"] = 1.0
    written = []

    def failing(self, value, original=torch.Tensor.copy_):
        written.append(value)
        if len(written) == 2:
            raise RuntimeError("the device was lost")
        return original(self, value)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="device was lost"):
        patch.setattr(torch.nn.Parameter, "copy_", failing, raising=False)
        optimizer.step((x, y))
    assert len(written) == 2 + len(list(model.parameters()))
    assert torch.equal(flat(model), before)
    assert model.training


def test_the_hessian_of_a_network_has_negative_curvature_and_cg_stops_there():
    model = classifier(seed=3)
    with pytest.warns(RuntimeWarning, match="negative or zero curvature"):
        result = newton_step(model, data(200), "classification", curvature="hessian", n_steps=60)
    assert result.stopped is Stop.CURVATURE
    assert bool(flat(model).isfinite().all())


def test_the_optimizer_says_what_it_cannot_do():
    model = classifier()
    with pytest.raises(TypeError, match=r"Expected a model \(a torch.nn.Module\), got generator"):
        DebiasedNewtonCG(model.parameters(), "classification")
    with pytest.raises(ValueError, match="finite lr of at least zero, got -1"):
        DebiasedNewtonCG(model, "classification", lr=-1.0)
    with pytest.raises(ValueError, match="patterns of trainable parameters, got 'none'"):
        DebiasedNewtonCG(model, "classification", parameters=["none"])
    with pytest.raises(NotImplementedError, match="one group of parameters, got another"):
        DebiasedNewtonCG(model, "classification").add_param_group({"params": []})


def test_float32_models_step_as_float64_ones():
    double, single = classifier(), classifier().float()
    x, y = data()
    for model, inputs in ((double, x), (single, x.float())):
        DebiasedNewtonCG(model, "classification", n_steps=5, damping=0.1).step((inputs, y))
    assert single[0].weight.dtype == torch.float32
    assert_equal(flat(single).double(), flat(double), FLOAT32)


def test_an_optimizer_is_copied_with_its_model():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 1), torch.randn(64, 3)
    batch = x, x.sum(1, keepdim=True)
    optimizer = DebiasedNewtonCG(model, "regression", n_steps=2, chunk_size=20)
    twin = copy.deepcopy(optimizer)
    assert twin.model is not model
    assert twin.step(batch) == optimizer.step(batch)
    assert torch.equal(twin.model.weight, model.weight)
    assert torch.equal(twin.param_groups[0]["params"][0], model.weight)


def test_chunks_change_nothing():
    models, x = [], torch.randn(64, 3, generator=generator()).double()
    for chunk_size in (None, 7):
        torch.manual_seed(0)
        models.append(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double())
        newton_step(
            models[-1], (x, x.sum(1, keepdim=True)), "regression", n_steps=3, damping=0.1, chunk_size=chunk_size
        )
    assert_equal(models[0][0].weight.data, models[1][0].weight.data)


def test_along_negative_curvature_a_step_goes_downhill_by_more_damping():
    slopes, curvatures = torch.ones(4, 2).double(), torch.tensor([[-1.0, 1.0]] * 4).double()
    slopes[:, 0] = 0.5
    derivatives = DirectionalDerivatives(slopes, curvatures, torch.full((4,), 0.25).double())
    for step in (directionally_damped_step(derivatives), second_batch_damped_step(derivatives, derivatives)):
        assert bool((step.coefficients < 0).all())
        assert float(step.dampings[0]) > 1 and float(step.dampings[1]) == 0
        assert bool((step.reductions > 0).all())
    flat = DirectionalDerivatives(torch.zeros(4, 2).double(), curvatures, torch.full((4,), 0.25).double())
    for step in (directionally_damped_step(flat), second_batch_damped_step(flat, flat)):
        assert not step.coefficients.any() and bool(step.dampings.isinf().all())
