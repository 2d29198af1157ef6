"""Laws of a sampler: what it keeps of a stream stands for all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.sampling.sample import IN_ALL_FOLDS, Sample
from debiased_laplace.sampling.samplers import Observer, Sampler

__all__ = ["check_sampler"]


def check_sampler(
    sampler: Sampler,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    folds: int = 4,
    likelihood: Likelihood | None = None,
    observe: Observer | None = None,
    n_draws: int = 400,
    max_z: float = 4.0,
) -> None:
    r"""Laws of a sampler: call it on one of your own, with a budget well below the number of data.

    * the stream is read once, no datum is kept twice, and every one with its own inputs and targets;
    * no weight is below 1/N, with which a datum stands for itself;
    * weighted sums are unbiased for the mean, of the sample and of every fold with the data that all folds share;
    * the same generator draws the same data.

    Args:
        sampler: What to check.
        batches: Of a small stream, ``(inputs, targets)``.
        folds: Number of folds.
        likelihood: For samplers that look at the loss.
        observe: Gives the outputs of a batch, likewise.
        n_draws: How often to draw, with seeds from zero on.
        max_z: Largest distance of a mean over the draws from what is expected, in its standard errors.

    Raises:
        AssertionError: If a law does not hold; it names it.
    """
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    n = len(targets)
    values = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[:, 0] = 1  # of which the mean is the sum of the weights

    def draw(seed: int) -> Sample:
        generator = torch.Generator().manual_seed(seed)
        return sampler.draw(iter(batches), folds, generator, likelihood=likelihood, observe=observe)

    estimates = []
    for seed in range(n_draws):
        sample = draw(seed)
        _check_sample(sample, inputs, targets, folds)
        whole = [sample.data, *(sample.fold([fold]) for fold in range(folds))]
        estimates.append(torch.stack([part.weights @ values[part.indices] for part in whole]))
    means = torch.stack(estimates)  # [n_draws, 1 + folds, 3]
    errors, spread = (means.mean(0) - values.mean(0)).abs(), means.std(0) / n_draws**0.5
    worst = (errors / spread.clamp_min(1e-12)).amax(1).tolist()
    for name, z in zip(["the sample", *(f"fold {fold}" for fold in range(folds))], worst, strict=True):
        if z > max_z:
            raise AssertionError(
                f"weighted sums of {name}: expected the mean over the stream, got {z:.1f} standard errors from it."
            )
    first, second = draw(0).data, draw(0).data
    if not (torch.equal(first.indices, second.indices) and torch.equal(first.weights, second.weights)):
        raise AssertionError("the same generator: expected the same draw, got another one.")


def _check_sample(sample: Sample, inputs: Tensor, targets: Tensor, folds: int) -> None:
    n, data = len(targets), sample.data
    checks: dict[str, tuple[Any, Any]] = {
        "number of data seen": (sample.n_seen, n),
        "number of folds": (sample.n_folds, folds),
        "number of different data": (len(data.indices.unique()), len(data)),
        "whether inputs are those of the indices": (torch.equal(data.inputs, inputs[data.indices]), True),
        "whether targets are those of the indices": (torch.equal(data.targets, targets[data.indices]), True),
        "whether weights are finite and at least 1/N": (
            bool((data.weights.isfinite() & (data.weights >= (1 - 1e-9) / n)).all()), True,
        ),
        "whether folds are numbers of folds": (
            bool(((sample.folds >= IN_ALL_FOLDS) & (sample.folds < folds)).all()), True,
        ),
    }  # fmt: skip
    for law, (actual, expected) in checks.items():
        if actual != expected:
            raise AssertionError(f"{law}: expected {expected}, got {actual}.")
