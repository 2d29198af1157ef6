"""Files: kills at every write, flipped bits, full disks, permissions, leftovers."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import safe_open, save_file
from torch import Tensor, nn

from debiased_laplace import DebiasedLaplace, Fit, _files, _store
from debiased_laplace._files import CannotWriteError, StoredFileError
from debiased_laplace.evaluation import records
from debiased_laplace.fitting.checkpoint import Checkpoint

pytestmark = pytest.mark.faults

X = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
Y = torch.randint(2, (30,), generator=torch.Generator().manual_seed(2))


def model(activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 2))


def fitted(**keywords: Any) -> DebiasedLaplace:
    la = DebiasedLaplace(model(), "classification")
    la.fit([(X, Y)], budget=16, **keywords)
    return la


WRITERS: dict[str, Callable[[Path], Any]] = {
    "posterior": lambda path: fitted().save(path),
    "fit": lambda path: fitted().fitted.save(path),
    "progress": lambda path: fitted(checkpoint=path),
}
READERS: dict[str, Callable[[Path], Any]] = {
    "posterior": lambda path: DebiasedLaplace.load(path, model())(X[:5]),
    "fit": lambda path: Fit.load(path, model()).posterior.precisions,
    "progress": lambda path: fitted(checkpoint=path)(X[:5]),
}


# -- damage ----------------------------------------------------------------------------------------


def regions(path: Path) -> list[int]:
    """Positions in every part of a safetensors file: length, header, metadata, every tensor."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    found = [0, 3, 7, 8, 9, 8 + size - 1, *range(10, 8 + size, 97)]
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            found += [place for place in (start, (start + end) // 2, end - 1) if start < end]
    return found


@pytest.mark.parametrize("kind", WRITERS)
def test_a_flipped_bit_in_any_region_is_noticed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    WRITERS[kind](path)
    expected, good = READERS[kind](path), path.read_bytes()
    for number, place in enumerate(regions(path)):
        bad = bytearray(good)
        bad[place] ^= 1 << number % 8
        path.write_bytes(bad)
        try:
            found = READERS[kind](path)
        except StoredFileError as error:
            assert str(path) in str(error)
            continue
        # Taken only where the bit has no meaning (the case of a letter in an escape, say): all numbers are the same.
        assert torch.equal(found, expected), f"byte {place}"
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(StoredFileError, match=r"file, which is damaged"):
        READERS[kind](path)


def documents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()[_store.KEY])


def forged(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """A file by somebody who makes the digests right."""
    tensors, document = documents(path)
    document.pop("digest")
    change(tensors, document)
    document["sha256"] = {name: _store.digest(tensor) for name, tensor in tensors.items()}
    document["digest"] = _files.sha256(json.dumps(document))
    save_file(tensors, path, metadata={_store.KEY: json.dumps(document)})


def _deep(tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    nested: Any = 0
    for _ in range(900):
        nested = [nested]
    document["value"]["fit"] = nested


FORGERIES: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Any]] = {
    "no fit": lambda tensors, document: document["value"].pop("fit"),
    "a list for a fit": lambda tensors, document: document["value"].update(fit=[1]),
    "a number for the value": lambda tensors, document: document.update(value=3),
    "no header": lambda tensors, document: document.pop("header"),
    "no class": lambda tensors, document: document["header"].pop("class"),
    "no shapes": lambda tensors, document: document["header"].pop("shapes"),
    "no likelihood": lambda tensors, document: document["header"].pop("likelihood"),
    "nothing of the kind": lambda tensors, document: document["value"]["fit"].update(network={}),
    "another class of the package": lambda tensors, document: document["value"]["fit"]["posterior"].update(
        __class__="debiased_laplace.sampling.splits:Single"
    ),
    "deep": _deep,
    "format 0": lambda tensors, document: document.update(format=0),
    "format -1": lambda tensors, document: document.update(format=-1),
    "format True": lambda tensors, document: document.update(format=True),
    "format 1.5": lambda tensors, document: document.update(format=1.5),
    "no format": lambda tensors, document: document.pop("format"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_whatever_is_wrong_in_a_file_is_one_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / "forged"
    WRITERS["posterior"](path)
    forged(path, FORGERIES[name])
    with pytest.raises(StoredFileError, match=str(path)):
        READERS["posterior"](path)


def test_nan_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "posterior"
    WRITERS["posterior"](path)
    good, names = path.read_bytes(), [name for name, t in documents(path)[0].items() if t.is_floating_point()]
    assert len(names) > 8
    for name in names:
        path.write_bytes(good)
        forged(path, lambda tensors, _, name=name: tensors[name].view(-1)[:1].fill_(torch.nan))
        with pytest.raises(StoredFileError, match=str(path)):
            pytest.fail(f"{name} was taken: {READERS['posterior'](path)}")


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"{}", b"PK\x03\x04" + b"\0" * 50, b"\x80\x04."])
def test_what_is_no_file_of_this_package(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    for read in READERS.values():
        with pytest.raises(StoredFileError, match=r"which is no safetensors file|which is damaged"):
            read(path)


def test_the_same_weights_in_another_function(tmp_path: Path) -> None:
    fitted().save(tmp_path / "posterior")
    fitted().fitted.save(tmp_path / "fit")
    for load, name in ((DebiasedLaplace.load, "posterior"), (Fit.load, "fit")):
        with pytest.raises(StoredFileError, match=r"a model with the same weights and other outputs: .* \(in "):
            load(tmp_path / name, model(nn.ReLU))
        load(tmp_path / name, model().double().float().eval())


def test_an_edited_number_of_a_record_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    records.write_record(path, {"seed": 0, "nll": 0.25, "shift": {"a": [1, float("inf")]}})
    assert records.read_record(path, {"seed": 0}) == {"seed": 0, "nll": 0.25, "shift": {"a": [1, float("inf")]}}
    text = path.read_text()
    for old, new in (("0.25", "0.15"), ('"nll"', '"nlm"'), ("Infinity", "-Infinity"), ("[1,", "[1.5,"), ("]}", "]")):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert records.read_record(path, {"seed": 0}) is None


# -- kills -----------------------------------------------------------------------------------------


def killed(work: Callable[[], Any], point: str, number: int) -> bool:
    """Run in a process that is killed at the n-th time that it comes to a point; whether it came there."""
    if torch.cuda.is_available():
        pytest.skip("autograd's threads, of which every card has one, do not survive a fork")
    child = os.fork()
    if child == 0:
        count, original = 0, getattr(os, point)

        def fail(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        setattr(os, point, fail)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_a_fit_that_is_killed_at_any_write_goes_on_with_the_same_result(point: str, tmp_path: Path) -> None:
    expected = fitted(checkpoint=tmp_path / "whole")(X[:5])
    number, path = 0, tmp_path / "progress"
    while True:
        number += 1
        if not killed(lambda: fitted(checkpoint=path), point, number):
            break
        again = tmp_path / f"again-{number}"
        if path.exists():
            again.write_bytes(path.read_bytes())
            path.unlink()
        assert torch.equal(fitted(checkpoint=again)(X[:5]), expected)
    assert number > 3
    assert not list(tmp_path.glob("*.tmp")) + [left for left in tmp_path.glob(".*.tmp") if "progress" in left.name]


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_a_save_that_is_killed_leaves_the_earlier_file_and_the_next_clears_up(point: str, tmp_path: Path) -> None:
    path, la = tmp_path / "posterior", fitted()
    la.save(path)
    before = path.read_bytes()
    la.prior_precision = 7.0
    for number in (1, 2, 3, 4):
        assert killed(lambda: la.save(path), point, number) == (number <= (2 if point == "fsync" else 1))
        if (point, number) == ("fsync", 1) or (point, number) == ("replace", 1):
            assert path.read_bytes() == before
            assert len(list(tmp_path.iterdir())) == 2  # half a file beside it
        DebiasedLaplace.load(path, model())
    la.save(path)
    assert list(tmp_path.iterdir()) == [path]


def test_half_written_files_of_processes_that_run_are_left(tmp_path: Path) -> None:
    place = tmp_path / "file"
    stem = _files._stem(place)
    mine, others = tmp_path / f"{stem}{_files._owner()}.0.tmp", tmp_path / f"{stem}00000000-1.0.tmp"
    dead = tmp_path / f"{stem}{_files._owner().partition('-')[0]}-{2**22 + 12345}.0.tmp"
    unrelated = tmp_path / f"{_files._stem(tmp_path / 'other')}00000000-1.0.tmp"
    for path in (mine, others, dead, unrelated):
        path.touch()
    _files.write(place, "content")
    assert {path for path in (mine, others, dead, unrelated) if path.exists()} == {mine, others, unrelated}


# -- disks and permissions -------------------------------------------------------------------------


def in_a_child(work: Callable[[], None]) -> str:
    """What a function raises in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = "nothing"
        try:
            work()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.parametrize("kind", ["posterior", "record", "bytes"])
def test_a_full_disk_is_a_sentence(kind: str, tmp_path: Path) -> None:
    path, la = tmp_path / "file", fitted()
    path.write_text("before")

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
        if kind == "posterior":
            la.save(path)
        elif kind == "record":
            records.write_record(path, {"a": list(range(1000))})
        else:
            _files.write(path, b"0" * 5000)

    told = in_a_child(work)
    assert told.startswith(f"CannotWriteError: Could not write {path}: "), told
    assert "What was there before is kept." in told
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.getuid() != 0, reason="only a superuser can become somebody else")
def test_a_folder_of_somebody_else_is_a_sentence_before_the_data_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o755)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and parent.is_relative_to(tempfile.gettempdir()):
            parent.chmod(0o755)
    read: list[int] = []

    def loader() -> Any:
        read.append(1)
        yield X, Y

    def work() -> None:
        os.setuid(65534)
        la = DebiasedLaplace(model(), "classification")
        try:
            la.fit(loader(), checkpoint=folder / "progress")
        finally:
            assert not read

    told = in_a_child(work)
    assert told.startswith("CannotWriteError: Could not write"), told
    assert "Permission denied" in told


def test_permissions_survive_saving_again(tmp_path: Path) -> None:
    path, la = tmp_path / "posterior", fitted()
    la.save(path)
    path.chmod(0o600)
    la.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["n" * 250, "名" * 80, "a b.c", "-rf", "[x]*", "p.v1"])
def test_any_name_that_a_file_can_have(name: str, tmp_path: Path) -> None:
    fitted().save(tmp_path / name)
    DebiasedLaplace.load(tmp_path / name, model())
    fitted(checkpoint=tmp_path / f"{name[:200]}.progress")


def test_a_directory_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(CannotWriteError, match=r"Could not write .*taken"):
        fitted().save(tmp_path / "taken")
    with pytest.raises(CannotWriteError, match=r"it is a directory\. Name a file"):
        fitted(checkpoint=tmp_path / "taken")
    assert Checkpoint(None, {}).completed is None
