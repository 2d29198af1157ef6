r"""The bias of the top curvatures against batch size: measured, and predicted by spiked random-matrix theory.

Letters: m data in a batch, N in the population it is drawn from, B batches, K directions, D parameters, S batch sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from debiased_laplace import _checks, _data
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.quadratic.instruments.directions import same_center
from debiased_laplace.quadratic.instruments.estimates import Estimate, Recorded, jackknife
from debiased_laplace.quadratic.instruments.noise import (
    SpikedPrediction,
    noise_variance,
    product_noise,
    sampling_variance,
    spiked_prediction,
)
from debiased_laplace.quadratic.quadratic import Quadratic

__all__ = [
    "BatchSizeCurve",
    "BatchSizeSuggestion",
    "Subsets",
    "bias_against_batch_size",
    "suggest_batch_size",
]


@dataclass(frozen=True)
class BatchSizeCurve(Recorded):
    r"""Bias of the top curvatures against batch size.

    Attributes:
        sizes: S batch sizes, ascending.
        batch_eigenvalues: ``[S, B, K]``: curvatures of a batch along its eigenvectors.
        along_batch_directions: ``[S, B, K]``: of the reference along the same.
        reference_eigenvalues: ``[K]``; themselves those of a batch where the reference is not the whole population.
        noise: Isotropic noise of one datum (:func:`noise_variance`).
        noise_along: Noise along the reference's eigenvectors and across them, ``[K]``.
        population: Number of data that batches are drawn from without replacement; None if unlimited.
        n_reference: Data of the reference.
    """

    sizes: tuple[int, ...]
    batch_eigenvalues: Tensor
    along_batch_directions: Tensor
    reference_eigenvalues: Tensor
    noise: float
    noise_along: Tensor
    population: int | None
    n_reference: int

    derived: ClassVar[tuple[str, ...]] = ("overstatement", "eigenvalue_ratio", "spikes", "predictions")

    @property
    def spikes(self) -> Tensor:
        r"""Eigenvalues of the population by theory, ``[K]``, from those of the reference.

        The larger root of :math:`\hat\lambda = \lambda + s^2 / \lambda`, :math:`s^2` the noise of the reference
        (:func:`spiked_prediction`); zero where it is lost in that.
        """
        noise = self.noise_along * sampling_variance(self.n_reference, self.population)
        values = self.reference_eigenvalues
        discriminant = values.square() - 4 * noise
        return torch.where(discriminant >= 0, (values + discriminant.clamp_min(0).sqrt()) / 2, 0.0)

    @property
    def overstatement(self) -> Estimate:
        """Curvature of a batch over the reference's along its eigenvectors, ``[S, K]``, a ratio of means."""
        batch, reference = self.batch_eigenvalues, self.along_batch_directions
        return jackknife(lambda chosen: batch[:, chosen].mean(1) / reference[:, chosen].mean(1), batch.shape[1])

    @property
    def eigenvalue_ratio(self) -> Estimate:
        """Eigenvalues of the batch over those of the reference, of the same rank, ``[S, K]``."""
        ratios = self.batch_eigenvalues / self.reference_eigenvalues
        return jackknife(lambda chosen: ratios[:, chosen].mean(1), ratios.shape[1])

    @property
    def predictions(self) -> list[SpikedPrediction]:
        """For every size, with the noise along the directions."""
        return self.predict(self.noise_along)

    @classmethod
    def joined(cls, curves: Sequence[BatchSizeCurve]) -> BatchSizeCurve:
        """One curve from several with the same reference and numbers of batches and directions.

        Raises:
            ValueError: If their references or populations differ.
        """
        first = curves[0]
        for curve in curves:
            close = torch.allclose(
                curve.reference_eigenvalues, first.reference_eigenvalues, rtol=1e-4
            )  # float32 models
            if (curve.population, curve.n_reference) != (first.population, first.n_reference) or not close:
                raise ValueError("Expected curves with the same reference and population, got different ones.")
        parts = sorted(curves, key=lambda curve: curve.sizes)
        return cls(
            tuple(size for curve in parts for size in curve.sizes),
            torch.cat([curve.batch_eigenvalues for curve in parts]),
            torch.cat([curve.along_batch_directions for curve in parts]),
            first.reference_eigenvalues,
            sum(curve.noise for curve in parts) / len(parts),
            torch.stack([curve.noise_along for curve in parts]).mean(0),
            first.population,
            first.n_reference,
        )

    def predict(self, noise: float | Tensor) -> list[SpikedPrediction]:
        """For every size, with any noise: ``curve.predict(curve.noise)`` is that of isotropic noise."""
        return [spiked_prediction(self.spikes, noise, size, self.population) for size in self.sizes]


class Subsets:
    """Draws batches of any size, uniformly without replacement, from data held in memory.

    Args:
        inputs: N data, as the model takes them.
        targets: ``[N, ...]``.
        generator: A CPU generator or a seed.
    """

    def __init__(self, inputs: _data.Inputs, targets: Tensor, generator: torch.Generator | int = 0) -> None:
        self.inputs, self.targets, self.n_data = _data.only((inputs, targets))
        self.generator = torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator

    def __call__(self, size: int) -> tuple[_data.Inputs, Tensor]:
        """A batch of this size, independent of the others."""
        if not 1 <= size <= self.n_data:
            raise ValueError(f"Expected a batch size from 1 to all {self.n_data} data, got {size}.")
        chosen = torch.randperm(self.n_data, generator=self.generator)[:size]
        return _data.take(self.inputs, chosen), self.targets[chosen.to(self.targets.device)]


def bias_against_batch_size(
    model: nn.Module,
    draw: Callable[[int], Any],
    likelihood: str | Likelihood,
    sizes: Sequence[int],
    *,
    reference: Quadratic,
    n_batches: int = 5,
    n_directions: int = 5,
    n_vectors: int = 30,
    population: int | None = None,
    parameters: str | Sequence[str] | None = None,
    chunk_size: int | None = None,
    generator: torch.Generator | int = 0,
) -> BatchSizeCurve:
    """How much batches of several sizes overstate the top curvatures, and the noise that theory needs to predict it.

    Args:
        model: The model.
        draw: Gives a new, independent batch of a size, such as :class:`Subsets`.
        likelihood: As the reference has it.
        sizes: Batch sizes.
        reference: Quadratic of the whole data, or of a large part of them, without l2 (which has no noise).
        n_batches: B, for each size, at least two.
        n_directions: K; no batch may be too small for it.
        n_vectors: Random vectors for the isotropic noise.
        population: Number of data that ``draw`` takes from without replacement; by default its ``n_data``, if it has
            any, else unlimited.
        parameters: As the reference has them.
        chunk_size: Data at a time; None for whole batches.
        generator: A CPU generator or a seed, for the random vectors.
    """
    if reference.l2:
        raise ValueError(f"Expected a reference without l2, which has no noise, got l2={reference.l2:g}.")
    if n_batches < 2 or not sizes:
        raise ValueError(f"Expected at least two batches of at least one size, got {n_batches} of {list(sizes)}.")
    population = population if population is not None else getattr(draw, "n_data", None)
    generator = torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
    reference_values, reference_directions = reference.eigenpairs(n_directions)
    eigenvalues, along, isotropic, directional = [], [], [], []
    for size in sorted(sizes):
        batches = [
            Quadratic(model, draw(size), likelihood, reference.kind, parameters=parameters, chunk_size=chunk_size)
            for _ in range(n_batches)
        ]
        same_center([reference, *batches])
        pairs = [batch.eigenpairs(n_directions) for batch in batches]
        eigenvalues.append(torch.stack([values for values, _ in pairs]))
        curvatures = reference.curvature(torch.cat([directions for _, directions in pairs]))
        along.append(curvatures.unflatten(0, (n_batches, n_directions)))
        if population is None or size < population:
            isotropic.append(noise_variance(batches, n_vectors, population, generator))
            directional.append(product_noise(batches, reference_directions, population, across=True))
    if not isotropic:
        raise ValueError(f"Expected a size below the population of {population}, got {list(sizes)}.")
    return BatchSizeCurve(
        tuple(sorted(sizes)), torch.stack(eigenvalues), torch.stack(along), reference_values,
        sum(isotropic) / len(isotropic), torch.stack(directional).mean(0), population, reference.n_data,
    )  # fmt: skip


@dataclass(frozen=True)
class BatchSizeSuggestion(Recorded):
    """Smallest batches that overstate the curvature along their top directions by no more than a tolerance.

    Attributes:
        tolerance: Relative.
        predicted: By theory, ``[K]``, one for each direction.
        measured: By the measured curve, ``[K]``, between sizes by interpolation; the smallest size measured where that
            will do; NaN where the largest will not. None without a curve.
    """

    tolerance: float
    predicted: Tensor
    measured: Tensor | None


def suggest_batch_size(
    tolerance: float,
    eigenvalues: Tensor | None = None,
    noise: float | Tensor | None = None,
    *,
    population: int | None = None,
    curve: BatchSizeCurve | None = None,
) -> BatchSizeSuggestion:
    r"""Batch sizes at which the overstatement falls to one plus a tolerance: by theory, and as measured.

    By theory (:func:`spiked_prediction`) the overstatement is :math:`(1 + x) / (1 - x)`, so that
    :math:`x = \epsilon / (2 + \epsilon)` and :math:`m = \nu / (\lambda^2 x)` (with :math:`1/m - 1/N` for a population).
    The theory is of isotropic noise in high dimension; where a measured curve disagrees, believe the curve.

    Args:
        tolerance: :math:`\epsilon`, for instance 0.1.
        eigenvalues: Of the data, ``[K]``; the curve's spikes by default.
        noise: Of one datum; the curve's along the directions by default.
        population: N, all the data whose curvature is wanted; the curve's by default. What was measured is always
            relative to the curve's.
        curve: Measured by :func:`bias_against_batch_size`.

    Example:
        >>> import torch
        >>> from debiased_laplace.quadratic.instruments import spiked_prediction, suggest_batch_size
        >>> data_eigenvalues = torch.tensor([4.0, 1.0])
        >>> suggest_batch_size(0.1, data_eigenvalues, noise=100.0).predicted.tolist()
        [132.0, 2100.0]
        >>> round(float(spiked_prediction(data_eigenvalues, 100.0, n_data=132).overstatement[0]), 2)
        1.1
    """
    tolerance = _checks.positive(tolerance, "tolerance")
    if curve is not None:
        eigenvalues = curve.spikes if eigenvalues is None else eigenvalues
        noise = curve.noise_along if noise is None else noise
        population = curve.population if population is None else population
    if eigenvalues is None or noise is None:
        raise ValueError("Expected eigenvalues and a noise, or a measured curve that has them.")
    eigenvalues = eigenvalues.double()
    noises = torch.as_tensor(noise, dtype=torch.float64, device=eigenvalues.device).expand(eigenvalues.shape)
    positive = torch.where(eigenvalues > 0, eigenvalues, 0.0)
    inverse = positive.square() * (tolerance / (2 + tolerance)) / noises
    inverse = inverse + (1 / population if population is not None else 0.0)
    predicted = (inverse.reciprocal() * (1 - 1e-12)).ceil().clamp_min(1)
    return BatchSizeSuggestion(tolerance, predicted, None if curve is None else _measured_sizes(tolerance, curve))


def _measured_sizes(tolerance: float, curve: BatchSizeCurve) -> Tensor:
    """Where the measured excess falls below the tolerance for good, by interpolation in logarithms, ``[K]``."""
    sizes = []
    for excesses in (curve.overstatement.value - 1).mT.tolist():
        # Below minus one the reference's curvature is negative, which is no small bias.
        last = max((index for index, excess in enumerate(excesses) if not -1 < excess <= tolerance), default=-1)
        if last == len(excesses) - 1:
            sizes.append(math.nan)
        elif last < 0 or not (0 < excesses[last] < math.inf and excesses[last + 1] > 0):
            sizes.append(float(curve.sizes[last + 1]))
        else:
            below, above = math.log(curve.sizes[last]), math.log(curve.sizes[last + 1])
            fraction = math.log(excesses[last] / tolerance) / math.log(excesses[last] / excesses[last + 1])
            sizes.append(math.exp(below + (above - below) * fraction))
    return torch.tensor(sizes, dtype=torch.float64)
