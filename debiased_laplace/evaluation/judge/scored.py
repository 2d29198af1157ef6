"""Scores, differences, curves and histograms of one condition; all strong shifts as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from debiased_laplace._arrays import Array
from debiased_laplace.evaluation.judge.groups import Groups
from debiased_laplace.evaluation.scores import bootstrap, calibrated, calibration, classification, regression, weighted
from debiased_laplace.evaluation.scores.detection import OOD, ood_scores
from debiased_laplace.evaluation.scores.replicates import Replicates

#: Bins of the histograms of out-of-distribution scores.
N_HISTOGRAM = 24


@dataclass(frozen=True)
class StrongShift:
    """Losses under one strong shift; ``labels`` is the same for copies of the same data."""

    title: str
    labels: str
    losses: Mapping[str, Replicates]


def strong_shift(shifts: Sequence[StrongShift], groups: Groups, n_resamples: int) -> dict[str, Any]:
    """Mean NLL over shifts as one score: copies of the same data are one sample of them, drawn jointly."""
    sizes = [score.n for shift in shifts for score in shift.losses.values() if score.n is not None]
    mean_losses = {}
    for name in shifts[0].losses:
        losses = [shift.losses[name] for shift in shifts]
        one_set = len({shift.labels for shift in shifts}) == 1 and all(r.contributions is not None for r in losses)
        with np.errstate(invalid="ignore"):
            mean_losses[name] = {
                "nll": Replicates(
                    float(np.mean([r.value for r in losses])), np.mean([r.replicates for r in losses], axis=0),
                    min((r.n for r in losses if r.n is not None), default=None), "mean" if one_set else "statistic",
                    np.mean([r.contributions for r in losses if r.contributions is not None], axis=0)
                    if one_set
                    else None,
                )
            }  # fmt: skip

    def same(first: str, second: str) -> bool:
        pairs = [(shift.losses[first].contributions, shift.losses[second].contributions) for shift in shifts]
        return all(a is not None and b is not None and np.array_equal(a, b) for a, b in pairs)

    return {
        "shifts": [shift.title for shift in shifts], "n": min(sizes),
        "sets": len({shift.labels for shift in shifts}), "scores": groups.scores(mean_losses),
        "draws": groups.values(mean_losses), "differences": groups.differences(mean_losses, same),
    }  # fmt: skip


def condition_scores(
    arrays: Mapping[str, dict[str, Array]], targets: Array, groups: Groups, n_resamples: int, seed: int,
    target_scale: float, names: Sequence[str], *, risk: bool,
) -> tuple[dict[str, Any], dict[str, Replicates]]:  # fmt: skip
    """Scores, differences and curves of one condition, and the losses; risk is drawn for the test data alone."""
    weights = weighted.resample_weights(len(targets), n_resamples, seed)
    entry: dict[str, Any] = {"curves": {}, "calibrated": {}}
    scores = {}
    firsts = {draws[0]: name for name, draws in groups.draws.items()}
    others = _mean([fields["probabilities"] for fields in arrays.values() if "probabilities" in fields])
    for name, fields in arrays.items():
        if "probabilities" in fields:
            scores[name] = bootstrap.classification_replicates(fields["probabilities"], targets, weights, others)
        else:
            # In the original units: a scale of the targets scales means and standard deviations.
            mean, variance = fields["mean"] * target_scale, fields["variance"] * target_scale**2
            labels = targets.reshape(mean.shape) * target_scale
            scores[name] = bootstrap.regression_replicates(mean, variance, labels, weights)
        if name not in firsts:
            continue
        if "probabilities" in fields:
            entry["curves"][firsts[name]] = _classification_curves(fields["probabilities"], targets, risk)
            entry["calibrated"][firsts[name]] = calibrated.expected_errors(
                fields["probabilities"], min(n_resamples, calibrated.N_DRAWS), seed, classwise=risk
            )
        else:
            expected, observed = regression.calibration_curve(mean, variance, labels)
            entry["curves"][firsts[name]] = {"expected": _rounded(expected), "observed": _rounded(observed)}
    like = next(iter(scores.values()))
    empty = _empty(next(iter(entry["curves"].values()))) if entry["curves"] else {}
    entry["curves"] |= {name: empty for name in groups.draws if name not in entry["curves"]}
    scores = {name: scores.get(name) or _undefined(like, n_resamples) for name in names}
    entry["scores"], entry["draws"] = groups.scores(scores), groups.values(scores)
    entry["differences"] = groups.differences(scores, _twins(arrays))
    return entry, {name: replicates["nll"] for name, replicates in scores.items()}


def _undefined(like: Iterable[str], n_resamples: int) -> dict[str, Replicates]:
    """Scores of a predictor that failed."""
    return {key: Replicates(float("nan"), np.full(n_resamples, np.nan)) for key in like}


def _empty(curves: Mapping[str, Any]) -> dict[str, Any]:
    """Curves of a predictor that failed: bins without data, lines without points."""
    return {
        key: {part: [0] * len(column) for part, column in line.items()}
        if isinstance(line, Mapping)
        else [float("nan")] * len(line)
        for key, line in curves.items()
    }


def _mean(arrays: Sequence[Array]) -> Array | None:
    """Of arrays of one shape; nothing of none."""
    return sum(arrays[1:], arrays[0]) / len(arrays) if arrays else None


def _twins(*conditions: Mapping[str, Mapping[str, Array]]) -> Callable[[str, str], bool]:
    """Whether two predictors predict the same of all data: they do not differ, however few the data are.

    Further scores that one of them alone has are compared with nothing.
    """

    def equal(first: Mapping[str, Array], second: Mapping[str, Array]) -> bool:
        alone = {key for key in first.keys() ^ second.keys() if key.startswith(OOD)}
        return all(
            key in first and key in second and np.array_equal(first[key], second[key])
            for key in (first.keys() | second.keys()) - alone
        )

    def same(first: str, second: str) -> bool:
        return all(
            first in arrays and second in arrays and equal(arrays[first], arrays[second]) for arrays in conditions
        )

    return same


def _classification_curves(probabilities: Array, targets: Array, risk: bool) -> dict[str, Any]:
    def rounded(bins: calibration.Reliability) -> dict[str, Any]:
        return {"counts": bins.counts, "confidences": _rounded(bins.confidences), "correct": bins.correct}

    curves: dict[str, Any] = {"reliability": rounded(calibration.reliability(probabilities, targets))}
    if risk:
        by_class = map(rounded, calibration.by_class(probabilities, targets))
        curves |= dict(zip(("top_label", "classwise"), by_class, strict=True))
        lines = zip(("coverage", "risk"), classification.risk_coverage(probabilities, targets), strict=True)
        curves |= {name: _rounded(line) for name, line in lines}
    return curves


def detection_scores(
    inside: Mapping[str, dict[str, Array]], outside: Mapping[str, dict[str, Array]], groups: Groups,
    n_resamples: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """How well every score of every predictor tells out-of-distribution data from the test data."""
    scores: dict[str, dict[str, Any]] = {}
    histograms: dict[str, Any] = {}
    sizes = [len(next(iter(next(iter(arrays.values())).values()))) for arrays in (inside, outside)]
    weights = [weighted.resample_weights(n, n_resamples, seed + index) for index, n in enumerate(sizes)]
    for name in inside:
        inside_scores = ood_scores(inside[name])
        outside_scores = ood_scores(outside.get(name, {}))
        scores[name], histograms[name] = {}, {}
        for score in inside_scores:
            if name not in outside:  # it failed there
                scores[name] |= _undefined([f"{score}, {key}" for key in ("auroc", "aupr", "fpr95")], n_resamples)
                histograms[name][score] = {"edges": [0.0, 1.0], "known": [0], "foreign": [0]}
                continue
            replicates = bootstrap.detection_replicates(inside_scores[score], outside_scores[score], *weights)
            scores[name] |= {f"{score}, {key}": value for key, value in replicates.items()}
            histograms[name][score] = _histogram(inside_scores[score], outside_scores[score])
    return {
        "scores": groups.scores(scores),
        "draws": groups.values(scores),
        "differences": groups.differences(scores, _twins(inside, outside)),
        "against_detectors": _against_detectors(scores, inside, groups),
        "histograms": {name: histograms[draws[0]] for name, draws in groups.draws.items()},
    }


def _against_detectors(
    scores: Mapping[str, Mapping[str, Replicates]], inside: Mapping[str, Mapping[str, Array]], groups: Groups
) -> dict[str, dict[str, Any]]:
    """The maximum probability of methods without detectors minus the detectors of those that have them.

    As the network has: they need no posterior.
    """
    of = {name: [key.removeprefix(OOD) for key in arrays if key.startswith(OOD)] for name, arrays in inside.items()}
    detectors = list(dict.fromkeys(detector for has in of.values() for detector in has))
    paired = {
        name: {
            f"{detector}, {metric}": scores[name][f"{detector if of[name] else 'maximum probability'}, {metric}"]
            for detector in (of[name] or detectors if "maximum probability, auroc" in scores[name] else ())
            for metric in ("auroc", "aupr", "fpr95")
        }
        for name in scores
    }
    has = {name: bool(of[draws[0]]) for name, draws in groups.draws.items()}
    return {
        second: {first: cells for first, cells in firsts.items() if cells and not has[first]}
        for second, firsts in groups.differences(paired, lambda *_: False).items()
        if has[second]
    }


def _histogram(inside: Array, outside: Array) -> dict[str, list[float]]:
    """Counts of scores in and out of distribution, under the keys that records have had from the first on."""
    low, high = (float(bound(np.concatenate([inside, outside]))) for bound in (np.min, np.max))
    room = 1e-9 * max(abs(low), abs(high))  # narrower bins could not be told apart: all values in the middle
    low, high = (low, high) if high - low > room else (low - (room or 0.5), high + (room or 0.5))
    edges = np.linspace(low, high, N_HISTOGRAM + 1)
    return {
        "edges": edges.tolist(),
        "known": np.histogram(inside, edges)[0].tolist(),
        "foreign": np.histogram(outside, edges)[0].tolist(),
    }


def _rounded(values: Iterable[float]) -> list[float]:
    """Six digits: for figures, never for scores."""
    return [float(f"{float(value):.6g}") for value in values]
