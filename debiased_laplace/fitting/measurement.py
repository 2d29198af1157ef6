r"""Directions from some folds, curvatures along them from others, for the training set behind the sample.

Of its weight :math:`w_n`, a datum stands for itself with :math:`1/N`, and for data that were not drawn with the rest.
About itself it is right along any direction, also one that it chose; about the others only along directions that it had
no part in choosing. With U the final directions and :math:`U_{-j}` those of round j, equation (6),

.. math::
    \lambda_i = \sum_n \frac1N \lambda_n(u_i) + \frac1K \sum_j \varphi_j \sum_{n \in j} \Big(w_n - \frac1N\Big)
    \lambda_n(u_{-j,i}), \qquad \lambda_n(u) = \sum_v (u^\top J_n^\top s_{nv})^2,

where :math:`\varphi_j` lets the data of the round stand for all that do not belong to all folds. For a uniform draw in
two batches this is :math:`\frac{n_A}{N} \lambda_A + (1 - \frac{n_A}{N}) \lambda_B`; the second batch alone stands for
the data that are not in the first, and not for all of them. Data kept for certain have nothing but themselves to stand
for, and once all data are drawn none has: the curvatures are then those of a fit on all data. The glossary of
docs/theory.md has the terms (direction, basis, fold, split, round).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace._guards import warn_the_caller
from debiased_laplace._ranks import current
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.projected import curvatures_along
from debiased_laplace.curvature.structures import Structure
from debiased_laplace.fitting.checkpoint import Checkpoint
from debiased_laplace.fitting.stream import Observed
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.sampling.sample import IN_ALL_FOLDS, Sample
from debiased_laplace.sampling.splits import Round, Split

#: Chunks of data that are measured in one step; a fit can be interrupted between two steps.
STEP_CHUNKS = 16

#: Differences of weights, relative to them, that are rounding.
WEIGHT_ROUNDING = 1e-12


class Measurement:
    """Statistics and curvatures of folds, each computed once, and kept where the fit has a checkpoint."""

    def __init__(
        self, structure: Structure, network: Network, data: CurvatureData, sample: Sample, observed: Observed | None,
        checkpoint: Checkpoint,
    ) -> None:  # fmt: skip
        self._structure, self._network, self._sample, self._checkpoint = structure, network, sample, checkpoint
        # Of data that were all drawn, the statistics of the sample are those of the stream, at all positions.
        self._observed: Any = None
        if observed is not None and len(sample.data) < sample.n_seen:
            self._observed = observed.statistics
        self._parts: dict[int, CurvatureData] = {}
        #: Weights with which the data of a fold stand for themselves; and for others, of folds whose data do.
        self._selves: dict[int, Tensor] = {}
        self._others: dict[int, Tensor] = {}
        for fold in (IN_ALL_FOLDS, *range(sample.n_folds)):
            index = (sample.folds == fold).nonzero()[:, 0]
            if not len(index):
                continue
            self._parts[fold] = data if len(index) == len(sample.folds) else data.take(index)
            weights, self._selves[fold] = sample.data.weights[index], sample.self_weights[index]
            if bool((weights - self._selves[fold] > WEIGHT_ROUNDING * weights).any()):
                self._others[fold] = weights - self._selves[fold]
        self._statistics: dict[tuple[int, str], Any] = {}
        #: The final directions, with the weights that the data of every fold get along them, and what they gave.
        self._final: tuple[Basis, dict[int, Tensor]]
        self._along_final: dict[int, Tensor] = {}
        #: Standard errors of the curvatures that :meth:`cross` gave, ``[rank]``, if several rounds tell them.
        self.errors: Tensor | None = None

    def cross(self, split: Split, *, factored: bool) -> tuple[Basis, Tensor]:
        """The final directions, and curvatures along them, as the split says.

        Directions of one eigenspace of the first data are arbitrary in it, and get the average of their curvatures.
        """
        rounds = self._rounds(split)
        needs = self._structure.data_dependent or all(one.directions == one.curvatures for one in split.rounds)
        final = self._basis(split.final) if needs else self._structure.eigenbasis(self._network, None)
        measure = self._from_statistics if factored or not self._structure.projects else self._projected
        crossed = [one for one in rounds if needs and one.directions != split.final]
        shares: dict[int, float] = {}  # what data say of others along the final directions, in one pass with themselves
        for one in rounds:
            for fold, share in self._shares(one).items() if one not in crossed else ():
                shares[fold] = shares.get(fold, 0.0) + share / len(rounds)
        self._final = final, {
            fold: weights + shares[fold] * self._others[fold] if fold in shares else weights
            for fold, weights in self._selves.items()
        }  # fmt: skip
        total = torch.zeros(final.rank, dtype=self._network.dtype, device=self._network.device)
        mean, squares = total.clone(), total.clone()
        for number, one in enumerate(crossed):
            along = self._basis(one.directions, like=final)
            values = along.averaged(measure(along, self._shares(one), number))
            values = (final.by_rank if split.average == "rank" else final.diagonal_of)(along, values)
            total = total + values / len(rounds)
            off = values - mean  # Welford's algorithm
            mean = mean + off / (number + 1)
            squares = squares + off * (values - mean)
        if len(crossed) > 1:
            self.errors = (squares / (len(crossed) - 1) * len(crossed)).sqrt() / len(rounds)
        return final, final.averaged(measure(final, shares) + total)

    def left_out(self, split: Split, basis: Basis, curvatures: Tensor) -> Tensor | None:
        """Trace of the curvature outside the directions of every part, ``[n_parts]``, where some are left out.

        The trace of all is that of the data that chose the directions: it does not depend on these, and has no bias.
        """
        traces = None if basis.complete else self._structure.traces(self._estimate(split.final))
        if traces is None:
            return None
        along = torch.stack([part.double().sum() for part in basis.split(curvatures)])
        return (traces.to(along) - along).clamp_min(0)

    def _rounds(self, split: Split) -> list[Round]:
        """Those with data in both roles; none where data stand for themselves alone."""
        if not self._others:
            return []
        rounds = [
            one for one in split.rounds
            if self._others.keys() & set(one.curvatures) and self._parts.keys() & {IN_ALL_FOLDS, *one.directions}
        ]  # fmt: skip
        if rounds:
            return rounds
        warn_the_caller(
            "Expected data to choose directions and others to measure the curvature along them, got "
            f"{len(self._sample.folds)} in all: they have both roles, and the curvature is overstated. Give more data."
        )
        return [Round(split.final, tuple(self._others))]

    def _shares(self, one: Round) -> dict[int, float]:
        """By what the weights for others are multiplied, so that the data of a round stand for all others."""
        return {fold: self._sample.factor(one.curvatures) for fold in one.curvatures if fold in self._others}

    def _projected(self, basis: Basis, shares: Mapping[int, float], number: int | None = None) -> Tensor:
        """Equation (2) for others, or (without the number of a round) for the data themselves and for others.

        Data of a round are measured along its directions and along the final ones by the same backward passes.
        """
        final, weights = self._final
        total = torch.zeros(basis.rank, dtype=self._network.dtype, device=self._network.device)
        for fold in self._parts if number is None else shares:
            wanted = [] if fold in self._along_final else [(final, weights[fold])]
            if number is not None:
                wanted.append((basis, shares[fold] * self._others[fold]))
            name = f"curvatures of fold {fold}, " + ("final directions" if number is None else f"round {number}")
            along = self._along(name, fold, wanted) if wanted else []
            if fold not in self._along_final:
                self._along_final[fold] = along[0]
            total = total + (self._along_final[fold] if number is None else along[-1])
        return total

    def _along(self, name: str, fold: int, wanted: Sequence[tuple[Basis, Tensor]]) -> list[Tensor]:
        """Equation (2) for the data of a fold, along several bases with weights for each."""
        known, along, left = self._statistics.get((fold, "all")), {}, []
        for index, (basis, weights) in enumerate(wanted):
            multiple = self._multiple(fold, weights)
            if known is not None and known.exact and multiple is not None:
                along[index] = multiple * known.curvatures(basis)
            else:
                left.append(index)
        if left:
            bases, of_bases = zip(*(wanted[index] for index in left), strict=True)

            def measured(data: CurvatureData, part: slice | Tensor) -> Tensor:
                multiples = [None, *((weights / of_bases[0])[part] for weights in of_bases[1:])]
                return torch.cat(curvatures_along(self._network, bases, data, multiples))

            together = f"{name}, {len(bases)} bases" if len(bases) > 1 else name
            curvatures = self._summed(together, fold, of_bases[0], measured).split([basis.rank for basis in bases])
            along |= dict(zip(left, curvatures, strict=True))
        return [along[index] for index in range(len(wanted))]

    def _from_statistics(self, basis: Basis, shares: Mapping[int, float], number: int | None = None) -> Tensor:
        """The same by statistics, of which curvatures may be products: for others, what they add to the data."""
        selves = _sum(self._of(fold, "selves") for fold in self._parts)
        both = _sum([selves, *(self._of(fold, "others") * share for fold, share in shares.items())])
        curvatures = self._completed(both).curvatures(basis)
        if number is None:
            return curvatures
        return (curvatures - self._completed(selves).curvatures(basis)).clamp_min(0)  # below zero only by rounding

    def _basis(self, folds: Sequence[int], like: Basis | None = None) -> Basis:
        statistics, ranks = self._estimate(folds), current()
        if ranks.size == 1 or self._structure.deals_work:
            return self._structure.eigenbasis(self._network, statistics, like)
        return ranks.of_one(lambda: self._structure.eigenbasis(self._network, statistics, like), self._network.device)

    def _estimate(self, folds: Sequence[int]) -> Any:
        """Statistics of some folds and of the data that belong to all, which stand for the whole stream."""
        factor = self._sample.factor(folds)
        return self._completed(
            _sum(
                self._of(fold) if fold == IN_ALL_FOLDS or factor == 1 else self._of(fold) * factor
                for fold in (IN_ALL_FOLDS, *folds) if fold in self._parts
            )
        )  # fmt: skip

    def _completed(self, statistics: Any) -> Any:
        return statistics if self._observed is None else self._structure.complete(statistics, self._observed)

    def _of(self, fold: int, weighted: str = "all") -> Any:
        """Statistics of a fold, with its weights, or those of the data for themselves or for others."""
        if (fold, weighted) not in self._statistics:
            weights = {"all": self._parts[fold].data.weights, "selves": self._selves[fold]}.get(weighted)
            weights = self._others[fold] if weights is None else weights
            multiple, name = self._multiple(fold, weights), f"statistics of fold {fold}"
            if weighted == "all" or multiple is None:
                name += "" if weighted == "all" else f", {weighted}"
                measure = self._structure.measure if self._observed is None else self._structure.measure_unobserved
                statistics = self._summed(name, fold, weights, lambda data, _: measure(self._network, data))
            else:
                statistics = self._of(fold) * multiple
            self._statistics[fold, weighted] = statistics
        return self._statistics[fold, weighted]

    def _multiple(self, fold: int, weights: Tensor) -> float | None:
        """What weights are of those of the fold, if that is one number."""
        ratios = weights / self._parts[fold].data.weights
        equal = float(ratios.max() - ratios.min()) <= WEIGHT_ROUNDING * float(ratios.max())
        return float(ratios.mean()) if equal else None

    def _summed(self, name: str, fold: int, weights: Tensor, of: Callable[[CurvatureData, slice | Tensor], Any]) -> Any:
        data = copy.copy(self._parts[fold])
        data.data = replace(data.data, weights=weights)
        steps, ranks = data.slices(STEP_CHUNKS), current()
        if ranks.size == 1:
            return self._checkpoint.accumulate(name, steps, lambda part: of(data.take(part), part))

        def of_all() -> Any:
            index = torch.arange(len(data))[ranks.share(_data.sizes(data.data.inputs))]
            mine = data.take(index)
            parts = [index[part] for part in mine.slices(STEP_CHUNKS)] or [index]  # of no data, a sum of zeros

            def measured(part: Tensor) -> Any:
                ranks.check()  # whether another process has failed, long before the next exchange
                return of(data.take(part), part)

            total = _sum(map(measured, parts))
            return ranks.sum(total) if isinstance(total, Tensor) else total.all_reduce()

        return self._checkpoint.whole(name, len(steps), of_all)


def _sum(statistics: Iterable[Any]) -> Any:
    total: Any = None
    for one in statistics:
        total = one if total is None else total + one
    return total
