"""Seeing a forward pass: which layer functions were called with trainable parameters, and where the data are.

A :class:`~torch.overrides.TorchFunctionMode` sees every call of a function whose weight *is* a trainable
parameter: modules, functional calls, tied weights and, by entering the bodies of composite functions or writing them
out, multi-head attention and recurrent layers. Gradient edges point at the value before an in-place activation.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from debiased_laplace.network.attention import scaled_dot_product_attention
from debiased_laplace.network.layers import COMPOSITES, RULES, Arguments, Call, Layout
from debiased_laplace.network.layers.recurrent import is_of_packed_sequences
from debiased_laplace.network.tensors import nested_tensors

_NO_OVERRIDES = {
    name: lambda *_: False for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
}


def seen_inside(function: Any) -> Callable[..., Any]:
    """A composite function of torch, such that a mode that is on sees the calls inside of it."""
    namespace = {**function.__globals__, **_NO_OVERRIDES}
    body = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    body.__kwdefaults__ = function.__kwdefaults__
    return body


#: Methods that write to what they are called on, besides those whose names end in an underscore.
IN_PLACE = frozenset({"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "matmul"))})

#: Functions that take the shape or the dtype of their other tensors alone.
OF_THE_FIRST = frozenset({"expand_as", "view_as", "reshape_as", "type_as", "to"})


@dataclass
class Recorder(TorchFunctionMode):
    """Records the calls that use trainable parameters, in the order of the forward pass.

    What is made of parameters alone (a view of one, a normalised weight, a table that is looked up at constant places)
    is *derived*: a layer may use it as it uses a parameter. A derived tensor with an entry for each datum, such as
    ``token.expand(N, 1, D)``, is none: the call that makes it is where the parameters meet the data, an *entry*.

    Attributes:
        names: Of the trainable parameters, by identity.
        known: Classes of calls that are recorded; None for all.
        entries: Numbers of the derivations that have an entry for each datum; None if nothing is derived.
        apart: Parameters that no rule is asked for: calls with no others are not recorded.
        constants: Tensors that depend neither on data nor on trainable parameters: buffers, frozen weights, what is
            made of them. They are not kept alive: weights that are dequantised layer by layer exist one at a time.
        calls: What was recorded.
        elsewhere: Parameters in functions that no rule covers, and the function's name.
        derivations: Shapes of what was derived, in the order of the forward pass.
        packs: Whether there were packed sequences.
    """

    names: dict[int, str]
    known: Collection[str] | None = None
    entries: Collection[int] | None = frozenset()
    apart: Collection[str] = frozenset()
    constants: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    calls: list[Call] = field(default_factory=list)
    elsewhere: dict[str, str] = field(default_factory=dict)
    derivations: list[tuple[torch.Size, ...]] = field(default_factory=list)
    packs: bool = False
    _derived: dict[int, Tensor] = field(default_factory=dict)  # kept, so that no other tensor gets their identities

    def __post_init__(self) -> None:
        super().__init__()

    def note_constants(self, tensors: Iterable[Tensor]) -> None:
        """Tell which tensors depend neither on data nor on trainable parameters."""
        if self.entries is not None:
            self.constants.update({tensor: None for tensor in tensors if id(tensor) not in self.names})

    def is_used(self, value: Any) -> bool:
        """Whether something is a parameter, or made of parameters alone."""
        return id(value) in self.names or id(value) in self._derived

    def __torch_function__(
        self, func: Callable[..., Any], types_: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = nested_tensors((args, kwargs))
        used = [tensor for tensor in tensors if self.is_used(tensor)]
        self.packs |= is_of_packed_sequences(func, args)
        if func in COMPOSITES and (used or any(tensor.requires_grad for tensor in tensors)):
            result = COMPOSITES[func](self._see, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if not used:
            result = func(*args, **kwargs)
            self._note_constants(func, args, tensors, result)
            return result
        rule, name = RULES.get(func), getattr(func, "__name__", str(func))
        if rule is None and isinstance(func, types.FunctionType) and func.__module__ == "torch.nn.functional":
            with self:
                return seen_inside(func)(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            with self:
                return scaled_dot_product_attention(*args, **kwargs)
        in_place = name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        derives = self.entries is not None and self._is_constant(args[0] if name in OF_THE_FIRST else (args, kwargs))
        if derives:
            self.derivations.append(())
            number = len(self.derivations) - 1
            if number not in self.entries:  # type: ignore[operator]
                result = func(*args, **kwargs)
                self.derivations[number] = self._note_derived(result)
                return result
        if in_place and args and self.is_used(args[0]):  # what it was made of is no longer what it holds
            self._not_covered(used, name)
            self._derived.pop(id(args[0]), None)
            return func(*args, **kwargs)
        if any(tensor.is_complex() for tensor in tensors):  # gradients are those of the conjugate
            rule = None
        arguments = rule(self.is_used, *args, **kwargs) if rule else None  # before it runs: a rule may refuse them
        result = func(*args, **kwargs)
        if not _requires_grad(result):
            return result
        if isinstance(result, Tensor) and result._is_view():
            if in_place:
                self._not_covered(used, name)
                return result
            # An in-place activation would replace the history of a view, and its edge would see nothing.
            result = result.clone()
        if arguments is None or not self._record(arguments, used, result):
            self._not_covered(used, name)
        return result

    def _see(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.__torch_function__(function, (), arguments)

    def _not_covered(self, used: Sequence[Tensor], function: str) -> None:
        for tensor in used:
            for name in self.names_in(tensor):
                self.elsewhere.setdefault(name, function)

    def names_in(self, tensor: Tensor) -> list[str]:
        """Names of the trainable parameters that a tensor is, or was made of."""
        if id(tensor) in self.names:
            return [self.names[id(tensor)]]
        return sorted(self.names[leaf] for leaf in leaves(tensor) if leaf in self.names)

    def names_of_calls(self) -> list[tuple[str, ...]]:
        """Names of the parameters that every call is of."""
        return [
            tuple(name for argument in (call.weight, call.bias) if argument is not None
                  for name in self.names_in(argument))
            for call in self.calls
        ]  # fmt: skip

    def _is_known(self, tensor: Tensor) -> bool:
        """Whether something is a constant, or a parameter that the forward pass makes of the memory of one."""
        return tensor in self.constants or (isinstance(tensor, nn.Parameter) and bool(self._sharing(tensor)))

    def _sharing(self, tensor: Tensor) -> list[Tensor]:
        """The constants that have the memory of a tensor."""
        memory = tensor.untyped_storage()._cdata
        return [constant for constant in self.constants.keys() if constant.untyped_storage()._cdata == memory]

    def _is_constant(self, value: Any) -> bool:
        return all(self._is_known(tensor) or self.is_used(tensor) for tensor in nested_tensors(value))

    def _note_derived(self, result: Any) -> tuple[torch.Size, ...]:
        results = nested_tensors(result)
        for tensor in results:
            if tensor.requires_grad:
                self._derived[id(tensor)] = tensor
            else:
                self.constants[tensor] = None
        return tuple(tensor.shape for tensor in results)

    def _note_constants(self, func: Any, args: tuple[Any, ...], tensors: Sequence[Tensor], result: Any) -> None:
        """Note what was made of constants alone, and forget one that something else was written to."""
        if self.entries is None:
            return
        unknown = [tensor for tensor in tensors if not self._is_known(tensor)]
        if not unknown:
            for tensor in nested_tensors(result):
                self.constants[tensor] = None
        elif len(unknown) < len(tensors) and args and isinstance(args[0], Tensor) and args[0] in self.constants:
            if getattr(func, "__name__", "").endswith("_"):  # one that writes, or may write
                for tensor in self._sharing(args[0]):
                    del self.constants[tensor]

    def _record(self, arguments: Sequence[Arguments], used: Sequence[Tensor], result: Tensor) -> bool:
        slots = {id(slot) for one in arguments for slot in (one.weight, one.bias, one.stands_for) if slot is not None}
        if not isinstance(result, Tensor) or any(id(tensor) not in slots for tensor in used):
            return False  # a parameter in the place of the input
        if self.apart and all(name in self.apart for tensor in used for name in self.names_in(tensor)):
            return True
        for one in arguments:
            weight, bias = one.weight, one.bias
            if not one.keeps_frozen_weight and not (self.is_used(weight) or one.stands_for is not None):
                weight = None
            if self.known is not None and one.call.__name__ not in self.known:
                continue
            input = one.input.detach()
            if weight is None or not (self.is_used(weight) or one.stands_for is not None):
                # Only a weight that is differentiated needs its inputs; of another one the shape is all that is used.
                weight = None if weight is None else weight.detach()
                input = torch.empty(input.shape, dtype=input.dtype, device="meta")
            call = one.call(
                weight=weight, bias=bias if self.is_used(bias) else None, input=input, output_shape=result.shape,
                edge=torch.autograd.graph.get_gradient_edge(result), version=input._version, **one.settings,
            )  # fmt: skip
            call.output_shape = call.aligned(result.detach()).shape
            self.calls.append(call)
        return True


def _requires_grad(result: Any) -> bool:
    return any(tensor.requires_grad for tensor in nested_tensors(result))


def leaves(tensor: Tensor) -> set[int]:
    """Identities of the tensors that the graph of a tensor ends in."""
    identities, seen, todo = set(), set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            identities.add(id(node.variable))
        todo.extend(source for source, _ in node.next_functions)
    return identities | ({id(tensor)} if tensor.is_leaf else set())


class WrittenOut(TorchFunctionMode):
    """Calls attention and composite functions written out: fused ones lack some derivatives."""

    def __torch_function__(
        self, func: Callable[..., Any], types_: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in COMPOSITES:
            result = COMPOSITES[func](self._see, *args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if func is F.scaled_dot_product_attention:
            return scaled_dot_product_attention(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            with self:
                return seen_inside(func)(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _see(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.__torch_function__(function, (), arguments)


def with_derivatives() -> AbstractContextManager[Any]:
    """Lets functions be written out where a graph is recorded; without one, fused ones are faster."""
    return WrittenOut() if torch.is_grad_enabled() else nullcontext()


def find_layouts(
    outputs: Tensor, calls: Sequence[Call], names: Sequence[Sequence[str]], constant: Sequence[bool],
    check: Callable[[str], None],
) -> tuple[list[Layout | None], bool]:  # fmt: skip
    """Find the data in every call's output: what the outputs of a datum depend on must belong to that datum.

    Every datum is looked at, since one alone can be ambiguous: of three data at three positions, the first
    position of the first datum comes first whichever dimension counts the data.

    Args:
        outputs: ``[N, C]``, with the graph of the forward pass.
        calls: The calls of that forward pass.
        names: For every call, the names of its parameters.
        constant: For every call, whether its output is as large for fewer data: then it is the same for all of them.
        check: Raises an error if the outputs of a datum are not those that it has alone; called with the parameter in
            whose layer it looks like that.

    Returns:
        The layout of every call; None for one whose output has no dimension for the data, or rows that are of several
        data though these are independent (one entry of them is the same for all). And whether layouts are found anew,
        row by row, in every forward pass (:mod:`~debiased_laplace.network.rows`).

    Raises:
        ValueError: If the outputs of one datum depend on other data.
    """
    if not calls:
        return [], False
    n = len(outputs)
    vectors = torch.linspace(1, 2, outputs.shape[1]).to(outputs) * torch.eye(n).to(outputs)[:, :, None]
    edges = [call.edge for call in calls]
    gradients = [torch.autograd.grad(outputs, edges, v, retain_graph=True, allow_unused=True) for v in vectors]
    layouts: list[Layout | None] = []
    by_rows = False
    for call, pair, of_data, is_constant in zip(calls, names, zip(*gradients, strict=True), constant, strict=True):
        possible = [] if is_constant else Layout.candidates(call.output_shape, n, call.n_trailing)
        consistent = [
            layout for layout in possible
            if all(
                g is None or _is_of(datum, layout.by_datum(call.aligned(g), n, call.n_trailing))
                for datum, g in enumerate(of_data)
            )
        ]  # fmt: skip
        if not consistent and not is_constant and _are_of_one_each(call, of_data):
            layouts.append(Layout())
            by_rows = True
            continue
        if possible and not consistent:
            check(pair[0])
        if len(consistent) > 1 and call.n_trailing == 1 and layouts and layouts[-1] == Layout(1):
            consistent = [layout for layout in consistent if layout.batch_dimension is not None]  # of sequences of one
        layouts.append(consistent[0] if consistent else None)
    return layouts, by_rows


def _are_of_one_each(call: Call, gradients: Sequence[Tensor | None]) -> bool:
    """Whether every row that has gradients has those of the outputs of one datum alone."""
    trailing = math.prod(call.output_shape[len(call.output_shape) - call.n_trailing :])
    there = [call.aligned(g).reshape(-1, trailing).any(1) for g in gradients if g is not None]
    return bool(there) and int(torch.stack(there).sum(0).max()) == 1


def _is_of(datum: int, gradient: Tensor) -> bool:
    """Whether a gradient ``[N, ...]`` is zero for all other data."""
    return not bool(gradient[:datum].any()) and not bool(gradient[datum + 1 :].any())
