"""The warning after the marginal likelihood: when predictions are far less certain than the network is right."""

from __future__ import annotations

import copy
import math
import pickle
import random
import re
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from debiased_laplace import Bernoulli, Categorical, DebiasedLaplace, Gaussian, PrioritySampler, UniformSampler
from debiased_laplace.curvature.structures import Kronecker
from debiased_laplace.fitting.checkpoint import Checkpoint
from debiased_laplace.fitting.fit import UNIFORM_BUDGET, fit
from debiased_laplace.fitting.reading import Reading
from debiased_laplace.fitting.stream import Stream
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.posterior.certainty import Certainty, certainty_on, wilson_lower
from debiased_laplace.testing import dense_jacobian
from tests.tolerances import EXACT, assert_equal, assert_unbiased

N, CLASSES = 90, 3
DIRECTIONS = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]]).double()
WARNS = "predictions are far less certain than they need be"


def separated(n: int = N, n_classes: int = CLASSES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clusters far apart."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % n_classes
    return 3 * DIRECTIONS[y] + 0.3 * torch.randn(n, 2, generator=generator).double(), y


def classifier(scale: float, n_classes: int = CLASSES) -> nn.Module:
    """Right about every cluster, and the surer the larger the scale, as a network that is trained for long."""
    model = nn.Linear(2, n_classes).double()
    model.weight.data, model.bias.data = scale * DIRECTIONS[:n_classes], torch.zeros(n_classes).double()
    return model


def sure(**keywords) -> DebiasedLaplace:
    la = DebiasedLaplace(classifier(4.0), "classification", **keywords)
    la.fit([separated()])
    return la


def complaint(la: DebiasedLaplace, **keywords) -> str:
    with pytest.warns(UserWarning, match=WARNS) as caught:
        la.optimize_prior_precision(**keywords)
    (own,) = [w for w in caught if re.search(WARNS, str(w.message))]
    assert own.filename == __file__
    return str(own.message)


def silent(la: DebiasedLaplace, **keywords) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{WARNS}")
        la.optimize_prior_precision(**keywords)


def train_to_the_mode(model: nn.Module, x: Tensor, y: Tensor, *, decay: float, steps: int) -> None:
    """Minimise the summed cross entropy and ``decay`` times the squared norm of the weights."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(x), y, reduction="sum")
        value = value + decay * sum(p.square().sum() for p in model.parameters())
        value.backward()
        return value

    optimizer.step(loss)


def numbers(message: str, before: str, after: str) -> float:
    return float(re.search(f"{before}([0-9.]+){after}", message)[1])


# -- the uniform draw ------------------------------------------------------------------------------


def test_a_fit_keeps_a_uniform_draw_whatever_it_was_fitted_on():
    """By importance certain data are hardly ever drawn; here nine in ten are certain."""
    x, y = separated(1000)
    x[::10] *= 0.03
    shares, chosen = [], []
    for seed in range(60):
        fitted = fit(classifier(4.0), [(x, y)], Categorical(), sampler=PrioritySampler(50), generator=seed)
        index = fitted.uniform.data.indices
        assert_equal(fitted.uniform.data.inputs, x[index], 0.0)
        assert torch.equal(fitted.uniform.data.targets, y[index])
        assert len(set(index.tolist())) == UNIFORM_BUDGET
        shares.append((index % 10 == 0).double().mean())
        chosen.append(torch.zeros(1000).double().index_fill(0, index, 1.0).view(20, 50).mean(1))
    assert_unbiased(torch.stack(shares), torch.tensor(0.1).double())
    assert_unbiased(torch.stack(chosen), torch.full((20,), UNIFORM_BUDGET / 1000).double())
    assert float((fitted.sample.data.indices % 10 == 0).double().mean()) > 0.9


def test_the_draw_depends_on_the_seed_and_the_positions_alone_and_is_not_the_fits():
    x, y = separated(200)
    draws = {
        size: fit(
            classifier(1.0), list(zip(x.split(size), y.split(size), strict=True)), Categorical(),
            sampler=UniformSampler(64), generator=3,
        )
        for size in (7, 200)
    }  # fmt: skip
    assert torch.equal(draws[7].uniform.data.indices, draws[200].uniform.data.indices)
    other = fit(classifier(1.0), [(x, y)], Categorical(), sampler=UniformSampler(64), generator=4)
    assert not torch.equal(other.uniform.data.indices, draws[7].uniform.data.indices)
    assert not torch.equal(draws[7].sample.data.indices, draws[7].uniform.data.indices)


def reading(batches):
    stream = Stream(lambda *_: None, Categorical(), Kronecker())
    return Reading(batches, Checkpoint(None, {}), torch.Generator(), stream, budget=4, seed=0)


def test_a_pass_over_what_is_no_loader_is_refused_at_once():
    with pytest.raises(TypeError, match=r"Expected an iterable of batches \(a DataLoader, a list, .*got int"):
        reading(3)


def test_batches_pass_as_they_are():
    batches = [(torch.zeros(3, 2), torch.zeros(3)), {"x": torch.ones(2, 2), "labels": torch.ones(2)}]
    draw = reading(iter(batches))
    assert draw.sample is None
    with pytest.raises(TypeError, match="has no len"):
        len(draw)  # as of any generator
    draw = reading([batches[0], batches[0]])
    assert len(draw) == 2
    assert all(passed is batch for passed, batch in zip(draw, [batches[0]] * 2, strict=True))
    assert draw.sample.n_seen == 6


def test_an_online_fit_keeps_a_fair_draw_of_both_streams():
    model = classifier(1.0)
    one, two = separated(50, seed=1), separated(500, seed=2)
    first = fit(model, [one], Categorical(), generator=0)
    both = fit(model, [two], Categorical(), generator=0, previous=first)
    data = both.uniform.data
    assert both.uniform.n_seen == 550
    assert int((data.indices < 50).sum()) == 50
    assert_equal(data.weights.sum(), torch.tensor(1.0).double())
    assert_equal(data.weights[data.indices < 50].sum(), torch.tensor(50 / 550, dtype=torch.float64))


def test_a_fit_goes_on_with_its_draw(tmp_path, monkeypatch):
    expected = fit(classifier(1.0), [separated()], Categorical()).uniform.data.indices
    from debiased_laplace.fitting.measurement import Measurement

    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Measurement, "cross", interrupted)
        fit(classifier(1.0), [separated()], Categorical(), checkpoint=tmp_path / "fit")
    resumed = fit(classifier(1.0), iter([]), Categorical(), checkpoint=tmp_path / "fit")
    assert torch.equal(resumed.uniform.data.indices, expected)


# -- the warning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_the_numbers_of_a_classification(scale):
    """Dense matrices, and a loop over the data."""
    la = DebiasedLaplace(classifier(scale), "classification", hessian_structure="full", temperature=2.0)
    x, y = separated()
    x[4], y[4] = 0.01 * x[4], 0  # not sure, and wrong
    la.fit([(x, y)], budget=None)
    message = complaint(la) if scale == 4.0 else silent(la)
    data = la.fitted.uniform.data
    jacobians, outputs = dense_jacobian(la.model, data.inputs), la.model(data.inputs).detach()
    everything = dense_jacobian(la.model, x)
    p = la.model(x).softmax(-1).detach()
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    precision = (everything.mT @ hessians @ everything).sum(0) / 2.0
    precision += float(la.prior_precision) * torch.eye(len(precision)).double()
    right, left_out, confidence, parts, alone = [], [], [], [], []
    for own, output, target in zip(jacobians, outputs, data.targets, strict=True):
        covariance = own @ precision.inverse() @ own.mT
        probabilities = (output / (1 + math.pi / 8 * covariance.diagonal()).sqrt()).softmax(0)
        p = output.softmax(0)
        hessian = (p.diag() - torch.outer(p, p)) / 2.0
        without = (torch.eye(CLASSES) - covariance @ hessian).inverse() @ covariance
        gradient = (p - nn.functional.one_hot(target, CLASSES)) / 2.0
        parts.append(1 - float(torch.linalg.eigvals(covariance @ hessian).real.max()))
        right.append(float(output.argmax() == target))
        left_out.append(parts[-1] * float((output + without @ gradient).argmax() == target))
        confidence.append(float(probabilities.max()))
        alone.append(float(p.max()))
    found = certainty_on(la.network, la.posterior, Categorical(), data)
    expected = [100 * sum(own) / len(data) for own in (right, left_out, confidence, parts, alone)]
    own = [100 * v for v in (found.performance, found.left_out, found.certainty, found.part, found.alone)]
    assert own == pytest.approx(expected, rel=EXACT)
    assert expected[0] == 100 - 100 / UNIFORM_BUDGET
    assert_equal(la(data.inputs).amax(-1), torch.tensor(confidence, dtype=torch.float64))
    if message is None:
        assert expected[1] < 97  # leverages matter
        return
    assert numbers(message, "right about ", " %") == pytest.approx(expected[0], abs=0.051)
    assert numbers(message, r"\(", " % without each") == pytest.approx(expected[1], abs=0.051)
    assert numbers(message, "answers is ", " %") == pytest.approx(expected[2], abs=0.051)
    assert f"likelihood ({float(la.prior_precision):.3g}) predictions" in message
    assert f"uniform sample of {UNIFORM_BUDGET} training data" in message
    assert 'optimize_prior_precision(method="gridsearch", val_loader=...)' in message


@pytest.mark.parametrize("structure", ["kron", "lowrank", "diag", "full"])
@pytest.mark.parametrize("prior_structure", ["scalar", "layerwise"])
def test_every_structure_that_is_not_sure_enough(structure, prior_structure):
    message = complaint(sure(hessian_structure=structure), prior_structure=prior_structure)
    assert numbers(message, "right about ", " %") == 100.0


def test_a_network_as_sure_as_it_should_be():
    """At the mode of a prior, on classes that overlap."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % CLASSES
    x = DIRECTIONS[y] + torch.randn(300, 2, generator=generator).double()
    model = classifier(1.0)
    train_to_the_mode(model, x, y, decay=0.5, steps=100)
    la = DebiasedLaplace(model, "classification")
    la.fit([(x, y)])
    silent(la)


def test_a_network_that_doubts_itself():
    """Right about everything and unsure of it, as with smoothed labels: the posterior adds little."""
    la = DebiasedLaplace(classifier(0.4), "classification")
    la.fit([separated()])
    silent(la)
    found = certainty_on(la.network, la.posterior, Categorical(), la.fitted.uniform.data)
    assert found.left_out > 0.9
    assert found.certainty < found.alone < 0.8


def test_a_network_that_has_memorised_labels_at_random():
    """It is right about its training data, and not about data left out: uncertainty is in place."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 30, generator=generator).double()
    y = torch.randint(2, (40,), generator=generator)
    model = nn.Linear(30, 2).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    train_to_the_mode(model, x, y, decay=0.05, steps=200)
    assert float((model(x).argmax(-1) == y).double().mean()) > 0.95
    la = DebiasedLaplace(model, "classification", hessian_structure="full")
    la.fit([(x, y)], budget=None)
    silent(la)
    found = certainty_on(la.network, la.posterior, Categorical(), la.fitted.uniform.data)
    assert found.certainty < found.performance - 0.1
    assert found.left_out < 0.8


def test_one_output_for_two_classes():
    x, y = separated(N, 2)
    model = nn.Linear(2, 1).double()
    model.weight.data, model.bias.data = 4 * (DIRECTIONS[1:2] - DIRECTIONS[:1]), torch.zeros(1).double()
    la = DebiasedLaplace(model, Bernoulli())
    la.fit([(x, y)])
    message = complaint(la)
    assert numbers(message, "right about ", " %") == 100.0
    p = la(la.fitted.uniform.data.inputs)
    expected = 100 * float(torch.maximum(p, 1 - p).mean())
    assert numbers(message, "answers is ", " %") == pytest.approx(expected, abs=0.051)


def test_targets_that_are_probabilities():
    """A network that says one half where the target is one half is as certain as it can be."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 2, generator=generator).double()
    model = nn.Linear(2, 2).double()
    model.weight.data, model.bias.data = torch.full((2, 2), 1e-3).double(), torch.zeros(2).double()
    la = DebiasedLaplace(model, Bernoulli())
    la.fit([(x, torch.full((80, 2), 0.5).double())])
    silent(la)


def regression(n: int = 80, sigma: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator).double()
    return x, x @ torch.tensor([[1.0], [-2.0]]).double() + sigma * torch.randn(n, 1, generator=generator).double()


def fitted_line(sigma_noise: float | Tensor, **keywords) -> tuple[DebiasedLaplace, Tensor, Tensor]:
    x, y = regression()
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.linalg.lstsq(x, y).solution.mT.clone()
    la = DebiasedLaplace(model, "regression", hessian_structure="full", sigma_noise=sigma_noise, **keywords)
    la.fit([(x, y)], budget=None)
    return la, x, y


def test_the_numbers_of_a_regression():
    la, x, y = fitted_line(1.0)
    x[0], y[0] = 9 * x[0], 9 * y[0] + 0.3  # of a larger leverage, and error
    la.fit([(x, y)], budget=None)
    message = complaint(la)
    data = la.fitted.uniform.data
    residuals = la.model(data.inputs).detach() - data.targets
    precision = x.mT @ x + float(la.prior_precision) * torch.eye(2).double()
    variances = ((data.inputs @ precision.inverse()) * data.inputs).sum(-1, keepdim=True)
    assert float(variances.max()) > 0.2
    left_out = (residuals / (1 - variances)).square() * (1 - variances)
    squares = residuals.square().mean(), left_out.sum() / (1 - variances).sum(), (1 + variances).mean()
    expected = [float(square) ** 0.5 for square in squares]
    found = certainty_on(la.network, la.posterior, Gaussian(), data)
    assert [found.performance, found.left_out, found.certainty] == pytest.approx(expected, rel=EXACT)
    assert found.part == pytest.approx(1 - float(variances.mean()), rel=EXACT)
    patterns = ["network is ([0-9.]+)", "([0-9.]+) without", "predictions is ([0-9.]+)"]
    shown = [float(re.search(pattern, message)[1]) for pattern in patterns]
    assert shown == pytest.approx(expected, rel=6e-3)
    assert "and a sigma_noise of 1 predictions" in message
    assert 'method="gridsearch", val_loader=..., tune_sigma_noise=True)' in message
    assert 'Without such data: method="marglik", tune_sigma_noise=True.' in message
    silent(la, tune_sigma_noise=True)


def test_a_regression_whose_noise_is_right():
    silent(fitted_line(0.1)[0])
    silent(fitted_line(0.25)[0])
    complaint(fitted_line(0.4)[0])


def test_an_interpolating_regression_whose_noise_is_right():
    """Residuals are tiny where every datum has a parameter of its own, and say nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 40, generator=generator).double()
    y = x @ torch.randn(40, 1, generator=generator).double() + 0.5 * torch.randn(20, 1, generator=generator).double()
    model = nn.Linear(40, 1, bias=False).double()
    model.weight.data = (torch.linalg.pinv(x) @ y).mT.clone()
    la = DebiasedLaplace(model, "regression", hessian_structure="full", sigma_noise=0.5)
    la.fit([(x, y)], budget=None)
    assert float((model(x) - y).detach().square().mean()) < 1e-20
    silent(la)


def test_noise_for_every_output():
    x, y = regression()
    targets = torch.cat([y, 3 * y], 1)
    model = nn.Linear(2, 2, bias=False).double()
    model.weight.data = torch.linalg.lstsq(x, targets).solution.mT.clone()
    la = DebiasedLaplace(model, "regression", sigma_noise=torch.tensor([0.1, 0.3]))
    la.fit([(x, targets)], budget=None)
    silent(la)
    la.sigma_noise = torch.tensor([1.0, 3.0])
    message = complaint(la)
    assert "and a sigma_noise of 1, 3 predictions" in message
    assert "tune_sigma_noise=True" in message


@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
def test_nothing_is_said_without_data_and_with_validation_data(tmp_path):
    la = sure()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Validation data do not determine the prior precision")
        tuning = {"method": "gridsearch", "log_prior_prec_min": -4, "log_prior_prec_max": 9}
        la.optimize_prior_precision(val_loader=[separated(seed=1)], **tuning)
    la.save(tmp_path / "la")
    loaded = DebiasedLaplace.load(tmp_path / "la", la.model)
    silent(loaded)  # a file has no data in it
    complaint(la)
    assert_equal(loaded.prior_precision, la.prior_precision, 0.0)


def test_copies_have_the_data():
    la = sure()
    for twin in (copy.deepcopy(la), pickle.loads(pickle.dumps(la))):
        assert complaint(twin) == complaint(la)


def test_the_settings_of_predictions_are_those_of_the_warning():
    la = sure()
    probit = complaint(la)
    la.output_temperature = 3.0
    assert complaint(la) != probit
    la.link = "mc"
    assert complaint(la) != probit
    shown = numbers(complaint(la), "answers is ", " %")
    assert shown == pytest.approx(100 * float(la(la.fitted.uniform.data.inputs).amax(-1).mean()), abs=0.051)


def test_other_likelihoods_have_nothing_to_compare():
    class Own(Categorical):
        pass

    la = sure()
    found = certainty_on(la.network, la.posterior, Own(), la.fitted.uniform.data)
    assert isinstance(found, Certainty)

    class Foreign(Likelihood):  # a likelihood that is neither
        links = ()
        check_targets = loss = hessian_square_root = inverse_link = None

    assert certainty_on(la.network, la.posterior, Foreign(), la.fitted.uniform.data) is None


@pytest.mark.parametrize(("n_classes", "n"), [(32, 64), (100, 20), (128, 16), (129, None)])
def test_few_data_of_many_outputs(n_classes, n):
    """Bounded work, and not the first data of a stream that may be in the order of the classes."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.eye(n_classes).double().repeat(2, 1), torch.arange(n_classes).repeat(2)
    x += 0.01 * torch.randn(x.shape, generator=generator).double()
    model = nn.Linear(n_classes, n_classes).double()
    model.weight.data, model.bias.data = 30 * torch.eye(n_classes).double(), torch.zeros(n_classes).double()
    la = DebiasedLaplace(model, "classification", hessian_structure="diag")
    la.fit([(x, y)], budget=None, mc_samples=None)
    found = certainty_on(la.network, la.posterior, Categorical(), la.fitted.uniform.data)
    if n is None:
        assert found is None
        silent(la)
        return
    assert found.n == n
    assert found.effective_n == pytest.approx(n)
    assert f"uniform sample of {n} training data" in complaint(la)


def test_nothing_else_changes():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    la = sure()
    la.model.train()
    before = {name: value.clone() for name, value in la.model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            complaint(la)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert la.model.training
    assert all(p.grad is None for p in la.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in la.model.state_dict().items())
    x, y = separated()
    data = fit(classifier(4.0), [(x, y)], Categorical(), sampler=UniformSampler(20), generator=5).sample.data
    keys = torch.rand(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(data.indices, keys.argsort()[:20].sort().values)  # the fit draws what it drew


# -- by chance -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (5, 9), (64, 64), (63, 64)])
def test_the_bound_is_wilsons(right, n):
    expected = binomtest(right, n).proportion_ci(0.9, method="wilson").low  # 5 % on either side
    assert wilson_lower(right / n, n) == pytest.approx(expected, rel=EXACT, abs=1e-15)


def test_few_data_prove_nothing():
    values = {"performance": 1.0, "left_out": 1.0, "certainty": 0.5, "alone": 1.0, "part": 1.0, "is_regression": False}
    assert not Certainty(n=4, effective_n=4.0, **values).too_small
    assert Certainty(n=64, effective_n=64.0, **values).too_small
    assert not Certainty(n=64, effective_n=4.0, **values).too_small  # of very different weights
    values = {**values, "n": 64, "effective_n": 64.0}
    assert not Certainty(**{**values, "certainty": 0.88}).too_small  # three times as much doubt, but little
    assert not Certainty(**{**values, "left_out": 0.5, "certainty": 0.2}).too_small  # much, but not in proportion
    assert Certainty(**{**values, "left_out": 0.5, "certainty": 0.05}).too_small
    assert not Certainty(**{**values, "alone": 0.6}).too_small  # the doubt is the network's own
    values = {"performance": 0.1, "left_out": 0.1, "certainty": 0.5, "alone": 0.5, "is_regression": True}
    assert not Certainty(n=4, effective_n=4.0, part=1.0, **values).too_small
    assert Certainty(n=64, effective_n=64.0, part=1.0, **values).too_small
    assert not Certainty(n=64, effective_n=64.0, part=0.4, **values).too_small  # every datum speaks for itself


def test_weights_count():
    la = sure()
    data = la.fitted.uniform.data
    doubled = type(data)(data.inputs, data.targets, torch.where(data.targets == 0, 0.6, 0.2).double(), data.indices)
    found = certainty_on(la.network, la.posterior, Categorical(), doubled)
    confidence = la(data.inputs).amax(-1)
    expected = float(doubled.weights @ confidence / doubled.weights.sum())
    assert found.certainty == pytest.approx(expected, rel=EXACT)
    assert found.effective_n < len(data)
