"""What laplace-torch's names, numbers and backends mean here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from laplace.curvature import EFInterface, GGNInterface
from torch import Tensor

from debiased_laplace._guards import warn_the_caller
from debiased_laplace.curvature.structures import STRUCTURES, Structure
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.laplace_torch.parameters import embed
from debiased_laplace.network.reduction import FEATURE_REDUCTIONS
from debiased_laplace.posterior.gaussian import Posterior

REWARD_MODELING = "reward_modeling"


def plain(name: Any) -> Any:
    """The string that an enumeration of laplace-torch stands for; anything else as it is."""
    return getattr(name, "value", name)


def choice(value: Any, choices: Sequence[str], name: str) -> str:
    """One of some names, also with the prefix that our names have in laplace-torch's factory."""
    chosen = str(plain(value)).removeprefix("debiased_")
    if chosen not in choices:
        raise ValueError(f"Expected {name} out of {list(choices)}, got {plain(value)!r}.")
    return chosen


def feature_reduction(subset: str, way: Any) -> str | None:
    """How the features of a last layer are reduced, if that was said.

    Raises:
        ValueError: If there is no such way, or no last layer.
    """
    way = plain(way)
    if way is not None and way not in FEATURE_REDUCTIONS:
        raise ValueError(f"Expected feature_reduction out of {list(FEATURE_REDUCTIONS)} or None, got {way!r}.")
    if way is not None and subset != "last_layer":
        raise ValueError(f'Expected feature_reduction only with subset_of_weights="last_layer", got {subset!r}.')
    return way


def structure_of(name: str, structure: Structure | None) -> Structure:
    """The structure of a ``hessian_structure``, or the given one if it is of that kind."""
    kind = STRUCTURES[name]
    if structure is None:
        return kind()
    if not isinstance(structure, kind):
        raise ValueError(
            f"Expected a structure {kind.__name__}(...) with hessian_structure={name!r}, got {structure!r}. Choose "
            "another hessian_structure."
        )
    return structure


def prior_mean(value: float | Tensor, n_chosen: int | None) -> Tensor:
    """A number ``[]``, or one for each of the chosen parameters, float64.

    Raises:
        ValueError: For anything else.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number and not isinstance(value, Tensor):
        raise ValueError(f"Expected a prior mean that is a number or a tensor, got {value!r}.")
    mean = torch.as_tensor(value, dtype=torch.float64).detach()
    if mean.ndim > 1 or not bool(mean.isfinite().all()):
        raise ValueError(
            f"Expected a prior mean of finite numbers with at most one dimension, got shape {tuple(mean.shape)}."
        )
    if mean.ndim == 1 and n_chosen is not None and len(mean) not in (1, n_chosen):
        raise ValueError(
            f"Expected a prior mean that is one number, or one for each of the {n_chosen} parameters, got {len(mean)}."
        )
    return mean


def check_prior_before_the_fit(prior: Tensor, sizes: Mapping[str, int] | None, structure: str) -> None:
    """Raise a ``ValueError`` for prior precisions that can have no meaning, as far as is known.

    Args:
        prior: ``[K]``.
        sizes: Of the chosen parameter tensors; None if a fit has to tell which they are.
        structure: The ``hessian_structure``.
    """
    length = len(prior)
    if length == 1 or sizes is None:
        return
    n_tensors, n_chosen, per_parameter = len(sizes), sum(sizes.values()), structure != "kron"
    if length > n_tensors and not (per_parameter and length == n_chosen):
        raise ValueError(
            f"Expected one prior precision, or one for each of the {n_tensors} parameter tensors"
            + (f" or of the {n_chosen} parameters" if per_parameter else "") + f", got {length}."
            + ("" if per_parameter else _MIXED)
        )  # fmt: skip


def prior_of_the_posterior(prior: Tensor, fitted: Fit) -> Tensor:
    """What the posterior takes: one prior precision, one for each part of the basis, or one for each parameter.

    Raises:
        ValueError: If the number has no meaning, or the directions mix parameters with different ones.
    """
    basis, free = fitted.posterior.basis, fitted.network.free
    sizes = [shape.numel() for shape in basis.shapes.values()]
    length, n_parts, mixed = len(prior), len(basis.parts), not all(p.takes_parameter_priors for p in basis.parts)
    n_chosen = sum(sizes) if free is None else int(free.sum())
    # One for each part where the parts are the tensors, in their order.
    if length == len(sizes) > 1 and (length != n_parts or basis.groups is not None):
        prior = prior.repeat_interleave(torch.tensor(sizes, device=prior.device))
        basis.check_priors(prior)
        return prior
    if length in (1, n_parts):
        return prior
    if length == n_chosen and not mixed:
        return embed(prior, free, 1.0)
    raise ValueError(
        f"Expected one prior precision, one for each of the {n_parts} blocks that coverage() lists, or one for "
        f"each of the {len(sizes)} parameter tensors" + ("" if mixed else f" or of the {n_chosen} parameters")
        + f", got {length}." + (_MIXED if mixed and length == n_chosen else "")
    )  # fmt: skip


def priors_of_parts(priors: Tensor, posterior: Posterior) -> Tensor:
    """Prior precisions of the parts of a basis as the setting takes them."""
    basis = posterior.basis
    if basis.groups is None or not len(priors) == len(basis.parts) == len(basis.shapes) > 1:
        return priors
    # As many parts as parameter tensors, in another order perhaps: a vector of this length is meant for tensors.
    by_tensor = basis.per_parameter(priors).split([shape.numel() for shape in basis.shapes.values()])
    return torch.stack([of_tensor[0] for of_tensor in by_tensor])


_MIXED = " One for each parameter does not go with Kronecker directions, which mix parameters."


def is_known(backend: Any) -> bool:
    """Whether it is a backend of laplace-torch whose kind says something."""
    return isinstance(backend, type) and issubclass(backend, (GGNInterface, EFInterface))


def backend_settings(
    backend: Any, backend_kwargs: dict[str, Any] | None, asdl_fisher_kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    """What a backend of laplace-torch says about the curvature, as arguments of the fit; warns about the rest."""
    known = is_known(backend)
    rest = dict(backend_kwargs or {})
    settings: dict[str, Any] = {}
    if known and issubclass(backend, EFInterface):
        settings["curvature"] = "empirical_fisher"
    elif rest.pop("stochastic", False):
        settings["mc_samples"] = rest.pop("num_samples", 1)
    if rest or asdl_fisher_kwargs or not (backend is None or known):
        warn_the_caller(
            "The curvature is computed by debiased_laplace: of backend arguments only the kind (GGN or empirical "
            f"Fisher), stochastic and num_samples have an effect, not {[backend, rest, asdl_fisher_kwargs or {}]}."
        )
    return settings
