"""The classes of single structures, and their places in laplace-torch's factory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from debiased_laplace.laplace_torch.laplace import DebiasedLaplace
from debiased_laplace.likelihoods import Likelihood


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
