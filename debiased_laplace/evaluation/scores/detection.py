r"""Out-of-distribution (OOD) scores, and how well they tell OOD data from in-distribution (ID) data.

A ``score`` is ``[N]`` and high where data look out of distribution: the positive class. Everything is
computed in float64; all values are fractions or nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from debiased_laplace._arrays import Array, as_array, check_probabilities

#: Before the name of a further score among the arrays of a prediction.
OOD = "ood: "


def out_of_distribution_metrics(inside: Any, outside: Any) -> dict[str, float]:
    """How well the probabilities tell OOD data: AUROC, average precision and FPR95 of :func:`ood_score`.

    Args:
        inside: ``[N, C]``, predictions for in-distribution data.
        outside: ``[M, C]``, predictions for out-of-distribution data: the positives.

    Returns:
        ``auroc``, ``aupr`` (by chance it is the share of OOD data) and ``fpr95``, fractions.
    """
    scores = np.concatenate([ood_score(inside), ood_score(outside)])
    is_outside = np.concatenate([np.zeros(len(inside), dtype=bool), np.ones(len(outside), dtype=bool)])
    return {
        "auroc": auroc(scores, is_outside),
        "aupr": aupr(scores, is_outside),
        "fpr95": fpr95(scores, is_outside),
    }


def ood_score(probabilities: Any) -> Array:
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

    High for data that look out of distribution, so that it can stand in for :func:`ood_score`.
    """
    from scipy.special import entr

    # A probability above one by rounding would have a negative share.
    return entr(check_probabilities(probabilities).clip(max=1.0)).sum(1)


def auroc(score: Any, is_outside: Any) -> float:
    """Probability that an OOD datum scores higher than an ID one; ties count half (scikit-learn)."""
    from sklearn.metrics import roc_auc_score

    score, is_outside = _check_scores(score, is_outside)
    return float(roc_auc_score(is_outside, score))


def aupr(score: Any, is_outside: Any) -> float:
    r"""Average precision at detecting OOD data, the positives (scikit-learn).

    .. math:: \sum_t (\mathrm{recall}_t - \mathrm{recall}_{t-1}) \, \mathrm{precision}_t

    over all thresholds, without interpolation. Scores at random have the share of OOD data.
    """
    from sklearn.metrics import average_precision_score

    score, is_outside = _check_scores(score, is_outside)
    return float(average_precision_score(is_outside, score))


def fpr95(score: Any, is_outside: Any) -> float:
    """Fraction of ID data called OOD when at least 95 % of the OOD data are detected.

    OOD data are the positives, and a high score means OOD. The threshold is the largest one at which the
    true-positive rate reaches 95 %; data with a score equal to it are called OOD.
    """
    from sklearn.metrics import roc_curve

    score, is_outside = _check_scores(score, is_outside)
    false_positives, true_positives, _ = roc_curve(is_outside, score, drop_intermediate=False)
    return float(false_positives[np.searchsorted(true_positives, 0.95)])


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
            "Expected labels with both 0 (in distribution) and 1 (out of distribution), got "
            f"{np.unique(is_outside)[:5].tolist()}. Give data of both kinds."
        )
    return score, is_outside.astype(bool)


def ood_scores(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Out-of-distribution scores ``[N]`` that a prediction has; high means OOD."""
    scores: dict[str, NDArray[Any]] = {}
    if "probabilities" in arrays:
        scores["maximum probability"] = ood_score(arrays["probabilities"])
        scores["entropy"] = entropy(arrays["probabilities"])
    for name in ("mutual_information", "functional_variance"):
        if name in arrays:
            scores[name.replace("_", " ")] = arrays[name]
    return scores | {name.removeprefix(OOD): array for name, array in arrays.items() if name.startswith(OOD)}
