"""Callbacks of ``lightning`` and of ``pytorch_lightning``: a posterior after training, a monitor during it."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from debiased_laplace._guards import global_random_state
from debiased_laplace.integrations import require
from debiased_laplace.integrations.after_training import AfterTraining
from debiased_laplace.integrations.during_training import DuringTraining
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.snapshot import refuse_shards

__all__ = ["LaplaceCallback", "MonitorCallback"]

_installed = [name for name in ("lightning", "pytorch_lightning") if importlib.util.find_spec(name) is not None]
#: Each has a class of its own, and its trainer asks for that.
_CALLBACKS = tuple(
    require(name if name == "pytorch_lightning" else "lightning.pytorch", "lightning").Callback
    for name in _installed or ["lightning"]
)


class LaplaceCallback(AfterTraining, *_CALLBACKS):  # type: ignore[misc]
    """Fits a posterior around the trained module, at the end of ``trainer.fit``, on the device and with all processes.

    It is about a copy of the module with its last weights, and stays on that device when the trainer moves the module
    away, or trains it further. The module's ``forward`` has to give the outputs. With several processes each gives its
    shard of the data, and all get the same posterior (``docs/distributed.md``).

    Args:
        likelihood: What the outputs mean, as for :func:`debiased_laplace.fit`: ``"classification"``, ...
        module: A function of the LightningModule that gives the network, if it is not that itself.
        train_dataloader: Training data without augmentation; by default the trainer's own.
        val_dataloader: Validation data; by default the trainer's own.
        tune: Whether to tune on the validation data, or by the marginal likelihood where there are none.
        path: Where to save the posterior; :func:`debiased_laplace.load` reads it.
        settings: Further arguments of :func:`debiased_laplace.fit`, such as ``parameters="last_layer"``.

    Attributes:
        posterior: The :class:`~debiased_laplace.Laplace` posterior; None before the end of training.

    Example:
        >>> from debiased_laplace.integrations.lightning import LaplaceCallback
        >>> callback = LaplaceCallback("classification", parameters="last_layer")  # Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        likelihood: str | Likelihood,
        *,
        module: Callable[[Any], nn.Module] | None = None,
        train_dataloader: Iterable[Any] | None = None,
        val_dataloader: Iterable[Any] | None = None,
        tune: bool = True,
        path: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(likelihood, tune=tune, path=path, settings=settings)
        self.likelihood: str | Likelihood = likelihood
        self.module, self.train_dataloader, self.val_dataloader = module, train_dataloader, val_dataloader

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Fit, tune and save: the module is still on its device, and the group of processes still there."""
        train, validation = self.train_dataloader, self.val_dataloader
        if train is None:
            train = _only(trainer.train_dataloader, "train_dataloader")
        if validation is None and self.tune and trainer.val_dataloaders:
            validation = _only(trainer.val_dataloaders, "val_dataloader")
        if n_batches := int(trainer.fast_dev_run):  # as many as the trainer takes to see that everything works
            with global_random_state():
                train = list(islice(train, n_batches))
                validation = None if validation is None else list(islice(validation, n_batches))
        network = pl_module if self.module is None else self.module(pl_module)
        refuse_shards(network)  # which cannot be copied
        self.fit(copy.deepcopy(network), self.likelihood, train, validation, saves=trainer.is_global_zero)


def _only(loaders: Any, name: str) -> Iterable[Any]:
    """The only one of a trainer's loaders, which may be in a list or a dictionary."""
    several = list(loaders.values()) if isinstance(loaders, dict) else loaders
    several = several if isinstance(several, (list, tuple)) else [several]
    if len(several) != 1:
        raise ValueError(
            f"Expected a trainer with one {name} for LaplaceCallback, got {len(several)}. Pass {name}= to it."
        )
    return several[0]


class MonitorCallback(DuringTraining, *_CALLBACKS):  # type: ignore[misc]
    """Tells a :class:`~debiased_laplace.quadratic.monitor.Monitor` of every batch that is trained on.

    With several processes the first one measures, on its own batches, and the others wait. The monitor's state is part
    of the trainer's checkpoints.

    Args:
        monitor: Of the LightningModule, or of the network in it that gives the outputs; without a writer it writes to
            the trainer's loggers.

    Example:
        >>> import torch
        >>> from debiased_laplace.integrations.lightning import MonitorCallback
        >>> from debiased_laplace.quadratic.monitor import Monitor
        >>> callback = MonitorCallback(Monitor(torch.nn.Linear(4, 3), "classification"))  # Trainer(callbacks=...)
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the monitor, and give it a writer."""
        self.check(pl_module)
        if self.monitor.writer is None or isinstance(self.monitor.writer, _Loggers):  # of an earlier trainer
            self.monitor.writer = _Loggers(trainer.loggers)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell it."""
        if trainer.is_global_zero:
            self.monitor.step(batch, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """That of the monitor."""
        return self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self.monitor.load_state_dict(state_dict)


class _Loggers:
    """Loggers of Lightning as a writer."""

    def __init__(self, loggers: list[Any]) -> None:
        self.loggers = loggers

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        for logger in self.loggers:
            logger.log_metrics({tag: scalar_value}, step=global_step)
