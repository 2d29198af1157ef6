r"""Dense outputs: one likelihood term for every site of a datum, for pixels and tokens.

.. math:: \ell_n = \sum_{s \,\text{observed}} \ell(f_{ns}, y_{ns})

A datum stays a datum: N counts samples, and a loss is one of a whole image or a whole text. The loss Hessian is block
diagonal, with a block of C outputs for every site, and one vector with independent random signs at every site stands
for all of them. Rows of outputs are ``[N, S * C]`` (:mod:`debiased_laplace._data.sites`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace.likelihoods.base import Likelihood, Moments

#: The target of a site without one, of integers as torch and Hugging Face have it, and of floating-point numbers.
IGNORED, NO_NUMBER = -100, -math.inf


class Sites(Likelihood):
    """A sum of another likelihood's terms over the sites of a datum that have a target.

    Targets are as a loader gives them, in the layout of the outputs: ``[N, ...]`` without the dimension of the outputs
    (class indices), or with it. They stay so; :meth:`prepare_targets` marks sites without a target by :data:`IGNORED`,
    and in floating-point numbers by :data:`NO_NUMBER`.

    Args:
        of: The likelihood of one site.
        class_dim: Which dimension has the outputs of a site: 1, as torch has it, ``[N, C, ...]``, or -1,
            ``[N, ..., C]``; by default what the shape of the targets says.
        ignore_index: The target of sites that are left out; by default -100 of integers, and none of floating-point
            numbers. NaN is possible, too.
        shift: The target of a site is that of so many sites later: with one, outputs at a token are about the next.
        layout: The layout of the outputs, which a fit finds.

    Example:
        >>> import torch
        >>> from debiased_laplace._data import SiteLayout
        >>> from debiased_laplace.likelihoods import Categorical, Sites
        >>> likelihood = Sites(Categorical(), layout=SiteLayout(class_dim=-1, n_outputs=3, n_dims=1))
        >>> likelihood.loss(torch.zeros(2, 4 * 3), torch.tensor([[0, 1, 2, 0], [2, -100, -100, -100]]))
        tensor([4.3944, 1.0986])
    """

    def __init__(
        self,
        of: Likelihood,
        class_dim: int | None = None,
        ignore_index: float | None = None,
        shift: int = 0,
        layout: _data.SiteLayout | None = None,
    ) -> None:
        if not isinstance(of, Likelihood) or isinstance(of, Sites):
            raise TypeError(f"Expected the likelihood of one site, such as Categorical(), got {of!r}.")
        if class_dim not in (None, 1, -1):
            raise ValueError(f"Expected class_dim to be 1, for [N, C, ...], or -1, for [N, ..., C], got {class_dim!r}.")
        if not isinstance(shift, int) or shift < 0:
            raise ValueError(f"Expected shift to be a whole number of sites, not negative, got {shift!r}.")
        self.of, self.class_dim, self.ignore_index, self.shift, self._layout = (
            of,
            class_dim,
            ignore_index,
            shift,
            layout,
        )
        self.links, self.laplace_torch_name = of.links, of.laplace_torch_name
        self.has_noise, self.no_temperature, self.has_answers = of.has_noise, of.no_temperature, of.has_answers

    @property
    def name(self) -> str:
        return f"Sites of {self.of.name}"

    @property
    def site(self) -> Likelihood:
        return self.of

    @property
    def has_variance(self) -> bool:
        return self.of.has_variance

    @property
    def layout(self) -> _data.SiteLayout:
        """Where the sites are in outputs and targets."""
        if self._layout is None:
            raise ValueError(f"Expected {self} of outputs of a known layout, which a fit finds, got none.")
        return self._layout

    @property
    def known_class_dim(self) -> int | None:
        """As it was given, or as the layout has it."""
        return self.class_dim or (None if self._layout is None else self._layout.class_dim)

    def with_layout(self, layout: _data.SiteLayout) -> Sites:
        """The same for outputs of a layout."""
        return Sites(self.of, self.class_dim, self.ignore_index, self.shift, layout)

    # -- sites and their targets -----------------------------------------------------------------

    def check_targets(self, targets: Tensor, n_outputs: int) -> None:
        self.prepare_targets(targets, n_outputs)

    def prepare_targets(self, targets: Tensor, n_outputs: int) -> Tensor:
        """The same, with one mark for all sites without a target.

        Args:
            targets: As a loader yields them.
            n_outputs: Does not matter: the layout says how many outputs a site has.

        Returns:
            ``[N, ...]`` as they came, with the dimension of the outputs where the likelihood of a site has rows.
        """
        layout, several = self.layout, self._are_rows(targets)
        rows = layout.by_site(targets) if several else targets.flatten(1)
        observed = ~self._is_ignored(rows)
        observed = observed.all(-1) if several else observed
        prepared = self.of.prepare_targets(rows[observed], layout.n_outputs)
        prepared = prepared if prepared.is_floating_point() else prepared.long()
        mark = NO_NUMBER if prepared.is_floating_point() else IGNORED
        filled = prepared.new_full((*observed.shape, *prepared.shape[1:]), mark)
        filled[observed] = prepared
        shape = layout.shape(targets.shape) if several else targets.shape[1:]
        return layout.restored(filled, shape) if prepared.ndim > 1 else filled.reshape(len(targets), *shape)

    def _are_rows(self, targets: Tensor) -> bool:
        """Whether the targets have the dimension of the outputs."""
        n_dims = self.layout.n_dims
        if targets.ndim - 1 not in (n_dims, n_dims + 1):
            raise ValueError(
                f"Expected targets of the outputs' {n_dims} dimensions of sites, with or without that of the outputs, "
                f"got shape {tuple(targets.shape)}."
            )
        return targets.ndim - 1 > n_dims

    def _is_ignored(self, values: Tensor) -> Tensor:
        marked = values == NO_NUMBER if values.is_floating_point() else values.long() == IGNORED
        if self.ignore_index is None:
            return marked
        if math.isnan(self.ignore_index):
            return marked | values.isnan()
        return marked | ((values if values.is_floating_point() else values.long()) == self.ignore_index)

    def sites(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Targets site after site, ``[N, S]`` or ``[N, S, K]``, and which sites have one, ``[N, S]``.

        Args:
            targets: As :meth:`prepare_targets` returns them. Where there is none there is zero.
        """
        several = self._are_rows(targets)
        rows = self.layout.by_site(targets) if several else targets.flatten(1)
        if self.shift:
            mark = NO_NUMBER if rows.is_floating_point() else IGNORED
            left = rows[:, self.shift :]
            rows = torch.cat(
                [left, rows.new_full((len(rows), rows.shape[1] - left.shape[1], *rows.shape[2:]), mark)], 1
            )
        ignored = rows == (NO_NUMBER if rows.is_floating_point() else IGNORED)
        observed = ~(ignored.any(-1) if several else ignored)
        return rows.masked_fill(ignored, 0), observed

    def counted(self, targets: Tensor) -> Tensor:
        _, observed = self.sites(targets)
        return observed.repeat_interleave(self.layout.n_outputs, 1)

    def n_observed(self, targets: Tensor, n_outputs: int) -> Tensor:
        _, observed = self.sites(targets)
        return observed.sum(1) * self.layout.n_outputs

    def _by_site(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs ``[..., N * S, C]``, targets ``[N * S, ...]``, and which have one, ``[N, S]``."""
        rows, observed = self.sites(targets.to(outputs.device))
        if outputs.shape[-1] != observed.shape[1] * self.layout.n_outputs:
            raise ValueError(
                f"Expected a target for each of the {self.layout.count(outputs.shape[-1])} sites of a datum's outputs, "
                f"got targets of shape {tuple(targets.shape)}, for {observed.shape[1]} sites."
            )
        return self._split(outputs), rows.flatten(0, 1), observed

    def _split(self, outputs: Tensor) -> Tensor:
        """``[..., N, S * C] -> [..., N * S, C]``."""
        return outputs.unflatten(-1, (-1, self.layout.n_outputs)).flatten(-3, -2)

    def _sum(self, values: Tensor, observed: Tensor) -> Tensor:
        """``[..., N * S] -> [..., N]``, over sites that have a target."""
        return values.unflatten(-1, observed.shape).masked_fill(~observed, 0).sum(-1)

    def _joined(self, values: Tensor, observed: Tensor) -> Tensor:
        """``[..., N * S, C] -> [..., N, S * C]``, zero at sites without a target."""
        return values.unflatten(-2, observed.shape).masked_fill(~observed[..., None], 0).flatten(-2)

    # -- loss and derivatives ----------------------------------------------------------------------

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        f, y, observed = self._by_site(outputs, targets)
        return self._sum(self.of.loss(f, y), observed)

    def negative_log_likelihood(self, outputs: Tensor, targets: Tensor, noise_variance: float | Tensor = 1.0) -> Tensor:
        f, y, observed = self._by_site(outputs, targets)
        return self._sum(self.of.negative_log_likelihood(f, y, noise_variance), observed)

    def curvature_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        f, y, observed = self._by_site(outputs, targets)
        return self._sum(self.of.curvature_loss(f, y), observed)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        f, y, observed = self._by_site(outputs, targets)
        return self._joined(self.of.gradient(f, y), observed)

    def hessian_square_root(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``[S * V, N, S * C]``, V vectors of every site: for tests, and a few sites."""
        f, y, observed = self._by_site(outputs, targets)
        root = self._joined(self.of.hessian_square_root(f, y), observed)  # [V, N, S * C]
        blocks = torch.diag_embed(root.unflatten(-1, (observed.shape[1], -1)).movedim(2, 3))  # [V, N, C, S, S]
        return blocks.permute(4, 0, 1, 3, 2).flatten(3).flatten(0, 1)

    def curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        f, y, observed = self._by_site(outputs, targets)
        return self._sum(self.of.curvature(f, y), observed)

    def hessian_diagonal(self, outputs: Tensor, targets: Tensor) -> Tensor:
        f, y, observed = self._by_site(outputs, targets)
        return self._joined(self.of.hessian_diagonal(f, y), observed)

    def sampled_square_root(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        f, y, observed = self._by_site(outputs, targets)
        of_sites = self._split(uniforms.transpose(0, 1)).transpose(0, 1)  # [N * S, M, C]
        return self._joined(self.of.sampled_square_root(f, y, of_sites), observed)

    def target_shares(self, outputs: Tensor, targets: Tensor) -> Tensor:
        f, y, observed = self._by_site(outputs, targets)
        return self._joined(self.of.target_shares(f, y), observed)

    # -- predictions, of every site by itself --------------------------------------------------------

    def inverse_link(self, outputs: Tensor) -> Tensor:
        return self.of.inverse_link(outputs.unflatten(-1, (-1, self.layout.n_outputs))).flatten(-2)

    def needs_covariance(self, link: str) -> bool:
        return self.of.needs_covariance(link)

    def _moments(
        self, mean: Tensor, covariance: Tensor, link: str, normals: Tensor | None
    ) -> tuple[Tensor, Tensor, str, Tensor | None]:
        """Those of every site, without covariances between sites, which no target is about."""
        c = self.layout.n_outputs
        if self.needs_covariance(link):
            blocks = covariance.unflatten(-1, (-1, c)).unflatten(-3, (-1, c)).diagonal(dim1=-4, dim2=-2)
            covariance = blocks.movedim(-1, -3).flatten(-4, -3)
        else:
            covariance = self._split(covariance)
        return self._split(mean), covariance, link, None if normals is None else normals[:, :c]

    def predictive(self, mean: Tensor, covariance: Tensor, link: str, normals: Tensor | None = None) -> Tensor:
        predicted = self.of.predictive(*self._moments(mean, covariance, link, normals))
        return predicted.unflatten(-2, (len(mean), -1)).flatten(-2)

    def predictive_moments(
        self,
        mean: Tensor,
        covariance: Tensor,
        link: str,
        normals: Tensor | None = None,
        noise_variance: float | Tensor = 1.0,
    ) -> Moments:
        of_sites = self.of.predictive_moments(*self._moments(mean, covariance, link, normals), noise_variance)
        return Moments(*(v.unflatten(-2, (len(mean), -1)).flatten(-2) for v in vars(of_sites).values()))

    def negative_log_predictive(
        self,
        mean: Tensor,
        covariance: Tensor,
        targets: Tensor,
        link: str,
        normals: Tensor | None = None,
        noise_variance: float | Tensor = 1.0,
    ) -> Tensor:
        """Sum over sites of the negative logarithms of their own predictive probabilities."""
        _, y, observed = self._by_site(mean, targets)
        f, of_sites, link, normals = self._moments(mean, covariance, link, normals)
        scores = self.of.negative_log_predictive(f, of_sites, y, link, normals, noise_variance)
        return self._sum(scores, observed)

    def negative_log_predictive_of_samples(
        self, samples: Tensor, targets: Tensor, noise_variance: float | Tensor = 1.0
    ) -> Tensor:
        f, y, observed = self._by_site(samples, targets)
        return self._sum(self.of.negative_log_predictive_of_samples(f, y, noise_variance), observed)

    # -- answers -----------------------------------------------------------------------------------

    def log_loss(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        p, y, observed = self._by_site(probabilities, targets)
        return self._sum(self.of.log_loss(p, y), observed)

    def correctness(self, outputs: Tensor, targets: Tensor) -> Tensor:
        f, y, observed = self._by_site(outputs, targets)
        return self._sum(self.of.correctness(f, y), observed) / observed.sum(1).clamp_min(1)

    def confidence(self, probabilities: Tensor) -> Tensor:
        return self.of.confidence(self._split(probabilities)).unflatten(-1, (len(probabilities), -1)).mean(-1)

    # -- what it was made with ---------------------------------------------------------------------

    def __repr__(self) -> str:
        """The class with the likelihood of a site and the arguments that are not at their defaults."""
        given = {"class_dim": self.class_dim, "ignore_index": self.ignore_index, "shift": self.shift or None}
        named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        return f"Sites({', '.join([repr(self.of), *named])})"

    def settings(self) -> dict[str, Any]:
        """Arguments of :func:`restored_sites`."""
        return {
            "of": self.of.settings(), "class_dim": self.class_dim, "ignore_index": self.ignore_index,
            "shift": self.shift, "layout": self._layout,
        }  # fmt: skip


def restored_sites(kind: type[Likelihood], of: dict[str, Any], **settings: Any) -> Sites:
    """The likelihood of :meth:`Sites.settings`, for a likelihood of sites of some class."""
    return Sites(kind(**of), **settings)


def site_layout(likelihood: Likelihood, outputs: tuple[int, ...], targets: tuple[int, ...]) -> _data.SiteLayout:
    """Where the sites are in outputs of this shape, from what the likelihood says and the shape of their targets."""
    class_dim = likelihood.known_class_dim if isinstance(likelihood, Sites) else None
    return _data.SiteLayout.found(outputs, targets, class_dim)


def of_outputs(likelihood: Likelihood, layout: _data.SiteLayout | None) -> Likelihood:
    """The likelihood of outputs with this layout, a sum over sites; the likelihood itself for ``[N, C]`` (None).

    Raises:
        ValueError: If one of sites was asked for, and there are none.
    """
    if layout is not None:
        return (likelihood if isinstance(likelihood, Sites) else Sites(likelihood)).with_layout(layout)
    if isinstance(likelihood, Sites):
        raise ValueError(
            f"Expected dense outputs [N, ..., C] or [N, C, ...] for {likelihood}, got outputs [N, C]. Use "
            f"{likelihood.of} for them."
        )
    return likelihood
