"""The drop-in class for users of laplace-torch; the only importer of ``laplace``.

Importing this module registers ``laplace.Laplace(model, likelihood, "all", "debiased_kron")``.
Argument names, shapes and return types are laplace-torch's; the mathematics is in the functional core.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from laplace import ParametricLaplace
from torch import Tensor, nn

from debiased_laplace import _checks
from debiased_laplace._guards import evaluation_mode
from debiased_laplace.basis import Basis, KroneckerBasis
from debiased_laplace.fit import Fit, fit
from debiased_laplace.gradients import Network
from debiased_laplace.likelihoods import Bernoulli, Gaussian, Likelihood, resolve_likelihood
from debiased_laplace.posterior import Posterior, standard_normals
from debiased_laplace.predictive import (
    functional_moments,
    joint_covariance,
    linearized_samples,
    weight_samples,
)
from debiased_laplace.sampling import Sampler, UniformSampler
from debiased_laplace.splits import Split, TwoBatch
from debiased_laplace.structures import Kronecker
from debiased_laplace.tuning import PriorCurve, grid_search, maximise_marginal_likelihood

logger = logging.getLogger(__name__)

STATE_FORMAT = 1
PRED_TYPES = ("glm", "nn", "linearized")


class DebiasedLaplace(ParametricLaplace):
    r"""Laplace posterior whose curvature is measured on other data than its directions.

    Args:
        model: The trained model. It is never written to: modes, gradients, hooks, buffers stay.
        likelihood: ``"classification"``, ``"regression"``, or a
            :class:`~debiased_laplace.likelihoods.Likelihood` such as ``Bernoulli()``.
        subset_of_weights: ``"all"``; leave parameters out by ``requires_grad_(False)``.
        hessian_structure: ``"kron"``.
        sigma_noise: Standard deviation of the observation noise (regression).
        prior_precision: One number, or one for each block of :meth:`coverage`.
        prior_mean: One number, or ``[D]``.
        temperature: Temperature of the likelihood.
        enable_backprop: Let predictions be differentiable in their inputs; uses Jacobians, as laplace-torch does.
        dict_key_x: Unused: a dictionary-like batch is given to the model whole.
        dict_key_y: Where dictionary-like batches have their targets.
        separate_bias: Give biases blocks of their own, as laplace-torch does; joint by default.
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

    _key = ("all", "debiased_kron")

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        subset_of_weights: str = "all",
        hessian_structure: str = "kron",
        *,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        separate_bias: bool = False,
        seed: int = 0,
        **backend: Any,
    ) -> None:
        if subset_of_weights != "all":
            raise ValueError(
                f'Expected subset_of_weights="all", got {subset_of_weights!r}. To leave parameters out, freeze them '
                "with requires_grad_(False)."
            )
        if hessian_structure != "kron":
            raise ValueError(f'Expected hessian_structure="kron", got {hessian_structure!r}.')
        unknown = set(backend) - {"backend", "backend_kwargs", "asdl_fisher_kwargs"}
        if unknown:
            raise TypeError(f"DebiasedLaplace got unexpected arguments {sorted(unknown)}.")
        if any(value is not None for value in backend.values()):
            warnings.warn("DebiasedLaplace has its own curvature: backend arguments have no effect.", stacklevel=2)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "Expected a model with trainable parameters, got none with requires_grad=True. "
                "Set requires_grad_(True) on the parameters that the posterior is about."
            )
        self.output_likelihood = resolve_likelihood(likelihood)
        _checks.positive(temperature, "temperature")
        _checks.positive(sigma_noise, "sigma_noise")
        self.fitted: Fit | None = None
        self.separate_bias = separate_bias
        self.seed = seed
        self.link: str | None = None
        self.curve: PriorCurve | None = None
        self._generator = torch.Generator().manual_seed(seed)
        self._draws: tuple[tuple[Any, ...], Tensor] | None = None  # key and deviations
        name = "regression" if self.output_likelihood.is_regression else "classification"
        super().__init__(
            model, name, sigma_noise, prior_precision, prior_mean, temperature, enable_backprop, dict_key_x, dict_key_y
        )

    def _init_H(self) -> None:  # called by the base class before a fit
        self.H = None

    # -- fitting -------------------------------------------------------------------------------

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
        structure: Kronecker | None = None,
        estimator: str = "projected",
        mc_samples: int | str | None = "auto",
        generator: torch.Generator | int | None = None,
        chunk_size: int | None = None,
    ) -> None:
        """Fit the posterior at the model's parameters; the loader is read once.

        Args:
            train_loader: Any iterable of batches ``(inputs, targets)`` or dictionaries: a DataLoader, a list,
                a generator.
            override: Fits anew; adding to an earlier fit is not supported.
            progress_bar: Show tqdm bars.
            budget: Data to spend on curvature, directions and measurement together; ``None`` for all.
            n_data: Size of the training set, if the loader's data are not it.
            split: ``TwoBatch()`` by default; ``Single()`` for the usual, biased practice.
            sampler: Instead of a uniform draw of ``budget`` data.
            structure: K-FAC with other settings.
            estimator: ``"projected"`` (equation 2) or ``"factored"`` (classical K-FAC).
            mc_samples: Random vectors for each datum; None is exact; "auto" is exact up to 32 outputs.
            generator: A CPU generator or a seed; ``seed`` by default.
            chunk_size: Data at a time; bounded by memory by default.

        Raises:
            ValueError: For an empty loader, targets that do not fit, or a prior precision of the wrong length.
            UnsupportedLayerError: If a trainable parameter is not covered; it names it and the remedy.
            NonFiniteError: If outputs or gradients are not finite; it names the layer.
        """
        if not override:
            raise NotImplementedError(
                "Adding to an earlier fit is not supported: pass all loaders' batches to one fit."
            )
        if sampler is not None and budget != 1024:
            raise ValueError("Expected either a budget or a sampler, got both. Give the budget to the sampler.")
        self.fitted = fit(
            self.model, train_loader, self.output_likelihood,
            structure=structure, sampler=sampler or UniformSampler(budget), split=split or TwoBatch(),
            estimator=estimator, mc_samples=mc_samples, n_data=n_data, prior_precision=self.prior_precision,
            separate_bias=self.separate_bias, generator=self.seed if generator is None else generator,
            chunk_size=chunk_size, targets_key=self.dict_key_y, progress_bar=progress_bar,
        )  # fmt: skip
        self._adopt(self.fitted)
        dataset = getattr(train_loader, "dataset", None)
        dataset_size = len(dataset) if isinstance(dataset, Sized) else None
        if n_data is None and dataset_size is not None and dataset_size != self.fitted.n_seen:
            logger.warning(
                "The loader gave %d data, its dataset has %d: the posterior is that of %d data. "
                "Set n_data if the training set has another size.",
                self.fitted.n_seen, dataset_size, self.fitted.n_seen,
            )  # fmt: skip

    def _adopt(self, fitted: Fit) -> None:
        self._draws = None
        self.mean = fitted.posterior.mean
        self.n_data = fitted.posterior.n_data
        self.n_outputs = fitted.network.n_outputs
        self.loss = fitted.mean_loss * self.n_data
        self.H = fitted.posterior.basis  # tells the base class that there is a fit

    @property
    def posterior(self) -> Posterior:
        """The posterior with the current prior precision, noise and temperature."""
        fitted = self._require_fit()
        return replace(
            fitted.posterior,
            prior_precision=_checks.prior_precisions(self.prior_precision, len(fitted.network.blocks))
            if not self.prior_precision.requires_grad
            else self.prior_precision.double(),
            prior_mean=self.prior_mean,
            temperature=self.temperature,
            noise_variance=self.sigma_noise.square().double(),
        )

    @property
    def network(self) -> Network:
        """The model with its curvature blocks."""
        return self._require_fit().network

    def _require_fit(self) -> Fit:
        if self.fitted is None:
            raise _checks.NotFittedError(
                "Expected a fitted posterior. Call fit(train_loader) or load_state_dict first."
            )
        return self.fitted

    def _check_H_init(self) -> None:
        self._require_fit()

    @property
    def prior_precision(self) -> Tensor:
        """One number ``[1]``, or one for each block ``[n_blocks]``."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, prior_precision: float | Tensor | Sequence[float]) -> None:
        n_blocks = None if self.fitted is None else len(self.fitted.network.blocks)
        checked = _checks.prior_precisions(prior_precision, n_blocks).to(self._device, self._float_dtype)
        if isinstance(prior_precision, Tensor) and prior_precision.requires_grad:
            checked = prior_precision.reshape(-1)
        self._posterior_scale = None
        self._prior_precision = checked

    @property
    def sigma_noise(self) -> Tensor:
        """Standard deviation of the observation noise, a scalar."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, sigma_noise: float | Tensor) -> None:
        _checks.positive(sigma_noise, "sigma_noise")
        ParametricLaplace.sigma_noise.fset(self, sigma_noise)  # type: ignore[attr-defined]

    @property
    def _float_dtype(self) -> torch.dtype:
        return self._dtype if self._dtype in (torch.float32, torch.float64) else torch.float32

    @property
    def prior_precision_diag(self) -> Tensor:
        """Prior precision of every parameter, ``[D]``."""
        return self.posterior.basis.per_parameter(self.prior_precision)

    def coverage(self) -> str:
        """A table of what curvature every trainable parameter got."""
        network = self.network
        rows = [("block", "parameters", "curvature", "size", "")]
        for block in network.blocks:
            shape = f"{block.inputs} x {block.outputs}" if block.kind == "kronecker" else f"dense {block.size}"
            if block.groups > 1:
                shape = f"{block.groups} groups of {shape}"
            rows.append((block.name, ", ".join(block.parameters), block.kind, str(block.size), shape))
        frozen = [name for name, p in self.model.named_parameters() if name not in network.shapes]
        total = sum(block.size for block in network.blocks)
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip() for row in rows
        ]
        lines.append(f"{total} of {network.n_params} trainable parameters covered by {len(network.blocks)} blocks.")
        if frozen:
            lines.append(f"Frozen and left out: {', '.join(frozen)}.")
        return "\n".join(lines)

    # -- the Gaussian --------------------------------------------------------------------------

    @property
    def log_likelihood(self) -> Tensor:
        """Log-likelihood of the training data; estimated from the data drawn, unless all were."""
        self._require_fit()
        return super().log_likelihood

    @property
    def log_det_prior_precision(self) -> Tensor:
        """Log-determinant of the prior precision."""
        return self.posterior.log_det_prior_precision

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """Log-determinant of the posterior precision."""
        return self.posterior.log_det_precision

    @property
    def log_det_ratio(self) -> Tensor:
        """Difference of the two."""
        return self.posterior.log_det_ratio

    @property
    def scatter(self) -> Tensor:
        """Square norm of mean minus prior mean under the prior precision."""
        return self.posterior.scatter()

    def square_norm(self, value: Tensor) -> Tensor:
        """Square norm of ``value - mean`` under the posterior precision."""
        return self.posterior.square_norm(value)

    @property
    def posterior_precision(self) -> Posterior:  # type: ignore[override]  # a structure of its own, as in KronLaplace
        """The posterior, whose ``matvec`` is the product with the precision."""
        return self.posterior

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the parameters, ``[n_samples, D]``; without a generator, the next of this object's own."""
        return self.posterior.sample(n_samples, generator or self._generator)

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Output covariances of given Jacobians, ``[N, C, D] -> [N, C, C]``; predictions do without Jacobians."""
        self._check_jacobians(Js)
        return Js @ self.posterior.covariance_matvec(Js).mT

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Joint output covariance of given Jacobians, ``[N, C, D] -> [N * C, N * C]``."""
        self._check_jacobians(Js)
        rows = Js.flatten(0, 1)
        return rows @ self.posterior.covariance_matvec(rows).mT

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
        """Posterior predictive.

        Args:
            x: Inputs; moved to the model's device.
            pred_type: ``"glm"`` (linearised), ``"nn"`` (sampled weights), or ``"linearized"`` (samples of the
                linearised network by forward mode: for many outputs).
            joint: One covariance over all inputs (regression, ``"glm"``).
            link_approx: ``"probit"``, ``"mc"``, ``"bridge"`` or ``"bridge_norm"``; by default the one used in
                tuning, or else probit.
            n_samples: Samples for ``"mc"``, ``"nn"`` and ``"linearized"``.
            diagonal_output: Variances instead of covariances (regression, ``"glm"``).
            generator: Source of the draws; by default the same draws in every call.
            fitting: Unused.
            **model_kwargs: Not supported.

        Returns:
            Class probabilities ``[N, C]``; for regression the mean and the epistemic (co)variance.
        """
        if model_kwargs:
            raise TypeError(f"Extra model arguments are not supported, got {sorted(model_kwargs)}. Wrap the model.")
        self._check_pred_type(pred_type)
        likelihood = self.output_likelihood
        with torch.inference_mode(False):
            if pred_type == "glm":
                draws = generator or torch.Generator().manual_seed(self.seed)
                return self._glm(x, joint, link_approx or self.link or "probit", n_samples, diagonal_output, draws)
            if link_approx not in (None, "mc"):
                raise ValueError(
                    'Samples have no link approximation: expected link_approx="mc" or none with '
                    f"pred_type={pred_type!r}, got {link_approx!r}."
                )
            samples = self._output_samples(x, pred_type, n_samples, generator)
            if likelihood.is_regression:
                return samples.mean(0), samples.var(0)
            return self._link(samples).mean(0)

    def _glm(
        self, x: Any, joint: bool, link: str, n_samples: int, diagonal_output: bool, generator: torch.Generator
    ) -> Tensor | tuple[Tensor, Tensor]:
        likelihood, posterior = self.output_likelihood, self.posterior
        likelihood.check_link(link)
        if likelihood.is_regression:
            return self._glm_predictive_distribution(x, joint=joint, diagonal_output=diagonal_output)
        if self.enable_backprop:
            mean, spread = self._glm_predictive_distribution(x)
            spread = spread if likelihood.needs_covariance(link) else spread.diagonal(dim1=1, dim2=2)
        else:
            mean, spread = functional_moments(self.network, posterior, x, covariance=likelihood.needs_covariance(link))
        if link == "mc" and diagonal_output:
            spread = torch.diag_embed(spread.diagonal(dim1=-2, dim2=-1))
        normals = standard_normals((n_samples, mean.shape[1]), mean, generator) if link == "mc" else None
        return likelihood.predictive(mean, spread, link, normals)

    def _glm_predictive_distribution(
        self, X: Any, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.enable_backprop:  # differentiable in the inputs: the base class's Jacobians
            self._require_fit()
            missing = not hasattr(self.model, "output_size")
            if missing:
                self.model.output_size = self.n_outputs  # type: ignore[assignment]
            try:
                with evaluation_mode(self.model):
                    return super()._glm_predictive_distribution(X, joint=joint, diagonal_output=diagonal_output)
            finally:
                if missing:
                    del self.model.output_size
        if joint:
            return joint_covariance(self.network, self.posterior, X)
        return functional_moments(self.network, self.posterior, X, covariance=not diagonal_output)

    @staticmethod
    def _check_pred_type(pred_type: str) -> None:
        if pred_type not in PRED_TYPES:
            raise ValueError(f"Expected a pred_type out of {list(PRED_TYPES)}, got {pred_type!r}.")

    def _output_samples(self, x: Any, pred_type: str, n_samples: int, generator: torch.Generator | None) -> Tensor:
        evaluate = linearized_samples if pred_type == "linearized" else weight_samples
        posterior = self.posterior
        if generator is not None:
            return evaluate(self.network, posterior.mean, posterior.deviations(n_samples, generator), x)
        # Without a generator every call has the same draws: they are kept, since drawing costs as much as using them.
        numbers = (*posterior.prior_precision.tolist(), float(self.sigma_noise), float(self.temperature))
        key = (n_samples, self.seed, numbers)
        if self._draws is None or self._draws[0] != key:
            own = torch.Generator().manual_seed(self.seed)
            self._draws = key, posterior.deviations(n_samples, own)
        return evaluate(self.network, posterior.mean, self._draws[1], x)

    def _link(self, outputs: Tensor) -> Tensor:
        if isinstance(self.output_likelihood, Gaussian):
            return outputs
        return outputs.sigmoid() if isinstance(self.output_likelihood, Bernoulli) else outputs.softmax(-1)

    def functional_samples(
        self,
        x: Any,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples of the outputs, ``[n_samples, N, C]``."""
        self._check_pred_type(pred_type)
        generator = generator or self._generator
        if pred_type != "glm":
            return self._output_samples(x, pred_type, n_samples, generator)
        mean, covariance = self._glm_predictive_distribution(x)
        return self._glm_functional_samples(
            mean, covariance, n_samples, diagonal_output, generator if generator.device == mean.device else None
        )

    def predictive_samples(
        self,
        x: Any,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples of the predictive (class probabilities, or outputs of a regression), ``[n_samples, N, C]``."""
        return self._link(self.functional_samples(x, pred_type, n_samples, diagonal_output, generator))

    # -- tuning --------------------------------------------------------------------------------

    def optimize_prior_precision(
        self,
        pred_type: str = "glm",
        method: str = "marglik",
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: str = "scalar",
        val_loader: Iterable[Any] | None = None,
        loss: Any = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: str = "probit",
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
    ) -> None:
        """Choose the prior precision after the fit.

        Args:
            pred_type: ``"glm"``.
            method: ``"marglik"`` (closed form) or ``"gridsearch"`` (the whole grid in one pass over ``val_loader``;
                the curve is kept in ``self.curve``).
            n_steps: Unused: the marginal likelihood is maximised exactly.
            lr: Unused, likewise.
            init_prior_prec: Unused, likewise.
            prior_structure: ``"scalar"``, or ``"layerwise"`` for one prior precision for each block (``"marglik"``).
            val_loader: Validation batches for ``"gridsearch"``.
            loss: Not supported: the loss is the negative log predictive probability.
            log_prior_prec_min: Exponent of the grid's lower end.
            log_prior_prec_max: Exponent of its upper end.
            grid_size: Number of values.
            link_approx: Link of the grid search; remembered as the default of predictions.
            n_samples: Draws for ``link_approx="mc"``.
            verbose: Print the result.
            progress_bar: Show a tqdm bar.
            log_prior_prec_base: Base of the exponents.

        Warns:
            UserWarning: If the best value lies at an edge of the grid.
        """
        posterior = self.posterior
        if method == "marglik":
            if prior_structure not in ("scalar", "layerwise"):
                raise ValueError(
                    "Expected prior_structure 'scalar' or 'layerwise' (one for each block), got "
                    f"{prior_structure!r}: one for each parameter does not commute with a Kronecker basis."
                )
            if val_loader is not None:
                warnings.warn(
                    "val_loader has no effect with method='marglik'. Did you mean 'gridsearch'?", stacklevel=2
                )
            self.prior_precision = maximise_marginal_likelihood(posterior, per_block=prior_structure == "layerwise")
        elif method == "gridsearch":
            if val_loader is None:
                raise ValueError("Expected a val_loader with validation batches for method='gridsearch', got None.")
            if pred_type != "glm" or loss is not None:
                raise ValueError("The grid search supports pred_type='glm' and its own loss (loss=None).")
            if not grid_size >= 1 or not log_prior_prec_min <= log_prior_prec_max:
                raise ValueError(
                    f"Expected grid_size of at least 1 and log_prior_prec_min <= log_prior_prec_max, got {grid_size}, "
                    f"{log_prior_prec_min} and {log_prior_prec_max}."
                )
            grid = torch.logspace(
                log_prior_prec_min, log_prior_prec_max, grid_size, base=log_prior_prec_base, dtype=torch.float64
            )
            self.curve = grid_search(
                self.network, posterior, self.output_likelihood, val_loader, grid, link=link_approx,
                n_samples=n_samples, seed=self.seed, targets_key=self.dict_key_y, progress_bar=progress_bar,
            )  # fmt: skip
            self.link = link_approx
            self.prior_precision = self.curve.best
        else:
            raise ValueError(f"Expected method 'marglik' or 'gridsearch', got {method!r}.")
        if verbose:
            print(f"Optimized prior precision is {self.prior_precision}.")

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs; tensors and plain Python objects only."""
        fitted, posterior = self._require_fit(), self.posterior
        network = fitted.network
        return {
            "format": STATE_FORMAT,
            "cls_name": type(self).__name__,
            "likelihood": type(self.output_likelihood).__name__,
            "network": network.description(),
            "mean": posterior.mean.clone(),
            "basis": [(part.outputs.clone(), part.inputs.clone()) for part in posterior.basis.parts],
            "curvatures": posterior.curvatures.clone(),
            "n_data": posterior.n_data,
            "n_seen": fitted.n_seen,
            "mean_loss": fitted.mean_loss,
            "direction_indices": fitted.direction_indices,
            "curvature_indices": fitted.curvature_indices,
            "mc_samples": fitted.mc_samples,
            "prior_precision": self.prior_precision.detach().clone(),
            "prior_mean": self.prior_mean.clone(),
            "sigma_noise": self.sigma_noise.detach().clone(),
            "temperature": self.temperature,
            "separate_bias": self.separate_bias,
            "seed": self.seed,
            "link": self.link,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a fit of the same model.

        Raises:
            ValueError: If the state is of another format, class, likelihood or model; it says what differs.
        """
        for key, own in (
            ("format", STATE_FORMAT),
            ("cls_name", type(self).__name__),
            ("likelihood", type(self.output_likelihood).__name__),
        ):
            if state_dict.get(key) != own:
                raise ValueError(f"Expected a state with {key} {own!r}, got {state_dict.get(key)!r}.")
        network = Network.restore(self.model, state_dict["network"])
        mean = state_dict["mean"].to(network.device)
        if not torch.equal(mean, network.mean()):
            raise ValueError(
                "Expected the state of a model with the same weights; they differ by up to "
                f"{float((mean - network.mean()).abs().max()):.3g}. Load the model's own weights first."
            )
        parts = [
            KroneckerBasis(outputs.to(network.device), inputs.to(network.device))
            for outputs, inputs in state_dict["basis"]
        ]
        posterior = Posterior(
            mean, Basis(network.blocks, network.shapes, parts), state_dict["curvatures"].to(network.device),
            state_dict["n_data"], _checks.prior_precisions(state_dict["prior_precision"]).to(network.device),
        )  # fmt: skip
        self.fitted = Fit(
            posterior, network, state_dict["mean_loss"], state_dict["n_seen"], state_dict["direction_indices"],
            state_dict["curvature_indices"], state_dict["mc_samples"],
        )  # fmt: skip
        self._adopt(self.fitted)
        self.prior_precision = state_dict["prior_precision"]
        self.prior_mean = state_dict["prior_mean"]
        self.sigma_noise = state_dict["sigma_noise"]
        self.temperature = state_dict["temperature"]
        self.separate_bias, self.seed, self.link = (state_dict[key] for key in ("separate_bias", "seed", "link"))
