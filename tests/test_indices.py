"""Posteriors over single entries of the parameter vector: everything else has no uncertainty."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from debiased_laplace import testing
from debiased_laplace.curvature.structures import Diagonal, Full, Kronecker, LowRank
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.posterior.evidence import maximise_marginal_likelihood
from debiased_laplace.posterior.predictive import functional_moments, joint_covariance
from debiased_laplace.sampling.samplers import UniformSampler
from debiased_laplace.sampling.splits import Single, TwoBatch
from tests.tolerances import assert_equal

STRUCTURES = [Full(), LowRank(200), Diagonal()]
PROBLEMS = testing.problems()


def fitted(problem, structure, indices, **options) -> Fit:
    loader = [(problem.data.inputs, problem.data.targets)]
    options = {"split": Single(), "sampler": UniformSampler(None), **options}
    return fit(problem.model, loader, problem.likelihood, structure=structure, indices=indices, **options)


def some_indices(problem) -> torch.Tensor:
    """Entries of every parameter."""
    size = sum(p.numel() for p in problem.model.parameters() if p.requires_grad)
    return torch.randperm(size, generator=torch.Generator().manual_seed(1))[: 3 * size // 4].sort().values


def dense(problem, structure, indices) -> torch.Tensor:
    """The curvature of the entries alone."""
    n = len(problem.data)
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    ggn = testing.dense_ggn(problem.model, problem.data.inputs, weights, problem.likelihood)[indices][:, indices]
    return torch.diag(ggn.diagonal()) if isinstance(structure, Diagonal) else ggn


@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_the_posterior_of_some_entries_is_the_dense_one(problem, structure, per_parameter):
    indices = some_indices(problem)
    result = fitted(problem, structure, indices)
    network, inputs, n = result.network, problem.data.inputs, len(problem.data)
    d = network.n_params
    prior = torch.linspace(0.5, 2, d).double() if per_parameter else torch.tensor([0.7]).double()
    posterior = replace(result.posterior, prior_precision=prior, prior_mean=0.3)
    own = prior.expand(d)[indices]
    precision = n * dense(problem, structure, indices) + torch.diag(own)
    covariance = precision.inverse()

    def embedded(matrix):
        whole = torch.zeros(d, d).double()
        whole[indices[:, None], indices] = matrix
        return whole

    identity = torch.eye(d).double()
    assert_equal(posterior.matvec(identity), embedded(precision))
    assert_equal(posterior.covariance_matvec(identity), embedded(covariance))
    assert_equal(posterior.log_det_precision, torch.logdet(precision))
    assert_equal(posterior.log_det_prior_precision, own.log().sum())
    assert_equal(posterior.log_det_ratio, torch.logdet(precision) - own.log().sum())
    assert_equal(posterior.scatter(), (own * (posterior.mean[indices] - 0.3).square()).sum())
    pushed = posterior.transform(torch.eye(posterior.n_normals).double())
    assert_equal(pushed.mT @ pushed, embedded(covariance))
    values = posterior.mean + torch.randn(3, d, generator=torch.Generator().manual_seed(0)).double()
    delta = (values - posterior.mean)[:, indices]
    assert_equal(posterior.square_norm(values), torch.einsum("nd,de,ne->n", delta, precision, delta))
    normal = torch.distributions.MultivariateNormal(posterior.mean[indices], precision_matrix=precision)
    assert_equal(posterior.log_prob(values), normal.log_prob(values[:, indices]))
    samples = posterior.sample(4, torch.Generator().manual_seed(0))
    rest = torch.ones(d).bool()
    rest[indices] = False
    assert_equal(samples[:, rest], posterior.mean[rest].expand(4, -1), 0.0)

    jacobians = testing.dense_jacobian(problem.model, inputs)[..., indices]
    expected = jacobians @ covariance @ jacobians.mT
    assert_equal(functional_moments(network, posterior, inputs)[1], expected)
    grid = [posterior, replace(posterior, prior_precision=3 * prior)]
    tighter = (precision + 2 * torch.diag(own)).inverse()
    variances = functional_moments(network, grid, inputs, covariance=False)[1]
    assert_equal(variances[0], expected.diagonal(dim1=1, dim2=2))
    assert_equal(variances[1], (jacobians @ tighter @ jacobians.mT).diagonal(dim1=1, dim2=2))
    rows = jacobians.flatten(0, 1)
    assert_equal(joint_covariance(network, posterior, inputs)[1], rows @ covariance @ rows.mT)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_directions_of_other_data_and_the_marginal_likelihood_stay_within_the_entries(structure):
    problem = PROBLEMS[0]
    indices = some_indices(problem)
    result = fitted(problem, structure, indices, split=TwoBatch())
    fixed = torch.ones(result.network.n_params).bool()
    fixed[indices] = False
    if not isinstance(structure, Diagonal):
        assert not bool(testing.dense_basis(result.posterior.basis)[fixed].any())
    (best,) = maximise_marginal_likelihood(result.posterior)
    at = [
        float(replace(result.posterior, prior_precision=(best * factor).reshape(1)).log_marginal_likelihood(0.0))
        for factor in (0.999, 1, 1.001)
    ]
    assert at[1] > max(at[0], at[2])


def test_entries_of_one_parameter_leave_the_others_out():
    problem = PROBLEMS[0]
    result = fitted(problem, Full(), torch.tensor([1, 5, 2]))
    assert list(result.network.shapes) == ["0.weight"]
    assert result.posterior.basis.rank == 3


def test_all_entries_are_no_subset():
    problem = PROBLEMS[0]
    everything = torch.arange(sum(p.numel() for p in problem.model.parameters()))
    one, other = fitted(problem, Kronecker(), everything), fitted(problem, Kronecker(), None)
    assert one.network.free is None
    assert_equal(one.posterior.curvatures, other.posterior.curvatures, 0.0)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_a_saved_fit_keeps_the_entries(structure, tmp_path):
    problem = PROBLEMS[0]
    result = fitted(problem, structure, some_indices(problem))
    result.save(tmp_path / "fit.safetensors")
    loaded = Fit.load(tmp_path / "fit.safetensors", problem.model)
    inputs = problem.data.inputs
    found, expected = (functional_moments(f.network, f.posterior, inputs)[1] for f in (loaded, result))
    assert_equal(found, expected, 0.0)
    assert torch.equal(loaded.network.free, result.network.free)


@pytest.mark.parametrize(
    ("structure", "options", "match"),
    [
        (Kronecker(), {}, "whole parameters for a Kronecker structure"),
        (Full(), {"indices": torch.tensor([3, 3])}, "different indices from 0 to 30, got 2 of which 1 differ"),
        (Full(), {"indices": torch.tensor([-1])}, "different indices from 0 to 30"),
        (Full(), {"indices": torch.tensor([31])}, "different indices from 0 to 30"),
        (Full(), {"indices": torch.tensor([True])}, "a non-empty vector of int64"),
        (Full(), {"indices": torch.tensor([], dtype=torch.long)}, "a non-empty vector of int64"),
        (Full(), {"parameters": ["0.*"]}, "either parameters or indices, got both"),
    ],
)
def test_bad_indices(structure, options, match):
    problem = PROBLEMS[0]
    options = {"indices": some_indices(problem), **options}
    with pytest.raises(ValueError, match=match):
        fitted(problem, structure, **options)
