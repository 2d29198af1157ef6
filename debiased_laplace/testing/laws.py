r"""Laws of bases, curvatures, posteriors, predictions and likelihoods, each against the dense reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.parts.part import Projected
from debiased_laplace.curvature.projected import projected_curvatures
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.network.snapshot import in_evaluation_mode
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.predictive import functional_moments, joint_covariance
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.testing.dense import (
    dense_basis,
    dense_ggn,
    dense_jacobian,
    dense_loss_hessian,
    dense_posterior_precision,
    dense_prior_precision,
)

__all__ = [
    "assert_close",
    "check_basis",
    "check_curvatures",
    "check_likelihood",
    "check_posterior",
    "check_predictive",
    "check_projection",
]


def assert_close(law: str, actual: Tensor, expected: Tensor, tolerance: float, scale: float | None = None) -> None:
    """Equal up to the tolerance times the largest expected entry (or another natural scale)."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    if actual.shape != expected.shape:
        raise AssertionError(f"{law}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}.")
    if not expected.numel():
        return
    largest = float(expected.abs().max()) if scale is None else scale
    difference = float((actual - expected).abs().max())
    if not difference <= tolerance * max(largest, 1e-30):  # NaN fails too
        raise AssertionError(
            f"{law}: the largest difference is {difference:.3g}, {difference / max(largest, 1e-30):.3g} of the largest "
            f"entry {largest:.3g}; allowed is {tolerance:.0e} of it."
        )


def normals(shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def check_basis(basis: Basis, *, tolerance: float = 1e-9, seed: int = 0) -> None:
    r"""The columns are orthonormal, and lifting is the adjoint of projecting.

    Laws: :math:`U^\top U = I`; :math:`\langle U c, v \rangle = \langle c, U^\top v \rangle`;
    projecting what was lifted gives it back, and lifting what was projected does if the basis is
    complete; leading dimensions carry through; columns and parameters are counted once.
    """
    columns = dense_basis(basis)
    like, (d, rank) = columns, columns.shape
    if d != sum(shape.numel() for shape in basis.shapes.values()) or d != basis.n_params or rank != basis.rank:
        raise AssertionError(f"columns: expected {basis.n_params} x {basis.rank}, got {d} x {rank}.")
    if basis.complete != (d == rank):
        raise AssertionError(f"completeness: complete is {basis.complete} for {rank} columns of {d} entries.")
    counted = sorted(name for block in basis.blocks for name in block.parameters)
    if counted != sorted(basis.shapes):
        raise AssertionError(f"blocks: expected every parameter in exactly one, got {counted}.")
    identity = torch.eye(rank, dtype=like.dtype, device=like.device)
    assert_close("orthonormal columns, U^T U = I", columns.mT @ columns, identity, tolerance)
    vector, coefficients = normals((3, 2, d), like, seed), normals((3, 2, rank), like, seed + 1)
    assert_close("project(v) = U^T v", basis.project(vector), vector @ columns, tolerance)
    assert_close("lift(c) = U c", basis.lift(coefficients), coefficients @ columns.mT, tolerance)
    assert_close(
        "lift is the adjoint of project",
        (basis.lift(coefficients) * vector).sum(-1), (coefficients * basis.project(vector)).sum(-1), tolerance,
    )  # fmt: skip
    assert_close("project(lift(c)) = c", basis.project(basis.lift(coefficients)), coefficients, tolerance)
    if basis.complete:
        assert_close("lift(project(v)) = v if complete", basis.lift(basis.project(vector)), vector, tolerance)
    assert_close("join(split(c)) = c", basis.join(basis.split(coefficients)), coefficients, 0.0)
    per_block = torch.arange(1.0, len(basis.parts) + 1, dtype=like.dtype, device=like.device)
    assert_close(
        "columns lie in their blocks: lift(per_column c) = per_parameter lift(c)",
        basis.lift(basis.per_column(per_block) * coefficients),
        basis.per_parameter(per_block) * basis.lift(coefficients), tolerance,
    )  # fmt: skip


def check_projection(network: Network, basis: Basis, inputs: Any, *, tolerance: float = 1e-9, seed: int = 0) -> None:
    r"""``project_gradients`` gives :math:`U^\top J_n^\top s`, whole and in every contracted form.

    Args:
        network: The model with its blocks.
        basis: Its basis, complete or not.
        inputs: A few data.
        tolerance: Relative to the largest entry.
        seed: Of the random output vectors.
    """
    jacobians = dense_jacobian(network.model, inputs)
    n, c, _ = jacobians.shape
    vectors = normals((c + 1, n, c), jacobians, seed)
    expected = torch.einsum("vnc,ncd,dr->nvr", vectors, jacobians, dense_basis(basis).to(jacobians))
    factors = network.factors(inputs)
    prepared = basis.prepare_inputs([factors.inputs(block) for block in network.blocks], len(vectors))
    for _, back in factors.backpropagate(vectors, len(vectors)):
        for index, (part, members) in enumerate(zip(basis.parts, basis.members, strict=True)):
            exact = basis.split(expected)[index]  # [N, V, *shape]
            scales = normals((2, *part.shape), jacobians, seed + 1).square() + 0.1
            name = f"of {[network.blocks[i].name for i in members]}"

            def projected(index: int = index, back: list[Tensor] = back) -> Projected:
                # A contraction may overwrite what it is given.
                return list(basis.project_gradients(prepared, [g.clone() for g in back]))[index]

            flat, h = exact.flatten(2), scales.flatten(1)
            assert_close(f"projected gradients {name}", projected().rows(), flat, tolerance)
            assert_close(f"second moment {name}", projected().second_moment(), exact.square().sum((0, 1)), tolerance)
            contracted = torch.einsum("nvk,rk,nwk->rnvw", flat, h, flat)
            assert_close(f"covariances {name}", projected().covariances(scales), contracted, tolerance)
            assert_close(
                f"variances {name}", projected().variances(scales), contracted.diagonal(dim1=2, dim2=3), tolerance
            )
            assert_close(
                f"covariances of one posterior {name}", projected().covariances(scales[:1]), contracted[:1], tolerance
            )


def check_curvatures(
    network: Network, basis: Basis, data: WeightedData, likelihood: Likelihood, *, tolerance: float = 1e-9
) -> Tensor:
    r"""Equation (2) gives :math:`\mathrm{diag}(U^\top G U)`, never negative, whatever the chunks and the order.

    Returns:
        The curvatures, ``[rank]``.
    """
    ggn = dense_ggn(network.model, data.inputs, data.weights, likelihood, data.targets)
    columns = dense_basis(basis).to(ggn.device)
    curvatures = projected_curvatures(network, basis, CurvatureData(network, data, likelihood))
    expected = torch.einsum("dr,de,er->r", columns, ggn, columns)
    assert_close("curvatures are diag(U^T G U), equation (2)", curvatures, expected, tolerance)
    if bool((curvatures < 0).any()):
        raise AssertionError("curvatures are sums of squares: expected none below zero.")
    for chunk_size in (1, 2):
        chunked = projected_curvatures(network, basis, CurvatureData(network, data, likelihood, chunk_size=chunk_size))
        assert_close(f"curvatures do not depend on chunk_size={chunk_size}", chunked, curvatures, tolerance)
    reordered = data.take(torch.arange(len(data)).flip(0))
    curvatures_reordered = projected_curvatures(network, basis, CurvatureData(network, reordered, likelihood))
    assert_close("curvatures do not depend on the order of data", curvatures_reordered, curvatures, tolerance)
    return curvatures


def check_posterior(posterior: Posterior, *, tolerance: float = 1e-9, seed: int = 0) -> None:
    r"""Every formula of the Gaussian equals the dense one.

    Laws: products with the precision and the covariance, their inverse relation, log-determinants,
    square norm, log-density, the prior's terms, and the sample map :math:`S S^\top = P^{-1}` (the identity
    is pushed through it: no Monte Carlo).
    """
    precision = dense_posterior_precision(posterior)
    covariance = precision.inverse()
    prior = dense_prior_precision(posterior).to(precision)
    like, d = posterior.mean, len(precision)
    identity = torch.eye(d, dtype=like.dtype, device=like.device)
    # An ill-conditioned precision is no fault of the formulas.
    assert_close("matvec is P v, equation (3)", posterior.matvec(identity), precision, tolerance)
    assert_close("covariance_matvec is P^-1 v", posterior.covariance_matvec(identity), covariance, tolerance)
    assert_close(
        "covariance_matvec inverts matvec", posterior.covariance_matvec(posterior.matvec(identity)), identity, tolerance
    )
    log_det, log_det_prior = torch.linalg.slogdet(precision).logabsdet, prior.log().sum()
    scale = max(1.0, float(log_det.abs()), float(log_det_prior.abs()))
    for law, actual, expected in (
        ("log det P", posterior.log_det_precision, log_det),
        ("log det P_0", posterior.log_det_prior_precision, log_det_prior),
        ("log det P - log det P_0", posterior.log_det_ratio, log_det - log_det_prior),
    ):
        assert_close(law, actual, expected, tolerance, scale)
    values = posterior.mean + normals((3, 2, d), like, seed)
    delta = (values - posterior.mean).double()
    norms = torch.einsum("...d,de,...e->...", delta, precision, delta)
    assert_close("square norm", posterior.square_norm(values), norms, tolerance)
    gaussian = torch.distributions.MultivariateNormal(posterior.mean.double(), precision_matrix=precision)
    assert_close("log-density", posterior.log_prob(values), gaussian.log_prob(values.double()), tolerance)
    from_prior = (posterior.mean - posterior.prior_mean).double()
    scatter = (prior * from_prior.square()).sum()
    assert_close("scatter", posterior.scatter(), scatter, tolerance)
    evidence = -3.0 - 0.5 * (log_det - log_det_prior + scatter)
    assert_close("log marginal likelihood", posterior.log_marginal_likelihood(-3.0), evidence, tolerance, scale)
    pushed = posterior.transform(torch.eye(posterior.n_normals, dtype=like.dtype, device=like.device)).double()
    assert_close("sample map, S S^T = P^-1", pushed.mT @ pushed, covariance, tolerance)
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    first, second = (posterior.sample(2, generator) for generator in generators)
    assert_close("the same generator state gives the same samples", first, second, 0.0)


def check_predictive(network: Network, posterior: Posterior, inputs: Any, *, tolerance: float = 1e-9) -> None:
    r"""Equation (4): the functional (co)variance equals :math:`J P^{-1} J^\top`, for one posterior and for a grid."""
    jacobians = dense_jacobian(network.model, inputs)
    with torch.no_grad():
        outputs = in_evaluation_mode(network.model)(inputs).reshape(len(jacobians), -1)
    grid = [
        posterior, replace(posterior, prior_precision=7 * posterior.prior_precision),
        replace(posterior, n_data=posterior.n_data + 5, temperature=0.3),
    ]  # fmt: skip
    rows = jacobians.double()
    expected = torch.stack(
        [torch.einsum("ncd,de,nke->nck", rows, dense_posterior_precision(p).inverse(), rows) for p in grid]
    )
    diagonals = expected.diagonal(dim1=2, dim2=3)
    for chunk_size in (None, 2):
        mean, covariances = functional_moments(network, grid, inputs, chunk_size=chunk_size)
        _, variances = functional_moments(network, grid, inputs, covariance=False, chunk_size=chunk_size)
        assert_close("predictive mean", mean, outputs, tolerance)
        assert_close(f"functional covariance, chunk_size={chunk_size}", covariances, expected, tolerance)
        assert_close(f"functional variance, chunk_size={chunk_size}", variances, diagonals, tolerance)
    assert_close("covariance of one", functional_moments(network, posterior, inputs)[1], expected[0], tolerance)
    assert_close(
        "variance of one", functional_moments(network, posterior, inputs, covariance=False)[1], diagonals[0], tolerance
    )
    mean, joint = joint_covariance(network, posterior, inputs)
    flat = rows.flatten(0, 1)
    dense = flat @ dense_posterior_precision(posterior).inverse() @ flat.mT
    assert_close("joint mean", mean, outputs.flatten(), tolerance)
    assert_close("joint covariance", joint, dense, tolerance)


def check_likelihood(likelihood: Likelihood, outputs: Tensor, targets: Tensor, *, tolerance: float = 1e-9) -> None:
    r"""Laws of a likelihood, against automatic differentiation: call it on a likelihood of your own, in float64.

    * loss and gradient are of every datum, and :math:`S S^\top = \nabla^2_f \ell`, with its trace and diagonal;
    * random vectors have this expectation, exactly: over all :math:`2^C` signs, for up to ten outputs;
    * predictions and their scores without uncertainty are those of the outputs themselves.

    Args:
        likelihood: What to check.
        outputs: ``[N, C]``.
        targets: N valid targets.
        tolerance: Relative to the largest entry.

    Raises:
        AssertionError: If a law does not hold; it names it.
    """
    n, c = outputs.shape
    targets = likelihood.prepare_targets(targets, c)
    losses = likelihood.loss(outputs, targets)
    if losses.shape != outputs.shape[:1]:
        raise AssertionError(f"loss: expected one number for each datum, got shape {tuple(losses.shape)}.")
    root = likelihood.hessian_square_root(outputs, targets)
    if root.ndim != 3 or root.shape[1:] != outputs.shape or len(root) > c:
        raise AssertionError(
            f"Hessian square root: expected shape [V, *{tuple(outputs.shape)}] with V at most {c}, got "
            f"{tuple(root.shape)}."
        )

    def check(law: str, actual: Tensor, expected: Tensor) -> None:
        assert_close(law, actual, expected, tolerance)

    gradient = likelihood.gradient(outputs, targets)
    for law, function in (("loss", likelihood.loss), ("curvature_loss", likelihood.curvature_loss)):
        slope = torch.func.grad(lambda f, function=function: function(f, targets).sum())(outputs)
        check(f"gradient is that of {law}", gradient, slope)
    hessian = dense_loss_hessian(likelihood, outputs, targets)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    check("S S^T is the loss Hessian", torch.einsum("vnc,vnd->ncd", root, root), hessian)
    check("curvature is the trace of the loss Hessian", likelihood.curvature(outputs, targets), diagonal.sum(1))
    check("hessian_diagonal is that of the loss Hessian", likelihood.hessian_diagonal(outputs, targets), diagonal)
    if c <= 10:
        signs = torch.cartesian_prod(*[torch.tensor([0.25, 0.75], dtype=torch.float64)] * c).reshape(-1, c)
        drawn = likelihood.sampled_square_root(outputs, targets, signs.expand(n, -1, -1))
        check("random vectors have the loss Hessian", torch.einsum("vnc,vnd->ncd", drawn, drawn), hessian)

    alone = likelihood.negative_log_likelihood(outputs, targets)
    shift = alone - losses
    check("negative_log_likelihood is the loss up to a constant", shift, shift.mean().expand(n))
    twice = torch.stack([outputs, outputs])
    check("score of equal samples", likelihood.negative_log_predictive_of_samples(twice, targets), alone)
    predicted, normals = likelihood.inverse_link(outputs), outputs.new_ones(1, c)
    for link in dict.fromkeys((likelihood.links[0], "mc")):
        none = outputs.new_zeros(n, c, c) if likelihood.needs_covariance(link) else torch.zeros_like(outputs)
        score = likelihood.negative_log_predictive(outputs, none, targets, link, normals)
        check(f"{link}: score without uncertainty", score, alone)
        prediction = likelihood.predictive(outputs, torch.stack([none, none]), link, normals)
        check(f"{link}: prediction without uncertainty, of a grid", prediction, torch.stack([predicted, predicted]))
