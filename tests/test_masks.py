"""Padding does not matter: a fit of padded batches with masks is that of the same data unpadded."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.curvature.structures import Kronecker, Structure, Window
from debiased_laplace.fitting import stream as stream_module
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.fitting.stream import Stream
from debiased_laplace.likelihoods import Categorical, Gaussian
from debiased_laplace.network import factors as factors_module
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.sampling.splits import Single
from tests.networks import ZOO, perturb
from tests.tolerances import assert_equal

SHARINGS = [dl.Expand(), dl.Reduce()]
N, LENGTH, WIDTH, VOCABULARY = 48, 5, 3, 6


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over unmasked positions."""
    share = mask[..., None].to(hidden)
    return (hidden * share).sum(1) / share.sum(1)


class Encoder(nn.Module):
    """torch's encoder layer, with key_padding_mask: its projections are packed in one weight."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed, self.head = nn.Linear(WIDTH, 4), nn.Linear(4, 2)
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=batch_first)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden, padding = self.embed(batch["x"]), ~batch["mask"]
        if self.batch_first:
            return self.head(pooled(self.layer(hidden, src_key_padding_mask=padding), batch["mask"]))
        hidden = self.layer(hidden.transpose(0, 1), src_key_padding_mask=padding)
        return self.head(pooled(hidden.transpose(0, 1), batch["mask"]))


class Attention(nn.Module):
    """Multi-head attention with three weights, whose keys are masked; read at the first position."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=WIDTH, vdim=WIDTH, batch_first=True)
        self.embed, self.head = nn.Linear(WIDTH, 4), nn.Linear(4, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]
        hidden, _ = self.attention(self.embed(x), x, x, key_padding_mask=~batch["mask"], need_weights=False)
        return self.head(torch.tanh(hidden)[:, 0])


class Tokens(nn.Module):
    """Embedded tokens and attention written out as in Transformers: a mask of the smallest number is added."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4, padding_idx)
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.norm(self.embedding(batch["tokens"]))
        scores = self.query(hidden) @ self.key(hidden).mT
        scores = scores + torch.zeros_like(scores).masked_fill(~batch["mask"][:, None], torch.finfo(scores.dtype).min)
        return self.head(pooled(torch.tanh(hidden + scores.softmax(-1) @ self.value(hidden)), batch["mask"]))


class Convolutions(nn.Module):
    """Convolutions over time, of inputs and activations that are zero where there is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(WIDTH, 4, 3, padding=1, groups=1), nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["mask"][:, None].to(batch["x"])
        hidden = torch.tanh(self.first(batch["x"].mT * mask)) * mask
        return self.head(pooled(torch.tanh(self.second(hidden)).mT, batch["mask"]))


class Summed(nn.Module):
    """Tokens of which the padding has a row of zeros, summed without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 4, padding_idx=0), nn.Linear(4, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(torch.tanh(self.embedding(batch["tokens"]).sum(1)))


class Recurrent(nn.Module):
    """A cell that is called step by step, and whose state stays as it is where there is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(WIDTH + 4, 4), nn.Linear(4, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        state = batch["x"].new_zeros(len(batch["x"]), 4)
        for x, mask in zip(batch["x"].unbind(1), batch["mask"].unbind(1), strict=True):
            state = torch.where(mask[:, None], torch.tanh(self.cell(torch.cat([x, state], 1))), state)
        return self.head(state)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "encoder": Encoder, "encoder-sequence-first": lambda: Encoder(batch_first=False), "attention": Attention,
    "tokens": Tokens, "tokens-padding-row": lambda: Tokens(padding_idx=0), "convolutions": Convolutions,
    "summed": Summed,
}  # fmt: skip


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = perturb((MODELS | {"recurrent": Recurrent})[name]().double()).eval()
    if name == "summed":
        model.embedding.weight.data[0] = 0.0
    return model


#: The least number of positions, where it is not one. Keys whose softmax is over one of them have no gradient but
#: rounding, which is another one on every processor.
SHORTEST = {"attention": 2}

Data = tuple[dict[str, Tensor], Tensor]


def padded(value: float = 0.0, seed: int = 0, n: int = N, first_full: int = 0, shortest: int = 1) -> Data:
    """Data of several lengths; what is at masked positions is so many times noise, or any token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, VOCABULARY, (n, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (n,), generator=generator).clamp_min(shortest)
    lengths[:first_full] = LENGTH
    labels = torch.randint(2, (n,), generator=generator)
    mask = torch.arange(LENGTH) < lengths[:, None]
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    others = torch.randint(VOCABULARY, tokens.shape, generator=generator) if value else torch.zeros_like(tokens)
    x, tokens = torch.where(mask[..., None], x, value * noise), torch.where(mask, tokens, others)
    return {"x": x, "tokens": tokens, "mask": mask}, labels


def cut(data: Data, size: int) -> list[Data]:
    """The data in batches of a size, as they are."""
    inputs, labels = data
    return [
        ({key: value[i : i + size] for key, value in inputs.items()}, labels[i : i + size])
        for i in range(0, len(labels), size)
    ]


def unpadded(data: Data) -> list[Data]:
    """Every datum in a batch of its own, without padding."""
    return [({key: v[:, : int(x["mask"].sum())] for key, v in x.items()}, y) for x, y in cut(data, 1)]


def turned(data: Data) -> Data:
    """Padding before the data and not after them."""
    inputs, labels = data
    shifts = LENGTH - inputs["mask"].sum(1)
    index = (torch.arange(LENGTH) - shifts[:, None]) % LENGTH
    rows = torch.arange(len(labels))[:, None]
    return {key: value[rows, index] for key, value in inputs.items()}, labels


def fitted(name: str, batches: Sequence[Any], structure: Structure | None = None, **settings: Any) -> Fit:
    return fit(model_of(name), batches, Categorical(), structure=structure or Kronecker(), **settings)


def assert_same(found: Fit, expected: Fit) -> None:
    """The same curvature in every direction, and the same predictions."""
    inputs, _ = padded(seed=7, n=4)
    for result in (found, expected):
        assert len(result.curvature_indices) == N or result.n_seen > N
    matrices, variances = [], []
    for result in (found, expected):
        basis = result.posterior.basis
        identity = torch.eye(basis.rank, dtype=torch.float64)
        matrices.append(basis.lift(result.posterior.curvatures * basis.project(identity)))
        variances.append(functional_moments(result.network, result.posterior, inputs)[1])
    assert_equal(matrices[0], matrices[1])
    assert_equal(variances[0], variances[1])


def weighted(data: Data) -> WeightedData:
    inputs, labels = data
    weights = torch.linspace(0.5, 3, len(labels), dtype=torch.float64)
    return WeightedData(inputs, labels, weights / weights.sum(), torch.arange(len(labels)))


def curvature_data(network: Network, data: WeightedData) -> CurvatureData:
    return CurvatureData(network, data, Categorical())


# -- the law ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS, ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_padded_batches_are_those_of_the_data_unpadded(name, sharing):
    data = padded(0.0 if name == "summed" else 5.0, shortest=SHORTEST.get(name, 1))
    network = Network.discover(model_of(name), data[0])
    found, parts = Kronecker(sharing=sharing).measure(network, curvature_data(network, weighted(data))), []
    for (inputs, labels), weight in zip(unpadded(data), weighted(data).weights.split(1), strict=True):
        one = WeightedData(inputs, labels, weight, torch.zeros(1, dtype=torch.long))
        parts.append(Kronecker(sharing=sharing).measure(network, curvature_data(network, one)))
    expected = functools.reduce(operator.add, parts)
    for actual, wanted in zip(found.inputs + found.outputs, expected.inputs + expected.outputs, strict=True):
        if float(wanted.abs().max()) > 1e-20:  # reduce: the vectors of keys add up to zero
            assert_equal(actual, wanted)


@pytest.mark.parametrize("name", ["tokens", "convolutions"])
def test_statistics_do_not_depend_on_what_a_cache_holds(name, monkeypatch):
    data, structure = padded(5.0), Kronecker()
    network = Network.discover(model_of(name), data[0])
    results = []
    for memory in (factors_module.CACHE_MEMORY, 2000):
        monkeypatch.setattr(factors_module, "CACHE_MEMORY", memory)
        measured = structure.measure(network, curvature_data(network, weighted(data)))
        observed = structure.observe(network, network.factors(data[0]), lambda _: [Window(slice(5, N), 1)])
        results.append(measured.inputs + measured.outputs + observed.totals)
    for found, expected in zip(*results, strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize(
    ("name", "sharing"),
    [*((name, SHARINGS[0]) for name in MODELS), *((name, SHARINGS[1]) for name in ("convolutions", "summed"))],
    ids=str,
)  # fmt: skip
def test_a_fit_of_padded_batches_is_that_of_the_data_unpadded(name, sharing):
    structure, shortest = Kronecker(sharing=sharing), SHORTEST.get(name, 1)
    expected = fitted(name, unpadded(padded(shortest=shortest)), structure)
    # The sum has no mask: what stands at its masked positions is the padding token.
    noise = padded(0.0 if name == "summed" else 5.0, shortest=shortest)
    assert_same(fitted(name, cut(padded(shortest=shortest), 7), structure), expected)
    assert_same(fitted(name, cut(noise, N), structure), expected)


@pytest.mark.parametrize("sharing", SHARINGS, ids=repr)
def test_a_cell_that_is_called_step_by_step(sharing):
    structure = Kronecker(sharing=sharing)
    expected = fitted("recurrent", cut(padded(), 7), structure)
    assert_same(fitted("recurrent", cut(padded(5.0), N), structure), expected)


@pytest.mark.parametrize("name", ["encoder", "tokens"])
def test_padding_may_come_first(name):
    assert_same(fitted(name, cut(turned(padded(5.0)), 7)), fitted(name, unpadded(padded())))


@pytest.mark.parametrize(
    "settings", [{"estimator": "factored"}, {"split": Single()}, {"mc_samples": 1}, {"chunk_size": 3},
                 {"separate_bias": True}, {"structure": Kronecker(diagonal=["embed*"])}],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
@pytest.mark.parametrize("name", ["encoder", "tokens"])
def test_with_any_settings(name, settings):
    assert_same(fitted(name, cut(padded(5.0), 7), **settings), fitted(name, unpadded(padded()), **settings))


def test_the_first_batches_need_not_be_padded():
    data = padded(5.0, first_full=20)
    assert_same(fitted("tokens", cut(data, 10)), fitted("tokens", unpadded(data)))


def test_data_that_are_added_to_an_earlier_fit():
    first, second = padded(5.0), padded(5.0, seed=3)
    results = []
    for batches in (lambda data: cut(data, 7), unpadded):
        earlier = fitted("tokens", batches(first))
        results.append(fitted("tokens", batches(second), previous=earlier))
    assert_same(*results)


# -- statistics ------------------------------------------------------------------------------------


def test_factors_equal_a_naive_loop_over_unmasked_positions():
    """A sum over the positions with a gradient, and a mean of the squares of as many vectors."""
    model, data = model_of("tokens"), weighted(padded(5.0, n=6))
    network = Network.discover(model, data.inputs)
    statistics = Kronecker().measure(network, CurvatureData(network, data, Gaussian()))
    index = [block.name for block in network.blocks].index("value")
    frequencies, a, b = torch.zeros(VOCABULARY).double(), torch.zeros(5, 5).double(), torch.zeros(4, 4).double()
    for (inputs, _), weight in zip(cut((data.inputs, data.targets), 1), data.weights, strict=True):
        length = int(inputs["mask"].sum())
        values: list[Tensor] = []
        hook = model.value.register_forward_hook(lambda _, x, y, values=values: values.extend((x[0], y)))
        outputs = model(inputs)
        hook.remove()
        hidden = torch.cat([values[0][0, :length], torch.ones(length, 1)], 1).detach()
        rows = torch.stack([torch.autograd.grad(f, values[1], retain_graph=True)[0][0] for f in outputs[0]])
        assert not bool(rows[:, length:].any())
        a += weight * hidden.mT @ hidden
        b += weight / length * torch.einsum("cto,ctp->op", rows, rows)
        frequencies += weight * torch.bincount(inputs["tokens"][0, :length], minlength=VOCABULARY)
    assert_equal(statistics.inputs[0][0], frequencies)
    assert_equal(statistics.inputs[index][0], a)
    assert_equal(statistics.outputs[index][0], b)


def test_positions_that_nobody_reads_are_none():
    """After the last attention a class token is read alone: the layers behind it have one position."""
    case = ZOO["transformer"]
    inputs = case.inputs(4)
    network = Network.discover(case.model(), inputs)
    factors = network.factors(inputs)
    masks = {block.name: factors.has_gradient(block) for block in network.blocks}
    for name in ("encoder.linear1", "encoder.linear2", "encoder.self_attn.out_proj"):
        assert masks[name].tolist() == [[True, False, False]] * 4
    for name in ("embed", "encoder.self_attn", "head"):
        assert masks[name] is None


@pytest.mark.parametrize("name", ["encoder", "encoder-sequence-first", "attention"])
def test_the_first_sequences_may_have_one_position(name):
    """Which dimension counts the data cannot be seen then, of layers whose positions and data are merged."""
    (datum, _), longer = unpadded(padded())[0], padded(first_full=6, n=6)[0]
    assert datum["mask"].shape == (1, 1)
    network, other = (Network.discover(model_of(name), inputs) for inputs in (datum, longer))
    assert network.has_sequences
    vectors = torch.eye(2).double()[:, None].expand(2, 6, 2)
    for found, expected in zip(*(one.factors(longer).backpropagate_all(vectors) for one in (network, other)),
                               strict=True):  # fmt: skip
        assert_equal(found, expected)


def test_pixels_are_no_padding():
    """A rectifier silences pixels; they stay in the sums of convolutions over images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    ).double()
    model[0].bias.data.fill_(-1.0)
    inputs = torch.randn(5, 1, 4, 4).double()
    network = Network.discover(model, inputs)
    factors = network.factors(inputs)
    (silent,) = (back[0] for _, back in factors.backpropagate(torch.ones(1, 5, 2).double()))
    assert bool((silent == 0).all((1, 2, 3)).any())
    assert [factors.has_gradient(block) for block in network.blocks] == [None] * 3
    assert not network.has_sequences


def test_a_layer_without_influence_has_no_position_with_a_gradient():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x)
            return self.used(x).mean(1)

    inputs = padded()[0]["x"]
    for sharing in SHARINGS:
        result = fit(Idle().double(), [(inputs, padded()[1])], Categorical(), structure=Kronecker(sharing=sharing))
        idle = result.posterior.basis.split(result.posterior.curvatures)[1]
        assert not bool(idle.any())
        observed = result.observed.statistics
        assert not bool(observed.totals[1].any())
        assert bool(observed.totals[0].any())


# -- the stream ------------------------------------------------------------------------------------


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr(stream_module, "WINDOW", 2)
    monkeypatch.setattr(stream_module, "OF_SEQUENCES", 4)


def weight(position: int) -> int:
    """Of the plan, found independently of the stream that follows it."""
    windows = stream_module.Plan(most=4).windows(position, 1)
    return windows[0].weight if windows else 0


@pytest.mark.parametrize("sharing", SHARINGS, ids=repr)
@pytest.mark.parametrize("size", [1, 4, N])
def test_a_stream_observes_some_windows_whole(size, sharing, short_windows):
    structure, data = Kronecker(sharing=sharing), padded(5.0, first_full=10)
    model = model_of("encoder")
    network = Network.discover(model, padded(first_full=3)[0])
    stream = Stream(lambda *_: network, Categorical(), structure)
    outputs = torch.cat([stream(x, y) for x, y in cut(data, size)])
    assert_equal(outputs, model(data[0]))
    weights = [weight(position) for position in range(N)]
    assert stream.observed.n == N
    assert set(stream.observed.statistics.counts) == {sum(weights)}
    assert set(weights) >= {0, 1, 2}
    expected = None
    for (x, _), stands_for in zip(unpadded(data), weights, strict=True):
        if stands_for:
            window = Window(slice(0, 1), stands_for)
            one = structure.observe(network, network.factors(x), lambda _, window=window: [window])
            expected = one if expected is None else expected + one
    for found, wanted in zip(stream.observed.statistics.totals, expected.totals, strict=True):
        assert_equal(found, wanted)


@pytest.mark.parametrize(("name", "sharing"), [("tokens", SHARINGS[0]), ("convolutions", SHARINGS[1])], ids=str)
def test_the_law_of_a_long_stream(name, sharing, short_windows):
    structure = Kronecker(sharing=sharing)
    found = fitted(name, cut(padded(5.0, first_full=12), 7), structure)
    assert_same(found, fitted(name, unpadded(padded(first_full=12)), structure))


def test_an_interrupted_pass_goes_on_in_the_same_windows(short_windows, tmp_path):
    batches = cut(padded(5.0, first_full=12), 7)

    def stops():
        yield from batches[:5]
        raise KeyboardInterrupt

    path = tmp_path / "fit.progress"
    with pytest.raises(KeyboardInterrupt):
        fitted("tokens", stops(), checkpoint=path)
    resumed, expected = fitted("tokens", batches, checkpoint=path), fitted("tokens", batches)
    assert torch.equal(resumed.posterior.curvatures, expected.posterior.curvatures)
    assert resumed.observed.statistics.counts == expected.observed.statistics.counts


@pytest.mark.parametrize(("name", "passes"), [("cnn", 0), ("mlp", 0), ("batch-norm", 0), ("conv1d", 1)])
def test_networks_without_sequences_have_no_backward_pass_in_the_stream(name, passes, monkeypatch):
    case, labels = ZOO[name], torch.arange(12) % 2
    network = Network.discover(case.model(), case.inputs(3))
    stream, calls, grad = Stream(lambda *_: network, Categorical(), Kronecker()), [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    stream(case.inputs(12), labels)
    assert len(calls) == passes
    assert network.has_sequences == bool(passes)


# -- outputs at every position -----------------------------------------------------------------------


class Tagger(nn.Module):
    """A label for every token; attention does not see the masked ones, whose own outputs have no target."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.layer(self.tokens(ids), src_key_padding_mask=~mask))


def tagged(filler: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(n, (12, 5), generator=generator) for n in (7, 3))
    mask = torch.arange(5) < torch.tensor([2, 5, 3, 4] * 3)[:, None]
    return [(ids.where(mask, filler), mask, labels.where(mask, -100))]


@pytest.mark.parametrize("sharing", [dl.Expand(), dl.Reduce()], ids=repr)
def test_what_stands_at_positions_without_a_target_does_not_matter(sharing):
    torch.manual_seed(0)
    model = Tagger().double().eval()
    fits = [dl.fit(model, tagged(filler), "classification", structure=Kronecker(sharing=sharing)) for filler in (0, 5)]
    one, other = (posterior.posterior for posterior in fits)
    assert_equal(one.curvatures.sort().values, other.curvatures.sort().values)
    directions = torch.randn(3, one.mean.numel(), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, second = (p.basis.project(directions).square() @ p.curvatures for p in (one, other))
    assert_equal(first, second)
