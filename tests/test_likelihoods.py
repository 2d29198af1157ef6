"""Output space: Hessian square roots, losses, links."""

from __future__ import annotations

import math

import pytest
import torch
from laplace import KronLaplace

from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, resolve_likelihood, unit_vectors
from debiased_laplace.testing import check_likelihood, dense_loss_hessian
from tests.networks import ZOO
from tests.tolerances import EXACT, FLOAT32, assert_equal, assert_unbiased

CLASSES = (2, 3, 7)


def outputs(n: int, c: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(n, c, dtype=torch.float64, generator=torch.Generator().manual_seed(c))


def targets(likelihood: Likelihood, n: int, c: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(likelihood, Categorical):
        return torch.randint(c, (n,), generator=generator)
    return torch.rand(n, c, dtype=torch.float64, generator=generator)


# -- Hessian square roots --------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("c", [1, *CLASSES])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_square_root_of_the_loss_hessian(likelihood, c, scale):
    if isinstance(likelihood, Categorical) and c == 1:
        c = 12
    check_likelihood(likelihood, outputs(5, c, scale), targets(likelihood, 5, c), tolerance=EXACT)


def test_the_categorical_root_spares_one_vector():
    """The Hessian has rank C - 1, so that many vectors are enough."""
    assert Categorical().hessian_square_root(outputs(3, 7)).shape == (6, 3, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("confident", [0, 1, 2])
def test_square_root_of_a_confident_network_is_relatively_exact(dtype, confident):
    """1 - p rounds to zero, p (1 - p) must not."""
    logits = torch.zeros(1, 3, dtype=dtype)
    logits[0, confident] = 30.0
    root = Categorical().hessian_square_root(logits)
    found = torch.einsum("vnc,vnd->ncd", root, root)[0]
    p = math.exp(-30) / (1 + 2 * math.exp(-30))
    expected = torch.full((3, 3), -p * p, dtype=torch.float64)
    expected[confident, :] = expected[:, confident] = -p * (1 - 2 * p)
    expected.fill_diagonal_(p * (1 - p))
    expected[confident, confident] = 2 * p * (1 - 2 * p)
    assert_equal(found.double(), expected, EXACT if dtype == torch.float64 else FLOAT32)
    logit = torch.tensor([[40.0], [-40.0]], dtype=dtype)
    root = Bernoulli().hessian_square_root(logit)[0, :, 0].double()
    assert_equal(root.square() / math.exp(-40), torch.ones(2).double(), EXACT if dtype == torch.float64 else FLOAT32)


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("m", [1, 4])
def test_sampled_square_roots_have_the_right_expectation(likelihood, m):
    f = outputs(2, 3, 1.0)
    n = 4000
    generator = torch.Generator().manual_seed(5)
    uniforms = torch.rand(n * 2, m, 3, dtype=torch.float64, generator=generator)
    root = likelihood.sampled_square_root(f.repeat(n, 1), uniforms)
    assert root.shape == (m, 2 * n, 3)
    samples = torch.einsum("vnc,vnd->ncd", root, root).unflatten(0, (n, 2))
    assert_unbiased(samples, dense_loss_hessian(likelihood, f))


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampled_square_roots_are_finite_at_the_ends_of_the_interval(likelihood, dtype):
    """Single precision rounds 1 - 1e-12 to one, where the inverse normal distribution is infinite."""
    for uniform in (1e-12, 1 - 1e-12):
        uniforms = torch.full((2, 3, 4), uniform, dtype=torch.float64)
        root = likelihood.sampled_square_root(outputs(2, 4).to(dtype), uniforms)
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
    with pytest.raises(ValueError, match=r"'regression', 'bernoulli'\], or a Likelihood, got 'poisson'"):
        resolve_likelihood("poisson")
    for likelihood, link in ((Categorical(), "laplace"), (Bernoulli(), "bridge")):
        with pytest.raises(ValueError, match=f"Expected a link_approx out of .* got '{link}'"):
            likelihood.predictive(torch.zeros(1, 2), torch.ones(1, 2), link)
    with pytest.raises(ValueError, match="standard normal draws"):
        Categorical().predictive(torch.zeros(1, 2), torch.eye(2)[None], "mc")
    with pytest.raises(TypeError, match="Gaussian has no predictive probabilities"):
        Gaussian().log_loss(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(TypeError, match="mean and a variance; it has no probabilities"):
        Gaussian().predictive(torch.zeros(1, 2), torch.zeros(1, 2), "probit")


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
