"""Posteriors over some of the parameters: as if the others were frozen, and without touching the model."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import debiased_laplace
from debiased_laplace import Single, UniformSampler
from debiased_laplace._checks import NonFiniteError
from debiased_laplace.curvature.structures import Diagonal, Full, Kronecker, LowRank
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.likelihoods import Categorical, Gaussian
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.network.selection import match_parameters
from debiased_laplace.posterior.predictive import (
    functional_moments,
    joint_covariance,
    linearized_samples,
    weight_samples,
)
from debiased_laplace.testing import check_basis, check_curvatures, check_posterior, dense_basis
from tests.datasets import targets, valid
from tests.networks import ZOO
from tests.test_fit import Watched, watched_model
from tests.tolerances import assert_equal

STRUCTURES = [Kronecker(), Diagonal(), Full(), LowRank(3)]

#: Last layers by name, and whether their outputs are those of the model.
LAST = {
    "mlp": ("2", True),
    "mlp-no-bias": ("2", True),
    "cnn": ("6", True),
    "residual": ("head", True),
    "module-twice": ("head", True),
    "tied-weights": ("head", True),
    "batch-norm": ("5", True),
    "transformer": ("head", True),
    "transformer-sequence-first": ("head", True),
    "embedding": ("head", True),
    "lone-parameters": ("head temperature", False),
    "single-output": ("layers.2", False),
    "many-positions": ("2", False),
    "merged-images": ("head", True),
}


def frozen(name: str, chosen: list[str]) -> nn.Module:
    model = ZOO[name].model()
    for other, parameter in model.named_parameters():
        parameter.requires_grad_(other in chosen)
    return model


def fitted(model: nn.Module, name: str, n: int = 8, **options) -> Fit:
    case = ZOO[name]
    likelihood = valid(Categorical(), case)
    batch = [(case.inputs(n), targets(likelihood, n, case.n_outputs))]
    return fit(model, batch, likelihood, **{"sampler": UniformSampler(None), "generator": 5} | options)


def assert_same(one: Fit, other: Fit, inputs: Tensor) -> None:
    """The same numbers, by the same operations."""
    assert list(one.network.shapes) == list(other.network.shapes)
    assert one.network.blocks == other.network.blocks
    assert_equal(dense_basis(one.posterior.basis), dense_basis(other.posterior.basis))
    assert_equal(one.posterior.curvatures, other.posterior.curvatures)
    assert_equal(one.posterior.mean, other.posterior.mean, 0.0)
    deviations = one.posterior.deviations(3, torch.Generator().manual_seed(0))
    for of in (
        lambda f: functional_moments(f.network, f.posterior, inputs)[1],
        lambda f: functional_moments(f.network, f.posterior, inputs, covariance=False)[1],
        lambda f: functional_moments(f.network, f.posterior, inputs)[0],
        lambda f: joint_covariance(f.network, f.posterior, inputs)[1],
        lambda f: linearized_samples(f.network, f.posterior.mean, deviations, inputs),
        lambda f: weight_samples(f.network, f.posterior.mean, deviations, inputs),
    ):
        assert_equal(of(one), of(other))


# -- the last layer --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAST)
@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_the_last_layer_is_as_if_all_else_were_frozen(name, structure):
    layer, is_head = LAST[name]
    result = fitted(ZOO[name].model(), name, structure=structure, parameters="last_layer")
    names = match_parameters(ZOO[name].model(), layer.split())
    assert list(result.network.shapes) == names
    assert result.network.is_head is is_head
    expected = fitted(frozen(name, names), name, structure=structure)
    assert_same(result, expected, ZOO[name].inputs(3, seed=9))


@pytest.mark.parametrize("name", [name for name, (_, is_head) in LAST.items() if is_head])
@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_nothing_is_back_propagated_to_a_head_with_the_same_result(name, structure, monkeypatch):
    model, inputs = ZOO[name].model(), ZOO[name].inputs(3, seed=9)
    result = fitted(model, name, structure=structure, parameters="last_layer")
    monkeypatch.setattr(torch.autograd, "grad", None)
    monkeypatch.setattr(torch.Tensor, "backward", None)
    found = [functional_moments(result.network, result.posterior, inputs, covariance=c)[1] for c in (True, False)]
    found.append(joint_covariance(result.network, result.posterior, inputs)[1])
    monkeypatch.undo()
    general = Network.restore(model, result.network.description() | {"is_head": False})
    assert not general.is_head
    expected = [functional_moments(general, result.posterior, inputs, covariance=c)[1] for c in (True, False)]
    expected.append(joint_covariance(general, result.posterior, inputs)[1])
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)


def test_a_hook_that_changes_the_outputs_makes_it_no_head():
    model = ZOO["mlp"].model()
    model[2].register_forward_hook(lambda module, args, output: 3 * output)
    result = fitted(model, "mlp", parameters="last_layer")
    assert not result.network.is_head
    plain = fitted(ZOO["mlp"].model(), "mlp", parameters="last_layer", sampler=UniformSampler(None))
    assert plain.network.is_head


def test_the_last_layer_with_separate_biases():
    result = fitted(ZOO["cnn"].model(), "cnn", parameters="last_layer", separate_bias=True)
    assert [block.parameters for block in result.network.blocks] == [("6.weight",), ("6.bias",)]
    expected = fitted(frozen("cnn", ["6.weight", "6.bias"]), "cnn", separate_bias=True)
    assert_same(result, expected, ZOO["cnn"].inputs(3, seed=9))


def test_normalisation_after_the_last_layer_belongs_to_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.LayerNorm(2)).double()
    network = Network.discover(model, torch.randn(3, 3).double(), parameters="last_layer")
    assert list(network.shapes) == ["2.weight", "2.bias", "3.weight", "3.bias"]
    assert not network.is_head


def test_a_frozen_part_of_the_last_layer_stays_out():
    model = ZOO["mlp"].model()
    model[2].bias.requires_grad_(False)
    network = Network.discover(model, ZOO["mlp"].inputs(3), parameters="last_layer")
    assert list(network.shapes) == ["2.weight"]


# -- names and patterns ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        (["0.weight"], ["0.weight"]),
        ("2", ["2.weight", "2.bias"]),
        (["2"], ["2.weight", "2.bias"]),
        (["6", "0"], ["0.weight", "0.bias", "6.weight", "6.bias"]),
        (["*.bias"], ["0.bias", "2.bias", "6.bias"]),
        (["[02].weight", "6.bias"], ["0.weight", "2.weight", "6.bias"]),
        ("*", ["0.weight", "0.bias", "2.weight", "2.bias", "6.weight", "6.bias"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_names_modules_and_patterns(parameters, names, structure):
    result = fitted(ZOO["cnn"].model(), "cnn", structure=structure, parameters=parameters)
    assert list(result.network.shapes) == names
    assert_same(result, fitted(frozen("cnn", names), "cnn", structure=structure), ZOO["cnn"].inputs(3, seed=9))


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("transformer", ["encoder.self_attn", "token"]),
        ("tied-weights", ["first"]),
        ("lone-parameters", ["scale", "head"]),
        ("normalisation-twice", ["norm"]),
        ("embedding", ["embedding"]),
        ("attention", ["attention.in_proj_weight"]),
    ],
)
def test_parts_of_other_networks(name, parameters, structure):
    result = fitted(ZOO[name].model(), name, structure=structure, parameters=parameters)
    names = match_parameters(ZOO[name].model(), parameters)
    assert_same(result, fitted(frozen(name, names), name, structure=structure), ZOO[name].inputs(3, seed=9))


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_the_laws_hold_for_a_subset(structure):
    """The dense reference sees the trainable parameters: of a model in which the others are frozen."""
    names = ["0.bias", "2.weight", "2.bias"]
    model = frozen("cnn", names)
    result = fitted(ZOO["cnn"].model(), "cnn", structure=structure, split=Single(), parameters=names)
    data = result.sample.data
    reference = Network.discover(model, data.inputs)
    check_basis(result.posterior.basis)
    check_posterior(result.posterior)
    assert_equal(check_curvatures(reference, result.posterior.basis, data, Categorical()), result.posterior.curvatures)


def test_a_frozen_parameter_is_no_candidate():
    model = frozen("mlp", ["0.weight", "2.weight", "2.bias"])
    assert match_parameters(model, ["0"]) == ["0.weight"]
    with pytest.raises(ValueError, match=r"got '0.bias', which matches none of \['0.weight', '2.weight', '2.bias'\]"):
        match_parameters(model, ["2.*", "0.bias"])


@pytest.mark.parametrize("pattern", ["3", "weight", "0.weigh", "last"])
def test_unknown_patterns(pattern):
    with pytest.raises(ValueError, match=f"patterns of trainable parameters, got '{pattern}', which matches none of"):
        fitted(ZOO["mlp"].model(), "mlp", parameters=[pattern])


# -- the model stays as it was ---------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ["last_layer", ["0", "3"]])
@pytest.mark.parametrize("bad", [False, True])
def test_the_model_is_left_as_it_was(parameters, bad):
    case = ZOO["batch-norm"]
    inputs, labels = case.inputs(9), torch.arange(9) % 2
    model = watched_model()
    model[3].weight.requires_grad_(True)
    watched = Watched(model)
    if bad:
        inputs[5:] = float("nan")
        with pytest.raises(NonFiniteError):
            fit(model, [(inputs, labels)], Categorical(), parameters=parameters, sampler=UniformSampler(None))
    else:
        result = fit(model, [(inputs, labels)], Categorical(), parameters=parameters, sampler=UniformSampler(None))
        functional_moments(result.network, result.posterior, inputs)
    watched.check()


def test_unknown_patterns_leave_the_model_as_it_was():
    model = watched_model()
    watched = Watched(model)
    with pytest.raises(ValueError, match="matches none of"):
        fit(model, [(ZOO["batch-norm"].inputs(4), torch.arange(4) % 2)], Categorical(), parameters=["nothing"])
    watched.check()


def leaves(node: torch.autograd.graph.Node) -> list[Tensor]:
    """Tensors in which the graph of a node ends."""
    found, seen, todo = [], set(), [node]
    while todo:
        own = todo.pop()
        if own is None or own in seen:
            continue
        seen.add(own)
        if hasattr(own, "variable"):
            found.append(own.variable)
        todo.extend(parent for parent, _ in own.next_functions)
    return found


@pytest.mark.parametrize("name", ["cnn", "transformer", "tied-weights", "lone-parameters"])
def test_other_parameters_have_no_graph(name):
    """No activation is kept for them either: their operations are not recorded."""
    model, inputs = ZOO[name].model(), ZOO[name].inputs(3)
    whole = Network.discover(model, inputs)
    network = Network.discover(model, inputs, parameters="last_layer")
    factors = network.factors(inputs)
    assert {id(leaf) for leaf in leaves(factors.graph_outputs.grad_fn)} == set(network.identities)
    chosen = network.identities
    everything = leaves(whole.factors(inputs).graph_outputs.grad_fn)
    assert len({id(leaf) for leaf in everything}) > len(chosen)
    chunks = CurvatureData(network, fitted(model, name).sample.data, Categorical())
    for chunk in chunks:
        list(chunk.factors.backpropagate(chunk.vectors))
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


# -- many classes ----------------------------------------------------------------------------------

LARGE = """
import resource, time
import torch
from torch import nn
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.parts.kronecker import KroneckerBasis
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.predictive import functional_moments

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 768), nn.Tanh(), nn.Linear(768, 3100))
inputs = torch.randn(32, 10)
network = Network.discover(model, inputs, parameters="last_layer")
assert network.is_head

def orthogonal(size):
    v = torch.randn(size)
    return (torch.eye(size) - torch.outer(v, v) * (2 / (v @ v)))[None]

part = KroneckerBasis(orthogonal(3100), orthogonal(769))
basis = Basis(network.blocks, network.shapes, [part])
curvatures = torch.rand(basis.rank)
posterior = Posterior(network.mean(), basis, curvatures, 1000, torch.tensor([2.0]).double())

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before, seconds = peak(), []
for _ in range(4):
    start = time.perf_counter()
    mean, variances = functional_moments(network, posterior, inputs, covariance=False)
    seconds.append(time.perf_counter() - start)
print(peak() - before, min(seconds[1:]))
features = torch.cat([model[:2](inputs[:2]), torch.ones(2, 1)], 1).detach().double()
along = (features @ part.inputs[0].double()).square()
weights = (1000 * curvatures.view(3100, 769).double() + 2).reciprocal()
expected = (along @ weights.mT) @ part.outputs[0].double().square().mT
assert mean.shape == variances.shape == (32, 3100)
assert float((variances[:2] / expected - 1).abs().max()) < 1e-3
"""


def test_a_head_with_thousands_of_classes():
    """3,100 classes, 768 features, 32 inputs: under a second and a gigabyte, in a fresh process."""
    root = Path(debiased_laplace.__file__).parents[1]
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LARGE)], capture_output=True, text=True, cwd=root, timeout=300
    )
    assert process.returncode == 0, process.stderr
    memory, seconds = map(float, process.stdout.split())
    assert memory < 2**30
    assert seconds < 1.0


def test_regression_on_a_subset():
    case = ZOO["mlp"]
    batch = [(case.inputs(8), targets(Gaussian(), 8, 2))]
    result = fit(case.model(), batch, Gaussian(), structure=Full(), parameters="last_layer")
    features = torch.tanh(case.model()[0](batch[0][0][result.curvature_indices])).detach()
    extended = torch.cat([features, torch.ones(len(features), 1).double()], 1)
    gram = extended.mT @ extended / len(features)
    columns = dense_basis(result.posterior.basis)
    weight, bias = columns[:8].T.reshape(-1, 2, 4), columns[8:].T.reshape(-1, 2, 1)
    rows = torch.cat([weight, bias], -1)
    assert_equal(result.posterior.curvatures, torch.einsum("koi,ij,koj->k", rows, gram, rows))
