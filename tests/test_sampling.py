"""A stream of batches becomes folds of weighted data."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from debiased_laplace._checks import NonFiniteError
from debiased_laplace.sampling.reservoir import Reservoir
from debiased_laplace.sampling.sample import IN_ALL_FOLDS, Sample, WeightedData
from debiased_laplace.sampling.samplers import PrioritySampler, UniformSampler, calibrated_threshold
from tests.tolerances import MONTE_CARLO_Z, assert_equal, assert_unbiased


def stream(n: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.arange(n, dtype=torch.float64)
    yield from zip(x[:, None].split(batch_size), (10 * x).split(batch_size), strict=True)


def draw(n: int, budget: int | None, folds: int = 1, seed: int = 0, batch_size: int = 3) -> list[WeightedData]:
    sample = UniformSampler(budget).draw(stream(n, batch_size), folds, torch.Generator().manual_seed(seed))
    assert sample.n_seen == n
    assert sample.n_folds == folds
    return [sample.fold([fold]) for fold in range(folds)]


@pytest.mark.parametrize("budget", [None, 5, 8, 100])
@pytest.mark.parametrize("folds", [1, 2, 3])
def test_folds_are_disjoint_and_know_their_data(budget, folds):
    drawn = draw(13, budget, folds)
    expected = min(13, budget or 13)
    assert sum(len(fold) for fold in drawn) == expected
    assert max(len(fold) for fold in drawn) - min(len(fold) for fold in drawn) <= 1
    indices = torch.cat([fold.indices for fold in drawn]).tolist()
    assert len(set(indices)) == expected
    for fold in drawn:
        assert fold.indices.tolist() == sorted(fold.indices.tolist())
        assert_equal(fold.inputs[:, 0], fold.indices.double(), 0.0)
        assert_equal(fold.targets, 10 * fold.indices.double(), 0.0)
        assert_equal(fold.weights, torch.full((len(fold),), 1 / len(fold), dtype=torch.float64))


@pytest.mark.parametrize("budget", [None, 5, 20])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 13, 50])
def test_the_draw_does_not_depend_on_the_batch_size(budget, batch_size):
    for one, other in zip(draw(29, budget, 2, batch_size=batch_size), draw(29, budget, 2), strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.inputs, other.inputs)


def test_the_same_seed_gives_the_same_draw_and_another_one_another():
    assert torch.equal(draw(50, 5, seed=1)[0].indices, draw(50, 5, seed=1)[0].indices)
    assert not torch.equal(draw(50, 5, seed=1)[0].indices, draw(50, 5, seed=2)[0].indices)


def test_every_datum_is_drawn_equally_often():
    """Inclusion counts over seeds, for each fold: binomial with the same probability for all data."""
    n, budget, seeds = 12, 6, 600
    counts = torch.zeros(2, n)
    for seed in range(seeds):
        for fold, data in enumerate(draw(n, budget, 2, seed=seed, batch_size=5)):
            counts[fold, data.indices] += 1
    probability = budget / 2 / n
    z = (counts - seeds * probability) / (seeds * probability * (1 - probability)) ** 0.5
    assert float(z.abs().max()) < MONTE_CARLO_Z
    chi_square = (counts - seeds * probability).square().sum(1) / (seeds * probability)
    assert float(chi_square.max()) < n + MONTE_CARLO_Z * (2 * n) ** 0.5
    assert float(chi_square.min()) > 0


def test_pairs_of_data_are_drawn_into_the_two_folds_equally_often():
    """Folds are independent draws without replacement: every ordered pair has the same probability."""
    n, seeds = 5, 800
    counts = torch.zeros(n, n)
    for seed in range(seeds):
        first, second = draw(n, 2, 2, seed=seed)
        counts[first.indices.item(), second.indices.item()] += 1
    off_diagonal = counts[~torch.eye(n, dtype=torch.bool)]
    assert float(counts.diagonal().sum()) == 0
    probability = 1 / (n * (n - 1))
    z = (off_diagonal - seeds * probability) / (seeds * probability * (1 - probability)) ** 0.5
    assert float(z.abs().max()) < MONTE_CARLO_Z


@pytest.mark.parametrize("folds", [1, 2, 3])
def test_weighted_sums_are_unbiased_for_the_mean(folds):
    values = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()
    means = []
    for seed in range(400):
        sample = UniformSampler(7).draw(stream(20, 3), folds, torch.Generator().manual_seed(seed))
        drawn = [*(sample.fold([fold]) for fold in range(folds)), sample.data]
        means.append(torch.stack([fold.weights @ values[fold.indices] for fold in drawn]))
    assert_unbiased(torch.stack(means), values.mean(0).expand(folds + 1, 2))


def test_several_folds_together():
    sample = UniformSampler(None).draw(stream(7, 3), 3, torch.Generator().manual_seed(0))
    for folds in ([0], [0, 2], [0, 1, 2]):
        joined = sample.fold(folds)
        expected = sorted(i for fold in folds for i in sample.part(fold).indices.tolist())
        assert joined.indices.tolist() == expected
        assert_equal(joined.weights, torch.full((len(joined),), 1 / len(joined), dtype=torch.float64))
        assert_equal(joined.inputs[:, 0], joined.indices.double(), 0.0)


def test_a_budget_beyond_the_data_uses_all_and_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="debiased_laplace"):
        drawn = draw(6, 100)
    assert len(drawn[0]) == 6
    assert "budget of 100 exceeds the 6 data" in caplog.text


def test_an_empty_batch_in_between_does_no_harm():
    def batches():
        for x, y in stream(5, 2):
            yield x, y
            yield x[:0], y[:0]

    for budget in (None, 3):
        one = UniformSampler(budget).draw(batches(), 2, torch.Generator().manual_seed(0))
        other = UniformSampler(budget).draw(stream(5, 2), 2, torch.Generator().manual_seed(0))
        assert torch.equal(one.data.indices, other.data.indices)
        assert torch.equal(one.folds, other.folds)


def test_dictionaries_keep_their_nesting():
    class Encoding(dict):
        pass

    batches = [Encoding(ids=torch.arange(4)[:, None] + 10 * k, labels=torch.arange(4) + 10 * k) for k in range(3)]
    sample = UniformSampler(5).draw(iter(batches), 1, torch.Generator().manual_seed(0))
    drawn = sample.data
    assert sample.n_seen == 12
    assert set(drawn.inputs) == {"ids", "labels"}
    assert torch.equal(drawn.inputs["ids"][:, 0], drawn.targets)
    with pytest.raises(TypeError, match="targets under 'y', got the keys"):
        UniformSampler(5).draw(iter(batches), 1, torch.Generator(), targets_key="y")


@pytest.mark.parametrize("budget", [0, -1, 2.5, "all"])
def test_bad_budgets(budget):
    with pytest.raises(ValueError, match="budget of at least 1, or None"):
        UniformSampler(budget)


def bad_draw(batches, folds=1, budget=None):
    return UniformSampler(budget).draw(batches, folds, torch.Generator())


def test_bad_streams():
    x, y = torch.zeros(3, 1), torch.zeros(3)
    for batches, error, match in (
        ([], ValueError, "empty loader. A generator can be read only once"),
        ([(x[:0], y[:0])], ValueError, "empty loader"),
        (5, TypeError, "iterable of batches.*got int"),
        ([x], TypeError, "pairs .inputs, targets., .* or dictionaries, got a Tensor of length 3"),
        ([(x, y, y[:2])], ValueError, r"one target for each of the 3 inputs.*\(2,\)"),
        ([(x, y[:2])], ValueError, r"one target for each of the 3 inputs.*\(2,\)"),
        ([(x, torch.tensor(1.0))], ValueError, "one target for each of the 3 inputs"),
        ([({"a": x, "b": x[:2]}, y)], ValueError, r"first dimension, got shapes \[\(3, 1\), \(2, 1\)\]"),
        ([("text", y)], TypeError, "inputs that are a tensor or a nesting of tensors, got str"),
    ):
        with pytest.raises(error, match=match):
            bad_draw(batches)


def test_too_few_data_for_the_folds():
    x, y = torch.zeros(1, 1), torch.zeros(1)
    with pytest.raises(ValueError, match=r"at least 2 data, one for each fold, got 1.*Single\(\)"):
        bad_draw([(x, y)], folds=2)
    with pytest.raises(ValueError, match="budget of at least 2 data, one for each fold, got 1"):
        bad_draw(stream(5, 2), folds=2, budget=1)


def test_an_exception_of_the_loader_comes_through():
    def batches():
        yield from stream(4, 2)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        bad_draw(batches())


# -- priorities ------------------------------------------------------------------------------------


class Given:
    """A likelihood whose curvature is the output itself."""

    def prepare_targets(self, targets: torch.Tensor, n_outputs: int) -> torch.Tensor:
        return targets

    def curvature(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs[:, 0]


#: Over four orders of magnitude, as on a trained network.
SCORES = torch.logspace(-3, 1, 40, dtype=torch.float64)[torch.randperm(40, generator=torch.Generator().manual_seed(2))]


def priority_draw(
    scores: torch.Tensor, budget: int, folds: int = 1, seed: int = 0, batch_size: int = 7, **options: Any
) -> Sample:
    batches = zip(scores[:, None].split(batch_size), torch.arange(len(scores)).split(batch_size), strict=True)
    return PrioritySampler(budget, **{"floor": 1e-12, **options}).draw(
        batches, folds, torch.Generator().manual_seed(seed), likelihood=Given(), observe=lambda inputs, _: inputs
    )


@pytest.mark.parametrize("folds", [1, 2, 4])
def test_priority_weights_are_unbiased(folds):
    """For totals that have nothing to do with the scores, of the whole sample and of every fold."""
    values = torch.stack([torch.ones(40), torch.linspace(-1, 2, 40), SCORES.sqrt()], 1).double()
    found = []
    for seed in range(3000):
        sample = priority_draw(SCORES, 12, folds, seed=seed, calibrated=False)
        filled = [fold for fold in range(folds) if bool((sample.folds == fold).any())]
        assert filled == list(range(folds - len(filled), folds))  # if few are not certain, the first have none
        drawn = [sample.data, *(sample.fold([fold]) for fold in range(folds))]
        own_sums = torch.stack([own.weights @ values[own.indices] for own in drawn])
        if filled:
            own_sums[1 : 1 + folds - len(filled)] = own_sums[-1].clone()
        found.append(own_sums)
    assert_unbiased(torch.stack(found), values.mean(0).expand(folds + 1, 3))


def test_data_that_were_kept_by_chance_are_not_certain():
    """Each of those that belong to all folds is kept whatever its random number: at least the next priority."""
    chance = 0
    for seed in range(200):
        sample, generator = priority_draw(SCORES, 12, 2, seed=seed), torch.Generator().manual_seed(seed)
        uniforms = torch.rand(40, generator=generator, dtype=torch.float64)
        next_priority = (SCORES / uniforms).sort(descending=True).values[12]
        certain = sample.data.indices[sample.folds == IN_ALL_FOLDS]
        assert bool((SCORES[certain] >= next_priority).all())
        threshold = calibrated_threshold(SCORES[sample.data.indices], float(SCORES.sum()))
        chance += int(((SCORES >= threshold) & (SCORES < next_priority))[sample.data.indices].sum())
    assert chance > 10  # which the calibrated threshold alone would have called certain


def test_calibrated_weights_know_the_total_of_the_scores():
    """Exactly; other totals with less noise than the unbiased weights, if they are related to the scores."""
    related = SCORES * torch.linspace(0.5, 1.5, 40).double()
    errors: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(300):
        for calibrated in (True, False):
            sample = priority_draw(SCORES, 12, seed=seed, calibrated=calibrated)
            total = float(sample.data.weights @ SCORES[sample.data.indices])
            if calibrated:
                assert total == pytest.approx(float(SCORES.mean()), rel=1e-9)
            errors[calibrated].append(float(sample.data.weights @ related[sample.data.indices] - related.mean()))
    spread = {key: float(torch.tensor(values).square().mean()) ** 0.5 for key, values in errors.items()}
    assert spread[True] < 0.7 * spread[False]
    bias = torch.tensor(errors[True]).double()
    assert abs(float(bias.mean())) < 0.02 * float(related.mean())


def test_the_threshold_is_the_one_for_which_the_total_is_exact():
    """Against bisection."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(9, generator=generator, dtype=torch.float64).pow(4)
        total = float(scores.sum() * (1 + 3 * torch.rand((), generator=generator)))
        low, high = 0.0, total
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if float(scores.clamp_min(middle).sum()) < total else (low, middle)
        assert calibrated_threshold(scores, total) == pytest.approx(high, rel=1e-9)
    assert calibrated_threshold(scores, float(scores.sum())) <= float(scores.min()) * (1 + 1e-5)


def test_equal_scores_are_a_uniform_draw():
    sample = priority_draw(torch.ones(40).double(), 10, 2)
    assert len(sample.data) == 10
    assert_equal(sample.data.weights, torch.full((10,), 0.1, dtype=torch.float64))
    assert not bool((sample.folds == IN_ALL_FOLDS).any())
    assert_equal(sample.fold([0]).weights, torch.full((5,), 0.2, dtype=torch.float64))
    counts = torch.zeros(40)
    for seed in range(800):
        counts[priority_draw(torch.ones(40).double(), 10, seed=seed).data.indices] += 1
    z = (counts - 200) / (800 * 0.25 * 0.75) ** 0.5
    assert float(z.abs().max()) < MONTE_CARLO_Z


def test_what_is_kept_for_certain_stands_for_itself_in_every_fold():
    scores = torch.cat([torch.tensor([50.0, 80.0]).double(), torch.full((30,), 0.1).double()])
    sample = priority_draw(scores, 8, 3)
    certain = sample.folds == IN_ALL_FOLDS
    assert sorted(sample.data.indices[certain].tolist()) == [0, 1]
    assert_equal(sample.data.weights[certain], torch.full((2,), 1 / 32, dtype=torch.float64))
    assert_equal(sample.data.weights[~certain], torch.full((6,), 30 / 6 / 32, dtype=torch.float64))
    for folds in ([0], [1, 2], [0, 1, 2]):
        own = sample.fold(folds)
        assert {0, 1} <= set(own.indices.tolist())
        assert len(own) == 2 + 2 * len(folds)
        assert float(own.weights.sum()) == pytest.approx(1)
    assert len(sample.part(IN_ALL_FOLDS)) == 2


def test_a_budget_for_the_whole_stream_keeps_it():
    for budget in (40, 100):
        sample = priority_draw(SCORES, budget, 2)
        assert sample.data.indices.tolist() == list(range(40))
        assert_equal(sample.data.weights, torch.full((40,), 1 / 40, dtype=torch.float64))


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_priorities_do_not_depend_on_the_batch_size(batch_size):
    one, other = priority_draw(SCORES, 9, 2, batch_size=batch_size), priority_draw(SCORES, 9, 2)
    assert torch.equal(one.data.indices, other.data.indices)
    assert torch.equal(one.folds, other.folds)
    assert_equal(one.data.weights, other.data.weights)


@pytest.mark.parametrize("capacity", [None, 5, 13, 60])
@pytest.mark.parametrize("cut", [0, 3, 17, 40])
def test_reservoirs_of_two_parts_are_that_of_the_whole(capacity, cut):
    keys = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def reservoir(start: int, stop: int) -> Reservoir:
        filled = Reservoir(capacity)
        for at in range(start, stop, 4):
            own = slice(at, min(at + 4, stop))
            filled.offer(SCORES[own, None], torch.arange(40)[own], keys[own], SCORES[own])
        return filled

    joined, whole = reservoir(0, cut) + reservoir(cut, 40), reservoir(0, 40)
    assert torch.equal(joined.indices, whole.indices)
    assert torch.equal(joined.keys, whole.keys)
    assert torch.equal(joined.content()[0], whole.content()[0])
    assert (joined.n_seen, joined.total) == (whole.n_seen, pytest.approx(whole.total))


@pytest.mark.parametrize("budget", [0, -1, 2.5, None, True])
def test_bad_priority_budgets(budget):
    with pytest.raises(ValueError, match="a whole number budget of at least 1, got"):
        PrioritySampler(budget)


def test_bad_priorities():
    with pytest.raises(ValueError, match="positive, finite floor, got 0"):
        PrioritySampler(5, floor=0.0)
    with pytest.raises(TypeError, match="likelihood and observe"):
        PrioritySampler(5).draw(stream(5, 2), 1, torch.Generator())
    with pytest.raises(NonFiniteError, match="the curvature of the loss"):
        priority_draw(torch.tensor([1.0, torch.nan]).double(), 1)
    with pytest.raises(ValueError, match="budget of at least 4 data, one for each fold, got 2"):
        priority_draw(SCORES, 2, 4)


def test_a_sample_of_two_streams_weighs_them_by_their_size():
    one, two = priority_draw(SCORES, 9, 2), priority_draw(SCORES[:20], 7, 2, seed=1)
    both = one + two
    assert (both.n_seen, both.n_folds, len(both.data)) == (60, 2, 16)
    assert_equal(both.data.weights, torch.cat([one.data.weights * (40 / 60), two.data.weights * (20 / 60)]))
    assert both.data.indices.tolist() == [*one.data.indices.tolist(), *(40 + two.data.indices).tolist()]
    with pytest.raises(ValueError, match="2 folds, got one with 3"):
        one + priority_draw(SCORES, 9, 3)
