"""The largest eigenvalues by products: as often as they are repeated, in any precision, at any scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from debiased_laplace import GGN, Quadratic, Single, UniformSampler
from debiased_laplace._checks import ConvergenceError
from debiased_laplace.curvature.structures import LowRank, lanczos, lowrank
from debiased_laplace.fitting.fit import fit
from debiased_laplace.likelihoods import Gaussian
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.testing import dense_basis
from tests.tolerances import EXACT, FLOAT32, assert_equal

TOLERANCES = {torch.float64: EXACT, torch.float32: FLOAT32}


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    """A dense matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    matrix = (rotation * values) @ rotation.mT
    return (matrix + matrix.mT) / 2


class Products:
    """Products in some precision; their rows are counted, and at most so many at a time."""

    def __init__(self, matrix: Tensor, dtype: torch.dtype) -> None:
        self.scale = matrix.abs().max().clamp_min(1e-300)  # a network scales its numbers as well
        self.matrix, self.count, self.most = (matrix / self.scale).to(dtype), 0, 0

    def __call__(self, rows: Tensor) -> Tensor:
        self.count, self.most = self.count + len(rows), max(self.most, len(rows))
        return (rows.to(self.matrix.dtype) @ self.matrix).double() * self.scale


def check(matrix: Tensor, k: int, dtype: torch.dtype = torch.float64) -> Products:
    products, tolerance = Products(matrix, dtype), TOLERANCES[dtype]
    values, rows = lanczos.largest_eigenpairs(
        products, len(matrix), k, precision=torch.finfo(dtype).eps, name="the matrix"
    )
    scale = matrix.abs().max().clamp_min(1e-300)
    expected = torch.linalg.eigvalsh(matrix / scale).flip(0)
    limit = tolerance * float(expected.abs().max())
    assert float((values / scale - expected[:k]).abs().max()) <= limit
    assert float((rows @ (matrix / scale) - (values / scale)[:, None] * rows).abs().max()) <= limit
    assert_equal(rows @ rows.mT, torch.eye(k).double())
    return products


@st.composite
def spectra(draw: st.DrawFn) -> Tensor:
    """Copies, clusters of any width, zeros and negative values above a bulk, ``[n]``, in no order."""
    value = st.one_of(st.floats(-1, 1), st.floats(-12, 0).map(lambda e: 10.0**e))
    parts = draw(
        st.lists(st.tuples(value, st.integers(1, 24), st.sampled_from([0, 1e-15, 1e-10, 1e-7, 1e-4])), max_size=5)
    )
    n = draw(st.integers(1, 180))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    clusters = [v + w * torch.randn(copies, generator=generator, dtype=torch.float64) for v, copies, w in parts]
    low, high = draw(st.sampled_from([(0.0, 0.0), (0.0, 1e-3), (-1e-6, 0.3), (-3.0, 0.9)]))
    bulk = low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)
    return torch.cat([*clusters, bulk])[:n]


@settings(deadline=None, max_examples=300, derandomize=True)
@given(spectra(), st.floats(0, 1), st.integers(-30, 30), st.sampled_from(list(TOLERANCES)))
@example(torch.zeros(130).double(), 0.1, 0, torch.float64)
@example(torch.zeros(1).double(), 1.0, 30, torch.float32)
@example(torch.cat([torch.rand(3), torch.zeros(140)]).double(), 0.2, 0, torch.float64)  # less left than rounding
@example(-torch.logspace(-3, 0, 150).double(), 0.05, -30, torch.float64)  # the largest are the smallest in magnitude
def test_any_spectrum(spectrum, fraction, exponent, dtype):
    """Every number of eigenpairs from one to all; four in five are few enough to be found by products."""
    n = len(spectrum)
    k = max(1, round(n * (fraction if fraction > 0.8 else fraction / 5)))
    check(symmetric(spectrum) * 10.0**exponent, k, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("copies", [1, 2, 3, 9, 40])
def test_copies_are_found_by_products_alone(monkeypatch, copies, dtype):
    monkeypatch.setattr(lanczos, "FALLBACK_SIZE", 0)
    values = torch.cat(
        [2.0 ** -torch.arange(6).double().repeat_interleave(copies), torch.zeros(max(400, 20 * copies) - 6 * copies)]
    )
    matrix = symmetric(values)
    for k in (1, 2, copies, copies + 1, 2 * copies + 1, 3 * copies):
        products = check(matrix, k, dtype)
        assert products.most <= k + lanczos.BEYOND
        if copies == 1:
            assert products.most == lanczos.FIRST  # one start is enough
            assert products.count < 60


@pytest.mark.parametrize("width", [1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-3])
def test_clusters_are_found_by_products_alone(monkeypatch, width):
    monkeypatch.setattr(lanczos, "FALLBACK_SIZE", 0)
    cluster = torch.linspace(-1, 1, 7).double() * width
    values = torch.cat([1 + cluster, 0.5 + cluster, 0.2 * torch.rand(300, generator=torch.Generator().manual_seed(0))])
    for k in (7, 10, 14):  # 10 cuts the second
        check(symmetric(values), k)


def test_a_formed_matrix_and_a_function_are_the_same():
    matrix = symmetric(
        torch.cat([torch.ones(5), torch.rand(300, generator=torch.Generator().manual_seed(0)) / 2]).double()
    )
    options = {"precision": 1e-16, "name": "the matrix"}
    one = lanczos.largest_eigenpairs(matrix, 305, 6, **options)
    other = lanczos.largest_eigenpairs(lambda rows: rows @ matrix, 305, 6, **options)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_it_is_deterministic_and_draws_nothing_global():
    matrix = symmetric(torch.cat([torch.ones(5), torch.zeros(200)]).double())
    state = torch.get_rng_state()
    one, other = (lanczos.largest_eigenpairs(matrix, 205, 9, precision=1e-16, name="m") for _ in range(2))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_what_products_cannot_tell_apart_is_formed_or_named(monkeypatch):
    """Ten eigenvalues within a 1e-4th of the spectrum's width, and no gap below them."""
    matrix = symmetric(-torch.logspace(-6, 0, 200).double())
    assert check(matrix, 3).most == 200
    monkeypatch.setattr(lanczos, "FALLBACK_SIZE", 0)
    monkeypatch.setattr(lanczos, "RESTARTS", 3)
    with pytest.raises(
        ConvergenceError,
        match=r"residuals of the 3 largest eigenvalues of the matrix below 2e-13 of the largest in magnitude, got "
        r"[\de.-]+ after \d+ products.*gap below it",
    ):
        check(matrix, 3)


# -- networks whose eigenvalues are known ------------------------------------------------------------


def zero_head(dtype: torch.dtype, n: int, classes: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The start of a fine-tuning: all probabilities equal, every eigenvalue ``classes - 1`` times."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, classes)).to(dtype)
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    inputs, labels = torch.randn(n, 12).to(dtype), torch.randint(classes, (n,))
    features = torch.cat([model[:2](inputs), torch.ones(n, 1).to(dtype)], 1).double().detach()
    values = torch.linalg.eigvalsh(features.mT @ features / n / classes).flip(0)
    return model, inputs, labels, values.repeat_interleave(classes - 1)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("route", ["products", "gram", "factors"])
def test_a_classifier_with_a_zero_head(monkeypatch, route, dtype):
    n, classes = 80, 7
    model, inputs, labels, expected = zero_head(dtype, n, classes)
    monkeypatch.setattr(lanczos, "FALLBACK_SIZE", 0)
    monkeypatch.setattr(lowrank, "LANCZOS_SIZE", 100)
    if route == "factors":
        monkeypatch.setattr(lowrank, "MATRIX_FREE_SIZE", 100)
    for k in (1, 3, 6, 7, 12, 13, 20):
        if route == "products":
            monkeypatch.setattr("debiased_laplace.quadratic.quadratic.GRAM_SIZE", 0)
            values, _ = Quadratic(model, (inputs, labels), "classification").eigenpairs(k)
        else:
            values, _ = GGN(model, inputs, labels, "classification").eigenpairs(k)
        assert_equal(values.double(), expected[:k], TOLERANCES[dtype])


def linear_regression(n: int, outputs: int) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A linear network: every eigenvalue and eigenvector of its inputs' second moments once for each output."""
    torch.manual_seed(1)
    model = nn.Linear(10, outputs).double()
    inputs, targets = (
        torch.randn(n, 10).double() * torch.linspace(0.3, 2, 10).double(),
        torch.randn(n, outputs).double(),
    )
    features = torch.cat([inputs, torch.ones(n, 1).double()], 1)
    values, vectors = torch.linalg.eigh(features.mT @ features / n)
    return model, inputs, targets, values.flip(0), vectors.flip(1)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_a_regression_with_several_outputs(monkeypatch, kind):
    outputs = 12
    model, inputs, targets, values, _ = linear_regression(60, outputs)
    monkeypatch.setattr(lanczos, "FALLBACK_SIZE", 0)
    monkeypatch.setattr("debiased_laplace.quadratic.quadratic.GRAM_SIZE", 0)
    expected = values.repeat_interleave(outputs)
    for k in (1, 11, 12, 13, 30, len(expected)):  # all of them from the dense matrix
        found, rows = Quadratic(model, (inputs, targets), "regression", kind, l2=0.5).eigenpairs(k)
        assert_equal(found, expected[:k] + 0.5)
        assert_equal(rows @ rows.mT, torch.eye(k).double())


def test_a_strong_regulariser_does_not_cover_the_curvature(monkeypatch):
    model, inputs, targets, values, _ = linear_regression(60, 12)
    monkeypatch.setattr("debiased_laplace.quadratic.quadratic.GRAM_SIZE", 0)
    plain, strong = (Quadratic(model, (inputs, targets), "regression", l2=l2) for l2 in (0.0, 1e15))
    _, rows = strong.eigenpairs(13)
    assert_equal(plain.curvature(rows), values.repeat_interleave(12)[:13])


@pytest.mark.parametrize("rank", [5, 12, 17, 24, 30])
def test_a_posterior_whose_rank_cuts_an_eigenspace(monkeypatch, rank):
    """An eigenspace is kept as a whole or not at all, the first one in any case."""
    n, outputs, prior = 60, 12, 0.75
    model, inputs, targets, values, vectors = linear_regression(n, outputs)
    monkeypatch.setattr(lowrank, "LANCZOS_SIZE", 100)
    result = fit(
        model, [(inputs, targets)], Gaussian(), structure=LowRank(rank), sampler=UniformSampler(None), split=Single(),
        prior_precision=prior,
    )  # fmt: skip
    posterior, columns = result.posterior, dense_basis(result.posterior.basis)
    rank = max(rank // outputs, 1) * outputs
    assert_equal(posterior.curvatures, values.repeat_interleave(outputs)[:rank])
    assert_equal(columns.mT @ columns, torch.eye(rank).double())
    new = torch.randn(4, 10, generator=torch.Generator().manual_seed(2)).double()
    _, variances = functional_moments(result.network, posterior, new)
    features = torch.cat([new, torch.ones(4, 1).double()], 1)
    copies = (rank - outputs * torch.arange(11)).clamp(0, outputs)  # kept of every eigenspace
    gained = (1 / prior - 1 / (n * values + prior)) * copies
    expected = outputs / prior * features.square().sum(1) - (features @ vectors).square() @ gained
    assert_equal(variances.diagonal(dim1=1, dim2=2).sum(1), expected)
    each = features.square().sum(1) / prior
    assert bool((torch.linalg.eigvalsh(variances) > 0).all())
    assert bool((variances.diagonal(dim1=1, dim2=2) <= each[:, None] * (1 + EXACT)).all())
