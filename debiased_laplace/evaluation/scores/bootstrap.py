r"""Bootstrap intervals of every score, from resampling weights instead of resampled data (``weighted``).

Use the *same* weights for all predictors of the same data: the differences of their replicates are then
paired (``Replicates.__sub__``). Source: Efron and Tibshirani 1993, chapters 6 and 13.

Calibration errors (those of regression too) are sums of absolute values, so that noise makes them too large,
and resampling adds the same noise once more: near perfect calibration their percentile intervals lie too
high and can miss the value of the data. In a difference this cancels as far as both predictors share it.

Resamples know nothing but the data: where all predictions are right, or all out-of-distribution data score higher than
all others, no resample differs. A share of at most :func:`~debiased_laplace.evaluation.scores.intervals.unseen_share`
could have been otherwise and not been seen; scores with such a share belong to the intervals there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from debiased_laplace import _arrays
from debiased_laplace._arrays import Array
from debiased_laplace.evaluation.scores import classification, detection, intervals, regression
from debiased_laplace.evaluation.scores.refinement import recalibrate
from debiased_laplace.evaluation.scores.replicates import Replicates, ScoreKind
from debiased_laplace.evaluation.scores.weighted import (
    check_weights,
    classifier_scores,
    detection_scores,
    weighted_means,
)

# Weight of each kind of data where shares of it are weights: far above one, see the precision of the AUPR.
_WEIGHT = 1e9
_FRACTIONS = (
    "accuracy", "ece", "adaptive_ece", "smooth_ece", "top_label_ece", "classwise_ece", "aurc", "auroc", "aupr", "fpr95",
    "calibration_error",
)  # fmt: skip
_COVERAGES = tuple(f"coverage_{percent}" for percent in regression.INTERVALS)
_BOUNDS = dict.fromkeys((*_FRACTIONS, *_COVERAGES), (0.0, 1.0)) | {
    "brier": (0.0, 2.0), "brier_refinement": (0.0, 2.0), "brier_calibration": (-2.0, 2.0), "augrc": (0.0, 0.5),
    "nll_calibration": (-math.inf, math.inf),
}  # fmt: skip
_POSITIVE = 0.0, math.inf
#: Scores of a classifier whose interval is not that of a calibration error.
_KINDS: dict[str, ScoreKind] = {
    "accuracy": "proportion", "nll": "mean", "brier": "mean", "aurc": "statistic", "augrc": "statistic",
    **dict.fromkeys(("nll_refinement", "nll_calibration", "brier_refinement", "brier_calibration"), "statistic"),
}  # fmt: skip


def classification_replicates(
    probabilities: Any, targets: Any, weights: Any, others: Any = None
) -> dict[str, Replicates]:
    """Scores of a classifier's probabilities, with resamples.

    The bins of the adaptive calibration error are those of the whole sample in all resamples; temperatures of
    recalibration are a Newton step from its own.

    Args:
        probabilities: ``[N, C]``.
        targets: ``[N]``, class indices.
        weights: ``[B, N]``, from ``weighted.resample_weights``.
        others: ``[N, C]``, how probable each class is in place of the target where all predictions, or none, are right;
            give all predictors of the same data the same. By default the probabilities.

    Returns:
        All numbers of :func:`~debiased_laplace.evaluation.scores.classification.classification_metrics`. If a target
        has probability zero, ``nll`` and its refinement are infinite, their difference is undefined, and so are the
        replicates that hold this datum.

    Raises:
        ValueError: For predictions that the scores refuse, or weights that are not counts of these data.

    Example:
        >>> from debiased_laplace.evaluation.scores.weighted import resample_weights
        >>> scores = classification_replicates([[0.8, 0.2], [0.3, 0.7]], [0, 0], resample_weights(2, 100))
        >>> scores["accuracy"].value, [round(bound, 3) for bound in scores["accuracy"].interval()]
        (0.5, [0.013, 0.987])
    """
    probabilities, targets = _arrays.check_predictions(probabilities, targets)
    weights, n = check_weights(weights, len(targets)), len(targets)
    data = classification.datum_scores(probabilities, targets)
    found = recalibrate(probabilities, classification.one_hot(targets, probabilities.shape[1]))
    every = np.concatenate([np.ones((1, n), weights.dtype), weights])  # the data themselves, and the resamples
    replicates = classifier_scores(
        every, probabilities, data, found, lambda first, last: targets[:, None] == np.arange(first, last)
    )

    @lru_cache(maxsize=1)
    def with_other_labels(confidence: float) -> dict[str, Array]:
        share = intervals.unseen_share(n, confidence)
        labels = classification.other_labels(probabilities if others is None else np.asarray(others), targets) * share
        labels[np.arange(n), targets] += 1 - share
        expected = classification.expected_datum_scores(probabilities, labels)
        return classifier_scores(
            np.ones((1, n)), probabilities, expected, recalibrate(probabilities, labels),
            lambda first, last: labels[:, first:last],
        )  # fmt: skip

    scores = {}
    alike = float(np.ptp(data["accuracy"])) == 0
    for name, array in replicates.items():
        kind, bounds = _KINDS.get(name, "calibration"), _BOUNDS.get(name, _POSITIVE)
        score = Replicates(float(array[0]), array[1:], n, kind, data.get(name), bounds)
        if alike or (score.is_finite and score.is_constant):
            score = replace(score, unseen=partial(_scores_of, with_other_labels, name))
        scores[name] = score
    return scores


def regression_replicates(mean: Any, variance: Any, targets: Any, weights: Any) -> dict[str, Replicates]:
    """Scores of Gaussian predictions, with resamples.

    Where all errors are the same, nothing is known of others: RMSE, NLL and CRPS could be anything. Widths do not
    depend on errors.

    Args:
        mean: ``[N, C]`` or ``[N]``.
        variance: Likewise; total predictive variance, noise included.
        targets: Likewise.
        weights: ``[B, N]``, from ``weighted.resample_weights``: data are drawn with all their outputs.

    Returns:
        The names and units of :func:`~debiased_laplace.evaluation.scores.regression.regression_metrics`.

    Raises:
        ValueError: For predictions that the scores refuse, or weights that are not counts of these data.
    """
    data = regression.datum_scores(mean, variance, targets)
    n, one_output = len(data["nll"]), np.ndim(mean) == 1 or np.shape(mean)[1] == 1
    replicates = regression.combine(weighted_means(check_weights(weights, n), data))
    values = regression.regression_metrics(mean, variance, targets)
    contributions = regression.contributions(data)

    def with_other_errors(confidence: float) -> dict[str, Array]:
        share = intervals.unseen_share(n, confidence)
        means = {key: np.stack([value.mean(0)] * 2) for key, value in data.items()}
        means["inside"] = (1 - share) * means["inside"] + np.array([[0.0], [share]])
        unknown = {"rmse": np.array(_POSITIVE), "crps": np.array(_POSITIVE), "nll": np.array([-math.inf, math.inf])}
        return regression.combine(means) | unknown

    scores = {}
    for name, array in replicates.items():
        kind: ScoreKind = "calibration" if name == "calibration_error" else "mean"
        if name == "rmse":
            kind = "root"
        elif name in _COVERAGES and one_output:
            kind = "proportion"
        bounds = (-math.inf, math.inf) if name == "nll" else _BOUNDS.get(name, _POSITIVE)
        score = Replicates(values[name], array, n, kind, contributions.get(name), bounds)
        if score.is_finite and score.is_constant and not name.startswith("width"):
            score = replace(score, unseen=partial(_scores_of, with_other_errors, name))
        scores[name] = score
    return scores


def detection_replicates(
    inside_score: Any, outside_score: Any, weights_inside: Any, weights_outside: Any
) -> dict[str, Replicates]:
    """Scores of telling out-of-distribution (OOD) data from in-distribution (ID) data, which are resampled apart.

    FPR95 is a proportion of the ID data at a threshold that the OOD data set: its interval holds the exact one of that
    proportion, and reaches to one where the OOD data are too few for a lower bound of their 5 % quantile.

    Args:
        inside_score: ``[N]``, scores of ID data.
        outside_score: ``[M]``, scores of OOD data, the positives; high means OOD.
        weights_inside: ``[B, N]``, from ``weighted.resample_weights``.
        weights_outside: ``[B, M]``, likewise, with another seed: the kinds of data are independent.

    Returns:
        ``auroc``, ``aupr`` and ``fpr95``, fractions.

    Raises:
        ValueError: For scores that are not finite numbers ``[N]``, or weights that are not counts of these data.
    """
    inside, outside = (_arrays.as_array(score, "scores") for score in (inside_score, outside_score))
    if inside.ndim != 1 or outside.ndim != 1:
        raise ValueError(f"Expected scores of shapes [N] and [M], got {inside.shape} and {outside.shape}.")
    score, is_outside = np.concatenate([inside, outside]), np.repeat([False, True], [len(inside), len(outside)])
    functions = {"auroc": detection.auroc, "aupr": detection.aupr, "fpr95": detection.fpr95}
    values = {name: function(score, is_outside) for name, function in functions.items()}
    weights = [check_weights(weights_inside, len(inside)), check_weights(weights_outside, len(outside))]
    if len(weights[0]) != len(weights[1]):
        raise ValueError(f"Expected equally many resamples of both kinds, got {len(weights[0])} and {len(weights[1])}.")
    sizes = len(inside), len(outside)

    @lru_cache(maxsize=1)
    def with_other_scores(confidence: float) -> dict[str, Array]:
        # Of either kind, a share could lie above or below all that was seen.
        ranks = np.unique(score, return_inverse=True)[1].reshape(-1) + 1.0
        ends, kinds = np.array([0.0, ranks.max() + 1]), np.repeat([False, True], 2)
        rows = np.repeat(_WEIGHT / np.array(sizes), sizes)[None].repeat(4, 0)
        tail = np.zeros((4, 4))
        for index, (which, end) in enumerate(((0, 1), (0, 0), (1, 0), (1, 1))):
            share = intervals.unseen_share(sizes[which], confidence)
            rows[index, is_outside == bool(which)] *= 1 - share
            tail[index, 2 * which + end] = _WEIGHT * share
        return detection_scores(
            np.concatenate([ranks, ends, ends]), np.concatenate([is_outside, kinds]), np.concatenate([rows, tail], 1)
        )

    def of_the_rate(confidence: float) -> list[float]:
        low, high = intervals.proportion(round(values["fpr95"] * sizes[0]), sizes[0], confidence)
        return [low, 1.0 if intervals.unseen_share(sizes[1], confidence) > 0.05 else high]

    scores = {}
    for name, array in detection_scores(score.astype(np.float64), is_outside, np.concatenate(weights, 1)).items():
        resampled = Replicates(values[name], array, min(sizes), bounds=_BOUNDS[name])
        if name == "fpr95":
            resampled = replace(resampled, unseen=of_the_rate)
        elif resampled.is_constant:
            resampled = replace(resampled, unseen=partial(_scores_of, with_other_scores, name))
        scores[name] = resampled
    return scores


def _scores_of(scores: Callable[[float], dict[str, Array]], name: str, confidence: float) -> list[float]:
    return scores(confidence)[name].tolist()
