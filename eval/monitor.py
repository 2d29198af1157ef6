"""What a monitor of the curvature of mini-batches sees of a training, against all the data, and what it costs.

    python eval/monitor.py [--data-dir <folder>] [--out eval/results/monitor] [--quick] [--draw] [--docs docs]

Trains the network of the task ``digits`` with Adam on batches of 64, with a measurement every 20 steps; every 40 steps
the same quantities are had from four other batches and all the training data. Then the same training with and without a
monitor, by processor time, and single measurements on two networks. Writes ``<docs>/records/monitor.json`` and
``<docs>/monitor.png``, and fills ``<docs>/monitor.md``; with ``--draw`` the latter two alone, from the record. Parts
that are finished are kept in ``--out``.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from documents import fill, markdown, save_small
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from debiased_laplace.evaluation.records import environment, read_json, write_json
from debiased_laplace.evaluation.shipped import digits, fashion_mnist
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.quadratic.instruments import (
    Along,
    alignment,
    directional_bias,
    product_noise,
    signal_to_noise,
    suggest_batch_size,
)
from debiased_laplace.quadratic.monitor import SCALARS, Monitor
from debiased_laplace.quadratic.quadratic import Quadratic

BATCH, LEARNING_RATE, DIRECTIONS, TOLERANCE = 64, 1e-3, 3, 0.1
SEEDS, STEPS, EVERY, REFERENCE_EVERY, REFERENCE_BATCHES = 3, 240, 20, 40, 4
COST_STEPS, BUDGETS = 2000, (0.05, 0.2)
TITLES = {
    "bias": "bias: curvature on the batch that\nchose the directions / on another",
    "alignment": "alignment of the directions\nof two batches",
    "slope_snr": "signal-to-noise ratio of\nslopes, one datum",
    "curvature_snr": "signal-to-noise ratio of\ncurvatures, one datum",
    "suggested_batch_size": "batch size for a bias\nof at most 10 %",
}


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], steps: int, seed: int, *, size: int = BATCH,
    after: Callable[[int, tuple[Tensor, Tensor]], Any] | None = None,
) -> None:  # fmt: skip
    """With Adam, on whole batches in a random order of every epoch."""
    inputs, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    step = 0
    while step < steps:
        for index in torch.randperm(len(labels), generator=generator).split(size)[: len(labels) // size]:
            batch = inputs[index], labels[index]
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            step += 1
            if after is not None:
                after(step, batch)
            if step == steps:
                return


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return digits.network()


# -- what it sees ----------------------------------------------------------------------------------


def of_all_data(model: nn.Module, data: tuple[Tensor, Tensor], seed: int) -> dict[str, float]:
    """The monitor's quantities, with all the data in the place of the batch that is measured on."""
    snapshot, n = Snapshot.of(model), len(data[1])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1000 + seed))
    parts = [(data[0][index], data[1][index]) for index in order.split(BATCH)[:REFERENCE_BATCHES]]
    batches = [Quadratic(snapshot, part, "classification") for part in parts]
    whole = Quadratic(snapshot, data, "classification")
    curvatures = directional_bias(batches, whole, DIRECTIONS, population=n).curvatures
    share = BATCH / n
    others = (curvatures.reference - share * curvatures.own) / (1 - share)  # all data but those of the batch
    directions = [batch.eigenpairs(DIRECTIONS)[1] for batch in batches]
    overlaps = [
        float(alignment(one, two).row_sums.mean()) for i, one in enumerate(directions) for two in directions[:i]
    ]
    snr = [signal_to_noise(batch, DIRECTIONS, whole) for batch in batches]
    values, of_whole = whole.eigenpairs(DIRECTIONS)
    noise = product_noise(batches, of_whole, n, across=True)
    return {
        "bias": float(Along(curvatures.batches, others).typical_ratio_own.value),
        "alignment": statistics.fmean(overlaps),
        "slope_snr": statistics.median(torch.cat([each.slope_snr for each in snr]).tolist()),
        "curvature_snr": statistics.median(torch.cat([each.curvature_snr for each in snr]).tolist()),
        "suggested_batch_size": statistics.median(suggest_batch_size(TOLERANCE, values, noise).predicted.tolist()),
        "loss": whole.loss,
    }


def observe(seed: int, steps: int) -> dict[str, Any]:
    """A training with its monitor and the references."""
    data, model = digits.split(seed).train, network(seed)
    monitor = Monitor(
        model, "classification", every=EVERY, budget=None, n_directions=DIRECTIONS, tolerance=TOLERANCE,
        clock=time.process_time,
    )  # fmt: skip
    references: list[dict[str, float]] = []

    def after(step: int, batch: tuple[Tensor, Tensor]) -> None:
        monitor.step(batch)
        if step % REFERENCE_EVERY == 0:
            references.append({"step": step} | of_all_data(model, data, seed))

    train(model, data, steps, seed, after=after)
    history = [{name: entry[name] for name in ("step", *SCALARS)} for entry in monitor.history]
    return {"history": history, "references": references}


def agreement(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the monitor with the references: mean log ratio, its standard error over seeds, spread of one measurement."""
    result = {}
    for name in SCALARS:
        logs = []
        for run in runs:
            values = {entry["step"]: entry[name] for entry in run["history"]}
            pairs = [(values[reference["step"]], reference[name]) for reference in run["references"]]
            logs.append([math.log(value / true) for value, true in pairs if value and 0 < true < math.inf])
        means, every = (
            [statistics.fmean(of_run) for of_run in logs if of_run],
            [log for of_run in logs for log in of_run],
        )
        result[name] = {
            "mean": statistics.fmean(means), "error": statistics.stdev(means) / len(means) ** 0.5,
            "spread": statistics.stdev(every), "n": len(every), "of": sum(len(run["references"]) for run in runs),
        }  # fmt: skip
    return result


# -- what it costs ---------------------------------------------------------------------------------


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def budgets(steps: int) -> list[dict[str, Any]]:
    """Processor time of one training with a monitor over that without one, and what the monitor says of it."""
    data = digits.split(0).train
    train(network(0), data, 20, 0)  # what is imported first
    without = seconds_of(lambda: train(network(0), data, steps, 0))
    rows = []
    for budget in BUDGETS:
        model = network(0)
        monitor = Monitor(
            model, "classification", every=100, budget=budget, n_directions=DIRECTIONS, clock=time.process_time
        )
        seconds = seconds_of(lambda m=model, t=monitor: train(m, data, steps, 0, after=lambda _, batch: t.step(batch)))
        rows.append({
            "budget": budget, "ratio": seconds / without - 1, "cost": monitor.cost,
            "measurements": len(monitor.history),
        })  # fmt: skip
    return rows


def single(folder: Path | None) -> list[dict[str, Any]]:
    """One measurement in steps of the training, by network and number of directions."""
    cases = {"digits": (network(0), digits.split(0).train, BATCH)}
    if folder is not None:
        torch.manual_seed(0)
        loader = fashion_mnist.train_loader(cache=folder, data_dir=folder, quick=True)
        inputs, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        cases["Fashion-MNIST, LeNet"] = fashion_mnist.network(), (inputs, labels), 128
    rows = []
    for name, (model, data, size) in cases.items():
        train(model, data, 60, 0, size=size)
        step = seconds_of(lambda m=model, d=data, s=size: train(m, d, 20, 0, size=s)) / 20
        three = [(data[0][i * size : (i + 1) * size], data[1][i * size : (i + 1) * size]) for i in range(3)]
        steps = {}
        for n_directions in (DIRECTIONS, 1, DIRECTIONS, 5):  # the first one imports
            monitor = Monitor(model, "classification", every=3, n_directions=n_directions, clock=time.process_time)
            for batch in three:
                monitor.step(batch)
            steps[str(n_directions)] = monitor.history[0]["seconds"] / step
        rows.append({"network": name, "parameters": sum(p.numel() for p in model.parameters()), "batch": size} | steps)
    return rows


# -- record, document, figure ----------------------------------------------------------------------


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What was measured, or is now."""
    if not path.exists():
        write_json(path, make())
    return read_json(path)


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def factor(log: float, error: float) -> str:
    return f"{math.exp(log):.2f} ± {math.exp(log) * error:.2f}"


def parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of ``docs/monitor.md``."""
    agree = [
        [f"`{name}`", factor(of["mean"], of["error"]), f"{math.exp(of['spread']):.2f}", f"{of['n']} of {of['of']}"]
        for name, of in record["agreement"].items()
    ]
    single = [
        [of["network"], f"{of['parameters']:,}", str(of["batch"]), *(f"{of[k]:.0f}" for k in ("1", "3", "5"))]
        for of in record["single"]
    ]
    budget = [
        [
            f"{100 * of['budget']:.0f} %",
            f"{of['measurements']:.0f}",
            f"{100 * of['cost']:.1f} %",
            f"{100 * of['ratio']:.1f} %",
        ]
        for of in record["budgets"]
    ]
    return {
        "agreement": markdown(
            ["value", "monitor over all data, geometric mean", "one measurement scatters by a factor of", "measured"],
            agree,
        ),
        "single": markdown(
            ["network", "parameters", "batch", "1 direction", "3 directions", "5 directions"], single
        ),
        "budgets": markdown(
            ["budget", f"measurements in {record['cost_steps']:,} steps", "as the monitor says", "over one without it"],
            budget,
        ),
    }  # fmt: skip


def figure_of(record: Mapping[str, Any]) -> Figure:
    """The run of the first seed."""
    figure = Figure(figsize=(11, 2.9), layout="constrained")
    names = ("bias", "alignment", "slope_snr", "suggested_batch_size")
    run = record["runs"][0]
    for axes, name in zip(figure.subplots(1, 4), names, strict=True):
        steps, values = zip(
            *((entry["step"], entry[name]) for entry in run["history"] if entry[name] is not None), strict=True
        )
        axes.plot(steps, values, "o-", color="#0072B2", markersize=3.5, linewidth=0.8, label="monitor")
        axes.plot(
            [entry["step"] for entry in run["references"]], [entry[name] for entry in run["references"]], "P",
            color="black", markersize=6, label="all data",
        )  # fmt: skip
        axes.set_title(TITLES[name], fontsize=9)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(color="0.9", linewidth=0.6)
        if name in ("slope_snr", "suggested_batch_size"):
            axes.set_yscale("log")
        if name == "slope_snr":  # below it is noise
            axes.axhline(1 / record["batch"], color="0.5", linestyle="--", linewidth=0.8)
        if name == "alignment":
            axes.set_ylim(0, 1.02)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with FashionMNIST/raw; without it digits alone")
    parser.add_argument("--out", type=Path, default=Path("eval/results/monitor"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two short trainings")
    options = parser.parse_args()
    path = options.docs / "records" / "monitor.json"
    if not options.draw:
        torch.set_num_threads(1)
        n_seeds, steps, cost_steps = (2, 60, 120) if options.quick else (SEEDS, STEPS, COST_STEPS)
        runs = [kept(options.out / f"{seed}-{steps}.json", lambda s=seed: observe(s, steps)) for seed in range(n_seeds)]
        folder = None if options.quick else options.data_dir
        record = {
            "environment": environment(torch.device("cpu")), "batch": BATCH, "directions": DIRECTIONS, "every": EVERY,
            "batches": REFERENCE_BATCHES, "cost_steps": cost_steps, "runs": runs, "agreement": agreement(runs),
            "single": kept(options.out / "single.json", lambda: single(folder)),
            "budgets": kept(options.out / f"budgets-{cost_steps}.json", lambda: budgets(cost_steps)),
        }  # fmt: skip
        write_json(path, rounded(record))
    record = read_json(path)
    fill(options.docs / "monitor.md", parts(record))
    image = io.BytesIO()
    figure = figure_of(record)
    figure.set_dpi(110)
    FigureCanvasAgg(figure).print_png(image)
    save_small(image.getvalue(), options.docs / "monitor.png")
    print("\n\n".join(parts(record).values()))


if __name__ == "__main__":
    main()
