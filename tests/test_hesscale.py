"""Back-propagated Hessian diagonals, against dense Hessians where they are exact and slow references elsewhere."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from debiased_laplace._checks import NonFiniteError, UnsupportedLayerError
from debiased_laplace.curvature.hesscale import (
    APPROXIMATIONS,
    AVERAGES,
    BATCH_NORMS,
    CONVOLUTIONS,
    ELEMENTWISE,
    REARRANGEMENTS,
    hessian_diagonal,
)
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from tests.networks import perturb
from tests.tolerances import EXACT, FLOAT32, assert_equal

N = 5
LIKELIHOODS: dict[str, Likelihood] = {"categorical": Categorical(), "bernoulli": Bernoulli(), "gaussian": Gaussian()}

Build = Callable[[], nn.Module]


def network(build: Build, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model with parameters and statistics that are not zero and one, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return perturb(build().to(dtype)).train()


def data(shape: tuple[int, ...], likelihood: Likelihood, n_outputs: int, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and weights."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    if isinstance(likelihood, Categorical):
        targets = torch.randint(n_outputs, (n,), generator=generator)
    else:
        targets = torch.rand(n, n_outputs, generator=generator, dtype=torch.float64)
    return inputs, targets, 0.1 + torch.rand(n, generator=generator, dtype=torch.float64)


def true_diagonal(
    model: nn.Module, inputs: Tensor, targets: Tensor, likelihood: Likelihood, weights: Tensor
) -> dict[str, Tensor]:
    """The diagonal of the dense Hessian of the weighted loss."""
    model = copy.deepcopy(model).eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(model, parameters, (inputs,))
        return (weights * likelihood.loss(outputs, targets)).sum()

    blocks = torch.func.hessian(loss)(parameters)
    return {
        name: blocks[name][name].reshape(p.numel(), p.numel()).diagonal().reshape(p.shape)
        for name, p in parameters.items()
    }


def dense_reference(
    model: nn.Sequential,
    inputs: Tensor,
    targets: Tensor,
    likelihood: Likelihood,
    weights: Tensor,
    method: str = "hesscale",
) -> dict[str, Tensor]:
    """The recursion datum by datum, with the dense Jacobian of every layer squared entry by entry."""
    layers = copy.deepcopy(model).eval()
    found = {name: torch.zeros_like(p) for name, p in layers.named_parameters()}
    for x, target, weight in zip(inputs, targets, weights, strict=True):
        steps, x = [], x[None]
        for name, layer in layers.named_children():
            steps.append((name, layer, x.detach()))
            x = layer(x.clone())
        f = x.detach()
        loss = lambda f, target=target, weight=weight: (weight * likelihood.loss(f, target[None])).sum()  # noqa: E731
        g = torch.func.grad(loss)(f).flatten()
        h = torch.func.hessian(loss)(f).reshape(len(g), len(g)).diagonal()
        if method == "becker_lecun" and isinstance(likelihood, Categorical):
            p = f.softmax(-1).flatten()
            h = torch.zeros_like(h)
            h[target] = -weight * (p[target] ** 2 - p[target])  # -w times sigma'' of an elementwise log-softmax
        for name, layer, a in reversed(steps):
            parameters = {key: p.detach() for key, p in layer.named_parameters()}

            def call(parameters, a, layer=layer):
                return torch.func.functional_call(layer, parameters, (a.clone(),)).flatten()

            by_parameter, jacobian = torch.func.jacrev(call, argnums=(0, 1))(parameters, a)
            for key, by in by_parameter.items():
                found[f"{name}.{key}"] += torch.einsum("o...,o->...", by**2, h)
            jacobian = jacobian.reshape(len(g), -1)
            h_inner = (jacobian**2).T @ h
            straight = (nn.Hardsigmoid, nn.RReLU)  # torch.func cannot differentiate these twice
            if type(layer) in ELEMENTWISE and method != "hesscale_gn" and not isinstance(layer, straight):
                second = torch.func.hessian(lambda a, call=call, p=parameters, g=g: (g * call(p, a)).sum())(a)
                h_inner = h_inner + second.reshape(a.numel(), a.numel()).diagonal()
            g, h = jacobian.T @ g, h_inner
    return {name: p.detach() for name, p in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EXACT) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert float(expected[name].abs().max()) > 0, f"{name} tests nothing"
        assert_equal(found[name], expected[name], tolerance)


def mlp(activation: Callable[[], nn.Module] = nn.Tanh, n_outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3), activation(), nn.Linear(3, n_outputs))


# -- where HesScale is exact ---------------------------------------------------------------------


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_single_linear_layer_is_exact(name):
    likelihood = LIKELIHOODS[name]
    model = network(lambda: nn.Linear(4, 3))
    x, y, w = data((4,), likelihood, 3)
    assert_same(hessian_diagonal(model, x, y, likelihood, weights=w), true_diagonal(model, x, y, likelihood, w))


@pytest.mark.parametrize("method", ["hesscale", "becker_lecun"])
@pytest.mark.parametrize("name", ["bernoulli", "gaussian"])
def test_a_network_of_width_one_is_exact(name, method):
    likelihood = LIKELIHOODS[name]
    model = network(
        lambda: nn.Sequential(
            nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Softplus(), nn.Linear(1, 1), nn.SiLU(),
            nn.GELU(approximate="tanh"), nn.Unflatten(1, (1, 1)), nn.Conv1d(1, 1, 1), nn.AvgPool1d(1), nn.Sigmoid(),
            nn.Flatten(), nn.Linear(1, 1),
        )
    )  # fmt: skip
    x, y, w = data((1,), likelihood, 1)
    expected = true_diagonal(model, x, y, likelihood, w)
    assert min(float(h) for h in expected.values() if h.numel() == 1) < 0, "a test of the second derivatives"
    assert_same(hessian_diagonal(model, x, y, likelihood, weights=w, method=method), expected)


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("method", ["hesscale", "hesscale_gn"])
def test_the_last_layer_is_exact(name, method):
    likelihood = LIKELIHOODS[name]
    model = network(mlp)
    x, y, w = data((4,), likelihood, 3)
    found = hessian_diagonal(model, x, y, likelihood, weights=w, method=method)
    expected = true_diagonal(model, x, y, likelihood, w)
    for key in ("4.weight", "4.bias"):
        assert_equal(found[key], expected[key])
    assert float((found["0.weight"] - expected["0.weight"]).abs().max()) > 1e-3, "deeper layers are approximate"
    if name != "categorical" and method == "hesscale":  # no off-diagonals at the outputs: one layer more
        for key in ("2.weight", "2.bias"):
            assert_equal(found[key], expected[key])


def test_the_default_is_the_mean_over_data():
    likelihood, model = Categorical(), network(lambda: nn.Linear(4, 3))
    x, y, _ = data((4,), likelihood, 3)
    assert_same(
        hessian_diagonal(model, x, y, likelihood),
        true_diagonal(model, x, y, likelihood, torch.full((N,), 1 / N, dtype=torch.float64)),
    )


# -- against slow references ---------------------------------------------------------------------


def slow_mlp(model: nn.Sequential, x: Tensor, y: Tensor, w: Tensor, likelihood: Likelihood, method: str):
    """Double loops with explicit sums, and derivatives of tanh by hand."""
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    found = {name: torch.zeros_like(p).detach() for name, p in model.named_parameters()}
    for n in range(len(x)):
        inputs, value = [], x[n].tolist()
        for depth, layer in enumerate(linear):
            value = value if depth == 0 else [math.tanh(v) for v in value]
            inputs.append(value)
            weight, bias = layer.weight.tolist(), layer.bias.tolist()
            value = [
                sum(weight[o][i] * value[i] for i in range(len(value))) + bias[o] for o in range(layer.out_features)
            ]
        f = value
        if isinstance(likelihood, Categorical):
            p = [math.exp(v) / sum(math.exp(u) for u in f) for v in f]
            own = [float(o == int(y[n])) for o in range(len(f))]
            g = [p[o] - own[o] for o in range(len(f))]
            if method == "becker_lecun":  # the activation log-softmax with sigma' = 1 - p below the loss -y
                h = [0 * (1 - p[o]) ** 2 + -own[o] * (p[o] ** 2 - p[o]) for o in range(len(f))]
            else:
                h = [p[o] - p[o] ** 2 for o in range(len(f))]
        elif isinstance(likelihood, Bernoulli):
            p = [1 / (1 + math.exp(-v)) for v in f]
            g, h = [p[o] - float(y[n, o]) for o in range(len(f))], [p[o] * (1 - p[o]) for o in range(len(f))]
        else:
            g, h = [f[o] - float(y[n, o]) for o in range(len(f))], [1.0] * len(f)
        for depth in reversed(range(len(linear))):
            a, weight = inputs[depth], linear[depth].weight.tolist()
            for o in range(len(h)):
                found[f"{2 * depth}.bias"][o] += w[n] * h[o]
                for i in range(len(a)):
                    found[f"{2 * depth}.weight"][o, i] += w[n] * h[o] * a[i] ** 2
            h = [sum(weight[o][i] ** 2 * h[o] for o in range(len(h))) for i in range(len(a))]
            g = [sum(weight[o][i] * g[o] for o in range(len(g))) for i in range(len(a))]
            if depth > 0:  # a = tanh(z): sigma' = 1 - a^2, sigma'' = -2 a (1 - a^2)
                for i in range(len(a)):
                    first = 1 - a[i] ** 2
                    h[i] = h[i] * first**2 + (0.0 if method == "hesscale_gn" else g[i] * -2 * a[i] * first)
                    g[i] = g[i] * first
    return found


@pytest.mark.parametrize("method", APPROXIMATIONS)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_an_mlp_equals_explicit_loops(name, method):
    likelihood, model = LIKELIHOODS[name], network(mlp)
    x, y, w = data((4,), likelihood, 3)
    expected = slow_mlp(model, x, y, w, likelihood, method)
    assert_same(hessian_diagonal(model, x, y, likelihood, weights=w, method=method), expected)


def test_the_methods_differ():
    likelihood, model = Categorical(), network(mlp)
    x, y, w = data((4,), likelihood, 3)
    one, two, three = (hessian_diagonal(model, x, y, likelihood, weights=w, method=method) for method in APPROXIMATIONS)
    for a, b in ((one, two), (one, three), (two, three)):
        assert float((a["2.weight"] - b["2.weight"]).abs().max()) > 1e-3


ACTIVATIONS: dict[str, Build] = {
    **{kind.__name__: kind for kind in ELEMENTWISE if kind.__name__[-2:] not in ("ld", "1d", "2d", "3d")},
    "Threshold": lambda: nn.Threshold(0.1, -0.3),
    "GELU(tanh)": lambda: nn.GELU(approximate="tanh"),
    "Softplus(2, 1)": lambda: nn.Softplus(2.0, 1.0),
    "Hardtanh(-0.2, 0.5)": lambda: nn.Hardtanh(-0.2, 0.5),
    "ReLU(inplace)": lambda: nn.ReLU(inplace=True),
    "SiLU(inplace)": lambda: nn.SiLU(inplace=True),
    "ELU(2, inplace)": lambda: nn.ELU(2.0, inplace=True),
}


@pytest.mark.parametrize("method", ["hesscale", "hesscale_gn"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_equals_the_dense_recursion(name, method):
    likelihood = Bernoulli()
    model = network(lambda: nn.Sequential(nn.Linear(3, 6), ACTIVATIONS[name](), nn.Linear(6, 2)))
    model[0].weight.data *= 3  # both sides of every kink
    x, y, w = data((3,), likelihood, 2)
    expected = dense_reference(model, x, y, likelihood, w, method)
    assert_same(hessian_diagonal(model, x, y, likelihood, weights=w, method=method), expected)


LAYERS: dict[str, tuple[tuple[int, ...], Build]] = {
    "conv1d": ((2, 7), lambda: nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2, groups=2)),
    "conv2d": ((2, 5, 4), lambda: nn.Conv2d(2, 2, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))),
    "conv2d-depthwise": ((3, 4, 4), lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3, bias=False)),
    "conv2d-same": ((2, 4, 4), lambda: nn.Conv2d(2, 2, (2, 3), padding="same")),
    "conv3d": ((1, 3, 3, 4), lambda: nn.Conv3d(1, 2, 2, dilation=(1, 1, 2), padding=(0, 1, 0))),
    "batchnorm1d": ((6,), lambda: nn.BatchNorm1d(6)),
    "batchnorm1d-positions": ((3, 4), lambda: nn.BatchNorm1d(3, eps=0.1)),
    "batchnorm2d": ((2, 3, 3), lambda: nn.BatchNorm2d(2, eps=0.05)),
    "batchnorm3d-plain": ((2, 2, 2, 2), lambda: nn.BatchNorm3d(2, affine=False)),
    "maxpool1d": ((2, 7), lambda: nn.MaxPool1d(3, 2, 1)),
    "maxpool2d-overlap": ((2, 5, 5), lambda: nn.MaxPool2d(3, 1)),
    "maxpool2d-ceil": ((2, 5, 5), lambda: nn.MaxPool2d(2, dilation=2, ceil_mode=True)),
    "maxpool3d": ((1, 4, 3, 4), lambda: nn.MaxPool3d(2, 1)),
    "adaptivemaxpool2d": ((2, 5, 4), lambda: nn.AdaptiveMaxPool2d((2, 3))),
    "avgpool1d": ((2, 7), lambda: nn.AvgPool1d(3, 2, 1, ceil_mode=True)),
    "avgpool1d-without-padding": ((2, 7), lambda: nn.AvgPool1d(3, 2, 1, count_include_pad=False)),
    "avgpool2d": ((2, 4, 6), lambda: nn.AvgPool2d(2)),
    "avgpool2d-overlap": ((2, 5, 6), lambda: nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True)),
    "avgpool2d-without-padding": ((2, 5, 5), lambda: nn.AvgPool2d(3, 2, 1, True, count_include_pad=False)),
    "avgpool2d-divisor": ((2, 4, 4), lambda: nn.AvgPool2d(2, 1, divisor_override=3)),
    "avgpool3d": ((1, 4, 3, 4), lambda: nn.AvgPool3d((2, 3, 2), (1, 2, 2), (1, 1, 0))),
    "adaptiveavgpool1d": ((2, 7), lambda: nn.AdaptiveAvgPool1d(3)),
    "adaptiveavgpool2d": ((2, 5, 7), lambda: nn.AdaptiveAvgPool2d((None, 3))),
    "adaptiveavgpool3d": ((1, 3, 4, 5), lambda: nn.AdaptiveAvgPool3d(2)),
    "global": ((3, 4, 4), lambda: nn.AdaptiveAvgPool2d(1)),
    "zeropad": ((2, 3, 3), lambda: nn.ZeroPad2d((1, 0, 2, -1))),
    "constantpad": ((2, 4), lambda: nn.ConstantPad1d((2, 1), 1.5)),
    "dropout1d": ((3, 4), lambda: nn.Dropout1d(0.9)),
    "dropout2d": ((3, 4, 2), lambda: nn.Dropout2d(0.9)),
    "dropout3d": ((3, 4, 1, 2), lambda: nn.Dropout3d(0.9)),
    "unflatten": ((4, 2), lambda: nn.Unflatten(1, (2, 2))),
    "flatten": ((2, 3, 2), lambda: nn.Flatten(2)),
}


def around(shape: tuple[int, ...], build: Build) -> nn.Sequential:
    """A layer in the middle of a network: its own curvature, and what it passes on, both show."""
    layer = build().double().eval()
    width = layer(torch.zeros(1, *shape, dtype=torch.float64)).numel()
    return nn.Sequential(
        nn.Linear(3, math.prod(shape)), nn.Unflatten(1, shape), nn.Tanh(), layer, nn.Softplus(), nn.Flatten(),
        nn.Linear(width, 2),
    )  # fmt: skip


@pytest.mark.parametrize("method", APPROXIMATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_equals_the_dense_recursion(name, method, device):
    likelihood = Categorical()
    model = network(lambda: around(*LAYERS[name]))
    x, y, w = data((3,), likelihood, 2, n=3)
    expected = dense_reference(model, x, y, likelihood, w, method)
    found = hessian_diagonal(model.to(device), x.to(device), y.to(device), likelihood, weights=w, method=method)
    assert_same(found, expected)


def test_every_kind_of_module_is_tested():
    tested = {type(build()) for build in (*ACTIVATIONS.values(), *(build for _, build in LAYERS.values()))}
    assert {*ELEMENTWISE, *AVERAGES, *CONVOLUTIONS, *BATCH_NORMS} <= tested
    assert {kind.__name__[:-2] for kind in REARRANGEMENTS} <= {kind.__name__[:-2] for kind in tested}


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_are_a_layer_of_their_own(mode):
    """Each copy of a pixel is an input of its own; the curvatures of copies add up."""

    class Pad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x, (2, 2, 1, 1), mode=mode)

    likelihood = Gaussian()
    model = network(lambda: around((2, 4, 5), lambda: nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode=mode)))
    apart = nn.Sequential(*model[:3], Pad(), nn.Conv2d(2, 2, 3).double(), *model[4:])
    apart[4].load_state_dict(model[3].state_dict())
    x, y, w = data((3,), likelihood, 2, n=3)
    expected = dense_reference(apart, x, y, likelihood, w)
    found = hessian_diagonal(model, x, y, likelihood, weights=w)
    for (name, h), other in zip(found.items(), expected.values(), strict=True):
        assert float(h.abs().max()) > 0, name
        assert_equal(h, other)


@pytest.mark.parametrize("method", APPROXIMATIONS)
def test_a_convolution_equals_the_linear_layer_with_the_same_matrix(method):
    likelihood = Categorical()
    convolution = network(lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2))
    shape, out = (2, 5, 4), convolution(torch.zeros(1, 2, 5, 4, dtype=torch.float64))[0].shape
    first, head = network(lambda: nn.Linear(3, 40)), network(lambda: nn.Linear(out.numel(), 3), seed=1)
    model = nn.Sequential(
        first, nn.Tanh(), nn.Unflatten(1, shape), convolution, nn.Flatten(), nn.Sigmoid(), head
    )  # fmt: skip
    units = torch.eye(40, dtype=torch.float64).reshape(40, *shape)

    def matrix(weight: Tensor) -> Tensor:
        return convolution._conv_forward(units, weight, None).flatten(1).T

    linear = nn.Linear(40, out.numel()).double()
    linear.weight.data = matrix(convolution.weight).detach()
    linear.bias.data = convolution.bias.detach().repeat_interleave(out.numel() // 4)
    x, y, w = data((3,), likelihood, 3)
    found = hessian_diagonal(model, x, y, likelihood, weights=w, method=method)
    dense = nn.Sequential(first, nn.Tanh(), linear, nn.Sigmoid(), head)
    expected = hessian_diagonal(dense, x, y, likelihood, weights=w, method=method)
    for ours, theirs in (("0.weight", "0.weight"), ("0.bias", "0.bias"), ("6.weight", "4.weight")):
        assert_equal(found[ours], expected[theirs])
    number = matrix(torch.arange(1.0, 1 + convolution.weight.numel()).double().reshape(convolution.weight.shape))
    summed = torch.zeros(1 + convolution.weight.numel(), dtype=torch.float64)
    summed.index_add_(0, number.round().long().flatten(), expected["2.weight"].flatten())
    assert_equal(found["3.weight"].flatten(), summed[1:])
    assert_equal(found["3.bias"], expected["2.bias"].reshape(4, -1).sum(1))


def test_batch_normalisation_equals_the_affine_map():
    """The same as a diagonal linear layer, and its own scale as the weight of a normalised input."""
    likelihood = Gaussian()
    norm = network(lambda: nn.BatchNorm1d(4, eps=0.1))
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    linear = nn.Linear(4, 4).double()
    linear.weight.data, linear.bias.data = torch.diag(scale).detach(), (norm.bias - scale * norm.running_mean).detach()
    first, head = network(lambda: nn.Linear(3, 4)), network(lambda: nn.Linear(4, 2), seed=1)
    x, y, w = data((3,), likelihood, 2)
    found, expected = (
        hessian_diagonal(nn.Sequential(first, middle, nn.Tanh(), head), x, y, likelihood, weights=w)
        for middle in (norm, linear)
    )
    for name in ("0.weight", "0.bias", "1.bias", "3.weight", "3.bias"):
        assert_equal(found[name], expected[name])
    one = nn.Sequential(copy.deepcopy(norm), nn.Tanh(), head)
    normalised = (x[:, [0, 1, 2, 0]] - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    own = hessian_diagonal(one, x[:, [0, 1, 2, 0]], y, likelihood, weights=w)
    split = nn.Sequential(nn.Linear(4, 4).double(), nn.Tanh(), head)
    split[0].weight.data, split[0].bias.data = torch.diag(norm.weight).detach(), norm.bias.detach()
    assert_equal(own["0.weight"], hessian_diagonal(split, normalised, y, likelihood, weights=w)["0.weight"].diagonal())


def test_becker_lecun_is_hesscale_of_an_elementwise_log_softmax():
    """The reference's reading: an elementwise activation with 1 - p and p^2 - p, and a loss without curvature."""
    likelihood, model = Categorical(), network(lambda: nn.Linear(4, 3))
    x, y, w = data((4,), likelihood, 3)
    p = model(x).softmax(-1).detach()
    h = -w[:, None] * F.one_hot(y, 3) * (p**2 - p)
    found = hessian_diagonal(model, x, y, likelihood, weights=w, method="becker_lecun")
    assert_same(found, {"weight": torch.einsum("no,ni->oi", h, x**2), "bias": h.sum(0)})


# -- laws ----------------------------------------------------------------------------------------


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.GELU(),
        nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        nn.Dropout(0.5), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_gauss_newton_variant_is_never_negative(name):
    likelihood, model = LIKELIHOODS[name], network(convolutional)
    x, y, w = data((1, 6, 6), likelihood, 3)
    found = hessian_diagonal(model, x, y, likelihood, weights=w, method="hesscale_gn")
    assert all(float(h.min()) >= 0 for h in found.values())
    others = hessian_diagonal(model, 3 * x, y, likelihood, weights=w)
    assert min(float(h.min()) for h in others.values()) < 0, "HesScale itself can be"


@pytest.mark.parametrize("kind", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.ReLU6, nn.Identity])
def test_without_curved_activations_the_gauss_newton_variant_is_the_same(kind):
    likelihood, model = Categorical(), network(lambda: mlp(kind))
    x, y, w = data((4,), likelihood, 3)
    one, two = (hessian_diagonal(model, x, y, likelihood, weights=w, method=m) for m in ("hesscale", "hesscale_gn"))
    assert_same(one, two)


@pytest.mark.parametrize("method", APPROXIMATIONS)
def test_results_are_linear_in_the_weights_and_batches_add_up(method):
    likelihood, model = Categorical(), network(convolutional)
    x, y, w = data((1, 6, 6), likelihood, 3, n=7)
    run = lambda x, y, w: hessian_diagonal(model, x, y, likelihood, weights=w, method=method)  # noqa: E731
    whole = run(x, y, w)
    parts = [run(x[part], y[part], w[part]) for part in (slice(0, 1), slice(1, 3), slice(3, 7))]
    assert_same({name: sum(part[name] for part in parts) for name in whole}, whole)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    assert_same(run(x[order], y[order], w[order]), whole)
    assert_same(run(x, y, 2.5 * w), {name: 2.5 * h for name, h in whole.items()})
    alone = run(x[2:3], y[2:3], w[2:3])
    assert_same(run(x, y, w * (torch.arange(7) == 2)), alone)


def test_hesscale_is_closer_to_the_true_diagonal_than_becker_lecun():
    """Over seeds, on a small softmax network: the direction that the paper reports."""
    likelihood, wins, ratios = Categorical(), 0, []
    for seed in range(20):
        model = network(mlp, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (8,), generator=generator)
        expected = true_diagonal(model, x, y, likelihood, torch.full((8,), 1 / 8, dtype=torch.float64))
        errors = []
        for method in ("hesscale", "becker_lecun"):
            found = hessian_diagonal(model, x, y, likelihood, method=method)
            errors.append(sum(float((found[name] - h).abs().sum()) for name, h in expected.items()))
        wins += errors[0] < errors[1]
        ratios.append(errors[0] / errors[1])
    assert wins == 20
    assert sorted(ratios)[10] < 0.5


def test_a_confident_network_keeps_its_curvature_in_single_precision():
    model = nn.Linear(1, 3, bias=False)
    model.weight.data = torch.tensor([[25.0], [0.0], [1.0]])
    x, y = torch.ones(1, 1), torch.tensor([0])
    found = hessian_diagonal(model, x, y, Categorical())["weight"]
    expected = hessian_diagonal(model.double(), x.double(), y, Categorical())["weight"]
    assert float(expected[0]) > 1e-11
    assert_equal(found, expected.float(), FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_at_least_single_precision(dtype):
    likelihood, model = Categorical(), network(convolutional, dtype=dtype)
    x, y, _ = data((1, 6, 6), likelihood, 3)
    found = hessian_diagonal(model, x.to(dtype), y, likelihood)
    assert all(h.dtype == torch.float32 for h in found.values())
    expected = hessian_diagonal(model.double(), x.to(dtype).double(), y, likelihood)
    for name, h in expected.items():
        assert_equal(found[name].double(), h, FLOAT32 if dtype == torch.float32 else 0.1)


def test_a_single_output_may_come_without_its_dimension():
    model = network(lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)))
    x, y, w = data((4,), Bernoulli(), 1)
    found = hessian_diagonal(model, x, y, Bernoulli(), weights=w)
    assert_same(found, hessian_diagonal(model[:1], x, y, Bernoulli(), weights=w))


def test_positions_of_tokens_share_a_linear_layer():
    likelihood = Gaussian()
    model = network(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.Flatten(), nn.Linear(8, 2)))
    x, y, w = data((4, 2), likelihood, 2, n=3)
    assert_same(hessian_diagonal(model, x, y, likelihood, weights=w), dense_reference(model, x, y, likelihood, w))


# -- which parameters ----------------------------------------------------------------------------


def test_only_the_parameters_asked_for():
    likelihood, model = Categorical(), network(convolutional)
    x, y, w = data((1, 6, 6), likelihood, 3)
    whole = hessian_diagonal(model, x, y, likelihood, weights=w)
    assert list(whole) == [name for name, _ in model.named_parameters()]
    for names in (["6.bias"], ["6.weight", "3.1.bias"], ["0.weight"]):
        found = hessian_diagonal(model, x, y, likelihood, weights=w, parameters=names)
        assert set(found) == set(names)
        for name in names:
            assert_equal(found[name], whole[name])
    model[0].weight.requires_grad_(False)
    model[6].bias.requires_grad_(False)
    found = hessian_diagonal(model, x, y, likelihood, weights=w)
    assert_same(found, {name: h for name, h in whole.items() if name not in ("0.weight", "6.bias")})


class Custom(nn.Module):
    """A module with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def test_anything_may_come_before_the_first_parameter_asked_for():
    likelihood = Categorical()
    model = network(lambda: nn.Sequential(Custom(), nn.Softmax(-1), nn.Linear(4, 3)))
    x, y, w = data((4,), likelihood, 3)
    found = hessian_diagonal(model, x, y, likelihood, weights=w, parameters=["2.weight", "2.bias"])
    assert_same(found, {k: h for k, h in true_diagonal(model, x, y, likelihood, w).items() if k in found})


def test_a_subclass_of_sequential_that_only_builds_is_a_sequential():
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    model = network(Net)
    x, y, w = data((4,), Categorical(), 3)
    plain = nn.Sequential(*model)
    assert_same(*(hessian_diagonal(m, x, y, Categorical(), weights=w) for m in (model, plain)))


def test_an_activation_may_be_used_twice():
    activation = nn.Tanh()
    model = network(lambda: nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3), activation, nn.Linear(3, 3)))
    x, y, w = data((4,), Categorical(), 3)
    assert_same(
        hessian_diagonal(model, x, y, Categorical(), weights=w), slow_mlp(model, x, y, w, Categorical(), "hesscale")
    )


# -- errors --------------------------------------------------------------------------------------


class Forward(nn.Sequential):
    """A Sequential with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def shared() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 3))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def outside() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_parameter("scale", nn.Parameter(torch.ones(3)))
    return model


def hooked() -> nn.Module:
    model = mlp()
    model[1].register_forward_hook(lambda module, args, output: 2 * output)
    return model


def unknown_parameter() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].register_parameter("extra", nn.Parameter(torch.ones(3)))
    return model


def through(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), module, nn.Linear(4, 3))


UNSUPPORTED: dict[str, tuple[Build, str]] = {
    "custom": (lambda: through(Custom()), r"'1' of type Custom: .*method=\"ggn\".*mc_samples"),
    "model": (Custom, "the model, a Custom"),
    "sequential": (lambda: nn.Sequential(nn.Linear(4, 4), Forward(nn.Linear(4, 3))), "'1' of type Forward"),
    "nested": (lambda: through(nn.Sequential(nn.Tanh(), nn.LayerNorm(4))), r"'1\.1' of type LayerNorm"),
    "softmax": (lambda: through(nn.Softmax(-1)), "'1' of type Softmax"),
    "prelu": (lambda: through(nn.PReLU()), "'1' of type PReLU"),
    "batch-statistics": (lambda: through(nn.BatchNorm1d(4, track_running_stats=False)), "BatchNorm1d.* by the batch"),
    "parametrized": (lambda: through(weight_norm(nn.Linear(4, 4))), "'1' of type ParametrizedLinear"),
    "twice": (shared, r"'0\.weight' is in 2: 0, 2.*method=\"ggn\""),
    "tied": (tied, r"'0\.weight' is in 2: 0, 2"),
    "outside": (outside, r"'scale' is in 0\."),
    "hooks": (hooked, "the model, a Sequential: its outputs are not those of its modules in a row; look for hooks"),
    "unknown-parameter": (unknown_parameter, r"No supported layer has '0\.extra' as its weight or bias"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_networks_are_errors_that_name_the_module(name):
    build, message = UNSUPPORTED[name]
    model = network(build)
    x, y, w = data((4,), Categorical(), 3)
    with pytest.raises(UnsupportedLayerError, match=message):
        hessian_diagonal(model, x, y, Categorical(), weights=w)


def test_an_old_weight_norm_is_an_error_too():
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(4, 4))
    model = network(lambda: through(layer))
    x, y, w = data((4,), Categorical(), 3)
    with pytest.raises(UnsupportedLayerError, match=r"No supported layer has '1\.weight_g' as its weight or bias"):
        hessian_diagonal(model, x, y, Categorical(), weights=w)
    assert not parametrize.is_parametrized(layer)


NAN = float("nan")
WRONG: dict[str, tuple[type[Exception], str, dict]] = {
    "method": (ValueError, r"a method out of \['hesscale', .*got 'exact'", {"method": "exact"}),
    "names": (ValueError, r"names of trainable parameters, out of \['0\.weight'.*got \['9'\]", {"parameters": ["9"]}),
    "no-names": (ValueError, r"names of trainable parameters.*got \[\]", {"parameters": []}),
    "inputs": (TypeError, "inputs that are one tensor.*got dict", {"inputs": {"x": torch.ones(N, 4)}}),
    "infinite": (NonFiniteError, "the inputs, got 1 of 20", {"inputs": 1 / torch.arange(20.0).reshape(N, 4)}),
    "no-data": (ValueError, "one row for each of 0 data", {"inputs": torch.ones(0, 4).double()}),
    "targets": (ValueError, "class indices from 0 to 2", {"targets": torch.full((N,), 3)}),
    "target-dtype": (TypeError, "class indices of an integer dtype", {"targets": torch.ones(N)}),
    "target-count": (ValueError, r"each of the 5 inputs .*shape \(4,\)", {"targets": torch.zeros(4).long()}),
    "weight-shape": (ValueError, "5 weights, none of them negative", {"weights": torch.ones(N, 1)}),
    "weight-sign": (ValueError, "5 weights, none of them negative", {"weights": torch.ones(N) - 2}),
    "weight-nan": (NonFiniteError, "the weights of the data", {"weights": torch.full((N,), NAN)}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_say_what_was_expected(name):
    error, message, changes = WRONG[name]
    model = network(mlp)
    x, y, w = data((4,), Categorical(), 3)
    arguments = {"inputs": x, "targets": y, "weights": w, **changes}
    with pytest.raises(error, match=message):
        hessian_diagonal(model, likelihood=Categorical(), **arguments)


def test_infinite_outputs_and_overflow_are_errors():
    model = network(lambda: nn.Linear(4, 3))
    x, y, _ = data((4,), Categorical(), 3)
    model.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="the model's outputs, got"):
        hessian_diagonal(model, x, y, Categorical())
    model = network(lambda: nn.Linear(4, 3), dtype=torch.float32)
    with pytest.raises(NonFiniteError, match=r"the curvature of 'weight'.*float64"):
        hessian_diagonal(model, torch.full((N, 4), 1e20), torch.zeros(N, 3), Gaussian())


def test_outputs_must_be_one_row_for_each_datum():
    model = network(lambda: nn.Conv1d(1, 2, 1))
    with pytest.raises(ValueError, match=r"Expected outputs \[N, C\], one row for each of 5 data, got \(5, 2, 4\)"):
        hessian_diagonal(model, torch.ones(N, 1, 4).double(), torch.zeros(N).long(), Categorical())


def test_a_model_without_trainable_parameters_is_an_error():
    model = network(mlp).requires_grad_(False)
    x, y, _ = data((4,), Categorical(), 3)
    with pytest.raises(ValueError, match=r"names of trainable parameters, out of \[\]"):
        hessian_diagonal(model, x, y, Categorical())


# -- the user's things ---------------------------------------------------------------------------


def state(model: nn.Module) -> tuple:
    """Everything of a model that a user could notice."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [
            (p.requires_grad, id(p), p._version, p.grad if p.grad is None else p.grad.clone())
            for p in model.parameters()
        ],
        [[len(hooks) for key, hooks in vars(m).items() if key.endswith("_hooks")] for m in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
    )


def assert_state(actual: object, expected: object) -> None:
    """Equality of nested containers with tensors and arrays."""
    if isinstance(expected, dict):
        assert_state(list(actual.items()), list(expected.items()))
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_state(one, other)
    elif isinstance(expected, (Tensor, np.ndarray)):
        assert bool((actual == expected).all())
    else:
        assert actual == expected


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_is_left_as_it_was(fails, context):
    likelihood = Categorical()
    last = nn.Softmax(-1) if fails else nn.ReLU(inplace=True)
    model = network(lambda: nn.Sequential(convolutional(), last, nn.Linear(3, 3)))
    model[0][1].eval()
    model[2].bias.requires_grad_(False)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    seen, called = [], []
    model[0][0].register_forward_hook(lambda module, args, output: seen.append(output))
    model[2].weight.register_hook(lambda gradient: called.append(gradient))
    x, y, w = data((1, 6, 6), likelihood, 3)
    before, inputs = state(model), x.clone()
    with context():
        if fails:
            with pytest.raises(UnsupportedLayerError, match="Softmax"):
                hessian_diagonal(model, x, y, likelihood, weights=w)
        else:
            found = hessian_diagonal(model, x, y, likelihood, weights=w)
            assert not any(h.requires_grad or h.is_inference() for h in found.values())
    assert_state(state(model), before)
    assert bool((x == inputs).all())
    assert len(seen) == 1
    assert not called


def test_a_first_layer_in_place_leaves_the_inputs():
    model = network(lambda: nn.Sequential(nn.SiLU(inplace=True), nn.Linear(4, 3)))
    x, y, w = data((4,), Categorical(), 3)
    before = x.clone()
    found = hessian_diagonal(model, x, y, Categorical(), weights=w)
    assert bool((x == before).all())
    expected = hessian_diagonal(model[1], F.silu(x), y, Categorical(), weights=w)
    assert_same(found, {f"1.{name}": h for name, h in expected.items()})


def test_inputs_made_in_inference_mode_will_do():
    likelihood, model = Categorical(), network(mlp)
    x, y, w = data((4,), likelihood, 3)
    expected = hessian_diagonal(model, x, y, likelihood, weights=w)
    with torch.inference_mode():
        x, y, w = x.clone(), y.clone(), w.clone()
        assert_same(hessian_diagonal(model, x, y, likelihood, weights=w), expected)
