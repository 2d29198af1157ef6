"""Rows of numbers in a CSV file."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from debiased_laplace.cli.inputs.form import Chunk, Form, digest_of_files


class CsvFile:
    """Rows of numbers in a CSV file, with or without a line of names; commas, semicolons or tabs between them."""

    def __init__(self, path: Path, form: Form, size: int, columns: Sequence[str]) -> None:
        self._path, self._form, self._size = path, form, size
        with self._rows() as rows:
            first = next(rows, None)
            second = next(rows, None)
            if first is None or (second is None and _numbers(first) is None):
                raise ValueError(f"Expected rows of numbers in {path}, got none.")
            numbered = second is not None and len(first) > 1 and first == [str(i) for i in range(len(first))]
            self._names = first if numbered or _numbers(first) is None else None  # pandas numbers columns without names
            self.total = sum(1 for _ in rows) + (second is not None) + (self._names is None)
        self._width = len(first)
        self._chosen = self._columns(columns)
        numel = form.one.shape[1:].numel()
        if not form.transforms and len(self._chosen) != numel:
            known = f": {', '.join(self._names)}" if self._names and not columns else ""
            raise ValueError(
                f"Expected {numel} columns of inputs in {path}, as test_loader() of {form.task.source} has "
                f"{list(form.one.shape[1:])}, got {len(self._chosen)}{known}. Name those that are inputs with "
                "--columns a,b,c, or define transform() in the task file."
            )

    @contextmanager
    def _rows(self) -> Iterator[Iterator[list[str]]]:
        try:
            with self._path.open(newline="", encoding="utf-8-sig") as file:
                line = file.readline()
                file.seek(0)
                delimiter = max(",;\t", key=line.count)
                yield (row for row in csv.reader(file, delimiter=delimiter) if len(row) > 1 or "".join(row).strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"Expected a CSV file in UTF-8, got {self._path}: {error}. Convert it.") from error

    def _columns(self, columns: Sequence[str]) -> list[int]:
        if not columns:
            return list(range(self._width))
        if self._names is None:
            raise ValueError(f"Expected a first line of names in {self._path} for --columns, got numbers.")
        names = [name.strip() for name in self._names]
        missing = [name for name in columns if name not in names]
        if missing:
            raise ValueError(f"Expected columns out of {', '.join(names)} of {self._path}, got {', '.join(missing)}.")
        return [names.index(name) for name in columns]

    def digest(self) -> str:
        """Of the whole file, and of which columns are used."""
        return digest_of_files([self._path], repr(self._chosen))

    def chunks(self) -> Iterator[Chunk]:
        """So many rows at a time; those of a chunk that nobody reads are no numbers yet."""
        with self._rows() as rows:
            if self._names is not None:
                next(rows)
            for start in itertools.count(0, self._size):
                some = list(itertools.islice(rows, self._size))
                if not some:
                    return
                yield Chunk(start, len(some), partial(self._read, some, start))

    def _read(self, rows: list[list[str]], start: int) -> Tensor:
        read = torch.tensor([self._row(row, start + i) for i, row in enumerate(rows)], dtype=torch.float64)
        if not self._form.transforms:
            return self._form.fitted(read, self._form.one, str(self._path))
        made = [
            self._form.transformed(row.to(torch.get_default_dtype()), f"row {start + i + 1} of {self._path}")
            for i, row in enumerate(read)
        ]
        return torch.stack(made)

    def _row(self, row: list[str], number: int) -> list[float]:
        what = f"row {number + 1} of {self._path}"
        if len(row) != self._width:
            raise ValueError(f"Expected {self._width} columns in {what}, as in the first one, got {len(row)}.")
        values = []
        for column in self._chosen:
            name = repr(self._names[column]) if self._names else str(column + 1)
            try:
                value = float(row[column])
            except ValueError:
                value = float("nan")
            if not np.isfinite(value):
                raise ValueError(
                    f"Expected a finite number in column {name} of {what}, got {row[column]!r}. Fill in what is "
                    "missing, or choose other columns with --columns."
                )
            values.append(value)
        return values


def _numbers(row: Sequence[str]) -> list[float] | None:
    """The cells of a row as numbers; None for a row of names, without any number."""
    found = []
    for cell in row:
        try:
            found.append(float(cell))
        except ValueError:
            continue
    return found or None
