"""A trained ResNet-20, or ResNet-56, on CIFAR-10. Inputs are ``[N, 3, 32, 32]``, normalised by channel.

The folder of the data, or ``cifar10`` in it, holds a checkpoint of akamaster/pytorch_resnet_cifar10 (``resnet20-*.th``)
and the images, as ``train_first10k.npz`` and ``test_first1k.npz`` (``images`` uint8 ``[N, 32, 32, 3]`` and
``labels``) or as torchvision has them; without images torchvision downloads into the cache. CIFAR-10-C and MNIST are
used where they are there.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debiased_laplace.evaluation import shifts
from debiased_laplace.evaluation.shipped.common import (
    CPU,
    Batches,
    Loader,
    existing,
    of_torchvision,
    read_mnist,
    read_npz,
    scaled,
    shift_note,
    stamp,
)

NAME = "CIFAR-10, ResNet-20"
DESCRIPTION = (
    "A trained ResNet on CIFAR-10, colour images of 32 x 32 pixels: the published checkpoint of "
    "akamaster/pytorch_resnet_cifar10. It was trained on all 50,000 training images, which it fits almost perfectly, "
    "and its best epoch was chosen on the test set, so that its accuracy is optimistic."
)
LIKELIHOOD = "classification"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
#: Size of the set the network was trained on; the train loader may yield fewer.
N_DATA = 50_000
BUDGET = 128
SEEDS = 4
#: Seeds 2j and 2j + 1 judge the halves of one split, so that of an even number of seeds all test images judge.
FOLDS = 2
SEEDS_NOTE = (
    "A seed decides the data drawn for the fits and the noise of the shifts, a pair of seeds how the test images are "
    "halved: one half tunes and the other judges, then the reverse. The network is the same for every seed."
)
SHIFTS = ("noise", "blur", "contrast", "rotation", "jpeg", "pixelate")
QUICK_SHIFTS = ("noise", "rotation")
#: CIFAR-10-C has all the others.
OWN_SHIFT = "rotation"
PUBLISHED = ("CIFAR-10-C", "cifar10/CIFAR-10-C")
QUICK_TRAIN, QUICK_VALIDATION, QUICK_TEST = 256, 100, 60
NOTES = {
    "test": "Test images as they are.",
    **{name: shift_note(name) for name in SHIFTS},
    "shuffled patches": "Each test image cut into patches of 4 x 4 pixels, put back in a random order.",
    "smooth blobs": (
        "White noise blurred with a standard deviation of 2 pixels, and the values of each channel of a test image "
        "laid out in its order."
    ),
    "MNIST": "Handwritten digits, test images of MNIST, enlarged to 32 x 32 pixels and grey in each channel.",
}
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut (He et al., arXiv 1512.03385), of type A: strided, and padded with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.widen = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Of ``[N, C, H, W]``."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """The inputs, in the shape of the outputs."""
        if self.stride == 1 and not self.widen:
            return x
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.widen // 2, self.widen // 2))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Module:
    first, others = BasicBlock(inputs, outputs, stride), [BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *others)


class CifarResNet(nn.Module):
    """ResNet for CIFAR-10 (He et al., arXiv 1512.03385, section 4.2), shortcuts of type A.

    Args:
        blocks: In each of the three stages; 3 make a ResNet-20 of 269,722 parameters.
        n_classes: Number of outputs.
    """

    def __init__(self, blocks: int = 3, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, 10]`` of images ``[N, 3, 32, 32]``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))


class CifarImages(NamedTuple):
    """Images ``[N, 3, 32, 32]`` as bytes and labels ``[N]``, of training and of test."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def trained(depth: int, path: Path) -> nn.Module:
    """A network of depth 20 or 56 with the weights of a checkpoint, in evaluation mode.

    Raises:
        ValueError: If the file is something else.
    """
    with torch.random.fork_rng(devices=[]):
        network = CifarResNet(blocks=(depth - 2) // 6)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    except Exception as error:  # torch has many ways to fail here
        raise ValueError(f"Expected a checkpoint with the 'state_dict' of a ResNet-{depth}, got {path}.") from error
    return network.eval()


def model(*, data_dir: Path | None = None, device: torch.device = CPU) -> nn.Module:
    """The checkpoint's network, the same for every seed.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it is something else.
    """
    return trained(20, _checkpoint(data_dir, 20)).to(device)


def of_depth(depth: int) -> SimpleNamespace:
    """The same task with another network."""

    def other(*, data_dir: Path | None = None, device: torch.device = CPU) -> nn.Module:
        """The checkpoint's network, the same for every seed."""
        return trained(depth, _checkpoint(data_dir, depth)).to(device)

    return SimpleNamespace(**{**globals(), "NAME": f"CIFAR-10, ResNet-{depth}", "model": other})


def train_loader(*, cache: Path, data_dir: Path | None = None, quick: bool = False) -> Loader:
    """The training images at hand (256 of them if quick), without augmentation; :data:`N_DATA` is the whole set's."""
    images, targets = _images(data_dir, cache).train
    n = QUICK_TRAIN if quick else None
    return Batches(lambda: (images[:n], targets[:n]), normalised)


def val_loader(*, seed: int, cache: Path, data_dir: Path | None = None, quick: bool = False) -> Loader:
    """One half of the test images (100 of them if quick)."""
    images, targets = _images(data_dir, cache).test
    index = halves(len(targets), seed, quick)[0]
    return Batches(lambda: (images[index], targets[index]), normalised)


def test_loader(*, seed: int, cache: Path, data_dir: Path | None = None, quick: bool = False) -> Loader:
    """The other half of the test images (60 of them if quick)."""
    images, targets, _ = _test(seed, data_dir, cache, quick)
    return Batches(lambda: (images, targets), normalised)


def shifted_loaders(
    *, seed: int, cache: Path, data_dir: Path | None = None, quick: bool = False
) -> dict[str, dict[int, Loader]]:
    """Test data under every shift, by severity; all but the rotations are those of CIFAR-10-C where it is there."""
    folder = existing(data_dir, *PUBLISHED)
    images, targets, index = _test(seed, data_dir, cache, quick)

    def make(name: str, severity: int) -> tuple[Tensor, Tensor]:
        if folder is not None and name != OWN_SHIFT:
            published, labels = shifts.cifar10_c(folder, name, severity, int(index.max()) + 1)
            if not torch.equal(labels[index], targets):
                raise ValueError(
                    f"Expected in {folder} the labels of the test images, got others. The test images must be the "
                    "first ones of CIFAR-10's test set, in its order."
                )
            return published[index], targets
        return shifts.corrupt(scaled(images), name, severity, seed=seed), targets

    return {
        name: {severity: Batches(partial(make, name, severity), _normalise) for severity in range(1, 6)}
        for name in (QUICK_SHIFTS if quick else SHIFTS)
    }


def ood_loaders(*, seed: int, cache: Path, data_dir: Path | None = None, quick: bool = False) -> dict[str, Loader]:
    """Images of other things, one for each test image: shuffled patches, smooth blobs, and MNIST if it is there."""
    mnist = existing(data_dir, "MNIST/raw")
    images, targets, index = _test(seed, data_dir, cache, quick)

    def make(kind: str) -> tuple[Tensor, Tensor]:
        if kind == "shuffled patches":
            return shifts.shuffle_patches(scaled(images), 4, seed=seed), targets
        if kind == "smooth blobs":
            return shifts.smooth_blobs(scaled(images), sigma=2.0, seed=seed), targets
        assert mnist is not None
        # Those in the places of the test images: seeds that judge other images see other digits.
        digits, classes = (part[index % len(part)] for part in read_mnist(mnist, "t10k"))
        return F.interpolate(scaled(digits), (32, 32), mode="bilinear").expand(-1, 3, -1, -1), classes

    kinds = ["shuffled patches", "smooth blobs", *(["MNIST"] if mnist is not None else [])]
    return {kind: Batches(partial(make, kind), _normalise) for kind in kinds}


def images(inputs: Tensor) -> Tensor:
    """Images in [0, 1] of normalised inputs."""
    return (inputs * STD.to(inputs) + MEAN.to(inputs)).clamp(0, 1)


def description(*, cache: Path, data_dir: Path | None = None, quick: bool = False) -> str:
    """What the data and the network are, with the sizes."""
    data = _images(data_dir, cache)
    n_train = min(QUICK_TRAIN, len(data.train[1])) if quick else len(data.train[1])
    validation, test = halves(len(data.test[1]), 0, quick)
    shifted = (
        "Shifted images are made from the test images."
        if existing(data_dir, *PUBLISHED) is None
        else "Shifted images are those of CIFAR-10-C, but the rotations, which are made from the test images."
    )
    return (
        f"{DESCRIPTION} Curvature data come from the first {n_train:,} training images. {len(validation):,} test "
        f"images tune and {len(test):,} others judge. {shifted}"
    )


def normalised(images: Tensor) -> Tensor:
    """Inputs of the network from bytes."""
    return _normalise(scaled(images))


def halves(n: int, seed: int, quick: bool = False) -> tuple[Tensor, Tensor]:
    """Which of ``n`` test images are for validation and which for the test.

    Returns:
        Indices of each, disjoint; those of seed 2j + 1 are those of 2j the other way round.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed // FOLDS))
    validation, test = order[: n // 2], order[n // 2 :]
    if seed % FOLDS:
        validation, test = test, validation
    return (validation[:QUICK_VALIDATION], test[:QUICK_TEST]) if quick else (validation, test)


def _normalise(images: Tensor) -> Tensor:
    return (images - MEAN) / STD


def _test(seed: int, data_dir: Path | None, cache: Path, quick: bool) -> tuple[Tensor, Tensor, Tensor]:
    images, targets = _images(data_dir, cache).test
    index = halves(len(targets), seed, quick)[1]
    return images[index], targets[index], index


def _checkpoint(data_dir: Path | None, depth: int) -> Path:
    for folder in () if data_dir is None else (data_dir, data_dir / "cifar10"):
        checkpoints = sorted(folder.glob(f"resnet{depth}-*.th"))
        if checkpoints:
            return checkpoints[0]
    published = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
    raise FileNotFoundError(
        f"Expected resnet{depth}-*.th in the folder of --data-dir or in cifar10 there, got none in {data_dir}. "
        f"Fetch {published.get(depth, 'it')} from akamaster/pytorch_resnet_cifar10 and name its folder with --data-dir."
    )


def _images(data_dir: Path | None, cache: Path) -> CifarImages:
    parts = [existing(data_dir, name, f"cifar10/{name}") for name in ("train_first10k.npz", "test_first1k.npz")]
    paths = tuple(path for path in parts if path is not None)
    if len(paths) == 2:
        return _of_files(paths, stamp(*paths))
    return _of_torchvision(data_dir, cache)


@lru_cache(maxsize=2)
def _of_files(paths: tuple[Path, ...], stamp: tuple[Any, ...]) -> CifarImages:
    return CifarImages(*(_read(path) for path in paths))


@lru_cache(maxsize=2)
def _of_torchvision(data_dir: Path | None, cache: Path) -> CifarImages:  # which checks the files that it reads
    wanted = "train_first10k.npz and test_first1k.npz, or cifar-10-batches-py,"
    folder = existing(data_dir, "cifar-10-batches-py", "cifar10/cifar-10-batches-py")
    root = cache if folder is None else folder.parent
    sets = [
        of_torchvision("CIFAR10", root, wanted, data_dir, train=train, download=folder is None)
        for train in (True, False)
    ]
    return CifarImages(*(_tensors(part.data, part.targets) for part in sets))


def _read(path: Path) -> tuple[Tensor, Tensor]:
    images, labels = read_npz(path, "images", "labels")
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
        raise ValueError(f"Expected images uint8 [N, 32, 32, 3] in {path}, got {images.dtype} {list(images.shape)}.")
    return _tensors(images, labels)


def _tensors(images: np.ndarray, labels: object) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(np.asarray(labels)).long()
