"""Fits that add to others, that are interrupted and continued, and that are written to files and read again."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from debiased_laplace import CrossFit, PrioritySampler, Single, TwoBatch, UniformSampler, _store
from debiased_laplace.curvature.projected import curvatures_along, projected_curvatures
from debiased_laplace.curvature.structures import Diagonal, Full, Kronecker, LowRank
from debiased_laplace.fitting import checkpoint as checkpoint_module
from debiased_laplace.fitting import measurement
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.testing import dense_basis, dense_ggn
from tests.datasets import targets
from tests.networks import ZOO
from tests.tolerances import EXACT, assert_equal, assert_unbiased

CASE = ZOO["cnn"]
STRUCTURES = [Kronecker(), Diagonal(), Full(), LowRank(4), LowRank(2, blocks="layer")]
every_structure = pytest.mark.parametrize("structure", STRUCTURES, ids=repr)


def stream(n: int, seed: int = 1, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    inputs, labels = CASE.inputs(n, seed=seed), targets(Categorical(), n, 2, seed)
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def fitted(batches: Any, model: nn.Module | None = None, **options: Any) -> Fit:
    model = CASE.model() if model is None else model
    return fit(model, batches, Categorical(), **{"sampler": UniformSampler(None), "generator": 3} | options)


def dense(result: Fit) -> Tensor:
    columns = dense_basis(result.posterior.basis)
    return (columns * result.posterior.curvatures) @ columns.mT


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a plain object, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for key in sorted(value) for t in tensors(value[key])]
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def assert_identical(one: Fit, other: Fit) -> None:
    """The same state, to the last bit."""
    mine, theirs = one.state(), other.state()
    for a, b in zip(tensors(mine), tensors(theirs), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)

    def words(state: Any) -> Any:
        if isinstance(state, dict):
            return {key: words(value) for key, value in state.items() if not isinstance(value, Tensor)}
        return [words(item) for item in state] if isinstance(state, (list, tuple)) else state

    def without_tensors(state: Any) -> str:
        return json.dumps(words(state), default=lambda tensor: "tensor", sort_keys=True)

    assert without_tensors(mine) == without_tensors(theirs)
    inputs = CASE.inputs(3, seed=9)
    for a, b in zip(
        functional_moments(one.network, one.posterior, inputs),
        functional_moments(other.network, other.posterior, inputs),
        strict=True,
    ):
        assert torch.equal(a, b)


# -- adding data -----------------------------------------------------------------------------------


@every_structure
def test_two_fits_are_one_on_all_data(structure):
    first, second = stream(12), stream(8, seed=2)
    one = fitted(first, structure=structure, split=Single())
    both = fitted(second, structure=structure, split=Single(), previous=one)
    expected = fitted(first + second, structure=structure, split=Single())
    assert_equal(dense(both), dense(expected))
    assert_equal(both.posterior.curvatures, expected.posterior.curvatures)
    assert both.mean_loss == pytest.approx(expected.mean_loss, rel=EXACT)
    assert both.n_seen == both.posterior.n_data == 20
    assert both.direction_indices.tolist() == list(range(20))
    assert (one.n_seen, len(one.direction_indices)) == (12, 12)  # the earlier one stays as it was
    assert both.settings["adds_to"] == 12
    assert one.settings["adds_to"] is None


@every_structure
def test_three_fits_are_one_on_all_data(structure):
    parts = [stream(7), stream(4, seed=2), stream(9, seed=3)]
    result = None
    for part in parts:
        result = fitted(part, structure=structure, split=Single(), previous=result)
    expected = fitted([batch for part in parts for batch in part], structure=structure, split=Single())
    assert_equal(dense(result), dense(expected))
    assert result.n_seen == 20
    assert result.curvature_indices.tolist() == list(range(20))


@every_structure
@pytest.mark.parametrize("split", [TwoBatch(), TwoBatch(folds=3, directions=1)])
def test_two_batches_add_up_fold_by_fold(structure, split):
    """By hand from the folds of both: data keep their roles, each stream weighs as much as it has data.

    All drawn stand for themselves; those that measure for the 1 of 13 and the 12 of 30 that were not drawn.
    """
    first, second = stream(13), stream(30, seed=2)
    one = fitted(first, structure=structure, split=split, sampler=UniformSampler(12))
    alone = fitted(second, structure=structure, split=split, sampler=UniformSampler(18), generator=4)
    both = fitted(second, structure=structure, split=split, sampler=UniformSampler(18), generator=4, previous=one)
    roles = []
    for chosen in (split.final, split.rounds[0].curvatures):
        old, new = one.sample.fold(chosen), alone.sample.fold(chosen)
        inputs = torch.cat([old.inputs, new.inputs])
        weights = torch.cat([
            torch.full((len(old),), 13 / 43 / len(old), dtype=torch.float64),
            torch.full((len(new),), 30 / 43 / len(new), dtype=torch.float64),
        ])  # fmt: skip
        labels, indices = torch.cat([old.targets, new.targets]), torch.cat([old.indices, 13 + new.indices])
        assert float(weights.sum()) == pytest.approx(1)
        roles.append(WeightedData(inputs, labels, weights, indices))
    directions, measured = roles
    drawn = torch.cat([sample.data.inputs for sample in (one.sample, alone.sample)])
    old = int((measured.indices < 13).sum())
    weights = torch.full((30 + len(measured),), 1 / 43, dtype=torch.float64)
    weights[30 : 30 + old] /= old
    weights[30 + old :] *= 12 / (len(measured) - old)
    weighted = WeightedData(torch.cat([drawn, measured.inputs]), torch.zeros(len(weights), dtype=torch.long), weights,
                            torch.arange(len(weights)))  # fmt: skip
    network = both.network
    statistics = structure.measure(network, CurvatureData(network, directions, Categorical()))
    basis = structure.eigenbasis(network, statistics)
    curvatures = projected_curvatures(network, basis, CurvatureData(network, weighted, Categorical()))
    if isinstance(structure, Full):  # most directions have no curvature on so few data, and are as good as each other
        rotated = dense_basis(both.posterior.basis)
        ggn = dense_ggn(CASE.model(), directions.inputs, directions.weights, Categorical())
        assert_equal(rotated.mT @ ggn @ rotated, torch.diag(statistics.curvatures(basis)))
        chunks = CurvatureData(network, weighted, Categorical())
        assert_equal(both.posterior.curvatures, projected_curvatures(network, both.posterior.basis, chunks))
    else:
        columns = dense_basis(basis)
        assert_equal(dense(both), (columns * curvatures) @ columns.mT)
    assert torch.equal(both.direction_indices, directions.indices)
    assert torch.equal(both.curvature_indices, measured.indices)
    assert not set(both.direction_indices.tolist()) & set(both.curvature_indices.tolist())
    assert both.n_seen == both.posterior.n_data == 43
    everything = torch.cat([batch[0] for batch in first + second])
    assert_equal(both.sample.data.inputs, everything[both.sample.data.indices], 0.0)


def test_streams_weigh_as_much_as_they_have_data():
    """Unequal sizes with the same budget: the mean over draws is that of all data."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 3, dtype=torch.float64, generator=generator)
    inputs[12:] *= 3
    first, second = ([(x, torch.zeros(len(x), 1).double())] for x in (inputs[:12], inputs[12:]))
    found, model = [], nn.Linear(3, 1, bias=False).double()
    for seed in range(100):
        common: dict[str, Any] = {"structure": Diagonal(), "sampler": UniformSampler(4)}
        one = fit(model, first, Gaussian(), generator=seed, **common)
        both = fit(model, second, Gaussian(), generator=1000 + seed, previous=one, **common)
        found.append(both.posterior.curvatures)
        assert len(both.curvature_indices) == 8
    assert_unbiased(torch.stack(found), inputs.square().mean(0))


def test_the_size_of_the_training_set_can_be_said():
    one = fitted(stream(6))
    both = fitted(stream(6, seed=2), previous=one, n_data=500)
    assert both.posterior.n_data == 506
    assert_equal(both.sample.data.weights, torch.tensor([1.0] * 6 + [500 / 6] * 6, dtype=torch.float64) / 506)


def test_the_folds_must_be_the_same():
    one = fitted(stream(12), split=TwoBatch())
    with pytest.raises(ValueError, match="split of the earlier fit, with 2 folds, got one with 1"):
        fitted(stream(6), previous=one, split=Single())


@pytest.mark.parametrize("options", [{}, {"estimator": "factored"}], ids=["projected", "factored"])
@pytest.mark.parametrize("structure", [Kronecker(), Diagonal(), Full(), Full(blocks="layer")], ids=repr)
def test_data_are_added_to_a_fit_that_was_loaded(structure, options, tmp_path):
    """New data measure along directions that they did not choose; a dense matrix is that of all data."""
    model, first, second = CASE.model(), stream(12), stream(8, seed=2)
    earlier = fitted(first, model, structure=structure, **options)
    earlier.save(tmp_path / "fit")
    loaded = Fit.load(tmp_path / "fit", model)
    assert loaded.sample is None
    result = fitted(second, model, structure=structure, previous=loaded, **options)
    assert (result.n_seen, result.posterior.n_data, result.sample) == (20, 20, None)
    alone = fitted(second, model, structure=structure, split=Single(), **options)
    assert result.mean_loss == pytest.approx(0.6 * earlier.mean_loss + 0.4 * alone.mean_loss, rel=EXACT)
    assert result.curvature_indices.tolist() == list(range(20))
    if isinstance(structure, Full):
        assert_equal(dense(result), 0.6 * dense(earlier) + 0.4 * dense(alone))
    else:
        columns = dense_basis(earlier.posterior.basis)
        assert_equal(dense_basis(result.posterior.basis), columns, 0.0)
        x, y = (torch.cat(column) for column in zip(*second, strict=True))
        mean = torch.full((8,), 1 / 8, dtype=torch.float64)
        ggn = dense_ggn(model, x, mean, Categorical(), y)
        along = ((columns.mT @ ggn) * columns.mT).sum(1)
        if options and isinstance(structure, Kronecker):
            data = CurvatureData(
                alone.network, WeightedData(x, y, torch.full((8,), 1 / 8), torch.arange(8)), Categorical()
            )
            along = structure.measure(alone.network, data).curvatures(earlier.posterior.basis)
        assert_equal(result.posterior.curvatures, 0.6 * earlier.posterior.curvatures + 0.4 * along)
    third = fitted(first, model, structure=structure, previous=result, **options)
    assert third.posterior.n_data == 32


def test_what_cannot_be_added_to_a_fit_that_was_loaded(tmp_path):
    model = CASE.model()
    for structure, options, match in (
        (LowRank(4), {}, "got one of a low rank that was loaded.*Fit on all data"),
        (Kronecker(), {"separate_bias": True}, "curvature blocks of the fit that was loaded, got others"),
        (Kronecker(), {"parameters": "last_layer"}, "curvature blocks of the fit that was loaded, got others"),
    ):
        fitted(stream(12), model, structure=structure).save(tmp_path / "fit")
        loaded = Fit.load(tmp_path / "fit", model)
        with pytest.raises(ValueError, match=match):
            fitted(stream(6), model, structure=structure, previous=loaded, **options)


# -- interrupted and continued ---------------------------------------------------------------------


class Interrupted(BaseException):
    """Like a KeyboardInterrupt, but pytest goes on if nobody catches it."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """One datum in every step; counts steps, and interrupts before the ``stop``-th."""
    module = measurement
    state: dict[str, Any] = {"count": 0, "stop": None}

    def counting(function):
        def counted(*arguments):
            if state["stop"] is not None and state["count"] >= state["stop"]:
                raise state.get("error", Interrupted)
            state["count"] += 1
            return function(*arguments)

        return counted

    monkeypatch.setattr(module, "STEP_CHUNKS", 1)
    monkeypatch.setattr(module, "curvatures_along", counting(curvatures_along))
    for kind in (Kronecker, Diagonal, Full, LowRank):
        monkeypatch.setattr(kind, "measure", counting(kind.measure))
    monkeypatch.setattr(Kronecker, "measure_unobserved", counting(Kronecker.measure_unobserved))
    yield state


def unreadable() -> Iterator[Any]:
    raise AssertionError("the data were read again")
    yield


OPTIONS: list[dict[str, Any]] = [
    *({"structure": structure} for structure in STRUCTURES),
    {"structure": Kronecker(), "mc_samples": 2},
    {"structure": LowRank(3), "mc_samples": 1, "split": TwoBatch(4, 1)},
    {"structure": Kronecker(), "estimator": "factored"},
    {"structure": Kronecker(), "split": Single()},
    {"structure": Kronecker(), "split": TwoBatch()},
    {"structure": Kronecker(), "split": CrossFit(2), "sampler": PrioritySampler(8)},
    {"structure": LowRank(3), "split": CrossFit(4, "rotated"), "sampler": PrioritySampler(8), "mc_samples": 1},
    {"structure": Kronecker(), "estimator": "factored", "split": CrossFit(3), "sampler": PrioritySampler(8)},
    {"structure": Full(), "parameters": "last_layer"},
    {"structure": Diagonal("hesscale_gn"), "parameters": "last_layer"},
    {"structure": LowRank(4), "curvature": "empirical_fisher"},
]


@every_structure
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()], ids=lambda x: type(x).__name__)
def test_steps_change_nothing(structure, likelihood, steps):
    """Sums over single data are those of all together, and the dense ones."""
    inputs = CASE.inputs(60)
    batch = [(inputs, targets(likelihood, 60, 2))]
    common = {"structure": structure, "split": Single(), "sampler": UniformSampler(None)}
    result = fit(CASE.model(), batch, likelihood, chunk_size=1, **common)
    assert steps["count"] == (120 if structure == Kronecker() else 60)
    ggn = dense_ggn(CASE.model(), inputs, torch.full((60,), 1 / 60, dtype=torch.float64), likelihood)
    columns = dense_basis(result.posterior.basis)
    assert_equal(result.posterior.curvatures, torch.einsum("dr,de,er->r", columns, ggn, columns))
    assert_equal(dense(result), dense(fit(CASE.model(), batch, likelihood, chunk_size=100, **common)))


UNINTERRUPTED: dict[str, tuple[Fit, int]] = {}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("stop", [0, 1, 3, 5, 7])
def test_a_continued_fit_is_the_uninterrupted_one(options, stop, steps, tmp_path):
    """Interrupted before the first step, amid the directions, and amid the curvatures."""
    if options["structure"] == Diagonal("hesscale_gn"):
        options = options | {"parameters": None}
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(60, 2)).double()
    else:
        model = CASE.model()
    common = {"sampler": UniformSampler(8), "chunk_size": 1, **options}
    if str(options) not in UNINTERRUPTED:  # the same for every stop
        UNINTERRUPTED[str(options)] = fitted(stream(12), model, **common), steps["count"]
    expected, total = UNINTERRUPTED[str(options)]
    steps["count"], steps["stop"] = 0, stop
    twice = options["structure"] == Kronecker() and options.get("estimator") != "factored"
    importance = isinstance(options.get("sampler"), PrioritySampler)
    split = options.get("split", CrossFit())
    # Directions; then curvatures along those of a round and the final ones in one pass, and of TwoBatch and Single in
    # one pass of data for themselves and for others. Statistics have one of each.
    both = (twice or importance) + (importance and options.get("estimator") == "factored")
    passes = {Single: 1 + twice, TwoBatch: 1 + twice / 2, CrossFit: 1 + both}[type(split)]
    assert total == 8 * passes
    path = tmp_path / "progress"
    with pytest.raises(Interrupted):
        fitted(stream(12), model, checkpoint=path, **common)
    assert steps["count"] == stop
    steps["stop"] = None
    result = fitted(unreadable(), model, checkpoint=path, **common)
    assert steps["count"] == total  # nothing was computed twice
    assert_identical(result, expected)
    assert_identical(fitted(unreadable(), model, checkpoint=path, **common), expected)
    assert steps["count"] == total


def test_a_fit_that_is_interrupted_at_every_step(steps, tmp_path):
    common = {"sampler": UniformSampler(8), "chunk_size": 1, "structure": LowRank(3), "mc_samples": 2}
    expected = fitted(stream(12), **common)
    steps["count"], attempts = 0, 0
    steps["error"] = KeyboardInterrupt
    batches: Any = stream(12)
    while attempts < 20:
        steps["stop"] = attempts
        try:
            result = fitted(batches, checkpoint=tmp_path / "progress", **common)
            break
        except KeyboardInterrupt:
            attempts, batches = attempts + 1, unreadable()
    assert attempts == 8
    assert steps["count"] == 8
    assert_identical(result, expected)


def test_a_fit_that_is_killed_loses_what_came_after_the_last_write(steps, monkeypatch, tmp_path):
    """As if the process ended at once: nothing is written when the exception leaves."""
    common = {"sampler": UniformSampler(8), "chunk_size": 1, "split": TwoBatch()}
    expected = fitted(stream(12), **common)
    steps["count"], steps["stop"] = 0, 6
    path, write = tmp_path / "progress", checkpoint_module.Checkpoint._write
    kept: list[bytes] = []

    def recorded(self):
        write(self)
        kept.append(path.read_bytes())

    monkeypatch.setattr(checkpoint_module.Checkpoint, "_write", recorded)
    with pytest.raises(Interrupted):
        fitted(stream(12), checkpoint=path, **common)
    monkeypatch.setattr(checkpoint_module.Checkpoint, "_write", write)
    assert len(kept) == 3  # the data, the directions, and on leaving
    for content in kept:
        path.write_bytes(content)
        steps["stop"] = None
        assert_identical(fitted(unreadable(), checkpoint=path, **common), expected)


def test_writes_by_time_are_continued_too(steps, monkeypatch, tmp_path):
    """Every step is written; a process that is killed after any of them goes on there."""
    original = checkpoint_module.Checkpoint.__init__
    monkeypatch.setattr(
        checkpoint_module.Checkpoint, "__init__",
        lambda self, path, settings, *, interval=0.0: original(self, path, settings, interval=interval),
    )  # fmt: skip
    common = {"sampler": UniformSampler(6), "chunk_size": 1, "structure": Full()}
    expected = fitted(stream(12), **common)
    path, write, kept = tmp_path / "progress", checkpoint_module.Checkpoint._write, []

    def recorded(self):
        write(self)
        if self._path is not None:
            kept.append(path.read_bytes())

    monkeypatch.setattr(checkpoint_module.Checkpoint, "_write", recorded)
    fitted(stream(12), checkpoint=path, **common)
    in_the_pass = len(stream(12))
    assert len(kept) == in_the_pass + 1 + 6 + 1
    for done, content in enumerate(kept[in_the_pass:-1]):
        path.write_bytes(content)
        steps["count"] = 0
        assert_identical(fitted(unreadable(), checkpoint=path, **common), expected)
        assert steps["count"] == 6 - done


def test_an_exception_in_the_loader_keeps_what_was_seen(tmp_path):
    def broken() -> Iterator[Any]:
        yield from stream(12)[:2]
        raise OSError("the disk is gone")

    path = tmp_path / "progress"
    with pytest.raises(OSError, match="the disk is gone"):
        fitted(broken(), checkpoint=path)
    assert path.exists()
    assert_identical(fitted(stream(12), checkpoint=path), fitted(stream(12)))


def test_added_data_are_continued_too(steps, tmp_path):
    common = {"sampler": UniformSampler(8), "chunk_size": 1}
    one = fitted(stream(12), **common)
    expected = fitted(stream(9, seed=2), previous=one, **common)
    steps["stop"], path = steps["count"] + 11, tmp_path / "progress"
    with pytest.raises(Interrupted):
        fitted(stream(9, seed=2), previous=one, checkpoint=path, **common)
    steps["stop"] = None
    assert_identical(fitted(unreadable(), previous=one, checkpoint=path, **common), expected)
    other = fitted(stream(12), **common | {"generator": 8})
    with pytest.raises(ValueError, match="previous"):
        fitted(unreadable(), previous=other, checkpoint=path, **common)
    with pytest.raises(ValueError, match="adds_to: None expected, got 12"):
        fitted(unreadable(), checkpoint=path, **common)


CHECKPOINTS: dict[bool, bytes] = {}


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"structure": LowRank(5)}, r"structure: 'LowRank\(rank=5, blocks=None\)' expected, got 'Kronecker\("),
        ({"generator": 4}, "seed: 4 expected, got 3"),
        ({"sampler": UniformSampler(7)}, r"sampler: 'UniformSampler\(budget=7\)' expected, got .*budget=8"),
        ({"split": Single()}, r"split: 'Single\(folds=1\)' expected"),
        ({"estimator": "factored"}, "estimator: 'factored' expected, got 'projected'"),
        ({"mc_samples": 3}, "mc_samples: '3' expected, got \"'auto'\""),
        ({"curvature": "empirical_fisher"}, "curvature: 'empirical_fisher' expected, got 'ggn'"),
        ({"parameters": "last_layer"}, "parameters: \"'last_layer'\" expected, got 'None'"),
        ({"chunk_size": 2}, "chunk_size: '2' expected, got '1'"),
        ({"separate_bias": True}, "separate_bias: True expected, got False"),
        ({"n_data": 99}, "n_data: '99' expected, got 'None'"),
        ({"prior_precision": 2.0}, "prior_precision: '2.0' expected, got '1.0'"),
        ({"prior_precision": torch.ones(3)}, "prior_precision: "),
        ({"temperature": 0.5}, "temperature: '0.5' expected, got '1.0'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused(options, match, complete, steps, tmp_path):
    """Nothing is mixed, and the file is left as it is."""
    common = {"sampler": UniformSampler(8), "chunk_size": 1}
    path = tmp_path / "progress"
    if complete not in CHECKPOINTS:  # the same for all settings
        steps["stop"] = None if complete else 5
        with nullcontext() if complete else pytest.raises(Interrupted):
            fitted(stream(12), checkpoint=path, **common)
        CHECKPOINTS[complete] = path.read_bytes()
    before, steps["stop"] = CHECKPOINTS[complete], None
    path.write_bytes(before)
    with pytest.raises(ValueError, match=match):
        fitted(unreadable(), checkpoint=path, **common | options)
    assert path.read_bytes() == before


def test_other_weights_are_refused(steps, tmp_path):
    path, model = tmp_path / "progress", CASE.model()
    steps["stop"] = 5
    with pytest.raises(Interrupted):
        fitted(stream(12), model, checkpoint=path, chunk_size=1)
    steps["stop"] = None
    other = CASE.model()
    other[2].bias.data[1] += 1e-12
    with pytest.raises(ValueError, match=r"weights of '2.bias' differ\. Delete the file"):
        fitted(unreadable(), other, checkpoint=path, chunk_size=1)
    fitted(unreadable(), model, checkpoint=path, chunk_size=1)
    with pytest.raises(ValueError, match=r"weights of '2.bias' differ"):
        fitted(unreadable(), other, checkpoint=path, chunk_size=1)


# -- written and read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *OPTIONS[:-2],
        {"structure": LowRank(3), "prior_precision": torch.linspace(1, 2, 184), "temperature": 0.3},
        {"structure": Kronecker(), "prior_precision": [1.0, 2.0, 3.0], "prior_mean": 0.2, "n_data": 70},
        {"structure": Kronecker(), "parameters": ["0", "6.bias"]},
        {"structure": Kronecker(), "separate_bias": True},
    ],
    ids=lambda options: ",".join(f"{k}={type(v).__name__}" for k, v in options.items()),
)
def test_a_fit_is_read_as_it_was_written(options, tmp_path):
    model = CASE.model()
    if isinstance(options.get("prior_precision"), Tensor):
        d = sum(p.numel() for p in model.parameters())
        options = options | {"prior_precision": torch.linspace(1, 2, d)}
    result = fitted(stream(12), model, **options)
    path = tmp_path / "fit.safetensors"
    result.save(path)
    loaded = Fit.load(path, model)
    assert_identical(loaded, result)
    assert loaded.network.is_head is result.network.is_head
    assert loaded.settings == result.settings
    assert list(loaded.network.shapes) == list(result.network.shapes)
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()
    grid = [replace(loaded.posterior, prior_precision=torch.tensor([p]).double()) for p in (0.1, 10)]
    for posterior in grid:  # the prior can be chosen anew
        expected = replace(result.posterior, prior_precision=posterior.prior_precision)
        assert torch.equal(posterior.precisions, expected.precisions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_structure
def test_lower_precisions_are_read_as_they_were_written(structure, dtype, tmp_path):
    model = CASE.model(dtype=dtype)
    result = fitted([(x.to(dtype), y) for x, y in stream(12)], model, structure=structure)
    result.save(tmp_path / "fit")
    loaded = Fit.load(tmp_path / "fit", model)
    for a, b in zip(tensors(loaded.state()), tensors(result.state()), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_the_header_says_what_a_file_is(tmp_path):
    result = fitted(stream(12), structure=LowRank(3), prior_precision=0.4)
    result.save(tmp_path / "fit")
    header = _store.read_header(tmp_path / "fit")
    assert header["kind"] == "fit"
    assert header["n_data"] == 12
    assert header["shapes"]["0.weight"] == [4, 2, 3, 3]
    assert header["settings"]["structure"] == "LowRank(rank=3, blocks=None)"
    assert header["settings"]["seed"] == 3
    assert set(header["weights"]) == set(CASE.model().state_dict())
    assert {"debiased_laplace", "torch"} <= set(header["versions"])


def test_another_model_is_refused(tmp_path):
    case = ZOO["batch-norm"]
    model, path = case.model(), tmp_path / "fit"
    fitted([(case.inputs(8), torch.arange(8) % 2)], model).save(path)
    weights, buffers, wider = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    weights[3].bias.data[0] += 1e-12
    buffers[1].running_mean[2] += 1e-12
    wider[5] = nn.Linear(8, 3).double()
    for other, match in (
        (weights, r"got another: weights of '3.bias' differ\. Load that model's weights"),
        (buffers, r"weights of '1.running_mean' differ"),
        (wider, r"shape of '5.weight': \[2, 8\] expected, got \[3, 8\]; shape of '5.bias': \[2\] expected, got \[3\]"),
        (ZOO["mlp"].model(), r"'1.weight' is missing|shape of '0.weight'"),
        (case.model(dtype=torch.float32), "weights of '0.weight' differ"),
    ):
        with pytest.raises(ValueError, match=match):
            Fit.load(path, other)
    Fit.load(path, model)
    with pytest.raises(ValueError, match=r"same weights; these differ: \['3.bias'\], by up to 1e-12"):
        Fit.restore(weights, fitted([(case.inputs(8), torch.arange(8) % 2)], model).state())


def test_a_model_that_was_frozen_after_the_fit_is_the_same(tmp_path):
    model = CASE.model()
    result = fitted(stream(12), model)
    result.save(tmp_path / "fit")
    model[6].bias.requires_grad_(False)
    loaded = Fit.load(tmp_path / "fit", model)
    assert list(loaded.network.shapes) == list(result.network.shapes)
    assert torch.equal(loaded.posterior.curvatures, result.posterior.curvatures)


def test_files_that_are_no_fits(tmp_path):
    fitted(stream(12), checkpoint=tmp_path / "progress")
    with pytest.raises(ValueError, match=r"a saved fit in .*progress, got progress"):
        Fit.load(tmp_path / "progress", CASE.model())
    with pytest.raises(FileNotFoundError, match="where there is no file"):
        Fit.load(tmp_path / "nothing", CASE.model())
    fitted(stream(12)).save(tmp_path / "fit")
    with pytest.raises(ValueError, match="hold the progress of a computation, got fit"):
        fitted(stream(12), checkpoint=tmp_path / "fit")


# -- files of earlier versions ---------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_STRUCTURES = {
    "kron": Kronecker(),
    "diag": Diagonal(),
    "full": Full(),
    "lowrank": LowRank(3),
    "lowrank-layer": LowRank(2, blocks="layer"),
}
GOLDEN_INPUTS = torch.tensor([[0.7, -0.2], [-1.5, 0.4]], dtype=torch.float64)


def golden_model() -> nn.Module:
    """Weights by hand, so that no generator has to give them again."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    values = torch.arange(17, dtype=torch.float64)
    nn.utils.vector_to_parameters((values * 7 % 17 - 8) / 8, model.parameters())
    return model


def golden_fit(structure: Any) -> Fit:
    """The dense structure sees all data twice: its directions without curvature are as good as each other."""
    inputs = torch.stack([(torch.arange(12.0) * 5 % 12 - 6) / 4, (torch.arange(12.0) * 7 % 11 - 5) / 4], 1).double()
    labels = (torch.arange(12) * 5) % 2
    return fit(
        golden_model(), [(inputs, labels)], Categorical(), structure=structure, generator=1, prior_precision=0.5,
        temperature=0.8, sampler=UniformSampler(),
        split=Single() if isinstance(structure, (Full, Diagonal)) else TwoBatch(),
    )  # fmt: skip


def golden_numbers(result: Fit) -> list[float]:
    """Variances of two outputs for two inputs, a covariance, and the log-determinant."""
    _, covariance = functional_moments(result.network, result.posterior, GOLDEN_INPUTS)
    numbers = [*covariance.diagonal(dim1=1, dim2=2).flatten(), covariance[0, 0, 1], result.posterior.log_det_ratio]
    return [float(number) for number in numbers]


#: Computed when the files were written.
GOLDEN_NUMBERS: dict[str, list[float]] = {
    "kron": [
        2.7591909352584727,
        4.068459960767668,
        5.034944151363246,
        3.6596531289575527,
        2.5915413756814156,
        9.706893312998826,
    ],
    "diag": [
        1.2975947612804437,
        2.60315026505001,
        3.18044185599745,
        1.921494486516521,
        0.6002973945677833,
        14.426788623753097,
    ],
    "full": [
        3.2295603079174118,
        3.6905109535867933,
        4.852437211955138,
        4.1372411384625885,
        3.069422903577108,
        7.186688656819703,
    ],
    "lowrank": [
        3.307501024757495,
        3.839119745555868,
        4.808805867826912,
        4.10567008051807,
        3.000176405375492,
        6.884847872467795,
    ],
    "lowrank-layer": [
        2.9810935076529006,
        4.99515594187269,
        5.163938340444826,
        3.7402404174404804,
        2.6791372664558475,
        6.215007577609056,
    ],
}


#: What has changed since the files were written.
NUMBERS_TODAY: dict[str, list[float]] = {
    "kron": [
        2.791540661465122,
        4.222209608566576,
        4.97766570560111,
        3.6597181406185078,
        2.6204166246732443,
        9.772602594911932,
    ],
    "lowrank": [
        3.314592980212415,
        3.8582484226522453,
        4.796679924338198,
        4.097918717869884,
        2.9884371091097126,
        6.782261052331265,
    ],
    "lowrank-layer": [
        2.9959410266555504,
        5.000411288370225,
        5.084224325035586,
        3.746746727363471,
        2.6608742538212056,
        6.695268889696562,
    ],
}


@pytest.mark.parametrize("name", GOLDEN_STRUCTURES)
def test_files_of_version_one(name):
    path = GOLDEN / f"fit-v1-{name}.safetensors"
    assert path.stat().st_size < 20_000
    loaded = Fit.load(path, golden_model())
    assert isinstance(loaded.posterior, Posterior)
    assert (loaded.n_seen, loaded.posterior.n_data, loaded.posterior.temperature) == (12, 12, 0.8)
    assert sorted(torch.cat([loaded.direction_indices, loaded.curvature_indices]).unique().tolist()) == list(range(12))
    found, expected = (torch.tensor(numbers).double() for numbers in (golden_numbers(loaded), GOLDEN_NUMBERS[name]))
    assert_equal(found, expected)


@pytest.mark.parametrize("name", GOLDEN_STRUCTURES)
def test_a_fit_today_is_that_of_version_one(name):
    """The same network and data give the same posterior; of two batches, data stand for themselves since."""
    found = torch.tensor(golden_numbers(golden_fit(GOLDEN_STRUCTURES[name])), dtype=torch.float64)
    assert_equal(found, torch.tensor((GOLDEN_NUMBERS | NUMBERS_TODAY)[name], dtype=torch.float64))


def write_golden_files() -> None:
    """Write the files and print their numbers; for a new format, under a new name."""
    GOLDEN.mkdir(exist_ok=True)
    for name, structure in GOLDEN_STRUCTURES.items():
        result = golden_fit(structure)
        result.save(GOLDEN / f"fit-v1-{name}.safetensors")
        print(f'    "{name}": {golden_numbers(result)},')


if __name__ == "__main__":
    write_golden_files()
