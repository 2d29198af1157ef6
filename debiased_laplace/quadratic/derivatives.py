r"""Derivatives of the loss of some data at one point, as products with vectors; no Jacobian is formed.

With the outputs :math:`f` of N data, their Jacobian J and the Hessian H of the loss in the outputs, for k vectors at a
time:

=====================  ================================  ==============================
:math:`J u`            Jacobian-vector product (jvp)     ``[k, D] -> [k, N, C]``
:math:`J^\top w`       vector-Jacobian product (vjp)     ``[k, N, C] -> [k, D]``
:math:`H z`            product with the loss Hessian     ``[k, N, C] -> [k, N, C]``
:math:`J^\top H J u`   product with the Gauss-Newton     ``[k, D] -> [k, D]``
                       matrix
=====================  ================================  ==============================

Jacobian-vector products are in forward mode where the model's operations have it, and otherwise by double backward
(:func:`~debiased_laplace.network.forward_mode.differentiable_vjp`). The glossary of docs/theory.md has the terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace._guards import gradients_enabled
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.blocks import flatten
from debiased_laplace.network.forward_mode import PlainAttention, differentiable_vjp, jvp
from debiased_laplace.network.network import Network

__all__ = ["DataDerivatives", "LossAtPoint", "scaled_to_unit", "second_directional_derivative", "vjp"]


class LossAtPoint:
    """The loss of a network as a function of its parameters, to be differentiated at one point.

    Args:
        network: The model with its chosen parameters.
        likelihood: Gives the loss.
        point: The parameters, ``[D]``, float64.
        kind: Its second derivatives: ``"ggn"``, the Gauss-Newton matrix, or ``"hessian"``.
    """

    def __init__(self, network: Network, likelihood: Likelihood, point: Tensor, kind: str) -> None:
        self.network, self.likelihood, self.point, self.kind = network, likelihood, point, kind
        #: Whether the model's operations have forward mode; None until it was tried.
        self.has_forward_mode: bool | None = None
        #: Whether the model can be mapped over data; None until it was tried.
        self.can_be_mapped: bool | None = None

    def outputs(self, parameters: dict[str, Tensor], inputs: _data.Inputs) -> Tensor:
        """Outputs ``[N, C]`` with any parameters."""
        with PlainAttention():  # whatever derivative is asked for
            return self.network.call(parameters, inputs)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of every datum, ``[N]``, in nats."""
        return self.likelihood.loss(outputs.to(self.network.dtype), targets)

    @contextmanager
    def on(self, inputs: _data.Inputs, targets: Tensor) -> Iterator[DataDerivatives]:
        """The derivatives for some data; they hold the graph of one forward pass, and are good for the context."""
        with gradients_enabled():
            yield DataDerivatives(self, inputs, targets)


class DataDerivatives:
    """Derivatives of the outputs and the summed loss of N data at a point (:meth:`LossAtPoint.on` makes them).

    Attributes:
        outputs: ``[N, C]``, a function of the parameters in autograd's graph.
    """

    def __init__(self, model: LossAtPoint, inputs: _data.Inputs, targets: Tensor) -> None:
        self._model, self._inputs, self._targets = model, inputs, targets
        values = model.network.from_vector(model.point)
        self._leaves = {name: p.detach().clone().requires_grad_() for name, p in values.items()}
        self._parameters = list(self._leaves.values())
        self.outputs = model.outputs(self._leaves, inputs)

    # -- the loss in the outputs ---------------------------------------------------------------

    def loss(self) -> float:
        """Sum of the losses, in nats."""
        return float(self._model.losses(self.outputs.detach(), self._targets).double().sum())

    @cached_property
    def residual(self) -> Tensor:
        """Gradient of every datum's loss in its outputs, ``[N, C]``."""
        return self._model.likelihood.gradient(self.outputs.detach().to(self._model.network.dtype), self._targets)

    @cached_property
    def _loss_gradient(self) -> tuple[Tensor, Tensor]:
        """Outputs as a leaf, and the gradient of the loss as a function of them."""
        leaf = self.outputs.detach().to(self._model.network.dtype, copy=True).requires_grad_()
        likelihood = self._model.likelihood
        loss = likelihood.curvature_loss if self._model.kind == "ggn" else likelihood.loss
        (gradient,) = torch.autograd.grad(loss(leaf, self._targets).sum(), leaf, create_graph=True)
        return leaf, gradient

    def loss_hessian_product(self, vectors: Tensor) -> Tensor:
        r""":math:`\nabla^2_f \ell_n z_n`, ``[k, N, C] -> [k, N, C]``."""
        leaf, gradient = self._loss_gradient
        return vjp([gradient], [leaf], [vectors])[0]

    # -- the outputs in the parameters ---------------------------------------------------------

    def vjp(self, vectors: Tensor) -> Tensor:
        r""":math:`J^\top w`, ``[k, N, C] -> [k, D]``, float64."""
        unit, scales = scaled_to_unit(vectors.flatten(1))
        return self._flat(vjp([self.outputs], self._parameters, [unit.view_as(vectors)])) * scales

    def jvp(self, rows: Tensor) -> Tensor:
        """:math:`J u`, ``[k, D] -> [k, N, C]``, in forward mode, or in reverse mode for a model without it."""
        if self._model.has_forward_mode is not False:
            try:
                tangents = torch.stack([self._forward_jvp(row) for row in rows])
                if self._model.has_forward_mode is None:
                    self._model.has_forward_mode = self._agrees_with_reverse_mode(rows[0], tangents[0])
                if self._model.has_forward_mode:
                    return tangents
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # of an operation without it; reverse mode tells what else is wrong
                self._model.has_forward_mode = False
        w, transposed = self._differentiable_vjp
        return vjp(transposed, [w], self._shaped(rows))[0]

    @cached_property
    def _differentiable_vjp(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        return differentiable_vjp(self.outputs, self._parameters)

    def _forward_jvp(self, row: Tensor) -> Tensor:
        """:math:`J u`, ``[N, C]``, for one vector."""
        at = {name: leaf.detach() for name, leaf in self._leaves.items()}
        with torch.no_grad():
            along = self._model.network.from_vector(row)
            return jvp(lambda moved: self._model.outputs(moved, self._inputs), at, along, forward_only=True)[1]

    def _agrees_with_reverse_mode(self, row: Tensor, tangent: Tensor) -> bool:
        r"""Whether :math:`w^\top (J u) = (J^\top w)^\top u`: forward mode ignores stopped gradients."""
        # Along the tangent itself, of which a stopped gradient takes a share however many outputs there are, and along
        # a random vector, for changes that cancel.
        tangent = tangent.double()
        w = torch.randn(tangent.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(tangent)
        size = tangent.square().mean().sqrt().clamp_min(torch.finfo(tangent.dtype).tiny)
        w = (w + tangent / size).to(self.outputs)
        back = vjp([self.outputs], self._parameters, [w[None]])
        forward = float((w.double() * tangent).sum())
        reverse = sum(
            float((g.double() * v.double()).sum()) for g, v in zip(back, self._shaped(row[None]), strict=True)
        )
        # Hundreds of rounding errors, but less than such a share. An accelerator may multiply in fewer bits than its
        # dtype has.
        precision = max(self._model.network.precision, torch.finfo(self.outputs.dtype).eps)
        tolerance = min(1e3 * precision, 0.1) if row.device.type == "cpu" else 0.1
        return abs(forward - reverse) <= tolerance * float(w.double().norm() * tangent.norm())

    # -- the loss in the parameters ------------------------------------------------------------

    def gradient(self, scale: float = 1.0) -> Tensor:
        """Of the summed loss, ``[D]``, by way of the residual times a scale, which changes no more than rounding."""
        return self.vjp(scale * self.residual[None])[0] / scale

    def curvature_product(self, rows: Tensor) -> Tensor:
        """Products with the Gauss-Newton matrix or the Hessian of the summed loss, ``[k, D] -> [k, D]``."""
        if self._model.kind == "hessian":
            return self._hessian_product(rows)
        return self.vjp(self.loss_hessian_product(self.jvp(rows)))

    def _hessian_product(self, rows: Tensor) -> Tensor:
        return self._flat(vjp(self._gradients, self._parameters, self._shaped(rows)))

    @cached_property
    def _gradients(self) -> tuple[Tensor, ...]:
        """Gradient of the summed loss as a function of the parameters."""
        total = self._model.losses(self.outputs, self._targets).sum()
        return torch.autograd.grad(total, self._parameters, create_graph=True, materialize_grads=True)

    def along(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivatives of every datum's loss along a direction, ``[D]`` to two ``[N]``.

        The Hessian's have a term more than the Gauss-Newton matrix's, the second derivatives of the outputs.
        """
        residual = self.residual.double()
        change = self.jvp(row[None])
        slopes = (residual * change[0].double()).sum(-1)
        curvatures = (change.double() * self.loss_hessian_product(change).double())[0].sum(-1)
        if self._model.kind == "hessian":
            vectors = [v[0] for v in self._shaped(row[None])]
            second = second_directional_derivative(self.outputs, self._parameters, vectors)
            curvatures = curvatures + (residual * second.double()).sum(-1)
        return slopes, curvatures

    def per_datum(self, row: Tensor | None = None) -> list[Tensor]:
        r"""Gradient of every datum's loss, ``[N, D]``, and, with a vector ``[D]``, its Hessian times that, likewise.

        The latter is the gradient of :math:`u^\top \nabla \ell_n`. Mapped over data, or datum by datum for a model that
        cannot be mapped; torch maps second derivatives of some layers wrongly, so that the first are checked.
        """
        columns = _data.columns(self._inputs)
        if columns is not None and self._model.can_be_mapped is not False:
            try:
                found = self._mapped(row, *columns)
                if row is not None and self._model.can_be_mapped is None and found[1].any():
                    self._model.can_be_mapped = self._adds_up(row, found[1])
                if self._model.can_be_mapped is not False:
                    return found
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError, NotImplementedError):  # what torch.func does not know
                self._model.can_be_mapped = False
        rows = []
        for index in range(len(self.outputs)):
            one = slice(index, index + 1)
            with self._model.on(_data.take(self._inputs, one), self._targets[one]) as datum:
                product = [] if row is None else [datum._hessian_product(row[None])[0]]
                rows.append([datum.gradient(), *product])
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def _adds_up(self, row: Tensor, products: Tensor) -> bool:
        """Whether products of data with their Hessians have the sum that the Hessian of all of them gives."""
        difference = float((products.sum(0) - self._hessian_product(row[None])[0]).norm())
        precision = max(self._model.network.precision, torch.finfo(self.outputs.dtype).eps)
        return difference <= 1e3 * precision * float(products.norm(dim=1).sum())

    def _mapped(
        self, row: Tensor | None, tensors: Sequence[Tensor], rebuilt: Callable[[Sequence[Tensor]], _data.Inputs]
    ) -> list[Tensor]:
        model, shapes = self._model, self._model.network.shapes
        at = {name: leaf.detach() for name, leaf in self._leaves.items()}

        def loss(parameters: dict[str, Tensor], target: Tensor, *datum: Tensor) -> Tensor:
            outputs = model.outputs(parameters, rebuilt([leaf[None] for leaf in datum]))
            return model.losses(outputs, target[None])[0]

        gradient_of: Callable[..., Any] = torch.func.grad(loss)
        if row is not None:
            vector = model.network.from_vector(row)

            def slope(parameters: dict[str, Tensor], *datum: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                gradient = torch.func.grad(loss)(parameters, *datum)
                return torch.stack([(g * vector[name]).sum() for name, g in gradient.items()]).sum(), gradient

            gradient_of = torch.func.grad(slope, has_aux=True)
        result = torch.func.vmap(gradient_of, (None, *[0] * (1 + len(tensors))))(at, self._targets, *tensors)
        parts = [result] if row is None else reversed(result)  # the product comes first, the gradient beside it
        return [flatten(part, shapes).double() for part in parts]

    # -- vectors -------------------------------------------------------------------------------

    def _flat(self, gradients: Sequence[Tensor]) -> Tensor:
        return flatten(dict(zip(self._leaves, gradients, strict=True)), self._model.network.shapes).double()

    def _shaped(self, rows: Tensor) -> list[Tensor]:
        """Vectors as tensors ``[k, *shape]`` of every parameter, in the dtypes of the model."""
        return list(self._model.network.from_vector(rows).values())


def scaled_to_unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows times the powers of two that bring their largest entries to one, and the inverse powers, ``[K, 1]``.

    What a model computes with them then neither under- nor overflows for their size.
    """
    exponents = torch.frexp(rows.detach().abs().amax(-1, keepdim=True).double()).exponent
    ones = torch.ones_like(exponents, dtype=torch.float64)
    return torch.ldexp(rows.double(), -exponents).to(rows), torch.ldexp(ones, exponents)


def vjp(outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """Vector-Jacobian products for vectors ``[k, *shape]`` of every output; the graph stays."""
    connected = [(out, v.to(out)) for out, v in zip(outputs, vectors, strict=True) if out.requires_grad]
    k = len(vectors[0])
    if not connected:
        return [leaf.new_zeros((k, *leaf.shape)) for leaf in inputs]
    outs = [out for out, _ in connected]
    common: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    if k == 1:
        single = torch.autograd.grad(outs, inputs, [v[0] for _, v in connected], **common)
        gradients = tuple(None if g is None else g[None] for g in single)
    else:
        try:
            gradients = torch.autograd.grad(outs, inputs, [v for _, v in connected], is_grads_batched=True, **common)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # some release of torch cannot batch some layer's second derivative: one by one
            rows = [vjp(outs, inputs, [v[i : i + 1] for _, v in connected]) for i in range(k)]
            return [torch.cat(column) for column in zip(*rows, strict=True)]
    return [
        leaf.new_zeros((k, *leaf.shape)) if g is None else g for leaf, g in zip(inputs, gradients, strict=True)
    ]  # fmt: skip


def second_directional_derivative(outputs: Tensor, inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    r"""Second derivatives of outputs along a direction, :math:`\partial^2_t f(\theta + t u)` at zero, in their shape.

    The second derivative of :math:`w^\top f` along u is linear in w; its gradient in w is that of every output.

    Args:
        outputs: f, a function of the inputs in autograd's graph.
        inputs: The tensors that make up :math:`\theta`.
        vectors: Those of the direction u, one in the shape of each input.
    """
    w = torch.zeros_like(outputs).requires_grad_()
    slope = _derivative_along((outputs * w).sum(), inputs, vectors)
    curvature = _derivative_along(slope, inputs, vectors)
    return vjp([curvature], [w], [torch.ones_like(curvature)[None]])[0][0]


def _derivative_along(value: Tensor, inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """Of a scalar along a direction, as a scalar that can be differentiated again; a constant's is zero."""
    if not value.requires_grad:
        return torch.zeros_like(value)
    gradients = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
    return sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))  # type: ignore[return-value]
