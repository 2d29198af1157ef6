"""Prediction sets of all predictors: on the test data, and over all strong shifts with the thresholds of the test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from debiased_laplace._arrays import Array
from debiased_laplace.evaluation.judge.groups import Groups
from debiased_laplace.evaluation.scores.replicates import Replicates
from debiased_laplace.evaluation.scores.sets import ALPHA, SetScores
from debiased_laplace.evaluation.scores.weighted import resample_weights

Arrays = Mapping[str, Mapping[str, Array]]


class Sets:
    """Sets of predictors, calibrated on the test data, which come first."""

    def __init__(
        self, wanted: Sequence[str] | None, n_resamples: int, target_scale: float, alpha: float = ALPHA
    ) -> None:
        self.wanted, self.n_resamples, self.scale, self.alpha = wanted, n_resamples, target_scale, alpha
        self._calibrated: dict[str, SetScores] = {}
        self._strong: list[dict[str, dict[str, Replicates]]] = []

    def of_test(self, arrays: Arrays, targets: Array, seed: int, groups: Groups) -> dict[str, Any]:
        """Calibrate on the test data, and judge each of their folds by the other one."""
        weights = resample_weights(len(targets), self.n_resamples, seed)
        draws = {name: of for name, of in groups.draws.items() if self.wanted is None or name in self.wanted}
        self._calibrated = {
            name: SetScores(self._scaled(arrays[name]), targets * self._unit(arrays[name]), weights, self.alpha)
            for of in draws.values()
            for name in of
        }
        return self._entry(self._judged(arrays, targets, seed), groups)

    def add_strong(self, arrays: Arrays, targets: Array, seed: int) -> None:
        """Judge on a strong shift."""
        self._strong.append(self._judged(arrays, targets, seed))

    def of_strong(self, groups: Groups) -> dict[str, Any]:
        """Means over all strong shifts; a method that failed on one of them has none."""
        whole = [name for name in self._calibrated if all(name in shift for shift in self._strong)]
        means = {
            name: {key: _mean([shift[name][key] for shift in self._strong]) for key in self._strong[0][name]}
            for name in whole
        }
        return self._entry(means, groups)

    def _judged(self, arrays: Arrays, targets: Array, seed: int) -> dict[str, dict[str, Replicates]]:
        weights = resample_weights(len(targets), self.n_resamples, seed)
        return {
            name: scores.of(self._scaled(arrays[name]), targets * self._unit(arrays[name]), weights)
            for name, scores in self._calibrated.items()
            if name in arrays
        }

    def _entry(self, scores: Mapping[str, Mapping[str, Replicates]], groups: Groups) -> dict[str, Any]:
        groups = replace(groups, draws={name: of for name, of in groups.draws.items() if set(of) <= scores.keys()})

        def same(first: str, second: str) -> bool:
            pairs = [(scores[first][key], scores[second][key]) for key in scores[first]]
            return all(a.value == b.value and np.array_equal(a.replicates, b.replicates) for a, b in pairs)

        return {"alpha": self.alpha, "scores": groups.scores(scores), "differences": groups.differences(scores, same)}

    def _unit(self, fields: Mapping[str, Array]) -> float | int:
        """Of targets: labels have none."""
        return 1 if "probabilities" in fields else self.scale

    def _scaled(self, fields: Mapping[str, Array]) -> Mapping[str, Array]:
        """In the unit of the targets."""
        if "probabilities" in fields:
            return fields
        return {"mean": fields["mean"] * self.scale, "variance": fields["variance"] * self.scale**2}


def _mean(shifts: Sequence[Replicates]) -> Replicates:
    value = float(np.mean([shift.value for shift in shifts]))
    n = min(shift.n for shift in shifts if shift.n is not None)
    return replace(shifts[0], value=value, replicates=np.mean([shift.replicates for shift in shifts], axis=0), n=n)
