"""Layers that are called for some data alone, such as the experts that a gate sends data to.

Their calls have no place in the order of all calls: gradients in their parameters are made apart from any layer.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from debiased_laplace import _data
from debiased_laplace.network.tracing import Recorder

if TYPE_CHECKING:
    from debiased_laplace.network.network import Network

#: Data to look at, once three of them differ.
MANY = 32


def called_by_need(network: Network, recorder: Recorder, inputs: _data.Inputs) -> set[str]:
    """Parameters that are in more calls for one datum than for another.

    Where there are any, others without a call may be called for further data.

    Args:
        network: Whose they are.
        recorder: Of a forward pass with several data.
        inputs: Data; there is a forward pass for each of them.
    """
    counts = [_n_calls(recorder)]
    for datum in range(_data.count(inputs)):
        one = _data.at_least(_data.take(inputs, slice(datum, datum + 1)), 2)
        _, of_one = network.forward(_data.to_device(one, network.device))
        counts.append(_n_calls(of_one))
    differ = {name for count in counts for name in count if any(other[name] != count[name] for other in counts)}
    return differ | (network.shapes.keys() - counts[0].keys() if differ else set())


def _n_calls(recorder: Recorder) -> Counter[str]:
    return Counter(name for names in recorder.names_of_calls() for name in names)
