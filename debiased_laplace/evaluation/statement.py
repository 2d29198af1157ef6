"""Plain sentences made from the numbers of a summary; where they show nothing, the sentences say so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from debiased_laplace.evaluation.methods import MAP, TEMPERATURE
from debiased_laplace.evaluation.summary import by_role, differences, is_strong, judged

MINUS = "\N{MINUS SIGN}"
Summary = Mapping[str, Any]


def statement(summary: Summary) -> dict[str, Any]:
    """The answer in one sentence for everybody, and what else to know.

    Args:
        summary: From :func:`~debiased_laplace.evaluation.summary.summarise`.

    Returns:
        ``answer``, a sentence, and ``details``, a list of sentences.
    """
    candidate = by_role(summary, "candidate")
    if candidate is None:
        failed = [name for name, about in summary["predictors"].items() if about["role"] == "candidate"]
        why = f"{failed[0]} did not run" if failed else "none is marked as a candidate"
        answer = f"The tables show each method by itself: {why}."
        return {"answer": answer, "details": failures(summary)}
    if summary["regression"]:
        answer, details = _regression(summary, candidate)
    else:
        answer, details = _classification(summary, candidate)
    details += [*_posteriors(summary, candidate), *_distance(summary, candidate), *_tuning(summary), *failures(summary)]
    return {"answer": answer, "details": details}


def _classification(summary: Summary, candidate: str) -> tuple[str, list[str]]:
    name = summary["task"]["name"]
    against_point = _test(summary, candidate, MAP, "nll")
    against_temperature = _test(summary, candidate, TEMPERATURE, "nll")
    if against_point is None:
        return f"On {name} there is no point network to compare with.", []
    point = judged("nll", against_point)
    temperature = None if against_temperature is None else judged("nll", against_temperature)
    strong = [(entry, cell) for entry, cell in differences(summary, candidate, TEMPERATURE, "nll") if is_strong(entry)]
    wins, losses = (sum(judged("nll", cell) == word for _, cell in strong) for word in ("better", "worse"))
    helped = {
        "better": "are better than the network's own",
        "worse": "are worse than the network's own",
        "no difference shown": "are not shown to differ in quality from the network's own",
        "negligible": "are practically as good as the network's own",
        "not defined": "cannot be compared with the network's own, since neither loss is finite",
    }[point]
    answer = f"On data like the training data of {name}, the probabilities of {candidate} {helped}"
    if temperature is not None:
        joint = ", but" if (point == "better") != (temperature == "better") else ", and"
        answer += (
            joint
            + {
                "better": " are better than with the simplest remedy, dividing the outputs by one tuned number",
                "worse": " dividing the outputs by one tuned number (a temperature) does better",
                "no difference shown": " dividing the outputs by one tuned number (a temperature) would have done",
                "negligible": " dividing the outputs by one tuned number (a temperature) would have done",
                "not defined": " there is no comparison with dividing the outputs by one tuned number (a temperature)",
            }[temperature]
        )
    if strong:
        where = f"under strong shift (severity 3 and more, {len(strong)} cases)"
        if wins or losses:
            answer += f"; {where} it beats the temperature in {wins} and loses to it in {losses}"
        else:
            answer += f"; {where} no difference to the temperature is shown"
    details = [_scores(summary, [MAP, TEMPERATURE, candidate])]
    for second, cell in ((MAP, against_point), (TEMPERATURE, against_temperature)):
        if cell is not None:
            details.append(
                f"Negative log-likelihood, {candidate} minus {second}, test data: {with_interval(cell, 4)} "
                f"({judged('nll', cell)})."
            )
    details += _best(summary, candidate)
    details += _foreign(summary, candidate)
    return answer + ".", details


def _scores(summary: Summary, names: Sequence[str]) -> str:
    cells = summary["test"]["scores"]
    parts = [
        f"{name} NLL {plus_minus(cells[name]['nll'], 3)}, ECE {plus_minus(cells[name]['ece'], 1, scale=100)} %"
        for name in names
        if name in cells
    ]
    return f"Test data: {'; '.join(parts)}."


def _best(summary: Summary, candidate: str) -> list[str]:
    """Which method has the lowest loss, in distribution and under strong shift."""
    cells = summary["test"]["scores"]
    best = min(cells, key=lambda name: _last_if_undefined(cells[name]["nll"][0]))
    sentences = [f"The lowest NLL on test data has {best} ({plus_minus(cells[best]['nll'], 3)})."]
    if not math.isfinite(cells[best]["nll"][0]):
        sentences = ["No method has a finite NLL on the test data: each gives some target the probability zero."]
    strong = [entry for entry in summary["shifts"] if is_strong(entry)]
    if strong:
        means = {name: sum(e["scores"][name]["nll"][0] for e in strong) / len(strong) for name in cells}
        order = sorted(means, key=lambda name: _last_if_undefined(means[name]))
        listed = ", ".join(f"{name} {number(means[name], 3)}" for name in order)
        sentences.append(f"Mean NLL over the {len(strong)} strong shifts: {listed}.")
        counts = []
        for first in [name for name in order if name not in (MAP, TEMPERATURE)]:
            found = [
                judged("nll", cell)
                for entry, cell in differences(summary, first, TEMPERATURE, "nll")
                if is_strong(entry)
            ]
            if found:
                counts.append(f"{first} {found.count('better')} to {found.count('worse')}")
        if counts:
            sentences.append(
                f"Of these, how often NLL is shown to be better than that of {TEMPERATURE}, and how often worse: "
                f"{', '.join(counts)}."
            )
    return sentences


def _foreign(summary: Summary, candidate: str) -> list[str]:
    sentences = []
    for entry in summary["ood"]:
        scores = entry["scores"]
        of_map = scores.get(MAP, {}).get("maximum probability, auroc")
        own = scores[candidate]
        text = (
            f"Telling {entry['name']} from test data, AUROC: "
            f"{plus_minus(own['maximum probability, auroc'], 1, scale=100)} % for {candidate} by its maximum "
            "probability"
        )
        if "functional variance, auroc" in own:
            text += f", {plus_minus(own['functional variance, auroc'], 1, scale=100)} % by the functional variance"
        if of_map is not None:
            text += f"; {plus_minus(of_map, 1, scale=100)} % for the network itself"
        sentences.append(text + ".")
    return sentences


def _regression(summary: Summary, candidate: str) -> tuple[str, list[str]]:
    name, cells = summary["task"]["name"], summary["test"]["scores"]
    cell = _test(summary, candidate, MAP, "nll")
    if cell is None:
        return f"On {name} there is no point network to compare with.", []
    said = {
        "better": "describes the errors better than one noise level for all inputs does",
        "worse": "describes the errors worse than one noise level for all inputs does",
        "no difference shown": "is not shown to describe the errors better than one noise level for all inputs does",
        "negligible": "describes the errors practically as well as one noise level for all inputs does",
        "not defined": "cannot be compared with one noise level for all inputs, since neither loss is finite",
    }[judged("nll", cell)]
    coverage = cells[candidate]["coverage_95"]
    answer = (
        f"On {name}, the uncertainty of {candidate} {said}; its 95 % intervals hold "
        f"{plus_minus(coverage, 1, scale=100)} % of the test targets"
    )
    details = [
        f"Negative log-likelihood, {candidate} minus {MAP}: {with_interval(cell, 3)} ({judged('nll', cell)}).",
        "NLL: " + "; ".join(f"{key} {plus_minus(own['nll'], 3)}" for key, own in cells.items()) + ".",
    ]
    return answer + ".", details


def _posteriors(summary: Summary, candidate: str) -> list[str]:
    """Debiased against single-batch and full-data posteriors, and laplace-torch's."""
    sentences = []
    for role, what in (("baseline", "the single batch at the same budget"), ("reference", "all the training data")):
        other = by_role(summary, role)
        cell = None if other is None else _test(summary, candidate, other, "nll")
        if cell is None:
            continue
        found = [judged("nll", c) for _, c in differences(summary, candidate, str(other), "nll")]
        shifted = (
            f"; over {len(found)} shifted data better in {found.count('better')}, worse in {found.count('worse')}"
            if found
            else ""
        )
        sentences.append(
            f"{candidate} against {what} ({other}), NLL on test data: {with_interval(cell, 4)} ({judged('nll', cell)})"
            f"{shifted}."
        )
    return sentences


def _distance(summary: Summary, candidate: str) -> list[str]:
    sentences = []
    baseline = by_role(summary, "baseline")
    for where, found in summary["distances"].items():
        at = (
            "at the prior precision tuned for the full data"
            if where == "tuned"
            else f"at prior precision {found['prior_precision'][0]:g}"
        )
        parts = [
            f"{_factor(found[name]['absolute'][0])} for {name} (mean absolute log ratio "
            f"{plus_minus(found[name]['absolute'], 3)})"
            for name in (candidate, baseline)
            if name in found
        ]
        sentences.append(
            f"Output variances differ from those of the full-data posterior, {at}, by a typical factor of "
            f"{' and '.join(parts)}."
        )
    return sentences


def _tuning(summary: Summary) -> list[str]:
    sentences = []
    meanings = {
        "largest": "there the validation data asked for hardly any posterior uncertainty, and predictions are close to "
        "those of the network itself",
        "smallest": "the optimum may lie below the grid",
    }
    for side, meaning in meanings.items():
        at_edge = {n: m["edge"].count(side) for n, m in summary["predictors"].items() if side in m.get("edge", [])}
        if at_edge:
            several = len(summary["seeds"]) > 1
            counts = ", ".join(f"{name} for {count}" if several else name for name, count in at_edge.items())
            where = f" in some of {seeds(summary)}" * several
            sentences.append(f"The tuned prior precision was the {side} of the grid{where} ({counts}): {meaning}.")
    free: dict[str, list[str]] = {}
    for name, about in summary["predictors"].items():
        for what in about.get("undetermined", ()):
            free.setdefault(what, []).append(name)
    for what, names in free.items():
        sentences.append(
            f"The validation data do not determine the {what} of {', '.join(names)}: it is a choice, not a result (see "
            "the warnings)."
        )
    return sentences


def failures(summary: Summary) -> list[str]:
    """Which methods failed, where and why."""
    sentences = []
    for name, about in summary["predictors"].items():
        if "failed" in about:
            rest = (
                f" in {about['n_failed']} of {seeds(summary)}; its numbers are of the others"
                if about["n_failed"] < len(summary["seeds"])
                else ""
            )
            sentences.append(f"{name} did not run{rest}: {'; '.join(about['failed'])}.")
    return sentences


def _factor(logarithm: float) -> str:
    with np.errstate(over="ignore"):
        return number(float(np.exp(logarithm)), 3)


def _last_if_undefined(value: float) -> float:
    """To sort by."""
    return math.inf if math.isnan(value) else value


def _test(summary: Summary, first: str, second: str, score: str) -> Sequence[float] | None:
    return summary["test"]["differences"].get(second, {}).get(first, {}).get(score)


# -- numbers as text -------------------------------------------------------------------------------


def number(value: float, digits: int, *, sign: bool = False, scale: float = 1.0) -> str:
    """A number with a true minus; ``"infinite"`` or ``"undefined"`` where it is none."""
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "infinite" if value > 0 else f"{MINUS}infinite"
    return (f"{value * scale:+.{digits}f}" if sign else f"{value * scale:.{digits}f}").replace("-", MINUS)


def plus_minus(cell: Sequence[float], digits: int, *, sign: bool = False, scale: float = 1.0) -> str:
    """Value ± standard error; an infinite or undefined value has none."""
    if not math.isfinite(cell[0]):
        return number(cell[0], digits)
    return f"{number(cell[0], digits, sign=sign, scale=scale)} ± {number(cell[1], digits, scale=scale)}"


def with_interval(cell: Sequence[float], digits: int, *, scale: float = 1.0) -> str:
    """A difference with its 95 % interval."""
    if math.isnan(cell[0]):
        return number(cell[0], digits)
    value, low, high = (number(cell[i], digits, sign=True, scale=scale) for i in (0, 2, 3))
    return f"{value} [{low}, {high}]"


def seeds(summary: Summary) -> str:
    """How many seeds, in words."""
    count = len(summary["seeds"])
    return f"{count} seed{'s' * (count > 1)}"
