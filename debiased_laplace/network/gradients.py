r"""Weighted data as what a curvature is computed from: gradient factors, and the vectors to back-propagate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _checks, _data
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.factors import Factors
from debiased_laplace.network.network import Network
from debiased_laplace.sampling.sample import WeightedData

#: Bytes that activations and back-propagated vectors may take at a time.
CHUNK_MEMORY = 2**28

#: What the vectors of a datum are: a square root of the loss Hessian, or the gradient of the loss.
CURVATURE_VECTORS = ("ggn", "empirical_fisher")


@dataclass(frozen=True)
class WeightedFactors:
    """Factors of a chunk of data, with what the curvature needs besides.

    Attributes:
        factors: The forward pass.
        weights: ``[N]``, on the CPU; they sum over chunks.
        vectors: ``sqrt(w_n) S_n: [V, N, C]``, the weighted square root of the loss Hessian to back-propagate;
            weighing it here saves weighing it in every layer.
        positions: Of these among all data. Data that are alike come together, in another order than their own.
    """

    factors: Factors
    weights: Tensor
    vectors: Tensor
    positions: slice | Tensor


class CurvatureData:
    """Weighted data as a re-iterable sequence of :class:`WeightedFactors`.

    Random vectors are drawn once for all data, so that every pass and every chunk size sees the same.

    Args:
        network: The model with its blocks.
        data: What to iterate over.
        likelihood: Gives the square root of the loss Hessian.
        mc_samples: Random vectors for each datum; ``None`` for the exact square root.
        curvature: ``"ggn"``, or ``"empirical_fisher"``: the gradient at the data's own targets as the only vector,
            which is no approximation of the Hessian (Kunstner, Balles, Hennig, arXiv 1905.12558).
        generator: Source of the random vectors, on the CPU.
        chunk_size: Data at a time; ``None`` chooses by :data:`CHUNK_MEMORY`.
        progress: Called with the number of data after each chunk.
    """

    def __init__(
        self,
        network: Network,
        data: WeightedData,
        likelihood: Likelihood,
        *,
        mc_samples: int | None = None,
        curvature: str = "ggn",
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        if curvature not in CURVATURE_VECTORS:
            raise ValueError(f"Expected a curvature out of {list(CURVATURE_VECTORS)}, got {curvature!r}.")
        self.network, self.data, self.likelihood, self.progress = network, data, likelihood, progress
        self.curvature = curvature
        _checks.chunk_size(chunk_size)
        self._chosen = chunk_size
        self.chunk_size = chunk_size or network.chunk_size(CHUNK_MEMORY, network.vector_chunk, inputs=data.inputs)
        self.uniforms: Tensor | None = None
        if mc_samples is not None and curvature == "ggn":
            shape = (len(data), mc_samples, network.n_outputs)
            # Open interval: the inverse normal distribution is infinite at zero.
            self.uniforms = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_min_(1e-12)

    def slices(self, chunks: int = 1) -> list[slice | Tensor]:
        """The data, so many chunks of data that are alike at a time."""
        return list(_data.chunks(self.data.inputs, chunks * self.chunk_size))

    def take(self, part: Tensor | slice) -> CurvatureData:
        """Some of the data, with the same random vectors."""
        taken = copy.copy(self)
        taken.data = self.data.take(part)
        taken.uniforms = None if self.uniforms is None else self.uniforms[part]
        return taken

    def for_all_vectors(self) -> CurvatureData:
        """The same data in chunks so small that the back-propagated vectors of all blocks fit :data:`CHUNK_MEMORY`."""
        taken = copy.copy(self)
        n_vectors = 1 if self.curvature == "empirical_fisher" else self.network.n_outputs
        if self.uniforms is not None:
            n_vectors = self.uniforms.shape[1]
        inputs = self.data.inputs
        taken.chunk_size = self._chosen or self.network.chunk_size(CHUNK_MEMORY, n_vectors, inputs=inputs)
        return taken

    def __len__(self) -> int:
        """Number of data."""
        return len(self.data)

    def __iter__(self) -> Iterator[WeightedFactors]:
        for part in self.slices():
            data = self.data.take(part)
            factors = self.network.factors(data.inputs)
            vectors = self._vectors(factors.outputs.to(self.network.dtype), data.targets, part)
            yield WeightedFactors(factors, data.weights, vectors * data.weights.to(vectors).sqrt()[:, None], part)
            if self.progress is not None:
                self.progress(len(data))

    def _vectors(self, outputs: Tensor, targets: Tensor, part: slice | Tensor) -> Tensor:
        """The vectors of a chunk before they are weighted, ``[V, N, C]``."""
        targets = targets.to(outputs.device)
        if self.curvature == "empirical_fisher":
            return self.likelihood.gradient(outputs, targets)[None]
        if self.uniforms is None:
            return self.likelihood.hessian_square_root(outputs, targets)
        return self.likelihood.sampled_square_root(outputs, targets, self.uniforms[part].to(outputs.device))
