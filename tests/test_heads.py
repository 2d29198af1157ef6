"""The last layer is what makes the outputs, however it is written; outputs that nothing reaches."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from debiased_laplace import DebiasedLaplace, Single, UniformSampler
from debiased_laplace._checks import UnsupportedLayerError
from debiased_laplace.curvature.structures import Diagonal, Full, Kronecker, Structure
from debiased_laplace.fitting.fit import fit
from debiased_laplace.likelihoods import Gaussian
from debiased_laplace.network.network import Network
from debiased_laplace.network.selection import match_parameters
from debiased_laplace.posterior.predictive import functional_moments
from tests.tolerances import assert_equal

parametrizations = nn.utils.parametrizations


class Written(nn.Module):
    """A head as a function of its modules and parameters and of the features."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, h: Tensor) -> Tensor:
        return self.function(self, h)


def linear(outputs: int, inputs: int = 6, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def own(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def side(self: Any, h: Tensor) -> Tensor:
    """The auxiliary head is called last and not returned."""
    out = self.main(h)
    self.extra = self.other(h)
    return out


def in_place(self: Any, h: Tensor) -> Tensor:
    out = h.new_empty(len(h), 3)
    out[:, 0] = self.a(h)[:, 0]
    out[:, 1:] = self.b(h)
    return out


def conditional(self: Any, h: Tensor) -> Tensor:
    """One output is a feature of the other."""
    mean = self.a(h)
    return torch.cat([mean, self.b(torch.cat([h, mean], 1))], 1)


def dueling(self: Any, h: Tensor) -> Tensor:
    advantage = self.advantage(h)
    return self.value(h) + advantage - advantage.mean(1, keepdim=True)


def mixed(self: Any, h: Tensor) -> Tensor:
    """Experts with gates of their own."""
    experts = torch.stack([self.a(h), self.b(h)], -1)
    return (experts * self.gate(h).softmax(-1)[:, None]).sum(-1)


def two_of(**members: Any) -> dict[str, Any]:
    return {"a": linear(3), "b": linear(3), **members}


def tokens(h: Tensor) -> Tensor:
    return h.unflatten(1, (3, 2))


def stacked(self: Any, h: Tensor, dim: int = 0) -> Tensor:
    return torch.stack([self.a(h), self.b(h)], dim)


#: Heads on features ``h: [N, 6]``, and the parameters that make the outputs.
WRITTEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (lambda: linear(3), "weight bias"),
    # a weight that is made of others
    "weight norm": (
        lambda: parametrizations.weight_norm(linear(3)),
        "bias parametrizations.weight.original0 parametrizations.weight.original1",
    ),
    "spectral norm": (lambda: parametrizations.spectral_norm(linear(3)), "bias parametrizations.weight.original"),
    "weight norm by a hook": (lambda: nn.utils.weight_norm(linear(3)), "bias weight_g weight_v"),
    "spectral norm by a hook": (lambda: nn.utils.spectral_norm(linear(3)), "bias weight_orig"),
    "weight norm of a convolution": (
        lambda: Written(lambda s, h: s.c(h[:, :, None])[:, :, 0], c=parametrizations.weight_norm(nn.Conv1d(6, 3, 1))),
        "c.bias c.parametrizations.weight.original0 c.parametrizations.weight.original1",
    ),
    "orthogonal": (lambda: parametrizations.orthogonal(linear(3)), "bias parametrizations.weight.original"),
    "cosine": (
        lambda: Written(lambda s, h: 5 * F.linear(F.normalize(h, dim=1), F.normalize(s.w, dim=1)), w=own(3, 6)), "w"
    ),
    "cosine, scaled": (
        lambda: Written(
            lambda s, h: s.t.exp() * (F.normalize(h, dim=1) @ F.normalize(s.w, dim=0)), t=own(1), w=own(6, 3)
        ),
        "t w",
    ),
    "cosine similarity": (
        lambda: Written(lambda s, h: F.cosine_similarity(h[:, None], s.w[None], dim=-1), w=own(3, 6)), "w"
    ),
    # no module
    "h @ W": (lambda: Written(lambda s, h: h @ s.w, w=own(6, 3)), "w"),
    "h @ W + b": (lambda: Written(lambda s, h: h @ s.w + s.b, w=own(6, 3), b=own(3)), "w b"),
    "W @ h": (lambda: Written(lambda s, h: (s.w @ h.mT).mT, w=own(3, 6)), "w"),
    "h @ w": (lambda: Written(lambda s, h: h @ s.w, w=own(6)), "w"),
    "einsum": (lambda: Written(lambda s, h: torch.einsum("ni,oi->no", h, s.w), w=own(3, 6)), "w"),
    "addmm": (lambda: Written(lambda s, h: torch.addmm(s.b, h, s.w), w=own(6, 3), b=own(3)), "w b"),
    "tensordot": (lambda: Written(lambda s, h: torch.tensordot(h, s.w, 1), w=own(6, 3)), "w"),
    "product and sum": (lambda: Written(lambda s, h: (h[:, None] * s.w).sum(-1), w=own(3, 6)), "w"),
    "product and sum of one output": (lambda: Written(lambda s, h: (h * s.w).sum(-1), w=own(6)), "w"),
    "radial": (lambda: Written(lambda s, h: -(h[:, None] - s.w).square().sum(-1), w=own(3, 6)), "w"),
    "vmap": (lambda: Written(lambda s, h: torch.func.vmap(lambda w: h @ w)(s.w).mean(0), w=own(2, 6, 3)), "w"),
    "one for each output": (lambda: Written(lambda s, h: (tokens(h).tanh() * s.w).sum(-1), w=own(3, 2)), "w"),
    "one vector for all outputs": (lambda: Written(lambda s, h: tokens(h) @ s.w, w=own(2)), "w"),
    "bilinear": (lambda: Written(lambda s, h: s.b(h[:, :3], h[:, 3:]), b=nn.Bilinear(3, 3, 3)), "b.weight b.bias"),
    "convolution": (
        lambda: Written(lambda s, h: s.c(h[:, None]).relu().mean(-1), c=nn.Conv1d(1, 3, 2)), "c.weight c.bias"
    ),
    "transposed convolution": (
        lambda: Written(lambda s, h: s.c(h[:, :, None])[:, :, 0], c=nn.ConvTranspose1d(6, 3, 1)), "c.weight c.bias"
    ),
    "checkpointed": (
        lambda: Written(lambda s, h: checkpoint(s.a, h, use_reentrant=False), a=linear(3)), "a.weight a.bias"
    ),
    "detached features": (lambda: Written(lambda s, h: s.a(h.detach()), a=linear(3)), "a.weight a.bias"),
    # several
    "cat": (
        lambda: Written(lambda s, h: torch.cat([s.a(h), s.b(h)], 1), a=linear(1), b=linear(2)),
        "a.weight a.bias b.weight b.bias",
    ),
    "cat, then softmax": (
        lambda: Written(lambda s, h: torch.cat([s.a(h), s.b(h)], 1).log_softmax(1), a=linear(1), b=linear(2)),
        "a.weight a.bias b.weight b.bias",
    ),
    "stack": (
        lambda: Written(lambda s, h: stacked(s, h, 1)[:, :, 0], a=linear(1), b=linear(1)),
        "a.weight a.bias b.weight b.bias",
    ),
    "into one tensor": (lambda: Written(in_place, a=linear(1), b=linear(2)), "a.weight a.bias b.weight b.bias"),
    "dueling": (
        lambda: Written(dueling, value=linear(1), advantage=linear(3)),
        "value.weight value.bias advantage.weight advantage.bias",
    ),
    "sum": (lambda: Written(lambda s, h: s.a(h) + s.b(h.square()), **two_of()), "a.weight a.bias b.weight b.bias"),
    "ensemble": (lambda: Written(lambda s, h: stacked(s, h).mean(0), **two_of()), "a.weight a.bias b.weight b.bias"),
    "mean and variance": (
        lambda: Written(lambda s, h: torch.cat([s.a(h), F.softplus(s.b(h))], 1), a=linear(1), b=linear(1)),
        "a.weight a.bias b.weight b.bias",
    ),
    "mean in the variance": (
        lambda: Written(conditional, a=linear(1), b=linear(1, 7)), "a.weight a.bias b.weight b.bias"
    ),
    "mean and one variance": (
        lambda: Written(lambda s, h: torch.cat([s.a(h), s.v.expand(len(h), 1)], 1), a=linear(1), v=own(1)),
        "v a.weight a.bias",
    ),
    "not returned": (lambda: Written(side, main=linear(3), other=linear(2)), "main.weight main.bias"),
    "experts": (
        lambda: Written(mixed, **two_of(gate=linear(2))), "a.weight a.bias b.weight b.bias gate.weight gate.bias"
    ),
    "mixture by numbers": (
        lambda: Written(lambda s, h: s.w[0] * s.a(h) + s.w[1] * s.b(h), **two_of(w=own(2))),
        "w a.weight a.bias b.weight b.bias",
    ),
    "mixture by a sum": (
        lambda: Written(lambda s, h: (s.w.softmax(0)[:, None, None] * stacked(s, h)).sum(0), **two_of(w=own(2))),
        "w a.weight a.bias b.weight b.bias",
    ),
    "mixture by einsum": (
        lambda: Written(lambda s, h: torch.einsum("k,knc->nc", s.w.softmax(0), stacked(s, h)), **two_of(w=own(2))),
        "w a.weight a.bias b.weight b.bias",
    ),
    "mixture for each output": (
        lambda: Written(lambda s, h: torch.einsum("kc,knc->nc", s.w, stacked(s, h)), **two_of(w=own(2, 3))),
        "w a.weight a.bias b.weight b.bias",
    ),
    # before and after
    "scaled": (lambda: Written(lambda s, h: s.a(h) * s.t, t=own(), a=linear(3)), "t a.weight a.bias"),
    "shifted": (lambda: Written(lambda s, h: s.a(h) + s.b, b=own(3), a=linear(3, bias=False)), "b a.weight"),
    "thresholds": (lambda: Written(lambda s, h: s.a(h) + s.b, b=own(3), a=linear(1, bias=False)), "b a.weight"),
    "layer norm after": (
        lambda: nn.Sequential(linear(3), nn.LayerNorm(3)), "0.weight 0.bias 1.weight 1.bias"
    ),
    "batch norm after": (
        lambda: nn.Sequential(linear(3), nn.BatchNorm1d(3)), "0.weight 0.bias 1.weight 1.bias"
    ),
    "RMS norm after": (lambda: nn.Sequential(linear(3), nn.RMSNorm(3)), "0.weight 0.bias 1.weight"),
    "scale and norm before": (
        lambda: Written(lambda s, h: s.a(s.n(h) * s.t), t=own(6), n=nn.LayerNorm(6), a=linear(3)), "a.weight a.bias"
    ),
    "two layers": (lambda: nn.Sequential(linear(5), linear(3, 5)), "1.weight 1.bias"),
    "two layers and an activation": (
        lambda: nn.Sequential(linear(5), nn.Tanh(), linear(3, 5)), "2.weight 2.bias"
    ),
    "fixed product after": (
        lambda: Written(lambda s, h: s.a(h) @ torch.ones(5, 3).to(h), a=linear(5)), "a.weight a.bias"
    ),
    "features beside": (lambda: Written(lambda s, h: h[:, :3] + s.a(h), a=linear(3)), "a.weight a.bias"),
    "layer beside two": (
        lambda: Written(lambda s, h: s.a(h) + s.b(torch.tanh(s.c(h))), a=linear(3), c=linear(5), b=linear(3, 5)),
        "a.weight a.bias b.weight b.bias",
    ),
    "attention": (
        lambda: Written(lambda s, h: s.a(*[tokens(h)] * 3)[0].mean(1), a=nn.MultiheadAttention(2, 1, batch_first=True)),
        "a.out_proj.weight a.out_proj.bias",
    ),
    "called twice": (lambda: Written(lambda s, h: s.a(s.a(h).tanh()), a=linear(6)), "a.weight a.bias"),
    "partly frozen": (
        lambda: Written(lambda s, h: s.w(h) + s.b(h.cos()), w=frozen(linear(3)), b=linear(3)), "b.weight b.bias"
    ),
    "frozen weight": (lambda: Written(lambda s, h: s.w(h) + s.b, w=frozen(linear(3, bias=False)), b=own(3)), "b"),
}  # fmt: skip


def whole(function: Callable[[Any, Tensor], Tensor], **members: Any) -> Callable[[], nn.Module]:
    return lambda: Written(function, **{name: member() for name, member in members.items()})


#: Whole models on inputs ``[N, 4]``.
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no body": (lambda: linear(3, 4), "weight bias"),
    "tied": (
        whole(lambda s, x: F.linear(s.mid(F.linear(x, s.w).tanh()).tanh(), s.w.t(), s.b), w=lambda: own(6, 4),
              mid=lambda: linear(6), b=lambda: own(4)), "w b"
    ),
    "deep tied": (
        whole(lambda s, x: F.linear(F.linear(s.e2(s.e1(x).tanh()), s.e2.weight.t()).tanh(), s.e1.weight.t()),
              e1=lambda: linear(6, 4), e2=lambda: linear(2)), "e1.weight"
    ),
    "wide and deep": (
        whole(lambda s, x: s.deep(s.body(x).tanh()) + s.wide(x), body=lambda: linear(6, 4), deep=lambda: linear(1),
              wide=lambda: linear(1, 4)), "deep.weight deep.bias wide.weight wide.bias"
    ),
    "bag": (
        whole(lambda s, x: s.table((x > 0).long()).sum(1), table=lambda: nn.Embedding(2, 3)), "table.weight"
    ),
    "factors": (
        whole(lambda s, x: (s.a((x[:, 0] > 0).long()) * s.b((x[:, 1] > 0).long())).sum(1, keepdim=True),
              a=lambda: nn.Embedding(2, 3), b=lambda: nn.Embedding(2, 3)), "a.weight b.weight"
    ),
}  # fmt: skip


def model_of(name: str) -> tuple[nn.Module, list[str]]:
    torch.manual_seed(0)
    if name in MODELS:
        build, names = MODELS[name]
        return build().double().eval(), names.split()
    build, names = WRITTEN[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # hooks that torch replaces by parametrizations
        model = nn.Sequential(linear(6, 4), nn.Tanh(), build()).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_var.fill_(0.5)
    return model.eval(), [f"2.{own}" for own in names.split()]


def data(n: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_jacobian(model: nn.Module, names: list[str], x: Tensor) -> Tensor:
    """One output after the other by ordinary autograd, ``[N, C, D]``."""
    parameters = dict(model.named_parameters())
    outputs = model(x).reshape(len(x), -1)
    rows = [
        torch.autograd.grad(out, [parameters[name] for name in names], retain_graph=True, materialize_grads=True)
        for out in outputs.flatten()
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).unflatten(0, outputs.shape).detach()


def dense_variances(model: nn.Module, names: list[str], x: Tensor, at: Tensor) -> Tensor:
    """Of squared loss with unit noise, for a prior precision of 0.75."""
    jacobian, jacobian_at = dense_jacobian(model, names, x), dense_jacobian(model, names, at)
    precision = torch.einsum("ncd,nce->de", jacobian, jacobian) + 0.75 * torch.eye(jacobian.shape[-1]).double()
    return torch.einsum("ncd,de,nke->nck", jacobian_at, torch.linalg.inv(precision), jacobian_at)


def variances(model: nn.Module, structure: Structure, x: Tensor, at: Tensor, **options: Any) -> tuple[Network, Tensor]:
    targets = torch.zeros_like(model(x).reshape(len(x), -1)).detach()
    fitted = fit(
        model, [(x, targets)], Gaussian(), structure=structure, sampler=UniformSampler(None), split=Single(),
        prior_precision=0.75, **options,
    )  # fmt: skip
    return fitted.network, functional_moments(fitted.network, fitted.posterior, at)[1]


# -- which parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WRITTEN, *MODELS])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_variances_are_those_of_what_makes_the_outputs(name):
    model, names = model_of(name)
    x, at = data(), data(3, seed=2)
    network, found = variances(model, Full(), x, at, parameters="last_layer")
    assert list(network.shapes) == names
    assert_equal(found, dense_variances(model, names, x, at))


#: Heads that get a diagonal and a Kronecker basis as well, in which parameters have blocks of their own.
SOME = [
    "weight norm",
    "spectral norm by a hook",
    "cosine, scaled",
    "h @ W + b",
    "dueling",
    "not returned",
    "called twice",
]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("structure", [Kronecker(), Diagonal()], ids=repr)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_other_structures_are_as_if_all_else_were_frozen(name, structure):
    x, at = data(), data(3, seed=2)
    network, found = variances(model_of(name)[0], structure, x, at, parameters="last_layer")
    model, names = model_of(name)
    for other, parameter in model.named_parameters():
        parameter.requires_grad_(other in names)
    expected, same = variances(model, structure, x, at)
    assert network.blocks == expected.blocks
    assert_equal(found, same)


@pytest.mark.parametrize("name", ["linear", "not returned", "detached features", "checkpointed", "two layers"])
def test_a_single_linear_layer_is_in_closed_form(name):
    assert Network.discover(model_of(name)[0], data(), parameters="last_layer").is_head


def skip(self: Any, h: Tensor) -> Tensor:
    z = self.a(h)
    return z + self.b(z.relu())


UNCLEAR: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "added to what it makes": (
        lambda: Written(skip, a=linear(3), b=linear(3, 3)),
        r"the result of \['2.a.weight', '2.a.bias'\] is used by \['2.b.weight', '2.b.bias'\] and added to its result",
    ),
    "mixture of probabilities": (
        lambda: Written(
            lambda s, h: torch.einsum("k,knc->nc", s.w.softmax(0), stacked(s, h).softmax(-1)).log(), **two_of(w=own(2))
        ),
        r"\['2.w'\] may be a layer, or weigh what the layers before it give",
    ),
    "two outputs weighted": (
        lambda: Written(lambda s, h: torch.cat([s.a(h), s.b(h)], 1) @ s.w, a=linear(1), b=linear(1), w=own(2)),
        r"\['2.w'\] may be a layer",
    ),
    "adapter": (
        lambda: Written(lambda s, h: s.w(h) + s.b(s.a(h)), w=frozen(linear(3)), a=linear(2), b=linear(3, 2)),
        r"\['2.a.weight', '2.a.bias'\] and \['2.b.weight', '2.b.bias'\] are one product beside another last layer",
    ),
    "frozen": (lambda: frozen(linear(3)), r"what makes the outputs is frozen: \['2.bias', '2.weight'\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_is_unclear_is_an_error_that_lists_the_candidates(name):
    torch.manual_seed(0)
    build, why = UNCLEAR[name]
    model = nn.Sequential(linear(6, 4), nn.Tanh(), build()).double()
    why += (
        r".*Candidates, the nearest to the outputs first: .*\['0.weight', '0.bias'\]. Name .*last_layer_name=.*params="
    )
    with pytest.raises(UnsupportedLayerError, match=why):
        Network.discover(model, data(), parameters="last_layer")
    model.requires_grad_(True)
    names = [name for name, _ in model.named_parameters() if name.startswith("2.")]
    assert list(Network.discover(model, data(), parameters=["2"]).shapes) == names


def test_a_recurrent_layer_at_the_end_is_not_torn_apart():
    model = Written(lambda s, x: s.r(x[:, None].expand(-1, 3, -1))[0][:, -1], r=nn.RNN(4, 3, batch_first=True)).double()
    with pytest.raises(UnsupportedLayerError, match=r"'r.weight_ih_l0'\] is used by .*and added to its result as well"):
        Network.discover(model, data(), parameters="last_layer")


def test_outputs_that_cannot_be_followed():
    class Lost(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(h, w)
            return torch.from_numpy(h.detach().numpy() @ w.detach().numpy())

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            h, w = ctx.saved_tensors
            return g @ w.mT, h.mT @ g

    model = nn.Sequential(linear(6, 4), nn.Tanh(), Written(lambda s, h: Lost.apply(h, s.w), w=own(6, 3))).double()
    with pytest.raises(
        UnsupportedLayerError, match=r"could not be followed from \['0.bias', '0.weight', '2.w'\].*\['2.w'\]"
    ):
        Network.discover(model, data(), parameters="last_layer")


def test_outputs_without_gradients():
    model = nn.Sequential(linear(3, 4), Written(lambda s, h: h.detach()))
    with pytest.raises(UnsupportedLayerError, match="outputs that depend on trainable parameters, got some without"):
        Network.discover(model, data().float(), parameters="last_layer")


def test_a_head_that_is_written_out_has_factors_and_one_that_is_standardised_a_diagonal():
    torch.manual_seed(0)
    written = {"kronecker": lambda s, h: h @ s.w, "diagonal": lambda s, h: h @ (s.w - s.w.mean(0))}
    for kind, function in written.items():
        model = nn.Sequential(linear(100, 4), nn.Tanh(), Written(function, w=own(100, 50))).double()
        network = Network.discover(model, data(), parameters="last_layer")
        assert [(block.name, block.kind.name) for block in network.blocks] == [("2.w", kind)]


# -- what is said about it -------------------------------------------------------------------------


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(data(12), torch.arange(12) % 3)]


def test_the_chosen_parameters_are_named(caplog):
    model, names = model_of("dueling")
    la = DebiasedLaplace(model, "classification", "last_layer", "full")
    with caplog.at_level(logging.INFO, "debiased_laplace.fitting.fit"):
        la.fit(labelled())
    lines = [record.getMessage() for record in caplog.records if "last layer" in record.getMessage()]
    assert lines == [f"The last layer: {', '.join(names)}."]
    assert f"The last layer: {', '.join(names)}.\n" in la.coverage()
    whole = DebiasedLaplace(model, "classification")
    whole.fit(labelled())
    assert "last layer" not in whole.coverage()


@pytest.mark.parametrize(
    "name", ["weight norm", "spectral norm", "weight norm by a hook", "spectral norm by a hook", "cosine"]
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_last_layer_by_its_name(name):
    model, names = model_of(name)
    found, named = (DebiasedLaplace(model, "classification", "last_layer", "full", **own)
                    for own in ({}, {"last_layer_name": "2"}))  # fmt: skip
    for la in (found, named):
        la.fit(labelled())
        assert list(la.network.shapes) == names
    assert_equal(named(data(3, 2)), found(data(3, 2)), 0.0)


def test_a_tied_weight_has_all_names_of_its_modules():
    model = nn.Sequential(linear(6, 6, bias=False), nn.Tanh(), linear(6, 6)).double()
    model[2].weight = model[0].weight
    assert match_parameters(model, "2") == ["0.weight", "2.bias"]
    assert match_parameters(model, ["2.weight"]) == ["0.weight"]
    la = DebiasedLaplace(model, "classification", "last_layer", "full", last_layer_name="2")
    la.fit([(torch.randn(9, 6).double(), torch.arange(9) % 6)])
    assert list(la.network.shapes) == ["0.weight", "2.bias"]


def test_reduced_features_need_one_linear_layer():
    for name, what in (("dueling", "2.value.weight"), ("cosine", "2.w"), ("scaled", "2.t")):
        with pytest.raises(
            ValueError, match=rf"for feature_reduction='average', got .*{what}.*Leave feature_reduction out"
        ):
            Network.discover(model_of(name)[0], data(), parameters="last_layer", feature_reduction="average")


# -- outputs that nothing reaches ------------------------------------------------------------------


def padded(self: Any, h: Tensor) -> Tensor:
    """The first output is a constant, the second is a feature."""
    return torch.cat([torch.zeros_like(h[:, :1]), h[:, 1:2], self.a(h)], 1)


def of_padded(second: Callable[[Any, Tensor], Tensor] = padded) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(linear(6, 4), nn.Tanh(), Written(second, a=linear(2))).double()


CONSTANT = r"of 1 of 4 outputs is zero: 0\. No parameter that the posterior is about acts on them, and no other does"
LEFT_OUT = r"of 1 of 4 outputs is zero: 1\. No parameter .*left out of it, in whole or in part: 0.weight, 0.bias\. Add"


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({}, [CONSTANT]),
        ({"parameters": "last_layer"}, [LEFT_OUT, CONSTANT]),
        ({"parameters": ["2"]}, [LEFT_OUT, CONSTANT]),
        ({"parameters": ["0"]}, [CONSTANT]),
        (
            {"indices": torch.tensor([30, 31])},
            [r"of 2 of 4 outputs is zero: 1, 3\. .*: 0.weight.*2.a.bias\.", CONSTANT],
        ),
    ],
    ids=str,
)
def test_outputs_of_variance_zero_are_named(options, messages):
    with pytest.warns(UserWarning, match="outputs is zero") as caught:
        _, found = variances(of_padded(), Full(), data(), data(3, 2), **options)
    told = [str(own.message) for own in caught]
    assert len(told) == len(messages)
    for text, message in zip(told, messages, strict=True):
        assert re.search(message, text)
    zero = {int(number) for text in told for number in re.search(r"zero: ([\d, ]*)\.", text)[1].split(", ")}
    silent = (found.diagonal(dim1=1, dim2=2) == 0).all(0).nonzero()[:, 0].tolist()
    assert zero == set(silent)


def test_other_outputs_are_not_named(recwarn):
    model = nn.Sequential(linear(6, 4), nn.ReLU(), linear(3), nn.ReLU()).double()
    with torch.no_grad():
        model[2].bias[1] = -9.0  # lets nothing through for these data, for others perhaps
    _, found = variances(model, Full(), data(), data(3, 2))
    assert not found[:, 1].any()
    assert not [own for own in recwarn if "outputs is zero" in str(own.message)]


def test_outputs_of_an_operation_without_a_second_derivative():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return h * torch.tensor([0.0, 1, 1, 1]).to(h)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * torch.tensor([0.0, 1, 1, 1]).to(g)

    model = nn.Sequential(linear(4, 4), Written(lambda s, h: Once.apply(h))).double()
    with pytest.warns(UserWarning, match="of 1 of 4 outputs is zero: 0"):
        variances(model, Full(), data(), data(3, 2))


@pytest.mark.parametrize("structure", ["kron", "full", "diag"])
def test_a_head_that_is_not_returned_breaks_no_fit(structure):
    la = DebiasedLaplace(model_of("not returned")[0], "classification", hessian_structure=structure)
    la.fit(labelled())
    assert bool((la._glm_predictive_distribution(data(3, 2))[1].diagonal(dim1=1, dim2=2) > 0).all())


@pytest.mark.parametrize(
    "options", [{"params": ["2.other"]}, {"subset_of_weights": "last_layer", "last_layer_name": "2.other"}]
)
def test_nothing_but_a_head_that_is_not_returned(options):
    la = DebiasedLaplace(model_of("not returned")[0], "classification", **options)
    with pytest.raises(
        ValueError, match=r"act on the outputs, got \['2.other.weight', '2.other.bias'\], on none of which"
    ):
        la.fit(labelled())
