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

    Attributes:
        folds: Number of folds.
        directions: How many of them choose the directions; half by default. ``TwoBatch(folds=8, directions=1)``
            chooses them from an eighth of the data, where they are what costs most (low rank).
    """

    folds: int = 2
    directions: int | None = None

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"Expected folds for directions and for curvatures, at least two, got {self.folds}.")
        if self.directions is not None and not 1 <= self.directions < self.folds:
            raise ValueError(
                f"Expected at least one of the {self.folds} folds for directions and one for curvatures, got "
                f"directions={self.directions}."
            )

    def __call__(self, folds: list[WeightedData]) -> tuple[WeightedData, WeightedData]:
        """The first folds, and the others."""
        first = self.directions or len(folds) // 2
        return WeightedData.union(folds[:first]), WeightedData.union(folds[first:])
