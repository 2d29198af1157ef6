"""Choosing the prior precision of a native posterior, with laplace-torch's methods, structures and losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from debiased_laplace import _checks, _data
from debiased_laplace._guards import warn_the_caller
from debiased_laplace.laplace import Laplace
from debiased_laplace.laplace_torch.predictions import linked, samples_at
from debiased_laplace.laplace_torch.scores import Predicted, score_of
from debiased_laplace.laplace_torch.settings import prior_of_the_posterior
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.posterior.curve import PriorCurve, check_losses
from debiased_laplace.posterior.evidence import (
    maximise_marginal_likelihood,
    maximise_over_priors,
    maximise_with_noise,
)
from debiased_laplace.posterior.gaussian import Posterior, standard_normals
from debiased_laplace.posterior.temperature import AS_GOOD
from debiased_laplace.posterior.top_k import exact_outputs, top_k_moments
from debiased_laplace.posterior.tune import SELECTIONS, Tuned, tune

PRIOR_STRUCTURES = ("scalar", "layerwise", "diag")
#: Distance from the maximum of the marginal likelihood, in nats, from which on gradient steps that end there warn.
NEAR_ENOUGH = 0.1


@dataclass(frozen=True)
class GridSearch:
    """What laplace-torch's arguments ask of a grid search, checked.

    Attributes:
        pred_type: What predictions are made with.
        link: Link of ``"glm"``; None for the default.
        structure: ``"scalar"`` or ``"layerwise"``.
        loss: A metric, a function, or None for the negative log predictive probability.
        grid: ``[R]``, prior precisions.
        n_samples: Draws.
        temperature: Tune the output temperature.
        noise: Tune the observation noise.
        selection: Which of equally good values.
    """

    pred_type: str
    link: str | None
    structure: str
    loss: Any
    grid: Tensor
    n_samples: int
    temperature: bool
    noise: bool
    selection: str

    def __post_init__(self) -> None:
        _checks.whole(self.n_samples, "n_samples")
        if self.loss is not None and not callable(self.loss):
            raise ValueError(f"Expected loss to be a torchmetrics.Metric, a function or None, got {self.loss!r}.")
        if self.pred_type != "glm" and self.link not in (None, "mc"):
            raise ValueError(
                f"Samples have no link approximation: expected link_approx='mc' or none with {self.pred_type!r}, got "
                f"{self.link!r}."
            )
        if self.selection not in SELECTIONS:
            raise ValueError(f"Expected selection out of {list(SELECTIONS)}, got {self.selection!r}.")
        if self.structure == "diag":
            raise ValueError(
                "Expected prior_structure 'scalar' or 'layerwise' with method='gridsearch', got 'diag': validation "
                "data cannot choose one for each parameter. Use method='marglik'."
            )
        if self.structure == "layerwise" and self.selection != "best":
            raise ValueError(
                "The one-standard-error rule is for one prior precision: expected 'scalar', got 'layerwise'."
            )
        asked = {
            "prior_structure='layerwise'": self.structure == "layerwise",
            "tune_temperature=True": self.temperature,
            f"selection={self.selection!r}": self.selection != "best",
        }
        what = next((name for name, wanted in asked.items() if wanted), None)
        if what is not None and (self.pred_type != "glm" or self.loss is not None):
            got = f"pred_type={self.pred_type!r}" if self.pred_type != "glm" else f"loss={self.loss!r}"
            raise ValueError(
                f"The grid search with {what} minimises the negative log predictive probability of pred_type='glm': "
                f"expected that and no loss, got {got}."
            )

    @property
    def is_joint(self) -> bool:
        """Whether more is chosen than one prior precision, or by another rule than the smallest loss."""
        return self.temperature or self.structure == "layerwise" or self.selection != "best"

    def on(self, native: Laplace, batches: Iterable[Any], regression: bool, progress_bar: bool) -> Tuned:
        """Search with a posterior.

        Args:
            native: Its prior precision has no effect.
            batches: Validation data.
            regression: Whether a metric takes mean and covariance of the outputs.
            progress_bar: Show a tqdm bar.
        """
        if self.pred_type == "glm" and self.loss is None:
            return tune(
                native.network, native.posterior, native.likelihood, batches, self.grid, link=self.link,
                temperature=self.temperature, noise=self.noise, per_part=self.structure == "layerwise",
                selection=self.selection, output_temperature=native.output_temperature, n_samples=self.n_samples,
                seed=native.seed, targets_key=native.targets_key, progress_bar=progress_bar,
            )  # fmt: skip
        curve = self._curve(native, batches, regression, progress_bar)
        best = torch.tensor([curve.best], dtype=torch.float64)
        unknown = (native.output_temperature, math.nan)
        return Tuned(best, native.output_temperature, float(curve.losses[curve.best_index]), curve, None, unknown)

    def _curve(
        self, native: Laplace, batches: Iterable[Any], regression: bool, progress_bar: bool
    ) -> PriorCurve:  # fmt: skip
        """Of any loss and kind of prediction."""
        link = (self.link or native.likelihood.links[0]) if self.pred_type == "glm" else "mc"
        native.likelihood.check_link(link)
        posteriors = [
            replace(native.posterior, prior_precision=p.reshape(1)) for p in _checks.prior_precisions(self.grid)
        ]
        scores = [score_of(self.loss, native.network.device) for _ in posteriors]
        if self.pred_type == "glm":
            predictions = _glm_predictions(native, posteriors, batches, link, self.n_samples, regression)
        else:
            predictions = _sampled_predictions(
                native, posteriors, batches, self.pred_type, self.n_samples, regression, scored=self.loss is None
            )
        for index, prediction, targets in tqdm(
            predictions, desc="Prior precision", unit="batch", disable=not progress_bar, leave=False
        ):
            scores[index].update(prediction, targets)
        if scores[0].empty:
            raise ValueError("Expected validation data, got an empty val_loader. A generator can be read only once.")
        losses = torch.tensor([score.compute() for score in scores], dtype=torch.float64)
        check_losses(losses, "Look for NaN in the validation data, or in the loss.")
        # The scale of another loss is not known.
        curve = PriorCurve(self.grid, losses, link, AS_GOOD if self.loss is None else 0.0)
        curve.warn()
        return curve


def checked_grid(smallest: float, largest: float, size: int, base: float) -> Tensor:
    """The grid of laplace-torch's arguments, ``[size]`` in float64, or a ``ValueError``."""
    _checks.whole(size, "grid_size")
    _checks.positive(base, "log_prior_prec_base")
    if not -math.inf < smallest <= largest < math.inf:
        raise ValueError(
            f"Expected finite log_prior_prec_min <= log_prior_prec_max, got {smallest} and {largest}."
        )  # fmt: skip
    return torch.logspace(smallest, largest, size, base=base, dtype=torch.float64)


def check_noise_search(
    likelihood: Likelihood, pred_type: str, method: str, structure: str, loss: Any, selection: str
) -> None:  # fmt: skip
    """Raise a ``ValueError`` where the noise cannot be tuned."""
    if not likelihood.has_noise:
        name = likelihood.laplace_torch_name
        raise ValueError(f"Expected a regression for tune_sigma_noise=True, got {name}.")
    if (structure, pred_type, loss, selection) != ("scalar", "glm", None, "best"):
        raise ValueError(
            "tune_sigma_noise=True minimises the negative log predictive density of pred_type='glm', or maximises "
            "the marginal likelihood, over one prior precision: expected prior_structure='scalar', "
            f"selection='best' and no loss, got {method!r}, {structure!r}, pred_type={pred_type!r}, "
            f"selection={selection!r}, loss={loss!r}."
        )


def _glm_predictions(
    native: Laplace, posteriors: list[Posterior], batches: Iterable[Any], link: str, n_samples: int, regression: bool
) -> Iterator[tuple[int, Predicted, Tensor]]:
    """In one pass over the data, as a metric takes them: projections are computed once for all posteriors."""
    network, likelihood, tau = native.network, native.likelihood, native.output_temperature
    generator = torch.Generator().manual_seed(native.seed)
    like = posteriors[0].mean
    normals = standard_normals((n_samples, network.n_outputs), like, generator) if link == "mc" else None
    covariance = regression or likelihood.needs_covariance(link)
    k = network.n_outputs if regression else exact_outputs(network, likelihood)
    for inputs, targets, _ in _data.labelled(batches, native.targets_key):
        targets = likelihood.prepare_targets(targets, network.n_outputs).to(network.device)
        mean, covariances = top_k_moments(network, posteriors, likelihood, inputs, k, covariance=covariance)
        for index, of_posterior in enumerate(covariances):
            if regression:
                yield index, (mean, of_posterior), targets
            else:
                yield index, likelihood.predictive(mean / tau, of_posterior / tau**2, link, normals), targets


def _sampled_predictions(
    native: Laplace, posteriors: list[Posterior], batches: Iterable[Any], pred_type: str, n_samples: int,
    regression: bool, *, scored: bool,
) -> Iterator[tuple[int, Predicted, Tensor]]:  # fmt: skip
    """One posterior after the other, with the same draws: all their samples would not fit into memory.

    With ``scored`` the negative log predictive probabilities ``[N]`` instead of predictions.
    """
    network, likelihood, tau = native.network, native.likelihood, native.output_temperature
    kept = list(batches) if isinstance(batches, Iterator) else batches
    for index, posterior in enumerate(posteriors):
        deviations = posterior.deviations(n_samples, torch.Generator().manual_seed(native.seed))
        for inputs, targets, _ in _data.labelled(kept, native.targets_key):
            targets = likelihood.prepare_targets(targets, network.n_outputs).to(network.device)
            samples = samples_at(native, deviations, inputs, pred_type)
            if scored:
                losses = likelihood.negative_log_predictive_of_samples(
                    samples / tau, targets, posterior.noise_variance
                )  # fmt: skip
                yield index, losses, targets
            elif regression:
                yield index, (samples.mean(0), samples.var(0)), targets
            else:
                yield index, linked(native, samples).mean(0), targets


def noise_by_marginal_likelihood(native: Laplace, initial: Any) -> tuple[Tensor, float]:
    """The best prior precision, and level of the standard deviations of the noise."""
    if len(_checks.prior_precisions(initial)) > 1:
        raise ValueError("Expected one init_prior_prec with tune_sigma_noise=True, got several.")
    prior, noise_variance = maximise_with_noise(native.posterior, native.fitted.mean_loss, native.network.n_outputs)
    return prior, noise_variance**0.5


def by_marginal_likelihood(
    native: Laplace, initial: Any, structure: str, kronecker: bool, n_chosen: int, n_steps: int | None,
    lr: float | None, dtype: torch.dtype, progress_bar: bool,
) -> Tensor:  # fmt: skip
    """Prior precisions in closed form where there is one, otherwise by L-BFGS-B, or by gradient steps if told to.

    Args:
        native: Its prior precision has no effect.
        initial: Where the search starts; with more than one entry it says the structure.
        structure: One of :data:`PRIOR_STRUCTURES`.
        kronecker: Whether directions mix parameters.
        n_chosen: Number of uncertain parameters.
        n_steps: Of laplace-torch's Adam on the logarithms.
        lr: Its learning rate.
        dtype: Precision of the steps.
        progress_bar: Show a tqdm bar.
    """
    fitted, posterior = native.fitted, native.posterior
    basis = posterior.basis
    start = _checks.prior_precisions(initial)
    if len(start) > 1:
        prior_of_the_posterior(start, fitted)
    elif structure == "diag" and kronecker:
        raise ValueError(
            "Expected prior_structure 'scalar' or 'layerwise' (one for each block), got 'diag': one for each "
            "parameter does not commute with a Kronecker basis."
        )
    elif structure != "scalar":
        lengths = {"layerwise": len(basis.parts) if kronecker else len(basis.shapes), "diag": n_chosen}
        start = start.expand(lengths[structure])
    if len(start) == 1 or (kronecker and len(start) == len(basis.parts)):
        return maximise_marginal_likelihood(posterior, per_block=len(start) > 1)

    def expand(priors: Tensor) -> Tensor:
        return prior_of_the_posterior(priors.to(native.network.device), fitted)

    if n_steps is None and lr is None:
        best = maximise_over_priors(posterior, start, expand, progress_bar=progress_bar)
        if not best.converged:
            warn_the_caller(
                "The search for the maximum of the marginal likelihood ended before it was there: it still rises "
                f"by up to {best.slope:.2g} nats for a prior precision times e. Start from the result with "
                "init_prior_prec=la.prior_precision."
            )
        if bool(best.undetermined.any()):
            warn_the_caller(
                f"The marginal likelihood has no maximum in {int(best.undetermined.sum())} of {len(start)} prior "
                "precisions, of parameters that equal the prior mean or have no curvature: they stay at "
                "init_prior_prec. Use one for several parameters to have them determined."
            )
        return best.prior_precisions
    n_steps = 100 if n_steps is None else n_steps
    reached = _gradient_steps(native, start, expand, n_steps, 0.1 if lr is None else lr, dtype, progress_bar)
    try:
        best = maximise_over_priors(posterior, reached.double(), expand, max_iterations=max(n_steps, 20))
    except ValueError:  # there is none
        return reached
    if best.gain > NEAR_ENOUGH:
        at_the_end = replace(posterior, prior_precision=expand(reached.double()).double())
        value = float(at_the_end.log_marginal_likelihood(native.log_likelihood()))
        warn_the_caller(
            f"After {n_steps} steps the marginal likelihood is {value:.4g}, "
            f"and {'' if best.converged else 'at least '}{best.gain:.3g} nats below its maximum. Leave n_steps "
            "and lr out to go there, or take more steps or larger ones."
        )
    return reached


def _gradient_steps(
    native: Laplace, start: Tensor, expand: Callable[[Tensor], Tensor], n_steps: int, lr: float, dtype: torch.dtype,
    progress_bar: bool,
) -> Tensor:  # fmt: skip
    """laplace-torch's."""
    logarithms = start.log().to(native.network.device, dtype).requires_grad_()
    optimizer = torch.optim.Adam([logarithms], lr=lr)
    with torch.inference_mode(False), torch.enable_grad():
        for _ in tqdm(range(n_steps), desc="Marginal likelihood", disable=not progress_bar, leave=False):
            optimizer.zero_grad()
            there = replace(native.posterior, prior_precision=expand(logarithms.exp()).double())
            (-there.log_marginal_likelihood(0.0).to(dtype)).backward()
            optimizer.step()
    return logarithms.detach().exp()


def warn_of_unused_validation_data(val_loader: Any) -> None:
    """Validation data have no part in the marginal likelihood."""
    if val_loader is not None:
        warn_the_caller("val_loader has no effect with method='marglik'. Did you mean 'gridsearch'?")


def lack_of_certainty(native: Laplace, prior_precision: Tensor, sigma_noise: Tensor) -> str | None:
    """What is wrong with predictions on the training data, if anything is and there are data to tell."""
    certainty = native.certainty(link=native.link or native.likelihood.links[0], noise_variance=sigma_noise.square())
    if certainty is None or not certainty.too_small:
        return None
    more, otherwise = "", ""
    if certainty.is_regression:
        more, otherwise = ", tune_sigma_noise=True", ' Without such data: method="marglik", tune_sigma_noise=True.'
    remedy = f'optimize_prior_precision(method="gridsearch", val_loader=...{more})'
    return certainty.message(prior_precision, sigma_noise, remedy, otherwise)
