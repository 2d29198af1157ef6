"""Does it help, and is that real? Scores of predictors, also under shift and out of distribution, with intervals.

:func:`evaluate` takes anything callable that gives probabilities, or a mean and a variance. Its rooms, each of which
imports from those before it alone:

* ``scores``: scores of predictions, and intervals for them
* ``predictors``: the network, a temperature, ensembles, posteriors
* ``judge``: named predictors on the data of an evaluation, compared
* ``suite``: a task file (``tasks``, ``shipped``) and methods are fitted, tuned and evaluated, one record a seed
* ``report``: records become a summary, and a summary sentences, tables, figures and a page
* ``bias``: what mini-batches do to the quadratic of a network

Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from debiased_laplace.evaluation.judge.comparison import evaluate
    from debiased_laplace.evaluation.judge.conditions import conditions
    from debiased_laplace.evaluation.methods import Method, Options, standard_methods
    from debiased_laplace.evaluation.predictors.baselines import (
        detecting_predictor,
        ensemble_predictor,
        gaussian_predictor,
        point_predictor,
        tuned_temperature,
    )
    from debiased_laplace.evaluation.predictors.posterior import LaplacePredictor
    from debiased_laplace.evaluation.predictors.prediction import Prediction
    from debiased_laplace.evaluation.report.outputs import write_outputs
    from debiased_laplace.evaluation.report.summary import summarise
    from debiased_laplace.evaluation.scores.classification import classification_metrics
    from debiased_laplace.evaluation.scores.detection import out_of_distribution_metrics
    from debiased_laplace.evaluation.scores.regression import regression_metrics
    from debiased_laplace.evaluation.suite.seeds import run
    from debiased_laplace.evaluation.tasks import Context, Task, TaskError

#: What the `evaluation` extra in pyproject.toml brings; a test keeps the two alike.
_EXTRA = ("PIL", "filelock", "jinja2", "joblib", "matplotlib", "netcal", "rich", "sklearn", "threadpoolctl", "typer")
_missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"The evaluation and the command line need {', '.join(_missing)}, not installed here: they come with "
        "pip install 'debiased-laplace[evaluation]'.",
        name=_missing[0],
    )

_HOMES = {
    "classification_metrics": "scores.classification",
    "out_of_distribution_metrics": "scores.detection",
    "regression_metrics": "scores.regression",
    "evaluate": "judge.comparison",
    "conditions": "judge.conditions",
    "Prediction": "predictors.prediction",
    "LaplacePredictor": "predictors.posterior",
    "detecting_predictor": "predictors.baselines",
    "ensemble_predictor": "predictors.baselines",
    "gaussian_predictor": "predictors.baselines",
    "point_predictor": "predictors.baselines",
    "tuned_temperature": "predictors.baselines",
    "Context": "tasks",
    "Task": "tasks",
    "TaskError": "tasks",
    "Method": "methods",
    "Options": "methods",
    "run": "suite.seeds",
    "standard_methods": "methods",
    "summarise": "report.summary",
    "write_outputs": "report.outputs",
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
    "detecting_predictor",
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
