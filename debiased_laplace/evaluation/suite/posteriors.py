"""Posteriors of a seed: fitted once for all methods that share a fit, tuned, and kept on disk."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from debiased_laplace import _data
from debiased_laplace._files import StoredFileError
from debiased_laplace._guards import user_warnings
from debiased_laplace._ranks import current
from debiased_laplace.curvature.structures import STRUCTURES, Structure
from debiased_laplace.evaluation import records
from debiased_laplace.evaluation.methods import Method, Options
from debiased_laplace.evaluation.predictors import edges
from debiased_laplace.evaluation.suite import draws
from debiased_laplace.evaluation.suite.data import loader_of
from debiased_laplace.evaluation.tasks import Context, Task
from debiased_laplace.fitting.checkpoint import Checkpoint
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.settings import BUDGET, default_sampler
from debiased_laplace.laplace import Laplace, load
from debiased_laplace.likelihoods import resolve_likelihood
from debiased_laplace.sampling.samplers import Sampler, UniformSampler

_T = TypeVar("_T")


class Posteriors:
    """The fitted and tuned posteriors of one seed.

    Attributes:
        fits: For each method its posteriors, one for each draw of the data.
    """

    def __init__(self, task: Task, model: nn.Module, context: Context, options: Options, work: Path) -> None:
        self.task, self.model, self.context, self.options, self.work = task, model, context, options, work
        self.regression = task.likelihood == "regression"
        self.fits: dict[str, list[Laplace]] = {}
        self._untuned: dict[tuple[str, int], Laplace] = {}  # by arguments and draw
        self._seconds: dict[tuple[str, int], float] = {}  # of the fit of a method's draw
        self._budgets: dict[str, int] = {}  # of methods that have the seconds of another

    def of(self, method: Method) -> tuple[list[Laplace], dict[str, Any]]:
        """A posterior for each draw of the data; what is known of each, and seconds on the average."""
        drawn = [self._draw(method, number) for number in range(self.options.draws if method.is_random else 1)]
        self.fits[method.name] = [la for la, _ in drawn]
        return self.fits[method.name], draws.joined([result for _, result in drawn])

    def _draw(self, method: Method, number: int) -> tuple[Laplace, dict[str, Any]]:
        path = self.work / f"{records.digest({'name': method.name, 'draw': number})}.safetensors"
        described, key = path.with_suffix(".json"), (method.fit_key, number)
        kept = self._kept(path, described)
        if kept is not None:
            la, result = kept
            self._seconds[method.name, number] = result["seconds"]["fit"]
            self._budgets[method.name] = result.get("budget", 0)
            if key in self._untuned:  # one basis for all of them, so that projections are shared again
                la = _on_the_basis_of(la, self._untuned[key])
            else:
                self._untuned[key] = _before_tuning(la)
        else:
            (la, result), told = with_warnings(partial(self._fitted, method, number))
            result["warnings"] = told
            if not current().rank:
                path.parent.mkdir(parents=True, exist_ok=True)
                la.save(path)
                records.write_record(described, result)
        return la, result

    def _kept(self, path: Path, described: Path) -> tuple[Laplace, dict[str, Any]] | None:
        """What an interrupted run has finished, if it is whole; several processes get what the first one has."""
        ranks, kept = current(), list[tuple[Laplace, dict[str, Any]]]()

        def of_first() -> tuple[bytes, dict[str, Any]] | None:
            result = records.read_record(described, {})
            try:
                kept.extend([] if result is None else [(load(path, self.model), result)])
            except (FileNotFoundError, StoredFileError):
                return None
            return None if result is None else (b"" if ranks.size == 1 else path.read_bytes(), result)

        sent = ranks.of_one(of_first)
        if ranks.rank and sent is not None:
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / path.name
                copy.write_bytes(sent[0])
                kept.append((load(copy, self.model), sent[1]))
        return kept[0] if kept else None

    def _fitted(self, method: Method, number: int) -> tuple[Laplace, dict[str, Any]]:
        """A posterior that is tuned; one that was fitted for another method is tuned anew."""
        context, key = self.context, (method.fit_key, number)
        arguments, start = dict(method.fit), time.perf_counter()
        if key in self._untuned:
            la = self._untuned[key]
        else:
            if method.seconds_of:
                if method.name not in self._budgets:
                    self._budgets[method.name] = self._budget_of_equal_seconds(method)
                arguments["sampler"] = UniformSampler(self._budgets[method.name])
            start = time.perf_counter()
            la = self._fit(method, arguments, draws.seed(context.seed, number), f"{method.fit_key}, {number}")
            self._untuned[key] = la
        fitted = time.perf_counter()
        self._seconds[method.name, number] = fitted - start
        validation = self._share("val_loader")
        la, is_joint = tuned_by(la, validation, self.options.grid, **method.tune)
        found = la.tuned
        assert found is not None
        curve = found.curve
        result: dict[str, Any] = {
            "seconds": {"fit": fitted - start, "tune": time.perf_counter() - fitted},
            "prior_precision": typical_prior(la),
            "edges": edges.of_posterior(la, curve.prior_precisions),
            "curve": {"prior_precisions": curve.prior_precisions.tolist(), "losses": curve.losses.tolist()},
            "validation_nll": float(curve.losses.min()),
            "coverage": la.coverage(),
            "link": la.link,
        }
        if is_joint:
            result |= {
                "validation_nll": float(found.loss),
                "prior_precisions": found.prior_precisions.tolist(),
                "temperature": float(found.temperature),
                "temperature_alone": list(found.temperature_alone),
            }
        if self.regression:
            result["noise"] = noise_of(la)
        if method.seconds_of:
            result["budget"] = self._budgets[method.name]
        return la, result

    def _fit(self, method: Method, arguments: Mapping[str, Any], seed: int, name: str | None = None) -> Laplace:
        """A fit of a method; with a name it is kept while it runs."""
        checkpoint = None if name is None else self.work / f"fit-{records.digest({'fit': name})}.progress"
        if checkpoint is not None and not current().rank:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            try:
                Checkpoint.check(checkpoint)
            except StoredFileError:  # damaged: it belongs to this run, and is made anew
                checkpoint.unlink(missing_ok=True)
        loader = self._share("train_loader")
        likelihood = resolve_likelihood(self.task.likelihood)
        fitted = fit(
            self.model, loader, likelihood, generator=seed, checkpoint=checkpoint, n_data=self.task.n_data,
            dense=False, **fit_settings(**method.laplace, **arguments),
        )  # fmt: skip
        return Laplace(fitted, likelihood, fitted.posterior, seed=self.context.seed)

    def _share(self, name: str) -> Iterable[Any]:
        """The share of this process of a loader of the task."""
        loader, ranks = loader_of(self.task, name, self.context), current()
        return loader if ranks.size == 1 else _data.Dealt(loader, ranks)

    def _budget_of_equal_seconds(self, method: Method) -> int:
        """Data of a single batch whose fit takes as long as another method's did here, on this machine and seed."""
        ranks = current()  # all of which have to want the same
        wanted = ranks.of_one(lambda: self._seconds[method.seconds_of, 0])
        seed = draws.seed(self.context.seed, 0)

        def seconds(budget: int) -> float:
            start = time.perf_counter()
            self._fit(method, {**method.fit, "sampler": UniformSampler(budget)}, seed)
            return ranks.of_one(lambda: time.perf_counter() - start)

        first = self.fits[method.seconds_of][0]
        return draws.budget_within(wanted, seconds, self.task.budget, first.fitted.n_seen if first.fitted else 1)


def fit_settings(
    *, hessian_structure: str = "kron", subset_of_weights: str = "all", budget: int | None = BUDGET,
    sampler: Sampler | None = None, structure: Structure | None = None, **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of :func:`~debiased_laplace.fitting.fit.fit` from a method's, which have the names of laplace-torch."""
    structure = structure or STRUCTURES[hessian_structure]()
    return {
        "structure": structure, "parameters": None if subset_of_weights == "all" else subset_of_weights,
        "sampler": sampler or default_sampler(budget, structure, others.get("curvature", "ggn")), **others,
    }  # fmt: skip


def tuned_by(
    la: Laplace, validation: Iterable[Any], grid: Tensor, *, link_approx: str | None = None,
    prior_structure: str = "scalar", tune_temperature: bool = False, tune_sigma_noise: bool = False,
    selection: str = "best",
) -> tuple[Laplace, bool]:  # fmt: skip
    """A posterior tuned by the arguments of a method, and whether more than one prior precision was chosen."""
    found = la.tune(
        validation, link=link_approx or la.likelihood.links[0], prior_structure=prior_structure,
        temperature=tune_temperature, noise=tune_sigma_noise, selection=selection, prior_precisions=grid,
    )  # fmt: skip
    return found, tune_temperature or prior_structure != "scalar" or selection != "best"


def _before_tuning(la: Laplace) -> Laplace:
    """The same fit with the settings that it began with."""
    return Laplace(la.fitted, la.likelihood, la.fitted.posterior, seed=la.seed)


def _on_the_basis_of(la: Laplace, other: Laplace) -> Laplace:
    """A tuned posterior on the basis of another one of the same fit."""
    posterior = replace(
        other.posterior, prior_precision=la.posterior.prior_precision, noise_variance=la.posterior.noise_variance
    )
    return replace(la, fitted=other.fitted, posterior=posterior)


def with_warnings(call: Callable[[], _T]) -> tuple[_T, list[str]]:
    """What a function returns, and the warnings for the user that it gave."""
    with user_warnings() as told:
        result = call()
    return result, sorted(told)


def typical_prior(la: Laplace) -> float:
    """The prior precision, the geometric mean where there are several."""
    return float(la.posterior.prior_precision.detach().double().log().mean().exp())


def noise_of(la: Laplace) -> float:
    """Standard deviation of the observations of a regression."""
    return float(la.posterior.noise_variance) ** 0.5
