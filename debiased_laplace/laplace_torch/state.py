"""State dictionaries, files, copies and pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from debiased_laplace import _checks, _store
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.laplace_torch.settings import REWARD_MODELING
from debiased_laplace.laplace_torch.tuning import TuningLayer
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

STATE_FORMAT = 2
LIKELIHOODS: dict[str, Any] = {
    "Categorical": Categorical, "Gaussian": Gaussian, "Bernoulli": Bernoulli, REWARD_MODELING: lambda: REWARD_MODELING,
}  # fmt: skip


class StateLayer(TuningLayer):
    """The layer of :class:`~debiased_laplace.DebiasedLaplace` that is stored and copied."""

    #: Classes by name, to make the one that a file was written from.
    _classes: ClassVar[dict[str, type[StateLayer]]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs; tensors and plain Python objects only."""
        fitted = self._require_fit()
        self._of_the_model_of_the_fit(thorough=True)
        return self._state(fitted)

    def _state(self, fitted: Fit) -> dict[str, Any]:
        state = {
            "format": STATE_FORMAT,
            "cls_name": type(self).__name__,
            "subset_of_weights": self.subset_of_weights,
            "hessian_structure": self.hessian_structure,
            "likelihood": self._likelihood_name(),
            "fit": fitted.state(),
            "parameters": list(fitted.network.shapes),
            "trainable": self._trainable,
            "indices": self._indices,
            "n_data": self.n_data,
            "n_outputs": self.n_outputs,
            "loss": self.loss,
            "prior_precision": self.prior_precision.detach(),
            "prior_mean": self.prior_mean,
            "sigma_noise": self.sigma_noise.detach(),
            "noise_profile": self._noise_profile,
            "temperature": float(self.temperature),
            "output_temperature": self.output_temperature,
            "enable_backprop": self.enable_backprop,
            "dict_key_x": self.dict_key_x,
            "dict_key_y": self.dict_key_y,
            "separate_bias": self.separate_bias,
            "feature_reduction": self.feature_reduction,
            "seed": self.seed,
            "link": self.link,
        }
        return _pytree.tree_map_only(Tensor, torch.clone, state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a fit of the same model, with its settings.

        Raises:
            ValueError: If the state is of another format, structure, subset, likelihood or model; it says what differs,
                and this object stays as it was.
        """
        for key, own in (
            ("format", STATE_FORMAT),
            ("subset_of_weights", self.subset_of_weights),
            ("hessian_structure", self.hessian_structure),
            ("likelihood", self._likelihood_name()),
        ):
            if state_dict.get(key) != own:
                raise ValueError(f"Expected a state with {key} {own!r}, got {state_dict.get(key)!r}.")
        settings = {name: value for name, value in state_dict.items() if name != "fit"}
        for name, value in _store.tensors_of(settings).items():
            _checks.finite(value, f"the {name} of the state", "It was changed: make it again.")
        fitted = Fit.restore(self.model, state_dict["fit"])
        if self._names is not None and list(fitted.network.shapes) != self._names:
            raise ValueError(
                f"Expected a state of the parameters {self._names}, got one of {list(fitted.network.shapes)}."
            )
        entries, theirs = _listed(self._indices), _listed(state_dict["indices"])
        if entries != theirs:
            raise ValueError(
                f"Expected a state of the entries {_few(entries)} of the parameter vector, got one of {_few(theirs)}."
            )
        before = self._prior_precision, self._prior_mean
        self._prior_precision, self._prior_mean = (
            state_dict[key].to(self._device, copy=True) for key in ("prior_precision", "prior_mean")
        )
        try:
            self._adopt(fitted, state_dict["noise_profile"])
        except BaseException:
            self._prior_precision, self._prior_mean = before
            raise
        for key in ("sigma_noise", "temperature", "enable_backprop", "dict_key_x", "dict_key_y", "separate_bias",
                    "seed", "link"):  # fmt: skip
            setattr(self, key, state_dict[key])
        self.output_temperature = state_dict.get("output_temperature", 1.0)  # earlier states have neither
        self.feature_reduction = state_dict.get("feature_reduction")

    def _likelihood_name(self) -> str:
        return REWARD_MODELING if self.likelihood == REWARD_MODELING else type(self.output_likelihood).__name__

    # -- files ---------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write everything but the model and the data to one safetensors file, with a JSON header.

        The header says what :func:`load` has to know: class, structure, shapes, fingerprints of the weights, number of
        data, seed, and versions. A file is written as a whole or not at all.
        """
        fitted = self._require_fit()
        self._of_the_model_of_the_fit(thorough=True)
        header = {
            "kind": "laplace",
            "class": type(self).__name__,
            "subset_of_weights": self.subset_of_weights,
            "hessian_structure": self.hessian_structure,
            "likelihood": self._likelihood_name(),
            "settings": fitted.settings,
            "n_data": self.n_data,
            "seed": self.seed,
            "shapes": {name: list(shape) for name, shape in fitted.network.shapes.items()},
            "weights": _store.fingerprint(fitted.network.snapshot.state()),
            "versions": _store.versions(),
        }
        _store.write(path, self._state(fitted), header)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, likelihood: Likelihood | None = None) -> Any:
        """Read what :meth:`save` wrote, as an object of the class that wrote it.

        Args:
            path: The file.
            model: The model that it was fitted to, with its weights.
            likelihood: The likelihood, if it was one of your own.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is of another kind, class, or model; it says what differs.
        """
        header = _store.read_header(path)
        with _store.understood(path):
            if header.get("kind") != "laplace":
                raise _store.StoredFileError(
                    f"Expected a saved DebiasedLaplace in {path}, got {header.get('kind', 'something else')}. "
                    "Check the path."
                )
            own = StateLayer._classes.get(header["class"])
            if own is None or not issubclass(own, cls):
                raise _store.StoredFileError(
                    f"Expected a saved {cls.__name__} in {path}, got one of {header['class']}. Use that class."
                )
            _store.check_model(path, header, model)
            if likelihood is None and header["likelihood"] not in LIKELIHOODS:
                raise _store.StoredFileError(
                    f"Expected likelihood to be the {header['likelihood']} of the file, got None. Pass it (for {path})."
                )
        state, _ = _store.read(path, _device(model))
        with _store.understood(path):
            return cls._loaded(own, model, likelihood, header, state)

    @classmethod
    def _loaded(cls, own: Any, model: nn.Module, likelihood: Any, header: Any, state: Any) -> Any:
        if likelihood is None:
            likelihood = LIKELIHOODS[header["likelihood"]]()
        la: Any = own.__new__(own)
        la._trainable = state.get("trainable", state["parameters"] if state["indices"] is None else None)
        kept = {"params": state["parameters"]} if header["subset_of_weights"] != "last_layer" else {}
        if state["indices"] is not None:
            kept = {"subnetwork_indices": state["indices"].cpu()}
        own._construct(la, model, likelihood, header["subset_of_weights"], header["hessian_structure"], kept)
        la.load_state_dict(state)
        return la

    @staticmethod
    def _construct(
        la: Any,
        model: nn.Module,
        likelihood: Any,
        subset_of_weights: str,
        hessian_structure: str,
        keywords: dict[str, Any],
    ) -> None:
        """Initialise an object of any class, whatever its own constructor takes."""
        raise NotImplementedError

    # -- copies and pickles --------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Everything, without what is made anew when it is asked for and without the graph of gradients."""
        state = {**self.__dict__, "_posterior": None, "_draws": None, "_generator": self._generator.get_state()}
        return {name: v.detach() if isinstance(v, Tensor) and not v.is_leaf else v for name, v in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._generator = torch.Generator()
        self._generator.set_state(state["_generator"].cpu())


def _listed(indices: Tensor | None) -> list[int] | None:
    return None if indices is None else indices.tolist()


def _few(indices: list[int] | None) -> str:
    if indices is None:
        return "(all of whole tensors)"
    return repr(indices[:8]) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
