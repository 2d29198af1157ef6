"""Figures of a summary. Colours are safe for colour-blind readers; markers and dashes tell lines apart in grey.

Figures are made with Matplotlib's object interface on the Agg canvas: no global state, no display.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from debiased_laplace.evaluation.statement import plus_minus

#: Okabe and Ito's colours, darkest first, each with a marker and a dash pattern of its own.
STYLES: tuple[tuple[str, str, Any], ...] = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", ":"),
    ("#CC79A7", "D", "-."),
    ("#56B4E9", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("#E69F00", "P", (0, (1, 2))),
)
#: Bins with fewer data are left out of reliability diagrams: their accuracy is noise.
SMALLEST_BIN = 10


@dataclass(frozen=True)
class Picture:
    """A figure for the report.

    Attributes:
        title: Short.
        caption: How to read it.
        alternative: What a reader who cannot see it should know.
        png: The image.
    """

    title: str
    caption: str
    alternative: str
    png: bytes


def reliability_pictures(summary: dict[str, Any]) -> list[Picture]:
    """One reliability diagram for each method, with all conditions in it."""
    pictures = []
    for name, method in summary["methods"].items():
        figure = Figure(figsize=(4.2, 4.2), layout="constrained")
        _reliability(figure.subplots(), name, method)
        conditions = method["conditions"].items()
        errors = ", ".join(f"{key} {plus_minus(scores['ece'], 1, scale=100)} %" for key, scores in conditions)
        alternative = f"Reliability diagram of {name}: accuracy against confidence. ECE: {errors}."
        pictures.append(Picture(name, "", alternative, _png(figure)))
    return pictures


def reliability_png(summary: dict[str, Any]) -> bytes:
    """All reliability diagrams in one image."""
    methods = summary["methods"]
    columns = min(3, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure = Figure(figsize=(4 * columns, 4.1 * rows), layout="constrained")
    panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for panel, (name, method) in zip(panels, methods.items(), strict=False):
        _reliability(panel, name, method)
    for panel in panels[len(methods) :]:
        panel.set_visible(False)
    return _png(figure)


def _reliability(axes: Axes, name: str, method: dict[str, Any]) -> None:
    axes.plot([0, 1], [0, 1], color="0.55", linewidth=1, zorder=1)
    for (condition, bins), (color, marker, dashes) in zip(method["reliability"].items(), STYLES, strict=False):
        counts = np.asarray(bins["counts"], dtype=float)
        kept = counts >= SMALLEST_BIN
        confidence = np.asarray(bins["confidences"])[kept] / counts[kept]
        accuracy = np.asarray(bins["correct"])[kept] / counts[kept]
        error = plus_minus(method["conditions"][condition]["ece"], 1, scale=100)
        axes.plot(confidence, accuracy, color=color, linestyle=dashes, linewidth=1.5, zorder=2)
        axes.scatter(
            confidence, accuracy, 15 + 120 * np.sqrt(counts[kept] / counts.sum()), color=color, marker=marker,
            edgecolors="white", linewidths=0.6, zorder=3,
        )  # fmt: skip
        label = f"{condition}: ECE {error} %"
        axes.plot([], [], color=color, linestyle=dashes, marker=marker, markersize=5, label=label)
    axes.set(xlim=(0, 1.03), ylim=(0, 1.03), xlabel="confidence", ylabel="accuracy", title=name, aspect="equal")
    axes.grid(color="0.9", linewidth=0.6)
    axes.legend(loc="upper left", fontsize=9, frameon=True, framealpha=0.9)


def tuning_picture(summary: dict[str, Any]) -> Picture | None:
    """Validation loss against prior precision."""
    methods = {name: method for name, method in summary["methods"].items() if "curve" in method}
    if not methods:
        return None
    figure = Figure(figsize=(5.4, 4.0), layout="constrained")
    axes = figure.subplots()
    tuned = []
    point = next(((name, m) for name, m in summary["methods"].items() if m["kind"] == "map"), None)
    if point is not None:
        axes.axhline(point[1]["validation_nll"]["mean"], color="0.35", linewidth=1, label=point[0])
    ceiling = 0.0 if point is None else point[1]["validation_nll"]["mean"]
    for (name, method), (color, marker, dashes) in zip(methods.items(), STYLES, strict=False):
        curve = method["curve"]
        grid, mean = np.asarray(curve["prior_precisions"]), np.asarray(curve["mean"])
        best = int(mean.argmin())
        axes.plot(
            grid, mean, color=color, linestyle=dashes, linewidth=1.8, marker=marker, markevery=[best], markersize=9,
            markeredgecolor="white", label=name,
        )  # fmt: skip
        ceiling = max(ceiling, float(mean.min()))
        tuned.append(f"{name} {mean[best]:.3f} at {grid[best]:.3g}")
    axes.set(xscale="log", xlabel="prior precision", ylabel="validation NLL, nats")
    lowest = min(min(method["curve"]["mean"]) for method in methods.values())
    room = max(ceiling - lowest, 0.15 * ceiling)
    top = ceiling + 1.5 * room  # far left the losses are huge and say nothing
    inside = [x for m in methods.values() for x, y in zip(*_points(m["curve"]), strict=True) if y < top]
    axes.set(ylim=(lowest - 0.4 * room, top), xlim=(min(inside) / 3, max(inside) * 1.5))
    axes.grid(color="0.9", linewidth=0.6)
    axes.legend(fontsize=9)
    return Picture(
        "Tuning",
        "Mean over seeds of the validation loss for each prior precision; a marker is the lowest point of the mean "
        "(each seed is tuned by itself). Far to the right every posterior is MAP; the rise to the left is cut off.",
        f"Validation NLL against prior precision. Lowest mean: {'; '.join(tuned)}.",
        _png(figure),
    )


def distance_picture(summary: dict[str, Any]) -> Picture | None:
    """Distance to the reference, one line for each seed."""
    methods = {name: method["distances"] for name, method in summary["methods"].items() if "distances" in method}
    entries: list[dict[str, Any]] = next(iter(methods.values()), [])
    if not entries:
        return None
    figure = Figure(figsize=(2.7 * len(entries), 3.5), layout="constrained")
    panels = np.ravel(figure.subplots(1, len(entries), squeeze=False))
    parts = []
    for index, (panel, entry) in enumerate(zip(panels, entries, strict=True)):
        values = np.array([distances[index]["absolute"]["values"] for distances in methods.values()])
        panel.plot(np.arange(len(methods)), values, color="0.7", linewidth=1, marker="o", markersize=3, zorder=1)
        for place, (distances, (color, marker, _)) in enumerate(zip(methods.values(), STYLES, strict=False)):
            value = distances[index]["absolute"]
            panel.errorbar(
                place, value["mean"], value["standard_error"] or 0, color=color, marker=marker, markersize=9,
                capsize=5, linewidth=2, zorder=2,
            )  # fmt: skip
        panel.set_xticks(np.arange(len(methods)), [name.replace(" ", "\n", 1) for name in methods])
        panel.set_xlim(-0.5, len(methods) - 0.5)
        panel.set_ylim(0, max(float(values.max()) * 1.08, 1e-6))
        title = "tuned prior precision" if entry["at"] == "tuned" else f"prior precision {entry['at']}"
        panel.set_title(title, fontsize=10)
        panel.grid(axis="y", color="0.9", linewidth=0.6)
        means = ", ".join(f"{name} {plus_minus(d[index]['absolute'], 3)}" for name, d in methods.items())
        parts.append(f"at prior precision {entry['at']}: {means}")
    panels[0].set_ylabel("mean absolute log ratio")
    return Picture(
        "Distance to the reference posterior",
        "Grey lines join the values of one seed; markers are means, bars standard errors. Zero would be the reference.",
        f"Mean absolute log ratio of output variances, {'; '.join(parts)}.",
        _png(figure),
    )


def examples_picture(images: dict[str, Tensor], caption: str, n_columns: int = 8) -> Picture:
    """Some images of every condition, one row each.

    Args:
        images: ``[N, channels, height, width]`` in [0, 1] for each row; one or three channels.
        caption: What the rows are.
        n_columns: Images in a row.
    """
    figure = Figure(figsize=(5.6, 0.85 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), n_columns, squeeze=False)
    for row, (name, shown) in zip(grid, images.items(), strict=True):
        for panel, image in zip(row, shown[:n_columns].cpu(), strict=False):
            panel.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        for panel in row:
            panel.set(xticks=[], yticks=[])
        row[0].set_ylabel(name.replace(" ", "\n"), rotation=0, ha="right", va="center", fontsize=9)
    return Picture("What the data look like", caption, f"Rows of example images: {', '.join(images)}.", _png(figure))


def _points(curve: dict[str, Any]) -> tuple[list[float], list[float]]:
    return curve["prior_precisions"], curve["mean"]


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return file.getvalue()
