"""Prediction sets in the suite: equal to a slow computation with resampled data, and shown where records have them."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from debiased_laplace import conformal
from debiased_laplace.evaluation import evaluate
from debiased_laplace.evaluation.predictors.baselines import tuned_temperature
from debiased_laplace.evaluation.report.sets import tables
from debiased_laplace.evaluation.report.tables import by_topic
from debiased_laplace.evaluation.scores.sets import CLASS_SCORES, INTERVAL_SCORES, SetScores
from debiased_laplace.evaluation.scores.weighted import resample_weights
from debiased_laplace.evaluation.tasks import Context, Task
from tests.test_eval import experiments

__all__ = ["experiments"]

N, C, B = 240, 6, 8


def classifier(n: int = N, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(n, C))
    true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    sharp = true**1.5 / (true**1.5).sum(1, keepdims=True)
    return sharp, (true[:, :-1].cumsum(1) < rng.random((n, 1))).sum(1)


def regression(n: int = N, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    mean, deviation = rng.normal(size=(n, 2)), rng.uniform(0.5, 2, size=(n, 2))
    return {"mean": mean, "variance": deviation**2}, mean + deviation * rng.standard_t(4, size=(n, 2))


def by_hand(score_of, sets_of, stratum_of, y, weights, n_test, judged, classes=True, alpha=0.1) -> dict[str, float]:
    """Of one row of weights: data repeated so many times, calibrated and judged one by one."""
    fold = np.random.default_rng(0).random((max(n_test, len(y)), 2))[:, 0] < 0.5
    rows = []
    for side in (False, True):
        held = [score_of(i) for i in range(n_test) if fold[i] != side for _ in range(int(weights[i]))]
        rank = math.ceil((len(held) + 1) * (1 - alpha) - 1e-9)
        threshold = sorted(held)[rank - 1] if rank <= len(held) else math.inf
        for i in range(len(y)):
            if fold[i] == side:
                rows += [(y[i], *sets_of(i, threshold), stratum_of(i, sets_of(i, threshold)[1]))] * int(judged[i])
    labels, hits, sizes, strata = (np.array(column) for column in zip(*rows, strict=True))
    shares = [hits[strata == s].mean() for s in np.unique(strata) if (strata == s).sum() >= 10]
    result = {
        "coverage": hits.mean(), "size": sizes.mean(), "worst stratum": max(abs(s - 1 + alpha) for s in shares),
    }  # fmt: skip
    if classes:
        of_classes = [hits[labels == c].mean() for c in range(C) if (labels == c).sum() >= 10]
        result["worst class"] = min(of_classes)
    return result


def agree(found, expected, row):
    for measure, value in expected.items():
        score = found[measure]
        assert (score.value if row < 0 else score.replicates[row]) == pytest.approx(value, abs=1e-12), (measure, row)


@pytest.mark.parametrize("kind", CLASS_SCORES)
@pytest.mark.parametrize("shifted", [False, True])
def test_sets_of_classes_are_those_of_resampled_data(kind, shifted):
    (p, y), u = classifier(), np.random.default_rng(0).random((N, 2))[:, 1]
    n = 150 if shifted else N
    q, z = (classifier(seed=3)[0][:n], y[:n]) if shifted else (p, y)
    weights, judged = resample_weights(N, B, 0), resample_weights(n, B, 1 if shifted else 0)
    found = SetScores({"probabilities": p}, y, weights).of({"probabilities": q}, z, judged)
    held, new = CLASS_SCORES[kind].of_classes(p, u), CLASS_SCORES[kind].of_classes(q, u[:n])

    def members(i, threshold):
        return bool(new[i, z[i]] <= threshold), int((new[i] <= threshold).sum())

    for row in (-1, 0, 3):
        w, v = (np.ones(N), np.ones(n)) if row < 0 else (weights[row], judged[row])
        expected = by_hand(lambda i: held[i, y[i]], members, lambda i, size: (size > 1) + (size > 3), z, w, N, v)
        agree({m: found[f"{kind}, {m}"] for m in expected}, expected, row)


@pytest.mark.parametrize("kind", INTERVAL_SCORES)
def test_intervals_are_those_of_resampled_data(kind):
    fields, y = regression()
    weights = resample_weights(N, B, 0)
    found = SetScores(fields, y, weights).of(fields, y, weights)
    mean, deviation, z = fields["mean"], np.sqrt(fields["variance"]), 1.6448536269514722
    pair = (mean - z * deviation, mean + z * deviation) if kind == "CQR" else (mean, deviation)
    held, average = INTERVAL_SCORES[kind].of(pair, y, np.random.default_rng(0)), deviation.mean(1)

    def members(i, threshold):
        lower, upper = INTERVAL_SCORES[kind].sets([part[i : i + 1] for part in pair], threshold, None)
        return bool(((lower <= y[i]) & (y[i] <= upper)).all()), float((upper - lower).clip(min=0).mean())

    def quarter(i, size):
        return sum(average[i] > np.quantile(average, share) for share in (0.25, 0.5, 0.75))

    for row in (-1, 2):
        w = np.ones(N) if row < 0 else weights[row]
        expected = by_hand(lambda i: held[i], members, quarter, np.arange(N), w, N, w, classes=False)
        agree({m: found[f"{kind}, {m}"] for m in expected}, expected, row)


def test_few_data_have_infinite_intervals_and_no_strata():
    fields, y = regression(8)
    found = SetScores(fields, y, resample_weights(8, B, 0)).of(fields, y, resample_weights(8, B, 0))
    assert found["CQR, size"].value == math.inf
    assert found["CQR, coverage"].value == 1.0
    assert math.isnan(found["CQR, worst stratum"].value)


def test_standard_errors_know_the_data_that_calibrate():
    """Over new data, those that calibrate included: right for sizes, somewhat too large for coverage."""
    cells: dict[str, list[tuple[float, float]]] = {}
    for seed in range(150):
        p, y = classifier(seed=seed)
        weights = resample_weights(N, 50, seed)
        for key, score in SetScores({"probabilities": p}, y, weights).of({"probabilities": p}, y, weights).items():
            cells.setdefault(key, []).append((score.value, score.standard_error))
    for kind in CLASS_SCORES:
        for measure, least, most in (("size", 0.85, 1.35), ("coverage", 1.0, 1.8)):
            values, errors = np.array(cells[f"{kind}, {measure}"]).T
            assert least < errors.mean() / values.std() < most, (kind, measure)


@pytest.fixture(scope="module")
def result():
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(400, 4, generator=generator)
    y = torch.multinomial(x.softmax(1), 1, generator=generator).flatten()
    noisy = {s: [(x + 0.3 * s * torch.randn(400, 4, generator=generator), y)] for s in (1, 3, 5)}
    names = {"calibrated": 1.0, "sharp": 0.3, "like sharp": 0.3}
    predictors = {name: (lambda inputs, t=t: (inputs / t).softmax(1)) for name, t in names.items()}
    return evaluate(predictors, [(x, y)], {"noise": noisy}, compare_with=["sharp"], n_resamples=100)


def test_the_suite_has_sets_of_test_data_and_of_strong_shifts(result):
    for entry, coverage in ((result["test"], 0.9), (result["strong_shift"], None)):
        sets = entry["prediction_sets"]
        assert sets["alpha"] == 0.1
        assert list(sets["scores"]) == ["calibrated", "sharp", "like sharp"]
        for cells in sets["scores"].values():
            value, error, low, high = cells["APS, coverage"]
            assert low <= value <= high and error > 0
            assert value < 0.88 if coverage is None else abs(value - coverage) < 0.03
        assert sets["differences"]["sharp"]["like sharp"]["APS, size"] == [0.0] * 4
        assert sets["differences"]["sharp"]["calibrated"]["APS, size"][0] != 0.0
    assert all("prediction_sets" not in entry for entry in result["shifts"])
    assert result["strong_shift"]["sets"] == 1  # of labels: the shifts are copies of the same data


def test_sets_of_wanted_methods_alone():
    x, y = torch.randn(40, 3), torch.arange(40) % 3
    found = evaluate({"a": lambda x: x.softmax(1), "b": lambda x: x.softmax(1)}, [(x, y)], sets=["b"], n_resamples=10)
    assert list(found["test"]["prediction_sets"]["scores"]) == ["b"]


def summary(result):
    about = {name: {"role": "candidate" if name == "calibrated" else ""} for name in result["test"]["scores"]}
    units = {"splits": 1, "rest": 0, "networks": 1, "draws": 1}
    return result | {"predictors": about, "seeds": [0], "units": units, "same_data": True}


def test_the_report_shows_them_where_they_are(result):
    shown, differences = tables(summary(result))
    assert [title for title, _ in shown.sections] == ["THR", "APS", "RAPS"]
    assert shown.columns[-2:] == ["strong shift: holds %", "strong shift: size"]
    value = result["test"]["prediction_sets"]["scores"]["sharp"]["APS, size"][0]
    assert shown.sections[1][1][1][0] == "sharp"
    assert shown.sections[1][1][1][2].startswith(f"{value:.3f} ± ")
    assert differences.sections[0][1][0][0] == "minus sharp"
    without = copy.deepcopy(summary(result))
    del without["test"]["prediction_sets"], without["strong_shift"]["prediction_sets"]
    assert tables(without) == []


def test_records_without_sets_have_no_such_topic():
    from debiased_laplace.evaluation.records import read_json
    from tests.documented import RECORDS

    for name, old in read_json(RECORDS / "results.json").items():
        assert ("prediction_sets" in old["test"]) == ("Prediction sets with a guarantee" in by_topic(old)), name


def test_randomised_scores_of_the_suite_are_those_of_the_package():
    assert CLASS_SCORES == {"THR": conformal.THR(), "APS": conformal.APS(), "RAPS": conformal.RAPS()}


# -- of the page -----------------------------------------------------------------------------------


@pytest.fixture
def halves(experiments, tmp_path):
    """Predictions of the two halves of one network's test data, with one strong shift."""
    import sets

    folder = tmp_path / "sets"
    folder.mkdir()
    for seed in (0, 1):
        arrays = {"sizes\n\n" + name: np.array(n) for name, n in (("train", 900), ("validation", N), ("scale", 1.0))}
        for place, condition in enumerate(("test", "noise 3")):
            for method in sets.METHODS["classes"]:
                p, y = classifier(seed=10 * seed + place)
                sharper = p ** (1 + 0.1 * len(method) / 30 + seed)  # the halves differ by more than their errors
                arrays[f"{condition}\n{method}\nprobabilities"] = sharper / sharper.sum(1, keepdims=True)
                arrays[f"{condition}\n\ntargets"] = y
        np.savez(folder / f"cifar10.{seed}.npz", **arrays)
    return sets, SimpleNamespace(out=tmp_path, data_dir=None, cache=tmp_path, seeds=None)


def test_halves_of_one_split_are_joined_as_folds(halves, monkeypatch):
    sets, options = halves
    monkeypatch.setattr(sets, "N_RESAMPLES", 40)
    record = sets.measure("cifar10", options)
    assert (record["seeds"], record["folds"], record["n"]) == (2, 2, N)
    entries = [sets._entries(sets.predictions("cifar10", seed, options), 0.1)["test"] for seed in (0, 1)]
    found = record["levels"]["0.1"]["test"]
    for method in found["scores"]:
        (a, s, *_), (b, t, *_) = (entry["scores"][method]["APS, size"] for entry in entries)
        # Of all data: no scatter between the halves, and the error of twice as many.
        expected = [(a + b) / 2, math.sqrt((s**2 + t**2) / 2) / math.sqrt(2)]
        assert found["scores"][method]["APS, size"][:2] == pytest.approx(expected, rel=1e-12)
    n = sum(
        len(where["differences"][second][first])
        for level in record["levels"].values() for where in level.values() for first, second in sets.PAIRS
    )  # fmt: skip
    assert f"there are {n} differences." in sets.chance({"cifar10": record})
    assert "1 network, splits: 1, both halves of each in turn | 900" in sets.data({"cifar10": record})
    options.seeds = 1
    with pytest.raises(SystemExit, match="Expected whole splits of cifar10, each of 2 seeds, got --seeds 1"):
        sets.measure("cifar10", options)


def test_methods_that_a_file_lacks_are_added_to_it(halves, monkeypatch):
    sets, options = halves
    path, rule = options.out / "sets" / "cifar10.0.npz", "temperature, one standard error"
    with np.load(path) as file:
        whole = {key: file[key] for key in file.files}
    np.savez(path, **{key: array for key, array in whole.items() if key.split("\n")[1] != rule})
    asked = []

    def predicted(task, context, methods):
        asked.append((context.seed, methods))
        return {tuple(key.split("\n")): array for key, array in whole.items() if key.split("\n")[1] in methods}

    monkeypatch.setattr(sets, "predicted", predicted)
    for _ in range(2):  # once, and then it is there
        found = sets.predictions("cifar10", 0, options)
        assert np.array_equal(found["noise 3"][rule]["probabilities"], whole[f"noise 3\n{rule}\nprobabilities"])
        assert set(found["test"]) == {"", *sets.METHODS["classes"]}
    assert asked == [(0, [rule])]


def test_every_method_is_its_own_predictor(experiments, tmp_path):
    """The temperatures by both rules, and posteriors, on digits: as the package has them."""
    import sets

    task, context = Task.load("digits"), Context(0, None, tmp_path, quick=True)
    model, validation = task.model(context), list(task.call("val_loader", context))
    inputs = validation[0][0][:5]
    with torch.no_grad():
        outputs = model(inputs).double()
    for method, selection in sets.RULES.items():
        temperature, _ = tuned_temperature(model, validation, selection)
        found = sets.predictor(method, model, task, context, validation)(inputs).probabilities
        assert torch.allclose(found, (outputs / temperature).softmax(1), rtol=1e-9, atol=0)
    found = sets.predictor(sets.DEBIASED, model, task, context, validation)(inputs).probabilities
    assert not torch.allclose(found, outputs.softmax(1), atol=1e-4)
    assert torch.equal(found.argmax(1), outputs.argmax(1))
