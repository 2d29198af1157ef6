"""A tiny task of images for tests: bright squares of 4 x 4 pixels on one side or the other, and a linear network."""

import torch
from torch import nn

NAME = "squares"
CLASSES = ("left", "right")
BUDGET = 16


def data(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(2, (n,), generator=generator)
    images = 0.5 * torch.rand(n, 1, 4, 4, generator=generator)
    for image, target in zip(images, targets, strict=True):
        image[0, :, 2 * int(target) : 2 * int(target) + 2] += 0.4
    return images, targets


def model() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(network.parameters(), 5e-2)
    images, targets = data(1, 60)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), targets).backward()
        optimizer.step()
    return network


def train_loader() -> list:
    return [data(1, 60)]


def val_loader() -> list:
    return [data(2, 40)]


def test_loader() -> list:
    return [data(3, 20)]
