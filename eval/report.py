"""Tables and figures of ``docs/fidelity.md`` from the records of ``eval/fidelity.py``.

    python eval/report.py [--results eval/results] [--docs docs]

Every number that the tables need is written to ``<docs>/records/fidelity.json``, beside what is there of other
networks, and they are made from there: what lies between ``<!-- table NAME -->`` and ``<!-- end -->`` in the document
is replaced; the text around it stays.
The file is long because each of ten tables has a function.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from documents import fill, markdown, save_small
from fidelity import ABLATION, DEFAULT, MAIN, ONE, TWO

from debiased_laplace.evaluation.records import encode, read_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NETWORKS = {
    "digits-cnn": "CNN on digits",
    "digits-mlp": "MLP on digits",
    "digits-transformer": "Transformer on digits",
    "lenet": "LeNet on Fashion-MNIST",
    "vit": "ViT on Fashion-MNIST",
    "trec": "Transformer on TREC",
    "resnet20": "ResNet-20 on CIFAR-10",
    "resnet56": "ResNet-56 on CIFAR-10",
}
#: Colour, marker and line of the main methods: apart in grey and for the colour-blind (Okabe and Ito).
STYLES = {ONE: ("#D55E00", "s", "--"), TWO: ("#0072B2", "^", "-."), DEFAULT: ("#000000", "o", "-")}

Key = tuple[str, str, str, int]  # network, structure, method, budget


def load(folder: Path) -> dict[Key, list[dict[str, Any]]]:
    """Records of all seeds."""
    by_key: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        by_key[key_of(record)].append(record)
    if not by_key:
        sys.exit(f"Expected records in {folder}, found none. Run eval/fidelity.py first.")
    return by_key


def key_of(entry: Mapping[str, Any]) -> Key:
    """What an entry of ``fidelity.json``, or the record of a run, is about."""
    return entry["network"], entry["structure"], entry["method"], entry["budget"]


def statistics(records: Sequence[dict[str, Any]], *path: str) -> dict[str, float] | None:
    """Mean, standard error and number of a field over seeds."""
    values = []
    for record in records:
        value: Any = record
        for name in path:
            value = value.get(name) if value is not None else None
        if value is not None:
            values.append(float(value))
    if not values:
        return None
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return {"mean": float(np.mean(values)), "se": error, "n": len(values), "min": min(values), "max": max(values)}


class Records:
    """What the tables ask for."""

    def __init__(self, by_key: dict[Key, list[dict[str, Any]]]) -> None:
        self.by_key = by_key

    @classmethod
    def of_entries(cls, entries: Iterable[Mapping[str, Any]]) -> Records:
        """Those of ``fidelity.json``."""
        return cls({key_of(entry): entry["records"] for entry in entries})

    def of(self, network: str, structure: str, method: str, budget: int, *path: str) -> dict[str, float] | None:
        """Statistics of a field."""
        return statistics(self.by_key.get((network, structure, method, budget), []), *path)

    def error(self, network: str, method: str, budget: int, prior: str, structure: str = "kron") -> float | None:
        """Mean absolute log ratio of the variances."""
        cell = self.of(network, structure, method, budget, "priors", prior, "abs_log_ratio")
        return None if cell is None else cell["mean"]

    def pool(self, network: str) -> int:
        """Number of data to draw from."""
        return next(records[0]["n_pool"] for key, records in self.by_key.items() if key[0] == network)

    def by_seed(self, network: str, structure: str, method: str, budget: int, prior: str) -> dict[int, float]:
        """The error of every seed."""
        records = self.by_key.get((network, structure, method, budget), [])
        return {record["seed"]: record["priors"][prior]["abs_log_ratio"] for record in records}

    def networks(self, structure: str = "kron") -> list[str]:
        """Those with records, in the order of the document."""
        return [name for name in NETWORKS if any(key[:2] == (name, structure) for key in self.by_key)]

    def budgets(self, network: str, structure: str = "kron", method: str = DEFAULT) -> list[int]:
        """Of one network."""
        return sorted({key[3] for key in self.by_key if key[:3] == (network, structure, method)})


def number(cell: dict[str, float] | None, digits: int = 3, signed: bool = False) -> str:
    """Mean and standard error."""
    if cell is None:
        return ""
    sign = "+" if signed else ""
    return f"{cell['mean']:{sign}.{digits}f} ± {cell['se']:.{digits}f}"


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return float(np.exp(np.mean(np.log(values))))


def main_table(records: Records, prior: str) -> str:
    """Error of the main methods for every network and budget."""
    rows = []
    for network in records.networks():
        for budget in records.budgets(network):
            cells = {m: records.of(network, "kron", m, budget, "priors", prior, "abs_log_ratio") for m in MAIN}
            bias = records.of(network, "kron", DEFAULT, budget, "priors", prior, "log_ratio")
            two, default = cells[TWO], cells[DEFAULT]
            ratio = f"{default['mean'] / two['mean']:.3f}" if two and default and two["mean"] > 0 else ""
            rows.append([
                NETWORKS[network], str(budget), *(number(cells[m], 4) for m in MAIN), number(bias, 4, signed=True),
                ratio,
            ])  # fmt: skip
    head = ["network", "budget", *MAIN, "default, signed", "default / two batches"]
    return markdown(head, rows)


def claims(records: Records) -> str:
    """What was wanted, and what the records say."""
    rows = []
    for prior in ("1", "tuned"):
        for budget, wanted in ((128, 0.02), (512, 0.005)):
            cell = records.of("resnet20", "kron", DEFAULT, budget, "priors", prior, "abs_log_ratio")
            if cell:
                rows.append([
                    f"ResNet-20, K-FAC, {budget} samples, default, prior precision {prior}", f"at most {wanted}",
                    number(cell, 4), "yes" if cell["mean"] <= wanted else "no",
                ])  # fmt: skip
        against_two, against_best, sparse, worse = [], [], [], []
        for network in records.networks():
            for budget in records.budgets(network):
                default, two, one = (records.error(network, m, budget, prior) for m in (DEFAULT, TWO, ONE))
                if default is None or two is None or one is None:
                    continue
                if min(default, two) > 1e-9:  # all data are no comparison
                    against_two.append(default / two)
                    against_best.append(default / min(one, two))
                    if budget <= records.pool(network) / 5:
                        sparse.append(default / two)
                if default > one * (1 + 1e-9):
                    worse.append(f"{NETWORKS[network]}, {budget}")
        for what, ratios, wanted in (
            ("uniform two batches", against_two, "at most 0.2"),
            ("uniform two batches, budgets up to a fifth of the pool", sparse, ""),
            ("the better of one and two uniform batches", against_best, ""),
        ):
            if ratios:
                mean = geometric_mean(ratios)
                rows.append([
                    f"default / {what}, geometric mean of {len(ratios)} cells, prior precision {prior}", wanted,
                    f"{mean:.3f}", ("yes" if mean <= 0.2 else "no") if wanted else "",
                ])  # fmt: skip
        if against_two:
            rows.append([
                f"default against one uniform batch, prior precision {prior}", "never worse",
                "worse for " + "; ".join(worse) if worse else "better everywhere", "no" if worse else "yes",
            ])  # fmt: skip
    return markdown(["claim", "wanted", "measured", "holds"], rows)


def ablation(records: Records, prior: str = "1") -> str:
    """Geometric means over the networks that have every method of the error relative to the default's, seed by seed."""
    budgets = (8, 32, 128)
    rows = []
    for method in [*MAIN, *ABLATION]:
        cells = []
        for budget in budgets:
            ratios = []
            for network in records.networks():
                errors = records.by_seed(network, "kron", method, budget, prior)
                default = records.by_seed(network, "kron", DEFAULT, budget, prior)
                seeds = errors.keys() & default.keys()
                if seeds and records.by_seed(network, "kron", "priority, cross-fit, factored", budget, prior):
                    ratios.append(sum(errors[s] for s in seeds) / sum(default[s] for s in seeds))
            if ratios:
                error = np.std(np.log(ratios), ddof=1) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
                cells.append(f"{geometric_mean(ratios):.2f} ± {100 * math.expm1(error):.0f} % ({len(ratios)})")
            else:
                cells.append("")
        rows.append([method, *cells])
    return markdown(["error relative to the default's", *(f"budget {b}" for b in budgets)], rows)


def predictions(records: Records) -> str:
    """Differences of predictions to those of the full-data posterior, at its tuned prior precision."""
    rows = []
    for network in records.networks():
        for budget in [b for b in records.budgets(network) if b in (32, 128, 512)]:
            for method in MAIN:
                cells = [
                    records.of(network, "kron", method, budget, "priors", prior, field)
                    for prior in ("1", "tuned") for field in ("kl", "nll_difference", "ece_difference")
                ]  # fmt: skip
                if cells[0] is not None:
                    rows.append([
                        NETWORKS[network], str(budget), method,
                        *(f"{cell['mean']:.2e} ± {cell['se']:.0e}" if cell else "" for cell in cells),
                    ])  # fmt: skip
    names = ["KL", "NLL", "ECE"]
    return markdown(
        ["network", "budget", "method", *(f"{n}, prior 1" for n in names), *(f"{n}, tuned" for n in names)], rows
    )


def low_rank(records: Records) -> str:
    """Curvature along the first 20 directions, estimated over true."""
    rows = []
    methods = [ONE, TWO, "priority, one batch", "priority, two batches", DEFAULT]
    for network in records.networks("lowrank"):
        for budget in records.budgets(network, "lowrank"):
            for method in methods:
                cell = records.of(network, "lowrank", method, budget, "curvature_ratio")
                if cell is None:
                    continue
                error = records.of(network, "lowrank", method, budget, "priors", "1", "abs_log_ratio")
                rows.append([
                    NETWORKS[network], str(budget), method, number(cell), f"{cell['min']:.3f} to {cell['max']:.3f}",
                    number(error, 4),
                ])  # fmt: skip
    head = ["network", "budget", "method", "sum, estimated / true", "range over draws", "error of the variances"]
    return markdown(head, rows)


def diagonal(records: Records) -> str:
    """The control: directions that do not depend on data."""
    rows = []
    methods = [ONE, TWO, "priority, one batch"]
    for network in records.networks("diag"):
        for budget in records.budgets(network, "diag", ONE):
            absolute = [records.of(network, "diag", m, budget, "priors", "1", "abs_log_ratio") for m in methods]
            signed = [records.of(network, "diag", m, budget, "priors", "1", "log_ratio") for m in methods]
            cells = [
                f"{number(a, 3)} ({s['mean']:+.3f})" if a and s else "" for a, s in zip(absolute, signed, strict=True)
            ]
            rows.append([NETWORKS[network], str(budget), *cells])
    return markdown(["network", "budget", ONE, TWO, "priority, one batch (default)"], rows)


def exact(records: Records) -> str:
    """Against the posterior of the whole curvature matrix."""
    rows = []
    for network in records.networks():
        for budget in records.budgets(network):
            cells = [records.of(network, "kron", m, budget, "priors", "1", "exact_abs_log_ratio") for m in MAIN]
            if cells[-1] is not None:
                rows.append([NETWORKS[network], str(budget), *(number(cell) for cell in cells)])
        full = records.of(
            network, "kron", DEFAULT, records.budgets(network)[0], "priors", "1", "reference_exact_abs_log_ratio"
        )
        if full is not None:
            rows.append([NETWORKS[network], "all data, K-FAC", f"{full['mean']:.3f}", "", ""])
    return markdown(["network", "budget", *MAIN], rows)


def sharing(records: Sequence[Mapping[str, Any]]) -> str:
    """Errors against the exact posterior of either way to share weights, with both curvatures."""
    rows = []
    for network in [name for name in NETWORKS if any(record["network"] == name for record in records)]:
        of_network = [record for record in records if record["network"] == network]
        for way, priors in of_network[0]["errors"].items():
            cells = [
                (statistics(of_network, "errors", way, prior, "abs_log_ratio"),
                 statistics(of_network, "errors", way, prior, "log_ratio")) for prior in priors
            ]  # fmt: skip
            rows.append([NETWORKS[network], way, *(f"{number(a)} ({s['mean']:+.3f})" for a, s in cells if s)])
    head = [f"prior precision {prior}" for prior in next(iter(records[0]["errors"].values()))] if records else []
    return markdown(["network", "sharing, curvatures", *head], rows)


def sharing_of_few(records: Records) -> str:
    """Error of the default from few data, against all of them, with either way to share weights."""
    rows = [
        [NETWORKS[network], str(budget), *(
            number(records.of(network, structure, DEFAULT, budget, "priors", prior, "abs_log_ratio"), 4)
            for prior in ("1", "tuned") for structure in ("kron", "kron-reduce")
        )]
        for network in records.networks("kron-reduce") for budget in records.budgets(network, "kron-reduce")
    ]  # fmt: skip
    ways = [f"{way}, prior {prior}" for prior in ("1", "tuned") for way in ("expand", "reduce")]
    return markdown(["network", "budget", *ways], rows)


def time_table(timing: Mapping[str, Any]) -> str:
    """Seconds of the steps of whole fits."""
    rows = []
    for network, methods in timing.items():
        whole = methods["all data"]["total"]
        for fitted, shares in methods.items():
            cells = ", ".join(
                f"{name} {100 * value / shares['total']:.0f} %" for name, value in shares.items() if name != "total"
            )
            rows.append([
                NETWORKS[network], fitted, f"{shares['total']:.1f}", f"1/{whole / shares['total']:.1f}", cells,
            ])  # fmt: skip
    return markdown(["network", "fit", "seconds", "of the full fit", "shares"], rows)


def figure(records: Records, prior: str, path: Path) -> None:
    """Error against budget, a panel for each network."""
    names = records.networks()
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = -(-len(names) // columns)
    drawn, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.0 * rows), squeeze=False, sharey=True)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, network in zip(axes.flat, names, strict=False):
        for method, (colour, marker, line) in STYLES.items():
            budgets = records.budgets(network, "kron", method)
            cells = [records.of(network, "kron", method, b, "priors", prior, "abs_log_ratio") for b in budgets]
            points = [(b, s["mean"], s["se"]) for b, s in zip(budgets, cells, strict=True) if s and s["mean"] > 1e-6]
            if points:
                x, y, error = (list(column) for column in zip(*points, strict=True))
                axis.errorbar(x, y, error, color=colour, marker=marker, linestyle=line, markersize=4, capsize=2,
                              linewidth=1.2, label=method)  # fmt: skip
        axis.set(xscale="log", yscale="log", title=NETWORKS[network])
        ticks = records.budgets(network)
        axis.set_xticks(ticks, [str(t) for t in ticks], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean |log ratio| of variances")
    for axis in axes[-1]:
        axis.set_xlabel("data spent on curvature")
    axes.flat[0].legend(fontsize=8, frameon=False)
    drawn.tight_layout()
    image = io.BytesIO()
    drawn.savefig(image, dpi=110)
    save_small(image.getvalue(), path)
    plt.close(drawn)


def ratios(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The curvature ratio, where there is one."""
    cell = statistics(records, "curvature_ratio")
    return {} if cell is None else {"curvature_ratio": {key: round(value, 4) for key, value in cell.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("eval/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    target = options.docs / "records" / "fidelity.json"
    *kept, last = read_json(target) if target.exists() else [{"timing": {}}]
    exact = [rounded(read_json(path)) for path in sorted((options.results / "sharing").glob("*.json"))]
    of_sharing = exact or last.get("sharing", [])
    timing = last["timing"] | {
        path.stem: rounded(read_json(path)) for path in sorted((options.results / "timing").glob("*.json"))
    }
    summary = {key_of(entry): entry for entry in kept}
    for key, records in load(options.results / "fidelity").items():
        summary[key] = (
            {"network": key[0], "structure": key[1], "method": key[2], "budget": key[3], "seeds": len(records)}
            | {
                f"{field}, prior {prior}": {k: float(f"{cell[k]:.4g}") for k in cell if k in ("mean", "se")}
                for prior in ("1", "tuned") for field in ("abs_log_ratio", "log_ratio")
                for cell in [statistics(records, "priors", prior, field)] if cell is not None
            }
            | ratios(records)
            | {"records": [rounded({name: one[name] for name in SHOWN if name in one}) for one in records]}
        )  # fmt: skip
    target.parent.mkdir(exist_ok=True)
    entries = [entry for _, entry in sorted(summary.items())]
    lines = ",\n".join(
        json.dumps(encode(entry), allow_nan=False) for entry in [*entries, {"timing": timing, "sharing": of_sharing}]
    )
    target.write_text(f"[\n{lines}\n]\n")
    fill(options.docs / "fidelity.md", parts(read_json(target)))
    figure(Records.of_entries(entries), "1", options.docs / "fidelity.png")


#: Of a record, what tables are made of.
SHOWN = ("seed", "n_pool", "priors", "curvature_ratio")


def rounded(value: Any) -> Any:
    """Five digits."""
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def parts(record: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The generated parts of the document, from its record."""
    *entries, last = record
    records = Records.of_entries(entries)
    tables = {
        "claims": claims(records),
        "prior 1": main_table(records, "1"),
        "prior tuned": main_table(records, "tuned"),
        "ablation": ablation(records),
        "ablation tuned": ablation(records, "tuned"),
        "time": time_table(last["timing"]),
        "sharing": sharing(last.get("sharing", [])),
        "sharing of few": sharing_of_few(records),
        "predictions": predictions(records),
        "low rank": low_rank(records),
        "diagonal": diagonal(records),
        "exact": exact(records),
    }
    return {f"table {name}": entry for name, entry in tables.items() if entry.count("\n") > 1}  # of what was measured


if __name__ == "__main__":
    main()
