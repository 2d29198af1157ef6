"""Walking through what a loader yields: dictionaries of any kind, lists, tuples, with tensors and other things in them.

Whatever a nesting is made of, it is made of again: a ``UserDict``, a ``BatchEncoding`` or a dictionary class of the
user's own reaches the model as what it was, with the attributes it had.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree

#: Puts other values into the places of a nesting's own.
Rebuild = Callable[[list[Any]], Any]


def opened(node: Any) -> tuple[list[Any], list[Any], Rebuild] | None:
    """One level of a nesting: what names its places, the values there, and how to put others there; None for a leaf."""
    if isinstance(node, Tensor):
        return None
    if isinstance(node, Mapping) and type(node) not in _pytree.SUPPORTED_NODES:
        keys = list(node)
        return keys, [node[key] for key in keys], lambda values: _like(node, dict(zip(keys, values, strict=True)))
    values, spec = _pytree.tree_flatten(node, is_leaf=lambda child: child is not node)
    if len(values) == 1 and values[0] is node:
        return None
    keys = list(node) if isinstance(node, Mapping) else list(range(len(values)))
    return keys, values, lambda others: _pytree.tree_unflatten(others, spec)


def _like(mapping: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """A mapping of the same type; a dictionary where nothing can be assigned."""
    if not isinstance(mapping, MutableMapping):
        return values
    made = copy.copy(mapping)
    for key, value in values.items():
        made[key] = value
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
