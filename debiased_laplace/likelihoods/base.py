r"""What a likelihood has to provide. Everything else in the package is the same for all of them.

This module is longer than others, since every method of the contract is documented here, and in no subclass.

Outputs of the network are ``f: [N, C]``. The loss of a datum is :math:`\ell_n = -\log p(y_n \mid f_n)`, and its
Hessian in the outputs has a square root, :math:`\nabla^2_f \ell_n = S_n S_n^\top`, with ``S: [V, N, C]``
(V vectors for each datum, at most C). Predictions are means of the target under Gaussian outputs, ``[..., N, K]``:
class probabilities, rates, or means of a regression; leading dimensions are a grid of posteriors.

A likelihood of one's own is one class: derive from :class:`Likelihood` (or from :class:`Independent` if the Hessian is
diagonal), and write ``check_targets``, ``loss``, ``hessian_square_root`` (or ``root_diagonal``) and ``inverse_link``.
The link ``"mc"``, samples, their scores and random vectors come with it, and
:func:`debiased_laplace.testing.check_likelihood` compares what was written with automatic differentiation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.likelihoods import _numerics


@dataclass(frozen=True)
class Moments:
    """Mean and variance of a target under Gaussian outputs, by the law of total variance.

    Attributes:
        mean: ``[..., N, K]``, of the target.
        epistemic_variance: Likewise, of its conditional mean: what more data would take away.
        noise_variance: Likewise, mean of its conditional variance: what would stay.
    """

    mean: Tensor
    epistemic_variance: Tensor
    noise_variance: Tensor

    @property
    def variance(self) -> Tensor:
        """Of the target, ``[..., N, K]``."""
        return self.epistemic_variance + self.noise_variance


class Likelihood(ABC):
    """Loss, curvature, links and predictions of one kind of target."""

    #: Ways to average over Gaussian outputs; the first is the default.
    links: tuple[str, ...] = ("mc",)
    #: What laplace-torch calls it: ``"regression"`` where a prediction is mean and covariance of the outputs, and
    #: ``"classification"`` where a link leads from the outputs to what is predicted.
    laplace_torch_name: str = "classification"
    #: Whether there is a noise variance beside the outputs, which can be tuned.
    has_noise: bool = False
    #: The beginning of the error for an output temperature where that has no meaning; None where it has.
    no_temperature: str | None = None
    #: Whether predictions are probabilities of answers: :meth:`correctness` and :meth:`confidence` are there.
    has_answers: bool = False

    @property
    def name(self) -> str:
        """What files call it."""
        return type(self).__name__

    @property
    def site(self) -> Likelihood:
        """That of one site of dense outputs: itself unless it is a sum over sites."""
        return self

    @property
    def has_variance(self) -> bool:
        """Whether the target has a predictive variance, :meth:`predictive_moments`."""
        return type(self).predictive_moments is not Likelihood.predictive_moments

    # -- targets and loss ----------------------------------------------------------------------

    @abstractmethod
    def check_targets(self, targets: Tensor, n_outputs: int) -> None:
        """Raise a ``TypeError`` or ``ValueError`` that says what is wrong with the targets."""

    def prepare_targets(self, targets: Tensor, n_outputs: int) -> Tensor:
        """Targets as the other methods take them, after :meth:`check_targets`.

        Args:
            targets: As a loader yields them.
            n_outputs: C.

        Returns:
            ``[N]`` or ``[N, K]``; by default as they are.
        """
        self.check_targets(targets, n_outputs)
        return targets

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r"""Negative log-likelihood of every datum; that of a Gaussian without the constants of its noise.

        Args:
            outputs: ``[N, C]``.
            targets: As :meth:`prepare_targets` returns them.

        Returns:
            ``[N]``, in nats.
        """

    def negative_log_likelihood(self, outputs: Tensor, targets: Tensor, noise_variance: float | Tensor = 1.0) -> Tensor:
        """The loss with all constants, ``[N]``, in nats; outputs are taken for certain.

        Args:
            outputs: ``[N, C]``.
            targets: As :meth:`prepare_targets` returns them.
            noise_variance: Of a likelihood that :attr:`has_noise`.
        """
        return self.loss(outputs, targets)

    def curvature_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r"""A function ``[N]`` with the Hessian :math:`S S^\top` at these outputs: the loss itself if that is convex.

        A loss that is convex in other coordinates z(f) alone has an indefinite Hessian in the outputs. Then the map to
        z counts as a part of the network, and this is the loss as a function of the linearised z.
        """
        return self.loss(outputs, targets)

    # -- derivatives in the outputs ------------------------------------------------------------

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of every datum's loss in its outputs, ``[N, C]``, by automatic differentiation."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = outputs.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(leaf, targets).sum(), leaf)
        return gradient

    @abstractmethod
    def hessian_square_root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r"""Exact square root of the loss Hessian, ``[N, C] -> [V, N, C]`` with V at most C.

        Args:
            outputs: ``[N, C]``.
            targets: As :meth:`prepare_targets` returns them; many a Hessian does not depend on them.
        """

    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        r"""Trace of the loss Hessian, ``[N, C] -> [N]``: how much of the curvature a datum can carry."""
        return self.hessian_square_root(outputs, targets).square().sum((0, 2))

    def hessian_diagonal(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Diagonal of the loss Hessian, ``[N, C]``."""
        return self.hessian_square_root(outputs, targets).square().sum(0)

    def sampled_square_root(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        r"""Random vectors with :math:`E[S S^\top] = \nabla^2_f \ell` (the Fisher, never the empirical one).

        Args:
            outputs: ``[N, C]``.
            targets: As :meth:`prepare_targets` returns them.
            uniforms: ``[N, M, C]``, uniform in (0, 1); drawn by the caller, so that the same seed
                gives the same vectors however the data are cut into chunks.

        Returns:
            ``[M, N, C]``.
        """
        root = self.hessian_square_root(outputs, targets)
        signs = _numerics.random_signs(uniforms[..., : len(root)], outputs)
        return torch.einsum("vnc,nmv->mnc", root, signs) / math.sqrt(uniforms.shape[1])

    def sites(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of dense outputs the targets of every site, ``[N, S, ...]``, and which sites have one, ``[N, S]``."""
        raise TypeError(f"{type(self).__name__} is no likelihood of sites.")

    def counted(self, targets: Tensor) -> Tensor | None:
        """Which entries of a row of outputs have a target, ``[N, S * C]``, where some have none; None for all."""
        return None

    def n_observed(self, targets: Tensor, n_outputs: int) -> Tensor:
        """How many of the C outputs of every datum have a target, ``[N]``."""
        return torch.full((len(targets),), n_outputs)

    def target_shares(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Which outputs the target is about, ``[N, C]``: all of them, unless they are alternatives."""
        return torch.ones_like(outputs)

    # -- predictions ---------------------------------------------------------------------------

    @abstractmethod
    def inverse_link(self, outputs: Tensor) -> Tensor:
        """Mean of the target for given outputs, ``[..., C] -> [..., K]``: softmax, sigmoid, exponential, identity."""

    def needs_covariance(self, link: str) -> bool:
        """Whether the link needs the covariance between outputs, or only the variances."""
        return link == "mc"

    def check_link(self, link: str) -> None:
        """Raise a ``ValueError`` for a link that this likelihood does not have."""
        if link not in self.links:
            raise ValueError(f"Expected a link_approx out of {list(self.links)}, got {link!r}.")

    def predictive(self, mean: Tensor, covariance: Tensor, link: str, normals: Tensor | None = None) -> Tensor:
        r"""Mean of the target under Gaussian outputs: :meth:`inverse_link`, averaged over them.

        Args:
            mean: ``[N, C]``.
            covariance: Covariances ``[..., N, C, C]`` for a link that :meth:`needs_covariance`, or else variances
                ``[..., N, C]``; leading dimensions are a grid of posteriors.
            link: One of ``self.links``.
            normals: ``[M, C]``, standard normal, for ``link="mc"``; shared by all data, so that
                predictions vary smoothly with the input.

        Returns:
            ``[..., N, K]``.
        """
        self.check_link(link)
        return _numerics.sampled_mean(self.inverse_link, mean, covariance, checked_normals(normals))

    def predictive_moments(
        self,
        mean: Tensor,
        covariance: Tensor,
        link: str,
        normals: Tensor | None = None,
        noise_variance: float | Tensor = 1.0,
    ) -> Moments:
        """Mean and variance of the target under Gaussian outputs.

        Args:
            mean: As in :meth:`predictive`.
            covariance: As in :meth:`predictive`.
            link: As in :meth:`predictive`.
            normals: As in :meth:`predictive`.
            noise_variance: Of a likelihood that :attr:`has_noise`.

        Raises:
            TypeError: If the target has no variance: class probabilities say everything.
        """
        raise TypeError(f"{type(self).__name__} has no predictive variance: use predictive.")

    def negative_log_predictive(
        self,
        mean: Tensor,
        covariance: Tensor,
        targets: Tensor,
        link: str,
        normals: Tensor | None = None,
        noise_variance: float | Tensor = 1.0,
    ) -> Tensor:
        r"""Negative log predictive probability (or density) of the targets, :math:`-\log \mathrm E\,p(y \mid f)`.

        Args:
            mean: As in :meth:`predictive`.
            covariance: As in :meth:`predictive`.
            targets: As :meth:`prepare_targets` returns them.
            link: As in :meth:`predictive`.
            normals: As in :meth:`predictive`.
            noise_variance: Of a likelihood that :attr:`has_noise`.

        Returns:
            ``[..., N]``, in nats.
        """
        self.check_link(link)
        root, total = _numerics.square_root(covariance), None
        normals = checked_normals(normals)
        for normal in normals.to(mean):
            value = -self._losses_of_grid(mean + root @ normal, targets, noise_variance)
            total = value if total is None else torch.logaddexp(total, value)
        assert total is not None
        return math.log(len(normals)) - total

    def negative_log_predictive_of_samples(
        self, samples: Tensor, targets: Tensor, noise_variance: float | Tensor = 1.0
    ) -> Tensor:
        """The same of sampled outputs ``[S, N, C]``: ``[N]``, in nats."""
        losses = self._losses_of_grid(samples, targets, noise_variance)
        return math.log(len(samples)) - torch.logsumexp(-losses, 0)

    def _losses_of_grid(self, outputs: Tensor, targets: Tensor, noise_variance: float | Tensor) -> Tensor:
        """Negative log-likelihoods of outputs ``[..., N, C]``, ``[..., N]``."""
        rows = outputs.reshape(-1, *outputs.shape[-2:])
        losses = [self.negative_log_likelihood(f, targets, noise_variance) for f in rows]
        return torch.stack(losses).reshape(outputs.shape[:-1])

    # -- answers -------------------------------------------------------------------------------

    def log_loss(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        """Negative log predictive probability of every datum: ``[..., N, C]`` and targets to ``[..., N]``, in nats."""
        raise TypeError(f"{type(self).__name__} has no predictive probabilities.")

    def correctness(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Share of right answers to every datum, ``[N]``."""
        raise TypeError(f"{type(self).__name__} has no predictive probabilities.")

    def confidence(self, probabilities: Tensor) -> Tensor:
        """Mean probability of the answers to every datum, ``[N]``."""
        raise TypeError(f"{type(self).__name__} has no predictive probabilities.")

    def class_outputs(self, outputs: Tensor) -> Tensor | None:
        """Outputs ``[..., K]`` of exclusive classes, whose softmax are their probabilities; None if there are none."""
        return None

    def class_predictive(self, mean: Tensor, covariance: Tensor, link: str, normals: Tensor | None = None) -> Tensor:
        """:meth:`predictive` of all classes, rows summing to one, where :meth:`class_outputs` are there."""
        return self.predictive(mean, covariance, link, normals)

    # -- what it was made with -----------------------------------------------------------------

    def __repr__(self) -> str:
        """The class with the arguments that are not at their defaults."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"

    def settings(self) -> dict[str, Any]:
        """Arguments that make the same likelihood, for files, without those that are at their defaults.

        Only for the classes in ``LIKELIHOODS``; any other has to be given again when a file is loaded.
        """
        return {}


class Independent(Likelihood):
    """A likelihood whose loss is a sum over outputs, so that its Hessian is diagonal."""

    @abstractmethod
    def root_diagonal(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Square roots of the second derivatives, ``[N, C]``."""

    def hessian_square_root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.diag_embed(self.root_diagonal(outputs, targets)).movedim(1, 0)

    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.root_diagonal(outputs, targets).square().sum(-1)

    def hessian_diagonal(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.root_diagonal(outputs, targets).square()

    def sampled_square_root(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        signs = _numerics.random_signs(uniforms, outputs)
        return (self.root_diagonal(outputs, targets)[:, None] * signs / math.sqrt(uniforms.shape[1])).movedim(1, 0)


class Answers(Likelihood):
    """A likelihood whose predictions are probabilities of answers: they are all that a score needs."""

    has_answers = True

    @abstractmethod
    def log_loss(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        """Negative log predictive probability of every datum: ``[..., N, C]`` and targets to ``[..., N]``, in nats."""

    def negative_log_predictive(
        self,
        mean: Tensor,
        covariance: Tensor,
        targets: Tensor,
        link: str,
        normals: Tensor | None = None,
        noise_variance: float | Tensor = 1.0,
    ) -> Tensor:
        return self.log_loss(self.predictive(mean, covariance, link, normals), targets)

    def negative_log_predictive_of_samples(
        self, samples: Tensor, targets: Tensor, noise_variance: float | Tensor = 1.0
    ) -> Tensor:
        return self.log_loss(self.inverse_link(samples).mean(0), targets)


def checked_normals(normals: Tensor | None) -> Tensor:
    """Standard normal draws ``[M, C]``, at least one, or a ``ValueError``."""
    if normals is None:
        raise ValueError("Expected standard normal draws for link_approx='mc', got None.")
    if not len(normals):
        raise ValueError("Expected at least one sample for link_approx='mc', got none.")
    return normals
