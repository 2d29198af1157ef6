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
    table = published.Table({"test": of}, published.PRIORS, labels, "mean_field", torch.zeros(1, 10))
    halves = torch.randperm(12, generator=torch.Generator().manual_seed(0)).chunk(2)
    rows = [table.tuned(half, temperature=True, rule="best") for half in halves]
    for half, row in zip(halves, rows, strict=True):
        losses = table.losses[:, half].mean(1)
        assert float(losses[row]) == float(losses.min())
    found = published.judged(table, labels.numpy(), temperature=True, rule="best")
    for half, row in zip(halves, rows[::-1], strict=True):
        assert_equal(torch.from_numpy(found["losses"]["test"][0])[half], table.losses[row, half], 1e-12)
    assert len(found["losses"]["test"]) == published.SPLITS


def test_the_rule_takes_the_most_uncertainty_that_is_as_good(published):
    of, labels = moments(40), torch.arange(40) % 10
    table = published.Table({"test": of}, published.PRIORS, labels, "mean_field", torch.zeros(1, 10))
    data = torch.arange(40)
    best, row = (table.tuned(data, temperature=True, rule=rule) for rule in ("best", "one standard error"))
    losses, prior = table.losses, table.settings[row][0]
    difference = losses[row] - losses[best]
    assert float(difference.mean()) <= float(difference.std()) / 40**0.5
    for smaller in range(prior):
        rows = [i for i, (r, _) in enumerate(table.settings) if r == smaller]
        least = losses[min(rows, key=lambda i: float(losses[i].mean()))] - losses[best]
        assert float(least.mean()) > float(least.std()) / 40**0.5


def test_without_a_temperature_there_is_none(published):
    of, labels = moments(), torch.arange(12) % 10
    table = published.Table({"test": of}, published.PRIORS, labels, "probit", torch.zeros(1, 10))
    assert table.settings[table.tuned(torch.arange(12), temperature=False, rule="best")][1] == 1


def test_the_ends_of_what_was_tried_are_told(published):
    """Draws have no temperature below one on purpose: that is no end."""
    (mean, covariances), labels = moments(), torch.arange(12) % 10
    for link, temperatures in (("mean_field", (1 / 16, 4)), ("mc", (4,))):
        table = published.Table({"test": (mean, covariances)}, published.PRIORS, labels, link, torch.zeros(1, 10))
        ends = [table.ends(row) for row in range(len(table.settings))]
        assert {table.chosen(row)[0] for row, (prior, _) in enumerate(ends) if prior} == {1, 1e5}
        assert {table.chosen(row)[1] for row, (_, temperature) in enumerate(ends) if temperature} == set(temperatures)


def test_moments_are_kept(published, tmp_path):
    """Those of more prior precisions are put in their order."""
    kept, (mean, covariances), priors = published.Kept(tmp_path / "network"), moments(), published.PRIORS
    of_all = torch.cat([covariances[:6] + 1, covariances])
    whole = torch.cat([published.SMALLER, priors])
    assert not kept.has("a method", ["test"], priors)
    kept.add("a method", "test", priors, (mean, covariances))
    assert kept.has("a method", ["test"], priors) and not kept.has("a method", ["test", "rotated"], priors)
    assert_equal(kept.missing("a method", "test", whole), published.SMALLER, 0)
    kept.add("a method", "test", published.SMALLER, (mean, of_all[:6]))
    assert kept.has("a method", ["test"], whole)
    for result, expected in zip(kept.read("a method", "test"), (mean, of_all), strict=True):
        assert_equal(result, expected, 1e-14)  # the product above is symmetric but for rounding


def test_costs_are_counted_in_gradients_of_all_data(published, monkeypatch):
    """The clock counts images that the network sees; a gradient of all is measured on four batches of six."""
    model, seen = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10)), [0]
    model.register_forward_hook(lambda _, inputs, __: seen.__setitem__(0, seen[0] + len(inputs[0])))
    loader = [(torch.ones(5, 3, 2, 2), torch.zeros(5, dtype=torch.long))] * 6
    assert published.gradient_seconds(model, loader, clock=lambda: seen[0]) == 30

    class Twice:
        def predict(self, x, link):
            model(x), model(x)

    def fitted(model, loader, settings):
        for x, _ in settings["passes"] * loader:
            model(x)
        return Twice()

    monkeypatch.setattr(published, "fitted", fitted)
    _, cost = published.fitted_at_cost(model, loader, torch.ones(7, 3, 2, 2), {"passes": 3}, clock=lambda: seen[0])
    assert cost == {"fit": 3, "predictions": 2}


def test_the_clock_of_a_fit_is_that_of_the_processor(published):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
    loader = [(torch.ones(5, 3, 2, 2), torch.arange(5))] * 6
    posterior, cost = published.fitted_at_cost(model, loader, loader[0][0], published.METHODS["identity"])
    assert posterior.posterior.n_data == published.N_DATA
    assert all(spent > 0 for spent in cost.values())


def test_what_the_document_says_of_a_cell(published):
    import published_document as document

    assert document.judgement(0.2, 0.227, 0.001) == "yes" and document.judgement(0.3, 0.227, 0.001) == "no"
    assert document.judgement(0.24, 0.227, 0.01) == "no, narrowly"
    assert document.calibration({"ece": 0.02, "ece by chance": [0.01, 0.03]}) == "2.00 (1.0 to 3.0)"
    assert document.calibration({"ece": 0.005, "ece by chance": [0.01, 0.03]}) == "0.50 (1.0 to 3.0)"
    assert document.calibration({"ece": 0.04, "ece by chance": [0.01, 0.03]}) == "**4.00** (1.0 to 3.0)"
    beyond = document.of_calibration({"ece": 0.02, "ece by chance": [0.01, 0.03]}, 0.8)
    assert beyond.endswith(": no; chance alone makes more")
    assert document.of_calibration({"ece": 0.02, "ece by chance": [0.005, 0.03]}, 0.8).endswith(": no")
    assert document.of_calibration({"ece": 0.007, "ece by chance": [0.005, 0.03]}, 0.8).endswith(": yes")
    assert [document.marked({"at an end": ends}) for ends in ((0.5, 0.4), (0, 0.9), (0.4, 0.4))] == ["†", "‡", ""]
    said = document.counted([(1.0, 0.5), (-1.0, 0.5), (0.5, 0.5)] + 37 * [(0.0, 1.0)])
    assert said.startswith("Of these 40 differences 2 are") and said.endswith("2 would be by chance.")


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
