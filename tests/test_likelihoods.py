"""Output space: Hessian square roots, losses, links."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from laplace import KronLaplace
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import poisson
from torch import Tensor, nn

from debiased_laplace.curvature.structures import Full, Kronecker
from debiased_laplace.fitting.fit import fit
from debiased_laplace.laplace_torch import DebiasedLaplace
from debiased_laplace.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    Elementwise,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
    ProfiledGaussian,
    resolve_likelihood,
    square_root,
    unit_vectors,
)
from debiased_laplace.posterior.gaussian import standard_normals
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.posterior.tune import tune
from debiased_laplace.quadratic.quadratic import Quadratic
from debiased_laplace.sampling.samplers import UniformSampler
from debiased_laplace.sampling.splits import Single
from debiased_laplace.testing import check_likelihood, dense_ggn, dense_loss_hessian, dense_posterior_precision
from tests.networks import ZOO
from tests.tolerances import EXACT, FLOAT32, assert_equal, assert_unbiased

D = torch.distributions
CLASSES = (2, 3, 7)


def outputs(n: int, c: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(n, c, dtype=torch.float64, generator=torch.Generator().manual_seed(c))


def targets(likelihood: Likelihood, n: int, c: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(likelihood, Categorical):
        return torch.randint(c, (n,), generator=generator)
    return torch.rand(n, c, dtype=torch.float64, generator=generator)


# -- one set of laws for all -----------------------------------------------------------------------


def exponential(f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Waiting times with the rate exp(f)."""
    return f - f.exp() * y


@dataclass(frozen=True)
class Case:
    """A likelihood with targets, and what torch or scipy says about it.

    Attributes:
        likelihood: What is tried.
        c: Number of outputs.
        targets: Of six data.
        density: Logarithm of the density of a datum's targets for given outputs ``[..., C]``, up to a constant of
            the loss.
    """

    likelihood: Likelihood
    c: int
    targets: torch.Tensor
    density: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def weighted_cross_entropy(f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    shares = F.one_hot(y, 3).double() if y.ndim == 1 else y
    return (WEIGHTS * (0.9 * shares + 0.1 / 3) * f.log_softmax(-1)).sum(-1)


WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
PROFILE = torch.tensor([0.5, 2.0], dtype=torch.float64)
INDICES = torch.tensor([0, 2, 1, 1, 0, 2])
SHARES = torch.tensor([[0.2, 0.5, 0.3], [1, 0, 0], [0, 0.9, 0.1]], dtype=torch.float64).repeat(2, 1)
REALS = torch.tensor([[-1.2, 0.3], [0.4, 2.0], [0.0, -0.7], [1.5, 0.1], [-0.3, 0.8], [0.9, -1.1]], dtype=torch.float64)
COUNTS = torch.tensor([[0, 3], [1, 0], [7, 2], [2, 2], [0, 0], [4, 12]])
CASES = {
    "classes": Case(Categorical(), 3, INDICES, lambda f, y: D.Categorical(logits=f).log_prob(y)),
    "two classes": Case(Categorical(), 2, INDICES % 2, lambda f, y: D.Categorical(logits=f).log_prob(y)),
    "soft labels": Case(Categorical(), 3, SHARES, lambda f, y: (y * f.log_softmax(-1)).sum(-1)),
    "weights": Case(Categorical(WEIGHTS, 0.1), 3, INDICES, weighted_cross_entropy),
    "soft labels and weights": Case(Categorical(WEIGHTS, 0.1), 3, SHARES, weighted_cross_entropy),
    "labels": Case(Bernoulli(), 2, (REALS > 0).double(), lambda f, y: D.Bernoulli(logits=f).log_prob(y).sum(-1)),
    "one label": Case(Bernoulli(), 1, (REALS[:, 0] > 0).double(),
                      lambda f, y: D.Bernoulli(logits=f[..., 0]).log_prob(y)),
    "regression": Case(Gaussian(), 2, REALS, lambda f, y: D.Normal(f, 1.0).log_prob(y).sum(-1)),
    "regression with noises": Case(ProfiledGaussian(PROFILE), 2, REALS,
                                   lambda f, y: D.Normal(f, PROFILE).log_prob(y).sum(-1)),
    "counts": Case(Poisson(), 2, COUNTS, lambda f, y: D.Poisson(f.exp()).log_prob(y.double()).sum(-1)),
    "heteroscedastic": Case(HeteroscedasticGaussian(), 4, REALS,
                            lambda f, y: D.Normal(f[..., :2], (f[..., 2:] / 2).exp()).log_prob(y).sum(-1)),
    "waiting times": Case(Elementwise(exponential, lambda f: (-f).exp(), lambda f: (-2 * f).exp()), 2, REALS.abs(),
                          lambda f, y: D.Exponential(f.exp()).log_prob(y).sum(-1)),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", CASES)


@EVERY
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_laws(name, scale):
    case = CASES[name]
    f = outputs(6, case.c, scale)
    check_likelihood(case.likelihood, f, case.targets, tolerance=EXACT)
    score = case.likelihood.negative_log_likelihood(f, case.likelihood.prepare_targets(case.targets, case.c))
    assert_equal(score, -case.density(f, case.targets))


@pytest.mark.parametrize(
    "likelihood", [Categorical(), Bernoulli(), Gaussian(), Poisson()], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("c", [1, *CLASSES, 12])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_laws_for_other_numbers_of_outputs(likelihood, c, scale):
    if isinstance(likelihood, Categorical) and c == 1:
        c = 9
    y = targets(likelihood, 5, c)
    check_likelihood(likelihood, outputs(5, c, scale), (9 * y).round() if isinstance(likelihood, Poisson) else y)


def integral(function: Callable[[float], float], mean: float, variance: float, centre: float | None = None) -> float:
    """Over a normal variable, by adaptive quadrature, with more nodes about a place."""
    sd = math.sqrt(variance)
    places = [p for p in (mean, centre) if p is not None]

    def weighted(f: float) -> float:
        return function(f) * math.exp(-0.5 * ((f - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))

    low, high = mean - 12 * sd, mean + 12 * sd
    return float(quad(weighted, low, high, points=places, epsabs=0, epsrel=1e-12, limit=500)[0])


@pytest.mark.parametrize("variance", [1e-6, 0.3, 2.0])
@pytest.mark.parametrize("name", ["counts", "waiting times", "regression", "regression with noises"])
def test_predictions_are_integrals_over_each_output(name, variance):
    case = CASES[name]
    likelihood, y = case.likelihood, case.targets.double()
    mean, variances = outputs(6, 2, 0.8), variance * torch.tensor([1.0, 0.4]).double().expand(6, 2)
    link = likelihood.links[0]
    score = likelihood.negative_log_predictive(mean, variances, y, link)
    moments = likelihood.predictive_moments(mean, variances, link)

    def density(f: float, n: int, c: int) -> float:
        return float(BY_OUTPUT[name](torch.tensor(f, dtype=torch.float64), y[n, c], c).exp())

    for n in range(2):
        expected = 0.0
        for c in range(2):
            at = float(mean[n, c]), float(variances[n, c])
            expected -= math.log(integral(lambda f, n=n, c=c: density(f, n, c), *at, float(MODES[name](y[n, c]))))

            def link_of(f: float) -> float:
                return float(likelihood.inverse_link(torch.tensor([[f, f]], dtype=torch.float64))[0, 0])

            first, second = integral(link_of, *at), integral(lambda f: link_of(f) ** 2, *at)
            assert float(moments.mean[n, c]) == pytest.approx(first, rel=EXACT, abs=EXACT)
            assert float(moments.mean[n, c] ** 2 + moments.epistemic_variance[n, c]) == pytest.approx(second, rel=EXACT)
            noise = integral(lambda f, c=c: float(NOISES[name](torch.tensor(f, dtype=torch.float64), c)), *at)
            assert float(moments.noise_variance[n, c]) == pytest.approx(noise, rel=EXACT)
        assert float(score[n]) == pytest.approx(expected, rel=EXACT)
    grid = likelihood.negative_log_predictive(mean, torch.stack([0.5 * variances, variances]), y, link)
    assert_equal(grid[1], score)


BY_OUTPUT = {
    "counts": lambda f, y, c: D.Poisson(f.exp()).log_prob(y),
    "waiting times": lambda f, y, c: D.Exponential(f.exp()).log_prob(y),
    "regression": lambda f, y, c: D.Normal(f, 1.0).log_prob(y),
    "regression with noises": lambda f, y, c: D.Normal(f, PROFILE[c]).log_prob(y),
}
NOISES = {
    "counts": lambda f, c: f.exp(),
    "waiting times": lambda f, c: (-2 * f).exp(),
    "regression": lambda f, c: 1.0,
    "regression with noises": lambda f, c: PROFILE[c] ** 2,
}
#: Outputs that say what is seen.
MODES = {
    "counts": lambda y: y.clamp_min(0.5).log(),
    "waiting times": lambda y: -y.log() if y > 0 else 0 * y,
    "regression": lambda y: y,
    "regression with noises": lambda y: y,
}


@pytest.mark.parametrize(
    ("mean", "variance", "count"), [(0.0, 4.0, 200), (5.0, 0.01, 0), (-3.0, 1.0, 40), (8.0, 3.0, 3)]
)
def test_probabilities_of_counts_that_are_not_expected(mean, variance, count):
    """The likelihood is much narrower than the variance, or far away."""
    at = torch.tensor([[mean]], dtype=torch.float64), torch.tensor([[variance]], dtype=torch.float64)
    found = float(Poisson().negative_log_predictive(*at, torch.tensor([[count]]), "exact"))
    mode = brentq(lambda f: math.exp(f) - count + (f - mean) / variance, -30, 30)
    largest = poisson.logpmf(count, math.exp(mode)) - 0.5 * (mode - mean) ** 2 / variance

    def relative(f: float) -> float:
        return math.exp(poisson.logpmf(count, math.exp(f)) - 0.5 * (f - mean) ** 2 / variance - largest)

    width = 1 / math.sqrt(math.exp(mode) + 1 / variance)
    value = quad(relative, mode - 15 * width, mode + 15 * width, points=[mode], epsabs=0, epsrel=1e-12, limit=500)[0]
    assert found == pytest.approx(0.5 * math.log(2 * math.pi * variance) - math.log(value) - largest, rel=EXACT)


def test_scores_of_an_uncertain_noise_are_integrals_over_both_outputs():
    likelihood, y = HeteroscedasticGaussian(), torch.tensor([[0.3, -1.5]]).double()
    mean, covariance = gaussian_outputs(1, 4, 0.4)
    found = float(likelihood.negative_log_predictive(mean, covariance, y, "exact"))
    expected, step = 0.0, torch.linspace(-9, 9, 400, dtype=torch.float64)  # equal steps are spectrally exact
    standard = torch.cartesian_prod(step, step)
    density = D.Normal(0.0, 1.0).log_prob(standard).sum(-1) + 2 * math.log(18 / 399)
    for k in range(2):
        pair = [k, k + 2]
        m, s = (mean[0, pair] + standard @ torch.linalg.cholesky(covariance[0][pair][:, pair]).mT).unbind(-1)
        expected -= float(torch.logsumexp(density + D.Normal(m, (s / 2).exp()).log_prob(y[0, k]), 0))
    assert found == pytest.approx(expected, rel=EXACT)
    moments = likelihood.predictive_moments(mean, covariance, "exact")
    own = covariance.diagonal(dim1=1, dim2=2)
    assert_equal(moments.mean, mean[:, :2])
    assert_equal(moments.variance, own[:, :2] + (mean[:, 2:] + own[:, 2:] / 2).exp())


def test_the_curvature_of_an_uncertain_noise_is_the_fisher_information():
    """The mean of the Hessian over targets: it is quadratic in them, so that two nodes are exact."""
    likelihood, f = HeteroscedasticGaussian(), outputs(5, 4, 1.0)
    sd = (f[:, 2:] / 2).exp()

    def loss(own: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return likelihood.loss(own[None], y[None])[0]

    hessian = torch.func.vmap(torch.func.hessian(loss))
    fisher = 0.5 * (hessian(f, f[:, :2] + sd) + hessian(f, f[:, :2] - sd))
    root = likelihood.hessian_square_root(f, f[:, :2])
    assert_equal(torch.einsum("vnc,vnd->ncd", root, root), fisher)


MEANS = {
    "classes": lambda f: D.Categorical(logits=f).probs,
    "labels": lambda f: D.Bernoulli(logits=f).mean,
    "regression": lambda f: D.Normal(f, 1.0).mean,
    "counts": lambda f: D.Poisson(f.exp()).mean,
    "heteroscedastic": lambda f: D.Normal(f[..., :2], (f[..., 2:] / 2).exp()).mean,
    "waiting times": lambda f: D.Exponential(f.exp()).mean,
}


@pytest.mark.parametrize("name", MEANS)
def test_samples_of_outputs_become_means_of_the_target(name):
    """Of classes, counts and all the others: nothing is taken for classes because it is not known."""
    case, x = CASES[name], inputs()
    f = outputs(6, case.c).repeat(3, 1, 1)
    assert_equal(case.likelihood.inverse_link(f), MEANS[name](f))
    la = DebiasedLaplace(network(case.c), case.likelihood, hessian_structure="diag")
    la.fit([(x, case.targets)])
    for kind in ("nn", "linearized"):
        samples = la.functional_samples(x, kind, 5, generator=torch.Generator().manual_seed(3))
        found = la(x, pred_type=kind, n_samples=5, generator=torch.Generator().manual_seed(3))
        assert_equal(found[0] if name == "regression" else found, MEANS[name](samples).mean(0))


@EVERY
def test_draws_average_the_link_and_the_density(name):
    case = CASES[name]
    likelihood, y = case.likelihood, case.likelihood.prepare_targets(case.targets, case.c)
    mean, covariance = gaussian_outputs(6, case.c, 0.5)
    normals = torch.randn(30, case.c, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = mean + torch.einsum("ncd,md->mnc", square_root(covariance), normals)
    if likelihood.has_noise:  # closed forms, and the moments of samples as laplace-torch has them
        found = likelihood.negative_log_predictive_of_samples(drawn, y)
        expected = likelihood.negative_log_predictive(drawn.mean(0), drawn.var(0), y, "mc")
        return assert_equal(found, expected)
    predicted = likelihood.predictive(mean, covariance, "mc", normals)
    assert_equal(predicted, likelihood.inverse_link(drawn).mean(0))
    found = likelihood.negative_log_predictive(mean, covariance, y, "mc", normals)
    assert_equal(likelihood.negative_log_predictive_of_samples(drawn, y), found)
    if likelihood.has_answers:
        return assert_equal(found, likelihood.log_loss(predicted, y))
    assert_equal(found, -torch.logsumexp(case.density(drawn, case.targets), 0) + math.log(30))
    moments = likelihood.predictive_moments(mean, covariance, "mc", normals)
    assert_equal(moments.mean, predicted)
    assert_equal(moments.epistemic_variance, likelihood.inverse_link(drawn).var(0, correction=0))
    noise = {
        "counts": Tensor.exp,
        "waiting times": lambda f: (-2 * f).exp(),
        "heteroscedastic": lambda f: f[..., 2:].exp(),
    }
    assert_equal(moments.noise_variance, noise[name](drawn).mean(0))


@pytest.mark.parametrize("name", ["soft labels", "weights", "soft labels and weights"])
def test_cross_entropy_is_that_of_torch(name):
    case, f = CASES[name], outputs(6, 3)
    weight, smoothing = (None, 0.0) if name == "soft labels" else (WEIGHTS, 0.1)
    expected = F.cross_entropy(f, case.targets, weight, reduction="none", label_smoothing=smoothing)
    assert_equal(case.likelihood.loss(f, case.targets), expected)
    assert_equal(case.likelihood.log_loss(f.softmax(-1), case.targets), expected)
    assert_equal(case.likelihood.log_loss(torch.stack([f, f]).softmax(-1), case.targets)[1], expected)


def test_soft_labels_that_are_one_hot_are_classes():
    f, soft = outputs(6, 3), F.one_hot(INDICES, 3).double()
    for likelihood in (Categorical(), Categorical(WEIGHTS, 0.2)):
        for method in ("loss", "gradient", "hessian_square_root", "curvature", "hessian_diagonal", "target_shares"):
            found, expected = (getattr(likelihood, method)(f, y) for y in (soft, INDICES))
            assert_equal(found, expected)
        assert_equal(likelihood.correctness(f, soft), likelihood.correctness(f, INDICES))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"class_weights": [[1.0]]}, r"class_weights \[C\]"),
        ({"class_weights": [1.0, -1.0]}, "not negative"),
        ({"class_weights": [0.0, 0.0]}, "nor all zero"),
        ({"class_weights": [math.nan, 1.0]}, "finite"),
        ({"label_smoothing": 1.5}, "label_smoothing from 0 to 1, got 1.5"),
    ],
)
def test_settings_of_classes(arguments, match):
    with pytest.raises(ValueError, match=match):
        Categorical(**arguments)


def test_deviance_of_counts():
    rates = outputs(6, 2).exp()
    saturated, own = (
        D.Poisson(r).log_prob(COUNTS.double()).sum(-1) for r in (COUNTS.double().clamp_min(1e-300), rates)
    )
    assert_equal(Poisson().deviance(rates, COUNTS), 2 * (saturated - own))
    assert_equal(Poisson().deviance(torch.stack([rates, rates])[:, :, :1], COUNTS[:, 0])[1],
                 Poisson().deviance(rates[:, :1], COUNTS[:, :1]))  # fmt: skip
    assert float(Poisson().deviance(COUNTS.double().clamp_min(1e-300), COUNTS).abs().max()) < EXACT


# -- fits ------------------------------------------------------------------------------------------


def network(c: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(c)
        return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, c)).double()


def inputs(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@EVERY
def test_a_fit_has_the_ggn_of_automatic_differentiation(name):
    case, x, model = CASES[name], inputs(), network(CASES[name].c)
    result = fit(model, [(x[:4], case.targets[:4]), (x[4:], case.targets[4:])], case.likelihood, structure=Full(),
                 sampler=UniformSampler(None), split=Single(), mc_samples=None)  # fmt: skip
    y = case.likelihood.prepare_targets(case.targets, case.c)
    ggn = dense_ggn(model, x, torch.full((6,), 1 / 6, dtype=torch.float64), case.likelihood, y)
    posterior = result.posterior
    assert_equal(dense_posterior_precision(posterior), 6 * ggn + torch.eye(len(ggn)).double())
    assert result.mean_loss == pytest.approx(float(case.likelihood.loss(model(x).detach(), y).mean()), rel=EXACT)
    quadratic = Quadratic(model, [(x, case.targets)], case.likelihood, "ggn")
    u = torch.eye(len(ggn)).double()
    assert_equal(quadratic.curvature(u), ggn.diagonal())


@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
@pytest.mark.filterwarnings("ignore:Validation data do not determine:UserWarning")
@EVERY
def test_the_drop_in_fits_and_predicts(name, tmp_path):
    case, x, model = CASES[name], inputs(), network(CASES[name].c)
    if name == "regression with noises":
        return  # its profile is what sigma_noise says there: tests/test_drop_in.py
    likelihood, batches = case.likelihood, [(x, case.targets)]
    la = DebiasedLaplace(model, likelihood, hessian_structure="full", prior_precision=10.0)
    la.fit(batches)  # by importance
    la.fit(batches, budget=None, mc_samples=1)
    la.fit(batches, budget=None)
    mean, covariance = la._glm_predictive_distribution(x)
    y = likelihood.prepare_targets(case.targets, case.c)
    generator = torch.Generator
    for link in likelihood.links:
        found = la(x, link_approx=link, n_samples=7)
        if likelihood.has_noise:
            assert_equal(found[0], mean)
            assert_equal(found[1], covariance)
            continue
        spread = covariance if likelihood.needs_covariance(link) else covariance.diagonal(dim1=1, dim2=2)
        normals = standard_normals((7, case.c), mean, generator().manual_seed(0))
        assert_equal(found, likelihood.predictive(mean, spread, link, normals))
        assert_equal(found, la(x, n_samples=7)) if link == likelihood.links[0] else None
    for kind in ("nn", "linearized"):
        samples = la.functional_samples(x, kind, 7, generator=generator().manual_seed(0))
        found = la(x, pred_type=kind, n_samples=7, generator=generator().manual_seed(0))
        assert_equal(found[0] if likelihood.has_noise else found, likelihood.inverse_link(samples).mean(0))
        predicted = la.predictive_samples(x, kind, 7, generator=generator().manual_seed(0))
        assert_equal(predicted, likelihood.inverse_link(samples))
        la.optimize_prior_precision(kind, "gridsearch", val_loader=batches, grid_size=2, n_samples=7)
        losses = []
        for prior in la.curve.prior_precisions:
            la.prior_precision = float(prior)
            samples = la.functional_samples(x, kind, 7, generator=generator().manual_seed(0))
            losses.append(likelihood.negative_log_predictive_of_samples(samples, y).mean())
        assert_equal(la.curve.losses, torch.stack(losses))
    la.optimize_prior_precision()
    la.optimize_prior_precision(method="gridsearch", val_loader=batches, grid_size=5)
    assert la.link == likelihood.links[0]
    la.prior_precision = la.curve.prior_precisions[2]
    mean, covariance = la._glm_predictive_distribution(x)
    spread = covariance if likelihood.needs_covariance(la.link) else covariance.diagonal(dim1=1, dim2=2)
    expected = likelihood.negative_log_predictive(mean, spread, y, la.link).mean()
    assert float(la.curve.losses[2]) == pytest.approx(float(expected), rel=EXACT)
    if likelihood.no_temperature is None:
        la.optimize_prior_precision(method="gridsearch", val_loader=batches, grid_size=5, tune_temperature=True)
    else:
        with pytest.raises(ValueError, match="no output temperature: expected 1, got 2"):
            la.output_temperature = 2.0
    if likelihood.has_noise:
        la.optimize_prior_precision(tune_sigma_noise=True)
    else:
        with pytest.raises(ValueError, match="only available for regression"):
            la.sigma_noise = 2.0
    la.save(tmp_path / "la.safetensors")
    own = None if type(likelihood).__name__ in LIKELIHOODS else likelihood
    again = DebiasedLaplace.load(tmp_path / "la.safetensors", model, own)
    assert repr(again.output_likelihood.settings()) == repr(likelihood.settings())
    for found, expected in zip(la(x), again(x), strict=True):
        assert_equal(found, expected, 0.0)
    if name == "weights":
        with pytest.raises(ValueError, match=r"state of the likelihood with no settings, got .*class_weights"):
            DebiasedLaplace(model, "classification", hessian_structure="full").load_state_dict(la.state_dict())


@pytest.mark.parametrize("name", ["classes", "soft labels and weights", "counts", "heteroscedastic", "waiting times"])
def test_a_joint_search_scores_as_the_likelihood_does(name):
    """Also between the values of the grid, where variances are differentiated."""
    case, x, model = CASES[name], inputs(), network(CASES[name].c)
    likelihood, batches = case.likelihood, [(x, case.targets)]
    result = fit(model, batches, likelihood, structure=Kronecker())
    per_part = not likelihood.needs_covariance(likelihood.links[0])
    grid = torch.logspace(-1, 2, 7, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tune(result.network, result.posterior, likelihood, batches, grid, per_part=per_part, temperature=False)
    prior = found.prior_precisions
    posterior = replace(result.posterior, prior_precision=prior)
    mean, spread = functional_moments(result.network, posterior, x, covariance=not per_part)
    y = likelihood.prepare_targets(case.targets, case.c)
    expected = likelihood.negative_log_predictive(mean, spread, y, likelihood.links[0]).mean()
    assert found.loss == pytest.approx(float(expected), rel=EXACT)
    alone = likelihood.negative_log_likelihood(mean, y).mean()
    assert found.temperature_alone[1] == pytest.approx(float(alone), rel=EXACT)
    assert found.loss <= float(found.curve.losses.min()) + 1e-12


# -- densities that somebody writes ----------------------------------------------------------------


def test_a_density_that_is_not_concave_says_where():
    cauchy = Elementwise(lambda f, y: -torch.log1p((y - f).square()))
    f, y = torch.tensor([[0.1, 0.2], [0.0, 5.0]]).double(), torch.tensor([[0.0, 0.0], [0.0, 1.0]]).double()
    with pytest.raises(
        ValueError, match=r"concave.* 0\.1038 in output 1 of a datum with outputs 0, 5 and target 0, 1:"
    ):
        cauchy.hessian_square_root(f, y)


def test_a_density_that_joins_outputs_is_an_error():
    joined = Elementwise(lambda f, y: -((f[:, :1] - f[:, 1:]).square() + f.square()))
    with pytest.raises(ValueError, match=r"depends on that output alone.*Derive from Likelihood"):
        joined.hessian_square_root(outputs(3, 2), torch.zeros(3))


def test_a_density_of_the_wrong_shape_is_an_error():
    for density in (lambda f, y: -(f - y).square().sum(-1), lambda f, y: -(f[:, :1] - y).square()):
        with pytest.raises(ValueError, match=r"one value for each output, of shape \(3, 2\), got \(3,( 1)?\)"):
            Elementwise(density).loss(outputs(3, 2), torch.zeros(3, 1))
    f, y = outputs(3, 1), torch.ones(3)
    flat = Elementwise(lambda f, y: -(f[:, 0] - y).square())
    assert_equal(flat.loss(f, y), (f[:, 0] - 1).square())


def test_what_a_density_does_not_say():
    likelihood, f = Elementwise(exponential), outputs(3, 1)
    with pytest.raises(TypeError, match="with an inverse_link for predictions, got none"):
        likelihood.predictive(f, f.square(), "quadrature")
    with pytest.raises(TypeError, match="with a variance for predictive variances, got none"):
        likelihood.predictive_moments(f, f.square(), "quadrature")


def test_a_density_that_is_a_straight_line_has_no_curvature():
    straight = Elementwise(lambda f, y: f * y)
    assert_equal(straight.hessian_square_root(outputs(2, 2), torch.ones(2, 2)), torch.zeros(2, 2, 2).double())
    constant = Elementwise(lambda f, y: torch.zeros_like(y))
    assert_equal(constant.hessian_square_root(outputs(2, 2), torch.ones(2, 2)), torch.zeros(2, 2, 2).double())


# -- Hessian square roots --------------------------------------------------------------------------


def test_the_categorical_root_spares_one_vector():
    """The Hessian has rank C - 1, so that many vectors are enough."""
    assert Categorical().hessian_square_root(outputs(3, 7), torch.zeros(3, dtype=torch.long)).shape == (6, 3, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("confident", [0, 1, 2])
def test_square_root_of_a_confident_network_is_relatively_exact(dtype, confident):
    """1 - p rounds to zero, p (1 - p) must not."""
    logits = torch.zeros(1, 3, dtype=dtype)
    logits[0, confident] = 30.0
    root = Categorical().hessian_square_root(logits, torch.tensor([0]))
    found = torch.einsum("vnc,vnd->ncd", root, root)[0]
    p = math.exp(-30) / (1 + 2 * math.exp(-30))
    expected = torch.full((3, 3), -p * p, dtype=torch.float64)
    expected[confident, :] = expected[:, confident] = -p * (1 - 2 * p)
    expected.fill_diagonal_(p * (1 - p))
    expected[confident, confident] = 2 * p * (1 - 2 * p)
    assert_equal(found.double(), expected, EXACT if dtype == torch.float64 else FLOAT32)
    logit = torch.tensor([[40.0], [-40.0]], dtype=dtype)
    root = Bernoulli().hessian_square_root(logit, torch.zeros(2, 1))[0, :, 0].double()
    assert_equal(root.square() / math.exp(-40), torch.ones(2).double(), EXACT if dtype == torch.float64 else FLOAT32)


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("m", [1, 4])
def test_sampled_square_roots_have_the_right_expectation(likelihood, m):
    f = outputs(2, 3, 1.0)
    n = 4000
    generator = torch.Generator().manual_seed(5)
    uniforms = torch.rand(n * 2, m, 3, dtype=torch.float64, generator=generator)
    root = likelihood.sampled_square_root(f.repeat(n, 1), targets(likelihood, 2 * n, 3), uniforms)
    assert root.shape == (m, 2 * n, 3)
    samples = torch.einsum("vnc,vnd->ncd", root, root).unflatten(0, (n, 2))
    assert_unbiased(samples, dense_loss_hessian(likelihood, f))


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampled_square_roots_are_finite_at_the_ends_of_the_interval(likelihood, dtype):
    """Single precision rounds 1 - 1e-12 to one, where the inverse normal distribution is infinite."""
    for uniform in (1e-12, 1 - 1e-12):
        uniforms = torch.full((2, 3, 4), uniform, dtype=torch.float64)
        root = likelihood.sampled_square_root(outputs(2, 4).to(dtype), targets(likelihood, 2, 4), uniforms)
        assert root.dtype == dtype
        assert bool(root.isfinite().all())
        assert float(root.abs().max()) < 10


def test_unit_vectors():
    vectors = unit_vectors(outputs(2, 3))
    assert vectors.shape == (3, 2, 3)
    for c in range(3):
        assert_equal(vectors[c], torch.eye(3).double()[c].expand(2, 3), 0.0)


# -- losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", CLASSES)
def test_losses_are_negative_log_likelihoods(c):
    f = outputs(6, c)
    labels, soft = targets(Categorical(), 6, c), targets(Gaussian(), 6, c)
    assert_equal(Categorical().loss(f, labels), -torch.distributions.Categorical(logits=f).log_prob(labels))
    hard = (soft > 0.5).double()
    assert_equal(Bernoulli().loss(f, hard), -torch.distributions.Bernoulli(logits=f).log_prob(hard).sum(-1))
    constant = 0.5 * c * math.log(2 * math.pi)
    assert_equal(Gaussian().loss(f, soft) + constant, -torch.distributions.Normal(f, 1.0).log_prob(soft).sum(-1))


def test_bernoulli_targets_of_one_output_may_be_a_vector():
    f, y = outputs(4, 1), torch.tensor([0.0, 1.0, 1.0, 0.5])
    Bernoulli().check_targets(y, 1)
    assert_equal(Bernoulli().loss(f, y), Bernoulli().loss(f, y[:, None]), 0.0)


@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_predictive_log_losses(shape):
    logits = torch.randn(*shape, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = targets(Categorical(), 6, 4)
    expected = -torch.distributions.Categorical(logits=logits).log_prob(labels.expand(shape))
    assert_equal(Categorical().log_loss(logits.softmax(-1), labels), expected)
    hard = (targets(Gaussian(), 6, 4) > 0.5).double()
    expected = -torch.distributions.Bernoulli(logits=logits).log_prob(hard.expand(*shape, 4)).sum(-1)
    assert_equal(Bernoulli().log_loss(logits.sigmoid(), hard), expected)


def test_predictive_log_losses_of_impossible_events_are_finite():
    impossible = torch.tensor([[1.0, 0.0]])
    assert bool(Categorical().log_loss(impossible, torch.tensor([1])).isfinite().all())
    assert bool(Bernoulli().log_loss(impossible, torch.tensor([[0.0, 1.0]])).isfinite().all())


# -- links -----------------------------------------------------------------------------------------


def gaussian_outputs(n: int, c: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    root = scale * torch.randn(n, c, c, dtype=torch.float64, generator=generator)
    return 2 * torch.randn(n, c, dtype=torch.float64, generator=generator), root @ root.mT


class _Given(KronLaplace):
    """laplace-torch's links, for outputs that are given to it."""

    _key = ("none", "given")  # subclasses are looked up by it; this one must not take its parent's place

    def __init__(self, mean, covariance):
        super().__init__(ZOO["mlp"].model(), "classification")
        self.given = mean, covariance
        self.H = "fitted"

    def _check_H_init(self):
        pass

    def _glm_predictive_distribution(self, X, joint=False, diagonal_output=False):
        return tuple(x.clone() for x in self.given)


@pytest.mark.parametrize("link", ["probit", "bridge", "bridge_norm"])
@pytest.mark.parametrize("c", CLASSES)
def test_links_are_those_of_laplace_torch(link, c):
    mean, covariance = gaussian_outputs(5, c)
    expected = _Given(mean, covariance)(torch.zeros(5, 3), link_approx=link)
    likelihood = Categorical()
    spread = covariance if likelihood.needs_covariance(link) else covariance.diagonal(dim1=1, dim2=2)
    assert_equal(likelihood.predictive(mean, spread, link), expected)
    grid = likelihood.predictive(mean, torch.stack([spread, 2 * spread]), link)
    assert_equal(grid[0], expected)
    assert_equal(grid[1], likelihood.predictive(mean, 2 * spread, link))


def test_the_monte_carlo_link_is_the_expectation():
    mean, covariance = gaussian_outputs(3, 4)
    generator = torch.Generator().manual_seed(0)
    normals = torch.randn(3000, 4, dtype=torch.float64, generator=generator)
    single = torch.stack([Categorical().predictive(mean, covariance, "mc", normal[None]) for normal in normals])
    assert_equal(single.mean(0), Categorical().predictive(mean, covariance, "mc", normals))
    gaussian = torch.distributions.MultivariateNormal(mean, covariance)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        reference = gaussian.sample((3000,)).softmax(-1)
    assert_unbiased(single - reference, torch.zeros(3, 4).double())


@pytest.mark.parametrize("link", ["probit", "mc"])
def test_the_bernoulli_link_is_the_expectation(link):
    mean, covariance = gaussian_outputs(3, 2, 0.5)
    generator = torch.Generator().manual_seed(0)
    normals = torch.randn(3000, 2, dtype=torch.float64, generator=generator)
    if link == "mc":
        single = torch.stack([Bernoulli().predictive(mean, covariance, "mc", normal[None]) for normal in normals])
        with torch.random.fork_rng():
            torch.manual_seed(3)
            reference = torch.distributions.MultivariateNormal(mean, covariance).sample((3000,)).sigmoid()
        assert_unbiased(single - reference, torch.zeros(3, 2).double())
    else:
        variance = covariance.diagonal(dim1=1, dim2=2)
        found = Bernoulli().predictive(mean, variance, "probit")
        assert_equal(found, torch.sigmoid(mean / (1 + math.pi * variance / 8).sqrt()))


@pytest.mark.parametrize("link", ["bridge", "bridge_norm"])
def test_the_bridge_does_not_overflow_for_confident_networks(link):
    """exp(f) of logits beyond 88 is infinite in single precision."""
    mean = torch.tensor([[200.0, -200.0, 0.0]])
    found = Categorical().predictive(mean, torch.eye(3)[None], link)
    assert bool(found.isfinite().all())
    assert_equal(found.sum(-1), torch.ones(1), FLOAT32)
    assert found.argmax() == 0


@pytest.mark.parametrize("link", Categorical.links)
def test_a_singular_covariance_gives_probabilities(link):
    mean = torch.tensor([[1.0, 0.0, -1.0]]).double()
    spread = torch.ones(1, 3, 3).double() if Categorical().needs_covariance(link) else torch.ones(1, 3).double()
    if link.startswith("bridge"):  # its zero-sum correction divides by the covariance of the sum
        spread = spread + 1e-3 * torch.eye(3)
    found = Categorical().predictive(mean, spread, link, torch.randn(10, 3).double())
    assert bool(found.isfinite().all())
    assert_equal(found.sum(-1), torch.ones(1).double())


@pytest.mark.parametrize("link", Categorical.links)
def test_vanishing_uncertainty_gives_the_softmax(link):
    """As the covariance goes to zero, probit and Monte Carlo go to the plain softmax; the bridges stay finite."""
    mean = torch.tensor([[1.0, 0.0, -1.0]]).double()
    tiny = 1e-14 * (torch.eye(3).double() if Categorical().needs_covariance(link) else torch.ones(3).double())[None]
    found = Categorical().predictive(mean, tiny, link, torch.randn(10, 3).double())
    assert bool(found.isfinite().all())
    if link in ("probit", "mc", "mean_field"):
        assert float((found - mean.softmax(-1)).abs().max()) < 1e-6


def test_the_square_root_does_not_depend_on_the_choice_of_eigenvectors():
    """Those of equal eigenvalues are any of their space; rounding chooses."""
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())[0]
    values = torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 0.5]).double()
    expected = rotation * values.sqrt() @ rotation.mT
    assert_equal(square_root((rotation * values @ rotation.mT)[None])[0], expected)
    singular = torch.ones(3, 3).double()
    assert_equal(square_root(singular) @ square_root(singular).mT, singular)


def test_an_indefinite_covariance_is_an_error():
    covariance = torch.diag(torch.tensor([1.0, -0.5]))[None].double()
    with pytest.raises(ValueError, match="positive semi-definite output covariance"):
        Categorical().predictive(torch.zeros(1, 2).double(), covariance, "mc", torch.zeros(1, 2).double())


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("likelihood", "bad", "c", "error", "match"),
    [
        (Categorical(), torch.tensor([0, 3]), 3, ValueError, r"class indices from 0 to 2.*got 0 to 3"),
        (Categorical(), torch.tensor([-1, 0]), 3, ValueError, "got -1 to 0"),
        (Categorical(), torch.tensor([0.0, 1.0]), 3, TypeError, r"integer dtype.*targets\.long\(\)"),
        (Categorical(), torch.zeros(2, 1), 3, TypeError, r"probabilities are of shape \[N, 3\], got \(2, 1\)"),
        (
            Categorical(),
            torch.tensor([[0.5, 0.4]]),
            2,
            ValueError,
            r"sum to one, got \[0.5, 0.4\] for datum 0.* sum 0.9",
        ),
        (Categorical(), torch.tensor([[1.5, -0.5]]), 2, ValueError, r"not negative .* got \[1.5, -0.5\] for datum 0"),
        (Categorical(), torch.tensor([[math.nan, 1]]), 2, ValueError, r"got \[nan, 1\] for datum 0"),
        (
            Categorical([1.0, 2.0]),
            torch.tensor([0]),
            3,
            ValueError,
            "class_weights for each of the model's 3 outputs, got 2",
        ),
        (Poisson(), torch.tensor([[1.5]]), 1, ValueError, "counts as targets, the whole numbers from 0 on, got 1.5"),
        (Poisson(), torch.tensor([[-1]]), 1, ValueError, "from 0 on, got -1. For rates"),
        (Poisson(), torch.tensor([[math.inf]]), 1, ValueError, "from 0 on, got inf"),
        (Poisson(), torch.tensor([[True]]), 1, TypeError, r"counts as targets, got torch.bool. Use targets.long\(\)"),
        (Poisson(), torch.zeros(2), 2, ValueError, r"shape \[N, 2\]"),
        (HeteroscedasticGaussian(), torch.zeros(2), 3, ValueError, "two outputs for each target.*got 3 outputs"),
        (HeteroscedasticGaussian(), torch.zeros(2, 4), 4, ValueError, r"shape \[N, 2\], one for each"),
        (HeteroscedasticGaussian(), torch.tensor([True]), 2, TypeError, "real numbers .* regression, got torch.bool"),
        (HeteroscedasticGaussian(), torch.tensor([math.nan]), 2, ValueError, "finite"),
        (Elementwise(torch.mul), torch.tensor([math.nan]), 2, ValueError, "finite"),
        (Categorical(), torch.tensor([True]), 3, TypeError, "integer dtype"),
        (Categorical(), torch.zeros(2, 3, dtype=torch.long), 3, ValueError, r"shape \[N\].*\(2, 3\)"),
        (Categorical(), torch.tensor([0]), 1, ValueError, r"at least two outputs.*Bernoulli\(\)"),
        (Categorical(), torch.zeros(3, dtype=torch.long)[0], 3, ValueError, r"shape \[N\] or \[N, 1\].*got \(\)"),
        (Gaussian(), torch.zeros(2), 2, ValueError, r"shape \[N, 2\], one for each .* got \(2,\). Nothing is repeated"),
        (Gaussian(), torch.zeros(2, dtype=torch.long), 2, ValueError, r"Class indices are for \"classification\""),
        (Gaussian(), torch.zeros(2, 2), 1, ValueError, r"shape \[N, 1\] or \[N\].*\(2, 2\)"),
        (Gaussian(), torch.zeros(2, 3, 2), 6, ValueError, r"shape \[N, 6\].*\(2, 3, 2\)"),
        (Gaussian(), torch.zeros(2, 1), 3, ValueError, r"shape \[N, 3\].*\(2, 1\)"),
        (Gaussian(), torch.zeros(2, 1, dtype=torch.bool), 1, TypeError, "real numbers .* regression, got torch.bool"),
        (Gaussian(), torch.zeros(2, 1, dtype=torch.complex64), 1, TypeError, "real numbers .* got torch.complex64"),
        (Bernoulli(), torch.zeros(2, 1, dtype=torch.complex64), 1, TypeError, "from 0 to 1, got torch.complex64"),
        (Bernoulli(), torch.zeros(3), 3, ValueError, r"shape \[N, 3\].* got \(3,\)"),
        (Gaussian(), torch.tensor([[float("nan")]]), 1, ValueError, "finite"),
        (Gaussian(), torch.tensor([[float("inf")]]), 1, ValueError, "finite"),
        (Bernoulli(), torch.tensor([[2.0]]), 1, ValueError, "from 0 to 1, got 2 to 2"),
        (Bernoulli(), torch.tensor([[float("nan")]]), 1, ValueError, "from 0 to 1"),
        (Bernoulli(), torch.zeros(2, 2), 3, ValueError, r"shape \[N, 3\]"),
        (Bernoulli(), torch.zeros(2, 1, 2), 1, ValueError, r"shape \[N, 1\] or \[N\]"),
    ],
)
def test_bad_targets(likelihood, bad, c, error, match):
    with pytest.raises(error, match=match):
        likelihood.check_targets(bad, c)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'heteroscedastic', 'next_token'\], or a Likelihood, got 'gamma'"):
        resolve_likelihood("gamma")
    for likelihood, link in ((Categorical(), "laplace"), (Bernoulli(), "bridge")):
        with pytest.raises(ValueError, match=f"Expected a link_approx out of .* got '{link}'"):
            likelihood.predictive(torch.zeros(1, 2), torch.ones(1, 2), link)
    with pytest.raises(ValueError, match="standard normal draws"):
        Categorical().predictive(torch.zeros(1, 2), torch.eye(2)[None], "mc")
    with pytest.raises(TypeError, match="Gaussian has no predictive probabilities"):
        Gaussian().log_loss(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(TypeError, match="Categorical has no predictive variance: use predictive"):
        Categorical().predictive_moments(torch.zeros(1, 2), torch.zeros(1, 2), "probit")


def test_names_of_laplace_torch_are_understood():
    from laplace import Likelihood as Names

    assert isinstance(resolve_likelihood(Names.CLASSIFICATION), Categorical)
    assert isinstance(resolve_likelihood("regression"), Gaussian)
    own = Bernoulli()
    assert resolve_likelihood(own) is own


# -- mean field --------------------------------------------------------------------------------------


def correlated(n: int, c: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(n, c, generator=generator, dtype=torch.float64)
    root = torch.randn(n, c, c, generator=generator, dtype=torch.float64)
    return mean, root @ root.mT


@pytest.mark.parametrize("c", [2, 3, 6])
def test_mean_field_by_loops(c: int) -> None:
    mean, covariance = correlated(4, c)
    found = Categorical().predictive(mean, covariance, "mean_field")
    for n in range(4):
        values = []
        for k in range(c):
            total = 0.0
            for i in range(c):
                variance = float(covariance[n, k, k] + covariance[n, i, i] - 2 * covariance[n, k, i])
                total += math.exp(-float(mean[n, k] - mean[n, i]) / math.sqrt(1 + math.pi / 8 * variance))
            values.append(1 / total)
        assert_equal(found[n], torch.tensor(values, dtype=torch.float64) / sum(values))


def test_mean_field_of_two_classes_is_the_logistic_probit() -> None:
    mean, covariance = correlated(5, 2)
    variance = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    expected = torch.sigmoid((mean[:, 0] - mean[:, 1]) / torch.sqrt(1 + math.pi / 8 * variance))
    assert_equal(Categorical().predictive(mean, covariance, "mean_field")[:, 0], expected)


def test_mean_field_has_the_right_limits() -> None:
    mean, covariance = correlated(5, 4)
    likelihood = Categorical()
    assert_equal(likelihood.predictive(mean, torch.zeros_like(covariance), "mean_field"), mean.softmax(-1))
    common = likelihood.predictive(mean, covariance + 1e3, "mean_field")  # what all outputs share has no effect
    assert_equal(common, likelihood.predictive(mean, covariance, "mean_field"))
    wide = likelihood.predictive(mean, 1e12 * torch.eye(4, dtype=torch.float64).expand(5, 4, 4), "mean_field")
    assert float((wide - 0.25).abs().max()) < 1e-4
    huge = likelihood.predictive(1e4 * mean, covariance, "mean_field")
    assert bool(huge.isfinite().all())


def test_mean_field_is_closer_to_the_integral_than_probit_of_each_class() -> None:
    mean, covariance = correlated(200, 5)
    normals = torch.randn(4000, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    likelihood = Categorical()
    exact = likelihood.predictive(mean, covariance, "mc", normals)
    variances = covariance.diagonal(dim1=1, dim2=2)
    errors = {
        link: float((likelihood.predictive(mean, spread, link) - exact).abs().mean())
        for link, spread in (("mean_field", covariance), ("probit", variances))
    }
    assert errors["mean_field"] < errors["probit"], errors
