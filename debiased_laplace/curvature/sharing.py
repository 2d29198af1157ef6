r"""What K-FAC makes of a weight that a layer uses at several positions (patches, tokens, times, calls).

The gradient of a datum in such a weight is a sum over positions, :math:`\sum_s g_{ns} a_{ns}^\top`, and no Kronecker
product has the products of different positions. With :math:`S_n` positions that have a gradient,

.. math::
    \text{expand:}\quad A &= \sum_n w_n \sum_s a_{ns} a_{ns}^\top, &
    B &= \sum_n w_n \frac{1}{S_n} \sum_{s,v} g_{nsv} g_{nsv}^\top, \\
    \text{reduce:}\quad A &= \sum_n w_n \bar a_n \bar a_n^\top, \quad \bar a_n = \frac{1}{S_n} \sum_s a_{ns}, &
    B &= \sum_n w_n \sum_v \hat g_{nv} \hat g_{nv}^\top, \quad \hat g_{nv} = \sum_s g_{nsv}.

Positions of several calls are those of one: reduce sums over all positions of all calls, as the gradient does.
Positions without a gradient (padding) are in no sum (:meth:`~debiased_laplace.network.factors.Factors.has_gradient`).

Source: Eschenhagen, Immer, Turner, Schneider and Hennig (arXiv 2311.00636), sections 3.2 and 3.3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from debiased_laplace.network.selected import LayerInputs, masked, means


class WeightSharing(ABC):
    """Brings inputs and vectors at several positions into a form whose second moments are K-FAC's factors."""

    #: Whether A is the sum of outer products at all positions that have a gradient.
    sums_positions: ClassVar[bool]
    #: Whether it is that of the means over positions that have a gradient.
    means_positions: ClassVar[bool] = False

    @abstractmethod
    def inputs(self, inputs: LayerInputs, mask: Tensor | None) -> LayerInputs:
        """Inputs ``[N, G, I, S]``, of which A is the second moment.

        Args:
            inputs: At all positions.
            mask: Which of them have a gradient, ``[N, S]``; None for all.
        """

    @abstractmethod
    def vectors(self, vectors: Tensor, mask: Tensor | None) -> tuple[Tensor, float]:
        """Vectors ``[N, G, O, S]``, and by what their second moment is to be multiplied for B.

        Args:
            vectors: At all positions; zero where there is no gradient.
            mask: Which positions have a gradient, ``[N, S]``; None for all.
        """


@dataclass(frozen=True)
class Expand(WeightSharing):
    """Every position is a datum of its own: exact for a deep linear network with a loss at every position."""

    sums_positions: ClassVar[bool] = True

    def inputs(self, inputs: LayerInputs, mask: Tensor | None) -> LayerInputs:
        """Those at positions with a gradient."""
        return inputs if mask is None else masked(inputs, mask)

    def vectors(self, vectors: Tensor, mask: Tensor | None) -> tuple[Tensor, float]:
        """Those at all positions, of which a datum has the mean square."""
        if mask is None:
            return vectors, 1 / vectors.shape[-1]
        counts = mask.sum(1).clamp_min(1).to(vectors)  # where there is no position the vectors are zero
        return vectors * counts.rsqrt()[:, None, None, None], 1.0


@dataclass(frozen=True)
class Reduce(WeightSharing):
    """The positions of a datum are one: exact for a deep linear network whose outputs are averaged over positions."""

    sums_positions: ClassVar[bool] = False
    means_positions: ClassVar[bool] = True

    def inputs(self, inputs: LayerInputs, mask: Tensor | None) -> LayerInputs:
        """Their mean over positions with a gradient."""
        return inputs if mask is None and inputs.shape[-1] == 1 else means(inputs, mask)

    def vectors(self, vectors: Tensor, mask: Tensor | None) -> tuple[Tensor, float]:
        """Their sum over positions."""
        return vectors.sum(-1, keepdim=True), 1.0
