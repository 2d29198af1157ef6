r"""Scores of predicted probabilities, and of how well they tell data of another kind.

Arrays are NumPy arrays or tensors on any device. ``probabilities`` is ``[N, C]`` with rows that sum to
one, ``targets`` is ``[N]`` with class indices, an out-of-distribution ``score`` is ``[N]`` and high
where the data look foreign. Everything is computed in float64. All values are fractions or nats, never per cent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

#: Bins of the calibration error and of the reliability diagrams.
N_BINS = 15
#: How far a row of probabilities may be from one; generous enough for float16.
ROW_SUM_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Reliability:
    """Confidence and accuracy in equal-width bins of the confidence.

    Attributes:
        counts: Number of data in each bin.
        confidences: Sum of their confidences, so that bins of several runs can be added.
        correct: Number of them that were classified correctly.
    """

    counts: list[int]
    confidences: list[float]
    correct: list[int]


def classification_metrics(probabilities: Any, targets: Any) -> dict[str, Any]:
    r"""All scores of a classifier's probabilities at once.

    Args:
        probabilities: ``[N, C]``.
        targets: ``[N]``, class indices.

    Returns:
        ``accuracy``, ``nll`` (nats for each datum), ``brier`` (summed over classes, zero to two), ``ece``,
        ``adaptive_ece`` (fractions) and ``reliability`` (a dictionary of :class:`Reliability`).

    Raises:
        ValueError: If shapes do not fit, rows do not sum to one, or something is not finite.

    Example:
        >>> scores = classification_metrics([[0.8, 0.2], [0.3, 0.7]], [0, 0])
        >>> round(scores["accuracy"], 2), round(scores["brier"], 2)
        (0.5, 0.53)
    """
    probabilities, targets = check_predictions(probabilities, targets)
    return {
        "accuracy": accuracy(probabilities, targets),
        "nll": negative_log_likelihood(probabilities, targets),
        "brier": brier_score(probabilities, targets),
        "ece": expected_calibration_error(probabilities, targets),
        "adaptive_ece": adaptive_calibration_error(probabilities, targets),
        "reliability": asdict(reliability(probabilities, targets)),
    }


def out_of_distribution_metrics(inside: Any, outside: Any) -> dict[str, float]:
    """How well the probabilities tell foreign data: AUROC and FPR95 of :func:`foreignness`.

    Args:
        inside: ``[N, C]``, predictions for data of the known kind.
        outside: ``[M, C]``, predictions for data of another kind: the positives.

    Returns:
        ``auroc`` and ``fpr95``, fractions.
    """
    scores = np.concatenate([foreignness(inside), foreignness(outside)])
    is_outside = np.concatenate([np.zeros(len(inside), dtype=bool), np.ones(len(outside), dtype=bool)])
    return {"auroc": auroc(scores, is_outside), "fpr95": fpr95(scores, is_outside)}


def accuracy(probabilities: Any, targets: Any) -> float:
    """Fraction of data whose most probable class is the target."""
    probabilities, targets = check_predictions(probabilities, targets)
    return float((probabilities.argmax(1) == targets).mean())


def negative_log_likelihood(probabilities: Any, targets: Any) -> float:
    r"""Mean of :math:`-\log p(y_n)`, in nats; infinite if a target has probability zero (nothing is clipped)."""
    probabilities, targets = check_predictions(probabilities, targets)
    with np.errstate(divide="ignore"):
        return float(-np.log(probabilities[np.arange(len(targets)), targets]).mean())


def brier_score(probabilities: Any, targets: Any) -> float:
    r"""Squared error against the one-hot target, summed over classes and averaged over data: zero to two.

    .. math:: \frac1N \sum_n \sum_c \big(p_{nc} - [c = y_n]\big)^2

    This is Brier's definition (1950); the binary one of some libraries is half of it.
    """
    probabilities, targets = check_predictions(probabilities, targets)
    errors = probabilities.copy()
    errors[np.arange(len(targets)), targets] -= 1
    return float(np.square(errors).sum(1).mean())


def expected_calibration_error(probabilities: Any, targets: Any, n_bins: int = N_BINS) -> float:
    r"""Expected calibration error of the most probable class, equal-width bins, by netcal.

    .. math:: \sum_b \frac{N_b}{N} \, |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    netcal is given confidences and hits, not the table of probabilities: from a table it takes targets
    with at most two different values for a binary problem, and then scores another quantity. It moves
    a confidence of exactly one into the last bin.
    """
    from netcal.metrics import ECE

    confidence, correct = _confidence(*check_predictions(probabilities, targets))
    return float(ECE(_check_bins(n_bins)).measure(confidence, correct.astype(int)))


def adaptive_calibration_error(probabilities: Any, targets: Any, n_bins: int = N_BINS) -> float:
    """Expected calibration error with bins of equally many data (Nguyen and O'Connor, arXiv 1508.05154).

    Data of equal confidence stay in one bin, so that the value does not depend on their order; bins
    can therefore be fewer and unequal where confidences saturate.
    """
    confidence, correct = _confidence(*check_predictions(probabilities, targets))
    edges = np.unique(np.quantile(confidence, np.linspace(0, 1, _check_bins(n_bins) + 1)[1:-1]))
    index = np.searchsorted(edges, confidence, side="right")
    gaps = np.bincount(index, weights=confidence) - np.bincount(index, weights=correct)
    return float(np.abs(gaps).sum() / len(confidence))


def reliability(probabilities: Any, targets: Any, n_bins: int = N_BINS) -> Reliability:
    """Counts, confidences and hits in equal-width bins; a bin holds its lower edge, the last one also 1."""
    confidence, correct = _confidence(*check_predictions(probabilities, targets))
    edges = np.linspace(0, 1, _check_bins(n_bins) + 1)[1:-1]
    index = np.searchsorted(edges, confidence, side="right")
    return Reliability(
        np.bincount(index, minlength=n_bins).tolist(),
        np.bincount(index, weights=confidence, minlength=n_bins).tolist(),
        np.bincount(index, weights=correct, minlength=n_bins).astype(int).tolist(),
    )


def foreignness(probabilities: Any) -> Array:
    """Out-of-distribution score: one minus the largest probability, ``[N, C] -> [N]``.

    Computed as the sum of all other probabilities, which keeps the order of data whose largest
    probability rounds to one.
    """
    probabilities = check_probabilities(probabilities)
    others = probabilities.copy()
    others[np.arange(len(others)), probabilities.argmax(1)] = 0
    return others.sum(1)


def auroc(score: Any, is_outside: Any) -> float:
    """Probability that a foreign datum scores higher than a known one; ties count half (scikit-learn)."""
    from sklearn.metrics import roc_auc_score

    score, is_outside = _check_scores(score, is_outside)
    return float(roc_auc_score(is_outside, score))


def fpr95(score: Any, is_outside: Any) -> float:
    """Fraction of known data called foreign when at least 95 % of the foreign data are found.

    Foreign data are the positives, and a high score means foreign. The threshold is the largest one
    at which the true-positive rate reaches 95 %; data with a score equal to it are called foreign.
    """
    from sklearn.metrics import roc_curve

    score, is_outside = _check_scores(score, is_outside)
    false_positives, true_positives, _ = roc_curve(is_outside, score, drop_intermediate=False)
    return float(false_positives[np.searchsorted(true_positives, 0.95)])


# -- checks ------------------------------------------------------------------------------------


def check_probabilities(probabilities: Any) -> Array:
    """Probabilities as a float64 array ``[N, C]``, or a ``ValueError`` that says what is wrong."""
    values = _array(probabilities, "probabilities").astype(np.float64)
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2:
        raise ValueError(
            f"Expected probabilities of shape [N, C] with at least one datum and two classes, got {values.shape}. "
            "For a binary problem with one probability p, give the columns 1 - p and p."
        )
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~np.isfinite(values).all(1))
        raise ValueError(
            f"Expected finite probabilities, got NaN or infinity in {len(rows)} of {len(values)} rows, the first "
            f"being row {rows[0]}. Look for NaN in the inputs or the model."
        )
    sums = values.sum(1)
    worst = int(np.abs(sums - 1).argmax())
    if values.min() < 0 or abs(sums[worst] - 1) > ROW_SUM_TOLERANCE:
        raise ValueError(
            f"Expected non-negative probabilities whose rows sum to one, got a smallest value of {values.min():.3g} "
            f"and a sum of {sums[worst]:.6g} in row {worst}. Apply softmax to logits first."
        )
    return values


def check_predictions(probabilities: Any, targets: Any) -> tuple[Array, Array]:
    """Probabilities ``[N, C]`` and class indices ``[N]`` that fit, or a ``ValueError``."""
    values, labels = check_probabilities(probabilities), _array(targets, "targets")
    if labels.shape != (len(values),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"Expected integer targets of shape [{len(values)}], one class index for each row of probabilities, got "
            f"{labels.dtype} of shape {labels.shape}. Use argmax over a one-hot encoding."
        )
    if labels.min() < 0 or labels.max() >= values.shape[1]:
        raise ValueError(
            f"Expected class indices from 0 to {values.shape[1] - 1}, the columns of the probabilities, got "
            f"{labels.min()} to {labels.max()}. Number the classes from zero."
        )
    return values, labels


def _check_scores(score: Any, is_outside: Any) -> tuple[Array, Array]:
    score, is_outside = _array(score, "scores").astype(np.float64), _array(is_outside, "is_outside")
    if score.ndim != 1 or is_outside.shape != score.shape:
        raise ValueError(
            f"Expected scores and labels of one shape [N], got {score.shape} and {is_outside.shape}. "
            "Concatenate the scores of both kinds of data."
        )
    if not np.isfinite(score).all():
        raise ValueError(f"Expected finite scores, got {int((~np.isfinite(score)).sum())} that are not.")
    if set(np.unique(is_outside)) != {0, 1}:
        raise ValueError(
            f"Expected labels with both 0 (known) and 1 (foreign), got {np.unique(is_outside)[:5].tolist()}. "
            "Give data of both kinds."
        )
    return score, is_outside.astype(bool)


def _check_bins(n_bins: int) -> int:
    if not isinstance(n_bins, int) or n_bins < 1:
        raise ValueError(f"Expected a positive number of bins, got {n_bins!r}.")
    return n_bins


def _confidence(probabilities: Array, targets: Array) -> tuple[Array, Array]:
    # A row may exceed one by rounding; a confidence may not.
    return probabilities.max(1).clip(max=1.0), probabilities.argmax(1) == targets


def _array(values: Any, name: str) -> Array:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return np.asarray(values.float() if values.dtype in (torch.bfloat16, torch.float16) else values)
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"Expected numbers in {name}, got an array of {array.dtype}.")
    return array
