"""How close is a posterior from few data to that of all of them? Every sampler, split and budget, over seeds.

    python eval/fidelity.py [--quick] [--networks digits-cnn resnet20] [--seeds 5] [--data-dir <folder>]
    python eval/report.py

Every run is one JSON record in ``<out>/fidelity``, written when it is complete and never changed: an interrupted grid
goes on where it stopped. Trained networks and full-data posteriors are kept in ``<out>/cache``. The folder of
``--data-dir`` holds ``FashionMNIST/raw``, ``trec`` and ``cifar10``; without it the networks on digits run. ``--quick``
runs two of these with few budgets and seeds. It is long because networks, methods and one run are one grid.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import vit
from networks import digits_cnn, digits_mlp, digits_transformer, lenet, trained_cifar_resnet
from torch import Tensor, nn

import debiased_laplace
from debiased_laplace import __version__
from debiased_laplace.curvature.projected import projected_curvatures
from debiased_laplace.curvature.sharing import Reduce
from debiased_laplace.curvature.structures import Diagonal, Full, Kronecker, LowRank, Structure
from debiased_laplace.evaluation.scores.calibration import expected_calibration_error
from debiased_laplace.evaluation.shipped import trec
from debiased_laplace.fitting.checkpoint import Checkpoint
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.fitting.measurement import Measurement
from debiased_laplace.fitting.stream import Observed, Stream
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.posterior.tune import tune
from debiased_laplace.sampling.sample import IN_ALL_FOLDS, Sample, WeightedData
from debiased_laplace.sampling.samplers import PrioritySampler, Sampler, UniformSampler
from debiased_laplace.sampling.splits import CrossFit, Single, Split, TwoBatch

#: What of the package decides the numbers, so that records of another state are told apart.
SOURCE = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(debiased_laplace.__file__).parent.rglob("*.py")))
).hexdigest()[:12]
BUDGETS = (8, 16, 32, 64, 128, 256, 512, 1024)
ABLATION_BUDGETS = (8, 32, 128)
ABLATED = ("digits-cnn", "digits-mlp", "digits-transformer", "lenet")
LIKELIHOOD = Categorical()
STRUCTURES: dict[str, Structure] = {
    "kron": Kronecker(), "kron-reduce": Kronecker(sharing=Reduce()), "lowrank": LowRank(20), "diag": Diagonal(),
}  # fmt: skip


# -- networks and data -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A trained network; data to draw from, to tune with and to compare on; the size of its training set."""

    model: nn.Module
    pool: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    n_data: int


def trained(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, cache: Path) -> nn.Module:
    """Train once with a fixed seed, and keep the weights."""
    if cache.exists():
        model.load_state_dict(torch.load(cache, weights_only=True))
        return model.eval()
    inputs, labels = data
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    steps = epochs * -(-len(inputs) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for index in torch.randperm(len(inputs), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
    write(cache, lambda path: torch.save(model.state_dict(), path))
    return model.eval()


def digits(build: Callable[[], nn.Module], name: str, cache: Path, _: Path | None) -> Problem:
    """Scikit-learn's digits: 898 to train on and to draw from, 400 to tune with, 499 to compare on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    inputs = torch.from_numpy(data.images).float()[order, None] / 16
    labels = torch.from_numpy(data.target).long()[order]
    pool = inputs[:898], labels[:898]
    torch.manual_seed(0)
    model = trained(build(), pool, 60, cache / f"{name}.pt")
    return Problem(model, pool, (inputs[898:1298], labels[898:1298]), (inputs[1298:], labels[1298:]), 898)


def idx(path: Path) -> Tensor:
    """An array in the format of MNIST."""
    content = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3])]
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())


def fashion_mnist(model: Callable[[tuple[Tensor, Tensor]], nn.Module], folder: Path | None) -> Problem:
    """A network trained on the 60,000 images of Fashion-MNIST; the first 5,000 to draw from."""
    raw = existing(folder, "FashionMNIST/raw")
    inputs, labels = (
        idx(raw / "train-images-idx3-ubyte.gz")[:, None].float() / 255,
        idx(raw / "train-labels-idx1-ubyte.gz"),
    )
    held, known = idx(raw / "t10k-images-idx3-ubyte.gz")[:, None].float() / 255, idx(raw / "t10k-labels-idx1-ubyte.gz")
    labels, known = labels.long(), known.long()
    return Problem(
        model((inputs, labels)), (inputs[:5000], labels[:5000]), (held[:500], known[:500]),
        (held[500:700], known[500:700]), 60_000,
    )  # fmt: skip


def trained_lenet(data: tuple[Tensor, Tensor], cache: Path) -> nn.Module:
    """Trained for five epochs."""
    torch.manual_seed(0)
    return trained(lenet(), data, 5, cache / "lenet.pt")


def questions(cache: Path, folder: Path | None) -> Problem:
    """The Transformer of the task ``trec``, with the questions that it was trained on to draw from."""
    existing(folder, "trec")
    read = trec.questions(folder)
    pool, validation, (held, known) = (read.tensors(part) for part in (read.train, read.validation, read.test))
    model = trec.model(seed=0, cache=cache, data_dir=folder)
    return Problem(model, pool, validation, (held[:200], known[:200]), len(pool[1]))


def cifar10(depth: int, n_pool: int, _: Path, folder: Path | None) -> Problem:
    """A ResNet trained on the 50,000 images of CIFAR-10; the first of them to draw from."""
    source = existing(folder, "cifar10")
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def load(name: str) -> tuple[Tensor, Tensor]:
        file = np.load(source / name)
        images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float() / 255
        return (images - mean) / deviation, torch.from_numpy(file["labels"]).long()

    inputs, labels = load("train_first10k.npz")
    held, known = load("test_first1k.npz")
    return Problem(
        trained_cifar_resnet(depth, source), (inputs[:n_pool], labels[:n_pool]), (held[:200], known[:200]),
        (held[200:300], known[200:300]), 50_000,
    )  # fmt: skip


def existing(folder: Path | None, name: str) -> Path:
    if folder is None or not (folder / name).exists():
        sys.exit(f"Expected a folder {name} in the folder of --data-dir, got {folder}. Or choose other --networks.")
    return folder / name


PROBLEMS: dict[str, Callable[[Path, Path | None], Problem]] = {
    "digits-cnn": lambda cache, folder: digits(digits_cnn, "digits-cnn", cache, folder),
    "digits-mlp": lambda cache, folder: digits(digits_mlp, "digits-mlp", cache, folder),
    "digits-transformer": lambda cache, folder: digits(digits_transformer, "digits-transformer", cache, folder),
    "lenet": lambda cache, folder: fashion_mnist(lambda data: trained_lenet(data, cache), folder),
    "vit": lambda cache, folder: fashion_mnist(lambda _: vit.model(seed=0, cache=cache, data_dir=folder), folder),
    "trec": questions,
    "resnet20": lambda cache, folder: cifar10(20, 10_000, cache, folder),
    "resnet56": lambda cache, folder: cifar10(56, 2_500, cache, folder),
}


# -- methods ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disjoint:
    """A sampler whose data for certain are dealt to the folds like the others, so that no two folds share any."""

    sampler: PrioritySampler

    def draw(self, batches: Iterable[Any], folds: int, generator: torch.Generator, **keywords: Any) -> Sample:
        """As the sampler, dealt again."""
        sample = self.sampler.draw(batches, folds, generator, **keywords)
        dealt = torch.arange(len(sample.folds))[torch.randperm(len(sample.folds), generator=generator)] % folds
        return replace(sample, folds=dealt)


@dataclass(frozen=True)
class Independent:
    """Every fold a separate draw from all data, so that folds may share some by chance."""

    sampler: UniformSampler

    def draw(self, batches: Iterable[Any], folds: int, generator: torch.Generator, **keywords: Any) -> Sample:
        """As many draws as folds."""
        batches = list(batches)
        sampler = replace(self.sampler, budget=max(1, (self.sampler.budget or 0) // folds))
        drawn = [sampler.draw(batches, 1, generator, **keywords) for _ in range(folds)]
        data = [sample.data for sample in drawn]
        joined = WeightedData(
            torch.cat([d.inputs for d in data]), torch.cat([d.targets for d in data]),
            torch.cat([d.weights / folds for d in data]), torch.cat([d.indices for d in data]),
        )  # fmt: skip
        labels = torch.cat([torch.full((len(d),), fold) for fold, d in enumerate(data)])
        # Drawn with replacement, a datum does not stand for itself: as if of an endless training set.
        return Sample(joined, labels, folds, drawn[0].n_seen, n_data=10**15)


@dataclass(frozen=True)
class Method:
    """A way to spend a budget."""

    sampler: Callable[[int], Sampler]
    split: Split
    estimator: str = "projected"
    #: Whether the statistics of layer inputs are those of the whole pool; by default where the sampler looks at it.
    stream: bool | None = None


#: The package's defaults and what they are judged against come first; the others are the ablation.
MAIN: dict[str, Method] = {
    "uniform, one batch": Method(UniformSampler, Single()),
    "uniform, two batches": Method(UniformSampler, TwoBatch()),
    "default": Method(PrioritySampler, CrossFit()),
}
ABLATION: dict[str, Method] = {
    "uniform, one batch, factored": Method(UniformSampler, Single(), "factored"),
    "uniform, two batches, factored": Method(UniformSampler, TwoBatch(), "factored"),
    "uniform, two overlapping batches": Method(lambda budget: Independent(UniformSampler(budget)), TwoBatch()),
    "uniform, cross-fit": Method(UniformSampler, CrossFit()),
    "uniform, cross-fit, inputs of the stream": Method(UniformSampler, CrossFit(), stream=True),
    "priority, cross-fit, inputs of the sample": Method(PrioritySampler, CrossFit(), stream=False),
    "priority, one batch": Method(PrioritySampler, Single()),
    "priority, two batches": Method(PrioritySampler, TwoBatch()),
    "priority, cross-fit, rotated": Method(PrioritySampler, CrossFit(average="rotated")),
    "priority, cross-fit, 2 folds": Method(PrioritySampler, CrossFit(2)),
    "priority, cross-fit, 8 folds": Method(PrioritySampler, CrossFit(8)),
    "priority, cross-fit, unbiased threshold": Method(
        lambda budget: PrioritySampler(budget, calibrated=False), CrossFit()
    ),
    "priority, cross-fit, disjoint": Method(lambda budget: Disjoint(PrioritySampler(budget)), CrossFit()),
    "priority, cross-fit, factored": Method(PrioritySampler, CrossFit(), "factored"),
}
METHODS = MAIN | ABLATION
ONE, TWO, DEFAULT = MAIN


# -- one run ---------------------------------------------------------------------------------------


class Bench:
    """A network with its full-data posterior, and what every run is compared with."""

    def __init__(self, name: str, structure: str, cache: Path, folder: Path | None) -> None:
        self.name, self.structure_name = name, structure
        self.problem = PROBLEMS[name](cache, folder)
        self.structure = STRUCTURES[structure]
        inputs, labels = self.problem.pool
        self.batches = list(zip(inputs.split(250), labels.split(250), strict=True))
        self.network = Network.discover(self.problem.model, inputs)
        self.stream = Stream(lambda *_: self.network, LIKELIHOOD, self.structure)
        start = time.perf_counter()
        self.outputs = {id(x): self.stream(x, y) for x, y in self.batches}
        self.pass_seconds = time.perf_counter() - start
        self.gradient_seconds = self._gradient_seconds()
        self.compared = structure != "lowrank" or len(inputs) < 1000  # else its Gram matrix does not fit
        if not self.compared:
            return
        self.reference = self._kept(cache / f"{name}-{structure}.safetensors", self.structure)
        grid = torch.logspace(-1, 5, 25, dtype=torch.float64)
        posterior = self.reference.posterior
        curve = tune(self.network, posterior, LIKELIHOOD, [self.problem.validation], grid).curve
        #: laplace-torch's default, and the best of the full-data posterior on validation data.
        self.priors = {"1": 1.0, "tuned": float(curve.best)}
        self.mean, self.variances = self._moments(posterior)
        self.exact: Tensor | None = None
        if name == "digits-mlp":  # small enough for the whole curvature matrix
            self.exact = self._moments(self._kept(cache / f"{name}-full.safetensors", Full()).posterior)[1]

    def _kept(self, path: Path, structure: Structure) -> Fit:
        """The fit on all data of the pool, computed once."""
        if path.exists():
            return Fit.load(path, self.problem.model)
        path.parent.mkdir(parents=True, exist_ok=True)
        start, progress = time.perf_counter(), path.with_suffix(".progress")
        fitted = fit(
            self.problem.model, self.batches, LIKELIHOOD, structure=structure, sampler=UniformSampler(None),
            split=Single(), n_data=self.problem.n_data, checkpoint=progress,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        fitted.save(path)
        write(path.with_suffix(".json"), lambda p: p.write_text(json.dumps({"full_fit_seconds": seconds})))
        progress.unlink()
        return fitted

    def _gradient_seconds(self) -> float:
        """Seconds of a mean gradient, for each datum."""
        x, y = (column[:64] for column in self.problem.pool)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.autograd.grad(F.cross_entropy(self.problem.model(x), y), [*self.problem.model.parameters()])
            times.append(time.perf_counter() - start)
        return min(times) / len(x)

    def _moments(self, posterior: Posterior) -> tuple[Tensor, Tensor]:
        posteriors = [
            replace(posterior, prior_precision=torch.tensor([delta], dtype=torch.float64))
            for delta in self.priors.values()
        ]
        return functional_moments(self.network, posteriors, self.problem.test[0], covariance=False)

    def run(self, method: Method, budget: int, seed: int) -> dict[str, Any]:
        """Fit from a sample of the pool, and compare."""
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        sampler = method.sampler(budget)
        # The outputs of the stream do not depend on the run: they were computed once.
        sample = sampler.draw(
            self.batches, method.split.folds, generator, likelihood=LIKELIHOOD,
            observe=lambda inputs, _: self.outputs[id(inputs)],
        )  # fmt: skip
        looked = not isinstance(sampler, (UniformSampler, Independent))
        stream = looked if method.stream is None else method.stream
        observed: Observed | None = self.stream.observed if stream else None
        data = CurvatureData(self.network, sample.data, LIKELIHOOD)
        measurement = Measurement(self.structure, self.network, data, sample, observed, Checkpoint(None, {}))
        basis, curvatures = measurement.cross(method.split, factored=method.estimator == "factored")
        seconds = time.perf_counter() - start + self.pass_seconds * (looked or stream)
        posterior = Posterior(
            self.network.mean(), basis, curvatures, self.problem.n_data, torch.ones(1, dtype=torch.float64)
        )
        record: dict[str, Any] = {
            "drawn": len(sample.data),
            "certain": int((sample.folds == IN_ALL_FOLDS).sum()),
            "seconds": seconds,
            "gradients": seconds / self.gradient_seconds,
        }
        if isinstance(self.structure, LowRank):
            record |= self._against_the_truth(posterior)
        if self.compared:
            record["priors"] = self._against_the_reference(posterior)
        return record

    def _against_the_truth(self, posterior: Posterior) -> dict[str, Any]:
        """Curvature along the directions, over that of the whole pool along the same ones."""
        inputs, labels = self.problem.pool
        weights = torch.full((len(inputs),), 1 / len(inputs), dtype=torch.float64)
        whole = WeightedData(inputs, labels, weights, torch.arange(len(inputs)))
        true = projected_curvatures(self.network, posterior.basis, CurvatureData(self.network, whole, LIKELIHOOD))
        curvatures = posterior.curvatures
        return {
            "curvature_ratio": float(curvatures.sum() / true.sum()),
            "top_ratios": (curvatures / true)[:20].tolist(),
        }

    def _against_the_reference(self, posterior: Posterior) -> dict[str, Any]:
        _, variances = self._moments(posterior)
        compared = {}
        for index, name in enumerate(self.priors):
            ratios = (variances[index].double() / self.variances[index].double()).log()
            p, q = (LIKELIHOOD.predictive(self.mean, v[index], "probit").double() for v in (self.variances, variances))
            labels = self.problem.test[1]
            compared[name] = {
                "prior_precision": self.priors[name],
                "log_ratio": float(ratios.mean()),
                "abs_log_ratio": float(ratios.abs().mean()),
                "kl": float((p * (p.log() - q.log())).sum(-1).mean()),
                "nll_difference": float((LIKELIHOOD.log_loss(q, labels) - LIKELIHOOD.log_loss(p, labels)).mean()),
                "ece_difference": expected_calibration_error(q, labels) - expected_calibration_error(p, labels),
            }
            if self.exact is not None:
                exact = self.exact[index].double().log()
                for key, of_grid in (("exact", variances), ("reference_exact", self.variances)):
                    difference = of_grid[index].double().log() - exact
                    compared[name][f"{key}_log_ratio"] = float(difference.mean())
                    compared[name][f"{key}_abs_log_ratio"] = float(difference.abs().mean())
        return compared


# -- time ------------------------------------------------------------------------------------------


class Clocked(Kronecker):
    """K-FAC that knows how long its steps take."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "seconds", {"inputs": 0.0, "statistics": 0.0, "eigenvectors": 0.0})

    def _timed(self, name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        self.seconds[name] += time.perf_counter() - start  # type: ignore[attr-defined]
        return result

    def observe(self, *arguments: Any) -> Any:
        """As K-FAC's."""
        return self._timed("inputs", lambda: Kronecker.observe(self, *arguments))

    def measure(self, *arguments: Any) -> Any:
        """As K-FAC's."""
        return self._timed("statistics", lambda: Kronecker.measure(self, *arguments))

    def eigenbasis(self, *arguments: Any, **keywords: Any) -> Any:
        """As K-FAC's."""
        return self._timed("eigenvectors", lambda: Kronecker.eigenbasis(self, *arguments, **keywords))


def timing(name: str, cache: Path, folder: Path | None) -> dict[str, Any]:
    """Seconds of every step of a whole fit, of few data and of all; the latter from a fifth of them, times five."""
    problem = PROBLEMS[name](cache, folder)
    inputs, labels = problem.pool
    batches = list(zip(inputs.split(250), labels.split(250), strict=True))

    def steps(some: list[tuple[Tensor, Tensor]], sampler: Sampler) -> dict[str, float]:
        structure, shares = Clocked(), {}
        start = time.perf_counter()
        fitted = fit(problem.model, some, LIKELIHOOD, structure=structure, sampler=sampler, n_data=problem.n_data)
        shares = {"total": time.perf_counter() - start} | structure.seconds  # type: ignore[attr-defined]
        if isinstance(sampler, PrioritySampler):
            network, start = fitted.network, time.perf_counter()
            for x, _ in some:
                network.factors(x)
            shares["forward pass"] = time.perf_counter() - start
        shares["curvatures and the rest"] = shares["total"] - sum(v for key, v in shares.items() if key != "total")
        return shares

    steps(batches[:1], PrioritySampler(16))  # warm
    timed: dict[str, Any] = {
        f"default, {budget} data": steps(batches, PrioritySampler(budget)) for budget in (128, 512)
    }
    few = batches[: max(1, len(batches) // 5)]
    fifth = steps(few, UniformSampler(None))
    timed["all data"] = {key: value * len(batches) / len(few) for key, value in fifth.items()}
    return timed


# -- the grid --------------------------------------------------------------------------------------


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Write a file as a whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    save(temporary)
    os.replace(temporary, path)


def plan(options: argparse.Namespace) -> list[tuple[str, str, str, int, int]]:
    """Network, structure, method, budget and seed of every run; what matters most first."""
    runs: list[tuple[str, str, str, int, int]] = []

    def add(name: str, structure: str, methods: Iterable[str], budgets: Iterable[int], seeds: int) -> None:
        runs.extend((name, structure, m, b, seed) for m in methods for b in budgets for seed in range(seeds))

    by_network = {
        name: [
            b
            for b in options.budgets
            if b <= (512 if name.startswith("digits") else 256 if name == "resnet56" else 1024)
        ]
        for name in options.networks
    }
    for name, budgets in by_network.items():
        add(name, "kron", MAIN, [b for b in budgets if b <= 512], options.seeds)
        if options.quick:
            continue
        if name in ABLATED:
            add(name, "kron", ABLATION, [b for b in budgets if b in ABLATION_BUDGETS], options.seeds)
        few = [b for b in budgets if b <= 256]
        if name in ("digits-cnn", "lenet"):
            add(name, "lowrank", [*MAIN, "priority, one batch", "priority, two batches"], few, options.seeds)
        if name in ("vit", "trec"):
            add(name, "kron-reduce", [DEFAULT], [b for b in budgets if b in (*ABLATION_BUDGETS, 512)], options.seeds)
        if name in ("digits-cnn", "digits-mlp"):
            add(name, "diag", [ONE, TWO, "priority, one batch"], few, options.seeds)
    for name, budgets in by_network.items():  # what takes long comes last
        if name == "resnet20" and not options.quick:
            add(name, "kron", ABLATION, [b for b in budgets if b in ABLATION_BUDGETS], min(3, options.seeds))
        add(name, "kron", MAIN, [b for b in budgets if b > 512], options.seeds)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(PROBLEMS), default=None)
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=None, help="only these")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data-dir", type=Path, default=None, help="folder with FashionMNIST/raw, trec and cifar10")
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    parser.add_argument("--timing", action="store_true", help="only the seconds of whole fits, of one network")
    parser.add_argument("--quick", action="store_true", help="two networks on digits, few budgets and seeds")
    options = parser.parse_args()
    if options.networks is None:
        some = [name for name in PROBLEMS if name.startswith("digits")]
        options.networks = list(PROBLEMS) if options.data_dir else some
    if options.timing:
        for name in options.networks:
            record = timing(name, options.out / "cache", options.data_dir)
            write(options.out / "timing" / f"{name}.json", lambda p, r=record: p.write_text(json.dumps(r, indent=1)))  # type: ignore[misc]
            print(json.dumps(record, indent=1))
        return
    if options.quick:
        options.networks, options.budgets, options.seeds = ["digits-cnn", "digits-mlp"], [16, 64], 2
    bench: Bench | None = None
    runs = [run for run in plan(options) if options.methods is None or run[2] in options.methods]
    for number, (name, structure, method, budget, seed) in enumerate(runs):
        slug = method.replace(",", "").replace(" ", "-")
        path = options.out / "fidelity" / f"{name}.{structure}.{slug}.{budget}.{seed}.json"
        if path.exists():
            continue
        if bench is None or (bench.name, bench.structure_name) != (name, structure):
            bench = Bench(name, structure, options.out / "cache", options.data_dir)
        measured = bench.run(METHODS[method], budget, seed)
        record = {
            "schema": 1, "network": name, "structure": structure, "method": method,
            "estimator": METHODS[method].estimator,
            "sampler": repr(METHODS[method].sampler(budget)), "split": repr(METHODS[method].split), "budget": budget,
            "seed": seed, "n_pool": len(bench.problem.pool[0]), "n_data": bench.problem.n_data,
            "versions": {"debiased_laplace": __version__, "torch": torch.__version__, "source": SOURCE},
        } | measured  # fmt: skip
        write(path, lambda p, record=record: p.write_text(json.dumps(record, indent=1)))  # type: ignore[misc]
        errors = {key: f"{errors_of['abs_log_ratio']:.4f}" for key, errors_of in measured.get("priors", {}).items()}
        print(
            f"{number + 1}/{len(runs)} {path.stem}: {errors or measured['curvature_ratio']}",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main()
