"""Which folds choose the directions, and which measure the curvature along them (docs/theory.md, "Folds")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

#: How the curvatures of several rounds become those along the final directions.
ROUND_AVERAGES = ("rank", "rotated")


class Round(NamedTuple):
    """Folds in the two roles; curvatures are the average over rounds."""

    directions: tuple[int, ...]
    curvatures: tuple[int, ...]


class Split(Protocol):
    """Assigns the two roles to folds.

    What a datum says of itself, and all that data kept for certain say, carries no sampling error and is measured along
    the final directions; the roles are about data that were not drawn (:mod:`debiased_laplace.fitting.measurement`).
    """

    @property
    def folds(self) -> int:
        """Number of folds that the sampler has to deal."""
        ...

    @property
    def final(self) -> tuple[int, ...]:
        """Folds that choose the directions of the posterior."""
        ...

    @property
    def rounds(self) -> list[Round]:
        """Which folds measure curvatures, along whose directions."""
        ...

    @property
    def average(self) -> str:
        """How rounds are averaged, one of :data:`ROUND_AVERAGES`."""
        ...


@dataclass(frozen=True)
class Single:
    """Directions and curvatures from the same data: the usual practice, and biased.

    The directions with the largest curvature on a batch are chosen *because* they are curved on that
    batch; measured on the same data, their curvature is overstated (Tatzel et al., arXiv 2410.14325).
    With all training data there is nothing to overstate, and this is the full-data fit.
    """

    folds: int = 1
    average: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        if self.folds < 1:
            raise ValueError(f"Expected at least one fold in folds, got {self.folds}.")

    @property
    def final(self) -> tuple[int, ...]:
        """All folds."""
        return tuple(range(self.folds))

    @property
    def rounds(self) -> list[Round]:
        """All folds in both roles."""
        return [Round(self.final, self.final)]


@dataclass(frozen=True)
class TwoBatch:
    """Directions from one half of the data, curvatures along them from the other half.

    Given the directions, the curvatures are unbiased for independent batches (Tatzel et al., arXiv 2410.14325, section
    4), and for a finite training set, where the second batch is drawn from what the first has left, with the curvature
    of the first put back in its share (:mod:`debiased_laplace.fitting.measurement`).

    Attributes:
        folds: Number of folds.
        directions: How many of them choose the directions; half by default. ``TwoBatch(folds=8, directions=1)``
            chooses them from an eighth of the data, where they are what costs most (low rank).
    """

    folds: int = 2
    directions: int | None = None
    average: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"Expected folds for directions and for curvatures, at least two, got {self.folds}.")
        if self.directions is not None and not 1 <= self.directions < self.folds:
            raise ValueError(
                f"Expected at least one of the {self.folds} folds for directions and one for curvatures, got "
                f"directions={self.directions}."
            )

    @property
    def final(self) -> tuple[int, ...]:
        """The first folds."""
        return tuple(range(self.directions or self.folds // 2))

    @property
    def rounds(self) -> list[Round]:
        """The first folds, and the others."""
        return [Round(self.final, tuple(range(len(self.final), self.folds)))]


@dataclass(frozen=True)
class CrossFit:
    """Every fold in both roles.

    For each fold the others choose directions, and the fold measures along them what the data that were not drawn have;
    this is averaged over the folds. The directions of the posterior come from all of them, and what the data drawn say
    of themselves is measured along these.

    Attributes:
        folds: Number of folds, K. Directions come from (K - 1) / K of the data; the cost is K + 1 eigendecompositions,
            and one pass over the data more than for a single batch.
        average: ``"rank"``, the k-th largest of every round together (Bartz, arXiv 1611.00798); or ``"rotated"``, the
            diagonal, along the final directions, of the average of the rounds' matrices (NERCOME: Lam 2016). The latter
            is closer with a few dozen data, overstates on known pools, and loses what lies outside of the directions of
            a low-rank structure (docs/theory.md, "Folds").
    """

    folds: int = 4
    average: str = "rank"

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"Expected at least two folds to cross-fit, got {self.folds}.")
        if self.average not in ROUND_AVERAGES:
            raise ValueError(f"Expected an average out of {list(ROUND_AVERAGES)}, got {self.average!r}.")

    @property
    def final(self) -> tuple[int, ...]:
        """All folds."""
        return tuple(range(self.folds))

    @property
    def rounds(self) -> list[Round]:
        """For each fold, the others and it."""
        return [Round((*range(fold), *range(fold + 1, self.folds)), (fold,)) for fold in range(self.folds)]
