"""The comparison of any predictors: values, pairs, one pass, interruptions, errors; and the predictors themselves."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import brentq
from scipy.special import logsumexp
from torch import Tensor, nn

from debiased_laplace import DebiasedLaplace
from debiased_laplace.evaluation import (
    LaplacePredictor,
    Prediction,
    ensemble_predictor,
    evaluate,
    gaussian_predictor,
    point_predictor,
    records,
    tuned_temperature,
)
from debiased_laplace.evaluation.judge import scored
from debiased_laplace.evaluation.judge.conditions import ConditionError, conditions
from debiased_laplace.evaluation.judge.preflight import preflight
from debiased_laplace.evaluation.predictors import baselines, posterior
from debiased_laplace.evaluation.predictors.baselines import tuned_noise
from debiased_laplace.evaluation.predictors.peer import PeerPredictor
from debiased_laplace.evaluation.predictors.posterior import Shared
from debiased_laplace.evaluation.predictors.prediction import as_prediction, mutual_information
from debiased_laplace.evaluation.scores import bootstrap, classification, detection, weighted
from debiased_laplace.evaluation.scores.regression import regression_metrics
from tests.tolerances import EXACT, FLOAT32, assert_equal

B = 60


def draw(n: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, 3, generator=generator, dtype=torch.float64), torch.randint(
        3, (n,), generator=generator
    )


def cut(data: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(part.split(size) for part in data), strict=True))


def softmax(scale: float) -> Callable[[Tensor], Tensor]:
    return lambda inputs: (scale * inputs).softmax(1)


def gaussian(inputs: Tensor) -> tuple[Tensor, Tensor]:
    return inputs[:, :2], inputs[:, 1:].exp()


PREDICTORS = {"MAP": softmax(1.0), "temperature scaling": softmax(0.4), "other": softmax(-2.0)}
TEST, SHIFTED, FAR = draw(61), draw(50, 1, 2.0), draw(40, 2, 0.1)


class Counted:
    """A loader that remembers how often it was started and how many batches it gave."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches, self.starts, self.given = list(batches), 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.starts += 1
        for batch in self.batches:
            self.given += 1
            yield batch


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "predictors"}


def png(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [61, 7, 1])
def test_values_are_those_of_the_metrics_however_batches_are_cut(size: int) -> None:
    result = evaluate(
        PREDICTORS, cut(TEST, size), {"wide": {2: cut(SHIFTED, size), 4: cut(TEST, size)}}, {"far": cut(FAR, size)},
        n_resamples=B,
    )  # fmt: skip
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert not result["regression"]
    assert [(entry["name"], entry["severity"], entry["n"]) for entry in result["shifts"]] == [
        ("wide", 2, 50), ("wide", 4, 61)
    ]  # fmt: skip
    for entry, (inputs, targets) in ((result["test"], TEST), (result["shifts"][0], SHIFTED)):
        for name, predictor in PREDICTORS.items():
            expected = classification.classification_metrics(predictor(inputs), targets)
            bins = expected.pop("reliability")
            cells = entry["scores"][name]
            assert {score: cell[0] for score, cell in cells.items()} == pytest.approx(expected, rel=EXACT)
            assert entry["curves"][name]["reliability"]["counts"] == bins["counts"]
            assert entry["curves"][name]["reliability"]["correct"] == bins["correct"]
            assert all(low <= value <= high for value, _, low, high in (cells["nll"], cells["accuracy"]))
    for name, predictor in PREDICTORS.items():
        coverage, risk = classification.risk_coverage(predictor(TEST[0]), TEST[1])
        assert result["test"]["curves"][name]["coverage"] == pytest.approx(coverage, rel=1e-5)
        assert result["test"]["curves"][name]["risk"] == pytest.approx(risk, rel=1e-5)
    (ood,) = result["ood"]
    for name, predictor in PREDICTORS.items():
        expected = detection.out_of_distribution_metrics(predictor(TEST[0]), predictor(FAR[0]))
        cells = {key.removeprefix("maximum probability, "): cell[0] for key, cell in ood["scores"][name].items()}
        assert {key: cells[key] for key in expected} == pytest.approx(expected, rel=EXACT)
        for histogram in ood["histograms"][name].values():
            assert (sum(histogram["known"]), sum(histogram["foreign"])) == (61, 40)
    if size != 61:
        whole = evaluate(
            PREDICTORS, [TEST], {"wide": {2: [SHIFTED], 4: [TEST]}}, {"far": [FAR]}, n_resamples=B
        )  # fmt: skip
        assert without_seconds(whole) == without_seconds(result)


@pytest.mark.parametrize("columns", [True, False])
def test_values_of_a_regression_are_in_the_original_units(columns: bool) -> None:
    inputs = TEST[0]
    targets = inputs.sin()[:, :2] + 0.3
    predict = gaussian if columns else lambda x: tuple(part[:, 0] for part in gaussian(x))
    labels = targets if columns else targets[:, :1]  # [N, 1] for means [N]
    result = evaluate({"MAP": predict}, cut((inputs, labels), 9), target_scale=5.0, n_resamples=B)
    assert result["regression"]
    mean, variance = predict(inputs)
    expected = regression_metrics(5 * mean, 25 * variance, 5 * labels.reshape(mean.shape))
    assert {key: cell[0] for key, cell in result["test"]["scores"]["MAP"].items()} == pytest.approx(expected, rel=EXACT)
    assert set(result["test"]["curves"]["MAP"]) == {"expected", "observed"}
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_differences_are_paired() -> None:
    result = evaluate(PREDICTORS | {"twin": softmax(1.0)}, [TEST], {"wide": [SHIFTED]}, {"far": [FAR]}, n_resamples=B)
    for entry in (result["test"], *result["shifts"], *result["ood"]):
        assert set(entry["differences"]) == {"MAP", "temperature scaling"}
        for second, differences in entry["differences"].items():
            assert set(differences) == set(entry["scores"]) - {second}
            for first, cells in differences.items():
                for score, cell in cells.items():
                    difference = entry["scores"][first][score][0] - entry["scores"][second][score][0]
                    assert cell[0] == pytest.approx(difference, abs=1e-12)
        # the same resamples for both: a predictor does not differ from its twin
        assert all(cell == [0, 0, 0, 0] for cell in entry["differences"]["MAP"]["twin"].values())
    weights = weighted.resample_weights(61, B, 0)
    first, second = (
        bootstrap.classification_replicates(PREDICTORS[name](TEST[0]), TEST[1], weights) for name in ("other", "MAP")
    )
    cells = result["test"]["differences"]["MAP"]["other"]
    for score in first:
        difference = first[score] - second[score]
        assert cells[score] == pytest.approx(
            [difference.value, difference.standard_error, *difference.interval()], rel=EXACT
        )


def test_names_to_compare_with_that_are_not_there_are_left_out() -> None:
    result = evaluate({"a": softmax(1), "b": softmax(2)}, [TEST], compare_with=("b", "nobody"), n_resamples=B)
    assert list(result["test"]["differences"]) == ["b"]
    assert list(result["test"]["differences"]["b"]) == ["a"]


def test_targets_are_told_apart() -> None:
    other = TEST[1].clone()
    other[0] = (other[0] + 1) % 3
    digests = [
        evaluate({"MAP": softmax(1)}, [(TEST[0], y)], n_resamples=2)["test"]["targets"] for y in (TEST[1], other)
    ]
    assert digests[0] != digests[1]


# -- one pass --------------------------------------------------------------------------------------


def test_every_loader_is_read_once_and_every_predictor_asked_once_for_a_batch() -> None:
    loaders = [Counted(cut(data, 20)) for data in (TEST, SHIFTED, FAR)]
    sizes: list[int] = []

    def watched(inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        return inputs.softmax(1)

    evaluate({"MAP": watched, "b": softmax(2)}, loaders[0], {"wide": loaders[1]}, {"far": loaders[2]}, n_resamples=2)
    # two data of the first batch before anything is read
    assert [(loader.starts, loader.given) for loader in loaders] == [(2, 5), (2, 4), (2, 3)]
    assert sizes == [2, 2, 2, 20, 20, 20, 1, 20, 20, 10, 20, 20]


def test_generators_are_enough() -> None:
    expected = evaluate(PREDICTORS, cut(TEST, 20), {"wide": cut(SHIFTED, 20)}, {"far": cut(FAR, 20)}, n_resamples=B)

    def generator(data: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        yield from cut(data, 20)

    result = evaluate(
        PREDICTORS, generator(TEST), {"wide": zip(*(t.split(20) for t in SHIFTED), strict=True)},
        {"far": map(tuple, generator(FAR))}, n_resamples=B,
    )  # fmt: skip
    assert without_seconds(result) == without_seconds(expected)
    (read,) = preflight(PREDICTORS, conditions(generator(TEST)))
    assert torch.equal(torch.cat([inputs for inputs, _ in read.loader]), TEST[0])


@pytest.mark.parametrize("strict", [True, False])
def test_every_predictor_sees_inputs_of_every_look_before_anything_is_read(strict: bool) -> None:
    """Where one that fails later is no error, loaders like one before need no more than one that works."""
    seen: dict[str, list[int]] = {"a": [], "b": [], "c": []}

    def predictor(name: str, inputs: Tensor) -> Tensor:
        seen[name].append(inputs.shape[1])
        if name == "a" and not strict and float(inputs.abs().max()) > 100:
            raise RuntimeError("too large")
        return inputs[:, :3].softmax(1)

    wide = torch.cat([SHIFTED[0], SHIFTED[0]], 1), SHIFTED[1]
    shifts = {"wide": {1: [wide], 5: [wide]}, "far": [(1000 + SHIFTED[0], SHIFTED[1])]}
    preflight({name: partial(predictor, name) for name in seen}, conditions([TEST], shifts), strict=strict)
    everywhere = [3, 6, 6, 3]
    expected = {name: everywhere for name in seen} if strict else {"a": everywhere, "b": [3, 6, 3], "c": [3, 6]}
    assert seen == expected


def test_what_predictors_and_loaders_may_give() -> None:
    expected = evaluate({"p": softmax(1)}, [TEST], n_resamples=B)["test"]
    weight = torch.ones((), requires_grad=True)
    for predictor in (
        lambda x: x.softmax(1).numpy(),
        lambda x: Prediction(probabilities=x.softmax(1), functional_variance=x.square().sum(1)),
        lambda x: (weight * x).softmax(1),
    ):
        for targets in (TEST[1], TEST[1].int(), TEST[1].to(torch.uint8), TEST[1].numpy(), TEST[1].tolist()):
            assert evaluate({"p": predictor}, [(TEST[0], targets)], n_resamples=B)["test"] == expected
    nested = [({"ids": TEST[0], "mask": TEST[0], "labels": TEST[1]})]
    assert evaluate({"p": lambda batch: batch["ids"].softmax(1)}, nested, n_resamples=B)["test"] == expected
    y = TEST[0].sum(1)
    expected = evaluate({"p": lambda x: Prediction(mean=x[:, 0], variance=x[:, 1].exp())}, [(TEST[0], y)])["test"]
    for pair in (
        lambda x: (x[:, 0], x[:, 1].exp()),
        lambda x: [x[:, 0].numpy(), x[:, 1].exp().numpy()],
        lambda x: (x[:, :1], x[:, 1:2].exp()),
    ):
        assert evaluate({"p": pair}, [(TEST[0], y)])["test"]["scores"] == expected["scores"]


def test_out_of_distribution_data_are_told_by_everything_a_prediction_has() -> None:
    def rich(x: Tensor) -> Prediction:
        norms = x.square().sum(1)
        return Prediction(probabilities=x.softmax(1), functional_variance=norms, mutual_information=1 / norms)

    (entry,) = evaluate({"p": rich}, [TEST], None, {"far": [FAR]}, n_resamples=B)["ood"]
    score = np.concatenate([rich(data[0]).functional_variance for data in (TEST, FAR)])
    labels = np.repeat([0, 1], [61, 40])
    cells = entry["scores"]["p"]
    assert cells["functional variance, auroc"][0] == pytest.approx(detection.auroc(score, labels), rel=EXACT)
    assert cells["mutual information, auroc"][0] == pytest.approx(detection.auroc(1 / score, labels), rel=EXACT)
    assert len(cells) == 4 * 3
    # in- and out-of-distribution data are resampled independently, also if there are equally many
    (entry,) = evaluate({"p": rich}, [TEST], None, {"far": [(2 * TEST[0], TEST[1])]}, n_resamples=B)["ood"]
    norms, weights = TEST[0].square().sum(1), [weighted.resample_weights(61, B, seed) for seed in (0, 1)]
    replicates = bootstrap.detection_replicates(norms, 4 * norms, *weights)["auroc"]
    expected = [replicates.value, replicates.standard_error, *replicates.interval()]
    assert entry["scores"]["p"]["functional variance, auroc"] == pytest.approx(expected, rel=EXACT)


def test_targets_of_out_of_distribution_data_do_not_matter() -> None:
    """They need not be classes, not even numbers of one kind: nothing is said about them."""
    pictures = {"images": lambda x: x.sigmoid().reshape(-1, 1, 1, 3), "n_resamples": 2}
    expected = evaluate(PREDICTORS, [TEST], None, {"far": [FAR]}, **pictures)["ood"][0]["scores"]
    for targets in (FAR[1] + 90, torch.full((40,), math.nan), torch.randn(40, 4)):
        result = evaluate(PREDICTORS, [TEST], None, {"far": [(FAR[0], targets)]}, **pictures)
        assert result["ood"][0]["scores"] == expected


# -- the most uncertain inputs ---------------------------------------------------------------------


@pytest.mark.parametrize("highlight", [None, "MAP"])
def test_the_most_uncertain_inputs_are_kept(highlight: str | None) -> None:
    few = tuple(part[:5] for part in FAR)
    result = evaluate(
        PREDICTORS, cut(TEST, 7), {"wide": [SHIFTED]}, {"far": cut(few, 2)}, highlight=highlight, n_resamples=2,
        images=lambda x: x.sigmoid().reshape(-1, 3, 1, 1).expand(-1, 3, 2, 4),
    )  # fmt: skip
    assert "most_uncertain" not in result["shifts"][0]
    name = highlight or "other"
    for entry, (inputs, targets) in ((result["test"], TEST), (result["ood"][0], few)):
        assert entry["most_uncertain"]["predictor"] == name
        probabilities = PREDICTORS[name](inputs)
        order = (-(1 - probabilities.max(1).values)).argsort()[:8]
        shown = entry["most_uncertain"]["inputs"]
        assert [one["index"] for one in shown] == order.tolist()
        for one, index in zip(shown, order, strict=True):
            assert one["target"] == int(targets[index])
            assert one["predicted"] == int(probabilities[index].argmax())
            assert one["confidence"] == pytest.approx(float(probabilities[index].max()))
            picture = png(one["image"])
            assert picture.shape == (2, 4, 3)
            assert picture[0, 0].tolist() == (255 * inputs[index].sigmoid()).round().int().tolist()


def test_grey_pictures() -> None:
    result = evaluate({"p": softmax(1)}, [TEST], images=lambda x: x.reshape(-1, 1, 1, 3), n_resamples=2)
    one = result["test"]["most_uncertain"]["inputs"][0]
    assert png(one["image"])[0].tolist() == (255 * TEST[0][one["index"]].clamp(0, 1)).round().int().tolist()


# -- interruptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("regression", [False, True])
def test_an_interrupted_evaluation_goes_on(tmp_path: Path, regression: bool) -> None:
    def loaders() -> list[Counted]:
        labels = [(x, x[:, :2].sin() if regression else y) for x, y in (TEST, SHIFTED, TEST, FAR)]
        return [Counted(cut(data, 20)) for data in labels]

    asked: list[int] = []

    def predictor(inputs: Tensor) -> Any:
        asked.append(len(inputs))
        if len(inputs) > 2 and len([size for size in asked if size > 2]) == stop:
            raise KeyboardInterrupt
        return gaussian(inputs) if regression else inputs.softmax(1)

    def judge(counted: list[Counted], **options: Any) -> dict[str, Any]:
        shifts = {"wide": {1: counted[1], 5: counted[2]}}
        images = None if regression else lambda x: x.sigmoid().reshape(-1, 1, 1, 3)
        return evaluate(
            {"b": gaussian if regression else softmax(2), "MAP": predictor}, counted[0], shifts,
            None if regression else {"far": counted[3]}, n_resamples=B, images=images, **options,
        )  # fmt: skip

    stop = -1
    expected = judge(loaders())
    asked, stop = [], 8  # 3 batches with more than two data of each of the first loaders, and then the second
    with pytest.raises(KeyboardInterrupt):
        judge(loaders(), folder=tmp_path)
    stop, asked, steps, counted = -1, [], [], loaders()
    result = judge(counted, folder=tmp_path, progress=steps.append)
    assert without_seconds(result) == without_seconds(expected)
    assert steps == ["test", "wide 1", "wide 5"] + ([] if regression else ["far"])
    # of finished loaders two data are looked at, and whether the first batch and what is said of it are the same
    assert [loader.starts for loader in counted[:3]] == [2, 2, 2]
    assert [size for size in asked if size > 2] == [20] * 5 + ([] if regression else [20, 20])
    assert all(result["predictors"][name]["seconds"]["predict"] > 0 for name in ("b", "MAP"))
    with pytest.raises(KeyError):
        result["predictors"]["MAP"]["seconds"]["fit"]


def test_predictions_of_others_are_not_used(tmp_path: Path) -> None:
    evaluate({"a": softmax(1)}, [TEST], folder=tmp_path, n_resamples=2)
    expected = evaluate({"a": softmax(1), "b": softmax(2)}, [TEST], n_resamples=2)
    result = evaluate({"a": softmax(1), "b": softmax(2)}, [TEST], folder=tmp_path, n_resamples=2)
    assert without_seconds(result) == without_seconds(expected)
    again = evaluate({"b": softmax(2)}, [TEST], folder=tmp_path, n_resamples=2)
    assert list(again["test"]["scores"]) == ["b"]
    # nor those of another predictor of the same name, or on other data
    for predictor, data in ((softmax(3), TEST), (softmax(3), (TEST[0], 2 - TEST[1])), (softmax(3), SHIFTED)):
        expected = evaluate({"b": predictor}, [data], n_resamples=2)
        result = evaluate({"b": predictor}, [data], folder=tmp_path, n_resamples=2)
        assert without_seconds(result) == without_seconds(expected)


def test_names_that_look_alike_have_files_of_their_own(tmp_path: Path) -> None:
    ood = {"a b": [FAR], "a-b": [SHIFTED], "a/b": [(9 * FAR[0], FAR[1])]}
    expected = evaluate(PREDICTORS, [TEST], None, ood, n_resamples=2)
    result = evaluate(PREDICTORS, [TEST], None, ood, n_resamples=2, folder=tmp_path)
    assert without_seconds(result) == without_seconds(expected)


# -- errors ----------------------------------------------------------------------------------------

REAL = TEST[0].sum(1)
MODEL = nn.Linear(3, 3).double()
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "logits": ({"predictors": {"a": lambda x: x}}, ValueError, "predictor 'a', got a smallest.*look like logits"),
    "rows": ({"predictors": {"a": lambda x: x.softmax(1) / 2}}, ValueError, "rows sum to one.*a sum of 0.5"),
    "nan": (
        {"predictors": {"a": lambda x: x.softmax(1) * math.nan}}, ValueError,
        "finite probabilities from predictor 'a', got NaN or infinity for 2 of 2",
    ),
    "too few rows": ({"predictors": {"a": lambda x: x[1:].softmax(1)}}, ValueError, r"of 2 data.*got shape \(1, 3\)"),
    "a scalar": ({"predictors": {"a": lambda x: x.softmax(1).mean()}}, ValueError, r"one row for each, got shape \(\)"),
    "one column": ({"predictors": {"a": lambda x: x[:, :1].sigmoid()}}, ValueError, "two classes.*columns 1 - p and p"),
    "one probability": ({"predictors": {"a": lambda x: x[:, 0].sigmoid()}}, ValueError, "two classes.*'a'"),
    "none": ({"predictors": {"a": lambda x: None}}, TypeError, "pair .*from predictor 'a', got NoneType"),
    "a number": ({"predictors": {"a": lambda x: 3.0}}, TypeError, "got float"),
    "empty prediction": ({"predictors": {"a": lambda x: Prediction()}}, TypeError, "got Prediction"),
    "both": (
        {"predictors": {"a": lambda x: Prediction(probabilities=x, mean=x, variance=x)}}, TypeError, "got Prediction",
    ),
    "a crash": ({"predictors": {"a": lambda x: 1 / 0}}, ValueError, "'a' failed on the first batch.*ZeroDivisionError"),
    "another network": (
        {"predictors": {"a": lambda x: x.softmax(1), "b": lambda x: torch.cat([x, x], 1).softmax(1)},
         "test": [(TEST[0], TEST[1] + 3)]}, ValueError, "from 0 to 2 in the test data 'test'.*got 3 to 5",
    ),
    "mixed": (
        {"predictors": {"a": softmax(1), "b": lambda x: (x[:, 0], x[:, 0].exp())}}, ValueError,
        "predictors of one kind, got.*regression",
    ),
    "variance zero": (
        {"predictors": {"a": lambda x: (x[:, 0], 0 * x[:, 0])}, "test": [(TEST[0], REAL)]}, ValueError,
        "positive predictive variances from predictor 'a', got 0. Add the observation noise",
    ),
    "variance missing": (
        {"predictors": {"a": lambda x: Prediction(mean=x[:, 0])}, "test": [(TEST[0], REAL)]}, ValueError,
        "variance of the mean's shape from predictor 'a', got None",
    ),
    "variance of another shape": (
        {"predictors": {"a": lambda x: (x[:, 0], x[:, :1].exp())}, "test": [(TEST[0], REAL)]}, ValueError,
        r"variance of the mean's shape.*got \(2, 1\) for a mean of shape \(2,\)",
    ),
    "targets of another shape": (
        {"predictors": {"a": gaussian}, "test": [(TEST[0], REAL)]}, ValueError, r"targets with 2 number\(s\)",
    ),
    "out-of-distribution data of a regression": (
        {"predictors": {"a": lambda x: (x[:, 0], x[:, 0].exp())}, "test": [(TEST[0], REAL)],
         "out_of_distribution": {"far": [FAR]}}, ValueError, "Expected a classifier for out-of-distribution data",
    ),
    "label too large": ({"test": [(TEST[0], TEST[1] + 1)]}, ValueError, "from 0 to 2 in the test data.*got 1 to 3"),
    "negative label": ({"shifted": {"s": [(TEST[0], -TEST[1])]}}, ValueError, "in the shift data 's'.*got -2 to 0"),
    "float labels": ({"test": [(TEST[0], TEST[1].float())]}, ValueError, "integer dtype as targets.*torch.float32"),
    "boolean labels": ({"test": [(TEST[0], TEST[1] > 0)]}, ValueError, "integer dtype.*torch.bool"),
    "one-hot labels": (
        {"test": [(TEST[0], nn.functional.one_hot(TEST[1]))]}, ValueError, r"shape \(61, 3\). Use argmax",
    ),
    "labels of others": ({"test": [(TEST[0], TEST[1][:7])]}, ValueError, r"each of the 61 inputs .*shape \(7,\)"),
    "other inputs": (
        {"predictors": {"a": lambda x: MODEL(x).softmax(1)}, "shifted": {"s": [(torch.randn(9, 4).double(), TEST[1])]}},
        ValueError, r"one target for each of the 9 inputs.*a batch of the shift data 's'",
    ),
    "other shape": (
        {"predictors": {"a": lambda x: MODEL(x).softmax(1)},
         "shifted": {"s": {3: [(torch.randn(9, 4).double(), TEST[1][:9])]}}}, ValueError,
        r"'a' failed on the first batch of the shift data 's 3', whose inputs have shape \(9, 4\): RuntimeError",
    ),
    "empty": ({"test": []}, ValueError, "got an empty loader for the test data 'test'. A generator"),
    "empty ood": ({"out_of_distribution": {"far": iter([])}}, ValueError, "empty loader for the ood data 'far'"),
    "empty batch": ({"test": [(TEST[0][:0], TEST[1][:0])]}, ValueError, "got an empty loader for the test data"),
    "no loader": ({"shifted": {"s": 3}}, TypeError, "iterable of batches for the shift data 's', got int"),
    "triples": ({"test": [(TEST[0], TEST[1], TEST[1])]}, ValueError, "failed on the first batch of the test data"),
    "no predictor": ({"predictors": {}}, ValueError, "at least one predictor, got none"),
    "a name twice": (
        {"shifted": {"s 3": [TEST], "s": {3: [TEST]}}}, ValueError, "different names for all data, got .*'s 3', 's 3'",
    ),
    # what follows was noticed after predictions were made, or was not told in words
    "a pair with nothing": (
        {"predictors": {"a": lambda x: (x.softmax(1), None)}}, (TypeError, ValueError), "predictor 'a'",
    ),
    "nan in targets": (
        {"predictors": {"a": lambda x: (x[:, 0], x[:, 0].exp())}, "test": [(TEST[0], REAL * math.nan)]}, ValueError,
        "finite targets.*'test'",
    ),
    "three dimensions": (
        {"predictors": {"a": lambda x: (x[:, :, None], x[:, :, None].exp())}, "test": [(TEST[0], TEST[0][:, :, None])]},
        ValueError, "mean.*predictor 'a'",
    ),
    "nobody to show": ({"highlight": "nobody"}, ValueError, "highlight.*'nobody'"),
    "one resample": ({"n_resamples": 1}, ValueError, "at least two resamples"),
    "severity in words": ({"shifted": {"s": {"low": [TEST]}}}, (TypeError, ValueError), "severit.*'low'"),
    "pictures of one dimension": ({"images": lambda x: x}, ValueError, r"images.*\[N, channels, H, W\]"),
    "pictures that fail": ({"images": lambda x: 1 / 0}, ValueError, "images.*ZeroDivisionError"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_fails_before_anything_takes_long(case: str) -> None:
    options, error, message = BAD[case]
    sizes: list[int] = []

    def watched(predictor: Any) -> Any:
        def predict(inputs: Tensor) -> Any:
            sizes.append(len(inputs))
            return predictor(inputs)

        return predict

    options = {"predictors": {"a": softmax(1)}, "test": [TEST], "n_resamples": 2} | options
    options["predictors"] = {name: watched(predictor) for name, predictor in options["predictors"].items()}
    with pytest.raises(error, match=message):
        evaluate(**options)
    assert all(size <= 2 for size in sizes)


def test_later_batches_are_checked_too() -> None:
    labels = TEST[1].clone()
    labels[60] = 3
    with pytest.raises(ValueError, match=r"from 0 to 2 in the shift data 's', batch 4.*got 3 to 3"):
        evaluate({"MAP": softmax(1)}, [TEST], {"s": cut((TEST[0], labels), 20)}, n_resamples=2)
    inputs = TEST[0].clone()
    inputs[45] = math.nan
    with pytest.raises(ConditionError, match=r"Nothing can be predicted on the test data 'test'; a: batch 3: .*NaN"):
        evaluate({"a": softmax(1), "b": softmax(2)}, cut((inputs, TEST[1]), 20), n_resamples=2)


def test_a_predictor_that_fails_takes_nothing_from_the_others() -> None:
    """Wherever it fails; where that is on the test data it is left out, and elsewhere its scores are not defined."""
    inputs = TEST[0].clone()
    inputs[45] = math.nan

    def sound(x: Tensor) -> Tensor:
        return x.nan_to_num().softmax(1)

    broken, whole = cut((inputs, TEST[1]), 20), cut(TEST, 20)
    options = {"n_resamples": 5, "compare_with": ["a", "b"], "highlight": "b"}
    expected = evaluate({"a": sound}, broken, {"s": broken}, {"f": broken}, n_resamples=5, compare_with=["a"])
    result = evaluate({"a": sound, "b": softmax(1)}, broken, {"s": whole}, {"f": whole}, **options)
    assert list(result["test"]["scores"]) == list(result["shifts"][0]["scores"]) == ["a"]
    assert result["test"]["scores"] == expected["test"]["scores"]
    (reason,) = result["failures"]["b"]
    assert re.fullmatch(
        r"the test data 'test', batch 3: ValueError: Expected finite probabilities .*datum 5\..*", reason
    )
    result = evaluate({"a": sound, "b": softmax(1)}, whole, {"s": broken}, {"f": broken}, **options)
    for entry, sound_entry in ((result["shifts"][0], expected["shifts"][0]), (result["ood"][0], None)):
        if sound_entry is not None:
            assert entry["scores"]["a"] == sound_entry["scores"]["a"]
        assert all(np.isfinite(cell).all() for cell in entry["scores"]["a"].values())
        assert entry["scores"]["b"].keys() == entry["scores"]["a"].keys()
        assert all(math.isnan(cell[0]) for cell in entry["scores"]["b"].values())
        assert all(math.isnan(cell[0]) for cell in entry["differences"]["a"]["b"].values())
        assert "most_uncertain" not in entry
    assert [reason.split(":")[0] for reason in result["failures"]["b"]] == [
        "the shift data 's', batch 3", "the ood data 'f', batch 3"
    ]  # fmt: skip


def test_the_first_data_decide_only_if_they_shall() -> None:
    def fails(_: Tensor) -> Tensor:
        raise RuntimeError("out of everything")

    with pytest.raises(ValueError, match="Predictor 'b' failed on the first batch of the test data"):
        evaluate({"a": softmax(1), "b": fails}, [TEST], n_resamples=2)
    result = evaluate({"a": softmax(1), "b": fails}, [TEST], n_resamples=2, strict=False)
    assert result["failures"] == {"b": ["the test data 'test', batch 1: RuntimeError: out of everything"]}
    with pytest.raises(ValueError, match="Predictor 'b' failed on the first batch of the test data"):
        evaluate({"b": fails}, [TEST], n_resamples=2, strict=False)


def test_what_failed_is_kept_too(tmp_path: Path) -> None:
    inputs = TEST[0].clone()
    inputs[45] = math.nan
    data, both = cut((inputs, TEST[1]), 20), {"a": lambda x: x.nan_to_num().softmax(1), "b": softmax(1)}
    expected = evaluate(both, data, n_resamples=2, folder=tmp_path)
    assert without_seconds(evaluate(both, data, n_resamples=2, folder=tmp_path)) == without_seconds(expected)


def test_an_infinite_score_is_infinite_and_takes_nothing_else_away() -> None:
    """One target with the probability zero, of two predictors that are equal elsewhere."""
    probabilities = TEST[0].softmax(1).double()
    hard = probabilities.clone()
    hard[0] = torch.eye(3)[(TEST[1][0] + 1) % 3]
    index = (torch.arange(len(hard))[:, None], TEST[1])
    table = {"soft": probabilities, "hard": hard, "too": hard}
    predictors = {name: (lambda x, rows=rows: rows[x[:, 0].long()]) for name, rows in table.items()}
    result = evaluate(predictors, [index], compare_with=["soft", "hard"], n_resamples=200)
    test = result["test"]
    value, _, low, high = test["scores"]["hard"]["nll"]
    assert (value, high) == (math.inf, math.inf) and low <= value
    assert test["differences"]["soft"]["hard"]["nll"][0] == math.inf
    assert test["differences"]["hard"]["soft"]["nll"][0] == -math.inf
    assert math.isnan(test["differences"]["hard"]["too"]["nll"][0])
    expected = evaluate({"soft": predictors["soft"]}, [index], n_resamples=200)["test"]
    assert test["scores"]["soft"] == expected["scores"]["soft"]
    brier = np.square(hard.numpy() - np.eye(3)[TEST[1].numpy()]).sum(1)
    assert test["scores"]["hard"]["brier"][0] == pytest.approx(brier.mean(), rel=EXACT)
    assert test["differences"]["hard"]["too"]["brier"][:2] == [0, 0]
    text = json.dumps(records.encode(result), allow_nan=False)
    assert repr(records.decode(json.loads(text))["test"]["scores"]) == repr(test["scores"])


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        (np.ones(5), np.ones(4)), (np.zeros(5), np.zeros(4)), (np.full(5, 1.0), np.full(4, 1 + 1e-16 * 4)),
        (np.array([5e-324, 0]), np.array([5e-324])), (np.array([1e300, 0]), np.array([1e308])),
        (np.log(3) + 1e-15 * np.arange(5), np.log(3) * np.ones(4)),
    ],
)  # fmt: skip
def test_histograms_of_scores_that_hardly_differ(inside: Any, outside: Any) -> None:
    """Such as the entropies of a network whose last layer is zero."""
    result = scored._histogram(inside, outside)
    assert (sum(result["known"]), sum(result["foreign"])) == (len(inside), len(outside))
    assert np.isfinite(result["edges"]).all() and (np.diff(result["edges"]) >= 0).all()


@pytest.mark.parametrize("value", [torch.full((2, 2), 0.5), np.full((2, 2), 0.5)])
def test_predictions_are_float64_arrays(value: Any) -> None:
    arrays = as_prediction(value, 2, "a").arrays()
    assert list(arrays) == ["probabilities"]
    assert arrays["probabilities"].dtype == np.float64


# -- predictors without a posterior ----------------------------------------------------------------


def network(seed: int = 0, outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, outputs)).double()


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    first, activation, _, last = model
    return last(activation(first(inputs))).detach()


def test_point_gaussian_and_ensemble() -> None:
    model, inputs = network().train(), TEST[0]
    assert_equal(point_predictor(model)(inputs).probabilities, outputs(model, inputs).softmax(1))
    scaled = point_predictor(model, temperature=2.5)(inputs).probabilities
    assert_equal(scaled, (outputs(model, inputs) / 2.5).softmax(1))
    assert not scaled.requires_grad
    assert model.training
    prediction = gaussian_predictor(model, 0.3)(inputs)
    assert_equal(prediction.mean, outputs(model, inputs))
    assert_equal(prediction.variance, torch.full_like(prediction.mean, 0.3))
    models = [network(seed) for seed in range(3)]
    several = torch.stack([outputs(member, inputs) for member in models])
    prediction = ensemble_predictor(models)(inputs)
    assert_equal(prediction.probabilities, several.softmax(-1).mean(0))
    assert_equal(prediction.functional_variance, several.var(0, correction=0).sum(-1))
    entropies = torch.distributions.Categorical(several.softmax(-1)).entropy()
    whole = torch.distributions.Categorical(several.softmax(-1).mean(0)).entropy()
    assert_equal(prediction.mutual_information, whole - entropies.mean(0), 1e-8)
    prediction = ensemble_predictor(models, 0.3)(inputs)
    assert_equal(prediction.mean, several.mean(0))
    assert_equal(prediction.variance, several.var(0, correction=0) + 0.3)
    with pytest.raises(ValueError, match="at least one network for an ensemble, got none"):
        ensemble_predictor([])


def test_the_noise_of_an_ensemble_is_the_best_one() -> None:
    inputs = TEST[0]
    targets = inputs.sin() + 0.4 * torch.randn(61, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    models = [network(seed) for seed in range(3)]
    error = (targets - outputs(models[0], inputs)).square().mean()
    assert tuned_noise(models[:1], cut((inputs, targets), 20)) == pytest.approx(float(error), rel=EXACT)
    noise = tuned_noise(models, cut((inputs, targets), 20))
    several = torch.stack([outputs(model, inputs) for model in models])
    squares, variance = (targets - several.mean(0)).square().numpy(), several.var(0, correction=0).numpy()

    def slope(value: float) -> float:  # of the mean loss in the noise variance
        total = variance + value
        return float((1 / total - squares / total**2).mean())

    assert noise == pytest.approx(brentq(slope, 1e-3, 10, xtol=1e-14), rel=1e-6)


def test_mutual_information() -> None:
    samples = torch.randn(7, 50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    assert float(mutual_information(samples[:1].expand(5, -1, -1)).max()) < EXACT
    opposite = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    assert float(mutual_information(opposite)) == pytest.approx(math.log(2), rel=EXACT)
    values = mutual_information(samples)
    assert bool((values > 0).all())
    assert bool((values < math.log(4)).all())
    almost = samples[:1].float().expand(30, -1, -1) * (1 + 1e-7 * torch.randn(30, 1, 1))
    assert bool((mutual_information(almost) >= 0).all())


@pytest.mark.parametrize("factor", [0.3, 1.0, 8.0])
def test_the_temperature_is_the_best_one(factor: float) -> None:
    from netcal.scaling import TemperatureScaling

    model, (inputs, _) = network(), draw(300, 3, 3.0)
    with torch.no_grad():
        for parameter in model[3].parameters():
            parameter.mul_(factor)
    logits = outputs(model, inputs).numpy()
    random = np.random.default_rng(0)
    cumulative = np.exp(logits / (2 * factor) - logsumexp(logits / (2 * factor), 1, keepdims=True)).cumsum(1)
    targets = (random.random((300, 1)) > cumulative).sum(1).clip(max=2)

    def slope(inverse: float) -> float:  # of the mean loss in the inverse temperature, in which it is convex
        probabilities = np.exp(inverse * logits - logsumexp(inverse * logits, 1, keepdims=True))
        return float(((probabilities * logits).sum(1) - logits[np.arange(300), targets]).mean())

    best = 1 / brentq(slope, 1e-3, 1e2, xtol=1e-14)
    temperature, loss = tuned_temperature(model, cut((inputs, torch.from_numpy(targets)), 64))
    assert temperature == pytest.approx(best, rel=1e-6)
    assert loss == pytest.approx(
        float(nn.functional.cross_entropy(torch.from_numpy(logits / best), torch.from_numpy(targets))), rel=EXACT
    )
    reference = TemperatureScaling()
    reference.fit(np.exp(logits - logsumexp(logits, 1, keepdims=True)), targets)
    assert temperature == pytest.approx(1 / float(np.ravel(reference.weights)[0]), rel=1e-3)


@pytest.mark.filterwarnings("ignore:Validation data do not determine the temperature:UserWarning")
def test_temperature_of_labels_of_other_integers_and_of_no_data() -> None:
    model, (inputs, targets) = network(), TEST
    expected = tuned_temperature(model, [TEST])
    for dtype in (torch.uint8, torch.int32, torch.int16):
        assert tuned_temperature(model, [(inputs, targets.to(dtype))]) == expected
    with pytest.raises(ValueError, match=r"got an empty loader. A generator can be read only once"):
        tuned_temperature(model, [])


# -- posteriors ------------------------------------------------------------------------------------


def fitted(likelihood: str = "classification", model: nn.Module | None = None, **keywords: Any) -> DebiasedLaplace:
    model = model or network(outputs=3 if likelihood == "classification" else 2)
    la = DebiasedLaplace(model, likelihood, seed=4, **keywords)
    inputs, targets = draw(80, 7)
    la.fit([(inputs, targets if likelihood == "classification" else inputs[:, :2].sin())], generator=1)
    return la


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "mean_field"])
def test_a_posterior_predicts_as_it_does(link: str, temperature: float) -> None:
    la = fitted()
    la.link, la.output_temperature, la.prior_precision = link, temperature, 3.0
    predictor = LaplacePredictor(la)
    result, inputs = predictor(TEST[0]), TEST[0]
    expected = la(inputs)
    assert_equal(result.probabilities, expected)
    _, variance = la._glm_predictive_distribution(inputs, diagonal_output=True)
    assert_equal(result.functional_variance, variance.sum(1))
    assert bool((result.mutual_information >= 0).all())
    # tuned once more, the predictor stays what it was
    la.prior_precision, la.output_temperature = 70.0, 1.1
    assert_equal(predictor(inputs).probabilities, expected)
    assert not torch.allclose(la(inputs), expected, atol=1e-3)


def test_mutual_information_is_of_samples_of_the_outputs() -> None:
    la = fitted()
    la.output_temperature = 1.5
    prediction = LaplacePredictor(la, n_samples=4000)(TEST[0]).mutual_information
    mean, variance = la._glm_predictive_distribution(TEST[0], diagonal_output=True)
    normals = torch.randn(4000, 1, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = mutual_information(((mean + variance.sqrt() * normals) / 1.5).softmax(-1))
    assert float((prediction - expected).abs().max()) < 0.1 * float(expected.max())


def test_a_regression_adds_the_noise() -> None:
    la = fitted("regression", sigma_noise=0.4, prior_precision=2.0)
    prediction = LaplacePredictor(la)(TEST[0])
    mean, covariance = la(TEST[0])
    variance = covariance.diagonal(dim1=1, dim2=2)
    assert_equal(prediction.mean, mean)
    assert_equal(prediction.variance, variance + 0.16)
    assert_equal(prediction.functional_variance, variance.sum(1))
    assert prediction.probabilities is None


@pytest.mark.parametrize("links", [("probit", "probit"), ("mc", "mc"), ("mean_field", "probit")])
def test_sharing_changes_nothing(links: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    several = [fitted(model=model), fitted(model=model, subset_of_weights="last_layer", hessian_structure="full")]
    members = []
    shared = Shared()
    for la in several:
        for prior, link in zip((1.0, 20.0), links, strict=True):
            la.prior_precision, la.link = prior, link
            members.append((LaplacePredictor(la, shared), LaplacePredictor(la), la(TEST[0])))
    calls = []
    original = posterior.functional_moments
    monkeypatch.setattr(posterior, "functional_moments", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    for inputs in (TEST[0], SHIFTED[0], TEST[0]):
        calls.clear()
        result = [together(inputs) for together, _, _ in members]
        assert len(calls) == 2  # once for each basis
        for shared_prediction, (_, alone, expected) in zip(result, members, strict=True):
            assert_equal(shared_prediction.probabilities, alone(inputs).probabilities)
            assert_equal(shared_prediction.mutual_information, alone(inputs).mutual_information)
            if inputs is TEST[0]:
                assert_equal(shared_prediction.probabilities, expected)


def test_a_loader_may_fill_one_buffer_again_and_again() -> None:
    la, shared = fitted(), Shared()
    predictor = LaplacePredictor(la, shared)

    def refilled() -> Iterator[tuple[Tensor, Tensor]]:
        buffer = torch.empty(20, 3, dtype=torch.float64)
        for inputs, targets in cut(draw(60), 20):
            yield buffer.copy_(inputs), targets

    expected = evaluate({"p": LaplacePredictor(la)}, cut(draw(60), 20), n_resamples=2)
    result = evaluate({"p": predictor}, refilled(), n_resamples=2)
    assert result["test"]["scores"] == expected["test"]["scores"]


@pytest.mark.parametrize("structure", ["kron", "full"])
@pytest.mark.parametrize("regression", [False, True])
def test_the_peer_predicts_as_it_does(regression: bool, structure: str) -> None:
    from laplace import Laplace

    model, (inputs, targets) = network(outputs=2 if regression else 3).float().eval(), draw(80, 7)
    inputs = inputs.float()
    la = Laplace(model, "regression" if regression else "classification", "all", structure)
    labels = inputs[:, :2].sin() if regression else targets
    dataset = torch.utils.data.TensorDataset(inputs, labels)
    la.fit(torch.utils.data.DataLoader(dataset, batch_size=40))
    prediction = PeerPredictor(la, regression)(inputs)
    if not regression:
        assert_equal(prediction.probabilities, la(inputs, link_approx="probit"), FLOAT32)
        return
    la.sigma_noise = 0.5
    mean, covariance = la(inputs)
    prediction = PeerPredictor(la, regression)(inputs)
    assert_equal(prediction.mean, mean, FLOAT32)
    assert_equal(prediction.variance, covariance.diagonal(dim1=1, dim2=2) + 0.25, FLOAT32)


@pytest.mark.parametrize("make", [point_predictor, lambda model: gaussian_predictor(model, 0.3)])
def test_a_predictor_copies_its_network_once(make: Callable[[nn.Module], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    original = baselines.in_evaluation_mode
    monkeypatch.setattr(baselines, "in_evaluation_mode", lambda model: (copies.append(model), original(model))[1])
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    predictor, inputs = make(model), TEST[0].double()
    prediction = [predictor(inputs) for _ in range(3)][-1]
    assert copies == [model]
    assert model.training and all(module.training for module in model.modules())  # the copy alone is not
    expected = copy.deepcopy(model).eval()(inputs)
    outputs = expected.softmax(1) if prediction.mean is None else expected
    assert_equal(prediction.probabilities if prediction.mean is None else prediction.mean, outputs.detach())
