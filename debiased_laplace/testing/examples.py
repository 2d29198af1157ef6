"""Small networks with data, on which the laws of a structure are checked, and bases cut short."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from debiased_laplace.curvature.basis import Basis
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from debiased_laplace.sampling.sample import WeightedData

__all__ = ["Problem", "problems", "truncate"]


@dataclass(frozen=True)
class Problem:
    """A small network with data.

    Attributes:
        name: For messages.
        model: In float64.
        data: Weighted, with unequal weights.
        likelihood: What its outputs mean.
    """

    name: str
    model: nn.Module
    data: WeightedData
    likelihood: Likelihood


class _Tokens(nn.Module):
    """Tokens, a lone parameter, a normalisation layer, one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 2))
        self.layer, self.norm, self.head = nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(1, (3, 2)) + self.token
        return self.head(self.norm(torch.tanh(self.layer(torch.tanh(self.layer(tokens))))).mean(1))


def problems(seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> list[Problem]:
    """A few small networks: dense, convolutional with groups, tokens; every likelihood; frozen parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mlp = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        normalisation = nn.BatchNorm2d(4)
        normalisation.load_state_dict({"running_var": 0.5 + torch.rand(4)}, strict=False)
        convolutional = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), normalisation, nn.ReLU(inplace=True),
            nn.Conv2d(4, 2, 2, bias=False), nn.Flatten(), nn.Linear(2, 2),
        )  # fmt: skip
        frozen = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        frozen[0].requires_grad_(False)
        frozen[2].bias.requires_grad_(False)
        made = [
            ("dense, categorical", mlp, (3,), Categorical(), torch.randint(3, (7,))),
            ("convolutional, regression", convolutional, (2, 4, 4), Gaussian(), torch.randn(7, 2)),
            ("tokens, categorical", _Tokens(), (6,), Categorical(), torch.randint(3, (7,))),
            ("partly frozen, Bernoulli", frozen, (3,), Bernoulli(), torch.rand(7, 2)),
        ]
        weighted = []
        for name, model, datum, likelihood, targets in made:
            weights = 0.2 + torch.rand(7, dtype=torch.float64)
            inputs = torch.randn(7, *datum, dtype=torch.float64).to(device, dtype)
            targets = targets if targets.dtype == torch.long else targets.to(dtype)
            data = WeightedData(inputs, targets.to(device), weights / weights.sum(), torch.arange(7))
            weighted.append(Problem(name, model.to(device, dtype).eval(), data, likelihood))
    return weighted


def truncate(basis: Basis, fraction: float = 0.5) -> Basis:
    """An incomplete basis: the first columns of every part, at least one and never all of a wide one.

    The parameters themselves as directions stay: they are complete by nature.
    """

    def kept(width: int) -> int:
        return max(1, min(width - 1, round(width * fraction)))

    return replace(basis, parts=[part.truncated(kept) for part in basis.parts])
