"""Two data of every loader go through every predictor first, so that what cannot work fails before the long part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace._arrays import Array
from debiased_laplace.evaluation.judge.conditions import Condition, Loader
from debiased_laplace.evaluation.predictors.prediction import Prediction, Predictor, as_prediction

Images = Callable[[Any], Tensor]

NO_DATA = "Expected data, got an empty loader for {}. A generator can be read only once."


def preflight(
    predictors: Mapping[str, Predictor], conditions: Sequence[Condition], images: Images | None = None, *,
    strict: bool = True, shards: bool = False,
) -> list[Condition]:  # fmt: skip
    """Let every predictor see two data of every loader, so that what cannot work fails now.

    Args:
        predictors: As :func:`evaluate` takes them.
        conditions: Data.
        images: As :func:`evaluate` takes it.
        strict: Whether one predictor that fails is an error; if not, all have to fail, and of loaders whose inputs look
            like those of one before it is enough that one works.
        shards: Whether other processes may have data where this one has none.

    Returns:
        The conditions with loaders that still yield everything, also if they can be read only once.
    """
    read = []
    kinds: dict[str, str] = {}
    looks: set[Any] = set()
    for condition in conditions:
        what = condition.described
        first, loader = peek(condition.loader, what)
        if first is None and shards:
            read.append(condition)
            continue
        if first is None:
            raise ValueError(NO_DATA.format(what))
        inputs, targets = inputs_and_targets(first, what)
        few = _data.take(inputs, slice(0, 2))
        errors: list[Exception] = []
        look = tuple((leaf.shape[1:], leaf.dtype) for leaf in _data.tensors(few))
        for name, predictor in predictors.items():
            try:
                prediction = _first_prediction(predictor, name, few, inputs, what)
            except (TypeError, ValueError) as error:
                if strict or len(errors) + 1 == len(predictors):
                    raise
                errors.append(error)
                continue
            kinds[name] = "classification" if prediction.probabilities is not None else "regression"
            if condition.kind != "ood":
                checked_targets(prediction.arrays(), targets, what)
            if not strict and look in looks:
                break
        looks.add(look)
        if images is not None and condition.kind != "shift" and "regression" not in kinds.values():
            _check_images(images, few, what)
        if len(set(kinds.values())) > 1:
            raise ValueError(f"Expected predictors of one kind, got {kinds}.")
        if condition.kind == "ood" and "regression" in kinds.values():
            raise ValueError("Expected a classifier for out-of-distribution data: their scores are of probabilities.")
        read.append(Condition(condition.kind, condition.name, condition.severity, loader))
    return read


def _first_prediction(predictor: Predictor, name: str, few: Any, inputs: Any, what: str) -> Prediction:
    try:
        value = predictor(few)
    except Exception as error:
        shapes = [tuple(leaf.shape) for leaf in _data.tensors(inputs)]
        raise ValueError(
            f"Predictor {name!r} failed on the first batch of {what}, whose inputs have shape "
            f"{shapes[0] if len(shapes) == 1 else shapes}: {type(error).__name__}: {error}. Check that the "
            "loader yields what the model takes."
        ) from error
    return as_prediction(value, _data.count(few), name)


def _check_images(images: Images, few: Any, what: str) -> None:
    """Raise a ``ValueError`` unless two data of a loader become pictures."""
    try:
        pictures = images(few)
    except Exception as error:
        raise ValueError(f"images failed on the first batch of {what}: {type(error).__name__}: {error}") from error
    shape = tuple(getattr(pictures, "shape", ()))
    if len(shape) != 4 or shape[0] != _data.count(few) or shape[1] not in (1, 3, 4):
        raise ValueError(
            f"Expected images [N, channels, H, W] with 1 or 3 channels from images() of {what}, got "
            f"{shape or type(pictures).__name__}."
        )


def peek(loader: Loader, what: str) -> tuple[Any, Loader]:
    """The first batch with data, None if there is none, and a loader that still yields everything."""
    if not isinstance(loader, Iterable):
        raise TypeError(f"Expected an iterable of batches for {what}, got {type(loader).__name__}.")
    iterator = iter(loader)
    for first in iterator:
        if _data.count(inputs_and_targets(first, what)[0]):
            return first, chain([first], iterator) if iterator is loader else loader
    return None, loader


def inputs_and_targets(batch: Any, what: str) -> tuple[Any, Tensor]:
    """The two parts of a batch; ``what`` is what errors say that it is of."""
    try:
        return _data.only(batch)[:2]
    except ValueError as error:
        raise ValueError(f"{error} It is a batch of {what}.") from error


def checked_targets(arrays: Mapping[str, Array], targets: Tensor, what: str) -> Tensor:
    """Targets as scores take them: class indices ``[N]``, or numbers as they came."""
    if "probabilities" not in arrays:
        mean = arrays["mean"]
        if not bool(targets.isfinite().all()):
            raise ValueError(f"Expected finite targets in {what}, got NaN or infinity. Look for missing values.")
        if targets.shape[1:].numel() != mean[0].size:
            raise ValueError(
                f"Expected targets with {mean[0].size} number(s) for each datum of {what}, got shape "
                f"{tuple(targets.shape)}."
            )
        return targets.reshape(len(targets), *mean.shape[1:])
    n_classes = arrays["probabilities"].shape[1]
    if targets.numel() != len(targets) or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(
            f"Expected class indices [N] of an integer dtype as targets of {what}, got {targets.dtype} of shape "
            f"{tuple(targets.shape)}. Use argmax over a one-hot encoding."
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= n_classes:
        raise ValueError(
            f"Expected class indices from 0 to {n_classes - 1} in {what}, as the predictors have {n_classes} classes, "
            f"got {low} to {high}. Number the classes from zero."
        )
    return targets.reshape(-1)
