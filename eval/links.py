"""What link, temperature and selection of the prior precision contribute: one posterior, tuned in several ways.

    python eval/links.py --tasks digits fashion-mnist cifar10 --data-dir <folder> [--images 500] [--docs docs]

For each task the debiased posterior of one seed is tuned on the validation data in every way, and scored on test and
shifted data. Records are in ``<out>/links``; what is there already is used, and ``<docs>/records/links.json`` has them.
The tables of ``docs/results.md`` between ``<!-- links TASK -->`` and ``<!-- end -->`` are filled from there.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from documents import fill, markdown

from debiased_laplace import DebiasedLaplace, _data
from debiased_laplace.evaluation.methods import Options
from debiased_laplace.evaluation.predictors.baselines import outputs_of, tuned_temperature
from debiased_laplace.evaluation.records import read_json, write_json
from debiased_laplace.evaluation.tasks import Context, Task, resolve_device
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.posterior.gaussian import standard_normals
from debiased_laplace.posterior.predictive import functional_moments

WAYS: dict[str, dict[str, Any]] = {
    "probit": {},
    "probit, temperature": {"tune_temperature": True},
    "probit, one standard error": {"tune_temperature": True, "selection": "one_standard_error"},
    "probit, layers": {"tune_temperature": True, "prior_structure": "layerwise"},
    "Monte Carlo, temperature": {"tune_temperature": True, "link_approx": "mc"},
    "Monte Carlo, one standard error": {
        "tune_temperature": True, "link_approx": "mc", "selection": "one_standard_error"
    },
    "mean field, temperature": {"tune_temperature": True, "link_approx": "mean_field"},
    "mean field, one standard error": {
        "tune_temperature": True, "link_approx": "mean_field", "selection": "one_standard_error"
    },
}  # fmt: skip
SEVERITIES = (1, 3, 5)
LIKELIHOOD = Categorical()


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Mean losses of every way on every data set, and what was tuned."""
    task = Task.load(name)
    context = Context(options.seed, options.data_dir, options.cache, options.quick, resolve_device(options.device))
    model = task.model(context)
    la = DebiasedLaplace(model, "classification", seed=options.seed)
    loader = task.call("train_loader", context)
    la.fit(loader, budget=task.budget, generator=options.seed, n_data=task.n_data)
    temperature, _ = tuned_temperature(model, task.call("val_loader", context))
    tuned: dict[str, DebiasedLaplace] = {}
    for way, keywords in WAYS.items():
        tuned[way] = posterior = copy.copy(la)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the edges of the grid: the record has the values
            posterior.optimize_prior_precision(
                val_loader=task.call("val_loader", context), **Options().search, **keywords
            )
        print(
            f"{name}: {way}: {posterior.prior_precision.flatten()[:1]}, {posterior.output_temperature:.3f}",
            file=sys.stderr,
        )
    sets = {"test": task.call("test_loader", context)}
    for shift, loaders in task.call("shifted_loaders", context).items():
        sets |= {f"{shift} {severity}": loaders[severity] for severity in SEVERITIES}
    losses = {}
    for title, loader in sets.items():
        losses[title] = score(la, tuned, temperature, list(_data.head(loader, options.images)))
        print(f"{name}: {title}", file=sys.stderr, flush=True)
    return {
        "task": name, "seed": options.seed, "images": options.images, "temperature": temperature,
        "tuned": {
            way: {"prior_precision": posterior.prior_precision.tolist(), "temperature": posterior.output_temperature}
            for way, posterior in tuned.items()
        },
        "nll": losses,
    }  # fmt: skip


def score(
    la: DebiasedLaplace, tuned: Mapping[str, DebiasedLaplace], temperature: float, batches: list[Any]
) -> dict[str, float]:
    """Mean negative log-likelihoods; projections are shared by all ways."""
    network, posteriors = la.network, [of_way.posterior for of_way in tuned.values()]
    normals = standard_normals((100, la.n_outputs), la.posterior.mean, torch.Generator().manual_seed(la.seed)).double()
    total, n = dict.fromkeys(("temperature scaling", *tuned), 0.0), 0
    for inputs, targets in batches:
        mean, covariances = functional_moments(network, posteriors, inputs)
        mean, targets = mean.double(), targets.to(mean.device)
        for (way, of_way), covariance in zip(tuned.items(), covariances.double(), strict=True):
            link, tau = of_way.link or "probit", of_way.output_temperature
            wanted = covariance if LIKELIHOOD.needs_covariance(link) else covariance.diagonal(dim1=1, dim2=2)
            probabilities = LIKELIHOOD.predictive(mean / tau, wanted / tau**2, link, normals)
            total[way] += float(LIKELIHOOD.log_loss(probabilities, targets).sum())
        n += len(targets)
    outputs, targets = outputs_of(network.model, batches)
    plain = torch.nn.functional.cross_entropy(outputs / temperature, targets, reduction="sum")
    return {way: value / n for way, value in (total | {"temperature scaling": float(plain)}).items()}


def table(record: Mapping[str, Any]) -> str:
    """Rows of data, columns of ways; the mean over strong shifts last."""
    ways = ["temperature scaling", *WAYS]
    rows = dict(record["nll"])
    strong = [losses for title, losses in rows.items() if title != "test" and not title.endswith(" 1")]
    rows["**mean of severities 3 and 5**"] = {way: sum(losses[way] for losses in strong) / len(strong) for way in ways}
    return markdown(
        ["NLL", *ways], ([title, *(f"{losses[way]:.3f}" for way in ways)] for title, losses in rows.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits", "fashion-mnist", "cifar10"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=500, help="at most so many of every data set")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--cache", type=Path, default=Path("eval/results/cache"))
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    path, record = options.docs / "results.md", options.docs / "records" / "links.json"
    measured = read_json(record) if record.exists() else {}
    for name in options.tasks:
        kept = options.out / "links" / f"{name}.{options.seed}.{options.images}{'.quick' * options.quick}.json"
        if not kept.exists():
            write_json(kept, measure(name, options))
        measured[name] = read_json(kept)
        write_json(record, measured)
    fill(path, parts(measured))


def parts(measured: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the document, from the record."""
    return {f"links {name}": table(rows) for name, rows in measured.items()}


if __name__ == "__main__":
    main()
