"""Batch (in evaluation mode), layer, group, instance and RMS normalisation: ``y = weight * normalised + bias``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from debiased_laplace.network.arrangement import Arrangement, Stacked
from debiased_laplace.network.kinds import DENSE, Kind
from debiased_laplace.network.layers.call import Arguments, Call, Layout, rule


@dataclass
class NormalisationCall(Call):
    """Scale and shift of what is normalised; the gradient of both is the factor."""

    normalised: Callable[[Tensor], Tensor] | None = None  # of the input, without scale and shift
    channel_dimensions: int = 1
    channels_last: bool = False
    _normalised: Tensor | None = None  # computed when first asked for, then kept

    kind: ClassVar[Kind] = DENSE
    arrangement: ClassVar[Arrangement] = Stacked()

    @property
    def n_trailing(self) -> int:  # type: ignore[override]
        return self.channel_dimensions if self.channels_last else len(self.output_shape) - 1

    def matrix_shape(self, *, weight: bool, bias: bool) -> tuple[int, int, int]:
        wanted = [p for p, there in ((self.weight, weight), (self.bias, bias)) if p is not None and there]
        return 1, sum(p.numel() for p in wanted), 1

    def inputs(self, n_data: int, layout: Layout, *, ones: bool) -> Tensor:
        parameter = self.bias if self.weight is None else self.weight
        assert parameter is not None
        return parameter.new_ones((n_data, 1, 1, 1))

    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        assert self.normalised is not None
        parts = []
        if self.weight is not None:
            if self._normalised is None:
                self._normalised = self.normalised(self.input.to(gradient.dtype))  # not rounded as an output is
            parts.append(self._sum_positions(gradient * self._normalised, n_data, layout))
        if self.bias is not None:
            parts.append(self._sum_positions(gradient, n_data, layout))
        return torch.cat(parts, -1)[:, None, :, None]

    def gradients(self, gradient: Tensor, n_data: int, layout: Layout) -> tuple[Tensor | None, Tensor | None]:
        vectors, start = self.outputs(gradient, n_data, layout)[:, 0, :, 0], 0
        parts: list[Tensor | None] = []
        for argument in (self.weight, self.bias):
            size = 0 if argument is None else argument.numel()
            part = vectors[:, start : start + size]
            parts.append(None if argument is None else part.reshape(n_data, *argument.shape))
            start += size
        return parts[0], parts[1]

    def _sum_positions(self, tensor: Tensor, n_data: int, layout: Layout) -> Tensor:
        """``[*output_shape] -> [N, number of channels]``."""
        if not self.channels_last:  # [batch, channels, positions...]
            tensor = tensor.flatten(2).sum(2) if tensor.ndim > 2 else tensor
            return layout.by_datum(tensor, n_data, 1).sum(1)
        return layout.by_datum(tensor, n_data, self.channel_dimensions).sum(1).flatten(1)


def _like(x: Tensor, *arguments: Any) -> list[Any]:
    """Arguments with the tensors among them in the precision of another one."""
    return [argument.to(x) if isinstance(argument, Tensor) else argument for argument in arguments]


def _arguments(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, normalised: Callable[[Tensor], Tensor], **settings: Any
) -> Arguments:
    # The gradient of a frozen weight is no part of the factor.
    return Arguments(
        NormalisationCall, input, weight, bias, {"normalised": normalised, **settings}, keeps_frozen_weight=False
    )


@rule(torch.batch_norm)
def _batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, *rest: Any,
) -> Arguments | None:  # fmt: skip
    if training:
        return None  # the statistics of the batch mix the data
    return _arguments(
        input, weight, bias,
        lambda x: torch.batch_norm(x, None, None, *_like(x, running_mean, running_var, False, *rest)),
    )  # fmt: skip


@rule(torch.instance_norm)
def _instance_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> Arguments:
    return _arguments(input, weight, bias, lambda x: torch.instance_norm(x, None, None, *_like(x, *rest)))


@rule(torch.group_norm)
def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *rest: Any
) -> Arguments:
    return _arguments(input, weight, bias, lambda x: torch.group_norm(x, num_groups, None, None, *rest))


@rule(torch.layer_norm)
def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, *rest: Any
) -> Arguments:
    return _arguments(
        input, weight, bias, lambda x: torch.layer_norm(x, normalized_shape, None, None, *rest), channels_last=True,
        channel_dimensions=len(normalized_shape),
    )  # fmt: skip


@rule(torch.rms_norm)
def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, *rest: Any) -> Arguments:
    return _arguments(
        input, weight, None, lambda x: torch.rms_norm(x, normalized_shape, None, *rest), channels_last=True,
        channel_dimensions=len(normalized_shape),
    )  # fmt: skip
