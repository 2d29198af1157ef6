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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from debiased_laplace._checks import UnsupportedLayerError
from debiased_laplace.network.operations import LAYERS, PLACEMENTS, SUMS, Operation, Trace


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
        found = []
        while bits:
            lowest = bits & -bits
            found.append(self.operations[lowest.bit_length() - 1])
            bits ^= lowest
        return found

    # -- layers and adjustments ------------------------------------------------------------------

    def _is_layer(self, own: Operation) -> bool:
        """Whether a use of parameters mixes features with them; of one before, it is known already."""
        _, of_parameters = own.factors()
        if own.pointwise:
            kind = self._kind_of_product(own)
        elif own.name in LAYERS:
            weights = [position for position in of_parameters if position != LAYERS[own.name]]
            used = {name for i in weights for made in own.operands[i][2] for name in made.parameters}
            kind = "layer" if used else "adjustment"
            of_one_vector = all(len(self.shapes[name]) < 2 for name in used)
            in_batches = own.name == "bmm" and own.shape[0] > 1
            if used and (of_one_vector or (in_batches and own.operands[weights[0]][0][1 + weights[0]] == 1)):
                kind = "mixture"
        elif own.name in PLACEMENTS or "norm" in own.name:
            kind = "adjustment"
        else:  # of something that is not known: a recurrent layer in one piece, a kernel of somebody's own
            kind = "layer" if any(len(self.shapes[name]) > 1 for name in own.parameters) else "adjustment"
        if kind != "mixture" or not self.before[own.index] & self.layers:
            return kind != "adjustment"
        # Weights of features, in a layer without outputs of its own, or of what several layers give?
        if self._joins(own, ("stack",), lambda source: source.is_linear):
            return False
        joined = self._joins(own, ("stack",)) or self._joins(own, ("cat",), lambda source: source.is_linear)
        mixed = self._layers_behind([own], lambda source: source.is_linear)
        if joined or (mixed and self.n_outputs > 1):
            self.ambiguous |= 1 << own.index
        return True

    def _kind_of_product(self, own: Operation) -> str:
        """Of an operation on entries: whether a sum over features follows, and whether the weights have outputs."""
        varies = [set().union(*(own.varies(position) for position in of_kind)) for of_kind in own.factors()]
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

    def _layers_behind(self, starts: Sequence[Operation], passes: Callable[[Operation], bool]) -> list[Operation]:
        """Layers from which operations can be reached through none but such operations as are given."""
        found: list[Operation] = []
        todo, seen = [source for own in starts for source in own.sources], set[Operation]()
        while todo:
            source = todo.pop()
            if source in seen or not source.data:
                continue
            seen.add(source)
            if self.layers >> source.index & 1:
                found.append(source)
            elif passes(source):
                todo += source.sources
        return found

    def _joins(
        self, own: Operation, names: tuple[str, ...], passes: Callable[[Operation], bool] = lambda source: True
    ) -> bool:
        """Whether an operation is of results of several layers that were put side by side."""
        joins: list[Operation] = []

        def noting(source: Operation) -> bool:
            joins.append(source)
            return passes(source)

        self._layers_behind([own], noting)
        return any(len(self._layers_behind([join], passes)) > 1 for join in joins if join.name in names)

    # -- the head --------------------------------------------------------------------------------

    def head(self, trainable: Sequence[str]) -> set[str]:
        """Parameters of the last layers, and of the adjustments after and beside them."""
        layers = self.layers & self.of_outputs
        last = self._last_of(self.of_outputs)
        chosen, seen = last, self._before_any(layers)
        adjusted = self.of_outputs & ~seen
        for part in self._parts(self.last):
            before = self.before[part.index]
            own = self._last_of(before)
            direct = self._layers_behind([Operation("", -1, sources=[part])], lambda source: source.is_linear)
            if own and not own & ~(last | _union(1 << layer.index for layer in direct)):
                chosen |= own  # this part is made by them, whatever else they are for
                adjusted |= before & ~self._before_any(self.layers & before)
        if chosen & self.ambiguous:
            (first, *_) = self._of(chosen & self.ambiguous)
            raise self.unclear(
                f"{self._names(first)} may be a layer, or weigh what the layers before it give", trainable
            )
        for layer in self._of(layers & ~chosen):
            if (joined := self._added_to(layer, chosen)) is not None:
                raise self.unclear(
                    f"the result of {self._names(layer)} is used by {self._names(joined)} and added to its result as "
                    "well", trainable,
                )  # fmt: skip
        for layer in self._of(chosen):
            others = {source for own in self._of(chosen) if own is not layer for source in own.sources if source.data}
            for factor in self._layers_behind([layer], lambda source: source.is_linear):
                if not chosen >> factor.index & 1 and others.intersection(factor.sources):
                    raise self.unclear(
                        f"{self._names(factor)} and {self._names(layer)} are one product beside another last layer",
                        trainable,
                    )
        return set().union(*(own.parameters for own in self._of(chosen | adjusted) if own.data))

    def _names(self, own: Operation) -> list[str]:
        return [name for name in self.shapes if name in own.parameters]

    def _before_any(self, layers: int) -> int:
        return _union(self.before[own.index] for own in self._of(layers))

    def _last_of(self, bits: int) -> int:
        """Layers among operations that lie before no other of them."""
        layers = self.layers & bits
        return layers & ~_union(self.before[own.index] & ~(1 << own.index) for own in self._of(layers))

    def _parts(self, ends: Sequence[Operation]) -> Iterator[Operation]:
        """What the outputs are joined of, whatever is done to them afterwards; themselves if they are not."""
        for end in ends:
            own = end
            while own.name not in PLACEMENTS and not self.layers >> own.index & 1:
                sources = [source for source in own.sources if source.data]
                if len(sources) != 1:
                    break
                own = sources[0]
            if own.name in PLACEMENTS:
                yield from self._parts([source for source in own.sources if source.data])
            elif end.data:
                yield end

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
        listed = listed or [(name,) for name in reversed(trainable)]
        candidates = ", ".join(str(list(own)) for own in listed[:6])
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


def unreached(
    call: Callable[[dict[str, Tensor]], Tensor],
    parameters: dict[str, Tensor],
    covered: Mapping[str, Tensor | None],
) -> tuple[list[int], list[str], list[int]]:
    """Outputs that do not change with the parameters that are covered: their variance is zero.

    The product of the Jacobian with random directions tells it for all outputs at once, also at other parameters, since
    a unit that lets nothing through for the data at hand may do so for others.

    Args:
        call: Outputs ``[N, C]`` under parameters.
        parameters: All trainable ones, leaves that require gradients.
        covered: Which of them, with a mask where it is some of the entries.

    Returns:
        Numbers of outputs, the names of the parameters that do act on them, and numbers of those on which none does.
    """
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    silent: Tensor | None = None
    for trial in range(8):
        at = parameters
        if trial:
            sizes = {name: p.detach().square().mean().sqrt().clamp_min(0.1) for name, p in parameters.items()}
            at = {name: (sizes[name] * random(p)).requires_grad_() for name, p in parameters.items()}
        directions = [random(at[name]) * (1 if mask is None else mask.to(at[name])) for name, mask in covered.items()]
        still = ~_changes(call(at), [at[name] for name in covered], directions)
        silent = still if silent is None else silent & still
        if not bool(silent.any()):
            return [], [], []
    assert silent is not None
    outputs = call(parameters)
    constant = silent & ~_changes(outputs, list(parameters.values()), [random(p) for p in parameters.values()])
    others: list[str] = []
    if bool((silent & ~constant).any()):
        vector = silent * random(outputs)
        found = torch.autograd.grad(outputs, list(parameters.values()), vector, allow_unused=True)
        others = [name for name, g in zip(parameters, found, strict=True) if g is not None and bool(g.any())]
    return (silent & ~constant).nonzero()[:, 0].tolist(), others, constant.nonzero()[:, 0].tolist()


def _changes(outputs: Tensor, parameters: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """Which outputs change in a direction, for any of the data, ``[C]``."""
    if not outputs.requires_grad:
        return torch.zeros_like(outputs[0], dtype=torch.bool)

    def along(vector: Tensor, create_graph: bool) -> Tensor:
        found = torch.autograd.grad(
            outputs, parameters, vector, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
        products = [(g * d).sum() for g, d in zip(found, directions, strict=True) if g is not None]
        return torch.stack(products).sum() if products else outputs.new_zeros(())

    vector = torch.zeros_like(outputs, requires_grad=True)
    try:  # the gradient's inner product with the direction is linear in the vector, which gives J d
        product = along(vector, True)
        changes = torch.autograd.grad(product, vector)[0] if product.requires_grad else torch.zeros_like(outputs)
    except RuntimeError:  # an operation without a second derivative
        units = torch.eye(outputs.shape[1]).to(outputs)
        changes = torch.stack([along(unit.expand_as(outputs), False) for unit in units])[None]
    return ((changes != 0) & changes.isfinite()).any(0)


def _union(sets: Iterable[int]) -> int:
    every = 0
    for own in sets:
        every |= own
    return every
