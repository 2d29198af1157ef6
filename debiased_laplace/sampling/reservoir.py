"""The data of a stream with the largest keys: a draw in one pass, which merges with others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace._ranks import Ranks


class Reservoir:
    """The data of smallest keys in a stream of unknown length (Vitter 1985).

    What is kept does not depend on how a stream is cut: reservoirs of two parts, added, are the reservoir of both.

    Attributes:
        capacity: How many to keep; None for all.
        keys: ``[n]``, float64, in the order of the stream.
        scores: ``[n]``, float64, whatever the key was made from.
        indices: ``[n]``, positions in the stream.
        n_seen: Number of data in the stream.
        total: Sum of the scores over the stream.
    """

    capacity: int | None
    keys: Tensor
    scores: Tensor
    indices: Tensor
    n_seen: int = 0
    total: float = 0.0

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.keys = torch.empty(0, dtype=torch.float64)
        self.scores = torch.empty(0, dtype=torch.float64)
        self.indices = torch.empty(0, dtype=torch.int64)
        self._inputs: list[_data.Inputs] = []
        self._targets: list[_data.Inputs] = []

    def offer(self, inputs: _data.Inputs, targets: Tensor, keys: Tensor, scores: Tensor) -> None:
        """Look at the next batch of the stream, and keep what belongs to the smallest keys so far."""
        position = torch.arange(self.n_seen, self.n_seen + len(keys))
        self.n_seen += len(keys)
        self.total += float(scores.sum())
        if self.capacity is not None and len(self.keys) >= self.capacity:
            where = (keys < self.keys.max()).nonzero()[:, 0]
            if not len(where):
                return
            keys, scores, position = keys[where], scores[where], position[where]
            inputs, targets = _data.take(inputs, where), _data.take(targets, where)
        else:  # a loader may use the memory of a batch again
            inputs, targets = _data.copy(inputs), _data.copy(targets)
        self._keep(inputs, targets, keys, scores, position)

    def _keep(self, inputs: _data.Inputs, targets: Tensor, keys: Tensor, scores: Tensor, indices: Tensor) -> None:
        self._inputs.append(inputs)
        self._targets.append(targets)
        self.keys, self.scores = torch.cat([self.keys, keys]), torch.cat([self.scores, scores])
        self.indices = torch.cat([self.indices, indices])
        if self.capacity is not None and len(self.keys) > self.capacity:
            smallest = self.keys.argsort(stable=True)[: self.capacity].sort().values  # in the order of the stream
            self._inputs = [_data.take(_data.concatenate(self._inputs), smallest)]
            self._targets = [_data.take(_data.joined_targets(self._targets), smallest)]
            self.keys, self.scores = self.keys[smallest], self.scores[smallest]
            self.indices = self.indices[smallest]

    def __add__(self, other: Reservoir) -> Reservoir:
        """The reservoir of both parts of a stream, this one first."""
        joined = Reservoir(self.capacity)
        joined.n_seen, joined.total = self.n_seen + other.n_seen, self.total + other.total
        for part, offset in ((self, 0), (other, self.n_seen)):
            if len(part.keys):
                joined._keep(*part.content(), part.keys, part.scores, part.indices + offset)
        return joined

    def merged(self, ranks: Ranks, positions: Tensor) -> Reservoir:
        """That of the streams of all processes together, the same in each of them.

        Args:
            ranks: The processes.
            positions: In the stream of all of them, of the data of this one's.
        """
        keys, mine = torch.cat(ranks.gather(self.keys)), self
        if self.capacity is not None and len(keys) > self.capacity:
            mine = self.take((self.keys <= keys.sort().values[self.capacity - 1]).nonzero()[:, 0])
        joined = Reservoir(self.capacity)
        state = mine.state() | {"indices": positions[mine.indices]}
        if state["content"] is not None:  # of all processes in one memory
            state["content"] = tuple(_data.to_device(part, torch.device("cpu")) for part in state["content"])
        for part in map(Reservoir.of, ranks.gather(state)):
            joined.n_seen, joined.total = joined.n_seen + part.n_seen, joined.total + part.total
            if len(part.keys):
                joined._keep(*part.content(), part.keys, part.scores, part.indices)
        return joined.take(joined.indices.argsort())

    def take(self, index: Tensor) -> Reservoir:
        """Some of what is kept; of the same stream."""
        taken = Reservoir(self.capacity)
        taken.n_seen, taken.total = self.n_seen, self.total
        if not len(self.keys):
            return taken
        inputs, targets = self.content()
        taken._keep(
            _data.take(inputs, index),
            _data.take(targets, index),
            self.keys[index],
            self.scores[index],
            self.indices[index],
        )
        return taken

    def copy(self) -> Reservoir:
        """As it is now."""
        taken = copy.copy(self)
        taken._inputs, taken._targets = list(self._inputs), list(self._targets)
        return taken

    def state(self) -> dict[str, Any]:
        """Everything, as plain containers; :meth:`of` is the inverse."""
        named = {name: getattr(self, name) for name in ("capacity", "keys", "scores", "indices", "n_seen", "total")}
        return named | {"content": self.content() if len(self.keys) else None}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Reservoir:
        """The reservoir of a :meth:`state`."""
        made = cls(state["capacity"])
        made.n_seen, made.total = state["n_seen"], state["total"]
        if state["content"] is not None:
            inputs, targets = state["content"]
            made._keep(inputs, targets, state["keys"], state["scores"], state["indices"])
        return made

    def content(self) -> tuple[_data.Inputs, _data.Inputs]:
        """Inputs and targets of what is kept."""
        return _data.concatenate(self._inputs), _data.joined_targets(self._targets)
