"""laplace-torch's examples with small networks, for its classes and ours side by side.

One fit with all data in both roles gives laplace-torch's curvature; from there everything is the same arithmetic, but
for the prior precision (in closed form here, by gradient steps there), which both are given, and the draws of weights.
Its function-space examples (``"gp"``, ELLA, VaLLA) are about methods that this package does not have, and its language
model with outputs ``[N, L, C]`` needs a package that is not on PyPI.
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable
from typing import Any

import laplace
import pytest
import torch
import torch.nn.functional as F
from laplace.utils.enums import HessianStructure, Likelihood, PredType, SubsetOfWeights
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, GPT2Config, GPT2ForSequenceClassification

from debiased_laplace import DebiasedLaplace, Single
from debiased_laplace._checks import NotFittedError
from tests.tolerances import assert_equal

PRIOR = 0.7


@pytest.fixture(autouse=True)
def in_double_precision():
    """What laplace-torch computes by curvlinops is in the default precision."""
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(torch.float32)


def full_data(
    model: nn.Module,
    likelihood: Any,
    subset_of_weights: Any = "last_layer",
    hessian_structure: Any = "kron",
    **keywords: Any,
) -> Any:
    """Ours where it is theirs: all data in both roles, and blocks and curvatures of classical K-FAC."""
    kron = hessian_structure in ("kron", HessianStructure.KRON)
    keywords["separate_bias"] = True if kron else None
    la = DebiasedLaplace(model, likelihood, subset_of_weights, hessian_structure, **keywords)
    fit = la.fit
    arguments = {"budget": None, "split": Single(), "estimator": "factored" if kron else "projected"}
    la.fit = lambda loader, override=True: fit(loader, override, **arguments)  # type: ignore[method-assign]
    return la


def same(example: Callable[[Any], list[Tensor]]) -> None:
    """An example gives the same with both."""
    states = [torch.get_rng_state()] * 2
    results = []
    for make, state in zip((laplace.Laplace, full_data), states, strict=True):
        torch.set_rng_state(state)
        results.append(example(make))
    assert len(results[0]) == len(results[1])
    for expected, found in zip(*results, strict=True):
        assert_equal(found, expected)


def tuned(la: Any, **keywords: Any) -> None:
    """The call of the examples, and a prior precision for both: ours is no worse than where their steps end."""
    before = float(la.log_marginal_likelihood())
    la.optimize_prior_precision(**keywords)
    assert float(la.log_marginal_likelihood()) >= before
    la.prior_precision = torch.tensor([PRIOR])


def loader_of(*tensors: Tensor, **keywords: Any) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), **keywords)


def test_regression():
    """The marginal likelihood is maximised by the user's own gradient steps, in noise and prior."""

    def example(make: Any) -> list[Tensor]:
        x = 8 * torch.rand(60, 1)
        y = torch.sin(x) + 0.3 * torch.randn_like(x)
        model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        la = make(model, "regression", "all", "full")
        la.fit(loader_of(x, y, batch_size=60))
        log_prior, log_sigma = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        optimizer = torch.optim.Adam([log_prior, log_sigma], lr=1e-1)
        for _ in range(20):
            optimizer.zero_grad()
            loss = -la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())
            loss.backward()
            optimizer.step()
        mean, variance = la(torch.linspace(-5, 13, 20)[:, None])
        assert la.sigma_noise.item() == pytest.approx(log_sigma.exp().item(), rel=0.2)
        return [log_prior.detach(), log_sigma.detach(), mean.squeeze().detach(), variance.squeeze().sqrt().detach()]

    same(example)


def improved(samples: Tensor) -> Tensor:
    """Expected improvement, summed over the inputs."""
    return (samples - torch.tensor(0.123)).clamp(0.0).mean(0).sum()


def test_expectation():
    """Thompson sampling and expected improvement, and their gradients in the inputs."""
    of_samples = []

    def example(make: Any) -> list[Tensor]:
        model = nn.Sequential(nn.Linear(2, 10), nn.GELU(), nn.Linear(10, 1))
        loader = loader_of(torch.randn(5, 2), torch.randn(5, 1), batch_size=5)
        la = make(model, Likelihood.REGRESSION, SubsetOfWeights.ALL, HessianStructure.KRON, enable_backprop=True)
        la.fit(loader)
        tuned(la, pred_type=PredType.GLM)
        x, found = torch.linspace(-1, 1, 20).reshape(10, 2).requires_grad_(), []
        for pred_type in (PredType.GLM, PredType.NN):
            for n in (1, 10):
                generator = torch.Generator().manual_seed(2)  # some samples exceed the threshold
                samples = la.functional_samples(x, pred_type=pred_type, n_samples=n, generator=generator)
                assert samples.shape == (n, 10, 1)
                found += [samples.detach(), torch.autograd.grad(improved(samples), x)[0]]
        assert all(bool((own != 0).any()) for own in found)
        of_samples.append((la, model, x, found[4:]))
        return found[:4]

    same(example)
    # Weights are drawn otherwise than there: the same function of them.
    la, model, x, found = of_samples[1]
    for n, samples, gradient in ((1, *found[:2]), (10, *found[2:])):
        draws = la.posterior.sample(n, torch.Generator().manual_seed(2))
        own = torch.stack([torch.func.functional_call(model, la.network.from_vector(w), (x,)) for w in draws])
        assert_equal(samples, own)
        assert_equal(gradient, torch.autograd.grad(improved(own), x)[0])


def test_bayesian_optimisation():
    """What a surrogate of botorch asks for: joint predictions of some points, and gradients of acquisitions."""

    def example(make: Any) -> list[Tensor]:
        x = 10 * torch.rand(20, 2)
        y = (x[:, :1] - 3).square() / 10
        model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).eval()
        la = make(model, "regression", subset_of_weights="all", hessian_structure="kron", enable_backprop=True)
        la.fit(loader_of(x, y, batch_size=1024, shuffle=True))
        tuned(la, n_steps=50)
        points = torch.linspace(1, 9, 12).reshape(3, 2, 2).requires_grad_()  # batches of q = 2 points
        mean, covariance = la(points.reshape(6, 2), joint=True)
        covariance += 1e-4 * torch.eye(6)  # in place, as there
        blocks = torch.einsum("bqkbrl->bqkrl", covariance.reshape(3, 2, 1, 3, 2, 1)).reshape(3, 2, 2)
        normal = torch.distributions.MultivariateNormal(mean.reshape(3, 2), covariance_matrix=blocks)
        draws = torch.randn(16, 3, 2, generator=torch.Generator().manual_seed(2))
        q_improvement = (1.0 - (normal.loc + (normal.scale_tril @ draws[..., None])[..., 0])).clamp(0).amax(-1).mean()
        bound = (normal.mean - 0.2**0.5 * normal.variance.sqrt()).sum()
        improvement = ((1.0 - normal.mean) * torch.distributions.Normal(0.0, 1.0).cdf(
            (1.0 - normal.mean) / normal.variance.sqrt())).sum()  # fmt: skip
        gradients = [
            torch.autograd.grad(own, points, retain_graph=True)[0] for own in (q_improvement, bound, improvement)
        ]
        assert all(bool(own.any()) for own in gradients)
        marginal = la(points.reshape(6, 2), joint=False)
        return [mean.detach(), covariance.detach(), *gradients, *(own.detach() for own in marginal)]

    same(example)


class Reward(nn.Module):
    """Of pairs in the fit, of one option otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.reshape(-1, 3)).reshape(len(x), 2) if x.ndim == 3 else self.net(x)


def reward_posterior(make: Any, structure: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, pairs, chosen = Reward().eval(), torch.randn(9, 2, 3), torch.randint(2, (9,))
    la = make(model, likelihood="reward_modeling", subset_of_weights="all", hessian_structure=structure)
    la.fit(loader_of(pairs, chosen, batch_size=3))
    return la


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_rewards(structure):
    def example(make: Any) -> list[Tensor]:
        la = reward_posterior(make, structure)
        tuned(la)
        mean, variance = la(torch.linspace(-1, 1, 15).reshape(5, 3))
        assert mean.shape == (5, 1)
        assert variance.shape == (5, 1, 1)
        return [mean, variance, la.log_marginal_likelihood().detach()]

    same(example)


def test_rewards_by_kronecker_factors():
    """The example's default: where a model joins the options of a pair, theirs counts the inputs of a weight twice."""
    theirs, ours = (reward_posterior(make, "kron") for make in (laplace.Laplace, full_data))
    curvatures = [la.posterior_precision.to_matrix() - torch.eye(51) for la in (theirs, ours)]
    weights = torch.arange(51).lt(30) | (torch.arange(51).ge(40) & torch.arange(51).lt(50))
    for which, factor in ((weights, 2.0), (~weights, 1.0)):
        assert_equal(curvatures[0][which][:, which], factor * curvatures[1][which][:, which])


def test_calibration():
    """The last layer of a convolutional network."""

    def example(make: Any) -> list[Tensor]:
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).eval()
        x, y = torch.randn(16, 1, 6, 6), torch.randint(4, (16,))
        la = make(model, "classification", subset_of_weights="last_layer", hessian_structure="kron")
        la.fit(loader_of(x, y, batch_size=8, shuffle=True))
        tuned(la, method="marglik")
        with torch.no_grad():
            return [torch.cat([la(x) for x, _ in loader_of(x, y, batch_size=5)])]

    same(example)


def test_continual_learning():
    """The posterior of one task is the prior of the next, from the prior of the first on."""
    later = []

    def example(make: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(4)
        model = nn.Sequential(nn.Linear(2, 6), nn.Sigmoid(), nn.Linear(6, 2))
        la = make(model, "classification", subset_of_weights="all", hessian_structure="diag", prior_precision=1e-2)
        log_prior = torch.full((1,), math.log(1e-2), requires_grad=True)
        for_prior, for_weights = torch.optim.Adam([log_prior], lr=0.01), torch.optim.Adam(model.parameters(), lr=0.01)
        found: list[Tensor] = []
        for task in range(2):
            x = torch.randn(20, 2, generator=generator) + task
            loader = loader_of(x, torch.randint(2, (20,), generator=generator), batch_size=20)
            offset = la.H.clone()
            for x, y in loader:
                loss = F.cross_entropy(model(x), y) - la.log_prob(parameters_to_vector(model.parameters())) / 20
                for_weights.zero_grad()
                loss.backward()
                for_weights.step()
            inner = make(
                model, "classification", subset_of_weights="all", hessian_structure="diag", prior_mean=la.mean,
                prior_precision=la.posterior_precision,
            )  # fmt: skip
            inner.fit(loader)
            for _ in range(3):
                for_prior.zero_grad()
                evidence = inner.log_marginal_likelihood(log_prior.exp() + offset)
                (-evidence).backward()
                for_prior.step()
            la.prior_precision = log_prior.exp().clone().detach()
            found += [loss.detach(), evidence.detach(), offset, log_prior.detach().clone()]
            if task == 1:
                later.append(la.H.clone())  # changed in place there
            la.fit(loader, override=False)
            found += [la.H.clone(), la.posterior_precision.clone(), la(x)] if task == 0 else []
        return found

    same(example)
    assert_equal(later[1], later[0])


def test_posteriors_without_a_fit_are_the_prior():
    """As in laplace-torch, where the last part of an example forgot the fit; not without a word, and not for K-FAC."""

    def example(make: Any) -> list[Tensor]:
        found = []
        for structure in ("diag", "full"):
            model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            la = make(model, "regression", "all", structure, prior_precision=PRIOR)
            found += [la.H, la.posterior_precision]
            x = torch.randn(5, 3)
            if make is full_data:
                with pytest.warns(UserWarning, match="no fit: this is the prediction of the prior"):
                    found += la(x)
                assert la.fitted is None
            else:
                found += la(x)
        return found

    same(example)
    with pytest.raises(NotFittedError, match="Call fit"):
        full_data(nn.Linear(3, 2), "regression", "all", "kron")(torch.randn(2, 3))
    named = full_data(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), "regression", hessian_structure="diag")
    assert named.H is None  # nobody knows which the last layer is
    with pytest.raises(NotFittedError, match="Call fit"):
        named(torch.randn(2, 3))


# -- feature_reduction -------------------------------------------------------------------------------

REDUCTIONS = {
    "pick_first": lambda t: t[:, 0, 0], "pick_last": lambda t: t[:, -1, -1], "average": lambda t: t.mean((1, 2)),
}  # fmt: skip


class Positions(nn.Module):
    """Its last layer is called at every one of 2 x L positions."""

    def __init__(self, way: str, bias: bool) -> None:
        super().__init__()
        self.body, self.head, self.way = nn.Linear(3, 5), nn.Linear(5, 2, bias=bias), way

    def forward(self, x: Tensor) -> Tensor:
        return REDUCTIONS[self.way](self.head(torch.tanh(self.body(x))))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("of_the_model", "structure"),
    [(way, name) for way in REDUCTIONS for name in ("diag", "full", "kron") if name != "kron" or way == "average"],
)  # K-FAC counts positions that the model leaves out there, and not here
@pytest.mark.parametrize("way", REDUCTIONS)
def test_feature_reduction(of_the_model, way, structure, bias, recwarn):
    """Equal also where it is not what the model does; then there is a warning."""
    lengths = (4, 4) if structure == "kron" else (4, 2)

    def example(make: Any) -> list[Tensor]:
        model = Positions(of_the_model, bias)
        batches = [(torch.randn(4, 2, n, 3), torch.randint(2, (4,))) for n in lengths]
        x, found = torch.randn(3, 2, 3, 3, requires_grad=True), []
        for backprop in (False, True):
            la = make(model, "classification", "last_layer", structure, feature_reduction=way, enable_backprop=backprop)
            la.fit(Batches(batches))
            found += [la(x.detach()), la.log_marginal_likelihood()]
            if backprop:
                found += torch.autograd.grad(la(x)[:, 0].sum(), x)
        return found

    same(example)
    warned = [str(w.message) for w in recwarn if "features reduced by" in str(w.message)]
    assert bool(warned) == (way != of_the_model)


class Batches(list):
    """laplace-torch counts the data of a data set."""

    @property
    def dataset(self) -> range:
        return range(sum(len(batch[1]) if isinstance(batch, tuple) else len(batch["labels"]) for batch in self))


def test_a_reduction_is_kept(tmp_path):
    batches = [(torch.randn(4, 2, 3, 3), torch.randint(2, (4,)))]
    la = DebiasedLaplace(Positions("pick_last", True), "classification", "last_layer", feature_reduction="pick_first")
    with pytest.warns(UserWarning, match=r"not its last layer of features reduced by 'pick_first'.*Leave feature_redu"):
        la.fit(batches)
    la.save(tmp_path / "la")
    again = DebiasedLaplace.load(tmp_path / "la", la.model)
    assert again.feature_reduction == "pick_first"
    for one in (la, again):
        with pytest.warns(UserWarning, match="Variances are those of the reduced features"):
            one.prediction = one(batches[0][0])
    assert_equal(again.prediction, la.prediction, 0.0)
    own = DebiasedLaplace(la.model, "classification", "last_layer")
    own.fit(batches)
    assert float((own(batches[0][0]) - la.prediction).abs().max()) > 1e-6


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"feature_reduction": "middle"}, "Expected feature_reduction out of .*'average'.*got 'middle'"),
        ({"feature_reduction": "average", "subset_of_weights": "all"}, 'only with subset_of_weights="last_layer"'),
    ],
)
def test_bad_reductions(arguments, match):
    with pytest.raises(ValueError, match=match):
        DebiasedLaplace(Positions("average", True), "classification", **{"subset_of_weights": "last_layer"} | arguments)


def test_a_reduction_needs_a_linear_last_layer():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten())
    la = DebiasedLaplace(model, "regression", "last_layer", feature_reduction="average")
    with pytest.raises(ValueError, match=r"linear last layer .*got a ConvolutionCall.*Leave feature_reduction out"):
        la.fit([(torch.randn(4, 2, 2), torch.randn(4, 6))])


# -- Hugging Face ------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A language model that takes what the collator gives."""

    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=100, n_positions=16, n_embd=8, n_layer=2, n_head=2, num_labels=2, pad_token_id=0, bos_token_id=1,
            eos_token_id=0,
        )  # fmt: skip
        self.hf_model = GPT2ForSequenceClassification(config)

    def forward(self, data: UserDict) -> Tensor:
        device = next(self.parameters()).device
        ids, mask = data["input_ids"].to(device), data["attention_mask"].to(device)
        assert isinstance(data, BatchEncoding)
        assert torch.equal(data.input_ids, ids)
        return self.hf_model(input_ids=ids, attention_mask=mask).logits


def tokens(n: int, length: int, padded: bool) -> BatchEncoding:
    ids, mask = torch.randint(2, 100, (n, length)), torch.ones(n, length, dtype=torch.long)
    if padded:
        ids[0, 3:], mask[0, 3:] = 0, 0
    return BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": torch.randint(2, (n,))})


@pytest.mark.parametrize("way", ["pick_last", None])
@pytest.mark.parametrize("padded", [True, False])
def test_last_layer_of_a_language_model(padded, way):
    """Its logits are those of the last token that is no padding: "pick_last" is true only without padding."""

    def example(make: Any) -> list[Tensor]:
        model = Classifier().eval()
        la = make(model, likelihood="classification", subset_of_weights="last_layer", hessian_structure="full",
                  feature_reduction=way)  # fmt: skip
        loader = Batches([tokens(3, 7, padded), tokens(4, 9, padded)])
        if make is full_data and padded and way is not None:
            with pytest.warns(UserWarning, match="padded sequences"):
                la.fit(loader)
            with pytest.warns(UserWarning, match="padded sequences"):
                return [la.H, la(loader[0])]
        la.fit(loader)
        return [la.H, la(loader[0])]

    if way is not None:
        same(example)
        return
    # Without a reduction laplace-torch fails: ours is the posterior of the only layer that is not frozen.
    torch.manual_seed(3)
    hessian, probabilities = example(full_data)
    torch.manual_seed(3)
    frozen, of_frozen = of_the_head("full", padded, tune=False)(laplace.Laplace)
    assert_equal(hessian, frozen)
    assert_equal(probabilities, of_frozen)


def of_the_head(structure: str, padded: bool = True, tune: bool = True) -> Callable[[Any], list[Tensor]]:
    def example(make: Any) -> list[Tensor]:
        model = Classifier().eval()
        model.hf_model.requires_grad_(False)
        model.hf_model.score.requires_grad_(True)
        la = make(model, likelihood="classification", subset_of_weights="all", hessian_structure=structure)
        loader = Batches([tokens(3, 7, padded), tokens(4, 9, padded)])
        la.fit(loader)
        if tune:
            tuned(la)
        return [la.H, la(loader[0])]

    return example


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_head_of_a_frozen_language_model(structure):
    same(of_the_head(structure))


@pytest.mark.parametrize("structure", ["diag"])
def test_adapters_of_a_language_model(structure):
    """LoRA on the attention; K-FAC counts padding there, and not here."""

    def example(make: Any) -> list[Tensor]:
        config = LoraConfig(r=2, lora_alpha=16, target_modules=["c_attn"], lora_dropout=0.1, bias="none")
        model = get_peft_model(Classifier(), config).eval()
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zero before it was trained
                nn.init.normal_(p, std=0.1)
        la = make(model, likelihood="classification", subset_of_weights="all", hessian_structure=structure)
        loader = Batches([tokens(3, 7, True), tokens(4, 9, True)])
        la.fit(loader)
        return [la(loader[0]), la.log_det_posterior_precision]

    same(example)
