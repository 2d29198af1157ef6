"""The checks of arrays that all scores share, from where other rooms have them too."""

from debiased_laplace._arrays import (
    ROW_SUM_TOLERANCE,
    Array,
    as_array,
    check_predictions,
    check_probabilities,
    row_sum_tolerance,
)

__all__ = [
    "ROW_SUM_TOLERANCE",
    "Array",
    "as_array",
    "check_predictions",
    "check_probabilities",
    "row_sum_tolerance",
]
