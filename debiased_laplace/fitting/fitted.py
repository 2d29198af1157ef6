"""What a fit gives: the posterior, the network that it is about, and what is worth knowing about how it came about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from debiased_laplace import _checks, _store
from debiased_laplace._guards import warn_the_caller
from debiased_laplace.fitting.probe import Probe
from debiased_laplace.fitting.stream import Observed
from debiased_laplace.network.network import Network
from debiased_laplace.network.snapshot import ModelChangedError, ModelChangedWarning, Snapshot
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.sampling.sample import Sample


@dataclass(frozen=True)
class Fit:
    """What a fit gives.

    Attributes:
        posterior: The posterior, with prior precision one unless another was asked for.
        network: The model with its blocks.
        mean_loss: Mean loss of the stream, per datum in nats; estimated from the data drawn if the sampler did not look
            at all of them.
        n_seen: Number of data in the stream.
        direction_indices: Positions in the stream of the data that chose the final directions.
        curvature_indices: Of those that measured curvatures for data that were not drawn.
        mc_samples: Random vectors for each datum, or None for the exact loss Hessian.
        settings: What the fit was called with, in words, and the seed.
        sample: The data drawn, to which a later fit can add; None for a fit that was loaded.
        observed: What the pass over the stream told, if the sampler made one; None for a fit that was loaded.
        curvature_errors: Standard errors of the curvatures, ``[rank]``, as the rounds of the split differ; None for
            fewer than two. They say how convexity biases what is no mean (:meth:`convexity`).
        uniform: A few data of the stream, drawn uniformly and apart from ``sample``, that stand for its ordinary data;
            None for a fit that was loaded.
        n_observed: Of dense outputs, how many outputs of a datum have a target, on average over the data; else None.
        probe: What the network gives for a few made-up inputs, by which it is known again when a fit is loaded.
    """

    posterior: Posterior
    network: Network
    mean_loss: float
    n_seen: int
    direction_indices: Tensor
    curvature_indices: Tensor
    mc_samples: int | None
    settings: dict[str, Any] = field(default_factory=dict)
    sample: Sample | None = None
    observed: Observed | None = None
    uniform: Sample | None = None
    curvature_errors: Tensor | None = None
    probe: Probe | None = None
    n_observed: float | None = None

    def convexity(self, posterior: Posterior | None = None) -> tuple[float, float] | None:
        r"""What errors of the curvatures add to variances and take from the log-determinant, to second order.

        With :math:`r_i = \beta s_i / (\beta \lambda_i + \delta)`, where :math:`s_i` is the standard error of the
        curvature i, the expected variance along i is :math:`1 + r_i^2` times that of the expected curvature, and the
        expected :math:`\log\det P` lower by :math:`\frac12 \sum_i r_i^2`: unbiased curvatures give neither. It tells
        the order of magnitude, rather too small: rounds do not show what directions that the data hardly determine add.

        Args:
            posterior: The fit's posterior with other settings, such as a tuned prior precision.

        Returns:
            The relative bias of the sum of the variances along the directions, and the bias of the log-determinant in
            nats; None without errors.
        """
        if self.curvature_errors is None:
            return None
        posterior = self.posterior if posterior is None else posterior
        precisions = posterior.precisions
        squares = (posterior.scale * self.curvature_errors.double() / precisions).square()
        return float((squares / precisions).sum() / (1 / precisions).sum()), -0.5 * float(squares.sum())

    def state(self) -> dict[str, Any]:
        """Everything but the model and the data, as tensors and plain Python objects."""
        left_out = ("network", "sample", "observed", "uniform")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return _store.to_plain(own | {"network": self.network.description()})

    @classmethod
    def restore(
        cls, model: nn.Module | Snapshot, state: dict[str, Any], outputs_of: Callable[[Any], Any] | None = None
    ) -> Fit:
        """Inverse of :meth:`state`, on the device of the model, with the function ``outputs_of`` of the fit.

        Raises:
            ValueError: If the model has other parameters, or other weights; it says which.
        """
        own = _store.from_plain(state)
        network = Network.restore(model, own.pop("network"), outputs_of)
        for name, value in _store.tensors_of({key: own.get(key) for key in ("posterior", "curvature_errors")}).items():
            _checks.finite(value, f"the {name} of the stored fit", "The file was changed: make it again.")
        moved = _pytree.tree_map_only(Tensor, lambda t: t.to(network.device), _store.to_plain(own.pop("posterior")))
        posterior = _store.from_plain(moved)
        if not torch.equal(posterior.mean, network.mean()):
            theirs, mine = network.from_vector(posterior.mean), network.from_vector(network.mean())
            differ = [name for name in theirs if not torch.equal(theirs[name], mine[name])]
            raise ValueError(
                f"Expected the state of a model with the same weights; these differ: {differ}, by up to "
                f"{float((posterior.mean - network.mean()).abs().max()):.3g}. Load the model's own weights first."
            )
        if own.get("probe") is not None:
            own["probe"].check(network)
        return cls(posterior=posterior, network=network, **own)

    def check_model(self, *, thorough: bool = False) -> None:
        """Tell the caller if the model is no longer that of the fit, which predictions go on with.

        Args:
            thorough: Look at all entries of all tensors.

        Raises:
            ModelChangedError: If it was moved to another dtype or device.
        """
        changes = self.network.snapshot.changes(thorough=thorough)
        if changes is None:
            return
        what = f"Expected the model as it was at the fit, got a changed one ({changes})."
        if changes.cast:
            raise ModelChangedError(
                f"{what} The posterior is one of the earlier dtype, device and shapes. Move the model back, or call "
                "fit again."
            )
        warn_the_caller(
            f"{what} The posterior is about the network of the fit, and so is all that it says. Call fit again for the "
            "present one, or get that of the fit back with model.load_state_dict(la.network.snapshot.state()).",
            ModelChangedWarning,
        )  # fmt: skip

    def header(self) -> dict[str, Any]:
        """What a file says about a fit before it is read."""
        network = self.network
        return {
            "settings": self.settings,
            "n_data": self.posterior.n_data,
            "shapes": {name: list(shape) for name, shape in network.shapes.items()},
            "weights": _store.fingerprint(network.snapshot.state()),
            "versions": _store.versions(),
        }

    def save(self, path: str | Path) -> None:
        """Write everything but the model and the data to one safetensors file, with a JSON header."""
        _store.write(path, self.state(), {"kind": "fit", **self.header()})

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, outputs_of: Callable[[Any], Any] | None = None) -> Fit:
        """Read a fit of the same model, with the function ``outputs_of`` if it was made with one.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no fit, or one of another model; it says what differs.
        """
        header = _store.read_header(path)
        if header.get("kind") != "fit":
            raise _store.StoredFileError(
                f"Expected a saved fit in {path}, got {header.get('kind', 'something else')}. Check the path."
            )
        _store.check_model(path, header, model)
        state, _ = _store.read(path)
        with _store.understood(path):
            return cls.restore(model, state, outputs_of)
