"""Statistics of networks in bfloat16: sums of what was rounded, in single precision, as exact as that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.curvature.moments import MomentSum
from debiased_laplace.likelihoods import Gaussian
from debiased_laplace.network.layers import patches as patches_module
from debiased_laplace.network.layers.embedding import EmbeddingCall
from debiased_laplace.network.layers.linear import LinearCall
from debiased_laplace.network.layers.patches import Patches, second_moment
from debiased_laplace.network.network import Network
from tests.datasets import measure, weighted
from tests.tolerances import assert_equal

#: Relative to the largest entry: some rounding errors of single precision.
SINGLE = 4e-6


class Layers(nn.Module):
    """Convolutions, usual, strided and depthwise, normalisation, tokens and a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(2, 6, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False)
        self.strided = nn.Conv2d(6, 4, 1, stride=2)
        self.layer_norm = nn.LayerNorm(4)
        self.tokens = nn.Linear(4, 5)
        self.product = nn.Bilinear(5, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.strided(self.depthwise(self.batch_norm(self.wide(x)).relu()).relu())
        x = self.tokens(self.layer_norm(x.flatten(2).mT)).tanh().mean(1)
        return self.product(x, x.sin())


def made() -> nn.Module:
    torch.manual_seed(0)
    model = Layers().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return model.bfloat16()


def patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """``[N, G, I, S]`` by torch's unfold."""
    columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    return columns.unflatten(1, (layer.groups, -1))


def inputs_of(layer: Any, arguments: tuple[Tensor, ...]) -> Tensor:
    """Of a layer in double precision, ``[N, G, I, S]``, from what the module was given."""
    x, *others = (argument.double() for argument in arguments)
    if isinstance(layer, nn.Conv2d):
        columns = patches(layer, x)
    elif isinstance(layer, nn.Bilinear):
        columns = torch.einsum("ni,nj->nij", x, others[0]).flatten(1)[:, None, :, None]
    else:
        columns = (x if x.ndim == 3 else x[:, None]).mT[:, None]
    return columns if layer.bias is None else F.pad(columns, (0, 0, 0, 1), value=1.0)


def vectors_of(layer: Any, x: Tensor, gradient: Tensor) -> Tensor:
    """The factor B is made of, ``[N, G, O, S]``; of a normalisation the gradient of weight and bias."""
    x, g = x.double(), gradient.double()
    if isinstance(layer, nn.Conv2d):
        return g.flatten(2).unflatten(1, (layer.groups, -1))
    if isinstance(layer, nn.BatchNorm2d):
        mean, variance = (v.double()[:, None, None] for v in (layer.running_mean, layer.running_var))
        parts = [(g * (x - mean) / (variance + layer.eps).sqrt()).sum((2, 3)), g.sum((2, 3))]
        return torch.cat(parts, 1)[:, None, :, None]
    if isinstance(layer, nn.LayerNorm):
        parts = [(g * F.layer_norm(x, (x.shape[-1],), eps=layer.eps)).sum(1), g.sum(1)]
        return torch.cat(parts, 1)[:, None, :, None]
    return (g if g.ndim == 3 else g[:, None]).mT[:, None]


def test_statistics_are_sums_of_rounded_numbers():
    """Of what a module is given and of the gradients at its outputs, as they are, in every layer."""
    model, x = made(), torch.randn(16, 2, 8, 8).bfloat16()  # weights of 1 / 16, whose roots have no rounding
    seen: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given, out)}))
        for name, layer in model.named_children()
    ]
    outputs = model(x)
    for hook in hooks:
        hook.remove()
    network = Network.discover(model, x)
    data = weighted(x, torch.zeros(16, 3), uniform=True)
    found = {
        block.name: (a, b)
        for statistics in [measure(dl.Kronecker(), network, data, Gaussian())]
        for block, a, b in zip(network.blocks, statistics.inputs, statistics.outputs, strict=True)
    }
    for name, layer in model.named_children():
        given, output = seen[name]
        a, b = found[name if f"{name}.bias" in dict(model.named_parameters()) else f"{name}.weight"]
        if not isinstance(layer, nn.BatchNorm2d | nn.LayerNorm):
            columns = inputs_of(layer, given)
            assert_equal(a.double(), torch.einsum("ngis,ngjs->gij", columns, columns) / 16, SINGLE)
        total = torch.zeros_like(b, dtype=torch.float64)
        for vector in torch.eye(3).bfloat16():
            (g,) = torch.autograd.grad(outputs, output, (vector / 4).expand(16, 3), retain_graph=True)
            columns = vectors_of(layer, given[0], g)
            total += torch.einsum("ngis,ngjs->gij", columns, columns) / columns.shape[-1]
        assert (a.dtype, b.dtype) == (torch.float32, torch.float32)
        assert_equal(b.double(), total, SINGLE)


@pytest.mark.parametrize("positions", [1, 40])
def test_sums_over_many_batches(positions):
    """They stay as exact; in bfloat16 they stop growing when what is added is less than their last digit."""
    generator = torch.Generator().manual_seed(0)
    exact, low = torch.zeros(24, 24, dtype=torch.float64), torch.zeros(24, 24, dtype=torch.bfloat16)
    total = MomentSum(1, 24, square=True, like=torch.empty(0))
    for _ in range(600):
        batch = torch.rand(8, 1, 24, positions, generator=generator).bfloat16()
        total.add(batch.float(), 1 / 8)
        flat = batch[:, 0].transpose(0, 1).flatten(1)
        exact += flat.double() @ flat.double().mT / 8
        low += flat @ flat.mT / 8
    assert_equal(total.moment().dense()[0].double(), exact, SINGLE)
    assert float((low.double() / exact).min()) < 0.9


@pytest.mark.parametrize("groups", [1, 4])
def test_sums_over_many_images(groups, monkeypatch):
    """Those without patches: one after the other in single precision, their errors would grow with the images."""
    monkeypatch.setattr(patches_module, "GAIN", 0.0)
    images = torch.rand(2000, 4, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    patches = Patches((5, 5), (6, 6), (1, 1), (1, 1), ((2, 2), (2, 2)), groups)
    columns = patches.columns(images.double(), ones=True)
    expected = torch.einsum("ngis,ngjs->gij", columns, columns)
    assert_equal(second_moment(patches, images, torch.float32, True, None).double(), expected, SINGLE)


def test_a_fit_in_half_precision_is_that_of_its_rounded_layers():
    """Inputs of the stream, in batches of any size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).bfloat16()
    x, y = torch.randn(120, 6).bfloat16(), torch.randint(2, (120,))
    columns = F.pad(x.double(), (0, 1), value=1.0)
    for size in (1, 120):
        posterior = dl.fit(model, list(zip(x.split(size), y.split(size), strict=True)), "classification")
        observed = posterior.fitted.observed.statistics
        assert_equal(observed.totals[0][0].double() / observed.counts[0], columns.mT @ columns / 120, SINGLE)


class Autocast(nn.Module):
    """Mixed precision in the model's own forward, with its outputs in single precision again if asked for."""

    def __init__(self, inner: nn.Module, back: bool) -> None:
        super().__init__()
        self.inner, self.back = inner, back

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = self.inner(x)
        return outputs.float() if self.back else outputs


@pytest.mark.parametrize("back", [False, True])
def test_layers_that_round_as_autocast_does_are_read_as_they_are(back):
    """Gradients that are off by the rounding of bfloat16 are no other function than the layers'."""
    torch.manual_seed(0)
    inner = nn.Sequential(
        nn.Linear(8, 24), nn.TransformerEncoderLayer(24, 4, 64, 0.0, batch_first=True), nn.Flatten(), nn.Linear(96, 10)
    )
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.mul_(2)  # as large as those of a trained one: differences of large numbers
    x = torch.randn(6, 4, 8)
    network = Network.discover(Autocast(inner.eval(), back), x)
    assert (network.precision, network.dtype) == (torch.finfo(torch.bfloat16).eps, torch.float32)
    assert network.gram_precision == torch.finfo(torch.bfloat16).eps ** 2
    assert not network.apart
    plain = Network.discover(inner.eval(), x)
    assert [block.kind for block in network.blocks] == [block.kind for block in plain.blocks]
    assert Network.restore(Autocast(inner.eval(), back), network.description()).precision == network.precision


def test_a_layer_that_is_read_otherwise_is_noticed_in_half_precision(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16(), torch.randn(6, 5).bfloat16()
    assert not Network.discover(model, x).apart
    right = LinearCall.outputs
    monkeypatch.setattr(LinearCall, "outputs", lambda *arguments: 1.25 * right(*arguments))
    assert set(Network.discover(model, x).apart) == {name for name, _ in model.named_parameters()}


def test_a_large_embedding_that_is_read_otherwise_is_noticed_in_half_precision(monkeypatch):
    """Most of its rows have no part in the gradient, and none in the mean that is compared."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(20_000, 4), nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)
    ).bfloat16()
    x = torch.randint(20_000, (6, 3))
    assert not Network.discover(model, x).apart
    right = EmbeddingCall.outputs
    monkeypatch.setattr(EmbeddingCall, "outputs", lambda *arguments: 3 * right(*arguments))
    assert "0.weight" in Network.discover(model, x).apart
