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
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _checks, _data
from debiased_laplace._guards import exact_derivatives, global_random_state
from debiased_laplace.curvature.structures.lanczos import largest_eigenpairs
from debiased_laplace.curvature.structures.lowrank import is_nonzero
from debiased_laplace.likelihoods import Likelihood, resolve_likelihood
from debiased_laplace.network.discovery import try_one
from debiased_laplace.network.network import Network
from debiased_laplace.network.selection import match_parameters
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.quadratic.derivatives import LossAtPoint, scaled_to_unit
from debiased_laplace.quadratic.spectrum import DirectionalDerivatives, eigenpairs_by_gram

__all__ = ["Quadratic"]

#: What the matrix of a quadratic may be: the Gauss-Newton matrix, or the Hessian.
KINDS = ("ggn", "hessian")

#: Most columns N C of the Gauss-Newton matrix's factor with which eigenpairs come from its Gram matrix: up to there
#: that is faster.
GRAM_SIZE = 500


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
        if curvature not in KINDS:
            raise ValueError(f"Expected a curvature out of {list(KINDS)}, got {curvature!r}.")
        if not (math.isfinite(l2) and l2 >= 0):
            raise ValueError(f"Expected an l2 that is finite and at least zero, got {l2}.")
        _checks.chunk_size(chunk_size)
        self.kind, self.l2, self.chunk_size = curvature, float(l2), chunk_size
        self.likelihood = resolve_likelihood(likelihood)
        with global_random_state():  # a loader may shuffle
            self._batches = _data.one_or_several(batch)
        self.n_data = sum(len(targets) for _, targets in self._batches)
        snapshot = Snapshot.of(model)
        self._network = Network(snapshot, _names(snapshot, parameters, self._batches[0][0]))
        self.n_params = self._network.n_params
        with exact_derivatives():
            self.center = self._network.mean().double().clone()
        self._model = LossAtPoint(self._network, self.likelihood, self.center, self.kind)
        self._known_eigenpairs: tuple[Tensor, Tensor] | None = None
        self._rounding: Tensor | None = None
        with exact_derivatives():
            single = next((inputs for inputs, targets in self._chunks() if len(targets) == 1), None)
            if single is not None:
                try_one(self._network, single)
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

    @exact_derivatives()
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
        curvatures = self._outer(rows, "knc,knc->k") + self.l2 * rows.square().sum(-1)
        return curvatures.reshape(u.shape[:-1])

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

    @exact_derivatives()
    def matvec(self, u: Tensor) -> Tensor:
        r""":math:`C u`, ``[D]`` or ``[K, D]``.

        Cost for each vector: with the Gauss-Newton matrix a pass in forward mode (all that :meth:`curvature` and
        :meth:`projected` need) and a backward pass; with the Hessian a pass back through a backward pass.
        """
        rows, scales = scaled_to_unit(self._vectors(u))
        total = (self._curvature_products(rows) + self.l2 * rows) * scales
        _checks.finite(total, "a product with the curvature", "Look for NaN in the vector, or for an overflow.")
        return total.reshape(u.shape)

    def _curvature_products(self, rows: Tensor) -> Tensor:
        """Products with the curvature of the batch alone, without the regulariser's, ``[K, D]``."""
        total = torch.zeros_like(rows)
        for inputs, targets in self._chunks():
            with self._model.on(inputs, targets) as data:
                for part in self._parts(rows):
                    total[part] += data.curvature_product(rows[part])
        _checks.finite(total, "a product with the curvature", "Look for NaN in the vector, or for an overflow.")
        return total / self.n_data

    def value(self, point: Tensor) -> Tensor:
        r""":math:`q(\theta)` at parameters ``[D]`` or ``[K, D]``."""
        steps = self._vectors(point) - self.center
        values = self.loss + steps @ self.gradient + 0.5 * (steps * self.matvec(steps)).sum(-1)
        return values.reshape(point.shape[:-1])

    @exact_derivatives()
    def true_loss(self, point: Tensor) -> Tensor:
        """The mean loss itself, with the regulariser, at parameters ``[D]`` or ``[K, D]``; infinite if it overflows."""
        rows = self._vectors(point)
        totals = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        with torch.no_grad():
            for inputs, targets in self._chunks():
                for index, row in enumerate(rows):
                    outputs = self._model.outputs(self._network.from_vector(row), inputs)
                    totals[index] += self._model.losses(outputs, targets).double().sum()
        return (totals / self.n_data + 0.5 * self.l2 * rows.square().sum(-1)).reshape(point.shape[:-1])

    @exact_derivatives()
    def per_datum(self, u: Tensor) -> DirectionalDerivatives:
        r"""Slopes and curvatures of every datum along directions: ``[D]`` or ``[K, D]`` gives ``[N, K]`` of both.

        The means over data are :meth:`slope` and :meth:`curvature`: the regulariser is part of every datum's loss.
        """
        rows = self._vectors(u)
        unit, scales = scaled_to_unit(rows)
        slopes, curvatures = [], []
        for inputs, targets in self._chunks():
            with self._model.on(inputs, targets) as data:
                first, second = zip(*[data.along(row) for row in unit], strict=True)
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

    @exact_derivatives()
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
        if self._known_eigenpairs is None or len(self._known_eigenpairs[0]) < k:
            self._known_eigenpairs = self._eigenpairs(k)
        values, vectors = self._known_eigenpairs
        return values[:k].clone(), vectors[:k].clone()

    def _eigenpairs(self, k: int) -> tuple[Tensor, Tensor]:
        precision = torch.finfo(self._network.dtype).eps
        pairs = None
        if self.kind == "ggn" and self.n_data * self.n_outputs <= GRAM_SIZE:
            pairs = eigenpairs_by_gram(self._network, self._batches, self.likelihood, k, self.chunk_size)
        values, vectors = pairs or largest_eigenpairs(
            self._curvature_products, self.n_params, k, precision=precision, name="the curvature of the batch",
            device=self.center.device,
        )  # fmt: skip
        if self.kind == "ggn":
            size = min(self.n_params, self.n_data * self.n_outputs)
            keep = is_nonzero(values, size, precision) & (values > 0)
            values, vectors = values[keep], vectors[keep]
            if len(values) < k:
                raise ValueError(
                    f"Expected to find {k} eigenvectors with curvature, got {len(values)}: the Gauss-Newton matrix of "
                    f"{self.n_data} data with {self.n_outputs} outputs has no more of them above rounding. "
                    "Ask for fewer, or give a larger batch."
                )
        return values + self.l2, vectors

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

    def _loss_and_gradient(self, scale: float = 1.0) -> tuple[float, Tensor]:
        """Both, by way of the gradient in the outputs times a scale, which changes no more than the rounding."""
        loss, gradient = 0.0, torch.zeros_like(self.center)
        for index, (inputs, targets) in enumerate(self._chunks()):
            with self._model.on(inputs, targets) as data:
                self.n_outputs, self._outputs_dtype = data.outputs.shape[1], data.outputs.dtype
                if not index:
                    prepare = self.likelihood.prepare_targets
                    self._batches = [(x, prepare(y, self.n_outputs)) for x, y in self._batches]
                loss += data.loss()
                gradient += data.gradient(scale)
        loss = loss / self.n_data + 0.5 * self.l2 * float(self.center.square().sum())
        gradient = gradient / self.n_data + self.l2 * self.center
        if not math.isfinite(loss):
            raise _checks.NonFiniteError(
                f"Expected a finite loss of the batch, got {loss}. Look for NaN in its data, or in the weights."
            )
        _checks.finite(gradient, "the gradient of the batch", "Look for an operation with an infinite derivative.")
        return loss, gradient

    @exact_derivatives()
    def _outer(self, rows: Tensor, contraction: str) -> Tensor:
        r"""Mean over data of the contraction of :math:`J_n u_k` and :math:`\nabla^2_f \ell_n J_n u_l`."""
        total: Tensor | None = None
        rows, scales = scaled_to_unit(rows)
        for inputs, targets in self._chunks():
            with self._model.on(inputs, targets) as data:
                tangents = torch.cat([data.jvp(rows[part]) for part in self._parts(rows)])
                products = data.loss_hessian_product(tangents)
            pair = (each.double() * scales[:, :, None] for each in (tangents, products))
            contracted = torch.einsum(contraction, *pair)
            total = contracted if total is None else total + contracted
        assert total is not None  # there are data
        _checks.finite(total, "curvatures along the vectors", "Look for NaN in the vectors, or for an overflow.")
        return total / self.n_data


def _names(model: Snapshot, parameters: str | Sequence[str] | None, inputs: _data.Inputs) -> list[str] | None:
    if parameters == "last_layer":
        return list(Network.discover(model, inputs, parameters=parameters).shapes)
    return None if parameters is None else match_parameters(model, parameters)
