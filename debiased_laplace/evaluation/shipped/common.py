"""What the shipped tasks share: batches made when they are wanted, files of data, training and kept weights."""

from __future__ import annotations

import gzip
import hashlib
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from debiased_laplace import _store
from debiased_laplace._files import StoredFileError
from debiased_laplace.evaluation import shifts
from debiased_laplace.evaluation.records import digest

Loader = Iterable[tuple[Tensor, Tensor]]
CPU = torch.device("cpu")


class Batches:
    """Batches of inputs and targets, made anew whenever they are iterated.

    Args:
        make: Gives all inputs ``[N, ...]`` and targets ``[N, ...]``; called when an iteration begins.
        transform: Applied to the inputs of each batch.
        size: Data in a batch.
    """

    def __init__(
        self,
        make: Callable[[], tuple[Tensor, Tensor]],
        transform: Callable[[Tensor], Tensor] = lambda inputs: inputs,
        size: int = 250,
    ) -> None:
        self.make, self.transform, self.size = make, transform, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self.make()
        for x, y in zip(inputs.split(self.size), targets.split(self.size), strict=True):
            yield self.transform(x), y


def shift_note(name: str) -> str:
    """A sentence about a shift of :func:`~debiased_laplace.evaluation.shifts.corrupt`."""
    weakest, strongest = (shifts.describe(name, severity) for severity in (1, 5))
    return f"{weakest[0].upper()}{weakest[1:]} at severity 1 up to {strongest} at severity 5."


# -- files of data ---------------------------------------------------------------------------------


def existing(data_dir: Path | None, *places: str) -> Path | None:
    """The first of some files or folders that is in a folder of data; ``None`` if there is none."""
    candidates = [data_dir / place for place in places if data_dir is not None and (data_dir / place).exists()]
    return candidates[0] if candidates else None


def scaled(images: Tensor) -> Tensor:
    """Bytes as numbers in [0, 1]."""
    return images.float() / 255


def read_idx(path: Path) -> Tensor:
    """A compressed array in the format of MNIST, as bytes.

    Raises:
        ValueError: If the file is something else, or damaged.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3])]
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (gzip.BadGzipFile, zlib.error, EOFError, IndexError, ValueError) as error:
        raise ValueError(
            f"Expected a gzip file in the format of MNIST, got {path}, which is none or is damaged ({error}). "
            "Fetch it again."
        ) from None
    return torch.from_numpy(array.copy())


def read_npz(path: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of a file of numpy.

    Raises:
        ValueError: If one is not there, or the file is something else or damaged.
    """
    try:
        with np.load(path) as file:
            return [file[key] for key in keys]
    except (
        KeyError,
        ValueError,
        EOFError,
        OSError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(
            f"Expected arrays {', '.join(keys)} in {path}, which has others or is damaged ({error}). Fetch it again."
        ) from error


def stamp(*paths: Path) -> tuple[Any, ...]:
    """Names, sizes and times of files, to keep what was read of them only as long as they are the same."""
    facts = [(path.resolve(), path.stat()) for path in paths]
    return tuple((str(path), status.st_size, status.st_mtime_ns) for path, status in facts)


def read_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images ``[N, 1, 28, 28]`` as bytes and labels ``[N]`` of MNIST or a set in its format.

    Args:
        folder: With the four gzip files.
        part: ``"train"`` or ``"t10k"``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is something else, or damaged.
    """
    files = [f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if missing := [file for file in files if not (folder / file).exists()]:
        raise FileNotFoundError(f"Expected {' and '.join(missing)} in {folder}, where they are not. Fetch them.")
    return _read_mnist(*(folder / file for file in files), stamp(*(folder / file for file in files)))


@lru_cache(maxsize=4)
def _read_mnist(images: Path, labels: Path, stamp: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    return read_idx(images)[:, None], read_idx(labels).long()


def mnist_folder(name: str, data_dir: Path | None, cache: Path) -> Path:
    """The folder with the gzip files of a set in the format of MNIST; downloaded if there is none.

    Args:
        name: ``"MNIST"`` or ``"FashionMNIST"``.
        data_dir: Searched first, never written to.
        cache: For the download.

    Raises:
        FileNotFoundError: If there is no such folder and the files cannot be downloaded.
    """
    folder = existing(data_dir, f"{name}/raw")
    if folder is not None:
        return folder
    of_torchvision(name, cache, f"{name}/raw with the four gzip files", data_dir, download=True)
    return cache / name / "raw"


def of_torchvision(name: str, root: Path, files: str, data_dir: Path | None, **keywords: Any) -> Any:
    """A dataset of torchvision.

    Args:
        name: Of its class.
        root: Folder it is in, or downloaded to.
        files: What to have instead, for the message.
        data_dir: Where that was looked for.
        **keywords: Further arguments, such as ``download``.

    Raises:
        FileNotFoundError: If torchvision, the files or the network are missing; it says what to put where.
    """
    wanted = f"Expected {files} in the folder of --data-dir, got {data_dir},"
    try:
        from torchvision import datasets
    except ImportError:
        raise FileNotFoundError(
            f"{wanted} and torchvision, which could download or read the data, is not installed. "
            "Name the folder with --data-dir or install torchvision."
        ) from None
    try:
        return getattr(datasets, name)(root=str(root), **keywords)
    except (OSError, RuntimeError) as error:  # no network, no server, damaged files
        raise FileNotFoundError(
            f"{wanted} and torchvision failed to download or read the data ({error}). Name the folder with --data-dir."
        ) from error


def fingerprint(*tensors: Tensor) -> str:
    """Sixteen hexadecimal digits that tell data apart."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        state.update(tensor.contiguous().numpy().data)
    return state.hexdigest()[:16]


# -- training --------------------------------------------------------------------------------------


def initialised(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network initialised with a seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # initialisation draws from the CPU's global generator
        return build()


def train(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> None:
    """Train in place on the given batches of indices; the inputs are on the device of the model."""
    with torch.enable_grad():
        for index in batches:
            optimizer.zero_grad()
            loss(model(inputs[index]), targets[index]).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
    optimizer.zero_grad()


def kept(
    cache: Path,
    name: str,
    settings: Mapping[str, Any],
    build: Callable[[], nn.Module],
    make: Callable[[], nn.Module],
    device: torch.device,
) -> nn.Module:
    """A trained network in eval mode, with the weights of an earlier call if there are any.

    The file belongs to the settings, the network's description and the kind of device.

    Args:
        cache: Folder of the weights; made if it is missing.
        name: How the file name begins.
        settings: Everything else that decides the weights: the seed, the training, and the data's :func:`fingerprint`.
        build: Gives the network with any weights.
        make: Gives the trained network.
        device: Where the network is wanted.

    Warns:
        UserWarning: If the file of the weights is damaged; they are made anew.
    """
    with torch.random.fork_rng(devices=[]):
        model = build()
    path = cache / f"{name}-{digest({**settings, 'network': repr(model), 'device': device.type})}.safetensors"
    weights = read_whole(path)
    if weights is None:
        model = make()
        cache.mkdir(parents=True, exist_ok=True)
        _store.write(path, dict(model.state_dict()), {"kind": "weights"})
    else:
        model.load_state_dict(weights)
    return model.to(device).eval()


def read_whole(path: Path, device: torch.device | str = "cpu") -> Any:
    """What :func:`debiased_laplace._store.write` wrote; None if there is none, or it is damaged: to be made anew."""
    try:
        return _store.read(path, device)[0]
    except FileNotFoundError:
        return None
    except StoredFileError as error:
        warnings.warn(f"{error} It is made anew.", stacklevel=2)
        return None


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one CPU thread: small networks gain nothing from more, and numbers depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
