"""Gradients in parameters that no layer rule covers, from the same back-propagated vectors as every other block.

A second forward pass gives every datum a copy of these parameters, so that an ordinary backward pass, of one vector or
of several, gives the gradients of all data apart: by ``torch.func.vmap`` over data and copies at once, or datum by
datum where the model has something that cannot be mapped (a kernel of somebody's own, a branch on a number).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace._guards import gradients_enabled
from debiased_laplace.network.forward_mode import PlainAttention

if TYPE_CHECKING:
    from debiased_laplace.network.blocks import Block
    from debiased_laplace.network.network import Network


class LoneGradients:
    """A forward pass with a copy of the lone parameters for every datum.

    Args:
        network: Its lone blocks, and whether it is to be run datum by datum (``one_by_one``, set where mapping failed).
        inputs: N data.
    """

    def __init__(self, network: Network, inputs: _data.Inputs) -> None:
        self._network, self._n = network, _data.count(inputs)
        self._names = [name for block in network.lone_blocks for name in block.parameters]
        self._constants = {name: p.detach() for name, p in network.leaves.items()}
        # An inference tensor, or inference mode, would silently change derivatives in some releases of torch.
        with gradients_enabled():
            if not network.one_by_one:
                try:
                    self._outputs, self._copies = self._mapped(inputs)
                    self._is_mapped = True
                    return
                except (RuntimeError, ValueError, TypeError, NotImplementedError):  # what torch.func does not know
                    network.one_by_one = True
            self._outputs, self._copies = self._one_by_one(inputs)
            self._is_mapped = False

    def _mapped(self, inputs: _data.Inputs) -> tuple[list[Tensor], list[list[Tensor]]]:
        columns = _data.columns(_data.copy(inputs))
        if columns is None:
            raise ValueError("Expected inputs that are tensors with an entry for each datum.")
        tensors, rebuilt = columns
        copies = [self._copy(name, self._n) for name in self._names]

        def outputs_of(lone: Sequence[Tensor], *datum: Tensor) -> Tensor:
            named = self._constants | dict(zip(self._names, lone, strict=True))
            return self._network.call(named, rebuilt([leaf[None] for leaf in datum]))[0]

        with PlainAttention():
            outputs = torch.func.vmap(outputs_of)(copies, *tensors)
        return [outputs], [copies]

    def _one_by_one(self, inputs: _data.Inputs) -> tuple[list[Tensor], list[list[Tensor]]]:
        outputs, copies = [], []
        for index in range(self._n):
            of_datum = [self._copy(name, None) for name in self._names]
            named = self._constants | dict(zip(self._names, of_datum, strict=True))
            outputs.append(self._network.call(named, _data.take(inputs, slice(index, index + 1))))
            copies.append(of_datum)
        return outputs, copies

    def _copy(self, name: str, n: int | None) -> Tensor:
        parameter = self._constants[name]
        copy = parameter.clone() if n is None else parameter.expand(n, *parameter.shape).clone()
        return copy.requires_grad_()

    def backpropagate(self, vectors: Tensor) -> dict[str, Tensor]:
        """Gradients of vectors ``[v, N, C]`` in every lone parameter, ``[N, v, *shape]``."""
        flat = [copy for of_part in self._copies for copy in of_part]
        each = [self._gradients(vector, flat) for vector in vectors]
        if self._is_mapped:
            return {name: torch.stack(rows, 1) for name, rows in zip(self._names, zip(*each, strict=True), strict=True)}
        by_copy, size = [torch.stack(rows) for rows in zip(*each, strict=True)], len(self._names)
        return {name: torch.stack(by_copy[index::size]) for index, name in enumerate(self._names)}

    def _gradients(self, vector: Tensor, flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
        of_outputs = [vector] if self._is_mapped else vector[:, None].unbind()
        with_graph = [
            (outputs, v.to(outputs)) for outputs, v in zip(self._outputs, of_outputs, strict=True)
            if outputs.requires_grad
        ]  # fmt: skip
        if not with_graph:
            return tuple(torch.zeros_like(copy) for copy in flat)
        outputs, of_outputs = zip(*with_graph, strict=True)
        return torch.autograd.grad(outputs, list(flat), of_outputs, retain_graph=True, materialize_grads=True)


def gradients_of_block(block: Block, gradients: dict[str, Tensor]) -> Tensor:
    """Gradients ``[N, v, *shape]`` of the parameters of a block as its vectors, ``[N, 1, v, P, 1]``."""
    return block.gather(gradients).transpose(1, 2)
