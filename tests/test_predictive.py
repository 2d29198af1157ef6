"""Predictions against explicit Jacobians, for every network of the zoo."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from debiased_laplace.curvature.structures import Diagonal, Full, Kronecker, LowRank
from debiased_laplace.fitting.fit import fit
from debiased_laplace.likelihoods import Gaussian
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.predictive import (
    functional_moments,
    joint_covariance,
    linearized_samples,
    part_variances,
    weight_samples,
)
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.sampling.samplers import UniformSampler
from debiased_laplace.sampling.splits import Single
from debiased_laplace.testing import check_predictive, dense_jacobian, dense_posterior_precision, truncate
from tests.networks import ZOO
from tests.tolerances import EXACT, FLOAT32, assert_equal, assert_unbiased


def example(name: str, device="cpu", complete: bool = True, dtype=torch.float64) -> tuple[Network, Posterior]:
    case = ZOO[name]
    inputs = case.inputs(5, dtype=dtype).to(device)
    network = Network.discover(case.model(dtype=dtype).to(device), inputs)
    data = WeightedData(inputs, torch.zeros(5), torch.full((5,), 1 / 5, dtype=torch.float64), torch.arange(5))
    basis = Kronecker().eigenbasis(network, Kronecker().measure(network, CurvatureData(network, data, Gaussian())))
    basis = basis if complete else truncate(basis)
    curvatures = torch.linspace(0.9, 0.0, basis.rank, dtype=network.dtype, device=device).square()
    priors = torch.linspace(0.5, 2, len(basis.parts), dtype=torch.float64, device=device)
    return network, Posterior(network.mean(), basis, curvatures, 20, priors)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("complete", [True, False])
def test_moments_equal_explicit_jacobians_on_every_network(name, complete, device):
    network, posterior = example(name, device, complete)
    check_predictive(network, posterior, ZOO[name].inputs(3, seed=5).to(device), tolerance=EXACT)


@pytest.mark.parametrize("name", ["mlp", "cnn", "lone-parameters"])
def test_one_prior_for_all_blocks(name):
    network, posterior = example(name)
    posterior = replace(posterior, prior_precision=posterior.prior_precision[:1])
    check_predictive(network, posterior, ZOO[name].inputs(3, seed=5), tolerance=EXACT)


def test_a_grid_shares_its_projections_and_equals_one_by_one():
    network, posterior = example("cnn")
    inputs = ZOO["cnn"].inputs(4, seed=5)
    grid = [replace(posterior, prior_precision=torch.tensor([p]).double()) for p in (0.01, 1.0, 100.0)]
    for covariance in (True, False):
        mean, spread = functional_moments(network, grid, inputs, covariance=covariance)
        assert spread.shape == ((3, 4, 2, 2) if covariance else (3, 4, 2))
        for own, found in zip(grid, spread, strict=True):
            alone = functional_moments(network, own, inputs, covariance=covariance)
            assert_equal(found, alone[1])
            assert_equal(mean, alone[0], 0.0)


STRUCTURES = {
    "kron": Kronecker(),
    "diag": Diagonal(),
    "full": Full(),
    "lowrank": LowRank(4),
    "lowrank-by-layer": LowRank(3, blocks="layer"),
}


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("indices", [None, [0, 3, 5, 14, 20]], ids=["all", "subnetwork"])
@pytest.mark.parametrize("structure", [*STRUCTURES, "kron-incomplete"])
def test_variances_are_sums_over_the_parts(structure, indices, chunk_size):
    """Also of parts with different priors, each at a value of its own."""
    name = structure.removesuffix("-incomplete")
    if indices is not None and name == "kron":
        indices = None
    case = ZOO["mlp"]
    data = [(case.inputs(8), torch.rand(8, 2, generator=torch.Generator().manual_seed(3)).double())]
    fitted = fit(case.model(), data, Gaussian(), structure=STRUCTURES[name], sampler=UniformSampler(None),
                 split=Single(), indices=None if indices is None else torch.tensor(indices))  # fmt: skip
    network, posterior = fitted.network, fitted.posterior
    if structure != name:
        basis = truncate(posterior.basis)
        posterior = replace(posterior, basis=basis, curvatures=torch.linspace(1, 0, basis.rank).double())
    inputs, priors = case.inputs(5, seed=5), torch.tensor([0.01, 1.0, 30.0]).double()
    mean, variances = part_variances(network, posterior, inputs, priors, chunk_size)
    n_parts = len(posterior.basis.parts)
    assert n_parts == (1 if structure in ("full", "lowrank") else 2)
    assert variances.shape == (3, n_parts, 5, 2)
    for prior, own in zip(priors, variances, strict=True):
        expected = functional_moments(network, replace(posterior, prior_precision=prior[None]), inputs)
        assert_equal(mean, expected[0])  # chunks of other sizes may be rounded otherwise
        assert_equal(own.sum(0), expected[1].diagonal(dim1=1, dim2=2))
    positions, parts = torch.tensor([2, 0])[:n_parts], torch.arange(n_parts)
    mixed = replace(posterior, prior_precision=priors[positions])
    expected = functional_moments(network, mixed, inputs, covariance=False)[1]
    assert_equal(variances[positions, parts].sum(0), expected)
    jacobians = dense_jacobian(network.model, inputs)
    if indices is None:
        covariance = dense_posterior_precision(mixed).inverse()
        assert_equal(expected, (jacobians @ covariance * jacobians).sum(-1))


def test_part_variances_of_bad_priors():
    network, posterior = example("mlp")
    with pytest.raises(ValueError, match="positive, finite prior precisions"):
        part_variances(network, posterior, ZOO["mlp"].inputs(2), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="chunk_size of at least 1"):
        part_variances(network, posterior, ZOO["mlp"].inputs(2), torch.ones(1), chunk_size=0)


def test_a_stronger_prior_means_less_variance_and_a_weaker_one_more():
    network, posterior = example("mlp")
    inputs = ZOO["mlp"].inputs(4, seed=5)
    grid = [replace(posterior, prior_precision=torch.tensor([p]).double()) for p in (1e-3, 1.0, 1e3)]
    _, variances = functional_moments(network, grid, inputs, covariance=False)
    assert bool((variances.diff(dim=0) < 0).all())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_predictions_in_any_grad_mode(context):
    network, posterior = example("lone-parameters")
    inputs = ZOO["lone-parameters"].inputs(3, seed=5)
    expected = functional_moments(network, posterior, inputs)
    deviations = posterior.deviations(2, torch.Generator().manual_seed(0))
    with context():
        inputs = inputs.clone()
        mode = torch.is_grad_enabled()
        found = functional_moments(network, posterior, inputs)
        samples = linearized_samples(network, posterior.mean, deviations, inputs)
        assert torch.is_grad_enabled() == mode
    assert_equal(found[0], expected[0], 0.0)
    assert_equal(found[1], expected[1], 0.0)
    assert_equal(samples, linearized_samples(network, posterior.mean, deviations, inputs))


def test_the_joint_covariance_holds_the_marginal_ones():
    network, posterior = example("cnn")
    inputs = ZOO["cnn"].inputs(4, seed=5)
    mean, joint = joint_covariance(network, posterior, inputs)
    marginal_mean, marginal = functional_moments(network, posterior, inputs)
    assert_equal(mean, marginal_mean.flatten(), 0.0)
    blocks = joint.unflatten(0, (4, 2)).unflatten(2, (4, 2))
    assert_equal(torch.stack([blocks[n, :, n] for n in range(4)]), marginal)


@pytest.mark.parametrize("name", ZOO)
def test_linearised_samples_are_the_linearised_network(name):
    network, posterior = example(name)
    inputs = ZOO[name].inputs(3, seed=5)
    deviations = posterior.deviations(2, torch.Generator().manual_seed(4))
    found = linearized_samples(network, posterior.mean, deviations, inputs)
    jacobians = dense_jacobian(network.model, inputs)
    expected = network.outputs(inputs) + torch.einsum("ncd,sd->snc", jacobians, deviations)
    assert_equal(found, expected)


def test_linearised_samples_have_the_joint_covariance():
    network, posterior = example("mlp")
    inputs = ZOO["mlp"].inputs(2, seed=5)
    deviations = posterior.deviations(1500, torch.Generator().manual_seed(0))
    samples = linearized_samples(network, posterior.mean, deviations, inputs).flatten(1)
    mean, covariance = joint_covariance(network, posterior, inputs)
    assert_unbiased(samples, mean)
    centred = samples - mean
    assert_unbiased(torch.einsum("si,sj->sij", centred, centred), covariance)


@pytest.mark.parametrize("name", ["mlp", "batch-norm", "tied-weights", "frozen-layer", "single-output", "transformer"])
def test_weight_samples_are_the_network_at_other_weights(name):
    network, posterior = example(name)
    inputs = ZOO[name].inputs(3, seed=5)
    deviations = posterior.deviations(2, torch.Generator().manual_seed(4))
    found = weight_samples(network, posterior.mean, deviations, inputs)
    for output, sample in zip(found, posterior.sample(2, torch.Generator().manual_seed(4)), strict=True):
        other = copy.deepcopy(network.model)
        own = dict(other.named_parameters())
        for key, value in network.from_vector(sample).items():
            own[key].data.copy_(value)
        assert_equal(output, other(inputs).reshape(3, -1))
    assert_equal(network.mean(), posterior.mean, 0.0)


def test_attention_is_as_fast_as_before_after_linearised_samples():
    """Fused attention has no forward-mode derivative; it is switched off for the moment alone."""
    network, posterior = example("transformer")
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError, match=r"unflatten|shape|size"):
        linearized_samples(network, posterior.mean, posterior.deviations(1), torch.randn(3, 7).double())
    assert torch.backends.mha.get_fastpath_enabled()


# -- precisions, training mode ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("complete", [True, False])
def test_lower_precisions(dtype, complete):
    network, posterior = example("cnn", dtype=dtype, complete=complete)
    inputs = ZOO["cnn"].inputs(4, seed=5, dtype=dtype)
    mean, covariance = functional_moments(network, posterior, inputs)
    assert mean.dtype == covariance.dtype == torch.float32
    variance = covariance.diagonal(dim1=1, dim2=2)
    assert bool((variance > 0).all())
    # The same weights and the same data, in double precision.
    exact = copy.deepcopy(network.model).double()
    jacobians = dense_jacobian(exact, inputs.double())
    precision = dense_posterior_precision(posterior)
    expected = torch.einsum("ncd,de,nke->nck", jacobians, precision.inverse(), jacobians)
    # bfloat16 keeps eight bits of every activation: no prediction can be better than that.
    assert_equal(covariance.double(), expected, FLOAT32 if dtype == torch.float32 else 2**-4)


def test_training_mode_predicts_as_evaluation_mode():
    case = ZOO["transformer"]
    network, posterior = example("transformer")
    inputs = case.inputs(3, seed=5)
    expected = functional_moments(network, posterior, inputs)
    network.model.train()
    found = functional_moments(network, posterior, inputs)
    assert network.model.training
    assert_equal(found[0], expected[0], 0.0)
    assert_equal(found[1], expected[1], 0.0)
    assert_equal(network.outputs(inputs), expected[0])


def test_batches_of_one_and_of_many_chunks():
    network, posterior = example("transformer")
    inputs = ZOO["transformer"].inputs(7, seed=5)
    mean, covariance = functional_moments(network, posterior, inputs)
    for chunk_size in (1, 3):
        found = functional_moments(network, posterior, inputs, chunk_size=chunk_size)
        assert_equal(found[0], mean)
        assert_equal(found[1], covariance)
    assert_equal(functional_moments(network, posterior, inputs[:1])[1], covariance[:1])


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_size_without_data_is_an_error(chunk_size):
    network, posterior = example("mlp")
    with pytest.raises(ValueError, match="chunk_size"):
        functional_moments(network, posterior, ZOO["mlp"].inputs(3), chunk_size=chunk_size)


def test_another_number_of_features_is_an_error_of_the_model():
    network, posterior = example("mlp")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        functional_moments(network, posterior, torch.randn(3, 7).double())
