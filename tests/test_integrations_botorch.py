"""A posterior as a model of BoTorch: joint predictions and their gradients against dense autograd, and acquisitions."""

from __future__ import annotations

import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.optim import optimize_acqf
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.integrations.botorch import LaplaceModel
from debiased_laplace.testing import dense_posterior_precision
from tests.tolerances import assert_equal

STRUCTURES = [dl.Kronecker(), dl.Diagonal(), dl.Full(), dl.LowRank(rank=5)]


def network(n_outputs: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, n_outputs)).double()


def fitted(n_outputs: int = 2, **settings) -> dl.Laplace:
    x = torch.rand(30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.stack([x.sum(1), x.prod(1)], 1)[:, :n_outputs]
    return dl.fit(network(n_outputs), [(x, y)], "regression", **{"prior_precision": 0.7, **settings})


def points(*shape: int) -> Tensor:
    return torch.rand(*shape, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()


def dense(posterior: dl.Laplace, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``[q C]`` and their covariance at points ``[q, d]``, by autograd one output after the other."""
    model = network()
    outputs, parameters = model(x).flatten(), list(model.parameters())
    gradients = [torch.autograd.grad(f, parameters, create_graph=True) for f in outputs]
    rows = torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in gradients])
    return outputs, rows @ dense_posterior_precision(posterior.posterior).inverse() @ rows.mT


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_joint_predictions_and_their_gradients_are_those_of_dense_autograd(structure):
    posterior, x = fitted(structure=structure), points(2, 4)
    normal = LaplaceModel(posterior).posterior(x)
    covariance = normal.distribution.covariance_matrix
    weights = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradient = torch.autograd.grad((covariance * weights).sum() + normal.mean.square().sum(), x)[0]
    for batch in range(2):
        at = x[batch].detach().requires_grad_()
        mean, expected = dense(posterior, at)
        assert_equal(normal.mean[batch].flatten(), mean)
        assert_equal(covariance[batch], expected)
        assert_equal(normal.variance[batch].flatten(), expected.diagonal())
        value = (expected * weights[batch]).sum() + mean.square().sum()
        assert_equal(gradient[batch], torch.autograd.grad(value, at)[0])


def test_predictions_are_those_of_the_posterior():
    posterior, x = fitted(parameters="last_layer", noise_variance=0.3), points(6)
    normal, prediction = LaplaceModel(posterior).posterior(x), posterior.predict(x.detach())
    assert_equal(normal.mean, prediction.mean)
    assert_equal(normal.variance, prediction.epistemic_variance)
    noisy = LaplaceModel(posterior).posterior(x, observation_noise=True)
    assert_equal(noisy.variance, prediction.variance)
    noise = noisy.distribution.covariance_matrix - normal.distribution.covariance_matrix
    assert_equal(noise, 0.3 * torch.eye(12, dtype=torch.float64))


def test_some_outputs_and_a_transform():
    model, x = LaplaceModel(fitted()), points(2, 4)
    whole, second = model.posterior(x), model.posterior(x, output_indices=[1])
    assert_equal(second.mean, whole.mean[..., 1:])
    assert_equal(second.distribution.covariance_matrix, whole.distribution.covariance_matrix[:, 1::2, 1::2])
    weights = torch.tensor([0.3, -2.0], dtype=torch.float64)
    scalar = model.posterior(x, posterior_transform=ScalarizedPosteriorTransform(weights))
    assert_equal(scalar.mean[..., 0], whole.mean @ weights)


def test_outputs_are_counted_from_the_end_too():
    x, y = torch.randn(20, 2).double(), torch.randn(20, 3).double()
    model = LaplaceModel(dl.fit(torch.nn.Linear(2, 3).double(), [(x, y)], "regression"))
    points = torch.randn(4, 2).double()
    last, third = model.posterior(points, [-1]), model.posterior(points, [2])
    assert_equal(last.variance, third.variance)
    with pytest.raises(IndexError, match=r"Expected output_indices of 3 outputs, got \[3\]"):
        model.posterior(points, [3])


def test_acquisitions_are_optimised():
    model = LaplaceModel(fitted(1, noise_variance=1e-3))
    bounds = torch.tensor([[0.0] * 3, [1.0] * 3], dtype=torch.float64)
    for acquisition, q in [(LogExpectedImprovement(model, 2.0), 1), (qLogExpectedImprovement(model, 2.0), 2)]:
        x = bounds[0] + (bounds[1] - bounds[0]) * points(50, q).detach()
        best, value = optimize_acqf(acquisition, bounds, q=q, num_restarts=2, raw_samples=16)
        assert best.shape == (q, 3)
        assert float(value) >= float(acquisition(x).max())


def test_what_is_refused():
    x = torch.rand(9, 3, dtype=torch.float64)
    classes = dl.fit(network(), [(x, torch.arange(9) % 2)], "classification")
    with pytest.raises(ValueError, match=r"Expected the posterior of a regression .*, got one of Categorical\(\)"):
        LaplaceModel(classes)
    with pytest.raises(NotImplementedError, match="observation_noise to be True or False, got a tensor"):
        LaplaceModel(fitted()).posterior(x, observation_noise=torch.ones(9, 1))
