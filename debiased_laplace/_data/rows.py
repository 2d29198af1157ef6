"""What a model returns becomes rows of outputs, one for each datum; what a loader gives as targets becomes the same.

The only place that decides what an output without one of its dimensions means: ``[N]`` is one output for each of N
data, ``[C]`` for one datum are its C outputs (a bare ``squeeze()`` drops its dimension), ``[]`` is its only one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from debiased_laplace._data.batches import Inputs, tensors


def rows(outputs: Any, n: int, n_outputs: int | None = None) -> Tensor:
    """Outputs of a model as ``[N, C]``.

    Args:
        outputs: What it returned.
        n: N, the data that it was given.
        n_outputs: C, if it is known; a matrix ``[N, C']`` says so itself (a model of pairs that is given one of each).

    Raises:
        TypeError: If they are no tensor.
        ValueError: If they have no row for each datum, or are one number for each where there were C.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"Expected a model that returns a tensor of outputs [N, C], got {type(outputs).__name__}. "
            "Wrap it in a module whose forward returns the logits alone."
        )
    matrix = outputs
    if n == 1 and matrix.ndim < 2:
        matrix = matrix.reshape(1, -1)
    elif matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2 or len(matrix) != n:
        dense = " Outputs for every pixel or token are for debiased_laplace.fit." if matrix.ndim > 2 else ""
        raise ValueError(
            f"Expected outputs of shape [{n}, C], one row for each datum, got {tuple(outputs.shape)}. "
            f"Wrap the model in one that pools or flattens its outputs.{dense}"
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


@contextmanager
def own_forward_pass(inputs: Inputs, dtype: torch.dtype) -> Iterator[None]:
    """Say where an error about dtypes comes from: the data go to the model as they are."""
    try:
        yield
    except RuntimeError as error:
        others = {leaf.dtype for leaf in tensors(inputs)} - {dtype}
        if not others or "type" not in str(error):
            raise
        raise RuntimeError(
            f"The model's own forward pass failed: {error} Inputs of {', '.join(sorted(map(str, others)))} went to it "
            f"as they came, its parameters are {dtype}. Convert them in the loader, or in the model's forward."
        ) from error
