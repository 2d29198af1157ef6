"""A task: All-CNN-C trained on the images of CIFAR-10 at hand. Inputs are ``[N, 3, 32, 32]``, normalised by channel.

    debiased-laplace bias eval/all_cnn_c.py --data-dir <folder>

The images, shifts and out-of-distribution data are those of the task ``cifar10``; no checkpoint is needed. One thread
takes about 90 s for an epoch of 10,000 images; an interrupted training goes on after the last epoch that was finished.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debiased_laplace import _store
from debiased_laplace.evaluation.records import digest
from debiased_laplace.evaluation.shipped import cifar10
from debiased_laplace.evaluation.shipped.common import CPU, fingerprint, initialised, kept, read_whole, train

NAME = "CIFAR-10, All-CNN-C"
DESCRIPTION = (
    "All-CNN-C (1.4 million parameters) on CIFAR-10, colour images of 32 x 32 pixels, trained without augmentation by "
    "AdamW, a warm-up and a cosine schedule."
)
LIKELIHOOD, CLASSES, NOTES = cifar10.LIKELIHOOD, cifar10.CLASSES, cifar10.NOTES
BUDGET = 128
SEEDS = 1
SEEDS_NOTE = (
    "A seed decides the initialisation of the network and the order of its training data, which of the test images "
    "tune and which judge, the data drawn for the fits, and the noise of the shifts."
)
EPOCHS, QUICK_EPOCHS = 25, 1
LEARNING_RATE, WEIGHT_DECAY, TRAIN_BATCH, WARM_UP = 1e-3, 1e-2, 64, 0.1

val_loader, test_loader = cifar10.val_loader, cifar10.test_loader
train_loader = cifar10.train_loader
shifted_loaders, ood_loaders, images = cifar10.shifted_loaders, cifar10.ood_loaders, cifar10.images


def network(n_classes: int = 10) -> nn.Module:
    """All-CNN-C (Springenberg et al., arXiv 1412.6806), without dropout, with He's initialisation."""
    widths = [(3, 96, 3, 1), (96, 96, 3, 1), (96, 96, 3, 2), (96, 192, 3, 1), (192, 192, 3, 1), (192, 192, 3, 2)]
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in widths:
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, padding=1), nn.ReLU()]
    for convolution in (nn.Conv2d(192, 192, 3), nn.Conv2d(192, 192, 1), nn.Conv2d(192, n_classes, 1)):
        layers += [convolution, nn.ReLU()]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.get_parameter("bias"))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def model(
    *, seed: int, cache: Path, data_dir: Path | None = None, quick: bool = False, device: torch.device = CPU
) -> nn.Module:
    """The network of a seed, trained on all training images at hand (256 of them, one epoch, if quick)."""
    loader = train_loader(cache=cache, data_dir=data_dir, quick=quick)
    inputs, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
    settings = {
        "seed": seed, "epochs": QUICK_EPOCHS if quick else EPOCHS, "rate": LEARNING_RATE, "decay": WEIGHT_DECAY,
        "batch": TRAIN_BATCH, "warm_up": WARM_UP, "data": fingerprint(inputs, targets),
    }  # fmt: skip
    return kept(
        cache, f"all-cnn-c-{seed}", settings, network,
        lambda: _trained(inputs.to(device), targets.to(device), settings, cache, device), device,
    )  # fmt: skip


def _trained(inputs: Tensor, targets: Tensor, settings: dict[str, Any], cache: Path, device: torch.device) -> nn.Module:
    """Epoch by epoch; what is needed to go on is kept after each of them."""
    seed, epochs = settings["seed"], settings["epochs"]
    model = initialised(network, seed).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * -(-len(inputs) // TRAIN_BATCH), pct_start=WARM_UP
    )
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    key = digest({**settings, "network": repr(model), "device": device.type})
    path = cache / f"all-cnn-c-{seed}-{key}.progress"
    finished = 0
    if (state := read_whole(path, device)) is not None:
        finished = state.pop("finished")
        for name, part_state in state.items():
            parts[name].load_state_dict(part_state)
    for epoch in range(finished, epochs):
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        train(model, inputs, targets, F.cross_entropy, order.to(device).split(TRAIN_BATCH), optimizer, schedule)
        state = {name: part.state_dict() for name, part in parts.items()} | {"finished": epoch + 1}
        cache.mkdir(parents=True, exist_ok=True)
        _store.write(path, state, {"kind": "training"})
    path.unlink(missing_ok=True)
    return model.to(memory_format=torch.contiguous_format)


def description(*, cache: Path, data_dir: Path | None = None, quick: bool = False) -> str:
    """What the data and the network are, with the sizes."""
    n = sum(len(targets) for _, targets in train_loader(cache=cache, data_dir=data_dir, quick=quick))
    epochs = QUICK_EPOCHS if quick else EPOCHS
    return f"{DESCRIPTION} {n:,} training images, {epochs} epoch{'s' if epochs > 1 else ''}."
