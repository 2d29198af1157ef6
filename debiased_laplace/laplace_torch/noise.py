r"""Observation noise of a regression: one number, or one for each output.

A noise that differs between outputs is part of the loss and so of the curvature: with standard deviations
:math:`\sigma_c = s\,r_c` (s their geometric mean) the loss is :math:`\frac12 \|(f - y) / r\|^2`, and the noise
variance of equation (3) is :math:`s^2`. The profile r is therefore fixed at the fit; the level s is free afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from debiased_laplace.likelihoods import Likelihood, ProfiledGaussian


def standard_deviation(value: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number ``[]`` or a vector ``[C]`` of positive standard deviations; gradients are kept.

    Raises:
        ValueError: For anything else.
    """
    if isinstance(value, Tensor):
        sigma = value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        sigma = torch.tensor(float(value), dtype=torch.float64)
    else:
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            sigma = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"Expected sigma_noise to be a number or a tensor, got {type(value).__name__} {value!r}."
            ) from None
    if sigma.ndim > 1 or sigma.numel() == 0:
        raise ValueError(
            f"Expected sigma_noise to be one number or one for each output [C], got shape {tuple(sigma.shape)}."
        )
    known = sigma.detach()
    if not bool(((known > 0) & known.isfinite()).all()):
        raise ValueError(f"Expected a positive, finite sigma_noise, got {known.tolist()}.")
    return (sigma[0] if sigma.ndim == 1 and len(sigma) == 1 else sigma).to(device, dtype)


def level(sigma: Tensor) -> Tensor:
    """The geometric mean s of standard deviations ``[]`` or ``[C]``, a float64 scalar."""
    return sigma.double() if sigma.ndim == 0 else sigma.double().log().mean().exp()


def profile(sigma: Tensor) -> Tensor | None:
    """What is left, ``r: [C]`` in float64; None if all are equal."""
    if sigma.ndim == 0:
        return None
    sigma = sigma.detach().double()
    return None if bool((sigma == sigma[0]).all()) else sigma / level(sigma)


def check_profile(sigma: Tensor, fitted: Tensor | None, n_outputs: int) -> None:
    """Raise a ``ValueError`` if a noise has another profile than the fit was made with."""
    if sigma.ndim == 1 and len(sigma) != n_outputs:
        raise ValueError(
            f"Expected sigma_noise to be one number or one for each of the {n_outputs} outputs, got {len(sigma)}."
        )
    present = profile(sigma)
    one = torch.ones(n_outputs, dtype=torch.float64)
    before, now = (one if r is None else r.cpu() for r in (fitted, present))
    rounding = torch.finfo(sigma.dtype).eps if sigma.is_floating_point() else 0.0
    if not torch.allclose(before, now, rtol=max(1e-5, 4 * rounding), atol=0):
        raise ValueError(
            "Expected a sigma_noise with the ratios between outputs that the fit was made with, "
            f"{[round(r, 6) for r in before.tolist()]}, got {[round(r, 6) for r in now.tolist()]}: they are part of "
            "the curvature. Give them to the constructor, or set them and fit again."
        )


def with_noise(likelihood: Likelihood, sigma: Tensor) -> Likelihood:
    """The likelihood to fit with."""
    ratios = profile(sigma)
    return likelihood if ratios is None else ProfiledGaussian(ratios)
