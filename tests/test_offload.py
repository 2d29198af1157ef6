"""Directions that lie on other devices: the same predictions, with one layer's at a time beside the network."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.curvature.parts import streamed
from debiased_laplace.curvature.parts.part import Part
from tests.tolerances import assert_equal
from tests.virtual_card import CARD, VirtualCard

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(40) % 3

STRUCTURES: dict[str, Callable[[], dl.Structure]] = {
    "kron": dl.Kronecker, "low rank": lambda: dl.LowRank(rank=5), "diag": dl.Diagonal, "full": dl.Full,
}  # fmt: skip


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)
        ).double()  # fmt: skip


def fitted(structure: dl.Structure, model: nn.Module) -> dl.Laplace:
    return dl.fit(model, [(X, Y)], "classification", structure=structure, sampler=dl.PrioritySampler(30))


def everything(posterior: dl.Laplace) -> list[Tensor]:
    """All that is made of directions."""
    tuned = posterior.tune([(X, Y)], prior_precisions=torch.tensor([0.3, 3.0]))
    samples = posterior.posterior.deviations(3, torch.Generator().manual_seed(0))
    covariance = posterior.predict(X, covariance=True).outputs_covariance
    assert covariance is not None
    return [
        covariance, tuned.predict(X[:3]).probabilities, tuned.posterior.prior_precision, samples,
        posterior.predict(X[:3], method="linearized", n_samples=4).probabilities,
        posterior.tune().posterior.prior_precision,
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_directions_in_the_memory_of_the_cpu_give_the_same(structure: str) -> None:
    with VirtualCard() as card:
        posterior = fitted(STRUCTURES[structure](), copy.deepcopy(network()).to(CARD))
        expected = [value.cpu() for value in everything(posterior)]
        offloaded = posterior.offload("cpu")
        parts = offloaded.posterior.basis.at_rest
        assert not any(card.holds(tensor) for part in parts for tensor in streamed._tensors(part))
        assert offloaded.fitted.posterior.basis is offloaded.posterior.basis
        actual = [value.cpu() for value in everything(offloaded)]
    for one, other in zip(actual, expected, strict=True):
        assert_equal(one, other, 0.0)


def test_one_part_at_a_time_is_beside_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, alive, most = fitted(dl.Kronecker(), network()).offload("cpu"), weakref.WeakSet[Any](), 0
    original = streamed.moved

    class Weak(Tensor):
        pass

    def watched(part: Part, device: torch.device) -> Part:
        nonlocal most
        result = original(part, device)
        copied = type(result)(*(value.clone().as_subclass(Weak) for value in vars(result).values()))
        alive.update(value for value in vars(copied).values())
        most = max(most, len(alive))
        return copied

    monkeypatch.setattr(streamed, "moved", watched)
    posterior.predict(X, covariance=True)
    assert 2 <= most <= 4  # the factors of one part, and of the next one before that is let go


def test_several_devices_get_about_as_many_bytes_each() -> None:
    places = [torch.device("cpu"), torch.device("meta")]
    basis = fitted(dl.Kronecker(), network()).posterior.basis.offloaded(places, torch.device("cpu"))
    sizes = {"cpu": 0, "meta": 0}
    for part in basis.at_rest:
        for tensor in streamed._tensors(part):
            sizes[tensor.device.type] += tensor.numel()
    assert sum(sizes.values()) == sum(t.numel() for part in basis.at_rest for t in streamed._tensors(part))
    assert max(sizes.values()) <= 2 * min(sizes.values())


def test_a_file_has_them_as_they_are(tmp_path: Any) -> None:
    model = network()
    posterior = fitted(dl.Kronecker(), model)
    posterior.offload("cpu").save(tmp_path / "posterior")
    again = dl.load(tmp_path / "posterior", model)
    assert torch.equal(again.predict(X).probabilities, posterior.predict(X).probabilities)
    assert type(again.posterior.basis.parts) is list
    with pytest.raises(ValueError, match="Expected at least one device to offload to, got none"):
        posterior.offload([])
