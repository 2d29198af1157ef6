"""Classes: softmax and cross-entropy."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from debiased_laplace.likelihoods import _numerics
from debiased_laplace.likelihoods.base import Answers


class Categorical(Answers):
    r"""Softmax and cross-entropy; targets are class indices, ``[N]`` or ``[N, 1]``, or probabilities, ``[N, C]``.

    With target probabilities q (soft labels, mixup; one-hot for an index), class weights w and smoothing ε,

    .. math:: \ell = -\sum_c w_c \tilde q_c \log p_c, \qquad \tilde q = (1 - \varepsilon) q + \varepsilon / C,
        \qquad \nabla^2_f \ell = \Big(\sum_c w_c \tilde q_c\Big) \big(\mathrm{diag}(p) - p p^\top\big),

    as :func:`torch.nn.functional.cross_entropy` has it with ``reduction="none"``. Its mean over data is a sum of these
    divided by N; with class weights ``reduction="mean"`` divides by the sum of the weights of the targets instead, by
    which no log-likelihood of data is divided. Scores of predictions (:meth:`log_loss`) have the same weights.

    Args:
        class_weights: ``[C]``, not negative.
        label_smoothing: ε, from 0 to 1.
    """

    links = ("probit", "mc", "bridge", "bridge_norm", "mean_field")
    class_weights: Tensor | None = None  # of the class: only what was given is a setting of the object
    label_smoothing: float = 0.0

    def __init__(self, class_weights: Any = None, label_smoothing: float = 0.0) -> None:
        if class_weights is not None:
            weights = torch.as_tensor(class_weights).detach()
            if weights.ndim != 1 or not bool((weights.isfinite() & (weights >= 0)).all()) or not bool(weights.any()):
                raise ValueError(
                    "Expected class_weights [C], one number for each class, finite and not negative nor all zero, got "
                    f"{class_weights!r}."
                )
            self.class_weights = weights if weights.is_floating_point() else weights.double()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"Expected label_smoothing from 0 to 1, got {label_smoothing!r}.")
        if label_smoothing:
            self.label_smoothing = float(label_smoothing)

    # -- targets and loss ----------------------------------------------------------------------

    def check_targets(self, targets: Tensor, n_outputs: int) -> None:
        if n_outputs >= 2 and self.class_weights is not None and len(self.class_weights) != n_outputs:
            raise ValueError(
                f"Expected class_weights for each of the model's {n_outputs} outputs, got {len(self.class_weights)}."
            )
        if _are_soft(targets) and n_outputs >= 2 and targets.shape[1] == n_outputs:
            _check_probabilities(targets)
            return
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(
                f"Expected class indices of an integer dtype as targets, got {targets.dtype}. Use targets.long(), or "
                f"argmax over a one-hot encoding; probabilities are of shape [N, {n_outputs}], got "
                f"{tuple(targets.shape)}."
            )
        if targets.ndim == 0 or targets.numel() != len(targets):
            raise ValueError(
                "Expected targets of shape [N] or [N, 1] (one class index for each datum), got "
                f"{tuple(targets.shape)}. Probabilities of the classes are of a floating-point dtype."
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

    def prepare_targets(self, targets: Tensor, n_outputs: int) -> Tensor:
        """Class indices ``[N]``, or probabilities ``[N, C]``."""
        self.check_targets(targets, n_outputs)
        return targets if _are_soft(targets) else targets.reshape(-1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(outputs) if _are_soft(targets) else targets.long().reshape(len(outputs))
        weight = None if self.class_weights is None else self.class_weights.to(outputs)
        return F.cross_entropy(outputs, targets, weight, reduction="none", label_smoothing=self.label_smoothing)

    def _weighted_shares(self, targets: Tensor, like: Tensor) -> Tensor | None:
        r""":math:`w_c \tilde q_c`, ``[N, C]``; None where they are one-hot: class indices without weights or smoothing.

        Args:
            targets: Indices or probabilities.
            like: A tensor ``[..., C]`` of the wanted dtype and device.
        """
        if not _are_soft(targets) and self.class_weights is None and not self.label_smoothing:
            return None
        shares = _shares(targets, like)
        if self.label_smoothing:
            shares = (1 - self.label_smoothing) * shares + self.label_smoothing / like.shape[-1]
        return shares if self.class_weights is None else self.class_weights.to(like) * shares

    def target_shares(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One-hot, or the probabilities of soft labels, ``[N, C]``."""
        return _shares(targets, outputs)

    # -- derivatives in the outputs ------------------------------------------------------------

    def hessian_square_root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # S = diag(r) - p r^T with r = sqrt(p) has the null vector r. A Householder reflection that maps r to
        # the last axis leaves C - 1 columns: one backward pass less, and the same S S^T.
        probabilities = outputs.softmax(-1)
        roots = probabilities.sqrt()
        root = torch.diag_embed(roots) - probabilities[:, :, None] * roots[:, None, :]
        reflected = root[:, :, :-1] - root[:, :, -1:] * (roots[:, :-1] / (1 + roots[:, -1:]))[:, None, :]
        return self._weighted(reflected.movedim(2, 0), outputs, targets)

    def _weighted(self, vectors: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        """Vectors ``[V, N, C]`` times the root of the weight of every datum."""
        shares = self._weighted_shares(targets, outputs)
        return vectors if shares is None else vectors * shares.sum(-1, keepdim=True).sqrt()

    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # sum_c p_c (1 - p_c), with 1 - p_c as the sum of the others: it is tiny for confident networks.
        logarithms = outputs.log_softmax(-1)
        top = logarithms.argmax(-1, keepdim=True)
        rest = logarithms.exp().scatter(-1, top, 0.0)
        others = rest.sum(-1)
        trace = others * (1 - others) + (rest * (1 - rest)).sum(-1)
        shares = self._weighted_shares(targets, outputs)
        return trace if shares is None else trace * shares.sum(-1)

    def hessian_diagonal(self, outputs: Tensor, targets: Tensor) -> Tensor:
        p = outputs.softmax(-1)
        top = p > 0.5  # where 1 - p would cancel, it is the sum of the other classes
        diagonal = p * torch.where(top, p.masked_fill(top, 0).sum(-1, keepdim=True), 1 - p)
        shares = self._weighted_shares(targets, outputs)
        return diagonal if shares is None else diagonal * shares.sum(-1, keepdim=True)

    def sampled_square_root(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        # S z with signs z: E[z z^T] = I. Its square norm is of the order of the trace for every draw; that of p - e_y,
        # with a class y drawn from p, is large for few draws on a confident network, which importance cannot foresee.
        probabilities = outputs.softmax(-1)[:, None]
        signed = probabilities.sqrt() * _numerics.random_signs(uniforms, outputs)  # [N, M, C]
        drawn = signed - probabilities * signed.sum(-1, keepdim=True)
        return self._weighted((drawn / math.sqrt(uniforms.shape[1])).movedim(1, 0), outputs, targets)

    # -- predictions ---------------------------------------------------------------------------

    def inverse_link(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(-1)

    def needs_covariance(self, link: str) -> bool:
        return link != "probit"

    def predictive(self, mean: Tensor, covariance: Tensor, link: str, normals: Tensor | None = None) -> Tensor:
        self.check_link(link)
        if link == "probit":
            return torch.softmax(mean / torch.sqrt(1 + math.pi / 8 * covariance), -1)
        if link == "mc":
            return super().predictive(mean, covariance, link, normals)
        if link == "mean_field":
            return _numerics.mean_field(mean, covariance)
        return _numerics.laplace_bridge(mean, covariance, normalise=link == "bridge_norm")

    def log_loss(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        shares = self._weighted_shares(targets, probabilities)
        probabilities = probabilities.clamp_min(_numerics.smallest(probabilities))
        if shares is not None:
            return -(shares * probabilities.log()).sum(-1)
        index = targets.long().reshape(-1).expand(probabilities.shape[:-1])[..., None]
        return -probabilities.gather(-1, index)[..., 0].log()

    def correctness(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Whether the most probable class is the target, or its probability, ``[N]``."""
        top = outputs.argmax(-1)
        if _are_soft(targets):
            return targets.to(outputs).gather(-1, top[:, None])[:, 0]
        return (top == targets).to(outputs)

    def confidence(self, probabilities: Tensor) -> Tensor:
        return probabilities.amax(-1)

    def class_outputs(self, outputs: Tensor) -> Tensor:
        return outputs

    def settings(self) -> dict[str, Any]:
        return dict(vars(self))


def _are_soft(targets: Tensor) -> bool:
    """Whether these are probabilities ``[N, C]``: class indices are integers, whatever their shape."""
    return targets.is_floating_point() and targets.ndim == 2


def _shares(targets: Tensor, like: Tensor) -> Tensor:
    if _are_soft(targets):
        return targets.to(like)
    return F.one_hot(targets.long().reshape(-1), like.shape[-1]).to(like)


def _check_probabilities(targets: Tensor) -> None:
    sums, n_classes = targets.double().sum(1), targets.shape[1]
    rounding = max(1e-6, n_classes * torch.finfo(targets.dtype).eps)
    wrong = ~((targets >= 0).all(1) & ((sums - 1).abs() <= rounding))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        shown = ", ".join(f"{value:.4g}" for value in targets[row].tolist()[:10])
        raise ValueError(
            f"Expected probabilities of the {n_classes} classes as targets of a floating-point dtype, not negative and "
            f"with rows that sum to one, got [{shown}] for datum {row}, with the sum {float(sums[row]):.6g}. Class "
            "indices are of an integer dtype and of shape [N]."
        )
