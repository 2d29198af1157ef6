r"""Which parameters make the outputs: the last layer, found from what a forward pass computes.

A forward pass is followed operation by operation, below autograd, so that it does not matter how a layer is written (a
module, a function, ``h @ W``, a weight that is normalised first). What depends on the data is told from what depends on
parameters alone; an operation that brings the two together *uses* the parameters. A use is a **layer** if it mixes
features with weights (a product of matrices, a convolution, distances, a look-up in a table, also written out as
``(h[:, None] * W).sum(-1)``), and an adjustment otherwise (a scale, a bias, the affine part of a normalisation, weights
of a mixture).

The last layers are those that lie before no other layer; the **head** is what they use, together with every adjustment
after them, or beside them. Of outputs that are joined (``cat``, ``stack``) each part has last layers of its own. What
is left out lies before the features, the inputs of the last layers. It is an error, which lists the candidates, if

* a layer before the last one is also added to its result, ``z + W @ relu(z)`` with ``z`` the result of a layer;
* a vector of weights may be a layer or weigh what several layers give, as ``cat([a(h), b(h)], 1) @ w``;
* two layers in a row stand beside another one of the same features, as an adapter does;
* what makes the outputs is frozen, is no layer, or is computed where nothing can be followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from debiased_laplace._checks import UnsupportedLayerError
from debiased_laplace.network.operations import LAYERS, PLACEMENTS, SUMS, Operation, OperationSet, Trace
from debiased_laplace.network.tracing import leaves


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
    reaching = {names[leaf] for leaf in leaves(outputs) if leaf in names}
    followed = set().union(*(operation.parameters for operation in graph.before_outputs))
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
    """What the operations of a forward pass have to do with its outputs."""

    def __init__(self, trace: Trace, outputs: Tensor) -> None:
        self.shapes, self.operations = trace.shapes, trace.operations
        self.n_outputs = outputs.shape[1]
        self.last = trace.of(outputs)
        self.users: list[list[Operation]] = [[] for _ in self.operations]
        self.before: list[OperationSet] = []  # of every operation, itself and those before it
        for operation in self.operations:
            before = OperationSet.of(operation)
            for source in operation.sources:
                self.users[source.index].append(operation)
                before |= self.before[source.index]
            self.before.append(before)
        self.of_outputs = OperationSet.union(self.before[operation.index] for operation in self.last)
        self.ambiguous = OperationSet()
        self.layers = OperationSet()
        for operation in self.operations:
            if operation.data and operation.parameters and self._is_layer(operation):
                self.layers |= OperationSet.of(operation)

    @property
    def before_outputs(self) -> list[Operation]:
        """Operations that the outputs depend on."""
        return self._of(self.of_outputs)

    def _of(self, operations: OperationSet) -> list[Operation]:
        return [self.operations[index] for index in operations]

    # -- layers and adjustments ------------------------------------------------------------------

    def _is_layer(self, operation: Operation) -> bool:
        """Whether a use of parameters mixes features with them; of one before, it is known already."""
        _, of_parameters = operation.factors()
        if operation.pointwise:
            kind = self._kind_of_product(operation)
        elif operation.name in LAYERS:
            weights = [position for position in of_parameters if position != LAYERS[operation.name]]
            used = {name for i in weights for made in operation.operands[i][2] for name in made.parameters}
            kind = "layer" if used else "adjustment"
            of_one_vector = all(len(self.shapes[name]) < 2 for name in used)
            in_batches = operation.name == "bmm" and operation.shape[0] > 1
            if used and (of_one_vector or (in_batches and operation.operands[weights[0]][0][1 + weights[0]] == 1)):
                kind = "mixture"
        elif operation.name in PLACEMENTS or "norm" in operation.name:
            kind = "adjustment"
        else:  # of something that is not known: a recurrent layer in one piece, a kernel of somebody's own
            kind = "layer" if any(len(self.shapes[name]) > 1 for name in operation.parameters) else "adjustment"
        if kind != "mixture" or not self.before[operation.index] & self.layers:
            return kind != "adjustment"
        # Weights of features, in a layer without outputs of its own, or of what several layers give?
        if self._joins(operation, ("stack",), lambda source: source.is_linear):
            return False
        joined = self._joins(operation, ("stack",)) or self._joins(operation, ("cat",), lambda source: source.is_linear)
        mixed = self._layers_behind([operation], lambda source: source.is_linear)
        if joined or (mixed and self.n_outputs > 1):
            self.ambiguous |= OperationSet.of(operation)
        return True

    def _kind_of_product(self, operation: Operation) -> str:
        """Of an operation on entries: whether a sum over features follows, and whether the weights have outputs."""
        varies = [set().union(*(operation.varies(position) for position in of_kind)) for of_kind in operation.factors()]
        summed = self._summed_dimensions(operation)
        if summed is None or not summed & varies[0] & varies[1]:
            return "adjustment"
        return "layer" if varies[1] - varies[0] else "mixture"

    def _summed_dimensions(self, operation: Operation) -> set[int] | None:
        """Dimensions over which the result is summed, after any operations on its entries."""
        todo, seen = [operation], {operation}
        while todo:
            for user in self.users[todo.pop().index]:
                if user.name in SUMS and user.operands[0][0] == operation.shape:
                    lists = [a for a in user.arguments if isinstance(a, (list, tuple))]
                    dims = lists[0] if lists else [a for a in user.arguments if type(a) is int][:1]
                    return {dim % len(operation.shape) for dim in dims or range(len(operation.shape))}
                if user.pointwise and user.shape == operation.shape and user not in seen:
                    seen.add(user)
                    todo.append(user)
        return None

    def _layers_behind(self, starts: Sequence[Operation], passes: Callable[[Operation], bool]) -> list[Operation]:
        """Layers from which operations can be reached through none but such operations as are given."""
        layers: list[Operation] = []
        todo, seen = [source for start in starts for source in start.sources], set[Operation]()
        while todo:
            source = todo.pop()
            if source in seen or not source.data:
                continue
            seen.add(source)
            if source in self.layers:
                layers.append(source)
            elif passes(source):
                todo += source.sources
        return layers

    def _joins(
        self, operation: Operation, names: tuple[str, ...], passes: Callable[[Operation], bool] = lambda source: True
    ) -> bool:
        """Whether an operation is of results of several layers that were put side by side."""
        joins: list[Operation] = []

        def noting(source: Operation) -> bool:
            joins.append(source)
            return passes(source)

        self._layers_behind([operation], noting)
        return any(len(self._layers_behind([join], passes)) > 1 for join in joins if join.name in names)

    # -- the head --------------------------------------------------------------------------------

    def head(self, trainable: Sequence[str]) -> set[str]:
        """Parameters of the last layers, and of the adjustments after and beside them."""
        layers = self.layers & self.of_outputs
        last = self._last_of(self.of_outputs)
        chosen, seen = last, self._before_any(layers)
        adjusted = self.of_outputs - seen
        for part in self._parts(self.last):
            before = self.before[part.index]
            of_part = self._last_of(before)
            direct = self._layers_behind([Operation("", -1, sources=[part])], lambda source: source.is_linear)
            if of_part and not of_part - (last | OperationSet.of(*direct)):
                chosen |= of_part  # this part is made by them, whatever else they are for
                adjusted |= before - self._before_any(self.layers & before)
        if chosen & self.ambiguous:
            (first, *_) = self._of(chosen & self.ambiguous)
            raise self.unclear(
                f"{self._names(first)} may be a layer, or weigh what the layers before it give", trainable
            )
        for layer in self._of(layers - chosen):
            if (joined := self._added_to(layer, chosen)) is not None:
                raise self.unclear(
                    f"the result of {self._names(layer)} is used by {self._names(joined)} and added to its result as "
                    "well", trainable,
                )  # fmt: skip
        for layer in self._of(chosen):
            beside = [other for other in self._of(chosen) if other is not layer]
            others = {source for other in beside for source in other.sources if source.data}
            for factor in self._layers_behind([layer], lambda source: source.is_linear):
                if factor not in chosen and others.intersection(factor.sources):
                    raise self.unclear(
                        f"{self._names(factor)} and {self._names(layer)} are one product beside another last layer",
                        trainable,
                    )
        return set().union(*(operation.parameters for operation in self._of(chosen | adjusted) if operation.data))

    def _names(self, operation: Operation) -> list[str]:
        return [name for name in self.shapes if name in operation.parameters]

    def _before_any(self, layers: OperationSet) -> OperationSet:
        return OperationSet.union(self.before[index] for index in layers)

    def _last_of(self, operations: OperationSet) -> OperationSet:
        """Layers among operations that lie before no other of them."""
        layers = self.layers & operations
        return layers - OperationSet.union(self.before[o.index] - OperationSet.of(o) for o in self._of(layers))

    def _parts(self, ends: Sequence[Operation]) -> Iterator[Operation]:
        """What the outputs are joined of, whatever is done to them afterwards; themselves if they are not."""
        for end in ends:
            operation = end
            while operation.name not in PLACEMENTS and operation not in self.layers:
                sources = [source for source in operation.sources if source.data]
                if len(sources) != 1:
                    break
                operation = sources[0]
            if operation.name in PLACEMENTS:
                yield from self._parts([source for source in operation.sources if source.data])
            elif end.data:
                yield end

    def _added_to(self, layer: Operation, last: OperationSet) -> Operation | None:
        """The last layer whose result is added to that of an earlier layer, directly or after linear operations."""
        todo, seen = [layer], {layer}
        while todo:
            for user in self.users[todo.pop().index]:
                if user in seen or user in self.layers or user not in self.of_outputs:
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
        uses = [o for o in reversed(self._of(self.of_outputs)) if o.data and o.parameters & set(trainable)]
        listed = list(dict.fromkeys(tuple(n for n in trainable if n in use.parameters) for use in uses))
        listed = listed or [(name,) for name in reversed(trainable)]
        candidates = ", ".join(str(list(names)) for names in listed[:6])
        return UnsupportedLayerError(
            f"It is not clear which parameters of the model are its last layer: {why}. Candidates, the nearest to the "
            f"outputs first: {candidates}{', ...' if len(listed) > 6 else ''}. Name the parameters of the last layer "
            'yourself: last_layer_name="a module", or params=[...] with the default subset_of_weights="all" '
            "(parameters=[...] of fit)."
        )
