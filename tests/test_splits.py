"""Which folds choose the directions, and which measure the curvature along them."""

from __future__ import annotations

import pytest

from debiased_laplace.sampling.splits import CrossFit, Single, TwoBatch


@pytest.mark.parametrize(
    ("split", "final", "rounds"),
    [
        (Single(), (0,), [((0,), (0,))]),
        (Single(3), (0, 1, 2), [((0, 1, 2), (0, 1, 2))]),
        (TwoBatch(), (0,), [((0,), (1,))]),
        (TwoBatch(5), (0, 1), [((0, 1), (2, 3, 4))]),
        (TwoBatch(4, directions=3), (0, 1, 2), [((0, 1, 2), (3,))]),
        (CrossFit(2), (0, 1), [((1,), (0,)), ((0,), (1,))]),
        (CrossFit(3, average="rotated"), (0, 1, 2), [((1, 2), (0,)), ((0, 2), (1,)), ((0, 1), (2,))]),
    ],
)
def test_roles(split, final, rounds):
    assert split.final == final
    assert split.rounds == rounds
    assert {fold for one in split.rounds for fold in (*one.directions, *one.curvatures)} == set(range(split.folds))
    if not isinstance(split, Single):
        assert not any(set(one.directions) & set(one.curvatures) for one in split.rounds)


@pytest.mark.parametrize(
    ("split", "arguments"),
    [(Single, {"folds": 0}), (TwoBatch, {"folds": 1}), (TwoBatch, {"folds": -2}), (CrossFit, {"folds": 1})],
)
def test_splits_without_enough_folds(split, arguments):
    with pytest.raises(ValueError, match="folds"):
        split(**arguments)


@pytest.mark.parametrize("directions", [0, 2, -1])
def test_both_roles_need_a_fold(directions):
    with pytest.raises(ValueError, match=f"one for curvatures, got directions={directions}"):
        TwoBatch(directions=directions)


def test_averages_have_names():
    with pytest.raises(ValueError, match=r"an average out of \['rank', 'rotated'\], got 'mean'"):
        CrossFit(average="mean")
