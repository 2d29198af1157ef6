"""Walking through what a loader yields: containers of any kind with tensors and other things in them.

Opened are mappings, lists, tuples, what torch's pytrees know, dataclasses, and other objects that have tensors among
their attributes. Whatever a nesting is made of, it is made of again: a ``UserDict``, a ``BatchEncoding``, a dataclass
or a class of the user's reaches the model as what it was, with the attributes it had. The original is left as it
is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

#: Puts other values into the places of those of a nesting.
Rebuild = Callable[[list[Any]], Any]


def opened(node: Any) -> tuple[list[Any], list[Any], Rebuild] | None:
    """One level of a nesting: what names its places, the values there, and how to put others there; None for a leaf."""
    if isinstance(node, Tensor):
        return None
    if isinstance(node, Mapping) and type(node) not in _pytree.SUPPORTED_NODES:
        keys = list(node)
        return keys, [node[key] for key in keys], lambda values: _mapping(node, dict(zip(keys, values, strict=True)))
    values, spec = _pytree.tree_flatten(node, is_leaf=lambda child: child is not node)
    if len(values) != 1 or values[0] is not node:
        keys = list(node) if isinstance(node, Mapping) else list(range(len(values)))
        return keys, values, lambda others: _pytree.tree_unflatten(others, spec)
    if isinstance(node, (list, tuple)):  # a class of the user's
        return list(range(len(node))), list(node), lambda others: sequence(node, others)
    attributes = _attributes(node)
    if attributes is None:
        return None
    names = list(attributes)
    return names, list(attributes.values()), lambda others: _object(node, dict(zip(names, others, strict=True)))


def sequence(node: list[Any] | tuple[Any, ...], values: list[Any]) -> Any:
    """A list or a tuple of the same type with other values."""
    if isinstance(node, list):
        made = copy.copy(node)
        made[:] = values
        return made
    try:
        return type(node)(values)
    except TypeError:  # a class with other arguments
        return tuple.__new__(type(node), values)


def _mapping(node: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """A mapping of the same type; a dictionary where nothing can be assigned."""
    if not isinstance(node, MutableMapping):
        return values
    made = copy.copy(node)
    for key, value in values.items():
        made[key] = value
    return made


def _attributes(node: Any) -> dict[str, Any] | None:
    """Of a dataclass its fields, of another object its attributes if there are tensors among them; None otherwise."""
    if isinstance(node, (type, nn.Module)):
        return None
    if dataclasses.is_dataclass(node):
        names = [field.name for field in dataclasses.fields(node)]
        return {name: getattr(node, name) for name in names if hasattr(node, name)}
    attributes = _state(node)
    return attributes if any(map(_has_tensors, attributes.values())) else None


def _state(node: Any) -> dict[str, Any]:
    """All attributes of an object itself."""
    slots = [name for kind in type(node).__mro__ for name in _slots(kind) if hasattr(node, name)]
    return {name: getattr(node, name) for name in slots} | dict(getattr(node, "__dict__", {}))


def _slots(kind: type) -> list[str]:
    names = vars(kind).get("__slots__", ())
    return [names] if isinstance(names, str) else [name for name in names if name not in ("__dict__", "__weakref__")]


def _has_tensors(value: Any) -> bool:
    """Whether a value is a tensor or a common container of some; objects inside objects are not searched."""
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(map(_has_tensors, value)))


def _object(node: Any, values: dict[str, Any]) -> Any:
    """An object of the same class with other attributes, without its class being asked: frozen ones do as well."""
    try:
        made = object.__new__(type(node))
    except TypeError:  # written in C
        made = copy.copy(node)
    for name, value in (_state(node) | values).items():
        object.__setattr__(made, name, value)
    return made


def mapped(function: Callable[[Any], Any], node: Any, is_leaf: Callable[[Any], bool] = lambda _: False) -> Any:
    """Apply a function to every leaf (or whatever is said to be one), and make the same nesting of the results."""
    inside = None if is_leaf(node) else opened(node)
    if inside is None:
        return function(node)
    _, values, rebuild = inside
    return rebuild([mapped(function, value, is_leaf) for value in values])


def leaves(node: Any, is_leaf: Callable[[Any], bool] = lambda _: False) -> list[Any]:
    """The leaves of a nesting, in the order of :func:`mapped`."""
    inside = None if is_leaf(node) else opened(node)
    return [node] if inside is None else [leaf for value in inside[1] for leaf in leaves(value, is_leaf)]


def shape(node: Any, describe: Callable[[Any], Any], is_leaf: Callable[[Any], bool] = lambda _: False) -> Any:
    """Types and names of a nesting, with what a function says of each leaf, as something to compare and to look up."""
    inside = None if is_leaf(node) else opened(node)
    if inside is None:
        return describe(node)
    keys, values, _ = inside
    return type(node), tuple((key, shape(value, describe, is_leaf)) for key, value in zip(keys, values, strict=True))
