"""The finding of a bias study in sentences, tables, figures, and one page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from debiased_laplace.evaluation import records
from debiased_laplace.evaluation.bias.measure import Record
from debiased_laplace.evaluation.bias.pictures import pictures
from debiased_laplace.evaluation.report import pages
from debiased_laplace.evaluation.report.table import Table
from debiased_laplace.evaluation.scores.intervals import CONFIDENCE, student_quantile

__all__ = ["deciding_table", "findings", "statement", "tables", "write_outputs"]

TEMPLATE = "bias.html.jinja"


def write_outputs(folder: Path | str, record: Record, *, notice: str = "") -> dict[str, Path]:
    """Write ``bias.json``, ``bias.md``, one PNG for each figure and ``bias.html``, each atomically.

    Args:
        folder: Made if it is missing.
        record: From :func:`~debiased_laplace.evaluation.bias.study`.
        notice: A warning shown above everything, such as that this was a quick run.

    Returns:
        The paths, by name.
    """
    folder, said, drawn = Path(folder), statement(record), pictures(record)
    title = f"The bias of mini-batches: {record['task']['name']}"
    page = pages.render(
        TEMPLATE, title=title, notice=notice, record=record, statement=said, decides=deciding_table(record),
        tables=tables(record), pictures=drawn, findings=findings(record),
        settings=pages.rows(record["settings"]), environments=record["environments"],
    )  # fmt: skip
    notes = [*findings(record).values(), record["task"]["description"]]
    every = [deciding_table(record), *tables(record)]
    contents: dict[str, bytes | str] = {
        "bias.md": pages.markdown(title, said, notes, every, notice=notice),
        **{f"bias-{name}.png": picture.png for name, picture in drawn.items()},
        "bias.html": page,
    }
    paths = {name: folder / name for name in ("bias.json", *contents)}
    kept = {key: value for key, value in record.items() if key != "kept"}  # of this run alone
    records.write_json(paths["bias.json"], kept | {"statement": said})
    for name, content in contents.items():
        records.write_whole(paths[name], content)
    return paths


# -- the answer ------------------------------------------------------------------------------------


def statement(record: Record) -> dict[str, Any]:
    """The finding in one sentence, and the batch that would do: ``answer`` and ``details``."""
    about, m = record["directions"]["curvatures"], record["directions"]["n_data"][0]
    same_batch, other = about["typical_ratio_own"], about["typical_ratio_other"]
    k = len(about["ratio_own"]["value"])
    where = f"On {record['task']['name']}, batches of {m:,}"
    what = f"the {_kind(record)}'s curvature along their own top {k} directions"
    verdict = _verdict(record, same_batch)
    if verdict is None or other["value"] is None:
        same, second, data = (np.mean(about[f"mean_{name}"]["value"]) for name in ("own", "other", "reference"))
        answer = (
            f"{where} measure {same:.3g} for {what}, on average, where the data have {data:.3g} and a second batch has "
            f"{second:.3g}; they have no common ratio, since not all are positive."
        )
    elif verdict == OVERSTATED:
        answer = (
            f"{where} overstate {what} {times(same_batch)} times (geometric mean); a second batch of the same size "
            f"brings that to {times(other)}."
        )
    else:
        answer = (
            f"{where} are not shown to overstate {what}: {times(same_batch)} times that of the data (geometric mean); "
            f"a second batch has {times(other)}."
        )
    return {"answer": answer, "details": [_enough(record)]}


def deciding_table(record: Record) -> Table:
    """Curvatures over those of the data, of the first and the last direction and typically."""
    about = record["directions"]["curvatures"]
    k = len(about["ratio_own"]["value"])
    pairs = {
        "Top direction": [at(about[f"ratio_{which}"], 0) for which in ("own", "other")],
        f"Direction {k}": [at(about[f"ratio_{which}"], -1) for which in ("own", "other")],
        f"Top {k}, typically": [about[f"typical_ratio_{which}"] for which in ("own", "other")],
    }
    return Table(
        "Curvature along a batch's own directions, times that of the data",
        "One would be right. Typically: the geometric mean. Errors are standard errors over batches; overstated or "
        "understated is said only where the 95 % interval leaves out one.",
        ["", "measured on the same batch", "on a second batch", "the same batch is"],
        [("", [[title, times(same), times(other), _verdict(record, same) or "? has no ratio"]
               for title, (same, other) in pairs.items()])],
    )  # fmt: skip


#: What is said of the curvature of the same batch.
OVERSTATED, UNDERSTATED, NEITHER = "✗ overstated", "✗ understated", "○ not shown to be biased"


def _verdict(record: Record, ratio: Record) -> str | None:
    """By Student's t over batches; None for what has no ratio or no error."""
    if ratio["value"] is None or ratio["error"] is None:
        return None
    half = student_quantile(len(record["directions"]["n_data"]), CONFIDENCE) * ratio["error"]
    return OVERSTATED if ratio["value"] - half > 1 else UNDERSTATED if ratio["value"] + half < 1 else NEITHER


def _kind(record: Record) -> str:
    return "Hessian" if record["settings"]["bias"]["curvature"] == "hessian" else "Gauss-Newton matrix"


def times(estimate: Record) -> str:
    """An estimate with its standard error, to the digits that this allows."""
    value, error = estimate["value"], estimate["error"]
    if value is None or error is None:
        return "?" if value is None else f"{value:.3g}"
    digits = min(4, max(1, 1 - math.floor(math.log10(error)))) if error > 0 else 2
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def at(estimate: Record, k: int) -> Record:
    """An estimate of one direction."""
    return {key: values[k] for key, values in estimate.items()}


def shared_span(record: Record) -> float:
    """How much of a batch's top direction lies in the span of another's, in percent, on average."""
    sums = [total for entry in record["alignment"] if entry["first"] != entry["second"] for total in entry["row_sums"]]
    return 100 * sum(sums) / len(sums)


def uphill_steps(record: Record) -> list[bool]:
    """Whether a step of conjugate gradients goes uphill on the data, for all steps of all batches."""
    return [value for entry in record["steps"] for value in entry["uphill"]["reference"]]


def findings(record: Record) -> dict[str, str]:
    """What figures show, in a sentence each, by the names of :func:`~.pictures.pictures`."""
    k, uphill = len(record["directions"]["curvatures"]["ratio_own"]["value"]), uphill_steps(record)
    signs = [value > 0 for row in record["directions"]["slopes"]["reference"] for value in row]
    steps = f"Conjugate gradients took no step: {record['steps'][0]['stopped']}."
    if uphill:
        agree = [
            value == right
            for entry in record["steps"]
            for other in entry["uphill"]["others"]
            for value, right in zip(other, entry["uphill"]["reference"], strict=True)
        ]
        early = sorted({entry["stopped"] for entry in record["steps"] if "curvature" in entry["stopped"]})
        steps = (
            f"{sum(uphill)} of {len(uphill)} steps of conjugate gradients go uphill on the data; a second batch agrees "
            f"with them in {100 * sum(agree) / len(agree):.0f} % of the cases whether a step does."
        ) + "".join(f" Some runs ended early: {reason}." for reason in early)
    return {
        "directions": f"{sum(signs)} of {len(signs)} directions that go uphill on their own batch go uphill on the "
        "data; half would be chance.",
        "alignment": f"On average {shared_span(record):.0f} % of a top direction of one batch lies in the span of "
        f"another's top {k}.",
        "steps": steps,
    }


def _enough(record: Record) -> str:
    """The batch that overstates by no more than is tolerated."""
    suggestion, sizes = record["suggestion"], record["sizes"]["sizes"]
    predicted = suggestion["predicted"]

    def seen(value: float | None) -> str:
        if value is None:
            return f"more than {sizes[-1]:,}"
        return f"at most {sizes[0]:,}" if value <= sizes[0] else f"about {value:,.0f}"

    measured = [seen(value) for value in suggestion["measured"] or [None] * len(predicted)]
    theory = ["no size at all" if value is None else f"{value:,.0f}" for value in predicted]
    ranks = f"the top {len(theory)} directions, one after the other" if len(theory) > 1 else "the top direction"
    return (
        f"To overstate the curvature by no more than {100 * suggestion['tolerance']:g} % along {ranks}, a batch needs "
        f"{'; '.join(measured)} data as measured, and {'; '.join(theory)} by spiked random-matrix theory."
    )


# -- tables ----------------------------------------------------------------------------------------


def tables(record: Record) -> list[Table]:
    """Curvatures along the directions, and bias against batch size."""
    about, m = record["directions"]["curvatures"], record["directions"]["n_data"][0]
    n_batches = len(record["directions"]["n_data"])
    rows = [
        [f"{k + 1}", *(times(at(about[name], k))
                       for name in ("mean_own", "mean_other", "mean_reference", "ratio_own", "ratio_other"))]
        for k in range(len(about["ratio_own"]["value"]))
    ]  # fmt: skip
    for title, key in (("geometric mean", "typical"), ("sums", "total")):
        rows.append([title, "", "", "", *(times(about[f"{key}_ratio_{which}"]) for which in ("own", "other"))])
    sizes = record["sizes"]
    return [
        Table(
            "Curvature along a batch's own top directions",
            f"Means over {n_batches} batches of {m:,} with their jackknife standard error. One is "
            f"no bias. The data are {record['task']['n_reference']:,} of {record['task']['n_seen']:,} training data.",
            ["direction", "same batch", "other batches", "data", "same / data", "other / data"],
            [("", rows)],
        ),
        Table(
            "Bias against batch size",
            "Curvature of a batch along its own direction over that of the data along the same; in brackets what "
            "spiked random-matrix theory predicts, where the direction is not lost in noise.",
            ["batch size", *(f"direction {k + 1}" for k in range(len(sizes["reference_eigenvalues"])))],
            [("", [_size_row(sizes, index) for index in range(len(sizes["sizes"]))])],
        ),
    ]  # fmt: skip


def _size_row(sizes: Record, index: int) -> list[str]:
    def cell(k: int) -> str:
        measured = times(at(at(sizes["overstatement"], index), k))
        theory = sizes["predictions"][index]["overstatement"][k]
        return f"{measured} (lost)" if theory is None else f"{measured} ({theory:.3g})"

    return [f"{sizes['sizes'][index]:,}", *(cell(k) for k in range(len(sizes["reference_eigenvalues"])))]
