"""Batches of data of any nesting."""

from __future__ import annotations

from collections import OrderedDict, UserDict

import pytest
import torch

from debiased_laplace import _data
from tests.tolerances import assert_equal

X = torch.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize(
    "inputs",
    [X, (X, X + 1), [X, {"a": X}], {"a": X, "b": (X, None)}, OrderedDict(a=X), UserDict(a=X), {"a": X, "flag": True}],
    ids=["tensor", "tuple", "list", "nested", "ordered", "other-mapping", "with-a-flag"],
)
def test_any_nesting_is_counted_cut_joined_and_moved(inputs):
    assert _data.count(inputs) == 3
    for index in (torch.tensor([2, 0]), slice(1, 3)):
        for whole, part in zip(_data.tensors(inputs), _data.tensors(_data.take(inputs, index)), strict=True):
            assert_equal(part, whole[index], 0.0)
    joined = _data.concatenate([_data.take(inputs, slice(0, 1)), _data.take(inputs, slice(1, 3))])
    for whole, part in zip(_data.tensors(inputs), _data.tensors(joined), strict=True):
        assert_equal(part, whole, 0.0)
    moved = _data.to_device(inputs, torch.device("cpu"))
    for whole, part in zip(_data.tensors(inputs), _data.tensors(moved), strict=True):
        assert_equal(part, whole, 0.0)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_inference_tensors_are_copied(context):
    with context():
        batch = {"a": X + 1}
        inside = _data.to_device(batch, torch.device("cpu"))["a"]
    assert not inside.is_inference()
    assert not _data.to_device(batch, torch.device("cpu"))["a"].is_inference()


def test_slices_cover_everything_once():
    assert [list(range(7))[part] for part in _data.slices(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(_data.slices(0, 3)) == []


def test_a_batch_that_is_a_scalar_has_no_data():
    with pytest.raises(ValueError, match="Put the batch dimension first"):
        _data.count(torch.tensor(1.0))
