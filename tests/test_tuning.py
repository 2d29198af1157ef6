"""The prior precision: a grid in one pass, and the marginal likelihood in closed form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from debiased_laplace import DebiasedLaplace, Single, UniformSampler
from debiased_laplace._checks import NonFiniteError
from debiased_laplace.curvature.structures import Diagonal, Full, LowRank
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, ProfiledGaussian, gaussian_nll
from debiased_laplace.posterior.evidence import maximise_marginal_likelihood
from debiased_laplace.posterior.gaussian import standard_normals
from debiased_laplace.posterior.noise import best_noise
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.posterior.search import Search, interpolate
from debiased_laplace.posterior.tune import Tuned, tune
from debiased_laplace.testing import dense_jacobian, dense_posterior_precision, truncate
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
            if isinstance(likelihood, Gaussian):
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
    fields = {"noise_variance": 0.3} if isinstance(likelihood, Gaussian) else {}
    result = fitted(likelihood, temperature=0.5, **fields)
    if incomplete:
        basis = truncate(result.posterior.basis)
        curvatures = torch.linspace(1, 0, basis.rank, dtype=torch.float64)
        result = replace(result, posterior=replace(result.posterior, basis=basis, curvatures=curvatures))
    batches = [data(likelihood, 5, seed=4), data(likelihood, 3, seed=5)]  # unequal: a mean over data, not batches
    curve = tune(result.network, result.posterior, likelihood, batches, GRID, link=link, n_samples=20).curve
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
        one = tune(result.network, result.posterior, Categorical(), iter(batches), GRID).curve
        other = tune(result.network, result.posterior, Categorical(), batches[::-1], GRID).curve
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
        curve = tune(result.network, result.posterior, Categorical(), batches, GRID).curve
    assert curve.at_edge
    inputs = batches[0][0]
    right = result.network.outputs(inputs).argmax(1)
    with pytest.warns(UserWarning, match="is the largest of the grid.*Change log_prior_prec_max.*levelled off"):
        tune(result.network, result.posterior, Categorical(), [(inputs, right)], GRID)


def test_no_warning_inside_the_grid_or_for_one_value():
    result = fitted(Gaussian())
    batches = [data(Gaussian(), 8, seed=4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tune(result.network, result.posterior, Gaussian(), batches, torch.tensor([1.0]))
    wide = torch.logspace(-8, 8, 33, dtype=torch.float64)
    result, batches = overconfident()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curve = tune(result.network, result.posterior, Categorical(), batches, wide, link="mc").curve
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
        return tune(result.network, result.posterior, Categorical(), batches, grid, **options).curve

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


def test_a_grid_search_at_another_output_temperature():
    """The network with divided outputs has divided Jacobians."""
    result, batches = noisy()
    for link in Categorical.links:
        curve = search(result, batches, GRID, link=link, output_temperature=2.5, n_samples=20)
        expected = [reference(result, batches, 20)(p.reshape(1), 2.5, link) for p in GRID]
        assert_equal(curve.losses, torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(ValueError, match="positive, finite output_temperature, got -1"):
        search(result, batches, GRID, output_temperature=-1.0)
    with pytest.raises(ValueError, match=r"A regression has no link.*expected 1, got 2"):
        search(fitted(Gaussian()), [data(Gaussian(), 5)], GRID, Gaussian(), output_temperature=2.0)


# -- several priors, and a temperature -------------------------------------------------------------

FINE = torch.logspace(-3, 3, 25, dtype=torch.float64)
#: What linear interpolation between the values of FINE may cost, in nats: log V has a second derivative in log delta of
#: at most 1/4, hence a relative error of the variances of at most 0.58^2 / 8 / 4.
INTERPOLATION = 0.01


def noisy(
    likelihood: Likelihood | None = None, right: float = 0.7, scale: float = 20.0, **options: Any
) -> tuple[Fit, list]:
    """A network too confident by much, right for some of the data: its best priors and temperature are finite."""
    likelihood = likelihood or Categorical()
    case = ZOO["mlp"]
    model = case.model()
    model[2].weight.data *= scale
    inputs, more = case.inputs(40), case.inputs(60, seed=7)
    kept = torch.rand(60, generator=torch.Generator().manual_seed(3)) < right
    if isinstance(likelihood, Categorical):
        own, other = model(inputs).argmax(1), model(more).argmax(1)
        other = torch.where(kept, other, 1 - other)
    else:
        own, other = (model(inputs) > 0).double(), (model(more) > 0).double()
        other = torch.where(kept[:, None], other, 1 - other)
    batches = [(more[:25], other[:25]), (more[25:], other[25:])]
    options = {"sampler": UniformSampler(None), "split": Single()} | options
    return fit(model, [(inputs, own)], likelihood, **options), batches


def search(result: Fit, batches: Any, grid: torch.Tensor, likelihood: Likelihood | None = None, **options: Any):
    """The existing search, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tune(result.network, result.posterior, likelihood or Categorical(), batches, grid, **options).curve


def joint(
    result: Fit, batches: Any, grid: torch.Tensor = FINE, likelihood: Likelihood | None = None, **options: Any
) -> Tuned:
    """Without the warnings of the edges."""
    options = {"per_part": False, "temperature": False} | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The best prior precision")
        return tune(result.network, result.posterior, likelihood or Categorical(), batches, grid, **options)


def reference(result: Fit, batches: list, n_samples: int = 100) -> Callable[..., float]:
    """Mean loss from explicit Jacobians, the dense posterior, and the links as they are defined."""
    inputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    jacobians, mean = dense_jacobian(result.network.model, inputs), result.network.outputs(inputs)
    known: dict[tuple[float, ...], torch.Tensor] = {}

    def spread(priors: torch.Tensor) -> torch.Tensor:
        key = tuple(priors.tolist())
        if key not in known:
            posterior = replace(result.posterior, prior_precision=priors.double())
            known[key] = jacobians @ dense_posterior_precision(posterior).inverse() @ jacobians.mT
        return known[key]

    def loss(priors: torch.Tensor, tau: float, link: str = "probit", n: int = n_samples) -> float:
        scaled = spread(priors) / (tau * tau)
        variance = scaled.diagonal(dim1=1, dim2=2)
        if link == "probit":
            logits = (mean / tau) / (1 + math.pi * variance / 8).sqrt()
            if targets.is_floating_point():
                return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, targets) * 2)
            return float(-torch.log_softmax(logits, 1)[torch.arange(len(targets)), targets].mean())
        normals = standard_normals((n, 2), mean, torch.Generator().manual_seed(0))
        likelihood = Bernoulli() if targets.is_floating_point() else Categorical()
        return float(likelihood.log_loss(likelihood.predictive(mean / tau, scaled, link, normals), targets).mean())

    return loss


def best_temperature(loss: Callable[[float], float], lowest: float = 1 / 20) -> tuple[float, float]:
    """By trial, then refined where the trial was best."""
    trial = torch.linspace(math.log(lowest), math.log(20), 121).double()
    losses = [loss(math.exp(t)) for t in trial]
    at = min(range(121), key=losses.__getitem__)
    ends = float(trial[max(at - 1, 0)]), float(trial[min(at + 1, 120)])
    found = minimize_scalar(lambda t: loss(math.exp(t)), bounds=ends, method="bounded", options={"xatol": 1e-10})
    return math.exp(found.x), float(found.fun)


STRUCTURES = {
    "kron": {},
    "diag": {"structure": Diagonal()},
    "full": {"structure": Full()},
    "lowrank": {"structure": LowRank(6)},
    "lowrank-by-layer": {"structure": LowRank(4, blocks="layer")},
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("per_part", [False, True])
@pytest.mark.parametrize("temperature", [False, True])
def test_a_joint_search_is_as_good_as_the_whole_product_grid(structure, per_part, temperature):
    result, batches = noisy(**STRUCTURES[structure])
    exact = reference(result, batches)
    found = joint(result, batches, per_part=per_part, temperature=temperature)
    n_priors = len(result.posterior.basis.parts) if per_part else 1
    assert found.prior_precisions.shape == (n_priors,)
    assert found.prior_precisions.dtype == torch.float64
    assert found.loss == pytest.approx(exact(found.prior_precisions, found.temperature), rel=EXACT)
    assert bool(((found.prior_precisions >= FINE[0]) & (found.prior_precisions <= FINE[-1])).all())
    combinations = torch.cartesian_prod(*[FINE[::2]] * n_priors).reshape(-1, n_priors)
    if temperature:
        some = combinations[:: 1 + len(combinations) // 40]
        least = min(best_temperature(lambda tau, p=p: exact(p, tau))[1] for p in some)
        least = min(least, *(exact(p, found.temperature) for p in combinations))
    else:
        least = min(exact(p, 1.0) for p in combinations)
        assert found.temperature == 1.0
    assert found.loss <= least + INTERPOLATION * (1 if not temperature else 0.1)
    assert found.loss <= float(found.curve.losses.min())
    assert_equal(found.curve.losses, search(result, batches, FINE).losses)
    assert_equal(found.curve.prior_precisions, FINE, 0.0)
    if temperature:  # at the priors that were found there is no better temperature but for the interpolation
        assert found.loss <= best_temperature(lambda tau: exact(found.prior_precisions, tau))[1] + 1e-4
        assert found.loss < float(found.curve.losses.min()) - 1e-4, "the example is one where a temperature helps"


def test_each_freedom_is_worth_something():
    result, batches = noisy()
    plain, parts, tau, both = (joint(result, batches, per_part=p, temperature=t) for p, t in
                               ((False, False), (True, False), (False, True), (True, True)))  # fmt: skip
    assert parts.loss < plain.loss - 1e-3
    assert tau.loss < plain.loss - 1e-3
    assert both.loss < min(parts.loss, tau.loss, both.temperature_alone[1]) - 1e-5
    assert not bool(((parts.prior_precisions == FINE[0]) | (parts.prior_precisions == FINE[-1])).any())


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm"])
def test_a_temperature_with_every_link(likelihood, link):
    if link not in likelihood.links:
        return
    result, batches = noisy(likelihood)
    if link == "bridge_norm":
        with pytest.raises(ValueError, match=r"link_approx='bridge_norm' does not depend on the scale of the outputs"):
            joint(result, batches, temperature=True, link=link)
        prediction = [likelihood.predictive(torch.ones(1, 2) / t, torch.eye(2)[None] / t**2, link) for t in (1, 5)]
        assert_equal(*prediction, 1e-6)
        least = float(search(result, batches, FINE, link=link).losses.min())
        assert joint(result, batches, link=link).loss == pytest.approx(least, rel=EXACT)
        return
    exact = reference(result, batches, 20)
    found = joint(result, batches, likelihood=likelihood, temperature=True, link=link, n_samples=20)
    assert found.loss == pytest.approx(exact(found.prior_precisions, found.temperature, link), rel=EXACT)
    assert found.curve.link == link
    assert_equal(found.curve.losses, search(result, batches, FINE, likelihood, link=link, n_samples=20).losses)
    lowest = min(1.0, found.temperature_alone[0]) if link == "mc" else 1 / 20  # draws do not become certain
    assert found.temperature >= lowest * (1 - 1e-9)
    least = min(best_temperature(lambda tau, p=p: exact(p.reshape(1), tau, link), lowest)[1] for p in FINE)
    assert found.loss <= least + (1e-6 if link != "probit" else 1e-4)
    assert found.loss <= float(found.curve.losses.min())


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()], ids=lambda x: type(x).__name__)
def test_the_temperature_alone_is_temperature_scaling(likelihood):
    result, batches = noisy(likelihood)
    inputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    outputs = result.network.model(inputs).detach()

    def scaled(logarithm: float) -> float:
        logits = outputs / math.exp(logarithm)
        if isinstance(likelihood, Bernoulli):
            odds = torch.where(targets == 1, -logits, logits)
            return float(torch.logaddexp(odds, torch.zeros(1).double()).sum(1).mean())
        return float(-logits.log_softmax(1).gather(1, targets[:, None]).mean())

    expected = minimize_scalar(scaled, bracket=(0.0, 1.0), tol=1e-12)
    for per_part in (False, True):
        tau, loss = joint(result, batches, likelihood=likelihood, temperature=True, per_part=per_part).temperature_alone
        assert tau == pytest.approx(math.exp(expected.x), abs=1e-6)
        assert loss == pytest.approx(float(expected.fun), abs=1e-12)
    fixed = joint(result, batches, likelihood=likelihood, per_part=True, output_temperature=3.0)
    assert fixed.temperature == 3.0
    assert fixed.temperature_alone == (3.0, pytest.approx(scaled(math.log(3.0)), abs=1e-12))


@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_a_prior_for_each_part_of_a_regression(ratio):
    """Also with noise of another size in every output."""
    likelihood = ProfiledGaussian(torch.tensor([ratio**-0.5, ratio**0.5], dtype=torch.float64))
    result = fitted(likelihood, noise_variance=0.3)
    batches = [data(Gaussian(), 5, seed=4), data(Gaussian(), 3, seed=5)]
    noise = 0.3 * likelihood.profile.square()
    tuned = joint(result, batches, likelihood=likelihood, per_part=True)
    inputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))

    def exact(priors: torch.Tensor) -> float:
        posterior = replace(result.posterior, prior_precision=priors)
        mean, variance = functional_moments(result.network, posterior, inputs, covariance=False)
        return float(-torch.distributions.Normal(mean, (variance + noise).sqrt()).log_prob(targets).sum(1).mean())

    assert tuned.loss == pytest.approx(exact(tuned.prior_precisions), rel=EXACT)
    assert tuned.loss <= min(exact(p) for p in torch.cartesian_prod(FINE, FINE)) + INTERPOLATION
    assert_equal(tuned.curve.losses, search(result, batches, FINE, likelihood).losses)
    if ratio == 1:
        plain = joint(fitted(Gaussian(), noise_variance=0.3), batches, likelihood=Gaussian(), per_part=True)
        assert plain.loss == pytest.approx(tuned.loss, rel=EXACT)


def test_a_fixed_temperature_is_used_by_a_search_of_priors():
    result, batches = noisy()
    found = joint(result, batches, per_part=True, output_temperature=2.0)
    exact = reference(result, batches)
    assert found.loss == pytest.approx(exact(found.prior_precisions, 2.0), rel=EXACT)
    assert_equal(found.curve.losses, search(result, batches, FINE, output_temperature=2.0).losses)
    assert found.loss <= min(exact(p, 2.0) for p in torch.cartesian_prod(FINE[::2], FINE[::2])) + INTERPOLATION


class Once:
    """Batches that say how often they were read."""

    def __init__(self, batches: list) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.batches)


@pytest.mark.parametrize("options", [{"per_part": True, "temperature": True}, {"temperature": True, "link": "bridge"}])
def test_the_same_result_from_any_loader_and_in_any_mode(options):
    result, batches = noisy()
    loader = Once(batches)
    found = joint(result, loader, **options)
    assert loader.passes == (2 if options.get("per_part") else 1)
    state = torch.get_rng_state()
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            other = joint(result, iter([(x.clone(), y.clone()) for x, y in batches]), FINE.flip(0), **options)
        assert_equal(other.prior_precisions, found.prior_precisions, 0.0)
        assert (other.temperature, other.loss) == (found.temperature, found.loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.prior_precisions.requires_grad


def test_a_grid_of_one_value_leaves_the_temperature():
    result, batches = noisy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = joint(result, batches, torch.full((4,), 0.5), per_part=True, temperature=True)
    assert found.prior_precisions.tolist() == [0.5, 0.5]
    best = best_temperature(lambda tau: reference(result, batches)(torch.tensor([0.5]), tau))
    assert found.temperature == pytest.approx(best[0], abs=1e-5)


def test_a_part_without_any_variance():
    """A last layer of zeros lets nothing through to the first: any prior does for it."""
    result, batches = noisy(scale=0.0)
    assert len(result.posterior.basis.parts) == 2
    found = joint(result, batches, per_part=True, temperature=True)
    exact = reference(result, batches)
    assert found.loss == pytest.approx(exact(found.prior_precisions, found.temperature), rel=EXACT)


def test_single_precision():
    result, batches = noisy()
    model = ZOO["mlp"].model(dtype=torch.float32)
    model.load_state_dict({name: value.float() for name, value in result.network.model.state_dict().items()})
    inputs = ZOO["mlp"].inputs(40)
    single = fit(model, [(inputs.float(), result.network.model(inputs).argmax(1))], Categorical(),
                 sampler=UniformSampler(None), split=Single())  # fmt: skip
    expected = joint(result, batches, per_part=True, temperature=True)
    found = joint(single, [(x.float(), y) for x, y in batches], per_part=True, temperature=True)
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert found.prior_precisions.dtype == torch.float64


def test_the_interpolation_is_linear_in_logarithms():
    logs = torch.tensor([0.0, 1.0, 3.0]).double()
    table = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    at = torch.tensor([0.25, 2.5]).double().requires_grad_()
    found = interpolate(table, logs, at)
    expected = (0.75 * table[0, 0] + 0.25 * table[1, 0]).exp() + (0.25 * table[1, 1] + 0.75 * table[2, 1]).exp()
    assert_equal(found, expected)
    torch.autograd.gradcheck(lambda values: interpolate(table, logs, values), at)
    for index, value in enumerate(logs):
        assert_equal(interpolate(table, logs, value.repeat(2)), table[index].exp().sum(0))


@pytest.mark.parametrize("start", [0, 3, 17, 24])
def test_climbing_ends_where_no_neighbour_is_better(start):
    search = Search(None, torch.ones(25, 1, 1, 1), FINE, None)
    search._profile = {index: (1.0, abs(index - 17.2)) for index in range(25)}
    assert search.climb(start) == 17
    search._profile = {index: (1.0, float(index)) for index in range(25)}
    assert search.climb(start) == 0


def test_warnings_of_a_joint_search():
    result, batches = overconfident()
    narrow = torch.logspace(-2, 0, 5, dtype=torch.float64)
    arguments = result.network, result.posterior, Categorical(), batches, narrow
    with pytest.warns(UserWarning, match="best prior precision of 0, 2, 0.01, is the smallest.*log_prior_prec_min"):
        tune(*arguments, per_part=True, temperature=False)
    with pytest.warns(UserWarning, match=r"The best prior precision, 0.01, is the smallest of the grid"):
        tune(*arguments, per_part=False, temperature=False)
    inputs = batches[0][0]
    right = [(inputs, result.network.outputs(inputs).argmax(1))]
    arguments = result.network, result.posterior, Categorical(), right, narrow
    with pytest.warns(UserWarning, match=r"precision, 1, is the largest of the grid.*log_prior_prec_max.*levelled off"):
        tune(*arguments, per_part=False, temperature=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a part at the upper end has no uncertainty, which is a result
        found = tune(*arguments, per_part=True, temperature=False)
    assert_equal(found.prior_precisions, torch.ones(2).double())


def test_bad_joint_searches():
    result, batches = noisy()
    with pytest.raises(ValueError, match=r"variances alone, 'probit', for one prior precision.*got 'mc'"):
        joint(result, batches, per_part=True, link="mc")
    with pytest.raises(ValueError, match="Expected a link_approx out of"):
        joint(result, batches, link="sigmoid")
    with pytest.raises(ValueError, match="A regression has no link, and so no temperature to tune"):
        joint(fitted(Gaussian()), [data(Gaussian(), 5)], likelihood=Gaussian(), temperature=True)
    with pytest.raises(ValueError, match=r"A regression has no link.*expected 1, got 2"):
        joint(fitted(Gaussian()), [data(Gaussian(), 5)], likelihood=Gaussian(), output_temperature=2.0)
    with pytest.raises(ValueError, match="empty val_loader"):
        joint(result, [], temperature=True)
    with pytest.raises(ValueError, match="positive, finite prior precisions"):
        joint(result, batches, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"class indices from 0 to 1.*got 0 to 5"):
        joint(result, [(batches[0][0][:2], torch.tensor([0, 5]))], per_part=True)
    bad = batches[0][0].clone()
    bad[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"validation losses.*NaN in the validation data"):
        joint(result, [(bad, batches[0][1])], temperature=True)


# -- observation noise -----------------------------------------------------------------------------


def test_the_noise_is_the_best_one_for_every_prior_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, targets = (torch.randn(30, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    variances = torch.rand(3, 30, 2, generator=generator, dtype=torch.float64)
    noise, losses = best_noise(mean, variances, targets)
    for own, found, loss in zip(variances, noise, losses, strict=True):
        result = minimize_scalar(
            lambda log, own=own: float(gaussian_nll(mean, math.exp(log) * own, targets, math.exp(log)).mean()),
            bounds=(-5, 5), method="bounded", options={"xatol": 1e-10},
        )  # fmt: skip
        assert math.exp(result.x) == pytest.approx(float(found), rel=1e-4)
        assert_equal(loss, torch.tensor(result.fun, dtype=torch.float64))


def uncertain_data(found: Fit) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Validation data whose errors grow with the variance at prior precision 5: that prior is worth finding."""
    batches = []
    for n, seed in ((40, 5), (15, 6)):
        inputs = 3 * ZOO["mlp"].inputs(n, seed=seed)
        posterior = replace(found.posterior, prior_precision=torch.tensor([5.0], dtype=torch.float64))
        mean, variance = functional_moments(found.network, posterior, inputs, covariance=False)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        batches.append((inputs, mean + noise * (variance + 0.01).sqrt()))
    return batches


def test_noise_and_prior_precision_against_brute_force() -> None:
    found = fitted(Gaussian())
    batches = uncertain_data(found)
    inputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    grid = torch.logspace(-2, 3, 26, dtype=torch.float64)
    tuned = tune(found.network, found.posterior, Gaussian(), batches, grid, noise=True)

    def loss(prior: float, noise: float) -> float:
        posterior = replace(
            found.posterior, prior_precision=torch.tensor([prior], dtype=torch.float64), noise_variance=noise
        )
        mean, variance = functional_moments(found.network, posterior, inputs, covariance=False)
        return float(gaussian_nll(mean, variance, targets, noise).mean())

    best = float(tuned.curve.losses.min())
    alone = float((found.network.outputs(inputs) - targets).square().mean())
    assert loss(float(tuned.prior_precisions), tuned.noise_variance) == pytest.approx(best, rel=EXACT)
    for noise in torch.logspace(-3, 1, 41, dtype=torch.float64).tolist():
        for prior in grid.tolist():  # the grid at the noise of the network alone
            assert loss(prior * alone / noise, noise) >= best - EXACT


def test_the_drop_in_tunes_its_noise() -> None:
    la = DebiasedLaplace(ZOO["mlp"].model(), "regression")
    la.fit([data(Gaussian(), 12)], budget=None)
    batches = uncertain_data(la.fitted)[:1]
    la.optimize_prior_precision(method="gridsearch", val_loader=batches, tune_sigma_noise=True)
    mean, variance = la(batches[0][0])
    variance = variance.diagonal(dim1=1, dim2=2)
    own = gaussian_nll(mean, variance, batches[0][1], la.sigma_noise.square()).mean()
    assert_equal(own, la.curve.losses.min())
    assert float(la.sigma_noise) != 1
    with pytest.raises(ValueError, match="and no loss, got 'gridsearch', 'layerwise'"):
        la.optimize_prior_precision(
            method="gridsearch", val_loader=batches, tune_sigma_noise=True, prior_structure="layerwise"
        )
    classifier = DebiasedLaplace(ZOO["mlp"].model(), "classification")
    classifier.fit([data(Categorical(), 12)])
    with pytest.raises(ValueError, match="a regression for tune_sigma_noise=True, got classif"):
        classifier.optimize_prior_precision(method="gridsearch", val_loader=batches, tune_sigma_noise=True)
    with pytest.raises(ValueError, match="Expected a regression to tune its noise, got Categorical"):
        tune(classifier.network, classifier.posterior, Categorical(), batches, GRID, noise=True)
    with pytest.raises(ValueError, match="empty val_loader"):
        tune(la.network, la.posterior, Gaussian(), [], GRID, noise=True)


class InUnits(nn.Module):
    """Outputs in other units; the parameters stay."""

    def __init__(self, unit: float | torch.Tensor) -> None:
        super().__init__()
        self.network, self.unit = ZOO["mlp"].model(), unit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.unit * self.network(x)


@pytest.mark.parametrize("method", ["gridsearch", "marglik"])
@pytest.mark.parametrize("noise", [1.0, [0.5, 2.0]])
def test_tuned_noise_does_not_depend_on_the_units_of_the_targets(method, noise) -> None:
    train, found = data(Gaussian(), 12), []
    for unit in (1.0, 1e3, 1e-3):
        la = DebiasedLaplace(InUnits(unit), "regression", sigma_noise=noise)
        la.fit([(train[0], unit * train[1])], budget=None)
        validation = [(x, unit * y) for x, y in uncertain_data(fitted(Gaussian()))]
        la.optimize_prior_precision(method=method, val_loader=validation if method == "gridsearch" else None,
                                    tune_sigma_noise=True)  # fmt: skip
        assert la.sigma_noise.shape == torch.as_tensor(noise).shape
        found.append((la.sigma_noise / unit, la.prior_precision, la(3 * train[0])[1] / unit**2))
    assert bool((found[0][0] != torch.as_tensor(noise)).all())
    for other in found[1:]:
        for own, expected in zip(other, found[0], strict=True):
            assert_equal(own, expected)


def test_the_noise_of_each_output_is_that_of_scaled_targets() -> None:
    """With ratios between outputs: the same as one noise for outputs and targets divided by them."""
    ratios = torch.tensor([0.5, 2.0], dtype=torch.float64)
    train, validation = data(Gaussian(), 12), uncertain_data(fitted(Gaussian()))
    results = []
    for model, sigma, unit in ((InUnits(1.0), 3 * ratios, torch.ones(2)), (InUnits(1 / ratios), 3.0, ratios)):
        la = DebiasedLaplace(model, "regression", sigma_noise=sigma)
        la.fit([(train[0], train[1] / unit)], budget=None)
        la.optimize_prior_precision(
            method="gridsearch", val_loader=[(x, y / unit) for x, y in validation], tune_sigma_noise=True
        )
        results.append((la.prior_precision, la.sigma_noise * unit))
    assert_equal(results[0][0], results[1][0])
    assert_equal(results[0][1], results[1][1])


# -- the most uncertainty that the data allow ------------------------------------------------------


def tempered() -> tuple[Fit, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A fit, and validation data whose labels are drawn from its predictive at prior precision 10."""
    found = fitted(Categorical())
    inputs = 3 * ZOO["mlp"].inputs(300, seed=7)
    posterior = replace(found.posterior, prior_precision=torch.tensor([10.0], dtype=torch.float64))
    mean, covariance = functional_moments(found.network, posterior, inputs)
    probabilities = Categorical().predictive(mean, covariance, "mean_field")
    labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    return found, [(inputs[:200], labels[:200]), (inputs[200:], labels[200:])]


@pytest.mark.parametrize("link", ["probit", "mean_field"])
@pytest.mark.parametrize("temperature", [False, True])
def test_the_one_standard_error_rule_against_loops(link: str, temperature: bool) -> None:
    found, batches = tempered()
    grid = torch.logspace(-3, 5, 25, dtype=torch.float64)
    tuned = tune(
        found.network, found.posterior, Categorical(), batches, grid, per_part=False, temperature=temperature,
        link=link, selection="one_standard_error",
    )  # fmt: skip
    inputs, labels = (torch.cat(column) for column in zip(*batches, strict=True))

    def losses(prior: float, tau: float) -> torch.Tensor:
        posterior = replace(found.posterior, prior_precision=torch.tensor([prior], dtype=torch.float64))
        mean, spread = functional_moments(found.network, posterior, inputs, covariance=link == "mean_field")
        probabilities = Categorical().predictive(mean / tau, spread / tau**2, link)
        return -probabilities.gather(1, labels[:, None])[:, 0].log()

    def best_tau(prior: float) -> float:
        if not temperature:
            return 1.0
        result = minimize_scalar(
            lambda log: float(losses(prior, math.exp(log)).mean()), bounds=(math.log(1 / 20), math.log(20)),
            method="bounded", options={"xatol": 1e-9},
        )  # fmt: skip
        return math.exp(result.x)

    taus = [best_tau(prior) for prior in grid.tolist()]
    table = torch.stack([losses(prior, tau) for prior, tau in zip(grid.tolist(), taus, strict=True)])
    best = int(table.mean(1).argmin())
    difference = table - table[best]
    close = difference.mean(1) <= difference.std(1) / math.sqrt(difference.shape[1])
    chosen = min(int(close.nonzero()[0, 0]), best)
    assert chosen < best  # the rule does something here
    assert float(tuned.prior_precisions) == pytest.approx(float(grid[chosen]), rel=EXACT)
    assert tuned.temperature == pytest.approx(taus[chosen], rel=1e-4)
    assert tuned.loss == pytest.approx(float(table[chosen].mean()), rel=1e-6)


def test_there_is_no_evidence_at_another_temperature() -> None:
    model = nn.Linear(3, 2)
    la = DebiasedLaplace(model, "classification", temperature=0.5)
    la.fit([(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)])
    match = "at temperature=0.5 is not the evidence.*Use temperature=1"
    with pytest.warns(UserWarning, match=match) as caught:
        la.log_marginal_likelihood()
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=match):
        la.optimize_prior_precision(method="marglik")
    la.temperature = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.log_marginal_likelihood()


def test_the_one_standard_error_rule_does_not_stop_at_a_value_that_fails() -> None:
    """Losses of 100 data at five prior precisions: the smallest within one standard error, beyond two that are not.

    The best is the last: a search that climbs from the second (which no neighbour betters) would not see it.
    """
    noise = torch.linspace(-1, 1, 100, dtype=torch.float64)
    rows = torch.stack([1.04 + noise, 1.02 + 0 * noise, 1.2 + 0 * noise, 1.1 + 0 * noise, 1.0 + 0 * noise])

    class Loss:
        def of_data(self, spread: torch.Tensor, temperature: float) -> torch.Tensor:
            return spread

        def __call__(self, spread: torch.Tensor, temperature: float) -> torch.Tensor:
            return spread.mean()

    for keep, expected in ((rows, 0), (rows[1:], 3)):  # one standard error of the first difference is 0.058
        search = Search(Loss(), keep[:, None], torch.arange(1.0, 1 + len(keep)), 1.0)  # type: ignore[arg-type]
        loss, index, temperature = search.most_uncertain(len(keep) - 1, 1.0)
        assert (index, temperature) == (expected, 1.0)
        assert loss == pytest.approx(float(keep[expected].mean()), rel=1e-12)


def test_the_rule_in_the_drop_in() -> None:
    _, batches = tempered()
    la = DebiasedLaplace(ZOO["mlp"].model(), "classification")
    la.fit([data(Categorical(), 12)], budget=None)
    keywords = {"method": "gridsearch", "val_loader": batches, "tune_temperature": True, "link_approx": "mean_field"}
    la.optimize_prior_precision(**keywords)
    best = float(la.prior_precision)
    la.optimize_prior_precision(**keywords, selection="one_standard_error")
    assert float(la.prior_precision) < best
    inputs, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    own = -la(inputs).gather(1, labels[:, None])[:, 0].log().mean()  # the link is remembered
    assert_equal(own, torch.tensor(la.tuned.loss, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"selection out of \['best', 'one_standard_error'\], got 'worst'"):
        la.optimize_prior_precision(**keywords, selection="worst")
    with pytest.raises(ValueError, match="rule is for one prior precision: expected 'scalar', got 'layerwise'"):
        la.optimize_prior_precision(
            method="gridsearch", val_loader=batches, prior_structure="layerwise", selection="one_standard_error"
        )
    with pytest.raises(ValueError, match="with per_part=True, got 'one_standard_error'"):
        tune(
            la.network, la.posterior, Categorical(), batches, GRID, per_part=True, temperature=False,
            selection="one_standard_error",
        )  # fmt: skip
