"""``F.conv1d``, ``conv2d`` and ``conv3d``; other padding modes pad before the call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from debiased_laplace.network.layers.call import Arguments, Call, Layout, rule

#: A coarser grid of positions has every so many of them in each dimension, a power of two: all grids are as likely.
GRID = 4


@dataclass
class ConvolutionCall(Call):
    """A convolution, with the padding ``(before, after)`` of every dimension."""

    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    n_groups: int = 1

    @property
    def n_trailing(self) -> int:  # type: ignore[override]
        return 1 + len(self.stride)

    @property
    def groups(self) -> int:
        return self.n_groups

    @property
    def is_sequence(self) -> bool:
        return len(self.stride) == 1

    @property
    def has_positions(self) -> bool:
        return True

    def inputs(self, n_data: int, layout: Layout, *, ones: bool, phase: int | None = None) -> Tensor:
        assert self.weight is not None
        columns = patches(
            padded(self.input, self.padding), self.weight.shape[2:], self.output_shape[2:], self.stride, self.dilation,
            self.groups, ones=ones, phase=phase,
        )  # fmt: skip
        return merge_images(columns, n_data, layout)

    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        n, channels = gradient.shape[:2]
        return merge_images(gradient.reshape(n, self.groups, channels // self.groups, -1), n_data, layout)


def padded(images: Tensor, padding: Sequence[tuple[int, int]]) -> Tensor:
    """Images with zeros before and after in every dimension; what is negative is cut off."""
    pad = [amount for pair in reversed(padding) for amount in pair]
    return F.pad(images, pad).contiguous() if any(pad) else images.contiguous()


def patches(
    images: Tensor, kernel: Sequence[int], positions: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    groups: int, *, ones: bool, phase: int | None,
) -> Tensor:  # fmt: skip
    """What a kernel sees at every position, ``[batch, G, channels / G * kernel (+ 1), S]``.

    Args:
        images: ``[batch, channels, ...]``, contiguous.
        kernel: Its shape.
        positions: How many there are in every dimension.
        stride: Between them.
        dilation: Between the entries of the kernel.
        groups: G.
        ones: Whether a one comes after them, for a bias.
        phase: Which coarser grid, see :meth:`.Call.inputs`.
    """
    apart, first = [1] * len(positions), [0] * len(positions)
    if phase is not None:
        # Every fourth position in each dimension, or every second of two or three; the digits of the phase say which.
        apart = [min(GRID, 2 ** (size.bit_length() - 1)) for size in positions]
        for dimension, step in enumerate(apart):
            phase, first[dimension] = divmod(phase, step)
        positions = [-(-(size - start) // step) for size, start, step in zip(positions, first, apart, strict=True)]
    n, per_group = len(images), images.shape[1] // groups
    # Kernel positions and output positions are both strides into the input: patches without arithmetic.
    by_sample, by_channel, *steps = images.stride()
    windows = images.as_strided(
        (n, groups, per_group, *kernel, *positions),
        (
            by_sample, by_channel * per_group, by_channel,
            *(by * every for by, every in zip(steps, dilation, strict=True)),
            *(step * by * every for step, by, every in zip(apart, steps, stride, strict=True)),
        ),
        sum(start * by * every for start, by, every in zip(first, steps, stride, strict=True)),
    )  # fmt: skip
    size = per_group * math.prod(kernel)
    # Data next to positions in memory: sums over both are then products of matrices without another copy.
    columns = images.new_empty(groups, size + ones, n, math.prod(positions)).permute(2, 0, 1, 3)
    columns[:, :, :size].unflatten(-1, tuple(positions)).unflatten(2, (per_group, *kernel)).copy_(windows)
    columns[:, :, size:] = 1
    if (phases := math.prod(apart)) > 1:
        columns *= phases**0.5
    return columns


def merge_images(columns: Tensor, n_data: int, layout: Layout) -> Tensor:
    """``[batch, G, P, S] -> [N, G, P, S']``: a batch may hold several images for each datum."""
    if len(columns) == n_data and layout.is_regular:
        return columns
    return layout.by_datum(columns, n_data, 3).permute(0, 2, 3, 1, 4).flatten(3)


def in_every_dimension(value: Any, dimensions: int) -> tuple[int, ...]:
    """A number for each dimension, from those or from one for all."""
    if isinstance(value, int):
        return (value,) * dimensions
    return tuple(value) if len(value) == dimensions else (value[0],) * dimensions


@rule(torch.conv1d, torch.conv2d, torch.conv3d)
def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Arguments | None:  # fmt: skip
    dimensions = weight.ndim - 2
    if input.ndim != dimensions + 2:
        return None  # no batch dimension
    dilation = in_every_dimension(dilation, dimensions)
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
        pad = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pad = tuple((p, p) for p in in_every_dimension(0 if padding == "valid" else padding, dimensions))
    settings = {
        "stride": in_every_dimension(stride, dimensions), "padding": pad, "dilation": dilation, "n_groups": groups,
    }  # fmt: skip
    return Arguments(ConvolutionCall, input, weight, bias, settings)
