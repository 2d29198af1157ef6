"""Continual learning: the posterior of earlier tasks as the prior of the next, against fine-tuning and replay.

    python eval/continual.py [--kinds permuted parity] [--seeds 5]

A network learns five tasks, one after the other, on scikit-learn's digits: ``permuted``, all digits with their pixels
in another order for each task; ``parity``, whether a digit is odd, of 0 and 1, then of 2 and 3, and so on, with the
same two outputs for all. Records, one for each seed and method, are in ``<out>/continual``; what is there already is
used. ``<docs>/records/continual.json`` has what the page shows, and the marked part of ``<docs>/beyond.md`` is filled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from active import paired
from documents import fill, markdown
from results import rounded
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.evaluation.records import environment, read_json, read_record, write_json, write_record
from debiased_laplace.evaluation.report.numbers import plus_minus, with_interval
from debiased_laplace.evaluation.shipped import digits
from debiased_laplace.evaluation.shipped.common import initialised, one_thread

KINDS = {"permuted": 10, "parity": 2}  # number of outputs
N_TASKS, STEPS, BATCH, LEARNING_RATE = 5, 200, 64, 3e-3
HIDDEN = 100
#: Data of each task that a posterior measures curvature on, or that are replayed.
BUDGET = 64
#: Small, so that what the curvature does not determine is free; before the strength.
PRIOR_PRECISION = 0.01

FINE_TUNED, JOINT, REPLAY, L2 = "fine-tuning", "all tasks at once", "replay", "squared distance"
SINGLE, DEBIASED = "single-batch K-FAC", "debiased K-FAC"
POSTERIORS: dict[str, dict[str, Any]] = {
    "debiased diagonal": {"structure": dl.Diagonal(), "sampler": dl.PrioritySampler(BUDGET)},
    SINGLE: {"sampler": dl.UniformSampler(BUDGET), "split": dl.Single()},
    DEBIASED: {"sampler": dl.PrioritySampler(BUDGET)},
    "debiased K-FAC, data gone": {"sampler": dl.PrioritySampler(BUDGET)},
}
#: What is multiplied by a strength, to be tuned: the quadratics, and the loss of what is replayed.
STRENGTHS: dict[str, tuple[float, ...]] = {
    FINE_TUNED: (0.0,), JOINT: (0.0,), REPLAY: (0.3, 1.0, 3.0, 10.0), L2: (1.0, 10.0, 100.0, 1000.0),
    **dict.fromkeys(POSTERIORS, (1.0, 5.0, 25.0, 125.0)),
}  # fmt: skip
Data = tuple[Tensor, Tensor]


class Part(NamedTuple):
    """Inputs ``[N, 64]`` and labels ``[N]`` of a task."""

    train: Data
    validation: Data
    test: Data


@cache
def tasks(kind: str, seed: int) -> list[Part]:
    """The five tasks of a seed."""
    parts, generator = digits.split(seed), torch.Generator().manual_seed(seed)
    result = []
    for number in range(N_TASKS):
        order = torch.randperm(64, generator=generator)

        def of_task(images: Tensor, labels: Tensor, order: Tensor = order, number: int = number) -> Data:
            flat = images.flatten(1)
            if kind == "permuted":
                return flat[:, order], labels
            chosen = labels // 2 == number
            return flat[chosen], labels[chosen] % 2

        result.append(Part(*(of_task(*part) for part in parts)))
    return result


def network(n_outputs: int) -> nn.Module:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, n_outputs))


def learn(model: nn.Module, data: Data, seed: int, added: Callable[[], Tensor] | None, steps: int = STEPS) -> None:
    """Train in place on a task, with something added to the loss of every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    with one_thread():
        for _ in range(steps):
            batch = torch.randint(len(data[1]), (BATCH,), generator=generator)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data[0][batch]), data[1][batch])
            (loss if added is None else loss + added()).backward()
            optimizer.step()


def vector(model: nn.Module) -> Tensor:
    """All weights, ``[D]``."""
    return torch.cat([p.flatten() for p in model.parameters()])


def quadratic(model: nn.Module, posterior: dl.Laplace | None, strength: float, n: int) -> Callable[[], Tensor]:
    r"""What earlier tasks say of the weights, for a mean loss over n data.

    .. math:: \frac{s}{2 n} (\theta - \theta^*)^\top P (\theta - \theta^*)

    with the precision P of a posterior, or the identity if there is none, and the weights after the last task.
    """
    if posterior is None:
        before = vector(model).detach().clone()
        return lambda: strength / (2 * n) * (vector(model) - before).square().sum()
    gaussian = posterior.posterior
    return lambda: (strength / (2 * n) * gaussian.square_norm(vector(model))).to(gaussian.mean.dtype)


def added_to(posterior: dl.Laplace | None, model: nn.Module, data: Data, method: str, seed: int) -> dl.Laplace:
    """The posterior with one more task."""
    if posterior is not None and method.endswith("data gone"):  # as if it came from a file
        fit = replace(posterior.fitted, sample=None, observed=None, uniform=None)
        posterior = replace(posterior, fitted=fit)
    return dl.fit(
        model, [data], "classification", previous=posterior, prior_precision=PRIOR_PRECISION, seed=seed,
        **POSTERIORS[method],
    )  # fmt: skip


def accuracy(model: nn.Module, data: Data) -> float:
    """Share of right answers."""
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).double().mean())


def learned(kind: str, seed: int, method: str, strength: float) -> dict[str, Any]:
    """Accuracies after every task, on the test data of those so far, and at last on all validation data."""
    every, model = tasks(kind, seed), initialised(lambda: network(KINDS[kind]), seed)
    generator = torch.Generator().manual_seed(seed)
    if method == JOINT:
        together = tuple(torch.cat(column) for column in zip(*(part.train for part in every), strict=True))
        learn(model, together, seed, None, N_TASKS * STEPS)  # type: ignore[arg-type]
        after = [[accuracy(model, part.test) for part in every]]
    else:
        after, posterior, memory = [], None, list[Data]()
        for number, part in enumerate(every):
            added = None
            if number and method == REPLAY:
                inputs, labels = (torch.cat(column) for column in zip(*memory, strict=True))

                def added(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
                    batch = torch.randint(len(labels), (BATCH,), generator=generator)
                    return strength * F.cross_entropy(model(inputs[batch]), labels[batch])
            elif number and method != FINE_TUNED:
                added = quadratic(model, posterior, strength, len(part.train[1]))
            learn(model, part.train, 100 * seed + number, added)
            if method in POSTERIORS and number < N_TASKS - 1:
                posterior = added_to(posterior, model, part.train, method, seed)
            chosen = torch.randperm(len(part.train[1]), generator=generator)[:BUDGET]
            memory.append((part.train[0][chosen], part.train[1][chosen]))
            after.append([accuracy(model, earlier.test) for earlier in every[: number + 1]])
    return {"test": after, "validation": [accuracy(model, part.validation) for part in every]}


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every method at every strength, and at the one that validation data of all tasks choose for each seed."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        for method in options.methods:
            swept = STRENGTHS[method][: options.strengths]
            made_from = {"kind": kind, "seed": seed, "method": method, "strengths": list(swept)}
            name = f"{kind}.{method.replace(', ', '-').replace(' ', '-')}.{seed}.{len(swept)}.json"
            record = read_record(options.out / "continual" / name, made_from)
            if record is None:
                print(f"{kind}, seed {seed}: {method}", file=sys.stderr, flush=True)
                record = made_from | {"runs": [learned(kind, seed, method, strength) for strength in swept]}
                write_record(options.out / "continual" / name, record)
            runs.setdefault(method, []).append(record)
    chosen = {method: [best(record) for record in records] for method, records in runs.items()}
    final = {method: [final_accuracy(run) for run, _ in of] for method, of in chosen.items()}
    return {
        "seeds": options.seeds,
        "methods": {
            method: {
                "accuracy": paired(final[method]), "strengths": [strength for _, strength in of],
                "forgetting": None if method == JOINT else paired([forgetting(run) for run, _ in of]),
                "minus": {
                    second: paired([a - b for a, b in zip(final[method], final[second], strict=True)])
                    for second in (FINE_TUNED, L2, SINGLE) if second != method and second in final
                },
                "sweep": [
                    float(np.mean([final_accuracy(record["runs"][i]) for record in runs[method]]))
                    for i in range(len(runs[method][0]["strengths"]))
                ],
            }
            for method, of in chosen.items()
        },
    }  # fmt: skip


def best(record: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The run with the largest mean accuracy on the validation data of all tasks, and its strength."""
    means = [float(np.mean(run["validation"])) for run in record["runs"]]
    place = int(np.argmax(means))
    return record["runs"][place], record["strengths"][place]


def final_accuracy(run: Mapping[str, Any]) -> float:
    """Mean over the tasks, after the last."""
    return float(np.mean(run["test"][-1]))


def forgetting(run: Mapping[str, Any]) -> float:
    """How much less is known of a task after the last one than right after it; mean over all but the last."""
    return float(np.mean([run["test"][task][task] - run["test"][-1][task] for task in range(len(run["test"]) - 1)]))


def table(record: Mapping[str, Any]) -> str:
    """A row for each kind of tasks and method."""
    rows = []
    for kind, of in record.items():
        for method, found in of["methods"].items():
            cells = [kind, method, plus_minus(found["accuracy"], 1, scale=100)]
            cells.append("" if found["forgetting"] is None else plus_minus(found["forgetting"], 1, scale=100))
            cells += [
                with_interval(found["minus"][second], 1, scale=100) if second in found["minus"] else ""
                for second in (FINE_TUNED, L2, SINGLE)
            ]
            rows.append([*cells, ", ".join(f"{value:g}" for value in sorted(set(found["strengths"])))])
    minus = [f"minus {of}" for of in (FINE_TUNED, L2, SINGLE)]
    return markdown(["tasks", "method", "accuracy %", "forgetting", *minus, "strength"], rows)


def parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated part of the page, from the record."""
    return {"continual": table({kind: record[kind] for kind in KINDS if kind in record})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=tuple(STRENGTHS), default=list(STRENGTHS))
    parser.add_argument("--strengths", type=int, default=None, help="of each method the first so many; all by default")
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    path = options.docs / "records" / "continual.json"
    for kind in options.kinds:
        record = read_json(path) if path.exists() else {}
        write_json(
            path, record | {"environment": environment(torch.device("cpu")), kind: rounded(measure(kind, options))}
        )
    fill(options.docs / "beyond.md", parts(read_json(path)))


if __name__ == "__main__":
    main()
