r"""The empirical Fisher of the newest gradients, as the rows of one matrix, and what pruning asks of its inverse.

Gradients are the rows of G, ``[m, D]``, of which n are there yet, and the Gram matrix :math:`G G^\top` grows with them.
Pieces of G's columns come to float64 one after the other: the matrix is that of the stored gradients, exactly.

Source: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information"
(arXiv 2107.03356). Theirs is a recursion over the gradients; here are the eigenvectors of the Gram matrix, which serve
every damping. The pruning is that of Hassibi, Stork, "Second order derivatives for network pruning" (NIPS 1992).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _checks, _data
from debiased_laplace._guards import exact_derivatives, global_random_state
from debiased_laplace.curvature.block_gradients import block_gradients
from debiased_laplace.curvature.decomposition import eigh
from debiased_laplace.likelihoods import Likelihood, resolve_likelihood
from debiased_laplace.network.blocks import flatten
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.quadratic.gram_products import GramProducts, Inner
from debiased_laplace.sampling.sample import WeightedData

__all__ = ["EmpiricalFisher"]

#: Numbers of the gradients that are in float64 at a time.
PIECE = 2**22


class EmpiricalFisher(GramProducts):
    r"""The empirical Fisher of the n newest gradients, :math:`\hat F = \frac1n \sum_i g_i g_i^\top`, by Woodbury.

    It is no approximation of the Hessian (Kunstner, Balles, Hennig, arXiv 1905.12558). With labels that are drawn from
    the model's own predictive in the place of the targets it is an unbiased estimate of the Gauss-Newton matrix, but a
    poor one where nearly all of them are the targets.

    Args:
        model: The model; left as it was.
        data: ``(inputs, targets)``, or a list or loader of such batches, which is read once. Every datum gives one
            gradient, at the parameters that the model has now.
        likelihood: ``"classification"``, ``"regression"``, or a :class:`~debiased_laplace.likelihoods.Likelihood`.
        window: m, the most gradients that are kept; a new one takes the place of the oldest.
        parameters: Which trainable parameters: all, ``"last_layer"``, or names and patterns.
        chunk_size: Data at a time.

    Memory (:attr:`memory`): ``m D`` numbers in the precision of the model, and ``16 m^2`` bytes. Time: ``2 m D``
    operations for a gradient that is added, about ``10 m^3`` for the first product after that, ``4 m D`` for every one.

    Attributes:
        network: The model with its blocks.
        window: m.
        n_gradients: n.

    Example:
        >>> import torch
        >>> from debiased_laplace import EmpiricalFisher
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
        >>> fisher = EmpiricalFisher(model, (x[:32], y[:32]), "classification", window=48)
        >>> fisher.add((x[32:], y[32:]))  # the 16 oldest go
        >>> step = fisher.inverse_matvec(torch.ones(67), damping=1e-3)
        >>> fisher.n_gradients, bool(torch.allclose(fisher.matvec(step, damping=1e-3), torch.ones(67).double()))
        (48, True)
    """

    @exact_derivatives()
    def __init__(
        self,
        model: nn.Module | Snapshot,
        data: Any,
        likelihood: str | Likelihood,
        *,
        window: int = 1024,
        parameters: str | Sequence[str] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        _checks.whole(window, "window")
        _checks.chunk_size(chunk_size)
        self.likelihood, self.window, self.chunk_size = resolve_likelihood(likelihood), window, chunk_size
        self.n_gradients, self._next = 0, 0
        self._known: tuple[Tensor, Tensor] | None = None
        with global_random_state():  # a loader may shuffle
            batches = _data.each(data)
            first = next(batches, None)
            if first is None:
                raise ValueError("Expected a batch with data, or a list or loader of such batches, got none.")
            self.network = Network.discover(model, first[0], parameters=parameters)
            self.gram_precision = self.network.gram_precision
            self._rows = self.network.mean().new_empty(window, self.network.n_params, dtype=self.network.dtype)
            self._gram = self._rows.new_empty(window, window, dtype=torch.float64)
            for batch in chain([first], batches):
                self._add(*batch)

    def __repr__(self) -> str:
        n_params = self.network.n_params
        return f"EmpiricalFisher({self.n_gradients} gradients of at most {self.window}, {n_params} parameters)"

    # -- gradients -------------------------------------------------------------------------------

    @property
    def gradients(self) -> Tensor:
        """Those in the window, ``[n, D]``, in no order: not to be written to."""
        return self._rows[: self.n_gradients]

    @property
    def memory(self) -> int:
        """Bytes that the gradients and their Gram matrix take, with its eigenvectors."""
        return self._rows.nbytes + 2 * self._gram.nbytes

    @exact_derivatives()
    def add(self, data: Any) -> None:
        """The gradients of more data, in the form of the first: the newest."""
        with global_random_state():
            for batch in _data.each(data):
                self._add(*batch)

    @exact_derivatives()
    def append(self, gradients: Tensor) -> None:
        """Gradients from anywhere, ``[k, D]``, the newest last: of mini-batches, or of a model that is in training.

        Raises:
            ValueError: If they have another shape.
            NonFiniteError: If they are not finite; those before stay.
        """
        if gradients.ndim != 2 or gradients.shape[1] != self.network.n_params:
            raise ValueError(
                f"Expected gradients of shape [k, {self.network.n_params}], one entry for each parameter, got "
                f"{tuple(gradients.shape)}."
            )
        rows = gradients.detach()[-self.window :].to(self._rows)
        _checks.finite(rows, "the gradients", "Look for NaN in the data, or for an overflow.")
        places = (self._next + torch.arange(len(rows), device=rows.device)) % self.window
        self._rows[places] = rows
        self._next = (self._next + len(rows)) % self.window
        self.n_gradients = min(self.n_gradients + len(rows), self.window)
        products = self._times(rows).mT
        self._gram[: self.n_gradients, places] = products
        self._gram[places, : self.n_gradients] = products.mT
        self._known = None

    def _add(self, inputs: _data.Inputs, targets: Tensor) -> None:
        network, n = self.network, len(targets)
        targets = self.likelihood.prepare_targets(targets, network.n_outputs)
        data = WeightedData(inputs, targets, torch.ones(n, dtype=torch.float64), torch.arange(n))
        options: dict[str, Any] = {"curvature": "empirical_fisher", "chunk_size": self.chunk_size}
        for chunk in CurvatureData(network, data, self.likelihood, **options).for_all_vectors():
            by_name: dict[str, Tensor] = {}
            vectors = chunk.factors.backpropagate_all(chunk.vectors)
            for block, g in zip(network.blocks, vectors, strict=True):
                rows = block_gradients(chunk.factors.inputs(block), g).rows()[:, 0]
                by_name.update(block.scatter(rows.unflatten(1, block.matrix_shape)))
            self.append(flatten(by_name, network.shapes))

    # -- the inverse -----------------------------------------------------------------------------

    @exact_derivatives()
    def inverse_diagonal(self, damping: float) -> Tensor:
        r"""Diagonal of :math:`(\hat F + \delta I)^{-1}`, ``[D]``, float64, exact; 2 m^2 D operations.

        Rounding leaves it a relative error of about the spectral norm over the damping times 1e-16.
        """
        damping, (values, vectors) = _checks.positive(damping, "damping"), self._decomposition
        scales = (self.n_gradients * (values.clamp_min(0) + damping)).rsqrt()
        root = (vectors * scales).mT
        seen = torch.cat([(root @ piece).square().sum(0) for _, piece in self._pieces()])
        # No entry is less than the smallest eigenvalue of the inverse: what rounding leaves of a difference may be.
        return ((1 - seen) / damping).clamp_min(1 / (float(values[0]) + damping))

    def pruning_scores(self, damping: float) -> Tensor:
        r"""What the loss of a datum rises by if a weight is removed and all others adapt, ``[D]``, in nats.

        Of the quadratic with the damped empirical Fisher around a minimum,
        :math:`w_i^2 / (2 [(\hat F + \delta I)^{-1}]_{ii})`.
        """
        return self.network.mean().double().square() / (2 * self.inverse_diagonal(damping))

    @exact_derivatives()
    def pruned(self, removed: Tensor, damping: float) -> Tensor:
        r"""The parameters without some of them, the others where the same quadratic is smallest then, ``[D]``, float64.

        With Q the removed and K the others, :math:`w_K + A_{KK}^{-1} A_{KQ} w_Q` for :math:`A = \hat F + \delta I`,
        all of Q together and not one by one, from one more Gram matrix: 2 m^2 D operations.

        Args:
            removed: ``[D]``, boolean.
            damping: :math:`\delta`.
        """
        damping, weights = _checks.positive(damping, "damping"), self.network.mean().double()
        if removed.dtype != torch.bool or removed.shape != weights.shape:
            raise ValueError(
                f"Expected a boolean mask of shape {list(weights.shape)}, got {removed.dtype} of shape "
                f"{list(removed.shape)}."
            )
        keep = (~removed).to(weights)
        gram = self.n_gradients * damping * torch.eye(self.n_gradients).to(weights)
        for part, piece in self._pieces():
            gram += (piece * keep[part]) @ piece.mT
        along = self._times((weights * (1 - keep))[None]).mT
        coefficients = torch.cholesky_solve(along, torch.linalg.cholesky(gram)).mT
        moved = torch.cat([coefficients @ piece for _, piece in self._pieces()], 1)
        return (weights + moved[0]) * keep

    # -- the Gram matrix -------------------------------------------------------------------------

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns of the gradients, ``[n, d]``, float64."""
        rows = self.gradients
        for part in _data.slices(rows.shape[1], max(1, PIECE // self.window)):
            yield part, rows[:, part].double()

    def _times(self, vectors: Tensor) -> Tensor:
        """Inner products ``[k, n]`` of vectors ``[k, D]`` with the gradients, float64."""
        total = self._gram.new_zeros(len(vectors), self.n_gradients)
        for part, piece in self._pieces():
            total += vectors[:, part].double() @ piece.mT
        return total

    @property
    def _decomposition(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the Gram matrix over n."""
        if self._known is None:
            gram = self._gram[: self.n_gradients, : self.n_gradients] / self.n_gradients
            self._known = eigh(gram, "the newest gradients")
        return self._known

    @exact_derivatives()
    def _apply(self, vector: Tensor, inner: Inner) -> Tensor:
        flat = vector.to(self._rows.device).reshape(-1, vector.shape[-1])
        mixed = inner(*self._decomposition, self._times(flat)) / self.n_gradients
        return torch.cat([mixed @ piece for _, piece in self._pieces()], 1).reshape(vector.shape)
