"""K-FAC of weights that are used at several positions: against curvlinops, and where it is exact."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from curvlinops import KFACLinearOperator
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.curvature.structures import Kronecker, KroneckerStatistics, Window
from debiased_laplace.curvature.structures.kron import POSITIONS_PER_INPUT
from debiased_laplace.likelihoods import Categorical, Gaussian
from debiased_laplace.network.network import Network
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.testing import check_structure, dense_ggn
from tests.datasets import measure, targets, weighted
from tests.networks import ZOO, Apply, Embedded, EmbeddedTwice, Twice
from tests.test_kron import block_diagonal, dense
from tests.tolerances import EXACT, assert_equal

SHARINGS = [dl.Expand(), dl.Reduce()]


def measured(model: nn.Module, inputs: Tensor, sharing: object, likelihood: object, **options: object):
    """The network of a model, weighted data (uniform ones are asked for by ``uniform``), and their statistics."""
    uniform = bool(options.pop("uniform", False))
    data = weighted(inputs, targets(likelihood, len(inputs), model(inputs).shape[1]), uniform)
    network = Network.discover(model, inputs, **options)
    return network, data, measure(Kronecker(sharing=sharing), network, data, likelihood)


def tokens(separate_positions: int = 4, width: int = 3) -> nn.Module:
    return Apply(lambda x: x.unflatten(1, (separate_positions, width)))


def averaged() -> nn.Module:
    return Apply(lambda x: x.mean(1))


# -- curvlinops ------------------------------------------------------------------------------------


def oracle_case(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    if name == "tokens":
        model = nn.Sequential(tokens(), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), averaged(), nn.Linear(4, 3))
        return model.double(), torch.randn(7, 12).double()
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 2, padding=1), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    return model.double(), torch.randn(7, 2, 5, 4).double()


@pytest.mark.parametrize("name", ["tokens", "convolutions"])
@pytest.mark.parametrize("separate_bias", [True, False])
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(("sharing", "approximation"), [(dl.Expand(), "expand"), (dl.Reduce(), "reduce")])
def test_curvlinops_agrees(name, separate_bias, likelihood, sharing, approximation):
    model, inputs = oracle_case(name)
    network, data, statistics = measured(model, inputs, sharing, likelihood, separate_bias=separate_bias, uniform=True)
    # The mean of squared errors is (2 / C) times the mean of our losses.
    loss, scale = (nn.CrossEntropyLoss(), 1.0) if isinstance(likelihood, Categorical) else (nn.MSELoss(), 2 / 3)
    operator = KFACLinearOperator(
        model, loss, list(model.parameters()), [(data.inputs, data.targets)], fisher_type="type-2",
        kfac_approx=approximation, separate_weight_and_bias=separate_bias, check_deterministic=False,
    )  # fmt: skip
    expected = operator @ torch.eye(network.n_params, dtype=torch.float64)
    assert_equal(scale * dense(network, statistics), expected, EXACT)


# -- exact cases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "lone-parameters", "embedding-one-token"])
def test_one_datum_without_shared_positions_is_exact(name):
    case = ZOO[name]
    network, data, statistics = measured(case.model(), case.inputs(1), dl.Reduce(), Categorical())
    ggn = dense_ggn(case.model(), data.inputs, data.weights, Categorical())
    assert_equal(dense(network, statistics), block_diagonal(network, ggn), EXACT)


@pytest.mark.parametrize("separate_bias", [False, True])
@pytest.mark.parametrize("lengths", [None, (4, 2, 1, 3, 4)], ids=["equal", "masked"])
def test_reduce_is_exact_for_a_deep_linear_network_with_averaged_outputs(separate_bias, lengths):
    """B does not depend on the datum, and a gradient is that of the mean input; padding is in neither."""
    torch.manual_seed(0)
    counts = torch.tensor(lengths or (4,) * 5)
    mask = (torch.arange(4) < counts[:, None])[..., None].double()

    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return (self.layers(batch["x"]) * batch["mask"]).sum(1) / batch["mask"].sum(1)

    model, inputs = Averaged().double(), {"x": torch.randn(5, 4, 3).double(), "mask": mask}
    network = Network.discover(model, inputs, separate_bias=separate_bias)
    weights = torch.linspace(0.5, 3, 5, dtype=torch.float64)
    data = WeightedData(inputs, torch.zeros(5, 2).double(), weights / weights.sum(), torch.arange(5))
    ggn = block_diagonal(network, dense_ggn(model, inputs, data.weights, Gaussian()))
    statistics = measure(Kronecker(sharing=dl.Reduce()), network, data, Gaussian())
    assert_equal(dense(network, statistics), ggn, EXACT)
    expanded = dense(network, measure(Kronecker(), network, data, Gaussian()))
    assert float((expanded - ggn).abs().max()) > 0.1 * float(ggn.abs().max())


# -- layers ----------------------------------------------------------------------------------------


def naive(network: Network, inputs: Tensor, weights: Tensor) -> KroneckerStatistics:
    """Reduce of a squared loss, one datum at a time; of sequences, positions with a gradient alone."""
    a_of, b_of = [], []
    for index, block in enumerate(network.blocks):
        a, b = 0, 0
        for datum, weight in zip(inputs.split(1), weights, strict=True):
            factors = network.factors(datum)
            columns, vectors = factors.inputs(block).to_dense()[0], torch.eye(network.n_outputs).double()[:, None]
            back = factors.backpropagate_all(vectors)[index][0]  # [G, V, O, S]
            if columns.shape[-1] > 1 and inputs.ndim == 2:
                columns = columns[..., back.flatten(0, 2).any(0)]
            mean, total = columns.mean(-1), back.sum(-1)  # [G, I], [G, V, O]
            a = a + weight * torch.einsum("gi,gj->gij", mean, mean)
            b = b + weight * torch.einsum("gvo,gvp->gop", total, total)
        a_of.append(a if block.kind.rotates_inputs else a.diagonal(dim1=1, dim2=2))
        b_of.append(b)
    return KroneckerStatistics.of(a_of, b_of)


@pytest.mark.parametrize(
    "name", ["cnn", "conv1d", "conv3d", "transposed-2d", "many-positions", "embedding", "embedding-twice",
             "module-twice", "convolution-twice", "transformer", "attention", "merged-positions",
             "frozen-in-convolutions"]
)  # fmt: skip
@pytest.mark.parametrize("separate_bias", [False, True])
def test_reduce_equals_a_naive_loop(name, separate_bias):
    """Grouped convolutions, embeddings, several calls of a layer, positions anywhere."""
    case = ZOO[name]
    network, data, statistics = measured(
        case.model(), case.inputs(3), dl.Reduce(), Gaussian(), separate_bias=separate_bias
    )
    expected = naive(network, data.inputs, data.weights)
    for found, wanted in zip(statistics.inputs + statistics.outputs, expected.inputs + expected.outputs, strict=True):
        assert_equal(found, wanted)


@pytest.mark.parametrize("sharing", SHARINGS, ids=repr)
@pytest.mark.parametrize("build", [Embedded, EmbeddedTwice], ids=lambda build: build.__name__)
def test_an_embedding_is_a_linear_layer_on_one_hot_inputs(sharing, build):
    torch.manual_seed(0)
    embedded = build().double()
    linear = nn.Linear(5, 3, bias=False).double()
    linear.weight.data.copy_(embedded.embedding.weight.mT)

    class OneHot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = linear, embedded.head

        def forward(self, x: Tensor) -> Tensor:
            ones = F.one_hot(x, 5).double()
            if build is Embedded:
                return self.head(torch.tanh(self.embedding(ones)).mean(1))
            first, second = self.embedding(ones[:, :2]), self.embedding(ones[:, 2:])
            return self.head(torch.tanh(first.mean(1) * second.sum(1)))

    inputs = torch.randint(5, (6, 4))
    _, _, found = measured(embedded, inputs, sharing, Categorical())
    _, _, expected = measured(OneHot(), inputs, sharing, Categorical())
    assert_equal(found.inputs[0], expected.inputs[0].diagonal(dim1=1, dim2=2))
    assert_equal(found.outputs[0], expected.outputs[0])


def test_positions_of_several_calls_are_those_of_one():
    """Reduce: the mean input of both calls, and the sum of their vectors, which is the gradient of the bias."""
    torch.manual_seed(0)
    model, inputs = Twice().double(), torch.randn(4, 3).double()
    _, data, statistics = measured(model, inputs, dl.Reduce(), Gaussian())
    hidden = torch.tanh(model.shared(inputs)).detach()
    mean = F.pad((inputs + hidden) / 2, (0, 1), value=1.0)
    assert_equal(statistics.inputs[0][0], torch.einsum("n,ni,nj->ij", data.weights, mean, mean))
    gradients = torch.stack(
        [torch.stack([torch.autograd.grad(f, model.shared.bias, retain_graph=True)[0] for f in model(datum)[0]])
         for datum in inputs.split(1)]
    )  # fmt: skip
    assert_equal(statistics.outputs[0][0], torch.einsum("n,nco,ncp->op", data.weights, gradients, gradients))


# -- a fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS, ids=repr)
@pytest.mark.parametrize("name", ["cnn", "conv1d", "embedding", "transformer"])
def test_a_forward_pass_observes_the_inputs_that_are_measured(sharing, name):
    case = ZOO[name]
    structure = Kronecker(sharing=sharing)
    network, _, statistics = measured(case.model(), case.inputs(5), sharing, Categorical(), uniform=True)
    observed = structure.observe(network, network.factors(case.inputs(5)), lambda _: [Window(slice(0, 5), 1)])
    completed = structure.complete(statistics, observed)
    for found, expected in zip(completed.inputs, statistics.inputs, strict=True):
        assert_equal(found, expected)


def test_of_one_position_more_data_are_observed():
    """What tells enough is counted in positions, of which reduce makes one."""
    case, asked = ZOO["cnn"], []
    network = Network.discover(case.model(), case.inputs(3))
    factors = network.factors(case.inputs(3))
    for sharing in SHARINGS:

        def look(enough: int) -> list[Window]:
            asked.append(enough)
            return [Window(slice(0, 3), 1)]

        Kronecker(sharing=sharing).observe(network, factors, look)
    expand, reduce = asked[: len(network.blocks)], asked[len(network.blocks) :]
    for block, of_positions, of_one in zip(network.blocks, expand, reduce, strict=True):
        assert of_one == POSITIONS_PER_INPUT * block.inputs
        assert of_positions == math.ceil(of_one / factors.n_positions(block))
    assert expand[0] < reduce[0]


def test_the_laws_of_structures():
    check_structure(Kronecker(sharing=dl.Reduce()))


def test_a_fit_says_how_weights_are_shared():
    case = ZOO["conv1d"]
    batches = [(case.inputs(20), targets(Categorical(), 20, 2))]
    fits = [dl.fit(case.model(), batches, "classification", structure=Kronecker(sharing=s)) for s in SHARINGS]
    assert "Reduce()" in fits[1].fitted.settings["structure"]
    assert not torch.equal(fits[0].posterior.curvatures, fits[1].posterior.curvatures)
