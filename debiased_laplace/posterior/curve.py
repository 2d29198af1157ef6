"""What a search of prior precisions saw, and what is said about its ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace._guards import warn_the_caller
from debiased_laplace.posterior.temperature import AS_GOOD, warn_undetermined

EMPTY = "Expected validation data, got an empty val_loader. A generator can be read only once."


@dataclass(frozen=True)
class PriorCurve:
    """What a grid search saw.

    Attributes:
        prior_precisions: ``[R]``, the grid.
        losses: ``[R]``, mean negative log predictive probability of the validation data, in nats, or another loss.
            Some may be infinite.
        link: Link approximation the losses were computed with.
        tolerance: Losses that differ by less are equally good.
    """

    prior_precisions: Tensor
    losses: Tensor
    link: str
    tolerance: float = AS_GOOD

    @property
    def best_index(self) -> int:
        """Place of the smallest prior precision, the one with most uncertainty, that is as good as the best."""
        return int(self.prior_precisions.where(self._as_good, math.inf).argmin())

    @property
    def best(self) -> float:
        """The prior precision there."""
        return float(self.prior_precisions[self.best_index])

    @property
    def at_edge(self) -> bool:
        """Whether the best value is the smallest or the largest of the grid."""
        return self.best in (float(self.prior_precisions.min()), float(self.prior_precisions.max()))

    @property
    def is_flat(self) -> bool:
        """Whether all from the best value to the end of the grid are equally good: less uncertainty does not help."""
        from_best = self.prior_precisions >= self.best
        return int(from_best.sum()) > 1 and bool(self._as_good[from_best].all())

    def warn(self) -> None:
        """Say so if the best value is an end of the grid, or is not determined."""
        if self.is_flat:
            warn_undetermined("prior precision", self._why_flat)
        elif self.at_edge and len(self.losses) > 1:
            warn_of_the_edge(self.best, smallest=self.best == float(self.prior_precisions.min()))

    @property
    def _as_good(self) -> Tensor:
        return self.losses <= self.losses.min() + self.tolerance

    @property
    def _why_flat(self) -> str:
        return (
            f"all from {self.best:.3g} to the end of the grid are equally good (within {self.tolerance:g}). The "
            "smallest of them is used, the one with most uncertainty; set prior_precision yourself to have less"
        )


def check_losses(losses: Tensor, remedy: str = "Look for NaN in the validation data.") -> None:
    """Raise a :class:`NonFiniteError` for losses that are not defined, or all infinite."""
    if bool(losses.isnan().any()) or not bool(losses.isfinite().any()):
        _checks.finite(losses, "the validation losses", remedy)


def warn_of_the_edge(best: float, *, smallest: bool, of: str = "") -> None:
    """Say that the best prior precision is an end of the grid."""
    side, name = ("smallest", "log_prior_prec_min") if smallest else ("largest", "log_prior_prec_max")
    warn_the_caller(
        f"The best prior precision{of}, {best:.3g}, is the {side} of the grid: the optimum may lie beyond. "
        f"Change {name}" + (
            "." if smallest
            else ", unless the loss has levelled off (then the posterior has nothing to add on these data)."
        )
    )  # fmt: skip
