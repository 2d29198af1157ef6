"""Tensors of a model: copies of them, and what tells whether they were replaced, moved or written to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

#: Entries of every tensor that are compared in each call, since a change through ``.data`` leaves no other trace.
COMPARED = 2**8

_WITHOUT_TENSORS = frozenset((type(None), bool, int, float, complex, str, torch.Size, torch.dtype, torch.device))


def aliases_of(model: nn.Module) -> dict[str, str]:
    """All names of a model's parameters, of which ``named_parameters`` tells the first alone, and that first one."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of no class of somebody's own: nothing but its numbers."""
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def detached(tensor: Tensor, *, copied: bool) -> Tensor:
    """The tensor without its gradient, of the same class; with the same memory, or copied."""
    if not is_plain(tensor):
        return tensor.detach() if tensor.requires_grad else tensor  # quantised weights: more than their numbers
    result = tensor.detach().clone() if copied else tensor.detach()
    if isinstance(tensor, nn.Parameter):
        result = nn.Parameter(result, requires_grad=False)
    result.__dict__.update(tensor.__dict__)  # a buffer is a tensor with attributes
    return result


def nested_tensors(value: Any) -> list[Tensor]:
    """The tensors in arguments or results of a function, in their order.

    Looked for in every call of every forward pass: what most calls are made of is not asked of torch's registry.
    """
    if isinstance(value, Tensor):
        return [value]
    kind = type(value)
    if kind is tuple or kind is list:
        return [tensor for item in value for tensor in nested_tensors(item)]
    if kind is dict:
        return [tensor for item in value.values() for tensor in nested_tensors(item)]
    if kind in _WITHOUT_TENSORS:
        return []
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name."""
    tensors: dict[str, Tensor] = {}
    for place, part in module.named_modules():
        prefix = f"{place}." if place else ""
        scripted = isinstance(part, torch.jit.ScriptModule)
        buffers = part.named_buffers(recurse=False) if scripted else part._buffers.items()
        temporary = getattr(part, "_non_persistent_buffers_set", ())
        tensors |= {prefix + key: t for key, t in buffers if t is not None and key not in temporary}
        tensors |= {prefix + key: t for key, t in part.named_parameters(recurse=False)}
    return tensors


def stamp_of(model: nn.Module) -> list[Any]:
    """What tells whether a tensor of a model was replaced, moved or written to; it keeps them alive."""
    stamp: list[Any] = []
    for module in model.modules():
        stamp.append(type(module))
        for group in (module._parameters, module._buffers):
            for key, tensor in group.items():
                if tensor is not None:
                    stamp.append((key, tensor, None if tensor.is_inference() else tensor._version, address(tensor)))
    return stamp


def tensors_in(stamp: list[Any]) -> list[tuple[str, Tensor, int | None, Any]]:
    """What a stamp has of every tensor: name, tensor, version, address."""
    return [entry for entry in stamp if isinstance(entry, tuple)]


def same_stamps(one: list[Any] | None, other: list[Any] | None) -> bool:
    """Whether nothing happened between two stamps of a model."""
    if one is None or other is None or len(one) != len(other):
        return False
    for first, second in zip(one, other, strict=True):
        if isinstance(first, tuple) != isinstance(second, tuple):
            return False
        if isinstance(first, tuple):
            if first[1] is not second[1] or first[0] != second[0] or first[2:] != second[2:]:
                return False
        elif first is not second:
            return False
    return True


def address(tensor: Tensor) -> Any:
    """Where the memory of a tensor is, and what it holds."""
    try:
        return tensor.data_ptr(), tensor.dtype, tensor.shape
    except (RuntimeError, NotImplementedError):  # without memory of its own
        return tensor.dtype, tensor.shape


def described(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors must have in common for their numbers to be compared."""
    return tensor.dtype, tensor.device, tensor.shape


def few_entries(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """A view of some entries, evenly spread where the memory (of ``like``, if that is given) has no gaps."""
    flat, like = tensor.detach(), tensor if like is None else like
    n = flat.numel()
    if n == 0:
        return flat.reshape(0)
    if like.is_contiguous() or (like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)):
        step = -(-n // COMPARED)
        return flat.as_strided((-(-n // step),), (step,))
    return flat[(0,) * (flat.ndim - 1)][:COMPARED]


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same numbers, or NaN in the same places."""
    if described(one) != described(other):
        return False
    if torch.equal(one, other):
        return True
    return one.is_floating_point() and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def listed(names: list[str]) -> str:
    """The first of some names, for people."""
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
