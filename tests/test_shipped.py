"""The shipped tasks in their quick form, on tiny files in the formats of the real ones; nothing is downloaded."""

from __future__ import annotations

import gzip
import inspect
import re
import sys
import types
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.evaluation import Task, shifts
from debiased_laplace.evaluation.shipped import cifar10, digits, fashion_mnist, load, names, scenes, trec, uci
from tests.tolerances import EXACT, FLOAT32, assert_equal

#: Tasks of the experiments, on the data of shipped ones.
all_cnn_c, vit = (
    Task.load(Path(__file__).parents[1] / "eval" / f"{name}.py").definition for name in ("all_cnn_c", "vit")
)
EXPERIMENTS = {"cifar10-all-cnn-c": all_cnn_c, "fashion-mnist-vit": vit}
ARGUMENTS = {"seed", "data_dir", "cache", "quick", "device"}
N_MNIST = {"train": 2100, "t10k": 2400}


def call(function: Any, **context: Any) -> Any:
    """As the command does: with those arguments that the function names."""
    return function(**{key: value for key, value in context.items() if key in inspect.signature(function).parameters})


def joined(loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*loader, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


# -- tiny files ------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes(), 1))


def write_mnist(folder: Path, seed: int) -> None:
    """Dark images with a bright spot whose place tells the class."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for part, n in N_MNIST.items():
        labels = np.arange(n, dtype=np.uint8) % 10
        images = rng.integers(0, 64, (n, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 + 2 * label : 7 + 2 * label, 5:23] += 190
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)


def write_cifar(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, n in (("train_first10k.npz", 300), ("test_first1k.npz", 240)):
        images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / name, images=images, labels=np.arange(n) % 10)
    torch.manual_seed(0)
    state = {f"module.{name}": value for name, value in cifar10.CifarResNet().state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 10.0}, folder / "resnet20-0.th")
    torch.save({"state_dict": cifar10.CifarResNet(9).state_dict()}, folder / "resnet56-0.th")


def write_uci(path: Path, n: int = 700) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    inputs = rng.normal(5.0, 3.0, (n, 4))
    inputs[:, 3] = 2.0  # the same for all
    targets = 40 + 10 * np.sin(inputs[:, 0] / 3) + inputs[:, 1] + rng.normal(0, 0.5, n)
    order = np.stack([rng.permutation(n) for _ in range(3)]).astype(np.int32)
    np.savez(path, X=inputs, y=targets, train_idx=order[:, n // 10 :], test_idx=order[:, : n // 10])


def write_trec(folder: Path) -> None:
    """Questions whose first words tell the class; three are there twice, and a fourth is to be tested on."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(40)])
    lines = [
        f"{n % 6} {f'Kind{n % 6} ' * 3}{' '.join(rng.choice(words, rng.integers(5, 9)))} r{n % 25} caf\xe9 ?"
        for n in range(700)
    ]
    lines[650] += " and" * 30  # longer than all
    (folder / "TREC.train.all").write_text("\n".join(lines[:550] + lines[:3]) + "\n", "latin-1")
    (folder / "TREC.test.all").write_text("\n".join([lines[650], lines[3], *lines[550:650]]), "latin-1")


def write_ag_news(folder: Path, n: int = 150) -> None:
    folder.mkdir(parents=True)
    rows = [f'"{1 + n % 4}","W1-w2 News{n}, ""W3""","Text, of {n}"' for n in range(n)]
    (folder / "test.csv").write_text("\n".join(rows), "utf-8")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder / "FashionMNIST" / "raw", 0)
    write_mnist(folder / "MNIST" / "raw", 1)
    write_cifar(folder / "cifar10")
    for dataset in ("concrete", "energy", "power-plant", "wine-quality-red"):
        write_uci(folder / "uci" / f"{dataset}.npz")
    write_trec(folder / "trec")
    write_ag_news(folder / "ag_news")
    return folder


# -- what every task has -----------------------------------------------------------------------


@pytest.fixture
def short_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps each, where it does not matter what was learned."""
    for task in (digits, trec):
        monkeypatch.setattr(task, "QUICK_EPOCHS", 1)
    monkeypatch.setattr(uci, "QUICK_STEPS", 20)
    monkeypatch.setattr(cifar10, "QUICK_TRAIN", 32)


@pytest.mark.parametrize("name", [*names(), *EXPERIMENTS])
def test_the_interface(name: str, data_dir: Path, tmp_path: Path, short_trainings: None) -> None:
    task = EXPERIMENTS.get(name) or load(name)
    context: dict[str, Any] = {
        "seed": 1, "data_dir": data_dir, "cache": tmp_path, "quick": True, "device": torch.device("cpu")
    }  # fmt: skip
    assert task.NAME and task.DESCRIPTION and task.SEEDS_NOTE.startswith("A seed ")
    assert call(task.description, **context).startswith(task.DESCRIPTION)
    assert task.BUDGET > 0 and task.SEEDS > 0
    optional = ("shifted_loaders", "ood_loaders", "ensemble", "images", "target_scale", "target_mean", "description")
    functions = ["model", "train_loader", "val_loader", "test_loader", *(key for key in optional if hasattr(task, key))]
    for key in set(functions) - {"images"}:
        assert set(inspect.signature(getattr(task, key)).parameters) <= ARGUMENTS

    files = sorted(data_dir.rglob("*"))
    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    model = call(task.model, **context)
    ensemble = call(task.ensemble, **context) if hasattr(task, "ensemble") else []
    parts = [joined(call(getattr(task, f"{part}_loader"), **context)) for part in ("train", "val", "test")]
    shifted = call(task.shifted_loaders, **context) if hasattr(task, "shifted_loaders") else {}
    ood = call(task.ood_loaders, **context) if hasattr(task, "ood_loaders") else {}
    others = [joined(loader) for by_severity in shifted.values() for loader in by_severity.values()]
    others += [joined(loader) for loader in ood.values()]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert sorted(data_dir.rglob("*")) == files  # nothing is written there

    for member in (model, *ensemble):
        assert not any(module.training for module in member.modules())
        assert all(p.grad is None for p in member.parameters())
    assert len(ensemble) in (0, 5)
    n_outputs = 1 if task.LIKELIHOOD == "regression" else len(task.CLASSES)
    for inputs, targets in parts + others:
        assert len(inputs) == len(targets) > 0
        assert inputs.dtype == (torch.int64 if name == "trec" else torch.float32) and bool(inputs.isfinite().all())
        assert targets.shape == ((len(inputs), 1) if n_outputs == 1 else (len(inputs),))
        assert targets.dtype == (torch.float32 if n_outputs == 1 else torch.int64)
    with torch.no_grad():
        assert model(parts[2][0]).shape == (len(parts[2][0]), n_outputs)
    together = torch.cat([inputs.flatten(1) for inputs, _ in parts])
    assert len(together.unique(dim=0)) == len(together)  # no datum in two parts
    assert all(list(by_severity) == [1, 2, 3, 4, 5] for by_severity in shifted.values())
    assert {"test", *shifted, *ood} <= set(task.NOTES)
    for key in ("train_loader", "test_loader"):  # fresh each time, and the same each time
        first, second = (joined(call(getattr(task, key), **context)) for _ in range(2))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    if hasattr(task, "images"):
        shown = task.images(parts[2][0])
        assert shown.ndim == 4 and 0 <= float(shown.min()) < float(shown.max()) <= 1


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "trec", "scenes", "uci-energy", *EXPERIMENTS])
def test_weights_are_kept(
    name: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_trainings: None
) -> None:
    task = EXPERIMENTS.get(name) or load(name)
    home = EXPERIMENTS.get(name, {"uci-energy": uci}.get(name, task))
    monkeypatch.setattr(all_cnn_c, "network", small_network)
    context: dict[str, Any] = {"data_dir": data_dir, "cache": tmp_path / "new", "quick": True}
    first = call(task.model, seed=0, **context)
    other = call(task.model, seed=1, **context)
    assert not torch.equal(weights(first), weights(other))
    elsewhere = call(task.model, seed=0, **context | {"cache": tmp_path / "elsewhere"})
    assert torch.equal(weights(first), weights(elsewhere))  # a seed decides everything

    with monkeypatch.context() as patch:
        patch.setattr(home, "train", None)  # training would fail
        torch.manual_seed(7)
        before = torch.get_rng_state()
        again = call(task.model, seed=0, **context)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(weights(first), weights(again))
        assert not again.training
        with pytest.raises(TypeError, match="not callable"):
            call(task.model, seed=2, **context)
    files = list((tmp_path / "new").iterdir())
    assert len(files) == 2 and not [file for file in files if file.name.endswith(".tmp")]

    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"damaged .*It is made anew"):
        assert torch.equal(weights(call(task.model, seed=0, **context)), weights(first))


def small_network() -> nn.Module:
    """In place of All-CNN-C where its training, and not the network, is tested."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )


def test_the_ensemble_is_kept_and_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = digits.ensemble(seed=0, cache=tmp_path, quick=True)
    assert len({tuple(weights(member)[:8].tolist()) for member in members}) == 5
    monkeypatch.setattr(digits, "train", None)
    again = digits.ensemble(seed=0, cache=tmp_path, quick=True)
    assert all(torch.equal(weights(a), weights(b)) for a, b in zip(members, again, strict=True))


def test_a_training_that_was_interrupted_goes_on(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_cnn_c, "QUICK_EPOCHS", 2)
    monkeypatch.setattr(all_cnn_c, "network", small_network)
    context: dict[str, Any] = {"seed": 0, "data_dir": data_dir, "quick": True}
    whole = call(all_cnn_c.model, cache=tmp_path / "whole", **context)
    epochs: list[int] = []

    def once(*arguments: Any) -> None:
        if epochs:
            raise KeyboardInterrupt
        epochs.append(1)
        original(*arguments)

    original, cache = all_cnn_c.train, tmp_path / "parts"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(all_cnn_c, "train", once)
        call(all_cnn_c.model, cache=cache, **context)
    assert [path.suffix for path in cache.iterdir()] == [".progress"]
    monkeypatch.setattr(all_cnn_c, "train", lambda *a: (epochs.append(1), original(*a)))
    assert torch.equal(weights(call(all_cnn_c.model, cache=cache, **context)), weights(whole))
    assert len(epochs) == 2  # one of them before
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def test_names() -> None:
    assert names()[:3] == ["digits", "fashion-mnist", "cifar10"]
    assert [name for name in names() if name.startswith("uci-")] == [
        "uci-concrete", "uci-energy", "uci-power-plant", "uci-wine-quality-red",
    ]  # fmt: skip
    with pytest.raises(
        ValueError, match=r"out of digits, fashion-mnist, cifar10, .*-resnet56, uci-concrete.*, got 'mnist'"
    ):
        load("mnist")


# -- digits --------------------------------------------------------------------------------------


def test_digits(tmp_path: Path) -> None:
    context: dict[str, Any] = {"seed": 0, "quick": True}
    model = digits.model(cache=tmp_path, **context)
    sizes = [len(joined(loader(**context))[1]) for loader in (digits.train_loader, digits.val_loader)]
    inputs, targets = joined(digits.test_loader(**context))
    assert (*sizes, len(targets)) == (898, 359, 270)
    assert len(joined(digits.test_loader(seed=0))[1]) == 539
    accuracies = {"test": _accuracy(model, inputs, targets)}
    for name, by_severity in digits.shifted_loaders(**context).items():
        for severity in (1, 5):
            shifted, known = joined(by_severity[severity])
            assert torch.equal(known, targets)
            accuracies[f"{name} {severity}"] = _accuracy(model, shifted, known)
        assert 0.05 < accuracies[f"{name} 5"] < accuracies["test"]
        assert accuracies[f"{name} 5"] < accuracies[f"{name} 1"]
    assert accuracies["test"] > 0.9
    noise, _ = joined(digits.shifted_loaders(**context)["noise"][3])
    assert torch.equal(noise, shifts.gaussian_noise(inputs, 0.3, seed=0))


def test_digits_split_by_seed() -> None:
    first, other = (joined(digits.train_loader(seed=seed)) for seed in (0, 1))
    assert not torch.equal(first[0], other[0])
    assert abs(int((first[1] == 3).sum()) - int((other[1] == 3).sum())) <= 1  # equal shares of every class


@pytest.mark.parametrize(
    "build", [digits.network, fashion_mnist.network, cifar10.CifarResNet, scenes.UNet, vit.network]
)
def test_networks_have_the_parameters_their_docstrings_say(build: Any) -> None:
    assert f"{sum(p.numel() for p in build().parameters()):,} parameters" in build.__doc__


# -- Fashion-MNIST -------------------------------------------------------------------------------


def test_fashion_mnist(data_dir: Path, tmp_path: Path) -> None:
    context: dict[str, Any] = {"data_dir": data_dir, "cache": tmp_path}
    raw, labels = fashion_mnist.read_mnist(data_dir / "FashionMNIST" / "raw", "t10k")
    assert torch.equal(joined(fashion_mnist.val_loader(**context))[0], raw[:2000].float() / 255)
    inputs, targets = joined(fashion_mnist.test_loader(**context))
    assert torch.equal(inputs, raw[2000:].float() / 255) and torch.equal(targets, labels[2000:])
    assert len(joined(fashion_mnist.train_loader(**context))[1]) == N_MNIST["train"]
    quick = joined(fashion_mnist.test_loader(quick=True, **context))
    assert torch.equal(quick[0], inputs[:300])
    mnist, _ = joined(fashion_mnist.ood_loaders(**context)["MNIST"])
    assert len(mnist) == 2000 and not torch.equal(mnist[:300], inputs[:300])
    blurred, known = joined(fashion_mnist.shifted_loaders(seed=3, quick=True, **context)["blur"][2])
    assert torch.equal(blurred, shifts.corrupt(inputs[:300], "blur", 2, seed=3)) and torch.equal(known, targets[:300])
    assert set(fashion_mnist.shifted_loaders(seed=0, **context)) == set(shifts.CORRUPTIONS)
    model = fashion_mnist.model(seed=0, quick=True, **context)
    assert _accuracy(model, inputs, targets) > 0.5
    assert list(tmp_path.iterdir()) and not (tmp_path / "FashionMNIST").exists()


def test_other_data_have_other_weights(data_dir: Path, tmp_path: Path) -> None:
    write_mnist(tmp_path / "FashionMNIST" / "raw", 5)
    first, other = (
        fashion_mnist.model(seed=0, data_dir=folder, cache=tmp_path / "cache", quick=True)
        for folder in (data_dir, tmp_path)
    )
    assert not torch.equal(weights(first), weights(other))


def test_fashion_mnist_without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fail(root: str, **_: Any) -> None:
        asked.append(root)
        raise RuntimeError("no network")

    _fake_torchvision(monkeypatch, FashionMNIST=fail, MNIST=fail)
    with pytest.raises(FileNotFoundError, match=r"FashionMNIST/raw .* --data-dir, got None, .*failed .*\(no network\)"):
        fashion_mnist.model(seed=0, cache=tmp_path, quick=True)
    with pytest.raises(FileNotFoundError, match=r"Expected MNIST/raw .* Name the folder with --data-dir"):
        fashion_mnist.ood_loaders(cache=tmp_path, data_dir=tmp_path)  # now, not when it is read
    assert asked == [str(tmp_path)] * 2
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(FileNotFoundError, match=r"torchvision, .* is not installed"):
        fashion_mnist.model(seed=0, cache=tmp_path, quick=True)


def test_fashion_mnist_that_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(root: str, download: bool) -> None:
        assert download
        if not Path(root, "FashionMNIST").exists():
            write_mnist(Path(root, "FashionMNIST", "raw"), 0)

    _fake_torchvision(monkeypatch, FashionMNIST=fetch)
    for _ in range(2):
        assert len(joined(fashion_mnist.train_loader(cache=tmp_path, quick=True))[1]) == 2000


def test_damaged_and_missing_gzip_files(data_dir: Path, tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    context: dict[str, Any] = {"cache": tmp_path, "data_dir": tmp_path}
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte\.gz and t10k-labels-idx1-ubyte\.gz in .*raw"):
        joined(fashion_mnist.test_loader(**context))
    whole = (data_dir / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte.gz").read_bytes()
    write_idx(raw / "t10k-labels-idx1-ubyte.gz", np.zeros(5, np.uint8))
    flipped = whole[:5000] + bytes(255 - byte for byte in whole[5000:5100]) + whole[5100:]
    for content in (
        whole[:2000],
        flipped,
        b"something else",
        b"",
        gzip.compress(b""),
        gzip.compress(bytes([0, 0, 8, 3, 1])),
    ):
        (raw / "t10k-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"format of MNIST, got .*t10k-images.* is none or is damaged"):
            joined(fashion_mnist.test_loader(**context))


# -- CIFAR-10 ------------------------------------------------------------------------------------


def test_cifar10(data_dir: Path, tmp_path: Path) -> None:
    context: dict[str, Any] = {"data_dir": data_dir, "cache": tmp_path}
    assert cifar10.N_DATA == 50_000
    assert "all 50,000" in cifar10.DESCRIPTION and "chosen on the test set" in cifar10.DESCRIPTION
    raw, labels = (
        torch.from_numpy(np.load(data_dir / "cifar10" / "test_first1k.npz")[k]) for k in ("images", "labels")
    )
    halves = [joined(loader(seed=0, **context)) for loader in (cifar10.val_loader, cifar10.test_loader)]
    assert [len(targets) for _, targets in halves] == [120, 120]
    index = torch.cat(cifar10.halves(240, 0))
    assert torch.equal(torch.cat([targets for _, targets in halves]), labels[index])
    shown = cifar10.images(torch.cat([inputs for inputs, _ in halves]))
    assert_equal(shown, raw[index].permute(0, 3, 1, 2).float() / 255, FLOAT32)
    assert_equal(halves[0][0][:, 1], (shown[:120, 1] - 0.456) / 0.224, FLOAT32)
    for one, other in zip(cifar10.halves(240, 6), reversed(cifar10.halves(240, 7)), strict=True):
        assert torch.equal(one, other)  # the seeds of a pair take turns
    assert torch.equal(joined(cifar10.test_loader(seed=1, **context))[0], halves[0][0])
    assert not torch.equal(joined(cifar10.test_loader(seed=2, **context))[0], halves[1][0])
    quick = [
        len(joined(loader)[1])
        for loader in (
            cifar10.train_loader(quick=True, **context), cifar10.val_loader(seed=0, quick=True, **context),
            cifar10.test_loader(seed=0, quick=True, **context),
        )
    ]  # fmt: skip
    assert quick == [256, 100, 60]
    assert set(cifar10.shifted_loaders(seed=0, **context)) == set(shifts.CORRUPTIONS)
    assert list(cifar10.shifted_loaders(seed=0, quick=True, **context)) == ["noise", "rotation"]
    jpeg, _ = joined(cifar10.shifted_loaders(seed=0, **context)["jpeg"][5])  # normalised after the corruption
    assert_equal(cifar10.images(jpeg), shifts.corrupt(shown[120:], "jpeg", 5, seed=0), FLOAT32)
    mnist, others = (joined(cifar10.ood_loaders(seed=seed, **context)["MNIST"])[0] for seed in (0, 1))
    assert not torch.equal(mnist, others)
    assert mnist.shape == (120, 3, 32, 32)
    assert_equal(cifar10.images(mnist)[:, 0], cifar10.images(mnist)[:, 2], FLOAT32)


def test_cifar10_where_the_files_lie(tmp_path: Path) -> None:
    write_cifar(tmp_path)  # in the folder itself, and no MNIST
    model = cifar10.model(data_dir=tmp_path)
    state = torch.load(tmp_path / "resnet20-0.th", weights_only=True)["state_dict"]
    assert torch.equal(model.state_dict()["layer3.2.conv2.weight"], state["module.layer3.2.conv2.weight"])
    assert set(cifar10.ood_loaders(seed=0, cache=tmp_path, data_dir=tmp_path)) == {"shuffled patches", "smooth blobs"}


def test_cifar10_c(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    pixels = np.lib.format.open_memmap(folder / "gaussian_noise.npy", "w+", np.uint8, (50_000, 32, 32, 3))
    pixels[20_000:20_240] = np.arange(240, dtype=np.uint8)[:, None, None, None]  # severity 3, its number in each image
    pixels.flush()
    context: dict[str, Any] = {"seed": 0, "data_dir": tmp_path, "cache": tmp_path}
    labels = (np.arange(50_000) % 10).astype(np.uint8)
    np.save(folder / "labels.npy", labels)
    loaders = cifar10.shifted_loaders(**context)
    shifted, targets = joined(loaders["noise"][3])
    numbers = (cifar10.images(shifted)[:, 0, 0, 0] * 255).round().long()
    assert torch.equal(numbers, cifar10.halves(240, 0)[1])
    assert torch.equal(targets, joined(cifar10.test_loader(**context))[1])
    joined(loaders["rotation"][1])  # CIFAR-10-C has none
    with pytest.raises(FileNotFoundError, match=r"gaussian_blur\.npy"):
        joined(loaders["blur"][1])
    assert "those of CIFAR-10-C, but the rotations" in cifar10.description(data_dir=tmp_path, cache=tmp_path)
    np.save(folder / "labels.npy", labels[::-1])
    with pytest.raises(ValueError, match=r"the labels of the test images, got others"):
        joined(loaders["noise"][3])


def test_cifar10_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots: list[str] = []

    def incomplete(root: str, train: bool, download: bool) -> None:
        raise RuntimeError("incomplete")

    def dataset(root: str, train: bool, download: bool = False) -> Any:
        roots.append(f"{root} {download}")
        n = 30 if train else 20
        return types.SimpleNamespace(data=np.zeros((n, 32, 32, 3), np.uint8), targets=list(range(n)))

    _fake_torchvision(monkeypatch, CIFAR10=dataset)
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    torch.save({"state_dict": cifar10.CifarResNet().state_dict()}, data / "resnet20-1.th")
    assert len(joined(cifar10.train_loader(data_dir=data, cache=cache))[1]) == 30
    assert len(joined(cifar10.test_loader(seed=0, data_dir=data, cache=cache))[1]) == 10
    assert roots == [f"{cache} True"] * 2
    other = tmp_path / "other"
    (other / "cifar-10-batches-py").mkdir(parents=True)
    torch.save({"state_dict": cifar10.CifarResNet().state_dict()}, other / "resnet20-1.th")
    joined(cifar10.train_loader(data_dir=other, cache=cache))
    assert roots[2:] == [f"{other} False"] * 2
    _fake_torchvision(monkeypatch, CIFAR10=incomplete)
    with pytest.raises(FileNotFoundError, match=r"train_first10k\.npz and .*cifar-10-batches-py, .*\(incomplete\)"):
        joined(cifar10.train_loader(data_dir=other, cache=tmp_path))


def test_cifar10_that_cannot_be_read(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"resnet20-\*\.th .*akamaster/pytorch_resnet_cifar10.*--data-dir"):
            cifar10.model(data_dir=folder)
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, tmp_path / "resnet20-1.th")
    with pytest.raises(ValueError, match=r"'state_dict' of a ResNet-20, got .*resnet20-1\.th"):
        cifar10.model(data_dir=tmp_path)
    for name in ("train_first10k.npz", "test_first1k.npz"):
        np.savez(tmp_path / name, images=np.zeros((3, 32, 32)), labels=np.zeros(3))
    with pytest.raises(ValueError, match=r"images uint8 .*train_first10k\.npz, got float64 \[3, 32, 32\]"):
        joined(cifar10.train_loader(data_dir=tmp_path, cache=tmp_path))


# -- UCI -----------------------------------------------------------------------------------------


def test_uci(data_dir: Path, tmp_path: Path) -> None:
    task = load("uci-energy")
    context: dict[str, Any] = {"seed": 1, "data_dir": data_dir}
    file = np.load(data_dir / "uci" / "energy.npz")
    std, mean = task.target_scale(**context), task.target_mean(**context)
    parts = [joined(loader(**context)) for loader in (task.train_loader, task.val_loader, task.test_loader)]
    assert [len(targets) for _, targets in parts] == [567, 63, 70]
    assert_equal(parts[2][1][:, 0] * std + mean, torch.from_numpy(file["y"][file["test_idx"][1]]).float(), FLOAT32)
    fitted = torch.cat([targets for _, targets in parts[:2]])[:, 0] * std + mean
    expected = torch.from_numpy(file["y"][file["train_idx"][1]]).float()
    assert_equal(fitted.sort().values, expected.sort().values, FLOAT32)
    inputs, targets = parts[0]
    assert_equal(inputs.std(0, correction=0)[:3], torch.ones(3), FLOAT32)
    assert float(inputs.mean(0).abs().max()) < FLOAT32 and float(targets.mean().abs()) < FLOAT32
    assert_equal(inputs[:, 3], torch.zeros(567), FLOAT32)  # the feature that is the same for all
    model = task.model(quick=True, cache=tmp_path, **context)
    with torch.no_grad():
        x, y = parts[2]
        assert float((model(x) - y).square().mean()) < 0.1
    assert len(joined(task.train_loader(quick=True, **context))[1]) == 500
    assert not torch.equal(joined(task.test_loader(seed=0, data_dir=data_dir))[1], parts[2][1])


def test_uci_where_the_file_lies(tmp_path: Path) -> None:
    write_uci(tmp_path / "concrete.npz")
    task = load("uci-concrete")
    assert len(joined(task.test_loader(seed=0, data_dir=tmp_path))[1]) == 70
    for seed in (3, -1):
        with pytest.raises(
            ValueError, match=r"one of the 3 splits in concrete\.npz as the seed, from 0 to 2, got -?\d"
        ):
            joined(task.test_loader(seed=seed, data_dir=tmp_path))


def test_uci_that_cannot_be_read(tmp_path: Path) -> None:
    task = load("uci-power-plant")
    for folder in (None, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"Expected power-plant\.npz .*Name the folder with --data-dir"):
            task.model(seed=0, cache=tmp_path, data_dir=folder)
    np.savez(tmp_path / "power-plant.npz", X=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"train_idx, test_idx in .*power-plant\.npz, which has others"):
        joined(task.train_loader(seed=0, data_dir=tmp_path))
    write_uci(tmp_path / "whole.npz")
    for content in ((tmp_path / "whole.npz").read_bytes()[:5000], b"something else", b""):
        (tmp_path / "power-plant.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"Expected arrays X, y, .*power-plant\.npz, which .* is damaged"):
            joined(task.train_loader(seed=0, data_dir=tmp_path))


# -- TREC ----------------------------------------------------------------------------------------


def test_trec(data_dir: Path, tmp_path: Path) -> None:
    read = trec.questions(data_dir)
    assert [len(read.train), len(read.validation), len(read.test)] == [49, 500, 102]  # 550 but one that is tested on
    parts = [{text for text, _ in part} for part in (read.train, read.validation, read.test)]
    assert not any(one & other for one, other in zip(parts, parts[1:] + parts[:1], strict=True))
    inputs, targets = joined(trec.test_loader(data_dir=data_dir))
    assert inputs.shape == (102, 24) and targets[:2].tolist() == [2, 3]
    assert bool((inputs[0] != trec.PADDING).all())  # cut off
    text, _ = read.test[1]
    assert text[0] == "kind3" and text[-2:] == ("caf\xe9", "?")
    assert inputs[1, : len(text)].tolist() == [read.numbers.get(word, trec.UNKNOWN) for word in text]
    assert inputs[1, len(text) :].tolist() == [trec.PADDING] * (24 - len(text))
    counts = Counter(word for text, _ in read.train for word in set(text))
    assert set(read.numbers) == {word for word, count in counts.items() if count > 1} < set(counts)
    assert min(counts[word] for word in read.numbers) == 2
    assert sorted(read.numbers.values()) == list(range(2, len(read.numbers) + 2))
    context: dict[str, Any] = {"data_dir": data_dir, "cache": tmp_path, "quick": True}
    loaders = (trec.train_loader, trec.val_loader, trec.test_loader)
    quick = [joined(loader(data_dir=data_dir, quick=True)) for loader in loaders]
    assert [len(targets) for _, targets in quick] == [400, 100, 100]
    assert _accuracy(trec.model(seed=0, **context), *quick[2]) > 0.9


def test_padding_and_order_of_questions() -> None:
    torch.manual_seed(0)
    model = trec.QuestionClassifier(20).double().eval()
    numbers = torch.randint(1, 20, (3, 24))
    numbers[:, 7:] = trec.PADDING
    with torch.no_grad():
        assert_equal(model(numbers), model(numbers[:, :7]), EXACT)
        assert not torch.allclose(model(numbers[:, :7].flip(1)), model(numbers[:, :7]), rtol=1e-3)


def test_shifts_of_questions(data_dir: Path) -> None:
    text = tuple(f"word{letter}" for letter in "abcdefghijklmnopqrst")
    lengths, moved, wrong = [], [], []
    for share in trec.SHARES:
        generator = np.random.default_rng(0)
        shorter, mixed, mistyped = (
            [shift(text, share, generator) for _ in range(200)]
            for shift in (trec.missing_words, trec.word_order, trec.typos)
        )
        assert all(list(one) == sorted(one) and set(one) <= set(text) for one in shorter)
        assert all(sorted(one) == list(text) for one in mixed)
        assert all(sorted(a) == sorted(b) for one in mistyped for a, b in zip(one, text, strict=True))
        lengths.append(1 - np.mean([len(one) for one in shorter]) / 20)
        moved.append(np.mean([a != b for one in mixed for a, b in zip(one, text, strict=True)]))
        wrong.append(np.mean([a != b for one in mistyped for a, b in zip(one, text, strict=True)]))
    shares = np.array(trec.SHARES)
    error = 4 * np.sqrt(shares * (1 - shares) / 4000)
    assert (np.abs(lengths - shares) < error).all()
    assert (np.abs(wrong - shares) < error).all()
    # One of the k drawn words stays on average; so 20 p - 1 of 20 move, and none where none are drawn.
    assert (np.abs(moved - (shares - (1 - (1 - shares) ** 20) / 20)) < 2 * error).all()
    assert trec.missing_words(("a", "b"), 1.0, np.random.default_rng(0)) in (("a",), ("b",))
    assert trec.typos(("", "a", "ab"), 1.0, np.random.default_rng(0)) == ("", "a", "ba")

    loaders = trec.shifted_loaders(seed=0, data_dir=data_dir)
    plain, targets = joined(trec.test_loader(data_dir=data_dir))
    (shorter, known), (mixed, _), (mistyped, _) = (
        joined(loaders[name][5]) for name in ("missing words", "word order", "typos")
    )
    assert torch.equal(known, targets)
    assert (shorter == trec.PADDING).sum() > (plain == trec.PADDING).sum()
    assert torch.equal(mixed[1:].sort(1).values, plain[1:].sort(1).values) and not torch.equal(mixed, plain)
    assert (mistyped == trec.UNKNOWN).sum() > (plain == trec.UNKNOWN).sum()
    assert not torch.equal(joined(trec.shifted_loaders(seed=1, data_dir=data_dir)["typos"][5])[0], mistyped)


def test_headlines_of_ag_news(data_dir: Path, tmp_path: Path) -> None:
    headlines, kinds = joined(trec.ood_loaders(data_dir=data_dir)["AG News"])
    assert len(headlines) == 102 and kinds[:5].tolist() == [0, 1, 2, 3, 0]
    numbers = trec.questions(data_dir).numbers
    words = ("w1", "-", "w2", "news0", ",", '"', "w3", '"')
    assert headlines[0, :9].tolist() == [numbers.get(word, trec.UNKNOWN) for word in words] + [trec.PADDING]
    write_trec(tmp_path)  # in the folder itself, and no AG News
    assert trec.ood_loaders(data_dir=tmp_path) == {}
    assert len(joined(trec.test_loader(data_dir=tmp_path))[1]) == 102


def test_trec_that_cannot_be_read(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"TREC\.train\.all and TREC\.test\.all.* Name the folder"):
            trec.train_loader(data_dir=folder)
    write_trec(tmp_path)
    for line in ("6 What is it ?", "What is it ?", "3", "3.0 What ?", "-1 What ?"):
        (tmp_path / "TREC.test.all").write_text(f"0 What ?\n{line}\n")
        expected = rf"label from 0 to 5 .* in line 2 of .*TREC\.test\.all, got '{re.escape(line)}'"
        with pytest.raises(ValueError, match=expected):
            trec.test_loader(data_dir=tmp_path)
    for empty in ("", "0 What ?\n\n"):
        (tmp_path / "TREC.test.all").write_text(empty)
        with pytest.raises(ValueError, match=r"TREC\.test\.all"):
            trec.test_loader(data_dir=tmp_path)


# -- scenes --------------------------------------------------------------------------------------


def test_scenes() -> None:
    parts = scenes.split(0)
    assert [len(scene.images) for scene in parts.values()] == [600, 400, 800]
    for name, (images, labels, marks) in parts.items():
        known, classes = digits.split(0)._asdict()[name]
        assert torch.equal(labels > 0, images[:, 0] >= scenes.INK)
        assert_equal(marks.sum((1, 2, 3)), torch.ones(len(marks)), EXACT)
        for scene, (image, label) in enumerate(zip(images[:20, 0], labels[:20], strict=True)):
            for row, column in ((row, column) for row in (0, 10) for column in (0, 10)):
                quarter = image[row : row + 10, column : column + 10]
                windows = quarter.unfold(0, 8, 1).unfold(1, 8, 1).reshape(-1, 8, 8)
                is_there = (known[:, 0, None] == windows).all((-1, -2)).any(1)  # the digits of this part alone
                (of_pixels,) = label[row : row + 10, column : column + 10].unique()[1:].tolist()
                assert of_pixels - 1 in classes[is_there], (name, scene, row, column)
    assert not torch.equal(scenes.split(1)["test"].images, parts["test"].images)


def test_a_pixel_of_a_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "QUICK_EPOCHS", 5)
    model = scenes.model(seed=0, cache=tmp_path, quick=True)
    inputs, targets = joined(scenes.test_loader(seed=0))
    dense, labels = joined(scenes.dense_loader("test", seed=0))
    assert torch.equal(inputs[:, :1], dense) and labels.shape == (800, 20, 20)
    with torch.no_grad():
        every, rows = model.network(dense), model(inputs)
    assert every.shape == (800, 11, 20, 20)
    datum, row, column = (inputs[:, 1] > 0).nonzero(as_tuple=True)
    assert torch.equal(datum, torch.arange(800)) and len((row * 20 + column).unique()) > 300
    assert_equal(rows, every[datum, :, row, column], FLOAT32)
    assert torch.equal(targets, labels[datum, row, column])
    background = float((labels == 0).float().mean())
    assert float((every.argmax(1) == labels).float().mean()) > background + 0.02
    assert scenes.N_DATA == joined(scenes.dense_loader("train", seed=0))[1].numel()

    noisy, same = joined(scenes.shifted_loaders(seed=0)["noise"][3])
    assert torch.equal(noisy[:, 1], inputs[:, 1]) and torch.equal(same, targets)
    assert torch.equal(noisy[:, :1], shifts.gaussian_noise(dense, 0.3, seed=0))
    shown = scenes.images(inputs)[datum, :, row, column]
    assert torch.equal(shown, torch.tensor([1.0, 0.0, 0.0]).expand(800, 3))
    quick = [joined(loader(seed=0, quick=True)) for loader in (scenes.val_loader, scenes.test_loader)]
    assert [len(known) for _, known in quick] == [100, 100] and torch.equal(quick[1][0], inputs[:100])


def test_a_posterior_of_every_pixel_of_scenes() -> None:
    torch.manual_seed(0)
    model = scenes.UNet(2).eval()
    images, labels = (part[:12] for part in joined(scenes.dense_loader("train", seed=0)))
    posterior = dl.fit(model, [(images, labels)], "classification", structure=dl.Diagonal())
    with torch.no_grad():
        outputs = model(images)
    assert posterior.posterior.n_data == 12
    assert_equal(torch.tensor(posterior.fitted.mean_loss), 400 * F.cross_entropy(outputs, labels), FLOAT32)
    predicted = posterior.predict(images[:3], n_samples=5)
    assert predicted.mean.shape == predicted.outputs_variance.shape == (3, 11, 20, 20)
    assert_equal(predicted.outputs_mean, outputs[:3], FLOAT32)
    assert_equal(predicted.mean.sum(1), torch.ones(3, 20, 20), FLOAT32)


# -- helpers -------------------------------------------------------------------------------------


def _accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    with torch.no_grad():
        return float((model(inputs).argmax(1) == targets).float().mean())


def _fake_torchvision(monkeypatch: pytest.MonkeyPatch, **datasets: Any) -> None:
    """A torchvision that has these datasets and nothing else."""
    library, module = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    for name, dataset in datasets.items():
        setattr(module, name, dataset)
    library.datasets = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", library)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
