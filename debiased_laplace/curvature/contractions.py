r"""Gradients as products ``J = sum_s g_s a_s^T``, contracted without being formed where that is cheaper.

A gradient of one block is a matrix ``[O, I]`` for every datum, vector and group. With one position it is an
outer product and never formed. With more positions there are two orders for most contractions, and
the cheaper one is taken; what has to be formed is formed in pieces that fit :data:`PROJECTION_MEMORY`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.curvature.pairs import PairsOfPositions, many_scales, one_for_all

#: Bytes of formed gradients at a time: what a core's own cache holds, and more on an accelerator. Products of matrices
#: that leave it take half as long again, if their rows begin anywhere in memory.
PROJECTION_MEMORY = {"cpu": 2**21, "accelerator": 2**28}

#: Most positions of all data that are rotated in a single product of matrices.
MAX_JOINED = 32


@dataclass(frozen=True)
class FactoredGradients:
    r"""Gradients ``J: [N, V, G, o, i]`` of one block, possibly rotated, :math:`Q_O^\top (\sum_s g_s a_s^\top) Q_I`.

    Attributes:
        inputs: ``a: [N, G, i, S]``.
        vectors: ``g: [N, G, V, o, S]``, or ``[1, G, V, o, 1]`` if they are the same for all data.
        rotation: ``Q_O`` and ``Q_I`` to apply after the contraction over positions; None if there are none,
            or if they were applied before.
    """

    inputs: Tensor
    vectors: Tensor
    rotation: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, o, i)``."""
        if self.rotation is not None:
            outputs, inputs = self.rotation
            return outputs.shape[0], outputs.shape[2], inputs.shape[2]
        return self.inputs.shape[1], self.vectors.shape[3], self.inputs.shape[2]

    def __len__(self) -> int:
        """Number of data."""
        return len(self.inputs)

    @property
    def n_vectors(self) -> int:
        """V."""
        return self.vectors.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Precision."""
        return self.inputs.dtype

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.inputs.device

    @property
    def _factored(self) -> bool:
        return self.inputs.shape[-1] == 1

    def compact(self) -> FactoredGradients:
        """The same gradients, formed if that takes less memory than their factors (then with one input, ``a = 1``)."""
        _, _, n_vectors, height, positions = self.vectors.shape
        width = self.inputs.shape[2]
        if positions * (n_vectors * height + width) <= n_vectors * height * width:
            return self
        return self.formed()

    def formed(self, dtype: torch.dtype | None = None) -> FactoredGradients:
        """The same gradients as vectors: one input ``a = 1``, ``[N, 1, V, G * o * i, 1]``; formed, then converted."""
        rows = self.rows().to(dtype or self.inputs.dtype)[:, None, :, :, None]
        return FactoredGradients(rows.new_ones(len(rows), 1, 1, 1), rows)

    def in_precision(self, dtype: torch.dtype) -> FactoredGradients:
        """The same gradients in another precision; those with several positions are formed first."""
        if self.inputs.shape[-1] > 1:
            return self.formed(dtype)
        return FactoredGradients(self.inputs.to(dtype), self.vectors.to(dtype))

    def scaled(self, factor: float) -> FactoredGradients:
        """The same gradients times a number."""
        return replace(self, vectors=factor * self.vectors)

    def masked(self, mask: Tensor) -> FactoredGradients:
        """The same gradients with zeros where the mask ``[G, o, i]`` is false; formed."""
        formed = self.formed()
        return FactoredGradients(formed.inputs, formed.vectors * mask.flatten()[:, None])

    # -- sums of squares along the entries ------------------------------------------------------

    def second_moment(self) -> Tensor:
        r"""Equation (2): :math:`\sum_n \sum_v J_{vn}^2`, as ``[G, o, i]``; the weights are in the vectors."""
        if self._factored:
            vectors, inputs = self.vectors[..., 0].square().sum(2), self.inputs[..., 0].square()
            return torch.einsum("ngo,ngi->goi", vectors, inputs)
        if self._pairs is not None and self._pairs.give_second_moment():
            return self._pairs.second_moment()
        total = self.inputs.new_zeros(self.shape)
        for _, some, formed in self._pieces():
            total[:, some] += formed.square_().sum((0, 2))
        return total

    def covariances(self, scales: Tensor) -> Tensor:
        r"""Equation (4) for one block and a grid of posteriors, :math:`J\, \mathrm{diag}(h) J^\top`, ``[R, N, V, V]``.

        Args:
            scales: ``h: [R, G, o, i]``, non-negative.
        """
        scales = scales.to(self.inputs.dtype).reshape(len(scales), *self.shape)
        if (same := one_for_all(scales)) is not None:
            return same[:, None, None, None] * self.covariances(torch.ones_like(scales[:1]))
        n, n_vectors = len(self.inputs), self.vectors.shape[2]
        if self._factored:
            weights = torch.einsum("ngi,rgoi->rngo", self.inputs[..., 0].square(), scales)
            vectors = self.vectors[..., 0].transpose(1, 2)  # [N or 1, V, G, o]
            return (vectors * weights[:, :, None]).flatten(3) @ vectors.flatten(2).mT
        if self._pairs is not None and self._pairs.give_covariances(len(scales)):
            return self._pairs.covariances(scales)
        if many_scales(len(scales), n_vectors):
            return self._covariances_of_pairs(scales)
        covariances = scales.new_zeros(len(scales), n, n_vectors, n_vectors)
        roots = scales.sqrt()[:, :, None]
        for part, some, formed in self._pieces():
            for covariance, root in zip(covariances, roots, strict=True):
                of_outputs = root[:, :, some]
                weighted = formed * of_outputs if len(roots) > 1 else formed.mul_(of_outputs)
                weighted = weighted.transpose(1, 2).flatten(2)  # [n, V, G * o * i]
                covariance[part].baddbmm_(weighted, weighted.mT)
        return covariances

    def _covariances_of_pairs(self, scales: Tensor) -> Tensor:
        covariances = scales.new_zeros(len(scales), len(self.inputs), *2 * (self.vectors.shape[2],))
        for part, some, formed in self._pieces():
            covariances[:, part] += covariances_of_rows(
                formed.transpose(1, 2).flatten(2), scales[:, :, some].flatten(1)
            )
        return covariances

    def variances(self, scales: Tensor) -> Tensor:
        r"""Diagonals of equation (4) for a grid of posteriors, ``[R, N, V]``.

        Args:
            scales: ``[R, G, o, i]``.
        """
        scales = scales.to(self.inputs.dtype).reshape(len(scales), *self.shape)
        if (same := one_for_all(scales)) is not None:
            return same[:, None, None] * self.variances(torch.ones_like(scales[:1]))
        if self._factored:
            weights = torch.einsum("ngi,rgoi->rngo", self.inputs[..., 0].square(), scales).flatten(2)
            squares = self.vectors[..., 0].square().transpose(1, 2).flatten(2)  # [N or 1, V, G * o]
            return weights @ squares[0].mT if len(squares) == 1 else (squares @ weights[..., None])[..., 0]
        if self._pairs is not None and self._pairs.give_covariances(len(scales), diagonal=True):
            return self._pairs.variances(scales)
        variances = scales.new_zeros(len(scales), len(self.inputs), self.vectors.shape[2])
        for part, some, formed in self._pieces():
            squares, weights = formed.square_().flatten(3), scales[:, :, some].flatten(2)
            variances[:, part] += torch.einsum("ngvk,rgk->rnv", squares, weights)
        return variances

    # -- products of gradients ------------------------------------------------------------------

    def rows(self) -> Tensor:
        """The gradients themselves, ``[N, V, G * o * i]``."""
        if self._factored:
            return torch.einsum("ngvo,ngi->nvgoi", self.vectors[..., 0], self.inputs[..., 0]).flatten(2)
        n, _, n_vectors, *_ = self.vectors.shape
        rows = self.inputs.new_empty(n, n_vectors, *self.shape)
        for part, some, formed in self._pieces():
            rows[part, :, :, some] = formed.transpose(1, 2)
        return rows.flatten(2)

    def project(self, columns: Tensor) -> Tensor:
        """Inner products with matrices ``[k, G, o, i]`` (of any shape with as many entries), as ``[N, V, k]``."""
        columns = columns.reshape(len(columns), *self.shape)
        n, k, n_vectors = len(self.inputs), len(columns), self.vectors.shape[2]
        result = self.inputs.new_zeros(n, n_vectors, k)
        if k == 0:
            return result
        if not self._inputs_first(k):
            for part, some, formed in self._pieces():
                result[part] += formed.transpose(1, 2).flatten(2) @ columns[:, :, some].flatten(1).mT
            return result
        stacked = columns.transpose(0, 1).flatten(1, 2)  # [G, k * o, i]
        for part in self._slices(k):
            inputs, vectors = self.inputs[part], self._vectors(part)
            if self._factored:
                along = torch.einsum("gki,ngi->ngk", stacked, inputs[..., 0])
            else:
                along = stacked @ inputs
            along = along.unflatten(2, (k, -1)).flatten(3)  # [n, G, k, o * S]
            result[part] = (vectors.flatten(3) @ along.mT).sum(1)
        return result

    def combine(self, coefficients: Tensor) -> Tensor:
        """Linear combinations of the gradients, ``[k, N, V] -> [k, G, o, i]``."""
        k = len(coefficients)
        result = self.inputs.new_zeros(k, *self.shape)
        if not self._inputs_first(k):
            for part, some, formed in self._pieces():
                rows = formed.transpose(1, 2).flatten(0, 1)  # [n * V, G, o, i]
                flat = coefficients[:, part].flatten(1) @ rows.flatten(1)
                result[:, :, some] += flat.unflatten(1, rows.shape[1:])
            return result
        for part in self._slices(k):
            inputs, vectors = self.inputs[part], self._vectors(part)
            mixed = coefficients[:, part].transpose(0, 1)[:, None] @ vectors.flatten(3)  # [n, G, k, o * S]
            mixed = mixed.unflatten(-1, vectors.shape[3:]).flatten(2, 3)  # [n, G, k * o, S]
            total = mixed.permute(1, 2, 0, 3).flatten(2) @ inputs.permute(1, 2, 0, 3).flatten(2).mT
            result += total.unflatten(1, (k, -1)).transpose(0, 1)
        return result

    @staticmethod
    def gram(parts: Sequence[FactoredGradients]) -> Tensor:
        """Inner products of all gradients with all others, ``[N * V, N * V]``, data of all parts one after the other.

        With one position, the elementwise product of two small Gram matrices; otherwise gradients are formed for
        a few outputs at a time.
        """
        if len({part.shape for part in parts}) > 1:  # of data with more positions some were worth forming
            parts = [part.formed() for part in parts]
        first = parts[0]
        if all(part._factored for part in parts):
            inputs = torch.cat([part.inputs[..., 0] for part in parts]).transpose(0, 1)  # [G, N, i]
            vectors = torch.cat([part._all_vectors() for part in parts]).transpose(0, 1)[..., 0]  # [G, N, V, o]
            n_vectors = vectors.shape[2]
            vectors = vectors.flatten(1, 2)
            total = vectors.new_zeros(vectors.shape[1], vectors.shape[1])
            for a, g in zip(inputs, vectors, strict=True):
                n = len(a)
                total.view(n, n_vectors, n, n_vectors).add_(
                    (g @ g.mT).view(n, n_vectors, n, n_vectors) * (a @ a.mT)[:, None, :, None]
                )
            return total
        n = sum(len(part.inputs) for part in parts)
        _, groups, n_vectors, height, _ = first.vectors.shape
        total = first.inputs.new_zeros(n * n_vectors, n * n_vectors)
        each = n * n_vectors * groups * first.inputs.shape[2] * first.inputs.element_size()
        for some in _data.slices(height, max(1, first._memory // each)):
            rows = torch.cat([part.vectors[:, :, :, some].flatten(2, 3) @ part.inputs.mT for part in parts])
            rows = rows.unflatten(2, (n_vectors, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
            total.addmm_(rows, rows.mT)
        return total

    # -- how ---------------------------------------------------------------------------------------

    def _inputs_first(self, k: int) -> bool:
        """Whether contracting k matrices with the factors is cheaper than forming the gradients."""
        if self.rotation is not None:
            return False
        n_vectors, positions, width = self.vectors.shape[2], self.inputs.shape[-1], self.inputs.shape[2]
        return self._factored or k * positions * (n_vectors + width) < n_vectors * width * (positions + k)

    @cached_property
    def _pairs(self) -> PairsOfPositions | None:
        """By pairs of positions, unless they are to be rotated afterwards, or vectors are those of all data."""
        if self.rotation is not None or len(self.vectors) < len(self.inputs):
            return None
        return PairsOfPositions(self.inputs, self.vectors, self._memory)

    @property
    def _memory(self) -> int:
        return projection_memory(self.device)

    def _slices(self, k: int) -> Iterator[slice]:
        """Data at a time for ``[n, G, k, o, S]`` within the memory."""
        _, groups, _, height, positions = self.vectors.shape
        per_datum = groups * k * height * positions * self.inputs.element_size()
        return _data.slices(len(self.inputs), max(1, self._memory // per_datum))

    def _vectors(self, part: slice) -> Tensor:
        return self.vectors if len(self.vectors) == 1 else self.vectors[part]

    def _all_vectors(self) -> Tensor:
        return self.vectors.expand(len(self.inputs), *self.vectors.shape[1:])

    def _pieces(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Slices of data and of outputs, and their ``J: [n, G, V, o, i]``; the caller may overwrite it."""
        n, groups, n_vectors, height, _ = self.vectors.shape
        width = self.inputs.shape[2]
        rows = self._memory // (groups * n_vectors * width * self.inputs.element_size())
        data = _data.slices(n, max(1, rows // height))
        if self.rotation is not None:  # every output is needed to rotate them
            by_outputs, by_inputs = self.rotation
            for part in data:
                formed = self.vectors[part].flatten(2, 3) @ self.inputs[part].mT @ by_inputs
                formed = by_outputs.mT[:, None] @ formed.unflatten(2, (n_vectors, height))
                yield part, slice(0, formed.shape[3]), formed
            return
        buffer = self.inputs.new_empty(0)  # one for all pieces: fresh memory costs more than the product
        for part in data:
            inputs = self.inputs[part].mT
            for some in _data.slices(height, max(1, min(height, rows))):
                vectors = self.vectors[part, :, :, some]
                shape = (*vectors.shape[:4], width)
                buffer = buffer.resize_(math.prod(shape))
                torch.matmul(vectors.flatten(2, 3), inputs, out=buffer.view(*shape[:2], -1, width))
                yield part, some, buffer.view(shape)


def projection_memory(device: torch.device) -> int:
    """Bytes of formed gradients at a time on a device."""
    return PROJECTION_MEMORY["cpu" if device.type == "cpu" else "accelerator"]


def covariances_of_rows(rows: Tensor, scales: Tensor) -> Tensor:
    """``Z diag(h) Z^T`` for ``Z: [N, V, k]`` and many ``h: [R, k]``, as ``[R, N, V, V]``.

    Products of all pairs of rows are formed once, for some data at a time (V / 2 times as large as their rows), and
    summed with all scales in one product of matrices.
    """
    n, n_vectors, _ = rows.shape
    first, second = torch.triu_indices(n_vectors, n_vectors, device=rows.device)
    upper = torch.cat(
        [(some[:, first] * some[:, second]) @ scales.mT for some in rows.split(max(1, n // n_vectors))]
    ).permute(2, 0, 1)
    covariances = rows.new_empty(len(scales), n, n_vectors, n_vectors)
    covariances[:, :, first, second] = covariances[:, :, second, first] = upper
    return covariances


def rotate(rotation: Tensor, columns: Tensor) -> Tensor:
    """``Q^T c`` for ``Q: [G, P, p]`` and ``c: [N, G, V, P, S]``, as ``[N, G, V, p, S]``."""
    if columns.shape[-1] > MAX_JOINED:
        return rotation.mT[:, None] @ columns
    # Few positions: a single product of matrices instead of one with few columns for every datum.
    rows = columns.permute(1, 0, 2, 4, 3)  # [G, N, V, S, P]
    return (rows.flatten(1, 3) @ rotation).unflatten(1, rows.shape[1:4]).permute(1, 0, 2, 4, 3)
