"""Low rank: the eigenpairs of the dense matrix, in any precision, and the bias that two batches cure."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from debiased_laplace import GGN, CrossFit, Single, TwoBatch, UniformSampler
from debiased_laplace._checks import NonFiniteError
from debiased_laplace.curvature.structures import Full, Kronecker, LowRank, lanczos, lowrank
from debiased_laplace.fitting.fit import fit
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.predictive import functional_moments, joint_covariance
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.testing import dense_basis, dense_ggn, dense_jacobian
from tests.datasets import LIKELIHOODS, example, measure, targets, valid, weighted
from tests.networks import ZOO
from tests.tolerances import EXACT, FLOAT32, MONTE_CARLO_Z, assert_equal, assert_unbiased, z_scores

NETWORKS = ["mlp", "cnn", "conv1d", "convolution-twice", "tied-transpose", "batch-norm", "lone-parameters", "attention",
            "frozen-in-convolutions", "embedding", "single-output", "many-positions"]  # fmt: skip


def spectrum(ggn: Tensor, k: int) -> Tensor:
    return torch.linalg.eigvalsh(ggn).flip(0)[:k]


# -- eigenpairs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda x: type(x).__name__)
def test_the_gram_matrix_has_the_spectrum_of_the_dense_one(name, likelihood):
    likelihood = valid(likelihood, ZOO[name])
    model, network, data = example(ZOO[name], likelihood, n=4)
    ggn = dense_ggn(model, data.inputs, data.weights, likelihood, data.targets)
    for chunk_size in (None, 1, 3):
        statistics = measure(LowRank(), network, data, likelihood, chunk_size=chunk_size)
        gram = statistics.gram()
        n_vectors = ZOO[name].n_outputs - isinstance(likelihood, Categorical)
        assert gram.shape == (4 * n_vectors, 4 * n_vectors)
        k = min(len(gram), len(ggn))
        assert_equal(spectrum(gram, k), spectrum(ggn, k))
        assert_equal(gram.trace(), ggn.trace())
    blockwise = sum(statistics.gram((index,)) for index in range(len(network.blocks)))
    assert_equal(blockwise, gram)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_directions_are_eigenvectors(name, likelihood, chunk_size):
    """G e = lambda e, with the eigenvalue as the curvature along them; with one vector for each datum, and with two."""
    likelihood = valid(likelihood, ZOO[name])
    model, network, data = example(ZOO[name], likelihood)
    ggn = dense_ggn(model, data.inputs, data.weights, likelihood, data.targets)
    structure = LowRank(3)
    statistics = measure(structure, network, data, likelihood, chunk_size=chunk_size)
    basis = structure.eigenbasis(network, statistics)
    columns, curvatures = dense_basis(basis), statistics.curvatures(basis)
    assert basis.rank == 3
    assert_equal(curvatures, spectrum(ggn, 3))
    assert_equal(ggn @ columns, curvatures * columns)
    assert_equal(columns.mT @ columns, torch.eye(3, dtype=torch.float64))


def convolutional() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)
    )
    return model.double(), torch.randn(7, 2, 4, 4).double(), torch.randint(3, (7,))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_backpack_square_root():
    """V V^T and the spectrum of V^T V; its V has a column more for each datum, in the null space of the softmax."""
    from backpack import backpack, extend
    from backpack.extensions import SqrtGGNExact

    model, inputs, labels = convolutional()
    extended = extend(copy.deepcopy(model))  # it leaves hooks in its modules
    with backpack(SqrtGGNExact()):
        extend(nn.CrossEntropyLoss())(extended(inputs), labels).backward()
    root = torch.cat([p.sqrt_ggn_exact.flatten(2) for p in extended.parameters()], -1).flatten(0, 1)  # [N V, D]
    data = weighted(inputs, labels, uniform=True)
    network = Network.discover(model, inputs)
    statistics = measure(LowRank(), network, data, Categorical())
    gram = statistics.gram()
    assert_equal(spectrum(gram, 14), spectrum(root @ root.mT, 14))
    assert float(spectrum(root @ root.mT, 21)[14]) < EXACT
    basis = LowRank(100).eigenbasis(network, statistics)
    columns = dense_basis(basis)
    assert_equal((columns * statistics.curvatures(basis)) @ columns.mT, root.mT @ root)


def test_few_eigenpairs_of_large_matrices_come_from_lanczos_method(monkeypatch):
    model, network, data = example(ZOO["cnn"], Gaussian(), n=30)
    dense = LowRank(4).eigenbasis(network, measure(LowRank(4), network, data, Gaussian()))
    calls = []
    original = lowrank.largest_eigenpairs
    monkeypatch.setattr(lowrank, "LANCZOS_SIZE", 10)
    monkeypatch.setattr(lanczos, "DENSE_SIZE", 0)
    monkeypatch.setattr(
        lowrank, "largest_eigenpairs", lambda *args, **kwargs: calls.append(kwargs) or original(*args, **kwargs)
    )
    found = LowRank(4).eigenbasis(network, measure(LowRank(4), network, data, Gaussian()))
    assert len(calls) == 1
    one, other = dense_basis(found), dense_basis(dense)
    assert_equal(one @ one.mT, other @ other.mT)
    ggn = dense_ggn(model, data.inputs, data.weights, Gaussian())
    assert_equal((one.mT @ ggn @ one).diagonal(), spectrum(ggn, 4))
    again = LowRank(4).eigenbasis(network, measure(LowRank(4), network, data, Gaussian()))
    assert torch.equal(dense_basis(again), one)
    # Many eigenpairs, or a fraction of the trace, need the whole decomposition.
    for rank in (7, 0.5):
        LowRank(rank).eigenbasis(network, measure(LowRank(rank), network, data, Gaussian()))
    assert len(calls) == 2


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_a_fraction_of_the_trace_of_the_first_data(fraction):
    """The smallest number of directions that explains it, whatever the second data say."""
    case = ZOO["cnn"]
    inputs, labels = case.inputs(20), targets(Categorical(), 20, 2)
    result = fit(
        case.model(), [(inputs, labels)], Categorical(), structure=LowRank(fraction), sampler=UniformSampler(16),
        split=TwoBatch(),
    )  # fmt: skip
    own = inputs[result.direction_indices]
    values = torch.linalg.eigvalsh(dense_ggn(case.model(), own, torch.full((8,), 1 / 8).double(), Categorical())).flip(
        0
    )
    explained = values.cumsum(0) / values.sum()
    rank = result.posterior.basis.rank
    assert float(explained[rank - 1]) >= fraction
    assert rank == 1 or float(explained[rank - 2]) < fraction


def test_a_fraction_of_every_block_by_itself():
    model, network, data = example(ZOO["cnn"], Categorical())
    structure = LowRank(0.8, blocks="layer")
    basis = structure.eigenbasis(network, measure(structure, network, data, Categorical()))
    ggn = dense_ggn(model, data.inputs, data.weights, Categorical())
    columns = dense_basis(basis)
    for own in columns.split(basis.sizes, 1):
        rows = own.abs().sum(1) > 0
        values = torch.linalg.eigvalsh(ggn[rows][:, rows]).flip(0)
        explained = values.cumsum(0) / values.sum()
        k = own.shape[1]
        assert float(explained[k - 1]) >= 0.8
        assert k == 1 or float(explained[k - 2]) < 0.8
        assert_equal((own.mT @ ggn @ own).diagonal(), values[:k])


@pytest.mark.parametrize(
    "structure", [LowRank(3), LowRank(0.9), LowRank(2, blocks="layer"), Full(), Kronecker()], ids=repr
)
def test_other_measuring_data_cannot_change_the_basis(structure):
    case = ZOO["cnn"]
    inputs, labels = case.inputs(20), targets(Categorical(), 20, 2)

    def fitted(inputs: Tensor, labels: Tensor):
        return fit(
            case.model(), [(inputs, labels)], Categorical(), structure=structure, sampler=UniformSampler(12),
            split=TwoBatch(), generator=3,
        )  # fmt: skip

    one = fitted(inputs, labels)
    changed, other_labels = inputs.clone(), labels.clone()
    changed[one.curvature_indices] = 30 * changed[one.curvature_indices] + 1
    other_labels[one.curvature_indices] = 1 - labels[one.curvature_indices]
    other = fitted(changed, other_labels)
    assert torch.equal(dense_basis(one.posterior.basis), dense_basis(other.posterior.basis))
    assert not torch.equal(one.posterior.curvatures, other.posterior.curvatures)


def test_the_rank_is_that_of_the_curvature_at_most():
    """One datum with two outputs gives one direction; nothing is made of rounding errors."""
    for dtype in (torch.float64, torch.float32):
        case = ZOO["mlp"]
        model = case.model(dtype=dtype)
        data = weighted(case.inputs(1, dtype=dtype), torch.zeros(1).long())
        data = data.take(torch.zeros(30, dtype=torch.long))  # the same datum many times
        network = Network.discover(model, data.inputs)
        basis = LowRank(20).eigenbasis(network, measure(LowRank(20), network, data, Categorical()))
        assert basis.rank == 1


def test_many_data_do_not_shorten_the_rank_in_single_precision():
    """The error of a Gram matrix is far below its size times the precision."""
    case = ZOO["cnn"]
    inputs, labels = case.inputs(500), targets(Categorical(), 500, 2)
    ranks, curvatures = [], []
    for dtype in (torch.float64, torch.float32):
        data = weighted(inputs.to(dtype), labels)
        network = Network.discover(case.model(dtype=dtype), data.inputs)
        statistics = measure(LowRank(60), network, data, Categorical())
        basis = LowRank(60).eigenbasis(network, statistics)
        ranks.append(basis.rank)
        curvatures.append(statistics.curvatures(basis).double())
    assert ranks == [60, 60]
    assert_equal(curvatures[1], curvatures[0], FLOAT32)


# -- equal to the dense structure where nothing is left out ----------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "lone-parameters"])
@pytest.mark.parametrize("blocks", [None, "layer"])
def test_with_all_directions_it_is_the_dense_posterior(name, blocks):
    case = ZOO[name]
    batch = [(case.inputs(6), targets(Categorical(), 6, 2))]
    options = {"sampler": UniformSampler(None), "split": Single(), "prior_precision": 0.4}
    low = fit(case.model(), batch, Categorical(), structure=LowRank(1000, blocks=blocks), **options)
    full = fit(case.model(), batch, Categorical(), structure=Full(blocks=blocks), **options)
    assert not low.posterior.basis.complete
    identity = torch.eye(len(full.posterior.mean), dtype=torch.float64)
    assert_equal(low.posterior.matvec(identity), full.posterior.matvec(identity))
    assert_equal(low.posterior.covariance_matvec(identity), full.posterior.covariance_matvec(identity))
    assert_equal(low.posterior.log_det_ratio, full.posterior.log_det_ratio)
    inputs = case.inputs(3, seed=9)
    for moments in (functional_moments, joint_covariance):
        for one, other in zip(
            moments(low.network, low.posterior, inputs), moments(full.network, full.posterior, inputs), strict=True
        ):
            assert_equal(one, other)


def test_directions_across_layers_see_what_blocks_do_not():
    case = ZOO["mlp"]
    model, network, data = example(case, Gaussian())
    ggn = dense_ggn(model, data.inputs, data.weights, Gaussian())
    top = {}
    for blocks in (None, "layer"):
        statistics = measure(LowRank(1, blocks), network, data, Gaussian())
        top[blocks] = float(statistics.curvatures(LowRank(1, blocks).eigenbasis(network, statistics)).max())
    assert top[None] == pytest.approx(float(spectrum(ggn, 1)), rel=EXACT)
    assert top[None] > 1.05 * top["layer"]


def test_random_vectors_are_unbiased():
    model, network, data = example(ZOO["mlp"], Categorical())
    samples = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        statistics = measure(LowRank(1000), network, data, Categorical(), mc_samples=2, generator=generator)
        assert len(statistics.gram()) == 5 * 2
        basis = LowRank(1000).eigenbasis(network, statistics)
        columns = dense_basis(basis)
        samples.append((columns * statistics.curvatures(basis)) @ columns.mT)
    assert_unbiased(torch.stack(samples), dense_ggn(model, data.inputs, data.weights, Categorical()))


# -- precision -------------------------------------------------------------------------------------


def single_and_double(n: int) -> list[tuple[Network, CurvatureData, Tensor]]:
    """The same network, with the same numbers, in both precisions."""
    case = ZOO["cnn"]
    found = []
    for dtype in (torch.float32, torch.float64):
        model = case.model(dtype=torch.float32).to(dtype)
        inputs = case.inputs(n, dtype=torch.float32).to(dtype)
        network = Network.discover(model, inputs)
        data = weighted(inputs, torch.zeros(n, 2).to(dtype))
        found.append((network, CurvatureData(network, data, Gaussian()), inputs))
    return found


@pytest.mark.parametrize("rank", [1, 4, 100])
def test_columns_of_single_precision_networks_are_orthonormal_in_double(rank):
    (network, chunks, _), _ = single_and_double(30)
    basis = LowRank(rank).eigenbasis(network, LowRank(rank).measure(network, chunks))
    columns = dense_basis(basis)
    assert columns.dtype == torch.float64
    assert_equal(columns.mT @ columns, torch.eye(basis.rank, dtype=torch.float64))


@pytest.mark.parametrize("ratio", [1.0, 1e4, 1e8])
def test_the_complement_does_not_cancel_in_single_precision(ratio):
    """Gradients in the span of the directions: the variance is a 1e-8th of the prior's, of which it is a difference."""
    variances = []
    for network, chunks, inputs in single_and_double(4):
        statistics = LowRank(100).measure(network, chunks)
        basis = LowRank(100).eigenbasis(network, statistics)
        curvatures = statistics.curvatures(basis)
        assert basis.rank == 8
        assert float(curvatures[-1] / curvatures[0]) > 1e-4
        prior = (1000 * curvatures[:1].double() / ratio).reshape(1)
        posterior = Posterior(network.mean(), basis, curvatures, 1000, prior)
        for covariance in (True, False):
            _, spread = functional_moments(network, posterior, inputs, covariance=covariance)
            variances.append(spread.diagonal(dim1=1, dim2=2) if covariance else spread)
        _, joint = joint_covariance(network, posterior, inputs)
        variances.append(joint.diagonal().reshape(4, 2))
        if ratio == 1e8:  # the prior's variance would be larger by orders of magnitude
            rows = dense_jacobian(network.model, inputs).double().square().sum(-1)
            assert float((variances[-1].double() * prior / rows).max()) < 1e-4
    single, double = variances[:3], variances[3:]
    for one, other in zip(single, double, strict=True):
        assert one.dtype == torch.float32
        assert float((one.double() / other - 1).abs().max()) < FLOAT32


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [None, "layer"])
def test_zero_curvature(blocks):
    case = ZOO["mlp-no-bias"]
    data = weighted(torch.zeros(4, 3).double(), torch.zeros(4).long())
    network = Network.discover(case.model(), data.inputs)
    structure = LowRank(blocks=blocks)
    with pytest.raises(ValueError, match=r"curvature of 0.* is zero on the data that choose the directions.*more data"):
        structure.eigenbasis(network, measure(structure, network, data, Categorical()))


@pytest.mark.parametrize("rank", [0, -1, 1.0, 1.5, 0.0, True, "all", None])
def test_bad_ranks(rank):
    with pytest.raises(ValueError, match="positive number of directions, or a fraction of the trace"):
        LowRank(rank)


def test_not_a_number_names_the_blocks():
    _, network, data = example(ZOO["mlp"], Gaussian())
    data.inputs[2, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="curvature of 0, 2"):
        LowRank().eigenbasis(network, measure(LowRank(), network, data, Gaussian()))


def test_statistics_are_held_as_factors_or_formed_whichever_is_smaller():
    """S (V O + I) numbers for each datum and block, or V O I."""
    _, network, data = example(ZOO["cnn"], Categorical())
    statistics = measure(LowRank(), network, data, Categorical())
    for block, (columns,) in zip(network.blocks, statistics.columns, strict=True):
        held = columns.inputs.numel() + columns.vectors.numel()
        assert held <= len(data) * (block.size + 1) or columns.inputs.shape[-1] == 1


# -- the bias, on a population that is known -------------------------------------------------------

D, SEEDS = 12, 240


def top_curvatures(split, n: int, rank: int = 3) -> Tensor:
    """Inputs N(0, I): for a linear model with squared loss the population's matrix is I, and u^T G u is 1."""
    model = nn.Linear(D, 1, bias=False).double()
    found = []
    for seed in range(SEEDS):
        inputs = torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        batch = [(inputs, torch.zeros(n, 1).double())]
        posterior = fit(
            model, batch, Gaussian(), structure=LowRank(rank), split=split, sampler=UniformSampler(None), n_data=10**12
        ).posterior  # of a training set without end
        assert_equal(dense_basis(posterior.basis).square().sum(0), torch.ones(rank).double())
        found.append(posterior.curvatures)
    return torch.stack(found)


def test_one_batch_overstates_the_top_curvatures():
    found = top_curvatures(Single(), 16)
    z = z_scores(found, torch.ones(3, dtype=torch.float64))
    assert float(z.min()) > 10 * MONTE_CARLO_Z
    assert float(found.mean(0).min()) > 1.5
    assert float(found.mean(0)[0]) > 2.5  # (1 + sqrt(12 / 16))^2 = 3.5 for large matrices


@pytest.mark.parametrize("split", [TwoBatch(), TwoBatch(folds=4, directions=1)])
def test_a_second_batch_is_unbiased_along_the_same_directions(split):
    assert_unbiased(top_curvatures(split, 32), torch.ones(3, dtype=torch.float64))


def test_a_second_batch_along_the_directions_of_a_spectrum():
    """u^T G u of every direction found, against the known matrix."""
    variances = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25, 0.125], dtype=torch.float64)
    model = nn.Linear(6, 1, bias=False).double()
    single, two, true = [], [], []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(16, 6, dtype=torch.float64, generator=generator) * variances.sqrt()
        batch = [(inputs, torch.zeros(16, 1).double())]
        common = {"structure": LowRank(3), "sampler": UniformSampler(None), "generator": seed, "n_data": 10**12}
        result = fit(model, batch, Gaussian(), split=TwoBatch(), **common)
        columns = dense_basis(result.posterior.basis)
        true.append((variances[:, None] * columns.square()).sum(0))
        two.append(result.posterior.curvatures)
        own = inputs[result.direction_indices]
        single.append((own @ columns).square().mean(0))
    single, two, true = torch.stack(single), torch.stack(two), torch.stack(true)
    assert_unbiased(two - true, torch.zeros(3, dtype=torch.float64))
    assert float(z_scores(single[:, 0] - true[:, 0], torch.zeros(()).double())) > 2 * MONTE_CARLO_Z
    assert float(single[:, 0].mean() / true[:, 0].mean()) > 1.2


@pytest.mark.parametrize("blocks", [None, "layer"])
@pytest.mark.parametrize("name", ["cnn", "mlp", "attention"])
def test_a_large_gram_matrix_is_not_formed(name, blocks, monkeypatch):
    """Products of the factors give the same directions, of all layers together and of each (eigenvalues are pairs)."""
    monkeypatch.setattr(lowrank, "LANCZOS_SIZE", 10**9)
    model, network, data = example(ZOO[name], Gaussian(), n=70)
    structure = LowRank(2, blocks=blocks)
    statistics = measure(structure, network, data, Gaussian())
    expected = structure.eigenbasis(network, statistics)
    monkeypatch.setattr(lowrank, "MATRIX_FREE_SIZE", 10)
    monkeypatch.setattr(lowrank.LowRankStatistics, "gram", None)
    found = structure.eigenbasis(network, statistics)
    one, other = dense_basis(found), dense_basis(expected)
    assert_equal(one @ one.mT, other @ other.mT)
    if blocks is None:
        ggn = dense_ggn(model, data.inputs, data.weights, Gaussian())
        assert_equal((one.mT @ ggn @ one).diagonal(), spectrum(ggn, 2))
    assert torch.equal(dense_basis(structure.eigenbasis(network, statistics)), one)


def test_a_matrix_that_is_not_formed_in_single_precision(monkeypatch):
    model, network, data = example(ZOO["cnn"], Gaussian(), n=70)
    statistics = measure(LowRank(3), network, data, Gaussian())
    expected = dense_basis(LowRank(3).eigenbasis(network, statistics))
    monkeypatch.setattr(lowrank, "MATRIX_FREE_SIZE", 10)
    single = Network.discover(model.float(), data.inputs.float())
    data = WeightedData(data.inputs.float(), data.targets.float(), data.weights, data.indices)
    found = dense_basis(LowRank(3).eigenbasis(single, measure(LowRank(3), single, data, Gaussian())))
    assert_equal(found @ found.mT, expected @ expected.mT, FLOAT32)


def test_a_matrix_that_is_not_formed_with_bad_data(monkeypatch):
    _, network, data = example(ZOO["mlp"], Gaussian(), n=70)
    monkeypatch.setattr(lowrank, "MATRIX_FREE_SIZE", 10)
    statistics = measure(LowRank(3), network, data, Gaussian())
    zero = statistics * 0.0
    with pytest.raises(ValueError, match="is zero on the data that choose the directions"):
        LowRank(3).eigenbasis(network, zero)
    statistics.columns[0][0].vectors[0] = torch.nan
    with pytest.raises(NonFiniteError, match="the curvature of"):
        LowRank(3).eigenbasis(network, statistics)


# -- repeated eigenvalues --------------------------------------------------------------------------


def three_outputs(rotation: Tensor | None = None, zero_head: bool = False) -> nn.Module:
    """Every eigenvalue of the last layer's curvature is one three times in a regression."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    head = model[2]
    if rotation is not None:
        head.weight.data, head.bias.data = rotation @ head.weight.data, rotation @ head.bias.data
    for parameter in head.parameters() if zero_head else ():
        nn.init.zeros_(parameter)
    return model


def three_targets(n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (4, 3))  # type: ignore[return-value]


@pytest.mark.parametrize("split", [Single(), TwoBatch(), CrossFit(2), CrossFit(3, average="rotated")], ids=repr)
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 7, 0.5])
def test_nothing_depends_on_a_rotation_of_the_outputs(rank, split):
    x, y = three_targets()
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    results = []
    for own in (torch.eye(3, dtype=torch.float64), rotation):
        found = fit(
            three_outputs(own), [(x, y @ own.mT)], Gaussian(), structure=LowRank(rank), split=split,
            sampler=UniformSampler(20), parameters="last_layer",
        )  # fmt: skip
        _, covariance = functional_moments(found.network, found.posterior, x)
        results.append((own.mT @ covariance @ own, found.posterior.curvatures, found.posterior.log_det_ratio))
        expected = {1: 3, 2: 3, 3: 3, 4: 3, 5: 3, 7: 6}.get(rank, found.posterior.basis.rank // 3 * 3)
        assert found.posterior.basis.rank == expected > 0
    for one, other in zip(*results, strict=True):
        assert_equal(other, one)


@pytest.mark.parametrize("likelihood", [Gaussian(), Categorical()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("lanczos_from", [10**6, 40])
def test_nothing_depends_on_the_order_of_the_data(likelihood, lanczos_from, monkeypatch):
    """A head of zeros repeats every eigenvalue of a classifier as often as there are classes but one."""
    monkeypatch.setattr(lowrank, "LANCZOS_SIZE", lanczos_from)
    x, y = three_targets(60)
    y = y if isinstance(likelihood, Gaussian) else y.argmax(1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    results = []
    for own in (torch.arange(60), order):
        found = fit(
            three_outputs(zero_head=True), [(x[own], y[own])], likelihood, structure=LowRank(5), split=Single(),
            sampler=UniformSampler(None), parameters="last_layer",
        )  # fmt: skip
        results.append(functional_moments(found.network, found.posterior, x)[1])
        assert found.posterior.basis.rank == (3 if isinstance(likelihood, Gaussian) else 4)
    assert_equal(results[1], results[0])


def test_a_cut_eigenvalue_is_in_the_log(caplog):
    x, y = three_targets()
    caplog.set_level("INFO")

    def directions(rank: int | float) -> int:
        caplog.clear()
        found = fit(
            three_outputs(), [(x, y)], Gaussian(), structure=LowRank(rank), split=Single(),
            sampler=UniformSampler(None), parameters="last_layer",
        )  # fmt: skip
        return found.posterior.basis.rank

    assert directions(6) == 6
    assert "cuts a repeated eigenvalue" not in caplog.text
    assert directions(8) == 6
    assert "A rank of 8 cuts a repeated eigenvalue of the curvature of 2" in caplog.text
    assert "there are 6 directions, with none of its own" in caplog.text
    assert directions(1) == 3
    assert "there are 3 directions, with all of its own" in caplog.text
    assert directions(18) == 18


def test_eigenpairs_are_as_many_as_asked_for():
    x, y = three_targets()
    ggn = GGN(three_outputs(), x, y, Gaussian(), parameters="last_layer")
    for k in (1, 3, 4, 8):
        values, found = ggn.eigenpairs(k)
        assert found.rank == k
        assert_equal(values, ggn.eigenvalues()[:k])


def test_many_eigenvalues_that_are_one(monkeypatch):
    """More copies than were asked for, found step by step."""
    monkeypatch.setattr(lowrank, "LANCZOS_SIZE", 40)
    model = nn.Linear(12, 5, bias=False).double()
    x = torch.eye(12, dtype=torch.float64).repeat(2, 1)
    network = Network.discover(model, x)
    data = CurvatureData(network, weighted(x, torch.zeros(24, 5), uniform=True), Gaussian())
    found = LowRank(3).eigenbasis(network, LowRank(3).measure(network, data))
    assert found.rank == 60
    assert_equal(found.averaged(torch.arange(60.0).double()), torch.full((60,), 29.5).double())
