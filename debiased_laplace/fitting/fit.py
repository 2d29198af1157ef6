"""The composition: draw, split, choose directions, measure curvatures along them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from debiased_laplace import _checks, _data
from debiased_laplace._guards import full_precision, global_random_state, warn_the_caller
from debiased_laplace._ranks import current, together
from debiased_laplace.curvature.structures import Structure
from debiased_laplace.fitting.checkpoint import Checkpoint
from debiased_laplace.fitting.choice import pending
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.fitting.measurement import Measurement
from debiased_laplace.fitting.probe import Probe
from debiased_laplace.fitting.reading import Reading, Seen
from debiased_laplace.fitting.settings import FitSettings
from debiased_laplace.fitting.stream import LikelihoodOfStream, Observed, Plan, Stream, mean_loss
from debiased_laplace.fitting.update import updated_curvature
from debiased_laplace.likelihoods import Likelihood, of_outputs
from debiased_laplace.network.discovery import unreached
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.kinds import NO_CURVATURE
from debiased_laplace.network.network import Network
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.sampling.sample import Sample

logger = logging.getLogger(__name__)

#: Outputs up to which the square root of the loss Hessian is exact by default.
MAX_EXACT_OUTPUTS = 32

#: Share of the parameters with a diagonal curvature in a Kronecker-factored structure above which a fit warns.
MAX_DIAGONAL = 0.1

#: Data of the stream that every fit keeps besides, to compare predictions with what the network does on them.
UNIFORM_BUDGET = 64


@dataclass(frozen=True)
class Drawn:
    """What one pass over the stream leaves.

    Attributes:
        sample: The data drawn, in their folds, with those of an earlier fit.
        observed: What the sampler's forward pass told, if it made one.
        uniform: A few data, drawn uniformly and apart.
        network: Description of the network that was found on the way.
        generator: State of the generator after the draw.
        seen: What the stream had in it, if there is a checkpoint.
    """

    sample: Sample
    observed: Observed | None
    uniform: Sample | None
    network: dict[str, Any]
    generator: Tensor
    seen: Seen


def fit(
    model: nn.Module | Snapshot,
    batches: Iterable[Any],
    likelihood: Likelihood,
    *,
    generator: torch.Generator | int = 0,
    previous: Fit | None = None,
    checkpoint: str | Path | None = None,
    progress_bar: bool = False,
    **settings: Any,
) -> Fit:
    """Fit a posterior around a trained model.

    Args:
        model: The trained model; left exactly as it was. The posterior is about what it is now, whatever becomes of it
            (:class:`~debiased_laplace.network.snapshot.Snapshot`).
        batches: Any iterable of batches; read once.
        likelihood: What the outputs mean.
        generator: A CPU generator or a seed, source of all randomness.
        previous: An earlier fit of the same model to add these data to; everything is measured again on the data
            drawn in both. To one that was loaded, without its data, their curvature is added
            (:mod:`debiased_laplace.fitting.update`).
        checkpoint: File that keeps the state of the fit while it runs. An interrupted fit goes on from there when
            it is called again with the same arguments and the same data, with the same result. What is complete is
            taken from the file, after the data have been read again and compared, without the network; a pass that
            was interrupted goes on after the batches that it had seen. The global generators that a loader may
            shuffle by are seeded for that, and given back afterwards.
        progress_bar: Show tqdm bars.
        **settings: Fields of :class:`~debiased_laplace.fitting.settings.FitSettings`.

    Returns:
        The posterior and what is worth knowing about how it came about.

    Raises:
        ValueError: If an argument has no meaning, the stream is empty, or targets do not fit.
        UnsupportedLayerError: If a trainable parameter is not covered; it names it and the remedy.
        NonFiniteError: If outputs or gradients are not finite; it names the layer.
    """
    chosen = FitSettings(**settings).completed(previous)
    generator, snapshot = make_generator(generator), Snapshot.of(model)
    chosen.check_parameters(snapshot)
    words = chosen.in_words(likelihood, generator.initial_seed(), previous)
    if previous is not None and previous.network.sites is not None:
        likelihood = of_outputs(likelihood, previous.network.sites)  # where sites are need not be found again
    with (
        together("fit", wanted=chosen.distributed) as ranks,
        torch.inference_mode(False), global_random_state(), full_precision(),
    ):  # fmt: skip
        identity = {}
        if checkpoint is not None or ranks.size > 1:
            identity = chosen.identity(likelihood, generator, previous, snapshot)
            words_of = {key: str(value) for key, value in identity.items() if key != "weights"}
            weights = {f"weights of {name}": str(value) for name, value in identity["weights"].items()}
            ranks.agree("fit", words_of | weights | {"checkpoint": "some" if checkpoint else "none"})
        progress = Checkpoint(checkpoint, identity)
        chosen, choice = pending(chosen, previous, snapshot)
        discover = partial(chosen.discover, snapshot, likelihood=likelihood)
        budget = getattr(chosen.sampler, "budget", None)  # of the sampler's own making, it may have none
        plan = Plan(seed=generator.initial_seed()) if budget is None else Plan(budget, generator.initial_seed())
        stream = Stream(discover, likelihood, chosen.structure, chosen.chunk_size, plan)
        reading = _reading(batches, progress, generator, stream, chosen, previous)
        if progress.completed is not None:
            reading.check(progress.completed["seen"])
            logger.warning("The fit is the complete one in %s, which was made from the same data.", checkpoint)
            return Fit.restore(snapshot, progress.completed["fit"], chosen.outputs_of)
        is_kept = progress.kept("drawn") is not None
        draw = partial(_draw, reading, stream, generator, chosen, previous, progress_bar)
        drawn = progress.once("drawn", draw)
        if is_kept:
            reading.check(drawn.seen)
            logger.warning("The fit goes on with the data that were drawn earlier, from the same, in %s.", checkpoint)
            generator.set_state(drawn.generator)
        data = drawn.sample.data
        if is_kept:
            network = chosen.within_budget(Network.restore(snapshot, drawn.network, chosen.outputs_of))
        else:
            network = stream.network(data.inputs, data.targets)
        of_network = of_outputs(likelihood, network.sites)
        if choice is not None:
            assert chosen.split is not None
            of_choice = _with_targets(drawn.sample, of_network, network).fold(chosen.split.final)
            mc_samples = _resolve_mc_samples(chosen.mc_samples, network)
            chosen = choice.made(network, of_choice, of_network, mc_samples, generator.initial_seed())
            network = chosen.discover(snapshot, data.inputs, data.targets, likelihood)
        fitted = _measured(network, drawn, of_network, generator, chosen, previous, progress, words, progress_bar)
        if checkpoint is not None:
            progress.complete({"fit": fitted.state(), "seen": drawn.seen})
    return fitted


def _reading(
    batches: Iterable[Any], progress: Checkpoint, generator: torch.Generator, stream: Stream, settings: FitSettings,
    previous: Fit | None,
) -> Reading:  # fmt: skip
    # Not the numbers that the sampler draws, which leave the data of the fit and of another stream independent.
    seed = (generator.initial_seed() + 0x5EED + (0 if previous is None else previous.n_seen)) % 2**63
    return Reading(
        batches, progress, generator, stream, budget=UNIFORM_BUDGET, seed=seed, targets_key=settings.targets_key,
        max_batches=settings.max_batches,
    )  # fmt: skip


def _draw(
    reading: Reading, stream: Stream, generator: torch.Generator, settings: FitSettings, previous: Fit | None,
    progress_bar: bool,
) -> Drawn:  # fmt: skip
    """One pass over the stream."""
    assert settings.sampler is not None and settings.split is not None
    try:
        sample = settings.sampler.draw(
            reading, settings.split.folds, generator, observe=stream,
            likelihood=cast(Likelihood, LikelihoodOfStream(stream)), targets_key=settings.targets_key,
            progress_bar=progress_bar,
        )  # fmt: skip
    except BaseException:
        reading.save()
        raise
    if not reading.is_merged:
        raise ValueError(
            f"Expected a sampler that draws from the data of all processes, got {settings.sampler!r}, which drew from "
            "those of one. Use PrioritySampler or UniformSampler, or fit in one process with distributed=False."
        )
    sample = sample.part_of(settings.n_data, generator)
    network, observed, uniform = (
        stream.network(sample.data.inputs, sample.data.targets),
        stream.observed,
        reading.sample,
    )
    if previous is not None and previous.sample is not None:
        # Sums over earlier data were made with the earlier parameters.
        same = previous.network.shapes == network.shapes and torch.equal(previous.posterior.mean, network.mean())
        known = same and observed is not None and previous.observed is not None
        observed = previous.observed + observed if known else None  # type: ignore[operator]
        sample = previous.sample + sample
        both = previous.uniform is not None and uniform is not None  # half of the data are not all of them
        uniform = previous.uniform + uniform if both else None  # type: ignore[operator]
    return Drawn(sample, observed, uniform, network.description(), generator.get_state(), reading.seen)


def _measured(
    network: Network, drawn: Drawn, likelihood: Likelihood, generator: torch.Generator, settings: FitSettings,
    previous: Fit | None, progress: Checkpoint, words: dict[str, Any], progress_bar: bool,
) -> Fit:  # fmt: skip
    """Directions from some folds, curvatures along them from others."""
    split, observed = settings.split, drawn.observed
    assert split is not None
    if settings.parameters == "last_layer":
        logger.info("The last layer: %s.", ", ".join(network.shapes))
    _warn_of_unreached(network, drawn.sample.data.inputs)
    _tell_of_coverage(network, settings.structure)
    sample = _with_targets(drawn.sample, likelihood, network)
    uniform = None if drawn.uniform is None else _with_targets(drawn.uniform, likelihood, network)
    n_observed = None if network.sites is None else _mean_observed(sample, likelihood, network)
    mc_samples = _resolve_mc_samples(settings.mc_samples, network)
    with tqdm(desc="Curvature", unit="datum", disable=not progress_bar, leave=False) as bar:
        data = CurvatureData(
            network, sample.data, likelihood, mc_samples=mc_samples, curvature=settings.curvature, generator=generator,
            chunk_size=settings.chunk_size, progress=bar.update,
        )  # fmt: skip
        factored = settings.estimator == "factored"
        if previous is not None and previous.sample is None:
            basis, curvatures = current().of_one(
                partial(
                    updated_curvature, previous, network, settings.structure, data, sample.size,
                    None if observed is None else observed.statistics, factored=factored,
                ), network.device,
            )  # fmt: skip
            left_out = errors = None
        else:
            measurement = Measurement(settings.structure, network, data, sample, observed, progress)
            basis, curvatures = measurement.cross(split, factored=factored)
            left_out, errors = measurement.left_out(split, basis, curvatures), measurement.errors
    # What every process has computed by itself is that of the first one: others may round otherwise.
    curvatures = current().broadcast(curvatures, 0)
    left_out, errors = (None if one is None else current().broadcast(one, 0) for one in (left_out, errors))
    loss = current().broadcast(_loss(network, likelihood, sample, observed), 0)
    priors = _checks.prior_precisions(settings.prior_precision, len(basis.parts), basis.n_params).to(network.device)
    posterior = Posterior(
        network.mean(), basis, curvatures, sample.size, priors, settings.temperature, settings.noise_variance,
        settings.prior_mean, fixed=None if network.free is None else ~network.free, left_out=left_out,
    )  # fmt: skip
    measured_folds = sorted({fold for one in split.rounds for fold in one.curvatures})
    fitted = Fit(
        posterior=posterior,
        network=network,
        mean_loss=float(loss),
        n_seen=sample.n_seen,
        direction_indices=sample.fold(split.final).indices,
        curvature_indices=sample.fold(measured_folds).indices,
        mc_samples=mc_samples,
        settings=words,
        sample=sample,
        observed=observed,
        uniform=uniform,
        curvature_errors=errors,
        probe=Probe.of(network, sample.data.inputs),
        n_observed=n_observed,
    )
    return fitted if previous is None or previous.sample is not None else _joined(previous, fitted)


def _loss(network: Network, likelihood: Likelihood, sample: Sample, observed: Observed | None) -> Tensor:
    """Mean loss of the stream, ``[]``."""
    loss = mean_loss(network, likelihood, sample) if observed is None else observed.mean_loss
    return torch.tensor(loss, dtype=torch.float64)


def _joined(previous: Fit, fitted: Fit) -> Fit:
    """A fit of more data with what is known of one that was loaded, whose data are not there."""
    n_earlier, n_added = previous.posterior.n_data, fitted.posterior.n_data
    loss = (n_earlier * previous.mean_loss + n_added * fitted.mean_loss) / (n_earlier + n_added)
    indices = torch.cat([previous.curvature_indices, fitted.curvature_indices + previous.n_seen])
    return replace(
        fitted, posterior=replace(fitted.posterior, n_data=n_earlier + n_added), mean_loss=loss,
        n_seen=previous.n_seen + fitted.n_seen, direction_indices=previous.direction_indices,
        curvature_indices=indices, sample=None, observed=None, uniform=None,
    )  # fmt: skip


def _tell_of_coverage(network: Network, structure: Structure) -> None:
    """Tell which parameters have no curvature, and warn the caller of a fit if many have a diagonal one."""
    unused = [name for block in network.blocks if block.kind == NO_CURVATURE for name in block.parameters]
    if unused:
        logger.warning(
            "%d parameters take no part in the forward pass and keep their prior: %s. Freeze them with "
            "requires_grad_(False) to leave them out of the posterior.", len(unused), ", ".join(unused[:10])
        )  # fmt: skip
    diagonal = structure.unfactored(network)
    share = sum(network.shapes[name].numel() for name in diagonal) / network.n_params
    if share > MAX_DIAGONAL:
        warn_the_caller(
            f"{100 * share:.0f} % of the parameters have a diagonal curvature, since they are used in several ways or "
            f"in one that no layer rule knows: {', '.join(diagonal[:10])}{', ...' if len(diagonal) > 10 else ''}. "
            "Predictions are rather too uncertain along them. coverage() has what every parameter got; freeze those, "
            "or choose others with parameters=."
        )  # fmt: skip


def _warn_of_unreached(network: Network, inputs: _data.Inputs) -> None:
    """Tell the caller of a fit which outputs will have no variance, and why."""
    outputs, others, constant = unreached(network, inputs)

    def some(names: Sequence[Any]) -> str:
        return ", ".join(map(str, names[:10])) + (", ..." if len(names) > 10 else "")

    for silent, why in (
        (outputs, f"those that do are left out of it, in whole or in part: {some(others)}. Add them for a variance"),
        (constant, "no other does either: they are constant, detached or computed without gradients"),
    ):
        if silent:
            warn_the_caller(
                f"The variance of {len(silent)} of {network.n_outputs} outputs is zero: {some(silent)}. No parameter "
                f"that the posterior is about acts on them, and {why}."
            )  # fmt: skip


def _with_targets(sample: Sample, likelihood: Likelihood, network: Network) -> Sample:
    """The sample with targets as the likelihood takes them; raises what is wrong with them."""
    targets = _data.map_tensors(
        lambda part: likelihood.prepare_targets(part, network.n_outputs), sample.data.targets
    )  # fmt: skip
    return replace(sample, data=replace(sample.data, targets=targets))


def _mean_observed(sample: Sample, likelihood: Likelihood, network: Network) -> float:
    """How many outputs of a datum have a target, on average; raises a ``ValueError`` if none has."""
    total = 0.0
    for part in _data.chunks(sample.data.targets, len(sample.data)):
        counts = likelihood.n_observed(_data.take(sample.data.targets, part), network.n_outputs)
        total += float(sample.data.weights[part] @ counts.double().cpu())
    if not total > 0:
        raise ValueError(
            f"Expected at least one site with a target in the {len(sample.data)} data that were drawn for the "
            f"curvature, got none: all are left out by {likelihood}. Look at the labels that the loader gives."
        )
    return total


def make_generator(generator: torch.Generator | int) -> torch.Generator:
    """A CPU generator from a seed; a generator is returned as it is."""
    if isinstance(generator, torch.Generator):
        if generator.device.type != "cpu":
            raise ValueError(
                f"Expected a generator on the CPU, got one on {generator.device}: draws are the same everywhere."
            )
        return generator
    _checks.seed(generator, "generator")
    return torch.Generator().manual_seed(int(generator))


def _resolve_mc_samples(mc_samples: int | str | None, network: Network) -> int | None:
    if mc_samples != "auto":
        assert not isinstance(mc_samples, str)
        return mc_samples
    n_outputs = network.row_size
    if n_outputs <= MAX_EXACT_OUTPUTS:
        logger.info("The model has %d outputs: the loss Hessian is exact.", n_outputs)
        return None
    if network.sites is not None:
        logger.info(
            "The model has %d outputs at each of %d sites of a datum: one vector with random signs at every site "
            "stands for the loss Hessian.", network.n_outputs, n_outputs // network.n_outputs,
        )  # fmt: skip
        return 1
    logger.warning(
        "The model has %d outputs, more than %d: one random vector for each datum stands for the loss Hessian. "
        "Set mc_samples=None for the exact one, or a larger number.", n_outputs, MAX_EXACT_OUTPUTS,
    )  # fmt: skip
    return 1
