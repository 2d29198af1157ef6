"""Functions of entries, with a parameter in them that is repeated over data and positions: sums, products, and others.

Positions and tokens that are added, scales of layers, masks, attention biases. The gradient of such a parameter is the
back-propagated one times the derivative of the function, summed over what it was repeated over: there is nothing to
solve. Large tables, the positions of a Transformer, are seen as the embeddings that they are: row after row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from debiased_laplace._guards import gradients_enabled
from debiased_laplace.network.arrangement import Arrangement, Stacked
from debiased_laplace.network.kinds import DENSE, DIAGONAL_INPUTS, MAX_DENSE, Kind
from debiased_laplace.network.layers.call import Arguments, Call, IsUsed, Layout, rule_of_used
from debiased_laplace.network.layers.embedding import RowsAsInputs
from debiased_laplace.network.selected import SelectedInputs
from debiased_laplace.network.tables import table_rows

#: Numbers above which a table has factors, as an embedding has, and no dense block: its decomposition takes seconds.
MIN_TABLE = 512

#: Derivative of the function in the parameter, entry by entry, of the shape of the output or one that broadcasts to it.
Factor = Callable[[], Tensor | float]


@dataclass
class PointwiseCall(Call):
    """A function of entries, one argument of which is ``weight``, repeated along the dimensions where it has one entry.

    Attributes:
        kept: Dimensions of the output along which the parameter varies.
        factor: The function's derivative in it.
        rows: Of a large table, which rows the argument has, ``[T]``; the weight is then the table.
        unfolded: Shape of the output in which what is repeated has a dimension apart from that along which it is.
    """

    kept: tuple[int, ...] = ()
    factor: Factor = lambda: 1.0
    rows: Tensor | None = None
    unfolded: tuple[int, ...] | None = None

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        return DENSE if self.rows is None else DIAGONAL_INPUTS

    @property
    def arrangement(self) -> Arrangement:  # type: ignore[override]
        return Stacked() if self.rows is None else RowsAsInputs()

    @property
    def factored(self) -> bool:  # type: ignore[override]
        return self.rows is not None

    @property
    def n_trailing(self) -> int:  # type: ignore[override]
        return len(self.kept)

    def aligned(self, gradient: Tensor) -> Tensor:
        if self.unfolded is not None:
            gradient = gradient.reshape(self.unfolded)
        others = (dim for dim in range(gradient.ndim) if dim not in self.kept)
        return gradient.permute(*others, *self.kept)

    def matrix_shape(self, *, weight: bool, bias: bool) -> tuple[int, int, int]:
        assert self.weight is not None
        if self.rows is None:
            return 1, self.weight.numel(), 1
        return 1, self.weight.shape[-1], self.weight.numel() // self.weight.shape[-1]

    def inputs_memory(self, n_inputs: int) -> int:
        return 2

    def narrow(self, part: slice, n_data: int, layout: Layout) -> Call:
        return self  # inputs are the same for all data

    def inputs(self, n_data: int, layout: Layout, *, ones: bool) -> Tensor | SelectedInputs:
        assert self.weight is not None
        if self.rows is None:
            return self.weight.new_ones((n_data, 1, 1, 1))
        index = self.rows.expand(n_data, -1)
        values = self.weight.new_ones(index.shape, device=index.device)
        return SelectedInputs(index, values, self.weight.numel() // self.weight.shape[-1])

    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        """``[N, 1, P, 1]``, or ``[N, 1, D, T]`` of a table."""
        of_argument = self._of_argument(gradient, n_data, layout)
        if self.rows is None:
            return of_argument.flatten(1)[:, None, :, None]
        assert self.weight is not None
        return of_argument.reshape(n_data, len(self.rows), self.weight.shape[-1]).mT[:, None]

    def gradients(self, gradient: Tensor, n_data: int, layout: Layout) -> tuple[Tensor | None, Tensor | None]:
        if self.rows is not None:
            return super().gradients(gradient, n_data, layout)
        assert self.weight is not None
        return self._of_argument(gradient, n_data, layout).reshape(n_data, *self.weight.shape), None

    def _of_argument(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        factor = self.factor()
        if isinstance(factor, Tensor):
            factor = self.aligned(factor.to(gradient.dtype).expand(self._output_shape(gradient.shape)))
        return layout.by_datum(gradient * factor, n_data, self.n_trailing).sum(1)

    def _output_shape(self, aligned: torch.Size) -> list[int]:
        others = [dim for dim in range(len(aligned)) if dim not in self.kept]
        shape = [0] * len(aligned)
        for dim, size in zip([*others, *self.kept], aligned, strict=True):
            shape[dim] = size
        return shape


def repeated(argument: Tensor, shape: Sequence[int], factor: Factor, first: int | None = None) -> Arguments | None:
    """A parameter in an output of a shape, of which it has some dimensions; None if it has all of them.

    Args:
        argument: A parameter, or made of parameters.
        shape: Of the output.
        factor: Derivative of the function.
        first: Dimension of the output that its first one is along; by default their last ones are.
    """
    collapsed = argument
    for dim, stride in enumerate(argument.stride()):
        if stride == 0 and argument.shape[dim] > 1:  # it was repeated before
            collapsed = collapsed.narrow(dim, 0, 1)
    first = len(shape) - argument.ndim if first is None else first
    kept = tuple(first + dim for dim, size in enumerate(collapsed.shape) if size > 1)
    if first < 0 or len(kept) == len(shape):
        return None
    one = Arguments(
        PointwiseCall, collapsed.detach(), collapsed, None, {"kept": kept, "factor": factor}, stands_for=argument
    )
    if (found := table_rows(collapsed)) is not None:
        table, rows = found
        if table.numel() > MIN_TABLE and 1 < len(rows) and 1 < table.shape[-1] <= MAX_DENSE and table.requires_grad:
            return replace(one, weight=table, settings={**one.settings, "rows": rows})
    return one


# -- rules -----------------------------------------------------------------------------------------


def _methods(*names: str) -> list[Callable[..., Any]]:
    """Functions and methods of torch by these names, and the methods that operators call."""
    functions = []
    for name in names:
        for owner in (torch, Tensor):
            functions += [getattr(owner, n) for n in (name, f"__{name}__", f"__r{name}__") if hasattr(owner, n)]
    return list(dict.fromkeys(functions))


def _values(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def _shape(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Size:
    return torch.broadcast_shapes(*(value.shape for value in _values(args, kwargs)))


def _constant(number: float) -> Factor:
    """A number as a factor that keeps nothing else alive."""
    return lambda: number


def _unchanged(tensor: Tensor) -> Factor:
    """The tensor as a factor, as long as nobody has written to it."""
    tensor, version = tensor.detach(), tensor._version

    def factor() -> Tensor:
        if tensor._version != version:
            raise RuntimeError(
                "A tensor was overwritten in place after it had been multiplied with a parameter, so that the "
                "parameter's curvature cannot be computed. Make the operation after it out of place."
            )
        return tensor

    return factor


def _of_any(function: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any], at: Tensor) -> Factor:
    """Derivative of a function of entries in one of its arguments, by automatic differentiation."""

    def factor() -> Tensor:
        with gradients_enabled():
            leaf = at.detach().expand(_shape(args, kwargs)).clone().requires_grad_()

            def replaced(value: Any) -> Any:
                return leaf if value is at else value.detach() if isinstance(value, Tensor) else value

            outputs = function(*map(replaced, args), **{name: replaced(value) for name, value in kwargs.items()})
            return torch.autograd.grad(outputs.sum(), leaf)[0]

    return factor


def _each(is_used: IsUsed, args: Sequence[Any], kwargs: dict[str, Any], factor: Callable[[Tensor], Factor]) -> Any:
    used = [value for value in _values(args, kwargs) if is_used(value)]
    if len({id(value) for value in used}) < len(used) or not all(value.is_floating_point() for value in used):
        return None  # one parameter in two places
    arguments = [repeated(value, _shape(args, kwargs), factor(value)) for value in used]
    return None if None in arguments else arguments


@rule_of_used(*_methods("add", "add_", "iadd"))
def _sum(is_used: IsUsed, input: Any, other: Any, *args: Any, alpha: float = 1, **kwargs: Any) -> Any:
    if args or kwargs:
        return None
    return None if is_used(input) and is_used(other) else _each(
        is_used, [input, other], {}, lambda value: _constant(1.0 if value is input else float(alpha))
    )  # fmt: skip


def _difference(is_used: IsUsed, input: Any, other: Any, *args: Any, alpha: float = 1, **kwargs: Any) -> Any:
    return _sum(is_used, input, other, *args, alpha=-alpha, **kwargs)


def _reversed_difference(is_used: IsUsed, input: Any, other: Any, *args: Any, alpha: float = 1, **kwargs: Any) -> Any:
    return None if alpha != 1 else _difference(is_used, other, input, *args, **kwargs)


rule_of_used(*_methods("sub", "subtract", "sub_", "isub"))(_difference)
rule_of_used(torch.rsub, Tensor.__rsub__)(_reversed_difference)


@rule_of_used(*_methods("mul", "multiply"))
def _product(is_used: IsUsed, input: Any, other: Any, **kwargs: Any) -> Any:
    if kwargs or (is_used(input) and is_used(other)):
        return None

    def factor(value: Tensor) -> Factor:
        multiplied = other if value is input else input
        return _unchanged(multiplied) if isinstance(multiplied, Tensor) else lambda: float(multiplied)

    return _each(is_used, [input, other], {}, factor)


def _general(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def reads(is_used: IsUsed, *args: Any, **kwargs: Any) -> Any:
        if "out" in kwargs:
            return None
        return _each(is_used, args, kwargs, lambda value: _of_any(function, args, kwargs, value))

    return reads


for _name in (
    "div", "divide", "true_divide", "truediv", "pow", "maximum", "minimum", "fmax", "fmin", "where", "lerp", "addcmul",
    "addcdiv", "atan2", "hypot", "logaddexp", "clamp", "clip", "copysign", "xlogy", "heaviside", "float_power",
    "masked_fill",
):  # fmt: skip
    for _function in _methods(_name):
        rule_of_used(_function)(_general(_function))


def _in_place_rule(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def reads(is_used: IsUsed, input: Tensor, other: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or is_used(input):
            return None
        return _each(
            is_used, [input, other], {}, lambda value: _of_any(function, [input.detach().clone(), other], {}, value)
        )

    return reads


for _name, _function in (
    ("mul_", torch.mul), ("multiply_", torch.mul), ("__imul__", torch.mul), ("div_", torch.div),
    ("__itruediv__", torch.div),
):  # fmt: skip
    rule_of_used(getattr(Tensor, _name))(_in_place_rule(_function))


@rule_of_used(Tensor.expand, torch.broadcast_to, Tensor.broadcast_to, Tensor.expand_as)
def _expansion(is_used: IsUsed, input: Tensor, *sizes: Any, **kwargs: Any) -> Any:
    if kwargs or not is_used(input):
        return None
    sizes = sizes[0].shape if isinstance(sizes[0], Tensor) else sizes[0] if len(sizes) == 1 else sizes
    sizes = (sizes,) if isinstance(sizes, int) else sizes
    first = len(sizes) - input.ndim
    shape = [input.shape[dim - first] if size == -1 else size for dim, size in enumerate(sizes)]
    arguments = repeated(input, shape, lambda: 1.0)
    return None if arguments is None else [arguments]


@rule_of_used(Tensor.repeat, Tensor.tile, torch.tile)
def _repetition(is_used: IsUsed, input: Tensor, *repeats: Any, **kwargs: Any) -> Any:
    if kwargs or not is_used(input) or not repeats:
        return None
    repeats = tuple(repeats[0]) if len(repeats) == 1 and not isinstance(repeats[0], int) else repeats
    shape = (1,) * (len(repeats) - input.ndim) + tuple(input.shape)
    repeats = (1,) * (len(shape) - len(repeats)) + tuple(repeats)
    return _copies(input, [size for dim in range(len(shape)) for size in (1, shape[dim])],
                   [size for dim in range(len(shape)) for size in (repeats[dim], shape[dim])])  # fmt: skip


@rule_of_used(torch.repeat_interleave, Tensor.repeat_interleave)
def _repetition_of_entries(is_used: IsUsed, input: Tensor, repeats: Any, dim: int | None = None, **kwargs: Any) -> Any:
    if kwargs or not is_used(input) or not isinstance(repeats, int) or dim is None:
        return None
    shape, place = list(input.shape), dim % input.ndim + 1
    return _copies(input, [*shape[:place], 1, *shape[place:]], [*shape[:place], repeats, *shape[place:]])


def _copies(input: Tensor, shape: list[int], unfolded: list[int]) -> Any:
    """What is repeated, in a shape with a dimension of one for every dimension of copies."""
    arguments = repeated(input.reshape(shape), unfolded, lambda: 1.0)
    if arguments is None:
        return None
    return [replace(arguments, settings={**arguments.settings, "unfolded": tuple(unfolded)}, stands_for=input)]


@rule_of_used(torch.prelu)
def _prelu(is_used: IsUsed, input: Tensor, weight: Tensor) -> Any:
    if is_used(input) or (weight.numel() > 1 and input.ndim < 2):
        return None
    values = input.detach().clamp_max(0)
    first = 1 if weight.numel() > 1 else None
    arguments = repeated(weight.flatten() if weight.ndim else weight, input.shape, lambda: values, first)
    return None if arguments is None else [replace(arguments, stands_for=weight)]
