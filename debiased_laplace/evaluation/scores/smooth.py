r"""SmoothECE: a calibration error without bins (Błasiok and Nakkiran, ICLR 2024, arXiv 2309.12236).

With :math:`r_n` confidence minus hit of a datum and :math:`\tilde K_\sigma` the Gaussian kernel on [0, 1], reflected at
both ends,

.. math:: \mathrm{smECE}_\sigma = \int_0^1 \Big| \frac1N \sum_n r_n \tilde K_\sigma(t, f_n) \Big| dt,

and the score is the one where bandwidth and value agree, :math:`\sigma = \mathrm{smECE}_\sigma`: the value does not
grow with the bandwidth, so that there is one such :math:`\sigma`.

The reflected kernel is diagonal in the cosine transform, with factors :math:`e^{-(\pi k \sigma)^2 / 2}`, and a datum is
shared by the two nearest of :data:`GRID` cells, whose mean variance of 1/6 cell is taken from the kernel's. So a
resample costs two non-zero entries for each datum and some seven transforms of :data:`GRID` numbers, however many the
data. What the cells change is below a hundredth of the score (a thousandth from a score of 0.02 on). No bandwidth is
below a cell: smaller errors are those of this bandwidth.
"""

from __future__ import annotations

import numpy as np
from scipy import fft, sparse

from debiased_laplace._arrays import Array

#: Cells of [0, 1].
GRID = 256
#: Relative accuracy of the bandwidth; steps converge faster than linearly, the last one leaves far less.
TOLERANCE = 1e-8
_SQUARES = (np.pi * np.arange(GRID)) ** 2 / 2


def cells(confidence: Array, gap: Array | None = None) -> sparse.csr_array:
    """How data ``[N]``, or gaps ``[N]`` that they have, are shared by the cells: ``[GRID, N]``, two in each column."""
    place = (confidence * GRID - 0.5).clip(0, GRID - 1)
    low = np.minimum(place.astype(np.int64), GRID - 2)
    share = np.stack([low + 1 - place, place - low]) * (1.0 if gap is None else gap)
    columns = np.tile(np.arange(len(confidence)), 2)
    return sparse.csr_array((share.ravel(), (np.concatenate([low, low + 1]), columns)), (GRID, len(confidence)))


def smooth_errors(gaps: Array) -> Array:
    """SmoothECE of mean gaps in the cells, ``[B, GRID] -> [B]``."""
    waves = fft.dct(gaps, axis=1)

    def error(rows: Array, bandwidth: Array) -> Array:
        variance = bandwidth * bandwidth - 1 / (6 * GRID**2)
        return np.abs(fft.idct(waves[rows] * np.exp(-np.outer(variance, _SQUARES)), axis=1)).sum(1)

    result = error(np.arange(len(gaps)), np.full(len(gaps), 1 / GRID))
    live = np.flatnonzero(result > 1 / GRID)
    # The zero of log(error) - log(bandwidth), which falls: secants within a bracket that shrinks, or else its middle.
    low, high = np.full(len(live), -np.log(GRID)), np.log(result[live])
    before, excess_before, x = low, high - low, (low + 2 * high) / 3
    while len(live):
        result[live] = error(live, np.exp(x))
        excess = np.log(np.maximum(result[live], np.finfo(float).tiny)) - x
        low, high = np.where(excess > 0, x, low), np.where(excess > 0, high, x)
        with np.errstate(divide="ignore", invalid="ignore"):
            following = x - excess * (x - before) / (excess - excess_before)
        following = np.where((following > low) & (following < high), following, (low + high) / 2)
        going = (np.abs(excess) > TOLERANCE) & (high - low > TOLERANCE)
        live, low, high = live[going], low[going], high[going]
        before, excess_before, x = x[going], excess[going], following[going]
    return result
