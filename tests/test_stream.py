"""One forward pass over a stream: which data it observes, and that how the stream is cut does not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from debiased_laplace.curvature.structures import Diagonal, Kronecker
from debiased_laplace.curvature.structures import kron as kron_module
from debiased_laplace.fitting import stream as module
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.stream import Observed, Plan, Stream, Window
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.network.network import Network
from debiased_laplace.sampling.samplers import PrioritySampler, UniformSampler
from debiased_laplace.sampling.splits import Single
from tests.datasets import targets
from tests.networks import ZOO
from tests.tolerances import assert_equal

CASE = ZOO["cnn"]


def looks(plan: Plan, n: int, size: int) -> list[Window]:
    """How every datum is looked at, in batches of a size."""
    found: list[Window] = []
    for start in range(0, n, size):
        for window in plan.windows(start, min(size, n - start)):
            assert start + window.part.start == len(found)
            found += [replace(window, part=slice(0, 0))] * (window.part.stop - window.part.start)
    return found


@pytest.mark.parametrize("n", [1, 64, 65, 3000])
@pytest.mark.parametrize("size", [1, 7, 100, 64, 5000])
def test_how_a_datum_is_observed_depends_on_its_position_alone(n, size):
    plan = Plan(budget=16, seed=3)
    found = looks(plan, n, size)
    assert len(found) == n
    assert found == looks(plan, n, n)
    assert found[: plan.whole] == [Window(slice(0, 0), 0, None, 1)] * min(n, plan.whole)
    for position in range(plan.whole, n):
        assert found[position].before == position - (position - plan.whole) % module.WINDOW
        assert found[position].phase is not None


@pytest.mark.parametrize("least", [1, 8])
def test_in_every_stratum_one_window_stands_for_all(least):
    """Strata double whenever the stream has; of those before, there are as many as the budget deserves."""
    plan = Plan(budget=16, seed=1, least=least)
    n_smallest = module.OBSERVED_PER_BUDGET * 16 // module.WINDOW
    sizes = [least] * n_smallest + [2 * least] * (n_smallest // 2) + [4 * least] * (n_smallest // 2)
    windows = plan.windows(plan.whole, sum(sizes) * module.WINDOW)
    weights = [window.weight for window in windows]
    for size in sizes:
        stratum, weights = weights[:size], weights[size:]
        assert sorted(stratum) == [0] * (size - 1) + [size]
    assert not weights


def test_each_window_of_a_stratum_is_as_likely_as_any_other():
    number = 2 * module.OBSERVED_PER_BUDGET * 16 // module.WINDOW  # the first of a stratum of four
    chosen = [[Plan(16, seed)._look(number + i)[1] for i in range(4)].index(4) for seed in range(800)]
    counts = torch.bincount(torch.tensor(chosen), minlength=4).double()
    assert float(((counts - 200) ** 2 / 200).sum()) < 16.3  # the 99.9 % quantile of chi-squared with three degrees


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.n_outputs > 1])
def test_the_grids_together_have_all_positions(name):
    """Of every layer: the mean of the outer products over phases is that at all positions."""
    case = ZOO[name]
    model, inputs = case.model(), case.inputs(3)
    network = Network.discover(model, inputs)
    factors = network.factors(inputs)
    n_phases = 64  # a multiple of those of every kind of layer
    for block in network.blocks:

        def gram(phase: int | None, block=block) -> torch.Tensor:
            columns = factors.inputs(block, phase=phase).to_dense()
            return torch.einsum("ngis,ngjs->gij", columns, columns)

        assert_equal(sum(gram(phase) for phase in range(n_phases)) / n_phases, gram(None))


def test_coarser_grids_have_fewer_positions():
    case = ZOO["cnn"]
    inputs = case.inputs(3)
    network = Network.discover(case.model(), inputs)
    factors = network.factors(inputs)
    positions = [factors.inputs(block).shape[-1] for block in network.blocks]
    fewer = [factors.inputs(block, phase=3).shape[-1] for block in network.blocks]
    assert all(f <= p for f, p in zip(fewer, positions, strict=True))
    assert fewer[0] <= positions[0] / 2


@pytest.mark.parametrize("size", [1, 4, 60])
def test_the_sums_of_a_stream(size, monkeypatch):
    """Of what is observed of every datum, as often as it stands for others; at all positions while a layer saw few."""
    monkeypatch.setattr(module, "WINDOW", 3)
    monkeypatch.setattr(module, "OBSERVED_PER_BUDGET", 1)
    monkeypatch.setattr(kron_module, "POSITIONS_PER_INPUT", 24)
    plan = Plan(budget=12, seed=2, whole=8)
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
    every = looks(plan, n, n)
    assert observed.statistics.count == sum(window.weight for window in every)
    assert {window.weight for window in every} >= {0, 1, 2}
    factors, ways = network.factors(inputs), set()
    for total, block in zip(observed.statistics.totals, network.blocks, strict=True):
        expected = torch.zeros_like(total)
        for position, window in enumerate(every):
            whole = factors.inputs(block, slice(position, position + 1))
            enough = window.before * whole.shape[-1] >= 24 * block.inputs
            ways.add((enough, window.phase is None))
            columns = factors.inputs(block, slice(position, position + 1), window.phase if enough else None)
            expected += window.weight * torch.einsum("ngis,ngjs->gij", columns, columns)
        assert_equal(total, expected)
    assert ways >= {(False, True), (False, False), (True, False)}


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
    assert (both[0] + both[0]).statistics.count == 10
