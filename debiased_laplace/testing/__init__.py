r"""Conformance laws and a dense autograd reference, for whoever adds a structure, a likelihood or a sampler.

A law raises an ``AssertionError`` that names it and says by how much it is broken. A new structure, likelihood or
sampler gets all of them with one line::

    check_structure(MyStructure())
    check_likelihood(MyLikelihood(), outputs, targets)
    check_sampler(MySampler(budget=20), batches)

``dense`` has the reference, ``laws`` what is checked against it, ``examples`` the small networks with data on which a
structure is, ``structures`` the laws of a structure, ``samplers`` those of a sampler. docs/theory.md has the equations,
and a glossary.
"""

from debiased_laplace.testing.dense import (
    dense_basis,
    dense_ggn,
    dense_jacobian,
    dense_loss_hessian,
    dense_posterior_precision,
)
from debiased_laplace.testing.examples import Problem, problems, truncate
from debiased_laplace.testing.laws import (
    assert_close,
    check_basis,
    check_curvatures,
    check_likelihood,
    check_posterior,
    check_predictive,
    check_projection,
)
from debiased_laplace.testing.samplers import check_sampler
from debiased_laplace.testing.structures import check_statistics, check_structure

__all__ = [
    "Problem",
    "assert_close",
    "check_basis",
    "check_curvatures",
    "check_likelihood",
    "check_posterior",
    "check_predictive",
    "check_projection",
    "check_sampler",
    "check_statistics",
    "check_structure",
    "dense_basis",
    "dense_ggn",
    "dense_jacobian",
    "dense_loss_hessian",
    "dense_posterior_precision",
    "problems",
    "truncate",
]
