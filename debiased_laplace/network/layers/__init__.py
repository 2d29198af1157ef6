"""Rules for the functions that layers call. Each module here has those of some functions; a new one needs no entry.

A rule reads the arguments of a function and says what they are (:class:`~.call.Arguments`): of which class the call is,
and its input, weight and bias. The class (:class:`~.call.Call`) brings inputs and gradients into canonical form, and
says which block the parameters get: arrangement, matrix shape, kind of curvature.

A function that is made of several layers, a recurrent network say, has no rule: it is written out
(:func:`~.call.composite`) in functions that have one.
"""

import importlib
import pkgutil

from debiased_laplace.network.layers.call import (
    COMPOSITES,
    RULES,
    Arguments,
    Call,
    Layout,
    composite,
    rule,
    rule_of_used,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "COMPOSITES", "RULES", "Arguments", "Call", "Layout", "composite", "rule", "rule_of_used",
]  # fmt: skip
