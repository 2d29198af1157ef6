r"""Calls of layer functions, brought to one canonical form before any mathematics.

For weights W (and a bias b), the gradient of :math:`s^\top f_n` is
:math:`\sum_s g_{ns} a_{ns}^\top`, with

    a: [N, G, I, S]       the call's inputs at S shared positions (patches, tokens), in G groups
    g: [N, G, O, S]       a back-propagated vector at its outputs; [N, G, V, O, S] for V of them

Positions come last because that is how convolutions hold them: nothing is transposed on the way.

Whatever a call looks like, it has to say: its inputs ``a``, how a gradient at its output becomes ``g``, which of its
arguments are the weight and the bias, and what block they get. Parameters that scale and shift (normalisation layers)
have so few numbers that they are kept exactly: their gradient itself takes the place of g, with one position and
``a = 1``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from debiased_laplace.network.arrangement import Arrangement, SideBySide
from debiased_laplace.network.kinds import KRONECKER, Kind
from debiased_laplace.network.selected import SelectedInputs

#: Coarser grids of positions: every second one in each dimension of a convolution (2, 4 or 8), every fourth token.
N_PHASES = 4


@dataclass(frozen=True)
class Layout:
    """Where the data are in the leading dimensions of a call's tensors.

    ``batch_dimension`` is ``None`` for the usual case: data first, possibly merged with positions that
    vary faster (``[N * T, ...]``). Otherwise positions come before the data: ``[T, N, ...]`` has the
    batch dimension 1, ``[T * N, ...]`` has 0 (as inside multi-head attention).
    """

    batch_dimension: int | None = None

    def by_datum(self, tensor: Tensor, n_data: int, n_trailing: int) -> Tensor:
        """``[leading..., trailing...] -> [N, S, trailing...]``."""
        trailing = tensor.shape[tensor.ndim - n_trailing :]
        if self.batch_dimension is None:
            shared = math.prod(tensor.shape[: tensor.ndim - n_trailing]) // n_data
            return tensor.reshape(n_data, shared, *trailing)
        after = math.prod(tensor.shape[self.batch_dimension + 1 : tensor.ndim - n_trailing])
        return tensor.reshape(-1, n_data, after, *trailing).transpose(0, 1).reshape(n_data, -1, *trailing)

    @staticmethod
    def candidates(shape: torch.Size, n_data: int, n_trailing: int) -> list[Layout]:
        """Layouts that the shape of a call's output allows, the most usual one first."""
        leading = shape[: len(shape) - n_trailing]
        possible = []
        if leading and leading[0] % n_data == 0:
            possible.append(Layout())
        possible += [Layout(dim) for dim in (1, 0) if len(leading) > dim and leading[dim] % n_data == 0]
        return possible


@dataclass
class Call(ABC):
    """One call of a layer function in a forward pass.

    Attributes:
        weight: The weight argument, or None.
        bias: The bias argument, or None.
        input: The input argument, detached.
        output_shape: Shape of the output.
        edge: The output's place in the autograd graph; it stays valid under in-place activations.
        version: The input's version counter, to notice that somebody overwrote it later.
    """

    weight: Tensor | None
    bias: Tensor | None
    input: Tensor
    output_shape: torch.Size
    edge: Any
    version: int = 0

    #: What curvature the block of its parameters gets.
    kind: ClassVar[Kind] = KRONECKER
    #: How they are arranged as a matrix; if stacked, weight and bias are one block in any case.
    arrangement: ClassVar[Arrangement] = SideBySide()
    #: Trailing dimensions of the output that are no leading data or position dimension.
    n_trailing = 1

    @property
    def groups(self) -> int:
        """Number of groups G."""
        return 1

    def matrix_shape(self, *, weight: bool, bias: bool) -> tuple[int, int, int]:
        """``(G, O, I)`` of the block that has the weight, the bias or both; the bias is one more input."""
        assert self.weight is not None
        return self.groups, self.weight.shape[0] // self.groups, self.weight[0].numel() * weight + bias

    def inputs_memory(self, n_inputs: int) -> int:
        """Numbers that :meth:`inputs` has for every position, of a block with so many inputs."""
        return n_inputs

    def narrow(self, part: slice, n_data: int, layout: Layout) -> Call | None:
        """The same call for some of the data alone; None if the data do not come first in its tensors."""
        if layout.batch_dimension is not None:
            return None
        copies = self.output_shape[0] // n_data
        rows = slice(part.start * copies, part.stop * copies)
        shape = torch.Size((rows.stop - rows.start, *self.output_shape[1:]))
        return replace(self, input=self.input[rows], output_shape=shape)

    @abstractmethod
    def inputs(self, n_data: int, layout: Layout, *, ones: bool, phase: int | None = None) -> Tensor | SelectedInputs:
        """Inputs of the weight, ``[N, G, I, S]``; with ``ones`` a further input that is one.

        With a ``phase``, positions on a coarser grid, one of those that together have all positions, times the root of
        their number: outer products, summed over positions, then have the right mean over phases.
        """

    @abstractmethod
    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        """A back-propagated vector, ``[*output_shape] -> [N, G, O, S]``."""


@dataclass(frozen=True)
class Arguments:
    """What a rule reads off the arguments of a function.

    Attributes:
        call: Class of the call.
        input: What the weight is applied to.
        weight: The weight, trainable or not, or None.
        bias: The bias, trainable or not, or None.
        settings: Further fields of the class.
        keeps_frozen_weight: Whether the class needs a weight that is not trainable, for its shape.
    """

    call: type[Call]
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    settings: dict[str, Any] = field(default_factory=dict)
    keeps_frozen_weight: bool = True


Rule = Callable[..., Arguments | None]

#: What is known of the functions that layers call: a rule is given their arguments; None says it does not know them.
RULES: dict[Callable[..., Tensor], Rule] = {}


def rule(*functions: Callable[..., Tensor]) -> Callable[[Rule], Rule]:
    """Makes what it decorates the rule of functions of torch."""

    def register(reads: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, reads))
        return reads

    return register
