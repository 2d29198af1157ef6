"""Choosing the prior precision, under laplace-torch's names and with its losses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from tqdm import tqdm

from debiased_laplace import _checks, _data
from debiased_laplace._guards import global_random_state
from debiased_laplace.laplace_torch import noise
from debiased_laplace.laplace_torch.predictions import PredictiveLayer
from debiased_laplace.laplace_torch.settings import plain
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.posterior.certainty import certainty_on
from debiased_laplace.posterior.gaussian import Posterior, standard_normals
from debiased_laplace.posterior.joint import SELECTIONS, TunedPrior, joint_search
from debiased_laplace.posterior.predictive import functional_moments, linearized_samples, weight_samples
from debiased_laplace.posterior.temperature import AS_GOOD, warn_of_no_evidence, warn_the_caller
from debiased_laplace.posterior.tuning import (
    PriorCurve,
    check_losses,
    gaussian_nll,
    grid_search,
    maximise_marginal_likelihood,
    maximise_over_priors,
    maximise_with_noise,
    noise_search,
)

METHODS = ("marglik", "gridsearch")
PRIOR_STRUCTURES = ("scalar", "layerwise", "diag")
Prediction = Tensor | tuple[Tensor, Tensor]
#: Distance from the maximum of the marginal likelihood, in nats, from which on gradient steps that end there warn.
NEAR_ENOUGH = 0.1


class TuningLayer(PredictiveLayer):
    """The layer of :class:`~debiased_laplace.DebiasedLaplace` that tunes the prior."""

    def optimize_prior_precision(
        self,
        pred_type: str = "glm",
        method: str = "marglik",
        n_steps: int | None = None,
        lr: float | None = None,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: str = "scalar",
        val_loader: Iterable[Any] | None = None,
        loss: Metric | Callable[..., Tensor | float] | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: str | None = None,
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
        *,
        tune_temperature: bool = False,
        tune_sigma_noise: bool = False,
        selection: str = "best",
    ) -> None:
        """Choose the prior precision after the fit; on validation data also output temperature or observation noise.

        Args:
            pred_type: What the grid search predicts with: ``"glm"``, ``"nn"`` or ``"linearized"``.
            method: ``"marglik"`` or ``"gridsearch"`` (one pass over ``val_loader`` for ``"glm"``; the curve is kept in
                ``self.curve``, and what was found for several prior precisions or a temperature in ``self.tuned``).
            n_steps: Gradient steps instead of the maximum of the marginal likelihood, as in laplace-torch (Adam on the
                logarithms, 100 if only ``lr`` is given), for ``"layerwise"`` and ``"diag"`` priors of structures other
                than ``"kron"``; a warning tells how far they are from the maximum. By default, and elsewhere, the
                maximum is found.
            lr: Their learning rate, 0.1 if only ``n_steps`` is given.
            init_prior_prec: Where the search starts; with more than one entry it says the structure. A prior precision
                in which there is no maximum stays there.
            prior_structure: ``"scalar"``; ``"layerwise"``, one for each parameter tensor (``"kron"`` and the grid
                search: for each line of :meth:`coverage`); or ``"diag"``, one for each parameter (not for ``"kron"``,
                nor for the grid search). The layerwise grid search minimises the loss over all of them together,
                between the ends of the grid, with ``"glm"``, the default ``loss``, and probit; a part whose value is at
                the upper end has in effect no uncertainty.
            val_loader: Validation batches for ``"gridsearch"``.
            loss: For the grid search, as in laplace-torch: a ``torchmetrics.Metric``, updated with
                ``(probabilities, targets)`` or ``(mean, variance, targets)``, or ``(mean, targets)`` if it takes two;
                or a function of the same over all validation data at once. Each prior precision has a copy of the
                metric. By default the mean negative log predictive probability, in nats.
            log_prior_prec_min: Exponent of the grid's lower end.
            log_prior_prec_max: Exponent of its upper end.
            grid_size: Number of values.
            link_approx: Link of the grid search with ``"glm"``, probit by default; remembered as the default of
                predictions.
            n_samples: Draws for ``link_approx="mc"`` and for samples; the same for every prior precision.
            verbose: Print the result.
            progress_bar: Show a tqdm bar.
            log_prior_prec_base: Base of the exponents.
            tune_temperature: For the grid search of a likelihood with a link, with ``"glm"`` and the default ``loss``:
                choose :attr:`output_temperature` jointly with the prior. ``self.tuned.temperature_alone`` says how far
                a temperature without a posterior would have come. Otherwise the present one is used, as predictions do.
            tune_sigma_noise: For a regression, one prior precision, ``"glm"`` and the default ``loss``: choose
                :attr:`sigma_noise` jointly with the prior, with the ratios between outputs as they are.
                ``"marglik"`` maximises over both. The grid is of prior precisions at the network's own mean squared
                error as noise variance, so that nothing depends on the units of the targets; those of ``self.curve``
                are at the best noise of each.
            selection: For the grid search with ``"glm"`` and the default ``loss``: ``"best"``, or
                ``"one_standard_error"``, the smallest prior precision whose loss is within one standard error of the
                best. Together with ``tune_temperature`` and ``link_approx="mean_field"`` it keeps uncertainty for data
                that are unlike the validation data (docs/results.md).

        Raises:
            ValueError: If an argument has no meaning; the prior precision stays.

        Warns:
            UserWarning: If the best value lies at an edge of the grid (with several, any of them at the lower edge), or
                the validation data do not determine it: then the temperature is the one nearest to 1, and a prior
                precision the smallest, of those that are equally good (within 1e-6 nats); if ``n_steps`` do not reach
                the maximum of the marginal likelihood, or there is none in some of them; if predictions with the
                maximum of the marginal likelihood are far less certain on training data than the network is right
                about them (not after :meth:`load`, which brings no data); if the :attr:`temperature` is not one, at
                which there is no marginal likelihood.
        """
        self._require_fit()
        self._of_the_model_of_the_fit(thorough=True)
        pred_type, method, link = self._check_pred_type(pred_type), plain(method), plain(link_approx)
        structure = plain(prior_structure)
        if structure not in PRIOR_STRUCTURES:
            raise ValueError(f"Expected prior_structure out of {list(PRIOR_STRUCTURES)}, got {structure!r}.")
        if tune_sigma_noise:
            self._check_noise_search(pred_type, method, structure, loss, selection)
        if method == "marglik":
            if tune_temperature:
                raise ValueError(
                    "The marginal likelihood does not depend on the output temperature: expected method='gridsearch' "
                    "with tune_temperature=True, got 'marglik'."
                )
            if val_loader is not None:
                warnings.warn(
                    "val_loader has no effect with method='marglik'. Did you mean 'gridsearch'?", stacklevel=2
                )
            warn_of_no_evidence(self.temperature)
            if tune_sigma_noise:
                self.prior_precision, level = self._maximise_with_noise(init_prior_prec)
                self.sigma_noise = self._noise_of_level(level)
            else:
                self._maximise_marginal_likelihood(init_prior_prec, structure, n_steps, lr, progress_bar)
            self.tuned = None
            if (complaint := self._lack_of_certainty()) is not None:
                warnings.warn(complaint, stacklevel=2)
        elif method == "gridsearch":
            if val_loader is None:
                raise ValueError("Expected a val_loader with validation batches for method='gridsearch', got None.")
            if loss is not None and not callable(loss):
                raise ValueError(f"Expected loss to be a torchmetrics.Metric, a function or None, got {loss!r}.")
            _checks.whole(grid_size, "grid_size")
            _checks.whole(n_samples, "n_samples")
            _checks.positive(log_prior_prec_base, "log_prior_prec_base")
            if not -math.inf < log_prior_prec_min <= log_prior_prec_max < math.inf:
                raise ValueError(
                    "Expected finite log_prior_prec_min <= log_prior_prec_max, got "
                    f"{log_prior_prec_min} and {log_prior_prec_max}."
                )
            if pred_type != "glm" and link not in (None, "mc"):
                raise ValueError(
                    f"Samples have no link approximation: expected link_approx='mc' or none with {pred_type!r}, got "
                    f"{link!r}."
                )
            grid = torch.logspace(
                log_prior_prec_min, log_prior_prec_max, grid_size, base=log_prior_prec_base, dtype=torch.float64
            )
            if selection not in SELECTIONS:
                raise ValueError(f"Expected selection out of {list(SELECTIONS)}, got {selection!r}.")
            self._check_joint_search(pred_type, structure, loss, tune_temperature, selection)
            tuned: TunedPrior | None = None
            with global_random_state(), torch.no_grad():  # a loader's order, and metrics, may draw
                if tune_sigma_noise:
                    found = noise_search(
                        self.network, self.posterior, self.output_likelihood, val_loader, grid,
                        profile=self._noise_profile, targets_key=self.dict_key_y, progress_bar=progress_bar,
                    )  # fmt: skip
                    self.curve, self.sigma_noise = found.curve, self._noise_of_level(found.noise_variance**0.5)
                elif structure == "scalar" and not tune_temperature and selection == "best":
                    self.curve = self._search(pred_type, grid, val_loader, loss, link, n_samples, progress_bar)
                else:
                    tuned = joint_search(
                        self.network, self.posterior, self.output_likelihood, val_loader, grid,
                        per_part=structure == "layerwise", temperature=tune_temperature, link=link or "probit",
                        n_samples=n_samples, seed=self.seed, targets_key=self.dict_key_y, progress_bar=progress_bar,
                        output_temperature=self.output_temperature, noise_variance=self.sigma_noise.square(),
                        selection=selection,
                    )  # fmt: skip
                    self.curve = tuned.curve
            if pred_type == "glm":
                self.link = self.curve.link
            if tuned is None:
                self.prior_precision = self.curve.best
            else:
                self.prior_precision = self._of_parts(tuned.prior_precisions)
                self.output_temperature = tuned.temperature
            self.tuned = tuned
        else:
            raise ValueError(f"Expected method 'marglik' or 'gridsearch', got {method!r}.")
        if verbose:
            and_temperature = f", output temperature {self.output_temperature:.4g}" if tune_temperature else ""
            print(f"Optimized prior precision is {self.prior_precision}{and_temperature}.")

    def _check_noise_search(self, pred_type: str, method: str, structure: str, loss: Any, selection: str) -> None:
        """Raise a ``ValueError`` where the noise cannot be tuned."""
        if self.likelihood != "regression":
            raise ValueError(f"Expected a regression for tune_sigma_noise=True, got {self.likelihood}.")
        if (structure, pred_type, loss, selection) != ("scalar", "glm", None, "best"):
            raise ValueError(
                "tune_sigma_noise=True minimises the negative log predictive density of pred_type='glm', or maximises "
                "the marginal likelihood, over one prior precision: expected prior_structure='scalar', "
                f"selection='best' and no loss, got {method!r}, {structure!r}, pred_type={pred_type!r}, "
                f"selection={selection!r}, loss={loss!r}."
            )

    @staticmethod
    def _check_joint_search(
        pred_type: str, structure: str, loss: Any, tune_temperature: bool, selection: str
    ) -> None:  # fmt: skip
        """Raise a ``ValueError`` for what only the search of one prior precision can do."""
        if structure == "diag":
            raise ValueError(
                "Expected prior_structure 'scalar' or 'layerwise' with method='gridsearch', got 'diag': validation "
                "data cannot choose one for each parameter. Use method='marglik'."
            )
        asked = {
            "prior_structure='layerwise'": structure == "layerwise",
            "tune_temperature=True": tune_temperature,
            f"selection={selection!r}": selection != "best",
        }
        what = next((name for name, wanted in asked.items() if wanted), None)
        if structure == "layerwise" and selection != "best":
            raise ValueError(
                "The one-standard-error rule is for one prior precision: expected 'scalar', got 'layerwise'."
            )
        if what is not None and (pred_type != "glm" or loss is not None):
            got = f"pred_type={pred_type!r}" if pred_type != "glm" else f"loss={loss!r}"
            raise ValueError(
                f"The grid search with {what} minimises the negative log predictive probability of pred_type='glm': "
                f"expected that and no loss, got {got}."
            )

    def _of_parts(self, priors: Tensor) -> Tensor:
        """Prior precisions of the parts of the basis as :attr:`prior_precision` takes them."""
        basis = self._require_fit().posterior.basis
        if basis.groups is None or not len(priors) == len(basis.parts) == len(basis.shapes) > 1:
            return priors
        # As many parts as parameter tensors, in another order perhaps: a vector of this length is meant for tensors.
        by_tensor = basis.per_parameter(priors).split([shape.numel() for shape in basis.shapes.values()])
        return torch.stack([own[0] for own in by_tensor])

    def _noise_of_level(self, level: float) -> Tensor:
        """Standard deviations with a geometric mean, and the ratios between outputs that they have."""
        return self.sigma_noise.detach().double() * (level / noise.level(self.sigma_noise.detach()))

    def _maximise_with_noise(self, initial: Any) -> tuple[Tensor, float]:
        """The best prior precision, and level of the standard deviations of the noise."""
        if len(_checks.prior_precisions(initial)) > 1:
            raise ValueError("Expected one init_prior_prec with tune_sigma_noise=True, got several.")
        prior, noise_variance = maximise_with_noise(self.posterior, self._require_fit().mean_loss, self.n_outputs)
        return prior, noise_variance**0.5

    def _maximise_marginal_likelihood(
        self,
        initial: Any,
        prior_structure: str,
        n_steps: int | None,
        lr: float | None,
        progress_bar: bool,
    ) -> None:
        """In closed form where there is one, otherwise by L-BFGS-B, or by laplace-torch's gradient steps if told to."""
        fitted, kronecker = self._require_fit(), self.hessian_structure == "kron"
        basis = fitted.posterior.basis
        start = _checks.prior_precisions(initial)
        if len(start) > 1:
            self._core_prior(start, fitted)
        elif prior_structure == "diag" and kronecker:
            raise ValueError(
                "Expected prior_structure 'scalar' or 'layerwise' (one for each block), got 'diag': one for each "
                "parameter does not commute with a Kronecker basis."
            )
        elif prior_structure != "scalar":
            lengths = {"layerwise": len(basis.parts) if kronecker else len(basis.shapes), "diag": self._n_chosen or 0}
            start = start.expand(lengths[prior_structure])
        if len(start) == 1 or (kronecker and len(start) == len(basis.parts)):
            self.prior_precision = maximise_marginal_likelihood(self.posterior, per_block=len(start) > 1)
            return
        posterior = self.posterior

        def expand(priors: Tensor) -> Tensor:
            return self._core_prior(priors.to(self._device), fitted)

        if n_steps is None and lr is None:
            found = maximise_over_priors(posterior, start, expand, progress_bar=progress_bar)
            self.prior_precision = found.prior_precisions
            if not found.converged:
                warn_the_caller(
                    "The search for the maximum of the marginal likelihood ended before it was there: it still rises "
                    f"by up to {found.slope:.2g} nats for a prior precision times e. Start from the result with "
                    "init_prior_prec=la.prior_precision."
                )
            if bool(found.undetermined.any()):
                warn_the_caller(
                    f"The marginal likelihood has no maximum in {int(found.undetermined.sum())} of {len(start)} prior "
                    "precisions, of parameters that equal the prior mean or have no curvature: they stay at "
                    "init_prior_prec. Use one for several parameters to have them determined."
                )
            return
        n_steps = 100 if n_steps is None else n_steps
        self._steps_on_the_marginal_likelihood(start, n_steps, 0.1 if lr is None else lr, progress_bar)
        reached = self.prior_precision.double()
        try:
            found = maximise_over_priors(posterior, reached, expand, max_iterations=max(n_steps, 20))
        except ValueError:  # there is none
            return
        if found.gain > NEAR_ENOUGH:
            warn_the_caller(
                f"After {n_steps} steps the marginal likelihood is {float(self.log_marginal_likelihood()):.4g}, "
                f"and {'' if found.converged else 'at least '}{found.gain:.3g} nats below its maximum. Leave n_steps "
                "and lr out to go there, or take more steps or larger ones."
            )

    def _steps_on_the_marginal_likelihood(self, start: Tensor, n_steps: int, lr: float, progress_bar: bool) -> None:
        """laplace-torch's."""
        before = self.prior_precision
        logarithms = start.log().to(self._device, self._float_dtype).requires_grad_()
        optimizer = torch.optim.Adam([logarithms], lr=lr)
        try:
            with torch.inference_mode(False), torch.enable_grad():
                for _ in tqdm(range(n_steps), desc="Marginal likelihood", disable=not progress_bar, leave=False):
                    optimizer.zero_grad()
                    (-self.log_marginal_likelihood(logarithms.exp())).backward()
                    optimizer.step()
            self.prior_precision = logarithms.detach().exp()
        except BaseException:
            self.prior_precision = before
            raise

    def _lack_of_certainty(self) -> str | None:
        """What is wrong with predictions on the training data, if anything is and there are data to tell."""
        sample = self._require_fit().uniform
        if sample is None:
            return None
        with torch.inference_mode(False), global_random_state():
            found = certainty_on(
                self.network, self.posterior, noise.with_noise(self.output_likelihood, self.sigma_noise), sample.data,
                link=self.link or "probit", output_temperature=self.output_temperature,
                noise_variance=self.sigma_noise.square(), seed=self.seed,
            )  # fmt: skip
        if found is None or not found.too_small:
            return None
        return found.message(self.prior_precision, self.sigma_noise)

    def _search(
        self, pred_type: str, grid: Tensor, batches: Iterable[Any], loss: Any, link: str | None, n_samples: int,
        progress_bar: bool,
    ) -> PriorCurve:  # fmt: skip
        posterior, likelihood = replace(self.posterior, prior_precision=torch.ones(1)), self.output_likelihood
        link = (link or "probit") if pred_type == "glm" else "mc"
        if pred_type == "glm" and loss is None and self.sigma_noise.ndim == 0:
            return grid_search(
                self.network, posterior, likelihood, batches, grid, link=link, n_samples=n_samples, seed=self.seed,
                targets_key=self.dict_key_y, progress_bar=progress_bar, output_temperature=self.output_temperature,
            )  # fmt: skip
        likelihood.check_link(link)
        posteriors = [replace(posterior, prior_precision=p.reshape(1)) for p in _checks.prior_precisions(grid)]
        scores = [_score(loss, likelihood, self.sigma_noise.square()) for _ in posteriors]
        if pred_type == "glm":
            pairs = self._glm_predictions(posteriors, batches, link, n_samples)
        else:
            pairs = self._sampled_predictions(posteriors, batches, pred_type, n_samples)
        for index, prediction, targets in tqdm(
            pairs, desc="Prior precision", unit="batch", disable=not progress_bar, leave=False
        ):
            scores[index].update(prediction, targets)
        if scores[0].empty:
            raise ValueError("Expected validation data, got an empty val_loader. A generator can be read only once.")
        losses = torch.tensor([score.compute() for score in scores], dtype=torch.float64)
        check_losses(losses, "Look for NaN in the validation data, or in the loss.")
        curve = PriorCurve(grid, losses, link, AS_GOOD if loss is None else 0.0)  # the scale of another is not known
        curve.warn()
        return curve

    def _glm_predictions(
        self, posteriors: list[Posterior], batches: Iterable[Any], link: str, n_samples: int
    ) -> Iterator[tuple[int, Prediction, Tensor]]:
        """In one pass over the data: projections are computed once for all posteriors."""
        network, likelihood, tau = self.network, self.output_likelihood, self.output_temperature
        generator = torch.Generator().manual_seed(self.seed)
        like = posteriors[0].mean
        normals = standard_normals((n_samples, network.n_outputs), like, generator) if link == "mc" else None
        covariance = likelihood.is_regression or likelihood.needs_covariance(link)
        for inputs, targets, _ in _data.labelled(batches, self.dict_key_y):
            targets = likelihood.prepare_targets(targets, network.n_outputs).to(network.device)
            mean, spread = functional_moments(network, posteriors, inputs, covariance=covariance)
            for index, own in enumerate(spread):
                if likelihood.is_regression:
                    yield index, (mean, own), targets
                else:
                    yield index, likelihood.predictive(mean / tau, own / tau**2, link, normals), targets

    def _sampled_predictions(
        self, posteriors: list[Posterior], batches: Iterable[Any], pred_type: str, n_samples: int
    ) -> Iterator[tuple[int, Prediction, Tensor]]:
        """One posterior after the other, with the same draws: all their samples would not fit into memory."""
        network, likelihood = self.network, self.output_likelihood
        evaluate = linearized_samples if pred_type == "linearized" else weight_samples
        kept = list(batches) if isinstance(batches, Iterator) else batches
        for index, posterior in enumerate(posteriors):
            deviations = posterior.deviations(n_samples, torch.Generator().manual_seed(self.seed))
            for inputs, targets, _ in _data.labelled(kept, self.dict_key_y):
                targets = likelihood.prepare_targets(targets, network.n_outputs).to(network.device)
                samples = evaluate(network, posterior.mean, deviations, inputs)
                if likelihood.is_regression:
                    yield index, (samples.mean(0), samples.var(0)), targets
                else:
                    yield index, self._link(samples).mean(0), targets


class _MeanNegativeLogProbability:
    """The default loss."""

    def __init__(self, likelihood: Likelihood, noise_variance: Tensor) -> None:
        self.likelihood, self.noise_variance = likelihood, noise_variance
        self.total, self.count = 0.0, 0

    @property
    def empty(self) -> bool:
        return self.count == 0

    def update(self, prediction: Prediction, targets: Tensor) -> None:
        if isinstance(prediction, tuple):
            mean, spread = prediction
            variance = spread if spread.ndim == 2 else spread.diagonal(dim1=1, dim2=2)
            losses = gaussian_nll(mean, variance, targets, self.noise_variance)
        else:
            losses = self.likelihood.log_loss(prediction, targets)
        self.total += float(losses.double().sum())
        self.count += len(targets)

    def compute(self) -> float:
        return self.total / self.count


class _MetricLoss:
    """A metric of torchmetrics, in a copy of its own."""

    def __init__(self, metric: Metric, device: torch.device) -> None:
        self.metric = metric.clone().to(device)
        self.metric.reset()
        self.empty = True

    def update(self, prediction: Prediction, targets: Tensor) -> None:
        self.empty = False
        if not isinstance(prediction, tuple):
            self.metric.update(prediction, targets)
            return
        try:
            self.metric.update(*prediction, targets)
        except TypeError:  # a metric of means alone
            self.metric.update(prediction[0], targets)

    def compute(self) -> float:
        return float(self.metric.compute().sum())  # some metrics have a value for each output


class _FunctionLoss:
    """A function of all predictions and targets at once."""

    def __init__(self, function: Callable[..., Tensor | float]) -> None:
        self.function = function
        self.batches: list[tuple[Tensor, ...]] = []

    @property
    def empty(self) -> bool:
        return not self.batches

    def update(self, prediction: Prediction, targets: Tensor) -> None:
        own = prediction if isinstance(prediction, tuple) else (prediction,)
        self.batches.append((*own, targets))

    def compute(self) -> float:
        value = self.function(*(torch.cat(column) for column in zip(*self.batches, strict=True)))
        self.batches.clear()
        return float(value)


def _score(
    loss: Any, likelihood: Likelihood, noise_variance: Tensor
) -> _MeanNegativeLogProbability | _MetricLoss | _FunctionLoss:
    if loss is None:
        return _MeanNegativeLogProbability(likelihood, noise_variance)
    return _MetricLoss(loss, noise_variance.device) if isinstance(loss, Metric) else _FunctionLoss(loss)
