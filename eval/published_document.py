"""Tables of ``docs/published.md`` from the record that ``published.py`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from documents import markdown

from debiased_laplace.evaluation.report.numbers import number, plus_minus

#: CIFAR-10 test, as Ludvins/FixedMeanGaussianProcesses has them: NLL, ECE in %, seconds to train.
PUBLISHED: dict[str, dict[str, tuple[float, float, int | None]]] = {
    "resnet20": {
        "MAP": (0.2815, 3.90, None), "last layer, K-FAC (laplace-torch)": (0.2659, 2.39, None),
        "last layer, dense (laplace-torch)": (0.2566, 2.04, None), "ELLA": (0.2310, 0.83, 1003),
        "VaLLA": (0.2273, 1.31, 12083), "FMGP": (0.2275, 0.74, 917), "MFVI": (0.2222, 1.39, None),
    },
    "resnet56": {
        "MAP": (0.2523, 3.74, None), "last layer, K-FAC (laplace-torch)": (0.2037, 2.41, None),
        "last layer, dense (laplace-torch)": (0.2002, 1.52, None), "ELLA": (0.1910, 1.76, None),
        "VaLLA": (0.1837, 1.00, None), "FMGP": (0.1830, 0.96, None), "MFVI": (0.1823, 1.53, None),
    },
}  # fmt: skip
#: The same for test images turned by an angle between -60 and 60 degrees.
ROTATED = {"MAP": 3.10, "last layer, K-FAC (laplace-torch)": 2.89, "VaLLA": 2.28, "FMGP": 2.14}
NAMES = {"resnet20": "ResNet-20", "resnet56": "ResNet-56"}
BEST, RULE = "temperature, best", "temperature, one standard error"
DEFAULT, SHOWN_LINKS = "K-FAC, debiased", ("mean_field", "mc")


def parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the document."""
    return {
        "published": published(record), "methods": methods(record), "rotated": rotated(record),
        "links": links(record), "curvature": curvature(record),
    }  # fmt: skip


def difference(of: Mapping[str, Any], other: str, digits: int = 4) -> str:
    """To another way to predict the same data, with its standard error."""
    return plus_minus(of[f"minus {other}"], digits, sign=True)


def calibration(of: Mapping[str, Any]) -> str:
    """The calibration error, and that of a calibrated predictor."""
    _, _, low, high = of["ece if calibrated"]
    return f"{100 * of['ece']:.2f} ({100 * low:.1f} to {100 * high:.1f})"


def points_and(record: Mapping[str, Any], ways: Mapping[str, tuple[str, str]]) -> dict[str, Mapping[str, Any]]:
    """Rows of a network: the network itself, temperature scaling, and posteriors by method and way."""
    rows = {name: record["points"][name] for name in ("MAP", "temperature scaling")}
    return rows | {
        name: record["methods"][method][way] for name, (method, way) in ways.items() if method in record["methods"]
    }


def published(record: Mapping[str, Any]) -> str:
    """Ours beside theirs: the network first, then differences to it."""
    rows = []
    for name, of_network in record.items():
        theirs, map_of = PUBLISHED[name], PUBLISHED[name]["MAP"]
        for method, (nll, ece, seconds) in theirs.items():
            cost = "" if seconds is None else f"{seconds:,} s"
            minus = "" if method == "MAP" else number(nll - map_of[0], 4, sign=True)
            rows.append([NAMES[name], f"{method}, published", f"{nll:.4f}", minus, f"{ece:.2f}", cost])
        ways = {
            "identity, mean field": ("identity", f"mean_field, {BEST}"),
            "K-FAC, mean field": (DEFAULT, f"mean_field, {BEST}"),
            "K-FAC, draws": (DEFAULT, f"mc, {BEST}"),
        }
        for title, of in points_and(of_network, ways).items():
            test = of["test"]
            minus = "" if title == "MAP" else difference(test, "MAP")
            rows.append([NAMES[name], f"**{title}, here**", plus_minus(test["nll"], 4), minus, calibration(test), ""])
    return markdown(["network", "", "NLL", "minus its MAP", "ECE, % (if calibrated)", "trained for"], rows)


def methods(record: Mapping[str, Any]) -> str:
    """Every posterior with a tuned temperature, by the mean field and by draws."""
    rows = []
    for name, of_network in record.items():
        for method, of in of_network["methods"].items():
            cost = of_network.get("costs", {}).get(method, {})
            cells = [NAMES[name], method, *(f"{cost[part]:.2g}" if cost else "" for part in ("fit", "predictions"))]
            for link in SHOWN_LINKS:
                test = of[f"{link}, {BEST}"]["test"]
                cells += [difference(test, "temperature scaling"), calibration(test)]
            without = of["mean_field, no temperature, best"]["test"]
            rows.append([*cells, difference(without, "temperature scaling")])
    columns = ["network", "posterior", "fit costs", "predictions cost", "mean field", "ECE, %", "draws", "ECE, %"]
    return markdown([*columns, "mean field, no temperature"], rows)


def rotated(record: Mapping[str, Any]) -> str:
    """Under rotation, tuned on data as they are."""
    rows = []
    for method, nll in ROTATED.items():
        minus = "" if method == "MAP" else number(nll - ROTATED["MAP"], 2, sign=True)
        rows.append(["ResNet-20", f"{method}, published", f"{nll:.2f}", minus])
    for name, of_network in record.items():
        ways = {
            f"{title}, {link_name}, {rule_name}": (method, f"{link}, {rule}")
            for title, method in (("identity", "identity"), ("K-FAC", DEFAULT))
            for link, link_name in (("mean_field", "mean field"), ("mc", "draws"))
            for rule, rule_name in ((BEST, "best"), (RULE, "one standard error"))
        }
        of_points = points_and(of_network, ways)
        of_points["temperature, one standard error"] = of_network["points"]["temperature, one standard error"]
        for title, of in of_points.items():
            cell = of["rotated"]
            minus = "" if title == "MAP" else difference(cell, "MAP", 2)
            rows.append([NAMES[name], f"**{title}, here**", plus_minus(cell["nll"], 2), minus])
    return markdown(["network", "", "NLL, rotated", "minus its MAP"], rows)


def links(record: Mapping[str, Any]) -> str:
    """What each of link, temperature and rule adds, for the default posterior."""
    rows = []
    for name, of_network in record.items():
        for way, of in of_network["methods"][DEFAULT].items():
            settings = [f"{of['prior precision']:.3g}", f"{of['temperature']:.2f}"]
            cells = [plus_minus(of["test"]["nll"], 4), difference(of["test"], "temperature scaling")]
            rows.append([NAMES[name], way.replace("_", " "), *cells, plus_minus(of["rotated"]["nll"], 2), *settings])
    columns = [
        "network",
        "link, temperature, rule",
        "NLL",
        "minus temperature scaling",
        "rotated",
        "prior",
        "temperature",
    ]
    return markdown(columns, rows)


def curvature(record: Mapping[str, Any]) -> str:
    """Every posterior against the identity, each at its own best settings."""
    rows = []
    for name, of_network in record.items():
        for method, of in of_network["methods"].items():
            if method != "identity":
                ways = [of[f"{link}, {BEST}"] for link in SHOWN_LINKS]
                cells = [difference(way["test"], "identity") for way in ways]
                shifted = [difference(way["rotated"], "identity", 3) for way in ways]
                rows.append([NAMES[name], method, *cells, *shifted])
    columns = ["network", "posterior", "mean field", "draws", "rotated, mean field", "rotated, draws"]
    return markdown(columns, rows)
