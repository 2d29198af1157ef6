"""Sums of outer products of patches: the same with the patches and without them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from debiased_laplace.network.layers import patches as module
from debiased_laplace.network.layers.patches import Patches, second_moment
from debiased_laplace.network.network import Network
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
}  # fmt: skip


def patches_of(name: str) -> tuple[Patches, torch.Tensor]:
    size, kernel, padding, dilation, groups = CASES[name]
    positions = tuple(
        s + before + after - d * (k - 1)
        for s, k, (before, after), d in zip(size, kernel, padding, dilation, strict=True)
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, groups * 2, *size, generator=generator, dtype=torch.float64)
    return Patches(kernel, positions, (1,) * len(size), dilation, padding, groups), images


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_sums_over_displacements(name, ones, weighted, monkeypatch):
    monkeypatch.setattr(module, "GAIN", 0.0)
    patches, images = patches_of(name)
    weights = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64) if weighted else None
    columns = patches.columns(images, ones=ones)
    each = torch.ones(3, dtype=torch.float64) if weights is None else weights
    expected = torch.einsum("ngis,ngjs,n->gij", columns, columns, each)
    assert_equal(second_moment(patches, images, torch.float64, ones, weights), expected)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case[0]) == 2])
def test_patches_are_those_of_unfold(name):
    (before, after), (left, right) = CASES[name][2]
    patches, images = patches_of(name)
    padded = nn.functional.pad(images, (left, right, before, after))
    expected = nn.functional.unfold(padded, patches.kernel, patches.dilation)
    assert_equal(patches.columns(images, ones=False).flatten(1, 2), expected)


def test_which_sums_are_faster():
    def is_fast(size: int, kernel: int, stride: int = 1, padding: int | None = None) -> bool:
        around = ((kernel // 2 if padding is None else padding,) * 2,) * 2
        positions = ((size + 2 * around[0][0] - kernel) // stride + 1,) * 2
        return Patches((kernel,) * 2, positions, (stride,) * 2, (1, 1), around, 1).sums_displacements((size, size))

    assert is_fast(32, 3)
    assert is_fast(8, 3)
    assert is_fast(28, 5)
    assert not is_fast(2, 3)  # nearly all positions are at an edge
    assert not is_fast(32, 3, stride=2)  # what is a displacement apart is not at all positions
    assert not is_fast(32, 1)  # there are no patches
    assert not is_fast(14, 5, padding=0)  # four lines at every edge


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
def test_second_moments_of_layers(weights, monkeypatch):
    monkeypatch.setattr(module, "GAIN", 0.0)
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


def test_an_input_that_was_overwritten_is_noticed(monkeypatch):
    monkeypatch.setattr(module, "GAIN", 0.0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(50, 2))
    inputs = torch.randn(3, 1, 5, 5)
    network = Network.discover(model, inputs)
    factors = network.factors(inputs)
    factors.calls[0].input.add_(1)
    with pytest.raises(RuntimeError, match="overwritten in place"):
        factors.input_second_moment(network.blocks[0])
