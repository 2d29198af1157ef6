"""What calibration errors a predictor would have if it were calibrated: they are never zero on finite data.

Targets are drawn from the predicted probabilities themselves, again and again. An error within what these have is
no sign of miscalibration, and a difference between two such errors no gain.

Source: Vaicenavicius et al., "Evaluating model calibration in classification", AISTATS 2019, arXiv 1902.06977
(consistency resampling, after Bröcker and Smith 2007).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from debiased_laplace import _arrays
from debiased_laplace._arrays import Array
from debiased_laplace.evaluation.scores import calibration
from debiased_laplace.evaluation.scores.calibration import N_BINS
from debiased_laplace.evaluation.scores.smooth import cells, smooth_errors

#: Sets of targets that are drawn; 200 fix the bounds of an interval to a tenth of its width.
N_DRAWS = 200
#: Confidence of the interval.
CONFIDENCE = 0.95


def expected_errors(
    probabilities: Any, n_draws: int = N_DRAWS, seed: int = 0, *, classwise: bool = True
) -> dict[str, list[float]]:
    """Calibration errors of targets that are drawn from the predicted probabilities.

    Args:
        probabilities: ``[N, C]``.
        n_draws: Sets of targets.
        seed: Of NumPy's generator.
        classwise: Also of every class, which costs C times as much, and the smooth error.

    Returns:
        For ``ece``, ``adaptive_ece``, ``smooth_ece``, ``top_label_ece`` and ``classwise_ece`` mean, standard deviation
        and 95 % interval over the draws.

    Example:
        >>> mean, _, low, high = expected_errors([[0.9, 0.1]] * 100)["ece"]
        >>> 0 < low < mean < high < 0.1
        True
    """
    values = _arrays.as_array(probabilities, "probabilities")
    n, n_classes = values.shape
    uniforms = np.random.default_rng(seed).random((n, n_draws))
    confidence, top = values.max(1).clip(max=1.0), values.argmax(1)
    bins = {"ece": calibration.equal_width_bins, "adaptive_ece": calibration.equally_full_bins}
    if classwise:
        labels = _labels(values, uniforms)
        hits = labels == top[:, None]
    else:
        hits = uniforms < confidence[:, None]
    gap = confidence[:, None] - hits
    errors = {name: _errors(bins_of(confidence, N_BINS), gap) for name, bins_of in bins.items()}
    if classwise:
        errors["smooth_ece"] = smooth_errors((cells(confidence) @ gap).T / n)
        errors["top_label_ece"] = _errors(calibration.top_label_bins(values, confidence, N_BINS), gap)
        total = np.zeros(n_draws)
        for index in range(n_classes):
            column = values[:, index]
            total += _errors(calibration.equal_width_bins(column, N_BINS), column[:, None] - (labels == index))
        errors["classwise_ece"] = total / n_classes
    ends = 50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)
    return {
        name: [float(drawn.mean()), float(drawn.std()), *(float(bound) for bound in np.percentile(drawn, ends))]
        for name, drawn in errors.items()
    }


def _labels(probabilities: Array, uniforms: Array) -> Array:
    """Classes drawn by the inverse of the cumulative probabilities, ``[N, draws]``."""
    ends = probabilities.cumsum(1)
    labels = np.zeros(uniforms.shape, dtype=np.int64)
    for column in ends[:, :-1].T:
        labels += uniforms >= column[:, None]
    return labels


def _errors(bins: Array, gaps: Array) -> Array:
    """Sum over bins of the absolute sum of the gaps in it, for each datum: ``[draws]``."""
    n = len(bins)
    matrix = sparse.csr_array((np.ones(n), (bins, np.arange(n))), (int(bins.max()) + 1, n))
    return np.abs(matrix @ gaps).sum(0) / n
