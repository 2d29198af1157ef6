"""Posteriors of a seed: fitted once for all methods that share a fit, tuned, and kept on disk."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from debiased_laplace import DebiasedLaplace
from debiased_laplace._files import StoredFileError
from debiased_laplace._guards import user_warnings
from debiased_laplace.evaluation import records
from debiased_laplace.evaluation.methods import Method, Options
from debiased_laplace.evaluation.predictors import edges
from debiased_laplace.evaluation.suite import draws
from debiased_laplace.evaluation.suite.data import loader_of
from debiased_laplace.evaluation.tasks import Context, Task
from debiased_laplace.fitting.checkpoint import Checkpoint
from debiased_laplace.sampling.samplers import UniformSampler

_T = TypeVar("_T")


class Posteriors:
    """The fitted and tuned posteriors of one seed.

    Attributes:
        fits: For each method its posteriors, one for each draw of the data.
    """

    def __init__(self, task: Task, model: nn.Module, context: Context, options: Options, work: Path) -> None:
        self.task, self.model, self.context, self.options, self.work = task, model, context, options, work
        self.regression = task.likelihood == "regression"
        self.fits: dict[str, list[DebiasedLaplace]] = {}
        self._untuned: dict[tuple[str, int], DebiasedLaplace] = {}  # by arguments and draw
        self._seconds: dict[tuple[str, int], float] = {}  # of the fit of a method's draw
        self._budgets: dict[str, int] = {}  # of methods that have the seconds of another

    def of(self, method: Method) -> tuple[list[DebiasedLaplace], dict[str, Any]]:
        """A posterior for each draw of the data; what is known of each, and seconds on the average."""
        drawn = [self._draw(method, number) for number in range(self.options.draws if method.is_random else 1)]
        self.fits[method.name] = [la for la, _ in drawn]
        return self.fits[method.name], draws.joined([result for _, result in drawn])

    def _draw(self, method: Method, number: int) -> tuple[DebiasedLaplace, dict[str, Any]]:
        path = self.work / f"{records.digest({'name': method.name, 'draw': number})}.safetensors"
        described, key = path.with_suffix(".json"), (method.fit_key, number)
        kept = self._kept(path, described)
        if kept is not None:
            la, result = kept
            self._seconds[method.name, number] = result["seconds"]["fit"]
            self._budgets[method.name] = result.get("budget", 0)
            if key in self._untuned:  # one basis for all of them, so that projections are shared again
                la.fitted = self._untuned[key].fitted
            else:
                self._untuned[key] = _before_tuning(la)
        else:
            (la, result), told = with_warnings(partial(self._fitted, method, number))
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

    def _fitted(self, method: Method, number: int) -> tuple[DebiasedLaplace, dict[str, Any]]:
        """A posterior that is tuned; one that was fitted for another method is tuned anew."""
        context, key = self.context, (method.fit_key, number)
        arguments, start = dict(method.fit), time.perf_counter()
        if key in self._untuned:
            la = copy.copy(self._untuned[key])
        else:
            if method.seconds_of:
                if method.name not in self._budgets:
                    self._budgets[method.name] = self._budget_of_equal_seconds(method)
                arguments["sampler"] = UniformSampler(self._budgets[method.name])
            start = time.perf_counter()
            la = self._fit(method, arguments, draws.seed(context.seed, number), f"{method.fit_key}, {number}")
            self._untuned[key] = copy.copy(la)
        fitted = time.perf_counter()
        self._seconds[method.name, number] = fitted - start
        la.optimize_prior_precision(
            val_loader=loader_of(self.task, "val_loader", self.context), **self.options.search, **method.tune
        )
        curve, joint = la.curve, la.tuned
        assert curve is not None
        prior = la.prior_precision.detach().double().cpu()
        result: dict[str, Any] = {
            "seconds": {"fit": fitted - start, "tune": time.perf_counter() - fitted},
            "prior_precision": typical_prior(la),
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
            result["budget"] = self._budgets[method.name]
        return la, result

    def _fit(self, method: Method, arguments: Mapping[str, Any], seed: int, name: str | None = None) -> DebiasedLaplace:
        """A fit of a method; with a name it is kept while it runs."""
        la = DebiasedLaplace(self.model, self.task.likelihood, seed=self.context.seed, **method.laplace)
        checkpoint = None if name is None else self.work / f"fit-{records.digest({'fit': name})}.progress"
        if checkpoint is not None:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            try:
                Checkpoint.check(checkpoint)
            except StoredFileError:  # damaged: it belongs to this run, and is made anew
                checkpoint.unlink(missing_ok=True)
        loader = loader_of(self.task, "train_loader", self.context)
        la.fit(loader, generator=seed, checkpoint=checkpoint, n_data=self.task.n_data, **arguments)
        return la

    def _budget_of_equal_seconds(self, method: Method) -> int:
        """Data of a single batch whose fit takes as long as another method's did here, on this machine and seed."""
        wanted = self._seconds[method.seconds_of, 0]
        seed = draws.seed(self.context.seed, 0)

        def seconds(budget: int) -> float:
            start = time.perf_counter()
            self._fit(method, {**method.fit, "sampler": UniformSampler(budget)}, seed)
            return time.perf_counter() - start

        first = self.fits[method.seconds_of][0]
        return draws.budget_within(wanted, seconds, self.task.budget, first.fitted.n_seen if first.fitted else 1)


def _before_tuning(la: DebiasedLaplace) -> DebiasedLaplace:
    """The same fit with the settings that it began with."""
    la = copy.copy(la)
    la.output_temperature, la.link, la.prior_precision = 1.0, None, 1.0
    if la.likelihood == "regression":
        la.sigma_noise = 1.0
    return la


def with_warnings(call: Callable[[], _T]) -> tuple[_T, list[str]]:
    """What a function returns, and the warnings for the user that it gave."""
    with user_warnings() as told:
        result = call()
    return result, sorted(told)


def typical_prior(la: DebiasedLaplace) -> float:
    """The prior precision, the geometric mean where there are several."""
    return float(la.prior_precision.detach().double().log().mean().exp())
