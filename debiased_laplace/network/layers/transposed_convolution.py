"""``F.conv_transpose1d``, ``conv_transpose2d`` and ``conv_transpose3d``.

A transposed convolution is the convolution with the flipped kernel, in steps of one, of its input with zeros between
the entries (``stride - 1``) and around them: its patches are of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from debiased_laplace.network.arrangement import Arrangement, leading
from debiased_laplace.network.layers.call import Arguments, Call, Layout, rule
from debiased_laplace.network.layers.convolution import in_every_dimension, merge_images, sums_of_images
from debiased_laplace.network.layers.patches import Patches, second_moment


@dataclass(frozen=True)
class InputsFirst(Arrangement):
    """A weight ``[G * I, O, kernel...]`` as ``[G, O, I * kernel]`` with the kernel flipped, and a bias ``[G * O]``."""

    def matrix(self, tensor: Tensor, shape: torch.Size, groups: int, outputs: int) -> Tensor:
        before = leading(tensor, shape)
        if len(shape) == 1:  # the bias
            return tensor.reshape((*before, groups, outputs, 1))
        weight = tensor.flip(_kernel(tensor, shape)).reshape((*before, groups, -1, outputs, math.prod(shape[2:])))
        return weight.transpose(-3, -2).flatten(-2)

    def tensor(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        before = matrix.shape[:-3]
        if len(shape) == 1:
            return matrix.reshape((*before, *shape))
        weight = matrix.unflatten(-1, (-1, math.prod(shape[2:]))).transpose(-3, -2).reshape((*before, *shape))
        return weight.flip(_kernel(weight, shape))


def _kernel(tensor: Tensor, shape: torch.Size) -> list[int]:
    return list(range(tensor.ndim - len(shape) + 2, tensor.ndim))


@dataclass
class TransposedConvolutionCall(Call):
    """A transposed convolution, with what it cuts off before and after in every dimension."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    n_groups: int = 1

    arrangement: ClassVar[Arrangement] = InputsFirst()

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

    def matrix_shape(self, *, weight: bool, bias: bool) -> tuple[int, int, int]:
        assert self.weight is not None
        inputs, outputs, *kernel = self.weight.shape
        return self.groups, outputs, inputs // self.groups * math.prod(kernel) * weight + bias

    @property
    def _patches(self) -> Patches:
        assert self.weight is not None
        kernel, positions = tuple(self.weight.shape[2:]), tuple(self.output_shape[2:])
        around = tuple(
            (apart * (size - 1) - cut, apart * (size - 1) - cut + more)
            for size, apart, cut, more in zip(kernel, self.dilation, self.padding, self.output_padding, strict=True)
        )
        return Patches(kernel, positions, (1,) * len(kernel), self.dilation, around, self.groups)

    def inputs(self, n_data: int, layout: Layout, *, ones: bool) -> Tensor:
        return merge_images(self._patches.columns(self._with_zeros_between(), ones=ones), n_data, layout)

    def second_moment(self, dtype: torch.dtype, *, ones: bool, weights: Tensor | None = None) -> Tensor | None:
        if not self._patches.sums_displacements((*self.input.shape[:2], *self._size_with_zeros)):
            return None
        return second_moment(self._patches, self._with_zeros_between(), dtype, ones, weights)

    def input_sums(self, n_data: int, layout: Layout, dtype: torch.dtype, *, ones: bool) -> tuple[Tensor, int]:
        return sums_of_images(self._patches, self._with_zeros_between().to(dtype), n_data, layout, ones)

    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        n, channels = gradient.shape[:2]
        return merge_images(gradient.reshape(n, self.groups, channels // self.groups, -1), n_data, layout)

    @property
    def _size_with_zeros(self) -> list[int]:
        return [(size - 1) * step + 1 for size, step in zip(self.input.shape[2:], self.stride, strict=True)]

    def _with_zeros_between(self) -> Tensor:
        stuffed = self.input.new_zeros(*self.input.shape[:2], *self._size_with_zeros)
        stuffed[(slice(None), slice(None), *(slice(None, None, step) for step in self.stride))] = self.input
        return stuffed


@rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def _transposed_convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Arguments | None:  # fmt: skip
    dimensions = weight.ndim - 2
    if input.ndim != dimensions + 2:
        return None  # no batch dimension
    given = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
    settings: dict[str, Any] = {name: in_every_dimension(value, dimensions) for name, value in given.items()}
    return Arguments(TransposedConvolutionCall, input, weight, bias, settings | {"n_groups": groups})
