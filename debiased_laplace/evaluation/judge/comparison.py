"""The comparison of named predictors on test, shifted and out-of-distribution data, in one pass per loader.

:func:`evaluate` knows nothing of networks or posteriors: a predictor is anything callable (see ``predictors``). Its
result is a dictionary that JSON can hold and that everything else is made of: tables, sentences, figures, the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from debiased_laplace.evaluation import records
from debiased_laplace.evaluation.judge.conditions import ConditionError, Loader, conditions, is_strong
from debiased_laplace.evaluation.judge.groups import Groups
from debiased_laplace.evaluation.judge.predictions import predict
from debiased_laplace.evaluation.judge.preflight import Images, preflight
from debiased_laplace.evaluation.judge.scored import StrongShift, condition_scores, detection_scores, strong_shift
from debiased_laplace.evaluation.judge.stored import file_name, still_valid, write
from debiased_laplace.evaluation.predictors.prediction import Predictor
from debiased_laplace.evaluation.scores.checks import Array


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
            :class:`~debiased_laplace.evaluation.predictors.prediction.Prediction`.
        test: Batches ``(inputs, targets)`` of the data that the predictors were made for.
        shifted: For each shift a loader, or a dictionary from severity (1 to 5) to loader.
        out_of_distribution: For each kind of out-of-distribution data a loader; these are the positives.
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
            not finite; noticed on the first batch of every loader before any of them is read. Later, if a batch is
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
    wrong = [name for draws in groups.values() for name in draws if name not in predictors]
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
    strong: list[StrongShift] = []
    for condition in read:
        progress(condition.title)
        kept = None if folder is None else Path(folder) / f"{condition.kind}-{file_name(condition.title)}.npz"
        live = {name: predictors[name] for name in (inside or names)}
        shown_by = highlight if highlight in live else list(live)[-1]
        condition, predicted = still_valid(kept, live, condition) if kept is not None else (condition, None)
        if predicted is None:
            try:
                predicted = predict(live, condition, shown_by, images)
            except (TypeError, ValueError) as error:
                raise ConditionError(str(error), condition.kind) from error
            if kept is not None:
                write(kept, predicted)
        for name in live:
            seconds[name] += float(predicted["seconds"][name])
            if name in predicted["failed"]:
                failures.setdefault(name, []).append(f"{condition.described}, {predicted['failed'][name]}")
        arrays, targets = predicted["arrays"], predicted["targets"]
        if condition.kind == "test":
            groups = {name: draws for name, draws in groups.items() if all(draw in arrays for draw in draws)}
            if not groups:
                raise ConditionError(f"No method could predict {condition.described} in all of its draws.", "test")
            inside = {name: arrays[name] for draws in groups.values() for name in draws}
        among = Groups(groups, compare_with)
        arrays = {name: arrays[name] for name in arrays if name in inside}
        if condition.kind == "ood":
            entry = detection_scores(inside, arrays, among, n_resamples, seed)
        else:
            labels = records.digest({"targets": targets.ravel().tolist()})
            # Copies of the same data are resampled together, other data by themselves.
            seed_of_data = seeds.setdefault(labels, seed + len(seeds))
            entry, losses = condition_scores(
                arrays, targets, among, n_resamples, seed_of_data, target_scale, list(inside),
                risk=condition.kind == "test",
            )  # fmt: skip
            entry["targets"] = labels
            if condition.kind == "shift" and is_strong({"severity": condition.severity}):
                strong.append(StrongShift(condition.title, labels, losses))
        entry = {"name": condition.name, "severity": condition.severity, "n": predicted["n"]} | entry
        if predicted["shown"]:
            entry["most_uncertain"] = {"predictor": shown_by, "inputs": predicted["shown"]}
        if condition.kind == "test":
            result["test"] = entry
        else:
            result["shifts" if condition.kind == "shift" else "ood"].append(entry)
    result["strong_shift"] = strong_shift(strong, Groups(groups, compare_with), n_resamples) if strong else None
    result["predictors"] = {name: {"seconds": {"predict": seconds[name]}} for name in names}
    result["failures"] = failures
    result["regression"] = "mean" in next(iter(inside.values()))
    result["n_resamples"] = n_resamples
    return result
