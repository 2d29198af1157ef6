"""The prior precision: a grid in one pass, and the marginal likelihood in closed form."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch

from debiased_laplace import Single, UniformSampler
from debiased_laplace._checks import NonFiniteError
from debiased_laplace.fit import Fit, fit
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from debiased_laplace.posterior import standard_normals
from debiased_laplace.predictive import functional_moments
from debiased_laplace.testing import dense_jacobian, dense_posterior_precision, truncate
from debiased_laplace.tuning import gaussian_nll, grid_search, maximise_marginal_likelihood
from tests.networks import ZOO
from tests.test_posterior import example as posterior_example
from tests.tolerances import EXACT, assert_equal

GRID = torch.logspace(-2, 3, 6, dtype=torch.float64)


def data(likelihood: Likelihood, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = ZOO["mlp"].inputs(n, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    if isinstance(likelihood, Categorical):
        return inputs, torch.randint(2, (n,), generator=generator)
    return inputs, torch.rand(n, 2, dtype=torch.float64, generator=generator)


def fitted(likelihood: Likelihood, **options) -> Fit:
    return fit(
        ZOO["mlp"].model(), [data(likelihood, 12)], likelihood, sampler=UniformSampler(None), split=Single(), **options
    )


# -- marginal likelihood ---------------------------------------------------------------------------


def evidence(posterior, precision: torch.Tensor) -> torch.Tensor:
    return replace(posterior, prior_precision=precision).log_marginal_likelihood(0.0)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("prior_mean", [0.0, 0.3])
def test_the_scalar_maximum(complete, prior_mean):
    posterior = posterior_example("cnn", complete, temperature=0.7, noise_variance=0.4, prior_mean=prior_mean)
    best = maximise_marginal_likelihood(posterior)
    assert best.shape == (1,)
    logarithm = best.log().requires_grad_()
    (slope,) = torch.autograd.grad(evidence(posterior, logarithm.exp()), logarithm)
    assert abs(float(slope)) < EXACT * len(posterior.mean)
    value = float(evidence(posterior, best))
    fine = torch.logspace(-6, 6, 400, dtype=torch.float64)
    assert value >= max(float(evidence(posterior, p.reshape(1))) for p in fine)
    near = max(float(evidence(posterior, best * (1 + step))) for step in (-0.01, 0.01))
    assert value > near


@pytest.mark.parametrize("complete", [True, False])
def test_the_maximum_for_each_block(complete):
    posterior = posterior_example("cnn", complete, temperature=0.7)
    best = maximise_marginal_likelihood(posterior, per_block=True)
    assert best.shape == (len(posterior.basis.parts),)
    logarithm = best.log().requires_grad_()
    (slope,) = torch.autograd.grad(evidence(posterior, logarithm.exp()), logarithm)
    assert float(slope.abs().max()) < EXACT * len(posterior.mean)
    value = float(evidence(posterior, best))
    assert value > float(evidence(posterior, maximise_marginal_likelihood(posterior)))
    for index in range(len(best)):
        for factor in torch.logspace(-4, 4, 41, dtype=torch.float64):
            changed = best.clone()
            changed[index] *= factor
            assert value >= float(evidence(posterior, changed)) - EXACT * abs(value)


def test_the_maximum_does_not_depend_on_the_present_prior():
    posterior = posterior_example("mlp")
    other = replace(posterior, prior_precision=torch.tensor([1e5]).double())
    assert_equal(maximise_marginal_likelihood(posterior), maximise_marginal_likelihood(other), 0.0)


@pytest.mark.parametrize("scale", [1e-250, 1e-12, 1e12])
def test_the_maximum_of_tiny_and_huge_curvatures(scale):
    posterior = posterior_example("mlp")
    posterior = replace(posterior, curvatures=scale * posterior.curvatures)
    best = maximise_marginal_likelihood(posterior)
    assert bool((best > 0).all() & best.isfinite().all())
    logarithm = best.log().requires_grad_()
    (slope,) = torch.autograd.grad(evidence(posterior, logarithm.exp()), logarithm)
    assert abs(float(slope)) < 1e-6 * len(posterior.mean)


def test_the_marginal_likelihood_of_a_linear_model_is_exact():
    """Bayesian linear regression: the Laplace approximation is no approximation."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, bias=False).double()
    x = torch.randn(20, 3).double()
    y = x @ torch.tensor([[1.0, -2.0, 0.5]]).double().mT + 0.5 * torch.randn(20, 1).double()
    variance, delta = 0.3, 0.8
    covariance = torch.linalg.inv(x.mT @ x / variance + delta * torch.eye(3).double())
    model.weight.data.copy_((covariance @ x.mT @ y / variance).mT)  # the posterior mode
    result = fit(model, [(x, y)], Gaussian(), sampler=UniformSampler(None), split=Single(), prior_precision=delta,
                 noise_variance=variance)  # fmt: skip
    log_likelihood = -result.mean_loss * 20 / variance - 10 * math.log(2 * math.pi * variance)
    found = result.posterior.log_marginal_likelihood(log_likelihood)
    exact = torch.distributions.MultivariateNormal(
        torch.zeros(20).double(), variance * torch.eye(20).double() + x @ x.mT / delta
    ).log_prob(y[:, 0])
    assert_equal(found, exact)
    new = torch.randn(4, 3).double()
    assert_equal(
        functional_moments(result.network, result.posterior, new)[1][:, 0, 0], (new @ covariance * new).sum(-1)
    )


def test_no_maximum():
    posterior = posterior_example("mlp")
    with pytest.raises(ValueError, match=r"no maximum.*all parameters: the parameters are without any curvature"):
        maximise_marginal_likelihood(replace(posterior, curvatures=torch.zeros_like(posterior.curvatures)))
    with pytest.raises(ValueError, match=r"equal to the prior mean.*gridsearch"):
        maximise_marginal_likelihood(replace(posterior, prior_mean=posterior.mean.clone()))
    curvatures = posterior.curvatures.clone()
    curvatures[-posterior.basis.sizes[-1] :] = 0
    with pytest.raises(ValueError, match="prior precision of '2': the parameters are without any curvature"):
        maximise_marginal_likelihood(replace(posterior, curvatures=curvatures), per_block=True)


# -- grid ------------------------------------------------------------------------------------------


def one_by_one(result: Fit, likelihood: Likelihood, batches, link: str, seed: int = 0) -> torch.Tensor:
    """Losses from explicit Jacobians and the dense posterior."""
    losses = []
    for precision in GRID:
        posterior = replace(result.posterior, prior_precision=precision.reshape(1))
        covariance = dense_posterior_precision(posterior).inverse()
        total, n = 0.0, 0
        for inputs, targets in batches:
            jacobians = dense_jacobian(result.network.model, inputs)
            spread = jacobians @ covariance @ jacobians.mT
            mean = result.network.outputs(inputs)
            if likelihood.is_regression:
                noise = float(posterior.noise_variance)
                gaussian = torch.distributions.Normal(mean, (spread.diagonal(dim1=1, dim2=2) + noise).sqrt())
                total -= float(gaussian.log_prob(targets).sum())
            else:
                if not likelihood.needs_covariance(link):
                    spread = spread.diagonal(dim1=1, dim2=2)
                normals = standard_normals((20, 2), mean, torch.Generator().manual_seed(seed))
                total += float(likelihood.log_loss(likelihood.predictive(mean, spread, link, normals), targets).sum())
            n += len(targets)
        losses.append(total / n)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
@pytest.mark.parametrize("incomplete", [False, True])
@pytest.mark.parametrize(
    ("likelihood", "link"),
    [(Categorical(), link) for link in Categorical.links]
    + [(Bernoulli(), link) for link in Bernoulli.links]
    + [(Gaussian(), "probit")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_grid_equals_one_prediction_for_each_value(likelihood, link, incomplete):
    fields = {"noise_variance": 0.3} if likelihood.is_regression else {}
    result = fitted(likelihood, temperature=0.5, **fields)
    if incomplete:
        basis = truncate(result.posterior.basis)
        curvatures = torch.linspace(1, 0, basis.rank, dtype=torch.float64)
        result = replace(result, posterior=replace(result.posterior, basis=basis, curvatures=curvatures))
    batches = [data(likelihood, 5, seed=4), data(likelihood, 3, seed=5)]  # unequal: a mean over data, not batches
    curve = grid_search(result.network, result.posterior, likelihood, batches, GRID, link=link, n_samples=20)
    expected = one_by_one(result, likelihood, batches, link)
    assert_equal(curve.losses, expected)
    assert_equal(curve.prior_precisions, GRID, 0.0)
    assert curve.link == link
    assert curve.best == float(GRID[expected.argmin()])


def test_the_grid_is_a_generator_read_once():
    result = fitted(Categorical())
    batches = [data(Categorical(), 5, seed=4), data(Categorical(), 3, seed=5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = grid_search(result.network, result.posterior, Categorical(), iter(batches), GRID)
        other = grid_search(result.network, result.posterior, Categorical(), batches[::-1], GRID)
    assert_equal(one.losses, other.losses)


def overconfident() -> tuple[Fit, list]:
    """A confident network, right half of the time: the larger its uncertainty, the better."""
    case = ZOO["mlp"]
    model = case.model()
    model[2].weight.data *= 20
    inputs = case.inputs(40)
    right = model(inputs).argmax(1)
    wrong = torch.where(torch.arange(40) % 2 == 0, right, 1 - right)
    return fit(model, [(inputs, right)], Categorical(), sampler=UniformSampler(None), split=Single()), [(inputs, wrong)]


def test_the_edges_of_the_grid_are_reported():
    result, batches = overconfident()
    with pytest.warns(UserWarning, match="is the smallest of the grid.*Change log_prior_prec_min"):
        curve = grid_search(result.network, result.posterior, Categorical(), batches, GRID)
    assert curve.at_edge
    inputs = batches[0][0]
    right = result.network.outputs(inputs).argmax(1)
    with pytest.warns(UserWarning, match="is the largest of the grid.*Change log_prior_prec_max.*levelled off"):
        grid_search(result.network, result.posterior, Categorical(), [(inputs, right)], GRID)


def test_no_warning_inside_the_grid_or_for_one_value():
    result = fitted(Gaussian())
    batches = [data(Gaussian(), 8, seed=4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grid_search(result.network, result.posterior, Gaussian(), batches, torch.tensor([1.0]))
    wide = torch.logspace(-8, 8, 33, dtype=torch.float64)
    result, batches = overconfident()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curve = grid_search(result.network, result.posterior, Categorical(), batches, wide, link="mc")
    assert not curve.at_edge


def test_the_regression_loss_is_a_density():
    mean, variance = torch.randn(4, 2).double(), torch.rand(3, 4, 2).double()
    targets = torch.randn(4, 2).double()
    expected = -torch.distributions.Normal(mean, (variance + 0.5).sqrt()).log_prob(targets).sum(-1)
    assert_equal(gaussian_nll(mean, variance, targets, 0.5), expected)


def test_bad_grids_and_data():
    result = fitted(Categorical())
    inputs, targets = data(Categorical(), 5)

    def search(batches=((inputs, targets),), grid=GRID, **options):
        return grid_search(result.network, result.posterior, Categorical(), batches, grid, **options)

    with pytest.raises(ValueError, match=r"empty val_loader. A generator can be read only once"):
        search([])
    with pytest.raises(ValueError, match=r"class indices from 0 to 1.*got 0 to 5"):
        search([(inputs, torch.tensor([0, 1, 5, 0, 0]))])
    with pytest.raises(ValueError, match="positive, finite prior precisions"):
        search(grid=torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="Expected a link_approx out of"):
        search(link="sigmoid")
    bad = inputs.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"validation losses.*NaN in the validation data"):
        search([(bad, targets)])
    with pytest.raises(ValueError, match="one target for each"):
        search([(inputs, targets[:3])])
