"""Prior precision and noise of a regression by the marginal likelihood."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from debiased_laplace import DebiasedLaplace, Single, UniformSampler
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.likelihoods import Gaussian
from debiased_laplace.posterior.evidence import maximise_marginal_likelihood, maximise_with_noise
from tests.networks import ZOO
from tests.tolerances import EXACT, assert_equal


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return ZOO["mlp"].inputs(12, seed=0), torch.rand(12, 2, dtype=torch.float64, generator=generator)


def fitted() -> Fit:
    return fit(ZOO["mlp"].model(), [data()], Gaussian(), sampler=UniformSampler(None), split=Single())


@pytest.mark.parametrize("structure", ["kron", "full", "lowrank", "diag"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_prior_and_noise_of_the_largest_evidence(structure: str, temperature: float) -> None:
    """Both derivatives of the marginal likelihood vanish, and no pair of a grid is better."""
    la = DebiasedLaplace(ZOO["mlp"].model(), "regression", hessian_structure=structure, temperature=temperature)
    la.fit([data()], budget=None)
    la.optimize_prior_precision(tune_sigma_noise=True)
    prior, sigma = float(la.prior_precision), float(la.sigma_noise)
    logarithms = torch.tensor([math.log(prior), math.log(sigma)], dtype=torch.float64, requires_grad=True)
    best = la.log_marginal_likelihood(logarithms[:1].exp(), logarithms[1].exp())
    (slopes,) = torch.autograd.grad(best, logarithms)
    assert float(slopes.abs().max()) < 1e-7
    for factor in torch.logspace(-2, 2, 9, dtype=torch.float64).tolist():
        for other in torch.logspace(-2, 2, 9, dtype=torch.float64).tolist():
            value = la.log_marginal_likelihood(torch.tensor(prior * factor), torch.tensor(sigma * other))
            assert float(value.detach()) <= float(best.detach()) + EXACT * abs(float(best.detach()))


def test_prior_and_noise_for_every_block_and_without_a_maximum() -> None:
    result = fitted()
    priors, noise = maximise_with_noise(result.posterior, result.mean_loss, 2, per_block=True)
    assert len(priors) == len(result.posterior.basis.parts)
    posterior = replace(result.posterior, prior_precision=priors, noise_variance=noise)
    n_effective = float((1 - posterior.column_prior / posterior.precisions).sum())
    expected = 2 * result.posterior.n_data * result.mean_loss / (2 * result.posterior.n_data - n_effective)
    assert noise == pytest.approx(expected, rel=EXACT)
    assert_equal(maximise_marginal_likelihood(posterior, per_block=True), priors)
    with pytest.raises(ValueError, match=r"without any error on its training data, got a mean loss of 0"):
        maximise_with_noise(result.posterior, 0.0, 2)
    la = DebiasedLaplace(ZOO["mlp"].model(), "regression")
    la.fit([data()])
    with pytest.raises(ValueError, match="one init_prior_prec with tune_sigma_noise=True"):
        la.optimize_prior_precision(tune_sigma_noise=True, init_prior_prec=torch.ones(2))
    with pytest.raises(ValueError, match="got 'marglik', 'layerwise'"):
        la.optimize_prior_precision(tune_sigma_noise=True, prior_structure="layerwise")


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 12), st.floats(1e-30, 1e30), st.floats(1e-12, 1e12), st.integers(0, 99))
@example(1, 12, 1e-30, 1e12, 0)  # more parameters than data, and hardly an error
def test_the_equation_of_the_noise(n_data: int, rank: int, loss: float, scale: float, seed: int) -> None:
    result = fitted()
    generator = torch.Generator().manual_seed(seed)
    curvatures = torch.zeros(result.posterior.basis.rank, dtype=torch.float64)
    curvatures[:rank] = scale * torch.rand(rank, generator=generator, dtype=torch.float64)
    posterior = replace(result.posterior, curvatures=curvatures, n_data=n_data)
    prior, noise = maximise_with_noise(posterior, loss, 2)
    tuned = replace(posterior, prior_precision=prior, noise_variance=noise)
    n_effective = float((1 - tuned.column_prior / tuned.precisions).sum())
    assert n_effective / n_data == pytest.approx(2 - 2 * loss / noise, abs=EXACT)
