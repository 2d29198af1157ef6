"""Sums of outer products of patches: the same with the patches and without them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from einconv.expressions import convNd_kfac_reduce, convNd_kfc
from torch import nn

import debiased_laplace as dl
from debiased_laplace.likelihoods import Gaussian
from debiased_laplace.network.layers import patches as module
from debiased_laplace.network.layers.patches import Patches, second_moment
from debiased_laplace.network.memory import HeldMemory
from debiased_laplace.network.network import Network
from tests.datasets import measure, weighted
from tests.tolerances import assert_equal

#: Size of the images, kernel, padding, dilation, groups.
CASES = {
    "usual": ((8, 7), (3, 3), ((1, 1), (1, 1)), (1, 1), 1),
    "no padding": ((8, 7), (3, 3), ((0, 0), (0, 0)), (1, 1), 1),
    "kernel of two sizes": ((9, 7), (3, 5), ((1, 1), (2, 2)), (1, 1), 1),
    "even kernel": ((6, 6), (4, 2), ((1, 2), (1, 0)), (1, 1), 1),
    "dilated": ((9, 8), (3, 3), ((2, 2), (1, 3)), (2, 1), 1),
    "groups": ((6, 5), (3, 3), ((1, 1), (1, 1)), (1, 1), 3),
    "wide padding": ((5, 4), (3, 3), ((4, 3), (5, 1)), (1, 1), 1),
    "cut off": ((7, 6), (3, 3), ((-1, 2), (1, -1)), (1, 1), 1),
    "image smaller than kernel": ((2, 3), (5, 3), ((2, 2), (1, 1)), (1, 1), 1),
    "one dimension": ((9,), (4,), ((2, 0),), (2,), 2),
    "three dimensions": ((5, 4, 6), (3, 2, 3), ((1, 1), (0, 1), (1, 1)), (1, 1, 2), 1),
    "depthwise": ((8, 9), (7, 5), ((3, 3), (1, 2)), (1, 2), 3),
    "depthwise, three dimensions": ((5, 4, 6), (3, 2, 3), ((1, 1), (0, 1), (1, 1)), (1, 1, 2), 2),
}  # fmt: skip


def patches_of(name: str) -> tuple[Patches, torch.Tensor]:
    size, kernel, padding, dilation, groups = CASES[name]
    positions = tuple(
        s + before + after - d * (k - 1)
        for s, k, (before, after), d in zip(size, kernel, padding, dilation, strict=True)
    )
    generator = torch.Generator().manual_seed(0)
    channels = groups if name.startswith("depthwise") else 2 * groups
    images = torch.randn(3, channels, *size, generator=generator, dtype=torch.float64)
    return Patches(kernel, positions, (1,) * len(size), dilation, padding, groups), images


@pytest.fixture
def always(monkeypatch):
    """Sums over displacements however slow they are, and Fourier transforms of all depthwise convolutions."""
    for name in ("GAIN", "ASSEMBLED", "TRANSFORMED"):
        monkeypatch.setattr(module, name, 0.0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_sums_over_displacements(name, ones, weighted, always):
    patches, images = patches_of(name)
    weights = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64) if weighted else None
    columns = patches.columns(images, ones=ones)
    each = torch.ones(3, dtype=torch.float64) if weights is None else weights
    expected = torch.einsum("ngis,ngjs,n->gij", columns, columns, each)
    assert_equal(second_moment(patches, images, torch.float64, ones, weights), expected)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_sums_of_patches(name, ones, stride):
    patches, images = patches_of(name)
    positions = tuple(-(-number // stride) for number in patches.positions)
    patches = replace(patches, positions=positions, stride=(stride,) * len(positions))
    expected = patches.columns(images, ones=ones).sum(-1, keepdim=True)
    assert_equal(patches.sums(images, ones=ones), expected)


def test_sums_of_a_long_signal_take_the_memory_of_a_short_kernel():
    """A second of sound: what is put together has pixels times kernel entries, and no positions."""
    signal = torch.arange(16_000, dtype=torch.float64).view(1, 1, -1)
    patches = Patches((80,), ((16_000 - 80) // 4 + 1,), (4,), (1,), ((0, 0),), 1)
    with HeldMemory() as memory:
        sums = patches.sums(signal, ones=False)
    assert_equal(sums, signal.unfold(2, 80, 4).sum(2).view(1, 1, 80, 1))
    assert max(memory.held) < 4 * 8 * 16_000 * 80


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case[0]) == 2])
def test_patches_are_those_of_unfold(name):
    (before, after), (left, right) = CASES[name][2]
    patches, images = patches_of(name)
    padded = nn.functional.pad(images, (left, right, before, after))
    expected = nn.functional.unfold(padded, patches.kernel, patches.dilation)
    assert_equal(patches.columns(images, ones=False).flatten(1, 2), expected)


def test_which_sums_are_faster():
    def is_fast(size: int, kernel: int, stride: int = 1, padding: int | None = None, images: int = 64) -> bool:
        around = ((kernel // 2 if padding is None else padding,) * 2,) * 2
        positions, shape = ((size + 2 * around[0][0] - kernel) // stride + 1,) * 2, (images, 8, size, size)
        return Patches((kernel,) * 2, positions, (stride,) * 2, (1, 1), around, 1).sums_displacements(shape)

    assert is_fast(32, 3)
    assert is_fast(8, 3)
    assert is_fast(28, 5)
    assert not is_fast(8, 3, images=4)  # the matrix is put together once, for however few images
    assert not is_fast(2, 3)  # nearly all positions are at an edge
    assert not is_fast(32, 3, stride=2)  # what is a displacement apart is not at all positions
    assert not is_fast(32, 1)  # there are no patches
    assert not is_fast(14, 5, padding=0)  # four lines at every edge


#: Layers of ResNet-50 and ConvNeXt, smaller: inputs, outputs, size, kernel, stride, padding, groups.
LAYERS = {
    "stem of 7 x 7": (3, 4, 15, 7, 2, 3, 1), "1 x 1": (6, 4, 5, 1, 1, 0, 1), "1 x 1, stride 2": (6, 4, 7, 1, 2, 0, 1),
    "3 x 3": (4, 3, 8, 3, 1, 1, 1), "3 x 3, stride 2": (4, 3, 8, 3, 2, 1, 1), "patches": (3, 4, 8, 4, 4, 0, 1),
    "depthwise": (6, 6, 9, 7, 1, 3, 6), "groups": (6, 4, 6, 3, 1, 1, 2), "dropped pixels": (4, 6, 7, 2, 2, 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("simplify", [False, True])
@pytest.mark.parametrize("sharing", [dl.Expand(), dl.Reduce()])
@pytest.mark.parametrize("name", LAYERS)
def test_tensor_networks_agree(name, sharing, simplify, always):
    """The einsum of images and of what says which pixel is where, which forms no patches either: einconv's."""
    n_inputs, n_outputs, size, kernel, stride, padding, groups = LAYERS[name]
    torch.manual_seed(0)
    layer = nn.Conv2d(n_inputs, n_outputs, kernel, stride, padding, groups=groups, bias=False)
    model, x = nn.Sequential(layer, nn.Flatten()).double(), torch.randn(3, n_inputs, size, size).double()
    rule = convNd_kfc if isinstance(sharing, dl.Expand) else convNd_kfac_reduce
    equation, operands, shape = rule.einsum_expression(x, kernel, stride, padding, groups=groups, simplify=simplify)
    outputs = model(x)
    scale = 1 / 3 if isinstance(sharing, dl.Expand) else 1 / (3 * layer(x)[0, 0].numel() ** 2)
    expected = torch.einsum(equation, *operands).reshape(shape) * (
        scale / torch.tensor(scale).double()
    )  # theirs: single
    data = weighted(x, torch.zeros_like(outputs), uniform=True)
    statistics = measure(dl.Kronecker(sharing=sharing), Network.discover(model, x), data, Gaussian(), mc_samples=1)
    assert_equal(statistics.inputs[0], expected)


def test_means_of_layers():
    """Of all positions, of a transposed convolution and of several images of a datum, too: without any patch."""
    torch.manual_seed(0)
    model, inputs = Two().double(), torch.randn(4, 2, 2, 6, 5, dtype=torch.float64)
    network = Network.discover(model, inputs)
    factors, part = network.factors(inputs), slice(1, 4)
    means = {block.name: factors.input_means(block, part) for block in network.blocks}
    assert {name for name, mean in means.items() if mean is None} == {"head"}
    for block in network.blocks[:-1]:
        assert_equal(means[block.name], factors.inputs(block, part).mean(-1, keepdim=True))


class Two(nn.Module):
    """Convolutions with a bias and without, a transposed one, and several images for each datum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding="same", groups=2, bias=False)
        self.up = nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1)
        self.head = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.second(self.first(x.flatten(0, 1)).tanh()).tanh()).tanh()
        return self.head(hidden.mean((2, 3)).unflatten(0, (len(x), -1)).mean(1))


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 3.0, 1.0])])
def test_second_moments_of_layers(weights, always):
    torch.manual_seed(0)
    model, inputs = Two().double(), torch.randn(4, 2, 2, 6, 5, dtype=torch.float64)
    network = Network.discover(model, inputs)
    factors, part = network.factors(inputs), slice(1, 4)
    found = {}
    for block in network.blocks:
        moment = factors.input_second_moment(block, part, weights)
        found[block.name] = moment is not None
        if moment is not None:
            columns = factors.inputs(block, part)
            each = torch.ones(3).double() if weights is None else weights.double()
            assert_equal(moment, torch.einsum("ngis,ngjs,n->gij", columns, columns, each))
    assert found == {"first": True, "second.weight": True, "up": True, "head": False}


def test_an_input_that_was_overwritten_is_noticed(always):
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(50, 2))
    inputs = torch.randn(3, 1, 5, 5)
    network = Network.discover(model, inputs)
    factors = network.factors(inputs)
    factors.calls[0].input.add_(1)
    with pytest.raises(RuntimeError, match="overwritten in place"):
        factors.input_second_moment(network.blocks[0])
