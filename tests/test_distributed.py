"""Several processes fit and tune one posterior: that of one process, with the same bits in each of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import debiased_laplace as dl
from debiased_laplace import _data, _ranks
from debiased_laplace._ranks import RankError, Ranks
from debiased_laplace.fitting import fit as fitting
from debiased_laplace.fitting.measurement import Measurement
from debiased_laplace.fitting.reading import Reading
from debiased_laplace.testing import dense_basis
from tests import worlds
from tests.conftest import DEVICES
from tests.tolerances import EXACT, assert_equal

N = 83  # no multiple of a number of processes


def data(likelihood: str = "classification", n: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    if likelihood == "classification":
        return TensorDataset(x, torch.randint(3, (n,), generator=generator))
    if likelihood == "bernoulli":
        return TensorDataset(x, torch.randint(2, (n, 3), generator=generator).double())
    if likelihood == "poisson":
        return TensorDataset(x, torch.randint(5, (n, 3), generator=generator).double())
    return TensorDataset(x, torch.randn(n, 3, generator=generator, dtype=torch.float64))


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def sharded(dataset: TensorDataset, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size, sampler=DistributedSampler(dataset, shuffle=False, **options))


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

#: What of a fit has to be the same.
Result = dict[str, Any]


def result(posterior: dl.Laplace) -> Result:
    fitted, sample = posterior.fitted, posterior.fitted.sample
    assert sample is not None and fitted.uniform is not None
    prediction = posterior.predict(X, covariance=True)
    return {
        "inputs": sample.data.inputs, "targets": sample.data.targets, "weights": sample.data.weights,
        "indices": sample.data.indices, "folds": sample.folds, "uniform": fitted.uniform.data.inputs,
        "curvatures": posterior.posterior.curvatures, "covariance": prediction.outputs_covariance,
        "mean_loss": torch.tensor(fitted.mean_loss, dtype=torch.float64), "n_seen": torch.tensor(fitted.n_seen),
        "prior": posterior.posterior.prior_precision, "columns": dense_basis(posterior.posterior.basis),
    }  # fmt: skip


#: What depends on the order of sums no more than by rounding.
SUMMED = ("weights", "curvatures", "covariance", "mean_loss", "prior")

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "priority": {"sampler": dl.PrioritySampler(60)},
    "not calibrated": {"sampler": dl.PrioritySampler(60, calibrated=False)},
    "uniform": {"sampler": dl.UniformSampler(70), "structure": dl.Diagonal()},
    "all data": {"sampler": dl.UniformSampler(None)},
    "two batches": {"sampler": dl.PrioritySampler(60), "split": dl.TwoBatch()},
    "one batch": {"sampler": dl.PrioritySampler(60), "split": dl.Single()},
    "diag": {"structure": dl.Diagonal(), "sampler": dl.PrioritySampler(40)},
    "full": {"structure": dl.Full(), "sampler": dl.PrioritySampler(60), "split": dl.Single()},
    "by sensitivity": {"structure": dl.Full(), "sampler": dl.PrioritySampler(60), "parameters": dl.by_sensitivity(0.4)},
    "low rank": {"structure": dl.LowRank(rank=6), "sampler": dl.PrioritySampler(60)},
    "isotropic": {"structure": dl.Isotropic(), "sampler": dl.PrioritySampler(40)},
    "reduce": {"structure": dl.Kronecker(sharing=dl.Reduce()), "sampler": dl.PrioritySampler(60)},
    "blocks": {"structure": dl.Kronecker(max_factor=2), "sampler": dl.PrioritySampler(60)},
    "factored": {"estimator": "factored", "sampler": dl.PrioritySampler(60)},
    "sampled": {"mc_samples": 2, "sampler": dl.PrioritySampler(60)},
    "fisher": {"curvature": "empirical_fisher"},
    "last layer": {"parameters": "last_layer", "sampler": dl.PrioritySampler(60)},
    "part": {"n_data": 400, "sampler": dl.PrioritySampler(60)},
    "chunks": {"chunk_size": 3, "sampler": dl.PrioritySampler(60)},
    "regression": {"likelihood": "regression", "sampler": dl.PrioritySampler(60)},
    "bernoulli": {"likelihood": "bernoulli", "sampler": dl.PrioritySampler(60)},
    "poisson": {"likelihood": "poisson", "sampler": dl.PrioritySampler(60)},
}


def fitted(loader: Any, settings: dict[str, Any], model: nn.Module | None = None, **more: Any) -> dl.Laplace:
    settings = {"likelihood": "classification", "seed": 4} | settings | more
    return dl.fit(model or network(), loader, **settings)


def all_settings(rank: int) -> dict[str, Result]:
    return {
        name: result(fitted(sharded(data(settings.get("likelihood", "classification"))), settings))
        for name, settings in SETTINGS.items()
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Result]:
    return {
        name: result(fitted(DataLoader(data(settings.get("likelihood", "classification")), 8), settings))
        for name, settings in SETTINGS.items()
    }


def check_same(found: Result, expected: Result) -> None:
    """The same data, and the same numbers up to rounding."""
    for key, value in expected.items():
        if key in SUMMED:
            assert_equal(found[key], value, EXACT)
        elif key == "columns":
            assert found[key].shape == value.shape
        else:
            assert torch.equal(found[key], value), key


def check_bits(results: list[Result]) -> None:
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key, value in results[0].items():
            assert torch.equal(other[key], value), key


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_posterior_is_that_of_one_process(size: int, alone: dict[str, Result]) -> None:
    results = worlds.run(size, all_settings)
    for name in SETTINGS:
        check_bits([of_rank[name] for of_rank in results])
        check_same(results[0][name], alone[name])


# -- shards -------------------------------------------------------------------------------------------


def of_counts(counts: list[int], rank: int) -> list[tuple[Tensor, Tensor]]:
    """Shards one after the other, in batches of five."""
    x, y = data().tensors
    start = sum(counts[:rank])
    part = slice(start, start + counts[rank])
    return list(zip(x[part].split(5), y[part].split(5), strict=True)) if counts[rank] else []


def in_turns(counts: list[int]) -> Tensor:
    """The order in which one process would read them."""
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    order = []
    for round_ in range(0, max(counts), 5):
        for number in range(round_, round_ + 5):
            order += [start + number for start, count in zip(starts, counts, strict=True) if number < count]
    return torch.tensor(order)


def uneven(rank: int, counts: list[int]) -> Result:
    return result(fitted(iter(of_counts(counts, rank)), {"sampler": dl.PrioritySampler(60)}))


@pytest.mark.parametrize("counts", [[50, 33], [0, 83], [83, 0], [3, 41, 0, 39]], ids=str)
def test_shards_may_be_uneven_and_empty(counts: list[int]) -> None:
    x, y = data().tensors
    order = in_turns(counts)
    expected = result(fitted([(x[order], y[order])], {"sampler": dl.PrioritySampler(60)}))
    results = worlds.run(len(counts), uneven, counts)
    check_bits(results)
    check_same(results[0], expected)


def without_data(rank: int) -> None:
    fitted([], {})


def test_no_data_at_all() -> None:
    for died in worlds.run(2, without_data, results=False):
        assert "got an empty loader" in str(died)


def with_repeats(rank: int) -> int:
    dataset = data()
    loader = sharded(dataset)
    assert sum(len(x) for x, _ in loader) == 21 * 1 + (N + 3) // 4 - 21  # every shard has the same number
    return int(fitted(loader, {}).fitted.n_seen)


def test_repeats_of_a_distributed_sampler_do_not_count() -> None:
    assert worlds.run(4, with_repeats) == [N] * 4


def unsharded(rank: int) -> None:
    fitted(DataLoader(data(), 8), {})


def test_the_same_data_in_every_process_are_refused() -> None:
    for died in worlds.run(2, unsharded, results=False):
        assert "Expected 2 processes to read a part of the data each, got the same 83 data in every process" in str(
            died
        )


def of_two_datasets(rank: int) -> int:
    x, y = data().tensors
    loader = DataLoader(TensorDataset(x[rank:80:2], y[rank:80:2]), 8)
    return int(fitted(loader, {}).tune(loader).fitted.n_seen)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_process_may_have_a_dataset_of_its_own() -> None:
    assert worlds.run(2, of_two_datasets) == [80, 80]


def in_batch_sampler(rank: int) -> int:
    dataset = data()
    sampler = torch.utils.data.BatchSampler(DistributedSampler(dataset, shuffle=False), 4, drop_last=False)
    return int(fitted(DataLoader(dataset, batch_sampler=sampler), {}).fitted.n_seen)


def test_repeats_are_noticed_in_a_sampler_of_batches() -> None:
    assert worlds.run(2, in_batch_sampler) == [N, N]


def another_order(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    loader = DataLoader(data(), 8, shuffle=True, generator=generator)
    fitted(_data.Dealt(loader, Of(rank, 2)), {})


def test_batches_that_are_dealt_have_to_be_the_same() -> None:
    for died in worlds.run(2, another_order, results=False):
        assert "got others or in another order" in str(died)


# -- data of other kinds ------------------------------------------------------------------------------


class Reader(nn.Module):
    """Sequences with padding, zero, through attention; the mean of their tokens, or an output for each of them."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4, padding_idx=0)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        self.head, self.dense = nn.Linear(4, 3), dense

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.encoder(self.embedding(tokens), src_key_padding_mask=tokens == 0)
        kept = (tokens != 0)[..., None].to(hidden)
        return self.head(hidden) if self.dense else self.head((hidden * kept).sum(1) / kept.sum(1))


def reader(dense: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Reader(dense).double().eval()


def sequences(dense: bool) -> list[tuple[Tensor, Tensor]]:
    """Batches of four, of other lengths each, in which the first datum is the longest."""
    generator, batches = torch.Generator().manual_seed(8), []
    for number in range(11):
        longest = 4 + number % 3
        tokens = torch.randint(1, 9, (4, longest), generator=generator)
        lengths = torch.randint(2, longest + 1, (4,), generator=generator)
        lengths[0] = longest
        tokens[torch.arange(longest) >= lengths[:, None]] = 0
        labels = torch.randint(3, tokens.shape if dense else (4,), generator=generator)
        batches.append((tokens, labels.masked_fill(tokens == 0, -100) if dense else labels))
    return batches


def of_sequences(posterior: dl.Laplace, dense: bool) -> Result:
    tokens = sequences(dense)[3][0]
    return {
        "indices": posterior.fitted.curvature_indices, "curvatures": posterior.posterior.curvatures,
        "covariance": posterior.predict(tokens).probabilities,
        "mean_loss": torch.tensor(posterior.fitted.mean_loss, dtype=torch.float64),
        "prior": posterior.posterior.prior_precision,
    }  # fmt: skip


def read(rank: int, dense: bool) -> Result:
    batches = [(x[rank::2], y[rank::2]) for x, y in sequences(dense)]
    posterior = fitted(batches, {"sampler": dl.PrioritySampler(20)}, reader(dense))
    return of_sequences(posterior.tune(batches, prior_precisions=torch.tensor([0.1, 1.0, 10.0])), dense)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dense", [False, True])
def test_sequences_and_dense_outputs(dense: bool) -> None:
    alone = fitted(sequences(dense), {"sampler": dl.PrioritySampler(20)}, reader(dense))
    expected = of_sequences(alone.tune(sequences(dense), prior_precisions=torch.tensor([0.1, 1.0, 10.0])), dense)
    results = worlds.run(2, read, dense)
    check_bits(results)
    assert_equal(results[0].pop("prior"), expected.pop("prior"), 1e-4)
    assert_equal(results[0].pop("covariance"), expected.pop("covariance"), 1e-5)  # at what was tuned
    check_same(results[0], expected)


def added(rank: int) -> Result:
    x, y = data().tensors
    first, second = TensorDataset(x[:50], y[:50]), TensorDataset(x[50:], y[50:])
    settings = {"sampler": dl.PrioritySampler(40)}
    return result(fitted(sharded(second), settings, previous=fitted(sharded(first), settings)))


def test_data_are_added_to_an_earlier_fit() -> None:
    x, y = data().tensors
    settings = {"sampler": dl.PrioritySampler(40)}
    expected = result(fitted([(x[50:], y[50:])], settings, previous=fitted([(x[:50], y[:50])], settings)))
    results = worlds.run(3, added)
    check_bits(results)
    check_same(results[0], expected)


# -- tuning -------------------------------------------------------------------------------------------


TUNINGS: list[dict[str, Any]] = [{}, {"prior_structure": "layerwise", "link": "probit"}, {"temperature": False}]


def tuned(rank: int) -> list[Result]:
    results = []
    for name, likelihood in (("default", "classification"), ("regression", "regression")):
        posterior = fitted(sharded(data(likelihood)), SETTINGS[name])
        for options in TUNINGS:
            found = posterior.tune(sharded(data(likelihood, 31)), **options)
            assert found.tuned is not None
            results.append(result(found) | {"temperature": torch.tensor(found.output_temperature).double()})
    return results


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tuning_is_that_of_one_process() -> None:
    expected = []
    for name, likelihood in (("default", "classification"), ("regression", "regression")):
        posterior = fitted(DataLoader(data(likelihood), 8), SETTINGS[name])
        for options in TUNINGS:
            expected.append(posterior.tune(DataLoader(data(likelihood, 31), 8), **options))
    results = worlds.run(3, tuned)
    for number, posterior in enumerate(expected):
        check_bits([of_rank[number] for of_rank in results])
        found = results[0][number]
        assert_equal(found["prior"], posterior.posterior.prior_precision, 1e-4)
        assert float(found["temperature"]) == pytest.approx(posterior.output_temperature, rel=1e-5)


def tuned_unevenly(rank: int, counts: list[int]) -> Result:
    posterior = fitted(sharded(data()), {})
    return result(posterior.tune(of_counts(counts, rank)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("counts", [[20, 11], [0, 83]], ids=str)
def test_shards_of_validation_data_may_be_uneven_and_empty(counts: list[int]) -> None:
    x, y = data().tensors
    n = sum(counts)
    expected = fitted(DataLoader(data(), 8), {}).tune([(x[:n], y[:n])])
    results = worlds.run(2, tuned_unevenly, counts)
    check_bits(results)
    assert_equal(results[0]["prior"], expected.posterior.prior_precision, 1e-4)


def tuned_otherwise(rank: int) -> None:
    fitted(sharded(data()), {}).tune(sharded(data()), temperature=bool(rank))


def test_other_settings_of_tuning_are_refused() -> None:
    for died in worlds.run(2, tuned_otherwise, results=False):
        assert "Expected all 2 processes to tune with the same model and settings" in str(died)


def by_the_drop_in(rank: int, metric: bool) -> tuple[Tensor, Tensor]:
    la = dl.DebiasedLaplace(network(), "classification", hessian_structure="kron")
    la.fit(sharded(data()), generator=4)
    la.optimize_prior_precision(
        method="gridsearch", val_loader=sharded(data(n=31)), grid_size=5,
        loss=nn.functional.nll_loss if metric else None, pred_type="glm",
    )  # fmt: skip
    return la.prior_precision, la(X)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("metric", [False, True])
def test_the_drop_in_class_tunes_on_all_data(metric: bool) -> None:
    la = dl.DebiasedLaplace(network(), "classification", hessian_structure="kron")
    la.fit(DataLoader(data(), 8), generator=4)
    la.optimize_prior_precision(
        method="gridsearch", val_loader=DataLoader(data(n=31), 8), grid_size=5,
        loss=nn.functional.nll_loss if metric else None, pred_type="glm",
    )  # fmt: skip
    for prior, prediction in worlds.run(2, by_the_drop_in, metric):
        assert_equal(prior, la.prior_precision, 1e-5)
        assert_equal(prediction, la(X), 1e-6)


# -- models -------------------------------------------------------------------------------------------


def wrapped(rank: int) -> Result:
    model = nn.parallel.DistributedDataParallel(network())
    return result(fitted(sharded(data()), SETTINGS["priority"], model))


def test_a_model_in_ddp(alone: dict[str, Result]) -> None:
    results = worlds.run(2, wrapped)
    check_bits(results)
    check_same(results[0], alone["priority"])


def on_device(rank: int, device: str) -> Result:
    found = result(fitted(sharded(data()), SETTINGS["priority"], network().to(device)))
    return {key: value.cpu() for key, value in found.items()}


@pytest.mark.parametrize("device", DEVICES)
def test_processes_that_share_a_device(device: str, alone: dict[str, Result]) -> None:
    results = worlds.run(2, on_device, device)
    check_bits(results)
    check_same(results[0], alone["priority"])


def shards_of_parameters(rank: int, last_layer: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    fitted(sharded(data()), {"parameters": "last_layer"} if last_layer else {}, model)


@pytest.mark.parametrize("last_layer", [False, True])
def test_shards_of_parameters_are_refused(last_layer: bool) -> None:
    for died in worlds.run(2, shards_of_parameters, last_layer, results=False):
        assert "Expected whole parameters, got shards of them (DTensor)" in str(died)
        assert "full_tensor" in str(died)


def with_statistics(rank: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_()
    model[1].running_mean += rank  # as after a training in which every process sees other data
    fitted(sharded(data()), {}, model)


def test_running_statistics_of_a_training_are_named() -> None:
    for died in worlds.run(2, with_statistics, results=False):
        assert "weights of 1.running_mean" in str(died)
        assert "torch.distributed.broadcast(buffer, 0) for each of model.buffers()" in str(died)


def on_threads(rank: int) -> Result:
    torch.set_num_threads(1 + rank)
    return result(fitted(sharded(data()), SETTINGS["full"])) | result(fitted(sharded(data()), SETTINGS["low rank"]))


def test_bits_are_the_same_whatever_a_process_rounds() -> None:
    check_bits(worlds.run(2, on_threads))


def gathered(rank: int) -> Result:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, whole = network(), network()
    for p in whole.parameters():
        p.data.zero_()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return result(fitted(sharded(data()), SETTINGS["priority"], whole))


def test_shards_of_parameters_are_gathered_as_the_error_says(alone: dict[str, Result]) -> None:
    results = worlds.run(2, gathered)
    check_bits(results)
    check_same(results[0], alone["priority"])


def of_rank(rank: int, what: str) -> None:
    model = network()
    if what == "weights" and rank == 1:
        model[0].weight.data += 1e-3
    settings = {"seed": rank if what == "seed" else 4}
    if what == "structure" and rank == 1:
        settings["structure"] = dl.Diagonal()
    fitted(sharded(data()), settings, model)


@pytest.mark.parametrize("what", ["weights", "seed", "structure"])
def test_different_models_and_settings_are_refused(what: str) -> None:
    for died in worlds.run(2, of_rank, what, results=False):
        assert "got others in process 1 than in process 0: " in str(died)
        assert what in str(died)


def own_sampler(rank: int) -> None:
    class Own(dl.UniformSampler):
        def draw(self, batches: Any, folds: int, generator: Any, **settings: Any) -> Any:
            return super().draw(list(batches), folds, generator, **settings)

    fitted(sharded(data()), {"sampler": Own(10)})


def test_a_sampler_that_knows_nothing_of_others_is_refused() -> None:
    for died in worlds.run(2, own_sampler, results=False):
        assert "Expected a sampler that draws from the data of all processes" in str(died)


# -- faults -------------------------------------------------------------------------------------------


def batches_that_fail(rank: int, at: int) -> Iterator[Any]:
    for number, batch in enumerate(sharded(data())):
        if rank == 1 and number == at:
            raise OSError("the disk of process one")
        yield batch


def failing(rank: int, at: int) -> float:
    start = time.monotonic()
    with pytest.raises((OSError, RankError), match="the disk of process one") as caught:
        fitted(batches_that_fail(rank, at), {})
    assert isinstance(caught.value, OSError) == (rank == 1)
    if rank != 1:
        assert "Process 1 of 3 stopped: OSError" in str(caught.value)
    took = time.monotonic() - start
    assert fitted(sharded(data()), {}).fitted.n_seen == N  # they go on together
    return took


@pytest.mark.parametrize("at", [0, 3])
def test_an_error_in_one_process_stops_all_of_them(at: int) -> None:
    assert max(worlds.run(3, failing, at)) < 10


#: Where a process is killed: before which call of which function.
STAGES: dict[str, tuple[Any, str, int]] = {
    "reading": (Reading, "uniforms", 5),
    "merging": (Reading, "merge", 1),
    "statistics": (Measurement, "_of", 3),
    "decompositions": (Measurement, "_basis", 2),
    "curvatures": (Measurement, "_along", 2),
    "the end": (fitting.Probe, "of", 1),
}


def killed(rank: int, stage: str, path: Path) -> str:
    owner, name, number = STAGES[stage]
    original, calls = getattr(owner, name), 0

    def fatal(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(owner, name, fatal)
    start = time.monotonic()
    try:
        fitted(sharded(data()), SETTINGS["priority"], checkpoint=path)
    except RankError as error:
        assert time.monotonic() - start < 20
        return str(error)
    return "no error"


def outcome(posterior: dl.Laplace) -> Result:
    """What is known of a posterior that was complete, too."""
    covariance = posterior.predict(X, covariance=True).outputs_covariance
    assert covariance is not None
    return {"curvatures": posterior.posterior.curvatures, "covariance": covariance}


def resumed(rank: int, path: Path) -> Result:
    return outcome(fitted(sharded(data()), SETTINGS["priority"], checkpoint=path))


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_process_is_noticed_and_the_fit_goes_on_with_more(
    stage: str, tmp_path: Path, alone: dict[str, Result]
) -> None:
    path = tmp_path / "progress"
    messages = worlds.run(2, killed, stage, path, results=False)
    assert messages[1] is None
    assert "ended without a word" in messages[0]
    if stage not in ("reading", "merging"):
        assert path.exists()
    results = worlds.run(3, resumed, path)
    check_bits(results)
    known = outcome(fitted(DataLoader(data(), 8), SETTINGS["priority"], checkpoint=path))  # which is complete now
    for found in (results[0], known):
        check_same(found, {key: alone["priority"][key] for key in found})


def test_a_fit_of_one_process_is_finished_by_two(tmp_path: Path, alone: dict[str, Result], monkeypatch: Any) -> None:
    path, original = tmp_path / "progress", Measurement._along

    def fail(self: Measurement, *arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Measurement, "_along", fail)
    with pytest.raises(KeyboardInterrupt):
        fitted(DataLoader(data(), 8), SETTINGS["priority"], checkpoint=path)
    monkeypatch.setattr(Measurement, "_along", original)
    results = worlds.run(2, resumed, path)
    check_bits(results)
    check_same(results[0], {key: alone["priority"][key] for key in results[0]})


def only_one(rank: int) -> int:
    """The second process comes too late; then both come together."""
    _ranks.CONTACT = 0.5
    time.sleep(1.0 * rank)
    with pytest.raises(
        RankError, match="Expected all 2 processes of the group to fit together, got 1 of them"
    ) as caught:
        fitted(sharded(data()), {})
    assert "distributed=False" in str(caught.value)
    time.sleep(1.0 - rank)
    _ranks.CONTACT = 30.0
    return int(fitted(sharded(data()), {}).fitted.n_seen)


def another_call(rank: int) -> None:
    loader = sharded(data())
    posterior = fitted(loader, {})
    if rank:
        posterior.tune(loader)
    else:
        fitted(loader, {})


def test_processes_that_do_different_things_are_told() -> None:
    for died in worlds.run(2, another_call, results=False):
        assert "Expected all 2 processes to do the same, got 'fit', 'tune' in their order" in str(died)


def for_itself(rank: int) -> Result:
    if rank:
        return {}
    loader = DataLoader(data(), 8)
    return result(fitted(loader, SETTINGS["priority"], distributed=False).tune(loader, distributed=False))


def test_one_process_may_be_meant_and_has_to_be_said(alone: dict[str, Result]) -> None:
    assert worlds.run(2, only_one) == [N, N]
    found, _ = worlds.run(2, for_itself)
    check_same(found | {"prior": alone["priority"]["prior"], "covariance": alone["priority"]["covariance"]},
               alone["priority"])  # fmt: skip


# -- what is dealt ------------------------------------------------------------------------------------


class Of(Ranks):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("costs", [[], [1.0], [1.0] * 17, [9.0, 1, 1, 1, 1, 1, 1, 1], [0.0, 0.0]], ids=str)
def test_shares_are_consecutive_and_of_about_equal_costs(size: int, costs: list[float]) -> None:
    shares = [Of(rank, size).share(torch.tensor(costs)) for rank in range(size)]
    assert [index for share in shares for index in range(len(costs))[share]] == list(range(len(costs)))
    loads = [sum(costs[share]) for share in shares]
    assert max(loads) <= sum(costs) / size + max(costs, default=0.0)


def test_the_largest_pieces_are_dealt_first() -> None:
    owners = Of(0, 3).owners([1.0, 27.0, 8.0, 8.0, 8.0, 1.0])
    loads = [sum(cost for cost, owner in zip([1, 27, 8, 8, 8, 1], owners, strict=True) if owner == rank)
             for rank in range(3)]  # fmt: skip
    assert sorted(loads) == [10, 16, 27] or sorted(loads) == [9, 17, 27]


def n_decomposed(rank: int) -> int:
    from debiased_laplace.curvature import moments

    count, original = 0, moments._decomposed

    def counted(job: Any, *settings: Any) -> Any:
        nonlocal count
        count += len(job)
        return original(job, *settings)

    moments._decomposed = counted
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6))).double()
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_()
    fitted(sharded(data()), {"sampler": dl.UniformSampler(None), "structure": dl.Kronecker(max_factor=2)}, model)
    return count


def test_decompositions_are_spread() -> None:
    counts = worlds.run(3, n_decomposed)
    assert sum(counts) == 12
    assert max(counts) - min(counts) <= 8


def test_torchrun_fits_the_posterior_of_a_task(tmp_path: Path) -> None:
    task = Path(__file__).parent / "tasks" / "blobs.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, how in (("one", []), ("two", launch)):
        command = [sys.executable, *how, "-m", "debiased_laplace", "fit", str(task), "--budget", "30"]
        done = subprocess.run(
            [*command, "--out", name], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Written: ") == 1
    from debiased_laplace.evaluation import Context, Task

    model = Task.load(str(task)).model(Context())
    one, two = (dl.DebiasedLaplace.load(tmp_path / name, model) for name in ("one", "two"))
    assert torch.equal(one.fitted.curvature_indices, two.fitted.curvature_indices)
    assert_equal(two.fitted.posterior.curvatures, one.fitted.posterior.curvatures, 1e-4)
    assert_equal(two.prior_precision, one.prior_precision, 1e-3)
    assert not list(tmp_path.glob("*.progress"))


def test_torchrun_shares_the_seeds_of_an_evaluation(tmp_path: Path) -> None:
    task = Path(__file__).parent / "tasks" / "blobs.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
        "debiased_laplace", "evaluate", str(task), "--quick", "--seeds", "2", "--only", "MAP", "--only",
        "temperature scaling", "--out", "page",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page" / "report.html").exists()
    assert len(list((tmp_path / "page" / "records").glob("*.json"))) == 2
    assert "were finished earlier" not in done.stdout


def test_without_a_group_nothing_is_imported() -> None:
    code = (
        "import sys, torch, debiased_laplace as dl\n"
        "before = set(sys.modules)\n"
        "x, y = torch.randn(20, 3), torch.arange(20) % 2\n"
        "dl.fit(torch.nn.Linear(3, 2), [(x, y)], 'classification')\n"
        "new = {name for name in set(sys.modules) - before if name.startswith('torch.distributed')}\n"
        "assert not new, new\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
