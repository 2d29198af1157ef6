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
#: Points of a risk-coverage curve.
CURVE_POINTS = 200
#: How far the sum of a row of probabilities may be from one: what float16 leaves, which may have been before.
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
        ``adaptive_ece``, ``classwise_ece``, ``aurc`` (fractions) and ``reliability`` (a dictionary of
        :class:`Reliability`).

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
        "classwise_ece": classwise_calibration_error(probabilities, targets),
        "aurc": aurc(probabilities, targets),
        "reliability": asdict(reliability(probabilities, targets)),
    }


def out_of_distribution_metrics(inside: Any, outside: Any) -> dict[str, float]:
    """How well the probabilities tell foreign data: AUROC, average precision and FPR95 of :func:`foreignness`.

    Args:
        inside: ``[N, C]``, predictions for data of the known kind.
        outside: ``[M, C]``, predictions for data of another kind: the positives.

    Returns:
        ``auroc``, ``aupr`` (the foreign data are the positives; by chance it is their share) and ``fpr95``, fractions.
    """
    scores = np.concatenate([foreignness(inside), foreignness(outside)])
    is_outside = np.concatenate([np.zeros(len(inside), dtype=bool), np.ones(len(outside), dtype=bool)])
    return {
        "auroc": auroc(scores, is_outside),
        "aupr": aupr(scores, is_outside),
        "fpr95": fpr95(scores, is_outside),
    }


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


def expected_calibration_error(probabilities: Any, targets: Any, n_bins: int = N_BINS) -> float:
    r"""Expected calibration error of the most probable class, equal-width bins, by netcal.

    .. math:: \sum_b \frac{N_b}{N} \, |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    netcal is given confidences and hits, not the table of probabilities: from a table it takes targets
    with at most two different values for a binary problem, and then scores another quantity. It moves
    a confidence of exactly one into the last bin.
    """
    from netcal.metrics import ECE

    confidence, correct = confidence_and_hits(*check_predictions(probabilities, targets))
    return float(ECE(_check_bins(n_bins)).measure(confidence, correct.astype(int)))


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
    r"""Calibration error of the probabilities of all classes, each class in its own equal-width bins.

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


def aurc(probabilities: Any, targets: Any) -> float:
    r"""Area under the risk-coverage curve: how well the confidence tells which predictions to trust.

    .. math:: \frac1N \sum_{k=1}^N \frac1k \, (\text{errors among the } k \text{ most confident})

    The confidence is the largest probability. Where :math:`k` cuts through data of equal confidence,
    their errors are spread evenly, the expected value over all orders of them. Smaller is better; it
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


def reliability(probabilities: Any, targets: Any, n_bins: int = N_BINS) -> Reliability:
    """Counts, confidences and hits in equal-width bins; a bin holds its lower edge, the last one also 1."""
    confidence, correct = confidence_and_hits(*check_predictions(probabilities, targets))
    index = equal_width_bins(confidence, n_bins)
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


def entropy(probabilities: Any) -> Array:
    r"""Entropy :math:`-\sum_c p_c \log p_c` in nats, ``[N, C] -> [N]``, with :math:`0 \log 0 = 0`: zero to log C.

    High for data that look foreign, so that it can stand in for :func:`foreignness`.
    """
    from scipy.special import entr

    # A probability above one by rounding would have a negative share.
    return entr(check_probabilities(probabilities).clip(max=1.0)).sum(1)


def auroc(score: Any, is_outside: Any) -> float:
    """Probability that a foreign datum scores higher than a known one; ties count half (scikit-learn)."""
    from sklearn.metrics import roc_auc_score

    score, is_outside = _check_scores(score, is_outside)
    return float(roc_auc_score(is_outside, score))


def aupr(score: Any, is_outside: Any) -> float:
    r"""Average precision at finding foreign data, the positives (scikit-learn).

    .. math:: \sum_t (\mathrm{recall}_t - \mathrm{recall}_{t-1}) \, \mathrm{precision}_t

    over all thresholds, without interpolation. Scores at random have the share of foreign data.
    """
    from sklearn.metrics import average_precision_score

    score, is_outside = _check_scores(score, is_outside)
    return float(average_precision_score(is_outside, score))


def fpr95(score: Any, is_outside: Any) -> float:
    """Fraction of known data called foreign when at least 95 % of the foreign data are found.

    Foreign data are the positives, and a high score means foreign. The threshold is the largest one
    at which the true-positive rate reaches 95 %; data with a score equal to it are called foreign.
    """
    from sklearn.metrics import roc_curve

    score, is_outside = _check_scores(score, is_outside)
    false_positives, true_positives, _ = roc_curve(is_outside, score, drop_intermediate=False)
    return float(false_positives[np.searchsorted(true_positives, 0.95)])


# -- bins --------------------------------------------------------------------------------------


def equal_width_bins(values: Array, n_bins: int) -> Array:
    """Index of the equal-width bin of each value, from zero; a bin holds its lower edge, the last one also 1."""
    return np.searchsorted(np.linspace(0, 1, _check_bins(n_bins) + 1)[1:-1], values, side="right")


def equally_full_bins(values: Array, n_bins: int) -> Array:
    """Index of the bin of each value, bins of equally many data as far as ties allow; equal values share a bin."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, _check_bins(n_bins) + 1)[1:-1]))
    return np.searchsorted(edges, values, side="right")


def confidence_and_hits(probabilities: Array, targets: Array) -> tuple[Array, Array]:
    """Largest probability ``[N]`` and whether its class is the target ``[N]``."""
    # A row may exceed one by rounding; a confidence may not.
    return probabilities.max(1).clip(max=1.0), probabilities.argmax(1) == targets


def _risks(probabilities: Any, targets: Any) -> Array:
    # Error rate among the k most confident for k = 1 .. N, the errors within each tie spread evenly.
    confidence, correct = confidence_and_hits(*check_predictions(probabilities, targets))
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    spread = np.repeat(np.bincount(group, weights=~correct) / sizes, sizes)
    return spread.cumsum() / np.arange(1, len(spread) + 1)


# -- checks ------------------------------------------------------------------------------------


def check_probabilities(probabilities: Any) -> Array:
    """Probabilities as a float64 array ``[N, C]``, rows divided by their sums, or an error that says what is wrong."""
    values = as_array(probabilities, "probabilities").astype(np.float64)
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
    if values.min() < 0 or abs(sums[worst] - 1) > row_sum_tolerance(probabilities):
        raise ValueError(
            f"Expected non-negative probabilities whose rows sum to one, got a smallest value of {values.min():.3g} "
            f"and a sum of {sums[worst]:.6g} in row {worst}. Apply softmax first: this looks like logits."
        )
    # Only what rounding of float64 does not explain: what was divided once is the same again, ties stay ties.
    exact = np.abs(sums - 1) <= np.finfo(np.float64).eps * values.shape[1]
    return values / np.where(exact, 1.0, sums)[:, None]


def row_sum_tolerance(probabilities: Any) -> float:
    """How far the sum of a row may be from one: as its dtype rounds, or float16."""
    if isinstance(probabilities, torch.Tensor) and probabilities.is_floating_point():
        return max(ROW_SUM_TOLERANCE, torch.finfo(probabilities.dtype).eps)
    return ROW_SUM_TOLERANCE


def check_predictions(probabilities: Any, targets: Any) -> tuple[Array, Array]:
    """Probabilities ``[N, C]`` and class indices ``[N]`` that fit, or a ``ValueError``."""
    values, labels = check_probabilities(probabilities), as_array(targets, "targets")
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
    score, is_outside = as_array(score, "scores").astype(np.float64), as_array(is_outside, "is_outside")
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


def as_array(values: Any, name: str) -> Array:
    """Numbers of any kind and device as a NumPy array; ``name`` is for the ``ValueError`` about other things."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return np.asarray(values.float() if values.dtype in (torch.bfloat16, torch.float16) else values)
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"Expected numbers in {name}, got an array of {array.dtype}.")
    return array
