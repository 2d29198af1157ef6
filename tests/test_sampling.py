"""A stream of batches becomes folds of weighted data."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from debiased_laplace.sampling import UniformSampler, WeightedData
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
    with pytest.raises(ValueError, match="budget of at least one datum, or None"):
        UniformSampler(budget)


def bad_draw(batches, folds=1, budget=None):
    return UniformSampler(budget).draw(batches, folds, torch.Generator())


def test_bad_streams():
    x, y = torch.zeros(3, 1), torch.zeros(3)
    for batches, error, match in (
        ([], ValueError, "empty loader. A generator can be read only once"),
        ([(x[:0], y[:0])], ValueError, "empty loader"),
        (5, TypeError, "iterable of batches.*got int"),
        ([x], TypeError, "pairs .inputs, targets. or dictionaries, got a Tensor of length 3"),
        ([(x, y, y)], TypeError, "tuple of length 3"),
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
