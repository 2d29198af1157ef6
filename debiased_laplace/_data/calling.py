"""How a model is given its inputs, and where its outputs are in what it returns: the only place that calls one.

What the ``forward`` of the model takes decides. Inputs that are several, a tuple or a list of them, become its
positional arguments where it has several for data; a mapping becomes keywords, without the targets, where it takes
arguments of these names. A ``forward`` that takes one thing is given its inputs whole, whatever they are. So a model
is called as its author calls it, and one of a batch stays one of a batch (laplace-torch's convention).

A module that takes anything (``forward(*args, **kwargs)``) and has one module inside only hands on what it is given:
wrappers of parallel training, of compilation, of adapters. Then the one inside says what is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace._data.batches import Inputs, tensors

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Forward:
    """What the ``forward`` of a module takes.

    Attributes:
        parameters: Its arguments, without ``self``.
    """

    parameters: tuple[inspect.Parameter, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Forward:
        """Of a module, or of the one that it hands everything on to."""
        made, inside = cls(_parameters(module)), list(module.children())
        return cls.of(inside[0]) if made.hands_on and len(inside) == 1 else made

    def __str__(self) -> str:
        names = [str(p.replace(annotation=p.empty, default=p.empty)) for p in self.parameters]
        return f"forward({', '.join(names)})"

    @cached_property
    def named(self) -> list[inspect.Parameter]:
        """Arguments with names of their own."""
        return [p for p in self.parameters if p.kind in (*_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)]

    @cached_property
    def keywords(self) -> list[str]:
        """Names that can be given as keywords."""
        return [p.name for p in self.named if p.kind in _KEYWORD]

    @cached_property
    def required(self) -> list[str]:
        """Names of arguments without a default."""
        return [p.name for p in self.named if p.default is p.empty]

    @cached_property
    def takes_any_keyword(self) -> bool:
        """Whether it has ``**kwargs``."""
        return any(p.kind is p.VAR_KEYWORD for p in self.parameters)

    @cached_property
    def hands_on(self) -> bool:
        """Whether it is ``forward(*args, **kwargs)``."""
        return [p.kind for p in self.parameters] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]

    @cached_property
    def data(self) -> tuple[int, float]:
        """The fewest and the most positional arguments that may be data: those without a default, or with None."""
        positional = [p for p in self.named if p.kind in _POSITIONAL]
        fewest = sum(p.default is p.empty for p in positional)
        if any(p.kind is p.VAR_POSITIONAL for p in self.parameters):
            return fewest, torch.inf
        return fewest, fewest + sum(p.default is None for p in positional)


def _parameters(module: nn.Module) -> tuple[inspect.Parameter, ...]:
    schema = getattr(module.forward, "schema", None)  # of a module that is scripted
    if schema is not None:
        kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
        return tuple(
            inspect.Parameter(a.name, kind, default=a.default_value if a.has_default_value() else empty)
            for a in schema.arguments[1:]
        )
    return tuple(inspect.signature(module.forward).parameters.values())


@dataclass(frozen=True)
class CallingConvention:
    """How models are called, as far as they do not say it themselves.

    Attributes:
        targets_key: The entry of a mapping that is never given as a keyword: a model that is given its targets would
            compute a loss.
        outputs_of: The tensor of outputs in what a model returns; by default :func:`logits_of`.
    """

    targets_key: str = "labels"
    outputs_of: Callable[[Any], Any] | None = None

    def __call__(
        self, model: nn.Module, inputs: Inputs, *, parameters: dict[str, Tensor] | None = None,
        keywords: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """The model's outputs for a batch, as the tensor that they are.

        Args:
            model: Any module.
            inputs: Of the batch.
            parameters: Tensors in the places of some of its own, by name.
            keywords: Further arguments.
            dtype: Of its parameters, to say more where it fails for inputs of another one.

        Raises:
            TypeError: If the model does not take such inputs, or returns no tensor of outputs.
        """
        positional, named = ((inputs,), {}) if isinstance(inputs, Tensor) else self.arguments(Forward.of(model), inputs)
        named = {**named, **(keywords or {})}
        with _own_forward_pass(model, inputs, dtype, is_whole=bool(positional) and positional[0] is inputs):
            if parameters is None:
                returned = model(*positional, **named)
            else:
                returned = torch.func.functional_call(model, parameters, positional, named)
        return logits_of(returned) if self.outputs_of is None else self._adapted(returned)

    def description(self) -> dict[str, Any]:
        """What can be stored of it: of a function the name."""
        return {
            "targets_key": self.targets_key,
            "outputs_of": None if self.outputs_of is None else name_of(self.outputs_of),
        }

    @classmethod
    def restore(cls, description: Mapping[str, Any], outputs_of: Callable[[Any], Any] | None) -> CallingConvention:
        """That of a :meth:`description`, with the function, which has to be given again.

        Raises:
            ValueError: If there was a function, and none is given.
        """
        if outputs_of is None and description.get("outputs_of") is not None:
            raise ValueError(
                f"Expected the function outputs_of ({description['outputs_of']}) that found the outputs in what the "
                "model returned, got None. Functions are not stored: pass outputs_of= again."
            )
        return cls(description.get("targets_key", "labels"), outputs_of)

    def arguments(self, forward: Forward, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional arguments and keywords that a batch becomes.

        Raises:
            TypeError: If ``forward`` needs others.
        """
        if isinstance(inputs, Mapping):
            return self._of_mapping(forward, inputs)
        if isinstance(inputs, (tuple, list)) and len(inputs) > 1:
            fewest, most = forward.data
            if fewest <= len(inputs) <= most:
                return tuple(inputs), {}
            if fewest > 1:
                raise TypeError(
                    f"Expected {fewest if fewest == most else f'{fewest} to {most}'} inputs for the model's {forward}, "
                    f"got a {type(inputs).__name__} of {len(inputs)}. {_INPUTS}"
                )
        return (inputs,), {}

    def _of_mapping(self, forward: Forward, inputs: Mapping[Any, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        entries = {key: value for key, value in inputs.items() if isinstance(key, str) and key != self.targets_key}
        known = [key for key in entries if key in forward.keywords]
        missing = [name for name in forward.required if name not in entries or name not in forward.keywords]
        anything = forward.data == (0, torch.inf) and not forward.takes_any_keyword
        if len(missing) == len(forward.required) == 1 or (not known and (forward.data == (0, 1) or anything)):
            return (inputs,), {}
        if missing:
            raise TypeError(
                f"Expected entries for {missing}, which the model's {forward} needs, got the keys {list(inputs)}"
                f"{_but(self.targets_key, inputs)}. {_ENTRIES}"
            )
        if not known and not forward.takes_any_keyword:
            raise TypeError(
                f"Expected entries that the model's {forward} takes, got the keys {list(inputs)}"
                f"{_but(self.targets_key, inputs)}. {_ENTRIES}"
            )
        return (), entries if forward.takes_any_keyword else {key: entries[key] for key in known}

    def dropped(self, model: nn.Module, inputs: Inputs) -> list[str]:
        """Keys of a mapping that the model is not given, since it takes none of their names."""
        if not isinstance(inputs, Mapping):
            return []
        positional, named = self._of_mapping(Forward.of(model), inputs)
        return [] if positional else [str(key) for key in inputs if key not in named and key != self.targets_key]

    def _adapted(self, returned: Any) -> Tensor:
        assert self.outputs_of is not None
        outputs = self.outputs_of(returned)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"Expected outputs_of to give the tensor of outputs in what the model returns, {_described(returned)}, "
                f"got {_described(outputs)}."
            )
        return outputs


def name_of(function: Callable[..., Any]) -> str:
    """A function in words, to tell it from others."""
    named = getattr(function, "__qualname__", None)
    return type(function).__name__ if named is None else f"{function.__module__}.{named}"


#: How models are called of which nobody says anything else.
USUAL = CallingConvention()

_REMEDY = (
    "pass inputs_of= to debiased_laplace.fit, a function of a batch that gives what the model is given (a tensor, a "
    "tuple of positional arguments, a dictionary of keywords), or wrap the loader in a generator that yields (inputs, "
    "targets), such as (((a, b), y) for a, b, y in loader)."
)
_ENTRIES = f"Name the entries like the arguments of forward, {_REMEDY}"
_INPUTS = f"Of a batch of three or more the last is its targets, the others are inputs: {_REMEDY}"


def _but(targets_key: str, inputs: Mapping[Any, Any]) -> str:
    return f" (of which {targets_key!r} are the targets)" if targets_key in inputs else ""


def logits_of(returned: Any) -> Tensor:
    """The tensor of outputs in what a model returns: itself, its ``logits``, or the first entry of a tuple.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(returned, Tensor):
        return returned
    if isinstance(returned, Mapping):
        logits = returned.get("logits")
    else:
        plain = isinstance(returned, (tuple, list)) and not hasattr(returned, "_fields")
        logits = returned[0] if plain and returned else getattr(returned, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(
        f"Expected a model that returns a tensor of outputs [N, C], something with logits, or a tuple with the outputs "
        f"first, got {_described(returned)}. Pass outputs_of=, a function of what the model returned that gives the "
        "tensor, or wrap the model in a module whose forward returns the logits alone."
    )


def _described(value: Any) -> str:
    """A type, and the names of what is inside."""
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"{kind} with the keys {list(value)}"
    if hasattr(value, "_fields"):
        return f"{kind} with the fields {list(value._fields)}"
    if isinstance(value, (tuple, list)):
        return f"{kind} of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    names = [name for name in getattr(value, "__dict__", {}) if not name.startswith("_")]
    return f"{kind} with the attributes {names}" if names and not isinstance(value, Tensor) else kind


@contextmanager
def _own_forward_pass(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None, *, is_whole: bool) -> Iterator[None]:
    """Say where an error comes from that is about what inputs are, or of which dtype: they go to the model so."""
    try:
        yield
    except (TypeError, AttributeError, KeyError) as error:
        forward = Forward.of(model)
        if not is_whole or (isinstance(inputs, Tensor) and forward.data[0] < 2):
            raise
        what, remedy = f"The {type(inputs).__name__} went to it", _INPUTS
        if isinstance(inputs, Mapping):
            what, remedy = f"The {type(inputs).__name__} with the keys {list(inputs)} went to it", _ENTRIES
        elif isinstance(inputs, (tuple, list)):
            what = f"The {len(inputs)} inputs of a batch went to it in one {type(inputs).__name__}"
        raise TypeError(
            f"The model's own forward pass failed ({type(error).__name__}: {error}). {what} as one argument of its "
            f"{forward}. {remedy}"
        ) from error
    except RuntimeError as error:
        others = set() if dtype is None else {leaf.dtype for leaf in tensors(inputs)} - {dtype}
        if not others or "type" not in str(error):
            raise
        raise RuntimeError(
            f"The model's own forward pass failed: {error} Inputs of {', '.join(sorted(map(str, others)))} went to it "
            f"as they came, its parameters are {dtype}. Convert them in the loader, or in the model's forward."
        ) from error
