r"""The numbers that others published on CIFAR-10, on the networks with which they measured them.

    python eval/published.py --data-dir <folder> [--networks resnet20 resnet56] [--device cuda] [--docs docs]

``<folder>/cifar10-bayesipy`` has the weights (chenyaofo/pytorch-cifar-models) that the numbers of
Ludvins/FixedMeanGaussianProcesses were measured with, ``<folder>/cifar10`` the first 10,000 training and 1,000 test
images. Every posterior is fitted once; the (co)variances of the outputs of all test data under a grid of prior
precisions are kept in ``<scratch>/published``, so that an interrupted run goes on. What is tuned is tuned on one half
of the test data and judged on the other, both ways (every datum is judged by settings that it had no part in), and
that in :data:`SPLITS` random halvings: a datum's loss is its mean over these, and intervals are over data.

The network alone and temperature scaling have the same halvings. ``docs/published.md`` is made from the record.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from documents import show
from published_document import DEFAULT, SHOWN_LINKS, parts
from results import rounded
from safetensors.torch import load_file, save_file
from speed import gigaflops
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.curvature.structures import Diagonal, Full, Isotropic, LowRank
from debiased_laplace.evaluation import shifts
from debiased_laplace.evaluation.records import read_json, write_json
from debiased_laplace.evaluation.scores.calibrated import expected_errors
from debiased_laplace.evaluation.scores.calibration import N_BINS, equal_width_bins
from debiased_laplace.evaluation.shipped.cifar10 import BasicBlock
from debiased_laplace.evaluation.shipped.common import read_npz, scaled
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.likelihoods._numerics import square_root
from debiased_laplace.posterior.gaussian import standard_normals
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.posterior.temperature import most_uncertain_temperature, temperature_scaling

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
N_DATA, BATCH, N_TIMED = 50_000, 250, 100
BUDGET = 1024
SPLITS = 20
PRIORS = torch.logspace(0, 5, 11, dtype=torch.float64)
SMALLER = torch.logspace(-3, -0.5, 6, dtype=torch.float64)  # for parts of a network: of few parameters one expects more
TEMPERATURES = [2 ** (step / 4) for step in range(-16, 9)]
LINKS = ("probit", "mean_field", "mc")
DRAWS = 1024
LIKELIHOOD = Categorical()
SHIFTS = {"noise 3": ("noise", 3), "blur 3": ("blur", 3), "contrast 4": ("contrast", 4)}
CONDITIONS, CONTROLS = ("test", "rotated"), ("identity", "K-FAC, single batch")


class Block(BasicBlock):
    """With a convolution of size one for the shortcut where the shape changes (type B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, stride)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def shortcut(self, x: Tensor) -> Tensor:
        """By the convolution."""
        return self.downsample(x)


class ResNet(nn.Module):
    """The ResNets of chenyaofo/pytorch-cifar-models: ``[N, 3, 32, 32]`` to 10 logits."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        stages = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(*first), *(Block(first[1], first[1], 1) for _ in range(blocks - 1))) for first in stages
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, 10]``."""
        out = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(out.mean((2, 3)))


def network(name: str, data_dir: Path) -> nn.Module:
    """``resnet20`` or ``resnet56`` with the published weights, in evaluation mode."""
    model = ResNet(int(name.removeprefix("resnet")))
    path = data_dir / "cifar10-bayesipy" / f"cifar10_{name}.pt"
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


#: Arguments of a fit.
METHODS: dict[str, dict[str, Any]] = {
    "identity": {"structure": Isotropic()},
    "last layer, K-FAC": {"parameters": "last_layer", "sampler": dl.UniformSampler(None)},
    "last layer, dense": {"parameters": "last_layer", "structure": Full(), "sampler": dl.UniformSampler(None)},
    "subnetwork, dense": {
        "parameters": dl.by_sensitivity(count=1000),
        "structure": Full(),
        "sampler": dl.PrioritySampler(BUDGET),
    },
    "diagonal": {"structure": Diagonal(), "sampler": dl.PrioritySampler(2 * BUDGET)},
    "low rank": {"structure": LowRank(100), "sampler": dl.PrioritySampler(BUDGET // 8)},
    "K-FAC, single batch": {"sampler": dl.UniformSampler(BUDGET), "split": dl.Single()},
    "K-FAC, debiased": {"sampler": dl.PrioritySampler(BUDGET)},
    # As many data as cost between one and two gradients of all that are at hand.
    "diagonal, equal time": {"structure": Diagonal(), "sampler": dl.PrioritySampler(BUDGET)},
    "low rank, equal time": {"structure": LowRank(100), "sampler": dl.PrioritySampler(BUDGET // 32)},
    "K-FAC, debiased, equal time": {"sampler": dl.PrioritySampler(BUDGET // 2)},
}


def priors(method: str) -> Tensor:
    """The prior precisions that are tried, ascending."""
    return torch.cat([SMALLER, PRIORS]) if "parameters" in METHODS[method] else PRIORS


def images(path: Path) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]`` in [0, 1] and labels ``[N]``."""
    pixels, labels = read_npz(path, "images", "labels")
    return scaled(torch.from_numpy(pixels).permute(0, 3, 1, 2)), torch.from_numpy(labels).long()


def condition(name: str, x: Tensor) -> Tensor:
    """Inputs of the network. "Rotated by 60" is, as published, by an angle drawn from -60 to 60."""
    if name in SHIFTS:
        return (shifts.corrupt(x, *SHIFTS[name]) - MEAN) / STD
    inputs = (x - MEAN) / STD
    if name == "test":
        return inputs
    from torchvision.transforms import functional

    angles = 120 * torch.rand(len(x), generator=torch.Generator().manual_seed(0)) - 60
    return torch.stack([functional.rotate(one, float(angle)) for one, angle in zip(inputs, angles, strict=True)])


# -- posteriors, and what they say of all test data ----------------------------------------------------


def fitted(model: nn.Module, loader: Any, settings: dict[str, Any]) -> dl.Laplace:
    """The posterior of all 50,000 training data from those at hand."""
    return dl.fit(model, loader, "classification", n_data=N_DATA, **settings)


def moments(posterior: dl.Laplace, inputs: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``[N, C]`` and their covariances ``[R, N, C, C]`` at every prior precision."""
    grid = [replace(posterior.posterior, prior_precision=p.reshape(1)) for p in priors.to(inputs.device)]
    parts = [functional_moments(posterior.network, grid, part) for part in inputs.split(BATCH)]
    return torch.cat([f for f, _ in parts]), torch.cat([v for _, v in parts], 1)


Clock = Callable[[], float]


def gradient_seconds(
    model: nn.Module, loader: list[tuple[Tensor, Tensor]], n_batches: int = 4, clock: Clock = time.process_time
) -> float:
    """Processor time of a gradient of all data, by a few batches of equal size."""
    some = loader[:n_batches]
    spent = []
    for _ in range(2):  # the first warms up
        start = clock()
        for x, y in some:
            torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        spent.append(clock() - start)
    return min(spent) * len(loader) / len(some)


def fitted_at_cost(
    model: nn.Module,
    loader: list[tuple[Tensor, Tensor]],
    inputs: Tensor,
    settings: dict[str, Any],
    clock: Clock = time.process_time,
) -> tuple[dl.Laplace, dict[str, float]]:
    """A posterior; and what the fit, and predictions of as many data, cost in gradients of all data."""
    gradient, start = gradient_seconds(model, loader, clock=clock), clock()
    posterior = fitted(model, loader, settings)
    fit_seconds, start = clock() - start, clock()
    posterior.predict(inputs, link="mean_field")
    each, n_data = (clock() - start) / len(inputs), sum(len(x) for x, _ in loader)
    return posterior, {"fit": fit_seconds / gradient, "predictions": each * n_data / gradient}


class Kept:
    """What was computed of the posteriors of a network, in a folder: a fit goes on where it was interrupted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def costs(self) -> dict[str, dict[str, float]]:
        """By method in gradients (:func:`fitted_at_cost`); of a gradient in seconds, and the machine's speed."""
        path = self.folder / "costs.json"
        return read_json(path) if path.exists() else {}

    def spent(self, on: str, cost: Mapping[str, float]) -> None:
        """Keep what something cost."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "costs.json", self.costs | {on: dict(cost)})

    def path(self, method: str, condition: str) -> Path:
        """Of a posterior and a condition."""
        return self.folder / f"{method}.{condition}.safetensors".replace(" ", "_")

    def missing(self, method: str, condition: str, priors: Tensor) -> Tensor:
        """The prior precisions that are not there."""
        path = self.path(method, condition)
        return priors[~torch.isin(priors, load_file(path)["priors"])] if path.exists() else priors

    def has(self, method: str, names: Iterable[str], priors: Tensor) -> bool:
        """Whether all of some conditions are there."""
        return all(len(self.missing(method, name, priors)) == 0 for name in names)

    def add(self, method: str, condition: str, priors: Tensor, of: tuple[Tensor, Tensor]) -> None:
        """The upper triangles of symmetric covariances, with those at other prior precisions that are there."""
        rows, columns = torch.triu_indices(10, 10)
        triangles, path = of[1][..., rows, columns].cpu(), self.path(method, condition)
        if path.exists():
            there = load_file(path)
            priors, triangles = torch.cat([there["priors"], priors]), torch.cat([there["covariances"], triangles])
        order = priors.argsort()
        content = {"mean": of[0].cpu().contiguous(), "priors": priors[order], "covariances": triangles[order]}
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(content, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def read(self, method: str, condition: str) -> tuple[Tensor, Tensor]:
        """As :func:`moments` returned them, at all prior precisions that are there."""
        content = load_file(self.path(method, condition))
        triangle, (rows, columns) = content["covariances"], torch.triu_indices(10, 10)
        whole = triangle.new_zeros(*triangle.shape[:2], 10, 10)
        whole[..., rows, columns] = whole[..., columns, rows] = triangle
        return content["mean"].double(), whole


class Predictions:
    """Probabilities of some data by one link, at every setting; roots of covariances are kept for all temperatures."""

    def __init__(self, mean: Tensor, covariances: Tensor, link: str, normals: Tensor) -> None:
        self.mean, self.covariances, self.link, self.normals = mean, covariances, link, normals
        self._root: tuple[int, Tensor] | None = None

    def at(self, prior: int, temperature: float) -> Tensor:
        """``[N, C]``, as the package predicts them; draws all at once."""
        if self.link == "mc":
            if self._root is None or self._root[0] != prior:
                self._root = prior, square_root(self.covariances[prior].double()).float()
            drawn = self.mean.float().T[:, None] + torch.einsum("mc,nkc->kmn", self.normals, self._root[1])
            return (drawn.contiguous() / temperature).softmax(0).mean(1).T.double()  # classes first: faster
        covariance = self.covariances[prior].double() / temperature**2
        wanted = covariance if LIKELIHOOD.needs_covariance(self.link) else covariance.diagonal(dim1=1, dim2=2)
        return LIKELIHOOD.predictive(self.mean / temperature, wanted, self.link)


class Table:
    """Losses of all test data at every setting of a posterior and a link.

    Attributes:
        priors: Prior precisions, ascending.
        settings: Number of the prior precision, and temperature, of every row.
        losses: ``[settings, N]``, nats, float64, of the data as they are.
    """

    def __init__(
        self, of: Mapping[str, tuple[Tensor, Tensor]], priors: Tensor, labels: Tensor, link: str, normals: Tensor
    ) -> None:
        self.of = {name: Predictions(*moments, link, normals) for name, moments in of.items()}
        self.priors, self.temperatures, self.labels = priors, temperatures(link), labels
        self.settings = [(r, t) for r in range(len(priors)) for t in self.temperatures]
        losses = [LIKELIHOOD.log_loss(self.of["test"].at(*setting), labels) for setting in self.settings]
        self.losses = torch.stack(losses).cpu()
        self._kept: dict[tuple[str, int], np.ndarray] = {}

    def chosen(self, row: int) -> tuple[float, float]:
        """Prior precision and temperature of a row."""
        prior, temperature = self.settings[row]
        return float(self.priors[prior]), temperature

    def ends(self, row: int) -> tuple[bool, bool]:
        """Whether prior precision and temperature are at an end of what was tried; one, for draws, is none."""
        prior, temperature = self.settings[row]
        return prior in (0, len(self.priors) - 1), temperature in (TEMPERATURES[0], TEMPERATURES[-1])

    def probabilities(self, name: str, row: int) -> np.ndarray:
        """``[N, C]`` at one setting."""
        if (name, row) not in self._kept:
            self._kept[name, row] = self.of[name].at(*self.settings[row]).cpu().numpy()
        return self._kept[name, row]

    def tuned(self, data: Tensor, *, temperature: bool, rule: str) -> int:
        """The row that some test data choose: the least loss, or the most uncertainty that they do not tell from it."""
        rows = [i for i, (_, t) in enumerate(self.settings) if temperature or t == 1]
        losses = self.losses[rows][:, data]
        best = int(losses.mean(1).argmin())
        if rule == "best":
            return rows[best]
        per_prior = len(rows) // len(self.priors)
        for prior in range(len(self.priors)):  # ascending: the smallest precision has the most uncertainty
            of_prior = losses[prior * per_prior : (prior + 1) * per_prior]
            row = int(of_prior.mean(1).argmin())
            difference = of_prior[row] - losses[best]
            if float(difference.mean()) <= float(difference.std()) / len(data) ** 0.5:
                return rows[prior * per_prior + row]
        return rows[best]


def temperatures(link: str) -> list[float]:
    """Averages over draws have none below one: draws would become certain."""
    return [t for t in TEMPERATURES if link != "mc" or t >= 1]


class Points:
    """The network's own probabilities, divided by a temperature (None: as they are)."""

    def __init__(self, of: Mapping[str, tuple[Tensor, Tensor]], labels: Tensor, choose: Any) -> None:
        self.of = {name: mean.cpu() for name, (mean, _) in of.items()}
        self.labels, self.choose = labels.cpu(), choose

    def tuned(self, data: Tensor, **_: Any) -> float:
        """The temperature that some test data choose."""
        return self.choose(LIKELIHOOD, self.of["test"][data], self.labels[data]).value if self.choose else 1.0

    def chosen(self, temperature: float) -> tuple[None, float]:
        """No prior precision, and the temperature."""
        return None, temperature

    def ends(self, temperature: float) -> tuple[bool, bool]:
        """There are none."""
        return False, False

    def probabilities(self, name: str, temperature: float) -> np.ndarray:
        """``[N, C]`` of a condition."""
        return (self.of[name] / temperature).softmax(-1).numpy()


def judged(table: Table | Points, labels: np.ndarray, **how: Any) -> dict[str, Any]:
    """Losses ``[SPLITS, N]`` and calibration errors by condition; every datum by settings that it did not choose."""
    n, names = len(labels), list(table.of)
    result: dict[str, Any] = {"settings": [], "ends": [], "losses": {k: [] for k in names}, "first": {}}
    result["ece"] = {k: [] for k in names}
    for split in range(SPLITS):
        halves = torch.randperm(n, generator=torch.Generator().manual_seed(split)).chunk(2)
        rows = [table.tuned(half, **how) for half in halves]
        result["settings"] += [table.chosen(row) for row in rows]
        result["ends"] += [table.ends(row) for row in rows]
        for name in names:
            every = np.empty((n, 10))
            for row, half in zip(rows, halves[::-1], strict=True):
                every[half.numpy()] = table.probabilities(name, row)[half.numpy()]
            result["losses"][name].append(-np.log(np.maximum(every[np.arange(n), labels], 1e-300)))
            result["ece"][name].append(calibration_error(every, labels))
            result["first"].setdefault(name, every)
    return result


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Of the most probable class, in equal-width bins."""
    bins = equal_width_bins(probabilities.max(1), N_BINS)
    return float(
        np.abs(np.bincount(bins, probabilities.max(1) - (probabilities.argmax(1) == labels))).sum() / len(labels)
    )


def interval(values: np.ndarray) -> list[float]:
    """Mean and its standard error over data, of ``[SPLITS, N]``."""
    of_data = values.mean(0)
    return [float(of_data.mean()), float(of_data.std(ddof=1) / len(of_data) ** 0.5)]


def summary(found: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the record has of a way to predict: means over halvings, errors over data, and differences to others."""
    result: dict[str, Any] = {}
    for name, losses in found["losses"].items():
        losses = np.stack(losses)
        of = {"nll": interval(losses)}
        for other, found_of in others.items():
            of[f"minus {other}"] = interval(losses - np.stack(found_of["losses"][name]))
        if name == "test":
            of["between halvings"] = float(losses.mean(1).std(ddof=1))
            of["ece"] = float(np.mean(found["ece"][name]))
            of["ece by chance"] = expected_errors(found["first"][name], classwise=False)["ece"][2:]
        result[name] = of
    priors, temperatures = zip(*found["settings"], strict=True)
    result["prior precision"] = None if priors[0] is None else float(np.median(priors))
    result["temperature"] = float(np.median(temperatures))
    result["at an end"] = [float(share) for share in np.mean(found["ends"], 0)]
    return result


def test_data(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels; a few of them if quick."""
    x, y = images(options.data_dir / "cifar10" / "test_first1k.npz")
    return (x[:60], y[:60]) if options.quick else (x, y)


def compute(name: str, kept: Kept, options: argparse.Namespace) -> None:
    """Fit what is not there yet, and keep what every posterior says of all test data."""
    model, device = network(name, options.data_dir).to(options.device), torch.device(options.device)
    x, y = images(options.data_dir / "cifar10" / "train_first10k.npz")
    x, y = (part[: 300 if options.quick else None].to(device) for part in ((x - MEAN) / STD, y))
    loader = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    test, _ = test_data(options)
    inputs = {name: condition(name, test).to(device) for name in options.conditions}
    if "gradient" not in kept.costs:
        speed = gigaflops(clock=time.process_time)
        kept.spent("gradient", {"seconds": gradient_seconds(model, loader), "gigaflops": speed})
    for method in options.methods:
        missing = {of: kept.missing(method, of, priors(method)) for of in inputs}
        if method in kept.costs and not any(map(len, missing.values())):
            continue
        posterior, cost = fitted_at_cost(model, loader, inputs["test"][:N_TIMED], METHODS[method])
        if method not in kept.costs:
            kept.spent(method, cost)
        print(f"{name}, {method}: {cost}", file=sys.stderr, flush=True)
        for of, wanted in missing.items():
            if len(wanted):
                kept.add(method, of, wanted, moments(posterior, inputs[of], wanted))


def measure(name: str, kept: Kept, options: argparse.Namespace) -> dict[str, Any]:
    """Everything of one network, from what was kept."""
    _, labels = test_data(options)
    normals = standard_normals((DRAWS, 10), torch.zeros(()), torch.Generator().manual_seed(0))
    record: dict[str, Any] = {"n": len(labels), "costs": kept.costs, "methods": {}}
    points: dict[str, Any] = {}
    controls: dict[str, Any] = {}  # by way, what the others are compared with
    asked = [method for method in METHODS if method in (*CONTROLS, *options.methods)]
    there = [method for method in asked if kept.has(method, options.conditions, priors(method))]
    for method in sorted(there, key=lambda method: method not in CONTROLS):
        of = {name_of: kept.read(method, name_of) for name_of in options.conditions}
        if not points:
            points = {point: judged(Points(of, labels, choose), labels.numpy()) for point, choose in POINTS.items()}
            shown = {point: points[point] for point in ("MAP", "temperature scaling")}
            record["points"] = {point: summary(found, points) for point, found in points.items()}
        entry: dict[str, Any] = {}
        for link in LINKS if method == DEFAULT else SHOWN_LINKS:
            table = Table(of, priors(method), labels, link, normals)
            for temperature, rule in ((True, "best"), (True, "one standard error"), (False, "best")):
                found = judged(table, labels.numpy(), temperature=temperature, rule=rule)
                way = f"{link}, {'temperature' if temperature else 'no temperature'}, {rule}"
                entry[way] = summary(found, shown | controls.get(way, {}))
                if method in CONTROLS:
                    controls.setdefault(way, {})[method] = found
            best = entry[f"{link}, temperature, best"]["test"]
            print(f"{name}: {method}, {link}: {best['nll'][0]:.4f}, {best['minus MAP']}", file=sys.stderr, flush=True)
        record["methods"][method] = entry
    record["methods"] = {method: record["methods"][method] for method in there}
    return record


POINTS = {
    "MAP": None, "temperature scaling": temperature_scaling,
    "temperature, one standard error": most_uncertain_temperature,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--scratch", type=Path, default=Path("eval/results/published"))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="others stay as they are in the record"
    )
    parser.add_argument("--shifts", nargs="*", choices=SHIFTS, default=[], help="besides the turned images")
    parser.add_argument("--compute", action="store_true", help="posteriors alone, no statistics")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.conditions = [*CONDITIONS, *options.shifts]
    path = options.docs / "records" / "published.json"
    record = read_json(path) if path.exists() else {}
    for name in options.networks:
        kept = Kept(options.scratch / f"{name}{'.quick' * options.quick}")
        compute(name, kept, options)
        if options.compute:
            continue
        found, known = rounded(measure(name, kept, options)), record.get(name, {}).get("methods", {})
        found["methods"] = {m: (known | found["methods"])[m] for m in METHODS if m in known | found["methods"]}
        record[name] = found
        write_json(path, record)
    if not options.compute:
        show(parts(record), options.docs / "published.md")


if __name__ == "__main__":
    main()
