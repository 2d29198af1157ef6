"""A forward pass as operations: what each does with the data and with the parameters.

It is followed below autograd, where every layer has been taken apart: it does not matter how one is written (a module,
a function, ``h @ W``, a weight that is normalised first), nor what a composite function does inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations that mix features with weights, and the position of the bias among their arguments.
LAYERS: dict[str, int | None] = {
    "mm": None, "bmm": None, "mv": None, "dot": None, "vdot": None, "addmm": 0, "addmv": 0, "baddbmm": 0, "addbmm": 0,
    "linear": 2, "convolution": 2, "_trilinear": None, "_cdist_forward": None, "_euclidean_dist": None,
    "embedding": None, "_embedding_bag": None, "_embedding_bag_forward_only": None, "index": None,
    "index_select": None, "gather": None, "take": None,
}  # fmt: skip

#: Operations that put tensors side by side, or one into another.
PLACEMENTS = frozenset({
    "cat", "stack", "copy", "where", "scatter", "index_put", "masked_fill", "masked_scatter", "slice_scatter",
    "select_scatter", "fill",
})  # fmt: skip

#: Linear in everything that depends on the data; products are where one factor alone does.
LINEAR = frozenset({
    "add", "sub", "rsub", "neg", "sum", "mean", "cat", "stack", "copy", "clone", "_to_copy", "_unsafe_view", "repeat",
    "index", "index_select", "gather", "_adaptive_avg_pool2d", "avg_pool2d", "constant_pad_nd", "flip", "roll",
})  # fmt: skip

#: Sums over dimensions, in which a product of features and weights that was written out ends.
SUMS = frozenset({"sum", "mean", "linalg_vector_norm", "logsumexp", "norm", "amax", "amin"})


@dataclass(eq=False)
class Operation:
    """One operation of a forward pass.

    Attributes:
        name: Of the function, without its overload and the underscore of an in-place one.
        index: Its position in the forward pass.
        operands: Tensor arguments with what they hold, in the order of the arguments.
        arguments: All arguments that are no tensors.
        shape: Of the (first) result.
        pointwise: Whether every entry depends on the same entries of the operands alone.
        data: Whether the result depends on the data.
        parameters: If not, which parameters it depends on; otherwise those that are used here.
        sources: Operations that made the operands.
        varying: Dimensions along which the result varies, not those along which it was only expanded.
    """

    name: str
    index: int
    operands: list[tuple[tuple[int, ...], tuple[int, ...], list[Operation]]] = field(default_factory=list)
    arguments: tuple[Any, ...] = ()
    shape: tuple[int, ...] = ()
    pointwise: bool = False
    data: bool = False
    parameters: frozenset[str] = frozenset()
    sources: list[Operation] = field(default_factory=list)
    varying: set[int] = field(default_factory=set)

    def factors(self) -> tuple[list[int], list[int]]:
        """Positions of the operands that depend on the data, and of those that depend on parameters alone."""
        of_data, of_parameters = [], []
        for position, (_, _, made_by) in enumerate(self.operands):
            if any(operation.data for operation in made_by):
                of_data.append(position)
            elif any(operation.parameters for operation in made_by):
                of_parameters.append(position)
        return of_data, of_parameters

    def varies(self, position: int) -> set[int]:
        """Dimensions of the result along which an operand varies."""
        shape, strides, made_by = self.operands[position]
        along = {dim for dim, size in enumerate(shape) if size > 1 and (not strides or strides[dim])}
        if len(made_by) == 1 and made_by[0].shape == shape:
            along &= made_by[0].varying
        return {len(self.shape) - len(shape) + dim for dim in along}

    @property
    def is_linear(self) -> bool:
        """Whether it is linear in what depends on the data."""
        of_data, _ = self.factors()
        product = self.name in LAYERS or self.name == "mul" or (self.name == "div" and of_data == [0])
        return self.name in LINEAR or (product and len(of_data) == 1)


class OperationSet:
    """Operations of a forward pass by their positions: as fast as numbers, of which it is the bits of one.

    A network has thousands of operations, and each its set of those before it.
    """

    def __init__(self, bits: int = 0) -> None:
        self._bits = bits

    @classmethod
    def of(cls, *operations: Operation) -> OperationSet:
        """The set of some operations."""
        return cls.union(cls(1 << operation.index) for operation in operations)

    @classmethod
    def union(cls, sets: Iterable[OperationSet]) -> OperationSet:
        """All operations of several sets."""
        every = 0
        for one in sets:
            every |= one._bits
        return cls(every)

    def __or__(self, other: OperationSet) -> OperationSet:
        """Those of either."""
        return OperationSet(self._bits | other._bits)

    def __and__(self, other: OperationSet) -> OperationSet:
        """Those of both."""
        return OperationSet(self._bits & other._bits)

    def __sub__(self, other: OperationSet) -> OperationSet:
        """Those that are not in the other."""
        return OperationSet(self._bits & ~other._bits)

    def __contains__(self, operation: Operation) -> bool:
        """Whether an operation is in it."""
        return bool(self._bits >> operation.index & 1)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self._bits != 0

    def __iter__(self) -> Iterator[int]:
        """Positions, in the order of the forward pass."""
        bits = self._bits
        while bits:
            lowest = bits & -bits
            yield lowest.bit_length() - 1
            bits ^= lowest


class Trace(TorchDispatchMode):
    """Follows a forward pass; what a tensor holds is known by its memory, so that views are no operations.

    Args:
        parameters: All parameters by name, frozen ones too.
        inputs: The tensors that the model is given.
    """

    def __init__(self, parameters: Mapping[str, Tensor], inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self._held: dict[
            int, list[tuple[int, float, list[Operation]]]
        ] = {}  # storage -> parts of it with what they hold
        self._alive: list[Any] = []  # memory that is freed would be used again
        for name, parameter in parameters.items():
            leaf = self._new("parameter", parameters=frozenset({name}))
            key, start, stop = self._where(parameter)
            self._held.setdefault(key, []).append((start, stop, [leaf]))
        for given in inputs:
            key, _, _ = self._where(given)
            self._held[key] = [(0, math.inf, [self._new("input", data=True)])]

    def of(self, tensor: Tensor) -> list[Operation]:
        """The operations that made what a tensor holds; none for a constant."""
        key, start, stop = self._where(tensor)
        held = [made for first, last, made in self._held.get(key, ()) if first < stop and start < last]
        return [operation for made in held for operation in made]

    def _where(self, tensor: Tensor) -> tuple[int, int, int]:
        """The memory of a tensor and the part of it, in entries."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, say
            self._alive.append(tensor)
            return id(tensor), 0, 1
        self._alive.append(storage)
        start = int(tensor.storage_offset())
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return storage._cdata, start, start + max(int(reach), 0) + 1

    def _new(self, name: str, **about: Any) -> Operation:
        self.operations.append(Operation(name, len(self.operations), **about))
        return self.operations[-1]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to tell the compiler to skip this, PyTorch would import it, a second of every first fit."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = _pytree.tree_leaves((args, kwargs))
        operands = [
            (tuple(leaf.shape), leaf.stride() if leaf.layout == torch.strided else (), self.of(leaf))
            for leaf in leaves if isinstance(leaf, Tensor)
        ]  # fmt: skip
        result = func(*args, **kwargs)
        written = [
            value
            for argument, value in [*zip(func._schema.arguments, args, strict=False),
                                    *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs)]
            if argument.alias_info is not None and argument.alias_info.is_write
        ]  # fmt: skip
        written = [leaf for leaf in _pytree.tree_leaves(written) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        known = {self._where(leaf)[0] for leaf in leaves if isinstance(leaf, Tensor)}
        new = written + [leaf for leaf in results if self._where(leaf)[0] not in known]
        if not new:  # a view
            return result
        name = func._schema.name.rpartition("::")[2]
        name = name.removesuffix("_") if written else name
        if name in ("copy", "fill", "zero") and written[0].numel() * written[0].element_size() == (
            written[0].untyped_storage().nbytes()
        ):  # nothing is left of what was there
            operands = operands[1:]
        operation = self._new(
            name, operands=operands, shape=tuple(new[0].shape), pointwise=torch.Tag.pointwise in func.tags,
            arguments=tuple(leaf for leaf in (*args[1:], *kwargs.values()) if not isinstance(leaf, Tensor)),
        )  # fmt: skip
        if name.startswith("new_") or name.endswith("_like"):
            operation.operands = operands = []  # of one shape alone
        entrywise = operation.pointwise or name in ("clone", "_to_copy")
        if operands and (entrywise or (name in SUMS and len(operands[0][0]) == len(operation.shape))):
            operation.varying = set().union(*(operation.varies(i) for i in range(len(operands))))
        operation.varying = operation.varying or set(range(len(operation.shape)))
        operation.sources = list(dict.fromkeys(source for _, _, made in operands for source in made))
        operation.data = any(source.data for source in operation.sources)
        operation.parameters = frozenset().union(
            *(source.parameters for source in operation.sources if not source.data)
        )
        for leaf in new:
            self._held[self._where(leaf)[0]] = [(0, math.inf, [operation])]
        return result
