"""The native object: fit, tune, predict, save, load; its numbers are those of the core and of the drop-in."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace import DebiasedLaplace
from debiased_laplace._files import StoredFileError
from debiased_laplace.fitting.fit import fit as core_fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.fitting.settings import brief
from debiased_laplace.network.snapshot import ModelChangedWarning
from debiased_laplace.posterior.predictive import functional_moments
from tests.documented import DOCS, code_of, executed
from tests.tolerances import assert_equal

C = 3
STRUCTURES = {
    "kron": dl.Kronecker(), "lowrank": dl.LowRank(4), "diag": dl.Diagonal(), "full": dl.Full(),
    "isotropic": dl.Isotropic(),
}  # fmt: skip
LIKELIHOODS = ["classification", "bernoulli", "regression"]


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).double()


def batches(likelihood: str, n: int = 40, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, C, generator=generator, dtype=torch.float64)
    scores = x[:, :C] + noise
    y = {"classification": scores.argmax(1), "bernoulli": (scores > 0).double(), "regression": scores}[likelihood]
    return list(zip(x.split(16), y.split(16), strict=True))


X = batches("regression", 5, seed=7)[0][0]


@pytest.fixture(scope="module", params=LIKELIHOODS)
def likelihood(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=STRUCTURES)
def structure(request: pytest.FixtureRequest) -> str:
    return request.param


def pair(likelihood: str, structure: str = "kron", **options: Any) -> tuple[dl.Laplace, DebiasedLaplace]:
    """The same posterior as a native object and as a drop-in one."""
    native = dl.fit(model_of(), batches(likelihood), likelihood, structure=STRUCTURES[structure], **options)
    named = dl.Bernoulli() if likelihood == "bernoulli" else likelihood
    drop_in = DebiasedLaplace(model_of(), named, hessian_structure=structure)
    drop_in.fit(batches(likelihood), structure=STRUCTURES[structure])
    return native, drop_in


# -- numbers ---------------------------------------------------------------------------------------


def test_a_fit_is_that_of_the_core_and_of_the_drop_in(likelihood, structure):
    native, drop_in = pair(likelihood, structure)
    core = core_fit(model_of(), batches(likelihood), native.likelihood, structure=STRUCTURES[structure])
    assert torch.equal(native.posterior.curvatures, core.posterior.curvatures)
    assert torch.equal(native.posterior.curvatures, drop_in.posterior.curvatures)
    assert_equal(native.log_marginal_likelihood(), drop_in.log_marginal_likelihood(), 1e-14)
    assert native.coverage() == drop_in.coverage()
    draws = [torch.Generator().manual_seed(4) for _ in range(2)]
    assert torch.equal(native.sample(3, draws[0]), drop_in.sample(3, draws[1]))


def test_predictions_are_those_of_the_drop_in(likelihood, structure):
    native, drop_in = pair(likelihood, structure)
    for link in native.likelihood.links:
        prediction, expected = native.predict(X, link=link), drop_in(X, link_approx=link)
        assert_equal(prediction.mean, expected[0] if likelihood == "regression" else expected, 0.0)
    for method in ("nn", "linearized"):
        prediction, expected = native.predict(X, method=method), drop_in(X, pred_type=method)
        if likelihood == "regression":
            assert_equal(prediction.mean, expected[0], 0.0)
            assert_equal(prediction.epistemic_variance, expected[1], 1e-14)
        else:
            assert_equal(prediction.mean, expected, 0.0)


def test_a_prediction_has_the_moments_of_outputs_and_targets(likelihood):
    native = dl.fit(
        model_of(), batches(likelihood), likelihood, noise_variance=0.25 if likelihood == "regression" else 1
    )
    mean, covariance = functional_moments(native.network, native.posterior, X)
    for prediction in (native.predict(X, covariance=True), native.predict(X)):
        assert len(prediction) == len(X)
        assert_equal(prediction.outputs_mean, mean)
        assert_equal(prediction.outputs_variance, covariance.diagonal(dim1=1, dim2=2))
    found = native.predict(X, covariance=True).outputs_covariance
    assert_equal(found, covariance)
    assert torch.equal(found, found.mT)
    if likelihood == "regression":
        assert_equal(prediction.mean, mean)
        assert_equal(prediction.epistemic_variance, prediction.outputs_variance, 0.0)
        assert_equal(prediction.noise_variance, torch.full_like(mean, 0.25), 0.0)
        assert_equal(prediction.variance, prediction.outputs_variance + 0.25)
        for name in ("probabilities", "logits_mean", "logits_variance"):
            with pytest.raises(AttributeError, match=f"Expected a classification for {name}, got another prediction"):
                getattr(prediction, name)
    else:
        assert prediction.probabilities is prediction.mean
        assert prediction.logits_mean is prediction.outputs_mean
        assert prediction.logits_variance is prediction.outputs_variance
        assert prediction.epistemic_variance is prediction.noise_variance is None
        assert_equal(prediction.variance, prediction.mean * (1 - prediction.mean))


def test_samples_of_outputs_have_their_moments():
    native = dl.fit(model_of(), batches("regression"), "regression", noise_variance=0.5)
    for method in ("nn", "linearized"):
        prediction = native.predict(
            X, method=method, n_samples=7, covariance=True, generator=torch.Generator().manual_seed(3)
        )
        deviations = native.posterior.deviations(7, torch.Generator().manual_seed(3))
        if method == "nn":
            samples = []
            for deviation in deviations:
                moved = model_of()
                torch.nn.utils.vector_to_parameters(native.posterior.mean + deviation, moved.parameters())
                samples.append(moved(X).detach())
            expected = torch.stack(samples)
            assert_equal(prediction.mean, expected.mean(0))
            assert_equal(prediction.outputs_variance, expected.var(0))
            covariances = torch.stack([torch.cov(expected[:, n].mT) for n in range(len(X))])
            assert_equal(prediction.outputs_covariance, covariances)
        assert_equal(prediction.outputs_covariance.diagonal(dim1=1, dim2=2), prediction.outputs_variance)
        assert_equal(prediction.noise_variance, torch.full_like(prediction.mean, 0.5), 0.0)


def test_no_inputs_have_predictions_of_no_rows(likelihood):
    native = dl.fit(model_of(), batches(likelihood), likelihood)
    assert native.predict(X[:0]).mean.shape == (0, C)


# -- tuning ----------------------------------------------------------------------------------------


def test_tuning_on_validation_data_is_that_of_the_drop_in(likelihood):
    native, drop_in = pair(likelihood)
    validation = batches(likelihood, seed=2)
    options: dict[str, Any] = {"tune_temperature": True, "selection": "one_standard_error"}
    if likelihood == "regression":
        options = {"tune_sigma_noise": True}
    link = "mean_field" if likelihood == "classification" else None
    drop_in.optimize_prior_precision(method="gridsearch", val_loader=validation, link_approx=link, **options)
    tuned = native.tune(validation)
    assert_equal(tuned.posterior.prior_precision, drop_in.prior_precision, 1e-14)
    assert_equal(torch.tensor(tuned.posterior.noise_variance, dtype=torch.float64), drop_in.sigma_noise.square(), 1e-14)
    assert tuned.output_temperature == drop_in.output_temperature
    assert_equal(tuned.tuned.curve.losses, drop_in.curve.losses, 1e-14)
    expected = drop_in(X)
    assert_equal(tuned.predict(X).mean, expected[0] if likelihood == "regression" else expected, 1e-14)


@pytest.mark.parametrize("prior_structure", ["scalar", "layerwise"])
def test_tuning_by_the_marginal_likelihood_is_that_of_the_drop_in(likelihood, prior_structure):
    native, drop_in = pair(likelihood)
    noise = likelihood == "regression" and prior_structure == "scalar"
    drop_in.optimize_prior_precision(method="marglik", prior_structure=prior_structure, tune_sigma_noise=noise)
    tuned = native.tune(prior_structure=prior_structure, noise=noise if likelihood == "regression" else None)
    assert_equal(tuned.posterior.prior_precision, drop_in.prior_precision, 1e-14)
    assert_equal(tuned.log_marginal_likelihood(), drop_in.log_marginal_likelihood(), 1e-13)
    assert tuned.tuned is None


def test_one_prior_precision_for_each_block():
    native = dl.fit(model_of(), batches("classification"), "classification")
    tuned = native.tune(batches("classification", seed=2), prior_structure="layerwise", link="probit")
    assert tuned.posterior.prior_precision.shape == (2,)
    best = native.tune(batches("classification", seed=2), link="probit", selection="best")
    assert tuned.tuned.loss <= best.tuned.loss + 2e-6


def test_an_object_does_not_change():
    native = dl.fit(model_of(), batches("classification"), "classification")
    before = native.predict(X).mean
    tuned = native.tune(batches("classification", seed=2))
    assert tuned is not native
    assert torch.equal(native.predict(X).mean, before)
    assert native.tuned is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        native.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prior_structure": "diag"}, r"prior_structure out of \['scalar', 'layerwise'\], got 'diag'"),
        ({"link": "logit"}, "link_approx out of .*, got 'logit'"),
        ({"val_loader": []}, "Expected validation data, got an empty val_loader"),
        ({"val_loader": None, "temperature": True}, "expected a val_loader with temperature=True, got None"),
        ({"prior_precisions": torch.tensor([-1.0])}, "prior precision"),
        ({"noise": True}, "Expected a regression to tune its noise|has no noise"),
    ],
)
def test_tuning_says_what_is_wrong(options, match):
    native = dl.fit(model_of(), batches("classification"), "classification")
    loader = options.pop("val_loader", batches("classification"))
    with pytest.raises(ValueError, match=match):
        native.tune(loader, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "glmm"}, r"method out of \['glm', 'top_k', 'linearized', 'nn'\], got 'glmm'"),
        ({"link": "logit"}, "link_approx out of .*, got 'logit'"),
        ({"n_samples": 0}, "n_samples"),
    ],
)
def test_predictions_say_what_is_wrong(options, match):
    native = dl.fit(model_of(), batches("classification"), "classification")
    with pytest.raises(ValueError, match=match):
        native.predict(X, **options)


# -- files and descriptions ------------------------------------------------------------------------


def test_saved_and_loaded(likelihood, structure, tmp_path):
    native = dl.fit(model_of(), batches(likelihood), likelihood, structure=STRUCTURES[structure], seed=5)
    tuned = native.tune(batches(likelihood, seed=2))
    path = tmp_path / "posterior.safetensors"
    for posterior in (native, tuned):
        posterior.save(path)
        loaded = dl.load(path, model_of())
        assert str(loaded) == str(posterior)
        assert loaded.seed == 5
        for link in (None, "mc"):
            assert torch.equal(loaded.predict(X, link=link).mean, posterior.predict(X, link=link).mean)
        assert torch.equal(loaded.sample(2), posterior.sample(2))
        assert torch.equal(loaded.log_marginal_likelihood(), posterior.log_marginal_likelihood())
        assert (loaded.tuned is None) == (posterior.tuned is None)
    assert torch.equal(loaded.tuned.curve.losses, tuned.tuned.curve.losses)


def test_files_of_others_are_refused(tmp_path):
    native, drop_in = pair("classification")
    path = tmp_path / "file"
    drop_in.save(path)
    with pytest.raises(StoredFileError, match=r"that Laplace.save wrote in .*, got laplace. Read it with the class"):
        dl.load(path, model_of())
    native.fitted.save(path)
    with pytest.raises(StoredFileError, match=r"that Laplace.save wrote in .*, got fit"):
        dl.load(path, model_of())
    native.save(path)
    with pytest.raises(StoredFileError, match=r"Expected a saved DebiasedLaplace in .*, got posterior"):
        DebiasedLaplace.load(path, model_of())
    with pytest.raises(StoredFileError, match=r"Expected a saved fit in .*, got posterior"):
        Fit.load(path, model_of())
    with pytest.raises(ValueError, match="weights"):
        dl.load(path, model_of(seed=1))
    with pytest.raises(FileNotFoundError):
        dl.load(tmp_path / "nothing", model_of())


def test_a_few_readable_lines():
    native = dl.fit(model_of(), batches("classification"), "classification")
    lines = str(native.tune(batches("classification", seed=2))).splitlines()
    assert lines[0] == "Laplace posterior of 51 of 51 parameters"
    assert any("40, of which 40 gave the curvature" in line for line in lines)
    assert any("tuned on validation data" in line for line in lines)
    assert any(line.startswith("  covers           2 kronecker; 51 directions") for line in lines)
    assert "(as it was given)" in str(native)
    assert "(maximum of the marginal likelihood)" in str(native.tune())
    assert len(lines) < 8
    assert repr(native) == "<Laplace posterior of 51 of 51 parameters>"
    last = dl.fit(model_of(), batches("regression"), "regression", parameters="last_layer")
    assert str(last).startswith("Laplace posterior of 21 of 51 parameters")
    assert "standard deviation" in str(last)
    assert "The last layer: 2.weight, 2.bias." in last.coverage()


# -- the rest --------------------------------------------------------------------------------------


def test_data_are_added_to_an_earlier_posterior():
    first, second = batches("classification", 16), batches("classification", 24, seed=3)
    options = {"sampler": dl.UniformSampler(None), "split": dl.Single()}
    model = model_of()
    whole = dl.fit(model, first + second, "classification", **options)
    both = dl.fit(
        model, second, "classification", previous=dl.fit(model, first, "classification", **options), **options
    )
    assert both.posterior.n_data == 40
    assert_equal(both.predict(X).mean, whole.predict(X).mean)


def test_a_model_that_changed_is_told():
    model = model_of()
    native = dl.fit(model, batches("classification"), "classification")
    before = native.predict(X).mean
    with torch.no_grad():
        model[0].weight += 1
    with pytest.warns(ModelChangedWarning, match=r"The posterior is about the network of the fit") as caught:
        assert torch.equal(native.predict(X).mean, before)
    assert caught[0].filename == __file__


def test_the_model_is_left_alone_and_nothing_of_laplace_torch_is_imported():
    code = (
        "import sys, torch\n"
        "sys.modules['laplace'] = None  # an import of it would fail\n"
        "import debiased_laplace as dl\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).train()\n"
        "before = {name: p.clone() for name, p in model.state_dict().items()}\n"
        "data = [(torch.randn(20, 4), torch.randint(3, (20,)))]\n"
        "posterior = dl.fit(model, data, 'classification').tune(data)\n"
        "posterior.predict(data[0][0]), posterior.tune(), str(posterior), posterior.coverage()\n"
        "assert model.training and all(torch.equal(p, before[name]) for name, p in model.state_dict().items())\n"
        "heavy = {'matplotlib', 'sklearn', 'typer', 'torchmetrics'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_page_about_the_posterior_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(code_of(DOCS / "posterior.md")) == 6
    names = executed(DOCS / "posterior.md")
    assert "Laplace posterior of 259 of 259 parameters" in capsys.readouterr().out
    assert names["samples"].shape == (5, 3)
    assert names["drawn"].probabilities.sum(1).allclose(torch.ones(5))
    assert names["layerwise"].posterior.prior_precision.shape == (2,)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"structure": "kron"}, r"Expected structure to be an object such as Kronecker\(\), got 'kron'"),
        ({"structure": dl.Full}, r"Expected structure to be an object such as Kronecker\(\), got <class"),
        ({"sampler": 512}, r"Expected sampler to be an object such as PrioritySampler\(1024\), got 512"),
        ({"split": "single"}, r"Expected split to be an object such as CrossFit\(\), got 'single'"),
    ],
    ids=str,
)
def test_pieces_are_objects(setting, message):
    with pytest.raises(TypeError, match=message):
        dl.fit(model_of(), batches("classification"), "classification", **setting)


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (dl.Kronecker(), "Kronecker()"),
        (dl.Kronecker(max_factor=12, sharing=dl.Reduce()), "Kronecker(max_factor=12, sharing=Reduce())"),
        (dl.Kronecker(eigh_dtype=torch.float32), "Kronecker(eigh_dtype=torch.float32)"),
        (dl.LowRank(rank=5), "LowRank(rank=5)"),
        (dl.Isotropic(), "Isotropic()"),
        (dl.CrossFit(folds=2), "CrossFit(folds=2)"),
        (dl.Single(), "Single()"),
        ("Mine(<object at 0x1>)", "Mine(<object at 0x1>)"),
    ],
    ids=str,
)
def test_a_description_leaves_out_what_is_the_default(piece, expected):
    assert brief(piece if isinstance(piece, str) else repr(piece)) == expected
