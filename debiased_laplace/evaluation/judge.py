"""The comparison of named predictors on test, shifted and foreign data, in one pass per loader.

:func:`evaluate` knows nothing of networks or posteriors: a predictor is anything callable (see ``predictors``). Its
result is a dictionary that JSON can hold and that everything else is made of: tables, sentences, figures, the page.
"""

from __future__ import annotations

import base64
import io
import json
import time
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
from debiased_laplace.evaluation import bootstrap, metrics, records, regression
from debiased_laplace.evaluation.predictors import Predictor, as_prediction, scores_of_foreignness
from debiased_laplace.evaluation.replicates import Replicates

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
    compare_with: Sequence[str] = ("MAP", "temperature scaling"),
    highlight: str | None = None,
    images: Images | None = None,
    target_scale: float = 1.0,
    n_resamples: int = 1000,
    seed: int = 0,
    folder: Path | str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Score named predictors on the same data, with bootstrap intervals and paired differences.

    Args:
        predictors: Callables from the inputs of a batch to probabilities ``[N, C]``, a pair (mean, variance), or a
            :class:`~debiased_laplace.evaluation.predictors.Prediction`.
        test: Batches ``(inputs, targets)`` of the data that the predictors were made for.
        shifted: For each shift a loader, or a dictionary from severity (1 to 5) to loader.
        out_of_distribution: For each kind of foreign data a loader; foreign is positive.
        compare_with: Predictors that every other is compared with, datum by datum; names that are not there are
            left out.
        highlight: The predictor whose most uncertain inputs are kept; the last one by default.
        images: From inputs to images ``[N, channels, H, W]`` in [0, 1], to keep the most uncertain ones as pictures.
        target_scale: Of a regression: standard deviation by which targets were divided, so that scores are in the
            original units.
        n_resamples: Bootstrap resamples of the data.
        seed: Of the resamples.
        folder: Where predictions are kept when a loader is finished, so that an interrupted run goes on there.
        progress: Called with the title of each condition before it is read.

    Returns:
        ``predictors`` (seconds of each), ``test``, ``shifts`` and ``ood``: see docs/evaluation.md for the schema. A
        score is a list ``[value, standard error, lower, upper]`` with the 95 % interval of the bootstrap.

    Raises:
        TypeError: If a loader's batches, or what a predictor returns, are of no known kind.
        ValueError: If targets are no class indices, probabilities are logits or do not sum to one, or something is
            not finite; found on the first batch of every loader before any of them is read.

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
    highlight = highlight or names[-1]
    if highlight not in predictors:
        raise ValueError(f"Expected highlight to be one of the predictors {names}, got {highlight!r}.")
    if n_resamples < 2:
        raise ValueError(f"Expected at least two resamples, got n_resamples={n_resamples}.")
    read = preflight(predictors, conditions(test, shifted, out_of_distribution), images)
    against = [name for name in compare_with if name in predictors]
    seconds = dict.fromkeys(names, 0.0)
    result: dict[str, Any] = {"shifts": [], "ood": []}
    inside: dict[str, dict[str, Array]] = {}
    for condition in read:
        progress(condition.title)
        kept = None if folder is None else Path(folder) / f"{condition.kind}-{_slug(condition.title)}.npz"
        found = _load(kept, names) if kept is not None else None
        if found is None:
            found = _predict(predictors, condition, highlight, images)
            if kept is not None:
                _save(kept, found)
        for name in names:
            seconds[name] += float(found["seconds"][name])
        arrays, targets = found["arrays"], found["targets"]
        if condition.kind == "ood":
            entry = _detection(inside, arrays, against, n_resamples, seed)
        else:
            whole = condition.kind == "test"
            entry = _scores(arrays, targets, against, n_resamples, seed, target_scale, risk=whole)
        entry = {"name": condition.name, "severity": condition.severity, "n": found["n"]} | entry
        if found["shown"]:
            entry["most_uncertain"] = {"predictor": highlight, "inputs": found["shown"]}
        if condition.kind == "test":
            inside, result["test"] = arrays, entry
        else:
            result["shifts" if condition.kind == "shift" else "ood"].append(entry)
    result["predictors"] = {name: {"seconds": {"predict": seconds[name]}} for name in names}
    result["regression"] = "mean" in inside[names[0]]
    result["n_resamples"] = n_resamples
    return result


# -- before the long part --------------------------------------------------------------------------


def preflight(
    predictors: Mapping[str, Predictor], found: Sequence[Condition], images: Images | None = None
) -> list[Condition]:
    """Let every predictor see two data of every loader, so that what cannot work fails now.

    Returns:
        The conditions with loaders that still yield everything, also if they can be read only once.
    """
    read = []
    kinds: dict[str, str] = {}
    for condition in found:
        what = f"the {condition.kind} data {condition.title!r}"
        first, loader = _peek(condition.loader, what)
        inputs, targets = _pair(first, what)
        few = _data.take(inputs, slice(0, 2))
        for name, predictor in predictors.items():
            try:
                value = predictor(few)
            except Exception as error:
                shapes = [tuple(leaf.shape) for leaf in _data.tensors(inputs)]
                raise ValueError(
                    f"Predictor {name!r} failed on the first batch of {what}, whose inputs have shape "
                    f"{shapes[0] if len(shapes) == 1 else shapes}: {type(error).__name__}: {error}. Check that the "
                    "loader yields what the model takes."
                ) from error
            prediction = as_prediction(value, _data.count(few), name)
            kinds[name] = "classification" if prediction.probabilities is not None else "regression"
            if condition.kind != "ood":
                _check_targets(prediction.arrays(), targets, what)
        if images is not None and condition.kind != "shift" and "regression" not in kinds.values():
            _check_images(images, few, what)
        if len(set(kinds.values())) > 1:
            raise ValueError(f"Expected predictors of one kind, got {kinds}.")
        if condition.kind == "ood" and "regression" in kinds.values():
            raise ValueError("Expected a classifier for out-of-distribution data: their scores are of probabilities.")
        read.append(Condition(condition.kind, condition.name, condition.severity, loader))
    return read


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
    try:
        first = next(iterator)
    except StopIteration:
        raise ValueError(f"Expected data, got an empty loader for {what}. A generator can be read only once.") from None
    return first, chain([first], iterator) if iterator is loader else loader


def _pair(batch: Any, what: str) -> tuple[Any, Tensor]:
    ((inputs, targets),) = _data.pairs([batch])
    n = _data.count(inputs)
    targets = torch.as_tensor(targets)
    if not n or targets.ndim == 0 or len(targets) != n:
        raise ValueError(
            f"Expected one target for each input of a batch of {what}, got {n} inputs and targets of shape "
            f"{tuple(targets.shape)}."
        )
    return inputs, targets


def _check_targets(arrays: Mapping[str, Array], targets: Tensor, what: str) -> None:
    if "probabilities" not in arrays:
        mean = arrays["mean"]
        if not bool(targets.isfinite().all()):
            raise ValueError(f"Expected finite targets in {what}, got NaN or infinity. Look for missing values.")
        if targets.shape[1:].numel() != mean[0].size:
            raise ValueError(
                f"Expected targets with {mean[0].size} number(s) for each datum of {what}, got shape "
                f"{tuple(targets.shape)}."
            )
        return
    n_classes = arrays["probabilities"].shape[1]
    if targets.ndim != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
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


# -- one pass --------------------------------------------------------------------------------------


def _predict(
    predictors: Mapping[str, Predictor], condition: Condition, highlight: str, images: Images | None
) -> dict[str, Any]:
    what = f"the {condition.kind} data {condition.title!r}"
    parts: dict[str, list[dict[str, Array]]] = {name: [] for name in predictors}
    seconds, labels, shown, n = dict.fromkeys(predictors, 0.0), [], [], 0
    for batch in condition.loader:
        inputs, targets = _pair(batch, what)
        size = _data.count(inputs)
        for name, predictor in predictors.items():
            start = time.perf_counter()
            value = predictor(inputs)
            seconds[name] += time.perf_counter() - start
            parts[name].append(as_prediction(value, size, name).arrays())
        if condition.kind != "ood":
            _check_targets(parts[highlight][-1], targets, what)
            labels.append(targets.cpu().numpy())
        if images is not None and condition.kind != "shift":
            shown += _uncertain(parts[highlight][-1], inputs, targets, images, n)
            shown = sorted(shown, key=lambda one: -one["score"])[:N_SHOWN]
        n += size
    arrays = {name: {key: np.concatenate([part[key] for part in own]) for key in own[0]} for name, own in parts.items()}
    known = np.concatenate(labels) if labels else np.zeros(0, dtype=np.int64)
    return {"arrays": arrays, "targets": known, "seconds": seconds, "shown": shown, "n": n}


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
    plain = "".join(character if character.isalnum() else "-" for character in title)
    return f"{plain}-{records.digest({'title': title})}"


def _save(path: Path, found: Mapping[str, Any]) -> None:
    arrays = {f"{name}\n{key}": value for name, own in found["arrays"].items() for key, value in own.items()}
    rest = json.dumps({key: found[key] for key in ("seconds", "shown", "n")})
    file = io.BytesIO()
    np.savez(file, **arrays, **{"": found["targets"], "\n": np.array(rest)})
    records.write_atomically(path, file.getvalue())


def _load(path: Path, names: Sequence[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    with np.load(path) as file:
        arrays: dict[str, dict[str, Array]] = {name: {} for name in names}
        for key in file.files:
            name, separator, field = key.partition("\n")
            if separator and name:
                if name not in arrays:
                    return None
                arrays[name][field] = file[key]
        if not all(arrays.values()):
            return None
        return {"arrays": arrays, "targets": file[""]} | json.loads(str(file["\n"]))


# -- scores ----------------------------------------------------------------------------------------


def cell(found: Replicates) -> list[float]:
    """Value, standard error, and 95 % interval."""
    return [float(value) for value in (found.value, found.standard_error, *found.interval())]


def _scores(
    arrays: Mapping[str, dict[str, Array]], targets: Array, against: Sequence[str], n_resamples: int, seed: int,
    target_scale: float, *, risk: bool,
) -> dict[str, Any]:  # fmt: skip
    """Scores, differences and curves of one condition; that of the risk is drawn for the test data alone."""
    weights = bootstrap.resample_weights(len(targets), n_resamples, seed)
    entry: dict[str, Any] = {"targets": records.digest({"targets": targets.ravel().tolist()})}
    found, entry["curves"] = {}, {}
    others = _mean([own["probabilities"] for own in arrays.values() if "probabilities" in own])
    for name, own in arrays.items():
        if "probabilities" in own:
            found[name] = bootstrap.classification_replicates(own["probabilities"], targets, weights, others)
            entry["curves"][name] = _classification_curves(own["probabilities"], targets, risk)
        else:
            # In the original units: a scale of the targets scales means and standard deviations.
            mean, variance = own["mean"] * target_scale, own["variance"] * target_scale**2
            labels = targets.reshape(mean.shape) * target_scale
            found[name] = bootstrap.regression_replicates(mean, variance, labels, weights)
            expected, observed = regression.calibration_curve(mean, variance, labels)
            entry["curves"][name] = {"expected": _rounded(expected), "observed": _rounded(observed)}
    infinite = [name for name, own in found.items() if not np.isfinite(own["nll"].value)]
    if infinite:
        raise ValueError(
            f"Expected finite scores, got an infinite negative log-likelihood of {infinite}: some target has "
            "probability zero. Look for outputs that are huge, or probabilities that were rounded."
        )
    entry["scores"] = {name: {key: cell(value) for key, value in own.items()} for name, own in found.items()}
    entry["differences"] = _differences(found, against, _twins(arrays))
    return entry


def _mean(arrays: Sequence[Array]) -> Array | None:
    """Of arrays of one shape; nothing of none."""
    return sum(arrays[1:], arrays[0]) / len(arrays) if arrays else None


def _twins(*conditions: Mapping[str, Mapping[str, Array]]) -> Callable[[str, str], bool]:
    """Whether two predictors predict the same of all data: they do not differ, however few the data are."""

    def same(first: str, second: str) -> bool:
        return all(
            arrays[first].keys() == arrays[second].keys()
            and all(np.array_equal(own, arrays[second][key]) for key, own in arrays[first].items())
            for arrays in conditions
            if first in arrays and second in arrays
        )

    return same


def _differences(
    found: Mapping[str, Mapping[str, Any]], against: Sequence[str], same: Callable[[str, str], bool]
) -> dict[str, dict[str, Any]]:
    """For each predictor to compare with, all others minus it."""
    return {
        second: {
            first: {
                key: [0.0] * 4 if same(first, second) else cell(own[key] - found[second][key])
                for key in own
                if key in found[second]
            }
            for first, own in found.items()
            if first != second
        }
        for second in against
    }


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
    inside: Mapping[str, dict[str, Array]], outside: Mapping[str, dict[str, Array]], against: Sequence[str],
    n_resamples: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """How well every score of every predictor tells foreign data from the test data."""
    found: dict[str, dict[str, Any]] = {}
    histograms: dict[str, Any] = {}
    sizes = [len(next(iter(next(iter(own.values())).values()))) for own in (inside, outside)]
    weights = [bootstrap.resample_weights(n, n_resamples, seed + index) for index, n in enumerate(sizes)]
    for name in inside:
        known, foreign = scores_of_foreignness(inside[name]), scores_of_foreignness(outside[name])
        found[name], histograms[name] = {}, {}
        for score in known:
            replicates = bootstrap.detection_replicates(known[score], foreign[score], *weights)
            found[name] |= {f"{score}, {key}": value for key, value in replicates.items()}
            histograms[name][score] = _histogram(known[score], foreign[score])
    return {
        "scores": {name: {key: cell(value) for key, value in own.items()} for name, own in found.items()},
        "differences": _differences(found, against, _twins(inside, outside)),
        "histograms": histograms,
    }


def _histogram(known: Array, foreign: Array) -> dict[str, list[float]]:
    edges = np.histogram_bin_edges(np.concatenate([known, foreign]), N_HISTOGRAM)
    return {
        "edges": _rounded(edges),
        "known": np.histogram(known, edges)[0].tolist(),
        "foreign": np.histogram(foreign, edges)[0].tolist(),
    }


def _rounded(values: Iterable[float]) -> list[float]:
    """Six digits: for figures, never for scores."""
    return [float(f"{float(value):.6g}") for value in values]
