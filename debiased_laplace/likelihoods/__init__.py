"""Likelihoods: losses, their curvature in the outputs, and predictions from Gaussian outputs, a file each."""

from __future__ import annotations

from debiased_laplace.likelihoods._numerics import square_root, unit_vectors
from debiased_laplace.likelihoods.base import Answers, Independent, Likelihood, Moments
from debiased_laplace.likelihoods.bernoulli import Bernoulli
from debiased_laplace.likelihoods.categorical import Categorical
from debiased_laplace.likelihoods.elementwise import Elementwise
from debiased_laplace.likelihoods.gaussian import Gaussian, ProfiledGaussian, gaussian_nll
from debiased_laplace.likelihoods.heteroscedastic import HeteroscedasticGaussian
from debiased_laplace.likelihoods.poisson import Poisson

__all__ = [
    "LIKELIHOODS",
    "Answers",
    "Bernoulli",
    "Categorical",
    "Elementwise",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Independent",
    "Likelihood",
    "Moments",
    "Poisson",
    "ProfiledGaussian",
    "gaussian_nll",
    "resolve_likelihood",
    "square_root",
    "unit_vectors",
]

#: What a user may write for them.
_NAMES: dict[str, type[Likelihood]] = {
    "classification": Categorical,
    "regression": Gaussian,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "heteroscedastic": HeteroscedasticGaussian,
}

#: Classes by the names that files have for them; :meth:`Likelihood.settings` are the arguments.
LIKELIHOODS: dict[str, type[Likelihood]] = {
    kind.__name__: kind for kind in list[type[Likelihood]]([*_NAMES.values(), ProfiledGaussian])
}


def resolve_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood a name stands for, laplace-torch's among them; an object is returned as it is."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    name = str(getattr(likelihood, "value", likelihood))
    if name not in _NAMES:
        raise ValueError(f"Expected a likelihood out of {list(_NAMES)}, or a Likelihood, got {likelihood!r}.")
    return _NAMES[name]()
