"""Which parameters matter: sensitivity of layers, posteriors over some parameters, and bits for each layer.

    python eval/sensitivity.py --data-dir <folder> [--tasks digits fashion-mnist] [--only-document] [--docs docs]

What was measured of a seed is kept in ``<out>/sensitivity``, and what is there already is used.
``<docs>/records/sensitivity.json`` has the tables' numbers; ``<docs>/sensitivity.md`` between ``<!-- NAME -->`` and
``<!-- end -->`` and ``<docs>/sensitivity.png`` are made from it. Standard errors are over networks, of one network over
test images.
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from documents import fill, markdown, save_small
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from results import rounded
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace import _data
from debiased_laplace.evaluation.predictors.baselines import tuned_temperature
from debiased_laplace.evaluation.records import environment, read_json, write_json
from debiased_laplace.evaluation.report.numbers import number, plus_minus
from debiased_laplace.evaluation.tasks import Context, Task
from debiased_laplace.fitting.fit import fit
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.posterior.predictive import functional_moments


@dataclass(frozen=True)
class Sizes:
    """Of an experiment: seeds, data for curvature, directions of all parameters, data to score on, if that is done."""

    seeds: int
    budget: int
    rank: int
    validation: int = 300
    test: int = 2000
    shifted: int = 300
    compared: int = 100
    rounded: int = 5000
    scored: bool = True


TASKS = {"digits": Sizes(4, 128, 500), "fashion-mnist": Sizes(1, 256, 500, compared=40, scored=False)}
QUICK = Sizes(1, 32, 50, 60, 60, 30, 20, 200)
SHIFTS, SEVERITIES = ("noise", "rotation", "blur"), (3, 5)
LIKELIHOOD = Categorical()
ALL, LAST, LARGEST, BLOCKS, RANDOM, SMALLEST = (
    "all, K-FAC", "last layer", "largest curvature", "whole blocks", "random", "largest variance",
)  # fmt: skip
PRIORS = torch.logspace(-4, 4, 17, dtype=torch.float64)
BITS, BUDGETS = range(2, 9), (3, 4, 5)
UNIFORM, BY_ERROR, BY_TRACE = "the same for all", "squared error alone", "mean trace"


class Data:
    """What a seed of a task has."""

    def __init__(self, task: Task, context: Context, sizes: Sizes) -> None:
        self.model, self.sizes, self.seed, self.n_data = task.model(context), sizes, context.seed, task.n_data
        self.train = list(task.call("train_loader", context))
        self.validation = [_joined(_data.head(task.call("val_loader", context), sizes.validation))]
        self.test = _joined(_data.head(task.call("test_loader", context), sizes.test))
        shifted = task.call("shifted_loaders", context)
        self.strong = [_joined(_data.head(shifted[s][v], sizes.shifted)) for s in SHIFTS for v in SEVERITIES]

    def fit(self, structure: Any = None, parameters: Any = None, seed: int = 0, **settings: Any) -> dl.Laplace:
        """A posterior of the training data, from a few of them."""
        settings = {"sampler": dl.PrioritySampler(self.sizes.budget)} | settings
        found = fit(
            self.model, self.train, LIKELIHOOD, structure=structure, parameters=parameters, n_data=self.n_data,
            generator=self.seed + seed, **settings,
        )  # fmt: skip
        return dl.Laplace(found, LIKELIHOOD, found.posterior, seed=self.seed)


def _joined(batches: Any) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


# -- layers ----------------------------------------------------------------------------------------


def layers(data: Data) -> list[dict[str, Any]]:
    """Every layer's sensitivity, the largest mean trace first."""
    return [
        {"name": one.name, "size": one.n_params, "trace": one.trace, "mean": one.mean_trace, "largest": one.largest}
        for one in data.fit(sampler=dl.PrioritySampler(4 * data.sizes.budget)).sensitivities()
    ]


# -- posteriors over some parameters ---------------------------------------------------------------


def subnetworks(data: Data) -> dict[str, Any]:
    """Posteriors over as many parameters as the last layer has: how their variances differ from all, and losses."""
    rough, fresh = (data.fit(dl.Diagonal(), seed=seed).posterior for seed in (0, 10_000))
    diagonal, anew = (one.basis.lift(one.curvatures).double() for one in (rough, fresh))
    size = data.fit(parameters="last_layer").network.n_params
    order = diagonal.argsort(descending=True, stable=True)
    permuted = torch.randperm(len(diagonal), generator=torch.Generator().manual_seed(data.seed))
    choices: dict[str, dict[str, Any]] = {
        LAST: {"parameters": "last_layer"},
        LARGEST: {"parameters": dl.by_sensitivity(count=size)},
        BLOCKS: {"parameters": dl.by_sensitivity(count=size, blocks=True)},
        RANDOM: {"indices": permuted[:size].sort().values},
        SMALLEST: {"indices": order[-size:].sort().values},
    }
    everything = tuned(data.fit(), data)
    prior, x = everything.posterior.prior_precision, data.test[0][: data.sizes.compared]
    # The same data in one role for all, so that the parameters are the only difference.
    alone = {"split": dl.Single()}
    reference = variances(data.fit(dl.LowRank(data.sizes.rank), **alone), prior, x)
    posteriors = {name: data.fit(dl.Full(), **choice, **alone) for name, choice in choices.items()}
    network, chosen = posteriors[LARGEST].network, order[:size]
    free = torch.ones(network.n_params) if network.free is None else network.free.double()
    return {
        "size": size,
        "total": len(diagonal),
        "overstated": float(diagonal[chosen].sum() / anew[chosen].sum()),
        "kept": float(anew[chosen].sum() / anew.sum()),
        "of layers": {name: float(part.mean()) for name, part in network.from_vector(free).items()},
        "variances": {
            name: distances(variances(posterior, prior, x), reference)
            for name, posterior in (posteriors | {ALL: data.fit(**alone)}).items()
        },
        "scores": scores(data, choices, everything) if data.sizes.scored else {},
    }


def scores(data: Data, choices: Mapping[str, Mapping[str, Any]], everything: dl.Laplace) -> dict[str, Any]:
    """Losses of tuned posteriors, and differences to that over the entries of the largest curvature."""
    temperature = tuned_temperature(data.model, data.validation)[0]
    losses: dict[str, dict[str, Tensor]] = {}
    for name, factor in (("network", 1.0), ("temperature", temperature)):
        losses[name] = losses_of(data, lambda x, f=factor: (data.model(x) / f).softmax(-1))
    losses[ALL] = losses_of(data, lambda x: everything.predict(x).probabilities)
    for name, choice in choices.items():
        of_choice = tuned(data.fit(dl.Full(), **choice), data)
        losses[name] = losses_of(data, lambda x, of=of_choice: of.predict(x).probabilities)
    return {
        name: {
            where: {"nll": mean_of(of[where]), "minus": mean_of(of[where] - losses[LARGEST][where])} for where in of
        } for name, of in losses.items()
    }  # fmt: skip


def tuned(posterior: dl.Laplace, data: Data) -> dl.Laplace:
    """On the validation data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the ends of the grid
        return posterior.tune(data.validation, prior_precisions=PRIORS)


def losses_of(data: Data, predict: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Of every test image, ``[N]``; under strong shift the mean over all shifts of an image."""
    with torch.no_grad():
        test, *strong = (LIKELIHOOD.log_loss(_predicted(predict, x), y) for x, y in (data.test, *data.strong))
    return {"test": test, "strong": torch.stack(strong).mean(0)}


def _predicted(predict: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    return torch.cat([predict(part).double() for part in inputs.split(250)])


def variances(posterior: dl.Laplace, prior: Tensor, inputs: Tensor) -> Tensor:
    """Of the outputs, ``[N, C]``, at a prior precision."""
    at = replace(posterior.posterior, prior_precision=prior)
    parts = [functional_moments(posterior.network, at, part, covariance=False)[1] for part in inputs.split(50)]
    return torch.cat(parts).double()


def distances(found: Tensor, reference: Tensor) -> dict[str, float]:
    """The share of the variance that is there, and the relative error of the variances times the best number."""
    cosine = float((found * reference).sum() / (found.norm() * reference.norm()).clamp_min(1e-300))
    return {"kept": float(found.sum() / reference.sum()), "error": math.sqrt(max(0.0, 1 - cosine**2))}


# -- bits ------------------------------------------------------------------------------------------


def bits(data: Data) -> dict[str, Any]:
    """Loss that rounded weights add, predicted and measured, where layers have the same bits and others."""
    posterior = data.fit(dl.Diagonal(), sampler=dl.PrioritySampler(4 * data.sizes.budget), separate_bias=True)
    weights = {name: p.detach() for name, p in data.model.named_parameters() if p.ndim > 1}
    mean_trace = {one.parameters[0]: one.mean_trace for one in posterior.sensitivities()}
    curvatures = posterior.network.from_vector(posterior.posterior.basis.lift(posterior.posterior.curvatures))
    n = [weight.numel() for weight in weights.values()]
    errors = np.array([[squared_error(weight, b) for b in BITS] for weight in weights.values()])
    traces = np.array([[mean_trace[name]] for name in weights])
    inputs, targets = _joined(_data.head(data.train, data.sizes.rounded))
    sets = {"train": (inputs, targets), "test": data.test}
    before = {key: loss(data.model, *of) for key, of in sets.items()}
    record: dict[str, Any] = {
        "before": {key: mean_of(of) for key, of in before.items()},
        "layers": list(weights),
        "budgets": {},
    }
    for budget in BUDGETS:
        chosen = {
            UNIFORM: [budget] * len(n), BY_ERROR: allocate(errors, n, budget),
            BY_TRACE: allocate(traces * errors, n, budget),
        }  # fmt: skip
        for way, of_layers in chosen.items():
            model = copy.deepcopy(data.model)
            changes = {name: rounded_to(w, b) - w for (name, w), b in zip(weights.items(), of_layers, strict=True)}
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p += changes.get(name, 0.0)
            added = {key: loss(model, *of) - before[key] for key, of in sets.items()}
            if way == UNIFORM:
                plain = added
            of_way = zip(weights, changes.values(), strict=True)
            record["budgets"].setdefault(str(budget), {})[way] = {
                "bits": of_layers,
                "predicted": 0.5 * sum(mean_trace[name] * float(c.double().square().sum()) for name, c in of_way),
                "by entries": 0.5 * sum(float((curvatures[k] * c.square()).sum()) for k, c in changes.items()),
                "quadratic": quadratic(data.model, changes, inputs[:1000]),
                **{key: mean_of(of) for key, of in added.items()},
                "minus": {key: mean_of(of - plain[key]) for key, of in added.items()},
            }  # fmt: skip
    return record


def rounded_to(weight: Tensor, n_bits: int) -> Tensor:
    """To the nearest of ``2**bits - 1`` numbers at equal distances, zero among them, up to the largest entry."""
    step = weight.abs().max() / (2 ** (n_bits - 1) - 1)
    return (weight / step).round() * step


def squared_error(weight: Tensor, n_bits: int) -> float:
    """Of all entries together."""
    return float((rounded_to(weight, n_bits) - weight).double().square().sum())


def allocate(costs: np.ndarray, sizes: Sequence[int], budget: float) -> list[int]:
    """Bits of every layer with the least sum of costs ``[layers, len(BITS)]``, that many per weight on average.

    HAWQ-V2's choice, solved exactly: one of the numbers for each layer.
    """
    n_layers, n_choices = costs.shape
    one_each = np.kron(np.eye(n_layers), np.ones(n_choices))
    spent = np.kron(np.array(sizes), np.array(BITS))[None]
    solved = milp(
        costs.ravel() / costs.max(), integrality=np.ones(costs.size), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(spent, 0, budget * sum(sizes))],
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    assert solved.success, solved.message
    return [BITS[i] for i in solved.x.reshape(costs.shape).argmax(1)]


def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Of every datum, ``[N]``, in nats."""
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in inputs.split(500)])
    return LIKELIHOOD.loss(outputs.double(), targets)


def mean_of(values: Tensor) -> list[float]:
    """And its standard error over data."""
    return [float(values.mean()), float(values.std() / len(values) ** 0.5)]


def quadratic(model: nn.Module, changes: Mapping[str, Tensor], inputs: Tensor) -> float:
    r"""Half of :math:`\\Delta^\\top G \\Delta` with the whole curvature of some data, by forward derivatives."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: changes.get(name, torch.zeros_like(p)) for name, p in parameters.items()}
    total = 0.0
    for part in inputs.split(250):
        outputs, along = torch.func.jvp(
            lambda p, x=part: torch.func.functional_call(model, p, (x,)), (parameters,), (tangents,)
        )
        p, along = outputs.detach().double().softmax(-1), along.detach().double()
        total += float(((p * along.square()).sum(-1) - (p * along).sum(-1).square()).sum())
    return 0.5 * total / len(inputs)


# -- the record ------------------------------------------------------------------------------------

MEASURES: dict[str, Callable[[Data], Any]] = {"layers": layers, "subnetworks": subnetworks, "bits": bits}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All seeds of a task."""
    sizes = QUICK if options.quick else TASKS[name]
    folder, found = options.out / "sensitivity", {}
    for seed in range(sizes.seeds):
        data: Data | None = None
        for key, of in MEASURES.items():
            path = folder / f"{name}.{seed}.{key}{'.quick' * options.quick}.json"
            if not path.exists():
                data = data or Data(
                    Task.load(name), Context(seed, options.data_dir, options.cache, options.quick), sizes
                )
                write_json(path, rounded({"found": of(data)}))
                print(f"{name}, seed {seed}: {key}", file=sys.stderr, flush=True)
            found.setdefault(key, []).append(read_json(path)["found"])
    return {"sizes": vars(sizes)} | found


def cell(seeds: Sequence[Any]) -> list[float]:
    """Mean over seeds and its standard error; of one seed that over data, if there is one."""
    means = [one[0] if isinstance(one, list) else one for one in seeds]
    if len(means) == 1:
        return seeds[0] if isinstance(seeds[0], list) else [means[0], 0.0]
    return [float(np.mean(means)), float(np.std(means, ddof=1) / len(means) ** 0.5)]


def shown(seeds: Sequence[Any], digits: int, **form: Any) -> str:
    """A cell in words."""
    mean, error = cell(seeds)
    return plus_minus([mean, error], digits, **form) if error else number(mean, digits, **form)


# -- the document ----------------------------------------------------------------------------------


def parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the document, from its record."""
    tasks = record["tasks"]
    return {
        "sensitivity layers": layers_table(tasks),
        "sensitivity subnetworks": subnetworks_table(tasks),
        "sensitivity variances": variances_table(tasks),
        "sensitivity bits": bits_table(tasks),
    }


def layers_table(tasks: Mapping[str, Any]) -> str:
    """Of the first network."""
    rows = [
        [task, f"`{one['name']}`", f"{one['size']:,}", *(f"{one[key]:.2g}" for key in ("trace", "mean", "largest"))]
        for task, of in tasks.items()
        for one in of["layers"][0]
    ]
    return markdown(["task", "layer", "parameters", "trace", "mean trace", "largest eigenvalue"], rows)


def subnetworks_table(tasks: Mapping[str, Any]) -> str:
    """Losses, and differences to the largest curvature."""
    rows = []
    for task, of in tasks.items():
        for name in of["subnetworks"][0]["scores"]:
            row = [task, name]
            for where in ("test", "strong"):
                found = [seed["scores"][name][where] for seed in of["subnetworks"]]
                row += [shown([one["nll"] for one in found], 3)]
                row += ["" if name == LARGEST else shown([one["minus"] for one in found], 4, sign=True)]
            rows.append(row)
    columns = ["task", "uncertain", "test NLL", f"minus {LARGEST}", "strong shift NLL", f"minus {LARGEST}"]
    return markdown(columns, rows)


def variances_table(tasks: Mapping[str, Any]) -> str:
    """Share of the variance and its error."""
    rows = []
    for task, of in tasks.items():
        for name in of["subnetworks"][0]["variances"]:
            found = [s["variances"][name] for s in of["subnetworks"]]
            columns = ([one[key] for one in found] for key in ("kept", "error"))
            rows.append([task, name, *(shown(column, 1, scale=100) for column in columns)])
    table = markdown(["task", "uncertain", "share of the variance, %", "error at the best scale, %"], rows)
    lines = []
    for task, of in tasks.items():
        seeds = of["subnetworks"]
        kept, overstated = (shown([one[key] for one in seeds], 1, scale=100) for key in ("kept", "overstated"))
        lines.append(
            f"{task}: {seeds[0]['size']:,} of {seeds[0]['total']:,} parameters; on another draw of the data, the "
            f"chosen entries have {kept} % of the trace, and the draw that chose them states {overstated} % of that."
        )
    return "\n\n".join([table, *lines])


def bits_table(tasks: Mapping[str, Any]) -> str:
    """Added losses, and differences to the same bits for all layers."""
    rows = []
    for task, of in tasks.items():
        for budget in of["bits"][0]["budgets"]:
            for way in (UNIFORM, BY_ERROR, BY_TRACE):
                found = [one["budgets"][budget][way] for one in of["bits"]]
                given = "" if way == UNIFORM else " ".join(map(str, found[0]["bits"]))
                row = [task, budget, way, given]
                row += [shown([one[key] for one in found], 4) for key in ("predicted", "quadratic", "train")]
                for key in ("train", "test"):
                    row.append("" if way == UNIFORM else shown([one["minus"][key] for one in found], 4, sign=True))
                rows.append(row)
    columns = ["task", "bits on average", "chosen by", "bits of layers, first seed", "predicted", "whole curvature"]
    return markdown([*columns, "measured", "minus the same for all", "test: minus the same for all"], rows)


def figure_of(tasks: Mapping[str, Any]) -> Figure:
    """Mean trace and largest eigenvalue of the layers, a point for each seed."""
    figure = Figure(figsize=(8, 3.2), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for ax, (task, of) in zip(panels, tasks.items(), strict=True):
        names = [one["name"] for one in of["layers"][0]][::-1]
        sizes = {one["name"]: one["size"] for one in of["layers"][0]}
        for key, color, label in (("mean", "#2b6cb0", "mean trace"), ("largest", "#b5483a", "largest eigenvalue")):
            points = [(one[key], names.index(one["name"])) for seed in of["layers"] for one in seed]
            ax.plot(*zip(*points, strict=True), "o", color=color, markersize=4, alpha=0.6, label=label)
        ax.set(xscale="log", yticks=range(len(names)), title=task, xlabel="curvature (nats per datum)")
        ax.set_yticklabels([f"layer {name} ({sizes[name]:,})" for name in names])
        ax.grid(axis="x", alpha=0.3)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--cache", type=Path, default=Path("eval/results/cache"))
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true", help="one seed and little of everything")
    parser.add_argument("--only-document", action="store_true", help="from the record that is there")
    options = parser.parse_args()
    path = options.docs / "records" / "sensitivity.json"
    if not options.only_document:
        record = read_json(path) if path.exists() else {"environment": environment(torch.device("cpu")), "tasks": {}}
        for name in options.tasks:
            record["tasks"][name] = measure(name, options)
            write_json(path, record)
    record = read_json(path)
    image = io.BytesIO()
    FigureCanvasAgg(figure_of(record["tasks"])).print_png(image)
    save_small(image.getvalue(), options.docs / "sensitivity.png")
    fill(options.docs / "sensitivity.md", parts(record))


if __name__ == "__main__":
    main()
