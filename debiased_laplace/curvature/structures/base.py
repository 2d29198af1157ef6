"""What a structure is, and what several of them need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from debiased_laplace.curvature.basis import Basis
from debiased_laplace.network.factors import Factors
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network


class Statistics(Protocol):
    """Additive statistics of weighted data; sums over data, so that weights of one mean sum to one over all parts."""

    #: Whether :meth:`curvatures` is equation (2) itself, and not a further approximation of it.
    exact: ClassVar[bool]

    def __add__(self, other: Any) -> Any:
        """Statistics of both data together."""
        ...

    def __mul__(self, factor: float) -> Any:
        """Statistics of the same data with weights that are multiplied by a factor."""
        ...

    def all_reduce(self) -> Any:
        """Sum over all processes that work together; each weighs its data for all of them."""
        ...

    def curvatures(self, basis: Basis) -> Tensor:
        """Curvatures along the directions of a basis of the same structure, ``[rank]``, a per-datum mean."""
        ...


@dataclass(frozen=True)
class Held:
    """How many numbers a structure holds, of the precision of the network, whatever the data are.

    Attributes:
        statistics: Those of one fold.
        observed: Sums over the stream.
        basis: The directions.
        workspace: What choosing them takes besides.
    """

    statistics: int = 0
    observed: int = 0
    basis: int = 0
    workspace: int = 0


@dataclass(frozen=True)
class Decomposed:
    """Sizes of the matrices whose eigenvectors are directions.

    Attributes:
        once: Of those that are sums over the stream, the same for all folds.
        each: Of those that every round has, and the final directions.
    """

    once: Sequence[int] = ()
    each: Sequence[int] = ()


@dataclass(frozen=True)
class Window:
    """Consecutive data of a stream that are looked at.

    Attributes:
        part: Which.
        weight: How many times their number they stand for.
    """

    part: slice
    weight: int


#: Which data are looked at where so many, in the whole stream, tell enough.
Look = Callable[[int], Sequence[Window]]


class Structure(ABC):
    """Turns statistics of data into directions. A new structure implements the two methods."""

    #: Whether the directions depend on data at all. If not, there is no bias, and splitting only discards data.
    data_dependent: ClassVar[bool] = True

    #: Whether a forward pass over the whole stream tells something (:meth:`observe`).
    observes: ClassVar[bool] = False

    #: Whether :meth:`eigenbasis` deals its work to all processes; otherwise one of them does it for all.
    deals_work: ClassVar[bool] = False

    @property
    def projects(self) -> bool:
        """Whether equation (2) measures its curvatures; otherwise its statistics always do."""
        return True

    def observe(self, network: Network, factors: Factors, look: Look) -> Any:
        """What a forward pass alone tells of its data, additive over data.

        Args:
            network: The network.
            factors: Inputs of its layers.
            look: Which of the data to sum over, and how often each, where so many data of the stream tell enough.
        """
        raise NotImplementedError

    def complete(self, statistics: Any, observed: Any) -> Any:
        """Statistics with the sum over :meth:`observe` in the place of what they know less well."""
        return statistics

    def held(self, network: Network) -> Held | None:
        """What statistics and directions hold, at most; None if that depends on the data."""
        return None

    def decomposed(self, network: Network, n_columns: int) -> Decomposed:
        """What is decomposed, of data with so many vectors to back-propagate."""
        return Decomposed()

    def unfactored(self, network: Network) -> list[str]:
        """Parameters that have a diagonal curvature for want of a better one, not by choice."""
        return []

    def traces(self, statistics: Any) -> Tensor | None:
        """Traces of the curvature of every part, ``[n_parts]``, of structures whose directions may leave some out."""
        return None

    def statistics_of(self, network: Network, basis: Basis, curvatures: Tensor) -> Any:
        """Statistics that gave a basis and curvatures, to which those of more data can be added; None if not known."""
        return None

    @abstractmethod
    def measure(self, network: Network, data: CurvatureData) -> Any:
        """Statistics of weighted data, in one pass."""

    def measure_unobserved(self, network: Network, data: CurvatureData) -> Any:
        """Statistics of weighted data that :meth:`complete` is to complete: what it replaces need not be in them."""
        return self.measure(network, data)

    @abstractmethod
    def eigenbasis(self, network: Network, statistics: Any, like: Basis | None = None) -> Basis:
        """The orthonormal directions they give, by descending curvature where there is an order.

        Args:
            network: The model with its blocks.
            statistics: Of the data that choose the directions.
            like: A basis of the same structure whose numbers of directions are wanted, where these depend on data.
        """


def resolution(precision: float) -> float:
    """Differences of eigenvalues, relative to the largest, that cannot be told from rounding.

    Args:
        precision: Relative precision of the entries of the matrix.
    """
    return 3 * max(4 * precision, 2e-13)


def eigenspaces(values: Tensor, precision: float) -> Tensor | None:
    """Which eigenvalues ``[k]``, descending, are one up to rounding, as numbers ``[k]``; None if all differ.

    Args:
        values: Of one matrix, the largest first.
        precision: Relative precision of its entries.
    """
    if not len(values):
        return None
    width, known = resolution(precision) * float(values[0].abs()), values.tolist()
    labels, start = [0], known[0]
    for value in known[1:]:
        same = start - value <= width
        labels.append(labels[-1] + (not same))
        start = start if same else value
    if labels[-1] == len(known) - 1:
        return None
    return torch.tensor(labels, device=values.device)


def group_blocks(network: Network, blocks: str | Sequence[Sequence[str]] | None) -> list[tuple[int, ...]]:
    """Which blocks share one dense part.

    Args:
        network: The model with its blocks.
        blocks: None for all of them, ``"layer"`` for one part for each block, or groups of patterns
            (:mod:`fnmatch`) of parameter names.

    Raises:
        ValueError: If a parameter is in no group or in several, or a group cuts a block in two.
    """
    if blocks is None:
        return [tuple(range(len(network.blocks)))]
    if blocks == "layer":
        return [(index,) for index in range(len(network.blocks))]
    if isinstance(blocks, str):
        raise ValueError(
            f'Expected blocks to be None, "layer" or lists of patterns of parameter names, got {blocks!r}.'
        )
    groups: list[list[int]] = [[] for _ in blocks]
    for index, block in enumerate(network.blocks):
        matched = {
            tuple(i for i, patterns in enumerate(blocks) if any(fnmatchcase(name, pattern) for pattern in patterns))
            for name in block.parameters
        }
        (of_block,) = matched if len(matched) == 1 else ((),)
        if len(of_block) != 1:
            raise ValueError(
                f"Expected the parameters {list(block.parameters)}, which share a curvature block, in exactly one "
                f"group of blocks={[list(patterns) for patterns in blocks]}. Cover every parameter once."
            )
        groups[of_block[0]].append(index)
    if not all(groups):
        raise ValueError(f"Expected every group of blocks to match a parameter, got {list(blocks)}.")
    return [tuple(group) for group in groups]
