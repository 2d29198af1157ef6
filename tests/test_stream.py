"""One forward pass over a stream: which data it observes, and that how the stream is cut does not matter."""

from __future__ import annotations

import pytest
import torch

from debiased_laplace.curvature.structures import Diagonal, Kronecker
from debiased_laplace.fitting import stream as module
from debiased_laplace.fitting.stream import Observed, Stream, windows
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.network.network import Network
from tests.datasets import targets
from tests.networks import ZOO
from tests.tolerances import assert_equal

CASE = ZOO["cnn"]


def phases(n: int, size: int) -> list[int | None]:
    """The phase that every datum is observed on, in batches of a size."""
    found: list[int | None] = []
    for start in range(0, n, size):
        for part, phase in windows(start, min(size, n - start)):
            assert start + part.start == len(found)
            found += [phase] * (part.stop - part.start)
    return found


@pytest.mark.parametrize("n", [1, 1024, 1025, 3000])
@pytest.mark.parametrize("size", [1, 7, 100, 1024, 5000])
def test_every_datum_is_observed_once_and_in_a_phase_of_its_own_position(n, size):
    found = phases(n, size)
    assert len(found) == n
    assert found == phases(n, n)
    assert found[: module.WHOLE] == [None] * min(n, module.WHOLE)
    for position in range(module.WHOLE, n):
        assert found[position] == (position - module.WHOLE) // module.WINDOW


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.n_outputs > 1])
def test_the_grids_together_have_all_positions(name):
    """Of every layer: the mean of the outer products over phases is that at all positions."""
    case = ZOO[name]
    model, inputs = case.model(), case.inputs(3)
    network = Network.discover(model, inputs)
    factors = network.factors(inputs)
    n_phases = 8  # a multiple of those of every kind of layer
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


@pytest.mark.parametrize("size", [1, 4, 30])
def test_the_sums_of_a_stream(size, monkeypatch):
    """Sums of what is observed of every datum; at all positions while the stream is short."""
    monkeypatch.setattr(module, "WHOLE", 8)
    monkeypatch.setattr(module, "WINDOW", 3)
    model, n = CASE.model(), 30
    inputs, labels = CASE.inputs(n), targets(Categorical(), n, 2)
    network = Network.discover(model, inputs)
    stream = Stream(lambda *_: network, Categorical(), Kronecker())
    outputs = [stream(x, y) for x, y in zip(inputs.split(size), labels.split(size), strict=True)]
    assert_equal(torch.cat(outputs), model(inputs))
    observed = stream.observed
    assert isinstance(observed, Observed)
    assert observed.n == n
    assert observed.mean_loss == pytest.approx(float(torch.nn.functional.cross_entropy(model(inputs), labels).detach()))
    assert observed.statistics.count == n
    factors = network.factors(inputs)
    for total, block in zip(observed.statistics.totals, network.blocks, strict=True):
        expected = torch.zeros_like(total)
        for position, phase in enumerate(phases(n, n)):
            columns = factors.inputs(block, slice(position, position + 1), phase)
            expected += torch.einsum("ngis,ngjs->gij", columns, columns)
        assert_equal(total, expected)


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
