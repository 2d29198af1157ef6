"""Vectors back-propagated one by one, in batches, and side by side as copies of the data: the same factors."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from debiased_laplace.curvature.contractions import FactoredGradients
from debiased_laplace.network import backward, factors
from debiased_laplace.network.backward import Backward, Duration, Way
from debiased_laplace.network.factors import Factors
from debiased_laplace.network.network import Network
from tests.networks import ZOO
from tests.tolerances import EXACT, assert_equal

N = 3


def back(
    network: Network, inputs, vectors: torch.Tensor, way: Way | None, *, twice: bool = False
) -> list[torch.Tensor]:
    network.backward = Backward(way)
    factors = network.factors(inputs)
    if twice:
        factors.backpropagate_all(vectors, again=True)
    return factors.backpropagate_all(vectors)


@pytest.mark.parametrize("name", ZOO)
def test_copies_give_the_factors_of_the_loop(name):
    case, n = ZOO[name], 1 + len(name) % N
    network = Network.discover(case.model(), case.inputs(5, seed=9))
    inputs = case.inputs(n)
    vectors = torch.randn(5, n, case.n_outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = back(network, inputs, vectors, Way())
    for way, twice in ((Way(2, copies=True), False), (Way(3, copies=True), True), (Way(8, copies=True), False)):
        for found, of_loop in zip(back(network, inputs, vectors, way, twice=twice), expected, strict=True):
            assert_equal(found, of_loop, EXACT)


@pytest.mark.parametrize("name", ZOO)
def test_gradients_have_no_more_positions_than_inputs(name, monkeypatch):
    """The products of the inputs and vectors that are returned are those of all positions."""
    monkeypatch.setattr(factors, "MEASURED", 2)
    monkeypatch.setattr(factors, "KEPT", 2**40)
    case = ZOO[name]
    network = Network.discover(case.model(), case.inputs(5, seed=9))
    of_data = network.factors(case.inputs(N))
    vectors = torch.randn(3, N, case.n_outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = of_data.backpropagate_all(vectors, again=True)
    inputs_of, found = of_data.gradients(vectors)
    for block, g, of_all in zip(network.blocks, found, expected, strict=True):
        full, a = of_data.inputs(block), inputs_of(block)
        product = torch.einsum("ngvos,ngis->ngvoi", g, a.to_dense())
        assert_equal(product, torch.einsum("ngvos,ngis->ngvoi", of_all, full.to_dense()), EXACT)
        if isinstance(full, torch.Tensor):
            assert a.shape[-1] == g.shape[-1] == min(full.shape[-1], block.inputs)


#: Numbers of data that a model was given, one forward pass after the other.
SIZES: list[int] = []


class Counted(nn.Module):
    """A network that notes its forward passes; its outputs may depend on how many data there are."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 70)).double()
        self.noise = noise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SIZES.append(len(x))
        torch.rand(1), np.random.rand(), random.random()  # whatever a model draws and does not use
        return self.layers(x) * (1 + self.noise * (len(x) > 5))


@pytest.fixture
def clock(monkeypatch):
    """Seconds of a pass with a number of copies, or of a batched one, as a test says; no clock is read."""
    seconds: dict[Way, float] = {}
    tried: list[Way] = []
    original = backward._timed

    def timed(of_data: Factors, vectors: torch.Tensor, way: Way):
        tried.append(way)
        return Duration(0.0, seconds.get(way, 1e6)), original(of_data, vectors, way)[1]

    monkeypatch.setattr(backward, "_timed", timed)
    return seconds, tried


def network_of(model: nn.Module) -> Network:
    return Network.discover(model, torch.randn(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("vector_chunk", [1, 16])
@pytest.mark.parametrize(
    "fastest", [Way(), Way(8, copies=True), Way(32, copies=True), Way(128, copies=True), Way(16)], ids=str
)
def test_the_way_is_measured_once_for_a_size_and_then_used(clock, fastest, vector_chunk):
    seconds, tried = clock
    seconds |= {Way(8, copies=True): 7.0, Way(32, copies=True): 27.0, Way(128, copies=True): 100.0, Way(): 1.0}
    seconds |= {Way(16): 15.9, fastest: 0.5}
    network, inputs = network_of(Counted()), torch.randn(2, 4, dtype=torch.float64)
    vectors = torch.randn(300, 2, 70, dtype=torch.float64)
    expected = back(network, inputs, vectors, Way())
    network.backward, network.vector_chunk = Backward(), vector_chunk
    for _ in range(2):
        used = []
        of_data = network.factors(inputs)
        one = of_data.back
        of_data.back = lambda v, way, keep, one=one, used=used: used.append(way) or one(v, way, keep=keep)
        for found, of_loop in zip(of_data.backpropagate_all(vectors), expected, strict=True):
            assert_equal(found, of_loop, EXACT)
    assert set(used) == {fastest}
    assert len(tried) == len(set(tried))
    assert len(network.backward.durations) == 1


def test_few_vectors_or_many_data_are_not_measured(clock):
    _, tried = clock
    network = network_of(Counted())
    for n_vectors, n in ((backward.MEASURED - 1, 2), (backward.MEASURED, backward.MANY_DATA)):
        vectors = torch.ones(n_vectors, n, 70, dtype=torch.float64)
        network.factors(torch.randn(n, 4, dtype=torch.float64)).backpropagate_all(vectors)
    assert not tried


def test_copies_that_give_something_else_are_not_used(clock):
    """A model whose outputs depend on how many data there are."""
    seconds, tried = clock
    seconds[Way(8, copies=True)] = 1e-9
    network, inputs = network_of(Counted(noise=0.1)), torch.randn(1, 4, dtype=torch.float64)
    vectors = torch.randn(100, 1, 70, dtype=torch.float64)
    expected = back(network, inputs, vectors, Way())
    for found, of_loop in zip(back(network, inputs, vectors, None), expected, strict=True):
        assert_equal(found, of_loop, EXACT)
    assert Way(8, copies=True) in tried
    (durations,) = network.backward.durations.values()
    assert Way(8, copies=True) not in durations


def test_nothing_is_left_in_the_model_or_in_random_states():
    model = Counted()
    network, inputs = network_of(model), torch.randn(1, 4, dtype=torch.float64)
    vectors = torch.randn(100, 1, 70, dtype=torch.float64)
    of_data = network.factors(inputs)
    state = copy.deepcopy(model.state_dict())
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    SIZES.clear()
    of_data.backpropagate_all(vectors)
    assert max(SIZES) >= 8  # there were copies
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_covariances_with_positions_in_groups():
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    g = torch.randn(2, 3, 7, 2, 5, dtype=torch.float64, generator=generator)
    scales = torch.rand(2, 3, 2, 4, dtype=torch.float64, generator=generator)
    jacobian = torch.einsum("ngvos,ngis->ngvoi", g, a)
    expected = torch.einsum("ngvoi,rgoi,ngwoi->rnvw", jacobian, scales, jacobian)
    assert_equal(FactoredGradients(a, g).covariances(scales), expected, EXACT)
