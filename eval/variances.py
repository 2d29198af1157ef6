"""The README's figure: output variances from 64 data chosen at random, and chosen here, beside those from all of them.

    python eval/variances.py [--draw] [--quick] [--docs docs]

The demonstration's network of seed 0 on scikit-learn's digits, prior precision 1, untuned. The figure shows the first
of 20 draws; the record has the distances of all. Writes ``<docs>/records/variances.json`` and ``<docs>/variances.png``;
with ``--draw`` the figure alone, from the record.
"""

from __future__ import annotations

import argparse
import io
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from documents import save_small
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

import debiased_laplace as dl
from debiased_laplace.evaluation.records import environment, read_json, write_json
from debiased_laplace.evaluation.shipped import digits

TICKS = (300, 600, 1200, 2400)
BUDGET, N_DRAWS, N_INPUTS = 64, 20, 50
METHODS = {
    "random": ("64 random data, single batch", lambda: {"sampler": dl.UniformSampler(BUDGET), "split": dl.Single()}),
    "debiased": ("64 chosen data, debiased", lambda: {"sampler": dl.PrioritySampler(BUDGET)}),
}


def measure(n_draws: int = N_DRAWS) -> dict[str, Any]:
    """Variances of the first draw, and mean absolute log ratios of all draws."""
    parts = digits.split(0)
    model = digits.trained(*parts.train, 0)
    loader = [(x, y) for x, y in zip(*(part.split(128) for part in parts.train), strict=True)]
    inputs = parts.test[0][:N_INPUTS]

    def variances(seed: int, **settings: Any) -> Any:
        fitted = dl.fit(model, loader, "classification", seed=seed, **settings)
        return fitted.predict(inputs).logits_variance.double()

    full = variances(0, sampler=dl.UniformSampler(None))
    record: dict[str, Any] = {
        "environment": environment(inputs.device), "budget": BUDGET, "n_train": len(parts.train[1]),
        "full": full.flatten().tolist(), "methods": {},
    }  # fmt: skip
    for name, (_, settings) in METHODS.items():
        drawn = [variances(seed, **settings()) for seed in range(n_draws)]
        distances = [float((one / full).log().abs().mean()) for one in drawn]
        record["methods"][name] = {
            "first": drawn[0].flatten().tolist(), "distances": distances, "mean": statistics.fmean(distances),
            "error": statistics.stdev(distances) / n_draws**0.5,
        }  # fmt: skip
    return record


def figure_of(record: Mapping[str, Any]) -> Figure:
    """Two panels with the same axes; on the line the variances are those of all the data."""
    figure = Figure(figsize=(8, 3.9), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    every = record["full"] + [value for of in record["methods"].values() for value in of["first"]]
    limits = 0.8 * min(every), 1.25 * max(every)
    for ax, (name, (title, _)), color in zip(panels, METHODS.items(), ("#b5483a", "#2b6cb0"), strict=True):
        ax.plot(limits, limits, color="black", linewidth=0.8)
        ax.plot(record["full"], record["methods"][name]["first"], ".", color=color, markersize=4, alpha=0.6)
        ax.set(xscale="log", yscale="log", xlim=limits, ylim=limits, title=title, aspect="equal")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_locator(NullLocator())
            axis.set_major_locator(FixedLocator(TICKS))
            axis.set_major_formatter(FormatStrFormatter("%d"))
        ax.set_xlabel(f"output variance, from all {record['n_train']} training data")
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    panels[0].set_ylabel("output variance, from 64 of them")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two draws")
    options = parser.parse_args()
    docs, path = options.docs, options.docs / "records" / "variances.json"
    if not options.draw:
        write_json(path, measure(2 if options.quick else N_DRAWS))
    record = read_json(path)
    image = io.BytesIO()
    figure = figure_of(record)
    figure.set_dpi(110)
    FigureCanvasAgg(figure).print_png(image)
    save_small(image.getvalue(), docs / "variances.png")
    print({name: (of["mean"], of["error"]) for name, of in record["methods"].items()})


if __name__ == "__main__":
    main()
