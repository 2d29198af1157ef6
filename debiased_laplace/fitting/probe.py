"""A function known again by what it gives for a few made-up inputs; weights alone do not say what is done with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _data, _store
from debiased_laplace.network.network import Network

#: Data that a probe has.
PROBE_SIZE = 2


@dataclass(frozen=True)
class Probe:
    """Outputs of a network for inputs like its data, of which none are kept.

    Attributes:
        inputs: Made up: numbers with the mean and standard deviation of those that the network was given, integers
            from their range, and ones where there were zeros and ones (masks).
        outputs: ``[N, C]``.
    """

    inputs: Any
    outputs: Tensor

    @classmethod
    def of(cls, network: Network, inputs: _data.Inputs) -> Probe | None:
        """Of a network whose data are like these; None if nothing can be made up that it takes."""
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode(False), torch.no_grad():
            few = _data.some(inputs, PROBE_SIZE)
            made = _data.map_tensors(lambda leaf: _like(leaf, generator), few)
            try:
                _store.to_plain(made)
                outputs = network.outputs(made)
            except Exception:  # of a class that is not stored, or nothing that the model knows what to do with
                return None
        return cls(made, outputs) if bool(outputs.isfinite().all()) else None

    def check(self, network: Network) -> None:
        """Raise a ``ValueError`` unless a network gives the same outputs, up to rounding."""
        advice = "Load the posterior with the model that it was fitted to, not only with its weights."
        try:
            outputs = network.outputs(self.inputs)
        except Exception as error:
            raise ValueError(
                f"Expected the function that the posterior was fitted to, got a model that fails for inputs like its "
                f"data ({type(error).__name__}: {error}). {advice}"
            ) from error
        expected = self.outputs.to(outputs)
        scale = float(expected.abs().max())
        # Another device, or another order of sums: half of the digits, and one more.
        tolerance = min(0.1, 30 * network.precision**0.5) * scale
        if outputs.shape != expected.shape or not float((outputs - expected).abs().max()) <= tolerance:
            what = f"outputs {tuple(outputs.shape)}" if outputs.shape != expected.shape else (
                f"outputs that differ by up to {float((outputs - expected).abs().max()):.2g} of {scale:.2g}"
            )  # fmt: skip
            raise ValueError(
                f"Expected the function that the posterior was fitted to, got a model with the same weights and other "
                f"outputs: {what} for the same inputs. {advice}"
            )


def _like(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """Other numbers of the same kind."""
    if not leaf.ndim or not leaf.numel():
        return leaf.clone()
    if leaf.is_floating_point():
        values = leaf.double()
        deviation = float(values.std(correction=0)) if values.numel() > 1 else 0.0
        made = torch.randn(leaf.shape, generator=generator, dtype=torch.float64) * deviation + float(values.mean())
        return torch.empty_like(leaf).copy_(made)  # in the same layout (channels last, say)
    if leaf.is_complex():
        raise TypeError("complex numbers")
    low, high = int(leaf.min()), int(leaf.max())
    if 0 <= low and high <= 1:
        return torch.ones_like(leaf)
    return torch.randint(low, high + 1, leaf.shape, generator=generator).to(leaf)
