"""Data that predictors are judged on: test, shifted and out-of-distribution data, in the order they are read in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from debiased_laplace.evaluation.names import check_name

Loader = Iterable[Any]


@dataclass(frozen=True)
class Condition:
    """Data that predictions are scored on.

    Attributes:
        kind: ``"test"``, ``"shift"`` or ``"ood"``.
        name: Of the shift or of the kind of out-of-distribution data; ``"test"`` for the unshifted data.
        severity: 1 to 5, or ``None`` where a shift has no degrees.
        loader: Batches; read once.
    """

    kind: str
    name: str
    severity: int | None
    loader: Loader

    @property
    def title(self) -> str:
        """As it appears in tables."""
        return self.name if self.severity is None else f"{self.name} {self.severity}"

    @property
    def described(self) -> str:
        """As it appears in errors."""
        return f"the {self.kind} data {self.title!r}"


class ConditionError(ValueError):
    """Data that nothing can be judged on; ``kind`` is that of their :class:`Condition`."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def conditions(
    test: Loader, shifted: Mapping[str, Any] | None = None, out_of_distribution: Mapping[str, Loader] | None = None
) -> list[Condition]:
    """All data of an evaluation, in the order in which they are read.

    Args:
        test: Batches of the unshifted data.
        shifted: A loader for each shift, or a dictionary from severity to loader.
        out_of_distribution: A loader for each kind of out-of-distribution data; targets are not looked at.
    """
    in_order = [Condition("test", "test", None, test)]
    for name in [*(shifted or {}), *(out_of_distribution or {})]:
        check_name(name, "shifted or out-of-distribution data")
    for name, loaders in (shifted or {}).items():
        by_severity = loaders if isinstance(loaders, Mapping) else {None: loaders}
        wrong = [s for s in by_severity if s is not None and (isinstance(s, bool) or not isinstance(s, int))]
        if wrong:
            raise ValueError(f"Expected severities of the shift {name!r} that are whole numbers (1 to 5), got {wrong}.")
        in_order += [Condition("shift", name, severity, loader) for severity, loader in by_severity.items()]
    in_order += [Condition("ood", name, None, loader) for name, loader in (out_of_distribution or {}).items()]
    titles = [(c.kind, c.title) for c in in_order]
    if len(set(titles)) != len(titles):
        raise ValueError(f"Expected different names for all data, got {[title for _, title in titles]}.")
    return in_order


#: Severity from which a shift counts as strong.
STRONG = 3


def is_strong(entry: Mapping[str, Any]) -> bool:
    """Whether a shift is of severity three or more, or has no degrees."""
    return entry["severity"] is None or entry["severity"] >= STRONG
