"""Curvatures along directions, equation (2), and the bias that two batches cure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from debiased_laplace import Single, TwoBatch, UniformSampler
from debiased_laplace._checks import NonFiniteError
from debiased_laplace.curvature.parts.kronecker import KroneckerBasis
from debiased_laplace.curvature.projected import curvatures_along, projected_curvatures
from debiased_laplace.curvature.structures import Diagonal, Kronecker, KroneckerStatistics
from debiased_laplace.fitting.fit import fit
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian
from debiased_laplace.network.factors import Factors
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.memory import HeldMemory
from debiased_laplace.network.network import Network
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.testing import check_curvatures, check_projection, dense_basis, dense_ggn, truncate
from tests.networks import ZOO
from tests.tolerances import EXACT, MONTE_CARLO_Z, assert_equal, assert_unbiased, z_scores


def weighted(inputs: torch.Tensor, seed: int = 0) -> WeightedData:
    n = len(inputs)
    weights = 0.1 + torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return WeightedData(inputs, torch.zeros(n, dtype=torch.long), weights / weights.sum(), torch.arange(n))


@pytest.mark.parametrize("name", ZOO)
def test_curvatures_equal_the_dense_ones_on_every_network(name, device):
    case = ZOO[name]
    model = case.model().to(device)
    likelihood = Bernoulli() if case.n_outputs == 1 else Categorical()
    first, second = weighted(case.inputs(4).to(device)), weighted(case.inputs(5, seed=7).to(device))
    second = replace(second, targets=torch.zeros(5, 1) if case.n_outputs == 1 else second.targets)
    network = Network.discover(model, first.inputs)
    statistics = Kronecker().measure(network, CurvatureData(network, first, likelihood))
    basis = Kronecker().eigenbasis(network, statistics)
    for own in (basis, truncate(basis)):
        check_projection(network, own, second.inputs, tolerance=EXACT)
        check_curvatures(network, own, second, likelihood, tolerance=EXACT)


def test_the_trace_of_a_complete_basis_is_that_of_the_matrix():
    case = ZOO["transformer"]
    data = weighted(case.inputs(4))
    network = Network.discover(case.model(), data.inputs)
    chunks = CurvatureData(network, data, Gaussian())
    basis = Kronecker().eigenbasis(network, Kronecker().measure(network, chunks))
    trace = dense_ggn(case.model(), data.inputs, data.weights, Gaussian()).trace()
    assert_equal(projected_curvatures(network, basis, chunks).sum(), trace, EXACT)


def test_random_vectors_give_unbiased_curvatures():
    case = ZOO["mlp"]
    data = weighted(case.inputs(4))
    network = Network.discover(case.model(), data.inputs)
    exact = CurvatureData(network, data, Categorical())
    basis = Kronecker().eigenbasis(network, Kronecker().measure(network, exact))
    samples = []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        chunks = CurvatureData(network, data, Categorical(), mc_samples=2, generator=generator)
        samples.append(projected_curvatures(network, basis, chunks))
    assert_unbiased(torch.stack(samples), projected_curvatures(network, basis, exact))


def test_not_a_number_in_the_measuring_data_names_the_block():
    case = ZOO["mlp"]
    data = weighted(case.inputs(4))
    network = Network.discover(case.model(), data.inputs)
    basis = Kronecker().eigenbasis(network, Kronecker().measure(network, CurvatureData(network, data, Gaussian())))
    data.inputs[2, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"curvatures of '0'.*data that measure them"):
        projected_curvatures(network, basis, CurvatureData(network, data, Gaussian()))


# -- the bias, on a population that is known -------------------------------------------------------

SEEDS = 240
POPULATION = 10**12  # so that the data stand for nearly nothing but others
SPECTRUM = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25, 0.125], dtype=torch.float64)


def population(seed: int, n: int) -> torch.Tensor:
    """Gaussian inputs: for a linear model with squared loss the population's matrix is their covariance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, len(SPECTRUM), dtype=torch.float64, generator=generator) * SPECTRUM.sqrt()


def fitted(inputs: torch.Tensor, split, estimator: str = "projected"):
    model = nn.Linear(inputs.shape[1], 1, bias=False).double()
    batches = [(inputs, torch.zeros(len(inputs), 1, dtype=torch.float64))]
    return fit(
        model, batches, Gaussian(), sampler=UniformSampler(None), split=split, estimator=estimator, n_data=POPULATION
    ).posterior  # fmt: skip


def measured_and_true(split, estimator: str, n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    found, true = [], []
    for seed in range(SEEDS):
        posterior = fitted(population(seed, n), split, estimator)
        columns = dense_basis(posterior.basis)
        found.append(posterior.curvatures)
        true.append((SPECTRUM[:, None] * columns.square()).sum(0))
    return torch.stack(found), torch.stack(true)


@pytest.mark.parametrize("estimator", ["projected", "factored"])
def test_one_batch_overstates_the_top_curvature_and_understates_the_last(estimator):
    found, true = measured_and_true(Single(), estimator, n=8)
    z = z_scores(found - true, torch.zeros(len(SPECTRUM), dtype=torch.float64))
    assert float(z[0]) > MONTE_CARLO_Z
    assert float(z[-1]) < -MONTE_CARLO_Z
    assert float(found[:, 0].mean()) > 1.3 * float(true[:, 0].mean())


@pytest.mark.parametrize("estimator", ["projected", "factored"])
def test_a_second_batch_is_unbiased_along_the_directions_of_the_first(estimator):
    found, true = measured_and_true(TwoBatch(), estimator)
    assert_unbiased(found - true, torch.zeros(len(SPECTRUM), dtype=torch.float64))
    # The relative error too: weighed by the truth, no direction is off.
    assert_unbiased(found / true, torch.ones(len(SPECTRUM), dtype=torch.float64))


def test_a_fixed_direction_is_unbiased_on_any_batch():
    """It is the choice of the direction on the same data that biases, not the batch."""
    basis = fitted(population(999, 50), Single()).basis
    columns = dense_basis(basis)
    true = (SPECTRUM[:, None] * columns.square()).sum(0)
    model = nn.Linear(len(SPECTRUM), 1, bias=False).double()
    found = []
    for seed in range(SEEDS):
        data = WeightedData(population(seed, 8), torch.zeros(8, 1), torch.full((8,), 1 / 8).double(), torch.arange(8))
        network = Network.discover(model, data.inputs)
        found.append(projected_curvatures(network, basis, CurvatureData(network, data, Gaussian())))
    assert_unbiased(torch.stack(found), true)


def convolutional_fit(inputs: torch.Tensor, targets: torch.Tensor, estimator: str = "projected"):
    model = ZOO["cnn"].model()
    return fit(
        model, [(inputs, targets)], Categorical(), sampler=UniformSampler(12), split=TwoBatch(), generator=3,
        estimator=estimator,
    )  # fmt: skip


@pytest.mark.parametrize("estimator", ["projected", "factored"])
def test_other_measuring_data_cannot_change_the_basis(estimator):
    inputs, targets = ZOO["cnn"].inputs(20), torch.zeros(20, dtype=torch.long)
    one = convolutional_fit(inputs, targets, estimator)
    changed = inputs.clone()
    changed[one.curvature_indices] = 3 * changed[one.curvature_indices] + 1
    other = convolutional_fit(changed, targets, estimator)
    assert torch.equal(one.direction_indices, other.direction_indices)
    for a, b in zip(one.posterior.basis.parts, other.posterior.basis.parts, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.outputs, b.outputs)
    assert not torch.equal(one.posterior.curvatures, other.posterior.curvatures)


def test_other_data_for_the_directions_change_the_basis():
    inputs, targets = ZOO["cnn"].inputs(20), torch.zeros(20, dtype=torch.long)
    one = convolutional_fit(inputs, targets)
    changed = inputs.clone()
    changed[one.direction_indices] = changed[one.direction_indices].flip(-1) + 1
    other = convolutional_fit(changed, targets)
    assert not torch.equal(one.posterior.basis.parts[0].inputs, other.posterior.basis.parts[0].inputs)


def test_data_that_were_not_drawn_change_nothing():
    inputs, targets = ZOO["cnn"].inputs(20), torch.zeros(20, dtype=torch.long)
    one = convolutional_fit(inputs, targets)
    drawn = torch.cat([one.direction_indices, one.curvature_indices])
    assert len(set(drawn.tolist())) == 12
    rest = torch.ones(20, dtype=torch.bool)
    rest[drawn] = False
    changed = inputs.clone()
    changed[rest] += 5
    assert torch.equal(one.posterior.curvatures, convolutional_fit(changed, targets).posterior.curvatures)


def test_curvatures_are_linear_in_the_measuring_data():
    """Doubling all weights doubles them; the order of directions stays."""
    case = ZOO["cnn"]
    data = weighted(case.inputs(6))
    network = Network.discover(case.model(), data.inputs)
    basis = Kronecker().eigenbasis(network, Kronecker().measure(network, CurvatureData(network, data, Categorical())))
    one = projected_curvatures(network, basis, CurvatureData(network, data, Categorical()))
    doubled = replace(data, weights=2 * data.weights)
    assert_equal(projected_curvatures(network, basis, CurvatureData(network, doubled, Categorical())), 2 * one)
    parts = [
        WeightedData(data.inputs[i], data.targets[i], data.weights[i], data.indices[i])
        for i in (slice(0, 2), slice(2, 6))
    ]
    total = sum(projected_curvatures(network, basis, CurvatureData(network, part, Categorical())) for part in parts)
    assert_equal(total, one)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_several_bases_share_backward_passes(chunk_size, monkeypatch):
    """With weights for each, as one after the other; inputs are rotated once where bases share the rotation."""
    case = ZOO["cnn"]
    inputs = case.inputs(7)
    network = Network.discover(case.model(), inputs)
    weights = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    multiples = torch.linspace(0, 3, 7, dtype=torch.float64)
    targets = torch.zeros(7, dtype=torch.long)
    data = WeightedData(inputs, targets, weights, torch.arange(7))
    other = WeightedData(inputs, targets, weights * multiples, torch.arange(7))
    chunks = CurvatureData(network, data, Categorical(), chunk_size=chunk_size)
    statistics = Kronecker().measure(network, chunks)
    first = Kronecker().eigenbasis(network, statistics)
    turned = KroneckerStatistics(
        statistics.of_inputs, Kronecker().measure(network, chunks.take(slice(0, 3))).of_outputs
    )
    second = Kronecker().eigenbasis(network, turned)
    third = Diagonal().eigenbasis(network)
    expected = [
        projected_curvatures(network, first, chunks),
        projected_curvatures(network, second, CurvatureData(network, other, Categorical())),
        projected_curvatures(network, third, CurvatureData(network, other, Categorical())),
    ]
    passes, rotations = [], []
    backpropagate, prepare = Factors.backpropagate_all, KroneckerBasis.prepare_inputs
    monkeypatch.setattr(Factors, "backpropagate_all", lambda *a, **k: passes.append(1) or backpropagate(*a, **k))
    monkeypatch.setattr(KroneckerBasis, "prepare_inputs", lambda *a: rotations.append(1) or prepare(*a))
    found = curvatures_along(network, [first, second, third], chunks, [None, multiples, multiples])
    for one, wanted in zip(found, expected, strict=True):
        assert_equal(one, wanted)
    n_chunks = {1: 7, 4: 2, None: 1}[chunk_size]
    assert len(passes) == n_chunks
    assert len(rotations) == n_chunks * len(first.parts)


def test_the_inputs_of_one_layer_exist_at_a_time():
    """Patches of a convolution are nine times its input; a layer more holds its output and the gradient there alone."""

    def peak(depth: int) -> int:
        layers = [layer for _ in range(depth) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
        inputs = torch.randn(8, 4, 16, 16, dtype=torch.float64)
        network = Network.discover(model, inputs)
        data = CurvatureData(network, weighted(inputs), Gaussian(), mc_samples=1, chunk_size=8)
        basis = Kronecker().eigenbasis(network, Kronecker().measure(network, data))
        with HeldMemory() as memory:
            projected_curvatures(network, basis, data)
        return max(memory.held)

    of_activations = 8 * 8 * 4 * 16 * 16  # bytes
    assert peak(9) - peak(3) <= 6 * 2.5 * of_activations
