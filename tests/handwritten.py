"""Small hand-written networks, one for every way in which people use parameters that a layer of torch does not have."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Handwritten:
    """How to make it and its inputs."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]


HANDWRITTEN: dict[str, Handwritten] = {}


def features(n: int) -> Tensor:
    return torch.randn(n, 5, dtype=torch.float64)


def sequences(n: int) -> Tensor:
    return torch.randn(n, 6, 8, dtype=torch.float64)


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 8, 8, dtype=torch.float64)


def add(name: str, make: Callable[[], nn.Module], inputs: Callable[[int], Tensor] = features) -> None:
    HANDWRITTEN[name] = Handwritten(lambda: make().double(), inputs)


class Net(nn.Module):
    """Modules and parameters by name, and the function of them that is computed."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def network(name: str, inputs: Callable[[int], Tensor] = features, **parts: Callable[[], Any]) -> Callable[..., Any]:
    """Makes what it decorates the forward pass of a network with these parts."""

    def register(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
        add(name, lambda: Net(forward, **{key: make() for key, make in parts.items()}), inputs)
        return forward

    return register


def parameter(*shape: int, scale: float = 1.0) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape) * scale)


def linear(inputs: int, outputs: int, **settings: Any) -> Callable[[], nn.Linear]:
    return lambda: nn.Linear(inputs, outputs, **settings)


def convolution(*settings: int) -> Callable[[], nn.Conv2d]:
    return lambda: nn.Conv2d(*settings)


# -- weights that are made -------------------------------------------------------------------------


@network("hypernetwork", make=linear(5, 20), head=linear(4, 3))
def _(net, x):
    weight = net.make(x).reshape(-1, 4, 5)
    return net.head(torch.einsum("noi,ni->no", weight, x).tanh())


@network("hypernetwork-without-data", codes=parameter(2, 4), make=linear(4, 20), head=linear(8, 3))
def _(net, x):
    return net.head(F.linear(x, net.make(net.codes).reshape(8, 5)).tanh())


@network("merged-lora", layer=linear(5, 6), a=parameter(2, 5), b=parameter(6, 2), norm=parameter(6), head=linear(6, 3))
def _(net, x):
    weight = net.layer.weight + net.b @ net.a
    weight = net.norm[:, None] * weight / weight.norm(dim=1, keepdim=True)
    return net.head(F.linear(x, weight, net.layer.bias).tanh())


@network("rounded-weight", layer=linear(5, 6), head=linear(6, 3))
def _(net, x):
    """By a straight-through estimator."""
    weight = net.layer.weight
    return net.head(F.linear(x, weight + (weight.sign() - weight).detach(), net.layer.bias).tanh())


@network("cosine-head", layer=linear(5, 6), prototypes=parameter(3, 6), scale=parameter())
def _(net, x):
    return net.scale * F.linear(F.normalize(net.layer(x)), F.normalize(net.prototypes))


@network("weights-in-one-tensor", both=parameter(2, 6, 5), columns=parameter(6, 8), head=linear(4, 3))
def _(net, x):
    first, second = net.both.unbind(0)
    h = F.linear(x, first) * F.linear(x, second).sigmoid()
    first, second = net.columns.chunk(2, 1)
    return net.head((h @ first) * (h @ second).sigmoid())


@network("joined-weights", first=parameter(3, 5), second=parameter(3, 5), head=linear(6, 3))
def _(net, x):
    return net.head(F.linear(x, torch.cat([net.first, net.second])).tanh())


@network("transposed-and-tied", encoder=linear(5, 5, bias=False), head=linear(5, 3))
def _(net, x):
    return net.head(F.linear(net.encoder(x).tanh(), net.encoder.weight.T))


def _normalised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.Linear(5, 6))
    return nn.Sequential(old, nn.Tanh(), nn.utils.spectral_norm(nn.Linear(6, 3)))


def _pruned() -> nn.Module:
    layer = nn.Linear(5, 6)
    prune.l1_unstructured(layer, "weight", 0.3)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3))


add("weight-norm", lambda: nn.Sequential(
    parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), parametrizations.weight_norm(nn.Linear(6, 3))
))  # fmt: skip
add("spectral-norm", lambda: nn.Sequential(
    parametrizations.spectral_norm(nn.Linear(5, 6)), nn.Tanh(), parametrizations.spectral_norm(nn.Linear(6, 3))
))  # fmt: skip
add("orthogonal", lambda: nn.Sequential(
    parametrizations.orthogonal(nn.Linear(5, 5)), nn.Tanh(), parametrizations.orthogonal(nn.Linear(5, 3))
))  # fmt: skip
add("hooks-of-old-norms", _normalised)
add("pruned", _pruned)


# -- mixtures --------------------------------------------------------------------------------------


def _experts(width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, width) for _ in range(3))


@network("soft-experts", weight=parameter(3, 5, 4), bias=parameter(3, 4), gate=linear(5, 3), head=linear(4, 3))
def _(net, x):
    h = torch.einsum("ni,eio->neo", x, net.weight) + net.bias
    return net.head((net.gate(x).softmax(-1)[..., None] * h.tanh()).sum(1))


@network("hard-experts", experts=lambda: _experts(5), gate=linear(5, 3), head=linear(5, 3))
def _(net, x):
    """Which of them are called depends on the data."""
    gates = net.gate(x).softmax(-1)
    h = torch.zeros_like(x)
    for number, expert in enumerate(net.experts):
        here = (gates.argmax(-1) == number).nonzero()[:, 0]
        if len(here):
            h = h.index_add(0, here, expert(x[here]) * gates[here, number, None])
    return net.head(h)


@network("hard-experts-of-tokens", sequences, experts=lambda: _experts(8), gate=linear(8, 3), head=linear(8, 3))
def _(net, x):
    tokens = x.flatten(0, 1)
    gates = net.gate(tokens).softmax(-1)
    h = torch.zeros_like(tokens)
    for number, expert in enumerate(net.experts):
        here = (gates.argmax(-1) == number).nonzero()[:, 0]
        h[here] += expert(tokens[here]) * gates[here, number, None]
    return net.head(h.reshape(x.shape).mean(1))


@network("ensemble", weight=parameter(4, 6, 5), bias=parameter(4, 1, 6), last=parameter(4, 3, 6))
def _(net, x):
    h = torch.baddbmm(net.bias, x.expand(4, -1, -1), net.weight.mT).tanh()
    return torch.bmm(h, net.last.mT).mean(0)


@network("ensemble-by-vmap", weight=parameter(4, 6, 5), bias=parameter(4, 6), head=linear(6, 3))
def _(net, x):
    return net.head(torch.func.vmap(lambda w, b: F.linear(x, w, b).tanh())(net.weight, net.bias).mean(0))


@network("scale-used-once-more", hidden=linear(5, 6), norm=lambda: nn.LayerNorm(6), head=linear(6, 3))
def _(net, x):
    h = net.norm(net.hidden(x))
    return net.head(h + torch.func.vmap(lambda row: torch.atan(row * net.norm.weight))(h))


@network("conditional-convolution", images, weight=parameter(3, 4, 3, 3, 3, scale=0.2), gate=linear(3, 3),
         head=linear(4, 3))  # fmt: skip
def _(net, x):
    gates = net.gate(x.mean((2, 3))).sigmoid()
    weight = torch.einsum("ne,eoihw->noihw", gates, net.weight).reshape(-1, 3, 3, 3)
    h = F.conv2d(x.reshape(1, -1, 8, 8), weight, groups=len(x)).reshape(len(x), 4, 6, 6)
    return net.head(h.relu().mean((2, 3)))


# -- attention -------------------------------------------------------------------------------------


def _distances() -> Tensor:
    return torch.arange(6)[:, None] - torch.arange(6)


def _heads(net: Any, x: Tensor) -> Tensor:
    return net.qkv(x).reshape(len(x), 6, 3, 2, 4).permute(2, 0, 3, 1, 4)


def _classes(net: Any, attended: Tensor) -> Tensor:
    return net.head(attended.transpose(1, 2).flatten(2).mean(1))


ATTENTION = {"qkv": linear(8, 24), "head": linear(8, 3)}


@network("relative-positions", sequences, table=parameter(11, 2), **ATTENTION)
def _(net, x):
    bias = net.table[_distances() + 5].permute(2, 0, 1)
    return _classes(net, F.scaled_dot_product_attention(*_heads(net, x), attn_mask=bias))


@network("relative-positions-and-mask", sequences, table=parameter(2, 11), **ATTENTION)
def _(net, x):
    mask = torch.zeros(len(x), 1, 1, 6, dtype=x.dtype)
    return _classes(
        net, F.scaled_dot_product_attention(*_heads(net, x), attn_mask=net.table[:, _distances() + 5] + mask)
    )


@network("relative-positions-of-every-datum", sequences, table=parameter(2, 11), **ATTENTION)
def _(net, x):
    bias = net.table[:, _distances() + 5].expand(len(x), -1, -1, -1)
    return _classes(net, F.scaled_dot_product_attention(*_heads(net, x), attn_mask=bias))


@network("slopes-of-distances", sequences, slopes=parameter(2), **ATTENTION)
def _(net, x):
    bias = -net.slopes[:, None, None] * _distances().abs()
    return _classes(net, F.scaled_dot_product_attention(*_heads(net, x), attn_mask=bias))


@network("relative-keys", sequences, query=linear(8, 8), key=linear(8, 8), table=lambda: nn.Embedding(11, 8),
         head=linear(8, 3))  # fmt: skip
def _(net, x):
    query, relative = net.query(x), net.table(_distances() + 5)
    scores = query @ net.key(x).mT + torch.einsum("nqd,qkd->nqk", query, relative)
    return net.head((scores.softmax(-1) @ x).mean(1))


@network("repeated-relative-keys", sequences, query=linear(8, 8), table=parameter(6, 8), **ATTENTION)
def _(net, x):
    """With the same projection of data and of the table, for heads and data in one dimension."""
    query = net.query(x).reshape(-1, 6, 2, 4).transpose(1, 2).flatten(0, 1)
    relative = net.query(net.table).reshape(6, 2, 4).transpose(0, 1).repeat(len(x), 1, 1)
    scores = (query @ relative.mT).unflatten(0, (len(x), 2))
    _, _, value = _heads(net, x)
    return _classes(net, scores.softmax(-1) @ value)


@network("trainable-frequencies", sequences, frequencies=parameter(4), **ATTENTION)
def _(net, x):
    """Rotary embeddings, by complex numbers."""
    angles = torch.arange(6, dtype=x.dtype)[:, None] * net.frequencies
    turned = torch.view_as_complex(x.reshape(len(x), 6, 4, 2)) * torch.polar(torch.ones_like(angles), angles)
    return _classes(net, F.scaled_dot_product_attention(*_heads(net, torch.view_as_real(turned).flatten(2))))


@network("latent-queries", sequences, latents=parameter(4, 8), head=linear(8, 3),
         attention=lambda: nn.MultiheadAttention(8, 2, batch_first=True))  # fmt: skip
def _(net, x):
    return net.head(net.attention(net.latents.expand(len(x), -1, -1), x, x)[0].mean(1))


@network("decoder-of-queries", sequences, queries=lambda: nn.Embedding(4, 8), head=linear(8, 3),
         decoder=lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12), 1))  # fmt: skip
def _(net, x):
    queries = net.queries.weight.unsqueeze(1).repeat(1, len(x), 1)
    return net.head(net.decoder(queries, x.transpose(0, 1)).mean(0))


@network("queries-in-a-kernel", sequences, queries=parameter(2, 3, 4), **ATTENTION)
def _(net, x):
    _, key, value = _heads(net, x)
    return net.head(
        F.scaled_dot_product_attention(net.queries.expand(len(x), -1, -1, -1), key, value).mean(2).flatten(1)
    )


@network("attention-with-everything", sequences, key=linear(8, 5), value=linear(8, 6), head=linear(8, 3),
         attention=lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=6, add_bias_kv=True, add_zero_attn=True,
                                                 batch_first=True))  # fmt: skip
def _(net, x):
    return net.head(net.attention(x, net.key(x), net.value(x), need_weights=False)[0].mean(1))


@network("class-token-by-assignment", sequences, token=parameter(8), layer=linear(8, 8), head=linear(8, 3))
def _(net, x):
    h = torch.empty(len(x), 7, 8, dtype=x.dtype)
    h[:, 0], h[:, 1:] = net.token, x
    return net.head(net.layer(h).tanh().mean(1))


@network("token-in-rows-of-other-data", sequences, token=parameter(8), positions=parameter(4, 8), head=linear(8, 3))
def _(net, x):
    """Data are in rows with their frames, and the first rows have the class tokens of all data."""
    frames = x.reshape(2 * len(x), 3, 8)
    frames = torch.cat([net.token.expand(2 * len(x), 1, 8), frames], 1) + net.positions
    tokens, rest = frames[: len(x), 0], frames[:, 1:].reshape(len(x), 6, 8)
    return net.head((tokens[:, None] * rest).tanh().mean(1))


# -- images ----------------------------------------------------------------------------------------


@network("film", images, layer=convolution(3, 4, 3), film=linear(3, 8), head=linear(4, 3))
def _(net, x):
    scale, shift = net.film(x.mean((2, 3))).chunk(2, 1)
    return net.head((net.layer(x) * scale[..., None, None] + shift[..., None, None]).relu().mean((2, 3)))


@network("squeeze-and-excite", images, layer=convolution(3, 4, 3), squeeze=convolution(4, 2, 1),
         excite=convolution(2, 4, 1), head=linear(4, 3))  # fmt: skip
def _(net, x):
    h = net.layer(x)
    return net.head((h * net.excite(net.squeeze(h.mean((2, 3), True)).relu()).sigmoid()).mean((2, 3)))


@network("u-net", images, down=convolution(3, 4, 3, 2, 1), up=lambda: nn.ConvTranspose2d(4, 4, 2, 2),
         last=convolution(7, 4, 3), head=linear(4, 3))  # fmt: skip
def _(net, x):
    return net.head(net.last(torch.cat([net.up(net.down(x).relu_()), x], 1)).relu().mean((2, 3)))


@network("resized-positions", images, positions=parameter(1, 4, 4, 4), layer=convolution(3, 4, 1), head=linear(4, 3))
def _(net, x):
    return net.head((net.layer(x) + F.interpolate(net.positions, size=8, mode="bicubic")).tanh().mean((2, 3)))


@network("generalised-mean", images, layer=convolution(3, 4, 3), power=lambda: nn.Parameter(torch.tensor(3.0)),
         head=linear(4, 3))  # fmt: skip
def _(net, x):
    return net.head(net.layer(x).relu().clamp(min=1e-3).pow(net.power).mean((2, 3)).pow(1 / net.power))


def _deformable() -> nn.Module:
    ops = pytest.importorskip("torchvision.ops")
    return Net(
        lambda net, x: net.head(net.layer(x, net.offsets(x)).relu().mean((2, 3))), offsets=nn.Conv2d(3, 18, 3, 1, 1),
        layer=ops.DeformConv2d(3, 4, 3, padding=1), head=nn.Linear(4, 3),
    )  # fmt: skip


add("deformable-convolution", _deformable, images)


# -- other functions -------------------------------------------------------------------------------


class _Rectified(torch.autograd.Function):
    """Somebody's own function, without a rule for ``torch.func``."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return (x @ weight.T).clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient * (x @ weight.T > 0)
        return gradient @ weight, gradient.T @ x


@network("own-function", weight=parameter(6, 5), head=linear(6, 3))
def _(net, x):
    return net.head(_Rectified.apply(x, net.weight))


@network("products-of-several", first=parameter(5, 6), second=parameter(6, 6), third=parameter(4, 5, 6),
         head=linear(4, 3))  # fmt: skip
def _(net, x):
    h = torch.linalg.multi_dot([x, net.first, net.second]).tanh()
    return net.head(torch.einsum("ni,nj,oij->no", x, h, net.third))


@network("bilinear", layer=lambda: nn.Bilinear(5, 5, 4), head=linear(4, 3))
def _(net, x):
    return net.head(net.layer(x, x.tanh()).tanh())


@network("prelu", first=linear(5, 6), one=nn.PReLU, six=lambda: nn.PReLU(6), head=linear(6, 3))
def _(net, x):
    return net.head(net.six(net.one(net.first(x))))


@network("spline", layer=linear(5, 4), weight=parameter(4, 5, 6, scale=0.3), scale=parameter(4, 5), grid=parameter(6),
         last=parameter(3, 4, 6, scale=0.3))  # fmt: skip
def _(net, x):
    """As Kolmogorov-Arnold networks have them."""

    def basis(values: Tensor) -> Tensor:
        return torch.exp(-((values[..., None] - net.grid) ** 2))

    h = F.linear(basis(x).flatten(1), (net.weight * net.scale[..., None]).flatten(1)) + net.layer(F.silu(x))
    return torch.einsum("nig,oig->no", basis(h), net.last)


@network("graph-attention", sequences, layer=linear(8, 8), first=parameter(1, 1, 8), second=parameter(8, 1),
         head=linear(8, 3))  # fmt: skip
def _(net, x):
    h = net.layer(x)
    scores = F.leaky_relu((h * net.first).sum(-1, keepdim=True) + (h @ net.second).mT)
    return net.head((scores.softmax(-1) @ h).relu().mean(1))


@network("graph-convolution", sequences, adjacency=lambda: torch.rand(6, 6), weight=parameter(8, 8), head=linear(8, 3))
def _(net, x):
    return net.head((net.adjacency @ (x @ net.weight)).relu().sum(1))


@network("radial-basis", layer=linear(5, 6), centres=parameter(4, 6), widths=parameter(4), head=linear(4, 3))
def _(net, x):
    return net.head(torch.exp(-(net.layer(x)[:, None] - net.centres).square().sum(-1) * net.widths.exp()))


@network("prototypes", layer=linear(5, 6), prototypes=parameter(3, 6))
def _(net, x):
    return -torch.cdist(net.layer(x), net.prototypes)


@network("quantised-codes", layer=linear(5, 4), codes=lambda: nn.Embedding(6, 4), head=linear(4, 3),
         n_calls=lambda: torch.tensor(0))  # fmt: skip
def _(net, x):
    """It counts its calls."""
    h, net.n_calls = net.layer(x), net.n_calls + 1
    return net.head(h + 0.5 * net.codes(torch.cdist(h, net.codes.weight).argmin(1)))


@network("long-convolution", sequences, kernel=parameter(8, 6, scale=0.3), skip=parameter(8), head=linear(8, 3))
def _(net, x):
    """By the fast Fourier transform of a parameter."""
    h = torch.fft.irfft(torch.fft.rfft(x.mT, n=12) * torch.fft.rfft(net.kernel, n=12), n=12)[..., :6]
    return net.head((h + x.mT * net.skip[:, None]).tanh().mean(-1))


@network("fourier-layer", lift=lambda: nn.Conv1d(1, 4, 1), weight=parameter(4, 4, 3, 2, scale=0.3), head=linear(4, 3))
def _(net, x):
    """A complex weight, as two real numbers."""
    modes = torch.fft.rfft(net.lift(x[:, None]))
    h = torch.zeros_like(modes)
    h[..., :3] = torch.einsum("nim,iom->nom", modes[..., :3], torch.view_as_complex(net.weight))
    return net.head(torch.fft.irfft(h, n=5).tanh().mean(-1))


@network("state-space", sequences, decay=parameter(8, 4), write=linear(8, 4), read=linear(8, 4), step=linear(8, 8),
         head=linear(8, 3))  # fmt: skip
def _(net, x):
    steps, state, outputs = F.softplus(net.step(x)), 0.0, []
    decay = torch.exp(-steps[..., None] * net.decay.exp())
    written = steps[..., None] * net.write(x)[:, :, None] * x[..., None]
    for t in range(6):
        state = decay[:, t] * state + written[:, t]
        outputs.append((state * net.read(x)[:, t, None]).sum(-1))
    return net.head(torch.stack(outputs, 1).mean(1))


# -- forward passes --------------------------------------------------------------------------------


@network("checkpoint", first=linear(5, 6), second=linear(6, 6), head=linear(6, 3))
def _(net, x):
    return net.head(checkpoint(lambda h: net.second(h.tanh()).tanh(), net.first(x), use_reentrant=False))


@network("unrolled", first=linear(5, 6), again=linear(6, 6), head=linear(6, 3))
def _(net, x):
    h = net.first(x)
    for _ in range(3):
        h = net.again(h).tanh() + net.first(x)
    return net.head(h)


@network("buffer-of-the-forward-pass", sequences, layer=linear(8, 8), head=linear(8, 3))
def _(net, x):
    if not hasattr(net, "mask"):
        net.register_buffer("mask", torch.ones(6, 6, dtype=x.dtype).tril())
    return net.head((net.mask @ net.layer(x)).tanh().mean(1))


@network("gradient-in-the-forward-pass", energy=lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)),
         head=linear(5, 3))  # fmt: skip
def _(net, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(net.energy(x).sum(), x, create_graph=True)
    return net.head(gradient)
