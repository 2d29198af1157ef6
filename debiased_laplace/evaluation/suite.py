"""Baselines and posteriors of a task: fitted, tuned on the same validation data, and evaluated; one record a seed.

What takes long is kept as soon as it is there (a fitted posterior, the predictions of a loader), so that a run
that was interrupted goes on where it stopped. When a record is complete its working files are deleted.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from debiased_laplace import DebiasedLaplace, _data, _store
from debiased_laplace._guards import global_random_state
from debiased_laplace.evaluation import bootstrap, records
from debiased_laplace.evaluation.judge import cell, conditions, evaluate, preflight
from debiased_laplace.evaluation.methods import MAP, TEMPERATURE, Method, Options, check_methods, methods_of
from debiased_laplace.evaluation.peer import PeerPredictor, fitted_peer, tune_peer
from debiased_laplace.evaluation.predictors import (
    LaplacePredictor,
    Predictor,
    Shared,
    as_prediction,
    ensemble_predictor,
    gaussian_predictor,
    outputs_of,
    point_predictor,
    tuned_noise,
    tuned_temperature,
)
from debiased_laplace.evaluation.tasks import Context, Task, TaskError
from debiased_laplace.likelihoods import resolve_likelihood
from debiased_laplace.predictive import functional_moments
from debiased_laplace.temperature import undetermined_in

_T = TypeVar("_T")

# -- one seed --------------------------------------------------------------------------------------


def settings_of(task: Task, methods: Sequence[Method], options: Options, context: Context) -> dict[str, Any]:
    """Everything that decides the numbers of a record but the seed; records are reused only if it is equal."""
    own = {
        "methods": [
            {"name": m.name, "kind": m.kind, "fit": m.fit_key, "tune": m.tune, "role": m.role} for m in methods
        ],
        "options": vars(options),
    }
    return base_settings(task, context) | records.jsonable(own)


def base_settings(task: Task, context: Context) -> dict[str, Any]:
    """What decides numbers whatever is measured: the task, where it runs, the software; JSON's types."""
    software = records.versions()
    return records.jsonable(
        {
            "task": task.source,
            "file": task.fingerprint,
            "quick": context.quick,
            "data_dir": context.data_dir and records.digest({"folder": str(context.data_dir.resolve())}),
            "device": str(context.device),
            "software": {name: software[name] for name in ("debiased_laplace", "torch")},
        }
    )


def run(
    task: Task,
    folder: Path,
    seeds: Iterable[int],
    context: Context,
    *,
    methods: Sequence[Method] | None = None,
    options: Options | None = None,
    progress: Callable[[int, str], None] = lambda seed, step: None,
) -> list[dict[str, Any]]:
    """One record for each seed; each is written when it is complete, and those there already are kept.

    Args:
        task: From :meth:`Task.load`.
        folder: Records are in its ``records`` folder, unfinished work in ``work``.
        seeds: Any integers.
        context: For the task's functions; its seed is replaced.
        methods: :func:`standard_methods` by default.
        options: How to tune and judge.
        progress: Called with the seed and what begins; ``"kept"`` for a record that was there.
    """
    options = options or Options()
    if methods is None:
        methods = methods_of(task)
    check_methods(methods)
    settings = settings_of(task, methods, options, context)
    found = []
    for seed in seeds:
        record = records.load_record(folder, seed, settings)
        if record is None:
            work = folder / "work" / f"seed-{seed}-{records.digest(settings)}"
            with global_random_state():
                record = _record(task, replace(context, seed=seed), methods, options, settings, work, progress)
            records.write_json(records.record_path(folder, seed, settings), record)
            shutil.rmtree(work, ignore_errors=True)
        else:
            progress(seed, "kept")
        found.append(record)
    return found


def _record(
    task: Task, context: Context, methods: Sequence[Method], options: Options, settings: dict[str, Any], work: Path,
    progress: Callable[[int, str], None],
) -> dict[str, Any]:  # fmt: skip
    progress(context.seed, "model")
    start = time.perf_counter()
    model = task.model(context)
    seconds = {"model": time.perf_counter() - start}
    check_task(task, model, context)
    description = task.description(context)
    target_scale = float(task.call("target_scale", context)) if task.has("target_scale") else 1.0
    # What was done with other weights (training need not be reproducible) is of no use.
    work = work / weights_digest(model)
    bench = _Bench(task, model, context, options, work)
    predictors: dict[str, Predictor] = {}
    about: dict[str, Any] = {}
    for method in methods:
        progress(context.seed, method.name)
        (predictor, result), told = _heard(partial(bench.prepare, method))
        result["warnings"] = sorted({*told, *result.get("warnings", ())})
        result["undetermined"] = undetermined_in(result["warnings"])
        about[method.name] = {"kind": method.kind, "role": method.role, "description": method.description} | result
        if predictor is not None:
            predictors[method.name] = predictor
    if not predictors:
        failed = "; ".join(f"{name}: {own['failed']}" for name, own in about.items())
        raise TaskError(f"Nothing of {task.source} can be judged, since everything failed ({failed}).")
    names = {method.role: method.name for method in methods if method.role}
    against = [MAP, TEMPERATURE, *(names[role] for role in ("baseline", "reference") if role in names), "laplace-torch"]
    result = evaluate(
        predictors, *_loaders(task, context),
        compare_with=list(dict.fromkeys(against)), highlight=names.get("candidate"),
        images=task.definition.images if task.has("images") else None,
        target_scale=target_scale,
        n_resamples=options.n_resamples, folder=work / "predictions",
        progress=lambda title: progress(context.seed, f"predict: {title}"),
    )  # fmt: skip
    for name, predicted in result.pop("predictors").items():
        about[name]["seconds"] |= predicted["seconds"]
    progress(context.seed, "distances")
    return {
        "schema_version": records.SCHEMA_VERSION,
        "task": {
            "name": task.name, "description": description, "likelihood": task.likelihood,
            "budget": task.budget, "seeds_note": task.constant("SEEDS_NOTE", ""),
            "notes": dict(task.constant("NOTES", {})), "classes": list(task.constant("CLASSES", [])),
            "n_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "seed": context.seed,
        "settings": settings,
        "environment": records.environment(context.device),
        "seconds": seconds,
        "predictors": about,
        "distances": bench.distances(methods),
    } | result  # fmt: skip


def _loaders(task: Task, context: Context) -> tuple[Any, Any, Any]:
    """Test, shifted and foreign data, made anew."""
    return (
        task.call("test_loader", context),
        task.call("shifted_loaders", context) if task.has("shifted_loaders") else None,
        task.call("ood_loaders", context) if task.has("ood_loaders") else None,
    )


def check_task(task: Task, model: nn.Module, context: Context) -> None:
    """Two data of every loader through the network, before anything takes time.

    Raises:
        TaskError: It says which function of the task, and why.
    """
    regression = task.likelihood == "regression"
    point = gaussian_predictor(model, 1.0) if regression else point_predictor(model)
    likelihood = resolve_likelihood(task.likelihood)
    for name in ("train_loader", "val_loader"):
        loader = task.call(name, context)
        try:
            (read,) = preflight({MAP: point}, conditions(loader))
            inputs, targets, _ = next(iter(_data.labelled(read.loader)))
            few = _data.take(inputs, slice(0, 2))
            predicted = as_prediction(point(few), _data.count(few), MAP).arrays()
            n_outputs = predicted["mean" if regression else "probabilities"].shape[1]
            likelihood.check_targets(targets, n_outputs)
        except (TypeError, ValueError) as error:
            raise TaskError(f"{name}() of {task.source}: {error}") from error
    classes = list(task.constant("CLASSES", ()))
    if classes and len(classes) != n_outputs and not regression:
        raise TaskError(f"Expected CLASSES of {task.source} to name the {n_outputs} outputs, got {len(classes)} names.")
    try:
        images = task.definition.images if task.has("images") else None
        preflight({MAP: point}, conditions(*_loaders(task, context)), images)
    except (TypeError, ValueError) as error:
        raise TaskError(f"The loaders of {task.source}: {error}") from error


class _Bench:
    """Fits of one seed, and what is known about them."""

    def __init__(self, task: Task, model: nn.Module, context: Context, options: Options, work: Path) -> None:
        self.task, self.model, self.context, self.options, self.work = task, model, context, options, work
        self.regression = task.likelihood == "regression"
        self.shared = Shared()
        self.fits: dict[str, DebiasedLaplace] = {}
        self.fitted: dict[str, DebiasedLaplace] = {}  # before any tuning, by the arguments of the fit

    def prepare(self, method: Method) -> tuple[Predictor | None, dict[str, Any]]:
        """A predictor, and what there is to know about it."""
        start = time.perf_counter()
        if method.kind == "laplace":
            return self._laplace(method)
        if method.kind == "laplace-torch":
            return self._peer(method)
        if method.kind == "ensemble":
            models = [m.to(self.context.device).eval() for m in self.task.call("ensemble", self.context)]
            result: dict[str, Any] = {"members": len(models), "seconds": {"fit": time.perf_counter() - start}}
            if not self.regression:
                return ensemble_predictor(models), result
            noise = tuned_noise(models, self._validation())
            return ensemble_predictor(models, noise), result | {"noise": noise**0.5}
        if self.regression:
            variance = tuned_noise([self.model], self._validation())
            result = {"noise": variance**0.5, "seconds": {"tune": time.perf_counter() - start}}
            return gaussian_predictor(self.model, variance), result
        if method.kind == "map":
            outputs, targets = outputs_of(self.model, self._validation())
            loss = float(nn.functional.cross_entropy(outputs, targets.long()))
            return point_predictor(self.model), {"seconds": {}, "validation_nll": loss}
        temperature, loss = tuned_temperature(self.model, self._validation())
        result = {"temperature": temperature, "validation_nll": loss, "seconds": {"tune": time.perf_counter() - start}}
        return point_predictor(self.model, temperature=temperature), result

    # -- this package --------------------------------------------------------------------------

    def _laplace(self, method: Method) -> tuple[Predictor, dict[str, Any]]:
        path = self.work / f"{records.digest({'name': method.name})}.safetensors"
        described = path.with_suffix(".json")
        if described.exists():
            la = DebiasedLaplace.load(path, self.model)
            result = json.loads(described.read_text())
            if method.fit_key in self.fitted:  # one basis for all of them, so that projections are shared again
                la.fitted = self.fitted[method.fit_key].fitted
            else:
                self.fitted[method.fit_key] = self._untuned(la)
        else:
            (la, result), told = _heard(partial(self._fitted, method))
            result["warnings"] = told
            path.parent.mkdir(parents=True, exist_ok=True)
            la.save(path)
            records.write_json(described, result)
        self.fits[method.name] = la
        return LaplacePredictor(la, self.shared), result

    @staticmethod
    def _untuned(la: DebiasedLaplace) -> DebiasedLaplace:
        """The same fit with the settings that it began with."""
        la = copy.copy(la)
        la.output_temperature, la.link, la.prior_precision = 1.0, None, 1.0
        if la.likelihood == "regression":
            la.sigma_noise = 1.0
        return la

    def _fitted(self, method: Method) -> tuple[DebiasedLaplace, dict[str, Any]]:
        """A posterior that is tuned; one that was fitted for another method is tuned anew."""
        context = self.context
        start = time.perf_counter()
        if method.fit_key in self.fitted:
            la = copy.copy(self.fitted[method.fit_key])
        else:
            la = DebiasedLaplace(self.model, self.task.likelihood, seed=context.seed, **method.laplace)
            checkpoint = self.work / f"fit-{records.digest({'fit': method.fit_key})}.progress"
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            loader = self.task.call("train_loader", context)
            la.fit(loader, generator=context.seed, checkpoint=checkpoint, n_data=self.task.n_data, **method.fit)
            self.fitted[method.fit_key] = copy.copy(la)
        fitted = time.perf_counter()
        la.optimize_prior_precision(val_loader=self._validation(), **self.options.search, **method.tune)
        curve, joint = la.curve, la.tuned
        assert curve is not None
        prior = la.prior_precision.detach().double().cpu()
        result: dict[str, Any] = {
            "seconds": {"fit": fitted - start, "tune": time.perf_counter() - fitted},
            "prior_precision": _typical_prior(la),
            "edge": _edge(prior, curve.prior_precisions),
            "curve": {"prior_precisions": curve.prior_precisions.tolist(), "losses": curve.losses.tolist()},
            "validation_nll": float(curve.losses.min()),
            "coverage": la.coverage(),
        }
        if joint is not None:
            result |= {
                "validation_nll": float(joint.loss),
                "prior_precisions": [float(value) for value in prior],
                "temperature": float(joint.temperature),
                "temperature_alone": list(joint.temperature_alone),
            }
        if self.regression:
            result["noise"] = float(la.sigma_noise)
        return la, result

    # -- laplace-torch -------------------------------------------------------------------------

    def _peer(self, method: Method) -> tuple[Predictor | None, dict[str, Any]]:
        """laplace-torch on all training data, tuned over the same grid; what fails there is told, not raised."""
        start = time.perf_counter()
        try:
            la, where = fitted_peer(
                self.model, self.task.likelihood, method.laplace["structure"],
                self.task.call("train_loader", self.context), self.task.n_data, self._validation,
            )  # fmt: skip
            fitted = time.perf_counter()
            result = tune_peer(la, self._validation(), self.options.grid, self.regression)
            predictor = PeerPredictor(la, self.regression)
            for loader in (self._validation(), self.task.call("test_loader", self.context)):
                inputs, _, _ = next(iter(_data.labelled(loader)))
                as_prediction(predictor(_data.take(inputs, slice(0, 2))), min(2, _data.count(inputs)), method.name)
        except Exception as error:
            return None, {"failed": f"{type(error).__name__}: {error}"[:300], "seconds": {}}
        result |= {"seconds": {"fit": fitted - start, "tune": time.perf_counter() - fitted}, "layers": where}
        return predictor, result

    # -- shared --------------------------------------------------------------------------------

    def _validation(self) -> Iterable[Any]:
        return self.task.call("val_loader", self.context)

    def distances(self, methods: Sequence[Method]) -> dict[str, Any]:
        """Log ratios of output variances to the reference's, at equal prior precisions: no tuning in it."""
        roles = {method.role: method.name for method in methods if method.role}
        reference = roles.get("reference")
        compared = [roles[role] for role in ("baseline", "candidate") if role in roles]
        if reference is None or not compared:
            return {}
        inputs = _first(self.task.call("test_loader", self.context), self.options.distance_inputs)
        at = {"tuned": _typical_prior(self.fits[reference]), "equal": self.options.distance_prior_precision}
        noise = self.fits[reference].posterior.noise_variance
        logarithms = {
            name: self._log_variances(self.fits[name], list(at.values()), noise, inputs) for name in roles.values()
        }
        weights = bootstrap.resample_weights(_data.count(inputs), self.options.n_resamples, 0)
        found: dict[str, Any] = {}
        for index, (where, value) in enumerate(at.items()):
            ratios = {name: (logarithms[name] - logarithms[reference])[index] for name in compared}
            found[where] = {"prior_precision": value} | {
                name: {
                    "absolute": _mean_cell(own.abs().mean(1), weights), "signed": _mean_cell(own.mean(1), weights)
                }
                for name, own in ratios.items()
            }  # fmt: skip
        return found

    @staticmethod
    def _log_variances(la: DebiasedLaplace, grid: list[float], noise: Any, inputs: Any) -> Tensor:
        own = replace(la.posterior, noise_variance=noise)  # tuned for each: no part of a distance
        several = [replace(own, prior_precision=torch.tensor([v], dtype=torch.float64)) for v in grid]
        return functional_moments(la.network, several, inputs, covariance=False)[1].cpu().double().log()


def _heard(call: Callable[[], _T]) -> tuple[_T, list[str]]:
    """What a function returns, and the warnings for the user that it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = call()
    return found, sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)})


def weights_digest(model: nn.Module) -> str:
    """Tells networks apart by their weights."""
    return records.digest(_store.fingerprint(model.state_dict()))


def _typical_prior(la: DebiasedLaplace) -> float:
    """The prior precision, the geometric mean where there are several."""
    return float(la.prior_precision.detach().double().log().mean().exp())


def _edge(prior: Tensor, grid: Tensor) -> str | None:
    """Which end of the grid one prior precision is, if any."""
    if len(prior) > 1 or len(grid) == 1:
        return None
    value = float(prior)
    ends = {"smallest": float(grid.min()), "largest": float(grid.max())}
    return next((name for name, end in ends.items() if math.isclose(value, end, rel_tol=1e-5)), None)


def _first(loader: Iterable[Any], n: int) -> Any:
    """The first inputs of a loader."""
    return _data.concatenate([inputs for inputs, _ in _data.head(loader, n)])


def _mean_cell(values: Tensor, weights: Any) -> list[float]:
    array = values.numpy()
    replicates = np.asarray(weights @ array) / len(array)
    return cell(bootstrap.Replicates(float(array.mean()), replicates, len(array), "mean", array))
