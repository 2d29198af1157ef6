"""What callbacks of trainers have in common: fit, tune and save a posterior when training has ended."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from debiased_laplace import _files
from debiased_laplace.laplace import Laplace, fit
from debiased_laplace.likelihoods import Likelihood, resolve_likelihood


class AfterTraining:
    """How a posterior is fitted after training, and the posterior.

    Args:
        likelihood: What the outputs mean, as for :func:`debiased_laplace.fit`.
        tune: Whether the prior precision is tuned, on validation data or, without any, by the marginal likelihood.
        path: Where the posterior is saved, by one process.
        settings: Further arguments of :func:`debiased_laplace.fit`.

    Raises:
        ValueError: If the likelihood is none.
        TypeError: If a fit has no such setting.
        OSError: If the path cannot be written.

    Attributes:
        posterior: The posterior; None before the end of training.
    """

    def __init__(
        self, likelihood: str | Likelihood | None, *, tune: bool, path: str | Path | None, settings: dict[str, Any]
    ) -> None:
        if likelihood is not None:  # what would fail after the training fails before it
            resolve_likelihood(likelihood)
        inspect.signature(fit).bind(None, None, likelihood, **settings)
        if path is not None:
            _files.check_writable(path)
        self.likelihood, self.tune, self.path, self.settings = likelihood, tune, path, settings
        self.posterior: Laplace | None = None

    def fit(
        self, model: nn.Module, likelihood: str | Likelihood, train: Iterable[Any], validation: Iterable[Any] | None, *,
        saves: bool,
    ) -> None:  # fmt: skip
        """Fit the posterior and keep it.

        Args:
            model: What was trained.
            likelihood: What its outputs mean.
            train: Training batches.
            validation: Validation batches, if there are any.
            saves: Whether this is the process that writes files.
        """
        posterior = fit(model, train, likelihood, **self.settings)
        if self.tune:
            posterior = posterior.tune(validation, distributed=self.settings.get("distributed", True))
        self.posterior = posterior
        if self.path is not None and saves:
            posterior.save(self.path)
