"""Likelihoods: losses, their curvature in the outputs, and predictions from Gaussian outputs, a file each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from debiased_laplace.likelihoods._numerics import square_root, unit_vectors
from debiased_laplace.likelihoods.base import Answers, Independent, Likelihood, Moments
from debiased_laplace.likelihoods.bernoulli import Bernoulli
from debiased_laplace.likelihoods.categorical import Categorical
from debiased_laplace.likelihoods.elementwise import Elementwise
from debiased_laplace.likelihoods.gaussian import Gaussian, ProfiledGaussian, gaussian_nll
from debiased_laplace.likelihoods.heteroscedastic import HeteroscedasticGaussian
from debiased_laplace.likelihoods.poisson import Poisson
from debiased_laplace.likelihoods.sites import Sites, of_outputs, restored_sites, site_layout

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
    "Sites",
    "gaussian_nll",
    "of_outputs",
    "resolve_likelihood",
    "site_layout",
    "square_root",
    "unit_vectors",
]

#: What a user may write for them.
_NAMES: dict[str, Callable[[], Likelihood]] = {
    "classification": Categorical,
    "regression": Gaussian,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "heteroscedastic": HeteroscedasticGaussian,
    "next_token": lambda: Sites(Categorical(), class_dim=-1, shift=1),
}

_CLASSES: list[type[Likelihood]] = [
    Categorical, Gaussian, Bernoulli, Poisson, HeteroscedasticGaussian, ProfiledGaussian
]  # fmt: skip

#: What makes them again, by :attr:`Likelihood.name`; :meth:`Likelihood.settings` are the arguments.
LIKELIHOODS: dict[str, Callable[..., Likelihood]] = {
    **{kind.__name__: kind for kind in _CLASSES},
    **{f"Sites of {kind.__name__}": partial(restored_sites, kind) for kind in _CLASSES},
}


def resolve_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood a name stands for, laplace-torch's among them; an object is returned as it is."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    name = str(getattr(likelihood, "value", likelihood))
    if name not in _NAMES:
        raise ValueError(f"Expected a likelihood out of {list(_NAMES)}, or a Likelihood, got {likelihood!r}.")
    return _NAMES[name]()
