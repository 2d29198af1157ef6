"""Baselines and posteriors of a task: fitted, tuned on the same validation data, and evaluated; one record a seed.

What takes long is kept as soon as it is there (a fitted posterior, the predictions of a loader), so that a run
that was interrupted goes on where it stopped. When a record is complete its working files are deleted. Both belong to
what they were made from (``provenance``): another network, other data or another task file have their own.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from debiased_laplace import DebiasedLaplace, _data
from debiased_laplace._files import StoredFileError
from debiased_laplace._guards import user_warnings
from debiased_laplace.evaluation import bootstrap, draws, edges, records
from debiased_laplace.evaluation.judge import ConditionError, cell, conditions, evaluate, preflight, reason
from debiased_laplace.evaluation.methods import MAP, Method, Options, check_methods, methods_of
from debiased_laplace.evaluation.names import locked
from debiased_laplace.evaluation.peer import PeerPredictor, fitted_peer, tune_peer
from debiased_laplace.evaluation.predictors import (
    LaplacePredictor,
    Predictor,
    Shared,
    TwoClasses,
    as_prediction,
    ensemble_predictor,
    gaussian_predictor,
    outputs_of,
    point_predictor,
    tuned_noise,
    tuned_temperature,
    two_classes,
)
from debiased_laplace.evaluation.processes import spread
from debiased_laplace.evaluation.provenance import data_digest, network_digest, seeded
from debiased_laplace.evaluation.replicates import Replicates
from debiased_laplace.evaluation.summary import combine
from debiased_laplace.evaluation.tasks import Context, Task, TaskError
from debiased_laplace.fitting.checkpoint import Progress
from debiased_laplace.likelihoods import Categorical, Gaussian
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.posterior.temperature import undetermined_in
from debiased_laplace.sampling.samplers import UniformSampler

_T = TypeVar("_T")

#: Functions that data of a kind are from.
_FUNCTIONS = {"test": "test_loader", "shift": "shifted_loaders", "ood": "ood_loaders"}
_READ = ("train_loader", "val_loader", "test_loader")

# -- what a record is made from --------------------------------------------------------------------


def settings_of(task: Task, methods: Sequence[Method], options: Options, context: Context) -> dict[str, Any]:
    """What decides the numbers of all seeds alike: task file, methods, options, software; JSON's types."""
    own = {
        "methods": [
            {"name": m.name, "kind": m.kind, "fit": m.fit_key, "tune": m.tune, "role": m.role} for m in methods
        ],
        "options": vars(options),
    }
    return base_settings(task, context) | records.jsonable(own)


def base_settings(task: Task, context: Context) -> dict[str, Any]:
    """What decides numbers whatever is measured: the task file, the kind of device, the software; JSON's types."""
    return {
        "sources": task.fingerprint or task.source,  # of no file: all there is to tell
        "quick": context.quick,
        "device": context.device.type,
        "software": records.versions(),
    }


@dataclass(frozen=True)
class Subject:
    """What one seed is about: the networks, as they are now, and what is known of the data.

    Attributes:
        model: The network.
        members: Of the ensemble, if one is asked for; or why there is none.
        n_outputs: Classes, or outputs of a regression.
        about: What the record says of the task.
        target_scale: Of a regression.
        inputs: Digests of all that the numbers of this seed depend on beyond the settings.
        seconds: How long it took to get the network.
    """

    model: nn.Module
    members: list[nn.Module] | str
    n_outputs: int
    about: dict[str, Any]
    target_scale: float
    inputs: dict[str, Any]
    seconds: float

    @classmethod
    def of(cls, task: Task, context: Context, methods: Sequence[Method], options: Options) -> Subject:
        """Load the network, check the data against it, and take the digests.

        Raises:
            TaskError: If something of the task fails; it says which function.
        """
        start = time.perf_counter()
        model = task.model(context)
        seconds = time.perf_counter() - start
        members: list[nn.Module] | str = []
        if any(method.kind == "ensemble" for method in methods):
            try:
                members = [member.to(context.device).eval() for member in task.call("ensemble", context)]
            except Exception as error:
                members = reason(error)
        with seeded(context.seed):
            n_outputs, first = check_task(task, model, context, options)
        data = {}
        for name in _READ:
            with seeded(context.seed):
                data[name] = data_digest(_loader(task, name, context, n_outputs))
        about = {
            "name": task.name, "description": task.description(context), "likelihood": task.likelihood,
            "budget": task.budget, "seeds_note": task.constant("SEEDS_NOTE", ""),
            "notes": dict(task.constant("NOTES", {})), "classes": list(task.constant("CLASSES", [])),
            "n_outputs": n_outputs, "independent_seeds": bool(task.constant("INDEPENDENT_SEEDS", False)),
            "n_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }  # fmt: skip
        target_scale = float(task.call("target_scale", context)) if task.has("target_scale") else 1.0
        inputs = {
            "network": network_digest(model),
            "ensemble": members if isinstance(members, str) else [network_digest(member) for member in members],
            "data": data | first,
            "about": records.digest(about | {"n_data": task.n_data, "target_scale": target_scale}),
        }
        return cls(model, members, n_outputs, about, target_scale, inputs, seconds)


# -- one seed --------------------------------------------------------------------------------------


def run(
    task: Task,
    folder: Path,
    seeds: Iterable[int],
    context: Context,
    *,
    methods: Sequence[Method] | None = None,
    options: Options | None = None,
    n_processes: int = 1,
    progress: Callable[[int, str], None] = lambda seed, step: None,
) -> list[dict[str, Any]]:
    """One record for each seed, written when it is complete; one that was made from the same is used again.

    Args:
        task: From :meth:`Task.load`.
        folder: Records are in its ``records`` folder, unfinished work in ``work``.
        seeds: Any integers.
        context: For the task's functions; its seed is replaced.
        methods: :func:`standard_methods` by default.
        options: How to tune and judge.
        n_processes: Seeds at a time, each in a process of its own with one thread; 1 for none but this one. A script
            that asks for more needs the usual ``if __name__ == "__main__":``.
        progress: Called with the seed and what begins, as ``"stage: detail"``; ``"kept"`` for a record that was there,
            ``"done"`` for one that was made.

    Raises:
        RuntimeError: If a process is killed.
        TaskError: If a function of the task or a loader of it fails, or all methods do.
    """
    options = options or Options()
    if methods is None:
        methods = methods_of(task)
    check_methods(methods)
    work = partial(_seed, task.source if n_processes > 1 else task, folder, context, methods, options)
    with locked(folder):
        if n_processes > 1:
            return spread(work, list(seeds), n_processes, progress)
        return [work(seed, partial(progress, seed)) for seed in seeds]


def _seed(
    task: Task | str, folder: Path, context: Context, methods: Sequence[Method], options: Options, seed: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The record of one seed: the one that is there, if it was made from the same, or a new one.

    A process of its own loads the task anew. What a record is made from is known when the network has been loaded and
    the data have been looked at.
    """
    if isinstance(task, str):
        torch.set_num_threads(1)
        task = Task.load(task)
    context = replace(context, seed=seed)
    settings = settings_of(task, methods, options, context)
    with seeded(seed):
        progress("model")
        subject = Subject.of(task, context, methods, options)
        made_from = {"settings": settings, "inputs": subject.inputs}
        record = records.load_record(folder, seed, made_from)
        if record is not None:
            progress("kept")
            return record
        work = folder / "work" / f"seed-{seed}-{records.digest(settings)}"
        bench = _Bench(task, subject, context, options, work / records.digest(made_from))
        record = {"seed": seed} | made_from | bench.record(methods, progress)
    records.write_record(records.record_path(folder, seed, made_from), record)
    shutil.rmtree(work, ignore_errors=True)
    progress("done")
    return record


def _loader(task: Task, name: str, context: Context, n_outputs: int | None = None) -> Iterable[Any]:
    """Batches of a function of the task, made anew; targets of one logit are class indices, as everywhere here.

    Args:
        task: The task.
        name: Of the function.
        context: For the function.
        n_outputs: If it is known, targets of every batch are checked.
    """

    def read(batch: Any) -> Any:
        batch = two_classes(batch) if task.likelihood == "bernoulli" else batch
        inputs, targets, n = _data.only(batch)
        if n_outputs is not None:
            (Gaussian() if task.likelihood == "regression" else Categorical()).check_targets(targets, n_outputs)
        one_class = task.likelihood != "regression" and targets.numel() == n
        return inputs, targets.reshape(n) if one_class else targets

    return task.loader(name, context, read)


def _loaders(task: Task, context: Context, options: Options) -> tuple[Any, Any, Any]:
    """Test, shifted and foreign data, made anew; of the latter two those that the options ask for."""
    read = two_classes if task.likelihood == "bernoulli" else lambda batch: batch

    def chosen(loaders: Mapping[Any, Any], title: str = "{}") -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, own in loaders.items():
            if isinstance(own, Mapping):
                found |= {key: several} if (several := chosen(own, f"{key} {{}}")) else {}
            elif options.conditions is None or title.format(key) in options.conditions:
                found[key] = own if options.n_shifted is None else _First(own, options.n_shifted)
        return found

    return (
        _loader(task, "test_loader", context),
        chosen(task.loaders("shifted_loaders", context, read) or {}),
        chosen(task.loaders("ood_loaders", context) or {}),
    )


class _First:
    """The first n data of a loader, again and again."""

    def __init__(self, loader: Iterable[Any], n: int) -> None:
        self.loader, self.n = loader, n

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return _data.head(self.loader, self.n)


def check_task(task: Task, model: nn.Module, context: Context, options: Options) -> tuple[int, dict[str, str]]:
    """Two data of every loader through the network, before anything takes time.

    Returns:
        The number of classes (outputs of a regression), and digests of the first batches of shifted and foreign data.

    Raises:
        TaskError: It says which function of the task, and why.
    """
    regression = task.likelihood == "regression"
    point = gaussian_predictor(model, 1.0) if regression else point_predictor(_classifier(task, model))
    for name in ("train_loader", "val_loader"):
        loader = _loader(task, name, context)
        with _from(task, name):
            (read,) = preflight({MAP: point}, conditions(loader))
            inputs, targets, _ = next(iter(_data.labelled(read.loader)))
            few = _data.take(inputs, slice(0, 2))
            predicted = as_prediction(point(few), _data.count(few), MAP).arrays()
            n_outputs = predicted["mean" if regression else "probabilities"].shape[1]
            (Gaussian() if regression else Categorical()).check_targets(targets, n_outputs)
    classes = list(task.constant("CLASSES", ()))
    if classes and len(classes) != n_outputs and not regression:
        raise TaskError(f"Expected CLASSES of {task.source} to name the {n_outputs} outputs, got {len(classes)} names.")
    try:
        found = conditions(*_loaders(task, context, options))
    except ValueError as error:
        raise TaskError(f"The loaders of {task.source}: {error}") from error
    images, first = task.definition.images if task.has("images") else None, {}
    for condition in found:
        name = _FUNCTIONS[condition.kind]
        with _from(task, name):
            (read,) = preflight({MAP: point}, [condition], images)
            if condition.kind != "test":  # of which more is seen
                first[f"{name}: {condition.title}"] = data_digest(read.loader, None)
    return n_outputs, first


def _classifier(task: Task, model: nn.Module) -> nn.Module:
    """The network, with an output for each class."""
    return TwoClasses(model).eval() if task.likelihood == "bernoulli" else model


@contextmanager
def _from(task: Task, name: str) -> Iterator[None]:
    """Errors about data name the function that they are from."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise TaskError(f"{name}() of {task.source}: {error}") from error


class _Bench:
    """Fits of one seed, and what is known about them."""

    def __init__(self, task: Task, subject: Subject, context: Context, options: Options, work: Path) -> None:
        self.task, self.subject, self.context, self.options, self.work = task, subject, context, options, work
        self.model = subject.model
        self.point = _classifier(task, subject.model)
        self.regression = task.likelihood == "regression"
        self.shared = Shared()
        self.fits: dict[str, list[DebiasedLaplace]] = {}
        self.fitted: dict[tuple[str, int], DebiasedLaplace] = {}  # before any tuning, by arguments and draw
        self.seconds: dict[tuple[str, int], float] = {}  # of the fit of a method's draw
        self.budgets: dict[str, int] = {}  # of methods that have the seconds of another

    def record(self, methods: Sequence[Method], progress: Callable[[str], None]) -> dict[str, Any]:
        """Everything that is measured; a method that fails has the reason for it, and the others go on.

        Raises:
            TaskError: If a function of the task or a loader of it fails, or everything does.
        """
        task, context = self.task, self.context
        self._check_outputs()
        predictors: dict[str, Predictor] = {}
        about: dict[str, Any] = {}
        groups: dict[str, list[str]] = {}
        for method in methods:
            progress(f"fit: {method.name}")
            (found, result), told = _heard(partial(self._prepared, method))
            result["warnings"] = sorted({*told, *result.get("warnings", ())})
            result["undetermined"] = undetermined_in(result["warnings"])
            result["edges"] = result.get("edges", {}) | edges.told(result["warnings"])
            about[method.name] = {"kind": method.kind, "role": method.role, "description": method.description} | result
            if found:
                draws.add(predictors, groups, method.name, found)
        self._require(predictors, about)
        names: dict[str, str] = {method.role: method.name for method in methods if method.role}
        settings = self._at_equal_settings(names, predictors, groups)
        candidate = names.get("candidate")
        try:
            result = evaluate(
                predictors, *_loaders(task, context, self.options),
                compare_with=draws.pairs(names, list(about), groups), groups=groups,
                highlight=candidate if candidate in predictors else None,
                images=task.definition.images if task.has("images") else None,
                target_scale=self.subject.target_scale, n_resamples=self.options.n_resamples,
                folder=self.work / "predictions", strict=False,
                progress=lambda title: progress(f"predict: {title}"),
            )  # fmt: skip
        except ConditionError as error:
            raise TaskError(f"{_FUNCTIONS[error.kind]}() of {task.source}: {error}") from error
        for name, predicted in result.pop("predictors").items():
            if name in about:
                about[name]["seconds"] |= predicted["seconds"]
        draws.apart(result)
        for name, where in result.pop("failures").items():
            if name not in about:
                continue
            if name in result["test"]["scores"]:
                about[name]["warnings"] += [f"It failed on {own}" for own in where]
            else:
                about[name]["failed"] = f"on {where[0]}"
        progress("distances")
        try:
            distances = self.distances([method for method in methods if method.name in self.fits])
        except TaskError:
            raise
        except Exception as error:
            distances = {}
            about[names["reference"]]["warnings"].append(f"No distances could be measured: {reason(error)}")
        return {
            "schema_version": records.SCHEMA_VERSION, "made": records.now(), "task": self.subject.about,
            "environment": records.environment(context.device), "seconds": {"model": self.subject.seconds},
            "data": self._sizes(result), "predictors": about, "distances": distances, "equal_settings": settings,
        } | result  # fmt: skip

    def _require(self, predictors: dict[str, Predictor], about: dict[str, Any]) -> None:
        if not predictors:
            failed = "; ".join(f"{name}: {own['failed']}" for name, own in about.items())
            raise TaskError(f"Nothing of {self.task.source} can be judged, since everything failed ({failed}).")

    def _check_outputs(self) -> None:
        """Nothing can be tuned on outputs that are not finite."""
        n = 0
        for number, (inputs, targets, size) in enumerate(_data.labelled(self._validation()), 1):
            outputs, _ = outputs_of(self.point, [(inputs, targets)])
            wrong = (~outputs.isfinite().reshape(size, -1).all(1)).nonzero().flatten()
            if len(wrong):
                raise TaskError(
                    f"val_loader() of {self.task.source}: batch {number}: Expected finite outputs of the network, got "
                    f"NaN or infinity for datum {n + int(wrong[0])}. Look for NaN in the inputs or the weights."
                )
            n += size

    def _sizes(self, result: Mapping[str, Any]) -> dict[str, int | None]:
        """How many data train, tune and judge; of the first what the posteriors know, since loaders may have no end."""
        fits = [la for own in self.fits.values() for la in own if la.hessian_structure != "isotropic"]
        trained = self.task.n_data or (fits[0].n_data if fits else None)
        tuned = sum(size for *_, size in _data.labelled(self._validation()))
        return {"train": trained, "validation": tuned, "test": result["test"]["n"]}

    def _at_equal_settings(
        self, names: Mapping[str, str], predictors: dict[str, Predictor], groups: dict[str, list[str]]
    ) -> dict[str, Any]:
        """Candidate and baseline once more, with the reference's prior precision, temperature and noise (else its own).

        Returns:
            The settings, and whose they are; empty if there is nothing to compare.
        """
        compared = [names[role] for role in ("baseline", "candidate") if names.get(role) in self.fits]
        of = next((names[role] for role in ("reference", "candidate") if names.get(role) in self.fits), None)
        if len(compared) < 2 or of is None or len(self.fits[of][0].prior_precision) > 1:
            return {}
        like = self.fits[of][0]
        for name in compared:
            found: list[Predictor] = []
            for la in map(copy.copy, self.fits[name]):
                la.prior_precision, la.link = like.prior_precision, like.link
                la.output_temperature = like.output_temperature
                if self.regression:
                    la.sigma_noise = like.sigma_noise
                found.append(LaplacePredictor(la, self.shared))
            draws.add(predictors, groups, name + draws.EQUAL, found)
        noise = {"noise": float(like.sigma_noise)} if self.regression else {"temperature": like.output_temperature}
        return {"of": of, "prior_precision": _typical_prior(like)} | noise

    def _prepared(self, method: Method) -> tuple[list[Predictor], dict[str, Any]]:
        """Predictors, one for each draw, and what there is to know about them; or why there is none."""
        try:
            return self.prepare(method)
        except TaskError:  # of a loader, which is not the method's fault
            raise
        except Exception as error:
            self.fits.pop(method.name, None)
            return [], {"failed": reason(error), "seconds": {}}

    def prepare(self, method: Method) -> tuple[list[Predictor], dict[str, Any]]:
        """Predictors, one for each draw, and what there is to know about them."""
        start = time.perf_counter()
        if method.kind == "laplace":
            return self._laplace(method)
        predictor, result = self._point(method, start)
        return [predictor], result

    def _point(self, method: Method, start: float) -> tuple[Predictor, dict[str, Any]]:
        """A predictor without draws."""
        if method.kind == "laplace-torch":
            return self._peer(method)
        if method.kind == "ensemble":
            return self._ensemble()
        if self.regression:
            variance = tuned_noise([self.model], self._validation())
            result = {"noise": variance**0.5, "seconds": {"tune": time.perf_counter() - start}}
            return gaussian_predictor(self.model, variance), result
        if method.kind == "map":
            outputs, targets = outputs_of(self.point, self._validation())
            loss = float(nn.functional.cross_entropy(outputs, targets.long()))
            return point_predictor(self.point), {"seconds": {}, "validation_nll": loss}
        temperature, loss = tuned_temperature(self.point, self._validation(), **method.tune)
        result = {"temperature": temperature, "validation_nll": loss, "seconds": {"tune": time.perf_counter() - start}}
        result["edges"] = edges.of_temperature(temperature)
        return point_predictor(self.point, temperature=temperature), result

    def _ensemble(self) -> tuple[Predictor, dict[str, Any]]:
        if isinstance(self.subject.members, str):
            raise RuntimeError(self.subject.members)
        start = time.perf_counter()
        models = [_classifier(self.task, member) for member in self.subject.members]
        result: dict[str, Any] = {"members": len(models), "seconds": {}}
        if not self.regression:
            return ensemble_predictor(models), result
        noise = tuned_noise(models, self._validation())
        result |= {"noise": noise**0.5, "seconds": {"tune": time.perf_counter() - start}}
        return ensemble_predictor(models, noise), result

    # -- this package --------------------------------------------------------------------------

    def _laplace(self, method: Method) -> tuple[list[Predictor], dict[str, Any]]:
        """A posterior for each draw of the data; what is known of each, and seconds on the average."""
        found = [self._draw(method, number) for number in range(self.options.draws if method.is_random else 1)]
        self.fits[method.name] = [la for la, _ in found]
        return [LaplacePredictor(la, self.shared) for la, _ in found], draws.joined([result for _, result in found])

    def _draw(self, method: Method, number: int) -> tuple[DebiasedLaplace, dict[str, Any]]:
        path = self.work / f"{records.digest({'name': method.name, 'draw': number})}.safetensors"
        described, key = path.with_suffix(".json"), (method.fit_key, number)
        kept = self._kept(path, described)
        if kept is not None:
            la, result = kept
            self.seconds[method.name, number] = result["seconds"]["fit"]
            self.budgets[method.name] = result.get("budget", 0)
            if key in self.fitted:  # one basis for all of them, so that projections are shared again
                la.fitted = self.fitted[key].fitted
            else:
                self.fitted[key] = self._untuned(la)
        else:
            (la, result), told = _heard(partial(self._fitted, method, number))
            result["warnings"] = told
            path.parent.mkdir(parents=True, exist_ok=True)
            la.save(path)
            records.write_record(described, result)
        return la, result

    def _kept(self, path: Path, described: Path) -> tuple[DebiasedLaplace, dict[str, Any]] | None:
        """What an interrupted run has finished, if it is whole."""
        result = records.read_record(described, {})
        try:
            return None if result is None else (DebiasedLaplace.load(path, self.model), result)
        except (FileNotFoundError, StoredFileError):
            return None

    @staticmethod
    def _untuned(la: DebiasedLaplace) -> DebiasedLaplace:
        """The same fit with the settings that it began with."""
        la = copy.copy(la)
        la.output_temperature, la.link, la.prior_precision = 1.0, None, 1.0
        if la.likelihood == "regression":
            la.sigma_noise = 1.0
        return la

    def _fitted(self, method: Method, number: int) -> tuple[DebiasedLaplace, dict[str, Any]]:
        """A posterior that is tuned; one that was fitted for another method is tuned anew."""
        context, key = self.context, (method.fit_key, number)
        arguments, start = dict(method.fit), time.perf_counter()
        if key in self.fitted:
            la = copy.copy(self.fitted[key])
        else:
            if method.seconds_of:
                if method.name not in self.budgets:
                    self.budgets[method.name] = self._budget_of_equal_seconds(method)
                arguments["sampler"] = UniformSampler(self.budgets[method.name])
            start = time.perf_counter()
            la = self._fit(method, arguments, draws.seed(context.seed, number), f"{method.fit_key}, {number}")
            self.fitted[key] = copy.copy(la)
        fitted = time.perf_counter()
        self.seconds[method.name, number] = fitted - start
        la.optimize_prior_precision(val_loader=self._validation(), **self.options.search, **method.tune)
        curve, joint = la.curve, la.tuned
        assert curve is not None
        prior = la.prior_precision.detach().double().cpu()
        result: dict[str, Any] = {
            "seconds": {"fit": fitted - start, "tune": time.perf_counter() - fitted},
            "prior_precision": _typical_prior(la),
            "edges": edges.of_posterior(la, curve.prior_precisions),
            "curve": {"prior_precisions": curve.prior_precisions.tolist(), "losses": curve.losses.tolist()},
            "validation_nll": float(curve.losses.min()),
            "coverage": la.coverage(),
            "link": la.link,
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
        if method.seconds_of:
            result["budget"] = self.budgets[method.name]
        return la, result

    def _fit(self, method: Method, arguments: Mapping[str, Any], seed: int, name: str | None = None) -> DebiasedLaplace:
        """A fit of a method; with a name it is kept while it runs."""
        la = DebiasedLaplace(self.model, self.task.likelihood, seed=self.context.seed, **method.laplace)
        checkpoint = None if name is None else self.work / f"fit-{records.digest({'fit': name})}.progress"
        if checkpoint is not None:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            try:
                Progress.check(checkpoint)
            except StoredFileError:  # damaged: it is this run's own, and made anew
                checkpoint.unlink(missing_ok=True)
        loader = _loader(self.task, "train_loader", self.context)
        la.fit(loader, generator=seed, checkpoint=checkpoint, n_data=self.task.n_data, **arguments)
        return la

    def _budget_of_equal_seconds(self, method: Method) -> int:
        """Data of a single batch whose fit takes as long as another method's did here, on this machine and seed."""
        wanted = self.seconds[method.seconds_of, 0]
        seed = draws.seed(self.context.seed, 0)

        def seconds(budget: int) -> float:
            start = time.perf_counter()
            self._fit(method, {**method.fit, "sampler": UniformSampler(budget)}, seed)
            return time.perf_counter() - start

        first = self.fits[method.seconds_of][0]
        return draws.budget_within(wanted, seconds, self.task.budget, first.fitted.n_seen if first.fitted else 1)

    # -- laplace-torch -------------------------------------------------------------------------

    def _peer(self, method: Method) -> tuple[Predictor, dict[str, Any]]:
        """laplace-torch on all training data, tuned over the same grid."""
        start = time.perf_counter()
        kind = "regression" if self.regression else "classification"  # it has no other name for one logit
        la, where = fitted_peer(
            self.point, kind, method.laplace["structure"], _loader(self.task, "train_loader", self.context),
            self.task.n_data, self._validation,
        )  # fmt: skip
        fitted = time.perf_counter()
        result = tune_peer(la, self._validation(), self.options.grid, self.regression)
        predictor = PeerPredictor(la, self.regression)
        for loader in (self._validation(), _loader(self.task, "test_loader", self.context)):
            inputs, _, _ = next(iter(_data.labelled(loader)))
            as_prediction(predictor(_data.take(inputs, slice(0, 2))), min(2, _data.count(inputs)), method.name)
        result |= {"seconds": {"fit": fitted - start, "tune": time.perf_counter() - fitted}, "layers": where}
        return predictor, result

    # -- shared --------------------------------------------------------------------------------

    def _validation(self) -> Iterable[Any]:
        return _loader(self.task, "val_loader", self.context)

    def distances(self, methods: Sequence[Method]) -> dict[str, Any]:
        """Log ratios of output variances to the reference's, at equal prior precisions: no tuning in it."""
        roles = {method.role: method.name for method in methods if method.role}
        reference = roles.get("reference")
        compared = [roles[role] for role in ("baseline", "candidate") if role in roles]
        if reference is None or not compared:
            return {}
        inputs = _first(_loader(self.task, "test_loader", self.context), self.options.distance_inputs)
        first = self.fits[reference][0]
        at = {"tuned": _typical_prior(first), "equal": self.options.distance_prior_precision}
        noise = first.posterior.noise_variance
        # The noise is tuned for each: no part of a distance. One set of backward passes for all of them.
        fits = [(name, la) for name in (*compared, reference) for la in self.fits[name]]
        grid = [
            replace(la.posterior, noise_variance=noise, prior_precision=torch.tensor([value]).double())
            for _, la in fits
            for value in at.values()
        ]
        every = functional_moments(first.network, grid, inputs, covariance=False)[1].cpu().double().split(len(at))
        weights = bootstrap.resample_weights(_data.count(inputs), self.options.n_resamples, 0)
        found: dict[str, Any] = {}
        for index, (where, value) in enumerate(at.items()):
            found[where] = {"prior_precision": value}
            for name in compared:
                own = [v[index] for (of, _), v in zip(fits, every, strict=True) if of == name]
                ratios = [_log_ratio(v, every[-1][index]) for v in own]
                found[where][name] = {
                    part: combine([_mean_cell(of(ratio).mean(1), weights) for ratio in ratios], True)
                    for part, of in (("absolute", torch.Tensor.abs), ("signed", torch.Tensor.clone))
                }
        return found


def _log_ratio(variances: Tensor, reference: Tensor) -> Tensor:
    """Of output variances: equal ones are at distance zero, also if both are zero; if one is zero it is infinite."""
    return torch.where(variances == reference, 0.0, variances.log() - reference.log())


def _heard(call: Callable[[], _T]) -> tuple[_T, list[str]]:
    """What a function returns, and the warnings for the user that it gave."""
    with user_warnings() as told:
        found = call()
    return found, sorted(told)


def _typical_prior(la: DebiasedLaplace) -> float:
    """The prior precision, the geometric mean where there are several."""
    return float(la.prior_precision.detach().double().log().mean().exp())


def _first(loader: Iterable[Any], n: int) -> Any:
    """The first inputs of a loader."""
    return _data.concatenate([inputs for inputs, _ in _data.head(loader, n)])


def _mean_cell(values: Tensor, weights: Any) -> list[float]:
    """The mean with its bootstrap; one infinite value makes it infinite, of both signs undefined."""
    array, weights = values.numpy(), np.asarray(weights)
    replicates = weights @ np.where(np.isfinite(array), array, 0.0) / len(array)
    above, below, undefined = (weights @ part > 0 for part in (array == np.inf, array == -np.inf, np.isnan(array)))
    replicates[above], replicates[below] = np.inf, -np.inf
    replicates[undefined | (above & below)] = np.nan
    with np.errstate(invalid="ignore"):
        return cell(Replicates(float(array.mean()), replicates, len(array), "mean", array))
