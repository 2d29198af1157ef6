r"""Predictions without Jacobians: equation (4), linearised samples, weight samples.

.. math::
    \mathrm{Cov}[f_n] = Z_n^\top \mathrm{diag}\Big(\frac{1}{\beta\lambda + \delta}\Big) Z_n
    \;\Big( + \frac{J_n J_n^\top - Z_n^\top Z_n}{\delta} \Big), \qquad Z_n = U^\top J_n^\top      \tag{4}

The second term, of an incomplete basis, is a small difference of large numbers where the gradients lie nearly in the
span of the basis: it is computed in the precision of the basis, which is float64 for low-rank ones.

Memory: C back-propagated vectors at the outputs of every layer for as many data as ``CHUNK_MEMORY``
allows, plus ``PROJECTION_MEMORY`` for the projections of one block. Never a Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from debiased_laplace import _checks, _data
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.block_gradients import BlockGradients
from debiased_laplace.curvature.parts.part import Projected
from debiased_laplace.likelihoods import unit_vectors
from debiased_laplace.network.blocks import Block, unflatten
from debiased_laplace.network.forward_mode import PlainAttention, jvp
from debiased_laplace.network.gradients import CHUNK_MEMORY
from debiased_laplace.network.network import Network
from debiased_laplace.network.selected import LayerInputs
from debiased_laplace.posterior.gaussian import Posterior


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
        posteriors: One posterior, or several of the same parameters: they share the backward passes, and those of one
            basis (a grid of prior precisions, say) all projections.
        inputs: N data.
        covariance: The covariance between outputs, or their variances alone (cheaper).
        chunk_size: Data at a time; ``None`` bounds the memory by ``CHUNK_MEMORY``.

    Returns:
        ``f: [N, C]`` and ``[N, C, C]`` or ``[N, C]``; for several posteriors with a leading ``[R]``.
        Epistemic variance alone, in squared units of the outputs: no observation noise.
    """
    if isinstance(inputs, _data.Assorted):
        moments = [
            functional_moments(network, posteriors, part, covariance=covariance, chunk_size=chunk_size)
            for part in inputs.parts
        ]
        dim = 0 if isinstance(posteriors, Posterior) else 1
        every = [torch.cat([of_part[index] for of_part in moments], index * dim) for index in (0, 1)]
        return inputs.in_order(every[0]), inputs.in_order(every[1], dim)
    several = not isinstance(posteriors, Posterior)
    grid = [posteriors] if isinstance(posteriors, Posterior) else posteriors
    if not _data.count(inputs):
        none = torch.zeros(0, network.n_outputs, dtype=network.dtype, device=network.device)
        nothing = torch.diag_embed(none) if covariance else none
        return none, nothing.expand(len(posteriors), *nothing.shape) if isinstance(posteriors, Sequence) else nothing
    means, chunks = zip(
        *moments_of_gradients(
            network, grid, lambda dense: _unit_gradients(network, inputs, chunk_size, dense, covariance),
            covariance=covariance,
        ), strict=True,
    )  # fmt: skip
    covariances = torch.cat(chunks, 1)
    return torch.cat(means), covariances if several else covariances[0]


def moments_of_gradients(
    network: Network, posteriors: Sequence[Posterior], gradients: GradientSource, *, covariance: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunk after chunk the outputs ``[n, C]`` and their (co)variances, ``[R, n, C, C]`` or ``[R, n, C]``.

    Args:
        network: The model with its blocks.
        posteriors: R of the same parameters.
        gradients: Of the outputs that are wanted, in chunks; called with whether gradients are formed.
        covariance: The covariance between outputs, or their variances alone.
    """
    grid = [p.normal_form for p in posteriors]
    groups: dict[int, list[int]] = {}
    for index, posterior in enumerate(grid):
        groups.setdefault(id(posterior.gradient_basis), []).append(index)
    order = torch.tensor([index for group in groups.values() for index in group]).argsort()
    for mean, of_bases in _part_moments(
        network, [[grid[index] for index in group] for group in groups.values()], gradients, covariance=covariance
    ):
        parts = [sum(parts, torch.zeros((), device=mean.device)).to(network.dtype) for parts in of_bases]
        yield mean, torch.cat(parts)[order]


def part_variances(
    network: Network,
    posterior: Posterior,
    inputs: _data.Inputs,
    prior_precisions: Tensor,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Mean, and what every part of the basis adds to the variances of the linearised outputs.

    Equation (4) is a sum over the parts, and each term depends on the prior precision of its own part alone: with a
    table over R values for every part the variances for any of the :math:`R^{n_{parts}}` combinations are sums.

    Args:
        network: The model with its blocks.
        posterior: Its prior precision has no effect.
        inputs: N data.
        prior_precisions: ``[R]``, each for the parts and, of an incomplete basis, the rest of their blocks' parameters.
        chunk_size: Data at a time; ``None`` bounds the memory by ``CHUNK_MEMORY``.

    Returns:
        ``f: [N, C]`` and ``[R, n_parts, N, C]``, in squared units of the outputs; projections are computed once.
    """
    means, variances = zip(
        *part_variances_of_gradients(
            network, posterior, lambda dense: _unit_gradients(network, inputs, chunk_size, dense, False),
            prior_precisions,
        ), strict=True,
    )  # fmt: skip
    return torch.cat(means), torch.cat(variances, 2)


def part_variances_of_gradients(
    network: Network, posterior: Posterior, gradients: GradientSource, prior_precisions: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunk after chunk the outputs ``[n, C]`` and what :func:`part_variances` returns."""
    grid = [replace(posterior, prior_precision=p.reshape(1)) for p in _checks.prior_precisions(prior_precisions)]
    for mean, (parts,) in _part_moments(network, [[p.normal_form for p in grid]], gradients, covariance=False):
        yield mean, torch.stack([part.to(network.dtype) for part in parts], 1)


@dataclass(frozen=True)
class UnitGradients:
    """Factors of the gradients of some outputs.

    Attributes:
        outputs: ``[n, C]``.
        inputs: Those of a block, ``a: [n, G, I, S]``.
        vectors: Unit vectors, back-propagated to every block, ``g: [n, G, C, O, S]`` or ``[1, G, C, O, 1]``; emptied
            when they have been used.
        unit: Whether they are still unit vectors there.
    """

    outputs: Tensor
    inputs: Callable[[Block], LayerInputs]
    vectors: list[Tensor]
    unit: bool


#: Gradients in chunks, given whether any part forms gradients with several positions.
GradientSource = Callable[[bool], Iterable[UnitGradients]]


def _unit_gradients(
    network: Network, inputs: _data.Inputs, chunk_size: int | None, dense: bool, covariance: bool
) -> Iterator[UnitGradients]:
    """Those of all outputs of the data."""
    _checks.chunk_size(chunk_size)
    if chunk_size is None:
        shared = network.is_head and not covariance  # its unit vectors are the same for all data
        chunk_size = network.chunk_size(CHUNK_MEMORY, 0 if shared else network.row_size, formed=dense, inputs=inputs)
    for chunk in _data.slices(_data.count(inputs), chunk_size):
        yield gradients_of(network, _data.take(inputs, chunk))


def gradients_of(network: Network, inputs: _data.Inputs) -> UnitGradients:
    """Gradients of all outputs of some data, by one forward pass and one set of backward passes."""
    factors = network.factors(inputs)
    inputs_of, vectors = factors.gradients(unit_vectors(factors.outputs))
    return UnitGradients(factors.outputs.to(network.dtype), inputs_of, vectors, network.is_head)


def _part_moments(
    network: Network, grids: Sequence[Sequence[Posterior]], gradients: GradientSource, *, covariance: bool
) -> Iterator[tuple[Tensor, Iterator[Iterator[Tensor]]]]:
    """Chunk after chunk the outputs ``[n, C]``, and for every basis part after part its (co)variances.

    Args:
        network: The model with its blocks.
        grids: For every basis R posteriors in their normal forms.
        gradients: Of the outputs, in chunks.
        covariance: The covariance between outputs, ``[R, n, C, C]``, or their variances alone, ``[R, n, C]``.
    """
    bases = [grid[0].gradient_basis for grid in grids]
    scales = [
        basis.split(torch.stack([p.precisions for p in grid]).reciprocal())
        for basis, grid in zip(bases, grids, strict=True)
    ]
    priors = [None if basis.complete else _prior_variances(grid) for basis, grid in zip(bases, grids, strict=True)]

    def contracted(which: int, projections: Iterator[tuple[Projected, list[BlockGradients]]]) -> Iterator[Tensor]:
        for index, (projected, raw) in enumerate(projections):
            contract = projected.covariances if covariance else projected.variances
            inverse_precisions, of_prior = scales[which][index], priors[which]
            if not raw or of_prior is None:
                yield contract(inverse_precisions)
                continue
            along, prior = of_prior[index]  # J J^T / delta - Z^T (1 / delta - h) Z, in the precision of the part
            total = -contract(along - inverse_precisions)
            for factors, variance in zip(raw, prior, strict=True):
                total = total + (factors.covariances if covariance else factors.variances)(variance)
            yield total

    for chunk in gradients(any(part.forms_gradients for basis in bases for part in basis.at_rest)):
        projections = _project(network, bases, chunk)
        yield chunk.outputs, (contracted(which, of_basis) for which, of_basis in enumerate(projections))


def _prior_variances(grid: Sequence[Posterior]) -> list[tuple[Tensor, list[Tensor]]]:
    """For every part, the prior variances ``[R, ...]`` along its directions and of the parameters of its blocks."""
    basis = grid[0].basis
    along = basis.split(torch.stack([p.column_prior for p in grid]).reciprocal())
    of_parameters = unflatten(torch.stack([p.parameter_prior for p in grid]).reciprocal(), basis.shapes)
    matrices = [block.gather(of_parameters) for block in basis.blocks]
    return [(of_part, [matrices[i] for i in members]) for of_part, members in zip(along, basis.members, strict=True)]


def joint_covariance(network: Network, posterior: Posterior, inputs: _data.Inputs) -> tuple[Tensor, Tensor]:
    """Outputs ``[N * C]`` and their covariance over all data and outputs, ``[N * C, N * C]``.

    Holds one part's gradients of all data at a time, ``N * C * size`` numbers.
    """
    if not _data.count(inputs):
        none = torch.zeros(0, dtype=network.dtype, device=network.device)
        return none, torch.diag(none)
    posterior = posterior.normal_form
    basis = posterior.gradient_basis
    scales = posterior.precisions.reciprocal().split(basis.sizes)
    priors = None if basis.complete else _prior_variances([posterior])
    gradients = gradients_of(network, inputs)
    mean, (projections,) = gradients.outputs, _project(network, [basis], gradients)
    covariance = torch.zeros(mean.numel(), mean.numel(), device=mean.device, dtype=torch.float64)
    for index, (projected, raw) in enumerate(projections):
        weights = scales[index]
        if raw and priors is not None:
            along, prior = priors[index]
            weights = weights - along.flatten()
            for factors, variance in zip(raw, prior, strict=True):
                rows = factors.rows().flatten(0, 1)
                covariance += (rows * variance.flatten().to(rows.dtype)) @ rows.mT
        rows = projected.rows().flatten(0, 1)
        covariance += (rows * weights.to(rows.dtype)) @ rows.mT
    return mean.flatten(), covariance.to(network.dtype)


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
    return torch.stack([f + change for f, change in linearized_changes(network, mean, deviations, inputs)])


def linearized_changes(
    network: Network, mean: Tensor, deviations: Iterable[Tensor], inputs: _data.Inputs
) -> Iterator[tuple[Tensor, Tensor]]:
    """For every deviation the outputs at the mean and their linear change, ``[N, C]``."""
    inputs = _data.to_device(inputs, network.device)
    parameters = network.from_vector(mean)
    for deviation in deviations:
        with torch.inference_mode(False), torch.no_grad(), PlainAttention():
            yield jvp(lambda p: network.call(p, inputs), parameters, network.from_vector(deviation))


def weight_samples(network: Network, mean: Tensor, deviations: Tensor, inputs: _data.Inputs) -> Tensor:
    """Outputs of the network itself at ``mean + deviations``, ``[M, N, C]``; nothing is written into the model."""
    inputs = _data.to_device(inputs, network.device)
    with torch.no_grad():
        moving = network.without_padding(deviations)
        return torch.stack([network.call(network.from_vector(mean + deviation), inputs) for deviation in moving])


def _project(
    network: Network, bases: Sequence[Basis], gradients: UnitGradients
) -> Iterator[Iterator[tuple[Projected, list[BlockGradients]]]]:
    """For every basis part after part the projected unit vectors.

    With them come the raw ones of its blocks where a part is incomplete. The same gradients serve all bases; the
    projections have to be used in their order.
    """
    vectors = gradients.vectors

    def parts(basis: Basis, last: bool) -> Iterator[tuple[Projected, list[BlockGradients]]]:
        for part, members in zip(basis.parts, basis.members, strict=True):
            a, g = [gradients.inputs(network.blocks[i]) for i in members], [vectors[i] for i in members]
            for i in members if last else ():
                vectors[i] = vectors[i].new_empty(0)
            projected = part.project_gradients(part.prepare_inputs(a, g[0].shape[2]), g, unit=gradients.unit)
            yield projected, part.unprojected(projected, a, g)

    return (parts(basis, basis is bases[-1]) for basis in bases)
