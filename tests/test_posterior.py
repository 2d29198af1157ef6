"""The Gaussian: every formula against the dense one, with complete and incomplete bases."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from debiased_laplace.curvature.structures import Kronecker
from debiased_laplace.likelihoods import Gaussian
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.gaussian import Posterior, standard_normals
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.testing import check_basis, check_posterior, dense_posterior_precision, truncate
from tests.networks import ZOO
from tests.tolerances import EXACT, FLOAT32, assert_equal, assert_unbiased


def example(name: str = "cnn", complete: bool = True, dtype: torch.dtype = torch.float64, **fields) -> Posterior:
    case = ZOO[name]
    inputs = case.inputs(6, dtype=dtype)
    network = Network.discover(case.model(dtype=dtype), inputs)
    data = WeightedData(inputs, torch.zeros(6), torch.full((6,), 1 / 6, dtype=torch.float64), torch.arange(6))
    basis = Kronecker().eigenbasis(network, Kronecker().measure(network, CurvatureData(network, data, Gaussian())))
    basis = basis if complete else truncate(basis)
    generator = torch.Generator().manual_seed(0)
    curvatures = torch.rand(basis.rank, dtype=torch.float64, generator=generator).square().to(dtype)
    arguments = {"n_data": 30, "prior_precision": torch.tensor([0.7], dtype=torch.float64)} | fields
    return Posterior(network.mean(), basis, curvatures, **arguments)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.2},
        {"noise_variance": 0.3},
        {"noise_variance": torch.tensor(0.3, dtype=torch.float64), "temperature": 3.0, "n_data": 7},
        {"prior_mean": 0.4},
    ],
    ids=["plain", "temperature", "noise", "all", "prior-mean"],
)
def test_every_formula_equals_the_dense_one(complete, fields):
    check_posterior(example(complete=complete, **fields), tolerance=EXACT)


@pytest.mark.parametrize("name", ["mlp", "tied-weights", "batch-norm", "lone-parameters", "frozen-in-convolutions"])
@pytest.mark.parametrize("complete", [True, False])
def test_every_formula_with_one_prior_for_each_block(name, complete):
    posterior = example(name, complete)
    check_basis(posterior.basis, tolerance=EXACT)
    priors = torch.linspace(0.3, 2, len(posterior.basis.parts), dtype=torch.float64)
    mean = torch.linspace(-1, 1, len(posterior.mean), dtype=torch.float64)
    check_posterior(replace(posterior, prior_precision=priors, prior_mean=mean), tolerance=EXACT)


@pytest.mark.parametrize("complete", [True, False])
def test_the_scale_of_the_data_by_hand(complete):
    """N, the noise variance and the temperature enter as N / (s^2 T), once."""
    one = example(complete=complete)
    scaled = replace(one, n_data=60, noise_variance=0.5, temperature=0.25)
    beta_curvature = dense_posterior_precision(one) - 0.7 * torch.eye(len(one.mean)).double()
    expected = beta_curvature * (60 / 30) / (0.5 * 0.25) + 0.7 * torch.eye(len(one.mean)).double()
    identity = torch.eye(len(one.mean), dtype=torch.float64)
    assert_equal(scaled.matvec(identity), expected)
    assert float(scaled.scale) == pytest.approx(480.0)


@pytest.mark.parametrize("complete", [True, False])
def test_samples_have_the_mean_and_the_covariance(complete):
    posterior = example("mlp", complete)
    samples = posterior.sample(4000, torch.Generator().manual_seed(0))
    assert samples.shape == (4000, len(posterior.mean))
    assert_unbiased(samples, posterior.mean)
    deviations = samples - posterior.mean
    covariance = dense_posterior_precision(posterior).inverse()
    assert_unbiased(torch.einsum("nd,ne->nde", deviations, deviations), covariance)


def test_small_curvatures_are_not_lost_in_the_log_determinant():
    """log(1 + x) of x = 1e-20 is x, not zero."""
    posterior = example("mlp")
    posterior = replace(posterior, curvatures=torch.full_like(posterior.curvatures, 1e-20))
    expected = torch.tensor(len(posterior.mean) * 30 * 1e-20 / 0.7, dtype=torch.float64)
    assert_equal(posterior.log_det_ratio, expected)


@pytest.mark.parametrize("complete", [True, False])
def test_single_precision_sums_in_double(complete):
    posterior, reference = (example(complete=complete, dtype=dtype) for dtype in (torch.float32, torch.float64))
    reference = replace(reference, curvatures=posterior.curvatures.double())
    assert posterior.precisions.dtype == torch.float64
    assert_equal(posterior.log_det_precision, reference.log_det_precision, EXACT)
    assert posterior.sample(2).dtype == torch.float32
    value = torch.randn(3, len(posterior.mean), generator=torch.Generator().manual_seed(0))
    expected = torch.einsum(
        "nd,de,ne->n", d := (value - posterior.mean).double(), dense_posterior_precision(posterior), d
    )
    assert_equal(posterior.square_norm(value), expected, FLOAT32)


def test_gradients_reach_prior_noise_and_value():
    """Finite differences of the evidence in the logarithms of prior precision and noise variance."""
    base = example("mlp")

    def evidence(log_prior, log_noise):
        posterior = replace(base, prior_precision=log_prior.exp().reshape(1), noise_variance=log_noise.exp())
        return posterior.log_marginal_likelihood(-3.0)

    point = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.3, 0.2)]
    assert torch.autograd.gradcheck(evidence, point)


def test_standard_normals_are_the_same_for_the_same_generator():
    like = torch.zeros(1, dtype=torch.float32)
    one, two = (standard_normals((5,), like, torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.dtype == torch.float32
    assert_equal(one, two, 0.0)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"prior_precision": torch.tensor([-1.0])}, r"positive, finite prior precisions, got \[-1.0\]"),
        ({"prior_precision": torch.tensor([0.0])}, "improper along flat directions"),
        ({"prior_precision": torch.tensor([float("nan")])}, "positive, finite prior precisions"),
        ({"prior_precision": torch.tensor([])}, "positive, finite prior precisions"),
        ({"prior_precision": torch.ones(2)}, r"one for each of the 3 parts that coverage\(\) lists, .*got 2"),
        ({"prior_precision": torch.ones(1, 3)}, r"at most one dimension, got shape \(1, 3\)"),
        ({"temperature": 0.0}, "positive, finite temperature, got 0"),
        ({"temperature": float("nan")}, "positive, finite temperature"),
        ({"noise_variance": -1.0}, "positive, finite noise variance, got -1"),
        ({"n_data": 0}, "positive number of training data n_data, got 0"),
        ({"n_data": 2.5}, "positive number of training data n_data, got 2.5"),
        ({"curvatures": torch.zeros(3)}, r"one curvature for each of the \d+ directions, got shape \(3,\)"),
    ],
)
def test_bad_fields(fields, match):
    with pytest.raises(ValueError, match=match):
        replace(example("cnn"), **fields)


def test_negative_and_undefined_curvatures():
    posterior = example("mlp")
    for bad in (-1e-3, float("nan"), float("inf")):
        curvatures = posterior.curvatures.clone()
        curvatures[3] = bad
        with pytest.raises(ValueError, match="non-negative"):
            replace(posterior, curvatures=curvatures)


def test_no_samples():
    with pytest.raises(ValueError, match="n_samples of at least 1, got 0"):
        example("mlp").sample(0)


def test_the_density_integrates_like_a_gaussian():
    """At the mean the log-density is that of the normalising constant alone."""
    posterior = example("mlp")
    d = len(posterior.mean)
    expected = 0.5 * (posterior.log_det_precision - d * math.log(2 * math.pi))
    assert_equal(posterior.log_prob(posterior.mean), expected)
