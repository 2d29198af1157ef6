"""The composition: invariances, refits, and a model that stays as it was."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from debiased_laplace import PrioritySampler, Single, TwoBatch, UniformSampler
from debiased_laplace._checks import NonFiniteError
from debiased_laplace.fitting.fit import fit, make_generator
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian
from debiased_laplace.network.network import Network
from debiased_laplace.testing import dense_basis, dense_ggn
from tests.networks import ZOO
from tests.tolerances import EXACT, assert_equal, assert_unbiased

CASE = ZOO["cnn"]
N = 17


def data(n: int = N, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = CASE.inputs(n, seed=seed + 1)
    return inputs, torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed))


def batches(size: int = 5, n: int = N, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, targets = data(n, seed)
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def fitted(loader=None, model: nn.Module | None = None, budget: int | None = 10, **options) -> Fit:
    model = CASE.model() if model is None else model
    loader = batches() if loader is None else loader
    options = {"sampler": UniformSampler(budget), "generator": 3} | options
    return fit(model, loader, options.pop("likelihood", Categorical()), **options)


def dense(result: Fit) -> torch.Tensor:
    """U diag(curvatures) U^T, which does not depend on the signs of the directions."""
    columns = dense_basis(result.posterior.basis)
    return columns @ torch.diag(result.posterior.curvatures) @ columns.mT


def assert_same(one: Fit, other: Fit, tolerance: float = EXACT) -> None:
    assert torch.equal(one.direction_indices, other.direction_indices)
    assert torch.equal(one.curvature_indices, other.curvature_indices)
    assert (one.n_seen, one.mc_samples) == (other.n_seen, other.mc_samples)
    assert one.mean_loss == pytest.approx(other.mean_loss, rel=EXACT)
    assert_equal(dense(one), dense(other), tolerance)
    assert_equal(one.posterior.mean, other.posterior.mean, 0.0)


def assert_identical(one: Fit, other: Fit) -> None:
    assert_same(one, other, 0.0)
    for a, b in zip(one.posterior.basis.parts, other.posterior.basis.parts, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.outputs, b.outputs)
    assert torch.equal(one.posterior.curvatures, other.posterior.curvatures)


# -- what a fit is ---------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [Single(), TwoBatch(), Single(3), TwoBatch(4)])
@pytest.mark.parametrize("budget", [None, 9])
def test_curvatures_are_those_of_the_measuring_data(split, budget, device):
    model = CASE.model().to(device)
    result = fitted(model=model, budget=budget, split=split)
    drawn, measured = result.sample.data.indices, result.curvature_indices
    weights = torch.zeros(N, dtype=torch.float64)
    weights[drawn] = 1 / N  # for themselves; those that measure stand for all others
    weights[measured] += (1 - len(drawn) / N) / len(measured)
    inputs, targets = (tensor.to(device) for tensor in data())
    ggn = dense_ggn(model, inputs, weights.to(device), Categorical(), targets)
    columns = dense_basis(result.posterior.basis)
    assert_equal(result.posterior.curvatures, torch.einsum("dr,de,er->r", columns, ggn, columns))
    overlap = set(result.direction_indices.tolist()) & set(result.curvature_indices.tolist())
    assert len(overlap) == (0 if isinstance(split, TwoBatch) else budget or N)
    assert result.posterior.n_data == result.n_seen == N


def test_the_mean_loss_is_that_of_all_data_if_all_were_drawn():
    result = fitted(budget=None)
    inputs, targets = data()
    expected = nn.functional.cross_entropy(CASE.model()(inputs), targets).detach()
    assert result.mean_loss == pytest.approx(float(expected), rel=EXACT)


def test_the_mean_loss_of_a_draw_is_unbiased():
    inputs, targets = data()
    losses = torch.tensor([fitted(generator=seed, budget=4).mean_loss for seed in range(60)], dtype=torch.float64)
    assert_unbiased(losses, nn.functional.cross_entropy(CASE.model()(inputs), targets).detach())


@pytest.mark.parametrize("estimator", ["projected", "factored"])
def test_the_expected_curvature_of_two_batches_along_fixed_directions(estimator):
    """Trace over the directions: it does not depend on them for the projected estimate."""
    inputs, targets = data()
    ggn = dense_ggn(CASE.model(), inputs, torch.full((N,), 1 / N).double(), Categorical(), targets)
    traces = torch.tensor(
        [float(fitted(generator=seed, budget=6, estimator=estimator).posterior.curvatures.sum()) for seed in range(60)]
    ).double()
    if estimator == "projected":
        assert_unbiased(traces, ggn.trace())
    else:  # the product of means is not the mean of products, but it is of the same size
        assert 0.3 < float(traces.mean() / ggn.trace()) < 3


def test_random_vectors_are_reproducible_and_reported(caplog):
    one, other, exact = (fitted(mc_samples=m, generator=g) for m, g in ((2, 3), (2, 3), (None, 3)))
    assert_identical(one, other)
    assert (one.mc_samples, exact.mc_samples) == (2, None)
    assert not torch.equal(one.posterior.curvatures, exact.posterior.curvatures)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(60, 33)).double()
    with caplog.at_level("INFO", logger="debiased_laplace"):
        assert fitted(model=wide).mc_samples == 1
        assert fitted().mc_samples is None
    assert "33 outputs, more than 32: one random vector" in caplog.text
    assert "2 outputs: the loss Hessian is exact" in caplog.text


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("mc_samples", [None, 2])
def test_chunks_change_nothing(chunk_size, mc_samples):
    """With data enough to fix every direction: within a null space directions are as good as each other."""
    options = {"loader": batches(n=50), "budget": None, "mc_samples": mc_samples}
    assert_same(fitted(**options, chunk_size=chunk_size), fitted(**options))


# -- invariances -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("budget", [None, 10])
def test_the_loaders_batch_size_changes_nothing(size, budget):
    """Sizes with a ragged last batch among them."""
    assert_identical(fitted(batches(size), budget=budget), fitted(batches(5), budget=budget))


def test_the_order_of_the_data_changes_nothing_if_all_are_used():
    inputs, targets = data()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    one = fitted([(inputs, targets)], budget=None, split=Single())
    other = fitted([(inputs[order], targets[order])], budget=None, split=Single())
    assert_equal(dense(one), dense(other))
    assert one.mean_loss == pytest.approx(other.mean_loss, rel=EXACT)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(*data(), strict=True)


class Pairs(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        inputs, targets = data()
        return inputs[index], targets[index]


@pytest.mark.parametrize(
    "loader",
    [
        lambda: iter(batches()),
        lambda: (batch for batch in batches()),
        lambda: tuple(map(list, batches())),
        lambda: DataLoader(TensorDataset(*data()), batch_size=4),
        lambda: DataLoader(Pairs(), batch_size=4),
        lambda: DataLoader(Stream(), batch_size=4),
    ],
    ids=["iterator", "generator", "lists", "tensor-dataset", "dataset", "iterable-dataset"],
)
def test_any_iterable_gives_the_same_fit(loader):
    assert_identical(fitted(loader()), fitted())


def test_the_same_seed_gives_the_same_fit_and_another_another():
    assert_identical(fitted(generator=1), fitted(generator=1))
    assert_identical(fitted(generator=torch.Generator().manual_seed(1)), fitted(generator=1))
    assert not torch.equal(fitted(generator=1).direction_indices, fitted(generator=2).direction_indices)


def test_the_callers_random_state_does_not_matter():
    torch.manual_seed(1)
    one = fitted()
    torch.manual_seed(2)
    assert_identical(one, fitted())


def test_a_refit_after_other_data_is_a_fresh_fit():
    model = CASE.model()
    fitted(batches(seed=5), model=model)
    assert_identical(fitted(model=model), fitted())


def test_a_deep_copy_of_the_model_gives_the_same():
    model = CASE.model()
    assert_identical(fitted(model=copy.deepcopy(model)), fitted(model=model))


def test_the_size_of_the_training_set_can_be_said():
    assert fitted(n_data=1000).posterior.n_data == 1000
    assert torch.equal(
        fitted(n_data=1000, split=Single()).posterior.curvatures, fitted(split=Single()).posterior.curvatures
    )


def test_posterior_fields_are_passed_on():
    posterior = fitted(temperature=0.5, prior_precision=[1.0, 2.0, 3.0], prior_mean=0.1).posterior
    assert posterior.temperature == 0.5
    assert posterior.prior_precision.tolist() == [1.0, 2.0, 3.0]
    assert posterior.prior_mean == 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_fit_in_float32(dtype):
    inputs, targets = data()
    result = fitted([(inputs.to(dtype), targets)], model=CASE.model(dtype=dtype))
    assert result.posterior.curvatures.dtype == torch.float32
    assert result.posterior.mean.dtype == torch.float32
    reference = fitted()
    trace = reference.posterior.curvatures.sum()
    # Eight bits of mantissa in every activation of bfloat16.
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert abs(float(result.posterior.curvatures.double().sum() / trace) - 1) < tolerance


# -- the user's things stay as they were -----------------------------------------------------------


class Watched:
    """Everything about a model and the program that a fit could change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = {key: value.clone() for key, value in model.state_dict().items()}
        self.modes = {name: module.training for name, module in model.named_modules()}
        grads = {name: p.grad for name, p in model.named_parameters()}
        self.grads = {name: (grad, None if grad is None else grad.clone()) for name, grad in grads.items()}
        self.requires = {name: p.requires_grad for name, p in model.named_parameters()}
        self.parameters = {name: id(p) for name, p in model.named_parameters()}
        self.attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
        self.hooks = {
            name: [len(value) for key, value in sorted(vars(module).items()) if "hooks" in key]
            for name, module in model.named_modules()
        }
        self.random = random.getstate()
        self.numpy = np.random.get_state()
        self.torch = torch.get_rng_state()
        self.grad_mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.dtype = torch.get_default_dtype()

    def check(self) -> None:
        now = Watched(self.model)
        assert self.state.keys() == now.state.keys()
        for key, value in self.state.items():
            assert torch.equal(value, now.state[key]), key
        for name, (gradient, value) in self.grads.items():
            assert now.grads[name][0] is gradient
            assert value is None or torch.equal(value, gradient)
        for field in ("modes", "requires", "parameters", "attributes", "hooks", "random", "grad_mode", "dtype"):
            assert getattr(self, field) == getattr(now, field), field
        assert self.numpy[0] == now.numpy[0]
        assert np.array_equal(self.numpy[1], now.numpy[1])
        assert self.numpy[2:] == now.numpy[2:]
        assert torch.equal(self.torch, now.torch)


def watched_model() -> nn.Module:
    model = ZOO["batch-norm"].model()
    model.train()
    model[1].eval()
    model[3].train()
    model.append(nn.Dropout(0.5))
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[5].register_forward_hook(lambda *_: None)
    model[5].weight.register_hook(lambda gradient: 100 * gradient)
    return model


class Augmented(Dataset):
    """Draws from all three global generators, as augmentations do."""

    def __len__(self):
        return 9

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return ZOO["batch-norm"].inputs(9)[index] + noise, index % 2


def raising(batches_):
    yield from batches_
    raise OSError("the disk is gone")


@pytest.mark.parametrize("loader", ["list", "shuffling", "raising", "not-a-number", "bad-labels"])
def test_nothing_is_changed_also_after_an_exception(loader):
    case = ZOO["batch-norm"]
    inputs, targets = case.inputs(9), torch.arange(9) % 2
    bad = inputs.clone()
    bad[5:] = float("nan")
    loaders = {
        "list": [(inputs, targets)],
        "shuffling": DataLoader(Augmented(), batch_size=4, shuffle=True),
        "raising": raising([(inputs, targets)]),
        "not-a-number": [(bad, targets)],
        "bad-labels": [(inputs, targets + 7)],
    }
    model = watched_model()
    watched = Watched(model)
    errors = {"raising": OSError, "not-a-number": NonFiniteError, "bad-labels": ValueError}
    matches = {"raising": "the disk is gone", "not-a-number": "NaN", "bad-labels": "class indices"}
    if loader in errors:
        with pytest.raises(errors[loader], match=matches[loader]):
            fitted(loaders[loader], model=model, budget=None)
    else:
        fitted(loaders[loader], model=model, budget=None)
    watched.check()
    assert torch.equal(inputs, case.inputs(9))


def test_batch_statistics_in_training_mode_do_not_move():
    model = ZOO["batch-norm"].model().train()
    before = {key: value.clone() for key, value in model.named_buffers()}
    inputs, targets = ZOO["batch-norm"].inputs(9), torch.arange(9) % 2
    training = fitted([(inputs, targets)], model=model)
    for key, value in model.named_buffers():
        assert torch.equal(value, before[key])
    assert_identical(training, fitted([(inputs, targets)], model=ZOO["batch-norm"].model().eval()))


def test_dropout_is_off_in_training_mode():
    case = ZOO["transformer"]
    batch = [(case.inputs(6), torch.arange(6) % 2)]
    assert_identical(fitted(batch, model=case.model().train()), fitted(batch, model=case.model()))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["cnn", "transformer", "lone-parameters"])
def test_any_grad_mode_of_the_caller(context, name):
    case = ZOO[name]
    expected = fitted([(case.inputs(6), torch.arange(6) % 2)], model=case.model())
    with context():
        inputs, targets = case.inputs(6), torch.arange(6) % 2  # created inside
        model = case.model() if context is torch.no_grad else None
    model = case.model() if model is None else model
    watched = None
    with context():
        watched = Watched(model)
        found = fitted([(inputs, targets)], model=model)
        watched.check()
    assert_identical(found, expected)


# -- bad input -------------------------------------------------------------------------------------


def test_a_batch_of_one_and_a_stream_of_one():
    inputs, targets = data(1)
    result = fitted([(inputs, targets)], split=Single())
    assert result.n_seen == 1
    with pytest.raises(ValueError, match=r"at least 4 data, one for each fold, got 1.*Single\(\)"):
        fitted([(inputs, targets)])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"loader": []}, ValueError, "empty loader"),
        ({"estimator": "kfac"}, ValueError, r"estimator out of \['projected', 'factored'\], got 'kfac'"),
        ({"mc_samples": 0}, ValueError, "mc_samples of at least 1, or None .exact. or 'auto', got 0"),
        ({"mc_samples": "one"}, ValueError, "got 'one'"),
        ({"n_data": -3}, ValueError, "n_data of at least 1, or None for those that are seen, got -3"),
        ({"n_data": 0}, ValueError, "n_data of at least 1, or None for those that are seen, got 0"),
        ({"prior_precision": -1.0}, ValueError, "positive, finite prior precisions"),
        ({"prior_precision": [1.0, 2.0]}, ValueError, "one for each of the 3 parts"),
        ({"prior_precision": "strong"}, ValueError, "a number or a tensor, got 'strong'"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"chunk_size": -2}, ValueError, "chunk_size"),
        ({"likelihood": Gaussian()}, ValueError, r"shape \[N, 2\].* Class indices are for \"classification\""),
        ({"likelihood": Bernoulli()}, ValueError, r"shape \[N, 2\]"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=match):
        fitted(options.pop("loader", None), **options)


def test_generators_live_on_the_cpu(second_device):
    with pytest.raises(ValueError, match="generator on the CPU"):
        make_generator(torch.Generator(device=second_device))


def test_data_on_another_device_are_moved(second_device):
    expected = fitted()
    moved = [(x.to(second_device), y.to(second_device)) for x, y in batches()]
    assert_same(fitted(moved), expected)


def test_regression_targets_need_the_outputs_shape():
    inputs, _ = data()
    with pytest.raises(ValueError, match=r"shape \[N, 2\].*Nothing is repeated"):
        fitted([(inputs, torch.zeros(N).double())], likelihood=Gaussian())
    single = ZOO["single-output"]
    result = fitted([(single.inputs(6), torch.zeros(6, 1).double())], model=single.model(), likelihood=Gaussian())
    assert result.network.n_outputs == 1
    flat = fitted([(single.inputs(6), torch.zeros(6).double())], model=single.model(), likelihood=Gaussian())
    assert_same(flat, result)


def test_a_budget_is_what_is_drawn():
    result = fitted(budget=7, split=TwoBatch())
    assert len(result.direction_indices) + len(result.curvature_indices) == 7
    assert len(fitted(budget=7).direction_indices) == 7
    assert replace(result, mean_loss=0.0).n_seen == N


@pytest.mark.parametrize("sampler", [PrioritySampler(8), UniformSampler(8), UniformSampler(None)], ids=repr)
def test_the_network_is_found_once(sampler, monkeypatch):
    discover, calls = Network.discover, []

    def counted(*arguments, **keywords):
        calls.append(arguments)
        return discover(*arguments, **keywords)

    monkeypatch.setattr(Network, "discover", counted)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    batches = [(torch.randn(5, 3), torch.randint(2, (5,))) for _ in range(4)]
    fit(model, batches, Categorical(), sampler=sampler)
    assert len(calls) == 1
