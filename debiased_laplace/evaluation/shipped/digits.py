"""Scikit-learn's digits and a small CNN: no download, seconds. Images are ``[N, 1, 8, 8]`` in [0, 1]."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debiased_laplace.evaluation import shifts
from debiased_laplace.evaluation.shipped.common import (
    CPU,
    Batches,
    Loader,
    fingerprint,
    kept,
    one_thread,
    shift_note,
    train,
)

NAME = "digits"
DESCRIPTION = (
    "The 1,797 handwritten digits that come with scikit-learn, 8 x 8 grey pixels scaled to [0, 1], split anew for each "
    "seed with equal shares of every class. The network has two convolutions, a batch normalisation and two linear "
    "layers, and is trained with Adam."
)
LIKELIHOOD = "classification"
CLASSES = tuple("0123456789")
BUDGET = 64
SEEDS = 8
SEEDS_NOTE = (
    "A seed decides everything that is random: how the data are split, the training, the data drawn for the fits, the "
    "shifts. Splits of different seeds share data, so a standard error speaks about repetitions on these digits, not "
    "about other data."
)
#: Standard deviations of the noise and degrees of the rotation, by severity.
NOISE = (0.1, 0.2, 0.3, 0.4, 0.5)
DEGREES = (10.0, 20.0, 30.0, 40.0, 50.0)
NOTES = {
    "test": "Test images as they are.",
    "noise": "Gaussian noise of standard deviation 0.1 to 0.5 added to every pixel, clipped to [0, 1].",
    "rotation": "Turned by 10 to 50 degrees counter-clockwise, linear interpolation, black outside.",
    "blur": "Gaussian blur of standard deviation {0:g} to {4:g} pixels.".format(*shifts.CORRUPTIONS["blur"].levels),
    "contrast": shift_note("contrast"),
    "shuffled digits": (
        "No digits: each test image cut into patches of 2 x 2 pixels, put back in a random order. The strokes and the "
        "pixel values of a digit, without its shape."
    ),
    "smooth blobs": (
        "No digits: white noise blurred with a standard deviation of 1 pixel, and the pixel values of a test image "
        "laid out in its order. The histogram of a digit in a smooth random pattern."
    ),
}
TRAIN_FRACTION, VALIDATION_FRACTION, TEST_FRACTION, QUICK_TEST_FRACTION = 0.5, 0.2, 0.3, 0.15
EPOCHS, QUICK_EPOCHS = 15, 8
LEARNING_RATE = 1e-2
TRAIN_BATCH, BATCH = 64, 128
MEMBERS = 5


class DigitsSplit(NamedTuple):
    """Images and labels of the three parts."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def network() -> nn.Module:
    """Two convolutions, a batch normalisation, two linear layers; 9,818 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


@lru_cache(maxsize=2)
def split(seed: int, quick: bool = False) -> DigitsSplit:
    """The parts of a seed, with equal shares of every class; a quick run has fewer test data."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(raw / 16).float().view(-1, 1, 8, 8)
    targets = torch.from_numpy(labels).long()
    fractions = TRAIN_FRACTION, VALIDATION_FRACTION, QUICK_TEST_FRACTION if quick else TEST_FRACTION
    sizes = [round(part * len(labels)) for part in fractions]
    chosen, rest = train_test_split(range(len(labels)), train_size=sizes[0], stratify=labels, random_state=seed)
    sizes[2] = min(sizes[2], len(rest) - sizes[1])
    validation, test = train_test_split(
        rest, train_size=sizes[1], test_size=sizes[2], stratify=labels[rest], random_state=seed
    )
    return DigitsSplit(*((images[part], targets[part]) for part in (chosen, validation, test)))


def trained(
    images: Tensor, targets: Tensor, seed: int, *, epochs: int = EPOCHS, device: torch.device = CPU
) -> nn.Module:
    """Initialise and train; the global random state is left as it was.

    Args:
        images: ``[N, 1, 8, 8]``.
        targets: Labels ``[N]``.
        seed: Of the initialisation and of the order of the data.
        epochs: Passes through the data.
        device: Where to train.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # initialisation draws from the CPU's global generator
        model = network()
        order = [torch.randperm(len(images)) for _ in range(epochs)]
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    batches = (batch for epoch in order for batch in epoch.to(device).split(TRAIN_BATCH))
    with one_thread():
        train(model, images.to(device), targets.to(device), F.cross_entropy, batches, optimizer)
    return model.eval()


def model(*, seed: int, cache: Path, quick: bool = False, device: torch.device = CPU) -> nn.Module:
    """The network of a seed."""
    return _member(seed, seed, cache, quick, device)


def ensemble(*, seed: int, cache: Path, quick: bool = False, device: torch.device = CPU) -> list[nn.Module]:
    """Five networks on the data of a seed, each from another initialisation."""
    return [_member(seed, 1000 * seed + number, cache, quick, device) for number in range(1, MEMBERS + 1)]


def train_loader(*, seed: int, quick: bool = False) -> Loader:
    """The training data of a seed."""
    return Batches(lambda: split(seed, quick).train, size=BATCH)


def val_loader(*, seed: int, quick: bool = False) -> Loader:
    """The validation data of a seed."""
    return Batches(lambda: split(seed, quick).validation, size=BATCH)


def test_loader(*, seed: int, quick: bool = False) -> Loader:
    """The test data of a seed."""
    return Batches(lambda: split(seed, quick).test, size=BATCH)


def shifted_loaders(*, seed: int, quick: bool = False) -> dict[str, dict[int, Loader]]:
    """Test data under every shift, by severity."""

    def make(name: str, severity: int) -> tuple[Tensor, Tensor]:
        images, targets = split(seed, quick).test
        return shifted(images, name, severity, seed=seed), targets

    return {
        name: {severity: Batches(partial(make, name, severity), size=BATCH) for severity in range(1, 6)}
        for name in ("noise", "rotation", "blur", "contrast")
    }


def shifted(images: Tensor, name: str, severity: int, *, seed: int) -> Tensor:
    """Shifted images; noise and rotation have other strengths here, since 8 x 8 pixels bear more than large images."""
    if name == "noise":
        return shifts.gaussian_noise(images, NOISE[severity - 1], seed=seed)
    if name == "rotation":
        return shifts.rotate(images, DEGREES[severity - 1])
    return shifts.corrupt(images, name, severity, seed=seed)


def ood_loaders(*, seed: int, quick: bool = False) -> dict[str, Loader]:
    """Images that are no digits, one for each test image; targets are those of the test images."""

    def make(kind: str) -> tuple[Tensor, Tensor]:
        images, targets = split(seed, quick).test
        if kind == "shuffled digits":
            return shifts.shuffle_patches(images, 2, seed=seed), targets
        return shifts.smooth_blobs(images, sigma=1.0, seed=seed), targets

    return {kind: Batches(partial(make, kind), size=BATCH) for kind in ("shuffled digits", "smooth blobs")}


def images(inputs: Tensor) -> Tensor:
    """The inputs are images already."""
    return inputs


def description(*, seed: int = 0, quick: bool = False) -> str:
    """What the data and the network are, with the sizes."""
    parts = [len(targets) for _, targets in split(seed, quick)]
    return (
        f"{DESCRIPTION} {parts[0]} images to train on for {QUICK_EPOCHS if quick else EPOCHS} epochs, {parts[1]} for "
        f"validation, {parts[2]} to test on."
    )


def _member(seed: int, initial: int, cache: Path, quick: bool, device: torch.device) -> nn.Module:
    epochs = QUICK_EPOCHS if quick else EPOCHS
    settings = {
        "seed": initial, "epochs": epochs, "rate": LEARNING_RATE, "batch": TRAIN_BATCH,
        "data": fingerprint(*split(seed, quick).train),
    }  # fmt: skip
    return kept(
        cache, f"digits-{seed}-{initial}", settings, network,
        lambda: trained(*split(seed, quick).train, initial, epochs=epochs, device=device), device,
    )  # fmt: skip
