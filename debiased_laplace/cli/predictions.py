"""Predictions of a posterior in parts on the disk, which become one file: interrupted, they go on with the next part.

Parts lie beside the file, in a folder that is called after it and after a digest of what predictions are made from.
Each is written whole or not at all, and knows its data again. Neither they nor the file are ever in memory as a whole.
"""

from __future__ import annotations

import csv
import glob
import io
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from debiased_laplace import _data, _files
from debiased_laplace.cli.inputs import Chunk, Source
from debiased_laplace.cli.inputs.arrays import Member
from debiased_laplace.cli.inputs.form import BYTES, Array
from debiased_laplace.evaluation import records
from debiased_laplace.evaluation.predictors.posterior import N_SAMPLES
from debiased_laplace.evaluation.predictors.prediction import mutual_information
from debiased_laplace.posterior.gaussian import standard_normals

if TYPE_CHECKING:
    from debiased_laplace import Laplace

SUFFIXES = (".npz", ".csv")
_START, _DIGEST = "_start", "_digest"


# -- one chunk ---------------------------------------------------------------------------------------


def predicted(posterior: Laplace, inputs: _data.Inputs) -> dict[str, Array]:
    """What is predicted about N data, as arrays ``[N, ...]``; docs/cli.md has the table.

    Raises:
        ValueError: If a prediction is not finite.
    """
    p = posterior.predict(inputs)
    if p.has_probabilities:
        values = _of_answers(posterior, p.mean, p.outputs_mean, p.outputs_variance)
    else:
        assert p.epistemic_variance is not None
        values = {
            "mean": p.mean, "variance": p.variance, "epistemic_std": p.epistemic_variance.clamp_min(0).sqrt(),
            "total_std": p.variance.sqrt(),
        }  # fmt: skip
    values["functional_variance"] = p.outputs_variance.flatten(1).sum(1)
    arrays = {name: _array(value) for name, value in values.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0, 0])
            raise ValueError(
                f"Expected finite predictions, got {name} with NaN or infinity, first for datum {row} of this batch. "
                "Look for NaN in the inputs, or for an overflow in the network."
            )
    return arrays


def _of_answers(posterior: Laplace, means: Tensor, outputs: Tensor, variances: Tensor) -> dict[str, Tensor]:
    """Of probabilities: those of all classes, or of independent labels."""
    likelihood, sites = posterior.likelihood, posterior.network.sites
    tau = posterior.output_temperature
    if sites is not None or likelihood.class_outputs(outputs) is None:
        if likelihood.site.class_outputs(outputs.new_zeros(1, 2)) is None:  # labels, each by itself
            return {"predicted": (means > 0.5).long(), "probabilities": means}
        axis = 1 if sites is None else sites.class_dim
        return {"predicted": means.argmax(axis), "probabilities": means,
                "entropy": torch.special.entr(means.double()).sum(axis)}  # fmt: skip
    scaled = outputs.double() / tau
    if outputs.shape[1] == 1:  # one logit: that of class 0 by itself, since 1 - p near one has no digits left
        link = posterior.link or posterior.default_link
        generator = torch.Generator().manual_seed(posterior.seed)
        normals = standard_normals((100, 1), outputs, generator) if link == "mc" else None
        spread = (variances.double() / tau**2)[..., None] if likelihood.needs_covariance(link) else variances / tau**2
        means = likelihood.class_predictive(scaled, spread.double(), link, normals)
    generator = torch.Generator().manual_seed(posterior.seed)
    normals = standard_normals((N_SAMPLES, outputs.shape[1]), outputs, generator)
    deviations = (variances.double() / tau**2).clamp_min(0).sqrt()
    draws = likelihood.class_outputs(scaled + deviations * normals.to(scaled)[:, None])
    assert draws is not None
    return {
        "predicted": means.argmax(1), "probabilities": means, "entropy": torch.special.entr(means.double()).sum(1),
        "mutual_information": mutual_information(draws.softmax(-1)),
    }  # fmt: skip


def _array(value: Tensor) -> Array:
    value = value.detach().cpu()
    return (value.double() if value.is_floating_point() else value).numpy()


# -- all of them -------------------------------------------------------------------------------------


class Parts:
    """The predictions that are there, in a folder beside the file that they become.

    Args:
        out: That file.
        made_from: What decides the predictions.
    """

    def __init__(self, out: Path, made_from: Mapping[str, Any]) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.{records.digest(made_from)}.parts")
        #: Data that had been predicted before, and all.
        self.n_kept = self.n = 0
        self._paths: list[Path] = []

    @property
    def others(self) -> list[Path]:
        """Folders of interrupted predictions that are made from something else."""
        return sorted(
            set(self.out.parent.glob(f"{glob.escape(self.out.name)}.????????.parts")) - {self.folder}
        )  # fmt: skip

    def make(self, posterior: Laplace, source: Source) -> None:
        """Predict what is not there yet."""
        self.folder.mkdir(exist_ok=True)
        with tqdm(total=source.total, unit="datum", desc="Predictions") as bar:
            for chunk in source.chunks():
                path = self.folder / f"{chunk.start:012d}-{chunk.n}.npz"
                if self._is_there(path, chunk):
                    self.n_kept += chunk.n
                else:
                    arrays = {**chunk.known, **predicted(posterior, chunk.read())}
                    if self.out.suffix == ".csv":
                        _check_is_table({name: array.ndim for name, array in arrays.items()})
                    file = io.BytesIO()
                    marks = {_START: np.array([chunk.start]), _DIGEST: np.array([chunk.digest])}
                    np.savez(file, **arrays, **marks)  # type: ignore[arg-type]
                    _files.write(path, file.getvalue())
                self._paths.append(path)
                self.n += chunk.n
                bar.update(chunk.n)
        if not self.n:
            raise ValueError("Expected data to predict, got none. A generator can be read only once.")

    def _is_there(self, path: Path, chunk: Chunk) -> bool:
        """Whether a part has these data and can be read."""
        try:
            with np.load(path) as stored:
                same = bool(stored[_START][0] == chunk.start and stored[_DIGEST][0] == chunk.digest)
                return same and all(len(stored[name]) for name in stored.files)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False

    def shapes(self) -> dict[str, list[int]]:
        """Of the arrays that the file has."""
        return {name: list(shape) for name, (shape, _) in self._forms().items()}

    def _forms(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of every array; a ``ValueError`` if data have predictions of different shapes."""
        forms: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        for path in self._paths:
            for name in _names(path):
                member = Member(path, name)
                shape, dtype = forms.get(name, ((0, *member.shape[1:]), member.dtype))
                if shape[1:] != member.shape[1:]:
                    raise ValueError(
                        f"Expected {name} of one shape for all data, got {list(shape[1:])} and "
                        f"{list(member.shape[1:])}. Predict data of different lengths by themselves."
                    )
                forms[name] = (shape[0] + member.shape[0], *shape[1:]), np.promote_types(dtype, member.dtype)
        return forms

    def _rows(self, path: Path, name: str) -> Array:
        member = Member(path, name)
        return member.rows(0, member.shape[0])

    def write(self, classes: Sequence[str]) -> None:
        """Write the file, and remove the parts.

        Args:
            classes: Names of the classes, for a table; none where there are no classes.
        """
        if self.out.suffix == ".csv":
            _files.write(self.out, lambda path: self._write_table(path, classes))
        else:
            _files.write(self.out, self._write_arrays)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_arrays(self, path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, (shape, dtype) in self._forms().items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    for part in self._paths:
                        content = memoryview(np.ascontiguousarray(self._rows(part, name), dtype).tobytes())
                        for start in range(0, len(content), BYTES):
                            file.write(content[start : start + BYTES])

    def _write_table(self, path: Path, classes: Sequence[str]) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            self._write_rows(file, classes)

    def _write_rows(self, file: TextIO, classes: Sequence[str]) -> None:
        forms, writer = self._forms(), csv.writer(file, lineterminator="\n")
        labels = list(classes) if "predicted" in forms and len(forms["predicted"][0]) == 1 else []
        names = ["row"]
        for name, (shape, _) in forms.items():
            names += _columns(name, shape, classes)
            names += ["label"] if name == "predicted" and labels else []
        writer.writerow(names)
        row = 0
        for part in self._paths:
            columns = {name: self._rows(part, name) for name in forms}
            for index in range(len(next(iter(columns.values())))):
                cells: list[Any] = [row]
                for name, values in columns.items():
                    cells += np.atleast_1d(values[index]).tolist()
                    cells += [labels[int(values[index])]] if name == "predicted" and labels else []
                writer.writerow(cells)
                row += 1


def _names(path: Path) -> Iterator[str]:
    """Of the arrays in a part."""
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    return (name for name in names if name not in (_START, _DIGEST))


def _check_is_table(dimensions: Mapping[str, int]) -> None:
    """Whether arrays with so many dimensions have a row of numbers for each datum."""
    wide = [name for name, number in dimensions.items() if number > 2]
    if wide:
        raise ValueError(
            f"Expected a row of numbers for each datum for a .csv file, got {', '.join(wide)} with more "
            "dimensions. Write an .npz file (--out predictions.npz)."
        )


def _columns(name: str, shape: Sequence[int], classes: Sequence[str]) -> list[str]:
    """Names of the columns of an array in a table."""
    if len(shape) == 1 or shape[1] == 1:
        return [name]
    of = classes if name == "probabilities" and len(classes) == shape[1] else range(shape[1])
    return [f"{'probability' if name == 'probabilities' else name}_{one}" for one in of]
