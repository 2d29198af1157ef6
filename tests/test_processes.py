"""Seeds in processes of their own, and how a long command tells how far it is."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from debiased_laplace.evaluation import Context, Method, Options, Task, progress, run
from debiased_laplace.evaluation.progress import Reporter, Seeds
from debiased_laplace.evaluation.suite.processes import available, in_processes

BLOBS = Path(__file__).parent / "tasks" / "blobs.py"


def square(item: int, tell: Callable[[str], None]) -> tuple[int, int]:
    tell(f"squaring {item}")
    return item**2, os.getpid()


def fail_at_two(item: int, tell: Callable[[str], None]) -> None:
    tell(str(os.getpid()))
    if item == 2:
        raise KeyError("two")
    time.sleep(600)


def die(item: int, tell: Callable[[str], None]) -> None:
    tell("begins")
    os.kill(os.getpid(), signal.SIGKILL)


class Unpicklable(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__("both")
        self.lock = Path(f"{first}{second}").exists
        self.own = lambda: second


def raise_unpicklable(item: int, tell: Callable[[str], None]) -> None:
    raise Unpicklable(1, 2)


def n_threads(item: int, tell: Callable[[str], None]) -> int:
    from threadpoolctl import threadpool_info

    return max(pool["num_threads"] for pool in threadpool_info())


def test_results_are_in_order_and_from_other_processes() -> None:
    told: list[tuple[int, str]] = []
    result = in_processes(square, [3, 1, 2], 2, lambda item, step: told.append((item, step)))
    assert [value for value, _ in result] == [9, 1, 4]
    assert len({process for _, process in result} | {os.getpid()}) == 4
    assert sorted(told) == [(1, "squaring 1"), (2, "squaring 2"), (3, "squaring 3")]
    assert in_processes(square, [], 2) == []
    assert in_processes(n_threads, [0], 2) == [1]
    assert available() >= 1


def test_an_error_ends_all_of_them() -> None:
    processes: list[int] = []
    with pytest.raises(KeyError, match="two"):
        in_processes(fail_at_two, [1, 2], 2, lambda item, step: processes.append(int(step)))
    for process in processes:
        with pytest.raises(ProcessLookupError, match="No such process"):
            os.kill(process, 0)
    with pytest.raises(RuntimeError, match="Unpicklable: both"):
        in_processes(raise_unpicklable, [1], 2)


def test_a_killed_process_is_noticed() -> None:
    with pytest.raises(RuntimeError, match=r"a result for 7, got none: its process ended with exit code -9.*memory"):
        in_processes(die, [7], 2)


def test_seeds_in_processes_give_the_same_records(tmp_path: Path) -> None:
    task, methods = Task.load(BLOBS), (Method("MAP", "map"), Method("debiased K-FAC", fit={"budget": 20}))
    options = Options(grid_size=5, n_resamples=20, conditions=("moved 3",), n_shifted=30)
    told: list[tuple[int, str]] = []
    result = [
        run(
            task, tmp_path / str(n), [0, 1], Context(), methods=methods, options=options, n_processes=n,
            progress=lambda *step: told.append(step),
        )
        for n in (1, 2)
    ]  # fmt: skip
    for one, other in zip(*result, strict=True):
        assert [(entry["name"], entry["severity"], entry["n"]) for entry in one["shifts"]] == [("moved", 3, 30)]
        assert one["ood"] == []
        for key in ("test", "shifts", "ood", "settings"):
            assert one[key] == other[key]
    assert {told.count((seed, step)) for seed in (0, 1) for step in ("model", "fit: MAP", "distances", "done")} == {2}
    again = run(task, tmp_path / "2", [0, 1], Context(), methods=methods, options=options)
    assert again == result[1]


# -- how far -----------------------------------------------------------------------------------------


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_without_a_terminal_there_is_a_line_for_each_seed_and_stage(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with Reporter(3, clock=lambda: now[0]) as reporter:
        seeds = Seeds(reporter, 3)
        seeds(0, "kept")
        for seed in (1, 2):
            for second, step in ((0, "model"), (10, "fit: a"), (10, "fit: b"), (20, "predict: c"), (30, "done")):
                now[0] = 60.0 * (seed - 1) + second
                seeds(seed, step)
    result = lines(capsys)
    assert [re.sub(r"^\[ *|\]", "", line) for line in result] == [
        "0 s 1 of 3: seed 0: kept",
        "0 s 1 of 3: seed 1: model",
        "10 s 1 of 3: seed 1: fit",
        "20 s 1 of 3: seed 1: predict",
        "30 s 2 of 3: seed 1: done (about 30 s left)",
        "1 min 00 s 2 of 3: seed 2: model (about 40 s left)",
        "1 min 10 s 2 of 3: seed 2: fit (about 30 s left)",
        "1 min 20 s 2 of 3: seed 2: predict (about 9 s left)",
        "1 min 30 s 3 of 3: seed 2: done (about 0 s left)",
    ]
    assert seeds.kept == [0]


def test_before_the_first_seed_is_finished_the_estimate_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with Reporter(2, clock=lambda: now[0]) as reporter:
        reporter.expect(80.4, "by the speed of this machine")
        seeds = Seeds(reporter, 2)
        for second, step in ((1, "model"), (8, "fit: a"), (9, "fit: b"), (18.5, "fit: c"), (90, "predict: d")):
            now[0] = second
            seeds(0, step)
        now[0] = 95
        reporter.remind()
        now[0] = 101
        reporter.remind()
    result = lines(capsys)
    assert result[0] == "About 1 min 20 s, by the speed of this machine."
    assert [re.sub(r"^\[ *|\]", "", line) for line in result[1:]] == [
        "1 s 0 of 2: seed 0: model (about 1 min 19 s left)",
        "8 s 0 of 2: seed 0: fit (about 1 min 12 s left)",
        "18 s 0 of 2: seed 0: fit: c (about 1 min 02 s left)",  # nothing new, but nothing said for ten seconds
        "1 min 30 s 0 of 2: seed 0: predict (about 0 s left)",
        "1 min 41 s 0 of 2: seed 0: predict (about 0 s left)",
    ]


def test_a_line_comes_now_and_then_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    with Reporter(1) as reporter:
        reporter(0, 1, "long", left=0.0)
        ended = time.monotonic() + 5
        written: list[str] = []
        while len(written) < 3 and time.monotonic() < ended:
            time.sleep(0.01)
            written += lines(capsys)
    assert len(written) >= 3
    assert {line.partition("] ")[2] for line in written} == {"0 of 1: long (about 0 s left)"}
    time.sleep(0.05)
    lines(capsys)
    time.sleep(0.05)
    assert lines(capsys) == []  # it has ended with the command


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Reporter(2) as reporter:
        assert reporter.console.is_terminal
        seeds = Seeds(reporter, 2)
        seeds(5, "fit: a")
        seeds(5, "done")
    text = " ".join(lines(capsys))
    assert "done" in text and "2/2" in text


def test_the_callers_threads_are_left_alone() -> None:
    before = torch.get_num_threads()
    in_processes(square, [1], 1)
    assert torch.get_num_threads() == before
