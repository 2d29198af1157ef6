"""Estimators of scikit-learn."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris, make_blobs
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

import debiased_laplace as dl
from debiased_laplace.integrations.sklearn import LaplaceClassifier, LaplaceRegressor
from tests.tolerances import assert_equal


@pytest.fixture(scope="module")
def iris():
    return load_iris(return_X_y=True)


def mlp(n_features: int, n_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(n_features, 8), nn.Tanh(), nn.Linear(8, n_outputs)).double()


@pytest.mark.parametrize("estimator", [LaplaceClassifier(epochs=20), LaplaceRegressor(epochs=30)], ids=repr)
def test_they_pass_the_checks_of_scikit_learn(estimator):
    results = check_estimator(estimator, on_skip=None)
    assert {result["status"] for result in results} <= {"passed", "skipped"}
    # What these two need is not there: pandas, and a setting of SciPy.
    assert {r["check_name"] for r in results if r["status"] == "skipped"} <= {
        "check_array_api_input", "check_classifier_data_not_an_array", "check_regressor_data_not_an_array",
    }  # fmt: skip


def test_a_trained_module_is_fitted_as_it_is(iris):
    x, y = iris
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    torch.manual_seed(0)
    module = mlp(4, 3)
    before = [p.clone() for p in module.parameters()]
    estimator = LaplaceClassifier(module, epochs=0, parameters="last_layer", structure=dl.Diagonal(), random_state=0)
    estimator.fit(x, names)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert estimator.posterior_.subset == "last_layer"
    assert estimator.posterior_.posterior.n_data == 120  # of 150
    assert estimator.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    assert_equal(torch.tensor(estimator.predict_proba(x)), estimator.posterior_.predict(torch.tensor(x)).probabilities)
    assert set(estimator.predict(x)) <= set(estimator.classes_)


def test_a_module_is_trained_as_a_copy_and_in_the_mode_it_was_in(iris):
    x, y = iris
    torch.manual_seed(0)
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    estimator = LaplaceClassifier(module, epochs=30, batch_size=17, random_state=0).fit(x, y)  # 120 = 7 * 17 + 1
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.training
    assert all(p.grad is None for p in module.parameters())
    assert estimator.score(x, y) > 0.9


def test_one_logit_tells_two_classes():
    x, y = make_blobs(80, centers=2, random_state=0)
    estimator = LaplaceClassifier(lambda n, _: mlp(n, 1), epochs=60, random_state=0).fit(x, np.where(y, "yes", "no"))
    probabilities = estimator.predict_proba(x)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)
    assert estimator.score(x, np.where(y, "yes", "no")) > 0.9
    np.testing.assert_allclose(
        estimator.decision_function(x), np.log(probabilities[:, 1] / probabilities[:, 0]), rtol=1e-9
    )
    assert list(estimator.classes_) == ["no", "yes"]


def test_a_module_of_other_outputs_is_refused(iris):
    with pytest.raises(ValueError, match="one output for each of the 3 classes of the targets, got 4 outputs"):
        LaplaceClassifier(mlp(4, 4)).fit(*iris)


def test_what_makes_no_module_is_refused(iris):
    with pytest.raises(TypeError, match="Expected a function for module, got str"):
        LaplaceClassifier("mlp").fit(*iris)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "Expected a trained module with epochs=0, got None"),
        ({"epochs": -1}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"batch_size": 0}, "batch_size"),
        ({"validation_fraction": 1.0}, "validation_fraction from 0 to below 1, got 1.0"),
    ],
)
def test_settings_without_a_meaning_are_refused(iris, settings, message):
    with pytest.raises(ValueError, match=message):
        LaplaceClassifier(**settings).fit(*iris)


def test_deviations_of_a_regression_are_those_of_the_targets():
    generator = np.random.default_rng(0)
    x = generator.uniform(-3, 3, (300, 1))
    y = 100 + 20 * np.sin(x[:, 0]) + 5 * generator.normal(size=300)
    estimator = LaplaceRegressor(epochs=100, random_state=0).fit(x, y)
    mean, deviation = estimator.predict(x, return_std=True)
    prediction = estimator.posterior_.predict(torch.tensor(x))
    np.testing.assert_allclose(mean, prediction.mean[:, 0])
    np.testing.assert_allclose(deviation**2, (prediction.epistemic_variance + prediction.noise_variance)[:, 0])
    assert 0.9 < np.std((y - mean) / deviation) < 1.1


def test_a_regression_does_not_depend_on_the_unit_of_its_targets():
    x, y = load_diabetes(return_X_y=True)
    mean, deviation = LaplaceRegressor(epochs=5, random_state=0).fit(x, y).predict(x, return_std=True)
    small = LaplaceRegressor(epochs=5, random_state=0).fit(x, 1e-7 * y)
    for one, other in zip((mean, deviation), small.predict(x, return_std=True), strict=True):
        assert 1e7 * other == pytest.approx(one, rel=1e-3)


def test_several_targets_and_a_column_keep_their_shape():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 3))
    for y in (x[:, :2] * [1.0, 50.0], x[:, :1], x[:, 0]):
        mean, deviation = LaplaceRegressor(epochs=5, random_state=0).fit(x, y).predict(x[:7], return_std=True)
        assert mean.shape == deviation.shape == (7, *y.shape[1:])


def test_images_go_to_a_module(iris):
    generator = np.random.default_rng(0)
    images, y = generator.normal(size=(30, 1, 4, 4)).astype(np.float32), np.arange(30) % 2
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    assert LaplaceClassifier(module, epochs=2, random_state=0).fit(images, y).predict_proba(images).shape == (30, 2)
    with pytest.raises(ValueError, match="dim 4"):
        LaplaceClassifier(epochs=2).fit(images, y)


def test_names_of_columns_are_kept(iris, monkeypatch):
    x, y = iris
    names = np.array(["a", "b", "c", "d"], dtype=object)
    monkeypatch.setattr("sklearn.utils.validation._get_feature_names", lambda table: names)  # of a table of any library
    estimator = LaplaceClassifier(epochs=2, random_state=0).fit(x, y)
    assert estimator.n_features_in_ == 4
    assert estimator.feature_names_in_.tolist() == ["a", "b", "c", "d"]
    names = names[::-1]
    with pytest.raises(ValueError, match="feature names should match"):
        estimator.predict(x)


def test_the_same_seed_gives_the_same_and_nothing_else_is_drawn(iris):
    x, y = iris
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    estimator = LaplaceClassifier(epochs=3, random_state=7)
    first = clone(estimator).fit(x, y).predict_proba(x)
    torch.rand(3)
    torch.set_rng_state(torch.tensor(states[2], dtype=torch.uint8))
    np.testing.assert_array_equal(clone(estimator).fit(x, y).predict_proba(x), first)
    other = clone(estimator).set_params(random_state=8).fit(x, y).predict_proba(x)
    assert np.abs(other - first).max() > 1e-3
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_it_goes_through_pipelines_grids_and_pickles(iris):
    x, y = iris
    pipeline = make_pipeline(StandardScaler(), LaplaceClassifier(mlp, epochs=20, random_state=0))
    grid = {"laplaceclassifier__lr": [1e-5, 0.03], "laplaceclassifier__structure": [dl.Diagonal()]}
    search = GridSearchCV(pipeline, grid, cv=3, scoring="neg_log_loss").fit(x, y)
    assert search.best_params_["laplaceclassifier__lr"] == 0.03
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(again.predict_proba(x), search.predict_proba(x))
    assert search.best_score_ > -0.5


def test_too_few_data_for_validation_leave_the_marginal_likelihood():
    x = np.linspace(-1, 1, 4)[:, None]
    estimator = LaplaceRegressor(epochs=20, random_state=0).fit(x, x[:, 0])
    assert estimator.posterior_.prior_source == "maximum of the marginal likelihood"
    assert estimator.posterior_.posterior.n_data == 4
    held_out = LaplaceRegressor(epochs=20, validation_fraction=0.5, random_state=0).fit(x, x[:, 0])
    assert held_out.posterior_.prior_source == "tuned on validation data"
    assert held_out.posterior_.posterior.n_data == 2
