"""Everything that is measured for one seed; a method that fails has the reason for it, and the others go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from debiased_laplace import _data, _ranks
from debiased_laplace.evaluation import records
from debiased_laplace.evaluation.judge.comparison import evaluate
from debiased_laplace.evaluation.judge.conditions import ConditionError
from debiased_laplace.evaluation.judge.predictions import reason
from debiased_laplace.evaluation.methods import Method, Options
from debiased_laplace.evaluation.predictors import edges
from debiased_laplace.evaluation.predictors.baselines import (
    detecting_predictor,
    ensemble_predictor,
    gaussian_predictor,
    outputs_of,
    point_predictor,
    tuned_noise,
    tuned_temperature,
)
from debiased_laplace.evaluation.predictors.peer import PeerPredictor, fitted_peer, tune_peer
from debiased_laplace.evaluation.predictors.posterior import LaplacePredictor, Shared
from debiased_laplace.evaluation.predictors.prediction import Predictor, as_prediction
from debiased_laplace.evaluation.suite import draws
from debiased_laplace.evaluation.suite.data import FUNCTIONS, classifier, loader_of, loaders_of
from debiased_laplace.evaluation.suite.distances import distances
from debiased_laplace.evaluation.suite.posteriors import Posteriors, noise_of, typical_prior, with_warnings
from debiased_laplace.evaluation.suite.subject import Subject
from debiased_laplace.evaluation.tasks import Context, Task, TaskError
from debiased_laplace.posterior.temperature import undetermined_in


class Bench:
    """Fits of one seed, and what is known about them."""

    def __init__(self, task: Task, subject: Subject, context: Context, options: Options, work: Path) -> None:
        self.task, self.subject, self.context, self.options, self.work = task, subject, context, options, work
        self.posteriors = Posteriors(task, subject.model, context, options, work)
        self.model = subject.model
        self.point = classifier(task, subject.model)
        self.regression = task.likelihood == "regression"
        self.shared = Shared()

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
            (drawn, result), told = with_warnings(partial(self._prepared, method))
            result["warnings"] = sorted({*told, *result.get("warnings", ())})
            result["undetermined"] = undetermined_in(result["warnings"])
            result["edges"] = result.get("edges", {}) | edges.told(result["warnings"])
            about[method.name] = {"kind": method.kind, "role": method.role, "description": method.description} | result
            if drawn:
                draws.add(predictors, groups, method.name, drawn)
        self._require(predictors, about)
        names: dict[str, str] = {method.role: method.name for method in methods if method.role}
        settings = self._at_equal_settings(names, predictors, groups)
        candidate = names.get("candidate")
        try:
            result = evaluate(
                predictors, *loaders_of(task, context, self.options, _ranks.current()),
                compare_with=draws.pairs(names, list(about), groups), groups=groups,
                highlight=candidate if candidate in predictors else None,
                sets=[name for name in groups if not name.endswith(draws.EQUAL)],
                images=task.definition.images if task.has("images") else None,
                target_scale=self.subject.target_scale, n_resamples=self.options.n_resamples,
                folder=self.work / "predictions", strict=False,
                progress=lambda title: progress(f"predict: {title}"),
            )  # fmt: skip
        except ConditionError as error:
            raise TaskError(f"{FUNCTIONS[error.kind]}() of {task.source}: {error}") from error
        for name, predicted in result.pop("predictors").items():
            if name in about:
                about[name]["seconds"] |= predicted["seconds"]
        draws.apart(result)
        for name, where in result.pop("failures").items():
            if name not in about:
                continue
            if name in result["test"]["scores"]:
                about[name]["warnings"] += [f"It failed on {place}" for place in where]
            else:
                about[name]["failed"] = f"on {where[0]}"
        progress("distances")
        try:
            fits = self.posteriors.fits
            roles = {role: name for role, name in names.items() if name in fits}
            log_ratios = distances(fits, roles, partial(loader_of, task, "test_loader", context), self.options)
        except TaskError:
            raise
        except Exception as error:
            log_ratios = {}
            about[names["reference"]]["warnings"].append(f"No distances could be measured: {reason(error)}")
        return {
            "schema_version": records.SCHEMA_VERSION, "made": records.now(), "task": self.subject.about,
            "environment": records.environment(context.device), "seconds": {"model": self.subject.seconds},
            "data": self._sizes(result), "predictors": about, "distances": log_ratios, "equal_settings": settings,
        } | result  # fmt: skip

    def _require(self, predictors: dict[str, Predictor], about: dict[str, Any]) -> None:
        if not predictors:
            failed = "; ".join(f"{name}: {facts['failed']}" for name, facts in about.items())
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
        fits = [la for drawn in self.posteriors.fits.values() for la in drawn if la.posterior.curvatures.any()]
        trained = self.task.n_data or (fits[0].posterior.n_data if fits else None)
        tuned = sum(size for *_, size in _data.labelled(self._validation()))
        return {"train": trained, "validation": tuned, "test": result["test"]["n"]}

    def _at_equal_settings(
        self, names: Mapping[str, str], predictors: dict[str, Predictor], groups: dict[str, list[str]]
    ) -> dict[str, Any]:
        """Candidate and baseline once more, with the settings of the reference, or else of the candidate.

        Returns:
            The settings, and whose they are; empty if there is nothing to compare.
        """
        compared = [names[role] for role in ("baseline", "candidate") if names.get(role) in self.posteriors.fits]
        of = next((names[role] for role in ("reference", "candidate") if names.get(role) in self.posteriors.fits), None)
        if len(compared) < 2 or of is None or len(self.posteriors.fits[of][0].posterior.prior_precision) > 1:
            return {}
        like = self.posteriors.fits[of][0]
        for name in compared:
            drawn: list[Predictor] = []
            for la in self.posteriors.fits[name]:
                posterior = replace(
                    la.posterior, prior_precision=like.posterior.prior_precision,
                    noise_variance=like.posterior.noise_variance,
                )  # fmt: skip
                equal = replace(la, posterior=posterior, link=like.link, output_temperature=like.output_temperature)
                drawn.append(LaplacePredictor(equal, self.shared))
            draws.add(predictors, groups, name + draws.EQUAL, drawn)
        noise = {"noise": noise_of(like)} if self.regression else {"temperature": like.output_temperature}
        return {"of": of, "prior_precision": typical_prior(like)} | noise

    def _prepared(self, method: Method) -> tuple[list[Predictor], dict[str, Any]]:
        """Predictors, one for each draw, and what there is to know about them; or why there is none."""
        try:
            with _ranks.attempt():
                return self.prepare(method)
        except (TaskError, _ranks.LostRankError):  # of a loader, or a process: not the method's fault
            raise
        except Exception as error:
            _ranks.current().meet("go on", _ranks.WAIT.total_seconds())
            self.posteriors.fits.pop(method.name, None)
            return [], {"failed": reason(error), "seconds": {}}

    def prepare(self, method: Method) -> tuple[list[Predictor], dict[str, Any]]:
        """Predictors, one for each draw, and what there is to know about them."""
        start = time.perf_counter()
        if method.kind == "laplace":
            fits, result = self.posteriors.of(method)
            return [LaplacePredictor(la, self.shared) for la in fits], result
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
            predictor, told = self._detecting()
            return predictor, {"seconds": {}, "validation_nll": loss, "warnings": told}
        temperature, loss = tuned_temperature(self.point, self._validation(), **method.tune)
        result = {"temperature": temperature, "validation_nll": loss, "seconds": {"tune": time.perf_counter() - start}}
        result["edges"] = edges.of_temperature(temperature)
        return point_predictor(self.point, temperature=temperature), result

    def _detecting(self) -> tuple[Predictor, list[str]]:
        """The network with detectors of out-of-distribution data if there are such; why it lacks some of them."""
        if not self.task.has("ood_loaders"):
            return point_predictor(self.point), []
        try:
            return detecting_predictor(self.point, loader_of(self.task, "train_loader", self.context)), []
        except TaskError:
            raise
        except Exception as error:
            return detecting_predictor(self.point), [f"It has no Mahalanobis distances: {reason(error)}"]

    def _ensemble(self) -> tuple[Predictor, dict[str, Any]]:
        if isinstance(self.subject.members, str):
            raise RuntimeError(self.subject.members)
        start = time.perf_counter()
        models = [classifier(self.task, member) for member in self.subject.members]
        result: dict[str, Any] = {"members": len(models), "seconds": {}}
        if not self.regression:
            return ensemble_predictor(models), result
        noise = tuned_noise(models, self._validation())
        result |= {"noise": noise**0.5, "seconds": {"tune": time.perf_counter() - start}}
        return ensemble_predictor(models, noise), result

    # -- laplace-torch -------------------------------------------------------------------------

    def _peer(self, method: Method) -> tuple[Predictor, dict[str, Any]]:
        """laplace-torch on all training data, tuned over the same grid."""
        start = time.perf_counter()
        kind = "regression" if self.regression else "classification"  # it has no other name for one logit
        la, where = fitted_peer(
            self.point, kind, method.laplace["structure"], loader_of(self.task, "train_loader", self.context),
            self.task.n_data, self._validation,
        )  # fmt: skip
        fitted = time.perf_counter()
        result = tune_peer(la, self._validation(), self.options.grid, self.regression)
        predictor = PeerPredictor(la, self.regression)
        for loader in (self._validation(), loader_of(self.task, "test_loader", self.context)):
            inputs, _, _ = next(iter(_data.labelled(loader)))
            as_prediction(predictor(_data.take(inputs, slice(0, 2))), min(2, _data.count(inputs)), method.name)
        result |= {"seconds": {"fit": fitted - start, "tune": time.perf_counter() - fitted}, "layers": where}
        return predictor, result

    def _validation(self) -> Iterable[Any]:
        return loader_of(self.task, "val_loader", self.context)
