"""Kronecker factors by structure and by precision, against those in double precision.

    python eval/factors.py [--networks convolutions] [--quick] [--docs docs]

Two networks are trained on scikit-learn's digits, in double precision: convolutions, and a Transformer of rows of
pixels. Their posterior is fitted with all training data, in double and in single precision, with layers that are
rounded to bfloat16 in several ways, and with factors in blocks or diagonal. Errors are those of the factors, of the
variances of test outputs and of the log-determinant, against double precision. A minute of one thread.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from bench import hardware
from documents import fill, markdown
from sklearn.datasets import load_digits
from torch import Tensor, nn

from debiased_laplace.curvature.projected import projected_curvatures
from debiased_laplace.curvature.sharing import Expand
from debiased_laplace.curvature.structures import Kronecker, KroneckerStatistics
from debiased_laplace.evaluation.records import read_json, write_json
from debiased_laplace.fitting.fit import fit
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.sampling.samplers import UniformSampler
from debiased_laplace.sampling.splits import Single

PRIORS = (1e-4, 0.01, 1.0, 100.0)
N_TRAIN, N_TEST, BATCH = 400, 100, 4
STRUCTURES: dict[str, dict[str, Any]] = {
    "dense": {}, "blocks of at most 48": {"max_factor": 48}, "blocks of at most 16": {"max_factor": 16},
    "diagonal": {"diagonal": ["*"]},
}  # fmt: skip
BATCHES = (1, 10, 100, 1000, 10_000)


class Rows(nn.Module):
    """A Transformer of the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 24)
        self.positions = nn.Parameter(0.1 * torch.randn(8, 24))
        self.block = nn.TransformerEncoderLayer(24, 4, 64, 0.0, batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[N, 10]``."""
        return self.head(self.block(self.embed(x[:, 0]) + self.positions).mean(1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


NETWORKS = {"convolutions": convolutions, "Transformer": Rows}


class Autocast(nn.Module):
    """A network that enters mixed precision by itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """As the network in it."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x)


@dataclass(frozen=True)
class Rounded(Expand):
    """Inputs and vectors as bfloat16 keeps them, of a network in single precision."""

    sums_positions: ClassVar[bool] = False

    def inputs(self, inputs: Any, mask: Tensor | None) -> Any:
        """Those of :class:`.Expand`, rounded."""
        return super().inputs(inputs, mask).to(torch.bfloat16).to(torch.float32)

    def vectors(self, vectors: Tensor, mask: Tensor | None) -> tuple[Tensor, float]:
        """Those of :class:`.Expand`, rounded."""
        rounded, factor = super().vectors(vectors, mask)
        return rounded.to(torch.bfloat16).to(torch.float32), factor


#: Of a network in double precision: the network, the precision of its inputs, and what becomes of the positions.
WAYS: dict[str, tuple[Any, torch.dtype, Any]] = {
    "float64": (lambda model: model, torch.float64, Expand()),
    "float32": (lambda model: model.float(), torch.float32, Expand()),
    "float32, layers rounded for the factors": (lambda model: model.float(), torch.float32, Rounded()),
    "autocast in forward": (lambda model: Autocast(model.float()), torch.float32, Expand()),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16, Expand()),
}


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images).view(-1, 1, 8, 8)[order] / 16, torch.tensor(labels)[order]


def trained(name: str, images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        index = torch.randint(len(labels), (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[index].float()), labels[index]).backward()
        optimizer.step()
    return model.double().eval()


@dataclass
class Result:
    """What a way of computing gives: factors, variances ``[priors, N, C]`` and log-determinants ``[priors]``."""

    factors: list[Tensor]
    variances: Tensor
    log_dets: list[float]


def result(fitted: Any, posterior: Any, statistics: KroneckerStatistics, test: Tensor) -> Result:
    priors = [torch.tensor([prior], dtype=torch.float64) for prior in PRIORS]
    posteriors = [replace(posterior, prior_precision=prior) for prior in priors]
    _, variances = functional_moments(fitted.network, posteriors, test, covariance=False)
    factors = [*statistics.inputs, *statistics.outputs]
    log_dets = [float(one.log_det_precision.double()) for one in posteriors]
    return Result([factor.double() for factor in factors], variances.double(), log_dets)


def computed(model: nn.Module, way: str, structure: str, train: tuple[Tensor, Tensor], test: Tensor) -> Result:
    """One way, one structure: directions and curvatures of all training data."""
    convert, dtype, sharing = WAYS[way]
    network, (images, labels) = convert(copy.deepcopy(model)), train
    images, test = images.to(dtype), test.to(dtype)
    kind = Kronecker(**STRUCTURES[structure], sharing=sharing)
    batches = list(zip(images.split(100), labels.split(100), strict=True))
    fitted = fit(network, batches, Categorical(), structure=kind, sampler=UniformSampler(None), split=Single())
    statistics = kind.measure(fitted.network, of_all(fitted.network, images, labels))
    return result(fitted, fitted.posterior, statistics, test)


def of_all(network: Network, images: Tensor, labels: Tensor, part: slice = slice(None)) -> CurvatureData:
    """Data with the weights of a mean over all of them."""
    weights = torch.full((len(labels),), 1 / len(labels), dtype=torch.float64)
    data = WeightedData(images, labels, weights, torch.arange(len(labels)))
    return CurvatureData(network, data.take(part), Categorical())


def summed_in_bfloat16(model: nn.Module, train: tuple[Tensor, Tensor], test: Tensor) -> Result:
    """What the package does not do: factors of batches of four added in bfloat16; a network in single precision."""
    (images, labels), kind = train, Kronecker()
    images = images.float()
    batches = list(zip(images.split(100), labels.split(100), strict=True))
    fitted = fit(copy.deepcopy(model).float(), batches, Categorical(), structure=kind, sampler=UniformSampler(None),
                 split=Single())  # fmt: skip
    parts = [
        kind.measure(fitted.network, of_all(fitted.network, images, labels, slice(start, start + BATCH)))
        for start in range(0, len(labels), BATCH)
    ]
    sums = [
        [reduce(lambda total, one: total + one.bfloat16(), of_block, of_block[0].bfloat16()).float()
         for of_block in zip(*(getattr(part, name) for part in parts), strict=True)]
        for name in ("inputs", "outputs")
    ]  # fmt: skip
    statistics = KroneckerStatistics.of(*sums)
    basis = kind.eigenbasis(fitted.network, statistics)
    curvatures = projected_curvatures(fitted.network, basis, of_all(fitted.network, images, labels))
    posterior = replace(fitted.posterior, basis=basis, curvatures=curvatures)
    return result(fitted, posterior, statistics, test.float())


def distance(one: Result, other: Result, *, factors: bool) -> dict[str, Any]:
    """Mean absolute log ratios of variances, differences of log-determinants a parameter, errors of the factors."""
    found: dict[str, Any] = {
        "variances": (one.variances / other.variances).log().abs().flatten(1).mean(1).tolist(),
        "log_det": [a - b for a, b in zip(one.log_dets, other.log_dets, strict=True)],
    }
    if factors:
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(one.factors, other.factors, strict=True)]
        found["factors"] = max(errors)
    return found


def eigenvalues(one: Result, exact: Result) -> dict[str, float]:
    """How far eigenvalues of the factors are off, by their size relative to the largest: median absolute log ratios."""
    ratios: dict[str, list[float]] = {"above 1e-3": [], "1e-5 to 1e-3": [], "1e-7 to 1e-5": []}
    for a, b in zip(one.factors, exact.factors, strict=True):
        if a.ndim == 2:
            continue
        found, right = torch.linalg.eigvalsh(a), torch.linalg.eigvalsh(b)
        relative = right / right.amax(-1, keepdim=True)
        for name, low, high in (("above 1e-3", 1e-3, 2), ("1e-5 to 1e-3", 1e-5, 1e-3), ("1e-7 to 1e-5", 1e-7, 1e-5)):
            some = (relative >= low) & (relative < high)
            ratios[name] += (found[some].clamp_min(1e-30) / right[some]).log().abs().tolist()
    return {name: float(torch.tensor(values).median()) for name, values in ratios.items() if values}


def of_network(name: str, quick: bool) -> dict[str, Any]:
    """Errors of every way with dense factors, and of every structure in double precision and bfloat16."""
    images, labels = digits()
    n = 60 if quick else N_TRAIN
    train = images[:n], labels[:n]
    test = images[-20 if quick else -N_TEST :]
    model = trained(name, *train, steps=20 if quick else 600)
    exact = computed(model, "float64", "dense", train, test)
    ways = {}
    for way in WAYS:
        if way != "float64":
            found = computed(model, way, "dense", train, test)
            ways[way] = distance(found, exact, factors=True) | {"eigenvalues": eigenvalues(found, exact)}
    found = summed_in_bfloat16(model, train, test)
    ways["float32, sums in bfloat16"] = distance(found, exact, factors=True) | {
        "eigenvalues": eigenvalues(found, exact)
    }
    structures = {}
    for structure in STRUCTURES:
        double = computed(model, "float64", structure, train, test) if structure != "dense" else exact
        structures[structure] = {"to_dense": distance(double, exact, factors=False)} | {
            way: distance(computed(model, way, structure, train, test), double, factors=False)
            for way in ("float32", "bfloat16")
        }
    return {"n_params": sum(p.numel() for p in model.parameters()), "n": n, "ways": ways, "structures": structures}


def sums(counts: tuple[int, ...]) -> list[dict[str, float]]:
    """Largest errors of a sum of outer products of bfloat16 numbers, by the number of batches of eight."""
    from debiased_laplace.curvature.moments import MomentSum

    generator = torch.Generator().manual_seed(0)
    exact, low = torch.zeros(24, 24, dtype=torch.float64), torch.zeros(24, 24, dtype=torch.bfloat16)
    total, rows = MomentSum(1, 24, square=True, like=torch.empty(0)), []
    for n in range(1, max(counts) + 1):
        columns = torch.randn(8, 24, generator=generator).relu().bfloat16()
        total.add(columns.float()[:, None, :, None])
        exact += columns.double().mT @ columns.double()
        low += columns.mT @ columns
        if n in counts:
            largest = exact.abs().max()
            errors = [(one.double() - exact).abs().max() / largest for one in (total.moment().dense()[0], low)]
            rows.append({"batches": n, "float32": float(errors[0]), "bfloat16": float(errors[1])})
    return rows


def five(value: Any) -> Any:
    """With five digits."""
    if isinstance(value, Mapping):
        return {key: five(one) for key, one in value.items()}
    if isinstance(value, list):
        return [five(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def number(value: float) -> str:
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3f}"


def parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the document."""
    priors = [f"{prior:g}" for prior in PRIORS]
    ways, structures = [], []
    for name, of_name in record["networks"].items():
        for way, errors in of_name["ways"].items():
            bands = [number(value) for value in errors["eigenvalues"].values()]
            ways.append([name, way, number(errors["factors"]), *bands, *map(number, errors["variances"])])
        for structure, by_way in of_name["structures"].items():
            for way, errors in by_way.items():
                if structure == way == "dense" or (structure == "dense" and way == "to_dense"):
                    continue
                label = "float64, to dense" if way == "to_dense" else f"{way}, to float64"
                per = [number(value / of_name["n_params"]) for value in errors["log_det"]]
                structures.append([name, structure, label, *map(number, errors["variances"]), *per])
    bands = ["eigenvalues above 1e-3", "1e-5 to 1e-3", "1e-7 to 1e-5"]
    return {
        "factors ways": markdown(["network", "computed in", "factors", *bands, *(f"prior {p}" for p in priors)], ways),
        "factors structures": markdown(
            ["network", "factors", "computed in", *(f"prior {p}" for p in priors), *(f"log det, {p}" for p in priors)],
            structures,
        ),
        "factors sums": markdown(
            ["batches", "summed in float32", "in bfloat16"],
            [[f"{row['batches']:,}", number(row["float32"]), number(row["bfloat16"])] for row in record["sums"]],
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true", help="little data, and nothing is written into documents")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    path = options.docs / "records" / "factors.json"
    networks = read_json(path)["networks"] if path.exists() else {}
    record = {"hardware": hardware("cpu"), "torch": torch.__version__, "networks": networks,
              "sums": five(sums(BATCHES[:3] if options.quick else BATCHES))}  # fmt: skip
    for name in options.networks:
        networks[name] = five(of_network(name, options.quick))
        write_json(path, record)
    if not options.quick:
        fill(options.docs / "fidelity.md", parts(record))


if __name__ == "__main__":
    main()
