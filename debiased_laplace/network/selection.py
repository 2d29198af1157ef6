"""Which parameters a posterior is about: by name, by pattern, or entry by entry."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from debiased_laplace._checks import UnsupportedLayerError
from debiased_laplace.network.blocks import unflatten
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.network.tensors import aliases_of


def match_parameters(model: nn.Module | Snapshot, patterns: str | Sequence[str]) -> list[str]:
    """Names of the trainable parameters that match a pattern, or any of several (:mod:`fnmatch`), in the model's order.

    A name of a module stands for all of its parameters.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    aliases = model.aliases if isinstance(model, Snapshot) else aliases_of(model)
    return matching(_trainable_shapes(model), patterns, aliases)


def matching(names: Collection[str], patterns: str | Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """Those of some names of parameters that match a pattern, or any of several; see :func:`match_parameters`.

    Args:
        names: Each parameter's first one.
        patterns: For any of their names.
        aliases: All names of all parameters, and the first one of each.
    """
    every = [(alias, name) for alias, name in aliases.items() if name in names]
    if not isinstance(patterns, str) and not len(patterns):
        raise ValueError(f"Expected patterns of trainable parameters, got none. There are {list(names)}.")
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        of_pattern = {first for name, first in every if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
        if not of_pattern:
            raise ValueError(
                f"Expected patterns of trainable parameters, got {pattern!r}, which matches none of {list(names)}."
            )
        matched |= of_pattern
    return [name for name in names if name in matched]


def entries_of(model: nn.Module | Snapshot, indices: Tensor) -> dict[str, Tensor]:
    """Entries of the vector of all trainable parameters, as a mask of each parameter.

    Raises:
        ValueError: If they are no indices of that vector.
    """
    shapes = _trainable_shapes(model)
    total = sum(shape.numel() for shape in shapes.values())
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1 or not len(indices):
        raise ValueError(f"Expected indices to be a non-empty vector of int64, got {indices!r}.")
    if int(indices.min()) < 0 or int(indices.max()) >= total or len(indices.unique()) < len(indices):
        raise ValueError(
            f"Expected different indices from 0 to {total - 1}, got {len(indices)} of which {len(indices.unique())} "
            f"differ, from {int(indices.min())} to {int(indices.max())}."
        )
    mask = torch.zeros(total, dtype=torch.bool)
    mask[indices.cpu()] = True
    return unflatten(mask, shapes)


def padding_masks(
    model: nn.Module, names: Mapping[int, str], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor] | None:
    """Where parameters are rows of embeddings that stand for padding, so that no gradient flows; None for nowhere.

    Args:
        model: Whose modules are looked at.
        names: Of the parameters that matter, by their identities.
        shapes: Of them.
    """
    masks, is_any = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}, False
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
            name = names.get(id(module.weight))
            if name is not None:
                masks[name][module.padding_idx] = is_any = True
    return masks if is_any else None


def refuse_scripted(names: Iterable[str], snapshot: Snapshot) -> None:
    """Raise an ``UnsupportedLayerError`` if any of some parameters is inside a scripted or traced module."""
    inside = [name for name in names if name in snapshot.scripted]
    if inside:
        places = sorted({snapshot.scripted[name] for name in inside})
        where = "the model" if places == [""] else f"the modules {places}"
        raise UnsupportedLayerError(
            f"Expected layers of Python modules, got {where} scripted or traced (torch.jit): nothing sees the layers "
            f"inside, which have the trainable parameters {inside}. Give the model that it was made from (after "
            "model.load_state_dict(scripted.state_dict())), or freeze these parameters with requires_grad_(False) to "
            "leave them out of the posterior."
        )


def refuse_complex(parameters: Mapping[str, Tensor]) -> None:
    """Raise an ``UnsupportedLayerError`` if any of some parameters is complex."""
    names = [name for name, p in parameters.items() if p.is_complex()]
    if names:
        raise UnsupportedLayerError(
            f"Expected real parameters, got the complex ones {names}. Store real and imaginary parts "
            "(torch.view_as_real) and put them together in the forward pass (torch.view_as_complex), or freeze these "
            "parameters with requires_grad_(False) to leave them out of the posterior."
        )


def _trainable_shapes(model: nn.Module | Snapshot) -> dict[str, torch.Size]:
    if isinstance(model, Snapshot):
        return {name: model.parameters[name].shape for name in model.trainable}
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
