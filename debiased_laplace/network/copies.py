"""Copies of module trees: modules and what refers to them, with other tensors in the places of some."""

from __future__ import annotations

import copy
import enum
import functools
import operator
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace.network.tensors import detached, is_plain

#: Objects behind the attributes of modules that are looked through for references to the modules.
VISITED = 200_000

#: Modules that say how another one is computed, and not what: names of the classes, since some are slow to import, and
#: where they have the other one.
WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}

_HEAP_TYPE = 1 << 9  # of Python's own: a class that Python code defines


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


def inside_of(module: nn.Module) -> str | None:
    """Where a module has the one that it only says how to compute; None for any other."""
    return WRAPPERS.get(type(module).__name__) if type(module).__module__.startswith("torch.") else None


def left_out(model: nn.Module) -> list[str]:
    """What of a model is about training and computing it, in words: of the forward pass here it is no part."""
    names = sorted({type(module).__name__ for module in model.modules() if inside_of(module) is not None})
    is_lightning = any(kind.__name__ == "LightningModule" for kind in type(model).__mro__)
    return [*names, "trainer and steps (a LightningModule)"] if is_lightning else names


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
            if is_plain(value):
                self._copies[id(value)] = detached(value, copied=True)
            return self._copies.get(id(value), value)
        if isinstance(value, torch.Generator):
            generator = self._copies[id(value)] = torch.Generator(value.device)
            generator.set_state(value.get_state())
            return generator
        kind = type(value)
        if kind in _CONTAINERS or id(value) in self._leads_back:
            return self._other(value, kind)
        return value

    def _module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            scripted = self._copies[id(module)] = copy.deepcopy(module)
            return scripted.eval() if id(module) in self._tree else scripted
        if (name := inside_of(module)) is not None:
            unwrapped = self._copies[id(module)] = Unwrapped(name, self(module._modules[name]))
            return unwrapped.eval()
        copied_module = self._copies[id(module)] = object.__new__(type(module))
        state = module.__dict__.copy()
        state.pop("_compiled_call_impl", None)
        attributes = copied_module.__dict__
        attributes.update({key: self(value) for key, value in state.items()})
        attributes.update(_backward_hooks=OrderedDict(), _backward_pre_hooks=OrderedDict(), _is_full_backward_hook=None)
        if id(module) in self._tree:
            attributes["training"] = False
        return copied_module

    def _other(self, value: Any, kind: type) -> Any:
        self._alive.append(value)  # so that no other object gets its identity
        if kind in (dict, OrderedDict):
            plain: dict[Any, Any] = kind()
            self._copies[id(value)] = plain
            for key, item in list(value.items()):
                plain[self(key)] = self(item)
            return plain
        if issubclass(kind, dict):
            mapping = self._copies[id(value)] = copy.copy(value)
            for key, item in list(value.items()):
                dict.__setitem__(mapping, key, self(item))
            return mapping
        if issubclass(kind, (list, deque, set)):
            container = self._copies[id(value)] = copy.copy(value)
            container.clear()
            (container.update if issubclass(kind, set) else container.extend)([self(item) for item in list(value)])
            return container
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
        instance = self._copies[id(value)] = object.__new__(kind)
        instance.__dict__.update({key: self(item) for key, item in value.__dict__.copy().items()})
        return instance

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        result = self._copies[id(function)] = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, None, cells or None
        )
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            try:
                cell.cell_contents = self(original.cell_contents)
            except ValueError:  # empty
                continue
        result.__defaults__ = self(function.__defaults__)
        result.__kwdefaults__ = self(function.__kwdefaults__)
        result.__dict__.update({key: self(item) for key, item in function.__dict__.items()})
        result.__qualname__, result.__module__ = function.__qualname__, function.__module__
        return result


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
        referred = [value.__defaults__, value.__kwdefaults__, value.__dict__]
        for cell in value.__closure__ or ():
            try:
                referred.append(cell.cell_contents)
            except ValueError:  # empty
                continue
        return referred
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
    leading: set[int] = set()
    reached = deque(target for target in targets if target in parents)
    while reached:
        for parent in parents.get(reached.popleft(), ()):
            if parent not in leading:
                leading.add(parent)
                reached.append(parent)
    return leading
