r"""Predictions of dense outputs: of every site by itself, without a backward pass for each of its outputs.

A datum has S sites with C outputs each, and predictions are about a site at a time: its covariance ``[C, C]`` is a
block of that of the datum. Two ways:

* **linearised samples**, :math:`f(\theta^*) + J (\theta - \theta^*)`: one forward-mode pass for each draw whatever the
  number of sites and outputs (Immer et al., arXiv 2008.08400). Means, means of probabilities and second moments are
  summed draw by draw, so that memory does not depend on the number of draws.
* **in closed form**: the moments of chosen sites by C vectors each, equation (4). Where the sites are the positions of
  the only uncertain layer (a last layer: linear over tokens, a convolution over pixels), a site is a datum with one
  position, its gradients are unit vectors times the layer's inputs there, and nothing is back-propagated.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.likelihoods import Likelihood, unit_vectors
from debiased_laplace.network.gradients import CHUNK_MEMORY
from debiased_laplace.network.network import Network
from debiased_laplace.network.selected import LayerInputs
from debiased_laplace.posterior.gaussian import Posterior, standard_normals
from debiased_laplace.posterior.prediction import PREDICTION_METHODS, Predictive, noise_of_certain_outputs
from debiased_laplace.posterior.predictive import UnitGradients, linearized_changes, moments_of_gradients

logger = logging.getLogger(__name__)

#: Outputs of a site up to which covariances between them are computed in closed form.
MAX_COVARIANCE_OUTPUTS = 64

#: Bytes that covariances of a prediction may take.
COVARIANCE_MEMORY = 2**30


def site_shape(network: Network, inputs: _data.Inputs) -> tuple[int, ...]:
    """Shape of the sites of these data, such as ``(H, W)``, by a forward pass of one."""
    assert network.sites is not None
    with torch.no_grad():
        return network.sites.shape(network.factors(_data.some(inputs, 1)).returned.shape)


def site_gradients(
    network: Network, inputs: _data.Inputs, sites: Tensor, chunk_size: int | None = None, *, formed: bool = False
) -> Iterator[tuple[UnitGradients, Tensor]]:
    """Gradients of the outputs of chosen sites, and which of them they are of, ``[n]``; -1 for no chosen one.

    Args:
        network: One with dense outputs.
        inputs: N data.
        sites: ``[N, m]``, of every datum, or -1 for none; numbers of the result are positions in it, flattened.
        chunk_size: Data at a time; ``None`` bounds the memory by ``CHUNK_MEMORY``.
        formed: Whether gradients with several positions will be formed.
    """
    if chunk_size is None:
        chunk_size = network.chunk_size(CHUNK_MEMORY, network.n_outputs, formed=formed, inputs=inputs)
    numbers = torch.arange(sites.numel()).reshape(sites.shape)
    for part in _data.slices(len(sites), chunk_size):
        factors = network.factors(_data.take(inputs, part))
        outputs = factors.outputs.to(network.dtype).unflatten(1, (-1, network.n_outputs))
        data = torch.arange(len(outputs))
        if network.sites_are_positions:
            every, which = sites[part].flatten(), numbers[part].flatten()
            rows, columns = data.repeat_interleave(sites.shape[1])[every >= 0], every[every >= 0]
            yield _at_positions(network, factors.inputs(network.blocks[0]), outputs, rows, columns), which[every >= 0]
            continue
        for one, which in zip(sites[part].T, numbers[part].T, strict=True):
            if not bool((one >= 0).any()):
                continue
            vectors = outputs.new_zeros(network.n_outputs, *outputs.shape)
            columns = one.clamp_min(0)
            vectors[:, data, columns] = unit_vectors(outputs[:, 0])
            back = factors.backpropagate_all(vectors.flatten(2), again=True)
            yield UnitGradients(outputs[data, columns], factors.inputs, back, False), which.where(one >= 0, -1)


def _at_positions(
    network: Network, inputs: LayerInputs, outputs: Tensor, rows: Tensor, columns: Tensor
) -> UnitGradients:  # fmt: skip
    """Gradients at the positions of the only layer: its inputs there, and unit vectors."""
    assert isinstance(inputs, Tensor)
    at = inputs[:, 0].mT[rows, columns]  # [n, I]
    units = torch.eye(network.n_outputs, dtype=network.dtype, device=network.device)[None, None, :, :, None]
    return UnitGradients(outputs[rows, columns], lambda _: at[:, None, :, None], [units], True)


def site_moments(
    network: Network, posteriors: Sequence[Posterior], inputs: _data.Inputs, sites: Tensor, *,
    covariance: bool = True, chunk_size: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Chunk after chunk which of the chosen sites, ``[n]``, their outputs ``[n, C]`` and (co)variances ``[R, n, ...]``.

    Args:
        network: One with dense outputs.
        posteriors: R of the same parameters.
        inputs: N data.
        sites: ``[N, m]``, of every datum, or -1 for none.
        covariance: Covariances between the outputs of a site, or their variances alone.
        chunk_size: Data at a time.
    """
    positions: list[Tensor] = []

    def gradients(formed: bool) -> Iterator[UnitGradients]:
        for of_sites, which in site_gradients(network, inputs, sites, chunk_size, formed=formed):
            positions.append(which)
            yield of_sites

    for mean, moments in moments_of_gradients(network, posteriors, gradients, covariance=covariance):
        chosen = positions[-1] >= 0
        yield positions[-1][chosen], mean[chosen], moments[:, chosen]


def has_closed_form(network: Network, likelihood: Likelihood, link: str) -> bool:
    """Whether predictions of all sites need no backward pass, with this link."""
    cheap = not likelihood.needs_covariance(link) or network.n_outputs <= MAX_COVARIANCE_OUTPUTS
    return network.sites_are_positions and cheap


def predict_sites(
    network: Network, posterior: Posterior, likelihood: Likelihood, inputs: Any, *, method: str | None = None,
    link: str = "probit", n_samples: int = 100, output_temperature: float = 1.0, covariance: bool = False,
    generator: torch.Generator | None = None, top_k: int | None = None,
) -> Predictive:  # fmt: skip
    """The predictive distributions of the targets of all sites of N data, in the layout of the model's outputs.

    Args:
        network: One with dense outputs.
        posterior: The Gaussian over its parameters.
        likelihood: What the outputs mean.
        inputs: N data.
        method: ``"linearized"`` or ``"nn"``, samples; ``"glm"``, in closed form, with a backward pass for each output
            of each site unless :func:`has_closed_form`. By default ``"glm"`` where that is so, or else
            ``"linearized"``.
        link: How to integrate over Gaussian outputs, of ``"glm"``.
        n_samples: Draws for ``link="mc"`` and of the methods that sample.
        output_temperature: What outputs are divided by before the link.
        covariance: Also the covariance between the outputs of every site, ``[N, S, C, C]``.
        generator: Source of the draws.
        top_k: For outputs ``[N, C]`` alone.

    Returns:
        Means and variances ``[N, C, ...]`` or ``[N, ..., C]``; of each site by itself.

    Raises:
        ValueError: For an unknown method or link, or covariances that would take more than
            :data:`COVARIANCE_MEMORY`.
    """
    assert network.sites is not None
    site = likelihood.site
    if top_k is not None or method == "top_k":
        raise ValueError(
            "Expected outputs [N, C] for method='top_k', got dense ones, which would need k backward passes for each "
            "site. Use method='linearized', or 'glm' for the exact moments."
        )
    if method is None:
        method = "glm" if has_closed_form(network, site, link) else "linearized"
        if method == "linearized":
            logger.info(
                "Predictions of dense outputs are linearised samples (method='linearized'): exact ones cost a backward "
                "pass for each of the %d outputs of each site. For those use method='glm'.", network.n_outputs,
            )  # fmt: skip
    if method not in PREDICTION_METHODS:
        raise ValueError(f"Expected a method out of {list(PREDICTION_METHODS)}, got {method!r}.")
    inputs, n = _data.to_device(inputs, network.device), _data.count(inputs)
    if not n:
        none = torch.zeros(0, network.n_outputs, dtype=network.dtype, device=network.device)
        return Predictive(site.inverse_link(none), None, None, none, none, None, site.has_answers)
    shape = site_shape(network, inputs)
    n_covariances = n * math.prod(shape) * network.n_outputs**2
    needed = n_covariances * torch.finfo(network.dtype).bits // 8
    if covariance and needed > COVARIANCE_MEMORY:
        raise ValueError(
            f"Expected covariances of at most {COVARIANCE_MEMORY / 1e9:.1f} GB, got {n} data with {math.prod(shape)} "
            f"sites of {network.n_outputs} outputs each, for which they need {needed / 1e9:.1f} GB. Predict fewer data "
            "at a time, or use the variances alone."
        )
    if method == "glm":
        rows = _in_closed_form(
            network, posterior, site, inputs, math.prod(shape), link=link, n_samples=n_samples, tau=output_temperature,
            covariance=covariance, generator=generator,
        )  # fmt: skip
    else:
        rows = _by_samples(
            network, posterior, site, inputs, linearized=method == "linearized", n_samples=n_samples,
            tau=output_temperature, covariance=covariance, generator=generator,
        )  # fmt: skip
    names = ("mean", "epistemic_variance", "noise_variance", "outputs_mean", "outputs_variance")
    restored: dict[str, Any] = {
        name: network.sites.restored(values.reshape(n, math.prod(shape), -1), shape)
        for name in names if (values := getattr(rows, name)) is not None
    }  # fmt: skip
    if rows.outputs_covariance is not None:
        restored["outputs_covariance"] = rows.outputs_covariance.unflatten(0, (n, -1))
    return replace(rows, **restored)


def _in_closed_form(
    network: Network, posterior: Posterior, likelihood: Likelihood, inputs: _data.Inputs, n_sites: int, *, link: str,
    n_samples: int, tau: float, covariance: bool, generator: torch.Generator | None,
) -> Predictive:  # fmt: skip
    """By the moments of every site, chunk after chunk.

    Args:
        network: One with dense outputs.
        posterior: The Gaussian over its parameters.
        likelihood: Of one site.
        inputs: N data.
        n_sites: S.
        link: How to integrate over Gaussian outputs.
        n_samples: Draws for ``link="mc"``, shared by all sites.
        tau: What outputs are divided by before the link.
        covariance: Also covariances between the outputs of a site.
        generator: Source of the draws.
    """
    likelihood.check_link(link)
    n, needed = _data.count(inputs), likelihood.needs_covariance(link)
    normals = None
    if link == "mc":
        normals = standard_normals((n_samples, network.n_outputs), posterior.mean, generator)
    sites = torch.arange(n_sites).expand(n, n_sites)
    chunks: dict[str, list[Tensor]] = {}
    order: list[Tensor] = []
    for which, mean, (moments,) in site_moments(network, [posterior], inputs, sites, covariance=needed or covariance):
        variance = moments.diagonal(dim1=1, dim2=2) if needed or covariance else moments
        scaled = mean / tau, (moments if needed else variance) / tau**2
        of_chunk = {"outputs_mean": mean, "outputs_variance": variance}
        of_chunk["mean"] = likelihood.predictive(*scaled, link, normals)
        if likelihood.has_variance:
            of_targets = likelihood.predictive_moments(*scaled, link, normals, posterior.noise_variance)
            of_chunk["epistemic_variance"] = of_targets.epistemic_variance
            of_chunk["noise_variance"] = of_targets.noise_variance
        if covariance:
            of_chunk["outputs_covariance"] = moments
        for name, values in of_chunk.items():
            chunks.setdefault(name, []).append(values)
        order.append(which)
    in_order = torch.cat(order).argsort().to(network.device)
    every: dict[str, Any] = dict.fromkeys(("epistemic_variance", "noise_variance"))
    every |= {name: torch.cat(parts)[in_order] for name, parts in chunks.items()}
    return Predictive(**every, has_probabilities=likelihood.has_answers)


def _by_samples(
    network: Network, posterior: Posterior, likelihood: Likelihood, inputs: _data.Inputs, *, linearized: bool,
    n_samples: int, tau: float, covariance: bool, generator: torch.Generator | None,
) -> Predictive:  # fmt: skip
    """By draws of the parameters, of which one at a time is held.

    Args:
        network: One with dense outputs.
        posterior: The Gaussian over its parameters.
        likelihood: Of one site.
        inputs: N data.
        linearized: Of the linearised network, or of the network itself.
        n_samples: M.
        tau: What outputs are divided by before the link.
        covariance: Also covariances between the outputs of a site.
        generator: Source of the draws.
    """
    c = network.n_outputs
    parts = list(_data.slices(_data.count(inputs), network.chunk_size(CHUNK_MEMORY, 2, inputs=inputs)))
    at_mean = [network.outputs(_data.take(inputs, part)).to(network.dtype).reshape(-1, c) for part in parts]
    link_at_mean = [likelihood.inverse_link(f / tau) for f in at_mean]
    # Sums of differences from what is there at the mean, and of their squares.
    totals = [[torch.zeros_like(f), torch.zeros_like(f), torch.zeros_like(p), torch.zeros_like(p)]
              for f, p in zip(at_mean, link_at_mean, strict=True)]  # fmt: skip
    products = [f.new_zeros(len(f), c, c) for f in at_mean] if covariance else []
    noises: list[Tensor | None] = [None] * len(parts)
    for _ in range(n_samples):
        deviation = posterior.deviations(1, generator)
        for index, (part, f, p, sums) in enumerate(zip(parts, at_mean, link_at_mean, totals, strict=True)):
            change = _change(network, posterior, deviation, _data.take(inputs, part), linearized).reshape(-1, c)
            change = change.to(f) if linearized else change.to(f) - f
            there = likelihood.inverse_link((f + change) / tau) - p
            for total, value in zip(sums, (change, change.square(), there, there.square()), strict=True):
                total += value
            if covariance:
                products[index] += change[:, :, None] * change[:, None]
            if likelihood.has_variance:
                noise = noise_of_certain_outputs(likelihood, (f + change) / tau, posterior.noise_variance)
                before = noises[index]
                noises[index] = noise if before is None else before + noise
    spread = n_samples - 1 if n_samples > 1 else math.nan
    means = [p + s[2] / n_samples for p, s in zip(link_at_mean, totals, strict=True)]
    epistemic = [((s[3] - s[2].square() / n_samples) / spread).clamp_min(0) for s in totals]
    of_targets = [total / n_samples for total in noises if total is not None]
    if linearized:  # the outputs' mean is known
        at, variances, covariances = at_mean, [s[1] / n_samples for s in totals], [t / n_samples for t in products]
    else:
        at = [f + s[0] / n_samples for f, s in zip(at_mean, totals, strict=True)]
        variances = [((s[1] - s[0].square() / n_samples) / spread).clamp_min(0) for s in totals]
        outer = [s[0][:, :, None] * s[0][:, None] / n_samples for s in totals]
        covariances = [(total - of_mean) / spread for total, of_mean in zip(products, outer, strict=False)]
    return Predictive(
        mean=torch.cat(means),
        epistemic_variance=None if likelihood.has_answers else torch.cat(epistemic),
        noise_variance=torch.cat(of_targets) if of_targets and not likelihood.has_answers else None,
        outputs_mean=torch.cat(at),
        outputs_variance=torch.cat(variances),
        outputs_covariance=torch.cat(covariances) if covariance else None,
        has_probabilities=likelihood.has_answers,
    )


def _change(
    network: Network, posterior: Posterior, deviation: Tensor, inputs: _data.Inputs, linearized: bool
) -> Tensor:  # fmt: skip
    """The linear change of the outputs along a deviation ``[1, D]``; or the outputs there."""
    if linearized:
        ((_, change),) = linearized_changes(network, posterior.mean, deviation, inputs)
        return change
    with torch.no_grad():
        moved = posterior.mean + network.without_padding(deviation[0])
        return network.call(network.from_vector(moved), inputs)
