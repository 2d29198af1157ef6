"""Filtered gradients and self-tuning steps (``FilteredSGD``) beside tuned first-order methods and Newton-CG.

    python eval/filtered.py [--part cost quadratic gradients training] [--quick] [--docs docs]
    python eval/filtered.py --draw [--docs docs]

Four parts: what a step costs in gradients; a noisy quadratic; how far filtered gradients are from those of all the
data; training of the small CNN on scikit-learn's digits. Methods are compared at equal cost, counted in gradients of
a batch of the same size, :data:`COST` for a step. Rates are tuned on a seed that is not shown. Writes
``<docs>/records/filtered.json``, fills ``<docs>/steps.md``, and draws ``<docs>/steps-filtered.png``; parts that are
not asked for stay as they are in the record.
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from documents import fill, markdown, save_small
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from networks import digits_cnn
from torch import Tensor, nn

from debiased_laplace.evaluation.records import environment, read_json, write_json
from debiased_laplace.evaluation.report.drawing import STYLES
from debiased_laplace.evaluation.shipped import digits
from debiased_laplace.quadratic.optim import DebiasedNewtonCG, FilteredSGD
from debiased_laplace.quadratic.quadratic import Quadratic

Batch = tuple[Tensor, Tensor]
Step = Callable[[Batch], None]
Make = Callable[..., Step]

BATCH, DIMENSIONS, CG_STEPS = 64, 20, 10
#: Of a step, in gradients of its batch. A product with a Hessian counts as two, and so do two derivatives along a
#: direction, which is less than they take (part ``cost``); of halves each is half.
COST = {"SGD": 1, "SGD with momentum": 1, "Adam": 1, "filtered, fixed step": 3, "filtered, fixed step, debiased": 2,
        "self-tuning": 5, "self-tuning, debiased": 3, "Newton-CG, debiased": 1 + 2 * CG_STEPS}  # fmt: skip
#: Among which a rate is tuned: of the quadratic, of the network. The others need none.
RATES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "SGD": ((1e-4, 3e-4, 1e-3, 1.5e-3), (0.03, 0.1, 0.3, 1.0)),
    "SGD with momentum": ((3e-5, 1e-4, 3e-4, 1e-3), (0.01, 0.03, 0.1, 0.3)),
    "Adam": ((0.03, 0.1, 0.3, 1.0), (1e-3, 3e-3, 1e-2, 3e-2)),
    "filtered, fixed step": ((1e-3, 1.5e-3), (0.1, 0.3, 1.0)),
    "filtered, fixed step, debiased": ((1e-3, 1.5e-3), (0.1, 0.3, 1.0)),
    "Newton-CG, debiased": ((0.3, 1.0), (0.1, 0.3)),
}


def first_order(model: nn.Module, likelihood: str, optimizer: torch.optim.Optimizer) -> Step:
    """A step by ``.grad``."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if likelihood == "classification":
            return F.cross_entropy(outputs, targets)
        return 0.5 * (outputs - targets).square().sum(1).mean()

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def stepper(name: str, model: nn.Module, likelihood: str, rate: float | None) -> Step:
    """A method's step on a model."""
    lr = 1.0 if rate is None else rate
    if name.startswith(("SGD", "Adam")):
        moved = model.parameters()
        adam, momentum = name == "Adam", 0.9 if "momentum" in name else 0.0
        optimizer = torch.optim.Adam(moved, lr) if adam else torch.optim.SGD(moved, lr, momentum=momentum)
        return first_order(model, likelihood, optimizer)
    if name.startswith("Newton"):
        damping = 0.1 if likelihood == "classification" else 0.0
        newton = DebiasedNewtonCG(model, likelihood, lr, n_steps=CG_STEPS, damping=damping, tolerance=1e-8)
        return lambda batch: void(newton.step(batch))
    options: dict[str, Any] = {"self_tuning": "self" in name, "debiased": "debiased" in name}
    filtered = FilteredSGD(model, likelihood, lr, **options)
    return lambda batch: void(filtered.step(batch))


def void(_: object) -> None:
    """Nothing."""


# -- what a step costs -------------------------------------------------------------------------------


def cost(quick: bool) -> dict[str, Any]:
    """Processor time of a step over that of a gradient of the same batch, medians of several rounds in turn."""
    data, rounds = digits.split(0).train, 2 if quick else 15
    batch = data[0][:BATCH], data[1][:BATCH]
    times: dict[str, list[float]] = {}
    methods = [name for name in COST if name not in ("SGD with momentum", "Newton-CG, debiased")]
    steps = {name: stepper(name, seeded(0), "classification", 1e-3) for name in methods}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            start = time.process_time()
            step(batch)
            times.setdefault(name, []).append(time.process_time() - start)
    medians = {name: float(np.median(seconds[2:])) for name, seconds in times.items()}
    return {name: short(seconds / medians["SGD"]) for name, seconds in medians.items()}


# -- a noisy quadratic -------------------------------------------------------------------------------


class NoisyQuadratic(nn.Module):
    r"""The loss :math:`\frac12 (\theta - \xi)^\top H (\theta - \xi)`, :math:`\xi \sim N(0, I)`, as least squares."""

    def __init__(self) -> None:
        super().__init__()
        self.curvatures = torch.logspace(0, 3, DIMENSIONS, dtype=torch.float64)
        self.position = nn.Parameter(torch.full((DIMENSIONS,), 3.0, dtype=torch.float64))

    def forward(self, xi: Tensor) -> Tensor:
        """Outputs ``[N, D]``, whose targets are zero."""
        return (self.position - xi) * self.curvatures.sqrt()

    @torch.no_grad()
    def excess(self) -> float:
        """Expected loss above that of the minimum."""
        return float(0.5 * (self.curvatures * self.position.square()).sum())


def quadratic(quick: bool) -> dict[str, Any]:
    """Excess loss at the end, and on the way."""
    budget, seeds, tuning = (22, 2, 1) if quick else (500, 4, 1)

    def run(name: str, rate: float | None, seed: int) -> list[float]:
        model, generator = NoisyQuadratic(), torch.Generator().manual_seed(seed)
        step, curve = stepper(name, model, "regression", rate), [NoisyQuadratic().excess()]
        zeros = torch.zeros(16, DIMENSIONS, dtype=torch.float64)
        for _ in range(budget // COST[name]):
            try:
                step((torch.randn(16, DIMENSIONS, generator=generator, dtype=torch.float64), zeros))
            except ValueError:  # not finite
                return [*curve, math.inf]
            curve.append(model.excess())
        return curve

    result: dict[str, Any] = {"budget": budget, "methods": {}}
    for name in COST:
        rates = RATES.get(name, ((None,), (None,)))[0]
        worst = [max(run(name, rate, 100 + seed)[-1] for seed in range(tuning)) for rate in rates]
        rate = rates[int(np.nanargmin(worst))]
        curves = [run(name, rate, seed) for seed in range(seeds)]
        ends = [curve[-1] for curve in curves]
        stride = max(1, 20 // COST[name])
        result["methods"][name] = {
            "rate": rate, "ends": [short(x) for x in ends],
            "median": [short(x) for x in np.median([curve[::stride] for curve in curves], 0)], "stride": stride,
        }  # fmt: skip
        print(name, rate, np.quantile(ends, (0.25, 0.5, 0.75)), flush=True)
    return result


# -- how far filtered gradients are from those of all the data ---------------------------------------


def seeded(seed: int) -> nn.Module:
    """A fresh network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return digits_cnn()


def drawn(data: Batch, seed: int) -> Iterator[Batch]:
    """Batches with replacement."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        index = torch.randint(len(data[0]), (BATCH,), generator=generator)
        yield data[0][index], data[1][index]


def gradient(model: nn.Module, batch: Batch) -> Tensor:
    """Of the mean loss, ``[D]``."""
    gradients = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients]).double()


def trained(data: Batch, epochs: int) -> nn.Module:
    """The CNN after a training by Adam."""
    model = seeded(0)
    step = stepper("Adam", model, "classification", 3e-3)
    for batch, _ in zip(drawn(data, 12345), range(epochs * len(data[0]) // BATCH), strict=False):
        step(batch)
    return model


def gradients(quick: bool) -> dict[str, Any]:
    """Squared errors over that of the gradient of 64 data, and over what the filter believes."""
    data, result = digits.split(0).train, {}
    n_steps, n_seeds, skip = (4, 1, 1) if quick else (30, 3, 10)
    starts = {"early": (trained(data, 2), 0.1), "trained": (trained(data, 2 if quick else 40), 0.1)}
    for start, (model, rate) in starts.items():
        for mode in ("one batch", "debiased", "second batch"):
            ratios: dict[str, list[float]] = {}
            for seed in range(n_seeds):
                moved = copy.deepcopy(model)
                optimizer = FilteredSGD(moved, "classification", rate, self_tuning=False, debiased=mode == "debiased")
                errors: dict[str, list[float]] = {}
                batches, others, average = drawn(data, seed), drawn(data, 1000 + seed), None
                for _ in range(n_steps):
                    batch = next(batches)
                    truth, plain = gradient(moved, data), gradient(moved, batch)
                    average = plain if average is None else 0.9 * average + 0.1 * plain
                    optimizer.step(batch, next(others) if mode == "second batch" else None)
                    mean, variance = optimizer.filtered_gradient
                    now = {"plain": plain, "filtered": mean.double(), "average": average}
                    for name, estimate in now.items():
                        errors.setdefault(name, []).append(float((estimate - truth).square().sum()))
                    errors.setdefault("believed", []).append(variance * len(mean))
                sums = {name: sum(values[skip:]) for name, values in errors.items()}
                for name in ("filtered", "average"):
                    ratios.setdefault(name, []).append(short(sums[name] / sums["plain"]))
                ratios.setdefault("over believed", []).append(short(sums["filtered"] / sums["believed"]))
            result[f"{start}, {mode}"] = ratios
            print(start, mode, ratios, flush=True)
    return result


# -- training ----------------------------------------------------------------------------------------


@torch.no_grad()
def scores(model: nn.Module, data: Batch) -> tuple[float, float]:
    """Mean loss and accuracy."""
    outputs = model(data[0])
    return float(F.cross_entropy(outputs, data[1])), float((outputs.argmax(-1) == data[1]).double().mean())


def detached(model: nn.Module) -> dict[str, Tensor]:
    """The parameters."""
    return {name: p.detach() for name, p in model.named_parameters()}


def loss_of_datum(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Of one datum under other parameters."""
    return F.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None])


def look(model: nn.Module, parts: Any) -> dict[str, float]:
    """Losses; curvature of all training data along their gradient, and the variance of a datum's gradient."""
    every = Quadratic(model, parts.train, "classification", "hessian")
    direction = every.gradient / every.gradient.norm()
    of_datum = torch.func.vmap(torch.func.grad(partial(loss_of_datum, model)), (None, 0, 0))
    spread = torch.cat([g.flatten(1) for g in of_datum(detached(model), *parts.train).values()], 1)
    numbers = {
        "train loss": every.loss, "curvature": float(every.curvature(direction)),
        "noise": float(spread.var(0).sum()), "validation loss": scores(model, parts.validation)[0],
    }  # fmt: skip
    numbers["test loss"], numbers["test accuracy"] = scores(model, parts.test)
    return {name: short(value) for name, value in numbers.items()}


def train(name: str, rate: float | None, seed: int, parts: Any, budget: int, looks: int) -> list[dict[str, float]]:
    """What is seen after equal parts of the budget."""
    model = seeded(seed)
    step, batches = stepper(name, model, "classification", rate), drawn(parts.train, seed)
    curve: list[dict[str, float]] = []
    spent = 0
    for share in range(1, looks + 1):
        while spent + COST[name] <= budget * share / looks:
            try:
                step(next(batches))
            except ValueError:  # not finite
                return [*curve, {"validation loss": math.inf, "spent": spent}]
            spent += COST[name]
        curve.append(look(model, parts) | {"spent": spent})
    return curve


def training(quick: bool) -> dict[str, Any]:
    """All methods at equal cost."""
    parts = digits.split(0)
    budget, seeds, tuning, looks = (22, 1, 1, 1) if quick else (300, 4, 1, 5)
    result: dict[str, Any] = {"budget": budget, "methods": {}}
    for name in COST:
        if name in ("SGD", "filtered, fixed step, debiased"):
            continue
        rates = RATES.get(name, ((None,), (None,)))[1]
        rate = rates[0]
        if len(rates) > 1:
            worst = [
                max(train(name, rate, 100 + seed, parts, budget, 1)[-1]["validation loss"] for seed in range(tuning))
                for rate in rates
            ]
            rate = rates[int(np.nanargmin(worst))]
        curves = [train(name, rate, seed, parts, budget, looks) for seed in range(seeds)]
        result["methods"][name] = {"rate": rate, "curves": curves}
        print(name, rate, [curve[-1] for curve in curves], flush=True)
    return result


# -- the record, the document and the figure ---------------------------------------------------------

PARTS = {"cost": cost, "quadratic": quadratic, "gradients": gradients, "training": training}


def short(number: float) -> float:
    """Five digits."""
    return float(f"{number:.5g}")


def mean(values: list[float], digits_shown: int) -> str:
    """With its standard error."""
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits_shown}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits_shown}f}{error}"


def rate_of(about: Mapping[str, Any]) -> str:
    """Or a dash."""
    return "-" if about["rate"] is None else f"{about['rate']:g}"


def parts_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of ``steps.md``."""
    quadratic_rows = []
    for name, about in sorted(record["quadratic"]["methods"].items(), key=lambda item: np.median(item[1]["ends"])):
        low, median, high = np.quantile(about["ends"], (0.25, 0.5, 0.75))
        steps = record["quadratic"]["budget"] // COST[name]
        quadratic_rows.append([name, rate_of(about), f"{steps}", f"{median:.3g}", f"{low:.3g}, {high:.3g}"])
    gradient_rows = [
        [name, *(mean(ratios[key], 2) for key in ("filtered", "average", "over believed"))]
        for name, ratios in record["gradients"].items()
    ]
    training_rows = []
    for name, about in record["training"]["methods"].items():
        ends = [curve[-1] for curve in about["curves"]]
        time_of = record["cost"].get(name)
        columns = {"train loss": 4, "test loss": 3, "test accuracy": 3, "curvature": 2, "noise": 2}
        training_rows.append([
            name, rate_of(about), f"{COST[name]}", "-" if time_of is None else f"{time_of:.1f}",
            *(mean([end[key] for end in ends], shown) for key, shown in columns.items()),
        ])  # fmt: skip
    return {
        "filtered quadratic": markdown(["method", "tuned lr", "steps", "median", "quartiles"], quadratic_rows),
        "filtered gradients": markdown(
            ["network, curvature from", "filtered", "running average", "filtered over believed"], gradient_rows
        ),
        "filtered training": markdown(
            ["method", "tuned lr", "cost, counted", "cost, processor", "train loss", "test loss", "test accuracy",
             "curvature", "noise"],
            training_rows,
        ),
    }  # fmt: skip


def figure_of(record: Mapping[str, Any]) -> Figure:
    """The quadratic, training, and the noise that it meets."""
    figure = Figure((11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    styles = {name: style for name, style in zip(COST, [*STYLES, *STYLES], strict=False)}
    for name, about in record["quadratic"]["methods"].items():
        color, _, dashes = styles[name]
        x = np.arange(len(about["median"])) * about["stride"] * COST[name]
        left.plot(x, about["median"], color=color, linestyle=dashes, label=name)
    for name, about in record["training"]["methods"].items():
        color, _, dashes = styles[name]
        for axes, key in ((middle, "train loss"), (right, "noise")):
            values = np.array([[point[key] for point in curve] for curve in about["curves"] if key in curve[-1]])
            if len(values):
                x = [point["spent"] for point in about["curves"][0]]
                axes.plot(x, np.median(values, 0), color=color, linestyle=dashes, label=name)
    left.set(yscale="log", ylabel="excess loss, median", title="noisy quadratic", xlabel="gradients")
    middle.set(yscale="log", ylabel="training loss, median", title="digits", xlabel="gradients")
    right.set(yscale="log", ylabel="variance of a datum's gradient", title="digits", xlabel="gradients")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--draw", action="store_true", help="tables and figure alone, from the record")
    parser.add_argument("--quick", action="store_true", help="everything, a little")
    options = parser.parse_args()
    path = options.docs / "records" / "filtered.json"
    record = read_json(path) if path.exists() else {}
    for name in [] if options.draw else options.part:
        record[name] = PARTS[name](options.quick)
        record["environment"] = environment(torch.device("cpu"))
        write_json(path, record)
    fill(options.docs / "steps.md", parts_of(record))
    image, figure = io.BytesIO(), figure_of(record)
    FigureCanvasAgg(figure).print_png(image)
    save_small(image.getvalue(), options.docs / "steps-filtered.png")


if __name__ == "__main__":
    main()
