"""How time and memory grow with everything that can grow, and the largest networks, step by step.

    python eval/scale.py [--only growth large] [--device cuda] [--quick] [--out scale-results] [--docs docs]

Growth: perceptrons and a small CNN with random weights; one quantity is doubled again and again, the others stay.
Every measurement is a fresh process with one thread; the exponent is the slope of a line through the logarithms
of the last three sizes. Large: ResNet-50 and ViT-B/16 with 1,000 classes at 224 x 224 pixels, 64 data drawn, on all
cores or on a card, with the share of every step. What is complete is kept, and a run that was interrupted goes on after
it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bench import hardware, peak_memory, reset_peak, synchronise, timed
from documents import markdown, show
from torch import nn

import debiased_laplace as dl
from debiased_laplace.curvature import projected
from debiased_laplace.curvature.structures import Kronecker
from debiased_laplace.evaluation.records import read_json, write_json
from debiased_laplace.fitting import measurement
from debiased_laplace.fitting.stream import Stream

#: What is doubled: its values, the theory's exponents of time and memory, and why.
GROWTH: dict[str, tuple[tuple[int, ...], float, float, str]] = {
    "N, data of the stream": ((4096, 8192, 16384, 32768), 1, 0, "one forward pass; nothing of it is kept"),
    "budget": ((128, 256, 512, 1024), 1, 1, "backward passes; the data drawn are kept"),
    "C, fit": ((64, 128, 256, 512), 1, 2, "one random vector above 32; B of the last layer"),
    "C, prediction": ((64, 128, 256, 512), 2, 2, "C backward passes, and covariances"),
    "depth": ((4, 8, 16, 32), 1, 1, "layers"),
    "width": ((256, 512, 1024, 2048), 3, 2, "decompositions; factors"),
}
#: Images, and how many of them are drawn, of the large networks.
N_LARGE, BUDGET_LARGE = 128, 64
STEPS = ("pass over the stream", "statistics B", "decompositions", "curvatures")


def perceptron(width: int, depth: int, n_outputs: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(64, width), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, n_outputs)).eval()


def grown(what: str, value: int) -> Callable[[], Any]:
    """The call to measure."""
    n = value if what.startswith("N") else 4096
    budget = value if what == "budget" else 256
    n_outputs = value if what.startswith("C") else 10
    width = value if what == "width" else 64 if what.startswith("C") else 128
    model = perceptron(width, value if what == "depth" else 4, n_outputs)
    x, y = torch.randn(n, 64), torch.randint(n_outputs, (n,))
    loader = list(zip(x.split(256), y.split(256), strict=True))

    def fit() -> dl.Laplace:
        return dl.fit(model, loader, "classification", sampler=dl.PrioritySampler(budget))

    if what != "C, prediction":
        return fit
    posterior = fit()
    from debiased_laplace.posterior.predictive import functional_moments

    return lambda: functional_moments(posterior.network, posterior.posterior, x[:16])


def large(name: str) -> nn.Module:
    import torchvision

    return {"ResNet-50": torchvision.models.resnet50, "ViT-B/16": torchvision.models.vit_b_16}[name]().eval()


def step_by_step(name: str, device: str) -> dict[str, Any]:
    """Seconds of every step of a fit, and its memory, in this process."""
    model = large(name).to(device)
    x, y = torch.randn(N_LARGE, 3, 224, 224, device=device), torch.randint(1000, (N_LARGE,), device=device)
    seconds = dict.fromkeys(STEPS, 0.0)

    def watched(owner: Any, function: str, step: str) -> None:
        original = getattr(owner, function)

        def timed_call(*arguments: Any, **keywords: Any) -> Any:
            synchronise(device)
            start = time.perf_counter()
            try:
                return original(*arguments, **keywords)
            finally:
                synchronise(device)
                seconds[step] += time.perf_counter() - start

        setattr(owner, function, timed_call)

    watched(Stream, "__call__", STEPS[0])
    watched(Kronecker, "measure_unobserved", STEPS[1])
    watched(Kronecker, "eigenbasis", STEPS[2])
    watched(measurement, "curvatures_along", STEPS[3])
    assert measurement.curvatures_along is not projected.curvatures_along
    with torch.no_grad():
        model(x[:8])
        forward = timed(lambda: [model(part) for part in x.split(16)], device)
    before = reset_peak(device)
    whole = timed(
        lambda: dl.fit(
            model, list(zip(x.split(32), y.split(32), strict=True)), "classification",
            sampler=dl.PrioritySampler(BUDGET_LARGE),
        ), device,
    )  # fmt: skip
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "forward": forward, "seconds": whole,
        "steps": seconds, "memory_mb": peak_memory(device) - before,
    }  # fmt: skip


def measure(what: str, value: str, device: str) -> dict[str, Any]:
    """In this process."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    if what == "large":
        return step_by_step(value, device)
    torch.set_num_threads(1)
    function = grown(what, int(value))
    before = reset_peak("cpu")
    first = timed(function, "cpu")
    memory = peak_memory("cpu") - before
    return {"seconds": min([first, *(timed(function, "cpu") for _ in range(2))]), "memory_mb": memory}


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """Slope through the logarithms of the last three sizes."""
    x, y = [math.log(size) for size in sizes[-3:]], [math.log(max(value, 1e-9)) for value in values[-3:]]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def growth_table(record: Mapping[str, Any]) -> str:
    rows = []
    for what, (sizes, time_exponent, memory_exponent, why) in GROWTH.items():
        of_sizes = record["growth"][what]
        seconds = exponent(sizes, [of_sizes[str(size)]["seconds"] for size in sizes])
        memory = exponent(sizes, [of_sizes[str(size)]["memory_mb"] for size in sizes])
        rows.append([
            what, " ".join(f"{size:,}" for size in sizes), f"{seconds:.1f}", f"{time_exponent:g}", f"{memory:.1f}",
            f"{memory_exponent:g}", why,
        ])  # fmt: skip
    columns = ["what", "sizes", "time grows with exponent", "theory at most", "memory", "theory at most", "because of"]
    return markdown(columns, rows)


def large_table(record: Mapping[str, Any]) -> str:
    rows = []
    for name, result in record["large"].items():
        shares = [f"{100 * result['steps'][step] / result['seconds']:.0f} %" for step in STEPS]
        ratio = f"{result['seconds'] / result['forward']:.0f}"
        rows.append([
            name, f"{result['parameters'] / 1e6:.1f} million", ratio, *shares, f"{result['memory_mb'] / 1e3:.1f} GB",
        ])  # fmt: skip
    columns = ["network", "parameters", "fit, in forward passes of all images", *STEPS, "memory"]
    return markdown(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="of the largest networks; growth is measured on a CPU")
    parser.add_argument("--out", type=Path, default=Path("scale-results"))
    parser.add_argument("--docs", type=Path, help="put the record and the tables there; otherwise they are printed")
    parser.add_argument("--quick", action="store_true", help="growth alone, to a quarter of the sizes")
    parser.add_argument("--only", nargs="+", default=["growth", "large"], choices=["growth", "large"])
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "VALUE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.device)))
        return
    if options.quick:
        options.only = ["growth"]
        for what, (sizes, *about) in GROWTH.items():
            GROWTH[what] = (tuple(max(1, size // 4) for size in sizes), *about)  # type: ignore[assignment]
    on_cpu = options.device == "cpu"
    path = options.out / ("scale.json" if on_cpu else f"scale-{options.device}.json")
    record = read_json(path) if path.exists() else {"growth": {}, "large": {}}
    record |= {
        "hardware": hardware(options.device),
        "torch": torch.__version__,
        "n_large": N_LARGE,
        "budget": BUDGET_LARGE,
    }
    wanted = [("growth", what, str(size)) for what, (sizes, *_) in GROWTH.items() for size in sizes]
    wanted += [("large", "large", name) for name in ("ResNet-50", "ViT-B/16")]
    for part, what, value in wanted:
        of_part = record[part] if part == "large" else record[part].setdefault(what, {})
        if part not in options.only or value in of_part:
            continue
        command = [sys.executable, __file__, "--device", options.device, "--one", what, value]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr)
        of_part[value] = json.loads(done.stdout.strip().splitlines()[-1])
        print(what, value, of_part[value], file=sys.stderr)
        write_json(path, record)
    parts = {"growth": growth_table} if "growth" in options.only else {}
    parts |= {"large": large_table} if "large" in options.only else {}
    tables = {name: table(record) for name, table in parts.items()}
    if options.docs is not None:
        shutil.copy(path, options.docs / "records")
    show(tables, options.docs and options.docs / "benchmarks.md")


if __name__ == "__main__":
    main()
