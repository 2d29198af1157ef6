"""A model with its curvature blocks: what curvatures, predictions and fits know a network as.

This module is longer than others: the one object that all of them hold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from debiased_laplace import _checks, _data
from debiased_laplace._guards import gradients_enabled, users_precision
from debiased_laplace.network.backward import Backward
from debiased_laplace.network.blocks import Block, flatten, unflatten
from debiased_laplace.network.discovery import find_blocks, last_layer
from debiased_laplace.network.factors import Factors
from debiased_laplace.network.kinds import NO_CURVATURE
from debiased_laplace.network.layers import Layout
from debiased_laplace.network.reduction import call_of_reduced_features, check_reduction, reduced_features
from debiased_laplace.network.selection import entries_of, match_parameters, padding_masks, refuse_scripted
from debiased_laplace.network.snapshot import Replicas, Snapshot
from debiased_laplace.network.stored import description_of, set_description
from debiased_laplace.network.tracing import Recorder, with_derivatives

#: Dtypes that layers compute in; what is stored in another one (quantised weights) is converted before.
COMPUTED_IN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: Says of the shape of dense outputs where their sites are.
SiteFinder = Callable[[torch.Size], _data.SiteLayout]


class Network:
    """A model as it was, together with its blocks; it never writes to the model, and runs copies of its modules.

    Attributes:
        snapshot: The model as it was when the network was made: what everything here is about.
        model: The user's model, whatever became of it since.
        convention: How it is called.
        blocks: Its curvature blocks, in the order of the parameters.
        layouts: For every recorded call, where the data are.
        n_outputs: C.
        shapes: Shapes of the trainable parameters by name, in the order of ``model.named_parameters()``.
    """

    def __init__(
        self, model: nn.Module | Snapshot, parameters: Iterable[str] | None = None,
        convention: _data.CallingConvention = _data.USUAL,
    ) -> None:  # fmt: skip
        self.snapshot, self.convention = Snapshot.of(model), convention
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
        #: Relative rounding error of what the model computes: that of the coarsest dtype of its parameters; once the
        #: layers are found, also of what they are given (under autocast, say).
        self.precision = max(
            torch.finfo(p.dtype).eps for p in self.snapshot.parameters.values() if p.dtype in COMPUTED_IN
        )
        #: Vectors to back-propagate at a time where they are few: one by one is faster on the CPU, batched on an
        #: accelerator. And what chooses where they are many.
        self.vector_chunk = 1 if self.device.type == "cpu" else 16
        self.backward = Backward()
        self.n_params = sum(p.numel() for p in trainable.values())
        self.blocks: list[Block] = []
        self.layouts: list[Layout] = []
        self.n_outputs = 0
        #: Data that the model is given at least: two if it treats one alone otherwise (a bare ``squeeze()``), then the
        #: one twice.
        self.fewest = 1
        #: Which entries of the parameter vector are uncertain, ``[D]``; None for all.
        self.free: Tensor | None = None
        #: Whether the only block is a linear layer that makes the outputs, and whether any has positions of sequences.
        self.is_head = self.has_sequences = False
        #: Where the sites are in dense outputs; None for ``[N, C]``. And what finds that in the shape of outputs.
        self.sites: _data.SiteLayout | None = None
        self.find_sites: SiteFinder | None = None
        #: S * C for dense outputs of the data that the network was found with, which may be the largest; else C.
        self.row_size = 0
        #: Whether the sites are the positions of the only layer, whose outputs are the model's.
        self.sites_are_positions = False
        #: Whether gradients of lone parameters are made datum by datum, where torch.func does not do; and whether the
        #: data in the rows of calls are found anew in every forward pass (:mod:`.rows`).
        self.one_by_one = self.by_rows = False
        #: Which tensors made of parameters alone have an entry for each datum (:class:`~.tracing.Recorder`).
        self.entries: frozenset[int] | None = frozenset()
        #: Names of the parameters of every call; None if it is not known.
        self.call_names: list[tuple[str, ...]] | None = None
        #: Parameters whose gradients are made apart from any layer: how often they are called may depend on the data.
        self.apart: frozenset[str] = frozenset()
        #: For :meth:`chunk_size`, numbers of a datum: activations of all layers, the largest inputs of one and gradient
        #: of one; and the size of the datum that they are of.
        self.activations = self.largest_inputs = self.largest_formed = 1
        #: Likewise, bytes that the forward pass holds for a datum, frozen layers included.
        self.forward_memory = 0
        self.datum_size = 0
        #: Bytes for chunks of data, in the place of those that :meth:`chunk_size` is asked for; None for these.
        self.memory_of_chunks: int | None = None
        #: Names of the classes of calls that are recorded; None for all.
        self.call_types: frozenset[str] | None = None
        #: How the features of the last layer become those of the outputs (:meth:`reduced`); None as the model does it.
        self.feature_reduction: str | None = None
        #: By how much outputs differed from the last layer of reduced features, relative to the largest output.
        self.reduction_error = 0.0

    @property
    def gram_precision(self) -> float:
        """:attr:`precision` of inner products of gradients.

        Their sums have the precision of :attr:`dtype`, and the rounding of the gradients themselves, being of both
        factors, enters squared.
        """
        return max(torch.finfo(self.dtype).eps, self.precision**2)

    def note_precision(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that the model computes, which may have a coarser dtype than its parameters."""
        coarse = [torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.dtype in COMPUTED_IN]
        self.precision = max([self.precision, *coarse])

    def _run_with(self, trainable: dict[str, Tensor]) -> None:
        """Let copies of the model run with leaves of the autograd graph in the places of the trainable parameters."""
        with torch.inference_mode(False):
            self.leaves = {name: nn.Parameter(p.detach()) for name, p in trainable.items()}
        self.identities = {id(p): name for name, p in self.leaves.items()}
        self._replicas = Replicas(self.snapshot, self.leaves)

    def __getstate__(self) -> dict[str, Any]:
        to_run = ("leaves", "identities", "_replicas")
        return {name: value for name, value in self.__dict__.items() if name not in to_run}

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
        convention: _data.CallingConvention = _data.USUAL,
        find_sites: SiteFinder | None = None,
    ) -> Network:
        """Find the blocks of a model by one forward and one backward pass over a few data.

        Args:
            model: Any module whose output is ``[N, C]`` (or ``[N]``), each row depending on one datum, as it is or was;
                or dense, ``[N, ..., C]`` or ``[N, C, ...]``.
            inputs: Some data; three of them are used, of the longest if they differ.
            parameters: Which trainable parameters the posterior is about: all, ``"last_layer"``, or names and patterns
                (:mod:`fnmatch`). The others are constants, as if they were frozen.
            indices: Instead, single entries of the vector of all trainable parameters, ``[n]``.
            separate_bias: Give weights and biases blocks of their own, as laplace-torch does.
            feature_reduction: Of a last layer, :meth:`reduced`.
            convention: How the model is called.
            find_sites: Says of the shape of dense outputs where their sites are; without it they are refused.

        Raises:
            ValueError: If no parameter is trainable, or outputs mix data, or have another shape.
            UnsupportedLayerError: If nothing covers a trainable parameter.
        """
        snapshot = Snapshot.of(model)
        if len(snapshot.scripted) == len(snapshot.parameters):
            refuse_scripted(snapshot.parameters, snapshot)
        searched = parameters == "last_layer"
        if searched:
            whole = cls(snapshot, convention=convention)
            whole.find_sites = find_sites
            sample = _data.at_least(_data.to_device(_data.some(inputs, 2), whole.device), 2)
            parameters = last_layer(whole, sample)
        elif parameters is not None:
            parameters = match_parameters(snapshot, parameters)
        if indices is not None:
            if parameters is not None:
                raise ValueError("Expected either parameters or indices, got both.")
            free = entries_of(snapshot, indices)
            parameters = [name for name, mask in free.items() if bool(mask.any())]
        network = cls(snapshot, parameters, convention)
        network.find_sites = find_sites
        try:
            find_blocks(network, inputs, separate_bias)
        except _checks.UnsupportedLayerError as error:
            if not searched:
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
            feature_reduction: One of :data:`~.reduction.FEATURE_REDUCTIONS`, with laplace-torch's meanings.
            inputs: Some data, to try it.

        Raises:
            ValueError: If there is no such way, or the network is no single linear layer that it could be of.
        """
        check_reduction(feature_reduction)
        network = copy.copy(self)
        network.feature_reduction, network.reduction_error = feature_reduction, 0.0
        network.blocks = [replace(block, calls=(0,)) for block in self.blocks]
        network.layouts, network.is_head = [Layout()], len(self.blocks) == 1
        network.has_sequences = network.by_rows = False
        network.call_names = None
        if inputs is not None:
            network.factors(_data.some(inputs, 3))
        return network

    @classmethod
    def restore(cls, model: nn.Module | Snapshot, description: dict[str, Any], outputs_of: Any = None) -> Network:
        """The network of a :meth:`description`, without data; whether its parameters are frozen by now does not matter.

        Raises:
            ValueError: If the model has other parameters; it names those that differ. If ``outputs_of`` is missing.
        """
        convention = _data.CallingConvention.restore(description.get("convention", {}), outputs_of)
        expected = {name: tuple(shape) for name, shape in description["shapes"].items()}
        snapshot = Snapshot.of(model)
        actual = {name: tuple(p.shape) for name, p in snapshot.parameters.items() if name in expected}
        if actual != expected:
            differ = sorted(set(actual.items()) ^ set(expected.items()))
            raise ValueError(f"Expected a model with the same trainable parameters; these differ: {differ}.")
        network = cls(snapshot, expected, convention)
        set_description(network, description)
        return network

    def description(self) -> dict[str, Any]:
        """What :meth:`discover` found, in objects that can be stored."""
        return description_of(self)

    def free_entries(self, block: Block) -> Tensor | None:
        """Which entries ``[G, O, I]`` of a block are uncertain; None for all."""
        if self.free is None:
            return None
        mask = block.gather(unflatten(self.free, self.shapes))
        return None if bool(mask.all()) else mask

    @property
    def lone_blocks(self) -> list[Block]:
        """Blocks of parameters that no layer rule covers (:mod:`debiased_laplace.network.lone`)."""
        return [block for block in self.blocks if block.is_lone]

    def same_blocks(self, other: Network) -> bool:
        """Whether backward passes of the one are those of the other: the same model, seen in the same blocks."""
        return (
            (self.shapes, self.blocks) == (other.shapes, other.blocks)
            and (self.layouts, self.by_rows) == (other.layouts, other.by_rows)
            and self.snapshot.alike(other.snapshot)
        )

    def factors(self, inputs: _data.Inputs, *, backward: bool = True) -> Factors:
        """One forward pass that records what :meth:`Factors.backpropagate` needs; or, faster, only layer inputs."""
        inputs = _data.to_device(inputs, self.device)
        seen = None if backward else self._forward_without_activations(inputs)
        factors, recorder = self.forward(inputs) if seen is None else seen
        names = recorder.names_of_calls()
        if self.call_names is None or self.is_head:  # not known (stored by an earlier version); one call in any case
            if len(names) != len(self.layouts):
                raise RuntimeError(
                    f"The model called {len(names)} layers with trainable parameters, but {len(self.layouts)} when its "
                    "blocks were found. Its forward pass must not depend on the data; if you changed the model, fit "
                    "again."
                )
        elif names != self.call_names:
            factors.call_names = names
            idle = {name for block in self.blocks if block.kind == NO_CURVATURE for name in block.parameters}
            if new := sorted(idle.intersection(*[{name for of_call in names for name in of_call}])):
                raise RuntimeError(
                    f"The model uses {new[:10]} for these data, but for none of those that its layers were found with. "
                    "Let the first batch have more of the data, or of other ones, and fit again."
                )
        return factors

    def _forward_without_activations(self, inputs: _data.Inputs) -> tuple[Factors, Recorder] | None:
        """A forward pass that keeps nothing for a backward pass; None if that cannot be, or one is needed."""
        try:
            with saved_tensors_hooks(lambda tensor: tensor.shape, _no_backward):
                factors, recorder = self.forward(inputs, differentiated=False)
        except RuntimeError:  # a model with torch.func inside has no such hooks; any other error comes again
            return None
        # Sequences after all, if the network was found with others: only a backward pass tells what is padding.
        return None if factors.has_sequences else (factors, recorder)

    def outputs(self, inputs: _data.Inputs) -> Tensor:
        """Outputs ``[N, C]`` in evaluation mode, without a graph."""
        with torch.no_grad(), self._replicas.one() as model, users_precision():
            return self._rows(model, _data.to_device(inputs, self.device))

    def call(self, parameters: dict[str, Tensor], inputs: _data.Inputs, **keywords: Any) -> Tensor:
        """Outputs ``[N, C]`` under other parameters (of all names in :attr:`shapes`, and of others if need be)."""
        with self._replicas.one() as model, with_derivatives():
            return self._rows(model, inputs, parameters=parameters, keywords=keywords)

    def _rows(self, model: nn.Module, inputs: _data.Inputs, **how: Any) -> Tensor:
        """Outputs ``[N, C]`` of the model, called in some way, for N data; it is not called for none."""
        n = _data.count(inputs)
        if not n and self.n_outputs:
            return torch.zeros(0, self.n_outputs, dtype=self.dtype, device=self.device)
        return self._run(model, inputs, **how)[0][:n]

    def _as_rows(self, outputs: Tensor, n: int) -> Tensor:
        """What the model returned for N data as rows, ``[N, C]``, or ``[N, S * C]`` if it is dense."""
        if self.find_sites is not None and not self.n_outputs and outputs.ndim > 2:
            self.sites = self.find_sites(outputs.shape)
        if self.sites is not None:
            return self.sites.rows(outputs, n)
        return _data.rows(outputs, n, self.n_outputs or None)

    def _run(self, model: nn.Module, inputs: _data.Inputs, **how: Any) -> tuple[Tensor, Tensor]:
        """The same for at least :attr:`fewest` data, and the tensor that the model returned."""
        given = _data.at_least(inputs, self.fewest)
        returned = self.convention(model, _data.copy(given), dtype=self.dtype, **how)
        return self._as_rows(returned, _data.count(given)), returned

    def mean(self) -> Tensor:
        """The trainable parameters as one vector ``[D]`` (a copy)."""
        return self.to_vector({name: p.detach() for name, p in self.leaves.items()})

    def to_vector(self, parameters: dict[str, Tensor]) -> Tensor:
        """Named tensors ``[..., *shape]`` as vectors ``[..., D]``."""
        return flatten(parameters, self.shapes).to(self.dtype)

    def from_vector(self, vector: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`to_vector`, in the dtypes of the model."""
        return {name: part.to(self.leaves[name].dtype) for name, part in unflatten(vector, self.shapes).items()}

    def without_padding(self, deviations: Tensor) -> Tensor:
        """Deviations ``[..., D]``, zero in rows that stand for padding, which the prior alone would move."""
        return deviations if self._padding is None else deviations.masked_fill(self._padding, 0.0)

    @cached_property
    def _padding(self) -> Tensor | None:
        with self._replicas.one() as model:
            masks = padding_masks(model, self.identities, self.shapes)
        return None if masks is None else flatten(masks, self.shapes).to(self.device)

    def chunk_size(
        self, memory: int, vectors: int = 1, *, formed: bool = False, inputs: _data.Inputs | None = None
    ) -> int:
        """Data at a time such that activations, inputs and back-propagated vectors stay within ``memory`` bytes.

        Or within :attr:`memory_of_chunks`.

        With ``formed``, also the gradients of one block with several positions, in float64 beside their own precision.
        ``inputs`` that are longer than those that the network was found with need so many times more.
        """
        memory = memory if self.memory_of_chunks is None else self.memory_of_chunks
        return max(1, memory // max(1, self.memory_of_a_datum(vectors, formed=formed, inputs=inputs)))

    def memory_of_a_datum(
        self, vectors: int = 1, *, formed: bool = False, inputs: _data.Inputs | None = None
    ) -> int:  # fmt: skip
        """Bytes that a datum takes in a forward pass with so many back-propagated vectors; see :meth:`chunk_size`."""
        size = torch.finfo(self.dtype).bits // 8
        per_datum = max(self.activations * size * 3, self.forward_memory)
        per_datum += (self.activations * vectors + self.largest_inputs * 2) * size
        if formed:
            per_datum += self.largest_formed * vectors * 16
        if inputs is not None and self.datum_size:
            per_datum = per_datum * max(self.datum_size, _data.size_of_datum(inputs)) // self.datum_size
        return per_datum

    def forward(self, inputs: _data.Inputs, *, differentiated: bool = True) -> tuple[Factors, Recorder]:
        """One forward pass, and what was seen of it.

        If it is to be differentiated, products are in full precision: a kink (of a ReLU, say) that rounding takes on
        its other side changes gradients by percents. Otherwise as the user has them.
        """
        with gradients_enabled():
            recorder = Recorder(self.identities, self.call_types, self.entries, self.apart)
            with self._replicas.one() as model:
                recorder.note_constants((*model.buffers(), *model.parameters()))
                with recorder, nullcontext() if differentiated else users_precision():
                    every, returned = self._run(model, inputs)
            n, n_run = _data.count(inputs), len(every)
            outputs = every if n == n_run else every[:n]
        if self.feature_reduction is not None:
            recorder.calls = [call_of_reduced_features(self, recorder.calls, every.detach())]
        return Factors(self, outputs.detach(), inputs, outputs, recorder.calls, n_run, returned), recorder

    def reduce(self, features: Tensor, outputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Features ``[N, ..., I]`` of a last layer as ``[N, I]``; notes how far outputs are from what they give."""
        features, error = reduced_features(self.feature_reduction, features, outputs, weight, bias)
        self.reduction_error = max(self.reduction_error, error)
        return features


def _no_backward(shape: torch.Size) -> Tensor:
    raise RuntimeError(
        f"Expected no backward pass after factors(backward=False), got one to activations {list(shape)}. Leave "
        "backward as it is."
    )
