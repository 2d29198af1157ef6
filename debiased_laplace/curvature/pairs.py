r"""Contractions of gradients with few positions by pairs of positions, where no gradient is formed.

Of :math:`J_{voi} = \sum_s g_{vos} a_{is}` the sums of products over vectors or inputs need the products of pairs alone,

.. math::
    \sum_v J_{voi}^2 = \sum_{st} \Big(\sum_v g_{vos} g_{vot}\Big) a_{is} a_{it}, \qquad
    \sum_{oi} h_{oi} J_{voi} J_{woi} = \sum_o \sum_{st} g_{vos} \Big(\sum_i h_{oi} a_{is} a_{it}\Big) g_{wot},

which are fewer numbers than the gradients of many vectors where there are few positions: the last stages of a
convolutional network, with a thousand classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from debiased_laplace import _data

#: What writing a number and reading it again costs, in multiplications of a product of matrices.
MOVED = 24

#: What the operations of this way cost to be called, beyond those of formed gradients, likewise.
CALLED = 4_000_000


def many_scales(n_scales: int, n_vectors: int) -> bool:
    """Whether there are more of them than pairs of vectors for each vector, so that pairs are the cheaper order."""
    return 2 * n_scales > n_vectors + 1


def one_for_all(scales: Tensor) -> Tensor | None:
    """``[R]`` if each of several ``h: [R, ...]`` is one number for all entries, as of a prior alone; else None.

    None on a card, which would have to be waited for.
    """
    rows = scales.flatten(1)
    if (
        scales.requires_grad
        or scales.device.type != "cpu"
        or len(rows) == 1
        or not rows.shape[1]
        or not bool((rows == rows[:, :1]).all())
    ):
        return None
    return rows[:, 0]


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
        self._width = inputs.shape[2]
        self._n_pairs = self._positions * (self._positions + 1) // 2

    def give_second_moment(self) -> bool:
        """Whether :meth:`second_moment` is cheaper than squares of formed gradients."""
        n_vectors, height, width = self._n_vectors, self._height, self._width
        by_pairs = self._n_pairs * (height * width + height * n_vectors + 3 * MOVED * width)
        return self._cheaper(by_pairs, n_vectors * height * width * (self._positions + MOVED))

    def give_covariances(self, n_scales: int, *, diagonal: bool = False) -> bool:
        """Whether :meth:`covariances`, or :meth:`variances`, of so many posteriors are cheaper."""
        n_vectors, height, width, positions = self._n_vectors, self._height, self._width, self._positions
        n_others = 0 if diagonal else n_vectors
        weights = height * (self._n_pairs * width + 2 * MOVED * positions**2)
        weighted = n_vectors * height * positions * (positions + n_others + 3 * MOVED)
        by_pairs = 3 * MOVED * self._n_pairs * width + n_scales * (weights + weighted)
        # Formed gradients are weighted for one posterior after the other, or their products for all of them at once.
        one_by_one, at_once = n_scales * (n_vectors + MOVED), (n_vectors + 1) / 2 * (n_scales + MOVED)
        of_posteriors = n_scales if diagonal else at_once if many_scales(n_scales, n_vectors) else one_by_one
        formed = n_vectors * height * width * (positions + MOVED + of_posteriors)
        return self._cheaper(by_pairs, formed)

    def _cheaper(self, by_pairs: float, formed: float) -> bool:
        """Of one datum and group each, in multiplications."""
        return self._n * self._groups * by_pairs + CALLED < self._n * self._groups * formed

    def second_moment(self) -> Tensor:
        """``[G, o, i]``."""
        total = self.inputs.new_zeros(self._groups, self._height, self._width)
        first, second = self._pairs()
        twice = 2.0 - (first == second).to(total)
        for part in self._parts(0):
            vectors = self.vectors[part].transpose(2, 3)
            of_vectors = (vectors.mT @ vectors).flatten(-2).index_select(-1, first * self._positions + second)
            of_vectors *= twice
            for some, products in self._products(part):
                total += torch.einsum("ngop,ngpi->goi", of_vectors[..., some], products)
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
        first, second = self._pairs()
        place = first.new_empty(self._positions, self._positions)  # of a pair among all
        place[first, second] = place[second, first] = torch.arange(self._n_pairs, device=place.device)
        for part in self._parts(len(scales)):
            vectors = self.vectors[part].transpose(2, 3)
            weights = scales.new_empty(len(scales), *vectors.shape[:2], self._n_pairs, self._height)
            for some, products in self._products(part):
                for of_posterior, scale in zip(weights, scales, strict=True):
                    of_posterior[..., some, :] = products @ scale.mT
            for index, of_posterior in enumerate(weights):
                of_all = of_posterior.index_select(-2, place.flatten())  # rows are copied whole
                yield part, index, vectors @ of_all.mT.unflatten(-1, place.shape), vectors

    def _pairs(self) -> Tensor:
        """The first and the second position of all pairs, ``[2, P]``."""
        return torch.triu_indices(self._positions, self._positions, device=self.inputs.device)

    def _products(self, part: slice) -> Iterator[tuple[slice, Tensor]]:
        """Some pairs, and the products of the inputs at their two positions, ``[n, G, p, i]``."""
        rows = self.inputs[part].mT.contiguous()  # rows that are copied whole are copied ten times faster
        first, second = self._pairs()
        per_pair = rows[..., 0, :].numel() * rows.element_size()
        for some in _data.slices(self._n_pairs, max(1, self._memory // per_pair)):
            yield some, rows.index_select(-2, first[some]).mul_(rows.index_select(-2, second[some]))

    def _parts(self, n_scales: int) -> Iterator[slice]:
        """Data at a time within the memory."""
        numbers = self._height * (n_scales * self._n_pairs + 2 * self._positions * (self._positions + self._n_vectors))
        per_datum = self._groups * numbers * self.inputs.element_size()
        return _data.slices(self._n, max(1, self._memory // per_datum))
