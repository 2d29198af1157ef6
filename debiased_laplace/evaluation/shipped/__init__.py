"""Tasks that come with the package: data, a network, its training and the shifts, one file each.

A task is a module, or a namespace, with functions ``model``, ``train_loader``, ``val_loader``, ``test_loader`` and
optional others; each names in its signature those of ``seed``, ``data_dir``, ``cache``, ``quick`` and ``device`` that
it wants. Tasks are imported when they are loaded.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "digits": "digits",
    "fashion-mnist": "fashion_mnist",
    "cifar10": "cifar10",
    "trec": "trec",
    "scenes": "scenes",
}
#: Depth of another network on CIFAR-10; the task is called ``cifar10-resnet`` and it.
_DEPTHS = (56,)
#: File names of the regression sets; a task is called ``uci-`` and one of them.
_UCI = ("concrete", "energy", "power-plant", "wine-quality-red")


def names() -> list[str]:
    """Names of the shipped tasks."""
    return [*_MODULES, *(f"cifar10-resnet{depth}" for depth in _DEPTHS), *(f"uci-{dataset}" for dataset in _UCI)]


def load(name: str) -> Any:
    """The task of a name: a module, or a namespace with the same contents.

    Args:
        name: One of :func:`names`.

    Raises:
        ValueError: If there is no such task.

    Example:
        >>> load("digits").NAME
        'digits'
    """
    if name not in names():
        raise ValueError(f"Expected the name of a shipped task out of {', '.join(names())}, got {name!r}.")
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    if name.startswith("cifar10-resnet"):
        return importlib.import_module(f"{__name__}.cifar10").of_depth(int(name.removeprefix("cifar10-resnet")))
    return importlib.import_module(f"{__name__}.uci").task(name.removeprefix("uci-"))
