"""One forward pass over a stream: which data it observes, and that how the stream is cut does not matter."""

from __future__ import annotations

import pytest
import torch

from debiased_laplace import stream as module
from debiased_laplace.gradients import Network
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.stream import Observed, Stream, windows
from debiased_laplace.structures import Diagonal, Kronecker
from tests.datasets import targets
from tests.networks import ZOO
from tests.tolerances import MONTE_CARLO_Z, assert_equal

CASE = ZOO["cnn"]


def chosen(n: int, size: int) -> dict[int, int]:
    """Positions of the data that are observed, and what each stands for, in batches of a size."""
    found: dict[int, int] = {}
    for start in range(0, n, size):
        for part, weight in windows(start, min(size, n - start)):
            assert 0 <= part.start < part.stop <= min(size, n - start)
            for position in range(start + part.start, start + part.stop):
                assert position not in found
                found[position] = weight
    return found


@pytest.mark.parametrize("n", [1, 2048, 2049, 6000])
@pytest.mark.parametrize("size", [1, 7, 100, 2048, 5000])
def test_windows_do_not_depend_on_the_batches(n, size):
    found = chosen(n, size)
    assert found == chosen(n, n)
    assert [found[p] for p in range(min(n, module.WHOLE))] == [1] * min(n, module.WHOLE)
    assert set(found.values()) <= {1, module.EVERY}


def test_windows_stand_for_the_whole_stream():
    n = module.WHOLE + 40 * module.WINDOW * module.EVERY
    found = chosen(n, 128)
    assert sum(found.values()) == n
    later = torch.tensor([position for position, weight in found.items() if weight > 1])
    assert len(later) == 40 * module.WINDOW
    # A period of the order of the windows' runs is seen at all phases.
    length = module.WINDOW * module.EVERY
    counts = torch.bincount(((later - module.WHOLE) % length) * 8 // length, minlength=8)
    assert float(counts.min()) > 0.5 * float(counts.float().mean())


@pytest.mark.parametrize("size", [1, 4, 30])
def test_the_sums_of_a_stream(size, monkeypatch):
    """Weighted sums over the observed data; means over all in expectation, exactly while the stream is short."""
    monkeypatch.setattr(module, "WHOLE", 8)
    monkeypatch.setattr(module, "WINDOW", 2)
    monkeypatch.setattr(module, "EVERY", 3)
    model, n = CASE.model(), 30
    inputs, labels = CASE.inputs(n), targets(Categorical(), n, 2)
    network = Network.discover(model, inputs)
    stream = Stream(lambda _: network, Categorical(), Kronecker())
    outputs = [stream(x, y) for x, y in zip(inputs.split(size), labels.split(size), strict=True)]
    assert_equal(torch.cat(outputs), model(inputs))
    observed = stream.observed
    assert isinstance(observed, Observed)
    assert observed.n == n
    assert observed.mean_loss == pytest.approx(float(torch.nn.functional.cross_entropy(model(inputs), labels).detach()))
    weights = torch.zeros(n, dtype=torch.float64)
    for position, weight in chosen(n, n).items():
        weights[position] = weight
    assert weights[:8].tolist() == [1] * 8
    assert 0 < int((weights[8:] == 3).sum()) < 22
    factors = network.factors(inputs)
    assert observed.statistics.count == float(weights.sum())
    for total, block in zip(observed.statistics.totals, network.blocks, strict=True):
        columns = factors.inputs(block)
        assert_equal(total, torch.einsum("n,ngis,ngjs->gij", weights, columns, columns))


def test_nothing_to_observe():
    model = CASE.model()
    stream = Stream(lambda x: Network.discover(model, x), Categorical(), Diagonal())
    stream(CASE.inputs(5), targets(Categorical(), 5, 2))
    assert stream.observed is not None
    assert stream.observed.statistics is None
    assert stream.observed.n == 5


def test_a_periodic_stream_is_observed_without_bias():
    """The mean over observed data of a quantity with any period near the windows' run, against the mean over all."""
    n = module.WHOLE + 400 * module.WINDOW * module.EVERY
    found = chosen(n, 1000)
    positions = torch.tensor(list(found))
    weights = torch.tensor(list(found.values())).double()
    length = module.WINDOW * module.EVERY
    for period in (length // 8, length // 2, length - 1, length, length + 1, 2 * length, 1000):
        value = torch.sin(2 * torch.pi * positions / period)
        error = (weights * value).sum() / weights.sum()
        assert abs(float(error)) < MONTE_CARLO_Z / (2 * 400) ** 0.5  # as for windows at random
