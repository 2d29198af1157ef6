"""What is computed in a precision is used to that precision: conjugate gradients, thresholds, rows of probabilities."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from debiased_laplace import GGN, Quadratic, _arrays
from debiased_laplace.evaluation.predictors.baselines import gaussian_predictor
from debiased_laplace.evaluation.predictors.prediction import as_prediction
from debiased_laplace.evaluation.scores import classification
from debiased_laplace.laplace_torch.noise import check_profile, profile
from debiased_laplace.likelihoods import Bernoulli
from debiased_laplace.network.network import Network
from debiased_laplace.quadratic.instruments import alignment
from debiased_laplace.quadratic.optim import (
    DebiasedNewtonCG,
    Stop,
    conjugate_gradients,
    damped_step,
    directionally_damped_step,
    jacobi_preconditioner,
)
from debiased_laplace.quadratic.spectrum import DirectionalDerivatives
from tests.tolerances import assert_equal

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: Errors of solutions, in units of the precision times the condition number.
UNITS = 16
quick = settings(deadline=None, max_examples=40, derandomize=True)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@dataclass
class LeastSquares:
    """Half of the mean square of A x + b, with products in the dtype of A, times a scale; vectors are float64."""

    a: Tensor
    b: Tensor
    scale: float = 1.0
    loss: float = 0.0
    precision: float = field(init=False)

    def __post_init__(self) -> None:
        self.precision = eps(self.a.dtype)
        self.gradient = self.scale * (self.a.mT @ self.b).double()

    def matvec(self, u: Tensor) -> Tensor:
        return self.scale * (self.a.mT @ (self.a @ u.to(self.a))).double()

    @property
    def exact(self) -> tuple[Tensor, Tensor]:
        """The gradient and the matrix without rounding."""
        a, b = self.a.double(), self.b.double()
        return self.scale * a.mT @ b, self.scale * a.mT @ a


def problem(dtype: torch.dtype, n: int, d: int, rank: int, copies: int, seed: int) -> tuple[Tensor, Tensor]:
    """A of singular values from 0.3 to 3, with copies of its rows and zero columns; and a target."""
    generator, width = np.random.default_rng(seed), d - d // 3
    rank = min(n, width, rank)
    left, right = (np.linalg.qr(generator.standard_normal((size, rank)))[0] for size in (rank, width))
    rows = np.pad((left * generator.uniform(0.3, 3, rank)) @ right.T, ((0, 0), (0, d - width)))
    a = torch.from_numpy(rows).to(dtype).repeat(copies, 1)
    return a, torch.from_numpy(generator.standard_normal(len(a))).to(dtype)


def singular_values(a: Tensor) -> Tensor:
    values = torch.linalg.svdvals(a.double())
    return values[values > 1e-10 * values[0]]


def condition(a: Tensor) -> float:
    """Condition number of A^T A on its range."""
    values = singular_values(a)
    return float((values[0] / values[-1]) ** 2)


def falls(quadratic: LeastSquares, path: Tensor, damping: float = 0.0) -> bool:
    """Whether the exact quadratic falls at every step, up to its own rounding."""
    gradient, matrix = quadratic.exact
    values = path @ gradient + 0.5 * ((path @ matrix) * path).sum(1) + 0.5 * damping * path.square().sum(1)
    return bool((values.diff() <= max(quadratic.precision, 1e-14) * values.abs().max()).all())


sizes = {
    "n": st.integers(1, 8),
    "d": st.integers(1, 12),
    "rank": st.integers(1, 8),
    "copies": st.integers(1, 3),
    "seed": st.integers(0, 10**6),
}


@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(
    **sizes,
    n_steps=st.sampled_from([1, 2, 5, 12, 300]),
    tolerance=st.sampled_from([None, 0.0]),
    scale=st.integers(-30, 30),
    target=st.integers(-30, 30),
)
@example(n=3, d=13, rank=3, copies=1, seed=0, n_steps=10, tolerance=None, scale=0, target=0)
@example(n=1, d=1, rank=1, copies=1, seed=0, n_steps=300, tolerance=0.0, scale=-30, target=30)
def test_cg_ends_at_the_solution_of_least_norm(dtype, n, d, rank, copies, seed, n_steps, tolerance, scale, target):
    a, b = problem(dtype, n, d, rank, copies, seed)
    quadratic = LeastSquares(a, b, scale=10.0**scale)
    quadratic.gradient = quadratic.gradient * 10.0**target
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # curvature of A^T A is never negative
        result = conjugate_gradients(quadratic, n_steps=n_steps, tolerance=tolerance)
    right = -torch.from_numpy(np.linalg.pinv(a.double().numpy(), 1e-10) @ b.double().numpy()) * 10.0**target
    precision = UNITS * eps(dtype) * condition(a)
    assert float(result.delta.norm()) <= (1 + precision) * float(right.norm())
    assert falls(quadratic, result.path / 10.0**target)
    if n_steps == 300:
        assert result.stopped in (Stop.TOLERANCE, Stop.PRECISION)
        assert_equal(result.delta / 10.0**target, right / 10.0**target, max(precision, 1e-7 * (tolerance is None)))


@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(**sizes, damping=st.sampled_from([0.0, 1e-3, 1.0, 1e6]), spread=st.integers(0, 3))
def test_so_it_does_with_a_preconditioner_and_damping(dtype, n, d, rank, copies, seed, damping, spread):
    a, b = problem(dtype, n, d, rank, copies, seed)
    quadratic = LeastSquares(a, b)
    root = torch.from_numpy(10.0 ** np.random.default_rng(seed).uniform(-spread / 2, spread / 2, d))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = conjugate_gradients(
            quadratic, n_steps=300, tolerance=0.0, damping=damping, preconditioner=lambda v: root**2 * v
        )
    _, matrix = quadratic.exact
    scaled = root[:, None] * (matrix + damping * torch.eye(d).double()) * root
    values = torch.linalg.eigvalsh(scaled)
    # of least norm in the preconditioner's norm: with damping there is but one
    right = -root * (torch.linalg.pinv(scaled, hermitian=True, rtol=1e-11) @ (root * quadratic.gradient))
    precision = UNITS * eps(dtype) * float(values[-1] / values[values > 1e-11 * values[-1]].min())
    assert result.stopped in (Stop.TOLERANCE, Stop.PRECISION)
    assert_equal(result.delta / root, right / root, precision)
    assert falls(quadratic, result.path, damping)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@quick
@given(d=st.integers(1, 10), seed=st.integers(0, 10**6), negative=st.integers(0, 3), scale=st.integers(-30, 30))
def test_no_step_raises_an_indefinite_quadratic(dtype, d, seed, negative, scale):
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.standard_normal((d, d)))[0]
    values = generator.uniform(0.1, 1, d)
    values[: min(negative, d)] = generator.choice([-0.1, 0.0], min(negative, d))
    matrix = torch.from_numpy((basis * values) @ basis.T).to(dtype)
    matrix = (matrix + matrix.mT) / 2

    class Symmetric:
        loss, gradient, precision = 0.0, torch.from_numpy(generator.standard_normal(d)), eps(dtype)

        def matvec(self, u):
            return (matrix @ u.to(dtype)).double() * 10.0**scale

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # negative curvature
        result = conjugate_gradients(Symmetric(), n_steps=100)
    path = result.path * 10.0**scale
    values = path @ Symmetric.gradient + 0.5 * ((path @ matrix.double()) * path).sum(1)
    assert bool((values.diff() <= max(eps(dtype), 1e-14) * values.abs().max()).all())
    assert bool((result.curvatures > 0).all())


def linear(dtype: torch.dtype, inputs: Tensor, outputs: int = 1, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(inputs.shape[1], outputs, bias=bias).to(dtype)


def least_norm(model: nn.Linear, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """The Newton step of least squares of least norm, and the condition number."""
    a = torch.cat([x, torch.ones_like(x[:, :1])], 1).double()
    w = torch.cat([model.weight, model.bias[:, None]], 1).double().detach()
    step = -torch.from_numpy(np.linalg.pinv(a.numpy(), 1e-10)) @ (a @ w.mT - y.double())
    return torch.cat([step[:-1].mT.flatten(), step[-1]]), condition(a)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DATA = {
    "fewer data than parameters": normal(3, 12),
    "one datum": normal(1, 4),
    "one-hot features": torch.eye(5).double()[[0, 1, 1, 2, 4, 4, 4]],
    "copies": normal(3, 6).repeat(4, 1),
    "zeros": torch.cat([normal(4, 3), torch.zeros(4, 3)], 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_models_newton_step_has_least_norm_in_every_precision(dtype, name, outputs):
    x = DATA[name].to(dtype)
    y = normal(len(x), outputs, seed=1).to(dtype)
    model = linear(dtype, x, outputs)
    right, kappa = least_norm(model, x, y)
    for n_steps, tolerance in ((10, None), (10, 0.0), (1000, None), (1000, 0.0)):
        result = conjugate_gradients(Quadratic(model, (x, y), "regression"), n_steps=n_steps, tolerance=tolerance)
        assert_equal(result.delta, right, UNITS * kappa * eps(dtype))
    assert result.stopped is Stop.PRECISION


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12])
def test_data_of_any_scale_are_solved_alike(dtype, scale):
    x, y = (scale * DATA["fewer data than parameters"]).to(dtype), normal(3, 1, seed=1).to(dtype)
    model = linear(dtype, x, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    result = conjugate_gradients(Quadratic(model, (x, y), "regression"), n_steps=100)
    right = torch.from_numpy(np.linalg.pinv(x.double().numpy())) @ y.double()[:, 0]
    assert_equal(result.delta * scale, right * scale, UNITS * condition(x) * eps(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_products_are_as_precise_for_vectors_of_any_size(dtype, scale):
    x, y = normal(6, 4).to(dtype), torch.arange(6) % 3
    quadratic = Quadratic(linear(dtype, x, 3), (x, y), "classification")
    u = normal(2, quadratic.n_params, seed=3)
    power = 2.0 ** round(np.log2(scale))  # so that the results are the same to the last bit
    assert torch.equal(quadratic.matvec(power * u) / power, quadratic.matvec(u))
    assert torch.equal(quadratic.curvature(power * u) / power**2, quadratic.curvature(u))
    assert torch.equal(quadratic.projected(power * u)[1] / power**2, quadratic.projected(u)[1])
    assert torch.equal(quadratic.per_datum(power * u).slopes / power, quadratic.per_datum(u).slopes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_steps_on_four_data_do_not_blow_up(dtype, curvature):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    batch = normal(4, 6).to(dtype), normal(4, 1, seed=1).to(dtype)
    optimizer = DebiasedNewtonCG(net, "regression", debiased=False, n_steps=50, curvature=curvature)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        losses = [optimizer.step(batch) for _ in range(12)]
        assert float(optimizer.last_result.delta.norm()) < 1
    assert max(losses) < 2 * losses[0]
    if curvature == "ggn":
        assert losses[-1] < eps(dtype) ** 0.5 * losses[0]


def test_a_preconditioner_may_undo_any_scaling():
    scales = 10.0 ** torch.linspace(-6, 6, 8).double()
    a = (normal(6, 8) * scales).float()
    quadratic = LeastSquares(a, normal(6, seed=1).float())
    result = conjugate_gradients(quadratic, n_steps=300, tolerance=0.0, preconditioner=lambda v: v / scales**2)
    scaled = a.double() / scales
    right = -torch.linalg.pinv(scaled) @ quadratic.b.double()
    assert result.stopped is Stop.PRECISION
    assert_equal(result.delta * scales, right, UNITS * condition(scaled) * eps(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_where_gradients_of_data_cancel_their_rounding_is_not_followed(dtype, seed):
    # At the minimum of a least squares problem with noise the gradient is a sum of large terms, zero but for rounding.
    b = torch.randint(-3, 4, (200, 6), generator=torch.Generator().manual_seed(seed)).double()
    x = torch.cat([b, b[:, :3] + b[:, 3:], b[:, :3] - b[:, 3:]], 1).to(dtype)
    y = 100 * normal(200, 1, seed=seed).to(dtype)
    model = linear(dtype, x)
    with torch.no_grad():
        for p, own in zip(model.parameters(), least_norm(model, x, y)[0].split([12, 1]), strict=True):
            p += own.view_as(p)
    inputs = torch.cat([x.double(), torch.ones(200, 1)], 1)
    null = torch.linalg.svd(inputs)[2][7:]
    assert float((inputs @ null.mT).abs().max()) < 1e-12
    for n_steps, tolerance in ((3, None), (100, None), (100, 0.0)):
        result = conjugate_gradients(Quadratic(model, (x, y), "regression"), n_steps=n_steps, tolerance=tolerance)
        assert float((null @ result.delta).norm()) < UNITS * eps(dtype) * float(model.weight.detach().norm())


def test_the_rounding_of_a_gradient_is_that_of_its_terms():
    for dtype in (torch.float32, torch.bfloat16):
        x = normal(50, 6).to(dtype)
        model = linear(dtype, x)
        y = (model(x) + normal(50, 1, seed=2).to(dtype)).detach()
        found = Quadratic(model, (x, y), "regression")
        exact_model = linear(torch.float64, x)
        exact_model.load_state_dict({name: p.double() for name, p in model.state_dict().items()})
        exact = Quadratic(exact_model, (x.double(), y.double()), "regression")
        assert found.precision == eps(dtype)
        measured, true = float(found.gradient_rounding().norm()), float((found.gradient - exact.gradient).norm())
        assert 0.1 * true < measured < 10 * eps(dtype) * float(exact.gradient.norm()) + true
        assert torch.equal(found.gradient_rounding(), found.gradient_rounding())


def test_a_precision_that_no_dtype_tells_is_measured():
    a, b = problem(torch.float32, 6, 12, 6, 1, 1)

    class Short(LeastSquares):
        """Products with eleven bits, as a GPU's TensorFloat-32 makes them, in a dtype of more."""

        def matvec(self, u):
            a, u = self.a.double(), u.double().half().double()
            return a.mT @ (a @ u).half().double()

    quadratic = Short(a, b)
    right = -torch.linalg.pinv(a.double()) @ b.double()
    for n_steps in (10, 300):
        result = conjugate_gradients(quadratic, n_steps=n_steps, tolerance=0.0)
        assert result.stopped is Stop.PRECISION
        assert_equal(result.delta, right, UNITS * condition(a) * eps(torch.float16))


def test_quadratics_that_do_not_know_their_precision_have_that_of_their_dtype():
    a, b = problem(torch.float32, 3, 12, 3, 1, 5)

    class Single:
        loss, gradient = 0.0, a.mT @ b

        def matvec(self, u):
            assert u.dtype == torch.float32
            return a.mT @ (a @ u)

    result = conjugate_gradients(Single(), n_steps=300)
    assert result.stopped is Stop.TOLERANCE
    assert float(result.gradient_norms[-1] / result.gradient_norms[0]) < 2 * eps(torch.float32)
    assert_equal(result.delta, -torch.linalg.pinv(a.double()) @ b.double(), UNITS * condition(a) * eps(torch.float32))


def test_without_a_gradient_there_is_no_step():
    for dtype in DTYPES:
        x = normal(3, 4).to(dtype)
        model = linear(dtype, x)
        result = conjugate_gradients(Quadratic(model, (x, model(x).detach()), "regression"), n_steps=5)
        assert result.n_steps == 0
        assert result.stopped is Stop.TOLERANCE
        assert not bool(result.delta.any())


def test_the_message_about_curvature_names_what_helps():
    flat = torch.zeros(2).double()

    class Flat:
        loss, gradient, kind = 0.0, flat + 1, "ggn"

        def matvec(self, u):
            return 0 * u

    def message(kind):
        quadratic = Flat()
        quadratic.kind = kind
        with pytest.warns(RuntimeWarning, match="negative or zero curvature") as caught:
            conjugate_gradients(quadratic, n_steps=2)
        return str(caught[0].message)

    assert "Gauss-Newton" not in message("ggn")
    assert message("ggn").endswith("More damping lets them go on.")
    assert 'curvature="ggn"' in message("hessian")
    assert "never negative" in message("other")


# -- steps along directions --------------------------------------------------------------------------


def test_a_curvature_of_nothing_but_rounding_takes_no_step():
    slopes = torch.tensor([[1.0, 1e-9, 1.0]]).double()
    for dtype in DTYPES:
        curvatures = torch.tensor([[1.0, 0.5 * eps(dtype), 0.0]]).double()
        derivatives = DirectionalDerivatives(slopes, curvatures, torch.ones(1).double(), eps(dtype))
        assert damped_step(derivatives).coefficients.tolist() == [-1, 0, 0]
        assert_equal(damped_step(derivatives, 0.5).coefficients[1:], -slopes[0, 1:] / (curvatures[0, 1:] + 0.5))
        step = directionally_damped_step(derivatives)
        assert step.coefficients.tolist() == [-1, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_derivatives_along_directions_know_the_models_precision(dtype):
    x, y = normal(6, 4).to(dtype), torch.arange(6) % 3
    model = linear(dtype, x, 3)
    quadratic, ggn = Quadratic(model, (x, y), "classification"), GGN(model, x, y, "classification")
    assert quadratic.per_datum(quadratic.gradient).precision == eps(dtype)
    assert ggn.directional_derivatives(ggn.eigenpairs(2)[1]).precision == eps(dtype)
    assert ggn.network.gram_precision == max(eps(dtype) ** 2, eps(torch.promote_types(dtype, torch.float32)))


# -- the curvature of a batch --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_pseudo_inverse_leaves_out_what_is_rounding_in_the_models_dtype(dtype):
    # A linear network of two layers without a bias, on data along a line: V has rank two but for rounding.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 16, bias=False), nn.Linear(16, 1, bias=False)).to(dtype)
    x = torch.linspace(0.3, 2, 20)[:, None].to(dtype)
    ggn = GGN(model, x, torch.zeros(20, 1), "regression")
    u = normal(32, seed=5)
    v = ggn.matvec(u)
    found = ggn.inverse_matvec(v)
    assert float(found.norm()) <= (1 + UNITS * eps(dtype)) * float(u.norm())  # a projection of u
    assert_equal(ggn.matvec(found), v, UNITS * eps(dtype))


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_a_damping_is_finite_and_not_negative_everywhere(damping):
    x, y = normal(4, 3), torch.arange(4) % 2
    ggn = GGN(linear(torch.float64, x, 2), x, y, "classification")
    for call in (ggn.matvec, ggn.inverse_matvec):
        with pytest.raises(ValueError, match="Expected a finite damping of at least zero, got"):
            call(torch.ones(8), damping=damping)
    with pytest.raises(ValueError, match="Expected a finite damping of at least zero, got"):
        jacobi_preconditioner(torch.full((2,), 3.0), damping)
    with pytest.raises(TypeError, match="Expected a number of at least zero for damping, got 'much'"):
        ggn.matvec(torch.ones(8), damping="much")


@pytest.mark.parametrize("generator", [3, torch.Generator().manual_seed(3)])
def test_random_vectors_stay_from_call_to_call_and_are_those_of_the_matrix(generator):
    x, y = normal(8, 3), torch.arange(8) % 4
    ggn = GGN(linear(torch.float64, x, 4), x, y, "classification", mc_samples=1, generator=generator)
    values, basis = ggn.eigenpairs(3)
    once, again = ggn.directional_derivatives(basis), ggn.directional_derivatives(basis)
    assert torch.equal(once.curvatures, again.curvatures)
    assert_equal(once.curvature, values)


class Stopped(nn.Module):
    """Half of the change of the outputs is stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():  # forward mode does not see it
            b = self.b(x)
        return self.a(x) + b


@pytest.mark.parametrize("dtype", DTYPES)
def test_stopped_gradients_are_seen_in_every_precision(dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Stopped().to(dtype)
    x, y = normal(400, 4).to(dtype), torch.arange(400) % 3
    quadratic = Quadratic(model, (x, y), "classification")
    product = quadratic.matvec(normal(quadratic.n_params, seed=2))
    assert not bool(product[15:].any())
    moving = torch.cat([normal(quadratic.n_params, seed=2)[:15], torch.zeros(15)])
    without = Quadratic(model, (x, y), "classification").matvec(moving)
    assert_equal(without[:15], product[:15], max(1e-9, 8 * eps(dtype)))


def test_the_first_forward_mode_product_says_nothing():
    code = (
        "import torch, warnings\n"
        "warnings.simplefilter('error')\n"
        "from debiased_laplace import Quadratic\n"
        "q = Quadratic(torch.nn.Linear(2, 1), (torch.ones(3, 2), torch.ones(3, 1)), 'regression')\n"
        "q.matvec(q.gradient)\n"
        "assert q._model.has_forward_mode\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# -- probabilities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", [2, 4, 1000])
def test_rows_are_probabilities_as_far_as_their_dtype_tells(dtype, n_classes):
    logits = 2 * normal(500, n_classes)
    targets = torch.arange(500) % n_classes
    p = logits.to(dtype).softmax(1)
    exact = p.double() / p.double().sum(1, keepdim=True)
    assert_equal(torch.from_numpy(_arrays.check_probabilities(p)), exact)
    for score in (classification.negative_log_likelihood, classification.brier_score):
        assert score(p, targets) == pytest.approx(score(exact, targets), rel=1e-12)
    assert classification.accuracy(p, targets) == float((p.argmax(1) == targets).double().mean())
    prediction = as_prediction(p, 500, "mine").probabilities
    assert prediction.dtype == torch.float64
    assert_equal(prediction, exact)
    off = (p.double() * 1.02).to(dtype)
    with pytest.raises(ValueError, match="this looks like logits"):
        _arrays.check_probabilities(off)
    with pytest.raises(ValueError, match="these look like logits"):
        as_prediction(off, 500, "mine")


def test_rows_of_a_finer_dtype_have_less_to_be_off():
    off = torch.tensor([[0.5, 0.505]])
    assert float(_arrays.check_probabilities(off.bfloat16()).sum()) == 1
    for dtype in (torch.float16, torch.float32, torch.float64):
        with pytest.raises(ValueError, match="rows sum to one"):
            _arrays.check_probabilities(off.to(dtype))


def test_a_noise_variance_is_not_rounded_to_the_networks_dtype():
    x = normal(5, 2).half()
    prediction = gaussian_predictor(linear(torch.float16, x), 1e-9)(x)
    assert prediction.variance.tolist() == [[1e-9]] * 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_probability_that_rounds_to_one_costs_what_rounding_hides(dtype):
    logits = torch.tensor([[-200.0], [3.0], [16.0], [60.0]], dtype=torch.float64)
    found = Bernoulli().log_loss(torch.sigmoid(logits.to(dtype)), torch.zeros(4)).double()
    exact = nn.functional.softplus(logits[:, 0])
    assert_equal(found[:2], exact[:2], 1e-6)
    assert float(found[2]) == pytest.approx(16, abs=0.7)
    assert float(found[3]) == pytest.approx(-np.log(eps(dtype) / 4), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_directions_and_noises_may_be_rounded_to_their_dtype(dtype):
    rows = torch.nn.functional.normalize(normal(3, 2)).to(dtype)
    assert_equal(alignment(rows, rows).overlaps, (rows.double() @ rows.double().mT).square())
    sigma = torch.tensor([1.0, 3.0, 0.7]).to(dtype)
    check_profile(sigma * 3, profile(sigma.double()), 3)
    with pytest.raises(ValueError, match="ratios between outputs"):
        check_profile(torch.tensor([1.0, 3.3, 0.7]).to(dtype), profile(sigma.double()), 3)


def test_networks_know_the_coarsest_dtype_of_their_parameters():
    model = nn.Sequential(nn.Linear(3, 4).bfloat16(), nn.Linear(4, 2))
    assert Network(model, None).precision == eps(torch.bfloat16)
    assert Network(model, ["1.weight", "1.bias"]).precision == eps(torch.bfloat16)  # the frozen layer before rounds
    assert Network(nn.Linear(4, 2), None).precision == eps(torch.float32)
