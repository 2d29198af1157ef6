r"""The Gaussian posterior over the parameters; every formula of it, once for all structures.

.. math::
    P = U \mathrm{diag}(\beta\lambda + \delta) U^\top + \delta (I - U U^\top),
    \qquad \beta = \frac{N}{\sigma^2 T}                                                  \tag{3}

N, the noise variance, the temperature and the prior precision enter here and nowhere else.

Prior precisions :math:`\Delta = \mathrm{diag}(\delta)` that differ between parameters whose directions mix them do not
commute with U. In the coordinates :math:`\varphi = \Delta^{1/2}\theta` the prior is the unit matrix and the curvature
:math:`W W^\top` with :math:`W = \Delta^{-1/2} U \mathrm{diag}(\lambda)^{1/2}`, whose singular vectors are directions
for (3) again: that is :attr:`Posterior.normal_form`, and every formula is evaluated there. Only the parts of the basis
whose prior precisions differ are turned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from debiased_laplace import _checks
from debiased_laplace.curvature.basis import Basis


@dataclass(frozen=True)
class Posterior:
    r"""Gaussian :math:`\mathcal N(\theta^*, P^{-1})`; change a field with :func:`dataclasses.replace`.

    Attributes:
        mean: ``[D]``, the trained parameters.
        basis: Orthonormal directions U.
        curvatures: ``[rank]``, per-datum mean curvatures along them, non-negative.
        n_data: N, the number of data in the training set (not of those the curvature was measured on).
        prior_precision: One number, one for each part of the basis, or one for each parameter: ``[1]``, ``[n_parts]``
            or ``[D]``, float64. For each parameter where the directions are dense or the parameters themselves; along
            Kronecker directions one for each parameter tensor.
        temperature: T; below one concentrates the posterior.
        noise_variance: The observation noise variance of a regression; one otherwise.
        prior_mean: A number, or ``[D]``.
        coordinates: ``[D]``, scales s of the coordinates :math:`\theta = s\varphi` in which the basis is orthonormal
            and the prior precision is meant; None for one. Set by :attr:`normal_form` alone.
        fixed: ``[D]``, boolean, parameters that have no uncertainty (an infinite prior precision), as if they were
            frozen; directions must not reach into them. None for none.
        left_out: ``[n_parts]``, trace of the curvature outside the directions of every part, a per-datum mean, or None
            if it is not known. The Gaussian does without it; :attr:`left_out_log_det` tells what that means.
    """

    mean: Tensor
    basis: Basis
    curvatures: Tensor
    n_data: int
    prior_precision: Tensor
    temperature: float = 1.0
    noise_variance: float | Tensor = 1.0
    prior_mean: float | Tensor = 0.0
    coordinates: Tensor | None = None
    fixed: Tensor | None = None
    left_out: Tensor | None = None

    def __post_init__(self) -> None:
        _checks.prior_precisions(self.prior_precision, len(self.basis.parts), self.basis.n_params)
        _checks.positive(self.temperature, "temperature")
        _checks.positive(self.noise_variance, "noise variance")
        if not isinstance(self.n_data, int) or self.n_data < 1:
            raise ValueError(f"Expected a positive number of training data n_data, got {self.n_data!r}.")
        if self.curvatures.shape != (self.basis.rank,):
            raise ValueError(
                f"Expected one curvature for each of the {self.basis.rank} directions, got shape "
                f"{tuple(self.curvatures.shape)}."
            )
        if not bool(((self.curvatures >= 0) & self.curvatures.isfinite()).all()):
            raise ValueError("Expected finite, non-negative curvatures: equation (2) is a sum of squares.")

    @property
    def scale(self) -> float | Tensor:
        r""":math:`\beta`, from a per-datum mean to the data's precision."""
        return self.n_data / (self.noise_variance * self.temperature)

    @cached_property
    def normal_form(self) -> Posterior:
        """The same Gaussian with one prior precision for each part, in other coordinates if need be."""
        prior, basis = self._prior, self.basis
        if self.coordinates is not None:
            return self
        if self.fixed is not None and len(self.prior_precision) in (1, len(basis.parts)):
            if all(part.zero_where_fixed for part in basis.at_rest):
                return replace(self, coordinates=(~self.fixed).double(), fixed=None)
        if len(prior) in (1, len(basis.parts)):
            return self
        matrices = basis.matrices(prior)
        turned = [
            part.is_turned_by([matrices[i] for i in members], [basis.blocks[i] for i in members])
            for part, members in zip(basis.parts, basis.members, strict=True)
        ]
        if not any(turned):
            return self
        here = basis.per_parameter(torch.tensor(turned, dtype=torch.float64, device=prior.device)) > 0
        scales = torch.where(here, prior, 1.0).rsqrt()
        matrices = basis.matrices(scales)
        parts, curvatures = list(basis.parts), basis.split(self.curvatures.double())
        for index, members in enumerate(basis.members):
            if turned[index]:
                parts[index], curvatures[index] = parts[index].turned([matrices[i] for i in members], curvatures[index])
        basis = replace(basis, parts=parts)
        return replace(
            self, basis=basis, curvatures=basis.join(curvatures), prior_precision=torch.where(here, 1.0, prior),
            coordinates=scales, fixed=None if self.fixed is None else self.fixed & ~here,
        )  # fmt: skip

    @cached_property
    def gradient_basis(self) -> Basis:
        """The basis that gradients in the parameters are projected on, of the :attr:`normal_form`."""
        if self.normal_form is not self:
            return self.normal_form.gradient_basis
        if self.coordinates is None or bool(((self.coordinates == 0) | (self.coordinates == 1)).all()):
            return self.basis  # its directions do not reach into fixed parameters
        scales = self.basis.matrices(self.coordinates.detach())
        parts = [
            part.scaled([scales[i] for i in members])
            for part, members in zip(self.basis.parts, self.basis.members, strict=True)
        ]
        return replace(self.basis, parts=parts)

    @property
    def precisions(self) -> Tensor:
        r"""Eigenvalues :math:`\beta\lambda + \delta` of P along the basis, ``[rank]``, float64."""
        return self.scale * self.curvatures.double() + self.column_prior

    @property
    def _prior(self) -> Tensor:
        """The prior precision, for each parameter if some are fixed (infinite)."""
        prior = self.prior_precision.to(self.curvatures.device, torch.float64)
        return prior if self.fixed is None else torch.where(self.fixed, torch.inf, self.basis.per_parameter(prior))

    @property
    def column_prior(self) -> Tensor:
        """Prior precision along every column, ``[rank]``, float64."""
        return self.basis.per_column(self._prior)

    @property
    def parameter_prior(self) -> Tensor:
        """Prior precision of every parameter, ``[D]``, float64."""
        prior = self.basis.per_parameter(self._prior)
        return prior if self.coordinates is None else prior / self.coordinates.square()

    @property
    def log_det_precision(self) -> Tensor:
        r""":math:`\log\det P`, a float64 scalar."""
        return self.log_det_prior_precision + self.log_det_ratio

    @property
    def log_det_prior_precision(self) -> Tensor:
        r""":math:`\log\det P_0` of the prior."""
        return _finite(self.parameter_prior, 1.0).log().sum()

    @property
    def log_det_ratio(self) -> Tensor:
        r""":math:`\log\det P - \log\det P_0`, summed as log1p so that small curvatures are not lost."""
        form = self.normal_form
        return torch.log1p(form.scale * form.curvatures.double() / form.column_prior).sum()

    @property
    def left_out_log_det(self) -> tuple[float, float]:
        r"""What :attr:`log_det_ratio` lacks of all directions: least and most, in nats; zeros if nothing is left out.

        Of a part let t be the trace of the curvature outside its K directions, which spread over R others. The
        logarithm is concave: most if they share it equally, :math:`R \log(1 + \beta t / (R \delta))`, and no
        choice of directions makes it more (inequalities of Fischer and Hadamard). Least if they are as few as they
        can be, :math:`\frac{t}{\mu} \log(1 + \beta\mu/\delta)` with the smallest curvature :math:`\mu` along the K
        above all outside, which is so if they are the leading eigenvectors and otherwise an estimate.

        Raises:
            ValueError: If the trace is not known.
        """
        basis = self.basis
        if basis.complete:
            return 0.0, 0.0
        if self.left_out is None:
            raise ValueError("Expected the trace of the curvature that is left out, got None. Fit again.")
        priors = basis.matrices(basis.per_parameter(self._prior.detach()))
        least = most = 0.0
        scale, traces = float(torch.as_tensor(self.scale).detach()), self.left_out.tolist()
        for trace, members, curvatures in zip(
            traces, basis.members, basis.split(self.curvatures.detach()), strict=True
        ):
            prior = torch.cat([priors[i].flatten() for i in members])
            prior = prior[prior.isfinite()]
            n_others, smallest = len(prior) - curvatures.numel(), float(curvatures.min())
            if trace <= 0 or n_others < 1:
                continue
            most += n_others * math.log1p(scale * trace / n_others / float(prior.min()))
            if smallest > 0:
                n_least = min(trace / smallest, n_others)
                least += n_least * math.log1p(scale * trace / n_least / float(prior.max()))
            else:
                least += n_others * math.log1p(scale * trace / n_others / float(prior.max()))
        return min(least, most), most

    def matvec(self, vector: Tensor) -> Tensor:
        r""":math:`P v`, ``[..., D] -> [..., D]``; zero for fixed parameters."""
        form = self.normal_form
        inverse = None if form.coordinates is None else _finite(form.coordinates.reciprocal())
        return form._apply(vector, _finite(form.precisions), _finite(form._complement_prior), inverse)

    def covariance_matvec(self, vector: Tensor) -> Tensor:
        r""":math:`P^{-1} v`, ``[..., D] -> [..., D]``."""
        form = self.normal_form
        return form._apply(vector, form.precisions.reciprocal(), form._complement_prior.reciprocal(), form.coordinates)

    def square_norm(self, value: Tensor) -> Tensor:
        r""":math:`(\theta - \theta^*)^\top P (\theta - \theta^*)`, ``[..., D] -> [...]``, float64."""
        form, delta = self.normal_form, value - self.mean
        if form.coordinates is not None:
            delta = delta * _finite(form.coordinates.reciprocal())
        along = form.basis.project(delta)
        norm = (_finite(form.precisions) * along.double().square()).sum(-1)
        if not form.basis.complete:
            rest = (delta - form.basis.lift(along)).double()
            norm = norm + (form._complement_prior * rest.square()).sum(-1)
        return norm

    def scatter(self) -> Tensor:
        r""":math:`(\theta^* - \mu_0)^\top P_0 (\theta^* - \mu_0)`, a float64 scalar."""
        return (_finite(self.parameter_prior) * (self.mean - self.prior_mean).double().square()).sum()

    def log_marginal_likelihood(self, log_likelihood: Tensor | float) -> Tensor:
        r"""Laplace approximation of the log marginal likelihood, in nats.

        .. math:: \log p(\mathcal D \mid \theta^*)
            - \tfrac12 \big(\log\det P - \log\det P_0 + \|\theta^* - \mu_0\|^2_{P_0}\big)

        Directions that an incomplete basis leaves out have no curvature here, so that it is larger than that of all
        directions by half of :attr:`left_out_log_det`: compare it with others of the same structure and rank only.

        For temperature one alone: the likelihood to another power is no density of the data.
        """
        return log_likelihood - 0.5 * (self.log_det_ratio + self.scatter())

    def transform(self, normals: Tensor) -> Tensor:
        r"""Map S of standard normal vectors to deviations: :math:`S S^\top = P^{-1}`.

        Args:
            normals: ``[..., D]`` for a complete basis, otherwise ``[..., n_normals]``.

        Returns:
            ``[..., D]``, deviations from the mean.
        """
        form = self.normal_form
        along = normals[..., : form.basis.rank] * form.precisions.rsqrt().to(normals.dtype)
        deviation = form.basis.lift(along)
        if not form.basis.complete:
            rest = normals[..., form.basis.rank :]
            rest = rest - form.basis.lift(form.basis.project(rest))
            deviation = deviation + rest * form._complement_prior.rsqrt().to(normals.dtype)
        if form.coordinates is not None:
            deviation = deviation * form.coordinates
        return deviation.to(normals.dtype)

    @property
    def n_normals(self) -> int:
        """Number of standard normal numbers that :meth:`transform` takes."""
        basis = self.normal_form.basis
        return basis.rank if basis.complete else basis.rank + basis.n_params

    def deviations(self, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the parameters minus the mean, ``[n_samples, D]``."""
        _checks.whole(n_samples, "n_samples")
        return self.transform(standard_normals((n_samples, self.n_normals), self.mean, generator))

    def sample(self, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the parameters, ``[n_samples, D]``."""
        return self.mean + self.deviations(n_samples, generator)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at parameters ``[..., D]``, in nats."""
        n_free = self.basis.n_params - (0 if self.fixed is None else int(self.fixed.sum()))
        constant = 0.5 * (self.log_det_precision - n_free * math.log(2 * math.pi))
        return constant - 0.5 * self.square_norm(value)

    @property
    def _complement_prior(self) -> Tensor:
        """Prior precision of every parameter in the coordinates of the basis, ``[D]``."""
        return self.basis.per_parameter(self._prior)

    def _apply(self, vector: Tensor, along: Tensor, prior: Tensor, coordinates: Tensor | None) -> Tensor:
        """In the coordinates of the basis: a diagonal along it, and the prior outside."""
        dtype = vector.dtype
        if coordinates is not None:
            vector = vector * coordinates
        coefficients = self.basis.project(vector)
        result = self.basis.lift(coefficients * along.to(coefficients.dtype))
        if not self.basis.complete:
            result = result + prior.to(result.dtype) * (vector - self.basis.lift(coefficients))
        if coordinates is not None:
            result = result * coordinates
        return result.to(dtype)


def _finite(values: Tensor, otherwise: float = 0.0) -> Tensor:
    """The values, with another number in the place of infinity, which stands for parameters that are fixed."""
    return torch.where(values.isinf(), otherwise, values)


def standard_normals(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers from a generator of any device, on the device and in the dtype of ``like``."""
    device = generator.device if generator is not None else like.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)
