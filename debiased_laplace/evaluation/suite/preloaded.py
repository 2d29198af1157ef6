"""What a server of processes imports before it forks: the suite, without what third parties remark at their import."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    from debiased_laplace.evaluation.suite import seeds

__all__ = ["seeds"]
