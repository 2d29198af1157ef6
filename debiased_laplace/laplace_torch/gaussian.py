"""The Gaussian over the parameters, under laplace-torch's names."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace.laplace_torch import noise
from debiased_laplace.laplace_torch.fitting import FittingLayer
from debiased_laplace.laplace_torch.precision import KroneckerPrecision
from debiased_laplace.laplace_torch.settings import embed, restrict
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.temperature import warn_of_no_evidence, warn_the_caller

LEFT_OUT = (
    "A low rank leaves directions without curvature, so that its log marginal likelihood is too large to be compared "
    "with that of another structure or rank. Compare log_marginal_likelihood_bounds(), which makes up for them, or fit "
    "with a larger rank."
)

#: Structures whose precision is a vector.
DIAGONAL = ("diag", "isotropic")


class GaussianLayer(FittingLayer):
    """The layer of :class:`~debiased_laplace.DebiasedLaplace` that knows the Gaussian."""

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
            shape = (self._n_chosen or 0,) * (1 if self.hessian_structure in DIAGONAL else 2)
            return torch.zeros(shape, device=self._device, dtype=self._float_dtype)
        posterior = self.fitted.posterior
        return self._in_the_form_of_the_structure(posterior, posterior.n_data * posterior.curvatures.double())

    def _in_the_form_of_the_structure(self, posterior: Posterior, eigenvalues: Tensor) -> Any:
        basis, free, dtype = posterior.basis, self.network.free, self._float_dtype
        if self.hessian_structure == "kron":
            return KroneckerPrecision(basis, eigenvalues, dtype)
        if self.hessian_structure in DIAGONAL:
            return restrict(basis.lift(eigenvalues), free).to(dtype)
        columns = restrict(basis.lift(torch.eye(basis.rank, dtype=torch.float64, device=eigenvalues.device)), free).mT
        if self.hessian_structure == "lowrank":
            return columns.to(dtype), eigenvalues.to(dtype)
        return ((columns * eigenvalues) @ columns.mT).to(dtype)

    @property
    def posterior_precision(self) -> Any:
        """Posterior precision, as laplace-torch has it.

        Returns:
            ``"kron"``: a :class:`KroneckerPrecision`, with the methods of laplace-torch's ``KronDecomposed``;
            ``"diag"`` and ``"isotropic"``: ``[D]``; ``"full"``: ``[D, D]``; ``"lowrank"``: ``((U: [D, K], eigenvalues:
            [K]), prior: [D])``, of which it is ``U diag(eigenvalues) U^T + diag(prior)``. Before a fit the prior's for
            ``"diag"``, ``"isotropic"`` and ``"full"``, as in laplace-torch.
        """
        if self._is_prior:
            prior = self.prior_precision_diag
            return prior if self.hessian_structure in DIAGONAL else torch.diag(prior)
        posterior = self.posterior
        if self.hessian_structure == "kron":
            return KroneckerPrecision.of(posterior, self._float_dtype)
        if self.hessian_structure in DIAGONAL:
            return self._in_the_form_of_the_structure(posterior, posterior.precisions)
        scaled = posterior.scale * posterior.curvatures.double()
        curvature = self._in_the_form_of_the_structure(posterior, scaled)
        prior = restrict(posterior.parameter_prior, self.network.free).to(self._float_dtype)
        return (curvature, prior) if self.hessian_structure == "lowrank" else curvature + torch.diag(prior)

    @property
    def posterior_covariance(self) -> Tensor:
        """Posterior covariance ``[D, D]``, of ``"full"``."""
        self._only_for("posterior_covariance", "full")
        unit = torch.eye(self._n_chosen or 0, dtype=torch.float64, device=self._device)
        covariance = self._covariance_matvec(self.posterior, unit)
        return (0.5 * (covariance + covariance.mT)).to(self._float_dtype)

    @property
    def posterior_scale(self) -> Tensor:
        """Square root of the covariance: of ``"full"`` triangular ``[D, D]``, of ``"diag"`` its diagonal ``[D]``."""
        self._only_for("posterior_scale", "full", *DIAGONAL)
        if self.hessian_structure in DIAGONAL:
            return self.posterior_precision.rsqrt()
        return torch.linalg.cholesky(self.posterior_covariance.double()).to(self._float_dtype)

    @property
    def posterior_variance(self) -> Tensor:
        """Posterior variances ``[D]``, of ``"diag"``."""
        self._only_for("posterior_variance", *DIAGONAL)
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
        return self.fitted is None and self._names is not None and self.hessian_structure in ("full", *DIAGONAL)

    # -- the Gaussian --------------------------------------------------------------------------

    @property
    def prior_precision_diag(self) -> Tensor:
        """Prior precision of every parameter, ``[D]``."""
        prior = self.prior_precision
        if self.fitted is not None:
            whole = self.fitted.posterior.basis.per_parameter(self._core_prior(prior, self.fitted))
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
        if self.likelihood == "regression":
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
        whole = self.posterior.mean.to(value.dtype).expand(*value.shape[:-1], -1).clone()
        free = self.network.free
        whole[..., slice(None) if free is None else free] = value
        return self.posterior.square_norm(whole).to(self._float_dtype)

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
        self._of_the_model_of_the_fit()
        if prior_precision is not None:
            self.prior_precision = prior_precision
        if sigma_noise is not None:
            if self.likelihood != "regression":
                raise ValueError(
                    f"sigma_noise is only available for regression, got {sigma_noise!r} for {self.likelihood}."
                )
            self.sigma_noise = sigma_noise
        posterior = self.posterior
        warn_of_no_evidence(self.temperature)
        if not (self._told_what_is_left_out or posterior.basis.complete or posterior.left_out is None):
            if posterior.left_out_log_det[1] > 2.0:
                self._told_what_is_left_out = True
                warn_the_caller(LEFT_OUT)
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
        posterior = self.posterior
        self._check_jacobians(Js)
        return Js @ self._covariance_matvec(posterior, Js).mT

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Joint output covariance of given Jacobians, ``[N, C, D] -> [N * C, N * C]``."""
        posterior = self.posterior
        self._check_jacobians(Js)
        rows = Js.flatten(0, 1)
        return rows @ self._covariance_matvec(posterior, rows).mT

    def _covariance_matvec(self, posterior: Posterior, vector: Tensor) -> Tensor:
        """Of vectors ``[..., d]`` of the parameters that are uncertain."""
        free = self.network.free
        return restrict(posterior.covariance_matvec(embed(vector, free)), free)

    def _check_jacobians(self, Js: Tensor) -> None:
        if not isinstance(Js, Tensor) or Js.ndim != 3 or Js.shape[-1] != self._n_chosen:
            got = tuple(Js.shape) if isinstance(Js, Tensor) else type(Js).__name__
            raise ValueError(f"Invalid Jacobians shape: expected a tensor [N, C, {self._n_chosen}], got {got}.")
        if Js.device != self._device:
            raise ValueError(f"Expected Jacobians on the device of the model, {self._device}, got {Js.device}.")
