"""States and files of drop-in objects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from debiased_laplace import _checks, _store
from debiased_laplace.laplace_torch.settings import REWARD_MODELING
from debiased_laplace.likelihoods import LIKELIHOODS, Likelihood

STATE_FORMAT = 2
FILE_KIND = "laplace"

#: Settings of an object that its state has, under their names.
SETTINGS = (
    "subset_of_weights", "hessian_structure", "n_data", "n_outputs", "loss", "prior_precision", "prior_mean",
    "sigma_noise", "output_temperature", "enable_backprop", "dict_key_x", "dict_key_y", "separate_bias",
    "feature_reduction", "seed", "link",
)  # fmt: skip
#: Those that are taken over as they are.
TAKEN_OVER = (
    "sigma_noise", "temperature", "enable_backprop", "dict_key_x", "dict_key_y", "separate_bias", "seed", "link",
)  # fmt: skip


def likelihood_name(la: Any) -> str:
    """What the likelihood of an object is called in files."""
    return REWARD_MODELING if la.likelihood == REWARD_MODELING else type(la.output_likelihood).__name__


def state_of(la: Any) -> dict[str, Any]:
    """Everything but the model and the data, as tensors and plain Python objects."""
    selection = la.selection
    state = {
        "format": STATE_FORMAT,
        "cls_name": type(la).__name__,
        "likelihood": likelihood_name(la),
        "fit": la.fitted.state(),
        "parameters": list(la.fitted.network.shapes),
        "trainable": list(selection.trainable),
        "indices": selection.indices,
        "noise_profile": la.noise_profile,
        "temperature": float(la.temperature),
        **{name: getattr(la, name) for name in SETTINGS},
    }
    likelihood_settings = la.output_likelihood.settings()
    if likelihood_settings:
        state["likelihood_settings"] = likelihood_settings
    detached = _pytree.tree_map_only(Tensor, torch.detach, state)
    return _pytree.tree_map_only(Tensor, torch.clone, detached)


def check_state(state: dict[str, Any], la: Any) -> None:
    """Raise a ``ValueError`` if a state is not one for an object; it says what differs."""
    for key, expected in (
        ("format", STATE_FORMAT),
        ("subset_of_weights", la.subset_of_weights),
        ("hessian_structure", la.hessian_structure),
        ("likelihood", likelihood_name(la)),
    ):
        if state.get(key) != expected:
            raise ValueError(f"Expected a state with {key} {expected!r}, got {state.get(key)!r}.")
    given, stored = la.output_likelihood.settings(), state.get("likelihood_settings", {})
    if given.keys() != stored.keys() or not all(_equal(given[name], stored[name]) for name in given):
        raise ValueError(f"Expected a state of the likelihood with {given or 'no settings'}, got {stored or 'none'}.")
    settings = {name: value for name, value in state.items() if name != "fit"}
    for name, value in _store.tensors_of(settings).items():
        _checks.finite(value, f"the {name} of the state", "It was changed: make it again.")


def check_parameters(state: dict[str, Any], names: list[str], la: Any) -> None:
    """Raise a ``ValueError`` if a fit is about other parameters than an object."""
    selection = la.selection
    if selection.names is not None and names != list(selection.names):
        raise ValueError(f"Expected a state of the parameters {list(selection.names)}, got one of {names}.")
    expected, theirs = _listed(selection.indices), _listed(state["indices"])
    if expected != theirs:
        raise ValueError(
            f"Expected a state of the entries {_few(expected)} of the parameter vector, got one of {_few(theirs)}."
        )


def header_of(la: Any) -> dict[str, Any]:
    """What a file says before it is read: class, structure, shapes, fingerprints, number of data, seed, versions."""
    return {
        **la.fitted.header(),
        "kind": FILE_KIND,
        "class": type(la).__name__,
        "subset_of_weights": la.subset_of_weights,
        "hessian_structure": la.hessian_structure,
        "likelihood": likelihood_name(la),
        "n_data": la.n_data,
        "seed": la.seed,
    }


def check_header(path: Any, header: dict[str, Any], classes: dict[str, type], cls: type, likelihood: Any) -> type:
    """The class that a file was written from.

    Raises:
        StoredFileError: If it is another kind of file, or of another class, or its likelihood is not known.
    """
    if header.get("kind") != FILE_KIND:
        raise _store.StoredFileError(
            f"Expected a saved DebiasedLaplace in {path}, got {header.get('kind', 'something else')}. Check the path."
        )
    written_from = classes.get(header["class"])
    if written_from is None or not issubclass(written_from, cls):
        raise _store.StoredFileError(
            f"Expected a saved {cls.__name__} in {path}, got one of {header['class']}. Use that class."
        )
    return written_from


def likelihood_of(header: dict[str, Any], state: dict[str, Any]) -> str | Likelihood:
    """The likelihood that a file names."""
    name = header["likelihood"]
    return name if name == REWARD_MODELING else LIKELIHOODS[name](**state.get("likelihood_settings", {}))


def check_likelihood_of_file(path: Any, header: dict[str, Any], likelihood: Any) -> None:
    """Raise a :class:`StoredFileError` if nobody says what likelihood it was."""
    if likelihood is None and header["likelihood"] not in (*LIKELIHOODS, REWARD_MODELING):
        raise _store.StoredFileError(
            f"Expected likelihood to be the {header['likelihood']} of the file, got None. Pass it (for {path})."
        )


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a.cpu(), b.cpu()) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def _listed(indices: Tensor | None) -> list[int] | None:
    return None if indices is None else indices.tolist()


def _few(indices: list[int] | None) -> str:
    if indices is None:
        return "(all of whole tensors)"
    return repr(indices[:8]) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
