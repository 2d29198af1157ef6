r"""Calibration and refinement: which part of a proper score a recalibration would remove, and which part it would not.

The risk of a proper loss is the refinement loss, the smallest risk that any recalibration of the predictions has, and
the calibration loss, the rest. Recalibration is by a temperature here, :math:`p_c^b` normalised with b the inverse
temperature of the smallest log loss: one number, so that what is left is hardly ever its own error. With it

* refinement is an upper bound, calibration a lower one: miscalibration that no temperature removes, such as of
  some classes alone, counts as refinement (the errors by class are for that);
* a predictor and the same one at another temperature have the same refinement. Where a posterior's is smaller than the
  network's, it knows something that no temperature could say, even one chosen on the data at hand.

The risk of N data at the b that they choose themselves is too small. With :math:`g_n, V_n` slope and curvature of the
log loss of a datum in b, :math:`u_n, v_n` those of a loss :math:`l_n`, and means as bars, to order 1/N

.. math:: \bar l + \frac{1}{N}\Big(\frac{\overline{ug}}{\bar V} - \frac{\bar v\, \overline{g^2}}{2 \bar V^2}\Big)

has no bias: half of Akaike's term for the log loss (Takeuchi's, of one parameter), nothing for new data. A resample has
the b of one Newton step, :math:`\delta = -(\bar g_w - \bar g)/\bar V`, and the risk
:math:`\bar l_w + \bar u_w \delta + \bar v \delta^2 / 2`: means over resamples, as cheap as any other, that know
the error of b to second order. That matters where nothing is miscalibrated, since to first order there is no error.

One datum more, which may be of any class, takes part in the choice of b and determines it where all are right.

Source: Berta, Holzmüller, Jordan and Bach, "Rethinking early stopping: refine, then calibrate", arXiv 2501.19195;
Bröcker, "Reliability, sufficiency, and the decomposition of proper scores", QJRMS 135 (2009), 1512-1519.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from debiased_laplace._arrays import Array

#: Range of the temperatures, as everywhere.
TEMPERATURES = 1 / 20, 20.0
RANGES = {"nll": (0.0, math.inf), "brier": (0.0, 2.0)}
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Recalibration:
    """Losses of data at the temperature that is best for them.

    Attributes:
        columns: For each datum ``[N]`` the losses ``nll_refinement`` and ``brier_refinement``, and their slopes,
            ``nll_slope`` and ``brier_slope``, in the inverse temperature.
        curvatures: Mean curvatures of the two losses there.
        inverse: The inverse temperature.
    """

    columns: Mapping[str, Array]
    curvatures: Mapping[str, float]
    inverse: float

    def risks(self, means: Mapping[str, Array]) -> dict[str, Array]:
        """``nll_refinement`` and ``brier_refinement`` from means of the columns over the data or resamples, ``[B]``."""
        slope, curvature = self.columns["nll_slope"], self.curvatures["nll"]
        n, square = len(slope), float((slope * slope).mean())
        # 1/V, but no standard error of b above b itself: then the data say nothing of it.
        flat = min(1 / curvature, self.inverse / math.sqrt(square / n)) if curvature > 0 and square > 0 else 0.0
        step = -(means["nll_slope"] - slope.mean()) * flat
        result = {}
        for loss, (low, high) in RANGES.items():
            bend, product = self.curvatures[loss], float((self.columns[f"{loss}_slope"] * slope).mean())
            too_small = (product * flat - bend * square * flat**2 / 2) / n
            of_step = means[f"{loss}_slope"] * step + bend * step * step / 2
            result[f"{loss}_refinement"] = np.clip(means[f"{loss}_refinement"] + of_step + too_small, low, high)
        return result


def recalibrate(probabilities: Array, labels: Array) -> Recalibration:
    """Recalibrate predictions by the temperature that is best for them.

    Args:
        probabilities: ``[N, C]``.
        labels: How probable each class is as the target, ``[N, C]``; one-hot for known targets. Where a possible target
            has probability zero, the log loss is infinite.
    """
    logarithms = np.log(np.maximum(probabilities, np.finfo(float).tiny))
    logarithms -= logarithms.max(1, keepdims=True)
    of_target = (labels * logarithms).sum(1)
    inverse = math.exp(_best(logarithms, float(of_target.sum() + logarithms.mean())))
    powers = np.exp(inverse * logarithms)
    sums = powers.sum(1)
    powers /= sums[:, None]
    means = (powers * logarithms).sum(1)
    deviations = logarithms - means[:, None]
    slopes = powers * deviations  # of the probabilities
    variances = (slopes * deviations).sum(1)
    bends = powers * (deviations**2 - variances[:, None])
    nll = np.log(sums) - inverse * of_target
    nll[((labels > 0) & (probabilities == 0)).any(1)] = np.inf
    errors = 2 * (powers - labels)
    columns = {
        "nll_refinement": nll, "brier_refinement": 1 + (powers * (powers - 2 * labels)).sum(1),
        "nll_slope": means - of_target, "brier_slope": (errors * slopes).sum(1),
    }  # fmt: skip
    n = len(nll)
    curvatures = {
        "nll": float(variances.mean()) * (1 + 1 / n), "brier": float((2 * slopes**2 + errors * bends).sum()) / n
    }  # fmt: skip
    return Recalibration(columns, curvatures, inverse)


def _best(logarithms: Array, wanted: float) -> float:
    # Logarithm of the zero of the slope of the log loss, which is convex in b: Newton's steps in the logarithm.
    low, high = (-math.log(end) for end in reversed(TEMPERATURES))
    n, x = len(logarithms), 0.0
    while high - low > _TOLERANCE:
        powers = np.exp(math.exp(x) * logarithms)
        powers /= powers.sum(1, keepdims=True)
        powers *= logarithms
        means = powers.sum(1)
        slope = (1 + 1 / n) * float(means.sum()) - wanted  # the further datum has the mean of all inputs
        curvature = (1 + 1 / n) * float((powers * logarithms).sum() - means @ means) * math.exp(x)
        low, high = (low, x) if slope > 0 else (x, high)
        step = slope / curvature if curvature > 0 else 0.0
        if abs(step) < _TOLERANCE:
            return x
        x = x - step if low < x - step < high else (low + high) / 2
    return x
