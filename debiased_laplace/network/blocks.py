r"""Curvature blocks: which parameters share one, and as what matrix.

Every block is a matrix of parameters ``[G, O, I]`` (groups, outputs, inputs). For a layer O and I are
its own, with the bias as the last input; a block of the gradient itself (normalisation layers, parameters that no layer
rule covers) has I = 1, so that its only factor of size above one is the dense block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debiased_laplace._checks import UnsupportedLayerError
from debiased_laplace.network.arrangement import Arrangement, SideBySide, Stacked
from debiased_laplace.network.kinds import DENSE, KRONECKER, Kind
from debiased_laplace.network.layers import Call

#: Largest parameter that is given a dense block when no layer rule covers it.
MAX_LONE_PARAMETERS = 4096


@dataclass(frozen=True)
class Block:
    """Parameters that share a curvature block, as a matrix ``[G, O, I]``.

    Attributes:
        name: For people: the module's name, or the parameter's.
        parameters: Names of the parameters, the weight before the bias.
        shapes: Their shapes.
        kind: What curvature it gets in a Kronecker-factored structure.
        arrangement: Where the parameters are in the matrix.
        groups: G.
        outputs: O.
        inputs: I; the bias adds one.
        weight: Whether the weight is part of it (where parameters are side by side).
        bias: Whether the bias is.
        calls: Positions of its calls in the order of the forward pass.
    """

    name: str
    parameters: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    kind: Kind
    arrangement: Arrangement
    groups: int = 1
    outputs: int = 1
    inputs: int = 1
    weight: bool = True
    bias: bool = False
    calls: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """``(G, O, I)``."""
        return self.groups, self.outputs, self.inputs

    @property
    def _joined(self) -> int:
        return -2 if self.arrangement.stacked else -1

    def gather(self, parameters: dict[str, Tensor]) -> Tensor:
        """Named tensors ``[..., *shape]`` as one matrix ``[..., G, O, I]``."""
        parts = [
            self.arrangement.matrix(parameters[name], shape, self.groups, self.outputs)
            for name, shape in zip(self.parameters, self.shapes, strict=True)
        ]
        return torch.cat(parts, self._joined)

    def scatter(self, matrix: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`gather`."""
        parts = matrix.split(self.arrangement.sizes(self.shapes, self.groups, self.outputs), self._joined)
        return {
            name: self.arrangement.tensor(part, shape)
            for name, shape, part in zip(self.parameters, self.shapes, parts, strict=True)
        }

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a block that an earlier version stored, in which kinds were strings."""
        earlier = {"kronecker": (KRONECKER, SideBySide()), "exact": (DENSE, Stacked())}
        if not isinstance(values.get("kind"), str):
            return dict(values)
        kind, arrangement = earlier[values["kind"]]
        return {**values, "kind": kind, "arrangement": arrangement}


def group_parameters(
    shapes: dict[str, torch.Size],
    calls: Sequence[Call],
    names: Sequence[tuple[str | None, str | None]],
    elsewhere: dict[str, str],
    *,
    separate_bias: bool = False,
) -> list[Block]:
    """Assign every trainable parameter to exactly one block.

    Args:
        shapes: Shapes of the trainable parameters by name, in their order.
        calls: Recorded calls in the order of the forward pass.
        names: For every call, the names of its trainable weight and bias (None where there is none).
        elsewhere: Parameters used in functions that no layer rule covers, and the function's name.
        separate_bias: Give weights and biases of layers blocks of their own.

    Returns:
        Blocks in the order of their first parameter.

    Raises:
        UnsupportedLayerError: If nothing covers a parameter; it names it and the remedy.
    """
    partners: dict[str, set[str | None]] = {}
    for weight, bias in names:
        for one, other in ((weight, bias), (bias, weight)):
            if one is not None:
                partners.setdefault(one, set()).add(other)
    elsewhere = {**_used_in_several_ways(calls, names), **elsewhere}
    for call, pair in zip(calls, names, strict=True):
        of_call = [name for name in pair if name is not None]
        if call.arrangement.stacked and any(len(partners[name]) > 1 or name in elsewhere for name in of_call):
            elsewhere.update({name: elsewhere.get(name, "a shared normalisation layer") for name in of_call})

    blocks: dict[tuple[str, ...], Block] = {}
    for (weight, bias), call in zip(names, calls, strict=True):
        of_call = [name for name in (weight, bias) if name is not None and name not in elsewhere]
        shared = any(len(partners[name]) > 1 for name in of_call)
        joint = call.arrangement.stacked or not (shared or separate_bias)
        for group in [tuple(of_call)] if joint and of_call else [(name,) for name in of_call]:
            if group not in blocks:
                uses = tuple(index for index, pair in enumerate(names) if group[0] in pair)
                blocks[group] = _layer_block(group, shapes, call, weight in group, bias in group, uses)

    covered = {name for group in blocks for name in group}
    for name, shape in shapes.items():
        if name not in covered:
            blocks[(name,)] = _lone_block(name, shape, elsewhere.get(name))
    order = {name: position for position, name in enumerate(shapes)}
    return sorted(blocks.values(), key=lambda block: order[block.parameters[0]])


def _used_in_several_ways(calls: Sequence[Call], names: Sequence[tuple[str | None, str | None]]) -> dict[str, str]:
    """Parameters that layers see as different matrices, an embedding and the head that is tied to it, say."""
    uses: dict[str, dict[Any, str]] = {}
    for call, (weight, bias) in zip(calls, names, strict=True):
        for name, is_weight in ((weight, True), (bias, False)):
            if name is not None and not call.arrangement.stacked:
                matrix = call.kind, call.arrangement, call.matrix_shape(weight=is_weight, bias=not is_weight)
                uses.setdefault(name, {})[matrix] = type(call).__name__
    return {name: " and ".join(ways.values()) for name, ways in uses.items() if len(ways) > 1}


def _layer_block(
    group: tuple[str, ...], shapes: dict[str, torch.Size], call: Call, weight: bool, bias: bool, uses: tuple[int, ...]
) -> Block:
    label = group[0].rpartition(".")[0] or group[0] if len(group) > 1 else group[0]
    return Block(
        label, group, tuple(shapes[name] for name in group), call.kind, call.arrangement,
        *call.matrix_shape(weight=weight, bias=bias), weight, bias, uses,
    )  # fmt: skip


def _lone_block(name: str, shape: torch.Size, function: str | None) -> Block:
    """A dense block for a parameter that no layer rule covers; larger ones could be ``DIAGONAL``.

    Args:
        name: Of the parameter.
        shape: Its shape.
        function: What uses it; None if nothing does.
    """
    if function is None:
        raise UnsupportedLayerError(
            f"The trainable parameter {name!r} takes no part in the forward pass, so it has no curvature. "
            "Freeze it with requires_grad_(False) to leave it out of the posterior."
        )
    if shape.numel() > MAX_LONE_PARAMETERS:
        raise UnsupportedLayerError(
            f"No curvature block covers the trainable parameter {name!r} of shape {tuple(shape)}, used in "
            f"{function}: supported are linear layers, convolutions, embeddings, normalisation layers and any "
            f"parameter with at most {MAX_LONE_PARAMETERS} entries. Freeze it with requires_grad_(False) to leave "
            "it out of the posterior."
        )
    return Block(name, (name,), (shape,), DENSE, Stacked(), outputs=shape.numel())


def flatten(parameters: dict[str, Tensor], shapes: dict[str, torch.Size]) -> Tensor:
    """Named tensors ``[..., *shape]`` as vectors ``[..., D]``, in the order of ``shapes``."""
    return torch.cat(
        [parameters[name].flatten(parameters[name].ndim - len(shape)) if shape else parameters[name][..., None]
         for name, shape in shapes.items()], -1
    )  # fmt: skip


def unflatten(vector: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Inverse of :func:`flatten`."""
    parts = vector.split([shape.numel() for shape in shapes.values()], -1)
    return {
        name: part.reshape((*vector.shape[:-1], *shape))
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
