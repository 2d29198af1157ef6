r"""The observation noise of a regression that validation data choose, in closed form."""

from __future__ import annotations

from torch import Tensor

from debiased_laplace.likelihoods import gaussian_nll

ALL_ERRORS_ZERO = (
    "all errors on them are zero up to rounding, and the smaller the noise, the smaller the loss. It is {}; use "
    "validation data that the network was not trained on"
)


def nothing_left(errors: Tensor, targets: Tensor, rounding: float) -> bool:
    """Whether errors are nothing but rounding of the targets.

    Args:
        errors: Targets minus outputs.
        targets: Of the same shape.
        rounding: Of the outputs' precision.
    """
    return float(errors.abs().max()) <= 4 * rounding * float(targets.abs().max())


def best_noise(
    mean: Tensor, variances: Tensor, targets: Tensor, profile: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    r"""The noise variance with the smallest loss, :math:`\sigma^2 = \mathrm{mean}\big((y - f)^2 / (r^2 + v)\big)`.

    Args:
        mean: ``[N, C]``.
        variances: ``[R, N, C]``, functional variances v at unit noise.
        targets: ``[N, C]``.
        profile: :math:`r^2`, one number or ``[C]``: the noise of an output is :math:`\sigma^2 r^2`.

    Returns:
        Noise variances and mean negative log predictive densities (nats for each datum), ``[R]``.
    """
    noise = ((targets - mean).square() / (profile + variances)).mean((-2, -1))
    total = noise[:, None, None] * (profile + variances)
    return noise, gaussian_nll(mean, total, targets, 0.0).mean(-1)
