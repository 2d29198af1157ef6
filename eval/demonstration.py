"""What the demonstration costs, in gradients of its network and in single-precision products, all from one run.

    python eval/demonstration.py [--quick] [--seeds 2] [--processes 2]

The constants of ``debiased_laplace/evaluation/demo.py`` by which it says how long it will take are from here. Units are
measured before and after, and their mean is used: other programs slow a machine down by the minute.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from speed import gigaflops

from debiased_laplace.evaluation import demo as demonstration
from debiased_laplace.evaluation.report.outputs import write_outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    n_seeds = options.seeds or (demonstration.N_SEEDS_QUICK if options.quick else demonstration.N_SEEDS)
    torch.set_num_threads(1)
    gradients, products = [], []

    def units() -> None:
        gradients.append(demonstration.seconds_of_a_gradient())
        products.append(2 * 1024**3 / 1e9 / gigaflops())

    units()
    expected = demonstration.expected_seconds(n_seeds, options.processes, options.quick)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        summary = demonstration.demo(folder, quick=options.quick, n_seeds=n_seeds, n_processes=options.processes)
        of_seeds = time.perf_counter() - start
        units()
        start = time.perf_counter()
        write_outputs(Path(folder), summary)
        of_pages = time.perf_counter() - start
    gradient, product = statistics.mean(gradients), statistics.mean(products)
    print(f"a gradient {gradient * 1e3:.2f} ms, a product of 1024 x 1024 {product * 1e3:.1f} ms")
    for name, seconds in (("seeds", of_seeds), ("pages", of_pages)):
        print(f"{name}: {seconds:.1f} s, {seconds / gradient:.0f} gradients, {seconds / product:.0f} products")
    print(f"expected {expected:.1f} s, took {of_seeds + of_pages:.1f} s")


if __name__ == "__main__":
    main()
