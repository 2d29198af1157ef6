"""Which rows of a table an argument consists of: positions of a Transformer, as they are, sliced, or looked up."""

from __future__ import annotations

import torch
from torch import Tensor


def table_rows(argument: Tensor) -> tuple[Tensor, Tensor] | None:
    """A parameter ``[..., T, D]`` and which of its rows an argument consists of; None if it does not."""
    base = argument._base if argument._is_view() else argument
    if base is None or not base.is_contiguous():
        return None
    looked_up, table = None, base
    if base.grad_fn is not None:
        if base.grad_fn.name() != "EmbeddingBackward0":
            return None
        looked_up = base.grad_fn._saved_indices.flatten()  # type: ignore[attr-defined]
        table = getattr(base.grad_fn.next_functions[0][0], "variable", None)  # type: ignore[assignment]
    if table is None or table.ndim < 2 or not table.is_contiguous() or argument.ndim < 1:
        return None
    size, offset = table.shape[-1], argument.storage_offset() - base.storage_offset()
    steps = [stride for stride, n in zip(argument.stride()[:-1], argument.shape[:-1], strict=True) if n > 1]
    if argument.shape[-1] != size or (size > 1 and argument.stride(-1) != 1) or any(
        step % size for step in [*steps, offset]
    ):  # fmt: skip
        return None
    rows = torch.tensor(offset // size, device=argument.device)
    for stride, n in zip(argument.stride()[:-1], argument.shape[:-1], strict=True):
        rows = rows[..., None] + torch.arange(n, device=argument.device) * (stride // size)
    rows = rows.flatten()
    return table, rows if looked_up is None else looked_up[rows]
