r"""Second moments of the inputs and of the back-propagated vectors of a layer, :math:`M = \sum_k c_k c_k^\top`.

As long as there are few columns c they are kept as they are: fewer numbers than the matrix has, and a decomposition
that is many times cheaper (:mod:`debiased_laplace.curvature.decomposition`).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from debiased_laplace._ranks import current
from debiased_laplace.curvature.decomposition import eigenvectors_of_columns, eigh

#: Least size of a matrix of which columns are kept, and share of its size up to which they are few.
MIN_FACTORED, FEW = 128, 0.5

#: Least number of positions with which every datum has a product of its own, and most coordinates of small ones.
MIN_POSITIONS, MAX_SMALL = 32, 32

#: Most coordinates of matrices that are decomposed several at a time.
MAX_BATCHED = 512


@dataclass(frozen=True, eq=False)
class SecondMoment(ABC):
    """A symmetric positive semi-definite matrix in every of G groups; a sum over data.

    Attributes:
        values: Its entries, in a form of its kind.
        scale: What they are multiplied by.
        known: Eigenvectors that were computed, by the settings: those of a matrix are those of its multiples.
    """

    values: Any
    scale: float = 1.0
    known: dict[Any, Tensor] = field(init=False, default_factory=dict, repr=False)

    @abstractmethod
    def __add__(self, other: SecondMoment) -> SecondMoment:
        """That of both data together."""

    def __mul__(self, factor: float) -> SecondMoment:
        """That of the same data with weights that are multiplied by a non-negative factor."""
        multiple = type(self)(self.values, self.scale * factor)
        object.__setattr__(multiple, "known", self.known)
        return multiple

    def dense(self) -> Tensor:
        """``[G, P, P]``, or ``[G, P]`` of a diagonal."""
        values: Tensor = self.values
        return values if self.scale == 1 else self.scale * values

    @abstractmethod
    def along(self, vectors: Tensor) -> Tensor:
        r"""Diagonal of :math:`Q^\top M Q`, ``[G, k]``, for ``Q: [G, P, k]``."""

    @property
    def like(self) -> Tensor:
        """A tensor of its dtype and device."""
        like: Tensor = self.values
        return like

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(G, P, P)``."""
        groups, size = self.like.shape[:2]
        return groups, size, size

    def is_finite(self) -> Tensor:
        """Whether all entries are, a Boolean ``[]``: known on the CPU only when it is asked for."""
        values: Tensor = self.values
        return values.isfinite().all()

    @abstractmethod
    def block(self, part: slice) -> SecondMoment:
        """The block on the diagonal that belongs to some of the P coordinates."""

    @abstractmethod
    def eigenvectors(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """``[G, P, P]``, by descending eigenvalues.

        Args:
            name: Of the block, for errors.
            dtype: Precision of the decomposition; None for that of the entries.
        """


class DiagonalMoment(SecondMoment):
    """The diagonal alone, ``values: [G, P]``."""

    values: Tensor

    def __add__(self, other: SecondMoment) -> DiagonalMoment:
        return DiagonalMoment(self.dense() + other.dense())

    def along(self, vectors: Tensor) -> Tensor:
        return torch.einsum("gij,gi->gj", vectors.square(), self.dense())

    def block(self, part: slice) -> DiagonalMoment:
        return DiagonalMoment(self.values[:, part], self.scale)

    def eigenvectors(self, name: str, dtype: torch.dtype | None) -> Tensor:
        raise NotImplementedError("The eigenvectors of a diagonal are unit vectors, which are never formed.")


class MatrixMoment(SecondMoment):
    """All entries, ``values: [G, P, P]``."""

    values: Tensor

    def __add__(self, other: SecondMoment) -> MatrixMoment:
        if isinstance(other, OuterProducts):
            return MatrixMoment(other.added_to(self.dense().clone()))
        return MatrixMoment(torch.add(self.dense(), other.values, alpha=other.scale))

    def along(self, vectors: Tensor) -> Tensor:
        # Of positive semi-definite matrices: below zero only by rounding.
        return self.scale * (vectors * (self.values @ vectors)).sum(1).clamp_min(0)

    def block(self, part: slice) -> MatrixMoment:
        return MatrixMoment(self.values[:, part, part], self.scale)

    def eigenvectors(self, name: str, dtype: torch.dtype | None) -> Tensor:
        return eigh(self.values.to(dtype or self.values.dtype), name)[1]


class OuterProducts(SecondMoment):
    """Few columns, ``values``: of ``[G, P, r]`` in pieces, so that sums copy nothing."""

    values: tuple[Tensor, ...]

    def __add__(self, other: SecondMoment) -> SecondMoment:
        if not isinstance(other, OuterProducts):
            return other + self
        both = OuterProducts(self.scaled() + other.scaled())
        return both if are_few(both.size, both.n_columns) else MatrixMoment(both.dense())

    def scaled(self) -> tuple[Tensor, ...]:
        """The pieces, with the scale in them."""
        return self.values if self.scale == 1 else tuple(self.scale**0.5 * piece for piece in self.values)

    @property
    def like(self) -> Tensor:
        return self.values[0]

    @property
    def size(self) -> int:
        """P."""
        return self.values[0].shape[1]

    @property
    def n_columns(self) -> int:
        """r, of all pieces together."""
        return sum(piece.shape[2] for piece in self.values)

    def joined(self) -> Tensor:
        """All columns, ``[G, P, r]``, before the scale."""
        return self.values[0] if len(self.values) == 1 else torch.cat(self.values, 2)

    def added_to(self, total: Tensor) -> Tensor:
        """The matrix, added to another one in place."""
        columns = self.joined()
        return total.baddbmm_(columns, columns.mT, alpha=self.scale)

    def dense(self) -> Tensor:
        columns = self.joined()
        matrix = columns @ columns.mT
        return matrix if self.scale == 1 else matrix.mul_(self.scale)

    def along(self, vectors: Tensor) -> Tensor:
        return self.scale * (vectors.mT @ self.joined()).square().sum(2)

    def is_finite(self) -> Tensor:
        return torch.stack([piece.isfinite().all() for piece in self.values]).all()

    def block(self, part: slice) -> SecondMoment:
        pieces = OuterProducts(tuple(piece[:, part] for piece in self.values), self.scale)
        return pieces if are_few(pieces.size, pieces.n_columns) else MatrixMoment(pieces.dense())

    def eigenvectors(self, name: str, dtype: torch.dtype | None) -> Tensor:
        columns = self.joined()
        return eigenvectors_of_columns(columns.to(dtype or columns.dtype), name)


def are_few(size: int, n_columns: int) -> bool:
    """Whether columns are kept, of so many coordinates."""
    return size >= MIN_FACTORED and n_columns <= FEW * size


def moment(values: Tensor) -> SecondMoment:
    """Of a matrix ``[G, P, P]`` or a diagonal ``[G, P]``."""
    return MatrixMoment(values) if values.ndim == 3 else DiagonalMoment(values)


def all_reduced(moments: Sequence[SecondMoment]) -> list[SecondMoment]:
    """Sums over all processes that work together: of few columns those of all of them, otherwise the matrices."""
    ranks, sums = current(), list[SecondMoment]()
    counts = [one.n_columns if isinstance(one, OuterProducts) else None for one in moments]
    for one, *of_ranks in zip(moments, *ranks.gather(counts), strict=True):
        n_columns = None if None in of_ranks else sum(count for count in of_ranks if count is not None)
        if isinstance(one, OuterProducts) and n_columns is not None and are_few(one.size, n_columns):
            pieces = ranks.gather(torch.cat(one.scaled(), 2), one.like.device)
            sums.append(OuterProducts(tuple(pieces)))
        else:
            sums.append(moment(ranks.sum(one.dense())))
    return sums


class MomentSum:
    """A second moment that grows with the data of a pass."""

    def __init__(self, groups: int, size: int, *, square: bool, like: Tensor) -> None:
        """Of no data: matrices ``[G, P, P]``, or their diagonals, in the precision and on the device of a tensor."""
        self._columns: list[Tensor] = []
        self._groups, self._size, self._like = groups, size, like
        self._total: Tensor | None = None
        if not square:
            self._total = like.new_zeros(groups, size)
        elif not are_few(size, 0):
            self._total = like.new_zeros(groups, size, size)

    def add_diagonal(self, values: Tensor, factor: float = 1.0) -> None:
        """Add to a diagonal, ``[G, P]``."""
        assert self._total is not None
        self._total.add_(values, alpha=factor)

    def keeps(self, n_columns: int) -> bool:
        """Whether so many more columns are kept as they are."""
        return self._total is None and are_few(self._size, n_columns + sum(piece.shape[2] for piece in self._columns))

    def add(self, columns: Tensor, factor: float = 1.0) -> None:
        """Add outer products of columns ``[N, G, P, S]`` of data and positions, times a factor."""
        n, _, _, positions = columns.shape
        if self.keeps(n * positions):
            flat = columns.permute(1, 2, 0, 3).flatten(2)
            self._columns.append(flat.clone() if factor == 1 else factor**0.5 * flat)
        else:
            add_outer_products(self._formed(), columns, factor)

    def add_matrix(self, values: Tensor, factor: float = 1.0) -> None:
        """Add a matrix ``[G, P, P]`` times a factor."""
        self._formed().add_(values, alpha=factor)

    def _formed(self) -> Tensor:
        if self._total is None:
            self._total, self._columns = self._kept().dense(), []
        return self._total

    def _kept(self) -> OuterProducts:
        return OuterProducts(tuple(self._columns) or (self._like.new_zeros(self._groups, self._size, 0),))

    def moment(self) -> SecondMoment:
        """The sum."""
        return self._kept() if self._total is None else moment(self._total)


def add_outer_products(total: Tensor, columns: Tensor, factor: float = 1.0) -> None:
    """Add to ``[G, P, P]`` the outer products of columns ``[N, G, P, S]``, summed over data and positions, in place.

    With many positions a product for each datum saves a copy of the columns: small ones all at a time, large ones one
    after the other, which only a processor does as fast as one product of all.
    """
    _, groups, size, positions = columns.shape
    if positions >= MIN_POSITIONS and size <= MAX_SMALL:
        total.add_((columns @ columns.mT).sum(0), alpha=factor)
    elif positions >= MIN_POSITIONS and groups == 1 and columns.device.type == "cpu":
        total[0].addbmm_(columns[:, 0], columns[:, 0].mT, alpha=factor)
    else:
        flat = columns.permute(1, 2, 0, 3).flatten(2)
        total.baddbmm_(flat, flat.mT, alpha=factor)


def eigenvectors(
    moments: Sequence[SecondMoment], names: Sequence[str], dtype: torch.dtype | None, max_size: int | None
) -> list[Tensor]:
    """Eigenvectors of every moment, ``[G, P, P]``, each computed once, by descending eigenvalues.

    Small ones of one shape are decomposed in one call. Of one that is larger than asked for, blocks on the diagonal
    are, and the order of eigenvalues is that within a block.

    Args:
        moments: Matrices, or their columns.
        names: Of the blocks, for errors.
        dtype: Precision of the decompositions; None for that of the moments.
        max_size: Coordinates above which blocks are decomposed; None for no limit.
    """
    key = dtype, max_size
    jobs: list[list[int]] = []
    batches: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    distinct = {id(one.known): index for index, one in enumerate(moments) if key not in one.known}
    for index in distinct.values():
        one = moments[index]
        if _is_small(one, max_size):
            of_shape = one.shape[-1], one.like.dtype, one.like.device
            if of_shape not in batches:
                jobs.append(batches.setdefault(of_shape, []))
            batches[of_shape].append(index)
        else:
            jobs.append([index])
    ranks = current()
    owners = ranks.owners([sum(_cost(moments[index], max_size) for index in job) for job in jobs])
    for job, owner in zip(jobs, owners, strict=True):
        if owner == ranks.rank:
            of_job = [moments[index] for index in job]
            vectors = _decomposed(of_job, [names[index] for index in job], dtype, max_size)
            for one, of_one in zip(of_job, vectors, strict=True):
                one.known[key] = of_one
    for job, owner in zip(jobs, owners, strict=True) if ranks.size > 1 else ():
        for one in (moments[index] for index in job):
            mine = one.known[key] if owner == ranks.rank else one.like.new_empty(one.shape)
            one.known[key] = ranks.broadcast(mine, owner)
    return [one.known[key] for one in moments]


def _is_small(one: SecondMoment, max_size: int | None) -> bool:
    """Whether it is decomposed together with others of its shape."""
    return isinstance(one, MatrixMoment) and one.shape[-1] <= min(MAX_BATCHED, max_size or MAX_BATCHED)


def _cost(one: SecondMoment, max_size: int | None) -> float:
    """Of its decomposition, up to a factor: the cube of its size, or of its number of columns."""
    groups, size, _ = one.shape
    if isinstance(one, OuterProducts):
        return groups * float(min(size, one.n_columns)) ** 2 * size
    n_blocks = -(-size // (max_size or size))
    return groups * n_blocks * float(size / n_blocks) ** 3


def _decomposed(
    moments: Sequence[SecondMoment], names: Sequence[str], dtype: torch.dtype | None, max_size: int | None
) -> list[Tensor]:
    """Eigenvectors of small matrices of one shape, in one call; or of a single moment."""
    if not _is_small(moments[0], max_size):
        return [_of_blocks(one, name, dtype, max_size) for one, name in zip(moments, names, strict=True)]
    matrices = [one.values for one in moments]
    together = MatrixMoment(torch.cat(matrices))
    every = together.eigenvectors(", ".join(dict.fromkeys(names)), dtype)
    return list(_cleaned(every, together.values.dtype).split([len(matrix) for matrix in matrices]))


def _of_blocks(one: SecondMoment, name: str, dtype: torch.dtype | None, max_size: int | None) -> Tensor:
    values, (groups, size, _) = one.like, one.shape
    n_blocks = -(-size // (max_size or size))
    if n_blocks == 1:
        return _cleaned(one.eigenvectors(name, dtype), values.dtype)
    vectors = values.new_zeros(groups, size, size)
    bounds = [size * number // n_blocks for number in range(n_blocks + 1)]
    for start, stop in itertools.pairwise(bounds):
        part = slice(start, stop)
        vectors[:, part, part] = _cleaned(one.block(part).eigenvectors(name, dtype), values.dtype)
    return vectors


def _cleaned(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    # Dead units leave entries that are noise of the decomposition. Dropping them moves a vector by less than
    # a tenth of its rounding error; kept, their products underflow and slow every contraction tenfold.
    negligible = 0.1 * torch.finfo(dtype).eps / vectors.shape[-1] ** 0.5
    # As they lie in memory when they come from a file: products then have the same bits.
    return vectors.masked_fill_(vectors.abs() < negligible, 0.0).to(dtype).contiguous()
