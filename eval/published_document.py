"""Tables of ``docs/published.md`` from the record that ``published.py`` writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from documents import markdown

from debiased_laplace.evaluation.report.numbers import number, plus_minus

#: CIFAR-10 test, as Ludvins/FixedMeanGaussianProcesses has them: NLL, ECE in %, seconds to train.
PUBLISHED = {
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
#: What was wanted of the best published methods: NLL, ECE in %, NLL of turned images.
AIMS = {"resnet20": (0.227, 0.8, 2.14), "resnet56": (0.183, 1.0, None)}
NAMES = {"resnet20": "ResNet-20", "resnet56": "ResNet-56"}
BEST, RULE, NONE = "temperature, best", "temperature, one standard error", "no temperature, best"
WAYS = {"best": BEST, "one s.e.": RULE, "no temperature": NONE}
DEFAULT, SHOWN_LINKS = "K-FAC, debiased", ("mean_field", "mc")
LINK_NAMES = {"probit": "probit", "mean_field": "mean field", "mc": "draws"}
#: The predictors that are compared with the published ones.
CHOSEN = {
    "identity, mean field": ("identity", "mean_field"), "K-FAC, mean field": (DEFAULT, "mean_field"),
    "K-FAC, draws": (DEFAULT, "mc"),
}  # fmt: skip
MINUTES = 10  # "minutes" of a fit
Z = 1.96  # standard errors in half of a 95 % interval


def parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the document."""
    return {
        "aims": aims(record), "tries": tries(record), "published": published(record), "rotated": rotated(record),
        "methods": methods(record), "calibration": calibrations(record), "costs": costs(record),
        "curvature": against(record, "identity", "test"),
        "curvature rotated": against(record, "identity", "rotated"),
        "debiasing": debiasing(record), "links": links(record),
    }  # fmt: skip


# -- cells ------------------------------------------------------------------------------------------------


def difference(of: Mapping[str, Any], other: str, digits: int = 4) -> str:
    """To another way to predict the same data, with its standard error."""
    return plus_minus(of[f"minus {other}"], digits, sign=True)


def calibration(of: Mapping[str, Any]) -> str:
    """The calibration error and its range by chance; bold where it is above."""
    low, high = of["ece by chance"]
    value = f"{100 * of['ece']:.2f}"
    return f"{f'**{value}**' if of['ece'] > high else value} ({100 * low:.1f} to {100 * high:.1f})"


def marked(way: Mapping[str, Any]) -> str:
    """Where at least half of the choices of prior precision or temperature are the least or largest tried."""
    return "".join(
        mark for mark, share in zip("\N{DAGGER}\N{DOUBLE DAGGER}", way["at an end"], strict=True) if share >= 0.5
    )


def counted(differences: Iterable[Sequence[float]]) -> str:
    """How many there are, and how many intervals leave out zero, of which some would by chance."""
    cells = list(differences)
    outside = sum(abs(value) > Z * error for value, error in cells)
    return (
        f"Of these {len(cells)} differences {outside} are more than {Z} standard errors from zero; if all were zero, "
        f"{0.05 * len(cells):.0f} would be by chance."
    )


def shown_ways(of: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of a posterior: mean field and draws, each by all three ways to tune."""
    return [of[f"{link}, {way}"] for link in SHOWN_LINKS for way in WAYS.values()]


def way_columns() -> list[str]:
    """Their names."""
    return [f"{LINK_NAMES[link]}, {way}" for link in SHOWN_LINKS for way in WAYS]


def each(record: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Name of the network, posterior, and what is known of it."""
    for name, of_network in record.items():
        for method, of in of_network["methods"].items():
            yield NAMES[name], method, of


# -- beside published numbers -------------------------------------------------------------------------------


def judgement(value: float, aim: float, error: float) -> str:
    """Whether an aim is met; narrowly if chance decides."""
    return f"{'yes' if value <= aim else 'no'}{', narrowly' if abs(value - aim) < Z * error else ''}"


def aims(record: Mapping[str, Any]) -> str:
    """What was wanted, and what came out."""
    rows = []
    for name, of_network in record.items():
        nll, ece, turned = AIMS[name]
        ways = {title: of_network["methods"][method][f"{link}, {BEST}"] for title, (method, link) in CHOSEN.items()}
        predictors = {"temperature scaling": of_network["points"]["temperature scaling"], **ways}
        gain = nll - PUBLISHED[name]["MAP"][0]
        made = {
            f"NLL at most {nll}": [decided(of["test"]["nll"], nll, 4) for of in predictors.values()],
            f"NLL minus MAP at most {number(gain, 4)}": [
                decided(of["test"]["minus MAP"], gain, 4) for of in predictors.values()
            ],
            f"ECE at most {ece} %": [of_calibration(of["test"], ece) for of in predictors.values()],
        }
        if turned is not None:
            made[f"NLL, turned, at most {turned}"] = [
                decided(of["rotated"]["nll"], turned, 2) for of in predictors.values()
            ]
        spent = [of_network["costs"].get(method) for method, _ in CHOSEN.values()]
        seconds = of_network["costs"]["gradient"]["seconds"]
        minutes = [None if cost is None else cost["fit"] * seconds / 60 for cost in spent]
        fits = ["" if spent is None else f"{spent:.2g} min: {judgement(spent, MINUTES, 0)}" for spent in minutes]
        made[f"a fit of at most {MINUTES} minutes"] = ["", *fits]
        rows += [[NAMES[name], aim, *cells] for aim, cells in made.items()]
    return markdown(["network", "aim", "temperature scaling", *CHOSEN], rows)


def decided(cell: Sequence[float], aim: float, digits: int) -> str:
    """A value and whether it is as small as wanted."""
    return f"{plus_minus(cell, digits)}: {judgement(cell[0], aim, cell[1])}"


def of_calibration(of: Mapping[str, Any], aim: float) -> str:
    """A calibration error; where chance alone makes more than was wanted, that decides."""
    met = 100 * of["ece"] <= aim
    beyond = not met and 100 * of["ece by chance"][0] > aim
    return f"{calibration(of)}: {'yes' if met else 'no'}{'; chance alone makes more' * beyond}"


def tries(record: Mapping[str, Any]) -> str:
    """What else was tried: links and rules for K-FAC, and all curvatures."""
    lines = []
    for name, of_network in record.items():
        of = of_network["methods"]
        turned = [("NLL of turned images", "rotated", 2)] if AIMS[name][2] is not None else []
        for what, condition, digits in (("NLL", "test", 4), *turned):
            links = [f"{title} {of[DEFAULT][f'{link}, {BEST}'][condition]['nll'][0]:.{digits}f}"
                     for link, title in LINK_NAMES.items()]  # fmt: skip
            rules = [f"{title} {of[DEFAULT][f'mc, {way}'][condition]['nll'][0]:.{digits}f}"
                     for title, way in WAYS.items()]  # fmt: skip
            found = {method: ways[f"mc, {BEST}"][condition]["nll"][0] for method, ways in of.items()}
            least, most = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
            curvatures = f"from {found[least]:.{digits}f} ({least}) to {found[most]:.{digits}f} ({most})"
            lines.append(
                f"* {NAMES[name]}, {what}. Links: {', '.join(links)}. Tuning, by draws: {', '.join(rules)}. "
                f"Curvatures, by draws: {curvatures}."
            )
        errors = [way["test"]["ece"] for ways in of.values() for way in ways.values()]
        chance = [way["test"]["ece by chance"][0] for ways in of.values() for way in ways.values()]
        lines.append(
            f"* {NAMES[name]}, ECE. All {len(errors)} combinations of curvature, link and tuning: "
            f"{100 * min(errors):.2f} to {100 * max(errors):.2f} %, where chance alone makes at least "
            f"{100 * min(chance):.1f} to {100 * max(chance):.1f} %."
        )
    return "\n".join(lines)


def published(record: Mapping[str, Any]) -> str:
    """Ours beside theirs: the network first, then differences to it."""
    rows = []
    for name, of_network in record.items():
        theirs, map_of = PUBLISHED[name], PUBLISHED[name]["MAP"]
        for method, (nll, ece, seconds) in theirs.items():
            cost = "" if seconds is None else f"{seconds:,} s"
            minus = "" if method == "MAP" else number(nll - map_of[0], 4, sign=True)
            rows.append([NAMES[name], f"{method}, published", f"{nll:.4f}", minus, f"{ece:.2f}", cost])
        ways = {title: of_network["methods"][method][f"{link}, {BEST}"] for title, (method, link) in CHOSEN.items()}
        for title, of in ({p: of_network["points"][p] for p in ("MAP", "temperature scaling")} | ways).items():
            test = of["test"]
            minus = "" if title == "MAP" else difference(test, "MAP")
            value = plus_minus(test["nll"], 4) + marked(of)
            rows.append([NAMES[name], f"**{title}, here**", value, minus, calibration(test), ""])
    return markdown(["network", "", "NLL", "minus its MAP", "ECE, % (by chance)", "trained for"], rows)


def rotated(record: Mapping[str, Any]) -> str:
    """Under rotation, tuned on data as they are, in all three ways."""
    rows = [
        ["ResNet-20", f"{method}, published", f"{nll:.2f} ({number(nll - ROTATED['MAP'], 2, sign=True)})", "", ""]
        for method, nll in ROTATED.items()
    ]
    for name, of_network in record.items():
        points = of_network["points"]
        scaled = [points["temperature scaling"], points["temperature, one standard error"], points["MAP"]]
        made = {"temperature scaling": scaled} | {
            f"{title}, {LINK_NAMES[link]}": [of_network["methods"][method][f"{link}, {way}"] for way in WAYS.values()]
            for title, method in (("identity", "identity"), ("K-FAC", DEFAULT))
            for link in SHOWN_LINKS
        }
        for title, ways in made.items():
            cells = [
                f"{plus_minus(way['rotated']['nll'], 2)} ({number(way['rotated']['minus MAP'][0], 2, sign=True)})"
                f"{marked(way)}" for way in ways
            ]  # fmt: skip
            rows.append([NAMES[name], f"**{title}, here**", *cells])
    return markdown(["network", "NLL, turned (minus its MAP)", *WAYS], rows)


# -- posteriors beside each other ---------------------------------------------------------------------------


def methods(record: Mapping[str, Any]) -> str:
    """Every posterior, minus temperature scaling."""
    rows = [
        [name, method, *(difference(way["test"], "temperature scaling") + marked(way) for way in shown_ways(of))]
        for name, method, of in each(record)
    ]
    count = counted(way["test"]["minus temperature scaling"] for *_, of in each(record) for way in shown_ways(of))
    return f"{markdown(['network', 'posterior', *way_columns()], rows)}\n\n{count}{unmeasured(record, 'methods')}"


def unmeasured(record: Mapping[str, Any], what: str) -> str:
    """Which posteriors one network has and another has not."""
    every = list(dict.fromkeys(method for of_network in record.values() for method in of_network[what]))
    lacking = {name: [m for m in every if m not in of_network[what]] for name, of_network in record.items()}
    return "".join(f" Not measured on {NAMES[name]}: {'; '.join(which)}." for name, which in lacking.items() if which)


def calibrations(record: Mapping[str, Any]) -> str:
    """Every posterior's calibration error."""
    rows = [[name, method, *(calibration(way["test"]) for way in shown_ways(of))] for name, method, of in each(record)]
    return markdown(["network", "posterior", *way_columns()], rows)


def costs(record: Mapping[str, Any]) -> str:
    """Of fits and predictions, in gradients and minutes."""
    rows, speeds = [], []
    for name, of_network in record.items():
        spent = dict(of_network["costs"])
        gradient = spent.pop("gradient")
        speeds.append(f"{NAMES[name]} {gradient['seconds']:.0f} s at {gradient['gigaflops']:.0f} GFLOP/s")
        for method in of_network["methods"]:
            if method in spent:
                both = [spent[method][part] for part in ("fit", "predictions")]
                minutes = [f"{gradients * gradient['seconds'] / 60:.2g}" for gradients in both]
                rows.append([NAMES[name], method, f"{both[0]:.2g}", minutes[0], f"{both[1]:.2g}", minutes[1]])
    columns = ["network", "posterior", "fit, gradients", "minutes", "10,000 predictions, gradients", "minutes"]
    said = f"One gradient of the 10,000 images at hand, in processor time of one thread: {'; '.join(speeds)}"
    said += f" in a single-precision product (`eval/speed.py`).{unmeasured(record, 'costs')}"
    return f"{said}\n\n{markdown(columns, rows)}"


def against(record: Mapping[str, Any], control: str, condition: str) -> str:
    """Every posterior minus the control, each at its own settings of the same kind."""
    digits = 4 if condition == "test" else 3
    others = [(name, method, of) for name, method, of in each(record) if method != control]
    rows = [
        [name, method, *(difference(way[condition], control, digits) for way in shown_ways(of))]
        for name, method, of in others
    ]
    count = counted(way[condition][f"minus {control}"] for *_, of in others for way in shown_ways(of))
    return f"{markdown(['network', 'posterior', *way_columns()], rows)}\n\n{count}"


def debiasing(record: Mapping[str, Any]) -> str:
    """The default posterior minus that of a single batch."""
    control, rows, cells = "K-FAC, single batch", [], []
    for name, method, of in each(record):
        if method == DEFAULT:
            for condition, title in (("test", "test"), ("rotated", "turned")):
                ways = [way[condition] for way in shown_ways(of)]
                rows.append([name, title, *(difference(way, control, 5) for way in ways)])
                cells += [way[f"minus {control}"] for way in ways]
    return f"{markdown(['network', 'images', *way_columns()], rows)}\n\n{counted(cells)}"


def links(record: Mapping[str, Any]) -> str:
    """What each of link, temperature and rule adds, for the default posterior."""
    rows = []
    for name, of_network in record.items():
        for way, of in of_network["methods"][DEFAULT].items():
            link, _, tuning = way.partition(", ")
            settings = [f"{of['prior precision']:.3g}", f"{of['temperature']:.2f}{marked(of)}"]
            cells = [
                plus_minus(of["test"]["nll"], 4), f"{of['test']['between halvings']:.4f}",
                difference(of["test"], "temperature scaling"), plus_minus(of["rotated"]["nll"], 2),
            ]  # fmt: skip
            rows.append([NAMES[name], LINK_NAMES[link], tuning, *cells, *settings])
    columns = ["network", "link", "tuned", "NLL", "between halvings", "minus temperature scaling", "turned", "prior"]
    return markdown([*columns, "temperature"], rows)
