"""Arguments that cannot be right are refused before the first batch is read, each in the same words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from debiased_laplace import Categorical, DebiasedLaplace, LowRank, PrioritySampler, UniformSampler
from debiased_laplace.fitting.fit import fit

pytestmark = pytest.mark.faults
X = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
Y = torch.randint(2, (20,), generator=torch.Generator().manual_seed(2))
NAN, INF = float("nan"), float("inf")
NOT_WHOLE = [0, -1, 1.5, NAN, True, 2**70, Tensor([1.0])]


class Unread:
    """A loader that must not be read."""

    def __iter__(self) -> Iterator[Any]:
        pytest.fail("the data were read")


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


OF_FITS: list[tuple[dict[str, Any], str]] = [
    *(({name: value}, f"a whole number {name} of at least 1") for name in ("n_data", "max_batches", "chunk_size",
      "mc_samples") for value in NOT_WHOLE),
    *(({"generator": value}, "a whole number generator of at least") for value in (1.5, 2**70, True, None)),
    ({"generator": torch.Generator}, "generator"),
    *(({"prior_precision": value}, "[Pp]rior precision") for value in (0, -1.0, NAN, INF, [1.0, NAN], "one", None)),
    *(({"temperature": value}, "temperature") for value in (0, -1.0, NAN, INF)),
    *(({"noise_variance": value}, "noise variance") for value in (0.0, NAN, INF)),
    *(({"prior_mean": value}, "the prior mean") for value in (NAN, INF)),
    ({"curvature": "hessian"}, "a curvature out of"),
    ({"estimator": "exact"}, "an estimator out of"),
    ({"mc_samples": "many"}, "mc_samples"),
    ({"parameters": ["nothing.*"]}, "which matches none of"),
    ({"parameters": []}, "patterns of trainable parameters, got none"),
]  # fmt: skip


@pytest.mark.parametrize("keywords", [pair[0] for pair in OF_FITS], ids=repr)
def test_of_a_fit(keywords: dict[str, Any]) -> None:
    message = next(own for given, own in OF_FITS if given is keywords)
    with pytest.raises((ValueError, TypeError), match=f"Expected .*{message}"):
        fit(model(), Unread(), Categorical(), **keywords)


@pytest.mark.parametrize("value", [*NOT_WHOLE[:5], 2**70])
def test_of_samplers_and_structures(value: Any) -> None:
    for make in (UniformSampler, PrioritySampler):
        with pytest.raises(ValueError, match="Expected a whole number budget of at least 1"):
            make(value)
    if value not in (1.5, 2**70):
        with pytest.raises((ValueError, TypeError), match=r"Expected .*rank"):
            LowRank(value)


OF_THE_CLASS: list[dict[str, Any]] = [
    {"budget": 0}, {"budget": 1.5}, {"n_data": 0}, {"chunk_size": 1.5}, {"generator": 2**70}, {"max_batches": 0},
    {"mc_samples": True},
]  # fmt: skip


@pytest.mark.parametrize("keywords", OF_THE_CLASS, ids=repr)
def test_of_the_drop_in_class(keywords: dict[str, Any], tmp_path: Path) -> None:
    (name,) = keywords
    with pytest.raises(ValueError, match=f"Expected a whole number {name} of at least"):
        DebiasedLaplace(model(), "classification").fit(Unread(), **keywords, checkpoint=tmp_path / "p")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [1.5, 2**70, None, True])
def test_of_seeds(value: Any) -> None:
    with pytest.raises(ValueError, match="Expected a whole number seed of at least"):
        DebiasedLaplace(model(), "classification", seed=value)


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    la = DebiasedLaplace(model(), "classification")
    with pytest.raises(FileNotFoundError, match="Expected a directory for"):
        la.fit(Unread(), checkpoint=tmp_path / "nowhere" / "p")
    with pytest.raises(OSError, match="it is a directory"):
        la.fit(Unread(), checkpoint=tmp_path)


@pytest.fixture(scope="module")
def fitted() -> DebiasedLaplace:
    la = DebiasedLaplace(model(), "classification")
    la.fit([(X, Y)])
    return la


@pytest.mark.parametrize("value", [0, -1, 1.5, NAN, True, None, "10"])
def test_of_predictions(fitted: DebiasedLaplace, value: Any) -> None:
    for call in (
        lambda: fitted(X, n_samples=value),
        lambda: fitted(X, pred_type="nn", n_samples=value),
        lambda: fitted.functional_samples(X, n_samples=value),
        lambda: fitted.predictive_samples(X, n_samples=value),
        lambda: fitted.sample(value),
    ):
        with pytest.raises(ValueError, match="Expected a whole number n_samples of at least 1"):
            call()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"grid_size": 0}, "grid_size of at least 1"),
        ({"grid_size": 2.5}, "grid_size of at least 1"),
        ({"n_samples": 0}, "n_samples of at least 1"),
        ({"log_prior_prec_min": NAN}, "finite log_prior_prec_min"),
        ({"log_prior_prec_max": INF}, "finite log_prior_prec_min"),
        ({"log_prior_prec_min": 5, "log_prior_prec_max": 4}, "finite log_prior_prec_min"),
        ({"log_prior_prec_base": -1}, "log_prior_prec_base"),
    ],
)  # fmt: skip
def test_of_tuning(fitted: DebiasedLaplace, keywords: dict[str, Any], message: str) -> None:
    before = fitted.prior_precision
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        fitted.optimize_prior_precision(method="gridsearch", val_loader=Unread(), **keywords)
    assert torch.equal(fitted.prior_precision, before)


def test_whole_numbers_of_other_libraries() -> None:
    assert UniformSampler(np.int64(5)).budget == 5
    fit(model(), [(X, Y)], Categorical(), n_data=np.int32(20), generator=np.int64(3), chunk_size=np.int8(7))


def test_data_without_features_and_no_data_to_predict(fitted: DebiasedLaplace) -> None:
    assert fitted(X[:0]).shape == (0, 2)
    constant = nn.Linear(0, 2)
    la = DebiasedLaplace(constant, "classification", hessian_structure="full")
    la.fit([(X[:, :0], Y)])
    assert la(X[:3, :0]).shape == (3, 2)
