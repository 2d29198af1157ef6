r"""Curvature blocks: which parameters share one, and as what matrix.

Every block is a matrix of parameters ``[G, O, I]`` (groups, outputs, inputs). For a layer O and I are
its own, with the bias as the last input; a block of the gradient itself (normalisation layers, parameters that no layer
rule covers) has I = 1, so that its only factor of size above one is the dense block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.network.arrangement import Arrangement, SideBySide, Stacked
from debiased_laplace.network.kinds import DENSE, DIAGONAL, KRONECKER, MAX_DENSE, NO_CURVATURE, Kind
from debiased_laplace.network.layers import Call
from debiased_laplace.network.uses import Use


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
        formed: Whether its calls have no factors in common: then their gradients are formed and added.
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
    formed: bool = False

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def is_lone(self) -> bool:
        """Whether no layer rule covers it, though it takes part in the forward pass."""
        return not self.calls and self.kind != NO_CURVATURE

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
    uses: Sequence[tuple[Use | None, Use | None]],
    elsewhere: dict[str, str],
    *,
    separate_bias: bool = False,
) -> list[Block]:
    """Assign every trainable parameter to exactly one block.

    Factors of layers come first, then formed gradients of calls that have no factors in common
    (:mod:`debiased_laplace.network.formed`), then gradients of lone parameters (:mod:`debiased_laplace.network.lone`).

    Args:
        shapes: Shapes of the trainable parameters by name, in their order.
        calls: Recorded calls in the order of the forward pass.
        uses: For every call, what its weight and its bias are made of (None where there is none).
        elsewhere: Parameters used in functions that no layer rule covers, and the function's name.
        separate_bias: Give weights and biases of layers blocks of their own.

    Returns:
        Blocks in the order of their first parameter.
    """
    members: dict[str, list[int]] = {}
    for index, pair in enumerate(uses):
        for name in dict.fromkeys(name for use in pair if use is not None for name in use.names):
            members.setdefault(name, []).append(index)
    partners: dict[str, set[str | None]] = {}
    for weight, bias in uses:
        for one, other in ((weight, bias), (bias, weight)):
            if one is not None and not one.derived:
                named = other is not None and not other.derived
                partners.setdefault(one.name, set()).add(other.name if named else None)  # type: ignore[union-attr]
    formed = _in_several_ways(calls, uses)
    for call, pair in zip(calls, uses, strict=True):
        stacked = [use.name for use in pair if use is not None and not use.derived and call.arrangement.stacked]
        if any(len(partners[name]) > 1 or name in formed or name in elsewhere for name in stacked):
            formed.update(stacked)

    blocks: dict[tuple[str, ...], Block] = {}
    for (weight, bias), call in zip(uses, calls, strict=True):
        of_call = [
            use for use in (weight, bias)
            if use is not None and not use.derived and use.name not in elsewhere and use.name not in formed
        ]  # fmt: skip
        shared = any(len(partners[use.name]) > 1 for use in of_call) or len({use.whole for use in of_call}) > 1
        joint = call.arrangement.stacked or not (shared or separate_bias)
        for group in [of_call] if joint and of_call else [[use] for use in of_call]:
            names = tuple(use.name for use in group)
            if names not in blocks:
                blocks[names] = _layer_block(
                    names, shapes, call, weight if weight in group else None, bias if bias in group else None,
                    tuple(members[names[0]]),
                )  # fmt: skip

    covered = {name for group in blocks for name in group}
    for name, shape in shapes.items():
        if name in covered:
            continue
        is_formed = name in formed and name not in elsewhere
        kind = _dense_or_diagonal(shape.numel()) if is_formed or name in elsewhere else NO_CURVATURE
        blocks[(name,)] = Block(
            name, (name,), (shape,), kind, Stacked(), outputs=shape.numel(),
            calls=tuple(members[name]) if is_formed else (), formed=is_formed,
        )  # fmt: skip
    order = {name: position for position, name in enumerate(shapes)}
    labels = Counter(block.name for block in blocks.values())  # a recurrent layer has several
    labelled = [
        block if labels[block.name] == 1 else replace(block, name=block.parameters[0]) for block in blocks.values()
    ]
    return sorted(labelled, key=lambda block: order[block.parameters[0]])


def _in_several_ways(calls: Sequence[Call], uses: Sequence[tuple[Use | None, Use | None]]) -> set[str]:
    """Parameters that layers see as different matrices (an embedding and the head that is tied to it) or derived."""
    ways: dict[str, set[Any]] = {}
    for call, (weight, bias) in zip(calls, uses, strict=True):
        for use, is_weight in ((weight, True), (bias, False)):
            for name in () if use is None else use.names:
                as_it_is = use is not None and use.split is None and use.whole
                way: Any = None
                if use is None or use.derived or not call.factored or (call.arrangement.stacked and not as_it_is):
                    way = None
                elif call.arrangement.stacked:
                    way = "stacked"
                elif not use.whole and call.groups > 1:
                    way = None
                else:
                    shape = call.matrix_shape(weight=is_weight, bias=not is_weight)
                    outputs = shape[1] if use.whole else use.shape[0]
                    way = call.kind, use.arranged(call.arrangement), (shape[0], outputs, shape[2])
                ways.setdefault(name, set()).add(way)
    return {name for name, of_name in ways.items() if len(of_name) > 1 or None in of_name}


def _dense_or_diagonal(size: int) -> Kind:
    return DENSE if size <= MAX_DENSE else DIAGONAL


def _layer_block(
    group: tuple[str, ...], shapes: dict[str, torch.Size], call: Call, weight: Use | None, bias: Use | None,
    calls: tuple[int, ...],
) -> Block:  # fmt: skip
    label = group[0].rpartition(".")[0] or group[0] if len(group) > 1 else group[0]
    groups, outputs, inputs = call.matrix_shape(weight=weight is not None, bias=bias is not None)
    arrangement, first = call.arrangement, weight or bias
    assert first is not None
    if weight is not None:
        arrangement = weight.arranged(arrangement)
    elif bias is not None:
        arrangement = bias.arranged(arrangement)
    if not first.whole:
        outputs = first.shape[0]
    kind = _dense_or_diagonal(outputs) if arrangement.stacked else call.kind
    return Block(
        label, group, tuple(shapes[name] for name in group), kind, arrangement, groups, outputs, inputs,
        weight is not None, bias is not None, calls,
    )  # fmt: skip


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
