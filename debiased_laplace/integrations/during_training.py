"""What callbacks of trainers have in common: a monitor that is told of every step of the training."""

from __future__ import annotations

from torch import nn

from debiased_laplace.quadratic.monitor import Monitor


class DuringTraining:
    """A monitor, and the check that it is one of the network that is trained.

    Args:
        monitor: The monitor.

    Raises:
        TypeError: If it is none.
    """

    def __init__(self, monitor: Monitor) -> None:
        if not isinstance(monitor, Monitor):
            raise TypeError(f"Expected a debiased_laplace.quadratic.monitor.Monitor, got {type(monitor).__name__}.")
        self.monitor = monitor

    def check(self, model: nn.Module) -> None:
        """Raise a ``ValueError`` for a model that has no parameter of the monitor's."""
        if not {id(p) for p in self.monitor.model.parameters()} & {id(p) for p in model.parameters()}:
            raise ValueError(
                "Expected a monitor of the network that the trainer trains, or of a part of it, got one of another "
                "network. Make it of the object that the trainer is given (and give it that, not model_init=)."
            )
