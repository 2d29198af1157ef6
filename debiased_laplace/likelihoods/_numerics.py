r"""Numerics that several likelihoods share: square roots, random signs, and integrals over Gaussian outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

#: Nodes of the Gauss-Hermite quadratures.
NODES = 48
# Newton steps to the mode of an integrand, the largest of them (in the output), and where they end.
_STEPS, _LONGEST, _SHORTEST = 60, 2.0, 1e-9


def random_signs(uniforms: Tensor, like: Tensor) -> Tensor:
    """Random signs, of which every product but squares has mean zero, and squares have no variance at all."""
    return torch.where(uniforms.to(like.device) < 0.5, -1.0, 1.0).to(like)


def unit_vectors(outputs: Tensor) -> Tensor:
    """The C unit vectors of output space for every datum, ``[N, C] -> [C, N, C]``."""
    n, c = outputs.shape
    return torch.eye(c, dtype=outputs.dtype, device=outputs.device)[:, None].expand(c, n, c)


def square_root(covariance: Tensor) -> Tensor:
    r"""The symmetric square root, :math:`R R = \Sigma`, of positive semi-definite matrices, possibly singular.

    It is unique and continuous: draws do not depend on which eigenvectors of equal eigenvalues rounding chooses.
    Eigenvalues that are negative by no more than rounding are zero; more negative ones are an error.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    largest = values.abs().amax(-1, keepdim=True)
    if bool((values < -1e-3 * largest).any()):
        raise ValueError("Expected a positive semi-definite output covariance; its eigenvalues are negative.")
    return (vectors * values.clamp_min(0).sqrt()[..., None, :] @ vectors.mT).to(covariance)


def smallest(probabilities: Tensor) -> float:
    """Probability below which a logarithm would be infinite by underflow alone."""
    return torch.finfo(probabilities.dtype).tiny


# -- derivatives -----------------------------------------------------------------------------------


def derivatives(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of a function of which every value depends on the entry at its place alone.

    By differentiating twice in reverse mode, which every differentiable function of torch allows.
    """
    first, second = directional_derivatives(function, at, torch.ones_like(at))
    return first, second


def directional_derivatives(
    function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the sum of a function, and its Hessian times a direction, both of the shape of ``at``."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = at.detach().clone().requires_grad_()
        total = function(leaf).sum()
        if not total.requires_grad:
            return torch.zeros_like(at), torch.zeros_like(at)
        (first,) = torch.autograd.grad(total, leaf, create_graph=True, materialize_grads=True)
        if not first.requires_grad:
            return first.detach(), torch.zeros_like(at)
        (second,) = torch.autograd.grad(first, leaf, direction.detach().clone(), materialize_grads=True)
    return first.detach(), second.detach()


# -- expectations under Gaussian outputs -----------------------------------------------------------


@cache
def _hermite(n: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes, and logarithms of weights that sum to one, for a standard normal variable."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return tuple(nodes.tolist()), tuple(np.log(weights / weights.sum()).tolist())


def expectation(function: Callable[[Tensor], Tensor], mean: Tensor, variance: Tensor) -> Tensor:
    r"""Mean of a function of :math:`f \sim \mathcal N(m, v)`, entry by entry, by Gauss-Hermite quadrature.

    Args:
        function: Of outputs of any shape ``[..., N, C]`` to as many values.
        mean: ``[N, C]``.
        variance: ``[..., N, C]``.

    Returns:
        ``[..., N, C]``; exact for polynomials of degree below twice :data:`NODES`.
    """
    deviation = variance.clamp_min(0).sqrt()
    total = torch.zeros_like(mean + deviation)
    for node, log_weight in zip(*_hermite(NODES), strict=True):
        total = total + math.exp(log_weight) * function(mean + node * deviation)
    return total


def negative_log_expectation(loss: Callable[[Tensor], Tensor], mean: Tensor, variance: Tensor) -> Tensor:
    r""":math:`-\log \mathrm E\, e^{-\ell(f)}` for :math:`f \sim \mathcal N(m, v)`, entry by entry.

    Gauss-Hermite quadrature about the mode of the integrand, in the units of its curvature there (Naylor, Smith 1982):
    a likelihood may be far narrower than the variance, and far from the mean.

    Args:
        loss: Of outputs of any shape ``[..., N, C]`` to as many values, in nats; twice differentiable.
        mean: ``[N, C]``.
        variance: ``[..., N, C]``, of functions too: the result is differentiable in both where they need it.

    Returns:
        ``[..., N, C]``, in nats.
    """
    deviation = variance.clamp_min(0).sqrt()
    mean = mean + torch.zeros_like(deviation)
    at, scale = mean.detach(), deviation.detach()
    place, precision = torch.zeros_like(at), torch.ones_like(at)  # in units of the deviation
    for _ in range(_STEPS):
        first, second = derivatives(loss, at + scale * place)
        precision = (1 + scale.square() * second).clamp_min(0.25)  # where the integrand is not log-concave
        step = -(place + scale * first) / precision
        longest = _LONGEST / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        step = torch.minimum(torch.maximum(step, -longest), longest)
        place = place + step
        if float((step.abs() * scale).max() if step.numel() else 0.0) < _SHORTEST:
            break
    _, second = derivatives(loss, at + scale * place)
    width = (1 + scale.square() * second).clamp_min(0.25).rsqrt()
    total = torch.full_like(mean, -math.inf)
    for node, log_weight in zip(*_hermite(NODES), strict=True):
        there = place + node * width
        value = log_weight + 0.5 * (node**2 - there.square()) - loss(mean + deviation * there)
        total = torch.logaddexp(total, value)
    return -(total + width.log())


def sampled_mean(function: Callable[[Tensor], Tensor], mean: Tensor, covariance: Tensor, normals: Tensor) -> Tensor:
    """Mean of a function of sampled outputs: ``[N, C]`` and ``[..., N, C, C]`` to what it returns for ``[..., N, C]``.

    Args:
        function: Of outputs.
        mean: ``[N, C]``.
        covariance: ``[..., N, C, C]``.
        normals: ``[M, C]``.
    """
    root, total = square_root(covariance), None
    for normal in normals.to(mean):
        value = function(mean + root @ normal)
        total = torch.zeros_like(value) if total is None else total
        total = total + value
    assert total is not None
    return total / len(normals)


def mean_field(mean: Tensor, covariance: Tensor) -> Tensor:
    r"""Probit for every pair of classes, from the variance of the difference of their outputs.

    .. math:: p_k \propto \Big(\sum_i \exp\Big(-\frac{f_k - f_i}{\sqrt{1 + \frac\pi8 V_{ki}}}\Big)\Big)^{-1},
        \qquad V_{ki} = \Sigma_{kk} + \Sigma_{ii} - 2\Sigma_{ki}

    Closed form, unlike sampling, and with the covariance, unlike probit for each class: uncertainty that all outputs
    share has no effect. For two classes it is MacKay's approximation of the logistic integral (Lu, Ie, Sha, "Mean-field
    approximation to Gaussian-softmax integral", arXiv 2006.07584).
    """
    # Few passes over [..., C, C]: searches of a temperature are made of them.
    halves = 0.5 + math.pi / 8 * covariance.diagonal(dim1=-2, dim2=-1)
    of_differences = (halves[..., :, None] + halves[..., None, :]).add(covariance, alpha=-math.pi / 4).clamp_min(1)
    ratios = (mean[..., None, :] - mean[..., :, None]) * of_differences.rsqrt()
    return torch.softmax(-torch.logsumexp(ratios, -1), -1)


def laplace_bridge(mean: Tensor, covariance: Tensor, *, normalise: bool) -> Tensor:
    r"""Dirichlet mean of the Laplace bridge (Hobbhahn et al., arXiv 2003.01227), with zero-sum correction."""
    n_classes = mean.shape[-1]
    row = covariance.sum(-1)
    total = row.sum(-1, keepdim=True)
    mean = mean - row * mean.sum(-1, keepdim=True) / total
    covariance = covariance - row[..., :, None] * row[..., None, :] / total[..., None]
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    if normalise:
        scale = variance.mean(-1, keepdim=True) / math.sqrt(n_classes / 2)
        mean, variance = mean / scale.sqrt(), variance / scale
    # In logarithms: exp(f_c) sum_k exp(-f_k) overflows in single precision for confident networks.
    log_ratio = mean + torch.logsumexp(-mean, -1, keepdim=True) - 2 * math.log(n_classes)
    shift = log_ratio.amax(-1, keepdim=True).clamp_min(0)
    alpha = ((1 - 2 / n_classes) * (-shift).exp() + (log_ratio - shift).exp()) / variance
    return alpha / alpha.sum(-1, keepdim=True)
