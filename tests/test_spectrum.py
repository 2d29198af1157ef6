"""The curvature of a batch: spectrum, eigenpairs, derivatives of every datum, products with the inverse."""

from __future__ import annotations

import pytest
import torch

from debiased_laplace import GGN, Kronecker, directional_derivatives, testing
from debiased_laplace.likelihoods import Categorical, Gaussian
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.sampling.sample import WeightedData
from tests.tolerances import assert_equal, assert_unbiased

PROBLEMS = testing.problems()


def ggn_of(problem, **options):
    return GGN(
        problem.model, problem.data.inputs, problem.data.targets, problem.likelihood,
        weights=problem.data.weights, **options,
    )  # fmt: skip


def dense_of(problem):
    return testing.dense_ggn(problem.model, problem.data.inputs, problem.data.weights, problem.likelihood)


def gradients_of(problem):
    """Gradient of every datum's loss, ``[N, D]``, by automatic differentiation."""
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    losses = problem.likelihood.loss(problem.model(problem.data.inputs), problem.data.targets)
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.fixture(params=PROBLEMS, ids=lambda p: p.name)
def problem(request):
    return request.param


def test_the_spectrum_is_that_of_the_dense_matrix(problem):
    ggn, matrix = ggn_of(problem), dense_of(problem)
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    values = ggn.eigenvalues()
    n = min(len(values), len(expected))
    assert_equal(values[:n], expected[:n].clamp_min(0))
    assert float(values[n:].abs().sum()) < 1e-12
    assert_equal(ggn.trace, matrix.trace())


def test_eigenpairs_are_eigenpairs(problem):
    ggn, matrix = ggn_of(problem), dense_of(problem)
    values, directions = ggn.eigenpairs(2)
    columns = testing.dense_basis(directions)
    assert_equal(matrix @ columns, columns * values)
    assert_equal(values, torch.linalg.eigvalsh(matrix).flip(0)[:2])


def test_products_with_the_matrix_and_its_damped_inverse(problem):
    ggn, matrix = ggn_of(problem), dense_of(problem)
    vector = torch.randn(2, 3, len(matrix), generator=torch.Generator().manual_seed(0)).double()
    identity = torch.eye(len(matrix)).double()
    assert_equal(ggn.matvec(vector), vector @ matrix)
    assert_equal(ggn.matvec(vector[0, 0], damping=0.3), (matrix + 0.3 * identity) @ vector[0, 0])
    assert_equal(ggn.inverse_matvec(vector, damping=0.05), vector @ (matrix + 0.05 * identity).inverse())


def test_without_damping_it_is_the_pseudo_inverse():
    problem = PROBLEMS[0]
    ggn, matrix = ggn_of(problem), dense_of(problem)
    vector = torch.randn(3, len(matrix), generator=torch.Generator().manual_seed(0)).double()
    inverse = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12)
    assert_equal(matrix @ ggn.inverse_matvec(vector).mT, matrix @ inverse @ vector.mT)
    assert_equal(ggn.inverse_matvec(ggn.matvec(vector)), vector @ matrix @ inverse)
    with pytest.raises(ValueError, match=r"a finite damping of at least zero, got -0.1"):
        ggn.inverse_matvec(vector, damping=-0.1)


def test_blocks_are_those_of_the_block_diagonal(problem):
    ggn, matrix = ggn_of(problem, blocks="layer"), dense_of(problem)
    network = ggn.network
    position = torch.arange(len(matrix)).double()
    owner = torch.empty(len(matrix))
    for index, block in enumerate(network.blocks):
        rows = block.gather({n: t.double() for n, t in network.from_vector(position).items()}).flatten().long()
        owner[rows] = index
    matrix = torch.where(owner[:, None] == owner, matrix, 0.0)
    vector = torch.randn(3, len(matrix), generator=torch.Generator().manual_seed(0)).double()
    assert_equal(ggn.matvec(vector), vector @ matrix)
    damped = matrix + 0.1 * torch.eye(len(matrix)).double()
    assert_equal(ggn.inverse_matvec(vector, damping=0.1), vector @ damped.inverse())
    top = ggn.eigenvalues()[:3]
    assert_equal(top, torch.linalg.eigvalsh(matrix).flip(0)[:3])


def test_slopes_and_curvatures_of_every_datum(problem):
    """Equations (7) and (8) of ViViT, along any directions."""
    ggn = ggn_of(problem)
    _, directions = ggn.eigenpairs(3)
    found = ggn.directional_derivatives(directions)
    columns, gradients = testing.dense_basis(directions), gradients_of(problem)
    assert_equal(found.slopes, gradients @ columns)
    for n in range(len(problem.data)):
        one = torch.zeros(len(problem.data)).double()
        one[n] = 1
        matrix = testing.dense_ggn(problem.model, problem.data.inputs, one, problem.likelihood)
        assert_equal(found.curvatures[n], torch.einsum("dk,de,ek->k", columns, matrix, columns))
    weights = problem.data.weights
    assert_equal(found.slope, weights @ gradients @ columns)
    assert_equal(found.curvature, torch.einsum("dk,de,ek->k", columns, dense_of(problem), columns))
    for values, snr in ((found.slopes, found.slope_snr), (found.curvatures, found.curvature_snr)):
        mean = (weights[:, None] * values).sum(0) / weights.sum()
        variance = (weights[:, None] * (values - mean).square()).sum(0) / weights.sum()
        assert_equal(snr * variance, mean.square())


def test_directions_may_be_of_any_structure_and_from_other_data():
    problem = PROBLEMS[0]
    first, second = problem.data.take(slice(0, 4)), problem.data.take(slice(4, 7))
    network = Network.discover(problem.model, problem.data.inputs)
    statistics = Kronecker().measure(network, CurvatureData(network, first, problem.likelihood))
    basis = Kronecker().eigenbasis(network, statistics)
    found = directional_derivatives(network, basis, second, problem.likelihood, chunk_size=2)
    columns = testing.dense_basis(basis)
    matrix = testing.dense_ggn(problem.model, second.inputs, second.weights, problem.likelihood)
    assert_equal(found.curvature, torch.einsum("dk,de,ek->k", columns, matrix, columns))
    assert_equal(found.slopes, gradients_of(problem)[4:] @ columns)


def test_a_subsample_and_random_vectors_are_unbiased():
    problem = PROBLEMS[0]
    vector = torch.randn(31, generator=torch.Generator().manual_seed(0)).double()
    expected = ggn_of(problem).matvec(vector)
    for options in ({"subsample": 3}, {"mc_samples": 1}, {"subsample": 2, "mc_samples": 2}):
        found = torch.stack([ggn_of(problem, generator=seed, **options).matvec(vector) for seed in range(400)])
        assert_unbiased(found, expected)


def test_last_layer_names_and_default_weights():
    problem = PROBLEMS[0]
    ggn = GGN(problem.model, problem.data.inputs, problem.data.targets, "classification", parameters="last_layer")
    assert list(ggn.network.shapes) == ["2.weight", "2.bias"]
    weights = torch.full((7,), 1 / 7, dtype=torch.float64)
    matrix = testing.dense_ggn(problem.model, problem.data.inputs, weights, Categorical())[-15:, -15:]
    identity = torch.eye(15).double()
    assert_equal(ggn.matvec(identity), matrix)


def test_bad_arguments():
    problem = PROBLEMS[0]
    data: WeightedData = problem.data
    with pytest.raises(ValueError, match="to subsample between 1 and all 7 data, got 8"):
        ggn_of(problem, subsample=8)
    with pytest.raises(ValueError, match=r"shape \[N, 3\].* got \(7,\).* Class indices are for"):
        GGN(problem.model, data.inputs, data.targets, Gaussian())
    with pytest.raises(ValueError, match="rank to be a positive number"):
        ggn_of(problem).eigenpairs(0)
