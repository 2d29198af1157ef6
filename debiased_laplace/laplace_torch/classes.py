"""The classes users name, and their places in laplace-torch's factory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from debiased_laplace.laplace_torch.state import StateLayer
from debiased_laplace.likelihoods import Likelihood

UNREGISTERED = "unregistered"


class DebiasedLaplace(StateLayer):
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
        dict_key_x: Unused: a dictionary-like batch is given to the model whole.
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

    def __init_subclass__(cls, **keywords: Any) -> None:
        """A subclass that does not name its own place in the factory must not take its parent's."""
        super().__init_subclass__(**keywords)
        if "_key" not in vars(cls):
            cls._key = (UNREGISTERED, f"{cls.__module__}.{cls.__qualname__}")
        StateLayer._classes[cls.__name__] = cls

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
        super().__init__(
            model, likelihood, subset_of_weights, hessian_structure, sigma_noise, prior_precision, prior_mean,
            temperature, enable_backprop, dict_key_x, dict_key_y, backend, backend_kwargs, asdl_fisher_kwargs, params,
            last_layer_name, subnetwork_indices, separate_bias, seed, feature_reduction,
        )  # fmt: skip

    @staticmethod
    def _construct(
        la: Any,
        model: nn.Module,
        likelihood: Any,
        subset_of_weights: str,
        hessian_structure: str,
        keywords: dict[str, Any],
    ) -> None:
        DebiasedLaplace.__init__(la, model, likelihood, subset_of_weights, hessian_structure, **keywords)


StateLayer._classes["DebiasedLaplace"] = DebiasedLaplace


class DebiasedKronLaplace(DebiasedLaplace):
    """K-FAC over all parameters, with the arguments of laplace-torch's ``KronLaplace``.

    Also ``laplace.Laplace(model, likelihood, "all", "debiased_kron", ...)``. For the arguments see
    :class:`DebiasedLaplace`; ``damping`` has no effect, as in laplace-torch 0.3, which loses it.
    """

    _key: ClassVar[tuple[str, str]] = ("all", "debiased_kron")
    damping: bool = False

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type | None = None,
        damping: bool = False,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        *,
        params: Sequence[str] | str | None = None,
        separate_bias: bool | None = None,
        seed: int = 0,
    ) -> None:
        self.damping = damping
        super().__init__(
            model, likelihood, "all", "kron", sigma_noise, prior_precision, prior_mean, temperature, enable_backprop,
            dict_key_x, dict_key_y, backend, backend_kwargs, asdl_fisher_kwargs, params=params,
            separate_bias=separate_bias, seed=seed,
        )  # fmt: skip


class DebiasedLowRankLaplace(DebiasedLaplace):
    """Low-rank curvature (ViViT), with the arguments of laplace-torch's ``LowRankLaplace``, the backend third.

    Also ``laplace.Laplace(model, likelihood, "all", "debiased_lowrank", ...)``. For the arguments see
    :class:`DebiasedLaplace`; the rank is an argument of the fit, ``la.fit(loader, structure=LowRank(rank=50))``.
    """

    _key: ClassVar[tuple[str, str]] = ("all", "debiased_lowrank")

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        backend: type | None = None,
        sigma_noise: float | Tensor = 1,
        prior_precision: float | Tensor = 1,
        prior_mean: float | Tensor = 0,
        temperature: float = 1,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend_kwargs: dict[str, Any] | None = None,
        *,
        params: Sequence[str] | str | None = None,
        separate_bias: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model, likelihood, "all", "lowrank", sigma_noise, prior_precision, prior_mean, temperature, enable_backprop,
            dict_key_x, dict_key_y, backend, backend_kwargs, params=params, separate_bias=separate_bias, seed=seed,
        )  # fmt: skip


class DebiasedDiagLaplace(DebiasedLaplace):
    """Diagonal curvature, with the arguments of laplace-torch's ``DiagLaplace``; it has no bias to remove.

    Also ``laplace.Laplace(model, likelihood, "all", "debiased_diag", ...)``. For the arguments see
    :class:`DebiasedLaplace`.
    """

    _key: ClassVar[tuple[str, str]] = ("all", "debiased_diag")

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
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
        separate_bias: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model, likelihood, "all", "diag", sigma_noise, prior_precision, prior_mean, temperature, enable_backprop,
            dict_key_x, dict_key_y, backend, backend_kwargs, asdl_fisher_kwargs, params=params,
            separate_bias=separate_bias, seed=seed,
        )  # fmt: skip


class DebiasedFullLaplace(DebiasedLaplace):
    """Dense curvature, with the arguments of laplace-torch's ``FullLaplace``; for small networks.

    Also ``laplace.Laplace(model, likelihood, "all", "debiased_full", ...)``. For the arguments see
    :class:`DebiasedLaplace`.
    """

    _key: ClassVar[tuple[str, str]] = ("all", "debiased_full")

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        *,
        params: Sequence[str] | str | None = None,
        separate_bias: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model, likelihood, "all", "full", sigma_noise, prior_precision, prior_mean, temperature, enable_backprop,
            dict_key_x, dict_key_y, backend, backend_kwargs, params=params, separate_bias=separate_bias, seed=seed,
        )  # fmt: skip


class DebiasedLastLayerLaplace(DebiasedLaplace):
    """Posterior over the last layer, with the arguments of laplace-torch's last-layer classes.

    Also ``laplace.Laplace(model, likelihood, "last_layer", "debiased_kron", ...)``, and ``"debiased_lowrank"``,
    ``"debiased_diag"``, ``"debiased_full"``. For the arguments see :class:`DebiasedLaplace`.
    """

    _key: ClassVar[tuple[str, str]] = ("last_layer", "debiased_kron")
    _default_structure: ClassVar[str] = "kron"
    damping: bool = False

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        feature_reduction: str | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type | None = None,
        last_layer_name: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        *,
        hessian_structure: str | None = None,
        damping: bool = False,
        separate_bias: bool | None = None,
        seed: int = 0,
    ) -> None:
        self.damping = damping
        super().__init__(
            model, likelihood, "last_layer", hessian_structure or self._default_structure, sigma_noise, prior_precision,
            prior_mean, temperature, enable_backprop, dict_key_x, dict_key_y, backend, backend_kwargs,
            asdl_fisher_kwargs, last_layer_name=last_layer_name, separate_bias=separate_bias, seed=seed,
            feature_reduction=feature_reduction,
        )  # fmt: skip

    def functional_variance_fast(self, X: Any) -> tuple[Tensor, Tensor]:
        """Means and variances of the outputs, ``[N, C]`` each; all predictions are fast here."""
        return self._glm_predictive_distribution(X, diagonal_output=True)


class DebiasedLowRankLastLayerLaplace(DebiasedLastLayerLaplace):
    """:class:`DebiasedLastLayerLaplace` with low-rank curvature."""

    _key: ClassVar[tuple[str, str]] = ("last_layer", "debiased_lowrank")
    _default_structure: ClassVar[str] = "lowrank"


class DebiasedDiagLastLayerLaplace(DebiasedLastLayerLaplace):
    """:class:`DebiasedLastLayerLaplace` with diagonal curvature."""

    _key: ClassVar[tuple[str, str]] = ("last_layer", "debiased_diag")
    _default_structure: ClassVar[str] = "diag"


class DebiasedFullLastLayerLaplace(DebiasedLastLayerLaplace):
    """:class:`DebiasedLastLayerLaplace` with dense curvature."""

    _key: ClassVar[tuple[str, str]] = ("last_layer", "debiased_full")
    _default_structure: ClassVar[str] = "full"
