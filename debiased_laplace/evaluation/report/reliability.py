"""Reliability: diagrams of the confidence, and a table by class; with intervals on the test data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from debiased_laplace._arrays import Array
from debiased_laplace.evaluation.methods import MAP
from debiased_laplace.evaluation.report.drawing import STYLES, Picture, png
from debiased_laplace.evaluation.report.figures import drawn
from debiased_laplace.evaluation.report.numbers import number, unshared
from debiased_laplace.evaluation.report.summary import added
from debiased_laplace.evaluation.report.table import Table
from debiased_laplace.evaluation.report.verdicts import Summary, by_role
from debiased_laplace.evaluation.scores import intervals
from debiased_laplace.evaluation.scores.calibration import N_BINS

#: Bins with fewer data are left out of reliability diagrams: their accuracy is noise.
SMALLEST_BIN = 10
#: Classes that the table shows, those where most data are said too surely or too carefully.
N_CLASSES = 20
#: Beside a mean probability that the interval of the frequency leaves out.
OUTSIDE = "‡"


def reliability_pictures(summary: Summary) -> dict[str, Picture]:
    """One reliability diagram for each method: test data, and the strongest shift of each kind together."""
    if summary["regression"]:
        return {}
    diagrams = {}
    for name in drawn(summary):
        figure = Figure(figsize=(4.2, 4.2), layout="constrained")
        lines = _reliability(figure.subplots(), summary, name)
        alternative = f"Reliability diagram of {name}: accuracy against confidence. {'; '.join(lines)}."
        diagrams[name] = Picture(name, "", alternative, png(figure))
    return diagrams


def _reliability(axes: Axes, summary: Summary, name: str) -> list[str]:
    axes.plot([0, 1], [0, 1], color="0.55", linewidth=1, zorder=1)
    said = []
    for (title, bins), (color, marker, dashes) in zip(_bins(summary, name).items(), STYLES[:3], strict=False):
        counts = np.asarray(bins["counts"], dtype=float)
        kept = counts >= SMALLEST_BIN
        confidence = np.asarray(bins["confidences"])[kept] / counts[kept]
        accuracy = np.asarray(bins["correct"])[kept] / counts[kept]
        error = np.abs(np.asarray(bins["confidences"]) - np.asarray(bins["correct"])).sum() / counts.sum()
        axes.plot(confidence, accuracy, color=color, linestyle=dashes, linewidth=1.5, zorder=2)
        axes.scatter(
            confidence, accuracy, 15 + 120 * np.sqrt(counts[kept] / counts.sum()), color=color, marker=marker,
            edgecolors="white", linewidths=0.6, zorder=3,
        )  # fmt: skip
        label = f"{title}: ECE {100 * error:.1f} %"
        axes.plot([], [], color=color, linestyle=dashes, marker=marker, markersize=5, label=label)
        if title == "test data":  # shifts are copies of the same data, of which no count is an interval
            bounds = exact_intervals(summary, np.asarray(bins["correct"])[kept], counts[kept])
            reach = np.abs(bounds.T - accuracy)
            axes.errorbar(confidence, accuracy, reach, fmt="none", ecolor=color, elinewidth=1, capsize=2.5, zorder=2)
        said.append(label)
    axes.set(xlim=(0, 1.03), ylim=(0, 1.03), xlabel="confidence", ylabel="accuracy", title=name, aspect="equal")
    axes.grid(color="0.9", linewidth=0.6)
    axes.legend(loc="upper left", fontsize=9, frameon=True, framealpha=0.9)
    return said


def exact_intervals(summary: Summary, hits: Sequence[float] | Array, counts: Sequence[float] | Array) -> Array:
    """Of proportions of the test data over all seeds, ``[bins, 2]``: as of so many data as the seeds do not share."""
    share = unshared(summary)
    pairs = [
        intervals.proportion(share * a, share * n, intervals.CONFIDENCE) for a, n in zip(hits, counts, strict=True)
    ]
    return np.array(pairs).reshape(-1, 2)


def _bins(summary: Summary, name: str) -> dict[str, dict[str, Any]]:
    """Bins of the test data, and those of all shifts of severity 3 (or without degrees) and 5, added."""
    bins_of = {"test data": summary["test"]["curves"][name]["reliability"]}
    for title, severities in (("shifts, severity 3", (3, None)), ("shifts, severity 5", (5,))):
        curves = [e["curves"][name]["reliability"] for e in summary["shifts"] if e["severity"] in severities]
        bins = added(curves) if curves else {"counts": [0]}
        if sum(bins["counts"]):  # none of a method that failed there
            bins_of[title] = bins
    return bins_of


def bins_note() -> str:
    """How reliability diagrams are made."""
    return (
        f"{N_BINS} equal-width bins; those with fewer than {SMALLEST_BIN} data are left out; bars are exact "
        f"{100 * intervals.CONFIDENCE:.0f} % intervals on the test data"
    )


def by_class(summary: Summary) -> Table:
    """Top-label and classwise reliability of the network and the candidate; no rows if the records have none."""
    names, sections = summary["task"]["classes"], []
    for method in dict.fromkeys([MAP, by_role(summary, "candidate")]):
        curves = summary["test"].get("curves", {}).get(method, {})
        if "top_label" not in curves:
            continue
        top, each = (
            {part: np.asarray(column) for part, column in curves[k].items()} for k in ("top_label", "classwise")
        )
        worst = np.argsort(-np.abs(top["confidences"] - top["correct"]), kind="stable")[:N_CLASSES]
        rows = [
            [
                names[c] if names else str(c),
                f"{top['counts'][c]:,}",
                *_against(summary, top, c),
                *_against(summary, each, c),
            ]
            for c in sorted(worst)
        ]
        sections.append((str(method), rows))
    return Table(
        "By class, test data",
        "Predicted: how often a class is the most probable one, and with which mean confidence it is right how often "
        "(top-label calibration); then its mean probability on all data, and how often it is the target (classwise). "
        "With exact 95 % intervals of the frequencies, one by one: of twenty, one leaves out the mean probability "
        f"({OUTSIDE}) by chance. At most {N_CLASSES} classes, those with most of the miscalibration.",
        ["class", "predicted", "confidence %", "right %", "mean probability %", "is target %"],
        sections,
    )


def _against(summary: Summary, bins: Mapping[str, Array], index: int) -> list[str]:
    """Mean probability, and frequency with its interval, of one class."""
    count, said, hits = (float(bins[part][index]) for part in ("counts", "confidences", "correct"))
    if not count:
        return ["", ""]
    (low, high), mean = exact_intervals(summary, [hits], [count])[0], said / count
    text, low_text, high_text = (number(value, 1, scale=100) for value in (hits / count, low, high))
    mark = "" if low <= mean <= high else f" {OUTSIDE}"
    return [number(mean, 1, scale=100), f"{text} [{low_text}, {high_text}]{mark}"]
