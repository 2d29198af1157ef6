"""Dense outputs, against dense automatic differentiation that goes through sites one by one."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace import _data
from debiased_laplace._data import SiteLayout
from debiased_laplace.laplace_torch import DebiasedLaplace
from debiased_laplace.likelihoods import LIKELIHOODS, Likelihood, ProfiledGaussian, Sites, resolve_likelihood
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.posterior import dense, dense_validation
from debiased_laplace.posterior.dense_validation import SiteValidation, coarse
from debiased_laplace.posterior.search import Search, ValidationLoss
from debiased_laplace.quadratic.quadratic import Quadratic
from debiased_laplace.testing import check_likelihood, dense_posterior_precision
from tests.tolerances import EXACT, assert_equal, assert_unbiased

IGNORE = -100


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class UNet(nn.Module):
    """Two scales, normalisation by running statistics, a skip connection, a transposed convolution."""

    def __init__(self, n_outputs: int, head: int = 1) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.middle, self.up = nn.Conv2d(2, 2, 3, stride=2, padding=1), nn.ConvTranspose2d(2, 2, 2, stride=2)
        self.head = nn.Conv2d(4, n_outputs, head, padding=head // 2)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.tanh(self.norm(self.down(x)))
        return self.head(torch.cat([fine, self.up(torch.tanh(self.middle(fine)))], 1))


class Tagger(nn.Module):
    """Tokens that see each other, or only those before them."""

    def __init__(self, n_outputs: int, n_tokens: int = 6, *, causal: bool = False) -> None:
        super().__init__()
        self.embedding, self.mixed = nn.Embedding(n_tokens, 3), nn.Linear(3, 3)
        self.norm, self.head, self.causal = nn.LayerNorm(3), nn.Linear(3, n_outputs), causal

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        seen = h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[:, None] if self.causal else h.mean(1, keepdim=True)
        return self.head(self.norm(torch.tanh(self.mixed(h + seen))))


def made(model: nn.Module, seed: int = 0) -> nn.Module:
    """In double precision and evaluation mode, with other weights and statistics than the initial ones."""
    generator = seeded(seed)
    model = model.double().eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = 0.5 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.data = 0.5 + buffer.data.abs()
    return model


def images(n: int, size: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(n, 1, size, size, generator=seeded(seed), dtype=torch.float64)


def labels(shape: tuple[int, ...], n_classes: int, *, ignored: float = 0.3, seed: int = 2) -> Tensor:
    generator = seeded(seed)
    drawn = torch.randint(n_classes, shape, generator=generator)
    return drawn.masked_fill(torch.rand(shape, generator=generator) < ignored, IGNORE)


def tokens(n: int, length: int, n_tokens: int = 6, seed: int = 3) -> Tensor:
    return torch.randint(n_tokens, (n, length), generator=seeded(seed))


class Case:
    """A model with the batches that it is trained on, what it is fitted with, and the likelihood of one site."""

    def __init__(self, model, batches, likelihood, site, class_dim, shift=0):
        self.model, self.batches, self.likelihood = model, batches, likelihood
        self.site, self.class_dim, self.shift = site, class_dim, shift

    def sites(self):
        """Inputs, outputs ``[C]`` as a function of them, Jacobian ``[C, D]`` and target of every site with a target."""
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        parameters = {name: dict(self.model.named_parameters())[name].detach() for name in names}
        for x, y in self.batches:
            for one, target in zip(x, y, strict=True):

                def outputs(given: dict[str, Tensor], one: Tensor = one) -> Tensor:
                    f = torch.func.functional_call(self.model, given, (one[None],))[0]
                    return f.movedim(0, -1).flatten(0, -2) if self.class_dim == 1 else f.flatten(0, -2)

                f = outputs(parameters).detach()
                jacobian = torch.func.jacrev(outputs)(parameters)
                rows = torch.cat([jacobian[name].flatten(2) for name in names], 2).detach()
                several = target.ndim > one.ndim - (self.class_dim == 1)
                targets = target.movedim(0, -1).flatten(0, -2) if several and self.class_dim == 1 else target.flatten()
                for s in range(len(f) - self.shift):
                    aim = targets[s + self.shift]
                    if not (aim.ndim == 0 and aim == IGNORE):
                        yield f[s], rows[s], aim

    @property
    def n_data(self) -> int:
        return sum(len(x) for x, _ in self.batches)

    def ggn(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for f, jacobian, target in self.sites():
            hessian = torch.func.hessian(lambda o, t=target: self.site(o, t))(f)
            total = total + jacobian.T @ hessian @ jacobian
        return total / self.n_data

    def loss(self) -> float:
        return float(sum(self.site(f, target) for f, _, target in self.sites())) / self.n_data


def cross_entropy(f: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(f[None], target[None])


def squares(f: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (f - target).square().sum()


WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def cases() -> dict[str, Case]:
    x = images(5)
    y = labels((5, 4, 4), 3)
    t, u = tokens(3, 5), tokens(2, 3, seed=4)
    tags, others = labels((3, 5), 3), labels((2, 3), 3, seed=5)
    text, short = labels((3, 5), 6, ignored=0.2, seed=8), labels((2, 4), 6, ignored=0.2, seed=9)
    return {
        "segmentation": Case(made(UNet(3)), [(x[:3], y[:3]), (x[3:], y[3:])], "classification", cross_entropy, 1),
        "class weights": Case(
            made(UNet(3)), [(x, y)], dl.Categorical(class_weights=WEIGHTS),
            lambda f, aim: F.cross_entropy(f[None], aim[None], WEIGHTS, reduction="sum"), 1,
        ),
        "tagger": Case(made(Tagger(3)), [(t, tags), (u, others)], "classification", cross_entropy, -1),
        "images": Case(made(UNet(2, 3)), [(x, torch.cat([x, 2 * x], 1))], "regression", squares, 1),
        "next token": Case(
            made(Tagger(6, causal=True)), [(t, text), (tokens(2, 4, seed=4), short)], "next_token", cross_entropy, -1, 1
        ),
        "labels": Case(
            made(UNet(1)), [(x, (y[:, None] > 0).double())], "bernoulli",
            lambda f, aim: F.binary_cross_entropy_with_logits(f, aim, reduction="sum"), 1,
        ),
        "counts": Case(
            made(Tagger(1)), [(t, tags.clamp_min(0))], "poisson",
            lambda f, aim: f[0].exp() - aim * f[0] + torch.lgamma(aim + 1.0), -1,
        ),
    }  # fmt: skip


CASES = cases()


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


# -- the likelihood ----------------------------------------------------------------------------------

LAYOUT = SiteLayout(class_dim=-1, n_outputs=2, n_dims=1)


def some_outputs(n: int = 4, entries: int = 4, seed: int = 6) -> Tensor:
    return torch.randn(n, entries, generator=seeded(seed), dtype=torch.float64)


OF_ONE = {
    "classes": (dl.Categorical(), torch.tensor([[0, 1], [1, IGNORE], [IGNORE, IGNORE], [1, 1]])),
    "weighted": (
        dl.Categorical(class_weights=[0.5, 2.0], label_smoothing=0.1),
        torch.tensor([[0, 1], [1, 0], [1, IGNORE], [0, 0]]),
    ),
    "soft": (dl.Categorical(), torch.rand(4, 2, generator=seeded(7), dtype=torch.float64)),
    "numbers": (dl.Gaussian(), torch.arange(16.0, dtype=torch.float64).reshape(4, 2, 2)),
    "profile": (ProfiledGaussian(torch.tensor([0.5, 2.0])), torch.arange(16.0, dtype=torch.float64).reshape(4, 2, 2)),
    "labels": (dl.Bernoulli(), torch.arange(16).reshape(4, 2, 2) % 2),
    "counts": (dl.Poisson(), torch.arange(16).reshape(4, 2, 2) % 3),
    "spread": (dl.HeteroscedasticGaussian(), torch.arange(8.0, dtype=torch.float64).reshape(4, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_ONE)
def test_the_laws_of_a_likelihood(name):
    of, targets = OF_ONE[name]
    if name == "soft":
        targets = torch.stack([targets, 1 - targets], -1)
    check_likelihood(Sites(of, layout=LAYOUT), some_outputs(), targets)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("class_dim", [1, -1])
def test_a_loss_is_the_sum_that_torch_has(class_dim, shift):
    shape = (3, 4, 2, 5) if class_dim == 1 else (3, 2, 5, 4)
    outputs = torch.randn(shape, generator=seeded(1), dtype=torch.float64)
    targets = labels((3, 2, 5), 4)
    if shift:  # of a sequence, site after site
        outputs = outputs.flatten(2) if class_dim == 1 else outputs.flatten(1, 2)
        targets = targets.flatten(1)
    layout = SiteLayout.of(outputs.shape, class_dim)
    likelihood = Sites(dl.Categorical(), shift=shift, layout=layout)
    first = outputs if class_dim == 1 else outputs.movedim(-1, 1)
    if shift:
        first, aims = first[..., :-shift], targets[..., shift:]
    else:
        aims = targets
    expected = F.cross_entropy(first, aims, ignore_index=IGNORE, reduction="none").flatten(1).sum(1)
    rows = layout.rows(outputs, 3)
    prepared = likelihood.prepare_targets(targets, 4)
    assert_equal(likelihood.loss(rows, prepared), expected)
    assert torch.equal(likelihood.prepare_targets(prepared, 4), prepared)
    assert torch.equal(likelihood.n_observed(prepared, 4), 4 * (aims != IGNORE).flatten(1).sum(1))
    assert_equal(likelihood.correctness(rows, prepared), torch.stack([
        (f.argmax(0) == aim)[aim != IGNORE].double().mean() for f, aim in zip(first, aims, strict=True)
    ]))  # fmt: skip


def test_what_is_ignored():
    """Any number that one says; of floating-point numbers none by default, and what is ignored has no effect at all."""
    outputs, layout = some_outputs(2, 6), SiteLayout(1, 2, 1)
    few_bits = torch.tensor([[0, 255, 1], [255, 1, 255]], dtype=torch.uint8)
    likelihood = Sites(dl.Categorical(), ignore_index=255, layout=layout)
    expected = Sites(dl.Categorical(), layout=layout)
    targets = torch.tensor([[0, IGNORE, 1], [IGNORE, 1, IGNORE]])
    assert_equal(likelihood.loss(outputs, likelihood.prepare_targets(few_bits, 2)), expected.loss(outputs, targets))
    with pytest.raises(ValueError, match=r"class indices from 0 to 1 .* got 0 to 255"):
        expected.prepare_targets(few_bits, 2)
    numbers = torch.tensor([[[1.0, torch.nan, -100.0], [2.0, 3.0, 4.0]]], dtype=torch.float64)  # [1, C, S]
    squares = Sites(dl.Gaussian(), ignore_index=math.nan, layout=layout)
    prepared = squares.prepare_targets(numbers, 2)
    f = outputs[:1].reshape(3, 2)
    difference = torch.tensor([[1.0, 2.0], [-100.0, 4.0]]) - f[[0, 2]]
    assert_equal(squares.loss(outputs[:1], prepared), 0.5 * difference.square().sum().reshape(1))
    assert torch.equal(squares.prepare_targets(prepared, 2), prepared)
    with pytest.raises(ValueError, match="finite numbers in the targets"):
        Sites(dl.Gaussian(), layout=layout).prepare_targets(numbers, 2)
    root = squares.hessian_square_root(outputs[:1], prepared)
    assert not bool(root.reshape(-1, 3, 2)[:, 1].any())


def test_random_vectors_of_many_sites_are_unbiased():
    of, targets = dl.Categorical(), labels((2, 6), 3)
    likelihood = Sites(of, layout=SiteLayout(-1, 3, 1))
    outputs, n = some_outputs(2, 18), 4000
    uniforms = torch.rand(2, n, 18, generator=seeded(0), dtype=torch.float64)
    drawn = likelihood.sampled_square_root(outputs, targets, uniforms) * n**0.5
    root = likelihood.hessian_square_root(outputs, targets)
    assert_unbiased(torch.einsum("mnc,mnd->mncd", drawn, drawn), torch.einsum("vnc,vnd->ncd", root, root))
    assert len(root) == 6 * 2  # V of a site times sites


def test_what_it_was_made_with():
    likelihood = resolve_likelihood("next_token")
    assert repr(likelihood) == "Sites(Categorical(), class_dim=-1, shift=1)"
    likelihood = Sites(dl.Categorical(class_weights=[1.0, 2.0]), 1, 255, layout=SiteLayout(1, 2, 2))
    again = LIKELIHOODS[likelihood.name](**likelihood.settings())
    assert repr(again) == repr(likelihood)
    assert again.layout == likelihood.layout
    for bad, error, match in (
        ({"of": "classification"}, TypeError, "the likelihood of one site, such as Categorical"),
        ({"of": likelihood}, TypeError, "the likelihood of one site"),
        ({"of": dl.Gaussian(), "class_dim": 2}, ValueError, r"class_dim to be 1, for \[N, C, ...\], or -1"),
        ({"of": dl.Gaussian(), "shift": -1}, ValueError, "whole number of sites, not negative, got -1"),
    ):
        with pytest.raises(error, match=match):
            Sites(**bad)
    with pytest.raises(ValueError, match="of a known layout, which a fit finds"):
        Sites(dl.Gaussian()).prepare_targets(torch.zeros(2, 3), 1)
    with pytest.raises(TypeError, match="Gaussian is no likelihood of sites"):
        dl.Gaussian().sites(torch.zeros(2))


# -- where the sites are -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "targets", "class_dim", "n_dims"),
    [
        ((2, 3, 4, 5), (2, 4, 5), 1, 2),
        ((2, 4, 5, 3), (2, 4, 5), -1, 2),
        ((2, 3, 4, 5), (2, 1, 4, 5), 1, 2),
        ((2, 3, 4, 5), (2, 3, 4, 5), 1, 2),  # channels first
        ((2, 7, 3), (2, 7), -1, 1),
        ((2, 3, 7), (2, 7), 1, 1),
        ((2, 7, 3), (2, 7, 3), -1, 1),  # features last
        ((2, 7, 4), (2, 7, 2), -1, 1),  # mean and variance of two
        ((2, 4, 7), (2, 2, 7), 1, 1),
        ((2, 3, 2, 2, 2), (2, 2, 2, 2), 1, 3),  # of a volume
    ],
)
def test_the_targets_say_where_the_outputs_are(outputs, targets, class_dim, n_dims):
    layout = SiteLayout.found(outputs, targets)
    assert layout == SiteLayout(class_dim, outputs[class_dim], n_dims)
    values = torch.arange(float(math.prod(outputs))).reshape(outputs)
    rows = layout.rows(values, 2)
    assert torch.equal(layout.restored(rows.unflatten(1, (-1, layout.n_outputs)), layout.shape(outputs)), values)
    assert torch.equal(rows[0, : layout.n_outputs], values.movedim(class_dim, -1)[0].flatten(0, -2)[0])


def test_where_targets_do_not_say():
    with pytest.raises(
        ValueError, match=r"not clear which dimension .*\(2, 4, 4\).*\(2, 4\).*class_dim=1\) or class_dim"
    ):
        SiteLayout.found((2, 4, 4), (2, 4))
    assert SiteLayout.found((2, 4, 4), (2, 4), -1).class_dim == -1
    with pytest.raises(
        ValueError, match=r"\[N, 4, 5\] or \[N, 3, 4\].*\(2, 3, 4, 5\) and targets of shape \(2, 8, 10\)"
    ):
        SiteLayout.found((2, 3, 4, 5), (2, 8, 10))
    layout = SiteLayout(1, 3, 2)
    for wrong in (torch.zeros(2, 4, 4, 4), torch.zeros(2, 3, 4), torch.zeros(1, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"outputs of shape \[2, 3, ...\] with 2 dimensions of sites"):
            layout.rows(wrong, 2)


def test_targets_of_other_numbers_of_sites_are_assorted():
    parts = [torch.zeros(2, 3), torch.ones(1, 4), torch.full((1, 3), 2.0)]
    joined = _data.joined_targets(parts)
    assert [tuple(part.shape) for part in joined.parts] == [(3, 3), (1, 4)]
    assert torch.equal(_data.take(joined, torch.tensor([3, 0])), torch.tensor([[2.0] * 3, [0.0] * 3]))
    assert torch.equal(_data.joined_targets([joined, parts[1]]).parts[1], torch.ones(2, 4))


# -- fits --------------------------------------------------------------------------------------------

ALL = dl.UniformSampler(None)


def test_the_curvature_is_that_of_all_sites(case):
    for sampler in (None, ALL):
        posterior = dl.fit(
            case.model, case.batches, case.likelihood, structure=dl.Full(), sampler=sampler, mc_samples=None
        )
        precision = dense_posterior_precision(posterior.posterior)
        assert_equal((precision - torch.eye(len(precision))) / case.n_data, case.ggn())
        assert posterior.fitted.mean_loss == pytest.approx(case.loss(), rel=EXACT)
        counted = len([None for _ in case.sites()]) * posterior.network.n_outputs
        assert posterior.fitted.n_observed == pytest.approx(counted / case.n_data, rel=EXACT)
        assert posterior.posterior.n_data == case.n_data


@pytest.mark.parametrize("name", ["segmentation", "tagger"])
def test_one_random_vector_stands_for_all_sites(name):
    """The curvature along the parameters has the right mean over draws."""
    case, n = CASES[name], 3000
    posterior = dl.fit(case.model, case.batches, case.likelihood, sampler=ALL)
    assert posterior.fitted.mc_samples == (1 if name == "segmentation" else None)  # 48 outputs, or 15
    network, sample = posterior.network, posterior.fitted.sample.data
    data = CurvatureData(network, sample, posterior.likelihood, mc_samples=n, generator=seeded(1))
    total = torch.zeros(n, network.n_params, dtype=torch.float64)
    for chunk in data:
        jacobian = torch.func.jacrev(lambda p, x=chunk.factors.model_inputs: network.call(p, x))(dict(network.leaves))
        rows = torch.cat([jacobian[name].flatten(2) for name in network.shapes], 2).detach()
        total += torch.einsum("mnc,ncd->mnd", chunk.vectors, rows).square().sum(1) * n
    assert_unbiased(total, case.ggn().diagonal())


def test_random_vectors_are_drawn_again_from_seeds():
    """The same in any chunk, and nothing of the size of the outputs is held."""
    case = CASES["tagger"]
    posterior = dl.fit(case.model, case.batches, case.likelihood, mc_samples=2)
    sample, found = posterior.fitted.sample.data, []
    for chunk_size in (1, 3):
        data = CurvatureData(
            posterior.network, sample, posterior.likelihood, mc_samples=2, generator=seeded(3), chunk_size=chunk_size
        )
        assert data.uniforms is None
        rows = {}
        for chunk in data:
            positions = torch.arange(len(sample))[chunk.positions].tolist()
            rows.update({p: chunk.vectors[:, i] for i, p in enumerate(positions)})
        found.append(rows)
        part = data.take(torch.tensor([4, 1]))
        for chunk in part:
            for i, p in enumerate(torch.tensor([4, 1])[chunk.positions].tolist()):
                assert torch.equal(chunk.vectors[:, i], rows[p])
    assert all(torch.equal(found[0][p], found[1][p]) for p in found[0])
    twice = CurvatureData(
        posterior.network, sample.take(torch.tensor([0, 0])), posterior.likelihood, mc_samples=2, generator=seeded(3)
    )
    (chunk,) = twice
    assert not torch.equal(chunk.vectors[:, 0], chunk.vectors[:, 1])  # another draw for every datum


def test_batches_and_additions_do_not_matter(tmp_path):
    """Other batches of data that are alike, a fit that is added to, and one that goes on from a file."""
    case, settings = CASES["tagger"], {"structure": dl.Full(), "sampler": ALL, "mc_samples": None}
    (t, tags), (u, others) = case.batches
    single = [(t[i : i + 1], tags[i : i + 1]) for i in range(3)] + [(u[i : i + 1], others[i : i + 1]) for i in (0, 1)]
    whole = dl.fit(case.model, case.batches, "classification", **settings)
    expected = dense_posterior_precision(whole.posterior)
    assert_equal(
        dense_posterior_precision(dl.fit(case.model, single, "classification", **settings).posterior), expected
    )
    first = dl.fit(case.model, case.batches[:1], "classification", **settings)
    both = dl.fit(case.model, case.batches[1:], "classification", previous=first, **settings)
    assert_equal(dense_posterior_precision(both.posterior), expected)

    def broken():
        yield single[0]
        yield single[4]
        raise OSError("gone")

    path = tmp_path / "fit"
    with pytest.raises(OSError, match="gone"):
        dl.fit(case.model, broken(), "classification", checkpoint=path)
    resumed = dl.fit(case.model, single, "classification", checkpoint=path)
    assert_equal(resumed.posterior.curvatures, dl.fit(case.model, single, "classification").posterior.curvatures)
    assert repr(resumed.likelihood) == "Sites(Categorical())"


def test_the_log_says_how_sites_are_summed(caplog):
    case = CASES["segmentation"]
    with caplog.at_level(logging.INFO):
        posterior = dl.fit(case.model, case.batches, "classification")
    assert "3 outputs at each of 16 sites of a datum: one vector with random signs" in caplog.text
    assert "Sites(Categorical()), 3 outputs at every site" in str(posterior)


# -- predictions -------------------------------------------------------------------------------------


def functional_covariance(posterior: dl.Laplace, model: nn.Module, x: Tensor, class_dim: int) -> Tensor:
    """``[N, S, C, C]`` from Jacobians of the model's outputs and the dense precision."""
    layout = posterior.network.sites
    parameters = {name: dict(model.named_parameters())[name].detach() for name in posterior.network.shapes}

    def outputs(given: dict[str, Tensor]) -> Tensor:
        return layout.by_site(torch.func.functional_call(model, given, (x,)))

    jacobian = torch.func.jacrev(outputs)(parameters)
    rows = torch.cat([jacobian[name].flatten(3) for name in parameters], 3).detach()
    return torch.einsum("nscd,de,nske->nsck", rows, dense_posterior_precision(posterior.posterior).inverse(), rows)


@pytest.mark.parametrize("parameters", [None, "last_layer"])
@pytest.mark.parametrize(
    ("name", "structure"),
    [(name, dl.Kronecker()) for name in CASES] + [("tagger", dl.LowRank(5)), ("images", dl.LowRank(5)),
                                                  ("segmentation", dl.Diagonal())],
)  # fmt: skip
def test_variances_of_all_sites(name, structure, parameters):
    """In closed form, with a backward pass for each output of a site, or of the last layer without any."""
    case = CASES[name]
    posterior = dl.fit(case.model, case.batches, case.likelihood, structure=structure, parameters=parameters)
    posterior.fitted.network.vector_chunk = 16 if structure == dl.Kronecker() else 1
    assert posterior.network.sites_are_positions is (parameters is not None)
    for x, _ in case.batches:
        expected = functional_covariance(posterior, case.model, x, case.class_dim)
        found = posterior.predict(x, method="glm", covariance=True)
        layout = posterior.network.sites
        assert_equal(found.outputs_covariance, expected)
        assert_equal(layout.by_site(found.outputs_variance), expected.diagonal(dim1=2, dim2=3))
        with torch.no_grad():
            assert_equal(found.outputs_mean, case.model(x))
        alone, link = posterior.likelihood.site, posterior.default_link
        moments = expected if alone.needs_covariance(link) else expected.diagonal(dim1=2, dim2=3)
        by_hand = alone.predictive(layout.by_site(found.outputs_mean).flatten(0, 1), moments.flatten(0, 1), link)
        assert_equal(layout.by_site(found.mean).flatten(0, 1), by_hand)


def test_the_last_layer_is_never_back_propagated(monkeypatch):
    case = CASES["segmentation"]
    posterior = dl.fit(case.model, case.batches, "classification", parameters="last_layer")
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a backward pass"))
    whole = posterior.predict(case.batches[0][0])
    monkeypatch.setattr(dense, "CHUNK_MEMORY", 1)
    assert_equal(posterior.predict(case.batches[0][0]).probabilities, whole.probabilities)


@pytest.mark.parametrize("name", ["segmentation", "images", "next token"])
def test_linearised_samples_have_these_moments(name):
    case = CASES[name]
    posterior = dl.fit(case.model, case.batches, case.likelihood, prior_precision=5.0)
    x, n = case.batches[0][0][:2], 200
    exact = posterior.predict(x, method="glm", covariance=True)
    drawn = posterior.predict(x, n_samples=n, covariance=True)
    assert_equal(drawn.outputs_mean, exact.outputs_mean)
    spread = exact.outputs_variance * (2 / n) ** 0.5
    assert float(((drawn.outputs_variance - exact.outputs_variance) / spread).abs().max()) < 5  # of a few hundred
    variances = drawn.outputs_covariance.diagonal(dim1=2, dim2=3)
    assert_equal(variances, posterior.network.sites.by_site(drawn.outputs_variance))
    # Draw by draw as all at once, and the network itself at the same draws.
    generator = seeded(posterior.seed)
    deviations = torch.cat([posterior.posterior.deviations(1, generator) for _ in range(20)])
    site, layout = posterior.likelihood.site, posterior.network.sites
    for method, evaluate in (("linearized", dense.linearized_changes), ("nn", None)):
        if evaluate is None:
            means = posterior.network.mean() + deviations
            samples = torch.stack([posterior.network.call(posterior.network.from_vector(m), x) for m in means])
        else:
            samples = torch.stack(
                [f + c for f, c in evaluate(posterior.network, posterior.network.mean(), deviations, x)]
            )
        samples = samples.detach().unflatten(2, (-1, layout.n_outputs))
        found = posterior.predict(x, n_samples=20, method=method, covariance=method == "nn")
        assert_equal(layout.by_site(found.mean), site.inverse_link(samples).mean(0))
        if not site.has_answers:
            assert_equal(layout.by_site(found.epistemic_variance), site.inverse_link(samples).var(0))
        if method == "nn":
            assert_equal(layout.by_site(found.outputs_mean), samples.mean(0))
            assert_equal(layout.by_site(found.outputs_variance), samples.var(0))
            centred = samples - samples.mean(0)
            assert_equal(found.outputs_covariance, torch.einsum("mnsc,mnsk->nsck", centred, centred) / 19)


def test_what_a_prediction_of_sites_is():
    case = CASES["images"]
    posterior = dl.fit(case.model, case.batches, "regression", noise_variance=0.3)
    prediction = posterior.predict(case.batches[0][0], n_samples=5)
    assert prediction.mean.shape == prediction.variance.shape == (5, 2, 4, 4)
    assert_equal(prediction.noise_variance, torch.full((5, 2, 4, 4), 0.3, dtype=torch.float64))
    assert posterior.predict(case.batches[0][0][:0]).mean.shape == (0, 2)
    with pytest.raises(ValueError, match="a method out of"):
        posterior.predict(case.batches[0][0], method="best")


def test_covariances_that_would_not_fit(monkeypatch):
    case = CASES["segmentation"]
    posterior = dl.fit(case.model, case.batches, "classification")
    monkeypatch.setattr(dense, "COVARIANCE_MEMORY", 1000)
    with pytest.raises(ValueError, match=r"3 data with 16 sites of 3 outputs each.*use the variances alone"):
        posterior.predict(case.batches[0][0], covariance=True)


# -- tuning ------------------------------------------------------------------------------------------

GRID = torch.logspace(-2, 2, 7, dtype=torch.float64)


def test_all_sites_where_they_are_few(case):
    """With as many random sites as there are, losses on the grid are those of all sites, by hand."""
    posterior = dl.fit(case.model, case.batches, case.likelihood, mc_samples=1)
    settings = {"link": "probit" if posterior.likelihood.has_answers else None, "prior_precisions": GRID}
    if posterior.likelihood.has_noise:
        settings["noise"] = False
    n_vectors, dense_validation.SITE_VECTORS = dense_validation.SITE_VECTORS, 1000
    try:
        tuned = posterior.tune(case.batches, temperature=False, selection="best", **settings).tuned
    finally:
        dense_validation.SITE_VECTORS = n_vectors
    site, links = posterior.likelihood.site, posterior.likelihood.links
    link = settings["link"] or links[0]
    for index, prior in enumerate(GRID):
        at = dl.fit(case.model, case.batches, case.likelihood, mc_samples=1, prior_precision=prior.reshape(1))
        inverse = dense_posterior_precision(at.posterior).inverse()
        losses = []
        for f, jacobian, aim in case.sites():
            covariance = jacobian @ inverse @ jacobian.T
            moments = covariance if site.needs_covariance(link) else covariance.diagonal()
            losses.append(site.negative_log_predictive(f[None], moments[None], aim[None], link))
        assert_equal(tuned.curve.losses[index], torch.cat(losses).mean())


@pytest.mark.parametrize("name", ["segmentation", "tagger", "images"])
def test_tuning_does_not_depend_on_batches(name, monkeypatch):
    monkeypatch.setattr(dense_validation, "SITE_VECTORS", 8)
    case = CASES[name]
    posterior = dl.fit(case.model, case.batches, case.likelihood, parameters="last_layer" if name == "tagger" else None)
    single = [(x[i : i + 1], y[i : i + 1]) for x, y in case.batches for i in range(len(x))]
    one, other = (posterior.tune(batches, prior_precisions=GRID) for batches in (case.batches, iter(single)))
    assert_equal(one.tuned.curve.losses, other.tuned.curve.losses)
    assert one.tuned.temperature == pytest.approx(other.tuned.temperature, rel=1e-6)
    assert_equal(one.posterior.prior_precision, other.posterior.prior_precision)
    by_layer = [posterior.tune(b, prior_structure="layerwise", link="probit", prior_precisions=GRID) for b in
                (case.batches, single)]  # fmt: skip
    assert_equal(by_layer[0].tuned.curve.losses, by_layer[1].tuned.curve.losses)


def test_sites_are_random_and_have_targets():
    case = CASES["segmentation"]
    posterior = dl.fit(case.model, case.batches, "classification")
    site = posterior.likelihood.site

    def chosen(seed: int):
        data = SiteValidation(
            posterior.network, posterior.posterior, site, case.batches, "probit", seed=seed, whole=posterior.likelihood
        )
        (_, sites, targets), _ = data.chosen()
        return sites, targets, data.datum

    sites, targets, datum = chosen(0)
    assert sites.shape == (3, 64 // 3)
    y = case.batches[0][1].flatten(1)
    for number in range(3):
        there = sites[number][sites[number] >= 0]
        assert len(there.unique()) == len(there) == int((y[number] != IGNORE).sum())
        assert torch.equal(targets[datum[: len(targets)] == number], y[number, there])
    assert not torch.equal(chosen(1)[0], sites)


def test_a_vocabulary_is_tuned_by_samples(monkeypatch):
    """A coarse grid, the same draws for all candidates, and any batches."""
    monkeypatch.setattr(dense, "MAX_COVARIANCE_OUTPUTS", 4)
    monkeypatch.setattr(dense_validation, "MAX_COVARIANCE_OUTPUTS", 4)
    monkeypatch.setattr(dense_validation, "N_SAMPLES", 3)
    case = CASES["next token"]
    posterior = dl.fit(case.model, case.batches, "next_token", mc_samples=1)
    single = [(x[i : i + 1], y[i : i + 1]) for x, y in case.batches for i in range(len(x))]
    settings = {"prior_precisions": GRID[:3], "temperature": False, "selection": "best", "n_samples": 3}
    tuned, other = (posterior.tune(batches, **settings).tuned for batches in (case.batches, iter(single)))
    assert_equal(tuned.curve.losses, other.curve.losses)
    at = dl.fit(case.model, case.batches, "next_token", mc_samples=1, prior_precision=GRID[1].reshape(1))
    deviations = torch.cat([at.posterior.deviations(1, seeded(seed)) for seed in range(3)])
    by_datum = []
    for x, y in case.batches:
        changes = dense.linearized_changes(at.network, at.network.mean(), deviations, x)
        f = torch.stack([value + change for value, change in changes]).detach().unflatten(2, (-1, 6))
        p = f.softmax(-1).mean(0)[:, :-1]
        losses = F.nll_loss(p.log().movedim(-1, 1), y[:, 1:], ignore_index=IGNORE, reduction="none")
        by_datum += [row[aim != IGNORE].mean() for row, aim in zip(losses, y[:, 1:], strict=True)]
    assert_equal(tuned.curve.losses[1], torch.stack(by_datum).mean())
    warm = posterior.tune(case.batches).tuned
    assert len(warm.curve.losses) == dense_validation.N_CANDIDATES
    assert warm.temperature == warm.temperature_alone[0]
    assert torch.equal(coarse(GRID[:3]), GRID[:3])


def test_the_marginal_likelihood_counts_outputs_with_targets():
    x = images(40)
    y = x + 0.5 * torch.randn(x.shape, generator=seeded(5), dtype=torch.float64)
    y[:, :, 0] = torch.nan
    model = made(UNet(1))
    posterior = dl.fit(model, [(x, y)], Sites(dl.Gaussian(), ignore_index=math.nan), sampler=ALL, noise_variance=0.7)
    with torch.no_grad():
        errors = (y - model(x))[:, :, 1:]
    density = -0.5 * (errors.square() / 0.7 + math.log(2 * math.pi * 0.7)).sum()
    assert_equal(posterior.log_likelihood(), density)
    assert posterior.fitted.n_observed == pytest.approx(12, rel=EXACT)
    tuned = posterior.tune().posterior
    expected = errors.square().sum() / (errors.numel() - float(tuned.scatter()))
    assert float(tuned.noise_variance) == pytest.approx(float(expected), rel=1e-4)
    assert posterior.certainty() is None


def test_standard_errors_are_of_data():
    """Sites of one datum that are all the same tell no more than one of them."""
    n, several, grid = 12, 9, torch.logspace(-2, 2, 21, dtype=torch.float64)
    mean = 4 * torch.randn(n, 3, generator=seeded(1), dtype=torch.float64)
    targets = mean.argmax(1)
    targets[:2] = (targets[:2] + 1) % 3  # mistakes
    table = torch.rand(n, 3, generator=seeded(9), dtype=torch.float64) / grid[:, None, None, None]

    def chosen(copies: int, datum: Tensor | None) -> int:
        rows = [value.repeat_interleave(copies, dim) for value, dim in ((mean, 0), (targets, 0), (table, 2))]
        loss = ValidationLoss(dl.Categorical(), "probit", None, 1.0, *rows[:2], datum)
        search = Search(loss, rows[2], grid, 1.0)
        best = search.best_on_the_grid(1.0)
        return search.most_uncertain(best, 1.0)[1]

    numbers = torch.arange(n).repeat_interleave(several)
    assert chosen(several, numbers) == chosen(1, None) < chosen(several, None)


# -- files, and what is refused ----------------------------------------------------------------------


def test_save_and_load(case, tmp_path):
    path = tmp_path / "posterior"
    posterior = dl.fit(case.model, case.batches, case.likelihood, parameters="last_layer")
    posterior.save(path)
    loaded = dl.load(path, case.model)
    x = case.batches[-1][0]
    for method in (None, "linearized"):
        assert torch.equal(
            loaded.predict(x, method=method, n_samples=2).mean, posterior.predict(x, method=method, n_samples=2).mean
        )
    assert repr(loaded.likelihood) == repr(posterior.likelihood)
    assert loaded.network.sites == posterior.network.sites
    assert float(loaded.log_marginal_likelihood()) == float(posterior.log_marginal_likelihood())


def test_a_likelihood_of_ones_own(tmp_path):
    class Squares(dl.Gaussian):
        pass

    case, path = CASES["images"], tmp_path / "posterior"
    dl.fit(case.model, case.batches, Squares()).save(path)
    with pytest.raises(ValueError, match="the Sites of Squares of the file"):
        dl.load(path, case.model)
    assert repr(dl.load(path, case.model, Squares()).likelihood) == "Sites(Squares())"


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 3, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x - x.mean(0))


def bad_input():
    x, y = images(3), labels((3, 4, 4), 3)
    model = made(UNet(3))
    wide = torch.cat([y, y], 2)
    square = made(Tagger(5))
    return {
        "another size": (model, [(x, wide)], "classification", r"\(3, 3, 4, 4\) and targets of shape \(3, 4, 8\)"),
        "another size later": (
            model, [(x, y), (x, wide)], "classification",
            r"each of the 16 sites.*\(3, 4, 8\)|one shape for inputs that are alike",
        ),
        "another rank later": (
            model, [(x, y), (x[:, :, 0, 0], y[:, 0])], "classification", "2 dimensions of sites|as many targets",
        ),
        "out of range": (model, [(x, y + 1)], "classification", "class indices from 0 to 2"),
        "nothing": (model, [(x, torch.full_like(y, IGNORE))], "classification", "at least one site with a target"),
        "mixed data": (Mixing(), [(x, y)], "classification", "depends on other data of its batch"),
        "ambiguous": (square, [(tokens(3, 5), labels((3, 5), 5))], "classification", "not clear which dimension"),
        "no sites": (
            nn.Linear(2, 3).double(), [(x.flatten(1)[:, :2], y[:, 0, 0].abs() % 3)], Sites(dl.Categorical()),
            r"Expected dense outputs .* got outputs \[N, C\]. Use Categorical\(\)",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("sampler", [None, ALL], ids=["drawn", "all"])
@pytest.mark.parametrize("name", bad_input())
def test_bad_input(name, sampler):
    model, batches, likelihood, match = bad_input()[name]
    with pytest.raises(ValueError, match=match):
        dl.fit(model, batches, likelihood, sampler=sampler)


def test_ambiguous_shapes_can_be_said():
    model, batch = made(Tagger(5)), (tokens(3, 5), labels((3, 5), 5))
    posterior = dl.fit(model, [batch], Sites(dl.Categorical(), class_dim=-1), structure=dl.Full(), mc_samples=None)
    case = Case(model, [batch], None, cross_entropy, -1)
    precision = dense_posterior_precision(posterior.posterior)
    assert_equal((precision - torch.eye(len(precision))) / 3, case.ggn())


def test_validation_data_without_any_target():
    case = CASES["segmentation"]
    posterior = dl.fit(case.model, case.batches, "classification")
    x, y = case.batches[0]
    some = [(x, torch.full_like(y, IGNORE)), (x, y)]
    settings = {"prior_precisions": GRID, "temperature": False, "selection": "best", "link": "probit"}
    first, last = (posterior.tune(batches, **settings).tuned.curve.losses for batches in (some, some[::-1]))
    assert_equal(first, last)  # all sites are looked at
    with pytest.raises(ValueError, match="validation data with a target for some site, got 3 data without any"):
        posterior.tune(some[:1])


def test_others_refuse_dense_outputs():
    case = CASES["segmentation"]
    with pytest.raises(ValueError, match=r"for every pixel or token are for debiased_laplace.fit"):
        DebiasedLaplace(case.model, "classification", subset_of_weights="all").fit(case.batches)
    with pytest.raises(ValueError, match=r"for every pixel or token are for debiased_laplace.fit"):
        Quadratic(case.model, case.batches[0], "classification")


def test_outputs_without_parameters_are_named():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(1, 2, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.head(x), x], 1)

    with pytest.warns(UserWarning, match="variance of 1 of 3 outputs is zero: 2"):
        dl.fit(Half(), [(images(3), labels((3, 4, 4), 3))], "classification")


def test_the_sampler_is_given_what_the_outputs_mean():
    """A sampler of one's own sees the likelihood of sites, once it has seen the outputs."""

    class Drawn(dl.UniformSampler):
        def draw(self, batches, folds, generator, *, likelihood, observe, **settings):
            for inputs, targets in batches:
                outputs = observe(inputs, targets)
                prepared = likelihood.prepare_targets(targets, outputs.shape[1])
                seen.append(likelihood.loss(outputs, prepared))
            return super().draw(case.batches, folds, generator)

    seen: list[Tensor] = []
    case = CASES["segmentation"]
    dl.fit(case.model, case.batches, "classification", sampler=Drawn(None))
    assert float(torch.cat(seen).mean()) == pytest.approx(case.loss(), rel=EXACT)
    assert isinstance(resolve_likelihood("next_token"), Likelihood)


def test_a_causal_language_model_of_transformers_as_its_collator_feeds_it():
    """The loss is the model's own, and the curvature that of all tokens that have a next one."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=7, n_positions=6, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model, ids = made(transformers.GPT2LMHeadModel(config)), tokens(3, 5)
    seen = torch.arange(5) < torch.tensor([[5], [3], [4]])
    given = {"input_ids": ids, "attention_mask": seen.long()}
    batch = {**given, "labels": ids.masked_fill(~seen, IGNORE)}
    posterior = dl.fit(model, [batch], "next_token", structure=dl.Full(), sampler=ALL, mc_samples=None)
    n_targets = int(seen[:, 1:].sum())
    with torch.no_grad():
        own = float(model(**batch).loss) * n_targets / 3
    assert posterior.fitted.mean_loss == pytest.approx(own, rel=1e-6)  # theirs is in single precision
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def logits(named: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, named, (), given).logits[:, :-1][seen[:, 1:]]

    jacobian = torch.func.jacrev(logits)(parameters)
    rows = torch.cat([jacobian[name].flatten(2) for name in parameters], 2).detach()
    p = logits(parameters).detach().softmax(-1)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    ggn = torch.einsum("tcd,tce,tef->df", rows, hessians, rows) / 3
    precision = dense_posterior_precision(posterior.posterior)
    assert_equal((precision - torch.eye(len(precision))) / 3, ggn)
    assert posterior.predict(given, n_samples=2).probabilities.shape == (3, 5, 7)
