"""Batches of data: inputs of any nesting (a tensor, a dictionary, a tuple), targets one tensor.

Only the first dimension has a meaning here: it counts the data. Everything that cuts, moves or
joins batches is in this file, so that a dictionary-like input works wherever a tensor does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

Inputs = Any  # a tensor, or a nesting of dictionaries, lists and tuples with tensors at the leaves


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply a function to every tensor of an input, keeping its nesting."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    return _pytree.tree_map_only(Tensor, function, _plain(inputs))


def tensors(inputs: Inputs) -> list[Tensor]:
    """All tensors of an input."""
    return [leaf for leaf in _pytree.tree_leaves(_plain(inputs)) if isinstance(leaf, Tensor)]


def _plain(inputs: Inputs) -> Inputs:
    """Other mappings (transformers' BatchEncoding and the like) as dictionaries, which are known as nestings."""
    return dict(inputs) if isinstance(inputs, Mapping) and type(inputs) is not dict else inputs


def count(inputs: Inputs) -> int:
    """Number of data in a batch: the length of the first dimension, the same for all tensors.

    Raises:
        TypeError: If there is no tensor in the input.
        ValueError: If the tensors disagree.
    """
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in tensors(inputs)}
    if not lengths:
        raise TypeError(
            f"Expected inputs that are a tensor or a nesting of tensors, got {type(inputs).__name__}. "
            "Let the loader yield (inputs, targets) with tensors in the inputs."
        )
    if len(lengths) > 1 or None in lengths:
        raise ValueError(
            "Expected all tensors of an input to have the data along their first dimension, got shapes "
            f"{[tuple(leaf.shape) for leaf in tensors(inputs)]}. Put the batch dimension first everywhere."
        )
    (length,) = lengths
    return int(length)  # type: ignore[arg-type]


def take(inputs: Inputs, index: Tensor | slice) -> Inputs:
    """The data at the given positions of a batch."""
    return map_tensors(lambda leaf: leaf[index.to(leaf.device) if isinstance(index, Tensor) else index], inputs)


def concatenate(batches: list[Inputs]) -> Inputs:
    """Join batches of one nesting along the data.

    Raises:
        ValueError: If their shapes differ otherwise.
    """
    if isinstance(batches[0], Tensor):
        return _joined(batches)
    first, spec = _pytree.tree_flatten(map_tensors(lambda leaf: leaf, batches[0]))
    columns = zip(
        first,
        *(_pytree.tree_leaves(map_tensors(lambda leaf: leaf, batch)) for batch in batches[1:]),
        strict=True,
    )
    joined = [_joined(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return _pytree.tree_unflatten(joined, spec)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise ValueError(
            "Expected inputs of one shape in all batches, since data of several are kept together, got "
            f"{sorted(tuple(shape) for shape in shapes)} after the first dimension. Pad or crop them to one size."
        )
    return torch.cat(list(parts))


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Move a batch; tensors created in inference mode are copied, since autograd cannot use them."""

    def move(leaf: Tensor) -> Tensor:
        leaf = leaf.to(device, non_blocking=True)
        return leaf.clone() if leaf.is_inference() else leaf

    with torch.inference_mode(False):  # a copy made in inference mode would be no better
        return map_tensors(move, inputs)


def copy(inputs: Inputs) -> Inputs:
    """A copy of a batch, for models that overwrite their inputs in place."""
    return map_tensors(torch.clone, inputs)


def pairs(batches: Iterable[Any], targets_key: str = "labels") -> Iterator[tuple[Inputs, Tensor]]:
    """Inputs and targets of every batch of any iterable.

    A batch is a pair ``(inputs, targets)``, or a dictionary that is given to the model whole and
    has its targets under ``targets_key``.

    Raises:
        TypeError: If the batches are not iterable, or a batch is neither a pair nor a dictionary.
    """
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"Expected an iterable of batches (a DataLoader, a list, a generator), got {type(batches).__name__}."
        )
    for batch in batches:
        if isinstance(batch, Mapping):
            if targets_key not in batch:
                raise TypeError(
                    f"Expected a batch with its targets under {targets_key!r}, got the keys {sorted(batch)}. "
                    "Name the right one with dict_key_y."
                )
            yield batch, batch[targets_key]
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            yield batch[0], batch[1]
        else:
            kind = (
                f"{type(batch).__name__} of length {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
            )
            raise TypeError(
                f"Expected batches that are pairs (inputs, targets) or dictionaries, got a {kind}. "
                "Wrap the loader in a generator that yields (inputs, targets)."
            )


def labelled(batches: Iterable[Any], targets_key: str = "labels") -> Iterator[tuple[Inputs, Tensor, int]]:
    """Inputs, targets and the number of data of every batch.

    Raises:
        ValueError: If a batch has not one target for each of its inputs.
    """
    for inputs, targets in pairs(batches, targets_key):
        n, targets = count(inputs), torch.as_tensor(targets)
        if targets.ndim == 0 or len(targets) != n:
            raise ValueError(
                f"Expected one target for each of the {n} inputs of a batch, got targets of shape "
                f"{tuple(targets.shape)}."
            )
        yield inputs, targets, n


def head(batches: Iterable[Any], n: int, targets_key: str = "labels") -> Iterator[tuple[Inputs, Tensor]]:
    """The first n data of a loader, in its batches; no batch after them is asked for."""
    for inputs, targets, size in labelled(batches, targets_key):
        yield take(inputs, slice(0, n)), targets[:n]
        n -= size
        if n <= 0:
            return


def slices(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(n)``."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
