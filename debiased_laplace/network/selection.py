r"""Which parameters a posterior is about: by name, by pattern, entry by entry, or by their curvature.

Of a diagonal posterior the entry i adds :math:`J_i^2 / (\beta \lambda_i + \delta)` to the variance of an output, in the
mean over the data :math:`\lambda_i / (\beta \lambda_i + \delta)`. That grows with the curvature :math:`\lambda_i`,
whatever the prior precision: of all diagonal posteriors over so many entries, the one over those of the largest
curvature keeps most of the output variance. Daxberger et al., "Bayesian deep learning via subnetwork inference", arXiv
2010.14689, take those of the largest posterior variance, which have the smallest curvature, to be near in the space of
parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from debiased_laplace import _checks
from debiased_laplace._checks import UnsupportedLayerError
from debiased_laplace.network.blocks import Block, unflatten
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


@dataclass(frozen=True)
class BySensitivity:
    """The parameters with the largest curvature; made by :func:`by_sensitivity`.

    Attributes:
        share: Of all trainable parameters.
        count: Instead, their number.
        blocks: Whether to take whole blocks.
    """

    share: float | None = None
    count: int | None = None
    blocks: bool = False

    def __post_init__(self) -> None:
        if (self.share is None) == (self.count is None):
            given = "neither" if self.share is None else "both"
            raise ValueError(f"Expected either a share or a count of the parameters to choose, got {given}.")
        if self.share is not None and (isinstance(self.share, bool) or not 0 < self.share <= 1):
            raise ValueError(
                f"Expected a share of the parameters above zero and at most one, got {self.share!r}. A number of them "
                "is a count=."
            )
        if self.count is not None:
            _checks.whole(self.count, "count")

    def choose(self, blocks: Sequence[Block], shapes: Mapping[str, torch.Size], diagonal: Tensor) -> list[str] | Tensor:
        """Names of the parameters of whole blocks, or ascending indices of entries ``[n]``.

        Args:
            blocks: Of all parameters.
            shapes: Of the parameters, in their order.
            diagonal: Of the curvature, ``[D]``.

        Raises:
            ValueError: If there are fewer parameters than are wanted, or no block is so small.
        """
        total = len(diagonal)
        size = round(self.share * total) if self.count is None else self.count  # type: ignore[operator]
        if not 1 <= size <= total:
            raise ValueError(f"Expected to choose from 1 to {total} of the {total} parameters, got {self}: {size}.")
        if not self.blocks:
            return diagonal.argsort(descending=True, stable=True)[:size].sort().values.cpu()
        of_parameters = unflatten(diagonal, dict(shapes))
        traces = [sum(float(of_parameters[name].sum()) for name in block.parameters) for block in blocks]
        chosen: set[str] = set()
        for index in sorted(range(len(blocks)), key=lambda index: -traces[index] / blocks[index].size):
            if blocks[index].size <= size:
                size -= blocks[index].size
                chosen.update(blocks[index].parameters)
        if not chosen:
            least = min(blocks, key=lambda block: block.size)
            raise ValueError(
                f"Expected room for a whole block, got {size} of {total} parameters. The smallest, {least.name!r}, has "
                f"{least.size}: choose more, or single entries with blocks=False."
            )
        return [name for name in shapes if name in chosen]


def by_sensitivity(share: float | None = None, *, count: int | None = None, blocks: bool = False) -> BySensitivity:
    """Parameters whose curvature is largest, as ``parameters=`` of a fit: the fit chooses on the data that it draws.

    By the diagonal of the curvature on the data that choose directions. A posterior of data that are added to an
    earlier one keeps the choice of that one.

    Args:
        share: Of all trainable parameters, in (0, 1].
        count: Instead, their number.
        blocks: Take whole blocks (layers), those of the largest mean trace that there is room for, for any structure;
            otherwise single entries, for all structures but ``Kronecker``.

    Raises:
        ValueError: If neither or both of share and count are given, or one is out of its range.

    Example:
        >>> import torch
        >>> import debiased_laplace as dl
        >>> x, y, model = torch.randn(60, 4), torch.randint(3, (60,)), torch.nn.Linear(4, 3)
        >>> chosen = dl.by_sensitivity(share=0.2)
        >>> dl.fit(model, [(x, y)], "classification", structure=dl.Full(), parameters=chosen)
        <Laplace posterior of 3 of 15 parameters>
    """
    return BySensitivity(share, count, blocks)


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


def indices_of(model: nn.Module | Snapshot, masks: Mapping[str, Tensor]) -> Tensor:
    """Inverse of :func:`entries_of`; parameters without a mask have none."""
    every = [masks.get(name, torch.zeros(shape, dtype=torch.bool)) for name, shape in _trainable_shapes(model).items()]
    return torch.cat([mask.flatten().cpu() for mask in every]).nonzero()[:, 0]


def _trainable_shapes(model: nn.Module | Snapshot) -> dict[str, torch.Size]:
    if isinstance(model, Snapshot):
        return {name: model.parameters[name].shape for name in model.trainable}
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
