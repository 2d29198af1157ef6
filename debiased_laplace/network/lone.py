"""Jacobians in lone parameters, which no layer rule covers: from ``torch.func``, or by ordinary backward passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace._guards import gradients_enabled

if TYPE_CHECKING:
    from debiased_laplace.network.network import Network


def lone_jacobians(network: Network, inputs: _data.Inputs) -> list[Tensor]:
    """Jacobians of the outputs in the lone parameters, datum by datum: ``[N, C, P]`` for each of their blocks."""
    constants = {name: p.detach() for name, p in network.leaves.items()}
    lone = {name: constants[name] for block in network.lone_blocks for name in block.parameters}
    if network.one_by_one:
        return _by_backward_passes(network, constants, lone, inputs)

    def outputs_of(lone: dict[str, Tensor], batch: _data.Inputs) -> Tensor:
        return network.call(constants | lone, batch)[0]

    # An inference tensor, or inference mode, would silently change what jacrev gives in some releases of torch.
    with gradients_enabled():
        mapped = _data.columns(_data.copy(inputs))
        try:
            if mapped is None:  # something that cannot be mapped over: one datum after the other
                data = (_data.take(inputs, slice(i, i + 1)) for i in range(_data.count(inputs)))
                each = [torch.func.jacrev(outputs_of)(lone, datum) for datum in data]
                jacobians = {name: torch.stack([of_datum[name] for of_datum in each]) for name in lone}
            else:
                tensors, rebuilt = mapped

                def outputs_of_one(lone: dict[str, Tensor], *datum: Tensor) -> Tensor:
                    return outputs_of(lone, rebuilt([leaf[None] for leaf in datum]))

                dims = (None, *[0] * len(tensors))
                jacobians = torch.func.vmap(torch.func.jacrev(outputs_of_one), in_dims=dims)(lone, *tensors)
        except (RuntimeError, ValueError):  # an operation that torch.func does not know
            return _by_backward_passes(network, constants, lone, inputs)
    return _of_blocks(network, jacobians)


def _of_blocks(network: Network, jacobians: dict[str, Tensor]) -> list[Tensor]:
    return [
        torch.cat([jacobians[name].reshape(*jacobians[name].shape[:2], -1) for name in block.parameters], -1).to(
            network.dtype
        )
        for block in network.lone_blocks
    ]


def _by_backward_passes(
    network: Network, constants: dict[str, Tensor], lone: dict[str, Tensor], inputs: _data.Inputs
) -> list[Tensor]:
    """The same by ordinary backward passes, of one output of one datum at a time."""
    of_data: dict[str, list[Tensor]] = {name: [] for name in lone}
    with gradients_enabled():
        for index in range(_data.count(inputs)):
            leaves = {name: p.detach().requires_grad_() for name, p in lone.items()}
            outputs = network.call(constants | leaves, _data.take(inputs, slice(index, index + 1)))[0]
            rows = [
                torch.autograd.grad(output, list(leaves.values()), retain_graph=True, materialize_grads=True)
                if output.requires_grad else [torch.zeros_like(p) for p in leaves.values()]
                for output in outputs
            ]  # fmt: skip
            for name, of_outputs in zip(leaves, zip(*rows, strict=True), strict=True):
                of_data[name].append(torch.stack(of_outputs))
    return _of_blocks(network, {name: torch.stack(rows) for name, rows in of_data.items()})
