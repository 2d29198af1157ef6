"""What a server of processes imports before it forks: the suite, without the remarks of third parties at their import."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    from debiased_laplace.evaluation import suite

__all__ = ["suite"]
