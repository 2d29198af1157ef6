"""Does it help, and is that real? Scores of any predictors on test, shifted and foreign data, with intervals.

:func:`evaluate` (in ``judge``) takes anything callable that gives probabilities, or a mean and a variance. On top of
it, data flow one way: a task file (``tasks``, ``shipped``) and methods are fitted, tuned and evaluated (``suite``)
into one record for each seed (``records``), records into a summary (``summary``), and a summary into sentences,
tables, figures and files (``statement``, ``tables``, ``figures``, ``report``). Names are loaded when they are first
used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from debiased_laplace.evaluation.judge import conditions, evaluate
    from debiased_laplace.evaluation.methods import Method, Options, standard_methods
    from debiased_laplace.evaluation.metrics import classification_metrics, out_of_distribution_metrics
    from debiased_laplace.evaluation.predictors import (
        LaplacePredictor,
        Prediction,
        ensemble_predictor,
        gaussian_predictor,
        point_predictor,
        tuned_temperature,
    )
    from debiased_laplace.evaluation.regression import regression_metrics
    from debiased_laplace.evaluation.report import write_outputs
    from debiased_laplace.evaluation.suite import run
    from debiased_laplace.evaluation.summary import summarise
    from debiased_laplace.evaluation.tasks import Context, Task, TaskError

_HOMES = {
    "classification_metrics": "metrics",
    "out_of_distribution_metrics": "metrics",
    "regression_metrics": "regression",
    "evaluate": "judge",
    "conditions": "judge",
    "Prediction": "predictors",
    "LaplacePredictor": "predictors",
    "ensemble_predictor": "predictors",
    "gaussian_predictor": "predictors",
    "point_predictor": "predictors",
    "tuned_temperature": "predictors",
    "Context": "tasks",
    "Task": "tasks",
    "TaskError": "tasks",
    "Method": "methods",
    "Options": "methods",
    "run": "suite",
    "standard_methods": "methods",
    "summarise": "summary",
    "write_outputs": "report",
}

__all__ = [
    "Context",
    "LaplacePredictor",
    "Method",
    "Options",
    "Prediction",
    "Task",
    "TaskError",
    "classification_metrics",
    "conditions",
    "ensemble_predictor",
    "evaluate",
    "gaussian_predictor",
    "out_of_distribution_metrics",
    "point_predictor",
    "regression_metrics",
    "run",
    "standard_methods",
    "summarise",
    "tuned_temperature",
    "write_outputs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
