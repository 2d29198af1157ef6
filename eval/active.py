"""Active learning: labels that the posterior's mutual information asks for, against entropy and chance.

    python eval/active.py --data-dir <folder> [--tasks digits fashion-mnist] [--seeds 5]

A network is trained from scratch on the labels that are there and asks for more of the pool, again and again. Records,
one for each seed and way to ask, are in ``<out>/active``; what is there already is used. ``<docs>/records/active.json``
has what the page shows, ``<docs>/active.png`` the curves, and the marked part of ``<docs>/beyond.md`` is filled.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from documents import fill, markdown, save_small
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from results import rounded
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.evaluation.predictors import edges
from debiased_laplace.evaluation.predictors.prediction import mutual_information
from debiased_laplace.evaluation.records import environment, read_json, read_record, write_json, write_record
from debiased_laplace.evaluation.report.numbers import plus_minus, with_interval
from debiased_laplace.evaluation.scores.intervals import CONFIDENCE, student_quantile
from debiased_laplace.evaluation.shipped import digits, fashion_mnist
from debiased_laplace.evaluation.shipped.common import initialised, mnist_folder, one_thread, read_mnist, scaled, train
from debiased_laplace.likelihoods import square_root

RANDOM, ENTROPY = "random", "entropy, network"
#: Ways to ask that have a posterior: its prior precision where nothing is tuned, its structure, and what is asked for.
POSTERIORS: dict[str, tuple[float | None, dl.Structure, str]] = {
    "entropy, posterior": (None, dl.Kronecker(), "entropy"),
    "information": (None, dl.Kronecker(), "information"),
    "information, drawn": (None, dl.Kronecker(), "drawn"),
    "information, identity": (None, dl.Isotropic(), "information"),
    "information, prior precision 20": (20.0, dl.Kronecker(), "information"),
}
WAYS = (RANDOM, ENTROPY, *POSTERIORS)
#: Labels at the start, and how many of these tune posteriors; draws of the outputs; candidates that are looked at.
N_START = 40
N_VALIDATION = 20
N_DRAWS = 100
N_CANDIDATES = 500
BATCH = 32
#: Prior precisions that are tried; curvature is a sum over few labels, and the largest make it vanish beside them.
GRID = torch.logspace(-3, 7, 41, dtype=torch.float64)


@dataclass(frozen=True)
class Setting:
    """What differs between the tasks.

    Attributes:
        network: Its architecture.
        optimizer: For its parameters.
        epochs: Passes through the labels that are there: enough for a training loss near zero, however few they are.
        added: Labels asked for in a round.
        rounds: How often.
        level: Accuracy of which the labels that it takes are counted.
    """

    network: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    epochs: int
    added: int
    rounds: int
    level: float


SETTINGS = {
    "digits": Setting(digits.network, lambda of: torch.optim.Adam(of, digits.LEARNING_RATE), 25, 20, 7, 0.95),
    "fashion-mnist": Setting(
        fashion_mnist.network,
        lambda of: torch.optim.AdamW(of, 5e-3, weight_decay=fashion_mnist.WEIGHT_DECAY),
        60, 40, 3, 0.65,
    ),
}  # fmt: skip
#: Of the training images of Fashion-MNIST, others for each seed; and of its test images, the first.
N_POOL = 5000
N_TEST = 4000


@lru_cache(maxsize=2)
def data(task: str, seed: int, data_dir: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and labels of a pool and of test data."""
    if task == "digits":
        parts = digits.split(seed)
        return *parts.train, *(torch.cat(both) for both in zip(parts.validation, parts.test, strict=True))
    folder = mnist_folder("FashionMNIST", data_dir, Path("eval/results/cache"))
    (images, labels), (test, answers) = read_mnist(folder, "train"), read_mnist(folder, "t10k")
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:N_POOL]
    return scaled(images[chosen]), labels[chosen], scaled(test[:N_TEST]), answers[:N_TEST]


@lru_cache(maxsize=64)
def trained(task: str, seed: int, data_dir: Path | None, chosen: tuple[int, ...]) -> nn.Module:
    """A network from scratch; ways that have asked for the same labels share it."""
    setting, (inputs, targets, _, _) = SETTINGS[task], data(task, seed, data_dir)
    index = torch.tensor(chosen)
    model, generator = initialised(setting.network, seed), torch.Generator().manual_seed(seed)
    passes = (torch.randperm(len(index), generator=generator) for _ in range(setting.epochs))
    batches = (batch for order in passes for batch in order.split(BATCH))
    with one_thread():
        train(model, inputs[index], targets[index], F.cross_entropy, batches, setting.optimizer(model.parameters()))
    return model.eval()


def probabilities(posterior: dl.Laplace, inputs: Tensor, seed: int) -> Tensor:
    """Of draws of the linearised network's outputs, ``[M, N, C]``, float64."""
    prediction = posterior.predict(inputs, covariance=True)
    assert prediction.outputs_covariance is not None
    tau, covariance = posterior.output_temperature, prediction.outputs_covariance.double()
    normals = torch.randn(N_DRAWS, covariance.shape[1], generator=torch.Generator().manual_seed(seed))
    drawn = prediction.outputs_mean.double() + torch.einsum("ncd,md->mnc", square_root(covariance), normals.double())
    return (drawn / tau).softmax(-1)


def fitted(
    model: nn.Module, known: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor] | None, way: str, seed: int
) -> dl.Laplace:
    """The posterior of a way to ask, tuned on the held-out labels unless its prior precision is given."""
    prior, structure, _ = POSTERIORS[way]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # twenty labels often determine no prior precision
        if prior is not None:
            return dl.fit(model, [known], "classification", structure=structure, seed=seed, prior_precision=prior)
        fit = dl.fit(model, [known], "classification", structure=structure, seed=seed)
        return fit.tune([held], prior_precisions=GRID)


def scores(way: str, model: nn.Module, posterior: dl.Laplace | None, inputs: Tensor, seed: int) -> Tensor:
    """How much the label of each candidate is wanted, ``[N]``; the largest are asked for, all at once."""
    generator = torch.Generator().manual_seed(seed)
    if way == RANDOM:
        return torch.rand(len(inputs), generator=generator)
    if posterior is None:
        with torch.no_grad():
            return torch.special.entr(model(inputs).double().softmax(-1)).sum(-1)
    drawn = probabilities(posterior, inputs, seed)
    if POSTERIORS[way][2] == "entropy":
        return torch.special.entr(drawn.mean(0)).sum(-1)
    information = mutual_information(drawn)
    if POSTERIORS[way][2] == "drawn":  # without replacement, in proportion to it (Kirsch et al., arXiv 2106.12059)
        uniform = torch.rand(len(inputs), generator=generator).double()
        return information.clamp_min(1e-12).log() - (-uniform.log()).log()
    return information


def curve(task: str, way: str, seed: int, rounds: int, data_dir: Path | None) -> dict[str, list[Any]]:
    """Labels, test accuracy and training loss, round after round; of a posterior what is tuned, and what is at an end.

    Posteriors that are tuned are those of a network that has not seen the labels that they are tuned on; what is judged
    is trained on all labels, whatever the way to ask.
    """
    setting, (inputs, targets, test, answers) = SETTINGS[task], data(task, seed, data_dir)
    generator = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(len(targets), generator=generator)
    known, pool = order[:N_START], order[N_START:]
    tuned = way in POSTERIORS and POSTERIORS[way][0] is None
    record: dict[str, list[Any]] = {key: [] for key in ("labels", "accuracy", "loss", "prior", "temperature", "ends")}
    for number in range(rounds + 1):
        model = trained(task, seed, data_dir, tuple(known.tolist()))
        with torch.no_grad():
            right = torch.cat([model(part).argmax(1) for part in test.split(1000)]) == answers
            record["loss"].append(float(F.cross_entropy(model(inputs[known]), targets[known])))
        record["labels"].append(len(known))
        record["accuracy"].append(float(right.double().mean()))
        if number == rounds:
            return record
        candidates = torch.randperm(len(pool), generator=generator)[:N_CANDIDATES]
        posterior = None
        if way in POSTERIORS:
            fit, held = known[N_VALIDATION if tuned else 0 :], known[:N_VALIDATION]
            if tuned:
                model = trained(task, seed, data_dir, tuple(fit.tolist()))
            posterior = fitted(model, (inputs[fit], targets[fit]), (inputs[held], targets[held]), way, seed)
            record["prior"].append(float(posterior.posterior.prior_precision[0]))
            record["temperature"].append(posterior.output_temperature)
            if tuned:
                record["ends"].append(edges.of_posterior(posterior, GRID))
        wanted = scores(way, model, posterior, inputs[pool[candidates]], 1000 * seed + number)
        chosen = candidates[wanted.topk(setting.added).indices]
        known = torch.cat([known, pool[chosen]])
        pool = pool[~torch.isin(torch.arange(len(pool)), chosen)]
    raise AssertionError("unreachable")


def labels_needed(labels: Sequence[int], accuracy: Sequence[float], level: float) -> float:
    """Labels with which a level was first reached, interpolated between rounds; the last number if it never was.

    Example:
        >>> labels_needed([20, 30, 40], [0.5, 0.7, 0.9], 0.8)
        35.0
    """
    best = np.maximum.accumulate(accuracy)
    if best[-1] < level:
        return float(labels[-1])
    after = int(np.argmax(best >= level))
    if after == 0:
        return float(labels[0])
    share = (level - best[after - 1]) / (best[after] - best[after - 1])
    return float(labels[after - 1] + share * (labels[after] - labels[after - 1]))


def paired(values: Sequence[float]) -> list[float]:
    """Mean over seeds, standard error, and Student's 95 % interval."""
    array = np.asarray(values)
    error = float(array.std(ddof=1)) / len(array) ** 0.5 if len(array) > 1 else float("inf")
    reach = student_quantile(len(array), CONFIDENCE) * error if len(array) > 1 else float("inf")
    return [float(array.mean()), error, float(array.mean()) - reach, float(array.mean()) + reach]


def summarised(curves: Mapping[str, Sequence[Mapping[str, Any]]], level: float) -> dict[str, Any]:
    """Labels needed and mean accuracy of every way, and their differences to chance and to the network's entropy."""
    needed = {way: [labels_needed(one["labels"], one["accuracy"], level) for one in of] for way, of in curves.items()}
    mean = {way: [float(np.mean(one["accuracy"])) for one in of] for way, of in curves.items()}

    def less(of: Mapping[str, list[float]], way: str, second: str) -> list[float]:
        return paired([a - b for a, b in zip(of[way], of[second], strict=True)])

    return {
        way: {
            "needed": paired(needed[way]), "reached": sum(max(one["accuracy"]) >= level for one in of),
            "mean": paired(mean[way]),
            "minus": {second: [less(needed, way, second), less(mean, way, second)] for second in (RANDOM, ENTROPY)},
        }
        for way, of in curves.items()
    }  # fmt: skip


def measure(task: str, options: argparse.Namespace) -> dict[str, Any]:
    """All curves of a task."""
    setting, curves = SETTINGS[task], dict[str, list[dict[str, Any]]]()
    rounds = options.rounds or setting.rounds
    for seed in range(options.seeds):
        for way in dict.fromkeys((RANDOM, ENTROPY, *options.ways)):
            made_from = {
                "task": task, "way": way, "seed": seed, "rounds": rounds, "epochs": setting.epochs,
                "grid": [float(GRID[0]), float(GRID[-1]), len(GRID)], "added": setting.added, "batch": BATCH,
                "test": N_TEST, "optimizer": repr(setting.optimizer([torch.zeros(1, requires_grad=True)])),
            }  # fmt: skip
            path = options.out / "active" / f"{task}.{way.replace(', ', '-').replace(' ', '-')}.{seed}.{rounds}.json"
            record = read_record(path, made_from)
            if record is None:
                print(f"{task}, seed {seed}: {way}", file=sys.stderr, flush=True)
                record = made_from | {"curve": curve(task, way, seed, rounds, options.data_dir)}
                write_record(path, record)
            curves.setdefault(way, []).append(record["curve"])
    return {
        "seeds": options.seeds, "level": setting.level, "epochs": setting.epochs, "labels": curves[RANDOM][0]["labels"],
        "ways": summarised(curves, setting.level),
        "accuracy": {way: [one["accuracy"] for one in of] for way, of in curves.items()},
        "loss": {way: [one["loss"] for one in of] for way, of in curves.items()},
        "prior": {way: [one["prior"] for one in of] for way, of in curves.items() if of[0]["prior"]},
        "temperature": {way: [one["temperature"] for one in of] for way, of in curves.items() if of[0]["prior"]},
        "ends": {
            way: [[f"{what} {side}" for what, side in found.items()] for one in of for found in one["ends"]]
            for way, of in curves.items() if way in POSTERIORS and POSTERIORS[way][0] is None
        },
    }  # fmt: skip


def table(record: Mapping[str, Any]) -> str:
    """A row for each task and way to ask."""
    rows = []
    for task, of in record.items():
        for way, found in of["ways"].items():
            label = plus_minus(found["needed"], 0)
            if found["reached"] < of["seeds"]:
                label += f" ({found['reached']} of {of['seeds']} reach it)"
            differences = [
                (with_interval(labels, 0), with_interval(accuracy, 1, scale=100))
                for labels, accuracy in found["minus"].values()
            ]
            shown = [
                pair if way != second else ("", "") for pair, second in zip(differences, found["minus"], strict=True)
            ]
            rows.append(
                [
                    f"{task}, {100 * of['level']:.0f} %", way, label, shown[0][0], shown[1][0],
                    plus_minus(found["mean"], 1, scale=100), shown[0][1], shown[1][1],
                    *(at_the_end(of["ends"].get(way, ()), what) for what in ("prior precision", "temperature")),
                ]
            )  # fmt: skip
    return markdown(
        ["task, level", "asks by", "labels needed", "minus random", "minus network's entropy", "mean accuracy %",
         "minus random", "minus network's entropy", "prior at an end", "temperature at an end"], rows
    )  # fmt: skip


def at_the_end(ends: Sequence[Sequence[str]], what: str) -> str:
    """In how many rounds a setting was at which end of its search, of those in which it was tuned."""
    counts = {side: sum(f"{what} {side}" in of for of in ends) for side in edges.MARK}
    found = ", ".join(f"{n} {edges.MARK[side]}" for side, n in counts.items() if n)
    return f"{found or 0} of {len(ends)}" if ends else ""


PICTURE = "\n\n![Test accuracy against the number of labels, a panel for each task, a line for each way](active.png)"
COLORS = ("#777777", "#d08700", "#6b4fa0", "#2b6cb0", "#5aa9e6", "#b5483a", "#2f855a")


def figure_of(record: Mapping[str, Any]) -> Figure:
    """Mean accuracy over seeds against labels, a panel for each task."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for ax, (task, of) in zip(np.atleast_1d(figure.subplots(1, len(record))), record.items(), strict=True):
        for (way, curves), color in zip(of["accuracy"].items(), COLORS, strict=False):
            ax.plot(of["labels"], 100 * np.mean(curves, 0), "o-", color=color, markersize=3, label=way)
        ax.axhline(100 * of["level"], color="black", linewidth=0.6, linestyle=":")
        ax.set(title=f"{task}, mean of {of['seeds']} seeds", xlabel="labels", ylabel="test accuracy, %")
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated part of the page, from the record."""
    return {"active": table({task: record[task] for task in SETTINGS if task in record}) + PICTURE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=None, help="by default what the tasks say")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="the first two always")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    path = options.docs / "records" / "active.json"
    for task in options.tasks:
        record = read_json(path) if path.exists() else {}
        write_json(
            path, record | {"environment": environment(torch.device("cpu")), task: rounded(measure(task, options))}
        )
    record = read_json(path)
    image, figure = io.BytesIO(), figure_of({task: record[task] for task in SETTINGS if task in record})
    figure.set_dpi(110)
    FigureCanvasAgg(figure).print_png(image)
    save_small(image.getvalue(), options.docs / "active.png")
    fill(options.docs / "beyond.md", parts(record))


if __name__ == "__main__":
    main()
