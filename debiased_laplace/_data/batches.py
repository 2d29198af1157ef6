"""Cutting, joining and moving inputs of any nesting (a tensor, a dictionary, a tuple, an object).

Only the first dimension has a meaning here: it counts the data.

Besides tensors an input may hold other things. What has an entry for each datum (a list of as many entries as there are
data, a tuple of as many strings, a NumPy array) is cut and joined with the data; anything else, numbers and tensors
without dimensions among them, belongs to the batch and stays with its data. Data of batches that differ in their shapes
(sequences of different lengths), their types or such things are never put into one batch: joined, they are
:class:`Assorted`, nothing is padded, and :func:`chunks` gives them to the model in batches that are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from debiased_laplace._data import nesting

Inputs = Any  # a tensor, or a nesting of dictionaries, lists and tuples with tensors at the leaves


@dataclass(frozen=True)
class Assorted:
    """Data that do not go into one batch, in any order.

    Attributes:
        parts: Inputs that are alike.
        part_of: ``[n]``, the part that every datum is in.
        row_of: ``[n]``, its position there.
    """

    parts: tuple[Inputs, ...]
    part_of: Tensor
    row_of: Tensor

    def positions(self, part: int) -> Tensor:
        """Where the data of a part are among all."""
        return (self.part_of == part).nonzero()[:, 0]

    def in_order(self, values: Tensor, dim: int = 0) -> Tensor:
        """What was computed of one part after the other, in the order of the data."""
        positions = torch.cat([_in_rows(self, number) for number in range(len(self.parts))])
        return values.index_select(dim, positions.argsort().to(values.device))

    def take(self, index: Tensor | slice) -> Inputs:
        """Some of the data; no longer assorted if they are alike."""
        index = index.to(self.part_of.device) if isinstance(index, Tensor) else index
        part_of, row_of = self.part_of[index], self.row_of[index]
        batches, where = [], []
        for number in part_of.unique().tolist() or [0]:
            where.append((part_of == number).nonzero()[:, 0])
            batches.append(take(self.parts[number], row_of[where[-1]]))
        return _assort(batches, where)


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply a function to every tensor of an input, keeping its nesting."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Assorted):
        return replace(inputs, parts=tuple(map_tensors(function, part) for part in inputs.parts))
    return nesting.mapped(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, inputs)


def tensors(inputs: Inputs) -> list[Tensor]:
    """All tensors of an input."""
    if isinstance(inputs, Assorted):
        return [leaf for part in inputs.parts for leaf in tensors(part)]
    return [leaf for leaf in nesting.leaves(inputs) if isinstance(leaf, Tensor)]


def count(inputs: Inputs) -> int:
    """Number of data in a batch: the length of the first dimension, the same for all tensors that have one.

    Raises:
        TypeError: If there is no tensor in the input, or a nested one, which has no such dimension to cut along.
        ValueError: If the tensors disagree.
    """
    if isinstance(inputs, Assorted):
        return len(inputs.part_of)
    all_tensors = tensors(inputs)
    if any(leaf.is_nested for leaf in all_tensors):
        raise TypeError(
            "Expected dense tensors as inputs, got a nested one (torch.nested), which cannot be cut into data. Let the "
            "loader pad it (nested.to_padded_tensor(0.0), with a mask if the model takes one), or yield data of one "
            "length in a batch: lengths may differ between batches."
        )
    if not all_tensors:
        raise TypeError(
            f"Expected inputs that are a tensor or a nesting of tensors, got {type(inputs).__name__}. "
            "Let the loader yield (inputs, targets) with tensors in the inputs."
        )
    lengths = {leaf.shape[0] for leaf in all_tensors if leaf.ndim}
    if len(lengths) != 1:
        raise ValueError(
            "Expected all tensors of an input to have the data along their first dimension, got shapes "
            f"{[tuple(leaf.shape) for leaf in all_tensors]}. Put the batch dimension first everywhere. Sequences in "
            "one flat tensor with offsets (for nn.EmbeddingBag, say) have no rows that could be drawn: let the collate "
            "function pad them to [N, T] and give their lengths [N], and wrap the model in a module whose forward "
            "makes the flat tensor of both."
        )
    return lengths.pop()


def _has_entries(n: int) -> Callable[[Any], bool]:
    """Whether something in a batch of n data, other than a tensor, has an entry for each of them."""

    def has_entries(node: Any) -> bool:
        if isinstance(node, np.ndarray):
            return node.ndim > 0 and len(node) == n
        if isinstance(node, tuple):  # of numbers, a tuple is rather a size; strings of data come as lists and as tuples
            return type(node) is tuple and len(node) == n and all(isinstance(entry, (str, bytes)) for entry in node)
        return isinstance(node, list) and len(node) == n and not tensors(node)

    return has_entries


def take(inputs: Inputs, index: Tensor | slice) -> Inputs:
    """The data at the given positions of a batch."""
    if isinstance(inputs, Assorted):
        return inputs.take(index)

    def rows(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return (leaf[index.to(leaf.device) if isinstance(index, Tensor) else index]) if leaf.ndim else leaf
        if not has_entries(leaf):
            return leaf
        if isinstance(leaf, np.ndarray):
            return leaf[index.cpu().numpy() if isinstance(index, Tensor) else index]
        chosen = range(len(leaf))[index] if isinstance(index, slice) else index.tolist()
        return nesting.sequence(leaf, [leaf[i] for i in chosen])

    if isinstance(inputs, Tensor):
        return rows(inputs)
    has_entries = _has_entries(count(inputs))
    return nesting.mapped(rows, inputs, has_entries)


def concatenate(batches: Sequence[Inputs]) -> Inputs:
    """Join batches along the data; they are :class:`Assorted` if they are not alike, and nothing is padded."""
    pieces: list[Inputs] = []
    where: list[Tensor] = []
    start = 0
    for batch in batches:
        n = count(batch)
        if isinstance(batch, Assorted):
            pieces += batch.parts
            where += [start + _in_rows(batch, number) for number in range(len(batch.parts))]
        else:
            pieces.append(batch)
            where.append(start + torch.arange(n))
        start += n
    return _assort(pieces, where)


def _in_rows(inputs: Assorted, part: int) -> Tensor:
    """Positions of the data of a part in the order of its rows."""
    positions = inputs.positions(part)
    return positions[inputs.row_of[positions].argsort()]


def _assort(batches: Sequence[Inputs], where: Sequence[Tensor]) -> Inputs:
    """Batches as one, or as several of data that are alike.

    Args:
        batches: Inputs that are alike within each of them.
        where: For each, the positions of its data in the result.
    """
    kinds: dict[Any, list[int]] = {}
    for number, batch in enumerate(batches):
        if len(where[number]) or not any(map(len, where)):  # none of a kind only where there is nothing else
            kinds.setdefault(_kind(batch), []).append(number)
    parts = []
    part_of = torch.empty(sum(map(len, where)), dtype=torch.int64)
    row_of = part_of.clone()
    for number, members in enumerate(kinds.values()):
        positions = torch.cat([where[i] for i in members])
        part_of[positions], row_of[positions] = number, torch.arange(len(positions))
        parts.append(_joined([batches[i] for i in members]))
    if len(parts) > 1:
        return Assorted(tuple(parts), part_of, row_of)
    in_order = bool((row_of.diff() == 1).all())
    return parts[0] if in_order else take(parts[0], row_of)


def _joined(batches: Sequence[Inputs]) -> Inputs:
    """One batch of batches that are alike."""
    if len(batches) == 1:
        return batches[0]
    if isinstance(batches[0], Tensor):
        return torch.cat(list(batches))
    predicates = [_has_entries(count(batch)) for batch in batches]
    columns = zip(*map(nesting.leaves, batches, predicates), strict=True)

    def joined(parts: Sequence[Any]) -> Any:
        first = parts[0]
        if isinstance(first, Tensor):
            return torch.cat(list(parts)) if first.ndim else first
        if not predicates[0](first):
            return first
        if isinstance(first, np.ndarray):
            return np.concatenate(parts)
        return nesting.sequence(first, [entry for part in parts for entry in part])

    results = iter([joined(parts) for parts in columns])
    return nesting.mapped(lambda _: next(results), batches[0], predicates[0])


def _kind(inputs: Inputs) -> Any:
    """Equal for batches that can be one: the same nesting, shapes and types, and the same things of the whole batch."""
    has_entries = _has_entries(count(inputs))

    def describe(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            alike: Any = tuple(leaf.shape[1:]) if leaf.ndim else leaf.item()
            return "tensor", alike, leaf.dtype, leaf.device
        if isinstance(leaf, np.ndarray):
            alike = leaf.shape[1:] if has_entries(leaf) else (leaf.shape, leaf.tobytes())
            return "array", alike, leaf.dtype
        if has_entries(leaf):
            return "entries", type(leaf)
        return type(leaf), leaf if isinstance(leaf, Hashable) else id(leaf)

    return nesting.shape(inputs, describe, has_entries)


def columns(inputs: Inputs) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Inputs]] | None:
    """The tensors that have an entry for each datum, and how to put others into their places.

    None if something else than tensors has entries for the data.
    """
    has_entries = _has_entries(count(inputs))
    every = nesting.leaves(inputs, has_entries)
    if any(not isinstance(leaf, Tensor) and has_entries(leaf) for leaf in every):
        return None

    def rebuilt(others: Sequence[Tensor]) -> Inputs:
        values = iter(others)
        return map_tensors(lambda leaf: next(values) if leaf.ndim else leaf, inputs)

    return [leaf for leaf in every if isinstance(leaf, Tensor) and leaf.ndim], rebuilt


def chunks(inputs: Inputs, size: int) -> Iterator[slice | Tensor]:
    """Positions of at most ``size`` data that are alike, until there were all of them."""
    if not isinstance(inputs, Assorted):
        yield from slices(count(inputs), size)
        return
    for number in range(len(inputs.parts)):
        yield from inputs.positions(number).split(size)


def some(inputs: Inputs, n: int) -> Inputs:
    """At most n data that are alike; of assorted ones the first of those with most numbers."""
    return take(inputs, positions_of_some(inputs, n))


def positions_of_some(inputs: Inputs, n: int) -> slice | Tensor:
    """Where the data of :func:`some` are among all."""
    if isinstance(inputs, Assorted):
        number = max(range(len(inputs.parts)), key=lambda number: size_of_datum(inputs.parts[number]))
        return _in_rows(inputs, number)[:n]
    return slice(0, n)


def at_least(inputs: Inputs, n: int) -> Inputs:
    """The data, the first of them again and again after them if there are fewer than n."""
    available = count(inputs)
    return inputs if available >= n or not available else take(inputs, torch.arange(n) % available)


def size_of_datum(inputs: Inputs) -> int:
    """How many numbers a datum has in all tensors, the largest one."""
    if isinstance(inputs, Assorted):
        return max(size_of_datum(part) for part in inputs.parts)
    return sum(math.prod(leaf.shape[1:]) for leaf in tensors(inputs) if leaf.ndim)


def sizes(inputs: Inputs) -> Tensor:
    """The same of every datum, ``[n]``."""
    if not isinstance(inputs, Assorted):
        return torch.full((count(inputs),), size_of_datum(inputs))
    of_parts = torch.tensor([size_of_datum(part) for part in inputs.parts])
    return of_parts[inputs.part_of.cpu()]


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Move a batch; tensors created in inference mode are copied, since autograd cannot use them."""

    def move(leaf: Tensor) -> Tensor:
        leaf = leaf.to(device, non_blocking=device.type != "cpu")  # the CPU would read before it is there
        return leaf.clone() if leaf.is_inference() else leaf

    with torch.inference_mode(False):  # a copy made in inference mode would be no better
        return map_tensors(move, inputs)


def copy(inputs: Inputs) -> Inputs:
    """A copy of a batch, for models that overwrite their inputs in place."""
    if isinstance(inputs, (Tensor, Assorted)):
        return map_tensors(torch.clone, inputs)

    def copied(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    return nesting.mapped(copied, inputs)


def slices(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(n)``."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
