"""Rows of embeddings that stand for padding do not move."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import debiased_laplace as dl
from debiased_laplace.posterior.predictive import functional_moments, linearized_samples, weight_samples
from tests.tolerances import assert_equal, assert_unbiased


class Bag(nn.Module):
    """Tokens, averaged."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(7, 3, padding_idx=2), nn.Linear(3, 2)
        nn.init.normal_(self.embedding.weight)  # also the row of the padding
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x).mean(1))


@pytest.mark.parametrize("structure", [dl.Kronecker(), dl.Diagonal(), dl.Full(), dl.LowRank(4)], ids=repr)
def test_no_prediction_depends_on_the_uncertainty_of_padding(structure):
    model, generator = Bag(), torch.Generator().manual_seed(0)
    x = torch.randint(7, (40, 4), generator=generator)
    x[::2, 1:] = 2
    labels = torch.randint(2, (40,), generator=generator)
    posterior = dl.fit(model, [(x, labels)], "classification", structure=structure)
    network, mean = posterior.network, posterior.posterior.mean
    deviations = torch.zeros(1, network.n_params, dtype=torch.float64)
    network.from_vector(deviations)["embedding.weight"][:, 2] = 5.0  # of the row of the padding alone
    assert bool(deviations.any())
    outputs = model(x).detach()
    for evaluate in (linearized_samples, weight_samples):
        assert_equal(evaluate(network, mean, deviations, x)[0], outputs)
    # The covariances of samples of the linearised network are those of the closed form.
    deviations = posterior.posterior.deviations(4000, torch.Generator().manual_seed(1))
    samples = linearized_samples(network, mean, deviations, x[:2])
    _, covariance = functional_moments(network, posterior.posterior, x[:2])
    centred = samples - outputs[:2]
    assert_unbiased(torch.einsum("snc,snd->sncd", centred, centred), covariance)
