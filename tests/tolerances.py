"""The one table of tolerances. Never loosened for a single test."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 1e-9  # relative to the largest entry, in float64
FLOAT32 = 1e-4  # likewise, in float32
MONTE_CARLO_Z = 4.0  # standard errors, with fixed seeds


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    """Equal up to ``tolerance`` times the largest entry (finite, of one shape, and of any device)."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert bool(actual.isfinite().all()), "the actual value is not finite"
    assert bool(expected.isfinite().all()), "the expected value is not finite"
    difference = float((actual - expected).abs().max()) if actual.numel() else 0.0
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    assert difference <= tolerance * max(largest, 1e-30), (
        f"largest difference {difference:.3g}, largest entry {largest:.3g}, tolerance {tolerance:.0e} times that"
    )


def z_scores(samples: Tensor, expected: Tensor) -> Tensor:
    """Distance of the mean of ``samples: [n, ...]`` from what is expected, in its standard errors."""
    error = samples.std(0) / len(samples) ** 0.5
    exact = error < 1e-12 * samples.abs().max().clamp_min(1e-300)  # no spread: compare as numbers
    difference = samples.mean(0) - expected
    assert not bool((exact & (difference.abs() > EXACT * samples.abs().max())).any()), "wrong without any spread"
    return torch.where(exact, torch.zeros_like(error), difference / error)


def assert_unbiased(samples: Tensor, expected: Tensor) -> None:
    """The mean of ``samples: [n, ...]`` is what is expected, within :data:`MONTE_CARLO_Z` standard errors."""
    worst = float(z_scores(samples, expected).abs().max())
    assert worst <= MONTE_CARLO_Z, f"the mean of {len(samples)} samples is {worst:.1f} standard errors off"
