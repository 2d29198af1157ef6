"""A Laplace posterior from its fit to its predictions, as one immutable object: fit, tune, predict, save, load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _checks
from debiased_laplace.curvature.structures import Structure
from debiased_laplace.fitting.fit import fit as fit_posterior
from debiased_laplace.likelihoods import Likelihood, resolve_likelihood
from debiased_laplace.sampling.samplers import Sampler
from debiased_laplace.sampling.splits import Split

#: Prior precisions that :meth:`Laplace.tune` looks at by default.
GRID = torch.logspace(-4, 4, 100, dtype=torch.float64)


def fit(
    model: nn.Module,
    train_loader: Iterable[Any],
    likelihood: str | Likelihood,
    *,
    structure: Structure | None = None,
    parameters: str | Sequence[str] | None = None,
    sampler: Sampler | None = None,
    split: Split | None = None,
    n_data: int | None = None,
    prior_precision: float | Tensor = 1.0,
    prior_mean: float | Tensor = 0.0,
    noise_variance: float | Tensor = 1.0,
    temperature: float = 1.0,
    curvature: str = "ggn",
    estimator: str = "projected",
    mc_samples: int | str | None = "auto",
    separate_bias: bool = False,
    targets_key: str = "labels",
    chunk_size: int | None = None,
    max_batches: int | None = None,
    seed: int = 0,
    previous: Laplace | None = None,
    checkpoint: str | Path | None = None,
    progress_bar: bool = False,
) -> Laplace:
    """Fit a Laplace posterior around a trained model, in one pass over its training data.

    Args:
        model: The trained model, whose outputs are ``[N, C]``; left exactly as it was.
        train_loader: Any iterable of batches ``(inputs, targets)`` or dictionaries, read once.
        likelihood: What the outputs mean: ``"classification"``, ``"regression"``, ``"bernoulli"``, another name of
            :func:`~debiased_laplace.likelihoods.resolve_likelihood`, or an object such as ``Poisson()``.
        structure: Directions of the curvature: ``Kronecker()`` by default, ``LowRank(rank=50)``, ``Diagonal()``,
            ``Full()``, or ``Isotropic()``.
        parameters: Which trainable parameters are uncertain: all, ``"last_layer"``, or names and patterns of
            parameters and modules (:mod:`fnmatch`).
        sampler: Which data to keep for the curvature: 1,024 drawn by importance by default,
            ``PrioritySampler(budget)``; ``UniformSampler(None)`` keeps all.
        split: Which of them choose directions and which measure curvatures along them; cross-fitted by default.
        n_data: Size of the training set, if the loader gives a part of it.
        prior_precision: One number, one for each line of :meth:`Laplace.coverage`, or one for each parameter.
        prior_mean: One number, or one for each parameter ``[D]``.
        noise_variance: Of the observations of a regression, in squared units of the targets.
        temperature: Of the likelihood, in the posterior; below one concentrates it.
        curvature: ``"ggn"``, or ``"empirical_fisher"``.
        estimator: ``"projected"`` (equation 2), or ``"factored"`` (classical K-FAC).
        mc_samples: Random vectors for each datum in the place of the exact loss Hessian, which is None; ``"auto"`` is
            exact up to 32 outputs and one vector above.
        separate_bias: Give biases blocks of their own.
        targets_key: Where dictionary-like batches have their targets.
        chunk_size: Data at a time; bounded by memory by default.
        max_batches: End the pass over the data after so many, of a stream without an end.
        seed: Of all randomness, of the fit and of predictions.
        previous: An earlier posterior of the same model to add these data to.
        checkpoint: File that keeps the state of a long fit, to go on from there when it is called again with the same
            arguments and data.
        progress_bar: Show tqdm bars.

    Returns:
        The posterior, with the prior precision that was given; :meth:`Laplace.tune` chooses it.

    Raises:
        ValueError: If an argument has no meaning, the loader is empty, or targets do not fit the outputs.
        UnsupportedLayerError: If a trainable parameter is not covered; it names it and the remedy.
        NonFiniteError: If outputs or gradients are not finite; it names the layer.

    Example:
        >>> import torch
        >>> import debiased_laplace as dl
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        >>> x, y = torch.randn(60, 4), torch.randint(3, (60,))
        >>> posterior = dl.fit(model, [(x, y)], "classification")
        >>> posterior.predict(x[:2]).probabilities.shape
        torch.Size([2, 3])
    """
    _checks.seed(seed)
    resolved = resolve_likelihood(likelihood)
    fitted = fit_posterior(
        model, train_loader, resolved, structure=structure, parameters=parameters, sampler=sampler, split=split,
        n_data=n_data, prior_precision=prior_precision, prior_mean=prior_mean, noise_variance=noise_variance,
        temperature=temperature, curvature=curvature, estimator=estimator, mc_samples=mc_samples,
        separate_bias=separate_bias, targets_key=targets_key, chunk_size=chunk_size, max_batches=max_batches,
        generator=seed, previous=None if previous is None else previous.fitted, checkpoint=checkpoint,
        progress_bar=progress_bar,
    )  # fmt: skip
    return Laplace(fitted, resolved, fitted.posterior, seed=seed, targets_key=targets_key)
