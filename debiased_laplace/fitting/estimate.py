r"""What a fit will take, estimated from a trial with a few data, before it runs.

With the seconds :math:`t` that each step took in the trial for a datum, N data in the stream, of which n are drawn,
N' validation data, and F folds,

.. math::
    t_\text{fixed} + \underbrace{N t_\text{stream}}_{\text{reading}} + \underbrace{n (t_\text{statistics} +
    t_\text{curvatures})}_{\text{curvature}} + \underbrace{c \Big(\sum_\text{once} P^3 + (F + 1) \sum_\text{each}
    P^3\Big)}_{\text{decompositions}} + \underbrace{N' t_\text{tuning}}_{\text{tuning}},

where P are the sizes of the matrices that are decomposed (:class:`~.structures.base.Decomposed`), :math:`c P^3` is what
one matrix takes, and :math:`t_\text{fixed}` is what the trial took besides, to find the layers above all. A matrix of
few columns is decomposed faster than that, so that this is rather too large than too small.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace._guards import full_precision
from debiased_laplace.curvature.projected import curvatures_along
from debiased_laplace.curvature.structures import Structure, Window
from debiased_laplace.curvature.structures.base import Decomposed
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.fitting.memory import held_by_fit
from debiased_laplace.fitting.settings import FitSettings
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.gradients import CHUNK_MEMORY, CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.top_k import exact_outputs, top_k_moments
from debiased_laplace.sampling.sample import WeightedData

#: Seconds for which a step is repeated, and how often at most.
MEASURED_FOR, REPETITIONS = 0.05, 5

#: Size of the matrix that tells how long decompositions take, at most.
DECOMPOSED_SIZE = 512


@dataclass(frozen=True)
class Costs:
    """Seconds of the steps of a fit, per datum, as a trial had them.

    Attributes:
        forward: A forward pass.
        stream: What is done with every datum of the stream.
        statistics: Those of a datum that is drawn.
        curvatures: Curvatures along two bases.
        prediction: Moments of the outputs.
        n_vectors: Back-propagated for each datum.
        cubed: Of an eigendecomposition, over the cube of the size.
    """

    forward: float
    stream: float
    statistics: float
    curvatures: float
    prediction: float
    n_vectors: int
    cubed: float

    @classmethod
    def of(
        cls, trial: Fit, structure: Structure, likelihood: Likelihood, inputs: _data.Inputs, targets: Tensor
    ) -> Costs:  # fmt: skip
        """Measured with some data.

        Args:
            trial: A fit of the same network to a few data.
            structure: That of the fit to come.
            likelihood: That of the trial, of every site if outputs are dense.
            inputs: Some data.
            targets: Theirs, as :meth:`.Likelihood.prepare_targets` returns them.
        """
        network, n = trial.network, _data.count(inputs)
        basis, weights = trial.posterior.basis, torch.full((n,), 1 / n, dtype=torch.float64)
        weighted = WeightedData(inputs, targets.to(network.device), weights, torch.arange(n))
        data = CurvatureData(
            network, weighted, likelihood, mc_samples=trial.mc_samples, generator=torch.Generator().manual_seed(0)
        )  # fmt: skip
        (first, *_) = data
        n_vectors = len(first.vectors)
        k = exact_outputs(network, likelihood)

        def seen() -> None:
            factors = network.factors(inputs, backward=network.has_sequences)
            structure.observe(network, factors, lambda _: [Window(slice(0, n), 1)])

        def each(step: Callable[[], Any]) -> float:
            return _seconds(step, network) / n

        measured: list[Any] = []
        with torch.inference_mode(False), torch.no_grad(), full_precision():
            forward = each(lambda: network.outputs(inputs))
            statistics = each(lambda: measured.append(structure.measure(network, data)))
            exact, curvatures = measured[0].exact, 0.0
            if not exact and structure.projects:
                curvatures = each(lambda: curvatures_along(network, [basis, basis], data, [None, None]))
            return cls(
                forward,
                each(seen) if structure.observes else forward,
                statistics if structure.data_dependent or exact else 0.0,
                curvatures,
                each(lambda: top_k_moments(network, [trial.posterior], likelihood, inputs, k)),
                n_vectors,
                seconds_of_a_decomposition(network, decomposed_size(structure.decomposed(network, n * n_vectors))),
            )


@dataclass(frozen=True)
class FitEstimate:
    """What a fit will take, about.

    Attributes:
        fixed: Seconds of what does not depend on the data.
        reading: Seconds of the pass over the stream; None if its length is not known.
        curvature: Seconds of statistics and curvatures of the data drawn.
        decompositions: Seconds of eigendecompositions.
        tuning: Seconds of tuning on validation data; None if their number is not known.
        memory: Bytes besides the model and the data drawn, at most; None if that depends on the data.
    """

    fixed: float
    reading: float | None
    curvature: float
    decompositions: float
    tuning: float | None
    memory: int | None

    @classmethod
    def of(
        cls, costs: Costs, network: Network, settings: FitSettings, *, n_data: int | None, n_drawn: int,
        tuning: float | None, of_trial: tuple[Structure, int, float],
    ) -> FitEstimate:  # fmt: skip
        """From what steps cost.

        Args:
            costs: Measured in a trial.
            network: The network of the trial.
            settings: Those of the fit to come, completed.
            n_data: Data in the stream, if that is known.
            n_drawn: Of which so many are drawn.
            tuning: Seconds of tuning on all validation data, if that is known.
            of_trial: The structure of the trial, its number of data, and how many seconds the fit took.
        """
        structure, split = settings.structure, settings.split
        assert split is not None
        each = costs.statistics + costs.curvatures
        rounds = 1 if all(one.directions == split.final for one in split.rounds) else 1 + len(split.rounds)
        structure_of_trial, n_of_trial, seconds = of_trial
        in_trial = n_of_trial * each + costs.cubed * cubes(structure_of_trial.decomposed(network, n_of_trial), 1)
        memory = None
        if structure.held(network) is not None:
            chunk = min(CHUNK_MEMORY, n_drawn * network.memory_of_a_datum(costs.n_vectors))
            memory = held_by_fit(network, structure, split) + chunk
        return cls(
            max(0.0, seconds - in_trial),
            None if n_data is None else n_data * costs.stream,
            n_drawn * each,
            costs.cubed * cubes(structure.decomposed(network, n_drawn * costs.n_vectors), rounds),
            tuning,
            memory,
        )

    @property
    def seconds(self) -> float | None:
        """Of all together; None if a number of data is not known."""
        if self.reading is None or self.tuning is None:
            return None
        return self.fixed + self.reading + self.curvature + self.decompositions + self.tuning


def cubes(decomposed: Decomposed, rounds: int) -> float:
    """Cubes of the sizes of all matrices that are decomposed in so many rounds."""
    return sum(float(p) ** 3 for p in decomposed.once) + rounds * sum(float(p) ** 3 for p in decomposed.each)


def decomposed_size(decomposed: Decomposed) -> int:
    """Of the matrix that tells how long decompositions take."""
    return min(DECOMPOSED_SIZE, max([*decomposed.once, *decomposed.each], default=0))


def seconds_of_a_decomposition(network: Network, size: int) -> float:
    """Seconds of an eigendecomposition, over the cube of its size."""
    if not size:
        return 0.0
    matrix = torch.rand(size, size, generator=torch.Generator().manual_seed(0))
    symmetric = (matrix + matrix.mT).to(network.device, network.dtype)
    return _seconds(lambda: torch.linalg.eigh(symmetric), network) / size**3


def _seconds(step: Callable[[], Any], network: Network) -> float:
    """The shortest of a few repetitions, after one that warms up."""
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (len(times) <= REPETITIONS and time.perf_counter() - begin < MEASURED_FOR):
        start = time.perf_counter()
        step()
        torch.zeros((), device=network.device).item()  # waits for what an accelerator was told before
        times.append(time.perf_counter() - start)
    return min(times)
