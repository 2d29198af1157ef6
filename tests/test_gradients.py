"""Gradient factors (a, g) of every block, against dense autograd, for every network of the zoo."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from debiased_laplace import _data
from debiased_laplace._checks import NonFiniteError, UnsupportedLayerError
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.network import blocks
from debiased_laplace.network.blocks import flatten
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.kinds import DENSE
from debiased_laplace.network.layers import RULES, pointwise
from debiased_laplace.network.network import Network
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.testing import dense_jacobian
from tests.handwritten import HANDWRITTEN
from tests.networks import ZOO, Apply, Case, TiedEmbedding, VisionTransformer
from tests.tolerances import EXACT, FLOAT32, assert_equal

N = 4


@cache
def of_zoo(name: str, **options) -> tuple[nn.Module, Network]:
    """A network of the zoo, found with five data once for all tests that only look at it."""
    model = ZOO[name].model()
    return model, Network.discover(model, ZOO[name].inputs(5, seed=9), **options)


def reconstructed(network: Network, inputs, vectors: torch.Tensor, chunk: int = 1) -> torch.Tensor:
    """Gradients of s.f of every datum from the factors, ``[V, N, D]``."""
    factors = network.factors(inputs)
    found = []
    for _, back in factors.backpropagate(vectors, chunk):
        parameters = {}
        for block, g in zip(network.blocks, back, strict=True):
            a = factors.inputs(block).to_dense()
            n, groups, width, shared = a.shape
            assert (groups, width) == (block.groups, block.inputs)
            assert g.shape[:2] == (n, groups)
            assert g.shape[3:] == (block.outputs, shared)
            parameters.update(block.scatter(torch.einsum("ngvos,ngis->vngoi", g, a)))
        found.append(flatten(parameters, network.shapes))
    return torch.cat(found)


@pytest.mark.parametrize("name", ZOO)
def test_factors_give_the_gradient_of_every_datum(name, device):
    case: Case = ZOO[name]
    model, inputs = case.model().to(device), case.inputs(N).to(device)
    network = Network.discover(model, inputs)
    vectors = torch.randn(3, N, case.n_outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    vectors = vectors.to(device)
    expected = torch.einsum("vnc,ncd->vnd", vectors, dense_jacobian(model, inputs))
    assert float(expected.abs().max()) > 1e-6
    for chunk in (1, 2, 3):
        assert_equal(reconstructed(network, inputs, vectors, chunk), expected, EXACT)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("n", [1, 2, 3, 6, 12])
def test_factors_do_not_depend_on_how_many_data_go_together(name, n):
    """What was found with a few data holds for any number, also where it is a multiple of the positions."""
    case: Case = ZOO[name]
    (model, network), inputs = of_zoo(name), case.inputs(n)
    vectors = torch.ones(1, n, case.n_outputs, dtype=torch.float64)
    assert_equal(reconstructed(network, inputs, vectors), dense_jacobian(model, inputs).sum(1)[None], EXACT)


@pytest.mark.parametrize("name", ZOO)
def test_factors_are_exact_where_nothing_is_small(name, monkeypatch):
    """Blocks that are dense because they are small are diagonal, or those of a table, as large ones are."""
    monkeypatch.setattr(blocks, "MAX_DENSE", 2)
    monkeypatch.setattr(pointwise, "MIN_TABLE", 2)
    monkeypatch.setattr(pointwise, "MAX_DENSE", 3)  # of the factor of its outputs
    case: Case = ZOO[name]
    model, inputs = case.model(), case.inputs(N)
    network = Network.discover(model, inputs)
    assert not any(block.kind == DENSE and block.size > 2 for block in network.blocks)
    vectors = torch.ones(1, N, case.n_outputs, dtype=torch.float64)
    assert_equal(reconstructed(network, inputs, vectors), dense_jacobian(model, inputs).sum(1)[None], EXACT)


@pytest.mark.parametrize("name", ZOO)
def test_separate_biases_give_the_same_gradients(name):
    case: Case = ZOO[name]
    model, inputs = case.model(), case.inputs(N)
    network = Network.discover(model, inputs, separate_bias=True)
    for block in network.blocks:
        assert block.arrangement.stacked or len(block.parameters) == 1
    vectors = torch.ones(1, N, case.n_outputs, dtype=torch.float64)
    assert_equal(reconstructed(network, inputs, vectors), dense_jacobian(model, inputs).sum(1)[None], EXACT)


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_is_in_exactly_one_block(name):
    model, network = of_zoo(name)
    trainable = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    assert sorted(n for block in network.blocks for n in block.parameters) == sorted(trainable)
    assert sum(block.size for block in network.blocks) == network.n_params
    vector = torch.arange(network.n_params, dtype=torch.float64)
    parameters = network.from_vector(vector)
    assert {n: p.shape for n, p in parameters.items()} == trainable
    for block in network.blocks:
        matrix = block.gather(parameters)
        assert matrix.shape == (block.groups, block.outputs, block.inputs)
        for parameter, value in block.scatter(matrix).items():
            assert torch.equal(value, parameters[parameter])
    assert torch.equal(network.to_vector(parameters), vector)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("mlp", {"0": "kronecker", "2": "kronecker"}),
        ("batch-norm", {"0.weight": "kronecker", "1": "exact", "3": "kronecker", "5": "kronecker"}),
        ("tied-weights", {"first.weight": "kronecker", "first.bias": "kronecker", "second.bias": "kronecker",
                          "head": "kronecker"}),
        ("module-twice", {"shared": "kronecker", "head": "kronecker"}),
        ("lone-parameters", {"scale": "exact", "temperature": "exact", "layer": "kronecker", "head": "kronecker"}),
        ("frozen-weight", {"0": "kronecker", "2.bias": "kronecker", "4": "kronecker"}),
        ("frozen-layer", {"0": "kronecker", "4": "kronecker"}),
        ("embedding", {"embedding.weight": "kronecker", "head": "kronecker"}),
        ("embedding-tied", {"tokens.weight": "exact", "positions.weight": "exact", "layer": "kronecker"}),
        ("transposed-1d", {"layers.0": "kronecker", "layers.2.weight": "kronecker", "head": "kronecker"}),
        ("transposed-tied", {"encoder.weight": "exact", "encoder.bias": "kronecker"}),
        ("attention", {"attention.in_proj_weight": "exact", "attention.in_proj_bias": "exact",
                       "attention.out_proj": "kronecker", "embed": "kronecker", "head": "kronecker"}),
    ],
)  # fmt: skip
def test_blocks_are_what_their_layers_call_for(name, kinds):
    network = Network.discover(ZOO[name].model(), ZOO[name].inputs(N))
    found = {block.name: block.kind.name for block in network.blocks}
    if name == "attention":  # torch may call its projection as one layer or as several
        found.pop("attention", None), kinds.pop("attention.in_proj_weight"), kinds.pop("attention.in_proj_bias")
        found = {key: kind for key, kind in found.items() if "in_proj" not in key}
    assert found == kinds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precisions_have_float32_factors(dtype):
    case = ZOO["cnn"]
    model, inputs = case.model(dtype=dtype), case.inputs(N, dtype=dtype)
    network = Network.discover(model, inputs)
    factors = network.factors(inputs)
    assert network.dtype == torch.float32
    for block in network.blocks:
        assert factors.inputs(block).dtype == torch.float32
    _, back = next(factors.backpropagate(torch.ones(1, N, 2)))
    assert all(g.dtype == torch.float32 for g in back)
    if dtype == torch.float32:
        expected = dense_jacobian(case.model(), inputs.double()).sum(1)[None]
        assert_equal(reconstructed(network, inputs, torch.ones(1, N, 2)), expected, FLOAT32)


def test_inputs_may_be_dictionaries_and_tuples():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, inputs):
            return self.layer(inputs["x"] + inputs["rest"][0])

    model = Two().double()
    x, rest = torch.randn(N, 3).double(), torch.randn(N, 3).double()
    inputs = {"x": x, "rest": (rest,)}
    network = Network.discover(model, inputs)
    whole = reconstructed(network, inputs, torch.ones(1, N, 2).double())
    assert_equal(whole, dense_jacobian(model.layer, x + rest).sum(1)[None])
    ones = torch.ones(1, 2, 2).double()
    parts = [reconstructed(network, _data.take(inputs, part), ones) for part in _data.slices(N, 2)]
    assert_equal(torch.cat(parts, 1), whole)


# -- random vectors, chunks ------------------------------------------------------------------------


def weighted(case: Case, n: int) -> WeightedData:
    weights = torch.linspace(1, 2, n, dtype=torch.float64)
    return WeightedData(case.inputs(n), torch.zeros(n, dtype=torch.long), weights / weights.sum(), torch.arange(n))


@pytest.mark.parametrize("mc_samples", [None, 3])
def test_curvature_data_carry_weights_and_do_not_depend_on_chunks(mc_samples):
    case = ZOO["mlp"]
    network, data = Network.discover(case.model(), case.inputs(3)), weighted(case, 5)

    def vectors(chunk_size):
        generator = torch.Generator().manual_seed(0)
        chunks = CurvatureData(
            network, data, Categorical(), mc_samples=mc_samples, generator=generator, chunk_size=chunk_size
        )
        first = torch.cat([chunk.vectors for chunk in chunks], 1)
        assert_equal(torch.cat([chunk.vectors for chunk in chunks], 1), first, 0.0)  # a second pass sees the same
        assert_equal(torch.cat([chunk.weights for chunk in chunks]), data.weights, 0.0)
        return first

    for chunk_size in (1, 2, 5, 100):
        assert_equal(vectors(chunk_size), vectors(None))
    if mc_samples is None:
        outputs = network.outputs(data.inputs)
        root = Categorical().hessian_square_root(outputs, data.targets) * data.weights.sqrt()[:, None]
        assert_equal(vectors(None), root)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_size_without_data_is_an_error(chunk_size):
    case = ZOO["mlp"]
    network = Network.discover(case.model(), case.inputs(3))
    with pytest.raises(ValueError, match="chunk_size"):
        CurvatureData(network, weighted(case, 5), Categorical(), chunk_size=chunk_size)


# -- what cannot be covered ------------------------------------------------------------------------


def discover(model: nn.Module, inputs: torch.Tensor) -> Network:
    return Network.discover(model, inputs)


def kinds_of(network) -> dict[str, str]:
    return {name: block.kind.name for block in network.blocks for name in block.parameters}


def test_a_large_embedding_that_is_tied_is_diagonal_and_one_of_positions_has_factors():
    model, inputs = TiedEmbedding(vocabulary=3000).double(), torch.randint(3000, (4, 4))
    network = discover(model, inputs)
    assert kinds_of(network)["tokens.weight"] == "diagonal"
    assert_equal(
        reconstructed(network, inputs, torch.ones(1, 4, 3000).double()),
        dense_jacobian_of_sum(model, inputs)[None], EXACT,
    )  # fmt: skip
    model, inputs = TiedEmbedding(length=3000).double(), torch.randint(3, (4, 3000))
    network = discover(model, inputs)
    assert kinds_of(network)["positions.weight"] == "kronecker"
    assert_equal(
        reconstructed(network, inputs, torch.ones(1, 4, 3).double()), dense_jacobian_of_sum(model, inputs)[None], EXACT
    )


def dense_jacobian_of_sum(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Gradients of the sum of the outputs of every datum, ``[N, D]``, one backward pass for each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(model(inputs[i : i + 1]).sum(), parameters) for i in range(len(inputs))]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_an_unused_parameter_has_its_prior_alone():
    model = nn.Sequential(nn.Linear(3, 2))
    model.extra = nn.Linear(2, 2)
    model.forward = lambda x: model[0](x)
    network = discover(model, torch.randn(4, 3))
    assert kinds_of(network)["extra.weight"] == kinds_of(network)["extra.bias"] == "prior alone"
    gradients = reconstructed(network, torch.randn(2, 3), torch.ones(1, 2, 2))
    assert not gradients[..., -6:].any() and gradients[..., :-6].any()


def test_no_trainable_parameter():
    model = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameters, got none"):
        discover(model, torch.randn(4, 3))


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (lambda y: (None, y), TypeError, "returns a tensor of outputs.*tuple of NoneType, Tensor"),
        (lambda y: {"out": y}, TypeError, r"got dict with the keys \['out'\]"),
        (lambda y: y[:, None].expand(-1, 5, -1), ValueError, r"Expected outputs of shape \[3, C\].*\(3, 5, 2\)"),
        (lambda y: y[:2], ValueError, r"\(2, 2\)"),
        (lambda y: y.sum(), ValueError, r"got \(\)"),
    ],
)
def test_outputs_of_another_shape_are_named(function, error, match):
    with pytest.raises(error, match=match):
        discover(nn.Sequential(nn.Linear(3, 2), Apply(function)), torch.randn(4, 3))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 2)),
        nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)),
        nn.Sequential(nn.BatchNorm1d(3, affine=False, track_running_stats=False), nn.Linear(3, 2)),
        nn.Sequential(nn.Linear(3, 2), Apply(lambda y: y - y.mean(0))),
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)),
    ],
    ids=["between", "first", "first-without-parameters", "centred-outputs", "last"],
)
def test_data_that_mix_are_an_error(model):
    with pytest.raises(ValueError, match="depends on other data of its batch"):
        discover(model.double(), torch.randn(5, 3).double())


def test_not_a_number_in_the_weights_is_an_error():
    model = ZOO["mlp"].model()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="the model's outputs"):
        discover(model, ZOO["mlp"].inputs(4))


def test_an_input_that_is_overwritten_later_is_an_error():
    """The factor would be taken from the overwritten values."""

    class Overwrites(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.head = layer, nn.Linear(3, 2)

        def forward(self, x):
            x = x * 2
            hidden = self.layer(x)
            x.relu_()
            return self.head(hidden + x)

    for layer in (nn.Linear(3, 3), nn.LayerNorm(3), nn.BatchNorm1d(3).eval()):
        model, inputs = Overwrites(layer).double(), torch.randn(N, 3).double()
        with pytest.raises(RuntimeError, match=r"overwritten in place|modified by an inplace operation"):
            reconstructed(discover(model, inputs), inputs, torch.ones(1, N, 2).double())


def test_a_model_that_overwrites_its_inputs_does_not_change_the_data():
    model = nn.Sequential(Apply(lambda x: x.sub_(1)), nn.Linear(3, 2)).double()
    inputs = torch.randn(N, 3).double()
    before = inputs.clone()
    network = discover(model, inputs)
    found = [reconstructed(network, inputs, torch.ones(1, N, 2).double()) for _ in range(2)]
    assert torch.equal(inputs, before)
    assert_equal(found[0], found[1], 0.0)


def test_a_forward_pass_may_call_its_layers_as_the_data_need_them():
    class Depends(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            x = self.layer(x).tanh()
            return self.head(self.layer(x) if len(x) > 3 else x)

    model = Depends().double()
    network = discover(model, torch.randn(3, 3).double())
    for n in (2, 5):
        inputs = torch.randn(n, 3).double()
        gradients_of_sum = reconstructed(network, inputs, torch.ones(1, n, 3).double())
        assert_equal(gradients_of_sum, dense_jacobian(model, inputs).sum(1)[None], EXACT)


def test_a_layer_that_no_datum_was_sent_to_is_named():
    class Sent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.expert = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x) + self.expert(x) if len(x) > 3 else self.layer(x)

    network = discover(Sent(), torch.randn(3, 3))
    with pytest.raises(RuntimeError, match=r"uses \['expert.bias', 'expert.weight'\] for these data, but for none"):
        network.factors(torch.randn(5, 3))


# -- the model stays as it was ---------------------------------------------------------------------


def test_a_fresh_pass_changes_nothing():
    model = VisionTransformer().double()
    model.train()
    model.head.eval()
    inputs = torch.randn(N, 6).double()
    model(inputs).sum().backward()
    before = {name: (p.clone(), p.grad.clone(), p.requires_grad) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    network = discover(model, inputs)
    reconstructed(network, inputs, torch.ones(1, N, 2).double())
    network.outputs(inputs)
    for name, p in model.named_parameters():
        value, gradient, requires_grad = before[name]
        assert torch.equal(p, value)
        assert torch.equal(p.grad, gradient)
        assert p.requires_grad == requires_grad
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode_of_the_caller(context):
    case = ZOO["lone-parameters"]
    model, inputs = case.model(), case.inputs(N)
    expected = dense_jacobian(model, inputs).sum(1)[None]
    with context():
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if context is torch.inference_mode:
            inputs = inputs.clone()  # an inference tensor
        network = discover(model, inputs)
        found = reconstructed(network, inputs, torch.ones(1, N, case.n_outputs, dtype=torch.float64))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == mode
    assert_equal(found, expected)


def test_description_restores_the_network():
    for name in ("cnn", "transformer-sequence-first", "tied-weights"):
        case = ZOO[name]
        model, inputs = case.model(), case.inputs(N)
        network = discover(model, inputs)
        restored = Network.restore(model, network.description())
        assert restored.description() == network.description()
        vectors = torch.ones(1, N, 2).double()
        assert_equal(reconstructed(restored, inputs, vectors), reconstructed(network, inputs, vectors), 0.0)
    with pytest.raises(ValueError, match="same trainable parameters; these differ"):
        Network.restore(ZOO["mlp"].model(), network.description())


# -- a check on itself -----------------------------------------------------------------------------


def test_a_layer_that_is_misread_is_differentiated_as_it_is(monkeypatch):
    """Any rule that is wrong for a model (a new argument of torch, say) gives no wrong posterior."""
    rule = RULES[torch.conv1d]

    def without_strides(is_used, input, weight, *rest):
        (arguments,) = rule(is_used, input, weight, *rest)
        return [replace(arguments, settings={**arguments.settings, "stride": (1,) * (weight.ndim - 2)})]

    monkeypatch.setitem(RULES, torch.conv1d, without_strides)
    case = ZOO["conv1d"]
    model, inputs = case.model(), case.inputs(N)
    network = Network.discover(model, inputs)
    assert [block.is_lone for block in network.blocks] == [True, False, False]
    vectors = torch.ones(1, N, case.n_outputs, dtype=torch.float64)
    assert_equal(reconstructed(network, inputs, vectors), dense_jacobian(model, inputs).sum(1)[None], EXACT)


def test_hooks_of_the_users_parameters_are_not_called():
    model = ZOO["mlp"].model()

    def fails(gradient):
        raise AssertionError("called")

    for parameter in model.parameters():
        parameter.register_hook(fails)
        parameter.register_post_accumulate_grad_hook(fails)
    inputs = ZOO["mlp"].inputs(N)
    reconstructed(Network.discover(model, inputs), inputs, torch.ones(1, N, 2).double())


class Square(torch.autograd.Function):
    """A function of a user's own that torch.func knows nothing of."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def test_autograd_functions_of_the_user_work_on_the_cpu():
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), Apply(Square.apply), nn.Linear(4, 2)]
    model, plain = (nn.Sequential(layers[0], f, layers[2]).double() for f in (layers[1], Apply(torch.square)))
    inputs = torch.randn(N, 3).double()
    found = reconstructed(discover(model, inputs), inputs, torch.ones(1, N, 2).double())
    assert_equal(found, dense_jacobian(plain, inputs).sum(1)[None])


def test_no_remarks_of_torch_on_batched_passes():
    """Vectors go back one by one on the CPU: no batching rule is asked for."""
    model = VisionTransformer().double()
    model.token.requires_grad_(False)
    model.positions.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = torch.randn(N, 6).double()
        next(discover(model, inputs).factors(inputs).backpropagate(torch.ones(2, N, 2).double()))


def test_complex_parameters_are_refused():
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(3, dtype=torch.cfloat)), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=4))

    with pytest.raises(UnsupportedLayerError, match=r"got the complex ones \['weight'\].*view_as_real"):
        discover(Filter(), torch.randn(4, 4))


@pytest.mark.parametrize("name", ["hard-experts", "hard-experts-of-tokens"])
def test_experts_are_called_as_the_data_need_them(name):
    """Their gradients are exact for other data than those that they were found with, however many go together."""
    torch.manual_seed(4)
    model, x = HANDWRITTEN[name].make().eval(), HANDWRITTEN[name].inputs(24)
    network = discover(model, x)
    assert network.apart if name == "hard-experts" else network.by_rows
    vectors = torch.ones(1, 24, 3, dtype=torch.float64)
    for size in (1, 5, 24):
        parts = [reconstructed(network, x[i : i + size], vectors[:, i : i + size]) for i in range(0, 24, size)]
        assert_equal(torch.cat(parts, 1)[0], gradients(model, x), EXACT)


def gradients(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of the sum of the outputs of every datum, ``[N, D]``."""
    rows = [torch.autograd.grad(output.sum(), model.parameters(), retain_graph=True) for output in model(x)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_a_model_that_is_random_is_told_from_one_that_mixes_data():
    class Dropped(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, training=True))

    with pytest.raises(ValueError, match=r"differ from one forward pass to the next.*training=True"):
        discover(Dropped(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(4, 20))


def test_as_many_steps_as_the_batch_needs_are_data_that_mix():
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(int(x.max())):
                x = x + 0.001 * self.layer(x).tanh()
            return self.head(x)

    x = torch.tensor([[1.0, 0.0, 1.0], [5.0, 0.0, 1.0], [2.0, 1.0, 1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"depends on other data of its batch, after the layer of 'layer.weight'"):
        discover(Steps().double(), x)
