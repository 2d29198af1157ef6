"""Derivatives in forward mode, in as many threads as there are, and attention in a form that has them.

torch has one level of forward mode in a process, and its context manager ends that of all threads; and which kernels
attention may use is a setting of the process too. Here threads share the level, which ends with the last of them, and
attention is written out where it is called.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from debiased_laplace.network.tracing import WrittenOut

_lock = threading.Lock()
_users = 0
_loaded = False


@contextmanager
def forward_mode() -> Iterator[None]:
    """A level of forward mode that threads share; tangents of one thread's tensors are no other's."""
    global _users, _loaded
    with _lock:
        if not _users:
            forward_ad.enter_dual_level()
        _users += 1
        if not _loaded:
            _load()
            _loaded = True
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                forward_ad.exit_dual_level()


def _load() -> None:
    """Let torch load what its first forward-mode derivative needs, without the warning about how it does that.

    It scripts decompositions, which its own newer releases deprecate: nothing a user could change.
    """
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.filterwarnings("ignore", message="`torch.jit", category=FutureWarning)
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def jvp(
    function: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor], along: dict[str, Tensor],
    *, forward_only: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Value of a function of named tensors, and its derivative along others; zero where it does not depend on them.

    Where an operation has no forward mode (the kernel of weight normalisation), by two backward passes, or with
    ``forward_only`` torch's ``NotImplementedError``.
    """
    along = {name: along[name].to(at[name]) for name in at}
    try:
        with forward_mode():
            value, tangent = forward_ad.unpack_dual(
                function({name: forward_ad.make_dual(at[name], along[name]) for name in at})
            )
            return value, torch.zeros_like(value) if tangent is None else tangent
    except NotImplementedError:
        if forward_only:
            raise
        return _double_backward(function, at, along)


def differentiable_vjp(outputs: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    r"""A vector w, and the vector-Jacobian product :math:`J^\top w` as a function of it in autograd's graph.

    It is linear in w, so that its own vector-Jacobian product with u is :math:`J u`: a Jacobian-vector product by two
    backward passes (double backward), for operations without forward mode.
    """
    w = torch.zeros_like(outputs).requires_grad_()
    return w, torch.autograd.grad(outputs, list(inputs), w, create_graph=True, materialize_grads=True)


def _double_backward(
    function: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor], along: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Value and Jacobian-vector product of a function by two backward passes."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in at.items()}
        value = function(leaves)
        w, product = differentiable_vjp(value, list(leaves.values()))
        (tangent,) = torch.autograd.grad(
            product, w, [along[name] for name in leaves], create_graph=wanted, materialize_grads=True
        )
    return (value, tangent) if wanted else (value.detach(), tangent)


class PlainAttention(WrittenOut):
    """Writes functions out in plain operations, for derivatives in forward mode as well.

    Any such mode also turns off the fused layers of Transformers. The row of ``padding_idx`` of an embedding is
    a constant for every derivative, as torch has it for the first backward one alone.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types_: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.embedding:
            return _embedding(*args, **(kwargs or {}))
        return super().__torch_function__(func, types_, args, kwargs)


def _embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, *rest: Any) -> Tensor:
    rows = torch.embedding(weight, indices, -1, *rest)  # without padding
    if padding_idx < 0:
        return rows
    constant = forward_ad.unpack_dual(rows).primal.detach()
    return torch.where((indices == padding_idx)[..., None], constant, rows)
