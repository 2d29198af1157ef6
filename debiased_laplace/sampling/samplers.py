r"""A stream of batches becomes a weighted sample of it, dealt to folds.

Data are seen once: the loader may be a generator, may augment at random, may have no length. What
the fit needs again is kept, up to the budget. Weights make weighted sums of the sample, and of every fold, unbiased
for the mean over the whole stream, :math:`E[\sum_n w_n g_n] = \frac1N \sum_n g_n`, for g that do not depend on the
draw; those of a calibrated :class:`PrioritySampler` almost, for less noise. For g that some of the data have chosen
(directions) there are :attr:`~debiased_laplace.sampling.sample.Sample.self_weights`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from debiased_laplace import _checks, _data
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.sampling.reservoir import Reservoir
from debiased_laplace.sampling.sample import IN_ALL_FOLDS, Sample, WeightedData, deal

logger = logging.getLogger(__name__)

#: Outputs ``[n, C]`` of a batch ``(inputs, targets)`` of the stream. A sampler asks once for each batch, or never.
Observer = Callable[[_data.Inputs, Tensor], Tensor]


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
            keys = _uniforms(batches, n, generator)
            reservoir.offer(inputs, targets, keys, torch.ones(n, dtype=torch.float64))
        reservoir = _ended(batches, reservoir)
        _check_counts(reservoir.n_seen, self.budget, folds)
        n = len(reservoir.keys)
        weights = torch.full((n,), 1 / n, dtype=torch.float64)
        return _sample(reservoir, weights, deal(reservoir.keys, folds), folds)


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
            uniforms = _uniforms(batches, n, generator).clamp_min_(1e-300)
            outputs = observe(inputs, targets)
            prepared = likelihood.prepare_targets(targets, outputs.shape[1]).to(outputs.device)
            traces = likelihood.curvature(outputs, prepared).double().cpu()
            _checks.finite(traces, "the curvature of the loss", "Look for NaN in the outputs of the model.")
            scores = traces + self.floor
            reservoir.offer(inputs, targets, uniforms / scores, scores)
        reservoir = _ended(batches, reservoir)
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
        assigned = torch.full((len(scores),), IN_ALL_FOLDS)
        # Keys are uniform only for equal scores: which fold a datum falls into is another draw.
        assigned[~certain] = deal(torch.rand(int((~certain).sum()), generator=generator, dtype=torch.float64), folds)
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


def _uniforms(batches: Any, n: int, generator: torch.Generator) -> Tensor:
    """Numbers for the data of the next batch, ``[n]``, which several processes draw by the positions of theirs."""
    uniforms = getattr(batches, "uniforms", None)
    return torch.rand(n, generator=generator, dtype=torch.float64) if uniforms is None else uniforms(n, generator)


def _ended(batches: Any, reservoir: Reservoir) -> Reservoir:
    """The reservoir of the streams of all processes, if the batches know of others."""
    merge = getattr(batches, "merge", None)
    return reservoir if merge is None else merge(reservoir)


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


def _sample(reservoir: Reservoir, weights: Tensor, assigned: Tensor, folds: int) -> Sample:
    inputs, targets = reservoir.content()
    return Sample(WeightedData(inputs, targets, weights, reservoir.indices), assigned, folds, reservoir.n_seen)
