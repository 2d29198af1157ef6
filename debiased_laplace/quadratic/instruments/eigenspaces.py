r"""Eigenspaces of two quadratics: how they are aligned, and both quadratics on the plane of two eigenvectors.

Letters: K directions, D parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace.quadratic.instruments.estimates import Recorded
from debiased_laplace.quadratic.quadratic import Quadratic

__all__ = ["Alignment", "OnPlane", "Plane", "alignment", "plane"]


# -- figure 3: alignment of eigenspaces ----------------------------------------------------------------


@dataclass(frozen=True)
class Alignment(Recorded):
    r"""Overlaps of two sets of orthonormal directions, the paper's figure 3.

    Attributes:
        overlaps: :math:`\Omega_{ij} = (u_i^\top u'_j)^2`, ``[K, K']``.
    """

    overlaps: Tensor

    derived: ClassVar[tuple[str, ...]] = ("row_sums",)

    @property
    def row_sums(self) -> Tensor:
        """How much of each first direction lies in the space of the second ones, ``[K]``, at most one."""
        return self.overlaps.sum(1)

    def curvatures(self, eigenvalues: Tensor, remainder: float = 0.0) -> Tensor:
        r"""Curvatures along the first directions of a matrix with the second directions as eigenvectors, ``[K]``.

        .. math:: u_i^\top C' u_i = \sum_j \Omega_{ij} \lambda'_j + \Big(1 - \sum_j \Omega_{ij}\Big) \rho

        Args:
            eigenvalues: :math:`\lambda'`, ``[K']``.
            remainder: :math:`\rho`, the eigenvalue of everything else. It is zero (or the quadratic's l2) if the
                second directions are all the eigenvectors with curvature; then this is exact.
        """
        return self.overlaps @ eigenvalues.to(self.overlaps) + (1 - self.row_sums) * remainder

    def image(self, floor: float = 1e-8) -> Tensor:
        """Logarithmic greys in [0, 1], ``[K, K']``: zero for overlaps up to the floor, one for an overlap of one."""
        return 1 - self.overlaps.clamp(floor, 1).log() / math.log(floor)


def alignment(first_vectors: Tensor, second_vectors: Tensor) -> Alignment:
    """Overlaps of orthonormal directions ``[K, D]`` and ``[K', D]``, given as rows."""
    for vectors in (first_vectors, second_vectors):
        if vectors.ndim != 2 or vectors.shape[1] != first_vectors.shape[-1]:
            raise ValueError(
                f"Expected directions [K, D] and [K', D] as rows, got {tuple(first_vectors.shape)} and "
                f"{tuple(second_vectors.shape)}."
            )
        norms = vectors.double().norm(dim=1)
        if not bool(((norms - 1).abs() < max(1e-3, torch.finfo(vectors.dtype).eps)).all()):
            raise ValueError(
                f"Expected directions of length one, got lengths from {float(norms.min()):g} to {float(norms.max()):g}."
            )
    return Alignment((first_vectors.double() @ second_vectors.to(first_vectors.device).double().mT).square())


# -- figure 1: the plane of the top two eigenvectors ---------------------------------------------------


@dataclass(frozen=True)
class OnPlane(Recorded):
    r"""A quadratic on a plane :math:`\theta_0 + \tau_1 u_1 + \tau_2 u_2`.

    Attributes:
        offset: The value at the origin.
        slopes: ``[2]``.
        curvatures: ``[2, 2]``.
    """

    offset: float
    slopes: Tensor
    curvatures: Tensor

    derived: ClassVar[tuple[str, ...]] = ("minimum",)

    def values(self, coordinates: Tensor) -> Tensor:
        """On a grid with coordinates ``[n]`` along both axes: ``[n, n]``, the first along the first dimension."""
        points = torch.stack(torch.meshgrid(coordinates, coordinates, indexing="ij"), -1)
        quadratic_form = torch.einsum("...i,ij,...j->...", points, self.curvatures, points)
        return self.offset + points @ self.slopes + 0.5 * quadratic_form

    @property
    def minimum(self) -> Tensor:
        """Coordinates of its minimum ``[2]``, the Newton step in the plane; NaN if it has none."""
        if float(torch.linalg.eigvalsh(self.curvatures)[0]) <= 0:
            return torch.full_like(self.slopes, torch.nan)
        return -torch.linalg.solve(self.curvatures, self.slopes)


@dataclass(frozen=True)
class Plane(Recorded):
    """Two quadratics on the plane of the first one's top two eigenvectors, the paper's figure 1.

    Attributes:
        extent: Half the side of the square that is worth looking at.
        eigenvalues: Of the first one, ``[2]``.
        first: The mini-batch.
        reference: The data.
    """

    extent: float
    eigenvalues: Tensor
    first: OnPlane
    reference: OnPlane


def plane(first: Quadratic, reference: Quadratic, extent: float | None = None) -> Plane:
    r"""Both quadratics on the plane through the reference's centre along the first one's top two eigenvectors.

    Cost: the eigenpairs, and the curvature of three vectors on each.

    Args:
        first: The mini-batch's.
        reference: The data's.
        extent: How far is worth looking along both axes; by default to where the first one's second curvature alone
            has raised it by its loss, :math:`\sqrt{2 q(\theta_0) / \lambda_2}`.
    """
    values, directions = first.eigenpairs(2)
    if extent is None:
        curvature = float(values[1])
        extent = math.sqrt(2 * first.loss / curvature) if curvature > 0 and first.loss > 0 else 1.0
    extent = _checks.positive(extent, "extent")

    def on(quadratic: Quadratic) -> OnPlane:
        step = reference.center - quadratic.center
        slopes, matrix = quadratic.projected(torch.cat([directions, step[None]]))
        offset = quadratic.loss + float(slopes[2] + 0.5 * matrix[2, 2])
        return OnPlane(offset, slopes[:2] + matrix[:2, 2], matrix[:2, :2])

    return Plane(extent, values, on(first), on(reference))
