"""Networks as people have them: everything a fit promises, for every one of ``tests/architectures.py``.

References are plain backward passes of the model itself, one for every output of every datum, and the posterior's own
directions: what they share with what they check is the eigendecomposition alone.
"""

from __future__ import annotations

import inspect
import random
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace import Single, UniformSampler
from debiased_laplace.likelihoods import Categorical
from tests.architectures import ARCHITECTURES, WITHOUT_RULES, Architecture
from tests.tolerances import EXACT, FLOAT32, assert_equal

N = 3


def jacobians(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``[N, C]`` and their Jacobians ``[N, C, D]``, by a backward pass for every output of every datum."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    outputs = model(x)
    rows = []
    for output in outputs.flatten():
        gradients = torch.autograd.grad(output, trainable, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return outputs.detach(), torch.stack(rows).unflatten(0, outputs.shape)


def state(model: nn.Module) -> list[object]:
    """What a fit must not change: weights and their flags, modes, hooks, attributes; and global random states."""
    return [
        {name: (value.detach().clone(), value._version) for name, value in model.state_dict(keep_vars=True).items()},
        {name: (p.requires_grad, p.grad, id(p)) for name, p in model.named_parameters()},
        [(module.training, sorted(module.__dict__), len(module._forward_hooks)) for module in model.modules()],
        torch.get_rng_state(), random.getstate(), np.random.get_state()[1],
    ]  # fmt: skip


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fit_is_exact_and_leaves_the_model_alone(name, tmp_path):
    case: Architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = case.model().train()
    torch.manual_seed(0)
    reference = case.model().eval()  # no copy: not every model has one, and some keep what they computed
    x = case.inputs(N)
    y = torch.arange(N) % case.n_outputs
    before = state(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* have a diagonal curvature", category=UserWarning)
        la = dl.fit(
            model, [(x, y)], "classification", structure=case.structure, split=Single(), sampler=UniformSampler(None)
        )
    assert same(state(model), before)
    prediction = la.predict(x, covariance=True)
    la.save(tmp_path / "posterior")
    assert same(state(model)[:-3], before[:-3])  # some models draw in every forward pass

    posterior = la.posterior
    outputs, rows = jacobians(reference, x)
    jacobian = posterior.basis.project(rows)
    precision = posterior.scale * posterior.curvatures + posterior.prior_precision
    covariance = torch.einsum("ncr,r,ndr->ncd", jacobian, 1 / precision, jacobian)
    assert_equal(prediction.outputs_covariance, covariance, EXACT)
    roots = Categorical().hessian_square_root(outputs, y)  # [V, N, C]
    curvatures = torch.einsum("vnc,ncr->vnr", roots, jacobian).square().sum((0, 1)) / N
    assert_equal(posterior.curvatures, curvatures, FLOAT32 if case.single else EXACT)

    table = la.coverage()
    assert all(parameter in table for parameter in dict(model.named_parameters()))
    n_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{n_params} of {n_params} trainable parameters covered" in table
    of_factors = sum(block.size for block in la.network.blocks if block.kind.name == "kronecker")
    assert of_factors >= case.kronecker * n_params, table
    # Nobody can look into scripted functions, of which DeBERTa has some in earlier versions of Transformers.
    scripted = name == "transformers-deberta" and "torch.jit.script" in inspect.getsource(
        inspect.getmodule(type(model.model))
    )
    without_rules = name in WITHOUT_RULES or scripted
    assert bool(la.network.lone_blocks) == without_rules, [block.name for block in la.network.lone_blocks]

    again = dl.load(tmp_path / "posterior", model).predict(x, covariance=True)
    assert torch.equal(again.probabilities, prediction.probabilities)
    assert torch.equal(again.outputs_covariance, prediction.outputs_covariance)
