r"""Prediction sets with a guarantee, on top of any predictor: split-conformal prediction.

Arrays in, arrays out; nothing is known of networks or posteriors. A *score* says how badly a label fits a prediction.
:func:`calibrate` takes the scores of held-out data, and the set of a new datum has all labels whose score is at most
the threshold that these give. It holds the label with probability :math:`1 - \alpha` if the held-out data and the new
ones are exchangeable, however wrong the predictor is. Data that have trained or tuned it (a temperature, a prior
precision) are not exchangeable with new ones.

Source: Vovk, Gammerman and Shafer 2005; Angelopoulos and Bates, arXiv 2107.07511, is an introduction.
"""

from debiased_laplace.conformal.calibration import PredictionSets, calibrate
from debiased_laplace.conformal.classification import APS, RAPS, THR
from debiased_laplace.conformal.ranks import mean_bound, threshold
from debiased_laplace.conformal.regression import CQR, AbsoluteResidual, NormalisedResidual

__all__ = [
    "APS",
    "CQR",
    "RAPS",
    "THR",
    "AbsoluteResidual",
    "NormalisedResidual",
    "PredictionSets",
    "calibrate",
    "mean_bound",
    "threshold",
]
