"""The drop-in class: laplace-torch's numbers, names, shapes and habits, and errors that say what to do."""

from __future__ import annotations

import copy
import io
import logging
import math
import warnings

import laplace
import pytest
import torch
from laplace import Laplace
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import Bernoulli, DebiasedKronLaplace, DebiasedLaplace, Single, TwoBatch, UniformSampler
from debiased_laplace._checks import NotFittedError
from debiased_laplace.curvature.structures import Full
from debiased_laplace.testing import dense_jacobian, dense_posterior_precision
from tests.networks import ZOO, TiedEmbedding
from tests.test_fit import Watched
from tests.tolerances import EXACT, FLOAT32, assert_equal, assert_unbiased

N = 14


def model_of(name: str, outputs: int = 3, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    if name == "dense":
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).to(dtype)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(2, outputs)
    ).to(dtype)


def loader_of(name: str, likelihood: str, batch_size: int = N, dtype=torch.float64, seed: int = 2) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    shape = (N, 4) if name == "dense" else (N, 1, 4, 4)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if likelihood == "classification":
        y = torch.randint(3, (N,), generator=generator)
    else:
        y = torch.randn(N, 3, generator=generator, dtype=torch.float64).to(dtype)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def pair(name: str, likelihood: str, **options) -> tuple[DebiasedLaplace, laplace.KronLaplace, torch.Tensor]:
    """Ours, theirs, and new inputs."""
    loader = loader_of(name, likelihood)
    theirs = Laplace(model_of(name), likelihood, "all", "kron", **options)
    theirs.fit(loader)
    ours = DebiasedLaplace(model_of(name), likelihood, separate_bias=True, **options)
    ours.fit(loader, split=Single(), estimator="factored", budget=None)
    return ours, theirs, loader_of(name, likelihood, seed=5).dataset.tensors[0][:5]


def fitted(name: str = "dense", likelihood: str = "classification", dtype=torch.float64, **options) -> DebiasedLaplace:
    la = DebiasedLaplace(model_of(name, dtype=dtype), likelihood, **options)
    la.fit(loader_of(name, likelihood, dtype=dtype), budget=12)
    return la


X = loader_of("dense", "classification", seed=5).dataset.tensors[0][:5]

# -- equality with laplace-torch -------------------------------------------------------------------

# Prior precisions are powers of two: laplace-torch rounds them to single precision.
OPTIONS = [
    ("dense", "classification", {}),
    ("dense", "classification", {"temperature": 0.3, "prior_precision": 0.25}),
    ("convolutional", "classification", {"temperature": 2.0, "prior_precision": 3.0, "prior_mean": 0.1}),
    ("dense", "regression", {"sigma_noise": 0.6, "prior_precision": 0.5}),
    ("convolutional", "regression", {"sigma_noise": 1.7, "temperature": 0.4}),
]


@pytest.mark.parametrize(("name", "likelihood", "options"), OPTIONS)
def test_predictions_and_evidence_equal_those_of_laplace_torch(name, likelihood, options):
    ours, theirs, x = pair(name, likelihood, **options)
    if likelihood == "classification":
        for link in ("probit", "bridge", "bridge_norm"):
            assert_equal(ours(x, link_approx=link), theirs(x, link_approx=link))
    else:
        for keywords in ({}, {"diagonal_output": True}, {"joint": True}):
            for found, expected in zip(ours(x, **keywords), theirs(x, **keywords), strict=True):
                assert_equal(found, expected)
    for quantity in (
        "log_likelihood",
        "log_det_ratio",
        "log_det_prior_precision",
        "log_det_posterior_precision",
        "scatter",
    ):
        assert_equal(getattr(ours, quantity).reshape(()), getattr(theirs, quantity).reshape(()))
    assert_equal(ours.log_marginal_likelihood().reshape(()), theirs.log_marginal_likelihood().reshape(()))
    value = torch.randn(len(ours.mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_equal(ours.square_norm(value).reshape(()), theirs.square_norm(value).reshape(()))
    jacobians = dense_jacobian(ours.model, x)
    assert_equal(ours.functional_variance(jacobians), theirs.functional_variance(jacobians))
    assert_equal(ours.functional_covariance(jacobians), theirs.functional_covariance(jacobians))
    assert_equal(ours.mean, theirs.mean, 0.0)
    assert ours.n_data == theirs.n_data
    assert ours.n_outputs == theirs.n_outputs


@pytest.mark.parametrize("precision", [0.0625, torch.tensor([7.0])])
def test_another_prior_precision_after_the_fit(precision):
    ours, theirs, x = pair("dense", "classification")
    ours.prior_precision, theirs.prior_precision = precision, precision
    assert_equal(ours(x), theirs(x))
    assert_equal(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    assert_equal(ours.log_marginal_likelihood(torch.tensor(2.0)), theirs.log_marginal_likelihood(torch.tensor(2.0)))


def test_a_prior_precision_for_each_layer():
    ours, theirs, x = pair("dense", "classification")
    priors = torch.tensor([0.125, 0.5, 2.0, 8.0]).double()
    ours.prior_precision, theirs.prior_precision = priors, priors
    assert_equal(ours(x), theirs(x))
    assert_equal(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    assert_equal(ours.prior_precision_diag, theirs.prior_precision_diag)


@pytest.mark.filterwarnings("ignore:By default `link_approx` is:UserWarning")
def test_the_marginal_likelihood_is_not_below_what_gradient_steps_find():
    ours, theirs, _ = pair("dense", "classification")
    theirs.optimize_prior_precision(method="marglik", n_steps=300)
    ours.optimize_prior_precision()
    assert float(ours.log_marginal_likelihood()) >= float(theirs.log_marginal_likelihood()) - EXACT
    assert float(ours.log_marginal_likelihood()) == pytest.approx(float(theirs.log_marginal_likelihood()), abs=1e-3)


@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
def test_the_grid_search_finds_what_one_by_one_finds():
    ours, theirs, _ = pair("dense", "classification")
    validation = loader_of("dense", "classification", batch_size=5, seed=8)
    ours.optimize_prior_precision(
        method="gridsearch", val_loader=validation, grid_size=7, log_prior_prec_min=-2, log_prior_prec_max=3
    )
    losses = []
    for precision in torch.logspace(-2, 3, 7, dtype=torch.float64):
        theirs.prior_precision = float(precision)
        losses.append(-sum(
            theirs(x).gather(1, y[:, None]).log().sum() for x, y in validation) / N)  # fmt: skip
    assert_equal(ours.curve.losses, torch.stack(losses))
    assert float(ours.prior_precision) == pytest.approx(10 ** (-2 + 5 * int(torch.stack(losses).argmin()) / 6))


# -- a drop-in -------------------------------------------------------------------------------------


def test_it_is_one_of_theirs():
    la = Laplace(model_of("dense"), "classification", "all", "debiased_kron", prior_precision=2.0)
    assert type(la) is DebiasedKronLaplace
    assert isinstance(la, DebiasedLaplace)
    assert isinstance(la, laplace.ParametricLaplace)
    assert issubclass(DebiasedLaplace, laplace.BaseLaplace)
    la.fit(loader_of("dense", "classification"))
    assert la(X).shape == (5, 3)
    assert float(la.prior_precision) == 2.0


def test_shapes_of_classification():
    la = fitted()
    for keywords in (
        {}, {"link_approx": "mc"}, {"link_approx": "mc", "diagonal_output": True}, {"link_approx": "bridge"},
        {"pred_type": "nn", "link_approx": "mc"}, {"pred_type": "nn"}, {"pred_type": "linearized", "n_samples": 4},
    ):  # fmt: skip
        found = la(X, **keywords)
        assert found.shape == (5, 3)
        assert_equal(found.sum(1), torch.ones(5).double())
        assert not found.requires_grad


def test_shapes_of_regression():
    la = fitted(likelihood="regression")
    for keywords, shapes in (
        ({}, ((5, 3), (5, 3, 3))),
        ({"diagonal_output": True}, ((5, 3), (5, 3))),
        ({"joint": True}, ((15,), (15, 15))),
        ({"pred_type": "nn", "n_samples": 7}, ((5, 3), (5, 3))),
        ({"pred_type": "linearized", "n_samples": 7}, ((5, 3), (5, 3))),
    ):
        assert tuple(tuple(value.shape) for value in la(X, **keywords)) == shapes
    mean, covariance = la(X)
    assert_equal(la(X, diagonal_output=True)[1], covariance.diagonal(dim1=1, dim2=2))
    assert_equal(la(X, joint=True)[0], mean.flatten())


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("pred_type", ["glm", "nn", "linearized"])
def test_samples(likelihood, pred_type):
    la = fitted(likelihood=likelihood)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    one, other = (la.predictive_samples(X, pred_type, n_samples=6, generator=g) for g in generators)
    assert one.shape == (6, 5, 3)
    assert_equal(one, other, 0.0)
    functional = la.functional_samples(X, pred_type, n_samples=6, generator=torch.Generator().manual_seed(0))
    assert_equal(one, functional.softmax(-1) if likelihood == "classification" else functional)


def test_functional_samples_have_the_moments_of_the_prediction():
    la = fitted(likelihood="regression")
    mean, covariance = la(X)
    for pred_type in ("glm", "linearized"):
        generator = torch.Generator().manual_seed(0)
        samples = la.functional_samples(X, pred_type, n_samples=1500, generator=generator)
        assert_unbiased(samples, mean)
        centred = samples - mean
        assert_unbiased(torch.einsum("snc,snd->sncd", centred, centred), covariance)


def test_repeated_calls_share_their_draws_and_other_samples_do_not():
    la = fitted()
    for keywords in ({"link_approx": "mc"}, {"pred_type": "nn"}, {"pred_type": "linearized"}):
        assert_equal(la(X, **keywords), la(X, **keywords), 0.0)
        generator = torch.Generator().manual_seed(9)
        assert not torch.equal(la(X, **keywords), la(X, **keywords, generator=generator))
    assert not torch.equal(la.sample(2), la.sample(2))
    assert la.sample(3).shape == (3, la.n_params)
    before = torch.get_rng_state()
    la(X, link_approx="mc"), la.sample(2), la(X, pred_type="nn")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("pred_type", ["nn", "linearized"])
def test_shared_draws_follow_every_change(pred_type):
    """Draws that are kept must not outlive the posterior they were drawn from."""
    la = fitted(likelihood="regression")

    def fresh() -> torch.Tensor:
        other = DebiasedLaplace(la.model, "regression")
        other.load_state_dict(la.state_dict())
        return other(X, pred_type=pred_type, n_samples=5)[1]

    def ask() -> torch.Tensor:
        return la(X, pred_type=pred_type, n_samples=5)[1]

    seen = [ask()]
    for name, value in (("prior_precision", 3.0), ("sigma_noise", 0.5), ("temperature", 0.3), ("prior_precision", 1.0),
                        ("prior_precision", torch.tensor([1.0, 2.0])), ("seed", 5)):  # fmt: skip
        setattr(la, name, value)
        seen.append(ask())
        assert_equal(seen[-1], fresh(), 0.0)
        assert not torch.equal(seen[-1], seen[-2])
    la.fit(loader_of("dense", "regression", seed=11))
    assert_equal(ask(), fresh(), 0.0)
    assert not torch.equal(ask(), seen[-1])


def test_the_monte_carlo_link_approaches_the_expectation():
    la = fitted()
    draws = torch.stack([
        la(X, link_approx="mc", n_samples=1, generator=torch.Generator().manual_seed(seed)) for seed in range(400)
    ])  # fmt: skip
    mean, covariance = la._glm_predictive_distribution(X)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = torch.distributions.MultivariateNormal(mean, covariance).sample((400,)).softmax(-1)
    assert_unbiased(draws - reference, torch.zeros(5, 3).double())


def test_bernoulli_likelihood():
    model = model_of("dense", outputs=1)
    loader = loader_of("dense", "classification")
    x, y = loader.dataset.tensors
    la = DebiasedLaplace(model, Bernoulli())
    la.fit([(x, (y > 0).double())])
    for link in ("probit", "mc"):
        found = la(X, link_approx=link)
        assert found.shape == (5, 1)
        assert bool(((found > 0) & (found < 1)).all())
    expected = -nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], (y > 0).double(), reduction="sum")
    assert_equal(la.log_likelihood, expected)
    la.optimize_prior_precision(method="marglik")
    assert la.predictive_samples(X, n_samples=4).shape == (4, 5, 1)


@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
def test_the_link_of_tuning_is_the_default_of_predictions():
    la = fitted()
    assert_equal(la(X), la(X, link_approx="probit"), 0.0)
    la.optimize_prior_precision(
        method="gridsearch", val_loader=loader_of("dense", "classification", seed=8), link_approx="bridge", grid_size=5
    )
    assert la.link == "bridge"
    assert_equal(la(X), la(X, link_approx="bridge"), 0.0)
    assert not torch.equal(la(X), la(X, link_approx="probit"))
    la.optimize_prior_precision(method="marglik")
    assert_equal(la(X), la(X, link_approx="bridge"), 0.0)


def test_the_edge_of_the_grid_warns():
    la = fitted()
    with pytest.warns(UserWarning, match="is the (smallest|largest) of the grid"):
        la.optimize_prior_precision(
            method="gridsearch", val_loader=loader_of("dense", "classification"), grid_size=3, log_prior_prec_min=3,
            log_prior_prec_max=4,
        )  # fmt: skip


def test_a_prior_for_each_block_by_marginal_likelihood():
    la = fitted("convolutional")
    la.optimize_prior_precision(prior_structure="layerwise")
    assert la.prior_precision.shape == (3,)
    layerwise = float(la.log_marginal_likelihood())
    la.optimize_prior_precision()
    assert layerwise > float(la.log_marginal_likelihood())


def test_dictionary_batches():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, batch):
            return self.layer(batch["input_ids"])

    x, y = loader_of("dense", "classification").dataset.tensors
    torch.manual_seed(0)
    model = Encoder().double()
    la = DebiasedLaplace(model, "classification", dict_key_y="classes")
    la.fit([{"input_ids": part, "classes": target} for part, target in zip(x.split(4), y.split(4), strict=True)])
    plain = DebiasedLaplace(model.layer, "classification")
    plain.fit([(x, y)])
    assert_equal(la({"input_ids": X}), plain(X))


def test_coverage_lists_every_parameter():
    model = ZOO["batch-norm"].model()
    model[3].bias.requires_grad_(False)
    la = DebiasedLaplace(model, "classification")
    la.fit([(ZOO["batch-norm"].inputs(8), torch.arange(8) % 2)])
    text = la.coverage()
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["0.weight", "1", "3.weight", "5"]
    for name, p in model.named_parameters():
        assert name in text
        if name == "3.bias":
            assert f"Frozen and left out: {name}." in text
        else:
            assert p.requires_grad
    assert "dense 8" in lines[2]
    assert "4 x 4" in lines[1]
    assert lines[5].startswith("Share of the parameters: ")
    assert lines[6] == f"{la.n_params} of {la.n_params} trainable parameters covered by 4 blocks."


# -- differentiable --------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["probit", "bridge", "mc"])
def test_predictions_are_differentiable_in_their_inputs(link):
    la = fitted(enable_backprop=True)
    plain = fitted()
    x = X[:2].clone().requires_grad_()
    assert_equal(la(x, link_approx=link), plain(X[:2], link_approx=link))
    assert torch.autograd.gradcheck(lambda x: la(x, link_approx=link, n_samples=3), x, atol=1e-6, rtol=1e-5)


def test_regression_is_differentiable_in_its_inputs():
    la, plain = (fitted(likelihood="regression", enable_backprop=flag) for flag in (True, False))
    x = X[:2].clone().requires_grad_()
    for found, expected in zip(la(x), plain(X[:2]), strict=True):
        assert_equal(found, expected)
    assert torch.autograd.gradcheck(lambda x: la(x), x)


def test_differentiable_predictions_leave_a_training_model_alone():
    """laplace-torch's Jacobians would run dropout and move the statistics of a batch normalisation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[1].running_mean.normal_()
    expected = DebiasedLaplace(copy.deepcopy(model).eval(), "classification")
    la = DebiasedLaplace(model.train(), "classification", enable_backprop=True)
    for one in (expected, la):
        one.fit(loader_of("dense", "classification"))
    watched = Watched(model)
    assert_equal(la(X), expected(X))
    watched.check()


def test_the_evidence_is_differentiable_in_prior_and_noise():
    la = fitted(likelihood="regression", prior_precision=0.5, sigma_noise=0.7)

    def evidence(log_prior, log_sigma):
        return la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp()).reshape(())

    point = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.3, 0.2)]
    assert torch.autograd.gradcheck(evidence, point)
    blocks = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: la.log_marginal_likelihood(p.exp()).reshape(()), blocks)


# -- state -----------------------------------------------------------------------------------------


def round_trip(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
@pytest.mark.parametrize("name", ["dense", "convolutional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_state_predicts_bitwise_the_same(name, dtype):
    la = fitted(name, dtype=dtype, temperature=0.8, prior_mean=0.1, seed=4)
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=loader_of(name, "classification", dtype=dtype, seed=8),
        link_approx="mc",
        grid_size=4,
    )
    restored = DebiasedLaplace(model_of(name, dtype=dtype), "classification")
    restored.load_state_dict(round_trip(la.state_dict()))
    x = loader_of(name, "classification", dtype=dtype, seed=5).dataset.tensors[0]
    for keywords in ({}, {"link_approx": "probit"}, {"link_approx": "bridge"}, {"pred_type": "nn"}):
        assert_equal(restored(x, **keywords), la(x, **keywords), 0.0)
    assert restored.link == "mc"
    assert torch.equal(restored.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert restored.coverage() == la.coverage()
    assert restored.n_data == la.n_data
    assert restored.state_dict().keys() == la.state_dict().keys()


@pytest.mark.parametrize("network", ["transformer-sequence-first", "tied-weights", "lone-parameters", "batch-norm"])
def test_the_state_of_any_network_is_restored(network):
    case = ZOO[network]
    la = DebiasedLaplace(case.model(), "classification")
    la.fit([(case.inputs(8), torch.arange(8) % 2)])
    restored = DebiasedLaplace(case.model(), "classification")
    restored.load_state_dict(round_trip(la.state_dict()))
    assert_equal(restored(case.inputs(3, seed=5)), la(case.inputs(3, seed=5)), 0.0)


def test_a_state_is_a_copy():
    la = fitted()
    state = la.state_dict()
    before = la(X)
    state["fit"]["posterior"]["curvatures"] += 1
    state["fit"]["posterior"]["mean"] += 1
    state["fit"]["posterior"]["basis"]["parts"][0]["outputs"].zero_()
    state["prior_precision"] += 1
    assert_equal(la(X), before, 0.0)


def test_states_of_another_model():
    state = fitted().state_dict()
    other = model_of("dense")
    other[0].weight.data += 0.25
    for target, match in (
        (
            DebiasedLaplace(model_of("dense", outputs=4), "classification"),
            r"same trainable parameters; these differ: .*2\.bias",
        ),
        (DebiasedLaplace(model_of("convolutional"), "classification"), "same trainable parameters; these differ"),
        (DebiasedLaplace(other, "classification"), r"same weights; these differ: \['0.weight'\], by up to 0.25"),
        (DebiasedLaplace(model_of("dense"), "regression"), "likelihood 'Gaussian', got 'Categorical'"),
    ):
        with pytest.raises(ValueError, match=match):
            target.load_state_dict(state)
        with pytest.raises(NotFittedError, match=r"Call fit\(train_loader\) or load_state_dict first"):
            target(X)
    for key, value in (("format", 99), ("hessian_structure", "diag"), ("subset_of_weights", "last_layer")):
        with pytest.raises(ValueError, match=f"Expected a state with {key} .* got {value!r}"):
            DebiasedLaplace(model_of("dense"), "classification").load_state_dict({**state, key: value})
    with pytest.raises(ValueError, match="Expected a state with format"):
        DebiasedLaplace(model_of("dense"), "classification").load_state_dict({})


# -- habits ----------------------------------------------------------------------------------------


def test_a_fit_and_predictions_leave_the_model_alone():
    model = model_of("convolutional").train()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    watched = Watched(model)
    la = DebiasedLaplace(model, "classification")
    watched.check()
    la.fit(loader_of("convolutional", "classification"))
    watched.check()  # laplace-torch leaves output_size and evaluation mode behind
    x = loader_of("convolutional", "classification").dataset.tensors[0]
    for keywords in ({}, {"link_approx": "mc"}, {"pred_type": "nn"}, {"pred_type": "linearized", "n_samples": 2}):
        la(x, **keywords)
    la.optimize_prior_precision()
    la.sample(2), la.log_marginal_likelihood(), la.state_dict(), la.coverage()
    watched.check()


def test_a_failed_fit_keeps_the_one_before():
    la = fitted()
    before = la(X)
    with pytest.raises(ValueError, match="class indices"):
        la.fit([(X, torch.full((5,), 7))])
    assert_equal(la(X), before, 0.0)


def test_a_refit_is_a_fresh_fit():
    la = fitted()
    x, y = loader_of("dense", "classification", seed=11).dataset.tensors
    la.fit([(x, y)])
    fresh = DebiasedLaplace(model_of("dense"), "classification")
    fresh.fit([(x, y)])
    assert_equal(la(X), fresh(X), 0.0)
    assert la.loss == fresh.loss


def test_a_refit_after_training_uses_the_new_weights():
    la = fitted()
    la.model[0].weight.data *= 2
    la.fit(loader_of("dense", "classification"), budget=12)
    assert_equal(la.mean, torch.cat([p.detach().flatten() for p in la.model.parameters()]), 0.0)
    fresh = DebiasedLaplace(la.model, "classification")
    fresh.fit(loader_of("dense", "classification"), budget=12)
    assert_equal(la(X), fresh(X), 0.0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_predictions_inside_no_grad_and_inference_mode(context):
    la = fitted()
    expected = {name: la(X, **keywords) for name, keywords in CALLS.items()}
    samples = la.functional_samples(X, n_samples=2, generator=torch.Generator().manual_seed(0))
    with context():
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        for name, keywords in CALLS.items():
            assert_equal(la(X.clone(), **keywords), expected[name], 0.0)
        generator = torch.Generator().manual_seed(0)
        assert_equal(la.functional_samples(X.clone(), n_samples=2, generator=generator), samples)
        la.log_marginal_likelihood()
        la.fit(loader_of("dense", "classification"), budget=12)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == mode
    assert_equal(la(X), expected["probit"])


CALLS = {"probit": {}, "mc": {"link_approx": "mc"}, "nn": {"pred_type": "nn"},
         "linearized": {"pred_type": "linearized", "n_samples": 2}}  # fmt: skip


def test_the_dataset_is_longer_than_the_loader(caplog):
    loader = DataLoader(loader_of("dense", "classification").dataset, batch_size=5, drop_last=True)
    la = DebiasedLaplace(model_of("dense"), "classification")
    with caplog.at_level(logging.WARNING, logger="debiased_laplace"):
        la.fit(loader)
    assert "The loader gave 10 data, its dataset says that it has 14" in caplog.text
    assert la.n_data == 10
    caplog.clear()
    la.fit(loader, n_data=14)
    assert la.n_data == 14
    assert "dataset has" not in caplog.text


def test_the_scale_is_that_of_the_training_set_whatever_the_budget():
    """A fit on few data must not be less certain for it."""
    inputs = [float(fitted_with_budget(b).log_det_ratio) for b in (None, 10)]
    assert inputs[1] == pytest.approx(inputs[0], rel=0.2)
    la = fitted_with_budget(10)
    precision = dense_posterior_precision(la.posterior)
    expected = la.n_data * la.fitted.posterior.curvatures.sum() + la.n_params * 1.0
    assert_equal(precision.trace(), expected)


def fitted_with_budget(budget):
    la = DebiasedLaplace(model_of("dense"), "classification")
    la.fit(loader_of("dense", "classification"), budget=budget)
    return la


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions(dtype):
    la = fitted(dtype=dtype)
    reference = fitted()
    assert la.prior_precision.dtype == torch.float32
    found = la(X.to(dtype))
    assert found.dtype == torch.float32
    # bfloat16 rounds every weight and activation to eight bits.
    assert_equal(found.double(), reference(X), FLOAT32 if dtype == torch.float32 else 2**-4)
    la.optimize_prior_precision()
    for keywords in CALLS.values():
        assert bool(la(X.to(dtype), **keywords).isfinite().all())


def test_single_output_models_that_return_a_vector():
    case = ZOO["single-output"]
    la = DebiasedLaplace(case.model(), "regression")
    la.fit([(case.inputs(8), torch.randn(8, 1).double())])
    mean, covariance = la(case.inputs(3))
    assert mean.shape == (3, 1)
    assert covariance.shape == (3, 1, 1)
    for pred_type in ("nn", "linearized"):
        assert la(case.inputs(3), pred_type=pred_type)[0].shape == (3, 1)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda la: la(X), lambda la: la.sample(2), lambda la: la.log_marginal_likelihood(), lambda la: la.coverage(),
        lambda la: la.state_dict(), lambda la: la.functional_samples(X), lambda la: la.predictive_samples(X),
        lambda la: la.optimize_prior_precision(), lambda la: la.posterior, lambda la: la.log_likelihood,
        lambda la: la(X, pred_type="nn"), lambda la: la.network, lambda la: la.posterior_precision,
        lambda la: la.functional_variance(torch.zeros(1, 3, 43)), lambda la: la.save("nowhere"),
    ],
)  # fmt: skip
def test_everything_before_the_fit_says_what_to_do(ask):
    with pytest.raises(NotFittedError, match=r"Call fit\(train_loader\) or load_state_dict first"):
        ask(DebiasedLaplace(model_of("dense"), "classification"))


def test_not_fitted_is_an_attribute_error_too():
    assert issubclass(NotFittedError, AttributeError)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"likelihood": "gamma"}, ValueError, "likelihood out of"),
        (
            {"subset_of_weights": "first_layer"},
            ValueError,
            "subset_of_weights out of .*'last_layer'.*, got 'first_layer'",
        ),
        ({"hessian_structure": "gp"}, ValueError, "hessian_structure out of .*'full'.*, got 'gp'"),
        ({"prior_precision": -1.0}, ValueError, "positive, finite prior precisions"),
        ({"prior_precision": float("nan")}, ValueError, "positive, finite prior precisions"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"likelihood": "regression", "sigma_noise": -0.1}, ValueError, "sigma_noise"),
        ({"sigma_noise": 0.5}, ValueError, "only available for regression"),
        ({"colour": "red"}, TypeError, r"DebiasedLaplace.*unexpected keyword argument 'colour'"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        DebiasedLaplace(model_of("dense"), **{"likelihood": "classification", **arguments})


def test_a_backend_has_no_effect_and_says_so():
    with pytest.warns(UserWarning, match="of backend arguments only the kind"):
        DebiasedLaplace(model_of("dense"), "classification", backend=object)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DebiasedLaplace(model_of("dense"), "classification", backend=None)


def test_a_model_without_trainable_parameters():
    with pytest.raises(ValueError, match="trainable parameters, got none"):
        DebiasedLaplace(model_of("dense").requires_grad_(False), "classification")


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"pred_type": "gp"}, r"pred_type out of \['glm', 'nn', 'linearized'\], got 'gp'"),
        ({"link_approx": "sigmoid"}, "link_approx out of"),
        ({"pred_type": "nn", "link_approx": "probit"}, "Samples have no link approximation"),
        ({"pred_type": "nn", "n_samples": 0}, "n_samples of at least 1"),
        ({"link_approx": "mc", "n_samples": 0}, "n_samples of at least 1"),
    ],
)
def test_bad_predictions(keywords, match):
    with pytest.raises(ValueError, match=match):
        fitted()(X, **keywords)


@pytest.mark.parametrize("method", ["functional_samples", "predictive_samples"])
def test_bad_samples(method):
    with pytest.raises(ValueError, match="pred_type out of"):
        getattr(fitted(), method)(X, pred_type="gp")


def test_extra_model_arguments():
    with pytest.raises(TypeError, match=r"for pred_type 'nn' and 'linearized', got \['mask'\]"):
        fitted()(X, mask=X)


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf"), torch.tensor([1.0, -1.0]), [], "strong",
                                   torch.ones(3), torch.ones(1, 2)])  # fmt: skip
def test_bad_prior_precisions_are_refused_and_the_old_one_stays(value):
    la = fitted(prior_precision=2.0)
    with pytest.raises(ValueError, match="prior precision"):
        la.prior_precision = value
    assert float(la.prior_precision) == 2.0


@pytest.mark.parametrize("name", ["sigma_noise", "temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_bad_noise_and_temperature_after_the_fit(name, value):
    la = fitted(likelihood="regression")
    with pytest.raises(ValueError, match="temperature" if name == "temperature" else "noise"):
        setattr(la, name, value)
        la(X)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"method": "bayesopt"}, "method 'marglik' or 'gridsearch', got 'bayesopt'"),
        ({"method": "gridsearch"}, "val_loader with validation batches"),
        ({"method": "gridsearch", "val_loader": [], "pred_type": "nn"}, "empty val_loader"),
        ({"method": "gridsearch", "val_loader": [], "pred_type": "gp"}, "pred_type out of"),
        (
            {"method": "gridsearch", "val_loader": [], "loss": "nll"},
            "torchmetrics.Metric, a function or None, got 'nll'",
        ),
        ({"method": "gridsearch", "val_loader": [], "grid_size": 0}, "grid_size of at least 1"),
        ({"method": "gridsearch", "val_loader": [], "log_prior_prec_min": 5}, "log_prior_prec_min <="),
        ({"method": "gridsearch", "val_loader": []}, "empty val_loader"),
        ({"prior_structure": "diag"}, "does not commute with a Kronecker basis"),
    ],
)
def test_bad_tuning(keywords, match):
    with pytest.raises(ValueError, match=match):
        fitted().optimize_prior_precision(**keywords)


def test_bad_fits():
    la = DebiasedLaplace(model_of("dense"), "classification")
    loader = loader_of("dense", "classification")
    with pytest.raises(ValueError, match=r"structure Kronecker\(...\) with hessian_structure='kron', got Full"):
        la.fit(loader, structure=Full())
    with pytest.raises(ValueError, match="either a budget or a sampler"):
        la.fit(loader, budget=10, sampler=UniformSampler(10))
    with pytest.raises(ValueError, match="empty loader"):
        la.fit([])
    with pytest.raises(ValueError, match="one for each of the 2 blocks"):
        DebiasedLaplace(model_of("dense"), "classification", prior_precision=torch.ones(3)).fit(loader)


def test_a_fit_warns_of_many_parameters_without_factors():
    tied = TiedEmbedding(vocabulary=3000)
    with pytest.warns(UserWarning, match=r"100 % of the parameters have a diagonal curvature.*: tokens.weight\."):
        DebiasedLaplace(tied, "classification").fit([(torch.randint(3000, (4, 4)), torch.zeros(4).long())])


def test_marglik_with_validation_data_warns():
    with pytest.warns(UserWarning, match="Did you mean 'gridsearch'"):
        fitted().optimize_prior_precision(val_loader=[])


def test_bad_jacobians():
    la = fitted()
    with pytest.raises(ValueError, match="Invalid Jacobians shape"):
        la.functional_variance(torch.zeros(2, 3, 7).double())


def test_a_model_on_another_device(second_device):
    la = DebiasedLaplace(model_of("dense").to(second_device), "classification")
    la.fit(loader_of("dense", "classification"), budget=12)
    assert la(X).device.type == second_device.type
    assert_equal(la(X), fitted()(X))


def test_splits_and_samplers_are_passed_on():
    la = DebiasedLaplace(model_of("dense"), "classification")
    la.fit(loader_of("dense", "classification"), sampler=UniformSampler(9), split=TwoBatch(3))
    assert len(la.fitted.direction_indices) == 3
    assert len(la.fitted.curvature_indices) == 6
    assert math.isfinite(float(la.log_marginal_likelihood()))
