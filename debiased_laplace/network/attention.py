"""Attention, written out in plain operations.

The fused kernels have neither forward-mode nor second derivatives, cannot be mapped by ``torch.func`` over masks with a
gradient, and tell nobody what becomes of a bias or of queries that are made of parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    r""":math:`\mathrm{softmax}(q k^\top / \sqrt d + m)\,v`, with the arguments of torch's function of this name."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    root = abs(scale) ** 0.5  # as torch scales both
    scores = (query * root) @ (key * math.copysign(root, scale)).mT
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.ops.aten._safe_softmax(scores, -1)  # zero where everything is masked
    return torch.dropout(weights, dropout_p, dropout_p > 0) @ value
