"""Arrays in NumPy's files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.cli.inputs.form import BYTES, Array, Chunk, Form, described, digest_of_files


class Arrays:
    """The first dimension of arrays in an .npy file, or by name in an .npz file, counts the data."""

    def __init__(self, path: Path, form: Form, size: int) -> None:
        self._path, self._form, self._size = path, form, size
        try:
            members = {path.stem: Mapped(path)} if path.suffix == ".npy" else self._members()
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"Expected NumPy arrays in {path}, got a file that has none: {error}.") from error
        self._arrays, self._structure = self._placed(members)
        lengths = {name: array.shape[0] for name, array in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Expected arrays of as many data each in {path}, got {lengths}.")
        self.total = next(iter(lengths.values()))

    def _members(self) -> dict[str, Rows]:
        with zipfile.ZipFile(self._path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        return {name: Member(self._path, name) for name in names}

    def _placed(self, members: Mapping[str, Rows]) -> tuple[dict[str, Rows], Callable[[Mapping[str, Array]], Any]]:
        """The arrays that are inputs, and how rows of them become inputs."""
        example, task, path = self._form.example, self._form.task, self._path
        fitted = self._form.fitted
        if isinstance(example, Mapping):
            tensors = {key: value for key, value in example.items() if isinstance(value, Tensor)}
            targets = _data.CallingConvention.targets_key  # which predictions do not need
            wanted = {key: value for key, value in tensors.items() if key != targets or key in members}
            if missing := [repr(key) for key in wanted if key not in members]:
                raise ValueError(
                    f"Expected arrays named as {described(example)} of {task.source} in {path}, got "
                    f"{', '.join(members)}: {', '.join(missing)} is missing."
                )
            chosen = {key: members[key] for key in wanted}
            return chosen, lambda rows: {
                key: fitted(_tensor(rows[key]), wanted[key], f"{key!r} of {path}") for key in wanted
            }
        if isinstance(example, (tuple, list)) and all(isinstance(value, Tensor) for value in example):
            if len(members) != len(example):
                raise ValueError(
                    f"Expected {len(example)} arrays in {path}, as test_loader() of {task.source} has inputs, got "
                    f"{', '.join(members)}."
                )
            pairs = list(zip(members, example, strict=True))
            return dict(members), lambda rows: tuple(
                fitted(_tensor(rows[name]), value, f"{name!r} of {path}") for name, value in pairs
            )
        name = next(iter(members)) if len(members) == 1 else "inputs"
        if name not in members:
            raise ValueError(f"Expected one array in {path}, or one that is called 'inputs', got {', '.join(members)}.")
        return {name: members[name]}, lambda rows: fitted(_tensor(rows[name]), self._form.one, str(path))

    def digest(self) -> str:
        """Of the whole file."""
        return digest_of_files([self._path])

    def chunks(self) -> Iterator[Chunk]:
        """So many rows at a time."""
        for part in _data.slices(self.total, self._size):
            yield Chunk(part.start, part.stop - part.start, partial(self._read, part))

    def _read(self, part: slice) -> Any:
        return self._structure({name: array.rows(part.start, part.stop) for name, array in self._arrays.items()})


def _tensor(rows: Array) -> Tensor:
    return torch.from_numpy(np.array(rows, dtype=rows.dtype.newbyteorder("=")))  # a copy, also of read-only memory


class Rows(Protocol):
    """An array whose rows are read when they are asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def rows(self, start: int, stop: int) -> Array:
        """Some of them."""
        ...


class Mapped:
    """An .npy file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self._array = np.load(path, mmap_mode="r", allow_pickle=False)
        self.shape, self.dtype = self._array.shape, self._array.dtype
        _check_rows(self.shape, str(path))

    def rows(self, start: int, stop: int) -> Array:
        """Some of them."""
        return self._array[start:stop]


class Member:
    """An array of an .npz file, read one row after the other; as a whole only where it lies column by column."""

    def __init__(self, path: Path, name: str) -> None:
        self._file = zipfile.ZipFile(path).open(f"{name}.npy")
        version = np.lib.format.read_magic(self._file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, by_columns, self.dtype = header(self._file)
        if self.dtype.hasobject:
            raise ValueError(f"{name!r} has Python objects in it, no numbers")
        _check_rows(self.shape, f"{name!r} of {path}")
        self._whole: Array | None = None
        if by_columns and len(self.shape) > 1:
            self._whole = np.frombuffer(self._file.read(), self.dtype).reshape(self.shape, order="F")
        self._position = 0

    def rows(self, start: int, stop: int) -> Array:
        """Some of them, after those that were read before."""
        if self._whole is not None:
            return self._whole[start:stop]
        size = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        if start < self._position:
            raise ValueError(f"Expected rows after {self._position}, got {start}.")
        left = (start - self._position) * size
        while left:
            left -= len(self._file.read(min(left, BYTES)))
        content = self._file.read((stop - start) * size)
        self._position = stop
        return np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape[1:])


def _check_rows(shape: tuple[int, ...], name: str) -> None:
    if not shape:
        raise ValueError(f"{name} is a single number")
