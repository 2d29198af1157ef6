"""Which parameters a posterior is about: laplace-torch's ``subset_of_weights``, and names and patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace.network.selection import matching
from debiased_laplace.network.tensors import aliases_of

SUBSETS = ("all", "last_layer", "subnetwork")


@dataclass(frozen=True)
class Selection:
    """The parameters of a model that a posterior is about.

    Attributes:
        subset: One of :data:`SUBSETS`.
        trainable_sizes: Numbers of entries of the parameters that were trainable at first, by name; what is frozen
            later, for serving say, stays in.
        names: Of those chosen, in the model's order; None until a forward pass tells which are the last layer.
        indices: Of single entries in the vector of all trainable parameters, if some tensors are chosen in part.
    """

    subset: str
    trainable_sizes: Mapping[str, int]
    names: tuple[str, ...] | None
    indices: Tensor | None = None

    @classmethod
    def of(
        cls, model: nn.Module, subset: str, params: Sequence[str] | str | None = None,
        last_layer_name: str | None = None, subnetwork_indices: Any = None, names: Sequence[str] | None = None,
    ) -> Selection:  # fmt: skip
        """What laplace-torch's arguments say.

        Args:
            model: The model.
            subset: One of :data:`SUBSETS`.
            params: Names or patterns.
            last_layer_name: Of a module.
            subnetwork_indices: Of entries.
            names: Of the parameters that were trainable at an earlier time.

        Raises:
            ValueError: If the arguments contradict each other, or name nothing.
        """
        every = trainable(model, names)
        chosen, indices = chosen_parameters(model, every, subset, params, last_layer_name, subnetwork_indices)
        sizes = {name: p.numel() for name, p in every.items()}
        return cls(subset, sizes, None if chosen is None else tuple(chosen), indices)

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that were trainable at first."""
        return list(self.trainable_sizes)

    def named(self, names: Sequence[str]) -> Selection:
        """The same with the names that a fit knows."""
        return replace(self, names=tuple(names))

    def every(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """All parameters that were trainable at first, by name."""
        return trainable(model, self.trainable)

    @property
    def sizes(self) -> dict[str, int] | None:
        """Numbers of chosen entries of every chosen tensor; None as long as they are not known."""
        every = self.trainable_sizes
        if self.indices is not None:
            return {name: count for name, count in entry_counts(every, self.indices).items() if count}
        return None if self.names is None else {name: every[name] for name in self.names}

    def parameters(self, model: nn.Module) -> list[Tensor]:
        """What laplace-torch calls ``params``: it counts all trainable parameters of a subnetwork."""
        every = self.every(model)
        return list(every.values()) if self.subset == "subnetwork" else [every[name] for name in self.names or ()]

    def places(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Where in the vector of all trainable parameters the chosen ones are: ``[D]``, boolean."""
        if self.indices is None:
            masks = [torch.full((p.numel(),), name in (self.names or ())) for name, p in parameters.items()]
            return torch.cat(masks)
        places = torch.zeros(sum(p.numel() for p in parameters.values()), dtype=torch.bool)
        places[self.indices] = True
        return places


def embed(value: Tensor, free: Tensor | None, fill: float = 0.0) -> Tensor:
    """Entries ``[..., d]`` of the vectors ``[..., D]`` whose uncertain ones ``free`` marks; the others are constant."""
    if free is None:
        return value
    whole = value.new_full((*value.shape[:-1], len(free)), fill)
    whole[..., free] = value
    return whole


def restrict(value: Tensor, free: Tensor | None) -> Tensor:
    """Inverse of :func:`embed`."""
    return value if free is None else value[..., free]


def trainable(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the model's order.

    Args:
        model: The model.
        names: Those that were trainable at an earlier time, whatever they are now.

    Raises:
        ValueError: If there are none.
    """
    every = dict(model.named_parameters())
    if names is not None:
        missing = [name for name in names if name not in every]
        if missing:
            raise ValueError(f"Expected a model with the parameters {missing}, got one without them.")
        return {name: p for name, p in every.items() if name in set(names)}
    learnt = {name: p for name, p in every.items() if p.requires_grad}
    if not learnt:
        raise ValueError(
            "Expected a model with trainable parameters, got none with requires_grad=True. "
            "Set requires_grad_(True) on the parameters that the posterior is about."
        )
    return learnt


def chosen_parameters(
    model: nn.Module,
    every: Mapping[str, Tensor],
    subset: str,
    params: Sequence[str] | str | None = None,
    last_layer_name: str | None = None,
    subnetwork_indices: Any = None,
) -> tuple[list[str] | None, Tensor | None]:
    """Which of all trainable parameters, in the model's order.

    Returns:
        Their names, None for a last layer that only a forward pass can tell; and if not every entry of them is meant,
        the indices of those that are, in the vector of all trainable parameters.

    Raises:
        ValueError: If the arguments contradict each other, or name nothing; the message says what goes together.
    """
    given = {
        name for name, value in (
            ("params", params), ("last_layer_name", last_layer_name), ("subnetwork_indices", subnetwork_indices)
        ) if value is not None
    }  # fmt: skip
    allowed = {"all": {"params"}, "last_layer": {"last_layer_name"}, "subnetwork": {"params", "subnetwork_indices"}}
    if not given <= allowed[subset]:
        raise ValueError(
            f"Expected only {sorted(allowed[subset])} with subset_of_weights={subset!r}, got {sorted(given)}."
        )
    if subset == "subnetwork" and len(given) != 1:
        raise ValueError(
            "Expected params (names or patterns of parameters) or subnetwork_indices with "
            f"subset_of_weights='subnetwork', got {'both' if given else 'neither'}."
        )
    if subnetwork_indices is not None:
        return covered_by(every, subnetwork_indices)
    if params is not None:
        return matching(every, params, aliases_of(model)), None
    if last_layer_name is not None:
        if last_layer_name not in dict(model.named_modules()):
            raise ValueError(f"Expected last_layer_name to be a module of the model, got {last_layer_name!r}.")
        return matching(every, last_layer_name, aliases_of(model)), None
    return (list(every) if subset == "all" else None), None


def covered_by(every: Mapping[str, Tensor], indices: Any) -> tuple[list[str], Tensor | None]:
    """Names of the parameter tensors that ascending indices of the parameter vector reach into.

    Returns:
        The names, and the indices if they cover a tensor in part.

    Raises:
        ValueError: If they are no indices.
    """
    sizes = {name: p.numel() for name, p in every.items()}
    total = sum(sizes.values())
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1 or not len(indices):
        what = f"{indices.dtype} of shape {tuple(indices.shape)}" if isinstance(indices, Tensor) else repr(indices)
        raise ValueError(f"Expected subnetwork_indices to be a non-empty, one-dimensional LongTensor, got {what}.")
    if int(indices.min()) < 0 or int(indices.max()) >= total:
        raise ValueError(
            f"Expected subnetwork_indices from 0 to {total - 1}, got {int(indices.min())} to {int(indices.max())}."
        )
    if bool((indices.diff() <= 0).any()):
        raise ValueError("Expected subnetwork_indices in ascending order, without duplicates. Sort them.")
    counts = entry_counts(sizes, indices)
    names = [name for name, count in counts.items() if count]
    whole = all(counts[name] == sizes[name] for name in names)
    return names, None if whole else indices.cpu()


def entry_counts(sizes: Mapping[str, int], indices: Tensor) -> dict[str, int]:
    """How many entries of every parameter tensor the indices are of."""
    ends = torch.tensor(list(sizes.values())).cumsum(0)
    counts = torch.bincount(torch.searchsorted(ends, indices.cpu(), right=True), minlength=len(sizes))
    return dict(zip(sizes, counts.tolist(), strict=True))
