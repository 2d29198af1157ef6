"""What a command runs on."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from debiased_laplace.evaluation import records


def machine(device: torch.device) -> dict[str, Any]:
    """What it runs on: versions, devices, memory."""
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return records.environment(device) | {"cards": cards, "memory_available_bytes": available_memory(device)}


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free, where the system says it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return None
