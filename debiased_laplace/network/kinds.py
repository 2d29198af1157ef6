r"""Kinds of curvature that a block of parameters may have where a structure is Kronecker-factored.

A kind says which directions a block gets from the second moments A of its inputs and B of its back-propagated vectors:
their eigenvectors, or the unit vectors, for which a diagonal is all that is measured and kept.

    ==================  ==============  ==============  =======================================================
    kind                of the inputs   of the outputs  for
    ==================  ==============  ==============  =======================================================
    KRONECKER           eigenvectors    eigenvectors    linear layers and convolutions
    DENSE               (one input)     eigenvectors    normalisation layers, and parameters without a layer
    DIAGONAL_INPUTS     unit vectors    eigenvectors    embeddings: A is the diagonal of the token frequencies
    DIAGONAL            unit vectors    unit vectors    what is too large for anything else
    NO_CURVATURE        unit vectors    unit vectors    what takes no part in the forward pass
    ==================  ==============  ==============  =======================================================
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """Which factors of a block have their eigenvectors as directions.

    Attributes:
        name: For people.
        rotates_inputs: Whether the directions of the inputs are eigenvectors; otherwise unit vectors.
        rotates_outputs: The same for the outputs.
    """

    name: str
    rotates_inputs: bool = True
    rotates_outputs: bool = True


KRONECKER = Kind("kronecker")
DENSE = Kind("exact")
DIAGONAL_INPUTS = Kind("kronecker", rotates_inputs=False)
DIAGONAL = Kind("diagonal", rotates_inputs=False, rotates_outputs=False)
NO_CURVATURE = Kind("prior alone", rotates_inputs=False, rotates_outputs=False)

#: Most parameters of a dense block; of more the curvature is a diagonal where there are no factors.
MAX_DENSE = 4096
