"""Networks that are the same function with other weights: what curvature and posterior make of them, exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.testing import dense_ggn, dense_jacobian
from tests.test_eval import experiments  # noqa: F401
from tests.tolerances import EXACT, assert_equal

pytestmark = pytest.mark.usefixtures("experiments")
FACTOR, SIZES = 3.0, (4, 5, 3)  # inputs, width, outputs


def data(n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, SIZES[0], generator=generator, dtype=torch.float64), torch.arange(n) % SIZES[2]


def pair(kind: str) -> tuple[nn.Sequential, nn.Sequential]:
    """A network, and the same function with other weights."""
    import invariance

    torch.manual_seed(0)
    normalisations = {"layer norm": nn.LayerNorm, "batch norm": nn.BatchNorm1d}
    model = invariance.network(normalisations.get(kind, lambda _: nn.Identity()), *SIZES)
    model(data(seed=1)[0])  # statistics of batch normalisation
    model.eval()
    if kind in normalisations:
        return model, invariance.before_normalisation(model, FACTOR)
    factors = torch.full((SIZES[1],), FACTOR, dtype=torch.float64)
    if kind == "units":
        factors = torch.linspace(0.3, 3, SIZES[1], dtype=torch.float64)
    return model, invariance.of_units(model, factors)


def scales(model: nn.Module, other: nn.Module) -> Tensor:
    """By what the other network has every parameter multiplied, ``[D]``."""
    ratios = [b / a for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    return torch.cat([torch.where(ratio.isnan(), 1.0, ratio).flatten() for ratio in ratios]).detach()


def fitted(model: nn.Module, **settings: Any) -> dl.Laplace:
    return dl.fit(model, [data()], "classification", sampler=dl.UniformSampler(None), split=dl.Single(), **settings)


def with_priors(posterior: dl.Laplace, priors: Tensor) -> dl.Laplace:
    return replace(posterior, posterior=replace(posterior.posterior, prior_precision=priors))


def covariance(posterior: dl.Laplace) -> Tensor:
    return posterior.predict(data(6, seed=2)[0], covariance=True).outputs_covariance


KINDS = ("layer", "units", "layer norm", "batch norm")
APART: dict[str, dict[str, Any]] = {
    "K-FAC": {"structure": dl.Kronecker(), "separate_bias": True},
    "diagonal": {"structure": dl.Diagonal(), "separate_bias": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_jacobian_and_curvature_are_divided_by_the_scales(kind):
    (model, other), (x, _) = pair(kind), data()
    assert_equal(other(x), model(x))
    d, weights = scales(model, other), torch.full((len(x),), 1 / len(x), dtype=torch.float64)
    assert float(d.max() / d.min()) > 2
    assert_equal(dense_jacobian(other, x), dense_jacobian(model, x) / d)
    before, after = (dense_ggn(one, x, weights, Categorical()) for one in (model, other))
    assert_equal(after, before / d / d[:, None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", [dl.Full(), dl.Diagonal()], ids=["full", "diagonal"])
def test_a_prior_that_is_rescaled_as_well_leaves_the_posterior_and_the_evidence(kind, structure):
    """The rescaled network with one prior precision is the other one with that times the squares of the scales."""
    model, other = pair(kind)
    d = scales(model, other)
    before, after = fitted(model, structure=structure), fitted(other, structure=structure)
    assert_equal(covariance(with_priors(after, 2 / d.square())), covariance(with_priors(before, 0 * d + 2)))
    assert_equal(covariance(with_priors(before, 2 * d.square())), covariance(with_priors(after, 0 * d + 2)))
    evidence = with_priors(after, 2 / d.square()).log_marginal_likelihood()
    assert_equal(evidence, with_priors(before, 0 * d + 2).log_marginal_likelihood())
    off = (covariance(with_priors(after, 0 * d + 2)) - covariance(with_priors(before, 0 * d + 2))).abs().max()
    assert float(off / covariance(before).abs().max()) > 0.01


@pytest.mark.parametrize("kind", ["layer", "layer norm", "batch norm"])
@pytest.mark.parametrize("structure", APART)
@pytest.mark.filterwarnings("ignore:.*marginal likelihood")
def test_one_tuned_number_for_each_tensor_undoes_layers_and_one_number_does_not(kind, structure):
    model, other = pair(kind)
    before, after = fitted(model, **APART[structure]), fitted(other, **APART[structure])
    one, the_other = (posterior.tune(prior_structure="layerwise") for posterior in (before, after))
    d = scales(model, other).split([p.numel() for p in model.parameters()])
    names = [name for name, _ in model.named_parameters()]
    blocks = [before.network.blocks[i].parameters for members in before.posterior.basis.members for i in members]
    of_part = torch.stack([d[names.index(parameters[0])][0] for parameters in blocks])
    priors = [posterior.posterior.prior_precision for posterior in (one, the_other)]
    assert_equal(priors[1], priors[0] / of_part.square())
    assert_equal(covariance(the_other), covariance(one))
    logarithms = [covariance(one.tune()).diagonal(dim1=1, dim2=2).log() for one in (before, after)]
    assert float((logarithms[1] - logarithms[0]).abs().mean()) > 0.01


@pytest.mark.filterwarnings("ignore:.*marginal likelihood")
def test_weight_and_bias_together_are_undone_where_both_are_scaled():
    """Before a normalisation they are; after a rescaled ReLU layer the weight alone is, and K-FAC's directions turn."""
    tuned = {}
    for kind in ("layer norm", "layer"):
        tuned[kind] = [covariance(fitted(one).tune(prior_structure="layerwise")) for one in pair(kind)]
    assert_equal(*reversed(tuned["layer norm"]))
    before, after = tuned["layer"]
    assert float((after - before).abs().max() / before.abs().max()) > 1e-4


@pytest.mark.filterwarnings("ignore:.*marginal likelihood")
def test_one_number_undoes_one_factor_for_all():
    """The layers before normalisations alone, all times the same factor."""
    settings = {"parameters": ["1", "4"]}
    before, after = (fitted(one, **settings).tune() for one in pair("batch norm"))
    assert_equal(after.posterior.prior_precision, before.posterior.prior_precision / FACTOR**2)
    assert_equal(covariance(after), covariance(before))


def test_a_normalised_layer_has_no_curvature_along_itself():
    """Layer normalisation without its constant does not see the length of what it is given."""
    import invariance

    torch.manual_seed(0)
    model = invariance.network(lambda width: nn.LayerNorm(width, eps=0.0), *SIZES).eval()
    direction = torch.cat([
        (p if name[0] in "14" else torch.zeros_like(p)).flatten() for name, p in model.named_parameters()
    ]).detach()  # fmt: skip
    x, _ = data()
    jacobian = dense_jacobian(model, x)
    assert float((jacobian @ direction).abs().max()) < EXACT * float(jacobian.norm() * direction.norm())


def test_outputs_at_drawn_weights_and_of_the_linearisation():
    """By the Jacobian, and by writing the weights; they agree where the outputs are linear in the weights."""
    import width

    model, _ = pair("layer")
    x = data(5, seed=3)[0]
    posterior = fitted(model)
    sampled, linearised = width.both_outputs(model, posterior, x, 4)
    deviations = posterior.posterior.deviations(4, torch.Generator().manual_seed(0))
    expected = model(x).detach() + torch.einsum("ncd,sd->snc", dense_jacobian(model, x), deviations)
    assert_equal(linearised, expected)
    mean = nn.utils.parameters_to_vector(model.parameters()).detach()
    for deviation, outputs in zip(deviations, sampled, strict=True):
        nn.utils.vector_to_parameters(mean + deviation, model.parameters())
        assert_equal(outputs, model(x).detach())
    nn.utils.vector_to_parameters(mean, model.parameters())
    head = fitted(model, parameters="last_layer")
    assert_equal(*width.both_outputs(model, head, x, 4))
