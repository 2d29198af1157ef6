"""The diagonal: equal to dense references and to BackPACK, unbiased on any batch, and not improved by splitting."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from debiased_laplace import Single, TwoBatch, UniformSampler
from debiased_laplace._checks import NonFiniteError, UnsupportedLayerError
from debiased_laplace.curvature.hesscale import hessian_diagonal
from debiased_laplace.curvature.structures import Diagonal
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian
from debiased_laplace.network.network import Network
from debiased_laplace.testing import dense_ggn
from tests.datasets import LIKELIHOODS, example, measure, targets, valid, weighted
from tests.networks import ZOO
from tests.tolerances import FLOAT32, MONTE_CARLO_Z, assert_equal, assert_unbiased, z_scores


def diagonal(network, statistics) -> Tensor:
    """``[D]``, in the order of the parameters."""
    basis = Diagonal().eigenbasis(network)
    return basis.lift(statistics.curvatures(basis))


# -- dense references ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_the_diagonal_of_the_dense_matrix_on_every_network(name):
    case = ZOO[name]
    for likelihood in {type(valid(one, case)): valid(one, case) for one in LIKELIHOODS}.values():
        model, network, data = example(case, likelihood)
        expected = dense_ggn(model, data.inputs, data.weights, likelihood, data.targets).diagonal()
        assert_equal(diagonal(network, measure(Diagonal(), network, data, likelihood)), expected)
        assert_equal(diagonal(network, measure(Diagonal(), network, data, likelihood, chunk_size=2)), expected)


def test_separate_biases_change_nothing():
    _, network, data = example(ZOO["cnn"], Categorical())
    _, separate, _ = example(ZOO["cnn"], Categorical(), separate_bias=True)
    assert len(separate.blocks) == 6
    one = diagonal(network, measure(Diagonal(), network, data, Categorical()))
    assert_equal(diagonal(separate, measure(Diagonal(), separate, data, Categorical())), one)


def test_single_precision():
    case = ZOO["cnn"]
    _, network, data = example(case, Categorical())
    expected = diagonal(network, measure(Diagonal(), network, data, Categorical()))
    single = weighted(case.inputs(5, dtype=torch.float32), data.targets)
    low = Network.discover(case.model(dtype=torch.float32), single.inputs)
    found = diagonal(low, measure(Diagonal(), low, single, Categorical()))
    assert found.dtype == torch.float32
    assert_equal(found.double(), expected, FLOAT32)


def convolutional() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)
    )
    return model.double(), torch.randn(7, 2, 4, 4).double()


def of_backpack(model: nn.Module, inputs: Tensor, labels: Tensor, loss: nn.Module, extension) -> Tensor:
    """What BackPACK saves for the parameters, ``[D]``."""
    from backpack import backpack, extend

    extended = extend(copy.deepcopy(model))  # it leaves hooks in its modules
    with backpack(extension):
        extend(loss)(extended(inputs), labels).backward()
    return torch.cat([getattr(p, extension.savefield).flatten() for p in extended.parameters()]).detach()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()], ids=lambda x: type(x).__name__)
def test_backpack_exact(likelihood):
    from backpack.extensions import DiagGGNExact

    model, inputs = convolutional()
    labels = targets(likelihood, 7, 3)
    # The mean of squared errors is (2 / C) times the mean of our losses.
    loss, scale = (nn.CrossEntropyLoss(), 1.0) if isinstance(likelihood, Categorical) else (nn.MSELoss(), 2 / 3)
    batches = [(inputs, labels)]
    posterior = fit(model, batches, likelihood, structure=Diagonal(), sampler=UniformSampler(None)).posterior
    found = posterior.basis.lift(posterior.curvatures)
    assert_equal(scale * found, of_backpack(model, inputs, labels, loss, DiagGGNExact()))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_backpack_random_vectors_have_our_diagonal_in_the_mean():
    from backpack.extensions import DiagGGNMC

    model, inputs = convolutional()
    labels = targets(Categorical(), 7, 3)
    posterior = fit(
        model, [(inputs, labels)], Categorical(), structure=Diagonal(), sampler=UniformSampler(None)
    ).posterior
    samples = []
    for seed in range(200):
        torch.manual_seed(seed)
        samples.append(of_backpack(model, inputs, labels, nn.CrossEntropyLoss(), DiagGGNMC(mc_samples=1)))
    assert_unbiased(torch.stack(samples), posterior.basis.lift(posterior.curvatures))


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("mc_samples", [1, 3])
def test_random_vectors_are_unbiased(likelihood, mc_samples):
    model, network, data = example(ZOO["mlp"], likelihood)
    samples = [
        diagonal(network, measure(Diagonal(), network, data, likelihood, mc_samples=mc_samples,
                                  generator=torch.Generator().manual_seed(seed)))
        for seed in range(200)
    ]  # fmt: skip
    expected = dense_ggn(model, data.inputs, data.weights, likelihood, data.targets).diagonal()
    assert_unbiased(torch.stack(samples), expected)


# -- the empirical Fisher --------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("name", ["mlp", "cnn", "lone-parameters"])
def test_the_empirical_fisher_is_the_mean_of_squared_gradients(name, likelihood):
    model, network, data = example(ZOO[name], likelihood)
    expected = torch.zeros(network.n_params, dtype=torch.float64)
    for x, y, w in zip(data.inputs, data.targets, data.weights, strict=True):
        gradients = torch.autograd.grad(likelihood.loss(model(x[None]), y[None]).sum(), list(model.parameters()))
        expected += w * torch.cat([g.flatten() for g in gradients]).square()
    found = diagonal(network, measure(Diagonal(), network, data, likelihood, curvature="empirical_fisher"))
    assert_equal(found, expected)
    ggn = diagonal(network, measure(Diagonal(), network, data, likelihood))
    assert float((found - ggn).abs().max()) > 0.05 * float(ggn.abs().max())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_backpack_sum_of_squared_gradients():
    from backpack.extensions import SumGradSquared

    model, inputs = convolutional()
    labels = targets(Categorical(), 7, 3)
    posterior = fit(
        model, [(inputs, labels)], Categorical(), structure=Diagonal(), sampler=UniformSampler(None),
        curvature="empirical_fisher",
    ).posterior  # fmt: skip
    squares = of_backpack(model, inputs, labels, nn.CrossEntropyLoss(reduction="sum"), SumGradSquared())
    assert_equal(posterior.basis.lift(posterior.curvatures), squares / 7)


def test_unknown_curvature():
    with pytest.raises(ValueError, match=r"curvature out of \['ggn', 'empirical_fisher'\], got 'fisher'"):
        fit(*small(), structure=Diagonal(), curvature="fisher")


# -- splitting does not help -----------------------------------------------------------------------

SPECTRUM = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25, 0.125], dtype=torch.float64)


def population(seed: int, n: int) -> Tensor:
    """Gaussian inputs: for a linear model with squared loss the population's diagonal is their variances."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, len(SPECTRUM), dtype=torch.float64, generator=generator) * SPECTRUM.sqrt()


ENDLESS = 10**12  # a training set of which the data stand for nearly nothing but others


def measured(split, n: int = 12, seeds: int = 200) -> Tensor:
    model = nn.Linear(len(SPECTRUM), 1, bias=False).double()
    zeros = torch.zeros(n, 1, dtype=torch.float64)
    return torch.stack([
        fit(model, [(population(seed, n), zeros)], Gaussian(), structure=Diagonal(), split=split, n_data=ENDLESS,
            sampler=UniformSampler(None)).posterior.curvatures
        for seed in range(seeds)
    ])  # fmt: skip


def test_the_same_batch_is_unbiased_and_splitting_only_discards_data():
    """Also the largest entry: a parameter is the same direction whatever the data."""
    single, two = measured(Single()), measured(TwoBatch())
    assert_unbiased(single, SPECTRUM)
    assert_unbiased(two, SPECTRUM)
    assert float(z_scores(single[:, 0], SPECTRUM[0]).abs()) < MONTE_CARLO_Z
    ratio = two.var(0) / single.var(0)  # half of the data: twice the variance
    assert 1.5 < float(ratio.mean()) < 2.7


def small(n: int = 9, likelihood=None) -> tuple:
    likelihood = likelihood or Categorical()
    inputs = ZOO["mlp"].inputs(n)
    return ZOO["mlp"].model(), [(inputs, targets(likelihood, n, 2))], likelihood


def fitted(n: int = 9, likelihood=None, **options) -> Fit:
    return fit(*small(n, likelihood), **{"sampler": UniformSampler(None)} | options)


@pytest.mark.parametrize("method", ["ggn", "hesscale_gn"])
def test_by_default_all_data_drawn_measure_the_curvature(method):
    result = fitted(n=20, structure=Diagonal(method), sampler=UniformSampler(8))
    assert len(result.curvature_indices) == 8
    assert torch.equal(result.curvature_indices, result.direction_indices)
    two = fitted(n=20, structure=Diagonal(method), sampler=UniformSampler(8), split=TwoBatch(), n_data=ENDLESS)
    assert len(two.curvature_indices) == 4
    inputs = ZOO["mlp"].inputs(20)
    for fit_, n in ((result, 8), (two, 4)):
        own = inputs[fit_.curvature_indices]
        ggn = dense_ggn(ZOO["mlp"].model(), own, torch.full((n,), 1 / n).double(), Categorical()).diagonal()
        if method == "ggn":
            assert_equal(fit_.posterior.basis.lift(fit_.posterior.curvatures), ggn)


def test_the_factored_estimate_is_the_same():
    one = fitted(structure=Diagonal(), split=TwoBatch(), estimator="factored").posterior
    assert_equal(one.curvatures, fitted(structure=Diagonal(), split=TwoBatch()).posterior.curvatures)


# -- back-propagated diagonals of the Hessian ------------------------------------------------------


@pytest.mark.parametrize("method", ["hesscale", "hesscale_gn", "becker_lecun"])
@pytest.mark.parametrize("split", [None, TwoBatch()])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_hessian_diagonals_are_those_of_the_measuring_data(method, split, chunk_size):
    likelihood = Bernoulli() if method == "hesscale_gn" else Categorical()
    model, batches, likelihood = small(9, likelihood)
    inputs, labels = batches[0]
    flat = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()  # no second derivative, none negative
    flat.load_state_dict(model.state_dict())
    result = fit(
        flat, batches, likelihood, structure=Diagonal(method), split=split, chunk_size=chunk_size,
        sampler=UniformSampler(None), n_data=ENDLESS,
    )  # fmt: skip
    own = result.curvature_indices
    assert len(own) == (9 if split is None else 4)
    expected = hessian_diagonal(flat, inputs[own], labels[own], likelihood, method=method)
    found = result.network.from_vector(result.posterior.basis.lift(result.posterior.curvatures))
    for name, value in expected.items():
        assert_equal(found[name], value)


def test_hessian_diagonals_of_the_last_layer_alone_are_exact():
    """Without softmax: the loss is quadratic in the last layer."""
    result = fitted(likelihood=Gaussian(), structure=Diagonal("hesscale"), parameters="last_layer")
    assert_equal(
        result.posterior.curvatures,
        fitted(likelihood=Gaussian(), structure=Diagonal(), parameters="last_layer").posterior.curvatures,
    )


def test_negative_entries_are_no_precision():
    model, _, _ = small()
    batch = [(ZOO["mlp"].inputs(9), torch.full((9, 2), 30.0).double())]  # large residuals
    with pytest.raises(ValueError, match=r"negative for \d+ of 26 parameters.*hesscale_gn"):
        fit(model, batch, Gaussian(), structure=Diagonal("hesscale"))
    assert float(fit(model, batch, Gaussian(), structure=Diagonal("hesscale_gn")).posterior.curvatures.min()) >= 0


def test_networks_that_are_not_covered():
    case = ZOO["transformer"]
    with pytest.raises(UnsupportedLayerError):
        fit(case.model(), [(case.inputs(6), torch.arange(6) % 2)], Categorical(), structure=Diagonal("hesscale"))


def test_unknown_method():
    with pytest.raises(ValueError, match=r"method out of \['ggn', 'hesscale', .*got 'exact'"):
        Diagonal("exact")


def test_not_a_number_names_the_block():
    _, network, data = example(ZOO["mlp"], Gaussian())
    data.inputs[2, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"curvatures of '0'"):
        measure(Diagonal(), network, data, Gaussian())
