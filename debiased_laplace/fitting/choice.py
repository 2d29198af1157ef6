"""Parameters that the data choose, before a fit of the usual kind over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from glob import escape

import torch
from torch import Tensor

from debiased_laplace._ranks import current
from debiased_laplace.curvature.structures import Diagonal
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.fitting.settings import FitSettings
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.blocks import unflatten
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.network.selection import BySensitivity, indices_of
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.sampling.sample import WeightedData


@dataclass(frozen=True)
class Choice:
    """Settings of a fit whose parameters are still to be chosen.

    Attributes:
        settings: As they were asked for.
        of: How to choose.
    """

    settings: FitSettings
    of: BySensitivity

    @property
    def of_stream(self) -> FitSettings:
        """Those of the pass over the data, which sees all parameters, and measures nothing of them on the way."""
        return replace(self.settings, parameters=None, structure=Diagonal())

    def made(
        self, network: Network, data: WeightedData, likelihood: Likelihood, mc_samples: int | None, seed: int
    ) -> FitSettings:  # fmt: skip
        """The settings with the parameters that are chosen, by the diagonal of the curvature.

        Args:
            network: Of all parameters.
            data: Those that choose directions, and with them parameters.
            likelihood: What the outputs mean, with targets as it takes them.
            mc_samples: Random vectors for each datum, or None.
            seed: Of these; the fit draws its own.
        """

        def diagonal() -> Tensor:
            of_data = CurvatureData(
                network, data, likelihood, mc_samples=mc_samples, curvature=self.settings.curvature,
                generator=torch.Generator().manual_seed(seed), chunk_size=self.settings.chunk_size,
            )  # fmt: skip
            statistics = Diagonal().measure(network, of_data)
            basis = Diagonal().eigenbasis(network)
            return basis.lift(statistics.curvatures(basis))

        chosen = self.of.choose(network.blocks, network.shapes, current().of_one(diagonal, network.device))
        known = replace(self.settings, mc_samples=mc_samples)
        if isinstance(chosen, Tensor):
            return replace(known, parameters=None, indices=chosen)
        return replace(known, parameters=[escape(name) for name in chosen])


def pending(settings: FitSettings, previous: Fit | None, model: Snapshot) -> tuple[FitSettings, Choice | None]:
    """The settings of the pass over the data, and the choice that is to follow it, if there is one.

    Data that are added to an earlier fit are about its parameters.
    """
    if not isinstance(settings.parameters, BySensitivity):
        return settings, None
    if settings.indices is not None:
        raise ValueError("Expected either parameters or indices, got both.")
    if previous is None:
        choice = Choice(settings, settings.parameters)
        return choice.of_stream, choice
    earlier = previous.network
    gone = [name for name in earlier.shapes if name not in model.trainable]
    if gone:
        raise ValueError(
            f"Expected a model with the parameters of the earlier fit to be trainable, got one where {gone} are not. "
            "Set requires_grad for them, or fit on all data instead."
        )
    if earlier.free is None:
        return replace(settings, parameters=[escape(name) for name in earlier.shapes]), None
    indices = indices_of(model, unflatten(earlier.free, earlier.shapes))
    return replace(settings, parameters=None, indices=indices), None
