"""Every fold in both roles; importance and folds together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from debiased_laplace.curvature.structures import Diagonal, Full, Kronecker, LowRank
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.sampling.sample import IN_ALL_FOLDS, Sample, WeightedData
from debiased_laplace.sampling.samplers import PrioritySampler, UniformSampler
from debiased_laplace.sampling.splits import CrossFit, Single, TwoBatch
from debiased_laplace.testing import dense_basis, dense_ggn
from tests.datasets import targets
from tests.networks import ZOO
from tests.test_curvatures import SPECTRUM, measured_and_true
from tests.tolerances import MONTE_CARLO_Z, assert_equal, z_scores

CASE = ZOO["cnn"]
STRUCTURES = [Kronecker(), Diagonal(), Full(), LowRank(4), LowRank(2, blocks="layer")]
every_structure = pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
N = 40


def confident() -> nn.Module:
    """A model whose outputs are large, so that few data have curvature left."""
    model = CASE.model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6)
    return model


def stream(n: int = N, seed: int = 1, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    inputs, labels = CASE.inputs(n, seed=seed), targets(Categorical(), n, 2, seed)
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def fitted(batches: Any = None, model: nn.Module | None = None, **options: Any) -> Fit:
    batches = stream() if batches is None else batches
    return fit(confident() if model is None else model, batches, Categorical(), **{"generator": 3} | options)


def dense(result: Fit) -> Tensor:
    columns = dense_basis(result.posterior.basis)
    return (columns * result.posterior.curvatures) @ columns.mT


def by_hand(result: Fit, structure: Any, split: Any, inputs_of_all: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Final directions ``[D, rank]`` and curvatures, from the folds of a fit, by the dense matrix where it can be."""
    network, sample = result.network, result.sample
    assert isinstance(sample, Sample)
    n_light = int((sample.folds != IN_ALL_FOLDS).sum())

    def basis_of(folds: tuple[int, ...], like: Any = None) -> Any:
        own = CurvatureData(network, sample.fold(folds), Categorical())
        statistics = structure.measure(network, own)
        if inputs_of_all is not None:
            factors = network.factors(inputs_of_all)
            for block, a in zip(network.blocks, statistics.inputs, strict=True):
                columns = factors.inputs(block)
                a.copy_(torch.einsum("ngis,ngjs->gij", columns, columns) / len(inputs_of_all))
        return structure.eigenbasis(network, statistics, like)

    def quadratic(columns: Tensor, data: WeightedData) -> Tensor:
        ggn = dense_ggn(result.network.model, data.inputs, data.weights, Categorical())
        return torch.einsum("dr,de,er->r", columns, ggn, columns)

    final = basis_of(split.final)
    selves = sample.data.weights.clamp_max(1 / sample.n_seen)
    total = quadratic(dense_basis(final), replace(sample.data, weights=selves))
    for own in split.rounds:
        along = basis_of(own.directions, final)
        index = torch.isin(sample.folds, torch.tensor(own.curvatures)).nonzero()[:, 0]
        weights = (sample.data.weights - selves)[index] * n_light / len(index)
        values = quadratic(dense_basis(along), replace(sample.data.take(index), weights=weights))
        if split.average == "rotated":
            overlaps = dense_basis(final).mT @ dense_basis(along)
            values = overlaps.square() @ values
        total += values / len(split.rounds)
    return dense_basis(final), total


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != Full()], ids=repr)  # for Full see below
@pytest.mark.parametrize(
    "split", [CrossFit(2), CrossFit(3), CrossFit(3, "rotated"), TwoBatch(), TwoBatch(3, 2)], ids=repr
)
@pytest.mark.parametrize("sampler", [UniformSampler(18), PrioritySampler(18)], ids=repr)
def test_a_fit_is_its_folds_put_together(structure, split, sampler):
    """Against the dense matrices of the folds; directions see the inputs of the whole stream where the sampler does."""
    result = fitted(structure=structure, split=split, sampler=sampler)
    if isinstance(sampler, PrioritySampler):
        assert 2 <= int((result.sample.folds == IN_ALL_FOLDS).sum()) <= 12
    observed = isinstance(sampler, PrioritySampler) and isinstance(structure, Kronecker)
    everything = torch.cat([x for x, _ in stream()]) if observed else None
    columns, curvatures = by_hand(result, structure, split, everything)
    assert_equal(dense(result), (columns * curvatures) @ columns.mT)


@pytest.mark.parametrize("average", ["rank", "rotated"])
def test_dense_directions_are_cross_fitted_too(average):
    """With as many data as there are parameters in a fold, eigenvalues are distinct and directions are determined."""
    model = nn.Linear(4, 1, bias=False).double()
    inputs = torch.randn(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * SPECTRUM[:4].sqrt()
    split = CrossFit(3, average)
    result = fit(model, [(inputs, torch.zeros(60, 1).double())], Gaussian(), structure=Full(), split=split,
                 sampler=UniformSampler(None), n_data=240)  # fmt: skip
    final = torch.linalg.eigh(inputs.mT @ inputs).eigenvectors.flip(1)
    total = (inputs @ final).square().mean(0) / 4
    for fold in range(3):
        own, others = (inputs[result.sample.folds == fold], inputs[result.sample.folds != fold])
        vectors = torch.linalg.eigh(others.mT @ others).eigenvectors.flip(1)
        values = (own @ vectors).square().mean(0)
        total += (values if average == "rank" else (final.mT @ vectors).square() @ values) * 3 / 4 / 3
    assert_equal(result.posterior.curvatures, total)


@every_structure
def test_with_all_data_and_any_sampler_the_full_fit(structure):
    """Importance has nothing to choose from, and the statistics of the stream are those of the data."""
    one = fitted(structure=structure, split=Single(), sampler=UniformSampler(None))
    other = fitted(structure=structure, split=CrossFit(), sampler=PrioritySampler(N))
    assert bool((other.sample.folds == IN_ALL_FOLDS).all())
    assert_equal(dense(other), dense(one))
    assert other.mean_loss == pytest.approx(one.mean_loss, rel=1e-9)


@pytest.mark.parametrize("sampler", [UniformSampler(20), PrioritySampler(20)], ids=repr)
@pytest.mark.parametrize("average", ["rank", "rotated"])
def test_directions_that_do_not_depend_on_data_need_no_split(sampler, average):
    single, crossed = (
        fitted(structure=Diagonal(), split=split, sampler=sampler) for split in (Single(4), CrossFit(4, average))
    )
    if isinstance(sampler, UniformSampler):
        assert_equal(crossed.posterior.curvatures, single.posterior.curvatures)
    else:  # folds of unequal size weigh the same
        difference = (crossed.posterior.curvatures - single.posterior.curvatures).abs().max()
        assert float(difference) < 0.1 * float(single.posterior.curvatures.max())


def test_the_loss_and_the_inputs_are_those_of_the_whole_stream():
    result = fitted(sampler=PrioritySampler(6))
    inputs, labels = (torch.cat(column) for column in zip(*stream(), strict=True))
    losses = nn.functional.cross_entropy(confident()(inputs), labels).detach()
    assert result.mean_loss == pytest.approx(float(losses), rel=1e-9)
    network = Network.discover(confident(), inputs)
    for part, block in zip(result.posterior.basis.parts, network.blocks, strict=True):
        columns = network.factors(inputs).inputs(block)
        gram = torch.einsum("ngis,ngjs->gij", columns, columns)
        rotated = part.inputs.mT @ gram @ part.inputs
        assert_equal(rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)))


@pytest.mark.parametrize("size", [1, 5, 40])
def test_batches_of_any_size_give_the_same_fit(size):
    one, other = (fitted(stream(size=s), sampler=PrioritySampler(12), split=CrossFit(3)) for s in (size, 7))
    assert torch.equal(one.direction_indices, other.direction_indices)
    assert_equal(dense(one), dense(other))


def test_cross_fitting_does_not_overstate_where_one_batch_does():
    """On a known population: the k-th curvature, against that of the final directions."""
    single, true = measured_and_true(Single(), "projected", n=8)
    crossed, _ = measured_and_true(CrossFit(4), "projected", n=8)
    top_single, top_crossed = (
        float((found[:, 0] - true[:, 0]).mean() / true[:, 0].mean()) for found in (single, crossed)
    )
    assert float(z_scores(single - true, torch.zeros(len(SPECTRUM)).double())[0]) > MONTE_CARLO_Z
    assert top_crossed < 0.25 * top_single
    last = float(crossed[:, -1].mean() / true[:, -1].mean())
    assert last > 2 * float(single[:, -1].mean() / true[:, -1].mean())


@every_structure
def test_priority_fits_are_closer_to_the_full_one_than_uniform_ones(structure):
    """Output variances at the same budget, over seeds."""
    inputs = CASE.inputs(9, seed=7)

    def variances(result: Fit) -> Tensor:
        return functional_moments(result.network, result.posterior, inputs, covariance=False)[1].log()

    batches = stream(300)
    full = variances(fitted(batches, structure=structure, split=Single(), sampler=UniformSampler(None)))
    errors = {}
    for name, sampler, split in (
        ("uniform", UniformSampler(24), None), ("priority", PrioritySampler(24), None),
        ("crossed", PrioritySampler(24), CrossFit(3)),
    ):  # fmt: skip
        found = [
            variances(fitted(batches, structure=structure, split=split, sampler=sampler, generator=seed)) - full
            for seed in range(6)
        ]
        errors[name] = float(torch.stack(found).abs().mean())
    assert errors["priority"] < 0.7 * errors["uniform"]
    assert errors["crossed"] < 0.7 * errors["uniform"]


@pytest.mark.parametrize("changed", [False, True])
def test_two_priority_fits_add_up(changed):
    """Everything is measured at the present parameters: what was summed at others is not used."""
    first, second = stream(30), stream(20, seed=2)
    one = fitted(first, sampler=PrioritySampler(12), split=CrossFit(2))
    model = confident()
    if changed:
        with torch.no_grad():
            next(model.parameters()).mul_(1.1)
    both = fitted(second, model, sampler=PrioritySampler(10), split=CrossFit(2), previous=one)
    assert (both.n_seen, both.posterior.n_data, len(both.sample.data)) == (50, 50, 22)
    everything = torch.cat([x for x, _ in first + second])
    columns, curvatures = by_hand(both, Kronecker(), CrossFit(2), None if changed else everything)
    assert_equal(dense(both), (columns * curvatures) @ columns.mT)
    losses = fitted(first + second, model, sampler=UniformSampler(None), split=Single()).mean_loss
    if changed:
        assert both.observed is None
        data = both.sample.data
        own = nn.functional.cross_entropy(model(data.inputs), data.targets, reduction="none").detach()
        assert both.mean_loss == pytest.approx(float(data.weights @ own), rel=1e-9)
    else:
        assert both.mean_loss == pytest.approx(losses, rel=1e-9)
    uniform = fitted(second, model, sampler=UniformSampler(10), split=CrossFit(2), previous=one)
    assert uniform.observed is None


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_data_than_folds(n):
    """They are the whole stream and belong to all folds."""
    batches = stream(n)
    result = fitted(batches)
    assert_equal(dense(result), dense(fitted(batches, sampler=UniformSampler(None), split=Single())))
    both = fitted(batches, previous=fitted(stream(12, seed=4)))
    assert both.n_seen == 12 + n


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()], ids=lambda x: type(x).__name__)
def test_importance_keeps_its_use_with_random_vectors(likelihood):
    """The trace of the curvature from one vector for each datum, on a confident network with many outputs."""
    generator = torch.Generator().manual_seed(0)
    outputs = 8 * torch.randn(2000, 60, generator=generator, dtype=torch.float64)
    targets = torch.zeros(2000, 60) if isinstance(likelihood, Bernoulli) else torch.zeros(2000, dtype=torch.long)
    traces = likelihood.curvature(outputs, targets)
    errors: dict[str, list[float]] = {"priority": [], "uniform": []}
    for seed in range(40):
        own = torch.Generator().manual_seed(seed)
        for name, sampler in (("priority", PrioritySampler(64)), ("uniform", UniformSampler(64))):
            data = sampler.draw(
                [(outputs, targets)], 1, own, likelihood=likelihood, observe=lambda inputs, _: inputs
            ).data
            uniforms = torch.rand(64, 1, 60, generator=own, dtype=torch.float64)
            found = likelihood.sampled_square_root(data.inputs, data.targets, uniforms).square().sum((0, 2))
            errors[name].append(float(data.weights @ found / traces.mean()) - 1)
    spread = {name: float(torch.tensor(values).square().mean()) ** 0.5 for name, values in errors.items()}
    assert spread["priority"] < 0.5 * spread["uniform"]


@pytest.mark.parametrize(
    "options", [{"curvature": "empirical_fisher"}, {"structure": Diagonal("hesscale_gn")}], ids=str
)
def test_other_curvatures_are_drawn_uniformly(options):
    """What a datum adds to them does not follow from its outputs."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 2)).double()
    result = fitted(stream(20), model, **options)
    assert result.settings["sampler"] == "UniformSampler(budget=1024)"
    assert fitted(stream(20), model).settings["sampler"].startswith("PrioritySampler(budget=1024")


def test_a_loader_that_uses_its_memory_again():
    inputs, labels = CASE.inputs(12), targets(Categorical(), 12, 2)

    def batches():
        x, y = torch.empty_like(inputs[:4]), torch.empty_like(labels[:4])
        for part in range(3):
            x.copy_(inputs[4 * part : 4 * part + 4])
            y.copy_(labels[4 * part : 4 * part + 4])
            yield x, y

    for sampler in (PrioritySampler(100), UniformSampler(None), UniformSampler(9)):
        data = fitted(batches(), sampler=sampler, split=Single()).sample.data
        assert_equal(data.inputs, inputs[data.indices], 0.0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mc_samples": 0}, "mc_samples"), ({"curvature": "hessian"}, "a curvature out of"),
        ({"chunk_size": 0}, "chunk_size"), ({"sampler": PrioritySampler(3)}, "budget of at least 4 data"),
        ({"sampler": UniformSampler(3)}, "budget of at least 4 data"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_found_before_the_data_are_read(options, match):
    def unreadable():
        raise AssertionError("the data were read")
        yield

    with pytest.raises(ValueError, match=match):
        fitted(unreadable(), **options)


def test_bad_targets_are_found_on_the_way():
    inputs, labels = CASE.inputs(6), torch.tensor([0, 1, 0, 1, 0, 5])
    with pytest.raises(ValueError, match="class indices from 0 to 1"):
        fitted([(inputs, labels)], sampler=PrioritySampler(4))
