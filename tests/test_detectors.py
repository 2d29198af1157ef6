"""Detectors of out-of-distribution data against independent computations, and their way into the tables."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.covariance import EmpiricalCovariance
from torch import Tensor, nn

from debiased_laplace._checks import UnsupportedLayerError
from debiased_laplace.evaluation import Prediction, detecting_predictor, evaluate, point_predictor
from debiased_laplace.evaluation.predictors import detectors
from debiased_laplace.evaluation.predictors.detectors import PenultimateFeatures
from debiased_laplace.evaluation.predictors.prediction import as_prediction
from debiased_laplace.evaluation.scores import detection
from tests.tolerances import EXACT

NOTHING = torch.empty(0)


def draw(n: int, size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (n,), generator=generator)
    noise = torch.randn(n, size, generator=generator, dtype=torch.float64)
    return 2 * torch.nn.functional.one_hot(targets, size) + noise @ torch.diag(
        torch.arange(1.0, size + 1)
    ).double(), targets


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()


# -- each by itself --------------------------------------------------------------------------------


def test_energy_and_maximum_logit() -> None:
    logits, _ = draw(20)
    assert detectors.energy(logits, NOTHING).numpy() == pytest.approx(-logsumexp(logits.numpy(), axis=1), rel=EXACT)
    assert detectors.maximum_logit(logits, NOTHING).numpy() == pytest.approx(-logits.numpy().max(1), rel=EXACT)
    # A constant on all logits is no evidence to a softmax, and is to these.
    assert torch.allclose(detectors.energy(logits + 3, NOTHING), detectors.energy(logits, NOTHING) - 3)


def test_mahalanobis_distances_are_scikit_learns() -> None:
    features, targets = draw(200)
    others = draw(30, seed=1)[0]
    means = np.stack([features[targets == c].mean(0).numpy() for c in range(3)])
    residuals = features.numpy() - means[targets]
    one = EmpiricalCovariance(assume_centered=True).fit(residuals)
    expected = np.min([one.mahalanobis(others.numpy() - mean) for mean in means], axis=0)
    assert detectors.mahalanobis(features, targets)(NOTHING, others).numpy() == pytest.approx(expected, rel=EXACT)
    to_all = EmpiricalCovariance().fit(features.numpy()).mahalanobis(others.numpy())
    relative = detectors.relative_mahalanobis(features, targets)(NOTHING, others)
    assert relative.numpy() == pytest.approx(expected - to_all, rel=EXACT, abs=1e-9)


def test_directions_in_which_nothing_varies_and_classes_that_are_not_there() -> None:
    features, targets = draw(100)
    wider = torch.cat([features, torch.zeros(100, 2), features[:, :1]], 1)
    distances = detectors.mahalanobis(wider, 2 * targets + 1)(NOTHING, wider)
    assert distances.numpy() == pytest.approx(
        detectors.mahalanobis(features, targets)(NOTHING, features).numpy(), rel=1e-8
    )
    alone = detectors.mahalanobis(features.float(), targets)(NOTHING, features[:1].float())
    assert alone.dtype == torch.float64


# -- features --------------------------------------------------------------------------------------


def test_features_are_the_inputs_of_the_last_layer_and_the_model_stays_as_it_was() -> None:
    model, (inputs, _) = network(), draw(9)
    model.train()
    features = PenultimateFeatures(model, inputs)
    logits, seen = features(inputs)
    assert torch.equal(seen, model[1](model[0](inputs)))  # without dropout
    assert torch.equal(logits, model[3](seen))
    assert model.training
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert len(features(inputs[:1])[1]) == 1
    assert not seen.requires_grad


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x[:, :, None].expand(-1, -1, 4)).mean(2)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


def test_last_layers_without_features_are_refused() -> None:
    inputs = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"Expected inputs \[N, I\] of the last layer.*got \(4, 6, 4\)"):
        PenultimateFeatures(Pixels(), inputs)(inputs)
    with pytest.raises(ValueError, match="Expected a last layer that is one module, got the parameters"):
        PenultimateFeatures(Two(), inputs)(inputs)
    frozen = network().float().requires_grad_(False)
    with pytest.raises((ValueError, UnsupportedLayerError), match="trainable"):
        PenultimateFeatures(frozen, inputs)


# -- into the tables -------------------------------------------------------------------------------


def test_the_network_has_all_of_them_on_out_of_distribution_data() -> None:
    model, training, test, far = network(), draw(90), draw(40, seed=1), draw(30, seed=2)
    far = (far[0] * 3, far[1])
    predictor = detecting_predictor(model, (tuple(part[i : i + 40] for part in training) for i in (0, 40, 80)))
    result = evaluate({"MAP": predictor, "plain": point_predictor(model)}, [test], None, {"far": [far]}, n_resamples=30)
    (entry,) = result["ood"]
    names = ["maximum probability", "entropy", "energy", "maximum logit", "Mahalanobis", "relative Mahalanobis"]
    assert list(entry["scores"]["MAP"]) == [f"{name}, {kind}" for name in names for kind in ("auroc", "aupr", "fpr95")]
    assert set(entry["scores"]["plain"]) < set(entry["scores"]["MAP"])
    with torch.no_grad():
        inside, outside = (model.eval()[1](model[0](x)) for x in (test[0], far[0]))
        fitted = model[1](model[0](training[0])), training[1]
    score = torch.cat([detectors.mahalanobis(*fitted)(NOTHING, x) for x in (inside, outside)])
    expected = detection.auroc(score, np.repeat([0, 1], [40, 30]))
    assert entry["scores"]["MAP"]["Mahalanobis, auroc"][0] == pytest.approx(expected, rel=EXACT)
    assert {"energy", "Mahalanobis"} < set(entry["histograms"]["MAP"])
    # The same probabilities do not differ, whatever one of the two has beside them.
    for one in (result["test"], entry):
        assert all(cell == [0, 0, 0, 0] for cell in one["differences"]["MAP"]["plain"].values())


def test_a_posterior_is_compared_with_the_networks_detectors() -> None:
    """Pair by pair of the same resamples: the difference of two AUROCs that are not of the same kind of score."""
    model, training, test, far = network(), draw(90), draw(40, seed=1), draw(30, seed=2)
    detecting = detecting_predictor(model, [training])

    def flatter(x: Tensor) -> Prediction:
        return Prediction(probabilities=(detecting(x).probabilities.log() * 0.1 * (1 + x[:, :1].abs())).softmax(1))

    predictors = {"MAP": detecting, "flatter": flatter, "plain": point_predictor(model)}
    (entry,) = evaluate(predictors, [test], None, {"far": [(3 * far[0], far[1])]}, n_resamples=50)["ood"]
    own, against = entry["scores"], entry["against_detectors"]
    assert list(against) == ["MAP"] and list(against["MAP"]) == ["flatter", "plain"]
    for name, cells in against["MAP"].items():
        assert {key.rpartition(", ")[0] for key in cells} == {
            "energy", "maximum logit", "Mahalanobis", "relative Mahalanobis"
        }  # fmt: skip
        for key, cell in cells.items():
            used = f"maximum probability, {key.rpartition(', ')[2]}"
            assert cell[0] == pytest.approx(own[name][used][0] - own["MAP"][key][0], abs=EXACT)
            assert cell[2] <= cell[0] <= cell[3]
    # Without a detector there is nothing to compare with.
    (alone,) = evaluate({"a": flatter, "b": flatter}, [test], None, {"far": [far]}, n_resamples=20)["ood"]
    assert alone["against_detectors"] == {}


def test_without_training_data_there_are_those_of_logits() -> None:
    model, inputs = network(), draw(4)[0]
    prediction = detecting_predictor(model)(inputs)
    assert list(prediction.ood) == ["energy", "maximum logit"]
    assert torch.equal(prediction.ood["energy"], -model.eval()(inputs).detach().logsumexp(1))
    with pytest.raises(ValueError, match="Expected training data, got an empty loader"):
        detecting_predictor(model, [])


def test_scores_of_a_users_own() -> None:
    def mine(x: Tensor) -> Prediction:
        return Prediction(probabilities=x.softmax(1), ood={"norm": x.norm(dim=1)})

    inside, outside = torch.randn(50, 3), 3 * torch.randn(40, 3)
    (entry,) = evaluate({"p": mine}, [(inside, torch.zeros(50).long())], None, {"far": [(outside, torch.zeros(40))]},
                        n_resamples=20)["ood"]  # fmt: skip
    score = torch.cat([inside, outside]).norm(dim=1).double()
    expected = detection.auroc(score, np.repeat([0, 1], [50, 40]))
    assert entry["scores"]["p"]["norm, auroc"][0] == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (torch.zeros(4, 1), "Expected ood: mine of 4 data from predictor 'p', one row for each, got shape (4, 1)"),
        (torch.zeros(3), "got shape (3,)"),
        (torch.tensor([0.0, 1.0, torch.nan, 0.0]), "Expected finite ood: mine from predictor 'p', got NaN"),
    ],
)
def test_scores_are_checked(score: Tensor, message: str) -> None:
    prediction = Prediction(probabilities=torch.full((4, 2), 0.5), ood={"mine": score})
    with pytest.raises(ValueError, match=re.escape(message)):
        as_prediction(prediction, 4, "p")
