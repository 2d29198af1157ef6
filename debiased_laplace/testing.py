r"""Conformance laws and a dense autograd reference, for whoever adds a structure, a basis or a likelihood.

The reference knows nothing of layers, factors or blocks: Jacobians come from :func:`torch.func.jacrev`
and the Hessian of the loss from :func:`torch.func.hessian`, so that it shares no formula with what it
checks. It needs ``N * C * D`` numbers for Jacobians and ``D * D`` for matrices: tiny networks only.

A law raises an ``AssertionError`` that names it and says by how much it is broken. A new structure
gets all of them with one line::

    check_structure(MyStructure())

Parameter vectors are in the order of ``model.named_parameters()``, trainable ones only, as everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _data
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.parts.part import Projected
from debiased_laplace.curvature.projected import projected_curvatures
from debiased_laplace.curvature.structures import Structure
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.network.snapshot import in_evaluation_mode
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.predictive import functional_moments, joint_covariance
from debiased_laplace.sampling.sample import WeightedData

__all__ = [
    "Problem",
    "check_basis",
    "check_curvatures",
    "check_likelihood",
    "check_posterior",
    "check_predictive",
    "check_projection",
    "check_statistics",
    "check_structure",
    "dense_basis",
    "dense_ggn",
    "dense_jacobian",
    "dense_posterior_precision",
    "problems",
    "truncate",
]


# -- the dense reference ---------------------------------------------------------------------------


def dense_jacobian(model: nn.Module, inputs: Any) -> Tensor:
    r"""Jacobians of the outputs in the trainable parameters, ``[N, C, D]``, in evaluation mode.

    Args:
        model: Any module with outputs ``[N, C]`` (or ``[N]``).
        inputs: N data, as the model takes them.

    Example:
        >>> import torch
        >>> from debiased_laplace.testing import dense_jacobian
        >>> dense_jacobian(torch.nn.Linear(1, 1), torch.tensor([[2.0]]))
        tensor([[[2., 1.]]])
    """
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    n = _data.count(inputs)

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (inputs,)).reshape(n, -1)

    module = in_evaluation_mode(model)
    with torch.inference_mode(False), torch.enable_grad():
        jacobians = torch.func.jacrev(outputs)(parameters)
    return torch.cat([jacobians[name].reshape(n, jacobians[name].shape[1], -1) for name in parameters], -1).detach()


def dense_loss_hessian(likelihood: Likelihood, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
    r"""Hessian of the loss in the outputs by automatic differentiation, ``[N, C] -> [N, C, C]``.

    Args:
        likelihood: Its :meth:`~debiased_laplace.likelihoods.Likelihood.loss` is differentiated.
        outputs: ``[N, C]``.
        targets: Needed only where the Hessian depends on them; any valid ones by default.
    """
    targets = (_any_targets(likelihood, outputs) if targets is None else targets).to(outputs.device)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return likelihood.curvature_loss(output[None], target[None])[0]

    with torch.inference_mode(False), torch.enable_grad():
        return torch.stack(
            [torch.func.hessian(loss)(o, t) for o, t in zip(outputs.detach(), targets, strict=True)]
        ).detach()


def dense_ggn(
    model: nn.Module, inputs: Any, weights: Tensor, likelihood: Likelihood, targets: Tensor | None = None
) -> Tensor:
    r"""The generalised Gauss-Newton matrix, :math:`\sum_n w_n J_n^\top (\nabla^2_f \ell_n) J_n`, ``[D, D]``.

    Args:
        model: Any module with outputs ``[N, C]`` (or ``[N]``).
        inputs: N data.
        weights: ``[N]``.
        likelihood: Gives the loss; its Hessian square root is not used.
        targets: Needed only where the loss Hessian depends on them.
    """
    jacobians = dense_jacobian(model, inputs)
    with torch.no_grad():
        outputs = in_evaluation_mode(model)(inputs).reshape(len(jacobians), -1)
    hessians = dense_loss_hessian(likelihood, outputs, targets)
    return torch.einsum("n,ncd,nce,nef->df", weights.to(jacobians), jacobians, hessians, jacobians)


def dense_basis(basis: Basis) -> Tensor:
    """The orthonormal columns U as a matrix, ``[D, rank]``, by lifting the identity."""
    like = next(iter(_tensors(list(basis.parts))), torch.empty(0, dtype=torch.float64))
    return basis.lift(torch.eye(basis.rank, dtype=like.dtype, device=like.device)).mT


def dense_posterior_precision(posterior: Posterior) -> Tensor:
    r"""Equation (3) as a matrix, ``[D, D]``, float64.

    :math:`\frac{N}{\sigma^2 T} U \mathrm{diag}(\lambda) U^\top + \Delta`, with the prior precision
    :math:`\Delta` of every parameter read off its block.
    """
    basis = posterior.basis
    columns = dense_basis(basis).to(posterior.curvatures.device, torch.float64)
    beta = posterior.n_data / (float(posterior.noise_variance) * posterior.temperature)
    curvature = columns @ torch.diag(posterior.curvatures.double()) @ columns.mT
    return beta * curvature + torch.diag(_dense_prior(posterior).to(curvature))


def _dense_prior(posterior: Posterior) -> Tensor:
    """Prior precision of every parameter, ``[D]``, one parameter name after the other."""
    basis = posterior.basis
    priors = posterior.prior_precision.detach().double().cpu()
    if len(priors) not in (1, len(basis.parts)):
        return priors
    of_name = {
        name: float(priors[index if len(priors) > 1 else 0])
        for index, members in enumerate(basis.members)
        for i in members
        for name in basis.blocks[i].parameters
    }
    return torch.cat(
        [torch.full((shape.numel(),), of_name[name], dtype=torch.float64) for name, shape in basis.shapes.items()]
    )


def _any_targets(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    n, c = outputs.shape
    widths = (c, c // 2) if c > 1 else (c,)
    candidates = [torch.zeros(n, dtype=torch.long), *(torch.zeros(n, k, dtype=outputs.dtype) for k in widths)]
    for targets in candidates:
        try:
            likelihood.check_targets(targets, c)
        except (TypeError, ValueError):
            continue
        return targets.to(outputs.device)
    raise ValueError(f"Found no valid targets for {type(likelihood).__name__}: pass some.")


def truncate(basis: Basis, fraction: float = 0.5) -> Basis:
    """An incomplete basis: the first columns of every part, at least one and never all of a wide one.

    The parameters themselves as directions stay: they are complete by nature.
    """

    def kept(width: int) -> int:
        return max(1, min(width - 1, round(width * fraction)))

    return replace(basis, parts=[part.truncated(kept) for part in basis.parts])


# -- laws ------------------------------------------------------------------------------------------


def _assert_equal(law: str, actual: Tensor, expected: Tensor, tolerance: float, scale: float | None = None) -> None:
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
    _assert_equal("orthonormal columns, U^T U = I", columns.mT @ columns, identity, tolerance)
    vector, coefficients = _normals((3, 2, d), like, seed), _normals((3, 2, rank), like, seed + 1)
    _assert_equal("project(v) = U^T v", basis.project(vector), vector @ columns, tolerance)
    _assert_equal("lift(c) = U c", basis.lift(coefficients), coefficients @ columns.mT, tolerance)
    _assert_equal(
        "lift is the adjoint of project",
        (basis.lift(coefficients) * vector).sum(-1), (coefficients * basis.project(vector)).sum(-1), tolerance,
    )  # fmt: skip
    _assert_equal("project(lift(c)) = c", basis.project(basis.lift(coefficients)), coefficients, tolerance)
    if basis.complete:
        _assert_equal("lift(project(v)) = v if complete", basis.lift(basis.project(vector)), vector, tolerance)
    _assert_equal("join(split(c)) = c", basis.join(basis.split(coefficients)), coefficients, 0.0)
    per_block = torch.arange(1.0, len(basis.parts) + 1, dtype=like.dtype, device=like.device)
    _assert_equal(
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
    vectors = _normals((c + 1, n, c), jacobians, seed)
    expected = torch.einsum("vnc,ncd,dr->nvr", vectors, jacobians, dense_basis(basis).to(jacobians))
    factors = network.factors(inputs)
    prepared = basis.prepare_inputs([factors.inputs(block) for block in network.blocks], len(vectors))
    for _, back in factors.backpropagate(vectors, len(vectors)):
        for index, (part, members) in enumerate(zip(basis.parts, basis.members, strict=True)):
            own = basis.split(expected)[index]  # [N, V, *shape]
            scales = _normals((2, *part.shape), jacobians, seed + 1).square() + 0.1
            name = f"of {[network.blocks[i].name for i in members]}"

            def projected(index: int = index, back: list[Tensor] = back) -> Projected:
                # A contraction may overwrite what it is given.
                return list(basis.project_gradients(prepared, [g.clone() for g in back]))[index]

            flat, h = own.flatten(2), scales.flatten(1)
            _assert_equal(f"projected gradients {name}", projected().rows(), flat, tolerance)
            _assert_equal(f"second moment {name}", projected().second_moment(), own.square().sum((0, 1)), tolerance)
            contracted = torch.einsum("nvk,rk,nwk->rnvw", flat, h, flat)
            _assert_equal(f"covariances {name}", projected().covariances(scales), contracted, tolerance)
            _assert_equal(
                f"variances {name}", projected().variances(scales), contracted.diagonal(dim1=2, dim2=3), tolerance
            )
            _assert_equal(
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
    _assert_equal("curvatures are diag(U^T G U), equation (2)", curvatures, expected, tolerance)
    if bool((curvatures < 0).any()):
        raise AssertionError("curvatures are sums of squares: expected none below zero.")
    for chunk_size in (1, 2):
        chunked = projected_curvatures(network, basis, CurvatureData(network, data, likelihood, chunk_size=chunk_size))
        _assert_equal(f"curvatures do not depend on chunk_size={chunk_size}", chunked, curvatures, tolerance)
    reordered = data.take(torch.arange(len(data)).flip(0))
    curvatures_reordered = projected_curvatures(network, basis, CurvatureData(network, reordered, likelihood))
    _assert_equal("curvatures do not depend on the order of data", curvatures_reordered, curvatures, tolerance)
    return curvatures


def check_posterior(posterior: Posterior, *, tolerance: float = 1e-9, seed: int = 0) -> None:
    r"""Every formula of the Gaussian equals the dense one.

    Laws: products with the precision and the covariance, their inverse relation, log-determinants,
    square norm, log-density, the prior's terms, and the sample map :math:`S S^\top = P^{-1}` (the identity
    is pushed through it: no Monte Carlo).
    """
    precision = dense_posterior_precision(posterior)
    covariance = precision.inverse()
    prior = _dense_prior(posterior).to(precision)
    like, d = posterior.mean, len(precision)
    identity = torch.eye(d, dtype=like.dtype, device=like.device)
    # An ill-conditioned precision is no fault of the formulas.
    _assert_equal("matvec is P v, equation (3)", posterior.matvec(identity), precision, tolerance)
    _assert_equal("covariance_matvec is P^-1 v", posterior.covariance_matvec(identity), covariance, tolerance)
    _assert_equal(
        "covariance_matvec inverts matvec", posterior.covariance_matvec(posterior.matvec(identity)), identity, tolerance
    )
    log_det, log_det_prior = torch.linalg.slogdet(precision).logabsdet, prior.log().sum()
    scale = max(1.0, float(log_det.abs()), float(log_det_prior.abs()))
    for law, actual, expected in (
        ("log det P", posterior.log_det_precision, log_det),
        ("log det P_0", posterior.log_det_prior_precision, log_det_prior),
        ("log det P - log det P_0", posterior.log_det_ratio, log_det - log_det_prior),
    ):
        _assert_equal(law, actual, expected, tolerance, scale)
    values = posterior.mean + _normals((3, 2, d), like, seed)
    delta = (values - posterior.mean).double()
    norms = torch.einsum("...d,de,...e->...", delta, precision, delta)
    _assert_equal("square norm", posterior.square_norm(values), norms, tolerance)
    gaussian = torch.distributions.MultivariateNormal(posterior.mean.double(), precision_matrix=precision)
    _assert_equal("log-density", posterior.log_prob(values), gaussian.log_prob(values.double()), tolerance)
    from_prior = (posterior.mean - posterior.prior_mean).double()
    scatter = (prior * from_prior.square()).sum()
    _assert_equal("scatter", posterior.scatter(), scatter, tolerance)
    evidence = -3.0 - 0.5 * (log_det - log_det_prior + scatter)
    _assert_equal("log marginal likelihood", posterior.log_marginal_likelihood(-3.0), evidence, tolerance, scale)
    pushed = posterior.transform(torch.eye(posterior.n_normals, dtype=like.dtype, device=like.device)).double()
    _assert_equal("sample map, S S^T = P^-1", pushed.mT @ pushed, covariance, tolerance)
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    first, second = (posterior.sample(2, generator) for generator in generators)
    _assert_equal("the same generator state gives the same samples", first, second, 0.0)


def check_predictive(network: Network, posterior: Posterior, inputs: Any, *, tolerance: float = 1e-9) -> None:
    r"""Equation (4): the functional (co)variance equals :math:`J P^{-1} J^\top`, for one posterior and for a grid."""
    jacobians = dense_jacobian(network.model, inputs)
    with torch.no_grad():
        outputs = in_evaluation_mode(network.model)(inputs).reshape(len(jacobians), -1)
    grid = [
        posterior, replace(posterior, prior_precision=7 * posterior.prior_precision),
        replace(posterior, n_data=posterior.n_data + 5, temperature=0.3),
    ]  # fmt: skip
    expected = torch.stack(
        [
            torch.einsum("ncd,de,nke->nck", j := jacobians.double(), dense_posterior_precision(p).inverse(), j)
            for p in grid
        ]
    )
    diagonals = expected.diagonal(dim1=2, dim2=3)
    for chunk_size in (None, 2):
        mean, covariances = functional_moments(network, grid, inputs, chunk_size=chunk_size)
        _, variances = functional_moments(network, grid, inputs, covariance=False, chunk_size=chunk_size)
        _assert_equal("predictive mean", mean, outputs, tolerance)
        _assert_equal(f"functional covariance, chunk_size={chunk_size}", covariances, expected, tolerance)
        _assert_equal(f"functional variance, chunk_size={chunk_size}", variances, diagonals, tolerance)
    _assert_equal("covariance of one", functional_moments(network, posterior, inputs)[1], expected[0], tolerance)
    _assert_equal(
        "variance of one", functional_moments(network, posterior, inputs, covariance=False)[1], diagonals[0], tolerance
    )
    mean, joint = joint_covariance(network, posterior, inputs)
    rows = jacobians.flatten(0, 1).double()
    dense = rows @ dense_posterior_precision(posterior).inverse() @ rows.mT
    _assert_equal("joint mean", mean, outputs.flatten(), tolerance)
    _assert_equal("joint covariance", joint, dense, tolerance)


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
    kept = [tensor.clone() for tensor in _tensors(whole)]
    if not kept:
        raise AssertionError("statistics: expected tensors in a dataclass, a list or a dictionary, found none.")
    reference = matrix(whole)
    n = len(data)
    first, second = data.take(torch.arange(n // 3)), data.take(torch.arange(n // 3, n))
    _assert_equal("statistics add up over data", matrix(measure(first) + measure(second)), reference, tolerance)
    for chunk_size in (1, 2):
        _assert_equal(
            f"statistics do not depend on chunk_size={chunk_size}",
            matrix(measure(data, chunk_size)),
            reference,
            tolerance,
        )
    flipped = data.take(torch.arange(n).flip(0))
    _assert_equal("statistics do not depend on the order of data", matrix(measure(flipped)), reference, tolerance)
    _assert_equal(
        "statistics scale with the weights", matrix(_scaled_sum(measure, data)), matrix(whole + whole), tolerance
    )
    measure(first)
    _assert_all("measuring again after other data gives the same", _tensors(measure(data)), kept, 0.0)
    _assert_all("adding and measuring leave earlier statistics alone", _tensors(whole), kept, 0.0)
    bases = [structure.eigenbasis(network, whole) for _ in range(2)]
    _assert_all("the basis is a function of the statistics",
                _tensors(list(bases[0].parts)), _tensors(list(bases[1].parts)), 0.0)  # fmt: skip
    if whole.exact:
        measured = projected_curvatures(network, bases[0], CurvatureData(network, data, likelihood))
        _assert_equal("statistics that are exact give equation (2)", whole.curvatures(bases[0]), measured, tolerance)


def _scaled_sum(measure: Callable[[WeightedData], Any], data: WeightedData) -> Any:
    """Statistics with unequal weights that add up to twice the original ones."""
    share = torch.linspace(0.1, 1.9, len(data), dtype=torch.float64)
    return measure(replace(data, weights=data.weights * share)) + measure(
        replace(data, weights=data.weights * (2 - share))
    )


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
        _assert_equal(law, actual, expected, tolerance)

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
        found = likelihood.predictive(outputs, torch.stack([none, none]), link, normals)
        check(f"{link}: prediction without uncertainty, of a grid", found, torch.stack([predicted, predicted]))


# -- all laws for a structure ----------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A small network with data.

    Attributes:
        name: For messages.
        model: In float64.
        data: Weighted, with unequal weights.
        likelihood: What its outputs mean.
    """

    name: str
    model: nn.Module
    data: WeightedData
    likelihood: Likelihood


class _Tokens(nn.Module):
    """Tokens, a lone parameter, a normalisation layer, one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 2))
        self.layer, self.norm, self.head = nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(1, (3, 2)) + self.token
        return self.head(self.norm(torch.tanh(self.layer(torch.tanh(self.layer(tokens))))).mean(1))


def problems(seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> list[Problem]:
    """A few small networks: dense, convolutional with groups, tokens; every likelihood; frozen parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mlp = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        normalisation = nn.BatchNorm2d(4)
        normalisation.load_state_dict({"running_var": 0.5 + torch.rand(4)}, strict=False)
        convolutional = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), normalisation, nn.ReLU(inplace=True),
            nn.Conv2d(4, 2, 2, bias=False), nn.Flatten(), nn.Linear(2, 2),
        )  # fmt: skip
        frozen = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        frozen[0].requires_grad_(False)
        frozen[2].bias.requires_grad_(False)
        made = [
            ("dense, categorical", mlp, (3,), Categorical(), torch.randint(3, (7,))),
            ("convolutional, regression", convolutional, (2, 4, 4), Gaussian(), torch.randn(7, 2)),
            ("tokens, categorical", _Tokens(), (6,), Categorical(), torch.randint(3, (7,))),
            ("partly frozen, Bernoulli", frozen, (3,), Bernoulli(), torch.rand(7, 2)),
        ]
        found = []
        for name, model, datum, likelihood, targets in made:
            weights = 0.2 + torch.rand(7, dtype=torch.float64)
            inputs = torch.randn(7, *datum, dtype=torch.float64).to(device, dtype)
            targets = targets if targets.dtype == torch.long else targets.to(dtype)
            data = WeightedData(inputs, targets.to(device), weights / weights.sum(), torch.arange(7))
            found.append(Problem(name, model.to(device, dtype).eval(), data, likelihood))
    return found


def check_structure(
    structure: Structure,
    *,
    tolerance: float = 1e-9,
    device: torch.device | str = "cpu",
    among: Sequence[Problem] | None = None,
) -> None:
    """Run every law on a few small networks: statistics, basis, projections, curvatures, posterior, predictions.

    Laws of the basis and everything after it are checked twice: for the basis as it comes, and cut to
    fewer columns, since posteriors of incomplete bases have terms of their own.

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


# -- helpers ---------------------------------------------------------------------------------------


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested dataclasses, lists and dictionaries, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for field in dataclasses.fields(value) for t in _tensors(getattr(value, field.name))]
    if isinstance(value, Mapping):
        return [t for key in sorted(value) for t in _tensors(value[key])]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _tensors(item)]
    return []


def _assert_all(law: str, actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    if len(actual) != len(expected):
        raise AssertionError(f"{law}: expected {len(expected)} tensors, got {len(actual)}.")
    for one, other in zip(actual, expected, strict=True):
        _assert_equal(law, one, other, tolerance)


def _normals(shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)
