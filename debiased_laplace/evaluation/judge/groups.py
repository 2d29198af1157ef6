"""Methods with the predictors that are their draws: means of their scores, differences draw by draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from debiased_laplace.evaluation.scores.cells import cell, combine
from debiased_laplace.evaluation.scores.replicates import Replicates


@dataclass(frozen=True)
class Groups:
    """Methods with the predictors that are their draws, and which of them are compared.

    Attributes:
        draws: Predictors of each method.
        against: For a method the others that are compared with it.
    """

    draws: Mapping[str, Sequence[str]]
    against: Mapping[str, Sequence[str]]

    def scores(self, replicates: Mapping[str, Mapping[str, Replicates]]) -> dict[str, dict[str, list[float]]]:
        """Cells of every method: means over draws."""
        return {
            name: {
                key: combine([cell(replicates[one][key]) for one in predictors], True)
                for key in replicates[predictors[0]]
            }
            for name, predictors in self.draws.items()
        }

    def values(self, replicates: Mapping[str, Mapping[str, Replicates]]) -> dict[str, dict[str, list[float]]]:
        """The score of every draw, of methods that have several."""
        return {
            name: {key: [float(replicates[one][key].value) for one in predictors] for key in replicates[predictors[0]]}
            for name, predictors in self.draws.items()
            if len(predictors) > 1
        }

    def differences(
        self, replicates: Mapping[str, Mapping[str, Replicates]], same: Callable[[str, str], bool]
    ) -> dict[str, dict[str, Any]]:
        """For each method to compare with, others minus it, draw by draw."""

        def of(first: str, second: str, key: str) -> list[float]:
            one, two = self.draws[first], self.draws[second]
            pairs = [(one[i % len(one)], two[i % len(two)]) for i in range(max(len(one), len(two)))]
            return combine(
                [
                    [0.0] * 4
                    if math.isfinite(replicates[a][key].value) and same(a, b)
                    else cell(replicates[a][key] - replicates[b][key])
                    for a, b in pairs
                ],
                True,
            )

        return {
            second: {
                first: {
                    key: of(first, second, key)
                    for key in replicates[self.draws[first][0]]
                    if key in replicates[self.draws[second][0]]
                }
                for first in firsts
                if first != second and first in self.draws
            }
            for second, firsts in self.against.items()
            if second in self.draws
        }
