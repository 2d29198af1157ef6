r"""Predictions without Jacobians: equation (4), linearised samples, weight samples.

.. math::
    \mathrm{Cov}[f_n] = Z_n^\top \mathrm{diag}\Big(\frac{1}{\beta\lambda + \delta}\Big) Z_n
    \;\Big( + \frac{J_n J_n^\top - Z_n^\top Z_n}{\delta} \Big), \qquad Z_n = U^\top J_n^\top      \tag{4}

Memory: C back-propagated vectors at the outputs of every layer for as many data as ``CHUNK_MEMORY``
allows, plus ``PROJECTION_MEMORY`` for the projections of one block. Never a Jacobian.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import BaseTorchFunctionMode

from debiased_laplace import _checks, _data
from debiased_laplace._guards import evaluation_mode
from debiased_laplace.basis import KroneckerBasis, ProjectedGradients
from debiased_laplace.gradients import CHUNK_MEMORY, Network
from debiased_laplace.likelihoods import unit_vectors
from debiased_laplace.posterior import Posterior


def functional_moments(
    network: Network,
    posteriors: Posterior | Sequence[Posterior],
    inputs: _data.Inputs,
    *,
    covariance: bool = True,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Mean and (co)variance of the linearised outputs, equation (4).

    Args:
        network: The model with its blocks.
        posteriors: One posterior, or several that differ in everything but the basis (a grid of prior
            precisions, say); they share all projections.
        inputs: N data.
        covariance: The covariance between outputs, or their variances alone (cheaper).
        chunk_size: Data at a time; ``None`` bounds the memory by ``CHUNK_MEMORY``.

    Returns:
        ``f: [N, C]`` and ``[N, C, C]`` or ``[N, C]``; for several posteriors with a leading ``[R]``.
        Epistemic variance alone, in squared units of the outputs: no observation noise.
    """
    several = not isinstance(posteriors, Posterior)
    grid = [posteriors] if isinstance(posteriors, Posterior) else list(posteriors)
    basis = grid[0].basis
    scales = basis.split(torch.stack([p.precisions for p in grid]).reciprocal().to(network.dtype))
    complement = None
    if not basis.complete:
        per_block = torch.stack([p.prior_precision.expand(len(basis.parts)) for p in grid])
        complement = per_block.reciprocal().to(network.device, network.dtype)
    _checks.chunk_size(chunk_size)
    if chunk_size is None:
        chunk_size = network.chunk_size(CHUNK_MEMORY, network.n_outputs)
    means, spreads = [], []
    for part in _data.slices(_data.count(inputs), chunk_size):
        mean, projections = _project(network, basis.parts, _data.take(inputs, part))
        spread = torch.zeros(())
        for index, (projected, raw) in enumerate(projections):
            contract = ProjectedGradients.covariances if covariance else ProjectedGradients.variances
            spread = spread.to(mean.device) + contract(projected, scales[index])
            if complement is not None and raw is not None:
                ones = torch.ones(1, *raw.shape, device=mean.device, dtype=network.dtype)
                inside = torch.ones(1, *basis.parts[index].shape, device=mean.device, dtype=network.dtype)
                outside = contract(raw, ones) - contract(projected, inside)
                spread = spread + complement[:, index].view(-1, *[1] * (outside.ndim - 1)) * outside
        means.append(mean)
        spreads.append(spread)
    mean, spread = torch.cat(means), torch.cat(spreads, 1)
    return mean, spread if several else spread[0]


def joint_covariance(network: Network, posterior: Posterior, inputs: _data.Inputs) -> tuple[Tensor, Tensor]:
    """Outputs ``[N * C]`` and their covariance over all data and outputs, ``[N * C, N * C]``.

    Holds one block's projections of all data at a time, ``N * C * size`` numbers.
    """
    basis = posterior.basis
    if not basis.complete:
        raise NotImplementedError("The joint covariance needs a complete basis. Use joint=False for this structure.")
    scales = posterior.precisions.rsqrt().to(network.dtype).split(basis.sizes)
    mean, projections = _project(network, basis.parts, inputs)
    covariance = mean.new_zeros(mean.numel(), mean.numel())
    for scale, (projected, _) in zip(scales, projections, strict=True):
        rows = projected.rows().flatten(0, 1) * scale
        covariance += rows @ rows.mT
    return mean.flatten(), covariance


def linearized_samples(network: Network, mean: Tensor, deviations: Tensor, inputs: _data.Inputs) -> Tensor:
    r"""Outputs of the linearised network, :math:`f(\theta^*) + J (\theta - \theta^*)`, at given deviations.

    Forward-mode products: the cost does not depend on the number of outputs, which makes it the way for
    many outputs (Immer et al., arXiv 2008.08400). With deviations sampled from a posterior the results are
    samples of the same Gaussian that :func:`functional_moments` describes, jointly over all data.

    Args:
        network: The model with its blocks.
        mean: ``[D]``, the parameters to linearise at.
        deviations: ``[M, D]``, from :meth:`Posterior.deviations`; the same for several inputs share the draws.
        inputs: N data.

    Returns:
        ``[M, N, C]``.
    """
    inputs = _data.to_device(inputs, network.device)
    parameters = network.from_vector(mean)

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return network.call(parameters, inputs)

    samples = []
    # Fused attention has no forward-mode derivative: the plain kernels have, and any mode turns off the fused layers.
    plain_attention = sdpa_kernel(SDPBackend.MATH), BaseTorchFunctionMode()
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.no_grad(), evaluation_mode(network.model), *plain_attention):
            stack.enter_context(context)
        for deviation in deviations:
            value, change = torch.func.jvp(outputs, (parameters,), (network.from_vector(deviation),))[:2]
            samples.append(value + change)
    return torch.stack(samples)


def weight_samples(network: Network, mean: Tensor, deviations: Tensor, inputs: _data.Inputs) -> Tensor:
    """Outputs of the network itself at ``mean + deviations``, ``[M, N, C]``; nothing is written into the model."""
    inputs = _data.to_device(inputs, network.device)
    with torch.no_grad(), evaluation_mode(network.model):
        return torch.stack([network.call(network.from_vector(mean + d), inputs) for d in deviations])


def _project(
    network: Network, parts: Sequence[KroneckerBasis], inputs: _data.Inputs
) -> tuple[Tensor, Iterator[tuple[ProjectedGradients, ProjectedGradients | None]]]:
    """Outputs, and block after block the projected unit vectors (with the raw ones where a block is incomplete)."""
    factors = network.factors(inputs)
    n_outputs = factors.outputs.shape[1]
    gathered: list[list[Tensor]] = [[] for _ in network.blocks]
    for _, vectors in factors.backpropagate(unit_vectors(factors.outputs), network.vector_chunk):
        for own, g in zip(gathered, vectors, strict=True):
            own.append(g)

    def blocks() -> Iterator[tuple[ProjectedGradients, ProjectedGradients | None]]:
        for index, (block, part) in enumerate(zip(network.blocks, parts, strict=True)):
            vectors = gathered[index][0] if len(gathered[index]) == 1 else torch.cat(gathered[index], 2)
            gathered[index] = []
            a = factors.inputs(block)
            raw = None if part.complete else ProjectedGradients(a, vectors)
            yield part.project_gradients(part.prepare_inputs(a, n_outputs), vectors), raw

    return factors.outputs.to(network.dtype), blocks()
