"""What a server of processes imports before it forks: the suite, and all that a seed would import when it needs it.

Without what third parties remark at their import. Nothing is computed: no thread may run where a process is forked.
"""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    import netcal.metrics
    import PIL.Image
    import sklearn.datasets
    import sklearn.metrics
    import sklearn.model_selection
    import torch.fx.experimental.symbolic_shapes

    from debiased_laplace.evaluation.suite import seeds

__all__ = ["PIL", "netcal", "seeds", "sklearn", "torch"]
