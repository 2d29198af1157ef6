"""Block-diagonal factors, ``Kronecker(max_factor=)``: what they change beside the error of the fit itself.

    python eval/max_factor.py --data-dir <folder> [--networks resnet18] [--scratch eval/results]

Two networks have trained weights, a ResNet-20 and the vision Transformer of ``eval/vit.py``. Two have wide layers and
are trained a little here: torchvision's ResNet-18 on images of CIFAR-10 at 64 x 64 pixels (factors up to 4,608) and
a vision Transformer of width 192 on Fashion-MNIST (factors up to 576). Every fit is a fresh process of one thread,
whose processor time is its cost, the first of its network with all data of the pool; the variances that it gives are
kept in ``<scratch>/max_factor``, and an interrupted run goes on after them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import fidelity
import torch
import torch.nn.functional as F
import vit
from bench import hardware, peak_memory, reset_peak, resnet18
from documents import fill, markdown
from fidelity import LIKELIHOOD, PROBLEMS, Problem
from torch import Tensor, nn

from debiased_laplace.curvature.structures import Kronecker
from debiased_laplace.evaluation.records import read_json, write_json
from debiased_laplace.fitting.fit import fit
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.sampling.samplers import PrioritySampler, UniformSampler
from debiased_laplace.sampling.splits import CrossFit, Single

PRIORS = (1.0, 100.0)
N_POOL, BATCH, SEEDS = 256, 64, 2
BUDGET, LARGER = 64, 128


def enlarged(images: Tensor) -> Tensor:
    """To 64 x 64 pixels."""
    return F.interpolate(images, size=64, mode="bilinear")


def wide_resnet(cache: Path, folder: Path | None) -> Problem:
    """ResNet-18 after 100 steps on the first 6,400 images of CIFAR-10."""
    problem = fidelity.cifar10(20, 6400, cache, folder)
    images, labels = problem.pool
    model = trained(resnet18, (enlarged(images), labels), cache / "resnet18.pt")
    return Problem(
        model, (enlarged(images[:N_POOL]), labels[:N_POOL]), problem.validation,
        (enlarged(problem.test[0][:12]), problem.test[1][:12]), len(labels),
    )  # fmt: skip


def wide_vit(cache: Path, folder: Path | None) -> Problem:
    """The Transformer of eval/vit.py at width 192, after 400 steps on 25,600 images of Fashion-MNIST."""

    def model(data: tuple[Tensor, Tensor]) -> nn.Module:
        return trained(lambda: vit.ViT(width=192), (data[0][:25_600], data[1][:25_600]), cache / "vit-192.pt")

    return replace(fidelity.fashion_mnist(model, folder), n_data=25_600)


def trained(build: Callable[[], nn.Module], data: tuple[Tensor, Tensor], cache: Path) -> nn.Module:
    """One epoch, or the weights that are there."""
    torch.manual_seed(0)
    return fidelity.trained(build().train(), data, 1, cache)


@dataclass(frozen=True)
class Case:
    """A network in words, where it comes from, its limits of a factor, and test inputs."""

    words: str
    build: Callable[[Path, Path | None], Problem]
    limits: tuple[int, ...]
    n_test: int


CASES = {
    "resnet20": Case("ResNet-20 on CIFAR-10", PROBLEMS["resnet20"], (256, 128), 20),
    "resnet18": Case("ResNet-18 on CIFAR-10, trained a little", wide_resnet, (2048, 1024, 512), 12),
    "vit": Case("ViT of width 48 on Fashion-MNIST", PROBLEMS["vit"], (48, 24), 50),
    "vit-192": Case("ViT of width 192 on Fashion-MNIST, trained a little", wide_vit, (384, 192, 96), 50),
}


# -- measuring -------------------------------------------------------------------------------------


def measure(name: str, budget: int, limit: int, seed: int, out: str, cache: str, folder: str) -> dict[str, float]:
    """Time and memory of a fit in this process; the variances of the test inputs are written. Zero: no limit."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    problem = CASES[name].build(Path(cache), Path(folder))
    inputs, labels = (column[:N_POOL] for column in problem.pool)
    batches = list(zip(inputs.split(BATCH), labels.split(BATCH), strict=True))
    whole = budget == N_POOL
    before, start = reset_peak("cpu"), time.process_time()
    fitted = fit(
        problem.model, batches, LIKELIHOOD, structure=Kronecker(max_factor=limit or None), generator=seed,
        sampler=UniformSampler(None) if whole else PrioritySampler(budget), split=Single() if whole else CrossFit(),
    )  # fmt: skip
    seconds, memory = time.process_time() - start, peak_memory("cpu") - before
    posteriors = [
        replace(fitted.posterior, n_data=problem.n_data, prior_precision=torch.tensor([prior], dtype=torch.float64))
        for prior in PRIORS
    ]
    test = problem.test[0][: CASES[name].n_test]
    _, variances = functional_moments(fitted.network, posteriors, test, covariance=False)
    torch.save(variances, out)
    return {"seconds": seconds, "memory_mb": memory}


def kept(name: str, budget: int, limit: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time, memory and variances of a fit, measured once."""
    path = options.scratch / "max_factor" / f"{name}.{budget}.{limit}.{seed}.json"
    variances = path.with_suffix(".pt")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        arguments = [name, budget, limit, seed, variances, options.scratch / "cache", options.data_dir]
        command = [sys.executable, __file__, "--one", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr)
        write_json(path, json.loads(done.stdout.strip().splitlines()[-1]))
        print(path.stem, read_json(path), file=sys.stderr, flush=True)
    return read_json(path) | {"variances": torch.load(variances).double()}


def of_network(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The record of a network: distances between fits, at every prior precision."""
    reference = kept(name, N_POOL, 0, 0, options)

    def distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[float]:
        return (one["variances"] / other["variances"]).log().abs().flatten(1).mean(1).tolist()

    fits = []
    for budget, limit in ((LARGER, 0), (BUDGET, 0), *((BUDGET, limit) for limit in CASES[name].limits)):
        runs = []
        for seed in range(options.seeds):
            run = kept(name, budget, limit, seed, options)
            runs.append({
                "seconds": run["seconds"], "memory_mb": run["memory_mb"], "to_all_data": distance(run, reference),
                "to_dense": distance(run, kept(name, budget, 0, seed, options)),
            })  # fmt: skip
        fits.append({"budget": budget, "max_factor": limit, "runs": runs})
    whole = {"seconds": reference["seconds"], "memory_mb": reference["memory_mb"]}
    return {"hardware": hardware("cpu"), "torch": torch.__version__, "n_pool": N_POOL, "all_data": whole, "fits": fits}


def table(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    rows = []
    for name, case in CASES.items():
        for one in record[name]["fits"] if name in record else ():
            limit, runs = one["max_factor"], one["runs"]
            cells = [
                " and ".join(f"{mean(run[field][p] for run in runs):.3f}" for p in range(len(PRIORS)))
                for field in ("to_dense", "to_all_data")
            ]
            rows.append([
                case.words, str(one["budget"]), str(limit or "none"), cells[0] if limit else "", cells[1],
                f"{median(run['seconds'] for run in runs):.1f} s", f"{max(run['memory_mb'] for run in runs):.0f} MB",
            ])  # fmt: skip
    head = ["network", "budget", "max_factor", "to dense factors, same data", "to all data", "fit", "memory"]
    return markdown(head, rows)


def parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the document."""
    return {"table max factor": table(record)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--data-dir", type=Path, help="folder with FashionMNIST/raw and cifar10")
    parser.add_argument("--scratch", type=Path, default=Path("eval/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true", help="one network and seed")
    parser.add_argument("--one", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.networks, options.seeds = ["resnet20"], 1
    if options.one:
        name, budget, limit, seed, *paths = options.one
        print(json.dumps(measure(name, int(budget), int(limit), int(seed), *paths)))
        return
    path = options.docs / "records" / "max_factor.json"
    record = read_json(path) if path.exists() else {}
    for name in options.networks:
        record[name] = of_network(name, options)
        write_json(path, record)
        fill(options.docs / "fidelity.md", parts(record))


if __name__ == "__main__":
    main()
