"""How much memory a forward pass needs for every datum, whatever it is made of.

Layers that are recorded say what they keep. A frozen body keeps nothing, and has to be run nevertheless: its own
intermediate results are what bounds how many data may be run at a time.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from debiased_laplace.network.tensors import nested_tensors


class HeldMemory(TorchDispatchMode):
    """Follows the memory of the tensors that a computation makes.

    Attributes:
        held: Bytes of those that still exist, after each operation.
    """

    #: Operations with functions among their arguments are followed as any others.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: list[int] = []
        self._now = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to tell the compiler to skip this, PyTorch would import it, a second of every first fit."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in nested_tensors(result):
            self._note(tensor)
        self.held.append(self._now)
        return result

    def _note(self, tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, say
            return
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._now += size
            self._alive[key] = weakref.ref(storage, functools.partial(self._free, key, size))

    def _free(self, key: int, size: int, _: Any) -> None:
        self._now -= size
        del self._alive[key]


def of_a_datum(more: Sequence[int], fewer: Sequence[int], n_data: int) -> int:
    """Bytes that one datum more makes a computation hold at most, from those that it held for n data and for n - 1.

    What does not grow with the data (weights that are dequantised layer by layer) is no part of it.
    """
    if len(more) == len(fewer):
        return max([0, *(of_all - of_fewer for of_all, of_fewer in zip(more, fewer, strict=True))])
    return max([0, *more]) // n_data
