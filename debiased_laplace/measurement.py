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
        Directions of one eigenspace of the first data are arbitrary in it, and get the average of their curvatures.
        """
        structure, rounds = self._structure, split.rounds
        needs = structure.data_dependent or all(own.directions == own.curvatures for own in rounds)
        basis = self._basis(split.final) if needs else structure.eigenbasis(self._network, None)
        if list(self._parts) == [SHARED]:
            return basis, basis.averaged(self._curvatures(split.final, basis, factored) + self._shared(basis, factored))
        total: Any = 0.0
        for number, own in enumerate(rounds):
            along = basis if own.directions == split.final else self._basis(own.directions, like=basis)
            values = self._curvatures(own.curvatures, along, factored, number)
            if along is not basis:
                values = along.averaged(values)
                values = basis.by_rank(along, values) if split.average == "rank" else basis.diagonal_of(along, values)
            total = total + values / len(rounds)
        return basis, basis.averaged(total + self._shared(basis, factored))

    def left_out(self, split: Split, basis: Basis, curvatures: Tensor) -> Tensor | None:
        """Trace of the curvature outside the directions of every part, ``[n_parts]``, where some are left out.

        The trace of all is that of the data that chose the directions: it does not depend on these, and has no bias.
        """
        traces = None if basis.complete else self._structure.traces(self._estimate(split.final))
        if traces is None:
            return None
        along = torch.stack([own.double().sum() for own in basis.split(curvatures)])
        return (traces.to(along) - along).clamp_min(0)

    def _curvatures(self, folds: Sequence[int], basis: Basis, factored: bool, number: int = 0) -> Tensor:
        """Curvatures of some folds along a basis, unbiased for the stream together with :meth:`_shared`."""
        if factored or not self._structure.projects:
            return self._estimate(folds).curvatures(basis)
        total = torch.zeros(basis.rank, dtype=self._network.dtype, device=self._network.device)
        for fold in folds:
            if fold in self._parts:
                total = total + self._sample.factor(folds) * self._measured(fold, basis, number)
        return total

    def _shared(self, basis: Basis, factored: bool) -> Tensor | float:
        """Curvatures of the data that belong to all folds, where they are not in those of the folds already."""
        if SHARED not in self._parts or factored or not self._structure.projects:
            return 0.0
        return self._measured(SHARED, basis, 0)

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
