r"""The dense reference: matrices by automatic differentiation, which share no formula with what they check.

They know nothing of layers, factors or blocks: Jacobians come from :func:`torch.func.jacrev`, or from ordinary backward
passes where a model has operations that it does not know (packed sequences), and the Hessian of the
loss from :func:`torch.func.hessian`. They need ``N * C * D`` numbers for Jacobians and ``D * D`` for matrices: tiny
networks only. Parameter vectors are in the order of ``model.named_parameters()``, trainable ones only, as everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _data
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.snapshot import in_evaluation_mode
from debiased_laplace.posterior.gaussian import Posterior

__all__ = [
    "all_tensors",
    "dense_basis",
    "dense_ggn",
    "dense_jacobian",
    "dense_loss_hessian",
    "dense_posterior_precision",
    "dense_prior_precision",
]


def dense_jacobian(model: nn.Module, inputs: Any) -> Tensor:
    r"""Jacobians of the outputs in the trainable parameters, ``[N, C, D]``, in evaluation mode.

    Args:
        model: Any module with outputs ``[N, C]`` (or ``[N]``).
        inputs: N data, as the model takes them.

    Example:
        >>> import torch
        >>> from debiased_laplace.testing import dense_jacobian
        >>> dense_jacobian(torch.nn.Linear(1, 1), torch.tensor([[2.0]]))
        tensor([[[2., 1.]]])
    """
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    n = _data.count(inputs)

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return _data.USUAL(module, inputs, parameters=parameters).reshape(n, -1)

    module = in_evaluation_mode(model)
    with torch.inference_mode(False), torch.enable_grad(), _with_derivatives(module):
        try:
            jacobians = torch.func.jacrev(outputs)(parameters)
        except RuntimeError:  # an operation that torch.func does not know
            jacobians = _by_backward_passes(outputs, parameters)
    return torch.cat([jacobians[name].reshape(n, jacobians[name].shape[1], -1) for name in parameters], -1).detach()


def _with_derivatives(module: nn.Module) -> AbstractContextManager[Any]:
    """Without cuDNN, whose recurrent layers have no derivatives in evaluation mode."""
    recurrent = any(isinstance(layer, nn.RNNBase) for layer in module.modules())
    return torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()


def _by_backward_passes(
    function: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Jacobians ``[N, C, *shape]`` of a function with values ``[N, C]``, one entry after the other."""
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    values = function(leaves)
    rows = [
        torch.autograd.grad(value, list(leaves.values()), retain_graph=True, materialize_grads=True)
        for value in values.flatten()
    ]
    return {
        name: torch.stack([g.to_dense() for g in of_entries]).unflatten(0, values.shape)
        for name, of_entries in zip(leaves, zip(*rows, strict=True), strict=True)
    }


def dense_loss_hessian(likelihood: Likelihood, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
    r"""Hessian of the loss in the outputs by automatic differentiation, ``[N, C] -> [N, C, C]``.

    Args:
        likelihood: Its :meth:`~debiased_laplace.likelihoods.Likelihood.loss` is differentiated.
        outputs: ``[N, C]``.
        targets: Needed only where the Hessian depends on them; any valid ones by default.
    """
    targets = (_any_targets(likelihood, outputs) if targets is None else targets).to(outputs.device)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return likelihood.curvature_loss(output[None], target[None])[0]

    of_datum, outputs = torch.func.hessian(loss), outputs.detach()
    with torch.inference_mode(False), torch.enable_grad():
        try:
            return torch.func.vmap(of_datum)(outputs, targets).detach()
        except RuntimeError:  # a loss that looks at values, or an operation that cannot be batched
            return torch.stack([of_datum(o, t) for o, t in zip(outputs, targets, strict=True)]).detach()


def dense_ggn(
    model: nn.Module, inputs: Any, weights: Tensor, likelihood: Likelihood, targets: Tensor | None = None
) -> Tensor:
    r"""The generalised Gauss-Newton matrix, :math:`\sum_n w_n J_n^\top (\nabla^2_f \ell_n) J_n`, ``[D, D]``.

    Args:
        model: Any module with outputs ``[N, C]`` (or ``[N]``).
        inputs: N data.
        weights: ``[N]``.
        likelihood: Gives the loss; its Hessian square root is not used.
        targets: Needed only where the loss Hessian depends on them.
    """
    jacobians = dense_jacobian(model, inputs)
    with torch.no_grad():
        outputs = in_evaluation_mode(model)(inputs).reshape(len(jacobians), -1)
    hessians = dense_loss_hessian(likelihood, outputs, targets)
    return torch.einsum("n,ncd,nce,nef->df", weights.to(jacobians), jacobians, hessians, jacobians)


def dense_basis(basis: Basis) -> Tensor:
    """The orthonormal columns U as a matrix, ``[D, rank]``, by lifting the identity."""
    like = next(iter(all_tensors(list(basis.parts))), torch.empty(0, dtype=torch.float64))
    return basis.lift(torch.eye(basis.rank, dtype=like.dtype, device=like.device)).mT


def dense_posterior_precision(posterior: Posterior) -> Tensor:
    r"""Equation (3) as a matrix, ``[D, D]``, float64.

    :math:`\frac{N}{\sigma^2 T} U \mathrm{diag}(\lambda) U^\top + \Delta`, with the prior precision
    :math:`\Delta` of every parameter read off its block.
    """
    basis = posterior.basis
    columns = dense_basis(basis).to(posterior.curvatures.device, torch.float64)
    beta = posterior.n_data / (float(posterior.noise_variance) * posterior.temperature)
    curvature = columns @ torch.diag(posterior.curvatures.double()) @ columns.mT
    return beta * curvature + torch.diag(dense_prior_precision(posterior).to(curvature))


def dense_prior_precision(posterior: Posterior) -> Tensor:
    """Prior precision of every parameter, ``[D]``, one parameter name after the other."""
    basis = posterior.basis
    priors = posterior.prior_precision.detach().double().cpu()
    if len(priors) not in (1, len(basis.parts)):
        return priors
    of_name = {
        name: float(priors[index if len(priors) > 1 else 0])
        for index, members in enumerate(basis.members)
        for i in members
        for name in basis.blocks[i].parameters
    }
    return torch.cat(
        [torch.full((shape.numel(),), of_name[name], dtype=torch.float64) for name, shape in basis.shapes.items()]
    )


def _any_targets(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    n, c = outputs.shape
    widths = (c, c // 2) if c > 1 else (c,)
    candidates = [torch.zeros(n, dtype=torch.long), *(torch.zeros(n, k, dtype=outputs.dtype) for k in widths)]
    for targets in candidates:
        try:
            likelihood.check_targets(targets, c)
        except (TypeError, ValueError):
            continue
        return targets.to(outputs.device)
    raise ValueError(f"Found no valid targets for {type(likelihood).__name__}: pass some.")


def all_tensors(value: Any) -> list[Tensor]:
    """All tensors in nested dataclasses, lists and dictionaries, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]  # others are made of these
        return [tensor for name in fields for tensor in all_tensors(getattr(value, name))]
    if isinstance(value, Mapping):
        return [t for key in sorted(value) for t in all_tensors(value[key])]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in all_tensors(item)]
    return []
