r"""Model and data become gradient factors (a, g) per block.

Back-propagation goes from the outputs to the outputs of the recorded calls, and no further, so that no
weight gradient is ever computed.

Blocks are what gets a curvature of its own. Every block is Kronecker: inputs ``a: [N, G, I, S]``,
vectors ``g: [N, G, V, O, S]``. A block kept exactly (normalisation layers, lone parameters) is the
same with one input, ``a = 1``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debiased_laplace import _checks, _data
from debiased_laplace._guards import gradients_enabled
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network import heads
from debiased_laplace.network.blocks import Block, flatten, group_parameters, unflatten
from debiased_laplace.network.layers import Call, Layout, LinearCall
from debiased_laplace.network.operations import Trace
from debiased_laplace.network.snapshot import Replicas, Snapshot, aliases_of
from debiased_laplace.network.tracing import Recorder, find_layouts
from debiased_laplace.sampling.sample import WeightedData

#: Bytes that activations and back-propagated vectors may take at a time.
CHUNK_MEMORY = 2**28

#: Bytes of layer inputs at a time on the CPU: larger ones fall out of the cache between two uses.
CACHE_MEMORY = 2**23


#: How features ``[N, ..., I]`` of a last layer become ``[N, I]``: those at the first position, at the last, their mean.
FEATURE_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pick_first": lambda features: features[:, 0],
    "pick_last": lambda features: features[:, -1],
    "average": lambda features: features.mean(1),
}

#: What the vectors of a datum are made of.
CURVATURES = ("ggn", "empirical_fisher")


@dataclass
class Factors:
    """Gradient factors of some data, for one forward pass.

    Attributes:
        outputs: ``f: [N, C]``, detached.
    """

    network: Network
    outputs: Tensor
    model_inputs: _data.Inputs
    _graph_outputs: Tensor
    _calls: list[Call]
    _n_run: int  # data that the model was given: two for one that it must not have alone (:attr:`Network.fewest`)
    _lone: list[Tensor] | None = None

    def inputs(self, block: Block, part: slice | None = None, phase: int | None = None) -> Tensor:
        """Inputs of a block, a one appended for the bias, ``[N, G, I, S]``, at least in float32.

        With ``part``, those of some of the data, formed for them alone where the layer allows it; with ``phase``, on a
        coarser grid of positions (:meth:`~debiased_laplace.network.layers.Call.inputs`).
        """
        n, dtype = self._n_run, self.network.dtype
        part = part or slice(0, len(self.outputs))
        size = part.stop - part.start
        for index in block.calls:
            if self._calls[index].input._version != self._calls[index].version:
                raise RuntimeError(
                    f"The input of {block.name!r} was overwritten in place after the layer had used it, so its "
                    "curvature cannot be computed. Make the operation after it out of place."
                )
        if block.kind == "exact":
            return self.outputs.new_ones((size, 1, 1, 1), dtype=dtype)
        parts = []
        for index in block.calls:
            call, layout = self._calls[index], self.network.layouts[index]
            if not block.weight:
                positions = math.prod(call.output_shape) // (n * block.groups * block.outputs)
                parts.append(self.outputs.new_ones((size, block.groups, 1, positions), dtype=dtype))
            elif (narrowed := call.narrow(part, n, layout)) is not None:
                parts.append(narrowed.inputs(size, layout, ones=block.bias, phase=phase).to(dtype))
            else:
                parts.append(call.inputs(n, layout, ones=block.bias, phase=phase)[part].to(dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def input_pieces(
        self, block: Block, among: slice | None = None, phase: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Inputs of a block for as many data at a time as a processor's cache holds, of all data or of some."""
        n, per_datum = len(self.outputs), 1
        among = among or slice(0, n)
        if block.kind == "kronecker":
            outputs = sum(math.prod(self._calls[index].output_shape) for index in block.calls) // self._n_run
            per_datum = outputs // block.outputs * block.inputs * (torch.finfo(self.network.dtype).bits // 8)
        size = n if self.network.device.type != "cpu" else max(1, CACHE_MEMORY // max(1, per_datum))
        for part in _data.slices(among.stop - among.start, size):
            part = slice(among.start + part.start, among.start + part.stop)
            yield part, self.inputs(block, part, phase)

    def backpropagate(self, vectors: Tensor, chunk: int = 1) -> Iterator[tuple[slice, list[Tensor]]]:
        """Back-propagate output vectors to every block.

        Args:
            vectors: ``[V, N, C]``.
            chunk: Vectors at a time; above one they go through autograd's batched backward pass.

        Yields:
            The slice of vectors, and ``g: [N, G, v, O, S]`` for every block of the network.
        """
        if self.network.is_head or self.network.feature_reduction is not None:
            for part in _data.slices(len(vectors), max(chunk, 16)):
                own = vectors[part].to(self.network.dtype).transpose(0, 1)
                yield part, [own[:, None, :, :, None].clone() for _ in self.network.blocks]
            return
        # Blocks of lone parameters get their gradients another way, and need no call.
        edges = [call.edge for call in self._calls]
        for part in _data.slices(len(vectors), chunk):
            vector = vectors[part].to(self._graph_outputs)
            keep = part.stop < len(vectors)
            if not edges:
                gradients: list[tuple[Tensor, ...] | None] = []
            elif chunk == 1:
                found = torch.autograd.grad(self._graph_outputs, edges, vector[0], retain_graph=keep, allow_unused=True)
                gradients = [None if g is None else (g,) for g in found]
            else:
                found = torch.autograd.grad(
                    self._graph_outputs, edges, vector, retain_graph=keep, allow_unused=True, is_grads_batched=True
                )
                gradients = [None if g is None else g.unbind() for g in found]
            with torch.no_grad():
                factors = [self._vectors_of(block, gradients, vector) for block in self.network.blocks]
            gradients = []
            found = ()
            yield part, factors
            factors = []  # the memory is used again for the next vectors

    def backpropagate_all(self, vectors: Tensor) -> list[Tensor]:
        """Back-propagated vectors of every block, all of them together, ``[N, G, V, O, S]``.

        Where the outputs are those of the only call (:attr:`Network.is_head`) and all data have the same
        vectors, they are ``[1, G, V, O, 1]``.
        """
        if self.network.is_head and vectors.stride(1) == 0:
            return [vectors[:, 0].to(self.network.dtype)[None, None, :, :, None]]
        gathered: list[list[Tensor]] = [[] for _ in self.network.blocks]
        for _, found in self.backpropagate(vectors, self.network.vector_chunk):
            for own, g in zip(gathered, found, strict=True):
                own.append(g)
        joined = []
        for own in gathered:
            joined.append(own[0] if len(own) == 1 else torch.cat(own, 2))
            own.clear()
        return joined

    def _vectors_of(self, block: Block, gradients: list[tuple[Tensor, ...] | None], vector: Tensor) -> Tensor:
        n, dtype = self._n_run, self.network.dtype
        if not block.calls:
            jacobian = self._lone_jacobian(block)  # [N, C, P]
            return torch.einsum("vnc,ncp->nvp", vector.to(dtype), jacobian)[:, None, :, :, None]
        parts = []
        for index in block.calls:
            call, layout, each = self._calls[index], self.network.layouts[index], gradients[index]
            if each is None:  # a layer without influence on the outputs
                each = vector.new_zeros((len(vector), *call.output_shape)).unbind()
            own = [call.outputs(g.to(dtype), n, layout)[: len(self.outputs)] for g in each]
            parts.append(own[0][:, :, None] if len(own) == 1 else torch.stack(own, 2))
        if len(parts) == 1:
            return parts[0]
        return torch.stack(parts).sum(0) if block.kind == "exact" else torch.cat(parts, -1)

    def _lone_jacobian(self, block: Block) -> Tensor:
        if self._lone is None:
            self._lone = self.network.lone_jacobians(self.model_inputs)
        return self._lone[self.network.lone_blocks.index(block)]


class Network:
    """A model as it was, together with its blocks; it never writes to the model, and runs copies of its modules.

    Attributes:
        snapshot: The model as it was when the network was made: what everything here is about.
        model: The user's model, whatever became of it since.
        blocks: Its curvature blocks, in the order of the parameters.
        layouts: For every recorded call, where the data are.
        n_outputs: C.
        shapes: Shapes of the trainable parameters by name, in the order of ``model.named_parameters()``.
    """

    def __init__(self, model: nn.Module | Snapshot, parameters: Iterable[str] | None = None) -> None:
        self.snapshot = Snapshot.of(model)
        self.model = self.snapshot.origin
        chosen = set(self.snapshot.trainable if parameters is None else parameters)
        trainable = {name: p for name, p in self.snapshot.parameters.items() if name in chosen}
        if not trainable:
            raise ValueError(
                "Expected a model with trainable parameters, got none with requires_grad=True. "
                "Set requires_grad_(True) on the parameters that the posterior is about."
            )
        self.shapes = {name: p.shape for name, p in trainable.items()}
        self._run_with(trainable)
        first = next(iter(trainable.values()))
        self.device = first.device
        self.dtype = first.dtype if first.dtype in (torch.float32, torch.float64) else torch.float32
        #: Relative rounding error of what the model computes: that of the coarsest dtype of its parameters.
        self.precision = max(torch.finfo(p.dtype).eps for p in trainable.values())
        #: The same for inner products of gradients: their sums have the precision of :attr:`dtype`, and the rounding of
        #: the gradients themselves, being of both factors, enters squared.
        self.gram_precision = max(torch.finfo(self.dtype).eps, self.precision**2)
        #: Vectors to back-propagate at a time: one by one is faster on the CPU, batched on an accelerator.
        self.vector_chunk = 1 if self.device.type == "cpu" else 16
        self.n_params = sum(p.numel() for p in trainable.values())
        self.blocks: list[Block] = []
        self.layouts: list[Layout] = []
        self.n_outputs = 0
        #: Data that the model is given at least: two if it treats one alone otherwise (a bare ``squeeze()``), then the
        #: one twice.
        self.fewest = 1
        #: Which entries of the parameter vector are uncertain, ``[D]``; None for all.
        self.free: Tensor | None = None
        #: Whether the only block is a linear layer whose outputs are the model's: then nothing is back-propagated.
        self.is_head = False
        #: Whether Jacobians of lone parameters are by ordinary backward passes, since those of torch.func are wrong.
        self.one_by_one = False
        self._activations = self._largest_inputs = self._largest_formed = 1
        self._datum_size = 0
        #: How the features of the last layer become those of the outputs (:meth:`reduced`); None as the model does it.
        self.feature_reduction: str | None = None
        #: By how much outputs differed from the last layer of reduced features, relative to the largest output.
        self.reduction_error = 0.0

    def _run_with(self, trainable: dict[str, Tensor]) -> None:
        """Let copies of the model run with own leaves of the autograd graph for the trainable parameters."""
        with torch.inference_mode(False):
            self._leaves = {name: nn.Parameter(p.detach()) for name, p in trainable.items()}
        self._identities = {id(p): name for name, p in self._leaves.items()}
        self._replicas = Replicas(self.snapshot, self._leaves)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_leaves", "_identities", "_replicas")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._run_with({name: self.snapshot.parameters[name] for name in self.shapes})

    @classmethod
    def discover(
        cls,
        model: nn.Module | Snapshot,
        inputs: _data.Inputs,
        *,
        parameters: str | Sequence[str] | None = None,
        indices: Tensor | None = None,
        separate_bias: bool = False,
        feature_reduction: str | None = None,
    ) -> Network:
        """Find the blocks of a model by one forward and one backward pass over a few data.

        Args:
            model: Any module whose output is ``[N, C]`` (or ``[N]``), each row depending on one datum, as it is or was.
            inputs: Some data; three of them are used, of the longest if they differ.
            parameters: Which trainable parameters the posterior is about: all, ``"last_layer"``, or names and patterns
                (:mod:`fnmatch`). The others are constants, as if they were frozen.
            indices: Instead, single entries of the vector of all trainable parameters, ``[n]``.
            separate_bias: Give weights and biases blocks of their own, as laplace-torch does.
            feature_reduction: Of a last layer, :meth:`reduced`.

        Raises:
            ValueError: If no parameter is trainable, or outputs mix data, or have another shape.
            UnsupportedLayerError: If nothing covers a trainable parameter.
        """
        model = Snapshot.of(model)
        if len(model.scripted) == len(model.parameters):
            _refuse_scripted(model.parameters, model)
        found = parameters == "last_layer"
        if found:
            whole = cls(model)
            sample = _data.at_least(_data.to_device(_data.some(inputs, 2), whole.device), 2)
            parameters = whole._last_layer(sample)
        elif parameters is not None:
            parameters = match_parameters(model, parameters)
        if indices is not None:
            if parameters is not None:
                raise ValueError("Expected either parameters or indices, got both.")
            free = entries_of(model, indices)
            parameters = [name for name, own in free.items() if bool(own.any())]
        network = cls(model, parameters)
        try:
            network._discover(inputs, separate_bias)
        except _checks.UnsupportedLayerError as error:
            if not found:
                raise
            raise _checks.UnsupportedLayerError(
                f"The model's last layer consists of {parameters}, of which not all are covered. {error} Or write it "
                "as an nn.Linear or a convolution without a parametrization (torch.nn.utils.parametrize."
                "remove_parametrizations), or name other parameters."
            ) from error
        if indices is not None:
            mask = torch.cat([free[name].flatten() for name in network.shapes])
            network.free = None if bool(mask.all()) else mask.to(network.device)
        return network if feature_reduction is None else network.reduced(feature_reduction, inputs)

    def reduced(self, feature_reduction: str, inputs: _data.Inputs | None = None) -> Network:
        """The same network with outputs that are taken for the last layer of reduced features.

        Gradients of the outputs are then those of ``weight @ reduce(features) + bias``, whatever the model does with
        the last layer's inputs ``[N, ..., I]``; inputs ``[N, I]`` are no matter of choice. They are the model's own if
        it reduces in the same way; :attr:`reduction_error` tells.

        Args:
            feature_reduction: One of :data:`FEATURE_REDUCTIONS`, with laplace-torch's meanings.
            inputs: Some data, to try it.

        Raises:
            ValueError: If there is no such way, or the network is no single linear layer that it could be of.
        """
        if feature_reduction not in FEATURE_REDUCTIONS:
            raise ValueError(
                f"Expected feature_reduction out of {list(FEATURE_REDUCTIONS)}, got {feature_reduction!r}."
            )
        network = copy.copy(self)
        network.feature_reduction, network.reduction_error = feature_reduction, 0.0
        network.blocks = [replace(block, calls=(0,)) for block in self.blocks]
        network.layouts, network.is_head = [Layout()], len(self.blocks) == 1
        if inputs is not None:
            network.factors(_data.some(inputs, 3))
        return network

    @classmethod
    def restore(cls, model: nn.Module | Snapshot, description: dict[str, Any]) -> Network:
        """The network of a :meth:`description`, without data; whether its parameters are frozen by now does not matter.

        Raises:
            ValueError: If the model has other parameters; it names those that differ.
        """
        other = {name: tuple(shape) for name, shape in description["shapes"].items()}
        model = Snapshot.of(model)
        own = {name: tuple(p.shape) for name, p in model.parameters.items() if name in other}
        if own != other:
            differ = sorted(set(own.items()) ^ set(other.items()))
            raise ValueError(f"Expected a model with the same trainable parameters; these differ: {differ}.")
        network = cls(model, other)
        network.blocks = [
            Block(**{**block, "shapes": tuple(torch.Size(shape) for shape in block["shapes"])})
            for block in description["blocks"]
        ]
        network.layouts = [Layout(dim) for dim in description["layouts"]]
        network.n_outputs, network._activations, network._largest_inputs, network._largest_formed = description["sizes"]
        network.is_head, network._datum_size = description["is_head"], description.get("datum_size", 0)
        network.one_by_one = description.get("one_by_one", False)
        network.free, network.feature_reduction = description["free"], description.get("feature_reduction")
        network.fewest = description.get("fewest", 1)
        return network

    def description(self) -> dict[str, Any]:
        """What :meth:`discover` found, as plain Python objects."""
        return {
            "shapes": {name: tuple(shape) for name, shape in self.shapes.items()},
            "blocks": [
                {**vars(block), "shapes": tuple(tuple(shape) for shape in block.shapes)} for block in self.blocks
            ],
            "layouts": [layout.batch_dimension for layout in self.layouts],
            "sizes": (self.n_outputs, self._activations, self._largest_inputs, self._largest_formed),
            "is_head": self.is_head,
            "datum_size": self._datum_size,
            "one_by_one": self.one_by_one,
            "fewest": self.fewest,
            "free": self.free,
            "feature_reduction": self.feature_reduction,
        }

    def free_entries(self, block: Block) -> Tensor | None:
        """Which entries ``[G, O, I]`` of a block are uncertain; None for all."""
        if self.free is None:
            return None
        own = block.gather(unflatten(self.free, self.shapes))
        return None if bool(own.all()) else own

    @property
    def lone_blocks(self) -> list[Block]:
        """Blocks of parameters that no layer rule covers; their gradients come from ``torch.func``."""
        return [block for block in self.blocks if not block.calls]

    def same_blocks(self, other: Network) -> bool:
        """Whether backward passes of the one are those of the other: the same model, seen in the same blocks."""
        return (
            self.shapes == other.shapes
            and self.blocks == other.blocks
            and self.layouts == other.layouts
            and self.snapshot.alike(other.snapshot)
        )

    # -- passes over data ----------------------------------------------------------------------

    def factors(self, inputs: _data.Inputs) -> Factors:
        """One forward pass that records what :meth:`Factors.backpropagate` needs."""
        factors, _ = self._forward(_data.to_device(inputs, self.device))
        if len(factors._calls) != len(self.layouts):
            raise RuntimeError(
                f"The model called {len(factors._calls)} layers with trainable parameters, but {len(self.layouts)} "
                "when its blocks were found. Its forward pass must not depend on the data; if you changed the model, "
                "fit again."
            )
        return factors

    def outputs(self, inputs: _data.Inputs) -> Tensor:
        """Outputs ``[N, C]`` in evaluation mode, without a graph."""
        with torch.no_grad(), self._replicas.one() as model:
            return self.rows(model, _data.to_device(inputs, self.device))

    def call(self, parameters: dict[str, Tensor], inputs: _data.Inputs, **keywords: Any) -> Tensor:
        """Outputs ``[N, C]`` under other parameters (of all names in :attr:`shapes`, and of others if need be)."""
        with self._replicas.one() as model:
            return self.rows(lambda own: torch.func.functional_call(model, parameters, (own,), keywords), inputs)

    def rows(self, model: Callable[[_data.Inputs], Any], inputs: _data.Inputs) -> Tensor:
        """Outputs ``[N, C]`` of the model, called in some way, for N data; it is not called for none."""
        n = _data.count(inputs)
        if not n and self.n_outputs:
            return torch.zeros(0, self.n_outputs, dtype=self.dtype, device=self.device)
        given = _data.at_least(inputs, self.fewest)
        with _data.own_forward_pass(given, self.dtype):
            outputs = model(_data.copy(given))
        return _data.rows(outputs, _data.count(given), self.n_outputs or None)[:n]

    def try_one(self, datum: _data.Inputs) -> None:
        """Set :attr:`fewest` by the outputs of one datum alone, without a look at the layers."""
        twice = self.outputs(_data.at_least(datum, 2))
        try:
            same = _close(self.outputs(datum), twice[:1], twice)
        except Exception:  # whatever a model fails with where it loses the batch dimension
            same = False
        self.fewest = 1 if same else 2

    def mean(self) -> Tensor:
        """The trainable parameters as one vector ``[D]`` (a copy)."""
        return self.to_vector({name: p.detach() for name, p in self._leaves.items()})

    def to_vector(self, parameters: dict[str, Tensor]) -> Tensor:
        """Named tensors ``[..., *shape]`` as vectors ``[..., D]``."""
        return flatten(parameters, self.shapes).to(self.dtype)

    def from_vector(self, vector: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`to_vector`, in the dtypes of the model."""
        return {name: part.to(self._leaves[name].dtype) for name, part in unflatten(vector, self.shapes).items()}

    def lone_jacobians(self, inputs: _data.Inputs) -> list[Tensor]:
        """Jacobians of the outputs in the lone parameters, datum by datum: ``[N, C, P]`` for each block."""
        constants = {name: p.detach() for name, p in self._leaves.items()}
        lone = {name: constants[name] for block in self.lone_blocks for name in block.parameters}
        if self.one_by_one:
            return self._lone_one_by_one(constants, lone, inputs)

        def outputs_of(lone: dict[str, Tensor], batch: _data.Inputs) -> Tensor:
            return self.call(constants | lone, batch)[0]

        # An inference tensor, or inference mode, would silently change what jacrev gives in some releases of torch.
        with gradients_enabled():
            mapped = _data.columns(_data.copy(inputs))
            try:
                if mapped is None:  # something that cannot be mapped over: one datum after the other
                    each = (_data.take(inputs, slice(i, i + 1)) for i in range(_data.count(inputs)))
                    found = [torch.func.jacrev(outputs_of)(lone, datum) for datum in each]
                    jacobians = {name: torch.stack([own[name] for own in found]) for name in lone}
                else:
                    tensors, rebuilt = mapped

                    def outputs_of_one(lone: dict[str, Tensor], *datum: Tensor) -> Tensor:
                        return outputs_of(lone, rebuilt([leaf[None] for leaf in datum]))

                    dims = (None, *[0] * len(tensors))
                    jacobians = torch.func.vmap(torch.func.jacrev(outputs_of_one), in_dims=dims)(lone, *tensors)
            except (RuntimeError, ValueError):  # an operation that torch.func does not know
                return self._lone_one_by_one(constants, lone, inputs)
        return self._of_lone_blocks(jacobians)

    def _of_lone_blocks(self, jacobians: dict[str, Tensor]) -> list[Tensor]:
        return [
            torch.cat([jacobians[name].reshape(*jacobians[name].shape[:2], -1) for name in block.parameters], -1).to(
                self.dtype
            )
            for block in self.lone_blocks
        ]

    def _lone_one_by_one(
        self, constants: dict[str, Tensor], lone: dict[str, Tensor], inputs: _data.Inputs
    ) -> list[Tensor]:
        """The same by ordinary backward passes, of one output of one datum at a time."""
        found: dict[str, list[Tensor]] = {name: [] for name in lone}
        with gradients_enabled():
            for index in range(_data.count(inputs)):
                leaves = {name: p.detach().requires_grad_() for name, p in lone.items()}
                outputs = self.call(constants | leaves, _data.take(inputs, slice(index, index + 1)))[0]
                rows = [
                    torch.autograd.grad(own, list(leaves.values()), retain_graph=True, materialize_grads=True)
                    if own.requires_grad else [torch.zeros_like(p) for p in leaves.values()]
                    for own in outputs
                ]  # fmt: skip
                for name, of_outputs in zip(leaves, zip(*rows, strict=True), strict=True):
                    found[name].append(torch.stack(of_outputs))
        return self._of_lone_blocks({name: torch.stack(own) for name, own in found.items()})

    def chunk_size(
        self, memory: int, vectors: int = 1, *, formed: bool = False, inputs: _data.Inputs | None = None
    ) -> int:
        """Data at a time such that activations, inputs and back-propagated vectors stay within ``memory`` bytes.

        With ``formed``, also the gradients of one block with several positions, in float64 beside their own precision.
        ``inputs`` that are longer than those that the network was found with need so many times more.
        """
        per_datum = (self._activations * (3 + vectors) + self._largest_inputs * 2) * torch.finfo(self.dtype).bits // 8
        if formed:
            per_datum += self._largest_formed * vectors * 16
        if inputs is not None and self._datum_size:
            per_datum = per_datum * max(self._datum_size, _data.size_of_datum(inputs)) // self._datum_size
        return max(1, memory // max(1, per_datum))

    def _forward(self, inputs: _data.Inputs) -> tuple[Factors, Recorder]:
        with gradients_enabled():
            recorder = Recorder(self._identities)
            n, given = _data.count(inputs), _data.at_least(inputs, self.fewest)
            with self._replicas.one() as model, recorder, _data.own_forward_pass(given, self.dtype):
                outputs = model(_data.copy(given))
            n_run = _data.count(given)
            outputs = _data.rows(outputs, n_run, self.n_outputs or None)
            own = outputs if n == n_run else outputs[:n]
        if self.feature_reduction is not None:
            recorder.calls = [self._of_reduced_features(recorder.calls, outputs.detach())]
        return Factors(self, own.detach(), inputs, own, recorder.calls, n_run), recorder

    def _of_reduced_features(self, calls: list[Call], outputs: Tensor) -> Call:
        """The last call, as if its input had been reduced before."""
        last = calls[-1] if calls else None
        of_last = {self._identities.get(id(p)) for p in (() if last is None else (last.weight, last.bias))}
        if last is None or self.shapes.keys() - of_last:
            raise ValueError(
                f"Expected a single linear last layer for feature_reduction={self.feature_reduction!r}, got "
                f"{list(self.shapes)}. Leave feature_reduction out, or name the linear layer."
            )
        shapes = [shape for name, shape in self.shapes.items() if self._identities[id(last.weight)] == name]
        if not isinstance(last, LinearCall) or len(last.input) != len(outputs) or shapes[0][0] != outputs.shape[1]:
            raise ValueError(
                f"Expected a linear last layer with inputs [{len(outputs)}, ..., I] and {outputs.shape[1]} outputs for "
                f"feature_reduction={self.feature_reduction!r}, got a {type(last).__name__} with an input of shape "
                f"{tuple(last.input.shape)} and a weight of shape {tuple(shapes[0])}. Leave feature_reduction out: the "
                "last layer is seen where the model calls it."
            )
        assert last.weight is not None
        features = self.reduce(last.input, outputs, last.weight, last.bias)
        return replace(last, input=features, output_shape=outputs.shape, version=features._version)

    def reduce(self, features: Tensor, outputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Features ``[N, ..., I]`` of a last layer as ``[N, I]``; notes how far outputs are from what they give."""
        if features.ndim > 2:
            features = FEATURE_REDUCTIONS[self.feature_reduction or ""](features.flatten(1, -2))
        with torch.no_grad():
            difference = F.linear(features, weight, bias) - outputs
        if len(outputs) and bool(difference.any()):
            relative = float(difference.abs().max()) / float(outputs.detach().abs().max())
            self.reduction_error = max(self.reduction_error, relative)
        return features

    # -- discovery -----------------------------------------------------------------------------

    def _discover(self, inputs: _data.Inputs, separate_bias: bool) -> None:
        _refuse_scripted(self.shapes, self.snapshot)
        if not _data.count(inputs):
            raise ValueError("Expected at least one datum to find the layers of the model with, got none.")
        # Three, to see which dimension counts them, and what the model does for one and for two.
        inputs = _data.at_least(_data.to_device(_data.some(inputs, 3), self.device), 3)
        factors, recorder = self._forward(inputs)
        _checks.finite(
            factors.outputs, "the model's outputs", "Check the inputs and the weights for NaN before fitting."
        )
        if not factors._graph_outputs.requires_grad:
            raise ValueError(
                f"Expected parameters that act on the outputs, got {list(self.shapes)}, on none of which any output "
                "depends. Choose those that do (a head whose outputs are not returned does not), and do not detach the "
                "outputs or compute them under no_grad."
            )
        self._check_independence(inputs, factors.outputs)
        self.n_outputs = factors.outputs.shape[1]
        self.fewest = 1 if self._takes_one(_data.take(inputs, slice(0, 1)), factors) else 2
        n, calls, elsewhere = len(factors.outputs), factors._calls, dict(recorder.elsewhere)
        names = [(self._identities.get(id(call.weight)), self._identities.get(id(call.bias))) for call in calls]
        used = heads.leaves(factors._graph_outputs) & self._identities.keys()
        for name in {self._identities[own] for own in used}.difference(*names):  # inside torch.func.vmap, say
            elsewhere.setdefault(name, "a function that cannot be looked into")
        for call, pair, layout in zip(calls, names, find_layouts(factors._graph_outputs, calls, names), strict=True):
            if layout is None:  # its output has no dimension for the data
                elsewhere.update({name: type(call).__name__ for name in pair if name is not None})
            self.layouts.append(layout or Layout())
        self.blocks = group_parameters(self.shapes, calls, names, elsewhere, separate_bias=separate_bias)
        self.is_head = (
            len(calls) == len(self.blocks) == 1
            and self.blocks[0].kind == "kronecker"
            and calls[0].output_shape == factors.outputs.shape
            and calls[0].edge.node is factors._graph_outputs.grad_fn
        )
        self._activations = sum(math.prod(call.output_shape) for call in calls) // n + 1
        self._datum_size = _data.size_of_datum(inputs)
        shapes = [factors.inputs(block).shape for block in self.blocks]
        self._largest_inputs = max((math.prod(shape[1:]) for shape in shapes), default=1)
        several = [block.size for block, shape in zip(self.blocks, shapes, strict=True) if shape[-1] > 1]
        self._largest_formed = max(several, default=1)
        self._check_factors(inputs)

    def unreached(self, inputs: _data.Inputs) -> tuple[list[int], list[str], list[int]]:
        """Outputs of variance zero, on which no covered parameter acts (:func:`heads.unreached`)."""
        if self.is_head and self.free is None:  # every output has a row of the weight
            return [], [], []
        inputs = _data.to_device(_data.some(inputs, 3), self.device)
        copies = {name: self.snapshot.parameters[name].detach().requires_grad_() for name in self.snapshot.trainable}
        copies |= {name: p.detach().requires_grad_() for name, p in self._leaves.items()}
        free = {} if self.free is None else unflatten(self.free, self.shapes)
        with gradients_enabled():
            return heads.unreached(
                lambda parameters: self.call(parameters, inputs), copies, {name: free.get(name) for name in self.shapes}
            )

    def _last_layer(self, inputs: _data.Inputs) -> list[str]:
        """Names of the parameters that make the outputs."""
        with Trace(self.snapshot.parameters | self._leaves, _data.tensors(inputs)) as trace:
            factors, _ = self._forward(inputs)
        return heads.last_layer(trace, factors._graph_outputs, self._identities)

    def _check_independence(self, inputs: _data.Inputs, outputs: Tensor) -> None:
        """The outputs of the first data must not change when the last one is left out."""
        cause: ValueError | None = None
        try:
            fewer = self.outputs(_data.take(inputs, slice(0, len(outputs) - 1)))
        except ValueError as error:  # a normalisation by the statistics of one datum
            fewer, cause = torch.full_like(outputs[:-1], torch.nan), error
        if not _close(fewer, outputs[:-1], outputs):
            raise ValueError(
                "The output for one datum depends on other data of its batch. A posterior needs outputs that are "
                "independent given the weights; a normalisation by batch statistics (track_running_stats=False) is the "
                "usual cause. Replace it, or give it running statistics."
            ) from cause

    def _takes_one(self, datum: _data.Inputs, among: Factors) -> bool:
        """Whether the first of several data has the same outputs alone, by way of the same layers."""
        try:
            alone, _ = self._forward(datum)
        except Exception:  # whatever a model fails with where it loses the batch dimension
            return False
        same = len(alone._calls) == len(among._calls) and all(
            len(one.output_shape) == len(several.output_shape) and one.input.ndim == several.input.ndim
            for one, several in zip(alone._calls, among._calls, strict=True)
        )
        return same and _close(alone.outputs, among.outputs[:1], among.outputs)

    def _check_factors(self, inputs: _data.Inputs) -> None:
        """The gradient of every datum's outputs must be what its own factors give, or a layer was misread."""
        names = list(self.shapes)
        copies = {name: p.detach().requires_grad_() for name, p in self._leaves.items()}
        factors, _ = self._forward(inputs)
        with gradients_enabled():
            outputs = self.call(copies, inputs)
        vectors = torch.linspace(1, 2, self.n_outputs) * torch.eye(len(outputs))[:, :, None]
        vectors = vectors.to(self.device, self.dtype)
        by_datum = [
            torch.autograd.grad(
                outputs, list(copies.values()), v.to(outputs), retain_graph=True, materialize_grads=True
            )
            for v in vectors
        ]
        expected = {
            name: torch.stack(g).detach().to(self.dtype)
            for name, g in zip(names, zip(*by_datum, strict=True), strict=True)
        }
        largest = max(float(g.abs().max()) for g in expected.values() if g.numel())
        wrong = self._misread(factors, inputs, vectors, expected, largest)
        if wrong is not None and self.lone_blocks:  # batched derivatives of some operations are wrong in torch
            self.one_by_one = True
            factors, _ = self._forward(inputs)
            wrong = self._misread(factors, inputs, vectors, expected, largest)
        if wrong is not None:
            raise _checks.UnsupportedLayerError(
                f"The gradient of {wrong!r} could not be reconstructed from its layer's inputs and outputs. "
                "Freeze it with requires_grad_(False) to leave it out of the posterior, and please report the "
                "layer: this is an error of this package."
            )

    def _misread(
        self, factors: Factors, inputs: _data.Inputs, vectors: Tensor, expected: dict[str, Tensor], largest: float
    ) -> str | None:
        """The first parameter whose gradient is not what the factors give."""
        back = [of_chunk for _, of_chunk in factors.backpropagate(vectors, self.vector_chunk)]
        for block, parts in zip(self.blocks, zip(*back, strict=True), strict=True):
            g = torch.cat(parts, 2)
            own = g.diagonal(dim1=0, dim2=2)  # [G, O, S, N]: of the datum that the vector is for
            found = block.scatter(torch.einsum("gosn,ngis->ngoi", own, factors.inputs(block)))
            for name in (name for name in block.parameters if expected[name].numel()):
                difference = float((found[name] - expected[name]).abs().max())
                if not difference <= 0.05 * float(expected[name].abs().max()) + 1e-4 * largest:
                    return name
        return None


def _close(first: Tensor, second: Tensor, among: Tensor) -> bool:
    """Equal but for rounding, which differs between batches of different sizes."""
    return torch.allclose(first, second, rtol=0.01, atol=0.01 * float(among.abs().max()))


def match_parameters(model: nn.Module | Snapshot, patterns: str | Sequence[str]) -> list[str]:
    """Names of the trainable parameters that match a pattern, or any of several (:mod:`fnmatch`), in the model's order.

    A name of a module stands for all of its parameters.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    aliases = model.aliases if isinstance(model, Snapshot) else aliases_of(model)
    return matching(_trainable_shapes(model), patterns, aliases)


def matching(names: Collection[str], patterns: str | Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """Those of some names of parameters that match a pattern, or any of several; see :func:`match_parameters`.

    Args:
        names: Each parameter's first one.
        patterns: For any of their names.
        aliases: All names of all parameters, and the first one of each.
    """
    every = [(alias, name) for alias, name in aliases.items() if name in names]
    if not isinstance(patterns, str) and not len(patterns):
        raise ValueError(f"Expected patterns of trainable parameters, got none. There are {list(names)}.")
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        own = {first for name, first in every if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not own:
            raise ValueError(
                f"Expected patterns of trainable parameters, got {pattern!r}, which matches none of {list(names)}."
            )
        matched |= own
    return [name for name in names if name in matched]


def entries_of(model: nn.Module | Snapshot, indices: Tensor) -> dict[str, Tensor]:
    """Entries of the vector of all trainable parameters, as a mask of each parameter.

    Raises:
        ValueError: If they are no indices of that vector.
    """
    shapes = _trainable_shapes(model)
    total = sum(shape.numel() for shape in shapes.values())
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1 or not len(indices):
        raise ValueError(f"Expected indices to be a non-empty vector of int64, got {indices!r}.")
    if int(indices.min()) < 0 or int(indices.max()) >= total or len(indices.unique()) < len(indices):
        raise ValueError(
            f"Expected different indices from 0 to {total - 1}, got {len(indices)} of which {len(indices.unique())} "
            f"differ, from {int(indices.min())} to {int(indices.max())}."
        )
    mask = torch.zeros(total, dtype=torch.bool)
    mask[indices.cpu()] = True
    return unflatten(mask, shapes)


def _refuse_scripted(names: Iterable[str], snapshot: Snapshot) -> None:
    own = [name for name in names if name in snapshot.scripted]
    if own:
        places = sorted({snapshot.scripted[name] for name in own})
        where = "the model" if places == [""] else f"the modules {places}"
        raise _checks.UnsupportedLayerError(
            f"Expected layers of Python modules, got {where} scripted or traced (torch.jit): nothing sees the layers "
            f"inside, which have the trainable parameters {own}. Give the model that it was made from (after "
            "model.load_state_dict(scripted.state_dict())), or freeze these parameters with requires_grad_(False) to "
            "leave them out of the posterior."
        )


def _trainable_shapes(model: nn.Module | Snapshot) -> dict[str, torch.Size]:
    if isinstance(model, Snapshot):
        return {name: model.parameters[name].shape for name in model.trainable}
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class WeightedFactors:
    """Factors of a chunk of data, with what the curvature needs besides.

    Attributes:
        factors: The forward pass.
        weights: ``[N]``, on the CPU; they sum over chunks.
        vectors: ``sqrt(w_n) S_n: [V, N, C]``, the weighted square root of the loss Hessian to back-propagate;
            weighing it here saves weighing it in every layer.
        positions: Of these among all data. Data that are alike come together, in another order than their own.
    """

    factors: Factors
    weights: Tensor
    vectors: Tensor
    positions: slice | Tensor


class CurvatureData:
    """Weighted data as a re-iterable sequence of :class:`WeightedFactors`.

    Random vectors are drawn once for all data, so that every pass and every chunk size sees the same.

    Args:
        network: The model with its blocks.
        data: What to iterate over.
        likelihood: Gives the square root of the loss Hessian.
        mc_samples: Random vectors for each datum; ``None`` for the exact square root.
        curvature: ``"ggn"``, or ``"empirical_fisher"``: the gradient at the data's own targets as the only vector,
            which is no approximation of the Hessian (Kunstner, Balles, Hennig, arXiv 1905.12558).
        generator: Source of the random vectors, on the CPU.
        chunk_size: Data at a time; ``None`` chooses by :data:`CHUNK_MEMORY`.
        progress: Called with the number of data after each chunk.
    """

    def __init__(
        self,
        network: Network,
        data: WeightedData,
        likelihood: Likelihood,
        *,
        mc_samples: int | None = None,
        curvature: str = "ggn",
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        if curvature not in CURVATURES:
            raise ValueError(f"Expected a curvature out of {list(CURVATURES)}, got {curvature!r}.")
        self.network, self.data, self.likelihood, self.progress = network, data, likelihood, progress
        self.curvature = curvature
        _checks.chunk_size(chunk_size)
        self._chosen = chunk_size
        self.chunk_size = chunk_size or network.chunk_size(CHUNK_MEMORY, network.vector_chunk, inputs=data.inputs)
        self.uniforms: Tensor | None = None
        if mc_samples is not None and curvature == "ggn":
            shape = (len(data), mc_samples, network.n_outputs)
            # Open interval: the inverse normal distribution is infinite at zero.
            self.uniforms = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_min_(1e-12)

    def slices(self, chunks: int = 1) -> list[slice | Tensor]:
        """The data, so many chunks of data that are alike at a time."""
        return list(_data.chunks(self.data.inputs, chunks * self.chunk_size))

    def take(self, part: Tensor | slice) -> CurvatureData:
        """Some of the data, with the same random vectors."""
        taken = copy.copy(self)
        taken.data = self.data.take(part)
        taken.uniforms = None if self.uniforms is None else self.uniforms[part]
        return taken

    def for_all_vectors(self) -> CurvatureData:
        """The same data in chunks so small that the back-propagated vectors of all blocks fit :data:`CHUNK_MEMORY`."""
        taken = copy.copy(self)
        n_vectors = 1 if self.curvature == "empirical_fisher" else self.network.n_outputs
        if self.uniforms is not None:
            n_vectors = self.uniforms.shape[1]
        inputs = self.data.inputs
        taken.chunk_size = self._chosen or self.network.chunk_size(CHUNK_MEMORY, n_vectors, inputs=inputs)
        return taken

    def __len__(self) -> int:
        """Number of data."""
        return len(self.data)

    def __iter__(self) -> Iterator[WeightedFactors]:
        for part in self.slices():
            own = self.data.take(part)
            factors = self.network.factors(own.inputs)
            vectors = self._vectors(factors.outputs.to(self.network.dtype), own.targets, part)
            yield WeightedFactors(factors, own.weights, vectors * own.weights.to(vectors).sqrt()[:, None], part)
            if self.progress is not None:
                self.progress(len(own))

    def _vectors(self, outputs: Tensor, targets: Tensor, part: slice | Tensor) -> Tensor:
        """The vectors of a chunk before they are weighted, ``[V, N, C]``."""
        targets = targets.to(outputs.device)
        if self.curvature == "empirical_fisher":
            return self.likelihood.gradient(outputs, targets)[None]
        if self.uniforms is None:
            return self.likelihood.hessian_square_root(outputs, targets)
        return self.likelihood.sampled_square_root(outputs, targets, self.uniforms[part].to(outputs.device))
