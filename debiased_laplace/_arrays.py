"""Probabilities, targets and scores as they come from users, checked and as NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
#: How far the sum of a row of probabilities may be from one: what float16 leaves, which may have been before.
ROW_SUM_TOLERANCE = 2e-3


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


def as_array(values: Any, name: str) -> Array:
    """Numbers of any kind and device as a NumPy array; ``name`` is for the ``ValueError`` about other things."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return np.asarray(values.float() if values.dtype in (torch.bfloat16, torch.float16) else values)
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"Expected numbers in {name}, got an array of {array.dtype}.")
    return array
