"""Estimators of scikit-learn around a network: fit and tune a posterior, predict probabilities or standard deviations.

They pass scikit-learn's own ``check_estimator``, so that pipelines, grid searches, cross-validation and calibration
curves take them as they take any other estimator. A long module: both have all but their targets in common.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from debiased_laplace import _checks
from debiased_laplace._guards import global_random_state, gradients_enabled
from debiased_laplace.curvature.structures import Structure
from debiased_laplace.integrations import require
from debiased_laplace.laplace import Laplace, fit
from debiased_laplace.likelihoods import Likelihood, resolve_likelihood

require("sklearn", "sklearn")

from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin  # noqa: E402
from sklearn.utils import check_random_state  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402

__all__ = ["LaplaceClassifier", "LaplaceRegressor", "Standardised"]

#: A module, or what makes one for so many features and outputs.
Module = nn.Module | Callable[[int, int], nn.Module]

#: Rows of a prediction at a time.
ROWS = 1024


class Standardised(nn.Module):
    """A network of inputs, and for outputs, of mean zero and variance one.

    Args:
        network: ``[N, F] -> [N, C]``.
        inputs: ``[N, F]``, whose mean and standard deviation are taken out of the inputs.
        targets: ``[N, C]``, whose mean and standard deviation are given to the outputs; None to leave them.
    """

    mean_of_inputs: Tensor
    deviation_of_inputs: Tensor
    mean_of_outputs: Tensor
    deviation_of_outputs: Tensor

    def __init__(self, network: nn.Module, inputs: Tensor, targets: Tensor | None = None) -> None:
        super().__init__()
        self.network = network
        for name, data in {"inputs": inputs, "outputs": targets}.items():
            mean, deviation = torch.zeros(()), torch.ones(())
            if data is not None:
                mean, deviation = data.mean(0), data.std(0, correction=0)
            self.register_buffer(f"mean_of_{name}", mean)
            self.register_buffer(f"deviation_of_{name}", torch.where(deviation > 0, deviation, 1.0))

    def forward(self, inputs: Tensor) -> Tensor:
        """``[N, F] -> [N, C]``, in the units of the targets."""
        outputs = self.network((inputs - self.mean_of_inputs) / self.deviation_of_inputs)
        return self.mean_of_outputs + self.deviation_of_outputs * outputs


class _LaplaceEstimator(BaseEstimator):
    """What both estimators have in common: everything but what the targets are."""

    def __init__(
        self,
        module: Module | None = None,
        *,
        epochs: int = 200,
        lr: float = 0.01,
        batch_size: int = 64,
        weight_decay: float = 0.0,
        parameters: str | list[str] | None = None,
        structure: Structure | None = None,
        validation_fraction: float = 0.2,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.module = module
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.parameters = parameters
        self.structure = structure
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    def _fit(self, inputs: Tensor, targets: Tensor, n_outputs: int, *, of_classes: bool) -> None:
        """Train the network if need be, and fit and tune the posterior.

        Args:
            inputs: ``[N, ...]``.
            targets: Class indices ``[N]``, or numbers ``[N, K]``.
            n_outputs: Classes, or K.
            of_classes: Whether the targets are class indices.
        """
        self._check_settings()
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        generator = torch.Generator().manual_seed(seed)
        held_out = _held_out(targets if of_classes else torch.zeros(len(targets)), self.validation_fraction, generator)
        with global_random_state():
            torch.manual_seed(seed)
            module = self._network(inputs[~held_out], None if of_classes else targets[~held_out], n_outputs)
            inputs, likelihood = _like(module, inputs), "regression"
            if of_classes:
                likelihood = _likelihood_of_classes(module, inputs, n_outputs)
            targets = targets.to(inputs.device) if likelihood == "classification" else _like(module, targets)
            train, validation = (inputs[~held_out], targets[~held_out]), (inputs[held_out], targets[held_out])
            self._train(module, *train, resolve_likelihood(likelihood), generator)
        posterior = fit(
            module, _batches(*train), likelihood, parameters=self.parameters, structure=self.structure, seed=seed
        )
        self.posterior_: Laplace = posterior.tune(_batches(*validation) if len(validation[0]) else None)

    def _check_settings(self) -> None:
        _checks.function(self.module, "module")
        _checks.whole(self.epochs, "epochs", at_least=0)
        _checks.whole(self.batch_size, "batch_size")
        _checks.positive(self.lr, "lr")
        if self.module is None and not self.epochs:
            raise ValueError("Expected a trained module with epochs=0, got None. Pass module=, or more epochs.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"Expected validation_fraction from 0 to below 1, got {self.validation_fraction!r}.")

    def _network(self, inputs: Tensor, numbers: Tensor | None, n_outputs: int) -> nn.Module:
        """A network of this estimator's own, in evaluation mode; the user's module is copied.

        Args:
            inputs: ``[N, ...]``, to train on.
            numbers: Targets of a regression, ``[N, K]``.
            n_outputs: C.
        """
        if isinstance(self.module, nn.Module):
            return copy.deepcopy(self.module).eval()
        n_features = inputs[0].numel()
        if self.module is not None:
            return self.module(n_features, n_outputs).eval()
        network = nn.Sequential(nn.Linear(n_features, 64), nn.Tanh(), nn.Linear(64, n_outputs))
        return Standardised(network, inputs, numbers).double().eval()

    def _train(
        self, module: nn.Module, inputs: Tensor, targets: Tensor, likelihood: Likelihood, generator: torch.Generator
    ) -> None:
        """Adam on the mean loss, in batches of another order in every epoch."""
        if not self.epochs:
            return
        trainable = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=self.lr, weight_decay=self.weight_decay)
        unit = module.deviation_of_outputs if isinstance(module, Standardised) and likelihood.has_noise else None

        def loss(outputs: Tensor, observed: Tensor) -> Tensor:
            """In the unit of the module, so that no gradient is too small for Adam."""
            if unit is None:
                return likelihood.loss(outputs, observed)
            return likelihood.loss(outputs / unit, observed.reshape(outputs.shape) / unit)

        module.train()
        with gradients_enabled():
            for _ in range(self.epochs):
                batches = torch.randperm(len(inputs), generator=generator).split(self.batch_size)
                for index in batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches:
                    optimizer.zero_grad()
                    outputs = module(inputs[index]).reshape(len(index), -1)
                    loss(outputs, targets[index]).mean().backward()
                    optimizer.step()
        optimizer.zero_grad()
        module.eval()

    def _of_inputs(self) -> dict[str, Any]:
        """How scikit-learn is to look at inputs; those of a module may be images, ``[N, ...]``."""
        return {"dtype": [np.float64, np.float32], "allow_nd": self.module is not None}

    def _predicted(self, x: Any, *names: str) -> list[np.ndarray]:
        """Attributes of the predictive distributions, ``[N, C]`` each, float64."""
        check_is_fitted(self)
        validated = validate_data(self, x, reset=False, **self._of_inputs())
        rows = _like(self.posterior_.network.snapshot.module, _tensor(validated)).split(ROWS)
        predictions = [self.posterior_.predict(part) for part in rows]
        return [torch.cat([getattr(part, name) for part in predictions]).double().cpu().numpy() for name in names]


class LaplaceClassifier(ClassifierMixin, _LaplaceEstimator):
    """A classifier with calibrated probabilities: a network, and a Laplace posterior around it.

    Args:
        module: A network ``[N, F] -> [N, C]`` whose outputs are the logits of the classes in their sorted order, or one
            logit of the second of two; or a function that makes one for so many features and outputs; or None for one
            hidden layer of 64 units on standardised inputs. It is copied, and never changed itself.
        epochs: Of training with Adam, from the weights that a module has; 0 for a module that is trained already.
        lr: Of that training.
        batch_size: Of that training.
        weight_decay: Of that training.
        parameters: Which parameters are uncertain, as for :func:`debiased_laplace.fit`: all, or ``"last_layer"``, ...
        structure: Of the curvature, as for :func:`debiased_laplace.fit`.
        validation_fraction: Of the data of every class, which are not trained on, and choose the prior precision and
            the temperature. With 0, or where that is less than one datum of every class, the marginal likelihood
            chooses the prior precision on all data.
        random_state: Of weights, batches and validation data.

    Attributes:
        classes_: ``[C]``, sorted.
        posterior_: The :class:`~debiased_laplace.Laplace` posterior; its ``predict`` has more.
        n_features_in_: F.
        feature_names_in_: ``[F]``, if the inputs have names of columns.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from debiased_laplace.integrations.sklearn import LaplaceClassifier
        >>> x, y = load_iris(return_X_y=True)
        >>> LaplaceClassifier(epochs=50, random_state=0).fit(x, y).predict_proba(x[:2]).shape
        (2, 3)
    """

    def fit(self, X: Any, y: Any) -> LaplaceClassifier:
        """Train, if need be, and fit and tune the posterior.

        Args:
            X: ``[N, F]``; of a module also ``[N, ...]``.
            y: Labels of the classes, ``[N]``, numbers or strings.

        Raises:
            ValueError: If there are fewer than two classes, or the module has another number of outputs.
        """
        X, y = validate_data(self, X, y, **self._of_inputs())
        check_classification_targets(y)
        self.classes_, indices = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"Expected targets of at least two classes, got one class, {self.classes_[0]!r}.")
        self._fit(_tensor(X), torch.from_numpy(indices.reshape(-1)), len(self.classes_), of_classes=True)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, integrated over the posterior, ``[N, C]``."""
        (probabilities,) = self._predicted(X, "probabilities")
        if probabilities.shape[1] == 1:
            return np.concatenate([1 - probabilities, probabilities], 1)
        return probabilities

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Their logarithms, ``[N, C]``."""
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))

    def decision_function(self, X: Any) -> np.ndarray:
        """Log-odds of the second of two classes, ``[N]``, or log-probabilities of more, ``[N, C]``."""
        logarithms = self.predict_log_proba(X)
        return logarithms[:, 1] - logarithms[:, 0] if logarithms.shape[1] == 2 else logarithms

    def predict(self, X: Any) -> np.ndarray:
        """The most probable classes, ``[N]``."""
        probable = self.predict_proba(X).argmax(1)
        return self.classes_[probable]


class LaplaceRegressor(RegressorMixin, _LaplaceEstimator):
    """A regressor with standard deviations: a network, and a Laplace posterior around it.

    Args:
        module: A network ``[N, F] -> [N, K]``, or ``[N]``, whose outputs are means of the targets, or what makes one;
            None for one hidden layer of 64 units on standardised inputs and targets.
        epochs: As of :class:`LaplaceClassifier`, and so ``lr`` to ``structure``.
        lr: Likewise.
        batch_size: Likewise.
        weight_decay: Likewise.
        parameters: Likewise.
        structure: Likewise.
        validation_fraction: Of the data, which are not trained on and choose prior precision and noise; or else, with 0
            or where it is less than a datum, the marginal likelihood does.
        random_state: Of weights, batches and validation data.

    Attributes:
        posterior_: The :class:`~debiased_laplace.Laplace` posterior; its ``predict`` has more.
        n_features_in_: F.
        feature_names_in_: ``[F]``, if the inputs have names of columns.

    Example:
        >>> import numpy as np
        >>> from debiased_laplace.integrations.sklearn import LaplaceRegressor
        >>> x = np.linspace(-3, 3, 100)[:, None]
        >>> model = LaplaceRegressor(epochs=50, random_state=0).fit(x, np.sin(x[:, 0]))
        >>> mean, deviation = model.predict(x[:5], return_std=True)
        >>> mean.shape, deviation.shape
        ((5,), (5,))
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> LaplaceRegressor:
        """Train, if need be, and fit and tune the posterior.

        Args:
            X: ``[N, F]``; of a module also ``[N, ...]``.
            y: Numbers ``[N]`` or ``[N, K]``.
        """
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, **self._of_inputs())
        self._one_number = y.ndim == 1
        targets = _tensor(y.astype(np.float64)).reshape(len(y), -1)
        self._fit(_tensor(X), targets, targets.shape[1], of_classes=False)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Means of the targets, ``[N]`` or ``[N, K]`` as they were given.

        Args:
            X: ``[N, F]``; of a module also ``[N, ...]``.
            return_std: Also their standard deviations, of the weights' uncertainty and the noise together.
        """
        moments = self._predicted(X, "mean", "variance")
        mean, variance = (values[:, 0] if self._one_number else values for values in moments)
        return (mean, np.sqrt(variance)) if return_std else mean


def _tensor(values: np.ndarray) -> Tensor:
    """A copy: arrays may be read-only, or of negative strides."""
    return torch.tensor(np.ascontiguousarray(values))


def _like(module: nn.Module, values: Tensor) -> Tensor:
    """Numbers in the precision and on the device of a module's parameters."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    return values.to(parameter.device, parameter.dtype)


def _batches(inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(ROWS), targets.split(ROWS), strict=True))


def _held_out(strata: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Which data are for validation, ``[N]``: that fraction of every stratum, rounded down."""
    held_out = torch.zeros(len(strata), dtype=torch.bool)
    for stratum in strata.unique():
        members = (strata == stratum).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        held_out[members[order[: int(fraction * len(members))]]] = True
    return held_out


def _likelihood_of_classes(module: nn.Module, inputs: Tensor, n_classes: int) -> str:
    """What a module's outputs say of classes: one logit for each, or one of the second of two."""
    with torch.no_grad():
        n_outputs = module(inputs[:1]).numel()
    if n_outputs == 1 and n_classes == 2:
        return "bernoulli"
    if n_outputs != n_classes:
        raise ValueError(
            f"Expected a module with one output for each of the {n_classes} classes of the targets, got {n_outputs} "
            "outputs. Pass a function of (n_features, n_outputs) that makes the module, or targets of all classes."
        )
    return "classification"
