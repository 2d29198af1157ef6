"""What can be tuned without validation data: evidence, last layer, the prior of the training, leave-one-out.

    python eval/evidence.py --tasks digits fashion-mnist cifar10 --data-dir <folder> [--seeds 5] [--docs docs]

For each task and seed the debiased posterior, that of a single batch, and that of all data get their prior precision in
every way that needs training data alone, and are scored on test data. Records, one for each seed and posterior, are in
``<out>/evidence``; what is there already is used. The tables of ``docs/evidence.md`` between ``<!-- NAME -->`` and
``<!-- end -->`` are filled from the seeds that have all posteriors, and their records are in
``<docs>/records/evidence.json``. Of the ResNets' training images :data:`POOLS` are used, also for "full data".

The file is long because the tables stay beside the ways that they list.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from documents import fill, markdown
from scipy.optimize import minimize_scalar
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.curvature.structures import Full, Kronecker
from debiased_laplace.evaluation.records import environment, write_json
from debiased_laplace.evaluation.scores.classification import classification_metrics
from debiased_laplace.evaluation.scores.regression import regression_metrics
from debiased_laplace.evaluation.shipped import uci
from debiased_laplace.evaluation.tasks import Context, Task, resolve_device
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.likelihoods import Categorical, Gaussian, Likelihood
from debiased_laplace.posterior.certainty import Certainty, compare
from debiased_laplace.posterior.evidence import maximise_marginal_likelihood, maximise_with_noise
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.leave_one_out import LeftOut, leave_one_out
from debiased_laplace.posterior.noise import best_noise
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.sampling.samplers import PrioritySampler, UniformSampler
from debiased_laplace.sampling.splits import Single

TASKS = (
    "digits", "fashion-mnist", "cifar10", "cifar10-resnet56", "uci-concrete", "uci-energy", "uci-power-plant",
    "uci-wine-quality-red",
)  # fmt: skip
POSTERIORS = ("debiased", "single batch", "full data")
#: Data: of the training set (all of it, if not named), held out for the reference, to test on, and left out.
POOLS = {"cifar10": 3000, "cifar10-resnet56": 500}
SIZES = {"cifar10": (200, 300, 200), "cifar10-resnet56": (60, 150, 60)}
DEFAULT_SIZES, QUICK_SIZES = (1000, 2000, 500), (100, 100, 50)
#: Checkpoints of akamaster/pytorch_resnet_cifar10: SGD with this weight decay on 50,000 images.
RESNET_DECAY = 1e-4
GRID = torch.logspace(-2, 6, 33, dtype=torch.float64)
CERTAINTY_DATA = 64
Moments = tuple[Tensor, Tensor]  # [N, C] and [R, N, C, C], float64


@dataclass(frozen=True)
class Data:
    """Inputs and targets."""

    inputs: Any
    targets: Tensor

    @classmethod
    def of(cls, batches: Any, n: int | None = None, index: Tensor | None = None) -> Data:
        """The first ``n`` data of a loader, or those of an index."""
        pairs = list(batches if n is None else _data.head(batches, n))
        inputs, targets = _data.concatenate([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
        return cls(inputs, targets) if index is None else cls(_data.take(inputs, index), targets[index])


def measure(name: str, seed: int, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """All ways for one posterior of one seed."""
    task = Task.load(name)
    context = Context(seed, options.data_dir, options.cache, options.quick, resolve_device(options.device))
    model = task.model(context)
    pool = list(_data.head(task.call("train_loader", context), POOLS.get(name, 10**9)))
    held, tested, left = QUICK_SIZES if options.quick else SIZES.get(name, DEFAULT_SIZES)
    n_pool = sum(len(y) for _, y in pool)
    index = torch.randperm(n_pool, generator=torch.Generator().manual_seed(1000 + seed))[:left]
    data = {
        "validation": Data.of(task.call("val_loader", context), held),
        "test": Data.of(task.call("test_loader", context), tested), "left out": Data.of(pool, index=index),
    }  # fmt: skip
    likelihood = Gaussian() if task.likelihood == "regression" else Categorical()
    n_data = task.n_data or n_pool
    shared = name in POOLS and kind == "full data" and not options.quick  # for all seeds, and it takes minutes
    checkpoint = options.out / "evidence" / f"{name}.fit" if shared else None
    common = {
        "likelihood": likelihood, "n_data": n_data, "generator": 0 if shared else seed,
        **kind_of_fit(kind, task.budget),
    }  # fmt: skip
    whole = fit(model, pool, structure=Kronecker(), checkpoint=checkpoint, **common)
    last = fit(model, pool, structure=Full(), parameters="last_layer", **common)
    print(f"{name}, seed {seed}, {kind}: fitted", file=sys.stderr, flush=True)
    priors = {"decay": decay_prior(name, n_data), "training": training_prior(whole, likelihood, pool)}
    ways = regression if task.likelihood == "regression" else classification
    return {
        "task": name, "seed": seed, "posterior": kind, "n_data": n_data, "pool": n_pool,
        "sizes": {key: len(part.targets) for key, part in data.items()}, **ways(whole, last, priors, data),
        "environment": environment(context.device),
    }  # fmt: skip


def kind_of_fit(kind: str, budget: int) -> dict[str, Any]:
    """Sampler and split."""
    if kind == "debiased":
        return {"sampler": PrioritySampler(budget)}
    return {"sampler": UniformSampler(budget if kind == "single batch" else None), "split": Single()}


def decay_prior(name: str, n_data: int) -> float | None:
    """The prior precision that the weight decay of the training is, at unit noise; None if it is none.

    AdamW's decay (Fashion-MNIST) is of the step and no term of a loss, and digits have none. The mean squared error of
    the UCI tasks is twice the loss per datum.
    """
    if name.startswith("cifar10"):
        return n_data * RESNET_DECAY
    return n_data * uci.WEIGHT_DECAY / 2 if name.startswith("uci-") else None


def training_prior(fitted: Fit, likelihood: Likelihood, pool: Sequence[Any]) -> float | None:
    r"""The prior precision of which the weights are the mode along themselves, at unit noise; None if there is none.

    :math:`\delta \|\theta\|^2 = -\theta^\top \nabla \sum_n \ell_n`, whatever the training was.
    """
    network, posterior = fitted.network, fitted.posterior
    parameters = {name: p.requires_grad_() for name, p in network.from_vector(posterior.mean.clone()).items()}
    slope, n = 0.0, 0
    for inputs, targets in pool:
        inputs, targets = _data.to_device(inputs, network.device), targets.to(network.device)
        loss = likelihood.loss(network.call(parameters, inputs), targets).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        slope += sum(float((g * p).sum()) for g, p in zip(gradients, parameters.values(), strict=True))
        n += len(targets)
    value = -posterior.n_data * slope / n / float(posterior.mean.double().square().sum())
    return value if value > 0 else None


def with_prior(posterior: Posterior, prior: Tensor | float, noise: float = 1.0) -> Posterior:
    prior_precision = torch.as_tensor(prior, dtype=torch.float64).reshape(-1)
    return replace(posterior, prior_precision=prior_precision, noise_variance=noise)


def moments(fitted: Fit, posteriors: Sequence[Posterior], data: Data) -> Moments:
    mean, covariances = functional_moments(fitted.network, list(posteriors), data.inputs)
    return mean.double().cpu(), covariances.double().cpu()


# -- classification --------------------------------------------------------------------------------


def classification(whole: Fit, last: Fit, priors: Mapping[str, Any], data: Mapping[str, Data]) -> dict[str, Any]:
    """Scores of every way, and how certain it is on training data."""
    likelihood, posterior = Categorical(), whole.posterior
    chosen = {
        "evidence": maximise_marginal_likelihood(posterior),
        "evidence, layers": maximise_marginal_likelihood(posterior, per_block=True),
        "weight decay": priors["decay"], "training": priors["training"],
    }  # fmt: skip
    chosen = {name: prior for name, prior in chosen.items() if prior is not None}
    several = [*(with_prior(posterior, prior) for prior in chosen.values()), *(with_prior(posterior, p) for p in GRID)]
    predicted = {name: moments(whole, several, part) for name, part in data.items()}
    place = {name: index for index, name in enumerate(chosen)}
    first = len(chosen)  # of the grid

    def predictions(part: str, index: int, link: str = "probit") -> Tensor:
        mean, covariances = predicted[part]
        return predictive(mean, covariances[index], link)

    def scores(probabilities: Tensor, **more: Any) -> dict[str, Any]:
        return scored(probabilities, data["test"].targets) | more

    mean = predicted["test"][0]
    rows = {"network": scores(mean.softmax(-1))}
    for name, index in place.items():
        prior = torch.as_tensor(chosen[name]).flatten().tolist()
        for link in ("probit", "mean_field"):
            rows[f"{name}, {link}"] = scores(predictions("test", index, link))
            if len(prior) == 1:
                rows[f"{name}, {link}"]["prior"] = prior[0]
    last_prior = maximise_marginal_likelihood(last.posterior)
    of_last = moments(last, [with_prior(last.posterior, last_prior)], data["test"])
    for link in ("probit", "mean_field"):
        rows[f"last layer, {link}"] = scores(predictive(of_last[0], of_last[1][0], link), prior=float(last_prior))

    # Leave-one-out: of the network at the prior that training implies, or of every posterior itself.
    outputs, covariances = predicted["left out"]
    targets = data["left out"].targets
    alone = [leave_one_out(likelihood, outputs, c, targets) for c in covariances]
    if "training" in place:
        without = known(alone[place["training"]])
        temperature = best_temperature(without, targets)
        rows["leave-one-out, temperature"] = scores((mean / temperature).softmax(-1), temperature=temperature)
        losses = [
            likelihood.log_loss(predictive(without, covariances[first + r]), targets).mean() for r in range(len(GRID))
        ]
        rows["leave-one-out, prior"] = of_grid(losses, lambda r: scores(predictions("test", first + r)))
    losses = [left_out_loss(likelihood, left_out, targets) for left_out in alone[first:]]
    rows["leave-one-out, self-consistent"] = of_grid(losses, lambda r: scores(predictions("test", first + r)))
    sure = [float(predictive(outputs, covariances[first + r]).amax(-1).mean()) for r in range(len(GRID))]
    right = [
        float(((known(left_out).argmax(-1) == targets) & (left_out.leverages < 1)).double().mean())
        for left_out in alone[first:]
    ]
    enough = [r for r, (confidence, share) in enumerate(zip(sure, right, strict=True)) if confidence >= share]
    rows["leave-one-out, calibrated"] = (
        scores(predictions("test", first + enough[0]), prior=float(GRID[enough[0]])) if enough else rows["network"]
    )

    # With validation data, to compare.
    labels = data["validation"].targets
    losses = [likelihood.log_loss(predictions("validation", first + r), labels).mean() for r in range(len(GRID))]
    best = int(torch.stack(losses).argmin())
    rows["validation data, probit"] = scores(predictions("test", first + best), prior=float(GRID[best]))
    temperature = best_temperature(predicted["validation"][0], labels)
    rows["validation data, temperature"] = scores((mean / temperature).softmax(-1), temperature=temperature)

    n = min(CERTAINTY_DATA, len(targets))
    certainty = {}
    of = {"evidence": place["evidence"], "evidence, layers": place["evidence, layers"], "validation data": first + best}
    for name, index in of.items():
        confidences = compare(
            likelihood, outputs[:n], covariances[index, :n], targets[:n], torch.full((n,), 1 / n).double()
        )
        certainty[name] = asdict(confidences)
    above = {name: float((alone[index].leverages >= 1).double().mean()) for name, index in place.items()}
    return {"scores": rows, "certainty": certainty, "leverage_above_one": above}


def predictive(mean: Tensor, covariance: Tensor, link: str = "probit") -> Tensor:
    """Probabilities from moments of the outputs."""
    wanted = covariance if Categorical().needs_covariance(link) else covariance.diagonal(dim1=-2, dim2=-1)
    return Categorical().predictive(mean, wanted, link)


def scored(probabilities: Tensor, targets: Tensor) -> dict[str, Any]:
    metrics = classification_metrics(probabilities, targets)
    kept = {key: float(metrics[key]) for key in ("accuracy", "nll", "ece")}
    return kept | {"confidence": float(probabilities.amax(-1).mean())}


def known(left_out: LeftOut) -> Tensor:
    """Outputs without the datum; zeros, the most uncertain, where the posterior cannot do without it."""
    return left_out.outputs.nan_to_num(nan=0.0)


def left_out_loss(likelihood: Likelihood, left_out: LeftOut, targets: Tensor) -> Tensor:
    """Mean loss of the posterior's predictions without the datum."""
    variances = left_out.covariances.diagonal(dim1=-2, dim2=-1).nan_to_num(nan=0.0)
    return likelihood.log_loss(likelihood.predictive(known(left_out), variances, "probit"), targets).mean()


def best_temperature(outputs: Tensor, targets: Tensor) -> float:
    """The temperature with the smallest loss, between 0.05 and 20."""

    def loss(logarithm: float) -> float:
        return float(Categorical().loss(outputs / math.exp(logarithm), targets).mean())

    return math.exp(minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x)


def of_grid(losses: Sequence[Tensor], scores: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    best = int(torch.stack(list(losses)).argmin())
    return scores(best) | {"prior": float(GRID[best])}


# -- regression ------------------------------------------------------------------------------------


def regression(whole: Fit, last: Fit, priors: Mapping[str, Any], data: Mapping[str, Data]) -> dict[str, Any]:
    """The same; every way has a noise variance, which nothing but training data tells."""
    residual = 2 * whole.mean_loss / whole.network.n_outputs
    one, layers, final = (of_both(*which) for which in ((whole, False), (whole, True), (last, False)))
    assumed = with_prior(whole.posterior, maximise_marginal_likelihood(whole.posterior))
    ways = {"evidence, noise 1": assumed, "evidence and noise": one, "evidence and noise, layers": layers}
    for key, title in (("decay", "weight decay, training error"), ("training", "training, training error")):
        if priors[key] is not None:
            ways[title] = with_prior(whole.posterior, priors[key] / residual, residual)
    rows = {}
    for fitted, posteriors_of in ((whole, ways), (last, {"last layer, evidence and noise": final})):
        mean, covariances = moments(fitted, list(posteriors_of.values()), data["test"])
        for (title, posterior), covariance in zip(posteriors_of.items(), covariances, strict=True):
            rows[title] = gaussian_scores(mean, covariance, float(posterior.noise_variance), data["test"].targets)
            rows[title]["prior"] = float(posterior.prior_precision[0])
    zero = torch.zeros_like(covariances[0])
    for title, noise in (("network, training error", residual), ("network, noise 1", 1.0)):
        rows[title] = gaussian_scores(mean, zero, noise, data["test"].targets)

    unit = [with_prior(whole.posterior, prior) for prior in GRID]
    predicted = {name: moments(whole, unit, part) for name, part in data.items()}
    outputs, covariances = predicted["left out"]
    without = leave_one_out(Gaussian(), outputs, covariances, data["left out"].targets)
    alone = without.outputs, without.covariances
    rows["leave-one-out, prior and noise"] = noise_of_grid(*alone, "left out", predicted, data)
    rows["validation data, prior and noise"] = noise_of_grid(*predicted["validation"], "validation", predicted, data)
    n = min(CERTAINTY_DATA, len(outputs))
    few = Data(_data.take(data["left out"].inputs, slice(0, n)), data["left out"].targets[:n])
    certainty = {}
    for title in ("evidence, noise 1", "evidence and noise", "evidence and noise, layers"):
        noise = float(ways[title].noise_variance)
        mean, (covariance,) = moments(whole, [ways[title]], few)
        compared = compare(
            Gaussian(), mean, covariance, few.targets, torch.full((n,), 1 / n).double(), weight=1 / noise,
            noise_variance=noise,
        )  # fmt: skip
        certainty[title] = asdict(compared)
    return {"scores": rows, "certainty": certainty}


def of_both(fitted: Fit, per_block: bool) -> Posterior:
    """With the prior precision and the noise variance of the largest marginal likelihood."""
    outputs = fitted.network.n_outputs
    prior, noise = maximise_with_noise(fitted.posterior, fitted.mean_loss, outputs, per_block=per_block)
    return with_prior(fitted.posterior, prior, noise)


def gaussian_scores(mean: Tensor, covariance: Tensor, noise: float, targets: Tensor) -> dict[str, Any]:
    variance = covariance.diagonal(dim1=-2, dim2=-1) + noise
    metrics = regression_metrics(mean, variance, targets)
    return {key: float(metrics[key]) for key in ("nll", "rmse", "coverage_95")} | {"noise": noise}


def noise_of_grid(
    mean: Tensor, covariances: Tensor, part: str, predicted: Mapping[str, Moments], data: Mapping[str, Data]
) -> dict[str, Any]:
    """Prior and noise of the smallest loss on some data; priors whose posterior cannot do without a datum are out."""
    variances, targets = covariances.diagonal(dim1=-2, dim2=-1), data[part].targets.double()
    means = mean if mean.ndim == 3 else mean.expand_as(variances)
    results = [best_noise(m, v[None], targets) for m, v in zip(means, variances, strict=True)]
    losses = torch.stack([loss[0] for _, loss in results]).nan_to_num(nan=math.inf)
    best = int(losses.argmin())
    noise = float(results[best][0])
    test, variances = predicted["test"]
    scores = gaussian_scores(test, noise * variances[best], noise, data["test"].targets)
    return scores | {"prior": float(GRID[best]) / noise}


# -- the document ----------------------------------------------------------------------------------


Seeds = Mapping[int, Mapping[str, Any]]  # the records of the posteriors of every seed


def document(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Keep the records that are complete, and fill the tables from them."""
    used = [
        rounded(posteriors[kind])
        for seeds in complete(records).values()
        for posteriors in seeds.values()
        for kind in POSTERIORS
    ]
    kept = path.parent / "records" / "evidence.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(used, separators=(",", ":")) + "\n")
    fill(path, parts(used))


def complete(records: Sequence[Mapping[str, Any]]) -> dict[str, Seeds]:
    """Seeds of each task that have all posteriors."""
    by_task: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in TASKS}
    for record in records:
        by_task[record["task"]].setdefault(record["seed"], {})[record["posterior"]] = record
    whole = {
        name: {seed: record for seed, record in seeds.items() if set(record) == set(POSTERIORS)}
        for name, seeds in by_task.items()
    }
    return {name: seeds for name, seeds in whole.items() if seeds}


def parts(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The generated parts of the document, from its records."""
    by_task = complete(records)
    made = {f"evidence {name}": table(seeds) for name, seeds in by_task.items()}
    classes = {name: seeds for name, seeds in by_task.items() if not name.startswith("uci-")}
    if classes:
        made["posteriors"] = posteriors(classes)
    every = [certainty for seeds in by_task.values() for kinds in seeds.values() for kind in kinds.values()
             for certainty in kind["certainty"].values()]  # fmt: skip
    wanted = {field.name for field in fields(Certainty)}
    if all(wanted <= set(certainty) for certainty in every):  # records of an earlier version lack some of it
        made["warnings"] = warned(by_task)
    return made


def rounded(value: Any) -> Any:
    """Five digits."""
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items() if key != "environment"}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def plus_minus(values: Sequence[float], digits: int = 3, scale: float = 1.0, signed: bool = False) -> str:
    """Mean and standard error over seeds."""
    scaled = scale * np.asarray(values)
    error = f" ± {scaled.std(ddof=1) / len(scaled) ** 0.5:.{digits}f}" if len(scaled) > 1 else ""
    return f"{scaled.mean():{'+' * signed}.{digits}f}{error}".replace("-", "\u2212")


def values(seeds: Seeds, kind: str, method: str, score: str = "nll") -> list[float]:
    return [posteriors[kind]["scores"][method][score] for posteriors in seeds.values()]


def table(seeds: Seeds) -> str:
    """Rows of ways, columns of posteriors: NLL, its paired difference to the network's own, and calibration."""
    every = [kinds[kind]["scores"] for kinds in seeds.values() for kind in POSTERIORS]
    score, title = ("ece", "ECE %") if "network" in every[0] else ("coverage_95", "95 % interval holds %")
    network = "network" if "network" in every[0] else "network, training error"
    rows = []
    for method in [name for name in every[0] if all(name in scores for scores in every)]:
        cells = [plus_minus(values(seeds, kind, method)) for kind in POSTERIORS]
        for kind in () if method == network else (POSTERIORS[0], POSTERIORS[-1]):
            pairs = zip(values(seeds, kind, method), values(seeds, kind, network), strict=True)
            cells.append(plus_minus([one - other for one, other in pairs], signed=True))
        cells += [""] * (len(POSTERIORS) + 2 - len(cells))
        cells += [plus_minus(values(seeds, kind, method, score), 1, 100) for kind in POSTERIORS]
        rows.append([method, *cells])
    minus = [f"NLL minus network, {kind}" for kind in (POSTERIORS[0], POSTERIORS[-1])]
    columns = [*(f"NLL, {kind}" for kind in POSTERIORS), *minus, *(f"{title}, {kind}" for kind in POSTERIORS)]
    return markdown(["way", *columns], rows)


def posteriors(by_task: Mapping[str, Seeds]) -> str:
    """Under the evidence, where nothing is tuned on data: paired differences to the posterior of all data."""
    rows = []
    for name, seeds in by_task.items():
        for method in ("evidence, probit", "evidence, mean_field", "evidence, layers, probit", "last layer, probit"):
            every = {kind: np.array(values(seeds, kind, method)) for kind in POSTERIORS}
            cells = [plus_minus(column) for column in every.values()]
            cells += [plus_minus(every[kind] - every[POSTERIORS[-1]], signed=True) for kind in POSTERIORS[:-1]]
            rows.append([name, method, plus_minus(values(seeds, POSTERIORS[0], "network")), *cells])
    columns = [*POSTERIORS, *(f"{kind} minus {POSTERIORS[-1]}" for kind in POSTERIORS[:-1])]
    return markdown(["task", "way", "network", *columns], rows)


def warned(by_task: Mapping[str, Seeds]) -> str:
    """The numbers of the warning, smallest and largest over seeds and posteriors, and how often it was given."""
    rows = []
    for name, seeds in by_task.items():
        every = [kinds[kind]["certainty"] for kinds in seeds.values() for kind in POSTERIORS]
        scale, digits = (1.0, 3) if name.startswith("uci-") else (100.0, 1)
        for method in every[0]:
            certainties = [certainty[method] for certainty in every]
            cells = []
            for key in ("performance", "left_out", "certainty"):
                scaled = [scale * certainty[key] for certainty in certainties]
                cells.append(f"{min(scaled):.{digits}f} to {max(scaled):.{digits}f}")
            n_warned = sum(Certainty(**certainty).too_small for certainty in certainties)
            rows.append([name, method, *cells, f"{n_warned} of {len(certainties)}"])
    return markdown(["task", "way", "network", "without each datum's own part", "predictions", "warned"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--cache", type=Path, default=Path("eval/results/cache"))
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true", help="little of everything")
    parser.add_argument("--no-document", action="store_true", help="records only")
    parser.add_argument("--only-document", action="store_true", help="from the records that are there")
    options = parser.parse_args()
    folder, suffix = options.out / "evidence", ".quick.json" if options.quick else ".json"
    for name, seed, kind in itertools.product(options.tasks, options.seeds, POSTERIORS):
        path = folder / f"{name}.{seed}.{kind.replace(' ', '-')}{suffix}"
        if not path.exists() and not options.only_document:
            write_json(path, measure(name, seed, kind, options))
    if not options.no_document:
        paths = [path for path in sorted(folder.glob("*.json")) if path.name.endswith(".quick.json") == options.quick]
        document(options.docs / "evidence.md", [json.loads(path.read_text()) for path in paths])


if __name__ == "__main__":
    main()
