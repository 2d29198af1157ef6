"""Shapes of batches, for every structure: the rows of the table in docs/batches.md, by their names there.

Every case is the same small network on the same data, given and returned in another way. What is right is computed from
the plain network by dense automatic differentiation.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import logging
import re
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, SubsetRandomSampler, TensorDataset

from debiased_laplace import Bernoulli, Categorical, DebiasedLaplace, Gaussian, Single, _data
from debiased_laplace.curvature.hesscale import hessian_diagonal
from debiased_laplace.evaluation import evaluate
from debiased_laplace.evaluation.predictors.baselines import gaussian_predictor, point_predictor
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.network import Network
from debiased_laplace.quadratic.optim import newton_step
from debiased_laplace.quadratic.quadratic import Quadratic
from debiased_laplace.quadratic.spectrum import GGN
from debiased_laplace.testing import dense_basis, dense_jacobian, dense_loss_hessian, dense_posterior_precision
from tests.tolerances import assert_equal

STRUCTURES = ("kron", "lowrank", "diag", "full")
SIZES = (3, 3, 1)
X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 0, 1, 0, 1])
WHOLE = (4 * X).round()  # for inputs of few bits


def core(c: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, c)).double()


class Odd(nn.Module):
    """The plain network with another way in, through and out."""

    def __init__(self, c: int, read: Callable, middle: Callable, write: Callable) -> None:
        super().__init__()
        self.core = core(c)
        self.read, self.middle, self.write = read, middle, write

    def forward(self, batch: Any) -> Any:
        return self.write(self.core[2](self.middle(self.core[:2](self.read(batch)))))


class OfTwo(Odd):
    """Takes two inputs, as most people write it."""

    def forward(self, a: Any, b: Any, *, factor: float = 1.0) -> Any:
        return super().forward((a, b * factor))


class Optional(Odd):
    """Everything has a default, as in Transformers; targets would make another model of it."""

    def forward(self, a: Any = None, b: Any = None, inputs_embeds: Any = None, labels: Any = None) -> Any:
        assert labels is inputs_embeds is None
        return super().forward((a, b))


class OfAny(Odd):
    def forward(self, *several: Any) -> Any:
        return super().forward(several)


class OfNames(Odd):
    def forward(self, **named: Any) -> Any:
        assert sorted(named) == ["a", "b"]
        return super().forward((named["a"], named["b"]))


class HandedOn(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def same(value: Any) -> Any:
    return value


def joined(two: Any) -> Tensor:
    return torch.cat(tuple(two), 1)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :1], x[:, 1:]


def by_names(x: Tensor) -> dict[str, Tensor]:
    return {"b": x[:, 1:], "a": x[:, :1]}


def parts(values: Tensor, sizes: Iterable[int] = SIZES) -> list[Tensor]:
    return list(values.split(list(sizes)))


def paired(inputs: Callable[[Tensor], Any] = same, targets: Callable[[Tensor], Any] = same, **more: Any) -> Callable:
    """Batches of pairs, in which inputs and targets are made from tensors."""

    def make(x: Tensor, y: Tensor) -> list[Any]:
        of = [parts(value, more.get("sizes", SIZES)) for value in (x, y)]
        return [(inputs(own), targets(wanted)) for own, wanted in zip(*of, strict=True)]

    return make


PAIRS = paired()


@dataclasses.dataclass
class Case:
    """How the data come, and how the network takes and returns them."""

    batches: Callable[[Tensor, Tensor], Any] = PAIRS
    read: Callable[[Any], Tensor] = same
    ask: Callable[[Tensor], Any] = same  # inputs of a prediction
    middle: Callable[[Tensor], Tensor] = same
    write: Callable[[Tensor], Tensor] = same
    likelihood: Likelihood = dataclasses.field(default_factory=Gaussian)
    c: int = 2
    x: Tensor = X
    y: Tensor | None = None
    key: str = "labels"
    kind: Callable[..., nn.Module] = Odd

    @property
    def targets(self) -> Tensor:
        return Y[:, : self.c] if self.y is None else self.y

    def model(self) -> nn.Module:
        return self.kind(self.c, self.read, self.middle, self.write)

    def loader(self) -> Any:
        return self.batches(self.x, self.targets)


class Attributes(UserDict):
    """Entries are attributes too, as in a ``BatchEncoding``."""

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


@dataclasses.dataclass
class Record:
    x: Tensor
    labels: Tensor
    names: list[str] = dataclasses.field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        assert len(self.x) == 7  # made by the user alone, of all data


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    labels: Tensor


class Slotted:
    __slots__ = ("__dict__", "x")


Pair = namedtuple("Pair", ["a", "b"])
Labelled = namedtuple("Labelled", ["a", "labels", "b"])


class Several(list):
    """A list class of the user's own, with an attribute."""

    tag = "none"


class Identity:
    """Equal to itself alone."""


def mappings(kind: Callable[[dict], Any], key: str = "labels", **more: Callable[[Tensor], Any]) -> Callable:
    def make(x: Tensor, y: Tensor) -> list[Any]:
        each = zip(parts(x), parts(y), strict=True)
        return [kind({"x": own, key: wanted, **{k: f(own) for k, f in more.items()}}) for own, wanted in each]

    return make


def triples(x: Tensor, y: Tensor) -> list[Any]:
    return [(*halves(own), t) for own, t in zip(parts(x), parts(y), strict=True)]


def keyworded(kind: Callable[[dict], Any] = dict, key: str = "labels", **more: Callable[[Tensor], Any]) -> Callable:
    def make(x: Tensor, y: Tensor) -> list[Any]:
        each = zip(parts(x), parts(y), strict=True)
        return [kind({**by_names(own), key: t, **{k: f(own) for k, f in more.items()}}) for own, t in each]

    return make


def cut_from(kind: Callable[[Tensor, Tensor], Any]) -> Callable:
    """Batches cut from one object of all data, as they are cut here."""

    def make(x: Tensor, y: Tensor) -> list[Any]:
        whole, ends = kind(x, y), [0, 3, 6, 7]
        return [_data.take(whole, slice(a, b)) for a, b in itertools.pairwise(ends)]

    return make


def spaces(x: Tensor, y: Tensor) -> list[SimpleNamespace]:
    return [SimpleNamespace(x=own, labels=t, tag="t") for own, t in zip(parts(x), parts(y), strict=True)]


def numbered(x: Tensor) -> list[str]:
    """A name for each datum, which says one of its numbers."""
    return [f"n{value}" for value in x[:, 2].tolist()]


def from_names(names: Iterable[str], x: Tensor) -> Tensor:
    """Inputs whose last number comes from the names."""
    last = torch.tensor([float(name[1:]) for name in names], dtype=torch.float64)
    assert len(last) == len(x)
    return torch.cat([x[:, :2], last[:, None]], 1)


def named(kind: type) -> dict[str, Any]:
    return {
        "batches": mappings(dict, names=lambda x: kind(numbered(x))),
        "read": lambda batch: from_names(batch["names"], batch["x"]),
        "ask": lambda x: {"x": x, "names": kind(numbered(x))},
    }


def buffered(x: Tensor, y: Tensor) -> Iterator[Any]:
    inputs, targets = torch.empty(3, 3, dtype=torch.float64), torch.empty(3, 2, dtype=torch.float64)
    for own, wanted in zip(parts(x), parts(y), strict=True):
        inputs[: len(own)], targets[: len(own)] = own, wanted
        yield inputs[: len(own)], targets[: len(own)]


def other_things(batch: dict) -> Tensor:
    assert isinstance(batch["thing"], Identity)
    assert (batch["none"], batch["size"], batch["level"].ndim) == (None, (7, 8), 0)
    return batch["x"] * batch["factor"] / batch["level"]


def scaled(x: Tensor, y: Tensor) -> list[dict]:
    return [
        {"x": own * 2 / factor, "labels": t, "factor": factor, "none": None, "size": (7, 8), "thing": Identity(),
         "level": torch.tensor(2.0)}
        for own, t, factor in zip(parts(x), parts(y), (1, 2.0, 1), strict=True)
    ]  # fmt: skip


def padded(x: Tensor, length: int) -> Tensor:
    """Zeros that count for nothing, in a tensor of another shape."""
    return torch.cat([x, x.new_zeros(len(x), length)], 1)


def emptied(x: Tensor, y: Tensor) -> list[Any]:
    return [batch for own in paired()(x, y) for batch in ((x[:0], y[:0]), own)] + [(x[:0], [])]


def inference(x: Tensor, y: Tensor) -> list[Any]:
    with torch.inference_mode():
        return [(own + 0, wanted + 0) for own, wanted in zip(parts(x), parts(y), strict=True)]


class RaisingLength:
    """What a loader or a sampler of the user's own may do."""

    def __init__(self, batches: list[Any], error: type[Exception], dataset: Any = None) -> None:
        self.batches, self.error = batches, error
        if dataset is not None:
            self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        raise self.error("no length")


class Stream(IterableDataset):
    """Says any length, or none."""

    def __init__(self, x: Tensor, y: Tensor, says: int | None = None) -> None:
        self.x, self.y, self.says = x, y, says

    def __iter__(self) -> Iterator[Any]:
        return zip(self.x, self.y, strict=True)

    def __len__(self) -> int:
        if self.says is None:
            raise TypeError("none")
        return self.says


class Lengthless(Sampler):
    def __iter__(self) -> Iterator[int]:
        return iter(range(7))

    def __len__(self) -> int:
        raise RuntimeError("unknown")


ONE: dict[str, Any] = {"c": 1}
FLAT: dict[str, Any] = {"c": 1, "write": lambda f: f[:, 0]}
BINARY: dict[str, Any] = {"c": 1, "likelihood": Bernoulli()}
CLASSES: dict[str, Any] = {"likelihood": Categorical(), "y": LABELS}

CASES: dict[str, Case] = {
    "pairs": Case(lambda x, y: [list(batch) for batch in paired()(x, y)]),
    "a generator": Case(lambda x, y: iter(paired()(x, y))),
    "one buffer": Case(buffered),
    "a dictionary": Case(mappings(dict), lambda batch: batch["x"], lambda x: {"x": x}),
    "another key": Case(mappings(dict, "y"), lambda batch: batch["x"], lambda x: {"x": x}, key="y"),
    "a UserDict": Case(mappings(UserDict), lambda batch: batch["x"], lambda x: UserDict(x=x)),
    "attributes": Case(mappings(Attributes), lambda batch: batch.x, lambda x: Attributes(x=x)),
    "a dataclass": Case(cut_from(Record), lambda batch: batch.x, lambda x: _data.take(Record(X, Y), slice(0, len(x)))),
    "frozen slots": Case(cut_from(Frozen), lambda batch: batch.x, lambda x: Frozen(x, None)),
    "an object": Case(spaces, lambda batch: batch.x, lambda x: SimpleNamespace(x=x, tag="t")),
    "a namedtuple": Case(
        paired(lambda x: Pair(x[:, :1], x[:, 1:])), lambda pair: torch.cat([pair.a, pair.b], 1),
        lambda x: Pair(x[:, :1], x[:, 1:]),
    ),
    "a list": Case(
        paired(lambda x: [x[:, :1], x[:, 1:]]), lambda both: torch.cat(both, 1), lambda x: [x[:, :1], x[:, 1:]]
    ),
    "a list class": Case(
        paired(lambda x: Several([x[:, :1], x[:, 1:]])), lambda both: torch.cat([*both], 1) if both.tag else None,
        lambda x: Several([x[:, :1], x[:, 1:]]),
    ),
    "a nesting": Case(
        paired(lambda x: {"a": [UserDict(b=(x, {"c": None}))], "d": Pair(x, SimpleNamespace(e=x))}),
        lambda batch: (batch["a"][0]["b"][0] + batch["d"].b.e) / 2,
        lambda x: {"a": [UserDict(b=(x, {"c": None}))], "d": Pair(x, SimpleNamespace(e=x))},
    ),
    "several inputs": Case(triples, joined, halves, kind=OfTwo),
    "several in a list": Case(
        lambda x, y: [list(batch) for batch in triples(x, y)], joined, lambda x: [*halves(x)], kind=Optional
    ),
    "a pair of inputs": Case(paired(halves), joined, halves, kind=OfTwo),
    "any inputs": Case(triples, joined, halves, kind=OfAny),
    "several for one": Case(triples, joined, halves),
    "named fields": Case(
        lambda x, y: [Labelled(own[:, :1], t, own[:, 1:]) for own, t in zip(parts(x), parts(y), strict=True)],
        joined, halves, kind=OfTwo,
    ),
    "keywords": Case(keyworded(), joined, by_names, kind=OfTwo),
    "keywords and targets": Case(
        keyworded(UserDict), joined, lambda x: UserDict({**by_names(x), "labels": x}), kind=Optional
    ),
    "keywords beside y": Case(keyworded(key="y"), joined, by_names, kind=Optional, key="y"),
    "other entries": Case(keyworded(index=numbered, size=lambda x: 7), joined, by_names, kind=OfTwo),
    "any keywords": Case(keyworded(), joined, by_names, kind=OfNames),
    "handed on": Case(keyworded(), joined, by_names, kind=lambda *how: HandedOn(nn.DataParallel(OfTwo(*how)))),
    "logits": Case(write=lambda f: SimpleNamespace(loss=None, logits=f)),
    "a dictionary of outputs": Case(write=lambda f: {"features": f * 2, "logits": f}),
    "a tuple of outputs": Case(write=lambda f: (f, f * 2)),
    "names": Case(**named(list)),
    "a tuple of names": Case(**named(tuple)),
    "an array": Case(
        mappings(dict, last=lambda x: x[:, 2:].numpy()),
        lambda batch: torch.cat([batch["x"][:, :2], torch.from_numpy(batch["last"])], 1),
        lambda x: {"x": x, "last": x[:, 2:].numpy()},
    ),
    "other things": Case(
        scaled, other_things,
        lambda x: {"x": x, "factor": 2, "none": None, "size": (7, 8), "thing": Identity(), "level": torch.tensor(2.0)},
    ),
    "lengths": Case(
        lambda x, y: [(padded(own, i), t) for i, (own, t) in enumerate(zip(parts(x), parts(y), strict=True))],
        lambda x: x[:, :3], lambda x: padded(x, 5),
    ),
    "an empty batch": Case(emptied),
    "single data": Case(paired(sizes=[1] * 7)),
    "integers": Case(paired(lambda x: x.long()), lambda x: x.double(), lambda x: x.long(), x=WHOLE),
    "bytes": Case(
        paired(lambda x: x.to(torch.uint8)), lambda x: x.double(), lambda x: x.to(torch.uint8), x=WHOLE.abs()
    ),
    "half precision": Case(paired(lambda x: x.half()), lambda x: x.double(), lambda x: x.half(), x=WHOLE),
    "strided": Case(paired(lambda x: x.repeat_interleave(2, 1).mT.contiguous().mT[:, ::2])),
    "expanded": Case(
        paired(lambda x: x[:, :1].expand(-1, 3)), ask=lambda x: x[:, :1].expand(-1, 3), x=X[:, :1].repeat(1, 3)
    ),
    "gradients": Case(paired(lambda x: (x.clone().requires_grad_() * 1), lambda y: y.clone().requires_grad_())),
    "inference tensors": Case(inference),
    "numbers": Case(paired(targets=Tensor.tolist)),
    "NumPy targets": Case(paired(targets=Tensor.numpy)),
    "a tuple of tensors": Case(paired(targets=tuple)),
    "squeezed targets": Case(paired(targets=Tensor.squeeze)),
    "outputs [N], targets [N]": Case(paired(targets=lambda y: y[:, 0]), **FLAT),
    "outputs [N], targets [N, 1]": Case(**FLAT),
    "outputs [N, 1], targets [N]": Case(paired(targets=lambda y: y[:, 0]), **ONE),
    "outputs [N, 1], targets [N, 1]": Case(**ONE),
    "mixed targets": Case(paired(targets=lambda y: y.squeeze() if len(y) == 1 else y[:, None]), **FLAT),
    "integer targets": Case(paired(targets=lambda y: y[:, 0].long()), y=(4 * Y[:, :1]).round(), **ONE),
    "boolean": Case(paired(targets=lambda y: y[:, 0] > 0.5), y=LABELS[:, None].double(), **BINARY),
    "integer labels": Case(paired(targets=lambda y: y.int()), y=LABELS[:, None].double(), **BINARY),
    "probabilities": Case(y=Y[:, :1].sigmoid(), **BINARY),
    "[N] labels": Case(
        paired(targets=lambda y: y[:, 0]), y=LABELS[:, None].double(), write=lambda f: f.squeeze(), **BINARY
    ),
    "column of classes": Case(paired(targets=lambda y: y[:, None]), **CLASSES),
    "few bits": Case(paired(targets=lambda y: y.to(torch.uint8 if len(y) > 1 else torch.int32)), **CLASSES),
    "squeeze": Case(paired(targets=Tensor.squeeze), write=lambda f: f.squeeze(), **ONE),
    "several squeezed": Case(write=lambda f: f.squeeze()),
    "squeeze inside": Case(middle=lambda h: h[:, None].squeeze()),
    "one is special": Case(middle=lambda h: h if len(h) > 1 else h.mean(0).unflatten(1, (2, 2))),
    "nothing but the bias": Case(
        paired(lambda x: x[:, :0]), lambda x: x.new_zeros(len(x), 3), lambda x: x[:, :0], x=torch.zeros_like(X)
    ),
    "a length that raises": Case(lambda x, y: RaisingLength(paired()(x, y), RuntimeError, RaisingLength([], OSError))),
    "a length that lies": Case(lambda x, y: DataLoader(Stream(x, y, 1000), batch_size=3)),
    "chained streams": Case(lambda x, y: DataLoader(Stream(x[:5], y[:5]) + Stream(x[5:], y[5:]), batch_size=3)),
    "a sampler": Case(lambda x, y: DataLoader(TensorDataset(x, y), sampler=Lengthless(), batch_size=3)),
}  # fmt: skip


@functools.cache
def reference(name: str, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """Mean curvature ``[D, D]``, mean loss, outputs and their Jacobians, of the plain network.

    On the device of the model: ``nn.DataParallel`` takes it to a card if there is one.
    """
    case = CASES[name]
    network = core(case.c)
    outputs, jacobian = network(case.x).detach(), dense_jacobian(network, case.x)
    hessian = dense_loss_hessian(case.likelihood, outputs, case.targets)
    curvature = torch.einsum("ncp,nck,nkq->pq", jacobian, hessian, jacobian) / len(case.x)
    loss = case.likelihood.loss(outputs, case.targets).mean()
    return tuple(each.to(device) for each in (curvature, loss, outputs, jacobian))


def fitted(name: str, structure: str = "diag", **settings: Any) -> DebiasedLaplace:
    case = CASES[name]
    la = DebiasedLaplace(case.model(), case.likelihood, hessian_structure=structure, dict_key_y=case.key)
    la.fit(case.loader(), **settings)
    return la


def test_the_table_names_the_tests():
    page = (Path(__file__).parents[1] / "docs" / "batches.md").read_text(encoding="utf-8")
    table = page.partition("## What is refused")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    told = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    code = {"(inputs, targets)", "BatchEncoding", "Bernoulli", "[N, 1]", "forward"}
    assert set(told) - code == set(CASES)
    assert len(CASES) >= 30


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", CASES)
def test_row_of_the_table(name, structure):
    """The sampler reads the stream, the layers are found, and curvatures, evidence and predictions are right."""
    case, n = CASES[name], 4
    la = fitted(name, structure, split=Single())
    curvature, loss, outputs, jacobian = reference(name, la.network.device)
    assert la.n_data == 7
    assert_equal(la.loss, 7 * loss)
    columns = dense_basis(la.fitted.posterior.basis).to(curvature)
    assert_equal(la.fitted.posterior.curvatures, ((curvature @ columns) * columns).sum(0))
    if structure == "full":
        assert_equal(la.posterior_precision, 7 * curvature + torch.eye(len(curvature)).to(curvature))
    covariance = dense_posterior_precision(la.posterior).inverse()
    expected = jacobian[:n] @ covariance @ jacobian[:n].mT
    for k in (n, 1):  # also one datum alone
        mean, spread = la._glm_predictive_distribution(case.ask(case.x[:k]))
        assert_equal(mean, outputs[:k])
        assert_equal(spread, expected[:k])
    if isinstance(case.likelihood, Gaussian):
        mean, spread = la(case.ask(case.x[:n]))
        assert (mean.shape, spread.shape) == ((n, case.c), (n, case.c, case.c))


@pytest.mark.parametrize("name", CASES)
def test_other_draws_and_chunks_of_one(name):
    """All data kept without a forward pass, one datum at a time, and predicted in all ways."""
    case = CASES[name]
    la = fitted(name, "full", budget=None, chunk_size=1)
    curvature, _, outputs, jacobian = reference(name, la.network.device)
    assert_equal(la.H, 7 * curvature)
    again = DebiasedLaplace(case.model(), case.likelihood, hessian_structure="full", dict_key_y=case.key)
    again.fit(case.loader(), chunk_size=1, split=Single())
    assert_equal(again.H, 7 * curvature)
    covariance = la.posterior_precision.inverse()
    x = case.ask(case.x[:2])
    deviations = la.posterior.deviations(3, torch.Generator().manual_seed(0))
    linear = outputs[:2] + torch.einsum("ncd,sd->snc", jacobian[:2], deviations)
    plain = core(case.c).to(la.network.device)
    for k in (2, 1):
        own = la.functional_samples(case.ask(case.x[:k]), "linearized", 3, generator=torch.Generator().manual_seed(0))
        assert_equal(own, linear[:, :k])
        sampled = la.functional_samples(case.ask(case.x[:k]), "nn", 3, generator=torch.Generator().manual_seed(0))
        for deviation, found in zip(deviations, sampled, strict=True):
            nn.utils.vector_to_parameters(la.mean + deviation, plain.parameters())
            assert_equal(found, plain(case.x[:k].to(la.network.device)))
    if isinstance(case.likelihood, Gaussian):
        mean, joint = la(x, joint=True)
        assert_equal(mean, outputs[:2].flatten())
        rows = jacobian[:2].flatten(0, 1)
        assert_equal(joint, rows @ covariance @ rows.mT)
    la.enable_backprop = True
    if all(leaf.is_floating_point() for leaf in _data.tensors(x)):
        assert_equal(la._glm_predictive_distribution(x)[1], jacobian[:2] @ covariance @ jacobian[:2].mT)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not isinstance(case.loader(), Iterator)])
def test_fits_are_added_and_copied(name):
    """What is kept of a stream goes together with more of it, and with a copy of the posterior."""
    case = CASES[name]
    la = fitted(name, "diag", split=Single(), budget=None)
    curvature, loss, outputs, _ = reference(name, la.network.device)
    la.fit(case.loader(), override=False, split=Single(), budget=None)
    assert la.n_data == 14
    assert_equal(la.loss, 14 * loss)
    columns = dense_basis(la.fitted.posterior.basis).to(curvature)
    assert_equal(la.fitted.posterior.curvatures, ((curvature @ columns) * columns).sum(0))
    assert_equal(copy.deepcopy(la)._glm_predictive_distribution(case.ask(case.x[:2]))[0], outputs[:2])


# -- tuning ------------------------------------------------------------------------------------------

TARGETS = [
    "names", "an empty batch", "numbers", "squeezed targets", "outputs [N], targets [N]", "outputs [N], targets [N, 1]",
    "outputs [N, 1], targets [N]", "mixed targets", "integer targets", "boolean", "[N] labels", "column of classes",
    "few bits", "squeeze", "several squeezed", "squeeze inside", "one is special", "lengths", "a dataclass",
]  # fmt: skip


#: Fewer, for the eight ways to tune.
TUNED = [
    "an empty batch", "outputs [N], targets [N]", "outputs [N], targets [N, 1]", "outputs [N, 1], targets [N]",
    "mixed targets", "[N] labels", "column of classes", "one is special", "names",
]  # fmt: skip


def mean_absolute_error(prediction: Tensor, *others: Tensor) -> Tensor:
    """A loss of the user's own, which would broadcast ``[N, 1]`` against ``[N]`` unseen."""
    targets = others[-1]
    if targets.ndim < 2 and not targets.is_floating_point():
        return (1 - prediction[range(len(targets)), targets.long()]).mean()
    return (prediction - targets.to(prediction)).abs().mean()


METHODS: dict[str, dict[str, Any]] = {
    "one": {}, "layerwise": {"prior_structure": "layerwise"}, "samples": {"pred_type": "nn"},
    "linearised": {"pred_type": "linearized"}, "a loss": {"loss": mean_absolute_error},
    "standard error": {"selection": "one_standard_error"}, "noise": {"tune_sigma_noise": True},
    "temperature": {"tune_temperature": True},
}  # fmt: skip


def tuned(la: DebiasedLaplace, loader: Any, method: str) -> Tensor:
    la.optimize_prior_precision(
        method="gridsearch", val_loader=loader, log_prior_prec_min=-1, log_prior_prec_max=1, grid_size=3, n_samples=4,
        **METHODS[method],
    )  # fmt: skip
    return torch.cat([la.curve.losses, la.curve.prior_precisions])


@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning", "ignore:Validation data do not:UserWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TUNED)
def test_tuning_is_that_of_the_plain_batch(name, method):
    case = CASES[name]
    regression = isinstance(case.likelihood, Gaussian)
    if method == ("temperature" if regression else "noise"):
        method = "one"
    plain = DebiasedLaplace(core(case.c), case.likelihood, hessian_structure="diag")
    plain.fit([(case.x, case.targets)], split=Single())
    assert_equal(
        tuned(fitted(name, split=Single()), case.loader(), method), tuned(plain, [(case.x, case.targets)], method)
    )


@pytest.mark.filterwarnings("ignore:With the prior precision that maximises:UserWarning")
@pytest.mark.parametrize("name", TARGETS)
def test_the_marginal_likelihood_and_what_it_says_of_the_training_data(name):
    """The comparison with the training data reads their targets too."""
    case = CASES[name]
    plain = DebiasedLaplace(core(case.c), case.likelihood, hessian_structure="diag")
    plain.fit([(case.x, case.targets)], split=Single())
    la = fitted(name, split=Single())
    for own in (la, plain):
        own.optimize_prior_precision(tune_sigma_noise=isinstance(case.likelihood, Gaussian))
    assert_equal(la.prior_precision, plain.prior_precision)
    kept = la.fitted.uniform.data
    assert_equal(kept.targets.double(), case.likelihood.prepare_targets(case.targets, case.c).double()[kept.indices])


# -- other products ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "lengths"])
def test_quadratics_spectra_and_steps(name):
    case = CASES[name]
    curvature, loss, outputs, jacobian = reference(name)
    slope = torch.einsum("ncd,nc->d", jacobian, case.likelihood.gradient(outputs, case.targets)) / 7
    for chunk_size in (None, 1):
        quadratic = Quadratic(case.model(), case.loader(), case.likelihood, chunk_size=chunk_size)
        assert_equal(torch.tensor(quadratic.loss, dtype=torch.float64), loss)
        assert_equal(quadratic.gradient, slope)
        assert_equal(quadratic.matvec(slope), curvature @ slope)
    batches = [_data.only(batch) for batch in case.loader()]
    inputs, targets = _data.concatenate([own[0] for own in batches]), _data.joined_targets([own[1] for own in batches])
    ggn = GGN(case.model(), inputs, targets, case.likelihood, chunk_size=1)
    assert_equal(ggn.trace, curvature.trace())
    moved = []
    for model, pair in ((case.model(), (inputs, targets)), (core(case.c), (case.x, case.targets))):
        newton_step(model, pair, case.likelihood, damping=0.1)
        moved.append(nn.utils.parameters_to_vector(model.parameters()))
    assert_equal(*moved)


@pytest.mark.parametrize("targets", [Y[:, :1], Y[:, 0], Y[:, 0].tolist(), Y[:, 0].numpy()])
def test_a_diagonal_of_the_hessian_takes_one_number_for_each_datum(targets):
    model = core(1)
    flat = nn.Sequential(*model, nn.Flatten(0))
    expected = hessian_diagonal(model, X, Y[:, :1], Gaussian())
    for own in (model, flat):
        found = hessian_diagonal(own, X, targets, Gaussian())
        assert_equal(torch.cat([v.flatten() for v in found.values()]),
                     torch.cat([v.flatten() for v in expected.values()]))  # fmt: skip


@pytest.mark.parametrize("name", ["an empty batch", "outputs [N], targets [N]", "mixed targets", "column of classes",
                                  "numbers", "a dataclass", "squeeze", "one is special"])  # fmt: skip
def test_evaluation_is_that_of_the_plain_batch(name):
    case = CASES[name]
    scores = []
    for model, loader in ((case.model(), case.loader()), (core(case.c), [(case.x, case.targets)])):
        regression = isinstance(case.likelihood, Gaussian)
        predictor = gaussian_predictor(model, 0.5) if regression else point_predictor(model)
        scores.append(evaluate({"MAP": predictor}, loader, n_resamples=10)["test"]["scores"]["MAP"])
    for key, value in scores[1].items():
        assert scores[0][key] == pytest.approx(value, rel=1e-9), key


# -- one datum ---------------------------------------------------------------------------------------


class Squeezing(nn.Module):
    """A lone parameter besides, and features without the dimension of one datum."""

    def __init__(self, c: int, harsh: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, c)
            self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.harsh = harsh

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x[:, None])).squeeze() * self.scale
        h = h.unflatten(1, (2, 2)).flatten(1) if self.harsh else h  # there is no dimension 1 of one datum
        return self.head(h).squeeze()


class Plain(Squeezing):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)) * self.scale)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("harsh", [False, True])
@pytest.mark.parametrize("c", [1, 2])
def test_one_datum_has_the_outputs_that_it_has_in_a_batch(structure, subset, harsh, c):
    """Also where it is the only one that the layers are found with, and for lone parameters."""
    found = []
    for kind, batches in ((Squeezing, [(X[:1], Y[:1, :c]), (X[1:6], Y[1:6, :c]), (X[6:], Y[6:, :c])]),
                          (Plain, [(X, Y[:, :c])])):  # fmt: skip
        model = kind(c, harsh).double()
        la = DebiasedLaplace(model, "regression", subset, structure)
        la.fit(batches, split=Single())
        assert la.network.fewest == (1 if kind is Plain else 2)
        everything = [torch.as_tensor(la.log_marginal_likelihood()).reshape(1), la.loss.reshape(1)]
        for x in (X[:1], X[2:4]):
            everything += [v.flatten() for v in (*la(x), *la(x, joint=True), *la(x, pred_type="nn", n_samples=3))]
            everything += [v.flatten() for v in la(x, pred_type="linearized", n_samples=3)]
        found.append(torch.cat(everything))
    assert_equal(*found)


def test_what_one_datum_needs_is_remembered(tmp_path):
    la = DebiasedLaplace(Squeezing(2, True).double(), "regression")
    la.fit([(X, Y)], split=Single())
    la.save(tmp_path / "la")
    again = DebiasedLaplace.load(tmp_path / "la", la.model)
    assert again.network.fewest == 2
    assert_equal(again(X[:1])[1], la(X[:1])[1], 0.0)
    assert Network.restore(la.model, {k: v for k, v in la.network.description().items() if k != "fewest"}).fewest == 1


def test_a_model_that_takes_one_datum_is_given_one():
    seen = []
    model = core(2)
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    la = DebiasedLaplace(model, "regression")
    la.fit([(X, Y)], split=Single())
    seen.clear()
    la(X[:1])
    assert seen == [1]


def test_outputs_without_a_row_for_each_datum_are_refused():
    """C outputs for C data are not C outputs of one."""

    class Mixed(nn.Module):
        def __init__(self, write: Callable) -> None:
            super().__init__()
            self.core, self.write = core(3), write

        def forward(self, x: Tensor) -> Tensor:
            return self.write(self.core(x))

    y = torch.randn(3, 3, dtype=torch.float64)
    for write in (lambda f: f.mean(0), lambda f: f[0]):
        la = DebiasedLaplace(Mixed(write), "regression")
        with pytest.raises(ValueError, match="depends on other data of its batch"):
            la.fit([(X[:3], y)])
    la = DebiasedLaplace(Mixed(lambda f: f if len(f) != 5 else f[:, 0]), "regression")
    la.fit([(X[:3], y)], split=Single())
    with pytest.raises(ValueError, match=r"shape \[5, 3\], since the model had 3 for each datum before, got \(5,\)"):
        la(X[:5])
    with pytest.raises(ValueError, match=r"Expected outputs of shape \[2, C\].*got \(2, 3, 1\)"):
        _data.rows(y[:2, :, None], 2)
    for n, c, returned in ((1, 3, y[0]), (1, 1, y[0, 0]), (3, 1, y[0]), (0, 1, y[0, :0]), (0, 3, y[:0])):
        assert _data.rows(returned, n).shape == (n, c)


# -- no data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("backprop", [False, True])
@pytest.mark.parametrize("likelihood", ["regression", "classification", Bernoulli()])
def test_no_inputs_have_no_outputs(structure, subset, backprop, likelihood):
    """As many dimensions as ever, for a model that cannot be called with nothing."""
    regression = likelihood == "regression"

    class Needs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = core(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.core(x.reshape(len(x), -1)) + 0 * x.amax()  # neither of them works for no data

    targets = {"regression": Y, "classification": LABELS}.get(
        likelihood if isinstance(likelihood, str) else "", Y.sigmoid()
    )
    la = DebiasedLaplace(Needs(), likelihood, subset, structure, enable_backprop=backprop)
    la.fit([(X, targets)], split=Single())
    calls: dict[str, Callable[[Tensor], Any]] = {
        "diagonal": lambda x: la(x, diagonal_output=True), "nn": lambda x: la(x, pred_type="nn", n_samples=3),
        "linearized": lambda x: la(x, pred_type="linearized", n_samples=3),
        **{f"glm {link}": lambda x, link=link: la(x, link_approx=link, n_samples=3)
           for link in la.output_likelihood.links},
    }  # fmt: skip
    if regression:
        calls["joint"] = lambda x: la(x, joint=True)
    for kind in ("glm", "nn", "linearized"):
        for diagonal in (False, True):
            calls[f"samples {kind} {diagonal}"] = lambda x, k=kind, d=diagonal: la.functional_samples(x, k, 3, d)
            calls[f"predictive {kind} {diagonal}"] = lambda x, k=kind, d=diagonal: la.predictive_samples(x, k, 3, d)
    for name, call in calls.items():
        none, two = call(X[:0]), call(X[:2])
        for own, other in zip(*(v if isinstance(v, tuple) else (v,) for v in (none, two)), strict=True):
            rows = other[:, :0] if name.startswith(("samples", "predictive")) else other[:0]
            expected = (0,) * other.ndim if name == "joint" else rows.shape
            assert own.shape == expected, name
            assert own.dtype == other.dtype, name


def test_no_data_at_all_are_an_error():
    la = DebiasedLaplace(core(2), "regression")
    for loader in ([], [(X[:0], Y[:0])], iter([(X[:0], Y[:0])] * 2)):
        with pytest.raises(ValueError, match=r"got an empty loader\. A generator can be read only once"):
            la.fit(loader)
    with pytest.raises(ValueError, match="at least one datum to find the layers"):
        Network.discover(core(2), X[:0])
    with pytest.raises(ValueError, match="at least one datum, got none"):
        GGN(core(2), X[:0], Y[:0], "regression")
    la.fit([(X, Y)], split=Single())
    for method in METHODS.values():
        if "tune_temperature" not in method:
            with pytest.raises(ValueError, match="empty val_loader"):
                la.optimize_prior_precision(method="gridsearch", val_loader=[(X[:0], Y[:0])], grid_size=2, **method)


# -- lengths -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")
@pytest.mark.parametrize("error", [TypeError, NotImplementedError, RuntimeError, ValueError, AttributeError, OSError])
def test_a_length_may_raise_anything(error):
    loader = RaisingLength(paired()(X, Y), error, RaisingLength([], error))
    la = DebiasedLaplace(core(2), "regression")
    la.fit(loader, progress_bar=True)
    assert la.n_data == 7
    la.optimize_prior_precision(method="gridsearch", val_loader=loader, grid_size=3, progress_bar=True)
    la.optimize_prior_precision(method="gridsearch", pred_type="nn", val_loader=loader, grid_size=2, n_samples=2)
    assert evaluate({"MAP": gaussian_predictor(core(2), 1.0)}, loader, n_resamples=10)["test"]["n"] == 7
    assert Quadratic(core(2), loader, "regression").n_data == 7

    class Broken(RaisingLength):
        @property
        def dataset(self) -> Any:
            raise error("no data set")

    assert _data.dataset_length(Broken([], error)) is _data.length(loader) is None
    assert _data.dataset_length(DataLoader(X)) == _data.length([0] * 7) == 7


@pytest.mark.parametrize(
    ("loader", "told"),
    [
        (lambda: DataLoader(Stream(X, Y, 1000), batch_size=3), 1000),
        (lambda: DataLoader(TensorDataset(X, Y), sampler=SubsetRandomSampler([0, 2, 4]), batch_size=2), 7),
        (lambda: DataLoader(TensorDataset(X, Y), batch_size=3, drop_last=True), 7),
        (lambda: DataLoader(TensorDataset(X, Y), batch_size=3), None),
        (lambda: DataLoader(Stream(X, Y), batch_size=3), None),
    ],
)
def test_the_data_that_came_are_believed(loader, told, caplog, recwarn):
    la = DebiasedLaplace(core(2), "regression", hessian_structure="diag")
    came = sum(len(x) for x, _ in loader())
    recwarn.clear()
    with caplog.at_level(logging.WARNING, "debiased_laplace"):
        la.fit(loader())
    assert la.n_data == came
    assert [r.getMessage() for r in caplog.records if "dataset" in r.getMessage()] == (
        [] if told is None else [
            f"The loader gave {came} data, its dataset says that it has {told}: the posterior is that of {came} data. "
            "Set n_data if the training set has another size."
        ]
    )  # fmt: skip
    assert not [w for w in recwarn if "Length of IterableDataset" in str(w.message)]  # nobody asked for it


# -- what is refused -----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "three for one": (
        (X, X, Y), TypeError, r"2 inputs of a batch went.*forward\(input\).*the last is its targets.*inputs_of="
    ),
    "one in a tuple": ((X,), TypeError, r"tuple of length 1.*generator that yields \(inputs, targets\)"),
    "nested": ((torch.nested.nested_tensor([X, X[:2]]), Y[:2]), TypeError, r"got a nested one.*to_padded_tensor"),
    "jagged": (
        (torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged), Y[:2]), TypeError, "of one length in a batch"
    ),
    "keys of others": ({"a": X, "labels": Y}, TypeError, r"dict with the keys \['a', 'labels'\].*forward\(input\)"),
    "no tensor": ((["a"] * 7, Y), TypeError, "a nesting of tensors, got list"),
    "arrays alone": ((X.numpy(), Y), TypeError, "a nesting of tensors, got ndarray"),
    "disagreeing tensors": (([X, X[:2]], Y), ValueError, r"batch dimension first everywhere"),
    "a list of images": (([X] * 5, Y[:5]), ValueError, "A list of tensors is taken for several inputs of the model"),
    "targets [N]": ((X, Y[:, 0]), ValueError, r"shape \[N, 2\].*got \(7,\)"),
    "targets [C] of C data": ((X[:2], Y[0]), ValueError, r"shape \[N, 2\].*got \(2,\)"),
    "strings": ((X, list("abcdefg")), TypeError, "Expected targets that are a tensor, an array or numbers, got list"),
    "None": ((X, None), TypeError, "got NoneType"),
    "dictionaries": ((X, {"y": Y}), TypeError, "got dict"),
    "other keys": ({"x": X, 0: Y}, TypeError, r"the keys \['x', 0\]. Name the right one with dict_key_y .*targets_of"),
    "another number": ((X, Y[:5]), ValueError, r"each of the 7 inputs of a batch, got targets of shape \(5, 2\)"),
    "a datum": ((X[0], Y[0, 0]), ValueError, "batch_size=None yields single data"),
    "a tensor": (X, TypeError, "got a Tensor of length 7"),
    "doubles": ((X.float(), Y), RuntimeError, r"own forward pass failed: .*of torch.float32.*are torch.float64"),
    "bytes": ((X.to(torch.uint8), Y), RuntimeError, r"own forward pass failed: .*of torch.uint8.*Convert them"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("budget", [None, 1024])
def test_what_is_refused(name, budget):
    batch, error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        DebiasedLaplace(core(2), "regression").fit([batch], budget=budget)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(n=st.integers(1, 4), c=st.integers(1, 4), data=st.data())
def test_what_squeezing_loses_comes_back(n, c, data):
    """Outputs and targets of any number of data, without any of the dimensions that are one; or there is an error."""
    values = torch.arange(float(n * c)).reshape(n, c)
    shape = [d for d in (n, c) if d != 1 or data.draw(st.booleans())]
    given = values.reshape(shape)
    assert torch.equal(_data.rows(given, n, c), values)
    assert torch.equal(_data.target_rows(_data.as_targets(given, n), c), values)
    assert torch.equal(_data.target_rows(_data.as_targets(given.tolist(), n), c).float(), values)
    wrong = data.draw(st.lists(st.integers(1, 4), max_size=3))
    if [d for d in wrong if d != 1] != [d for d in (n, c) if d != 1]:
        if len(wrong) == 2 and wrong[0] == n:  # a matrix says its own number of outputs
            assert _data.rows(torch.zeros(wrong), n, c).shape == (n, wrong[1])
        else:
            with pytest.raises(ValueError, match="Expected"):
                _data.rows(torch.zeros(wrong), n, c)
        with pytest.raises(ValueError, match="Expected"):
            _data.target_rows(_data.as_targets(torch.zeros(wrong), n), c)


def test_targets_of_different_lengths_are_refused():
    with pytest.raises(
        ValueError, match=r"as many targets for each datum in all batches, got shapes \[\(3,\), \(4, 2\)\]"
    ):
        _data.joined_targets([Y[:3, 0], Y[3:]])


def test_an_error_of_the_model_stays_what_it_is():
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = core(2)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match=r"^of its own$"):
        DebiasedLaplace(Failing(), "regression").fit([(X.float(), Y)])


# -- containers ----------------------------------------------------------------------------------------


def test_objects_are_made_again_and_left_as_they_were():
    slotted = Slotted()
    slotted.x, slotted.names, slotted.tag = X, [f"n{i}" for i in range(7)], "t"
    own = Several([X, X + 1])
    own.tag = "here"
    batch = {"s": slotted, "own": own, "nothing": Identity(), "size": torch.Size([2, 7])}
    taken = _data.take(batch, torch.tensor([2, 0]))
    assert (type(taken["s"]), taken["s"].tag, taken["s"].names) == (Slotted, "t", ["n2", "n0"])
    assert_equal(taken["s"].x, X[[2, 0]], 0.0)
    assert (type(taken["own"]), taken["own"].tag, len(taken["own"][1])) == (Several, "here", 2)
    assert (taken["nothing"], taken["size"]) == (batch["nothing"], torch.Size([2, 7]))
    assert (len(slotted.x), len(slotted.names), len(own[0])) == (7, 7, 7)
    copied = _data.copy(batch)
    copied["s"].x.zero_()
    assert float(slotted.x.abs().sum()) > 0
    model, kind = core(2), nn.Linear
    assert _data.take({"x": X, "model": model, "kind": kind}, slice(0, 1))["model"] is model


class Point(tuple):
    """A tuple class with other arguments."""

    def __new__(cls, a: Any, b: Any) -> Point:
        return super().__new__(cls, (a, b))


def test_a_tuple_class_with_other_arguments():
    taken = _data.take(Point(X, X + 1), slice(0, 2))
    assert type(taken) is Point
    assert_equal(taken[1], X[:2] + 1, 0.0)


def test_the_users_gradients_are_not_touched():
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    la = DebiasedLaplace(core(2), "regression")
    la.fit([(x, y)], budget=None)
    la(x)
    assert x.grad is y.grad is None
    assert not any(leaf.requires_grad for leaf in _data.tensors(la.fitted.sample.data.inputs))
