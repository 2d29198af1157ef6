"""The comparison of posteriors on a task: one record for each seed.

:class:`Task`, :class:`Method` and :class:`Options` say what is compared and how. :func:`compare` gives
one record, :func:`run` those of several seeds, kept on disk as they are finished. Nothing here knows a
data set.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from debiased_laplace import DebiasedLaplace, _data
from debiased_laplace._guards import evaluation_mode
from debiased_laplace.evaluation import metrics, records
from debiased_laplace.evaluation.tasks import Method, Options, Task, check_methods, settings_of, standard_methods
from debiased_laplace.predictive import functional_moments
from debiased_laplace.tuning import PriorCurve

__all__ = ["Method", "Options", "Task", "compare", "run", "settings_of", "standard_methods"]

Predictor = Callable[[_data.Inputs], Tensor]


def compare(
    task: Task,
    methods: Sequence[Method],
    options: Options | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Fit, tune and judge every method on one task.

    Args:
        task: The data and the model.
        methods: What to compare, names unique.
        options: How to tune and judge.
        seed: Seed of the draws of every fit, kept in the record.
        device: Where the model runs.
        settings: Kept in the record; see :func:`settings_of`.
        progress: Called with the name of each step as it begins, ``len(methods) + 2`` times.

    Returns:
        A record that JSON can hold: for each method its scores under each condition, out-of-distribution
        scores, tuning curve, seconds, and distance to the reference.

    Raises:
        ValueError: If names or roles are not unique, or a score is not finite.
    """
    options, device = options or Options(), torch.device(device)
    check_methods(methods)
    progress("train")
    start = time.perf_counter()
    model = task.model(device)
    seconds = time.perf_counter() - start
    results: dict[str, Any] = {}
    posteriors: dict[str, DebiasedLaplace] = {}
    for method in methods:
        progress(method.name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            predict, result = _prepare(method, task, model, device, options, seed, posteriors)
        result["warnings"] = sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)})
        results[method.name] = result | _judge(predict, task, options.batch_size, result["seconds"], method.name)
    progress("distances")
    for name, distances in _distances(methods, posteriors, task, options).items():
        results[name]["distances"] = distances
    return {
        "schema_version": records.SCHEMA_VERSION,
        "task": {
            "name": task.name, "description": task.description, "notes": dict(task.notes), "seeds": task.seeds,
            "n_data": task.n_data,
            "n_tests": {name: len(targets) for name, (_, targets) in task.tests.items()},
            "n_ood": {name: _data.count(inputs) for name, inputs in task.ood.items()},
            "n_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "seed": seed,
        "settings": records.jsonable(settings or {}),
        "environment": records.environment(device),
        "seconds": {"train": seconds},
        "methods": results,
    }  # fmt: skip


def run(
    folder: Path,
    seeds: Sequence[int],
    task: Callable[[int], Task],
    methods: Sequence[Method],
    options: Options,
    *,
    settings: Mapping[str, Any],
    device: torch.device | str = "cpu",
    progress: Callable[[int, str], None] = lambda seed, step: None,
) -> list[dict[str, Any]]:
    """One record for each seed; each is written when it is finished, and those there already are kept.

    Args:
        folder: Records are in its ``records`` folder.
        seeds: Any integers.
        task: Makes the task of a seed.
        methods: As in :func:`compare`.
        options: As in :func:`compare`.
        settings: From :func:`settings_of`: decides whether a record that is there can be used.
        device: Where models run.
        progress: Called with the seed and the step; the step is ``"kept"`` for a record that was there.
    """
    found = []
    for seed in seeds:
        record = records.load_record(folder, seed, settings)
        if record is None:
            record = compare(
                task(seed), methods, options, seed=seed, device=device, settings=settings,
                progress=lambda step, seed=seed: progress(seed, step),  # type: ignore[misc]
            )  # fmt: skip
            records.write_json(records.record_path(folder, seed, settings), record)
        else:
            progress(seed, "kept")
        found.append(record)
    return found


def _prepare(
    method: Method,
    task: Task,
    model: nn.Module,
    device: torch.device,
    options: Options,
    seed: int,
    posteriors: dict[str, DebiasedLaplace],
) -> tuple[Predictor, dict[str, Any]]:
    """A function from inputs to probabilities, and what is known about it before it is judged."""
    result: dict[str, Any] = {"kind": method.kind, "role": method.role, "description": method.description}
    start = time.perf_counter()
    if method.kind == "laplace":
        la = DebiasedLaplace(model, "classification", seed=seed)
        la.fit(task.train(), generator=seed, **method.fit)
        fitted = time.perf_counter()
        la.optimize_prior_precision(
            method="gridsearch", val_loader=task.validation(), link_approx=options.link_approx,
            grid_size=options.grid_size, log_prior_prec_min=options.log_prior_prec_min,
            log_prior_prec_max=options.log_prior_prec_max,
        )  # fmt: skip
        assert la.curve is not None
        posteriors[method.name] = la
        result["seconds"] = {"fit": fitted - start, "tune": time.perf_counter() - fitted}
        result |= {
            "prior_precision": la.curve.best,
            "edge": _edge(la.curve),
            "curve": {"prior_precisions": la.curve.prior_precisions.tolist(), "losses": la.curve.losses.tolist()},
            "validation_nll": float(la.curve.losses.min()),
        }
        return la, result  # type: ignore[return-value]
    batches = list(task.validation())
    outputs = torch.cat([_outputs(model, inputs, device) for inputs, _ in batches])
    targets = torch.cat([targets for _, targets in batches])

    def validation_nll(temperature: float) -> float:
        return float(nn.functional.cross_entropy(outputs / temperature, targets.cpu()))

    temperature = 1.0
    if method.kind == "temperature":
        best = minimize_scalar(lambda log: validation_nll(math.exp(log)), bounds=(-3, 5), method="bounded")
        temperature = math.exp(best.x)
        result["temperature"] = temperature
    result["seconds"] = {"tune": time.perf_counter() - start} if method.kind == "temperature" else {}
    result["validation_nll"] = validation_nll(temperature)
    return lambda inputs: (_outputs(model, inputs, device) / temperature).softmax(1), result


def _edge(curve: PriorCurve) -> str | None:
    """Which end of the grid the best prior precision is, if any."""
    if not curve.at_edge or len(curve.losses) == 1:
        return None
    return "smallest" if int(curve.losses.argmin()) == 0 else "largest"


def _outputs(model: nn.Module, inputs: _data.Inputs, device: torch.device) -> Tensor:
    with torch.no_grad(), evaluation_mode(model):
        outputs = model(_data.to_device(inputs, device))
    return outputs.cpu().double()


def _judge(predict: Predictor, task: Task, batch_size: int, seconds: dict[str, float], name: str) -> dict[str, Any]:
    """Scores under every condition and for every other kind of data; adds the seconds of predicting."""
    start = time.perf_counter()
    tests = {key: _batched(predict, inputs, batch_size) for key, (inputs, _) in task.tests.items()}
    ood = {key: _batched(predict, inputs, batch_size) for key, inputs in task.ood.items()}
    seconds["predict"] = time.perf_counter() - start
    inside = next(iter(tests.values()))
    scores = {
        "conditions": {key: metrics.classification_metrics(p, task.tests[key][1]) for key, p in tests.items()},
        "ood": {key: metrics.out_of_distribution_metrics(inside, outside) for key, outside in ood.items()},
    }
    for key, values in scores["conditions"].items():
        if not values["nll"] < float("inf"):
            raise ValueError(
                f"Expected finite scores, got an infinite negative log-likelihood of {name} on {key!r}: some target "
                "has probability zero. Look for outputs that are huge."
            )
    return scores


def _batched(predict: Predictor, inputs: _data.Inputs, batch_size: int) -> Tensor:
    parts = [predict(_data.take(inputs, part)) for part in _data.slices(_data.count(inputs), batch_size)]
    return torch.cat([part.detach().cpu().double() for part in parts])


def _distances(
    methods: Sequence[Method], posteriors: Mapping[str, DebiasedLaplace], task: Task, options: Options
) -> dict[str, list[dict[str, Any]]]:
    """Log ratios of functional variances to the reference's, at equal prior precisions: no tuning in it."""
    reference = next((m.name for m in methods if m.role == "reference"), None)
    if reference is None:
        return {}
    inputs = next(iter(task.tests.values()))[0]
    inputs = _data.take(inputs, slice(0, options.distance_inputs))
    curve = posteriors[reference].curve
    assert curve is not None
    grid = {"tuned": curve.best} | {f"{value:g}": value for value in options.distance_prior_precisions}
    values = list(grid.values())
    variances = {name: _log_variances(la, values, inputs, options.batch_size) for name, la in posteriors.items()}
    distances = {}
    for name in posteriors:
        if name != reference:
            ratios = variances[name] - variances[reference]
            distances[name] = [
                {"at": at, "prior_precision": value, "absolute": float(r.abs().mean()), "signed": float(r.mean())}
                for (at, value), r in zip(grid.items(), ratios, strict=True)
            ]
    return distances


def _log_variances(la: DebiasedLaplace, grid: list[float], inputs: _data.Inputs, batch_size: int) -> Tensor:
    """``[R, N, C]``, log of the functional variances at R prior precisions."""
    posterior = la.posterior
    several = [replace(posterior, prior_precision=torch.tensor([value], dtype=torch.float64)) for value in grid]
    parts = [
        functional_moments(la.network, several, _data.take(inputs, part), covariance=False)[1].cpu().double()
        for part in _data.slices(_data.count(inputs), batch_size)
    ]
    return torch.cat(parts, 1).log()
