"""What a second batch does for steps: a noisy quadratic, conjugate gradients on a trained network, training.

    python eval/steps.py --noisy-quadratic [--runs 100]
    python eval/steps.py --figure5 [--network digits-cnn] [--batch 128] [--draws 5] [--data-dir <folder>]
    python eval/steps.py --directional [--network digits-cnn] [--batch 128] [--draws 5]
    python eval/steps.py --training [--network digits-cnn] [--epochs 20] [--draws 3]
    python eval/steps.py --document [--docs docs]
    python eval/steps.py --all --data-dir <folder>

Every part writes a JSON record and a figure into ``--out``; ``--document`` fills ``docs/steps.md`` from them, and
``--all`` does everything that is in it. Two batches always share the number of data that one batch has. The noisy
quadratic is in ``steps_quadratic.py``, the tables are in ``steps_document.py``; conjugate gradients are those of figure
5 of arXiv 2410.14325, whose network and data are larger. The experiments on networks stay in one file: they share
batches, evaluation and options.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from documents import save_run
from fidelity import PROBLEMS, Problem
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from steps_document import document
from steps_quadratic import noisy_quadratic
from torch import Tensor, nn

from debiased_laplace.evaluation import Context, Task
from debiased_laplace.evaluation.report.drawing import STYLES
from debiased_laplace.quadratic.optim import (
    DebiasedNewtonCG,
    conjugate_gradients,
    damped_step,
    directionally_damped_step,
    second_batch_damped_step,
)
from debiased_laplace.quadratic.quadratic import Quadratic

Batch = tuple[Tensor, Tensor]
Numbers = dict[str, float]


# -- networks and data -------------------------------------------------------------------------------


def of_task(source: str | Path) -> Callable[[Path, Path | None], Problem]:
    """The network and the data of a task file or a shipped task."""

    def load(cache: Path, folder: Path | None) -> Problem:
        task, context = Task.load(source), Context(data_dir=folder, cache=cache)
        train, validation, test = (
            tuple(torch.cat(parts) for parts in zip(*task.call(f"{part}_loader", context), strict=True))
            for part in ("train", "val", "test")
        )
        return Problem(task.model(context), train, validation, test, task.n_data or len(train[0]))

    return load


#: Those of the fidelity experiment, and networks that were trained to the end.
NETWORKS = {
    **PROBLEMS,
    "lenet-trained": of_task("fashion-mnist"),
    "all-cnn-c": of_task(Path(__file__).with_name("all_cnn_c.py")),
}


# -- conjugate gradients on a trained network --------------------------------------------------------


def batches(problem: Problem, size: int, draws: int) -> Iterator[tuple[Batch, Batch, Batch]]:
    """A batch drawn at random from the training data, and its halves."""
    inputs, labels = problem.pool
    if size > len(inputs) or size % 2:
        raise SystemExit(f"Expected an even --batch of at most {len(inputs)}, got {size}.")
    for seed in range(draws):
        index = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:size]
        whole = inputs[index], labels[index]
        yield whole, (whole[0][: size // 2], whole[1][: size // 2]), (whole[0][size // 2 :], whole[1][size // 2 :])


@torch.no_grad()
def scores(model: nn.Module, data: Batch) -> tuple[float, float]:
    """Mean loss and accuracy."""
    outputs = torch.cat([model(part) for part in data[0].split(1000)])
    return float(F.cross_entropy(outputs, data[1])), float((outputs.argmax(-1) == data[1]).float().mean())


def along(model: nn.Module, points: Tensor, sets: dict[str, Batch]) -> dict[str, dict[str, list[float]]]:
    """Loss and accuracy at every point ``[K, D]`` on every set."""
    moved = copy.deepcopy(model).eval()
    curves: dict[str, dict[str, list[float]]] = {name: {"loss": [], "accuracy": []} for name in sets}
    for point in points:
        nn.utils.vector_to_parameters(point.float(), moved.parameters())
        for name, data in sets.items():
            loss, accuracy = scores(moved, data)
            curves[name]["loss"].append(loss)
            curves[name]["accuracy"].append(accuracy)
    return curves


def some(data: Any, n: int) -> Batch:
    """At most n data, at random, always the same."""
    index = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(12345))[:n]
    return data[0][index], data[1][index]


def figure5(options: argparse.Namespace) -> None:
    problem = NETWORKS[options.network](options.cache, options.data_dir)
    held = (torch.cat(parts) for parts in zip(problem.validation, problem.test, strict=True))  # nothing is tuned
    sets = {name: some(part, options.evaluate) for name, part in {"train": problem.pool, "test": tuple(held)}.items()}
    runs: dict[str, list[Any]] = {"single": [], "debiased": []}
    for whole, first, second in batches(problem, options.batch, options.draws):
        for name, used in (("single", (whole,)), ("debiased", (first, second))):
            start = time.perf_counter()
            quadratics = [Quadratic(problem.model, part, "classification", l2=options.l2) for part in used]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # the reason is in the record
                result = conjugate_gradients(
                    *quadratics, n_steps=options.iterations, damping=options.damping, tolerance=0.0
                )
            seconds = time.perf_counter() - start
            run = along(problem.model, quadratics[0].center + result.path, sets)
            runs[name].append(
                run | {"stopped": result.stopped.value, "seconds": seconds, "step_sizes": result.step_sizes.tolist(),
                       "first_step_sizes": result.first_step_sizes.tolist()}
            )  # fmt: skip
    summary = {name: summarise(of_method) for name, of_method in runs.items()}
    record = {
        "network": options.network, "batch": options.batch, "damping": options.damping, "l2": options.l2,
        "iterations": options.iterations, "n_train": len(sets["train"][0]), "n_test": len(sets["test"][0]),
        "summary": summary, "runs": runs,
    }  # fmt: skip
    save_run(options.out, f"figure5-{options.network}-{options.batch}", record, draw_figure5(runs, options))
    for name, numbers in summary.items():
        print(f"{name:>9}: " + "; ".join(f"{key} {format_numbers(value)}" for key, value in numbers.items()))


def summarise(runs: list[Any]) -> dict[str, Any]:
    """At the start, at the best iteration and at the end, one number for each draw."""
    summary: dict[str, Any] = {}
    for part in ("train", "test"):
        losses = [run[part]["loss"] for run in runs]
        summary |= {
            f"{part} loss at the start": losses[0][0],
            f"{part} loss, best": [min(path) for path in losses],
            f"{part} loss, last": [path[-1] for path in losses],
            f"{part} accuracy, last": [run[part]["accuracy"][-1] for run in runs],
        }
    return summary | {"stopped after": [len(run["train"]["loss"]) - 1 for run in runs]}


def format_numbers(value: Any) -> str:
    return " ".join(f"{x:.4g}" for x in value) if isinstance(value, list) else f"{value:.4g}"


def draw_figure5(runs: dict[str, list[Any]], options: argparse.Namespace) -> Figure:
    figure = Figure((10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    half = options.batch // 2
    for name, label, (color, marker, dashes) in (
        ("single", f"one batch of {options.batch}", STYLES[1]),
        ("debiased", f"two batches of {half}", STYLES[2]),
    ):
        for row, measure in enumerate(("loss", "accuracy")):
            for column, part in enumerate(("train", "test")):
                for index, run in enumerate(runs[name]):
                    values = np.array(run[part][measure])
                    best = int(values.argmin() if measure == "loss" else values.argmax())
                    axes: Axes = panels[row, column]
                    axes.plot(values, color=color, linestyle=dashes, label=label if index == 0 else None)
                    axes.plot(best, values[best], marker=marker, color=color, markeredgecolor="white")
                    axes.set(title=f"{part} {measure}", yscale="log" if measure == "loss" else "linear")
    panels[0, 0].legend()
    for axes in panels[1]:
        axes.set_xlabel("CG iteration")
    figure.suptitle(f"Conjugate gradients, damping {options.damping:g}: {options.network}")
    return figure


# -- one damped step on a trained network ------------------------------------------------------------


def directional(options: argparse.Namespace) -> None:
    """What one step along the top eigenvectors of a batch takes off the loss of all training data."""
    problem = NETWORKS[options.network](options.cache, options.data_dir)
    everything = Quadratic(problem.model, problem.pool, "classification", l2=options.l2, chunk_size=1000)
    start = along(problem.model, everything.center[None], {"test": problem.test})["test"]["loss"][0]
    runs_by_method: dict[str, list[Numbers]] = {}
    for draw, (whole, first, second) in enumerate(batches(problem, options.batch, options.draws)):
        one, a, b = (Quadratic(problem.model, part, "classification", l2=options.l2) for part in (whole, first, second))
        rows, half_rows = one.eigenpairs(options.directions)[1], a.eigenpairs(options.directions)[1]
        every, seen, other = one.per_datum(rows), a.per_datum(half_rows), b.per_datum(half_rows)
        steps = {
            "one batch, no damping": damped_step(every).lift(rows),
            "one batch, bootstrap": directionally_damped_step(every, generator=draw).lift(rows),
            "half, damped by the second": second_batch_damped_step(seen, other).lift(half_rows),
            "directions of half, Newton of the second": damped_step(other).lift(half_rows),
        }
        for name, step in steps.items():
            point = everything.center + step
            test, accuracy = (along(problem.model, point[None], {"test": problem.test})["test"][k][0]
                              for k in ("loss", "accuracy"))  # fmt: skip
            runs_by_method.setdefault(name, []).append(
                {"quadratic": float(everything.value(point)) - everything.loss,
                 "train": float(everything.true_loss(point)) - everything.loss, "test loss": test,
                 "test accuracy": accuracy, "length": float(step.norm())}
            )  # fmt: skip
    record = {
        "network": options.network, "batch": options.batch, "directions": options.directions, "l2": options.l2,
        "train loss at the start": everything.loss, "test loss at the start": start, "steps": runs_by_method,
    }  # fmt: skip
    figure = Figure((8, 4), layout="constrained")
    axes = figure.add_subplot()
    for index, ((name, runs), (color, marker, _)) in enumerate(zip(runs_by_method.items(), STYLES[1:], strict=False)):
        axes.plot([run["train"] for run in runs], [index] * len(runs), marker, color=color, label=name)
    axes.axvline(0, color="0.6", linewidth=1)
    axes.set_xscale("symlog", linthresh=max(everything.loss, 1e-8))
    axes.set_yticks(range(len(runs_by_method)), list(runs_by_method))
    axes.set(xlabel="change of the training loss", title=f"One step along {options.directions} eigenvectors")
    save_run(options.out, f"directional-{options.network}-{options.batch}", record, figure)
    print(f"train loss at the start {everything.loss:.4g}, test {start:.4g}")
    for name, runs in runs_by_method.items():
        print(f"{name:>42}: " + "; ".join(f"{key} {format_numbers([x[key] for x in runs])}" for key in runs[0]))


# -- training ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainer:
    """A method, the settings among which it is tuned, and its data for each step."""

    build: Callable[..., torch.optim.Optimizer]
    settings: tuple[Numbers, ...]
    batch: int


def trainers(l2: float, n_steps: int) -> dict[str, Trainer]:
    def newton(debiased: bool) -> Trainer:
        settings = tuple({"lr": lr, "damping": d} for lr in (1.0, 0.3) for d in (0.1, 0.3, 1.0))
        common: dict[str, Any] = {"n_steps": n_steps, "debiased": debiased, "l2": l2}
        return Trainer(lambda m, **setting: DebiasedNewtonCG(m, "classification", **setting, **common), settings, 256)

    def rates(*values: float) -> tuple[Numbers, ...]:
        return tuple({"lr": lr} for lr in values)

    return {
        "SGD": Trainer(
            lambda m, lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9, weight_decay=l2),
            rates(0.01, 0.03, 0.1, 0.3), 64,
        ),
        "AdamW": Trainer(
            lambda m, lr: torch.optim.AdamW(m.parameters(), lr, weight_decay=l2), rates(1e-3, 3e-3, 1e-2, 3e-2), 64
        ),
        "Newton-CG, one batch": newton(False),
        "Newton-CG, debiased": newton(True),
    }  # fmt: skip


def train(
    model: nn.Module, trainer: Trainer, setting: Numbers, problem: Problem, seed: int, samples: float, seconds: float
) -> list[Numbers]:
    """Train until so many data have been seen or so much of a processor's time is spent; the losses on the way."""
    optimizer = trainer.build(model, **setting)
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = problem.pool
    curve: list[Numbers] = []
    seen, spent, due = 0, 0.0, 0.0
    order = torch.empty(0, dtype=torch.int64)
    size = min(trainer.batch, len(inputs))
    while True:
        share = max(seen / samples, spent / seconds)
        if share >= due:
            model.eval()
            train_loss, validation = scores(model, problem.pool)[0], scores(model, problem.validation)[0]
            test_loss, accuracy = scores(model, problem.test)
            curve.append({"samples": seen, "seconds": spent, "train loss": train_loss, "validation loss": validation,
                          "test loss": test_loss, "test accuracy": accuracy})  # fmt: skip
            due = min(share + 0.05, 1.0) if share < 1 else math.inf
            model.train()
            if share >= 1 or not math.isfinite(train_loss):
                return curve
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
        index, order = order[:size], order[size:]
        batch = inputs[index], labels[index]
        start = time.process_time()
        try:
            if isinstance(optimizer, DebiasedNewtonCG):
                optimizer.step(batch)
            else:
                optimizer.zero_grad()
                F.cross_entropy(model(batch[0]), batch[1]).backward()
                optimizer.step()
        except ValueError as error:  # a loss that is not finite
            curve.append(curve[-1] | {key: math.inf for key in curve[-1] if "loss" in key} | {"test accuracy": 0.0})
            print(f"diverged: {error}")
            return curve
        spent, seen = spent + time.process_time() - start, seen + size


def fresh(problem: Problem, seed: int) -> nn.Module:
    """The network of a problem before training."""
    model = copy.deepcopy(problem.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model


def training(options: argparse.Namespace) -> None:
    problem = NETWORKS[options.network](options.cache, options.data_dir)
    methods = trainers(options.l2, options.cg_steps)
    samples = float(options.epochs * len(problem.pool[0]))
    warnings.simplefilter("ignore", RuntimeWarning)
    record: dict[str, Any] = {
        "network": options.network, "l2": options.l2, "epochs": options.epochs, "cg_steps": options.cg_steps,
        "seeds": options.draws, "budgets": {},
    }  # fmt: skip
    seconds = options.seconds
    if seconds is None and "samples" not in options.budgets:
        raise SystemExit("Expected --seconds, or equal samples as well, whose debiased method says how many.")
    for budget in options.budgets:
        if budget == "seconds" and seconds is None:  # what the debiased method took at equal samples
            curves = record["budgets"]["samples"]["Newton-CG, debiased"]["curves"]
            seconds = float(np.median([curve[-1]["seconds"] for curve in curves]))
        limits = (samples, math.inf) if budget == "samples" else (math.inf, float(seconds))
        of_methods: dict[str, Any] = {}
        for name, trainer in methods.items():
            tuned = []
            for setting in trainer.settings:  # on other seeds
                ends = [
                    train(fresh(problem, seed), trainer, setting, problem, seed, *limits)[-1]
                    for seed in range(100, 100 + options.tuning_seeds)
                ]
                worst = max(end["validation loss"] for end in ends)
                tuned.append(worst if math.isfinite(worst) else math.inf)
            best = trainer.settings[int(np.argmin(tuned))]
            curves = [train(fresh(problem, seed), trainer, best, problem, seed, *limits)
                      for seed in range(options.draws)]  # fmt: skip
            of_methods[name] = {
                "setting": best, "batch": trainer.batch, "curves": curves,
                "tuning": [dict(setting, worst=worst) for setting, worst in zip(trainer.settings, tuned, strict=True)],
            }  # fmt: skip
            last = {key: [curve[-1][key] for curve in curves] for key in curves[0][-1]}
            print(f"equal {budget}: {name:>21} ({best}): "
                  + "; ".join(f"{key} {format_numbers(value)}" for key, value in last.items()))  # fmt: skip
        record["budgets"][budget] = of_methods
    name = "-".join(["training", options.network, *(options.budgets if len(options.budgets) == 1 else ())])
    save_run(options.out, name, record, draw_training(record))


def draw_training(record: dict[str, Any]) -> Figure:
    figure = Figure((10, 7), layout="constrained")
    panels = figure.subplots(2, len(record["budgets"]), squeeze=False)
    for column, (budget, methods) in enumerate(record["budgets"].items()):
        for (name, method), (color, _, dashes) in zip(methods.items(), STYLES, strict=False):
            for row, key in enumerate(("train loss", "test loss")):
                for index, curve in enumerate(method["curves"]):
                    panels[row, column].plot(
                        [p[budget] for p in curve], [p[key] for p in curve], color=color, linestyle=dashes,
                        label=name if index == 0 else None,
                    )  # fmt: skip
                panels[row, column].set(yscale="log", xlabel=budget, ylabel=key)
                panels[row, column].set_ylim(top=5)  # a training that diverges leaves the picture
    panels[0, 0].legend()
    figure.suptitle(f"Training at equal {' and at equal '.join(record['budgets'])}: {record['network']}")
    return figure


#: What the document is made of.
RUNS = (
    "--noisy-quadratic",
    "--figure5 --network digits-cnn --batch 128",
    "--figure5 --network lenet-trained --batch 256",
    "--figure5 --network lenet-trained --batch 1024",
    "--directional --network digits-cnn --batch 128",
    "--directional --network lenet-trained --batch 256",
    "--training --network digits-cnn --draws 3",
    "--training --network lenet --draws 3 --epochs 5 --tuning-seeds 1 --budgets samples",
    "--training --network lenet --draws 3 --seconds 15 --budgets seconds",
)
#: Of each of them in a quick run.
LITTLE = "--runs 3 --draws 1 --iterations 5 --epochs 1 --tuning-seeds 1 --evaluate 200"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = {
        "noisy_quadratic": noisy_quadratic, "figure5": figure5, "directional": directional, "training": training,
        "document": document,
    }  # fmt: skip
    for name in modes:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    parser.add_argument("--all", action="store_true", help="everything in the document, and the document")
    parser.add_argument("--quick", action="store_true", help="of everything the parts on digits, a little, no document")
    parser.add_argument("--runs", type=int, default=100, help="of the noisy quadratic")
    parser.add_argument("--network", choices=list(NETWORKS), default="digits-cnn")
    parser.add_argument("--batch", type=int, default=128, help="data of the one batch, or of two halves")
    parser.add_argument("--draws", type=int, default=5, help="batches, or seeds of training")
    parser.add_argument("--iterations", type=int, default=30, help="of conjugate gradients in figure 5")
    parser.add_argument("--damping", type=float, default=0.0, help="in figure 5")
    parser.add_argument("--evaluate", type=int, default=2000, help="most data on which figure 5 is judged, of each set")
    parser.add_argument("--budgets", nargs="+", choices=["samples", "seconds"], default=["samples", "seconds"])
    parser.add_argument("--tuning-seeds", type=int, default=2, help="of every setting in training")
    parser.add_argument("--directions", type=int, default=20, help="of the directionally damped step")
    parser.add_argument("--l2", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--cg-steps", type=int, default=10, help="for each step of training")
    parser.add_argument("--seconds", type=float, default=None, help="of training; by default the debiased method's")
    parser.add_argument("--data-dir", type=Path, default=None, help="folder with FashionMNIST/raw and cifar10")
    parser.add_argument("--out", type=Path, default=Path("eval/results/steps"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--cache", type=Path, default=Path("eval/results/cache"))
    options = parser.parse_args(arguments)
    if options.all:
        shared = ["--out", str(options.out), "--cache", str(options.cache), "--docs", str(options.docs)]
        shared += [] if options.data_dir is None else ["--data-dir", str(options.data_dir)]
        quick = [f"{run} {LITTLE}" for run in RUNS if "lenet" not in run]
        for run in quick if options.quick else (*RUNS, "--document"):
            main([*run.split(), *shared])
        return
    chosen = [run for name, run in modes.items() if getattr(options, name)]
    if not chosen:
        parser.error("Expected at least one of --noisy-quadratic, --figure5, --directional, --training and --document.")
    for run in chosen:
        run(options)


if __name__ == "__main__":
    main()
