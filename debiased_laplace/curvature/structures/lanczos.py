r"""The largest eigenvalues of a symmetric matrix that is known by its products, with all their copies.

Block Lanczos' method with full orthogonalisation and thick restarts: b random vectors, their products with the matrix
A, the products of those, and so on, made orthonormal, are the rows of a basis V, and the eigenpairs of
:math:`T = V A V^\top` (Ritz pairs) approach the outermost of A. However often an eigenvalue is repeated, b vectors
meet it b times at most. Therefore:

* The first start has two vectors: an eigenvalue that they meet once is single.
* One that they meet b times may have more copies, and a tight cluster keeps them waiting. Then a second start follows,
  with four times as many fresh vectors, and so on up to more than the eigenvalues wanted, which meet all of these.

Source: Golub, Underwood, "The block Lanczos method for computing eigenvalues" (Mathematical Software III, 1977); Wu,
Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems" (SIAM J. Matrix Anal. Appl. 22, 2000).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from debiased_laplace._checks import ConvergenceError
from debiased_laplace.curvature.decomposition import eigh

#: Vectors of the first start, and how many more than the wanted eigenvalues the last one has.
FIRST, BEYOND = 2, 4

#: Size up to which the matrix is formed at once, and up to which it is formed if its products were not enough.
DENSE_SIZE, FALLBACK_SIZE = 100, 5000

#: Restarts after which the last start gives up.
RESTARTS = 300

Products = Callable[[Tensor], Tensor]


def largest_eigenpairs(
    matrix: Tensor | Products, size: int, k: int, *, precision: float, name: str, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    r"""The k largest eigenvalues of a symmetric matrix, each as often as it is repeated, and their eigenvectors.

    Residuals :math:`\|A u - \lambda u\|` end below :math:`\tau \max |\lambda|`, with :math:`\tau` four times the
    precision of the products and at least 2e-13, apart from the rounding of these. Eigenvalues that differ by less are
    one to this precision, and any orthonormal vectors of their common eigenspace are eigenvectors. Where the last
    eigenvalue is in a wider cluster that cannot be told apart, residuals end below :math:`\tau^{2/3} \max |\lambda|`.

    Cost: for single eigenvalues that of Lanczos' method, with products of two vectors at a time; some times that where
    they have copies. Memory: ``2 k + 4`` vectors (twice as many with copies), at least 20. Small matrices are formed.
    The result depends on the arguments alone, and global random states stay.

    Args:
        matrix: ``[size, size]``, float64, or the function that multiplies it with rows, ``[b, size] -> [b, size]``.
        size: Number of rows.
        k: How many, from 1 to the size; largest in value, not in magnitude.
        precision: Relative precision of the products (``torch.finfo(dtype).eps`` of what they are computed in).
        name: What the matrix belongs to, for errors.
        device: Where the vectors are.

    Returns:
        Eigenvalues ``[k]``, descending, and orthonormal eigenvectors as rows ``[k, size]``, both float64.

    Raises:
        ConvergenceError: If the products were not enough, and the matrix is too large to be formed.
    """
    widest, formed = k + BEYOND, isinstance(matrix, Tensor)
    device = matrix.device if isinstance(matrix, Tensor) else device
    products: Products = (lambda rows: rows @ matrix) if isinstance(matrix, Tensor) else matrix
    can_form = formed or size <= FALLBACK_SIZE
    spent, generator = 0, torch.Generator().manual_seed(0)
    if size > max(DENSE_SIZE, _basis_size(k, widest) + widest):
        block = min(FIRST, widest)
        while True:
            limit = 10 * (k + 10) if block < widest else RESTARTS * _basis_size(k, block)
            lanczos = _BlockLanczos(products, size, k, block, max(4 * precision, 2e-13), generator, device)
            if lanczos.run(min(limit, size - spent) if can_form else limit, last=block == widest):
                return lanczos.values[:k], lanczos.combined(k)
            spent += lanczos.n_products
            if block == widest or (can_form and spent >= size):
                break
            del lanczos  # its basis, before that of the next
            block = min(4 * block, widest)
        if not can_form:
            raise ConvergenceError(
                f"Expected residuals of the {k} largest eigenvalues of {name} below {lanczos.tolerance:.0e} of the "
                f"largest in magnitude, got {lanczos.worst:.0e} after {spent} products: too many eigenvalues are close "
                f"to {float(lanczos.values[k - 1]):.3g}. Ask for fewer or more, so that the last has a gap below it."
            )
    dense = matrix if isinstance(matrix, Tensor) else matrix(torch.eye(size, dtype=torch.float64, device=device))
    values, vectors = eigh(dense, name)
    return values[:k], vectors[:, :k].mT.contiguous()


def _basis_size(k: int, block: int) -> int:
    return max(20, 2 * (k + block))


class _BlockLanczos:
    """One start.

    Attributes:
        values: Ritz values ``[m]``, descending.
        tolerance: Of residuals, relative to the largest eigenvalue in magnitude.
        worst: The largest such residual of the wanted pairs.
        n_products: Vectors multiplied so far.
    """

    values: Tensor
    worst: float

    def __init__(
        self,
        products: Products,
        size: int,
        k: int,
        block: int,
        tolerance: float,
        generator: torch.Generator,
        device: torch.device | None,
    ) -> None:
        self.products, self.size, self.k, self.block = products, size, k, block
        self.tolerance, self.generator, self.n_products = tolerance, generator, 0
        self.m = 0  # rows of the basis that are in use
        self.basis = torch.empty(_basis_size(k, block), size, dtype=torch.float64, device=device)
        self.projected = self.basis.new_zeros(len(self.basis), len(self.basis))  # T

    def run(self, limit: int, *, last: bool) -> bool:
        """Whether the eigenpairs were found within a number of products, all their copies included."""
        at_restarts: list[float] = []
        block, _, _ = self._orthonormal(self._random(self.block), 0.0)
        while self.n_products < limit:
            if self.m + self.block > len(self.basis):
                at_restarts.append(self.worst)
                stalls = len(at_restarts) > 3 and self.worst > at_restarts[-4] / 2
                if stalls and self.worst <= self.tolerance ** (2 / 3):
                    return last
                self._restart()
            block, coupling = self._expand(block)
            self.values, self._vectors = eigh(self.projected[: self.m, : self.m], "the projected matrix")
            residuals = (coupling.mT @ self._vectors[self.m - self.block : self.m]).norm(dim=0)
            settled = self._settled(residuals)
            if not last and self._may_have_more_copies(settled):
                return False
            if settled == self.k:
                return True
        return False

    def _settled(self, residuals: Tensor) -> int:
        """How many of the largest Ritz pairs are eigenpairs, and known to be one or several."""
        scale = self.values.abs().max()
        self.worst = float(residuals[: self.k].max() / scale) if float(scale) else 0.0
        gaps = torch.nn.functional.pad(self.values[:-1] - self.values[1:], (1, 1), value=torch.inf)
        gaps = torch.minimum(gaps[:-1], gaps[1:])
        # Two that are close, but not equal, have a residual of their distance until all of their cluster are met.
        allowed = torch.where(gaps > 3 * self.tolerance * scale, gaps / 30, torch.inf).clamp_max(self.tolerance * scale)
        return int((residuals <= allowed)[: self.k].long().cumprod(0).sum())

    def _may_have_more_copies(self, settled: int) -> bool:
        """Whether an eigenvalue was met as often as one block can, and a smaller one stands where copies may belong."""
        if settled < self.block:
            return False
        resolution = 3 * self.tolerance * self.values.abs().max()
        smallest = self.values[self.k - 1] if self.m >= self.k else -torch.inf
        upper, lower = self.values[: settled - self.block + 1], self.values[self.block - 1 : settled]
        return bool(((upper - lower <= resolution) & (lower - smallest > resolution)).any())

    def _expand(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Add orthonormal rows to the basis; the rows that continue it, and how the products depend on them."""
        new = slice(self.m, self.m + len(block))
        self.basis[new] = block
        self.m = new.stop
        products = self.products(block)
        self.n_products += len(block)
        scale = max(float(self.projected.abs().max()), float(products.norm(dim=1).max()))
        following, along, coupling = self._orthonormal(products, 10 * torch.finfo(torch.float64).eps * scale)
        self.projected[new, : self.m] = along
        self.projected[: self.m, new] = along.mT
        self.projected[new, new] = (along[:, new] + along[:, new].mT) / 2
        return following, coupling

    def _orthonormal(self, rows: Tensor, negligible: float) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal rows Q, orthogonal to the basis, with ``rows = along @ basis + coupling @ Q``.

        Where less than a negligible part is left, the basis is invariant, and goes on with random vectors.
        """
        basis = self.basis[: self.m]
        along, coupling = rows.new_zeros(len(rows), self.m), torch.eye(len(rows)).to(rows)
        invariant = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        again = True
        while True:
            part = rows @ basis.mT
            columns, upper = torch.linalg.qr((rows - part @ basis).mT)
            along += coupling @ part
            rows, coupling = columns.mT.contiguous(), coupling @ upper.mT
            now = (coupling.norm(dim=0) <= negligible) & ~invariant
            if bool(now.any()):
                coupling[:, now] = 0
                rows[now] = self._random(int(now.sum())) / self.size**0.5
                invariant |= now
            elif not again and float(upper.diagonal().abs().min()) > 0.5:  # rows of norm one did not cancel
                return rows, along, coupling
            again = False

    def _restart(self) -> None:
        """Keep the leading Ritz vectors alone; what couples them to the next block shows in its products."""
        kept = min(self.k + max(self.block, (len(self.basis) - self.k) // 2), len(self.basis) - self.block)
        for part in self._slices():
            self.basis[:kept, part] = self._vectors[:, :kept].mT @ self.basis[: self.m, part]
        self.projected.zero_()
        self.projected.diagonal()[:kept] = self.values[:kept]
        self.m = kept

    def combined(self, k: int) -> Tensor:
        """The leading Ritz vectors as rows ``[k, size]``."""
        return self._vectors[:, :k].mT @ self.basis[: self.m]

    def _slices(self) -> Iterator[slice]:
        return (slice(start, start + 2**14) for start in range(0, self.size, 2**14))

    def _random(self, n: int) -> Tensor:
        rows = torch.randn(n, self.size, generator=self.generator, dtype=torch.float64)
        return rows.to(self.basis.device)
