"""What optimizers have in common that call the model themselves: one group of its parameters, data for a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _checks, _data
from debiased_laplace.likelihoods import Likelihood, resolve_likelihood
from debiased_laplace.network.selection import match_parameters

__all__ = ["ModelOptimizer", "halves", "move", "names_of"]


def halves(batch: Any) -> tuple[Any, Any]:
    """The first and the second half of a batch ``(inputs, targets)``, or of a dictionary; the first has one more.

    They are as good as two batches if the data come in random order, and not if they are sorted.

    Raises:
        ValueError: For fewer than two data.
    """
    _, targets, n = _data.only(batch)
    if n < 2:
        raise ValueError(f"Expected at least two data to split in halves, got {n}. Give a second batch, or more data.")
    parts = slice(0, (n + 1) // 2), slice((n + 1) // 2, n)
    if isinstance(batch, Mapping):
        first, last = (_data.take(batch, part) for part in parts)
    else:
        first, last = ((_data.take(batch[0], part), targets[part]) for part in parts)
    return first, last


class ModelOptimizer(torch.optim.Optimizer):
    """An optimizer of a model, whose steps need data: ``.grad`` is neither read nor written.

    Args:
        model: The model whose parameters it moves.
        likelihood: Gives the loss.
        parameters: Names and patterns of the trainable parameters to move; None for all.
        debiased: Split a batch in halves if there is no second.
        defaults: Of its one group of parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        parameters: str | Sequence[str] | None,
        debiased: bool,
        defaults: dict[str, Any],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"Expected a model (a torch.nn.Module), got {type(model).__name__}. {type(self).__name__} calls the "
                "model itself; choose among its parameters by their names with parameters=[...]."
            )
        _checks.nonnegative(defaults["lr"], "lr")
        self.model, self.likelihood, self.debiased = model, resolve_likelihood(likelihood), debiased
        self._chosen = names_of(model, parameters)
        owned = dict(model.named_parameters())
        super().__init__([owned[name] for name in self._chosen], defaults)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, of which torch's optimizers leave out the model."""
        return {key: value for key, value in vars(self).items() if not key.endswith("_hooks")}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """There is one group only: a step is one vector of all parameters."""
        if self.param_groups:
            raise NotImplementedError(
                f"Expected one group of parameters, got another. A step of {type(self).__name__} couples all "
                "parameters; make a new optimizer with the parameters it shall move."
            )
        super().add_param_group(param_group)

    def _batches(self, batch: Any, second: Any) -> tuple[Any, Any]:
        """The two batches of a step, or one and None; from a function without arguments, if it is one."""
        if callable(batch):
            batch = batch()
            if isinstance(batch, tuple) and len(batch) == 2 and not isinstance(batch[1], Tensor):
                batch, second = batch
        return halves(batch) if self.debiased and second is None else (batch, second)


def names_of(model: nn.Module, parameters: str | Sequence[str] | None) -> list[str]:
    """Of the parameters to move."""
    return match_parameters(model, "*" if parameters is None else parameters)


def move(model: nn.Module, names: list[str], step: Tensor) -> None:
    """Add a step ``[D]`` to parameters, rounded once; after any error they are what they were."""
    parameters = [dict(model.named_parameters())[name] for name in names]
    parts = step.split([p.numel() for p in parameters])
    moved = [(p.detach().double() + part.view_as(p)).to(p) for p, part in zip(parameters, parts, strict=True)]
    for value in moved:
        _checks.finite(value, "the parameters after the step", "Take a smaller lr, or more damping.")
    _assign(parameters, moved)


@torch.no_grad()
def _assign(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    """All of the values, or none."""
    before = [p.detach().clone() for p in parameters]
    try:
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
    except BaseException:
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)
        raise
