"""Weighted data of a stream, dealt to folds (docs/theory.md, "What a datum stands for", equation (6))."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from debiased_laplace import _data

#: The fold of data that belong to all folds.
IN_ALL_FOLDS = -1


@dataclass(frozen=True)
class WeightedData:
    """Some of the data of a stream, with the weights that make them stand for all of it.

    Attributes:
        inputs: As the model takes them, ``n`` data.
        targets: ``[n, ...]``; assorted, of dense outputs with other numbers of sites for some data than for others.
        weights: ``[n]``, float64; ``sum_n w_n g_n`` estimates the mean of ``g`` over the stream, without bias or, for
            calibrated weights, with one that vanishes with their number.
        indices: ``[n]``, positions in the stream.
    """

    inputs: _data.Inputs
    targets: _data.Inputs
    weights: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def take(self, index: Tensor | slice) -> WeightedData:
        """Some of the data, with their weights as they are."""
        return WeightedData(
            _data.take(self.inputs, index), _data.take(self.targets, index), self.weights[index], self.indices[index]
        )


@dataclass(frozen=True)
class Sample:
    r"""What a sampler keeps of a stream, without replacement.

    Every datum stands for itself with 1/N of its weight, and with the rest for data that were not drawn. Those that
    were kept for certain stand for themselves alone: they carry no sampling error, so that nothing can be overstated on
    them, and they belong to all folds. The others are dealt to the folds at random.

    Attributes:
        data: With the weights of the whole sample.
        folds: ``[n]``, the fold of every datum, or :data:`IN_ALL_FOLDS`.
        n_folds: Number of folds.
        n_seen: Number of data in the stream.
        n_data: Size of the training set that the stream is a part of (:meth:`part_of`); None if it is all of it.
    """

    data: WeightedData
    folds: Tensor
    n_folds: int
    n_seen: int
    n_data: int | None = None

    @property
    def size(self) -> int:
        """Number of training data that the sample stands for."""
        return self.n_seen if self.n_data is None else self.n_data

    @property
    def self_weights(self) -> Tensor:
        """``[n]``, the part of every weight with which a datum stands for itself; the rest is for others."""
        weights = self.data.weights
        return torch.where(self.folds == IN_ALL_FOLDS, weights, weights.clamp_max(1 / max(self.n_seen, self.size)))

    def part_of(self, n_data: int | None, generator: torch.Generator) -> Sample:
        """The same sample of a training set of another size, of which the stream is a random part.

        Of a larger one, every datum of the stream stands for others too: none is kept for certain, and all are dealt
        to folds.
        """
        if n_data is None or n_data <= self.n_seen:
            return replace(self, n_data=n_data)
        folds = self.folds
        if bool((folds == IN_ALL_FOLDS).any()):
            folds = deal(torch.rand(len(folds), generator=generator, dtype=torch.float64), self.n_folds)
        return replace(self, folds=folds, n_data=n_data)

    def part(self, fold: int) -> WeightedData:
        """The data of one fold, or the shared ones (:data:`IN_ALL_FOLDS`), with the weights of the whole sample."""
        return self.data.take((self.folds == fold).nonzero()[:, 0])

    def factor(self, folds: Collection[int]) -> float:
        """By what the weights of these folds have to be multiplied, so that with the shared data they are unbiased."""
        n = sum(int((self.folds == fold).sum()) for fold in folds)
        return int((self.folds != IN_ALL_FOLDS).sum()) / n if n else 1.0

    def fold(self, folds: Collection[int]) -> WeightedData:
        """Data of some folds, shared ones included, with weights that are unbiased for the whole stream."""
        index = torch.isin(self.folds, torch.tensor([IN_ALL_FOLDS, *folds])).nonzero()[:, 0]
        data = self.data.take(index)
        weights = torch.where(self.folds[index] == IN_ALL_FOLDS, data.weights, data.weights * self.factor(folds))
        return replace(data, weights=weights)

    def __add__(self, other: Sample) -> Sample:
        """The sample of both streams, one after the other, fold by fold, for both training sets."""
        if self.n_folds != other.n_folds:
            raise ValueError(f"Expected a sample with {self.n_folds} folds, got one with {other.n_folds}.")
        n_seen, size = self.n_seen + other.n_seen, self.size + other.size
        one, two = self.data, other.data
        data = WeightedData(
            _data.concatenate([one.inputs, two.inputs]),
            _data.joined_targets([one.targets, two.targets]),
            torch.cat([one.weights * (self.size / size), two.weights * (other.size / size)]),
            torch.cat([one.indices, two.indices + self.n_seen]),
        )
        n_data = None if self.n_data is other.n_data is None else size
        return Sample(data, torch.cat([self.folds, other.folds]), self.n_folds, n_seen, n_data)


def deal(keys: Tensor, folds: int) -> Tensor:
    """Folds of equal size in a random order, that of the keys; of fewer data than folds the last, which measure."""
    assigned = torch.empty(len(keys), dtype=torch.int64)
    assigned[keys.argsort(stable=True)] = torch.arange(len(keys)) % folds + max(0, folds - len(keys))
    return assigned
