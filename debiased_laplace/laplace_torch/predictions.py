"""Predictions and samples of outputs of a native posterior, with laplace-torch's choices and shapes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from debiased_laplace import _data
from debiased_laplace._guards import gradients_enabled
from debiased_laplace.curvature.structures import Diagonal
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.laplace import Laplace
from debiased_laplace.laplace_torch.gaussian import covariance_matvec, functional_covariance, functional_variance
from debiased_laplace.laplace_torch.parameters import Selection, restrict
from debiased_laplace.laplace_torch.settings import plain
from debiased_laplace.likelihoods import square_root
from debiased_laplace.network.forward_mode import PlainAttention, jvp
from debiased_laplace.network.network import Network
from debiased_laplace.network.snapshot import Snapshot
from debiased_laplace.posterior.gaussian import Posterior, standard_normals
from debiased_laplace.posterior.predictive import (
    functional_moments,
    joint_covariance,
    linearized_samples,
    weight_samples,
)
from debiased_laplace.posterior.top_k import exact_outputs, say, top_k_moments

PRED_TYPES = ("glm", "nn", "linearized")


def checked_pred_type(pred_type: Any) -> str:
    """One of :data:`PRED_TYPES`, or a ``ValueError``."""
    name = plain(pred_type)
    if name not in PRED_TYPES:
        raise ValueError(f"Expected a pred_type out of {list(PRED_TYPES)}, got {name!r}.")
    return name


def prior_alone(
    model: Any, selection: Selection, inputs: Any, feature_reduction: str | None
) -> Fit:  # fmt: skip
    """The fit to no data, of a network that some inputs tell."""
    network = Network.discover(
        Snapshot(model, selection.trainable), inputs, indices=selection.indices,
        parameters=None if selection.indices is not None else selection.names, feature_reduction=feature_reduction,
    )  # fmt: skip
    basis = Diagonal().eigenbasis(network)
    zeros, one = torch.zeros(basis.rank, device=network.device), torch.ones(1, device=network.device)
    fixed = None if network.free is None else ~network.free
    posterior, nothing = Posterior(network.mean(), basis, zeros, 1, one.double(), fixed=fixed), torch.empty(0)
    return Fit(posterior, network, 0.0, 0, nothing, nothing, None)


def moments(
    native: Laplace, inputs: Any, *, joint: bool = False, diagonal_output: bool = False, with_gradients: bool = False,
    k: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean and (co)variance of the linearised outputs; with a graph they come from Jacobians, as in laplace-torch.

    Args:
        native: The posterior.
        inputs: N data.
        joint: Over all data.
        diagonal_output: Variances alone.
        with_gradients: With a graph.
        k: Outputs of a datum with exact moments; None for all.

    Returns:
        ``f: [N, C]`` and ``[N, C, C]``, with ``diagonal_output`` ``[N, C]``; ``joint``: ``[N * C]`` and
        ``[N * C, N * C]``.
    """
    if with_gradients and _data.count(inputs):
        return _differentiable_moments(native, inputs, joint, diagonal_output)
    if joint:
        return joint_covariance(native.network, native.posterior, inputs)
    if k is not None:
        mean, (moments,) = top_k_moments(
            native.network, [native.posterior], native.likelihood, inputs, k, covariance=not diagonal_output
        )  # fmt: skip
        return mean, moments
    return functional_moments(native.network, native.posterior, inputs, covariance=not diagonal_output)


def _differentiable_moments(native: Laplace, inputs: Any, joint: bool, diagonal_output: bool) -> tuple[Tensor, Tensor]:
    network, parameters = native.network, native.network.from_vector(native.posterior.mean)
    inputs = _data.to_device(inputs, network.device)
    if network.feature_reduction is None:
        # One by one: batched derivatives lose terms of the gradient in the inputs, of torch's layer norm for one.
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        wanted = torch.is_grad_enabled()
        with gradients_enabled(), PlainAttention():
            mean = network.call(leaves, inputs)
            rows = [
                torch.autograd.grad(
                    f, list(leaves.values()), create_graph=wanted, retain_graph=True, materialize_grads=True
                )
                for f in mean.flatten()
            ]
        mean = mean if wanted else mean.detach()
        stacked = (torch.stack(of_one).unflatten(0, mean.shape) for of_one in zip(*rows, strict=True))
        by_name = dict(zip(leaves, stacked, strict=True))
    else:
        with Features(parameters) as seen:
            mean = network.call(parameters, inputs)
        by_name = seen.jacobians(network, mean)
    jacobians = restrict(network.to_vector(by_name), network.free)  # [N, C, D]
    mean = mean.to(network.dtype)
    if joint:
        return mean.flatten(), functional_covariance(native, jacobians)
    if diagonal_output:
        return mean, (jacobians * covariance_matvec(native, jacobians)).sum(-1)
    return mean, functional_variance(native, jacobians)


def integrated(
    native: Laplace, inputs: Any, link: str, n_samples: int, diagonal_output: bool, generator: torch.Generator,
    with_gradients: bool, top_k: int | None,
) -> Tensor:  # fmt: skip
    """Expected targets under Gaussian outputs, ``[N, C]``: class probabilities, say."""
    likelihood, tau = native.likelihood, native.output_temperature
    diagonal, k = not likelihood.needs_covariance(link), exact_outputs(native.network, likelihood, top_k)
    if top_k is None and not with_gradients:
        say(native.network, likelihood, k)
    mean, covariance = moments(native, inputs, diagonal_output=diagonal, with_gradients=with_gradients, k=k)
    if link == "mc" and diagonal_output:
        covariance = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    normals = standard_normals((n_samples, mean.shape[1]), mean, generator) if link == "mc" else None
    return likelihood.predictive(mean / tau, covariance / tau**2, link, normals)


def samples_at(
    native: Laplace, deviations: Tensor, inputs: Any, pred_type: str, *, with_gradients: bool = False,
    model_kwargs: dict[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Outputs at deviations of the parameters ``[S, D]``, of the network or linearised, ``[S, N, C]``.

    What :func:`~debiased_laplace.posterior.predictive.weight_samples` and
    :func:`~debiased_laplace.posterior.predictive.linearized_samples` do, if need be with gradients and with further
    arguments of the model.
    """
    network, mean, linearized = native.network, native.posterior.mean, pred_type == "linearized"
    if not (with_gradients or model_kwargs):
        return (linearized_samples if linearized else weight_samples)(network, mean, deviations, inputs)
    inputs = _data.to_device(inputs, network.device)
    parameters = network.from_vector(mean)

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return network.call(parameters, inputs, **(model_kwargs or {}))

    samples = []
    with PlainAttention() if linearized else nullcontext():
        for deviation in deviations:
            if linearized:
                value, change = jvp(outputs, parameters, network.from_vector(deviation))
                samples.append(value + change)
            else:
                samples.append(outputs(network.from_vector(mean + network.without_padding(deviation))))
    return torch.stack(samples)


def gaussian_samples(
    native: Laplace, inputs: Any, n_samples: int, diagonal_output: bool, generator: torch.Generator,
    with_gradients: bool,
) -> Tensor:  # fmt: skip
    """Samples ``[S, N, C]`` of the Gaussian outputs of every datum, which share their draws."""
    mean, covariance = moments(native, inputs, diagonal_output=diagonal_output, with_gradients=with_gradients)
    normals = standard_normals((mean.shape[1], n_samples), mean, generator)
    if diagonal_output:
        return mean + (covariance.sqrt()[..., None] * normals).permute(2, 0, 1)
    root, failed = torch.linalg.cholesky_ex(covariance)
    singular = failed > 0  # semi-definite, or almost; of each datum, whatever it is batched with
    if bool(singular.any()):
        root = root.masked_scatter(singular[:, None, None], square_root(covariance[singular]))
    return mean + (root @ normals).permute(2, 0, 1)


def linked(native: Laplace, outputs: Tensor) -> Tensor:
    """What outputs ``[..., C]`` mean, after the temperature: probabilities, rates, or themselves."""
    return native.likelihood.inverse_link(outputs / native.output_temperature)


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
        jacobians = {}
        for name, p in self.parameters.items():
            unit = torch.eye(len(p), dtype=features.dtype, device=features.device).expand(len(features), -1, -1)
            jacobians[name] = unit if p.ndim == 1 else unit[..., None] * features[:, None, None]
        return jacobians
