r"""A stream of batches becomes a weighted sample of it, dealt to folds.

Data are seen once: the loader may be a generator, may augment at random, may have no length. What
the fit needs again is kept, up to the budget. Weights make weighted sums of the sample, and of every fold, unbiased
for the mean over the whole stream, :math:`E[\sum_n w_n g_n] = \frac1N \sum_n g_n`, for g that do not depend on the
draw; those of a calibrated :class:`PrioritySampler` almost, for less noise. For g that some of the data have chosen
(directions) there are :attr:`Sample.self_weights`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from debiased_laplace import _checks, _data
from debiased_laplace.likelihoods import Likelihood

logger = logging.getLogger(__name__)

#: Outputs ``[n, C]`` of a batch ``(inputs, targets)`` of the stream. A sampler asks once for each batch, or never.
Observer = Callable[[_data.Inputs, Tensor], Tensor]

#: The fold of data that belong to all folds.
SHARED = -1


@dataclass(frozen=True)
class WeightedData:
    """Some of the data of a stream, with the weights that make them stand for all of it.

    Attributes:
        inputs: As the model takes them, ``n`` data.
        targets: ``[n, ...]``.
        weights: ``[n]``, float64; ``sum_n w_n g_n`` estimates the mean of ``g`` over the stream, without bias or, for
            calibrated weights, with one that vanishes with their number.
        indices: ``[n]``, positions in the stream.
    """

    inputs: _data.Inputs
    targets: Tensor
    weights: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def take(self, index: Tensor | slice) -> WeightedData:
        """Some of the data, with their weights as they are."""
        return WeightedData(
            _data.take(self.inputs, index), self.targets[index], self.weights[index], self.indices[index]
        )


@dataclass(frozen=True)
class Sample:
    r"""What a sampler keeps of a stream, without replacement.

    Every datum stands for itself with 1/N of its weight, and with the rest for data that were not drawn. Those that
    were kept for certain stand for themselves alone: they carry no sampling error, so that nothing can be overstated on
    them, and they belong to all folds. The others are dealt to the folds at random.

    Attributes:
        data: With the weights of the whole sample.
        folds: ``[n]``, the fold of every datum, or :data:`SHARED`.
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
        return torch.where(self.folds == SHARED, weights, weights.clamp_max(1 / max(self.n_seen, self.size)))

    def part_of(self, n_data: int | None, generator: torch.Generator) -> Sample:
        """The same sample of a training set of another size, of which the stream is a random part.

        Of a larger one, every datum of the stream stands for others too: none is kept for certain, and all are dealt
        to folds.
        """
        if n_data is None or n_data <= self.n_seen:
            return replace(self, n_data=n_data)
        folds = self.folds
        if bool((folds == SHARED).any()):
            folds = _dealt(torch.rand(len(folds), generator=generator, dtype=torch.float64), self.n_folds)
        return replace(self, folds=folds, n_data=n_data)

    def part(self, fold: int) -> WeightedData:
        """The data of one fold, or the shared ones (:data:`SHARED`), with the weights of the whole sample."""
        return self.data.take((self.folds == fold).nonzero()[:, 0])

    def factor(self, folds: Collection[int]) -> float:
        """By what the weights of these folds have to be multiplied, so that with the shared data they are unbiased."""
        own = sum(int((self.folds == fold).sum()) for fold in folds)
        return int((self.folds != SHARED).sum()) / own if own else 1.0

    def fold(self, folds: Collection[int]) -> WeightedData:
        """Data of some folds, shared ones included, with weights that are unbiased for the whole stream."""
        index = torch.isin(self.folds, torch.tensor([SHARED, *folds])).nonzero()[:, 0]
        own = self.data.take(index)
        weights = torch.where(self.folds[index] == SHARED, own.weights, own.weights * self.factor(folds))
        return replace(own, weights=weights)

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


class Sampler(Protocol):
    """Reads a stream of batches once and keeps a sample of it."""

    def draw(
        self,
        batches: Iterable[Any],
        folds: int,
        generator: torch.Generator,
        *,
        likelihood: Likelihood | None = None,
        observe: Observer | None = None,
        targets_key: str = "labels",
        progress_bar: bool = False,
    ) -> Sample:
        """A sample with that many folds.

        Args:
            batches: Any iterable of batches.
            folds: Number of folds.
            generator: Source of all randomness, on the CPU.
            likelihood: For samplers that look at the loss.
            observe: Gives the outputs of a batch, likewise.
            targets_key: Where dictionary-like batches have their targets.
            progress_bar: Show a tqdm bar.

        Raises:
            ValueError: If the stream is empty, or has fewer data than folds.
        """
        ...


@dataclass
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
        self._targets: list[Tensor] = []

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
            inputs, targets = _data.copy(inputs), targets.clone()
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

    def take(self, index: Tensor) -> Reservoir:
        """Some of what is kept; of the same stream."""
        taken = Reservoir(self.capacity)
        taken.n_seen, taken.total = self.n_seen, self.total
        inputs, targets = self.content()
        taken._keep(
            _data.take(inputs, index), targets[index], self.keys[index], self.scores[index], self.indices[index]
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

    def content(self) -> tuple[_data.Inputs, Tensor]:
        """Inputs and targets of what is kept."""
        return _data.concatenate(self._inputs), _data.joined_targets(self._targets)


@dataclass(frozen=True)
class UniformSampler:
    """Uniform draw without replacement, in one pass over a stream of unknown length.

    Every datum gets a uniform key, and the ``budget`` smallest keys are kept (reservoir sampling:
    Vitter 1985), so that no length and no random access are needed. The kept data are dealt to the
    folds in the order of their keys, which makes the folds disjoint, equally large and uniform.

    Attributes:
        budget: Number of data to keep in all folds together; ``None`` keeps all of them.
    """

    budget: int | None = 1024

    def __post_init__(self) -> None:
        _check_budget(self.budget, optional=True)

    def draw(
        self,
        batches: Iterable[Any],
        folds: int,
        generator: torch.Generator,
        *,
        likelihood: Likelihood | None = None,
        observe: Observer | None = None,
        targets_key: str = "labels",
        progress_bar: bool = False,
    ) -> Sample:
        """Read the stream and deal the kept data to folds; see :meth:`Sampler.draw`."""
        _check_folds(self.budget, folds)
        reservoir = _begun(batches, Reservoir(self.budget))
        for inputs, targets, n in _stream(batches, targets_key, progress_bar):
            keys = torch.rand(n, generator=generator, dtype=torch.float64)
            reservoir.offer(inputs, targets, keys, torch.ones(n, dtype=torch.float64))
        _check_counts(reservoir.n_seen, self.budget, folds)
        n = len(reservoir.keys)
        weights = torch.full((n,), 1 / n, dtype=torch.float64)
        return _sample(reservoir, weights, _dealt(reservoir.keys, folds), folds)


@dataclass(frozen=True)
class PrioritySampler:
    r"""Draw in proportion to the curvature that a datum can carry, in one pass over a stream of unknown length.

    On a trained network few data have any curvature left. The trace of the loss Hessian at the outputs,
    :math:`\omega_n = \mathrm{tr}\,\nabla^2_f \ell_n` and a small floor, tells which, and needs a forward pass only.
    With a uniform :math:`u_n`, the ``budget`` data of highest priority :math:`\omega_n / u_n` are kept, with weights
    :math:`\max(\omega_n, t) / (\omega_n N)` (Duffield, Lund, Thorup: Priority sampling for estimation of arbitrary
    subset sums, JACM 2007). With the next priority as threshold t they are exactly unbiased. ``calibrated``, the
    threshold is that for which the weighted sum of the kept :math:`\omega_n` is the sum over the stream, which is
    known: a ratio estimator, less noisy, with a bias that vanishes with the budget. For equal :math:`\omega_n` (a
    regression) the calibrated draw is the uniform one.

    Data whose :math:`\omega_n` is at least t and the next priority are kept for certain: they stand for themselves
    alone, and belong to all folds. If fewer others are left than there are folds, the first folds have none.

    Attributes:
        budget: Number of data to keep in all folds together.
        floor: What is added to every trace, so that every datum can be drawn.
        calibrated: Which threshold.
    """

    budget: int = 1024
    floor: float = 1e-6
    calibrated: bool = True

    def __post_init__(self) -> None:
        _check_budget(self.budget)
        _checks.positive(self.floor, "floor")

    def draw(
        self,
        batches: Iterable[Any],
        folds: int,
        generator: torch.Generator,
        *,
        likelihood: Likelihood | None = None,
        observe: Observer | None = None,
        targets_key: str = "labels",
        progress_bar: bool = False,
    ) -> Sample:
        """One forward pass over the stream; see :meth:`Sampler.draw`."""
        if likelihood is None or observe is None:
            raise TypeError("Expected likelihood and observe, which tell what curvature a datum has, got None.")
        _check_folds(self.budget, folds)
        reservoir = _begun(batches, Reservoir(self.budget + 1))  # the next priority is the threshold
        for inputs, targets, n in _stream(batches, targets_key, progress_bar):
            uniforms = torch.rand(n, generator=generator, dtype=torch.float64).clamp_min_(1e-300)
            traces = likelihood.curvature(observe(inputs, targets)).double().cpu()
            _checks.finite(traces, "the curvature of the loss", "Look for NaN in the outputs of the model.")
            scores = traces + self.floor
            reservoir.offer(inputs, targets, uniforms / scores, scores)
        # The whole stream within the budget belongs to all folds, however few data it has.
        _check_counts(reservoir.n_seen, self.budget, folds if reservoir.n_seen > self.budget else 1)
        return self._weighted(reservoir, folds, generator)

    def _weighted(self, reservoir: Reservoir, folds: int, generator: torch.Generator) -> Sample:
        kept, scores = len(reservoir.keys), reservoir.scores
        if kept <= self.budget:  # the whole stream
            next_priority = threshold = 0.0
        else:
            smallest = reservoir.keys.argsort(stable=True)[: self.budget].sort().values
            next_priority = 1 / float(reservoir.keys.max())
            reservoir, scores = reservoir.take(smallest), scores[smallest]
            threshold = calibrated_threshold(scores, reservoir.total) if self.calibrated else next_priority
        weights = scores.clamp_min(threshold) / (scores * reservoir.n_seen)
        certain = scores >= max(threshold, next_priority)  # below the next priority a datum was kept by chance
        assigned = torch.full((len(scores),), SHARED)
        # Keys are uniform only for equal scores: which fold a datum falls into is a draw of its own.
        assigned[~certain] = _dealt(torch.rand(int((~certain).sum()), generator=generator, dtype=torch.float64), folds)
        return _sample(reservoir, weights, assigned, folds)


def calibrated_threshold(scores: Tensor, total: float) -> float:
    r"""The t for which :math:`\sum_n \max(\omega_n, t)` over the kept data is a total.

    Args:
        scores: :math:`\omega_n` of the kept data, ``[n]``.
        total: Their sum over the whole stream, at least that over the kept data.
    """
    ordered = scores.sort(descending=True).values
    larger = ordered.cumsum(0) - ordered  # of those before each
    count = torch.arange(len(scores), 0, -1)
    thresholds = (total - larger) / count  # if this one and all smaller ones are below it
    return float(thresholds[(thresholds > ordered).nonzero()[0, 0]]) if bool((thresholds > ordered).any()) else 0.0


def _begun(batches: Any, reservoir: Reservoir) -> Reservoir:
    """The reservoir of a pass that was interrupted, if the batches know of one; or this, which they then know of."""
    resume = getattr(batches, "resume", None)
    return reservoir if resume is None else resume(reservoir)


def _stream(batches: Iterable[Any], targets_key: str, progress_bar: bool) -> Iterable[tuple[_data.Inputs, Tensor, int]]:
    # Not asked unless it is shown: torch complains about a length that was asked for and is wrong.
    stream, total = _data.labelled(batches, targets_key), _data.length(batches) if progress_bar else None
    return tqdm(stream, desc="Drawing data", unit="batch", total=total, disable=not progress_bar, leave=False)


def _check_budget(budget: Any, optional: bool = False) -> None:
    _checks.whole(budget, "budget", otherwise="None for all data" if optional else "")


def _check_counts(seen: int, budget: int | None, folds: int) -> None:
    if seen == 0:
        raise ValueError(
            "Expected at least one batch to fit on, got an empty loader. A generator can be read only once."
        )
    if seen < folds:
        raise ValueError(
            f"Expected at least {folds} data, one for each fold, got {seen}. Give more data, or use split=Single()."
        )
    if budget is not None and budget > seen:
        logger.info("The budget of %d exceeds the %d data of the loader: all of them are used.", budget, seen)


def _check_folds(budget: int | None, folds: int) -> None:
    if budget is not None and budget < folds:
        raise ValueError(f"Expected a budget of at least {folds} data, one for each fold, got {budget}.")


def _dealt(keys: Tensor, folds: int) -> Tensor:
    """Folds of equal size in a random order, that of the keys; of fewer data than folds the last, which measure."""
    assigned = torch.empty(len(keys), dtype=torch.int64)
    assigned[keys.argsort(stable=True)] = torch.arange(len(keys)) % folds + max(0, folds - len(keys))
    return assigned


def _sample(reservoir: Reservoir, weights: Tensor, assigned: Tensor, folds: int) -> Sample:
    inputs, targets = reservoir.content()
    return Sample(WeightedData(inputs, targets, weights, reservoir.indices), assigned, folds, reservoir.n_seen)
