"""Which outputs change with some of the parameters at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def unreached(
    call: Callable[[dict[str, Tensor]], Tensor],
    parameters: dict[str, Tensor],
    covered: Mapping[str, Tensor | None],
) -> tuple[list[int], list[str], list[int]]:
    """Outputs that do not change with the parameters that are covered: their variance is zero.

    The product of the Jacobian with random directions tells it for all outputs at once, also at other parameters, since
    a unit that lets nothing through for the data at hand may do so for others.

    Args:
        call: Outputs ``[N, C]`` under parameters.
        parameters: All trainable ones, leaves that require gradients.
        covered: Which of them, with a mask where it is some of the entries.

    Returns:
        Numbers of outputs, the names of the parameters that do act on them, and numbers of those on which none does.
    """
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    silent: Tensor | None = None
    for trial in range(8):
        at = parameters
        if trial:
            sizes = {name: p.detach().square().mean().sqrt().clamp_min(0.1) for name, p in parameters.items()}
            at = {name: (sizes[name] * random(p)).requires_grad_() for name, p in parameters.items()}
        directions = [random(at[name]) * (1 if mask is None else mask.to(at[name])) for name, mask in covered.items()]
        still = ~_changes(call(at), [at[name] for name in covered], directions)
        silent = still if silent is None else silent & still
        if not bool(silent.any()):
            return [], [], []
    assert silent is not None
    outputs = call(parameters)
    constant = silent & ~_changes(outputs, list(parameters.values()), [random(p) for p in parameters.values()])
    others: list[str] = []
    if bool((silent & ~constant).any()):
        vector = silent * random(outputs)
        gradients = torch.autograd.grad(outputs, list(parameters.values()), vector, allow_unused=True)
        others = [name for name, g in zip(parameters, gradients, strict=True) if g is not None and bool(g.any())]
    return (silent & ~constant).nonzero()[:, 0].tolist(), others, constant.nonzero()[:, 0].tolist()


def _changes(outputs: Tensor, parameters: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """Which outputs change in a direction, for any of the data, ``[C]``."""
    if not outputs.requires_grad:
        return torch.zeros_like(outputs[0], dtype=torch.bool)

    def along(vector: Tensor, create_graph: bool) -> Tensor:
        gradients = torch.autograd.grad(
            outputs, parameters, vector, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
        products = [(g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None]
        return torch.stack(products).sum() if products else outputs.new_zeros(())

    vector = torch.zeros_like(outputs, requires_grad=True)
    try:  # the gradient's inner product with the direction is linear in the vector, which gives J d
        product = along(vector, True)
        changes = torch.autograd.grad(product, vector)[0] if product.requires_grad else torch.zeros_like(outputs)
    except RuntimeError:  # an operation without a second derivative
        units = torch.eye(outputs.shape[1]).to(outputs)
        changes = torch.stack([along(unit.expand_as(outputs), False) for unit in units])[None]
    return ((changes != 0) & changes.isfinite()).any(0)
