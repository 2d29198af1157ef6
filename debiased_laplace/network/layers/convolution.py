"""``F.conv1d``, ``conv2d`` and ``conv3d``; other padding modes pad before the call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.network.layers.call import Arguments, Call, Layout, rule
from debiased_laplace.network.layers.patches import Patches, second_moment


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

    @property
    def _patches(self) -> Patches:
        assert self.weight is not None
        kernel, positions = tuple(self.weight.shape[2:]), tuple(self.output_shape[2:])
        return Patches(kernel, positions, self.stride, self.dilation, self.padding, self.groups)

    def inputs(self, n_data: int, layout: Layout, *, ones: bool) -> Tensor:
        return merge_images(self._patches.columns(self.input, ones=ones), n_data, layout)

    def second_moment(self, dtype: torch.dtype, *, ones: bool, weights: Tensor | None = None) -> Tensor | None:
        return second_moment(self._patches, self.input, dtype, ones, weights)

    def input_sums(self, n_data: int, layout: Layout, dtype: torch.dtype, *, ones: bool) -> tuple[Tensor, int]:
        return sums_of_images(self._patches, self.input.to(dtype), n_data, layout, ones)

    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        n, channels = gradient.shape[:2]
        return merge_images(gradient.reshape(n, self.groups, channels // self.groups, -1), n_data, layout)


def merge_images(columns: Tensor, n_data: int, layout: Layout) -> Tensor:
    """``[batch, G, P, S] -> [N, G, P, S']``: a batch may hold several images for each datum."""
    if len(columns) == n_data and layout.is_regular:
        return columns
    return layout.by_datum(columns, n_data, 3).permute(0, 2, 3, 1, 4).flatten(3)


def sums_of_images(
    patches: Patches, images: Tensor, n_data: int, layout: Layout, ones: bool
) -> tuple[Tensor, int]:  # fmt: skip
    """:meth:`Patches.sums` of the images of every datum, ``[N, G, P, 1]``, and its number of positions."""
    of_images = merge_images(patches.sums(images, ones=ones), n_data, layout)
    return of_images.sum(-1, keepdim=True), of_images.shape[-1] * math.prod(patches.positions)


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
