"""What users of laplace-torch rely on, for every class and structure: behaviours, and numbers where definitions meet.

All data in both roles, factored curvatures and biases in blocks of their own make our definitions laplace-torch's.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import laplace
import pytest
import torch
import torchmetrics
from laplace.utils import enums
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import debiased_laplace
from debiased_laplace import (
    Bernoulli,
    Categorical,
    DebiasedDiagLaplace,
    DebiasedFullLaplace,
    DebiasedKronLaplace,
    DebiasedLaplace,
    DebiasedLastLayerLaplace,
    DebiasedLowRankLaplace,
    LowRank,
    Single,
    TwoBatch,
)
from debiased_laplace._checks import NotFittedError
from debiased_laplace.laplace_torch import KroneckerPrecision, predictions
from debiased_laplace.testing import dense_jacobian, dense_posterior_precision
from tests.tolerances import assert_equal, assert_unbiased


class Case:
    """One of our classes, the one of laplace-torch that it has to equal, and the arguments that make it so.

    Directions enough for the whole curvature make low rank the same as full, which has to do for laplace-torch's
    ``LowRankLaplace``: it cannot be constructed without a package that is not on PyPI.
    """

    def __init__(
        self, own: type, other: type, arguments: Any = None, fit: Any = None, structure: str = "", **kind: Any
    ):
        self.own, self.other = partial(own, **kind), other
        self.kind, self.structure = own, structure
        self.arguments, self.fit = arguments, fit

    @property
    def last(self) -> bool:
        return self.kind is DebiasedLastLayerLaplace


KRON = {"separate_bias": True}, {"estimator": "factored"}
ALL_DIRECTIONS = {}, {"structure": LowRank(rank=1000)}
CASES = {
    "kron": Case(DebiasedKronLaplace, laplace.KronLaplace, *KRON, "kron"),
    "lowrank": Case(DebiasedLowRankLaplace, laplace.FullLaplace, *ALL_DIRECTIONS, "lowrank"),
    "diag": Case(DebiasedDiagLaplace, laplace.DiagLaplace, {}, {}, "diag"),
    "full": Case(DebiasedFullLaplace, laplace.FullLaplace, {}, {}, "full"),
    "last-kron": Case(DebiasedLastLayerLaplace, laplace.KronLLLaplace, *KRON, "kron"),
    "last-lowrank": Case(
        DebiasedLastLayerLaplace, laplace.FullLLLaplace, *ALL_DIRECTIONS, "lowrank", hessian_structure="lowrank"
    ),
    "last-diag": Case(DebiasedLastLayerLaplace, laplace.DiagLLLaplace, {}, {}, "diag", hessian_structure="diag"),
    "last-full": Case(DebiasedLastLayerLaplace, laplace.FullLLLaplace, {}, {}, "full", hessian_structure="full"),
}
LIKELIHOODS = ("classification", "regression")
N, C = 12, 3
SIGMAS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def model_of(dtype: torch.dtype = torch.float64, outputs: int = C, seed: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).to(dtype)


def loader_of(likelihood: str, batch_size: int = N, seed: int = 2, n: int = N, dtype=torch.float64) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64).to(dtype)
    if likelihood == "regression":
        y = torch.randn(n, C, generator=generator, dtype=torch.float64).to(dtype)
    else:
        y = torch.randint(C, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def fitted(case: str, likelihood: str = "classification", model: nn.Module | None = None, **options: Any) -> Any:
    """One of ours with its own defaults."""
    la = CASES[case].own(model or model_of(), likelihood, **options)
    la.fit(loader_of(likelihood, batch_size=5))
    return la


def pair(case: str, likelihood: str, **options: Any) -> tuple[Any, Any]:
    """Ours and theirs on the same data, with the same definitions."""
    one = CASES[case]
    ours = one.own(model_of(), likelihood, **one.arguments, **options)
    ours.fit(loader_of(likelihood), split=Single(), budget=None, **one.fit)
    model = model_of()
    with double_by_default():
        theirs = one.other(model, likelihood, **options)
        theirs.fit(loader_of(likelihood, batch_size=5))
    return ours, theirs


@contextmanager
def double_by_default() -> Iterator[None]:
    """laplace-torch computes its dense curvature, and reads numbers, in the default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def jacobians_of(la: Any, x: Tensor) -> Tensor:
    """In the parameters that the posterior is about, which are the last."""
    return dense_jacobian(la.model, x)[:, :, -la.n_params :]


def flat(prediction: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A prediction as one vector."""
    return prediction.flatten() if isinstance(prediction, Tensor) else torch.cat([p.flatten() for p in prediction])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the same numbers ------------------------------------------------------------------------------

# Prior precisions are powers of two: laplace-torch rounds them to single precision.
OPTIONS = {
    "classification": {"prior_precision": 0.25, "temperature": 0.5, "prior_mean": 0.125},
    "regression": {"prior_precision": 2.0, "sigma_noise": 0.625, "temperature": 2.0},
}


@pytest.mark.parametrize("case", CASES)
def test_class_probabilities(case):
    ours, theirs = pair(case, "classification", **OPTIONS["classification"])
    for link in ("probit", "bridge", "bridge_norm"):
        assert_equal(ours(X, link_approx=link), theirs(X, link_approx=link))
        assert_equal(ours.predictive(X, "glm", link, 3), theirs.predictive(X, "glm", link, 3))


@pytest.mark.parametrize("case", CASES)
def test_regression_moments(case):
    ours, theirs = pair(case, "regression", **OPTIONS["regression"])
    for keywords in (
        {}, {"diagonal_output": True}, {"joint": True}, {"joint": True, "diagonal_output": True}, {"fitting": True},
        {"link_approx": "mc"},
    ):  # fmt: skip
        for found, expected in zip(ours(X, **keywords), theirs(X, **keywords), strict=True):
            assert_equal(found, expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", CASES)
def test_the_gaussian(case, likelihood):
    ours, theirs = pair(case, likelihood, **OPTIONS[likelihood])
    for name in ("log_likelihood", "log_det_ratio", "log_det_prior_precision", "log_det_posterior_precision", "scatter",
                 "prior_precision", "prior_precision_diag", "prior_mean", "sigma_noise", "mean"):  # fmt: skip
        assert_equal(getattr(ours, name), getattr(theirs, name))
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    for name in ("n_data", "n_outputs", "n_params", "n_layers", "temperature", "is_subset_params", "likelihood"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert_equal(ours.loss.reshape(()), torch.as_tensor(theirs.loss).reshape(()))
    assert_equal(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    value = torch.randn(ours.n_params, generator=generator(), dtype=torch.float64)
    assert_equal(ours.square_norm(value), theirs.square_norm(value))
    assert_equal(ours.log_prob(value), theirs.log_prob(value))
    assert_equal(ours.log_prob(value, False), theirs.log_prob(value, normalized=False))
    assert_equal(ours.log_prob(torch.stack([value, ours.mean]))[0], theirs.log_prob(value))


@pytest.mark.parametrize("case", CASES)
def test_given_jacobians(case):
    ours, theirs = pair(case, "regression", **OPTIONS["regression"])
    jacobians = jacobians_of(ours, X)
    assert_equal(ours.backend.jacobians(X)[0][:, :, -ours.n_params :], jacobians)
    assert_equal(ours.functional_variance(jacobians), theirs.functional_variance(jacobians))
    assert_equal(ours.functional_covariance(jacobians), theirs.functional_covariance(jacobians))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", CASES)
def test_samples_of_outputs_from_the_same_generator(case, likelihood):
    """Not only in distribution: the linearised ones are the same numbers."""
    ours, theirs = pair(case, likelihood, **OPTIONS[likelihood])
    for method in ("functional_samples", "predictive_samples"):
        for diagonal in (False, True):
            found, expected = (getattr(la, method)(X, "glm", 7, diagonal, generator()) for la in (ours, theirs))
            assert_equal(found, expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", CASES)
def test_new_settings_after_the_fit(case, likelihood):
    ours, theirs = pair(case, likelihood)
    changes: list[tuple[str, Any]] = [
        ("prior_precision", 4), ("temperature", 0.25), ("prior_mean", 0.5), ("prior_precision", torch.tensor(0.5)),
        ("prior_mean", torch.ones(ours.n_params)),
    ]  # fmt: skip
    if likelihood == "regression":
        changes += [("sigma_noise", 0.75), ("sigma_noise", torch.tensor([1.5]))]
    for name, value in changes:
        for la in (ours, theirs):
            setattr(la, name, value)
        theirs.prior_precision = theirs.prior_precision  # its dense covariance does not follow the temperature
        assert_equal(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
        found, expected = (flat(la(X)) for la in (ours, theirs))
        assert_equal(found, expected)
    for value in ({"prior_precision": torch.tensor([8.0])}, {}):
        assert_equal(ours.log_marginal_likelihood(**value), theirs.log_marginal_likelihood(**value))
        assert_equal(ours.prior_precision, theirs.prior_precision)


@pytest.mark.parametrize("case", CASES)
def test_a_prior_precision_for_each_parameter_tensor(case):
    if CASES[case].last:  # laplace-torch takes the vector, and fails later
        la = CASES[case].own(
            model_of(), "classification", prior_precision=torch.tensor([0.5, 2.0]), last_layer_name="2"
        )
        la.fit(loader_of("classification"))
        assert_equal(la.prior_precision_diag, torch.tensor([0.5] * 12 + [2.0] * 3).double())
        assert_equal(dense_posterior_precision(la.posterior).logdet(), la.log_det_posterior_precision)
        return
    priors = torch.tensor([0.125, 0.5, 2.0, 8.0]).double()
    ours, theirs = pair(case, "classification", prior_precision=priors)
    assert_equal(ours(X), theirs(X))
    assert_equal(ours.prior_precision_diag, theirs.prior_precision_diag)
    log_priors = [priors.log().requires_grad_() for _ in range(2)]
    evidences = [la.log_marginal_likelihood(p.exp()) for la, p in zip((ours, theirs), log_priors, strict=True)]
    assert_equal(*evidences)
    for evidence in evidences:
        evidence.backward()
    assert_equal(log_priors[0].grad, log_priors[1].grad)


@pytest.mark.parametrize("case", CASES)
def test_the_evidence_has_the_same_gradients(case):
    ours, theirs = pair(case, "regression", **OPTIONS["regression"])
    gradients = []
    for la in (ours, theirs):
        prior, sigma = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.3, 0.8))
        la.log_marginal_likelihood(prior, sigma).sum().backward()
        gradients.append((prior.grad, sigma.grad))
    assert_equal(gradients[0][0], gradients[1][0])
    if CASES[case].structure != "kron":  # there laplace-torch multiplies with math.pow, through which no gradient flows
        assert_equal(gradients[0][1], gradients[1][1])
    point = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.3, 0.8)]
    assert torch.autograd.gradcheck(ours.log_marginal_likelihood, point)


def test_the_precision_of_kron_has_their_methods():
    ours, theirs = (la.posterior_precision for la in pair("kron", "regression", **OPTIONS["regression"]))
    assert isinstance(ours, KroneckerPrecision)
    vectors = torch.randn(4, 2, theirs.to_matrix().shape[0], generator=generator(), dtype=torch.float64)
    for exponent in (1, -1, -0.5, 0.5):
        assert_equal(ours.to_matrix(exponent), theirs.to_matrix(exponent))
        assert_equal(ours.diag(exponent), theirs.diag(exponent))
        for w in (vectors, vectors[:, 0], vectors[0, 0]):
            assert_equal(ours.bmm(w, exponent), theirs.bmm(w, exponent))
    assert_equal(ours.bmm(vectors), theirs.bmm(vectors))
    assert_equal(ours.to_matrix(), theirs.to_matrix())
    assert_equal(ours.diag(), theirs.diag())
    assert_equal(ours.logdet(), theirs.logdet())
    assert_equal(ours.inv_square_form(vectors), theirs.inv_square_form(vectors))
    assert len(ours) == len(theirs) == 4
    assert_equal(ours @ vectors[0, 0], theirs.to_matrix() @ vectors[0, 0])
    assert_equal(ours @ vectors[0].T, theirs.to_matrix() @ vectors[0].T)
    assert_equal(ours.matvec(vectors), vectors @ theirs.to_matrix())


def test_the_precision_of_a_joint_fit_is_the_posteriors():
    la = fitted("kron", prior_precision=0.5)
    dense = dense_posterior_precision(la.posterior)
    precision = la.posterior_precision
    assert precision.shape == dense.shape
    assert len(precision) == 2
    assert_equal(precision.to_matrix(), dense)
    assert_equal(precision.to_matrix(-1), dense.inverse())
    assert_equal(precision.diag(-1), dense.inverse().diagonal())
    assert_equal(precision.logdet(), dense.logdet())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_curvature_itself(likelihood):
    """``H`` is the sum over the training set, without noise, temperature and prior."""
    ours, theirs = pair("kron", likelihood, **OPTIONS[likelihood])
    assert_equal(ours.H.to_matrix(), theirs.H.to_matrix())


def test_reward_modelling():
    """Fitted as a classification of pairs, predicts the reward of one input as a regression does."""
    one = CASES["kron"]
    own, other, arguments, fit = one.own, one.other, one.arguments, one.fit
    pairs = torch.randn(N, 2, 3, generator=generator(3), dtype=torch.float64)
    chosen = torch.randint(2, (N,), generator=generator(4))
    for likelihood in ("reward_modeling", enums.Likelihood.REWARD_MODELING):
        ours = own(Reward(), likelihood, **arguments)
        ours.fit([(pairs, chosen)], split=Single(), budget=None, **fit)
        assert ours.likelihood == "reward_modeling"
        assert_equal(ours.log_likelihood, -nn.functional.cross_entropy(ours.model(pairs), chosen, reduction="sum"))
        mean, covariance = ours(X)
        assert_equal(mean, ours.model(X))
        jacobians = dense_jacobian(ours.model, X)
        assert_equal(covariance, ours.functional_variance(jacobians))
        assert_equal(ours(X, joint=True)[1], ours.functional_covariance(jacobians))
        assert [tuple(p.shape) for p in ours(X, pred_type="nn", link_approx="mc", n_samples=4)] == [(5, 1), (5, 1)]
        probabilities = ours(pairs, fitting=True)
        assert_equal(probabilities.sum(1), torch.ones(N).double())
        assert_equal(ours.predictive_samples(X, n_samples=3, generator=generator()),
                     ours.functional_samples(X, n_samples=3, generator=generator()))  # fmt: skip
        with pytest.warns(UserWarning, match="of the grid"):
            ours.optimize_prior_precision(method="gridsearch", val_loader=[(pairs, chosen)], grid_size=2)
        ours.optimize_prior_precision()
        with pytest.raises(ValueError, match="only available for regression"):
            ours.log_marginal_likelihood(sigma_noise=torch.tensor(0.5))
    theirs = other(Reward(), "reward_modeling")
    theirs.fit(DataLoader(TensorDataset(pairs, chosen), batch_size=N))
    assert_equal(ours.log_likelihood, theirs.log_likelihood)
    assert [tuple(p.shape) for p in ours(X)] == [tuple(p.shape) for p in theirs(X)]
    assert_equal(ours(X)[0], theirs(X)[0])


class Reward(nn.Module):
    """Two logits for a pair ``[N, 2, d]``, one for an input ``[N, d]``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model_of(outputs=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(0, 1)).reshape(-1, 2) if x.ndim == 3 else self.net(x)


# -- other structures and subsets ------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", ["diag", "last-diag"])
def test_the_precision_of_diag(case, likelihood):
    ours, theirs = pair(case, likelihood, **OPTIONS[likelihood])
    for name in ("posterior_precision", "posterior_scale", "posterior_variance", "H"):
        assert_equal(getattr(ours, name), getattr(theirs, name))
    assert not hasattr(ours, "posterior_covariance")


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", ["full", "last-full"])
def test_the_precision_of_full(case, likelihood):
    ours, theirs = pair(case, likelihood, **OPTIONS[likelihood])
    for name in ("posterior_precision", "posterior_scale", "posterior_covariance", "H"):
        assert_equal(getattr(ours, name), getattr(theirs, name))
    assert not hasattr(ours, "posterior_variance")


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", ["lowrank", "last-lowrank"])
def test_the_precision_of_low_rank(case, likelihood):
    ours, theirs = pair(case, likelihood, **OPTIONS[likelihood])
    (vectors, eigenvalues), prior = ours.posterior_precision
    assert vectors.shape == (ours.n_params, len(eigenvalues))
    assert_equal(vectors @ eigenvalues.diag() @ vectors.T + prior.diag(), theirs.posterior_precision)
    vectors, eigenvalues = ours.H
    assert_equal(vectors @ eigenvalues.diag() @ vectors.T, theirs.H)
    assert not hasattr(ours, "posterior_scale")
    assert not hasattr(ours, "posterior_covariance")


@pytest.mark.parametrize("case", ["lowrank", "diag", "full", "last-lowrank", "last-diag", "last-full"])
def test_a_prior_precision_for_each_parameter(case):
    ours, theirs = pair(case, "classification")
    priors = 2.0 ** torch.randint(-3, 4, (ours.n_params,), generator=generator()).double()
    for la in (ours, theirs):
        la.prior_precision = priors
    assert_equal(ours.prior_precision_diag, priors)
    for link in ("probit", "bridge"):
        assert_equal(ours(X, link_approx=link), theirs(X, link_approx=link))
    value = torch.randn(ours.n_params, generator=generator(), dtype=torch.float64)
    assert_equal(ours.log_prob(value), theirs.log_prob(value))
    gradients = []
    for la in (ours, theirs):
        logarithms = priors.log().requires_grad_()
        evidence = la.log_marginal_likelihood(logarithms.exp())
        evidence.backward()
        gradients.append(torch.cat([evidence.detach()[None], logarithms.grad]))
    assert_equal(*gradients)


@pytest.mark.parametrize("prior_structure", ["layerwise", "diag"])
@pytest.mark.parametrize("case", ["lowrank", "diag", "full"])
@pytest.mark.filterwarnings("ignore:By default `link_approx` is:UserWarning")
def test_gradient_steps_on_the_marginal_likelihood_are_theirs(case, prior_structure):
    ours, theirs = pair(case, "classification")
    for keywords in ({"n_steps": 7, "lr": 0.2}, {"n_steps": 3, "init_prior_prec": 4.0}):
        for la in (ours, theirs):
            la.optimize_prior_precision(prior_structure=prior_structure, **keywords)
        assert_equal(ours.prior_precision, theirs.prior_precision)
        assert not ours.prior_precision.requires_grad
    start = torch.full((4,), 0.5, dtype=torch.float64)
    for la in (ours, theirs):
        la.optimize_prior_precision(init_prior_prec=start.clone(), n_steps=2)
    assert_equal(ours.prior_precision, theirs.prior_precision)


def test_gradient_steps_that_fail_leave_the_prior():
    la = fitted("diag", prior_precision=2.0)
    with pytest.raises(ValueError, match="prior precision"):
        la.optimize_prior_precision(prior_structure="diag", lr=1e6)
    assert float(la.prior_precision) == 2.0
    with pytest.raises(ValueError, match=r"prior precision.*got 7"):
        la.optimize_prior_precision(init_prior_prec=torch.ones(7))


#: Of whole tensors, the first bias and the last weight; and of single entries.
SUBNETWORKS = {"tensors": torch.arange(12, 28), "entries": torch.tensor([0, 3, 7, 8, 13, 17, 19, 20, 26, 29])}


def subnetworks(structure: str, likelihood: str, indices: Tensor, **options: Any) -> tuple[Any, Any]:
    """The posterior over some entries of the parameter vector."""
    ours = DebiasedLaplace(model_of(), likelihood, "subnetwork", structure, subnetwork_indices=indices, **options)
    ours.fit(loader_of(likelihood), split=Single(), budget=None)
    model = model_of()
    with double_by_default():
        theirs = laplace.Laplace(model, likelihood, "subnetwork", structure, subnetwork_indices=indices, **options)
        theirs.fit(loader_of(likelihood))
    return ours, theirs


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["diag", "full"])
@pytest.mark.parametrize("kind", SUBNETWORKS)
def test_subnetworks(kind, structure, likelihood):
    indices = SUBNETWORKS[kind]
    d = len(indices)
    ours, theirs = subnetworks(structure, likelihood, indices, **OPTIONS[likelihood])
    assert (ours.n_params, ours.n_params_subnet, ours.n_layers) == (31, d, 4)
    for name in ("n_params", "n_params_subnet", "n_layers", "n_data", "n_outputs"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("mean", "mean_subnet", "posterior_precision", "prior_precision_diag", "scatter", "H",
                 "posterior_scale", "log_det_posterior_precision", "log_det_ratio", "log_likelihood"):  # fmt: skip
        assert_equal(getattr(ours, name), getattr(theirs, name))
    assert_equal(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    assert_equal(flat(ours(X)), flat(theirs(X)))
    jacobians = dense_jacobian(ours.model, X)[:, :, indices]
    assert_equal(ours.functional_variance(jacobians), theirs.functional_variance(jacobians))
    assert_equal(ours.functional_covariance(jacobians), theirs.functional_covariance(jacobians))
    subset = torch.randn(3, d, generator=generator(), dtype=torch.float64)
    assert_equal(ours.assemble_full_samples(subset), theirs.assemble_full_samples(subset))
    samples = ours.sample(1500, generator())
    assert samples.shape == (1500, 31)
    outside = [index for index in range(31) if index not in indices.tolist()]
    assert_equal(samples[:, outside], ours.mean[outside].expand(1500, -1), 0.0)
    assert_unbiased(samples[:, indices], ours.mean_subnet)
    precision = theirs.posterior_precision
    normal = torch.distributions.MultivariateNormal(
        ours.mean_subnet, precision_matrix=precision if precision.ndim == 2 else torch.diag(precision)
    )
    for chosen in (samples, samples[:, indices]):
        assert_equal(ours.log_prob(chosen), normal.log_prob(samples[:, indices]))
    for pred_type in ("nn", "linearized"):
        assert bool(flat(ours(X, pred_type=pred_type)).isfinite().all())
    left_out = "Left out: 0.weight, 2.bias." in ours.coverage()
    assert left_out == (kind == "tensors")
    assert f"{d} of {d} trainable parameters covered" in ours.coverage()


@pytest.mark.parametrize("structure", ["diag", "full", "lowrank"])
def test_settings_of_single_entries(structure, tmp_path):
    """One prior precision, and prior mean, for each (laplace-torch refuses it); tuned; stored; differentiable."""
    indices = SUBNETWORKS["entries"]
    precision, mean = torch.linspace(0.5, 2.0, 10).double(), torch.linspace(-1.0, 1.0, 10).double()
    _, theirs = subnetworks("diag" if structure == "diag" else "full", "regression", indices)
    theirs._prior_mean = mean
    options: Any = {"subnetwork_indices": indices, "prior_precision": precision, "prior_mean": mean}
    ours = DebiasedLaplace(model_of(), "regression", "subnetwork", structure, **options)
    everything = {"structure": LowRank(rank=31)} if structure == "lowrank" else {}
    ours.fit(loader_of("regression"), split=Single(), budget=None, **everything)

    def set_theirs(value: Tensor) -> None:
        theirs._prior_precision, theirs._posterior_scale = value, None

    set_theirs(precision)
    assert_equal(ours.prior_precision_diag, precision)
    assert_equal(flat(ours(X)), flat(theirs(X)))
    assert_equal(ours.scatter, theirs.scatter)
    assert_equal(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    found = torch.full((10,), 0.7, dtype=torch.float64, requires_grad=True)
    expected = found.detach().clone().requires_grad_()
    set_theirs(expected)
    ours.log_marginal_likelihood(found).backward()
    theirs.log_marginal_likelihood().backward()
    assert_equal(found.grad, expected.grad)
    ours.optimize_prior_precision(prior_structure="diag", n_steps=3)
    assert ours.prior_precision.shape == (10,)
    assert float(ours.log_marginal_likelihood()) > float(ours.log_marginal_likelihood(torch.ones(10)))
    ours.save(tmp_path / "posterior")
    other = DebiasedLaplace.load(tmp_path / "posterior", model_of())
    assert_equal(flat(other(X)), flat(ours(X)), 0.0)
    assert_equal(flat(copy.deepcopy(ours)(X)), flat(ours(X)), 0.0)
    stranger = DebiasedLaplace(model_of(), "regression", "subnetwork", structure, subnetwork_indices=indices + 1)
    with pytest.raises(ValueError, match=r"the entries \[1, 4, .* and 2 more of the parameter vector, got one of \[0"):
        stranger.load_state_dict(ours.state_dict())
    ours.enable_backprop = True
    x = X.clone().requires_grad_()
    assert_equal(flat(ours(x)), flat(other(X)))
    assert_equal(flat(ours(x, diagonal_output=True)), flat(other(X, diagonal_output=True)))
    with pytest.raises(ValueError, match=r"parameter tensors or of the 10 parameters, got 31"):
        ours.prior_precision = torch.ones(31)
    with pytest.raises(ValueError, match=r"for each of the 10 parameters, got 31"):
        ours.prior_mean = torch.ones(31)


@pytest.mark.parametrize("structure", ["kron", "lowrank", "diag", "full"])
def test_chosen_parameters_are_as_if_the_others_were_frozen(structure):
    """With every structure, by names of parameters or modules, or patterns."""
    loader = loader_of("classification")
    frozen = model_of()
    frozen[0].requires_grad_(False)
    expected = DebiasedLaplace(frozen, "classification", "all", structure)
    expected.fit(loader)
    for params in (["2.weight", "2.bias"], ["2"], "2.*"):
        for subset in ("all", "subnetwork"):
            la = DebiasedLaplace(model_of(), "classification", subset, structure, params=params)
            la.fit(loader)
            assert_equal(la(X), expected(X))
            assert_equal(la.log_marginal_likelihood(), expected.log_marginal_likelihood())
            assert len(la.mean) == (15 if subset == "all" else 31)
            differentiable = DebiasedLaplace(
                model_of(), "classification", subset, structure, params=params, enable_backprop=True
            )
            differentiable.fit(loader)
            x = X.clone().requires_grad_()
            for pred_type in ("glm", "nn", "linearized"):
                found = differentiable(x, pred_type=pred_type, n_samples=3)
                assert_equal(found, la(X, pred_type=pred_type, n_samples=3))
                found.sum().backward()
            assert all(p.grad is None for p in differentiable.model.parameters())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"subset_of_weights": "subnetwork"}, "got neither"),
        ({"subset_of_weights": "subnetwork", "params": ["2"], "subnetwork_indices": torch.arange(3)}, "got both"),
        ({"subset_of_weights": "last_layer", "params": ["2"]}, r"only \['last_layer_name'\] with .*'last_layer', got"),
        ({"last_layer_name": "2"}, r"only \['params'\] with .*'all', got \['last_layer_name'\]"),
        ({"params": ["3.*"]}, "'3.*', which matches none of"),
        *(({"subset_of_weights": "subnetwork", "subnetwork_indices": value}, match) for value, match in (
            ([0, 5], r"LongTensor, got \[0, 5\]"), (torch.tensor([]).long(), "LongTensor"),
            (torch.tensor(11), "LongTensor"), (torch.tensor([[0, 5]]), "LongTensor"),
            (torch.tensor([0.0, 5.0]), "got torch.float32"), (torch.tensor([0, 5]).int(), "got torch.int32"),
            (torch.tensor([True, False]), "got torch.bool"), (torch.tensor([-1, 0]), "from 0 to 30, got -1 to 0"),
            (torch.tensor([30, 31]), "from 0 to 30, got 30 to 31"), (torch.tensor([3, 3]), "ascending"),
        )),
    ],
)  # fmt: skip
def test_bad_choices_of_parameters(arguments, match):
    with pytest.raises(ValueError, match=match):
        DebiasedLaplace(model_of(), "classification", hessian_structure="diag", **arguments)


def test_kronecker_structures_need_whole_tensors():
    with pytest.raises(ValueError, match=r"with hessian_structure='kron', got some of \['0.bias'\] in part"):
        DebiasedLaplace(model_of(), "classification", "subnetwork", subnetwork_indices=torch.tensor([12, 13, 14]))


def test_attributes_of_subnetworks_are_theirs_alone():
    la = fitted("diag")
    for name in ("n_params_subnet", "mean_subnet"):
        with pytest.raises(AttributeError, match="subset_of_weights=\"subnetwork\", not 'all'"):
            getattr(la, name)
    with pytest.raises(
        AttributeError, match="posterior_covariance is there for hessian_structure full, not for 'diag'"
    ):
        la.posterior_covariance  # noqa: B018


def test_the_masks_of_laplace_torch():
    model = model_of()
    for mask, n_chosen in (
        (laplace.utils.ModuleNameSubnetMask(model, ["2"]), 15),
        (laplace.utils.LargestMagnitudeSubnetMask(model, n_params_subnet=7), 7),
        (laplace.utils.RandomSubnetMask(model, n_params_subnet=7), 7),
    ):
        mask.select()
        la = DebiasedLaplace(model, "classification", "subnetwork", "full", subnetwork_indices=mask.indices)
        la.fit(loader_of("classification"))
        assert la.n_params_subnet == len(la.mean_subnet) == n_chosen
        assert_equal(la.mean_subnet, torch.nn.utils.parameters_to_vector(model.parameters())[mask.indices].detach())


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].last])
def test_a_last_layer_without_a_name_is_found_by_the_fit(case):
    la = CASES[case].own(
        model_of(), "classification", prior_mean=torch.ones(15), prior_precision=torch.tensor([1.0, 2.0])
    )
    assert la.n_params is la.n_layers is None
    la.fit(loader_of("classification"))
    assert (la.n_params, la.n_layers, len(la.mean)) == (15, 2, 15)
    assert [p is q for p, q in zip(la.params, la.model[2].parameters(), strict=True)] == [True, True]
    mean, variance = la.functional_variance_fast(X)
    assert_equal(mean, la.model(X))
    assert_equal(variance, la.functional_variance(jacobians_of(la, X)).diagonal(dim1=1, dim2=2))
    assert "Left out: 0.weight, 0.bias." in la.coverage()
    for settings, match in (({"prior_mean": torch.ones(31)}, "each of the 15 parameters, got 31"),
                            ({"prior_precision": torch.ones(4)}, "prior precision.*got 4")):  # fmt: skip
        other = CASES[case].own(model_of(), "classification", **settings)
        with pytest.raises(ValueError, match=match):
            other.fit(loader_of("classification"))
        assert other.fitted is None
    named = CASES[case].own(model_of(), "classification", last_layer_name="0")
    named.fit(loader_of("classification"))
    assert list(named.network.shapes) == ["0.weight", "0.bias"]
    with pytest.raises(ValueError, match="last_layer_name to be a module"):
        CASES[case].own(model_of(), "classification", last_layer_name="7")


# -- online updates --------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", CASES)
def test_two_fits_are_one_on_all_data(case, likelihood):
    one = CASES[case]
    x, y = loader_of(likelihood, n=24).dataset.tensors
    keywords = {"split": Single(), "budget": None, **one.fit}
    whole, parts = (one.own(model_of(), likelihood, **one.arguments, **OPTIONS[likelihood]) for _ in range(2))
    whole.fit([(x, y)], **keywords)
    parts.fit([(x[:9], y[:9])], **keywords)
    parts.fit([(x[9:], y[9:])], override=False, **keywords)
    assert parts.n_data == 24
    for name in ("loss", "log_likelihood"):
        assert_equal(getattr(parts, name), getattr(whole, name))
    assert_equal(parts.log_marginal_likelihood(), whole.log_marginal_likelihood())
    assert_equal(flat(parts(X)), flat(whole(X)))
    parts.fit([(x, y)], **keywords)  # anew
    assert parts.n_data == 24
    assert_equal(parts.log_marginal_likelihood(), whole.log_marginal_likelihood())


@pytest.mark.parametrize("case", ["kron", "diag", "full"])
def test_online_updates_of_laplace_torch(case):
    """There too n_data, the loss and the curvature add up; the first fit may be the first of all."""
    ours, theirs = pair(case, "regression", sigma_noise=0.5)
    before = dense(ours.H)
    for _ in range(2):
        ours.fit(loader_of("regression"), override=False, split=Single(), budget=None, **CASES[case].fit)
        with double_by_default():
            theirs.fit(loader_of("regression"), override=False)
    assert ours.n_data == theirs.n_data == 3 * N
    assert_equal(ours.loss, theirs.loss)
    assert_equal(dense(ours.H), 3 * before)
    assert_equal(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    first = CASES[case].own(model_of(), "regression")
    first.fit(loader_of("regression"), override=False)
    assert first.n_data == N


@pytest.mark.parametrize("case", ["kron", "diag", "full"])
def test_online_updates_of_laplace_torch_after_loading(case):
    ours, theirs = pair(case, "regression", sigma_noise=0.5)
    before = dense(ours.H)
    again, reference = CASES[case].own(model_of(), "regression"), copy.deepcopy(theirs)
    again.load_state_dict(ours.state_dict())
    with double_by_default():
        reference.load_state_dict(theirs.state_dict())
        for _ in range(2):
            again.fit(loader_of("regression"), override=False, split=Single(), budget=None, **CASES[case].fit)
            reference.fit(loader_of("regression"), override=False)
    assert again.n_data == reference.n_data == 3 * N
    assert_equal(again.loss, reference.loss)
    assert_equal(dense(again.H), 3 * before)
    assert_equal(again.log_marginal_likelihood(), reference.log_marginal_likelihood())
    assert_equal(flat(again(X)), flat(reference(X)))


def dense(precision: Any) -> Tensor:
    return precision if isinstance(precision, Tensor) else precision.to_matrix()


def test_sizes_that_are_given_add_up():
    la = CASES["diag"].own(model_of(), "classification")
    la.fit(loader_of("classification"), n_data=100)
    la.fit(loader_of("classification"), override=False, n_data=50)
    assert la.n_data == 150
    la.fit(loader_of("classification"), override=False)
    assert la.n_data == 162
    assert_equal(la.loss, torch.tensor(162 * la.fitted.mean_loss, dtype=torch.float64))


def test_updates_that_cannot_be():
    low = fitted("lowrank", "regression")
    restored = CASES["lowrank"].own(model_of(), "regression")
    restored.load_state_dict(low.state_dict())
    expected = restored(X)
    with pytest.raises(ValueError, match="got one of a low rank that was loaded"):
        restored.fit(loader_of("regression"), override=False)
    la = fitted("kron", "regression", sigma_noise=SIGMAS)
    la.fit(loader_of("regression"), split=TwoBatch())
    with pytest.raises(ValueError, match="2 folds, got one with 1"):
        la.fit(loader_of("regression"), override=False, split=Single())
    assert_equal(restored(X)[1], expected[1], 0.0)
    assert la.n_data == N


# -- behaviours ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_laplace_makes_our_classes(case):
    one, structure = CASES[case], CASES[case].structure
    subset, name = ("last_layer" if one.last else "all"), f"debiased_{structure}"
    settings = (0.5, 2.0, 0.25, 0.75, True)  # in the order of laplace-torch's classes
    positional = (None, *settings) if case == "lowrank" else settings
    for choice in (subset, enums.SubsetOfWeights(subset)):
        la = laplace.Laplace(model_of(), "regression", choice, name, *positional)
        assert isinstance(la, one.kind)
        assert (la.subset_of_weights, la.hessian_structure) == (subset, structure)
        assert (float(la.sigma_noise), float(la.prior_precision), float(la.prior_mean)) == (0.5, 2.0, 0.25)
        assert (la.temperature, la.enable_backprop) == (0.75, True)
    for spelling in (structure, name):
        general = DebiasedLaplace(model_of(), "regression", subset, spelling, *settings)
        assert type(general) is DebiasedLaplace
        assert (general.hessian_structure, general.temperature) == (structure, 0.75)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (DebiasedKronLaplace, laplace.KronLaplace), (DebiasedLowRankLaplace, laplace.LowRankLaplace),
        (DebiasedDiagLaplace, laplace.DiagLaplace), (DebiasedFullLaplace, laplace.FullLaplace),
        (DebiasedLastLayerLaplace, laplace.DiagLLLaplace), (DebiasedLastLayerLaplace, laplace.FullLLLaplace),
    ],
)  # fmt: skip
def test_constructors_have_their_arguments_in_their_order(own, other):
    theirs, ours = inspect.signature(other).parameters, inspect.signature(own).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(ours)[len(theirs) :])
    for name in set(theirs) - {"backend"}:
        assert ours[name].default == theirs[name].default


def test_the_last_layer_of_kron_takes_all_of_its_arguments():
    """There laplace-torch has ``damping`` before ``backend_kwargs``; ours is given by name."""
    theirs = set(inspect.signature(laplace.KronLLLaplace).parameters)
    assert theirs <= set(inspect.signature(DebiasedLastLayerLaplace).parameters)


def test_a_users_subclass_does_not_take_the_place_of_its_parent():
    class Mine(DebiasedKronLaplace):
        pass

    class Registered(DebiasedKronLaplace):
        _key = ("all", "debiased_mine")

    for _ in range(3):
        assert type(laplace.Laplace(model_of(), "regression", "all", "debiased_kron")) is DebiasedKronLaplace
        assert type(laplace.Laplace(model_of(), "regression", "all", "kron")) is laplace.KronLaplace
    assert type(laplace.Laplace(model_of(), "regression", "all", "debiased_mine")) is Registered
    every = laplace.laplace._all_subclasses(laplace.BaseLaplace)
    keys = [cls._key for cls in every if hasattr(cls, "_key") and "ebiased" in cls.__module__ + cls.__name__]
    assert len(keys) == len(set(keys))
    assert Mine._key != DebiasedKronLaplace._key


@pytest.mark.parametrize("likelihood", [enums.Likelihood.CLASSIFICATION, enums.Likelihood.REGRESSION])
@pytest.mark.parametrize("case", CASES)
def test_enumerations_are_as_good_as_strings(case, likelihood):
    la = fitted(case, likelihood)
    name = str(getattr(likelihood, "value", likelihood))
    assert la.likelihood == name
    plain = fitted(case, name)
    for pred_type in (enums.PredType.GLM, enums.PredType.NN):
        link = enums.LinkApprox.MC
        found, expected = (one(X, pred_type=p, link_approx=k) for one, p, k in
                           ((la, pred_type, link), (plain, pred_type.value, link.value)))  # fmt: skip
        assert_equal(flat(found), flat(expected), 0.0)
    la.optimize_prior_precision(
        pred_type=enums.PredType.GLM, method=enums.TuningMethod.MARGLIK, prior_structure=enums.PriorStructure.SCALAR
    )
    structure = enums.HessianStructure(CASES[case].structure)
    assert (
        DebiasedLaplace(model_of(), "regression", enums.SubsetOfWeights.ALL, structure).hessian_structure == structure
    )
    with pytest.raises(ValueError, match="got 'gp'"):
        la(X, pred_type=enums.PredType.GP)


@pytest.mark.parametrize("case", CASES)
def test_noise_of_the_observations_at_construction(case):
    own = CASES[case].own
    for value in (1.2, torch.tensor(1.2), torch.tensor([1.2])):
        la = own(model_of(), "regression", sigma_noise=value)
        assert la.sigma_noise.shape == ()
        assert_equal(la.sigma_noise, torch.as_tensor(1.2).double(), 1e-7)
    for value, match in ((torch.ones(1, 1), r"got shape \(1, 1\)"), ("1.2", "got str '1.2'"), ([], r"shape \(0,\)"),
                         (torch.tensor([1.0, -1.0]), "positive, finite sigma_noise"), (None, "NoneType")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            own(model_of(), "regression", sigma_noise=value)
    with pytest.raises(ValueError, match=r"only available for regression, got 1.2.* for classification"):
        own(model_of(), "classification", sigma_noise=1.2)


@pytest.mark.parametrize("case", CASES)
def test_prior_precisions_and_means_at_construction(case):
    """Of a last layer that has a name; otherwise what fits is known at the fit."""
    one = CASES[case]
    named = {"last_layer_name": "2"} if one.last else {}
    n_tensors, n_params = (2, 15) if one.last else (4, 31)
    per_parameter = torch.full((n_params,), 10.6)
    lengths = [(10.6, 1), (torch.tensor(10.6), 1), (torch.tensor([10.6]), 1), (per_parameter[:n_tensors], n_tensors)]
    if one.structure != "kron":
        lengths.append((per_parameter, n_params))
    for value, length in lengths:
        la = one.own(model_of(), "regression", prior_precision=value, **named)
        assert la.prior_precision.shape == (length,)
        la.fit(loader_of("regression"))
        assert_equal(la.prior_precision_diag, torch.full((n_params,), 10.6).double(), 1e-7)
        assert_equal(la.log_det_posterior_precision, dense_posterior_precision(la.posterior).logdet())
    refused = [torch.ones(1, 1), torch.ones(17), "1.5"] + [per_parameter] * (one.structure == "kron")
    for value in refused:
        with pytest.raises(ValueError, match="prior precision"):
            one.own(model_of(), "regression", prior_precision=value, **named)
    for value in (1.0, torch.ones(()), torch.ones(1), torch.ones(n_params)):
        la = one.own(model_of(), "classification", prior_precision=0.01, prior_mean=value, **named)
        la.fit(loader_of("classification"))
        assert_equal(la.scatter, 0.01 * (la.mean - 1).square().sum())
    for value in (torch.ones(n_params, 1), torch.ones(n_params - 3), "72", torch.tensor([math.nan])):
        with pytest.raises(ValueError, match="prior mean"):
            one.own(model_of(), "classification", prior_mean=value, **named)


@pytest.mark.parametrize("case", CASES)
def test_before_a_fit_the_posterior_is_the_prior(case):
    named = {"last_layer_name": "2"} if CASES[case].last else {}
    la = CASES[case].own(model_of(), "classification", prior_precision=0.5, prior_mean=0.25, **named)
    value = torch.randn(la.n_params, generator=generator(), dtype=torch.float64)
    prior = torch.distributions.Normal(torch.full_like(value, 0.25), math.sqrt(2.0))
    assert_equal(la.log_prob(value), prior.log_prob(value).sum())
    assert_equal(la.prior_precision_diag, torch.full_like(value, 0.5))
    assert float(la.log_det_ratio) == float(la.scatter) == 0
    kind = CASES[case].structure
    if kind in ("diag", "full"):  # as in laplace-torch; the posterior of the others has no form yet
        zeros = torch.zeros(la.n_params).double()
        assert_equal(la.H, zeros if kind == "diag" else torch.diag(zeros), 0.0)
        assert_equal(la.posterior_precision, zeros + 0.5 if kind == "diag" else torch.diag(zeros + 0.5))
    else:
        assert la.H is None
    if not named:  # laplace-torch's last-layer classes have no mean yet
        other = CASES[case].other(model_of(), "classification", prior_precision=0.5, prior_mean=0.25)
        assert_equal(la.log_prob(value), other.log_prob(value))
        tensors = CASES[case].own(model_of(), "classification", prior_precision=torch.tensor([0.5, 1, 2, 4.0]))
        assert_equal(tensors.prior_precision_diag[-3:], torch.full((3,), 4.0).double())
    no_form = [lambda: la(X), lambda: la.posterior_precision] if kind not in ("diag", "full") else []
    for ask in (*no_form, lambda: la.sample(2), lambda: la.state_dict(), lambda: la.functional_samples(X),
                lambda: la.log_marginal_likelihood(), lambda: la.functional_variance(torch.zeros(1, C, la.n_params)),
                lambda: la.optimize_prior_precision(), lambda: la.coverage(), lambda: la.save("nowhere")):  # fmt: skip
        with pytest.raises(NotFittedError, match=r"Call fit\(train_loader\) or load_state_dict first"):
            ask()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_of_the_posterior(case, likelihood):
    la = fitted(case, likelihood, prior_precision=0.5)
    samples = la.sample(1500, generator(1))
    assert samples.shape == (1500, la.n_params)
    assert_unbiased(samples, la.mean)
    covariance = dense_posterior_precision(la.posterior).inverse()
    centred = samples - la.mean
    assert_unbiased(torch.einsum("sd,se->sde", centred, centred), covariance)
    assert la.sample().shape == (100, la.n_params)
    assert la.functional_samples(X).shape == la.predictive_samples(X, "nn").shape == (100, 5, C)


@pytest.mark.parametrize("case", CASES)
def test_functional_samples_do_not_depend_on_the_likelihood(case):
    la = fitted(case, "regression")
    before = [la.functional_samples(X, p, 4, generator=generator()) for p in ("glm", "nn", "linearized")]
    la.likelihood = "classification"
    after = [la.functional_samples(X, p, 4, generator=generator()) for p in ("glm", "nn", "linearized")]
    for one, other in zip(before, after, strict=True):
        assert_equal(one, other, 0.0)
    assert_equal(la.predictive_samples(X, n_samples=2).sum(-1), torch.ones(2, 5).double())


@pytest.mark.parametrize("case", CASES)
def test_functional_samples_of_a_singular_covariance(case):
    """Cholesky decompositions fail there: two outputs that are always the same."""
    model = nn.Sequential(model_of(), Twice())
    la = CASES[case].own(model, "classification", prior_precision=0.5)
    la.fit(loader_of("classification"))
    samples = la.functional_samples(X, n_samples=3)
    assert_equal(samples[..., :C], samples[..., C:], 1e-6)


def test_functional_samples_of_a_datum_do_not_depend_on_the_others(monkeypatch):
    """One datum of a singular covariance, which has no Cholesky decomposition, beside one that has it."""
    mean = torch.zeros(2, 3, dtype=torch.float64)
    one = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 1.0]], dtype=torch.float64)
    both = torch.stack([one, torch.diag(torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))])

    def samples(part: slice) -> Tensor:
        monkeypatch.setattr(predictions, "moments", lambda *of, **how: (mean[part], both[part]))
        return predictions.gaussian_samples(None, None, 4, False, generator(), False)

    assert_equal(torch.cat([samples(slice(0, 1)), samples(slice(1, 2))], 1), samples(slice(0, 2)))
    assert_equal(samples(slice(0, 2))[:, 1, 1], torch.zeros(4, dtype=torch.float64))


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], 1)


class FromDictionary(nn.Module):
    """Takes a mapping, whole, or a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model_of()

    def forward(self, batch: Mapping[str, Tensor] | Tensor) -> Tensor:
        return self.net(batch["inputs"] if isinstance(batch, Mapping) else batch)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", CASES)
def test_dictionary_batches(case, likelihood):
    own = CASES[case].own
    loader = loader_of(likelihood, batch_size=5)
    dictionaries = [{"inputs": x, "targets": y} for x, y in loader]
    la = own(FromDictionary(), likelihood, dict_key_x="inputs", dict_key_y="targets")
    la.fit(dictionaries)
    plain = own(FromDictionary(), likelihood)
    plain.fit(loader)
    for keywords in ({}, {"pred_type": "nn"}, {"pred_type": "linearized"}, {"link_approx": "mc"}):
        found, expected = (flat(one(x, **keywords)) for one, x in ((la, {"inputs": X, "targets": None}), (plain, X)))
        assert_equal(found, expected)
    losses = []
    for one, batches in ((la, dictionaries), (plain, list(loader))):
        for keywords in ({}, {"pred_type": "nn", "n_samples": 3}):
            with pytest.warns(UserWarning, match="of the grid"):
                one.optimize_prior_precision(method="gridsearch", val_loader=batches, grid_size=2, **keywords)
            losses.append(one.curve.losses)
    assert_equal(torch.stack(losses[:2]), torch.stack(losses[2:]))
    with pytest.raises(TypeError, match=r"targets under 'labels'.*dict_key_y"):
        own(FromDictionary(), likelihood).fit(dictionaries)


class WithArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = model_of()

    def forward(self, x: Tensor, scale: float = 1.0, shift: Tensor | None = None) -> Tensor:
        out = scale * self.net(x)
        return out if shift is None else out + shift


@pytest.mark.parametrize("case", CASES)
def test_arguments_of_the_model(case):
    la = fitted(case, "regression", WithArguments())
    mean, variance = la(X, pred_type="nn", n_samples=20)
    for pred_type in ("nn", "linearized"):
        mean, variance = la(X, pred_type=pred_type, n_samples=20)
        shift = torch.arange(C).double()
        scaled = la(X, pred_type=pred_type, n_samples=20, scale=2.0, shift=shift)
        assert_equal(scaled[0], 2 * mean + shift)
        assert_equal(scaled[1], 4 * variance)
        assert not scaled[0].requires_grad
    with pytest.raises(TypeError, match=r"for pred_type 'nn' and 'linearized', got \['scale'\] with 'glm'"):
        la(X, scale=2.0)


@pytest.mark.parametrize("case", CASES)
def test_targets_of_another_shape_are_refused(case):
    x, y = loader_of("regression").dataset.tensors
    la = CASES[case].own(model_of(outputs=1), "regression")
    la.fit([(x, y[:, :1])])
    precision = la.posterior.precisions
    la.fit([(x, y[:, 0])])  # one number for each datum, with or without its dimension
    assert_equal(la.posterior.precisions, precision, 1e-15)
    with pytest.raises(ValueError, match=r"Expected targets of shape \[N, 1\] or \[N\]"):
        la.fit([(x, y[:, :1].expand(-1, 2))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_results_have_the_dtype_of_the_model(case, dtype):
    """Statistics of half-precision models are in single precision, and so are results."""
    la = CASES[case].own(model_of(dtype), "regression")
    la.fit(loader_of("regression", dtype=dtype))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    x = X.to(dtype)
    values = [
        la.log_marginal_likelihood(), la.log_likelihood, la.log_det_ratio, la.scatter, la.square_norm(la.mean),
        la.log_prob(la.mean), la.prior_precision, la.sigma_noise, la.prior_precision_diag, la.sample(2), la.loss,
        *la(x), *la(x, joint=True), la.functional_samples(x, n_samples=2),
        la.log_det_prior_precision, la.log_det_posterior_precision,
    ]  # fmt: skip
    assert {value.dtype for value in values} == {expected}
    for value in (la.log_marginal_likelihood(), la.log_likelihood, la.scatter, la.square_norm(la.mean)):
        assert value.shape == ()


# -- gradients in the inputs -----------------------------------------------------------------------

DIFFERENTIABLE = [
    {}, {"joint": True}, {"diagonal_output": True}, {"link_approx": "mc", "n_samples": 3},
    {"pred_type": "nn", "n_samples": 3}, {"pred_type": "linearized", "n_samples": 3},
]  # fmt: skip


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", CASES)
def test_predictions_have_gradients_in_the_inputs(case, likelihood):
    def check(function: Callable[[Tensor], Any]) -> None:
        """Along a random direction, as every entry of the Jacobian would take a prediction each."""
        assert torch.autograd.gradcheck(function, x, atol=1e-6, rtol=1e-5, fast_mode=True)

    model = model_of()
    la = fitted(case, likelihood, model, enable_backprop=True)
    plain = fitted(case, likelihood, model)
    x = X[:2].clone().requires_grad_()
    for keywords in DIFFERENTIABLE:
        assert_equal(flat(la(x, **keywords)), flat(plain(X[:2], **keywords)))
        check(lambda x, k=keywords: la(x, **k))
    for method in ("functional_samples", "predictive_samples"):
        for pred_type in ("glm", "nn", "linearized"):
            check(lambda x, m=method, p=pred_type: getattr(la, m)(x, p, 3, generator=generator()))
    assert all(p.grad is None for p in model.parameters())
    assert not hasattr(model, "output_size")
    with torch.no_grad():
        assert not any(value.requires_grad for value in la(x))
    assert not any(value.requires_grad for value in plain(x))


def test_gradients_in_the_inputs_go_through_a_layer_norm():
    """Torch's batched derivatives lose terms of its second derivatives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2)).double()
    la = DebiasedLaplace(model, "regression", hessian_structure="full", enable_backprop=True)
    la.fit([(X, X[:, :2])])
    x = X[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: la(x, joint=True), x, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_differentiable_prior_does_not_reach_predictions(case):
    la = fitted(case)
    la.log_marginal_likelihood(torch.tensor([0.5], requires_grad=True))
    for keywords in DIFFERENTIABLE:
        assert not flat(la(X, **keywords)).requires_grad


# -- tuning ----------------------------------------------------------------------------------------


def mean_nll(probabilities: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.nll_loss(probabilities.log(), targets)


class SquaredError(torchmetrics.Metric):
    """Takes means alone."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, mean: Tensor, targets: Tensor) -> None:
        self.total += (mean - targets).square().sum()

    def compute(self) -> Tensor:
        return self.total


class Surprise(SquaredError):
    """Takes means and covariances."""

    def update(self, mean: Tensor, covariance: Tensor, targets: Tensor) -> None:
        assert covariance.shape in ((*mean.shape, C), mean.shape)
        variance = covariance.diagonal(dim1=1, dim2=2) if covariance.ndim == 3 else covariance
        self.total += ((mean - targets).square() / (1 + variance) + (1 + variance).log()).sum()


def surprise(mean: Tensor, covariance: Tensor, targets: Tensor) -> Tensor:
    variance = covariance.diagonal(dim1=1, dim2=2) if covariance.ndim == 3 else covariance
    return ((mean - targets).square() / (1 + variance) + (1 + variance).log()).sum()


GRID = {"method": "gridsearch", "grid_size": 5, "log_prior_prec_min": -3, "log_prior_prec_max": 2}


@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", CASES)
def test_the_grid_search_with_a_loss_of_ones_own(case, likelihood):
    """Each value of the curve is the loss of laplace-torch's predictions with that prior precision."""
    ours, theirs = pair(case, likelihood)
    validation = loader_of(likelihood, batch_size=5, seed=9)
    losses = {
        "classification": [mean_nll, lambda p, y: float(mean_nll(p, y)), laplace.utils.metrics.RunningNLLMetric()],
        "regression": [surprise, Surprise(), SquaredError(), torchmetrics.MeanSquaredError(num_outputs=C)],
    }[likelihood]
    for loss in losses:
        ours.optimize_prior_precision(val_loader=validation, loss=loss, **GRID)
        expected = []
        for prior in torch.logspace(-3, 2, 5, dtype=torch.float64):
            theirs.prior_precision = float(prior)
            own = loss.clone() if isinstance(loss, torchmetrics.Metric) else as_tensor(loss)
            expected.append(laplace.utils.utils.validate(theirs, validation, own))
        assert_equal(ours.curve.losses, torch.tensor(expected).double(), 1e-6)
        best = int(torch.tensor(expected).argmin())
        assert_equal(ours.prior_precision, torch.logspace(-3, 2, 5)[best : best + 1].double(), 1e-6)
        if isinstance(loss, torchmetrics.Metric):
            assert loss._update_count == 0, "the user's metric is not touched"


def as_tensor(function):
    return lambda *values: torch.as_tensor(function(*values))


@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("pred_type", ["nn", "linearized"])
@pytest.mark.parametrize("case", CASES)
def test_the_grid_search_with_samples(case, pred_type, likelihood):
    la = fitted(case, likelihood)
    validation = loader_of(likelihood, batch_size=5, seed=9)
    x, y = validation.dataset.tensors
    for loss in (None, mean_nll if likelihood == "classification" else surprise):
        la.optimize_prior_precision(
            pred_type, val_loader=iter(list(validation)), loss=loss, link_approx="mc", n_samples=4, **GRID
        )
        found, link = la.curve.losses, la.link
        for value, prior in zip(found, la.curve.prior_precisions, strict=True):
            la.prior_precision = prior
            prediction = la(x, pred_type=pred_type, n_samples=4)
            if likelihood == "classification":
                expected = mean_nll(prediction, y)
            elif loss is None:
                spread = (prediction[1] + 1).sqrt()
                expected = -torch.distributions.Normal(prediction[0], spread).log_prob(y).sum() / N
            else:
                expected = surprise(*prediction, y)
            assert_equal(value, expected)
        assert link is None
        la.optimize_prior_precision(pred_type, val_loader=validation, n_samples=4, **GRID)


def test_a_loss_that_is_not_a_number():
    la = fitted("kron", prior_precision=2.0)
    with pytest.raises(ValueError, match="validation losses"):
        la.optimize_prior_precision(val_loader=loader_of("classification"), loss=lambda p, y: float("nan"), **GRID)
    with pytest.raises(ValueError, match=r"torchmetrics.Metric, a function or None, got 'nll'"):
        la.optimize_prior_precision(val_loader=loader_of("classification"), loss="nll", **GRID)
    with pytest.raises(ValueError, match="empty val_loader"):
        la.optimize_prior_precision(val_loader=[], loss=mean_nll, **GRID)
    with pytest.raises(ValueError, match="link_approx='mc' or none with 'nn', got 'probit'"):
        la.optimize_prior_precision("nn", val_loader=[], link_approx="probit", **GRID)
    assert float(la.prior_precision) == 2.0
    values = iter([3.0, math.inf, 1.0, math.inf, 2.0])
    la.optimize_prior_precision(val_loader=loader_of("classification"), loss=lambda p, y: next(values), **GRID)
    assert_equal(la.prior_precision, torch.tensor([10**-0.5]).double(), 1e-6)


def test_a_grid_search_leaves_the_random_state():
    la = fitted("kron")
    before = torch.get_rng_state()
    loader = DataLoader(loader_of("classification").dataset, batch_size=5, shuffle=True)
    for keywords in ({}, {"loss": mean_nll}, {"pred_type": "nn", "n_samples": 2}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            la.optimize_prior_precision(val_loader=loader, **GRID, **keywords)
    assert torch.equal(torch.get_rng_state(), before)


# -- several priors, and an output temperature, on validation data ---------------------------------

VALIDATION = {"method": "gridsearch", "grid_size": 25, "log_prior_prec_min": -3, "log_prior_prec_max": 3}


def validation_of(la: Any, **loading: Any) -> DataLoader:
    """Of a classification, the classes that the network says for two data of three, and others."""
    loader = loader_of(la.likelihood, seed=9, n=30, dtype=next(la.model.parameters()).dtype)
    x, y = loader.dataset.tensors
    if la.likelihood == "classification":
        y = torch.where(torch.arange(30) % 3 > 0, la.model(x).argmax(1), y)
    return DataLoader(TensorDataset(x, y), **{"batch_size": 5, **loading})


def tuned(la: Any, **keywords: Any) -> Any:
    """The object, tuned on other data."""
    validation = validation_of(la)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The best prior precision")
        la.optimize_prior_precision(val_loader=validation, **{**VALIDATION, **keywords})
    return la


def loss_of(la: Any, **keywords: Any) -> float:
    """Of its predictions on those data."""
    x, y = validation_of(la).dataset.tensors
    prediction = la(x, **keywords)
    if la.likelihood == "classification":
        return float(nn.functional.nll_loss(prediction.log(), y))
    spread = prediction[1].diagonal(dim1=1, dim2=2) + la.sigma_noise.square()
    return float(-torch.distributions.Normal(prediction[0], spread.sqrt()).log_prob(y).sum(1).mean())


@pytest.mark.parametrize("prior_structure", ["scalar", "layerwise"])
@pytest.mark.parametrize("tune_temperature", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_predictions_have_the_loss_that_tuning_found(case, tune_temperature, prior_structure):
    la = fitted(case)
    assert la.tuned is None
    tuned(la, prior_structure=prior_structure, tune_temperature=tune_temperature)
    n_parts = len(la.posterior.basis.parts)
    assert la.prior_precision.shape == (n_parts if prior_structure == "layerwise" else 1,)
    assert la.link == "probit"
    assert (la.output_temperature != 1.0) == tune_temperature
    if prior_structure == "scalar" and not tune_temperature:
        assert la.tuned is None
        assert loss_of(la) == pytest.approx(float(la.curve.losses.min()), rel=1e-9)
        return
    assert loss_of(la) == pytest.approx(la.tuned.loss, rel=1e-9)
    assert la.tuned.loss <= float(la.curve.losses.min())
    assert la.curve is la.tuned.curve
    assert la.output_temperature == la.tuned.temperature
    assert_equal(la.prior_precision, la.tuned.prior_precisions, 0.0)
    before = la.tuned.curve.losses
    la.output_temperature = 1.0
    assert_equal(tuned(la).curve.losses, before)
    assert la.tuned is None


@pytest.mark.parametrize("noise", [0.7, SIGMAS], ids=["one", "each"])
@pytest.mark.parametrize("case", ["kron", "diag", "last-full"])
def test_a_prior_for_each_part_of_a_regression(case, noise):
    la = tuned(fitted(case, "regression", sigma_noise=noise), prior_structure="layerwise")
    assert loss_of(la) == pytest.approx(la.tuned.loss, rel=1e-9)
    assert la.output_temperature == 1.0


def test_a_prior_for_each_of_as_many_parts_as_tensors():
    """A vector of this length means tensors, in their order, when it is set."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, C, bias=False)).double()
    model[2].weight.data *= 10
    la = DebiasedLowRankLaplace(model, "classification")
    la.fit(loader_of("classification", batch_size=5), structure=LowRank(3, blocks=[["2.*"], ["0.*"]]))
    tuned(la, prior_structure="layerwise", tune_temperature=True)
    assert la.tuned.prior_precisions[0] != la.tuned.prior_precisions[1]
    by_part = dict(zip(la.posterior.basis.members, la.tuned.prior_precisions, strict=True))
    assert la.posterior.basis.members == [(1,), (0,)]
    assert_equal(la.prior_precision, torch.stack([by_part[0,], by_part[1,]]), 0.0)
    assert loss_of(la) == pytest.approx(la.tuned.loss, rel=1e-9)


@pytest.mark.parametrize("link", ["mc", "bridge"])
def test_a_temperature_with_other_links(link):
    la = tuned(fitted("kron"), tune_temperature=True, link_approx=link)
    assert la.link == link
    assert loss_of(la) == pytest.approx(la.tuned.loss, rel=1e-9)
    assert la.output_temperature == la.tuned.temperature != 1.0


def test_single_entries_and_single_precision():
    la = DebiasedLaplace(model_of(), "classification", "subnetwork", "diag",
                         subnetwork_indices=torch.tensor([1, 3, 17, 25]))  # fmt: skip
    la.fit(loader_of("classification"))
    tuned(la, prior_structure="layerwise", tune_temperature=True)
    assert loss_of(la) == pytest.approx(la.tuned.loss, rel=1e-9)
    la = DebiasedKronLaplace(model_of(torch.float32), "classification")
    la.fit(loader_of("classification", dtype=torch.float32))
    tuned(la, prior_structure="layerwise", tune_temperature=True)
    assert loss_of(la) == pytest.approx(la.tuned.loss, rel=1e-5)


@pytest.mark.parametrize("backprop", [False, True])
def test_outputs_are_divided_before_the_link_and_nowhere_else(backprop):
    """Predictions are those of a network whose last layer, and with it the Jacobians, are divided."""
    tau = 2.5
    la = fitted("last-kron", enable_backprop=backprop)
    plain = {p: la.functional_samples(X, p, n_samples=4, generator=generator()) for p in ("glm", "nn", "linearized")}
    mean, spread = la._glm_predictive_distribution(X)
    curvature = la.posterior.curvatures
    la.output_temperature = tau
    assert la.temperature == 1.0
    assert_equal(la.posterior.curvatures, curvature, 0.0)
    assert_equal(la._glm_predictive_distribution(X)[1], spread, 0.0)
    for link in Categorical.links:
        draws = torch.randn(100, C, generator=generator(), dtype=torch.float64) if link == "mc" else None
        own = spread if link != "probit" else spread.diagonal(dim1=1, dim2=2)
        expected = Categorical().predictive(mean / tau, own / tau**2, link, draws)
        assert_equal(la(X, link_approx=link, generator=generator()), expected)
    for pred_type, samples in plain.items():
        assert_equal(la.functional_samples(X, pred_type, n_samples=4, generator=generator()), samples, 0.0)
        found = la.predictive_samples(X, pred_type, n_samples=4, generator=generator())
        assert_equal(found, (samples / tau).softmax(-1))
        if pred_type != "glm":
            assert_equal(la(X, pred_type, n_samples=4, generator=generator()), (samples / tau).softmax(-1).mean(0))


def test_an_output_temperature_of_independent_outputs():
    la = DebiasedKronLaplace(model_of(), Bernoulli())
    x, _ = loader_of("classification").dataset.tensors
    la.fit([(x, torch.rand(N, C, generator=generator()).double())])
    samples = la.functional_samples(X, "nn", n_samples=4, generator=generator())
    la.output_temperature = 3.0
    assert_equal(la(X, "nn", n_samples=4, generator=generator()), (samples / 3).sigmoid().mean(0))


@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
@pytest.mark.parametrize("keywords", [{}, {"loss": mean_nll}, {"pred_type": "nn", "n_samples": 4},
                                      {"pred_type": "linearized", "n_samples": 4}, {"link_approx": "mc"},
                                      {"link_approx": "bridge", "loss": mean_nll}])  # fmt: skip
def test_the_grid_search_predicts_at_the_output_temperature(keywords):
    la = fitted("kron")
    la.output_temperature = 0.4
    validation = loader_of("classification", seed=9, n=30)
    la.optimize_prior_precision(val_loader=validation, **{**GRID, **keywords})
    assert la.output_temperature == 0.4
    x, y = validation.dataset.tensors
    found, own = la.curve.losses, {k: v for k, v in keywords.items() if k != "loss"}
    for value, prior in zip(found, la.curve.prior_precisions, strict=True):
        la.prior_precision = prior
        prediction = la(x, **own)
        loss = mean_nll(prediction, y) if "loss" in keywords else nn.functional.nll_loss(prediction.log(), y)
        assert_equal(value, torch.as_tensor(loss, dtype=torch.float64))


def test_a_layerwise_search_predicts_at_the_output_temperature():
    la = fitted("kron")
    la.output_temperature = 0.4
    tuned(la, prior_structure="layerwise")
    assert la.output_temperature == la.tuned.temperature == 0.4
    assert loss_of(la) == pytest.approx(la.tuned.loss, rel=1e-9)
    assert tuned(la, tune_temperature=True).output_temperature != 0.4


def test_rewards_have_no_output_temperature_but_their_pairs_have():
    pairs = torch.randn(N, 2, 3, generator=generator(3), dtype=torch.float64)
    chosen = torch.randint(2, (N,), generator=generator(4))
    la = DebiasedKronLaplace(Reward(), "reward_modeling")
    la.fit([(pairs, chosen)])
    rewards, samples = la(X), la.predictive_samples(X, n_samples=3, generator=generator())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The best prior precision")
        warnings.filterwarnings("ignore", message="Validation data do not determine the temperature")  # random labels
        la.optimize_prior_precision(val_loader=[(pairs, chosen)], tune_temperature=True, **VALIDATION)
    loss = nn.functional.nll_loss(la(pairs, fitting=True).log(), chosen)
    assert float(loss) == pytest.approx(la.tuned.loss, rel=1e-9)
    la.prior_precision = 1.0
    assert la.output_temperature != 1.0
    assert_equal(flat(la(X)), flat(rewards), 0.0)
    assert_equal(la.predictive_samples(X, n_samples=3, generator=generator()), samples, 0.0)


@pytest.mark.parametrize("case", ["kron", "diag", "last-lowrank"])
def test_an_output_temperature_is_kept(case, tmp_path):
    la = tuned(fitted(case), prior_structure="layerwise", tune_temperature=True)
    la.save(tmp_path / "posterior")
    state = la.state_dict()
    loaded = fitted(case)
    loaded.load_state_dict(state)
    others = [DebiasedLaplace.load(tmp_path / "posterior", model_of()), loaded, copy.deepcopy(la),
              pickle.loads(pickle.dumps(la))]  # fmt: skip
    for other in others:
        assert other.output_temperature == la.output_temperature != 1.0
        assert_equal(other(X), la(X), 0.0)
    assert others[-1].tuned.loss == la.tuned.loss
    del state["output_temperature"]  # as it was before there was one
    loaded.load_state_dict(state)
    assert loaded.output_temperature == 1.0
    assert not torch.equal(loaded(X), la(X))
    old = pickle.loads(pickle.dumps(fitted(case)))
    vars(old).pop("_output_temperature", None)
    assert (old.output_temperature, old.tuned) == (1.0, None)


def test_joint_tuning_repeats_itself_and_leaves_the_random_state():
    before = torch.get_rng_state()
    found = []
    for batch_size, shuffle in ((5, True), (5, True), (30, False)):
        la = fitted("kron")
        loader = validation_of(la, batch_size=batch_size, shuffle=shuffle)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The best prior precision")
            la.optimize_prior_precision(
                val_loader=loader, prior_structure="layerwise", tune_temperature=True, **VALIDATION
            )
        found.append(la.tuned)
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(found[0].prior_precisions, found[1].prior_precisions, 0.0)
    assert (found[0].loss, found[0].temperature) == (found[1].loss, found[1].temperature)
    assert found[2].loss == pytest.approx(found[0].loss, rel=1e-6)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        (
            {"prior_structure": "diag"},
            r"'scalar' or 'layerwise' with method='gridsearch', got 'diag'.*method='marglik'",
        ),
        ({"prior_structure": "blockwise"}, "prior_structure out of"),
        ({"prior_structure": "layerwise", "link_approx": "mc"}, r"variances alone, 'probit'.*got 'mc'"),
        ({"tune_temperature": True, "link_approx": "bridge_norm"}, "does not depend on the scale of the outputs"),
        ({"prior_structure": "layerwise", "pred_type": "nn"}, r"prior_structure='layerwise'.*got pred_type='nn'"),
        ({"prior_structure": "layerwise", "loss": mean_nll}, r"prior_structure='layerwise'.*and no loss, got loss="),
        ({"tune_temperature": True, "pred_type": "linearized"}, r"tune_temperature=True.*got pred_type='linearized'"),
        ({"tune_temperature": True, "loss": mean_nll}, r"tune_temperature=True.*and no loss, got loss="),
        ({"tune_temperature": True, "val_loader": []}, "empty val_loader"),
        ({"method": "marglik", "tune_temperature": True}, "does not depend on the output temperature"),
    ],
)
def test_bad_joint_tuning(keywords, match):
    la = fitted("kron", prior_precision=2.0)
    with pytest.raises(ValueError, match=match):
        la.optimize_prior_precision(**{"val_loader": loader_of("classification"), **VALIDATION, **keywords})
    assert (float(la.prior_precision), la.output_temperature, la.tuned) == (2.0, 1.0, None)


def test_bad_output_temperatures():
    la = fitted("kron")
    for value in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="positive, finite output_temperature"):
            la.output_temperature = value
    with pytest.raises(TypeError, match="a positive number for output_temperature, got 'hot'"):
        la.output_temperature = "hot"
    assert la.output_temperature == 1.0
    la = fitted("kron", "regression")
    la.output_temperature = 1.0
    with pytest.raises(ValueError, match=r"A regression has no link.*got 2. To scale its posterior use temperature"):
        la.output_temperature = 2.0
    with pytest.raises(ValueError, match="no temperature to tune"):
        tuned(la, tune_temperature=True)


def test_verbose_says_the_temperature(capsys):
    la = tuned(fitted("kron"), tune_temperature=True, verbose=True)
    assert f"output temperature {la.output_temperature:.4g}" in capsys.readouterr().out


def test_the_structure_of_the_initial_prior_is_kept():
    la = DebiasedKronLaplace(model_of(), "classification", separate_bias=True)
    la.fit(loader_of("classification"))
    la.optimize_prior_precision(init_prior_prec=torch.ones(4))
    layerwise = la.prior_precision
    assert layerwise.shape == (4,)
    la.optimize_prior_precision(init_prior_prec=3.0, prior_structure="layerwise")
    assert_equal(la.prior_precision, layerwise, 0.0)
    la.optimize_prior_precision(init_prior_prec=torch.ones(1))
    assert la.prior_precision.shape == (1,)
    with pytest.raises(ValueError, match="each of the 4 blocks"):
        la.optimize_prior_precision(init_prior_prec=torch.ones(3))
    with pytest.raises(ValueError, match="prior_structure out of"):
        la.optimize_prior_precision(prior_structure="blockwise")


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(
    ("case", "prior_structure"),
    [(case, prior) for case in CASES for prior in ("scalar", "layerwise", "diag")
     if not CASES[case].last and (case, prior) != ("kron", "diag")],
)  # fmt: skip
def test_training_by_marginal_likelihood(case, likelihood, prior_structure):
    loader = loader_of(likelihood, batch_size=6, n=24)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        la, model, evidences, losses = laplace.marglik_training(
            model_of(), loader, likelihood, f"debiased_{case}", backend=laplace.curvature.CurvlinopsGGN,
            optimizer_kwargs={"lr": 1e-2}, n_epochs=4, n_hypersteps=3, prior_structure=prior_structure, lr_hyp=0.3,
        )  # fmt: skip
    assert type(la) is CASES[case].kind
    assert la.model is model
    assert len(losses) == 4
    assert len(evidences) == 12
    assert all(math.isfinite(value) for value in [*evidences, *losses])
    assert evidences[-1] < evidences[0]  # negative
    assert len(la.prior_precision) == {"scalar": 1, "layerwise": 4, "diag": 31}[prior_structure]
    assert bool((la.prior_precision != 1).all())
    assert (float(la.sigma_noise) != 1) == (likelihood == "regression")
    assert not la.prior_precision.requires_grad
    assert math.isfinite(float(la.log_marginal_likelihood()))


def test_biases_have_blocks_of_their_own_if_there_is_a_prior_for_each_tensor():
    loader, four = loader_of("classification"), torch.tensor([1.0, 2.0, 3.0, 4.0])
    la = DebiasedKronLaplace(model_of(), "classification", prior_precision=four)
    la.fit(loader)
    assert len(la.network.blocks) == 4
    assert_equal(la.prior_precision_diag[-3:], torch.full((3,), 4.0).double())
    joint = DebiasedKronLaplace(model_of(), "classification")
    joint.fit(loader)
    assert len(joint.network.blocks) == 2
    joint.prior_precision = four
    assert_equal(joint.prior_precision_diag[-3:], torch.full((3,), 4.0).double())
    joint.prior_precision = torch.tensor([1.0, 2.0])
    joint.fit(loader)
    assert len(joint.network.blocks) == 2
    kept = DebiasedKronLaplace(model_of(), "classification", prior_precision=four, separate_bias=False)
    kept.fit(loader)
    assert len(kept.network.blocks) == 2
    assert_equal(kept.prior_precision_diag[-3:], torch.full((3,), 4.0).double())
    with pytest.raises(ValueError, match=r"4 parameter tensors, got 31.*mix parameters"):
        DebiasedKronLaplace(model_of(), "classification", prior_precision=torch.ones(31))


# -- noise of each output --------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_noise_for_each_output(case):
    """The same as a regression with outputs and targets divided by their noise."""
    own, arguments, fit = CASES[case].own, CASES[case].arguments, CASES[case].fit
    x, y = loader_of("regression").dataset.tensors
    la = own(model_of(), "regression", sigma_noise=SIGMAS, prior_precision=0.5, **arguments)
    la.fit([(x, y)], split=Single(), budget=None, **fit)
    whitened = nn.Sequential(model_of(), Divide())
    other = own(whitened, "regression", prior_precision=0.5, **arguments)
    other.fit([(x, y / SIGMAS)], split=Single(), budget=None, **fit)
    assert_equal(la(X)[0], other(X)[0] * SIGMAS)
    assert_equal(la(X)[1], other(X)[1] * SIGMAS[:, None] * SIGMAS)
    assert_equal(la.log_marginal_likelihood(), other.log_marginal_likelihood() - N * SIGMAS.log().sum())
    expected = torch.distributions.Normal(la.model(x), SIGMAS).log_prob(y).sum()
    assert_equal(la.log_likelihood, expected)
    with pytest.warns(UserWarning, match="of the grid"):
        la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], grid_size=1 + 1)
    la.prior_precision = la.curve.prior_precisions[0]
    mean, variance = la(x, diagonal_output=True)
    nll = -torch.distributions.Normal(mean, (variance + SIGMAS.square()).sqrt()).log_prob(y).sum() / N
    assert_equal(la.curve.losses[0], nll)
    # The level may change after the fit, the profile not.
    la.sigma_noise, other.sigma_noise = 2 * SIGMAS, 2.0
    la.prior_precision = other.prior_precision = 0.5
    assert_equal(la.log_marginal_likelihood(), other.log_marginal_likelihood() - N * SIGMAS.log().sum())
    with pytest.raises(ValueError, match=r"ratios between outputs.*fit again"):
        la.sigma_noise = 1.0
    with pytest.raises(ValueError, match="each of the 3 outputs, got 2"):
        la.sigma_noise = torch.ones(2)
    assert_equal(la.sigma_noise, 2 * SIGMAS)


class Divide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / SIGMAS


def test_noises_of_equal_size_are_one_noise():
    la, plain = (fitted("kron", "regression", sigma_noise=value) for value in (torch.full((C,), 0.7), 0.7))
    for found, expected in zip(la(X), plain(X), strict=True):
        assert_equal(found, expected, 1e-7)
    assert_equal(la.log_marginal_likelihood(), plain.log_marginal_likelihood(), 1e-7)
    la.sigma_noise = 0.5
    with pytest.raises(ValueError, match="each of the 3 outputs, got 2"):
        CASES["kron"].own(model_of(), "regression", sigma_noise=torch.tensor([1.0, 2.0])).fit(loader_of("regression"))


def test_the_level_of_a_noise_for_each_output_has_a_gradient():
    la = fitted("kron", "regression", sigma_noise=SIGMAS)
    log_level = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: la.log_marginal_likelihood(sigma_noise=SIGMAS * s.exp()), log_level)


def test_random_vectors_with_a_noise_for_each_output_are_unbiased():
    from debiased_laplace.likelihoods import ProfiledGaussian

    likelihood = ProfiledGaussian(SIGMAS)
    outputs = torch.randn(2, C, generator=generator(), dtype=torch.float64)
    root = likelihood.hessian_square_root(outputs, outputs)
    exact = torch.einsum("vnc,vnd->ncd", root, root)
    assert_equal(exact, torch.diag(SIGMAS**-2).expand(2, C, C))
    vectors = likelihood.sampled_square_root(outputs, outputs, torch.rand(2, 4000, C, generator=generator()).double())
    assert_unbiased(4000 * torch.einsum("vnc,vnd->vncd", vectors, vectors), exact)
    leaf = outputs[0].clone().requires_grad_()
    hessian = torch.autograd.functional.hessian(lambda f: likelihood.loss(f[None], outputs[1:])[0], leaf)
    assert_equal(hessian, exact[0])


# -- copies and states -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_copies_and_pickles_predict_the_same(case):
    la = fitted(case, "regression", prior_precision=0.5, sigma_noise=SIGMAS)
    la.sample(2)
    buffer = io.BytesIO()
    torch.save(la, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(la), pickle.loads(pickle.dumps(la)), torch.load(buffer, weights_only=False)]
    expected, samples = la(X), la.sample(2)
    for other in copies:
        assert other.model is not la.model
        assert type(other) is type(la)
        for found, value in zip(other(X), expected, strict=True):
            assert_equal(found, value, 0.0)
        assert_equal(other.sample(2), samples, 0.0)
        other.fit(loader_of("regression", seed=5))
        assert not torch.equal(other(X)[1], expected[1])
    assert_equal(la(X)[1], expected[1], 0.0)
    unfitted = copy.deepcopy(CASES[case].own(model_of(), "regression"))
    unfitted.fit(loader_of("regression"))


@pytest.mark.parametrize("case", CASES)
def test_states_hold_no_objects(case):
    la = fitted(case, "regression", sigma_noise=SIGMAS, enable_backprop=True)
    buffer = io.BytesIO()
    torch.save(la.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = CASES[case].own(model_of(), "regression")
    other.load_state_dict(state)
    for found, expected in zip(other(X), la(X), strict=True):
        assert_equal(found, expected, 0.0)
    assert_equal(other.sigma_noise, la.sigma_noise, 0.0)
    assert other.enable_backprop
    assert_equal(other.log_marginal_likelihood(), la.log_marginal_likelihood(), 0.0)
    general = DebiasedLaplace(model_of(), "regression", la.subset_of_weights, la.hessian_structure)
    general.load_state_dict(state)
    assert_equal(general(X)[1], la(X)[1], 0.0)
    for likelihood in ("classification", "reward_modeling", Bernoulli()):
        with pytest.raises(ValueError, match="Expected a state with likelihood"):
            CASES[case].own(model_of(), likelihood).load_state_dict(state)


@pytest.mark.parametrize("case", CASES)
def test_files(case, tmp_path):
    la = fitted(case, "regression", prior_precision=0.5, sigma_noise=SIGMAS, prior_mean=0.25, enable_backprop=True)
    la.save(tmp_path / "posterior")
    for cls in (DebiasedLaplace, CASES[case].kind):
        other = cls.load(tmp_path / "posterior", model_of())
        assert type(other) is type(la)
        for found, expected in zip(other(X), la(X), strict=True):
            assert_equal(found, expected, 0.0)
        assert_equal(other.log_marginal_likelihood(), la.log_marginal_likelihood(), 0.0)
        assert_equal(other.fitted.curvature_indices, la.fitted.curvature_indices, 0.0)
        assert (other.seed, other.n_data, other.enable_backprop) == (la.seed, la.n_data, True)
    with pytest.raises(ValueError, match=r"differ.*Load that model's weights"):
        DebiasedLaplace.load(tmp_path / "posterior", model_of(seed=2))
    with pytest.raises(ValueError, match=f"a saved Stranger .*got one of {type(la).__name__}"):
        Stranger.load(tmp_path / "posterior", model_of())
    la.fitted.save(tmp_path / "fit")
    with pytest.raises(ValueError, match=r"a saved DebiasedLaplace in .*, got fit"):
        DebiasedLaplace.load(tmp_path / "fit", model_of())


class Stranger(DebiasedLaplace):
    """A user's class."""


@pytest.mark.parametrize("likelihood", ["classification", "reward_modeling", "bernoulli"])
def test_files_of_every_likelihood_and_subset(likelihood, tmp_path):
    x, y = loader_of("classification").dataset.tensors
    targets = torch.rand(N, C, generator=generator()).double() if likelihood == "bernoulli" else y
    for keywords in ({}, {"params": ["2"]}, {"subset_of_weights": "subnetwork", "params": ["2.bias", "0.weight"]}):
        la = DebiasedLaplace(model_of(), likelihood, hessian_structure="diag", **keywords)
        la.fit([(x, targets)])
        la.save(tmp_path / "posterior")
        other = DebiasedLaplace.load(tmp_path / "posterior", model_of())
        assert other.likelihood == la.likelihood
        assert type(other.output_likelihood) is type(la.output_likelihood)
        assert_equal(flat(other(X)), flat(la(X)), 0.0)
        assert_equal(other.mean, la.mean, 0.0)
        assert list(other.network.shapes) == list(la.network.shapes)


def test_files_of_ones_own_likelihood_and_class(tmp_path):
    la = Stranger(model_of(), Tempered())
    la.fit(loader_of("classification"))
    la.save(tmp_path / "posterior")
    with pytest.raises(ValueError, match="likelihood to be the Tempered of the file, got None"):
        DebiasedLaplace.load(tmp_path / "posterior", model_of())
    other = DebiasedLaplace.load(tmp_path / "posterior", model_of(), Tempered())
    assert type(other) is Stranger
    assert_equal(other(X), la(X), 0.0)


class Tempered(Categorical):
    """A user's likelihood."""


def test_a_fit_goes_on_from_its_checkpoint(tmp_path):
    la, again = (DebiasedKronLaplace(model_of(), "classification") for _ in range(2))
    la.fit(loader_of("classification"), checkpoint=tmp_path / "fit")
    again.fit([], checkpoint=tmp_path / "fit")  # no data are read
    assert_equal(again(X), la(X), 0.0)


# -- backends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_ggn_backend_is_what_we_compute_and_others_have_no_effect(case):
    own = CASES[case].own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backend in (None, laplace.curvature.CurvlinopsGGN, laplace.curvature.BackPackGGN):
            own(model_of(), "classification", backend=backend)
    for keywords in ({"backend": object}, {"backend_kwargs": {"colour": "red"}}):
        with pytest.warns(UserWarning, match="of backend arguments only the kind"):
            own(model_of(), "classification", **keywords)


@pytest.mark.parametrize("case", ["diag", "full"])
def test_the_backend_of_the_empirical_fisher(case):
    one, backend = CASES[case], laplace.curvature.CurvlinopsEF
    for likelihood, factor in (("classification", 1), ("regression", 2)):  # laplace-torch squares another factor
        ours = one.own(model_of(), likelihood, backend=backend)
        ours.fit(loader_of(likelihood), split=Single(), budget=None)
        model = model_of()
        with double_by_default():
            theirs = one.other(model, likelihood, backend=backend)
            theirs.fit(loader_of(likelihood))
        assert_equal(factor * ours.H, theirs.H)
        ours.fit(loader_of(likelihood), split=Single(), budget=None, curvature="ggn")
        assert_equal(ours.H, pair(case, likelihood)[0].H)


@pytest.mark.parametrize("case", CASES)
def test_the_random_vectors_of_a_backend(case):
    la = CASES[case].own(
        model_of(), "classification", backend=laplace.curvature.BackPackGGN,
        backend_kwargs={"stochastic": True, "num_samples": 3},
    )  # fmt: skip
    la.fit(loader_of("classification"))
    assert la.fitted.mc_samples == 3
    la.fit(loader_of("classification"), mc_samples=None)
    assert la.fitted.mc_samples is None
    exact = CASES[case].own(model_of(), "classification", backend_kwargs={"stochastic": False})
    exact.fit(loader_of("classification"))
    assert exact.fitted.mc_samples is None


def test_coverage_says_what_every_structure_gives():
    last = {
        "kron": ("2", "kronecker", "5 x 3"), "diag": ("2", "diagonal", "15"), "full": ("0, 2", "full", "dense 31"),
        "lowrank": ("0, 2", "low rank", "20 directions"),
    }  # fmt: skip
    for structure, (name, kind, shape) in last.items():
        lines = fitted(structure).coverage().splitlines()
        assert lines[-2].startswith(name + " ")
        assert f" {kind} " in lines[-2]
        assert lines[-2].endswith(shape)
        assert lines[-1].startswith("31 of 31 trainable parameters covered by ")


# -- the table of the documentation ----------------------------------------------------------------

STATES = ("same", "same, with a remark", "different", "not offered")


def table() -> dict[str, tuple[str, str]]:
    path = Path(debiased_laplace.__file__).parents[1] / "docs" / "laplace_torch.md"
    _, text = path.read_text().split("## Every public attribute")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*?) \|\s*([^|]*?)\s*\|$", text, flags=re.MULTILINE)
    names = [name for name, *_ in rows]
    assert len(names) == len(set(names)), "an attribute is in the table twice"
    return {name: (state, remark) for name, state, remark in rows}


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_") or name == "__call__"}


@pytest.fixture(scope="module")
def fitted_pairs() -> list[tuple[Any, Any]]:
    """Ours and theirs, of every class of laplace-torch that can be fitted."""
    pairs = [pair(case, "regression") for case in CASES if CASES[case].structure != "lowrank"]
    return [*pairs, *(subnetworks(structure, "regression", SUBNETWORKS["tensors"]) for structure in ("diag", "full"))]


def test_every_public_attribute_of_laplace_torch_is_in_the_table(fitted_pairs):
    expected = public(dir(laplace.ParametricLaplace)) | public(dir(laplace.LowRankLaplace))
    for _, theirs in fitted_pairs:
        expected |= public(vars(theirs)) | public(dir(type(theirs)))
    found = table()
    assert not expected - set(found), f"missing in the table: {sorted(expected - set(found))}"
    assert not set(found) - expected, f"no attributes of laplace-torch: {sorted(set(found) - expected)}"


def test_the_states_in_the_table_are_true(fitted_pairs):
    checked = set()
    for name, (state, remark) in table().items():
        assert state in STATES, f"{name}: {state!r}"
        assert bool(remark) == (state != "same"), f"{name}: {state!r} with the remark {remark!r}"
        for ours, theirs in fitted_pairs:
            if not (hasattr(theirs, name) and state.startswith("same")):
                continue
            checked.add(name)
            what = f"{name} of {type(ours).__name__}"
            assert hasattr(ours, name), what
            method = getattr(type(theirs), name, None)
            assert callable(getattr(ours, name)) == callable(getattr(theirs, name)), what
            if not inspect.isfunction(method):
                continue
            expected = inspect.signature(method).parameters
            found = inspect.signature(getattr(type(ours), name)).parameters
            assert [n for n in found if n in expected] == list(expected), what
            assert [found[n].kind for n in expected] == [p.kind for p in expected.values()], what
            assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for n, p in found.items() if n not in expected), what
        if not state.startswith("same"):
            assert not any(hasattr(ours, name) for ours, _ in fitted_pairs), f"{name} is offered"
    assert checked == {name for name, (state, _) in table().items() if state.startswith("same")}
