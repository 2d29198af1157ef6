"""Curvatures of draws from a known, finite pool, whose data choose the directions: unbiased for the pool."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from debiased_laplace.curvature.structures import Diagonal, Full, Kronecker, LowRank
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.likelihoods import Bernoulli
from debiased_laplace.sampling.sample import IN_ALL_FOLDS, Sample, WeightedData
from debiased_laplace.sampling.samplers import PrioritySampler, UniformSampler
from debiased_laplace.sampling.splits import CrossFit, Single, TwoBatch
from debiased_laplace.testing import dense_basis
from tests.tolerances import MONTE_CARLO_Z, assert_equal, assert_unbiased, z_scores

N, D = 40, 8


def pool(n: int = N, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A logistic regression, its inputs, and every datum's curvature ``[n, D, D]``; no direction stands out."""
    inputs = torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model = nn.Linear(D, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(0.7)
        p = model(inputs).sigmoid()
    return model, inputs, (p * (1 - p))[:, :, None] * inputs[:, :, None] * inputs[:, None, :]


def fitted(seed: int, n: int = N, model_seed: int = 0, **options: Any) -> Fit:
    model, inputs, _ = pool(n, model_seed)
    return fit(model, [(inputs, torch.zeros(n, 1).double())], Bernoulli(), generator=seed, **options)


def along(matrix: Tensor, columns: Tensor) -> Tensor:
    return torch.einsum("dr,de,er->r", columns, matrix, columns)


def errors(seeds: int, **options: Any) -> Tensor:
    """Curvature of every direction, minus that of the pool along it, ``[seeds, rank]``."""
    true = pool()[2].mean(0)
    results = [fitted(seed, **options) for seed in range(seeds)]
    return torch.stack([r.posterior.curvatures - along(true, dense_basis(r.posterior.basis)) for r in results])


SAMPLERS = [UniformSampler, PrioritySampler, lambda budget: PrioritySampler(budget, calibrated=False)]
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=["uniform", "calibrated", "priority"])


def assert_no_bias(found: Tensor) -> None:
    """Of any direction, nor of the first against the last, where selection shows most."""
    assert_unbiased(found, torch.zeros(found.shape[1], dtype=torch.float64))
    contrast = found @ torch.linspace(1, -1, found.shape[1]).double()
    assert_unbiased(contrast[:, None], torch.zeros(1, dtype=torch.float64))


@every_sampler
@pytest.mark.parametrize("structure", [Full(), Kronecker(), LowRank(2)], ids=repr)
@pytest.mark.parametrize("budget", [12, 32])
def test_two_batches_are_unbiased_for_the_pool(structure, sampler, budget):
    """Along the directions that the first batch chose, whatever share of the pool it is."""
    assert_no_bias(errors(40, structure=structure, sampler=sampler(budget), split=TwoBatch()))


@pytest.mark.parametrize("sampler", SAMPLERS[:2], ids=["uniform", "calibrated"])
@pytest.mark.parametrize("budget", [16, 32, 38])
def test_cross_fitting_stays_close_to_the_pool(sampler, budget):
    """The first against the last direction, which were off by 14 to 58 standard errors when one fold stood for all."""
    found = errors(50, structure=Full(), sampler=sampler(budget), split=CrossFit())
    contrast = found @ torch.linspace(1, -1, D).double()
    assert_unbiased(contrast[:, None], torch.zeros(1, dtype=torch.float64))


@every_sampler
@pytest.mark.parametrize("split", [Single(3), TwoBatch(), CrossFit(3), CrossFit(3, "rotated")], ids=repr)
@pytest.mark.parametrize(
    "options",
    [{"structure": Full()}, {"structure": LowRank(3)}, {"structure": Kronecker()}, {"structure": Diagonal()},
     {"structure": Kronecker(), "estimator": "factored"}, {"structure": Diagonal("hesscale_gn")}],
    ids=str,
)  # fmt: skip
def test_a_pool_drawn_as_a_whole_has_its_own_curvatures(options, split, sampler):
    """Whatever the roles: along the final directions, those of all data."""
    result = fitted(0, sampler=sampler(N), split=split, **options)
    columns, curvatures = dense_basis(result.posterior.basis), result.posterior.curvatures
    if options.get("estimator") != "factored":
        assert_equal(curvatures, along(pool()[2].mean(0), columns))
    if not isinstance(split, TwoBatch) and not isinstance(options["structure"], Diagonal):
        whole = fitted(0, sampler=UniformSampler(None), split=Single(), **options)
        assert_equal(curvatures, whole.posterior.curvatures)


def test_what_convexity_does_to_variances_and_the_determinant():
    """Curvatures that are one standard error too large or too small, with equal probability."""
    options: dict[str, Any] = {"structure": Full(), "sampler": UniformSampler(24), "split": CrossFit(8)}
    result = fitted(0, **options)
    assert result.curvature_errors is not None
    posterior = replace(result.posterior, noise_variance=0.5, prior_precision=torch.tensor([3.0], dtype=torch.float64))
    result = replace(result, curvature_errors=result.curvature_errors / 100)
    precisions, off = posterior.precisions, 2 * N * result.curvature_errors
    variances = (1 / (precisions + off) + 1 / (precisions - off)).sum() / (2 / precisions).sum() - 1
    log_det = ((precisions + off).log() + (precisions - off).log() - 2 * precisions.log()).sum() / 2
    assert result.convexity(posterior) == pytest.approx((float(variances), float(log_det)), rel=1e-4)
    assert float(variances) > 1e-7
    assert fitted(0, **options | {"split": TwoBatch()}).convexity() is None


def test_errors_are_those_of_the_mean_over_rounds():
    """Of directions that do not depend on data, by hand."""
    result = fitted(0, structure=LowRank(2), sampler=UniformSampler(20), split=CrossFit(4))
    matrices = pool()[2]
    sample, rounds = result.sample, []
    assert sample is not None and result.curvature_errors is not None
    for fold in range(4):
        others, own = (sample.data.indices[chosen] for chosen in (sample.folds != fold, sample.folds == fold))
        directions = torch.linalg.eigh(matrices[others].mean(0)).eigenvectors.flip(1)[:, :2]
        rounds.append(along(matrices[own].mean(0), directions) * (1 - 20 / N))
    assert_equal(result.curvature_errors, torch.stack(rounds).std(0) / 2)


# -- what a datum stands for -----------------------------------------------------------------------


def test_weights_of_two_batches_as_in_the_theory():
    """A share of n_A / N for the first batch, and the rest for the second."""
    own = torch.full((12,), 1 / 12, dtype=torch.float64)
    data = WeightedData(torch.zeros(12, 1), torch.zeros(12), own, torch.arange(12))
    sample = Sample(data, torch.arange(12) % 3, 3, 30)
    values = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = sample.folds == 0, sample.folds != 0
    weights = sample.self_weights
    weights[second] += sample.factor((1, 2)) * (data.weights - sample.self_weights)[second]
    expected = 4 / 30 * values[first].mean() + (1 - 4 / 30) * values[second].mean()
    assert float(weights @ values) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("scores", ["equal", "varied"])
@pytest.mark.parametrize("n_data", [None, 60])
def test_what_some_data_chose_is_unbiased_for_all(scores, n_data):
    """A function of the first fold, of every datum: the largest entry of the fold's mean. Thousands of draws.

    Given the first fold, exactly so for a draw in which every datum is decided on its own.
    """
    generator = torch.Generator().manual_seed(1)
    size, reps = n_data or 30, 20_000
    features = torch.randn(size, 6, dtype=torch.float64, generator=generator).square()
    p = torch.full((size,), 0.5) if scores == "equal" else torch.linspace(0.2, 1, size)
    p = p.double() if n_data is None else p.double().clamp_max(0.99)
    seen = torch.rand(reps, size, generator=generator) < (1.0 if n_data is None else 0.5)
    drawn = seen & (torch.rand(reps, size, generator=generator, dtype=torch.float64) < p)
    share = 1.0 if n_data is None else 0.5  # of the training set that the stream is
    weights = 1 / (size * share * p)
    first = drawn & (torch.rand(reps, size, generator=generator) < 0.5)
    chosen = torch.einsum("rn,nd->rd", first.double() * weights, features).argmax(1)
    along_chosen = features[:, chosen].T
    selves = torch.full_like(weights, 1 / size).minimum(weights)
    others = 2 * (drawn & ~first) * (weights - selves)
    found = ((drawn * selves + others) * along_chosen).sum(1)
    assert_unbiased((found - along_chosen.mean(1))[:, None], torch.zeros(1, dtype=torch.float64))
    old = (2 * (drawn & ~first) * weights * along_chosen).sum(1) - along_chosen.mean(1)
    assert float(z_scores(old[:, None], torch.zeros(1).double())) < -MONTE_CARLO_Z


@pytest.mark.parametrize("sampler", [UniformSampler(20), PrioritySampler(20)], ids=repr)
def test_a_stream_that_is_a_part_of_the_training_set_stands_for_the_rest(sampler):
    """Random halves of a pool: unbiased for the pool; taken for all of it, not."""
    model, inputs, matrices = pool()
    found: dict[int | None, list[Tensor]] = {None: [], N: []}
    for seed in range(60):
        own = inputs[torch.randperm(N, generator=torch.Generator().manual_seed(1000 + seed))[:20]]
        for n_data, errors_ in found.items():
            result = fit(model, [(own, torch.zeros(20, 1).double())], Bernoulli(), generator=seed, sampler=sampler,
                         structure=Full(), split=TwoBatch(), n_data=n_data)  # fmt: skip
            assert result.posterior.n_data == (n_data or 20)
            posterior = result.posterior
            errors_.append(posterior.curvatures - along(matrices.mean(0), dense_basis(posterior.basis)))
    assert_no_bias(torch.stack(found[N]))
    contrast = torch.stack(found[None]) @ torch.linspace(1, -1, D).double()
    assert float(z_scores(contrast[:, None], torch.zeros(1).double())) > MONTE_CARLO_Z


def test_no_datum_of_a_part_is_certain():
    """Of a training set of five times the size, each stands for five; of a smaller one, which was seen twice, none."""
    options: dict[str, Any] = {"sampler": PrioritySampler(32), "structure": Full(), "split": CrossFit()}
    whole, part, twice = (fitted(0, n_data=n, **options).sample for n in (None, 5 * N, N // 2))
    assert whole is not None and part is not None and twice is not None
    certain = whole.folds == IN_ALL_FOLDS
    assert 0 < int(certain.sum()) < 32
    assert torch.equal(whole.data.indices, part.data.indices)
    assert torch.equal(part.data.weights, whole.data.weights)
    assert torch.bincount(part.folds).tolist() == [8, 8, 8, 8]
    assert_equal(part.self_weights, torch.full((32,), 1 / (5 * N), dtype=torch.float64))
    assert torch.equal(twice.folds, whole.folds)
    assert_equal(twice.self_weights[certain], torch.full((int(certain.sum()),), 1 / N, dtype=torch.float64))


def test_parts_of_training_sets_add_up_by_the_sizes_of_these():
    """Two streams with a fifth and with all of their training sets."""
    one = fitted(0, sampler=UniformSampler(None), n_data=5 * N, split=CrossFit(2), structure=Full())
    both = fitted(1, sampler=UniformSampler(None), split=CrossFit(2), structure=Full(), previous=one, model_seed=0)
    assert both.sample is not None
    assert (both.n_seen, both.posterior.n_data, both.sample.size) == (2 * N, 6 * N, 6 * N)
    weights = torch.tensor([5 / 6 / N] * N + [1 / 6 / N] * N, dtype=torch.float64)
    assert_equal(both.sample.data.weights, weights)
    assert_equal(both.sample.self_weights, torch.full((2 * N,), 1 / 6 / N, dtype=torch.float64))


# -- too few data for the roles --------------------------------------------------------------------


@pytest.mark.parametrize("split", [CrossFit(), TwoBatch(), TwoBatch(8, 1)], ids=repr)
@pytest.mark.parametrize("n_uncertain", [1, 2])
def test_fewer_uncertain_data_than_folds_are_still_two_batches(split, n_uncertain):
    """They measure along directions that they had no part in, in the rounds that have any."""
    scores = torch.tensor([9.0] * 10 + [1e-3] * 30, dtype=torch.float64)

    class Given:
        def prepare_targets(self, targets: Tensor, n_outputs: int) -> Tensor:
            return targets

        def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs[:, 0]

    sample = PrioritySampler(10 + n_uncertain).draw(
        [(scores[:, None], torch.zeros(40))], split.folds, torch.Generator().manual_seed(0), likelihood=Given(),
        observe=lambda inputs, _: inputs,
    )  # fmt: skip
    assert sorted(sample.folds.tolist()) == [IN_ALL_FOLDS] * 10 + list(range(split.folds - n_uncertain, split.folds))
    measuring = {fold for one in split.rounds for fold in one.curvatures}
    assert measuring & set(sample.folds.tolist())


def test_the_fit_of_few_uncertain_data_is_unbiased():
    """A budget with two chance data at most, in four folds."""
    found = errors(60, structure=Full(), sampler=PrioritySampler(39), split=CrossFit())
    assert_no_bias(found[:, [0, -1]])


def test_one_datum_for_both_roles_is_said():
    match = "others to measure the curvature along them, got 1 in all.*overstated"
    with pytest.warns(UserWarning, match=match) as caught:
        fitted(0, n=1, n_data=50, structure=Full(), sampler=PrioritySampler(4))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(0, n=2, n_data=50, structure=Full(), sampler=PrioritySampler(4))
        fitted(0, n=1, structure=Full(), sampler=PrioritySampler(4))
        fitted(0, n=1, n_data=50, structure=Diagonal(), sampler=PrioritySampler(4))
        fitted(0, n=1, n_data=50, structure=Full(), sampler=PrioritySampler(4), split=Single())
