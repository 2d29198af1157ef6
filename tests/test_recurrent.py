"""Recurrent layers: what is written out is what torch computes, and its factors are the gradients of every datum."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import debiased_laplace as dl
from debiased_laplace.likelihoods import Gaussian
from debiased_laplace.network.network import Network
from debiased_laplace.network.tracing import WrittenOut
from debiased_laplace.posterior.predictive import linearized_samples, weight_samples
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.testing import check_posterior, check_predictive, dense_jacobian
from tests.datasets import measure
from tests.networks import Packed, Recurrent, perturb
from tests.test_gradients import reconstructed
from tests.tolerances import EXACT, FLOAT32, assert_equal

LAYERS = [
    (nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu", "num_layers": 2, "batch_first": True}),
    (nn.RNN, {"bias": False, "bidirectional": True}),
    (nn.LSTM, {}), (nn.LSTM, {"num_layers": 2, "bidirectional": True, "dropout": 0.5, "batch_first": True}),
    (nn.LSTM, {"proj_size": 2, "bidirectional": True, "num_layers": 2}), (nn.LSTM, {"proj_size": 1, "bias": False}),
    (nn.GRU, {}), (nn.GRU, {"num_layers": 3, "bidirectional": True}), (nn.GRU, {"bias": False, "batch_first": True}),
]  # fmt: skip
IDS = [f"{kind.__name__}-{'-'.join(options)}" for kind, options in LAYERS]
#: Of a batch, in any order; the network is found with others.
LENGTHS = [(2, 4, 3), (1, 4, 2, 3, 3), (4, 4, 4), (1, 1), (3, 2, 1), (2,), (1, 2, 3, 4, 1, 2, 3, 4, 1)]


def made(build, seed=0, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return perturb(build().to(dtype)).eval()


def sequences_of(lengths, seed=0):
    """Tokens ``[N, T]``, zero after the last one of each datum."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 5, (len(lengths), 4), generator=generator)
    return torch.where(torch.arange(4) < torch.tensor(lengths)[:, None], tokens, 0)


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [leaf for part in result if part is not None for leaf in flat(part)]


def check_factors(network, model, inputs):
    vectors = numbers(3, len(inputs), network.n_outputs, seed=3)
    expected = torch.einsum("vnc,ncd->vnd", vectors, dense_jacobian(model, inputs))
    assert_equal(reconstructed(network, inputs, vectors, 2), expected, EXACT)


# -- written out, they are what torch computes ---------------------------------------------------


@pytest.mark.parametrize("how", ["batch", "with-states", "alone", "packed", "packed-with-states"])
@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=IDS)
def test_written_out_layers_are_the_fused_ones(kind, options, how):
    """Outputs, last states, and the gradients in the weights, the inputs and the initial states."""
    layer = made(lambda: kind(2, 3, **options))
    layers = layer.num_layers * (2 if layer.bidirectional else 1)
    n = () if how == "alone" else (4,)
    initial = [numbers(layers, *n, layer.proj_size or 3, seed=5), numbers(layers, *n, 3, seed=6)]
    initial = [state.requires_grad_() for state in initial[: 2 if kind is nn.LSTM else 1]]
    inputs = numbers(5, *n, 2).requires_grad_()
    given = inputs.transpose(0, 1) if layer.batch_first and n else inputs
    if how.startswith("packed"):
        given = pack_padded_sequence(inputs, torch.tensor([2, 5, 1, 2]), enforce_sorted=False)
    states = () if how in ("batch", "packed") else (initial[0] if len(initial) == 1 else tuple(initial),)
    leaves = [*layer.parameters(), inputs, *(initial if states else ())]

    def values_and_gradients():
        results = flat(layer(given, *states))
        tensors = [result for result in results if result.is_floating_point()]
        total = sum((tensor * numbers(*tensor.shape, seed=i)).sum() for i, tensor in enumerate(tensors))
        return results + list(torch.autograd.grad(total, leaves, retain_graph=True))

    expected = values_and_gradients()
    with WrittenOut():
        actual = values_and_gradients()
    for one, other in zip(actual, expected, strict=True):
        assert_equal(one, other, 1e-12)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("bias", [True, False])
def test_written_out_cells_are_the_fused_ones(kind, bias):
    cell, inputs = made(lambda: kind(2, 3, bias=bias)), numbers(4, 2)
    expected = flat(cell(inputs))
    with WrittenOut():
        actual = flat(cell(inputs))
    for one, other in zip(actual, expected, strict=True):
        assert_equal(one, other, 1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_written_out_packing_is_that_of_torch(batch_first):
    inputs, lengths = numbers(4, 4, 2).requires_grad_(), torch.tensor([4, 4, 2, 1])

    def results():
        packed = pack_padded_sequence(inputs, lengths, batch_first)
        again = pad_packed_sequence(packed, batch_first, padding_value=-3.0, total_length=6)
        (gradient,) = torch.autograd.grad(again[0].square().sum(), inputs)
        return [*flat(packed), *again, gradient]

    expected = results()
    with WrittenOut():
        actual = results()
        with pytest.raises(RuntimeError, match="sorted in decreasing order"):
            pack_padded_sequence(inputs, torch.tensor([1, 2, 3, 4]), batch_first)
    for one, other in zip(actual, expected, strict=True):
        assert_equal(one, other)


def test_dropout_between_layers_is_that_of_the_mode():
    layer, inputs = made(lambda: nn.GRU(2, 50, 2, dropout=0.5)).train(), numbers(3, 4, 2)
    with WrittenOut():
        first, second = layer(inputs)[0], layer(inputs)[0]
        layer.eval()
        assert_equal(layer(inputs)[0], layer(inputs)[0])
    assert not torch.equal(first, second)


# -- their factors are the gradients of every datum ----------------------------------------------


@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=IDS)
def test_gradients_of_every_datum(kind, options):
    width = (options.get("proj_size") or 3) * (2 if options.get("bidirectional") else 1)
    model, inputs = made(lambda: Recurrent(kind(2, 3, **options), width)), numbers(4, 6)
    network = Network.discover(model, inputs)
    check_factors(network, model, inputs)
    kinds = {block.kind.name for block in network.blocks}
    assert kinds == {"kronecker"}
    assert len({block.name for block in network.blocks}) == len(network.blocks)


def test_one_call_for_all_times_whatever_their_number():
    model = made(lambda: nn.Sequential(Last(nn.LSTM(2, 3, batch_first=True)), nn.Linear(3, 2)))
    network = Network.discover(model, numbers(4, 5, 2))
    assert [block.calls for block in network.blocks] == [(0,), (1,), (2,)]
    for length in (1, 2, 9):
        check_factors(network, model, numbers(3, length, 2))


class Last(nn.Module):
    """The last outputs of a recurrent layer, with trainable initial states."""

    def __init__(self, layer, trainable=False):
        super().__init__()
        self.layer = layer
        self.initial = nn.Parameter(torch.randn(1, 1, 3)) if trainable else None

    def forward(self, x):
        if self.initial is None:
            return self.layer(x)[0][:, -1]
        return self.layer(x, self.initial.expand(-1, len(x), -1).contiguous())[0][:, -1]


def test_trainable_initial_states():
    model = made(lambda: nn.Sequential(Last(nn.GRU(2, 3, batch_first=True), trainable=True), nn.Linear(3, 2)))
    inputs = numbers(4, 5, 2)
    network = Network.discover(model, inputs)
    check_factors(network, model, inputs)
    assert network.blocks[0].name == "0.initial"


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "*"])
def test_partly_frozen_layers(frozen):
    model, inputs = made(lambda: Packed(nn.LSTM(2, 2))), sequences_of((2, 4, 3, 1))
    for name, parameter in model.layer.named_parameters():
        parameter.requires_grad_(frozen not in (name, "*"))
    check_factors(Network.discover(model, inputs), model, inputs)


class ByHand(nn.Module):
    """An LSTM of linear layers."""

    def __init__(self):
        super().__init__()
        self.gates, self.head = nn.Linear(5, 12), nn.Linear(3, 2)

    def forward(self, x):
        hidden = cell = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            into, forget, content, out = self.gates(torch.cat([step, hidden], 1)).chunk(4, 1)
            cell = forget.sigmoid() * cell + into.sigmoid() * content.tanh()
            hidden = out.sigmoid() * cell.tanh()
        return self.head(hidden)


def test_one_written_by_hand():
    model, inputs = made(ByHand), numbers(4, 3, 2)
    network = Network.discover(model, inputs)
    check_factors(network, model, inputs)
    assert [block.kind.name for block in network.blocks] == ["kronecker", "kronecker"]


# -- packed sequences ---------------------------------------------------------------------------


class LastState(Packed):
    """The last states of sequences of tokens that are embedded once they are packed, or one by one, and packed then."""

    def __init__(self, layer, tokens_first):
        super().__init__(layer)
        self.tokens_first = tokens_first

    def forward(self, x):
        rows = [row[row != 0] for row in x]
        if self.tokens_first:
            packed = pack_sequence(rows, enforce_sorted=False)
            packed = PackedSequence(self.embedding(packed.data), *packed[1:])
        else:
            packed = pack_sequence([self.embedding(row) for row in rows], enforce_sorted=False)
        _, state = self.layer(packed)
        return self.head(torch.tanh(self.hidden(state[-1])))


PACKED = {
    "all": lambda: Packed(nn.LSTM(2, 2, 2, bidirectional=True)),
    "all-by-hand": lambda: Packed(nn.GRU(2, 2), by_hand=True),
    "projected": lambda: Packed(nn.LSTM(2, 3, proj_size=2, bias=False)),
    "last": lambda: LastState(nn.RNN(2, 2), tokens_first=False),
    "last-tokens-first": lambda: LastState(nn.GRU(2, 2), tokens_first=True),
}


@pytest.mark.parametrize("first", [(2, 4, 3), (4, 3, 2), (3, 3, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_of_any_lengths_in_any_order(name, first):
    """Whatever the network was found with: data in order, or of one length, tell nothing about others."""
    model = made(PACKED[name])
    network = Network.discover(model, sequences_of(first, seed=9))
    for seed, lengths in enumerate(LENGTHS):
        check_factors(network, model, sequences_of(lengths, seed))


def test_sequences_that_are_embedded_one_by_one_have_as_many_calls_as_data():
    """The calls of a block are told by their parameters, not by their number."""
    model = made(PACKED["last"])
    network = Network.discover(model, sequences_of((2, 4, 3)))
    for lengths in ((1, 4, 2, 3), (2, 2), (4, 1, 3)):
        check_factors(network, model, sequences_of(lengths))


def test_data_are_told_apart_whatever_their_number():
    """Numbers of several digits, in the precisions that people have."""
    lengths = [1 + i % 4 for i in range(70)]
    inputs = sequences_of(lengths)
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, FLOAT32)):
        model = made(PACKED["all"], dtype=dtype)
        network = Network.discover(model, inputs)
        expected = dense_jacobian(model, inputs).sum(1)[None]
        assert_equal(reconstructed(network, inputs, torch.ones(1, 70, 2, dtype=dtype)), expected, tolerance)
    model = made(PACKED["all"], dtype=torch.bfloat16)
    factors = Network.discover(model, inputs).factors(inputs)
    assert factors.layout(1).lengths.tolist() == lengths


def test_a_datum_counts_the_positions_that_it_has():
    """Statistics of data in one batch are those of the data one by one."""
    model, inputs = made(PACKED["all"]), sequences_of((2, 4, 1, 3))
    network, targets = Network.discover(model, inputs), numbers(4, 2)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def statistics(part):
        data = WeightedData(inputs[part], targets[part], weights[part], torch.arange(4)[part])
        return measure(dl.Kronecker(), network, data, Gaussian())

    together, each = statistics(slice(0, 4)), [statistics(slice(i, i + 1)) for i in range(4)]
    alone = each[0] + each[1] + each[2] + each[3]
    for one, other in zip(together.inputs + together.outputs, alone.inputs + alone.outputs, strict=True):
        assert_equal(one, other)
    assert network.factors(inputs).has_gradient(network.blocks[1]).sum(1).tolist() == [2, 4, 1, 3]


# -- posteriors ----------------------------------------------------------------------------------

MODELS = {
    "lstm": (lambda: Recurrent(nn.LSTM(2, 3), 3), lambda n: numbers(n, 6)),
    "gru": (lambda: Recurrent(nn.GRU(2, 2, 2, bidirectional=True, batch_first=True), 4), lambda n: numbers(n, 6)),
    "packed": (PACKED["all"], lambda n: sequences_of([1 + i % 4 for i in range(n)])),
}


@pytest.mark.parametrize("name", MODELS)
def test_fit_predict_save_and_load(name, tmp_path):
    build, data = MODELS[name]
    model, inputs = made(build), data(12)
    flat_weights = list(model.layer._flat_weights)
    before = copy.deepcopy(model.state_dict())
    la = dl.fit(model, [(inputs[:7], numbers(7, 2)), (inputs[7:], numbers(5, 2, seed=1))], Gaussian())
    check_posterior(la.posterior)
    check_predictive(la.network, la.posterior, inputs[:4])
    for method in ("glm", "linearized", "nn"):
        assert la.predict(inputs[:3], method=method).mean.isfinite().all()
    la.save(tmp_path / "posterior")
    loaded = dl.load(tmp_path / "posterior", model)
    assert_equal(loaded.predict(inputs[5:9]).variance, la.predict(inputs[5:9]).variance)
    assert all(one is other for one, other in zip(model.layer._flat_weights, flat_weights, strict=True))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_other_weights_are_really_used(name):
    """A recurrent layer has its weights in a list besides: outputs at others are those of a model that has them."""
    build, data = MODELS[name]
    model, inputs = made(build), data(4)
    network = Network.discover(model, inputs)
    deviations = 0.3 * numbers(3, network.n_params, seed=2)
    deviations = network.without_padding(deviations)
    samples = weight_samples(network, network.mean(), deviations, inputs)
    linearized = linearized_samples(network, network.mean(), deviations, inputs)
    jacobian = dense_jacobian(model, inputs)
    for sample, line, deviation in zip(samples, linearized, deviations, strict=True):
        assert_equal(line, model(inputs) + jacobian @ deviation)
        other = made(build)
        other.load_state_dict(network.from_vector(network.mean() + deviation), strict=False)
        assert_equal(sample, other(inputs))
    assert_equal(network.outputs(inputs), model(inputs))
