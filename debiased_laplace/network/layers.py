r"""Calls of layer functions, brought to one canonical form before any mathematics.

For weights W (and a bias b), the gradient of :math:`s^\top f_n` is
:math:`\sum_s g_{ns} a_{ns}^\top`, with

    a: [N, G, I, S]       the call's inputs at S shared positions (patches, tokens), in G groups
    g: [N, G, O, S]       a back-propagated vector at its outputs; [N, G, V, O, S] for V of them

Positions come last because that is how convolutions hold them: nothing is transposed on the way.

Whatever a call looks like, it has to say only three things: its inputs ``a``, how a gradient at its
output becomes ``g``, and which of its arguments are the weight and the bias. Parameters that scale
and shift (normalisation layers) have so few numbers that they are kept exactly: their own gradient
takes the place of g, with one position and ``a = 1``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Coarser grids of positions: every second one in each dimension of a convolution (2, 4 or 8), every fourth token.
N_PHASES = 4


@dataclass(frozen=True)
class Layout:
    """Where the data are in the leading dimensions of a call's tensors.

    ``batch_dimension`` is ``None`` for the usual case: data first, possibly merged with positions that
    vary faster (``[N * T, ...]``). Otherwise positions come before the data: ``[T, N, ...]`` has the
    batch dimension 1, ``[T * N, ...]`` has 0 (as inside multi-head attention).
    """

    batch_dimension: int | None = None

    def by_datum(self, tensor: Tensor, n_data: int, n_trailing: int) -> Tensor:
        """``[leading..., trailing...] -> [N, S, trailing...]``."""
        trailing = tensor.shape[tensor.ndim - n_trailing :]
        if self.batch_dimension is None:
            shared = math.prod(tensor.shape[: tensor.ndim - n_trailing]) // n_data
            return tensor.reshape(n_data, shared, *trailing)
        after = math.prod(tensor.shape[self.batch_dimension + 1 : tensor.ndim - n_trailing])
        return tensor.reshape(-1, n_data, after, *trailing).transpose(0, 1).reshape(n_data, -1, *trailing)

    @staticmethod
    def candidates(shape: torch.Size, n_data: int, n_trailing: int) -> list[Layout]:
        """Layouts that the shape of a call's output allows, the most usual one first."""
        leading = shape[: len(shape) - n_trailing]
        found = []
        if leading and leading[0] % n_data == 0:
            found.append(Layout())
        found += [Layout(dim) for dim in (1, 0) if len(leading) > dim and leading[dim] % n_data == 0]
        return found


@dataclass
class Call(ABC):
    """One call of a layer function in a forward pass.

    Attributes:
        weight: The weight argument, or None.
        bias: The bias argument, or None.
        input: The input argument, detached.
        output_shape: Shape of the output.
        edge: The output's place in the autograd graph; it stays valid under in-place activations.
        version: The input's version counter, to notice that somebody overwrote it later.
    """

    weight: Tensor | None
    bias: Tensor | None
    input: Tensor
    output_shape: torch.Size
    edge: Any
    version: int = 0

    n_trailing = 1  # trailing dimensions of the output that are no leading data or position dimension
    exact = False  # whether the parameters' own gradient is the factor

    @property
    def groups(self) -> int:
        """Number of groups G."""
        return 1

    def narrow(self, part: slice, n_data: int, layout: Layout) -> Call | None:
        """The same call for some of the data alone; None if the data do not come first in its tensors."""
        if layout.batch_dimension is not None:
            return None
        copies = self.output_shape[0] // n_data
        rows = slice(part.start * copies, part.stop * copies)
        shape = torch.Size((rows.stop - rows.start, *self.output_shape[1:]))
        return replace(self, input=self.input[rows], output_shape=shape)

    @abstractmethod
    def inputs(self, n_data: int, layout: Layout, *, ones: bool, phase: int | None = None) -> Tensor:
        """Inputs of the weight, ``[N, G, I, S]``; with ``ones`` a further input that is one.

        With a ``phase``, positions on a coarser grid, one of those that together have all positions, times the root of
        their number: outer products, summed over positions, then have the right mean over phases.
        """

    @abstractmethod
    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        """A back-propagated vector, ``[*output_shape] -> [N, G, O, S]``."""


@dataclass
class LinearCall(Call):
    """``F.linear`` with any leading dimensions."""

    def inputs(self, n_data: int, layout: Layout, *, ones: bool, phase: int | None = None) -> Tensor:
        rows = layout.by_datum(self.input, n_data, 1)  # [N, S, I]
        if phase is not None and rows.shape[1] >= N_PHASES:
            rows = rows[:, phase % N_PHASES :: N_PHASES]
            return N_PHASES**0.5 * (F.pad(rows, (0, 1), value=1.0) if ones else rows).mT[:, None]
        return (F.pad(rows, (0, 1), value=1.0) if ones else rows).mT[:, None]

    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        return layout.by_datum(gradient, n_data, 1).mT[:, None]


@dataclass
class ConvolutionCall(Call):
    """``F.conv1d``, ``conv2d`` and ``conv3d``; other padding modes pad before the call."""

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

    def inputs(self, n_data: int, layout: Layout, *, ones: bool, phase: int | None = None) -> Tensor:
        assert self.weight is not None
        kernel, spatial = self.weight.shape[2:], self.output_shape[2:]
        step, start = 1, [0] * len(spatial)
        if phase is not None and min(spatial) > 1:
            step, start = 2, [phase >> dimension & 1 for dimension in range(len(spatial))]
            spatial = torch.Size((size - first + 1) // 2 for size, first in zip(spatial, start, strict=True))
        pad = [amount for pair in reversed(self.padding) for amount in pair]
        padded = F.pad(self.input, pad).contiguous() if any(pad) else self.input.contiguous()
        n, per_group = len(padded), padded.shape[1] // self.groups
        # Kernel positions and output positions are both strides into the input: patches without arithmetic.
        by_sample, by_channel, *steps = padded.stride()
        patches = padded.as_strided(
            (n, self.groups, per_group, *kernel, *spatial),
            (
                by_sample, by_channel * per_group, by_channel,
                *(by * dilation for by, dilation in zip(steps, self.dilation, strict=True)),
                *(step * by * stride for by, stride in zip(steps, self.stride, strict=True)),
            ),
            sum(first * by * stride for first, by, stride in zip(start, steps, self.stride, strict=True)),
        )  # fmt: skip
        size = per_group * math.prod(kernel)
        # Data next to positions in memory: sums over both are then products of matrices without another copy.
        columns = padded.new_empty(self.groups, size + ones, n, math.prod(spatial)).permute(2, 0, 1, 3)
        columns[:, :, :size].unflatten(-1, spatial).unflatten(2, (per_group, *kernel)).copy_(patches)
        columns[:, :, size:] = 1
        if step > 1:
            columns *= step ** (0.5 * len(spatial))  # as many phases as step to the power of dimensions
        return self._merge(columns, n_data, layout)

    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        n, channels = gradient.shape[:2]
        return self._merge(gradient.reshape(n, self.groups, channels // self.groups, -1), n_data, layout)

    @staticmethod
    def _merge(columns: Tensor, n_data: int, layout: Layout) -> Tensor:
        """``[batch, G, P, S] -> [N, G, P, S']``: a batch may hold several images for each datum."""
        if len(columns) == n_data:
            return columns
        return layout.by_datum(columns, n_data, 3).permute(0, 2, 3, 1, 4).flatten(3)


@dataclass
class NormalisationCall(Call):
    """``y = weight * normalised + bias``: batch (evaluation mode), layer, group, instance, RMS normalisation."""

    normalised: Callable[[], Tensor] | None = None
    channel_dimensions: int = 1
    channels_last: bool = False
    _normalised: Tensor | None = None  # computed when first asked for, then kept

    exact = True

    @property
    def n_trailing(self) -> int:  # type: ignore[override]
        return self.channel_dimensions if self.channels_last else len(self.output_shape) - 1

    def inputs(self, n_data: int, layout: Layout, *, ones: bool, phase: int | None = None) -> Tensor:
        return self.input.new_ones((n_data, 1, 1, 1))

    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        assert self.normalised is not None
        parts = []
        if self.weight is not None:
            if self._normalised is None:
                self._normalised = self.normalised()
            parts.append(self._sum_positions(gradient * self._normalised, n_data, layout))
        if self.bias is not None:
            parts.append(self._sum_positions(gradient, n_data, layout))
        return torch.cat(parts, -1)[:, None, :, None]

    def _sum_positions(self, tensor: Tensor, n_data: int, layout: Layout) -> Tensor:
        """``[*output_shape] -> [N, number of channels]``."""
        if not self.channels_last:  # [batch, channels, positions...]
            tensor = tensor.flatten(2).sum(2) if tensor.ndim > 2 else tensor
            return layout.by_datum(tensor, n_data, 1).sum(1)
        return layout.by_datum(tensor, n_data, self.channel_dimensions).sum(1).flatten(1)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> dict[str, Any]:
    return {"kind": LinearCall, "input": input, "weight": weight, "bias": bias}


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> dict[str, Any] | None:
    d = weight.ndim - 2
    if input.ndim != d + 2:
        return None  # no batch dimension

    def spread(value: Any) -> tuple[int, ...]:
        return tuple(value) if not isinstance(value, int) and len(value) == d else (_single(value),) * d

    dilation = spread(dilation)
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
        pad = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pad = tuple((p, p) for p in spread(0 if padding == "valid" else padding))
    return {
        "kind": ConvolutionCall, "input": input, "weight": weight, "bias": bias, "stride": spread(stride),
        "padding": pad, "dilation": dilation, "n_groups": groups,
    }  # fmt: skip


def _single(value: Any) -> int:
    return value if isinstance(value, int) else value[0]


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    *rest: Any,
) -> dict[str, Any] | None:
    if training:
        return None  # the statistics of the batch mix the data
    return {
        "kind": NormalisationCall, "input": input, "weight": weight, "bias": bias,
        "normalised": lambda: torch.batch_norm(input, None, None, running_mean, running_var, False, *rest),
    }  # fmt: skip


def _instance_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> dict[str, Any]:
    return {
        "kind": NormalisationCall, "input": input, "weight": weight, "bias": bias,
        "normalised": lambda: torch.instance_norm(input, None, None, *rest),
    }  # fmt: skip


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *rest: Any
) -> dict[str, Any]:
    return {
        "kind": NormalisationCall, "input": input, "weight": weight, "bias": bias,
        "normalised": lambda: torch.group_norm(input, num_groups, None, None, *rest),
    }  # fmt: skip


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, *rest: Any
) -> dict[str, Any]:
    return {
        "kind": NormalisationCall, "input": input, "weight": weight, "bias": bias, "channels_last": True,
        "channel_dimensions": len(normalized_shape),
        "normalised": lambda: torch.layer_norm(input, normalized_shape, None, None, *rest),
    }  # fmt: skip


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, *rest: Any) -> dict[str, Any]:
    return {
        "kind": NormalisationCall, "input": input, "weight": weight, "bias": None, "channels_last": True,
        "channel_dimensions": len(normalized_shape),
        "normalised": lambda: torch.rms_norm(input, normalized_shape, None, *rest),
    }  # fmt: skip


#: What is known of the functions that layers call. A new layer type is one entry here.
RULES: dict[Callable[..., Tensor], Callable[..., dict[str, Any] | None]] = {
    F.linear: _linear,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    torch.batch_norm: _batch_norm,
    torch.instance_norm: _instance_norm,
    torch.group_norm: _group_norm,
    torch.layer_norm: _layer_norm,
    torch.rms_norm: _rms_norm,
}
