"""Which folds choose the directions, and which measure the curvature along them."""

from __future__ import annotations

import pytest
import torch

from debiased_laplace.splits import Single, TwoBatch
from tests.test_sampling import draw
from tests.tolerances import assert_equal


@pytest.mark.parametrize(
    ("split", "n"), [(Single(), 1), (Single(3), 3), (TwoBatch(), 2), (TwoBatch(4), 4), (TwoBatch(3), 3)]
)
def test_splits_assign_every_fold(split, n):
    assert split.folds == n
    drawn = draw(11, None, n)
    directions, measured = split(drawn)
    union = sorted({*directions.indices.tolist(), *measured.indices.tolist()})
    assert union == list(range(11))
    if isinstance(split, Single):
        assert directions is measured
    else:
        assert not set(directions.indices.tolist()) & set(measured.indices.tolist())
    for data in (directions, measured):
        assert_equal(data.weights, torch.full((len(data),), 1 / len(data), dtype=torch.float64))


@pytest.mark.parametrize(("split", "folds"), [(Single, 0), (TwoBatch, 1), (TwoBatch, 0), (TwoBatch, -2)])
def test_splits_without_enough_folds(split, folds):
    with pytest.raises(ValueError, match="folds"):
        split(folds)
