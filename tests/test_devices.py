"""Tensors of every step are on the network's device, and nothing that is done chunk by chunk waits for it.

On a card that is not there (:mod:`tests.virtual_card`): the whole way from a model to predictions, with numbers that
have to be those of the CPU.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace import DebiasedLaplace, _guards
from debiased_laplace._data import to_device
from debiased_laplace.network.network import Network
from tests.tolerances import EXACT, FLOAT32, assert_equal
from tests.virtual_card import CARD, VirtualCard, per_chunk

#: Data in a batch and in a chunk.
SIZE = 4

#: Functions that may wait for the device once for every chunk of data, and why.
ONCE_A_CHUNK = {
    # The draw is one of the CPU, which keeps the data: one number of every datum of a batch has to get there.
    "sampling/samplers:PrioritySampler.draw",
    # Which positions of a sequence are padding decides what is computed: one answer for all layers.
    "network/factors:Factors.has_gradient",
    # How many tokens have a gradient decides how large their Gram matrix's factors are.
    "curvature/indexed:_occurrences",
    # Draws of the outputs need the root of their covariance: eigenvectors, which wait by themselves, and a check.
    "likelihoods/_numerics:square_root",
    # Sites of dense outputs that have a target are chosen on the CPU, some of every datum.
    "posterior/dense_validation:DenseValidation.chosen",
    "likelihoods/sites:",
}

#: Functions that wait once for a step of a search, whose number depends on what is found, not on how many data there are.
SEARCHES = {
    "posterior/search:", "posterior/temperature:temperature_scaling", "posterior/gaussian:Posterior.__post_init__",
}  # fmt: skip


class Padded(nn.Module):
    """A Transformer of token sequences that are padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(self.embedding(x), src_key_padding_mask=x == 0)
        kept = (x != 0)[..., None].to(hidden)
        return self.head((hidden * kept).sum(1) / kept.sum(1))


class Scaled(nn.Module):
    """Layer norm, a parameter that no layer rule covers, and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.layer(x)) * self.scale))


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3),
    )  # fmt: skip


def segmentation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def images(n: int) -> Tensor:
    return torch.randn(n, 1, 6, 6)


def rows(n: int) -> Tensor:
    return torch.randn(n, 3)


def tokens(n: int) -> Tensor:
    x = torch.randint(1, 7, (n, 5))
    return x.masked_fill(torch.arange(5) >= torch.randint(2, 6, (n, 1)), 0)


def classes(n: int) -> Tensor:
    return torch.randint(3, (n,))


def numbers(n: int) -> Tensor:
    return torch.randn(n, 3)


@dataclass
class Case:
    build: Callable[[], nn.Module]
    data: Callable[[int], Tensor]
    targets: Callable[[int], Tensor] = classes
    likelihood: Any = "classification"
    fit: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, Any] = field(default_factory=dict)
    predict: dict[str, Any] = field(default_factory=dict)

    def loader(self, n: int) -> tuple[nn.Module, Tensor, list[tuple[Tensor, Tensor]]]:
        torch.manual_seed(0)
        model, x, y = self.build().double().eval(), self.data(n), self.targets(n)
        x, y = (t.double() if t.is_floating_point() else t for t in (x, y))
        return model, x, list(zip(x.split(SIZE), y.split(SIZE), strict=True))

    def run(self, model: nn.Module, x: Tensor, loader: Any, card: VirtualCard | None) -> tuple[Tensor, list[Counter]]:
        """What is predicted after fit and tuning; what waited in each step."""
        waits = []

        def done() -> None:
            if card is not None:
                waits.append(card.waits.copy())
                card.waits.clear()

        done()
        posterior = dl.fit(model, loader, self.likelihood, chunk_size=SIZE, **self.fit)
        done()
        grid = {"prior_precisions": torch.tensor([0.5, 2.0])} | self.tune
        posterior = posterior.tune(**grid) if "val_loader" in grid else posterior.tune(loader, **grid)
        done()
        predicted = posterior.predict(x, **self.predict)
        done()
        assert card is None or card.holds(predicted.mean)
        return predicted.mean.cpu(), waits[1:]


UNIFORM = dl.UniformSampler(None)
CASES = {
    "lenet-kronecker": Case(lenet, images, tune={"temperature": True}),
    "lenet-isotropic": Case(lenet, images, fit={"structure": dl.Isotropic(), "sampler": UNIFORM}),
    "lenet-marginal-likelihood": Case(lenet, images, numbers, "regression", tune={"val_loader": None}),
    "transformer-kronecker": Case(Padded, tokens, numbers, "regression", fit={"mc_samples": 1}),
    "transformer-low-rank": Case(
        Padded, tokens, fit={"structure": dl.LowRank(rank=4), "sampler": UNIFORM, "split": dl.TwoBatch()},
    ),
    "transformer-full-of-some": Case(
        Padded, tokens, fit={"structure": dl.Full(), "parameters": ["head*", "embedding*"], "sampler": UNIFORM}
    ),
    "mlp-diagonal-fisher": Case(
        Scaled, rows, fit={"structure": dl.Diagonal(), "curvature": "empirical_fisher", "sampler": dl.UniformSampler(7)},
        predict={"method": "linearized", "n_samples": 5},
    ),
    "mlp-kronecker-layerwise": Case(
        Scaled, rows, tune={"prior_structure": "layerwise", "link": "probit"}, predict={"covariance": True}
    ),
    "mlp-last-layer": Case(
        mlp, rows, fit={"parameters": "last_layer", "estimator": "factored"}, tune={"link": "mc", "n_samples": 4},
        predict={"method": "nn", "n_samples": 5},
    ),
    "mlp-bernoulli": Case(mlp, rows, lambda n: torch.rand(n, 3).round(), "bernoulli", fit={"sampler": UNIFORM}),
    "mlp-poisson": Case(mlp, rows, lambda n: torch.randint(4, (n, 3)).double(), dl.Poisson(), fit={"sampler": UNIFORM}),
    "pixels-kronecker": Case(
        segmentation, images, lambda n: torch.randint(3, (n, 6, 6)), fit={"mc_samples": 1}, predict={"n_samples": 5}
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # tiny networks that were not trained
@pytest.mark.parametrize("name", CASES)
def test_a_card_gives_the_numbers_of_the_cpu_and_no_chunk_waits_for_it(name: str) -> None:
    case, steps = CASES[name], []
    for n in (2 * SIZE, 4 * SIZE):
        model, x, loader = case.loader(n)
        expected, _ = case.run(model, x, loader, None)
        with VirtualCard() as card:
            actual, waits = case.run(copy.deepcopy(model).to(CARD), x, loader, card)
        steps.append(waits)
        assert_equal(actual, expected, 1e-6 if case.tune.get("prior_structure") == "layerwise" else EXACT)
    for step, few, many in zip(("fit", "tune", "predict"), *steps, strict=True):
        allowed = ONCE_A_CHUNK | (SEARCHES if step == "tune" else set())
        new = {function for function in per_chunk(few, many) if not function.startswith(tuple(allowed))}
        assert not new, f"{step} waits for the device in every chunk of data, in {sorted(new)}"
