"""How often intervals over splits of one data set hold: independent halves, and halves that take turns.

    python eval/splits.py [--trials 2000] [--quick] [--docs docs]

A network with ten classes is twice as sure as it should be. One half of the data tunes it, by a temperature or by a
temperature and the power of a feature that says where it is least sure; the other judges by how much the NLL is smaller
then. What an interval should hold is the mean over tuning halves and over a large population. Every trial draws a data
set anew; its seeds either halve it each by itself, or two and two with the same halves in turns. Writes
``<docs>/records/splits.json`` and fills the table of ``docs/evaluation.md`` between ``<!-- splits -->`` and
``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from documents import fill, markdown

from debiased_laplace.evaluation.records import read_json, write_json
from debiased_laplace.evaluation.scores.cells import Cell, combine, cross_fitted
from debiased_laplace.evaluation.scores.intervals import CONFIDENCE, mean, normal_quantile

POPULATION, CLASSES = 40_000, 10
SIZES, SEEDS = (1000, 200), (2, 4, 8)
INDEPENDENT, IN_TURN = "independent halves", "halves in turn"
#: Halves that share data: as many judge as tune.
RULES: dict[str, Callable[[list[Cell]], Cell]] = {
    INDEPENDENT: lambda cells: combine(cells, False, overlap=1.0),
    IN_TURN: lambda cells: cross_fitted(cells, 2),
}


def losses(random: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """NLL of the network, ``[N]``, and with every setting of what is tuned, ``[N, settings]``."""
    logits = 3 * random.standard_normal((POPULATION, CLASSES))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = (probabilities.cumsum(1) < random.random((POPULATION, 1))).sum(1).clip(max=CLASSES - 1)
    feature = np.exp(0.5 * random.standard_normal(POPULATION))
    outputs = 2 * logits * feature[:, None]

    def nll(divisor: Any) -> np.ndarray:
        scaled = outputs / np.reshape(divisor, (-1, 1))
        largest = scaled.max(1)
        return np.log(np.exp(scaled - largest[:, None]).sum(1)) + largest - scaled[np.arange(len(targets)), targets]

    powers = itertools.product(np.geomspace(0.7, 6, 24), np.linspace(-0.3, 1.3, 12))
    return nll(1.0), {
        "temperature": np.stack([nll(temperature) for temperature in np.geomspace(0.5, 8, 60)], 1),
        "temperature and power": np.stack([nll(t * feature**power) for t, power in powers], 1),
    }


def cells(order: list[np.ndarray], settings: np.ndarray, network: np.ndarray) -> list[Cell]:
    """One for each order of the data: the first half tunes, the second judges."""
    result = []
    for index in order:
        tune, judge = index[: len(index) // 2], index[len(index) // 2 :]
        differences = settings[judge, settings[tune].mean(0).argmin()] - network[judge]
        error = float(differences.std(ddof=1)) / len(judge) ** 0.5
        result.append([float(differences.mean()), error, *mean(differences, CONFIDENCE)])
    return result


def measure(n: int, n_seeds: int, settings: np.ndarray, network: np.ndarray, trials: int, seed: int) -> dict[str, Any]:
    """For each rule the share of intervals that hold, and their length over that of 2 x 1.96 standard deviations."""
    random = np.random.default_rng([seed, n, n_seeds])
    gains = settings.mean(0) - network.mean()
    tuned = (settings[random.integers(POPULATION, size=n // 2)].mean(0).argmin() for _ in range(max(trials, 500)))
    truth = float(np.mean([gains[best] for best in tuned]))
    found: dict[str, list[Cell]] = {rule: [] for rule in RULES}
    for _ in range(trials):
        data = random.integers(POPULATION, size=n)
        orders = [data[random.permutation(n)] for _ in range(n_seeds)]
        in_turn = [half for order in orders[: n_seeds // 2] for half in (order, np.roll(order, n // 2))]
        for rule, order in ((INDEPENDENT, orders), (IN_TURN, in_turn)):
            found[rule].append(RULES[rule](cells(order, settings, network)))
    result = {}
    for rule, of_trials in found.items():
        value, _, low, high = np.array(of_trials).T
        deviation = float(value.std(ddof=1))
        result[rule] = {
            "holds": float(np.mean((low <= truth) & (truth <= high))),
            "deviation": float(f"{deviation:.5g}"),
            "length": float(f"{(high - low).mean() / (2 * normal_quantile(CONFIDENCE) * deviation):.5g}"),
        }
    return result


def table(record: Mapping[str, Any]) -> str:
    """Rows of sizes and seeds; for both rules how often the interval holds, and how long it is."""
    rows = [
        [
            str(row["n"]), row["tuned"], str(row["seeds"]),
            *(f"{100 * row[rule]['holds']:.1f} %, {row[rule]['length']:.2f}" for rule in RULES),
            f"{row[IN_TURN]['deviation'] / row[INDEPENDENT]['deviation']:.2f}",
        ]
        for row in record["rows"]
    ]  # fmt: skip
    columns = [
        "data",
        "what is tuned",
        "seeds",
        *(f"{rule}: holds, length" for rule in RULES),
        "deviation, in turn / independent",
    ]
    error = 100 * (0.05 * 0.95 / record["trials"]) ** 0.5
    return (
        markdown(columns, rows)
        + f"\n\n{record['trials']:,} trials: a share of 95 % has a standard error of {error:.1f} %."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="ten trials")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    trials, path = 10 if options.quick else options.trials, options.docs / "records" / "splits.json"
    network, ways = losses(np.random.default_rng(0))
    rows = [
        {"n": n, "tuned": tuned, "seeds": n_seeds} | measure(n, n_seeds, settings, network, trials, seed)
        for n in SIZES
        for seed, (tuned, settings) in enumerate(ways.items())
        for n_seeds in SEEDS
    ]
    write_json(path, {"trials": trials, "rows": rows})
    fill(options.docs / "evaluation.md", {"splits": table(read_json(path))})


if __name__ == "__main__":
    main()
