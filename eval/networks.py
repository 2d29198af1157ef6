"""Networks of the experiments, as their papers have them."""

from __future__ import annotations

from pathlib import Path

import torch
from all_cnn_c import network as all_cnn_c
from torch import Tensor, nn

from debiased_laplace.evaluation.shipped.cifar10 import trained
from debiased_laplace.evaluation.shipped.fashion_mnist import network as lenet

__all__ = [
    "all_cnn_c", "cifar_3c3d", "digits_cnn", "digits_mlp", "digits_transformer", "lenet", "trained_cifar_resnet",
    "wide_head",
]  # fmt: skip


def cifar_3c3d(n_classes: int = 10) -> nn.Module:
    """The 3C3D network of DeepOBS (Schneider et al., arXiv 1903.05499) for CIFAR-10, 895,210 parameters."""
    layers: list[nn.Module] = []
    for convolution in (nn.Conv2d(3, 64, 5), nn.Conv2d(64, 96, 3), nn.Conv2d(96, 128, 3, padding=1)):
        layers += [convolution, nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2)]
    dense = [nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, n_classes)]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


def wide_head(n_classes: int = 3100) -> nn.Module:
    """A last layer of 768 features and 3,100 classes, on a small body."""
    return nn.Sequential(nn.Linear(64, 768), nn.Tanh(), nn.Linear(768, n_classes))


def trained_cifar_resnet(depth: int, folder: Path) -> nn.Module:
    """A trained ResNet of depth 20 or 56 from a checkpoint of akamaster/pytorch_resnet_cifar10 in ``folder``."""
    (path,) = sorted(folder.glob(f"resnet{depth}-*.th"))
    return trained(depth, path)


def digits_cnn(n_classes: int = 10) -> nn.Module:
    """Two convolutions and two linear layers for 8 x 8 images, 9,802 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, n_classes),
    )  # fmt: skip


def digits_mlp(n_classes: int = 10) -> nn.Module:
    """Two hidden layers of 48 units for 8 x 8 images, 5,962 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, n_classes)
    )


class _RowTransformer(nn.Module):
    def __init__(self, n_classes: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.position = nn.Parameter(0.1 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embedding(x.flatten(1, 2)) + self.position
        return self.head(self.encoder(rows).mean(1))


def digits_transformer(n_classes: int = 10) -> nn.Module:
    """Two encoder layers over the eight rows of 8 x 8 images, 17,834 parameters."""
    return _RowTransformer(n_classes)
