"""Gradients in parameters whose calls have no factors in common: those of every call, formed and added.

For parameters that layers see in several ways (a table that is looked up and multiplied with, a normalisation in two
places), in functions of entries, or behind an argument that was made of them (a standardised weight, one with a
parametrisation): the gradient in the argument is formed for every datum, and differentiated once more as the argument
was made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from debiased_laplace.network.layers import Call, Layout

#: Numbers of an argument's gradients that are pulled back together.
TOGETHER = 2**20


def formed_gradients(
    leaf: Tensor, calls: Sequence[tuple[Call, Layout, Sequence[Tensor] | None]], n_data: int, n_vectors: int,
    dtype: torch.dtype, one_by_one: bool = False,
) -> Tensor:  # fmt: skip
    """Gradients of every datum in a parameter, ``[N, v, *shape]``.

    Args:
        leaf: The parameter.
        calls: That it is in, where their data are, and the v vectors at their outputs; None if these are all zero.
        n_data: N.
        n_vectors: v.
        dtype: Of what is summed.
        one_by_one: Pull gradients back datum by datum, where torch's batched derivatives do not do.
    """
    total = leaf.new_zeros(n_data, n_vectors, *leaf.shape, dtype=dtype)
    for call, layout, vectors in calls:
        if vectors is None:
            continue
        for number, vector in enumerate(vectors):
            of_arguments = call.gradients(call.aligned(vector).to(dtype), n_data, layout)
            for argument, gradient in zip((call.weight, call.bias), of_arguments, strict=True):
                if argument is not None and gradient is not None:
                    total[:, number] += pulled_back(argument, leaf, gradient, one_by_one)
    return total


def pulled_back(argument: Tensor, leaf: Tensor, gradients: Tensor, one_by_one: bool) -> Tensor:
    """Gradients ``[N, *]`` in an argument as gradients in the parameter that it was made of, ``[N, *shape]``."""
    if argument is leaf:
        return gradients
    gradients = gradients.to(argument.dtype)
    if not argument.requires_grad:
        return leaf.new_zeros(len(gradients), *leaf.shape)
    size = 1 if one_by_one else max(1, TOGETHER // max(1, argument.numel()))
    return torch.cat([_of_several(argument, leaf, part) for part in gradients.split(size)])


def _of_several(argument: Tensor, leaf: Tensor, gradients: Tensor) -> Tensor:
    batched = len(gradients) > 1
    (of_leaf,) = torch.autograd.grad(
        argument, leaf, gradients if batched else gradients[0], retain_graph=True, allow_unused=True,
        is_grads_batched=batched,
    )  # fmt: skip
    if of_leaf is None:
        return leaf.new_zeros(len(gradients), *leaf.shape)
    return of_leaf if batched else of_leaf[None]
