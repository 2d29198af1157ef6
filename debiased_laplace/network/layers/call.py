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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from debiased_laplace.network.arrangement import Arrangement, SideBySide
from debiased_laplace.network.kinds import KRONECKER, Kind
from debiased_laplace.network.selected import SelectedInputs, gradients_of_data


def at_least_float32(tensor: Tensor) -> Tensor:
    """A tensor of half precision in single precision: of what a layer computes no further rounding is wanted."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class Layout:
    """Where the data are in the leading dimensions of a call's tensors.

    ``batch_dimension`` is ``None`` for the usual case: data first, possibly merged with positions that
    vary faster (``[N * T, ...]``). Otherwise positions come before the data: ``[T, N, ...]`` has the
    batch dimension 1, ``[T * N, ...]`` has 0 (as inside multi-head attention).
    """

    batch_dimension: int | None = None

    #: Whether all data have the same number of positions (:class:`~debiased_laplace.network.rows.RowLayout`).
    is_regular: ClassVar[bool] = True

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
        dims = [*range(1, len(leading)), 0]
        possible += [Layout(dim) for dim in dims if len(leading) > dim and leading[dim] % n_data == 0]
        return possible


@dataclass
class Call(ABC):
    """One call of a layer function in a forward pass.

    Attributes:
        weight: The weight argument, or None.
        bias: The bias argument, or None.
        input: The input argument, detached; without its numbers (on the device ``meta``) if the weight is not
            trainable.
        output_shape: Shape of the output, aligned (:meth:`aligned`).
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
    #: Whether its parameters can be a block with factors; otherwise their gradients are formed.
    factored: ClassVar[bool] = True
    #: Trailing dimensions of the aligned output that are no leading data or position dimension.
    n_trailing = 1

    def aligned(self, gradient: Tensor) -> Tensor:
        """A gradient at the output with data and positions in the leading dimensions; :attr:`output_shape` is its."""
        return gradient

    @property
    def groups(self) -> int:
        """Number of groups G."""
        return 1

    @property
    def is_sequence(self) -> bool:
        """Whether its positions, if it has any, may be padding: those of tokens and times, not those of images."""
        return not self.arrangement.stacked

    @property
    def has_positions(self) -> bool:
        """Whether its output has a dimension for positions, of whatever size."""
        return len(self.output_shape) > 1 + self.n_trailing

    def matrix_shape(self, *, weight: bool, bias: bool) -> tuple[int, int, int]:
        """``(G, O, I)`` of the block that has the weight, the bias or both; the bias is one more input."""
        assert self.weight is not None
        return self.groups, self.weight.shape[0] // self.groups, self.weight[0].numel() * weight + bias

    def inputs_memory(self, n_inputs: int) -> int:
        """Numbers that :meth:`inputs` has for every position, of a block with so many inputs."""
        return n_inputs

    def narrow(self, part: slice, n_data: int, layout: Layout) -> Call | None:
        """The same call for some of the data alone; None if the data do not come first in its tensors."""
        if layout.batch_dimension is not None or not layout.is_regular:
            return None
        copies = self.output_shape[0] // n_data
        rows = slice(part.start * copies, part.stop * copies)
        shape = torch.Size((rows.stop - rows.start, *self.output_shape[1:]))
        return replace(self, input=self.input[rows], output_shape=shape)

    @abstractmethod
    def inputs(self, n_data: int, layout: Layout, *, ones: bool) -> Tensor | SelectedInputs:
        """Inputs of the weight, ``[N, G, I, S]``; with ``ones`` a further input that is one."""

    def second_moment(self, dtype: torch.dtype, *, ones: bool, weights: Tensor | None = None) -> Tensor | None:
        """Sum of the outer products of :meth:`inputs` over data and positions, ``[G, I, I]``, if there is a faster way.

        Args:
            dtype: Its precision.
            ones: Whether a further input is one.
            weights: Of what the batch dimension of the input has, ``[B]``; None if all are one.
        """
        return None

    def input_sums(self, n_data: int, layout: Layout, dtype: torch.dtype, *, ones: bool) -> tuple[Tensor, int] | None:
        """Sums of :meth:`inputs` over positions in a precision, ``[N, G, I, 1]``, and S, if there is a faster way."""
        return None

    @abstractmethod
    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        """A back-propagated vector, ``[*output_shape] -> [N, G, O, S]``."""

    def gradients(self, gradient: Tensor, n_data: int, layout: Layout) -> tuple[Tensor | None, Tensor | None]:
        """What a back-propagated vector is in the arguments, formed: ``[N, *shape]`` of the weight and of the bias.

        Args:
            gradient: Aligned, ``[*output_shape]``.
            n_data: N.
            layout: Where the data are.
        """
        vectors = self.outputs(gradient, n_data, layout)
        of_weight = None
        if self.weight is not None and self.weight.requires_grad:
            inputs = self.inputs(n_data, layout, ones=False).to(vectors.dtype)
            matrix = gradients_of_data(vectors.movedim(0, -1), inputs)
            of_weight = self.arrangement.tensor(matrix, self.weight.shape)
        return of_weight, None if self.bias is None else vectors.sum(-1).reshape(n_data, *self.bias.shape)


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
        stands_for: The argument of the function that the weight was made from, if it is not that itself.
    """

    call: type[Call]
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    settings: dict[str, Any] = field(default_factory=dict)
    keeps_frozen_weight: bool = True
    stands_for: Tensor | None = None


#: Whether a tensor is made of trainable parameters alone, or one of them.
IsUsed = Callable[[Any], bool]
Rule = Callable[..., Sequence[Arguments] | None]

#: What is known of the functions that layers call: a rule is given :data:`IsUsed` and the arguments, and tells how
#: every parameter among these is used; None says that it does not know.
RULES: dict[Callable[..., Any], Rule] = {}


def rule(*functions: Callable[..., Any]) -> Callable[[Callable[..., Arguments | None]], Any]:
    """Makes what it decorates the rule of functions of torch with a place for a weight and for a bias."""

    def register(reads: Callable[..., Arguments | None]) -> Callable[..., Arguments | None]:
        def reads_one(_: IsUsed, *args: Any, **kwargs: Any) -> Sequence[Arguments] | None:
            arguments = reads(*args, **kwargs)
            return None if arguments is None else [arguments]

        RULES.update(dict.fromkeys(functions, reads_one))
        return reads

    return register


def rule_of_used(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Makes what it decorates the rule of functions of torch in which any argument may be a parameter."""

    def register(reads: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, reads))
        return reads

    return register


#: ``see(function, *arguments)`` calls a function such that rules are applied to it.
See = Callable[..., Any]

#: A function of torch written out: it is given ``see`` and the function's arguments. Nothing looks at what it calls
#: otherwise.
Composite = Callable[..., Any]

#: Functions that layers call which are made of others. ``NotImplemented`` says that the function itself is called.
COMPOSITES: dict[Callable[..., Any], Composite] = {}


def composite(*functions: Callable[..., Any]) -> Callable[[Composite], Composite]:
    """Makes what it decorates the way in which functions of torch are written out."""

    def register(written_out: Composite) -> Composite:
        COMPOSITES.update(dict.fromkeys(functions, written_out))
        return written_out

    return register
