"""Calibrated uncertainty for trained PyTorch networks: Laplace approximations with debiased curvature.

Names are loaded when they are first used, so that importing the package stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from debiased_laplace.curvature.sharing import Expand, Reduce
    from debiased_laplace.curvature.structures import Diagonal, Full, Isotropic, Kronecker, LowRank
    from debiased_laplace.fitting.fitted import Fit
    from debiased_laplace.laplace import Laplace, fit, load
    from debiased_laplace.laplace_torch import (
        DebiasedDiagLaplace,
        DebiasedFullLaplace,
        DebiasedKronLaplace,
        DebiasedLaplace,
        DebiasedLastLayerLaplace,
        DebiasedLowRankLaplace,
    )
    from debiased_laplace.likelihoods import (
        Bernoulli,
        Categorical,
        Elementwise,
        Gaussian,
        HeteroscedasticGaussian,
        Poisson,
        Sites,
    )
    from debiased_laplace.network.selection import by_sensitivity
    from debiased_laplace.posterior.gaussian import Posterior
    from debiased_laplace.posterior.prediction import Predictive
    from debiased_laplace.posterior.sensitivity import Sensitivity
    from debiased_laplace.quadratic.fisher import EmpiricalFisher
    from debiased_laplace.quadratic.quadratic import Quadratic
    from debiased_laplace.quadratic.spectrum import GGN, directional_derivatives
    from debiased_laplace.sampling.samplers import PrioritySampler, UniformSampler
    from debiased_laplace.sampling.splits import CrossFit, Single, TwoBatch

__version__ = "0.1.0"

_HOMES = {
    "fit": "laplace",
    "load": "laplace",
    "Laplace": "laplace",
    "Predictive": "posterior.prediction",
    "DebiasedDiagLaplace": "laplace_torch",
    "DebiasedFullLaplace": "laplace_torch",
    "DebiasedKronLaplace": "laplace_torch",
    "DebiasedLaplace": "laplace_torch",
    "DebiasedLastLayerLaplace": "laplace_torch",
    "DebiasedLowRankLaplace": "laplace_torch",
    "Posterior": "posterior.gaussian",
    "Sensitivity": "posterior.sensitivity",
    "by_sensitivity": "network.selection",
    "Fit": "fitting.fitted",
    "Categorical": "likelihoods",
    "Gaussian": "likelihoods",
    "Bernoulli": "likelihoods",
    "Poisson": "likelihoods",
    "HeteroscedasticGaussian": "likelihoods",
    "Elementwise": "likelihoods",
    "Sites": "likelihoods",
    "PrioritySampler": "sampling.samplers",
    "UniformSampler": "sampling.samplers",
    "Single": "sampling.splits",
    "CrossFit": "sampling.splits",
    "TwoBatch": "sampling.splits",
    "Diagonal": "curvature.structures",
    "Expand": "curvature.sharing",
    "Reduce": "curvature.sharing",
    "Full": "curvature.structures",
    "Isotropic": "curvature.structures",
    "Kronecker": "curvature.structures",
    "LowRank": "curvature.structures",
    "GGN": "quadratic.spectrum",
    "EmpiricalFisher": "quadratic.fisher",
    "directional_derivatives": "quadratic.spectrum",
    "Quadratic": "quadratic.quadratic",
}

__all__ = [
    "GGN",
    "Bernoulli",
    "Categorical",
    "CrossFit",
    "DebiasedDiagLaplace",
    "DebiasedFullLaplace",
    "DebiasedKronLaplace",
    "DebiasedLaplace",
    "DebiasedLastLayerLaplace",
    "DebiasedLowRankLaplace",
    "Diagonal",
    "Elementwise",
    "EmpiricalFisher",
    "Expand",
    "Fit",
    "Full",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Isotropic",
    "Kronecker",
    "Laplace",
    "LowRank",
    "Poisson",
    "Posterior",
    "Predictive",
    "PrioritySampler",
    "Quadratic",
    "Reduce",
    "Sensitivity",
    "Single",
    "Sites",
    "TwoBatch",
    "UniformSampler",
    "by_sensitivity",
    "directional_derivatives",
    "fit",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
