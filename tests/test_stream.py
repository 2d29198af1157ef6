"""One forward pass over a stream: which data it observes, and that how the stream is cut does not matter."""

from __future__ import annotations

import math

import pytest
import torch

from debiased_laplace.curvature.structures import Diagonal, Kronecker, Window
from debiased_laplace.curvature.structures import kron as kron_module
from debiased_laplace.fitting import stream as module
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.stream import Observed, Plan, Stream
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.network.layers import patches as patches_module
from debiased_laplace.network.network import Network
from debiased_laplace.sampling.samplers import PrioritySampler, UniformSampler
from debiased_laplace.sampling.splits import Single
from tests.datasets import targets
from tests.networks import ZOO
from tests.tolerances import assert_equal

CASE = ZOO["cnn"]


def weights(plan: Plan, n: int, size: int, enough: int | None = None) -> list[int]:
    """For how many every datum stands, in batches of a size."""
    found: list[int] = []
    for start in range(0, n, size):
        of_batch = [0] * min(size, n - start)
        for window in plan.windows(start, len(of_batch), enough):
            for datum in range(window.part.start, window.part.stop):
                assert of_batch[datum] == 0
                of_batch[datum] = window.weight
        found += of_batch
    return found


@pytest.mark.parametrize("n", [1, 64, 65, 3000])
@pytest.mark.parametrize("size", [1, 7, 100, 64, 5000])
def test_how_a_datum_is_observed_depends_on_its_position_alone(n, size):
    plan = Plan(budget=16, seed=3)
    found = weights(plan, n, size)
    assert found == weights(plan, n, n)
    first = module.OBSERVED_PER_BUDGET * 16
    assert found[:first] == [1] * min(n, first)
    for position in range(first, n):
        start = position - position % module.WINDOW
        assert found[position] == found[start]


def test_consecutive_windows_are_looked_at_together():
    assert Plan(budget=16).windows(10, 300) == [Window(slice(0, 300), 1)]
    assert Plan(budget=16).windows(10, 0) == []


@pytest.mark.parametrize(("enough", "first"), [(None, 512), (512, 512), (1, 128), (129, 256), (10**9, 512)])
def test_in_every_stratum_one_window_stands_for_all(enough, first):
    """Strata double whenever the stream has: those of the first data have one window."""
    plan, n_first = Plan(budget=16, seed=1), first // module.WINDOW
    sizes = [1] * n_first + [2] * (n_first // 2) + [4] * (n_first // 2) + [8] * (n_first // 2)
    found = weights(plan, sum(sizes) * module.WINDOW, 1000, enough)[:: module.WINDOW]
    for size in sizes:
        stratum, found = found[:size], found[size:]
        assert sorted(stratum) == [0] * (size - 1) + [size]
    assert not found


def test_where_fewer_data_are_enough_they_are_among_those_where_more_are():
    plan = Plan(budget=64, seed=5)
    few, more = (torch.tensor(weights(plan, 9000, 9000, enough)) for enough in (200, 1500))
    assert 0 < int((few > 0).sum()) < int((more > 0).sum()) < 9000
    assert bool((more[few > 0] > 0).all())


def test_each_window_of_a_stratum_is_as_likely_as_any_other():
    first = 2 * module.OBSERVED_PER_BUDGET * 16  # of a stratum of four
    starts = [first + i * module.WINDOW for i in range(4)]
    chosen = [[bool(Plan(16, seed).windows(start, 1)) for start in starts].index(True) for seed in range(800)]
    counts = torch.bincount(torch.tensor(chosen), minlength=4).double()
    assert float(((counts - 200) ** 2 / 200).sum()) < 16.3  # the 99.9 % quantile of chi-squared with three degrees


@pytest.mark.parametrize("size", [1, 4, 60])
def test_the_sums_of_a_stream(size, monkeypatch):
    """Of every datum that is observed, as often as it stands for others; of more data where a layer needs them."""
    monkeypatch.setattr(module, "WINDOW", 3)
    monkeypatch.setattr(module, "OBSERVED_PER_BUDGET", 1)
    monkeypatch.setattr(kron_module, "POSITIONS_PER_INPUT", 3)
    monkeypatch.setattr(patches_module, "GAIN", 0.0)
    monkeypatch.setattr(patches_module, "ASSEMBLED", 0.0)
    plan = Plan(budget=12, seed=2)
    model, n = CASE.model(), 60
    inputs, labels = CASE.inputs(n), targets(Categorical(), n, 2)
    network = Network.discover(model, inputs)
    stream = Stream(lambda *_: network, Categorical(), Kronecker(), plan=plan)
    outputs = [stream(x, y) for x, y in zip(inputs.split(size), labels.split(size), strict=True)]
    assert_equal(torch.cat(outputs), model(inputs))
    observed = stream.observed
    assert isinstance(observed, Observed)
    assert observed.n == n
    assert observed.mean_loss == pytest.approx(float(torch.nn.functional.cross_entropy(model(inputs), labels).detach()))
    factors, ways = network.factors(inputs), set()
    statistics = observed.statistics
    for total, count, block in zip(statistics.totals, statistics.counts, network.blocks, strict=True):
        columns = factors.inputs(block)
        every = weights(plan, n, n, math.ceil(3 * block.inputs / columns.shape[-1]))
        assert set(every) >= {0, 1, 2}
        assert count == sum(every)
        ways.add(tuple(every))
        expected = torch.einsum("n,ngis,ngjs->gij", torch.tensor(every, dtype=columns.dtype), columns, columns)
        assert_equal(total, expected)
    assert len(ways) > 1


def test_layer_inputs_alone_are_those_of_a_forward_pass_with_a_graph():
    model, inputs = CASE.model(), CASE.inputs(4)
    network = Network.discover(model, inputs)
    light, whole = network.factors(inputs, backward=False), network.factors(inputs)
    assert_equal(light.outputs, whole.outputs)
    for block in network.blocks:
        assert_equal(light.inputs(block), whole.inputs(block))
    with pytest.raises(RuntimeError, match="no backward pass"):
        list(light.backpropagate(torch.ones(1, *light.outputs.shape)))


def test_a_draw_of_all_data_has_its_own_inputs_at_all_positions(monkeypatch):
    """However few positions the pass looked at: the fit is K-FAC of all data."""
    monkeypatch.setattr(kron_module, "POSITIONS_PER_INPUT", 1)
    n = 90
    inputs, labels = CASE.inputs(n), targets(Categorical(), n, 2)
    found, expected = (
        fit(CASE.model(), [(inputs, labels)], Categorical(), sampler=sampler, split=Single())
        for sampler in (PrioritySampler(n), UniformSampler(None))
    )
    assert found.observed.statistics is not None
    assert_equal(found.posterior.curvatures, expected.posterior.curvatures)


@pytest.mark.parametrize("structure", [Kronecker(), Diagonal()], ids=repr)
def test_the_chunk_size_is_the_users(structure):
    calls = []
    model = CASE.model()
    model.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    network = Network.discover(model, CASE.inputs(3))
    calls.clear()
    stream = Stream(lambda *_: network, Categorical(), structure, chunk_size=4)
    stream(CASE.inputs(10), targets(Categorical(), 10, 2))
    assert calls == [4, 4, 2]


def test_nothing_to_observe():
    model = CASE.model()
    stream = Stream(lambda x, _: Network.discover(model, x), Categorical(), Diagonal())
    stream(CASE.inputs(5), targets(Categorical(), 5, 2))
    assert stream.observed is not None
    assert stream.observed.statistics is None
    assert stream.observed.n == 5


def test_half_of_the_data_are_not_all_of_them():
    model = CASE.model()
    network = Network.discover(model, CASE.inputs(3))
    both = []
    for structure in (Kronecker(), Diagonal()):
        stream = Stream(lambda *_: network, Categorical(), structure)
        stream(CASE.inputs(5), targets(Categorical(), 5, 2))
        both.append(stream.observed)
    assert (both[0] + both[1]).statistics is None
    assert (both[0] + both[1]).n == 10
    assert set((both[0] + both[0]).statistics.counts) == {10}
