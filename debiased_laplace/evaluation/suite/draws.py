"""Several draws of a method's data: one predictor each, of which a record has means, standard errors and values.

The settings of two methods differ after tuning; predictors with :data:`EQUAL` at the end of their name are those of
candidate and baseline at the same ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from debiased_laplace.evaluation.methods import ENSEMBLE, ISOTROPIC, POINTS
from debiased_laplace.evaluation.predictors.prediction import Predictor

#: End of the names of predictors at equal settings.
EQUAL = ", equal settings"
_STRIDE = 10_007
_TUNED = ("prior_precision", "temperature", "noise", "validation_nll", "budget")
#: A budget that takes so much more or less time than wanted is good enough.
_CLOSE = 0.1


def seed(first: int, number: int) -> int:
    """Of a draw; the first one's is that of the run."""
    return first + _STRIDE * number


def add(predictors: dict[str, Predictor], groups: dict[str, list[str]], name: str, drawn: Sequence[Predictor]) -> None:
    """Enter the predictors of all draws of a method."""
    groups[name] = [name, *(f"{name}, draw {number}" for number in range(2, len(drawn) + 1))]
    predictors.update(zip(groups[name], drawn, strict=True))


def pairs(
    roles: Mapping[str, str], methods: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """What is compared with what: second to firsts."""
    against = [*POINTS, ISOTROPIC]
    against += [roles[role] for role in ("baseline", "reference") if role in roles] + ["laplace-torch", ENSEMBLE]
    compared = {second: [name for name in methods if name in groups] for second in dict.fromkeys(against)}
    equal = [roles[role] + EQUAL for role in ("baseline", "candidate") if roles.get(role, "") + EQUAL in groups]
    return compared | ({equal[0]: equal[1:]} if len(equal) == 2 else {})


def joined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is known of a method: that of its first draw, mean seconds, and what was tuned in each draw."""
    first = dict(results[0])
    if len(results) > 1:
        steps = first["seconds"]
        first["seconds"] = {step: statistics.fmean(result["seconds"][step] for result in results) for step in steps}
        first["draws"] = [{key: result[key] for key in _TUNED if key in result} for result in results]
        first["edges"] = {what: side for result in results[::-1] for what, side in result["edges"].items()}
        first["warnings"] = sorted({text for result in results for text in result.get("warnings", ())})
    return first


def apart(result: dict[str, Any]) -> None:
    """Put the scores at equal settings, in every part of a result, into a separate entry."""
    for entry in (result["test"], *result["shifts"], *result["ood"], result["strong_shift"]):
        if entry is None:
            continue
        equal: dict[str, Any] = {"scores": {}, "differences": {}}
        for name in [name for name in entry["scores"] if name.endswith(EQUAL)]:
            plain = name.removesuffix(EQUAL)
            equal["scores"][plain] = entry["scores"].pop(name)
            differences = entry["differences"].pop(name, {})
            if differences:
                equal["differences"][plain] = {
                    key.removesuffix(EQUAL): difference for key, difference in differences.items()
                }
            for part in ("curves", "histograms", "calibrated", "draws", "against_detectors"):
                entry.get(part, {}).pop(name, None)
        if equal["scores"] and "histograms" not in entry:
            entry["equal_settings"] = equal


def budget_within(wanted: float, seconds: Callable[[int], float], start: int, most: int) -> int:
    """The number of data whose fit takes as long as wanted, from at most three fits: proportional, then on a line.

    Args:
        wanted: Seconds.
        seconds: That a fit with a number of data takes.
        start: What is tried first.
        most: That there are.
    """
    measured: list[tuple[int, float]] = []
    budget = min(start, most)
    for _ in range(3):
        measured.append((budget, seconds(budget)))
        (n, time), (before, earlier) = measured[-1], measured[-2] if len(measured) > 1 else (0, 0.0)
        slope = (time - earlier) / (n - before)
        guess = n + (wanted - time) / slope if slope > 0 else n * wanted / max(time, 1e-9)
        guess = min(max(round(guess), 1), most)
        if abs(guess - n) <= _CLOSE * n:
            return n
        budget = guess
    return budget
