"""Construction and settings, under laplace-torch's names."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from laplace import ParametricLaplace
from laplace.curvature import EFInterface, GGNInterface
from torch import Tensor, nn

from debiased_laplace import _checks
from debiased_laplace.curvature.basis import KroneckerBasis
from debiased_laplace.curvature.structures import Diagonal, Full, Isotropic, Kronecker, LowRank, Structure
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.laplace_torch import noise, subset
from debiased_laplace.likelihoods import Categorical, Likelihood, resolve_likelihood
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.joint import TunedPrior
from debiased_laplace.posterior.tuning import PriorCurve

STRUCTURES: dict[str, type[Structure]] = {
    "kron": Kronecker, "lowrank": LowRank, "diag": Diagonal, "full": Full, "isotropic": Isotropic,
}  # fmt: skip
REWARD_MODELING = "reward_modeling"


def plain(name: Any) -> Any:
    """The string that an enumeration of laplace-torch stands for; anything else as it is."""
    return getattr(name, "value", name)


class SettingsLayer(ParametricLaplace):
    """The lowest layer of :class:`~debiased_laplace.DebiasedLaplace`."""

    #: What the last search saw, if it was one for several prior precisions or for a temperature.
    tuned: TunedPrior | None = None
    _output_temperature: float = 1.0  # defaults of the class: what was pickled earlier has none of them
    feature_reduction: str | None = None
    _trainable: list[str] | None = None  # before the first look at the model
    _told_what_is_left_out: bool = False  # of the log marginal likelihood of the present fit

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        subset_of_weights: str,
        hessian_structure: str,
        sigma_noise: float | Tensor,
        prior_precision: float | Tensor,
        prior_mean: float | Tensor,
        temperature: float,
        enable_backprop: bool,
        dict_key_x: str,
        dict_key_y: str,
        backend: type | None,
        backend_kwargs: dict[str, Any] | None,
        asdl_fisher_kwargs: dict[str, Any] | None,
        params: Sequence[str] | str | None,
        last_layer_name: str | None,
        subnetwork_indices: Tensor | None,
        separate_bias: bool | None,
        seed: int,
        feature_reduction: str | None,
    ) -> None:
        _checks.seed(seed)
        self.subset_of_weights = _choice(subset_of_weights, subset.SUBSETS, "subset_of_weights")
        self.hessian_structure = _choice(hessian_structure, list(STRUCTURES), "hessian_structure")
        self.feature_reduction = subset.feature_reduction(self.subset_of_weights, plain(feature_reduction))
        #: Names of the parameters that were trainable then; what is frozen later, for serving say, stays in.
        self._trainable = list(subset.trainable(model, self._trainable))
        every = self._every(model)
        names, self._indices = subset.chosen_parameters(
            model, every, self.subset_of_weights, params, last_layer_name, subnetwork_indices
        )
        if self._indices is not None and self.hessian_structure == "kron":
            raise ValueError(
                "Expected subnetwork_indices that cover whole parameter tensors with hessian_structure='kron', got "
                f"some of {names} in part. Use 'diag', 'full' or 'lowrank', or choose tensors with params=[...]."
            )
        self._backend_settings = backend_settings(backend, backend_kwargs, asdl_fisher_kwargs)
        self.likelihood = likelihood
        self.fitted: Fit | None = None
        self.separate_bias = separate_bias
        self.seed = seed
        self.link: str | None = None
        self.curve: PriorCurve | None = None
        self._last_layer_name = last_layer_name
        self._noise_profile: Tensor | None = None
        self._posterior: Any = None  # what it was made from, and it
        self._generator = torch.Generator().manual_seed(seed)
        self._draws: tuple[Posterior, tuple[int, int], Tensor] | None = None
        self._sizes: dict[str, int] | None = {name: p.numel() for name, p in every.items()}
        self._names: list[str] | None = None
        super().__init__(
            model, self.likelihood, 1.0, 1.0, 0.0, temperature, enable_backprop, dict_key_x, dict_key_y,
            backend if _is_known(backend) else None, backend_kwargs, asdl_fisher_kwargs,
        )  # fmt: skip
        self._choose(names)
        self.likelihood = likelihood  # the base class knows names alone
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean
        self.sigma_noise = sigma_noise
        self.mean = self.prior_mean

    def _choose(self, names: Sequence[str] | None) -> None:
        """What the posterior is about; None until a forward pass tells which is the last layer."""
        every = self._every(self.model)
        self._names = None if names is None else list(names)
        self._sizes = None if names is None else {name: every[name].numel() for name in names}
        if self._indices is not None:  # of some of their entries
            counts = subset.entry_counts({name: p.numel() for name, p in every.items()}, self._indices)
            self._sizes = {name: count for name, count in counts.items() if count}
        if self.subset_of_weights == "subnetwork":  # laplace-torch counts all parameters there
            self.params = list(every.values())
        else:
            self.params = [every[name] for name in self._names or ()]
        known = self._names is not None
        self.n_params = sum(p.numel() for p in self.params) if known else None  # type: ignore[assignment]
        self.n_layers = len(self.params) if known else None  # type: ignore[assignment]

    def _every(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """All parameters that were trainable at first, by name."""
        return subset.trainable(model, self._trainable)

    @property
    def _n_chosen(self) -> int | None:
        return None if self._sizes is None else sum(self._sizes.values())

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
        self._likelihood = "regression" if self.output_likelihood.is_regression else "classification"

    @property
    def prior_precision(self) -> Tensor:
        """One number ``[1]``, one for each line of :meth:`coverage`, each parameter tensor, or each parameter."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, prior_precision: float | Tensor | Sequence[float]) -> None:
        if isinstance(prior_precision, (int, float)):  # in double precision whatever the default is
            prior_precision = torch.tensor(float(prior_precision), dtype=torch.float64)
        checked = _checks.prior_precisions(prior_precision)
        self._check_prior(checked)
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
        number = isinstance(prior_mean, (int, float)) and not isinstance(prior_mean, bool)
        if not number and not isinstance(prior_mean, Tensor):
            raise ValueError(f"Expected a prior mean that is a number or a tensor, got {prior_mean!r}.")
        mean = torch.as_tensor(prior_mean, dtype=torch.float64).detach()
        if mean.ndim > 1 or not bool(mean.isfinite().all()):
            raise ValueError(
                f"Expected a prior mean of finite numbers with at most one dimension, got shape {tuple(mean.shape)}."
            )
        if mean.ndim == 1 and self._n_chosen is not None and len(mean) not in (1, self._n_chosen):
            raise ValueError(
                f"Expected a prior mean that is one number, or one for each of the {self._n_chosen} parameters, got "
                f"{len(mean)}."
            )
        self._prior_mean = mean.to(self._device, self._float_dtype, copy=True)

    @property
    def sigma_noise(self) -> Tensor:
        """Standard deviation of the observation noise: a scalar, or ``[C]``."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, sigma_noise: float | Tensor) -> None:
        sigma = noise.standard_deviation(sigma_noise, self._device, self._float_dtype)
        if self.likelihood != "regression" and bool((sigma.detach() != 1).any()):
            raise ValueError(
                f"sigma_noise other than one is only available for regression, got {sigma.tolist()} for "
                f"{self.likelihood}. To scale another likelihood use temperature."
            )
        if self.fitted is not None:
            noise.check_profile(sigma, self._noise_profile, self.n_outputs)
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
        if self.likelihood == "regression" and number != 1:
            raise ValueError(
                f"A regression has no link, and so no output temperature: expected 1, got {number:g}. To scale its "
                "posterior use temperature, or sigma_noise."
            )
        self._output_temperature = number

    @property
    def _float_dtype(self) -> torch.dtype:
        return self._dtype if self._dtype in (torch.float32, torch.float64) else torch.float32

    # -- prior precisions ----------------------------------------------------------------------

    @property
    def _separates_bias(self) -> bool:
        """Whether the next fit gives biases blocks of their own."""
        if self.separate_bias is not None:
            return self.separate_bias
        n_given = len(self.prior_precision)  # of a last layer that is not known yet: of its weight and its bias
        return self.hessian_structure == "kron" and n_given > 1 and n_given == len(self._sizes or range(2))

    def _check_prior(self, prior: Tensor) -> None:
        """Raise a ``ValueError`` for prior precisions that can have no meaning, as far as is known."""
        length = len(prior)
        if length == 1 or self._sizes is None:
            return
        if self.fitted is not None:
            self._core_prior(prior, self.fitted)
            return
        n_tensors, per_parameter = len(self._sizes), self.hessian_structure != "kron"
        if length > n_tensors and not (per_parameter and length == self._n_chosen):
            raise ValueError(
                f"Expected one prior precision, or one for each of the {n_tensors} parameter tensors"
                + (f" or of the {self._n_chosen} parameters" if per_parameter else "") + f", got {length}."
                + ("" if per_parameter else _MIXED)
            )  # fmt: skip

    def _core_prior(self, prior: Tensor, fitted: Fit) -> Tensor:
        """What the posterior takes: one prior precision, one for each part of the basis, or one for each parameter.

        Raises:
            ValueError: If the number has no meaning, or the directions mix parameters with different ones.
        """
        basis, free = fitted.posterior.basis, fitted.network.free
        sizes = [shape.numel() for shape in basis.shapes.values()]
        length, n_parts, mixed = len(prior), len(basis.parts), isinstance(basis.parts[0], KroneckerBasis)
        n_chosen = sum(sizes) if free is None else int(free.sum())
        # One for each part where the parts are the tensors, in their order.
        if length == len(sizes) > 1 and (length != n_parts or basis.groups is not None):
            prior = prior.repeat_interleave(torch.tensor(sizes, device=prior.device))
            basis.check_priors(prior)
            return prior
        if length in (1, n_parts):
            return prior
        if length == n_chosen and not mixed:
            return embed(prior, free, 1.0)
        raise ValueError(
            f"Expected one prior precision, one for each of the {n_parts} blocks that coverage() lists, or one for "
            f"each of the {len(sizes)} parameter tensors" + ("" if mixed else f" or of the {n_chosen} parameters")
            + f", got {length}." + (_MIXED if mixed and length == n_chosen else "")
        )  # fmt: skip


def embed(value: Tensor, free: Tensor | None, fill: float = 0.0) -> Tensor:
    """Entries ``[..., d]`` of the vectors ``[..., D]`` whose uncertain ones ``free`` marks; the others are constant."""
    if free is None:
        return value
    whole = value.new_full((*value.shape[:-1], len(free)), fill)
    whole[..., free] = value
    return whole


def restrict(value: Tensor, free: Tensor | None) -> Tensor:
    """Inverse of :func:`embed`."""
    return value if free is None else value[..., free]


_MIXED = " One for each parameter does not go with Kronecker directions, which mix parameters."


def _choice(value: Any, choices: Sequence[str], name: str) -> str:
    chosen = str(plain(value)).removeprefix("debiased_")
    if chosen not in choices:
        raise ValueError(f"Expected {name} out of {list(choices)}, got {plain(value)!r}.")
    return chosen


def _is_known(backend: Any) -> bool:
    return isinstance(backend, type) and issubclass(backend, (GGNInterface, EFInterface))


def backend_settings(
    backend: Any, backend_kwargs: dict[str, Any] | None, asdl_fisher_kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    """What a backend of laplace-torch says about the curvature, as arguments of the fit; warns about the rest."""
    known = _is_known(backend)
    rest = dict(backend_kwargs or {})
    settings: dict[str, Any] = {}
    if known and issubclass(backend, EFInterface):
        settings["curvature"] = "empirical_fisher"
    elif rest.pop("stochastic", False):
        settings["mc_samples"] = rest.pop("num_samples", 1)
    if rest or asdl_fisher_kwargs or not (backend is None or known):
        warnings.warn(
            "The curvature is computed by debiased_laplace: of backend arguments only the kind (GGN or empirical "
            f"Fisher), stochastic and num_samples have an effect, not {[backend, rest, asdl_fisher_kwargs or {}]}.",
            stacklevel=4,
        )
    return settings
