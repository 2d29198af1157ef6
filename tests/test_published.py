"""The halvings and predictions of ``eval/published.py``: nobody judges what it chose, and links are the package's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from debiased_laplace.likelihoods import Categorical
from tests.test_eval import experiments
from tests.tolerances import assert_equal

__all__ = ["experiments"]


@pytest.fixture
def published(experiments):
    import published

    return published


def moments(n: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and covariances at eleven prior precisions, smaller and smaller."""
    random = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(n, 10, generator=random, dtype=torch.float64)
    roots = torch.randn(n, 10, 10, generator=random, dtype=torch.float64)
    return mean, torch.stack([roots @ roots.mT / 2**step for step in range(11)])


@pytest.mark.parametrize("link", ["probit", "mean_field", "mc"])
def test_predictions_are_those_of_the_likelihood(link, published):
    mean, covariances = moments()
    normals = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    likelihood, covariance = Categorical(), covariances[3] / 1.5**2
    wanted = covariance if likelihood.needs_covariance(link) else covariance.diagonal(dim1=1, dim2=2)
    expected = likelihood.predictive(mean / 1.5, wanted, link, normals)
    result = published.Predictions(mean, covariances, link, normals).at(3, 1.5)
    assert_equal(result, expected, 1e-6 if link == "mc" else 1e-12)  # draws are in single precision


def test_nobody_judges_what_it_chose(published):
    """The setting that one half prefers is the other half's: with opposite labels of the halves it is the wrong one."""
    of, labels = moments(), torch.arange(12) % 10
    table = published.Table({"test": of}, labels, "mean_field", torch.zeros(1, 10))
    halves = torch.randperm(12, generator=torch.Generator().manual_seed(0)).chunk(2)
    rows = [table.tuned(half, temperature=True, rule="best") for half in halves]
    for half, row in zip(halves, rows, strict=True):
        losses = table.losses["test"][:, half].mean(1)
        assert float(losses[row]) == float(losses.min())
    found = published.judged(table, labels.numpy(), temperature=True, rule="best")
    for half, row in zip(halves, rows[::-1], strict=True):
        assert_equal(torch.from_numpy(found["losses"]["test"][0])[half], table.losses["test"][row, half], 1e-12)
    assert len(found["losses"]["test"]) == published.SPLITS


def test_the_rule_takes_the_most_uncertainty_that_is_as_good(published):
    of, labels = moments(40), torch.arange(40) % 10
    table = published.Table({"test": of}, labels, "mean_field", torch.zeros(1, 10))
    data = torch.arange(40)
    best, row = (table.tuned(data, temperature=True, rule=rule) for rule in ("best", "one standard error"))
    losses, prior = table.losses["test"], table.settings[row][0]
    difference = losses[row] - losses[best]
    assert float(difference.mean()) <= float(difference.std()) / 40**0.5
    for smaller in range(prior):
        rows = [i for i, (r, _) in enumerate(table.settings) if r == smaller]
        least = losses[min(rows, key=lambda i: float(losses[i].mean()))] - losses[best]
        assert float(least.mean()) > float(least.std()) / 40**0.5


def test_without_a_temperature_there_is_none(published):
    of, labels = moments(), torch.arange(12) % 10
    table = published.Table({"test": of}, labels, "probit", torch.zeros(1, 10))
    assert table.settings[table.tuned(torch.arange(12), temperature=False, rule="best")][1] == 1


def test_moments_are_kept(published, tmp_path):
    kept, (mean, covariances) = published.Kept(tmp_path / "network"), moments()
    assert not kept.has("a method", ["test"])
    kept.write("a method", "test", (mean, covariances))
    assert kept.has("a method", ["test"]) and not kept.has("a method", ["test", "rotated"])
    for result, expected in zip(kept.read("a method", "test"), (mean, covariances), strict=True):
        assert_equal(result, expected, 1e-14)  # the product above is symmetric but for rounding


def test_the_calibration_error_is_the_suite_s(published):
    from debiased_laplace.evaluation.scores.calibration import expected_calibration_error

    random = np.random.default_rng(0)
    probabilities, labels = random.dirichlet([0.3] * 10, 200), random.integers(0, 10, 200)
    expected = expected_calibration_error(probabilities, labels)
    assert abs(published.calibration_error(probabilities, labels) - expected) < 1e-12


def test_the_network_takes_the_published_weights(published, tmp_path):
    """Names and shapes are those of chenyaofo/pytorch-cifar-models: 272,474 and 855,770 parameters."""
    (tmp_path / "cifar10-bayesipy").mkdir()
    for name, size in (("resnet20", 272_474), ("resnet56", 855_770)):
        model = published.ResNet(int(name[6:]))
        assert sum(p.numel() for p in model.parameters()) == size
        assert {"layer2.0.downsample.0.weight", "layer3.0.downsample.1.bias", "fc.weight"} <= set(model.state_dict())
        torch.save(model.state_dict(), tmp_path / "cifar10-bayesipy" / f"cifar10_{name}.pt")
        loaded = published.network(name, tmp_path)
        assert not loaded.training and loaded(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
