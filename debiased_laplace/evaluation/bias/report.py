"""The finding of a bias study in sentences, tables, figures, and one page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from debiased_laplace.evaluation import pages, records
from debiased_laplace.evaluation.bias.pictures import pictures
from debiased_laplace.evaluation.tables import Table

__all__ = ["statement", "tables", "write_outputs"]

TEMPLATE = "bias.html.jinja"
Found = Mapping[str, Any]


def write_outputs(folder: Path | str, found: Found, *, notice: str = "") -> dict[str, Path]:
    """Write ``bias.json``, ``bias.md``, one PNG for each figure and ``bias.html``, each atomically.

    Args:
        folder: Made if it is missing.
        found: From :func:`~debiased_laplace.evaluation.bias.study`.
        notice: A warning shown above everything, such as that this was a quick run.

    Returns:
        The paths, by name.
    """
    folder, said, drawn = Path(folder), statement(found), pictures(found)
    title = f"The bias of mini-batches: {found['task']['name']}"
    page = pages.render(
        TEMPLATE, title=title, notice=notice, found=found, statement=said, tables=tables(found),
        pictures=list(drawn.values()), settings=pages.rows(found["settings"]),
        environments=found["environments"],
    )  # fmt: skip
    contents: dict[str, bytes | str] = {
        "bias.md": pages.markdown(title, said, found["task"]["description"], tables(found), notice=notice),
        **{f"bias-{name}.png": picture.png for name, picture in drawn.items()},
        "bias.html": page,
    }
    paths = {name: folder / name for name in ("bias.json", *contents)}
    own = {key: value for key, value in found.items() if key != "kept"}  # of this run alone
    records.write_json(paths["bias.json"], own | {"statement": said})
    for name, content in contents.items():
        records.write_whole(paths[name], content)
    return paths


# -- sentences -------------------------------------------------------------------------------------


def statement(found: Found) -> dict[str, Any]:
    """The finding in one sentence, and what else to know: ``answer`` and ``details``."""
    about, m = found["directions"]["curvatures"], found["directions"]["n_data"][0]
    own, other = about["typical_ratio_own"], about["typical_ratio_other"]
    k = len(about["ratio_own"]["value"])
    where = f"On {found['task']['name']}, batches of {m:,}"
    what = f"the {_kind(found)}'s curvature along their own top {k} directions"
    quantile = float(scipy.stats.t.ppf(0.975, len(found["directions"]["n_data"]) - 1))
    if None in (own["value"], own["error"], other["value"]):
        same, second, data = (np.mean(about[f"mean_{name}"]["value"]) for name in ("own", "other", "reference"))
        answer = (
            f"{where} measure {same:.3g} for {what}, on average, where the data have {data:.3g} and a second batch has "
            f"{second:.3g}; they have no common ratio, since not all are positive."
        )
    elif own["value"] - quantile * own["error"] > 1:
        answer = (
            f"{where} overstate {what} {times(own)} times (geometric mean); a second batch of the same size brings "
            f"that to {times(other)}."
        )
    else:
        answer = (
            f"{where} are not shown to overstate {what}: {times(own)} times that of the data (geometric mean); a "
            f"second batch has {times(other)}."
        )
    return {"answer": answer, "details": [*_details(found), *_steps(found), *_sizes(found)]}


def _kind(found: Found) -> str:
    return "Hessian" if found["settings"]["bias"]["curvature"] == "hessian" else "Gauss-Newton matrix"


def times(estimate: Found) -> str:
    """An estimate with its standard error, to the digits that this allows."""
    value, error = estimate["value"], estimate["error"]
    if value is None or error is None:
        return "?" if value is None else f"{value:.3g}"
    digits = min(4, max(1, 1 - math.floor(math.log10(error)))) if error > 0 else 2
    return f"{value:,.{digits}f} ± {error:,.{digits}f}"


def at(estimate: Found, k: int) -> Found:
    """An estimate of one direction."""
    return {key: values[k] for key, values in estimate.items()}


def shared_span(found: Found) -> float:
    """How much of a batch's top direction lies in the span of another's, in percent, on average."""
    sums = [total for entry in found["alignment"] if entry["first"] != entry["second"] for total in entry["row_sums"]]
    return 100 * sum(sums) / len(sums)


def uphill_steps(found: Found) -> list[bool]:
    """Whether a step of conjugate gradients goes uphill on the data, for all steps of all batches."""
    return [value for entry in found["steps"] for value in entry["uphill"]["reference"]]


def _details(found: Found) -> list[str]:
    ratio, slopes = found["directions"]["curvatures"]["ratio_own"], found["directions"]["slopes"]["reference"]
    k = len(ratio["value"])
    signs = [value > 0 for row in slopes for value in row]
    first, last = (times(at(ratio, rank)) for rank in (0, -1))
    return [
        f"The largest curvature alone is overstated {first} times, that along direction {k} {last}.",
        f"{sum(signs)} of {len(signs)} directions that go uphill on their own batch go uphill on the data; half would "
        "be chance.",
        f"On average {shared_span(found):.0f} % of a top direction of one batch lies in the span of another's top {k}.",
    ]


def _steps(found: Found) -> list[str]:
    entries = found["steps"]
    uphill = uphill_steps(found)
    if not uphill:
        return [f"Conjugate gradients took no step: {entries[0]['stopped']}."]
    pairs = [
        (value, right)
        for entry in entries
        for other in entry["uphill"]["others"]
        for value, right in zip(other, entry["uphill"]["reference"], strict=True)
    ]
    agree = 100 * sum(value == right for value, right in pairs) / len(pairs)
    early = sorted({entry["stopped"] for entry in entries if "curvature" in entry["stopped"]})
    said = (
        f"{sum(uphill)} of {len(uphill)} steps of conjugate gradients go uphill on the data; a second batch agrees "
        f"with them in {agree:.0f} % of the cases whether a step does."
    )
    return [said, *(f"Some runs ended early: {reason}." for reason in early)]


def _sizes(found: Found) -> list[str]:
    own, sizes = found["suggestion"], found["sizes"]["sizes"]
    predicted = own["predicted"]

    def seen(value: float | None) -> str:
        if value is None:
            return f"more than {sizes[-1]:,}"
        return f"at most {sizes[0]:,}" if value <= sizes[0] else f"about {value:,.0f}"

    measured = [seen(value) for value in own["measured"] or [None] * len(predicted)]
    theory = ["no size at all" if value is None else f"{value:,.0f}" for value in predicted]
    ranks = f"the top {len(theory)} directions, one after the other" if len(theory) > 1 else "the top direction"
    return [
        f"To overstate the curvature by no more than {100 * own['tolerance']:g} % along {ranks}, a batch needs "
        f"{'; '.join(measured)} data as measured, and {'; '.join(theory)} by spiked random-matrix theory."
    ]


# -- tables ----------------------------------------------------------------------------------------


def tables(found: Found) -> list[Table]:
    """Curvatures along the directions, and bias against batch size."""
    about, m = found["directions"]["curvatures"], found["directions"]["n_data"][0]
    n_batches = len(found["directions"]["n_data"])
    rows = [
        [f"{k + 1}", *(times(at(about[name], k))
                       for name in ("mean_own", "mean_other", "mean_reference", "ratio_own", "ratio_other"))]
        for k in range(len(about["ratio_own"]["value"]))
    ]  # fmt: skip
    for title, key in (("geometric mean", "typical"), ("sums", "total")):
        rows.append([title, "", "", "", *(times(about[f"{key}_ratio_{which}"]) for which in ("own", "other"))])
    sizes = found["sizes"]
    return [
        Table(
            "Curvature along a batch's own top directions",
            f"Means over {n_batches} batches of {m:,} with their jackknife standard error. One is "
            f"no bias. The data are {found['task']['n_reference']:,} of {found['task']['n_seen']:,} training data.",
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


def _size_row(sizes: Found, index: int) -> list[str]:
    def cell(k: int) -> str:
        own = times(at(at(sizes["overstatement"], index), k))
        theory = sizes["predictions"][index]["overstatement"][k]
        return f"{own} (lost)" if theory is None else f"{own} ({theory:.3g})"

    return [f"{sizes['sizes'][index]:,}", *(cell(k) for k in range(len(sizes["reference_eigenvalues"])))]
