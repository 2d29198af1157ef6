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

    Random vectors are drawn once for all data, so that every pass and every chunk size sees the same; those of dense
    outputs, which would not fit, again whenever they are needed, from a seed of every datum.

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
        self.mc_samples = mc_samples if curvature == "ggn" else None
        self.uniforms: Tensor | None = None
        self.seeds: Tensor | None = None
        if self.mc_samples is not None and network.sites is not None:
            base = torch.randint(2**62, (1,), generator=generator)
            self.seeds = base + torch.arange(len(data))
        elif self.mc_samples is not None:
            shape = (len(data), self.mc_samples, network.n_outputs)
            # Open interval: the inverse normal distribution is infinite at zero.
            self.uniforms = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_min_(1e-12)

        #: Vectors that every datum gets, zeros after its own: exact ones of dense outputs are as many as its sites.
        self._n_vectors: int | None = None
        if self.mc_samples is None and network.sites is not None and isinstance(data.inputs, _data.Assorted):
            self._n_vectors = max(network.outputs(_data.some(part, 1)).shape[1] for part in data.inputs.parts)

    def slices(self, chunks: int = 1) -> list[slice | Tensor]:
        """The data, so many chunks of data that are alike at a time."""
        return list(_data.chunks(self.data.inputs, chunks * self.chunk_size))

    def take(self, part: Tensor | slice) -> CurvatureData:
        """Some of the data, with the same random vectors."""
        taken = copy.copy(self)
        taken.data = self.data.take(part)
        taken.uniforms = None if self.uniforms is None else self.uniforms[part]
        taken.seeds = None if self.seeds is None else self.seeds[part]
        return taken

    def for_all_vectors(self) -> CurvatureData:
        """The same data in chunks so small that the back-propagated vectors of all blocks fit :data:`CHUNK_MEMORY`."""
        taken = copy.copy(self)
        n_vectors = 1 if self.curvature == "empirical_fisher" else self.mc_samples or self.network.row_size
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
            factors.counted = self.likelihood.counted(data.targets)
            yield WeightedFactors(factors, data.weights, vectors * data.weights.to(vectors).sqrt()[:, None], part)
            if self.progress is not None:
                self.progress(len(data))

    def _vectors(self, outputs: Tensor, targets: _data.Inputs, part: slice | Tensor) -> Tensor:
        """The vectors of a chunk before they are weighted, ``[V, N, C]``."""
        if isinstance(targets, _data.Assorted):
            shapes = [tuple(part.shape[1:]) for part in targets.parts]
            raise ValueError(
                f"Expected targets of one shape for inputs that are alike, got some of shapes {shapes}. Give every "
                "datum a target for each site of its outputs."
            )
        targets = targets.to(outputs.device)
        if self.curvature == "empirical_fisher":
            return self.likelihood.gradient(outputs, targets)[None]
        if self.mc_samples is None:
            root = self.likelihood.hessian_square_root(outputs, targets)
            missing = 0 if self._n_vectors is None else self._n_vectors - len(root)
            return torch.cat([root, root.new_zeros(missing, *root.shape[1:])]) if missing else root
        uniforms = self._drawn(part, outputs.shape[1]) if self.uniforms is None else self.uniforms[part]
        return self.likelihood.sampled_square_root(outputs, targets, uniforms.to(outputs.device))

    def _drawn(self, part: slice | Tensor, n_entries: int) -> Tensor:
        """Random numbers of dense outputs, ``[n, M, S * C]``, from the seeds of the data."""
        assert self.seeds is not None and self.mc_samples is not None
        drawn = [
            torch.rand(self.mc_samples, n_entries, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in self.seeds[part].tolist()
        ]
        return torch.stack(drawn).clamp_min_(1e-12)
