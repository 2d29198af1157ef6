r"""Gradients of which a datum has few columns: those of the tokens that are in it.

With inputs that are multiples of unit vectors, ``J = sum_s g_s a_s^T`` has a column for every distinct token of the
datum, T of them, and zeros for the rest of the vocabulary. T is at most S, so that J without its zeros is never
larger than the back-propagated vectors: it is formed at once, and never ``[O, I]`` or one-hot inputs ``[I, S]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.curvature import contractions
from debiased_laplace.network.selected import SelectedInputs

#: A token is frequent if more than one datum in so many has it.
FREQUENT = 8


@dataclass(frozen=True)
class IndexedGradients:
    """Gradients ``J: [N, V, 1, o, i]`` of one block by their columns that are not zero.

    Attributes:
        values: Those columns, ``[N, V, o, T]``; zeros where a datum has fewer.
        index: Which of the i columns they are, ``[N, T]``.
        n_inputs: i.
    """

    values: Tensor
    index: Tensor
    n_inputs: int

    @classmethod
    def of(cls, inputs: SelectedInputs, vectors: Tensor) -> IndexedGradients:
        """From inputs ``[N, 1, I, S]`` and vectors ``[N, 1, V, O, S]``, or ``[1, 1, V, O, 1]`` for all data."""
        index, columns = inputs.distinct()
        of_data = vectors[:, 0].expand(len(index), -1, -1, columns.shape[2])
        values = of_data.flatten(1, 2) @ columns.mT.to(vectors)  # [N, V * O, T]
        return cls(values.unflatten(1, vectors.shape[2:4]), index, inputs.size)

    def __len__(self) -> int:
        """Number of data."""
        return len(self.values)

    @property
    def n_vectors(self) -> int:
        """V."""
        return self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Precision."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.values.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(1, o, i)``."""
        return 1, self.values.shape[2], self.n_inputs

    def compact(self) -> IndexedGradients:
        """The same gradients: nothing takes less memory."""
        return self

    def in_precision(self, dtype: torch.dtype) -> IndexedGradients:
        """The same gradients in another precision."""
        return replace(self, values=self.values.to(dtype))

    def scaled(self, factor: float) -> IndexedGradients:
        """The same gradients times a number."""
        return replace(self, values=factor * self.values)

    def masked(self, mask: Tensor) -> IndexedGradients:
        """The same gradients with zeros where the mask ``[1, o, i]`` is false."""
        of_data = self._columns_of_data(mask, slice(0, len(self)))[0]  # [N, o, T]
        return replace(self, values=self.values * of_data[:, None])

    # -- sums of squares along the entries ------------------------------------------------------

    def second_moment(self) -> Tensor:
        r"""Equation (2): :math:`\sum_n \sum_v J_{vn}^2`, as ``[1, o, i]``; the weights are in the vectors."""
        squares = self.values.square().sum(1)  # [N, o, T]
        total = squares.new_zeros(squares.shape[1], self.n_inputs)
        return total.index_add_(1, self.index.flatten(), squares.transpose(0, 1).flatten(1))[None]

    def covariances(self, scales: Tensor) -> Tensor:
        r"""Equation (4), :math:`J\, \mathrm{diag}(h) J^\top` for a grid ``h: [R, 1, o, i]``, as ``[R, N, V, V]``."""
        covariances = self.values.new_empty(len(scales), len(self), self.n_vectors, self.n_vectors)
        for part in self._slices(len(scales)):
            rows = self.values[part].flatten(2)
            for covariance, weights in zip(covariances, self._columns_of_data(scales, part), strict=True):
                covariance[part] = (rows * weights.flatten(1)[:, None]) @ rows.mT
        return covariances

    def variances(self, scales: Tensor) -> Tensor:
        """Their diagonals, ``[R, N, V]``."""
        variances = self.values.new_empty(len(scales), len(self), self.n_vectors)
        for part in self._slices(len(scales)):
            squares, weights = self.values[part].square().flatten(2), self._columns_of_data(scales, part).flatten(2)
            variances[:, part] = torch.einsum("nvk,rnk->rnv", squares, weights)
        return variances

    # -- products of gradients ------------------------------------------------------------------

    def rows(self) -> Tensor:
        """The gradients with all their zeros, ``[N, V, o * i]``."""
        rows = self.values.new_zeros(*self.values.shape[:3], self.n_inputs)
        return rows.scatter_add_(3, self.index[:, None, None].expand_as(self.values), self.values).flatten(2)

    def project(self, columns: Tensor) -> Tensor:
        """Inner products with matrices ``[k, 1, o, i]`` (of any shape with as many entries), as ``[N, V, k]``."""
        result = self.values.new_empty(len(self), self.n_vectors, len(columns))
        for part in self._slices(len(columns)):
            of_data = self._columns_of_data(columns, part).flatten(2)  # [k, n, o * T]
            result[part] = self.values[part].flatten(2) @ of_data.permute(1, 2, 0)
        return result

    def combine(self, coefficients: Tensor) -> Tensor:
        """Linear combinations of the gradients, ``[k, N, V] -> [k, 1, o, i]``."""
        k, (_, height, width) = len(coefficients), self.shape
        result = self.values.new_zeros(k, height, width)
        for part in self._slices(k):
            values = self.values[part]
            mixed = coefficients[:, part].transpose(0, 1) @ values.flatten(2)  # [n, k, o * T]
            mixed = mixed.unflatten(2, values.shape[2:]).permute(1, 2, 0, 3).flatten(2)
            result.index_add_(2, self.index[part].flatten(), mixed)
        return result[:, None]

    @staticmethod
    def gram(parts: Sequence[IndexedGradients]) -> Tensor:
        """Inner products of all gradients with all others, ``[N * V, N * V]``, data of all parts one after the other.

        Only data that share a token have one. Of a token that few data have, their products are added in their places;
        those that many have are columns of a product of matrices.
        """
        columns, data, tokens = _occurrences(parts)  # [E, V, o], [E], [E]
        n_data, (_, n_vectors, height) = sum(len(part) for part in parts), columns.shape
        total = columns.new_zeros(n_data * n_vectors, n_data * n_vectors)
        vectors = torch.arange(n_vectors, device=data.device)
        _, counts = tokens.unique_consecutive(return_counts=True)
        counts = counts.cpu()  # what is to be decided by them is decided there, without waiting for the device
        starts = counts.cumsum(0) - counts
        memory = contractions.projection_memory(columns.device) // columns.element_size()
        for count in counts.unique().tolist():
            every = starts[counts == count][:, None] + torch.arange(count)  # [tokens, count]
            every = every.to(data.device)
            is_frequent = count * FREQUENT >= n_data
            per_token = len(total) * height if is_frequent else count * n_vectors * max(height, count * n_vectors)
            for some in _data.slices(len(every), max(1, memory // per_token)):
                occurrences = every[some]
                rows = data[occurrences]
                if is_frequent:
                    formed = columns.new_zeros(n_data, len(rows), n_vectors, height)
                    formed[rows, torch.arange(len(rows), device=data.device)[:, None]] = columns[occurrences]
                    joined = formed.transpose(1, 2).reshape(len(total), -1)
                    total.addmm_(joined, joined.mT)
                else:
                    of_token = columns[occurrences].flatten(1, 2)  # [tokens, count * V, o]
                    places = (rows[..., None] * n_vectors + vectors).flatten(1)
                    where = places[:, :, None], places[:, None, :]
                    total.index_put_(where, of_token @ of_token.mT, accumulate=True)
        return total

    # -- how ---------------------------------------------------------------------------------------

    def _columns_of_data(self, matrices: Tensor, part: slice) -> Tensor:
        """Of matrices ``[k, 1, o, i]`` the columns that each of some data has, ``[k, n, o, T]``."""
        matrices = matrices.to(self.values.dtype).reshape(-1, *self.shape[1:])
        index = self.index[part]
        chosen = matrices.index_select(2, index.flatten())  # [k, o, n * T]
        return chosen.unflatten(2, index.shape).transpose(1, 2)

    def _slices(self, k: int) -> Iterator[slice]:
        """Data at a time such that k matrices for each of them are within the memory."""
        per_datum = max(1, k * self.values.shape[2] * self.values.shape[3] * self.values.element_size())
        return iter(_data.slices(len(self), max(1, contractions.projection_memory(self.device) // per_datum)))


def _occurrences(parts: Sequence[IndexedGradients]) -> tuple[Tensor, Tensor, Tensor]:
    """Every column ``[E, V, o]`` that is not zero, with its datum and its token ``[E]``, token after token."""
    columns, data, tokens, start = [], [], [], 0
    for part in parts:
        by_column = part.values.permute(0, 3, 1, 2)
        of_datum, place = by_column.flatten(2).any(2).nonzero().unbind(1)  # [N, T]
        columns.append(by_column[of_datum, place])
        data.append(of_datum + start)
        tokens.append(part.index[of_datum, place])
        start += len(part)
    token, order = torch.cat(tokens).sort(stable=True)
    return torch.cat(columns)[order], torch.cat(data)[order], token
