r"""A fitted last layer as a plain module, for serving without this package.

Where one layer makes the outputs, :math:`f = W a`, and it alone is uncertain, equation (4) is a few products of
matrices of the features a, and predictions are a forward pass and those. :class:`LastLayerPredictive` is a module of
nothing else, which ``torch.export.export``, ``torch.onnx.export`` and ``torch.compile`` take for any number of data.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _data
from debiased_laplace.curvature.parts.part import Part
from debiased_laplace.laplace import Laplace
from debiased_laplace.network.blocks import Block, unflatten

__all__ = ["CannotExportError", "LastLayerPredictive"]


class CannotExportError(ValueError):
    """Predictions of this posterior are no plain module; the message says why."""


class LastLayerPredictive(nn.Module):
    r"""Predictions of a posterior over the last layer, :meth:`.Laplace.predict` as a plain module.

    ``forward`` takes what the model takes and returns a dictionary, of the attributes of :class:`.Predictive` by name:
    ``probabilities``, ``logits_mean`` and ``logits_variance`` of a classification; ``mean``, ``epistemic_variance`` and
    ``noise_variance`` of a regression or of counts; with ``covariance`` also ``outputs_covariance``. It has copies of
    the model's weights and of the posterior, as parameters that need no gradients and buffers.

    Args:
        posterior: Fitted with ``parameters="last_layer"``, and tuned.
        link: How to integrate over the outputs; that of the posterior's predictions by default. ``"mc"`` draws, and
            cannot be exported.
        covariance: Also return the covariance between the outputs of a datum.

    Raises:
        CannotExportError: If the posterior is not about a single linear layer that makes the outputs, or the link
            draws; it says what to do.

    Example:
        >>> import torch
        >>> import debiased_laplace as dl
        >>> from debiased_laplace.integrations.export import LastLayerPredictive
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        >>> x, y = torch.randn(60, 4), torch.randint(3, (60,))
        >>> posterior = dl.fit(model, [(x, y)], "classification", parameters="last_layer")
        >>> program = torch.export.export(
        ...     LastLayerPredictive(posterior), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        ... )
        >>> sorted(program.module()(x[:2]))
        ['logits_mean', 'logits_variance', 'probabilities']
    """

    variances: Tensor
    prior_variances: Tensor | None
    noise: Tensor

    def __init__(self, posterior: Laplace, *, link: str | None = None, covariance: bool = False) -> None:
        super().__init__()
        posterior.fitted.check_model()
        network = posterior.network
        self.likelihood = posterior.likelihood
        self.link = link or posterior.link or posterior.default_link
        self.likelihood.check_link(self.link)
        if self.link == "mc":
            closed = [name for name in self.likelihood.links if name != "mc"]
            raise CannotExportError(
                "Expected a link in closed form for an exported module, got 'mc', whose draws would be constants. "
                + (f"Pass link= one of {closed}." if closed else f"{self.likelihood!r} has none.")
            )
        self.output_temperature = posterior.output_temperature
        self._outputs_of = network.convention.outputs_of or _data.logits_of
        block = _only_block(posterior)
        self._block_has = block.weight, block.bias
        self.features, self.head = _split(network.snapshot.module, block)
        _check_is_linear(self.head, block, {name: network.snapshot.parameters[name] for name in block.parameters})
        for parameter in self.parameters():
            parameter.requires_grad_(False)

        form = posterior.posterior.normal_form
        basis = form.gradient_basis
        self.part = _Buffered(next(iter(basis.parts)))
        dtype = next((tensor.dtype for tensor in self.part.buffers()), network.dtype)
        (variances,) = basis.split(form.precisions.reciprocal())
        of_prior: Tensor | None = None
        if not basis.complete:  # the prior's variances of all parameters, and along the directions what is left of them
            (along,) = basis.split(form.column_prior.reciprocal())
            variances = variances - along
            of_prior = block.gather(unflatten(form.parameter_prior.reciprocal(), basis.shapes))[0].to(dtype)
        self.register_buffer("variances", variances.to(dtype))
        self.register_buffer("prior_variances", of_prior)
        self.register_buffer("noise", torch.as_tensor(form.noise_variance, dtype=network.dtype, device=network.device))
        self.returns_covariance = covariance
        self._take_what_the_model_takes()
        self.eval()

    def _take_what_the_model_takes(self) -> None:
        """Give ``forward`` the arguments of the model's: by their names exporters call inputs and dimensions."""

        def forward(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            return self.predict(*args, **kwargs)

        forward.__signature__ = inspect.signature(self.features.forward)  # type: ignore[attr-defined]
        self.forward = forward

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._take_what_the_model_takes()

    def predict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Predictions for N data, ``[N, C]`` each (:class:`.Predictive` has their units)."""
        features = self._outputs_of(self.features(*args, **kwargs))
        outputs = self.head(features).to(self.noise.dtype)  # of a model in half precision the others are in single
        needed = self.likelihood.needs_covariance(self.link)
        moments = self._moments(features, diagonal=not (needed or self.returns_covariance)).to(self.noise.dtype)
        variances = moments if moments.ndim == 2 else moments.diagonal(dim1=1, dim2=2)
        tau = self.output_temperature
        scaled = outputs / tau, (moments if needed else variances) / tau**2
        if self.likelihood.has_answers:
            result = {
                "probabilities": self.likelihood.predictive(*scaled, self.link), "logits_mean": outputs,
                "logits_variance": variances,
            }  # fmt: skip
        else:
            of_targets = self.likelihood.predictive_moments(*scaled, self.link, None, self.noise)
            result = {
                "mean": of_targets.mean, "epistemic_variance": of_targets.epistemic_variance,
                "noise_variance": of_targets.noise_variance,
            }  # fmt: skip
        return {**result, "outputs_covariance": moments} if self.returns_covariance else result

    def _moments(self, features: Tensor, *, diagonal: bool) -> Tensor:
        """Variances ``[N, C]`` of the outputs, or covariances ``[N, C, C]``, in the precision of the directions."""
        inputs = features.to(self.variances.dtype)
        ones = torch.ones_like(inputs[:, :1])
        inputs = torch.cat([part for part, has in zip((inputs, ones), self._block_has, strict=True) if has], 1)
        moments = self.part().covariances_of_last_layer(inputs, self.variances, diagonal=diagonal)
        if self.prior_variances is None:
            return moments
        of_prior = inputs.square() @ self.prior_variances.mT
        return moments + (of_prior if diagonal else torch.diag_embed(of_prior))


class _Buffered(nn.Module):
    """A part of a basis whose tensors are buffers, so that they move with the module that has them."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self._kind, self._others, self._of_field = type(part), dict[str, Any](), dict[str, list[str]]()
        for field in fields(part):
            value = getattr(part, field.name)
            if not isinstance(value, (Tensor, tuple)):
                self._others[field.name] = value
                continue
            tensors = value if isinstance(value, tuple) else (value,)
            self._of_field[field.name] = [f"{field.name}_{index}" for index in range(len(tensors))]
            for name, tensor in zip(self._of_field[field.name], tensors, strict=True):
                self.register_buffer(name, tensor.clone())
        self._tuples = {name for name in self._of_field if isinstance(getattr(part, name), tuple)}

    def forward(self) -> Part:
        """The part with these tensors."""
        tensors = {name: tuple(getattr(self, buffer) for buffer in names) for name, names in self._of_field.items()}
        given = {name: value if name in self._tuples else value[0] for name, value in tensors.items()}
        return self._kind(**self._others, **given)


def _only_block(posterior: Laplace) -> Block:
    """The block of the only layer that is uncertain, which makes the outputs."""
    network = posterior.network
    blocks = [block.name for block in network.blocks]
    if network.sites is not None:
        raise CannotExportError(
            "Expected outputs [N, C] for an exported module, got dense ones, a distribution for every site. Export the "
            "network alone, or fit one whose outputs are those of a site."
        )
    if not network.is_head:
        raise CannotExportError(
            f"Expected a posterior over the one linear layer that makes the outputs, got one over {blocks[:5]}"
            f"{', ...' if len(blocks) > 5 else ''}: variances of earlier layers need backward passes, which no "
            "exported module has. Fit with parameters='last_layer' (and without separate_bias, and with a model whose "
            "outputs are those of its last layer as they are)."
        )
    return network.blocks[0]


def _split(model: nn.Module, block: Block) -> tuple[nn.Module, nn.Module]:
    """The model without its last layer, which returns the features, and the last layer."""
    model = copy.deepcopy(model)
    places = {name.rpartition(".")[0] for name in block.parameters}
    place = places.pop()
    head = model.get_submodule(place)
    if places or list(head.children()):
        raise CannotExportError(
            f"Expected a last layer that is a module of its own, such as nn.Linear, got the parameters "
            f"{list(block.parameters)} of a {type(head).__name__} that does more. Write it as an nn.Linear inside of "
            "the model."
        )
    if not place:
        return nn.Identity(), head
    around, _, name = place.rpartition(".")
    setattr(model.get_submodule(around), name, nn.Identity())
    return model, head


def _check_is_linear(head: nn.Module, block: Block, parameters: dict[str, Tensor]) -> None:
    """Raise an error unless the last layer applies the block's weight to what it is given, and nothing else."""
    if not block.weight:
        return
    matrix = block.gather({name: tensor.detach().cpu().double() for name, tensor in parameters.items()})[0]
    weight = matrix[:, : matrix.shape[1] - block.bias]
    features = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = features @ weight.mT
    try:
        alone = copy.deepcopy(head).to("cpu", torch.float64)
        with torch.no_grad():
            actual = alone(features) - alone(torch.zeros_like(features))
        rounding = 1e-9 * float(expected.abs().max())
        same = actual.shape == expected.shape and torch.allclose(actual, expected, rtol=0, atol=rounding)
    except Exception as error:  # whatever a layer of other inputs raises
        raise _not_linear(head) from error
    if not same:
        raise _not_linear(head)


def _not_linear(head: nn.Module) -> CannotExportError:
    return CannotExportError(
        f"Expected a last layer that multiplies its input with its weight alone, got a {type(head).__name__} that does "
        "something else. Write it as an nn.Linear inside of the model."
    )
