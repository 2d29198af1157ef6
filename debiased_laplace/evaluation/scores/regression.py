r"""Scores of Gaussian predictions of real numbers.

``mean``, ``variance`` and ``targets`` are NumPy arrays or tensors of one shape, ``[N, C]`` for C outputs or
``[N]`` for one. ``variance`` is the *total* predictive variance: that of the function (epistemic) plus that
of the noise, since a target holds both. Outputs are scored one by one; correlations between them are not.
Everything is computed in float64 and in the units of the targets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from debiased_laplace._arrays import Array, as_array

#: Expected coverages of the central intervals of a calibration curve: 0.05 to 0.95.
LEVELS: Array = np.arange(1, 20) / 20
#: Central intervals that are reported by themselves, in per cent of expected coverage.
INTERVALS = (50, 90, 95)
# Half the width of the central intervals, in standard deviations.
_HALF_WIDTHS: Array = ndtri((1 + LEVELS) / 2)


def regression_metrics(mean: Any, variance: Any, targets: Any) -> dict[str, float]:
    r"""All scores of Gaussian predictions at once.

    With :math:`z = (y - \mu) / \sigma`, and means over data unless said otherwise:

    .. math::
        \mathrm{nll} &= \textstyle\sum_c \tfrac12 (z_c^2 + \log 2 \pi \sigma_c^2) \\
        \mathrm{crps} &= \sigma \big(z (2 \Phi(z) - 1) + 2 \varphi(z) - \pi^{-1/2}\big)

    Args:
        mean: ``[N, C]`` or ``[N]``.
        variance: Likewise; total predictive variance, noise included.
        targets: Likewise.

    Returns:
        ``rmse`` (units of the targets; root of the mean over data and outputs), ``nll`` (nats for each datum,
        summed over outputs), ``crps`` (units of the targets, mean over data and outputs), ``coverage_50``,
        ``coverage_90``, ``coverage_95`` (fraction of targets in the central interval of that expected
        coverage), ``width_50``, ``width_90``, ``width_95`` (mean width of that interval, units of the
        targets) and ``calibration_error`` (mean gap of :func:`calibration_curve`, a fraction).

    Raises:
        ValueError: If shapes do not fit, something is not finite, or a variance is not positive.

    Example:
        >>> scores = regression_metrics([0.0, 0.0], [1.0, 1.0], [1.0, -1.0])
        >>> round(scores["rmse"], 3), round(scores["nll"], 3), round(scores["crps"], 3)
        (1.0, 1.419, 0.602)

    Source: CRPS from Gneiting and Raftery 2007, section 4.2 (doi 10.1198/016214506000001437); calibration error
    after Kuleshov et al. 2018, arXiv 1807.00263, with absolute gaps and central intervals where they square
    the gaps of one-sided quantiles.
    """
    contributions = datum_scores(mean, variance, targets)
    return {name: float(value) for name, value in combine({k: v.mean(0) for k, v in contributions.items()}).items()}


def calibration_curve(mean: Any, variance: Any, targets: Any) -> tuple[Array, Array]:
    """Expected coverage of central intervals and the fraction of targets in them, to be drawn.

    Args:
        mean: ``[N, C]`` or ``[N]``.
        variance: Likewise; total predictive variance, noise included.
        targets: Likewise.

    Returns:
        ``(expected, observed)``, each ``[19]``, fractions; ``expected`` is 0.05 to 0.95. Observed above expected
        means too wide a predictive.
    """
    return LEVELS.copy(), datum_scores(mean, variance, targets)["inside"].mean(0)


def datum_scores(mean: Any, variance: Any, targets: Any) -> dict[str, Array]:
    """What each datum adds to the means from which :func:`combine` makes the scores.

    Returns:
        ``squared_error``, ``crps``, ``deviation`` (standard deviation), each ``[N]`` and a mean over outputs;
        ``nll`` ``[N]``, summed over outputs; ``inside`` ``[N, 19]``, share of outputs in each central interval.
    """
    mean, variance, targets = check_gaussian(mean, variance, targets)
    deviation = np.sqrt(variance)
    z = (targets - mean) / deviation
    density = np.exp(-np.square(z) / 2) / np.sqrt(2 * np.pi)
    crps = deviation * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi))
    return {
        "squared_error": np.square(targets - mean).mean(1),
        "nll": (np.square(z) + np.log(2 * np.pi * variance)).sum(1) / 2,
        "crps": crps.mean(1),
        "deviation": deviation.mean(1),
        "inside": np.stack([(np.abs(z) <= width).mean(1) for width in _HALF_WIDTHS], 1),
    }


def combine(means: dict[str, Array]) -> dict[str, Array]:
    """Scores from the means over data of :func:`datum_scores`, which may have leading axes (for resamples)."""
    result = {"rmse": np.sqrt(means["squared_error"]), "nll": means["nll"], "crps": means["crps"]}
    places = {percent: int(np.abs(LEVELS - percent / 100).argmin()) for percent in INTERVALS}
    result |= {f"coverage_{percent}": means["inside"][..., place] for percent, place in places.items()}
    result |= {f"width_{percent}": 2 * _HALF_WIDTHS[place] * means["deviation"] for percent, place in places.items()}
    return result | {"calibration_error": np.abs(means["inside"] - LEVELS).mean(-1)}


def contributions(data: dict[str, Array]) -> dict[str, Array]:
    """Numbers ``[N]`` whose means are the scores, from :func:`datum_scores`; of the RMSE its square."""
    terms = {"rmse": data["squared_error"], "nll": data["nll"], "crps": data["crps"]}
    for percent in INTERVALS:
        place = int(np.abs(LEVELS - percent / 100).argmin())
        terms[f"coverage_{percent}"] = data["inside"][:, place]
        terms[f"width_{percent}"] = 2 * _HALF_WIDTHS[place] * data["deviation"]
    return terms


def check_gaussian(mean: Any, variance: Any, targets: Any) -> tuple[Array, Array, Array]:
    """Mean, variance and targets as float64 arrays ``[N, C]``, or a ``ValueError`` that says what is wrong."""
    named = {"mean": mean, "variance": variance, "targets": targets}
    arrays = {name: as_array(values, name).astype(np.float64) for name, values in named.items()}
    shapes = [array.shape for array in arrays.values()]
    if len(set(shapes)) > 1 or len(shapes[0]) not in (1, 2) or 0 in shapes[0]:
        raise ValueError(
            "Expected mean, variance and targets of one shape, [N] or [N, C] with at least one datum, got "
            f"{', '.join(f'{name} {array.shape}' for name, array in arrays.items())}. Reshape them (nothing is "
            "broadcast); of a covariance matrix for each datum, give the diagonal."
        )
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))
            raise ValueError(
                f"Expected finite {name}, got NaN or infinity in {len(rows)} of {len(array)} rows, the first being "
                f"row {rows[0]}. Look for NaN in the inputs or the model."
            )
    if arrays["variance"].min() <= 0:
        raise ValueError(
            f"Expected positive variances, got a smallest value of {arrays['variance'].min():.3g}. The total "
            "predictive variance needs the noise added: variance of the function plus variance of the noise."
        )
    mean, variance, targets = (array.reshape(len(array), -1) for array in arrays.values())
    return mean, variance, targets
