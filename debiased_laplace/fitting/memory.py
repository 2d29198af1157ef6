r"""Which part of a budget of memory is left for chunks of data, when statistics and directions have theirs.

With the numbers that a structure holds (:class:`~debiased_laplace.curvature.structures.base.Held`), F folds, and one
for data that belong to all of them, a fit holds at most

.. math::
    \underbrace{(1 + 8) D}_{\text{weights, curvatures}} + \max\big(3\,\text{observed},\;
    \text{observed} + (F + 3)\,\text{statistics} + \text{basis} + \text{statistics} + \text{workspace}\big)

numbers: sums over the stream while they grow; then these, the statistics of every fold, their sum, the final
directions and those of a round, of which the inputs are shared. What is left is for activations and back-propagated
vectors of a chunk of data.
"""

from __future__ import annotations

import torch

from debiased_laplace.curvature.structures import Structure
from debiased_laplace.network.network import Network
from debiased_laplace.sampling.splits import Split

#: Vectors ``[D]`` that exist at once: the weights, and curvatures with their sums and errors.
VECTORS = 1 + 8


def held_by_fit(network: Network, structure: Structure, split: Split) -> int:
    """Bytes that a fit holds besides chunks of data, at most.

    Raises:
        ValueError: If the structure does not know.
    """
    held = structure.held(network)
    if held is None:
        raise ValueError(
            f"Expected a structure whose memory does not depend on the data with memory_budget, got {structure}. Bound "
            "the data that are worked on at a time with chunk_size, and those that are drawn with the sampler."
        )
    measured = held.observed + (split.folds + 3) * held.statistics + held.basis + held.statistics + held.workspace
    return (VECTORS * network.n_params + max(3 * held.observed, measured)) * (torch.finfo(network.dtype).bits // 8)


def memory_of_chunks(network: Network, structure: Structure, split: Split, budget: int) -> int:
    """Bytes of the budget that are left for chunks of data.

    Raises:
        ValueError: If that is less than one datum takes; it says what is needed.
    """
    held, of_one = held_by_fit(network, structure, split), network.memory_of_a_datum()
    if held + of_one > budget:
        raise ValueError(
            f"Expected a memory_budget of at least {held + of_one:,} bytes for {structure} on {network.n_params:,} "
            f"parameters ({held:,} for statistics and directions, {of_one:,} for one datum), got {budget:,}. Make "
            'factors smaller with Kronecker(max_factor=...), choose fewer parameters (parameters="last_layer", or '
            "patterns), or use Diagonal()."
        )
    return budget - held
