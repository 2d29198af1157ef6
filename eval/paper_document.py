"""Tables of ``docs/paper.md`` from the record that ``paper.py`` writes, in the order of the paper's figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from documents import markdown
from paper_kfac import ALL, DEFAULT, IDENTITY, ONE, TWO, paired
from steps_document import median_and_range

from debiased_laplace.evaluation.bias.report import times

Record = Mapping[str, Any]
#: What a network's record is made of; its tables need that.
SUMMARIES: dict[str, Callable[[Any], Any]] = {}


# -- the record of the documents -------------------------------------------------------------------


def compact(whole: Record) -> dict[str, Any]:
    """Without what only the figures show."""
    return {
        name: {key: SUMMARIES.get(key, lambda entry: entry)(entry) for key, entry in of_network.items()}
        for name, of_network in whole.items()
    }


def directions_summary(record: Record) -> dict[str, Any]:
    planes = [
        {"batch": mean_curvature(plane["batch"]), "data": mean_curvature(plane["data"]),
         "steps": [plane[name]["step"] for name in ("batch", "data")]}
        for plane in record["figures"]["planes"]
    ]  # fmt: skip
    kept = {key: record[key] for key in ("n_data", "loss", "sizes", "settings")}
    return kept | {"planes": planes, "shown": shown_summary(record["figures"])}


def shown_summary(figures: Record) -> dict[str, Any]:
    """Of the batches in figures 2 to 4, one number each: what their many directions and their steps have."""
    curvatures = {key: np.array(of) for key, of in figures["directions"]["curvatures"].items()}
    own = np.einsum("mmk->mk", curvatures["batches"])
    others = (curvatures["batches"].sum(1) - own) / (len(own) - 1)
    overlaps = [np.array(block) for block in figures["alignment"][0][1:]]
    agree = [np.mean(np.array(run["uphill_others"]) == np.array(run["uphill"])) for run in figures["steps"]]
    return {
        "n_directions": own.shape[1],
        "ratio_own": [typical(of) for of in own / curvatures["data"]],
        "ratio_other": [typical(of) for of in others / curvatures["data"]],
        # Of the part of an eigenvector within the other batch's span, as if it were spread evenly over so many.
        "overlapping": [float(np.median(w.sum(1) ** 2 / (w**2).sum(1))) for w in overlaps],
        "largest_overlap": [float(np.median(w.max(1))) for w in overlaps],
        "within_span": [float(w.sum(1).mean()) for w in overlaps],
        "second_agrees": [float(share) for share in agree],
    }


def typical(ratios: Any) -> float:
    """Geometric mean."""
    return float(np.exp(np.log(ratios).mean()))


def mean_curvature(of: Record) -> float:
    """Geometric mean of the two curvatures on a plane."""
    return float(np.sqrt(np.linalg.det(np.array(of["curvatures"]))))


def figure5_summary(record: Record) -> dict[str, Any]:
    def of_runs(runs: Sequence[Record]) -> dict[str, Any]:
        return {
            f"{part} {key}, {when}": [pick(run[part][key]) for run in runs]
            for part in ("train", "test") for key in ("loss", "accuracy") for when, pick in picks(key).items()
        } | {"steps": [len(run["train"]["loss"]) - 1 for run in runs]}  # fmt: skip

    return {key: record[key] for key in ("n_train", "n_test", "settings")} | {
        "sizes": {
            size: {name: of_runs(of_method) for name, of_method in runs.items()}
            for size, runs in record["sizes"].items()
        }
    }


def picks(key: str) -> dict[str, Callable[[Sequence[float]], float]]:
    """Which numbers of a path are kept."""
    return {"start": lambda path: path[0], "end": lambda path: path[-1], "best": min if key == "loss" else max}


SUMMARIES |= {"directions": directions_summary, "figure5": figure5_summary}


# -- tables ----------------------------------------------------------------------------------------


def mean_and_error(values: Sequence[float], digits: int = 3) -> str:
    array = np.array(values)
    return f"{array.mean():.{digits}f} ± {array.std(ddof=1) / len(array) ** 0.5:.{digits}f}"


def shares(values: Sequence[float]) -> str:
    return f"{mean_and_error([100 * x for x in values], 0)} %"


def networks_table(record: Record) -> str:
    rows = []
    for of in record.values():
        facts = of["facts"]
        rows.append([
            of["title"], f"{facts['n_parameters']:,}", f"{facts['n_train']:,}", str(facts["epochs"]),
            *(f"{facts[part]['loss']:.3f}, {100 * facts[part]['accuracy']:.1f} %" for part in ("train", "test")),
            of["environment"]["device_name"],
        ])  # fmt: skip
    columns = ["network", "parameters", "training data", "epochs", "training loss, right", "test loss, right"]
    return markdown([*columns, "measured on"], rows)


def of_all(record: Record, part: str) -> list[tuple[str, Any]]:
    return [(of["title"], of[part]) for of in record.values() if part in of]


def figure1_table(record: Record) -> str:
    rows = []
    for title, of in of_all(record, "directions"):
        planes = of["planes"]
        ratios = [plane["batch"] / plane["data"] for plane in planes]
        steps = [plane["steps"][1] / plane["steps"][0] for plane in planes]
        rows.append([
            title, f"{np.mean([plane['batch'] for plane in planes]):.3g}",
            f"{np.mean([plane['data'] for plane in planes]):.3g}", median_and_range(ratios), median_and_range(steps),
        ])  # fmt: skip
    columns = ["network", "curvature of the batch", "of the data", "batch / data", "Newton step, data / batch"]
    return markdown(columns, rows)


def figure2_table(record: Record) -> str:
    rows = []
    for title, of in of_all(record, "directions"):
        for size, at in of["sizes"].items():
            first = {key: at["ratio_own"][key][0] for key in ("value", "error")}
            many = mean_and_error(of["shown"]["ratio_own"], 2) if int(size) == of["settings"]["shown"] else ""
            rows.append([
                title, f"{int(size):,}", times(first), times(at["typical_ratio_own"]), many,
                times(at["typical_ratio_other"]), times(at["slopes_data"]), f"{at['uphill']} of {at['of']}",
            ])  # fmt: skip
    columns = ["network", "batch", "first direction, same batch / data", "top ten", "top hundred",
               "top ten, second batch / data", "slopes, data / same batch", "uphill on the data"]  # fmt: skip
    return markdown(columns, rows)


def figure3_table(record: Record) -> str:
    rows = []
    for title, of in of_all(record, "directions"):
        for size, at in of["sizes"].items():
            is_shown, shown = int(size) == of["settings"]["shown"], of["shown"]
            rows.append([
                title, f"{int(size):,}", shares(at["within_span"]["of_batches"]),
                *((shares(shown["within_span"]), f"{np.mean(shown['overlapping']):.0f}",
                   f"{np.mean(shown['largest_overlap']):.3f}") if is_shown else ("", "", "")),
            ])  # fmt: skip
    columns = ["network", "batch", "top ten within another's top ten", "top hundred within another's top hundred",
               "spread over", "largest overlap, median"]  # fmt: skip
    return markdown(columns, rows)


def figure4_table(record: Record) -> str:
    rows = []
    for title, of in of_all(record, "directions"):
        for size, at in of["sizes"].items():
            steps = at["steps"]
            ratios = [data / own for run in steps for own, data in zip(run["own"], run["data"], strict=True)]
            typical = f"{median(ratios):.2f}" if ratios else ""
            agrees = shares(of["shown"]["second_agrees"]) if int(size) == of["settings"]["shown"] else ""
            rows.append([
                title, f"{int(size):,}",
                " of ".join(str(sum(run[key] for run in steps)) for key in ("uphill", "taken")),
                shares([run["uphill"] / run["taken"] for run in steps if run["taken"]]), typical, agrees,
            ])  # fmt: skip
    columns = ["network", "batch", "steps uphill on the data", "share", "step of the data / of the batch, median",
               "another batch has the data's sign"]  # fmt: skip
    return markdown(columns, rows)


def figure5_table(record: Record) -> str:
    rows = []
    for title, of in of_all(record, "figure5"):
        for size, runs in of["sizes"].items():
            one, two = runs["one batch"], runs["two batches"]
            for part in ("train", "test"):
                rows.append([
                    title, f"{int(size):,} / 2 x {int(size) // 2:,}", part, f"{one[f'{part} loss, start'][0]:.3f}",
                    *(median_and_range(method[f"{part} loss, {when}"]) for when in ("end", "best")
                      for method in (one, two)),
                ])  # fmt: skip
    columns = ["network", "data", "loss", "start", "one batch, end", "two batches, end", "one batch, best",
               "two batches, best"]  # fmt: skip
    return markdown(columns, rows)


def kfac_table(record: Record) -> str:
    rows = []
    for title, of in of_all(record, "kfac"):
        for budget, methods in of["fits"].items():
            for name, runs in methods.items():
                rows.append([
                    title, f"{int(budget):,}", name, f"{np.mean([run['seconds'] for run in runs]):.2f}",
                    *("" if np.isnan([run[key] for run in runs]).any()
                      else mean_and_error([run[key] for run in runs]) for key in ("distance", "log_ratio")),
                    *(mean_and_error([run[key] for run in runs], 4) for key in ("same", "prior", "both")),
                ])  # fmt: skip
        whole, identity, network = of[ALL], of[IDENTITY], of["network"]
        rows.append([title, f"{record_size(record, title):,}", ALL, f"{whole['seconds']:.2f}", "0", "0",
                     *(f"{whole[key]:.4f}" for key in ("same", "prior", "both"))])  # fmt: skip
        rows.append([title, "", IDENTITY, "", "", "", "", *(f"{identity[key]:.4f}" for key in ("prior", "both"))])
        rows.append([title, "", "network alone", "", "", "", f"{network['same']:.4f}", "", f"{network['both']:.4f}"])
    columns = ["network", "data", "curvature", "seconds", "distance to all data", "log ratio to all data",
               "NLL, same settings", "prior tuned", "prior and temperature tuned"]  # fmt: skip
    return markdown(columns, rows)


def record_size(record: Record, title: str) -> int:
    return next(of["facts"]["n_train"] for of in record.values() if of["title"] == title)


def differences_table(record: Record) -> str:
    """Of negative log likelihoods, in thousandths."""
    rows = []
    for title, of in of_all(record, "kfac"):
        for budget, methods in of["fits"].items():
            for name in (TWO, DEFAULT):
                found = [paired(methods, ONE, name, key) for key in ("same", "prior", "both")]
                rows.append([title, f"{int(budget):,}", f"{name} less {ONE}",
                             *(f"{1e3 * mean:.2f} ± {1e3 * error:.2f}" for mean, error in found)])  # fmt: skip
    return markdown(["network", "data", "NLL in thousandths", "same settings", "prior tuned", "both tuned"], rows)


#: The generated parts of the document, and what they need.
TABLES = {
    "networks": networks_table, "figure 1": figure1_table, "figure 2": figure2_table, "figure 3": figure3_table,
    "figure 4": figure4_table, "figure 5": figure5_table, "kfac": kfac_table, "kfac differences": differences_table,
}  # fmt: skip


def parts(record: Record) -> dict[str, str]:
    """The generated parts of the document, from its record."""
    return {name: make(record) for name, make in TABLES.items()}
