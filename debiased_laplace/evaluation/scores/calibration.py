r"""Calibration errors of predicted probabilities, and the bins that they are made of.

``probabilities`` is ``[N, C]`` with rows that sum to one, ``targets`` is ``[N]`` with class indices. Everything is
computed in float64; all values are fractions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from debiased_laplace._arrays import Array, check_predictions
from debiased_laplace.evaluation.scores.smooth import cells, smooth_errors

#: Bins of the calibration error and of the reliability diagrams.
N_BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Confidence and accuracy in equal-width bins of the confidence, or of each predicted class.

    Attributes:
        counts: Number of data in each bin.
        confidences: Sum of their confidences, so that bins of several runs can be added.
        correct: Number of them that were classified correctly.
    """

    counts: list[int]
    confidences: list[float]
    correct: list[int]


def expected_calibration_error(probabilities: Any, targets: Any, n_bins: int = N_BINS) -> float:
    r"""Expected calibration error of the most probable class, equal-width bins, by netcal.

    .. math:: \sum_b \frac{N_b}{N} \, |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    netcal is given confidences and hits, not the table of probabilities: from a table it takes targets
    with at most two different values for a binary problem, and then scores another quantity. It moves
    a confidence of exactly one into the last bin.
    """
    from netcal.metrics import ECE

    confidence, correct = confidence_and_hits(*check_predictions(probabilities, targets))
    return float(ECE(check_bins(n_bins)).measure(confidence, correct.astype(int)))


def adaptive_calibration_error(probabilities: Any, targets: Any, n_bins: int = N_BINS) -> float:
    """Expected calibration error with bins of equally many data (Nguyen and O'Connor, arXiv 1508.05154).

    Data of equal confidence stay in one bin, so that the value does not depend on their order; bins
    can therefore be fewer and unequal where confidences saturate.
    """
    confidence, correct = confidence_and_hits(*check_predictions(probabilities, targets))
    index = equally_full_bins(confidence, n_bins)
    gaps = np.bincount(index, weights=confidence) - np.bincount(index, weights=correct)
    return float(np.abs(gaps).sum() / len(confidence))


def classwise_calibration_error(probabilities: Any, targets: Any, n_bins: int = N_BINS) -> float:
    r"""Calibration error of the probabilities of all classes, each class in equal-width bins by itself.

    .. math:: \frac1C \sum_c \sum_b \frac{N_{cb}}{N} \, |\mathrm{frequency}_{cb} - \mathrm{mean\ probability}_{cb}|

    :math:`N_{cb}` of all :math:`N` data give class :math:`c` a probability in bin :math:`b`. With many
    classes most probabilities are near zero, and the value is small for any classifier: compare it
    between classifiers of the same data only.

    Args:
        probabilities: ``[N, C]``.
        targets: ``[N]``, class indices.
        n_bins: Bins for each class.

    Returns:
        A fraction, mean over classes.

    Raises:
        ValueError: For predictions that :func:`check_predictions` refuses, or fewer than one bin.

    Example:
        >>> round(classwise_calibration_error([[0.8, 0.2], [0.3, 0.7]], [0, 0]), 2)
        0.45

    Source: Kull et al. 2019, section 2, arXiv 1910.12656.
    """
    probabilities, targets = check_predictions(probabilities, targets)
    total = 0.0
    for label, column in enumerate(probabilities.T):
        index = equal_width_bins(column, n_bins)
        total += np.abs(np.bincount(index, weights=column) - np.bincount(index, weights=targets == label)).sum()
    return float(total / probabilities.size)


def top_label_calibration_error(probabilities: Any, targets: Any, n_bins: int = N_BINS) -> float:
    r"""Expected calibration error of the most probable class, for each predicted class by itself.

    .. math:: \sum_c \sum_b \frac{N_{cb}}{N} \, |\mathrm{accuracy}_{cb} - \mathrm{confidence}_{cb}|

    over the :math:`N_{cb}` data of which class :math:`c` is predicted with a confidence in bin :math:`b`. It is never
    smaller than the ECE, in which classes predicted too surely and others predicted too carefully make up for
    one another; and larger by noise, since there are C times as many bins.

    Source: Gupta and Ramdas, "Top-label calibration and multiclass-to-binary reductions", arXiv 2107.08353.
    """
    probabilities, targets = check_predictions(probabilities, targets)
    confidence, correct = confidence_and_hits(probabilities, targets)
    index = top_label_bins(probabilities, confidence, n_bins)
    return float(np.abs(np.bincount(index, weights=confidence - correct)).sum() / len(confidence))


def smooth_calibration_error(probabilities: Any, targets: Any) -> float:
    """SmoothECE of the most probable class, without bins; see :mod:`~debiased_laplace.evaluation.scores.smooth`."""
    confidence, correct = confidence_and_hits(*check_predictions(probabilities, targets))
    return float(smooth_errors((cells(confidence, confidence - correct).sum(1) / len(confidence))[None])[0])


def reliability(probabilities: Any, targets: Any, n_bins: int = N_BINS) -> Reliability:
    """Counts, confidences and hits in equal-width bins; a bin holds its lower edge, the last one also 1."""
    confidence, correct = confidence_and_hits(*check_predictions(probabilities, targets))
    index = equal_width_bins(confidence, n_bins)
    return Reliability(
        np.bincount(index, minlength=n_bins).tolist(),
        np.bincount(index, weights=confidence, minlength=n_bins).tolist(),
        np.bincount(index, weights=correct, minlength=n_bins).astype(int).tolist(),
    )


def by_class(probabilities: Any, targets: Any) -> tuple[Reliability, Reliability]:
    """What a table by class shows.

    Returns:
        Of each class as prediction (top-label): how often it is predicted, with which sum of confidences, and how often
        rightly; and of each class as a probability (classwise): the number of data, the sum of its probabilities, and
        how often it is the target.
    """
    probabilities, targets = check_predictions(probabilities, targets)
    confidence, correct = confidence_and_hits(probabilities, targets)
    n, classes = probabilities.shape
    top = probabilities.argmax(1)

    def count(index: Array, weights: Array | None = None) -> Array:
        return np.bincount(index, weights, classes)

    return (
        Reliability(count(top).tolist(), count(top, confidence).tolist(), count(top[correct]).tolist()),
        Reliability([n] * classes, probabilities.sum(0).tolist(), count(targets).tolist()),
    )


def equal_width_bins(values: Array, n_bins: int) -> Array:
    """Index of the equal-width bin of each value, from zero; a bin holds its lower edge, the last one also 1."""
    return np.searchsorted(np.linspace(0, 1, check_bins(n_bins) + 1)[1:-1], values, side="right")


def equally_full_bins(values: Array, n_bins: int) -> Array:
    """Index of the bin of each value, bins of equally many data as far as ties allow; equal values share a bin."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, check_bins(n_bins) + 1)[1:-1]))
    return np.searchsorted(edges, values, side="right")


def top_label_bins(probabilities: Array, confidence: Array, n_bins: int) -> Array:
    """Index of the predicted class and bin of confidence, together, of each datum; pairs without data have none."""
    index = probabilities.argmax(1) * n_bins + equal_width_bins(confidence, n_bins)
    return np.unique(index, return_inverse=True)[1].reshape(-1)


def confidence_and_hits(probabilities: Array, targets: Array) -> tuple[Array, Array]:
    """Largest probability ``[N]`` and whether its class is the target ``[N]``."""
    # A row may exceed one by rounding; a confidence may not.
    return probabilities.max(1).clip(max=1.0), probabilities.argmax(1) == targets


def check_bins(n_bins: int) -> int:
    """A number of bins, or a ``ValueError``."""
    if not isinstance(n_bins, int) or n_bins < 1:
        raise ValueError(f"Expected a positive number of bins, got {n_bins!r}.")
    return n_bins
