"""Leave the user's things as they were: the global random states, the modes of autograd."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


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
