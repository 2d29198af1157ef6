r"""What mini-batching does to a quadratic, measured: bias, alignment of eigenspaces, planes, batch sizes, noise.

Every instrument is a function of :class:`~debiased_laplace.quadratic.quadratic.Quadratic` objects, or of their
eigenvectors, that returns a frozen dataclass: its tensors are float64, on the quadratics' device, and ``record()``
gives everything as numbers and lists for JSON.

Sources: Tatzel, Mucsányi, Hackel, Hennig, "Debiasing Mini-Batch Quadratics for Applications in Deep Learning"
(arXiv 2410.14325), figures 1 to 3; Dangel, Tatzel, Hennig, "ViViT" (arXiv 2106.02624), figure 2; Granziol, Zohren,
Roberts, "Learning Rates as a Function of Batch Size" (arXiv 2006.09092).
"""

from debiased_laplace.quadratic.instruments.batch_sizes import (
    BatchSizeCurve,
    BatchSizeSuggestion,
    Subsets,
    bias_against_batch_size,
    suggest_batch_size,
)
from debiased_laplace.quadratic.instruments.directions import (
    Along,
    DirectionalBias,
    SignalToNoise,
    directional_bias,
    signal_to_noise,
)
from debiased_laplace.quadratic.instruments.eigenspaces import Alignment, OnPlane, Plane, alignment, plane
from debiased_laplace.quadratic.instruments.estimates import Estimate
from debiased_laplace.quadratic.instruments.noise import (
    SpikedPrediction,
    noise_variance,
    product_noise,
    spiked_prediction,
)

__all__ = [
    "Alignment",
    "Along",
    "BatchSizeCurve",
    "BatchSizeSuggestion",
    "DirectionalBias",
    "Estimate",
    "OnPlane",
    "Plane",
    "SignalToNoise",
    "SpikedPrediction",
    "Subsets",
    "alignment",
    "bias_against_batch_size",
    "directional_bias",
    "noise_variance",
    "plane",
    "product_noise",
    "signal_to_noise",
    "spiked_prediction",
    "suggest_batch_size",
]
