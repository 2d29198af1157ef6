"""A last layer of features ``[N, ..., I]`` that are reduced to ``[N, I]`` before it, with laplace-torch's meanings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from debiased_laplace.network.layers import Call
from debiased_laplace.network.layers.linear import LinearCall

if TYPE_CHECKING:
    from debiased_laplace.network.network import Network

#: How features ``[N, ..., I]`` of a last layer become ``[N, I]``: those at the first position, at the last, their mean.
FEATURE_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pick_first": lambda features: features[:, 0],
    "pick_last": lambda features: features[:, -1],
    "average": lambda features: features.mean(1),
}


def check_reduction(name: str) -> None:
    """Raise a ``ValueError`` if there is no such reduction."""
    if name not in FEATURE_REDUCTIONS:
        raise ValueError(f"Expected feature_reduction out of {list(FEATURE_REDUCTIONS)}, got {name!r}.")


def call_of_reduced_features(network: Network, calls: list[Call], outputs: Tensor) -> Call:
    """The last call of a forward pass, as if its input had been reduced before.

    Raises:
        ValueError: If the network is no single linear layer that it could be of.
    """
    last = calls[-1] if calls else None
    of_last = {network.identities.get(id(p)) for p in (() if last is None else (last.weight, last.bias))}
    if last is None or network.shapes.keys() - of_last:
        raise ValueError(
            f"Expected a single linear last layer for feature_reduction={network.feature_reduction!r}, got "
            f"{list(network.shapes)}. Leave feature_reduction out, or name the linear layer."
        )
    shapes = [shape for name, shape in network.shapes.items() if network.identities[id(last.weight)] == name]
    if not isinstance(last, LinearCall) or len(last.input) != len(outputs) or shapes[0][0] != outputs.shape[1]:
        raise ValueError(
            f"Expected a linear last layer with inputs [{len(outputs)}, ..., I] and {outputs.shape[1]} outputs for "
            f"feature_reduction={network.feature_reduction!r}, got a {type(last).__name__} with an input of shape "
            f"{tuple(last.input.shape)} and a weight of shape {tuple(shapes[0])}. Leave feature_reduction out: the "
            "last layer is seen where the model calls it."
        )
    assert last.weight is not None
    features = network.reduce(last.input, outputs, last.weight, last.bias)
    return replace(last, input=features, output_shape=outputs.shape, version=features._version)


def reduced_features(
    name: str | None, features: Tensor, outputs: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, float]:
    """Features ``[N, ..., I]`` as ``[N, I]``, and how far the outputs are from theirs, relative to the largest."""
    if features.ndim > 2:
        features = FEATURE_REDUCTIONS[name or ""](features.flatten(1, -2))
    with torch.no_grad():
        difference = F.linear(features, weight, bias) - outputs
    if len(outputs) and bool(difference.any()):
        return features, float(difference.abs().max()) / float(outputs.detach().abs().max())
    return features, 0.0
