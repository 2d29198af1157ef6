"""Scores against hand-made cases and independent computations; shifts; records; summaries; sentences; files."""

from __future__ import annotations

import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from torch import nn

from debiased_laplace import Single, TwoBatch
from debiased_laplace.evaluation import metrics, records, shifts
from debiased_laplace.evaluation.compare import compare, run
from debiased_laplace.evaluation.report import render, write_outputs
from debiased_laplace.evaluation.statement import plus_minus, statement
from debiased_laplace.evaluation.summary import difference, mean_and_error, paired_difference, summarise, verdict
from debiased_laplace.evaluation.tables import tables
from debiased_laplace.evaluation.tasks import Method, Options, Task, settings_of, standard_methods
from tests.tolerances import EXACT, assert_equal

# -- metrics -----------------------------------------------------------------------------------


def draws(n: int = 400, classes: int = 5, sharpness: float = 3.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    logits = sharpness * generator.standard_normal((n, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probabilities, generator.integers(classes, size=n)


def independent_ece(probabilities: np.ndarray, targets: np.ndarray, bins: int = 15) -> float:
    total = 0.0
    for b in range(bins):
        confidence, hit = probabilities.max(1), probabilities.argmax(1) == targets
        inside = (confidence >= b / bins) & ((confidence < (b + 1) / bins) | (b == bins - 1))
        total += abs(float((hit[inside] - confidence[inside]).sum()))
    return total / len(targets)


def test_scores_by_hand() -> None:
    probabilities, targets = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [0, 1]
    scores = metrics.classification_metrics(probabilities, targets)
    assert scores["accuracy"] == 0.5
    assert scores["nll"] == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2, rel=EXACT)
    assert scores["brier"] == pytest.approx((0.25 + 0.09 + 0.04 + 0.01 + 0.81 + 0.64) / 2, rel=EXACT)
    assert scores["ece"] == pytest.approx((0.5 + 0.8) / 2, rel=EXACT)
    assert sum(scores["reliability"]["counts"]) == 2
    assert scores["reliability"]["counts"][7] == scores["reliability"]["counts"][12] == 1


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 50.0])
def test_ece_is_the_independent_one(sharpness: float) -> None:
    probabilities, targets = draws(sharpness=sharpness)
    assert metrics.expected_calibration_error(probabilities, targets) == pytest.approx(
        independent_ece(probabilities, targets), rel=EXACT
    )


def test_ece_at_the_edges_of_bins() -> None:
    # A confidence of exactly one belongs to the last bin, together with 0.97.
    probabilities = np.array([[1.0, 0.0], [0.03, 0.97], [0.5, 0.5], [0.8, 0.2]])
    targets = np.array([0, 0, 0, 0])
    expected = (abs(1 - 0.985 * 2) + 0.5 + 0.2) / 4
    assert metrics.expected_calibration_error(probabilities, targets) == pytest.approx(expected, rel=EXACT)
    bins = metrics.reliability(probabilities, targets)
    assert len(bins.counts) == 15
    assert bins.counts[14] == 2
    assert bins.confidences[14] == pytest.approx(1.97)
    assert bins.correct[14] == 1


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_ece_of_few_different_targets(classes: int) -> None:
    # netcal takes targets with two different values for a binary problem if it sees the whole table.
    probabilities, _ = draws(60, classes)
    for targets in (np.zeros(60, dtype=int), np.arange(60) % 2):
        assert metrics.expected_calibration_error(probabilities, targets) == pytest.approx(
            independent_ece(probabilities, targets), rel=EXACT
        )


@pytest.mark.parametrize("n_bins", [1, 7, 15])
def test_ece_is_that_of_the_reliability_bins(n_bins: int) -> None:
    probabilities, targets = draws()
    bins = metrics.reliability(probabilities, targets, n_bins)
    gaps = np.abs(np.array(bins.confidences) - np.array(bins.correct)).sum() / len(targets)
    assert metrics.expected_calibration_error(probabilities, targets, n_bins) == pytest.approx(gaps, rel=EXACT)


def test_adaptive_ece() -> None:
    confidence = np.array([0.6, 0.7, 0.8, 0.9])
    probabilities = np.stack([confidence, 1 - confidence], 1)
    targets = np.array([0, 1, 0, 1])
    expected = (abs(1.3 - 1) + abs(1.7 - 1)) / 4
    assert metrics.adaptive_calibration_error(probabilities, targets, 2) == pytest.approx(expected, rel=EXACT)
    many, labels = draws(450)
    inside = np.sort(many.max(1)).reshape(15, 30)  # no ties: bins are equally full
    order = np.argsort(many.max(1))
    hits = (many.argmax(1) == labels)[order].reshape(15, 30)
    expected = np.abs(inside.mean(1) - hits.mean(1)).mean()
    assert metrics.adaptive_calibration_error(many, labels) == pytest.approx(expected, rel=EXACT)


def test_adaptive_ece_does_not_depend_on_the_order_of_ties() -> None:
    probabilities = np.tile([1.0, 0.0], (40, 1))
    probabilities[:5] = [0.7, 0.3]
    targets = (np.arange(40) % 3 == 0).astype(int)
    values = {
        round(metrics.adaptive_calibration_error(probabilities[order], targets[order]), 12)
        for order in (np.arange(40), np.arange(40)[::-1], np.random.default_rng(0).permutation(40))
    }
    assert len(values) == 1


def test_nll_of_an_impossible_target_is_infinite() -> None:
    assert metrics.negative_log_likelihood([[1.0, 0.0], [0.5, 0.5]], [1, 0]) == math.inf


def test_tensors_and_half_precision() -> None:
    probabilities, targets = draws(50)
    expected = metrics.classification_metrics(probabilities, targets)
    found = metrics.classification_metrics(torch.from_numpy(probabilities).requires_grad_(), torch.from_numpy(targets))
    assert found == expected
    half = metrics.classification_metrics(torch.from_numpy(probabilities).bfloat16().softmax(1), targets)
    assert half["accuracy"] > 0


@pytest.mark.parametrize(
    ("probabilities", "targets", "message"),
    [
        ([[0.5, 0.5], [math.nan, 0.5]], [0, 0], "finite probabilities, got NaN or infinity in 1 of 2 rows.*row 1"),
        ([[0.5, 0.6]], [0], "rows sum to one.*sum of 1.1 in row 0. Apply softmax"),
        ([[1.5, -0.5]], [0], "non-negative"),
        ([0.5, 0.5], [0], r"shape \[N, C\].*got \(2,\)"),
        ([[1.0]], [0], "two classes"),
        (np.zeros((0, 3)), [], "at least one datum"),
        ([[0.5, 0.5]], [0, 1], r"integer targets of shape \[1\]"),
        ([[0.5, 0.5]], [0.0], "integer targets"),
        ([[0.5, 0.5]], [2], "from 0 to 1.*got 2 to 2"),
        ([[0.5, 0.5]], [-1], "from 0 to 1"),
        ([["a", "b"]], [0], "Expected numbers in probabilities"),
    ],
)
def test_bad_predictions_are_refused(probabilities: Any, targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.classification_metrics(probabilities, targets)


def test_number_of_bins_is_checked() -> None:
    with pytest.raises(ValueError, match="positive number of bins, got 0"):
        metrics.expected_calibration_error([[0.5, 0.5]], [0], 0)


@pytest.mark.parametrize(
    ("inside", "outside", "auroc", "fpr95"),
    [
        ([0.1, 0.2, 0.3], [0.7, 0.8, 0.9], 1.0, 0.0),  # separated
        ([0.7, 0.8, 0.9], [0.1, 0.2, 0.3], 0.0, 1.0),  # reversed
        ([0.5, 0.5], [0.5, 0.5, 0.5], 0.5, 1.0),  # all tied: finding all calls everything foreign
        ([0.1, 0.5], [0.5, 0.9], 0.875, 0.5),  # one tie at the threshold is called foreign
        ([0.1, 0.2, 0.3, 0.4], [0.25], 0.5, 0.5),
    ],
)
def test_out_of_distribution_by_hand(inside: list[float], outside: list[float], auroc: float, fpr95: float) -> None:
    score, is_outside = [*inside, *outside], [0] * len(inside) + [1] * len(outside)
    assert metrics.auroc(score, is_outside) == pytest.approx(auroc, rel=EXACT)
    assert metrics.fpr95(score, is_outside) == pytest.approx(fpr95, rel=EXACT)


def test_fpr95_leaves_five_per_cent_unfound() -> None:
    inside, outside = np.arange(20) / 20 + 0.01, np.arange(20) / 20 + 1.0
    outside[0] = -1.0  # one of twenty may be missed
    labels = np.repeat([0, 1], 20)
    assert metrics.fpr95(np.concatenate([inside, outside]), labels) == 0.0
    outside[1] = 0.5  # the second one may not: ten known data score above it
    assert metrics.fpr95(np.concatenate([inside, outside]), labels) == 0.5


def test_positive_is_outside() -> None:
    sure, unsure = np.tile([0.99, 0.01], (30, 1)), np.tile([0.55, 0.45], (20, 1))
    assert metrics.out_of_distribution_metrics(sure, unsure) == {"auroc": 1.0, "fpr95": 0.0}
    assert metrics.out_of_distribution_metrics(unsure, sure) == {"auroc": 0.0, "fpr95": 1.0}


def test_foreignness_keeps_the_order_of_saturated_probabilities() -> None:
    probabilities = torch.tensor([[1.0, 1e-12], [1.0, 1e-20]])
    score = metrics.foreignness(probabilities)
    assert score[0] > score[1] > 0
    assert metrics.foreignness([[0.7, 0.1, 0.2]])[0] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("score", "is_outside", "message"),
    [
        ([0.1, math.nan], [0, 1], "finite scores, got 1"),
        ([0.1, 0.2], [1, 1], r"both 0 \(known\) and 1 \(foreign\), got \[1\]"),
        ([0.1, 0.2], [0, 2], "both 0"),
        ([0.1, 0.2], [0], r"one shape \[N\], got \(2,\) and \(1,\)"),
    ],
)
def test_bad_scores_are_refused(score: Any, is_outside: Any, message: str) -> None:
    for function in (metrics.auroc, metrics.fpr95):
        with pytest.raises(ValueError, match=message):
            function(score, is_outside)


# -- shifts ------------------------------------------------------------------------------------


def images(n: int = 6, channels: int = 2) -> torch.Tensor:
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def test_noise_has_its_strength_and_leaves_the_global_state() -> None:
    state = torch.get_rng_state()
    grey = torch.full((200, 1, 8, 8), 0.5)
    noisy = shifts.gaussian_noise(grey, 0.05, seed=1)
    assert float(noisy.std()) == pytest.approx(0.05, rel=0.03)
    assert torch.equal(noisy, shifts.gaussian_noise(grey, 0.05, seed=1))
    assert not torch.equal(noisy, shifts.gaussian_noise(grey, 0.05, seed=2))
    assert torch.equal(state, torch.get_rng_state())
    strong = shifts.gaussian_noise(grey, 5.0, seed=1)
    assert (float(strong.min()), float(strong.max())) == (0.0, 1.0)


def test_rotation_is_counter_clockwise() -> None:
    assert_equal(shifts.rotate(images(), 90), torch.rot90(images(), 1, (2, 3)), 1e-6)
    assert_equal(shifts.rotate(images(), 0), images())
    assert shifts.rotate(images(), 30).shape == images().shape


def test_shuffled_patches_are_the_same_patches() -> None:
    original, shuffled = images(), shifts.shuffle_patches(images(), 2, seed=0)
    assert not torch.equal(original, shuffled)

    def patches(x: torch.Tensor) -> list[list[tuple[float, ...]]]:
        cut = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # [N, patches, channels * 4]
        return [sorted(tuple(patch.tolist()) for patch in image) for image in cut]

    assert patches(original) == patches(shuffled)
    assert torch.equal(shuffled, shifts.shuffle_patches(images(), 2, seed=0))
    with pytest.raises(ValueError, match="divides the 8 x 8 images, got 3"):
        shifts.shuffle_patches(images(), 3, seed=0)


def test_blobs_have_the_histogram_of_the_image_and_are_smooth() -> None:
    blobs = shifts.smooth_blobs(images(), sigma=1.5, seed=0)
    assert torch.equal(blobs.flatten(2).sort(2).values, images().flatten(2).sort(2).values)
    assert float(blobs.diff(dim=3).abs().mean()) < 0.6 * float(images().diff(dim=3).abs().mean())


def test_images_are_checked() -> None:
    with pytest.raises(ValueError, match=r"floating-point images of shape .* got torch.float32 of shape \(3, 8, 8\)"):
        shifts.rotate(torch.rand(3, 8, 8), 10)
    with pytest.raises(ValueError, match=r"got torch\.uint8"):
        shifts.gaussian_noise(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 0.1, seed=0)
    with pytest.raises(ValueError, match="non-negative standard deviation of the noise, got -1"):
        shifts.gaussian_noise(images(), -1, seed=0)
    with pytest.raises(ValueError, match="non-negative standard deviation of the blur"):
        shifts.smooth_blobs(images(), sigma=-1, seed=0)


# -- records -----------------------------------------------------------------------------------


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "results.json"
    records.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.write_json(path, {"a": math.inf})

    def crash(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="disk full"):
        records.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_records_of_other_settings_are_neither_used_nor_overwritten(tmp_path: Path) -> None:
    settings = {"epochs": 3, "split": Single()}
    record = {"schema_version": records.SCHEMA_VERSION, "seed": 0, "settings": records.jsonable(settings)}
    records.write_json(records.record_path(tmp_path, 0, settings), record)
    assert records.load_record(tmp_path, 0, settings) == record
    assert records.load_record(tmp_path, 1, settings) is None
    assert records.load_record(tmp_path, 0, {**settings, "epochs": 4}) is None
    assert records.record_path(tmp_path, 0, {**settings, "epochs": 4}) != records.record_path(tmp_path, 0, settings)
    others = [record | {"settings": {}}, record | {"schema_version": 0}, record | {"seed": 1}]
    for content in ('{"seed": 0', "[]", *map(json.dumps, others)):
        records.record_path(tmp_path, 0, settings).write_text(content)
        assert records.load_record(tmp_path, 0, settings) is None


# -- the comparison ----------------------------------------------------------------------------

METHODS = standard_methods(16)
OPTIONS = Options(grid_size=8, batch_size=7)


def toy(seed: int, calls: list[int] | None = None) -> Task:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(100))

    def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(n, 4, generator=generator)
        return x, (x @ weights + torch.randn(n, 3, generator=generator)).argmax(1)

    train, validation, test = data(60), data(30), data(40)

    def model(device: torch.device) -> nn.Module:
        if calls is not None:
            calls.append(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        return network.to(device)

    return Task(
        "a toy", "Random data.", model, lambda: iter([train]),
        lambda: zip(*(t.split(11) for t in validation), strict=True),
        {"test": test, "shifted": (test[0] + 1, test[1])}, {"far": 5 * test[0]}, 60, {"test": "Plain."},
    )  # fmt: skip


@pytest.fixture(scope="module")
def three() -> list[dict[str, Any]]:
    return [compare(toy(seed), METHODS, OPTIONS, seed=seed) for seed in range(3)]


def test_a_record_is_json_and_complete(three: list[dict[str, Any]]) -> None:
    record = three[0]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert list(record["methods"]) == [method.name for method in METHODS]
    for method in METHODS:
        entry = record["methods"][method.name]
        assert set(entry["conditions"]) == {"test", "shifted"}
        assert set(entry["ood"]["far"]) == {"auroc", "fpr95"}
        assert "predict" in entry["seconds"]
        assert ("curve" in entry) == (method.kind == "laplace")
        assert ("distances" in entry) == (method.role in ("baseline", "candidate"))
    assert record["task"]["n_parameters"] == 4 * 8 + 8 + 8 * 3 + 3
    assert record["environment"]["versions"]["torch"]


def test_map_and_temperature_are_what_they_say(three: list[dict[str, Any]]) -> None:
    task = toy(0)
    inputs, targets = task.tests["test"]
    with torch.no_grad():
        outputs = task.model(torch.device("cpu"))(inputs)
    nll = float(nn.functional.cross_entropy(outputs, targets))
    assert three[0]["methods"]["MAP"]["conditions"]["test"]["nll"] == pytest.approx(nll, rel=1e-5)
    scaled = three[0]["methods"]["temperature scaling"]
    expected = float(nn.functional.cross_entropy(outputs / scaled["temperature"], targets))
    assert scaled["conditions"]["test"]["nll"] == pytest.approx(expected, rel=1e-5)
    assert scaled["validation_nll"] <= three[0]["methods"]["MAP"]["validation_nll"]


def test_the_edge_of_the_grid_is_recorded_and_not_shouted(recwarn: pytest.WarningsRecorder) -> None:
    options = Options(grid_size=3, log_prior_prec_min=-4, log_prior_prec_max=-3)
    entry = compare(toy(0), METHODS[2:3], options)["methods"]["single-batch K-FAC"]
    assert entry["edge"] == "largest"
    assert "largest of the grid" in entry["warnings"][0]
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_distance_is_the_log_ratio_of_functional_variances() -> None:
    """Against dense Jacobians and the posterior's own covariance product; the reference itself is at zero."""
    from debiased_laplace import DebiasedLaplace

    task, methods = toy(1), (METHODS[3], METHODS[4])
    record = compare(task, methods, Options(grid_size=8, distance_inputs=10), seed=1)
    model, inputs = task.model(torch.device("cpu")), task.tests["test"][0][:10]
    names = [name for name, _ in model.named_parameters()]

    def outputs(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (inputs,))

    jacobians = torch.cat(
        [j.flatten(2) for j in torch.autograd.functional.jacobian(outputs, tuple(model.parameters()))], 2
    )
    logs = []
    for method in methods:
        la = DebiasedLaplace(model, "classification", prior_precision=1.0)
        la.fit(task.train(), generator=1, **method.fit)
        logs.append(la.functional_variance(jacobians).diagonal(dim1=1, dim2=2).double().log())
    ratio = logs[0] - logs[1]
    at_one = record["methods"]["debiased K-FAC"]["distances"][1]
    assert at_one["prior_precision"] == 1.0
    assert at_one["absolute"] == pytest.approx(float(ratio.abs().mean()), rel=1e-3)
    assert at_one["signed"] == pytest.approx(float(ratio.mean()), rel=1e-3)
    same = compare(task, (Method("a", fit={"split": Single(), "budget": None}), METHODS[4]), OPTIONS, seed=1)
    assert same["methods"]["a"]["distances"][0]["absolute"] == pytest.approx(0, abs=1e-12)


def test_batches_of_predictions_do_not_matter(three: list[dict[str, Any]]) -> None:
    whole = compare(toy(0), METHODS, Options(grid_size=8, batch_size=1000), seed=0)
    for name, entry in whole["methods"].items():
        other = three[0]["methods"][name]["conditions"]["shifted"]
        assert entry["conditions"]["shifted"]["nll"] == pytest.approx(other["nll"], rel=1e-4)


def test_methods_are_checked() -> None:
    with pytest.raises(ValueError, match="different names and at most one method of each role"):
        compare(toy(0), (Method("a"), Method("a")))
    with pytest.raises(ValueError, match="different names and at most one method of each role"):
        compare(toy(0), (Method("a", role="baseline"), Method("b", role="baseline")))
    with pytest.raises(ValueError, match=r"roles for methods of kind 'laplace' alone, got one for \['a'\]"):
        compare(toy(0), (Method("a", "map", role="reference"),))


def test_finished_seeds_are_kept_and_an_interruption_loses_none(tmp_path: Path) -> None:
    methods = (METHODS[0], Method("two", fit={"split": TwoBatch(), "budget": 16}))
    settings = settings_of(methods, OPTIONS, torch.device("cpu"), task="toy")
    calls: list[int] = []

    def interrupted(seed: int) -> Task:
        if seed == 2:
            raise KeyboardInterrupt
        return toy(seed, calls)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, range(3), interrupted, methods, OPTIONS, settings=settings)
    steps: list[tuple[int, str]] = []
    found = run(
        tmp_path, range(3), lambda seed: toy(seed, calls), methods, OPTIONS, settings=settings,
        progress=lambda seed, step: steps.append((seed, step)),
    )  # fmt: skip
    assert calls == [0, 1, 2]
    assert steps[:3] == [(0, "kept"), (1, "kept"), (2, "train")]
    assert [record["seed"] for record in found] == [0, 1, 2]
    other = settings_of(methods, Options(grid_size=9), torch.device("cpu"), task="toy")
    run(tmp_path, [0], lambda seed: toy(seed, calls), methods, Options(grid_size=9), settings=other)
    assert calls == [0, 1, 2, 0]
    assert len(list((tmp_path / "records").iterdir())) == 4


# -- summaries ---------------------------------------------------------------------------------


def test_mean_error_and_interval() -> None:
    assert mean_and_error([1.0, 2.0, 3.0])["standard_error"] == pytest.approx(1 / math.sqrt(3))
    assert mean_and_error([1.0])["standard_error"] is None
    first, second = [1.0, 2.0, 4.0, 3.5], [0.5, 1.0, 4.5, 2.0]
    entry, reference = paired_difference(first, second), ttest_rel(first, second).confidence_interval(0.95)
    assert entry["interval"] == pytest.approx([reference.low, reference.high])
    assert entry["mean"] == pytest.approx(0.625)
    assert not entry["shown"]
    assert paired_difference([2.0, 2.1, 2.2], [1.0, 1.1, 1.3])["shown"]
    assert paired_difference([2.0], [1.0]) == mean_and_error([1.0]) | {"interval": None, "shown": False}


def test_summary_pools_seeds(three: list[dict[str, Any]]) -> None:
    summary = summarise(three)
    method = summary["methods"]["debiased K-FAC"]
    values = [record["methods"]["debiased K-FAC"]["conditions"]["shifted"]["nll"] for record in three]
    assert method["conditions"]["shifted"]["nll"] == mean_and_error(values)
    assert sum(method["reliability"]["test"]["counts"]) == 3 * 40
    entry = difference(summary, "MAP", "conditions", "shifted", "nll")
    assert entry is not None
    others = [record["methods"]["MAP"]["conditions"]["shifted"]["nll"] for record in three]
    assert entry["mean"] == pytest.approx(np.mean(values) - np.mean(others))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_records_that_do_not_belong_together_are_refused(three: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="at least one record"):
        summarise([])
    with pytest.raises(ValueError, match="equal settings"):
        summarise([three[0], three[1] | {"settings": {"other": 1}}])
    with pytest.raises(ValueError, match=r"one record for each seed, got seeds \[0, 0\]"):
        summarise([three[0], three[0]])


def shifted_distances(three: list[dict[str, Any]], offsets: list[float]) -> dict[str, Any]:
    """A summary in which the candidate's distance is the baseline's plus an offset for each seed."""
    copies = json.loads(json.dumps(three))
    for record, offset in zip(copies, offsets, strict=True):
        mine, theirs = (record["methods"][name]["distances"] for name in ("debiased K-FAC", "single-batch K-FAC"))
        for a, b in zip(mine, theirs, strict=True):
            a["absolute"] = b["absolute"] + offset
    return summarise(copies)


@pytest.mark.parametrize(
    ("offsets", "answer", "word"),
    [
        ([-0.1, -0.11, -0.12], "debiased K-FAC is closer to the full-data K-FAC posterior", "better"),
        ([0.1, 0.11, 0.12], "debiased K-FAC is farther from the full-data K-FAC posterior", "worse"),
        ([-0.3, 0.1, 0.1], "3 seeds do not show whether", "within the error"),
    ],
)
def test_the_answer_follows_the_numbers(
    three: list[dict[str, Any]], offsets: list[float], answer: str, word: str
) -> None:
    summary = shifted_distances(three, offsets)
    said = statement(summary)
    assert answer in said["answer"]
    entry = difference(summary, "single-batch K-FAC", "distance", "tuned", "absolute")
    assert entry is not None
    assert verdict(entry) == word
    assert plus_minus(entry, 3, sign=True) in said["details"][0]
    assert ("which holds zero" in said["details"][0]) == (word == "within the error")


def test_one_seed_claims_nothing(three: list[dict[str, Any]]) -> None:
    summary = summarise(three[:1])
    assert "1 seed does not show whether" in statement(summary)["answer"]
    assert not any(entry["shown"] for entry in summary["differences"])
    cells = [cell for table in tables(summary) for _, rows in table.sections for row in rows for cell in row]
    assert "±" not in "".join(cells)
    assert "<h1>One</h1>" in render(summary, title="One")


def test_without_roles_nothing_is_compared() -> None:
    summary = summarise([compare(toy(0), (METHODS[0], Method("two", fit={"budget": 16})), OPTIONS)])
    assert summary["differences"] == []
    assert "Nothing was compared" in statement(summary)["answer"]
    assert render(summary, title="Alone")


def test_plus_minus() -> None:
    assert plus_minus({"mean": 0.1234, "standard_error": 0.01}, 1, scale=100) == "12.3 ± 1.0"
    assert plus_minus({"mean": -0.5, "standard_error": None}, 2) == "\N{MINUS SIGN}0.50"


# -- files -------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_outputs(three: list[dict[str, Any]], tmp_path: Path) -> None:
    summary = summarise(three)
    paths = write_outputs(tmp_path / "out", summary, title="A <toy>", notice="Mind & gap")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "reliability.png", "report.html"}
    results = json.loads(paths["results.json"].read_text())
    assert results["schema_version"] == records.SCHEMA_VERSION
    assert results["statement"] == statement(summary)
    assert [record["seed"] for record in results["records"]] == [0, 1, 2]
    assert paths["reliability.png"].read_bytes().startswith(b"\x89PNG")
    text = paths["report.html"].read_text()
    assert "A &lt;toy&gt;" in text
    assert "Mind &amp; gap" in text
    for table in tables(summary):
        assert table.title in text
    page = Page(text)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == len(METHODS) + 2
    assert all((p["src"] or "").startswith("data:image/png;base64,") and len(p["alt"] or "") > 20 for p in pictures)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe"}
    assert "http" not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert text.index(statement(summary)["answer"]) < text.index("How to read this")


def test_tables_fit_a_terminal_of_100_columns(three: list[dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    for table in tables(summarise(three), short=True):
        console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
