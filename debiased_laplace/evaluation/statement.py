"""Plain sentences made from the numbers of a summary; where they show nothing, the sentences say so."""

from __future__ import annotations

import math
from typing import Any

from debiased_laplace.evaluation.summary import CONFIDENCE, by_role, difference, verdict

MINUS = "\N{MINUS SIGN}"


def statement(summary: dict[str, Any]) -> dict[str, Any]:
    """The answer in one sentence, and what else to know.

    Args:
        summary: From :func:`~debiased_laplace.evaluation.summary.summarise`.

    Returns:
        ``answer``, a sentence, and ``details``, a list of sentences.
    """
    baseline, candidate, reference = (by_role(summary, role) for role in ("baseline", "candidate", "reference"))
    if baseline is None or candidate is None:
        return {"answer": "Nothing was compared pairwise: the tables show each method by itself.", "details": []}
    predictions, tuning = _predictions(summary, baseline, candidate), _tuning(summary)
    entry = difference(summary, baseline, "distance", "tuned", "absolute")
    if entry is None or reference is None:
        return {"answer": predictions[0], "details": [*predictions[1:], *tuning]}
    compared = {
        "better": f"{candidate} is closer to the {reference} posterior than {baseline} is",
        "worse": f"{candidate} is farther from the {reference} posterior than {baseline} is",
        "within the error": (
            f"{_seeds(summary)} {'do' if len(summary['seeds']) > 1 else 'does'} not show whether {candidate} or "
            f"{baseline} is closer to the {reference} posterior"
        ),
    }[verdict(entry)]
    return {
        "answer": f"On {summary['task']['name']}, at the tuned prior precision, {compared}.",
        "details": [*_distances(summary, baseline, candidate, reference), *predictions, *tuning],
    }


def _distances(summary: dict[str, Any], baseline: str, candidate: str, reference: str) -> list[str]:
    sentences = []
    for mine, theirs in zip(*(summary["methods"][name]["distances"] for name in (candidate, baseline)), strict=True):
        at = f"tuned for {reference}" if mine["at"] == "tuned" else mine["at"]
        entry = difference(summary, baseline, "distance", mine["at"], "absolute")
        assert entry is not None
        typical = [math.exp(value["absolute"]["mean"]) for value in (mine, theirs)]
        sentences.append(
            f"At the prior precision {at}, output variances differ from those of {reference} by a typical factor of "
            f"{typical[0]:.2f} ({candidate}) and {typical[1]:.2f} ({baseline}): mean absolute log ratio "
            f"{plus_minus(mine['absolute'], 3)} and {plus_minus(theirs['absolute'], 3)}, paired difference "
            f"{plus_minus(entry, 3, sign=True)} over {_seeds(summary)}{_interval(entry, 3)}. The mean signed log ratio "
            f"is {plus_minus(mine['signed'], 3, sign=True)} and {plus_minus(theirs['signed'], 3, sign=True)} "
            "(above zero: more uncertain than all the data warrant)."
        )
    return sentences


def _predictions(summary: dict[str, Any], baseline: str, candidate: str) -> list[str]:
    sentences = []
    for second in dict.fromkeys(entry["second"] for entry in summary["differences"]):
        entries = [d for d in summary["differences"] if d["second"] == second and d["group"] != "distance"]
        shown = [d for d in entries if d["shown"]]
        what = f"After tuning, of {len(entries)} paired differences in scores between {candidate} and {second}"
        if not shown:
            sentences.append(f"{what}, none is beyond its error: nothing is shown.")
            continue
        better = sum(verdict(d) == "better" for d in shown)
        sentences.append(
            f"{what}, {len(shown)} {'are' if len(shown) > 1 else 'is'} beyond "
            f"{'their' if len(shown) > 1 else 'its'} error, {better} in favour of {candidate}; about "
            f"{len(entries) * (1 - CONFIDENCE):.0f} would be by chance if the scores were independent."
        )
        losses = [d for d in shown if d["score"] == "nll" and second != baseline]
        for entry in losses:
            mine, theirs = (summary["methods"][m]["conditions"][entry["name"]]["nll"] for m in (candidate, second))
            sentences.append(
                f"Negative log-likelihood, {entry['name']}: {plus_minus(mine, 3)} for {candidate} and "
                f"{plus_minus(theirs, 3)} for {second}; the difference, {plus_minus(entry, 3, sign=True)}, is beyond "
                f"its error ({verdict(entry)})."
            )
    return sentences


def _tuning(summary: dict[str, Any]) -> list[str]:
    sentences = []
    for side, meaning in (
        (
            "largest",
            "there the validation data asked for hardly any posterior uncertainty, and predictions are close to MAP's",
        ),
        ("smallest", "the optimum may lie below the grid"),
    ):
        at_edge = {name: m["edges"][side] for name, m in summary["methods"].items() if m.get("edges", {}).get(side)}
        if at_edge:
            counts = ", ".join(f"{name} for {count}" for name, count in at_edge.items())
            sentences.append(
                f"The tuned prior precision was the {side} of the grid for some of the {_seeds(summary)} ({counts}): "
                f"{meaning}."
            )
    return sentences


def plus_minus(value: dict[str, Any], digits: int, *, sign: bool = False, scale: float = 1.0) -> str:
    """Mean ± standard error as text; the mean alone for a single seed."""
    mean, error = value["mean"] * scale, value["standard_error"]
    text = (f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}").replace("-", MINUS)
    return text if error is None else f"{text} ± {error * scale:.{digits}f}"


def _interval(entry: dict[str, Any], digits: int) -> str:
    if entry["interval"] is None:
        return ", too few for an error"
    low, high = (f"{value:+.{digits}f}".replace("-", MINUS) for value in entry["interval"])
    return f" (95 % interval {low} to {high}{'' if entry['shown'] else ', which holds zero'})"


def _seeds(summary: dict[str, Any]) -> str:
    count = len(summary["seeds"])
    return f"{count} seed{'s' * (count > 1)}"
