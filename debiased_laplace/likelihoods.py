r"""Output space: what the loss looks like as a function of the network's outputs.

Outputs are ``f: [N, C]``. The loss of a datum is :math:`\ell_n = -\log p(y_n \mid f_n)` with no
other factors, and its Hessian in the outputs has a square root,
:math:`\nabla^2_f \ell_n = S_n S_n^\top`, with ``S: [V, N, C]`` (V vectors for each datum).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from debiased_laplace import _checks, _data


class Likelihood(ABC):
    """What a likelihood has to provide; everything else in the package is the same for all."""

    links: ClassVar[tuple[str, ...]]
    is_regression: ClassVar[bool] = False

    @abstractmethod
    def check_targets(self, targets: Tensor, n_outputs: int) -> None:
        """Raise a ``TypeError`` or ``ValueError`` that says what is wrong with the targets."""

    def prepare_targets(self, targets: Tensor, n_outputs: int) -> Tensor:
        """Targets as :meth:`loss` takes them, after :meth:`check_targets`; one number for each datum may be ``[N, 1]``.

        Args:
            targets: As a loader yields them.
            n_outputs: C.

        Returns:
            ``[N]`` or ``[N, C]``; by default as they are.
        """
        self.check_targets(targets, n_outputs)
        return targets

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r"""Negative log-likelihood of every datum, up to the constants that (3) of the theory adds.

        Args:
            outputs: ``[N, C]``.
            targets: ``[N]`` or ``[N, C]``; for one output ``[N]`` and ``[N, 1]`` are the same.

        Returns:
            ``[N]``, in nats.
        """

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of every datum's loss in its outputs, ``[N, C]``, by automatic differentiation."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = outputs.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(leaf, targets).sum(), leaf)
        return gradient

    @abstractmethod
    def hessian_square_root(self, outputs: Tensor) -> Tensor:
        r"""Exact square root of the loss Hessian, ``[N, C] -> [V, N, C]``."""

    def curvature(self, outputs: Tensor) -> Tensor:
        r"""Trace of the loss Hessian, ``[N, C] -> [N]``: how much of the curvature a datum can carry."""
        return self.hessian_square_root(outputs).square().sum((0, 2))

    @abstractmethod
    def sampled_square_root(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        r"""Random vectors with :math:`E[S S^\top] = \nabla^2_f \ell` (the Fisher, never the empirical one).

        Args:
            outputs: ``[N, C]``.
            uniforms: ``[N, M, C]``, uniform in (0, 1); drawn by the caller, so that the same seed
                gives the same vectors however the data are cut into chunks.

        Returns:
            ``[M, N, C]``.
        """

    @abstractmethod
    def predictive(self, mean: Tensor, spread: Tensor, link: str, normals: Tensor | None = None) -> Tensor:
        r"""Probabilities under Gaussian outputs, averaged over the link.

        Args:
            mean: ``[N, C]``.
            spread: Variances ``[..., N, C]``, or covariances ``[..., N, C, C]`` for a link that
                :meth:`needs_covariance`; leading dimensions are a grid of posteriors.
            link: One of ``self.links``.
            normals: ``[M, C]``, standard normal, for ``link="mc"``; shared by all data, so that
                predictions vary smoothly with the input.

        Returns:
            ``[..., N, C]``.
        """

    def log_loss(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        """Negative log predictive probability of every datum: ``[..., N, C]`` and targets to ``[..., N]``, in nats."""
        raise TypeError(f"{type(self).__name__} has no predictive probabilities.")

    def needs_covariance(self, link: str) -> bool:
        """Whether the link needs the covariance between outputs, or only the variances."""
        return link != "probit"

    @property
    def default_link(self) -> str:
        """Link of predictions if nobody says another."""
        return self.links[0]

    @property
    def has_noise(self) -> bool:
        """Whether there is observation noise beside the outputs."""
        return self.is_regression

    def has_temperature(self, link: str) -> bool:
        """Whether outputs can be divided by a temperature before the link."""
        return not self.is_regression and link != "bridge_norm"

    def moments(self, mean, covariance, link, normals, noise_variance):  # type: ignore[no-untyped-def]
        if self.is_regression:
            noise = torch.as_tensor(noise_variance).to(mean).expand_as(mean)
            return mean, covariance, noise
        return self.predictive(mean, covariance, link, normals), None, None

    def inverse_link(self, outputs):  # type: ignore[no-untyped-def]
        if self.is_regression:
            return outputs
        return torch.sigmoid(outputs) if isinstance(self, Bernoulli) else outputs.softmax(-1)

    def moments_of_samples(self, samples, noise_variance):  # type: ignore[no-untyped-def]
        if self.is_regression:
            mean = samples.mean(0)
            return mean, samples.var(0), torch.as_tensor(noise_variance).to(mean).expand_as(mean)
        link = torch.sigmoid if isinstance(self, Bernoulli) else lambda f: f.softmax(-1)
        return link(samples).mean(0), None, None

    def log_noise(self, variance: Tensor, n_outputs: int) -> Tensor:
        return 0.5 * (variance.log() + math.log(2 * math.pi)).expand(n_outputs).sum()

    def check_link(self, link: str) -> None:
        """Raise a ``ValueError`` for a link that this likelihood does not have."""
        if link not in self.links:
            raise ValueError(f"Expected a link_approx out of {list(self.links)}, got {link!r}.")


class Categorical(Likelihood):
    """Softmax and cross-entropy; targets are class indices, ``[N]`` or ``[N, 1]``."""

    links = ("probit", "mc", "bridge", "bridge_norm", "mean_field")
    default_link = "mean_field"  # type: ignore[assignment]

    def check_targets(self, targets: Tensor, n_outputs: int) -> None:
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(
                f"Expected class indices of an integer dtype as targets, got {targets.dtype}. "
                "Use targets.long(), or argmax over a one-hot encoding."
            )
        if targets.ndim == 0 or targets.numel() != len(targets):
            raise ValueError(
                f"Expected targets of shape [N] or [N, 1] (one class index for each datum), got {tuple(targets.shape)}."
            )
        if n_outputs < 2:
            raise ValueError(
                f"Expected a classifier with at least two outputs, got {n_outputs}. For a single logit use Bernoulli()."
            )
        if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= n_outputs):
            raise ValueError(
                f"Expected class indices from 0 to {n_outputs - 1} (the model has {n_outputs} outputs), got "
                f"{int(targets.min())} to {int(targets.max())}."
            )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets.long().reshape(len(outputs)), reduction="none")

    def prepare_targets(self, targets: Tensor, n_outputs: int) -> Tensor:
        return super().prepare_targets(targets, n_outputs).reshape(-1)

    def hessian_square_root(self, outputs: Tensor) -> Tensor:
        # S = diag(r) - p r^T with r = sqrt(p) has the null vector r. A Householder reflection that maps r to
        # the last axis leaves C - 1 columns: one backward pass less, and the same S S^T.
        probabilities = outputs.softmax(-1)
        roots = probabilities.sqrt()
        root = torch.diag_embed(roots) - probabilities[:, :, None] * roots[:, None, :]
        reflected = root[:, :, :-1] - root[:, :, -1:] * (roots[:, :-1] / (1 + roots[:, -1:]))[:, None, :]
        return reflected.movedim(2, 0)

    def curvature(self, outputs: Tensor) -> Tensor:
        # sum_c p_c (1 - p_c), with 1 - p_c as the sum of the others: it is tiny for confident networks.
        logarithms = outputs.log_softmax(-1)
        top = logarithms.argmax(-1, keepdim=True)
        rest = logarithms.exp().scatter(-1, top, 0.0)
        others = rest.sum(-1)
        return others * (1 - others) + (rest * (1 - rest)).sum(-1)

    def sampled_square_root(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        # S z with signs z: E[z z^T] = I. Its square norm is of the order of the trace for every draw; that of p - e_y,
        # with a class y drawn from p, is large for few draws on a confident network, which importance cannot foresee.
        probabilities = outputs.softmax(-1)[:, None]
        signed = probabilities.sqrt() * _signs(uniforms, outputs)  # [N, M, C]
        drawn = signed - probabilities * signed.sum(-1, keepdim=True)
        return (drawn / math.sqrt(uniforms.shape[1])).movedim(1, 0)

    def predictive(self, mean: Tensor, spread: Tensor, link: str, normals: Tensor | None = None) -> Tensor:
        self.check_link(link)
        if link == "probit":
            return torch.softmax(mean / torch.sqrt(1 + math.pi / 8 * spread), -1)
        if link == "mc":
            return _sampled_mean(mean, spread, normals, torch.nn.Softmax(-1))
        if link == "mean_field":
            return _mean_field(mean, spread)
        return _laplace_bridge(mean, spread, normalise=link == "bridge_norm")

    def log_loss(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        index = targets.long().reshape(-1).expand(probabilities.shape[:-1])[..., None]
        return -probabilities.clamp_min(_smallest(probabilities)).gather(-1, index)[..., 0].log()


class Bernoulli(Likelihood):
    """Independent sigmoids, one for each output; targets in [0, 1], ``[N]`` or ``[N, C]``."""

    links = ("probit", "mc")

    def check_targets(self, targets: Tensor, n_outputs: int) -> None:
        if targets.is_complex():
            raise TypeError(f"Expected targets from 0 to 1, got {targets.dtype}.")
        _data.target_rows(targets, n_outputs)
        if len(targets) and not bool(((targets >= 0) & (targets <= 1)).all()):
            raise ValueError(f"Expected targets from 0 to 1, got {float(targets.min()):g} to {float(targets.max()):g}.")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = _data.target_rows(targets, outputs.shape[1]).to(outputs)
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(-1)

    def prepare_targets(self, targets: Tensor, n_outputs: int) -> Tensor:
        return _data.target_rows(super().prepare_targets(targets, n_outputs), n_outputs)

    def hessian_square_root(self, outputs: Tensor) -> Tensor:
        # sqrt(p (1 - p)), written so that it does not round to zero for large logits.
        return torch.diag_embed((0.5 * (F.logsigmoid(outputs) + F.logsigmoid(-outputs))).exp()).movedim(1, 0)

    def sampled_square_root(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        roots = (0.5 * (F.logsigmoid(outputs) + F.logsigmoid(-outputs))).exp()[:, None]
        return (roots * _signs(uniforms, outputs) / math.sqrt(uniforms.shape[1])).movedim(1, 0)

    def curvature(self, outputs: Tensor) -> Tensor:
        return (F.logsigmoid(outputs) + F.logsigmoid(-outputs)).exp().sum(-1)

    def predictive(self, mean: Tensor, spread: Tensor, link: str, normals: Tensor | None = None) -> Tensor:
        self.check_link(link)
        if link == "probit":
            return torch.sigmoid(mean / torch.sqrt(1 + math.pi / 8 * spread))
        return _sampled_mean(mean, spread, normals, torch.nn.Sigmoid())

    def log_loss(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        targets = _data.target_rows(targets, probabilities.shape[-1]).to(probabilities)
        # Where rounding made a probability one, it may have been less by a quarter of the precision.
        rest = (1 - probabilities).clamp_min(torch.finfo(probabilities.dtype).eps / 4)
        positive, negative = probabilities.clamp_min(_smallest(probabilities)).log(), rest.log()
        return -(targets * positive + (1 - targets) * negative).sum(-1)


class Gaussian(Likelihood):
    r"""Unit-variance regression, :math:`\ell = \frac12 \|f - y\|^2`; targets ``[N, C]``, or ``[N]`` for one output.

    The noise variance :math:`\sigma^2` is part of the posterior, not of the likelihood: it enters in
    equation (3) and nowhere else.
    """

    is_regression = True
    links = ("probit", "mc", "bridge", "bridge_norm")  # accepted and without effect, as in laplace-torch

    def check_targets(self, targets: Tensor, n_outputs: int) -> None:
        if targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(f"Expected real numbers as targets of a regression, got {targets.dtype}.")
        _data.target_rows(targets, n_outputs)
        _checks.finite(targets, "the targets", "Look for NaN or infinity in the training data.")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - _data.target_rows(targets, outputs.shape[1]).to(outputs)).square().sum(-1)

    def prepare_targets(self, targets: Tensor, n_outputs: int) -> Tensor:
        rows = _data.target_rows(super().prepare_targets(targets, n_outputs), n_outputs)
        return rows if rows.is_floating_point() else rows.double()

    def hessian_square_root(self, outputs: Tensor) -> Tensor:
        return unit_vectors(outputs)

    def sampled_square_root(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        return (_signs(uniforms, outputs) / math.sqrt(uniforms.shape[1])).movedim(1, 0)

    def curvature(self, outputs: Tensor) -> Tensor:
        return outputs.new_full((len(outputs),), outputs.shape[1])

    def predictive(self, mean: Tensor, spread: Tensor, link: str, normals: Tensor | None = None) -> Tensor:
        raise TypeError("A regression predictive is a mean and a variance; it has no probabilities.")

    def log_loss(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        """Negative log predictive probability of every datum: ``[..., N, C]`` and targets to ``[..., N]``, in nats."""
        raise TypeError(f"{type(self).__name__} has no predictive probabilities.")

    def needs_covariance(self, link: str) -> bool:
        return False


def _signs(uniforms: Tensor, like: Tensor) -> Tensor:
    """Random signs, of which every product but squares has mean zero, and squares have no variance at all."""
    return torch.where(uniforms.to(like.device) < 0.5, -1.0, 1.0).to(like)


def unit_vectors(outputs: Tensor) -> Tensor:
    """The C unit vectors of output space for every datum, ``[N, C] -> [C, N, C]``."""
    n, c = outputs.shape
    return torch.eye(c, dtype=outputs.dtype, device=outputs.device)[:, None].expand(c, n, c)


def resolve_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood a name of laplace-torch stands for; an object is returned as it is."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    names: dict[str, type[Likelihood]] = {
        "classification": Categorical,
        "regression": Gaussian,
        "bernoulli": Bernoulli,
    }
    name = str(getattr(likelihood, "value", likelihood))
    if name not in names:
        raise ValueError(f"Expected a likelihood out of {list(names)}, or a Likelihood, got {likelihood!r}.")
    return names[name]()


def _sampled_mean(mean: Tensor, covariance: Tensor, normals: Tensor | None, link: torch.nn.Module) -> Tensor:
    if normals is None:
        raise ValueError("Expected standard normal draws for link_approx='mc', got None.")
    if not len(normals):
        raise ValueError("Expected at least one sample for link_approx='mc', got none.")
    total = torch.zeros_like(covariance[..., 0])
    root = square_root(covariance)
    for normal in normals.to(mean):
        total += link(mean + root @ normal)
    return total / len(normals)


def _smallest(probabilities: Tensor) -> float:
    """Probability below which a logarithm would be infinite by underflow alone."""
    return torch.finfo(probabilities.dtype).tiny


def square_root(covariance: Tensor) -> Tensor:
    r"""A square root ``R`` with :math:`R R^\top = \Sigma` of positive semi-definite matrices, possibly singular.

    Eigenvalues that are negative by no more than rounding are zero; more negative ones are an error.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    largest = values.abs().amax(-1, keepdim=True)
    if bool((values < -1e-3 * largest).any()):
        raise ValueError("Expected a positive semi-definite output covariance; its eigenvalues are negative.")
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]).to(covariance)


def _mean_field(mean: Tensor, covariance: Tensor) -> Tensor:
    r"""Probit for every pair of classes, from the variance of the difference of their outputs.

    .. math:: p_k \propto \Big(\sum_i \exp\Big(-\frac{f_k - f_i}{\sqrt{1 + \frac\pi8 V_{ki}}}\Big)\Big)^{-1},
        \qquad V_{ki} = \Sigma_{kk} + \Sigma_{ii} - 2\Sigma_{ki}

    Closed form, unlike sampling, and with the covariance, unlike probit for each class: uncertainty that all outputs
    share has no effect. For two classes it is MacKay's approximation of the logistic integral (Lu, Ie, Sha, "Mean-field
    approximation to Gaussian-softmax integral", arXiv 2006.07584).
    """
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    of_differences = (variances[..., :, None] + variances[..., None, :] - 2 * covariance).clamp_min(0)  # by rounding
    ratios = (mean[..., :, None] - mean[..., None, :]) / torch.sqrt(1 + math.pi / 8 * of_differences)
    return torch.softmax(-torch.logsumexp(-ratios, -1), -1)


def _laplace_bridge(mean: Tensor, covariance: Tensor, *, normalise: bool) -> Tensor:
    r"""Dirichlet mean of the Laplace bridge (Hobbhahn et al., arXiv 2003.01227), with zero-sum correction."""
    n_classes = mean.shape[-1]
    row = covariance.sum(-1)
    total = row.sum(-1, keepdim=True)
    mean = mean - row * mean.sum(-1, keepdim=True) / total
    covariance = covariance - row[..., :, None] * row[..., None, :] / total[..., None]
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    if normalise:
        scale = variance.mean(-1, keepdim=True) / math.sqrt(n_classes / 2)
        mean, variance = mean / scale.sqrt(), variance / scale
    # In logarithms: exp(f_c) sum_k exp(-f_k) overflows in single precision for confident networks.
    log_ratio = mean + torch.logsumexp(-mean, -1, keepdim=True) - 2 * math.log(n_classes)
    shift = log_ratio.amax(-1, keepdim=True).clamp_min(0)
    alpha = ((1 - 2 / n_classes) * (-shift).exp() + (log_ratio - shift).exp()) / variance
    return alpha / alpha.sum(-1, keepdim=True)
