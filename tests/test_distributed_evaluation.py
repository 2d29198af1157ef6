"""Several processes evaluate together: the record of one process, written by the first one alone."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from typer.testing import CliRunner

import debiased_laplace as dl
from debiased_laplace._data import InTurns
from debiased_laplace._ranks import Ranks
from debiased_laplace.cli import app
from debiased_laplace.evaluation import Context, Method, Options, Task, evaluate, run
from debiased_laplace.evaluation.judge import comparison
from debiased_laplace.evaluation.suite import posteriors
from debiased_laplace.fitting.measurement import Measurement
from tests import worlds
from tests.tolerances import EXACT

BLOBS = Path(__file__).parent / "tasks" / "blobs.py"
OPTIONS = Options(grid_size=9, log_prior_prec_min=-2, log_prior_prec_max=4, n_resamples=20)
SINGLE = Method("single", fit={"sampler": dl.UniformSampler(24), "split": dl.Single()}, role="baseline")
DEBIASED = Method("debiased", fit={"budget": 24}, role="candidate", tune={"link_approx": "mean_field"})
METHODS = (
    Method("MAP", "map"), Method("temperature scaling", "temperature"),
    Method("laplace-torch", "laplace-torch", {"structure": "kron"}), SINGLE, DEBIASED,
    Method("layers", fit={"budget": 24}, tune={"prior_structure": "layerwise"}),
    Method("broken", laplace={"hessian_structure": "of no kind"}),
    Method("full", fit={"budget": None}, role="reference"),
)  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The blobs in double precision, so that sums in another order hardly differ."""
    text = BLOBS.read_text()
    for old in ("1.2 * torch.randn(n, 2, generator=generator)", "nn.Linear(12, 3))"):
        assert old in text
        text = text.replace(old, f"{old}.double()")
    path = tmp_path_factory.mktemp("task") / "task.py"
    path.write_text(text)
    return str(path)


def evaluated(rank: int, task: str, folder: Path, methods: tuple[Method, ...] = METHODS) -> dict[str, Any]:
    """The record, made by processes that do not see each other's files."""
    (record,) = run(Task.load(task), in_folder_of(rank, folder), [0], Context(), methods=methods, options=OPTIONS)
    return record


def in_folder_of(rank: int, folder: Path) -> Path:
    """Every process has a folder for itself, as on machines that share no files."""
    return folder / f"of {rank}" / "out"


def check_same(found: Any, expected: Any, at: str = "") -> None:
    """But for rounding, and for times."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), at
        for key in expected.keys() - {"seconds", "made", "environment"}:
            check_same(found[key], expected[key], f"{at}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), at
        for index, value in enumerate(expected):
            check_same(found[index], value, f"{at}/{index}")
    elif isinstance(expected, float) and not math.isnan(expected):
        assert found == pytest.approx(expected, rel=EXACT, abs=EXACT), at
    else:
        assert found == expected or (found != found and expected != expected), at


@pytest.fixture(scope="module")
def alone(task: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return evaluated(0, task, tmp_path_factory.mktemp("alone"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("size", [2, 3])
def test_the_record_is_that_of_one_process(size: int, task: str, alone: dict[str, Any], tmp_path: Path) -> None:
    found, *others = worlds.run(size, evaluated, task, tmp_path)
    assert all(other == found for other in others)
    assert "KeyError" in found["predictors"]["broken"]["failed"]
    check_same(found, alone)
    (written,) = tmp_path.rglob("*.json")
    assert written.parent == tmp_path / "of 0" / "out" / "records"
    assert not list((tmp_path / "of 0" / "out" / "work").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["of 0"]


def failing_fit(rank: int, task: str, folder: Path) -> tuple[dict[str, Any], float]:
    original, calls, begun = Measurement._along, 0, time.monotonic()

    def fail(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 1:
            raise OSError("the memory of process one")
        return original(*arguments)

    Measurement._along = fail  # type: ignore[method-assign]
    timed = Method("as long", fit={"split": dl.Single()}, seconds_of="debiased")
    return evaluated(rank, task, folder, (*METHODS[:2], SINGLE, DEBIASED, timed)), time.monotonic() - begun


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_method_that_fails_in_one_process_has_failed_and_the_others_go_on(
    task: str, alone: dict[str, Any], tmp_path: Path
) -> None:
    results = worlds.run(2, failing_fit, task, tmp_path)
    found = results[0][0]
    assert "Process 1 of 2 stopped: OSError: the memory of process one" in found["predictors"]["single"]["failed"]
    assert max(seconds for _, seconds in results) < 20
    for name in ("MAP", "debiased"):
        check_same(found["test"]["scores"][name], alone["test"]["scores"][name])
    assert found["predictors"]["as long"]["budget"] > 0


def interrupted(rank: int, task: str, folder: Path, stop: str) -> None:
    def interrupt(_: int, step: str) -> None:
        if step == stop and rank == 0:
            raise KeyboardInterrupt

    out = in_folder_of(rank, folder)
    run(Task.load(task), out, [0], Context(), methods=METHODS, options=OPTIONS, progress=interrupt)


def resumed(rank: int, task: str, folder: Path) -> tuple[dict[str, Any], int, list[str]]:
    """The record, the number of fits, and the data that were predicted."""
    fits, predicted = 0, list[str]()
    fit, predict = posteriors.fit, comparison.predict

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal fits
        fits += 1
        return fit(*arguments, **keywords)

    def noted(predictors: Any, condition: Any, *others: Any) -> Any:
        predicted.append(condition.title)
        return predict(predictors, condition, *others)

    posteriors.fit, comparison.predict = counted, noted  # type: ignore[attr-defined]
    return evaluated(rank, task, folder), fits, predicted


@pytest.fixture(scope="module")
def unfinished(task: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unfinished")
    died = worlds.run(2, interrupted, task, folder, "predict: moved 3", results=False)
    assert all("KeyboardInterrupt" in str(one) for one in died)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_interrupted_evaluation_goes_on_with_what_the_first_process_has(
    size: int, unfinished: Path, task: str, alone: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(unfinished, tmp_path, dirs_exist_ok=True)
    found = worlds.run(size, resumed, task, tmp_path)
    check_same(found[0][0], alone)
    for _, fits, predicted in found:
        assert (fits, predicted) == (0, ["moved 3", "moved 5", "far"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_record_that_is_there_is_known_to_all(task: str, tmp_path: Path) -> None:
    first = worlds.run(2, evaluated, task, tmp_path, METHODS[:1])
    assert worlds.run(3, evaluated, task, tmp_path, METHODS[:1]) == [first[0]] * 3


def wrong_data(rank: int, task: str, folder: Path) -> None:
    """They come in the middle of a fit, after the loader was looked at twice."""
    loaded, count = Task.load(task), 0
    original = loaded.definition.train_loader

    def train_loader(seed: int) -> Any:
        nonlocal count
        count += 1
        return original(seed) if rank == 0 or count < 3 else [*original(seed)[:2], "no batch"]

    loaded.definition.train_loader = train_loader
    run(loaded, in_folder_of(rank, folder), [0], Context(), methods=(SINGLE,), options=OPTIONS)


def killed(rank: int, task: str, folder: Path) -> None:
    original = Measurement._along

    def fatal(*arguments: Any) -> Any:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    Measurement._along = fatal  # type: ignore[method-assign]
    run(Task.load(task), in_folder_of(rank, folder), [0], Context(), methods=(METHODS[0], SINGLE), options=OPTIONS)


def other_network(rank: int, task: str, folder: Path) -> None:
    loaded = Task.load(task)
    original = loaded.definition.model
    loaded.definition.model = lambda seed: original(seed + rank)
    run(loaded, in_folder_of(rank, folder), [0], Context(), methods=METHODS[:1], options=OPTIONS)


def in_other_order(rank: int, task: str, folder: Path) -> None:
    loaded = Task.load(task)
    shifted = loaded.definition.shifted_loaders()["moved"][5]
    again = [shifted[0], *shifted[1:][:: 1 - 2 * rank]]
    loaded.definition.shifted_loaders = lambda: {"moved": {5: again}}
    run(loaded, in_folder_of(rank, folder), [0], Context(), methods=METHODS[:1], options=OPTIONS)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (wrong_data, "train_loader() of"),
        (killed, "ended without a word"),
        (other_network, "Expected all 2 processes to evaluate with the same model and settings, got others"),
        (in_other_order, "shifted_loaders() of"),
    ],
)
def test_an_error_in_one_process_stops_all(
    function: Callable[..., None], message: str, task: str, tmp_path: Path
) -> None:
    begun = time.monotonic()
    first, second = worlds.run(2, function, task, tmp_path, results=False)
    assert message in str(first)
    assert "everything failed" not in str(first)  # no method's fault
    assert message in str(second) or (function is killed and second is None)
    assert time.monotonic() - begun < 20


def once_in_batches(rank: int, task: str, folder: Path) -> list[int]:
    """Shifted data that can be read once, so many in a batch."""
    loaded, sizes = Task.load(task), (1, 7, 80)
    inputs, targets = loaded.definition.data(300, 70)
    loaded.definition.shifted_loaders = lambda: {
        f"by {size}": iter(list(zip(inputs.split(size), targets.split(size), strict=True))) for size in sizes
    }
    out = in_folder_of(rank, folder)
    (record,) = run(loaded, out, [0], Context(), methods=METHODS[:1], options=OPTIONS)
    for entry in record["shifts"]:
        check_same(entry["scores"], record["shifts"][0]["scores"])
    return [entry["n"] for entry in record["shifts"]]


def test_batches_of_any_size_that_can_be_read_once(task: str, tmp_path: Path) -> None:
    assert worlds.run(3, once_in_batches, task, tmp_path) == [[70] * 3] * 3


class Of(Ranks):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("lengths", [[4] * 11, [4, 0, 3, 4, 1], [9], [2]], ids=str)
def test_whole_batches_go_in_turns_and_data_of_the_last_ones(size: int, lengths: list[int]) -> None:
    data = torch.arange(sum(lengths))
    batches = [(part[:, None], part) for part in data.split(lengths)]
    shares = [InTurns(batches, Of(rank, size)) for rank in range(size)]
    given = [list(share) for share in shares]
    for share, found in zip(shares, given, strict=True):
        assert torch.equal(torch.cat(share.positions), torch.cat([targets for _, targets in found]))
        assert all(torch.equal(inputs[:, 0], targets) for inputs, targets in found)
        n_whole = len(lengths) // size
        assert [len(targets) for _, targets in found[:n_whole]] == lengths[share._ranks.rank :: size][:n_whole]
    assert torch.cat([targets for found in given for _, targets in found]).sort().values.tolist() == data.tolist()


# -- from Python --------------------------------------------------------------------------------------


def points(n: int = 83) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (n,), generator=generator))


def softmax(x: Tensor) -> Tensor:
    return (2 * x).softmax(1)


def fails_on_one(x: Tensor) -> Tensor:
    """Not defined for the 41st datum."""
    if bool((x == points()[40][0]).all(1).any()):
        raise ArithmeticError("not here")
    return x.softmax(1)


def pictures(x: Tensor) -> Tensor:
    return x.sigmoid().reshape(-1, 1, 1, 3)


def judged(test: Any, ood: Any, **options: Any) -> dict[str, Any]:
    predictors = {"MAP": softmax, "soft": lambda x: x.softmax(1), "fails": fails_on_one}
    return evaluate(
        predictors, test, {"same": test}, {"far": ood}, n_resamples=20, images=pictures, highlight="MAP", **options
    )  # fmt: skip


def of_counts(counts: list[int], rank: int, dataset: TensorDataset) -> list[tuple[Tensor, ...]]:
    part = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    return list(zip(*(tensor[part].split(5) for tensor in dataset.tensors), strict=True)) if counts[rank] else []


def of_shards(rank: int, counts: list[int] | None) -> dict[str, Any]:
    dataset, far = points(), points(2)
    if counts is None:
        sampler = DistributedSampler(dataset, shuffle=False)
        test: Any = DataLoader(dataset, 4, sampler=sampler)
    else:
        test = of_counts(counts, rank, dataset)
    return judged(test, of_counts([1, 1, 0][: torch.distributed.get_world_size()], rank, far))


@pytest.mark.parametrize("counts", [None, [50, 33], [0, 83], [3, 41, 39]], ids=str)
def test_scores_of_shards_are_those_of_all_data(counts: list[int] | None) -> None:
    size = 3 if counts is None else len(counts)
    results = worlds.run(size, of_shards, counts)
    assert all(other == results[0] for other in results)
    dataset = points()
    if counts is not None:
        starts = [sum(counts[:rank]) for rank in range(size)]
        order = [
            start + number
            for round_ in range(0, max(counts), 5)
            for number in range(round_, round_ + 5)
            for start, count in zip(starts, counts, strict=True)
            if number < count
        ]
        dataset = TensorDataset(*(tensor[order] for tensor in dataset.tensors))
    expected = judged(DataLoader(dataset, 83), [points(2).tensors])
    assert "ArithmeticError: not here" in results[0]["failures"]["fails"][0]
    assert "fails" not in results[0]["test"]["scores"]
    for result in (results[0], expected):
        result.pop("predictors"), result.pop("failures")
    check_same(results[0], expected)


def nothing_works(rank: int) -> None:
    judged(of_counts([83, 0], rank, points()), [])


def test_no_data_at_all_and_processes_without_data() -> None:
    for died in worlds.run(2, nothing_works, results=False):
        assert "got an empty loader for the ood data 'far'" in str(died)


def unsharded(rank: int) -> None:
    judged([points().tensors], [points(2).tensors])


def test_the_same_data_in_every_process_are_refused() -> None:
    for died in worlds.run(2, unsharded, results=False):
        assert "Expected 2 processes to read a part of the data each, got the same 83 data in every process" in str(
            died
        )


def for_itself(rank: int) -> dict[str, Any]:
    return {} if rank else judged([points().tensors], [points(2).tensors], distributed=False)


def test_one_process_may_be_meant_and_has_to_be_said() -> None:
    found, _ = worlds.run(2, for_itself)
    assert found["test"]["n"] == 83


def test_further_processes_are_refused_in_a_group(task: str, tmp_path: Path) -> None:
    for died in worlds.run(2, with_processes, task, tmp_path, results=False):
        assert "Expected n_processes=1 in a group of 2 processes" in str(died)


def with_processes(rank: int, task: str, folder: Path) -> None:
    run(Task.load(task), in_folder_of(rank, folder), [0], Context(), n_processes=2)


# -- torchrun -----------------------------------------------------------------------------------------


def launched(rank: int, port: int, folder: Path) -> str:
    """The command in an environment that torchrun makes."""
    torch.distributed.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = ["evaluate", str(BLOBS), "--quick", "--seeds", "1", "--only", "MAP"]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--out", str(in_folder_of(rank, folder))])
    assert done.exit_code == 0, done.output
    return str(done.stdout)


def test_the_command_shares_the_data_of_one_seed(tmp_path: Path) -> None:
    first, second = worlds.run(2, launched, worlds.free_port(), tmp_path)
    assert first.count("Written in ") == 1
    assert not second
    out = tmp_path / "of 0" / "out"
    assert (out / "report.html").exists()
    (path,) = tmp_path.rglob("records/*.json")
    assert path.parent.parent == out
    assert json.loads(path.read_text())["data"]["test"] == 70
