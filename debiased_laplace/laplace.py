"""A Laplace posterior from its fit to its predictions, as one immutable object: fit, tune, predict, save, load.

The front door: longer than other modules, since what users call is documented here, with all arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _checks, _data, _store
from debiased_laplace._guards import full_precision, global_random_state, warn_the_caller
from debiased_laplace._ranks import together
from debiased_laplace.curvature.structures import Structure
from debiased_laplace.fitting.coverage import coverage
from debiased_laplace.fitting.fit import fit as fit_posterior
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.fitting.settings import brief
from debiased_laplace.likelihoods import LIKELIHOODS, Likelihood, of_outputs, resolve_likelihood
from debiased_laplace.network.network import Network
from debiased_laplace.network.selection import BySensitivity
from debiased_laplace.posterior.certainty import Certainty, certainty_on
from debiased_laplace.posterior.dense import predict_sites
from debiased_laplace.posterior.evidence import maximise_marginal_likelihood, maximise_with_noise
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.prediction import Predictive, predict
from debiased_laplace.posterior.sensitivity import Sensitivity, sensitivities
from debiased_laplace.posterior.temperature import warn_of_no_evidence
from debiased_laplace.posterior.tune import Tuned, agree, tune
from debiased_laplace.sampling.samplers import Sampler
from debiased_laplace.sampling.splits import Split

#: Prior precisions that :meth:`Laplace.tune` looks at by default.
GRID = torch.logspace(-4, 4, 100, dtype=torch.float64)


def fit(
    model: nn.Module,
    train_loader: Iterable[Any],
    likelihood: str | Likelihood,
    *,
    structure: Structure | None = None,
    parameters: str | Sequence[str] | BySensitivity | None = None,
    sampler: Sampler | None = None,
    split: Split | None = None,
    n_data: int | None = None,
    prior_precision: float | Tensor = 1.0,
    prior_mean: float | Tensor = 0.0,
    noise_variance: float | Tensor = 1.0,
    temperature: float = 1.0,
    curvature: str = "ggn",
    estimator: str = "projected",
    mc_samples: int | str | None = "auto",
    separate_bias: bool = False,
    targets_key: str = "labels",
    inputs_of: Callable[[Any], Any] | None = None,
    targets_of: Callable[[Any], Any] | None = None,
    outputs_of: Callable[[Any], Any] | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    max_batches: int | None = None,
    distributed: bool = True,
    seed: int = 0,
    previous: Laplace | None = None,
    checkpoint: str | Path | None = None,
    progress_bar: bool = False,
) -> Laplace:
    """Fit a Laplace posterior around a trained model, in one pass over its training data.

    Args:
        model: The trained model, whose outputs are ``[N, C]``, or dense, ``[N, C, ...]`` or ``[N, ..., C]``; left
            exactly as it was.
        train_loader: Any iterable of batches ``(inputs, targets)``, ``(input, ..., input, targets)`` or dictionaries,
            read once. Several inputs become positional arguments and entries of a dictionary keywords of the model's
            ``forward``, if it takes them, and are one argument otherwise (``docs/batches.md``).
        likelihood: What the outputs mean: ``"classification"``, ``"regression"``, ``"bernoulli"``, another name of
            :func:`~debiased_laplace.likelihoods.resolve_likelihood`, or an object such as ``Poisson()``. Of dense
            outputs, that of every site, and ``"next_token"`` for a language model; ``Sites`` has the choices.
        structure: Directions of the curvature: ``Kronecker()`` by default, ``LowRank(rank=50)``, ``Diagonal()``,
            ``Full()``, or ``Isotropic()``.
        parameters: Which trainable parameters are uncertain: all, ``"last_layer"``, names and patterns of parameters
            and modules (:mod:`fnmatch`), or those of the largest curvature, ``by_sensitivity(share=0.1)``.
        sampler: Which data to keep for the curvature: 1,024 drawn by importance by default,
            ``PrioritySampler(budget)``; ``UniformSampler(None)`` keeps all.
        split: Which of them choose directions and which measure curvatures along them; cross-fitted by default.
        n_data: Size of the training set, if the loader gives a part of it.
        prior_precision: One number, one for each line of :meth:`Laplace.coverage`, or one for each parameter.
        prior_mean: One number, or one for each parameter ``[D]``.
        noise_variance: Of the observations of a regression, in squared units of the targets.
        temperature: Of the likelihood, in the posterior; below one concentrates it.
        curvature: ``"ggn"``, or ``"empirical_fisher"``.
        estimator: ``"projected"`` (equation 2), or ``"factored"`` (classical K-FAC).
        mc_samples: Random vectors for each datum in the place of the exact loss Hessian, which is None; ``"auto"`` is
            exact up to 32 outputs (of all sites together, if they are dense) and one vector above.
        separate_bias: Give biases blocks of their own.
        targets_key: Where dictionary-like batches have their targets.
        inputs_of: A function of a batch that gives what the model is given, if the batch does not say it: a tensor, a
            tuple of positional arguments, a dictionary of keywords. Predictions are for what it gives.
        targets_of: A function of a batch that gives its targets.
        outputs_of: A function of what the model returns that gives the tensor of outputs, if they are neither that, nor
            its ``logits``, nor the first of a tuple.
        chunk_size: Data at a time; bounded by memory by default.
        memory_budget: Bytes that the fit may take besides the model and the data drawn; bounds also the data at a time
            of predictions (``docs/benchmarks.md`` has the formula). None for chunks of some hundred megabytes.
        max_batches: End the pass over the data after so many, of a stream without an end.
        distributed: Whether the processes of an initialised group of ``torch.distributed`` fit together, each with its
            shard of the data (``docs/distributed.md``); otherwise every process for itself.
        seed: Of all randomness, of the fit and of predictions.
        previous: An earlier posterior of the same model to add these data to.
        checkpoint: File that keeps the state of a long fit, to go on from there when it is called again with the same
            arguments and data.
        progress_bar: Show tqdm bars.

    Returns:
        The posterior, with the prior precision that was given; :meth:`Laplace.tune` chooses it.

    Raises:
        ValueError: If an argument has no meaning, the loader is empty, or targets do not fit the outputs.
        UnsupportedLayerError: If a trainable parameter is not covered; it names it and the remedy.
        NonFiniteError: If outputs or gradients are not finite; it names the layer.

    Example:
        >>> import torch
        >>> import debiased_laplace as dl
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        >>> x, y = torch.randn(60, 4), torch.randint(3, (60,))
        >>> posterior = dl.fit(model, [(x, y)], "classification")
        >>> posterior.predict(x[:2]).probabilities.shape
        torch.Size([2, 3])
    """
    _checks.seed(seed)
    resolved, adapters = resolve_likelihood(likelihood), _data.Adapters(inputs_of, targets_of)
    fitted = fit_posterior(
        model, adapters.batches(train_loader, targets_key), resolved, structure=structure, parameters=parameters,
        sampler=sampler, split=split, n_data=n_data, prior_precision=prior_precision, prior_mean=prior_mean,
        noise_variance=noise_variance, temperature=temperature, curvature=curvature, estimator=estimator,
        mc_samples=mc_samples, separate_bias=separate_bias, targets_key=targets_key, outputs_of=outputs_of,
        chunk_size=chunk_size, memory_budget=memory_budget, max_batches=max_batches, distributed=distributed,
        generator=seed,
        previous=None if previous is None else previous.fitted, checkpoint=checkpoint, progress_bar=progress_bar,
    )  # fmt: skip
    of_network = of_outputs(resolved, fitted.network.sites)
    return Laplace(fitted, of_network, fitted.posterior, seed=seed, targets_key=targets_key, adapters=adapters)


@dataclass(frozen=True, repr=False)
class Laplace:
    """A fitted Laplace posterior; what changes it returns another one.

    Attributes:
        fitted: What the fit gave: the network that the posterior is about, its curvature, and the data drawn.
        likelihood: What the outputs mean.
        posterior: The Gaussian over the parameters, with the prior precision and the noise that are in use.
        output_temperature: What outputs are divided by before the link, in predictions.
        link: Default link of predictions; None for the likelihood's.
        tuned: What :meth:`tune` found on validation data, with the whole curve; None before.
        prior_source: Where the prior precision comes from, in words.
        seed: Of predictions that draw.
        targets_key: Where dictionary-like batches have their targets.
        adapters: What makes inputs and targets of batches that are something else.
    """

    fitted: Fit
    likelihood: Likelihood
    posterior: Posterior
    output_temperature: float = 1.0
    link: str | None = None
    tuned: Tuned | None = None
    seed: int = 0
    targets_key: str = "labels"
    prior_source: str = "as it was given"
    adapters: _data.Adapters = field(default_factory=_data.Adapters)

    @property
    def network(self) -> Network:
        """The network of the fit, with its blocks."""
        return self.fitted.network

    @property
    def default_link(self) -> str:
        """How predictions integrate over the outputs if nobody says: the mean field where it is there."""
        return "mean_field" if "mean_field" in self.likelihood.links else self.likelihood.links[0]

    @property
    def subset(self) -> str:
        """Which parameters were asked for: ``"all"``, the ``"last_layer"``, or a ``"subnetwork"``."""
        parameters = self.fitted.settings.get("parameters")
        return {None: "all", "None": "all", "'last_layer'": "last_layer"}.get(parameters, "subnetwork")

    def tune(
        self,
        val_loader: Iterable[Any] | None = None,
        *,
        link: str | None = None,
        prior_structure: str = "scalar",
        temperature: bool | None = None,
        noise: bool | None = None,
        selection: str | None = None,
        prior_precisions: Tensor | None = None,
        n_samples: int = 100,
        distributed: bool = True,
        progress_bar: bool = False,
    ) -> Laplace:
        r"""Choose the prior precision, and with it the output temperature or the noise of the observations.

        On validation data by their negative log predictive probability; without such data by the marginal likelihood,
        which warns if predictions are then far less certain than the network is right.

        Args:
            val_loader: Validation batches, read once (twice for one prior precision for each block).
            link: How predictions integrate over the outputs; the likelihood's default by default, which predictions
                then use too.
            prior_structure: ``"scalar"``, one prior precision, or ``"layerwise"``, one for each line of
                :meth:`coverage`.
            temperature: Tune the output temperature; by default where it has a meaning and there are validation data.
            noise: Tune the noise variance; by default where there is one, for one prior precision.
            selection: ``"best"``, or ``"one_standard_error"``: the smallest prior precision, with the most uncertainty,
                that the data do not tell from the best. By default the latter where a temperature is tuned, which does
                on data like the training data most of what a posterior does.
            prior_precisions: ``[R]``, to look at; 100 from 1e-4 to 1e4 by default (with tuned noise those at the
                network's mean squared error as the noise).
            n_samples: Draws for ``link="mc"``.
            distributed: Whether the processes of an initialised group of ``torch.distributed`` tune together, each with
                its shard of the data; otherwise every process for itself.
            progress_bar: Show a tqdm bar.

        Returns:
            The posterior with what was found, and how in :attr:`tuned`.

        Raises:
            ValueError: If there are no validation data, targets do not fit, or an argument has no meaning.

        Warns:
            UserWarning: If the best value is an end of the grid, or is not determined by the data.
        """
        self.fitted.check_model(thorough=True)
        layerwise = _choice(prior_structure, ("scalar", "layerwise"), "prior_structure") == "layerwise"
        link = self.link or self.default_link if link is None else link
        if val_loader is None:
            return self._of_marginal_likelihood(link, layerwise, temperature, noise)
        has_noise = self.likelihood.has_noise and not layerwise
        noise = has_noise if noise is None else noise
        if temperature is None:
            temperature = self.likelihood.no_temperature is None and link != "bridge_norm"
        selection = selection or ("one_standard_error" if temperature and not layerwise else "best")
        with (
            together("tune", wanted=distributed), global_random_state(),  # a loader's order may draw
            torch.no_grad(), full_precision(),
        ):  # fmt: skip
            settings = link, layerwise, temperature, noise, selection, prior_precisions, n_samples
            agree(self.posterior, self.likelihood, *settings)
            tuned = tune(
                self.network, self.posterior, self.likelihood, self.adapters.batches(val_loader, self.targets_key),
                GRID if prior_precisions is None else prior_precisions, link=link, temperature=temperature,
                noise=noise, per_part=layerwise, selection=selection, output_temperature=self.output_temperature,
                n_samples=n_samples, seed=self.seed, targets_key=self.targets_key, progress_bar=progress_bar,
            )  # fmt: skip
        noise_variance = self.posterior.noise_variance if tuned.noise_variance is None else tuned.noise_variance
        posterior = replace(
            self.posterior, prior_precision=tuned.prior_precisions.to(self.posterior.prior_precision.device),
            noise_variance=noise_variance,
        )  # fmt: skip
        return replace(
            self, posterior=posterior, output_temperature=tuned.temperature, link=link, tuned=tuned,
            prior_source="tuned on validation data",
        )  # fmt: skip

    def _of_marginal_likelihood(
        self, link: str, layerwise: bool, temperature: bool | None, noise: bool | None
    ) -> Laplace:
        if temperature:
            raise ValueError(
                "The marginal likelihood does not depend on the output temperature: expected a val_loader with "
                "temperature=True, got None."
            )
        warn_of_no_evidence(self.posterior.temperature)
        if self.likelihood.has_noise and noise is not False:
            prior, noise_variance = maximise_with_noise(
                self.posterior,
                self.fitted.mean_loss,
                self.fitted.n_observed or self.network.n_outputs,
                per_block=layerwise,
            )
            posterior = replace(self.posterior, prior_precision=prior, noise_variance=noise_variance)
        else:
            prior = maximise_marginal_likelihood(self.posterior, per_block=layerwise)
            posterior = replace(self.posterior, prior_precision=prior)
        source = "maximum of the marginal likelihood"
        tuned = replace(self, posterior=posterior, link=link, tuned=None, prior_source=source)
        certainty = tuned.certainty()
        if certainty is not None and certainty.too_small:
            deviation = torch.as_tensor(posterior.noise_variance).sqrt()
            warn_the_caller(certainty.message(posterior.prior_precision, deviation, "tune(val_loader)"))
        return tuned

    def predict(
        self,
        x: Any,
        *,
        link: str | None = None,
        method: str | None = None,
        n_samples: int = 100,
        top_k: int | None = None,
        covariance: bool = False,
        generator: torch.Generator | None = None,
    ) -> Predictive:
        """Predict the targets of new data.

        Args:
            x: Inputs of N data, as batches of the loader have them (with or without targets in a dictionary), or as
                ``inputs_of`` gives them; moved to the model's device.
            link: How to integrate over Gaussian outputs, one of ``likelihood.links``; by default the one that was tuned
                with, or the likelihood's default. ``"mc"`` draws outputs.
            method: ``"glm"``, the linearised network, without drawing weights, at a backward pass for each output;
                ``"top_k"``, the same for many classes: exact for the most probable ones of each datum, with means over
                groups of the others; ``"linearized"``, samples of the linearised network, whose cost does not depend on
                the number of outputs; ``"nn"``, the network at sampled weights. By default ``"glm"``, or ``"top_k"``
                for more than 128 classes or labels unless only a last layer is uncertain (the log says so), and for
                dense outputs ``"linearized"`` unless a last layer makes ``"glm"`` cheap.
            n_samples: Draws for ``link="mc"`` and of the methods that sample.
            top_k: How many most probable outputs of each datum get exact moments, of ``"top_k"``; 8 by default.
            covariance: Also the covariance between the outputs of a datum, or of a site of dense outputs.
            generator: Source of the draws; by default the same draws in every call.

        Returns:
            Probabilities, or means and variances, of the targets, and those of the outputs, for each of the N data.

        Raises:
            ValueError: For an unknown link or method, or inputs that the model does not take.
        """
        _checks.whole(n_samples, "n_samples")
        self.fitted.check_model()
        if generator is None:
            generator = torch.Generator().manual_seed(self.seed)
        with torch.inference_mode(False), torch.no_grad(), full_precision():
            settings: dict[str, Any] = {
                "link": link or self.link or self.default_link, "n_samples": n_samples, "covariance": covariance,
                "output_temperature": self.output_temperature, "generator": generator,
            }  # fmt: skip
            about = self.network, self.posterior, self.likelihood, x
            if self.network.sites is not None:
                return predict_sites(*about, method=method, top_k=top_k, **settings)
            return predict(*about, method=method, top_k=top_k, **settings)

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the parameters, ``[n_samples, D]``, in the order of ``model.named_parameters()``."""
        return self.posterior.sample(n_samples, generator or torch.Generator().manual_seed(self.seed))

    def log_marginal_likelihood(self) -> Tensor:
        """Laplace approximation of the log marginal likelihood of the training data, in nats, a float64 scalar."""
        warn_of_no_evidence(self.posterior.temperature)
        return self.posterior.log_marginal_likelihood(self.log_likelihood())

    def log_likelihood(self) -> Tensor:
        """Log-likelihood of the training data at the mean, in nats; estimated if the sampler did not look at all."""
        posterior = self.posterior
        value = torch.as_tensor(-self.fitted.mean_loss * posterior.scale, dtype=torch.float64)
        if self.likelihood.has_noise:
            zeros = torch.zeros(1, self.network.n_outputs, dtype=torch.float64)
            constant = self.likelihood.site.negative_log_likelihood(zeros, zeros, posterior.noise_variance)
            n_sites = 1 if self.fitted.n_observed is None else self.fitted.n_observed / self.network.n_outputs
            value = value - posterior.n_data * n_sites * constant[0]
        return value

    def certainty(self, *, link: str | None = None, noise_variance: float | Tensor | None = None) -> Certainty | None:
        """How certain predictions are on a sample of the training data, and how certain they could be.

        Args:
            link: Link of the predictions.
            noise_variance: Of the observations, also one for each output; the posterior's by default.

        Returns:
            The numbers; None if the data are not there (a posterior that was loaded), or tell nothing.
        """
        if self.fitted.uniform is None:
            return None
        with torch.inference_mode(False), global_random_state(), full_precision():
            return certainty_on(
                self.network, self.posterior, self.likelihood, self.fitted.uniform.data,
                link=link or self.link or self.default_link, output_temperature=self.output_temperature,
                noise_variance=self.posterior.noise_variance if noise_variance is None else noise_variance,
                seed=self.seed,
            )  # fmt: skip

    def coverage(self) -> str:
        """A table of what curvature every trainable parameter got."""
        return coverage(self.fitted, self.subset)

    def sensitivities(self) -> list[Sensitivity]:
        """Trace and largest eigenvalue of the curvature of every block, the largest mean trace first."""
        return sensitivities(self.posterior)

    def __str__(self) -> str:
        """What was fitted on how many data, what it covers, and what was tuned."""
        fitted, posterior = self.fitted, self.posterior
        settings, n_drawn = (
            fitted.settings,
            len(torch.cat([fitted.direction_indices, fitted.curvature_indices]).unique()),
        )
        n_certain = self.network.n_params if self.network.free is None else int(self.network.free.sum())
        total = sum(p.numel() for p in self.network.snapshot.parameters.values())
        lines = [
            f"Laplace posterior of {n_certain:,} of {total:,} parameters",
            f"  likelihood       {self.likelihood!r}, {self.network.n_outputs} outputs"
            + (" at every site" if self.network.sites is not None else ""),
            f"  training data    {posterior.n_data:,}, of which {n_drawn:,} gave the curvature",
            f"  curvature        {brief(settings['structure'])}, {brief(settings['split'])}",
            f"  covers           {_kinds(fitted)}",
            f"  prior precision  {_few(posterior.prior_precision)} ({self.prior_source})",
        ]
        if self.likelihood.has_noise:
            deviation = torch.as_tensor(posterior.noise_variance).double().sqrt()
            lines.append(f"  noise            {_few(deviation.reshape(-1))} (standard deviation)")
        else:
            lines.append(f"  predictions      link {self.link or self.default_link!r}, output temperature "
                         f"{self.output_temperature:.3g}")  # fmt: skip
        if posterior.temperature != 1:
            lines.append(f"  temperature      {posterior.temperature:.3g} of the likelihood")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """The first line of the description."""
        return f"<{str(self).partition(chr(10))[0]}>"

    def offload(self, devices: str | torch.device | Sequence[str | torch.device] = "cpu") -> Laplace:
        """The same posterior with its directions on other devices than the network.

        A posterior that does not fit beside the network on its device: predictions, tuning and the marginal likelihood
        bring the directions of one layer after the other there. A file has them as they are, and :func:`load` brings
        them to the network.

        Args:
            devices: Where they lie: the memory of the CPU, or several devices, with about as many bytes on each.

        Example:
            >>> import torch
            >>> import debiased_laplace as dl
            >>> x, y = torch.randn(60, 4), torch.randint(3, (60,))
            >>> posterior = dl.fit(torch.nn.Linear(4, 3), [(x, y)], "classification").offload("cpu")
            >>> posterior.predict(x[:2]).probabilities.shape
            torch.Size([2, 3])
        """
        named = [devices] if isinstance(devices, (str, torch.device)) else devices
        places = [torch.device(place) for place in named]
        if not places:
            raise ValueError("Expected at least one device to offload to, got none.")
        basis = self.posterior.basis.offloaded(places, self.network.device)
        posterior = replace(self.posterior, basis=basis)
        fitted = replace(self.fitted, posterior=replace(self.fitted.posterior, basis=basis))
        return replace(self, fitted=fitted, posterior=posterior)

    def save(self, path: str | Path) -> None:
        """Write everything but the model and the data to one safetensors file, with a JSON header.

        A file is written as a whole or not at all. :func:`load` reads it.

        Raises:
            CannotWriteError: If the place cannot be written to.
        """
        self.fitted.check_model(thorough=True)
        posterior = self.posterior
        state = {name: getattr(posterior, name) for name in _OF_POSTERIOR}
        state |= {name: getattr(self, name) for name in _OF_PREDICTIONS}
        name = self.likelihood.name
        state["likelihood"] = self.likelihood.settings() if name in LIKELIHOODS else {}
        functions = vars(self.adapters) | {"outputs_of": self.network.convention.outputs_of}
        header = self.fitted.header() | {
            "kind": POSTERIOR_FILE, "likelihood": name,
            "functions": {key: _data.name_of(value) for key, value in functions.items() if value is not None},
        }  # fmt: skip
        _store.write(path, {"fit": self.fitted.state(), **state}, header)


def load(
    path: str | Path,
    model: nn.Module,
    likelihood: Likelihood | None = None,
    *,
    inputs_of: Callable[[Any], Any] | None = None,
    targets_of: Callable[[Any], Any] | None = None,
    outputs_of: Callable[[Any], Any] | None = None,
) -> Laplace:
    """Read what :meth:`Laplace.save` wrote.

    Args:
        path: The file.
        model: The model that the posterior was fitted to, with its weights.
        likelihood: The likelihood, if it was one of your own.
        inputs_of: The function that it was fitted with, if it was: functions are not stored.
        targets_of: Likewise.
        outputs_of: Likewise.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another kind, or of another model; it says what differs.
    """
    header = _store.read_header(path)
    if header.get("kind") != POSTERIOR_FILE:
        raise _store.StoredFileError(
            f"Expected a posterior that Laplace.save wrote in {path}, got {header.get('kind', 'something else')}. "
            "Read it with the class that wrote it (DebiasedLaplace.load, Fit.load), or check the path."
        )
    if likelihood is None and header["likelihood"] not in LIKELIHOODS:
        raise _store.StoredFileError(
            f"Expected likelihood to be the {header['likelihood']} of the file, got None. Pass it (for {path})."
        )
    adapters = _data.Adapters(inputs_of, targets_of)
    _checks.function(outputs_of, "outputs_of")
    given = vars(adapters) | {"outputs_of": outputs_of}
    missing = {name: function for name, function in header.get("functions", {}).items() if given[name] is None}
    if missing:
        raise _store.StoredFileError(
            f"Expected the functions that the posterior in {path} was fitted with, got None for {missing}. Functions "
            f"are not stored: pass {', '.join(f'{name}=' for name in missing)} again."
        )
    _store.check_model(path, header, model)
    state, _ = _store.read(path)
    with _store.understood(path):
        if likelihood is None:
            likelihood = LIKELIHOODS[header["likelihood"]](**state["likelihood"])
        fitted = Fit.restore(model, state["fit"], outputs_of)
        likelihood = of_outputs(likelihood, fitted.network.sites)
        settings = {name: _on(state[name], fitted.network.device) for name in _OF_POSTERIOR}
        posterior = replace(fitted.posterior, **settings)
        kept = {name: state[name] for name in _OF_PREDICTIONS}
        return Laplace(fitted, likelihood, posterior, adapters=adapters, **kept)


#: What is in the header of a file.
POSTERIOR_FILE = "posterior"

_OF_POSTERIOR = ("prior_precision", "prior_mean", "temperature", "noise_variance")
_OF_PREDICTIONS = ("output_temperature", "link", "tuned", "seed", "targets_key", "prior_source")


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _kinds(fitted: Fit) -> str:
    """How many parts of the basis have what kind of curvature."""
    basis, blocks = fitted.posterior.basis, fitted.network.blocks
    kinds = [
        part.describe([blocks[i] for i in members])[0] for part, members in zip(basis.parts, basis.members, strict=True)
    ]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) + f"; {basis.rank:,} directions"


def _choice(value: str, choices: Sequence[str], name: str) -> str:
    if value not in choices:
        raise ValueError(f"Expected {name} out of {list(choices)}, got {value!r}.")
    return value


def _few(values: Tensor) -> str:
    shown = [f"{float(value):.3g}" for value in values.flatten()[:4]]
    return ", ".join(shown) + (", ..." if values.numel() > 4 else "")
