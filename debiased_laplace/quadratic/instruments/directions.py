r"""Slopes and curvatures along eigenvectors of a batch: their bias, alignment of eigenspaces, planes, signal and noise.

Letters: B batches, K directions, D parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace.quadratic.instruments.estimates import Estimate, Recorded, jackknife
from debiased_laplace.quadratic.quadratic import Quadratic

__all__ = [
    "Alignment",
    "Along",
    "DirectionalBias",
    "OnPlane",
    "Plane",
    "SignalToNoise",
    "alignment",
    "directional_bias",
    "plane",
    "same_center",
    "signal_to_noise",
]


# -- figure 2: slopes and curvatures along a batch's own directions ------------------------------------


@dataclass(frozen=True)
class Along(Recorded):
    r"""Slopes or curvatures along the eigenvectors of B batches.

    Attributes:
        batches: ``[B, B, K]``: at ``[m, j]`` those of batch j along the directions of batch m.
        reference: ``[B, K]``: those of the reference along the directions of batch m.
        share: What part of the population a batch is, if the batches are disjoint parts of one; 0 for independent ones.
    """

    batches: Tensor
    reference: Tensor
    share: float = 0.0

    derived: ClassVar[tuple[str, ...]] = (
        "mean_own", "mean_other", "mean_reference", "ratio_own", "ratio_other", "typical_ratio_own",
        "typical_ratio_other", "total_ratio_own", "total_ratio_other",
    )  # fmt: skip

    @property
    def own(self) -> Tensor:
        """On the batch that gave the directions, ``[B, K]``."""
        return self.batches.diagonal(dim1=0, dim2=1).mT

    @property
    def other(self) -> Tensor:
        r"""What an independent second batch has on average, ``[B, K]``: the mean over all other batches.

        Batches that are disjoint parts of a population stand for its rest without the batch that gave the directions;
        that one's share s is put back, :math:`(1 - s)` times the mean of the others plus s times its own, which is
        unbiased for the population.
        """
        return self._other(torch.arange(len(self.batches)))

    def _other(self, chosen: Tensor) -> Tensor:
        part = self.batches[chosen][:, chosen]
        own = part.diagonal(dim1=0, dim2=1).mT
        return (1 - self.share) * (part.sum(1) - own) / (len(chosen) - 1) + self.share * own

    @property
    def mean_own(self) -> Estimate:
        """Over batches, for every rank, ``[K]``."""
        return jackknife(lambda chosen: self.own[chosen].mean(0), len(self.batches))

    @property
    def mean_other(self) -> Estimate:
        """Over ordered pairs of different batches, ``[K]``; its error needs three batches."""
        return jackknife(lambda chosen: self._other(chosen).mean(0), len(self.batches))

    @property
    def mean_reference(self) -> Estimate:
        """Over batches, ``[K]``."""
        return jackknife(lambda chosen: self.reference[chosen].mean(0), len(self.batches))

    @property
    def ratio_own(self) -> Estimate:
        """Mean on the own batch over mean on the reference, ``[K]``: one without bias."""
        return jackknife(lambda c: self.own[c].mean(0) / self.reference[c].mean(0), len(self.batches))

    @property
    def ratio_other(self) -> Estimate:
        """Mean on the other batches over mean on the reference, ``[K]``."""
        return jackknife(lambda c: self._other(c).mean(0) / self.reference[c].mean(0), len(self.batches))

    @property
    def typical_ratio_own(self) -> Estimate:
        """Geometric mean of :attr:`ratio_own` over the K directions, a scalar; NaN if one of them is not positive."""
        return jackknife(
            lambda c: (self.own[c].mean(0) / self.reference[c].mean(0)).log().mean().exp(), len(self.batches)
        )

    @property
    def typical_ratio_other(self) -> Estimate:
        """The same of :attr:`ratio_other`."""
        return jackknife(
            lambda c: (self._other(c).mean(0) / self.reference[c].mean(0)).log().mean().exp(), len(self.batches)
        )

    @property
    def total_ratio_own(self) -> Estimate:
        """Sum over all K directions on the own batch over the same sum on the reference, a scalar."""
        return jackknife(lambda c: self.own[c].sum() / self.reference[c].sum(), len(self.batches))

    @property
    def total_ratio_other(self) -> Estimate:
        """The same on the other batches."""
        return jackknife(lambda c: self._other(c).mean(0).sum() / self.reference[c].mean(0).sum(), len(self.batches))


@dataclass(frozen=True)
class DirectionalBias(Recorded):
    """The paper's figure 2.

    Attributes:
        slopes: Along directions that point uphill on their own batch.
        curvatures: Those on the own batch are its eigenvalues.
        n_data: Of every batch.
    """

    slopes: Along
    curvatures: Along
    n_data: tuple[int, ...]


def directional_bias(
    quadratics: Sequence[Quadratic], reference: Quadratic, n_directions: int, *, population: int | None = None
) -> DirectionalBias:
    """Slopes and curvatures along every batch's own top eigenvectors: on it, on other batches, on the reference.

    Cost: the eigenpairs of B batches, and B K products with each of the B batches and with the reference.

    Args:
        quadratics: Those of the B batches, at least two; independent draws for honest errors.
        reference: That of the whole data, or of a large part of them.
        n_directions: K.
        population: If the batches, all of one size, are disjoint parts of a population which the reference is or was
            drawn from: its number of data. Without it the batches count as independent of each other and of the
            reference; one that contains them has their bias by their share of it.

    Raises:
        ValueError: If they are not around the same parameters, or a batch is too small for K eigenvectors.

    Example:
        >>> import torch
        >>> from debiased_laplace import Quadratic
        >>> from debiased_laplace.quadratic.instruments import directional_bias
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
        >>> x, y = torch.randn(96, 4).double(), torch.randint(3, (96,))
        >>> batches = [Quadratic(model, (x[i : i + 8], y[i : i + 8]), "classification") for i in range(0, 96, 8)]
        >>> data = Quadratic(model, (x, y), "classification")
        >>> bias = directional_bias(batches, data, n_directions=2, population=96)
        >>> own, other = bias.curvatures.ratio_own, bias.curvatures.ratio_other
        >>> bool((own.value - 4 * own.error > 1).all()), bool(((other.value - 1).abs() < 4 * other.error).all())
        (True, True)
    """
    if len(quadratics) < 2:
        raise ValueError(
            f"Expected at least two batches, to see one along the directions of another; got {len(quadratics)}."
        )
    same_center([*quadratics, reference])
    sizes = {own.n_data for own in quadratics}
    if population is not None and (len(sizes) > 1 or sum(own.n_data for own in quadratics) > population):
        raise ValueError(
            f"Expected batches of one size that are disjoint parts of {population} data, got {len(quadratics)} of the "
            f"sizes {sorted(sizes)}."
        )
    share = 0.0 if population is None else quadratics[0].n_data / population
    slopes, curvatures, reference_slopes, reference_curvatures = [], [], [], []
    for own in quadratics:
        _, directions = own.eigenpairs(n_directions)
        directions = torch.where(own.slope(directions)[:, None] < 0, -directions, directions)
        slopes.append(torch.stack([other.slope(directions) for other in quadratics]))
        curvatures.append(torch.stack([other.curvature(directions) for other in quadratics]))
        reference_slopes.append(reference.slope(directions))
        reference_curvatures.append(reference.curvature(directions))
    return DirectionalBias(
        Along(torch.stack(slopes), torch.stack(reference_slopes), share),
        Along(torch.stack(curvatures), torch.stack(reference_curvatures), share),
        tuple(own.n_data for own in quadratics),
    )


def same_center(quadratics: Sequence[Quadratic]) -> None:
    """Raise a ``ValueError`` for quadratics of different parameters, curvatures or regularisers."""
    first = quadratics[0]
    for own in quadratics[1:]:
        if own.kind != first.kind or own.l2 != first.l2:
            raise ValueError(
                f"Expected quadratics with the same curvature and l2, got {first.kind!r} with {first.l2:g} and "
                f"{own.kind!r} with {own.l2:g}."
            )
        if own.center.shape != first.center.shape or not torch.equal(own.center, first.center.to(own.center)):
            raise ValueError(
                "Expected quadratics around the same parameters of the same model, got different ones. Make all of "
                "them before the model moves on."
            )


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
        bend = torch.einsum("...i,ij,...j->...", points, self.curvatures, points)
        return self.offset + points @ self.slopes + 0.5 * bend

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


# -- ViViT's figure 2: signal and noise ----------------------------------------------------------------


@dataclass(frozen=True)
class SignalToNoise(Recorded):
    """Squared mean over variance across the data of a batch, for every direction (infinite without variance).

    Attributes:
        eigenvalues: Of the batch that gave the directions, ``[K]``.
        slopes: Means, ``[K]``.
        curvatures: Means, ``[K]``.
        slope_snr: ``[K]``, of one datum; times N for the mean of N.
        curvature_snr: ``[K]``.
        n_data: N.
    """

    eigenvalues: Tensor
    slopes: Tensor
    curvatures: Tensor
    slope_snr: Tensor
    curvature_snr: Tensor
    n_data: int


def signal_to_noise(quadratic: Quadratic, n_directions: int, measured_on: Quadratic | None = None) -> SignalToNoise:
    """Signal-to-noise ratios of the slopes and curvatures along a batch's top eigenvectors, for every direction.

    Args:
        quadratic: Gives the directions.
        n_directions: K.
        measured_on: Another batch, to be free of the bias; the same one by default, as in ViViT's figure 2.
    """
    measured_on = measured_on or quadratic
    same_center([quadratic, measured_on])
    values, directions = quadratic.eigenpairs(n_directions)
    found = measured_on.per_datum(directions)
    return SignalToNoise(values, found.slope, found.curvature, found.slope_snr, found.curvature_snr, measured_on.n_data)
