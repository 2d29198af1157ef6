"""A task: a Python file, or the name of a shipped one, that says what model to judge and on what data.

Functions of the file (all but the first four are optional):

==================== =================================================================================================
``model``            the trained network
``train_loader``     batches ``(inputs, targets)`` of its training data
``val_loader``       held-out batches, on which everything is tuned
``test_loader``      further ones, on which everything is judged
``shifted_loaders``  ``{name: loader}`` or ``{name: {severity: loader}}``
``ood_loaders``      ``{name: loader}`` of out-of-distribution data
``ensemble``         trained networks of several runs
``images``           from the inputs of a batch to images ``[N, channels, H, W]`` in [0, 1], for the report
``transform``        from an image of PIL, or a row of a table, to an input, for ``predict --inputs``
``target_scale``     of a regression: the standard deviation by which the targets were divided
``description``      what the data and the model are
==================== =================================================================================================

Every function but ``images`` and ``transform`` is called with those of ``seed``, ``data_dir``, ``cache``, ``quick`` and
``device`` that it has a parameter for. Loaders are asked for anew for every reading.

Constants, all optional: ``NAME``, ``DESCRIPTION``, ``LIKELIHOOD`` (``"classification"``, ``"regression"``, or
``"bernoulli"`` for one output that is a logit, with targets 0 and 1), ``N_DATA`` (size of the training set, if the
loader does not yield all of it), ``BUDGET`` (training data spent on curvature), ``SEEDS`` (how many by default),
``SEEDS_NOTE`` (what a seed decides), ``INDEPENDENT_SEEDS`` (whether seeds with other test data have data that
share nothing; otherwise they count as splits of one data set, and intervals allow for the overlap), ``FOLDS`` (K, if
seeds Kj to Kj + K - 1 judge the K folds of one data set in turn, each tuned on the others), ``NOTES`` (a sentence for
each condition), ``CLASSES`` (names), ``DENSE`` (some thousand parameters at most: the whole curvature matrix, too).
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from debiased_laplace.evaluation.names import check_name, check_text
from debiased_laplace.evaluation.provenance import source_digest

REQUIRED = ("model", "train_loader", "val_loader", "test_loader")
SUPPORTED = ("classification", "regression", "bernoulli")
DEFAULT_BUDGET = 256
#: Names of modules that task files imported from their folders, which may have changed since.
_NEIGHBOURS: set[str] = set()
FAILURES = (Exception, SystemExit)  # what code of a user may end with: a script that calls sys.exit, too


class TaskError(RuntimeError):
    """A task file that cannot be used: it says which function, and why."""


@dataclass(frozen=True)
class Context:
    """What the functions of a task may ask for by name.

    Attributes:
        seed: Of everything random.
        data_dir: Folder with local data, if there is one.
        cache: Folder where the task may keep files, such as trained weights.
        quick: Whether little of everything will do.
        device: Where the model runs.
    """

    seed: int = 0
    data_dir: Path | None = None
    cache: Path = Path("cache")
    quick: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Task:
    """A task file that was loaded and looks complete; :meth:`load` makes one.

    Attributes:
        source: File, or name of a shipped task.
        definition: The module, or anything with the functions and constants as attributes.
        fingerprint: Digest of the file's text and of the modules that it imports from its folder.
    """

    source: str
    definition: Any
    fingerprint: str = ""

    @classmethod
    def load(cls, source: str | Path) -> Task:
        """Read a task file, or find a shipped task by its name.

        Raises:
            TaskError: If there is no such task, the file does not run, or a function is missing.
        """
        from debiased_laplace.evaluation import shipped

        path = Path(source)
        if path.suffix == ".py":
            if not path.is_file():
                raise TaskError(
                    f"Expected a task file, got {path}, which does not exist. `debiased-laplace init-task` writes one."
                )
            return cls._checked(str(source), _module(path), source_digest(path))
        if str(source) not in shipped.names():
            raise TaskError(
                f"Expected a Python file or a shipped task out of {', '.join(shipped.names())}, got {str(source)!r}."
            )
        definition = shipped.load(str(source))
        folder = Path(shipped.__file__).parent
        file = Path(inspect.getfile(definition.train_loader))
        return cls._checked(str(source), definition, source_digest(file, folder, folder.parents[2]))

    @classmethod
    def _checked(cls, source: str, definition: Any, fingerprint: str = "") -> Task:
        missing = [name for name in REQUIRED if not callable(getattr(definition, name, None))]
        if missing:
            raise TaskError(
                f"Expected {source} to define the functions {', '.join(f'{name}()' for name in REQUIRED)}; "
                f"{', '.join(f'{name}()' for name in missing)} is missing. `debiased-laplace init-task` writes a "
                "file with all of them."
            )
        task = cls(source, definition, fingerprint)
        if task.likelihood not in SUPPORTED:
            raise TaskError(f"Expected LIKELIHOOD of {source} out of {list(SUPPORTED)}, got {task.likelihood!r}.")
        try:
            check_name(task.name, f"NAME of {source}")
            for constant in ("DESCRIPTION", "NOTES", "SEEDS_NOTE"):
                check_text(str(task.constant(constant, "")), f"{constant} of {source}", lines=True)
            for name in task.constant("CLASSES", None) or ():
                check_name(str(name), f"a class in CLASSES of {source}")
        except ValueError as error:
            raise TaskError(str(error)) from None
        try:
            _ = task.budget
        except (TypeError, ValueError):
            raise TaskError(f"Expected BUDGET of {source} to be a number, got {task.constant('BUDGET')!r}.") from None
        return task

    def constant(self, name: str, default: Any = None) -> Any:
        """A constant of the task."""
        return getattr(self.definition, name, default)

    @property
    def name(self) -> str:
        """Short name."""
        return str(self.constant("NAME", Path(self.source).stem))

    @property
    def likelihood(self) -> str:
        """``"classification"``, ``"regression"`` or ``"bernoulli"``."""
        return str(self.constant("LIKELIHOOD", "classification"))

    @property
    def budget(self) -> int:
        """Training data that the mini-batch methods spend on curvature."""
        return int(self.constant("BUDGET", DEFAULT_BUDGET))

    @property
    def n_data(self) -> int | None:
        """Size of the training set, if the loader does not yield all of it."""
        n_data = self.constant("N_DATA")
        return None if n_data is None else int(n_data)

    def has(self, name: str) -> bool:
        """Whether the task defines a function."""
        return callable(getattr(self.definition, name, None))

    def call(self, name: str, context: Context) -> Any:
        """Call a function of the task with what it asks for.

        Raises:
            TaskError: If it fails; the cause is attached.
        """
        function: Callable[..., Any] = getattr(self.definition, name)
        try:
            wanted = inspect.signature(function).parameters
            with _importable(self.source):
                return function(**{key: value for key, value in vars(context).items() if key in wanted})
        except TaskError:
            raise
        except FAILURES as error:
            raise TaskError(f"{name}() of {self.source} failed: {type(error).__name__}: {error}") from error

    def loader(self, name: str, context: Context, read: Callable[[Any], Any] = lambda batch: batch) -> Iterable[Any]:
        """The batches of a function, made anew; whatever goes wrong with one, however late, names the function.

        Args:
            name: Of the function.
            context: What it may ask for.
            read: From a batch to what is wanted of it; it raises what is wrong.

        Raises:
            TaskError: If the function, a batch or reading it fails; the cause is attached.
        """
        return watched(self.call(name, context), f"{name}() of {self.source}", read)

    def loaders(self, name: str, context: Context, read: Callable[[Any], Any] = lambda batch: batch) -> dict[str, Any]:
        """The same for ``shifted_loaders`` and ``ood_loaders``: dictionaries, empty if there is no such function.

        Raises:
            TaskError: As :meth:`loader`.
        """
        if not self.has(name):
            return {}
        origin, loaders = f"{name}() of {self.source}", self.call(name, context)
        if not isinstance(loaders, Mapping):
            raise TaskError(f"Expected {origin} to return a dictionary of loaders, got {type(loaders).__name__}.")
        return {
            key: {level: watched(loader, f"{origin}, {key!r} {level}", read) for level, loader in value.items()}
            if isinstance(value, Mapping)
            else watched(value, f"{origin}, {key!r}", read)
            for key, value in loaders.items()
        }

    def model(self, context: Context) -> nn.Module:
        """The trained network, on the device and in evaluation mode."""
        model = self.call("model", context)
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"Expected model() of {self.source} to return a torch.nn.Module, got {type(model).__name__}. Return "
                "the trained network itself."
            )
        return model.to(context.device).eval()

    def description(self, context: Context) -> str:
        """What the data and the model are."""
        if not self.has("description"):
            return str(self.constant("DESCRIPTION", ""))
        try:
            return check_text(str(self.call("description", context)), f"description() of {self.source}", lines=True)
        except ValueError as error:
            raise TaskError(str(error)) from None


def watched(loader: Any, origin: str, read: Callable[[Any], Any] = lambda batch: batch) -> Any:
    """A loader whose errors say where it is from; what is no iterable stays as it is.

    Args:
        loader: Batches of any kind.
        origin: What it is called in errors.
        read: From a batch to what is wanted of it; it raises what is wrong.
    """
    if isinstance(loader, Iterator):  # to be read once, and known as such
        return _watch(loader, origin, read)
    if not isinstance(loader, Iterable):
        return loader
    return (_Sized if hasattr(loader, "__len__") else _Watched)(loader, origin, read)


class _Watched:
    """A loader to be read several times; everything but its batches is that of the loader."""

    def __init__(self, loader: Iterable[Any], origin: str, read: Callable[[Any], Any]) -> None:
        self._watched = loader, origin, read

    def __iter__(self) -> Iterator[Any]:
        return _watch(*self._watched)

    def __getattr__(self, name: str) -> Any:
        if name == "_watched":  # of an instance that is being copied
            raise AttributeError(name)
        return getattr(self._watched[0], name)


class _Sized(_Watched):
    """The same with a length."""

    def __len__(self) -> int:
        return len(self._watched[0])  # type: ignore[arg-type]


def _watch(loader: Iterable[Any], origin: str, read: Callable[[Any], Any]) -> Iterator[Any]:
    number, iterator = 0, None
    while True:
        try:
            iterator = iter(loader) if iterator is None else iterator
            batch = read(next(iterator))
        except StopIteration:
            return
        except TaskError:
            raise
        except FAILURES as error:
            raise TaskError(f"{origin}: batch {number + 1}: {type(error).__name__}: {error}") from error
        number += 1
        yield batch


def _module(path: Path) -> ModuleType:
    """Run a file as a module; its folder is importable while it runs."""
    name = f"debiased_laplace_task_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes of the file can be pickled, by workers of its loaders
    neighbours = {file.stem for file in path.resolve().parent.iterdir()}
    for old in [old for old in _NEIGHBOURS if old.partition(".")[0] in neighbours]:
        _NEIGHBOURS.discard(old)  # of an earlier version, or another task's neighbour of the same name
        sys.modules.pop(old, None)
    importlib.invalidate_caches()
    try:
        with _importable(path):
            spec.loader.exec_module(module)
    except FAILURES as error:
        raise TaskError(f"{path} does not run: {type(error).__name__}: {error}") from error
    return module


@contextmanager
def _importable(source: str | Path) -> Iterator[None]:
    """Let a task file import its neighbours, also from within its functions."""
    folder = Path(source).resolve().parent
    if Path(source).suffix != ".py":
        yield
        return
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if (file := getattr(sys.modules[name], "__file__", None)) and folder in Path(file).resolve().parents:
                _NEIGHBOURS.add(name)


def resolve_device(name: str | None) -> torch.device:
    """A device that works: the named one, or CUDA if there is one and the CPU otherwise.

    Raises:
        ValueError: If the device does not exist here; it says which do.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"Expected a device out of {', '.join(available)}, got {name!r}.") from None
    return device
