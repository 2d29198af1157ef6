r"""How sensitive the loss is to every block of parameters: traces and largest eigenvalues of their curvature.

Of a block b of parameters (a layer) :math:`G_b` is the diagonal block of the curvature that the posterior has, a
per-datum mean. Its trace divided by the number of parameters is what a small independent error of every parameter
costs, :math:`\mathbb E[\tfrac12 \Delta^\top G_b \Delta] = \tfrac12 \mathbb E[\Delta_i^2] \operatorname{tr} G_b`.

Sources: Dong et al., "HAWQ: Hessian aware quantization of neural networks with mixed precision", arXiv 1905.03696
(largest eigenvalue), and "HAWQ-V2: Hessian aware trace-weighted quantization", arXiv 1911.03852 (mean trace); there by
power iterations and random vectors, here exact from what a fit has measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from debiased_laplace.posterior.gaussian import Posterior


@dataclass(frozen=True)
class Sensitivity:
    """Curvature of one block, a per-datum mean in nats.

    Attributes:
        name: Of the block, a module or a parameter.
        parameters: Names of its parameters.
        n_params: How many of their entries are uncertain.
        trace: Of the curvature.
        largest: Largest eigenvalue of the curvature that the posterior has.
    """

    name: str
    parameters: tuple[str, ...]
    n_params: int
    trace: float
    largest: float

    @property
    def mean_trace(self) -> float:
        """Trace for each parameter: HAWQ-V2's sensitivity."""
        return self.trace / self.n_params


def sensitivities(posterior: Posterior) -> list[Sensitivity]:
    r"""Every block's sensitivity, the largest mean trace first.

    Traces along all directions are those of the data's own curvature: that is so for all structures but ``LowRank``,
    whose traces are along its directions, and ``Kronecker`` with ``estimator="factored"``. The largest eigenvalue is
    exact of ``Full`` (of one fold of data); of ``Kronecker`` and ``Diagonal`` it is the largest curvature along one of
    their directions, which is a lower bound.

    Args:
        posterior: With any structure.
    """
    basis, found = posterior.basis, []
    free = None if posterior.fixed is None else basis.matrices((~posterior.fixed).double())
    curvatures = basis.split(posterior.curvatures.detach().double())
    for part, members, of_part in zip(basis.parts, basis.members, curvatures, strict=True):
        if free is not None:  # directions that are parameters have curvatures also where these are fixed
            of_part = of_part * part.weighted_average([free[i] for i in members]).reshape(of_part.shape)
        for index, values in zip(members, part.block_eigenvalues(of_part), strict=True):
            block = basis.blocks[index]
            n_params = block.size if free is None else int(free[index].sum())
            if n_params:
                trace, largest = float(values.sum()), float(values.max())
                found.append(Sensitivity(block.name, block.parameters, n_params, trace, largest))
    return sorted(found, key=lambda one: -one.mean_trace)
