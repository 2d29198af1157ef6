"""Batches that are not alike: other lengths, other things beside the tensors. Every datum counts as it came."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from debiased_laplace import Categorical, CrossFit, DebiasedLaplace, LowRank, Single, _data, _store
from debiased_laplace.curvature.structures import Diagonal, Full, Kronecker
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.stream import mean_loss
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.lone import LoneGradients
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.quadratic.spectrum import directional_derivatives
from debiased_laplace.sampling.reservoir import Reservoir
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.sampling.samplers import PrioritySampler, UniformSampler
from debiased_laplace.testing import dense_jacobian, dense_loss_hessian
from tests.tolerances import assert_equal

LENGTHS = (3, 2, 3, 5, 2)


class Bag(dict):
    """A dictionary class of a user's own, with an attribute."""

    source = "none"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self:
            raise AttributeError(name)
        return self[name]


class Sequences(nn.Module):
    """Outputs depend on the length to which a datum was padded, so that nobody pads it further unseen."""

    def __init__(self, head_first: bool = False, lone: bool = False) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.full((4,), 0.7)) if lone else None
        self.head_first = head_first

    def forward(self, batch: Any) -> Tensor:
        x, mask = batch["x"], batch["mask"]
        hidden = torch.tanh(self.body(x)) * (1 + 0.3 * x.shape[1])
        if self.scale is not None:
            hidden = hidden * self.scale
        tokens = self.head(hidden) if self.head_first else hidden
        pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return pooled if self.head_first else self.head(pooled)


def batch_of(n: int, length: int, seed: int, kind: type = dict, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(n, length, dtype=torch.float64)
    mask[0, 1:] = 0
    x = torch.randn(n, length, 2, generator=generator, dtype=torch.float64)
    return kind({"x": x, "mask": mask, "labels": torch.randint(3, (n,), generator=generator), **more})


def loader() -> list[Any]:
    return [batch_of(2 + i % 3, length, i) for i, length in enumerate(LENGTHS)]


def model_of(**options: bool) -> Sequences:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Sequences(**options).double()


def singles() -> list[Any]:
    """Every datum, at the length it came in."""
    return [_data.take(batch, slice(i, i + 1)) for batch in loader() for i in range(_data.count(batch))]


def dense_curvatures(model: nn.Module) -> Tensor:
    """Of each datum, ``[N, D, D]``, by autograd."""
    found = []
    for datum in singles():
        jacobian = dense_jacobian(model, datum)[0]
        found.append(jacobian.mT @ dense_loss_hessian(Categorical(), model(datum).detach())[0] @ jacobian)
    return torch.stack(found)


# -- cutting and joining -----------------------------------------------------------------------------


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.sampled_from([1, 1.0, None])), min_size=1, max_size=6),
    st.data(),
)
def test_every_datum_stays_what_it_was(sizes, data):
    """However data are joined and chosen, a datum has its own tensor, name and batch."""
    batches, start = [], 0
    for n, length, tag in sizes:
        number = torch.arange(start, start + n)
        start += n
        batches.append(UserDict(
            number=number, x=number[:, None].expand(n, length).clone(), name=[f"n{i}" for i in number.tolist()],
            array=number.numpy() * 10, tag=tag, level=torch.tensor(float(length)),
        ))  # fmt: skip
    cut = data.draw(st.integers(1, len(batches)))
    joined = _data.concatenate(batches[:cut])
    joined = _data.concatenate([joined, *batches[cut:]])
    assert _data.count(joined) == start
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, start - 1), max_size=6)) if start else [], dtype=torch.long)
    again = _data.take(_data.take(joined, torch.arange(start).flip(0)), start - 1 - chosen)
    origin = [size for size in sizes for _ in range(size[0])]
    seen = {}
    for where in _data.chunks(again, 2):
        part = _data.take(again, where)
        assert type(part) is UserDict
        positions = list(range(len(chosen)))[where] if isinstance(where, slice) else where.tolist()
        for row, position in enumerate(positions):
            seen[position] = int(part["number"][row])
            _, length, tag = origin[seen[position]]
            assert part["x"][row].tolist() == [seen[position]] * length
            assert part["name"][row] == f"n{seen[position]}"
            assert part["array"][row] == 10 * seen[position]
            assert part["tag"] == tag
            assert type(part["tag"]) is type(tag)
            assert float(part["level"]) == length
    assert [seen[i] for i in range(len(chosen))] == chosen.tolist()


Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    "inputs",
    [
        UserDict(x=torch.ones(3, 2)), Bag(x=torch.ones(3, 2)), OrderedDict(x=torch.ones(3, 2)),
        {"a": [UserDict(x=torch.ones(3, 2))]},
        (torch.ones(3, 2), Bag(x=torch.ones(3, 1))), Pair(torch.ones(3, 2), None),
    ],
)  # fmt: skip
def test_nestings_keep_their_types(inputs):
    def types(node: Any) -> Any:
        values = node.values() if hasattr(node, "values") and not isinstance(node, Tensor) else node
        inside = [types(v) for v in values] if isinstance(node, (dict, UserDict, list, tuple)) else []
        return type(node), inside

    for made in (
        _data.take(inputs, slice(0, 2)), _data.copy(inputs), _data.to_device(inputs, torch.device("cpu")),
        _data.concatenate([inputs, inputs]), _data.take(_data.concatenate([inputs, inputs]), torch.tensor([4, 1])),
    ):  # fmt: skip
        assert types(made) == types(inputs)
        assert len(_data.tensors(made)) == len(_data.tensors(inputs))


def test_a_mapping_that_takes_no_assignment_becomes_a_dictionary():
    assert type(_data.take(MappingProxyType({"x": torch.ones(3, 2)}), slice(0, 2))) is dict


def test_attributes_stay_and_the_users_own_batch_as_it_was():
    inputs = Bag(x=torch.ones(3, 2), names=["a", "b", "c"], size=(7, 8), pair=("u", "v", "w"))
    inputs.source = "here"
    taken = _data.take(inputs, torch.tensor([2, 0]))
    assert (taken.source, taken.names, taken.size, taken.pair) == ("here", ["c", "a"], (7, 8), ("w", "u"))
    assert (inputs.names, len(inputs.x), inputs.pair) == (["a", "b", "c"], 3, ("u", "v", "w"))
    held = _data.copy({"x": inputs.x, "array": np.ones(3)})
    held["array"][:] = held["x"][:] = 0
    assert float(inputs.x.sum()) == 6


@pytest.mark.parametrize(
    "things",
    [
        (1, 2), ("one", "other"), (torch.tensor(1), torch.tensor(2)), (np.ones(7), np.zeros(7)), ({1}, {1}), (None, 0),
        ((3, 4), (3, 5)),
    ],
)  # fmt: skip
def test_what_belongs_to_a_batch_stays_with_its_data(things):
    """Taking that of the first batch for all would give the model another input than the loader did."""
    batches = [{"x": torch.ones(2, 2), "thing": thing} for thing in things]
    joined = _data.concatenate([*batches, batches[0]])
    assert isinstance(joined, _data.Assorted)
    assert [repr(part["thing"]) for part in joined.parts] == [repr(thing) for thing in things]
    assert [len(where) for where in _data.chunks(joined, 10)] == [4, 2]
    assert type(_data.take(joined, torch.tensor([4, 0]))) is dict


def test_assorted_data_are_copied_moved_and_stored():
    joined = _data.concatenate(loader())
    assert isinstance(joined, _data.Assorted)
    for made in (
        _data.copy(joined), _data.to_device(joined, torch.device("cpu")),
        _store.from_plain(_store.to_plain(joined)), copy.deepcopy(joined),
    ):  # fmt: skip
        for i, datum in enumerate(singles()):
            own = _data.take(made, slice(i, i + 1))
            assert all(torch.equal(own[key], datum[key]) for key in datum)
    assert _data.size_of_datum(joined) == 5 * 3 + 1
    assert _data.some(joined, 3)["x"].shape == (2, 5, 2)
    assert_equal(joined.in_order(torch.cat([part["x"][:, 0] for part in joined.parts])),
                 torch.cat([batch["x"][:, 0] for batch in loader()]), 0.0)  # fmt: skip


# -- draws -------------------------------------------------------------------------------------------


def test_reservoirs_add():
    batches = loader()
    whole, one, two = (Reservoir(6) for _ in range(3))
    keys = torch.rand(sum(map(_data.count, batches)), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    start = 0
    for i, batch in enumerate(batches):
        own = keys[start : start + _data.count(batch)]
        start += len(own)
        for reservoir in (whole, one if i < 3 else two):
            reservoir.offer(batch, batch["labels"], own, own)
    both = one + two
    assert torch.equal(both.indices, whole.indices)
    for reservoir in (whole, both):
        inputs, targets = reservoir.content()
        for i, index in enumerate(reservoir.indices.tolist()):
            assert torch.equal(_data.take(inputs, slice(i, i + 1))["x"], singles()[index]["x"])
            assert int(targets[i]) == int(singles()[index]["labels"])


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("sampler", [UniformSampler(None), UniformSampler(7), PrioritySampler(8)])
@pytest.mark.parametrize("structure", [Full(), Diagonal(), LowRank(1000), Kronecker()])
def test_curvature_is_the_sum_over_the_data_drawn(structure, sampler, head_first):
    model = model_of(head_first=head_first)
    generator = torch.Generator().manual_seed(5)
    fitted = fit(model, iter(loader()), Categorical(), structure=structure, sampler=sampler, split=Single(),
                 generator=generator)  # fmt: skip
    assert fitted.n_seen == len(singles())
    data = fitted.sample.data
    for i, index in enumerate(data.indices.tolist()):
        assert torch.equal(_data.take(data.inputs, slice(i, i + 1))["x"], singles()[index]["x"])
    expected = torch.einsum("n,nij->ij", data.weights, dense_curvatures(model)[data.indices])
    basis = fitted.posterior.basis
    directions = basis.lift(torch.eye(basis.rank, dtype=torch.float64))  # [rank, D]
    assert_equal(fitted.posterior.curvatures, ((directions @ expected) * directions).sum(1))
    losses = torch.cat([Categorical().loss(model(datum), datum["labels"]) for datum in singles()]).detach()
    estimate = mean_loss(fitted.network, Categorical(), fitted.sample)
    assert_equal(torch.tensor(estimate, dtype=torch.float64), data.weights @ losses[data.indices])
    if fitted.observed is not None:
        assert_equal(torch.tensor(fitted.mean_loss, dtype=torch.float64), losses.mean())


def test_kronecker_factors_divide_by_the_positions_of_each_datum():
    model = model_of(head_first=True)
    data = UniformSampler(None).draw(iter(loader()), 1, torch.Generator()).data
    network = Network.discover(model, data.inputs)
    found = Kronecker().measure(network, CurvatureData(network, data, Categorical(), chunk_size=2))
    block = [b.name for b in network.blocks].index("head")
    a, b = torch.zeros(5, 5).double(), torch.zeros(3, 3).double()
    for datum in singles():
        hidden = torch.tanh(model.body(datum["x"]))[0] * (1 + 0.3 * datum["x"].shape[1])
        unmasked = datum["mask"][0] != 0  # others have no gradient
        inputs = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).detach()[unmasked]
        share = (datum["mask"] / datum["mask"].sum())[0][unmasked]
        hessian = dense_loss_hessian(Categorical(), model(datum).detach())[0]
        a += inputs.mT @ inputs / len(data)
        b += hessian * share.square().sum() / len(share) / len(data)
    assert_equal(found.inputs[block][0], a)
    assert_equal(found.outputs[block][0], b)


def test_statistics_of_the_stream_are_those_of_all_data():
    """All data within the budget of a priority draw: what the forward pass sums is what the draw gives."""
    one = fit(
        model_of(), iter(loader()), Categorical(), sampler=PrioritySampler(100), split=Single(), estimator="factored"
    )
    two = fit(
        model_of(), iter(loader()), Categorical(), sampler=UniformSampler(None), split=Single(), estimator="factored"
    )
    assert_equal(one.posterior.curvatures, two.posterior.curvatures)


def test_results_of_each_datum_are_in_the_order_of_the_data():
    model, batches = model_of(), loader()
    fitted = fit(model, batches, Categorical(), structure=Diagonal(), sampler=UniformSampler(None))
    joined = _data.concatenate(batches)
    posteriors = [fitted.posterior, fitted.posterior]
    for covariance in (True, False):
        each = [functional_moments(fitted.network, posteriors, datum, covariance=covariance) for datum in singles()]
        means, spreads = functional_moments(fitted.network, posteriors, joined, covariance=covariance)
        assert_equal(means, torch.cat([mean for mean, _ in each]))
        assert_equal(spreads, torch.cat([spread for _, spread in each], 1))
        assert_equal(functional_moments(fitted.network, posteriors[0], joined, covariance=covariance)[1], spreads[0])
    n = len(singles())
    data = WeightedData(joined, torch.cat([b["labels"] for b in batches]), torch.ones(n).double() / n, torch.arange(n))
    found = directional_derivatives(fitted.network, fitted.posterior.basis, data, Categorical(), chunk_size=2)
    expected = dense_curvatures(model).diagonal(dim1=1, dim2=2)
    names = list(fitted.network.shapes)
    assert names == [name for name, _ in model.named_parameters()]
    lifted = fitted.posterior.basis.project(expected)
    assert_equal(found.curvatures, lifted)


# -- the drop-in class -------------------------------------------------------------------------------


def test_batches_of_one_length_are_not_changed_by_others():
    """The posterior of a loader is that of its data, in whatever order they come."""
    predicted = []
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        la = DebiasedLaplace(model_of(), "classification", hessian_structure="full")
        la.fit([loader()[i] for i in order], budget=None)
        predicted.append(la(loader()[3]))
    assert_equal(predicted[0], predicted[1])


@pytest.mark.parametrize("structure", ["kron", "lowrank", "diag", "full"])
def test_fits_are_added_continued_copied_and_saved(structure, tmp_path):
    def new() -> DebiasedLaplace:
        return DebiasedLaplace(model_of(), "classification", hessian_structure=structure)

    settings_ = {"budget": None, "split": CrossFit(folds=2)}
    la, whole, file = new(), new(), tmp_path / "progress"
    whole.fit(loader(), **settings_)
    la.fit(loader(), checkpoint=file, **settings_)
    assert_equal(la(loader()[1]), whole(loader()[1]), 0.0)
    again = new()
    again.fit(loader(), checkpoint=file, **settings_)
    la.fit(loader()[:2], override=False, **settings_)
    la.save(tmp_path / "la")
    for other in (copy.deepcopy(la), DebiasedLaplace.load(tmp_path / "la", la.model)):
        assert_equal(other(loader()[3]), la(loader()[3]), 0.0)
    assert_equal(again(loader()[1]), whole(loader()[1]), 0.0)
    grid = {"log_prior_prec_min": 0.0, "log_prior_prec_max": 1.0, "grid_size": 2}
    with pytest.warns(UserWarning, match="of the grid"):
        la.optimize_prior_precision(method="gridsearch", val_loader=loader(), **grid)
    for precision, loss in zip(la.curve.prior_precisions, la.curve.losses, strict=True):
        la.prior_precision = precision
        p = torch.cat([la(batch).log()[range(_data.count(batch)), batch["labels"]] for batch in loader()])
        assert_equal(loss, -p.mean())


def test_a_draw_is_kept_by_a_checkpoint(tmp_path, monkeypatch):
    """Interrupted after the draw, the fit goes on with the data it had."""
    arguments = {"structure": Diagonal(), "split": Single(), "sampler": PrioritySampler(8)}
    file = tmp_path / "progress"
    with monkeypatch.context() as patched:
        patched.setattr(Diagonal, "eigenbasis", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError, match="division by zero"):
            fit(model_of(), iter(loader()), Categorical(), checkpoint=file, **arguments)
    fitted = fit(model_of(), iter(()), Categorical(), checkpoint=file, **arguments)
    expected = fit(model_of(), iter(loader()), Categorical(), **arguments)
    assert_equal(fitted.posterior.curvatures, expected.posterior.curvatures, 0.0)


class Attributes(Sequences):
    """Looks at what it got."""

    def forward(self, batch: Any) -> Tensor:
        assert type(batch) is Bag
        assert len(batch.names) == len(batch.x)
        number = torch.tensor([float(name[1:]) for name in batch.names], dtype=torch.float64)
        return super().forward(batch) * (1 + number[:, None]) * batch.factor


@pytest.mark.parametrize("lone", [False, True])
def test_names_and_numbers_beside_the_tensors_reach_the_model(lone):
    batches = [
        batch_of(2 + i, length, i, Bag, names=[f"n{i + j}" for j in range(2 + i)], factor=factor)
        for i, (length, factor) in enumerate([(3, 1.0), (3, 2.0), (2, 1.0)])
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Attributes(lone=lone).double()
    la = DebiasedLaplace(model, "classification", hessian_structure="full")
    la.fit(batches, budget=None)
    expected = 0.0
    for batch in batches:
        jacobian = dense_jacobian(model, batch)
        hessian = dense_loss_hessian(Categorical(), model(batch).detach())
        expected = expected + torch.einsum("ncp,nck,nkq->pq", jacobian, hessian, jacobian)
    assert_equal(la.H, expected)


def test_lone_parameters_of_dictionaries():
    """Their gradients are mapped over the data, which any dictionary can be."""
    for kind in (dict, UserDict, Bag):
        model = model_of(lone=True)
        batch = batch_of(4, 3, 1, kind, level=torch.tensor(2.0))
        network = Network.discover(model, batch)
        (index,) = [i for i, block in enumerate(network.blocks) if block.parameters == ("scale",)]
        network.blocks[index] = replace(network.blocks[index], calls=(), formed=False)
        assert network.lone_blocks
        names = [name for name, _ in model.named_parameters()]
        sizes = [p.numel() for p in model.parameters()]
        expected = dict(zip(names, dense_jacobian(model, batch).split(sizes, 2), strict=True))["scale"]
        vectors = torch.eye(expected.shape[1]).double()[:, None].expand(-1, 4, -1)
        assert_equal(LoneGradients(network, batch).backpropagate(vectors)["scale"].flatten(2), expected)
        assert not network.one_by_one


class Stream(IterableDataset):
    """Knows no length."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            x = torch.randn(3, generator=generator, dtype=torch.float64)
            yield x, x.sum()[None]


def test_chained_streams_have_no_length():
    la = DebiasedLaplace(nn.Linear(3, 1).double(), "regression")
    la.fit(DataLoader(Stream() + Stream(), batch_size=4), progress_bar=True)
    assert la.n_data == 20
    assert _data.length(Stream() + Stream()) is _data.length(iter([])) is None
    assert _data.length([1, 2]) == 2


def test_longer_batches_come_in_smaller_chunks():
    batches = [batch_of(4, length, length) for length in (2, 4)]
    short = Network.discover(model_of(), batches[0])
    memory = 10**6
    assert short.chunk_size(memory, inputs=batches[0]) == short.chunk_size(memory)
    ratio = _data.size_of_datum(batches[1]) / _data.size_of_datum(batches[0])
    assert short.chunk_size(memory, inputs=batches[1]) == pytest.approx(short.chunk_size(memory) / ratio, abs=1)
    again = Network.restore(model_of(), short.description())
    assert again.chunk_size(memory, inputs=batches[1]) == short.chunk_size(memory, inputs=batches[1])
