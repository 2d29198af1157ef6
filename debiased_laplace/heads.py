r"""Which parameters make the outputs: the last layer, found from what a forward pass computes.

A forward pass is followed operation by operation, below autograd, so that it does not matter how a layer is written (a
module, a function, ``h @ W``, a weight that is normalised first). What depends on the data is told from what depends on
parameters alone; an operation that brings the two together *uses* the parameters. A use is a **layer** if it mixes
features with weights (a product of matrices, a convolution, distances, a look-up in a table, also written out as
``(h[:, None] * W).sum(-1)``), and an adjustment otherwise (a scale, a bias, the affine part of a normalisation, weights
of a mixture).

The last layers are those that lie before no other layer; the **head** is what they use, together with every adjustment
after them, or beside them. Of outputs that are joined (``cat``, ``stack``) each part has last layers of its own. What is
left out lies before the features, the inputs of the last layers. It is an error, which lists the candidates, if

* a layer before the last one is also added to its result, ``z + W @ relu(z)`` with ``z`` the result of a layer;
* one vector of weights mixes several features into each of several outputs, and may be a layer or a mixture;
* what makes the outputs is frozen, is no layer, or is computed where nothing can be followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from debiased_laplace._checks import UnsupportedLayerError

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

    def factors(self) -> tuple[list[int], list[int]]:
        """Positions of the operands that depend on the data, and of those that depend on parameters alone."""
        of_data, of_parameters = [], []
        for position, (_, _, made_by) in enumerate(self.operands):
            if any(operation.data for operation in made_by):
                of_data.append(position)
            elif any(operation.parameters for operation in made_by):
                of_parameters.append(position)
        return of_data, of_parameters

    @property
    def is_linear(self) -> bool:
        """Whether it is linear in what depends on the data."""
        of_data, _ = self.factors()
        product = self.name in LAYERS or self.name == "mul" or (self.name == "div" and of_data == [0])
        return self.name in LINEAR or (product and len(of_data) == 1)


class Trace(TorchDispatchMode):
    """Follows a forward pass; what a tensor holds is known by its memory, so that views are no operations.

    Args:
        parameters: All parameters by name, frozen ones too.
        inputs: The tensors that the model is given.
    """

    def __init__(self, parameters: Mapping[str, Tensor], inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self._held: dict[int, list[tuple[int, float, list[Operation]]]] = {}  # storage -> parts of it with what they hold
        self._alive: list[Any] = []  # memory that is freed would be used again
        for name, parameter in parameters.items():
            own = self._new("parameter", parameters=frozenset({name}))
            key, start, stop = self._where(parameter)
            self._held.setdefault(key, []).append((start, stop, [own]))
        for leaf in inputs:
            key, _, _ = self._where(leaf)
            self._held[key] = [(0, math.inf, [self._new("input", data=True)])]

    def of(self, tensor: Tensor) -> list[Operation]:
        """The operations that made what a tensor holds; none for a constant."""
        key, start, stop = self._where(tensor)
        return [own for first, last, made in self._held.get(key, ()) if first < stop and start < last for own in made]

    def _where(self, tensor: Tensor) -> tuple[int, int, int]:
        """The memory of a tensor and the part of it, in entries."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, say
            self._alive.append(tensor)
            return id(tensor), 0, 1
        self._alive.append(storage)
        start = tensor.storage_offset()
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return storage._cdata, start, start + max(reach, 0) + 1

    def _new(self, name: str, **about: Any) -> Operation:
        self.operations.append(Operation(name, len(self.operations), **about))
        return self.operations[-1]

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
        operation.sources = list(dict.fromkeys(own for _, _, made in operands for own in made))
        operation.data = any(source.data for source in operation.sources)
        operation.parameters = frozenset().union(
            *(source.parameters for source in operation.sources if not source.data)
        )
        for leaf in new:
            self._held[self._where(leaf)[0]] = [(0, math.inf, [operation])]
        return result


def last_layer(trace: Trace, outputs: Tensor, names: Mapping[int, str]) -> list[str]:
    """Names of the trainable parameters of the head, in the order of the parameters.

    Args:
        trace: The forward pass.
        outputs: ``[N, C]``, with the graph of that pass.
        names: Of the trainable parameters, by identity.

    Raises:
        UnsupportedLayerError: If it is not clear which they are; it lists the candidates.
    """
    graph = Graph(trace, outputs)
    reaching = {names[own] for own in leaves(outputs) if own in names}
    followed = set().union(*(own.parameters for own in graph.before_outputs))
    trainable = [name for name in trace.shapes if name in set(names.values())]
    if not reaching:
        raise UnsupportedLayerError(
            "Expected outputs that depend on trainable parameters, got some without gradients. Give the parameters of "
            "the last layer requires_grad_(True), and do not detach the outputs."
        )
    if reaching - followed:
        raise graph.unclear(
            f"the forward pass could not be followed from {sorted(reaching - followed)} to the outputs", trainable
        )
    used = graph.head(trainable)
    chosen = [name for name in trainable if name in used & reaching]
    if not chosen:
        frozen = sorted(used - set(trainable))
        raise graph.unclear(
            f"what makes the outputs is frozen: {frozen}" if frozen else
            "it does not end in a linear layer or a convolution, nor in another layer with weights", trainable,
        )  # fmt: skip
    return chosen


class Graph:
    """What the operations of a forward pass have to do with its outputs; sets of operations are bits of a number."""

    def __init__(self, trace: Trace, outputs: Tensor) -> None:
        self.shapes, self.operations = trace.shapes, trace.operations
        self.n_outputs = outputs.shape[1]
        self.last = trace.of(outputs)
        self.users: list[list[Operation]] = [[] for _ in self.operations]
        self.before: list[int] = []  # of every operation, itself and those before it
        for own in self.operations:
            bits = 1 << own.index
            for source in own.sources:
                self.users[source.index].append(own)
                bits |= self.before[source.index]
            self.before.append(bits)
        self.of_outputs = _union(self.before[own.index] for own in self.last)
        self.ambiguous = 0
        self.layers = 0
        for own in self.operations:
            if own.data and own.parameters and self._is_layer(own):
                self.layers |= 1 << own.index

    @property
    def before_outputs(self) -> list[Operation]:
        """Operations that the outputs depend on."""
        return self._of(self.of_outputs)

    def _of(self, bits: int) -> list[Operation]:
        return [own for own in self.operations if bits >> own.index & 1]

    # -- layers and adjustments ------------------------------------------------------------------

    def _is_layer(self, own: Operation) -> bool:
        """Whether a use of parameters mixes features with them; of one before, it is known already."""
        of_data, of_parameters = own.factors()
        if own.pointwise:
            kind = self._kind_of_product(own)
        elif own.name in LAYERS:
            weights = [position for position in of_parameters if position != LAYERS[own.name]]
            used = {name for i in weights for made in own.operands[i][2] for name in made.parameters}
            kind = "layer" if used else "adjustment"
            of_one_vector = all(len(self.shapes[name]) < 2 for name in used)
            for_each = own.name == "bmm" and own.shape[0] > 1 and own.operands[weights[0]][0][2 - weights[0]] == 1
            if used and (of_one_vector or for_each):
                kind = "mixture"
        elif own.name in PLACEMENTS or "norm" in own.name:
            kind = "adjustment"
        else:  # of something that is not known: a recurrent layer in one piece, a kernel of somebody's own
            kind = "layer" if any(len(self.shapes[name]) > 1 for name in own.parameters) else "adjustment"
        if kind != "mixture":
            return kind == "layer"
        # A vector of weights: features of one output, or what several layers give, weighted?
        if not self.before[own.index] & self.layers:
            return True
        mixed = self._linear_sources(own)
        if self.n_outputs == 1:
            return len(mixed) < 2
        if not mixed:
            self.ambiguous |= 1 << own.index
        return not mixed

    def _kind_of_product(self, own: Operation) -> str:
        """Of an operation on entries: whether a sum over features follows, and whether the weights have outputs."""
        of_data, of_parameters = own.factors()
        varies = [
            {len(own.shape) - len(shape) + dim for position in positions
             for shape, strides, _ in [own.operands[position]]
             for dim, size in enumerate(shape) if size > 1 and (not strides or strides[dim])}
            for positions in (of_data, of_parameters)
        ]  # fmt: skip
        summed = self._summed_dimensions(own)
        if summed is None or not summed & varies[0] & varies[1]:
            return "adjustment"
        return "layer" if varies[1] - varies[0] else "mixture"

    def _summed_dimensions(self, own: Operation) -> set[int] | None:
        """Dimensions over which the result is summed, after any operations on its entries."""
        todo, seen = [own], {own}
        while todo:
            for user in self.users[todo.pop().index]:
                if user.name in SUMS and user.operands[0][0] == own.shape:
                    lists = [a for a in user.arguments if isinstance(a, (list, tuple))]
                    dims = lists[0] if lists else [a for a in user.arguments if type(a) is int][:1]
                    return {dim % len(own.shape) for dim in dims or range(len(own.shape))}
                if user.pointwise and user.shape == own.shape and user not in seen:
                    seen.add(user)
                    todo.append(user)
        return None

    def _linear_sources(self, own: Operation) -> list[Operation]:
        """Layers whose results reach an operation through linear ones alone."""
        found, todo, seen = [], [own], {own}
        while todo:
            for source in todo.pop().sources:
                if source in seen or not source.data:
                    continue
                seen.add(source)
                if self.layers >> source.index & 1:
                    found.append(source)
                elif source.is_linear:
                    todo.append(source)
        return found

    # -- the head --------------------------------------------------------------------------------

    def head(self, trainable: Sequence[str]) -> set[str]:
        """Parameters of the last layers, and of the adjustments after and beside them."""
        layers = self.layers & self.of_outputs
        last = self._last_of(self.of_outputs)
        chosen, seen = last, self._before_any(layers)
        adjusted = self.of_outputs & ~seen
        for branch in self._branches():
            own = self._last_of(branch)
            direct = _union(1 << i.index for i in self._linear_sources(Operation("", -1, sources=self._ends(branch))))
            if own and not own & ~(last | direct):  # made by layers of its own, whatever else these are for
                chosen |= own
                adjusted |= branch & ~self._before_any(self.layers & branch)
        if chosen & self.ambiguous:
            (first, *_) = self._of(chosen & self.ambiguous)
            raise self.unclear(f"{sorted(first.parameters)} may be a layer, or weigh the layers before it", trainable)
        for layer in self._of(layers & ~chosen):
            if (joined := self._added_to(layer, chosen)) is not None:
                raise self.unclear(
                    f"the result of {sorted(layer.parameters)} is used by {sorted(joined.parameters)} and added to its "
                    "result as well", trainable,
                )  # fmt: skip
        return set().union(*(own.parameters for own in self._of(chosen | adjusted) if own.data))

    def _before_any(self, layers: int) -> int:
        return _union(self.before[own.index] for own in self._of(layers))

    def _last_of(self, bits: int) -> int:
        """Layers among operations that lie before no other of them."""
        layers = self.layers & bits
        return layers & ~_union(self.before[own.index] & ~(1 << own.index) for own in self._of(layers))

    def _ends(self, bits: int) -> list[Operation]:
        return [own for own in self._of(bits) if not any(bits >> user.index & 1 for user in self.users[own.index])]

    def _branches(self) -> Iterator[int]:
        """What makes each of the parts that outputs are joined of."""
        todo = list(self.last)
        while todo:
            own = todo.pop()
            sources = [source for source in own.sources if source.data]
            if own.name in PLACEMENTS or (len(sources) == 1 and not self.layers >> own.index & 1):
                todo += sources
            elif own.data:
                yield self.before[own.index]

    def _added_to(self, layer: Operation, last: int) -> Operation | None:
        """The last layer whose result is added to that of an earlier layer, directly or after linear operations."""
        todo, seen = [layer], {layer}
        while todo:
            for user in self.users[todo.pop().index]:
                if user in seen or self.layers >> user.index & 1 or not self.of_outputs >> user.index & 1:
                    continue
                seen.add(user)
                if not user.is_linear:
                    continue
                if joined := self._of(self.before[user.index] & last):
                    return joined[-1]
                todo.append(user)
        return None

    def unclear(self, why: str, trainable: Sequence[str]) -> UnsupportedLayerError:
        """An error that lists what may be meant, nearest to the outputs first."""
        uses = [own for own in reversed(self._of(self.of_outputs)) if own.data and own.parameters & set(trainable)]
        listed = list(dict.fromkeys(tuple(n for n in trainable if n in own.parameters) for own in uses))
        candidates = ", ".join(str(list(own)) for own in listed[:6]) or "none"
        return UnsupportedLayerError(
            f"It is not clear which parameters of the model are its last layer: {why}. Candidates, the nearest to the "
            f"outputs first: {candidates}{', ...' if len(listed) > 6 else ''}. Name the parameters of the last layer "
            'yourself: last_layer_name="a module", or params=[...] with the default subset_of_weights="all" '
            "(parameters=[...] of fit)."
        )


def leaves(outputs: Tensor) -> set[int]:
    """Identities of the tensors that the graph of the outputs ends in."""
    found, seen, todo = set(), set(), [outputs.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo.extend(source for source, _ in node.next_functions)
    return found | ({id(outputs)} if outputs.is_leaf else set())


def _union(sets: Iterable[int]) -> int:
    every = 0
    for own in sets:
        every |= own
    return every
