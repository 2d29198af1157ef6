r"""Curvature blocks: which parameters share one, and as what matrix.

Every block is a matrix of parameters ``[G, O, I]`` (groups, outputs, inputs). For a layer O and I are
its own, with the bias as the last input; a block that is kept exactly has I = 1, so that its only
Kronecker factor of size above one is the dense block itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from debiased_laplace._checks import UnsupportedLayerError
from debiased_laplace.network.layers import Call

#: Largest parameter that is given an exact dense block when no layer rule covers it.
MAX_LONE_PARAMETERS = 4096


@dataclass(frozen=True)
class Block:
    """Parameters that share a curvature block, as a matrix ``[G, O, I]``.

    Attributes:
        name: For people: the module's name, or the parameter's.
        parameters: Names of the parameters, the weight before the bias.
        shapes: Their shapes.
        kind: ``"kronecker"``, or ``"exact"`` (then I = 1 and the block is dense).
        groups: G.
        outputs: O.
        inputs: I; the bias adds one.
        weight: Whether the weight is part of it (of a Kronecker block).
        bias: Whether the bias is.
        calls: Positions of its calls in the order of the forward pass.
    """

    name: str
    parameters: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    kind: str
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

    def gather(self, parameters: dict[str, Tensor]) -> Tensor:
        """Named tensors ``[..., *shape]`` as one matrix ``[..., G, O, I]``."""
        parts = []
        for name, shape in zip(self.parameters, self.shapes, strict=True):
            leading = parameters[name].shape[: parameters[name].ndim - len(shape)]
            if self.kind == "exact":
                parts.append(parameters[name].reshape(*leading, 1, shape.numel(), 1))
            else:
                parts.append(parameters[name].reshape(*leading, self.groups, self.outputs, -1))
        return torch.cat(parts, -2 if self.kind == "exact" else -1)

    def scatter(self, matrix: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`gather`."""
        dim = -2 if self.kind == "exact" else -1
        per_unit = 1 if self.kind == "exact" else self.groups * self.outputs
        parts = matrix.split([shape.numel() // per_unit for shape in self.shapes], dim)
        leading = matrix.shape[:-3]
        return {
            name: part.reshape((*leading, *shape))
            for name, shape, part in zip(self.parameters, self.shapes, parts, strict=True)
        }


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
    elsewhere = dict(elsewhere)
    for call, pair in zip(calls, names, strict=True):
        own = [name for name in pair if name is not None]
        if call.exact and any(len(partners[name]) > 1 or name in elsewhere for name in own):
            elsewhere.update({name: elsewhere.get(name, "a shared normalisation layer") for name in own})

    blocks: dict[tuple[str, ...], Block] = {}
    for (weight, bias), call in zip(names, calls, strict=True):
        own = [name for name in (weight, bias) if name is not None and name not in elsewhere]
        shared = any(len(partners[name]) > 1 for name in own)
        joint = call.exact or not (shared or separate_bias)
        for group in [tuple(own)] if joint and own else [(name,) for name in own]:
            if group not in blocks:
                uses = tuple(index for index, pair in enumerate(names) if group[0] in pair)
                blocks[group] = _layer_block(group, shapes, call, weight in group, bias in group, uses)

    covered = {name for group in blocks for name in group}
    for name, shape in shapes.items():
        if name in covered:
            continue
        if name not in elsewhere:
            raise UnsupportedLayerError(
                f"The trainable parameter {name!r} takes no part in the forward pass, so it has no curvature. "
                "Freeze it with requires_grad_(False) to leave it out of the posterior."
            )
        if shape.numel() > MAX_LONE_PARAMETERS:
            raise UnsupportedLayerError(
                f"No curvature block covers the trainable parameter {name!r} of shape {tuple(shape)}, used in "
                f"{elsewhere[name]}: supported are linear layers, convolutions, normalisation layers and any "
                f"parameter with at most {MAX_LONE_PARAMETERS} entries. Freeze it with requires_grad_(False) to leave "
                "it out of the posterior."
            )
        blocks[(name,)] = Block(name, (name,), (shape,), "exact", outputs=shape.numel())
    order = {name: position for position, name in enumerate(shapes)}
    return sorted(blocks.values(), key=lambda block: order[block.parameters[0]])


def _layer_block(
    group: tuple[str, ...], shapes: dict[str, torch.Size], call: Call, weight: bool, bias: bool, uses: tuple[int, ...]
) -> Block:
    own = tuple(shapes[name] for name in group)
    label = group[0].rpartition(".")[0] or group[0] if len(group) > 1 else group[0]
    if call.exact:
        size = sum(shape.numel() for shape in own)
        return Block(label, group, own, "exact", outputs=size, weight=weight, bias=bias, calls=uses)
    assert call.weight is not None
    outputs = call.weight.shape[0] // call.groups
    inputs = call.weight[0].numel() * weight + bias
    return Block(label, group, own, "kronecker", call.groups, outputs, inputs, weight, bias, uses)


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
