"""Validation data: what predictions with candidate prior precisions are for them, and how good they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from debiased_laplace import _data
from debiased_laplace._ranks import current
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.curve import EMPTY, PriorCurve, check_losses
from debiased_laplace.posterior.gaussian import Posterior, standard_normals
from debiased_laplace.posterior.search import ValidationLoss
from debiased_laplace.posterior.top_k import MANY_OUTPUTS, exact_outputs, top_k_moments, top_k_part_variances

T = TypeVar("T")

#: Bytes of covariances of all candidates at a time, where they are compared datum by datum.
COVARIANCE_MEMORY = 2**28


@dataclass(frozen=True)
class Validation:
    """Validation data, and how predictions are made for them.

    Attributes:
        network: The model with its blocks.
        posterior: Its prior precision has no effect.
        likelihood: What the outputs mean.
        batches: The data.
        link: How predictions integrate over the outputs.
        n_samples: Draws for ``link="mc"``.
        seed: Their seed.
        targets_key: Where dictionary-like batches have their targets.
        progress_bar: Show a tqdm bar.
    """

    network: Network
    posterior: Posterior
    likelihood: Likelihood
    batches: Iterable[Any]
    link: str
    n_samples: int = 100
    seed: int = 0
    targets_key: str = "labels"
    progress_bar: bool = False
    _shards: list[_data.Shard] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def of_targets(self) -> Likelihood:
        """What knows the targets as the data have them."""
        return self.likelihood

    def __iter__(self) -> Iterator[tuple[_data.Inputs, Tensor]]:
        """Inputs and prepared targets, batch after batch."""
        self._shards[:] = [_data.Shard(self.batches)]
        mine = _data.of_this_process(self.batches, self._shards[0], self.targets_key)
        stream = _data.labelled(mine, self.targets_key)
        for inputs, targets, _ in tqdm(
            stream, desc="Validation", unit="batch", disable=not self.progress_bar, leave=False
        ):  # fmt: skip
            targets = self.of_targets.prepare_targets(targets, self.network.n_outputs)
            yield inputs, targets.to(self.network.device)

    def at(self, prior_precisions: Tensor, **changes: Any) -> list[Posterior]:
        """The posterior with every prior precision ``[R]`` for all parameters."""
        return [replace(self.posterior, prior_precision=p.reshape(1), **changes) for p in prior_precisions]

    def with_outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs ``[n, C]`` of the network and targets, batch after batch."""
        yield from self.of_all((self.network.outputs(inputs), targets) for inputs, targets in self)

    def of_all(self, results: Iterator[T]) -> Iterator[T]:
        """What was computed batch after batch, of the batches of all processes that tune together."""
        ranks = current()
        yield from ranks.rounds(results, self.network.device)
        if ranks.size > 1:  # all have come to the end, and those without a batch have begun
            self._shards[0].check(ranks)

    def with_moments(
        self, posteriors: Sequence[Posterior], *, covariance: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Outputs, their (co)variances under R posteriors ``[R, n, ...]``, and targets, batch after batch."""
        k = exact_outputs(self.network, self.likelihood)

        def moments(inputs: _data.Inputs) -> tuple[Tensor, Tensor]:
            return top_k_moments(self.network, posteriors, self.likelihood, inputs, k, covariance=covariance)

        yield from self.of_all((*moments(inputs), targets) for inputs, targets in self)

    def with_part_variances(self, precisions: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Outputs, variances ``[R, n_parts, n, C]`` by part, and targets, batch after batch."""
        k = exact_outputs(self.network, self.likelihood)

        def variances(inputs: _data.Inputs) -> tuple[Tensor, Tensor]:
            return top_k_part_variances(self.network, self.posterior, self.likelihood, inputs, k, precisions)

        yield from self.of_all((*variances(inputs), targets) for inputs, targets in self)

    @property
    def is_coarse(self) -> bool:
        """Whether a table of covariances would be too large: few candidates are compared, datum by datum."""
        return self.likelihood.needs_covariance(self.link) and self.network.n_outputs > MANY_OUTPUTS

    def losses(self, precisions: Tensor, temperature: float) -> Tensor:
        """Losses of every datum with every prior precision, ``[R, N]``, float64; no table of covariances is kept."""
        candidates, normals, c = self.at(precisions), self.normals(), self.network.n_outputs
        k = exact_outputs(self.network, self.likelihood)
        of_datum = len(candidates) * c**2 * torch.finfo(self.network.dtype).bits // 8

        def of_batch(inputs: _data.Inputs, targets: Tensor) -> Tensor:
            losses = []
            for part in _data.slices(len(targets), max(1, COVARIANCE_MEMORY // of_datum)):
                mean, covariances = top_k_moments(
                    self.network, candidates, self.likelihood, _data.take(inputs, part), k
                )  # fmt: skip
                of_part = [
                    self.likelihood.negative_log_predictive(
                        mean / temperature, covariance / temperature**2, targets[part], self.link, normals,
                        self.posterior.noise_variance,
                    )
                    for covariance in covariances
                ]  # fmt: skip
                losses.append(torch.stack(of_part).double().cpu())
            return torch.cat(losses, 1)

        return torch.cat(list(self.of_all(of_batch(*batch) for batch in self)), 1)

    @property
    def datum(self) -> Tensor | None:
        """Number of the datum that every target is of, if it has several, of all batches together."""
        return None

    def normals(self) -> Tensor | None:
        """Draws ``[M, C]`` for ``"mc"``, the same for all candidates and data."""
        if self.link != "mc":
            return None
        shape, generator = (self.n_samples, self.network.n_outputs), torch.Generator().manual_seed(self.seed)
        return standard_normals(shape, self.posterior.mean, generator)


def losses_on_the_grid(data: Validation, precisions: Tensor, temperature: float) -> tuple[PriorCurve, float]:
    """Losses of all candidates, summed batch after batch, and that of the network without uncertainty."""
    candidates, likelihood, normals = data.at(precisions), data.likelihood, data.normals()
    covariance, noise_variance = likelihood.needs_covariance(data.link), data.posterior.noise_variance
    total, n = torch.zeros(len(candidates), dtype=torch.float64, device=data.network.device), 0
    alone = torch.zeros_like(total[0])
    for mean, covariances, targets in data.with_moments(candidates, covariance=covariance):
        losses = likelihood.negative_log_predictive(
            mean / temperature, covariances / temperature**2, targets, data.link, normals, noise_variance
        )
        total += losses.double().sum(-1)
        certain = likelihood.negative_log_likelihood(mean.double() / temperature, targets, noise_variance)
        alone += certain.sum()
        n += len(mean)
    if n == 0:
        raise ValueError(EMPTY)
    losses = (total / n).cpu()
    check_losses(losses)
    grid = torch.stack([candidate.prior_precision[0] for candidate in candidates]).cpu()
    return PriorCurve(grid, losses, data.link), float(alone) / n


def tabulate(data: Validation, precisions: Tensor, per_part: bool) -> tuple[ValidationLoss, Tensor]:
    """The loss, and variances ``[R, n_parts, N, C]``, or ``[R, 1, N, C]`` or ``[R, 1, N, C, C]`` of all parts."""
    candidates, covariance = data.at(precisions), data.likelihood.needs_covariance(data.link)
    means, tables, targets = [], [], []
    with torch.inference_mode(False), torch.no_grad():  # the table is differentiated, with respect to where it is read
        by_part = data.with_part_variances(precisions) if per_part else None
        for mean, table, of_batch in by_part or data.with_moments(candidates, covariance=covariance):
            means.append(mean)
            tables.append(table if per_part else table[:, None])
            targets.append(of_batch)
        if not means:
            raise ValueError(EMPTY)
        noise_variance = data.posterior.noise_variance
        mean = torch.cat(means).double()
        loss = ValidationLoss(
            data.likelihood, data.link, data.normals(), noise_variance, mean, torch.cat(targets), data.datum
        )  # fmt: skip
        return loss, torch.cat(tables, 2)


def exact_loss(data: Validation, loss: ValidationLoss, priors: Tensor, temperature: float) -> float:
    """Without interpolation, from another pass over the data."""
    posterior = replace(data.posterior, prior_precision=priors)
    means, variances, targets = [], [], []
    for mean, (variance,), of_batch in data.with_moments([posterior], covariance=False):
        means.append(mean)
        variances.append(variance)
        targets.append(of_batch)
    there = replace(loss, mean=torch.cat(means).double(), targets=torch.cat(targets))
    return float(there(torch.cat(variances).double(), temperature))
