"""The composition: draw, split, choose directions, measure curvatures along them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from tqdm import tqdm

from debiased_laplace import _checks, _data, _store
from debiased_laplace._guards import global_random_state
from debiased_laplace.curvature.structures import Kronecker, Structure
from debiased_laplace.fitting.checkpoint import Progress
from debiased_laplace.fitting.measurement import Measurement
from debiased_laplace.fitting.probe import Probe
from debiased_laplace.fitting.reading import Reading
from debiased_laplace.fitting.stream import Observed, Stream, mean_loss
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.gradients import CURVATURES, CurvatureData, Network, match_parameters
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.sampling.sample import Sample
from debiased_laplace.sampling.samplers import PrioritySampler, Sampler, UniformSampler
from debiased_laplace.sampling.splits import CrossFit, Single, Split

logger = logging.getLogger(__name__)

#: Outputs up to which the square root of the loss Hessian is exact by default.
MAX_EXACT_OUTPUTS = 32
ESTIMATORS = ("projected", "factored")

#: Data of the stream that every fit keeps besides, to compare predictions with what the network does on them.
UNIFORM_BUDGET = 64


@dataclass(frozen=True)
class Fit:
    """What a fit gives.

    Attributes:
        posterior: The posterior, with prior precision one unless another was asked for.
        network: The model with its blocks.
        mean_loss: Mean loss of the stream, per datum in nats; estimated from the data drawn if the sampler did not look
            at all of them.
        n_seen: Number of data in the stream.
        direction_indices: Positions in the stream of the data that chose the final directions.
        curvature_indices: Of those that measured curvatures for data that were not drawn.
        mc_samples: Random vectors for each datum, or None for the exact loss Hessian.
        settings: What the fit was called with, in words, and the seed.
        sample: The data drawn, to which a later fit can add; None for a fit that was loaded.
        observed: What the pass over the stream told, if the sampler made one; None for a fit that was loaded.
        curvature_errors: Standard errors of the curvatures, ``[rank]``, as the rounds of the split differ; None for
            fewer than two. They say how convexity biases what is no mean (:meth:`convexity`).
        uniform: A few data of the stream, drawn uniformly and apart from ``sample``, that stand for its ordinary data;
            None for a fit that was loaded.
        probe: What the network gives for a few made-up inputs, by which it is known again when a fit is loaded.
    """

    posterior: Posterior
    network: Network
    mean_loss: float
    n_seen: int
    direction_indices: Tensor
    curvature_indices: Tensor
    mc_samples: int | None
    settings: dict[str, Any] = field(default_factory=dict)
    sample: Sample | None = None
    observed: Observed | None = None
    uniform: Sample | None = None
    curvature_errors: Tensor | None = None
    probe: Probe | None = None

    def convexity(self, posterior: Posterior | None = None) -> tuple[float, float] | None:
        r"""What errors of the curvatures add to variances and take from the log-determinant, to second order.

        With :math:`r_i = \beta s_i / (\beta \lambda_i + \delta)`, where :math:`s_i` is the standard error of the
        curvature i, the expected variance along i is :math:`1 + r_i^2` times that of the expected curvature, and the
        expected :math:`\log\det P` lower by :math:`\frac12 \sum_i r_i^2`: unbiased curvatures give neither. It tells
        the order of magnitude, rather too small: rounds do not show what directions that the data hardly determine add.

        Args:
            posterior: The fit's posterior with other settings, such as a tuned prior precision.

        Returns:
            The relative bias of the sum of the variances along the directions, and the bias of the log-determinant in
            nats; None without errors.
        """
        if self.curvature_errors is None:
            return None
        posterior = self.posterior if posterior is None else posterior
        precisions = posterior.precisions
        squares = (posterior.scale * self.curvature_errors.double() / precisions).square()
        return float((squares / precisions).sum() / (1 / precisions).sum()), -0.5 * float(squares.sum())

    def state(self) -> dict[str, Any]:
        """Everything but the model and the data, as tensors and plain Python objects."""
        left_out = ("network", "sample", "observed", "uniform")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return _store.to_plain(own | {"network": self.network.description()})

    @classmethod
    def restore(cls, model: nn.Module | Snapshot, state: dict[str, Any]) -> Fit:
        """Inverse of :meth:`state`, on the device of the model.

        Raises:
            ValueError: If the model has other parameters, or other weights; it says which.
        """
        own = _store.from_plain(state)
        network = Network.restore(model, own.pop("network"))
        for name, value in _store.tensors_of({key: own.get(key) for key in ("posterior", "curvature_errors")}).items():
            _checks.finite(value, f"the {name} of the stored fit", "The file was changed: make it again.")
        moved = _pytree.tree_map_only(Tensor, lambda t: t.to(network.device), _store.to_plain(own.pop("posterior")))
        posterior = _store.from_plain(moved)
        if not torch.equal(posterior.mean, network.mean()):
            theirs, mine = network.from_vector(posterior.mean), network.from_vector(network.mean())
            differ = [name for name in theirs if not torch.equal(theirs[name], mine[name])]
            raise ValueError(
                f"Expected the state of a model with the same weights; these differ: {differ}, by up to "
                f"{float((posterior.mean - network.mean()).abs().max()):.3g}. Load the model's own weights first."
            )
        if own.get("probe") is not None:
            own["probe"].check(network)
        return cls(posterior=posterior, network=network, **own)

    def save(self, path: str | Path) -> None:
        """Write everything but the model and the data to one safetensors file, with a JSON header."""
        network = self.network
        header = {
            "kind": "fit",
            "settings": self.settings,
            "n_data": self.posterior.n_data,
            "shapes": {name: list(shape) for name, shape in network.shapes.items()},
            "weights": _store.fingerprint(network.snapshot.state()),
            "versions": _store.versions(),
        }
        _store.write(path, self.state(), header)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> Fit:
        """Read a fit of the same model.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no fit, or one of another model; it says what differs.
        """
        header = _store.read_header(path)
        if header.get("kind") != "fit":
            raise _store.StoredFileError(
                f"Expected a saved fit in {path}, got {header.get('kind', 'something else')}. Check the path."
            )
        _store.check_model(path, header, model)
        state, _ = _store.read(path)
        with _store.understood(path):
            return cls.restore(model, state)


def fit(
    model: nn.Module | Snapshot,
    batches: Iterable[Any],
    likelihood: Likelihood,
    *,
    structure: Structure | None = None,
    parameters: str | Sequence[str] | None = None,
    indices: Tensor | None = None,
    sampler: Sampler | None = None,
    split: Split | None = None,
    estimator: str = "projected",
    mc_samples: int | str | None = "auto",
    curvature: str = "ggn",
    n_data: int | None = None,
    prior_precision: Any = 1.0,
    separate_bias: bool = False,
    feature_reduction: str | None = None,
    generator: torch.Generator | int = 0,
    chunk_size: int | None = None,
    targets_key: str = "labels",
    progress_bar: bool = False,
    previous: Fit | None = None,
    checkpoint: str | Path | None = None,
    max_batches: int | None = None,
    **posterior: Any,
) -> Fit:
    """Fit a posterior around a trained model.

    Args:
        model: The trained model; left exactly as it was. The posterior is about what it is now, whatever becomes of it
            (:class:`~debiased_laplace.network.snapshot.Snapshot`).
        batches: Any iterable of batches; read once.
        likelihood: What the outputs mean.
        structure: Gives the directions; K-FAC by default.
        parameters: Which trainable parameters the posterior is about: all, ``"last_layer"``, or names and patterns.
        indices: Instead, single entries of the vector of all trainable parameters (not for K-FAC).
        sampler: Which data to keep of the stream; 1,024 by default, by importance (for ``"ggn"``: what a datum adds to
            another curvature does not follow from the outputs alone, and the draw is uniform).
        split: Which of them choose directions and which measure curvatures; ``CrossFit()`` by default, ``Single()`` for
            a structure whose directions do not depend on data, and with ``UniformSampler(None)``, all data, unless
            ``n_data`` says that they may be a part of the training set.
        estimator: ``"projected"``, equation (2), or ``"factored"``, from the structure's own statistics of the second
            data (classical K-FAC; the same thing for the other structures).
        mc_samples: Random vectors for each datum; ``None`` for the exact loss Hessian; ``"auto"`` is exact
            up to 32 outputs and one vector above.
        curvature: ``"ggn"``, or ``"empirical_fisher"``.
        n_data: Size of the training set, if the stream is not it; the number of data seen by default. Of a larger one
            the stream is taken for a random part, all of whose data stand for others too. With ``previous``, of the
            training set that is added.
        prior_precision: One number, one for each part of the basis, or one for each parameter.
        separate_bias: Give biases blocks of their own.
        feature_reduction: Of a last layer, :meth:`~debiased_laplace.network.gradients.Network.reduced`.
        generator: A CPU generator or a seed, source of all randomness.
        chunk_size: Data at a time; bounded by memory by default.
        targets_key: Where dictionary-like batches have their targets.
        progress_bar: Show tqdm bars.
        previous: An earlier fit of the same model to add these data to; everything is measured again on the data
            drawn in both.
        checkpoint: File that keeps the state of the fit while it runs. An interrupted fit goes on from there when
            it is called again with the same arguments and the same data, with the same result. What is complete is
            taken from the file, after the data have been read again and compared, without the network; a pass that
            was interrupted goes on after the batches that it had seen. The global generators that a loader may
            shuffle by are seeded for that, and given back afterwards.
        max_batches: End the pass over the data after so many, of a stream without an end.
        **posterior: Further fields of :class:`~debiased_laplace.posterior.gaussian.Posterior`.

    Returns:
        The posterior and what is worth knowing about how it came about.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"Expected an estimator out of {list(ESTIMATORS)}, got {estimator!r}.")
    structure = structure if structure is not None else Kronecker()
    if sampler is None:
        sampler = default_sampler(1024, structure, curvature)
    if split is None:  # with all data there is nothing to overstate, unless they are a part of the training set
        in_one = previous is not None and previous.sample is not None and previous.sample.n_folds == 1
        part = sampler != UniformSampler(None) or (n_data is not None and not in_one)
        split = CrossFit() if structure.data_dependent and part else Single()
    generator, model = make_generator(generator), Snapshot.of(model)
    _checks.chunk_size(chunk_size)
    if curvature not in CURVATURES:
        raise ValueError(f"Expected a curvature out of {list(CURVATURES)}, got {curvature!r}.")
    _checks.whole(mc_samples, "mc_samples", otherwise="None (exact) or 'auto'")
    _checks.whole(n_data, "n_data", otherwise="None for those that are seen")
    n_data = None if n_data is None else int(n_data)
    _checks.whole(max_batches, "max_batches", otherwise="None for all")
    _checks.prior_precisions(prior_precision)
    if parameters is not None and parameters != "last_layer":
        match_parameters(model, parameters)
    for name in ("temperature", "noise_variance"):
        _checks.positive(posterior.get(name, 1.0), name.replace("_", " "))
    if "prior_mean" in posterior:
        _checks.finite(torch.as_tensor(posterior["prior_mean"]), "the prior mean", "Give other numbers.")
    if previous is not None:
        _check_previous(previous, split.folds)
    settings = {
        "structure": repr(structure), "parameters": repr(parameters), "sampler": repr(sampler), "split": repr(split),
        "indices": None if indices is None else indices.tolist(),
        "estimator": estimator, "mc_samples": repr(mc_samples), "curvature": curvature,
        "likelihood": type(likelihood).__name__, "separate_bias": separate_bias, "seed": generator.initial_seed(),
        "chunk_size": repr(chunk_size), "adds_to": None if previous is None else previous.n_seen,
    }  # fmt: skip
    if feature_reduction is not None:
        settings["feature_reduction"] = feature_reduction
    kept: dict[str, Any] = {}
    if checkpoint is not None:
        fields_ = {"n_data": n_data, "prior_precision": prior_precision, **posterior}
        kept = {**settings, "posterior": {name: _in_words(value) for name, value in fields_.items()}}
        kept["weights"] = _store.fingerprint(model.state())
        kept["likelihood_settings"] = {name: _in_words(value) for name, value in vars(likelihood).items()}
        kept["targets_key"], kept["generator"] = targets_key, _in_words(generator.get_state())
        if previous is not None:
            drawn_before = {"directions": previous.direction_indices, "curvatures": previous.curvature_indices}
            kept["previous"] = _store.fingerprint(drawn_before)
    progress = Progress(checkpoint, kept)

    def discover(inputs: _data.Inputs) -> Network:
        return Network.discover(
            model, inputs, parameters=parameters, indices=indices, separate_bias=separate_bias,
            feature_reduction=feature_reduction,
        )  # fmt: skip

    with torch.inference_mode(False), global_random_state():
        if not isinstance(batches, Iterable):
            next(_data.labelled(batches))  # raises what is wrong
        stream = Stream(discover, likelihood, structure, chunk_size)
        # Not the numbers that the sampler draws, which leave the data of the fit and of another stream independent.
        seed = (generator.initial_seed() + 0x5EED + (0 if previous is None else previous.n_seen)) % 2**63
        reading = Reading(
            batches, progress, generator, stream, budget=UNIFORM_BUDGET, seed=seed, targets_key=targets_key,
            max_batches=max_batches,
        )  # fmt: skip
        if progress.completed is not None:
            reading.check(progress.completed["seen"])
            logger.warning("The fit is the complete one in %s, which was made from the same data.", checkpoint)
            return Fit.restore(model, progress.completed["fit"])

        def draw() -> dict[str, Any]:
            try:
                drawn = sampler.draw(
                    reading, split.folds, generator, likelihood=likelihood, observe=stream, targets_key=targets_key,
                    progress_bar=progress_bar,
                )  # fmt: skip
            except BaseException:
                reading.save()
                raise
            drawn = drawn.part_of(n_data, generator)
            sample, observed, uniform = drawn, stream.observed, reading.sample
            if previous is not None:
                now = discover(drawn.data.inputs)
                same = previous.network.shapes == now.shapes and torch.equal(previous.posterior.mean, now.mean())
                sample, observed = _added(previous, drawn, observed, same)
                known = previous.uniform is not None and uniform is not None  # half of the data are not all of them
                uniform = previous.uniform + uniform if known else None  # type: ignore[operator]
            return {
                "sample": sample, "observed": observed, "uniform": uniform, "generator": generator.get_state(),
                "seen": reading.seen,
            }  # fmt: skip

        was_drawn = progress.kept("drawn") is not None
        kept_draw = progress.once("drawn", draw)
        if was_drawn:
            reading.check(kept_draw["seen"])
            logger.warning("The fit goes on with the data that were drawn earlier, from the same, in %s.", checkpoint)
        sample, observed = kept_draw["sample"], kept_draw["observed"]
        uniform = kept_draw["uniform"]
        generator.set_state(kept_draw["generator"])
        network = discover(sample.data.inputs)
        if parameters == "last_layer":
            logger.info("The last layer: %s.", ", ".join(network.shapes))
        _warn_of_unreached(network, sample.data.inputs)
        sample = _with_targets(sample, likelihood, network)
        uniform = None if uniform is None else _with_targets(uniform, likelihood, network)
        mc_samples = _resolve_mc_samples(mc_samples, network.n_outputs)
        with tqdm(desc="Curvature", unit="datum", disable=not progress_bar, leave=False) as bar:
            data = CurvatureData(
                network, sample.data, likelihood, mc_samples=mc_samples, curvature=curvature, generator=generator,
                chunk_size=chunk_size, progress=bar.update,
            )  # fmt: skip
            measurement = Measurement(structure, network, data, sample, observed, progress)
            basis, curvatures = measurement.cross(split, factored=estimator == "factored")
            left_out = measurement.left_out(split, basis, curvatures)
        loss = mean_loss(network, likelihood, sample) if observed is None else observed.mean_loss
    measured = sorted({fold for own in split.rounds for fold in own.curvatures})
    precision = _checks.prior_precisions(prior_precision, len(basis.parts), basis.n_params).to(network.device)
    fitted = Fit(
        Posterior(network.mean(), basis, curvatures, sample.size, precision,
                  fixed=None if network.free is None else ~network.free, left_out=left_out, **posterior),
        network, loss, sample.n_seen, sample.fold(split.final).indices, sample.fold(measured).indices, mc_samples,
        settings, sample, observed, uniform, measurement.errors, Probe.of(network, sample.data.inputs),
    )  # fmt: skip
    if checkpoint is not None:
        progress.complete({"fit": fitted.state(), "seen": kept_draw["seen"]})
    return fitted


def _warn_of_unreached(network: Network, inputs: _data.Inputs) -> None:
    """Tell the caller of a fit which outputs will have no variance, and why."""
    outputs, others, constant = network.unreached(inputs)

    def some(names: Sequence[Any]) -> str:
        return ", ".join(map(str, names[:10])) + (", ..." if len(names) > 10 else "")

    for silent, why in (
        (outputs, f"those that do are left out of it, in whole or in part: {some(others)}. Add them for a variance"),
        (constant, "no other does either: they are constant, detached or computed without gradients"),
    ):
        if silent:
            warnings.warn(
                f"The variance of {len(silent)} of {network.n_outputs} outputs is zero: {some(silent)}. No parameter "
                f"that the posterior is about acts on them, and {why}.", stacklevel=3,
            )  # fmt: skip


def _with_targets(sample: Sample, likelihood: Likelihood, network: Network) -> Sample:
    """The sample with targets as the likelihood takes them; raises what is wrong with them."""
    targets = likelihood.prepare_targets(sample.data.targets, network.n_outputs)
    return replace(sample, data=replace(sample.data, targets=targets))


def _check_previous(previous: Fit, n_folds: int) -> None:
    """What can be known before the data are read."""
    if previous.sample is None:
        raise ValueError(
            "Expected an earlier fit that still has its data, to add to them; a fit that was loaded has none. "
            "Fit on all data instead."
        )
    if previous.sample.n_folds != n_folds:
        raise ValueError(
            f"Expected the split of the earlier fit, with {previous.sample.n_folds} folds, got one with {n_folds}."
        )


def _added(previous: Fit, drawn: Sample, observed: Observed | None, same_model: bool) -> tuple[Sample, Observed | None]:
    """The data of both fits, each stream weighted by its size."""
    assert previous.sample is not None
    known = previous.observed if same_model else None  # sums over earlier data were made with the earlier parameters
    both = None if known is None or observed is None else known + observed
    return previous.sample + drawn, both


def default_sampler(budget: int | None, structure: Structure, curvature: str) -> Sampler:
    """By importance where the outputs tell it: what a datum adds to the GGN is small if its loss Hessian is."""
    if budget is None or curvature != "ggn" or not structure.projects:
        return UniformSampler(budget)
    return PrioritySampler(budget)


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


def _in_words(value: Any) -> str:
    """A number or a tensor, for the settings of a checkpoint."""
    return _store.fingerprint({"": value})[""] if isinstance(value, Tensor) else repr(value)


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
    assert not isinstance(mc_samples, str)
    return mc_samples
