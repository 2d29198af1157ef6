"""Pruning by the inverse of an empirical Fisher: against magnitudes and its diagonal, and with debiased directions.

    python eval/empirical_fisher.py [--seeds 8] [--quick] [--out eval/results] [--docs docs]

The digits network of every seed, its weights without biases and normalisation. A share of them is set to zero at once,
nothing is trained again. Dampings are chosen on the validation data, for every method, share and seed; losses and
accuracies are those of the test data. Costs are processor times of one thread, in those of the gradient of a batch of
128. Writes ``<docs>/records/empirical_fisher.json``, and fills ``<docs>/empirical_fisher.md`` from there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from documents import fill, markdown
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.evaluation.records import environment, read_json, write_json
from debiased_laplace.evaluation.shipped import digits
from debiased_laplace.evaluation.shipped.common import one_thread

WEIGHTS = ["0.weight", "3.weight", "7.weight", "9.weight"]
SHARES = (0.5, 0.75, 0.85, 0.9)
DAMPINGS = (1e-9, 1e-8, 1e-7, 1e-6, 1e-4)
#: Gradients of the comparison with magnitudes, and of that of splits.
MANY, FEW = 512, 256
#: Dampings at which inverses are compared.
COMPARED = (1e-5, 1e-4, 1e-3)
SPLITS = {"one batch": dl.Single, "two halves": dl.TwoBatch, "cross-fit": dl.CrossFit}
CLASSIFICATION = "classification"

#: From a damping and a share of weights to the parameters without that share.
Method = Callable[[float, float], Tensor]


def by_scores(scores: Tensor, share: float) -> Tensor:
    """The share of the weights with the smallest scores, ``[D]``, boolean."""
    removed = torch.zeros(len(scores), dtype=torch.bool)
    removed[scores.argsort()[: round(share * len(scores))]] = True
    return removed


def methods_of(fisher: dl.EmpiricalFisher, name: str, *, each: bool = False) -> dict[str, Method]:
    """Ways of pruning by one matrix; with each, scores and the adaption of the others each alone."""
    weights = fisher.network.mean().double()
    kept: dict[float, Tensor] = {}

    def scores(damping: float) -> Tensor:
        return kept.setdefault(damping, fisher.pruning_scores(damping))

    whole = {name: lambda damping, share: fisher.pruned(by_scores(scores(damping), share), damping)}
    if not each:
        return whole
    diagonal = fisher.gradients.double().square().mean(0)
    return {
        "magnitude": lambda damping, share: weights * ~by_scores(weights.abs(), share),
        "diagonal": lambda damping, share: weights * ~by_scores(weights.square() * (diagonal + damping), share),
        f"{name}, scores alone": lambda damping, share: weights * ~by_scores(scores(damping), share),
        f"magnitude, others adapt by {name}": (
            lambda damping, share: fisher.pruned(by_scores(weights.abs(), share), damping)
        ),
        **whole,
    }


def of_a_fit(model: nn.Module, batches: list[Any], n: int, split: Any, curvature: str, seed: int) -> dl.EmpiricalFisher:
    """The matrix whose directions and magnitudes are those of a posterior, as a matrix of as many gradients."""
    fitted = dl.fit(
        model, batches, CLASSIFICATION, structure=dl.LowRank(n), curvature=curvature, parameters=WEIGHTS,
        sampler=dl.UniformSampler(n), split=split, seed=seed, mc_samples=1,
    ).posterior  # fmt: skip
    rank = fitted.basis.rank
    rows = fitted.basis.lift(torch.eye(rank, dtype=torch.float64)) * (rank * fitted.curvatures.double()).sqrt()[:, None]
    fisher = dl.EmpiricalFisher(model, batches[0], CLASSIFICATION, window=rank, parameters=WEIGHTS)
    fisher.append(rows)
    return fisher


def of_seed(seed: int, quick: bool) -> dict[str, Any]:
    """Test losses and accuracies of every method and share, and distances of inverses."""
    parts = digits.split(seed)
    model = digits.trained(*parts.train, seed, epochs=digits.QUICK_EPOCHS if quick else digits.EPOCHS)
    images, labels = parts.train[0].double(), parts.train[1]
    model = model.double()  # so that no direction is left out as rounding
    batches = list(zip(images.split(128), labels.split(128), strict=True))
    n = FEW if quick else MANY
    fisher = dl.EmpiricalFisher(model, (images[:n], labels[:n]), CLASSIFICATION, window=n, parameters=WEIGHTS)
    with torch.no_grad():
        probabilities = model(images[:n]).softmax(-1)
    drawn = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    ggn = of_a_fit(model, batches, n, dl.Single(), "ggn", seed)
    splits = {name: of_a_fit(model, batches, FEW, split(), "empirical_fisher", seed) for name, split in SPLITS.items()}
    ways = methods_of(fisher, "empirical Fisher", each=True) | methods_of(ggn, "Gauss-Newton matrix")
    for name, of_split in splits.items():
        ways |= methods_of(of_split, f"{FEW} gradients, {name}")

    def scored(weights: Tensor, of: tuple[Tensor, Tensor]) -> tuple[float, float]:
        with torch.no_grad():
            outputs = torch.func.functional_call(model, fisher.network.from_vector(weights), (of[0].double(),))
        right = (outputs.argmax(-1) == of[1]).double().mean()
        return float(F.cross_entropy(outputs, of[1])), 100 * float(right)

    dampings = DAMPINGS[::2] if quick else DAMPINGS
    result: dict[str, Any] = {
        "whole": scored(fisher.network.mean(), parts.test), "differing": int((drawn != labels[:n]).sum()),
        "methods": {}, "distances": {},
    }  # fmt: skip
    for name, way in ways.items():
        result["methods"][name] = {}
        for share in SHARES[-1:] if quick else SHARES:
            tried = [way(damping, share) for damping in (dampings if name != "magnitude" else (1.0,))]
            losses = [scored(weights, parts.validation)[0] for weights in tried]
            best = losses.index(min(losses))
            loss, accuracy = scored(tried[best], parts.test)
            damping = None if name == "magnitude" else dampings[best]
            result["methods"][name][str(share)] = {"loss": loss, "accuracy": accuracy, "damping": damping}
    every = dl.EmpiricalFisher(model, batches, CLASSIFICATION, window=len(labels), parameters=WEIGHTS)
    for damping in COMPARED[-1:] if quick else COMPARED:
        exact = every.inverse_diagonal(damping).log()
        seen = exact.argsort()[: len(exact) // 10]
        result["distances"][f"{damping:g}"] = {
            name: float((of_split.inverse_diagonal(damping).log() - exact)[seen].abs().mean())
            for name, of_split in splits.items()
        }
    return result


def costs() -> dict[str, Any]:
    """Processor times over that of a gradient of 128 data, and memory, on an untrained network."""
    model, (images, labels) = digits.trained(*digits.split(0).train, 0, epochs=0), digits.split(0).train
    batch = images[:128], labels[:128]

    def seconds(call: Callable[[], Any], n: int) -> float:
        times = []
        for _ in range(n):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        return statistics.median(times)

    def gradient() -> None:
        F.cross_entropy(model(batch[0]), batch[1]).backward()

    unit, result = seconds(gradient, 50), {}
    for window in (FEW, 768):
        fisher = dl.EmpiricalFisher(model, (images[:window], labels[:window]), CLASSIFICATION, window=window)
        row, vector = fisher.gradients[:1].clone(), torch.randn(fisher.network.n_params)

        def decompose(fisher: dl.EmpiricalFisher = fisher) -> None:
            fisher._known = None
            fisher._decomposition  # noqa: B018

        calls: dict[str, Callable[[], Any]] = {
            "product": lambda fisher=fisher, vector=vector: fisher.inverse_matvec(vector, 1e-3),
            "append": lambda fisher=fisher, row=row: fisher.append(row),
            "eigenvectors": decompose,
            "diagonal": lambda fisher=fisher: fisher.inverse_diagonal(1e-3),
            "anew": lambda fisher=fisher: fisher.append(fisher.gradients.clone()),
        }  # fmt: skip
        fisher.inverse_matvec(vector, 1e-3)
        times = {name: seconds(call, 5 if name in ("eigenvectors", "diagonal", "anew") else 20) / unit
                 for name, call in calls.items() if name != "append"}  # fmt: skip
        times["append"] = seconds(calls["append"], 20) / unit
        result[str(window)] = {"n_params": fisher.network.n_params, "memory": fisher.memory, **times}
    return result


# -- the document ----------------------------------------------------------------------------------


def interval(values: list[float], digits_: int) -> str:
    return f"{statistics.fmean(values):.{digits_}f} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits_}f}"


def parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the document, from the record."""
    seeds = record["seeds"]
    shares = list(seeds[0]["methods"]["magnitude"])

    def rows(wanted: Callable[[str], bool], field: str, digits_: int) -> list[list[str]]:
        return [
            [name, *(interval([of["methods"][name][share][field] for of in seeds], digits_) for share in shares)]
            for name in seeds[0]["methods"] if wanted(name)
        ]  # fmt: skip

    def is_few(name: str) -> bool:
        return name.startswith(f"{FEW} ")

    def difference(one: str, other: str) -> list[str]:
        losses = [[of["methods"][name] for of in seeds] for name in (one, other)]
        pairs = [[a[share]["loss"] - b[share]["loss"] for a, b in zip(*losses, strict=True)] for share in shares]
        return [f"{one} \N{MINUS SIGN} {other}", *(interval(of_share, 3) for of_share in pairs)]

    titles = [f"{100 * float(share):g} % removed" for share in shares]
    dampings = list(seeds[0]["distances"])
    distances = [
        [name, *(interval([of["distances"][damping][name] for of in seeds], 3) for damping in dampings)]
        for name in SPLITS
    ]
    columns = ["window", "memory", "product", "one gradient more", "eigenvectors", "diagonal", "Gram matrix anew"]
    of_costs = [
        [window, f"{of['memory'] / 1e6:.1f} MB",
         *(f"{of[name]:.2g}" for name in ("product", "append", "eigenvectors", "diagonal", "anew"))]
        for window, of in record["costs"].items()
    ]  # fmt: skip
    losses, differing = [of["whole"][0] for of in seeds], [of["differing"] for of in seeds]
    return {
        "networks": (
            f"{len(seeds)} seeds; the whole networks have a test loss of {interval(losses, 3)}. Of {record['n']} "
            f"labels drawn from their own predictives {min(differing)} to {max(differing)} differ from the targets."
        ),
        "loss": markdown(["test loss", *titles], rows(lambda name: not is_few(name), "loss", 3)),
        "accuracy": markdown(["test accuracy %", *titles], rows(lambda name: not is_few(name), "accuracy", 1)),
        "differences": markdown(
            ["test loss", *titles],
            [
                difference("empirical Fisher", other)
                for other in seeds[0]["methods"]
                if other != "empirical Fisher" and not is_few(other)
            ],
        ),
        "splits": markdown(
            ["test loss", *titles],
            [
                *rows(is_few, "loss", 3),
                *(difference(f"{FEW} gradients, {name}", f"{FEW} gradients, one batch") for name in list(SPLITS)[1:]),
            ],
        ),
        "distances": markdown(["directions and magnitudes", *(f"damping {d}" for d in dampings)], distances),
        "costs": markdown(columns, of_costs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--out", type=Path, default=Path("eval/results"), help="keeps seeds that are measured")
    parser.add_argument("--seeds", type=int, default=digits.SEEDS)
    parser.add_argument("--quick", action="store_true", help="two seeds, one share, fewer gradients and dampings")
    options = parser.parse_args()
    path, measured = options.docs / "records" / "empirical_fisher.json", []
    with one_thread():
        for seed in range(2 if options.quick else options.seeds):
            kept = options.out / f"empirical_fisher.{seed}{'.quick' * options.quick}.json"
            if not kept.exists():
                write_json(kept, of_seed(seed, options.quick))
                print(f"seed {seed}", file=sys.stderr, flush=True)
            measured.append(read_json(kept))
        record = {
            "environment": environment(torch.device("cpu")),
            "n": FEW if options.quick else MANY,
            "seeds": measured,
            "costs": costs(),
        }
    write_json(path, record)
    fill(options.docs / "empirical_fisher.md", parts(read_json(path)))


if __name__ == "__main__":
    main()
