"""laplace-torch as a baseline: fitted to all training data by laplace-torch itself, tuned over the same grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _data
from debiased_laplace.evaluation.predictors import edges
from debiased_laplace.evaluation.predictors.prediction import Prediction
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.posterior.curve import PriorCurve
from debiased_laplace.posterior.noise import best_noise

#: All layers are asked for up to this many parameters: its predictions hold Jacobians of all outputs.
PEER_PARAMETERS = 20_000


class PeerPredictor:
    """A fitted posterior of laplace-torch; classification by its probit link, regression by its variances."""

    def __init__(self, la: Any, regression: bool = False) -> None:
        self.la, self.regression = la, regression

    def __call__(self, inputs: _data.Inputs) -> Prediction:
        """Predict a batch."""
        inputs = _data.to_device(inputs, self.la._device)
        if not self.regression:  # its moments and its link, in double precision: single rounds small ones to zero
            mean, covariance = self.la._glm_predictive_distribution(inputs)
            variances = covariance.detach().double().diagonal(dim1=1, dim2=2)
            return Prediction(probabilities=Categorical().predictive(mean.detach().double(), variances, "probit"))
        mean, variance = self.la(inputs)
        variance = (
            variance.reshape(mean.shape) if variance.numel() == mean.numel() else variance.diagonal(dim1=1, dim2=2)
        )
        return Prediction(mean=mean.detach(), variance=variance.detach() + self.la.sigma_noise.detach().square())


def fitted_peer(
    model: nn.Module, likelihood: str, structure: str, train: Iterable[Any], n_data: int | None,
    validation: Callable[[], Iterable[Any]],
) -> tuple[Any, str]:  # fmt: skip
    """laplace-torch's posterior over all layers where that is feasible, otherwise over the last one, and which it is.

    Raises:
        Exception: Of any kind, if it fails over the last layer too.
    """
    from laplace import Laplace

    data = _Sized(train, n_data)
    small = sum(p.numel() for p in model.parameters() if p.requires_grad) <= PEER_PARAMETERS
    failed = "too many parameters for its Jacobians"
    for where in ("all", "last_layer") if small else ("last_layer",):
        try:
            la = Laplace(model, likelihood, where, structure)
            la.fit(data)  # type: ignore[arg-type]
            inputs, _, _ = next(iter(_data.labelled(validation())))
            _moments(la, _data.take(inputs, slice(0, 2)))
            return la, "all layers" if where == "all" else f"the last layer ({failed})"
        except Exception as error:
            if where == "last_layer":
                raise
            failed = f"over all layers it fails with {type(error).__name__}"
    raise AssertionError


def _moments(la: Any, inputs: Any) -> tuple[Tensor, Tensor]:
    """Jacobians and outputs, by laplace-torch's code."""
    inputs = _data.to_device(inputs, la._device)
    last = type(la).__name__.endswith("LLLaplace")
    return la.backend.last_layer_jacobians(inputs) if last else la.backend.jacobians(inputs)


def tune_peer(la: Any, validation: Iterable[Any], grid: Tensor, regression: bool) -> dict[str, Any]:
    """Choose its prior precision, and the noise of a regression; Jacobians are computed once for the whole grid."""
    means, variances, labels = [], [], []
    batches = list(_data.labelled(validation))
    if regression:  # the grid is one at the noise of the network alone, as ours
        alone = [(_moments(la, inputs)[1].detach().double(), targets) for inputs, targets, _ in batches]
        errors = torch.cat([mean - targets.reshape(mean.shape).to(mean) for mean, targets in alone])
        grid = grid * float(errors.square().mean())
    for inputs, targets, _ in batches:
        jacobians, mean = _moments(la, inputs)
        of_grid = []
        for value in grid.tolist():
            la.prior_precision = value
            of_grid.append(la.functional_variance(jacobians).detach().diagonal(dim1=-2, dim2=-1))
        means.append(mean.detach().double())
        variances.append(torch.stack(of_grid).double())
        labels.append(targets.to(mean.device))
    mean, variance, targets = torch.cat(means), torch.cat(variances, 1), torch.cat(labels)
    if regression:
        noise, losses = best_noise(mean, variance, targets.reshape(mean.shape).double())
        best = PriorCurve(grid, losses.cpu(), "probit").best_index
        la.sigma_noise, la.prior_precision = float(noise[best].sqrt()), float(grid[best] / noise[best])
        return {
            "edges": edges.of_prior([float(grid[best])], grid),
            "prior_precision": float(la.prior_precision),
            "noise": float(la.sigma_noise),
            "validation_nll": float(losses[best]),
        }
    likelihood = Categorical()
    losses = likelihood.log_loss(likelihood.predictive(mean, variance, "probit"), targets.long()).mean(-1)
    la.prior_precision = prior = PriorCurve(grid, losses.cpu(), "probit").best  # by the rule of all methods
    at_the_end = edges.of_prior([prior], grid)
    return {"prior_precision": prior, "validation_nll": float(losses.min()), "edges": at_the_end}


class _Sized:
    """Batches with the ``dataset`` that laplace-torch asks the size of."""

    def __init__(self, loader: Iterable[Any], n_data: int | None) -> None:
        self.batches = [
            (inputs, targets if targets.is_floating_point() else targets.long())
            for inputs, targets, _ in _data.labelled(loader)
        ]
        self.dataset = range(sum(len(targets) for _, targets in self.batches) if n_data is None else n_data)

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
