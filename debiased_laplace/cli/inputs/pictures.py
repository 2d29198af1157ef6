"""Images in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.cli.inputs.form import Chunk, Form, digest_of_files

IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
#: Modes of PIL for images with so many channels.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
#: How far numbers of an image in [0, 1] may be out of it.
ROUNDING = 1e-3


class Pictures:
    """Images of a folder and of those in it, by their paths in alphabetical order."""

    def __init__(self, folder: Path, form: Form, size: int) -> None:
        self._form, self._size, self._folder = form, size, folder
        every = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        self._paths = sorted(path for path in every if path.suffix.lower() in IMAGES)
        self.total = len(self._paths)
        #: Files that are no images.
        self.n_others = len(every) - len(self._paths)
        if not self._paths:
            raise ValueError(f"Expected images ({', '.join(sorted(IMAGES))}) in {folder}, got none.")
        if not form.transforms:
            self._check_without_transform(form.one)

    def _check_without_transform(self, example: Tensor) -> None:
        """Whether the task's images are the numbers of an image from 0 to 1, in this size."""
        if example.ndim != 4 or example.shape[1] not in MODES or not example.is_floating_point():
            raise ValueError(
                f"Expected a task with images [N, channels, H, W] for a folder of images, got data "
                f"{list(example.shape)} of {example.dtype} from test_loader(). {self._remedy}"
            )
        low, high = float(example.min()), float(example.max())
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise ValueError(
                f"Expected images with numbers from 0 to 1 from test_loader(), got {low:.3g} to {high:.3g}: they were "
                f"normalised, and those of {self._folder} would not be. {self._remedy}"
            )

    @property
    def _remedy(self) -> str:
        return (
            f"Define transform(image) in {self._form.task.source}: it is given an image of PIL, and returns the tensor "
            f"{list(self._form.one.shape[1:])} that the network takes."
        )

    def digest(self) -> str:
        """Of all files and their names."""
        return digest_of_files(self._paths, repr([self._name(path) for path in self._paths]))

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def chunks(self) -> Iterator[Chunk]:
        """So many images at a time."""
        for part in _data.slices(len(self._paths), self._size):
            paths = self._paths[part]
            names = np.array([self._name(path) for path in paths])
            yield Chunk(part.start, len(paths), partial(self._stacked, paths), {"names": names})

    def _stacked(self, paths: Sequence[Path]) -> Tensor:
        return torch.stack([self._read(path) for path in paths])

    def _read(self, path: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"Expected an image in {path}, got a file that cannot be read: {error}.") from error
        if self._form.transforms:
            return self._form.transformed(image, str(path))
        channels, height, width = self._form.one.shape[1:]
        if (image.height, image.width) != (height, width):
            raise ValueError(
                f"Expected images of {width} x {height} pixels, as test_loader() of {self._form.task.source} has them, "
                f"got {image.width} x {image.height} in {path}. Resize them, or define transform(image) in the task "
                "file: it is given an image of PIL, and returns the tensor that the network takes."
            )
        if image.mode.startswith(("I", "F")):  # converting would clip them
            raise ValueError(
                f"Expected an image with 8 bits for each channel in {path}, got one of mode {image.mode!r}, whose "
                f"range is not known. {self._remedy}"
            )
        pixels = np.array(image.convert(MODES[channels])).reshape(height, width, channels)
        return (torch.from_numpy(pixels).movedim(2, 0).to(torch.float64) / 255).to(self._form.one.dtype)
