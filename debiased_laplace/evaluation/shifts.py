"""Shifts of images, and images of another kind; each is seeded and says how strong it is.

Images are ``[N, channels, height, width]`` in [0, 1], before any normalisation. :func:`corrupt` applies one of
:data:`CORRUPTIONS` at a severity from 1 to 5; :func:`cifar10_c` reads the corrupted images that others publish.

Source of the severities: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations, ICLR 2019, arXiv 1903.12261; the values are those with which they made CIFAR-10-C
(github.com/hendrycks/robustness, ``ImageNet-C/create_c/make_cifar_c.py``). Their images are rounded to 8 bits
after the corruption; here only JPEG rounds.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

_CIFAR10_C = "https://zenodo.org/records/2535967 (CIFAR-10-C.tar)"
_CIFAR10_C_FILES = {
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    *("speckle_noise", "gaussian_blur", "spatter", "saturate"),  # the extra set
}
_CIFAR10_C_NAMES = {"noise": "gaussian_noise", "blur": "gaussian_blur", "jpeg": "jpeg_compression"}
_CIFAR10_C_IMAGES = 10_000  # of each severity


def gaussian_noise(images: Tensor, std: float, *, seed: int) -> Tensor:
    """Add independent Gaussian noise to every pixel and clip to [0, 1].

    Args:
        images: ``[N, channels, height, width]`` in [0, 1].
        std: Standard deviation, in units of the full intensity range.
        seed: Of a separate generator, on the CPU: the same noise on every device.

    Returns:
        Images of the same shape, type and device.
    """
    _check_images(images)
    if not std >= 0:
        raise ValueError(f"Expected a non-negative standard deviation of the noise, got {std!r}.")
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (images + std * noise.to(images)).clamp(0, 1)


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Rotate counter-clockwise about the centre, linear interpolation, zero outside (``scipy.ndimage.rotate``).

    Args:
        images: ``[N, channels, height, width]`` in [0, 1].
        degrees: Angle in degrees.

    Returns:
        Images of the same shape, type and device.
    """
    _check_images(images)
    turned = ndimage.rotate(
        images.cpu().double().numpy(), degrees, axes=(3, 2), reshape=False, order=1, mode="constant", cval=0.0
    )
    return torch.from_numpy(turned).to(images).clamp(0, 1)


def shuffle_patches(images: Tensor, size: int, *, seed: int) -> Tensor:
    """Cut every image into square patches and put them back in another random order.

    The pixels of an image, its strokes within a patch and its histogram stay; its shape is gone.

    Args:
        images: ``[N, channels, height, width]``.
        size: Edge of a patch in pixels; divides height and width.
        seed: Of a separate generator, on the CPU.

    Returns:
        Images of the same shape, type and device.
    """
    _check_images(images)
    n, channels, height, width = images.shape
    if size < 1 or height % size or width % size:
        raise ValueError(f"Expected patches whose edge divides the {height} x {width} images, got {size}.")
    rows, columns = height // size, width // size
    patches = images.reshape(n, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    keys = torch.rand(n, rows * columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = keys.argsort(1).to(images.device)
    shuffled = patches[torch.arange(n, device=images.device)[:, None], order]
    return shuffled.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def smooth_blobs(images: Tensor, *, sigma: float = 1.0, seed: int) -> Tensor:
    """Smooth random patterns, each with exactly the pixel values of one image.

    White noise is blurred, and the pixel values of the image are laid out in its order: the darkest
    where the noise is lowest. The histogram is the image's, the shape is not.

    Args:
        images: ``[N, channels, height, width]``; channels are treated one by one.
        sigma: Standard deviation of the Gaussian blur, in pixels.
        seed: Of a separate generator, on the CPU.

    Returns:
        Images of the same shape, type and device.
    """
    _check_images(images)
    if not sigma >= 0:
        raise ValueError(f"Expected a non-negative standard deviation of the blur, got {sigma!r}.")
    noise = np.random.default_rng(seed).standard_normal(tuple(images.shape))
    smooth = torch.from_numpy(ndimage.gaussian_filter(noise, (0, 0, sigma, sigma), mode="nearest")).flatten(2)
    blobs = torch.empty_like(images).flatten(2)
    blobs.scatter_(2, smooth.argsort(2).to(images.device), images.flatten(2).sort(2).values)
    return blobs.reshape(images.shape)


@dataclass(frozen=True)
class Corruption:
    """A corruption of images in five severities.

    Attributes:
        name: Under which :data:`CORRUPTIONS` has it.
        levels: The strength at severity 1 to 5.
        description: What it does at a level, with ``{}`` for the level and its unit in words.
        function: ``(images, level, seed) -> images``.
    """

    name: str
    levels: tuple[float, float, float, float, float]
    description: str
    function: Callable[[Tensor, float, int], Tensor]


def corrupt(images: Tensor, name: str, severity: int, *, seed: int = 0) -> Tensor:
    r"""Corrupt images at a severity from 1 to 5.

    With x a channel of an image, and the levels in :data:`CORRUPTIONS`:

    * ``noise``: x + σ ε, ε standard normal; :func:`gaussian_noise`.
    * ``blur``: convolution with a Gaussian, edges continued. Its σ is in pixels of a 32-pixel image and grows with
      the shorter edge from there on, so that larger images lose details of the same relative size. In smaller
      images it is the same number of pixels: a narrower Gaussian would leave 8 x 8 pixels as they are.
    * ``contrast``: m + c (x - m), with m the mean of the channel.
    * ``rotation``: :func:`rotate`. CIFAR-10-C has no such angles.
    * ``jpeg``: compression and decompression of the image rounded to 8 bits; grey images stay grey.
    * ``pixelate``: the mean over the cells of a coarser grid, whose numbers of rows and columns are the image's
      times the level, rounded down. Small images have equal grids at neighbouring severities.

    Args:
        images: ``[N, channels, height, width]`` in [0, 1], of 1 or 3 channels and at least 8 x 8 pixels.
        name: One of :data:`CORRUPTIONS`.
        severity: 1 (weakest) to 5.
        seed: Of the noise, which has a separate generator on the CPU: the same noise on every device.

    Returns:
        Images of the same shape, type and device, in [0, 1].

    Raises:
        ValueError: For an unknown name, a severity outside 1 to 5, other shapes, or values outside [0, 1].

    Example:
        >>> images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> corrupt(images, "blur", 5).std() < corrupt(images, "blur", 1).std() < images.std()
        tensor(True)
    """
    corruption, level = _corruption(name), _level(name, severity)
    _check_images(images)
    if images.shape[0] == 0 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 8:
        raise ValueError(
            "Expected at least one image, 1 or 3 channels and at least 8 x 8 pixels, "
            f"got [N, channels, height, width] = {list(images.shape)}."
        )
    images = images.detach()
    if not (float(images.min()) >= 0 and float(images.max()) <= 1):  # false for NaN, too
        raise ValueError(
            f"Expected pixel values in [0, 1], got {float(images.min()):g} to {float(images.max()):g}. "
            "Images must not be normalised yet: corrupt first, normalise after."
        )
    return corruption.function(images, level, seed)


def describe(name: str, severity: int) -> str:
    """What :func:`corrupt` does, as part of a sentence.

    Args:
        name: One of :data:`CORRUPTIONS`.
        severity: 1 (weakest) to 5.

    Returns:
        The corruption and its strength in words.

    Raises:
        ValueError: For an unknown name or a severity outside 1 to 5.

    Example:
        >>> describe("noise", 3)
        'Gaussian noise of standard deviation 0.08'
    """
    return _corruption(name).description.format(f"{_level(name, severity):g}")


def cifar10_c(folder: str | Path, name: str, severity: int, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels of CIFAR-10-C, the corrupted test set of CIFAR-10, from its published files.

    The files are mapped into memory, and only the images asked for are read.

    Args:
        folder: With ``<corruption>.npy`` and ``labels.npy`` of CIFAR-10-C.tar, zenodo.org/records/2535967.
        name: Of a file of CIFAR-10-C without its ending, or a name in :data:`CORRUPTIONS` other than
            ``rotation``; ``blur`` is ``gaussian_blur`` of the extra set.
        severity: 1 (weakest) to 5.
        n: The first n images, all 10 000 by default. They are in the order of CIFAR-10's test set.

    Returns:
        Images ``[n, 3, 32, 32]``, float32 in [0, 1], and labels ``[n]``, int64.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: For an unknown name, a severity outside 1 to 5, an ``n`` outside 1 to 10 000, or a file that
            holds something else.
    """
    file = _CIFAR10_C_NAMES.get(name, name)
    if file not in _CIFAR10_C_FILES:
        raise ValueError(
            f"Expected a corruption of CIFAR-10-C, one of {', '.join(sorted(_CIFAR10_C_FILES | {*_CIFAR10_C_NAMES}))}, "
            f"got {name!r}. To corrupt images yourself, use corrupt()."
        )
    first = (_check_severity(severity) - 1) * _CIFAR10_C_IMAGES
    n = _CIFAR10_C_IMAGES if n is None else n
    if not 1 <= n <= _CIFAR10_C_IMAGES:
        raise ValueError(f"Expected n from 1 to {_CIFAR10_C_IMAGES} images, or None for all of them, got {n!r}.")
    total = 5 * _CIFAR10_C_IMAGES
    pixels = _open_cifar10_c(Path(folder) / f"{file}.npy", (total, 32, 32, 3))[first : first + n]
    labels = _open_cifar10_c(Path(folder) / "labels.npy", (total,))[first : first + n]
    images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).contiguous().float() / 255
    return images, torch.from_numpy(np.array(labels)).long()


def _open_cifar10_c(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"Expected the file {path}, got none. Download and unpack {_CIFAR10_C}.")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"Expected a whole .npy file, got {path}: {error}. Download {_CIFAR10_C} again.") from error
    if array.shape != shape or array.dtype != np.uint8:
        raise ValueError(
            f"Expected uint8 of shape {shape} in {path}, got {array.dtype} of shape {array.shape}. "
            f"Download the files of {_CIFAR10_C}."
        )
    return array


def _noise(images: Tensor, level: float, seed: int) -> Tensor:
    return gaussian_noise(images, level, seed=seed)


def _rotation(images: Tensor, level: float, seed: int) -> Tensor:
    return rotate(images, level)


def _blur(images: Tensor, level: float, seed: int) -> Tensor:
    sigma = level * max(min(images.shape[2:]), 32) / 32
    smooth = ndimage.gaussian_filter(images.cpu().double().numpy(), (0, 0, sigma, sigma), mode="nearest")
    return torch.from_numpy(smooth).to(images).clamp(0, 1)


def _contrast(images: Tensor, level: float, seed: int) -> Tensor:
    mean = images.mean((2, 3), keepdim=True)
    return (mean + level * (images - mean)).clamp(0, 1)


def _jpeg(images: Tensor, level: float, seed: int) -> Tensor:
    from PIL import Image  # a dependency of matplotlib; torchvision is about to lose its encoder

    pixels = (images.cpu().double() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    decoded = np.empty_like(pixels)
    for image, place in zip(pixels, decoded, strict=True):
        file = io.BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(file, "JPEG", quality=int(level))
        place[:] = np.asarray(Image.open(file)).reshape(place.shape)
    return (torch.from_numpy(decoded).permute(0, 3, 1, 2).double() / 255).to(images).contiguous()


def _pixelate(images: Tensor, level: float, seed: int) -> Tensor:
    rows, columns = (_cell_means(edge, int(edge * level)).to(images) for edge in images.shape[2:])
    return (rows @ images @ columns.T).clamp(0, 1)


def _cell_means(edge: int, cells: int) -> Tensor:
    """The matrix ``[edge, edge]`` that replaces every pixel of a line by the mean over its cell."""
    cell = (2 * torch.arange(edge) + 1) * cells // (2 * edge)  # in which the centre of the pixel lies
    same = (cell[:, None] == cell).double()
    return same / same.sum(1, keepdim=True)


#: The corruptions of :func:`corrupt` by name, with their strengths at severity 1 to 5.
CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        corruption.name: corruption
        for corruption in (
            Corruption("noise", (0.04, 0.06, 0.08, 0.09, 0.10), "Gaussian noise of standard deviation {}", _noise),
            Corruption(
                "blur",
                (0.4, 0.6, 0.7, 0.8, 1.0),
                "Gaussian blur of standard deviation {} pixels (for images of 32 pixels)",
                _blur,
            ),
            Corruption("contrast", (0.75, 0.5, 0.4, 0.3, 0.15), "contrast reduced to {} of the original", _contrast),
            Corruption("rotation", (10, 20, 30, 40, 50), "rotation by {} degrees", _rotation),
            Corruption("jpeg", (80, 65, 58, 50, 40), "JPEG compression of quality {}", _jpeg),
            Corruption("pixelate", (0.95, 0.9, 0.85, 0.75, 0.65), "pixelation to {} of the resolution", _pixelate),
        )
    }
)


def _corruption(name: str) -> Corruption:
    if name not in CORRUPTIONS:
        raise ValueError(f"Expected a corruption out of {', '.join(CORRUPTIONS)}, got {name!r}.")
    return CORRUPTIONS[name]


def _level(name: str, severity: int) -> float:
    return _corruption(name).levels[_check_severity(severity) - 1]


def _check_severity(severity: int) -> int:
    if isinstance(severity, (bool, float)) or severity not in range(1, 6):
        raise ValueError(f"Expected a severity out of 1, 2, 3, 4, 5, got {severity!r}.")
    return severity


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        got = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"Expected floating-point images of shape [N, channels, height, width], got {got}. "
            "Use unsqueeze(1) for grey images."
        )
