"""Predictions go into torchmetrics and netcal as they are, and agree with the scores of the evaluation."""

from __future__ import annotations

import netcal.metrics
import pytest
import torch
import torchmetrics.classification as classification
import torchmetrics.regression as regression
from torch import nn

import debiased_laplace as dl
from debiased_laplace.evaluation import classification_metrics, regression_metrics


@pytest.fixture(scope="module")
def data():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] + x[:, 2] > 0).long()


@pytest.fixture(scope="module")
def probabilities(data):
    x, y = data
    torch.manual_seed(0)
    posterior = dl.fit(nn.Linear(4, 3).double(), [(x[:100], y[:100])], "classification", prior_precision=0.1)
    return posterior.predict(x).probabilities


def test_torchmetrics_scores_classes_as_the_evaluation_does(data, probabilities):
    _, y = data
    ours = classification_metrics(probabilities, y)
    theirs = {
        "accuracy": classification.MulticlassAccuracy(3, average="micro"),
        "ece": classification.MulticlassCalibrationError(3, n_bins=15, norm="l1"),
    }
    for name, metric in theirs.items():
        metric.update(probabilities[:77], y[:77])
        metric.update(probabilities[77:], y[77:])
        assert float(metric.compute()) == pytest.approx(ours[name], rel=1e-6), name
    assert 0 < ours["ece"] < 1


def test_netcal_scores_classes_as_the_evaluation_does(data, probabilities):
    _, y = data
    ours = classification_metrics(probabilities, y)
    assert netcal.metrics.ECE(15).measure(probabilities.numpy(), y.numpy()) == pytest.approx(ours["ece"], rel=1e-9)


def test_of_two_classes_there_are_two_calibration_errors(data):
    x, y = data
    torch.manual_seed(0)
    posterior = dl.fit(nn.Linear(4, 2).double(), [(x[:100], y[:100] // 2)], "classification", prior_precision=0.1)
    probabilities, targets = posterior.predict(x).probabilities, y // 2
    of_the_second = netcal.metrics.ECE(15).measure(probabilities.numpy(), targets.numpy())
    binary = classification.BinaryCalibrationError(n_bins=15, norm="l1")
    assert float(binary(probabilities[:, 1], targets)) == pytest.approx(of_the_second, rel=1e-6)
    of_the_likely = classification_metrics(probabilities, targets)["ece"]
    multiclass = classification.MulticlassCalibrationError(2, n_bins=15, norm="l1")
    assert float(multiclass(probabilities, targets)) == pytest.approx(of_the_likely, rel=1e-6)
    assert abs(of_the_second - of_the_likely) > 0.01


def test_torchmetrics_and_torch_score_regressions_as_the_evaluation_does(data):
    x, _ = data
    targets = x[:, :2].square()
    torch.manual_seed(0)
    posterior = dl.fit(nn.Linear(4, 2).double(), [(x[:100], targets[:100])], "regression")
    prediction = posterior.tune([(x[100:], targets[100:])]).predict(x)
    assert prediction.mean.is_contiguous()  # torchmetrics makes views of it
    ours = regression_metrics(prediction.mean, prediction.variance, targets)
    rmse = regression.MeanSquaredError(squared=False)
    assert float(rmse(prediction.mean, targets)) == pytest.approx(ours["rmse"], rel=1e-6)
    nll = nn.GaussianNLLLoss(full=True)(prediction.mean, targets, prediction.variance)
    assert 2 * float(nll) == pytest.approx(ours["nll"], rel=1e-9)  # a mean over two outputs, of which ours is the sum
