"""Predictions on disk: an interrupted run goes on with those of the loaders that were finished."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from debiased_laplace import _data
from debiased_laplace._arrays import Array
from debiased_laplace.evaluation import records
from debiased_laplace.evaluation.judge.conditions import Condition
from debiased_laplace.evaluation.judge.preflight import inputs_and_targets, peek
from debiased_laplace.evaluation.names import slug
from debiased_laplace.evaluation.predictors.prediction import Predictor, as_prediction
from debiased_laplace.evaluation.provenance import data_digest


def file_name(title: str) -> str:
    """Part of a file name; titles that look alike are told apart."""
    return slug(title, records.digest({"title": title}))


def write(path: Path, predicted: Mapping[str, Any]) -> None:
    """Keep what :func:`~debiased_laplace.evaluation.judge.predictions.predict` returned."""
    arrays = {f"{name}\n{key}": value for name, fields in predicted["arrays"].items() for key, value in fields.items()}
    rest = json.dumps({key: predicted[key] for key in ("seconds", "shown", "n", "failed", "first", "rows")})
    file = io.BytesIO()
    np.savez(file, **arrays, **{"": predicted["targets"], "\n": np.array(rest)})
    records.write_whole(path, file.getvalue())


def still_valid(
    path: Path, predictors: Mapping[str, Predictor], condition: Condition
) -> tuple[Condition, dict[str, Any] | None]:
    """Predictions of an earlier run, if they are those of these predictors on these data, as far as a batch tells.

    Returns:
        The condition, whose loader still yields everything, and the predictions.
    """
    stored = _load(path, list(predictors))
    if stored is None:
        return condition, None
    first, loader = peek(condition.loader, condition.described)
    if first is None:
        return condition, None
    condition = Condition(condition.kind, condition.name, condition.severity, loader)
    inputs, targets = inputs_and_targets(first, condition.described)
    n, rows = _data.count(inputs), stored["rows"]
    if stored["first"] != data_digest([(inputs, targets)]):
        return condition, None
    for name, before in stored["arrays"].items():
        try:
            arrays = as_prediction(predictors[name](inputs), n, name).arrays()
        except Exception:
            return condition, None
        if arrays.keys() != before.keys() or not all(_close(arrays[key], before[key][rows]) for key in before):
            return condition, None
    return condition, stored


def _close(first: Array, second: Array) -> bool:
    return first.shape == second.shape and np.allclose(first, second, 1e-6, 1e-9)


def _load(path: Path, names: Sequence[str]) -> dict[str, Any] | None:
    """What :func:`write` wrote, if it is whole; its checksums are those of the format."""
    try:
        return _loaded(path, names)
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, zipfile.BadZipFile, zlib.error):
        return None


def _loaded(path: Path, names: Sequence[str]) -> dict[str, Any] | None:
    with np.load(path) as file:
        rest = json.loads(str(file["\n"]))
        arrays: dict[str, dict[str, Array]] = {name: {} for name in names if name not in rest.get("failed", {})}
        for key in file.files:
            name, separator, field = key.partition("\n")
            if separator and name:
                if name not in arrays:
                    return None
                arrays[name][field] = file[key]
        if not all(arrays.values()) or not {"first", "rows"} <= rest.keys() or set(rest["seconds"]) != set(names):
            return None
        return {"arrays": arrays, "targets": file[""]} | rest
