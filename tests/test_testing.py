"""The conformance laws hold for every structure, and notice when they are broken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from debiased_laplace import testing
from debiased_laplace.curvature.parts.kronecker import KroneckerBasis
from debiased_laplace.curvature.structures import Diagonal, Full, Isotropic, Kronecker, LowRank
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.gaussian import Posterior
from tests.tolerances import EXACT, assert_equal

STRUCTURES = [
    Kronecker(), Diagonal(), Isotropic(), Full(), Full(blocks="layer"), LowRank(), LowRank(rank=4),
    LowRank(rank=2, blocks="layer"),
]  # fmt: skip


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_every_law_holds(structure, device):
    testing.check_structure(structure, tolerance=EXACT, device=device)


def example():
    problem = testing.problems()[0]
    network = Network.discover(problem.model, problem.data.inputs)
    statistics = Kronecker().measure(network, CurvatureData(network, problem.data, problem.likelihood))
    return problem, network, statistics, Kronecker().eigenbasis(network, statistics)


def test_the_laws_notice_a_basis_that_is_not_orthonormal():
    *_, basis = example()
    first = basis.parts[0]
    broken = replace(basis, parts=[KroneckerBasis(1.001 * first.outputs, first.inputs), *basis.parts[1:]])
    with pytest.raises(AssertionError, match="orthonormal columns"):
        testing.check_basis(broken)


def test_the_laws_notice_statistics_that_are_averages():
    class Averages(Kronecker):
        def measure(self, network, data):
            statistics = super().measure(network, data)
            total = float(data.data.weights.sum())
            return replace(statistics, of_inputs=[a * (1 / total) for a in statistics.of_inputs])

    with pytest.raises(AssertionError, match="Averages on 'dense, categorical': statistics add up"):
        testing.check_structure(Averages())


def test_the_laws_notice_a_structure_that_remembers():
    class Remembers(Kronecker):
        calls = 0

        def measure(self, network, data):
            type(self).calls += 1
            statistics = super().measure(network, data)
            scale = 1 + 1e-7 * type(self).calls
            return replace(statistics, of_inputs=[a * scale for a in statistics.of_inputs])

    with pytest.raises(AssertionError, match="Remembers on"):
        testing.check_structure(Remembers())


def test_the_laws_notice_a_wrong_posterior():
    problem, network, _, basis = example()

    class Doubled(Posterior):
        @property
        def scale(self):
            return 2 * super().scale

    posterior = Doubled(network.mean(), basis, torch.ones(basis.rank).double(), 10, torch.ones(1).double())
    with pytest.raises(AssertionError, match=r"matvec is P v, equation \(3\)"):
        testing.check_posterior(posterior)
    with pytest.raises(AssertionError, match="functional covariance"):
        testing.check_predictive(network, posterior, problem.data.inputs)


def test_the_laws_notice_wrong_curvatures():
    problem, network, _, basis = example()
    halved = replace(problem.data, weights=problem.data.weights.clone())

    class Halved(Categorical):
        def hessian_square_root(self, outputs, targets):
            return super().hessian_square_root(outputs, targets) / 2

    with pytest.raises(AssertionError, match="curvatures are diag"):
        testing.check_curvatures(network, basis, halved, Halved())
    with pytest.raises(AssertionError, match="the loss Hessian"):
        testing.check_likelihood(Halved(), torch.randn(3, 4).double(), torch.tensor([0, 1, 3]))


def test_a_failure_names_the_law_and_the_difference():
    with pytest.raises(AssertionError, match=r"some law: the largest difference is 0\.5, 0\.25 of the largest"):
        testing.assert_close("some law", torch.tensor([1.5, 2.0]), torch.tensor([1.0, 2.0]), 1e-9)
    with pytest.raises(AssertionError, match=r"some law: expected shape \(2,\), got \(3,\)"):
        testing.assert_close("some law", torch.ones(3), torch.ones(2), 1e-9)
    with pytest.raises(AssertionError, match="some law"):
        testing.assert_close("some law", torch.tensor([float("nan")]), torch.ones(1), 1e-9)


def test_dense_jacobian_and_ggn_by_hand():
    """For f = w x + b with a squared loss: the matrix is the second moment of (x, 1)."""
    model = torch.nn.Linear(1, 1).double()
    x = torch.tensor([[2.0], [3.0]]).double()
    assert_equal(testing.dense_jacobian(model, x), torch.tensor([[[2.0, 1.0]], [[3.0, 1.0]]]).double())
    ggn = testing.dense_ggn(model, x, torch.tensor([0.25, 0.75]), Gaussian())
    assert_equal(ggn, torch.tensor([[0.25 * 4 + 0.75 * 9, 0.25 * 2 + 0.75 * 3], [2.75, 1.0]]).double())


def test_dense_reference_leaves_the_mode_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)).double().train()
    testing.dense_ggn(model, torch.randn(2, 2).double(), torch.ones(2), Bernoulli())
    assert all(module.training for module in model.modules())


def test_truncated_bases_are_incomplete_in_every_block():
    *_, basis = example()
    cut = testing.truncate(basis)
    assert not cut.complete
    assert all(not part.complete for part in cut.parts)
