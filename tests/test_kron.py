"""K-FAC: exact where it is exact, and equal to a naive loop and to other packages."""

from __future__ import annotations

import copy

import pytest
import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from torch import nn

from debiased_laplace._checks import NonFiniteError
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.parts.kronecker import KroneckerBasis
from debiased_laplace.curvature.projected import projected_curvatures
from debiased_laplace.curvature.structures import Kronecker, KroneckerStatistics
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from debiased_laplace.network.blocks import flatten
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.kinds import DENSE, DIAGONAL_INPUTS, KRONECKER
from debiased_laplace.network.network import Network
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.testing import dense_ggn
from tests.networks import ZOO, Apply
from tests.tolerances import EXACT, FLOAT32, assert_equal


def weighted(inputs: torch.Tensor, uniform: bool = True) -> WeightedData:
    n = len(inputs)
    weights = torch.ones(n, dtype=torch.float64) if uniform else torch.linspace(0.5, 3, n, dtype=torch.float64)
    return WeightedData(inputs, torch.zeros(n, dtype=torch.long), weights / weights.sum(), torch.arange(n))


def measured(
    model: nn.Module, data: WeightedData, likelihood: Likelihood, **options
) -> tuple[Network, KroneckerStatistics]:
    network = Network.discover(model, data.inputs, **options)
    return network, Kronecker().measure(network, CurvatureData(network, data, likelihood))


def dense(network: Network, statistics: KroneckerStatistics) -> torch.Tensor:
    """The block-diagonal matrix of Kronecker products, ``[D, D]``, in the order of the parameters."""
    identity = torch.eye(network.n_params, dtype=torch.float64)
    parameters = network.from_vector(identity)
    rows = {}
    for block, a, b in zip(network.blocks, statistics.inputs, statistics.outputs, strict=True):
        square = a if a.ndim == 3 else torch.diag_embed(a)  # an embedding has the diagonal
        rows.update(block.scatter(b @ block.gather(parameters) @ square))
    return flatten(rows, network.shapes)


def block_diagonal(network: Network, matrix: torch.Tensor) -> torch.Tensor:
    """The entries of a matrix that lie in blocks (and in groups of one convolution)."""
    label = torch.zeros(network.n_params, dtype=torch.float64)
    parameters = network.from_vector(label)
    labels, next_label = {}, 0
    for block in network.blocks:
        own = torch.zeros_like(block.gather(parameters))
        own += torch.arange(next_label, next_label + block.groups, dtype=torch.float64)[:, None, None]
        next_label += block.groups
        labels.update(block.scatter(own))
    label = flatten(labels, network.shapes)
    return torch.where(label[:, None] == label[None], matrix, torch.zeros_like(matrix))


# -- exact cases -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mlp", "mlp-no-bias", "batch-norm-1d", "frozen-weight", "frozen-bias", "frozen-layer", "lone-parameters",
             "embedding-one-token", "single-output"]
)  # fmt: skip
@pytest.mark.parametrize("likelihood", [Gaussian(), Bernoulli(), Categorical()], ids=lambda x: type(x).__name__)
def test_one_datum_without_shared_positions_is_exact(name, likelihood):
    case = ZOO[name]
    if isinstance(likelihood, Categorical) and case.n_outputs == 1:
        likelihood = Bernoulli()
    data = weighted(case.inputs(1))
    network, statistics = measured(case.model(), data, likelihood)
    ggn = dense_ggn(case.model(), data.inputs, data.weights, likelihood)
    if name == "embedding-one-token":
        assert [block.kind for block in network.blocks] == [DIAGONAL_INPUTS, KRONECKER]
    assert_equal(dense(network, statistics), block_diagonal(network, ggn), EXACT)


@pytest.mark.parametrize("separate_bias", [False, True])
@pytest.mark.parametrize("uniform", [True, False])
def test_a_deep_linear_network_with_squared_loss_is_exact(separate_bias, uniform):
    """B does not depend on the datum, so the mean of products is the product of means."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 2)).double()
    data = weighted(torch.randn(6, 3).double(), uniform)
    network, statistics = measured(model, data, Gaussian(), separate_bias=separate_bias)
    ggn = dense_ggn(model, data.inputs, data.weights, Gaussian())
    assert_equal(dense(network, statistics), block_diagonal(network, ggn), EXACT)


@pytest.mark.parametrize("uniform", [True, False])
def test_a_deep_linear_network_with_shared_positions_is_exact(uniform):
    """With a loss term for every position ("expand", arXiv 2311.00636): each position is a datum of its own."""
    torch.manual_seed(0)
    split = Apply(lambda x: x.unflatten(1, (4, 3)))
    model = nn.Sequential(split, nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Flatten()).double()
    data = weighted(torch.randn(5, 12).double(), uniform)
    network, statistics = measured(model, data, Gaussian())
    ggn = dense_ggn(model, data.inputs, data.weights, Gaussian())
    assert_equal(dense(network, statistics), block_diagonal(network, ggn), EXACT)


def test_a_deep_linear_convolutional_network_is_exact():
    """Convolutions with kernels of size one are such a network over pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, groups=1), nn.Conv2d(4, 2, 1), nn.Flatten()).double()
    data = weighted(torch.randn(5, 3, 2, 3).double(), uniform=False)
    network, statistics = measured(model, data, Gaussian())
    ggn = dense_ggn(model, data.inputs, data.weights, Gaussian())
    assert_equal(dense(network, statistics), block_diagonal(network, ggn), EXACT)


@pytest.mark.parametrize("name", ["batch-norm", "group-norm", "layer-norm", "rms-norm", "normalisation-twice",
                                  "lone-parameters", "tied-transpose", "transformer"])  # fmt: skip
def test_exact_blocks_are_the_dense_blocks_of_many_data(name):
    case = ZOO[name]
    data = weighted(case.inputs(5), uniform=False)
    network, statistics = measured(case.model(), data, Gaussian())
    ggn = block_diagonal(network, dense_ggn(case.model(), data.inputs, data.weights, Gaussian()))
    found = dense(network, statistics)
    names = {name for block in network.blocks if block.kind == DENSE for name in block.parameters}
    exact = torch.cat([torch.full((shape.numel(),), name in names) for name, shape in network.shapes.items()])
    assert bool(exact.any())
    assert_equal(found[exact], ggn[exact], EXACT)


# -- a naive loop ----------------------------------------------------------------------------------


def test_factors_equal_a_naive_loop_over_data_outputs_and_pixels():
    torch.manual_seed(1)
    conv, head = nn.Conv2d(2, 3, 2, stride=2, padding=1), nn.Linear(3, 2)
    model = nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    data = weighted(torch.randn(4, 2, 3, 3).double(), uniform=False)
    _, statistics = measured(model, data, Categorical())
    a_conv, b_conv = torch.zeros(9, 9).double(), torch.zeros(3, 3).double()
    a_head, b_head = torch.zeros(4, 4).double(), torch.zeros(2, 2).double()
    for x, w in zip(data.inputs, data.weights, strict=True):
        hidden = conv(x[None])
        features = torch.tanh(hidden).mean((2, 3))
        f = head(features)
        p = f.softmax(-1)[0]
        hessian = torch.diag(p) - torch.outer(p, p)
        padded = nn.functional.pad(x, (1, 1, 1, 1))
        for i in range(2):
            for j in range(2):
                patch = torch.cat([padded[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(), torch.ones(1)])
                a_conv += w * torch.outer(patch, patch)
        rows = torch.stack([torch.autograd.grad(f[0, c], hidden, retain_graph=True)[0][0] for c in range(2)])
        rows = rows.flatten(2)  # [C, O, S]
        b_conv += w / 4 * torch.einsum("cos,cd,dps->op", rows, hessian, rows)
        one = torch.cat([features[0], torch.ones(1)])
        a_head += w * torch.outer(one, one)
        b_head += w * hessian
    assert_equal(statistics.inputs[0][0], a_conv.detach())
    assert_equal(statistics.outputs[0][0], b_conv.detach())
    assert_equal(statistics.inputs[1][0], a_head.detach())
    assert_equal(statistics.outputs[1][0], b_head.detach())


def test_factors_of_many_positions_equal_a_naive_sum():
    """Sums over few features and many positions take another way."""
    case = ZOO["many-positions"]
    model, data = case.model(), weighted(case.inputs(4), uniform=False)
    _, statistics = measured(model, data, Gaussian())
    ones = torch.cat([data.inputs, torch.ones_like(data.inputs)], 1)
    assert_equal(statistics.inputs[0][0], torch.einsum("n,nis,njs->ij", data.weights, ones, ones))
    hidden = torch.tanh(model[0](data.inputs)).detach()
    assert_equal(statistics.inputs[1][0], torch.einsum("n,nis,njs->ij", data.weights, hidden, hidden))
    # The output is a mean over 140 positions: the gradient of each is 1/140, and B is their mean square.
    assert_equal(statistics.outputs[1][0], torch.eye(2).double() / 140**2)
    slopes = model[2].weight[:, 0, 0].square().sum() * (1 - hidden.square()).square().sum((1, 2)) / 140**2
    assert_equal(statistics.outputs[0][0, 0, 0], (data.weights * slopes).sum() / 140)


def test_groups_have_factors_of_their_own():
    """A grouped convolution is that many convolutions side by side."""
    torch.manual_seed(2)
    grouped = nn.Conv2d(4, 6, 2, groups=2)
    parts = [nn.Conv2d(2, 3, 2) for _ in range(2)]
    for k, part in enumerate(parts):
        part.weight.data.copy_(grouped.weight.data[3 * k : 3 * k + 3])
        part.bias.data.copy_(grouped.bias.data[3 * k : 3 * k + 3])

    class SideBySide(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, x):
            return torch.cat([part(half) for part, half in zip(self.parts, x.chunk(2, 1), strict=True)], 1)

    data = weighted(torch.randn(4, 4, 3, 3).double())
    tail = [nn.Tanh(), Apply(lambda x: x.mean((2, 3)))]
    _, one = measured(nn.Sequential(grouped, *tail).double(), data, Categorical())
    _, two = measured(nn.Sequential(SideBySide(), *tail).double(), data, Categorical())
    for k in range(2):
        assert_equal(one.inputs[0][k], two.inputs[k][0])
        assert_equal(one.outputs[0][k], two.outputs[k][0])


# -- other packages --------------------------------------------------------------------------------


def curvlinops_case(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    if name == "dense":
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double(), torch.randn(7, 4).double()
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)
    )
    return model.double(), torch.randn(7, 2, 4, 4).double()


@pytest.mark.parametrize("name", ["dense", "convolutional"])
@pytest.mark.parametrize("separate_bias", [True, False])
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()], ids=lambda x: type(x).__name__)
def test_curvlinops_kfac(name, separate_bias, likelihood):
    model, inputs = curvlinops_case(name)
    categorical = isinstance(likelihood, Categorical)
    targets = torch.randint(3, (7,)) if categorical else torch.randn(7, 3).double()
    # The mean of squared errors is (2 / C) times the mean of our losses.
    loss, scale = (nn.CrossEntropyLoss(), 1.0) if categorical else (nn.MSELoss(), 2 / 3)
    arguments = (model, loss, list(model.parameters()), [(inputs, targets)])
    options = {"fisher_type": "type-2", "separate_weight_and_bias": separate_bias, "check_deterministic": False}
    network, statistics = measured(model, weighted(inputs), likelihood, separate_bias=separate_bias)
    identity = torch.eye(network.n_params, dtype=torch.float64)
    assert_equal(scale * dense(network, statistics), KFACLinearOperator(*arguments, **options) @ identity, EXACT)

    basis = Kronecker().eigenbasis(network, statistics)
    corrected = projected_curvatures(network, basis, CurvatureData(network, weighted(inputs), likelihood))
    ekfac = EKFACLinearOperator(*arguments, **options) @ identity
    if separate_bias or name == "dense":
        matrix = basis.lift(scale * corrected * basis.project(identity))
        assert_equal(matrix, ekfac, EXACT)
    assert_equal(scale * corrected.sum(), ekfac.trace(), EXACT)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()], ids=lambda x: type(x).__name__)
def test_backpack_kflr_and_square_root(likelihood):
    """BackPACK's factors of the mean loss, and its exact square root of the Gauss-Newton matrix."""
    from backpack import backpack, extend
    from backpack.extensions import KFLR, SqrtGGNExact

    model, inputs = curvlinops_case("dense")
    categorical = isinstance(likelihood, Categorical)
    targets = torch.randint(3, (7,)) if categorical else torch.randn(7, 3).double()
    loss, scale = (nn.CrossEntropyLoss(), 1.0) if categorical else (nn.MSELoss(), 2 / 3)
    network, statistics = measured(model, weighted(inputs), likelihood, separate_bias=True)
    extended, loss = extend(copy.deepcopy(model)), extend(loss)  # it leaves hooks in its modules
    with backpack(KFLR(), SqrtGGNExact()):
        loss(extended(inputs), targets).backward()
    found = dense(network, statistics) * scale
    roots, expected = [], []
    for parameter in extended.parameters():
        factors = parameter.kflr
        expected.append(factors[0] if len(factors) == 1 else torch.kron(factors[0], factors[1]))
        roots.append(parameter.sqrt_ggn_exact.flatten(2))
    assert_equal(found, torch.block_diag(*expected), EXACT)
    root = torch.cat(roots, -1).flatten(0, 1)
    ggn = dense_ggn(model, inputs, weighted(inputs).weights, likelihood)
    assert_equal(scale * ggn, root.mT @ root, EXACT)


# -- the basis -------------------------------------------------------------------------------------


def test_the_basis_diagonalises_the_factors():
    case = ZOO["cnn"]
    data = weighted(case.inputs(6), uniform=False)
    network, statistics = measured(case.model(), data, Gaussian())
    basis = Kronecker().eigenbasis(network, statistics)
    for part, a, b in zip(basis.parts, statistics.inputs, statistics.outputs, strict=True):
        for vectors, matrix in ((part.inputs, a), (part.outputs, b)):
            rotated = vectors.mT @ matrix @ vectors
            values = rotated.diagonal(dim1=1, dim2=2)
            assert float((rotated - torch.diag_embed(values)).abs().max()) < EXACT * float(matrix.abs().max())
            assert bool((values.diff(dim=-1) <= EXACT * float(matrix.abs().max())).all()), (
                "not by descending eigenvalues"
            )


def test_factored_curvatures_are_the_eigenvalues_of_kfac_and_add_up_to_its_trace():
    case = ZOO["cnn"]
    data, other = weighted(case.inputs(6)), weighted(case.inputs(5, seed=4), uniform=False)
    network, statistics = measured(case.model(), data, Gaussian())
    basis = Kronecker().eigenbasis(network, statistics)
    matrix = dense(network, statistics)
    identity = torch.eye(network.n_params, dtype=torch.float64)
    assert_equal(basis.lift(statistics.curvatures(basis) * basis.project(identity)), matrix, EXACT)
    # On other data it is the diagonal of their matrix in this basis.
    _, second = measured(case.model(), other, Gaussian())
    columns = basis.lift(identity).mT
    expected = (columns * (dense(network, second) @ columns)).sum(0)
    assert_equal(second.curvatures(basis), expected, EXACT)


def test_dead_units_and_zero_statistics_have_an_orthonormal_basis():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    model[0].bias.data.fill_(-100.0)  # no unit is ever active
    network, statistics = measured(model, weighted(torch.randn(5, 3).double()), Categorical())
    basis = Kronecker().eigenbasis(network, statistics)
    for part in basis.parts:
        for vectors in (part.inputs, part.outputs):
            assert_equal(vectors.mT @ vectors, torch.eye(vectors.shape[-1]).double().expand(1, -1, -1), EXACT)
    curvatures = projected_curvatures(
        network, basis, CurvatureData(network, weighted(torch.randn(5, 3).double()), Categorical())
    )
    assert bool((curvatures >= 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_measure_in_float32(dtype):
    case = ZOO["cnn"]
    inputs = case.inputs(6)
    _, expected = measured(case.model(), weighted(inputs), Gaussian())
    _, found = measured(case.model(dtype=dtype), weighted(inputs.to(dtype)), Gaussian())
    for a, b in zip(found.inputs + found.outputs, expected.inputs + expected.outputs, strict=True):
        assert a.dtype == torch.float32
        # bfloat16 keeps eight bits of every activation: the statistics cannot be better than that.
        assert_equal(a.double(), b, FLOAT32 if dtype == torch.float32 else 2**-4)


def test_statistics_of_a_random_square_root_are_unbiased():
    from tests.tolerances import assert_unbiased

    case = ZOO["mlp"]
    data = weighted(case.inputs(4), uniform=False)
    network, expected = measured(case.model(), data, Categorical())
    samples = []
    for seed in range(300):
        chunks = CurvatureData(
            network, data, Categorical(), mc_samples=2, generator=torch.Generator().manual_seed(seed)
        )
        statistics = Kronecker().measure(network, chunks)
        assert_equal(statistics.inputs[0], expected.inputs[0])
        samples.append(torch.cat([b.flatten() for b in statistics.outputs]))
    assert_unbiased(torch.stack(samples), torch.cat([b.flatten() for b in expected.outputs]))


def test_projections_do_not_depend_on_the_memory_they_may_take(monkeypatch):
    from debiased_laplace.curvature import contractions as module

    case = ZOO["cnn"]
    data = weighted(case.inputs(6), uniform=False)
    network, statistics = measured(case.model(), data, Gaussian())
    whole = Kronecker().eigenbasis(network, statistics)
    expected = projected_curvatures(network, whole, CurvatureData(network, data, Gaussian()))
    for memory in (1, 200, 2000):
        monkeypatch.setitem(module.PROJECTION_MEMORY, "cpu", memory)
        found = projected_curvatures(network, whole, CurvatureData(network, data, Gaussian()))
        assert_equal(found, expected)


@pytest.mark.parametrize("vector_chunk", [1, 2, 16])
def test_statistics_do_not_depend_on_how_many_vectors_go_together(vector_chunk):
    case = ZOO["cnn"]
    data = weighted(case.inputs(4), uniform=False)
    network, expected = measured(case.model(), data, Gaussian())
    basis = Kronecker().eigenbasis(network, expected)
    along = projected_curvatures(network, basis, CurvatureData(network, data, Gaussian()))
    network.vector_chunk = vector_chunk
    found = Kronecker().measure(network, CurvatureData(network, data, Gaussian()))
    for a, b in zip(found.inputs + found.outputs, expected.inputs + expected.outputs, strict=True):
        assert_equal(a, b)
    assert_equal(projected_curvatures(network, basis, CurvatureData(network, data, Gaussian())), along)


def test_a_failing_eigendecomposition_moves_to_double_precision_and_then_names_the_block(monkeypatch):
    case = ZOO["mlp"]
    network, statistics = measured(case.model(), weighted(case.inputs(4)), Gaussian())
    eigh, calls = torch.linalg.eigh, []

    def fails(matrix, first_only=True):
        calls.append(matrix.dtype)
        if not first_only or matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    Kronecker(eigh_dtype=torch.float32).eigenbasis(network, statistics)
    assert calls[:2] == [torch.float32, torch.float64]
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: fails(matrix, first_only=False))
    with pytest.raises(RuntimeError, match="curvature of '0' failed"):
        Kronecker().eigenbasis(network, statistics)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])  # the square of the last is infinite
def test_not_a_number_in_one_datum_names_the_layer(value):
    case = ZOO["mlp"]
    inputs = case.inputs(6)
    inputs[5, 0] = value
    network = Network.discover(case.model(), inputs[:3])
    with pytest.raises(NonFiniteError, match="finite inputs at the layer '0'"):
        Kronecker().measure(network, CurvatureData(network, weighted(inputs), Gaussian()))


def test_an_overflow_inside_the_network_names_the_layer_behind_it():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)).to(torch.float16)
    model[1].weight.data.fill_(300.0)
    inputs = torch.randn(6, 2).to(torch.float16)
    inputs[:5] *= 0.001
    inputs[5] = 1000.0
    model[0].weight.data.fill_(1.0)
    network = Network.discover(model, inputs[:3])
    with pytest.raises(NonFiniteError, match=r"at the layer '2'.*overflow"):
        Kronecker().measure(network, CurvatureData(network, weighted(inputs), Gaussian()))


def test_statistics_add_up_across_bases_of_the_same_blocks():
    case = ZOO["mlp"]
    network, statistics = measured(case.model(), weighted(case.inputs(4)), Gaussian())
    total = statistics + statistics
    assert_equal(total.inputs[0], 2 * statistics.inputs[0])
    assert_equal(total.outputs[1], 2 * statistics.outputs[1])
    basis = Kronecker().eigenbasis(network, statistics)
    assert isinstance(basis, Basis)
    assert all(isinstance(part, KroneckerBasis) for part in basis.parts)
