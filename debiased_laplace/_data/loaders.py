"""What a loader yields becomes inputs, targets and a number of data; nothing that it says of its length is believed.

A batch is a pair ``(inputs, targets)``, a tuple of several inputs and, last, the targets, or a mapping (or an object)
that is inputs as a whole and has its targets under a name. Batches without data are passed over. ``docs/batches.md``
has the table of what comes and what is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace._data.batches import Assorted, Inputs, concatenate, count, map_tensors, take, tensors


def check_iterable(batches: Any) -> None:
    """Raise a ``TypeError`` for what is no iterable of batches."""
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"Expected an iterable of batches (a DataLoader, a list, a generator), got {type(batches).__name__}."
        )


def pairs(batches: Iterable[Any], targets_key: str = "labels") -> Iterator[tuple[Inputs, Any]]:
    """Inputs and targets of every batch of any iterable, as they came.

    Raises:
        TypeError: If the batches are not iterable, or a batch is neither a pair nor something that has its targets
            under ``targets_key``.
    """
    check_iterable(batches)
    for batch in batches:
        yield _pair(batch, targets_key)


def _pair(batch: Any, targets_key: str) -> tuple[Inputs, Any]:
    if isinstance(batch, Mapping):
        if targets_key not in batch:
            raise TypeError(
                f"Expected a batch with its targets under {targets_key!r}, got the keys {list(batch)}. "
                "Name the right one with dict_key_y (targets_key of fit), or pass targets_of=."
            )
        return batch, batch[targets_key]
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        names = getattr(batch, "_fields", ())
        last = names.index(targets_key) if targets_key in names else len(batch) - 1
        inputs = (*batch[:last], *batch[last + 1 :])
        return inputs if len(inputs) > 1 else inputs[0], batch[last]
    if not isinstance(batch, (Tensor, tuple, list)) and hasattr(batch, targets_key):
        return batch, getattr(batch, targets_key)
    kind = f"{type(batch).__name__} of length {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
    raise TypeError(
        f"Expected batches that are pairs (inputs, targets), several inputs with the targets last, or dictionaries, "
        f"got a {kind}. Wrap the loader in a generator that yields (inputs, targets), or pass inputs_of= and "
        "targets_of=, functions of a batch."
    )


@dataclass(frozen=True)
class Adapters:
    """Functions that say what is what in a batch, where it does not say it.

    Attributes:
        inputs_of: Gives what the model is given; None for what a batch has as inputs.
        targets_of: Gives the targets; likewise.

    Raises:
        TypeError: If they are no functions.
    """

    inputs_of: Callable[[Any], Inputs] | None = None
    targets_of: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        for name, function in vars(self).items():
            _checks.function(function, name)

    def batches(self, loader: Iterable[Any], targets_key: str = "labels") -> Iterable[Any]:
        """The batches of a loader as pairs of what the functions give; of an iterator another one."""
        if self == Adapters():
            return loader
        check_iterable(loader)
        made = _Adapted(loader, self, targets_key)
        return iter(made) if isinstance(loader, Iterator) else made

    def pair(self, batch: Any, targets_key: str = "labels") -> tuple[Inputs, Any]:
        """Inputs and targets of a batch.

        Raises:
            TypeError: If a function gives something else.
        """
        if self.inputs_of is not None:
            inputs = self.inputs_of(batch)
        else:
            inputs = _pair(batch, targets_key)[0] if isinstance(batch, (tuple, list)) else batch
        targets = _pair(batch, targets_key)[1] if self.targets_of is None else self.targets_of(batch)
        if not tensors(inputs):
            raise TypeError(
                "Expected inputs_of to give what the model is given (a tensor, a tuple of positional arguments, a "
                f"dictionary of keywords), got {type(inputs).__name__} without a tensor for a batch that is a "
                f"{type(batch).__name__}."
            )
        if targets is None or isinstance(targets, (str, Mapping)):
            raise TypeError(
                f"Expected targets_of to give the targets of a batch as a tensor, got {type(targets).__name__} for a "
                f"batch that is a {type(batch).__name__}."
            )
        return inputs, targets


@dataclass(frozen=True)
class _Adapted:
    """A loader seen through adapters, with what it says of its length and of the data behind it."""

    loader: Iterable[Any]
    adapters: Adapters
    targets_key: str

    def __iter__(self) -> Iterator[tuple[Inputs, Any]]:
        return (self.adapters.pair(batch, self.targets_key) for batch in self.loader)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    @property
    def dataset(self) -> Any:
        """That of the loader."""
        return self.loader.dataset  # type: ignore[attr-defined]


def labelled(batches: Iterable[Any], targets_key: str = "labels") -> Iterator[tuple[Inputs, Tensor, int]]:
    """Inputs, targets and the number of data of every batch that has any.

    What comes out takes no part in a graph of the caller's.

    Raises:
        TypeError: If inputs have no tensor, or targets are no numbers.
        ValueError: If a batch has not one target for each of its inputs.
    """
    for inputs, targets in pairs(batches, targets_key):
        n = count(inputs)
        targets = as_targets(targets, n, inputs)
        if n:
            yield without_graph(inputs), targets, n


def only(batch: Any, targets_key: str = "labels") -> tuple[Inputs, Tensor, int]:
    """Inputs, targets and the number of data of one batch, which may be none; raises what :func:`labelled` does."""
    ((inputs, targets),) = pairs([batch], targets_key)
    n = count(inputs)
    return without_graph(inputs), as_targets(targets, n, inputs), n


def is_one(batch: Any) -> bool:
    """Whether something is one batch ``(inputs, targets)`` or ``(inputs, ..., targets)`` rather than several."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        return False
    last = batch[-1]
    return not isinstance(last, Mapping) and (isinstance(last, Tensor) or not tensors(last))


def each(batch: Any) -> Iterator[tuple[Inputs, Tensor]]:
    """One batch, or those of a loader one after the other, as pairs; raises what :func:`labelled` does."""
    batches = [batch] if is_one(batch) or isinstance(batch, Mapping) else batch
    return ((inputs, targets) for inputs, targets, _ in labelled(batches))


def one_or_several(batch: Any) -> list[tuple[Inputs, Tensor]]:
    """One batch, or several of a loader that ends, as pairs of inputs and targets.

    Raises:
        ValueError: If there are no data; and what :func:`labelled` raises.
    """
    with_data = list(each(batch))
    if not with_data:
        raise ValueError("Expected a batch with data, or a list of such batches, got none.")
    return with_data


def without_graph(inputs: Inputs) -> Inputs:
    """The same data; detached if they require gradients."""
    if not any(leaf.requires_grad for leaf in tensors(inputs)):
        return inputs
    return map_tensors(torch.Tensor.detach, inputs)


def as_targets(targets: Any, n: int, inputs: Inputs = None) -> Tensor:
    """Targets as a tensor ``[n, ...]``: of numbers, of arrays, or of tensors; a single datum may lack its dimension.

    Args:
        targets: As they came.
        n: Number of data.
        inputs: To say more where there are as many inputs of the model as targets.

    Raises:
        TypeError: If they are no numbers.
        ValueError: If there is not one for each datum.
    """
    try:
        several = isinstance(targets, (list, tuple)) and any(isinstance(target, Tensor) for target in targets)
        if several:
            rows = torch.stack(list(targets))
        else:  # Python's numbers in double precision
            rows = targets if isinstance(targets, Tensor) else torch.from_numpy(np.array(targets))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"Expected targets that are a tensor, an array or numbers, got {type(targets).__name__}: {error} "
            "Wrap the loader in a generator that yields (inputs, targets)."
        ) from error
    with torch.inference_mode(False):  # autograd cannot use tensors made in inference mode
        rows = rows.clone() if rows.is_inference() else rows.detach()
    if n == 1 and (rows.ndim == 0 or (rows.ndim == 1 and len(rows) > 1)):  # squeezed
        rows = rows[None]
    if rows.ndim == 0 or len(rows) != n:
        reason = ""
        if isinstance(inputs, (list, tuple)) and rows.ndim and len(rows) == len(inputs):
            reason = (
                f" A {type(inputs).__name__} of tensors is taken for several inputs of the model, each with all data "
                "along its first dimension; put data of different shapes into separate batches."
            )
        elif rows.ndim == 0:
            reason = " A loader with batch_size=None yields single data: let it make batches."
        raise ValueError(
            f"Expected one target for each of the {n} inputs of a batch, got targets of shape {tuple(rows.shape)}."
            + reason
        )
    return rows


def joined_targets(parts: Sequence[Inputs]) -> Inputs:
    """Targets of several batches, in the shape of the first: ``[n]`` and ``[n, 1]`` go together.

    Those of dense outputs, ``[n, S, ...]`` with other numbers of sites in some batches than in others, are assorted.

    Raises:
        ValueError: If a datum has other numbers of targets in some batches than in others.
    """
    parts = [part for part in parts if count(part)] or parts[:1]  # those of no data may have any shape
    each = [tensor for part in parts for tensor in tensors(part)]
    shapes = {tuple(tensor.shape[1:]) for tensor in each}
    if len({len(shape) for shape in shapes}) == 1 < len({math.prod(shape) for shape in shapes}):
        return concatenate(parts)
    if any(isinstance(part, Assorted) for part in parts):
        return concatenate(parts)
    first = parts[0].shape[1:]
    if any(part.shape[1:].numel() != first.numel() for part in parts):
        raise ValueError(
            "Expected as many targets for each datum in all batches, got shapes "
            f"{list(dict.fromkeys(tuple(part.shape) for part in parts))}. Look at how the loader makes its last batch."
        )
    return torch.cat([part.reshape(len(part), *first) for part in parts])


def head(batches: Iterable[Any], n: int, targets_key: str = "labels") -> Iterator[tuple[Inputs, Tensor]]:
    """The first n data of a loader, in its batches; no batch after them is asked for."""
    for inputs, targets, size in labelled(batches, targets_key):
        yield take(inputs, slice(0, n)), targets[:n]
        n -= size
        if n <= 0:
            return


def length(iterable: Any) -> int | None:
    """What a loader or a data set says of its length; None if it has none, or fails where it is asked."""
    try:
        return len(iterable)
    except Exception:  # chained streams, samplers and classes of the user's raise anything
        return None


def dataset_length(loader: Any) -> int | None:
    """Likewise what the data set behind a loader says, which need not be what the loader yields."""
    try:
        return length(loader.dataset)
    except Exception:  # no such attribute, or one that fails
        return None
