"""Plain sentences made from the numbers of a summary; where they show nothing, the sentences say so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from debiased_laplace.evaluation.judge.conditions import STRONG
from debiased_laplace.evaluation.methods import CHOSEN_ON, MAP, TEMPERATURE, TEMPERATURE_RULE
from debiased_laplace.evaluation.predictors import edges
from debiased_laplace.evaluation.report.numbers import number, plus_minus, seeds, unit, with_interval
from debiased_laplace.evaluation.report.verdicts import (
    Summary,
    by_role,
    comparisons,
    is_worse_than_uniform,
    judged,
    title,
)


def statement(summary: Summary) -> dict[str, Any]:
    """The answer in one sentence for everybody, and what else to know.

    Args:
        summary: From :func:`~debiased_laplace.evaluation.report.summary.summarise`.

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
    details += [*_strong_shift(summary, candidate), *_posteriors(summary, candidate), *_equal(summary, candidate)]
    details += [*_distance(summary, candidate), *_tuning(summary), *_of_no_use(summary), *_protocol(summary)]
    return {"answer": answer, "details": details + failures(summary)}


def same_rule(summary: Summary) -> str | None:
    """The temperature that was chosen by the rule of the posteriors, or the best one, or none."""
    return next((name for name in (TEMPERATURE_RULE, TEMPERATURE) if name in summary["test"]["scores"]), None)


def _classification(summary: Summary, candidate: str) -> tuple[str, list[str]]:
    name = summary["task"]["name"]
    against_point = _test(summary, candidate, MAP, "nll")
    against_temperature = _test(summary, candidate, TEMPERATURE, "nll")
    if against_point is None:
        return f"On {name} there is no point network to compare with.", []
    point = judged("nll", against_point)
    temperature = None if against_temperature is None else judged("nll", against_temperature)
    helped = {
        "better": "are better than the network's own",
        "worse": "are worse than the network's own",
        "no difference shown": "are not shown to differ in quality from the network's own",
        "negligible": "are practically as good as the network's own",
        "not defined": "cannot be compared with the network's own, since neither loss is finite",
    }[point]
    answer = f"On data like the training data of {name}, the probabilities of {candidate} {helped}"
    answer += _interval(against_point)
    if temperature is not None and against_temperature is not None:
        joint = ", but" if (point == "better") != (temperature == "better") else ", and"
        answer += (
            joint
            + {
                "better": " are better than with the simplest remedy, dividing the outputs by one tuned number",
                "worse": " dividing the outputs by one tuned number (a temperature) does better",
                "no difference shown": " no difference to dividing the outputs by one tuned number (a temperature) is "
                "shown",
                "negligible": " dividing the outputs by one tuned number (a temperature) does practically the same",
                "not defined": " there is no comparison with dividing the outputs by one tuned number (a temperature)",
            }[temperature]
            + _interval(against_temperature)
        )
    strong, rule = summary["strong_shift"], same_rule(summary)
    cell = None if strong is None or rule is None else strong["differences"].get(rule, {}).get(candidate, {}).get("nll")
    if cell is not None:
        of = " that is chosen by the same rule" if rule == TEMPERATURE_RULE else ""
        answer += {
            "better": f"; under strong shift it is better than a temperature{of}",
            "worse": f"; under strong shift it is worse than a temperature{of}",
            "no difference shown": f"; under strong shift no difference to a temperature{of} is shown",
            "negligible": f"; under strong shift it does practically the same as a temperature{of}",
            "not defined": f"; under strong shift there is no comparison with a temperature{of}",
        }[judged("nll", cell)] + _interval(cell, "mean NLL")  # fmt: skip
    details = [_scores(summary, [MAP, TEMPERATURE, TEMPERATURE_RULE, candidate])]
    for second in (MAP, TEMPERATURE, TEMPERATURE_RULE):
        difference = _test(summary, candidate, second, "nll")
        if difference is not None:
            details.append(
                f"Negative log-likelihood, {candidate} minus {second}, test data: {with_interval(difference, 4)} "
                f"({judged('nll', difference)})."
            )
    details += _best(summary)
    details += _out_of_distribution(summary, candidate)
    return answer + ".", details


def _interval(cell: Sequence[float], what: str = "NLL") -> str:
    """In brackets, for sentences that everybody reads."""
    return "" if math.isnan(cell[0]) else f" ({what} {with_interval(cell, 3)})"


def _scores(summary: Summary, names: Sequence[str]) -> str:
    cells = summary["test"]["scores"]
    parts = [
        f"{name} NLL {plus_minus(cells[name]['nll'], 3)}, ECE {plus_minus(cells[name]['ece'], 1, scale=100)} %"
        f"{if_calibrated(summary['test'], name, 'ece')}"
        for name in names
        if name in cells
    ]
    return f"Test data: {'; '.join(parts)}."


def if_calibrated(entry: Mapping[str, Any], name: str, score: str, digits: int = 1) -> str:
    """The calibration error that a predictor would have if it were calibrated, in brackets."""
    expected = entry.get("calibrated", {}).get(name, {}).get(score)
    if expected is None:
        return ""
    value, low, high = (number(expected[i], digits, scale=100) for i in (0, 2, 3))
    return f" (calibrated: {value} [{low}, {high}])"


def _best(summary: Summary) -> list[str]:
    """Which method has the lowest loss on test data."""
    cells = summary["test"]["scores"]
    best = min(cells, key=lambda name: _last_if_undefined(cells[name]["nll"][0]))
    if not math.isfinite(cells[best]["nll"][0]):
        return ["No method has a finite NLL on the test data: each gives some target the probability zero."]
    return [
        f"The lowest NLL on test data has {best} ({plus_minus(cells[best]['nll'], 3)}), the lowest of {len(cells)} "
        "methods on the data that chose it."
    ]


def _strong_shift(summary: Summary, candidate: str) -> list[str]:
    """All strong shifts as one comparison."""
    strong = summary["strong_shift"]
    if strong is None:
        return []
    cells = {name: scores["nll"] for name, scores in strong["scores"].items()}
    order = sorted(cells, key=lambda name: _last_if_undefined(cells[name][0]))
    listed = ", ".join(f"{name} {plus_minus(cells[name], 3)}" for name in order)
    several = len(strong["shifts"])
    sentences = [
        f"Mean NLL over the {several} strong shift{'s' * (several > 1)} (severity {STRONG} and more), which are one "
        f"comparison, over {unit(summary, strong['n'], sets=strong['sets'])}: {listed}."
    ]
    parts = [
        f"{second} {with_interval(differences[candidate]['nll'], 3)} ({judged('nll', differences[candidate]['nll'])})"
        for second, differences in strong["differences"].items()
        if candidate in differences
    ]
    if parts:
        sentences.append(f"There, {candidate} minus others: {'; '.join(parts)}.")
    return sentences


def _out_of_distribution(summary: Summary, candidate: str) -> list[str]:
    sentences = []
    for entry in summary["ood"]:
        scores = entry["scores"]
        of_map = scores.get(MAP, {}).get("maximum probability, auroc")
        of_candidate = scores[candidate]
        text = (
            f"Telling {entry['name']} from test data, AUROC: "
            f"{plus_minus(of_candidate['maximum probability, auroc'], 1, scale=100)} % for {candidate} by its maximum "
            "probability"
        )
        if "functional variance, auroc" in of_candidate:
            text += (
                f", {plus_minus(of_candidate['functional variance, auroc'], 1, scale=100)} % by the functional variance"
            )
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
        f"On {name}, the uncertainty of {candidate} {said}{_interval(cell)}; its 95 % intervals hold "
        f"{plus_minus(coverage, 1, scale=100)} % of the test targets"
    )
    details = [
        f"Negative log-likelihood, {candidate} minus {MAP}: {with_interval(cell, 3)} ({judged('nll', cell)}).",
        "NLL: " + "; ".join(f"{key} {plus_minus(scores['nll'], 3)}" for key, scores in cells.items()) + ".",
    ]
    return answer + ".", details


def _posteriors(summary: Summary, candidate: str) -> list[str]:
    """Debiased against single-batch and full-data posteriors."""
    sentences = []
    for role, what in (("baseline", "the single batch at the same budget"), ("reference", "all the training data")):
        other = by_role(summary, role)
        cell = None if other is None else _test(summary, candidate, other, "nll")
        if cell is None:
            continue
        sentences.append(
            f"{candidate} against {what} ({other}), each tuned, NLL on test data: {with_interval(cell, 4)} "
            f"({judged('nll', cell)})."
        )
    return sentences


def _equal(summary: Summary, candidate: str) -> list[str]:
    """Debiased against a single batch at the same settings."""
    settings = [equal for equal in summary["equal_settings"] if equal]
    baseline = by_role(summary, "baseline")
    if not settings or baseline is None:
        return []
    parts = []
    for where, entry in (("test data", summary["test"]), ("the strong shifts", summary["strong_shift"])):
        difference = (entry or {}).get("equal_settings", {}).get("differences", {}).get(baseline, {}).get(candidate)
        if difference:
            parts.append(f"{with_interval(difference['nll'], 4)} on {where} ({judged('nll', difference['nll'])})")
    if not parts:
        return []
    return [
        f"With the settings of {settings[0]['of']} for both, NLL of {candidate} minus {baseline}: {', '.join(parts)}."
    ]


def _distance(summary: Summary, candidate: str) -> list[str]:
    sentences = []
    baseline = by_role(summary, "baseline")
    for where, log_ratios in summary["distances"].items():
        at = (
            "at the prior precision tuned for the full data"
            if where == "tuned"
            else f"at prior precision {log_ratios['prior_precision'][0]:g}"
        )
        parts = [
            f"{_factor(log_ratios[name]['absolute'][0])} for {name} (mean absolute log ratio "
            f"{plus_minus(log_ratios[name]['absolute'], 3)})"
            for name in (candidate, baseline)
            if name in log_ratios
        ]
        sentences.append(
            f"Output variances differ from those of the full-data posterior, {at}, by a typical factor of "
            f"{' and '.join(parts)}."
        )
    return sentences


def _tuning(summary: Summary) -> list[str]:
    at_the_end = edges.sentence(summary["predictors"])
    sentences = [at_the_end] if at_the_end else []
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


def _of_no_use(summary: Summary) -> list[str]:
    """Scores worse than those of equal probabilities for all classes."""
    said = []
    for entry in (summary["test"], *summary["shifts"]):
        names = [
            name for name, scores in entry["scores"].items() if is_worse_than_uniform(summary, "nll", scores["nll"])
        ]
        if names:
            said.append(f"{title(entry)} ({'all' if len(names) == len(entry['scores']) else ', '.join(names)})")
    if not said:
        return []
    return [
        f"Worse than saying 1/{summary['task']['n_outputs']} for every class, by NLL "
        f"({number(math.log(summary['task']['n_outputs']), 3)}): {'; '.join(said)}."
    ]


def _protocol(summary: Summary) -> list[str]:
    """What tuned, what judged, over what, and how many comparisons there are."""
    data, task = summary["data"], summary["task"]
    trained = "" if data["train"] is None else f" Trained on {data['train']:,} data."
    shifted = sorted({entry["n"] for entry in summary["shifts"]})
    copies = f", and on {' or '.join(f'{n:,}' for n in shifted)} in each shift" if shifted else ""
    sentences = [
        f"Everything is tuned on {data['validation']:,} validation data and judged on {data['test']:,} other test "
        f"data{copies}.{trained} Intervals are over {unit(summary, summary['test']['n'])}."
    ]
    if task["name"] in CHOSEN_ON:
        sentences.append(
            "The way posteriors are tuned was chosen on this task among others: what it gains here over other ways of "
            "tuning is no evidence for it."
        )
    count = comparisons(summary)
    if count:
        sentences.append(
            f"The tables make {count} comparisons with a verdict, each at 95 %: about {max(1, round(count / 20))} "
            "would be beyond by chance if nothing differed."
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
