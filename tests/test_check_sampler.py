"""The laws of a sampler hold for those that are there, and find what is wrong with others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from debiased_laplace import PrioritySampler, UniformSampler
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.sampling.sample import Sample, WeightedData
from debiased_laplace.testing import check_sampler


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(60, 3, generator=generator), torch.randint(3, (60,), generator=generator)
    return list(zip(inputs.split(25), targets.split(25), strict=True))


@pytest.mark.parametrize("sampler", [UniformSampler(12), PrioritySampler(12, calibrated=False)], ids=repr)
def test_samplers_keep_the_laws(sampler):
    check_sampler(sampler, batches(), likelihood=Categorical(), observe=lambda inputs, _: 3 * inputs)


@dataclass(frozen=True)
class Changed:
    """A uniform sampler of which something is changed."""

    change: Callable[[Sample], Sample]

    def draw(self, batches: Any, folds: int, generator: torch.Generator, **further: Any) -> Sample:
        return self.change(UniformSampler(12).draw(batches, folds, generator, **further))


def jittered(data: WeightedData) -> Tensor:
    noise = torch.rand(12, dtype=torch.float64)
    return data.weights * (1 + 1e-3 * (noise - noise.mean()))


def of_data(**change: Callable[[Any], Tensor]) -> Changed:
    def changed(sample: Sample) -> Sample:
        return replace(sample, data=replace(sample.data, **{name: new(sample.data) for name, new in change.items()}))

    return Changed(changed)


BROKEN = {
    "weighted sums of the sample": of_data(weights=lambda data: 1.5 * data.weights),
    "weighted sums of fold 0": Changed(
        lambda sample: replace(sample, folds=sample.data.indices.argsort().argsort() // 3)
    ),
    "whether weights are finite and at least 1/N": of_data(weights=lambda data: 0.1 * data.weights),
    "whether inputs are those of the indices": of_data(inputs=lambda data: data.inputs.flip(0)),
    "number of different data": of_data(
        indices=lambda data: data.indices[:1].expand(12), inputs=lambda data: data.inputs[:1].expand(12, -1)
    ),
    "number of data seen": Changed(lambda sample: replace(sample, n_seen=59)),
    "whether folds are numbers of folds": Changed(lambda sample: replace(sample, folds=sample.folds + 1)),
    "the same generator": of_data(weights=jittered),
}


@pytest.mark.parametrize("law", BROKEN)
def test_what_is_broken_is_found(law):
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=law):
        check_sampler(BROKEN[law], batches(), n_draws=200)
