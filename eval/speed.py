"""How fast this machine is: a product of matrices, by which the times in the documentation can be judged.

python eval/speed.py
"""

from __future__ import annotations

import os
import time

import torch


def gigaflops(size: int = 1024, repetitions: int = 10) -> float:
    """Billions of operations a second in a single-precision product of square matrices, best of several."""
    a, b = torch.randn(2, size, size)
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        torch.matmul(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"Single-precision product, one thread: {gigaflops():.0f} GFLOP/s; {os.cpu_count()} CPUs.")
