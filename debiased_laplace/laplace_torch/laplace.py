"""The drop-in class: laplace-torch's surface over one native posterior.

Every public name of laplace-torch's classes is here, with its arguments, in one place and hence in a long file; what
they do is the native object's (:class:`debiased_laplace.laplace.Laplace`), or a function of one in the modules beside.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from laplace import ParametricLaplace
from torch import Tensor, nn
from torchmetrics import Metric

from debiased_laplace import _checks, _data, _store
from debiased_laplace._guards import full_precision, global_random_state, warn_the_caller
from debiased_laplace._ranks import together
from debiased_laplace.curvature.structures import STRUCTURES, Structure
from debiased_laplace.fitting.coverage import coverage
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.fitting.settings import default_sampler
from debiased_laplace.laplace import Laplace
from debiased_laplace.laplace_torch import gaussian, noise, predictions, state, tuning
from debiased_laplace.laplace_torch.gaussian import VECTOR_STRUCTURES
from debiased_laplace.laplace_torch.parameters import SUBSETS, Selection, embed, restrict
from debiased_laplace.laplace_torch.settings import (
    REWARD_MODELING,
    backend_settings,
    check_prior_before_the_fit,
    choice,
    is_known,
    plain,
    prior_of_the_posterior,
    priors_of_parts,
    structure_of,
)
from debiased_laplace.laplace_torch.settings import (
    feature_reduction as checked_feature_reduction,
)
from debiased_laplace.laplace_torch.settings import (
    prior_mean as checked_prior_mean,
)
from debiased_laplace.likelihoods import Categorical, Likelihood, resolve_likelihood
from debiased_laplace.network.network import Network
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.posterior.curve import PriorCurve
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.temperature import warn_of_no_evidence
from debiased_laplace.posterior.tune import Tuned, agree
from debiased_laplace.sampling.samplers import Sampler
from debiased_laplace.sampling.splits import Split

logger = logging.getLogger("debiased_laplace.laplace_torch")

UNREGISTERED = "unregistered"
LEFT_OUT_WARNING = (
    "A low rank leaves directions without curvature, so that its log marginal likelihood is too large to be compared "
    "with that of another structure or rank. Compare log_marginal_likelihood_bounds(), which makes up for them, or fit "
    "with a larger rank."
)


class DebiasedLaplace(ParametricLaplace):
    r"""Laplace posterior whose curvature is measured on other data than its directions.

    Args:
        model: The trained model. It is never written to, and the posterior is about what it is when :meth:`fit` is
            called: a :class:`~debiased_laplace.network.snapshot.ModelChangedWarning` tells if it is another one later.
        likelihood: ``"classification"``, ``"regression"``, ``"reward_modeling"`` (fitted as a classification of pairs,
            predicts as a regression), or a :class:`~debiased_laplace.likelihoods.Likelihood` such as ``Bernoulli()``.
        subset_of_weights: ``"all"`` trainable parameters, the ``"last_layer"``, or a ``"subnetwork"``.
        hessian_structure: ``"kron"``, ``"lowrank"``, ``"diag"``, ``"full"`` or ``"isotropic"`` (no curvature).
        sigma_noise: Standard deviation of the observation noise (regression), or one for each output: then their
            ratios are part of the fit.
        prior_precision: One number; one for each line of :meth:`coverage`; one for each parameter tensor; or one for
            each parameter (not for ``"kron"``).
        prior_mean: One number, or ``[D]``.
        temperature: Temperature of the likelihood.
        enable_backprop: Let predictions be differentiable in their inputs; uses Jacobians, as laplace-torch does.
        dict_key_x: Unused: the model says itself what it takes of a dictionary-like batch (``docs/batches.md``).
        dict_key_y: Where dictionary-like batches have their targets.
        backend: A backend of laplace-torch, of which only the kind has an effect: the GGN, or the empirical Fisher.
        backend_kwargs: ``stochastic`` and ``num_samples`` (random vectors) have an effect, nothing else.
        asdl_fisher_kwargs: No effect.
        params: Names of parameters or modules, or patterns (:mod:`fnmatch`), that the posterior is about; the others
            are constants. With ``"all"`` vectors have the length of the chosen ones, as if the others were frozen; with
            ``"subnetwork"`` the mean and samples are of all parameters, as in laplace-torch.
        last_layer_name: Name of the last layer's module; found by a forward pass by default.
        feature_reduction: How the model reduces features ``[N, ..., I]`` of its last layer to ``[N, I]``:
            ``"pick_first"``, ``"pick_last"`` or ``"average"``. Not needed, since the last layer is seen where the model
            calls it; what is said here is taken as laplace-torch takes it, and a warning tells if the outputs are
            others.
        subnetwork_indices: Instead of ``params``, ascending indices in the vector of all trainable parameters; for
            ``"kron"`` those of whole tensors.
        separate_bias: Give biases blocks of their own, as laplace-torch does. By default they are joined to their
            weights, unless there is one prior precision for each parameter tensor.
        seed: Seed of the fit's draws and of Monte Carlo predictions.

    Raises:
        ValueError: For an unknown likelihood, subset or structure, or an invalid number.

    Example:
        >>> import torch
        >>> from debiased_laplace import DebiasedLaplace
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        >>> x, y = torch.randn(60, 4), torch.randint(3, (60,))
        >>> la = DebiasedLaplace(model, "classification")
        >>> la.fit([(x, y)])
        >>> la(x[:2]).shape
        torch.Size([2, 3])
    """

    #: Place in laplace-torch's factory, which looks at all subclasses in no particular order.
    _key: ClassVar[tuple[str, str]] = (UNREGISTERED, "debiased_laplace.DebiasedLaplace")
    #: Classes by name, to make the one that a file was written from.
    _classes: ClassVar[dict[str, type[DebiasedLaplace]]] = {}

    #: What the last search saw, if it was one for several prior precisions or for a temperature.
    tuned: Tuned | None = None
    selection: Selection  # what the posterior is about
    #: How many most probable outputs of a datum get exact moments in predictions of classes and labels with ``"glm"``;
    #: None for all of up to 128 outputs (or where only a last layer is uncertain) and 16 of more, as the log says.
    #: Exact predictions of C outputs are those with C.
    top_k: int | None = None
    _output_temperature: float = 1.0  # defaults of the class: what was pickled earlier has none of them
    feature_reduction: str | None = None
    _told_what_is_left_out: bool = False  # of the log marginal likelihood of the present fit

    def __init_subclass__(cls, **keywords: Any) -> None:
        """A subclass that does not name its own place in the factory must not take its parent's."""
        super().__init_subclass__(**keywords)
        if "_key" not in vars(cls):
            cls._key = (UNREGISTERED, f"{cls.__module__}.{cls.__qualname__}")
        DebiasedLaplace._classes[cls.__name__] = cls

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        subset_of_weights: str = "all",
        hessian_structure: str = "kron",
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        *,
        params: Sequence[str] | str | None = None,
        last_layer_name: str | None = None,
        subnetwork_indices: Tensor | None = None,
        separate_bias: bool | None = None,
        seed: int = 0,
        feature_reduction: str | None = None,
    ) -> None:
        self._construct(
            model, likelihood, subset_of_weights, hessian_structure, backend=backend, backend_kwargs=backend_kwargs,
            asdl_fisher_kwargs=asdl_fisher_kwargs, params=params, last_layer_name=last_layer_name,
            subnetwork_indices=subnetwork_indices, separate_bias=separate_bias, seed=seed,
            feature_reduction=feature_reduction, enable_backprop=enable_backprop, dict_key_x=dict_key_x,
            dict_key_y=dict_key_y, temperature=temperature, prior_precision=prior_precision, prior_mean=prior_mean,
            sigma_noise=sigma_noise,
        )  # fmt: skip

    def _construct(
        self, model: nn.Module, likelihood: str | Likelihood, subset_of_weights: str, hessian_structure: str, *,
        backend: type | None = None, backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None, params: Sequence[str] | str | None = None,
        last_layer_name: str | None = None, subnetwork_indices: Tensor | None = None, separate_bias: bool | None = None,
        seed: int = 0, feature_reduction: str | None = None, enable_backprop: bool = False,
        dict_key_x: str = "input_ids", dict_key_y: str = "labels", temperature: float = 1.0,
        prior_precision: float | Tensor = 1.0, prior_mean: float | Tensor = 0.0, sigma_noise: float | Tensor = 1.0,
        trainable: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """Initialise an object of any class, whatever its constructor takes; ``trainable`` at an earlier time."""
        _checks.seed(seed)
        self.subset_of_weights = choice(subset_of_weights, SUBSETS, "subset_of_weights")
        self.hessian_structure = choice(hessian_structure, list(STRUCTURES), "hessian_structure")
        self.feature_reduction = checked_feature_reduction(self.subset_of_weights, feature_reduction)
        selection = Selection.of(
            model, self.subset_of_weights, params, last_layer_name, subnetwork_indices, trainable
        )  # fmt: skip
        if selection.indices is not None and self.hessian_structure == "kron":
            raise ValueError(
                "Expected subnetwork_indices that cover whole parameter tensors with hessian_structure='kron', got "
                f"some of {list(selection.names or ())} in part. Use 'diag', 'full' or 'lowrank', or choose tensors "
                "with params=[...]."
            )
        self._backend_settings = backend_settings(backend, backend_kwargs, asdl_fisher_kwargs)
        self.likelihood = likelihood
        self.fitted: Fit | None = None
        self.separate_bias = separate_bias
        self.seed = seed
        self.link: str | None = None
        self.curve: PriorCurve | None = None
        #: Ratios between the standard deviations of the outputs' noise, which the fit was made with.
        self.noise_profile: Tensor | None = None
        self._native: tuple[_Made, Laplace] | None = None  # what it was made from, and it
        self._generator = torch.Generator().manual_seed(seed)
        self._draws: tuple[Posterior, tuple[int, int], Tensor] | None = None
        self.selection = selection
        super().__init__(
            model, self.likelihood, 1.0, 1.0, 0.0, temperature, enable_backprop, dict_key_x, dict_key_y,
            backend if is_known(backend) else None, backend_kwargs, asdl_fisher_kwargs,
        )  # fmt: skip
        self._choose(selection)
        self.likelihood = likelihood  # the base class knows names alone
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean
        self.sigma_noise = sigma_noise
        self.mean = self.prior_mean

    def _choose(self, selection: Selection) -> None:
        """Take over what the posterior is about, and what laplace-torch says about it."""
        self.selection = selection
        self.params = list(selection.parameters(self.model))
        known = selection.names is not None
        self.n_params = sum(p.numel() for p in self.params) if known else None  # type: ignore[assignment]
        self.n_layers = len(self.params) if known else None  # type: ignore[assignment]

    @property
    def _sizes(self) -> dict[str, int] | None:
        return self.selection.sizes

    @property
    def _n_chosen(self) -> int | None:
        sizes = self._sizes
        return None if sizes is None else sum(sizes.values())

    # -- settings ------------------------------------------------------------------------------

    @property
    def likelihood(self) -> str:
        """``"classification"``, ``"regression"`` or ``"reward_modeling"``; ``output_likelihood`` is the object."""
        return self._likelihood

    @likelihood.setter
    def likelihood(self, likelihood: str | Likelihood) -> None:
        if plain(likelihood) == REWARD_MODELING:  # fitted as a classification, and predicts as a regression
            self.output_likelihood: Likelihood = Categorical()
            self._likelihood = REWARD_MODELING
            return
        self.output_likelihood = resolve_likelihood(likelihood)
        self._likelihood = self.output_likelihood.laplace_torch_name

    @property
    def prior_precision(self) -> Tensor:
        """One number ``[1]``, one for each line of :meth:`coverage`, each parameter tensor, or each parameter."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, prior_precision: float | Tensor | Sequence[float]) -> None:
        if isinstance(prior_precision, (int, float)):  # in double precision whatever the default is
            prior_precision = torch.tensor(float(prior_precision), dtype=torch.float64)
        checked = _checks.prior_precisions(prior_precision)
        if self.fitted is None:
            check_prior_before_the_fit(checked, self._sizes, self.hessian_structure)
        elif len(checked) > 1:
            prior_of_the_posterior(checked, self.fitted)
        differentiable = isinstance(prior_precision, Tensor) and prior_precision.requires_grad
        kept = prior_precision.reshape(-1) if differentiable else checked.clone()  # type: ignore[union-attr]
        self._posterior_scale = None
        self._prior_precision = kept.to(self._device, self._float_dtype)

    @property
    def prior_mean(self) -> Tensor:
        """A number ``[]``, or one for each parameter ``[D]``."""
        return self._prior_mean

    @prior_mean.setter
    def prior_mean(self, prior_mean: float | Tensor) -> None:
        mean = checked_prior_mean(prior_mean, self._n_chosen)
        self._prior_mean = mean.to(self._device, self._float_dtype, copy=True)

    @property
    def sigma_noise(self) -> Tensor:
        """Standard deviation of the observation noise: a scalar, or ``[C]``."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, sigma_noise: float | Tensor) -> None:
        sigma = noise.standard_deviation(sigma_noise, self._device, self._float_dtype)
        if not self.output_likelihood.has_noise and bool((sigma.detach() != 1).any()):
            raise ValueError(
                f"sigma_noise other than one is only available for regression, got {sigma.tolist()} for "
                f"{self.likelihood}. To scale another likelihood use temperature."
            )
        if self.fitted is not None:
            noise.check_profile(sigma, self.noise_profile, self.n_outputs)
        self._posterior_scale = None
        self._sigma_noise = sigma

    @property
    def temperature(self) -> float:
        """Temperature of the likelihood; below one concentrates the posterior."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        _checks.positive(temperature, "temperature")
        self._temperature = temperature

    @property
    def output_temperature(self) -> float:
        """What outputs are divided by before the link: above one, probabilities are less confident.

        It is a setting of predictions, and the posterior does not depend on it; :attr:`temperature` is that of the
        likelihood, in the posterior. Means and variances of outputs, and samples of them, are not divided.
        """
        return self._output_temperature

    @output_temperature.setter
    def output_temperature(self, output_temperature: float) -> None:
        number = _checks.positive(output_temperature, "output_temperature")
        reason = self.output_likelihood.no_temperature
        if reason is not None and number != 1:
            raise ValueError(
                f"{reason}, and so no output temperature: expected 1, got {number:g}. To scale its posterior use "
                "temperature" + (", or sigma_noise." if self.output_likelihood.has_noise else ".")
            )
        self._output_temperature = number

    @property
    def _float_dtype(self) -> torch.dtype:
        return self._dtype if self._dtype in (torch.float32, torch.float64) else torch.float32

    @property
    def _separates_bias(self) -> bool:
        """Whether the next fit gives biases blocks of their own."""
        if self.separate_bias is not None:
            return self.separate_bias
        n_given = len(self.prior_precision)  # of a last layer that is not known yet: of its weight and its bias
        return self.hessian_structure == "kron" and n_given > 1 and n_given == len(self._sizes or range(2))

    # -- the fit -------------------------------------------------------------------------------

    def fit(
        self,
        train_loader: Iterable[Any],
        override: bool = True,
        progress_bar: bool = False,
        *,
        budget: int | None = 1024,
        n_data: int | None = None,
        split: Split | None = None,
        sampler: Sampler | None = None,
        structure: Structure | None = None,
        estimator: str = "projected",
        mc_samples: int | str | None = "auto",
        curvature: str | None = None,
        generator: torch.Generator | int | None = None,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
        checkpoint: str | Path | None = None,
        max_batches: int | None = None,
        distributed: bool = True,
    ) -> None:
        """Fit the posterior at the model's parameters; the loader is read once.

        Args:
            train_loader: Any iterable of batches ``(inputs, targets)`` or dictionaries: a DataLoader, a list,
                a generator.
            override: Fit anew. False adds these data to those of the earlier fit, as if both had been given at once:
                everything is measured again on the data drawn in both, at the model's present parameters.
            progress_bar: Show tqdm bars.
            budget: Data to draw from the loader for curvature, directions and measurement together; ``None`` for all,
                the full-data fit.
            n_data: Size of the training set that the loader stands for, if its data are not it. Of a larger one they
                are taken for a random part, and none of them is kept for certain.
            split: ``CrossFit()`` by default, for others no datum along directions that it chose (``Single()`` for
                ``"diag"`` and with all data and no ``n_data``, where there is no bias); ``TwoBatch()`` is the source
                paper's, ``Single()`` the usual, biased practice.
            sampler: Instead of a draw of ``budget`` data by importance, ``PrioritySampler(budget)``, with one forward
                pass over the whole loader; ``UniformSampler(budget)`` is the usual one, needs no forward pass, and is
                the default for the empirical Fisher and for HesScale.
            structure: The structure of ``hessian_structure`` with other settings, such as ``LowRank(rank=50)``.
            estimator: ``"projected"`` (equation 2) or ``"factored"`` (classical K-FAC).
            mc_samples: Random vectors for each datum; None is exact; ``"auto"`` is what the backend says, or else exact
                up to 32 outputs and one vector above.
            curvature: ``"ggn"`` or ``"empirical_fisher"``; by default what the backend says, or else the former.
            generator: A CPU generator or a seed; ``seed`` by default.
            chunk_size: Data at a time; bounded by memory by default.
            memory_budget: Bytes that the fit may take besides the model and the data drawn; bounds also the data at a
                time of predictions. None for chunks of some hundred megabytes.
            checkpoint: File that keeps the state of a long fit, to go on from there when it is called again with the
                same data.
            max_batches: End the pass over the data after so many batches, of a stream without an end.
            distributed: Whether the processes of an initialised group of ``torch.distributed`` fit together, each with
                its shard of the data; otherwise every process for itself.

        Raises:
            ValueError: For an empty loader, targets that do not fit, or a prior precision of the wrong length.
            UnsupportedLayerError: If a trainable parameter is not covered; it names it and the remedy.
            NonFiniteError: If outputs or gradients are not finite; it names the layer.
        """
        if sampler is not None and budget != 1024:
            raise ValueError("Expected either a budget or a sampler, got both. Give the budget to the sampler.")
        _checks.whole(n_data, "n_data", otherwise="None for those that are seen")
        previous = None if override else self.fitted
        if previous is not None:
            noise.check_profile(self.sigma_noise, self.noise_profile, self.n_outputs)
        if mc_samples == "auto":
            mc_samples = self._backend_settings.get("mc_samples", "auto")
        curvature = curvature or self._backend_settings.get("curvature", "ggn")
        structure = structure_of(self.hessian_structure, structure)
        # As laplace-torch has it: the diagonal is that of the reduced features, other curvature that of the model.
        reduction = self.feature_reduction if self.hessian_structure == "diag" else None
        dataset_size, selection = _data.dataset_length(train_loader), self.selection
        fitted = fit(
            Snapshot(self.model, selection.trainable), train_loader,
            noise.with_noise(self.output_likelihood, self.sigma_noise), structure=structure, indices=selection.indices,
            parameters=None if selection.indices is not None else selection.names or "last_layer",
            sampler=sampler or default_sampler(budget, structure, curvature), split=split, estimator=estimator,
            mc_samples=mc_samples, curvature=curvature, separate_bias=self._separates_bias, feature_reduction=reduction,
            generator=self.seed if generator is None else generator, chunk_size=chunk_size,
            memory_budget=memory_budget, targets_key=self.dict_key_y, progress_bar=progress_bar, previous=previous,
            checkpoint=checkpoint, max_batches=max_batches, n_data=n_data, dense=False,
            distributed=distributed,
        )  # fmt: skip
        if self.feature_reduction is not None and reduction is None:
            few = None if fitted.sample is None else fitted.sample.data.inputs
            fitted = replace(fitted, network=fitted.network.reduced(self.feature_reduction, few))
        self._adopt(fitted, noise.profile(self.sigma_noise))
        n_added = fitted.n_seen - (0 if previous is None else previous.n_seen)
        if n_data is None and dataset_size is not None and dataset_size != n_added:
            logger.warning(
                "The loader gave %d data, its dataset says that it has %d: the posterior is that of %d data. "
                "Set n_data if the training set has another size.",
                n_added, dataset_size, n_added,
            )  # fmt: skip
        self._check_reduction()

    def _check_reduction(self) -> None:
        """Warn the caller of the caller if outputs were not those of the reduced features."""
        network = self.network
        if network.reduction_error > torch.finfo(network.dtype).eps ** 0.5:
            warn_the_caller(
                f"The model's outputs are not its last layer of features reduced by {self.feature_reduction!r}: they "
                f"differ by {network.reduction_error:.2g} of the largest. Variances are those of the reduced features, "
                "as in laplace-torch. Leave feature_reduction out for those of the model itself (padded sequences "
                "are the usual cause)."
            )
            network.reduction_error = 0.0  # once for a fit, and once for a prediction

    def _adopt(self, fitted: Fit, profile: Tensor | None) -> None:
        """Take over a fit, if the settings go with it; otherwise nothing changes."""
        network = fitted.network
        prior_of_the_posterior(self.prior_precision, fitted)
        n_chosen = network.n_params if network.free is None else int(network.free.sum())
        if self.prior_mean.ndim == 1 and len(self.prior_mean) not in (1, n_chosen):
            raise ValueError(
                f"Expected a prior mean for each of the {n_chosen} parameters, got {len(self.prior_mean)}."
            )
        self.fitted = fitted
        self.noise_profile = profile
        self._native = self._draws = None
        self._told_what_is_left_out = False
        self._choose(self.selection.named(list(network.shapes)))
        self.mean = restrict(fitted.posterior.mean, network.free)
        if self.subset_of_weights == "subnetwork":
            self.mean = self.assemble_full_samples(self.mean[None])[0]
        self.n_data = fitted.posterior.n_data
        self.n_outputs = network.n_outputs
        self.loss = torch.tensor(fitted.mean_loss * self.n_data, device=self._device, dtype=self._float_dtype)

    @property
    def native(self) -> Laplace:
        """The native posterior with the present settings; immutable, and another one when they change."""
        fitted = self._require_fit()
        numbers = (self.temperature, self.output_temperature, self.link, self.seed, self.dict_key_y)
        made = _Made(
            (fitted, self.output_likelihood), numbers, (self.prior_precision, self.prior_mean, self.sigma_noise)
        )
        kept = self._native  # another thread may replace it
        if kept is not None and kept[0] == made:
            return kept[1]
        native = self._made_of(fitted)
        self._native = (made, native) if made.constant else None
        return native

    def _made_of(self, fitted: Fit) -> Laplace:
        several = self.prior_mean.ndim == 1 and len(self.prior_mean) > 1
        posterior = replace(
            fitted.posterior,
            prior_precision=prior_of_the_posterior(self.prior_precision, fitted).double(),
            prior_mean=embed(self.prior_mean, fitted.network.free) if several else self.prior_mean,
            temperature=self.temperature,
            noise_variance=noise.level(self.sigma_noise).square(),
        )
        likelihood = noise.with_noise(self.output_likelihood, self.sigma_noise)
        return Laplace(
            fitted, likelihood, posterior, self.output_temperature, self.link, None, self.seed,
            self.dict_key_y,
        )  # fmt: skip

    @property
    def posterior(self) -> Posterior:
        """The posterior with the current prior precision, prior mean, noise and temperature."""
        return self.native.posterior

    @property
    def network(self) -> Network:
        """The model with its curvature blocks."""
        return self._require_fit().network

    def _check_model(self, *, thorough: bool = False) -> None:
        """Tell the caller if the model is no longer that of the fit, which this object goes on with."""
        if self.fitted is not None:
            self.fitted.check_model(thorough=thorough)

    def _require_fit(self) -> Fit:
        if self.fitted is None:
            raise _checks.NotFittedError(
                "Expected a fitted posterior. Call fit(train_loader) or load_state_dict first."
            )
        return self.fitted

    def _check_H_init(self) -> None:
        self._require_fit()

    def coverage(self) -> str:
        """A table of what curvature every trainable parameter got."""
        return coverage(self._require_fit(), self.subset_of_weights)

    # -- subnetworks ---------------------------------------------------------------------------

    @property
    def n_params_subnet(self) -> int:
        """Number of parameters that the posterior is about, of a subnetwork."""
        self._only_for_subnetworks("n_params_subnet")
        return int(self._n_chosen or 0)

    @property
    def mean_subnet(self) -> Tensor:
        """Their mean."""
        self._only_for_subnetworks("mean_subnet")
        fitted = self._require_fit()
        return restrict(fitted.posterior.mean, fitted.network.free)

    def assemble_full_samples(self, subnet_samples: Tensor) -> Tensor:
        """Samples of a subnetwork's parameters as samples of all parameters, the others at their trained values.

        Args:
            subnet_samples: ``[S, d]``.

        Returns:
            ``[S, D]``.
        """
        self._only_for_subnetworks("assemble_full_samples")
        trained = torch.cat([p.detach().flatten() for p in self._all_of_the_fit().values()])
        samples = trained.to(subnet_samples.dtype).repeat(len(subnet_samples), 1)
        samples[:, self._places] = subnet_samples
        return samples

    @property
    def _places(self) -> Tensor:
        """Where in the vector of all trainable parameters the posterior's are: ``[D]``, boolean."""
        return self.selection.places(self._all_of_the_fit()).to(self._device)

    def _all_of_the_fit(self) -> dict[str, Tensor]:
        """All trainable parameters, at the fit if there was one."""
        if self.fitted is None:
            return dict(self.selection.every(self.model))
        parameters = self.fitted.network.snapshot.parameters
        return {name: parameters[name] for name in self.selection.trainable}

    def _only_for_subnetworks(self, name: str) -> None:
        if self.subset_of_weights != "subnetwork":
            raise AttributeError(f'{name} is there for subset_of_weights="subnetwork", not {self.subset_of_weights!r}.')

    def _of_the_posterior(self, value: Tensor) -> Tensor:
        """Of all parameters those that the posterior is about."""
        if self.subset_of_weights != "subnetwork" or value.shape[-1] != self.n_params:
            return value
        return value[..., self._places.to(value.device)]

    # -- precisions and covariances ------------------------------------------------------------

    @property
    def H(self) -> Any:
        """Curvature of the loss summed over the training set, without noise, temperature and prior.

        In the form of :attr:`posterior_precision` without the prior. Before a fit zero for ``"diag"`` and ``"full"``,
        as in laplace-torch, and otherwise None.
        """
        if self.fitted is None:
            if not self._is_prior:
                return None
            shape = (self._n_chosen or 0,) * (1 if self.hessian_structure in VECTOR_STRUCTURES else 2)
            return torch.zeros(shape, device=self._device, dtype=self._float_dtype)
        return gaussian.curvature(self.native, self.hessian_structure, self._float_dtype)

    @property
    def posterior_precision(self) -> Any:
        """Posterior precision, as laplace-torch has it.

        Returns:
            ``"kron"``: a :class:`~debiased_laplace.laplace_torch.KroneckerPrecision`, with the methods of
            laplace-torch's ``KronDecomposed``; ``"diag"`` and ``"isotropic"``: ``[D]``; ``"full"``: ``[D, D]``;
            ``"lowrank"``: ``((U: [D, K], eigenvalues: [K]), prior: [D])``, of which it is
            ``U diag(eigenvalues) U^T + diag(prior)``. Before a fit the prior's for ``"diag"``, ``"isotropic"`` and
            ``"full"``, as in laplace-torch.
        """
        if self._is_prior:
            prior = self.prior_precision_diag
            return prior if self.hessian_structure in VECTOR_STRUCTURES else torch.diag(prior)
        return gaussian.precision(self.native, self.hessian_structure, self._float_dtype)

    @property
    def posterior_covariance(self) -> Tensor:
        """Posterior covariance ``[D, D]``, of ``"full"``."""
        self._only_for("posterior_covariance", "full")
        return gaussian.covariance(self.native, self._float_dtype)

    @property
    def posterior_scale(self) -> Tensor:
        """Square root of the covariance: of ``"full"`` triangular ``[D, D]``, of ``"diag"`` its diagonal ``[D]``."""
        self._only_for("posterior_scale", "full", *VECTOR_STRUCTURES)
        if self.hessian_structure in VECTOR_STRUCTURES:
            return self.posterior_precision.rsqrt()
        return torch.linalg.cholesky(self.posterior_covariance.double()).to(self._float_dtype)

    @property
    def posterior_variance(self) -> Tensor:
        """Posterior variances ``[D]``, of ``"diag"``."""
        self._only_for("posterior_variance", *VECTOR_STRUCTURES)
        return self.posterior_precision.reciprocal()

    def _only_for(self, name: str, *structures: str) -> None:
        if self.hessian_structure not in structures:
            raise AttributeError(
                f"{name} is there for hessian_structure {' and '.join(structures)}, not for "
                f"{self.hessian_structure!r}. See posterior_precision."
            )
        self._require_fit()

    @property
    def _is_prior(self) -> bool:
        """Whether there was no fit, and the posterior is one that laplace-torch has before a fit: the prior."""
        return (
            self.fitted is None
            and self.selection.names is not None
            and self.hessian_structure in ("full", *VECTOR_STRUCTURES)
        )

    # -- the Gaussian --------------------------------------------------------------------------

    @property
    def prior_precision_diag(self) -> Tensor:
        """Prior precision of every parameter, ``[D]``."""
        prior = self.prior_precision
        if self.fitted is not None:
            whole = self.fitted.posterior.basis.per_parameter(prior_of_the_posterior(prior, self.fitted))
            return restrict(whole, self.fitted.network.free)
        sizes = list((self._sizes or {}).values())
        if len(prior) == sum(sizes) > 0:
            return prior
        if not sizes or len(prior) not in (1, len(sizes)):
            raise _checks.NotFittedError(
                f"Expected a fitted posterior to tell which parameters the {len(prior)} prior precisions belong to. "
                "Call fit(train_loader) or load_state_dict first."
            )
        return prior.expand(len(sizes)).repeat_interleave(torch.tensor(sizes, device=prior.device))

    @property
    def log_likelihood(self) -> Tensor:
        """Log-likelihood of the training data; estimated from the data drawn if the sampler did not look at all."""
        return self._log_likelihood().to(self._float_dtype)

    def _log_likelihood(self) -> Tensor:
        fitted, sigma = self._require_fit(), self.sigma_noise.double()
        value = -fitted.mean_loss * self.n_data / (noise.level(sigma).square() * self.temperature)
        if self.output_likelihood.has_noise:
            logs = sigma.log().expand(self.n_outputs) + 0.5 * math.log(2 * math.pi)
            value = value - self.n_data * logs.sum()
        return value

    @property
    def log_det_prior_precision(self) -> Tensor:
        """Log-determinant of the prior precision."""
        return self.prior_precision_diag.double().log().sum().to(self._float_dtype)

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """Log-determinant of the posterior precision; of the prior before a fit."""
        if self.fitted is None:
            return self.log_det_prior_precision
        return self.posterior.log_det_precision.to(self._float_dtype)

    @property
    def log_det_ratio(self) -> Tensor:
        """Difference of the two."""
        if self.fitted is None:
            return self.log_det_prior_precision * 0
        return self.posterior.log_det_ratio.to(self._float_dtype)

    @property
    def scatter(self) -> Tensor:
        """Square norm of mean minus prior mean under the prior precision; zero before a fit."""
        if self.fitted is None:
            return self.log_det_prior_precision * 0
        return self.posterior.scatter().to(self._float_dtype)

    def square_norm(self, value: Tensor) -> Tensor:
        """Square norm of ``value - mean`` under the posterior precision (before a fit: of the prior).

        Args:
            value: Parameters ``[..., D]``.

        Returns:
            ``[...]``.
        """
        value = self._of_the_posterior(value)
        if self.fitted is None:
            return (self.prior_precision_diag * (value - self.prior_mean).square()).sum(-1)
        return gaussian.square_norm(self.native, value).to(self._float_dtype)

    def log_prob(self, value: Tensor, normalized: bool = True) -> Tensor:
        """Log-density of the posterior (before a fit: of the prior) at parameters ``[..., D]``, in nats.

        Args:
            value: Parameters.
            normalized: With the terms that do not depend on ``value``.

        Returns:
            ``[...]``.
        """
        half = -0.5 * self.square_norm(value)
        if not normalized:
            return half
        return half + 0.5 * (self.log_det_posterior_precision - (self._n_chosen or 0) * math.log(2 * math.pi))

    def log_marginal_likelihood(
        self, prior_precision: Tensor | None = None, sigma_noise: Tensor | None = None
    ) -> Tensor:
        """Laplace approximation of the log marginal likelihood, in nats.

        Differentiable in both arguments; given ones are kept, as in laplace-torch. At another :attr:`temperature` than
        one it is none, and a warning says so.

        Args:
            prior_precision: A new prior precision.
            sigma_noise: A new standard deviation of the noise (regression).

        Warns:
            UserWarning: Once for a fit, if a low rank leaves out more than a nat, so that it cannot be compared with
                that of other structures or ranks; :meth:`log_marginal_likelihood_bounds` can.
        """
        self._require_fit()
        self._check_model()
        if prior_precision is not None:
            self.prior_precision = prior_precision
        if sigma_noise is not None:
            if not self.output_likelihood.has_noise:
                raise ValueError(
                    f"sigma_noise is only available for regression, got {sigma_noise!r} for {self.likelihood}."
                )
            self.sigma_noise = sigma_noise
        posterior = self.posterior
        warn_of_no_evidence(self.temperature)
        if not self._told_what_is_left_out and gaussian.left_out_matters(posterior):
            self._told_what_is_left_out = True
            warn_the_caller(LEFT_OUT_WARNING)
        return posterior.log_marginal_likelihood(self._log_likelihood()).to(self._float_dtype)

    def log_marginal_likelihood_bounds(self) -> tuple[float, float]:
        """Between what the log marginal likelihood is with the directions that a low rank leaves out, in nats.

        From the trace of the curvature that they share: see
        :attr:`~debiased_laplace.posterior.gaussian.Posterior.left_out_log_det` for what is bounded and what is
        estimated. Of other structures both are the log marginal likelihood itself.

        Raises:
            ValueError: If the trace is not known (a fit that an earlier version saved).
        """
        posterior = self.posterior
        value = float(posterior.log_marginal_likelihood(self._log_likelihood()))
        least, most = posterior.left_out_log_det
        return value - 0.5 * most, value - 0.5 * least

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the parameters, ``[n_samples, D]``; without a generator, the next of this object's own.

        Of a subnetwork: of all parameters, those outside at their trained values.
        """
        samples = self.posterior.sample(n_samples, generator or self._generator).detach()
        if self.subset_of_weights != "subnetwork":
            return samples
        return self.assemble_full_samples(restrict(samples, self.network.free))

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Output covariances of given Jacobians, ``[N, C, D] -> [N, C, C]``; predictions do without Jacobians."""
        native = self.native
        self._check_jacobians(Js)
        return gaussian.functional_variance(native, Js)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Joint output covariance of given Jacobians, ``[N, C, D] -> [N * C, N * C]``."""
        native = self.native
        self._check_jacobians(Js)
        return gaussian.functional_covariance(native, Js)

    def _check_jacobians(self, Js: Tensor) -> None:
        if not isinstance(Js, Tensor) or Js.ndim != 3 or Js.shape[-1] != self._n_chosen:
            got = tuple(Js.shape) if isinstance(Js, Tensor) else type(Js).__name__
            raise ValueError(f"Invalid Jacobians shape: expected a tensor [N, C, {self._n_chosen}], got {got}.")
        if Js.device != self._device:
            raise ValueError(f"Expected Jacobians on the device of the model, {self._device}, got {Js.device}.")

    # -- predictions ---------------------------------------------------------------------------

    def __call__(
        self,
        x: Any,
        pred_type: str = "glm",
        joint: bool = False,
        link_approx: str | None = None,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Posterior predictive; outputs are divided by :attr:`output_temperature` before the link.

        Args:
            x: Inputs; moved to the model's device.
            pred_type: ``"glm"`` (linearised; of more than 128 classes exact for the most probable of each datum, see
                :attr:`top_k`), ``"nn"`` (sampled weights), or ``"linearized"`` (samples of the
                linearised network by forward mode: for many outputs).
            joint: One covariance over all inputs (regression, ``"glm"``).
            link_approx: One of the likelihood's links, such as ``"probit"``, ``"mc"``, ``"bridge"`` or
                ``"bridge_norm"``; by default the one used in tuning, or else the first, probit for classes.
            n_samples: Samples for ``"mc"``, ``"nn"`` and ``"linearized"``.
            diagonal_output: Variances instead of covariances: of a regression's result unless ``joint``, or of what
                ``"mc"`` samples from.
            generator: Source of the draws; by default the same draws in every call.
            fitting: For reward modelling, predict as in the fit, a classification of pairs.
            **model_kwargs: Passed to the model's forward pass with ``"nn"`` and ``"linearized"``.

        Returns:
            Class probabilities ``[N, C]``, or means of other targets, such as counts; for regression (and reward
            modelling) the mean and the epistemic (co)variance, without observation noise. A model with outputs ``[N]``
            has C = 1. No inputs, ``x[:0]``, have predictions of no rows.
        """
        _checks.whole(n_samples, "n_samples")
        native = self._native_or_prior(x)
        self._check_model()
        pred_type, link = predictions.checked_pred_type(pred_type), plain(link_approx)
        regression = self._is_regression(fitting)
        with self._gradient_mode() as with_gradients:
            if pred_type == "glm":
                if model_kwargs:
                    raise TypeError(
                        f"Extra model arguments are for pred_type 'nn' and 'linearized', got {sorted(model_kwargs)} "
                        "with 'glm'. Wrap the model in a module that knows them, and fit that."
                    )
                link = link or self.link or native.likelihood.links[0]
                native.likelihood.check_link(link)
                if regression:
                    predicted: Any = predictions.moments(
                        native, x, joint=joint, diagonal_output=diagonal_output, with_gradients=with_gradients
                    )  # fmt: skip
                else:
                    draws = generator or torch.Generator().manual_seed(self.seed)
                    predicted = predictions.integrated(
                        native, x, link, n_samples, diagonal_output, draws, with_gradients, self.top_k
                    )  # fmt: skip
                if self.fitted is not None:
                    self._check_reduction()
                return predicted
            if link not in (None, "mc"):
                raise ValueError(
                    'Samples have no link approximation: expected link_approx="mc" or none with '
                    f"pred_type={pred_type!r}, got {link!r}."
                )
            samples = self._output_samples(native, x, pred_type, n_samples, generator, model_kwargs)
            if regression:
                return samples.mean(0), samples.var(0) if samples.numel() else samples[0]
            return predictions.linked(native, samples).mean(0)

    def _native_or_prior(self, x: Any) -> Laplace:
        """The native posterior; before a fit that of no data, of a network that the inputs tell, and a warning."""
        if not self._is_prior:
            return self.native
        warn_the_caller(
            "There was no fit: this is the prediction of the prior. Call fit(train_loader) for the posterior's."
        )
        return self._made_of(
            predictions.prior_alone(self.model, self.selection, x, self.feature_reduction)
        )  # fmt: skip

    @contextmanager
    def _gradient_mode(self) -> Iterator[bool]:
        """Gradients only with :attr:`enable_backprop`, and never where the caller wants none; no inference tensors."""
        wanted = self.enable_backprop and torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(wanted), full_precision():
            yield self.enable_backprop

    def _is_regression(self, fitting: bool = False) -> bool:
        return self.likelihood == "regression" or (self.likelihood == REWARD_MODELING and not fitting)

    def _glm_predictive_distribution(
        self, X: Any, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        return predictions.moments(
            self.native, X, joint=joint, diagonal_output=diagonal_output, with_gradients=self.enable_backprop
        )

    def _output_samples(
        self, native: Laplace, x: Any, pred_type: str, n_samples: int, generator: torch.Generator | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        if generator is not None:
            deviations = native.posterior.deviations(n_samples, generator)
        else:
            deviations = self._shared_deviations(native.posterior, n_samples)
        return predictions.samples_at(
            native, deviations, x, pred_type, with_gradients=self.enable_backprop, model_kwargs=model_kwargs
        )

    def _shared_deviations(self, posterior: Posterior, n_samples: int) -> Tensor:
        """Without a generator every call has the same draws: kept, since drawing costs as much as using them."""
        key, kept = (n_samples, self.seed), self._draws  # another thread may replace them
        if kept is None or kept[0] is not posterior or kept[1] != key:
            generator = torch.Generator().manual_seed(self.seed)
            kept = self._draws = posterior, key, posterior.deviations(n_samples, generator)
        return kept[2]

    def functional_samples(
        self,
        x: Any,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples of the outputs, in their own units, whatever :attr:`output_temperature` is.

        Args:
            x: Inputs.
            pred_type: As in a prediction. Samples of ``"glm"`` have each input's own Gaussian and share their draws
                between inputs; those of ``"nn"`` and ``"linearized"`` are functions, joint over all inputs.
            n_samples: S.
            diagonal_output: Leave out the covariances between outputs (``"glm"``).
            generator: Source of the draws; by default the next of this object's own.

        Returns:
            ``[S, N, C]``.
        """
        self._check_model()
        return self._functional_samples(x, pred_type, n_samples, diagonal_output, generator)

    def _functional_samples(
        self, x: Any, pred_type: str, n_samples: int, diagonal_output: bool, generator: torch.Generator | None
    ) -> Tensor:
        pred_type = predictions.checked_pred_type(pred_type)
        generator, native = generator or self._generator, self.native
        _checks.whole(n_samples, "n_samples")
        with self._gradient_mode() as with_gradients:
            if pred_type != "glm":
                return self._output_samples(native, x, pred_type, n_samples, generator)
            return predictions.gaussian_samples(native, x, n_samples, diagonal_output, generator, with_gradients)

    def predictive_samples(
        self,
        x: Any,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The same after temperature and link: class probabilities, or a regression's outputs, ``[S, N, C]``."""
        self._check_model()
        samples = self._functional_samples(x, pred_type, n_samples, diagonal_output, generator)
        return samples if self._is_regression() else predictions.linked(self.native, samples)

    # -- tuning --------------------------------------------------------------------------------

    @full_precision()
    def optimize_prior_precision(
        self,
        pred_type: str = "glm",
        method: str = "marglik",
        n_steps: int | None = None,
        lr: float | None = None,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: str = "scalar",
        val_loader: Iterable[Any] | None = None,
        loss: Metric | Callable[..., Tensor | float] | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: str | None = None,
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
        *,
        tune_temperature: bool = False,
        tune_sigma_noise: bool = False,
        selection: str = "best",
        distributed: bool = True,
    ) -> None:
        """Choose the prior precision after the fit; on validation data also output temperature or observation noise.

        Args:
            pred_type: What the grid search predicts with: ``"glm"``, ``"nn"`` or ``"linearized"``.
            method: ``"marglik"`` or ``"gridsearch"`` (one pass over ``val_loader`` for ``"glm"``; the curve is kept in
                ``self.curve``, and what was found for several prior precisions or a temperature in ``self.tuned``).
            n_steps: Gradient steps instead of the maximum of the marginal likelihood, as in laplace-torch (Adam on the
                logarithms, 100 if only ``lr`` is given), for ``"layerwise"`` and ``"diag"`` priors of structures other
                than ``"kron"``; a warning tells how far they are from the maximum. By default, and elsewhere, the
                maximum is found.
            lr: Their learning rate, 0.1 if only ``n_steps`` is given.
            init_prior_prec: Where the search starts; with more than one entry it says the structure. A prior precision
                in which there is no maximum stays there.
            prior_structure: ``"scalar"``; ``"layerwise"``, one for each parameter tensor (``"kron"`` and the grid
                search: for each line of :meth:`coverage`); or ``"diag"``, one for each parameter (not for ``"kron"``,
                nor for the grid search). The layerwise grid search minimises the loss over all of them together,
                between the ends of the grid, with ``"glm"``, the default ``loss``, and probit; a part whose value is at
                the upper end has in effect no uncertainty.
            val_loader: Validation batches for ``"gridsearch"``.
            loss: For the grid search, as in laplace-torch: a ``torchmetrics.Metric``, updated with
                ``(probabilities, targets)`` or ``(mean, variance, targets)``, or ``(mean, targets)`` if it takes two;
                or a function of the same over all validation data at once. Each prior precision has a copy of the
                metric. By default the mean negative log predictive probability, in nats.
            log_prior_prec_min: Exponent of the grid's lower end.
            log_prior_prec_max: Exponent of its upper end.
            grid_size: Number of values.
            link_approx: Link of the grid search with ``"glm"``, probit by default; remembered as the default of
                predictions.
            n_samples: Draws for ``link_approx="mc"`` and for samples; the same for every prior precision.
            verbose: Print the result.
            progress_bar: Show a tqdm bar.
            log_prior_prec_base: Base of the exponents.
            tune_temperature: For the grid search of a likelihood with a link, with ``"glm"`` and the default ``loss``:
                choose :attr:`output_temperature` jointly with the prior. ``self.tuned.temperature_alone`` says how far
                a temperature without a posterior would have come. Otherwise the present one is used, as predictions do.
            tune_sigma_noise: For a regression, one prior precision, ``"glm"`` and the default ``loss``: choose
                :attr:`sigma_noise` jointly with the prior, with the ratios between outputs as they are.
                ``"marglik"`` maximises over both. The grid is of prior precisions at the network's own mean squared
                error as noise variance, so that nothing depends on the units of the targets; those of ``self.curve``
                are at the best noise of each.
            selection: For the grid search with ``"glm"`` and the default ``loss``: ``"best"``, or
                ``"one_standard_error"``, the smallest prior precision whose loss is within one standard error of the
                best. Together with ``tune_temperature`` and ``link_approx="mean_field"`` it keeps uncertainty for data
                that are unlike the validation data (docs/results.md).

            distributed: For the grid search, whether the processes of an initialised group of ``torch.distributed``
                tune together, each with its shard of the data; otherwise every process for itself.

        Raises:
            ValueError: If an argument has no meaning; the prior precision stays.

        Warns:
            UserWarning: If the best value lies at an edge of the grid (with several, any of them at the lower edge), or
                the validation data do not determine it: then the temperature is the one nearest to 1, and a prior
                precision the smallest, of those that are equally good (within 1e-6 nats); if ``n_steps`` do not reach
                the maximum of the marginal likelihood, or there is none in some of them; if predictions with the
                maximum of the marginal likelihood are far less certain on training data than the network is right
                about them (not after :meth:`load`, which brings no data); if the :attr:`temperature` is not one, at
                which there is no marginal likelihood.
        """
        self._require_fit()
        self._check_model(thorough=True)
        pred_type, method = predictions.checked_pred_type(pred_type), plain(method)
        structure, link = plain(prior_structure), plain(link_approx)
        if structure not in tuning.PRIOR_STRUCTURES:
            raise ValueError(f"Expected prior_structure out of {list(tuning.PRIOR_STRUCTURES)}, got {structure!r}.")
        if tune_sigma_noise:
            tuning.check_noise_search(self.output_likelihood, pred_type, method, structure, loss, selection)
        if method == "marglik":
            if tune_temperature:
                raise ValueError(
                    "The marginal likelihood does not depend on the output temperature: expected method='gridsearch' "
                    "with tune_temperature=True, got 'marglik'."
                )
            tuning.warn_of_unused_validation_data(val_loader)
            warn_of_no_evidence(self.temperature)
            if tune_sigma_noise:
                self.prior_precision, level = tuning.noise_by_marginal_likelihood(self.native, init_prior_prec)
                self.sigma_noise = self._noise_of_level(level)
            else:
                self.prior_precision = tuning.by_marginal_likelihood(
                    self.native, init_prior_prec, structure, self.hessian_structure == "kron", self._n_chosen or 0,
                    n_steps, lr, self._float_dtype, progress_bar,
                )  # fmt: skip
            self.tuned = None
            if (complaint := tuning.lack_of_certainty(self.native, self.prior_precision, self.sigma_noise)) is not None:
                warn_the_caller(complaint)
        elif method == "gridsearch":
            if val_loader is None:
                raise ValueError("Expected a val_loader with validation batches for method='gridsearch', got None.")
            grid = tuning.checked_grid(log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base)
            search = tuning.GridSearch(
                pred_type, link, structure, loss, grid, n_samples, tune_temperature, tune_sigma_noise, selection
            )
            with (  # a loader's order, and metrics, may draw
                together("tune", wanted=distributed) as ranks, global_random_state(), torch.no_grad(),
            ):  # fmt: skip
                native = self.native
                agree(native.posterior, native.likelihood, replace(search, loss=None), type(loss).__name__)
                if ranks.size > 1 and (pred_type != "glm" or loss is not None):  # a loss of the user's is of all data
                    shard = _data.Shard(val_loader)
                    mine = _data.of_this_process(val_loader, shard, self.native.targets_key)
                    val_loader = list(ranks.rounds(mine))
                    shard.check(ranks)
                tuned = search.on(self.native, val_loader, self.likelihood == "regression", progress_bar)
            self.curve = tuned.curve
            if tuned.noise_variance is not None:
                self.sigma_noise = self._noise_of_level(tuned.noise_variance**0.5)
            if pred_type == "glm":
                self.link = self.curve.link
            self.prior_precision = (
                priors_of_parts(tuned.prior_precisions, self.posterior) if search.is_joint else self.curve.best
            )
            if search.is_joint:
                self.output_temperature = tuned.temperature
            self.tuned = tuned if search.is_joint else None
        else:
            raise ValueError(f"Expected method 'marglik' or 'gridsearch', got {method!r}.")
        if verbose:
            and_temperature = f", output temperature {self.output_temperature:.4g}" if tune_temperature else ""
            print(f"Optimized prior precision is {self.prior_precision}{and_temperature}.")

    def _noise_of_level(self, level: float) -> Tensor:
        """Standard deviations with a geometric mean, and the ratios between outputs that they have."""
        return self.sigma_noise.detach().double() * (level / noise.level(self.sigma_noise.detach()))

    # -- states, files, copies and pickles -----------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs; tensors and plain Python objects only."""
        self._require_fit()
        self._check_model(thorough=True)
        return state.state_of(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a fit of the same model, with its settings.

        Raises:
            ValueError: If the state is of another format, structure, subset, likelihood or model; it says what differs,
                and this object stays as it was.
        """
        state.check_state(state_dict, self)
        fitted = Fit.restore(self.model, state_dict["fit"])
        state.check_parameters(state_dict, list(fitted.network.shapes), self)
        before = self._prior_precision, self._prior_mean
        self._prior_precision, self._prior_mean = (
            state_dict[key].to(self._device, copy=True) for key in ("prior_precision", "prior_mean")
        )
        try:
            self._adopt(fitted, state_dict["noise_profile"])
        except BaseException:
            self._prior_precision, self._prior_mean = before
            raise
        for key in state.TAKEN_OVER:
            setattr(self, key, state_dict[key])
        self.output_temperature = state_dict.get("output_temperature", 1.0)  # earlier states have neither
        self.feature_reduction = state_dict.get("feature_reduction")

    def save(self, path: str | Path) -> None:
        """Write everything but the model and the data to one safetensors file, with a JSON header.

        The header says what :func:`load` has to know: class, structure, shapes, fingerprints of the weights, number of
        data, seed, and versions. A file is written as a whole or not at all.
        """
        self._require_fit()
        self._check_model(thorough=True)
        _store.write(path, state.state_of(self), state.header_of(self))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, likelihood: Likelihood | None = None) -> Any:
        """Read what :meth:`save` wrote, as an object of the class that wrote it.

        Args:
            path: The file.
            model: The model that it was fitted to, with its weights.
            likelihood: The likelihood, if it was one of your own.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is of another kind, class, or model; it says what differs.
        """
        header = _store.read_header(path)
        with _store.understood(path):
            written_from = state.check_header(path, header, DebiasedLaplace._classes, cls, likelihood)
            _store.check_model(path, header, model)
            state.check_likelihood_of_file(path, header, likelihood)
        stored, _ = _store.read(path, next(model.parameters()).device)
        with _store.understood(path):
            la: Any = object.__new__(written_from)
            chosen = {"params": stored["parameters"]} if header["subset_of_weights"] != "last_layer" else {}
            if stored["indices"] is not None:
                chosen = {"subnetwork_indices": stored["indices"].cpu()}
            la._construct(
                model, likelihood or state.likelihood_of(header, stored), header["subset_of_weights"],
                header["hessian_structure"], **chosen,
                trainable=stored.get("trainable", stored["parameters"] if stored["indices"] is None else None),
            )  # fmt: skip
            la.load_state_dict(stored)
            return la

    def __getstate__(self) -> dict[str, Any]:
        """Everything, without what is made anew when it is asked for and without the graph of gradients."""
        kept = {**self.__dict__, "_native": None, "_draws": None, "_generator": self._generator.get_state()}
        return {name: v.detach() if isinstance(v, Tensor) and not v.is_leaf else v for name, v in kept.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._generator = torch.Generator()
        self._generator.set_state(state["_generator"].cpu())


DebiasedLaplace._classes["DebiasedLaplace"] = DebiasedLaplace


class _Made:
    """What a native posterior is made from; equal only as long as nothing was replaced or changed in place."""

    def __init__(self, objects: tuple[Any, ...], numbers: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> None:
        self.objects = (*objects, *tensors)
        #: Gradients need a new graph every time; inference tensors do not say whether they were changed.
        self.constant = not any(t.requires_grad or t.is_inference() for t in tensors)
        self.values = (*numbers, *(t._version for t in tensors)) if self.constant else ()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Made)
            and self.constant
            and other.constant
            and self.values == other.values
            and all(a is b for a, b in zip(self.objects, other.objects, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]
