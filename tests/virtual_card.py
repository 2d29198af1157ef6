"""A graphics card that is not there: real numbers on the CPU, followed as if they were on a device of their own.

Every storage that a card would hold is noted as it comes about. What PyTorch refuses on a card is refused here:
operands on two devices, generators of another device, NumPy's view of a tensor. What makes the program wait for a card
is counted, with the function of the package that asked for it: reading a value, results whose shape depends on values,
copies to the CPU, decompositions that look whether they succeeded. Numbers are those of the CPU, so that results can be
compared; how fast a card is, and how it rounds, is not seen.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import debiased_laplace

#: What tensors on the card say of their device.
CARD = torch.device("cuda", 0)

ROOT = Path(debiased_laplace.__file__).parent

#: Operators of which the program has to know a value or a shape before it can go on.
WAITING = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq", "histc",
}  # fmt: skip

#: Decompositions that look at the outcome only if they are asked to.
CHECKED = {"linalg_cholesky_ex", "linalg_inv_ex", "_linalg_solve_ex", "linalg_ldl_factor_ex", "linalg_lu_factor_ex"}

#: Operators whose indices may be on the CPU while the tensor is on the card.
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_", "_unsafe_index_put"}

#: Copies from one device to another.
COPYING = {"copy_", "_to_copy"}


class VirtualCard:
    """A context in which ``torch.device("cuda")`` can be used on any machine.

    Attributes:
        waits: How often which function of the package, ``"module.function"``, waited for the card, by what it asked.
        uploads: Likewise, copies from the CPU to the card.
        blocking: Functions whose copies were not ``non_blocking``.
    """

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self.uploads: Counter[str] = Counter()
        self.blocking: set[str] = set()
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._undecided: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._modes: list[Any] = [_Operators(self), _Functions(self), _without_drivers()]

    def __enter__(self) -> VirtualCard:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the card."""
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self._held

    def is_undecided(self, tensor: Tensor) -> bool:
        """Whether a backward pass made a tensor from nothing: of zeros, say, wherever the others are."""
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self._undecided

    def take(self, value: Any, on_card: bool | None = True) -> None:
        """Note for all tensors of a value on which device they are; None for either."""
        for leaf in _pytree.tree_leaves(value):
            storage = _storage(leaf) if isinstance(leaf, Tensor) else None
            if storage is None:
                continue
            for places, there in ((self._held, on_card is True), (self._undecided, on_card is None)):
                places.pop(storage._cdata, None)
                if there:
                    forget = functools.partial(self._forget, places, storage._cdata)
                    places[storage._cdata] = weakref.ref(storage, forget)

    @staticmethod
    def _forget(places: dict[int, Any], key: int, reference: Any) -> None:
        if places.get(key) is reference:
            del places[key]

    def wait(self, what: str) -> None:
        """Count one wait of the function of the package that is running."""
        self.waits[_asker(), what] += 1

    def move(self, tensor: Tensor, to_card: bool, **how: Any) -> Tensor:
        """A tensor on the card, or on the CPU, as ``Tensor.to`` gives it."""
        if self.holds(tensor) == to_card:
            how.pop("non_blocking", None)
            return tensor.to(**how) if how else tensor
        if not how.pop("non_blocking", False):
            self.blocking.add(_asker())
        if to_card:
            self.uploads[_asker()] += 1
        else:
            self.wait("to the CPU")
        if torch.is_grad_enabled() and tensor.requires_grad and _storage(tensor) is tensor.untyped_storage():
            return _Move.apply(tensor, self, to_card, how)
        return self.copy(tensor, to_card, how)

    def copy(self, tensor: Tensor, to_card: bool, how: dict[str, Any]) -> Tensor:
        """The same without a graph."""
        with torch._C.DisableTorchFunction():
            moved = tensor.to(**how | {"copy": True})
        self.take(moved, to_card)
        return moved


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    with torch._C.DisableTorchFunction():
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        try:
            return tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse
            return None


def _asker() -> str:
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)):
            return f"{Path(file).relative_to(ROOT).with_suffix('')}:{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"


class _Move(torch.autograd.Function):
    """A copy to the other device, and of its gradient back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, card: VirtualCard, to_card: bool, how: dict[str, Any]) -> Tensor:
        ctx.card, ctx.to_card, ctx.dtype = card, to_card, tensor.dtype
        return card.copy(tensor, to_card, how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.card.copy(gradient, not ctx.to_card, {"dtype": ctx.dtype}), None, None, None


def _without_drivers() -> Any:
    """What modules ask of the card's own library."""
    return mock.patch.object(nn.RNNBase, "flatten_parameters", lambda module: None)


class _Operators(TorchDispatchMode):
    """Follows what operators read and make, those of backward passes and of ``torch.func`` included."""

    supports_higher_order_operators = True

    def __init__(self, card: VirtualCard) -> None:
        super().__init__()
        self._card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = [self._card.holds(leaf) for leaf in leaves]
        name = func._opname if hasattr(func, "_opname") else str(func)
        undecided = [leaf for leaf in leaves if self._card.is_undecided(leaf)]
        if not any(places):
            result = func(*args, **kwargs)
            if len(undecided) == len(leaves):
                self._card.take(result, None)
            return result
        self._card.take(undecided)
        places = [
            on_card or any(leaf is one for one in undecided) for leaf, on_card in zip(leaves, places, strict=True)
        ]
        if name == "copy_" and len(leaves) == 2 and places[0] != places[1]:
            if places[0]:
                self._card.uploads[_asker()] += 1
            else:
                self._card.wait("to the CPU")
            return func(*args, **kwargs)
        self._refuse_mixed(func, name, args, leaves, places)
        self._count(name, args, kwargs, leaves, places)
        result = func(*args, **kwargs)
        self._card.take(result)
        return result

    def _refuse_mixed(self, func: Any, name: str, args: Any, leaves: list[Tensor], places: list[bool]) -> None:
        scalars = name in {"where", "masked_fill", "masked_fill_", "fill_", "copy_"} or torch.Tag.pointwise in getattr(
            func, "tags", ()
        )
        elsewhere = [
            leaf for leaf, on_card in zip(leaves, places, strict=True)
            if not on_card and not (scalars and leaf.ndim == 0)
        ]  # fmt: skip
        if name in INDEXING and self._card.holds(args[0]):
            indices = {id(index) for index in args[1]}
            values = args[2] if len(args) > 2 else None
            single = values is not None and values.numel() == 1
            elsewhere = [leaf for leaf in elsewhere if id(leaf) not in indices and not (single and leaf is values)]
        if elsewhere:
            shapes = [("cuda" if on_card else "cpu", tuple(leaf.shape)) for leaf, on_card in zip(leaves, places)]  # noqa: B905
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {shapes}")
        generator = next((a for a in _pytree.tree_leaves(args) if isinstance(a, torch.Generator)), None)
        if generator is not None:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu': {func}")

    def _count(self, name: str, args: Any, kwargs: Any, leaves: list[Tensor], places: list[bool]) -> None:
        if name in WAITING:
            self._card.wait(name)
        elif name in CHECKED and (kwargs.get("check_errors") or any(arg is True for arg in args[1:])):
            self._card.wait(name)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self._card.wait(name)
        elif name in INDEXING:
            masks = [
                i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8) and self._card.holds(i)
            ]
            filled = len(args) > 2 and len(args[1]) == 1 and args[2].numel() == 1
            if masks and not filled:
                self._card.wait("boolean index")


class _Functions(TorchFunctionMode):
    """Follows what Python says and asks of devices."""

    def __init__(self, card: VirtualCard) -> None:
        super().__init__()
        self._card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        known = getattr(self, "_" + _name(func), None)
        if known is not None:
            return known(*args, **kwargs)
        if func is torch.Tensor.new_tensor or func is torch.Tensor.__deepcopy__:
            result = func(*args, **kwargs)
            self._card.take(result, self._card.holds(args[0]))
            return result
        if kwargs.get("device") is not None:
            return self._on_device(func, args, kwargs)
        if func in (torch.as_tensor, torch.asarray, torch.tensor) and isinstance(args[0], Tensor):
            kwargs["device"] = CARD if self._card.holds(args[0]) else "cpu"
            return self._on_device(func, args, kwargs)
        result = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in _pytree.tree_leaves((args, kwargs))):
            self._card.take(result, False)
        return result

    def _on_device(self, func: Any, args: Any, kwargs: Any) -> Any:
        on_card = torch.device(kwargs.pop("device")).type == "cuda"
        if func in (torch.as_tensor, torch.asarray, torch.tensor) and isinstance(args[0], Tensor):
            kwargs.pop("requires_grad", None)
            return self._card.move(args[0], on_card, dtype=kwargs.get("dtype"))
        if on_card and isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu': {func}")
        result = func(*args, **kwargs)
        self._card.take(result, on_card)
        return result

    def _device(self, tensor: Tensor) -> torch.device:
        return CARD if self._card.holds(tensor) else torch.device("cpu")

    def _is_cuda(self, tensor: Tensor) -> bool:
        return self._card.holds(tensor)

    def _is_cpu(self, tensor: Tensor) -> bool:
        return not self._card.holds(tensor)

    def _get_device(self, tensor: Tensor) -> int:
        return 0 if self._card.holds(tensor) else -1

    def _cpu(self, tensor: Tensor, **_: Any) -> Tensor:
        return self._card.move(tensor, False)

    def _cuda(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return self._card.move(tensor, True)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        how = {name: kwargs[name] for name in ("copy", "memory_format", "non_blocking") if name in kwargs}
        target = self._card.holds(tensor)
        for value in [*args, *kwargs.values()]:
            if isinstance(value, Tensor):
                target, how["dtype"] = self._card.holds(value), torch.Tensor.dtype.__get__(value)
            elif isinstance(value, torch.dtype):
                how["dtype"] = value
            elif isinstance(value, (str, torch.device)):
                target = torch.device(value).type == "cuda"
        return self._card.move(tensor, target, **how)

    def _tolist(self, tensor: Tensor) -> Any:
        if self._card.holds(tensor):
            self._card.wait("tolist")
        return torch.Tensor.tolist(tensor)

    def _numpy(self, tensor: Tensor, **kwargs: Any) -> Any:
        if self._card.holds(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy first.")
        return torch.Tensor.numpy(tensor, **kwargs)

    def __array__(self, tensor: Tensor, *args: Any) -> Any:
        return self._numpy(tensor).__array__(*args)


@functools.cache
def _names() -> dict[int, str]:
    found: dict[Any, str] = {
        torch.Tensor.device.__get__: "device", torch.Tensor.is_cuda.__get__: "is_cuda",
        torch.Tensor.is_cpu.__get__: "is_cpu", torch.Tensor.get_device: "get_device", torch.Tensor.cpu: "cpu",
        torch.Tensor.cuda: "cuda", torch.Tensor.to: "to", torch.Tensor.tolist: "tolist", torch.Tensor.numpy: "numpy",
        torch.Tensor.__array__: "_array__",
    }  # fmt: skip
    return found


def _name(func: Any) -> str:
    try:
        return _names().get(func, "-")
    except TypeError:
        return "-"


def per_chunk(few: Counter[tuple[str, str]], many: Counter[tuple[str, str]]) -> set[str]:
    """Functions that waited more often where there were more chunks of data."""
    return {function for function, what in many if many[function, what] > few[function, what]}
