"""Seeing a forward pass: which layer functions were called with trainable parameters, and where the data are.

A :class:`~torch.overrides.TorchFunctionMode` sees every call of a function whose weight *is* a trainable
parameter: modules, functional calls, tied weights and, by entering the bodies of composite functions,
multi-head attention. Gradient edges point at the value before an in-place activation.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from debiased_laplace.network.layers import RULES, Arguments, Call, Layout

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


@dataclass
class Recorder(TorchFunctionMode):
    """Records the calls that use trainable parameters, in the order of the forward pass."""

    names: dict[int, str]  # of the trainable parameters, by identity
    known: Collection[str] | None = None  # classes of calls that are recorded; None for all
    calls: list[Call] = field(default_factory=list)
    elsewhere: dict[str, str] = field(default_factory=dict)  # parameter -> function that no rule covers

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Callable[..., Any], types_: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        used = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if id(leaf) in self.names]
        if not used:
            return func(*args, **kwargs)
        rule = RULES.get(func)
        if rule is None and isinstance(func, types.FunctionType) and func.__module__ == "torch.nn.functional":
            with self:
                return seen_inside(func)(*args, **kwargs)
        arguments = rule(*args, **kwargs) if rule else None  # before it runs: a rule may refuse them
        result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in _pytree.tree_leaves(result)):
            if isinstance(result, Tensor) and result._is_view():
                # An in-place activation would replace the history of a view, and its edge would see nothing.
                result = result.clone()
            if arguments is None or not self._record(arguments, used, result):
                function = getattr(func, "__name__", str(func))
                self.elsewhere.update({self.names[id(leaf)]: function for leaf in used})
        return result

    def _record(self, arguments: Arguments, used: list[Tensor], result: Tensor) -> bool:
        weight, bias = arguments.weight, arguments.bias
        slots = {id(argument) for argument in (weight, bias) if argument is not None}
        if any(id(leaf) not in slots for leaf in used):
            return False  # a parameter in the place of the input
        if not arguments.keeps_frozen_weight and id(weight) not in self.names:
            weight = None
        if self.known is None or arguments.call.__name__ in self.known:
            self.calls.append(
                arguments.call(
                    weight=weight,
                    bias=bias if id(bias) in self.names else None,
                    input=arguments.input.detach(),
                    output_shape=result.shape,
                    edge=torch.autograd.graph.get_gradient_edge(result),
                    version=arguments.input._version,
                    **arguments.settings,
                )
            )
        return True


def find_layouts(
    outputs: Tensor, calls: Sequence[Call], names: Sequence[tuple[str | None, str | None]], constant: Sequence[bool]
) -> list[Layout | None]:
    """Find the data in every call's output: what the outputs of a datum depend on must belong to that datum.

    Every datum is looked at, since one alone can be ambiguous: of three data at three positions, the first
    position of the first datum comes first whichever dimension counts the data.

    Args:
        outputs: ``[N, C]``, with the graph of the forward pass.
        calls: The calls of that forward pass.
        names: For every call, the names of its weight and bias.
        constant: For every call, whether its output is as large for fewer data: then it is the same for all of them.

    Returns:
        The layout of every call; None for one whose output has no dimension for the data.

    Raises:
        ValueError: If the outputs of one datum depend on other data.
    """
    if not calls:
        return []
    n = len(outputs)
    vectors = torch.linspace(1, 2, outputs.shape[1]).to(outputs) * torch.eye(n).to(outputs)[:, :, None]
    edges = [call.edge for call in calls]
    gradients = [torch.autograd.grad(outputs, edges, v, retain_graph=True, allow_unused=True) for v in vectors]
    layouts: list[Layout | None] = []
    for call, pair, of_data, is_constant in zip(calls, names, zip(*gradients, strict=True), constant, strict=True):
        possible = [] if is_constant else Layout.candidates(call.output_shape, n, call.n_trailing)
        consistent = [
            layout for layout in possible
            if all(
                g is None or _is_of(datum, layout.by_datum(g, n, call.n_trailing)) for datum, g in enumerate(of_data)
            )
        ]  # fmt: skip
        if possible and not consistent:
            raise ValueError(
                "The output for one datum depends on other data of its batch, after the layer of "
                f"{pair[0] or pair[1]!r}. A posterior needs outputs that are independent given the weights; a "
                "normalisation by batch statistics (track_running_stats=False) is the usual cause. Replace it, or "
                "give it running statistics."
            )
        layouts.append(consistent[0] if consistent else None)
    return layouts


def _is_of(datum: int, gradient: Tensor) -> bool:
    """Whether a gradient ``[N, ...]`` is zero for all other data."""
    return not bool(gradient[:datum].any()) and not bool(gradient[datum + 1 :].any())
