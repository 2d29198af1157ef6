r"""The diagonal of the loss Hessian by one backward pass, as good as dropping off-diagonals makes it.

The gradient ``g`` and a diagonal curvature ``h`` of the weighted loss go backwards through a feed-forward network
together, both in the shape of a layer's output ``[N, ...]``. For a linear layer with weight W and input a, and for an
elementwise activation :math:`\sigma`,

.. math::
    h_W = \sum_n h_n (a_n \circ a_n)^\top, \quad h_b = \sum_n h_n, \quad h_a = (W \circ W)^\top h; \qquad
    h_\text{in} = h \, \sigma'^2 + g \, \sigma''.

Linear layers of all kinds are one rule: the same layer with squared weights and squared inputs is linear again, and its
ordinary backward pass is the rule above. The gradient takes the first power, the curvature the second.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debiased_laplace import _checks, _data
from debiased_laplace._guards import gradients_enabled
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.snapshot import Snapshot

APPROXIMATIONS = ("hesscale", "hesscale_gn", "becker_lecun")

#: Activations, and dropout, which does nothing in evaluation mode: their derivatives come from autograd.
ELEMENTWISE = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
    nn.AlphaDropout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout,
)  # fmt: skip
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
#: Every output is the mean of a box of inputs.
AVERAGES = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
#: Every output is one of the inputs, or a constant: derivatives are zero or one, which squares do not change.
REARRANGEMENTS = (
    nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
)  # fmt: skip
LINEAR_MAPS = (nn.Linear, *CONVOLUTIONS, *BATCH_NORMS, *AVERAGES, *REARRANGEMENTS)

_REMEDY = 'Use the diagonal with method="ggn", exact or with mc_samples: it works for any model.'


def hessian_diagonal(
    model: nn.Module | Snapshot,
    inputs: Tensor,
    targets: Tensor,
    likelihood: Likelihood,
    *,
    weights: Tensor | None = None,
    method: str = "hesscale",
    parameters: Collection[str] | None = None,
) -> dict[str, Tensor]:
    r"""Approximate diagonal of the Hessian of :math:`\sum_n w_n \ell_n` in the parameters of a feed-forward network.

    The rules are those of HesScale. With outputs f, p = softmax(f) or sigmoid(f), and y one-hot, the methods are

    * ``"hesscale"``: starts from the exact diagonal in f, p(1 - p) for categorical and Bernoulli, 1 for Gaussian. Exact
      for the last layer (without softmax the last two), and for all layers of a network of width one.
    * ``"hesscale_gn"``: the same, but :math:`g \sigma''` is left out: the Gauss-Newton variant, never negative.
    * ``"becker_lecun"``: off-diagonals are dropped inside the softmax too, the way of the baseline BL89 of HesScale's
      authors: log-softmax is an elementwise activation with :math:`\sigma' = 1 - p`, :math:`\sigma'' = p^2 - p`, below
      a loss -y without curvature. So it starts from y p(1 - p): only the datum's own class is curved. For the other
      likelihoods it is ``"hesscale"``.

    Off-diagonals between shared positions and between copies of an input (padding by reflection) are dropped as well.
    Memory is that of a forward pass over all the data; with weights given, results of batches add up.

    Args:
        model: Nested ``nn.Sequential`` of linear layers, convolutions, batch normalisation, elementwise activations,
            dropout, pooling, constant padding and (un)flattening. It is evaluated in evaluation mode, and not changed.
            Modules before the first parameter that is asked for may be anything.
        inputs: ``[N, ...]``.
        targets: What the likelihood expects, ``[N]`` or ``[N, C]``.
        likelihood: The loss :math:`\ell_n`.
        weights: w, ``[N]``, not negative; 1/N each by default.
        method: See above.
        parameters: Names of the parameters that are wanted; all trainable ones by default.

    Returns:
        For each of these parameters a tensor of its shape, in at least float32: nats by squared unit of the parameter,
        a per-datum mean for the default weights.

    Raises:
        TypeError: If inputs or targets are of the wrong type.
        ValueError: If the method, names, weights, targets or the shape of the outputs are wrong.
        NonFiniteError: If inputs, outputs, weights or the result are not finite.
        UnsupportedLayerError: If there is any other module, a parameter used twice or outside of the modules above, or
            hooks that change outputs.

    Example:
        >>> import torch
        >>> from debiased_laplace.likelihoods import Gaussian
        >>> model = torch.nn.Linear(2, 1)
        >>> hessian_diagonal(model, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1), Gaussian())
        {'weight': tensor([[ 5., 10.]]), 'bias': tensor([1.])}

    References:
        Elsayed, Farrahi, Dangel, Mahmood: Revisiting Scalable Hessian Diagonal Approximations for Applications in
        Reinforcement Learning, ICML 2024, arXiv 2406.03276; github.com/mohmdelsayed/HesScale, with the rules in
        ``hesscale/core/derivatives.py`` and ``derivatives_gn.py`` and BL89 in ``core/run/approx_quality.py``.
        Becker, LeCun: Improving the Convergence of Back-Propagation Learning with Second Order Methods, 1989.
    """
    if method not in APPROXIMATIONS:
        raise ValueError(f"Expected a method out of {list(APPROXIMATIONS)}, got {method!r}.")
    snapshot = Snapshot.of(model)
    module = snapshot.replica({})
    names, leaves = _wanted(snapshot, parameters), list(_leaves(module))
    _check_uses(names, leaves)
    with gradients_enabled():
        outputs, inner = _forward(module, leaves, inputs)
        scale = _weights(weights, outputs)
        gradient, curvature = (scale * part for part in _loss_derivatives(outputs, targets, likelihood, method))
        diagonals: dict[str, Tensor] = {}
        for (name, module), (x, shape) in zip(reversed(leaves), reversed(inner), strict=True):
            if len(diagonals) == len(names):
                break
            x, gradient, curvature = x.to(outputs.dtype), gradient.reshape(shape), curvature.reshape(shape)
            if type(module) in ELEMENTWISE:
                first, second = _elementwise_derivatives(module, x)
                curvature = curvature * first.square()
                if method != "hesscale_gn":
                    curvature = curvature + gradient * second
                gradient = gradient * first
            elif type(module) in LINEAR_MAPS and getattr(module, "running_mean", True) is not None:
                curvature, of_parameters = _vjp(module, x, curvature, power=2)
                gradient, _ = _vjp(module, x, gradient, power=1)
                diagonals.update({names[id(p)]: h for p, h in of_parameters if id(p) in names})
            else:
                raise _unsupported(name, module, "it has none, or normalises by the batch")
    for name in names.values():
        if name not in diagonals:
            raise _checks.UnsupportedLayerError(f"No supported layer has {name!r} as its weight or bias. {_REMEDY}")
        _checks.finite(diagonals[name], f"the curvature of {name!r}", "If it overflows, use float64.")
    return {name: diagonals[name] for name in names.values()}


def _wanted(model: Snapshot, parameters: Collection[str] | None) -> dict[int, str]:
    """Names of the parameters that are asked for, by identity, in the order of the model."""
    trainable = {name: model.parameters[name] for name in model.trainable}
    wanted = set(trainable if parameters is None else parameters)
    if not wanted or not wanted <= set(trainable):
        raise ValueError(f"Expected names of trainable parameters, out of {list(trainable)}, got {sorted(wanted)}.")
    return {id(p): name for name, p in trainable.items() if name in wanted}


def _leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules in the order in which nested ``nn.Sequential`` call them, with repetitions."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for key, child in zip(module._modules, module, strict=True):  # named_children() leaves out repetitions
            yield from _leaves(child, f"{name}.{key}" if name else key)
    else:
        yield name, module


def _check_uses(names: dict[int, str], leaves: list[tuple[str, nn.Module]]) -> None:
    for identity, name in names.items():
        users = [owner for owner, module in leaves if any(id(p) == identity for p in module.parameters())]
        if len(users) != 1:
            raise _checks.UnsupportedLayerError(
                f"Expected every parameter in exactly one module of an nn.Sequential, but {name!r} is in "
                f"{len(users)}{': ' if users else ''}{', '.join(users)}. {_REMEDY}"
            )


def _forward(
    model: nn.Module, leaves: list[tuple[str, nn.Module]], inputs: Tensor
) -> tuple[Tensor, list[tuple[Tensor, torch.Size]]]:
    """Outputs ``[N, C]`` in at least float32, and every module's input with the shape of its output."""
    if not isinstance(inputs, Tensor):
        raise TypeError(f"Expected inputs that are one tensor [N, ...], got {type(inputs).__name__}. {_REMEDY}")
    _checks.finite(inputs, "the inputs", "Look for NaN or infinity in the data.")
    x, inner = _data.to_device(inputs, next(model.parameters()).device), []
    with torch.no_grad():
        expected = model(x.clone())  # copies, since modules may work in place
        for _, module in leaves:
            output = module.forward(x.clone())
            inner.append((x, output.shape))
            x = output
    outputs = _data.rows(x, len(inputs)) if x.ndim < 2 else x
    if outputs.ndim != 2 or len(outputs) != len(inputs) or not outputs.numel():
        raise ValueError(f"Expected outputs [N, C], one row for each of {len(inputs)} data, got {tuple(x.shape)}.")
    _checks.finite(outputs, "the model's outputs", "Check the inputs and the weights for NaN or infinity.")
    if x.shape != expected.shape or not torch.allclose(x, expected, rtol=1e-3, atol=1e-3 * float(x.abs().max())):
        raise _unsupported("", model, "its outputs are not those of its modules in a row; look for hooks")
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32)), inner


def _weights(weights: Tensor | None, outputs: Tensor) -> Tensor:
    """Weights of the data, ``[N, 1]``."""
    n = len(outputs)
    weights = outputs.new_full((n,), 1 / n) if weights is None else torch.as_tensor(weights).detach().to(outputs)
    _checks.finite(weights, "the weights of the data", "Look at where they come from.")
    if weights.shape != (n,) or bool((weights < 0).any()):
        raise ValueError(f"Expected {n} weights, none of them negative, got {weights.tolist()}.")
    return weights[:, None]


def _loss_derivatives(outputs: Tensor, targets: Tensor, likelihood: Likelihood, method: str) -> tuple[Tensor, Tensor]:
    """Gradient and curvature of every datum's loss in the outputs, ``[N, C]`` each."""
    targets = _data.as_targets(targets, len(outputs)).to(outputs.device)
    targets = likelihood.prepare_targets(targets, outputs.shape[1])
    leaf = outputs.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood.loss(leaf, targets).sum(), leaf)
    curvature = likelihood.hessian_diagonal(outputs, targets)
    if method == "becker_lecun":
        curvature = curvature * likelihood.target_shares(outputs, targets)
    return gradient, curvature


def _elementwise_derivatives(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of an elementwise module at x."""
    leaf = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(module.forward(leaf.clone()).sum(), leaf, create_graph=True)
    if not first.requires_grad or type(module) is nn.Hardsigmoid:  # straight pieces; torch cannot do the latter twice
        return first.detach(), torch.zeros_like(first)
    (second,) = torch.autograd.grad(first.sum(), leaf, materialize_grads=True)
    return first.detach(), second


def _vjp(module: Any, x: Tensor, vector: Tensor, power: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The vector-Jacobian product of a linear map whose weights and inputs are raised to a power.

    Returns:
        The vector at the input, and pairs of the module's own parameters and the vector at them.
    """
    kind, candidates = type(module), [getattr(module, key, None) for key in ("weight", "bias")]
    parameters = [p for p in candidates if p is not None]
    powers = [p.detach().to(x.dtype).pow(power).requires_grad_() for p in parameters]
    weight, bias = (*powers, None, None)[:2]  # none of these modules has a bias alone
    if kind in BATCH_NORMS:
        mean, variance = module.running_mean.to(x.dtype), module.running_var.to(x.dtype) + module.eps
        x = x - mean.reshape(-1, *[1] * (x.ndim - 2))
    leaf = (x.detach().clone() if kind in REARRANGEMENTS else x.detach().pow(power)).requires_grad_()
    if kind is nn.Linear:
        output = F.linear(leaf, weight, bias)
    elif kind in CONVOLUTIONS:
        output = module._conv_forward(leaf, weight, bias)
    elif kind in BATCH_NORMS:
        shape = (-1, *[1] * (x.ndim - 2))
        output = leaf / variance.pow(power).sqrt().reshape(shape)
        output = output if weight is None else output * weight.reshape(shape)
        output = output if bias is None else output + bias.reshape(shape)
    else:
        output = module.forward(leaf)
    if kind in AVERAGES:
        output = output * _averaging_weight(module, x).pow(power - 1)
    at_input, *at_parameters = torch.autograd.grad(output, [leaf, *powers], vector)
    return at_input, list(zip(parameters, at_parameters, strict=True))


def _averaging_weight(module: nn.Module, x: Tensor) -> Tensor:
    """The weight that an average pooling gives to each input in an output's box, ``[1, 1, *positions]``."""
    size: Tensor | int = 1  # of the box: how many planes of the input across each dimension the output sees
    for dim, length in enumerate(x.shape[2:], 2):
        planes = torch.eye(length, dtype=x.dtype, device=x.device).unflatten(
            1, [-1 if d == dim else 1 for d in range(1, x.ndim)]
        )
        size = size * (module.forward(planes.expand(length, 1, *x.shape[2:])) != 0).sum(0)
    return module.forward(x.new_ones(1, 1, *x.shape[2:])) / size


def _unsupported(name: str, module: nn.Module, reason: str) -> _checks.UnsupportedLayerError:
    what = f"the module {name!r} of type" if name else "the model, a"
    return _checks.UnsupportedLayerError(
        f"Expected feed-forward layers that have a rule, got {what} {type(module).__name__}: {reason}. {_REMEDY}"
    )
