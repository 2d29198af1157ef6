r"""What a posterior would say about a datum without having seen it, from its functional variance there.

Leave-one-out without a second fit takes the datum's own quadratic out of the posterior (the cavity distribution of the
Laplace approximation: Vehtari et al., JMLR 17(103), 2016). With g the gradient and H the Hessian of its loss in the
outputs, and V the covariance of the outputs,

.. math:: V_{-n} = (I - V H)^{-1} V, \qquad f_{-n} = f_n + V_{-n}\, g.

For a linear model with Gaussian noise both are exact. Otherwise they are as good as the quadratic at the mode, and
a trained network need not be at the mode: nothing but its own training decides where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace.likelihoods import Likelihood


@dataclass(frozen=True)
class LeftOut:
    r"""Outputs of N data, each left out of the posterior; of several posteriors with leading dimensions.

    Attributes:
        outputs: :math:`f_{-n}`, ``[..., N, C]``, float64; NaN where the leverage is one or more.
        covariances: :math:`V_{-n}`, ``[..., N, C, C]``, likewise.
        leverages: ``[..., N]``, largest eigenvalue of :math:`H^{1/2} V H^{1/2}`. Below one in a posterior that holds
            all curvature of the datum; an approximation to the curvature may miss so much of it that nothing is left
            when the datum is taken away.
    """

    outputs: Tensor
    covariances: Tensor
    leverages: Tensor


def leave_one_out(
    likelihood: Likelihood, mean: Tensor, covariances: Tensor, targets: Tensor, *, weight: float = 1.0
) -> LeftOut:
    r"""Moments of the outputs of data that the posterior was fitted on, each without the datum itself.

    Args:
        likelihood: What the outputs mean.
        mean: ``[N, C]``, outputs of the network.
        covariances: ``[..., N, C, C]``, functional covariances without observation noise.
        targets: ``[N]`` or ``[N, C]``.
        weight: By what the loss of a datum enters the posterior, :math:`1/(\sigma^2 T)`.

    Returns:
        Outputs, covariances and leverages.

    Raises:
        ValueError: If the weight is not positive.

    Example:
        >>> from debiased_laplace.likelihoods import Gaussian
        >>> mean, variance = torch.tensor([[1.0]]), torch.tensor([[[0.5]]])
        >>> float(leave_one_out(Gaussian(), mean, variance, torch.tensor([[0.0]])).outputs)  # residual / (1 - leverage)
        2.0
    """
    weight = _checks.positive(weight, "weight")
    mean, covariances = mean.detach().double(), covariances.detach().double()
    root = weight**0.5 * likelihood.hessian_square_root(mean, targets).movedim(0, 2)  # [N, C, V]
    gradient = weight * likelihood.gradient(mean, targets)
    reached = covariances @ root
    leverages, vectors = torch.linalg.eigh(root.mT @ reached)  # [..., N, V], of the same nonzero values
    largest = leverages[..., -1]
    kept = (largest < 1)[..., None, None]
    reached = reached @ vectors
    without = covariances + (reached / (1 - leverages)[..., None, :]) @ reached.mT  # Woodbury's identity
    without = torch.where(kept, without, torch.nan)
    return LeftOut(mean + (without @ gradient[..., None])[..., 0], without, largest)
