"""``F.embedding_bag``: a linear layer on bags of tokens, whose sums or means are known by their tokens alone.

Bags are rows of indices ``[B, S]`` with what every token counts. All tokens of a bag share its gradient: as positions,
they have the same g. The maximum over a bag (``mode="max"``) is that of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from debiased_laplace.network.layers.call import Arguments, Call, Layout, See, composite, rule
from debiased_laplace.network.layers.embedding import EmbeddingCall
from debiased_laplace.network.selected import SelectedInputs


def sums_of_bags(index: Tensor, weight: Tensor, values: Tensor) -> Tensor:
    """Sums of rows of a table, each times its value, ``[B, O]``; index and values are ``[B, S]``."""
    return (F.embedding(index, weight) * values[..., None]).sum(1)


@dataclass
class BagCall(EmbeddingCall):
    """Sums of bags; the positions of a datum are the tokens of its bags, one after the other.

    Attributes:
        values: What every token counts, ``[B, S]``.
    """

    values: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def narrow(self, part: slice, n_data: int, layout: Layout) -> Call | None:
        narrowed = super().narrow(part, n_data, layout)
        copies = self.output_shape[0] // n_data
        values = self.values[part.start * copies : part.stop * copies]
        return None if narrowed is None else replace(narrowed, values=values)  # type: ignore[call-arg]

    def inputs(self, n_data: int, layout: Layout, *, ones: bool) -> SelectedInputs:
        assert self.weight is not None
        index, values = (layout.by_datum(t, n_data, 1) for t in (self.input, _values_of_tokens(self)))  # [N, k, S]
        return SelectedInputs(index.flatten(1).long(), values.flatten(1), len(self.weight))

    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        of_bags = layout.by_datum(gradient, n_data, 1)  # [N, k, O]
        of_tokens = of_bags[:, :, None].expand(-1, -1, self.input.shape[1], -1)
        return of_tokens.flatten(1, 2).mT[:, None]


def _values_of_tokens(call: BagCall) -> Tensor:
    """Values with the sum of those of a token that a bag has several times in one of its places, ``[B, S]``."""
    ordered, order = call.input.sort(1)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.where(is_new, torch.arange(ordered.shape[1], device=ordered.device), 0).cummax(1).values
    totals = torch.zeros_like(call.values).scatter_add_(1, first, call.values.gather(1, order))
    return torch.zeros_like(totals).scatter_(1, order, totals)


@rule(sums_of_bags)
def _sums_of_bags(index: Tensor, weight: Tensor, values: Tensor) -> Arguments:
    return Arguments(BagCall, index, weight, None, {"values": values.detach()})


@composite(F.embedding_bag)
def _embedding_bag(
    see: See, input: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
    per_sample_weights: Tensor | None = None, include_last_offset: bool = False, padding_idx: int | None = None,
) -> Any:  # fmt: skip
    if max_norm is not None:
        return NotImplemented
    index, counts = _rows(input, offsets, include_last_offset)
    if padding_idx is not None:
        counts = counts & (index != padding_idx % len(weight))
    if mode == "max":
        rows = see(F.embedding, index, weight).masked_fill(~counts[..., None], -torch.inf)
        return torch.where(counts.any(1, keepdim=True), rows.max(1).values, 0.0)
    values = counts.to(weight.dtype)
    if per_sample_weights is not None:
        of_tokens, _ = _rows(per_sample_weights, offsets, include_last_offset)
        values = values * of_tokens
    if mode == "mean":
        values = values / counts.sum(1, keepdim=True).clamp_min(1)
    return see(sums_of_bags, index, weight, values)


def _rows(tokens: Tensor, offsets: Tensor | None, include_last_offset: bool) -> tuple[Tensor, Tensor]:
    """What the tokens of every bag have, ``[B, S]``, zero after the last one; and where there is a token."""
    if tokens.is_nested:
        # Of the jagged layout, which torch's types do not know.
        offsets, include_last_offset = tokens.offsets(), True  # type: ignore[attr-defined]
        tokens = tokens.values().flatten()
    if offsets is None:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    end = offsets.new_full((1,), len(tokens))
    bounds = offsets if include_last_offset else torch.cat([offsets, end])
    lengths = bounds.diff()
    places = torch.arange(max(1, int(lengths.max())) if len(lengths) else 1, device=tokens.device)
    is_there = places < lengths[:, None]
    rows = torch.where(is_there, bounds[:-1, None] + places, len(tokens))
    return F.pad(tokens, (0, 1))[rows], is_there
