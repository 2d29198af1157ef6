"""Computations that are stopped in every way, and continued with the same bits."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from debiased_laplace import _store
from debiased_laplace.curvature.structures import KroneckerStatistics
from debiased_laplace.fitting import checkpoint
from debiased_laplace.fitting.checkpoint import Checkpoint

REPOSITORY = Path(__file__).parents[1]
SETTINGS = {"seed": 0, "weights": {"fc.weight": "0" * 16}, "shape": {"fc.weight": (3, 4)}, "chunks": [1, None]}
STEPS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "progress"


def term(step: int) -> Tensor:
    """Numbers of many magnitudes, so that the order of a sum shows in its last bits."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(50, generator=generator) * 10 ** torch.randn(50, generator=generator)


def total(steps=STEPS) -> Tensor:
    result = term(steps[0])
    for step in steps[1:]:
        result = result + term(step)
    return result


class Counted:
    """A step that notes what it was called with, and stops at a call if asked to."""

    def __init__(self, stop_at: int | None = None, error: BaseException | None = None) -> None:
        self.seen: list[int] = []
        self.stop_at, self.error = stop_at, error

    def __call__(self, step: int) -> Tensor:
        if len(self.seen) == self.stop_at and self.error is not None:
            raise self.error
        self.seen.append(step)
        return term(step)


def forbidden(*_):
    raise AssertionError("a kept result was computed again")


def test_the_order_of_the_sum_matters():
    assert not torch.equal(total(), total(STEPS[::-1]))


def test_without_a_file_everything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_store, "write", forbidden)
    for _ in range(2):
        checkpoint = Checkpoint(None, {"not storable": object()}, interval=0.0)
        step = Counted()
        assert checkpoint.once("object", lambda: Path) is Path
        assert torch.equal(checkpoint.accumulate("sum", STEPS, step), total())
        assert step.seen == STEPS
        result = checkpoint.accumulate("not storable", STEPS, lambda number: term(number) + 0j)
        reference = weakref.ref(result)
        del result
        assert reference() is None  # nothing is held
        with pytest.raises(KeyboardInterrupt):
            checkpoint.accumulate("other", STEPS, Counted(2, KeyboardInterrupt()))
        assert checkpoint.completed is None
        assert checkpoint.complete(Path) is checkpoint.completed is Path
    assert list(tmp_path.iterdir()) == []


def test_once_is_kept(path):
    calls = []
    for _ in range(3):
        checkpoint = Checkpoint(path, SETTINGS)
        result = checkpoint.once("a", lambda: (calls.append(1), {"x": torch.ones(2)})[1])
        assert torch.equal(result["x"], torch.ones(2))
        assert checkpoint.once("none", lambda: None) is None
    assert calls == [1]
    assert torch.equal(Checkpoint(path, SETTINGS).once("a", forbidden)["x"], torch.ones(2))
    assert Checkpoint(path, SETTINGS).once("none", forbidden) is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("some error"), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("stop_at", range(len(STEPS)))
def test_a_sum_continues_where_it_was_interrupted(path, stop_at, error):
    with pytest.raises(type(error)) as raised:
        Checkpoint(path, SETTINGS, interval=1e9).accumulate("sum", STEPS, Counted(stop_at, error))
    assert raised.value is error
    step = Counted()
    assert torch.equal(Checkpoint(path, SETTINGS).accumulate("sum", STEPS, step), total())
    assert step.seen == STEPS[stop_at:]
    assert torch.equal(Checkpoint(path, SETTINGS).accumulate("sum", STEPS, forbidden), total())


def test_a_sum_survives_interrupts_at_every_step(path):
    for stop in STEPS:
        step = Counted(1, KeyboardInterrupt())
        try:
            result = Checkpoint(path, SETTINGS).accumulate("sum", STEPS, step)
        except KeyboardInterrupt:
            pass
        assert step.seen == [stop]
    assert torch.equal(result, total())


def test_the_same_object_can_try_again(path):
    checkpoint = Checkpoint(path, SETTINGS)

    def outer(step):
        return checkpoint.accumulate("inner", STEPS, step) + checkpoint.once("one", lambda: 1)

    with pytest.raises(KeyboardInterrupt):
        checkpoint.once("outer", lambda: outer(Counted(3, KeyboardInterrupt())))
    step = Counted()
    assert torch.equal(checkpoint.once("outer", lambda: outer(step)), total() + 1)
    assert step.seen == STEPS[3:]


def test_statistics_and_numbers_can_be_summed(path):
    def measure(step: int) -> KroneckerStatistics:
        return KroneckerStatistics.of([term(step).view(2, 5, 5)], [term(step + 1).view(1, 5, 10), term(step + 2)])

    def run(stop=None):
        def step(number):
            if number == stop:
                raise KeyboardInterrupt
            return measure(number)

        checkpoint = Checkpoint(path if stop else None, SETTINGS)
        return checkpoint.accumulate("statistics", [1, 2, 3, 4], step), checkpoint.accumulate("n", [1, 2], float)

    expected = run()
    for stop in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            run(stop)
    statistics, number = run(stop=99)
    assert type(statistics) is KroneckerStatistics
    assert _store.differences(bits(expected[0]), bits(statistics)) == []
    assert number == expected[1] == 3.0


def bits(value) -> dict:
    """The tensors of a plain form, as fingerprints."""
    if isinstance(value, Tensor):
        return {"": _store.fingerprint({"": value})}
    plain = _store.to_plain(value) if not isinstance(value, (list, dict)) else value
    if isinstance(plain, dict):
        return {key: bits(item) for key, item in plain.items()}
    return {str(i): bits(item) for i, item in enumerate(plain)} if isinstance(plain, list) else {"": plain}


@pytest.mark.parametrize(("interval", "writes"), [(0.0, 8), (2.5, 3), (1e9, 1), (1.0, 8)])
def test_writes_keep_their_distance(path, monkeypatch, interval, writes):
    now, written = [100.0], []
    write = _store.write

    def slow_write(*arguments):
        written.append(now[0])
        now[0] += 50.0  # a write takes longer than the interval
        write(*arguments)

    def step(number):
        now[0] += 1.0
        return term(number)

    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(_store, "write", slow_write)
    Checkpoint(path, SETTINGS, interval=interval).accumulate("sum", STEPS, step)
    assert len(written) == writes  # after three, six and all of the eight steps for 2.5 seconds


def test_nothing_is_written_where_nothing_is_new(path, monkeypatch):
    checkpoint = Checkpoint(path, SETTINGS)
    checkpoint.once("a", lambda: 1)
    checkpoint.accumulate("sum", STEPS, term)
    monkeypatch.setattr(_store, "write", forbidden)
    checkpoint = Checkpoint(path, SETTINGS, interval=0.0)
    checkpoint.once("a", forbidden)
    checkpoint.accumulate("sum", STEPS, forbidden)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.accumulate("other", STEPS, Counted(0, KeyboardInterrupt()))


def test_a_run_that_fails_before_anything_is_complete_leaves_no_file(path):
    with pytest.raises(KeyError, match="nothing"):
        Checkpoint(path, SETTINGS).once("a", lambda: {}["nothing"])
    with pytest.raises(KeyError, match="nothing"):
        Checkpoint(path, SETTINGS).accumulate("sum", STEPS, lambda step: {}["nothing"])
    assert not path.exists()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed: 1 expected, got 0"),
        ({"weights": {"fc.weight": "f" * 16}}, "weights of 'fc.weight' differ"),
        ({"shape": {"fc.weight": (3, 5)}}, r"shape of 'fc.weight': \(3, 5\) expected, got \(3, 4\)"),
        ({"new": None}, "'new' is missing"),
        ({"chunks": (1, None)}, r"chunks: \(1, None\) expected, got \[1, None\]"),
    ],
)
def test_other_settings_are_refused(path, changed, message):
    Checkpoint(path, SETTINGS).once("a", lambda: 1)
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=rf"with the settings of this run, got others: {message}\. Delete the file, or"
    ):
        Checkpoint(path, {**SETTINGS, **changed})
    assert path.read_bytes() == before
    assert Checkpoint(path, dict(reversed(SETTINGS.items()))).once("a", forbidden) == 1


def test_settings_may_hold_objects_of_the_package_and_no_tensors(path):
    settings = {"structure": KroneckerStatistics([], []), "dtype": torch.float64, "__tag": float("nan")}
    Checkpoint(path, settings).once("a", lambda: 1)
    assert Checkpoint(path, settings).once("a", forbidden) == 1
    with pytest.raises(TypeError, match="a header without tensors"):
        Checkpoint(path, {"weights": torch.ones(2)})


@pytest.mark.parametrize("kind", ["text", "other", "ours"])
def test_a_file_of_something_else_is_refused_and_left(path, kind):
    if kind == "text":
        path.write_text("My thesis.")
    elif kind == "other":
        save_file({"a": torch.ones(2)}, path)
    else:
        _store.write(path, {"results": {}, "sums": {}, "completed": None}, {"kind": "posterior", "settings": SETTINGS})
    before = path.read_bytes()
    message = {
        "text": "which is no safetensors file",
        "other": "a safetensors file that something else wrote",
        "ours": "to hold the progress of a computation, got posterior. Give another path; the file is left as it is",
    }
    with pytest.raises(ValueError, match=message[kind]):
        Checkpoint(path, SETTINGS)
    assert path.read_bytes() == before


def test_a_missing_directory_is_refused_before_anything_runs(path):
    with pytest.raises(FileNotFoundError, match=r"Expected a directory for .*nowhere/file"):
        Checkpoint(path / "nowhere" / "file", SETTINGS)


def test_a_path_that_a_run_changes_directory_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint("progress", SETTINGS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    checkpoint.once("a", lambda: 1)
    assert Checkpoint(tmp_path / "progress", SETTINGS).once("a", forbidden) == 1


def test_a_complete_file_holds_the_final_value_alone(path):
    checkpoint = Checkpoint(path, SETTINGS)
    checkpoint.once("data", lambda: torch.randn(100_000))
    checkpoint.accumulate("sum", STEPS, term)
    assert checkpoint.completed is None
    assert Checkpoint(path, SETTINGS).completed is None
    assert path.stat().st_size > 400_000
    assert checkpoint.complete({"answer": (42, torch.ones(2))})["answer"][0] == 42
    assert path.stat().st_size < 2_000
    for finished in (checkpoint, Checkpoint(path, SETTINGS)):
        assert finished.completed["answer"][0] == 42
        assert torch.equal(finished.completed["answer"][1], torch.ones(2))
        with pytest.raises(
            RuntimeError, match=r"no more pieces of a complete computation, got 'data'. Use `completed`"
        ):
            finished.once("data", forbidden)
        with pytest.raises(RuntimeError, match="got 'sum'"):
            finished.accumulate("sum", STEPS, forbidden)
    with pytest.raises(ValueError, match="seed: 1 expected, got 0"):
        Checkpoint(path, {**SETTINGS, "seed": 1})


def test_pieces_of_a_piece_are_dropped_with_its_end(path):
    def outer(step):
        checkpoint = Checkpoint(path, SETTINGS)

        def inner():
            data = checkpoint.once("data", lambda: torch.randn(100_000))
            return checkpoint.accumulate("sum", STEPS, step) + 0 * data[0]

        checkpoint.once("data", lambda: 1)  # names inside are other names
        return checkpoint, checkpoint.once("outer", inner)

    with pytest.raises(KeyboardInterrupt):
        outer(Counted(3, KeyboardInterrupt()))
    assert path.stat().st_size > 400_000
    step = Counted()
    checkpoint, result = outer(step)
    assert step.seen == STEPS[3:]
    assert torch.equal(result, total())
    assert path.stat().st_size < 3_000
    assert checkpoint.once("sum", lambda: 5) == 5
    assert torch.equal(outer(forbidden)[1], total())


@pytest.mark.parametrize("file", [True, False])
def test_every_piece_has_a_name_of_its_own(path, file):
    checkpoint = Checkpoint(path if file else None, SETTINGS)
    checkpoint.once("a", lambda: 1)
    checkpoint.accumulate("b", STEPS, term)
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"Expected another name for every piece, got '{name}' twice"):
            checkpoint.once(name, forbidden)
        with pytest.raises(ValueError, match=f"got '{name}' twice"):
            checkpoint.accumulate(name, STEPS, forbidden)
    if file:
        with pytest.raises(ValueError, match="got 'b' twice"):
            Checkpoint(path, SETTINGS).once("b", forbidden)
        with pytest.raises(ValueError, match="got 'a' twice"):
            Checkpoint(path, SETTINGS).accumulate("a", STEPS, forbidden)


def test_the_number_of_steps_must_be_the_same(path):
    Checkpoint(path, SETTINGS).accumulate("sum", STEPS, term)
    with pytest.raises(ValueError, match=r"Expected 8 steps for 'sum', got 7. Let the settings hold all"):
        Checkpoint(path, SETTINGS).accumulate("sum", STEPS[1:], forbidden)
    with pytest.raises(ValueError, match="Expected one or more steps for 'other', got 0"):
        Checkpoint(path, SETTINGS).accumulate("other", [], term)


def test_what_cannot_be_stored_is_refused_at_once_and_spoils_nothing(path):
    checkpoint = Checkpoint(path, SETTINGS)
    checkpoint.once("a", lambda: 1)
    step = Counted()
    with pytest.raises(TypeError, match=r"real numbers at sum, got Tensor of torch.complex64"):
        checkpoint.accumulate("sum", STEPS, lambda number: step(number) + 0j)
    assert step.seen == STEPS[:1]
    with pytest.raises(TypeError, match=r"got builtins:object at b\[0\]"):
        checkpoint.once("b", lambda: [object()])
    with pytest.raises(TypeError, match=r"got builtins:object at the final value\.?"):
        checkpoint.complete(object())
    assert checkpoint.completed is None
    assert torch.equal(checkpoint.accumulate("sum", STEPS, term), total())
    assert Checkpoint(path, SETTINGS).once("a", forbidden) == 1


def test_a_write_that_fails_leaves_the_earlier_progress(path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        Checkpoint(path, SETTINGS).accumulate("sum", STEPS, Counted(3, KeyboardInterrupt()))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            Checkpoint(path, SETTINGS, interval=0.0).accumulate("sum", STEPS, term)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    step = Counted()
    assert torch.equal(Checkpoint(path, SETTINGS).accumulate("sum", STEPS, step), total())
    assert step.seen == STEPS[3:]


def test_an_interrupt_in_the_middle_of_a_write_loses_nothing(path, monkeypatch):
    replace, calls = os.replace, []

    def interrupted(*names):
        calls.append(names)
        if len(calls) == 3:
            raise KeyboardInterrupt
        replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Checkpoint(path, SETTINGS, interval=0.0).accumulate("sum", STEPS, term)
    assert list(path.parent.iterdir()) == [path]
    step = Counted()
    assert torch.equal(Checkpoint(path, SETTINGS).accumulate("sum", STEPS, step), total())
    assert step.seen == STEPS[3:]


def test_other_versions_are_reported(path, monkeypatch, caplog):
    Checkpoint(path, SETTINGS).once("a", lambda: 1)
    with caplog.at_level(logging.WARNING, "debiased_laplace"):
        Checkpoint(path, SETTINGS)
        assert caplog.messages == []
        monkeypatch.setattr(_store, "versions", lambda: {"torch": "99"})
        assert Checkpoint(path, SETTINGS).once("a", forbidden) == 1
    assert "was made with other versions: torch: '99' expected, got" in caplog.text


def test_sums_on_another_device_go_on_there(path, second_device):
    def run(step):
        return Checkpoint(path, SETTINGS).accumulate("sum", STEPS, step)

    stopping = Counted(3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(lambda number: stopping(number).to(second_device))
    result = run(lambda number: term(number).to(second_device))
    assert result.device.type == second_device.type
    assert torch.equal(result.cpu(), total())


def child(path: str, interval: float, sleep_in_write: int | None, sleep_in_step: int | None) -> None:
    """Run in a process of its own: sums, says what it does, and falls asleep in the middle."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    replace = os.replace
    n_writes = 0

    def slow_replace(source, destination):
        nonlocal n_writes
        n_writes += 1
        if n_writes == sleep_in_write:
            print("asleep", flush=True)
            time.sleep(60)
        replace(source, destination)

    def step(number: int) -> Tensor:
        print(number, flush=True)
        counter.append(number)
        if len(counter) == sleep_in_step:
            print("asleep", flush=True)
            time.sleep(60)
        return term(number)

    counter: list[int] = []
    os.replace = slow_replace
    Checkpoint(path, SETTINGS, interval=interval).accumulate("sum", STEPS, step)


@pytest.mark.parametrize(
    ("sent", "interval", "sleep_in_write", "sleep_in_step", "n_kept"),
    [
        (signal.SIGKILL, 0.0, None, 5, 4),  # in the fifth step; every step was written
        (signal.SIGKILL, 0.0, 4, None, 3),  # in the fourth write, which is lost
        (signal.SIGKILL, 1e9, None, 5, 0),  # before the first write
        (signal.SIGINT, 1e9, None, 5, 4),  # in the fifth step, which has time to write the four
    ],
    ids=["killed in a step", "killed in a write", "killed early", "interrupted"],
)
def test_a_process_that_is_stopped_is_continued(path, sent, interval, sleep_in_write, sleep_in_step, n_kept):
    arguments = f"{str(path)!r}, {interval}, {sleep_in_write}, {sleep_in_step}"
    process = subprocess.Popen(
        [sys.executable, "-c", f"from tests.test_checkpoint import child; child({arguments})"],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        lines = []
        while (line := process.stdout.readline().strip()) and line != "asleep":
            lines.append(int(line))
        assert line == "asleep", process.stderr.read()
        process.send_signal(sent)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode != 0
    assert ("KeyboardInterrupt" in errors) == (sent == signal.SIGINT)
    step = Counted()
    assert torch.equal(Checkpoint(path, SETTINGS).accumulate("sum", STEPS, step), total())
    assert step.seen == STEPS[n_kept:]
    assert lines == STEPS[: len(lines)]
    assert len(lines) == (sleep_in_step or sleep_in_write)
