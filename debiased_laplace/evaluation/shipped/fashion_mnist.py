"""LeNet on the 60,000 images of Fashion-MNIST, trained in under two minutes. Images are ``[N, 1, 28, 28]`` in [0, 1].

The files ``FashionMNIST/raw/*.gz`` and ``MNIST/raw/*.gz`` are read from the folder of the data; without
them torchvision downloads into the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debiased_laplace.evaluation import shifts
from debiased_laplace.evaluation.shipped.common import (
    CPU,
    Batches,
    Loader,
    fingerprint,
    initialised,
    kept,
    mnist_folder,
    one_thread,
    read_mnist,
    scaled,
    shift_note,
    train,
)

NAME = "Fashion-MNIST, LeNet"
DESCRIPTION = (
    "Fashion-MNIST, grey images of 28 x 28 pixels of ten kinds of clothes, and LeNet-5 with ReLU and max pooling, "
    "trained with AdamW and a cosine schedule. The official test images are split into validation and test data, the "
    "same for every seed."
)
LIKELIHOOD = "classification"
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
BUDGET = 128
SEEDS = 5
SEEDS_NOTE = (
    "A seed decides the initialisation of the network and the order of its training data, the data drawn for the fits, "
    "and the noise of the shifts. Training, validation and test images are the same for every seed, so a standard "
    "error speaks about trainings, not about other images. The deep ensemble is the same for every seed."
)
#: Test images of the shifts, and out-of-distribution images.
N_SHIFTED = 2000
N_VALIDATION = 2000
QUICK_TRAIN, QUICK_TEST = 2000, 300
SHIFTS = ("noise", "blur", "contrast", "rotation", "jpeg", "pixelate")
NOTES = {
    "test": "The last 8,000 of the 10,000 official test images, as they are.",
    **{name: shift_note(name) for name in SHIFTS},
    "MNIST": "Handwritten digits of the same size: the first test images of MNIST.",
}
EPOCHS, QUICK_EPOCHS = 20, 1
LEARNING_RATE, WEIGHT_DECAY, TRAIN_BATCH = 2e-3, 1e-2, 64
MEMBERS = 5


def network() -> nn.Module:
    """LeNet-5 with ReLU and max pooling for 28 x 28 grey images; 44,426 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def model(
    *, seed: int, cache: Path, data_dir: Path | None = None, quick: bool = False, device: torch.device = CPU
) -> nn.Module:
    """The network of a seed, trained on all training images (2,000 of them if quick)."""
    images, targets = _train(data_dir, cache, quick)
    epochs = QUICK_EPOCHS if quick else EPOCHS
    settings = {
        "seed": seed, "epochs": epochs, "rate": LEARNING_RATE, "decay": WEIGHT_DECAY, "batch": TRAIN_BATCH,
        "data": fingerprint(images, targets),
    }  # fmt: skip

    def make() -> nn.Module:
        model = initialised(network, seed).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // TRAIN_BATCH))
        batches = _order(len(images), epochs, seed, device)
        with one_thread():
            train(model, scaled(images).to(device), targets.to(device), F.cross_entropy, batches, optimizer, schedule)
        return model

    return kept(cache, f"fashion-mnist-{seed}", settings, network, make, device)


def ensemble(
    *, cache: Path, data_dir: Path | None = None, quick: bool = False, device: torch.device = CPU
) -> list[nn.Module]:
    """The networks of seeds 0 to 4, the same for every seed; those that are not in the cache are trained.

    An evaluation of these five seeds, the default, trains nothing more for the ensemble than it trains anyway. The
    network of such a seed is then a member of the ensemble it is compared with.
    """
    return [model(seed=member, cache=cache, data_dir=data_dir, quick=quick, device=device) for member in range(MEMBERS)]


def train_loader(*, cache: Path, data_dir: Path | None = None, quick: bool = False) -> Loader:
    """All images the network was trained on."""
    return Batches(lambda: _train(data_dir, cache, quick), scaled)


def val_loader(*, cache: Path, data_dir: Path | None = None, quick: bool = False) -> Loader:
    """The first 2,000 of the official test images (300 if quick)."""
    n = QUICK_TEST if quick else N_VALIDATION
    return Batches(lambda: _held(data_dir, cache, 0, n), scaled)


def test_loader(*, cache: Path, data_dir: Path | None = None, quick: bool = False) -> Loader:
    """The other 8,000 of the official test images (300 of them if quick)."""
    return Batches(lambda: _test(data_dir, cache, QUICK_TEST if quick else None), scaled)


def shifted_loaders(
    *, seed: int, cache: Path, data_dir: Path | None = None, quick: bool = False
) -> dict[str, dict[int, Loader]]:
    """The first 2,000 test images (300 if quick) under every shift, by severity."""

    def make(name: str, severity: int) -> tuple[Tensor, Tensor]:
        images, targets = _test(data_dir, cache, QUICK_TEST if quick else N_SHIFTED)
        return shifts.corrupt(scaled(images), name, severity, seed=seed), targets

    return {name: {severity: Batches(partial(make, name, severity)) for severity in range(1, 6)} for name in SHIFTS}


def ood_loaders(*, cache: Path, data_dir: Path | None = None, quick: bool = False) -> dict[str, Loader]:
    """The first 2,000 test images of MNIST (300 if quick), with the digits as targets."""
    folder, n = mnist_folder("MNIST", data_dir, cache), QUICK_TEST if quick else N_SHIFTED  # fails now, not when read

    def make() -> tuple[Tensor, Tensor]:
        images, targets = read_mnist(folder, "t10k")
        return images[:n], targets[:n]

    return {"MNIST": Batches(make, scaled)}


def images(inputs: Tensor) -> Tensor:
    """The inputs are images already."""
    return inputs


def description(*, quick: bool = False) -> str:
    """What the data and the network are, with the sizes."""
    if quick:
        return f"{DESCRIPTION} A quick run: {QUICK_TRAIN:,} training images, one epoch, {QUICK_TEST} test images."
    return (
        f"{DESCRIPTION} 60,000 training images, {EPOCHS} epochs; {N_VALIDATION:,} images for validation, 8,000 to test "
        f"on, the first {N_SHIFTED:,} of these under the shifts."
    )


def _order(n: int, epochs: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator).to(device).split(TRAIN_BATCH)


def _train(data_dir: Path | None, cache: Path, quick: bool) -> tuple[Tensor, Tensor]:
    images, targets = read_mnist(mnist_folder("FashionMNIST", data_dir, cache), "train")
    return (images[:QUICK_TRAIN], targets[:QUICK_TRAIN]) if quick else (images, targets)


def _held(data_dir: Path | None, cache: Path, first: int, n: int | None) -> tuple[Tensor, Tensor]:
    images, targets = read_mnist(mnist_folder("FashionMNIST", data_dir, cache), "t10k")
    last = None if n is None else first + n
    return images[first:last], targets[first:last]


def _test(data_dir: Path | None, cache: Path, n: int | None) -> tuple[Tensor, Tensor]:
    return _held(data_dir, cache, N_VALIDATION, n)
