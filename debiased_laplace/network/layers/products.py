r"""Products of matrices with a parameter, in whatever notation: ``x @ W``, ``addmm``, ``einsum``.

With a label for every dimension, those of the weight that the input has too and the output does not are summed over
(inputs I), those that the output has and the input does not are made (outputs O), and those that both have are kept
apart (groups G). The other labels of the input are data and positions: a linear layer in every case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from debiased_laplace.network.arrangement import Arrangement, Permuted
from debiased_laplace.network.layers.call import (
    Arguments,
    Call,
    IsUsed,
    Layout,
    See,
    at_least_float32,
    composite,
    rule_of_used,
)
from debiased_laplace.network.layers.pointwise import repeated


@dataclass
class ProductCall(Call):
    """A product of an input ``[data and positions..., G..., I...]`` with a weight.

    Attributes:
        order: Dimensions of the weight: groups, outputs, inputs.
        sizes: How many of them are groups, outputs, inputs.
        output_order: Dimensions of the output: data and positions, groups, outputs.
    """

    order: tuple[int, ...] = ()
    sizes: tuple[int, int, int] = (0, 0, 0)
    output_order: tuple[int, ...] = ()

    @property
    def arrangement(self) -> Arrangement:  # type: ignore[override]
        assert self.weight is not None
        return Permuted(tuple(self.weight.shape), self.order)

    @property
    def n_trailing(self) -> int:  # type: ignore[override]
        return self.sizes[0] + self.sizes[1]

    @property
    def groups(self) -> int:
        return self._matrix[0]

    @property
    def _matrix(self) -> tuple[int, int, int]:
        assert self.weight is not None
        ordered = [self.weight.shape[dim] for dim in self.order]
        g, o, _ = self.sizes
        return math.prod(ordered[:g]), math.prod(ordered[g : g + o]), math.prod(ordered[g + o :])

    def aligned(self, gradient: Tensor) -> Tensor:
        return gradient.permute(self.output_order)

    def matrix_shape(self, *, weight: bool, bias: bool) -> tuple[int, int, int]:
        groups, outputs, inputs = self._matrix
        return groups, outputs, inputs * weight + bias

    def inputs(self, n_data: int, layout: Layout, *, ones: bool) -> Tensor:
        groups, _, inputs = self._matrix
        rows = layout.by_datum(self.input, n_data, self.sizes[0] + self.sizes[2])
        rows = rows.reshape(*rows.shape[:2], groups, inputs)  # [N, S, G, I]
        rows = F.pad(rows, (0, 1), value=1.0) if ones else rows
        return rows.permute(0, 2, 3, 1)

    def outputs(self, gradient: Tensor, n_data: int, layout: Layout) -> Tensor:
        groups, outputs, _ = self._matrix
        rows = layout.by_datum(gradient, n_data, self.n_trailing)
        return rows.reshape(*rows.shape[:2], groups, outputs).permute(0, 2, 3, 1)


def product(
    input: Tensor, weight: Tensor, labels: tuple[Sequence[Any], Sequence[Any], Sequence[Any]],
    bias: Tensor | None = None,
) -> Arguments | None:  # fmt: skip
    """What a product of two tensors is as a linear layer; None if it is none.

    Args:
        input: The factor that depends on the data.
        weight: The one that is made of parameters.
        labels: Of the dimensions of the input, of the weight, and of the output.
        bias: Added to the output, ``[O]``.
    """
    of_input, of_weight, of_output = labels
    if any(len(set(names)) < len(names) for names in labels):
        return None  # a diagonal
    groups = [name for name in of_output if name in of_weight and name in of_input]
    made = [name for name in of_output if name in of_weight and name not in of_input]
    summed = [name for name in of_weight if name in of_input and name not in of_output]
    shared = [name for name in of_output if name not in of_weight]
    alone = [name for name in of_weight if name not in of_input and name not in of_output]
    if alone or not shared:
        return None
    if bias is not None and (groups or len(made) != 1 or bias.shape != (weight.shape[of_weight.index(made[0])],)):
        return None
    left_over = [dim for dim, name in enumerate(of_input) if name not in of_output and name not in of_weight]
    columns = input.detach()
    if left_over:
        columns = at_least_float32(columns).sum(left_over)
        of_input = [name for dim, name in enumerate(of_input) if dim not in left_over]
    columns = columns.permute([of_input.index(name) for name in (*shared, *groups, *summed)])
    settings = {
        "order": tuple(of_weight.index(name) for name in (*groups, *made, *summed)),
        "sizes": (len(groups), len(made), len(summed)),
        "output_order": tuple(of_output.index(name) for name in (*shared, *groups, *made)),
    }
    return Arguments(ProductCall, columns, weight, bias, settings)


def _of_two(is_used: IsUsed, first: Tensor, second: Tensor, labels: Any, bias: Tensor | None = None) -> Any:
    if is_used(first) == is_used(second):
        return None
    of_first, of_second, of_output = labels
    if is_used(first):
        first, second, of_first, of_second = second, first, of_second, of_first
    return _squeezed(first, second, of_first, of_second, of_output, bias)


def _squeezed(
    input: Tensor, weight: Tensor, of_input: Sequence[Any], of_weight: Sequence[Any], of_output: Sequence[Any],
    bias: Tensor | None,
) -> Any:  # fmt: skip
    """Without dimensions of one that are repeated, which the label of a larger one has."""
    sizes: dict[Any, int] = {}
    for tensor, names in ((input, of_input), (weight, of_weight)):
        for name, size in zip(names, tensor.shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)
    repeated = [dim for dim, name in enumerate(of_weight) if weight.shape[dim] < sizes[name]]
    argument = weight
    for dim in reversed(repeated):
        argument = argument.squeeze(dim)
    of_weight = [name for dim, name in enumerate(of_weight) if dim not in repeated]
    repeated = [dim for dim, name in enumerate(of_input) if input.shape[dim] < sizes[name]]
    for dim in reversed(repeated):
        input = input.squeeze(dim)
    of_input = [name for dim, name in enumerate(of_input) if dim not in repeated]
    arguments = product(input, argument, (of_input, of_weight, of_output), bias)
    return None if arguments is None else [replace(arguments, stands_for=weight)]


@rule_of_used(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm,
              Tensor.bmm, torch.mv, Tensor.mv, torch.linalg.matmul)  # fmt: skip
def _matmul(is_used: IsUsed, input: Tensor, other: Tensor) -> Any:
    batch = max(input.ndim, other.ndim) - 2
    names = [f"b{dim}" for dim in range(max(0, batch))]
    first = ["k"] if input.ndim == 1 else [*names[max(0, batch) - (input.ndim - 2) :], "m", "k"]
    second = ["k"] if other.ndim == 1 else [*names[max(0, batch) - (other.ndim - 2) :], "k", "n"]
    output = [*names, *(["m"] if input.ndim > 1 else []), *(["n"] if other.ndim > 1 else [])]
    return _of_two(is_used, input, other, (first, second, output))


@rule_of_used(torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm)
def _addmm(
    is_used: IsUsed, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:  # fmt: skip
    if alpha != 1 or beta != 1 or (is_used(mat1) and is_used(mat2)):
        return None
    if input.ndim == 1 and mat1.ndim == 2 and not is_used(mat1):
        arguments = product(mat1, mat2, (["m", "k"], ["k", "n"], ["m", "n"]), input)
        return None if arguments is None else [arguments]
    shape = (*mat1.shape[:-1], mat2.shape[-1])
    added = [repeated(input, shape, lambda: 1.0)] if is_used(input) else []
    multiplied = _matmul(is_used, mat1, mat2) if is_used(mat1) or is_used(mat2) else []
    return None if multiplied is None or None in added else [*multiplied, *added]


@rule_of_used(torch.inner, Tensor.inner)
def _inner(is_used: IsUsed, input: Tensor, other: Tensor) -> Any:
    first = [*(f"m{dim}" for dim in range(input.ndim - 1)), "k"]
    second = [*(f"n{dim}" for dim in range(other.ndim - 1)), "k"]
    return _of_two(is_used, input, other, (first, second, [*first[:-1], *second[:-1]]))


@rule_of_used(torch.tensordot)
def _tensordot(is_used: IsUsed, a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None) -> Any:
    if isinstance(dims, Tensor) or out is not None:
        return None
    of_a, of_b = (range(a.ndim - dims, a.ndim), range(dims)) if isinstance(dims, int) else dims
    of_a, of_b = ([dims] if isinstance(dims, int) else list(dims) for dims in (of_a, of_b))
    first = [f"a{dim}" for dim in range(a.ndim)]
    second = [f"b{dim}" for dim in range(b.ndim)]
    for one, other in zip(of_a, of_b, strict=True):
        second[other % b.ndim] = first[one % a.ndim]
    output = [name for name in first if name not in second] + [name for name in second if name not in first]
    return _of_two(is_used, a, b, (first, second, output))


@rule_of_used(torch.einsum)
def _einsum(is_used: IsUsed, equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or (not arrow and "..." in left):
        return None
    labels = [_labels(term, operand.ndim) for term, operand in zip(terms, operands, strict=True)]
    names = [name for of_one in labels for name in of_one]
    if arrow:
        ellipsis = sorted((name for name in set(names) if len(name) > 1), key=lambda name: -int(name[1:]))
        output = [name for letter in right.replace("...", ".") for name in (ellipsis if letter == "." else [letter])]
    else:
        output = sorted(name for name in set(names) if names.count(name) == 1)
    return _of_two(is_used, operands[0], operands[1], (*labels, output))


@composite(torch.einsum)
def _einsum_of_several(see: See, equation: Any, *operands: Any) -> Any:
    """Two after two, from the left."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) < 3 or "->" not in equation or "..." in equation:
        return NotImplemented
    left, _, output = equation.replace(" ", "").partition("->")
    term, *terms = left.split(",")
    result, *others = operands
    for number, (other_term, other) in enumerate(zip(terms, others, strict=True), start=1):
        needed = output + "".join(terms[number:])
        kept = "".join(letter for letter in dict.fromkeys(term + other_term) if letter in needed)
        kept = output if number == len(terms) else kept
        result, term = see(torch.einsum, f"{term},{other_term}->{kept}", result, other), kept
    return result


@composite(torch.linalg.multi_dot)
def _products(see: See, tensors: Sequence[Tensor]) -> Any:
    return reduce(lambda result, other: see(torch.matmul, result, other), tensors)


def _labels(term: str, n_dimensions: int) -> list[str]:
    """Of every dimension; those behind an ellipsis are numbered from the last."""
    letters = term.replace("...", ".")
    n_hidden = n_dimensions - len(letters) + 1
    hidden = [f".{number}" for number in reversed(range(n_hidden))]
    return [name for letter in letters for name in (hidden if letter == "." else [letter])]
