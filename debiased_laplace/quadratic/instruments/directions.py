r"""Slopes and curvatures along the eigenvectors of a batch: their bias, and their noise from datum to datum.

Letters: B batches, K directions, D parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from debiased_laplace.quadratic.instruments.estimates import Estimate, Recorded, jackknife
from debiased_laplace.quadratic.quadratic import Quadratic

__all__ = [
    "Along",
    "DirectionalBias",
    "SignalToNoise",
    "directional_bias",
    "same_center",
    "signal_to_noise",
]


# -- figure 2: slopes and curvatures along the eigenvectors of a batch ------------------------------------


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
        that one's share s is put back, :math:`(1 - s)` times the mean of the others plus s times its value, which is
        unbiased for the population.
        """
        return self._other(torch.arange(len(self.batches)))

    def _other(self, chosen: Tensor) -> Tensor:
        part = self.batches[chosen][:, chosen]
        same = part.diagonal(dim1=0, dim2=1).mT
        return (1 - self.share) * (part.sum(1) - same) / (len(chosen) - 1) + self.share * same

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
        """Mean on the batch that gave the directions over mean on the reference, ``[K]``: one without bias."""
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
        """Sum over the K directions, on the batch that gave them, over that on the reference, a scalar."""
        return jackknife(lambda c: self.own[c].sum() / self.reference[c].sum(), len(self.batches))

    @property
    def total_ratio_other(self) -> Estimate:
        """The same on the other batches."""
        return jackknife(lambda c: self._other(c).mean(0).sum() / self.reference[c].mean(0).sum(), len(self.batches))


@dataclass(frozen=True)
class DirectionalBias(Recorded):
    """The paper's figure 2.

    Attributes:
        slopes: Along directions that point uphill on the batch that gave them.
        curvatures: Those on the batch that gave the directions are its eigenvalues.
        n_data: Of every batch.
    """

    slopes: Along
    curvatures: Along
    n_data: tuple[int, ...]


def directional_bias(
    quadratics: Sequence[Quadratic], reference: Quadratic, n_directions: int, *, population: int | None = None
) -> DirectionalBias:
    """Slopes and curvatures along every batch's top eigenvectors: on it, on other batches, on the reference.

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
    sizes = [quadratic.n_data for quadratic in quadratics]
    if population is not None and (len(set(sizes)) > 1 or sum(sizes) > population):
        raise ValueError(
            f"Expected batches of one size that are disjoint parts of {population} data, got {len(quadratics)} of the "
            f"sizes {sorted(set(sizes))}."
        )
    share = 0.0 if population is None else sizes[0] / population
    slopes, curvatures, reference_slopes, reference_curvatures = [], [], [], []
    for chooser in quadratics:
        _, directions = chooser.eigenpairs(n_directions)
        directions = torch.where(chooser.slope(directions)[:, None] < 0, -directions, directions)
        slopes.append(torch.stack([other.slope(directions) for other in quadratics]))
        curvatures.append(torch.stack([other.curvature(directions) for other in quadratics]))
        reference_slopes.append(reference.slope(directions))
        reference_curvatures.append(reference.curvature(directions))
    return DirectionalBias(
        Along(torch.stack(slopes), torch.stack(reference_slopes), share),
        Along(torch.stack(curvatures), torch.stack(reference_curvatures), share),
        tuple(sizes),
    )


def same_center(quadratics: Sequence[Quadratic]) -> None:
    """Raise a ``ValueError`` for quadratics of different parameters, curvatures or regularisers."""
    first = quadratics[0]
    for other in quadratics[1:]:
        if other.kind != first.kind or other.l2 != first.l2:
            raise ValueError(
                f"Expected quadratics with the same curvature and l2, got {first.kind!r} with {first.l2:g} and "
                f"{other.kind!r} with {other.l2:g}."
            )
        if other.center.shape != first.center.shape or not torch.equal(other.center, first.center.to(other.center)):
            raise ValueError(
                "Expected quadratics around the same parameters of the same model, got different ones. Make all of "
                "them before the model moves on."
            )


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
    along = measured_on.per_datum(directions)
    return SignalToNoise(values, along.slope, along.curvature, along.slope_snr, along.curvature_snr, measured_on.n_data)
