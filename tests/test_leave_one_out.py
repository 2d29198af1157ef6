"""Leaving a datum out of a posterior without a second fit, against second fits and dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from debiased_laplace import Bernoulli, Categorical, DebiasedLaplace, Gaussian
from debiased_laplace.likelihoods import ProfiledGaussian
from debiased_laplace.posterior.leave_one_out import leave_one_out
from debiased_laplace.posterior.predictive import functional_moments
from tests.tolerances import assert_equal

N, FEATURES, PRIOR = 7, 3, 0.7


def linear(weights: Tensor) -> nn.Module:
    model = nn.Linear(FEATURES, len(weights), bias=False).double()
    model.weight.data = weights.clone()
    return model


def ridge(x: Tensor, y: Tensor, variance: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Mode ``[C, I]`` and covariances ``[I, I]`` of every output of a Bayesian linear regression."""
    precisions = [x.mT @ x / own + PRIOR * torch.eye(FEATURES).double() for own in variance]
    weights = [
        torch.linalg.solve(p, x.mT @ column / own) for p, column, own in zip(precisions, y.mT, variance, strict=True)
    ]
    return torch.stack(weights), [p.inverse() for p in precisions]


@pytest.mark.parametrize("noise", [[1.0, 1.0], [0.3, 0.3], [0.25, 4.0]], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_linear_regression_is_that_of_a_second_fit(noise, temperature):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, FEATURES, generator=generator).double(), torch.randn(N, 2, generator=generator).double()
    sigma = torch.tensor(noise, dtype=torch.float64)
    variance = sigma.square() * temperature  # of the data as the posterior sees them
    weights, _ = ridge(x, y, variance)
    la = DebiasedLaplace(
        linear(weights), "regression", hessian_structure="full", prior_precision=PRIOR, temperature=temperature,
        sigma_noise=sigma if noise[0] != noise[1] else noise[0],
    )  # fmt: skip
    la.fit([(x, y)], budget=None)
    mean, covariances = functional_moments(la.network, la.posterior, x)
    level = float(sigma.log().mean().exp())
    found = leave_one_out(
        ProfiledGaussian(sigma / level), mean, covariances, y, weight=1 / (level**2 * temperature)
    )  # fmt: skip
    for n in range(N):
        others = torch.arange(N) != n
        own, spread = ridge(x[others], y[others], variance)
        assert_equal(found.outputs[n], own @ x[n])
        assert_equal(found.covariances[n].diagonal(), torch.stack([x[n] @ c @ x[n] for c in spread]))
    leverages = covariances.diagonal(dim1=1, dim2=2) / variance
    assert_equal(found.leverages, leverages.amax(-1))
    assert bool((found.leverages < 1).all())


@pytest.mark.parametrize(("likelihood", "n_outputs"), [(Categorical(), 4), (Bernoulli(), 2)], ids=["classes", "binary"])
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_classifier_is_one_newton_step_without_the_datum(likelihood, n_outputs, weight):
    """Away from the mode too: gradients of the others are taken to cancel the datum's, whatever they are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, FEATURES, generator=generator).double()
    outputs = 2 * torch.randn(N, n_outputs, generator=generator).double()
    if isinstance(likelihood, Categorical):
        targets = torch.randint(n_outputs, (N,), generator=generator)
        p = outputs.softmax(-1)
        hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        gradients = p - nn.functional.one_hot(targets, n_outputs)
    else:
        targets = torch.rand(N, n_outputs, generator=generator).double()
        p = outputs.sigmoid()
        hessians, gradients = torch.diag_embed(p * (1 - p)), p - targets
    eye = torch.eye(n_outputs).double()
    jacobians = torch.stack([torch.kron(eye, own[None]) for own in x])  # [N, C, C * I]
    pieces = weight * jacobians.mT @ hessians @ jacobians
    precision = pieces.sum(0) + PRIOR * torch.eye(n_outputs * FEATURES).double()
    covariances = torch.stack([two[None] for two in jacobians @ precision.inverse() @ jacobians.mT]).flatten(0, 1)
    found = leave_one_out(likelihood, outputs, covariances, targets, weight=weight)
    for n in range(N):
        inverse = (precision - pieces[n]).inverse()
        step = inverse @ (weight * jacobians[n].mT @ gradients[n])
        assert_equal(found.outputs[n], outputs[n] + jacobians[n] @ step)
        assert_equal(found.covariances[n], jacobians[n] @ inverse @ jacobians[n].mT)


def test_several_posteriors_at_once():
    generator = torch.Generator().manual_seed(2)
    mean, targets = torch.randn(5, 3, generator=generator).double(), torch.tensor([0, 1, 2, 0, 1])
    root = torch.randn(2, 5, 3, 3, generator=generator).double()
    both = root @ root.mT
    found = leave_one_out(Categorical(), mean, both, targets)
    for index, own in enumerate(both):
        one = leave_one_out(Categorical(), mean, own, targets)
        assert_equal(found.leverages[index], one.leverages)
        assert torch.equal(found.outputs[index].isnan(), one.outputs.isnan())
        assert_equal(found.outputs[index].nan_to_num(), one.outputs.nan_to_num())


def test_what_a_posterior_cannot_do_without():
    """Variances above that of one observation leave nothing of the posterior when the datum is taken away."""
    variances = torch.tensor([0.5, 1.0, 3.0]).double()[:, None, None]
    found = leave_one_out(Gaussian(), torch.ones(3, 1).double(), variances, torch.zeros(3, 1).double())
    assert_equal(found.leverages, variances.flatten())
    assert_equal(found.outputs[0], torch.tensor([2.0]).double())  # residual / (1 - leverage)
    assert_equal(found.covariances[0], torch.ones(1, 1).double())
    assert bool(found.outputs[1:].isnan().all())
    assert bool(found.covariances[1:].isnan().all())


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.floats(-40, 40), st.floats(1e-30, 1e30), st.floats(1e-12, 1e12), st.integers(0, 1),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
@example(0.0, 4.0, 1.0, 0, torch.float64)  # a leverage of one for two classes: V (p (1 - p)) = 1
@example(40.0, 1e30, 1e12, 1, torch.float32)
def test_one_logit_is_the_scalar_formula_or_nothing(output, variance, weight, target, dtype):
    mean, covariance = torch.tensor([[output]]).to(dtype), torch.tensor([[[variance]]]).to(dtype)
    found = leave_one_out(Bernoulli(), mean, covariance, torch.tensor([[float(target)]]), weight=weight)
    f, v = float(mean), float(covariance)
    p, q = 1 / (1 + math.exp(-f)), 1 / (1 + math.exp(f))
    leverage = weight * v * p * q
    assert float(found.leverages) == pytest.approx(leverage, rel=1e-9)
    if float(found.leverages) >= 1:
        assert bool(found.outputs.isnan().all())
    elif leverage < 0.99:  # closer to one, rounding decides the digits
        without = v / (1 - leverage)
        assert float(found.covariances) == pytest.approx(without, rel=1e-9)
        expected = f + without * weight * (-q if target else p)
        rounding = 1e-15 * without * weight  # of p - y
        assert float(found.outputs) == pytest.approx(expected, rel=1e-9, abs=rounding)


def test_bad_weights():
    with pytest.raises(ValueError, match="positive, finite weight, got 0"):
        leave_one_out(Gaussian(), torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1), weight=0.0)
