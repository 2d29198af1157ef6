r"""A stream of batches becomes folds of weighted data.

Data are seen once: the loader may be a generator, may augment at random, may have no length. What
the fit needs again is kept, up to the budget. A fold's weights make weighted sums unbiased for the
mean over the whole stream, :math:`E[\sum_n w_n g_n] = \frac1N \sum_n g_n`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from debiased_laplace import _data
from debiased_laplace.likelihoods import Likelihood

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightedData:
    """Some of the data of a stream, with the weights that make them stand for all of it.

    Attributes:
        inputs: As the model takes them, ``n`` data.
        targets: ``[n, ...]``.
        weights: ``[n]``, float64; ``sum_n w_n g_n`` is unbiased for the mean of ``g`` over the stream.
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

    @staticmethod
    def union(folds: list[WeightedData]) -> WeightedData:
        """Data of several disjoint folds: the mean of their estimates, each weighted by its size."""
        if len(folds) == 1:
            return folds[0]
        n = sum(len(fold) for fold in folds)
        return WeightedData(
            _data.concatenate([fold.inputs for fold in folds]),
            torch.cat([fold.targets for fold in folds]),
            torch.cat([fold.weights * (len(fold) / n) for fold in folds]),
            torch.cat([fold.indices for fold in folds]),
        )


class Sampler(Protocol):
    """Reads a stream of batches once and keeps folds of it."""

    def draw(
        self,
        batches: Iterable[Any],
        folds: int,
        generator: torch.Generator,
        *,
        likelihood: Likelihood | None = None,
        targets_key: str = "labels",
        progress_bar: bool = False,
    ) -> tuple[list[WeightedData], int]:
        """Disjoint folds of weighted data, and the number of data seen."""
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
        if self.budget is not None and (not isinstance(self.budget, int) or self.budget < 1):
            raise ValueError(f"Expected a budget of at least one datum, or None for all data, got {self.budget!r}.")

    def draw(
        self,
        batches: Iterable[Any],
        folds: int,
        generator: torch.Generator,
        *,
        likelihood: Likelihood | None = None,
        targets_key: str = "labels",
        progress_bar: bool = False,
    ) -> tuple[list[WeightedData], int]:
        """Read the stream and deal the kept data to folds.

        Args:
            batches: Any iterable of batches.
            folds: Number of folds.
            generator: Source of the keys, on the CPU.
            likelihood: Unused here; samplers that look at the loss need it.
            targets_key: Where dictionary-like batches have their targets.
            progress_bar: Show a tqdm bar.

        Returns:
            The folds, and the number of data seen in the stream.

        Raises:
            ValueError: If the stream is empty, or has fewer data than folds.
        """
        kept_inputs: list[_data.Inputs] = []
        kept_targets: list[Tensor] = []
        keys = torch.empty(0, dtype=torch.float64)
        indices = torch.empty(0, dtype=torch.int64)
        seen = 0
        stream = _data.labelled(batches, targets_key)
        for inputs, targets, n in tqdm(
            stream, desc="Drawing data", unit="batch", disable=not progress_bar, leave=False
        ):
            new = torch.rand(n, generator=generator, dtype=torch.float64)
            position = torch.arange(seen, seen + n)
            seen += n
            if self.budget is not None and len(keys) >= self.budget:
                below = new < keys.max()
                if not bool(below.any()):
                    continue
                new, position = new[below], position[below]
                where = below.nonzero()[:, 0]
                inputs, targets = _data.take(inputs, where), _data.take(targets, where)
            kept_inputs.append(inputs)
            kept_targets.append(targets)
            keys, indices = torch.cat([keys, new]), torch.cat([indices, position])
            if self.budget is not None and len(keys) > self.budget:
                smallest = keys.argsort()[: self.budget].sort().values  # kept in the order of the stream
                kept_inputs = [_data.take(_data.concatenate(kept_inputs), smallest)]
                kept_targets = [_data.take(torch.cat(kept_targets), smallest)]
                keys, indices = keys[smallest], indices[smallest]
        if seen == 0:
            raise ValueError(
                "Expected at least one batch to fit on, got an empty loader. A generator can be read only once."
            )
        if seen < folds:
            raise ValueError(
                f"Expected at least {folds} data, one for each fold, got {seen}. Give more data, or use split=Single()."
            )
        if self.budget is not None and self.budget < folds:
            raise ValueError(f"Expected a budget of at least {folds} data, one for each fold, got {self.budget}.")
        if self.budget is not None and self.budget > seen:
            logger.info("The budget of %d exceeds the %d data of the loader: all of them are used.", self.budget, seen)
        all_inputs, all_targets = _data.concatenate(kept_inputs), torch.cat(kept_targets)
        dealt = keys.argsort()
        drawn = []
        for fold in range(folds):
            own = dealt[fold::folds].sort().values
            weights = torch.full((len(own),), 1 / len(own), dtype=torch.float64)
            drawn.append(WeightedData(_data.take(all_inputs, own), _data.take(all_targets, own), weights, indices[own]))
        return drawn, seen
