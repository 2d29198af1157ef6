"""A network as it was at one moment, and copies of its modules to run.

Nothing of the user's model is written during a call, not even for a moment: neither modes, nor parameters, nor what a
forward pass leaves in a module. So calls in several threads run side by side, and the user may train, freeze or serve
the model meanwhile. What is copied and what is not:

* parameters and buffers are copied once, for the snapshot. Frozen weights of more than :data:`SHARED` bytes, those of
  a language model with adapters, are shared instead, and a change of them is an error;
* modules, and the lists, dictionaries, bound methods, closures and objects by which they refer to one another, are
  copied shallowly for every call that runs at the same time as others, and are used again if the call left them as
  they were;
* hooks of the forward pass are run as the user set them, those of the backward pass are left out: they are about
  training, and gradients here are derivatives.
"""

from __future__ import annotations

import operator
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from debiased_laplace.network.copies import Unwrapped, copied, left_out
from debiased_laplace.network.tensors import (
    aliases_of,
    described,
    detached,
    equal,
    few_entries,
    is_plain,
    listed,
    same_stamps,
    stamp_of,
    tensors_in,
    tensors_of,
)  # fmt: skip

#: Bytes of frozen weights above which they are not copied.
SHARED = 2**28

#: How often weights are copied again that another thread changed meanwhile.
ATTEMPTS = 20


class ModelChangedError(RuntimeError):
    """The model is no longer what it was at the fit, and there is no going on with what it was then."""


class ModelChangedWarning(UserWarning):
    """The model is no longer what it was at the fit, which predictions go on with."""


class Changes(NamedTuple):
    """Names of what is different in a model: tensors by name, modules."""

    values: list[str]
    cast: list[str]
    missing: list[str]
    new: list[str]
    modules: list[str]

    def __str__(self) -> str:
        words = ("other values", "another dtype, device or shape", "no longer there", "new", "of another class")
        return "; ".join(f"{what}: {listed(names)}" for what, names in zip(words, self, strict=True) if names)


def refuse_shards(model: nn.Module) -> None:
    """Raise a ``ValueError`` for parameters of which this process has a part only."""
    of_shards = {"DTensor", "FlatParameter"}
    shards = [name for name, p in model.named_parameters() if {c.__name__ for c in type(p).__mro__} & of_shards]
    shards += [name for name, module in model.named_modules() if type(module).__name__ == "FullyShardedDataParallel"]
    if shards:
        raise ValueError(
            f"Expected whole parameters, got shards of them (DTensor) in {listed(shards)}: a posterior would be about "
            "one shard. Gather them, by get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict or full_tensor(), into a model that is not sharded, and fit that; "
            "if it is too large for one device, its last layer on its features, or its adapters."
        )


class Snapshot:
    """A network as it was: module tree, weights, buffers.

    Args:
        model: The network; only read.
        trainable: Names of the parameters that count as trainable; by default those with ``requires_grad``.

    Attributes:
        origin: The user's model.
        module: A copy of it in evaluation mode, with copied tensors; to be read, and copied, not to be run.
        parameters: The tensors of its parameters by name, each once.
        trainable: Names of those that were trainable.
        left_out: What of the model is about how it is computed or trained, in words.
        aliases: All names of every parameter, and the first one of each.
        scripted: Of which parameters the module is scripted or traced.

    Raises:
        RuntimeError: If another thread goes on changing the weights while they are copied.
    """

    def __init__(self, model: nn.Module, trainable: Iterable[str] | None = None) -> None:
        refuse_shards(model)
        self.origin = model
        self._told: tuple[Any, Changes | None] | None = None
        self._watched: list[tuple[list[Tensor], Tensor]] | None = None
        for _ in range(ATTEMPTS):
            before = stamp_of(model)
            with torch.inference_mode(False), torch.no_grad():
                self._copy(model, None if trainable is None else set(trainable))
            self._stamp: Any = stamp_of(model)
            if same_stamps(before, self._stamp):
                self._watched = self._watch()
                return
        raise RuntimeError(
            "Expected a model whose weights stay as they are while they are copied, got one that another thread "
            f"changes again and again ({ATTEMPTS} times). Fit between two steps of its training, or fit a copy."
        )

    @classmethod
    def of(cls, model: nn.Module | Snapshot) -> Snapshot:
        """Of a model, now; a snapshot is one already."""
        return model if isinstance(model, Snapshot) else cls(model)

    def _copy(self, model: nn.Module, trainable: set[str] | None) -> None:
        parameters = dict(model.named_parameters())
        free = {n for n, p in parameters.items() if (p.requires_grad if trainable is None else n in trainable)}
        frozen = sum(p.numel() * p.element_size() for n, p in parameters.items() if n not in free)
        self._shared = {n for n, p in parameters.items() if n not in free and (frozen > SHARED or not is_plain(p))}
        self.left_out = left_out(model)
        self.trainable = [name for name in parameters if name in free]
        self.aliases = aliases_of(model)
        self.parameters = {n: detached(p, copied=n not in self._shared) for n, p in parameters.items()}
        self.module = copied(model, {id(p): self.parameters[n] for n, p in parameters.items()})
        names = {id(p): name for name, p in parameters.items()}
        self.scripted = {
            names[id(p)]: place for place, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)
            for p in module.parameters() if id(p) in names
        }  # fmt: skip
        #: What shared weights were, at a few places.
        self._few = {name: few_entries(self.parameters[name]).clone() for name in self._shared}

    def replica(self, tensors: Mapping[int, Tensor]) -> nn.Module:
        """A copy of the modules to run, with other tensors in the places of some parameters (by identity)."""
        return copied(self.module, {id(p): p for p in self.parameters.values()} | dict(tensors))

    def state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name, as ``model.state_dict()`` was."""
        return self.module.state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stamp": None, "_told": None, "_watched": None}  # of other objects

    def alike(self, other: Snapshot) -> bool:
        """Whether both are of the same model with the same weights and buffers."""
        if self is other:
            return True
        these, those = tensors_of(self.module), tensors_of(other.module)
        return self.origin is other.origin and these.keys() == those.keys() and all(
            equal(these[name], those[name]) for name in these
        )  # fmt: skip

    # -- what became of the user's model ---------------------------------------------------------

    def changes(self, *, thorough: bool = False) -> Changes | None:
        """What is different in the user's model by now; None if nothing is.

        Modes, hooks and ``requires_grad`` are no difference. Cost: a look at every tensor and at
        :data:`COMPARED` of its entries, or with ``thorough`` at all.

        Raises:
            ModelChangedError: If weights that were too large to copy were overwritten.
        """
        now = stamp_of(self.origin)
        self._check_shared()
        if self._told is not None and same_stamps(now, self._told[0]) and self._told[1] is not None and not thorough:
            return self._told[1]
        if thorough or not same_stamps(now, self._stamp) or self._few_differ():
            differences = self._differences()
            self._told = now, differences
            return differences
        return None

    def _watch(self) -> list[tuple[list[Tensor], Tensor]]:
        """Views of a few entries of the user's tensors, which stay where they are, and what they were."""
        of_user = tensors_of(self.origin)
        groups: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for name, tensor in tensors_of(self.module).items():
            pair = few_entries(of_user[name]), few_entries(tensor, of_user[name])
            groups.setdefault((tensor.dtype, tensor.device), []).append(pair)
        pairs = [tuple(zip(*group, strict=True)) for group in groups.values()]
        return [(list(views), torch.cat(entries)) for views, entries in pairs]

    def _few_differ(self) -> bool:
        return self._watched is None or any(
            not torch.equal(torch.cat(views), entries) for views, entries in self._watched
        )

    def _check_shared(self) -> None:
        stamped = (
            {} if self._stamp is None or not self._shared else {id(t): v for _, t, v, _ in tensors_in(self._stamp)}
        )
        present = dict(self.origin.named_parameters()) if self._shared else {}
        for name in sorted(self._shared):
            of_user, shared = present.get(name), self.parameters[name]
            written = (
                of_user is not None
                and of_user.data_ptr() == shared.data_ptr()
                and stamped.get(id(of_user), of_user._version) != of_user._version
            )
            if written or not torch.equal(few_entries(shared), self._few[name]):
                raise ModelChangedError(
                    f"The frozen weights {name!r} were overwritten after the fit. Being large they were shared with "
                    "the model and not copied, so there is no going on with those of the fit. Fit again, or load them."
                )

    def _differences(self) -> Changes | None:
        then, now = tensors_of(self.module), tensors_of(self.origin)
        missing, new = [n for n in then if n not in now], [n for n in now if n not in then]
        cast = [n for n in then if n in now and described(then[n]) != described(now[n])]
        other = [n for n in then if n in now and n not in cast and not equal(then[n], now[n])]
        types_ = {name: type(module) for name, module in self.origin.named_modules()}
        modules = [
            name for name, module in self.module.named_modules()
            if name in types_ and not isinstance(module, Unwrapped) and type(module) is not types_[name]
        ]  # fmt: skip
        changes = Changes(other, cast, missing, new, modules)
        return changes if any(changes) else None


class Replicas:
    """Copies of a snapshot's modules to run, as many as calls at a time; one that a call changed is not used again.

    Args:
        snapshot: What they are copies of.
        parameters: Tensors to take the places of parameters, by name.
    """

    def __init__(self, snapshot: Snapshot, parameters: Mapping[str, Tensor]) -> None:
        self._snapshot = snapshot
        self._tensors = {id(snapshot.parameters[name]): tensor for name, tensor in parameters.items()}
        self._idle: deque[tuple[nn.Module, _Left]] = deque()

    @contextmanager
    def one(self) -> Iterator[nn.Module]:
        """A copy in evaluation mode that no other call has."""
        try:
            module, as_it_was = self._idle.pop()
        except IndexError:
            with torch.inference_mode(False), torch.no_grad():
                module = self._snapshot.replica(self._tensors)
            as_it_was = _Left(module)
        yield module
        if as_it_was.still():
            self._idle.append((module, as_it_was))

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("Replicas are made anew from their snapshot.")  # their tensors are known by identity


class _Left:
    """What a forward pass can leave in a module tree."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = [part.__dict__ for part in module.modules()]
        self._values = [tuple(attributes.values()) for attributes in self._modules]
        self._sizes = [len(value) for value in self._containers()]
        self._buffers = [
            buffer for attributes in self._modules for buffer in attributes["_buffers"].values() if buffer is not None
        ]  # fmt: skip
        self._versions = [buffer._version for buffer in self._buffers]

    def _containers(self) -> Iterator[Any]:
        for values in self._values:
            yield from (value for value in values if type(value) in (dict, list, set, OrderedDict, deque))

    def still(self) -> bool:
        """Whether the tree is as it was: attributes, sizes of containers, versions of buffers."""
        return (
            all(
                len(attributes) == len(values) and all(map(operator.is_, attributes.values(), values))
                for attributes, values in zip(self._modules, self._values, strict=True)
            )
            and self._sizes == [len(value) for value in self._containers()]
            and self._versions == [buffer._version for buffer in self._buffers]
        )


def in_evaluation_mode(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares the weights of a model, in evaluation mode; buffers are copied."""
    with torch.inference_mode(False), torch.no_grad():
        return copied(model, {id(p): p for p in model.parameters()})
