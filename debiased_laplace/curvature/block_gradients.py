"""Gradients of one block, from its inputs and back-propagated vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from debiased_laplace.curvature.contractions import FactoredGradients
from debiased_laplace.curvature.indexed import IndexedGradients
from debiased_laplace.network.selected import LayerInputs, SelectedInputs

BlockGradients = FactoredGradients | IndexedGradients


def block_gradients(inputs: LayerInputs, vectors: Tensor) -> BlockGradients:
    """Gradients ``J: [N, V, G, O, I]``, never formed here where that takes more memory than their factors.

    Args:
        inputs: ``a: [N, G, I, S]``.
        vectors: ``g: [N, G, V, O, S]``, or ``[1, G, V, O, 1]`` if they are the same for all data.
    """
    if isinstance(inputs, SelectedInputs):
        return IndexedGradients.of(inputs, vectors)
    return FactoredGradients(inputs, vectors)


def gram(parts: Sequence[BlockGradients]) -> Tensor:
    """Inner products of all gradients with all others, ``[N * V, N * V]``, data of all parts one after the other."""
    kind = type(parts[0])  # inputs of one block are all selected, or none is
    return kind.gram(parts)  # type: ignore[arg-type]
