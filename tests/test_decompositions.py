"""SmoothECE, top-label calibration, AUGRC, and calibration and refinement losses, against independent computations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import relplot
from scipy.optimize import brentq, minimize_scalar
from sklearn.metrics import roc_auc_score

from debiased_laplace.evaluation.scores import bootstrap, calibrated, calibration, classification, smooth, weighted
from debiased_laplace.evaluation.scores.refinement import recalibrate
from tests.tolerances import EXACT, MONTE_CARLO_Z

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def draws(n: int = 300, classes: int = 5, sharpness: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overconfident probabilities of targets that follow flatter ones."""
    generator = np.random.default_rng(seed)
    logits = sharpness * generator.standard_normal((n, classes))
    probabilities, truth = softmax(logits), softmax(logits / 2)
    return probabilities, (truth.cumsum(1) < generator.random((n, 1))).sum(1).clip(max=classes - 1)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def binary(confidence: np.ndarray) -> np.ndarray:
    return np.stack([confidence, 1 - confidence], 1)


# -- SmoothECE -------------------------------------------------------------------------------------


def by_images(confidence: np.ndarray, gap: np.ndarray, variance: float, points: np.ndarray) -> float:
    """The integral of the definition at some points, the kernel reflected by adding mirror images of the data."""
    periods = range(-2, 3) if variance > 0.01 else range(2)
    images = np.concatenate([2 * period + side * confidence for period in periods for side in (1, -1)])
    sizes = np.tile(gap, 2 * len(periods))
    density = np.exp(-(np.subtract.outer(points, images) ** 2) / (2 * variance)) @ sizes
    return float(np.abs(density).mean()) / (len(confidence) * math.sqrt(2 * math.pi * variance))


def fixed_point(confidence: np.ndarray, gap: np.ndarray, points: np.ndarray, spread: float = 0.0) -> float:
    return brentq(lambda s: by_images(confidence, gap, s * s - spread, points) - s, 1 / smooth.GRID, 1, xtol=1e-12)


def test_smooth_error_of_data_in_the_middle_of_cells_is_the_definition() -> None:
    generator, middles = np.random.default_rng(0), (np.arange(smooth.GRID) + 0.5) / smooth.GRID
    for confidence in (generator.choice(middles[128:], 25), np.full(7, middles[200]), middles[-9:]):
        hits = generator.random(len(confidence)) < 0.6
        expected = fixed_point(confidence, confidence - hits, middles, 1 / (6 * smooth.GRID**2))
        value = calibration.smooth_calibration_error(binary(confidence), (~hits).astype(int))
        assert value == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize(("n", "room"), [(20, 1e-3), (200, 1e-3), (800, 1e-3)])
def test_smooth_error_is_nearly_the_one_without_cells(n: int, room: float) -> None:
    generator, points = np.random.default_rng(n), (np.arange(2000) + 0.5) / 2000
    confidence = 0.5 + generator.random(n) / 2
    hits = generator.random(n) < confidence
    expected = fixed_point(confidence, confidence - hits, points)
    assert calibration.smooth_calibration_error(binary(confidence), (~hits).astype(int)) == pytest.approx(
        expected, rel=room
    )


@pytest.mark.parametrize("right", [1.0, 0.7, 0.3])
@pytest.mark.parametrize("n", [300, 3000, 30_000])
def test_smooth_error_is_that_of_its_authors(n: int, right: float) -> None:
    """Within the last halving of the bandwidth in their search."""
    generator = np.random.default_rng(n)
    confidence = generator.uniform(0.5, 1, n)
    hits = generator.random(n) < right * confidence
    value = calibration.smooth_calibration_error(binary(confidence), (~hits).astype(int))
    assert value == pytest.approx(relplot.smECE(confidence, hits.astype(float)), abs=2**-10)


def test_smooth_error_by_hand() -> None:
    # All gaps of one sign: the kernel integrates to one, and the score is the mean gap whatever the bandwidth.
    confidence = np.linspace(0.6, 1.0, 9)
    assert calibration.smooth_calibration_error(binary(confidence), np.ones(9, dtype=int)) == pytest.approx(0.8)
    assert calibration.smooth_calibration_error(binary(np.ones(4)), np.zeros(4, dtype=int)) == 0
    # Below a cell it is the error at the bandwidth of a cell.
    sure = 1 - 1e-6 * np.arange(1, 5)
    assert calibration.smooth_calibration_error(binary(sure), np.zeros(4, dtype=int)) == pytest.approx(2.5e-6, rel=1e-3)


def test_errors_of_calibrated_predictors_are_those_of_drawn_targets() -> None:
    probabilities, _ = draws(80, 3)
    uniforms, n_draws = np.random.default_rng(3).random((80, 6)), 6
    labels = (uniforms[:, None] >= probabilities.cumsum(1)[:, :-1, None]).sum(1)
    result = calibrated.expected_errors(probabilities, n_draws, 3)
    for name, function in (
        ("ece", calibration.expected_calibration_error),
        ("smooth_ece", calibration.smooth_calibration_error),
        ("top_label_ece", calibration.top_label_calibration_error),
        ("classwise_ece", calibration.classwise_calibration_error),
    ):
        values = np.array([function(probabilities, column) for column in labels.T])
        expected = [values.mean(), values.std(), *np.percentile(values, [2.5, 97.5])]
        assert result[name] == pytest.approx(expected, rel=EXACT), name


# -- by class --------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5])
def test_top_label_error_is_the_loop(classes: int) -> None:
    probabilities, targets = draws(120, classes)
    total = 0.0
    for c in range(classes):
        of_class = probabilities.argmax(1) == c
        if of_class.any():  # the ECE among the data with this prediction
            total += of_class.mean() * calibration.expected_calibration_error(
                probabilities[of_class], targets[of_class]
            )
    value = calibration.top_label_calibration_error(probabilities, targets)
    assert value == pytest.approx(total, rel=EXACT)
    assert value > calibration.expected_calibration_error(probabilities, targets) + 1e-3


def test_classes_that_make_up_for_one_another() -> None:
    """Confidence 0.8 of both classes, one right in all cases and the other in six of ten."""
    probabilities = np.repeat([[0.8, 0.2], [0.2, 0.8]], 10, 0)
    targets = np.array([0] * 10 + [1] * 6 + [0] * 4)
    assert calibration.expected_calibration_error(probabilities, targets) == pytest.approx(0, abs=1e-12)
    assert calibration.top_label_calibration_error(probabilities, targets) == pytest.approx(0.2, rel=EXACT)
    top, each = calibration.by_class(probabilities, targets)
    assert (top.counts, top.correct, each.counts, each.correct) == ([10, 10], [10, 6], [20, 20], [14, 6])
    assert top.confidences == pytest.approx([8, 8], rel=EXACT)
    assert each.confidences == pytest.approx([10, 10], rel=EXACT)


# -- AUGRC -----------------------------------------------------------------------------------------


def area_over_orders(confidence: list[float], wrong: list[int]) -> float:
    """Trapezia below (kept, kept and wrong), averaged over all orders that sort the confidences."""
    areas, n = [], len(wrong)
    for order in itertools.permutations(range(n)):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            heights = np.cumsum([0, *(wrong[i] for i in order)]) / n
            areas.append(np.trapezoid(heights, dx=1 / n))
    return float(np.mean(areas))


@pytest.mark.parametrize("seed", range(5))
def test_augrc_is_the_mean_over_orders_of_ties(seed: int) -> None:
    generator = np.random.default_rng(seed)
    confidence, targets = generator.choice([0.6, 0.7, 0.8, 1.0], 7), generator.integers(2, size=7)
    expected = area_over_orders(confidence.tolist(), targets.tolist())
    for order in (np.arange(7), generator.permutation(7)):
        assert classification.augrc(binary(confidence[order]), targets[order]) == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("digits", [1, 12])
def test_augrc_is_that_of_the_paper(digits: int) -> None:
    """The identity of Traub et al.: from accuracy and the AUROC of telling right from wrong."""
    probabilities, targets = draws(200)
    confidence = probabilities.max(1).round(digits).clip(0.5)
    right = probabilities.argmax(1) == targets
    value = classification.augrc(binary(confidence), (~right).astype(int))
    accuracy, auroc = right.mean(), roc_auc_score(right, confidence)
    assert value == pytest.approx(accuracy * (1 - accuracy) * (1 - auroc) + (1 - accuracy) ** 2 / 2, rel=EXACT)


def test_augrc_at_the_limits() -> None:
    sure = binary(np.linspace(0.6, 0.9, 4))
    assert classification.augrc(sure, np.zeros(4, dtype=int)) == 0
    assert classification.augrc(sure, np.ones(4, dtype=int)) == 0.5


# -- calibration and refinement --------------------------------------------------------------------


def losses_at(logarithms: np.ndarray, labels: np.ndarray, inverse: float) -> dict[str, np.ndarray]:
    """Of every datum, from the definitions; labels may be distributions."""
    powers = softmax(inverse * logarithms)
    squares = np.square(powers[:, None] - np.eye(labels.shape[1])).sum(2)  # for every class as the target
    return {"nll": -(labels * np.log(powers)).sum(1), "brier": (labels * squares).sum(1)}


@pytest.mark.parametrize("kind", ["targets", "distributions"])
def test_recalibration_is_that_of_the_definitions(kind: str) -> None:
    """The best temperature by another search, slopes and curvatures by differences, the other terms from these."""
    probabilities, targets = draws(43, 4)
    labels = np.eye(4)[targets] if kind == "targets" else 0.7 * np.eye(4)[targets] + 0.075
    logarithms, n = np.log(probabilities), 43
    found = recalibrate(probabilities, labels)

    def total(x: float) -> float:  # with one datum more of any class, which is at the mean of all inputs
        nll, of_any = (losses_at(logarithms, rows, math.exp(x))["nll"] for rows in (labels, np.full((43, 4), 0.25)))
        return float(nll.sum() + of_any.mean())

    best = math.exp(minimize_scalar(total, bounds=(-3, 3), method="bounded", options={"xatol": 1e-12}).x)
    assert found.inverse == pytest.approx(best, rel=1e-6)  # a minimum is flat: half of the digits
    first, second, step = np.array([1, -8, 0, 8, -1]) / 12, np.array([-1, 16, -30, 16, -1]) / 12, 1e-3

    def around(rows: np.ndarray, loss: str) -> np.ndarray:
        return np.array([losses_at(logarithms, rows, found.inverse + k * step)[loss] for k in range(-2, 3)])

    of_any = float((second @ around(np.full((43, 4), 0.25), "nll")).mean()) / step**2
    slopes, bends = {}, {}
    for loss, further in (("nll", of_any / n), ("brier", 0.0)):
        at = around(labels, loss)
        slopes[loss], bends[loss] = first @ at / step, float((second @ at).mean()) / step**2 + further
        assert found.columns[f"{loss}_refinement"] == pytest.approx(at[2], rel=EXACT)
        assert found.columns[f"{loss}_slope"] == pytest.approx(slopes[loss], rel=1e-6, abs=1e-8)
        assert found.curvatures[loss] == pytest.approx(bends[loss], rel=1e-6)
    slope = slopes["nll"]
    weights = weighted.resample_weights(n, 6)
    means = {name: weights @ column / n for name, column in found.columns.items()}
    delta = -(weights @ slope / n - slope.mean()) / bends["nll"]
    for loss, risks in found.risks(means).items():
        u, v = slopes[loss.removesuffix("_refinement")], bends[loss.removesuffix("_refinement")]
        too_small = ((u * slope).mean() / bends["nll"] - v * (slope**2).mean() / bends["nll"] ** 2 / 2) / n
        expected = weights @ found.columns[loss] / n + weights @ u / n * delta + v * delta**2 / 2 + too_small
        assert risks == pytest.approx(expected, rel=1e-6)


def test_resamples_are_those_of_new_temperatures() -> None:
    """The risk that a resample has at its own best temperature, but for terms of order N^-3/2."""
    probabilities, targets = draws(2000, 4)
    labels, weights = np.eye(4)[targets], weighted.resample_weights(2000, 40)
    found, again = recalibrate(probabilities, labels), []
    for w in weights:
        rows = np.repeat(np.arange(2000), w.astype(int))
        again.append({k: column.mean() for k, column in recalibrate(probabilities[rows], labels[rows]).columns.items()})
    own = {name: float(column.mean()) for name, column in found.columns.items()}
    risks = found.risks({name: weights @ column / 2000 for name, column in found.columns.items()})
    fixed = {name: weights @ found.columns[name] / 2000 for name in risks}
    for name, values in risks.items():
        whole = found.risks({key: np.array(value) for key, value in own.items()})[name] - own[name]
        expected = np.array([one[name] for one in again]) + whole
        change = np.abs(fixed[name] + whole - expected).max()  # what a temperature of its own makes of it
        assert np.abs(values - expected).max() < 0.1 * change, name


@pytest.mark.parametrize("n", [40, 400])
def test_calibrated_predictions_have_no_calibration_loss(n: int) -> None:
    """On average none, with a standard deviation of 1/(N sqrt 2) nats: half a chi-square variable of one degree."""
    generator, found = np.random.default_rng(0), {"nll": [], "brier": []}
    weights, held = weighted.resample_weights(n, 60), []
    for _ in range(400):
        probabilities = softmax(2 * generator.standard_normal((n, 4)))
        targets = (probabilities.cumsum(1) < generator.random((n, 1))).sum(1).clip(max=3)
        scores = bootstrap.classification_replicates(probabilities, targets, weights)
        for loss, values in found.items():
            values.append(n * scores[f"{loss}_calibration"].value)
            low, high = scores[f"{loss}_calibration"].interval()
            held.append(low <= 0 <= high)
    for values in found.values():
        assert abs(np.mean(values)) <= MONTE_CARLO_Z * np.std(values) / 20
    assert np.std(found["nll"]) == pytest.approx(math.sqrt(0.5), rel=0.25)
    assert np.mean(held) > 0.95


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_refinement_does_not_depend_on_the_temperature(temperature: float) -> None:
    probabilities, targets = draws(90)
    other = softmax(np.log(probabilities) / temperature)
    first, second = (classification.classification_metrics(table, targets) for table in (probabilities, other))
    for loss in ("nll", "brier"):
        assert first[f"{loss}_refinement"] == pytest.approx(second[f"{loss}_refinement"], rel=EXACT)
        assert abs(first[f"{loss}_calibration"] - second[f"{loss}_calibration"]) > 1e-3
        assert first[f"{loss}_calibration"] + first[f"{loss}_refinement"] == pytest.approx(first[loss], rel=EXACT)


MARGINS = np.array([0.3, 1.0, 2.5])


def population() -> dict[str, float]:
    """Of logits that are two times the true ones: entropies and divergences of Bernoulli distributions."""
    truth, said = (1 / (1 + np.exp(-factor * MARGINS)) for factor in (1.0, 2.0))
    entropy = -truth * np.log(truth) - (1 - truth) * np.log(1 - truth)
    cross = -truth * np.log(said) - (1 - truth) * np.log(1 - said)
    return {
        "nll_refinement": float(entropy.mean()), "nll_calibration": float((cross - entropy).mean()),
        "brier_refinement": float((2 * truth * (1 - truth)).mean()),
        "brier_calibration": float((2 * np.square(truth - said)).mean()),
    }  # fmt: skip


def sample(n: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    margins = generator.choice(MARGINS, n)
    return binary(1 / (1 + np.exp(-2 * margins))), (generator.random(n) > 1 / (1 + np.exp(-margins))).astype(int)


def test_parts_of_a_population_are_found() -> None:
    probabilities, targets = sample(40_000, np.random.default_rng(0))
    scores = bootstrap.classification_replicates(probabilities, targets, weighted.resample_weights(40_000, 100))
    for name, truth in population().items():
        assert abs(scores[name].value - truth) <= MONTE_CARLO_Z * scores[name].standard_error, name
        assert scores[name].standard_error < 0.05 * truth, name


def test_intervals_hold_the_parts_of_a_population() -> None:
    """In 300 samples of 300 data; five standard errors beside 95 % would be 89 %."""
    generator, weights = np.random.default_rng(0), weighted.resample_weights(300, 100)
    held: dict[str, list[bool]] = {name: [] for name in population()}
    for _ in range(300):
        scores = bootstrap.classification_replicates(*sample(300, generator), weights)
        for name, truth in population().items():
            low, high = scores[name].interval()
            held[name].append(low <= truth <= high)
    for name, hits in held.items():
        assert abs(np.mean(hits) - 0.95) <= MONTE_CARLO_Z * math.sqrt(0.05 * 0.95 / 300), name


def test_nothing_wrong_one_datum_and_probabilities_of_zero() -> None:
    right = binary(np.full(20, 0.9))
    scores = classification.classification_metrics(right, np.zeros(20, dtype=int))
    assert 0 < scores["nll_refinement"] < scores["nll"]  # a temperature below one, but no certainty
    low, high = bootstrap.classification_replicates(
        right, np.zeros(20, dtype=int), weighted.resample_weights(20, 50)
    )["nll_refinement"].interval()  # fmt: skip
    assert low <= scores["nll_refinement"] < 0.1 < high
    assert recalibrate(np.array([[0.9, 0.1]]), np.array([[1.0, 0.0]])).inverse == pytest.approx(0.5, rel=1e-6)
    impossible = classification.classification_metrics([[1.0, 0.0], [0.4, 0.6]], [1, 1])
    assert impossible["nll_refinement"] == math.inf
    assert math.isnan(impossible["nll_calibration"])
    assert math.isfinite(impossible["brier_refinement"])
