"""Predictions and samples of outputs, under laplace-torch's names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from debiased_laplace import _checks, _data
from debiased_laplace.curvature.structures import Diagonal
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.laplace_torch.gaussian import GaussianLayer
from debiased_laplace.laplace_torch.settings import REWARD_MODELING, plain, restrict
from debiased_laplace.likelihoods import Bernoulli, square_root
from debiased_laplace.network.forward_mode import PlainAttention, jvp
from debiased_laplace.network.gradients import Network
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.posterior.gaussian import Posterior, standard_normals
from debiased_laplace.posterior.predictive import (
    functional_moments,
    joint_covariance,
    linearized_samples,
    weight_samples,
)

PRED_TYPES = ("glm", "nn", "linearized")


class PredictiveLayer(GaussianLayer):
    """The layer of :class:`~debiased_laplace.DebiasedLaplace` that predicts."""

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
            pred_type: ``"glm"`` (linearised), ``"nn"`` (sampled weights), or ``"linearized"`` (samples of the
                linearised network by forward mode: for many outputs).
            joint: One covariance over all inputs (regression, ``"glm"``).
            link_approx: ``"probit"``, ``"mc"``, ``"bridge"`` or ``"bridge_norm"``; by default the one used in
                tuning, or else probit.
            n_samples: Samples for ``"mc"``, ``"nn"`` and ``"linearized"``.
            diagonal_output: Variances instead of covariances: of a regression's result unless ``joint``, or of what
                ``"mc"`` samples from.
            generator: Source of the draws; by default the same draws in every call.
            fitting: For reward modelling, predict as in the fit, a classification of pairs.
            **model_kwargs: Passed to the model's forward pass with ``"nn"`` and ``"linearized"``.

        Returns:
            Class probabilities ``[N, C]``; for regression (and reward modelling) the mean and the epistemic
            (co)variance, without observation noise. A model with outputs ``[N]`` has C = 1. No inputs, ``x[:0]``, have
            predictions of no rows.
        """
        _checks.whole(n_samples, "n_samples")
        if self._is_prior:
            warnings.warn(
                "There was no fit: this is the prediction of the prior. Call fit(train_loader) for the posterior's.",
                stacklevel=2,
            )
            return self._fitted_to_nothing(x)(
                x, pred_type, joint, link_approx, n_samples, diagonal_output, generator, fitting, **model_kwargs
            )
        self._of_the_model_of_the_fit()
        pred_type, link = self._check_pred_type(pred_type), plain(link_approx)
        posterior = self.posterior
        regression = self._is_regression(fitting)
        with self._gradient_mode():
            if pred_type == "glm":
                if model_kwargs:
                    raise TypeError(
                        f"Extra model arguments are for pred_type 'nn' and 'linearized', got {sorted(model_kwargs)} "
                        "with 'glm'. Wrap the model in a module that knows them, and fit that."
                    )
                draws = generator or torch.Generator().manual_seed(self.seed)
                link = link or self.link or "probit"
                predicted = self._glm(x, posterior, regression, joint, link, n_samples, diagonal_output, draws)
                self._check_reduction()
                return predicted
            if link not in (None, "mc"):
                raise ValueError(
                    'Samples have no link approximation: expected link_approx="mc" or none with '
                    f"pred_type={pred_type!r}, got {link!r}."
                )
            samples = self._output_samples(x, pred_type, n_samples, generator, model_kwargs)
            if regression:
                return samples.mean(0), samples.var(0) if samples.numel() else samples[0]
            return self._link(samples).mean(0)

    def _fitted_to_nothing(self, x: Any) -> PredictiveLayer:
        """The same with the posterior of no data."""
        network = Network.discover(
            Snapshot(self.model, self._trainable), x, indices=self._indices,
            parameters=None if self._indices is not None else self._names, feature_reduction=self.feature_reduction,
        )  # fmt: skip
        basis = Diagonal().eigenbasis(network)
        zeros, one = torch.zeros(basis.rank, device=network.device), torch.ones(1, device=network.device)
        fixed = None if network.free is None else ~network.free
        posterior, nothing = Posterior(network.mean(), basis, zeros, 1, one.double(), fixed=fixed), torch.empty(0)
        prior = object.__new__(type(self))
        prior.__dict__.update(self.__dict__, fitted=Fit(posterior, network, 0.0, 0, nothing, nothing, None))
        return prior

    @contextmanager
    def _gradient_mode(self) -> Iterator[None]:
        """Gradients only with :attr:`enable_backprop`, and never where the caller wants none; no inference tensors."""
        wanted = self.enable_backprop and torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(wanted):
            yield

    def _is_regression(self, fitting: bool = False) -> bool:
        return self.output_likelihood.is_regression or (self.likelihood == REWARD_MODELING and not fitting)

    def _glm(
        self, x: Any, posterior: Posterior, regression: bool, joint: bool, link: str, n_samples: int,
        diagonal_output: bool, generator: torch.Generator,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        likelihood = self.output_likelihood
        likelihood.check_link(link)
        if regression:
            return self._glm_predictive_distribution(x, joint=joint, diagonal_output=diagonal_output)
        diagonal = not likelihood.needs_covariance(link)
        mean, spread = self._glm_predictive_distribution(x, diagonal_output=diagonal)
        if link == "mc" and diagonal_output:
            spread = torch.diag_embed(spread.diagonal(dim1=-2, dim2=-1))
        normals = standard_normals((n_samples, mean.shape[1]), mean, generator) if link == "mc" else None
        tau = self.output_temperature
        return likelihood.predictive(mean / tau, spread / tau**2, link, normals)

    def _glm_predictive_distribution(
        self, X: Any, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        posterior = self.posterior
        if self.enable_backprop and _data.count(X):
            return self._differentiable_distribution(X, joint, diagonal_output)
        if joint:
            mean, spread = joint_covariance(self.network, posterior, X)
        else:
            mean, spread = functional_moments(self.network, posterior, X, covariance=not diagonal_output)
        return mean, spread

    def _differentiable_distribution(self, x: Any, joint: bool, diagonal_output: bool) -> tuple[Tensor, Tensor]:
        """Through Jacobians, as laplace-torch does: differentiable in the inputs."""
        network, posterior = self.network, self.posterior
        inputs = _data.to_device(x, network.device)

        def outputs(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            found = network.call(parameters, inputs)
            return found, found

        if network.feature_reduction is None:
            by_name, mean = torch.func.jacrev(outputs, has_aux=True)(network.from_vector(posterior.mean))
        else:
            parameters = network.from_vector(posterior.mean)
            with Features(parameters) as seen:
                mean, _ = outputs(parameters)
            by_name = seen.jacobians(network, mean)
        jacobians = restrict(network.to_vector(by_name), network.free)  # [N, C, D]
        mean = mean.to(network.dtype)
        if joint:
            return mean.flatten(), self.functional_covariance(jacobians)
        if diagonal_output:
            return mean, (jacobians * self._covariance_matvec(posterior, jacobians)).sum(-1)
        return mean, self.functional_variance(jacobians)

    @staticmethod
    def _check_pred_type(pred_type: Any) -> str:
        name = plain(pred_type)
        if name not in PRED_TYPES:
            raise ValueError(f"Expected a pred_type out of {list(PRED_TYPES)}, got {name!r}.")
        return name

    def _output_samples(
        self,
        x: Any,
        pred_type: str,
        n_samples: int,
        generator: torch.Generator | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        posterior = self.posterior
        if generator is not None:
            deviations = posterior.deviations(n_samples, generator)
        else:
            deviations = self._shared_deviations(posterior, n_samples)
        if self.enable_backprop or model_kwargs:
            linearized, keywords = pred_type == "linearized", model_kwargs or {}
            return output_samples(self.network, posterior.mean, deviations, x, linearized, keywords)
        evaluate = linearized_samples if pred_type == "linearized" else weight_samples
        return evaluate(self.network, posterior.mean, deviations, x)

    def _shared_deviations(self, posterior: Posterior, n_samples: int) -> Tensor:
        """Without a generator every call has the same draws: kept, since drawing costs as much as using them."""
        key, kept = (n_samples, self.seed), self._draws  # another thread may replace them
        if kept is None or kept[0] is not posterior or kept[1] != key:
            own = torch.Generator().manual_seed(self.seed)
            kept = self._draws = posterior, key, posterior.deviations(n_samples, own)
        return kept[2]

    def _link(self, outputs: Tensor) -> Tensor:
        outputs = outputs / self.output_temperature
        return outputs.sigmoid() if isinstance(self.output_likelihood, Bernoulli) else outputs.softmax(-1)

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
        self._of_the_model_of_the_fit()
        return self._functional_samples(x, pred_type, n_samples, diagonal_output, generator)

    def _functional_samples(
        self, x: Any, pred_type: str, n_samples: int, diagonal_output: bool, generator: torch.Generator | None
    ) -> Tensor:
        pred_type = self._check_pred_type(pred_type)
        generator = generator or self._generator
        self._require_fit()
        _checks.whole(n_samples, "n_samples")
        with self._gradient_mode():
            if pred_type != "glm":
                return self._output_samples(x, pred_type, n_samples, generator)
            mean, spread = self._glm_predictive_distribution(x, diagonal_output=diagonal_output)
            normals = standard_normals((mean.shape[1], n_samples), mean, generator)
            if diagonal_output:
                return mean + (spread.sqrt()[..., None] * normals).permute(2, 0, 1)
            root, failed = torch.linalg.cholesky_ex(spread)
            if bool(failed.any()):  # semi-definite, or almost
                root = square_root(spread)
            return mean + (root @ normals).permute(2, 0, 1)

    def predictive_samples(
        self,
        x: Any,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The same after temperature and link: class probabilities, or a regression's outputs, ``[S, N, C]``."""
        self._of_the_model_of_the_fit()
        samples = self._functional_samples(x, pred_type, n_samples, diagonal_output, generator)
        return samples if self._is_regression() else self._link(samples)


def output_samples(
    network: Network, mean: Tensor, deviations: Tensor, inputs: Any, linearized: bool, model_kwargs: dict[str, Any]
) -> Tensor:
    """Outputs at ``mean + deviations``, of the network or linearised, ``[S, N, C]``; differentiable in the inputs.

    What :func:`~debiased_laplace.posterior.predictive.weight_samples` and
    :func:`~debiased_laplace.posterior.predictive.linearized_samples` do, with gradients and with further arguments of
    the model.
    """
    inputs = _data.to_device(inputs, network.device)
    parameters = network.from_vector(mean)

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return network.call(parameters, inputs, **model_kwargs)

    samples = []
    with PlainAttention() if linearized else nullcontext():
        for deviation in deviations:
            if linearized:
                value, change = jvp(outputs, parameters, network.from_vector(deviation))
                samples.append(value + change)
            else:
                samples.append(outputs(network.from_vector(mean + deviation)))
    return torch.stack(samples)


class Features(TorchFunctionMode):
    """Sees the inputs of a linear layer with given parameters, and its gradients, both with their graph.

    Args:
        parameters: Weight and bias of the layer by name.
    """

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.parameters = parameters
        self.features: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if any(p is given["weight"] for p in self.parameters.values()):
                self.features = given["input"]
        return func(*args, **kwargs)

    def jacobians(self, network: Network, outputs: Tensor) -> dict[str, Tensor]:
        """Jacobians ``[N, C, *shape]`` of the layer's outputs for reduced features."""
        assert self.features is not None
        # One datum may have been given twice.
        features = network.reduce(self.features[: len(outputs)], outputs, *self.parameters.values())
        found = {}
        for name, p in self.parameters.items():
            unit = torch.eye(len(p), dtype=features.dtype, device=features.device).expand(len(features), -1, -1)
            found[name] = unit if p.ndim == 1 else unit[..., None] * features[:, None, None]
        return found
