"""Commands that ``torchrun`` has started in several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

    from debiased_laplace._ranks import Ranks

T = TypeVar("T")


def n_launched() -> int:
    """How many processes ``torchrun`` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this is the process that writes files and to the terminal."""
    return rank_and_size()[0] == 0


def device_of_process(device: torch.device) -> torch.device:
    """A card of its own for every process of a machine, unless one was named by its number."""
    import torch

    if n_launched() == 1 or device.type != "cuda" or device.index is not None:
        return device
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def together(what: str) -> Iterator[Ranks]:
    """Let the processes that ``torchrun`` has started run the code within together; one process is alone."""
    from debiased_laplace import _ranks

    if n_launched() == 1:
        yield _ranks.ALONE
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        with _ranks.together(what) as ranks:
            yield ranks
    finally:
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """Which process this is, of how many that ``torchrun`` has started."""
    size = n_launched()
    return (int(os.environ["RANK"]) if size > 1 else 0), size


def of_all(value: T) -> list[T]:
    """What every process that ``torchrun`` has started comes here with, which may take them days."""
    if n_launched() == 1:
        return [value]
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=30))
    every: list[T | None] = [None] * n_launched()
    dist.all_gather_object(every, value)
    dist.destroy_process_group()
    return [one for one in every if one is not None]
