"""A pass over the data that is interrupted anywhere goes on there, and a checkpoint is of its data alone."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import DebiasedLaplace, LowRank, PrioritySampler, TwoBatch, UniformSampler
from debiased_laplace.cli import app
from debiased_laplace.fitting import checkpoint

pytestmark = pytest.mark.faults
X = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(2, (40,), generator=torch.Generator().manual_seed(2))
WAYS: dict[str, dict[str, Any]] = {
    "importance": {"sampler": PrioritySampler(16)},
    "uniform": {"sampler": UniformSampler(16)},
    "all": {"sampler": UniformSampler(None)},
    "two batches": {"budget": 16, "split": TwoBatch()},
}


@pytest.fixture(autouse=True)
def _written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass is kept after every batch, and not only every half minute."""
    monkeypatch.setattr(checkpoint.Checkpoint, "is_due", True)


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batches(n: int = 40, scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    return list(zip((scale * X[:n]).split(5), Y[:n].split(5), strict=True))


def fitted(loader: Any, **keywords: Any) -> DebiasedLaplace:
    structure = "lowrank" if isinstance(keywords.get("structure"), LowRank) else "kron"
    la = DebiasedLaplace(model(), "classification", hessian_structure=structure)
    la.fit(loader, **keywords)
    return la


class Stops:
    """A loader that fails before a batch; counts what it gave."""

    def __init__(self, loader: Any, before: int, error: BaseException) -> None:
        self.loader, self.before, self.error, self.given = loader, before, error, 0

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.loader):
            if index == self.before:
                raise self.error
            self.given += 1
            yield batch


def same(one: DebiasedLaplace, other: DebiasedLaplace) -> bool:
    return (
        torch.equal(one.posterior.curvatures, other.posterior.curvatures)
        and torch.equal(one(X[:5]), other(X[:5]))
        and torch.equal(one.fitted.uniform.data.indices, other.fitted.uniform.data.indices)
        and float(one.loss) == float(other.loss)
    )


@pytest.mark.parametrize("error", [OSError("no network"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("way", WAYS)
def test_a_loader_that_fails_anywhere(
    way: str, error: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = fitted(batches(), **WAYS[way])
    for before in range(8):
        path = tmp_path / f"{before}"
        with pytest.raises(type(error)):
            fitted(Stops(batches(), before, error), checkpoint=path, **WAYS[way])
        caplog.clear()
        assert same(fitted(batches(), checkpoint=path, **WAYS[way]), expected)
        told = [record.message for record in caplog.records if "goes on after" in record.message]
        assert told == (
            [f"The pass over the data goes on after {before} batches, {5 * before} data."] if before else []
        )


def test_the_network_is_not_run_again_on_what_was_seen(tmp_path: Path) -> None:
    counted = []
    original = DebiasedLaplace(model(), "classification")
    original.model.register_forward_hook(lambda module, args, output: counted.append(len(output)))
    with pytest.raises(OSError, match="no network"):
        original.fit(Stops(batches(), 6, OSError("no network")), budget=16, checkpoint=tmp_path / "p")
    counted.clear()
    original.fit(batches(), budget=16, checkpoint=tmp_path / "p")
    again = sum(n == 5 for n in counted)
    counted.clear()
    original.fit(batches(), budget=16)
    assert sum(n == 5 for n in counted) - again == 6


def test_an_interrupt_in_the_middle_of_a_forward_pass(tmp_path: Path) -> None:
    """The generator has drawn for the batch by then: it goes on with the state before it."""
    expected, la, calls = fitted(batches(), budget=16), DebiasedLaplace(model(), "classification"), itertools.count()

    def interrupt(module: nn.Module, args: Any) -> None:
        if next(calls) == 12:
            raise KeyboardInterrupt

    handle = la.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        la.fit(batches(), budget=16, checkpoint=tmp_path / "p")
    handle.remove()
    assert (tmp_path / "p").exists()
    la.fit(batches(), budget=16, checkpoint=tmp_path / "p")
    assert same(la, expected)


@pytest.mark.parametrize("shuffled_by", ["the global generator", "one of its own"])
def test_loaders_that_shuffle(shuffled_by: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def loader(seed: int) -> DataLoader:
        own = torch.Generator().manual_seed(seed) if shuffled_by == "one of its own" else None
        return DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, generator=own)

    torch.manual_seed(0)
    with pytest.raises(OSError, match="no network"):
        fitted(Stops(loader(1), 4, OSError("no network")), budget=16, checkpoint=tmp_path / "p")
    torch.manual_seed(1)  # another order, if a loader asks the global generator
    before = torch.get_rng_state()
    caplog.clear()
    la = fitted(loader(2), budget=16, checkpoint=tmp_path / "p")
    assert torch.equal(torch.get_rng_state(), before)
    if shuffled_by == "one of its own":
        assert any("other batches than in the interrupted pass" in record.message for record in caplog.records)
    else:
        assert any("goes on after 4 batches" in record.message for record in caplog.records)
        assert same(la, fitted(loader(0), budget=16, checkpoint=tmp_path / "q"))
    assert la.n_data == 40
    fitted(loader(3), budget=16, checkpoint=tmp_path / "p")  # the same data in another order


def test_an_iterator_that_gives_something_else(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no network"):
        fitted(Stops(batches(), 4, OSError("no network")), budget=16, checkpoint=tmp_path / "p")
    with pytest.raises(ValueError, match=r"an iterator cannot be read again\. Delete the checkpoint"):
        fitted(iter(batches(scale=2.0)), budget=16, checkpoint=tmp_path / "p")
    assert same(fitted(iter(batches()), budget=16, checkpoint=tmp_path / "p"), fitted(batches(), budget=16))


CHANGES: dict[str, Any] = {
    "fewer": lambda: batches(30),
    "others": lambda: batches(scale=5.0),
    "one number": lambda: [(x + 1e-9 * (index == 3), y) for index, (x, y) in enumerate(batches())],
    "one label": lambda: [(x, (y + (index == 3)) % 2) for index, (x, y) in enumerate(batches())],
    "twice": lambda: batches() * 2,
    "another dtype": lambda: [(x.float(), y) for x, y in batches()],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_is_not_taken_for_other_data(change: str, tmp_path: Path) -> None:
    path = tmp_path / "p"
    fitted(batches(), budget=16, checkpoint=path)
    with pytest.raises(ValueError, match=r"Expected the 40 data that the checkpoint was made from, got .*Delete it"):
        fitted(CHANGES[change](), budget=16, checkpoint=path)


def test_a_draw_that_is_complete_is_not_taken_for_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "complete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fitted(batches(), budget=16, checkpoint=path)
    with pytest.raises(ValueError, match="Expected the 40 data that the checkpoint was made from, got 30"):
        fitted(batches(30), budget=16, checkpoint=path)
    assert same(fitted(batches(), budget=16, checkpoint=path), fitted(batches(), budget=16))
    assert any("goes on with the data that were drawn earlier" in record.message for record in caplog.records)
    caplog.clear()
    fitted(batches(), budget=16, checkpoint=path)
    assert [r.message for r in caplog.records] == [
        f"The fit is the complete one in {path}, which was made from the same data."
    ]


def test_data_without_an_end(caplog: pytest.LogCaptureFixture) -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield from batches()

    assert fitted(endless(), budget=16, max_batches=11).n_data == 55
    assert same(fitted(endless(), budget=16, max_batches=8), fitted(batches(), budget=16))

    class Lying(list):
        def __len__(self) -> int:
            return 3

    with caplog.at_level(logging.WARNING):
        fitted(Lying(batches()), budget=16)
    assert any("more than the 3 batches that it promised" in record.message for record in caplog.records)


def test_the_command_does_not_delete_its_own_result(tmp_path: Path) -> None:
    """Whatever the user calls the file, the checkpoint has another name, and each file its own."""
    from typer.testing import CliRunner

    task = Path(__file__).parents[1] / "tasks" / "blobs.py"
    for name in ("b.progress", "p.v1", "p.v2", "x[1]"):
        done = CliRunner().invoke(app, ["fit", str(task), "--quick", "--budget", "20", "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        assert (tmp_path / name).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.progress", "p.v1", "p.v2", "x[1]"]
    (tmp_path / ".writable").write_text("mine")
    done = CliRunner().invoke(app, ["fit", str(task), "--quick", "--budget", "20", "--out", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / ".writable").read_text() == "mine"
