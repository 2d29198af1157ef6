"""A tiny task for tests: three blobs in the plane, a network with one hidden layer, shifted data and blobs far off."""

import torch
from torch import nn

NAME = "blobs"
DESCRIPTION = "Three blobs in the plane."
BUDGET = 24
SEEDS = 2
SEEDS_NOTE = "A seed decides the training data and the initial weights."
CLASSES = ("east", "north", "south")
NOTES = {"moved": "Shifted to the right."}
CENTRES = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])


def data(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (n,), generator=generator)
    return CENTRES[targets] + 1.2 * torch.randn(n, 2, generator=generator), targets


def cut(inputs: torch.Tensor, targets: torch.Tensor) -> list:
    return list(zip(inputs.split(32), targets.split(32), strict=True))


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 3))
    optimizer = torch.optim.Adam(network.parameters(), 3e-2)
    inputs, targets = data(100 + seed, 100)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    return network


def train_loader(seed: int) -> list:
    return cut(*data(100 + seed, 100))


def val_loader(seed: int) -> list:
    return cut(*data(200 + seed, 60))


def test_loader() -> list:
    return cut(*data(300, 70))


def shifted_loaders() -> dict:
    inputs, targets = data(300, 70)
    return {"moved": {s: cut(inputs + torch.tensor([0.4 * s, 0.0]), targets) for s in (1, 3, 5)}}


def ood_loaders() -> dict:
    inputs, targets = data(300, 50)
    return {"far": cut(6 * inputs, targets)}


def images(inputs: torch.Tensor) -> torch.Tensor:
    return (inputs / 20 + 0.5).reshape(-1, 1, 1, 2)
