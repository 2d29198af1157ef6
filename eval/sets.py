"""Prediction sets of networks, temperatures and posteriors: coverage, size, and for whom they hold.

    python eval/sets.py --data-dir <folder> [--tasks digits cifar10] [--only-document] [--docs docs]

Every seed of a task has its network (or one half of one network's test data, which the next seed has the other way
round); posteriors are fitted by ``dl.fit`` and tuned by ``tune`` on the validation data. Predictions of test and
strongly shifted data are kept in ``<out>/sets``, what is there already is used, methods that lack are added, and all
statistics are made from them. ``<docs>/records/sets.json`` has the tables' numbers, and
fills ``<docs>/sets.md`` between ``<!-- NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from documents import fill, markdown
from results import rounded
from torch import nn

import debiased_laplace as dl
from debiased_laplace import _data, conformal
from debiased_laplace.evaluation.judge.conditions import Condition
from debiased_laplace.evaluation.judge.groups import Groups
from debiased_laplace.evaluation.judge.predictions import predict
from debiased_laplace.evaluation.judge.sets import Sets
from debiased_laplace.evaluation.methods import ISOTROPIC, MAP, TEMPERATURE, TEMPERATURE_RULE
from debiased_laplace.evaluation.predictors.baselines import (
    gaussian_predictor,
    point_predictor,
    tuned_noise,
    tuned_temperature,
)
from debiased_laplace.evaluation.predictors.posterior import LaplacePredictor
from debiased_laplace.evaluation.predictors.prediction import Predictor
from debiased_laplace.evaluation.records import environment, read_json, write_json
from debiased_laplace.evaluation.report.numbers import number, plus_minus, with_interval
from debiased_laplace.evaluation.scores.cells import combine, cross_fitted
from debiased_laplace.evaluation.tasks import Context, Task

DEBIASED = "debiased K-FAC"
#: Seeds of each task.
CLASSIFIERS = {"digits": 8, "fashion-mnist": 2, "cifar10": 2}
REGRESSIONS = {"uci-concrete": 10, "uci-energy": 10, "uci-power-plant": 5, "uci-wine-quality-red": 10}
SHIFTS = ("noise", "rotation", "blur")
SEVERITIES = (3, 5)
#: Test data of a task, and of each shift, at most.
N_TEST, N_SHIFTED = 4000, 500
LEVELS = {"classification": (0.1, 0.01), "regression": (0.1,)}
N_RESAMPLES = 400
#: Batches of new data, how many there are in one, and how many data calibrate each time.
N_BATCHES = 2000
BATCH = 10
N_HELD = 200
#: First minus second; posteriors and the temperature that they are compared with are chosen by one rule.
PAIRS = (
    (TEMPERATURE, MAP), (TEMPERATURE_RULE, MAP), (ISOTROPIC, MAP), (DEBIASED, MAP),
    (DEBIASED, TEMPERATURE_RULE), (DEBIASED, ISOTROPIC),
)  # fmt: skip
Arrays = Mapping[str, Mapping[str, np.ndarray]]
RULES = {TEMPERATURE: "best", TEMPERATURE_RULE: "one_standard_error"}
STRUCTURES: dict[str, dl.Structure | None] = {ISOTROPIC: dl.Isotropic(), DEBIASED: None}
METHODS = {"regression": (MAP, *STRUCTURES), "classes": (MAP, *RULES, *STRUCTURES)}


# -- predictions -----------------------------------------------------------------------------------


def predictions(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Arrays of every method and targets of every condition, and how many data trained and tuned."""
    path, arrays = options.out / "sets" / f"{name}.{seed}.npz", dict[str, np.ndarray]()
    if path.exists():
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    there = {key.split("\n")[1] for key in arrays}
    missing = [method for method in METHODS["regression" if name in REGRESSIONS else "classes"] if method not in there]
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = predicted(Task.load(name), Context(seed, options.data_dir, options.cache), missing)
        arrays |= {"\n".join(key): array for key, array in made.items()}
        np.savez(path, **arrays)
        print(f"{name}, seed {seed}: predicted {', '.join(missing)}", file=sys.stderr, flush=True)
    conditions: dict[str, Any] = {}
    for key, array in arrays.items():
        condition, method, field = key.split("\n")
        conditions.setdefault(condition, {}).setdefault(method, {})[field] = array
    return conditions


def predictor(method: str, model: nn.Module, task: Task, context: Context, validation: Sequence[Any]) -> Predictor:
    """The network, with a temperature or noise variance of its own, or a posterior of it."""
    regression = task.likelihood == "regression"
    if method == MAP:
        return gaussian_predictor(model, tuned_noise([model], validation)) if regression else point_predictor(model)
    if method in RULES:
        return point_predictor(model, temperature=tuned_temperature(model, validation, RULES[method])[0])
    la = dl.fit(
        model, task.call("train_loader", context), task.likelihood, structure=STRUCTURES[method],
        sampler=dl.PrioritySampler(task.budget), n_data=task.n_data, seed=context.seed,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the ends of the grid
        return LaplacePredictor(la.tune(validation, **({} if regression else {"link": "mean_field"})))


def predicted(task: Task, context: Context, methods: Sequence[str]) -> dict[tuple[str, str, str], np.ndarray]:
    """What some methods say of all of the data of one seed."""
    model, validation = task.model(context), list(task.call("val_loader", context))
    regression = task.likelihood == "regression"
    predictors = {method: predictor(method, model, task, context, validation) for method in methods}
    loaders = {"test": _data.head(task.call("test_loader", context), N_TEST)}
    if task.has("shifted_loaders"):
        shifted = task.call("shifted_loaders", context)
        loaders |= {f"{s} {v}": _data.head(shifted[s][v], N_SHIFTED) for s in SHIFTS for v in SEVERITIES}
    n_train = task.n_data or sum(size for *_, size in _data.labelled(task.call("train_loader", context)))
    result = {("sizes", "", "train"): np.array(n_train)}
    result["sizes", "", "validation"] = np.array(sum(size for *_, size in _data.labelled(validation)))
    scale = float(task.call("target_scale", context)) if task.has("target_scale") else 1.0
    result["sizes", "", "scale"] = np.array(scale)
    for title, loader in loaders.items():
        kind = "test" if title == "test" else "shift"
        made = predict(predictors, Condition(kind, title, None, loader), methods[0], None)
        result[title, "", "targets"] = made["targets"]
        for method, fields in made["arrays"].items():
            wanted = ("mean", "variance") if regression else ("probabilities",)
            result |= {(title, method, field): fields[field] for field in wanted}
    return result


# -- statistics ------------------------------------------------------------------------------------


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Cells of all seeds of a task, at every level."""
    seeds = [predictions(name, seed, options) for seed in range(options.seeds or (CLASSIFIERS | REGRESSIONS)[name])]
    regression = name in REGRESSIONS
    targets = [conditions["test"][""]["targets"] for conditions in seeds]
    same = all(np.array_equal(one, targets[0]) for one in targets)
    sizes = seeds[0]["sizes"][""]
    folds = int(Task.load(name).constant("FOLDS", 1))
    if len(seeds) % folds:
        sys.exit(f"Expected whole splits of {name}, each of {folds} seeds, got --seeds {len(seeds)}.")

    def joined(cells: Sequence[list[float]]) -> list[float]:
        if folds > 1:
            return cross_fitted(cells, folds)
        return combine(cells, same, 0.0 if same else len(targets[0]) / int(sizes["train"]))

    record: dict[str, Any] = {
        "seeds": len(seeds), "folds": folds, "same": same, "n": len(targets[0]),
        "validation": int(sizes["validation"]), "train": int(sizes["train"]),
        "shifts": [title for title in seeds[0] if title not in ("sizes", "test")], "levels": {},
    }  # fmt: skip
    if regression:
        record["fair"] = fair(len(targets[0]), LEVELS["regression"][0])
        methods = [method for method in seeds[0]["test"] if method]
        record["spread"] = {m: float(np.mean([_spread(one["test"][m]) for one in seeds])) for m in methods}
    else:
        record["accuracy"] = float(np.mean([_accuracy(conditions["test"]) for conditions in seeds]))
    for alpha in LEVELS["regression" if regression else "classification"]:
        entries = [_entries(conditions, alpha) for conditions in seeds]
        record["levels"][f"{alpha:g}"] = {
            where: {
                "scores": _combined([entry[where]["scores"] for entry in entries], joined),
                "differences": {
                    second: _combined([entry[where]["differences"][second] for entry in entries], joined)
                    for second in entries[0][where]["differences"]
                },
            }
            for where in entries[0]
        }
    if name == "digits":
        record["batches"] = batches(seeds)
    return record


def _accuracy(test: Arrays) -> float:
    return float((test[MAP]["probabilities"].argmax(1) == test[""]["targets"]).mean())


def fair(n: int, alpha: float) -> float:
    """Expected distance of coverage from its level in the worst of four quarters, each of which holds as it should."""
    shares = np.random.default_rng(0).binomial(n // 4, 1 - alpha, size=(20_000, 4)) / (n // 4)
    return float(np.abs(shares - (1 - alpha)).max(1).mean())


def _spread(fields: Mapping[str, np.ndarray]) -> float:
    """How much larger a large standard deviation is than a small one: the ratio of deciles."""
    low, high = np.quantile(np.sqrt(fields["variance"]), (0.1, 0.9))
    return float(high / low)


def _entries(conditions: Mapping[str, Arrays], alpha: float) -> dict[str, Any]:
    """On the test data, and over all strong shifts."""
    methods = [method for method in METHODS["classes"] if method in conditions["test"]]
    groups = Groups(
        {m: [m] for m in methods}, {s: [one for one, two in PAIRS if two == s and one in methods] for s in methods}
    )
    sets = Sets(None, N_RESAMPLES, float(conditions["sizes"][""]["scale"]), alpha)
    result = {}
    for title, arrays in conditions.items():
        fields, seed = {m: arrays[m] for m in methods if m in arrays}, int(title != "test")
        if title == "test":
            result["test"] = sets.of_test(fields, arrays[""]["targets"], seed, groups)
        elif title != "sizes":
            sets.add_strong(fields, arrays[""]["targets"], seed)
    return result | ({"strong shift": sets.of_strong(groups)} if len(conditions) > 2 else {})


def _combined(parts: Sequence[Any], of: Any) -> Any:
    return {name: {key: of([part[name][key] for part in parts]) for key in parts[0][name]} for name in parts[0]}


def batches(seeds: Sequence[Mapping[str, Arrays]]) -> dict[str, Any]:
    """How often APS sets of ten test data hold together; each time others calibrate."""
    ways = {
        "each alone": {}, "all ten": {"batch": BATCH}, "all ten, Bonferroni": {"alpha": 0.1 / BATCH},
        "at least nine of ten": {"batch": BATCH, "at_least": BATCH - 1},
    }  # fmt: skip
    result: dict[str, dict[str, list[float]]] = {way: {"all": [], "nine": [], "size": []} for way in ways}
    for draw in range(N_BATCHES):
        test = seeds[draw % len(seeds)]["test"]
        probabilities, targets = test[DEBIASED]["probabilities"], test[""]["targets"]
        drawn = np.random.default_rng(draw).permutation(len(targets))[: BATCH + N_HELD]
        new, held = drawn[:BATCH], drawn[BATCH:]
        for way, settings in ways.items():
            sets = conformal.calibrate(conformal.APS(), probabilities[held], targets[held], **settings, seed=draw)
            members = sets(probabilities[new], seed=draw)
            hits = int(members[np.arange(BATCH), targets[new]].sum())
            for key, value in (("all", hits == BATCH), ("nine", hits >= BATCH - 1), ("size", members.sum() / BATCH)):
                result[way][key].append(float(value))
    return {
        way: {key: [float(np.mean(v)), float(np.std(v)) / math.sqrt(len(v))] for key, v in of.items()}
        for way, of in result.items()
    }


# -- the document ----------------------------------------------------------------------------------


def parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the document, from its record."""
    tasks = record["tasks"]
    made = {f"sets {name}": classes(tasks[name]) for name in CLASSIFIERS if name in tasks}
    shown = {name: tasks[name] for name in CLASSIFIERS if name in tasks}
    made["sets data"] = data(tasks)
    made["sets differences"] = f"{differences(shown)}\n\n{chance(shown)}"
    made["sets intervals"] = intervals({name: tasks[name] for name in REGRESSIONS if name in tasks})
    if "digits" in tasks:
        made["sets batches"] = of_batches(tasks["digits"]["batches"])
    return made


def data(tasks: Mapping[str, Any]) -> str:
    """How many data train, tune, and calibrate and judge; and what seeds of a task have in common."""
    rows = []
    for name in (*CLASSIFIERS, *REGRESSIONS):
        if (of := tasks.get(name)) is not None:
            if of["folds"] > 1:
                what = f"1 network, splits: {of['seeds'] // of['folds']}, both halves of each in turn"
            else:
                what = f"{of['seeds']} networks, " + ("the same data" if of["same"] else "a split of the data each")
            rows.append([name.removeprefix("uci-"), what, *(f"{of[part]:,}" for part in ("train", "validation", "n"))])
    return markdown(["task", "seeds", "train", "tune", "calibrate and judge, in halves"], rows)


def chance(tasks: Mapping[str, Any]) -> str:
    """How many of all differences leave out zero, those included that no table shows."""
    cells = [
        cell
        for record in tasks.values() for level in record["levels"].values() for where in level.values()
        for first, second in PAIRS for cell in where["differences"][second][first].values()
    ]  # fmt: skip
    beyond = sum(cell[2] > 0 or cell[3] < 0 for cell in cells)
    return (
        f"With RAPS, coverage and the worst class there are {len(cells)} differences. {beyond} of them leave out zero; "
        f"were there no difference at all, about {round(0.05 * len(cells))} would, and not independently."
    )


def classes(record: Mapping[str, Any]) -> str:
    """Every method, level and kind of set."""
    rows = []
    for alpha, level in record["levels"].items():
        test, strong = level["test"]["scores"], level["strong shift"]["scores"]
        for kind in ("THR", "APS", "RAPS"):
            for method, cells in test.items():
                rows.append(
                    [f"{100 - 100 * float(alpha):g} %, {kind}", method]
                    + [_text(cells[f"{kind}, {m}"], m) for m in ("coverage", "size", "worst stratum", "worst class")]
                    + [_text(strong[method][f"{kind}, {m}"], m) for m in ("coverage", "size")]
                )
    columns = ["sets", "method", "hold %", "size", "worst stratum off by %", "worst class %"]
    return markdown([*columns, "strong shift: hold %", "strong shift: size"], rows)


def _text(cell: Sequence[float], measure: str) -> str:
    return plus_minus(cell, 3 if measure == "size" else 1, scale=1 if measure == "size" else 100)


def differences(tasks: Mapping[str, Any]) -> str:
    """Size on test data, and coverage and size under strong shift: one method minus another."""
    rows = []
    for name, record in tasks.items():
        for alpha, level in record["levels"].items():
            for first, second in PAIRS:
                test = level["test"]["differences"][second][first]
                strong = level["strong shift"]["differences"][second][first]
                rows.append(
                    [f"{name}, {100 - 100 * float(alpha):g} %", f"{first} minus {second}"]
                    + [with_interval(test[f"{kind}, size"], 3) for kind in ("THR", "APS")]
                    + [with_interval(test["APS, worst stratum"], 1, scale=100)]
                    + [with_interval(strong[f"APS, {m}"], 3 if m == "size" else 1, scale=1 if m == "size" else 100)
                       for m in ("coverage", "size")]
                )  # fmt: skip
    columns = ["task, level", "methods", "size, THR", "size, APS", "worst stratum, APS, %"]
    return markdown([*columns, "strong shift: coverage, APS, %", "strong shift: size, APS"], rows)


def intervals(tasks: Mapping[str, Any]) -> str:
    """Every method and kind of interval."""
    rows = []
    for name, record in tasks.items():
        test = record["levels"]["0.1"]["test"]
        for method, cells in test["scores"].items():
            minus = test["differences"][MAP].get(method)
            for kind in ("plain", "normalised", "CQR")[: 1 if minus is None else 3]:  # MAP has but one kind
                rows.append(
                    [name.removeprefix("uci-"), method, kind]
                    + [_text(cells[f"{kind}, {m}"], m) for m in ("coverage", "size")]
                    + ["" if minus is None else with_interval(minus[f"{kind}, size"], 3)]
                    + ["" if minus is None else _text(cells[f"{kind}, worst stratum"], "worst stratum")]
                    + [number(record["fair"], 1, scale=100), number(record["spread"][method], 2)]
                )
    columns = ["set", "method", "intervals", "hold %", "width", "width minus MAP", "worst quarter off by %", "if fair"]
    return markdown([*columns, "deviations, 90 % to 10 %"], rows)


def of_batches(record: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Ten new data together."""
    rows = [
        [way, *(plus_minus(of[key], 1, scale=100) for key in ("all", "nine")), plus_minus(of["size"], 2)]
        for way, of in record.items()
    ]
    return markdown(["calibrated for", "all ten hold, %", "at least nine hold, %", "size"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=[*CLASSIFIERS, *REGRESSIONS], default=None)
    parser.add_argument("--seeds", type=int, default=None, help="of every task; by default what suits it")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--cache", type=Path, default=Path("eval/results/cache"))
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--only-document", action="store_true", help="from the record that is there")
    options = parser.parse_args()
    path = options.docs / "records" / "sets.json"
    if not options.only_document:
        record = read_json(path) if path.exists() else {"environment": environment(torch.device("cpu")), "tasks": {}}
        for name in options.tasks or (*CLASSIFIERS, *REGRESSIONS):
            record["tasks"][name] = rounded(measure(name, options))
            write_json(path, record)
            print(f"{name}: done", file=sys.stderr, flush=True)
    fill(options.docs / "sets.md", parts(read_json(path)))


if __name__ == "__main__":
    main()
