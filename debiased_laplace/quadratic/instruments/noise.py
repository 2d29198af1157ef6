r"""The noise of mini-batch curvatures, and what spiked random-matrix theory makes of it.

Letters: m data in a batch, N in the population it is drawn from, B batches, K directions, D parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.quadratic.instruments.estimates import Recorded
from debiased_laplace.quadratic.quadratic import Quadratic

__all__ = ["SpikedPrediction", "noise_variance", "product_noise", "sampling_variance", "spiked_prediction"]

#: Float64 numbers that products take at a time.
PRODUCT_SIZE = 50_000_000


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
    sizes = {quadratic.n_data for quadratic in quadratics}
    if len(quadratics) < 2 or len(sizes) > 1:
        raise ValueError(
            f"Expected at least two batches of the same size, got {len(quadratics)} of the sizes {sorted(sizes)}."
        )
    (size,) = sizes
    if population is not None and size >= population:
        raise ValueError(f"Expected batches smaller than the population of {population}, got {size} data.")
    sums = []
    for part in _data.slices(len(vectors), max(1, PRODUCT_SIZE // (len(quadratics) * vectors.shape[1]))):
        products = torch.stack([quadratic.matvec(vectors[part]) for quadratic in quadratics])  # [B, k, D]
        differences = products - products.mean(0)
        if across:
            unit = vectors[part].to(differences)
            differences -= (differences * unit).sum(-1, keepdim=True) * unit
        sums.append(differences.square().sum(-1).sum(0))
    return torch.cat(sums) / (len(quadratics) - 1) / sampling_variance(size, population)


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


def sampling_variance(size: float, population: int | None) -> float:
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
        """Of the curvature along the batch's eigenvectors, ``[K]``: one without bias, infinite below threshold."""
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
    variance = noises * sampling_variance(n_data, population)
    ratio = torch.where(eigenvalues > 0, variance / eigenvalues.square(), torch.inf)
    values = torch.where(ratio < 1, eigenvalues * (1 + ratio), 2 * variance.sqrt())
    return SpikedPrediction(n_data, eigenvalues, noises, values, (1 - ratio).clamp_min(0))
