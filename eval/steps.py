"""What a second batch does for steps: a noisy quadratic, conjugate gradients on a trained network, training.

    python eval/steps.py --noisy-quadratic [--runs 100]
    python eval/steps.py --figure5 [--network digits-cnn] [--batch 128] [--draws 5] [--data-dir <folder>]
    python eval/steps.py --directional [--network digits-cnn] [--batch 128] [--draws 5]
    python eval/steps.py --training [--network digits-cnn] [--epochs 20] [--draws 3]
    python eval/steps.py --document [--docs docs]
    python eval/steps.py --all --data-dir <folder>

Every part writes a JSON record and a figure into ``--out``; ``--document`` fills ``docs/steps.md`` from them, and
``--all`` does everything that is in it. Two batches always share the number of data that one batch has. The noisy
quadratic is that of ViViT (arXiv 2106.02624, figure 3); conjugate gradients are those of figure 5 of arXiv 2410.14325,
whose network and data are larger.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from documents import fill, markdown, save_small
from fidelity import PROBLEMS, Problem, write
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from debiased_laplace.evaluation import Context, Task
from debiased_laplace.evaluation.figures import STYLES
from debiased_laplace.evaluation.records import write_json
from debiased_laplace.quadratic.optim import (
    DebiasedNewtonCG,
    conjugate_gradients,
    damped_step,
    directionally_damped_step,
    second_batch_damped_step,
)
from debiased_laplace.quadratic.quadratic import Quadratic
from debiased_laplace.quadratic.spectrum import DirectionalDerivatives

Batch = tuple[Tensor, Tensor]
Numbers = dict[str, float]


# -- networks and data -------------------------------------------------------------------------------


def of_task(name: str) -> Callable[[Path, Path | None], Problem]:
    """The network and the data of a shipped task."""

    def load(cache: Path, folder: Path | None) -> Problem:
        task, context = Task.load(name), Context(data_dir=folder, cache=cache)
        train, validation, test = (
            tuple(torch.cat(parts) for parts in zip(*task.call(f"{part}_loader", context), strict=True))
            for part in ("train", "val", "test")
        )
        return Problem(task.model(context), train, validation, test, task.n_data or len(train[0]))

    return load


#: Those of the fidelity experiment, and networks that were trained to the end.
NETWORKS = {**PROBLEMS, "lenet-trained": of_task("fashion-mnist"), "all-cnn-c": of_task("cifar10-all-cnn-c")}


# -- a noisy quadratic -----------------------------------------------------------------------------


@dataclass(frozen=True)
class NoisyQuadratic:
    r"""Half of :math:`\theta^\top G \theta` with G_ii = i^2, seen along the axes through noise of constant variance.

    Slopes of a datum are normal, curvatures are gamma distributed, so that they are positive; both are unbiased. The
    noise, the number of data and that of steps are not in the paper's text; they are those of its published experiment.
    """

    dimensions: int = 20
    start: float = 100.0
    n_data: int = 128
    n_steps: int = 20
    slope_variance: float = 5000.0
    curvature_variance: float = 50.0

    @property
    def curvatures(self) -> Tensor:
        """The diagonal of G."""
        return torch.arange(1, self.dimensions + 1).double().square()

    def loss(self, points: Tensor) -> Tensor:
        """Without noise, ``[..., D] -> [...]``."""
        return 0.5 * (points.square() * self.curvatures).sum(-1)

    def observe(self, point: Tensor, n: int, generator: np.random.Generator) -> DirectionalDerivatives:
        """Slopes and curvatures of n data."""
        mean = self.curvatures.numpy()
        slopes = generator.normal((self.curvatures * point).numpy(), self.slope_variance**0.5, (n, self.dimensions))
        gamma = generator.gamma(mean**2 / self.curvature_variance, self.curvature_variance / mean, (n, len(mean)))
        weights = torch.full((n,), 1 / n, dtype=torch.float64)
        return DirectionalDerivatives(torch.from_numpy(slopes), torch.from_numpy(gamma), weights)


GRID = torch.logspace(-4, 2, 200).double()
Step = Callable[[DirectionalDerivatives, DirectionalDerivatives, DirectionalDerivatives, int], tuple[Tensor, Tensor]]


def quadratic_methods() -> dict[str, Step]:
    """From all the data, and their two halves, to a step and its dampings."""

    def damped(step: Any) -> tuple[Tensor, Tensor]:
        return step.coefficients, step.dampings

    def bootstrap(every: DirectionalDerivatives, _a: Any, _b: Any, seed: int) -> tuple[Tensor, Tensor]:
        return damped(directionally_damped_step(every, grid=GRID, n_resamples=100, level=0.05, generator=seed))

    methods: dict[str, Step] = {
        "SGD": lambda every, _a, _b, _: (-1e-3 * every.slope, torch.full_like(every.slope, torch.nan)),
        "bootstrap": bootstrap,
        "second batch": lambda _, a, b, __: damped(second_batch_damped_step(a, b, grid=GRID)),
    }
    for exponent in range(-4, 3):
        methods[f"constant 1e{exponent}"] = lambda every, _a, _b, _, e=exponent: damped(damped_step(every, 10.0**e))  # type: ignore[misc]
    return methods


def noisy_quadratic(options: argparse.Namespace) -> None:
    problem, methods = NoisyQuadratic(), quadratic_methods()
    losses = {name: np.zeros((options.runs, problem.n_steps + 1)) for name in methods}
    distances = {name: np.zeros(options.runs) for name in methods}
    relative: dict[str, list[list[float]]] = {name: [] for name in ("bootstrap", "second batch")}
    for name, method in methods.items():
        for run in range(options.runs):
            generator = np.random.default_rng(run)  # the same noise for all methods
            point = torch.full((problem.dimensions,), problem.start, dtype=torch.float64)
            for step in range(problem.n_steps):
                losses[name][run, step] = float(problem.loss(point))
                every = problem.observe(point, problem.n_data, generator)
                move, dampings = method(every, *parts(every), 1000 * run + step)
                if run == 0 and name in relative:
                    relative[name].append((dampings / problem.curvatures).tolist())
                point = point + move
            losses[name][run, -1] = float(problem.loss(point))
            distances[name][run] = float(point.norm())
    quantiles = {
        name: dict(zip(("min", "q25", "median", "q75", "max"),
                       np.quantile(own, (0, 0.25, 0.5, 0.75, 1)).tolist(), strict=True))
        for name, own in distances.items()
    }  # fmt: skip
    record = {
        "problem": asdict(problem), "runs": options.runs, "grid": "logspace(-4, 2, 200)", "resamples": 100,
        "level": 0.05, "sgd_learning_rate": 1e-3, "final_distance": quantiles,
        "final_loss": {name: {"mean": float(own[:, -1].mean()), "median": float(np.median(own[:, -1]))}
                       for name, own in losses.items()},
        "all_final_distances": {name: own.tolist() for name, own in distances.items()},
        "median_loss": {name: np.median(own, 0).tolist() for name, own in losses.items()},
        "relative_dampings_of_the_first_run": {
            name: [[x if math.isfinite(x) else None for x in row] for row in own] for name, own in relative.items()
        },
        "smallest_median_final_distance": min(quantiles, key=lambda name: quantiles[name]["median"]),
    }  # fmt: skip
    save(options.out, "noisy-quadratic", record, draw_quadratic(losses, distances, relative["bootstrap"]))
    for name, own in sorted(quantiles.items(), key=lambda item: item[1]["median"]):
        print(f"{name:>15}  final distance: median {own['median']:9.3f}  quartiles {own['q25']:9.3f} {own['q75']:9.3f}"
              f"  max {own['max']:11.3f}   mean loss {record['final_loss'][name]['mean']:.3g}")  # type: ignore[index] # fmt: skip


def parts(every: DirectionalDerivatives) -> tuple[DirectionalDerivatives, DirectionalDerivatives]:
    """The two halves of the data, each with weights of its own."""
    n = len(every.slopes) // 2
    halves = []
    for part in (slice(0, n), slice(n, None)):
        slopes, curvatures = every.slopes[part], every.curvatures[part]
        halves.append(DirectionalDerivatives(slopes, curvatures, torch.full((len(slopes),), 1 / len(slopes)).double()))
    return halves[0], halves[1]


def draw_quadratic(losses: dict[str, np.ndarray], distances: dict[str, np.ndarray], relative: Any) -> Figure:
    figure = Figure((13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for (name, own), (color, _, dashes) in zip(losses.items(), STYLES, strict=False):
        low, median, high = np.quantile(own, (0.25, 0.5, 0.75), axis=0)
        left.plot(median, color=color, linestyle=dashes, label=name, linewidth=2.2 if "1e" not in name else 1.1)
        if "1e" not in name:
            left.fill_between(range(len(median)), low, high, color=color, alpha=0.15, linewidth=0)
    left.set(yscale="log", xlabel="step", ylabel="loss: median, quartiles")
    left.legend(fontsize=7, ncols=2)
    box = middle.boxplot(list(distances.values()), whis=(0, 100), tick_labels=list(distances), patch_artist=True)
    for patch, median, (color, *_) in zip(box["boxes"], box["medians"], STYLES, strict=False):
        patch.set(facecolor=color, alpha=0.4)
        median.set(color="black")
    middle.set(yscale="log", ylabel="final distance to the minimum")
    middle.tick_params("x", rotation=75)
    table = np.array(relative)
    table[~np.isfinite(table)] = 1e3  # no step at all, drawn at the top
    shades = matplotlib.colormaps["cividis_r"](np.linspace(0.1, 1, table.shape[1]))
    for k in range(table.shape[1]):
        right.plot(table[:, k], color=shades[k], linewidth=1)
    right.set(
        yscale="log",
        xlabel="step",
        ylabel="damping over true curvature",
        title="bootstrap; dark: more curved; top: no step",
    )
    return figure


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
    found: dict[str, dict[str, list[float]]] = {name: {"loss": [], "accuracy": []} for name in sets}
    for point in points:
        nn.utils.vector_to_parameters(point.float(), moved.parameters())
        for name, data in sets.items():
            loss, accuracy = scores(moved, data)
            found[name]["loss"].append(loss)
            found[name]["accuracy"].append(accuracy)
    return found


def some(data: Any, n: int) -> Batch:
    """At most n data, at random, always the same."""
    index = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(12345))[:n]
    return data[0][index], data[1][index]


def figure5(options: argparse.Namespace) -> None:
    problem = NETWORKS[options.network](options.cache, options.data_dir)
    held = (torch.cat(parts) for parts in zip(problem.validation, problem.test, strict=True))  # nothing is tuned
    sets = {name: some(own, options.evaluate) for name, own in {"train": problem.pool, "test": tuple(held)}.items()}
    runs: dict[str, list[Any]] = {"single": [], "debiased": []}
    for whole, first, second in batches(problem, options.batch, options.draws):
        for name, used in (("single", (whole,)), ("debiased", (first, second))):
            start = time.perf_counter()
            quadratics = [Quadratic(problem.model, own, "classification", l2=options.l2) for own in used]
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
    summary = {name: summarise(own) for name, own in runs.items()}
    record = {
        "network": options.network, "batch": options.batch, "damping": options.damping, "l2": options.l2,
        "iterations": options.iterations, "n_train": len(sets["train"][0]), "n_test": len(sets["test"][0]),
        "summary": summary, "runs": runs,
    }  # fmt: skip
    save(options.out, f"figure5-{options.network}-{options.batch}", record, draw_figure5(runs, options))
    for name, own in summary.items():
        print(f"{name:>9}: " + "; ".join(f"{key} {format_numbers(value)}" for key, value in own.items()))


def summarise(runs: list[Any]) -> dict[str, Any]:
    """At the start, at the best iteration and at the end, one number for each draw."""
    found: dict[str, Any] = {}
    for part in ("train", "test"):
        losses = [run[part]["loss"] for run in runs]
        found |= {
            f"{part} loss at the start": losses[0][0],
            f"{part} loss, best": [min(own) for own in losses],
            f"{part} loss, last": [own[-1] for own in losses],
            f"{part} accuracy, last": [run[part]["accuracy"][-1] for run in runs],
        }
    return found | {"stopped after": [len(run["train"]["loss"]) - 1 for run in runs]}


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
    found: dict[str, list[Numbers]] = {}
    for draw, (whole, first, second) in enumerate(batches(problem, options.batch, options.draws)):
        one, a, b = (Quadratic(problem.model, own, "classification", l2=options.l2) for own in (whole, first, second))
        rows, own_rows = one.eigenpairs(options.directions)[1], a.eigenpairs(options.directions)[1]
        every, seen, other = one.per_datum(rows), a.per_datum(own_rows), b.per_datum(own_rows)
        steps = {
            "one batch, no damping": damped_step(every).lift(rows),
            "one batch, bootstrap": directionally_damped_step(every, generator=draw).lift(rows),
            "half, damped by the second": second_batch_damped_step(seen, other).lift(own_rows),
            "directions of half, Newton of the second": damped_step(other).lift(own_rows),
        }
        for name, step in steps.items():
            point = everything.center + step
            test, accuracy = (along(problem.model, point[None], {"test": problem.test})["test"][k][0]
                              for k in ("loss", "accuracy"))  # fmt: skip
            found.setdefault(name, []).append(
                {"quadratic": float(everything.value(point)) - everything.loss,
                 "train": float(everything.true_loss(point)) - everything.loss, "test loss": test,
                 "test accuracy": accuracy, "length": float(step.norm())}
            )  # fmt: skip
    record = {
        "network": options.network, "batch": options.batch, "directions": options.directions, "l2": options.l2,
        "train loss at the start": everything.loss, "test loss at the start": start, "steps": found,
    }  # fmt: skip
    figure = Figure((8, 4), layout="constrained")
    axes = figure.add_subplot()
    for index, ((name, own), (color, marker, _)) in enumerate(zip(found.items(), STYLES[1:], strict=False)):
        axes.plot([run["train"] for run in own], [index] * len(own), marker, color=color, label=name)
    axes.axvline(0, color="0.6", linewidth=1)
    axes.set_xscale("symlog", linthresh=max(everything.loss, 1e-8))
    axes.set_yticks(range(len(found)), list(found))
    axes.set(xlabel="change of the training loss", title=f"One step along {options.directions} eigenvectors")
    save(options.out, f"directional-{options.network}-{options.batch}", record, figure)
    print(f"train loss at the start {everything.loss:.4g}, test {start:.4g}")
    for name, own in found.items():
        print(f"{name:>42}: " + "; ".join(f"{key} {format_numbers([x[key] for x in own])}" for key in own[0]))


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

    def rates(*found: float) -> tuple[Numbers, ...]:
        return tuple({"lr": lr} for lr in found)

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
            own = record["budgets"]["samples"]["Newton-CG, debiased"]["curves"]
            seconds = float(np.median([curve[-1]["seconds"] for curve in own]))
        limits = (samples, math.inf) if budget == "samples" else (math.inf, float(seconds))
        found: dict[str, Any] = {}
        for name, trainer in methods.items():
            tuned = []
            for setting in trainer.settings:  # on seeds of their own
                ends = [
                    train(fresh(problem, seed), trainer, setting, problem, seed, *limits)[-1]
                    for seed in range(100, 100 + options.tuning_seeds)
                ]
                worst = max(end["validation loss"] for end in ends)
                tuned.append(worst if math.isfinite(worst) else math.inf)
            best = trainer.settings[int(np.argmin(tuned))]
            curves = [train(fresh(problem, seed), trainer, best, problem, seed, *limits)
                      for seed in range(options.draws)]  # fmt: skip
            found[name] = {
                "setting": best, "batch": trainer.batch, "curves": curves,
                "tuning": [dict(setting, worst=worst) for setting, worst in zip(trainer.settings, tuned, strict=True)],
            }  # fmt: skip
            last = {key: [curve[-1][key] for curve in curves] for key in curves[0][-1]}
            print(f"equal {budget}: {name:>21} ({best}): "
                  + "; ".join(f"{key} {format_numbers(value)}" for key, value in last.items()))  # fmt: skip
        record["budgets"][budget] = found
    name = "-".join(["training", options.network, *(options.budgets if len(options.budgets) == 1 else ())])
    save(options.out, name, record, draw_training(record))


def draw_training(record: dict[str, Any]) -> Figure:
    figure = Figure((10, 7), layout="constrained")
    panels = figure.subplots(2, len(record["budgets"]), squeeze=False)
    for column, (budget, methods) in enumerate(record["budgets"].items()):
        for (name, found), (color, _, dashes) in zip(methods.items(), STYLES, strict=False):
            for row, key in enumerate(("train loss", "test loss")):
                for index, curve in enumerate(found["curves"]):
                    panels[row, column].plot(
                        [p[budget] for p in curve], [p[key] for p in curve], color=color, linestyle=dashes,
                        label=name if index == 0 else None,
                    )  # fmt: skip
                panels[row, column].set(yscale="log", xlabel=budget, ylabel=key)
                panels[row, column].set_ylim(top=5)  # a training that diverges leaves the picture
    panels[0, 0].legend()
    figure.suptitle(f"Training at equal {' and at equal '.join(record['budgets'])}: {record['network']}")
    return figure


def save(folder: Path, name: str, record: dict[str, Any], figure: Figure) -> None:
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)  # a training may diverge
    write_json(folder / f"{name}.json", finite)
    write(folder / f"{name}.png", lambda path: FigureCanvasAgg(figure).print_png(path))


# -- the document ------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{np.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def mean(values: list[float | None], digits: int = 3) -> str:
    """Mean and standard error, and every value where one is missing, of a training that diverged."""
    if None in values:
        return ", ".join("diverged" if value is None else f"{value:.{digits}f}" for value in values)
    own = np.array(values, dtype=float)
    return f"{own.mean():.{digits}f} ± {own.std(ddof=1) / len(own) ** 0.5:.{digits}f}"


def figure5_table(records: list[Any]) -> str:
    rows = []
    for own in sorted(records, key=lambda r: (r["network"], r["batch"])):
        for part in ("train", "test"):
            one, two = (own["summary"][name] for name in ("single", "debiased"))
            rows.append([
                own["network"], f"{own['batch']:,} / 2 x {own['batch'] // 2:,}", part,
                f"{one[f'{part} loss at the start']:.3f}",
                spread(one[f"{part} loss, last"]), spread(two[f"{part} loss, last"]), spread(one[f"{part} loss, best"]),
                spread(two[f"{part} loss, best"]), str(len(one[f"{part} loss, last"])),
            ])  # fmt: skip
    columns = [
        "network",
        "data",
        "loss",
        "start",
        "one batch, end",
        "debiased, end",
        "one batch, best",
        "debiased, best",
    ]
    return markdown([*columns, "draws"], rows)


def quadratic_table(record: Any) -> str:
    found = sorted(record["final_distance"].items(), key=lambda item: item[1]["median"])
    return markdown(
        ["step", "median", "quartiles", "largest"],
        (
            [name, f"{own['median']:.2f}", f"{own['q25']:.2f}, {own['q75']:.2f}", f"{own['max']:.2f}"]
            for name, own in found
        ),
    )


def directional_table(records: list[Any]) -> str:
    rows = [
        [own["network"], f"{own['batch']:,}", name, f"{own['train loss at the start']:.3f}",
         *(spread([run[key] for run in runs]) for key in ("quadratic", "train"))]
        for own in sorted(records, key=lambda r: (r["network"], r["batch"])) for name, runs in own["steps"].items()
    ]  # fmt: skip
    return markdown(["network", "data", "step", "training loss", "change of its quadratic", "change of it"], rows)


def training_table(records: list[Any]) -> str:
    rows = []
    for own in sorted(records, key=lambda r: r["network"]):
        for budget, methods in own["budgets"].items():
            for name, about in methods.items():
                last = about["curves"]  # of which a record has the ends
                setting = ", ".join(f"{key} {value:g}" for key, value in about["setting"].items())
                rows.append([
                    own["network"], budget, name, setting, f"{np.mean([x['samples'] for x in last]):,.0f}",
                    f"{np.mean([x['seconds'] for x in last]):.1f}", mean([x["train loss"] for x in last], 4),
                    mean([x["test loss"] for x in last]), mean([100 * x["test accuracy"] for x in last], 1),
                ])  # fmt: skip
    columns = ["network", "equal", "method", "tuned", "samples", "CPU s", "train loss", "test loss", "test accuracy %"]
    return markdown(columns, rows)


def document(options: argparse.Namespace) -> None:
    """Keep the numbers of all records that are there, fill the tables from them, and copy the figures."""
    found: dict[str, list[Any]] = {}
    for path in sorted(options.out.glob("*.json")):
        found.setdefault(path.stem.split("-")[0], []).append(compact(json.loads(path.read_text())))
    write_json(options.docs / "records" / "steps.json", found)
    fill(options.docs / "steps.md", parts_of(found))
    for name in SHOWN:
        if (options.out / f"{name}.png").exists():
            save_small((options.out / f"{name}.png").read_bytes(), options.docs / f"steps-{name}.png")


def parts_of(found: Mapping[str, list[Any]]) -> dict[str, str]:
    """The generated parts of the document, from its record."""
    makers = {"figure5": figure5_table, "directional": directional_table, "training": training_table}
    made = {name: make(found[name]) for name, make in makers.items() if name in found}
    return made | ({"noisy quadratic": quadratic_table(found["noisy"][0])} if "noisy" in found else {})


def compact(record: Any) -> Any:
    """Without what only single runs have; of a training its end, of other curves six digits."""
    if isinstance(record, dict):
        left_out = {"step_sizes", "first_step_sizes", "all_final_distances", "relative_dampings_of_the_first_run"}
        kept = {key: own for key, own in record.items() if key not in left_out}
        return {key: [curve[-1] for curve in own] if key == "curves" else compact(own) for key, own in kept.items()}
    if isinstance(record, list):
        return [compact(own) for own in record]
    return float(f"{record:.6g}") if isinstance(record, float) else record


#: What the document is made of, and the figures it shows.
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
SHOWN = ("figure5-lenet-trained-1024", "noisy-quadratic", "training-digits-cnn", "training-lenet-seconds")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = {
        "noisy_quadratic": noisy_quadratic, "figure5": figure5, "directional": directional, "training": training,
        "document": document,
    }  # fmt: skip
    for name in modes:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    parser.add_argument("--all", action="store_true", help="everything in the document, and the document")
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
        for run in (*RUNS, "--document"):
            main([*run.split(), *shared])
        return
    chosen = [run for name, run in modes.items() if getattr(options, name)]
    if not chosen:
        parser.error("Expected at least one of --noisy-quadratic, --figure5, --directional, --training and --document.")
    for run in chosen:
        run(options)


if __name__ == "__main__":
    main()
