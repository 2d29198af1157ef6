"""Checks at public boundaries, and the wording of their errors: expected, got, what to do."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor


class NotFittedError(RuntimeError, AttributeError):
    """Something was asked of a posterior that has not been fitted.

    It is an ``AttributeError`` too, which is what laplace-torch raises there.
    """


class UnsupportedLayerError(NotImplementedError):
    """A trainable parameter that no curvature block covers."""


class NonFiniteError(ValueError):
    """NaN or infinity where only finite numbers make sense."""


class ConvergenceError(RuntimeError):
    """An iteration that ended before its result was as precise as it has to be."""


def function(value: Any, name: str) -> None:
    """Raise a ``TypeError`` for what is neither None nor can be called."""
    if value is not None and not callable(value):
        raise TypeError(f"Expected a function for {name}, got {type(value).__name__}. Leave it out, or give one.")


def positive(value: Any, name: str) -> float:
    """A positive, finite number as a float, or an error that names it."""
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"Expected a positive number for {name}, got {value!r}.") from None
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"Expected a positive, finite {name}, got {number:g}.")
    return number


def nonnegative(value: Any, name: str) -> float:
    """A finite number of at least zero as a float, or an error that names it."""
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"Expected a number of at least zero for {name}, got {value!r}.") from None
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"Expected a finite {name} of at least zero, got {number:g}.")
    return number


def whole(value: Any, name: str, at_least: int = 1, *, otherwise: str = "", at_most: int = 2**63 - 1) -> None:
    """Raise a ``ValueError`` for what is no whole number in a range.

    Args:
        value: Anything; ``None`` and strings are right where ``otherwise`` says what they mean.
        name: Of the argument.
        at_least: The smallest that is right.
        otherwise: What else is right, in words, such as ``"None for all"``.
        at_most: The largest.
    """
    if (value is None or isinstance(value, str)) and repr(value) in otherwise:
        return
    right = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not right or not at_least <= int(value) <= at_most:
        top = "" if at_most == 2**63 - 1 else f" and at most {at_most}"
        raise ValueError(
            f"Expected a whole number {name} of at least {at_least}{top}"
            + (f", or {otherwise}" if otherwise else "") + f", got {value!r}."
        )  # fmt: skip


def seed(value: Any, name: str = "seed") -> None:
    """Raise a ``ValueError`` for what torch's generators take for no seed."""
    whole(value, name, -(2**63), at_most=2**64 - 1)


def chunk_size(value: int | None) -> None:
    """Raise a ``ValueError`` for a number of data at a time below one."""
    whole(value, "chunk_size", otherwise="None to choose it")


def prior_precisions(value: Any, n_parts: int | None = None, n_params: int | None = None) -> Tensor:
    """Prior precision(s) as a float64 vector of length one, ``n_parts`` or ``n_params``, all positive."""
    try:
        # A number is not to be rounded to the default precision on the way.
        precision = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"Expected a prior precision that is a number or a tensor, got {value!r}.") from None
    if precision.ndim > 1:
        raise ValueError(f"Expected a prior precision with at most one dimension, got shape {tuple(precision.shape)}.")
    precision = precision.reshape(-1)
    if not bool(((precision > 0) & precision.isfinite()).all()) or len(precision) == 0:
        raise ValueError(
            f"Expected positive, finite prior precisions, got {precision.tolist()}. "
            "Zero would make the posterior improper along flat directions."
        )
    if n_parts is not None and len(precision) not in (1, n_parts, n_params):
        raise ValueError(
            f"Expected one prior precision, one for each of the {n_parts} parts that coverage() lists, or one for each "
            f"of the {n_params} parameters, got {len(precision)}."
        )
    return precision


def finite(value: Tensor, what: str, remedy: str) -> None:
    """Raise a :class:`NonFiniteError` that says what is not finite, and what to do."""
    if not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        raise NonFiniteError(f"Expected finite numbers in {what}, got {bad} of {value.numel()} that are not. {remedy}")
