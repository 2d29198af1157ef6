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
from debiased_laplace.quadratic.quadratic import Quadratic

__all__ = [
    "BatchSizeCurve",
    "BatchSizeSuggestion",
    "SpikedPrediction",
    "Subsets",
    "bias_against_batch_size",
    "noise_variance",
    "product_noise",
    "spiked_prediction",
    "suggest_batch_size",
]


_NUMBERS = 50_000_000  # float64 numbers at a time


def product_noise(
    quadratics: Sequence[Quadratic], vectors: Tensor, population: int | None = None, *, across: bool = False
) -> Tensor:
    r"""How far the curvature of one datum lies from the mean along vectors, :math:`E\|(C_n - C) v\|^2`, ``[K]``.

    From B batches of m data, as m times the variance of their products over batches, which is unbiased for independent
    batches. For batches drawn without replacement from a population of N, divide by 1 - m / N. Memory: the vectors, and
    B D numbers at least for as many of them at a time as 400 MB hold, twice.

    Args:
        quadratics: Of at least two independent batches of the same size.
        vectors: ``[K, D]``.
        population: N; None if it is unlimited. Also for batches that are disjoint parts of one population: their
            covariance then makes up for the factor.
        across: Leave out the component along v itself, for directions of length one.
    """
    sizes = {own.n_data for own in quadratics}
    if len(quadratics) < 2 or len(sizes) > 1:
        raise ValueError(
            f"Expected at least two batches of the same size, got {len(quadratics)} of the sizes {sorted(sizes)}."
        )
    (size,) = sizes
    if population is not None and size >= population:
        raise ValueError(f"Expected batches smaller than the population of {population}, got {size} data.")
    found = []
    for part in _data.slices(len(vectors), max(1, _NUMBERS // (len(quadratics) * vectors.shape[1]))):
        products = torch.stack([own.matvec(vectors[part]) for own in quadratics])  # [B, k, D]
        differences = products - products.mean(0)
        if across:
            unit = vectors[part].to(differences)
            differences -= (differences * unit).sum(-1, keepdim=True) * unit
        found.append(differences.square().sum(-1).sum(0))
    return torch.cat(found) / (len(quadratics) - 1) / _scale(size, population)


def noise_variance(
    quadratics: Sequence[Quadratic],
    n_vectors: int = 30,
    population: int | None = None,
    generator: torch.Generator | int = 0,
) -> float:
    r"""The isotropic noise of one datum's curvature, :math:`\nu = E\|(C_n - C) v\|^2 = \sigma^2 D` for random unit v.

    :func:`product_noise`, averaged over vectors that are uniform on the sphere: unbiased for
    :math:`\mathrm{tr}\,E[(C_n - C)^2] / D`. For a Wigner matrix with entries of variance :math:`\sigma^2` that is
    :math:`\sigma^2 (D + 1)`. **Assumption** of what is made of it: the noise looks the same along every direction. The
    noise of a network's Gauss-Newton matrix does not: it is concentrated where the curvature is, so that the isotropic
    value is too small by far for the top directions; :func:`product_noise` along them with ``across=True`` is the
    same quantity where it matters.
    """
    generator = torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
    vectors = torch.randn(n_vectors, quadratics[0].n_params, generator=generator, dtype=torch.float64)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    return float(product_noise(quadratics, vectors, population).mean())


def _scale(size: float, population: int | None) -> float:
    """Variance of the mean of a batch drawn without replacement, in units of that of one datum."""
    return 1 / size - (1 / population if population is not None else 0.0)


@dataclass(frozen=True)
class SpikedPrediction(Recorded):
    """What spiked random-matrix theory expects of a batch's top eigenvalues.

    Attributes:
        n_data: Size m of the batch.
        eigenvalues: Of the data, the spikes, ``[K]``.
        noise: Of one datum, ``[K]``.
        batch_eigenvalues: Of the batch, ``[K]``.
        overlaps: Squared overlap of the batch's eigenvector with the data's, ``[K]``; zero below the threshold.
    """

    n_data: int
    eigenvalues: Tensor
    noise: Tensor
    batch_eigenvalues: Tensor
    overlaps: Tensor

    derived: ClassVar[tuple[str, ...]] = ("along_batch_directions", "overstatement")

    @property
    def along_batch_directions(self) -> Tensor:
        """Curvatures of the data along the batch's eigenvectors, ``[K]``."""
        return self.eigenvalues * self.overlaps

    @property
    def overstatement(self) -> Tensor:
        """Of the curvature along the batch's own eigenvectors, ``[K]``: one without bias, infinite below threshold."""
        return self.batch_eigenvalues / self.along_batch_directions


def spiked_prediction(
    eigenvalues: Tensor, noise: float | Tensor, n_data: int, population: int | None = None
) -> SpikedPrediction:
    r"""Where the top eigenvalues of a batch should lie, from those of the data and the noise of one datum.

    The model is additive, :math:`C_m = \sum_i \lambda_i u_i u_i^\top + W`, W a Wigner matrix with
    :math:`E\|Wv\|^2 = s^2 = \nu / m` for unit v (so :math:`s^2 = \sigma^2 D / m`). With
    :math:`x_i = s^2 / \lambda_i^2`, as D grows,

    .. math:: \lambda_i(C_m) \to \begin{cases}\lambda_i (1 + x_i) = \lambda_i + \frac{\nu}{m \lambda_i}
        & x_i < 1 \\ 2 s \text{ (the edge of the bulk)} & \text{else}\end{cases}
        \qquad (u_i^\top \hat u_i)^2 \to \max(0, 1 - x_i)

    The data's curvature along :math:`\hat u_i` is hence :math:`\lambda_i (1 - x_i)`: the bias goes both ways. Without
    the assumption of isotropic noise, :math:`\lambda_i + \nu_i / (m \lambda_i)` with :math:`\nu_i` the noise along
    :math:`u_i` and across it is the second-order perturbation of an eigenvalue far above all others.

    Args:
        eigenvalues: Of the data, without an l2 (which shifts them, and has no noise), ``[K]``.
        noise: :math:`\nu`: of :func:`noise_variance`, or for every direction, ``[K]``.
        n_data: m.
        population: N, of which the batch is drawn without replacement: :math:`s^2 = \nu (1/m - 1/N)`.

    Source: Granziol, Zohren, Roberts (arXiv 2006.09092); the formulas are those of Benaych-Georges, Nadakuditi,
    "The eigenvalues and eigenvectors of finite, low rank perturbations of large random matrices" (arXiv 0910.2120).
    """
    eigenvalues = eigenvalues.double()
    noises = torch.as_tensor(noise, dtype=torch.float64, device=eigenvalues.device).expand(eigenvalues.shape)
    if n_data < 1 or (population is not None and n_data > population):
        raise ValueError(f"Expected a batch size from 1 to the population of {population}, got {n_data}.")
    spread = noises * _scale(n_data, population)
    ratio = torch.where(eigenvalues > 0, spread / eigenvalues.square(), torch.inf)
    values = torch.where(ratio < 1, eigenvalues * (1 + ratio), 2 * spread.sqrt())
    return SpikedPrediction(n_data, eigenvalues, noises, values, (1 - ratio).clamp_min(0))


@dataclass(frozen=True)
class BatchSizeCurve(Recorded):
    r"""Bias of the top curvatures against batch size.

    Attributes:
        sizes: S batch sizes, ascending.
        batch_eigenvalues: ``[S, B, K]``: curvatures of a batch along its own eigenvectors.
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
        noise = self.noise_along * _scale(self.n_reference, self.population)
        found = self.reference_eigenvalues
        rest = found.square() - 4 * noise
        return torch.where(rest >= 0, (found + rest.clamp_min(0).sqrt()) / 2, 0.0)

    @property
    def overstatement(self) -> Estimate:
        """Own curvature over the reference's along the same directions, ``[S, K]``, a ratio of means over batches."""
        own, reference = self.batch_eigenvalues, self.along_batch_directions
        return jackknife(lambda chosen: own[:, chosen].mean(1) / reference[:, chosen].mean(1), own.shape[1])

    @property
    def eigenvalue_ratio(self) -> Estimate:
        """Eigenvalues of the batch over those of the reference, of the same rank, ``[S, K]``."""
        own = self.batch_eigenvalues / self.reference_eigenvalues
        return jackknife(lambda chosen: own[:, chosen].mean(1), own.shape[1])

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
        for own in curves:
            close = torch.allclose(own.reference_eigenvalues, first.reference_eigenvalues, rtol=1e-4)  # float32 models
            if (own.population, own.n_reference) != (first.population, first.n_reference) or not close:
                raise ValueError("Expected curves with the same reference and population, got different ones.")
        parts = sorted(curves, key=lambda own: own.sizes)
        return cls(
            tuple(size for own in parts for size in own.sizes),
            torch.cat([own.batch_eigenvalues for own in parts]),
            torch.cat([own.along_batch_directions for own in parts]),
            first.reference_eigenvalues,
            sum(own.noise for own in parts) / len(parts),
            torch.stack([own.noise_along for own in parts]).mean(0),
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
    own, along, isotropic, directional = [], [], [], []
    for size in sorted(sizes):
        batches = [
            Quadratic(model, draw(size), likelihood, reference.kind, parameters=parameters, chunk_size=chunk_size)
            for _ in range(n_batches)
        ]
        same_center([reference, *batches])
        pairs = [batch.eigenpairs(n_directions) for batch in batches]
        own.append(torch.stack([values for values, _ in pairs]))
        curvatures = reference.curvature(torch.cat([directions for _, directions in pairs]))
        along.append(curvatures.unflatten(0, (n_batches, n_directions)))
        if population is None or size < population:
            isotropic.append(noise_variance(batches, n_vectors, population, generator))
            directional.append(product_noise(batches, reference_directions, population, across=True))
    if not isotropic:
        raise ValueError(f"Expected a size below the population of {population}, got {list(sizes)}.")
    return BatchSizeCurve(
        tuple(sorted(sizes)), torch.stack(own), torch.stack(along), reference_values,
        sum(isotropic) / len(isotropic), torch.stack(directional).mean(0), population, reference.n_data,
    )  # fmt: skip


@dataclass(frozen=True)
class BatchSizeSuggestion(Recorded):
    """Smallest batches that overstate the curvature along their own top directions by no more than a tolerance.

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
    found = []
    for own in (curve.overstatement.value - 1).mT.tolist():
        # Below minus one the reference's curvature is negative, which is no small bias.
        last = max((index for index, excess in enumerate(own) if not -1 < excess <= tolerance), default=-1)
        if last == len(own) - 1:
            found.append(math.nan)
        elif last < 0 or not (0 < own[last] < math.inf and own[last + 1] > 0):
            found.append(float(curve.sizes[last + 1]))
        else:
            below, above = math.log(curve.sizes[last]), math.log(curve.sizes[last + 1])
            fraction = math.log(own[last] / tolerance) / math.log(own[last] / own[last + 1])
            found.append(math.exp(below + (above - below) * fraction))
    return torch.tensor(found, dtype=torch.float64)
