r"""Eigendecompositions, no more precise than the entries are known.

* In the precision of the statistics, checked: random vectors x have to come back from the eigenvectors,
  :math:`\|Q Q^\top x - x\|` and :math:`\|Q \Lambda Q^\top x - M x\| / \lambda_1`, up to :data:`CHECKED` times the
  rounding error of that precision times the root of the size. A matrix that fails is decomposed in double precision.
* Of few columns, :math:`M = C C^\top` with r < P, by a QR decomposition :math:`C = Q_1 R`: with
  :math:`R R^\top = V \Lambda V^\top`, which has the eigenvalues of the Gram matrix :math:`C^\top C`, the eigenvectors
  are :math:`Q_1 V`, and the other columns of Q complete them. They are orthonormal however small an eigenvalue is.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: Errors that a decomposition may have, relative to rounding errors times the root of the size. LAPACK's have a fifth.
CHECKED = 4.0

#: Random vectors that a decomposition is checked with: a single wrong eigenvector escapes none of them.
N_PROBES = 8


def eigh(matrices: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices ``[..., P, P]``, largest first.

    In the precision of the matrices; in double precision where that fails, or fails the check.

    Raises:
        RuntimeError: If the decomposition fails also in double precision on the CPU.
    """
    symmetric = 0.5 * (matrices + matrices.mT)
    try:
        values, vectors = torch.linalg.eigh(symmetric)
        if matrices.dtype == torch.float64 or is_accurate(symmetric, values, vectors):
            return values.flip(-1), vectors.flip(-1)
        logger.info("The eigendecomposition of the curvature of %r is repeated in double precision.", name)
    except RuntimeError:  # near-degenerate matrices fail on some devices (pytorch #94772)
        pass
    try:
        values, vectors = torch.linalg.eigh(symmetric.cpu().double())
    except RuntimeError as error:
        raise RuntimeError(
            f"The eigendecomposition of the curvature of {name!r} failed in double precision on the CPU: {error}"
        ) from error
    return values.flip(-1).to(matrices), vectors.flip(-1).to(matrices)


def is_accurate(matrices: Tensor, values: Tensor, vectors: Tensor) -> bool:
    r"""Whether random vectors come back from eigenvectors, and :math:`Q \Lambda Q^\top` acts on them as the matrix.

    Args:
        matrices: ``[..., P, P]``, symmetric.
        values: ``[..., P]``.
        vectors: ``[..., P, P]``.
    """
    size = matrices.shape[-1]
    probes = torch.randn(size, N_PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(matrices)
    along = vectors.mT @ probes
    lost = (vectors @ along - probes).norm(dim=-2)
    off = (vectors @ (values[..., None] * along) - matrices @ probes).norm(dim=-2)
    largest = values.abs().amax(-1, keepdim=True)
    tolerance = CHECKED * torch.finfo(matrices.dtype).eps * size**0.5 * probes.norm(dim=0)
    return bool(((lost <= tolerance) & (off <= tolerance * largest)).all())


def eigenvectors_of_columns(columns: Tensor, name: str) -> Tensor:
    r"""Eigenvectors of :math:`C C^\top`, ``[..., P, P]``, for ``C: [..., P, r]`` with r < P; largest first.

    Raises:
        RuntimeError: As :func:`eigh`.
    """
    n_columns = columns.shape[-1]
    orthonormal, triangular = torch.linalg.qr(columns, mode="complete")
    triangular = triangular[..., :n_columns, :]
    _, within = eigh(triangular @ triangular.mT, name)
    orthonormal[..., :n_columns] = orthonormal[..., :n_columns] @ within
    return orthonormal
