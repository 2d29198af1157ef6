"""Callbacks of Hugging Face's Trainer: a posterior after training, a monitor during it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from debiased_laplace.integrations import require
from debiased_laplace.integrations.after_training import AfterTraining
from debiased_laplace.integrations.during_training import DuringTraining
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.quadratic.monitor import Monitor

require("transformers", "transformers")

from transformers import TrainerCallback  # noqa: E402

__all__ = ["LaplaceTrainerCallback", "MonitorTrainerCallback"]

#: What Transformers calls the losses of its heads.
_PROBLEMS = {
    "single_label_classification": "classification",
    "multi_label_classification": "bernoulli",
    "regression": "regression",
}


class LaplaceTrainerCallback(AfterTraining, TrainerCallback):
    """Fits a posterior around the trained model, at the end of ``trainer.train()``.

    On the training data as the trainer collates and shards them, with the weights that training ends with, the best
    ones with ``load_best_model_at_end``. About the parameters that require gradients: of a model with adapters (PEFT)
    these are the adapters, and the head if it is trained.

    Args:
        likelihood: What the outputs mean, as for :func:`debiased_laplace.fit`; by default that of the loss of the
            model's head (``config.problem_type``), and classification for one that does not say.
        eval_dataset: Validation data, collated as the training data; by default those that the trainer evaluated on
            during training, if it did.
        tune: Whether to tune on the validation data, or by the marginal likelihood where there are none.
        path: Where to save the posterior; :func:`debiased_laplace.load` reads it.
        settings: Further arguments of :func:`debiased_laplace.fit`, such as ``parameters="last_layer"``.

    Attributes:
        posterior: The :class:`~debiased_laplace.Laplace` posterior; None before the end of training.

    Example:
        >>> from debiased_laplace.integrations.transformers import LaplaceTrainerCallback
        >>> callback = LaplaceTrainerCallback(parameters="last_layer")  # Trainer(..., callbacks=[callback])
    """

    def __init__(
        self,
        likelihood: str | Likelihood | None = None,
        *,
        eval_dataset: Dataset[Any] | None = None,
        tune: bool = True,
        path: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(likelihood, tune=tune, path=path, settings=settings)
        self.eval_dataset = eval_dataset

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fit, tune and save."""
        model, train, validation = kwargs["model"], kwargs["train_dataloader"], kwargs.get("eval_dataloader")
        if self.eval_dataset is not None:
            sampler: DistributedSampler[Any] | None = None
            if args.world_size > 1:
                sampler = DistributedSampler(self.eval_dataset, args.world_size, args.process_index, shuffle=False)
            validation = DataLoader(
                self.eval_dataset, args.per_device_eval_batch_size, sampler=sampler, collate_fn=train.collate_fn
            )
        likelihood = self.likelihood
        if likelihood is None:
            problem = getattr(getattr(model, "config", None), "problem_type", None)
            likelihood = _PROBLEMS.get(str(problem), "classification")
        self.fit(model, likelihood, train, validation, saves=state.is_world_process_zero)


class MonitorTrainerCallback(DuringTraining, TrainerCallback):
    """Tells a :class:`~debiased_laplace.quadratic.monitor.Monitor` of every step of the trainer.

    The trainer gives its callbacks no batches, so that those of a measurement are drawn at random from its training
    data, collated as it collates them, by a generator of their own. With several processes the first one measures, and
    the others wait. A training that is continued from a checkpoint goes on with the number of its step.

    Args:
        monitor: Of the model that the trainer is given.

    Example:
        >>> import torch
        >>> from debiased_laplace.integrations.transformers import MonitorTrainerCallback
        >>> from debiased_laplace.quadratic.monitor import Monitor
        >>> monitor = Monitor(torch.nn.Linear(4, 3), "classification")
        >>> callback = MonitorTrainerCallback(monitor)  # Trainer(..., callbacks=[callback])
    """

    def __init__(self, monitor: Monitor) -> None:
        super().__init__(monitor)
        self._generator = torch.Generator().manual_seed(0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the monitor and the data."""
        self.check(kwargs["model"])
        dataset = kwargs["train_dataloader"].dataset
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise TypeError(
                f"Expected training data with a length, of which some can be drawn, got {type(dataset).__name__}. Of a "
                "stream call monitor.step(inputs) in training_step of a Trainer of your own, which is given the batch."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell it."""
        if state.is_world_process_zero:
            draw = partial(self._draw, kwargs["train_dataloader"], args.train_batch_size)
            self.monitor.step(draw, state.global_step)

    def _draw(self, loader: Any, size: int) -> Any:
        dataset = loader.dataset
        chosen = torch.randperm(len(dataset), generator=self._generator)[:size].tolist()
        return loader.collate_fn([dataset[index] for index in chosen])
