"""What a posterior makes of networks that are the same function with other weights, and what tuning undoes.

    python eval/invariance.py [--quick] [--docs docs]

Small networks with two hidden layers, trained on scikit-learn's digits, in float64, all training data. One is rescaled:
a layer before a ReLU by a and the weights after it by 1/a; every unit of that layer by a factor of its own; or what
lies before normalisation layers, whose statistics and constants follow. Outputs stay the same to rounding. Compared are
the output variances of test data, before and after, by the mean absolute logarithm of their ratios: at the same prior
precision, and each tuned anew, with one number or one for each block. Writes ``<docs>/records/invariance.json``, and
fills ``docs/theory.md`` between ``<!-- invariance -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from documents import fill, markdown
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.evaluation.records import environment, read_json, write_json
from debiased_laplace.evaluation.shipped import digits
from debiased_laplace.evaluation.shipped.common import train

SEEDS, WIDTH, EPOCHS, N_TEST = 3, 12, 15, 100


def network(
    normalisation: Callable[[int], nn.Module], n_inputs: int = 64, width: int = WIDTH, n_outputs: int = 10
) -> nn.Sequential:
    """Two hidden layers, each with a normalisation or none before its ReLU, in float64."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(n_inputs, width), normalisation(width), nn.ReLU(), nn.Linear(width, width),
        normalisation(width), nn.ReLU(), nn.Linear(width, n_outputs),
    ).double()  # fmt: skip


@torch.no_grad()
def of_units(model: nn.Sequential, factors: Tensor) -> nn.Sequential:
    """The same function: every unit of the first hidden layer times a positive factor of its own, undone after it."""
    model = copy.deepcopy(model)
    first, second = model[1], model[4]
    first.weight *= factors[:, None]
    first.bias *= factors
    second.weight /= factors
    return model


@torch.no_grad()
def before_normalisation(model: nn.Sequential, factor: float) -> nn.Sequential:
    """The same function: both linear layers before a normalisation times a factor, whose statistics follow."""
    model = copy.deepcopy(model)
    for linear, norm in ((model[1], model[2]), (model[4], model[5])):
        linear.weight *= factor
        linear.bias *= factor
        norm.eps *= factor**2
        if isinstance(norm, nn.BatchNorm1d):
            norm.running_mean *= factor
            norm.running_var *= factor**2
    return model


def lognormal(model: nn.Sequential) -> nn.Sequential:
    """Units with factors of their own, whose logarithms are standard normal."""
    generator = torch.Generator().manual_seed(0)
    return of_units(model, torch.randn(WIDTH, generator=generator, dtype=torch.float64).exp())


#: Normalisation of the network, and what is made of it.
RESCALINGS: dict[str, tuple[Callable[[int], nn.Module], Callable[[nn.Sequential], nn.Sequential]]] = {
    **{
        f"ReLU layer, {a:g} and 1/{a:g}": (
            lambda _: nn.Identity(), lambda model, a=a: of_units(model, torch.full((WIDTH,), a, dtype=torch.float64))
        )
        for a in (2.0, 4.0, 16.0)
    },
    "ReLU units, each its own": (lambda _: nn.Identity(), lognormal),
    "before LayerNorm, 4": (nn.LayerNorm, lambda model: before_normalisation(model, 4.0)),
    "before BatchNorm, 4": (nn.BatchNorm1d, lambda model: before_normalisation(model, 4.0)),
}  # fmt: skip
STRUCTURES: dict[str, Callable[[], dict[str, Any]]] = {
    "K-FAC": lambda: {"structure": dl.Kronecker()},
    "K-FAC, biases apart": lambda: {"structure": dl.Kronecker(), "separate_bias": True},
    "diagonal, biases apart": lambda: {"structure": dl.Diagonal(), "separate_bias": True},
    "full": lambda: {"structure": dl.Full()},
}
#: How the prior precision is chosen; "several" is one for each block.
TUNINGS = ("untuned", "one, evidence", "one, validation", "several, evidence", "several, validation")


def tuned(posterior: dl.Laplace, tuning: str, validation: list[tuple[Tensor, Tensor]]) -> dl.Laplace:
    """A posterior with its prior precision chosen."""
    if tuning == "untuned":
        return posterior
    number, by = tuning.split(", ")
    settings = {"prior_structure": "scalar" if number == "one" else "layerwise"}
    if by == "evidence":
        return posterior.tune(**settings)
    return posterior.tune(validation, link="probit", temperature=False, selection="best", **settings)


def measured(model: nn.Sequential, parts: digits.DigitsSplit, structure: str) -> dict[str, tuple[Tensor, float]]:
    """Log output variances of test data, and the test loss, for every tuning that the structure has."""
    train_data, validation, (inputs, targets) = ((x.double(), y) for x, y in parts)
    posterior = dl.fit(
        model, [train_data], "classification", sampler=dl.UniformSampler(None), split=dl.Single(),
        **STRUCTURES[structure](),
    )  # fmt: skip
    result = {}
    for tuning in TUNINGS[: 3 if structure == "full" else None]:
        prediction = tuned(posterior, tuning, [validation]).predict(inputs[:N_TEST])
        loss = -prediction.probabilities.log().gather(1, targets[:N_TEST, None]).mean()
        result[tuning] = prediction.logits_variance.log(), float(loss)
    return result


def trained(
    normalisation: Callable[[int], nn.Module], parts: digits.DigitsSplit, seed: int, epochs: int
) -> nn.Sequential:
    """A network of a seed."""
    torch.manual_seed(seed)
    model = network(normalisation)
    images, targets = parts.train[0].double(), parts.train[1]
    batches = itertools.chain.from_iterable(torch.randperm(len(images)).split(64) for _ in range(epochs))
    train(model, images, targets, F.cross_entropy, batches, torch.optim.Adam(model.parameters(), 1e-2))
    return model.eval()


def measure(seeds: int, epochs: int) -> dict[str, Any]:
    """Distances and test losses of every seed."""
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        parts, known = digits.split(seed), {}
        for name, (normalisation, rescale) in RESCALINGS.items():
            if normalisation not in known:
                model = trained(normalisation, parts, seed, epochs)
                known[normalisation] = model, {one: measured(model, parts, one) for one in STRUCTURES}
            model, before = known[normalisation]
            other = rescale(model)
            x = parts.test[0].double()
            off = float((other(x) - model(x)).abs().max() / model(x).abs().max())
            for structure in STRUCTURES:
                after = measured(other, parts, structure)
                for tuning, (variances, loss) in after.items():
                    was, loss_before = before[structure][tuning]
                    distance = float((variances - was).abs().mean())
                    rows.append({"seed": seed, "rescaling": name, "structure": structure, "tuning": tuning,
                                 "distance": distance, "loss": loss, "loss_before": loss_before,
                                 "outputs": off})  # fmt: skip
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["rescaling"], row["structure"], row["tuning"]), []).append(row)
    return {
        "environment": environment(torch.device("cpu")), "seeds": seeds, "outputs": max(row["outputs"] for row in rows),
        "cells": [
            {"rescaling": rescaling, "structure": structure, "tuning": tuning,
             **{what: [float(f"{row[what]:.5g}") for row in of_cell] for what in ("distance", "loss", "loss_before")}}
            for (rescaling, structure, tuning), of_cell in groups.items()
        ],
    }  # fmt: skip


def number(values: list[float]) -> str:
    """Mean and standard error; zero to rounding as such."""
    if max(values) < 1e-6:
        return "0"
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def table(record: Mapping[str, Any]) -> str:
    """The distances as Markdown."""
    cells = {(c["rescaling"], c["structure"], c["tuning"]): c["distance"] for c in record["cells"]}
    rows = [
        [rescaling, structure,
         *(number(cells[rescaling, structure, one]) if (rescaling, structure, one) in cells else "" for one in TUNINGS)]
        for rescaling in RESCALINGS for structure in STRUCTURES if (rescaling, structure, TUNINGS[0]) in cells
    ]  # fmt: skip
    return markdown(["rescaled", "curvature", *TUNINGS], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true", help="one seed, one rescaling, one curvature")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the marginal likelihood, and of ends of the grid
    if options.quick:
        for name in set(RESCALINGS) - {"before LayerNorm, 4"}:
            del RESCALINGS[name]
        for name in list(STRUCTURES)[1:]:
            del STRUCTURES[name]
    path = options.docs / "records" / "invariance.json"
    write_json(path, measure(*((1, 2) if options.quick else (SEEDS, EPOCHS))))
    fill(options.docs / "theory.md", {"invariance": table(read_json(path))})


if __name__ == "__main__":
    main()
