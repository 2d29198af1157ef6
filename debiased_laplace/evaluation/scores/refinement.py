r"""Calibration and refinement: which part of a proper score a recalibration would remove, and which part it would not.

The risk of a proper loss is the refinement loss, the smallest risk that any recalibration of the predictions has, and
the calibration loss, the rest. Recalibration is by a temperature here, :math:`p_c^{1/\tau}` normalised: it leaves the
order of the classes and has one number to learn, so that what is left is hardly ever its own error. With it

* refinement is an upper bound, calibration a lower one: miscalibration that no temperature removes, such as of
  some classes alone, counts as refinement (the errors by class are for that);
* a predictor and the same one at another temperature have the same refinement. Where a posterior's is smaller than the
  network's, it knows something that no temperature could say, even one chosen on the data at hand.

Each datum is recalibrated by the temperature with the smallest log loss on the other four fifths of the data (folds by
position, :data:`N_FOLDS`) and on one datum more that may be of any class, which determines it even where all are right.
So the loss is not too small by what the data would have decided about themselves; the estimate of a calibration loss
of zero has a mean of about -1/2N, and may be below zero. Intervals are those of means over data at these temperatures:
another temperature would not change the log loss to first order, since it is the best.

Source: Berta, Holzmüller, Jordan and Bach, "Rethinking early stopping: refine, then calibrate", arXiv 2501.19195;
Bröcker, "Reliability, sufficiency, and the decomposition of proper scores", QJRMS 135 (2009), 1512-1519.
"""

from __future__ import annotations

import math

import numpy as np

from debiased_laplace.evaluation.scores.checks import Array

N_FOLDS = 5
#: Range of the temperatures, as everywhere.
TEMPERATURES = 1 / 20, 20.0
_TOLERANCE = 1e-10


def recalibrated_scores(probabilities: Array, labels: Array) -> dict[str, Array]:
    """Losses of each datum when it is recalibrated.

    Args:
        probabilities: ``[N, C]``.
        labels: How probable each class is as the target, ``[N, C]``; one-hot for known targets.

    Returns:
        ``nll_refinement`` and ``brier_refinement``, ``[N]`` each; the former infinite where a possible target has
        probability zero.
    """
    logarithms = np.log(np.maximum(probabilities, np.finfo(float).tiny))
    logarithms -= logarithms.max(1, keepdims=True)
    of_target = (labels * logarithms).sum(1)
    inverse = inverse_temperatures(logarithms, of_target)
    scaled = inverse[:, None] * logarithms
    powers = np.exp(scaled)
    sums = powers.sum(1)
    powers /= sums[:, None]
    nll = np.log(sums) - inverse * of_target
    nll[((labels > 0) & (probabilities == 0)).any(1)] = np.inf
    brier = 1 + np.square(powers).sum(1) - 2 * (labels * powers).sum(1)
    return {"nll_refinement": nll, "brier_refinement": brier}


def inverse_temperatures(logarithms: Array, of_target: Array) -> Array:
    r"""For each datum the inverse temperature from the data of the other folds, ``[N]``.

    Args:
        logarithms: ``[N, C]``, up to a constant in each row.
        of_target: ``[N]``, that of the target, or their mean over possible targets.
    """
    n = len(logarithms)
    fold, result, logarithm = np.arange(n) % N_FOLDS, np.empty(n), 0.0
    for index in range(min(N_FOLDS, n)):
        others = (fold != index).astype(np.float64)
        wanted = float(others @ of_target + logarithms.mean())
        logarithm = _best(logarithms, others + 1 / n, wanted, logarithm)
        result[fold == index] = math.exp(logarithm)
    return result


def _best(logarithms: Array, weights: Array, wanted: float, start: float) -> float:
    # The zero of the slope of the log loss, convex in the inverse temperature: Newton's steps in its logarithm.
    low, high = (-math.log(end) for end in reversed(TEMPERATURES))
    x = start
    while high - low > _TOLERANCE:
        powers = np.exp(math.exp(x) * logarithms)
        powers /= powers.sum(1, keepdims=True)
        powers *= logarithms
        means = powers.sum(1)
        slope = float(weights @ means) - wanted
        curvature = float(weights @ ((powers * logarithms).sum(1) - means * means)) * math.exp(x)
        low, high = (low, x) if slope > 0 else (x, high)
        step = slope / curvature if curvature > 0 else 0.0
        if abs(step) < _TOLERANCE:
            return x
        x = x - step if low < x - step < high else (low + high) / 2
    return x
