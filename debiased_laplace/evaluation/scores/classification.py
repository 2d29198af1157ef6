r"""Scores of predicted probabilities.

Arrays are NumPy arrays or tensors on any device. ``probabilities`` is ``[N, C]`` with rows that sum to one,
``targets`` is ``[N]`` with class indices. Everything is computed in float64. All values are fractions or nats, never
per cent.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from debiased_laplace._arrays import Array, check_predictions
from debiased_laplace.evaluation.scores.calibration import (
    adaptive_calibration_error,
    classwise_calibration_error,
    confidence_and_hits,
    expected_calibration_error,
    reliability,
    smooth_calibration_error,
    top_label_calibration_error,
)
from debiased_laplace.evaluation.scores.refinement import recalibrate

#: Points of a risk-coverage curve.
CURVE_POINTS = 200


def classification_metrics(probabilities: Any, targets: Any) -> dict[str, Any]:
    r"""All scores of a classifier's probabilities at once.

    Args:
        probabilities: ``[N, C]``.
        targets: ``[N]``, class indices.

    Returns:
        ``accuracy``, ``nll`` (nats for each datum), ``brier`` (summed over classes, zero to two), ``ece``,
        ``adaptive_ece``, ``smooth_ece``, ``top_label_ece``, ``classwise_ece``, ``aurc``, ``augrc`` (fractions),
        ``nll_calibration`` and ``nll_refinement`` (which add up to the NLL), ``brier_calibration`` and
        ``brier_refinement``, and ``reliability`` (a dictionary of :class:`Reliability`).

    Raises:
        ValueError: If shapes do not fit, rows do not sum to one, or something is not finite.

    Example:
        >>> scores = classification_metrics([[0.8, 0.2], [0.3, 0.7]], [0, 0])
        >>> round(scores["accuracy"], 2), round(scores["brier"], 2)
        (0.5, 0.53)
    """
    probabilities, targets = check_predictions(probabilities, targets)
    data = datum_scores(probabilities, targets)
    means = {name: float(values.mean()) for name, values in data.items()}
    found = recalibrate(probabilities, one_hot(targets, probabilities.shape[1]))
    refined = found.risks({name: column.mean() for name, column in found.columns.items()})
    return with_calibration_losses({
        **means,
        "ece": expected_calibration_error(probabilities, targets),
        "adaptive_ece": adaptive_calibration_error(probabilities, targets),
        "smooth_ece": smooth_calibration_error(probabilities, targets),
        "top_label_ece": top_label_calibration_error(probabilities, targets),
        "classwise_ece": classwise_calibration_error(probabilities, targets),
        "aurc": aurc(probabilities, targets),
        "augrc": augrc(probabilities, targets),
        **{name: float(value) for name, value in refined.items()},
    }) | {"reliability": asdict(reliability(probabilities, targets))}  # fmt: skip


def with_calibration_losses(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores with calibration losses: what recalibration removes. Undefined where nothing could be finite."""
    with np.errstate(invalid="ignore"):
        of_loss = {loss: np.subtract(scores[loss], scores[f"{loss}_refinement"]) for loss in ("nll", "brier")}
    return scores | {f"{loss}_calibration": part if part.ndim else float(part) for loss, part in of_loss.items()}


def one_hot(targets: Array, n_classes: int) -> Array:
    """Class indices ``[N]`` as ``[N, C]``."""
    return np.eye(n_classes)[targets]


def accuracy(probabilities: Any, targets: Any) -> float:
    """Fraction of data whose most probable class is the target."""
    probabilities, targets = check_predictions(probabilities, targets)
    return float(datum_scores(probabilities, targets)["accuracy"].mean())


def negative_log_likelihood(probabilities: Any, targets: Any) -> float:
    r"""Mean of :math:`-\log p(y_n)`, in nats; infinite if a target has probability zero (nothing is clipped)."""
    probabilities, targets = check_predictions(probabilities, targets)
    return float(datum_scores(probabilities, targets)["nll"].mean())


def brier_score(probabilities: Any, targets: Any) -> float:
    r"""Squared error against the one-hot target, summed over classes and averaged over data: zero to two.

    .. math:: \frac1N \sum_n \sum_c \big(p_{nc} - [c = y_n]\big)^2

    This is Brier's definition (1950); the binary one of some libraries is half of it.
    """
    probabilities, targets = check_predictions(probabilities, targets)
    return float(datum_scores(probabilities, targets)["brier"].mean())


def datum_scores(probabilities: Array, targets: Array) -> dict[str, Array]:
    """What each datum adds to the scores that are means over data: ``accuracy``, ``nll`` and ``brier``, each ``[N]``.

    Takes what :func:`check_predictions` returns.
    """
    rows, errors = np.arange(len(targets)), probabilities.copy()
    errors[rows, targets] -= 1
    with np.errstate(divide="ignore"):
        nll = -np.log(probabilities[rows, targets])
    correct = (probabilities.argmax(1) == targets).astype(np.float64)
    return {"accuracy": correct, "nll": nll, "brier": np.square(errors).sum(1)}


def other_labels(probabilities: Array, targets: Array) -> Array:
    """How probable each class is if it is not the target, ``[N, C]``: rows without the target that sum to one."""
    labels = probabilities.copy()
    labels[np.arange(len(targets)), targets] = 0
    sums = labels.sum(1, keepdims=True)
    uniform = np.ones_like(labels)
    uniform[np.arange(len(targets)), targets] = 0
    return np.where(sums > 0, labels / np.where(sums > 0, sums, 1), uniform / (labels.shape[1] - 1))


def expected_datum_scores(probabilities: Array, labels: Array) -> dict[str, Array]:
    """:func:`datum_scores` where the target is drawn from ``labels: [N, C]``, its mean over the draws."""
    with np.errstate(divide="ignore"):
        logarithms = np.log(probabilities)
    losses = np.where(labels > 0, -labels * np.where(labels > 0, logarithms, 0), 0)
    return {
        "accuracy": labels[np.arange(len(labels)), probabilities.argmax(1)],
        "nll": losses.sum(1),
        "brier": 1 + np.square(probabilities).sum(1) - 2 * (labels * probabilities).sum(1),
    }


def aurc(probabilities: Any, targets: Any) -> float:
    r"""Area under the risk-coverage curve: how well the confidence tells which predictions to trust.

    .. math:: \frac1N \sum_{k=1}^N \frac1k \, (\text{errors among the } k \text{ most confident})

    The confidence is the largest probability. Where :math:`k` cuts through data of equal confidence,
    their errors are distributed evenly, the expected value over all orders of them. Smaller is better; it
    depends on the error rate too, which it equals when all data are equally confident.

    Args:
        probabilities: ``[N, C]``.
        targets: ``[N]``, class indices.

    Returns:
        A mean error rate, zero to one.

    Raises:
        ValueError: For predictions that :func:`check_predictions` refuses.

    Example:
        >>> aurc([[0.9, 0.1], [0.2, 0.8]], [0, 0])
        0.25

    Source: Geifman and El-Yaniv 2017, arXiv 1705.08500.
    """
    return float(_risks(probabilities, targets).mean())


def augrc(probabilities: Any, targets: Any) -> float:
    r"""Area under the generalised risk-coverage curve: how often an error is not noticed, over all thresholds.

    The generalised risk is the share of *all* data that are kept and wrong, so that every error counts by its rank
    alone, whereas :func:`aurc` has those of the most confident data in many of its fractions. The area is that below
    straight lines, from nothing kept to all kept; data of equal confidence are a line, the expected value over their
    orders. It is

    .. math:: \mathrm{acc}\,(1 - \mathrm{acc})\,(1 - \mathrm{AUROC_f}) + (1 - \mathrm{acc})^2 / 2

    with AUROC_f that of telling right from wrong predictions by the confidence.

    Args:
        probabilities: ``[N, C]``.
        targets: ``[N]``, class indices.

    Returns:
        Zero to one half.

    Raises:
        ValueError: For predictions that :func:`check_predictions` refuses.

    Example:
        >>> augrc([[0.9, 0.1], [0.2, 0.8]], [0, 0])
        0.125

    Source: Traub et al., "Overcoming common flaws in the evaluation of selective classification systems", NeurIPS 2024,
    arXiv 2407.01032.
    """
    risks = _risks(probabilities, targets)
    n = len(risks)
    errors = risks * np.arange(1, n + 1)
    return float((errors.sum() - errors[-1] / 2) / n**2)


def risk_coverage(probabilities: Any, targets: Any) -> tuple[Array, Array]:
    """The curve of which :func:`aurc` is the mean height, to be drawn.

    Args:
        probabilities: ``[N, C]``.
        targets: ``[N]``, class indices.

    Returns:
        ``(coverage, risk)``, fractions of at most :data:`CURVE_POINTS` entries: the share of data that is
        kept, the most confident first and rising to one, and the error rate among them.
    """
    risks = _risks(probabilities, targets)
    kept = np.unique(np.linspace(1, len(risks), CURVE_POINTS).round().astype(int))
    return kept / len(risks), risks[kept - 1]


def _risks(probabilities: Any, targets: Any) -> Array:
    # Error rate among the k most confident for k = 1 .. N, the errors within each tie distributed evenly.
    confidence, correct = confidence_and_hits(*check_predictions(probabilities, targets))
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    error_rates = np.repeat(np.bincount(group, weights=~correct) / sizes, sizes)
    return error_rates.cumsum() / np.arange(1, len(error_rates) + 1)
