"""What a server of processes imports before it forks: the suite, and all that a seed would import when it needs it.

Without what third parties remark at their import. Nothing is computed: no thread may run where a process is forked.
What is imported stays: the garbage collector looks through none of it, neither meanwhile nor later in any process.
"""

import gc
import warnings

gc.disable()
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        import PIL.Image
        import sklearn.datasets
        import sklearn.metrics
        import sklearn.model_selection
        import torch._dynamo  # otherwise by the first optimiser
        import torch.fx.experimental.symbolic_shapes  # by the first vector that is back-propagated

        from debiased_laplace.evaluation.suite import seeds
finally:
    gc.freeze()
    gc.enable()

__all__ = ["PIL", "seeds", "sklearn", "torch"]
