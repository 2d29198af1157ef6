"""Newton steps for a model by conjugate gradients: one step as a function, many as an optimizer.

Parameters are flattened to ``[D]`` in the order of ``model.named_parameters()``, float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from debiased_laplace import _checks
from debiased_laplace._guards import global_random_state
from debiased_laplace.likelihoods import Likelihood
from debiased_laplace.quadratic.optim.conjugate import CGResult, conjugate_gradients
from debiased_laplace.quadratic.optim.optimizer import ModelOptimizer, move, names_of
from debiased_laplace.quadratic.quadratic import Quadratic

__all__ = ["DebiasedNewtonCG", "jacobi_preconditioner", "newton_step"]

#: From the quadratic of the batch that gives the directions to a map ``[D] -> [D]``.
Preconditioner = Callable[[Quadratic], Callable[[Tensor], Tensor]]


def jacobi_preconditioner(diagonal: Tensor, damping: float = 0.0, exponent: float = 1.0) -> Callable[[Tensor], Tensor]:
    r"""Division by :math:`(c_i + \delta)^\alpha`, for the diagonal c of a curvature matrix, ``[D]``.

    With an exponent of 3/4 and the diagonal of the empirical Fisher it is that of Martens, "Deep learning via
    Hessian-free optimization" (ICML 2010).

    Raises:
        ValueError: If an entry is not positive and finite with the damping.
    """
    scale = diagonal.double() + _checks.nonnegative(damping, "damping")
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError(
            f"Expected a diagonal that is positive and finite with the damping, got a smallest entry of "
            f"{float(scale.min()):g}. Add damping."
        )
    scale = scale**exponent
    return lambda vector: vector / scale


def newton_step(
    model: nn.Module,
    batch: Any,
    likelihood: str | Likelihood,
    second: Any = None,
    *,
    lr: float = 1.0,
    n_steps: int = 10,
    damping: float = 0.0,
    tolerance: float | None = None,
    curvature: str = "ggn",
    l2: float = 0.0,
    parameters: str | Sequence[str] | None = None,
    preconditioner: Preconditioner | None = None,
    chunk_size: int | None = None,
) -> CGResult:
    """Move the model's parameters by one Newton step, solved for by conjugate gradients.

    Only the chosen parameters change, and only at the end: after any error they are what they were. The model is
    evaluated in evaluation mode.

    Args:
        model: The model.
        batch: ``(inputs, targets)`` that give the directions; and how far to go, if there is no second batch.
        likelihood: ``"classification"``, ``"regression"``, or a :class:`~debiased_laplace.likelihoods.Likelihood`.
        second: Other data, which say how far to go along each direction (debiased CG).
        lr: The part of the step that is taken.
        n_steps: At most so many steps of CG.
        damping: Added to the diagonal of the curvature.
        tolerance: See :func:`~debiased_laplace.quadratic.optim.conjugate_gradients`.
        curvature: ``"ggn"``, never negative, or ``"hessian"``.
        l2: Strength of a regulariser, half of it times the square norm of the parameters.
        parameters: Names and patterns of the trainable parameters to move; None for all.
        preconditioner: Makes a map ``[D] -> [D]`` from the quadratic of the first batch.
        chunk_size: Data at a time; None for whole batches.

    Returns:
        The path of CG; its ``delta`` times ``lr`` was added to the parameters.

    Raises:
        NonFiniteError: If the loss, or a parameter after the step, is not finite.

    Example:
        >>> import torch
        >>> from debiased_laplace.quadratic.optim import newton_step
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(3, 1).double(), torch.randn(64, 3).double()
        >>> result = newton_step(model, (x, x.sum(1, keepdim=True)), "regression")
        >>> model.weight.data.round(decimals=6).tolist()
        [[1.0, 1.0, 1.0]]
    """
    names = names_of(model, parameters)
    first, other = _quadratics(model, batch, second, likelihood, curvature, l2, names, chunk_size)
    return _move(model, names, first, other, lr, n_steps, damping, tolerance, preconditioner)


class DebiasedNewtonCG(ModelOptimizer):
    r"""Newton's method with conjugate gradients: directions from one batch, magnitudes from another.

    A step costs two products with the curvature of half of the data for each step of CG, as much as one product with
    that of all of them. What it is given in ``param_groups`` (``lr``, ``damping``, ``n_steps``, ``tolerance``) may be
    scheduled and is part of ``state_dict()``; ``.grad`` is neither read nor written. Data are seen in evaluation mode:
    no dropout, and normalisation layers keep the statistics they have.

    Args:
        model: The model whose parameters it moves.
        likelihood: ``"classification"``, ``"regression"``, or a :class:`~debiased_laplace.likelihoods.Likelihood`.
        lr: The part of the Newton step that is taken.
        n_steps: Steps of CG for each step.
        damping: Added to the diagonal of the curvature.
        tolerance: See :func:`~debiased_laplace.quadratic.optim.conjugate_gradients`.
        debiased: Split a batch in halves if there is no second; otherwise it gives directions and magnitudes (the
            single-batch method, whose magnitudes are biased).
        curvature: ``"ggn"``, never negative, or ``"hessian"``, with which CG stops at negative curvature.
        l2: Strength of a regulariser, half of it times the square norm of the parameters.
        parameters: Names and patterns of the trainable parameters to move; None for all.
        preconditioner: Makes a map ``[D] -> [D]`` from the quadratic of the first batch.
        chunk_size: Data at a time; None for whole batches.

    Attributes:
        last_result: The path of the last step's CG; not part of the state.

    Example:
        >>> import torch
        >>> from debiased_laplace.quadratic.optim import DebiasedNewtonCG
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(64, 3)
        >>> optimizer = DebiasedNewtonCG(model, "regression", n_steps=4)
        >>> losses = [optimizer.step((x, x.sum(1, keepdim=True))) for _ in range(3)]
        >>> losses[2] < 1e-3 * losses[0]
        True

    Source: Tatzel, Mucsányi, Hackel, Hennig (arXiv 2410.14325), algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        lr: float = 1.0,
        *,
        n_steps: int = 10,
        damping: float = 0.0,
        tolerance: float | None = None,
        debiased: bool = True,
        curvature: str = "ggn",
        l2: float = 0.0,
        parameters: str | Sequence[str] | None = None,
        preconditioner: Preconditioner | None = None,
        chunk_size: int | None = None,
    ) -> None:
        defaults = {"lr": lr, "n_steps": n_steps, "damping": damping, "tolerance": tolerance}
        super().__init__(model, likelihood, parameters, debiased, defaults)
        self.curvature, self.l2, self.preconditioner, self.chunk_size = curvature, l2, preconditioner, chunk_size
        self.last_result: CGResult | None = None

    def step(self, batch: Any, second: Any = None) -> float:  # type: ignore[override]
        """One Newton step.

        Args:
            batch: ``(inputs, targets)``, or a function without arguments that returns it (or two of them).
            second: Other data for the magnitudes. Without them a batch is split in halves, or used for both if the
                optimizer is not ``debiased``.

        Returns:
            The mean loss of all the data before the step, with the regulariser.

        Raises:
            NonFiniteError: If the loss, or a parameter after the step, is not finite; the parameters stay.
        """
        batch, second = self._batches(batch, second)
        group = self.param_groups[0]
        first, other = _quadratics(
            self.model, batch, second, self.likelihood, self.curvature, self.l2, self._chosen, self.chunk_size
        )
        self.last_result = _move(
            self.model, self._chosen, first, other, float(group["lr"]), group["n_steps"], group["damping"],
            group["tolerance"], self.preconditioner,
        )  # fmt: skip
        if other is None:
            return first.loss
        return (first.n_data * first.loss + other.n_data * other.loss) / (first.n_data + other.n_data)


def _quadratics(
    model: nn.Module,
    batch: Any,
    second: Any,
    likelihood: str | Likelihood,
    curvature: str,
    l2: float,
    names: list[str],
    chunk_size: int | None,
) -> tuple[Quadratic, Quadratic | None]:
    with global_random_state():
        first = Quadratic(model, batch, likelihood, curvature, l2=l2, parameters=names, chunk_size=chunk_size)
        if second is None:
            return first, None
        other = Quadratic(model, second, likelihood, curvature, l2=l2, parameters=names, chunk_size=chunk_size)
        return first, other


def _move(
    model: nn.Module,
    names: list[str],
    first: Quadratic,
    second: Quadratic | None,
    lr: float,
    n_steps: int,
    damping: float,
    tolerance: float | None,
    preconditioner: Preconditioner | None,
) -> CGResult:
    with global_random_state():
        result = conjugate_gradients(
            first,
            second,
            n_steps=n_steps,
            damping=damping,
            preconditioner=None if preconditioner is None else preconditioner(first),
            tolerance=tolerance,
        )
    move(model, names, lr * result.delta)
    return result
