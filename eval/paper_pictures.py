"""Figures of ``docs/paper.md``, in the order and the manner of the paper's, a row for every network."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from documents import save_small
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from debiased_laplace.evaluation.report.drawing import STYLES

Record = Mapping[str, Any]
#: Own batch, other batches, all data; one batch and two of figure 5.
OWN, OTHER, DATA = ("#D55E00", "s"), ("#0072B2", "o"), ("#000000", "P")
#: Overlaps up to this are black, as in the paper.
FLOOR = 1e-8


def draw(whole: Record, folder: Path) -> None:
    """All figures of networks that have what they show."""
    measured = {of["title"]: of["directions"] for of in whole.values() if "directions" in of}
    steps = {of["title"]: of["figure5"] for of in whole.values() if "figure5" in of}
    figures = {name: make(measured) for name, make in OF_DIRECTIONS.items()} if measured else {}
    if steps:
        figures["5"] = figure5(steps)
    for name, figure in figures.items():
        image = io.BytesIO()
        figure.set_dpi(85)
        FigureCanvasAgg(figure).print_png(image)
        save_small(image.getvalue(), folder / f"paper-{name}.png")


def legend(figure: Figure, entries: Sequence[tuple[str, tuple[str, str], Any]]) -> None:
    handles = [
        Line2D([], [], color=color, marker=marker or None, linestyle=line, markersize=6, label=label)
        for label, (color, marker), line in entries
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)


def legend_of_three(figure: Figure) -> None:
    legend(figure, [("same batch", OWN, ""), ("other batches", OTHER, ""), ("all data", DATA, "")])


def figure1(measured: Mapping[str, Record]) -> Figure:
    """The quadratics of batches and of the data on the planes of the batches' top two eigenvectors."""
    n = max(len(of["figures"]["planes"]) for of in measured.values())
    figure = Figure((2.6 * n, 2.9 * len(measured) + 0.3), layout="constrained")
    panels = figure.subplots(len(measured), n, squeeze=False)
    for row, (title, of) in zip(panels, measured.items(), strict=True):
        planes = of["figures"]["planes"]
        # As far as the quadratic of the batch doubles its loss, along its second direction.
        extent = max(np.sqrt(2 * plane["batch"]["offset"] / plane["batch"]["curvatures"][1][1]) for plane in planes)
        for m, (axes, plane) in enumerate(zip(row, planes, strict=True)):
            grid = np.linspace(-extent, extent, 101)
            points = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1)
            heights = {}
            for name in ("batch", "data"):
                slopes, curvatures = (np.array(plane[name][key]) for key in ("slopes", "curvatures"))
                heights[name] = points @ slopes + 0.5 * np.einsum("...i,ij,...j->...", points, curvatures, points)
            # Steps of the same height in both, so that a narrower valley has denser lines.
            levels = np.linspace(0, 1, 8)[1:] ** 2 * np.ptp(heights["batch"]) * 0.5
            for name, (color, marker), dashes in (("batch", OWN, "solid"), ("data", DATA, "dashed")):
                lowest = heights[name].min()
                axes.contour(
                    grid, grid, heights[name].T, lowest + levels, colors=color, linestyles=dashes, linewidths=1
                )
                if np.abs(plane[name]["minimum"]).max() <= extent:
                    axes.plot(*plane[name]["minimum"], marker, color=color, markersize=6, markeredgecolor="white")
            axes.plot(0, 0, "+", color="0.4", markersize=9)
            axes.set(aspect="equal", title=f"batch {m + 1}" if m else title)
            axes.locator_params(nbins=4)
    legend(figure, [("batch, its minimum", OWN, "-"), ("all data", DATA, "--")])
    return figure


def series(axes: Axes, same: Any, others: Any, data: Any, size: float = 3.0) -> None:
    """What a batch, the others and all data have for every direction."""
    places = np.arange(1, len(same) + 1)
    for other in others:
        axes.plot(places, other, OTHER[1], color=OTHER[0], markersize=0.7 * size, alpha=0.7)
    axes.plot(places, same, OWN[1], color=OWN[0], markersize=size)
    axes.plot(places, data, DATA[1], color=DATA[0], markersize=size)
    axes.grid(color="0.9", linewidth=0.6)


def figure2(measured: Mapping[str, Record]) -> Figure:
    """Slopes and curvatures along the eigenvectors of three batches."""
    n = max(len(of["figures"]["directions"]["slopes"]["data"]) for of in measured.values())
    figure = Figure((3.9 * n, 4.6 * len(measured) + 0.3), layout="constrained")
    panels = figure.subplots(2 * len(measured), n, squeeze=False)
    for (slopes_row, curvatures_row), (title, of) in zip(panels.reshape(-1, 2, n), measured.items(), strict=True):
        shown = of["figures"]["directions"]
        for m in range(n):
            for name, axes in (("slopes", slopes_row[m]), ("curvatures", curvatures_row[m])):
                batches, data = np.array(shown[name]["batches"])[m], np.array(shown[name]["data"])[m]
                order = np.argsort(-batches[m]) if name == "slopes" else np.arange(len(data))  # as in the paper
                series(axes, batches[m][order], [b[order] for j, b in enumerate(batches) if j != m], data[order])
            slopes_row[m].axhline(0, color="0.5", linewidth=0.8)
            slopes_row[m].set(title=f"{title}: batch {m + 1}", ylabel="slope" if m == 0 else "")
            curvatures_row[m].set(yscale="log", xlabel="direction", ylabel="curvature" if m == 0 else "")
    legend_of_three(figure)
    return figure


def sizes(measured: Mapping[str, Record]) -> Figure:
    """How much too large curvatures are, against the size of a batch."""
    figure = Figure((8, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for (title, of), (color, marker, _) in zip(measured.items(), STYLES, strict=False):
        places = [int(size) for size in of["sizes"]]
        for axes, key in ((left, "ratio_own"), (right, "typical_ratio_own"), (right, "typical_ratio_other")):
            values, errors = (  # the first direction's, of several
                [np.ravel(at[key][part])[0] for at in of["sizes"].values()] for part in ("value", "error")
            )
            own = key != "typical_ratio_other"
            axes.errorbar(places, values, errors, color=color, marker=marker, linestyle="-" if own else ":", capsize=3,
                          label=title if own else None)  # fmt: skip
    for axes, title in ((left, "first direction"), (right, "top directions; dotted: second batch")):
        axes.axhline(1, color="0.5", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="batch")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(places, [str(place) for place in places])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(color="0.9", linewidth=0.6)
    left.set_ylabel("curvature of the batch / of all data")
    left.legend(fontsize=8)
    return figure


def figure3(measured: Mapping[str, Record]) -> Figure:
    """Squared inner products of the eigenvectors of the first batch with those of all that are shown."""
    n = max(len(of["figures"]["alignment"][0]) for of in measured.values())
    figure = Figure((3.3 * n, 3.2 * len(measured)), layout="constrained")
    panels = figure.subplots(len(measured), n, squeeze=False)
    shades = None
    for row, (title, of) in zip(panels, measured.items(), strict=True):
        for j, (axes, overlaps) in enumerate(zip(row, of["figures"]["alignment"][0], strict=True)):
            array = np.array(overlaps)
            shades = axes.imshow(
                np.log10(np.clip(array, FLOOR, 1)), cmap="gray", vmin=np.log10(FLOOR), vmax=0,
                extent=(0.5, array.shape[1] + 0.5, array.shape[0] + 0.5, 0.5), interpolation="nearest",
            )  # fmt: skip
            axes.set_title(f"{title}: batch 1 against {j + 1}", fontsize=9)
    assert shades is not None
    figure.colorbar(shades, ax=panels, shrink=0.6, label="squared inner product, power of ten")
    return figure


def figure4(measured: Mapping[str, Record]) -> Figure:
    """How far to go along the steps of conjugate gradients."""
    n = max(len(of["figures"]["steps"]) for of in measured.values())
    figure = Figure((3.6 * n, 3.0 * len(measured) + 0.3), layout="constrained")
    panels = figure.subplots(len(measured), n, squeeze=False)
    for row, (title, of) in zip(panels, measured.items(), strict=True):
        for m, (axes, run) in enumerate(zip(row, of["figures"]["steps"], strict=True)):
            series(axes, run["own"], run["others"], run["data"], 6)
            axes.axhline(0, color="0.5", linewidth=0.8)
            small = np.abs([x for key in ("own", "data") for x in run[key] if np.isfinite(x)])
            axes.set_yscale("symlog", linthresh=float(np.quantile(small, 0.25)) if len(small) else 1.0)
            axes.margins(y=0.15)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_title(f"{title}: batch {m + 1}", fontsize=10)
            axes.set(xlabel="step", ylabel="magnitude" if m == 0 else "")
    legend_of_three(figure)
    return figure


def figure5(measured: Mapping[str, Record]) -> Figure:
    """Loss and accuracy along the paths of conjugate gradients; the largest batch of every network."""
    figure = Figure((13, 2.9 * len(measured) + 0.3), layout="constrained")
    panels = figure.subplots(len(measured), 4, squeeze=False)
    for row, (title, of) in zip(panels, measured.items(), strict=True):
        size = max(of["sizes"], key=int)
        for name, (color, marker) in (("one batch", OWN), ("two batches", OTHER)):
            for index, (part, key) in enumerate((p, k) for k in ("loss", "accuracy") for p in ("train", "test")):
                for run in of["sizes"][size][name]:
                    values = np.array(run[part][key], dtype=float)
                    best = int(values.argmin() if key == "loss" else values.argmax())
                    row[index].plot(values, color=color, linewidth=1.1, alpha=0.8)
                    row[index].plot(best, values[best], marker, color=color, markeredgecolor="white")
                row[index].set(yscale="log" if key == "loss" else "linear", xlabel="iteration")
                row[index].set_title(f"{title}: {part} {key}", fontsize=9)
                row[index].grid(color="0.9", linewidth=0.6)
    legend(figure, [("one batch", OWN, "-"), ("two batches of half the size", OTHER, "-")])
    return figure


OF_DIRECTIONS = {"1": figure1, "2": figure2, "sizes": sizes, "3": figure3, "4": figure4}
