r"""Regression on UCI sets with their twenty published splits: a seed is a split. Targets are ``[N, 1]``.

A file ``<dataset>.npz`` in the folder of the data, or in ``uci`` there, holds ``X`` ``[N, features]``, ``y`` ``[N]``
and the indices ``train_idx`` and ``test_idx`` ``[splits, ...]`` (Hernández-Lobato and Adams, arXiv 1502.05336).
Inputs and targets are standardised by the data the network is trained on; ``target_scale`` gives the
standard deviation s and ``target_mean`` the mean m of the targets, to report errors in the original unit:

.. math:: \mathrm{RMSE}_y = s \, \mathrm{RMSE}, \qquad \log p(y) = \log p((y - m) / s) - \log s.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debiased_laplace.evaluation.shipped.common import (
    CPU,
    Batches,
    Loader,
    existing,
    fingerprint,
    initialised,
    kept,
    one_thread,
    read_npz,
    stamp,
    train,
)

BUDGET = 64
SEEDS = 20
SEEDS_NOTE = (
    "A seed is one of the published random splits into training and test data; it also decides which tenth of the "
    "training data is held out for validation, the training, and the data drawn for the fits. Splits share data, so a "
    "standard error speaks about repetitions on this set, not about other data."
)
NOTES = {"test": "Test data of the split."}
HIDDEN = 50
STEPS, QUICK_STEPS = 4000, 400
LEARNING_RATE, WEIGHT_DECAY, TRAIN_BATCH = 1e-2, 1e-3, 100
QUICK_TRAIN = 500
MEMBERS = 5


class StandardisedSplit(NamedTuple):
    """Standardised inputs ``[N, features]`` and targets ``[N, 1]`` of the three parts, and what targets were before.

    Attributes:
        train: What the network is trained on.
        validation: What is held out of the training part.
        test: The test part.
        std: Standard deviation of the training targets, in their original unit.
        mean: Their mean, likewise.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    std: float
    mean: float


def network(n_features: int) -> nn.Module:
    """One hidden layer of 50 ReLU units."""
    return nn.Sequential(nn.Linear(n_features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))


def task(dataset: str) -> SimpleNamespace:
    """The task of one regression set.

    Args:
        dataset: Name of its file, such as ``"energy"``.

    Returns:
        What a task's module contains.
    """

    def data(seed: int, data_dir: Path | None, quick: bool) -> StandardisedSplit:
        return split(_path(dataset, data_dir), seed, quick)

    def member(
        seed: int, initial: int, cache: Path, data_dir: Path | None, quick: bool, device: torch.device
    ) -> nn.Module:
        inputs, targets = data(seed, data_dir, quick).train
        n_steps = QUICK_STEPS if quick else STEPS
        settings = {
            "seed": initial, "steps": n_steps, "rate": LEARNING_RATE, "decay": WEIGHT_DECAY, "batch": TRAIN_BATCH,
            "hidden": HIDDEN, "data": fingerprint(inputs, targets),
        }  # fmt: skip
        return kept(
            cache, f"uci-{dataset}-{seed}-{initial}", settings, lambda: network(inputs.shape[1]),
            lambda: trained(inputs, targets, initial, n_steps=n_steps, device=device), device,
        )  # fmt: skip

    def model(
        *, seed: int, cache: Path, data_dir: Path | None = None, quick: bool = False, device: torch.device = CPU
    ) -> nn.Module:
        """The network of a split."""
        return member(seed, seed, cache, data_dir, quick, device)

    def ensemble(
        *, seed: int, cache: Path, data_dir: Path | None = None, quick: bool = False, device: torch.device = CPU
    ) -> list[nn.Module]:
        """Five networks on the data of a split, each from another initialisation."""
        initials = range(1000 * seed + 1, 1000 * seed + 1 + MEMBERS)
        return [member(seed, initial, cache, data_dir, quick, device) for initial in initials]

    def train_loader(*, seed: int, data_dir: Path | None = None, quick: bool = False) -> Loader:
        """The data of a split the network is trained on."""
        fitted = data(seed, data_dir, quick).train
        return Batches(lambda: fitted)

    def val_loader(*, seed: int, data_dir: Path | None = None, quick: bool = False) -> Loader:
        """The tenth of the training part that is held out."""
        validation = data(seed, data_dir, quick).validation
        return Batches(lambda: validation)

    def test_loader(*, seed: int, data_dir: Path | None = None, quick: bool = False) -> Loader:
        """The test data of a split."""
        test = data(seed, data_dir, quick).test
        return Batches(lambda: test)

    def target_scale(*, seed: int, data_dir: Path | None = None, quick: bool = False) -> float:
        """Standard deviation of the training targets, in their original unit."""
        return data(seed, data_dir, quick).std

    def target_mean(*, seed: int, data_dir: Path | None = None, quick: bool = False) -> float:
        """Mean of the training targets, in their original unit."""
        return data(seed, data_dir, quick).mean

    def description(*, seed: int = 0, data_dir: Path | None = None, quick: bool = False) -> str:
        """What the data and the network are, with the sizes."""
        parts = data(seed, data_dir, quick)
        sizes = [len(targets) for _, targets in parts[:3]]
        return (
            f"{text} {parts.train[0].shape[1]} features; {sizes[0]:,} data to train on, {sizes[1]:,} for validation, "
            f"{sizes[2]:,} to test on."
        )

    text = (
        f"Regression on the UCI set '{dataset}' with its published splits, inputs and targets standardised by the "
        f"training data. The network has one hidden layer of {HIDDEN} ReLU units and is trained with Adam."
    )
    return SimpleNamespace(
        NAME=f"UCI {dataset}", DESCRIPTION=text, LIKELIHOOD="regression", BUDGET=BUDGET, SEEDS=SEEDS, DENSE=True,
        SEEDS_NOTE=SEEDS_NOTE, NOTES=NOTES, model=model, ensemble=ensemble, train_loader=train_loader,
        val_loader=val_loader, test_loader=test_loader, target_scale=target_scale, target_mean=target_mean,
        description=description,
    )  # fmt: skip


def split(path: Path, seed: int, quick: bool = False) -> StandardisedSplit:
    """The parts of a published split, standardised.

    Args:
        path: The file.
        seed: Number of the split.
        quick: With at most 500 data to train on.

    Raises:
        ValueError: If there is no such split, or the file has other contents.
    """
    return _split(path, seed, quick, stamp(path))


@lru_cache(maxsize=8)
def _split(path: Path, seed: int, quick: bool, stamp: tuple[Any, ...]) -> StandardisedSplit:
    inputs, targets, train_idx, test_idx = read_npz(path, "X", "y", "train_idx", "test_idx")
    if not 0 <= seed < len(train_idx):
        raise ValueError(
            f"Expected the number of one of the {len(train_idx)} splits in {path.name} as the seed, from 0 to "
            f"{len(train_idx) - 1}, got {seed}. Ask for fewer seeds, from 0 on."
        )
    order = np.random.default_rng(seed).permutation(train_idx[seed])
    held, chosen = np.split(order, [max(1, len(order) // 10)])
    chosen = chosen[:QUICK_TRAIN] if quick else chosen
    centre, deviation = inputs[chosen].mean(0), inputs[chosen].std(0)
    deviation = np.where(deviation > 0, deviation, 1.0)  # a feature that is the same for all
    std, mean = float(targets[chosen].std()), float(targets[chosen].mean())

    def part(index: np.ndarray) -> tuple[Tensor, Tensor]:
        x, y = (inputs[index] - centre) / deviation, (targets[index] - mean) / std
        return torch.from_numpy(x).float(), torch.from_numpy(y).float()[:, None]

    return StandardisedSplit(part(chosen), part(held), part(test_idx[seed]), std, mean)


def trained(
    inputs: Tensor, targets: Tensor, seed: int, *, n_steps: int = STEPS, device: torch.device = CPU
) -> nn.Module:
    """Initialise and train; the global random state is left as it was.

    Args:
        inputs: ``[N, features]``.
        targets: ``[N, 1]``.
        seed: Of the initialisation and of the order of the data.
        n_steps: Of Adam, with a cosine schedule.
        device: Where to train.
    """
    model = initialised(lambda: network(inputs.shape[1]), seed).to(device)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    with one_thread():
        train(
            model, inputs.to(device), targets.to(device), F.mse_loss, _order(len(inputs), n_steps, seed, device),
            optimizer, schedule,
        )  # fmt: skip
    return model.eval()


def _order(n: int, n_steps: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    generator, done = torch.Generator().manual_seed(seed), 0
    while done < n_steps:
        for batch in torch.randperm(n, generator=generator).to(device).split(TRAIN_BATCH)[: n_steps - done]:
            yield batch
            done += 1


def _path(dataset: str, data_dir: Path | None) -> Path:
    path = existing(data_dir, f"uci/{dataset}.npz", f"{dataset}.npz")
    if path is None:
        raise FileNotFoundError(
            f"Expected {dataset}.npz with X, y, train_idx and test_idx in the folder of --data-dir or in uci there, "
            f"got none in {data_dir}. Name the folder with --data-dir."
        )
    return path
