"""Scores of a summary as text: titles, digits, errors, and marks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from debiased_laplace.evaluation.report.numbers import number, plus_minus, seeds
from debiased_laplace.evaluation.report.verdicts import Summary, is_worse_than_uniform

#: Column title, number of digits and factor of every score.
SCORES = {
    "accuracy": ("accuracy %", 1, 100.0),
    "nll": ("NLL", 3, 1.0),
    "brier": ("Brier", 3, 1.0),
    "ece": ("ECE %", 1, 100.0),
    "adaptive_ece": ("adaptive ECE %", 1, 100.0),
    "smooth_ece": ("SmoothECE %", 1, 100.0),
    "top_label_ece": ("top-label ECE %", 1, 100.0),
    "classwise_ece": ("classwise ECE %", 2, 100.0),
    "aurc": ("AURC %", 2, 100.0),
    "augrc": ("AUGRC %", 2, 100.0),
    "nll_calibration": ("calibration loss, NLL", 3, 1.0),
    "nll_refinement": ("refinement loss, NLL", 3, 1.0),
    "brier_calibration": ("calibration loss, Brier", 3, 1.0),
    "brier_refinement": ("refinement loss, Brier", 3, 1.0),
    "auroc": ("AUROC %", 1, 100.0),
    "aupr": ("AUPR %", 1, 100.0),
    "fpr95": ("FPR95 %", 1, 100.0),
    "rmse": ("RMSE", 3, 1.0),
    "crps": ("CRPS", 3, 1.0),
    "coverage_50": ("50 % interval holds %", 1, 100.0),
    "coverage_90": ("90 % holds %", 1, 100.0),
    "coverage_95": ("95 % holds %", 1, 100.0),
    "width_50": ("50 % width", 3, 1.0),
    "width_90": ("90 % width", 3, 1.0),
    "width_95": ("95 % width", 3, 1.0),
    "calibration_error": ("calibration error %", 1, 100.0),
}
#: At scores that equal probabilities for all classes would beat.
OF_NO_USE = "†"


def in_cell(cell: Sequence[float], score: str, summary: Summary | None = None) -> str:
    """Value ± standard error, with a mark if it is of no use."""
    _, digits, scale = SCORES[score]
    text = plus_minus(cell, digits, scale=scale)
    worse = summary is not None and is_worse_than_uniform(summary, score, cell)
    return f"{text} {OF_NO_USE}" if worse else text


def marks(summary: Summary, cells: Iterable[str]) -> str:
    """What marks mean, if there are some."""
    marked = any(OF_NO_USE in cell for cell in cells)
    return f" {OF_NO_USE} Worse than saying 1/{summary['task']['n_outputs']} for every class." if marked else ""


def errors(summary: Summary) -> str:
    """What stands in the cells."""
    if len(summary["seeds"]) == 1:
        return f"value ± standard error of the bootstrap ({summary['n_resamples']:,} resamples of the data)"
    return f"mean over {seeds(summary)} ± standard error" + (
        ", which holds the bootstrap error of the data that all seeds share" if summary["same_data"] else ""
    )


def if_calibrated(entry: Mapping[str, Any], name: str, score: str) -> str:
    """The calibration error that a predictor would have if it were calibrated, in brackets and a line of its own."""
    expected = entry.get("calibrated", {}).get(name, {}).get(score)
    if expected is None:
        return ""
    value, low, high = (number(expected[i], SCORES[score][1], scale=100) for i in (0, 2, 3))
    return f"\n(calibrated: {value} [{low}, {high}])"
