"""The drop-in classes for users of laplace-torch; the only importers of ``laplace``.

Importing this package registers ``laplace.Laplace(model, likelihood, "all", "debiased_kron")`` and its like.
Argument names, their order, shapes and return types are laplace-torch's; the mathematics is in the functional core.
``docs/laplace_torch.md`` says where it differs, and why.
"""

from debiased_laplace.laplace_torch.classes import (
    DebiasedDiagLaplace,
    DebiasedDiagLastLayerLaplace,
    DebiasedFullLaplace,
    DebiasedFullLastLayerLaplace,
    DebiasedKronLaplace,
    DebiasedLastLayerLaplace,
    DebiasedLowRankLaplace,
    DebiasedLowRankLastLayerLaplace,
)
from debiased_laplace.laplace_torch.laplace import DebiasedLaplace
from debiased_laplace.laplace_torch.precision import KroneckerPrecision

__all__ = [
    "DebiasedDiagLaplace",
    "DebiasedDiagLastLayerLaplace",
    "DebiasedFullLaplace",
    "DebiasedFullLastLayerLaplace",
    "DebiasedKronLaplace",
    "DebiasedLaplace",
    "DebiasedLastLayerLaplace",
    "DebiasedLowRankLaplace",
    "DebiasedLowRankLastLayerLaplace",
    "KroneckerPrecision",
]
