"""Dense outputs: where the sites of a datum (pixels, tokens) and the outputs of a site are in what models return.

A site has C outputs, and a datum S sites; S may differ between batches. Rows of dense outputs are ``[N, S * C]``, one
site after the other, row by row as the model has them, the outputs of a site together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SiteLayout:
    """Where the outputs of a site are in a model's outputs.

    Attributes:
        class_dim: Which dimension they are: 1 (``[N, C, ...]``) or -1 (``[N, ..., C]``).
        n_outputs: C.
        n_dims: Dimensions of the sites: 1 for tokens, 2 for pixels.
    """

    class_dim: int
    n_outputs: int
    n_dims: int

    @classmethod
    def of(cls, outputs: Sequence[int], class_dim: int) -> SiteLayout:
        """That of outputs of this shape."""
        return cls(class_dim, outputs[class_dim], len(outputs) - 2)

    @classmethod
    def found(cls, outputs: Sequence[int], targets: Sequence[int], class_dim: int | None = None) -> SiteLayout:
        """That of outputs for which there are such targets: one for each site, or several.

        Args:
            outputs: Shape of outputs, with at least three dimensions.
            targets: Shape of their targets.
            class_dim: If it is known.

        Raises:
            ValueError: If targets fit the outputs in no way, or in two.
        """
        dims = (1, -1) if class_dim is None else (class_dim,)
        fitting = [dim for dim in dims if _site_shape(outputs, dim) in (targets[1:], _site_shape(targets, dim))]
        if not fitting:
            wanted = " or ".join(f"[N, {', '.join(map(str, _site_shape(outputs, dim)))}]" for dim in dims)
            raise ValueError(
                f"Expected outputs of shape [{outputs[0]}, C], one row for each datum, or a target for each site of "
                f"dense outputs, {wanted}: got outputs of shape {tuple(outputs)} and targets of shape {tuple(targets)}."
                " Wrap the model in one that pools or flattens its outputs, or resize the one to the other."
            )
        one_each = [dim for dim in fitting if _site_shape(outputs, dim) == tuple(targets[1:])]
        if len(one_each) > 1:
            raise ValueError(
                f"It is not clear which dimension of outputs of shape {tuple(outputs)} with targets of shape "
                f"{tuple(targets)} has the outputs of a site. Say it: dl.Sites(dl.Categorical(), class_dim=1) or "
                "class_dim=-1."
            )
        # Targets of the same shape do not tell: images have their channels first, sequences their features last.
        usual = 1 if len(outputs) > 3 else -1
        return cls.of(outputs, (one_each or [usual if usual in fitting else fitting[0]])[0])

    def rows(self, outputs: Any, n: int) -> Tensor:
        """A model's outputs for N data as ``[N, S * C]``.

        Raises:
            ValueError: If they are of another kind than the outputs that the layout was found with.
        """
        if (
            not isinstance(outputs, Tensor)
            or outputs.ndim != self.n_dims + 2
            or len(outputs) != n
            or outputs.shape[self.class_dim] != self.n_outputs
        ):
            expected = f"[{n}, ..., {self.n_outputs}]" if self.class_dim == -1 else f"[{n}, {self.n_outputs}, ...]"
            raise ValueError(
                f"Expected outputs of shape {expected} with {self.n_dims} dimensions of sites, as the model had "
                f"before, got {tuple(getattr(outputs, 'shape', ())) or type(outputs).__name__}."
            )
        return self.by_site(outputs).flatten(1)

    def by_site(self, values: Tensor) -> Tensor:
        """``[N, C, ...]`` or ``[N, ..., C]`` as ``[N, S, C]``."""
        return values.movedim(self.class_dim, -1).flatten(1, -2)

    def restored(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """``[N, S, K]`` as the model has it, ``[N, K, ...]`` or ``[N, ..., K]``, for sites of this shape."""
        return values.reshape(len(values), *shape, values.shape[-1]).movedim(-1, self.class_dim)

    def shape(self, outputs: Sequence[int]) -> tuple[int, ...]:
        """Shape of the sites in outputs of this shape."""
        return _site_shape(outputs, self.class_dim)

    def count(self, n_entries: int) -> int:
        """S, of a datum with ``S * C`` outputs."""
        return n_entries // self.n_outputs


def _site_shape(shape: Sequence[int], class_dim: int) -> tuple[int, ...]:
    """What is left of a shape without the data and the outputs of a site."""
    return tuple(shape[2:]) if class_dim == 1 else tuple(shape[1:-1])
