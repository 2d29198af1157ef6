"""Whether the debiased K-FAC of ``paper.py`` predicts better: one batch, two batches and the package's default.

All fits are exact (every output's vector), of all layers, and read the training data through the same loader; a
uniform draw of one seed has the same data in both splits. Predictions are compared at the same settings, those that
are best for the posterior of all the data, and tuned: halves of the test images choose prior precision and temperature,
the others judge.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from paper_measure import chunk_of
from paper_networks import Trained, wait_for
from torch import Tensor

from debiased_laplace._guards import full_precision
from debiased_laplace.curvature.structures import Isotropic, Kronecker
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.sampling.samplers import PrioritySampler, UniformSampler
from debiased_laplace.sampling.splits import CrossFit, Single, TwoBatch

PRIORS = torch.logspace(-2, 4, 13, dtype=torch.float64)
TEMPERATURES = torch.logspace(-0.301, 0.602, 13, dtype=torch.float64)
ONE, TWO, DEFAULT, ALL, IDENTITY = "one batch", "two batches", "default", "all data", "identity"
#: Sampler of a budget, and split.
METHODS: dict[str, tuple[Callable[[int], Any], Any]] = {
    ONE: (UniformSampler, Single()), TWO: (UniformSampler, TwoBatch()), DEFAULT: (PrioritySampler, CrossFit()),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How much is compared.

    Attributes:
        budgets: Data of the curvature.
        seeds: Draws of each.
        n_test: Test images.
        halvings: Of these, into tuning and judging.
        batch: Of the loader.
        memory: Bytes of gradients at a time, on a card.
    """

    budgets: tuple[int, ...] = (128, 1024)
    seeds: int = 3
    n_test: int = 1_000
    halvings: int = 20
    batch: int = 500
    memory: float = 4e9


PLANS = {"vit": Plan((64, 256, 1024), 4, 2_000)}
QUICK = Plan((16,), 2, 40, 3, 100)


class Comparison:
    """Fits of one network, and how they predict."""

    def __init__(self, trained: Trained, plan: Plan) -> None:
        self.trained, self.plan, self.likelihood = trained, plan, Categorical()
        self.chunk = None if trained.device.type == "cpu" else chunk_of(trained, plan.memory)
        self.batches = list(zip(*(part.split(plan.batch) for part in trained.train), strict=True))
        self.inputs, self.targets = (part[: plan.n_test].to(trained.device) for part in trained.test)

    def fitted(self, sampler: Any, split: Any, seed: int = 0, structure: Any = None) -> tuple[Fit, float]:
        """A fit and its seconds."""
        wait_for(self.trained.device)
        start = time.perf_counter()
        result = fit(
            self.trained.model, self.batches, self.likelihood, structure=structure or Kronecker(), sampler=sampler,
            split=split, generator=seed, chunk_size=self.chunk,
        )  # fmt: skip
        wait_for(self.trained.device)
        return result, time.perf_counter() - start

    def predicted(self, fitted: Fit) -> tuple[Tensor, Tensor]:
        """Losses ``[R, T, n]`` of the test images at prior precisions and temperatures; log variances ``[R, n, C]``."""
        priors = PRIORS.to(fitted.posterior.prior_precision.device)
        grid = [replace(fitted.posterior, prior_precision=prior.reshape(1)) for prior in priors]
        with full_precision(), torch.no_grad():
            mean, covariances = functional_moments(fitted.network, grid, self.inputs, chunk_size=self.chunk)
            mean, covariances = (mean[0] if mean.ndim == 3 else mean).double(), covariances.double()
            losses = torch.stack([self._losses(mean / t, covariances / t**2) for t in TEMPERATURES], 1)
        return losses.cpu(), covariances.diagonal(dim1=-2, dim2=-1).log().cpu()

    def _losses(self, mean: Tensor, covariances: Tensor) -> Tensor:
        return torch.stack([
            self.likelihood.log_loss(self.likelihood.predictive(mean, c, "mean_field"), self.targets)
            for c in covariances
        ])  # fmt: skip

    def record(self) -> dict[str, Any]:
        """All of it."""
        plan = self.plan
        self.fitted(UniformSampler(16), Single())  # warms up
        whole, seconds = self.fitted(UniformSampler(None), Single())
        reference, log_variances = self.predicted(whole)
        with torch.no_grad(), full_precision():
            outputs = torch.cat([self.trained.model(part) for part in self.inputs.split(500)]).double()
        alone = torch.stack([self.likelihood.loss(outputs / t, self.targets) for t in TEMPERATURES])[None].cpu()
        at = int(reference[:, temperature_one()].mean(-1).argmin())
        judged = Judged(plan.n_test, plan.halvings, at)
        print(f"all data: {seconds:.1f} s", flush=True)
        isotropic, _ = self.fitted(UniformSampler(16), Single(), structure=Isotropic())
        result: dict[str, Any] = {
            "prior": float(PRIORS[at]), "n_test": plan.n_test, "halvings": plan.halvings, "seeds": plan.seeds,
            "network": judged.of_network(alone),
            ALL: judged.of(reference) | {"seconds": seconds},
            IDENTITY: judged.of(self.predicted(isotropic)[0]),
            "fits": {},
        }  # fmt: skip
        for budget in plan.budgets:
            for name, (sampler, split) in METHODS.items():
                runs = []
                for seed in range(plan.seeds):
                    fitted, seconds = self.fitted(sampler(budget), split, seed)
                    losses, logs = self.predicted(fitted)
                    runs.append(judged.of(losses) | {"seconds": seconds} | compared(logs[at], log_variances[at]))
                result["fits"].setdefault(str(budget), {})[name] = runs
                print(f"{name}, {budget} data: {np.mean([run['seconds'] for run in runs]):.2f} s a fit", flush=True)
        return result


def compared(logs: Tensor, reference: Tensor) -> dict[str, float]:
    """Mean log ratio of variances, and its mean size, over the outputs that have one.

    All-CNN-C ends with a rectifier: an output that is off at all sites of an image has no variance.
    """
    ratios = (logs - reference)[logs.isfinite() & reference.isfinite()]
    return {"distance": float(ratios.abs().mean()), "log_ratio": float(ratios.mean())}


def temperature_one() -> int:
    """Place of the temperature nearest to one."""
    return int(TEMPERATURES.log().abs().argmin())


class Judged:
    """How good losses are, at settings that all share and tuned on halves of the test data."""

    def __init__(self, n: int, halvings: int, prior: int) -> None:
        orders = [torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for seed in range(halvings)]
        self.halves = [half for order in orders for half in ((order[: n // 2], order[n // 2 :]),
                                                             (order[n // 2 :], order[: n // 2]))]  # fmt: skip
        self.prior = prior

    def of(self, losses: Tensor) -> dict[str, Any]:
        """Mean losses: the same settings; prior precision tuned; temperature tuned with it.

        Args:
            losses: ``[R, T, n]``.
        """
        one = temperature_one()
        return {
            "same": float(losses[self.prior, one].mean()), "prior": self.tuned(losses[:, one : one + 1]),
            "both": self.tuned(losses), "of_priors": losses[:, one].mean(-1).tolist(),
        }  # fmt: skip

    def of_network(self, losses: Tensor) -> dict[str, Any]:
        """Without a posterior: as it is, and with its temperature tuned."""
        return {"same": float(losses[0, temperature_one()].mean()), "both": self.tuned(losses)}

    def tuned(self, losses: Tensor) -> float:
        """Mean over halvings of the loss on one half at what is best on the other."""
        flat = losses.flatten(0, 1)
        return float(np.mean([float(flat[flat[:, a].mean(1).argmin()][b].mean()) for a, b in self.halves]))


def paired(runs: Mapping[str, Sequence[Mapping[str, float]]], first: str, second: str, key: str) -> tuple[float, float]:
    """Mean and standard error over draws of a difference, the second less the first."""
    differences = np.array([b[key] - a[key] for a, b in zip(runs[first], runs[second], strict=True)])
    return float(differences.mean()), float(differences.std(ddof=1) / len(differences) ** 0.5)
