"""The comparison of named predictors on test, shifted and foreign data, in one pass per loader.

:func:`evaluate` knows nothing of networks or posteriors: a predictor is anything callable (see ``predictors``). Its
result is a dictionary that JSON can hold and that everything else is made of: tables, sentences, figures, the page.
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.evaluation import bootstrap, calibrated, metrics, records, regression
from debiased_laplace.evaluation.names import check_name, slug
from debiased_laplace.evaluation.predictors import Prediction, Predictor, as_prediction, scores_of_foreignness
from debiased_laplace.evaluation.provenance import data_digest
from debiased_laplace.evaluation.replicates import Replicates
from debiased_laplace.evaluation.summary import combine, is_strong

Array = NDArray[Any]
Loader = Iterable[Any]
#: Inputs that are shown as the most uncertain ones.
N_SHOWN = 8
#: Bins of the histograms of out-of-distribution scores.
N_HISTOGRAM = 24
Images = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Condition:
    """Data that predictions are scored on.

    Attributes:
        kind: ``"test"``, ``"shift"`` or ``"ood"``.
        name: Of the shift or of the kind of foreign data; ``"test"`` for the unshifted data.
        severity: 1 to 5, or ``None`` where a shift has no degrees.
        loader: Batches; read once.
    """

    kind: str
    name: str
    severity: int | None
    loader: Loader

    @property
    def title(self) -> str:
        """As it appears in tables."""
        return self.name if self.severity is None else f"{self.name} {self.severity}"

    @property
    def described(self) -> str:
        """As it appears in errors."""
        return f"the {self.kind} data {self.title!r}"


class ConditionError(ValueError):
    """Data that nothing can be judged on; ``kind`` is that of their :class:`Condition`."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def conditions(
    test: Loader, shifted: Mapping[str, Any] | None = None, out_of_distribution: Mapping[str, Loader] | None = None
) -> list[Condition]:
    """All data of an evaluation, in the order in which they are read.

    Args:
        test: Batches of the unshifted data.
        shifted: A loader for each shift, or a dictionary from severity to loader.
        out_of_distribution: A loader for each kind of foreign data; their targets are not looked at.
    """
    found = [Condition("test", "test", None, test)]
    for name in [*(shifted or {}), *(out_of_distribution or {})]:
        check_name(name, "shifted or foreign data")
    for name, loaders in (shifted or {}).items():
        by_severity = loaders if isinstance(loaders, Mapping) else {None: loaders}
        wrong = [s for s in by_severity if s is not None and (isinstance(s, bool) or not isinstance(s, int))]
        if wrong:
            raise ValueError(f"Expected severities of the shift {name!r} that are whole numbers (1 to 5), got {wrong}.")
        found += [Condition("shift", name, severity, loader) for severity, loader in by_severity.items()]
    found += [Condition("ood", name, None, loader) for name, loader in (out_of_distribution or {}).items()]
    titles = [(c.kind, c.title) for c in found]
    if len(set(titles)) != len(titles):
        raise ValueError(f"Expected different names for all data, got {[title for _, title in titles]}.")
    return found


def evaluate(
    predictors: Mapping[str, Predictor],
    test: Loader,
    shifted: Mapping[str, Any] | None = None,
    out_of_distribution: Mapping[str, Loader] | None = None,
    *,
    compare_with: Sequence[str] | Mapping[str, Sequence[str]] = ("MAP", "temperature scaling"),
    groups: Mapping[str, Sequence[str]] | None = None,
    highlight: str | None = None,
    images: Images | None = None,
    target_scale: float = 1.0,
    n_resamples: int = 1000,
    seed: int = 0,
    folder: Path | str | None = None,
    strict: bool = True,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Score named predictors on the same data, with bootstrap intervals and paired differences.

    A predictor that fails after the first data of a loader does not stop the others: where it failed its scores are not
    defined (NaN), or if that was on the test data it is left out, and ``failures`` has the reason. An infinite score
    stays infinite; differences and intervals follow from it (infinite minus infinite is not defined).

    Args:
        predictors: Callables from the inputs of a batch to probabilities ``[N, C]``, a pair (mean, variance), or a
            :class:`~debiased_laplace.evaluation.predictors.Prediction`.
        test: Batches ``(inputs, targets)`` of the data that the predictors were made for.
        shifted: For each shift a loader, or a dictionary from severity (1 to 5) to loader.
        out_of_distribution: For each kind of foreign data a loader; foreign is positive.
        compare_with: Predictors that every other is compared with, datum by datum; names that are not there are
            left out. A mapping names the others for each.
        groups: Names of methods with the predictors that are draws of each: the method has the mean of their scores,
            and of their differences draw by draw, with an interval that knows data and draws. By default each
            predictor is a method.
        highlight: The predictor whose most uncertain inputs are kept; the last one by default.
        images: From inputs to images ``[N, channels, H, W]`` in [0, 1], to keep the most uncertain ones as pictures.
        target_scale: Of a regression: standard deviation by which targets were divided, so that scores are in the
            original units.
        n_resamples: Bootstrap resamples of the data.
        seed: Of the resamples.
        folder: Where predictions are kept when a loader is finished, so that an interrupted run goes on there. They are
            used again only where the first batch and what the predictors say about it are the same.
        strict: Whether a predictor that fails on the first two data of a loader is an error, before anything is
            computed, or is treated as one that fails later.
        progress: Called with the title of each condition before it is read.

    Returns:
        ``predictors`` (seconds of each), ``failures`` (reasons of those that failed), ``test``, ``shifts``, ``ood`` and
        ``strong_shift`` (all strong shifts as one): see docs/evaluation.md for the schema. A score is a list ``[value,
        standard error, lower, upper]`` with the 95 % interval of the bootstrap.

    Raises:
        TypeError: If a loader's batches, or what a predictor returns, are of no known kind.
        ValueError: If targets are no class indices, probabilities are logits or do not sum to one, or something is
            not finite; found on the first batch of every loader before any of them is read. Later, if a batch is
            wrong, or all predictors fail on it (:class:`ConditionError`).

    Example:
        >>> import torch
        >>> inputs, targets = torch.randn(40, 3), torch.randint(3, (40,))
        >>> result = evaluate({"softmax": lambda x: x.softmax(1)}, [(inputs, targets)], n_resamples=50)
        >>> value, error, low, high = result["test"]["scores"]["softmax"]["accuracy"]
        >>> low <= value <= high
        True
    """
    if not predictors:
        raise ValueError("Expected at least one predictor, got none.")
    names = list(predictors)
    groups = {name: [name] for name in names} if groups is None else dict(groups)
    wrong = [name for own in groups.values() for name in own if name not in predictors]
    if wrong or not groups:
        raise ValueError(f"Expected groups of the predictors {names}, got {wrong or 'none'}.")
    if not isinstance(compare_with, Mapping):
        compare_with = {second: list(groups) for second in compare_with}
    highlight = highlight or names[-1]
    if highlight not in predictors:
        raise ValueError(f"Expected highlight to be one of the predictors {names}, got {highlight!r}.")
    if n_resamples < 2:
        raise ValueError(f"Expected at least two resamples, got n_resamples={n_resamples}.")
    read = preflight(predictors, conditions(test, shifted, out_of_distribution), images, strict=strict)
    seconds = dict.fromkeys(names, 0.0)
    result: dict[str, Any] = {"shifts": [], "ood": []}
    inside: dict[str, dict[str, Array]] = {}
    failures: dict[str, list[str]] = {}
    seeds: dict[str, int] = {}
    strong: list[_Shift] = []
    for condition in read:
        progress(condition.title)
        kept = None if folder is None else Path(folder) / f"{condition.kind}-{_slug(condition.title)}.npz"
        live = {name: predictors[name] for name in (inside or names)}
        shown_by = highlight if highlight in live else list(live)[-1]
        condition, found = _kept(kept, live, condition) if kept is not None else (condition, None)
        if found is None:
            try:
                found = _predict(live, condition, shown_by, images)
            except (TypeError, ValueError) as error:
                raise ConditionError(str(error), condition.kind) from error
            if kept is not None:
                _save(kept, found)
        for name in live:
            seconds[name] += float(found["seconds"][name])
            if name in found["failed"]:
                failures.setdefault(name, []).append(f"{condition.described}, {found['failed'][name]}")
        arrays, targets = found["arrays"], found["targets"]
        if condition.kind == "test":
            groups = {name: own for name, own in groups.items() if all(one in arrays for one in own)}
            if not groups:
                raise ConditionError(f"No method could predict {condition.described} in all of its draws.", "test")
            inside = {name: arrays[name] for own in groups.values() for name in own}
        among = Groups(groups, compare_with)
        arrays = {name: own for name, own in arrays.items() if name in inside}
        if condition.kind == "ood":
            entry = _detection(inside, arrays, among, n_resamples, seed)
        else:
            labels = records.digest({"targets": targets.ravel().tolist()})
            # Copies of the same data are resampled together, other data on their own.
            own_seed = seeds.setdefault(labels, seed + len(seeds))
            entry, losses = _scores(
                arrays, targets, among, n_resamples, own_seed, target_scale, list(inside),
                risk=condition.kind == "test",
            )  # fmt: skip
            entry["targets"] = labels
            if condition.kind == "shift" and is_strong({"severity": condition.severity}):
                strong.append(_Shift(condition.title, labels, losses))
        entry = {"name": condition.name, "severity": condition.severity, "n": found["n"]} | entry
        if found["shown"]:
            entry["most_uncertain"] = {"predictor": shown_by, "inputs": found["shown"]}
        if condition.kind == "test":
            result["test"] = entry
        else:
            result["shifts" if condition.kind == "shift" else "ood"].append(entry)
    result["strong_shift"] = _together(strong, Groups(groups, compare_with), n_resamples) if strong else None
    result["predictors"] = {name: {"seconds": {"predict": seconds[name]}} for name in names}
    result["failures"] = failures
    result["regression"] = "mean" in next(iter(inside.values()))
    result["n_resamples"] = n_resamples
    return result


# -- before the long part --------------------------------------------------------------------------


def preflight(
    predictors: Mapping[str, Predictor], found: Sequence[Condition], images: Images | None = None, *,
    strict: bool = True,
) -> list[Condition]:  # fmt: skip
    """Let every predictor see two data of every loader, so that what cannot work fails now.

    Args:
        predictors: As :func:`evaluate` takes them.
        found: Data.
        images: As :func:`evaluate` takes it.
        strict: Whether one predictor that fails is an error; if not, all have to fail.

    Returns:
        The conditions with loaders that still yield everything, also if they can be read only once.
    """
    read = []
    kinds: dict[str, str] = {}
    for condition in found:
        what = condition.described
        first, loader = _peek(condition.loader, what)
        inputs, targets = _pair(first, what)
        few = _data.take(inputs, slice(0, 2))
        errors: list[Exception] = []
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
                _checked_targets(prediction.arrays(), targets, what)
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


def _peek(loader: Loader, what: str) -> tuple[Any, Loader]:
    if not isinstance(loader, Iterable):
        raise TypeError(f"Expected an iterable of batches for {what}, got {type(loader).__name__}.")
    iterator = iter(loader)
    for first in iterator:
        if _data.count(_pair(first, what)[0]):
            return first, chain([first], iterator) if iterator is loader else loader
    raise ValueError(f"Expected data, got an empty loader for {what}. A generator can be read only once.")


def _pair(batch: Any, what: str) -> tuple[Any, Tensor]:
    try:
        return _data.only(batch)[:2]
    except ValueError as error:
        raise ValueError(f"{error} It is a batch of {what}.") from error


def _checked_targets(arrays: Mapping[str, Array], targets: Tensor, what: str) -> Tensor:
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


# -- one pass --------------------------------------------------------------------------------------


def _predict(
    predictors: Mapping[str, Predictor], condition: Condition, highlight: str, images: Images | None
) -> dict[str, Any]:
    what = condition.described
    parts: dict[str, list[dict[str, Array]]] = {name: [] for name in predictors}
    failed: dict[str, str] = {}
    seconds, labels, shown, n, first = dict.fromkeys(predictors, 0.0), [], [], 0, ""
    for number, batch in enumerate(condition.loader, 1):
        inputs, targets = _pair(batch, f"{what}, batch {number}")
        if not _data.count(inputs):
            continue
        first = first or data_digest([(inputs, targets)])
        size = _data.count(inputs)
        for name, predictor in predictors.items():
            if name in failed:
                continue
            start = time.perf_counter()
            try:
                parts[name].append(as_prediction(predictor(inputs), size, name).arrays())
            except Exception as error:
                failed[name] = f"batch {number}: {reason(error)}"
            seconds[name] += time.perf_counter() - start
        if len(failed) == len(predictors):
            raise ValueError(f"Nothing can be predicted on {what}; {'; '.join(f'{k}: {v}' for k, v in failed.items())}")
        if condition.kind != "ood":
            predicted = next(parts[k][-1] for k in parts if k not in failed)
            targets = _checked_targets(predicted, targets, f"{what}, batch {number}")
            labels.append(targets.cpu().numpy())
        if images is not None and condition.kind != "shift" and highlight not in failed:
            shown += _uncertain(parts[highlight][-1], inputs, targets, images, n)
            shown = sorted(shown, key=lambda one: -one["score"])[:N_SHOWN]
        n += size
    arrays = {
        name: {key: np.concatenate([part[key] for part in own]) for key in own[0]}
        for name, own in parts.items()
        if name not in failed
    }
    known = np.concatenate(labels) if labels else np.zeros(0, dtype=np.int64)
    return {
        "arrays": arrays, "targets": known, "seconds": seconds, "shown": [] if highlight in failed else shown, "n": n,
        "failed": failed, "first": first,
    }  # fmt: skip


def reason(error: Exception) -> str:
    """Why something failed, in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _uncertain(
    arrays: Mapping[str, Array], inputs: Any, targets: Tensor, images: Images, offset: int
) -> list[dict[str, Any]]:
    """The most uncertain data of a batch, with their pictures."""
    if "probabilities" not in arrays:
        return []
    probabilities = arrays["probabilities"]
    scores = metrics.foreignness(probabilities)
    chosen = np.argsort(-scores)[:N_SHOWN]
    pictures = images(_data.take(inputs, torch.from_numpy(chosen.copy()))).cpu()
    return [
        {
            "index": offset + int(index), "score": float(scores[index]), "target": _label(targets[int(index)]),
            "predicted": int(probabilities[index].argmax()), "confidence": float(probabilities[index].max()),
            "image": _png(picture),
        }
        for index, picture in zip(chosen, pictures, strict=True)
    ]  # fmt: skip


def _label(target: Tensor) -> int:
    """A class; -1 for what is none, as targets of foreign data may be."""
    return -1 if target.ndim or target.is_floating_point() else int(target)


def _png(image: Tensor) -> str:
    """A picture in base64."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _slug(title: str) -> str:
    """Part of a file name; titles that look alike are told apart."""
    return slug(title, records.digest({"title": title}))


def _save(path: Path, found: Mapping[str, Any]) -> None:
    arrays = {f"{name}\n{key}": value for name, own in found["arrays"].items() for key, value in own.items()}
    rest = json.dumps({key: found[key] for key in ("seconds", "shown", "n", "failed", "first")})
    file = io.BytesIO()
    np.savez(file, **arrays, **{"": found["targets"], "\n": np.array(rest)})
    records.write_whole(path, file.getvalue())


def _kept(
    path: Path, predictors: Mapping[str, Predictor], condition: Condition
) -> tuple[Condition, dict[str, Any] | None]:
    """Predictions of an earlier run, if they are those of these predictors on these data, as far as a batch tells.

    Returns:
        The condition, whose loader still yields everything, and the predictions.
    """
    found = _load(path, list(predictors))
    if found is None:
        return condition, None
    first, loader = _peek(condition.loader, condition.described)
    condition = Condition(condition.kind, condition.name, condition.severity, loader)
    inputs, targets = _pair(first, condition.described)
    n = _data.count(inputs)
    if found["first"] != data_digest([(inputs, targets)]):
        return condition, None
    for name, own in found["arrays"].items():
        try:
            arrays = as_prediction(predictors[name](inputs), n, name).arrays()
        except Exception:
            return condition, None
        if arrays.keys() != own.keys() or not all(_close(arrays[key], own[key][:n]) for key in own):
            return condition, None
    return condition, found


def _close(first: Array, second: Array) -> bool:
    return first.shape == second.shape and np.allclose(first, second, 1e-6, 1e-9)


def _load(path: Path, names: Sequence[str]) -> dict[str, Any] | None:
    """What :func:`_save` wrote, if it is whole; its checksums are those of the format."""
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
        if not all(arrays.values()) or "first" not in rest or set(rest["seconds"]) != set(names):
            return None
        return {"arrays": arrays, "targets": file[""]} | rest


# -- scores ----------------------------------------------------------------------------------------


def cell(found: Replicates) -> list[float]:
    """Value, standard error, and 95 % interval."""
    return [float(value) for value in (found.value, found.standard_error, *found.interval())]


@dataclass(frozen=True)
class Groups:
    """Methods with the predictors that are their draws, and which of them are compared.

    Attributes:
        draws: Predictors of each method.
        against: For a method the others that are compared with it.
    """

    draws: Mapping[str, Sequence[str]]
    against: Mapping[str, Sequence[str]]

    def scores(self, found: Mapping[str, Mapping[str, Replicates]]) -> dict[str, dict[str, list[float]]]:
        """Cells of every method: means over draws."""
        return {
            name: {key: combine([cell(found[one][key]) for one in own], True) for key in found[own[0]]}
            for name, own in self.draws.items()
        }

    def values(self, found: Mapping[str, Mapping[str, Replicates]]) -> dict[str, dict[str, list[float]]]:
        """The score of every draw, of methods that have several."""
        return {
            name: {key: [float(found[one][key].value) for one in own] for key in found[own[0]]}
            for name, own in self.draws.items()
            if len(own) > 1
        }

    def differences(
        self, found: Mapping[str, Mapping[str, Replicates]], same: Callable[[str, str], bool]
    ) -> dict[str, dict[str, Any]]:
        """For each method to compare with, others minus it, draw by draw."""

        def of(first: str, second: str, key: str) -> list[float]:
            one, two = self.draws[first], self.draws[second]
            pairs = [(one[i % len(one)], two[i % len(two)]) for i in range(max(len(one), len(two)))]
            return combine(
                [
                    [0.0] * 4
                    if math.isfinite(found[a][key].value) and same(a, b)
                    else cell(found[a][key] - found[b][key])
                    for a, b in pairs
                ],
                True,
            )

        return {
            second: {
                first: {
                    key: of(first, second, key)
                    for key in found[self.draws[first][0]]
                    if key in found[self.draws[second][0]]
                }
                for first in firsts
                if first != second and first in self.draws
            }
            for second, firsts in self.against.items()
            if second in self.draws
        }


@dataclass(frozen=True)
class _Shift:
    """Losses under one strong shift; ``labels`` is the same for copies of the same data."""

    title: str
    labels: str
    losses: Mapping[str, Replicates]


def _together(shifts: Sequence[_Shift], groups: Groups, n_resamples: int) -> dict[str, Any]:
    """Mean NLL over shifts as one score: copies of the same data are one sample of them, drawn jointly."""
    sizes = [score.n for own in shifts for score in own.losses.values() if score.n is not None]
    found = {}
    for name in shifts[0].losses:
        own = [shift.losses[name] for shift in shifts]
        one = len({shift.labels for shift in shifts}) == 1 and all(r.contributions is not None for r in own)
        with np.errstate(invalid="ignore"):
            found[name] = {
                "nll": Replicates(
                    float(np.mean([r.value for r in own])), np.mean([r.replicates for r in own], axis=0),
                    min((r.n for r in own if r.n is not None), default=None), "mean" if one else "statistic",
                    np.mean([r.contributions for r in own if r.contributions is not None], axis=0) if one else None,
                )
            }  # fmt: skip

    def same(first: str, second: str) -> bool:
        pairs = [(shift.losses[first].contributions, shift.losses[second].contributions) for shift in shifts]
        return all(a is not None and b is not None and np.array_equal(a, b) for a, b in pairs)

    return {
        "shifts": [shift.title for shift in shifts], "n": min(sizes),
        "sets": len({shift.labels for shift in shifts}), "scores": groups.scores(found),
        "draws": groups.values(found), "differences": groups.differences(found, same),
    }  # fmt: skip


def _scores(
    arrays: Mapping[str, dict[str, Array]], targets: Array, groups: Groups, n_resamples: int, seed: int,
    target_scale: float, names: Sequence[str], *, risk: bool,
) -> tuple[dict[str, Any], dict[str, Replicates]]:  # fmt: skip
    """Scores, differences and curves of one condition, and the losses; risk is drawn for the test data alone."""
    weights = bootstrap.resample_weights(len(targets), n_resamples, seed)
    entry: dict[str, Any] = {"curves": {}, "calibrated": {}}
    found = {}
    firsts = {own[0]: name for name, own in groups.draws.items()}
    others = _mean([own["probabilities"] for own in arrays.values() if "probabilities" in own])
    for name, own in arrays.items():
        if "probabilities" in own:
            found[name] = bootstrap.classification_replicates(own["probabilities"], targets, weights, others)
        else:
            # In the original units: a scale of the targets scales means and standard deviations.
            mean, variance = own["mean"] * target_scale, own["variance"] * target_scale**2
            labels = targets.reshape(mean.shape) * target_scale
            found[name] = bootstrap.regression_replicates(mean, variance, labels, weights)
        if name not in firsts:
            continue
        if "probabilities" in own:
            entry["curves"][firsts[name]] = _classification_curves(own["probabilities"], targets, risk)
            entry["calibrated"][firsts[name]] = calibrated.expected_errors(
                own["probabilities"], min(n_resamples, calibrated.N_DRAWS), seed, classwise=risk
            )
        else:
            expected, observed = regression.calibration_curve(mean, variance, labels)
            entry["curves"][firsts[name]] = {"expected": _rounded(expected), "observed": _rounded(observed)}
    like = next(iter(found.values()))
    empty = _empty(next(iter(entry["curves"].values()))) if entry["curves"] else {}
    entry["curves"] |= {name: empty for name in groups.draws if name not in entry["curves"]}
    found = {name: found.get(name) or _undefined(like, n_resamples) for name in names}
    entry["scores"], entry["draws"] = groups.scores(found), groups.values(found)
    entry["differences"] = groups.differences(found, _twins(arrays))
    return entry, {name: own["nll"] for name, own in found.items()}


def _undefined(like: Iterable[str], n_resamples: int) -> dict[str, Replicates]:
    """Scores of a predictor that failed."""
    return {key: Replicates(float("nan"), np.full(n_resamples, np.nan)) for key in like}


def _empty(curves: Mapping[str, Any]) -> dict[str, Any]:
    """Curves of a predictor that failed: bins without data, lines without points."""
    empty: dict[str, Any] = {key: [float("nan")] * len(own) for key, own in curves.items()}
    if "reliability" in curves:
        empty["reliability"] = {part: [0] * len(own) for part, own in curves["reliability"].items()}
    return empty


def _mean(arrays: Sequence[Array]) -> Array | None:
    """Of arrays of one shape; nothing of none."""
    return sum(arrays[1:], arrays[0]) / len(arrays) if arrays else None


def _twins(*conditions: Mapping[str, Mapping[str, Array]]) -> Callable[[str, str], bool]:
    """Whether two predictors predict the same of all data: they do not differ, however few the data are."""

    def same(first: str, second: str) -> bool:
        return all(
            first in arrays
            and second in arrays
            and arrays[first].keys() == arrays[second].keys()
            and all(np.array_equal(own, arrays[second][key]) for key, own in arrays[first].items())
            for arrays in conditions
        )

    return same


def _classification_curves(probabilities: Array, targets: Array, risk: bool) -> dict[str, Any]:
    bins = metrics.reliability(probabilities, targets)
    found: dict[str, Any] = {
        "reliability": {"counts": bins.counts, "confidences": _rounded(bins.confidences), "correct": bins.correct}
    }
    if risk:
        lines = zip(("coverage", "risk"), metrics.risk_coverage(probabilities, targets), strict=True)
        found |= {name: _rounded(line) for name, line in lines}
    return found


def _detection(
    inside: Mapping[str, dict[str, Array]], outside: Mapping[str, dict[str, Array]], groups: Groups,
    n_resamples: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """How well every score of every predictor tells foreign data from the test data."""
    found: dict[str, dict[str, Any]] = {}
    histograms: dict[str, Any] = {}
    sizes = [len(next(iter(next(iter(own.values())).values()))) for own in (inside, outside)]
    weights = [bootstrap.resample_weights(n, n_resamples, seed + index) for index, n in enumerate(sizes)]
    for name in inside:
        known = scores_of_foreignness(inside[name])
        foreign = scores_of_foreignness(outside.get(name, {}))
        found[name], histograms[name] = {}, {}
        for score in known:
            if name not in outside:  # it failed there
                found[name] |= _undefined([f"{score}, {key}" for key in ("auroc", "aupr", "fpr95")], n_resamples)
                histograms[name][score] = {"edges": [0.0, 1.0], "known": [0], "foreign": [0]}
                continue
            replicates = bootstrap.detection_replicates(known[score], foreign[score], *weights)
            found[name] |= {f"{score}, {key}": value for key, value in replicates.items()}
            histograms[name][score] = _histogram(known[score], foreign[score])
    return {
        "scores": groups.scores(found),
        "draws": groups.values(found),
        "differences": groups.differences(found, _twins(inside, outside)),
        "histograms": {name: histograms[own[0]] for name, own in groups.draws.items()},
    }


def _histogram(known: Array, foreign: Array) -> dict[str, list[float]]:
    low, high = (float(bound(np.concatenate([known, foreign]))) for bound in (np.min, np.max))
    room = 1e-9 * max(abs(low), abs(high))  # narrower bins could not be told apart: all values in the middle
    low, high = (low, high) if high - low > room else (low - (room or 0.5), high + (room or 0.5))
    edges = np.linspace(low, high, N_HISTOGRAM + 1)
    return {
        "edges": edges.tolist(),
        "known": np.histogram(known, edges)[0].tolist(),
        "foreign": np.histogram(foreign, edges)[0].tolist(),
    }


def _rounded(values: Iterable[float]) -> list[float]:
    """Six digits: for figures, never for scores."""
    return [float(f"{float(value):.6g}") for value in values]
