r"""Moments of many outputs: exact for the k most probable of each datum, and means over groups for the others.

All C outputs of a datum cost C backward passes. What is predicted hangs on few of them: the k most probable have
vectors of their own, chosen datum by datum, and their covariances are those of equation (4). The others, in the order
of their probabilities, fall into groups. Two vectors of a group T tell what a sum over its many members needs,

.. math:: \bar f_T = \frac{1}{|T|} \sum_{c \in T} f_c, \qquad
    \mathrm{E}_r\, \mathrm{Var}\Big[\frac{1}{\sqrt{|T|}} \sum_{c \in T} (r_c - \bar r_T) f_c\Big]
        = \frac{1}{|T|} \sum_{c \in T} \mathrm{Var}[f_c - \bar f_T], \qquad r_c = \pm 1,

the exact covariances of its mean with everything, and an unbiased estimate of the mean variance about it (Hutchinson's,
with one vector of random signs that all data share; centred, since what the members share would be most of its error).
A member is then the mean of its group and an independent rest of that variance: a covariance of all outputs, positive
semi-definite, with the right one of the most probable. All are vectors to back-propagate: posteriors of one basis share
them and their projections.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from debiased_laplace import _checks, _data
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.predictive import (
    UnitGradients,
    functional_moments,
    moments_of_gradients,
    part_variances,
    part_variances_of_gradients,
)

logger = logging.getLogger(__name__)

#: Outputs up to which all have exact moments by default: a backward pass for each of them and each datum.
MANY_OUTPUTS = 128

#: Bytes of the vectors of a chunk of data: of one large image at a time, calls cost as much as what they compute.
CHOSEN_MEMORY = 2**29

#: Most probable outputs with exact moments by default, where there are more.
TOP_K = 8

#: Where groups of the others end in the order of the probabilities, in multiples of k; the last has all that are left.
GROUP_ENDS = (4,)


def can_rank(network: Network, likelihood: Likelihood) -> bool:
    """Whether outputs are more or less probable: answers, one output each."""
    return likelihood.has_answers and network.sites is None


def exact_outputs(network: Network, likelihood: Likelihood, top_k: int | None = None) -> int:
    """How many outputs of a datum get exact moments: C, or k of them.

    The default goes by the cost, C backward passes of every datum, which does not depend on how many data there are, so
    that predictions do not depend on their batch. It is C where the only uncertain layer makes the outputs: nothing is
    back-propagated there.

    Args:
        network: The model with its blocks.
        likelihood: What the outputs mean.
        top_k: That number, if it was chosen; C or more for all.
    """
    if top_k is not None:
        _checks.whole(top_k, "top_k")
        if top_k < network.n_outputs and not can_rank(network, likelihood):
            raise ValueError(
                f"Expected outputs that are more or less probable for top_k={top_k}, got {network.n_outputs} of "
                f"{likelihood!r}{' at every site' if network.sites is not None else ''}. Use method='linearized', or "
                "method='glm' for the exact moments."
            )
        return min(top_k, network.n_outputs)
    cheap = network.n_outputs <= MANY_OUTPUTS or network.is_head or not can_rank(network, likelihood)
    return network.n_outputs if cheap else TOP_K


def say(network: Network, likelihood: Likelihood, k: int) -> None:
    """One line in the log about a choice that nobody made, where there are many outputs."""
    c = network.n_outputs
    if c <= MANY_OUTPUTS:
        return
    if k < c:
        logger.info(
            "Predictions of %d outputs are exact for the %d most probable of each datum (method='top_k'), since exact "
            "ones cost a backward pass for each output: %d instead of %d. For those use method='glm', or top_k=%d "
            "(la.top_k = %d of the drop-in).", c, k, c, k + 2 * (1 + len(GROUP_ENDS)), c, c,
        )  # fmt: skip
    elif network.is_head:
        logger.info("Predictions of %d outputs are exact (method='glm'): a last layer needs no backward pass.", c)
    else:
        logger.info(
            "Predictions of %d outputs are exact (method='glm'), at %d backward passes, since those of %s are not "
            "alternatives of which few are probable. Samples with method='linearized' cost less.", c, c, likelihood,
        )  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """Vectors of chosen outputs and of groups of the others, of n data.

    Attributes:
        place: ``[n, C]``, the place of every output in the order of the probabilities, the most probable first.
        ends: Places where groups end, the first the k chosen ones.
    """

    place: Tensor
    ends: tuple[int, ...]

    @classmethod
    def by_probability(cls, likelihood: Likelihood, outputs: Tensor, k: int) -> Chosen:
        """Of outputs ``[n, C]``."""
        c = outputs.shape[1]
        order = likelihood.inverse_link(outputs.double()).argsort(dim=1, descending=True, stable=True)
        ends = (k, *(end * k for end in GROUP_ENDS if end * k < c), *((c,) if k < c else ()))
        return cls(order.argsort(1), ends)

    @property
    def sizes(self) -> list[int]:
        """Members of every group."""
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]

    @property
    def member(self) -> Tensor:
        """Which of the first vectors an output is of: of its own, or of the mean of its group, ``[n, C]``."""
        k = self.ends[0]
        groups = torch.bucketize(self.place, torch.tensor(self.ends, device=self.place.device), right=True)
        return torch.where(self.place < k, self.place, k + groups - 1)

    def vectors(self, like: Tensor) -> Tensor:
        """``[k + 2 groups, n, C]``: unit vectors, means of groups, and random signs on them, centred."""
        k, n_groups = self.ends[0], len(self.sizes)
        signs = torch.randint(2, (like.shape[1],), generator=torch.Generator().manual_seed(0)).to(like) * 2 - 1
        means = torch.nn.functional.one_hot(self.member, k + n_groups).movedim(2, 0).to(like)
        sizes = torch.tensor(self.sizes, dtype=like.dtype, device=like.device)[:, None, None]
        members = means[k:]
        centred = signs - (members * signs).sum(2, keepdim=True) / sizes
        return torch.cat([means[:k], members / sizes, members * centred / sizes.sqrt()])

    def variances(self, of_vectors: Tensor) -> Tensor:
        """Variances ``[..., n, C]`` of all outputs from those of the vectors ``[..., n, V]``."""
        k, n_groups = self.ends[0], len(self.sizes)
        of_groups = of_vectors[..., k : k + n_groups] + of_vectors[..., k + n_groups :]
        each = torch.cat([of_vectors[..., :k], of_groups], -1)
        return each.gather(-1, self.member.expand(*of_vectors.shape[:-1], -1))

    def covariances(self, of_vectors: Tensor) -> Tensor:
        """Covariances ``[..., n, C, C]`` of all outputs from those of the vectors ``[..., n, V, V]``."""
        k, n_means = self.ends[0], self.ends[0] + len(self.sizes)
        means, c = of_vectors[..., :n_means, :n_means], self.place.shape[1]
        member = self.member.expand(*of_vectors.shape[:-2], -1)
        rows = means.gather(-2, member[..., None].expand(*member.shape, n_means))
        full = rows.gather(-1, member[..., None, :].expand(*member.shape, c))
        diagonal = of_vectors.diagonal(dim1=-2, dim2=-1)
        rest = torch.cat([torch.zeros_like(diagonal[..., :k]), diagonal[..., n_means:]], -1).gather(-1, member)
        full.diagonal(dim1=-2, dim2=-1).add_(rest)
        return full


def _gradients(
    network: Network, likelihood: Likelihood, inputs: _data.Inputs, k: int, formed: bool, chunk_size: int | None,
    chosen: list[Chosen],
) -> Iterator[UnitGradients]:  # fmt: skip
    """Those of the chosen vectors of the data, chunk after chunk; what was chosen is appended."""
    _checks.chunk_size(chunk_size)
    if chunk_size is None:
        chunk_size = network.chunk_size(CHOSEN_MEMORY, k + 2 * (1 + len(GROUP_ENDS)), formed=formed, inputs=inputs)
    for part in _data.slices(_data.count(inputs), chunk_size):
        factors = network.factors(_data.take(inputs, part))
        chosen.append(Chosen.by_probability(likelihood, factors.outputs, k))
        vectors = factors.backpropagate_all(chosen[-1].vectors(factors.outputs))
        yield UnitGradients(factors.outputs.to(network.dtype), factors.inputs, vectors, False)


def top_k_moments(
    network: Network, posteriors: Sequence[Posterior], likelihood: Likelihood, inputs: _data.Inputs, k: int, *,
    covariance: bool = True, chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs and their (co)variances, as of :func:`.functional_moments`: those of all C outputs are the same.

    Args:
        network: The model with its blocks.
        posteriors: R of the same parameters, which share the backward passes.
        likelihood: Whose :meth:`~.Likelihood.inverse_link` says which outputs are probable.
        inputs: N data.
        k: Outputs with exact moments.
        covariance: Covariances, or variances alone.
        chunk_size: Data at a time; ``None`` bounds the memory.

    Returns:
        ``f: [N, C]``, and ``[R, N, C, C]`` or ``[R, N, C]``.
    """
    if k >= network.n_outputs or not _data.count(inputs):
        return functional_moments(network, posteriors, inputs, covariance=covariance, chunk_size=chunk_size)
    if isinstance(inputs, _data.Assorted):
        parts = [
            top_k_moments(network, posteriors, likelihood, part, k, covariance=covariance, chunk_size=chunk_size)
            for part in inputs.parts
        ]
        means, moments = (torch.cat(of_parts, dim) for dim, of_parts in enumerate(zip(*parts, strict=True)))
        return inputs.in_order(means), inputs.in_order(moments, 1)
    chosen: list[Chosen] = []
    chunks = [
        (mean, chosen[-1].covariances(moments) if covariance else chosen[-1].variances(moments))
        for mean, moments in moments_of_gradients(
            network, posteriors, lambda formed: _gradients(network, likelihood, inputs, k, formed, chunk_size, chosen),
            covariance=covariance,
        )
    ]  # fmt: skip
    return torch.cat([mean for mean, _ in chunks]), torch.cat([moments for _, moments in chunks], 1)


def top_k_part_variances(
    network: Network, posterior: Posterior, likelihood: Likelihood, inputs: _data.Inputs, k: int,
    prior_precisions: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs ``[N, C]`` and variances ``[R, n_parts, N, C]``, as of :func:`.part_variances`.

    Args:
        network: The model with its blocks.
        posterior: Its prior precision has no effect.
        likelihood: Whose inverse link says which outputs are probable.
        inputs: N data.
        k: Outputs with exact variances.
        prior_precisions: ``[R]``.
    """
    if k >= network.n_outputs:
        return part_variances(network, posterior, inputs, prior_precisions)
    chosen: list[Chosen] = []
    chunks = [
        (mean, chosen[-1].variances(variances))
        for mean, variances in part_variances_of_gradients(
            network, posterior, lambda formed: _gradients(network, likelihood, inputs, k, formed, None, chosen),
            prior_precisions,
        )
    ]  # fmt: skip
    return torch.cat([mean for mean, _ in chunks]), torch.cat([variances for _, variances in chunks], 2)
