"""All laws of a structure: of its statistics, and of everything that follows from the basis that it chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.curvature.projected import projected_curvatures
from debiased_laplace.curvature.structures import Structure
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.testing.dense import all_tensors, dense_basis
from debiased_laplace.testing.examples import Problem, problems, truncate
from debiased_laplace.testing.laws import (
    assert_close,
    check_basis,
    check_curvatures,
    check_posterior,
    check_predictive,
    check_projection,
)

__all__ = ["check_statistics", "check_structure"]


def check_structure(
    structure: Structure,
    *,
    tolerance: float = 1e-9,
    device: torch.device | str = "cpu",
    among: Sequence[Problem] | None = None,
) -> None:
    """Run every law on a few small networks: statistics, basis, projections, curvatures, posterior, predictions.

    Laws of the basis and everything after it are checked twice: for the basis as it comes, and cut to
    fewer columns, since posteriors of incomplete bases have further terms.

    Args:
        structure: What to check.
        tolerance: Relative to the largest entry.
        device: Where.
        among: Instead of the built-in :func:`problems`.

    Raises:
        AssertionError: If a law is broken; it names the network and the law.

    Example:
        >>> from debiased_laplace import Kronecker
        >>> from debiased_laplace.testing import check_structure
        >>> check_structure(Kronecker())
    """
    for problem in problems(device=device) if among is None else among:
        try:
            _check_problem(structure, problem, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{type(structure).__name__} on {problem.name!r}: {error}") from error


def _check_problem(structure: Structure, problem: Problem, tolerance: float) -> None:
    n = len(problem.data)
    first, second = problem.data.take(torch.arange(n // 2)), problem.data.take(torch.arange(n // 2, n))
    network = Network.discover(problem.model, problem.data.inputs)
    check_statistics(structure, network, problem.data, problem.likelihood, tolerance=tolerance)
    statistics = structure.measure(network, CurvatureData(network, first, problem.likelihood))
    whole = structure.eigenbasis(network, statistics)
    for basis in (whole, truncate(whole)):
        check_basis(basis, tolerance=tolerance)
        check_projection(network, basis, problem.data.inputs, tolerance=tolerance)
        curvatures = check_curvatures(network, basis, second, problem.likelihood, tolerance=tolerance)
        per_part = torch.linspace(0.4, 2.0, len(basis.parts), dtype=torch.float64, device=network.device)
        priors: list[tuple[Tensor, dict[str, Any]]] = [
            (per_part[:1], {}),
            (per_part, {"temperature": 0.7, "noise_variance": 0.3, "prior_mean": 0.2}),
        ]
        if all(part.takes_parameter_priors for part in basis.parts):
            per_parameter = torch.linspace(0.4, 2.0, basis.n_params, dtype=torch.float64, device=network.device)
            priors.append((per_parameter, {"temperature": 0.7}))
        for prior, extra in priors:
            posterior = Posterior(network.mean(), basis, curvatures, 50, prior, **extra)
            check_posterior(posterior, tolerance=tolerance)
            check_predictive(network, posterior, problem.data.inputs, tolerance=tolerance)


def check_statistics(
    structure: Structure,
    network: Network,
    data: WeightedData,
    likelihood: Likelihood,
    *,
    tolerance: float = 1e-9,
) -> None:
    """Statistics are additive over data, and depend neither on the chunks, nor on the order, nor on earlier data."""

    def measure(part: WeightedData, chunk_size: int | None = None) -> Any:
        return structure.measure(network, CurvatureData(network, part, likelihood, chunk_size=chunk_size))

    def matrix(statistics: Any) -> Tensor:
        """The curvature that statistics stand for, whatever they hold."""
        basis = structure.eigenbasis(network, statistics)
        columns = dense_basis(basis)
        return (columns * statistics.curvatures(basis).to(columns)) @ columns.mT

    whole = measure(data)
    kept = [tensor.clone() for tensor in all_tensors(whole)]
    if not kept:
        raise AssertionError("statistics: expected tensors in a dataclass, a list or a dictionary, got none.")
    reference = matrix(whole)
    n = len(data)
    first, second = data.take(torch.arange(n // 3)), data.take(torch.arange(n // 3, n))
    assert_close("statistics add up over data", matrix(measure(first) + measure(second)), reference, tolerance)
    for chunk_size in (1, 2):
        assert_close(
            f"statistics do not depend on chunk_size={chunk_size}",
            matrix(measure(data, chunk_size)),
            reference,
            tolerance,
        )
    flipped = data.take(torch.arange(n).flip(0))
    assert_close("statistics do not depend on the order of data", matrix(measure(flipped)), reference, tolerance)
    assert_close(
        "statistics scale with the weights", matrix(_scaled_sum(measure, data)), matrix(whole + whole), tolerance
    )
    measure(first)
    _assert_all_close("measuring again after other data gives the same", all_tensors(measure(data)), kept, 0.0)
    _assert_all_close("adding and measuring leave earlier statistics alone", all_tensors(whole), kept, 0.0)
    bases = [structure.eigenbasis(network, whole) for _ in range(2)]
    _assert_all_close("the basis is a function of the statistics",
                all_tensors(list(bases[0].parts)), all_tensors(list(bases[1].parts)), 0.0)  # fmt: skip
    if whole.exact:
        measured = projected_curvatures(network, bases[0], CurvatureData(network, data, likelihood))
        assert_close("statistics that are exact give equation (2)", whole.curvatures(bases[0]), measured, tolerance)


def _scaled_sum(measure: Callable[[WeightedData], Any], data: WeightedData) -> Any:
    """Statistics with unequal weights that add up to twice the original ones."""
    share = torch.linspace(0.1, 1.9, len(data), dtype=torch.float64)
    return measure(replace(data, weights=data.weights * share)) + measure(
        replace(data, weights=data.weights * (2 - share))
    )


def _assert_all_close(law: str, actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    if len(actual) != len(expected):
        raise AssertionError(f"{law}: expected {len(expected)} tensors, got {len(actual)}.")
    for one, other in zip(actual, expected, strict=True):
        assert_close(law, one, other, tolerance)
