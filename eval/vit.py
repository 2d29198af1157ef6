"""A task: a small vision Transformer on the 60,000 images of Fashion-MNIST. Images are ``[N, 1, 28, 28]`` in [0, 1].

    debiased-laplace bias eval/vit.py --data-dir <folder>

The images, shifts and out-of-distribution data are those of the task ``fashion-mnist``. One thread trains it in some
minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debiased_laplace.evaluation.shipped import fashion_mnist
from debiased_laplace.evaluation.shipped.common import CPU, fingerprint, initialised, kept, one_thread, train

NAME = "Fashion-MNIST, ViT"
DESCRIPTION = (
    "A vision Transformer (60,730 parameters: patches of 7 x 7 pixels, a class token, learned positions, three "
    "pre-norm layers of width 48) on Fashion-MNIST, grey images of 28 x 28 pixels of ten kinds of clothes, trained by "
    "AdamW, a warm-up and a cosine schedule."
)
LIKELIHOOD, CLASSES, NOTES = fashion_mnist.LIKELIHOOD, fashion_mnist.CLASSES, fashion_mnist.NOTES
BUDGET = 128
SEEDS = 1
SEEDS_NOTE = fashion_mnist.SEEDS_NOTE.partition(" The deep ensemble")[0]
EPOCHS, QUICK_EPOCHS = 10, 1
LEARNING_RATE, WEIGHT_DECAY, TRAIN_BATCH, WARM_UP = 2e-3, 1e-2, 64, 0.1

train_loader, val_loader, test_loader = fashion_mnist.train_loader, fashion_mnist.val_loader, fashion_mnist.test_loader
shifted_loaders, ood_loaders, images = fashion_mnist.shifted_loaders, fashion_mnist.ood_loaders, fashion_mnist.images


class ViT(nn.Module):
    """A vision Transformer (Dosovitskiy et al., arXiv 2010.11929) that reads its class token.

    Args:
        patch: Pixels along the side of a patch; it divides the side of an image.
        width: Of every token.
        depth: Layers, with the normalisation first.
        heads: Of the attention.
        n_classes: Number of outputs.
        side: Pixels along the side of an image.
        channels: Of an image.
    """

    def __init__(
        self, patch: int = 7, width: int = 48, depth: int = 3, heads: int = 4, n_classes: int = 10, side: int = 28,
        channels: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (side // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[N, C]`` for images ``[N, channels, side, side]``."""
        tokens = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1) + self.positions
        return self.head(self.encoder(tokens)[:, 0])


def network() -> nn.Module:
    """Three layers of width 48 on patches of 7 x 7 pixels; 60,730 parameters."""
    return ViT()


def model(
    *, seed: int, cache: Path, data_dir: Path | None = None, quick: bool = False, device: torch.device = CPU
) -> nn.Module:
    """The network of a seed, trained on all training images (2,000 of them, one epoch, if quick)."""
    inputs, targets = (
        torch.cat(parts) for parts in zip(*train_loader(cache=cache, data_dir=data_dir, quick=quick), strict=True)
    )
    settings: dict[str, Any] = {
        "seed": seed, "epochs": QUICK_EPOCHS if quick else EPOCHS, "rate": LEARNING_RATE, "decay": WEIGHT_DECAY,
        "batch": TRAIN_BATCH, "warm_up": WARM_UP, "data": fingerprint(inputs, targets),
    }  # fmt: skip

    def make() -> nn.Module:
        model = initialised(network, seed).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        steps = settings["epochs"] * -(-len(inputs) // TRAIN_BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARM_UP, cycle_momentum=False
        )
        generator = torch.Generator().manual_seed(seed)
        order = (torch.randperm(len(inputs), generator=generator) for _ in range(settings["epochs"]))
        batches = (batch for epoch in order for batch in epoch.to(device).split(TRAIN_BATCH))
        with one_thread():
            train(model, inputs.to(device), targets.to(device), F.cross_entropy, batches, optimizer, schedule)
        return model

    return kept(cache, f"vit-{seed}", settings, network, make, device)


def description(*, quick: bool = False) -> str:
    """What the data and the network are, with the sizes."""
    n, epochs = (fashion_mnist.QUICK_TRAIN, QUICK_EPOCHS) if quick else (60_000, EPOCHS)
    return f"{DESCRIPTION} {n:,} training images, {epochs} epoch{'s' if epochs > 1 else ''}."
