"""What the default fit and uniform batches give in the same time.

    python eval/equal_time.py [--networks digits-cnn resnet20] [--data-dir <folder>] [--scratch eval/results]

Networks, pools and the error are those of ``eval/fidelity.py``, with fewer data in the pools and the first of the test
inputs, so that all of it takes minutes. Every fit is a whole one, from the loader to the posterior; fits take turns
with forward passes over the pool, whose median in the same process is the unit of time. Times are processor times of
one thread, so that two processes with other networks may run side by side. Of a network the record has the last run.
Trained networks are kept in ``<scratch>/cache``.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from bench import hardware
from documents import fill, markdown
from fidelity import DEFAULT, LIKELIHOOD, METHODS, ONE, PROBLEMS, TWO, Method, Problem
from report import NETWORKS, number, statistics
from torch import Tensor

from debiased_laplace.evaluation.records import read_json, write_json
from debiased_laplace.evaluation.shipped.common import one_thread
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.sampling.samplers import UniformSampler
from debiased_laplace.sampling.splits import Single

PRIOR = torch.ones(1, dtype=torch.float64)
BATCH = 250
#: Fits that take less are repeated for their time.
SHORT = 1.0


@dataclass(frozen=True)
class Size:
    """Data of the pool, budgets of the default, test inputs, and draws."""

    n_pool: int
    budgets: Sequence[int]
    n_test: int
    draws: int


SIZES = {
    "digits-cnn": Size(898, (16, 64, 256), 200, 5),
    "digits-mlp": Size(898, (16, 64, 256), 200, 5),
    "lenet": Size(5000, (64, 256, 1024), 50, 3),
    "vit": Size(2000, (16, 64, 256), 100, 3),
    "trec": Size(2000, (16, 64, 256), 100, 3),
    "resnet20": Size(512, (16, 64), 20, 2),
}
ALL = "all data"
WHOLE = Method(lambda _: UniformSampler(None), Single())


@dataclass(frozen=True)
class Point:
    """A measured fit: its budget, its time in forward passes over the pool, and its error."""

    budget: int
    time: float
    error: float


@dataclass(frozen=True)
class Afforded:
    """What a way to fit gives within a time: a budget and an error, or bounds of them outside of what was measured."""

    budget: float
    error: float
    bound: str = ""

    def in_words(self) -> tuple[str, str]:
        """Budget and error."""
        if self.bound == ALL:
            return ALL, "0"
        budget, error = {"": ("", ""), "above": ("at least ", "at most "), "below": ("below ", "above ")}[self.bound]
        return f"{budget}{self.budget:.0f}", f"{error}{self.error:.4f}"


def afforded(within: float, points: Iterable[Point], whole: float) -> Afforded:
    """The most data, and their error, that fits of several budgets afford within a time.

    Between two budgets that were measured, time and error are powers of the budget. Nothing is extrapolated.

    Args:
        within: The time.
        points: Fits of several budgets.
        whole: The time of the fit of all data, whose error is zero.
    """
    if within >= whole:
        return Afforded(math.inf, 0.0, ALL)
    by_budget = sorted(points, key=lambda point: point.budget)
    last = max((i for i, point in enumerate(by_budget) if point.time <= within), default=None)
    if last is None:
        return Afforded(by_budget[0].budget, by_budget[0].error, "below")
    if last == len(by_budget) - 1:
        return Afforded(by_budget[-1].budget, by_budget[-1].error, "above")
    few, many = by_budget[last], by_budget[last + 1]
    share = math.log(within / few.time) / math.log(many.time / few.time)
    budget, error = (a * (b / a) ** share for a, b in ((few.budget, many.budget), (few.error, many.error)))
    return Afforded(budget, error)


# -- measuring -------------------------------------------------------------------------------------


class Bench:
    """A network, its pool, and the variances that the fit of all data gives."""

    def __init__(self, problem: Problem, size: Size) -> None:
        pool, test = (
            (inputs[:n], labels[:n])
            for (inputs, labels), n in ((problem.pool, size.n_pool), (problem.test, size.n_test))
        )
        self.problem = replace(problem, pool=pool, test=test)
        self.batches = list(zip(*(column.split(BATCH) for column in self.problem.pool), strict=True))
        fit(self.problem.model, [tuple(c[:16] for c in self.problem.pool)], LIKELIHOOD, split=Single())  # warm
        fitted, seconds = self.fitted(WHOLE, 0, 0)
        self.reference = self.variances(fitted)
        again = [self.fitted(WHOLE, 0, 0)[1] for _ in range(4 * (seconds < SHORT))]
        self.whole_seconds = median([seconds, *again])

    def fitted(self, method: Method, budget: int, seed: int) -> tuple[Fit, float]:
        """A whole fit, for which the pool is the training set, and its seconds."""
        start = time.process_time()
        fitted = fit(
            self.problem.model, self.batches, LIKELIHOOD, sampler=method.sampler(budget), split=method.split,
            generator=seed,
        )  # fmt: skip
        return fitted, time.process_time() - start

    def variances(self, fitted: Fit) -> Tensor:
        """Of the outputs at prior precision 1, with as many data as the network was trained on."""
        posterior = replace(fitted.posterior, n_data=self.problem.n_data, prior_precision=PRIOR)
        return functional_moments(fitted.network, posterior, self.problem.test[0], covariance=False)[1].double()

    def forward_seconds(self) -> float:
        """Of a forward pass over the pool."""
        start = time.process_time()
        with torch.no_grad():
            for inputs, _ in self.batches:
                self.problem.model(inputs)
        return time.process_time() - start

    def run(self, method: str, budget: int, seed: int) -> dict[str, Any]:
        """The record of one fit."""
        forward = self.forward_seconds()
        fitted, seconds = self.fitted(METHODS[method], budget, seed)
        ratios = (self.variances(fitted) / self.reference).log()
        return {
            "method": method, "budget": budget, "seed": seed, "seconds": seconds, "forward_seconds": forward,
            "error": float(ratios.abs().mean()),
        }  # fmt: skip


def measure(name: str, size: Size, cache: Path, folder: Path | None) -> dict[str, Any]:
    """The record of a network."""
    bench = Bench(PROBLEMS[name](cache, folder), size)
    n_pool = len(bench.problem.pool[1])
    # Of uniform batches more data take the time of the default.
    uniform = [*size.budgets, min(4 * size.budgets[-1], n_pool // 2)]
    runs = []
    for seed in range(size.draws):
        for budget in uniform:
            for method in (TWO, ONE, *([DEFAULT] if budget in size.budgets else [])):
                runs.append(bench.run(method, budget, seed))
                print(name, runs[-1], file=sys.stderr, flush=True)
    return {
        "hardware": hardware("cpu"), "torch": torch.__version__, "n_pool": n_pool, "n_data": bench.problem.n_data,
        "n_test": len(bench.problem.test[1]), "all_data_seconds": bench.whole_seconds, "runs": runs,
    }  # fmt: skip


# -- tables ----------------------------------------------------------------------------------------


def points(record: Mapping[str, Any], method: str) -> list[Point]:
    """Means over draws of the error, and medians of the time in forward passes, for every budget of a way to fit."""
    unit, of_method = forward(record), [run for run in record["runs"] if run["method"] == method]
    of_budgets = {b: [run for run in of_method if run["budget"] == b] for b in {run["budget"] for run in of_method}}
    return [
        Point(b, median(run["seconds"] for run in of_budget) / unit, mean(run["error"] for run in of_budget))
        for b, of_budget in sorted(of_budgets.items())
    ]


def forward(record: Mapping[str, Any]) -> float:
    """Seconds of a forward pass over the pool."""
    return median(run["forward_seconds"] for run in record["runs"])


def compared(of_network: Mapping[str, Any]) -> list[tuple[Point, Afforded, Afforded]]:
    """For every budget of the default: its fit, and what two uniform batches and one afford in its time."""
    whole = of_network["all_data_seconds"] / forward(of_network)
    two, one = (points(of_network, method) for method in (TWO, ONE))
    return [
        (default, afforded(default.time, two, whole), afforded(default.time, one, whole))
        for default in points(of_network, DEFAULT)
    ]


def at_equal_time(record: Mapping[str, Any]) -> str:
    """The default, and what uniform batches give in the time that it takes."""
    rows = []
    for name, of_network in in_order(record):
        for default, two, one in compared(of_network):
            against = {"above": "at least ", "below": "at most "}.get(two.bound, "")
            rows.append([
                f"{NETWORKS[name]}, {of_network['n_pool']:,}", str(default.budget), f"{default.time:.1f}",
                f"{default.error:.4f}", *two.in_words(),
                "" if two.bound == ALL else f"{against}{default.error / two.error:.2f}", *one.in_words(),
            ])  # fmt: skip
    head = [
        "network, data in the pool", "budget", "forward passes", "error", "two uniform batches", "their error",
        "default's / theirs", "one uniform batch", "its error",
    ]  # fmt: skip
    return markdown(head, rows)


def verdict(record: Mapping[str, Any]) -> str:
    """Where the default is better."""
    better, undecided, worse, whole = [], [], [], []
    for name, of_network in in_order(record):
        for default, two, _ in compared(of_network):
            if default.error < two.error:
                of_kind = undecided if two.bound == "above" else better
            else:
                of_kind = whole if two.bound == ALL else worse
            of_kind.append(f"{NETWORKS[name]}, {default.budget}")
    n = sum(map(len, (better, undecided, worse, whole)))
    kinds = {
        "smaller than that of two uniform batches for": better, "larger for": worse,
        "smaller than that of the most data that were tried, which take less time, for": undecided,
        "compared with zero, since all data take no longer, for": whole,
    }  # fmt: skip
    counts = [f"{what} {len(names)} ({'; '.join(names)})" for what, names in kinds.items() if names]
    return f"Of {n} networks and budgets, the default's error at equal time is {', '.join(counts)}."


def all_fits(record: Mapping[str, Any]) -> str:
    """Every fit: its time and its error."""
    rows = []
    for name, of_network in in_order(record):
        unit, network = forward(of_network), NETWORKS[name]
        for method in (DEFAULT, TWO, ONE):
            for point in points(of_network, method):
                draws = [
                    run for run in of_network["runs"] if (run["method"], run["budget"]) == (method, point.budget)
                ]  # fmt: skip
                rows.append([
                    network, method, str(point.budget), f"{point.time:.1f}", number(statistics(draws, "error"), 4),
                ])  # fmt: skip
        rows.append([network, ALL, f"{of_network['n_pool']}", f"{of_network['all_data_seconds'] / unit:.1f}", "0"])
    return markdown(["network", "fit", "budget", "forward passes", "error"], rows)


def in_order(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Networks in the order of the document."""
    return [(name, record[name]) for name in NETWORKS if name in record]


def parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the document, from its record."""
    return {
        "equal time": verdict(record),
        "table equal time": at_equal_time(record),
        "table equal time measured": all_fits(record),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(SIZES), default=None)
    parser.add_argument("--pool", type=int, default=None, help="data to draw from; by default as many as in SIZES")
    parser.add_argument("--budgets", nargs="+", type=int, default=None, help="of the default fit; as in SIZES")
    parser.add_argument("--draws", type=int, default=None, help="of every budget; as in SIZES")
    parser.add_argument("--data-dir", type=Path, default=None, help="folder with FashionMNIST/raw, trec and cifar10")
    parser.add_argument("--scratch", type=Path, default=Path("eval/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true", help="one network, two budgets, one draw")
    options = parser.parse_args()
    if options.quick:
        options.networks, options.budgets, options.draws = ["digits-cnn"], [16, 32], 1
    path = options.docs / "records" / "equal_time.json"
    for name in options.networks or [name for name in SIZES if options.data_dir or name.startswith("digits")]:
        usual = SIZES[name]
        size = replace(
            usual, n_pool=options.pool or usual.n_pool, budgets=sorted(options.budgets or usual.budgets),
            draws=options.draws or usual.draws,
        )  # fmt: skip
        with one_thread():
            measured = measure(name, size, options.scratch / "cache", options.data_dir)
        record = (read_json(path) if path.exists() else {}) | {name: measured}
        write_json(path, record)
        fill(options.docs / "fidelity.md", parts(record))


if __name__ == "__main__":
    main()
