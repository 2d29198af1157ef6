"""Files of nested objects: what survives, what is refused, and what a failed write leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from debiased_laplace import _plain, _store
from debiased_laplace._files import CannotWriteError
from debiased_laplace.fitting.fit import fit
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.sampling.samplers import UniformSampler


@dataclass(frozen=True)
class Pair:
    first: Any
    second: Any = None
    derived: int = field(default=7, init=False)


@dataclass(frozen=True)
class Outer:
    parts: list[Pair]

    @dataclass(frozen=True)
    class Inner:
        """A class within a class."""

        value: float


Point = namedtuple("Point", "x y")


@pytest.fixture(autouse=True)
def own_classes(monkeypatch):
    """Dataclasses of this file count as the package's."""
    monkeypatch.setattr(_plain, "PREFIX", ("debiased_laplace.", "tests."))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "object.safetensors"


def assert_same(actual, expected, strides=True):
    """The same types, and the same bits in every tensor, on the same device and in the same layout."""
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.shape, actual.device) == (expected.dtype, expected.shape, expected.device)
        assert not strides or actual.stride() == torch.empty_like(expected).stride()
        assert _store.fingerprint({"": actual}) == _store.fingerprint({"": expected})
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, strides)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key], strides)
    elif hasattr(expected, "__dataclass_fields__"):
        for name in expected.__dataclass_fields__:
            assert_same(getattr(actual, name), getattr(expected, name), strides)
    else:
        assert repr(actual) == repr(expected)


def round_trip(path, value):
    _store.write(path, value, {})
    return _store.read(path)[0]


def everything(device="cpu"):
    long = torch.arange(12, dtype=torch.float64, device=device)
    return {
        "numbers": [None, True, False, 0, -(2**70), 0.1, -0.0, 1e-320, 'ä\ud800 "\n', ""],
        "floats": (float("inf"), -float("inf"), float("nan"), [float("nan")]),
        "empty": [(), [], {}],
        "tuples": ((1, (2.0,)), [(torch.ones(2, device=device),)]),
        "torch": [torch.Size([2, 3]), torch.Size([]), torch.bfloat16, torch.device("cuda", 1), torch.device("cpu")],
        "objects": Outer([Pair(long, {"deep": Pair(1)}), Pair(Outer.Inner(2.5))]),
        "keys": {3: "three", "3": 3, "": {"": long}, "ö": long[:2]},
        "dots": {"a.b": {"c": long + 1}, "a": {"b.c": long + 2, "b": {"c": long + 3}}, "a.b.c": long + 4},
        "like tags": {"__class__": "os:system", "__tuple__": [1], "__tensor__": long, "__metadata__": {"__dict__": 1}},
        "memory": [long, long, long[2:5], long[3:9], long[1:2], long[::3]],
        "layouts": [long.view(3, 4).mT, long.view(3, 2, 2).permute(2, 0, 1), long[:3].expand(2, 3), long[0].expand(4)],
        "sizes": [long[0], long[:0], torch.zeros(0, 3, device=device), torch.zeros((), dtype=torch.bool)],
        "dtypes": [torch.tensor([0, 1, 1], device=device).to(dtype) for dtype in sorted(_plain.DTYPES, key=str)],
        "special": [torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.bfloat16, device=device)],
    }


def test_everything_survives(path, device):
    value = everything(device)
    assert_same(round_trip(path, value), value)


def test_the_plain_form_survives_without_a_file_and_loads_safely(tmp_path, device):
    value = everything(device)
    torch.save(_store.to_plain(value), tmp_path / "plain.pt")
    loaded = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert_same(_store.from_plain(loaded), value, strides=False)
    assert_same(_store.from_plain(_store.to_plain(value)), value, strides=False)


def test_the_plain_form_is_what_it_is_said_to_be():
    tensor = torch.tensor(1.0)
    plain = _store.to_plain(Pair((tensor, torch.Size([2])), torch.float32))
    assert plain == {
        "__class__": "tests.test_store:Pair",
        "first": (tensor, {"__size__": [2]}),
        "second": {"__dtype__": "float32"},
    }
    assert plain["first"][0].data_ptr() == tensor.data_ptr()


def test_what_is_close_to_plain_is_converted(path):
    parameter = nn.Parameter(torch.ones(2))
    conjugated = torch.tensor([1 + 2j]).conj().imag
    assert conjugated.is_neg()
    value = [np.float64(0.1), np.int64(3), OrderedDict(a=1), parameter, parameter * 2, conjugated]
    expected = [0.1, 3, {"a": 1}, torch.ones(2), 2 * torch.ones(2), torch.tensor([-2.0])]
    assert_same(round_trip(path, value), expected, strides=False)
    assert not any(part.requires_grad for part in _store.to_plain(value)[3:])


def local_class():
    @dataclass
    class Local:
        value: int = 0

    return Local()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "got builtins:object at the top"),
        (Outer([Pair(1), Pair({"a": [0, {1}]})]), r"got builtins:set at parts\[1\].first\['a'\]\[1\]"),
        ({3: lambda: 0}, r"got builtins:function at \[3\]"),
        (Point(1, 2), "got tests.test_store:Point"),
        (slice(3), "got builtins:slice"),
        ([Pair], r"got builtins:type at \[0\]"),
        ([local_class()], r"got tests.test_store:local_class.<locals>.Local at \[0\]"),
        ({"a": {(1, 2): 3}}, r"got dict with the keys \[\(1, 2\)\] at \['a'\]"),
        ({True: 3}, r"got dict with the keys \[True\]"),
        (np.zeros(2), "got numpy:ndarray"),
        ([torch.zeros(2, dtype=torch.complex64)], r"real numbers at \[0\], got Tensor of torch.complex64"),
        (torch.eye(2).to_sparse(), "dense tensor of real numbers at the top, got .* torch.sparse_coo"),
        (torch.empty(2, device="meta"), "got .* on meta"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_its_place(value, message, path):
    with pytest.raises(TypeError, match=message):
        _store.to_plain(value)
    with pytest.raises(TypeError, match=message):
        _store.write(path, value, {})
    assert not path.exists()


def test_dataclasses_of_others_are_refused_both_ways(monkeypatch):
    plain = _store.to_plain(Pair(1))
    monkeypatch.setattr(_plain, "PREFIX", "debiased_laplace.")
    with pytest.raises(TypeError, match=r"got tests.test_store:Pair at the top"):
        _store.to_plain(Pair(1))
    with pytest.raises(ValueError, match=r"got 'tests.test_store:Pair', which is none.*another version"):
        _store.from_plain(plain)


@pytest.mark.parametrize(
    "name",
    [
        "debiased_laplace.posterior:Nothing", "debiased_laplace.nothing:Posterior", "debiased_laplace:Posterior",
        "debiased_laplace.fit:Posterior", "debiased_laplace.fit:torch.Size", "debiased_laplace.fit:fit", "os:system",
        "debiased_laplace.__main__:app", "debiased_laplace.posterior:Posterior.__init__", "debiased_laplace.fit", "",
        "turtle:Vec2D", "debiased_laplace_else:Posterior",
    ],
)  # fmt: skip
def test_only_dataclasses_of_the_package_are_made(name, monkeypatch):
    monkeypatch.setattr(_plain, "PREFIX", "debiased_laplace.")
    with pytest.raises(ValueError, match=f"Expected a dataclass of this package, got {name!r}"):
        _store.from_plain([{"__class__": name}])
    assert not {"turtle", "debiased_laplace.__main__"} & set(sys.modules)


def test_a_field_that_has_a_default_may_be_younger_than_the_file():
    assert _store.from_plain({"__class__": "tests.test_store:Pair", "first": 1}) == Pair(1)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"__class__": "tests.test_store:Pair", "second": 1}, r"missing \['first'\], unknown \[\]"),
        (
            {"__class__": "tests.test_store:Pair", "first": 1, "second": 2, "derived": 3},
            r"fields \['first', 'second'\] for 'tests.test_store:Pair', got .*unknown \['derived'\]. The file may be",
        ),
        ({"__new__": 1}, r"got \['__new__'\]. The file may be from another version"),
        ({"__size__": [1], "other": 2}, r"Expected one of .*, got \['__size__'\]"),
    ],
)
def test_other_versions_are_recognised(plain, message):
    with pytest.raises(ValueError, match=message):
        _store.from_plain(plain)


def test_the_file_is_readable_by_others(path):
    _store.write(path, Outer([Pair(torch.ones(2)), Pair((torch.zeros(3, dtype=torch.bfloat16),))]), {"kind": "test"})
    with safe_open(path, framework="pt") as handle:
        assert set(handle.keys()) == {"parts.0.first", "parts.1.first.0"}
        document = json.loads(handle.metadata()["debiased_laplace"])
    assert document["format"] == _store.FORMAT
    assert document["header"] == {"kind": "test"}
    assert document["value"]["parts"][0] == {
        "__class__": "tests.test_store:Pair",
        "first": {"__tensor__": "parts.0.first", "device": "cpu", "strides": [1]},
        "second": None,
    }


def test_the_document_is_strict_json(path):
    def refuse(constant):
        raise AssertionError(constant)

    _store.write(path, everything(), {"nan": float("nan")})
    with safe_open(path, framework="pt") as handle:
        json.loads(handle.metadata()["debiased_laplace"], parse_constant=refuse)


def test_shared_tensors_are_stored_once_and_views_without_the_rest_of_their_memory(path):
    big = torch.randn(10_000)
    shared = round_trip(path, [big, Pair(big), big[:]])
    assert shared[0] is shared[1].first
    assert path.stat().st_size < 45_000
    assert_same(round_trip(path, [big[5:6], big[:2], big[0].expand(100)]), [big[5:6], big[:2], big[0].expand(100)])
    assert path.stat().st_size < 2_000


def test_one_memory_under_several_shapes_and_types(path):
    memory = torch.arange(6, dtype=torch.float32)
    value = [memory, memory.view(2, 3), memory.view(torch.int32), memory.view(3, 2).mT, memory[:3]]
    assert_same(round_trip(path, value), value)


def test_products_of_matrices_give_the_same_bits_after_a_round_trip(path):
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(n, n + 3, generator=generator) for n in (5, 37, 130)]
    for matrix, read in zip(matrices, round_trip(path, [m.mT for m in matrices]), strict=True):
        assert torch.equal(matrix.mT @ matrix, read @ matrix)
        assert read.is_contiguous() is False


def test_tensors_go_where_they_were_or_where_they_are_wanted(path, device):
    _store.write(path, [torch.ones(2, device=device), torch.ones(2)], {})
    assert [tensor.device.type for tensor in _store.read(path)[0]] == [device.type, "cpu"]
    assert [tensor.device.type for tensor in _store.read(path, "cpu")[0]] == ["cpu", "cpu"]
    with pytest.raises(ValueError, match=r"put '0' on the device xpu:99, got: .*Give another, such as device='cpu'"):
        _store.read(path, device="xpu:99")


def test_what_was_read_does_not_change_with_the_file(path):
    first = round_trip(path, torch.zeros(1000))
    with path.open("rb+") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(b"\x01" * 4000)
    assert not first.any()


def test_header(path):
    header = {"seed": 0, "nan": float("nan"), "shape": (2, 3), "nested": {"__class__": "x", 1: [None]}}
    _store.write(path, torch.ones(2), header)
    assert_same(_store.read_header(path), header)
    assert_same(_store.read(path)[1], header)
    with pytest.raises(TypeError, match=r"a header without tensors, got \['a.b'\]"):
        _store.write(path, None, {"a": {"b": torch.ones(1)}})


def test_the_header_can_be_read_where_the_value_cannot(path, monkeypatch):
    _store.write(path, Pair(torch.ones(2)), {"seed": 0})
    monkeypatch.setattr(_plain, "PREFIX", "debiased_laplace.")
    assert _store.read_header(path) == {"seed": 0}
    with pytest.raises(ValueError, match="which is none"):
        _store.read(path)


def damage(path, kind):
    _store.write(path, [torch.ones(100)], {})
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "directory":
        path.unlink()
        path.mkdir()
    elif kind == "other":
        save_file({"a": torch.ones(2)}, path, metadata={"format": "pt"})
    elif kind == "newer":
        text = json.dumps({"format": _store.FORMAT + 1, "unheard-of": {"__tensor__": 3}})
        save_file({"a": torch.ones(2)}, path, metadata={_store.KEY: text})
    else:
        changed = {"text": b"Some text, not short.", "empty": b"", "cut": content[:-1], "head": content[:50]}
        path.write_bytes(changed[kind])


@pytest.mark.parametrize("read", [_store.read, _store.read_header])
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", FileNotFoundError, "got .*object.safetensors, where there is no file. Check the path"),
        ("directory", FileNotFoundError, "where there is no file"),
        ("text", ValueError, "got .*object.safetensors, which is no safetensors file .*Check the path"),
        ("empty", ValueError, "which is no safetensors file"),
        ("cut", ValueError, "which is damaged \\(perhaps cut short: .*Copy it again, or delete it"),
        ("head", ValueError, "which is damaged \\(perhaps cut short: "),
        ("other", ValueError, "a safetensors file that something else wrote"),
        (
            "newer",
            ValueError,
            "format 3, and this version knows 1 to 2: .*written by a newer version; upgrade",
        ),
    ],
)
def test_what_is_no_file_of_the_package_is_refused(path, read, kind, error, message):
    damage(path, kind)
    with pytest.raises(error, match=message):
        read(path)


def half_a_file(error):
    def writer(tensors, filename, metadata=None):
        filename.write_bytes(b"half a file")
        raise error

    return writer


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("stage", ["save_file", "os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_earlier_file(path, monkeypatch, stage, error):
    def fail(*_):
        raise error

    _store.write(path, torch.ones(3), {"number": 1})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        where = "_store" if stage == "save_file" else "_files"
        patch.setattr(f"debiased_laplace.{where}.{stage}", half_a_file(error) if stage == "save_file" else fail)
        kind = CannotWriteError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(kind, match="disk full. What was there before" if kind is CannotWriteError else None):
            _store.write(path, torch.zeros(3), {"number": 2})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    _store.write(path, torch.zeros(3), {"number": 2})
    assert _store.read_header(path) == {"number": 2}
    assert list(path.parent.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_the_name_is(path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(("fsync", os.fstat(file).st_size)), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append(("replace", names[1])), replace(*names)))
    _store.write(path, torch.ones(1000), {})
    directory = ("fsync", path.parent.stat().st_size)
    assert done == [("fsync", path.stat().st_size), ("replace", path), directory]


def test_the_file_has_the_permissions_that_new_files_have(path):
    umask = os.umask(0o027)
    try:
        _store.write(path, torch.ones(2), {})
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_links_and_directories(path, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path.symlink_to(tmp_path / "elsewhere" / "real")
    assert round_trip(str(path), 3) == 3
    assert path.is_symlink()
    with pytest.raises(
        FileNotFoundError, match=r"Expected a directory for .*nowhere/file, got none at .*Make it first"
    ):
        _store.write(tmp_path / "nowhere" / "file", 3, {})


def test_fingerprints():
    ones = torch.ones(2, 3)
    same = {"a": ones, "b": torch.ones(3, 2).mT, "c": nn.Parameter(ones), "d": ones[:1].expand(2, 3)}
    assert len(set(_store.fingerprint(same).values())) == 1
    expected = hashlib.sha256(b"torch.float32 (1,) " + struct.pack("<f", 0.5)).hexdigest()[:16]
    assert _store.fingerprint({"half": torch.tensor([0.5])}) == {"half": expected}
    changed = torch.ones(2, 3)
    changed[1, 2] += 2**-23
    others = [
        ones, changed, ones.double(), ones.view(torch.int32), ones.view(3, 2), ones.flatten(), ones.bfloat16(),
        ones[:0], ones[0, 0], ones[:1, 0], -torch.zeros(2), torch.zeros(2), torch.zeros(0), torch.zeros(2).bool(),
    ]  # fmt: skip
    digests = set(_store.fingerprint({str(i): tensor for i, tensor in enumerate(others)}).values())
    assert len(digests) == len(others)
    assert all(len(digest) == 16 for digest in digests)


def test_differences_are_named():
    weights = {"fc.weight": torch.ones(3, 4), "fc.bias": torch.ones(3)}
    changed = {"fc.weight": torch.zeros(3, 4), "head.bias": torch.ones(3)}
    one, other = _store.fingerprint(weights), _store.fingerprint(changed)
    lines = ["weights of 'fc.weight' differ", "'fc.bias' is missing", "'head.bias' is not expected"]
    assert _store.differences(one, other) == lines
    assert _store.differences({"weights": one}, {"weights": other}) == lines
    assert _store.differences(
        {"seed": 0, "shape": {"fc.weight": (3, 4)}, "sampler": {"budget": 3, "kind": {"name": "a"}}, "same": 1},
        {"seed": 1, "shape": {"fc.weight": (3, 5)}, "sampler": {"budget": None, "kind": {"name": "b"}}, "same": 1},
    ) == [
        "seed: 0 expected, got 1",
        "shape of 'fc.weight': (3, 4) expected, got (3, 5)",
        "sampler.budget: 3 expected, got None",
        "sampler.kind.name: 'a' expected, got 'b'",
    ]
    assert _store.differences({"a": {"b": 1}}, {"a": 1}) == ["a: {'b': 1} expected, got 1"]


def test_no_differences():
    nested = {"a": float("nan"), "b": (float("nan"), [1]), "c": {"d": None}}
    assert _store.differences(nested, nested) == []
    assert _store.differences(nested, {"c": {"d": None}, "b": (float("nan"), [1]), "a": float("nan")}) == []
    assert _store.differences({"a": 1}, {"a": 1.0}) == []


def test_many_differences_are_counted():
    lines = _store.differences({str(i): 0 for i in range(11)}, {str(i): 1 for i in range(11)})
    assert lines[0] == "0: 0 expected, got 1"
    assert lines[8:] == ["and 3 more"]
    assert len(_store.differences({str(i): 0 for i in range(8)}, {})) == 8


def test_versions():
    versions = _store.versions()
    assert set(versions) == {"debiased_laplace", "torch", "python", "numpy", "safetensors"}
    assert all(type(version) is str and version[0].isdigit() for version in versions.values())


@pytest.fixture(scope="module")
def fitted():
    """A fit of a tiny network, on inputs that are nested dictionaries."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Linear(3, 2)

        def forward(self, x):
            hidden = self.norm(self.conv(x["image"]["pixels"])).mean((2, 3))
            return self.head(torch.tanh(torch.cat([hidden, x["other"][0]], 1)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model().eval()
        inputs = {"image": {"pixels": torch.randn(12, 1, 4, 4)}, "other": [torch.randn(12, 1)], "labels": None}
    inputs["labels"] = torch.arange(12) % 2
    data = UniformSampler(8).draw([inputs], 1, torch.Generator().manual_seed(0)).data
    return fit(model, [inputs], Categorical()), data


def test_a_posterior_survives(fitted, path, monkeypatch):
    monkeypatch.undo()
    posterior = fitted[0].posterior
    read = round_trip(path, posterior)
    assert_same(read, posterior)
    vector = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read.covariance_matvec(vector), posterior.covariance_matvec(vector))


def test_weighted_data_survive(fitted, path, monkeypatch):
    monkeypatch.undo()
    assert_same(round_trip(path, fitted[1]), fitted[1])


def test_statistics_survive(path, monkeypatch):
    monkeypatch.undo()
    from debiased_laplace.curvature.structures import KroneckerStatistics

    generator = torch.Generator().manual_seed(0)
    statistics = KroneckerStatistics.of(
        *([torch.randn(1, n, n, generator=generator) for n in (2, 3)] for _ in range(2))
    )
    assert_same(round_trip(path, statistics), statistics)
    assert_same(round_trip(path, statistics + statistics), statistics + statistics)


@pytest.mark.parametrize(
    "name",
    [
        "basis:Basis", "basis:DenseBasis", "basis:IdentityBasis", "basis:KroneckerBasis", "basis:OutputwiseBasis",
        "blocks:Block", "checkpoint:Sum", "posterior:Posterior", "probe:Probe", "reading:Seen", "sampling:Sample",
        "sampling:WeightedData", "splits:CrossFit", "stream:Observed", "structures.diag:DiagonalStatistics",
        "structures.full:FullStatistics", "structures.isotropic:IsotropicStatistics",
        "structures.kron:InputStatistics", "structures.kron:KroneckerStatistics",
        "structures.lowrank:LowRankStatistics",
    ],
)  # fmt: skip
def test_classes_that_have_moved_are_known_by_their_earlier_names(name, monkeypatch):
    """What files of fits, and checkpoints of runs that were interrupted, call them."""
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"Expected the fields .* unknown \['no field'\]"):
        _plain.from_plain({"__class__": f"debiased_laplace.{name}", "no field": 1})


def test_a_sum_of_an_earlier_checkpoint(monkeypatch):
    from debiased_laplace.fitting.checkpoint import Sum

    monkeypatch.undo()
    plain = {"__class__": "debiased_laplace.checkpoint:Sum", "n_done": 1, "n_steps": 3, "total": 0.5}
    assert _plain.from_plain(plain) == Sum(1, 3, 0.5)
