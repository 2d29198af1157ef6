"""How often two equal predictors are told apart: the rate of false verdicts of the evaluation's intervals.

    python eval/verdicts.py [--trials 500] [--sizes 2 5 10 20 40 100 300] [--quick] [--docs docs]

Targets are drawn from known probabilities. Two predictors see them with independent noise of one law, so that neither
is better. Every trial draws data and predictors anew and asks the evaluation for its verdict on every score; beside it
is what 95 % percentiles of the same resamples say of the NLL. Another pair is not exchangeable, but has equal expected
NLL: a sharp and a flat predictor of a binary target, whose differences are as skewed as they come. Writes
``<docs>/records/verdicts.json``, and fills the tables of ``docs/evaluation.md`` between ``<!-- verdicts -->`` and
``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from documents import fill, markdown

from debiased_laplace.evaluation.records import read_json, write_json
from debiased_laplace.evaluation.report.verdicts import verdict
from debiased_laplace.evaluation.scores import bootstrap, detection, weighted
from debiased_laplace.evaluation.scores.cells import cell
from debiased_laplace.evaluation.scores.replicates import Replicates

Scores = dict[str, Replicates]
Draw = Callable[[int, np.random.Generator, list[np.ndarray]], tuple[Scores, Scores]]
N_RESAMPLES = 400
PERCENTILES = "nll, percentiles"


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of the last axis."""
    values = np.exp(logits - logits.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True)


def classifiers(sharpness: float, classes: int = 4, noise: float = 0.5) -> Draw:
    """Two classifiers that see the true logits with noise; out-of-distribution data have smaller logits."""

    def draw(n: int, random: np.random.Generator, weights: list[np.ndarray]) -> tuple[Scores, Scores]:
        logits = sharpness * random.standard_normal((2, n, classes)) * np.array([1.0, 0.6])[:, None, None]
        targets = (softmax(logits[0]).cumsum(1) < random.random((n, 1))).sum(1).clip(max=classes - 1)
        pair = []
        for _ in range(2):
            inside, outside = softmax(logits + noise * sharpness * random.standard_normal(logits.shape))
            scores_of_classes = bootstrap.classification_replicates(inside, targets, weights[0])
            scores = detection.ood_score(inside), detection.ood_score(outside)
            pair.append(scores_of_classes | bootstrap.detection_replicates(*scores, *weights))
        return pair[0], pair[1]

    return draw


def regressions(n: int, random: np.random.Generator, weights: list[np.ndarray]) -> tuple[Scores, Scores]:
    """Two Gaussian predictions with different errors and variances."""
    targets, pair = random.standard_normal(n), []
    for _ in range(2):
        mean, variance = 0.5 * random.standard_normal(n), np.exp(0.5 * random.standard_normal(n))
        pair.append(bootstrap.regression_replicates(mean, variance, targets, weights[0]))
    return pair[0], pair[1]


def sharp_and_flat(n: int, random: np.random.Generator, weights: list[np.ndarray]) -> tuple[Scores, Scores]:
    """Confidences around 0.98 and 0.8, right so often (about 93 %) that both expect the same NLL."""
    sharp, flat = (1 / (1 + np.exp(-(math.log(p / (1 - p)) + 0.1 * random.standard_normal(n)))) for p in (0.98, 0.8))
    gain, loss = np.log(sharp / flat), np.log((1 - sharp) / (1 - flat))
    targets = (random.random(n) >= -loss / (gain - loss)).astype(int)
    others = np.stack([sharp + flat, 2 - sharp - flat], 1) / 2
    first, second = (
        bootstrap.classification_replicates(np.stack([p, 1 - p], 1), targets, weights[0], others) for p in (sharp, flat)
    )
    return ({"nll": first["nll"]}, {"nll": second["nll"]})


PAIRS: dict[str, Draw] = {
    "classifiers, 55 % right": classifiers(1.5),
    "classifiers, 75 % right": classifiers(4.0),
    "regressions": regressions,
    "sharp and flat, equal NLL": sharp_and_flat,
}


def rates(draw: Draw, n: int, trials: int, seed: int = 0) -> dict[str, float]:
    """Shares of trials with a verdict, of every score."""
    random = np.random.default_rng([seed, n])
    weights = [weighted.resample_weights(n, N_RESAMPLES, index) for index in range(2)]
    verdicts: dict[str, list[bool]] = {}
    for _ in range(trials):
        first, second = draw(n, random, weights)
        for score in first:
            difference = first[score] - second[score]
            verdicts.setdefault(score, []).append(verdict(score, cell(difference)) in ("better", "worse"))
        low, high = np.quantile((first["nll"] - second["nll"]).replicates, [0.025, 0.975])
        verdicts.setdefault(PERCENTILES, []).append(low > 0 or high < 0)
    return {score: float(np.mean(said)) for score, said in verdicts.items()}


def tables(record: Mapping[str, Any]) -> str:
    """A table for every pair, of the scores that have a better and a worse."""
    parts = []
    for name, by_size in record["rates"].items():
        scores = [score for score in next(iter(by_size.values())) if not score.startswith(("coverage", "width"))]
        rows = [[score, *(f"{100 * rates[score]:.1f}" for rates in by_size.values())] for score in scores]
        parts.append(f"**{name}**\n\n" + markdown(["n", *by_size], rows))
    error = 100 * math.sqrt(0.05 * 0.95 / record["trials"])
    return "\n\n".join([*parts, f"{record['trials']:,} trials: a rate of 5 % has a standard error of {error:.1f} %."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 5, 10, 20, 40, 100, 300])
    parser.add_argument("--quick", action="store_true", help="five trials of two sizes")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    if options.quick:
        options.trials, options.sizes = 5, [5, 20]
    found = {name: {str(n): rates(draw, n, options.trials) for n in options.sizes} for name, draw in PAIRS.items()}
    path = options.docs / "records" / "verdicts.json"
    write_json(path, {"trials": options.trials, "rates": found})
    fill(options.docs / "evaluation.md", {"verdicts": tables(read_json(path))})


if __name__ == "__main__":
    main()
