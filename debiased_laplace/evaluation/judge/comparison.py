"""The comparison of named predictors on test, shifted and out-of-distribution data, in one pass per loader.

:func:`evaluate` knows nothing of networks or posteriors: a predictor is anything callable (see ``predictors``). Its
result is a dictionary that JSON can hold and that everything else is made of: tables, sentences, figures, the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from debiased_laplace import _ranks
from debiased_laplace._arrays import Array
from debiased_laplace.evaluation import records
from debiased_laplace.evaluation.judge.conditions import Condition, ConditionError, Loader, conditions, is_strong
from debiased_laplace.evaluation.judge.groups import Groups
from debiased_laplace.evaluation.judge.predictions import predict
from debiased_laplace.evaluation.judge.preflight import Images, preflight
from debiased_laplace.evaluation.judge.scored import StrongShift, condition_scores, detection_scores, strong_shift
from debiased_laplace.evaluation.judge.sets import Sets
from debiased_laplace.evaluation.judge.stored import file_name, still_valid, write
from debiased_laplace.evaluation.predictors.prediction import Predictor


def evaluate(
    predictors: Mapping[str, Predictor],
    test: Loader,
    shifted: Mapping[str, Any] | None = None,
    out_of_distribution: Mapping[str, Loader] | None = None,
    *,
    compare_with: Sequence[str] | Mapping[str, Sequence[str]] = ("MAP", "temperature scaling"),
    groups: Mapping[str, Sequence[str]] | None = None,
    highlight: str | None = None,
    sets: Sequence[str] | None = None,
    images: Images | None = None,
    target_scale: float = 1.0,
    n_resamples: int = 1000,
    seed: int = 0,
    folder: Path | str | None = None,
    strict: bool = True,
    distributed: bool = True,
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
        sets: Methods whose prediction sets are judged; all by default.
        images: From inputs to images ``[N, channels, H, W]`` in [0, 1], to keep the most uncertain ones as pictures.
        target_scale: Of a regression: standard deviation by which targets were divided, so that scores are in the
            original units.
        n_resamples: Bootstrap resamples of the data.
        seed: Of the resamples.
        folder: Where predictions are kept when a loader is finished, so that an interrupted run goes on there. They are
            used again only where the first batch and what the predictors say about it are the same.
        strict: Whether a predictor that fails on the first two data of a loader is an error, before anything is
            computed, or is treated as one that fails later.
        distributed: Whether the processes of an initialised group of ``torch.distributed`` predict together, each a
            shard of the data (``docs/distributed.md``); otherwise every process for itself.
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
    data = conditions(test, shifted, out_of_distribution)
    judge = _Judge(names, groups, compare_with, Sets(sets, n_resamples, target_scale), target_scale, n_resamples, seed)
    live = names
    with _ranks.together("evaluate", wanted=distributed) as ranks:
        ranks.agree("evaluate", {"predictors": ", ".join(names), "data": ", ".join(one.title for one in data)})
        for condition in preflight(predictors, data, images, strict=strict, shards=ranks.size > 1):
            progress(condition.title)
            kept = None if folder is None else Path(folder) / f"{condition.kind}-{file_name(condition.title)}.npz"
            shown_by = highlight if highlight in live else live[-1]
            predicted = _predicted({name: predictors[name] for name in live}, condition, shown_by, images, kept)
            live = ranks.of_one(partial(judge.add, condition, predicted, shown_by))
        return ranks.of_one(judge.result)


def _predicted(
    predictors: Mapping[str, Predictor], condition: Condition, shown_by: str, images: Images | None, kept: Path | None
) -> dict[str, Any]:
    """What is kept of these predictions, or what is predicted now; whole in the first process alone."""
    ranks, predicted = _ranks.current(), None
    if kept is not None and not ranks.rank:
        condition, predicted = still_valid(kept, predictors, condition)
    if ranks.of_one(lambda: predicted is not None):
        return predicted or {}
    try:
        predicted = predict(predictors, condition, shown_by, images)
    except (TypeError, ValueError) as error:
        raise ConditionError(str(error), condition.kind) from error
    if kept is not None and not ranks.rank:
        write(kept, predicted)
    return predicted


class _Judge:
    """Scores of one condition after the other, as they are predicted."""

    def __init__(
        self, names: Sequence[str], groups: Mapping[str, Sequence[str]], compare_with: Mapping[str, Sequence[str]],
        sets: Sets, target_scale: float, n_resamples: int, seed: int,
    ) -> None:  # fmt: skip
        self.groups, self.compare_with = dict(groups), compare_with
        self.target_scale, self.n_resamples, self.seed = target_scale, n_resamples, seed
        self.seconds = dict.fromkeys(names, 0.0)
        self.inside: dict[str, dict[str, Array]] = {}
        self.failures: dict[str, list[str]] = {}
        self.entries: dict[str, list[dict[str, Any]]] = {"test": [], "shift": [], "ood": []}
        self._seeds: dict[str, int] = {}
        self._strong: list[StrongShift] = []
        self._sets = sets

    def add(self, condition: Condition, predicted: Mapping[str, Any], shown_by: str) -> list[str]:
        """Score what was predicted; the predictors that go on."""
        for name, seconds in predicted["seconds"].items():
            self.seconds[name] += float(seconds)
            if name in predicted["failed"]:
                self.failures.setdefault(name, []).append(f"{condition.described}, {predicted['failed'][name]}")
        arrays, targets = predicted["arrays"], predicted["targets"]
        if condition.kind == "test":
            self.groups = {name: draws for name, draws in self.groups.items() if all(draw in arrays for draw in draws)}
            if not self.groups:
                raise ConditionError(f"No method could predict {condition.described} in all of its draws.", "test")
            self.inside = {name: arrays[name] for draws in self.groups.values() for name in draws}
        among = Groups(self.groups, self.compare_with)
        arrays = {name: arrays[name] for name in arrays if name in self.inside}
        if condition.kind == "ood":
            entry = detection_scores(self.inside, arrays, among, self.n_resamples, self.seed)
        else:
            labels = records.digest({"targets": targets.ravel().tolist()})
            # Copies of the same data are resampled together, other data by themselves.
            seed_of_data = self._seeds.setdefault(labels, self.seed + len(self._seeds))
            entry, losses = condition_scores(
                arrays, targets, among, self.n_resamples, seed_of_data, self.target_scale, list(self.inside),
                risk=condition.kind == "test",
            )  # fmt: skip
            entry["targets"] = labels
            if condition.kind == "test":
                entry["prediction_sets"] = self._sets.of_test(arrays, targets, seed_of_data, among)
            if condition.kind == "shift" and is_strong({"severity": condition.severity}):
                self._strong.append(StrongShift(condition.title, labels, losses))
                self._sets.add_strong(arrays, targets, seed_of_data)
        entry = {"name": condition.name, "severity": condition.severity, "n": predicted["n"]} | entry
        if predicted["shown"]:
            entry["most_uncertain"] = {"predictor": shown_by, "inputs": predicted["shown"]}
        self.entries[condition.kind].append(entry)
        return list(self.inside)

    def result(self) -> dict[str, Any]:
        """What :func:`evaluate` returns."""
        among, strong = Groups(self.groups, self.compare_with), None
        if self._strong:
            strong = strong_shift(self._strong, among, self.n_resamples) | {
                "prediction_sets": self._sets.of_strong(among)
            }
        return {
            "shifts": self.entries["shift"], "ood": self.entries["ood"], "test": self.entries["test"][0],
            "strong_shift": strong,
            "predictors": {name: {"seconds": {"predict": seconds}} for name, seconds in self.seconds.items()},
            "failures": self.failures, "regression": "mean" in next(iter(self.inside.values())),
            "n_resamples": self.n_resamples,
        }  # fmt: skip
