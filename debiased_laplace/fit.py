"""The composition: draw, split, choose directions, measure curvatures along them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from debiased_laplace import _checks, _data
from debiased_laplace._guards import global_random_state
from debiased_laplace.curvatures import factored_curvatures, projected_curvatures
from debiased_laplace.gradients import CurvatureData, Network
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.posterior import Posterior
from debiased_laplace.sampling import Sampler, UniformSampler, WeightedData
from debiased_laplace.splits import Split, TwoBatch
from debiased_laplace.structures import Kronecker

logger = logging.getLogger(__name__)

#: Outputs up to which the square root of the loss Hessian is exact by default.
MAX_EXACT_OUTPUTS = 32
ESTIMATORS = ("projected", "factored")


@dataclass(frozen=True)
class Fit:
    """What a fit gives.

    Attributes:
        posterior: The posterior, with prior precision one unless another was asked for.
        network: The model with its blocks.
        mean_loss: Mean loss of the data drawn, per datum in nats; of all data if all were drawn.
        n_seen: Number of data in the stream.
        direction_indices: Positions in the stream of the data that chose the directions.
        curvature_indices: Of those that measured the curvatures.
        mc_samples: Random vectors for each datum, or None for the exact loss Hessian.
    """

    posterior: Posterior
    network: Network
    mean_loss: float
    n_seen: int
    direction_indices: Tensor
    curvature_indices: Tensor
    mc_samples: int | None


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    likelihood: Likelihood,
    *,
    structure: Kronecker | None = None,
    sampler: Sampler | None = None,
    split: Split | None = None,
    estimator: str = "projected",
    mc_samples: int | str | None = "auto",
    n_data: int | None = None,
    prior_precision: Any = 1.0,
    separate_bias: bool = False,
    generator: torch.Generator | int = 0,
    chunk_size: int | None = None,
    targets_key: str = "labels",
    progress_bar: bool = False,
    **posterior: Any,
) -> Fit:
    """Fit a posterior around a trained model.

    Args:
        model: The trained model; left exactly as it was.
        batches: Any iterable of batches; read once.
        likelihood: What the outputs mean.
        structure: Gives the directions; K-FAC by default.
        sampler: Which data to keep of the stream; 1,024 uniform ones by default.
        split: Which of them choose directions and which measure curvatures; ``TwoBatch()`` by default.
        estimator: ``"projected"``, equation (2), or ``"factored"``, classical K-FAC.
        mc_samples: Random vectors for each datum; ``None`` for the exact loss Hessian; ``"auto"`` is exact
            up to 32 outputs and one vector above.
        n_data: Size of the training set, if the stream is not it; the number of data seen by default.
        prior_precision: One number, or one for each block.
        separate_bias: Give biases blocks of their own.
        generator: A CPU generator or a seed, source of all randomness.
        chunk_size: Data at a time; bounded by memory by default.
        targets_key: Where dictionary-like batches have their targets.
        progress_bar: Show tqdm bars.
        **posterior: Further fields of :class:`~debiased_laplace.posterior.Posterior`.

    Returns:
        The posterior and what is worth knowing about how it came about.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"Expected an estimator out of {list(ESTIMATORS)}, got {estimator!r}.")
    structure = structure or Kronecker()
    sampler = sampler if sampler is not None else UniformSampler()
    split = split if split is not None else TwoBatch()
    generator = make_generator(generator)
    with torch.inference_mode(False), global_random_state():
        folds, n_seen = sampler.draw(
            batches, split.folds, generator, likelihood=likelihood, targets_key=targets_key, progress_bar=progress_bar
        )
        directions, measured = split(folds)
        network = Network.discover(model, directions.inputs, separate_bias=separate_bias)
        likelihood.check_targets(torch.cat([fold.targets for fold in folds]), network.n_outputs)
        mc_samples = _resolve_mc_samples(mc_samples, network.n_outputs)

        with tqdm(desc="Curvature", unit="datum", disable=not progress_bar, leave=False) as bar:

            def gradients(data: WeightedData) -> CurvatureData:
                return CurvatureData(
                    network, data, likelihood, mc_samples=mc_samples, generator=generator, chunk_size=chunk_size,
                    progress=bar.update,
                )  # fmt: skip

            first = gradients(directions)
            second = first if measured is directions else gradients(measured)
            statistics = structure.measure(network, first)
            basis = structure.eigenbasis(network, statistics)
            if estimator == "projected":
                curvatures = projected_curvatures(network, basis, second)
            else:
                curvatures = factored_curvatures(
                    basis, statistics if second is first else structure.measure(network, second)
                )
        mean_loss = _mean_loss(network, likelihood, folds)
    precision = _checks.prior_precisions(prior_precision, len(network.blocks)).to(network.device)
    return Fit(
        Posterior(network.mean(), basis, curvatures, n_seen if n_data is None else n_data, precision, **posterior),
        network, mean_loss, n_seen, directions.indices, measured.indices, mc_samples,
    )  # fmt: skip


def make_generator(generator: torch.Generator | int) -> torch.Generator:
    """A CPU generator from a seed; a generator is returned as it is."""
    if isinstance(generator, torch.Generator):
        if generator.device.type != "cpu":
            raise ValueError(
                f"Expected a generator on the CPU, got one on {generator.device}: draws are the same everywhere."
            )
        return generator
    return torch.Generator().manual_seed(generator)


def _resolve_mc_samples(mc_samples: int | str | None, n_outputs: int) -> int | None:
    if mc_samples == "auto":
        mc_samples = None if n_outputs <= MAX_EXACT_OUTPUTS else 1
        if mc_samples == 1:
            logger.warning(
                "The model has %d outputs, more than %d: one random vector for each datum stands for the loss Hessian. "
                "Set mc_samples=None for the exact one, or a larger number.", n_outputs, MAX_EXACT_OUTPUTS,
            )  # fmt: skip
        else:
            logger.info("The model has %d outputs: the loss Hessian is exact.", n_outputs)
    if mc_samples is not None and (not isinstance(mc_samples, int) or mc_samples < 1):
        raise ValueError(f"Expected mc_samples to be a positive number, None (exact) or 'auto', got {mc_samples!r}.")
    return mc_samples


def _mean_loss(network: Network, likelihood: Likelihood, folds: list[WeightedData]) -> float:
    data = WeightedData.union(folds)
    total = torch.zeros((), dtype=torch.float64, device=network.device)
    for part in _data.slices(len(data), 512):
        outputs = network.outputs(_data.take(data.inputs, part))
        losses = likelihood.loss(outputs.to(network.dtype), data.targets[part].to(network.device))
        total += data.weights[part].to(network.device) @ losses.double()
    return float(total)
