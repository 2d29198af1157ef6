"""Which folds choose the directions, and which measure the curvature along them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from debiased_laplace.sampling import WeightedData


class Split(Protocol):
    """Assigns the two roles to folds."""

    @property
    def folds(self) -> int:
        """Number of disjoint folds that the sampler has to draw."""
        ...

    def __call__(self, folds: list[WeightedData]) -> tuple[WeightedData, WeightedData]:
        """Data for the directions, and data for the curvatures along them."""
        ...


@dataclass(frozen=True)
class Single:
    """Directions and curvatures from the same data: the usual practice, and biased.

    The directions with the largest curvature on a batch are chosen *because* they are curved on that
    batch; measured on the same data, their curvature is overstated (Tatzel et al., arXiv 2410.14325).
    With all training data there is nothing to overstate, and this is the full-data fit.
    """

    folds: int = 1

    def __post_init__(self) -> None:
        if self.folds < 1:
            raise ValueError(f"Expected at least one fold in folds, got {self.folds}.")

    def __call__(self, folds: list[WeightedData]) -> tuple[WeightedData, WeightedData]:
        """All data, twice."""
        data = WeightedData.union(folds)
        return data, data


@dataclass(frozen=True)
class TwoBatch:
    """Directions from one half of the data, curvatures along them from the other half.

    Given the directions, the curvatures are unbiased (Tatzel et al., arXiv 2410.14325, section 4).
    """

    folds: int = 2

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"Expected folds for directions and for curvatures, at least two, got {self.folds}.")

    def __call__(self, folds: list[WeightedData]) -> tuple[WeightedData, WeightedData]:
        """The first half of the folds, and the second."""
        half = len(folds) // 2
        return WeightedData.union(folds[:half]), WeightedData.union(folds[half:])
