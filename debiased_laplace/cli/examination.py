"""Whether a task can be fitted, and what that takes, found out with a few data; a problem hides no other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import DebiasedLaplace, _checks, _data
from debiased_laplace._guards import user_warnings
from debiased_laplace.cli.arguments import load_posterior
from debiased_laplace.cli.errors import Told
from debiased_laplace.cli.machine import available_memory, machine
from debiased_laplace.cli.units import described, in_bytes
from debiased_laplace.curvature.structures import STRUCTURES, Kronecker, Structure
from debiased_laplace.evaluation.methods import Options, recipe
from debiased_laplace.evaluation.provenance import data_digest, seeded
from debiased_laplace.evaluation.tasks import FAILURES, Context, Task, TaskError
from debiased_laplace.fitting.estimate import Costs, FitEstimate
from debiased_laplace.fitting.memory import held_by_fit
from debiased_laplace.fitting.settings import FitSettings, default_sampler
from debiased_laplace.likelihoods import Likelihood, resolve_likelihood
from debiased_laplace.network.network import Network
from debiased_laplace.network.snapshot import Snapshot

LOADERS = ("train_loader", "val_loader", "test_loader")
#: Data of the trial, at most, and seconds that its steps may take, about.
TRIAL_SIZE, TRIAL_SECONDS = 64, 3.0
#: Seconds for which the data of a loader are counted.
COUNT_SECONDS = 2.0
#: Factors of the trial are block-diagonal with blocks of this size, so that nothing decomposes for long.
TRIAL_FACTOR = 256
#: Passes over a datum in the steps of a trial, beside those for each of its vectors and outputs.
TRIAL_PASSES = 20


@dataclass(frozen=True)
class Finding:
    """Something to know, or to mend.

    Attributes:
        level: ``"problem"``: a fit, or predictions after it, would fail; ``"warning"``: they would not, but look at it.
        about: What it is about: a function of the task, ...
        message: What was expected, what came, what to do.
    """

    level: str
    about: str
    message: str


@dataclass(frozen=True)
class Batch:
    """The first batch of a loader."""

    inputs: Any
    targets: Tensor
    n: int


@dataclass
class Examination:
    """What was found out, in the fields that docs/cli.md describes.

    Attributes:
        task: The task.
        context: For its functions.
        structure: Of the fit to come, by its name.
        budget: Training data for curvature; None for all.
        findings: In the order in which they came up.
        network: Of the model, in JSON's types, as the following; None if there is none.
        loaders: Of every loader.
        coverage: What curvature every parameter gets.
        estimates: Seconds and bytes.
        posterior: Of a file with one.
    """

    task: Task
    context: Context
    structure: str
    budget: int | None
    findings: list[Finding] = field(default_factory=list)
    network: dict[str, Any] | None = None
    loaders: dict[str, Any] = field(default_factory=dict)
    coverage: str | None = None
    estimates: dict[str, Any] | None = None
    posterior: dict[str, Any] | None = None

    @property
    def well(self) -> bool:
        """Whether a fit and predictions would go through, as far as this can tell."""
        return not any(finding.level == "problem" for finding in self.findings)

    def warn(self, about: str, message: str) -> None:
        """Note what does not stop a fit."""
        self.findings.append(Finding("warning", about, message))

    @contextlib.contextmanager
    def trying(self, about: str, level: str = "problem") -> Iterator[None]:
        """What goes wrong within is a finding."""
        try:
            with seeded(self.context.seed):
                yield
        except FAILURES as error:
            self.findings.append(Finding(level, about, Told.of(error).sentence))

    def run(self, posterior: Path | None = None) -> None:
        """All of it."""
        model = self._model()
        batches = {name: batch for name in LOADERS if (batch := self._batch(name)) is not None}
        self._compare(batches)
        self._look_at_further_loaders()
        if model is None:
            return
        if "train_loader" in batches:
            with self.trying("the network"):
                self._trial(model, batches)
        if posterior is not None:
            with self.trying("the posterior"):
                self._look_at_posterior(posterior, model, batches)

    def _model(self) -> nn.Module | None:
        model = None
        start = time.perf_counter()
        with self.trying("model()"):
            model = self.task.model(self.context)
            every = list(model.parameters())
            self.network = {
                "n_parameters": sum(p.numel() for p in every),
                "n_trainable": sum(p.numel() for p in every if p.requires_grad),
                "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in every}),
                "n_outputs": None, "seconds": time.perf_counter() - start,
            }  # fmt: skip
        return model

    def _batch(self, name: str) -> Batch | None:
        """The first batch of a loader, and what the loader is."""
        batch = None
        with self.trying(f"{name}()"):
            loader = self.task.loader(name, self.context)
            first = next(_data.labelled(loader), None)
            if first is None:
                raise TaskError(
                    f"Expected data from {name}() of {self.task.source}, got none. A generator is read only once: "
                    "make it in the function."
                )
            _check_finite(first[0], f"inputs of {name}() of {self.task.source}")
            batch = Batch(*first)
            n_data, exact = self._size(name, batch)
            if name == "train_loader" and self.task.n_data is None and n_data is None:
                self.warn(f"{name}()", "How many data it has is not known before it is read, nor how long that takes.")
            self.loaders[name] = {
                "n_data": n_data, "n_data_is_exact": exact, "batch_size": batch.n,
                "inputs": described(batch.inputs), "targets": described(batch.targets), "loss": None, "accuracy": None,
            }  # fmt: skip
        return batch

    def _size(self, name: str, first: Batch) -> tuple[int | None, bool]:
        """How many data a loader has, and whether that is certain: counted if it is read soon, or as it says itself."""
        loader = self.task.loader(name, self.context)
        stated, n_batches = _data.dataset_length(loader), _data.length(loader)
        start, n = time.perf_counter(), 0
        for _, _, of_batch in _data.labelled(loader):
            n += of_batch
            if time.perf_counter() - start > COUNT_SECONDS:
                return (stated, False) if stated is not None or n_batches is None else (n_batches * first.n, False)
        return n, True

    def _compare(self, batches: Mapping[str, Batch]) -> None:
        """Whether data are tuned or judged on that the network has learnt from."""
        digests = {name: data_digest([batch.inputs], None) for name, batch in batches.items()}
        for name, others in (("val_loader", ("train_loader",)), ("test_loader", ("train_loader", "val_loader"))):
            for other in others:
                if name in digests and digests[name] == digests.get(other):
                    self.warn(
                        f"{name}()", f"It begins with the same data as {other}(). Expected data of its own: what is "
                        "tuned or judged on known data is too certain."
                    )  # fmt: skip

    def _look_at_further_loaders(self) -> None:
        """Those that `evaluate` reads, and a fit does not."""
        for name in ("shifted_loaders", "ood_loaders"):
            with self.trying(f"{name}()", "warning"):
                for key, loader in self.task.loaders(name, self.context).items():
                    for one in loader.values() if isinstance(loader, Mapping) else (loader,):
                        if next(_data.labelled(one), None) is None:
                            raise TaskError(f"Expected data for {key!r} of {name}() of {self.task.source}, got none.")

    def _trial(self, model: nn.Module, batches: Mapping[str, Batch]) -> None:
        """Find the layers as a fit does, try all loaders on the network, fit a few data, and estimate."""
        assert self.network is not None
        likelihood = resolve_likelihood(self.task.likelihood)
        structure, train = STRUCTURES[self.structure](), batches["train_loader"]
        with user_warnings() as messages:
            settings = self._settings(structure)
            network = settings.discover(Snapshot.of(model), train.inputs, train.targets, likelihood)
            self.network["n_outputs"] = network.n_outputs
            self._check_classes(network)
            for name, batch in batches.items():
                with self.trying(f"{name}()"):
                    self._through(name, batch, network, likelihood)
            self._check_memory(network, structure, settings)
            if self.well:
                self._fit_few(model, network, structure, settings, likelihood)
        for message in messages:
            self.warn("the network", message)

    def _settings(self, structure: Structure) -> FitSettings:
        sampler = default_sampler(self.budget, structure, "ggn")
        settings = FitSettings(structure=structure, sampler=sampler, n_data=self.task.n_data, dense=False).completed()
        assert settings.split is not None
        if self.budget is not None and self.budget < settings.split.folds:
            raise TaskError(
                f"Expected a budget of at least {settings.split.folds} training data, one for each fold, got "
                f"{self.budget}. Raise BUDGET of {self.task.source} or --budget."
            )
        return settings

    def _check_classes(self, network: Network) -> None:
        names = list(self.task.constant("CLASSES", None) or ())
        n_classes = 2 if self.task.likelihood == "bernoulli" else network.n_outputs
        if names and len(names) != n_classes:
            self.warn("CLASSES", f"Expected {n_classes} names, one for each class, got {len(names)}.")

    def _through(self, name: str, batch: Batch, network: Network, likelihood: Likelihood) -> None:
        """A batch through the network: outputs are finite, and targets fit them."""
        about = self.loaders[name]
        outputs = network.outputs(batch.inputs).to(network.dtype)
        _check_finite(outputs, f"outputs of the network for {name}() of {self.task.source}")
        targets = likelihood.prepare_targets(batch.targets, network.n_outputs).to(network.device)
        loss = float(likelihood.loss(outputs, targets).mean())
        about["loss"] = loss
        if likelihood.has_answers:
            about["accuracy"] = float(likelihood.correctness(outputs, targets).mean())
        if name == "train_loader" and not loss < float(likelihood.loss(torch.zeros_like(outputs), targets).mean()):
            self.warn(
                "model()", f"Its loss on training data, {loss:.3g}, is no better than that of outputs that are all "
                "zero: it looks untrained. Return the network with its trained weights."
            )  # fmt: skip

    def _check_memory(self, network: Network, structure: Structure, settings: FitSettings) -> None:
        assert settings.split is not None
        available = available_memory(self.context.device)
        if available is None or structure.held(network) is None:
            return
        held = held_by_fit(network, structure, settings.split)
        if held > available:
            smaller = "--structure diag" if self.structure != "diag" else "fewer trainable parameters"
            raise TaskError(
                f"Expected statistics and directions to fit the memory, got about {in_bytes(held)} for --structure "
                f"{self.structure} where {in_bytes(available)} are free. Use {smaller}, or freeze layers with "
                "requires_grad_(False)."
            )

    def _fit_few(
        self, model: nn.Module, network: Network, structure: Structure, settings: FitSettings, likelihood: Likelihood
    ) -> None:  # fmt: skip
        """A fit to a few data in all its steps, what it covers, and what the one to come will take."""
        size = self._trial_size(network)
        few = list(_data.head(self.task.loader("train_loader", self.context), size))
        n_few = sum(len(some) for _, some in few)
        of_trial = replace(structure, max_factor=TRIAL_FACTOR) if isinstance(structure, Kronecker) else structure
        la = DebiasedLaplace(model, self.task.likelihood, hessian_structure=self.structure, seed=self.context.seed)
        start = time.perf_counter()
        la.fit(few, budget=None, structure=of_trial, generator=self.context.seed)
        seconds = time.perf_counter() - start
        self.coverage = la.coverage()
        inputs, targets = few[0]
        costs = Costs.of(
            la.native.fitted, of_trial, likelihood, inputs, likelihood.prepare_targets(targets, network.n_outputs)
        )  # fmt: skip
        n_data = self.loaders["train_loader"]["n_data"]
        n_drawn = min(self.budget or n_data or 0, n_data or self.budget or 0)
        estimate = FitEstimate.of(
            costs, la.native.network, settings, n_data=n_data, n_drawn=n_drawn, tuning=self._tuning(la, size),
            of_trial=(of_trial, n_few, seconds),
        )  # fmt: skip
        self.estimates = {
            "trial_size": n_few, "n_drawn": n_drawn, "seconds": estimate.seconds, "fixed_seconds": estimate.fixed,
            "reading_seconds": estimate.reading, "curvature_seconds": estimate.curvature,
            "decomposition_seconds": estimate.decompositions, "tuning_seconds": estimate.tuning,
            "memory_bytes": estimate.memory, "memory_available_bytes": available_memory(self.context.device),
            "forward_seconds_per_datum": costs.forward, "prediction_seconds_per_datum": costs.prediction,
        }  # fmt: skip

    def _tuning(self, la: DebiasedLaplace, size: int) -> float | None:
        """Seconds of tuning on all validation data, by a few of them."""
        if "val_loader" not in self.loaders:
            return None
        few = list(_data.head(self.task.loader("val_loader", self.context), size))
        start = time.perf_counter()
        with user_warnings():  # what they say is of these few
            la.optimize_prior_precision(val_loader=few, **Options().search, **recipe(self.task.likelihood))
        seconds, n_data = time.perf_counter() - start, self.loaders["val_loader"]["n_data"]
        return None if n_data is None else seconds * max(1.0, n_data / sum(len(some) for _, some in few))

    def _trial_size(self, network: Network) -> int:
        """As many data as let the trial take some seconds, by a forward pass of one."""
        one = _data.take(next(_data.labelled(self.task.loader("train_loader", self.context)))[0], slice(0, 1))
        network.outputs(one)
        start = time.perf_counter()
        network.outputs(one)
        seconds = (time.perf_counter() - start) * (TRIAL_PASSES + 2 * min(network.row_size, 128))
        return max(4, min(TRIAL_SIZE, int(TRIAL_SECONDS / max(seconds, 1e-9))))

    def _look_at_posterior(self, path: Path, model: nn.Module, batches: Mapping[str, Batch]) -> None:
        """Load a posterior with the network, and predict two data."""
        native = load_posterior(path, model)
        with torch.no_grad():
            batch = batches.get("test_loader") or batches.get("train_loader")
            if batch is not None:
                prediction = native.predict(_data.take(batch.inputs, slice(0, 2)))
                _check_finite(prediction.mean, "predictions")
        self.posterior = {
            "file": str(path.resolve()), "description": str(native), "n_data": int(native.posterior.n_data),
            "coverage": native.coverage(),
        }  # fmt: skip

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "task": {
                "name": self.task.name, "source": self.task.source, "description": self.described_task(),
                "likelihood": self.task.likelihood, "structure": self.structure, "budget": self.budget,
            },
            "machine": machine(self.context.device),
            "network": self.network, "loaders": self.loaders, "coverage": self.coverage, "estimates": self.estimates,
            "posterior": self.posterior, "well": self.well, "findings": [asdict(finding) for finding in self.findings],
        }  # fmt: skip

    def described_task(self) -> str:
        """What the task says of itself; nothing where that fails."""
        try:
            return self.task.description(self.context)
        except TaskError:
            return ""


def _check_finite(value: Any, what: str) -> None:
    for leaf in _data.tensors(value):
        if leaf.is_floating_point():
            _checks.finite(leaf, what, "Look for missing values in the data, or for an overflow in the network.")
