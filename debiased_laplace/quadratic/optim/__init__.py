"""Steps on the quadratic of a batch, with directions from one batch and magnitudes from another."""

from debiased_laplace.quadratic.optim.conjugate import CGResult, Stop, conjugate_gradients
from debiased_laplace.quadratic.optim.descent import QuadraticModel
from debiased_laplace.quadratic.optim.directional import (
    DirectionalStep,
    damped_step,
    directionally_damped_step,
    second_batch_damped_step,
)
from debiased_laplace.quadratic.optim.filtered import FilteredSGD, LineProcess
from debiased_laplace.quadratic.optim.newton import DebiasedNewtonCG, jacobi_preconditioner, newton_step
from debiased_laplace.quadratic.optim.optimizer import halves

__all__ = [
    "CGResult",
    "DebiasedNewtonCG",
    "DirectionalStep",
    "FilteredSGD",
    "LineProcess",
    "QuadraticModel",
    "Stop",
    "conjugate_gradients",
    "damped_step",
    "directionally_damped_step",
    "halves",
    "jacobi_preconditioner",
    "newton_step",
    "second_batch_damped_step",
]
