"""Predictions of many outputs: exact for the most probable of each datum."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace import DebiasedLaplace
from debiased_laplace.network.factors import Factors
from debiased_laplace.posterior import top_k
from debiased_laplace.posterior.predictive import functional_moments, part_variances
from debiased_laplace.posterior.top_k import Chosen, top_k_moments, top_k_part_variances
from tests.tolerances import EXACT, assert_equal, assert_unbiased

C, K = 20, 3
LINKS = ("probit", "mc", "bridge", "bridge_norm", "mean_field")


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_k, "MANY_OUTPUTS", 8)
    monkeypatch.setattr("debiased_laplace.posterior.tune.MANY_OUTPUTS", 8)
    monkeypatch.setattr("debiased_laplace.posterior.validation.MANY_OUTPUTS", 8)
    monkeypatch.setattr(top_k, "TOP_K", K)
    monkeypatch.setattr(top_k, "GROUP_ENDS", (2,))


def inputs(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(order: Tensor | None = None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).double()
    if order is not None:
        model[2].weight.data, model[2].bias.data = model[2].weight.data[order], model[2].bias.data[order]
    return model


def fitted(likelihood: str = "classification", order: Tensor | None = None, **options) -> dl.Laplace:
    x, classes = inputs(30), torch.arange(30) % C
    y = {"classification": classes, "bernoulli": (inputs(30 * C // 4).reshape(30, C) > 0).double()}.get(
        likelihood, inputs(30 * C // 4).reshape(30, C)
    )
    options = {"mc_samples": None, "structure": dl.Diagonal()} | options
    return dl.fit(network(order), [(x, y)], likelihood, **options)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == top_k.__name__]


@pytest.mark.parametrize("k", [1, K, 7, C])
def test_the_most_probable_have_their_exact_covariances(k):
    posterior, x = fitted(), inputs(5, 2)
    about = posterior.network, [posterior.posterior], posterior.likelihood, x, k
    mean, (covariances,) = top_k_moments(*about)
    _, (variances,) = top_k_moments(*about, covariance=False)
    exact_mean, exact = functional_moments(posterior.network, posterior.posterior, x)
    assert_equal(mean, exact_mean)
    for f, actual, diagonal, expected in zip(mean, covariances, variances, exact, strict=True):
        best = f.topk(k).indices
        assert_equal(actual[best][:, best], expected[best][:, best])
        assert_equal(diagonal[best], expected.diagonal()[best])
        assert float(torch.linalg.eigvalsh(actual).min()) >= -EXACT * float(actual.abs().max())
    if k == C:
        assert_equal(covariances, exact)


def test_the_others_have_means_over_their_groups():
    """Against sums over the members of each group, by loops."""
    posterior, x = fitted(), inputs(2, 2)
    mean, (actual,) = top_k_moments(posterior.network, [posterior.posterior], posterior.likelihood, x, K)
    _, exact = functional_moments(posterior.network, posterior.posterior, x)
    for f, covariance, expected in zip(mean, actual, exact, strict=True):
        order = f.argsort(descending=True)
        groups = [order[K : 2 * K], order[2 * K :]]
        for group in groups:
            assert_equal(covariance[order[:K]][:, group[0]], expected[order[:K]][:, group].mean(1))
            assert_equal(covariance[group[0], group[1]], expected[group][:, group].mean())
        assert_equal(covariance[groups[0][0], groups[1][0]], expected[groups[0]][:, groups[1]].mean())


def test_random_signs_are_unbiased_for_the_mean_variance(monkeypatch):
    likelihood, outputs = dl.likelihoods.Categorical(), inputs(C // 4, 3).reshape(1, C)
    root = inputs(C * C // 4, 4).reshape(C, C)
    chosen, draws = Chosen.by_probability(likelihood, outputs, K), []
    original = torch.randint
    for number in range(400):
        of_number = torch.Generator().manual_seed(number)
        monkeypatch.setattr(torch, "randint", lambda *sizes, generator, of=of_number: original(*sizes, generator=of))
        vectors = chosen.vectors(outputs)[:, 0]
        draws.append(chosen.variances((vectors @ root).square().sum(1)[None])[0])
    order, variances = outputs[0].argsort(descending=True), root.square().sum(1)
    last = order[-1]
    assert_unbiased(torch.stack(draws)[:, last], variances[order[2 * K :]].mean())
    shared = (chosen.vectors(outputs)[:, 0] @ torch.ones(C, 1, dtype=torch.float64)).square().sum(1)
    assert_equal(chosen.variances(shared[None])[0], torch.ones(C, dtype=torch.float64))


def test_the_order_of_the_classes_does_not_matter_for_the_most_probable():
    order, x = torch.randperm(C, generator=torch.Generator().manual_seed(5)), inputs(4, 2)
    moments = []
    for posterior in (fitted(split=dl.Single()), fitted(order=order, split=dl.Single())):
        curvatures = torch.ones_like(posterior.posterior.curvatures)
        same = dl.laplace.replace(posterior.posterior, curvatures=curvatures)
        moments.append(top_k_moments(posterior.network, [same], posterior.likelihood, x, K))
    (f, (first,)), (g, (second,)) = moments
    assert_equal(g, f[:, order])
    for outputs, a, b in zip(f, first, second, strict=True):
        best = outputs.topk(K).indices
        places = torch.stack([(order == c).nonzero()[0, 0] for c in best])
        assert_equal(b[places][:, places], a[best][:, best])


@pytest.mark.parametrize("link", LINKS)
def test_predictions_of_classes(link, caplog):
    posterior, x = fitted(), inputs(5, 2)
    exact = posterior.predict(x, link=link, method="glm")
    with caplog.at_level(logging.INFO):
        default = posterior.predict(x, link=link)
    assert len(messages(caplog)) == 1 and "method='glm'" in messages(caplog)[0]
    assert_equal(posterior.predict(x, link=link, top_k=C).mean, exact.mean)
    assert_equal(posterior.predict(x, link=link, method="top_k", top_k=K).mean, default.mean)
    parts = [posterior.predict(part, link=link).mean for part in (x[:2], x[2:])]
    assert_equal(torch.cat(parts), default.mean)
    assert_equal(default.mean.sum(1), torch.ones(5, dtype=torch.float64))


def test_how_many_vectors_are_propagated(monkeypatch):
    posterior, seen = fitted(), []
    original = Factors.backpropagate_all
    monkeypatch.setattr(
        Factors,
        "backpropagate_all",
        lambda self, vectors, **how: seen.append(len(vectors)) or original(self, vectors, **how),
    )
    posterior.predict(inputs(2))
    posterior.tune([(inputs(6, 3), torch.arange(6))])
    assert set(seen) == {K + 4}


def test_where_nothing_is_ranked_or_back_propagated_all_are_exact(caplog):
    regression, head = fitted("regression"), fitted(parameters="last_layer")
    for posterior, word in ((regression, "Gaussian"), (head, "last layer")):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            default = posterior.predict(inputs(3))
        assert len(messages(caplog)) == 1 and word in messages(caplog)[0]
        assert_equal(default.mean, posterior.predict(inputs(3), method="glm").mean)
        assert_equal(default.outputs_variance, posterior.predict(inputs(3), method="glm").outputs_variance)
    with pytest.raises(ValueError, match="method='linearized'"):
        regression.predict(inputs(3), top_k=2)
    with pytest.raises(ValueError, match="Expected method='top_k'"):
        head.predict(inputs(3), method="nn", top_k=2)
    with pytest.raises(ValueError, match="top_k"):
        head.predict(inputs(3), top_k=0)


def test_many_labels():
    posterior, x = fitted("bernoulli"), inputs(4, 2)
    default, exact = posterior.predict(x), posterior.predict(x, method="glm")
    best = default.outputs_mean.topk(K).indices
    assert_equal(default.mean.gather(1, best), exact.mean.gather(1, best))
    assert_equal(posterior.predict(x, top_k=C).mean, exact.mean)


@pytest.mark.parametrize("link", ["mean_field", "probit"])
def test_tuning_compares_such_predictions(link):
    posterior, batches = fitted(), [(inputs(8, 3), torch.arange(8)), (inputs(4, 4), torch.arange(4))]
    grid = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    tuned = posterior.tune(batches, link=link, prior_precisions=grid, temperature=False, selection="best").tuned
    losses = []
    for precision in grid:
        one = dl.laplace.replace(
            posterior, posterior=dl.laplace.replace(posterior.posterior, prior_precision=precision.reshape(1))
        )
        values = [-one.predict(x, link=link).mean[torch.arange(len(y)), y].log() for x, y in batches]
        losses.append(torch.cat(values).mean())
    assert_equal(tuned.curve.losses, torch.stack(losses))


def test_the_parts_of_the_variances():
    posterior, x = fitted(), inputs(3, 2)
    grid = torch.tensor([0.5, 2.0], dtype=torch.float64)
    about = posterior.network, posterior.posterior
    mean, parts = top_k_part_variances(*about, posterior.likelihood, x, K, grid)
    _, exact = part_variances(*about, x, grid)
    best = mean.topk(K).indices.expand(*exact.shape[:-1], -1)
    assert_equal(parts.gather(-1, best), exact.gather(-1, best))


def test_the_drop_in(caplog):
    la = DebiasedLaplace(network(), "classification", "all", "diag")
    la.fit([(inputs(30), torch.arange(30) % C)])
    with caplog.at_level(logging.INFO):
        default = la(inputs(4, 2))
    assert len(messages(caplog)) == 1
    la.top_k = C
    exact = la(inputs(4, 2))
    assert_equal(exact, la.native.predict(inputs(4, 2), link="probit", method="glm").mean)
    assert float((default - exact).abs().max()) > 0
    la.top_k = K
    assert_equal(la(inputs(4, 2)), default)


def test_dense_outputs_say_what_is_possible(caplog):
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Tanh(), nn.Conv1d(3, C, 1)).double()
    x, y = inputs(12).reshape(6, 2, 4), torch.arange(24).reshape(6, 4) % C
    posterior = dl.fit(model, [(x, y)], "classification", structure=dl.Diagonal())
    with caplog.at_level(logging.INFO, logger="debiased_laplace.posterior.dense"):
        posterior.predict(x[:2], n_samples=3)
    assert sum("method='linearized'" in record.message for record in caplog.records) == 1
    with pytest.raises(ValueError, match="Expected outputs \\[N, C\\]"):
        posterior.predict(x[:2], method="top_k")
