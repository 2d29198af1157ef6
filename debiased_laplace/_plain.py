"""Objects of this package as nestings of tensors, numbers, strings, lists, tuples and dictionaries, and back.

That is what ``torch.load(weights_only=True)`` knows, and what a file can hold without any code in it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

PREFIX = "debiased_laplace."  # of the modules whose dataclasses are stored and made again, and of no others
DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
}  # fmt: skip


def to_plain(value: Any, path: str = "") -> Any:
    """Replace everything that is no tensor, number, string, list, tuple or dictionary by one that is.

    Args:
        value: A nesting of tensors, dataclasses of this package (of which the fields that ``__init__`` takes are
            kept), containers, numbers, strings, shapes, dtypes and devices. Tensors stay, detached; NumPy's
            numbers become Python's, and other mappings dictionaries.
        path: Where the value is in a larger object, for errors.

    Raises:
        TypeError: If there is something else in it; the error says where.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return type(value)([to_plain(item, f"{path}[{index}]") for index, item in enumerate(value)])
    if isinstance(value, Sequence) and hasattr(value, "at_rest"):  # parts of a basis that come when they are asked for
        return [to_plain(item, f"{path}[{index}]") for index, item in enumerate(value.at_rest)]
    if isinstance(value, torch.Size):
        return {"__size__": list(value)}
    if isinstance(value, torch.dtype):
        return {"__dtype__": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"__device__": str(value)}
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        items = {key: to_plain(item, f"{path}[{key!r}]") for key, item in value.items()}
        simple = all(isinstance(key, str) and not key.startswith("__") for key in items)
        return items if simple else {"__dict__": [[key, item] for key, item in items.items()]}
    if isinstance(value, Tensor):
        tensor = value.detach().resolve_neg()
        if type(tensor) is Tensor and tensor.layout == torch.strided and tensor.dtype in DTYPES and not tensor.is_meta:
            return tensor
        raise TypeError(
            f"Expected a dense tensor of real numbers at {path or 'the top'}, got {type(tensor).__name__} of "
            f"{tensor.dtype} and {tensor.layout} on {tensor.device}. Store something dense and real instead."
        )
    name = f"{type(value).__module__}:{type(value).__qualname__}"
    if _class(name) is type(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return {"__class__": name, **{f: to_plain(getattr(value, f), f"{path}.{f}".lstrip(".")) for f in fields}}
    kind = f"{type(value).__name__} with the keys {list(value)}" if isinstance(value, Mapping) else name
    raise TypeError(
        f"Expected tensors, numbers, strings, dataclasses of this package, and lists, tuples and dictionaries (with "
        f"keys that are strings or integers) of them, got {kind} at {path or 'the top'}. Leave it out, or convert it."
    )


def from_plain(plain: Any) -> Any:
    """Inverse of :func:`to_plain`; makes dataclasses of this package and nothing else.

    Raises:
        ValueError: If a class is unknown, or its fields are not those of this version.
    """
    if type(plain) in (list, tuple):
        return type(plain)([from_plain(item) for item in plain])
    if not isinstance(plain, Mapping):
        return plain
    tags = [key for key in plain if isinstance(key, str) and key.startswith("__")]
    if not tags:
        return {key: from_plain(item) for key, item in plain.items()}
    if tags == ["__class__"]:
        return _construct(plain["__class__"], {key: item for key, item in plain.items() if key != "__class__"})
    if tags[0] not in _TAGS or len(plain) > 1:
        raise ValueError(f"Expected one of {['__class__', *_TAGS]}, got {tags}. {_OTHER_VERSION}")
    return _TAGS[tags[0]](plain[tags[0]])


#: Where modules went whose dataclasses are in files of earlier versions.
MOVED = {
    "basis": ("curvature.basis",),
    "curvature.basis": (
        "curvature.parts.kronecker",
        "curvature.parts.identity",
        "curvature.parts.dense",
        "curvature.parts.outputwise",
    ),
    "blocks": ("network.blocks",),
    "checkpoint": ("fitting.checkpoint",),
    "posterior": ("posterior.gaussian",),
    "probe": ("fitting.probe",),
    "reading": ("fitting.reading",),
    "sampling": ("sampling.sample", "sampling.reservoir"),
    "splits": ("sampling.splits",),
    "stream": ("fitting.stream",),
    "structures.diag": ("curvature.structures.diag",),
    "structures.full": ("curvature.structures.full",),
    "structures.isotropic": ("curvature.structures.isotropic",),
    "structures.kron": ("curvature.structures.kron",),
    "structures.lowrank": ("curvature.structures.lowrank",),
}

#: What classes are called now that had another name in files of earlier versions.
RENAMED = {
    "contractions:Gradients": "curvature.contractions:FactoredGradients",
    "curvature.contractions:Gradients": "curvature.contractions:FactoredGradients",
}

_OTHER_VERSION = "The file may be from another version of debiased-laplace: read it with that one, or make it again."
_TAGS: dict[str, Callable[[Any], Any]] = {
    "__size__": torch.Size,
    "__dtype__": lambda name: torch.empty(0, dtype=getattr(torch, name)).dtype,
    "__device__": torch.device,
    "__dict__": lambda items: {key: from_plain(item) for key, item in items},
}


def _class(name: str) -> Any:
    """The dataclass with the name ``module:Class``, or None if this package has none."""
    if (renamed := RENAMED.get(name.removeprefix("debiased_laplace."))) is not None:
        name = f"debiased_laplace.{renamed}"
    module, _, qualname = name.partition(":")
    if not module.startswith(PREFIX) or "__" in module:
        return None
    for home in MOVED.get(module.removeprefix("debiased_laplace."), ()):
        moved = _class(f"debiased_laplace.{home}:{qualname}")
        if moved is not None:
            return moved
    try:
        named: Any = importlib.import_module(module)
    except ImportError:
        return None
    for part in qualname.split("."):
        named = vars(named).get(part)
        if not isinstance(named, type) or named.__module__ != module:
            return None
    return named if dataclasses.is_dataclass(named) else None


def _construct(name: str, values: dict[str, Any]) -> Any:
    kind = _class(name)
    if kind is None:
        raise ValueError(f"Expected a dataclass of this package, got {name!r}, which is none. {_OTHER_VERSION}")
    if (upgraded := getattr(kind, "upgraded", None)) is not None:  # from the fields of an earlier version
        values = upgraded(values)
    fields = [field for field in dataclasses.fields(kind) if field.init]
    known = [field.name for field in fields]
    # A field that has a default may be younger than the file.
    missing = [
        field.name for field in fields
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    unknown = [name for name in values if name not in known]
    if missing or unknown:
        raise ValueError(
            f"Expected the fields {known} for {name!r}, got {list(values)}: missing {missing}, unknown {unknown}. "
            f"{_OTHER_VERSION}"
        )
    return kind(**{field: from_plain(value) for field, value in values.items()})
