"""The noisy quadratic of ``steps.py``: that of ViViT (arXiv 2106.02624, figure 3)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from documents import save_run
from matplotlib.figure import Figure
from torch import Tensor

from debiased_laplace.evaluation.report.drawing import STYLES
from debiased_laplace.quadratic.optim import (
    damped_step,
    directionally_damped_step,
    second_batch_damped_step,
)
from debiased_laplace.quadratic.spectrum import DirectionalDerivatives


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
                       np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist(), strict=True))
        for name, values in distances.items()
    }  # fmt: skip
    record = {
        "problem": asdict(problem), "runs": options.runs, "grid": "logspace(-4, 2, 200)", "resamples": 100,
        "level": 0.05, "sgd_learning_rate": 1e-3, "final_distance": quantiles,
        "final_loss": {name: {"mean": float(values[:, -1].mean()), "median": float(np.median(values[:, -1]))}
                       for name, values in losses.items()},
        "all_final_distances": {name: values.tolist() for name, values in distances.items()},
        "median_loss": {name: np.median(values, 0).tolist() for name, values in losses.items()},
        "relative_dampings_of_the_first_run": {
            name: [[x if math.isfinite(x) else None for x in row] for row in rows] for name, rows in relative.items()
        },
        "smallest_median_final_distance": min(quantiles, key=lambda name: quantiles[name]["median"]),
    }  # fmt: skip
    save_run(options.out, "noisy-quadratic", record, draw_quadratic(losses, distances, relative["bootstrap"]))
    for name, values in sorted(quantiles.items(), key=lambda item: item[1]["median"]):
        quartiles = f"{values['q25']:9.3f} {values['q75']:9.3f}"
        print(f"{name:>15}  final distance: median {values['median']:9.3f}  quartiles {quartiles}"
              f"  max {values['max']:11.3f}   mean loss {record['final_loss'][name]['mean']:.3g}")  # type: ignore[index] # fmt: skip


def parts(every: DirectionalDerivatives) -> tuple[DirectionalDerivatives, DirectionalDerivatives]:
    """The two halves of the data, each with separate weights."""
    n = len(every.slopes) // 2
    halves = []
    for part in (slice(0, n), slice(n, None)):
        slopes, curvatures = every.slopes[part], every.curvatures[part]
        halves.append(DirectionalDerivatives(slopes, curvatures, torch.full((len(slopes),), 1 / len(slopes)).double()))
    return halves[0], halves[1]


def draw_quadratic(losses: dict[str, np.ndarray], distances: dict[str, np.ndarray], relative: Any) -> Figure:
    figure = Figure((13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for (name, runs), (color, _, dashes) in zip(losses.items(), STYLES, strict=False):
        low, median, high = np.quantile(runs, (0.25, 0.5, 0.75), axis=0)
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
