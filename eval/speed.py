"""How fast this machine is: a product of matrices, by which the times in the documentation can be judged.

python eval/speed.py
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch


def gigaflops(size: int = 1024, repetitions: int = 10, clock: Callable[[], float] = time.perf_counter) -> float:
    """Billions of operations a second in a single-precision product of square matrices, best of several.

    With ``clock=time.process_time`` for a second of processor time, which other programs change less.
    """
    a, b = torch.randn(2, size, size)
    seconds = []
    for _ in range(repetitions):
        start = clock()
        torch.matmul(a, b)
        seconds.append(clock() - start)
    return 2 * size**3 / min(seconds) / 1e9


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"Single-precision product, one thread: {gigaflops():.0f} GFLOP/s; {os.cpu_count()} CPUs.")
