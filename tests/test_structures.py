"""All structures on the zoo of networks, and posteriors with one prior precision for each parameter."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from debiased_laplace import Single, TwoBatch, UniformSampler
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.parts.dense import DenseBasis
from debiased_laplace.curvature.structures import Diagonal, Full, Kronecker, LowRank
from debiased_laplace.fitting.fit import fit
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.predictive import functional_moments, joint_covariance, linearized_samples
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.testing import (
    check_basis,
    check_curvatures,
    check_posterior,
    check_predictive,
    check_projection,
    dense_jacobian,
    dense_posterior_precision,
)
from tests.datasets import example, measure, targets, valid, weighted
from tests.networks import ZOO
from tests.tolerances import assert_equal

STRUCTURES = [Diagonal(), Full(), LowRank(4), LowRank(2, blocks="layer")]


@cache
def network_of(name: str) -> Network:
    """Found once for all structures."""
    return Network.discover(ZOO[name].model(), ZOO[name].inputs(4))


def pair_of_data(name: str, likelihood: Likelihood) -> tuple[Network, WeightedData, WeightedData]:
    """A network of the zoo, data to choose directions by, and others to measure curvatures with."""
    case = ZOO[name]
    first, second = (
        weighted(case.inputs(n, seed=seed), targets(likelihood, n, case.n_outputs, seed))
        for n, seed in ((4, 1), (3, 7))
    )
    return network_of(name), first, second


def posterior_of(structure, network: Network, first, second, likelihood, **fields) -> Posterior:
    basis = structure.eigenbasis(network, measure(structure, network, first, likelihood))
    curvatures = check_curvatures(network, basis, second, likelihood)
    arguments = {"n_data": 40, "prior_precision": torch.tensor([0.6], dtype=torch.float64)} | fields
    return Posterior(network.mean(), basis, curvatures, **arguments)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_curvatures_and_predictions_are_the_dense_ones(name, structure):
    """Directions from some data, curvatures from others."""
    case = ZOO[name]
    likelihood = valid(Categorical(), case)
    if name == "without-influence" and structure == LowRank(2, blocks="layer"):
        structure = LowRank(3)  # a block without curvature has no directions of its own
    network, first, second = pair_of_data(name, likelihood)
    assert network.n_params <= 400
    posterior = posterior_of(structure, network, first, second, likelihood)
    check_projection(network, posterior.basis, second.inputs)
    check_predictive(network, posterior, case.inputs(2, seed=5))


# -- one prior precision for each parameter --------------------------------------------------------


def regression(n_outputs: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model with squared loss: every eigenvalue of the curvature comes as often as there are outputs."""
    torch.manual_seed(0)
    return nn.Linear(2, n_outputs).double(), torch.randn(9, 2).double(), torch.randn(9, n_outputs).double()


def regression_posterior(structure, **fields) -> Posterior:
    model, inputs, labels = regression()
    return fit(
        model,
        [(inputs, labels)],
        Gaussian(),
        structure=structure,
        sampler=UniformSampler(None),
        split=Single(),
        **fields,
    ).posterior


def classification_posterior(structure, **fields) -> Posterior:
    case = ZOO["mlp"]
    batch = [(case.inputs(9), targets(Categorical(), 9, 2))]
    sampler = UniformSampler(None)
    return fit(case.model(), batch, Categorical(), structure=structure, sampler=sampler, **fields).posterior


PER_PARAMETER = [Diagonal(), Full(), Full(blocks="layer"), LowRank(3), LowRank(100), LowRank(2, blocks="layer")]


@pytest.mark.parametrize("structure", PER_PARAMETER, ids=repr)
@pytest.mark.parametrize("make", [regression_posterior, classification_posterior])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_every_formula_with_one_prior_for_each_parameter(make, structure, temperature):
    base = make(structure, temperature=temperature)
    prior = torch.linspace(0.3, 3, len(base.mean), dtype=torch.float64)
    posterior = replace(base, prior_precision=prior, prior_mean=0.2, noise_variance=0.7)
    check_posterior(posterior)
    if posterior.normal_form is not posterior:
        check_basis(posterior.normal_form.basis)


@pytest.mark.parametrize("structure", [Diagonal(), Full(), LowRank(4), LowRank(2, blocks="layer")], ids=repr)
@pytest.mark.parametrize("name", ["cnn", "transformer", "lone-parameters", "tied-weights", "embedding"])
def test_predictions_with_one_prior_for_each_parameter(name, structure):
    case = ZOO[name]
    network, first, second = pair_of_data(name, Categorical())
    prior = torch.linspace(0.3, 3, network.n_params, dtype=torch.float64)
    posterior = posterior_of(structure, network, first, second, Categorical(), prior_precision=prior)
    check_predictive(network, posterior, case.inputs(2, seed=5))


@pytest.mark.parametrize("structure", PER_PARAMETER, ids=repr)
@pytest.mark.parametrize("make", [regression_posterior, classification_posterior])
@pytest.mark.parametrize("start", ["equal", "different"])
def test_derivatives_in_every_prior_precision(make, structure, start):
    """Against finite differences; also where priors or eigenvalues coincide."""
    base = make(structure)
    mean = torch.linspace(-1, 1, len(base.mean), dtype=torch.float64)
    d = len(base.mean)
    point = torch.full((d,), -0.2) if start == "equal" else torch.linspace(-1, 1, d)

    for of in (
        lambda p: p.log_det_ratio,
        lambda p: p.log_det_prior_precision,
        lambda p: p.log_det_precision,
        lambda p: p.scatter(),
        lambda p: p.log_marginal_likelihood(-3.0),
    ):

        def value(log_prior: Tensor, of=of) -> Tensor:
            return of(replace(base, mean=mean, prior_precision=log_prior.exp(), prior_mean=0.3))

        assert torch.autograd.gradcheck(value, point.double().requires_grad_())


@pytest.mark.parametrize("structure", PER_PARAMETER, ids=repr)
def test_derivatives_are_the_diagonal_of_the_covariance(structure):
    r"""The derivative of log det P in the prior precisions is the diagonal of P^-1."""
    base = classification_posterior(structure)
    for prior in (torch.linspace(0.3, 3, len(base.mean)), torch.ones(len(base.mean))):
        leaf = prior.double().requires_grad_()
        posterior = replace(base, prior_precision=leaf)
        (found,) = torch.autograd.grad(posterior.log_det_precision, leaf)
        assert_equal(found, dense_posterior_precision(posterior).inverse().diagonal())


@pytest.mark.parametrize("structure", [*PER_PARAMETER, Kronecker()], ids=repr)
def test_equal_priors_are_a_single_one(structure):
    base = classification_posterior(structure)
    one = replace(base, prior_precision=torch.tensor([0.7], dtype=torch.float64))
    all_equal = replace(base, prior_precision=torch.full((len(base.mean),), 0.7, dtype=torch.float64))
    identity = torch.eye(len(base.mean), dtype=torch.float64)
    for of in (
        lambda p: p.precisions,
        lambda p: p.matvec(identity),
        lambda p: p.covariance_matvec(identity),
        lambda p: p.log_det_precision,
        lambda p: p.log_det_ratio,
        lambda p: p.scatter(),
        lambda p: p.square_norm(identity),
        lambda p: p.sample(3, torch.Generator().manual_seed(0)),
    ):
        assert_equal(of(all_equal), of(one), 0.0)


def test_equal_priors_within_every_part_need_no_other_coordinates():
    base = classification_posterior(LowRank(2, blocks="layer"))
    per_part = replace(base, prior_precision=torch.tensor([0.5, 2.0], dtype=torch.float64))
    per_parameter = replace(base, prior_precision=torch.tensor([0.5] * 16 + [2.0] * 10, dtype=torch.float64))
    assert per_parameter.normal_form is per_parameter
    assert_equal(per_parameter.precisions, per_part.precisions, 0.0)
    check_posterior(per_parameter)


def test_kronecker_directions_mix_parameters():
    base = classification_posterior(Kronecker())
    posterior = replace(base, prior_precision=torch.linspace(0.3, 3, 26, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"one prior precision for all of \['0.weight', '0.bias'\], .*use a diagonal"):
        _ = posterior.precisions
    with pytest.raises(ValueError, match="for one tensor, which its directions mix"):
        posterior.sample(1)


@pytest.mark.parametrize("structure", [Diagonal(), Full(), LowRank(3)], ids=repr)
def test_as_many_priors_as_parameters_or_parts(structure):
    base = classification_posterior(structure)
    with pytest.raises(ValueError, match="or one for each of the 26 parameters, got 25"):
        replace(base, prior_precision=torch.ones(25))


@pytest.mark.parametrize("structure", [Full(), LowRank(3), Diagonal()], ids=repr)
def test_without_any_curvature_the_posterior_is_the_prior(structure):
    base = classification_posterior(structure)
    prior = torch.linspace(0.3, 3, 26, dtype=torch.float64)
    posterior = replace(base, curvatures=torch.zeros_like(base.curvatures), prior_precision=prior)
    assert_equal(posterior.matvec(torch.eye(26, dtype=torch.float64)), torch.diag(prior))
    assert_equal(posterior.covariance_matvec(torch.eye(26, dtype=torch.float64)), torch.diag(1 / prior))
    assert float(posterior.log_det_ratio) == 0
    pushed = posterior.transform(torch.eye(posterior.n_normals, dtype=torch.float64))
    assert_equal(pushed.mT @ pushed, torch.diag(1 / prior))
    network, inputs = Network.discover(ZOO["mlp"].model(), ZOO["mlp"].inputs(3)), ZOO["mlp"].inputs(3, seed=5)
    jacobians = dense_jacobian(network.model, inputs)
    _, covariance = functional_moments(network, posterior, inputs)
    assert_equal(covariance, (jacobians / prior) @ jacobians.mT)


@pytest.mark.parametrize("structure", PER_PARAMETER, ids=repr)
def test_samples_and_their_outputs_with_one_prior_for_each_parameter(structure):
    case = ZOO["mlp"]
    model, inputs = case.model(), case.inputs(3, seed=5)
    network = Network.discover(model, inputs)
    posterior = replace(
        classification_posterior(structure), prior_precision=torch.linspace(0.3, 3, 26, dtype=torch.float64)
    )
    pushed = posterior.transform(torch.eye(posterior.n_normals, dtype=torch.float64))
    outputs = linearized_samples(network, posterior.mean, pushed, inputs) - model(inputs).detach()
    _, covariance = joint_covariance(network, posterior, inputs)
    assert_equal(outputs.flatten(1).mT @ outputs.flatten(1), covariance)


def test_a_grid_of_priors_for_each_parameter():
    """Posteriors whose priors turn the directions share nothing, and give the same as one by one."""
    case = ZOO["mlp"]
    base = classification_posterior(LowRank(3))
    network, inputs = Network.discover(case.model(), case.inputs(3)), case.inputs(3, seed=5)
    grid = [replace(base, prior_precision=torch.linspace(0.1, k, 26, dtype=torch.float64)) for k in (1, 2)]
    grid.append(replace(base, prior_precision=torch.tensor([0.3], dtype=torch.float64)))
    for covariance in (True, False):
        mean, several = functional_moments(network, grid, inputs, covariance=covariance)
        for posterior, spread in zip(grid, several, strict=True):
            one_mean, one = functional_moments(network, posterior, inputs, covariance=covariance)
            assert_equal(spread, one, 0.0)
            assert_equal(mean, one_mean, 0.0)


# -- dense bases -----------------------------------------------------------------------------------


def test_a_dense_part_may_span_any_blocks():
    """Directions of two blocks that are no neighbours, with another block between them."""
    case = ZOO["cnn"]
    _, network, data = example(case, Categorical())
    structure = LowRank(3, blocks=[["0.*", "6.*"], ["2.*"]])
    posterior = posterior_of(
        structure, network, data, data, Categorical(), prior_precision=torch.tensor([0.4, 3.0], dtype=torch.float64)
    )
    assert posterior.basis.members == [(0, 2), (1,)]
    check_basis(posterior.basis)
    check_projection(network, posterior.basis, data.inputs)
    check_posterior(posterior)
    check_predictive(network, posterior, case.inputs(2, seed=5))
    jacobians = dense_jacobian(network.model, data.inputs)
    zero = [n for n, p in network.model.named_parameters() if n.startswith("2")]
    first = posterior.basis.lift(torch.eye(posterior.basis.rank, dtype=torch.float64)[:3])
    assert all(not bool(network.from_vector(first)[name].any()) for name in zero)
    assert jacobians.shape[-1] == posterior.basis.n_params


def test_a_part_without_columns():
    case = ZOO["mlp"]
    _, network, data = example(case, Categorical())
    shapes = [(0, b.groups, b.outputs, b.inputs) for b in network.blocks]
    part = DenseBasis(tuple(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
    basis = Basis(network.blocks, network.shapes, [part], [(0, 1)])
    assert (basis.rank, basis.n_params, part.n_params, basis.complete) == (0, 26, 26, False)
    posterior = Posterior(network.mean(), basis, torch.zeros(0).double(), 10, torch.tensor([2.0]).double())
    identity = torch.eye(26, dtype=torch.float64)
    assert_equal(posterior.matvec(identity), 2 * identity)
    _, covariance = functional_moments(network, posterior, data.inputs)
    jacobians = dense_jacobian(network.model, data.inputs)
    assert_equal(covariance, jacobians @ jacobians.mT / 2)


@pytest.mark.parametrize("structure", [Kronecker(), Diagonal(), Full(), LowRank(3)], ids=repr)
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=lambda x: type(x).__name__)
def test_fits_measure_the_second_data(structure, likelihood):
    """The composition, for every structure and likelihood: curvatures of the data that measure them."""
    case = ZOO["cnn"]
    inputs, labels = case.inputs(14), targets(likelihood, 14, 2)
    result = fit(
        case.model(),
        [(inputs, labels)],
        likelihood,
        structure=structure,
        sampler=UniformSampler(None),
        split=TwoBatch(),
        n_data=10**12,  # so that the data stand for nearly nothing but others
    )
    own = result.curvature_indices
    data = replace(result.sample.part(1), weights=torch.full((7,), 1 / 7, dtype=torch.float64))
    assert torch.equal(data.indices, own)
    assert_equal(data.inputs, inputs[own], 0.0)
    expected = check_curvatures(result.network, result.posterior.basis, data, likelihood)
    assert_equal(result.posterior.curvatures, expected)
    assert len(CurvatureData(result.network, data, likelihood)) == 7
