"""Outputs of a model become rows, one for each datum; what a loader gives as targets becomes the same.

The only place that decides what an output without one of its dimensions means: ``[N]`` is one output for each of N
data, ``[C]`` for one datum are its C outputs (a bare ``squeeze()`` drops its dimension), ``[]`` is its only one.
"""

from __future__ import annotations

from torch import Tensor


def rows(outputs: Tensor, n: int, n_outputs: int | None = None) -> Tensor:
    """Outputs of a model as ``[N, C]``.

    Args:
        outputs: Of all data that it was given.
        n: N, the data that it was given.
        n_outputs: C, if it is known; a matrix ``[N, C']`` says so itself (a model of pairs that is given one of each).

    Raises:
        ValueError: If they have no row for each datum, or are one number for each where there were C.
    """
    matrix = outputs
    if n == 1 and matrix.ndim < 2:
        matrix = matrix.reshape(1, -1)
    elif matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2 or len(matrix) != n:
        dense = " Outputs for every pixel or token are for debiased_laplace.fit." if matrix.ndim > 2 else ""
        raise ValueError(
            f"Expected outputs of shape [{n}, C], one row for each datum, got {tuple(outputs.shape)}. "
            "Wrap the model in one that pools or flattens its outputs, or pass outputs_of= to debiased_laplace.fit."
            f"{dense}"
        )
    if n_outputs is not None and n and outputs.ndim != 2 and matrix.shape[1] != n_outputs:
        raise ValueError(
            f"Expected outputs of shape [{n}, {n_outputs}], since the model had {n_outputs} for each datum before, got "
            f"{tuple(outputs.shape)}. Let its outputs have the same shape for any number of data."
        )
    return matrix


def target_rows(targets: Tensor, n_outputs: int) -> Tensor:
    """Targets ``[N, C]`` of data with C outputs: dimensions of one are no matter, everything else is.

    Raises:
        ValueError: If there is not one target for each output.
    """
    if targets.ndim == 0 or [d for d in targets.shape[1:] if d != 1] != [d for d in (n_outputs,) if d != 1]:
        classes = "" if targets.is_floating_point() else ' Class indices are for "classification".'
        raise ValueError(
            f"Expected targets of shape [N, {n_outputs}]{' or [N]' if n_outputs == 1 else ''}, one for each of the "
            f"model's {n_outputs} outputs, got {tuple(targets.shape)}. Nothing is repeated or summed over: give the "
            f"targets, or the model, the other's shape.{classes}"
        )
    return targets.reshape(len(targets), n_outputs)
