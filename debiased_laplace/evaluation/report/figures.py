"""Figures of a summary. Infinite and undefined values are not drawn, and said."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from debiased_laplace.evaluation.methods import MAP, TEMPERATURE, TEMPERATURE_RULE, is_variant
from debiased_laplace.evaluation.report.drawing import STYLES, Picture, finite, legend, png, tiled
from debiased_laplace.evaluation.report.numbers import number, plus_minus
from debiased_laplace.evaluation.report.verdicts import Summary, by_role, shifts


def style(summary: Summary) -> dict[str, tuple[str, str, Any]]:
    """A colour, a marker and a dash pattern for every method, the same in all figures."""
    return {name: STYLES[index % len(STYLES)] for index, name in enumerate(drawn(summary))}


def drawn(summary: Summary) -> list[str]:
    """Methods in figures: tables alone have further single batches, and methods tuned by another rule."""
    return [name for name in summary["test"]["scores"] if not is_variant(name)]


def deciding(summary: Summary) -> list[str]:
    """Of these the network, temperatures, and posteriors that have a role."""
    points, about = (MAP, TEMPERATURE, TEMPERATURE_RULE), summary["predictors"]
    return [name for name in drawn(summary) if name in points or about[name]["role"]] or drawn(summary)


def pictures(summary: Summary) -> list[Picture]:
    """The figures that show what the numbers that decide are made of."""
    makers = (_severity, _calibration_curve, _out_of_distribution, _distances)
    return [picture for maker in makers if (picture := maker(summary)) is not None]


def reliability_png(summary: Summary, diagrams: Mapping[str, Picture]) -> bytes:
    """All reliability diagrams, or calibration curves of a regression, in one image.

    Args:
        summary: Of a regression what is drawn.
        diagrams: From :func:`~debiased_laplace.evaluation.report.reliability.reliability_pictures`, so that they are
            drawn once.
    """
    if summary["regression"]:
        picture = _calibration_curve(summary)
        assert picture is not None
        return picture.png
    return tiled([diagram.png for diagram in diagrams.values()], 3)


def _severity(summary: Summary) -> Picture | None:
    """Loss and calibration error against severity, a panel for each shift."""
    by_shift = {name: entries for name, entries in shifts(summary).items() if len(entries) > 1}
    if not by_shift:
        return None
    styles = {name: look for name, look in style(summary).items() if name in deciding(summary)}
    zero, candidate = TEMPERATURE if TEMPERATURE in styles else next(iter(styles)), by_role(summary, "candidate")
    last = "RMSE" if summary["regression"] else "ECE"
    rows: list[tuple[str, Callable[[Any, str], float]]] = [
        ("NLL, nats", lambda entry, name: entry["scores"][name]["nll"][0]),
        (
            f"NLL minus that of\n{zero}",
            lambda entry, name: entry["scores"][name]["nll"][0] - entry["scores"][zero]["nll"][0],
        ),
        ("RMSE", lambda entry, name: entry["scores"][name]["rmse"][0])
        if summary["regression"]
        else ("ECE, %", lambda entry, name: 100 * entry["scores"][name]["ece"][0]),
    ]
    figure = Figure(figsize=(max(5.5, 2.75 * len(by_shift)), 7.4), layout="constrained")
    panels = figure.subplots(len(rows), len(by_shift), squeeze=False)
    missing: list[str] = []
    for row, (label, value) in zip(panels, rows, strict=True):
        for panel, (name, entries) in zip(row, by_shift.items(), strict=True):
            at_severities = [summary["test"], *entries]
            places = [0, *(entry["severity"] for entry in entries)]
            for method, (color, marker, dashes) in styles.items():
                if method == MAP and "minus" in label:
                    continue  # so far off that it would hide all others
                values = finite([value(entry, method) for entry in at_severities])
                if np.isnan(values).any() and "minus" not in label:
                    missing.append(f"{label.partition(',')[0]} of {method} on {name}")
                width = 2.6 if method == candidate else 1.3
                panel.plot(places, values, color=color, linestyle=dashes, marker=marker, markersize=4, linewidth=width)
            panel.grid(color="0.9", linewidth=0.6)
            panel.set_xticks(places)
        row[0].set_ylabel(label)
    for top, bottom, name in zip(panels[0], panels[-1], by_shift, strict=True):
        top.set_title(name, fontsize=10)
        bottom.set_xlabel("severity")
    legend(figure, styles)
    with np.errstate(invalid="ignore"):
        worst = {
            method: np.mean([e[-1]["scores"][method]["nll"][0] for e in by_shift.values()]) for method in styles
        }  # fmt: skip
    listed = ", ".join(f"{method} {number(float(value), 2)}" for method, value in worst.items())
    return Picture(
        "How scores change under shift",
        "Severity 0 is the test data"
        + (f", the thick line {candidate}" if candidate else "")
        + "; every panel has its own scale, and intervals are in the tables."
        + (f" Not all finite, and not drawn where they are not: {', '.join(missing)}." if missing else ""),
        f"NLL and {last} against severity for the shifts {', '.join(by_shift)}. Mean NLL at the highest severity: "
        f"{listed}.",
        png(figure),
        wide=True,
    )  # fmt: skip


def risk_coverage(summary: Summary) -> Picture | None:
    """Error rate against the share of the data that is answered."""
    if summary["regression"]:
        return None
    styles = style(summary)
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for name, (color, _, dashes) in styles.items():
        curve = summary["test"]["curves"][name]
        axes.plot(curve["coverage"], 100 * np.asarray(curve["risk"]), color=color, linestyle=dashes, linewidth=1.5)
    axes.set(xlabel="share of the data that is answered, most confident first", ylabel="errors among them, %")
    axes.set(xlim=(0, 1), ylim=(0, None))
    axes.grid(color="0.9", linewidth=0.6)
    legend(figure, {name: (color, "", dashes) for name, (color, _, dashes) in styles.items()})
    areas = ", ".join(f"{n} {plus_minus(summary['test']['scores'][n]['aurc'], 2, scale=100)} %" for n in styles)
    return Picture(
        "Answering only when confident", "Test data. Lower is better; the area under the line is AURC.",
        f"Error rate against coverage. Areas under the lines: {areas}.", png(figure),
    )  # fmt: skip


def _calibration_curve(summary: Summary) -> Picture | None:
    if not summary["regression"]:
        return None
    styles = {name: look for name, look in style(summary).items() if name in deciding(summary)}
    figure = Figure(figsize=(5.4, 5.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.55", linewidth=1)
    for name, (color, marker, dashes) in styles.items():
        curve = summary["test"]["curves"][name]
        axes.plot(
            curve["expected"], curve["observed"], color=color, linestyle=dashes, marker=marker, markersize=4,
            linewidth=1.4,
        )  # fmt: skip
    axes.set(xlabel="stated probability of the central interval", ylabel="share of targets inside", aspect="equal")
    axes.grid(color="0.9", linewidth=0.6)
    legend(figure, styles)
    listed = ", ".join(f"{n} {plus_minus(summary['test']['scores'][n]['coverage_95'], 1, scale=100)} %" for n in styles)
    return Picture(
        "Do intervals hold what they promise?", "Below the grey diagonal intervals are too narrow, above too wide.",
        f"Observed against stated coverage. At 95 %: {listed}.", png(figure),
    )  # fmt: skip


def _out_of_distribution(summary: Summary) -> Picture | None:
    """Histograms of scores in and out of distribution, for the network and the candidate."""
    candidate = by_role(summary, "candidate")
    if not summary["ood"] or candidate is None:
        return None
    wanted = [(MAP, "maximum probability"), (candidate, "maximum probability"), (candidate, "functional variance")]
    wanted = [(n, s) for n, s in wanted if s in summary["ood"][0]["histograms"].get(n, {})]
    figure = Figure(figsize=(3.3 * len(wanted), 2.6 * len(summary["ood"])), layout="constrained")
    panels = figure.subplots(len(summary["ood"]), len(wanted), squeeze=False)
    for row, entry in zip(panels, summary["ood"], strict=True):
        for panel, (name, score) in zip(row, wanted, strict=True):
            histogram = entry["histograms"][name][score]
            edges = np.asarray(histogram["edges"])
            for key, label, color, hatch in (
                ("known", "in distribution", "#0072B2", ""), ("foreign", "out of distribution", "#D55E00", "////")
            ):  # fmt: skip
                shares = np.asarray(histogram[key]) / max(1, sum(histogram[key]))
                panel.bar(
                    edges[:-1], 100 * shares, np.diff(edges), align="edge", label=label, hatch=hatch, alpha=0.6,
                    facecolor="none" if hatch else color, edgecolor=color, linewidth=0.8,
                )  # fmt: skip
            value = plus_minus(entry["scores"][name][f"{score}, auroc"], 1, scale=100)
            panel.set_title(f"{name}\n{_score(score)}: AUROC {value} %", fontsize=9)
            panel.grid(axis="y", color="0.9", linewidth=0.6)
        row[0].set_ylabel(f"{entry['name']}\nshare of data, %", fontsize=9)
    panels[0][0].legend(fontsize=9)
    names = ", ".join(entry["name"] for entry in summary["ood"])
    return Picture(
        "Are unknown inputs noticed?", "First seed. The further apart the histograms, the better the score tells them.",
        f"Histograms of out-of-distribution scores of test data and of {names}; the AUROC is in the table.",
        png(figure),
        wide=True,
    )  # fmt: skip


def _score(name: str) -> str:
    return "1 \N{MINUS SIGN} maximum probability" if name == "maximum probability" else name


def tuning(summary: Summary) -> Picture | None:
    """Validation loss against prior precision."""
    styles = style(summary)
    curves = {
        name: about["curve"] for name, about in summary["predictors"].items() if "curve" in about and name in styles
    }
    lines = {
        n: curve for n, curve in curves.items() if len(summary["predictors"][n].get("prior_precisions", [[]])[0]) < 2
    }
    lines = {n: line for n, line in lines.items() if np.isfinite(line["losses"]).any()}
    if not lines:
        return None
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    said, ceiling = [], -math.inf
    point = summary["predictors"].get(MAP, {}).get("validation_nll")
    if point is not None and np.isfinite(point).all():
        ceiling = float(np.mean(point))
        axes.axhline(ceiling, color="0.35", linewidth=1)
    for name, curve in lines.items():
        color, marker, dashes = styles.get(name, STYLES[0])
        grid, losses = finite(curve["prior_precisions"]), finite(curve["losses"])
        chosen = np.log(summary["predictors"][name]["prior_precision"]).mean()
        best = int(np.nanargmin(np.where(np.isnan(losses), np.nan, np.abs(np.log(grid) - chosen))))
        axes.plot(
            grid, losses, color=color, linestyle=dashes, linewidth=1.7, marker=marker, markevery=[best], markersize=9,
            markeredgecolor="white",
        )  # fmt: skip
        ceiling = max(ceiling, float(np.nanmin(losses)))
        said.append(f"{name} {losses[best]:.3f} at {grid[best]:.3g}")
    lowest = min(float(np.nanmin(finite(curve["losses"]))) for curve in lines.values())
    room = max(ceiling - lowest, 0.15 * abs(ceiling))
    top = ceiling + 1.5 * room  # far left the losses are huge and say nothing
    inside = [
        x
        for curve in lines.values()
        for x, y in zip(curve["prior_precisions"], curve["losses"], strict=True)
        if y < top
    ]
    axes.set(xscale="log", xlabel="prior precision", ylabel="validation NLL, nats", ylim=(lowest - 0.4 * room, top))
    axes.set(xlim=(min(inside) / 3, max(inside) * 1.5))
    axes.grid(color="0.9", linewidth=0.6)
    legend(figure, {name: styles.get(name, STYLES[0]) for name in lines})
    return Picture(
        "Choosing the prior precision",
        "Mean over seeds, at temperature one; markers: what was chosen, together with the temperature if there is one"
        + ("; the grey line is the network itself." if point is not None else "."),
        f"Validation NLL against prior precision. Chosen: {'; '.join(said)}.", png(figure),
    )  # fmt: skip


def _distances(summary: Summary) -> Picture | None:
    distances = summary["distances"]
    if not distances:
        return None
    styles = style(summary)
    names = [name for name in next(iter(distances.values())) if name != "prior_precision"]
    figure = Figure(figsize=(3.0 * len(distances), 3.2), layout="constrained")
    panels = np.ravel(figure.subplots(1, len(distances), squeeze=False))
    said = []
    for panel, (where, log_ratios) in zip(panels, distances.items(), strict=True):
        for place, name in enumerate(names):
            color, marker, _ = styles[name]
            value = log_ratios[name]["absolute"]
            centre, error = finite(value[:2])
            panel.errorbar(place, centre, error, color=color, marker=marker, markersize=9, capsize=5, linewidth=2)
            said.append(f"{name} {plus_minus(value, 3)} ({where})")
        panel.set_xticks(np.arange(len(names)), [name.replace(" ", "\n", 1) for name in names])
        panel.set_xlim(-0.5, len(names) - 0.5)
        panel.set_ylim(0, None)
        panel.set_title(
            "tuned prior precision" if where == "tuned" else f"prior precision {log_ratios['prior_precision'][0]:g}",
            fontsize=10,
        )
        panel.grid(axis="y", color="0.9", linewidth=0.6)
    panels[0].set_ylabel("mean absolute log ratio")
    return Picture(
        "Distance to the posterior of all training data",
        "How far output variances are from those of the full-data posterior (zero: equal); bars are standard errors.",
        f"Mean absolute log ratio of output variances: {'; '.join(said)}.", png(figure),
    )  # fmt: skip


def shown(summary: Summary) -> list[tuple[str, str, Sequence[dict[str, Any]]]]:
    """The most uncertain inputs: title, predictor and the inputs, for test and out-of-distribution data."""
    entries = [("test data", summary["test"]), *((e["name"], e) for e in summary["ood"])]
    return [
        (title, e["most_uncertain"]["predictor"], e["most_uncertain"]["inputs"])
        for title, e in entries
        if "most_uncertain" in e
    ]
