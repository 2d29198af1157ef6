"""Corruptions by severity against independent computations, and the published files of CIFAR-10-C."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from debiased_laplace.evaluation import shifts
from debiased_laplace.evaluation.shifts import CORRUPTIONS, cifar10_c, corrupt, describe
from tests.conftest import DEVICES
from tests.tolerances import FLOAT32, MONTE_CARLO_Z, assert_equal

SEVERITIES = range(1, 6)


def images(n: int = 4, channels: int = 3, height: int = 32, width: int | None = None) -> Tensor:
    """Smooth patterns of the full range, and pixels of exactly 0 and 1, in float64."""
    width = height if width is None else width
    noise = np.random.default_rng(0).standard_normal((n, channels, height, width))
    smooth = torch.from_numpy(ndimage.gaussian_filter(noise, (0, 0, height / 16, width / 16)))
    lowest, highest = smooth.amin((2, 3), keepdim=True), smooth.amax((2, 3), keepdim=True)
    return ((smooth - lowest) / (highest - lowest)).clamp(0, 1)


# -- laws of all -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (13, 21)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_kind_of_tensor_stays(name: str, channels: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    original = images(2, channels, *size).to(dtype)
    kept = original.clone()
    for severity in (1, 5):
        corrupted = corrupt(original, name, severity)
        assert (corrupted.shape, corrupted.dtype, corrupted.device) == (original.shape, dtype, original.device)
        assert float(corrupted.min()) >= 0
        assert float(corrupted.max()) <= 1
        assert not torch.equal(corrupted, original)
    assert torch.equal(original, kept)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_large_images(name: str) -> None:
    corrupted = corrupt(images(1, 3, 224).float(), name, 3)
    assert corrupted.shape == (1, 3, 224, 224)
    assert 0 <= float(corrupted.min()) < float(corrupted.max()) <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_is_strength(name: str, channels: int) -> None:
    for size in (8, 28, 32):
        original = images(20, channels, size)
        distances = [float((corrupt(original, name, s) - original).square().mean()) for s in SEVERITIES]
        assert distances[0] > 0
        for severity, (weaker, stronger) in enumerate(itertools.pairwise(distances), 1):
            # the grids of small images may be the same at neighbouring severities
            grids = [int(size * level) for level in CORRUPTIONS[name].levels[severity - 1 : severity + 1]]
            same = name == "pixelate" and grids[0] == grids[1]
            assert weaker == stronger if same else weaker < stronger, (size, severity)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_seeds(name: str) -> None:
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    first, again, other = (corrupt(images(), name, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name != "noise")
    assert torch.equal(corrupt(images(), name, 3), corrupt(images(), name, 3, seed=0))
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_device_sees_the_same_images(name: str, device: str) -> None:
    corrupted = corrupt(images().float().to(device), name, 3)
    assert corrupted.device.type == device
    assert_equal(corrupted, corrupt(images().float(), name, 3), FLOAT32)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_that_require_a_gradient(name: str) -> None:
    corrupted = corrupt(images().requires_grad_(), name, 2)
    assert not corrupted.requires_grad
    assert torch.equal(corrupted, corrupt(images(), name, 2))


# -- each --------------------------------------------------------------------------------------


def test_the_levels_are_the_published_ones() -> None:
    assert {name: corruption.levels for name, corruption in CORRUPTIONS.items()} == {
        "noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "blur": (0.4, 0.6, 0.7, 0.8, 1),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "rotation": (10, 20, 30, 40, 50),
        "jpeg": (80, 65, 58, 50, 40),
        "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    }
    assert all(name == corruption.name for name, corruption in CORRUPTIONS.items())
    with pytest.raises(TypeError, match="does not support item assignment"):
        CORRUPTIONS["noise"] = CORRUPTIONS["blur"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "severity", "words"),
    [
        ("noise", 3, "Gaussian noise of standard deviation 0.08"),
        ("noise", 5, "Gaussian noise of standard deviation 0.1"),
        ("blur", 3, "Gaussian blur of standard deviation 0.7 pixels (for images of 32 pixels)"),
        ("contrast", 5, "contrast reduced to 0.15 of the original"),
        ("rotation", 1, "rotation by 10 degrees"),
        ("jpeg", 2, "JPEG compression of quality 65"),
        ("pixelate", 4, "pixelation to 0.75 of the resolution"),
    ],
)
def test_descriptions(name: str, severity: int, words: str) -> None:
    assert describe(name, severity) == words


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_its_standard_deviation(severity: int) -> None:
    grey, std = torch.full((50, 3, 32, 32), 0.5, dtype=torch.float64), (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    noise = corrupt(grey, "noise", severity, seed=7) - grey
    n = noise.numel()
    assert abs(float(noise.mean())) <= MONTE_CARLO_Z * std / math.sqrt(n)
    assert abs(float(noise.std()) - std) <= MONTE_CARLO_Z * std / math.sqrt(2 * n)
    assert torch.equal(corrupt(grey, "noise", severity, seed=7), shifts.gaussian_noise(grey, std, seed=7))


@pytest.mark.parametrize(("size", "factor"), [((8, 8), 1.0), ((32, 32), 1.0), ((64, 64), 2.0), ((48, 80), 1.5)])
def test_blur_by_numpy(size: tuple[int, int], factor: float) -> None:
    original = images(2, 3, *size)
    for severity in SEVERITIES:
        sigma = factor * (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
        radius = int(4 * sigma + 0.5)
        kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        kernel /= kernel.sum()
        expected = original.numpy()
        for axis in (2, 3):
            continued = np.pad(expected, [(radius, radius) if a == axis else (0, 0) for a in range(4)], mode="edge")
            windows = np.lib.stride_tricks.sliding_window_view(continued, 2 * radius + 1, axis)
            expected = windows @ kernel
        assert_equal(corrupt(original, "blur", severity), torch.from_numpy(expected))


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_by_numpy(channels: int) -> None:
    original = images(2, channels)
    for severity in SEVERITIES:
        expected = original.numpy().copy()
        for image in expected:
            for channel in image:
                mean = channel.sum() / channel.size
                channel[:] = mean + (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1] * (channel - mean)
        assert_equal(corrupt(original, "contrast", severity), torch.from_numpy(expected))


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (13, 21)], ids=str)
def test_rotation_by_interpolation(size: tuple[int, int]) -> None:
    original = images(2, 3, *size)
    centre = (np.array(size) - 1) / 2
    y, x = np.meshgrid(np.arange(size[0]) - centre[0], np.arange(size[1]) - centre[1], indexing="ij")
    for severity in SEVERITIES:
        angle = math.radians(10 * severity)
        # counter-clockwise with y downwards: a pixel comes from the place turned back by the angle
        places = [
            math.cos(angle) * y + math.sin(angle) * x + centre[0],
            -math.sin(angle) * y + math.cos(angle) * x + centre[1],
        ]
        expected = np.stack(
            [[ndimage.map_coordinates(channel, places, order=1, cval=0.0) for channel in image] for image in original]
        )
        corrupted = corrupt(original, "rotation", severity)
        assert_equal(corrupted, torch.from_numpy(expected))
        assert torch.equal(corrupted, shifts.rotate(original, 10 * severity))


def pillow(image: Tensor) -> Image.Image:
    pixels = np.round(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (13, 21)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_by_pillow(channels: int, size: tuple[int, int]) -> None:
    original = images(3, channels, *size)
    for severity in SEVERITIES:
        corrupted = corrupt(original, "jpeg", severity)
        for image, actual in zip(original, corrupted, strict=True):
            file = io.BytesIO()
            pillow(image).save(file, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
            expected = np.asarray(Image.open(file)).reshape(*size, channels)
            assert_equal(actual, torch.from_numpy(expected.copy()).permute(2, 0, 1).double() / 255)
            assert actual.is_contiguous()


@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_by_torchvision(channels: int) -> None:
    library = pytest.importorskip("torchvision.io")
    if not hasattr(library, "encode_jpeg"):
        pytest.skip("this torchvision has no encoder")
    original = images(3, channels)
    for severity in SEVERITIES:
        for image, actual in zip(original, corrupt(original, "jpeg", severity), strict=True):
            pixels = (image * 255).round().to(torch.uint8)
            encoded = library.encode_jpeg(pixels, quality=(80, 65, 58, 50, 40)[severity - 1])
            assert_equal(actual, library.decode_jpeg(encoded).double() / 255)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (13, 21), (33, 15)], ids=str)
def test_pixelate_by_numpy(size: tuple[int, int]) -> None:
    original = images(1, 3, *size)
    for severity, level in enumerate((0.95, 0.9, 0.85, 0.75, 0.65), 1):
        cells = [math.floor(edge * level) for edge in size]
        members: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i in range(size[0]):
            for j in range(size[1]):
                cell = tuple(math.floor((k + 0.5) * cells[d] / size[d]) for d, k in enumerate((i, j)))
                members.setdefault(cell, []).append((i, j))
        assert len(members) == cells[0] * cells[1]
        expected = np.empty(original.shape)
        for places in members.values():
            rows, columns = zip(*places, strict=True)
            expected[:, :, rows, columns] = original.numpy()[:, :, rows, columns].mean(-1, keepdims=True)
        corrupted = corrupt(original, "pixelate", severity)
        assert_equal(corrupted, torch.from_numpy(expected))
        assert_equal(corrupted.mean(), original.mean())
        assert_equal(corrupt(corrupted, "pixelate", severity), corrupted)


@pytest.mark.parametrize("edge", [8, 28, 32, 64, 224])
def test_pixelate_is_the_box_filter_of_pillow(edge: int) -> None:
    original = images(1, 3, edge).float()
    for severity, level in enumerate((0.95, 0.9, 0.85, 0.75, 0.65), 1):
        corrupted, few = corrupt(original, "pixelate", severity), (int(edge * level), int(edge * level))
        for channel, actual in zip(original[0], corrupted[0], strict=True):
            small = Image.fromarray(channel.numpy()).resize(few, Image.Resampling.BOX)
            expected = np.array(small.resize((edge, edge), Image.Resampling.BOX))
            assert_equal(actual, torch.from_numpy(expected), FLOAT32)


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [describe, lambda name, severity: corrupt(images(), name, severity)])
def test_unknown_corruptions_and_severities(function: Any) -> None:
    listed = "out of noise, blur, contrast, rotation, jpeg, pixelate, got 'fog'"
    with pytest.raises(ValueError, match=listed):
        function("fog", 1)
    for severity in (0, 6, -1, 2.0, True, "2", None):
        with pytest.raises(ValueError, match=rf"severity out of 1, 2, 3, 4, 5, got {severity!r}\."):
            function("noise", severity)


def test_severities_of_numpy() -> None:
    assert describe("jpeg", np.int64(2)) == "JPEG compression of quality 65"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.rand(3, 32, 32), r"floating-point images of shape .* got torch.float32 of shape \(3, 32, 32\)"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), r"floating-point images .* got torch\.uint8"),
        (np.zeros((1, 1, 8, 8)), "floating-point images .* got ndarray"),
        (torch.rand(1, 2, 8, 8), r"1 or 3 channels .* got \[N, channels, height, width\] = \[1, 2, 8, 8\]"),
        (torch.rand(1, 3, 7, 8), r"at least 8 x 8 pixels, got .* \[1, 3, 7, 8\]"),
        (torch.rand(1, 3, 8, 7), r"at least 8 x 8 pixels, got .* \[1, 3, 8, 7\]"),
        (torch.rand(0, 3, 8, 8), r"at least one image, .* \[0, 3, 8, 8\]"),
        (torch.full((1, 1, 8, 8), 1.5), r"values in \[0, 1\], got 1\.5 to 1\.5\. Images must not be normalised yet"),
        (torch.full((1, 1, 8, 8), -0.5), r"values in \[0, 1\], got -0\.5 to -0\.5\. Images must not be normalised yet"),
        (torch.full((1, 1, 8, 8), math.nan), r"values in \[0, 1\], got nan to nan"),
    ],
)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_wrong_images(name: str, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corrupt(wrong, name, 1)


# -- CIFAR-10-C --------------------------------------------------------------------------------


def write(folder: Path, file: str, pixels: dict[int, np.ndarray], shape: tuple[int, ...] = (50_000, 32, 32, 3)) -> None:
    """A sparse file that is zero but for some rows."""
    array = np.lib.format.open_memmap(folder / f"{file}.npy", mode="w+", dtype=np.uint8, shape=shape)
    for row, value in pixels.items():
        array[row] = value
    array.flush()


PIXELS = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("CIFAR-10-C")
    for value, file in enumerate(
        ("gaussian_noise", "gaussian_blur", "contrast", "jpeg_compression", "pixelate", "fog")
    ):
        rows = {10_000 * severity + 1: PIXELS // (severity + 1) for severity in range(5)}
        write(folder, file, {**rows, 0: np.uint8(value), 49_999: np.uint8(255)})
    labels = np.concatenate([np.arange(10_000) % 10] * 5).astype(np.uint8)
    np.save(folder / "labels.npy", labels)
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("noise", 0), ("blur", 1), ("contrast", 2), ("jpeg", 3), ("pixelate", 4)),
        *(("gaussian_noise", 0), ("gaussian_blur", 1), ("jpeg_compression", 3), ("fog", 5)),
    ],
)
def test_cifar10_c_by_both_names(folder: Path, name: str, value: int) -> None:
    pictures, labels = cifar10_c(folder, name, 1, n=3)
    assert (pictures.shape, pictures.dtype, labels.dtype) == ((3, 3, 32, 32), torch.float32, torch.int64)
    assert labels.tolist() == [0, 1, 2]
    assert torch.equal(pictures[0], torch.full((3, 32, 32), value / 255))
    assert torch.equal(pictures[1], torch.from_numpy(PIXELS.transpose(2, 0, 1).copy()).float() / 255)
    assert torch.equal(pictures[2], torch.zeros(3, 32, 32))
    assert float(corrupt(pictures, "noise", 1).max()) <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_cifar10_c_by_severity(folder: Path, severity: int) -> None:
    pictures, labels = cifar10_c(str(folder), "noise", severity, n=2)
    assert torch.equal(pictures[1], torch.from_numpy((PIXELS // severity).transpose(2, 0, 1).copy()).float() / 255)
    assert labels.tolist() == [0, 1]


def test_cifar10_c_whole(folder: Path) -> None:
    pictures, labels = cifar10_c(folder, "noise", 5)
    assert pictures.shape == (10_000, 3, 32, 32)
    assert pictures.is_contiguous()
    assert torch.equal(pictures[-1], torch.ones(3, 32, 32))
    assert torch.equal(labels, torch.arange(10_000) % 10)


@pytest.mark.parametrize(
    ("name", "severity", "n", "message"),
    [
        ("rotation", 1, 1, r"corruption of CIFAR-10-C, one of blur, .*zoom_blur, got 'rotation'\. .* use corrupt\(\)"),
        ("labels", 1, 1, "corruption of CIFAR-10-C, .* got 'labels'"),
        ("noise", 6, 1, "severity out of 1, 2, 3, 4, 5, got 6"),
        ("noise", 1, 0, "n from 1 to 10000 images, or None for all of them, got 0"),
        ("noise", 1, 10_001, "n from 1 to 10000 images, or None for all of them, got 10001"),
    ],
)
def test_what_cifar10_c_has_not(folder: Path, name: str, severity: int, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cifar10_c(folder, name, severity, n)


def test_wrong_files_of_cifar10_c(folder: Path, tmp_path: Path) -> None:
    download = r"https://zenodo\.org/records/2535967 \(CIFAR-10-C\.tar\)"
    with pytest.raises(FileNotFoundError, match=rf"file .*snow\.npy, got none\. Download and unpack {download}"):
        cifar10_c(folder, "snow", 1)
    write(tmp_path, "fog", {})
    with pytest.raises(FileNotFoundError, match=rf"file .*labels\.npy, got none\. Download and unpack {download}"):
        cifar10_c(tmp_path, "fog", 1)
    np.save(tmp_path / "snow.npy", np.zeros((10, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=rf"\(50000, 32, 32, 3\) in .*got uint8 of shape \(10, .*{download}"):
        cifar10_c(tmp_path, "snow", 1)
    np.save(tmp_path / "labels.npy", np.zeros(50_000))
    with pytest.raises(ValueError, match=rf"\(50000,\) in .*labels\.npy, got float64 of shape \(50000,\).*{download}"):
        cifar10_c(tmp_path, "fog", 1)
    with open(tmp_path / "fog.npy", "r+b") as file:
        file.truncate(100_000)
    with pytest.raises(ValueError, match=rf"a whole \.npy file, got .*fog\.npy: .*{download} again"):
        cifar10_c(tmp_path, "fog", 1)
    (tmp_path / "frost.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a whole \.npy file, got .*frost\.npy: "):
        cifar10_c(tmp_path, "frost", 1)
