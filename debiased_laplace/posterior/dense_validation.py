r"""Validation data with dense outputs: what is chosen on them is chosen on some of their sites.

All sites of a datum would need a backward pass for each output of each. Instead, every datum has up to m sites, drawn
at random among those with a target, m with ``m C`` at most :data:`SITE_VECTORS`. Their moments are exact, and each is
to the search what a datum is otherwise; but those of one datum are not independent, and standard errors are of data.
The draw depends on the seed and on the position of the datum, not on the batches.

Where covariances between the outputs of a site are too many (a vocabulary), candidates are compared by linearised
samples, the same draws for all: a coarse grid, at the temperature of the network alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace._ranks import current
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.posterior.dense import MAX_COVARIANCE_OUTPUTS, site_gradients, site_moments
from debiased_laplace.posterior.gaussian import Posterior, standard_normals
from debiased_laplace.posterior.predictive import UnitGradients, linearized_changes, part_variances_of_gradients
from debiased_laplace.posterior.search import mean_by_datum
from debiased_laplace.posterior.validation import T, Validation

#: Vectors for the sites of a datum, C of each.
SITE_VECTORS = 64

#: Numbers of outputs of all sites of a datum where they are compared by samples, and how many samples and candidates.
SAMPLED_OUTPUTS, N_SAMPLES, N_CANDIDATES = 2**14, 16, 9


@dataclass(frozen=True)
class SiteValidation(Validation):
    """Some sites of validation data as data of their own; :attr:`likelihood` is that of a site.

    Attributes:
        whole: The likelihood of all sites of a datum.
    """

    whole: Likelihood | None = None
    _datum: list[Tensor] = field(default_factory=list)

    @property
    def of_targets(self) -> Likelihood:
        """That of all sites."""
        assert self.whole is not None
        return self.whole

    @property
    def is_coarse(self) -> bool:
        """Whether candidates are compared by samples: covariances of a vocabulary are too many."""
        c = self.network.n_outputs
        return self.likelihood.needs_covariance(self.link) and c > MAX_COVARIANCE_OUTPUTS

    @property
    def datum(self) -> Tensor | None:
        """Of every chosen site the number of its datum, after a pass over the data."""
        return torch.cat(self._datum).to(self.network.device)

    def __iter__(self) -> Iterator[tuple[_data.Inputs, Tensor]]:
        """Of several processes all read all data: which sites are chosen depends on the number of a datum."""
        yield from self.of_all(super().__iter__())

    def dealt(self, compute: Callable[[_data.Inputs, Tensor, Tensor], T]) -> Iterator[T]:
        """What is computed of every batch of :meth:`chosen`, each by one of the processes that tune together."""
        ranks = current()
        for number, batch in enumerate(self.chosen()):
            owner = number % ranks.size
            mine = compute(*batch) if owner == ranks.rank else None
            computed = ranks.gather(mine, self.network.device)[owner]
            assert computed is not None
            yield computed

    def chosen(self) -> Iterator[tuple[_data.Inputs, Tensor, Tensor]]:
        """Inputs, their sites ``[n, m]`` or -1, and the targets of those that are there, batch after batch."""
        self._datum.clear()
        budget, n_seen = SAMPLED_OUTPUTS if self.is_coarse else SITE_VECTORS, 0
        most = max(1, budget // self.network.n_outputs)
        for inputs, targets in self:
            rows, observed = self.of_targets.sites(targets)
            sites = torch.full((len(observed), most), -1)
            for number, of_datum in enumerate(observed.cpu()):
                generator = torch.Generator().manual_seed((self.seed + n_seen + number) % 2**63)
                there = of_datum.nonzero()[:, 0]
                some = there[torch.randperm(len(there), generator=generator)[:most]]
                sites[number, : len(some)] = some
            data = torch.arange(len(sites)).repeat_interleave(most)[sites.flatten() >= 0]
            self._datum.append(data + n_seen)
            n_seen += len(sites)
            if len(data):
                yield inputs, sites, rows[data.to(rows.device), sites[sites >= 0].to(rows.device)]
        if n_seen and not len(torch.cat(self._datum)):
            raise ValueError(
                f"Expected validation data with a target for some site, got {n_seen} data without any: all are left "
                f"out by {self.whole}. Look at the labels that the loader gives."
            )

    def with_outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs ``[P, C]`` of the chosen sites and their targets, batch after batch."""

        def outputs(inputs: _data.Inputs, sites: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return _at(self.network.outputs(inputs), sites, self.network.n_outputs), targets

        yield from self.dealt(outputs)

    def with_moments(
        self, posteriors: Sequence[Posterior], *, covariance: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of the chosen sites, as of data."""

        def of_batch(inputs: _data.Inputs, sites: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            which, mean, moments = zip(
                *site_moments(self.network, posteriors, inputs, sites, covariance=covariance), strict=True
            )
            order = torch.cat(which).argsort().to(self.network.device)
            return torch.cat(mean)[order], torch.cat(moments, 1)[:, order], targets

        yield from self.dealt(of_batch)

    def with_part_variances(self, precisions: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of the chosen sites, as of data."""

        def of_batch(inputs: _data.Inputs, sites: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            positions: list[Tensor] = []

            def gradients(formed: bool) -> Iterator[UnitGradients]:
                for of_sites, which in site_gradients(self.network, inputs, sites, formed=formed):
                    positions.append(which)
                    yield of_sites

            chunks = part_variances_of_gradients(self.network, self.posterior, gradients, precisions)
            mean, variances = zip(*chunks, strict=True)
            order = torch.cat(positions).argsort()[-len(targets) :].to(self.network.device)  # -1 is of none
            return torch.cat(mean)[order], torch.cat(variances, 2)[:, :, order], targets

        yield from self.dealt(of_batch)

    def losses(self, precisions: Tensor, temperature: float) -> Tensor:
        """Mean losses of the sites of every datum with every prior precision, ``[R, n]``, by linearised samples."""
        n_samples = min(self.n_samples, N_SAMPLES)
        network, candidates = self.network, self.at(precisions)

        def of_batch(inputs: _data.Inputs, sites: Tensor, targets: Tensor) -> Tensor:
            totals: list[Tensor | None] = [None] * len(candidates)
            for number in range(n_samples):
                generator = torch.Generator().manual_seed((self.seed + number) % 2**63)
                normals = standard_normals((1, self.posterior.n_normals), self.posterior.mean, generator)
                for index, candidate in enumerate(candidates):
                    deviation = candidate.transform(normals)
                    ((f, change),) = linearized_changes(network, candidate.mean, deviation, inputs)
                    outputs = _at((f + change).to(network.dtype), sites, network.n_outputs) / temperature
                    value = -self.likelihood.negative_log_likelihood(outputs, targets, candidate.noise_variance)
                    before = totals[index]
                    totals[index] = value if before is None else torch.logaddexp(before, value)
            sums = torch.stack([total for total in totals if total is not None]).double()
            return torch.as_tensor(n_samples, dtype=torch.float64).log() - sums.cpu()

        of_batches = list(self.dealt(of_batch))
        datum = torch.cat(self._datum)
        return torch.stack([mean_by_datum(losses, datum) for losses in torch.cat(of_batches, 1)])


def coarse(precisions: Tensor) -> Tensor:
    """At most :data:`N_CANDIDATES` prior precisions of the same range, ascending."""
    ordered = precisions.unique()
    if len(ordered) <= N_CANDIDATES:
        return ordered
    first, last = ordered[[0, -1]].log10().tolist()
    return torch.logspace(first, last, N_CANDIDATES, dtype=ordered.dtype)


def _at(outputs: Tensor, sites: Tensor, n_outputs: int) -> Tensor:
    """Outputs ``[P, C]`` of the chosen sites, datum after datum, from rows ``[n, S * C]``."""
    data = torch.arange(len(sites)).repeat_interleave(sites.shape[1])[sites.flatten() >= 0]
    return outputs.unflatten(1, (-1, n_outputs))[data, sites[sites >= 0]]
