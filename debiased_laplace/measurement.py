"""Directions from some folds, curvatures along them from others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.basis import Basis
from debiased_laplace.checkpoint import Progress
from debiased_laplace.curvatures import projected_curvatures
from debiased_laplace.gradients import CurvatureData, Network
from debiased_laplace.sampling import SHARED, Sample
from debiased_laplace.splits import Split
from debiased_laplace.stream import Observed
from debiased_laplace.structures import Structure

#: Chunks of data that are measured in one step; a fit can be interrupted between two steps.
STEP_CHUNKS = 16


class Measurement:
    """Statistics and curvatures of folds, each computed once, and kept where the fit has a checkpoint."""

    def __init__(
        self, structure: Structure, network: Network, data: CurvatureData, sample: Sample, observed: Observed | None,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._structure, self._network, self._sample, self._progress = structure, network, sample, progress
        self._observed = None if observed is None else observed.statistics
        self._parts = {
            fold: data if bool(own.all()) else data.take(own.nonzero()[:, 0])
            for fold in (SHARED, *range(sample.n_folds)) if bool((own := sample.folds == fold).any())
        }  # fmt: skip
        self._statistics: dict[int, Any] = {}

    def cross(self, split: Split, *, factored: bool) -> tuple[Basis, Tensor]:
        """The final directions, and curvatures along them, as the split says.

        Data that belong to all folds are measured along the final directions; the others along those of their round.
        """
        structure, rounds = self._structure, split.rounds
        needs = structure.data_dependent or all(own.directions == own.curvatures for own in rounds)
        basis = self._basis(split.final) if needs else structure.eigenbasis(self._network, None)
        parts: list[Tensor] = []
        for number, own in enumerate(rounds):
            along = basis if own.directions == split.final else self._basis(own.directions, like=basis)
            if factored or not structure.projects:
                values = self._estimate(own.curvatures).curvatures(along)
            else:
                weight = self._sample.factor(own.curvatures)
                values = sum(
                    weight * self._measured(fold, along, number) for fold in own.curvatures if fold in self._parts
                )
            if along is not basis:
                values = basis.by_rank(along, values) if split.average == "rank" else basis.diagonal_of(along, values)
            parts.append(values)
        curvatures = torch.stack(parts).mean(0)
        if SHARED in self._parts and not (factored or not structure.projects):
            curvatures = curvatures + self._measured(SHARED, basis, 0)
        return basis, curvatures

    def _basis(self, folds: Sequence[int], like: Basis | None = None) -> Basis:
        return self._structure.eigenbasis(self._network, self._estimate(folds), like)

    def _estimate(self, folds: Sequence[int]) -> Any:
        """Statistics of some folds and of the data that belong to all, unbiased for the whole stream."""
        factor = self._sample.factor(folds)
        total: Any = None
        for fold in (SHARED, *folds):
            if fold in self._parts:
                own = self._of(fold) if fold == SHARED or factor == 1 else self._of(fold) * factor
                total = own if total is None else total + own
        return total if self._observed is None else self._structure.complete(total, self._observed)

    def _of(self, fold: int) -> Any:
        if fold not in self._statistics:
            name = f"statistics of fold {fold}"
            self._statistics[fold] = self._summed(name, fold, lambda data: self._structure.measure(self._network, data))
        return self._statistics[fold]

    def _measured(self, fold: int, basis: Basis, number: int) -> Tensor:
        """Curvatures along a basis on one fold, with the weights of the whole sample."""
        known = self._statistics.get(fold)
        if known is not None and known.exact:
            return known.curvatures(basis)
        name = f"curvatures of fold {fold}, round {number}"
        return self._summed(name, fold, lambda data: projected_curvatures(self._network, basis, data))

    def _summed(self, name: str, fold: int, of: Callable[[CurvatureData], Any]) -> Any:
        data = self._parts[fold]
        return self._progress.accumulate(name, data.slices(STEP_CHUNKS), lambda part: of(data.take(part)))
