"""Networks with one logit, and their targets, as networks with two classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _data


class TwoClasses(nn.Module):
    """A network with one logit f as one with the two outputs 0 and f: its softmax is 1 - p and p.

    Args:
        model: With outputs ``[N, 1]`` or ``[N]``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: _data.Inputs) -> Tensor:
        """Outputs ``[N, 2]``.

        Raises:
            ValueError: If the network has another number of outputs.
        """
        outputs = _data.rows(_data.USUAL(self.model, inputs), _data.count(inputs))
        if outputs.shape[1] != 1:
            raise ValueError(
                f"Expected a network with one output for the likelihood 'bernoulli', got {list(outputs.shape)}. Use "
                "'classification' for several classes."
            )
        return torch.cat([torch.zeros_like(outputs), outputs], 1)


def two_classes(batch: Any) -> tuple[_data.Inputs, Tensor]:
    """A batch whose targets are 0 and 1 of any kind, with class indices ``[N]``.

    Raises:
        ValueError: If targets are others, or not one for each datum.
    """
    inputs, targets, n = _data.only(batch)
    if targets.numel() != n or targets.ndim not in (1, 2):
        raise ValueError(f"Expected targets [N] or [N, 1] of {n} data, got shape {tuple(targets.shape)}.")
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise ValueError(f"Expected targets 0 and 1, got others between {targets.min():g} and {targets.max():g}.")
    return inputs, targets.reshape(n).long()
