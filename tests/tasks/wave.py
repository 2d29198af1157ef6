"""A tiny regression for tests: a noisy sine, a network with one hidden layer."""

import torch
from torch import nn

NAME = "wave"
DESCRIPTION = "A noisy sine."
LIKELIHOOD = "regression"
BUDGET = 24


def data(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = 4 * torch.rand(n, 1, generator=generator) - 2
    return inputs, (2 * inputs).sin() + 0.2 * torch.randn(n, 1, generator=generator)


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1))
    optimizer = torch.optim.Adam(network.parameters(), 3e-2)
    inputs, targets = data(100 + seed, 80)
    for _ in range(150):
        optimizer.zero_grad()
        (network(inputs) - targets).square().mean().backward()
        optimizer.step()
    return network


def train_loader(seed: int) -> list:
    return [data(100 + seed, 80)]


def val_loader(seed: int) -> list:
    return [data(200 + seed, 60)]


def test_loader() -> list:
    return [data(300, 70)]


def shifted_loaders() -> dict:
    inputs, targets = data(300, 70)
    return {"moved": {severity: [(inputs + 0.5 * severity, targets)] for severity in (1, 3)}}


def target_scale() -> float:
    return 3.0
