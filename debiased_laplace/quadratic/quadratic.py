r"""The quadratic that a batch of data makes of the loss, as an object with matrix-free products.

.. math:: q(\theta) = \mathcal L(\theta_0) + (\theta - \theta_0)^\top g
    + \tfrac12 (\theta - \theta_0)^\top C (\theta - \theta_0)

with per-datum means over the batch, and C the generalised Gauss-Newton matrix or the Hessian. Vectors are ``[D]`` or
``[K, D]``, float64, in the order of ``model.named_parameters()`` as everywhere; C is never formed. Changes of the
outputs along a vector come from forward-mode differentiation where the model's operations have it, all else from
reverse mode.

Source: Tatzel, Mucsányi, Hackel, Hennig, "Debiasing Mini-Batch Quadratics for Applications in Deep Learning"
(arXiv 2410.14325).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _checks, _data
from debiased_laplace._guards import global_random_state, gradients_enabled
from debiased_laplace.curvature.structures.lanczos import largest_eigenpairs
from debiased_laplace.curvature.structures.lowrank import is_nonzero
from debiased_laplace.likelihoods import Likelihood, resolve_likelihood
from debiased_laplace.network.blocks import flatten
from debiased_laplace.network.forward_mode import PlainAttention, jvp
from debiased_laplace.network.network import Network
from debiased_laplace.network.selection import match_parameters
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.quadratic.spectrum import GGN, DirectionalDerivatives

__all__ = ["Quadratic"]

CURVATURES = ("ggn", "hessian")

#: Most columns N C of the Gauss-Newton matrix's factor with which eigenpairs come from its Gram matrix: up to there
#: that is faster.
GRAM_SIZE = 500

Products = Callable[[Tensor], Tensor]


class Quadratic:
    r"""The quadratic of a batch around the model's parameters.

    It keeps copies of the parameters and the buffers it was made with, so that the model may move on, and never writes
    to the model. Outputs of one datum must not depend on the others of its batch.

    Args:
        model: Any module with outputs ``[N, C]`` (or ``[N]``).
        batch: ``(inputs, targets)``, or a list of such batches (any loader of finite length): their union. A batch
            that is a dictionary is given to the model whole, with its targets under ``"labels"``.
        likelihood: ``"classification"``, ``"regression"``, ``"bernoulli"``, or a
            :class:`~debiased_laplace.likelihoods.Likelihood`.
        curvature: ``"ggn"``, never negative, or ``"hessian"``, which may be.
        l2: Adds :math:`\frac{l_2}{2} \|\theta\|^2`, :math:`\theta` the chosen parameters, to the loss.
        parameters: Which trainable parameters: all, ``"last_layer"``, or names and patterns.
        chunk_size: Data at a time; None for whole batches, as they were given.

    Attributes:
        loss: Mean loss of a datum plus the regulariser, at the centre.
        gradient: Its gradient ``[D]``.
        center: :math:`\theta_0`, ``[D]``, a copy.
        n_params: D.
        n_data: N.
        n_outputs: C.

    Raises:
        NonFiniteError: If the loss or its gradient is not finite.

    Example:
        >>> import torch
        >>> from debiased_laplace import Quadratic
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
        >>> x, y = torch.randn(64, 4).double(), torch.randint(3, (64,))
        >>> batch = Quadratic(model, (x[:16], y[:16]), "classification")
        >>> data = Quadratic(model, (x, y), "classification")
        >>> values, directions = batch.eigenpairs(1)
        >>> bool(torch.allclose(batch.curvature(directions), values))
        True
        >>> bool(data.curvature(directions) < values)  # the same batch overstates it
        True
    """

    loss: float
    gradient: Tensor
    center: Tensor
    n_params: int
    n_data: int
    n_outputs: int

    def __init__(
        self,
        model: nn.Module | Snapshot,
        batch: Any,
        likelihood: str | Likelihood,
        curvature: str = "ggn",
        *,
        l2: float = 0.0,
        parameters: str | Sequence[str] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if curvature not in CURVATURES:
            raise ValueError(f"Expected a curvature out of {list(CURVATURES)}, got {curvature!r}.")
        if not (math.isfinite(l2) and l2 >= 0):
            raise ValueError(f"Expected an l2 that is finite and at least zero, got {l2}.")
        _checks.chunk_size(chunk_size)
        self.kind, self.l2, self.chunk_size = curvature, float(l2), chunk_size
        self.likelihood = resolve_likelihood(likelihood)
        self._batches = _batches(batch)
        self.n_data = sum(len(targets) for _, targets in self._batches)
        snapshot = Snapshot.of(model)
        self._network = Network(snapshot, _names(snapshot, parameters, self._batches[0][0]))
        self.n_params = self._network.n_params
        with torch.inference_mode(False):
            self.center = self._network.mean().double().clone()
        self._found: tuple[Tensor, Tensor] | None = None
        self._forward_mode: bool | None = None  # whether the model's operations have it; not known yet
        self._rounding: Tensor | None = None
        with torch.inference_mode(False):
            single = next((inputs for inputs, targets in self._chunks() if len(targets) == 1), None)
            if single is not None:
                self._network.try_one(single)
            self.loss, self.gradient = self._loss_and_gradient()

    def __repr__(self) -> str:
        return (
            f"Quadratic({self.kind}, {self.n_data} data, {self.n_params} parameters, loss={self.loss:.4g}, "
            f"l2={self.l2:g})"
        )

    # -- precision -----------------------------------------------------------------------------

    @property
    def precision(self) -> float:
        """Relative rounding error of products at best: that of the coarsest dtype among parameters and outputs."""
        return max(self._network.precision, torch.finfo(self._outputs_dtype).eps)

    @torch.inference_mode(False)
    def gradient_rounding(self) -> Tensor:
        """What rounding makes of the gradient, ``[D]``: the difference of two that are equal but for rounding.

        Where the gradients of data cancel, as near a minimum, the rounding errors of each of them stay, and nothing in
        the gradient itself tells. Cost: one gradient, once.
        """
        if self._rounding is None:
            self._rounding = self._loss_and_gradient(scale=3.0)[1] - self.gradient
        return self._rounding

    # -- the quadratic -------------------------------------------------------------------------

    def slope(self, u: Tensor) -> Tensor:
        r""":math:`u^\top g`, a scalar for ``[D]``, ``[K]`` for ``[K, D]``."""
        return (self._vectors(u) @ self.gradient).reshape(u.shape[:-1])

    def curvature(self, u: Tensor) -> Tensor:
        r""":math:`u^\top C u`, a scalar for ``[D]``, ``[K]`` for ``[K, D]``; u is not normalised."""
        rows = self._vectors(u)
        if self.kind == "hessian":
            return (rows * self.matvec(rows)).sum(-1).reshape(u.shape[:-1])
        found = self._outer(rows, "knc,knc->k") + self.l2 * rows.square().sum(-1)
        return found.reshape(u.shape[:-1])

    def projected(self, u: Tensor) -> tuple[Tensor, Tensor]:
        r"""The quadratic on the span of rows ``[K, D]``: slopes :math:`U g`, ``[K]``; :math:`U C U^\top`, ``[K, K]``.

        In coordinates a: :math:`q(\theta_0 + U^\top a) = \mathcal L + a^\top U g + \tfrac12 a^\top U C U^\top a`.
        """
        rows = self._vectors(u)
        if not len(rows):
            matrix = rows.new_zeros(0, 0)
        elif self.kind == "hessian":
            matrix = rows @ self.matvec(rows).mT
        else:
            matrix = self._outer(rows, "knc,lnc->kl") + self.l2 * (rows @ rows.mT)
        return rows @ self.gradient, (matrix + matrix.mT) / 2

    @torch.inference_mode(False)
    def matvec(self, u: Tensor) -> Tensor:
        r""":math:`C u`, ``[D]`` or ``[K, D]``.

        Cost for each vector: with the Gauss-Newton matrix a pass in forward mode (all that :meth:`curvature` and
        :meth:`projected` need) and a backward pass; with the Hessian a pass back through a backward pass.
        """
        rows, scales = _unit(self._vectors(u))
        total = (self._curvature_products(rows) + self.l2 * rows) * scales
        _checks.finite(total, "a product with the curvature", "Look for NaN in the vector, or for an overflow.")
        return total.reshape(u.shape)

    def _curvature_products(self, rows: Tensor) -> Tensor:
        """Products with the curvature of the batch alone, without the regulariser's, ``[K, D]``."""
        total = torch.zeros_like(rows)
        for inputs, targets in self._chunks():
            with self._graph(inputs) as (leaves, outputs):
                product = self._products(inputs, leaves, outputs, targets)
                for part in self._parts(rows):
                    total[part] += product(rows[part])
        _checks.finite(total, "a product with the curvature", "Look for NaN in the vector, or for an overflow.")
        return total / self.n_data

    def value(self, point: Tensor) -> Tensor:
        r""":math:`q(\theta)` at parameters ``[D]`` or ``[K, D]``."""
        steps = self._vectors(point) - self.center
        values = self.loss + steps @ self.gradient + 0.5 * (steps * self.matvec(steps)).sum(-1)
        return values.reshape(point.shape[:-1])

    @torch.inference_mode(False)
    def true_loss(self, point: Tensor) -> Tensor:
        """The mean loss itself, with the regulariser, at parameters ``[D]`` or ``[K, D]``; infinite if it overflows."""
        rows = self._vectors(point)
        totals = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        with torch.no_grad():
            for inputs, targets in self._chunks():
                for index, row in enumerate(rows):
                    outputs = self._call(self._network.from_vector(row), inputs)
                    totals[index] += self._losses(outputs, targets).double().sum()
        return (totals / self.n_data + 0.5 * self.l2 * rows.square().sum(-1)).reshape(point.shape[:-1])

    @torch.inference_mode(False)
    def per_datum(self, u: Tensor) -> DirectionalDerivatives:
        r"""Slopes and curvatures of every datum along directions: ``[D]`` or ``[K, D]`` gives ``[N, K]`` of both.

        The means over data are :meth:`slope` and :meth:`curvature`: the regulariser is part of every datum's loss.
        """
        rows = self._vectors(u)
        unit, scales = _unit(rows)
        slopes, curvatures = [], []
        for inputs, targets in self._chunks():
            with self._graph(inputs) as (leaves, outputs):
                along = self._derivatives(inputs, leaves, outputs, targets)
                first, second = zip(*[along(row) for row in unit], strict=True)
            slopes.append(torch.stack(first, 1) * scales[:, 0])
            curvatures.append(torch.stack(second, 1) * scales[:, 0].square())
        weights = torch.full((self.n_data,), 1 / self.n_data, dtype=torch.float64, device=rows.device)
        return DirectionalDerivatives(
            torch.cat(slopes) + self.l2 * (rows @ self.center),
            torch.cat(curvatures) + self.l2 * rows.square().sum(-1),
            weights,
            self.precision,
        )

    # -- eigenpairs ----------------------------------------------------------------------------

    @torch.inference_mode(False)
    def eigenpairs(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues ``[k]``, descending, and orthonormal eigenvectors ``[k, D]``, as rows.

        A repeated eigenvalue comes as often as it is one (regression with C outputs has every one of a linear model,
        or of the last layer alone, C times); of its eigenvectors only their span is determined, and if k cuts it, not
        even that. Those of the Gauss-Newton matrix come from its Gram matrix, exactly, as long as that has at most
        :data:`GRAM_SIZE` rows; others from products, in the precision of the model's dtype
        (:func:`.largest_eigenpairs`).

        Args:
            k: How many; the largest in value, not in magnitude, so that a Hessian's negative ones come last.

        Raises:
            ValueError: If there are fewer: the Gauss-Newton matrix of N data has at most N C eigenvalues that are not
                zero (without the regulariser).
            ConvergenceError: If products cannot tell the last ones from those that follow.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.n_params:
            raise ValueError(
                f"Expected a number of eigenvectors from 1 to {self.n_params}, the number of parameters, got {k!r}."
            )
        if self._found is None or len(self._found[0]) < k:
            self._found = self._eigenpairs(k)
        values, vectors = self._found
        return values[:k].clone(), vectors[:k].clone()

    def _eigenpairs(self, k: int) -> tuple[Tensor, Tensor]:
        values, vectors = self._by_gram(k) or self._by_products(k)
        if self.kind == "ggn":
            size = min(self.n_params, self.n_data * self.n_outputs)
            keep = is_nonzero(values, size, torch.finfo(self._network.dtype).eps) & (values > 0)
            values, vectors = values[keep], vectors[keep]
            if len(values) < k:
                raise ValueError(
                    f"Expected to find {k} eigenvectors with curvature, got {len(values)}: the Gauss-Newton matrix of "
                    f"{self.n_data} data with {self.n_outputs} outputs has no more of them above rounding. "
                    "Ask for fewer, or give a larger batch."
                )
        return values + self.l2, vectors

    def _by_gram(self, k: int) -> tuple[Tensor, Tensor] | None:
        """Through the Gram matrix, where it is small."""
        columns = self.n_data * self.n_outputs
        inputs = [inputs for inputs, _ in self._batches]
        shapes = {tuple(leaf.shape[1:] for leaf in _data.tensors(own)) for own in inputs}
        if self.kind != "ggn" or columns > GRAM_SIZE or len(shapes) > 1:
            return None
        try:
            ggn = GGN(
                self._network.snapshot,
                _data.concatenate(inputs),
                torch.cat([targets for _, targets in self._batches]),
                self.likelihood,
                parameters=list(self._network.shapes),
                chunk_size=self.chunk_size,
            )
            values, basis = ggn.eigenpairs(k)
        except _checks.UnsupportedLayerError:  # its products need no rule for the layer
            return None
        lifted = basis.lift(torch.eye(basis.rank, dtype=torch.float64, device=values.device))
        order = values.double().argsort(descending=True)
        return values.double()[order], lifted[order]

    def _by_products(self, k: int) -> tuple[Tensor, Tensor]:
        return largest_eigenpairs(
            self._curvature_products, self.n_params, k, precision=torch.finfo(self._network.dtype).eps,
            name="the curvature of the batch", device=self.center.device,
        )  # fmt: skip

    # -- passes over data ----------------------------------------------------------------------

    def _vectors(self, u: Tensor) -> Tensor:
        """Vectors as rows ``[K, D]``, float64, on the model's device."""
        if not isinstance(u, Tensor):
            raise TypeError(f"Expected a tensor of shape [{self.n_params}] or [K, {self.n_params}], got {u!r}.")
        if u.ndim not in (1, 2) or u.shape[-1] != self.n_params:
            raise ValueError(
                f"Expected vectors of shape [{self.n_params}] or [K, {self.n_params}], one entry for each parameter, "
                f"got {tuple(u.shape)}."
            )
        return _data.to_device(u.detach(), self.center.device).double().reshape(-1, self.n_params)

    def _parts(self, rows: Tensor) -> Iterator[slice]:
        return _data.slices(len(rows), self._network.vector_chunk)

    def _chunks(self) -> Iterator[tuple[_data.Inputs, Tensor]]:
        device = self._network.device
        for inputs, targets in self._batches:
            for part in _data.slices(len(targets), self.chunk_size or len(targets)):
                yield _data.to_device(_data.take(inputs, part), device), _data.to_device(targets[part], device)

    def _call(self, parameters: dict[str, Tensor], inputs: _data.Inputs) -> Tensor:
        with PlainAttention():  # whatever derivative is asked for
            return self._network.call(parameters, inputs)

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.likelihood.loss(outputs.to(self._network.dtype), targets)

    @contextmanager
    def _graph(self, inputs: _data.Inputs) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Parameters at the centre as leaves, and the outputs ``[N, C]`` of some data as a function of them."""
        with gradients_enabled():
            own = self._network.from_vector(self.center)
            leaves = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
            yield leaves, self._call(leaves, inputs)

    def _loss_and_gradient(self, scale: float = 1.0) -> tuple[float, Tensor]:
        """Both, by way of the gradient in the outputs times a scale, which changes no more than the rounding."""
        loss, gradient = 0.0, torch.zeros_like(self.center)
        for index, (inputs, targets) in enumerate(self._chunks()):
            with self._graph(inputs) as (leaves, outputs):
                self.n_outputs, self._outputs_dtype = outputs.shape[1], outputs.dtype
                if not index:
                    self._batches = [
                        (data, self.likelihood.prepare_targets(own, self.n_outputs)) for data, own in self._batches
                    ]
                loss += float(self._losses(outputs.detach(), targets).double().sum())
                gradient += self._pulled(outputs, leaves, scale * self._residual(outputs, targets)[None])[0] / scale
        loss = loss / self.n_data + 0.5 * self.l2 * float(self.center.square().sum())
        gradient = gradient / self.n_data + self.l2 * self.center
        if not math.isfinite(loss):
            raise _checks.NonFiniteError(
                f"Expected a finite loss of the batch, got {loss}. Look for NaN in its data, or in the weights."
            )
        _checks.finite(gradient, "the gradient of the batch", "Look for an operation with an infinite derivative.")
        return loss, gradient

    def _residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradients of every datum's loss in its outputs, ``[N, C]``."""
        return self.likelihood.gradient(outputs.detach().to(self._network.dtype), targets)

    def _pulled(self, outputs: Tensor, leaves: dict[str, Tensor], vectors: Tensor) -> Tensor:
        r""":math:`J^\top w`, ``[k, N, C] -> [k, D]``."""
        unit, scales = _unit(vectors.flatten(1))
        return self._flat(_pull([outputs], list(leaves.values()), [unit.view_as(vectors)]), leaves) * scales

    def _flat(self, gradients: Sequence[Tensor], leaves: dict[str, Tensor]) -> Tensor:
        return flatten(dict(zip(leaves, gradients, strict=True)), self._network.shapes).double()

    @torch.inference_mode(False)
    def _outer(self, rows: Tensor, contraction: str) -> Tensor:
        r"""Mean over data of the contraction of :math:`J_n u_k` and :math:`\nabla^2_f \ell_n J_n u_l`."""
        total: Tensor | None = None
        rows, scales = _unit(rows)
        for inputs, targets in self._chunks():
            with self._graph(inputs) as (leaves, outputs):
                jacobian, loss_hessian = self._jacobian(inputs, leaves, outputs), self._loss_hessian(outputs, targets)
                change = torch.cat([jacobian(rows[part]) for part in self._parts(rows)])
                bent = loss_hessian(change)
            found = torch.einsum(contraction, *(own.double() * scales[:, :, None] for own in (change, bent)))
            total = found if total is None else total + found
        assert total is not None  # there are data
        _checks.finite(total, "curvatures along the vectors", "Look for NaN in the vectors, or for an overflow.")
        return total / self.n_data

    def _products(self, inputs: _data.Inputs, leaves: dict[str, Tensor], outputs: Tensor, targets: Tensor) -> Products:
        """Products with the sum of the curvatures of some data, ``[k, D] -> [k, D]``."""
        if self.kind == "hessian":
            parameters = list(leaves.values())
            total = self._losses(outputs, targets).sum()
            gradients = torch.autograd.grad(total, parameters, create_graph=True, materialize_grads=True)
            return lambda rows: self._flat(_pull(gradients, parameters, self._shaped(rows)), leaves)
        jacobian, loss_hessian = self._jacobian(inputs, leaves, outputs), self._loss_hessian(outputs, targets)

        def product(rows: Tensor) -> Tensor:
            return self._pulled(outputs, leaves, loss_hessian(jacobian(rows)))

        return product

    def _jacobian(self, inputs: _data.Inputs, leaves: dict[str, Tensor], outputs: Tensor) -> Products:
        """:math:`J u`, ``[k, D] -> [k, N, C]``, in forward mode, or in reverse mode for a model without it."""
        pullback: Products | None = None
        parameters = list(leaves.values())

        def change(rows: Tensor) -> Tensor:
            nonlocal pullback
            if self._forward_mode is not False:
                try:
                    found = torch.stack([self._tangent(inputs, leaves, row) for row in rows])
                    if self._forward_mode is None:
                        self._forward_mode = self._consistent(parameters, outputs, rows[0], found[0])
                    if self._forward_mode:
                        return found
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:  # of an operation without it; reverse mode tells what else is wrong
                    self._forward_mode = False
            pullback = pullback or self._twice_back(parameters, outputs)
            return pullback(rows)

        return change

    def _consistent(self, parameters: list[Tensor], outputs: Tensor, row: Tensor, change: Tensor) -> bool:
        r"""Whether :math:`w^\top (J u) = (J^\top w)^\top u`: forward mode ignores stopped gradients."""
        # Along the change itself, of which a stopped gradient takes a share however many outputs there are, and along a
        # random vector, for changes that cancel.
        own = change.double()
        w = torch.randn(own.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(own)
        w = (w + own / own.square().mean().sqrt().clamp_min(torch.finfo(own.dtype).tiny)).to(outputs)
        back = _pull([outputs], parameters, [w[None]])
        forward = float((w.double() * own).sum())
        reverse = sum(
            float((g.double() * v.double()).sum()) for g, v in zip(back, self._shaped(row[None]), strict=True)
        )
        # Hundreds of rounding errors, but less than such a share. An accelerator may multiply in fewer bits than its
        # dtype has.
        tolerance = min(1e3 * self.precision, 0.1) if row.device.type == "cpu" else 0.1
        return abs(forward - reverse) <= tolerance * float(w.double().norm() * own.norm())

    def _tangent(self, inputs: _data.Inputs, leaves: dict[str, Tensor], row: Tensor) -> Tensor:
        """:math:`J u`, ``[N, C]``, for one vector."""
        at = {name: leaf.detach() for name, leaf in leaves.items()}
        with torch.no_grad():
            along = self._network.from_vector(row)
            return jvp(lambda own: self._call(own, inputs), at, along, forward_only=True)[1]

    def _twice_back(self, parameters: list[Tensor], outputs: Tensor) -> Products:
        """:math:`J u` as the transpose of the pullback of w, which is linear in w."""
        w = torch.zeros_like(outputs).requires_grad_()
        pulled = torch.autograd.grad(outputs, parameters, w, create_graph=True, materialize_grads=True)
        return lambda rows: _pull(pulled, [w], self._shaped(rows))[0]

    def _loss_hessian(self, outputs: Tensor, targets: Tensor) -> Products:
        r""":math:`\nabla^2_f \ell_n z_n`, ``[k, N, C] -> [k, N, C]``."""
        leaf = outputs.detach().to(self._network.dtype, copy=True).requires_grad_()
        loss = self.likelihood.curvature_loss if self.kind == "ggn" else self.likelihood.loss
        gradient = torch.autograd.grad(loss(leaf, targets).sum(), leaf, create_graph=True)
        return lambda z: _pull(gradient, [leaf], [z])[0]

    def _derivatives(
        self, inputs: _data.Inputs, leaves: dict[str, Tensor], outputs: Tensor, targets: Tensor
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """First and second derivatives of every datum's loss along a direction, ``[D]`` to two ``[N]``."""
        parameters = list(leaves.values())
        jacobian, loss_hessian = self._jacobian(inputs, leaves, outputs), self._loss_hessian(outputs, targets)
        residual = self._residual(outputs, targets).double()

        def along(row: Tensor) -> tuple[Tensor, Tensor]:
            change = jacobian(row[None])
            slopes = (residual * change[0].double()).sum(-1)
            curvatures = (change.double() * loss_hessian(change).double())[0].sum(-1)
            if self.kind == "hessian":
                curvatures = curvatures + (residual * self._bend(parameters, outputs, row).double()).sum(-1)
            return slopes, curvatures

        return along

    def _bend(self, parameters: list[Tensor], outputs: Tensor, row: Tensor) -> Tensor:
        r"""Second derivatives of the outputs along a direction, ``[N, C]``."""
        w = torch.zeros_like(outputs).requires_grad_()
        total: Any = (outputs * w).sum()
        for _ in range(2):
            if not total.requires_grad:
                return torch.zeros_like(outputs)
            gradients = torch.autograd.grad(total, parameters, create_graph=True, materialize_grads=True)
            total = sum((g * v[0]).sum() for g, v in zip(gradients, self._shaped(row[None]), strict=True))
        return _pull([total], [w], [torch.ones_like(total)[None]])[0][0]

    def _shaped(self, rows: Tensor) -> list[Tensor]:
        """Vectors as tensors ``[k, *shape]`` of every parameter, in the dtypes of the model."""
        return list(self._network.from_vector(rows).values())


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows times the powers of two that bring their largest entries to one, and the inverse powers, ``[K, 1]``.

    What a model computes with them then neither under- nor overflows for their size.
    """
    exponents = torch.frexp(rows.detach().abs().amax(-1, keepdim=True).double()).exponent
    ones = torch.ones_like(exponents, dtype=torch.float64)
    return torch.ldexp(rows.double(), -exponents).to(rows), torch.ldexp(ones, exponents)


def _pull(outputs: Sequence[Tensor], inputs: list[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """Vector-Jacobian products for vectors ``[k, *shape]`` of every output; the graph stays."""
    pairs = [(out, v.to(out)) for out, v in zip(outputs, vectors, strict=True) if out.requires_grad]
    k = len(vectors[0])
    if not pairs:
        return [own.new_zeros((k, *own.shape)) for own in inputs]
    outs = [out for out, _ in pairs]
    common: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    if k == 1:
        found = torch.autograd.grad(outs, inputs, [v[0] for _, v in pairs], **common)
        found = tuple(None if g is None else g[None] for g in found)
    else:
        try:
            found = torch.autograd.grad(outs, inputs, [v for _, v in pairs], is_grads_batched=True, **common)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # some release of torch cannot batch some layer's second derivative: one by one
            rows = [_pull(outs, inputs, [v[i : i + 1] for _, v in pairs]) for i in range(k)]
            return [torch.cat(own) for own in zip(*rows, strict=True)]
    return [own.new_zeros((k, *own.shape)) if g is None else g for own, g in zip(inputs, found, strict=True)]


def _names(model: Snapshot, parameters: str | Sequence[str] | None, inputs: _data.Inputs) -> list[str] | None:
    if parameters == "last_layer":
        return list(Network.discover(model, inputs, parameters=parameters).shapes)
    if parameters is None:
        return None
    return match_parameters(model, parameters)


def _batches(batch: Any) -> list[tuple[_data.Inputs, Tensor]]:
    """One batch, or several, as pairs; a loader's global randomness is put back."""
    with global_random_state():
        found = list(_data.labelled([batch] if _data.is_pair(batch) or isinstance(batch, Mapping) else batch))
    pairs = [(inputs, targets) for inputs, targets, _ in found]
    if not pairs:
        raise ValueError("Expected a batch with data, or a list of such batches, got none.")
    return pairs
