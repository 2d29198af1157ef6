"""Scenes of four digits with a label for every pixel, and a small U-Net: dense outputs, no download, half a minute.

:func:`network` gives outputs ``[N, 11, 20, 20]`` for scenes ``[N, 1, 20, 20]``, with targets ``[N, 20, 20]``
(:func:`dense_loader`). What is evaluated is one pixel of each scene, drawn at random, so that data are independent:
inputs ``[N, 2, 20, 20]`` have a second channel that is one there and zero elsewhere, and :class:`AtPixel` gives the
outputs there.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debiased_laplace.evaluation import shifts
from debiased_laplace.evaluation.shipped import digits
from debiased_laplace.evaluation.shipped.common import (
    CPU,
    Batches,
    Loader,
    fingerprint,
    initialised,
    kept,
    one_thread,
    shift_note,
    train,
)

NAME = "scenes"
DESCRIPTION = (
    "Scenes of 20 x 20 grey pixels with a handwritten digit in each quarter, and for every pixel whether it is "
    "background or of which digit. The digits come with scikit-learn and are split anew for each seed; scenes to train "
    "on, to tune and to test are made of different ones. The network is a U-Net, trained with AdamW on all pixels; one "
    "pixel of each scene, drawn at random, tunes and judges."
)
LIKELIHOOD = "classification"
CLASSES = ("background", *digits.CLASSES)
#: Scenes of each part, and to tune and to test with in a quick run.
N_TRAIN, N_VALIDATION, N_TEST, N_QUICK = 600, 400, 800, 100
SIDE = 20
#: All pixels that the network was trained on.
N_DATA = N_TRAIN * SIDE**2
BUDGET = 128
SEEDS = 5
SEEDS_NOTE = (
    "A seed decides everything that is random: how the digits are split and composed, which pixels are looked at, the "
    "training, the data drawn for the fits, the shifts. Splits of different seeds share digits, so a standard error "
    "speaks about repetitions on these digits, not about other data."
)
SHIFTS = ("noise", "blur", "contrast")
NOTES = {
    "test": "Test scenes as they are.",
    "noise": "Gaussian noise of standard deviation 0.1 to 0.5 added to every pixel, clipped to [0, 1].",
    **{name: shift_note(name) for name in SHIFTS[1:]},
    "shuffled patches": "Test scenes cut into patches of 2 x 2 pixels, put back in a random order.",
}
#: Ink of a pixel, in [0, 1], from which on it belongs to its digit.
INK = 0.25
EPOCHS, QUICK_EPOCHS = 30, 1
LEARNING_RATE, WEIGHT_DECAY, TRAIN_BATCH = 1e-2, 1e-2, 16
MEMBERS = 5


class UNet(nn.Module):
    """Two levels down and up with a connection across each (Ronneberger et al., arXiv 1505.04597); 17,259 parameters.

    Args:
        width: Channels of the first level; the others have two and four times as many.
        n_classes: Outputs of a pixel.
    """

    def __init__(self, width: int = 8, n_classes: int = len(CLASSES)) -> None:
        super().__init__()
        self.first = _block(1, width)
        self.second = _block(width, 2 * width)
        self.third = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.ReLU())
        self.up_second = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.back_second = nn.Sequential(nn.Conv2d(4 * width, 2 * width, 3, padding=1), nn.ReLU())
        self.up_first = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.back_first = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(width, n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[N, C, H, W]`` of scenes ``[N, 1, H, W]`` whose sides are multiples of four."""
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        third = self.third(F.max_pool2d(second, 2))
        second = self.back_second(torch.cat([second, self.up_second(third)], 1))
        return self.head(self.back_first(torch.cat([first, self.up_first(second)], 1)))


def _block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU()
    )


class AtPixel(nn.Module):
    """A network with an output for every pixel, asked about one.

    Args:
        network: From scenes ``[N, 1, H, W]`` to ``[N, C, H, W]``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[N, C]`` for ``[N, 2, H, W]``, of the pixel that is marked in the second channel."""
        return (self.network(x[:, :1]) * x[:, 1:]).sum((2, 3))


class Scenes(NamedTuple):
    """Scenes ``[N, 1, 20, 20]`` in [0, 1], labels ``[N, 20, 20]``, and one pixel of each, marked ``[N, 1, 20, 20]``."""

    images: Tensor
    labels: Tensor
    marks: Tensor

    def first(self, quick: bool) -> Scenes:
        """All of them; the first hundred if quick."""
        return Scenes(*(part[:N_QUICK] for part in self)) if quick else self

    def rows(self, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inputs ``[N, 2, 20, 20]`` and the labels ``[N]`` of the marked pixels, of these scenes or other images."""
        marked = self.labels[self.marks[:, 0] > 0]
        return torch.cat([self.images if images is None else images, self.marks], 1), marked


@lru_cache(maxsize=2)
def split(seed: int) -> dict[str, Scenes]:
    """Scenes of a seed to train on, to tune and to test with, of different digits."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"train": N_TRAIN, "validation": N_VALIDATION, "test": N_TEST}
    parts = digits.split(seed)._asdict()
    return {name: _composed(parts[name], n, generator) for name, n in sizes.items()}


def _composed(of_digits: tuple[Tensor, Tensor], n: int, generator: torch.Generator) -> Scenes:
    """Scenes with a digit ``[8, 8]`` somewhere in each quarter."""
    images, labels = of_digits
    chosen = torch.randint(len(images), (n, 4), generator=generator)
    places = torch.randint(SIDE // 2 - 8 + 1, (n, 4, 2), generator=generator).tolist()
    scenes, classes = torch.zeros(n, 1, SIDE, SIDE), torch.zeros(n, SIDE, SIDE, dtype=torch.long)
    for scene in range(n):
        for quarter, (datum, (row, column)) in enumerate(zip(chosen[scene], places[scene], strict=True)):
            rows = slice(SIDE // 2 * (quarter // 2) + row, SIDE // 2 * (quarter // 2) + row + 8)
            columns = slice(SIDE // 2 * (quarter % 2) + column, SIDE // 2 * (quarter % 2) + column + 8)
            scenes[scene, 0, rows, columns] = images[datum, 0]
            classes[scene, rows, columns] = (1 + labels[datum]) * (images[datum, 0] >= INK)
    marks = F.one_hot(torch.randint(SIDE**2, (n,), generator=generator), SIDE**2).float().view(n, 1, SIDE, SIDE)
    return Scenes(scenes, classes, marks)


def network(
    *, seed: int, cache: Path, quick: bool = False, device: torch.device = CPU, initial: int | None = None
) -> nn.Module:
    """The U-Net of a seed, with an output for every pixel.

    Args:
        seed: Of the data, and of the training.
        cache: Folder of the weights.
        quick: Whether one epoch will do.
        device: Where to train.
        initial: Another seed of the training.
    """
    images, labels, _ = split(seed)["train"]
    epochs, initial = QUICK_EPOCHS if quick else EPOCHS, seed if initial is None else initial
    settings = {
        "seed": initial, "epochs": epochs, "rate": LEARNING_RATE, "decay": WEIGHT_DECAY, "batch": TRAIN_BATCH,
        "data": fingerprint(images, labels),
    }  # fmt: skip

    def make() -> nn.Module:
        model = initialised(UNet, initial).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-N_TRAIN // TRAIN_BATCH))
        generator = torch.Generator().manual_seed(initial)
        order = (torch.randperm(N_TRAIN, generator=generator) for _ in range(epochs))
        batches = (batch for epoch in order for batch in epoch.to(device).split(TRAIN_BATCH))
        with one_thread():
            train(model, images.to(device), labels.to(device), F.cross_entropy, batches, optimizer, schedule)
        return model

    return kept(cache, f"scenes-{seed}-{initial}", settings, UNet, make, device)


def dense_loader(part: str, *, seed: int) -> Loader:
    """Scenes ``[N, 1, 20, 20]`` and the labels ``[N, 20, 20]`` of all their pixels.

    Args:
        part: ``"train"``, ``"validation"`` or ``"test"``.
        seed: Of the data.
    """
    return Batches(lambda: split(seed)[part][:2])


def model(*, seed: int, cache: Path, quick: bool = False, device: torch.device = CPU) -> nn.Module:
    """The network of a seed, asked about one pixel."""
    return AtPixel(network(seed=seed, cache=cache, quick=quick, device=device)).eval()


def ensemble(*, seed: int, cache: Path, quick: bool = False, device: torch.device = CPU) -> list[nn.Module]:
    """Five networks on the data of a seed, each from another initialisation."""
    return [
        AtPixel(network(seed=seed, cache=cache, quick=quick, device=device, initial=1000 * seed + number)).eval()
        for number in range(1, MEMBERS + 1)
    ]


def train_loader(*, seed: int) -> Loader:
    """One pixel of every scene to train on, of the 400 that the network was trained on."""
    return Batches(lambda: split(seed)["train"].rows())


def val_loader(*, seed: int, quick: bool = False) -> Loader:
    """One pixel of every scene to tune with (100 if quick)."""
    return Batches(lambda: split(seed)["validation"].first(quick).rows())


def test_loader(*, seed: int, quick: bool = False) -> Loader:
    """One pixel of every test scene (100 if quick)."""
    return Batches(lambda: split(seed)["test"].first(quick).rows())


def shifted_loaders(*, seed: int, quick: bool = False) -> dict[str, dict[int, Loader]]:
    """The same pixels of test scenes under every shift, by severity."""

    def make(name: str, severity: int) -> tuple[Tensor, Tensor]:
        scenes = split(seed)["test"].first(quick)
        return scenes.rows(digits.shifted(scenes.images, name, severity, seed=seed))

    return {name: {severity: Batches(partial(make, name, severity)) for severity in range(1, 6)} for name in SHIFTS}


def ood_loaders(*, seed: int, quick: bool = False) -> dict[str, Loader]:
    """Test scenes with their patches in another order; targets are those of the test scenes."""

    def make() -> tuple[Tensor, Tensor]:
        scenes = split(seed)["test"].first(quick)
        return scenes.rows(shifts.shuffle_patches(scenes.images, 2, seed=seed))

    return {"shuffled patches": Batches(make)}


def images(inputs: Tensor) -> Tensor:
    """Scenes in grey, with the pixel that is asked about in red."""
    scenes, marks = inputs[:, :1], inputs[:, 1:]
    return torch.cat([torch.maximum(scenes, marks), scenes * (1 - marks), scenes * (1 - marks)], 1)


def description(*, quick: bool = False) -> str:
    """What the data and the network are, with the sizes."""
    epochs, *held = (f"{QUICK_EPOCHS} epoch", N_QUICK, N_QUICK) if quick else (f"{EPOCHS} epochs", N_VALIDATION, N_TEST)
    return f"{DESCRIPTION} {N_TRAIN} scenes to train on for {epochs}, {held[0]} for validation, {held[1]} to test on."
