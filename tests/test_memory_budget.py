"""A budget of memory: what statistics and directions hold is counted, and the rest bounds the data at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.curvature.parts.kronecker import KroneckerBasis
from debiased_laplace.fitting.memory import VECTORS, held_by_fit
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.testing.dense import all_tensors
from tests.tolerances import assert_equal


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    ).double().eval()  # fmt: skip


def batches(n: int = 60) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64)
    return [(images, torch.arange(n) % 3)]


@pytest.mark.parametrize("structure", [dl.Kronecker(), dl.Diagonal(), dl.Full(), dl.Isotropic()], ids=str)
def test_numbers_held_are_those_of_statistics_and_directions(structure):
    fitted = dl.fit(model(), batches(), "classification", structure=structure, sampler=dl.PrioritySampler(20)).fitted
    network, held = fitted.network, structure.held(fitted.network)
    statistics: Any = structure.measure(network, CurvatureData(network, fitted.sample.data, Categorical()))
    of_one_fold = sum(t.numel() for t in all_tensors(statistics) if t.dtype == torch.float64)
    if isinstance(structure, dl.Kronecker):  # as dense matrices: few columns are fewer numbers
        assert held.statistics == sum(b.numel() for b in statistics.outputs)
        assert held.observed == sum(a.numel() for a in statistics.inputs)
        parts = [part for part in fitted.posterior.basis.parts if isinstance(part, KroneckerBasis)]
        assert held.basis == sum(part.inputs.numel() + part.outputs.numel() for part in parts)
    elif isinstance(structure, dl.Isotropic):
        assert (held.statistics, held.basis) == (0, 0)
    else:
        assert held.statistics == of_one_fold


def test_the_budget_bounds_data_at_a_time_and_changes_no_number():
    network = Network.discover(model(), batches()[0][0])
    held = held_by_fit(network, dl.Kronecker(), dl.CrossFit())
    assert held >= 8 * VECTORS * network.n_params
    of_one = network.memory_of_a_datum()
    expected = dl.fit(model(), batches(), "classification", sampler=dl.PrioritySampler(20))
    few = dl.fit(model(), batches(), "classification", sampler=dl.PrioritySampler(20), memory_budget=held + 4 * of_one)
    assert few.network.memory_of_chunks == 4 * of_one
    assert few.network.chunk_size(2**30) == 4
    assert expected.network.chunk_size(2**30) == 2**30 // of_one
    assert_equal(few.posterior.curvatures, expected.posterior.curvatures)
    inputs = batches()[0][0][:5]
    assert_equal(few.predict(inputs).probabilities, expected.predict(inputs).probabilities)


def test_a_fit_that_goes_on_from_a_checkpoint_keeps_within_the_budget(tmp_path):
    options: dict[str, Any] = {"sampler": dl.PrioritySampler(20), "memory_budget": 10**8}
    first = dl.fit(model(), batches(), "classification", checkpoint=tmp_path / "fit", **options)
    again = dl.fit(model(), batches(), "classification", checkpoint=tmp_path / "fit", **options)
    assert_equal(again.posterior.curvatures, first.posterior.curvatures)


def test_too_small_a_budget_says_what_is_needed():
    network = Network.discover(model(), batches()[0][0])
    needed = held_by_fit(network, dl.Kronecker(), dl.CrossFit()) + network.memory_of_a_datum()
    with pytest.raises(ValueError, match=rf"memory_budget of at least {needed:,} bytes.*max_factor.*last_layer"):
        dl.fit(model(), batches(), "classification", memory_budget=needed - 1)
    dl.fit(model(), batches(), "classification", memory_budget=needed)


def test_a_structure_whose_memory_depends_on_the_data():
    with pytest.raises(ValueError, match="whose memory does not depend on the data with memory_budget, got LowRank"):
        dl.fit(model(), batches(), "classification", structure=dl.LowRank(5), memory_budget=10**9)


@pytest.mark.parametrize("value", [0, -1, 2.5, "all"])
def test_a_budget_is_a_number_of_bytes(value):
    with pytest.raises(ValueError, match="Expected a whole number memory_budget of at least 1"):
        dl.fit(model(), batches(), "classification", memory_budget=value)


def test_the_drop_in_takes_it():
    la = dl.DebiasedLaplace(model(), "classification")
    la.fit(batches(), memory_budget=10**8)
    assert la.network.memory_of_chunks is not None
    with pytest.raises(ValueError, match="memory_budget of at least"):
        la.fit(batches(), memory_budget=10)
