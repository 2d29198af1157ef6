"""How far the network is from its linearisation under the posterior, as layers widen: one figure.

    python eval/width.py [--draw] [--quick] [--docs docs]

Networks with two hidden layers of one width, in the standard parametrisation (torch's initialisation, whose weights
have variances of one over their inputs, up to a constant), trained with Adam on scikit-learn's digits without weight
decay.
Weights are drawn from the K-FAC posterior of all training data, and the outputs of the network at these weights are
compared with those of its linearisation at the same weights. The prior precision is one, the width (as the
initialisation has it), that of the largest marginal likelihood, or that of validation data (the default of ``tune``).
Writes ``<docs>/records/width.json`` and ``<docs>/width.png``, and fills ``docs/theory.md`` between ``<!-- width -->``
and ``<!-- end -->``; with ``--draw`` from the record.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from documents import fill, markdown, save_small
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor, nn
from torch.func import functional_call, jvp

import debiased_laplace as dl
from debiased_laplace.evaluation.records import environment, read_json, write_json
from debiased_laplace.evaluation.shipped import digits
from debiased_laplace.evaluation.shipped.common import train

WIDTHS, SEEDS, EPOCHS, N_SAMPLES, N_TEST = (16, 64, 256, 1024), 3, 15, 10, 200
PRIORS = {"one": "prior precision 1", "width": "prior precision = width",
          "evidence": "tuned by the marginal likelihood", "validation": "tuned on validation data"}  # fmt: skip
GRID = torch.logspace(-2, 7, 109, dtype=torch.float64)
COLORS = ("#7a7a7a", "#2f855a", "#b5483a", "#2b6cb0")


def trained(width: int, parts: digits.DigitsSplit, seed: int) -> nn.Sequential:
    """A network of a width and a seed."""
    torch.manual_seed(seed)
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    model, (images, targets) = nn.Sequential(nn.Flatten(), *layers), parts.train
    batches = itertools.chain.from_iterable(torch.randperm(len(images)).split(64) for _ in range(EPOCHS))
    train(model, images, targets, F.cross_entropy, batches, torch.optim.Adam(model.parameters(), 2e-3))
    return model.eval()


def with_prior(fitted: dl.Laplace, precision: float) -> dl.Laplace:
    """The same posterior at another prior precision."""
    prior = torch.tensor([precision], dtype=torch.float64)
    return replace(fitted, posterior=replace(fitted.posterior, prior_precision=prior))


def both_outputs(model: nn.Module, posterior: dl.Laplace, inputs: Tensor, n_samples: int) -> tuple[Tensor, Tensor]:
    """Outputs ``[n_samples, N, C]`` of the network at drawn weights, and of its linearisation at the same weights."""
    mean = {name: p.detach() for name, p in model.named_parameters() if name in posterior.network.shapes}
    deviations = posterior.posterior.deviations(n_samples, torch.Generator().manual_seed(0))
    sampled, linearised = [], []
    for deviation in deviations:
        tangent = {name: value.to(mean[name]) for name, value in posterior.network.from_vector(deviation).items()}
        moved = {name: mean[name] + tangent[name] for name in mean}
        sampled.append(functional_call(model, moved, (inputs,)).detach())
        value, change = jvp(lambda p: functional_call(model, p, (inputs,)), (mean,), (tangent,))
        linearised.append((value + change).detach())
    return torch.stack(sampled), torch.stack(linearised)


def compared(model: nn.Module, posterior: dl.Laplace, inputs: Tensor, targets: Tensor, n_samples: int) -> Any:
    """Remainder of the linearisation over what it says, distance of mean probabilities, and losses of both."""
    with torch.no_grad():
        outputs = model(inputs)
    sampled, linearised = both_outputs(model, posterior, inputs, n_samples)
    probabilities = [drawn.softmax(-1).mean(0) for drawn in (sampled, linearised)]
    losses = [-p.clamp_min(1e-30).log().gather(1, targets[:, None]).mean() for p in probabilities]
    remainder = (sampled - linearised).double().square().mean() / (linearised - outputs).double().square().mean()
    numbers = {
        "precision": posterior.posterior.prior_precision[0], "remainder": remainder.sqrt(),
        "total_variation": (probabilities[0] - probabilities[1]).abs().sum(-1).mean() / 2,
        "deviation": (linearised - outputs).square().mean().sqrt(), "loss_network": F.cross_entropy(outputs, targets),
        "loss_sampled": losses[0], "loss_linearised": losses[1],
    }  # fmt: skip
    return {name: float(f"{float(value):.5g}") for name, value in numbers.items()}


def measure(widths: tuple[int, ...], seeds: int, n_samples: int) -> dict[str, Any]:
    """All widths, priors and seeds."""
    rows = []
    for width, seed in itertools.product(widths, range(seeds)):
        parts = digits.split(seed)
        model = trained(width, parts, seed)
        fitted = dl.fit(model, [parts.train], "classification", sampler=dl.UniformSampler(None), split=dl.Single())
        posteriors = {
            "one": fitted, "width": with_prior(fitted, width), "evidence": fitted.tune(),
            "validation": fitted.tune([parts.validation], prior_precisions=GRID),
        }  # fmt: skip
        inputs, targets = parts.test[0][:N_TEST], parts.test[1][:N_TEST]
        for prior, posterior in posteriors.items():
            row = {"width": width, "seed": seed, "prior": prior}
            rows.append(row | compared(model, posterior, inputs, targets, n_samples))
            print(rows[-1], flush=True)
    return {"environment": environment(torch.device("cpu")), "n_samples": n_samples, "n_test": N_TEST, "rows": rows}


def of(record: Mapping[str, Any], prior: str, what: str) -> dict[int, tuple[float, float]]:
    """Mean and standard error over seeds for every width."""
    result = {}
    for width in sorted({row["width"] for row in record["rows"]}):
        values = [row[what] for row in record["rows"] if (row["width"], row["prior"]) == (width, prior)]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        result[width] = statistics.fmean(values), error
    return result


def table(record: Mapping[str, Any]) -> str:
    """Narrowest, a middle and the widest network."""
    widths = sorted({row["width"] for row in record["rows"]})
    rows = []
    for prior, label in PRIORS.items():
        for width in dict.fromkeys((widths[0], widths[len(widths) // 2], widths[-1])):
            numbers = {what: of(record, prior, what)[width] for what in record["rows"][0] if what not in
                       ("width", "seed", "prior")}  # fmt: skip
            found = [row for row in record["rows"] if (row["width"], row["prior"]) == (width, prior)]
            precision = statistics.median(row["precision"] for row in found)
            cells = [
                "{:.2f} ± {:.2f}".format(*numbers[what])
                for what in ("remainder", "total_variation", "loss_network", "loss_linearised", "loss_sampled")
            ]
            rows.append([label, str(width), f"{precision:.3g}", *cells])
    columns = [
        "prior",
        "width",
        "median precision",
        "remainder",
        "total variation",
        "loss, network",
        "linearised",
        "sampled",
    ]
    return markdown(columns, rows)


def figure_of(record: Mapping[str, Any]) -> Figure:
    """Remainder and distance of probabilities over the width, with standard errors."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"remainder": "remainder over the linear part", "total_variation": "total variation of predictions"}
    for ax, (what, title) in zip(panels, titles.items(), strict=True):
        for (prior, label), color in zip(PRIORS.items(), COLORS, strict=True):
            values = of(record, prior, what)
            means, errors = zip(*values.values(), strict=True)
            ax.errorbar(list(values), means, errors, label=label, color=color, marker="o", markersize=3, capsize=2)
        ax.set(xscale="log", yscale="log" if what == "remainder" else "linear", title=title,
               xlabel="width of both hidden layers")  # fmt: skip
        ax.set_xticks(list(values), [str(width) for width in values])
        ax.xaxis.set_minor_locator(NullLocator())
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    panels[1].set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two narrow networks, one seed")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the marginal likelihood
    path = options.docs / "records" / "width.json"
    if not options.draw:
        write_json(path, measure(WIDTHS[:2], 1, 3) if options.quick else measure(WIDTHS, SEEDS, N_SAMPLES))
    record, image = read_json(path), io.BytesIO()
    figure = figure_of(record)
    figure.set_dpi(110)
    FigureCanvasAgg(figure).print_png(image)
    save_small(image.getvalue(), options.docs / "width.png")
    fill(options.docs / "theory.md", {"width": table(record)})


if __name__ == "__main__":
    main()
