r"""Contractions of gradients with few positions by pairs of positions, where no gradient is formed.

Of :math:`J_{voi} = \sum_s g_{vos} a_{is}` the sums of products over vectors or inputs need the products of pairs alone,

.. math::
    \sum_v J_{voi}^2 = \sum_{st} \Big(\sum_v g_{vos} g_{vot}\Big) a_{is} a_{it}, \qquad
    \sum_{oi} h_{oi} J_{voi} J_{woi} = \sum_o \sum_{st} g_{vos} \Big(\sum_i h_{oi} a_{is} a_{it}\Big) g_{wot},

which are fewer numbers than the gradients of many vectors where there are few positions: the last stages of a
convolutional network, with a thousand classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from debiased_laplace import _data

#: What writing an entry of a gradient, and reading it again, costs in multiplications.
WRITTEN = 64


class PairsOfPositions:
    """Gradients of one block by pairs of positions.

    Args:
        inputs: ``a: [N, G, i, S]``.
        vectors: ``g: [N, G, V, o, S]``.
        memory: Bytes of products at a time.
    """

    def __init__(self, inputs: Tensor, vectors: Tensor, memory: int) -> None:
        self.inputs, self.vectors = inputs, vectors
        self._memory = memory
        self._n, self._groups, self._n_vectors, self._height, self._positions = vectors.shape
        self._n_pairs = self._positions * (self._positions + 1) // 2

    def give_second_moment(self) -> bool:
        """Whether :meth:`second_moment` is cheaper than squares of formed gradients."""
        return self._n_pairs < self._n_vectors * (self._positions + WRITTEN)

    def give_covariances(self, n_scales: int, *, diagonal: bool = False) -> bool:
        """Whether :meth:`covariances`, or :meth:`variances`, of so many posteriors are cheaper."""
        n_vectors, positions, n_rows = self._n_vectors, self._positions, 1 if diagonal else self._n_vectors
        by_pairs = self._n_pairs + n_vectors * positions * (positions + n_rows) / self.inputs.shape[2]
        formed = n_vectors * (positions + WRITTEN)
        return n_scales * by_pairs < formed + n_scales * n_vectors * (WRITTEN if diagonal else n_vectors)

    def second_moment(self) -> Tensor:
        """``[G, o, i]``."""
        total = self.inputs.new_zeros(self._groups, self._height, self.inputs.shape[2])
        for part in self._parts(0):
            of_vectors = products(self.vectors[part].unbind(2), twice=True).transpose(0, 1).flatten(1, 2)
            of_inputs = products([self.inputs[part]]).transpose(0, 1).flatten(1, 2)
            total += of_vectors.mT @ of_inputs
        return total.clamp_min_(0)  # sums of squares: below zero only by rounding

    def covariances(self, scales: Tensor) -> Tensor:
        """``[R, G, o, i] -> [R, N, V, V]``."""
        covariances = scales.new_empty(len(scales), self._n, self._n_vectors, self._n_vectors)
        for part, index, weighted, vectors in self._weighted(scales):
            covariances[index, part] = weighted.movedim(3, 1).flatten(2) @ vectors.movedim(3, 1).flatten(2).mT
        return covariances

    def variances(self, scales: Tensor) -> Tensor:
        """``[R, G, o, i] -> [R, N, V]``."""
        variances = scales.new_empty(len(scales), self._n, self._n_vectors)
        for part, index, weighted, vectors in self._weighted(scales):
            variances[index, part] = weighted.mul_(vectors).sum((1, 2, 4))
        return variances

    def _weighted(self, scales: Tensor) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
        r"""Data, a posterior, and :math:`\sum_t g_t \sum_i h_i a_{is} a_{it}` beside g, ``[n, G, o, V, S]``."""
        position = torch.arange(self._positions, device=self.inputs.device)
        low, high = torch.minimum(position[:, None], position), torch.maximum(position[:, None], position)
        pair = low * self._positions - low * (low - 1) // 2 + high - low  # its place among upper triangular ones
        for part in self._parts(len(scales)):
            weights = torch.einsum("rgoi,ngpi->rngop", scales, products([self.inputs[part]]))[..., pair]
            vectors = self.vectors[part].transpose(2, 3)
            for index, of_posterior in enumerate(weights):
                yield part, index, vectors @ of_posterior, vectors

    def _parts(self, n_scales: int) -> Iterator[slice]:
        """Data at a time within the memory."""
        numbers = (self._height + self.inputs.shape[2]) * self._n_pairs
        if n_scales:
            numbers += self._height * self._positions * (n_scales * self._positions + 2 * self._n_vectors)
        per_datum = self._groups * numbers * self.inputs.element_size()
        return _data.slices(self._n, max(1, self._memory // per_datum))


def products(columns: Sequence[Tensor], *, twice: bool = False) -> Tensor:
    """Sums over columns ``[..., P, S]`` of the products of all pairs of their positions, ``[..., S * (S + 1) / 2, P]``.

    Args:
        columns: At least one.
        twice: Count those of two different positions twice, as the square of a sum does.
    """
    rows = [column.mT.contiguous() for column in columns]  # rows that are copied whole are copied ten times faster
    first, second = torch.triu_indices(rows[0].shape[-2], rows[0].shape[-2], device=rows[0].device)
    total = rows[0].index_select(-2, first) * rows[0].index_select(-2, second)
    for row in rows[1:]:
        total.addcmul_(row.index_select(-2, first), row.index_select(-2, second))
    return total * (2.0 - (first == second).to(total))[:, None] if twice else total
