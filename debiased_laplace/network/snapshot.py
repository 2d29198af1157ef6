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

import copy
import enum
import functools
import operator
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Bytes of frozen weights above which they are not copied.
SHARED = 2**28

#: Entries of every tensor that are compared in each call, since a change through ``.data`` leaves no other trace.
COMPARED = 2**8

#: Objects behind the attributes of modules that are looked through for references to the modules.
VISITED = 200_000

#: How often weights are copied again that another thread changed meanwhile.
ATTEMPTS = 20

#: Modules that say how another one is computed, and not what: names of the classes, since some are slow to import, and
#: where they have the other one.
WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}

_HEAP_TYPE = 1 << 9  # of Python's own: a class that Python code defines


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
        return "; ".join(f"{what}: {_listed(names)}" for what, names in zip(words, self, strict=True) if names)


class Snapshot:
    """A network as it was: module tree, weights, buffers.

    Args:
        model: The network; only read.
        trainable: Names of the parameters that count as trainable; by default those with ``requires_grad``.

    Attributes:
        origin: The user's model.
        module: A copy of it in evaluation mode, with tensors of its own; to be read, and copied, not to be run.
        parameters: The tensors of its parameters by name, each once.
        trainable: Names of those that were trainable.
        aliases: All names of every parameter, and the first one of each.
        scripted: Of which parameters the module is scripted or traced.

    Raises:
        RuntimeError: If another thread goes on changing the weights while they are copied.
    """

    def __init__(self, model: nn.Module, trainable: Iterable[str] | None = None) -> None:
        self.origin = model
        self._told: tuple[Any, Changes | None] | None = None
        self._watched: list[tuple[list[Tensor], Tensor]] | None = None
        for _ in range(ATTEMPTS):
            before = _stamp(model)
            with torch.inference_mode(False), torch.no_grad():
                self._copy(model, None if trainable is None else set(trainable))
            self._stamp: Any = _stamp(model)
            if _same(before, self._stamp):
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
        self._shared = {n for n, p in parameters.items() if n not in free and (frozen > SHARED or not _is_plain(p))}
        self.trainable = [name for name in parameters if name in free]
        self.aliases = aliases_of(model)
        self.parameters = {n: _own(p, copied=n not in self._shared) for n, p in parameters.items()}
        self.module = copied(model, {id(p): self.parameters[n] for n, p in parameters.items()})
        names = {id(p): name for name, p in parameters.items()}
        self.scripted = {
            names[id(p)]: place for place, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)
            for p in module.parameters() if id(p) in names
        }  # fmt: skip
        #: What shared weights were, at a few places.
        self._few = {name: _few(self.parameters[name]).clone() for name in self._shared}

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
        mine, theirs = _tensors(self.module), _tensors(other.module)
        return self.origin is other.origin and mine.keys() == theirs.keys() and all(
            _equal(mine[name], theirs[name]) for name in mine
        )  # fmt: skip

    # -- what became of the user's model ---------------------------------------------------------

    def changes(self, *, thorough: bool = False) -> Changes | None:
        """What is different in the user's model by now; None if nothing is.

        Modes, hooks and ``requires_grad`` are no difference. Cost: a look at every tensor and at
        :data:`COMPARED` of its entries, or with ``thorough`` at all.

        Raises:
            ModelChangedError: If weights that were too large to copy were overwritten.
        """
        now = _stamp(self.origin)
        self._check_shared()
        if self._told is not None and _same(now, self._told[0]) and self._told[1] is not None and not thorough:
            return self._told[1]
        if thorough or not _same(now, self._stamp) or self._few_differ():
            found = self._differences()
            self._told = now, found
            return found
        return None

    def _watch(self) -> list[tuple[list[Tensor], Tensor]]:
        """Views of a few entries of the user's tensors, which stay where they are, and what they were."""
        theirs = _tensors(self.origin)
        groups: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for name, mine in _tensors(self.module).items():
            groups.setdefault((mine.dtype, mine.device), []).append((_few(theirs[name]), _few(mine, theirs[name])))
        pairs = [tuple(zip(*group, strict=True)) for group in groups.values()]
        return [(list(views), torch.cat(own)) for views, own in pairs]

    def _few_differ(self) -> bool:
        return self._watched is None or any(not torch.equal(torch.cat(views), own) for views, own in self._watched)

    def _check_shared(self) -> None:
        stamped = {} if self._stamp is None or not self._shared else {id(t): v for _, t, v, _ in _entries(self._stamp)}
        present = dict(self.origin.named_parameters()) if self._shared else {}
        for name in sorted(self._shared):
            theirs, own = present.get(name), self.parameters[name]
            same_memory = theirs is not None and theirs.data_ptr() == own.data_ptr()
            written = same_memory and stamped.get(id(theirs), theirs._version) != theirs._version  # type: ignore[union-attr]
            if written or not torch.equal(_few(own), self._few[name]):
                raise ModelChangedError(
                    f"The frozen weights {name!r} were overwritten after the fit. Being large they were shared with "
                    "the model and not copied, so there is no going on with those of the fit. Fit again, or load them."
                )

    def _differences(self) -> Changes | None:
        mine, theirs = _tensors(self.module), _tensors(self.origin)
        missing, new = [n for n in mine if n not in theirs], [n for n in theirs if n not in mine]
        cast = [n for n in mine if n in theirs and _described(mine[n]) != _described(theirs[n])]
        other = [n for n in mine if n in theirs and n not in cast and not _equal(mine[n], theirs[n])]
        types_ = {name: type(module) for name, module in self.origin.named_modules()}
        modules = [
            name for name, module in self.module.named_modules()
            if name in types_ and not isinstance(module, Unwrapped) and type(module) is not types_[name]
        ]  # fmt: skip
        changes = Changes(other, cast, missing, new, modules)
        return changes if any(changes) else None


class Unwrapped(nn.Module):
    """In the place of a module that only says how another one is computed."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self._modules[name], self._inner_name = inner, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the inner module does."""
        return self._modules[self._inner_name](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__["_modules"]
            return getattr(modules[self.__dict__["_inner_name"]], name)


class Replicas:
    """Copies of a snapshot's modules to run, as many as calls at a time; one that a call changed is not used again.

    Args:
        snapshot: What they are copies of.
        parameters: Tensors to take the places of parameters, by name.
    """

    def __init__(self, snapshot: Snapshot, parameters: Mapping[str, Tensor]) -> None:
        self._snapshot = snapshot
        self._tensors = {id(snapshot.parameters[name]): own for name, own in parameters.items()}
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
        self._modules = [own.__dict__ for own in module.modules()]
        self._values = [tuple(own.values()) for own in self._modules]
        self._sizes = [len(value) for value in self._containers()]
        self._buffers = [buffer for own in self._modules for buffer in own["_buffers"].values() if buffer is not None]
        self._versions = [buffer._version for buffer in self._buffers]

    def _containers(self) -> Iterator[Any]:
        for values in self._values:
            yield from (value for value in values if type(value) in (dict, list, set, OrderedDict, deque))

    def still(self) -> bool:
        """Whether the tree is as it was: attributes, sizes of containers, versions of buffers."""
        return (
            all(
                len(own) == len(values) and all(map(operator.is_, own.values(), values))
                for own, values in zip(self._modules, self._values, strict=True)
            )
            and self._sizes == [len(value) for value in self._containers()]
            and self._versions == [buffer._version for buffer in self._buffers]
        )


def in_evaluation_mode(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares the weights of a model, in evaluation mode; buffers are its own."""
    with torch.inference_mode(False), torch.no_grad():
        return copied(model, {id(p): p for p in model.parameters()})


# -- copies of module trees ------------------------------------------------------------------------


def copied(model: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """A module tree in evaluation mode whose modules, and what refers to them, are copies.

    Args:
        model: The tree.
        tensors: What takes the place of a tensor, by its identity. Other tensors that a module holds are copied.
    """
    return _Copier(model, tensors)(model)


class _Copier:
    """Copies what modules are made of, each thing once.

    Modules, plain containers and tensors are copied in any case; functions and other objects only where they lead back
    to a module or a parameter of the tree, and everything else is shared.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[int, Tensor]) -> None:
        self._tree = {id(module) for module in model.modules()}
        self._copies: dict[int, Any] = dict(tensors)
        self._alive: list[Any] = []
        self._leads_back = _leading_to(model, self._tree | set(tensors))

    def __call__(self, value: Any) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            if _is_plain(value):
                self._copies[id(value)] = _own(value, copied=True)
            return self._copies.get(id(value), value)
        if isinstance(value, torch.Generator):
            own = self._copies[id(value)] = torch.Generator(value.device)
            own.set_state(value.get_state())
            return own
        kind = type(value)
        if kind in _CONTAINERS or id(value) in self._leads_back:
            return self._other(value, kind)
        return value

    def _module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            scripted = self._copies[id(module)] = copy.deepcopy(module)
            return scripted.eval() if id(module) in self._tree else scripted
        if type(module).__module__.startswith("torch.") and (name := WRAPPERS.get(type(module).__name__)) is not None:
            unwrapped = self._copies[id(module)] = Unwrapped(name, self(module._modules[name]))
            return unwrapped.eval()
        own = self._copies[id(module)] = object.__new__(type(module))
        state = module.__dict__.copy()
        state.pop("_compiled_call_impl", None)
        own.__dict__.update({key: self(value) for key, value in state.items()})
        own.__dict__.update(_backward_hooks=OrderedDict(), _backward_pre_hooks=OrderedDict())
        own.__dict__["_is_full_backward_hook"] = None
        if id(module) in self._tree:
            own.__dict__["training"] = False
        return own

    def _other(self, value: Any, kind: type) -> Any:
        self._alive.append(value)  # its identity must stay its own
        if kind in (dict, OrderedDict):
            plain: dict[Any, Any] = kind()
            self._copies[id(value)] = plain
            for key, item in list(value.items()):
                plain[self(key)] = self(item)
            return plain
        if issubclass(kind, dict):
            own = self._copies[id(value)] = copy.copy(value)
            for key, item in list(value.items()):
                dict.__setitem__(own, key, self(item))
            return own
        if issubclass(kind, (list, deque, set)):
            own = self._copies[id(value)] = copy.copy(value)
            own.clear()
            (own.update if issubclass(kind, set) else own.extend)([self(item) for item in list(value)])
            return own
        if issubclass(kind, (tuple, frozenset)):
            items = [self(item) for item in value]
            if all(map(operator.is_, items, value)):
                return value
            return value._make(items) if hasattr(value, "_make") else kind(items)
        if issubclass(kind, types.MethodType):
            return types.MethodType(value.__func__, self(value.__self__))
        if issubclass(kind, functools.partial):
            return kind(self(value.func), *map(self, value.args), **{k: self(v) for k, v in value.keywords.items()})
        if issubclass(kind, types.FunctionType):
            return self._function(value)
        if issubclass(kind, weakref.ref):
            return weakref.ref(self(value()))
        own = self._copies[id(value)] = object.__new__(kind)
        own.__dict__.update({key: self(item) for key, item in value.__dict__.copy().items()})
        return own

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        own = self._copies[id(function)] = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, None, cells or None
        )
        for cell, theirs in zip(cells, function.__closure__ or (), strict=True):
            try:
                cell.cell_contents = self(theirs.cell_contents)
            except ValueError:  # empty
                continue
        own.__defaults__ = self(function.__defaults__)
        own.__kwdefaults__ = self(function.__kwdefaults__)
        own.__dict__.update({key: self(item) for key, item in function.__dict__.items()})
        own.__qualname__, own.__module__ = function.__qualname__, function.__module__
        return own


_CONTAINERS = (dict, OrderedDict, list, set, deque, tuple)


def _inside(value: Any) -> list[Any]:
    """What something refers to, as far as it is looked through."""
    kind = type(value)
    if issubclass(kind, nn.Module):
        return [] if issubclass(kind, torch.jit.ScriptModule) else list(value.__dict__.copy().values())
    if issubclass(kind, dict):
        return [*list(value), *list(value.values())]
    if issubclass(kind, (list, deque, set, frozenset)) or (issubclass(kind, tuple) and kind is not torch.Size):
        return list(value)
    if issubclass(kind, types.MethodType):
        return [value.__self__]
    if issubclass(kind, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if issubclass(kind, types.FunctionType):
        found = [value.__defaults__, value.__kwdefaults__, value.__dict__]
        for cell in value.__closure__ or ():
            try:
                found.append(cell.cell_contents)
            except ValueError:  # empty
                continue
        return found
    if issubclass(kind, weakref.ref):
        return [value()]
    if (
        kind.__flags__ & _HEAP_TYPE and kind.__new__ is object.__new__  # type: ignore[comparison-overlap]
        and hasattr(value, "__dict__")
        and not issubclass(kind, (type, enum.Enum, Tensor, types.ModuleType))
    ):  # fmt: skip
        return list(value.__dict__.copy().values())
    return []


_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)


def _leading_to(root: Any, targets: set[int]) -> set[int]:
    """Identities of what is reached from the root and leads to one of the targets."""
    parents: dict[int, list[int]] = {}
    seen, queue = {id(root): root}, deque([root])
    while queue and len(seen) < VISITED:
        value = queue.popleft()
        for item in _inside(value):
            if isinstance(item, _ATOMS):
                continue
            parents.setdefault(id(item), []).append(id(value))
            if id(item) not in seen:
                seen[id(item)] = item  # kept alive, so that identities stay what they are
                queue.append(item)
    found: set[int] = set()
    reached = deque(target for target in targets if target in parents)
    while reached:
        for parent in parents.get(reached.popleft(), ()):
            if parent not in found:
                found.add(parent)
                reached.append(parent)
    return found


# -- tensors ---------------------------------------------------------------------------------------


def aliases_of(model: nn.Module) -> dict[str, str]:
    """All names of a model's parameters, of which ``named_parameters`` tells the first alone, and that first one."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def _own(tensor: Tensor, *, copied: bool) -> Tensor:
    """A tensor of our own, without gradient, of the same class; with memory of its own or not."""
    if not _is_plain(tensor):
        return tensor.detach() if tensor.requires_grad else tensor  # quantised weights: more than their numbers
    own = tensor.detach().clone() if copied else tensor.detach()
    if isinstance(tensor, nn.Parameter):
        own = nn.Parameter(own, requires_grad=False)
    elif isinstance(tensor, nn.Buffer):
        own = nn.Buffer(own, persistent=tensor.persistent)
    own.__dict__.update(tensor.__dict__)
    return own


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name."""
    found: dict[str, Tensor] = {}
    for place, own in module.named_modules():
        prefix = f"{place}." if place else ""
        kept = own._buffers.items() if not isinstance(own, torch.jit.ScriptModule) else own.named_buffers(recurse=False)
        temporary = getattr(own, "_non_persistent_buffers_set", ())
        found |= {prefix + key: t for key, t in kept if t is not None and key not in temporary}
        found |= {prefix + key: t for key, t in own.named_parameters(recurse=False)}
    return found


def _stamp(model: nn.Module) -> list[Any]:
    """What tells whether a tensor of a model was replaced, moved or written to; it keeps them alive."""
    stamp: list[Any] = []
    for module in model.modules():
        stamp.append(type(module))
        for group in (module._parameters, module._buffers):
            for key, own in group.items():
                if own is not None:
                    stamp.append((key, own, None if own.is_inference() else own._version, _address(own)))
    return stamp


def _entries(stamp: list[Any]) -> list[tuple[str, Tensor, int | None, Any]]:
    return [entry for entry in stamp if isinstance(entry, tuple)]


def _same(one: list[Any] | None, other: list[Any] | None) -> bool:
    if one is None or other is None or len(one) != len(other):
        return False
    for mine, theirs in zip(one, other, strict=True):
        if isinstance(mine, tuple) != isinstance(theirs, tuple):
            return False
        if isinstance(mine, tuple):
            if mine[1] is not theirs[1] or mine[0] != theirs[0] or mine[2:] != theirs[2:]:
                return False
        elif mine is not theirs:
            return False
    return True


def _address(tensor: Tensor) -> Any:
    try:
        return tensor.data_ptr(), tensor.dtype, tensor.shape
    except (RuntimeError, NotImplementedError):  # without memory of its own
        return tensor.dtype, tensor.shape


def _described(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape


def _few(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """A view of some entries, evenly spread where the memory (of ``like``, if that is given) has no gaps."""
    own, like = tensor.detach(), tensor if like is None else like
    n = own.numel()
    if n == 0:
        return own.reshape(0)
    if like.is_contiguous() or (like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)):
        step = -(-n // COMPARED)
        return own.as_strided((-(-n // step),), (step,))
    return own[(0,) * (own.ndim - 1)][:COMPARED]


def _equal(one: Tensor, other: Tensor) -> bool:
    if _described(one) != _described(other):
        return False
    if torch.equal(one, other):
        return True
    return one.is_floating_point() and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
