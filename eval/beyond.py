"""Beyond images: questions and news, scenes with a label for every pixel, and tables whose noise varies.

    python eval/beyond.py --data-dir <folder> [--parts trec scenes tables] [--quick]

``trec`` and ``scenes`` go through the evaluation suite. ``tables`` are the UCI sets: networks with one noise level and
with a second output for the noise of each datum, alone and with posteriors. Records of seeds and splits are in
``<out>/beyond``; what is there already is used. ``<docs>/records/beyond.json`` has what the page shows, and the marked
parts of ``<docs>/beyond.md`` are filled from there.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from documents import fill, markdown
from results import rounded
from scipy.special import ndtr, ndtri
from scipy.stats import qmc
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.evaluation import run
from debiased_laplace.evaluation.methods import ISOTROPIC, MAP, POINTS, Options, methods_of
from debiased_laplace.evaluation.predictors.baselines import outputs_of
from debiased_laplace.evaluation.records import environment, read_json, read_record, write_json, write_record
from debiased_laplace.evaluation.report.numbers import number, plus_minus, with_interval
from debiased_laplace.evaluation.report.summary import summarise
from debiased_laplace.evaluation.report.verdicts import verdict
from debiased_laplace.evaluation.scores import intervals
from debiased_laplace.evaluation.scores.cells import combine
from debiased_laplace.evaluation.shipped import uci
from debiased_laplace.evaluation.shipped.common import existing, initialised, kept, one_thread, train
from debiased_laplace.evaluation.tasks import Context, Task
from debiased_laplace.likelihoods import square_root
from debiased_laplace.posterior.predictive import functional_moments

CLASSIFIERS = ("trec", "scenes")
#: Strong shifts, and data that are none of the task's.
CONDITIONS = {
    "trec": (*(f"{name} {n}" for name in ("missing words", "word order", "typos") for n in (3, 5)), "AG News"),
    "scenes": (*(f"{name} {n}" for name in ("noise", "blur", "contrast") for n in (3, 5)), "shuffled patches"),
}
N_SHIFTED = 400
#: How data that are none of the task's are told from those that are; and by the network alone, where it can.
DETECTED = ("maximum probability", "entropy", "mutual information")
DETECTORS = ("energy", "maximum logit", "Mahalanobis", "relative Mahalanobis")
SINGLE, DEBIASED, FULL = "single-batch K-FAC", "debiased K-FAC", "full-data K-FAC"
COMPARED = (*POINTS, ISOTROPIC, SINGLE, DEBIASED, FULL)

# -- through the suite -----------------------------------------------------------------------------


def classified(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """NLL and ECE on test data, NLL under strong shift, AUROC out of distribution; with differences."""
    task, out = Task.load(name), options.out / name
    context = Context(data_dir=options.data_dir, cache=options.cache or out / "cache", quick=options.quick)
    chosen = [method for method in methods_of(task) if method.name in COMPARED]
    records = run(
        task, out, range(1 if options.quick else options.seeds), context, methods=chosen,
        options=Options(
            n_resamples=50 if options.quick else 400, grid_size=10 if options.quick else 46, distance_inputs=100,
            conditions=CONDITIONS[name], n_shifted=N_SHIFTED, draws=1 if options.quick else 2,
        ),
        progress=lambda seed, step: print(f"{name}, seed {seed}: {step}", file=sys.stderr, flush=True),
    )  # fmt: skip
    summary = summarise(records)
    (ood,) = summary["ood"]
    aurocs = [f"{score}, auroc" for score in (*DETECTED, *DETECTORS)]
    detected = _only(ood, aurocs)
    return {
        "seeds": len(records), "n": summary["test"]["n"], "budget": task.budget, "ood": ood["name"],
        "train": summary["data"]["train"],
        "test": _only(summary["test"], ("nll", "ece", "accuracy")),
        "shift": _only(summary["strong_shift"], ("nll",)),
        "detected": {
            "scores": detected["scores"], "differences": detected["differences"][MAP],
            "against_detectors": _only({"scores": ood.get("against_detectors", {}).get(MAP, {}), "differences": {}},
                                       aurocs)["scores"],
        },
    }  # fmt: skip


def _only(entry: Mapping[str, Any], scores: Sequence[str]) -> dict[str, Any]:
    def kept(methods: Mapping[str, Any]) -> dict[str, Any]:
        return {name: {score: of[score] for score in scores if score in of} for name, of in methods.items()}

    return {
        "scores": kept(entry["scores"]), "differences": {name: kept(of) for name, of in entry["differences"].items()}
    }  # fmt: skip


def classified_table(record: Mapping[str, Any]) -> str:
    """A row for each method on test data and under strong shift; differences to all that others are measured by."""
    rows = []
    for part, title in (("test", "test"), ("shift", "strong shift")):
        for name in COMPARED:
            scores = record[part]["scores"][name]
            minus = (record[part]["differences"][second].get(name, {}) for second in (*POINTS, FULL))
            rows.append(
                [title, name, plus_minus(scores["nll"], 3),
                 plus_minus(scores["ece"], 1, scale=100) if "ece" in scores else "",
                 *(_marked(differences, "nll", 3) for differences in minus)]
            )  # fmt: skip
    columns = ["data", "method", "NLL", "ECE %", *(f"NLL minus {name}" for name in (*POINTS, FULL))]
    return f"{markdown(columns, rows)}\n\n{record['seeds']} seeds, {record['n']} test data each."


def detected_table(record: Mapping[str, Any]) -> str:
    """How well every score of every method tells data that are none of the task's: AUROC, and differences of it."""
    detected, rows = record["detected"], []
    detectors = [name for name in DETECTORS if f"{name}, auroc" in detected["scores"][MAP]]
    for score in DETECTED:
        key = f"{score}, auroc"
        for name in COMPARED:
            if key in (scores := detected["scores"][name]):
                against = detected["against_detectors"].get(name, {}) if score == DETECTED[0] else {}
                rows.append(
                    [name, score, plus_minus(scores[key], 3), _marked(detected["differences"].get(name, {}), key, 3),
                     *(_marked(against, f"{detector}, auroc", 3) for detector in detectors)]
                )  # fmt: skip
    for detector in detectors:
        found = plus_minus(detected["scores"][MAP][f"{detector}, auroc"], 3)
        rows.append([MAP, detector, found, *[""] * (1 + len(detectors))])
    columns = ["method", "score", f"AUROC of {record['ood']}", f"minus {MAP}, same score"]
    return markdown([*columns, *(f"minus {detector}" for detector in detectors)], rows)


def _marked(differences: Mapping[str, Any], score: str, digits: int) -> str:
    if score not in differences:
        return ""
    mark = {"better": " ✓", "worse": " ✗"}.get(verdict(score, differences[score]), "")
    return with_interval(differences[score], digits) + mark


# -- tables ----------------------------------------------------------------------------------------

TABLES = ("concrete", "energy", "power-plant", "wine-quality-red")
#: What the noise variance of a network is multiplied by, relative to the best for the network alone.
SCALES = (1.0, 0.7, 0.5, 0.3)
#: Draws of the outputs of a datum; a power of two.
N_DRAWS = 128
N_QUICK_DRAWS = 16
N_SPLITS = 8
ONE, OWN, SCALED = "one noise", "own noise", "own noise, scaled"
NETWORK = "network"
ROWS = (
    (ONE, NETWORK), (ONE, DEBIASED),
    (OWN, NETWORK), (OWN, DEBIASED),
    *((SCALED, method) for method in (NETWORK, ISOTROPIC, SINGLE, DEBIASED, FULL)),
)  # fmt: skip

#: What all others are compared with.
BASELINES = (ONE, NETWORK), (SCALED, NETWORK), (SCALED, ISOTROPIC)


class Scaled(nn.Module):
    """A network with means and log variances whose variances are multiplied by one number.

    Args:
        network: Outputs ``[N, 2]``.
        scale: The number.
    """

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("shift", torch.tensor([0.0, math.log(scale)]))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[N, 2]``."""
        return self.network(x) + self.shift


def gaussian_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of targets ``[N, 1]`` under means and log variances ``[N, 2]``."""
    return dl.HeteroscedasticGaussian().loss(outputs, targets).mean()


def network_of_noise(
    inputs: Tensor, targets: Tensor, seed: int, n_steps: int, validation: tuple[Tensor, Tensor]
) -> nn.Module:
    """The task's network with a second output, as it was when it was best on the validation data.

    Twenty looks at them in the course of the training: without these, networks learn that their training data have
    hardly any noise.
    """

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(inputs.shape[1], uci.HIDDEN), nn.ReLU(), nn.Linear(uci.HIDDEN, 2))

    model = initialised(build, seed)
    optimizer = torch.optim.Adam(model.parameters(), uci.LEARNING_RATE, weight_decay=uci.WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    order = list(uci._order(len(inputs), n_steps, seed, torch.device("cpu")))
    best, weights = math.inf, model.state_dict()
    with one_thread():
        for first in range(0, n_steps, max(1, n_steps // 20)):
            batches = order[first : first + max(1, n_steps // 20)]
            train(model, inputs, targets, gaussian_loss, batches, optimizer, schedule)
            with torch.no_grad():
                loss = float(gaussian_loss(model(validation[0]), validation[1]))
            if loss < best:
                best, weights = loss, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    return model.eval()


def best_scale(model: nn.Module, validation: tuple[Tensor, Tensor]) -> float:
    """What the variances have to be multiplied by for the smallest loss: the mean of squared errors over them."""
    with torch.no_grad():
        mean, log_variance = model(validation[0]).double().chunk(2, 1)
    return float(((validation[1] - mean).square() / log_variance.exp()).mean())


SETTINGS: dict[str, dict[str, Any]] = {
    ISOTROPIC: {"structure": dl.Isotropic(), "sampler": dl.UniformSampler(1)},
    SINGLE: {"sampler": dl.UniformSampler(uci.BUDGET), "split": dl.Single()},
    DEBIASED: {"sampler": dl.PrioritySampler(uci.BUDGET)},
    FULL: {"sampler": dl.UniformSampler(None)},
}


def tuned(
    model: nn.Module, parts: uci.StandardisedSplit, method: str, likelihood: Any, seed: int
) -> tuple[dl.Laplace, float]:
    """A posterior tuned on the validation data, and its loss there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the end of the grid, where a posterior adds nothing
        fitted = dl.fit(model, [parts.train], likelihood, seed=seed, **SETTINGS[method]).tune(
            [parts.validation], prior_precisions=torch.logspace(-3, 6, 46, dtype=torch.float64)
        )
    assert fitted.tuned is not None
    return fitted, float(fitted.tuned.loss)


def draws(mean: Tensor, covariance: Tensor, n_draws: int) -> Tensor:
    """Quasi-random draws ``[M, N, C]`` of Gaussian outputs ``[N, C]``, ``[N, C, C]``, float64."""
    points = qmc.Sobol(mean.shape[1], seed=0).random(n_draws)
    normals = torch.from_numpy(ndtri(points))
    return mean.double() + torch.einsum("ncd,md->mnc", square_root(covariance.double()), normals)


def mixture_scores(means: np.ndarray, deviations: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    r"""Scores of mixtures of M Gaussians for N targets: NLL in nats, CRPS, whether the 95 % interval holds.

    .. math:: \mathrm{CRPS} = \mathrm E\,A(y - m, s^2) - \tfrac12 \mathrm E\,A(m - m', s^2 + s'^2),
        \qquad A(d, v) = 2 \sqrt v\, \varphi(d / \sqrt v) + d\, (2 \Phi(d / \sqrt v) - 1)

    Args:
        means: ``[M, N]``.
        deviations: ``[M, N]``.
        targets: ``[N]``.

    Source: Grimit et al., Quarterly Journal of the Royal Meteorological Society 132 (2006), equation (5).
    """

    def distance(difference: np.ndarray, deviation: np.ndarray) -> np.ndarray:
        z = difference / deviation
        return deviation * (2 * np.exp(-z * z / 2) / math.sqrt(2 * math.pi) + z * (2 * ndtr(z) - 1))

    z = (targets - means) / deviations
    logs = -0.5 * z * z - np.log(deviations) - 0.5 * math.log(2 * math.pi)
    largest = logs.max(0)
    spread = np.zeros(len(targets))
    for mean, deviation in zip(means, deviations, strict=True):
        spread += distance(means - mean, np.hypot(deviations, deviation)).mean(0) / len(means)
    below = ndtr(z).mean(0)
    return {
        "nll": -largest - np.log(np.exp(logs - largest).mean(0)),
        "crps": distance(targets - means, deviations).mean(0) - spread / 2,
        "covered": ((below > 0.025) & (below < 0.975)).astype(float),
    }


def split_scores(dataset: str, split: int, options: argparse.Namespace) -> dict[str, Any]:
    """Scores of every datum's mean over the test data of one split, and differences to the network of each kind."""
    file = existing(options.data_dir, f"uci/{dataset}.npz", f"{dataset}.npz")
    if file is None:
        sys.exit(f"Expected {dataset}.npz in the folder of --data-dir or in uci there, got {options.data_dir}.")
    parts, n_steps = uci.split(file, split, options.quick), uci.QUICK_STEPS if options.quick else uci.STEPS
    cache, inputs, targets = options.out / "beyond" / "cache", *parts.test
    settings = {"split": split, "steps": n_steps, "file": dataset}
    n_features, n_draws = inputs.shape[1], N_QUICK_DRAWS if options.quick else N_DRAWS

    def made(outputs: int, make: Any) -> nn.Module:
        def build() -> nn.Module:
            return nn.Sequential(nn.Linear(n_features, uci.HIDDEN), nn.ReLU(), nn.Linear(uci.HIDDEN, outputs))

        return kept(cache, f"{dataset}-{split}", settings | {"outputs": outputs}, build, make, torch.device("cpu"))

    one = made(1, lambda: uci.trained(*parts.train, split, n_steps=n_steps))
    own = made(2, lambda: network_of_noise(*parts.train, split, n_steps, parts.validation))

    def scores(mean: Tensor, covariance: Tensor | None, noise: float | None) -> dict[str, np.ndarray]:
        drawn = mean.double()[None] if covariance is None else draws(mean, covariance, n_draws)
        logs = torch.full_like(drawn[..., 0], math.log(noise)) if noise is not None else drawn[..., 1]
        return mixture_scores(drawn[..., 0].numpy(), (0.5 * logs).exp().numpy(), targets[:, 0].double().numpy())

    def of_posterior(posterior: dl.Laplace, noise: float | None) -> dict[str, np.ndarray]:
        return scores(*functional_moments(posterior.network, posterior.posterior, inputs), noise)

    @torch.no_grad()
    def of_network(model: nn.Module, noise: float | None) -> dict[str, np.ndarray]:
        return scores(model(inputs), None, noise)

    outputs, held = outputs_of(one, [parts.validation])
    result = {
        (ONE, NETWORK): of_network(one, float((held - outputs).square().mean())),
        (OWN, NETWORK): of_network(own, None),
    }
    posterior, _ = tuned(one, parts, DEBIASED, "regression", split)
    result[ONE, DEBIASED] = of_posterior(posterior, float(posterior.posterior.noise_variance))
    noisy = dl.HeteroscedasticGaussian()
    result[OWN, DEBIASED] = of_posterior(tuned(own, parts, DEBIASED, noisy, split)[0], None)
    best = best_scale(own, parts.validation)
    result[SCALED, NETWORK] = of_network(Scaled(own, best), None)
    chosen = {}
    for method in SETTINGS:
        found = [(*tuned(Scaled(own, best * scale), parts, method, noisy, split), scale) for scale in SCALES]
        posterior, _, scale = min(found, key=lambda entry: entry[1])
        result[SCALED, method] = of_posterior(posterior, None)
        chosen[method] = [scale, float(posterior.posterior.prior_precision[0])]
    cells = {row: {name: cell(values) for name, values in of.items()} for row, of in result.items()}
    differences = {
        second: {
            first: {name: cell(result[first][name] - result[second][name]) for name in ("nll", "crps")}
            for first in ROWS
        }
        for second in BASELINES
    }
    return {
        "scores": named(cells), "differences": {" | ".join(second): named(of) for second, of in differences.items()},
        "scale": best, "chosen": chosen, "n_test": len(targets), "n_train": len(parts.train[0]),
    }  # fmt: skip


def named(rows: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    """Keys that JSON has."""
    return {" | ".join(row): value for row, value in rows.items()}


def cell(values: np.ndarray) -> list[float]:
    """Mean, standard error and 95 % interval."""
    return [
        float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5,
        *intervals.mean(values, intervals.CONFIDENCE),
    ]  # fmt: skip


def tables(options: argparse.Namespace) -> dict[str, Any]:
    """Every set over its splits, which overlap: errors are corrected for that."""
    result = {}
    for dataset in TABLES[: 1 if options.quick else None]:
        records = [kept_record(dataset, split, options) for split in range(1 if options.quick else options.splits)]
        overlap = records[0]["n_test"] / records[0]["n_train"]
        result[dataset] = {
            "splits": len(records), "n_test": records[0]["n_test"], "n_train": records[0]["n_train"],
            "scale": [record["scale"] for record in records], "chosen": [record["chosen"] for record in records],
            **{part: combined([record[part] for record in records], overlap) for part in ("scores", "differences")},
        }  # fmt: skip
    return result


def combined(parts: Sequence[Any], overlap: float) -> Any:
    """The cells of several splits, in the same nested dictionaries."""
    if isinstance(parts[0], Mapping):
        return {key: combined([part[key] for part in parts], overlap) for key in parts[0]}
    return combine(parts, same_data=False, overlap=overlap)


def kept_record(dataset: str, split: int, options: argparse.Namespace) -> dict[str, Any]:
    """The record of a split: the one that is there, or a new one."""
    made_from = {"dataset": dataset, "split": split, "quick": options.quick}
    path = options.out / "beyond" / f"{dataset}.{split}{'.quick' * options.quick}.json"
    record = read_record(path, made_from)
    if record is None:
        print(f"{dataset}, split {split}", file=sys.stderr, flush=True)
        record = made_from | split_scores(dataset, split, options)
        write_record(path, record)
    return record


def tables_table(record: Mapping[str, Any]) -> str:
    """NLL of every row of the full table, a column for each set."""
    rows = [
        [noise, method, *(plus_minus(of["scores"][f"{noise} | {method}"]["nll"], 3) for of in record.values())]
        for noise, method in ROWS
    ]
    splits = ", ".join(f"{of['splits']} of {dataset}" for dataset, of in record.items())
    return f"{markdown(['noise', 'NLL', *record], rows)}\n\nSplits: {splits}."


def full_table(record: Mapping[str, Any]) -> str:
    """A row for each set, kind of noise and method."""
    rows = []
    for dataset, of in record.items():
        for noise, method in ROWS:
            key, scores = f"{noise} | {method}", of["scores"][f"{noise} | {method}"]
            differences = (
                "" if (noise, method) == second else _marked(of["differences"][" | ".join(second)][key], "nll", 3)
                for second in BASELINES
            )
            rows.append(
                [
                    dataset, noise, method, plus_minus(scores["nll"], 3), plus_minus(scores["crps"], 4),
                    number(scores["covered"][0], 1, scale=100), *differences,
                ]
            )  # fmt: skip
    columns = ["set", "noise", "method", "NLL", "CRPS", "95 % interval holds %"]
    return markdown([*columns, *(f"NLL minus {method}, {noise}" for noise, method in BASELINES)], rows)


# -- the page --------------------------------------------------------------------------------------


def parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the page, from the record."""
    made: dict[str, str] = {}
    for name in CLASSIFIERS:
        if name in record:
            made |= {name: classified_table(record[name]), f"{name} detected": detected_table(record[name])}
    if "tables" in record:
        made |= {"tables": tables_table(record["tables"]), "all tables": full_table(record["tables"])}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=(*CLASSIFIERS, "tables"), default=[*CLASSIFIERS, "tables"])
    parser.add_argument("--seeds", type=int, default=5, help="of trec and scenes")
    parser.add_argument("--splits", type=int, default=N_SPLITS, help="of every table")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--cache", type=Path, default=None, help="for trained weights; <out>/<task>/cache by default")
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true", help="one seed and little of everything")
    options = parser.parse_args()
    path = options.docs / "records" / "beyond.json"
    record = read_json(path) if path.exists() else {}
    for name in options.parts:
        record[name] = rounded(tables(options) if name == "tables" else classified(name, options))
        write_json(path, record | {"environment": environment(torch.device("cpu"))})
    fill(options.docs / "beyond.md", parts(read_json(path)))


if __name__ == "__main__":
    main()
