"""The answer to "does it help?": one sentence, the few numbers that decide, and what else to know.

The page, the terminal and the Markdown open with it; everything else is in :mod:`.tables`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from debiased_laplace.evaluation.judge.conditions import STRONG
from debiased_laplace.evaluation.methods import CHOSEN_ON, MAP, TEMPERATURE, TEMPERATURE_RULE
from debiased_laplace.evaluation.report.numbers import number, plus_minus, seeds, unit, with_interval
from debiased_laplace.evaluation.report.table import Table
from debiased_laplace.evaluation.report.verdicts import HOW, MARK, Summary, by_role, comparisons, judged_in

#: Title, number of digits, factor and meaning of the scores that decide.
DECIDING = {
    "nll": ("Loss (NLL)", 3, 1.0, "NLL: minus the logarithm of the probability (or density) of the right answer"),
    "ece": ("Calibration error, ECE %", 1, 100.0, "ECE: how far the confidence is from the share that is right"),
    "crps": ("CRPS, in units of the target", 3, 1.0, "CRPS: the absolute error, for a whole distribution"),
    "calibration_error": (
        "Interval calibration error, %", 1, 100.0,
        "interval calibration error: how far the share of targets in an interval is from the stated one",
    ),
    "maximum probability, auroc": (
        "AUROC, %", 1, 100.0,
        "AUROC: how often an unknown input is less confident than one of the test data, 50 by chance",
    ),
}  # fmt: skip
#: At numbers of the temperature that is chosen by the rule of the posteriors.
SAME_RULE = "*"


def statement(summary: Summary) -> dict[str, Any]:
    """The answer in one sentence for everybody, and the numbers behind it.

    Args:
        summary: From :func:`~debiased_laplace.evaluation.report.summary.summarise`.

    Returns:
        ``answer``, a sentence; ``rows``, at most four: ``score``, ``on`` (which data), ``value`` of the candidate, and
        ``against``, for every other method its ``value``, the ``difference`` and the ``verdict``; ``details``,
        sentences about what debiasing changes, data that are not there and methods that failed.
    """
    candidate = by_role(summary, "candidate")
    rows = [] if candidate is None else _rows(summary, candidate)
    details = [] if candidate is None else [*_effect(summary, candidate), *_missing(summary)]
    return {
        "answer": _answer(summary, candidate, rows),
        "rows": rows,
        "details": [*details, *failures(summary)],
    }


def deciding_table(summary: Summary) -> Table | None:
    """The numbers that decide; none without a candidate."""
    candidate = by_role(summary, "candidate")
    rows = [] if candidate is None else _rows(summary, candidate)
    if not rows or candidate is None:
        return None
    seconds = list(dict.fromkeys(_column(name) for row in rows for name in row["against"]))
    return Table(
        "The numbers that decide", _caption(rows),
        ["", candidate, *(f"against {'the network' if second == MAP else second}" for second in seconds)],
        [("", [[_title(summary, row), _value(row), *(_against(row, second) for second in seconds)] for row in rows])],
    )  # fmt: skip


def _rows(summary: Summary, candidate: str) -> list[dict[str, Any]]:
    """At most four: two or three scores on test data, strong shift, out-of-distribution data."""
    test, strong, ood = summary["test"], summary["strong_shift"], summary["ood"]
    on_test = ("nll", "crps", "calibration_error") if summary["regression"] else ("nll", "ece")
    wanted = [("test data", test, score) for score in on_test]
    wanted += [("strong shift", strong, "nll")] if strong is not None else []
    wanted += [(entry["name"], entry, "maximum probability, auroc") for entry in ood[:1]]
    rows = []
    for on, entry, score in wanted:
        if score not in entry["scores"].get(candidate, {}):
            continue  # it failed there
        # Away from the training data it is harder to be better than the temperature that leaves more uncertainty.
        temperatures = (TEMPERATURE, TEMPERATURE_RULE) if entry is test else (TEMPERATURE_RULE, TEMPERATURE)
        seconds = [MAP, *[name for name in temperatures if name in entry["scores"]][:1]]
        differences = {second: entry["differences"].get(second, {}).get(candidate, {}).get(score) for second in seconds}
        against = {
            second: {
                "value": entry["scores"][second][score], "difference": cell,
                "verdict": judged_in(entry, score, cell, candidate, second),
            }
            for second, cell in differences.items()
            if cell is not None
        }  # fmt: skip
        rows.append({"score": score, "on": on, "value": entry["scores"][candidate][score], "against": against})
    return rows


# -- as text ---------------------------------------------------------------------------------------


def _answer(summary: Summary, candidate: str | None, rows: Sequence[Mapping[str, Any]]) -> str:
    name = summary["task"]["name"]
    if candidate is None:
        failed = [name for name, about in summary["predictors"].items() if about["role"] == "candidate"]
        why = f"{failed[0]} did not run" if failed else "none is marked as a candidate"
        return f"The tables show each method by itself: {why}."
    what = "predictive distributions" if summary["regression"] else "probabilities"
    said = [_compared(summary, row["against"]) for row in rows if row["score"] == "nll" and row["against"]]
    if not said:
        return f"On {name} there is nothing to compare {candidate} with."
    answer = f"On the test data of {name}, the {what} of {candidate} are {said[0]}"
    for there in said[1:]:
        same = there == said[0]
        answer += "; the same holds under strong shift" if same else f"; under strong shift they are {there}"
    if summary["regression"]:
        held = plus_minus(summary["test"]["scores"][candidate]["coverage_95"], 1, scale=100)
        answer += f"; the 95 % intervals hold {held} % of the targets"
    return answer + "."


def _compared(summary: Summary, against: Mapping[str, Mapping[str, Any]]) -> str:
    """The verdicts in words; methods with the same one together."""
    own = "those of the network with one noise level for all inputs" if summary["regression"] else "the network's own"
    together: dict[str, list[str]] = {}
    for second, about in against.items():
        whose = own if second == MAP else f"those of {TEMPERATURE}"
        together.setdefault(HOW[about["verdict"]], []).append(whose)
    return " but ".join(f"{how} {' and '.join(whose)}" for how, whose in together.items())


def _title(summary: Summary, row: Mapping[str, Any]) -> str:
    title, lower = DECIDING[row["score"]][0], "lower is better"
    if row["score"].endswith("auroc"):
        several = f" (first of {len(summary['ood'])} sets)" if len(summary["ood"]) > 1 else ""
        return f"Telling {row['on']} apart{several}\n{title}, higher is better"
    if row["on"] == "strong shift":
        return f"{title}, strong shift\nmean of {len(summary['strong_shift']['shifts'])}, {lower}"
    return f"{title}\n{lower}"


def _value(row: Mapping[str, Any]) -> str:
    _, digits, scale, _ = DECIDING[row["score"]]
    return plus_minus(row["value"], digits, scale=scale)


def _against(row: Mapping[str, Any], second: str) -> str:
    """Such as ``"✓ better than 0.31"`` and, in a second line, the difference."""
    _, digits, scale, _ = DECIDING[row["score"]]
    for name, about in row["against"].items():
        if _column(name) == second:
            mark = f" {SAME_RULE}" if name == TEMPERATURE_RULE else ""
            value = number(about["value"][0], digits, scale=scale)
            verdict = f"{MARK[about['verdict']]} {HOW[about['verdict']]} {value}{mark}"
            return f"{verdict}\n{with_interval(about['difference'], digits, scale=scale)}"
    return ""


def _column(name: str) -> str:
    """Both temperatures are in one."""
    return MAP if name == MAP else TEMPERATURE


def _caption(rows: Sequence[Mapping[str, Any]]) -> str:
    every = [(name, about["verdict"]) for row in rows for name, about in row["against"].items()]
    meanings = "; ".join(dict.fromkeys(DECIDING[row["score"]][3] for row in rows))
    said = [
        f"{meanings}.",
        "Below each verdict: the difference and its 95 % interval; better or worse only where that leaves out zero, "
        "practically as good only where all of it is within 0.001 (or 0.1 %, also of a score in units).",
    ]
    if any(verdict == "both as if calibrated" for _, verdict in every):
        said.append("As well calibrated: both errors are within what calibrated probabilities have on so many data.")
    if any(name == TEMPERATURE_RULE for name, _ in every):
        said.append(
            f"{SAME_RULE} The largest temperature that the validation data do not tell from the best, as the posterior "
            "is tuned too; it is harder to do better away from the training data."
        )
    return " ".join(said)


# -- what else to know -----------------------------------------------------------------------------


def _effect(summary: Summary, candidate: str) -> list[str]:
    """What debiasing changes, which tuning may hide from every score: uncertainties before they are tuned."""
    log_ratios, baseline = summary["distances"].get("equal", {}), by_role(summary, "baseline")
    if candidate not in log_ratios or baseline not in log_ratios:
        return []
    with np.errstate(over="ignore"):
        factors = [(float(np.exp(log_ratios[name]["absolute"][0])), name) for name in (candidate, baseline)]
    said = " and ".join(f"{number(factor, 2)} with {name}" for factor, name in factors)
    return [
        f"At prior precision {log_ratios['prior_precision'][0]:g}, output variances differ from those of all the "
        f"training data by a typical factor of {said}."
    ]


def _missing(summary: Summary) -> list[str]:
    """Data that would answer more, and how to give them."""
    sentences = []
    if summary["strong_shift"] is None:
        strong = f" of severity {STRONG} or more" if summary["shifts"] else ""
        sentences.append(
            f"No shifted data{strong} were given: add shifted_loaders() to the task file to see how the uncertainty "
            "holds up when inputs change."
        )
    if not summary["ood"] and not summary["regression"]:
        sentences.append(
            "No out-of-distribution data were given: add ood_loaders() to the task file to see whether unknown inputs "
            "are noticed."
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
            sentences.append(f"{name} did not run{rest}: {'; '.join(about['failed']).rstrip('.')}.")
    return sentences


def protocol(summary: Summary) -> list[str]:
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
    detections = [row for row in statement(summary)["rows"] if row["score"].endswith("auroc")]
    count = comparisons(summary) + sum(len(row["against"]) for row in detections)
    if count:
        sentences.append(
            f"The tables make {count} comparisons with a verdict, each at 95 %: about {max(1, round(count / 20))} "
            "would be beyond by chance if nothing differed."
        )
    return sentences
