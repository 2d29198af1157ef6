"""What results were made from, as digests: a record is used again if all of it is as it was, and only then.

=========== ==========================================================================================================
seen        the network (its description, every parameter and buffer, which of them are trained); the text of the task
            file and of the modules in its folder that it imports, at any place in it; the first :data:`SEEN` data of
            the training, validation and test loaders; the first batch of all others; lengths of loaders and datasets
not seen    data beyond these; modules imported under a computed name, or from other places (but for the versions of
            the packages that the numbers depend on); files that a task reads, unless they end up in what is seen
=========== ==========================================================================================================

Data are read with seeded global generators, so that a loader that shuffles or augments by these is the same again.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from debiased_laplace import _store
from debiased_laplace._guards import global_random_state

#: Data of a loader that its digest covers.
SEEN = 10_000
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python, and give them their states back."""
    with global_random_state():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


# -- networks --------------------------------------------------------------------------------------


def network_digest(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that tell networks apart, by their description and all their tensors."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = _store.fingerprint(parameters | dict(model.named_buffers(remove_duplicate=False)))
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    return _digest(repr((_plain(model), sorted(tensors.items()), sorted(trained))))


# -- data ------------------------------------------------------------------------------------------


def data_digest(loader: Any, seen: int | None = SEEN) -> str:
    """Sixteen hexadecimal digits that tell the data of loaders apart.

    Args:
        loader: Batches of any kind.
        seen: How many data to look at, whole batches; ``None`` for the first batch.
    """
    state = hashlib.sha256()
    for owner in (loader, getattr(loader, "dataset", None)):
        with suppress(TypeError, NotImplementedError):  # of a stream
            state.update(f"{len(owner)} ".encode())  # type: ignore[arg-type]
    n = 0
    for batch in islice(loader, 1 if seen is None else None) if isinstance(loader, Iterable) else ():
        n += _update(state, batch)
        if seen is not None and n >= seen:
            break
    return state.hexdigest()[:16]


def _update(state: Any, value: Any) -> int:
    """Add a batch of any nesting; the length of its first tensor."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.ascontiguousarray(value).copy())
    if isinstance(value, Tensor):
        state.update(_store.fingerprint({"": value})[""].encode())
        return len(value) if value.ndim else 0
    if isinstance(value, Mapping):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, (list, tuple)):
        state.update(f"[{len(value)} ".encode())
        lengths = [_update(state, item) for item in value]
        return next((length for length in lengths if length), 0)
    state.update(f"{type(value).__name__} {_plain(value)} ".encode())
    return 0


# -- sources ---------------------------------------------------------------------------------------


def source_digest(path: Path, folder: Path | None = None, root: Path | None = None) -> str:
    """Sixteen hexadecimal digits for the text of a Python file and of what it imports from a folder, at any depth.

    The name of the file and the place of the folder have no part in it.

    Args:
        path: The file.
        folder: Modules in it count; that of the file by default.
        root: The folder that absolute imports start from; ``folder`` by default.
    """
    path = path.resolve()
    folder = path.parent if folder is None else folder.resolve()
    root = folder if root is None else root.resolve()
    texts: dict[str, bytes] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop()
        name = "" if file == path else str(file.relative_to(folder).as_posix())
        if name not in texts:
            texts[name] = file.read_bytes()
            imported = [other for other in _imported(file, texts[name], root) if folder in other.parents]
            waiting += [other for other in imported if other != path]
    return _digest(repr([(name, hashlib.sha256(text).hexdigest()) for name, text in sorted(texts.items())]))


def _imported(file: Path, text: bytes, root: Path) -> Iterator[Path]:
    """Files below a folder that a Python file may import, wherever in it the statement is."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        start, names = root, []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            start = file.parents[node.level - 1] if 0 < node.level <= len(file.parents) else root
            names = [module, *([*module, alias.name] for alias in node.names)]
        for parts in names:
            for depth in range(1, len(parts) + 1):
                place = start.joinpath(*parts[:depth])
                candidates = place.with_suffix(".py"), place / "__init__.py"
                yield from (candidate for candidate in candidates if candidate.is_file())


def _plain(value: Any) -> str:
    """A description without addresses in memory."""
    return _ADDRESS.sub("", repr(value))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
