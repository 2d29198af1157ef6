"""Objects of this package in one file, and back: safetensors for the tensors, one JSON document for the rest.

An object is made plain first (:mod:`debiased_laplace._plain`). In the file every tensor has its place
in the object as its key, and the document refers to it there. The SHA-256 of every tensor, and of the rest of the
document, is in the document, and they are checked when they are read: a file is what was written, or an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from debiased_laplace import __version__, _files
from debiased_laplace._files import StoredFileError as StoredFileError
from debiased_laplace._plain import from_plain as from_plain
from debiased_laplace._plain import to_plain as to_plain

FORMAT = 2  # the first, without digests, is read too
KEY = "debiased_laplace"  # of the document in the metadata of the safetensors file
MAX_LINES = 8
_DIGEST = re.compile("[0-9a-f]{16}")


def write(path: str | Path, value: Any, header: Mapping[str, Any]) -> None:
    """Write an object and a header, all or nothing: the file has the earlier content until the new is complete.

    Args:
        path: The file.
        value: What :func:`to_plain` takes. A tensor that occurs several times is stored once; views are stored in
            full, without the rest of their memory.
        header: The same without tensors, for :func:`read_header`.

    Raises:
        FileNotFoundError: If the directory does not exist.
        CannotWriteError: If the disk is full, or the place cannot be written to.
    """
    packing = _Packing()
    plain = to_plain(value)  # held until the end, since packing knows tensors by their memory
    document = {"format": FORMAT, "header": pack_header(header), "value": packing.pack(plain, "")}
    document["sha256"] = {name: digest(tensor) for name, tensor in packing.tensors.items()}
    text = json.dumps({**document, "digest": _files.sha256(json.dumps(document, allow_nan=False))})

    def fill(temporary: Path) -> None:
        try:
            save_file(packing.tensors, temporary, metadata={KEY: text})
        except safetensors.SafetensorError as error:  # as it tells of a full disk
            raise _files.cannot_write(path, OSError(str(error))) from error

    _files.write(path, fill)


def pack_header(header: Mapping[str, Any]) -> Any:
    """A header as JSON, or a ``TypeError`` that says where there is something else in it."""
    packing = _Packing()
    packed = packing.pack(to_plain(header), "")
    if packing.tensors:
        raise TypeError(f"Expected a header without tensors, got {list(packing.tensors)}. Give their fingerprints.")
    return packed


def read(path: str | Path, device: torch.device | str | None = None) -> tuple[Any, dict[str, Any]]:
    """The object and the header of a file.

    Args:
        path: The file.
        device: Where to put the tensors; by default each where it was.

    Raises:
        FileNotFoundError: If there is no such file.
        StoredFileError: If it is no file of this package, is damaged, or is from another version.
    """
    with _opened(path) as (handle, text), understood(path):
        digests = json.loads(text).get("sha256")
        tensors: dict[str, Tensor] = {}

        def load(reference: dict[str, Any]) -> Tensor:
            key = reference["__tensor__"]
            if key not in tensors:
                stored = handle.get_tensor(key)
                if digests is not None and digests[key] != digest(stored):
                    raise _damaged(path, f"the SHA-256 of {key!r} is another")
                tensors[key] = _place(stored, reference, device)
            return tensors[key]

        document = json.loads(text, object_hook=lambda packed: _unpack(packed, load))
        return from_plain(document["value"]), from_plain(document["header"])


def read_header(path: str | Path) -> dict[str, Any]:
    """The header of a file, without reading the tensors; raises as :func:`read` does."""
    with _opened(path) as (_, text), understood(path):
        return from_plain(json.loads(text, object_hook=_unpack)["header"])


@contextmanager
def understood(path: str | Path) -> Iterator[None]:
    """Say of whatever is wrong with the content of a file that it is the content of this file."""
    try:
        yield
    except (StoredFileError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except ValueError as error:
        raise StoredFileError(f"{error} (in {path})") from error
    except Exception as error:
        raise StoredFileError(
            f"Expected a file of debiased-laplace, got {path}, whose content is not understood "
            f"({type(error).__name__}: {error}). It was written by something else, or changed by hand: make it again."
        ) from error


def _damaged(path: str | Path, how: str) -> StoredFileError:
    return StoredFileError(
        f"Expected a file of debiased-laplace, got {path}, which is damaged ({how}). Copy it again, or delete it and "
        "start over."
    )


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, str]]:
    """The open file and its document, of a format that is known."""
    expected = f"Expected a file of debiased-laplace, got {path},"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{expected} where there is no file. Check the path.")
    try:
        handle = safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        with Path(path).open("rb") as file:
            if file.read(9)[8:] != b"{":  # where a safetensors file has its header
                raise StoredFileError(f"{expected} which is no safetensors file ({error}). Check the path.") from error
        raise _damaged(path, f"perhaps cut short: {error}") from error
    with handle:
        text = (handle.metadata() or {}).get(KEY)
        if text is None:
            raise StoredFileError(f"{expected} a safetensors file that something else wrote. Check the path.")
        with understood(path):
            document = json.loads(text)
            form, expected_digest = document["format"], document.pop("digest", None)
            actual_digest = _files.sha256(json.dumps(document))
        if type(form) is not int or not 1 <= form <= FORMAT:
            newer = type(form) is int and form > FORMAT
            raise StoredFileError(
                f"{expected} of format {form!r}, and this version knows 1 to {FORMAT}: the file was "
                + ("written by a newer version; upgrade debiased-laplace." if newer else "changed. Make it again.")
            )
        if (form > 1 or expected_digest is not None) and expected_digest != actual_digest:
            raise _damaged(path, "the SHA-256 of its header is another")
        yield handle, text


def digest(tensor: Tensor) -> str:
    """SHA-256 of the dtype, the shape and the bytes of a tensor, as 64 hexadecimal digits."""
    hashed = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    values = tensor.detach().cpu().resolve_neg().contiguous()
    hashed.update(values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


class _Packing:
    """Plain values as JSON, with the tensors put aside under the names of their places."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._keys: dict[Any, str] = {}
        self._memory: set[int] = set()

    def pack(self, plain: Any, path: str) -> Any:
        if isinstance(plain, Tensor):
            return self._refer(plain, path or "value")
        if isinstance(plain, float) and not math.isfinite(plain):
            return {"__float__": repr(plain)}
        if isinstance(plain, tuple):
            return {"__tuple__": self.pack(list(plain), path)}
        if isinstance(plain, list):
            return [self.pack(item, f"{path}.{index}".lstrip(".")) for index, item in enumerate(plain)]
        if isinstance(plain, dict):
            return {key: self.pack(item, f"{path}.{key}".lstrip(".")) for key, item in plain.items()}
        return plain

    def _refer(self, tensor: Tensor, key: str) -> dict[str, Any]:
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if identity not in self._keys:
            while key in self.tensors:  # names with dots in them
                key += "_"
            stored = tensor.cpu().contiguous()
            memory = stored.untyped_storage().data_ptr()
            self.tensors[key] = stored.clone() if memory in self._memory else stored
            self._memory.add(memory)
            self._keys[identity] = key
        # The layout is kept too: products of matrices depend on it in their last digits.
        strides = torch.empty_like(tensor, device="meta").stride()
        return {"__tensor__": self._keys[identity], "device": str(tensor.device), "strides": list(strides)}


def _unpack(packed: dict[str, Any], load: Callable[[dict[str, Any]], Tensor] | None = None) -> Any:
    """Inverse of packing one dictionary, for :func:`json.loads`."""
    if "__tensor__" in packed:
        return load(packed) if load else packed
    if "__tuple__" in packed:
        return tuple(packed["__tuple__"])
    return float(packed["__float__"]) if "__float__" in packed else packed


def _place(tensor: Tensor, reference: dict[str, Any], device: torch.device | str | None) -> Tensor:
    """A copy that shares no memory with the file, so that the file can be replaced on any system."""
    device = reference["device"] if device is None else device
    try:
        empty = torch.empty_strided(tensor.shape, reference["strides"], dtype=tensor.dtype, device=device)
        return empty.copy_(tensor)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"Expected to put {reference['__tensor__']!r} on the device {device}, got: {error}. "
            "Give another, such as device='cpu'."
        ) from error


def tensors_of(value: Any) -> dict[str, Tensor]:
    """All tensors of an object under the names of their places, those of numbers alone."""
    packing = _Packing()
    packing.pack(to_plain(value), "")
    return {name: tensor for name, tensor in packing.tensors.items() if tensor.is_floating_point()}


def fingerprint(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Sixteen hexadecimal digits for every tensor: SHA-256 of its dtype, its shape and its bytes."""
    return {name: digest(tensor)[:16] for name, tensor in parameters.items()}


def differences(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """What differs between two nested mappings, a line for each difference, eight at most.

    Values are compared as numbers are (1 equals 1.0, and NaN equals NaN). Fingerprints are only said to differ.
    """
    lines = list(dict.fromkeys(_differences(expected, actual, "")))
    rest = len(lines) - MAX_LINES
    return lines if rest <= 0 else [*lines[:MAX_LINES], f"and {rest} more"]


def _differences(expected: Mapping[str, Any], actual: Mapping[str, Any], group: str) -> Iterator[str]:
    for name in {**expected, **actual}:
        if name not in actual or name not in expected:
            yield f"{name!r} is {'missing' if name in expected else 'not expected'}"
            continue
        one, other = expected[name], actual[name]
        where = f"{group} of {name!r}" if group in ("shape", "dtype") else f"{group}.{name}".lstrip(".")
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, where)
        elif one != other and repr(one) != repr(other):
            digests = _DIGEST.fullmatch(str(one)) and _DIGEST.fullmatch(str(other))
            yield f"{group or 'weights'} of {name!r} differ" if digests else f"{where}: {one!r} expected, got {other!r}"


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    return {
        "debiased_laplace": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }


def check_model(path: str | Path, header: dict[str, Any], model: torch.nn.Module) -> None:
    """Raise a ``ValueError`` that says what differs, unless a file's header has the shapes and weights of the model."""
    with understood(path):
        shapes = {name: list(p.shape) for name, p in model.named_parameters() if name in header["shapes"]}
        lines = differences({"shape": header["shapes"]}, {"shape": shapes})
        lines = lines or differences(header["weights"], fingerprint(model.state_dict()))
    if lines:
        raise ValueError(
            f"Expected the model that {path} was fitted to, got another: {'; '.join(lines)}. Load that model's weights."
        )
