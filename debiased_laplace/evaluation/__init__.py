"""Does it help? Scores, shifts, foreign data, and the comparison of posteriors on any trained classifier.

Data flow one way: a task and some methods (``tasks``) are compared (``compare``, with ``metrics`` and
``shifts``) into one record for each seed (``records``), records into a summary (``summary``), and a summary
into sentences, tables, figures and files (``statement``, ``tables``, ``figures``, ``report``).
Names are loaded when they are first used; the function ``compare`` is imported from its module, whose name
it has.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from debiased_laplace.evaluation.compare import run
    from debiased_laplace.evaluation.metrics import classification_metrics, out_of_distribution_metrics
    from debiased_laplace.evaluation.report import write_outputs
    from debiased_laplace.evaluation.summary import summarise
    from debiased_laplace.evaluation.tasks import Method, Options, Task, settings_of, standard_methods

_HOMES = {
    "classification_metrics": "metrics",
    "out_of_distribution_metrics": "metrics",
    "Task": "tasks",
    "Method": "tasks",
    "Options": "tasks",
    "settings_of": "tasks",
    "standard_methods": "tasks",
    "run": "compare",
    "summarise": "summary",
    "write_outputs": "report",
}

__all__ = [
    "Method",
    "Options",
    "Task",
    "classification_metrics",
    "out_of_distribution_metrics",
    "run",
    "settings_of",
    "standard_methods",
    "summarise",
    "write_outputs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
