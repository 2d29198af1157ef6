"""How a call sees the parameters behind its arguments: as they are, as a view of all or of some rows, or derived.

A view with all entries is the parameter in another order, so that the layer's block is one of the parameter. Rows of a
larger weight (the projections of queries, keys and values in one tensor) are outputs of a larger layer. Anything else
that was made of parameters alone is differentiated as it was made (:mod:`debiased_laplace.network.formed`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from debiased_laplace.network.arrangement import Arrangement, Reshuffled


@dataclass(frozen=True)
class Use:
    """One argument of a call, the weight or the bias.

    Attributes:
        names: Parameters that it is made of; one where it is a parameter, or a view of one.
        shape: Of the parameter.
        split: See :class:`.Reshuffled`; None for the parameter as it is, or for rows of it.
        order: Likewise.
        whole: Whether all entries of the parameter are there.
        derived: Whether it is anything else than a parameter, a view of all of its entries or of some of its rows.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...] = ()
    split: tuple[int, ...] | None = None
    order: tuple[int, ...] = ()
    whole: bool = True
    derived: bool = False

    @property
    def name(self) -> str:
        """Of the parameter."""
        return self.names[0]

    def arranged(self, inner: Arrangement) -> Arrangement:
        """Arrangement of the parameter, from that of the argument."""
        if self.split is None:
            return inner
        return Reshuffled(inner, self.shape, self.split, self.order)


def use_of(argument: Tensor | None, names: dict[int, str], made_of: list[str]) -> Use | None:
    """How an argument of a call is made of parameters; None if it is not.

    Args:
        argument: The weight or the bias of a call.
        names: Of the trainable parameters, by identity.
        made_of: Names of those that the argument depends on.
    """
    if argument is None or not made_of:
        return None
    if id(argument) in names:
        return Use((names[id(argument)],), tuple(argument.shape))
    base = argument._base
    if base is not None and id(base) in names and base.is_contiguous() and argument.dtype == base.dtype:
        name = (names[id(base)],)
        if argument.numel() == base.numel() and (reshuffling := _reshuffling(argument)) is not None:
            return Use(name, tuple(base.shape), *reshuffling)
        if first_row(argument, base) is not None:
            return Use(name, tuple(base.shape), whole=False)
    return Use(tuple(made_of), derived=True)


def first_row(argument: Tensor, base: Tensor) -> int | None:
    """Where an argument begins that consists of consecutive rows of a parameter; None if it does not."""
    if argument.ndim != base.ndim or argument.shape[1:] != base.shape[1:] or argument.stride() != base.stride():
        return None
    start = argument.storage_offset() - base.storage_offset()
    row = int(base.stride(0)) if base.ndim else 1
    return int(start) // row if base.ndim and int(start) % row == 0 else None


def _reshuffling(view: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """``split`` and ``order`` with ``base.reshape(split).permute(order)`` equal to a view of all entries."""
    strides = [int(stride) for stride in view.stride()]
    by_stride = sorted(range(view.ndim), key=lambda dim: (-strides[dim], view.shape[dim] == 1))
    split = tuple(view.shape[dim] for dim in by_stride)
    expected = 1
    for dim in reversed(by_stride):
        if view.shape[dim] > 1 and strides[dim] != expected:
            return None
        expected *= view.shape[dim]
    return split, tuple(by_stride.index(dim) for dim in range(view.ndim))
