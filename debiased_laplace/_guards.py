"""Leave the user's things as they were: the global random states, the modes of autograd, the precision of products."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

_PACKAGE = __name__.partition(".")[0]


def warn_the_caller(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside this package that led here."""
    frame, level = sys._getframe(1), 2
    within = _PACKAGE, "contextlib"  # which calls methods that a context manager decorates
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in within:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


@contextmanager
def global_random_state() -> Iterator[None]:
    """Give the global generators of torch, NumPy and Python their states back.

    Iterating a shuffling ``DataLoader`` draws from torch's global generator, and data
    augmentation from any of the three; a fit must not change what the user's program draws next.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def user_warnings() -> Iterator[list[str]]:
    """Collect what the user is warned of; the texts, each once and in their order, are in the list afterwards."""
    told: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield told
    finally:
        told += dict.fromkeys(str(each.message) for each in caught if issubclass(each.category, UserWarning))


@contextmanager
def gradients_enabled() -> Iterator[None]:
    """Record gradients, whatever ``no_grad`` or ``inference_mode`` the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


#: Devices that may have a region of automatic mixed precision.
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


class _MatrixProducts:
    """The oldest of the settings, as an attribute like the others."""

    @property
    def precision(self) -> str:
        return torch.get_float32_matmul_precision()

    @precision.setter
    def precision(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)


#: How torch says of a setting that a more general one decides.
INHERITED = "none"


def _settings() -> list[tuple[Any, str, Any]]:
    """Where torch keeps the precision of products of single-precision numbers, and the value that rounds nothing.

    Older settings come first: they change newer ones, but not the other way round.
    """
    backends: Any = torch.backends
    found: list[tuple[Any, str, Any]] = [
        (_MatrixProducts(), "precision", "highest"), (backends.cuda.matmul, "allow_tf32", False),
        (backends.cudnn, "allow_tf32", False),
    ]  # fmt: skip
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # since torch 2.9, for every kind of product
        owners = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        owners += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
        found += [(owner, "fp32_precision", "ieee") for owner in owners]
    return found


class _Precision:
    """Settings of the process, as the user has them and as products of statistics need them."""

    def __init__(self) -> None:
        self._lock, self._depth = threading.Lock(), 0
        self._users: list[tuple[tuple[Any, str, Any], Any]] = []

    def enter(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth > 1:
                return
            self._users = []
            for setting in _settings():
                # Where the user has chosen in the newer way, older settings may refuse to be read.
                with contextlib.suppress(RuntimeError):
                    self._users.append((setting, getattr(*setting[:2])))
            self.set_full()

    def leave(self) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth:
                self.set_users()

    def set_full(self) -> None:
        for (owner, name, full), _ in self._users:
            setattr(owner, name, full)

    def set_users(self) -> None:
        for (owner, name, _), value in self._users:
            if name == "fp32_precision":
                setattr(owner, name, INHERITED)  # which stays if it comes to the same
            try:
                is_there = getattr(owner, name) == value
            except RuntimeError:  # newer settings are not yet those that it goes with
                is_there = False
            if not is_there:
                setattr(owner, name, value)

    @property
    def is_entered(self) -> bool:
        return self._depth > 0


_precision = _Precision()


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of single-precision numbers in single precision, whatever the caller has allowed.

    Neither TF32 nor a region of ``torch.autocast`` around a fit or a prediction decides its numbers. Both are given
    back afterwards, and the former to forward passes of the model (:func:`users_precision`). The settings of TF32 are
    those of the process: other threads see them too.
    """
    with ExitStack() as stack:
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        _precision.enter()
        stack.callback(_precision.leave)
        yield


@contextmanager
def users_precision() -> Iterator[None]:
    """Within :func:`full_precision`, products as the user has allowed them: for outputs that are the model's own."""
    if not _precision.is_entered:
        yield
        return
    _precision.set_users()
    try:
        yield
    finally:
        _precision.set_full()


@contextmanager
def exact_derivatives() -> Iterator[None]:
    """In full precision, with tensors that autograd can use, also within the user's inference mode."""
    with torch.inference_mode(False), full_precision():
        yield
