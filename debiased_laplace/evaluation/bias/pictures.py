"""Figures of a bias study, made from its record; the numbers behind them are in ``bias.json``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator, NullLocator

from debiased_laplace.evaluation.bias.measure import N_SHOWN, Record
from debiased_laplace.evaluation.report.drawing import STYLES, Picture, png
from debiased_laplace.quadratic.instruments import OnPlane

__all__ = ["FLOOR", "pictures"]

#: Overlaps up to this are black.
FLOOR = 1e-8
#: Own batch, other batches, all data: colour and marker.
OWN, OTHER, DATA = ("#D55E00", "s"), ("#0072B2", "o"), ("#000000", "P")


def pictures(record: Record) -> dict[str, Picture]:
    """All figures, by the names of their files."""
    return {
        "directions": _directions(record),
        "planes": _planes(record),
        "alignment": _alignment(record),
        "steps": _steps(record),
        "batch-sizes": _sizes(record),
        "noise": _noise(record),
    }


def _labels(record: Record) -> tuple[str, str, str]:
    return "same batch", "other batches", f"{record['task']['n_reference']:,} training data"


def _series(axes: Axes, places: Any, same: Any, others: Any, data: Any) -> None:
    """What the same batch has, the others and the data, for every direction; None is not drawn."""
    for other in others:
        axes.plot(places, np.array(other, dtype=float), OTHER[1], color=OTHER[0], markersize=3.5, alpha=0.7)
    for values, (color, marker) in ((same, OWN), (data, DATA)):
        axes.plot(places, np.array(values, dtype=float), marker, color=color, markersize=6)
    axes.grid(color="0.9", linewidth=0.6)


def _legend_of_series(figure: Figure, record: Record) -> None:
    _legend(figure, [(label, style, "") for label, style in zip(_labels(record), (OWN, OTHER, DATA), strict=True)])


def _legend(figure: Figure, entries: list[tuple[str, tuple[str, str], Any]]) -> None:
    handles = [
        Line2D([], [], color=color, marker=marker or None, linestyle=line, markersize=6, label=label)
        for label, (color, marker), line in entries
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)


def _listed(values: Any) -> str:
    return ", ".join("none" if value is None else f"{value:.3g}" for value in values)


# -- figure 2 --------------------------------------------------------------------------------------


def _directions(record: Record) -> Picture:
    slopes, curvatures = (np.asarray(record["directions"][name]["batches"]) for name in ("slopes", "curvatures"))
    data = [np.asarray(record["directions"][name]["reference"]) for name in ("slopes", "curvatures")]
    n = min(N_SHOWN, len(slopes))
    figure = Figure(figsize=(3.6 * n, 6.4), layout="constrained")
    panels = figure.subplots(2, n, squeeze=False, sharex=True, sharey="row")
    places = np.arange(1, slopes.shape[2] + 1)
    for m in range(n):
        order = np.argsort(-slopes[m, m])  # as in the paper: slopes of the same batch descend
        for row, (of_batch, reference, index) in enumerate(
            ((slopes, data[0], order), (curvatures, data[1], np.arange(len(places))))
        ):
            others = [of_batch[m, j][index] for j in range(len(of_batch)) if j != m]
            _series(panels[row, m], places, of_batch[m, m][index], others, reference[m][index])
        panels[0, m].axhline(0, color="0.5", linewidth=0.8)
        panels[0, m].set_title(f"directions of batch {m + 1}", fontsize=10)
        panels[1, m].set(xlabel="direction", xticks=places if len(places) <= 12 else places[:: len(places) // 10])
    if curvatures.min() > 0:
        panels[1, 0].set_yscale("log")
    panels[0, 0].set_ylabel("slope")
    panels[1, 0].set_ylabel("curvature")
    _legend_of_series(figure, record)
    about = record["directions"]["curvatures"]
    means = "; ".join(
        f"{label}: {_listed(about[key]['value'])}"
        for label, key in zip(_labels(record), ("mean_own", "mean_other", "mean_reference"), strict=True)
    )
    return Picture(
        "Slopes and curvatures along a batch's own top eigenvectors",
        "Where orange lies above the black crosses, a batch overstates; other batches scatter around the crosses.",
        f"Mean curvatures, from the first direction on. {means}.",
        png(figure),
        wide=True,
    )


# -- figure 1 --------------------------------------------------------------------------------------


def _planes(record: Record) -> Picture:
    planes = record["planes"]
    figure = Figure(figsize=(3.7 * len(planes), 4.2), layout="constrained")
    panels = figure.subplots(1, len(planes), squeeze=False)[0]
    said = []
    for index, (axes, plane) in enumerate(zip(panels, planes, strict=True)):
        first, data = (_on_plane(plane[name]) for name in ("first", "reference"))
        extent = _extent(plane["extent"], first, data)
        grid = torch.linspace(-extent, extent, 101, dtype=torch.float64)
        heights = [quadratic.values(grid).mT.numpy() for quadratic in (first, data)]
        # Steps of the same height in both, so that a narrower valley has denser lines.
        steps = np.linspace(0, 1, 9)[1:] ** 2 * float(np.ptp(heights[0])) * 0.5
        for height, (color, _), dashes in zip(heights, (OWN, DATA), ("solid", "dashed"), strict=True):
            axes.contour(
                grid, grid, height, height.min() + steps, colors=color, linestyles=dashes, linewidths=1.0, alpha=0.8
            )
        axes.plot(0, 0, "+", color="0.4", markersize=9)
        for quadratic, (color, marker) in ((first, OWN), (data, DATA)):
            low = quadratic.minimum
            if bool(low.isfinite().all()) and float(low.abs().max()) <= extent:
                axes.plot(*low.tolist(), marker, color=color, markersize=7, markeredgecolor="white")
        axes.set(title=f"batch {index + 1}", xlabel="along its first eigenvector", aspect="equal")
        axes.locator_params(nbins=5)
        curved = [torch.linalg.eigvalsh(quadratic.curvatures).flip(0).tolist() for quadratic in (first, data)]
        said.append(f"batch {index + 1}: {_listed(curved[0])} on it, {_listed(curved[1])} on all data")
    panels[0].set_ylabel("along its second eigenvector")
    _legend(figure, [("mini-batch", OWN, "-"), (_labels(record)[2], DATA, "--")])
    return Picture(
        "The two quadratics on the plane of the batch's top two eigenvectors",
        "The network is at the cross. Denser, narrower orange contours: too small steps and too much certainty.",
        f"Curvatures on the plane. {'; '.join(said)}.",
        png(figure),
        wide=True,
    )


def _on_plane(measured: Record) -> OnPlane:
    slopes, curvatures = (torch.tensor(measured[name], dtype=torch.float64) for name in ("slopes", "curvatures"))
    return OnPlane(measured["offset"], slopes, curvatures)


def _extent(extent: float, first: OnPlane, data: OnPlane) -> float:
    """So far that both minima are in view, unless one is very far away."""
    far = [float(surface.minimum.abs().max()) for surface in (first, data) if bool(surface.minimum.isfinite().all())]
    near = [distance for distance in far if distance < 5 * extent]
    return max([extent, *(1.2 * distance for distance in near)])


# -- figure 3 --------------------------------------------------------------------------------------


def _alignment(record: Record) -> Picture:
    entries = record["alignment"]
    rows, columns = (1 + max(entry[key] for entry in entries) for key in ("first", "second"))
    figure = Figure(figsize=(3.5 * columns, 3.3 * rows), layout="constrained")
    panels = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[5, 1] * columns)
    said, shades = [], None
    for entry in entries:
        overlaps, sums = np.asarray(entry["overlaps"]), np.asarray(entry["row_sums"])
        i, j = entry["first"], entry["second"]
        image, bars = panels[i, 2 * j : 2 * j + 2]
        k = len(overlaps)
        shades = image.imshow(
            np.log10(np.clip(overlaps, FLOOR, 1)), cmap="gray", vmin=math.log10(FLOOR), vmax=0, aspect="auto",
            extent=(0.5, k + 0.5, k + 0.5, 0.5),
        )  # fmt: skip
        image.set_title(f"batch {i + 1} against batch {j + 1}", fontsize=10)
        image.set_xlabel(f"directions of batch {j + 1}", fontsize=9)
        image.set_ylabel(f"directions of batch {i + 1}", fontsize=9)
        for axis in (image.xaxis, image.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
        bars.barh(np.arange(1, k + 1), sums, height=0.8, color=OTHER[0])
        bars.set(xlim=(0, 1), ylim=(k + 0.5, 0.5), yticks=[], xticks=[0, 1])
        bars.set_title("row sums", fontsize=8)
        said.append(f"batch {i + 1} against {j + 1}: {_listed(sums)}")
    assert shades is not None
    ticks = [-8, -6, -4, -2, 0]
    bar = figure.colorbar(shades, ax=panels, ticks=ticks, shrink=0.8)
    bar.ax.set_yticklabels([f"$\\leq 10^{{{tick}}}$" if tick == -8 else f"$10^{{{tick}}}$" for tick in ticks])
    return Picture(
        "How far the eigenvectors of two batches point the same way",
        "Squared inner products of the directions of one batch (rows) with those of another (columns).",
        f"Row sums. {'; '.join(said)}.",
        png(figure),
        wide=True,
    )


# -- figure 4 --------------------------------------------------------------------------------------


def _steps(record: Record) -> Picture:
    entries = record["steps"][:N_SHOWN]
    figure = Figure(figsize=(3.6 * len(entries), 3.9), layout="constrained")
    panels = figure.subplots(1, len(entries), squeeze=False, sharey=True)[0]
    values = np.concatenate([np.ravel(np.array([entry["own"], entry["reference"]], dtype=float)) for entry in entries])
    small = np.abs(values[np.isfinite(values) & (values != 0)])
    for index, (axes, entry) in enumerate(zip(panels, entries, strict=True)):
        places = np.arange(1, len(entry["own"]) + 1)
        _series(axes, places, entry["own"], entry["others"], entry["reference"])
        axes.axhline(0, color="0.5", linewidth=0.8)
        axes.set(title=f"batch {index + 1}", xlabel="step", xticks=places)
        axes.set_yscale("symlog", linthresh=float(np.quantile(small, 0.25)) if len(small) else 1.0)
    panels[0].set_ylabel("step magnitude")
    _legend_of_series(figure, record)
    wrong = ", ".join(
        f"{sum(entry['uphill']['reference'])} of {len(entry['own'])} (batch {index + 1})"
        for index, entry in enumerate(entries)
    )
    return Picture(
        "How far to go along the directions of conjugate gradients",
        "Minus slope over curvature along the batch's own path, undamped; below zero the data would go the other way.",
        f"Steps that go uphill on the data: {wrong}.",
        png(figure),
        wide=True,
    )  # fmt: skip


# -- batch sizes -----------------------------------------------------------------------------------


def _sizes(record: Record) -> Picture:
    curve = record["sizes"]
    sizes = np.asarray(curve["sizes"])
    values, errors = (np.array(curve["overstatement"][key], dtype=float) for key in ("value", "error"))
    spikes = np.asarray(curve["reference_eigenvalues"])
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    entries = []
    for k, (color, marker, _) in zip(range(len(spikes)), STYLES[1:], strict=False):
        left.errorbar(sizes, values[:, k], errors[:, k], color=color, marker=marker, capsize=3, linewidth=1.4)
        theory = np.array([p["overstatement"][k] for p in curve["predictions"]], dtype=float)
        left.plot(sizes, theory, color=color, linestyle="--", linewidth=1.1)
        eigenvalues = np.asarray(curve["batch_eigenvalues"])[:, :, k]
        right.errorbar(
            sizes, eigenvalues.mean(1), eigenvalues.std(1, ddof=1) / math.sqrt(eigenvalues.shape[1]), color=color,
            marker=marker, capsize=3, linewidth=1.4,
        )  # fmt: skip
        for key, dashes in (("predictions", "--"), ("isotropic", ":")):
            right.plot(
                sizes, [p["batch_eigenvalues"][k] for p in curve[key]], color=color, linestyle=dashes, linewidth=1.1
            )
        right.axhline(spikes[k], color=color, linewidth=0.6, alpha=0.6)
        entries.append((f"direction {k + 1}", (color, marker), "-"))
    left.axhline(1, color="0.4", linewidth=0.8)
    left.set(ylabel="overstatement of the curvature")
    right.set(ylabel="eigenvalues of the batch")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="batch size")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(2, 0.7)))
        axes.grid(color="0.9", linewidth=0.6)
    entries += [("predicted, noise along the direction", ("0.3", ""), "--"), ("predicted, isotropic", ("0.3", ""), ":")]
    _legend(figure, entries)
    said = "; ".join(f"{size}: {_listed(row)}" for size, row in zip(sizes, values, strict=True))
    return Picture(
        "Bias against batch size",
        "Left: curvature over that of the data. Right: eigenvalues, thin lines those of the data. Dashed and dotted: "
        "spiked random-matrix theory, with the noise along each direction and averaged.",
        f"Overstatement by batch size, from the first direction on. {said}.",
        png(figure),
        wide=True,
    )  # fmt: skip


# -- ViViT's figure 2 ------------------------------------------------------------------------------


def _noise(record: Record) -> Picture:
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    said = []
    for axes, key, title in zip(panels, ("slope_snr", "curvature_snr"), ("slopes", "curvatures"), strict=True):
        for name, (color, marker) in (("own", OWN), ("other", OTHER)):
            values = np.array(record["noise"][name][key], dtype=float)
            axes.plot(np.arange(1, len(values) + 1), values, marker, color=color, linestyle="-", linewidth=0.8)
            said.append(
                f"{title}, {'the same batch' if name == 'own' else 'another'}: {_listed(record['noise'][name][key])}"
            )
        axes.set(title=title, xlabel="direction", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.grid(color="0.9", linewidth=0.6)
    panels[0].set_ylabel("squared mean over variance, one datum")
    _legend(figure, [("same batch", OWN, "-"), ("another batch", OTHER, "-")])
    return Picture(
        "Signal and noise of one datum along the first batch's directions",
        "Times the batch size, the ratio of a batch's mean.",
        f"Signal-to-noise ratios. {'; '.join(said)}.",
        png(figure),
        wide=True,
    )  # fmt: skip
