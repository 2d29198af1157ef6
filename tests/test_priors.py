"""One prior precision for each parameter tensor, of every structure and network, against dense matrices."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import laplace
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.parts import kronecker
from debiased_laplace.curvature.parts.dense import DenseBasis
from debiased_laplace.curvature.projected import projected_curvatures
from debiased_laplace.curvature.structures import Diagonal, Full, Kronecker, LowRank, Structure
from debiased_laplace.fitting.fit import fit
from debiased_laplace.laplace_torch import DebiasedKronLaplace, DebiasedLaplace, tuning
from debiased_laplace.laplace_torch.precision import KroneckerPrecision
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.network.arrangement import Stacked
from debiased_laplace.network.blocks import Block
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.kinds import DENSE
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.evidence import maximise_over_priors
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.predictive import functional_moments, joint_covariance
from debiased_laplace.sampling.samplers import UniformSampler
from debiased_laplace.testing import (
    check_posterior,
    dense_basis,
    dense_ggn,
    dense_jacobian,
    dense_posterior_precision,
    truncate,
)
from tests.datasets import example
from tests.networks import ZOO
from tests.tolerances import assert_equal

NETWORKS = ["mlp", "cnn", "layer-norm", "lone-parameters"]
STRUCTURES = {
    "kron": Kronecker(), "diag": Diagonal(), "full": Full(), "full-layer": Full("layer"), "lowrank": LowRank(4),
    "lowrank-layer": LowRank(2, "layer"),
}  # fmt: skip


def tensors_of(network: Network) -> list[int]:
    return [shape.numel() for shape in network.shapes.values()]


def fitted(
    name: str, structure: Structure, *, separate_bias: bool = False
) -> tuple[nn.Module, Network, Any, Posterior]:
    """A posterior of a network of the zoo, with prior precision one."""
    model, network, data = example(ZOO[name], Categorical(), separate_bias=separate_bias)
    curvature = CurvatureData(network, data, Categorical())
    found = structure.eigenbasis(network, structure.measure(network, curvature))
    curvatures = projected_curvatures(network, found, curvature)
    one = torch.ones(1, dtype=torch.float64)
    return model, network, data, Posterior(network.mean(), found, curvatures, 30, one, temperature=0.7)


def for_each_tensor(network: Network, priors: Tensor) -> Tensor:
    return priors.repeat_interleave(torch.tensor(tensors_of(network)))


def dense_curvature(posterior: Posterior) -> Tensor:
    columns = dense_basis(posterior.basis)
    return float(posterior.scale) * columns @ torch.diag(posterior.curvatures.double()) @ columns.mT


@pytest.mark.parametrize(
    ("structure", "name", "separate_bias"),
    [(structure, name, False) for structure in STRUCTURES for name in NETWORKS]
    + [("kron", name, True) for name in NETWORKS]
    + [("kron", name, False) for name in ("batch-norm", "tied-weights", "frozen-in-convolutions")],
)
def test_the_gaussian_and_its_predictions(structure, name, separate_bias):
    model, network, data, posterior = fitted(name, STRUCTURES[structure], separate_bias=separate_bias)
    priors = torch.linspace(0.4, 3.0, len(network.shapes), dtype=torch.float64)
    posterior = replace(posterior, prior_precision=for_each_tensor(network, priors))
    check_posterior(posterior)
    jacobian = dense_jacobian(model, data.inputs)
    covariance = dense_posterior_precision(posterior).inverse()
    expected = jacobian @ covariance @ jacobian.mT
    _, found = functional_moments(network, posterior, data.inputs)
    assert_equal(found, expected)
    _, variances = functional_moments(network, [posterior, posterior], data.inputs, covariance=False)
    assert_equal(variances[1], expected.diagonal(dim1=1, dim2=2))
    rows = jacobian.flatten(0, 1)
    assert_equal(joint_covariance(network, posterior, data.inputs)[1], rows @ covariance @ rows.mT)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_evidence_and_its_gradient(name, structure, equal):
    """Also where a training begins, with one prior precision for all of them."""
    _, network, _, posterior = fitted(name, STRUCTURES[structure])
    logarithms = (torch.zeros if equal else torch.rand)(len(network.shapes), dtype=torch.float64).requires_grad_()
    own = replace(posterior, prior_precision=for_each_tensor(network, logarithms.exp()))
    evidence = own.log_marginal_likelihood(-3.0)
    (gradient,) = torch.autograd.grad(evidence, logarithms)
    prior = for_each_tensor(network, logarithms.exp())
    ratio = torch.logdet(dense_curvature(posterior) + torch.diag(prior)) - prior.log().sum()
    expected = -3.0 - 0.5 * (ratio + (prior * posterior.mean.square()).sum())
    assert_equal(evidence, expected)
    assert_equal(gradient, torch.autograd.grad(expected, logarithms)[0])


def test_directions_that_are_not_all_there():
    """Kronecker directions that do not span their blocks."""
    for name in ("mlp", "layer-norm"):
        _, network, _, posterior = fitted(name, Kronecker())
        cut = truncate(posterior.basis)
        priors = torch.linspace(0.4, 3.0, len(network.shapes), dtype=torch.float64)
        check_posterior(replace(
            posterior, basis=cut, curvatures=torch.linspace(0.1, 2.0, cut.rank).double(),
            prior_precision=for_each_tensor(network, priors),
        ))  # fmt: skip


@pytest.mark.parametrize("name", ["mlp", "cnn", "layer-norm", "batch-norm"])
def test_the_precision_under_its_old_name(name):
    _, network, _, posterior = fitted(name, Kronecker())
    priors = torch.linspace(0.4, 3.0, len(network.shapes), dtype=torch.float64)
    posterior = replace(posterior, prior_precision=for_each_tensor(network, priors))
    precision, expected = KroneckerPrecision.of(posterior, torch.float64), dense_posterior_precision(posterior)
    assert_equal(precision.to_matrix(), expected)
    assert_equal(precision.to_matrix(-1), expected.inverse())
    assert_equal(precision.diag(), expected.diagonal())
    assert_equal(precision.logdet(), torch.logdet(expected))


def test_priors_that_kronecker_directions_mix():
    _, network, _, posterior = fitted("mlp", Kronecker())
    each = torch.linspace(0.4, 3.0, network.n_params, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"each parameter tensor of a Kronecker block.*or use a diagonal"):
        replace(posterior, prior_precision=each).log_det_precision.item()


# -- laplace-torch's training ----------------------------------------------------------------------


def normalised(kind: str) -> nn.Module:
    layers = {"LayerNorm": nn.LayerNorm(5), "BatchNorm1d": nn.BatchNorm1d(5), "GroupNorm": nn.GroupNorm(1, 5)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), layers[kind], nn.Tanh(), nn.Linear(5, 2)).double()


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


@pytest.mark.parametrize(
    ("structure", "kind"),
    [("kron", kind) for kind in ("LayerNorm", "BatchNorm1d", "GroupNorm")]
    + [(structure, "LayerNorm") for structure in ("lowrank", "diag", "full")],
)
def test_training_of_networks_with_normalisations(kind, structure):
    """Its default is one prior precision for each tensor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        la, model, evidences, _ = laplace.marglik_training(
            normalised(kind), loader(), "classification", f"debiased_{structure}",
            backend=laplace.curvature.CurvlinopsGGN, n_epochs=2, n_hypersteps=3, lr_hyp=0.3,
        )  # fmt: skip
    assert len(la.prior_precision) == len(set(la.prior_precision.tolist())) == 6
    assert evidences[2] < evidences[1] < evidences[0]  # negative
    prior = torch.cat([p.expand(t.numel()) for p, t in zip(la.prior_precision, model.parameters(), strict=True)])
    assert_equal(la.prior_precision_diag, prior)
    x = next(iter(loader()))[0]
    jacobian = dense_jacobian(model, x)
    precision = dense_curvature(la.posterior) + torch.diag(prior)
    assert_equal(la._glm_predictive_distribution(x)[1], jacobian @ precision.inverse() @ jacobian.mT)
    assert_equal(la.log_det_posterior_precision, torch.logdet(precision))


def test_joint_blocks_take_a_prior_for_each_tensor_later():
    joint = DebiasedKronLaplace(normalised("LayerNorm"), "classification")
    joint.fit(loader())
    six = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    joint.prior_precision = six
    expected = dense_curvature(joint.posterior) + torch.diag(joint.prior_precision_diag)
    assert_equal(joint.log_det_posterior_precision, torch.logdet(expected))
    assert_equal(joint.posterior_precision.to_matrix(), expected)
    before = joint.log_marginal_likelihood()
    joint.optimize_prior_precision(init_prior_prec=six)
    assert joint.prior_precision.shape == (6,)
    assert joint.log_marginal_likelihood() > before


def test_a_joint_block_that_is_too_large(monkeypatch):
    monkeypatch.setattr(kronecker, "MAX_OUTPUTWISE", 50)
    joint = DebiasedKronLaplace(normalised("LayerNorm"), "classification", prior_precision=3.0)
    joint.fit(loader())
    with pytest.raises(ValueError, match=r"5 outputs and 4 inputs.*separate_bias=True, biases in blocks of their own"):
        joint.prior_precision = torch.linspace(0.5, 2.0, 6)
    assert float(joint.prior_precision) == 3.0
    as_told = DebiasedKronLaplace(normalised("LayerNorm"), "classification", separate_bias=True)
    as_told.fit(loader())
    as_told.prior_precision = torch.linspace(0.5, 2.0, 6)


@pytest.mark.parametrize("structure", ["kron", "lowrank", "diag", "full"])
@pytest.mark.parametrize("subset", ["last_layer", "subnetwork"])
def test_a_part_of_the_network(subset, structure):
    options: dict[str, Any] = {"params": ["0.bias", "1.*", "3.weight"]} if subset == "subnetwork" else {}
    la = DebiasedLaplace(normalised("LayerNorm"), "classification", subset, structure, **options)
    la.fit(loader())
    n = len(la.network.shapes)
    priors = torch.linspace(0.5, 2.0, n, dtype=torch.float64)
    la.prior_precision = priors
    prior = for_each_tensor(la.network, priors)
    assert_equal(la.prior_precision_diag, prior)
    assert_equal(la.log_det_posterior_precision, torch.logdet(dense_curvature(la.posterior) + torch.diag(prior)))


# -- the maximum of the marginal likelihood --------------------------------------------------------


def trained(structure: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    model = normalised("LayerNorm").to(dtype)
    x, y = loader().dataset.tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()
    la = DebiasedLaplace(model, "classification", hessian_structure=structure, **options)
    la.fit([(x.to(dtype), y)], budget=None)
    la.fitted = replace(la.fitted, uniform=None)  # warnings about predictions are tested elsewhere
    return la


@pytest.mark.parametrize(
    ("structure", "prior"),
    [(s, p) for s in ("lowrank", "diag", "full") for p in ("layerwise", "diag")] + [("kron", "tensors")],
)
def test_the_maximum_for_several_prior_precisions(structure, prior, recwarn):
    """MacKay's equation for each of them, from dense matrices; it is a maximum, and there is one only."""
    la = trained(structure)
    start: dict[str, Any] = {"prior_structure": prior} if prior != "tensors" else {"init_prior_prec": torch.ones(6)}
    la.optimize_prior_precision(**start)
    best = la.prior_precision
    assert len(best) == (42 if prior == "diag" else 6)
    owners = (
        torch.arange(42) if prior == "diag" else torch.arange(6).repeat_interleave(torch.tensor(tensors_of(la.network)))
    )
    covariance = (dense_curvature(la.posterior) + torch.diag(best[owners])).inverse()
    n_effective = 1 - best[owners] * covariance.diagonal()
    sums = torch.zeros(2, len(best), dtype=torch.float64).index_add(
        1, owners, torch.stack([n_effective, best[owners] * la.mean.square()])
    )
    assert float((sums[0] - sums[1]).abs().max()) < 1e-6
    most = float(la.log_marginal_likelihood())
    la.optimize_prior_precision(init_prior_prec=torch.logspace(-3, 3, len(best)))
    assert float(la.log_marginal_likelihood()) == pytest.approx(most, rel=1e-10)
    for factor in (0.5, 2.0):
        la.prior_precision = best * torch.where(torch.arange(len(best)) % 2 == 0, factor, 1.0)
        assert float(la.log_marginal_likelihood()) < most
    assert not recwarn.list


def test_the_maximum_of_a_diagonal_curvature_in_closed_form():
    r""":math:`\delta\theta^2(\beta\lambda + \delta) = \beta\lambda`, one quadratic equation for each parameter."""
    la = trained("diag")
    la.optimize_prior_precision(prior_structure="diag")
    curvatures = la.posterior_precision - la.prior_precision
    squares = la.mean.square()
    root = (-curvatures * squares + ((curvatures * squares).square() + 4 * squares * curvatures).sqrt()) / (2 * squares)
    worst = (la.prior_precision / root - 1).abs().max()
    assert float(worst) < 1e-4  # of the precisions; the evidence is flat there
    evidence = float(la.log_marginal_likelihood())
    assert float(la.log_marginal_likelihood(root)) == pytest.approx(evidence, rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("structure", ["lowrank", "diag", "full"])
def test_steps_that_end_before_the_maximum_say_how_far_it_is(structure, dtype, recwarn):
    la = trained(structure, dtype)
    la.optimize_prior_precision(prior_structure="layerwise")
    most = float(la.log_marginal_likelihood())
    la.optimize_prior_precision(prior_structure="layerwise", n_steps=200)
    assert not recwarn.list
    for keywords in ({"n_steps": 3}, {"lr": 1e-3}, {"n_steps": 5, "lr": 1e-3}):
        with pytest.warns(UserWarning, match=r"After \d+ steps.* nats below its maximum\. Leave n_steps") as caught:
            la.optimize_prior_precision(prior_structure="layerwise", **keywords)
        reached, text = float(la.log_marginal_likelihood()), str(caught[0].message)
        assert f"After {keywords.get('n_steps', 100)} steps the marginal likelihood is {reached:.4g}" in text
        assert float(text.partition("and ")[2].split()[0]) == pytest.approx(most - reached, rel=0.01)
        assert caught[0].filename == __file__


def test_a_search_that_runs_out_of_steps(monkeypatch):
    la = trained("full")
    monkeypatch.setattr(tuning, "maximise_over_priors", partial(maximise_over_priors, max_iterations=2))
    with pytest.warns(UserWarning, match=r"ended before it was there: it still rises by up to .* nats for a prior"):
        la.optimize_prior_precision(prior_structure="layerwise")
    monkeypatch.undo()
    reached = float(la.log_marginal_likelihood())
    la.optimize_prior_precision(init_prior_prec=la.prior_precision)
    assert float(la.log_marginal_likelihood()) > reached


def test_prior_precisions_without_a_maximum():
    """Of parameters that are zero, and of those without any curvature: they stay where the search starts."""
    la = trained("diag")
    with torch.no_grad():
        la.model[3].bias.zero_()
        la.model[0].weight[:, 1] = 0.3
    x, y = loader().dataset.tensors
    x = x * torch.tensor([1.0, 0.0, 1.0])  # the second input is dead
    la.fit([(x, y)], budget=None)
    la.fitted = replace(la.fitted, uniform=None)
    with pytest.warns(UserWarning, match=r"no maximum in 7 of 42 prior precisions.*stay at init_prior_prec"):
        la.optimize_prior_precision(prior_structure="diag", init_prior_prec=2.5)
    stays = torch.zeros(42, dtype=torch.bool)
    stays[1:15:3] = stays[-2:] = True
    assert_equal(la.prior_precision[stays], torch.full((7,), 2.5, dtype=torch.float64))
    assert bool((la.prior_precision[~stays] != 2.5).all())
    with pytest.warns(UserWarning, match="no maximum in 1 of 6"):
        la.optimize_prior_precision(prior_structure="layerwise")
    la.prior_mean = la.mean.clone()
    with pytest.raises(ValueError, match=r"no maximum in any of the prior precisions.*gridsearch"):
        la.optimize_prior_precision(prior_structure="layerwise")


# -- what a low rank leaves out --------------------------------------------------------------------


def spread_curvature(network: Network, data: Any, posterior: Posterior) -> Tensor:
    ggn = dense_ggn(network.model, data.inputs, data.weights, Categorical(), data.targets)
    return float(posterior.scale) * ggn


@pytest.mark.parametrize("blocks", [None, "layer"])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("name", ["mlp", "layer-norm"])
def test_the_evidence_of_all_directions_is_between_the_bounds(name, rank, blocks):
    model, network, data, _ = fitted(name, Diagonal())
    structure = LowRank(rank, blocks)
    found = fit(
        model, [(data.inputs, data.targets)], Categorical(), structure=structure, sampler=UniformSampler(None),
        prior_precision=0.3,
    )  # fmt: skip
    posterior = found.posterior
    uniform = replace(data, weights=torch.full_like(data.weights, 1 / len(data.inputs)))
    every = spread_curvature(found.network, uniform, posterior)
    if blocks == "layer":
        mask = torch.zeros_like(every)
        start = 0
        for block in found.network.blocks:  # consecutive tensors
            mask[start : start + block.size, start : start + block.size] = 1
            start += block.size
        every = every * mask
    assert posterior.left_out is not None
    along = dense_curvature(posterior)
    assert_equal(posterior.left_out.sum(), (every.trace() - along.trace()) / posterior.scale)
    for prior in (torch.full((1,), 0.01), torch.full((1,), 5.0), torch.linspace(0.2, 2.0, len(network.shapes))):
        priors = prior.double() if len(prior) == 1 else for_each_tensor(network, prior.double())
        own = replace(posterior, prior_precision=priors)
        dense = torch.diag(own.parameter_prior)
        lacking = float(torch.logdet(every + dense) - torch.logdet(along + dense))
        least, most = own.left_out_log_det
        assert 0 < least <= lacking <= most


def test_bounds_that_are_attained():
    """All left-out curvatures equal, and as few as there can be."""
    shape = {"w": torch.Size([6])}
    block = Block("w", ("w",), (shape["w"],), DENSE, Stacked(), outputs=6)
    columns = torch.eye(6, dtype=torch.float64)[:2].reshape(2, 1, 6, 1)
    basis = Basis([block], shape, [DenseBasis((columns,))])
    one = torch.ones(1, dtype=torch.float64)
    for left_out, which in (([0.25, 0.25, 0.25, 0.25], 1), ([0.5, 0.5, 0.0, 0.0], 0)):
        posterior = Posterior(
            torch.zeros(6).double(), basis, torch.tensor([0.9, 0.5]).double(), 10, 0.3 * one,
            left_out=torch.tensor([sum(left_out)]).double(),
        )  # fmt: skip
        expected = torch.log1p(10 * torch.tensor(left_out).double() / 0.3).sum()
        assert posterior.left_out_log_det[which] == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(ValueError, match=r"trace of the curvature that is left out, got None. Fit again"):
        _ = replace(posterior, left_out=None).left_out_log_det


def test_the_evidence_of_a_low_rank_says_what_it_lacks(tmp_path):
    la = trained("lowrank")
    x, y = loader().dataset.tensors
    la.fit([(x, y)], budget=None, structure=LowRank(2))
    with pytest.warns(UserWarning, match=r"too large to be compared.*log_marginal_likelihood_bounds\(\)") as caught:
        for _ in range(3):
            value = float(la.log_marginal_likelihood())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    full = trained("full")
    low, high = la.log_marginal_likelihood_bounds()
    assert low <= float(full.log_marginal_likelihood()) <= high < value
    assert full.log_marginal_likelihood_bounds() == (float(full.log_marginal_likelihood()),) * 2
    la.save(tmp_path / "posterior")
    again = DebiasedLaplace.load(tmp_path / "posterior", la.model)
    assert again.log_marginal_likelihood_bounds() == (low, high)


def test_nothing_is_lacking(recwarn):
    """Of all the directions that the data have, and of subnetworks."""
    la = trained("lowrank")
    x, y = loader().dataset.tensors
    la.fit([(x, y)], budget=None, structure=LowRank(42))
    full = float(trained("full").log_marginal_likelihood())
    assert float(la.log_marginal_likelihood()) == pytest.approx(full, rel=1e-9)
    assert la.log_marginal_likelihood_bounds() == pytest.approx((full, full), rel=1e-9)
    some = DebiasedLaplace(
        la.model, "classification", "subnetwork", "lowrank", subnetwork_indices=torch.arange(3, 30, 2)
    )
    some.fit([(x, y)], budget=None, structure=LowRank(2))
    low, high = some.log_marginal_likelihood_bounds()
    dense = DebiasedLaplace(la.model, "classification", "subnetwork", "full", subnetwork_indices=torch.arange(3, 30, 2))
    dense.fit([(x, y)], budget=None)
    assert low <= float(dense.log_marginal_likelihood()) <= high < float(some.log_marginal_likelihood())
    assert not [own for own in recwarn.list if "low rank" in str(own.message)][1:]
