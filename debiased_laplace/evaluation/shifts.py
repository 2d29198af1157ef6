"""Shifts of images, and images of another kind; each is seeded and says how strong it is.

Images are ``[N, channels, height, width]`` in [0, 1].
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


def gaussian_noise(images: Tensor, std: float, *, seed: int) -> Tensor:
    """Add independent Gaussian noise to every pixel and clip to [0, 1].

    Args:
        images: ``[N, channels, height, width]`` in [0, 1].
        std: Standard deviation, in units of the full intensity range.
        seed: Of a generator of its own, on the CPU: the same noise on every device.

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
    """Cut every image into square patches and put them back in a random order of its own.

    The pixels of an image, its strokes within a patch and its histogram stay; its shape is gone.

    Args:
        images: ``[N, channels, height, width]``.
        size: Edge of a patch in pixels; divides height and width.
        seed: Of a generator of its own, on the CPU.

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
        seed: Of a generator of its own, on the CPU.

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


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        got = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"Expected floating-point images of shape [N, channels, height, width], got {got}. "
            "Use unsqueeze(1) for grey images."
        )
