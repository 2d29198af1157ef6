"""What serving is about: predictions in several threads, and the latency of one input.

    python eval/serving.py [--seconds 3] [--rounds 5] [--quick] [--docs docs]

Threads of Python call one posterior, each with different inputs; torch has one thread in each. Reported are
predictions in a second, over those of one thread in the same round (median over rounds, smallest and largest), and the
median time of a prediction over that of the network's forward pass for the same inputs. The numbers are checked: all
predictions of all threads must be those that one thread makes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from documents import fill
from networks import lenet
from speed import gigaflops
from torch import Tensor, nn

from debiased_laplace import DebiasedLaplace
from debiased_laplace.evaluation.shipped.cifar10 import CifarResNet

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet": (lenet, (1, 28, 28)), "ResNet-20": (CifarResNet, (3, 32, 32)),
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("all", {}),
    "last layer": ("last_layer", {}),
    "30 sampled networks": ("all", {"pred_type": "nn", "n_samples": 30}),
    "30 linearised samples": ("all", {"pred_type": "linearized", "n_samples": 30}),
}
N_THREADS = (1, 2, 4)
#: Network, kind of prediction, inputs at a time.
CASES = [(name, kind, 1) for name in NETWORKS for kind in KINDS] + [
    ("LeNet", "exact", 64), ("LeNet", "last layer", 64), ("ResNet-20", "exact", 16), ("ResNet-20", "last layer", 64),
]  # fmt: skip


def throughput(
    predict: Callable[[Tensor], Tensor], inputs: list[Tensor], expected: list[Tensor], n_threads: int, seconds: float
) -> float:
    """Predictions in a second, of all threads together."""
    counts, start, stop = [0] * n_threads, threading.Barrier(n_threads + 1), threading.Event()

    def work(index: int) -> None:
        start.wait()
        while not stop.is_set():
            place = (index + counts[index]) % len(inputs)
            assert torch.equal(predict(inputs[place]), expected[place]), "a thread predicts something else"
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(n_threads)]
    for thread in threads:
        thread.start()
    start.wait()
    begin = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begin)


def seconds_for(call: Callable[[], Any], repetitions: int) -> float:
    call()
    times = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return median(times)


def measure(name: str, kind: str, size: int, rounds: int, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    build, datum = NETWORKS[name]
    subset, keywords = KINDS[kind]
    model = build().eval()
    la = DebiasedLaplace(model, "classification", subset)
    la.fit([(torch.randn(64, *datum), torch.randint(10, (64,)))])
    inputs = [torch.randn(size, *datum) for _ in range(4)]

    def predict(x: Tensor) -> Tensor:
        return la(x, **keywords)

    with torch.no_grad():
        forward = seconds_for(lambda: model(inputs[0]), 50)
    latency = seconds_for(lambda: predict(inputs[0]), 15) / forward
    record: dict[str, Any] = {"network": name, "kind": kind, "inputs": size, "latency": latency}
    expected = [predict(x) for x in inputs]
    throughputs = [[throughput(predict, inputs, expected, n, seconds) for n in N_THREADS] for _ in range(rounds)]
    for index, n in enumerate(N_THREADS[1:], 1):
        ratios = sorted(one_round[index] / one_round[0] for one_round in throughputs)
        record[f"{n} threads"] = [median(ratios), ratios[0], ratios[-1]]
    return record


def table(records: list[dict[str, Any]]) -> str:
    """As it stands in docs/benchmarks_appendix.md."""
    lines = ["| network | prediction | inputs | time, in forward passes of them | two threads | four threads |"]
    lines.append("|---|---|---|---|---|---|")
    for record in records:
        threads = record["2 threads"], record["4 threads"]
        cells = [record["network"], record["kind"], record["inputs"], f"{record['latency']:.1f}"]
        cells += [f"{middle:.2f} ({low:.2f} to {high:.2f})" for middle, low, high in threads]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of every measurement of a throughput")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one case, a moment")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 0.1, 1
    torch.set_num_threads(1)
    records = [measure(*case, options.rounds, options.seconds) for case in CASES[: 1 if options.quick else None]]
    machine: dict[str, Any] = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    machine["gflops"] = round(gigaflops())
    path = options.docs / "records" / "serving.json"
    path.write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n")
    fill(options.docs / "benchmarks.md", {"serving": table(records)})


if __name__ == "__main__":
    main()
