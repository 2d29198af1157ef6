"""The dense structure: equal to the dense reference, whole and in blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from debiased_laplace import TwoBatch, UniformSampler
from debiased_laplace._checks import NonFiniteError
from debiased_laplace.curvature.structures import Full, LowRank
from debiased_laplace.curvature.structures.base import group_blocks
from debiased_laplace.fitting.fit import fit
from debiased_laplace.likelihoods import Categorical, Gaussian
from debiased_laplace.network.blocks import unflatten
from debiased_laplace.network.network import Network
from debiased_laplace.testing import dense_basis, dense_ggn
from tests.datasets import LIKELIHOODS, example, measure, targets, valid
from tests.networks import ZOO
from tests.tolerances import EXACT, assert_equal, assert_unbiased


def order(network: Network, group: tuple[int, ...]) -> Tensor:
    """Positions of a group's parameters in the parameter vector, block after block."""
    positions = torch.arange(network.n_params)
    return torch.cat([network.blocks[i].gather(unflatten(positions, network.shapes)).flatten() for i in group])


def matrix(basis, curvatures: Tensor) -> Tensor:
    columns = dense_basis(basis)
    return (columns * curvatures) @ columns.mT


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied-weights", "tied-transpose", "batch-norm", "lone-parameters",
                                  "attention", "frozen-in-convolutions", "embedding", "single-output"])  # fmt: skip
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda x: type(x).__name__)
def test_the_dense_matrix_and_its_eigenvalues(name, likelihood):
    likelihood = valid(likelihood, ZOO[name])
    model, network, data = example(ZOO[name], likelihood)
    statistics = measure(Full(), network, data, likelihood)
    ggn = dense_ggn(model, data.inputs, data.weights, likelihood, data.targets)
    own = order(network, tuple(range(len(network.blocks))))
    (found,) = statistics.matrices
    assert_equal(found, ggn[own][:, own])
    basis = Full().eigenbasis(network, statistics)
    curvatures = statistics.curvatures(basis)
    assert basis.complete
    assert bool((curvatures >= 0).all())
    assert_equal(curvatures, torch.linalg.eigvalsh(ggn).flip(0).clamp_min(0))
    assert_equal(matrix(basis, curvatures), ggn)


def test_single_precision_sums_in_double():
    case = ZOO["cnn"]
    inputs, labels = case.inputs(6, dtype=torch.float32), targets(Categorical(), 6, 2)
    posterior = fit(case.model(dtype=torch.float32), [(inputs, labels)], Categorical(), structure=Full()).posterior
    assert posterior.curvatures.dtype == torch.float64
    columns = dense_basis(posterior.basis)
    assert_equal(columns.mT @ columns, torch.eye(len(columns), dtype=torch.float64))


def in_blocks(network: Network, groups: list[tuple[int, ...]], ggn: Tensor) -> Tensor:
    """The entries of a matrix within groups."""
    label = torch.zeros(network.n_params)
    for index, group in enumerate(groups):
        label[order(network, group)] = index
    return torch.where(label[:, None] == label, ggn, 0.0)


@pytest.mark.parametrize(
    ("blocks", "groups"),
    [
        ("layer", [(0,), (1,), (2,)]),
        ([["0.*", "6.*"], ["2.*"]], [(0, 2), (1,)]),
        ([["2.weight", "2.bias"], ["[06].*"]], [(1,), (0, 2)]),
        ([["*"]], [(0, 1, 2)]),
        (None, [(0, 1, 2)]),
    ],
    ids=["layer", "patterns", "names", "one-group", "none"],
)
@pytest.mark.parametrize("kind", [Full, LowRank])
def test_blocks(blocks, groups, kind):
    """Cross terms between the groups are left out, those within are not."""
    model, network, data = example(ZOO["cnn"], Categorical())
    assert [block.name for block in network.blocks] == ["0", "2", "6"]
    structure = kind(blocks=blocks) if kind is Full else kind(100, blocks=blocks)
    statistics = measure(structure, network, data, Categorical())
    basis = structure.eigenbasis(network, statistics)
    assert basis.members == groups
    ggn = in_blocks(network, groups, dense_ggn(model, data.inputs, data.weights, Categorical()))
    assert_equal(matrix(basis, statistics.curvatures(basis)), ggn)


@pytest.mark.parametrize(
    ("blocks", "match"),
    [
        ([["0.*"]], r"parameters \['2.weight', '2.bias'\], which share a curvature block, in exactly one group"),
        ([["*"], ["2.*"]], r"\['2.weight', '2.bias'\].*in exactly one group of blocks=\[\['\*'\], \['2.\*'\]\]"),
        ([["0.weight", "2.*"], ["0.bias"]], r"\['0.weight', '0.bias'\], which share a curvature block"),
        ([["*"], ["nothing"]], "every group of blocks to match a parameter"),
        ("layers", r'None, "layer" or lists of patterns of parameter names, got \'layers\''),
    ],
    ids=["in-none", "in-two", "cut", "empty", "word"],
)
@pytest.mark.parametrize("kind", [Full, LowRank])
def test_groups_that_are_no_partition(blocks, match, kind):
    _, network, data = example(ZOO["mlp"], Categorical())
    with pytest.raises(ValueError, match=match):
        measure(kind(blocks=blocks), network, data, Categorical())


def test_separate_biases_may_be_in_groups_of_their_own():
    model, network, data = example(ZOO["mlp"], Categorical(), separate_bias=True)
    groups = group_blocks(network, [["*weight"], ["*bias"]])
    structure = Full(blocks=[["*weight"], ["*bias"]])
    statistics = measure(structure, network, data, Categorical())
    basis = structure.eigenbasis(network, statistics)
    ggn = in_blocks(network, groups, dense_ggn(model, data.inputs, data.weights, Categorical()))
    assert_equal(matrix(basis, statistics.curvatures(basis)), ggn)


def test_too_many_parameters():
    _, network, data = example(ZOO["mlp"], Categorical())
    with pytest.raises(ValueError, match=r"at most 25 parameters for a dense matrix, got 26: .* raise max_params"):
        measure(Full(max_params=25), network, data, Categorical())
    measure(Full(max_params=26), network, data, Categorical())
    measure(Full(max_params=16, blocks="layer"), network, data, Categorical())  # of one matrix: 16 and 10
    with pytest.raises(ValueError, match="at most 15 parameters for a dense matrix, got 16"):
        measure(Full(max_params=15, blocks="layer"), network, data, Categorical())


def test_random_vectors_are_unbiased():
    model, network, data = example(ZOO["mlp"], Categorical())
    own = order(network, (0, 1))
    samples = [
        measure(Full(), network, data, Categorical(), mc_samples=2, generator=torch.Generator().manual_seed(seed))
        for seed in range(200)
    ]
    ggn = dense_ggn(model, data.inputs, data.weights, Categorical())
    assert_unbiased(torch.stack([s.matrices[0] for s in samples]), ggn[own][:, own])


@pytest.mark.parametrize("estimator", ["projected", "factored"])
def test_curvatures_of_the_second_batch(estimator):
    case = ZOO["cnn"]
    inputs, labels = case.inputs(20), targets(Categorical(), 20, 2)
    result = fit(
        case.model(), [(inputs, labels)], Categorical(), structure=Full(), split=TwoBatch(),
        sampler=UniformSampler(10), estimator=estimator, n_data=10**12,  # the data stand for nearly nothing but others
    )  # fmt: skip
    own = result.curvature_indices
    assert not set(own.tolist()) & set(result.direction_indices.tolist())
    columns = dense_basis(result.posterior.basis)
    first, second = (
        dense_ggn(case.model(), inputs[i], torch.full((5,), 0.2, dtype=torch.float64), Categorical())
        for i in (result.direction_indices, own)
    )
    assert_equal(result.posterior.curvatures, torch.einsum("dr,de,er->r", columns, second, columns))
    rotated = columns.mT @ first @ columns
    assert float((rotated - torch.diag(rotated.diagonal())).abs().max()) < EXACT * float(rotated.max())


def test_not_a_number_names_the_blocks():
    _, network, data = example(ZOO["mlp"], Gaussian())
    data.inputs[2, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"curvature of '0', '2'"):
        measure(Full(), network, data, Gaussian())
