"""Gradient factors (a, g) of every block, of one forward pass.

Back-propagation goes from the outputs to the outputs of the recorded calls, and no further, so that no
weight gradient is ever computed.

Blocks are what gets a curvature of its own. Every block has inputs ``a: [N, G, I, S]`` and vectors
``g: [N, G, V, O, S]``. A block of the gradient itself (normalisation layers, parameters that no layer rule covers) is
the same with one input, ``a = 1``.

This module is longer than others: what is read off one forward pass shares its calls, layouts and graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace._guards import global_random_state
from debiased_laplace.network.backward import MEASURED, Backward, Way
from debiased_laplace.network.blocks import Block
from debiased_laplace.network.formed import formed_gradients
from debiased_laplace.network.layers import Call, Layout
from debiased_laplace.network.lone import LoneGradients, gradients_of_block
from debiased_laplace.network.rows import RowLayout, find_rows
from debiased_laplace.network.selected import LayerInputs, concatenated, no_inputs
from debiased_laplace.network.uses import first_row

if TYPE_CHECKING:
    from debiased_laplace.network.network import Network

#: What a back-propagated number costs to be kept, in multiplications of a product of matrices.
KEPT = 64

#: Bytes of layer inputs at a time on the CPU: larger ones fall out of the cache between two uses.
CACHE_MEMORY = 2**23


@dataclass
class Factors:
    """Gradient factors of some data, for one forward pass.

    Attributes:
        network: Whose they are.
        outputs: ``f: [N, C]``, detached.
        model_inputs: What the model was given.
        graph_outputs: The outputs with their graph.
        calls: The recorded calls, in the order of the forward pass.
        n_run: Data that the model was given: two for one that it must not have alone (``Network.fewest``).
        counted: Which of the outputs have a target, ``[N, S * C]``; None for all. No other has a gradient.
        call_names: Parameters of every call, where they are not those that the blocks were found with.
        returned: What the model returned for them.
    """

    network: Network
    outputs: Tensor
    model_inputs: _data.Inputs
    graph_outputs: Tensor
    calls: list[Call]
    n_run: int
    returned: Tensor
    _lone: LoneGradients | None = None
    _has_gradient: dict[int, Tensor] | None = None  # of calls
    _is_padded: dict[int, bool] = field(default_factory=dict)  # likewise: whether some positions have none
    _rows: list[RowLayout] | None = None  # likewise
    call_names: Sequence[Sequence[str]] | None = None
    counted: Tensor | None = None
    _copied: Factors | None = None

    def calls_of(self, block: Block) -> tuple[int, ...]:
        """Positions of the calls of a block; none where these data need none, as those that go to other experts."""
        if self.call_names is None:
            return block.calls
        return tuple(i for i, names in enumerate(self.call_names) if not set(names).isdisjoint(block.parameters))

    def layout(self, index: int) -> Layout:
        """Where the data are in the tensors of a call."""
        if not self.network.by_rows and self.call_names is None:
            return self.network.layouts[index]
        if self._rows is None or len(self._rows) != len(self.calls):
            self._rows = find_rows(self.graph_outputs, self.calls, self.n_run)
        return self._rows[index]

    def inputs(self, block: Block, part: slice | None = None) -> LayerInputs:
        """Inputs of a block, a one appended for the bias, ``[N, G, I, S]``, at least in float32.

        With ``part``, those of some of the data, formed for them alone where the layer allows it.
        """
        n, dtype, calls = self.n_run, self.network.dtype, self.calls_of(block)
        part = part or slice(0, len(self.outputs))
        size = part.stop - part.start
        self._check_unchanged(block)
        if block.arrangement.stacked:
            return self.outputs.new_ones((size, 1, 1, 1), dtype=dtype)
        if not calls:
            return no_inputs(block.kind.rotates_inputs, (size, block.groups, block.inputs), self.outputs, dtype)
        parts: list[LayerInputs] = []
        for index in calls:
            call, layout = self.calls[index], self.layout(index)
            if not block.weight and not layout.is_regular:
                ones = self.outputs.new_ones(call.output_shape, dtype=dtype)
                parts.append(call.outputs(ones, n, layout)[part, :, :1])
            elif not block.weight:
                assert call.bias is not None
                positions = math.prod(call.output_shape) // (n * call.bias.numel())
                parts.append(self.outputs.new_ones((size, block.groups, 1, positions), dtype=dtype))
            elif (narrowed := call.narrow(part, n, layout)) is not None:
                parts.append(narrowed.inputs(size, layout, ones=block.bias).to(dtype))
            else:
                parts.append(call.inputs(n, layout, ones=block.bias)[part].to(dtype))
        return parts[0] if len(parts) == 1 else concatenated(parts)

    def _check_unchanged(self, block: Block) -> None:
        for index in self.calls_of(block):
            if self.calls[index].input._version != self.calls[index].version:
                raise RuntimeError(
                    f"The input of {block.name!r} was overwritten in place after the layer had used it, so its "
                    "curvature cannot be computed. Make the operation after it out of place."
                )

    def input_second_moment(
        self, block: Block, among: slice | None = None, weights: Tensor | None = None
    ) -> Tensor | None:
        """Sum of the outer products of :meth:`inputs` over data and positions, ``[G, I, I]``, if no inputs are needed.

        Args:
            block: The block.
            among: Of which data; None for all.
            weights: Of each of these, ``[N]``; None if all are one.
        """
        among = among or slice(0, len(self.outputs))
        size, total = among.stop - among.start, None
        for call, _ in self._narrowed(block, among):
            of_images = None if weights is None else weights.repeat_interleave(call.output_shape[0] // size)
            new = call.second_moment(self.network.dtype, ones=block.bias, weights=of_images)
            if new is None:
                return None
            total = new if total is None else total + new
        return total

    def input_means(self, block: Block, among: slice) -> Tensor | None:
        """Means of :meth:`inputs` of some data over positions, ``[N, G, I, 1]``, if no inputs are needed."""
        found, size = self._narrowed(block, among), among.stop - among.start
        sums = [call.input_sums(size, layout, self.network.dtype, ones=block.bias) for call, layout in found]
        known = [one for one in sums if one is not None]
        if not known or len(known) < len(sums):
            return None
        total, positions = (sum(each) for each in zip(*known, strict=True))
        return total / positions

    def _narrowed(self, block: Block, among: slice) -> list[tuple[Call, Layout]]:
        """The calls of a block for some of the data alone; none if one has no such call, or there is no weight."""
        if block.arrangement.stacked or not block.weight:
            return []
        self._check_unchanged(block)
        found = []
        for index in self.calls_of(block):
            layout = self.layout(index)
            call = self.calls[index].narrow(among, self.n_run, layout)
            if call is None:
                return []
            found.append((call, layout))
        return found

    def input_pieces(self, block: Block, among: slice | None = None) -> Iterator[tuple[slice, LayerInputs]]:
        """Inputs of a block for as many data at a time as a processor's cache holds, of all data or of some."""
        n, per_datum = len(self.outputs), 1
        among = among or slice(0, n)
        calls = [self.calls[index] for index in self.calls_of(block)]
        if calls and not block.arrangement.stacked:
            outputs = sum(math.prod(call.output_shape) for call in calls) // self.n_run
            memory = max(call.inputs_memory(block.inputs) for call in calls)
            per_datum = outputs // block.outputs * memory * (torch.finfo(self.network.dtype).bits // 8)
        size = n if self.network.device.type != "cpu" else max(1, CACHE_MEMORY // max(1, per_datum))
        for part in _data.slices(among.stop - among.start, size):
            part = slice(among.start + part.start, among.start + part.stop)
            yield part, self.inputs(block, part)

    def n_positions(self, block: Block) -> int:
        """Positions of a datum, on average over the data."""
        outputs = sum(math.prod(self.calls[index].output_shape) for index in self.calls_of(block))
        return outputs // (self.n_run * block.groups * block.outputs)

    @cached_property
    def has_sequences(self) -> bool:
        """Whether a layer has a dimension for positions, or several of them, of which some may be padding."""
        return any(
            len(self.calls_of(block)) > 1 or call.has_positions or call.output_shape[0] > self.n_run
            for block in self.network.blocks if self._may_be_padded(block)
            for call in [self.calls[index] for index in self.calls_of(block)]
        )  # fmt: skip

    def _may_be_padded(self, block: Block) -> bool:
        calls = self.calls_of(block)
        if block.arrangement.stacked or block.formed or not calls or self.network.feature_reduction is not None:
            return False
        return all(self.calls[index].is_sequence for index in calls)

    def has_gradient(self, block: Block) -> Tensor | None:
        """At which positions of a sequence the outputs of a datum have a gradient, ``[N, S]``; None if at all.

        At others there is padding, say, which a mask keeps from the outputs. Told by one backward pass for all blocks,
        of the same random vector for every datum: whatever the curvature of the loss is, and before
        :meth:`backpropagate`.
        """
        if not (self.has_sequences and self._may_be_padded(block)):
            return None
        if self._has_gradient is None:
            self._has_gradient = self._find_gradients()
            # Read together: each time would be a wait for the device.
            padded = torch.stack([~mask.all() for mask in self._has_gradient.values()]).tolist()
            self._is_padded = dict(zip(self._has_gradient, padded, strict=True))
        mask = torch.cat([self._has_gradient[index] for index in self.calls_of(block)], 1)
        return mask if any(self._is_padded[index] for index in self.calls_of(block)) else None

    def _find_gradients(self) -> dict[int, Tensor]:
        """For every call of a sequence, where its outputs have a gradient, ``[N, S]``."""
        blocks = [block for block in self.network.blocks if self._may_be_padded(block)]
        indices = sorted({index for block in blocks for index in self.calls_of(block)})
        vector = torch.randn(self.outputs.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        vectors = vector.to(self.graph_outputs).expand_as(self.graph_outputs)
        if self.counted is not None:
            vectors = vectors * self.counted.to(vectors)
        gradients = torch.autograd.grad(
            self.graph_outputs, [self.calls[index].edge for index in indices], vectors, retain_graph=True,
            allow_unused=True,
        )  # fmt: skip
        masks = {}
        for index, gradient in zip(indices, gradients, strict=True):
            call = self.calls[index]
            at_outputs = self.outputs.new_zeros(call.output_shape) if gradient is None else call.aligned(gradient)
            canonical = call.outputs(at_outputs, self.n_run, self.layout(index))
            masks[index] = canonical[: len(self.outputs)].ne(0).flatten(1, 2).any(1)
        return masks

    def backpropagate(
        self, vectors: Tensor, chunk: int | None = None, *, again: bool = False
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """Back-propagate output vectors to every block.

        Args:
            vectors: ``[V, N, C]``.
            chunk: Vectors at a time; above one they go through autograd's batched backward pass. None for the way that
                is the fastest (:mod:`~debiased_laplace.network.backward`).
            again: Whether others will be back-propagated afterwards.

        Yields:
            The slice of vectors, and ``g: [N, G, v, O, S]`` for every block of the network.
        """
        if self.network.is_head or self.network.feature_reduction is not None:
            for part in _data.slices(len(vectors), max(chunk or 1, 16)):
                at_outputs = vectors[part].to(self.network.dtype).transpose(0, 1)
                yield part, [at_outputs[:, None, :, :, None].clone() for _ in self.network.blocks]
            return
        if self.calls:
            self.layout(0)  # as long as there is a graph
        choice = self.network.backward if chunk is None else Backward(Way(chunk))
        yield from choice(self, vectors, again=again)

    def back(self, vectors: Tensor, way: Way, *, keep: bool) -> list[Tensor]:
        """As many vectors ``[v, N, C]`` as a way takes at a time, or fewer, back-propagated to every block.

        Args:
            vectors: The vectors.
            way: How.
            keep: Whether others will be back-propagated afterwards.

        Returns:
            ``g: [N, G, v, O, S]`` for every block.
        """
        if way.copies:
            return self._back_of_copies(vectors, way.vectors, keep)
        # Blocks of lone parameters get their gradients another way, and need no call.
        edges = [call.edge for call in self.calls]
        vector = vectors.to(self.graph_outputs)
        gradients: list[tuple[Tensor, ...] | None] = []
        if edges and way.vectors == 1:
            at_edges = torch.autograd.grad(self.graph_outputs, edges, vector[0], retain_graph=keep, allow_unused=True)
            gradients = [None if g is None else (g,) for g in at_edges]
        elif edges:
            at_edges = torch.autograd.grad(
                self.graph_outputs, edges, vector, retain_graph=keep, allow_unused=True, is_grads_batched=True
            )
            gradients = [None if g is None else g.unbind() for g in at_edges]
        of_lone = self._gradients_of_lone(vector)
        with torch.no_grad():
            return [self._vectors_of(block, gradients, vector, of_lone) for block in self.network.blocks]

    def _back_of_copies(self, vectors: Tensor, number: int, keep: bool) -> list[Tensor]:
        missing = number - len(vectors)
        if missing:
            vectors = torch.cat([vectors, vectors.new_zeros(missing, *vectors.shape[1:])])
        of_copies = self.copied(number).back(vectors.flatten(0, 1)[None], Way(), keep=keep)
        return [
            g.unflatten(0, (number, -1))[: number - missing, :, :, 0].permute(1, 2, 0, 3, 4).contiguous()
            for g in of_copies
        ]

    def copied(self, number: int) -> Factors:
        """Those of so many copies of the data, one after the other, by a forward pass of their own."""
        if self._copied is None or len(self._copied.outputs) != number * len(self.outputs):
            self._copied = None
            index = torch.arange(len(self.outputs)).repeat(number)
            with global_random_state():
                self._copied = self.network.factors(_data.take(self.model_inputs, index))
            if self._copied.calls:
                self._copied.layout(0)
        return self._copied

    def forget_copies(self) -> None:
        """Free the forward pass over copies of the data."""
        self._copied = None

    def backpropagate_all(self, vectors: Tensor, *, again: bool = False) -> list[Tensor]:
        """Back-propagated vectors of every block, all of them together, ``[N, G, V, O, S]``.

        Where the outputs are those of the only call (``Network.is_head``) and all data have the same
        vectors, they are ``[1, G, V, O, 1]``.
        """
        if self.network.is_head and vectors.stride(1) == 0:
            return [vectors[:, 0].to(self.network.dtype)[None, None, :, :, None]]
        return _joined(self.backpropagate(vectors, again=again), len(vectors))

    def gradients(self, vectors: Tensor) -> tuple[Callable[[Block], LayerInputs], list[Tensor]]:
        r"""Inputs and vectors of every block, with as many positions as inputs if there are many more of them.

        Their products, :math:`\sum_s g_s a_s^\top = \sum_i J_i e_i^\top`, are those of :meth:`inputs` and
        :meth:`backpropagate_all`: where the vectors are many, the gradient of a layer with many more positions than
        inputs takes the place of the vectors, and the identity that of the inputs. Vectors at all positions exist for
        some of them at a time.

        Args:
            vectors: ``[V, N, C]``.

        Returns:
            ``a: [N, G, I, S']`` of a block, and ``g: [N, G, V, O, S']`` of every block.
        """
        if len(vectors) < MEASURED or self.network.is_head or self.network.feature_reduction is not None:
            return self.inputs, self.backpropagate_all(vectors)
        inputs: dict[tuple[str, ...], Tensor] = {}

        def summed(block: Block, g: Tensor, first: bool) -> Tensor:
            if first and _pays_forming(block, g.shape[-1]) and isinstance(a := self.inputs(block), Tensor):
                inputs[block.parameters] = a
            if block.parameters not in inputs:
                return g
            return (g.flatten(2, 3) @ inputs[block.parameters].mT).unflatten(2, g.shape[2:4])

        blocks = self.network.blocks
        chunks = (
            (part, [summed(block, g, part.start == 0) for block, g in zip(blocks, of_blocks, strict=True)])
            for part, of_blocks in self.backpropagate(vectors)
        )
        joined = _joined(chunks, len(vectors))
        units = {names: torch.eye(a.shape[2]).to(a).expand(*a.shape[:2], -1, -1) for names, a in inputs.items()}
        inputs.clear()
        return lambda block: units[block.parameters] if block.parameters in units else self.inputs(block), joined

    def _vectors_of(
        self, block: Block, gradients: list[tuple[Tensor, ...] | None], vector: Tensor, of_lone: dict[str, Tensor]
    ) -> Tensor:
        n, dtype = self.n_run, self.network.dtype
        if not block.calls:
            if not block.is_lone:
                return vector.new_zeros((vector.shape[1], 1, len(vector), block.size, 1), dtype=dtype)
            return gradients_of_block(block, of_lone)
        if block.formed:
            (name,) = block.parameters
            calls = [
                (
                    self.calls[i],
                    self.layout(i),
                    None if (g := gradients[i]) is None else [v.to(dtype) for v in g],
                )
                for i in self.calls_of(block)
            ]
            formed = formed_gradients(self.network.leaves[name], calls, n, len(vector), dtype, self.network.one_by_one)
            return gradients_of_block(block, {name: formed[: len(self.outputs)]})
        parts = []
        if not self.calls_of(block):
            return vector.new_zeros((vector.shape[1], block.groups, len(vector), block.outputs, 1), dtype=dtype)
        for index in self.calls_of(block):
            call, layout, each = self.calls[index], self.layout(index), gradients[index]
            if each is None:  # a layer without influence on the outputs
                zeros = vector.new_zeros((len(vector), *call.output_shape), dtype=dtype).unbind()
                canonical = [call.outputs(g, n, layout) for g in zeros]
            else:
                canonical = [call.outputs(call.aligned(g).to(dtype), n, layout) for g in each]
            canonical = [self._of_all_rows(block, call, g[: len(self.outputs)]) for g in canonical]
            parts.append(canonical[0][:, :, None] if len(canonical) == 1 else torch.stack(canonical, 2))
        if len(parts) == 1:
            return parts[0]
        return torch.stack(parts).sum(0) if block.arrangement.stacked else torch.cat(parts, -1)

    def _of_all_rows(self, block: Block, call: Call, vectors: Tensor) -> Tensor:
        """Vectors ``[N, 1, O', S]`` of a call that uses some rows of a weight as those of all of its rows."""
        missing = block.outputs - vectors.shape[2]
        if not missing:
            return vectors
        argument = call.weight if block.weight else call.bias
        assert argument is not None and argument._base is not None
        start = first_row(argument, argument._base) or 0
        return torch.nn.functional.pad(vectors, (0, 0, start, missing - start))

    def _gradients_of_lone(self, vectors: Tensor) -> dict[str, Tensor]:
        """Of vectors ``[v, N, C]`` in all lone parameters, ``[N, v, *shape]``."""
        if not self.network.lone_blocks:
            return {}
        if self._lone is None:
            self._lone = LoneGradients(self.network, self.model_inputs)
        gradients = self._lone.backpropagate(vectors)
        return {name: gradient.to(self.network.dtype) for name, gradient in gradients.items()}


def _pays_forming(block: Block, n_positions: int) -> bool:
    """Whether gradients are cheaper to keep, and to rotate, than vectors at all positions.

    Products with the identity in the place of the inputs come on top.
    """
    return (n_positions - block.inputs) * (KEPT + block.outputs) > block.inputs**2


def _joined(chunks: Iterable[tuple[slice, list[Tensor]]], n_vectors: int) -> list[Tensor]:
    """Vectors of every block in chunks as one, ``[N, G, V, O, S]``; chunks are not held until all are there."""
    joined: list[Tensor] = []
    for part, of_blocks in chunks:
        if part == slice(0, n_vectors):
            return of_blocks
        joined = joined or [g.new_empty(*g.shape[:2], n_vectors, *g.shape[3:]) for g in of_blocks]
        for whole, g in zip(joined, of_blocks, strict=True):
            whole[:, :, part] = g
    return joined
