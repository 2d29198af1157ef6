"""The experiments beyond images in their smallest form, and their formulas against others."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import nn

import debiased_laplace as dl
from debiased_laplace.evaluation.shipped import digits, scenes, uci
from debiased_laplace.evaluation.shipped.common import initialised
from debiased_laplace.testing import dense_jacobian, dense_posterior_precision
from tests.test_eval import copy, experiments, script, text_of
from tests.test_shipped import write_uci
from tests.tolerances import EXACT, assert_equal

__all__ = ["experiments"]
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """The page, to be filled."""
    folder = tmp_path / "docs"
    folder.mkdir()
    copy("beyond", folder)
    return folder


def rows(docs: Path, part: str) -> list[list[str]]:
    """Cells of a table of the page."""
    text = text_of("beyond", docs).split(f"<!-- {part} -->\n")[1].split("<!-- end -->")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:] if line.startswith("|")]


def small_posterior() -> tuple[nn.Module, torch.Tensor, dl.Laplace]:
    """A network with three outputs and all of its curvature, in float64, with some inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    inputs, labels = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    settings = {"structure": dl.Full(), "sampler": dl.UniformSampler(None), "split": dl.Single()}
    return model, inputs, dl.fit(model, [(inputs, labels)], "classification", prior_precision=0.5, **settings)


# -- active learning -------------------------------------------------------------------------------


def test_labels_are_asked_for(docs, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "network", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    arguments = (
        "active.py", "--tasks", "digits", "--seeds", "2", "--rounds", "1", "--ways", "information",
        "--out", str(tmp_path), "--docs", str(docs),
    )  # fmt: skip
    done = script(*arguments)
    assert done.returncode == 0, done.stderr
    record = json.loads((docs / "records" / "active.json").read_text())["digits"]
    assert record["labels"] == [40, 60]
    made = {row[1]: row for row in rows(docs, "active")}
    assert list(made) == list(record["accuracy"]) == ["random", "entropy, network", "information"]
    mean = np.mean(record["accuracy"]["information"])
    assert float(made["information"][5].split("±")[0]) == pytest.approx(100 * mean, abs=0.06)
    # All begin with the same labels and network.
    assert len({tuple(curve[0] for curve in of) for of in record["accuracy"].values()}) == 1
    assert (docs / "active.png").stat().st_size > 5000
    text = (docs / "beyond.md").read_text()
    again = script(*arguments)
    assert (again.returncode, again.stderr) == (0, "")  # what is there is used
    assert (docs / "beyond.md").read_text() == text


def test_the_information_is_that_of_the_draws(experiments):
    """Draw by draw, with the covariance of the whole posterior and another square root."""
    import active

    model, inputs, fitted = small_posterior()
    jacobians, precision = dense_jacobian(model, inputs[:3]), dense_posterior_precision(fitted.posterior)
    posterior = replace(fitted, output_temperature=1.7)
    normals = torch.randn(active.N_DRAWS, 3, generator=torch.Generator().manual_seed(5)).double().numpy()
    expected = {"entropy": [], "information": []}
    for jacobian, output in zip(jacobians, model(inputs[:3]).detach().numpy(), strict=True):
        covariance = (jacobian @ precision.inverse() @ jacobian.T).numpy()
        mean, conditional = np.zeros(3), 0.0
        for normal in normals:
            exponentials = np.exp((output + scipy.linalg.sqrtm(covariance) @ normal) / 1.7)
            p = exponentials / exponentials.sum()
            mean += p / len(normals)
            conditional -= sum(value * math.log(value) for value in p) / len(normals)
        expected["entropy"].append(-sum(value * math.log(value) for value in mean))
        expected["information"].append(expected["entropy"][-1] - conditional)
    for way, value in (("entropy, posterior", "entropy"), ("information", "information")):
        assert_equal(active.scores(way, model, posterior, inputs[:3], 5), torch.tensor(expected[value]).double())


def test_networks_are_trained_to_the_end_and_shared(experiments):
    import active

    inputs, targets, *_ = active.data("digits", 0, None)
    chosen = tuple(range(30))
    model = active.trained("digits", 0, None, chosen)
    with torch.no_grad():
        assert float(nn.functional.cross_entropy(model(inputs[:30]), targets[:30])) < 0.05
    assert active.trained("digits", 0, None, chosen) is model
    assert active.trained("digits", 1, None, chosen) is not model


def test_settings_at_an_end_are_counted(experiments):
    import active

    ends = [["prior precision largest"], [], ["prior precision smallest", "temperature smallest"], [],
            ["prior precision largest"]]  # fmt: skip
    assert active.at_the_end(ends, "prior precision") == "1 ↓, 2 ↑ of 5"
    assert active.at_the_end(ends, "temperature") == "1 ↓ of 5"
    assert active.at_the_end([[], []], "temperature") == "0 of 2"
    assert active.at_the_end([], "temperature") == ""


def test_ways_without_a_posterior(experiments):
    import active

    model, inputs, fitted = small_posterior()
    p = model(inputs).softmax(1)
    assert_equal(active.scores("entropy, network", model, None, inputs, 0), -(p * p.log()).sum(1))
    information = active.scores("information", model, fitted, inputs, 0)
    generator = torch.Generator().manual_seed(0)
    gumbel = -(-torch.rand(20, generator=generator).double().log()).log()
    assert_equal(active.scores("information, drawn", model, fitted, inputs, 0), information.log() + gumbel)
    first, second = (active.scores("random", model, None, inputs, seed) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_labels_needed(experiments):
    import active

    labels = [20, 30, 40, 50]
    assert active.labels_needed(labels, [0.5, 0.7, 0.9, 0.8], 0.8) == pytest.approx(35)
    assert active.labels_needed(labels, [0.5, 0.4, 0.7, 0.8], 0.6) == pytest.approx(35)  # not where it fell again
    assert active.labels_needed(labels, [0.5, 0.7, 0.9, 0.8], 0.95) == 50
    assert active.labels_needed(labels, [0.5, 0.7, 0.9, 0.8], 0.4) == 20
    mean, error, low, high = active.paired([1.0, 2.0, 6.0])
    assert (mean, error) == (pytest.approx(3), pytest.approx(math.sqrt(7 / 3)))
    assert [mean - low, high - mean] == pytest.approx([4.30265273 * error] * 2)


# -- continual learning ----------------------------------------------------------------------------


def test_tasks_one_after_the_other(docs, tmp_path):
    arguments = (
        "continual.py", "--kinds", "parity", "--seeds", "2", "--strengths", "1", "--methods", "fine-tuning",
        "debiased K-FAC", "--out", str(tmp_path), "--docs", str(docs),
    )  # fmt: skip
    done = script(*arguments)
    assert done.returncode == 0, done.stderr
    record = json.loads((docs / "records" / "continual.json").read_text())["parity"]["methods"]
    made = {row[1]: row for row in rows(docs, "continual")}
    assert list(made) == list(record) == ["fine-tuning", "debiased K-FAC"]
    for method, found in record.items():
        assert float(made[method][2].split("±")[0]) == pytest.approx(100 * found["accuracy"][0], abs=0.06)
        assert found["sweep"] == [pytest.approx(found["accuracy"][0], rel=1e-4)]
    assert record["fine-tuning"]["forgetting"][0] > 0.1
    again = script(*arguments)
    assert (again.returncode, again.stderr) == (0, "")


def test_the_quadratic_of_earlier_tasks(experiments):
    import continual

    model, _, fitted = small_posterior()
    precision, before = dense_posterior_precision(fitted.posterior), continual.vector(model).detach().clone()
    of_posterior = continual.quadratic(model, fitted, 3.0, 50)
    of_identity = continual.quadratic(model, None, 3.0, 50)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    moved = continual.vector(model).detach() - before
    for added, matrix in ((of_posterior, precision), (of_identity, torch.eye(len(before), dtype=torch.float64))):
        model.zero_grad()
        value = added()
        value.backward()
        assert_equal(value, 3 / 100 * moved @ matrix @ moved)
        assert_equal(torch.cat([p.grad.flatten() for p in model.parameters()]), 3 / 50 * matrix @ moved)


def test_accuracy_and_forgetting(experiments):
    import continual

    run = {"test": [[0.9], [0.6, 0.8], [0.5, 0.6, 1.0]]}
    assert continual.final_accuracy(run) == pytest.approx(0.7)
    assert continual.forgetting(run) == pytest.approx((0.4 + 0.2) / 2)
    record = {"runs": [{"validation": [0.5, 0.6]}, {"validation": [0.9, 0.4]}], "strengths": [1.0, 10.0]}
    assert continual.best(record) == (record["runs"][1], 10.0)
    first, second, *_ = continual.tasks("permuted", 0)
    assert torch.equal(first.train[0].sort(1).values, second.train[0].sort(1).values)
    assert not torch.equal(first.train[0], second.train[0])
    assert sum(len(part.test[1]) for part in continual.tasks("parity", 0)) == len(first.test[1])


# -- text, scenes, tables --------------------------------------------------------------------------


def test_tables_whose_noise_varies(docs, tmp_path):
    write_uci(tmp_path / "uci" / "concrete.npz", 200)
    arguments = (
        "beyond.py", "--parts", "tables", "--quick", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out"),
        "--docs", str(docs),
    )  # fmt: skip
    done = script(*arguments)
    assert done.returncode == 0, done.stderr
    record = json.loads((docs / "records" / "beyond.json").read_text())["tables"]["concrete"]
    made = rows(docs, "all tables")
    assert {f"{noise} | {method}" for _, noise, method, *_ in made} == set(record["scores"])
    for _, noise, method, nll, *_ in made:
        value = float(nll.split("±")[0].replace("\N{MINUS SIGN}", "-"))
        assert value == pytest.approx(record["scores"][f"{noise} | {method}"]["nll"][0], abs=6e-4)
    again = script(*arguments)
    assert (again.returncode, again.stderr) == (0, "")
    missing = script(*arguments[:5], str(docs), *arguments[6:], "--out", str(tmp_path / "other"))
    assert missing.returncode == 1
    assert "Expected concrete.npz in the folder of --data-dir" in missing.stderr


def test_scenes_through_the_suite(docs, tmp_path, monkeypatch):
    for name, value in {"N_TRAIN": 40, "N_VALIDATION": 30, "N_TEST": 30, "N_QUICK": 20, "BUDGET": 16}.items():
        monkeypatch.setattr(scenes, name, value)
    scenes.split.cache_clear()
    monkeypatch.setattr(scenes, "split", scenes.split.__wrapped__)
    done = script("beyond.py", "--parts", "scenes", "--quick", "--out", str(tmp_path), "--docs", str(docs))
    assert done.returncode == 0, done.stderr
    record = json.loads((docs / "records" / "beyond.json").read_text())["scenes"]
    parts = {"test": "test", "strong shift": "shift"}
    made = rows(docs, "scenes")
    assert [row[0] for row in made] == [part for part in parts for _ in range(len(made) // 2)]
    for part, method, nll, *_ in made:
        assert float(nll.split("±")[0]) == pytest.approx(record[parts[part]]["scores"][method]["nll"][0], abs=6e-4)
    assert record["ood"] == "shuffled patches"
    detected, found = record["detected"], rows(docs, "scenes detected")
    for method, score, auroc, *_ in found:
        assert float(auroc.split("±")[0]) == pytest.approx(detected["scores"][method][f"{score}, auroc"][0], abs=6e-4)
    # Those of the network alone, and the differences to them, are of methods that have none.
    assert [row[1] for row in found if row[0] == "MAP"] == ["maximum probability", "entropy", "energy", "maximum logit"]
    (debiased,) = [row for row in found if row[:2] == ["debiased K-FAC", "maximum probability"]]
    against = detected["against_detectors"]["debiased K-FAC"]["energy, auroc"]
    assert float(debiased[4].split("[")[0].replace("\N{MINUS SIGN}", "-")) == pytest.approx(against[0], abs=6e-4)


def test_scores_of_mixtures(experiments):
    """Against integrals over the distribution function."""
    import beyond

    rng = np.random.default_rng(0)
    means, deviations = rng.normal(size=(5, 4)), rng.uniform(0.3, 2.0, (5, 4))
    targets = np.array([0.1, -1.0, 2.0, 8.0])
    scores = beyond.mixture_scores(means, deviations, targets)
    for n, y in enumerate(targets):

        def below(x: float, n: int = n) -> float:
            return float(norm.cdf(x, means[:, n], deviations[:, n]).mean())

        left = quad(lambda x, f=below: f(x) ** 2, -30, y, epsabs=1e-12, epsrel=1e-12, limit=400)[0]
        right = quad(lambda x, f=below: (1 - f(x)) ** 2, y, 30, epsabs=1e-12, epsrel=1e-12, limit=400)[0]
        assert scores["crps"][n] == pytest.approx(left + right, rel=EXACT)
        assert scores["nll"][n] == pytest.approx(
            -math.log(norm.pdf(y, means[:, n], deviations[:, n]).mean()), rel=EXACT
        )
        assert scores["covered"][n] == (0.025 < below(y) < 0.975)
    assert scores["covered"].tolist() == [1, 1, 1, 0]


def test_draws_have_the_covariance(experiments):
    """The map of independent normals: exact for the points themselves."""
    import beyond

    root = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    mean, covariance = torch.arange(6).view(3, 2).double(), root @ root.mT
    drawn = beyond.draws(mean, covariance, 64)
    plain = beyond.draws(torch.zeros(1, 2), torch.eye(2)[None], 64)[:, 0]
    for n in range(3):
        expected = plain @ torch.from_numpy(scipy.linalg.sqrtm(covariance[n].numpy()).real)
        assert_equal(drawn[:, n] - mean[n], expected)
    assert float(plain.mean(0).abs().max()) < 0.05
    assert float((plain.T @ plain / 64 - torch.eye(2)).abs().max()) < 0.1


def test_the_scale_of_the_noise(experiments):
    import beyond

    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(3, 2).double(), torch.randn(50, 3).double(), 2 * torch.randn(50, 1).double()

    def loss(logarithm: float) -> float:
        with torch.no_grad():
            return float(beyond.gaussian_loss(beyond.Scaled(model, math.exp(logarithm))(inputs), targets))

    found = minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-10}).x
    assert beyond.best_scale(model, (inputs, targets)) == pytest.approx(math.exp(found), rel=1e-6)


def test_a_network_of_noise_is_the_best_of_its_training(experiments):
    """A training of twenty steps by hand, of which every step is looked at."""
    import beyond

    torch.manual_seed(0)
    inputs, targets = torch.randn(30, 3), torch.randn(30, 1)
    validation = torch.randn(30, 3), torch.randn(30, 1)
    found = beyond.network_of_noise(inputs, targets, 3, 20, validation)
    model = initialised(lambda: nn.Sequential(nn.Linear(3, uci.HIDDEN), nn.ReLU(), nn.Linear(uci.HIDDEN, 2)), 3)
    optimizer = torch.optim.Adam(model.parameters(), uci.LEARNING_RATE, weight_decay=uci.WEIGHT_DECAY)
    schedule, losses = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20), []
    for batch in uci._order(30, 20, 3, torch.device("cpu")):
        optimizer.zero_grad()
        mean, log_variance = model(inputs[batch]).chunk(2, 1)
        nn.functional.gaussian_nll_loss(mean, targets[batch], log_variance.exp(), full=True).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            losses.append(float(beyond.gaussian_loss(model(validation[0]), validation[1])))
    assert 0 < int(np.argmin(losses)) < 19  # it became better, and worse again
    with torch.no_grad():
        assert float(beyond.gaussian_loss(found(validation[0]), validation[1])) == pytest.approx(min(losses), rel=1e-4)
